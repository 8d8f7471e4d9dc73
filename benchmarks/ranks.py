"""Weak and strong scaling over processes through torchrun, and what they say to each other. Writes
benchmarks/ranks.json and the table benchmarks/ranks.md. Run it with nothing else on the machine.

  python benchmarks/ranks.py        # about 5 minutes on two cores
"""

import dataclasses
import json
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
    cfg = dataclasses.replace(dk.Config(), iterations=ITERATIONS, averaging=0)
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
              "cross-sections and states."]
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
