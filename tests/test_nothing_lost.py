"""Nothing trained is lost: stops, failures, numerical trouble, full disks, too little memory, as a user meets them."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMOKE, main, make_quick
from hypothesis import example, given, settings
from hypothesis import strategies as st

import deepham_ks as dk

ADAM = ["--optimizer", "adam", "--policy-rate", "1e-3", "--policy-steps", "3", "--value-steps", "3"]
PUBLISHED = ("results.txt", "metrics.json", "training.csv", "distribution_validation.png",
             "irf/agg_capital_shocked.csv", "figures/training_history.png")
PREVIOUS = "NN_weights_biases.previous.pth"


def tree(folder, names=None):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name in (names or found)}


def earlier_results(folder):
    """Marks in place of every published file."""
    for name in PUBLISHED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"earlier " + name.encode())
    return tree(folder)


def untouched(folder, earlier):
    assert tree(folder, earlier) == earlier
    assert not list(folder.glob(".deepham-*"))


def checkpoint(folder):
    return torch.load(folder / dk.CHECKPOINT, weights_only=True)


def weights(folder):
    return torch.load(folder / dk.WEIGHTS, weights_only=True)


def same(a, b):
    """Equal bit for bit, but for the wall time."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    return a == b


def one_line(err):
    assert err.startswith("deepham_ks: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def after_checkpoint(patch, number, then):
    """Call then() when checkpoint number is on the disk."""
    save, saved = dk.save_checkpoint, []

    def saving(path, state):
        save(path, state)
        if path.name == dk.CHECKPOINT:
            saved.append(path)
            if len(saved) == number:
                then()

    patch.setattr(dk, "save_checkpoint", saving)


def send(signum):
    return lambda: os.kill(os.getpid(), signum)


def forked(work, err=os.devnull):
    """work() in a process of its own, its stderr in a file; the process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as null, open(err, "w") as file:
                with contextlib.redirect_stdout(null), contextlib.redirect_stderr(file):
                    status = work()
            os._exit(status)
        finally:  # whatever happens, the child must not go on as a second pytest
            os._exit(99)
    return child


def command_line(folder, *flags):
    return lambda: dk.main([*SMOKE, "--grid", "none", "--output-dir", str(folder), *map(str, flags)])


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until(there, child=None):
    for _ in range(3000):
        if there():
            return
        assert child is None or os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before"
        time.sleep(0.01)
    raise AssertionError("waited 30 s in vain")


# ---- stops


def test_killed_and_interrupted_run_resumes_bit_for_bit(tmp_path, quick):
    """kill -9 at a random moment, then Ctrl-C, each gone on from with the command that was told."""
    flags, whole, parts = ["--iterations", "8"], tmp_path / "whole", tmp_path / "my parts"
    assert main(whole, *flags)[0] == 0
    child = forked(command_line(parts, *flags))
    until((parts / dk.CHECKPOINT).exists, child)
    time.sleep(np.random.default_rng().random() / 20)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    reached = checkpoint(parts)["iteration"]
    with quick.context() as patch:
        after_checkpoint(patch, 2, send(signal.SIGINT))
        status, out, err = main(parts, *flags, "--resume")
    assert status == 130 and f"iteration {reached + 1} " in out and f"iteration {reached} " not in out
    assert checkpoint(parts)["iteration"] == reached + 2 < 8
    told, again = one_line(err).strip().split("; continue with: ")
    assert told.startswith("deepham_ks: stopped by SIGINT after iteration ")
    assert again.startswith("python deepham_ks.py --resume ")
    assert dk.main(shlex.split(again)[2:]) == 0
    assert same(checkpoint(whole), checkpoint(parts)) and same(weights(whole), weights(parts))
    assert not list(parts.glob(".deepham-*"))


def test_an_interrupt_at_once_after_a_checkpoint_names_its_iteration(tmp_path, quick):
    """Were it the first one, too: it was saved."""
    after_checkpoint(quick, 1, send(signal.SIGINT))
    status, _, err = main(tmp_path)
    assert status == 130 and checkpoint(tmp_path)["iteration"] == 1
    assert "after iteration 1; continue with: " in one_line(err)


def test_adam_resumes_bit_for_bit_from_every_iteration(tmp_path, quick):
    """Its moving means of gradients are in the checkpoint, too."""
    flags, whole, parts = [*ADAM, "--iterations", "3"], tmp_path / "whole", tmp_path / "parts"
    assert main(whole, *flags)[0] == 0
    for iteration in (1, 2):
        with quick.context() as patch:
            after_checkpoint(patch, 1, send(signal.SIGTERM))
            status, _, err = main(parts, *flags, *["--resume"][: iteration - 1])
        assert status == 143 and one_line(err) and checkpoint(parts)["iteration"] == iteration
    assert main(parts, *flags, "--resume")[0] == 0
    assert same(checkpoint(whole), checkpoint(parts)) and same(weights(whole), weights(parts))


def when(there, after, signum, sent):
    """A thread that sends signum to this process some seconds after there() holds; the time goes into sent."""
    def wait():
        until(there)
        time.sleep(after)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


FULL_GRID = ["--grid", "converged", "--grid-n-k", "400", "--grid-n-K", "12", "--grid-periods", "60000",
             "--grid-tolerance", "3e-7"]


@pytest.mark.parametrize("flags, signum", [(FULL_GRID, signal.SIGTERM), (["--eval-periods", "50000"], signal.SIGINT)],
                         ids=["grid", "judge"])
def test_a_signal_after_training_ends_within_two_seconds(tmp_path, flags, signum):
    """At sizes where these stages take many seconds; what was trained is on the disk."""
    earlier, sent = earlier_results(tmp_path), []
    thread = when((tmp_path / dk.WEIGHTS).exists, 0.6, signum, sent)
    status, _, err = main(tmp_path, *flags)
    assert status == 128 + signum and time.perf_counter() - sent[0] < 2
    thread.join()
    assert one_line(err).startswith(f"deepham_ks: stopped by {signum.name} after iteration 3; continue with: ")
    untouched(tmp_path, earlier)
    assert same(weights(tmp_path)["history"], checkpoint(tmp_path)["history"])


def test_a_signal_in_a_picture_and_while_evaluating(tmp_path, finished, quick):
    """Nothing of the results is new; --evaluate has nothing to go on with."""
    import matplotlib.figure

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    quick.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: (send(signal.SIGTERM)(), time.sleep(60)))
    status, _, err = main(tmp_path, "--evaluate")
    assert status == 143 and one_line(err) == "deepham_ks: stopped by SIGTERM; results are as they were\n"
    assert tree(tmp_path) == before
    status, _, err = main(tmp_path, "--seed", 1)
    assert status == 143 and " after iteration 3; continue with: " in one_line(err)
    earlier = {name: data for name, data in before.items() if not name.endswith((".pt", ".pth"))}
    untouched(tmp_path, earlier)


def test_a_signal_in_the_first_large_iteration(tmp_path):
    """Nothing is saved yet, and no single operation is long."""
    sizes = [word for name in ("n_agents", "n_economies", "periods", "horizon", "batch", "hidden")
             for word in ("--" + name.replace("_", "-"), str(getattr(dk.Config(), name)))]
    sent = []
    when(tmp_path.exists, 0.7, signal.SIGINT, sent)
    status, out, err = main(tmp_path, *sizes, "--n-agents", 2000)
    assert status == 130 and time.perf_counter() - sent[0] < 2 and "\niteration " not in out
    assert err == "deepham_ks: stopped by SIGINT after iteration 0; nothing was saved yet\n"
    assert not list(tmp_path.iterdir())


def test_a_signal_that_python_dropped_ends_the_run_at_the_next_checkpoint(tmp_path, quick):
    """What is raised in a destructor goes nowhere."""
    class Dropping:
        def __del__(self):
            send(signal.SIGTERM)()

    quick.setattr(sys, "unraisablehook", lambda info: None)
    after_checkpoint(quick, 1, Dropping)
    status, _, err = main(tmp_path)
    assert status == 143 and "stopped by SIGTERM after iteration " in one_line(err)
    assert checkpoint(tmp_path)["iteration"] <= 2


# ---- failures after the training


FAILURES = {"grid": (dk, "solve_grid", ["--grid", "converged"]), "judge": ("scipy.sparse.linalg.splu", None, []),
            "results": (np, "savetxt", []), "picture": ("matplotlib.figure.Figure.savefig", None, [])}


def fail_at(patch, stage, error):
    def failing(*args, **kwargs):
        raise error

    of, name, flags = FAILURES[stage]
    patch.setattr(*(of, name) if name else (of,), failing)
    return flags


@pytest.mark.parametrize("stage", FAILURES)
def test_a_failure_after_training_leaves_weights_and_the_earlier_results(tmp_path, monkeypatch, stage):
    """By a lack of memory, a full disk or a bug, which keeps its traceback: the weights are there to be judged."""
    import matplotlib.figure  # noqa: F401

    for number, error in enumerate((MemoryError(), OSError(28, "No space left on device"), KeyError("a bug"))):
        if number not in {"grid": (0, 2), "judge": (0,), "results": (1,), "picture": (0, 1, 2)}[stage]:
            continue
        folder = tmp_path / str(number)
        earlier = earlier_results(folder)
        with monkeypatch.context() as patch:
            if stage in ("results", "picture"):
                make_quick(patch)
            flags = fail_at(patch, stage, error)
            if number == 2:
                with pytest.raises(KeyError):
                    main(folder, "--seed", number, *flags)
            else:
                status, _, err = main(folder, "--seed", number, *flags)
                assert status == 2 and one_line(err)
        untouched(folder, earlier)
        assert checkpoint(folder)["iteration"] == 3 and dk.load(folder / dk.WEIGHTS).weights["seed"] == number


def test_weights_of_the_published_results_stay_until_others_are_published(tmp_path, quick):
    """However many runs fail in between: under a second name, and gone with the results that they belong to."""
    assert main(tmp_path, "--seed", 1)[0] == 0
    first = (tmp_path / dk.WEIGHTS).read_bytes()
    results = tree(tmp_path, PUBLISHED)
    for seed in (2, 3):
        with quick.context() as patch:
            fail_at(patch, "picture", OSError(28, "No space left on device"))
            assert main(tmp_path, "--seed", seed)[0] == 2
        assert tree(tmp_path, PUBLISHED) == results and weights(tmp_path)["seed"] == seed
        assert (tmp_path / PREVIOUS).read_bytes() == first, f"after {seed - 1} failed runs"
    assert main(tmp_path, "--evaluate")[0] == 0
    assert not (tmp_path / PREVIOUS).exists() and json.loads((tmp_path / "metrics.json").read_text())["seed"] == 3
    assert not list(tmp_path.glob(".deepham-*"))


def test_a_fresh_run_keeps_the_earlier_checkpoint_until_its_own_is_whole(tmp_path, finished, quick):
    """And for ever as checkpoint.previous.pt, in case it was started by mistake."""
    shutil.copy(finished / dk.CHECKPOINT, tmp_path)
    first = (tmp_path / dk.CHECKPOINT).read_bytes()
    assert main(tmp_path, "--n-agents", 10**7, "--n-economies", 10**6)[0] == 2
    assert tree(tmp_path) == {dk.CHECKPOINT: first}
    after_checkpoint(quick, 1, send(signal.SIGINT))
    assert main(tmp_path, "--seed", 1)[0] == 130
    assert tree(tmp_path)["checkpoint.previous.pt"] == first and checkpoint(tmp_path)["iteration"] == 1


# ---- memory


def test_fifty_thousand_households_in_under_8_gb(tmp_path, monkeypatch):
    """An iteration of a fourth of the default's 16 economies of them: no past panel is held."""
    cfg = dataclasses.replace(dk.PRESETS["smoke"], n_agents=50_000, periods=21)
    monkeypatch.setattr(dk, "save_checkpoint", lambda *_: os._exit(0))
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    child = forked(lambda: dk.solve(None, cfg, device="cpu", compile="none", output_dir=tmp_path) is None)
    _, status, usage = os.wait4(child, 0)
    assert status == 0 and usage.ru_maxrss * 1024 - held < 8e9 / 16


def test_out_of_memory_is_one_line(tmp_path):
    """Where the system gives no more, and where sizes are absurd; the line names the flags to lower."""
    earlier, err = earlier_results(tmp_path / "run"), tmp_path / "err"

    def limited():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
        return command_line(tmp_path / "run", "--batch", 10**7)()

    assert ended(forked(limited, err)) == 2
    assert one_line(err.read_text()).startswith("deepham_ks: error: out of memory; lower ")
    status, _, told = main(tmp_path / "run", "--n-agents", 10**7, "--n-economies", 10**6)
    assert status == 2 and "out of memory; lower --n-agents, " in one_line(told) and "--batch" in told
    untouched(tmp_path / "run", earlier)
    status, _, told = main(tmp_path / "run", "--eval-agents", 10**7, "--eval-economies", 10**6)
    assert status == 2 and "out of memory" in one_line(told) and "--eval-agents" in told
    untouched(tmp_path / "run", earlier)
    dk.load(tmp_path / "run" / dk.WEIGHTS)


# ---- full disk


def mounted(folder, *options):
    return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Room for checkpoints and weights, not for the results."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not mounted(folder, "-t", "tmpfs", "-o", "size=200k", "deepham"):
        pytest.skip("only root can mount a small disk; test_a_write_that_fails covers the rest")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_small_for_the_results(small_disk, quick):
    """One line; weights are there to be judged elsewhere."""
    earlier = earlier_results(small_disk)
    status, _, err = main(small_disk)
    assert status == 2 and "--output-dir" in one_line(err) and "No space left on device" in err
    untouched(small_disk, earlier)
    assert checkpoint(small_disk)["iteration"] == 3 and weights(small_disk)["seed"] == 0


def test_a_disk_that_is_full_half_way_through_the_training(small_disk, quick):
    """The last whole checkpoint is there to go on from once there is space."""
    earlier, ballast = earlier_results(small_disk), small_disk / "ballast"

    def spoil():
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    with quick.context() as patch:
        after_checkpoint(patch, 2, spoil)
        status, _, err = main(small_disk)
    assert status == 2 and "--output-dir" in one_line(err) and "No space left on device" in err
    assert tree(small_disk, earlier) == earlier and checkpoint(small_disk)["iteration"] == 2
    mounted(small_disk, "-o", "remount,size=9m")
    ballast.unlink(missing_ok=True)
    assert main(small_disk, "--resume")[0] == 0 and checkpoint(small_disk)["iteration"] == 3
    assert not list(small_disk.glob(".deepham-*"))


@pytest.mark.parametrize("size, iteration", [(40_000, 3), (1000, 1)])  # bytes a file may have; last good checkpoint
def test_a_write_that_fails(tmp_path, quick, size, iteration):
    """Results, then the second checkpoint, larger than any file may be."""
    earlier, before = earlier_results(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        after_checkpoint(quick, iteration, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])))
        status, _, err = main(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and "--output-dir" in one_line(err) and "File too large" in err
    untouched(tmp_path, earlier)
    assert checkpoint(tmp_path)["iteration"] == iteration


# ---- numerical trouble, planted in the checkpoint that a run goes on from


def consumes_everything(policy):
    policy[-1] = 20.0


TROUBLES = {"NaN": (lambda policy: policy.fill_(math.nan), "nan"),
            "nobody saves": (consumes_everything, "(mean_K|at_limit) is ")}


def planted(finished, folder, change):
    """A copy of the checkpoint of a finished run, changed."""
    content = checkpoint(finished)
    change(content)
    folder.mkdir(exist_ok=True)
    dk.save_checkpoint(folder / dk.CHECKPOINT, content)


@pytest.mark.parametrize("kind", TROUBLES)
def test_trouble_is_taken_back_with_half_the_step(tmp_path, finished, quick, kind):
    """The step that led there, too: the run goes on from the policy before it."""
    change, words = TROUBLES[kind]
    planted(finished, tmp_path, lambda content: change(content["policy"]))
    status, out, err = main(tmp_path, "--resume", "--iterations", 6)
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "taken back" in line]
    assert re.match(f"iteration 4 taken back: .*{words}", line)
    rate = checkpoint(tmp_path)["history"]["rate"]
    assert rate[3] == pytest.approx(rate[0] / 2) and rate[3] < rate[4] < rate[0]
    assert np.isfinite(np.loadtxt(tmp_path / "training.csv", delimiter=",", skiprows=1)).all()


