"""Weak and strong scaling over processes through torchrun, and what they say to each other. Writes
benchmarks/ranks.json and the table benchmarks/ranks.md. Run it with nothing else on the machine.

  python benchmarks/ranks.py        # about 5 minutes on two cores
"""

import dataclasses
import json
import math
import os
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

ITERATIONS, REPEATS = 12, 3
CASES = [("strong", 1, 1), ("strong", 1, 2), ("strong", 2, 1), ("weak", 2, 1)]  # ranks, threads of each


def sizes(kind: str, ranks: int) -> dk.Config:
    """The default; weak: as many economies and roll-out households for every rank."""
    cfg = dataclasses.replace(dk.Config(), iterations=ITERATIONS, averaging=0, final_value_steps=0)  # policy and V
    more = ranks if kind == "weak" else 1
    return dataclasses.replace(cfg, n_economies=more * cfg.n_economies, batch=more * cfg.batch)


def worker(kind: str, ranks: int, threads: int, path: str) -> None:
    """In each rank: a few outer iterations with a checkpoint, all sums over ranks counted and timed."""
    torch.set_num_threads(threads)
    said, real = [], dk.total

    def counted(x):
        start = time.perf_counter()
        out = real(x)
        if dk.RANKS > 1:
            said.append((x.numel() * x.element_size(), time.perf_counter() - start))
        return out

    dk.total = counted
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = dk.solve(None, sizes(kind, ranks), seed=0, device="cpu", output_dir=folder)
        wall = time.perf_counter() - start
    if dk.RANK == 0:
        seconds = found.weights["history"]["seconds"]
        steady, n = said[len(said) // 2 :], ITERATIONS / 2  # the second half, after start and first labels
        Path(path).write_text(json.dumps({
            "iteration_s": float(np.median(seconds[3:])), "wall_s": wall, "sums": len(steady) / n,
            "megabytes": sum(x[0] for x in steady) / n / 1e6, "sums_ms": 1e3 * sum(x[1] for x in steady) / n}))


def measure() -> list:
    """Every case REPEATS times, in turn."""
    rows = []
    for _ in range(REPEATS):
        for kind, ranks, threads in CASES:
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "found.json")
                command = [__file__, "--worker", kind, str(ranks), str(threads), path]
                if ranks > 1:
                    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
                subprocess.run([sys.executable, *command], check=True, capture_output=True,
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
                rows.append({"kind": kind, "ranks": ranks, "threads": threads} | json.loads(Path(path).read_text()))
                print(rows[-1], flush=True)
    return rows


def estimate() -> list:
    """Lines: 8 GPUs, a roll-out of 10^6 households, N = 10^6, with the arithmetic."""
    cfg, econ, ranks = dk.Config(), dk.krusell_smith().tables(), 8
    P = sum(math.prod(shape) for shape in dk.layer_shapes(dk.n_inputs(econ), cfg.hidden))
    H, n = cfg.hidden, dk.n_inputs(econ)
    forward, J = 2 * (n * H + H * H + H), econ.next_s.shape[1]
    batch, N = 10**6, 10**6
    states = batch * len(dk.taught(cfg))
    simulate = cfg.n_economies * N * cfg.periods * forward
    roll_out = batch * cfg.horizon * forward * (3 + 2 * J)
    steps = 3 * states * P * P * 2 * 7 // 12
    rate = 0.25 * 51e12
    seconds = (simulate + roll_out + steps) / rate / ranks
    A = 2 * (P * P + P + 2) * 4
    panel = cfg.n_economies * N * 12
    GB = panel / 1e9
    return [f"- P = {P:,} parameters. Arithmetic of an outer iteration: simulation {cfg.n_economies} x {N:.0e} x "
            f"{cfg.periods} x {forward:,} = {simulate:.1e}, roll-out {batch:.0e} x {cfg.horizon} x {forward:,} x "
            f"(3 + 2 x {J}) = {roll_out:.1e}, normal matrices 3 x {states:.0e} x 7/12 x 2 P^2 = {steps:.1e} "
            "operations.",
            "- At a quarter (assumed) of the 51 TFLOP/s of a large float32 product on an H200 (results-gpu.md): "
            f"{seconds:.2f} s an iteration on {ranks} GPUs.",
            f"- Sums: two normal matrices with gradients and losses, {A / 1e6:.1f} MB whatever the sizes: under 1 ms "
            "at 100 GB/s (assumed); the other sums are small, so latency, under 1 ms.",
            f"- The checkpoint gathers the cross-sections, {cfg.n_economies} x {N:.0e} x 12 bytes = {GB:.1f} GB, "
            f"through gloo at 1 GB/s (assumed): {GB:.1f} s an iteration, more than all the rest; at such sizes it "
            "would have to be written less often, which the script has no flag for.",
            f"- Memory: cross-sections {GB:.1f} GB over {ranks} GPUs; shocks are drawn in parts of "
            f"{dk.AT_ONCE * 8 / 1e6:.0f} MB; the paths of the roll-out {batch / ranks:.1e} x {cfg.horizon} x about 20 "
            f"tensors x 4 bytes = {batch / ranks * cfg.horizon * 80 / 1e9:.2f} GB a GPU."]


def cell(values: list, digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(rows: list) -> str:
    lines = ["# Several processes", "", f"`python benchmarks/ranks.py`, version {dk.__version__}, {os.cpu_count()} CPU "
             f"cores, gloo, torch {torch.__version__}: {ITERATIONS} outer iterations of the default with checkpoints; "
             f"medians (least to most) of {REPEATS} runs, cases in turn. Weak: as many economies and roll-out "
             "households for each rank as one process has.", "",
             "| scaling | ranks x threads | iteration (s) | sums over ranks an iteration | MB | ms, waiting included |",
             "|---|---|---|---|---|---|"]
    for kind, ranks, threads in CASES:
        of = [x for x in rows if (x["kind"], x["ranks"], x["threads"]) == (kind, ranks, threads)]
        cells = [cell([x[name] for x in of], digits) if name == "iteration_s" or ranks > 1 else ""
                 for name, digits in (("iteration_s", 3), ("sums", 0), ("megabytes", 1), ("sums_ms", 0))]
        lines.append(f"| {kind} | {ranks} x {threads} | " + " | ".join(cells) + " |")
    lines += ["", "MB and ms are those of the sums of an iteration and of its checkpoint, which gathers all ranks' "
              "cross-sections and states.", "", "## An estimate: 8 GPUs, a roll-out of 10^6 households, N = 10^6", "",
              "Nothing here is measured; the arithmetic is:", "", *estimate()]
    return "\n".join(lines) + "\n"


def main():
    if sys.argv[1:2] == ["--worker"]:
        kind, ranks, threads, path = sys.argv[2:]
        return worker(kind, int(ranks), int(threads), path)
    rows = measure()
    (HERE / "ranks.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "ranks.md").write_text(report(rows))


if __name__ == "__main__":
    main()
