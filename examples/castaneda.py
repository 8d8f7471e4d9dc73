"""Castaneda, Diaz-Gimenez & Rios-Rull's (2003) earnings, annual: very few earn a thousand times what the poorest do,
and one percent of households holds most of the wealth.

  python examples/castaneda.py                  # every flag of deepham_ks.py, results in runs/castaneda
  python examples/castaneda.py --tfp-shock 0    # no aggregate shocks
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

EARNINGS = [1.0, 3.15, 9.78, 1061.0]
PI = np.array([[0.9624, 0.0114, 0.0039, 0.0001], [0.0307, 0.9433, 0.0037, 0.0], [0.0150, 0.0043, 0.9582, 0.0002],
               [0.1066, 0.0049, 0.0611, 0.8051]])


@dataclass(frozen=True)
class Calibration:
    """Those who work in Castaneda et al.; nobody retires."""

    tfp_shock: float = dk.option(0.02, "TFP is 1 minus or plus this", "[0, 0.5]")
    z_duration: float = dk.option(10.0, "expected years in an aggregate state", "[1, 1e6]")


def economy(cal: Calibration) -> dk.Economy:
    dk.require(cal.tfp_shock > 0 or cal.z_duration == Calibration.z_duration,
               "--z-duration has no effect without --tfp-shock; leave it out")
    stay = 1 - 1 / cal.z_duration
    TFP, P_z = ([1.0], [[1.0]]) if cal.tfp_shock == 0 else (
        [1 - cal.tfp_shock, 1 + cal.tfp_shock], [[stay, 1 - stay], [1 - stay, stay]])
    return dk.Economy(alpha=0.376, delta=0.059, beta=0.942, gamma=1.5, TFP=TFP, P_z=P_z, income=EARNINGS,
                      Pi=PI / PI.sum(1, keepdims=True), s_names=[f"earns {x:g}" for x in EARNINGS],
                      z_names=["no aggregate shocks"] if len(TFP) == 1 else ["bad state", "good state"])


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
