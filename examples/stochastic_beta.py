"""The default economy with discount factors that change about once a lifetime, and a fat tail of wealth. Krusell &
Smith's (1998) own tables are in examples/krusell_smith_1998.py.

  python examples/stochastic_beta.py        # flags of deepham_ks.py but --beta, results in runs/stochastic_beta
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402

BETA = np.array([0.9858, 0.9894, 0.9930])  # impatient, middle, patient
# P(type' | type): the extremes last 200 quarters on average, half of the households are of the middle type at first
TYPES = np.array([[1 - 1 / 200, 1 / 200, 0], [1 / 1600, 1 - 2 / 1600, 1 / 1600], [0, 1 / 200, 1 - 1 / 200]])

# the flags of the default economy but --beta, which BETA stands for
KEPT = [item for item in dataclasses.fields(dk.Calibration) if item.name != "beta"]
Calibration = dataclasses.make_dataclass(
    "Calibration", [(x.name, x.type, dataclasses.field(default=x.default, metadata=x.metadata)) for x in KEPT],
    frozen=True, namespace={"__doc__": dk.Calibration.__doc__})


def economy(cal: Calibration) -> dk.Economy:
    """s = (type, employment), types slow; employment as in the default economy and independent of the type."""
    base, n = dk.krusell_smith(dk.Calibration(**dataclasses.asdict(cal))), len(BETA)
    Pi = np.einsum("ab,xyij->xyaibj", TYPES, base.Pi).reshape(2, 2, 2 * n, 2 * n)
    patience = np.linspace(-1, 1, n)
    return dk.Economy(
        alpha=base.alpha, delta=base.delta, gamma=base.gamma, k_min=base.k_min, TFP=base.TFP, P_z=base.P_z,
        Pi=Pi, beta=np.repeat(BETA, 2), income=np.tile(base.income, n),
        sees_s=np.stack([np.repeat(patience, 2), np.tile(base.sees_s[:, 0], n)], 1), weight=np.tile(base.weight, n),
        s_names=[f"beta {b:g}, {name}" for b in BETA for name in base.s_names], z_names=base.z_names)


if __name__ == "__main__":
    sys.exit(dk.main(economy=economy, calibration=Calibration))
