"""Unemployment that follows job finding and separation: labour depends on the history of z, and mean capital is not
enough.

  python examples/labour_flows.py                      # every flag of deepham_ks.py, results in runs/
  python examples/labour_flows.py --learnt-moments 1   # a moment that says more than (K, L)

The unemployed find a job with a probability that the next aggregate state sets, and the employed lose theirs. Benefits
are a share of the wage, and a tax on the wages of the same period pays for them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402


@dataclass(frozen=True)
class Calibration:
    """Labour flows, quarterly."""

    finding_bad: float = dk.option(0.10, "probability of finding a job on the way to the bad state", "(0, 1]")
    finding_good: float = dk.option(0.30, "and to the good one", "(0, 1]")
    separation_bad: float = dk.option(0.05, "probability of losing a job on the way to the bad state", "(0, 1]")
    separation_good: float = dk.option(0.01, "and to the good one", "(0, 1]")
    benefit: float = dk.option(0.4, "unemployment benefit, a share of the wage", "[0, 1]")
    beta: float = dk.option(0.99, "discount factor", "(0, 1)")
    gamma: float = dk.option(1.0, "relative risk aversion; 1 is log utility", "[0.1, 20]")
    alpha: float = dk.option(0.36, "capital share", "(0, 1)")
    delta: float = dk.option(0.025, "depreciation rate", "(0, 1]")
    k_min: float = dk.option(0.0, "borrowing limit: k' is at least this, in goods", "(-1e6, 1e6)")
    tfp_shock: float = dk.option(0.01, "TFP is 1 minus this in the bad state, 1 plus this in the good one", "[0, 0.5]")
    z_stays: float = dk.option(0.9, "probability that the aggregate state stays", "(0, 1)")


def economy(cal: Calibration) -> dk.Economy:
    """s: 0 unemployed / 1 employed; z: 0 bad / 1 good."""
    found = np.array([cal.finding_bad, cal.finding_good])
    lost = np.array([cal.separation_bad, cal.separation_good])
    Pi = np.stack([np.stack([1 - found, found], -1), np.stack([lost, 1 - lost], -1)], 1)  # (z', s, s')
    return dk.Economy(
        alpha=cal.alpha, delta=cal.delta, gamma=cal.gamma, beta=cal.beta, k_min=cal.k_min,
        TFP=[1 - cal.tfp_shock, 1 + cal.tfp_shock], Pi=Pi[None],
        P_z=[[cal.z_stays, 1 - cal.z_stays], [1 - cal.z_stays, cal.z_stays]],
        labour=[0.0, 1.0], benefit=[cal.benefit, 0.0], s_names=("unemployed", "employed"),
        z_names=("bad state", "good state"))


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
