"""Benchmarks of deepham_ks.py. Writes benchmarks/results-cpu.md (results-gpu.md where there is CUDA), and
time_to_accuracy-*.csv and .png.

  python benchmarks/bench.py                            # everything; about 15 minutes on two cores
  python benchmarks/bench.py --seeds 0 --paper-seconds 0
"""

import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

ECONOMY = dk.krusell_smith()


class OutOfTime(Exception):
    """The budget of a run is used up."""


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


def setting(cfg, device, seed=0):
    """As dk.solve() starts."""
    econ, kernels = ECONOMY.tables(device, torch.float32), dk.compile_kernels("torchscript")
    rng = dk.generator(device, seed)
    return econ, kernels, rng, dk.initial_state(econ, cfg, seed, rng)


# ---------------------------------------------------------------------------------------------- the whole command

COMMANDS = {"cpu": ["deepham_ks.py"],
            "gpu": ["deepham_ks.py", "examples/stochastic_beta.py --grid none", "deepham_ks.py --learnt-moments 1"]}


def whole_command(command):
    """A row of the table: seconds by stage and from start to end, memory, and what came out."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        script, *flags = command.split()
        done = subprocess.run([sys.executable, HERE.parent / script, *flags, "--output-dir", folder],
                              capture_output=True, text=True)
        wall, found = time.perf_counter() - start, Path(folder) / "metrics.json"
        if not found.exists():
            return [f"`{command}`", done.stderr.strip()[-200:], *8 * [""]]
        metrics = json.loads(found.read_text())
    seconds, rows = metrics["seconds"], [row["passed"] for row in metrics["verdict"] if row["passed"] is not None]
    stages = [f"{seconds[name]:.1f}" for name in ("training", "grid", "accuracy", "results")]
    memory = max(metrics["peak_memory_gb"].items(), key=lambda item: item[0] == "device")
    euler, iterations = metrics["network"]["limit"]["euler_log10"]["mean"], metrics["convergence"]["iterations"]
    print(command, *stages, f"{wall:.1f}", flush=True)
    return [f"`{command}`", *stages, f"{wall:.1f}", f"{memory[1]:.2f} ({memory[0]})",
            f"{iterations}", f"10^{euler:.2f}", f"{sum(rows)} of {len(rows)}" if rows else "-"]


# ---------------------------------------------------------------------------------------------- time to accuracy


FORGET = 1200  # periods more that a dispersed panel takes to forget its start than the limit's own distribution


def pooled_capital(solution, cfg):
    """k (n,) of a panel of the small size; every solution starts from the same dispersed one."""
    cfg = dataclasses.replace(cfg, eval_periods=cfg.eval_periods + FORGET, eval_drop=cfg.eval_drop + FORGET)
    simulated, _ = dk.ergodic_states({"": solution}, ECONOMY.tables(solution.device), cfg, cfg.eval_economies,
                                     cfg.eval_agents, dk.JUDGE_SEED, graphs=solution.device.type == "cuda")
    return simulated[""][0]["k"].flatten().cpu().numpy()


def judge(cfg, device):
    """The converged grid solution, its k at N = 50, and its K in the limit as policy_distance() takes it."""
    grid = dk.solve_grid(ECONOMY, dk.GRIDS["converged"])
    n_K, n_k = grid.table.shape[2:]
    k = dk.power_grid(n_k, ECONOMY.k_min, grid.k_max, grid.exponent)
    K = np.linspace(grid.K_low, grid.K_high, n_K)
    z_path = dk.draw_z_path(cfg.eval_periods, ECONOMY, np.random.default_rng(dk.JUDGE_SEED))
    mass = dk.dispersed_mass(k, grid.K_mean, z_path[0], ECONOMY)
    K_path, _ = dk.simulate_histogram(grid.table.numpy(), k, K, mass, z_path, ECONOMY)
    grid = grid.to(device)
    return grid, pooled_capital(grid, cfg), K_path[cfg.eval_drop :]


def time_to_accuracy(name, cfg, seed, device, grid, k_grid, of_grid, every, budget=float("inf")):
    """Rows (preset, seed, outer iteration, training seconds, W1, mean |dk'|); judging is not counted."""
    econ, kernels, rng, state = setting(cfg, device, seed)
    rows = []

    def after(state):
        seconds = sum(state["history"]["seconds"])
        if state["iteration"] % every == 0 or state["iteration"] == dk.last_iteration(state, cfg) or seconds > budget:
            network = dk.Solution(dk.weights_file(state, ECONOMY, {}, cfg, seed), device, "torchscript")
            w1 = scipy.stats.wasserstein_distance(pooled_capital(network, dk.PRESETS["default"]), k_grid)
            gap = dk.policy_distance(network, grid, ECONOMY, of_grid)["mean"]
            rows.append((name, seed, state["iteration"], seconds, w1, gap))
            print(f"{name} seed {seed} iteration {state['iteration']}: {seconds:.1f} s, W1 {w1:.3f}, |dk'| {gap:.4f}",
                  flush=True)
        if seconds > budget:
            raise OutOfTime

    try:
        dk.train(state, econ, cfg, kernels, rng, device == "cuda", after)
    except OutOfTime:
        print(f"{name} seed {seed}: stopped after {budget:.0f} s of training")
    return rows


def draw_time_to_accuracy(path, rows):
    with dk.figure(path, 3.4, "W1 of pooled individual capital against the grid, 64 economies of N = 50") as fig:
        ax = fig.subplots()
        for name, style, colors in (("default", "-", (dk.BLUE, "#D55E00", "#009E73")), ("paper", "--", ("black",))):
            for i, seed in enumerate(sorted({row[1] for row in rows if row[0] == name})):
                points = np.array([row[3:5] for row in rows if row[:2] == (name, seed)])
                ax.plot(*points.T, style, color=colors[i % len(colors)], marker="o", markersize=3, linewidth=1.2,
                        label=f"{name}, seed {seed}")
        ax.axhline(0.16, color="0.5", linewidth=0.8)
        ax.annotate("published grid solution, 0.16", (ax.get_xlim()[1], 0.16), ha="right", va="bottom", fontsize=7.5)
        ax.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="W1 (goods)")


