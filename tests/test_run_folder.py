"""Flags, the folder of a run, its lock, checkpoint files, publishing: what a user meets before and after the method."""

import contextlib
import dataclasses
import io
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMOKE, main
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nothing_lost import (
    Code,
    after_checkpoint,
    checkpoint,
    command_line,
    ended,
    forked,
    one_line,
    same,
    send,
    tree,
    until,
)

import deepham_ks as dk


def refused(*argv, **economy):
    with pytest.raises(dk.UserError) as error:
        dk.parse(list(argv), **economy)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- flags


def options(kind):
    return [item for item in fields(kind) if item.metadata]


def test_preset_decides_defaults_and_flags_override_it():
    """A flag changes its field and nothing else; presets keep theirs."""
    asked = dk.parse(["--preset", "paper", "--hidden", "7", "--beta", "0.98", "--no-cuda-graphs"])
    assert asked.config == replace(dk.PRESETS["paper"], hidden=7) and not asked.run.cuda_graphs
    assert (asked.economy.arrays.beta == 0.98).all() and asked.calibration["beta"] == 0.98
    asked = dk.parse([])
    assert asked[2:] == (dk.PRESETS["default"], dk.GRIDS["converged"], dk.Run(output_dir="."))
    assert asked.calibration == dataclasses.asdict(dk.Calibration()) and dk.PRESETS["default"] == dk.Config()
    assert dk.parse(["--k-min", "-2"]).economy.k_min == -2
    paper = dk.PRESETS["paper"]
    assert set(dk.PRESETS) == {"default", "paper", "smoke"} and dk.parse(["--output-dir", "x"]).run.output_dir == "x"
    assert (paper.n_agents, paper.hidden, paper.horizon, paper.optimizer) == (50, 24, 150, "adam")


def test_grid_flags_change_the_grid_and_nothing_else():
    converged, published = dk.GRIDS["converged"], dk.GRIDS["published"]
    assert dk.parse(["--grid-n-k", "50", "--grid-n-K", "7"]).grid == replace(converged, n_k=50, n_K=7)
    assert dk.parse(["--grid", "published", "--grid-n-k", "60"]).grid == replace(published, n_k=60)
    assert dk.parse(["--preset", "smoke", "--grid-periods", "9000"]).grid == replace(dk.SMOKE_GRID, periods=9000)
    assert dk.parse(["--preset", "smoke", "--grid", "published"]).grid == published
    assert dk.parse(["--grid", "none"]).grid is None
    asked = dk.parse(["--grid-damping", "0.3", "--grid-periods", "2000"])
    assert asked.grid == replace(converged, damping=0.3, periods=2000) and asked.config == dk.Config()


@dataclass(frozen=True)
class Household:
    """A calibration of our own."""

    beta: float = dk.option(0.96, "7% of households, most of the error", "(0, 1)")


def one_state(cal):
    return dk.Economy(alpha=0.36, delta=0.1, beta=cal.beta, TFP=[1.0], P_z=[[1.0]], income=[1.0], Pi=[[1.0]])


def test_help_names_every_flag_default_reason_and_the_exit_statuses(capsys):
    def said(*economy):
        with pytest.raises(SystemExit) as stop:
            dk.main(["--help"], *economy)
        assert stop.value.code == 0
        return "".join(capsys.readouterr().out.split())  # lines wrap anywhere

    text = said()
    for kind in (dk.Calibration, dk.Config, dk.GridConfig, dk.Run):
        for item in options(kind):
            prefix = "--grid-" if kind is dk.GridConfig else "--"
            assert prefix + item.name.replace("_", "-") in text
            shown = f"{item.metadata['help']} (default {item.default!r}"
            assert "".join(shown.split()) in text and len(item.metadata["help"]) > 10, item.name
    assert "paper50,smoke20)" in text
    assert "exitstatus:0converged" in text and "1notconverged" in text and "130/143interrupted" in text
    text = said(one_state, Household)  # a per cent sign too, which argparse would format with
    assert "7%ofhouseholds,mostoftheerror(default0.96)" in text and "--gamma" not in text


