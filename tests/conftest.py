"""Fixtures that several files share; what takes seconds is done once a session.

DEEPHAM_ROOT names another folder with a deepham_ks.py: how the tests are tried on a broken copy.
"""

import contextlib
import copy
import fcntl
import functools
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest -n 2 has a worker on each core

import numpy as np
import pytest
import torch

ROOT = Path(os.environ.get("DEEPHAM_ROOT", Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT))

import deepham_ks as dk  # noqa: E402

torch.set_num_threads(1)  # small tensors: threads would only wait for each other


def remembered(function, key):
    """function, whose result for a key is worked out once; a copy of it each time."""
    found = {}

    @functools.wraps(function)
    def remembering(*args):
        of = key(*args)
        if of not in found:
            if len(found) == 50:
                del found[next(iter(found))]
            found[of] = function(*args), [x.bit_generator.state for x in args if isinstance(x, np.random.Generator)]
        x, states = found[of]
        for generator, state in zip((x for x in args if isinstance(x, np.random.Generator)), states):
            generator.bit_generator.state = state  # as if it had drawn
        return x.copy()

    return remembering


# A tenth of a second for every economy that is made, and the tests make a thousand of a few kinds.
dk.draw_z_path = remembered(dk.draw_z_path, lambda periods, P_z, rng: (
    periods, P_z.tobytes(), str(rng.bit_generator.state)))
dk.share_path = remembered(dk.share_path, lambda a, z_path, p: (a.Pi.tobytes(), z_path.tobytes(), p.tobytes()))


def toy():
    """S = 3, Z = 3: unequal discount factors, a borrowing limit below zero, and states that cannot follow each other:
    z' = 2 after z = 0, s' = 2 after s = 0, s' = 0 after s = 2, s' = 0 after s = 1 as z rises and s' = 2 after s = 1 as
    it falls. Pi depends on z and z', and the shares of s on z alone."""
    shares = np.array([[0.3, 0.5, 0.2], [0.25, 0.5, 0.25], [0.2, 0.5, 0.3]])  # (z, s)
    Pi = np.empty((3, 3, 3, 3))
    for z, z_next in np.ndindex(3, 3):
        poorer, richer = shares[z, 0] - shares[z_next, 0], shares[z_next, 2] - shares[z, 2]  # what has to move
        churn = 0.05 - 0.01 * z if z == z_next else 0.0
        flow = np.zeros((3, 3))  # (s, s') of all households
        flow[0, 1], flow[1, 0] = churn + max(poorer, 0), churn + max(-poorer, 0)
        flow[1, 2], flow[2, 1] = 0.9 * churn + max(richer, 0), 0.9 * churn + max(-richer, 0)
        Pi[z, z_next] = (flow + np.diag(shares[z] - flow.sum(1))) / shares[z][:, None]
    return dk.Economy(
        alpha=0.33, delta=0.08, gamma=3.0, k_min=-0.5, TFP=[0.97, 1.0, 1.03], beta=[0.92, 0.94, 0.955],
        P_z=[[0.75, 0.25, 0.0], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]], Pi=Pi,
        income=[[0.35, 0.9, 1.6], [0.4, 1.0, 1.7], [0.5, 1.1, 1.75]], weight=[2.0, 1.0, 1.5],
        s_names=("low", "middle", "high"))


def one_z():
    """Z = 1, S = 3: no aggregate shocks, no way from either end to the other."""
    return dk.Economy(alpha=0.36, delta=0.08, gamma=0.7, beta=0.94, TFP=[1.1], P_z=[[1.0]], income=[0.5, 1.0, 2.5],
                      Pi=[[0.8, 0.2, 0.0], [0.1, 0.85, 0.05], [0.0, 0.2, 0.8]], sees_s=[[-1.0], [0.0], [1.0]])


def example(name):
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flows():
    """The economy of examples/labour_flows.py: its labour depends on the history of z."""
    module = example("labour_flows")
    return module.economy(module.Calibration())


ECONOMIES = {"log": lambda: dk.krusell_smith(), "gamma2": lambda: dk.krusell_smith(dk.Calibration(gamma=2.0)),
             "toy": toy, "one_z": one_z}


@pytest.fixture(scope="session")
def economies():
    """Every economy by its name: Krusell & Smith's with log utility and gamma = 2, the toy one, one without z."""
    return {name: make() for name, make in ECONOMIES.items()}


@pytest.fixture(scope="session", params=ECONOMIES)
def economy(request, economies):
    """One economy after the other."""
    return economies[request.param]


@pytest.fixture(scope="session")
def tables(economy):
    """Its tables, float64."""
    return economy.tables()


@pytest.fixture(scope="session")
def econ():
    """The tables of the default economy, float64."""
    return dk.krusell_smith().tables()