# ---------------------------------------------------------------------------------------------- stages and scaling


def stages(cfg, device, of_whole=True):
    """Seconds of each part of an outer iteration, and of the whole as it is run."""
    econ, kernels, rng, state = setting(cfg, device)
    dk.set_rates(state, cfg, {})
    policy, value = [dk.unpack(state[name], cfg.hidden) for name in ("policy", "value")]
    panel = dk.Panel(state["k"], state["s"], state["z"])

    def next_capital(k, s, K, z):
        return kernels.network_capital(policy, k, s, K, z, econ)

    def simulate():
        K, z = [], []
        for _, z_t, [(_, K_t, _)] in dk.simulate([next_capital], panel, cfg.periods, econ, rng, cfg.systematic):
            K.append(K_t[:, 0])
            z.append(z_t[:, 0])
        return torch.stack(K), torch.stack(z)

    K_path, z_path = simulate()
    K_next = dk.expected_capital(K_path, z_path, dk.belief(K_path, z_path, econ), econ)
    paths = dk.sample_households(panel, K_path, K_next, z_path, state["k_range"], econ, cfg, rng)
    batch = dk.roll_out_batch(policy, value, paths, econ, cfg, kernels)
    states = dk.thin(batch, cfg)
    steps = (state["rates"], state["damping"], states, econ, cfg, kernels)
    parts = {
        "simulate": simulate,
        "roll-out and costates": lambda: dk.roll_out_batch(policy, value, paths, econ, cfg, kernels),
        "policy step": lambda: dk.policy_step(state["policy"], steps[0][0], steps[1][0], *steps[2:]),
        "value step": lambda: dk.value_step(state["value"], steps[0][1], steps[1][1], *steps[2:]),
    }
    seconds = {name: median_seconds(part, device) for name, part in parts.items()}
    if not of_whole:
        return seconds
    dk.iterate(state, econ, cfg, kernels, rng, {})  # the first one fills in what the next ones learn from
    state["iteration"] = 1

    def whole():
        return dk.iterate(state, econ, cfg, kernels, rng, {})

    if device == "cuda":
        tensors = [x for x in state.values() if isinstance(x, torch.Tensor)]
        seconds["whole iteration, launched from Python"] = median_seconds(whole, device, 3)
        seconds["its capture, once a phase"] = -time.perf_counter()
        whole = dk.capture(whole, tensors, rng)
        seconds["its capture, once a phase"] += time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            whole()
            wait(device)
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        seconds[f"its {len(on_device):,} kernels and copies, each by itself"] = sum(
            event.time_range.elapsed_us() for event in on_device) / 1e6
    seconds["whole iteration"] = median_seconds(whole, device)
    return seconds


def policy_step_flops(cfg):
    """Floating-point operations of roll-out, costates and both Gauss-Newton steps, matrix products only."""
    econ = ECONOMY.tables()
    H, n, J = cfg.hidden, dk.n_inputs(econ), econ.next_s.shape[1]
    states = cfg.batch * len(dk.taught(cfg))
    forward = 2 * (n * H + H * H + H)
    roll_out = cfg.batch * cfg.horizon * forward * (1 + 2 + J * 2)  # path, slope, V and V_k at the J successors
    P = sum(math.prod(shape) for shape in dk.layer_shapes(n, H))
    return roll_out + 3 * states * 2 * P * P * 7 / 12  # one row a state and two; add_gram() makes 7/12 of it