@pytest.mark.parametrize("kind", [*TROUBLES, "K too high"])
def test_three_troubles_in_a_row_stop_the_run(tmp_path, finished, kind):
    """In one line; the checkpoint stays what it was."""
    def change(content):
        if kind in TROUBLES:
            TROUBLES[kind][0](content["policy"])
            content["policy_before"].copy_(content["policy"])
        else:
            content["k"] *= 1e9

    planted(finished, tmp_path, change)
    before = tree(tmp_path)
    status, out, err = main(tmp_path, "--resume", "--iterations", 6)
    words = TROUBLES[kind][1] if kind in TROUBLES else r"mean_K is \S+, far from \S+ of the steady state"
    assert status == 2 and re.search(words, one_line(err)) and "three times; lower --policy-rate" in err
    assert out.count("taken back") == 3 and tree(tmp_path) == before


def test_a_resumed_run_keeps_the_smaller_step(tmp_path, finished, quick):
    """caution is in the checkpoint."""
    planted(finished, tmp_path, lambda content: content.update(caution=0.25))
    assert main(tmp_path, "--resume", "--iterations", 5)[0] == 0
    rate = checkpoint(tmp_path)["history"]["rate"]
    assert rate[3] == pytest.approx(0.25 * rate[0]) and rate[3] < rate[4]


