"""Fixtures that several files share; what takes seconds is done once a session.

DEEPHAM_ROOT names another folder with a deepham_ks.py: how the tests are tried on a broken copy.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(os.environ.get("DEEPHAM_ROOT", Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(ROOT))

import deepham_ks as dk  # noqa: E402

torch.set_num_threads(1)  # small tensors: threads would only wait for each other


@pytest.fixture(scope="session")
def econ():
    """The default calibration, float64."""
    return dk.build_economy(dk.Calibration(), dtype=torch.float64)


@pytest.fixture(scope="session")
def converged():
    """The default grid solution."""
    return dk.solve_grid()


@pytest.fixture(scope="session")
def smoke_grid():
    """The grid solution of the preset smoke."""
    return dk.solve_grid(config=dk.SMOKE_GRID)


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
def smoke_run(deepham, tmp_path_factory):
    """(output directory, finished process) of one smoke run."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder / "run", deepham("--preset", "smoke", "--output-dir", "run", cwd=folder)
