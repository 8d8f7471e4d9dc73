"""Several processes through torchrun: two gloo processes learn what one does, repeat themselves, survive a kill."""

import contextlib
import dataclasses
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import deepham_ks as dk

SCRIPT = Path(dk.__file__)
SMOKE = dataclasses.replace(dk.PRESETS["smoke"], iterations=4, averaging=0, n_agents=0, learnt_moments=1)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(*command, ranks=2, **environment):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                             str(ranks), *map(str, command)], env=ENVIRONMENT | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def checkpoint(folder):
    return torch.load(folder / dk.CHECKPOINT, weights_only=True)


def same(one, other):
    """Bit for bit the same files, but for the seconds."""
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert torch.equal(one[name], other[name]), name
    for name in set(one["history"]) - {"seconds"}:
        assert one["history"][name] == other["history"][name], name
    return True


def said(err):
    (line,) = [line for line in err.splitlines() if line.startswith("deepham_ks: ")]
    return line


def script():
    """The script as a process sees it that has not read it before: there and then it learns its rank."""
    del sys.modules["deepham_ks"]
    fresh = importlib.import_module("deepham_ks")
    fresh.VALUE_ROUNDS = 2  # V moves no policy
    return fresh


def forked(work, folder, **environment):
    """work() in two processes that find each other as under torchrun, without two more starts of Python: process ids.
    What rank r prints is in folder, as out<r> and err<r>."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, pids = free.getsockname()[1], []
    for rank in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            pids.append(child)
            continue
        status = 99
        try:  # whatever happens, the child must not go on as a second pytest
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as torchrun starts them
            os.environ.update(environment, TORCHELASTIC_RUN_ID="forked", RANK=str(rank), LOCAL_RANK=str(rank),
                              WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w", buffering=1) as err:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    try:
                        status = work()
                    except BaseException:
                        traceback.print_exc()
        finally:
            os._exit(status)
    return pids


def statuses(pids, seconds=60):
    """Exit statuses of forked ranks; where one ends in trouble the other is told to end, as by torchrun."""
    found, until, told = {}, time.monotonic() + seconds, False
    while len(found) < len(pids):
        for pid in set(pids) - set(found):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > until
        if late or any(found.values()) and not told:
            told = True
            for pid in set(pids) - set(found):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.01)
    assert not late, "the ranks hang"
    return [found[pid] for pid in pids]


def body(folder):
    """One start of two ranks, in which all of this happens one after the other."""
    dk = script()
    smoke = dk.Config(**dataclasses.asdict(SMOKE))

    def solve(name, economy=None, cfg=smoke, **more):
        return dk.solve(economy, cfg, seed=5, device="cpu", compile="none", output_dir=f"{folder}/{name}", **more)

    def refusal(of):
        try:
            of()
        except dk.UserError as error:
            return str(error)

    kept = {"weights": solve("straight").weights}
    solve("twice", cfg=dataclasses.replace(smoke, iterations=2))
    solve("twice", resume=True)
    other = dk.Calibration(gamma=1.0 + dk.RANK)
    kept["refused"] = {
        "economy": refusal(lambda: solve("other", dk.krusell_smith(other))),
        "config": refusal(lambda: solve("other", cfg=dataclasses.replace(smoke, horizon=10 + dk.RANK))),
        "seed": refusal(lambda: dk.solve(None, smoke, seed=dk.RANK, device="cpu", compile="none")),
        "solve": refusal(lambda: solve("other", cfg=dataclasses.replace(smoke, batch=65))),
        "resume": refusal(lambda: solve("nothing", resume=True))}
    for flags in ("--evaluate", "--preset smoke --batch 65", "--preset smoke --n-economies 5"):
        kept["refused"][flags] = refusal(lambda flags=flags: dk.parse(flags.split()))
    torch.save(kept, f"{folder}/kept{dk.RANK}.pt")
    return 0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder, and what each of the ranks kept."""
    folder = tmp_path_factory.mktemp("ranks")
    ends = statuses(forked(lambda: body(folder), folder), 120)
    assert ends == [0, 0], "".join((folder / f"err{rank}").read_text() for rank in (0, 1))[-3000:]
    out = (folder / "out0").read_text()
    assert "another number of ranks" not in out
    shared = "2 of 4 economies and 32 of 64 households each; the first alone judges and writes"
    assert out.splitlines()[0] == f"2 processes share the simulation and the roll-outs: {shared}"
    return folder, [torch.load(folder / f"kept{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_the_same_ranks_repeat_bit_for_bit_and_resume_exactly(ran):
    straight, twice = [checkpoint(ran[0] / name) for name in ("straight", "twice")]
    assert straight["iteration"] == 4 and same(straight, twice)
    halves = straight["k"].chunk(2)
    assert len(straight["k"]) == SMOKE.n_economies and not torch.equal(*halves)


def test_two_ranks_learn_what_one_does(ran, tmp_path, monkeypatch):
    """Both ranks end with the same networks; figures of all economies are those of one process but for the draws."""
    one, other = [kept["weights"] for kept in ran[1]]
    for network in ("policy", "value"):
        for layer, x in one[network].items():
            assert torch.equal(x, other[network][layer]), (network, layer)
    monkeypatch.setattr(dk, "VALUE_ROUNDS", 2)
    alone = dk.solve(None, SMOKE, seed=5, device="cpu", compile="none", output_dir=tmp_path).weights
    assert one.keys() == alone.keys() and dk.difference(one["config"], alone["config"]) == ""
    for name in ("policy", "value"):
        assert [(x.dtype, x.shape) for x in one[name].values()] == [(x.dtype, x.shape) for x in alone[name].values()]
    for name in ("mean_K", "euler", "policy_residual", "movement"):
        ours, theirs = [np.mean(x["history"][name]) for x in (one, alone)]
        assert ours == pytest.approx(theirs, rel=0.1 if name == "mean_K" else 0.5), name
    assert one["K_mean"] == other["K_mean"]


def test_another_number_of_ranks_goes_on_and_says_so(ran, capsys):
    """Not bit for bit, and that is said."""
    more = dataclasses.replace(SMOKE, iterations=5)
    dk.solve(None, more, seed=5, device="cpu", compile="none", output_dir=ran[0] / "twice", resume=True)
    assert "the checkpoint is of another number of ranks" in capsys.readouterr().out
    assert checkpoint(ran[0] / "twice")["iteration"] == 5


@pytest.mark.parametrize("what, words", [
    ("economy", "do not solve the same economy"), ("config", "do not solve the same economy"),
    ("seed", "do not solve the same economy"), ("solve", "--batch 65 is no multiple of the 2 ranks: give 66"),
    ("resume", "No such file"),
    ("--evaluate", "--evaluate trains nothing: run it with python, without torchrun"),
    ("--preset smoke --batch 65", "--batch 65 is no multiple of the 2 ranks: give 66"),
    ("--preset smoke --n-economies 5", "--n-economies 5 is no multiple of the 2 ranks: give 6")])
def test_ranks_refuse_what_they_cannot_share(ran, what, words):
    """All of them, so that none waits; only the first one looks for the checkpoint."""
    refused = [kept["refused"][what] for kept in ran[1]]
    assert words in refused[0] and (words in refused[1] or what == "resume" and refused[1])


def until_saved(run, before, going):
    """Until there is a checkpoint other than the one before."""
    for _ in range(3000):
        if (run / dk.CHECKPOINT).exists() and (run / dk.CHECKPOINT).stat().st_ino != before:
            return
        going()
        time.sleep(0.02)
    raise AssertionError("no checkpoint in a minute")


LONG = ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--iterations", "100000", "--grid", "none",
        "--output-dir"]


def alive(pid):
    try:
        return os.kill(pid, 0) is None
    except ProcessLookupError:
        return False


def test_a_rank_that_is_killed_ends_the_run_resume_goes_on_and_one_that_hangs_hides_no_signal(tmp_path):
    """In each case the first rank says in one line how to go on, and no process is left."""
    command, run = tmp_path / "script.py", tmp_path / "run"
    command.write_text(f"import os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
                       "import deepham_ks as dk\n"
                       f"Path({str(tmp_path)!r}, f'pid{{dk.RANK}}').write_text(str(os.getpid()))\n"
                       "sys.exit(dk.main())\n")
    process = torchrun(command, *LONG, run)

    def going():
        assert process.poll() is None, process.stderr.read()[-3000:]

    until_saved(run, None, going)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=25)  # torchrun itself kills after 30 s, and then nothing is said
    assert process.returncode != 0 and "--resume" in said(err)
    assert said(err).startswith(("deepham_ks: error: a rank was lost after iteration",
                                 "deepham_ks: stopped by SIGTERM after iteration"))
    assert not any(map(alive, pids))
    reached, before = checkpoint(run)["iteration"], (run / dk.CHECKPOINT).stat().st_ino
    pids = forked(lambda: script().main([*LONG, str(run), "--resume"]), tmp_path)

    def running():
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), (tmp_path / "err0").read_text()[-3000:]

    until_saved(run, before, running)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.5)  # the first rank now waits for sums that do not come
    os.kill(pids[0], signal.SIGTERM)
    for _ in range(200):
        heard, status = os.waitpid(pids[0], os.WNOHANG)
        if heard:
            break
        time.sleep(0.05)
    for pid in pids[bool(heard):]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    err = (tmp_path / "err0").read_text()
    assert heard and os.waitstatus_to_exitcode(status) == 143
    assert said(err).startswith("deepham_ks: stopped by SIGTERM after iteration")
    assert "torchrun --nproc-per-node 2 " in said(err) and checkpoint(run)["iteration"] > reached


def test_a_start_that_fails_gives_gloo_s_reason_once(tmp_path):
    """No word of a lost rank or of a checkpoint that is not there."""
    run = tmp_path / "run"
    pids = forked(lambda: script().main([*LONG, str(run)]), tmp_path, GLOO_SOCKET_IFNAME="nosuch0")
    assert statuses(pids)[0] == 2
    err = "".join((tmp_path / f"err{rank}").read_text() for rank in (0, 1))
    assert "nosuch0" in said(err) and "lost" not in said(err) and said(err).startswith("deepham_ks: error: ")
    assert not run.exists() or not list(run.iterdir())


def test_fewer_gpus_than_ranks(monkeypatch):
    monkeypatch.setattr(dk, "RANKS", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(dk.UserError, match="--nproc-per-node 4 on a machine with 2 GPUs: give --nproc-per-node 2, or"):
        dk.parse([])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert dk.parse([]).run.device == "auto"
