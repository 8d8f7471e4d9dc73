"""The market economy of Davila, Hong, Krusell & Rios-Rull (2012) with high dispersion of earnings: no aggregate shocks.

  python examples/davila.py        # every flag of deepham_ks.py, results in runs/davila
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

PRODUCTIVITY = [1.0, 5.29, 46.55]  # Diaz, Pijoan-Mas & Rios-Rull (2003), annual
ECONOMY = dk.Economy(
    alpha=0.36, delta=0.08, beta=0.887, gamma=2.0, TFP=[1.0], P_z=[[1.0]], income=PRODUCTIVITY,
    Pi=[[0.992, 0.008, 0.0], [0.009, 0.980, 0.011], [0.0, 0.083, 0.917]],
    s_names=[f"productivity {x:g}" for x in PRODUCTIVITY], z_names=["no aggregate shocks"])

if __name__ == "__main__":
    sys.exit(dk.main(economy=ECONOMY))