# ---- any flags, any checkpoint


def edge_values(item):
    """At the ends of a flag's interval and just outside; sizes stay small, so that the run does."""
    name = "--" + item.name.replace("_", "-")
    if item.metadata["choices"]:
        values = [*item.metadata["choices"], "x"]
    elif isinstance(item.default, str):
        values = ["", "variance", "groups,variance", "x"]
    else:
        low, high = map(float, item.metadata["within"][1:-1].split(","))
        if isinstance(item.default, int):
            values = [int(low) - 1, int(low), int(low) + 1, 5, 19, 20, 60, int(high) + 1, "1.5"]
        else:
            near = [x for x in (low, high, item.default, low + 1e-3, high - 1e-3) if math.isfinite(x)]
            values = [*near, "1e-300", "1e300", "nan", "inf", "-1"]
    return st.sampled_from(values).map(lambda value: [name, str(value)])


def fields(kind):
    return [item for item in kind.__dataclass_fields__.values() if item.metadata]


FLAGS = st.lists(st.sampled_from([*fields(dk.Calibration), *fields(dk.Config)]).flatmap(edge_values), min_size=1,
                 max_size=3)
EXAMPLES = ["--gamma 20 --k-min -1", "--delta 1 --horizon 2", "--z-duration 1 --batch 2", "--tfp-shock 0.5 --beta 0.5",
            "--alpha 0.99", "--alpha 1e-300", "--optimizer adam --policy-rate 1 --policy-steps 2 --value-steps 2",
            "--n-agents 1 --n-economies 1 --hidden 1", "--u-bad 0 --u-good 0", "--delta 1e-5 --beta 0.99999",
            "--moments variance --learnt-moments 2", "--mu 0 --gamma 5", "--equilibrium planner", "--k-min 30"]


