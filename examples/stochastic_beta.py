"""Krusell & Smith's (1998) second model: discount factors that change about once a lifetime, and a fat tail of wealth.

  python examples/stochastic_beta.py        # every flag of deepham_ks.py, results in runs/stochastic_beta
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

BETA = np.array([0.9858, 0.9894, 0.9930])  # impatient, middle, patient
# P(type' | type): the extremes last 200 quarters on average, half of the households are of the middle type at first
TYPES = np.array([[1 - 1 / 200, 1 / 200, 0], [1 / 1600, 1 - 2 / 1600, 1 / 1600], [0, 1 / 200, 1 - 1 / 200]])


def economy(cal: dk.Calibration) -> dk.Economy:
    """s = (type, employment), types slow; employment as in the default economy and independent of the type."""
    base = dk.krusell_smith(cal)
    n = len(BETA)
    Pi = np.einsum("ab,xyij->xyaibj", TYPES, base.Pi).reshape(2, 2, 2 * n, 2 * n)
    patience = np.linspace(-1, 1, n)
    return dk.Economy(
        alpha=base.alpha, delta=base.delta, gamma=base.gamma, TFP=base.TFP, L=base.L, P_z=base.P_z, Pi=Pi,
        beta=np.repeat(BETA, 2), income=np.tile(base.income, n), sees_z=base.sees_z,
        sees_s=np.stack([np.repeat(patience, 2), np.tile(base.sees_s[:, 0], n)], 1), weight=np.tile(base.weight, n),
        s_names=[f"beta {b:g}, {name}" for b in BETA for name in base.s_names], z_names=base.z_names)


# where few households hold much, K has more sampling noise
CONFIG = dk.Config(n_agents=1000, n_economies=48)

if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, config=CONFIG))
