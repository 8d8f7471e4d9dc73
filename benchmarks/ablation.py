"""What single departures from the paper buy: the default preset with one of them switched off, seed 0, each judged as
always. Writes benchmarks/ablation.md.

  python benchmarks/ablation.py        # about 10 minutes on two cores
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

CFG = dk.Config()
SHORT = ["--irf-paths", "2", "--irf-burn", "2", "--irf-periods", "2"]  # the responses are not looked at here
VARIANTS = {
    "no control variate": ["--no-control-variate"],
    "independent shocks to s": ["--no-systematic"],
    "no scaling of economies": ["--K-spread", "0"],
    "roll-outs start on the panel only": ["--wide-share", "0"],
    "roll-outs start in s as it comes": ["--even-share", "0"],
    "least damping times ten": ["--damping", f"{10 * CFG.damping:g}"],
    "no last value steps": ["--final-value-steps", "0"],
}


def figures(flags):
    """metrics.json of a run with these flags, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "deepham_ks.py"), "--output-dir", folder, *SHORT, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        metrics = Path(folder) / "metrics.json"
        return json.loads(metrics.read_text()) if metrics.exists() else done.stderr.strip().splitlines()[-1]


def row(name, flags, metrics):
    command = f"`{' '.join(flags)}`" if flags else ""
    if isinstance(metrics, str):
        return f"| {name} | {command} | {metrics} | | | | | | |"
    both, large = metrics["comparison"], metrics["network"]["large"]
    euler, distance = large["euler_log10"], both["policy_distance"]
    return (f"| {name} | {command} | {metrics['seconds']['training']:.0f} | {both['small']['w1']:.3f} | "
            f"{both['large']['w1']:.3f} | {both['limit']['w1']:.3f} | {distance['mean']:.4f} / {distance['max']:.3f} | "
            f"{euler['mean']:.2f} / {euler['p99']:.2f} / {euler['max']:.2f} | {large['bellman_own_c']['mean']:.5f} |")


def main():
    lines = ["# One departure at a time", "", f"`python benchmarks/ablation.py`, seed 0, version {dk.__version__}. "
             "Seconds compare only where nothing else ran beside.", "",
             "| off | flags | training s | W1, N = 50 | W1, N = 5,000 | W1, N = inf | \\|dk'\\| mean / max | "
             "Euler log10 mean / p99 / max, N = 5,000 | Bellman own c, N = 5,000 |",
             "|---|---|---|---|---|---|---|---|---|"]
    reference = json.loads((HERE.parent / "metrics.json").read_text())
    lines.append(row("nothing (the reference run)", [], reference))
    for name, flags in VARIANTS.items():
        lines.append(row(name, flags, figures(flags)))
        print(lines[-1], flush=True)
        (HERE / "ablation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
