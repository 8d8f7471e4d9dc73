"""The command line, checkpoint files, publishing and the ways a run ends."""
import contextlib
import math
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepham_ks as dk


def refused(*argv, **economy):
    with pytest.raises(dk.UserError) as error:
        dk.parse(list(argv), **economy)
    assert "\n" not in str(error.value)
    return str(error.value)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- command line


def test_preset_decides_defaults_and_flags_override_it():
    asked = dk.parse(["--preset", "paper", "--hidden", "7", "--beta", "0.98", "--control-variate"])
    assert asked.config == replace(dk.PRESETS["paper"], hidden=7, control_variate=True)
    assert (asked.economy.beta == 0.98).all() and asked.calibration["beta"] == 0.98
    assert (asked.run.output_dir, asked.run.resume) == ("runs/paper", False)
    assert not dk.parse(["--no-control-variate"]).config.control_variate
    assert dk.parse([])[2:] == (dk.PRESETS["default"], dk.GRIDS["converged"], dk.Run(output_dir="."))
    assert dk.parse(["--output-dir", "x"]).run.output_dir == "x"


@dataclass(frozen=True)
class Household:
    """A calibration of our own."""

    beta: float = dk.option(0.96, "7% of households, most of the error", "(0, 1)")


def one_state(cal):
    return dk.Economy(alpha=0.36, delta=0.1, beta=cal.beta, TFP=[1.0], P_z=[[1.0]], income=[1.0], Pi=[[1.0]])


def test_help_names_every_flag_default_and_reason(capsys):
    def said(*economy):
        with pytest.raises(SystemExit) as stop:
            dk.parse(["--help"], *economy)
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    text = said()
    for kind in (dk.Calibration, dk.Config, dk.GridConfig, dk.Run):
        for item in fields(kind):
            prefix = "--grid-" if kind is dk.GridConfig else "--"
            assert prefix + item.name.replace("_", "-") in text and item.metadata["help"] in text
    agents = [dk.PRESETS[name].n_agents for name in ("default", "paper", "smoke")]
    assert "(default {}, paper {}, smoke {})".format(*agents) in text
    text = said(one_state, Household)  # a per cent sign too, which argparse would format with
    assert "7% of households, most of the error (default 0.96)" in text and "--gamma" not in text


def test_flags_are_those_of_the_economy():
    """A calibration of one's own makes its economy; an economy without one has no such flags."""
    asked = dk.parse(["--beta", "0.9", "--hidden", "7"], one_state, Household)
    assert asked.economy.beta.tolist() == [0.9] and asked.calibration == {"beta": 0.9} and asked.config.hidden == 7
    economy = one_state(Household())
    asked = dk.parse(["--hidden", "7"], economy)
    assert asked.economy is economy and asked.calibration == {} and asked.config.hidden == 7
    assert "unrecognized arguments: --beta" in refused("--beta", "0.9", economy=economy)
    assert "--beta 2.0: give a value in (0, 1)" in refused("--beta", "2", economy=one_state, calibration=Household)


def test_grid_flags_change_the_grid_and_nothing_else():
    converged, published = dk.GRIDS["converged"], dk.GRIDS["published"]
    assert dk.parse(["--grid-n-k", "50", "--grid-n-K", "7"]).grid == replace(converged, n_k=50, n_K=7)
    assert dk.parse(["--grid", "published", "--grid-exponent", "6"]).grid == replace(published, exponent=6.0)
    assert dk.parse(["--preset", "smoke", "--grid-seed", "1"]).grid == replace(dk.SMOKE_GRID, seed=1)
    assert dk.parse(["--preset", "smoke", "--grid", "published"]).grid == published
    assert dk.parse(["--grid", "none", "--grid-n-k", "50"]).grid is None
    asked = dk.parse(["--grid-damping", "0.3", "--grid-periods", "500", "--grid-burn-in", "90"])
    assert asked.grid == replace(converged, damping=0.3, periods=500, burn_in=90) and asked.config == dk.Config()
    assert asked.run == replace(dk.Run(), output_dir=".")


