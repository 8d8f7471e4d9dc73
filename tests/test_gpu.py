"""What one command on a GPU must show: python -m pytest -q tests/test_gpu.py. Skipped without CUDA.

Each capture runs in a process of its own: after one that failed, the generator and the allocator are of no more use.
What a run of it showed: benchmarks/gpu-checks.md.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BEFORE = """
import dataclasses, sys, torch
import deepham_ks as dk
torch.set_float32_matmul_precision("highest")
economy = dk.krusell_smith()
cfg = dk.sized(dk.Config(), economy)
class Once:  # the guard of one iteration, which is handed to a function of it
    def __init__(self, use): self.use = use
    def run(self, iteration):
        self.use(iteration)
        figures = iteration().tolist()
        return dict(zip(dk.HISTORY[1:], figures)) | {"watched": figures[-len(dk.WATCHED):], "seconds": 0.0}
    def after_iteration(self): pass
def start(use, cfg=cfg, mode="torchscript"):
    '''Two iterations of the loop; use(iteration) before the second.'''
    econ, rng = economy.tables("cuda", torch.float32), dk.generator("cuda", 0)
    dk.compile_kernels(mode)
    dk.fit_value = lambda *given: None
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    two = dataclasses.replace(cfg, iterations=2, averaging=0)
    dk.learn(state, econ, two, rng, Once(lambda iteration: use(state, rng, iteration) if state.iteration else None))
"""


def in_process(script):
    """Run lines after BEFORE in a process of their own; what they print."""
    done = subprocess.run([sys.executable, "-c", BEFORE + textwrap.dedent(script)], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def command(folder, *flags):
    return subprocess.run([sys.executable, str(ROOT / "deepham_ks.py"), "--output-dir", str(folder), *flags],
                          capture_output=True, text=True, timeout=500)


def test_cholesky_can_be_captured():
    """float64, n = 1313; three replays on new data against the CPU."""
    in_process("""
    A, b = torch.eye(1313, dtype=torch.float64, device="cuda"), torch.ones(1313, 1, dtype=torch.float64, device="cuda")
    def solve():
        return torch.cholesky_solve(b, torch.linalg.cholesky_ex(A)[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            solve()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = solve()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        J = torch.randn(1500, 1313, dtype=torch.float64, generator=g)
        A.copy_(J.T @ J)
        b.copy_(torch.randn(1313, 1, dtype=torch.float64, generator=g))
        graph.replay()
        exact = torch.linalg.solve(A.cpu(), b.cpu())
        assert (x.cpu() - exact).norm() / exact.norm() < 1e-10
    """)


@pytest.mark.parametrize("change", ["", "learnt_moments=1"])
def test_an_iteration_captures_and_replays_with_fresh_numbers(change):
    """Two replays differ in the economies; after set_state they repeat bit for bit, and are what eager gives."""
    in_process(f"""
    def use(state, rng, step):
        tensors = list(state.tensors().values())
        before, at = [x.clone() for x in tensors], rng.get_state()
        def back():
            for x, old in zip(tensors, before):
                x.copy_(old)
            rng.set_state(at)
        step(); eager = state.k.clone(); offset = rng.get_state(); back()
        replay = dk.capture(step, tensors, rng)
        back(); replay(); first = state.k.clone(); assert torch.equal(rng.get_state(), offset)
        replay(); assert not torch.equal(first, state.k)
        back(); replay(); assert torch.equal(first, state.k) and torch.equal(first, eager)
    start(use, dk.sized(dk.Config({change}), economy))
    """)


def test_kernels_agree_with_eager():
    """Calls 1 to 4, float32 and float64."""
    in_process("""
    for dtype in (torch.float32, torch.float64):
        econ, n = economy.tables("cuda", dtype), 4096
        state = dk.initial_state(econ, economy, cfg, 0, dk.generator("cuda", 0))
        state.policy += 0.01 * torch.randn_like(state.policy)
        nets = [net._replace(layers=[x.to(dtype) for x in net.layers]) for net in
                (dk.policy_net(state, econ, cfg), dk.value_net(state, econ, cfg))]
        k, K = 80 * torch.rand(n, device="cuda", dtype=dtype), 35 + 8 * torch.rand(n, device="cuda", dtype=dtype)
        s, z = torch.randint(2, (2, n), device="cuda")
        at = dk.place(k, s, K, z, econ)
        dk.compile_kernels("torchscript")
        for name, net in zip(("network_capital", "network_value"), nets):
            for _ in range(4):
                ours, theirs = getattr(dk.fast, name)(net, at, econ), getattr(dk, name)(net, at, econ)
                for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs))):
                    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    """)


def test_an_iteration_does_not_wait_for_the_device():
    in_process("""
    def use(state, rng, step):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
    start(use)
    """)


@pytest.mark.parametrize("stop", [5, -3])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, stop):
    """Bit for bit, within the first phase and in the last, counted from the end."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quick = ["--grid", "none", "--eval-periods", "60", "--irf-periods", "5"]
    done = command(whole, *quick)
    assert done.returncode == 0
    if stop < 0:
        stop += sum(line.startswith("iteration ") for line in done.stdout.splitlines())
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "deepham_ks.py"), "--output-dir", str(parts), *quick],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    next(line for line in process.stdout if line.startswith(f"iteration {stop} "))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert command(parts, *quick, "--resume").returncode == 0
    weights = [torch.load(x / "NN_weights_biases.pth", weights_only=True) for x in (whole, parts)]
    for name in ("policy", "value"):
        assert all(torch.equal(weights[0][name][layer], weights[1][name][layer]) for layer in weights[0][name])


def test_default_run(tmp_path):
    done = command(tmp_path)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr


def test_a_failed_capture_ends_in_one_line_and_the_run_goes_on_without(tmp_path):
    script = f"""
    import contextlib
    @contextlib.contextmanager
    def failing(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield
    torch.cuda.graph = failing
    sys.exit(0 if dk.main(["--preset", "smoke", "--output-dir", {str(tmp_path)!r}]) == 2 else 1)
    """
    in_process(script)
    assert command(tmp_path, "--preset", "smoke", "--resume", "--no-cuda-graphs").returncode == 0


def test_too_large_a_batch_is_one_line(tmp_path):
    done = command(tmp_path, "--batch", "10000000", "--horizon", "600", "--periods", "700")
    assert done.returncode == 2 and "out of memory" in done.stderr and done.stderr.count("\n") == 1


def test_no_tf32():
    in_process("""
    a = torch.randn(2048, 2048, device="cuda")
    exact = a.double() @ a.double()
    assert ((a @ a).double() - exact).norm() / exact.norm() < 1e-5
    """)


def test_solution_is_the_same_on_both_devices():
    """float64, k' and V at 10,000 states."""
    in_process("""
    import numpy as np
    cpu, gpu = dk.load("NN_weights_biases.pth"), dk.load("NN_weights_biases.pth", "cuda")
    g = np.random.default_rng(0)
    K = cpu.K_mean * (0.99 + 0.02 * g.random(10_000))
    state = 150 * g.random(10_000), g.integers(0, 2, 10_000), K, g.integers(0, 2, 10_000)
    for name in ("next_capital", "value"):
        ours, theirs = (getattr(x, name)(*state) for x in (cpu, gpu))
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-9
    """)
