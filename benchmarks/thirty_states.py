"""What a grid cannot do: J permanent groups, whose mean capitals are J state variables. With identical groups the truth
is the default economy's at every J; with discount factors spread over seven groups the grid in K alone stands beside
the network. Runs what is not there yet, one process each, into benchmarks/groups/, and draws benchmarks/groups.png; the
tables of README.md are made from the same files by tools/readme_tables.py.

  python benchmarks/thirty_states.py     # all; or the names of some in RUNS
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import scipy.stats
import torch

HERE = Path(__file__).resolve().parent
ROOT, KEPT = HERE.parent, HERE / "groups"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import groups  # noqa: E402
from bench import FORGET  # noqa: E402

import deepham_ks as dk  # noqa: E402

SPREAD = ["--groups", "7", "--spread", "0.0068", "--beta", "0.9862"]
RUNS = {"J1": 1, "J3": 3, "J10": 10, "J30": 30, "spread": SPREAD}
GRID_NODES = 12  # of each state variable, as the grid solution has for K


class Truth(dk.Policy):
    """The grid solution of the default economy, for households of any group."""

    def __init__(self, grid: dk.GridSolution, econ: dk.Tables):
        self.grid, self.econ = grid, econ

    def policy(self, k, s, K, z, *moments):
        return self.grid.policy(k, s % 2, K, z)

    def values(self, k, s, K, z, *moments):
        return self.grid.values(k, s % 2, K, z)


def identical(J: int, config: dk.Config = groups.CONFIG, grid: dk.GridConfig = dk.GRIDS["converged"]) -> dict:
    """Train on J identical groups; the network beside the default economy's grid on the same shocks, N = 5,000."""
    network = dk.solve(groups.economy(groups.Calibration(groups=J)), config, seed=0)
    memory = dk.peak_memory_gb(network.device.type)
    both = {"network": network, "grid": Truth(dk.solve_grid(config=grid), network.econ)}
    longer = dataclasses.replace(config, eval_periods=config.eval_periods + FORGET, eval_drop=config.eval_drop + FORGET)
    with torch.no_grad():
        figures, arrays = dk.judge_panel(both, network.econ, longer, config.eval_economies_large,
                                         config.eval_agents_large, dk.JUDGE_SEED)
    history = network.weights["history"]
    return {"groups": J, "states": len(network.economy.beta), "seconds": sum(history["seconds"]),
            "iterations": len(history["seconds"]), "still_moving": dk.still_moving(network.weights),
            "memory_gb": memory, "parameters": sum(x.numel() for x in network.layers["policy"]),
            "device": f"CPU, {torch.get_num_threads()} threads" if network.device.type == "cpu" else
            torch.cuda.get_device_name(), "version": dk.__version__, "config": dataclasses.asdict(config),
            "w1": scipy.stats.wasserstein_distance(*[x["k"] for x in arrays.values()]),
            "std_ratio": figures["network"]["capital"]["std"] / figures["grid"]["capital"]["std"],
            **{name: {part: figures[name][part] for part in ("n_agents", "euler_log10", "bellman_own_c")}
               for name in figures}}


def one(name: str) -> None:
    """Into benchmarks/groups/: a summary, or for the spread the metrics.json of the command line."""
    if isinstance(RUNS[name], int):
        found = dk.plain(identical(RUNS[name]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "examples" / "groups.py"), *RUNS[name], "--output-dir", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            metrics = Path(folder) / "metrics.json"
            found = json.loads(metrics.read_text()) if metrics.exists() else {"error": done.stderr[-300:]}
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def draw(path: Path, kept: Path = KEPT) -> None:
    """Training seconds and memory against J, and how many nodes a grid in J mean capitals would have."""
    found = [json.loads((kept / f"{name}.json").read_text()) for name, J in RUNS.items()
             if isinstance(J, int) and (kept / f"{name}.json").exists()]
    J = [x["groups"] for x in found]
    with dk.figure(path, 3.2) as fig:
        seconds, memory, nodes = fig.subplots(1, 3)
        seconds.plot(J, [x["seconds"] for x in found], color=dk.BLUE, marker="o", markersize=4)
        seconds.set(title="training (s)", ylim=(0, None))
        memory.plot(J, [x["memory_gb"].get("device", x["memory_gb"].get("host")) for x in found], color=dk.BLUE,
                    marker="o", markersize=4)
        memory.set(title="peak memory (GB)", ylim=(0, None))
        nodes.plot(J, [float(GRID_NODES) ** j for j in J], color="black", linestyle="--", marker="s", markersize=4)
        nodes.set(title=f"nodes of a grid, {GRID_NODES} each", yscale="log")
        for ax in (seconds, memory, nodes):
            ax.set(xlabel="J, mean capitals in the state", xlim=(0, max(J) + 1))


def main():
    KEPT.mkdir(exist_ok=True)
    if sys.argv[1:2] == ["--one"]:
        return one(sys.argv[2])
    for name in sys.argv[1:] or RUNS:
        if not (KEPT / f"{name}.json").exists():
            print(name, flush=True)
            subprocess.run([sys.executable, __file__, "--one", name], check=True)
    draw(HERE / "groups.png")


if __name__ == "__main__":
    main()