@pytest.mark.parametrize("argv, words", [
    (["--n-agents", "0"], "--n-agents 0: give a value in [1, 1e7]"),
    (["--n-agents", "1.5"], "--n-agents: invalid int value"),
    (["--n-agents", "9" * 30], "give a value in [1, 1e7]"),
    (["--n-agent", "9"], "unrecognized arguments: --n-agent"),  # no abbreviations: a typo is no other flag
    (["--beta", "nan"], "--beta nan"), (["--beta", "1"], "--beta 1.0: give a value in (0, 1)"),
    (["--gamma", "inf"], "--gamma inf"), (["--gamma", "0"], "[0.1, 20]"),
    (["--device", "tpu"], "--device: invalid choice"), (["--preset", "x"], "--preset: invalid choice"),
    (["--seed", "-1"], "--seed -1"), (["--beta"], "--beta: expected one argument"),
    (["--wat\nis"], "unrecognized"), (["--evaluate", "--resume"], "--evaluate"),
    (["--output-dir", "a\0b"], "--output-dir"), (["--u-bad", "0.5"], "--u-bad"),
    (["--u-duration-bad", "1000"], "--u-duration-bad"), (["--l-bar", "0.01"], "--mu"),
    (["--horizon", "9999"], "give --periods 10000 or more"),
    (["--grid-n-k", "9"], "--grid-n-k 9: give a value in [10, 1e5]"), (["--grid-n-K", "x"], "invalid int value"),
    (["--grid-n", "50"], "unrecognized arguments: --grid-n"), (["--grid-exponent", "nan"], "--grid-exponent nan"),
    (["--grid-K-low", "1"], "--grid-K-low 1.0: give a value in (0, 1)"), (["--grid", "fine"], "--grid: invalid choice"),
    (["--grid", "none", "--grid-damping", "1.1"], "--grid-damping 1.1"),
    (["--grid-burn-in", "99", "--grid-periods", "500"], "--grid-burn-in 99 leaves too little of --grid-periods 500")])
def test_impossible_values_are_refused_in_one_line(argv, words):
    assert words in refused(*argv)


def test_ends_of_intervals():
    horizon = dk.Config().horizon
    asked = dk.parse(["--gamma", "20", "--mu", "0", "--periods", f"{horizon + 1}", "--grid-n-K", "4"])
    assert asked.economy.gamma == 20 and asked.economy.income[0, 0] == 0
    assert asked.config.periods == horizon + 1 and asked.grid.n_K == 4


def test_device_cuda_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused("--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dk.parse(["--device", "cuda"])


FLAGS = [dk.flag(prefix + f.name) for prefix, kind in (
    ("", dk.Calibration), ("", dk.Config), ("grid_", dk.GridConfig), ("", dk.Run)) for f in fields(kind)]
VALUES = st.one_of(st.text(max_size=5), st.floats().map(repr), st.integers().map(str), st.sampled_from(
    ["cpu", "cuda", "none", "paper", "smoke", "sgd", "1e999", "-1", "0.9", "%s", "--", "@x", "7"]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FLAGS), VALUES), max_size=8))
def test_any_command_line_parses_or_is_refused(argv):
    try:
        asked = dk.parse(argv)
    except dk.UserError as error:
        assert "\n" not in str(error)
    except SystemExit as stop:  # --help and nothing else
        assert stop.code == 0 and "-h" in "".join(argv)
    else:
        assert asked.config.periods > asked.config.horizon
        assert all(math.isfinite(x) for x in asked.calibration.values())


def test_presets_are_possible_and_departures_are_listed():
    for cfg in dk.PRESETS.values():
        for grid in (dk.SMOKE_GRID, *dk.GRIDS.values()):
            dk.check(cfg, grid, dk.Run())
            assert all(type(getattr(x, f.name)) is type(f.default) for x in (cfg, grid) for f in fields(x))
    assert dk.departures(dk.Config(), dk.PRESETS["paper"])[0] == f"n_agents {dk.Config().n_agents} (paper 50)"
    assert dk.departures(dk.Config(), dk.Config()) == []


# ---- output directory and atomic writes


def test_output_directory_that_cannot_be_written_is_refused_and_untouched(tmp_path):
    (tmp_path / "file").write_text("mine")
    taken = tmp_path / "file"
    for bad in (taken, taken / "deep" / "er", tmp_path / ("x" * 300), Path("/proc/nowhere")):
        with pytest.raises(dk.UserError, match="--output-dir"):
            dk.prepare(bad)
    dk.prepare(tmp_path / "a" / "b")
    dk.prepare(tmp_path)
    assert tree(tmp_path) == {"file": b"mine"} and len(list(tmp_path.iterdir())) == 1


