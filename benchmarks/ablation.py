"""What single mechanisms of the default buy: each switched off by a flag or in a copy of the script's names, every seed
judged as always. Writes benchmarks/ablation.md; rows that are there already are made anew.

  python benchmarks/ablation.py             # seeds 0 to 2: about 40 minutes on one thread
  python benchmarks/ablation.py 0           # one seed
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

SHORT = ["--irf-paths", "2", "--irf-periods", "2"]  # the responses are not looked at here
# name -> flags, and what to execute before the run
VARIANTS = {
    "nothing": ([], ""),
    "economies not scaled": (["--K-spread", "0"], ""),
    "roll-outs start in the cross-section only": (["--wide-share", "0"], ""),
    "horizon 40": (["--horizon", "40"], ""),
    "6 iterations of averaging": (["--averaging", "6"], ""),
    "full Newton steps": (["--policy-rate", "1"], ""),
    "panels of 1,000 households": (["--n-agents", "1000", "--n-economies", "48"], ""),
    "panels of 50 households": (["--n-agents", "50"], ""),
    "squares only, no robust weights": ([], "dk.robust = lambda r, weight: dk.torch.ones_like(r)"),
    "least damping times ten": ([], "dk.LEAST_DAMPING *= 10"),
    "labels without later periods": ([], "dk.KERNELS = tuple(x for x in dk.KERNELS if x != 'worth_of_saving'); "
                                         "dk.fast.worth_of_saving = lambda expected, *rest: expected"),
}


def figures(flags, change, seed):
    """metrics.json of such a run, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"import sys; import deepham_ks as dk; {change or 'pass'}; sys.exit(dk.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "--seed", str(seed), "--output-dir", folder, *SHORT, *flags]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        metrics = Path(folder) / "metrics.json"
        return json.loads(metrics.read_text()) if metrics.exists() else done.stderr.strip().splitlines()[-1]


def row(name, flags, seed, metrics):
    start = f"| {name} | {'`' + ' '.join(flags) + '`' if flags else ''} | {seed} |"
    if isinstance(metrics, str):
        return f"{start} {metrics} | | | | |"
    both, limit = metrics["comparison"], metrics["network"]["limit"]
    euler, failed = limit["euler_log10"], [x["figure"] for x in metrics["verdict"] if x["passed"] is False]
    return (f"{start} {metrics['seconds']['training']:.0f} | {both['limit']['w1']:.3f} | "
            f"{euler['mean']:.2f} / {euler['p99']:.2f} / {euler['max']:.2f} | {limit['bellman_own_c']['mean']:.1e} | "
            f"{'; '.join(failed).replace('|', chr(92) + '|')} |")


def main():
    lines = ["# One mechanism at a time", "", f"`python benchmarks/ablation.py`, version {dk.__version__}, in the "
             "limit of infinitely many households. Seconds compare only where nothing else ran beside.", "",
             "| off | flags | seed | training (s) | W1 (goods) | Euler log10 mean / p99 / max | Bellman | fails |",
             "|---|---|---:|---:|---:|---:|---:|---|"]
    for name, (flags, change) in VARIANTS.items():
        for seed in [int(x) for x in sys.argv[1:]] or range(3):
            lines.append(row(name, flags, seed, figures(flags, change, seed)))
            print(lines[-1], flush=True)
            (HERE / "ablation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
