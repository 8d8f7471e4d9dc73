"""Market and planner of Davila et al. (2012) without TFP shocks, and the game of the default economy: makes
the runs that this version has not made yet, keeps each metrics.json in benchmarks/planner/, and draws
benchmarks/planner.png. tools/readme_tables.py makes tables of the same files. The game is compared with the weights of
the committed default run.

  python benchmarks/planner.py        # five runs; or the names of some of COMMANDS
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT, RUNS = HERE.parent, HERE / "planner"
sys.path.insert(0, str(ROOT))
import deepham_ks as dk  # noqa: E402

DAVILA = ["examples/davila.py"]
CIS = ["--tfp-shock", "0.05", "--risk", "countercyclical", "--grid", "none"]
COMMANDS = {
    "market": DAVILA,
    "planner_seed0": [*DAVILA, "--equilibrium", "planner"],
    "game": ["deepham_ks.py", "--equilibrium", "game"],
    "cis_market": [*DAVILA, *CIS],
    "cis_planner": [*DAVILA, *CIS, "--equilibrium", "planner"],
}


def moved(game: dk.Solution) -> dict:
    """How far k' of the game is from the market's: the network from the reference run's, the grid from the grid's."""
    market, K_path = dk.solve_grid(), np.array([38.0, 39.4, 41.0])
    players = dk.solve_grid(game.economy)
    return {"network": dk.policy_distance(game, dk.load(ROOT / dk.WEIGHTS), K_path),
            "grid": dk.policy_distance(players, market, K_path)}


def run(name: str, command: list) -> None:
    """One run; its metrics.json, or the line in which it ended, into benchmarks/planner/."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *command, "--output-dir", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        metrics = {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        if (path := Path(folder) / "metrics.json").exists():
            metrics = json.loads(path.read_text())
            if metrics["economy"]["equilibrium"] == "game":
                metrics["moved"] = moved(dk.load(Path(folder) / dk.WEIGHTS))
        (RUNS / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n")


def draw(path: Path) -> None:
    """Who holds the capital and who consumes, market and planner, without shocks: Lorenz curves in the limit."""
    found = {name: json.loads((RUNS / f"{file}.json").read_text())
             for name, file in (("market", "market"), ("planner", "planner_seed0"))}
    people = np.linspace(0, 100, 21)
    with dk.picture(path, 2, [2.6]) as [axes]:
        for ax, kind in zip(axes, ("capital", "consumption")):
            for (name, metrics), color in zip(found.items(), ("#0072B2", "#D55E00")):
                for solution, style in (("network", {"linewidth": 2.8, "alpha": 0.5}), ("grid", {"linestyle": "--"})):
                    x = metrics[solution]["limit"][kind]
                    ax.plot(people, 100 * np.array(x["lorenz"]), color=color, **style,
                            label=f"{name}, {solution}")
            ax.plot(people, people, color="0.8", linewidth=0.7)
            ax.set(title=kind, xlabel="poorest share of households (%)", ylabel="what they have of it (%)",
                   xlim=(0, 100), ylim=(0, 100))


def main():
    """Arguments, if any: the names in COMMANDS of the runs to make."""
    RUNS.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        path = RUNS / f"{name}.json"
        if not path.exists() or json.loads(path.read_text()).get("version") != dk.__version__:
            print(f"{name}: python {' '.join(command)}", flush=True)
            run(name, command)
    if (RUNS / "market.json").exists() and (RUNS / "planner_seed0.json").exists():
        draw(HERE / "planner.png")


if __name__ == "__main__":
    main()