@contextlib.contextmanager
def full_disk(size):
    """The kernel refuses every byte of a file after size."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


INCOME = torch.tensor([[0.1, 1.0]], dtype=torch.float64)


def state(n=0, width=24):
    torch.manual_seed(n)
    net = torch.nn.Linear(5, width)
    return {"calibration": {"beta": 0.99}, "config": {"hidden": width}, "iteration": n, "optimizer": {},
            "economy": {"gamma": 1.0, "income": INCOME, "s_names": ("poor", "rich")},
            "policy": dict(net.state_dict()), "random": torch.get_rng_state(), "history": [[n, 0.5]] * n}


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    dk.save_checkpoint(path, state(1))
    before = tree(tmp_path)
    with full_disk(1000), pytest.raises(dk.UserError, match=r"--output-dir .*File too large"):
        dk.save_checkpoint(path, state(2))
    assert tree(tmp_path) == before and dk.load_checkpoint(path, state(), "--resume")["iteration"] == 1


def in_child(work, then):
    """work() in a forked process that runs without end; then(its id) stops it; its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as sys.stdout, contextlib.redirect_stderr(sys.stdout):
                os._exit(work())
        finally:  # whatever happens, the child must not go on as a second pytest
            os._exit(99)
    then(child)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_at_any_moment_the_checkpoint_is_whole(tmp_path, signum):
    path, big = tmp_path / "checkpoint.pt", state(1) | {"panel": torch.zeros(300_000)}
    dk.save_checkpoint(path, big)

    def save_for_ever(argv):
        while True:
            dk.save_checkpoint(path, big)

    def stop(child):
        inode = path.stat().st_ino
        while path.stat().st_ino == inode:  # until the child's first save
            time.sleep(0.001)
        time.sleep(random.random() / 20)
        os.kill(child, signum)

    for _ in range(8):
        status = in_child(lambda: dk.exit_status(save_for_ever, []), stop)
        assert os.waitstatus_to_exitcode(status) == (-9 if signum == signal.SIGKILL else 128 + signum)
        assert dk.load_checkpoint(path, big, "--resume")["iteration"] == 1
        dk.prepare(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_signal_that_python_dropped_ends_the_run_at_the_next_checkpoint(tmp_path, capsys):
    class Dropping:
        def __del__(self):  # what is raised in a destructor goes nowhere
            os.kill(os.getpid(), signal.SIGTERM)

    def work(argv):
        dropping = Dropping()
        del dropping
        dk.save_checkpoint(tmp_path / "checkpoint.pt", state(1))
        return 0

    hook, sys.unraisablehook = sys.unraisablehook, lambda info: None
    try:
        assert dk.exit_status(work, []) == 128 + signal.SIGTERM
    finally:
        sys.unraisablehook = hook
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert dk.load_checkpoint(tmp_path / "checkpoint.pt", state(1), "--resume")["iteration"] == 1


# ---- reading checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    dk.save_checkpoint(path, state(3))
    return path


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_checkpoint_comes_back_as_it_was(saved):
    assert same(dk.load_checkpoint(saved, state(), "--resume"), {"format": dk.FORMAT} | state(3))
    assert torch.load(saved, weights_only=True)["iteration"] == 3


CODE_HAS_RUN = Path(tempfile.gettempdir()) / f"deepham_code_has_run_{os.getpid()}"


class Code:
    def __reduce__(self):
        return os.system, (f"touch {CODE_HAS_RUN}",)


def other_economy(**changes):
    return dk.packed({"format": dk.FORMAT} | state(3) | {"economy": state()["economy"] | changes})


def without(key):
    return {k: v for k, v in ({"format": dk.FORMAT} | state(3)).items() if k != key}


FOREIGN = {
    "empty": (b"", "damaged"), "text": (b"hello", "damaged"), "list": (dk.packed([1]), "damaged"),
    "code": (dk.packed({"format": 1, "x": Code()}), "damaged"),
    "bare pickle": (pickle.dumps(without("")), "damaged"),
    "unsealed": (dk.packed(without(""))[:-32] + bytes(32), "damaged"),
    "sealed text": (dk.sealed(b"hello"), "damaged"),
    "no format": (dk.packed(without("format")), "no file of this script"),
    "newer": (dk.packed(without("") | {"format": 99}), "format 99, of a newer"),
    "older": (dk.packed(without("") | {"format": 0}), "format 0, of an older"),
    "missing": (dk.packed(without("policy")), "policy is missing"),
    "type": (dk.packed(without("") | {"iteration": "3"}), "iteration is str in the file and int"),
    "tensor": (dk.packed(without("") | {"random": 3}), "random is int in the file and torch.uint8"),
    "dict": (dk.packed(without("") | {"policy": 3}), "policy is int in the file and dict"),
    "width": (dk.packed(without("") | state(3, 32)), "config.hidden is 32 in the file and 24"),
    "shape": (dk.packed(without("") | {"policy": state(3, 32)["policy"]}), r"policy.weight is .*\(32, 5\)"),
    "double": (dk.packed(without("") | {"random": torch.get_rng_state().double()}), "is torch.float64"),
    "economy": (dk.packed(without("") | {"calibration": {"beta": 0.95}}),
                "calibration.beta is 0.95 in the file and 0.99"),
    "number of the economy": (other_economy(gamma=2.0), "economy.gamma is 2.0 in the file and 1.0"),
    "names of the economy": (other_economy(s_names=("poor", "lazy")), r"economy.s_names is \('poor', 'lazy'\) in the"),
    "table": (other_economy(income=INCOME * (1 + 1e-15)), "economy.income has other numbers in the file than in this"),
    "shape of a table": (other_economy(income=INCOME.T), r"economy.income is .*\(2, 1\) .* and .*\(1, 2\)"),
    "no table": (other_economy(income=None), "economy.income is None in the file and torch.float64"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_by_name_and_left_alone(tmp_path, kind):
    data, words = FOREIGN[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(dk.UserError, match=words) as error:
        dk.load_checkpoint(path, state(), "--evaluate")
    assert str(path) in str(error.value) and str(error.value).startswith("--evaluate: ")
    assert tree(tmp_path) == {"weights.pth": data} and not CODE_HAS_RUN.exists()


def test_absent_file_and_folder_are_refused(tmp_path):
    for path, words in ((tmp_path / "x.pth", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(dk.UserError, match=words + ".*run without --evaluate first"):
            dk.load_checkpoint(path, state(), "--evaluate")


def test_a_flipped_bit_anywhere_is_noticed(tmp_path, saved):
    good, path = saved.read_bytes(), tmp_path / "x.pt"
    for at in range(0, len(good), 5):
        data = bytearray(good)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(dk.UserError, match="damaged"):
            dk.load_checkpoint(path, state(), "--resume")


EDIT = st.tuples(st.sampled_from(["flip", "cut", "insert", "drop"]), st.floats(0, 1),
                 st.binary(min_size=1, max_size=9))


@settings(max_examples=500, deadline=None)
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_damaged_bytes_load_as_they_were_or_are_refused(edits):
    whole = {"format": dk.FORMAT} | state(3)
    data = bytearray(dk.packed(whole))
    for kind, where, noise in edits:
        at = int(where * len(data))
        if kind == "flip":
            data[at:at + len(noise)] = noise
        elif kind == "insert":
            data[at:at] = noise
        elif kind == "drop":
            del data[at:at + len(noise)]
        else:
            del data[at:]
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.pt"
        bad.write_bytes(data)
        try:
            assert same(dk.load_checkpoint(bad, state(), "--resume"), whole)
        except dk.UserError as error:
            assert "\n" not in str(error)


# ---- publishing

OLD = {"results.txt": b"old", "irf/a.csv": b"old", "irf/mine.txt": b"mine", "notes": b"mine"}
NEW = {"results.txt": b"new", "irf/a.csv": b"new", "irf/b.csv": b"new", "figures/c.png": b"new"}


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_results_are_published_together_and_nothing_is_left(tmp_path):
    fill(tmp_path / "out", OLD)
    with dk.staged(tmp_path / "out") as staging:
        fill(staging, NEW)
        assert OLD.items() <= tree(tmp_path / "out").items()
    assert tree(tmp_path) == {f"out/{name}": data for name, data in (OLD | NEW).items()}
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    with dk.staged(tmp_path / "fresh" / "dir") as staging:
        fill(staging, NEW)
    assert tree(tmp_path / "fresh" / "dir") == NEW


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bug"),
                                   dk.Interrupted(2), KeyboardInterrupt()])
def test_a_failure_while_staging_leaves_the_earlier_results(tmp_path, error):
    fill(tmp_path, OLD)
    told = dk.UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(told), dk.staged(tmp_path) as staging:
        fill(staging, NEW)
        raise error
    assert tree(tmp_path) == OLD and {p.name for p in tmp_path.iterdir()} == {"results.txt", "irf", "notes"}


@pytest.mark.parametrize("kind", ["error", "interrupt", "kill"])
def test_a_stop_at_any_move_loses_nothing(tmp_path, kind, monkeypatch):
    move = os.replace
    for nth in range(1, 8):  # staging itself, two files over earlier ones, two new ones: 7 moves
        out, moves = tmp_path / f"{nth}", []
        fill(out, OLD)

        def failing(source, target, moves=moves, nth=nth):
            moves.append(target)
            if len(moves) != nth:
                return move(source, target)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device") if kind == "error" else dk.Interrupted(2)

        def run(out=out):
            with dk.staged(out) as staging:
                fill(staging, NEW)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            if kind == "kill":
                assert in_child(run, lambda child: None) == signal.SIGKILL
            else:
                with pytest.raises(dk.UserError if kind == "error" else dk.Interrupted):
                    run()
                assert {k: v for k, v in tree(out).items() if not k.startswith(".")} == OLD
        dk.prepare(out)
        assert tree(out) == (OLD if nth == 1 else OLD | NEW)  # after the first move the new ones are safe
        assert not list(out.glob(".*"))


def test_a_users_folder_in_the_way_of_a_result_is_kept(tmp_path):
    fill(tmp_path, {"results.txt/mine": b"mine", "irf/a.csv": b"old"})
    with pytest.raises(dk.UserError, match=r"results\.txt"), dk.staged(tmp_path) as staging:
        fill(staging, NEW)
    left = {name: data for name, data in tree(tmp_path).items() if name[0] != "."}
    assert left == {"results.txt/mine": b"mine", "irf/a.csv": b"old"}


# ---- how a run ends


def ends(work, capsys, argv=()):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    status = dk.exit_status(work, list(argv))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == (status != 0)
    return status, captured.err


def test_user_error_is_one_line_and_status_2(capsys):
    assert ends(lambda argv: dk.parse(argv), capsys, ["--beta", "2"]) == (
        2, "deepham_ks: error: --beta 2.0: give a value in (0, 1)\n")
    assert ends(lambda argv: 0, capsys) == (0, "")
    with pytest.raises(ValueError, match="no-number"):  # a bug keeps its traceback
        dk.exit_status(lambda argv: int("no-number"), [])


@pytest.mark.parametrize("signum, iteration, given", [
    (signal.SIGINT, 4, []), (signal.SIGTERM, 0, []), (signal.SIGTERM, 0, ["--resume"]),  # resumes from an earlier one
])
def test_signal_says_how_to_go_on(capsys, signum, iteration, given):
    def work(argv):
        try:
            os.kill(os.getpid(), signum)
            time.sleep(60)
        except Exception:
            return 1
        except dk.Interrupted as stop:
            stop.iteration = iteration
            raise

    status, line = ends(work, capsys, [*given, "--output-dir", "my runs"])
    assert status == 128 + signum and f"stopped by {signum.name} after iteration {iteration}; " in line
    assert ("python deepham_ks.py --resume --output-dir 'my runs'\n" in line) == bool(iteration or given)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), lambda: torch.empty(10**13), lambda: np.empty(10**14),
    lambda: torch.empty(10**9, 10**9, 10**9), lambda: np.empty((10**9, 10**9, 10**9))])
def test_out_of_memory_is_one_line_with_the_flags_to_lower(capsys, error):
    def work(argv):
        if callable(error):
            error()
        raise error

    status, line = ends(work, capsys)
    assert status == 2 and "--n-agents" in line
