"""Seconds of deepham_ks.py: the whole command, the stages of an outer iteration, and how they grow with the sizes.
Writes benchmarks/results-cpu.md (results-gpu.md where there is CUDA). Run it with nothing else on the machine.

  python benchmarks/bench.py                  # about 5 minutes on two cores
  python benchmarks/bench.py --no-commands    # stages and sizes alone
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

COMMANDS = {"cpu": ["deepham_ks.py"],
            "gpu": ["deepham_ks.py", "examples/stochastic_beta.py --grid none",
                    "deepham_ks.py --learnt-moments 1"]}


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(work, device, repeats=5):
    """Median wall time of work(), after two calls that warm up."""
    times = []
    for i in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if i > 1:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def whole_command(command):
    """A row of the table: seconds by stage and from start to end, and what came out."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        script, *flags = command.split()
        done = subprocess.run([sys.executable, HERE.parent / script, *flags, "--output-dir", folder],
                              capture_output=True, text=True)
        wall, found = time.perf_counter() - start, Path(folder) / "metrics.json"
        if not found.exists():
            return [f"`{command}`", done.stderr.strip()[-200:], *6 * [""]]
        metrics = json.loads(found.read_text())
    passed = [row["passed"] for row in metrics["verdict"] if row["passed"] is not None]
    seconds = [f"{metrics['seconds'][name]:.1f}" if name in metrics["seconds"] else "-"
               for name in ("training", "grid", "accuracy")]
    print(command, *seconds, f"{wall:.1f}", flush=True)
    return [f"`{command}`", *seconds, f"{wall:.1f}", str(metrics["convergence"]["iterations"]),
            f"10^{metrics['network']['limit']['euler_log10']['mean']:.2f}",
            f"{sum(passed)} of {len(passed)}" if passed else "-"]


def stages(cfg, device):
    """Seconds of each step of an outer iteration, launched one by one."""
    dk.compile_kernels("torchscript")
    economy, rng = dk.krusell_smith(), dk.generator(device, 0)
    econ = economy.tables(device, torch.float32)
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    dk.set_rates(state, cfg)
    paths = dk.simulate_on(state, econ, cfg, rng)
    batch = dk.roll_out_households(state, paths, econ, cfg, rng)
    damping = torch.full_like(state.damping, 1e-2)
    return {"1. simulate": median_seconds(lambda: dk.simulate_on(state, econ, cfg, rng), device),
            "2. roll out": median_seconds(
                lambda: dk.roll_out_households(state, paths, econ, cfg, rng), device),
            "3. move the policy": median_seconds(lambda: dk.policy_step(state, batch, paths, econ, cfg), device),
            "5. a step of V on all states": median_seconds(
                lambda: dk.value_step(state, batch, damping, econ, cfg), device)}


def scaling(device):
    """Rows (what, size, seconds of steps 1, 2 and 3) as one size grows."""
    base, rows = dataclasses.replace(dk.Config(), n_economies=4), []
    sizes = [("N", {"n_agents": n}) for n in (50, 500, 5000, 50_000)]
    sizes += [("economies", {"n_economies": b, "n_agents": 500}) for b in (4, 16, 64, 256)]
    sizes += [("households in a roll-out", {"batch": b}) for b in (512, 2048, 8192)]
    sizes += [("periods of a roll-out", {"horizon": t, "periods": 160}) for t in (38, 75, 150)]
    for what, change in sizes:
        seconds = list(stages(dataclasses.replace(base, **change), device).values())[:3]
        rows.append([what, f"{list(change.values())[0]:,}", *(f"{x:.3f}" for x in seconds)])
        print(*rows[-1], flush=True)
    return rows


def table(header, rows):
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-commands", action="store_true", help="leave the whole command out")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    kind = "gpu" if device == "cuda" else "cpu"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [f"# Benchmarks, {kind.upper()}", "", f"`python benchmarks/bench.py`, version {dk.__version__}, {name}, "
             f"{torch.get_num_threads()} CPU threads, {versions}.", ""]
    if not options.no_commands:
        lines += ["## The whole command", "", "Seconds; on a GPU the grid is solved while the networks train.", "",
                  *table(["command", "training", "grid", "accuracy", "start to end", "outer iterations",
                          "Euler error, mean, N = infinity", "rows passed"], map(whole_command, COMMANDS[kind]))]
    lines += ["## The steps of an outer iteration of the default", "",
              *table(["step", "s"], [[step, f"{x:.3f}"] for step, x in stages(dk.Config(), device).items()]),
              "## Sizes", "", "Seconds of each step; 4 economies where not said otherwise.", "",
              *table(["what grows", "to", "simulate", "roll out", "move the policy"], scaling(device))]
    (HERE / f"results-{kind}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    with torch.no_grad():
        main()
