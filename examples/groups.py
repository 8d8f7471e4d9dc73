"""J permanent groups of households, whose mean capitals are J state variables: where a grid of n nodes each needs n^J.

  python examples/groups.py --groups 7 --spread 0.0068 --beta 0.9862 --moments groups     # results in runs/

It has every flag of deepham_ks.py. Without --moments groups households see mean capital alone. --spread 0.0068 spreads
discount factors evenly around --beta (Carroll, Slacalek, Tokuoka & White 2017). With --spread 0 the groups are alike
and the answer is the default economy's, whatever J is; thirty means of like groups are more than training settles on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402


@dataclass(frozen=True)
class Calibration(dk.Calibration):
    """Krusell & Smith (1998) with permanent groups."""

    groups: int = dk.option(30, "J, groups of equal size", "[1, 1000]")
    spread: float = dk.option(0.0, "half-width of the uniform distribution of discount factors", "[0, 0.1]")


def economy(cal: Calibration) -> dk.Economy:
    """s = (group, employment), groups for ever; employment as in the default economy and independent of the group."""
    J = cal.groups
    dk.require(J > 1 or cal.spread == 0, "--spread has no effect on one group; give --groups 2 or more")
    base = dk.krusell_smith(cal)
    place = (2 * np.arange(J) + 1) / J - 1  # midpoints of J equal parts of [-1, 1]
    seen = np.linspace(-1, 1, J) if J > 1 else np.zeros(1)
    return dk.Economy(
        alpha=base.alpha, delta=base.delta, gamma=base.gamma, k_min=base.k_min, TFP=base.TFP, P_z=base.P_z,
        Pi=np.einsum("ab,xyij->xyaibj", np.eye(J), base.Pi).reshape(2, 2, 2 * J, 2 * J),
        beta=np.repeat(cal.beta + cal.spread * place, 2), income=np.tile(base.income, J),
        shares=np.tile(base.arrays.shares, J) / J, group=np.repeat(np.arange(J), 2),
        sees_s=np.stack([np.repeat(seen, 2), np.tile(base.sees_s[:, 0], J)], 1), weight=np.tile(base.weight, J),
        s_names=[f"group {j}, {name}" for j in range(J) for name in base.s_names], z_names=base.z_names)


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