def with_examples(test):
    for flags in EXAMPLES:
        test = example([flags.split()])(test)
    return test


@with_examples
@settings(max_examples=4, deadline=None, derandomize=True)
@given(FLAGS)
def test_any_flags_end_in_success_or_one_line(flags):
    """Of the training; and what was trained loads."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "VALUE_ROUNDS", 2)
        try:
            asked = dk.parse([*SMOKE, "--iterations", "2", *[word for pair in flags for word in pair]])
            with contextlib.redirect_stdout(io.StringIO()):
                solution = dk.solve(asked.economy, asked.config, device="cpu", compile="none")
        except dk.UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
        except (RuntimeError, MemoryError) as error:
            assert dk.is_out_of_memory(error)
        else:
            solution.save(Path(folder) / dk.WEIGHTS)
            K = solution.K_mean
            assert np.isfinite(dk.load(Path(folder) / dk.WEIGHTS).next_capital(solution.economy.k_min, 1, K, 0))


def test_an_extreme_run_is_judged_or_refused_in_one_line(tmp_path):
    """To the end, pictures and all."""
    status, _, err = main(tmp_path, *"--gamma 20 --mu 0 --iterations 2 --irf-periods 1 --eval-periods 40".split())
    assert (status, err) == (0, "") if status == 0 else (status == 2 and one_line(err)), err
    assert (tmp_path / "metrics.json").exists() == (status == 0) and (tmp_path / dk.WEIGHTS).exists()


EDITS = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert", "drop"]), st.floats(0, 1),
                           st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)


@pytest.mark.parametrize("flag, name", [("--resume", dk.CHECKPOINT), ("--evaluate", dk.WEIGHTS)])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(edits=EDITS)
def test_any_bytes_are_read_as_they_were_or_refused(finished, flag, name, edits):
    """And the file stays as it is."""
    whole = (finished / name).read_bytes()
    data = bytearray(whole)
    for kind, where, noise in edits:
        at = int(where * len(data))
        data[at:] = {"flip": noise + data[at + len(noise):], "cut": b"", "insert": noise + data[at:],
                     "drop": data[at + len(noise):]}[kind]
    if data == whole:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        status, _, err = main(folder, flag)
        assert status == 2 and f"error: {flag}: {path}" in one_line(err) and tree(Path(folder)) == {name: data}


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("flag, name", [("--resume", dk.CHECKPOINT), ("--evaluate", dk.WEIGHTS)])
@pytest.mark.parametrize("flags, words", [
    (["--beta", "0.98"], "economy.beta "),
    (["--hidden", "9"], "in this run"),
    (["--seed", "1"], "config.seed is 0 in the file and 1"),
    (["--optimizer", "adam"], "config.optimizer is 'gauss-newton' in the file and 'adam'"),
    (["newer"], ", of a newer"), (["older"], ", of an older"), (["cut"], "is damaged"), (["absent"], "No such file"),
    (["text"], "is damaged"), (["empty"], "is damaged"), (["another"], "no file of this script"),
    (["code"], "is damaged or no file of this script"),
    (["table"], "economy.income has other numbers in the file than in this run")])
def test_foreign_files_are_refused_by_name_and_left(tmp_path, finished, flag, name, flags, words):
    """One line that names the file and what is wrong; code in it does not run."""
    if flag == "--evaluate" and flags[0] in ("--seed", "--optimizer"):
        return  # of the training, not of the networks
    path = tmp_path / name
    shutil.copy(finished / name, path)
    content = torch.load(path, weights_only=True)
    if flags[0] in ("newer", "older"):
        dk.save_checkpoint(path, content | {"format": content["format"] + (1 if flags == ["newer"] else -1)})
    elif flags == ["cut"]:
        path.write_bytes(path.read_bytes()[:-100])
    elif flags[0] in ("text", "empty"):
        path.write_bytes(b"weights\n" * (1000 if flags == ["text"] else 0))
    elif flags == ["another"]:
        torch.save({"policy": torch.zeros(3)}, path)
    elif flags == ["absent"]:
        path.unlink()
    elif flags == ["table"]:
        content["economy"]["income"][0, 0] += 1e-9
        dk.save_checkpoint(path, content)
    elif flags == ["code"]:
        dk.save_checkpoint(path, content | {"history": Code(tmp_path / "code_has_run")})
    before = tree(tmp_path)
    status, _, err = main(tmp_path, flag, *(flags if flags[0].startswith("--") else []))
    assert status == 2 and f"error: {flag}: {path}" in one_line(err) and words in err
    assert tree(tmp_path) == before


def test_a_resumed_run_may_go_further_or_be_judged_otherwise(finished, tmp_path, quick):
    """These flags are no part of what a checkpoint must agree with."""
    shutil.copy(finished / dk.CHECKPOINT, tmp_path)
    assert main(tmp_path, "--resume", "--iterations", "4", "--eval-agents", "25", "--irf-paths", "3")[0] == 0
    assert checkpoint(tmp_path)["iteration"] == 4


def test_the_same_seed_gives_the_same_bytes(tmp_path, no_pictures):
    """Whatever other generators of random numbers are at."""
    for name in "ab":
        torch.rand(7), np.random.default_rng().random()
        torch.manual_seed(ord(name))
        assert main(tmp_path / name, "--seed", 3)[0] == 0
    a, b = [tree(tmp_path / name) for name in "ab"]
    assert same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    names = [name for name in a if name == "results.txt" or name.startswith("irf/")]
    assert len(names) == 11 and all(a[name] == b[name] for name in names)
    with contextlib.redirect_stdout(io.StringIO()):
        other = dk.solve(None, "smoke", seed=4, device="cpu", compile="none").weights
    assert not same(other["policy"], weights(tmp_path / "a")["policy"])
