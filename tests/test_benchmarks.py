"""benchmarks/: what each file asks of the script exists, each says its command, and pictures are drawn from what is
committed. None is run at its full size."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import deepham_ks as dk

FILES = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture
def module(monkeypatch):
    """Names of a file of benchmarks/, which may put what it likes on the path."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    return lambda name: runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_says_its_command_and_is_one_of_all(file):
    text = file.read_text(encoding="utf-8")
    assert f"python benchmarks/{file.name}" in text.split('"""')[1]
    assert f"python benchmarks/{file.name}" in (ROOT / "benchmarks" / "all.sh").read_text(encoding="utf-8")
    assert not {name for name in re.findall(r"\bdk\.([A-Za-z_]\w*)", text) if not hasattr(dk, name)}


def test_each_mechanism_of_the_ablation_can_be_switched_off(module):
    ablation = module("ablation")
    whole = ablation["script_without"]("nothing off")
    for name, (_, flags, change) in ablation["OFF"].items():
        text = ablation["script_without"](name)
        compile(text, name, "exec")
        assert (text != whole) == (change is not None) and dk.parse(flags)
    runs = {f"robust weights, seed {seed}": {"w1": w1, "std_gap": 0.01, "euler": {"mean": -5, "p99": -4, "max": -3},
                                             "bellman": 1e-5, "converged": True, "fails": []}
            for seed, w1 in ((0, 0.5), (1, 0.25))}
    row = ablation["table"](runs).splitlines()[-1].split(" | ")
    assert row[:4] == ["| robust weights", "`robust` gives ones", "2", "0.250 to 0.500"]


def test_pictures_of_benchmarks_are_drawn(module, tmp_path):
    module("planner")["draw"](tmp_path / "planner.png")
    found = json.loads((ROOT / "benchmarks" / "labour_flows.json").read_text())
    module("labour_flows")["draw"](found, tmp_path / "labour_flows.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1e4 for name in ("planner", "labour_flows"))


def test_all_says_what_it_would_run():
    done = subprocess.run(["bash", "benchmarks/all.sh", "--list"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0 and not done.stderr
    first, *steps = done.stdout.splitlines()
    assert first.startswith(f"{len(steps)} steps") and all(re.search(r"  ([\d,]+ s|not measured) ", x) for x in steps)
    assert sum(" deepham_ks.py --seed " in x for x in steps) == 9 and any("--gamma 2" in x for x in steps)


def test_an_iteration_has_at_most_11_000_operations(module, monkeypatch):
    """A GPU launches each by itself."""
    monkeypatch.setattr(dk, "AT_ONCE", dict(dk.AT_ONCE))
    found = module("operations")["of_an_iteration"]()
    assert 5_000 < found["all"] <= 11_000, found