def test_flags_are_those_of_the_economy():
    """A calibration of one's own makes its economy; an economy without one has no such flags."""
    asked = dk.parse(["--beta", "0.9", "--hidden", "7"], one_state, Household)
    assert asked.economy.beta == 0.9 and asked.calibration == {"beta": 0.9} and asked.config.hidden == 7
    economy = one_state(Household())
    asked = dk.parse(["--hidden", "7"], economy)
    assert asked.economy is economy and asked.calibration == {} and asked.config.hidden == 7
    assert "unrecognized arguments: --beta" in refused("--beta", "0.9", economy=economy)
    assert "--beta 2.0: give a value in (0, 1)" in refused("--beta", "2", economy=one_state, calibration=Household)


@pytest.mark.parametrize("argv, words", [
    (["--n-agents", "-1"], "--n-agents -1: give a value in [0, 1e7]"), (["--n-agents"], "expected one argument"),
    (["--n-agents", "1.5"], "--n-agents: invalid int value"), (["extra"], "unrecognized arguments: extra"),
    (["--n-agents", "9" * 30], "give a value in [0, 1e7]"),
    (["--n-agent", "9"], "unrecognized arguments: --n-agent"),  # no abbreviations: a typo is no other flag
    (["--beta", "nan"], "--beta nan"), (["--beta", "1"], "--beta 1.0: give a value in (0, 1)"),
    (["--gamma", "inf"], "--gamma inf"), (["--gamma", "0"], "[0.1, 20]"), (["--alpha", "-0.3"], "--alpha"),
    (["--alpha", "0.99"], "alpha"), (["--delta", "x"], "--delta"), (["--k-min", "inf"], "--k-min inf"),
    (["--device", "tpu"], "--device: invalid choice"), (["--preset", "x"], "--preset: invalid choice"),
    (["--optimizer", "sgd"], "--optimizer: invalid choice"), (["--compile", "jit"], "--compile: invalid choice"),
    (["--seed", "-1"], "--seed -1"),
    (["--wat\nis"], "unrecognized"), (["--evaluate", "--resume"], "--evaluate"),
    (["--output-dir", "a\0b"], "--output-dir"), (["--u-bad", "0.5"], "--u-bad"),
    (["--u-duration-bad", "1000"], "--u-duration-bad"), (["--l-bar", "0.01"], "--mu"),
    (["--horizon", "9999", "--periods", "100"], "give --periods 10000 or more"),
    (["--policy-rate", "0"], "--policy-rate 0.0"),
    (["--grid-n-k", "9"], "--grid-n-k 9: give a value in [10, 1e5]"), (["--grid-n-K", "x"], "invalid int value"),
    (["--grid-n", "50"], "unrecognized arguments: --grid-n"), (["--grid", "fine"], "--grid: invalid choice"),
    (["--grid", "none", "--grid-damping", "1.1"], "--grid-damping 1.1"),
    (["--grid", "none", "--grid-n-k", "50"], "--grid-n-k: without effect"),
    (["--policy-steps", "3"], "--policy-steps: without effect"), (["--players", "9"], "--players: without effect"),
    (["--optimizer", "adam", "--settle", "0.1"], "--settle: without effect"),
    (["--value-networks", "2"], "unrecognized arguments: --value-networks"),  # of version 2
    (["--n-agents", "9", "--eval-every", "3"], "unrecognized arguments: --eval-every")],
    ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else "")
def test_impossible_values_are_refused_in_one_line(argv, words):
    assert words in refused(*argv)


def test_ends_of_intervals():
    horizon = dk.sized(dk.Config(), dk.krusell_smith()).horizon
    asked = dk.parse(["--gamma", "20", "--mu", "0", "--periods", f"{horizon + 1}", "--grid-n-K", "4"])
    assert asked.economy.gamma == 20 and asked.economy.arrays.income[0, 0] == 0
    assert asked.config.periods == horizon + 1 and asked.grid.n_K == 4


FLAGS = ["--" + prefix + f.name.replace("_", "-") for prefix, kind in (
    ("", dk.Calibration), ("", dk.Config), ("grid-", dk.GridConfig), ("", dk.Run)) for f in options(kind)]
VALUES = st.one_of(st.text(max_size=5), st.floats().map(repr), st.integers().map(str), st.sampled_from(
    ["cpu", "cuda", "none", "paper", "smoke", "sgd", "1e999", "-1", "0.9", "%s", "--", "@x", "7"]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FLAGS), VALUES), max_size=8))
