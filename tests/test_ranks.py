"""Several processes through torchrun: two gloo processes do what one does, repeat themselves, survive a kill."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import deepham_ks as dk

SCRIPT = Path(dk.__file__)
SMOKE = dataclasses.replace(dk.PRESETS["smoke"], iterations=4)
MOMENTS = dataclasses.replace(SMOKE, moments="variance", learnt_moments=1)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*command, ranks=2):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                             str(ranks), *map(str, command)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def under_torchrun(tmp_path, body, ranks=2):
    """Runs body in each of the ranks; what the first one saves with keep(...)."""
    script, kept = tmp_path / "script.py", tmp_path / "kept.pt"
    script.write_text(f"import dataclasses, sys, torch\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
                      "import deepham_ks as dk\n"
                      f"from deepham_ks import Config\nSMOKE, MOMENTS = {SMOKE!r}, {MOMENTS!r}\n"
                      f"def keep(x):\n    if dk.RANK == 0:\n        torch.save(x, {str(kept)!r})\n{body}\n")
    process = torchrun(script, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return torch.load(kept, weights_only=False), out


def solve_into(folder, cfg, **kwargs):
    return f"dk.solve(None, {cfg}, seed=5, device='cpu', compile='none', output_dir={str(folder)!r}, **{kwargs!r})\n"


def checkpoint(folder):
    return torch.load(folder / dk.CHECKPOINT, weights_only=True)


def same(one, other):
    """Bit for bit the same files, but for the seconds."""
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert torch.equal(one[name], other[name]), name
    for name in dk.HISTORY[1:]:
        assert one["history"][name] == other["history"][name], name
    return True


def test_two_ranks_learn_what_one_does_from_the_same_states(tmp_path):
    """Updates, ranges, centres and figures from each rank's part of a state, beside the same from all of it."""
    body = """
whole_cfg = dataclasses.replace(SMOKE, moments="variance")
cfg, kernels = dk.own_share(whole_cfg), dk.compile_kernels("none")

def tables(state={}):
    econ = dk.with_units(dk.krusell_smith().tables(dtype=torch.float32), cfg)
    return econ._replace(**{name: state[name] for name in ("K_mean", "Delta_law", "M_mean", "M_std") if state})

def learn(state, cfg):
    econ = tables(state)
    state["M"].mul_(4)  # so that the moments get another unit
    state["K_path"].mul_(1.3)  # and ln K another centre
    batch = dk.Batch(*[state["batch_" + name] for name in dk.Batch._fields])
    state["iteration"] = 1  # where both networks learn
    dk.set_rates(state, cfg, {})
    taken = dk.gauss_newton_updates(state, batch, econ, cfg, kernels)
    state["k_range"].copy_(dk.widened(state["k_range"], state["k"]))
    dk.recentre(state, econ, cfg)
    figures = dk.iteration_figures(state, batch.U.mean(), batch, econ, cfg, taken)
    return [figures, *[state[name] for name in ("policy", "value", "damping", "k_range", "K_mean", "M_mean", "M_std")]]

dk.join_ranks("cpu")
with torch.no_grad():
    econ, rng = tables(), torch.Generator().manual_seed(dk.RANK)
    state = dk.initial_state(econ, cfg, 0, rng)
    dk.train(state, econ, cfg, kernels, rng, False, lambda state: None)
    for name, x in state.items():  # what ranks do not share they have in common
        if isinstance(x, torch.Tensor) and dk.shared_along(name) is None:
            assert torch.equal(*dk.gathered(x[None], 0)), name
    everything = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in dk.whole(state).items()}
    date, economy = state["batch_at"] // cfg.n_economies, state["batch_at"] % cfg.n_economies
    at = date * whole_cfg.n_economies + dk.RANK * cfg.n_economies + economy
    everything["batch_at"] = dk.gathered(at, 0)
    names = ("policy", "value", "damping", "k_range", "K_mean", "M_mean", "M_std")
    before = [everything[name].clone() for name in names]
    parts = learn(state, cfg)
    theta, losses = torch.zeros(1), [torch.ones(1), torch.tensor([0.9 if dk.RANK == 0 else 1.5])]
    rows = lambda part: [(torch.ones(1), torch.ones(1, 1))]
    _, _, taken = dk.gauss_newton_step(theta, rows, 1, 1.0, torch.tensor(0.1), 1e-4, lambda theta: losses.pop(0))
    assert not taken  # the loss falls on the first rank and rises on both together
dk.RANKS = 1
keep([parts, learn(everything, whole_cfg), before])
"""
    (parts, alone, before), _ = under_torchrun(tmp_path, body)
    names = ("figures", "policy", "value", "damping", "k_range", "K_mean", "M_mean", "M_std")
    for name, part, one in zip(names, parts, alone):
        assert torch.allclose(part, one, rtol=1e-3, atol=1e-5), (name, part, one)
    for name, one, old in zip(names[1:], alone[1:], before):
        assert not torch.equal(one, old), name


@pytest.mark.parametrize("cfg", [SMOKE, MOMENTS], ids=["K", "learnt"])
def test_the_same_ranks_repeat_bit_for_bit_and_resume_exactly(tmp_path, cfg):
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    cfg = dataclasses.replace(cfg, averaging=0, final_value_steps=0)  # every step is of full size, whatever the ceiling
    body = (solve_into(straight, cfg) + solve_into(twice, dataclasses.replace(cfg, iterations=2))
            + solve_into(twice, cfg, resume=True) + "keep(dk.RANKS)")
    ranks, _ = under_torchrun(tmp_path, body)
    assert ranks == 2 and same(checkpoint(straight), checkpoint(twice))
    alone = tmp_path / "alone"
    dk.solve(None, cfg, seed=5, device="cpu", compile="none", output_dir=alone)
    one, two = checkpoint(alone), checkpoint(straight)
    assert dk.difference(two, {name: x for name, x in one.items() if name != "rng"}) == ""
    halves = two["k"].chunk(2)
    assert not torch.equal(*halves) and not torch.equal(one["k"], two["k"])  # each rank has its own random numbers


