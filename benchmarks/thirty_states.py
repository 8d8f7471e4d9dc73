"""What a grid cannot do: J permanent groups, whose mean capitals are J state variables. With identical groups the truth
is the default economy's at every J; with discount factors spread over seven groups the grid in K alone stands beside
the network. Makes the runs that this version has not made yet, one process each, into benchmarks/groups/.

  python benchmarks/thirty_states.py     # all, hours; or the names of some in RUNS
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT, KEPT = HERE.parent, HERE / "groups"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import groups  # noqa: E402

import deepham_ks as dk  # noqa: E402

FLAGS = ["--moments", "groups"]
SPREAD = ["--groups", "7", "--spread", "0.0068", "--beta", "0.9862"]
RUNS = {"J1": 1, "J3": 3, "J10": 10, "J30": 30, "spread": SPREAD}


class Truth(dk.Policy):
    """The grid solution of the default economy, for households of any group."""

    def __init__(self, grid: dk.GridSolution, economy: dk.Economy):
        self.grid, self.economy, self.econ = grid, economy, economy.tables()
        self.K_mean, self.K_of_z = grid.K_mean, grid.K_of_z

    def policy(self, at: dk.At) -> torch.Tensor:
        return self.grid.policy(at._replace(s=at.s % 2))

    def values(self, at: dk.At) -> torch.Tensor:
        return self.grid.values(at._replace(s=at.s % 2))

    def reach(self) -> tuple:
        return self.grid.reach()


def identical(J: int, config: dk.Config, grid: dk.GridConfig = dk.GRIDS["converged"]) -> dict:
    """Train on J identical groups; the network beside the default economy's grid in the limit."""
    network = dk.solve(groups.economy(groups.Calibration(groups=J)), config, device="cpu")
    of, behind = {}, {}
    with torch.no_grad():
        for name, solution in (("network", network), ("grid", Truth(dk.solve_grid(config=grid), network.economy))):
            of[name], behind[name] = dk.judge_limit(solution, config)
    weights = network.weights
    return {"groups": J, "states": len(network.econ.beta), "seconds": weights["seconds"], "version": dk.__version__,
            "iterations": len(weights["history"]["seconds"]), "config": dataclasses.asdict(config),
            "still_moving": dk.still_moving(weights["history"], weights["settled"], config),
            "device": f"CPU, {torch.get_num_threads()} threads",
            "w1": dk.scipy.stats.wasserstein_distance(*[x["k"] for x in behind.values()],
                                                      *[x["weight"] for x in behind.values()]),
            "std_gap": of["network"]["capital"]["std"] / of["grid"]["capital"]["std"] - 1,
            **{name: {part: of[name][part] for part in ("euler_log10", "bellman_own_c", "moves")} for name in of}}


def one(name: str) -> None:
    """Into benchmarks/groups/: a summary, or for the spread the metrics.json of the command line."""
    if isinstance(RUNS[name], int):
        found = identical(RUNS[name], dk.parse(FLAGS).config)
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "examples" / "groups.py"), *RUNS[name], *FLAGS]
            done = subprocess.run([*command, "--output-dir", folder], capture_output=True, text=True)
            metrics = Path(folder) / "metrics.json"
            found = json.loads(metrics.read_text()) if metrics.exists() else {"error": done.stderr[-300:]}
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    KEPT.mkdir(exist_ok=True)
    if sys.argv[1:2] == ["--one"]:
        return one(sys.argv[2])
    for name in sys.argv[1:] or RUNS:
        path = KEPT / f"{name}.json"
        if not path.exists() or json.loads(path.read_text()).get("version") != dk.__version__:
            print(name, flush=True)
            subprocess.run([sys.executable, __file__, "--one", name], check=True)


if __name__ == "__main__":
    main()