def test_any_command_line_parses_or_is_refused(argv):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            asked = dk.parse(argv)
            sized = dk.sized(asked.config, asked.economy)
    except dk.UserError as error:
        assert "\n" not in str(error)
    except SystemExit as stop:  # --help and --version
        assert stop.code == 0 and "-h" in "".join(argv)
    else:
        assert sized.periods > sized.horizon > 1
        assert all(math.isfinite(x) for x in asked.calibration.values())


def test_device_cuda_without_cuda(tmp_path, monkeypatch):
    """Refused before there is a folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = main(tmp_path / "run", "--device", "cuda")
    assert status == 2 and "--device cpu" in one_line(err) and not list(tmp_path.iterdir())


def test_too_old_a_driver_is_named(monkeypatch, capsys):
    """A CUDA build of torch that finds no CUDA where there is an NVIDIA driver: not a word of a missing GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    cfg = replace(dk.PRESETS["smoke"], iterations=1)
    for chosen in (None, "0"):  # of a scheduler, say
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(dk.UserError, match="NVIDIA driver.*cu126.*--device cpu"):
            dk.solve(None, cfg, compile="none")
    assert "CUDA" not in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a user who hides the GPU wants the CPU
    dk.solve(None, cfg, compile="none")
    assert "no CUDA device found: running on the CPU" in capsys.readouterr().out


# ---- the folder


def test_only_the_default_run_goes_where_the_reference_run_lies(monkeypatch):
    """Any flag that changes what comes out names another folder, and another value yet another one."""
    for argv in ([], ["--device", "cpu"], ["--compile", "none"], ["--evaluate"], ["--gamma", "1"], ["--seed", "0"],
                 ["--preset", "default"], ["--resume"]):
        assert dk.parse(argv).run.output_dir == ".", argv
    others = [["--gamma", "2"], ["--gamma", "3"], ["--k-min", "-1"], ["--seed", "1"], ["--grid", "none"],
              ["--grid", "published"], ["--grid-n-k", "300"], ["--n-agents", "60"], ["--moments", "variance"],
              ["--equilibrium", "game"], ["--equilibrium", "game", "--players", "9"], ["--iterations", "10"],
              ["--preset", "paper"], ["--preset", "smoke"], ["--preset", "smoke", "--gamma", "2"],
              ["--eval-periods", "100"], ["--optimizer", "adam"],
              *[["--beta", "0.98", "--mu", "0.2", "--u-bad", "0.11", "--u-good", "0.05", "--l-bar", "1.2", "--delta",
                 "0.03", "--alpha", "0.35", "--eval-periods", "2900", "--irf-paths", n] for n in ("300", "301")]]
    folders = [dk.parse(argv).run.output_dir for argv in others]
    assert len(set(folders)) == len(folders), [x for x in folders if folders.count(x) > 1]
    assert all(folder.startswith("runs/") and ".." not in folder and folder.count("/") == 1 for folder in folders)
    monkeypatch.setattr(dk.Interrupted, "script", "examples/mine.py")
    assert dk.parse([], one_state, Household).run.output_dir == "runs/mine"
    assert dk.parse([], one_state(Household())).run.output_dir == "runs/mine"


def test_no_run_but_the_default_one_touches_the_checkout(tmp_path, monkeypatch, quick, finished):
    """A run with other flags, without --output-dir, in a folder that holds the reference run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert dk.main([*SMOKE, "--grid", "none", "--seed", "1", "--iterations", "1"]) == 0
    after = tree(tmp_path)
    assert before == {name: after[name] for name in before}
    new = {Path(name).parts[:2] for name in after if name not in before}
    assert len(new) == 1 and next(iter(new))[0] == "runs"


@pytest.mark.parametrize("where", ["file", "file/deep/er", "x" * 300, "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused_and_untouched(tmp_path, where):
    """Before any work."""
    (tmp_path / "file").write_text("mine")
    status, out, err = main(tmp_path / where)
    assert status == 2 and "--output-dir" in one_line(err) and "iteration" not in out
    assert tree(tmp_path) == {"file": b"mine"}


# ---- two runs in one folder


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(tmp_path, quick):
    """After its kill -9 the lock is nobody's."""
    child = forked(command_line(tmp_path, "--iterations", 10**5))
    try:
        until((tmp_path / dk.CHECKPOINT).exists, child)
        for flags in ([], ["--resume"], ["--evaluate"]):
            status, out, err = main(tmp_path, *flags)
            assert status == 2 and "another run is at work there" in one_line(err) and "--output-dir" in err
            assert "iteration" not in out
        reached = checkpoint(tmp_path)["iteration"]
        until(lambda: checkpoint(tmp_path)["iteration"] > reached, child)  # the first goes on
    finally:
        os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    reached = checkpoint(tmp_path)["iteration"]
    status, out, err = main(tmp_path, "--resume", "--iterations", reached + 1)
    assert (status, err) == (0, "") and f"iteration {reached + 1} " in out
    assert not list(tmp_path.glob(".deepham-*"))