def test_another_number_of_ranks_goes_on_and_says_so(tmp_path, capsys):
    more, line = dataclasses.replace(MOMENTS, iterations=6), "the checkpoint is of another number of ranks"
    _, out = under_torchrun(tmp_path, solve_into(tmp_path, MOMENTS) + "keep(0)")
    assert line not in out
    dk.solve(None, more, seed=5, device="cpu", compile="none", output_dir=tmp_path, resume=True)
    assert line in capsys.readouterr().out and checkpoint(tmp_path)["iteration"] == 6
    more = dataclasses.replace(MOMENTS, iterations=8)
    _, out = under_torchrun(tmp_path, solve_into(tmp_path, more, resume=True) + "keep(0)")
    assert out.count(line) == 2 and checkpoint(tmp_path)["iteration"] == 8  # main() prints the first rank's alone


def test_two_ranks_are_as_accurate_as_one(tmp_path):
    """Euler errors and savings at the end of the same small run, within what another seed changes."""
    cfg = dataclasses.replace(dk.Config(), n_agents=60, n_economies=24, batch=512, hidden=16, horizon=50, periods=60,
                              iterations=40, averaging=10)
    body = "keep(" + solve_into(tmp_path / "two", cfg).strip() + ".weights)"
    two, _ = under_torchrun(tmp_path, body)
    found = [dk.solve(None, cfg, seed=seed, device="cpu").weights for seed in (5, 6)] + [two]
    euler = [np.mean(x["history"]["euler"][-8:]) for x in found]
    k = np.linspace(1, 100, 50)
    policies = [dk.Solution(x).next_capital(k, 1, 39.5, 1) for x in found]
    apart = [np.abs(policies[0] - policy).mean() for policy in policies[1:]]
    assert euler[2] < 1.25 * max(euler[:2]) and max(euler) < 1e-3
    assert apart[1] < 2 * apart[0]


def started(tmp_path):
    """A run of two ranks that has its first checkpoint: process, process ids of the ranks, flags and folder."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    flags = ["--preset", "smoke", "--device", "cpu", "--iterations", "400", "--grid", "none", "--output-dir", run]
    script.write_text(f"import os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
                      "import deepham_ks as dk\n"
                      f"Path({str(tmp_path)!r}, f'pid{{dk.RANK}}').write_text(str(os.getpid()))\nsys.exit(dk.main())\n")
    process = torchrun(script, *flags)
    while not (run / dk.CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process, [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)], [script, *flags], run


def alive(pid):
    try:
        return os.kill(pid, 0) is None
    except ProcessLookupError:
        return False


def said(err):
    (line,) = [line for line in err.splitlines() if line.startswith("deepham_ks: ")]
    return line


def test_a_rank_that_is_killed_ends_the_run_and_resume_goes_on(tmp_path):
    process, pids, command, run = started(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=25)  # torchrun itself kills after 30 s, and then nothing is said
    assert process.returncode != 0 and "--resume" in said(err)
    assert said(err).startswith(("deepham_ks: error: a rank was lost after iteration",
                                 "deepham_ks: stopped by SIGTERM after iteration"))
    assert not any(map(alive, pids))
    reached = checkpoint(run)["iteration"]
    command[command.index("400")] = str(reached + 3)
    process = torchrun(*command, "--resume")
    process.communicate(timeout=120)
    assert checkpoint(run)["iteration"] == reached + 3 and (run / "results.txt").exists()


def test_a_rank_that_hangs_does_not_keep_the_first_from_hearing_a_signal(tmp_path):
    process, pids, _, run = started(tmp_path)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)  # the first rank now waits for sums that do not come
    os.kill(pids[0], signal.SIGTERM)
    for _ in range(200):
        if not alive(pids[0]):
            break
        time.sleep(0.1)
    heard = not alive(pids[0])
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert heard and said(err).startswith("deepham_ks: stopped by SIGTERM after iteration")


@pytest.mark.parametrize("flags, line", [
    (["--evaluate"], "--evaluate trains nothing: run it with python, without torchrun"),
    (["--batch", "65"], "--batch 65 is no multiple of the 2 ranks: give 66"),
    (["--n-economies", "5"], "--n-economies 5 is no multiple of the 2 ranks: give 6"),
    (["--resume"], "--resume: "),
    (["--wide-share", "2"], "--wide-share 2.0: give a value in [0, 1]"),
])
def test_errors_are_said_once_and_nothing_hangs(tmp_path, flags, line):
    process = torchrun(SCRIPT, "--preset", "smoke", "--device", "cpu", "--output-dir", tmp_path, *flags)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and said(err).startswith(f"deepham_ks: error: {line}")
    assert "exitcode  : 2" in err and "Traceback" not in err.split("deepham_ks: error")[0]
    assert not list(tmp_path.iterdir())


def test_fewer_gpus_than_ranks(monkeypatch):
    monkeypatch.setattr(dk, "RANKS", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(dk.UserError, match="--nproc-per-node 4 on a machine with 2 GPUs: give --nproc-per-node 2, or"):
        dk.parse([])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert dk.parse([]).config.n_economies == 96
