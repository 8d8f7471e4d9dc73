"""The default preset on many calibrations, each judged by the grid solution of the same economy. Writes one JSON file a
run to benchmarks/calibrations/ and the table of all to benchmarks/calibrations.md. Runs of this version are kept.

  python benchmarks/calibrations.py                   # about two hours on two cores
  python benchmarks/calibrations.py --only 3 --seeds 0   # the fourth line of FLAGS with seed 0
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

RUNS = HERE / "calibrations"
FLAGS = [line.split() for line in """
--gamma 2
--beta 0.96 --delta 0.1 --alpha 0.33
--mu 0
--gamma 5
--tfp-shock 0.05 --z-duration 20
--gamma 0.5 --u-bad 0.25 --u-good 0.08 --u-duration-bad 4
--gamma 10
--gamma 0.5
--beta 0.9 --delta 0.15
--beta 0.995
--mu 0.6
--tfp-shock 0
--u-bad 0.25 --u-good 0.2 --u-duration-bad 4.5 --u-duration-good 4
--z-duration 4
--z-duration 40
--alpha 0.2 --delta 0.01
--alpha 0.5 --delta 0.05
--gamma 5 --mu 0.05 --u-bad 0.15 --u-good 0.08
--gamma 3 --tfp-shock 0.03 --z-duration 12 --mu 0.3
--beta 0.94 --gamma 4 --delta 0.08
""".strip().splitlines()]
SHORT = ["--irf-paths", "2", "--irf-periods", "2"]  # the responses are not looked at here


def summary(metrics: dict) -> dict:
    """What the table shows of metrics.json, as distances to the grid of the same economy."""
    net, grid, both = metrics["network"]["limit"], metrics["grid"]["limit"], metrics["comparison"]
    K = grid["capital"]["mean"]
    return {"w1_percent": 100 * both["limit"]["w1"] / K, "std_percent": 100 * both["limit"]["std_gap"],
            "policy_percent": 100 * both["policy_distance"]["mean"] / K,
            "euler_mean": net["euler_log10"]["mean"], "euler_mean_grid": grid["euler_log10"]["mean"],
            "euler_p99": net["euler_log10"]["p99"], "euler_p99_grid": grid["euler_log10"]["p99"],
            "bellman": net["bellman_in_consumption"]["mean"], "bellman_grid": grid["bellman_in_consumption"]["mean"],
            "seconds": metrics["seconds"]["training"], "iterations": metrics["convergence"]["iterations"],
            "converged": metrics["convergence"]["converged"], "version": metrics["version"]}


def misses(x: dict) -> list:
    """The goals that a run misses."""
    goals = {"W1": x["w1_percent"] < 0.4, "std": abs(x["std_percent"]) < 1, "k'": x["policy_percent"] < 0.015,
             "Euler mean": x["euler_mean"] < x["euler_mean_grid"] + 0.1,
             "Euler p99": x["euler_p99"] < x["euler_p99_grid"] + 0.15,
             "Bellman": x["bellman"] < 1.5 * x["bellman_grid"] + 1e-5}
    return [name for name, met in goals.items() if not met]


def solve(flags: list, seed: int, path: Path) -> None:
    """One run of the script; its summary, or the line in which it ended, into path."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "deepham_ks.py"), "--seed", str(seed), "--output-dir", folder]
        done = subprocess.run(command + flags + SHORT, capture_output=True, text=True)
        metrics = Path(folder) / "metrics.json"
        found = json.loads(metrics.read_text()) if metrics.exists() else {"error": done.stderr.strip()[-300:]}
    if "network" in found:
        found = summary(found) if "grid" in found else {"error": done.stdout.strip().splitlines()[-1][-300:]}
    of_run = {"flags": " ".join(flags), "seed": seed, "version": dk.__version__}
    path.write_text(json.dumps(of_run | found, indent=1) + "\n")
    print(path.name, misses(found) if "error" not in found else found["error"], flush=True)


def table(runs: list) -> str:
    lines = ["# Calibrations", "", "`python benchmarks/calibrations.py`, version " + dk.__version__ + ": the default "
             "preset with these flags and no others, beside the grid of the same economy, N = infinity. Goals: W1 "
             "below 0.4% of K, std within 1%, mean \\|dk'\\| below 0.015% of K, Euler errors within 0.1 (mean) and "
             "0.15 (p99) of the grid's log10, Bellman error below 1.5 times the grid's plus 1e-5 of consumption.", "",
             "| flags | seed | W1, % of K | std, % | \\|dk'\\|, % of K | Euler log10 mean / p99 (grid) | "
             "Bellman (grid), share of c | seconds | iterations | converged | misses |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for x in runs:
        start = f"| `{x['flags']}` | {x['seed']} | "
        if "error" in x:
            lines.append(f"{start}{x['error']} | | | | | | | | all |")
            continue
        lines.append(
            f"{start}{x['w1_percent']:.3f} | {x['std_percent']:+.2f} | {x['policy_percent']:.4f} | "
            f"{x['euler_mean']:.2f} / {x['euler_p99']:.2f} ({x['euler_mean_grid']:.2f} / {x['euler_p99_grid']:.2f}) | "
            f"{x['bellman']:.1e} ({x['bellman_grid']:.1e}) | {x['seconds']:.0f} | {x['iterations']} | "
            f"{'yes' if x['converged'] else 'no'} | {', '.join(misses(x))} |")
    return "\n".join(lines) + "\n"


def kept(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text()).get("version") == dk.__version__


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", type=int, nargs="+", default=range(len(FLAGS)), help="lines of FLAGS, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each one thread (OMP_NUM_THREADS=1)")
    asked = parser.parse_args()
    RUNS.mkdir(exist_ok=True)
    paths = {(i, seed): RUNS / f"{i:02d}_seed{seed}.json" for seed in asked.seeds for i in asked.only}
    with ThreadPoolExecutor(asked.jobs) as pool:
        wait = [pool.submit(solve, FLAGS[i], seed, path) for (i, seed), path in paths.items() if not kept(path)]
        for job in wait:
            job.result()
    runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json")) if kept(path)]
    (HERE / "calibrations.md").write_text(table(runs))


if __name__ == "__main__":
    main()
