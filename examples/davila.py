"""Davila, Hong, Krusell & Rios-Rull (2012) with high dispersion of earnings: the market economy and the planner's.

  python examples/davila.py                            # every flag of deepham_ks.py, results in runs/davila
  python examples/davila.py --equilibrium planner      # the constrained-efficient economy
  python examples/davila.py --tfp-shock 0.05           # TFP .95 / 1.05, each for 8 years on average
  python examples/davila.py --tfp-shock 0.05 --risk countercyclical    # as in Han, Yang & E (2021)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

PRODUCTIVITY = [1.0, 5.29, 46.55]  # Diaz, Pijoan-Mas & Rios-Rull (2003), annual
PI = np.array([[0.992, 0.008, 0.0], [0.009, 0.980, 0.011], [0.0, 0.083, 0.917]])
COUNTERCYCLICAL = np.array([[[0.6512, 0.3488, 0.0], [0.978, 0.011, 0.011], [0.0, 0.083, 0.917]],
                            [[0.98, 0.02, 0.0], [0.009, 0.980, 0.011], [0.0, 0.083, 0.917]]])  # (z', s, s')


@dataclass(frozen=True)
class Calibration:
    """Annual; without TFP shocks Davila et al.'s economy."""

    tfp_shock: float = dk.option(0.0, "TFP is 1 minus or plus this", "[0, 0.5]")
    z_duration: float = dk.option(8.0, "expected years in an aggregate state", "[1, 1e6]")
    risk: str = dk.option("constant", "of productivity: as in Davila et al., or larger in the bad state",
                          choices=("constant", "countercyclical"))


def economy(cal: Calibration) -> dk.Economy:
    dk.require(cal.tfp_shock > 0 or cal.z_duration == Calibration.z_duration,
               "--z-duration has no effect without --tfp-shock; give both")
    dk.require(cal.tfp_shock > 0 or cal.risk == "constant", "--risk countercyclical needs --tfp-shock; give both")
    stay = 1 - 1 / cal.z_duration
    TFP, P_z = ([1.0], [[1.0]]) if cal.tfp_shock == 0 else (
        [1 - cal.tfp_shock, 1 + cal.tfp_shock], [[stay, 1 - stay], [1 - stay, stay]])
    return dk.Economy(
        alpha=0.36, delta=0.08, beta=0.887, gamma=2.0, TFP=TFP, P_z=P_z, labour=np.tile(PRODUCTIVITY, (len(TFP), 1)),
        Pi=PI if cal.risk == "constant" else COUNTERCYCLICAL[None], start=6.0,
        s_names=[f"productivity {x:g}" for x in PRODUCTIVITY],
        z_names=["no aggregate shocks"] if len(TFP) == 1 else ["bad state", "good state"])


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
