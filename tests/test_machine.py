"""Other releases of torch and other systems: no compiler, no private name, a graph that is not captured, Windows."""

import contextlib
import os
import signal
import subprocess
import sys
import types
import warnings

import pytest
import test_gpu
import torch
from conftest import ROOT, main

import deepham_ks as dk


@pytest.fixture(scope="module")
def eager(rough_V):
    """The weights of a smoke run that compiles nothing."""
    return dk.solve(None, "smoke", device="cpu", compile="none").weights


def same(ours, theirs):
    """Bit for bit the same networks."""
    return all(torch.equal(ours[network][name], x) for network in ("policy", "value")
               for name, x in theirs[network].items())


# ------------------------------------------------------------------------------------------------ TorchScript


def gone(patch):
    patch.delattr(torch, "jit")


def raises(patch, *error):
    def refuses(function):
        raise RuntimeError(*error)

    patch.setattr(torch.jit, "script", refuses)


@pytest.mark.parametrize("broken, reason", [
    (gone, "module 'torch' has no attribute 'jit'"), (raises, "RuntimeError"),
    (lambda patch: raises(patch, "\nnot on this Python\nand a second line"), "not on this Python")])
def test_without_a_compiler_a_run_goes_on_eagerly_and_one_line_says_so(monkeypatch, capsys, eager, broken, reason):
    broken(monkeypatch)
    assert same(dk.solve(None, "smoke", device="cpu").weights, eager)
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if "TorchScript" in line]
    assert line == f"TorchScript does not compile here ({reason}): running eagerly"
    assert "Warning" not in out + err


def test_where_it_compiles_no_warning_reaches_the_user(monkeypatch, capsys):
    """Of whatever class: torch has changed it once."""
    compiles = torch.jit.script

    def warns(*given, **more):
        warnings.warn("torch.jit.script goes", FutureWarning, stacklevel=2)
        return compiles(*given, **more)

    monkeypatch.setattr(torch.jit, "script", warns)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        dk.compile_kernels("torchscript")
    assert not heard and capsys.readouterr() == ("", "")
    assert all(isinstance(getattr(dk.fast, name), torch.jit.ScriptFunction) for name in dk.KERNELS)
    dk.compile_kernels("none")


def test_no_private_name_of_torch_is_needed(monkeypatch, eager):
    """Neither by a run nor by what only CUDA asks for."""
    monkeypatch.delattr(torch._C, "_jit_set_texpr_fuser_enabled", raising=False)
    monkeypatch.delattr(torch, "_standard_gamma", raising=False)
    assert same(dk.solve(None, "smoke", device="cpu", compile="none").weights, eager)
    one, other = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (one,))
    assert dk.generator("cuda", 5) is one
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other.manual_seed(5)))


# ------------------------------------------------------------------------------------------------ no CUDA graph


