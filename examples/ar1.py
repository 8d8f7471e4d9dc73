"""Log TFP and log productivity as AR(1) processes, Rouwenhorst with 5 and 7 nodes: 35 states where the paper has four.

  python examples/ar1.py        # every flag of deepham_ks.py and those of Calibration, results in runs/ar1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402


@dataclass(frozen=True)
class Calibration:
    """Preferences, technology and two AR(1) processes in logs, quarterly."""

    beta: float = dk.option(0.99, "discount factor", "(0, 1)")
    gamma: float = dk.option(1.0, "relative risk aversion; 1 is log utility", "[0.1, 20]")
    alpha: float = dk.option(0.36, "capital share", "(0, 1)")
    delta: float = dk.option(0.025, "depreciation rate", "(0, 1]")
    rho_z: float = dk.option(0.95, "persistence of log TFP", "[0, 1)")
    sigma_z: float = dk.option(0.007, "standard deviation of its innovations", "(0, 1)")
    rho_s: float = dk.option(0.9, "persistence of log productivity", "[0, 1)")
    sigma_s: float = dk.option(0.087, "standard deviation of its innovations", "(0, 1)")


def rouwenhorst(n: int, rho: float, sigma: float):
    """Nodes (n,) and transition (n, n) of an AR(1) with mean zero (Kopecky & Suen 2010)."""
    p, P = (1 + rho) / 2, np.ones((1, 1))
    for size in range(2, n + 1):
        corners = [np.pad(P, pad) for pad in (((0, 1), (0, 1)), ((0, 1), (1, 0)), ((1, 0), (0, 1)), ((1, 0), (1, 0)))]
        P = p * corners[0] + (1 - p) * corners[1] + (1 - p) * corners[2] + p * corners[3]
        P[1:-1] /= 2
    return np.linspace(-1, 1, n) * np.sqrt((n - 1) / (1 - rho**2)) * sigma, P


def economy(cal: Calibration) -> dk.Economy:
    (z, P_z), (s, P_s) = rouwenhorst(5, cal.rho_z, cal.sigma_z), rouwenhorst(7, cal.rho_s, cal.sigma_s)
    return dk.Economy(alpha=cal.alpha, delta=cal.delta, beta=cal.beta, gamma=cal.gamma, TFP=np.exp(z), P_z=P_z,
                      Pi=P_s, income=np.exp(s), sees_s=np.linspace(-1, 1, 7)[:, None],
                      s_names=[f"productivity {x:.2f}" for x in np.exp(s)], z_names=[f"TFP {x:.3f}" for x in np.exp(z)])


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