@pytest.mark.parametrize("flags", [["--resume"], ["--moments", "skewness"], ["--gamma", "2", "--batch", "10000000",
                                   "--n-agents", "10000000", "--n-economies", "1000000"]])
def test_a_run_that_fails_leaves_no_lock(tmp_path, flags):
    assert main(tmp_path, *flags)[0] == 2 and not list(tmp_path.iterdir())


# ---- checkpoint files


def state(n=0, width=24):
    torch.manual_seed(n)
    net = torch.nn.Linear(5, width)
    return {"config": {"hidden": width}, "iteration": n, "adam": {}, "policy": dict(net.state_dict()),
            "economy": {"gamma": 1.0, "income": torch.tensor([[0.1, 1.0]]).double(), "s_names": ("poor", "rich")},
            "random": torch.get_rng_state(), "history": [[n, 0.5]] * n}


LIKE = {name: state()[name] for name in ("config", "economy")} | {"policy": {}}  # what must be the same in a file


@contextlib.contextmanager
def full_disk(size):
    """The kernel refuses every byte of a file after size."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    dk.save_checkpoint(path, state(1))
    before = tree(tmp_path)
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        dk.save_checkpoint(path, state(2))
    assert tree(tmp_path) == before and dk.load_checkpoint(path, LIKE, "--resume")["iteration"] == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_at_any_moment_the_checkpoint_is_whole(tmp_path, monkeypatch, signum):
    """In a run that does nothing but save."""
    save, path, big = dk.save_checkpoint, tmp_path / dk.CHECKPOINT, state(1) | {"panel": torch.zeros(300_000)}

    def for_ever(*_):
        while True:
            save(path, big)

    monkeypatch.setattr(dk, "save_checkpoint", for_ever)
    for _ in range(3):
        path.unlink(missing_ok=True)
        child = forked(command_line(tmp_path))
        until(path.exists, child)
        time.sleep(random.random() / 20)
        os.kill(child, signum)
        assert ended(child) == (-9 if signum == signal.SIGKILL else 128 + signum)
        assert dk.load_checkpoint(path, LIKE, "--resume")["iteration"] == 1


def sealed(content):
    """The bytes of a file of this script with any content."""
    with tempfile.TemporaryDirectory() as folder:
        dk.save_checkpoint(Path(folder) / "x", content)
        return (Path(folder) / "x").read_bytes()


def changed(**parts):
    return state(3) | parts


FOREIGN = {
    "empty": (b"", "damaged"), "text": (b"hello", "damaged"), "bare pickle": (pickle.dumps(state(3)), "damaged"),
    "unsealed": (sealed(state(3))[:-32] + bytes(32), "damaged"),
    "newer": (sealed(changed(format=99)), "format 99, of a newer"),
    "older": (sealed(changed(format=0)), "format 0, of an older"),
    "missing": (sealed({k: x for k, x in state(3).items() if k != "economy"}), "economy is None in the file"),
    "weights": (sealed(changed(policy=torch.zeros(3))), "policy is Tensor in the file and dict in this run"),
    "width": (sealed(state(3, 32)), "config.hidden is 32 in the file and 24"),
    "number": (sealed(changed(economy=state()["economy"] | {"gamma": 2.0})), "economy.gamma is 2.0 in the file and 1"),
    "names": (sealed(changed(economy=state()["economy"] | {"s_names": ("poor", "lazy")})), "economy.s_names is "),
    "table": (sealed(changed(economy=state()["economy"] | {"income": torch.tensor([[0.1, 1.0]]).double() + 1e-16})),
              "economy.income has other numbers in the file than in this"),
    "no table": (sealed(changed(economy=state()["economy"] | {"income": None})), "economy.income is None in the file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_by_name_and_left_alone(tmp_path, kind):
    data, words = FOREIGN[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(dk.UserError, match=words) as error:
        dk.load_checkpoint(path, LIKE, "--evaluate")
    assert str(path) in str(error.value) and str(error.value).startswith("--evaluate: ")
    assert tree(tmp_path) == {"weights.pth": data}


def test_code_in_a_file_does_not_run(tmp_path):
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    dk.save_checkpoint(path, changed(history=Code(ran)))
    with pytest.raises(dk.UserError, match="damaged or no file of this script"):
        dk.load_checkpoint(path, LIKE, "--resume")
    assert not ran.exists()


def test_absent_file_and_folder_are_refused(tmp_path):
    for path, words in ((tmp_path / "x.pth", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(dk.UserError, match=words):
            dk.load_checkpoint(path, LIKE, "--evaluate")
        with pytest.raises(dk.UserError, match=words):
            dk.load(path)


def test_a_flipped_bit_anywhere_is_noticed_and_a_whole_file_comes_back(tmp_path):
    path = tmp_path / "x.pt"
    dk.save_checkpoint(path, state(3))
    good = path.read_bytes()
    loaded = dk.load_checkpoint(path, LIKE, "--resume")
    assert isinstance(loaded.pop("format"), int) and same(loaded, state(3))
    for at in [*range(0, len(good), 97), *range(len(good) - 40, len(good))]:
        data = bytearray(good)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(dk.UserError, match="damaged"):
            dk.load_checkpoint(path, LIKE, "--resume")


# ---- publishing, by --evaluate, which trains nothing

MINE = {"irf/mine.txt": b"mine", "notes": b"mine"}


def earlier_run(finished, folder):
    """The finished run's weights, with marks as its results and files of a user's own beside them."""
    old = {name: data if name.endswith((".pt", ".pth")) else b"old" for name, data in tree(finished).items()} | MINE
    for name, data in old.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return old


def all_new(folder, old):
    """Every result has been replaced, and nothing else."""
    now = tree(folder)
    assert now.keys() == old.keys() and {name for name in old if now[name] == old[name]} == {
        *MINE, dk.WEIGHTS, dk.CHECKPOINT}
    assert not list(folder.glob(".*"))


def test_results_are_published_together_and_nothing_is_left(tmp_path, quick, finished):
    old, seen = earlier_run(finished, tmp_path), []
    quick.setattr(np, "savetxt", lambda path, *_, **__: (seen.append(tree(tmp_path)), Path(path).write_bytes(b"new")))
    assert main(tmp_path, "--evaluate")[0] == 0
    all_new(tmp_path, old)
    assert len(seen) > 10 and all(old.items() <= files.items() for files in seen)


@pytest.mark.parametrize("kind", ["error", "interrupt", "kill"])
def test_a_stop_at_any_move_loses_nothing(tmp_path, kind, quick, finished):
    """Of the moves that replace earlier results by new ones: all old, or after the next start all new."""
    move, moves = os.replace, []
    quick.setattr(os, "replace", lambda *a: (moves.append(a), move(*a)))
    earlier_run(finished, tmp_path / "count")
    assert main(tmp_path / "count", "--evaluate")[0] == 0
    total = len(moves)
    assert total > 20
    first = next(i for i, paths in enumerate(moves) if all(Path(x).name.startswith(".deepham-") for x in paths)) + 1
    for nth in {first, first + 1, first + 2, (first + total) // 2, total}:
        out, made = tmp_path / f"{nth}", []
        old = earlier_run(finished, out)

        def failing(source, target, made=made, nth=nth):
            made.append(target)
            if len(made) != nth:
                return move(source, target)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device") if kind == "error" else dk.Interrupted(signal.SIGINT)

        with quick.context() as patch:
            patch.setattr(os, "replace", failing)
            if kind == "kill":
                assert ended(forked(command_line(out, "--evaluate"))) == -signal.SIGKILL
            else:
                assert main(out, "--evaluate")[0] == (2 if kind == "error" else 130)
                assert {name: data for name, data in tree(out).items() if name[0] != "."} == old
        quick.setattr(os, "replace", move)
        status, _, _ = main(out, "--resume", "--hidden", 9)  # a start that is refused, after it has tidied up
        assert status == 2
        if nth == first:
            assert tree(out) == old and not list(out.glob(".*"))
        else:
            all_new(out, old)  # after the first move the new ones are safe


def test_a_users_folder_in_the_way_of_a_result_is_kept(tmp_path, quick, finished):
    old = earlier_run(finished, tmp_path)
    (tmp_path / "results.txt").unlink()
    (tmp_path / "results.txt").mkdir()
    (tmp_path / "results.txt" / "mine").write_bytes(b"mine")
    status, _, err = main(tmp_path, "--evaluate")
    assert status == 2 and "results.txt" in one_line(err)
    left = {name: data for name, data in tree(tmp_path).items() if name[0] != "."}
    assert left == {name: data for name, data in old.items() if name != "results.txt"} | {"results.txt/mine": b"mine"}


# ---- from notebooks, threads, beside other work


def limits():
    return {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}


def test_nothing_of_the_process_is_changed_by_a_run(tmp_path, quick):
    """No limit of memory, then or later; handlers of signals are what they were."""
    before, during = limits(), []
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    after_checkpoint(quick, 1, lambda: during.append(limits()))
    assert main(tmp_path)[0] == 0
    assert during == [before] and limits() == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_main_without_arguments_in_a_notebook_and_in_a_thread(tmp_path, monkeypatch, quick):
    """A kernel's own arguments are not the run's; off the main thread there are no signals to hear."""
    monkeypatch.setitem(dk.PRESETS, "default", dk.PRESETS["smoke"])
    monkeypatch.setitem(dk.GRIDS, "converged", dk.SMOKE_GRID)
    monkeypatch.setattr(dk, "solve_grid", lambda *_, **__: (_ for _ in ()).throw(dk.UserError("grid: no convergence")))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/root/kernel-1.json"])
    ended_with = []
    for name, kernel, argv in (("notebook", True, None), ("thread", False, [])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            if kernel:
                patch.setitem(sys.modules, "ipykernel", sys)
            thread = threading.Thread(target=lambda argv=argv: ended_with.append(dk.main(argv)))
            if name == "thread":
                thread.start()
                thread.join(60)
            else:
                ended_with.append(dk.main(argv))
        assert (tmp_path / name / "metrics.json").exists() and (tmp_path / name / dk.WEIGHTS).exists()
    assert ended_with == [1, 1]  # not converged


def test_solve_says_in_one_line_what_an_argument_should_be(tmp_path):
    """Never AttributeError."""
    economy = dk.krusell_smith()
    for number, call in enumerate((
                 lambda: dk.solve(economy, "huge"), lambda: dk.solve(economy, 3), lambda: dk.solve(3, "smoke"),
                 lambda: dk.solve(economy, "smoke", resume=True), lambda: dk.solve(economy, "smoke", device="tpu"),
                 lambda: dk.solve(economy, "smoke", compile="jit", device="cpu"),
                 lambda: dk.load(tmp_path / "x"), lambda: dk.load(str(tmp_path)),
                 lambda: dk.krusell_smith(dk.Calibration(alpha="0.36")))):
        try:
            call()
        except dk.UserError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError(f"call {number} was accepted")


def test_an_interrupted_run_of_one_s_own_script_says_how_to_go_on(tmp_path, monkeypatch, quick):
    """With its own name and folder, whatever blanks are in them."""
    monkeypatch.setattr(sys, "argv", ["my runs/mine.py"])
    monkeypatch.setattr(dk.Interrupted, "script", "deepham_ks.py")
    after_checkpoint(quick, 2, send(signal.SIGINT))
    err = io.StringIO()
    flags = [*SMOKE, "--grid", "none", "--output-dir", str(tmp_path / "my run")]
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert dk.main(flags, one_state, Household) == 130
    assert "; continue with: python 'my runs/mine.py' --resume --preset smoke " in one_line(err.getvalue())
    assert f"'{tmp_path}/my run'" in err.getvalue()
