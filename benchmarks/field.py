"""The tables of Krusell & Smith (1998) and of Aiyagari (1994) by network and grid. Writes benchmarks/field/MODEL.json,
the metrics of a run of each of the three models, and benchmarks/field/aiyagari.json, the interest rate in all 24 cells.
What this version has run is kept.

  python benchmarks/field.py                     # about 35 minutes on one thread
  python benchmarks/field.py --only aiyagari     # or benchmark, risk-aversion, stochastic-beta
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]
import aiyagari  # noqa: E402

import deepham_ks as dk  # noqa: E402

FIELD = HERE / "field"
MODELS = ("benchmark", "risk-aversion", "stochastic-beta")
CELLS = list(itertools.product((0.2, 0.4), (0.0, 0.3, 0.6, 0.9), (1.0, 3.0, 5.0)))  # sigma, rho, gamma


def known(path: Path) -> dict:
    """What this version wrote there."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("version") == dk.__version__ else {}


def krusell_smith_1998(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, HERE.parent / "examples" / "krusell_smith_1998.py", "--model", model,
                        "--output-dir", folder], check=False)
        (FIELD / f"{model}.json").write_text((Path(folder) / "metrics.json").read_text())


def interest_rate(solution) -> dict:
    """Of the stationary distribution, in percent, and how the solution was found."""
    found = solution.simulate(100).statistics()
    return {"r": found["interest_rate_percent"], "gini": found["gini_wealth"]}


def aiyagari_table() -> None:
    path = FIELD / "aiyagari.json"
    table = known(path) or {"version": dk.__version__, "cells": {}}
    for sigma, rho, gamma in CELLS:
        name = f"{sigma:g} {rho:g} {gamma:g}"
        if name in table["cells"]:
            continue
        economy = aiyagari.economy(aiyagari.Calibration(sigma=sigma, rho=rho, gamma=gamma))
        network = dk.solve(economy)
        table["cells"][name] = {"network": interest_rate(network), "grid": interest_rate(dk.solve_grid(economy)),
                                "settled": network.settled, "seconds": network.weights["seconds"]}
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(name, table["cells"][name], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*MODELS, "aiyagari"))
    only = parser.parse_args().only
    FIELD.mkdir(exist_ok=True)
    for model in MODELS if only is None else [only] if only in MODELS else []:
        if not known(FIELD / f"{model}.json"):
            krusell_smith_1998(model)
    if only in (None, "aiyagari"):
        aiyagari_table()
