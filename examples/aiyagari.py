"""Aiyagari (1994): no aggregate shocks, log labour an AR(1) in seven states by Tauchen (1986), annual.

  python examples/aiyagari.py                              # gamma 3, standard deviation .4, persistence .6
  python examples/aiyagari.py --gamma 5 --rho 0.9          # another cell of Table II
  python examples/aiyagari.py --k-min -1                   # households may owe a year's wage or so

Every flag of deepham_ks.py; results in runs/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402


@dataclass(frozen=True)
class Calibration:
    """Aiyagari (1994), annual."""

    beta: float = dk.option(0.96, "discount factor", "(0, 1)")
    gamma: float = dk.option(3.0, "relative risk aversion; 1 is log utility", "[0.1, 20]")
    alpha: float = dk.option(0.36, "capital share", "(0, 1)")
    delta: float = dk.option(0.08, "depreciation rate", "(0, 1]")
    k_min: float = dk.option(0.0, "borrowing limit: k' is at least this, in goods", "(-1e6, 1e6)")
    sigma: float = dk.option(0.4, "standard deviation of log labour, not of its innovations", "(0, 1)")
    rho: float = dk.option(0.6, "persistence of log labour", "[0, 1)")


def tauchen(sigma: float, rho: float):
    """Nodes (7,) from -3 to 3 standard deviations and transition (7, 7), cells half way between the nodes."""
    x = sigma * np.arange(-3, 4)
    ends = (x[:-1] + x[1:]) / 2
    below = norm.cdf((ends - rho * x[:, None]) / (sigma * np.sqrt(1 - rho**2)))
    return x, np.diff(below, prepend=0, append=1)


def economy(cal: Calibration) -> dk.Economy:
    x, P = tauchen(cal.sigma, cal.rho)
    return dk.Economy(
        alpha=cal.alpha, delta=cal.delta, beta=cal.beta, gamma=cal.gamma, k_min=cal.k_min, TFP=[1.0], P_z=[[1.0]], Pi=P,
        labour=np.exp(x), benefit=0.0, sees_s=np.linspace(-1, 1, 7)[:, None], z_names=["no aggregate shocks"],
        s_names=[f"labour {units:.2f}" for units in np.exp(x)])


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
