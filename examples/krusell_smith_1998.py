"""The three models of Krusell & Smith (1998), quarterly.

  python examples/krusell_smith_1998.py                             # log utility
  python examples/krusell_smith_1998.py --model risk-aversion       # gamma = 5
  python examples/krusell_smith_1998.py --model stochastic-beta     # discount factors that change once a lifetime

Every flag of deepham_ks.py; results in runs/. The unemployed earn nothing; where discount factors differ they get .07
goods, which a tax on the employed pays for, and households may owe up to 2.4.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

BETA = np.array([0.9858, 0.9894, 0.9930])  # impatient, middle, patient
TYPES = np.array([[0.995, 0.005, 0], [0.000625, 0.99875, 0.000625], [0, 0.005, 0.995]])  # P(type' | type)
HOURS = 0.3271  # of the employed
BENEFIT = 0.07 / 2.387  # in wages, which are 2.387 goods


@dataclass(frozen=True)
class Calibration:
    """Krusell & Smith (1998)."""

    model: str = dk.option("benchmark", "which of the three", choices=("benchmark", "risk-aversion", "stochastic-beta"))


def economy(cal: Calibration) -> dk.Economy:
    """s: 0 unemployed / 1 employed, in the third model for each type of discount factor; z: 0 bad / 1 good."""
    base = dk.krusell_smith(dk.Calibration(gamma=5.0 if cal.model == "risk-aversion" else 1.0))
    common = {name: getattr(base, name) for name in ("alpha", "delta", "gamma", "TFP", "P_z", "z_names")}
    if cal.model != "stochastic-beta":
        return dk.Economy(**common, Pi=base.Pi, beta=base.beta, labour=[0.0, HOURS], benefit=0.0, sees_s=base.sees_s,
                          weight=base.weight, s_names=base.s_names)
    n = len(BETA)
    return dk.Economy(
        **common, Pi=np.einsum("ab,xyij->xyaibj", TYPES, base.Pi).reshape(2, 2, 2 * n, 2 * n), beta=np.repeat(BETA, 2),
        k_min=-2.4, labour=np.tile([0.0, HOURS], n), benefit=np.tile([BENEFIT, 0.0], n),
        sees_s=np.stack([np.repeat(np.linspace(-1, 1, n), 2), np.tile(base.sees_s[:, 0], n)], 1),
        weight=np.tile(base.weight, n), s_names=[f"beta {b:g}, {name}" for b in BETA for name in base.s_names])


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