def test_where_no_graph_is_captured_one_line_says_how_to_go_on_without(tmp_path, monkeypatch, eager):
    """From the checkpoint, bit for bit."""
    @contextlib.contextmanager
    def failing(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        nothing = types.SimpleNamespace(wait_stream=lambda other: None)
        for name in ("Stream", "current_stream", "CUDAGraph"):
            patch.setattr(torch.cuda, name, lambda: nothing)
        patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        patch.setattr(torch.cuda, "graph", failing)
        start = dk.Guard.__init__
        patch.setattr(dk.Guard, "__init__", lambda guard, *given: start(guard, *given[:4], True, given[5]))
        status, out, err = main(tmp_path)
    assert status == 2 and out.count("\niteration ") + out.startswith("iteration ") == 1
    assert err == ("deepham_ks: error: this torch cannot capture an iteration as a CUDA graph (operation not permitted "
                   "when stream is capturing): go on with --resume --no-cuda-graphs\n")
    monkeypatch.setattr(dk, "compare", lambda *given: sys.exit(0))  # weights are on disk
    with pytest.raises(SystemExit):
        main(tmp_path, "--resume", "--no-cuda-graphs")
    assert same(torch.load(tmp_path / dk.WEIGHTS, weights_only=True), eager)


# ------------------------------------------------------------------------------------------------ the lock


@pytest.mark.parametrize("why", ["disk I/O error", "unable to open database file", "a folder"])
def test_a_folder_in_which_nothing_can_be_locked_is_not_called_busy(monkeypatch, tmp_path, why):
    def connect(*given, **more):
        raise dk.sqlite3.OperationalError(why)

    if why == "a folder":  # where the lock would lie
        (tmp_path / dk.LOCK).mkdir()
    else:
        monkeypatch.setattr(dk, "sqlite3", types.SimpleNamespace(connect=connect, Error=dk.sqlite3.Error,
                                                                 OperationalError=dk.sqlite3.OperationalError))
    status, _, err = main(tmp_path)
    assert status == 2 and "at work there" not in err and "see to space and permissions" in err
    assert err.count("\n") == 1 and ("database file" if why == "a folder" else why) in err


@pytest.mark.parametrize("left", [".deepham-lock", dk.LOCK])
def test_a_lock_that_a_killed_run_left_holds_nothing(tmp_path, left):
    """One of this version is empty; before 3.2.0 it said which process was at work."""
    (tmp_path / left).write_text("process 1 on a machine\n" if left == ".deepham-lock" else "")
    with dk.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ Windows


@pytest.fixture
def windows(monkeypatch):
    """os.name as Windows has it, in the script alone."""
    monkeypatch.setattr(dk, "os", types.SimpleNamespace(**vars(os) | {"name": "nt"}))
    return monkeypatch


@pytest.mark.parametrize("times, kept", [(2, "new"), (9, "old")])
def test_on_windows_a_file_that_a_reader_holds_is_waited_for(windows, tmp_path, times, kept):
    """For a moment; where it stays held the earlier one stays whole."""
    path, refusals = tmp_path / dk.CHECKPOINT, [PermissionError(13, "Access is denied")] * times

    def replace(source, target):
        if refusals:
            raise refusals.pop()
        os.replace(source, target)

    dk.save_checkpoint(path, {"is": "old"})
    windows.setattr(dk.os, "replace", replace)
    with contextlib.nullcontext() if kept == "new" else pytest.raises(OSError, match="Access is denied"):
        dk.save_checkpoint(path, {"is": "new"})
    assert torch.load(path, weights_only=True)["is"] == kept and [x.name for x in tmp_path.iterdir()] == [path.name]


def test_on_windows_commands_are_quoted_for_its_shell(windows):
    windows.setattr(dk.Interrupted, "script", r"C:\my runs\mine.py")
    windows.setattr(dk.Interrupted, "argv", ["--gamma", "2"])
    assert dk.again("--resume") == r'python "C:\my runs\mine.py" --resume --gamma 2'


def test_a_signal_handler_that_is_not_python_s_breaks_no_run(monkeypatch):
    set_handler, given = signal.signal, []
    monkeypatch.setattr(signal, "signal", lambda signum, handler: given.append(handler))  # None: not Python's
    with contextlib.suppress(StopIteration), dk.signals_heard():
        raise StopIteration
    assert given[2:] == [signal.SIG_DFL, signal.SIG_DFL]
    monkeypatch.setattr(signal, "signal", set_handler)


@pytest.mark.parametrize("change", ["", "learnt_moments=1"])
def test_what_the_tests_on_a_gpu_start_from_runs_on_the_cpu(change):
    """They are skipped where there is none, and would not be missed."""
    lines = test_gpu.BEFORE.replace('"cuda"', '"cpu"') + f"""
seen = []
small = dataclasses.replace(dk.sized(dk.Config({change}), economy), n_economies=2, batch=64)
start(lambda state, rng, iteration: seen.append(state.iteration), small)
assert seen == [1] and cfg.n_economies == 24
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