SMALL = dk.GridConfig(n_k=60, n_K=6, n_fine=150, n_K_fine=9, periods=5000, tolerance=1e-4)


@pytest.fixture(scope="session")
def folder_of_all(pytestconfig, tmp_path_factory):
    """A temporary folder that the workers of pytest -n have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(pytestconfig, "workerinput") else folder


@pytest.fixture(scope="session")
def shared(folder_of_all):
    """shared(name, make): what make() gives; one worker makes it and the others read it."""
    def read(name, make):
        with open(folder_of_all / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = folder_of_all / f"{name}.pickle"
            if not kept.exists():
                kept.write_bytes(pickle.dumps(make()))
            return pickle.loads(kept.read_bytes())

    return read


@pytest.fixture(scope="session")
def small_grids(economies, shared):
    """name -> the economy's solution on few nodes, found once."""
    return functools.cache(lambda name: shared(f"small-{name}", lambda: dk.solve_grid(economies[name], SMALL)))


@pytest.fixture(scope="session")
def smoke_grid(shared):
    """The grid solution of the preset smoke."""
    return shared("smoke-grid", lambda: dk.solve_grid(config=dk.SMOKE_GRID))


def ahead_of(K_next, Z, n_m=0):
    """What is expected of an economy of which nothing but K' (...) matters."""
    nothing = K_next.new_zeros(*K_next.shape, Z, n_m)
    return dk.Ahead(K_next, nothing, K_next.new_zeros(*K_next.shape, Z), nothing[..., :0])


def axes_of(grid):
    """The nodes of a grid's policy table."""
    return dk.Axes(grid.k.numpy(), grid.K.numpy(), grid.L.numpy())


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def deepham():
    """The real command line on the CPU: deepham(*flags, cwd) -> CompletedProcess."""

    def call(*flags, cwd):
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-B", str(ROOT / "deepham_ks.py"), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture(scope="session")
def smoke_run(deepham, folder_of_all, shared):
    """(output directory, finished process) of one smoke run."""
    folder = folder_of_all / "smoke"
    folder.mkdir(exist_ok=True)
    return folder / "run", shared("smoke-run", lambda: deepham("--preset", "smoke", "--output-dir", "run", cwd=folder))


SMOKE = ["--preset", "smoke", "--device", "cpu", "--compile", "none"]


def main(folder, *flags):
    """Exit status, stdout, stderr of a smoke run without a grid; a traceback is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = dk.main([*SMOKE, "--grid", "none", "--output-dir", str(folder), *map(str, flags)])
    return status, out.getvalue(), err.getvalue()


CANNED = {}


PICTURES = ["distribution_validation.png", *(f"figures/{name}.png" for name in (
    "bellman_errors", "capital_path", "consumption_functions", "euler_errors", "impulse_responses", "lorenz_curves",
    "policy_functions", "training_history"))]


def noise_for_pictures(patch):
    """Every picture is 100 kB of noise; what is patched into Figure.savefig after this is called once for each."""
    import matplotlib.figure

    def draw(folder, *_):
        (folder / "figures").mkdir()
        for name in PICTURES:
            matplotlib.figure.Figure().savefig(folder / name)

    patch.setattr(dk, "draw_pictures", draw, raising=False)
    patch.setattr(matplotlib.figure.Figure, "savefig",
                  lambda self, path, **_: Path(path).write_bytes(os.urandom(10**5)))


def make_quick(patch):
    """The first judging of a session's default economy stands for all, V is fitted in two rounds, and pictures are
    noise: for tests of files and endings. Should a function get another name, they only take longer."""

    judge = getattr(dk, "compare", None)

    def canned(*args):
        given = [x for of in args for x in (of.values() if isinstance(of, dict) else [of])]
        network, kinds = next(x for x in given if isinstance(x, dk.Solution)), tuple(type(x).__name__ for x in given)
        if network.economy.gamma != 1 or len(network.econ.beta) != 2:
            return judge(*args)
        if kinds not in CANNED:
            CANNED[kinds] = judge(*args)
        figures, arrays = copy.deepcopy(CANNED[kinds])
        figures["network"]["limit"]["capital"]["mean"] = network.K_mean  # pictures are drawn there
        return figures, arrays

    patch.setattr(dk, "compare", canned, raising=False)
    patch.setattr(dk, "VALUE_ROUNDS", 2, raising=False)
    noise_for_pictures(patch)


@pytest.fixture(scope="module")
def rough_V():
    """V, which moves no policy, is fitted in two rounds: for files that ask nothing of its errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "VALUE_ROUNDS", 2, raising=False)
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    noise_for_pictures(monkeypatch)


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run that has finished, for tests that copy from it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        assert main(folder)[0] == 0
    return folder