def peak_flops(device):
    n = 4096 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / median_seconds(lambda: a @ a, device)


def scaling(device):
    """Seconds of an outer iteration as one size grows: rows (what, size, household-periods, simulate, rest)."""
    base = dataclasses.replace(dk.PRESETS["default"], n_economies=4, periods=160)
    sizes = [("N", {"n_agents": n}) for n in (50, 500, 5000, 50_000)]
    sizes += [("economies", {"n_economies": b, "n_agents": 500}) for b in (4, 16, 64, 256)]
    sizes += [("households in a roll-out", {"batch": b}) for b in (512, 2048, 8192)]
    sizes += [("periods of a roll-out", {"horizon": t}) for t in (38, 75, 150)]
    rows = []
    for what, change in sizes:
        cfg = dataclasses.replace(base, **change)
        part = stages(cfg, device, of_whole=False)
        rest = sum(part[name] for name in ("roll-out and costates", "policy step", "value step"))
        size, household_periods = list(change.values())[0], cfg.n_agents * cfg.n_economies * cfg.periods
        rows.append((what, size, household_periods, part["simulate"], rest))
        print(f"{what} {size}: simulate {part['simulate']:.3f} s, steps {rest:.3f} s", flush=True)
    return rows


def machine(device):
    name = torch.cuda.get_device_name() if device == "cuda" else next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor())
    version = platform.python_version()
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, Python {version}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--paper-seconds", type=float, default=600, help="budget of preset paper; 0 leaves it out")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, cfg = "gpu" if device == "cuda" else "cpu", dk.PRESETS["default"]
    print(machine(device))
    commands = [whole_command(command) for command in COMMANDS[kind]]
    of_grid, rows = judge(cfg, device), []
    for seed in options.seeds:
        rows += time_to_accuracy("default", cfg, seed, device, *of_grid, 5)
    if options.paper_seconds:
        rows += time_to_accuracy("paper", dk.PRESETS["paper"], 0, device, *of_grid, 1, options.paper_seconds)
    np.savetxt(HERE / f"time_to_accuracy-{kind}.csv", np.array(rows, dtype=object), fmt="%s,%d,%d,%.2f,%.4f,%.5f",
               header="preset,seed,iteration,training_seconds,w1,mean_dk", comments="")
    draw_time_to_accuracy(HERE / f"time_to_accuracy-{kind}.png", rows)

    part, peak = stages(cfg, device), peak_flops(device)
    steps = sum(part[name] for name in ("roll-out and costates", "policy step", "value step"))
    work, rate = cfg.batch * cfg.horizon, policy_step_flops(cfg) / steps
    command = " ".join(["python benchmarks/bench.py", *sys.argv[1:]])
    lines = [f"# Benchmarks, {kind.upper()}", "", f"`{command}`", "", machine(device), "", "## The whole command", "",
             "Seconds; with a grid, on a GPU, the grid is solved while the networks train.", "",
             "| command | training | grid | accuracy | results | start to end | peak memory GiB | outer iterations | "
             "Euler error, mean, N = inf | verdict rows passed |", "|---" * 10 + "|",
             *("| " + " | ".join(row) + " |" for row in commands), "", "## Time to accuracy", "",
             "W1 of pooled capital, N = 50, against the converged grid; judging is not counted. "
             f"Every point is in `time_to_accuracy-{kind}.csv`.", "",
             "| preset | seed | outer iterations | training s | W1 | mean \\|dk'\\| |", "|---|---|---|---|---|---|"]
    last = {row[:2]: row for row in rows}
    lines += [f"| {n} | {s} | {i} | {t:.1f} | {w:.3f} | {d:.4f} |" for n, s, i, t, w, d in last.values()]
    lines += ["", "## Seconds by stage, one outer iteration of `default`", "", "| stage | s |", "|---|---|"]
    lines += [f"| {name} | {seconds:.3f} |" for name, seconds in part.items()]
    lines += ["", f"Policy and value step with their roll-out: {work / steps:.3g} household-periods a second, "
              f"{rate / 1e9:.0f} GFLOP/s in matrix products, {100 * rate / peak:.0f}% of the {peak / 1e9:.0f} GFLOP/s "
              "that a large float32 product reaches here.", ""]
    (HERE / f"results-{kind}.md").write_text("\n".join(lines))
    lines += ["## Scaling", "", "Median seconds; 4 economies, N = 500, 160 periods, where not said otherwise.", "",
              "| what grows | to | household-periods simulated | simulate s | steps s |", "|---|---|---|---|---|"]
    lines += [f"| {w} | {size:,} | {hp:,} | {a:.3f} | {b:.3f} |" for w, size, hp, a, b in scaling(device)]
    (HERE / f"results-{kind}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
