"""The script as its users run it: files on disk, exit statuses and last lines, --evaluate, the examples, import."""

import csv
import dataclasses
import json
import math
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, main, make_quick, noise_for_pictures
from test_nothing_lost import one_line, tree

import deepham_ks as dk

SMOKE = dk.PRESETS["smoke"]
SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")
FILES = {"NN_weights_biases.pth", "checkpoint.pt", "metrics.json", "results.txt", "training.csv",
         "statistics.csv", "distribution_validation.png",
         *(f"irf/agg_{series}_{kind}.csv" for series in SERIES for kind in ("benchmark", "shocked")),
         *(f"figures/{name}.png" for name in (
             "bellman_errors", "capital_path", "consumption_functions", "euler_errors", "impulse_responses",
             "lorenz_curves", "policy_functions", "training_history"))}


def strict_json(path):
    """metrics.json as other programs read it: NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def leaves(found, name=""):
    """(path, value) of every leaf of nested dictionaries and lists."""
    if isinstance(found, dict | list):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, found


@pytest.fixture(scope="module")
def metrics(smoke_run):
    return strict_json(smoke_run[0] / "metrics.json")


# ---- results on disk


def test_smoke_run_succeeds(smoke_run):
    folder, process = smoke_run
    assert (process.returncode, process.stderr) == (0, "")
    out = process.stdout
    assert "no CUDA device found: running on the CPU" in out
    iterations = [line for line in out.splitlines() if line.startswith("iteration ")]
    assert len(iterations) == SMOKE.iterations and all(": K " in line for line in iterations)
    assert "sizes this small have no verdict" in out and "tolerance" not in out and "FAIL" not in out
    assert set(tree(folder)) == FILES and {path.name for path in folder.parent.iterdir()} == {"run"}


def test_results_txt(smoke_run, metrics):
    path, small = smoke_run[0] / "results.txt", metrics["network"]["small"]
    k = np.loadtxt(path)
    assert len(k) >= SMOKE.eval_agents * SMOKE.eval_economies and (np.diff(k) >= 0).all() and k[0] >= 0 < k.std()
    assert k.mean() == pytest.approx(small["capital"]["mean"], abs=1e-4)
    header = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for words in (f"N = {SMOKE.eval_agents}", f"{SMOKE.eval_economies} economies", "seed 0", "bellman",
                  f"{small['bellman_own_c']['mean']:.6f}"):
        assert words in header


@pytest.mark.parametrize("kind", ["benchmark", "shocked"])
def test_impulse_response_files(smoke_run, kind):
    bounds = {"capital": (5, 200), "output": (1, 10), "consumption": (0.5, 10), "interest_rate": (0.98, 1.1)}
    for series in SERIES:
        paths = np.loadtxt(smoke_run[0] / "irf" / f"agg_{series}_{kind}.csv", delimiter=",")
        assert paths.shape == (SMOKE.irf_paths, SMOKE.irf_periods) and np.isfinite(paths).all()
        if series == "shocks":
            assert np.isin(paths, (0, 1)).all() and (paths[:, 0] == (kind == "benchmark")).all()
        else:
            low, high = bounds[series]
            assert (paths > low).all() and (paths < high).all()
            assert (np.diff(paths, axis=1) != 0).mean() > 0.9 and (paths[:, -1] != paths[:, -2]).any()


def test_pictures(smoke_run):
    from matplotlib.image import imread

    for path in smoke_run[0].rglob("*.png"):
        image = imread(path)
        assert image.shape[0] > 300 and image.shape[1] > 600
        assert 0.001 < (image[..., :3].min(-1) < 0.9).mean() < 0.7, path  # ink, and paper


def test_weights_and_training_csv(smoke_run):
    """All that is needed to use the networks: what load() and torch.load() see of them."""
    weights = torch.load(smoke_run[0] / dk.WEIGHTS, weights_only=True)
    assert weights["config"] == dataclasses.asdict(SMOKE) and weights["seed"] == 0 and weights["format"] == dk.FORMAT
    for name in ("policy", "value"):
        assert list(weights[name]) == ["W1", "b1", "W2", "b2", "w3", "b3"]
        assert weights[name]["W2"].shape == (SMOKE.hidden, SMOKE.hidden)
    rows = list(csv.DictReader((smoke_run[0] / "training.csv").open()))
    assert tuple(rows[0]) == dk.HISTORY and len(rows) == SMOKE.iterations
    assert [float(row["mean_K"]) for row in rows] == pytest.approx(weights["history"]["mean_K"], rel=1e-5)
    solution = dk.load(smoke_run[0] / dk.WEIGHTS)
    k_next = solution.next_capital(np.array([0.0, 1.0, 40.0])[:, None, None], np.arange(2)[:, None], 38.0, np.arange(2))
    assert k_next.shape == (3, 2, 2) and (k_next >= 0).all() and np.ptp(k_next) > 1
    assert solution.K_mean == weights["K_mean"] and abs(solution.K_mean - weights["history"]["mean_K"][-1]) < 5


def test_output_md_names_every_file_column_and_key(smoke_run, metrics):
    """docs/output.md is what users read."""
    text = (ROOT / "docs" / "output.md").read_text()
    for name in [*dk.HISTORY, *torch.load(smoke_run[0] / dk.WEIGHTS, weights_only=True), *os.listdir(smoke_run[0])]:
        assert f"`{name}" in text or f"`irf/{name}" in text or name in ("irf", "figures", "format"), name


def test_metrics(metrics):
    assert {"network", "grid", "comparison", "verdict", "calibration", "economy", "config", "grid_config", "seed",
            "convergence", "device", "versions", "version", "seconds"} <= set(metrics)
    for solution in ("network", "grid"):
        for size, N in (("small", SMOKE.eval_agents), ("limit", None)):
            figures = metrics[solution][size]
            assert figures["n_agents"] == N and metrics["comparison"][size]["w1"] >= 0
            assert {"bellman_own_c", "bellman_best_c", "euler_log10", "law_of_motion"} <= set(figures)
            assert {"mean", "std", "quantiles", "gini", "top_percent_hold", "lorenz"} <= set(figures["capital"])
        assert -3 < metrics[solution]["limit"]["statistics"]["interest_rate_percent"] < 5
        assert 0 <= metrics[solution]["limit"]["moves"] < 1
    assert {"training", "grid", "accuracy"} <= set(metrics["seconds"]) and metrics["seconds"]["training"] > 0
    assert {"python", "torch", "numpy", "scipy", "matplotlib"} <= set(metrics["versions"])
    assert metrics["version"] == dk.__version__ and metrics["config"] == dataclasses.asdict(SMOKE)
    assert metrics["calibration"] == dataclasses.asdict(dk.Calibration()) and metrics["economy"]["alpha"] == 0.36
    grid = json.loads(json.dumps(dataclasses.asdict(dk.SMOKE_GRID)))
    assert metrics["grid_config"] == grid and len(list(leaves(metrics["network"]))) > 80
    nothing = {name for name, x in leaves({key: metrics[key] for key in ("network", "grid", "comparison")})
               if x is None and not name.endswith(".limit.n_agents")}
    assert not nothing


# ---- --evaluate


def flat(of, name=""):
    """Everything in nested dicts and lists by its path."""
    if isinstance(of, (dict, list)):
        items = of.items() if isinstance(of, dict) else enumerate(of)
        return {k: x for key, value in items for k, x in flat(value, f"{name} {key}").items()}
    return {name: of}


def test_evaluate_reproduces_the_run(smoke_run, metrics, no_pictures, capsys, tmp_path):
    """From the weights alone, in another folder and another process, this one: the same figures and bytes."""
    shutil.copy(smoke_run[0] / dk.WEIGHTS, tmp_path)
    assert dk.main(["--preset", "smoke", "--device", "cpu", "--evaluate", "--output-dir", str(tmp_path)]) == 0
    dk.compile_kernels("none")
    out, err = capsys.readouterr()
    assert err == "" and "\niteration " not in out
    again = strict_json(tmp_path / "metrics.json")
    changing = ("seconds", "peak_memory_gb")
    first, second = [flat({k: x for k, x in of.items() if k not in changing}) for of in (metrics, again)]
    assert first.keys() == second.keys()
    for name, x in first.items():  # a library may sum in another order beside another worker
        assert x == second[name] or math.isclose(x, second[name], rel_tol=1e-8, abs_tol=1e-12), (name, x, second[name])
    ours, theirs = tree(smoke_run[0]), tree(tmp_path)
    for name in FILES - {"metrics.json", dk.CHECKPOINT}:
        assert name.endswith(".png") or ours[name] == theirs[name], name


def test_panels_that_leave_what_is_known_are_named(smoke_run, no_pictures, tmp_path, monkeypatch):
    """Without a grid, too; the flag beside each takes more households."""
    shutil.copy(smoke_run[0] / dk.WEIGHTS, tmp_path)
    monkeypatch.setattr(dk, "OUTSIDE", 0.0)
    status, out, _ = main(tmp_path, "--evaluate")
    told = [line for line in out.splitlines() if "no solution is known" in line]
    assert status == 0
    assert [line.partition(":")[0] for line in told] == ["panel, N=20", "response, N=10"]
    assert told[0].endswith("--eval-agents takes more") and told[1].endswith("--irf-agents takes more")


def test_evaluate_records_what_the_weights_were_trained_with(tmp_path, quick):
    """Whatever flags and presets stand beside it; sizes of the judge are those of the flags."""
    trained = ("--n-agents", 30, "--seed", 5, "--policy-rate", 0.5, "--n-economies", 6)
    assert main(tmp_path, *trained)[0] == 0
    first = strict_json(tmp_path / "metrics.json")
    assert first["config"]["n_agents"] == 30 and first["seed"] == 5 and first["config"]["policy_rate"] == 0.5
    assert main(tmp_path, "--evaluate", "--eval-agents", 25, "--n-agents", 31, "--seed", 6)[0] == 0
    again = strict_json(tmp_path / "metrics.json")
    assert again["config"] == first["config"] | {"eval_agents": 25} and again["seed"] == 5
    assert again["economy"] == first["economy"] and again["calibration"] == first["calibration"]


@pytest.mark.parametrize("flags", [["--beta", "0.98"], ["--gamma", "2"], ["--mu", "0"], ["--k-min", "-1"],
                                   ["--hidden", "9"], ["--equilibrium", "game"]], ids=" ".join)
@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_files_of_another_economy(smoke_run, capsys, flag, flags):
    """Refused by the first thing that differs."""
    before = tree(smoke_run[0])
    status, _, err = main(smoke_run[0], flag, *flags)
    assert status == 2 and f"error: {flag}: {smoke_run[0]}" in one_line(err) and "is of another run: " in err
    assert tree(smoke_run[0]) == before


# ---- exit statuses and last lines, with the default preset at the sizes of smoke


def as_flags(config, usual, prefix="--"):
    return [word for item in dataclasses.fields(config) if item.metadata
            and getattr(config, item.name) != getattr(usual, item.name)
            for word in (prefix + item.name.replace("_", "-"), str(getattr(config, item.name)))]


SMALL = ["--device", "cpu", "--compile", "none", *as_flags(SMOKE, dk.Config())]
SMALL_GRID = as_flags(dk.SMOKE_GRID, dk.GridConfig(), "--grid-")
SETTLED = ["--settle", "0.9", "--iterations", "14", "--averaging", "0", "--policy-rate", "0.05"]


def last_line(capsys, status, *argv):
    assert dk.main([*SMALL, *map(str, argv)]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out.strip().splitlines()[-1]


def told(line, after):
    """The arguments of the command that a last line tells to run next."""
    words = shlex.split(line.split(after)[1])
    return words[next(i for i, word in enumerate(words) if word.startswith("--")) :]


def test_a_run_that_has_not_converged_ends_with_1_and_says_how_to_go_on(tmp_path, capsys, quick):
    """In training as in --evaluate; and what it tells goes on, in this economy."""
    flags = ["--grid", "none", "--output-dir", tmp_path / "my run", "--gamma", "2", "--eval-periods", "40"]
    line = last_line(capsys, 1, *flags)
    assert line.startswith("not converged: ") and "go on with: " in line
    assert last_line(capsys, 1, *flags, "--evaluate").startswith("not converged: ")
    assert dk.main(told(line, "go on with: ")) in (0, 1), capsys.readouterr().err
    assert "iteration 4 " in capsys.readouterr().out


def test_a_grid_that_does_not_converge_costs_the_comparison_only(tmp_path, capsys, quick):
    """Everything of the network is there; the last line says how to get the rest, and that command is understood."""
    flags = [*SMALL_GRID, "--grid-max-updates", "1", "--output-dir", tmp_path]
    line = last_line(capsys, 1, *flags)
    assert line.startswith("no comparison: grid: no convergence in 1 updates")
    assert set(tree(tmp_path)) == FILES
    found = strict_json(tmp_path / "metrics.json")
    assert "grid" not in found and [*found["comparison"]] == ["outside_K"] and found["network"]["limit"]["euler_log10"]
    assert all(row["passed"] is None for row in found["verdict"])
    argv = told(line, "then: ")
    assert "--evaluate" in argv
    quick.setattr(dk, "solve_grid", lambda *_, **__: (_ for _ in ()).throw(dk.UserError("grid: again")))
    assert dk.main(argv) == 1 and capsys.readouterr().err == ""


def test_a_smoke_run_whose_grid_does_not_converge_says_so(tmp_path, quick):
    """Sizes this small have no verdict, but a comparison that was asked for is missing."""
    status, out, _ = main(tmp_path, "--grid", "converged", "--grid-max-updates", 1)
    assert status == 1 and "no comparison: grid: no convergence" in out.strip().splitlines()[-1]


def test_rows_that_fail_and_rows_that_nobody_judges(tmp_path, capsys, monkeypatch, smoke_grid):
    """A settled network far from the grid: status 1 and the rows by name, in training as in --evaluate. Without a grid
    nothing passes or fails, and nothing is said to."""
    noise_for_pictures(monkeypatch)
    monkeypatch.setattr(dk, "VALUE_ROUNDS", 2)
    monkeypatch.setattr(dk, "solve_grid", lambda *_, **__: smoke_grid)
    flags = [*SETTLED, "--output-dir", tmp_path]
    line = last_line(capsys, 1, *flags, *SMALL_GRID)
    failed = [row["figure"] for row in strict_json(tmp_path / "metrics.json")["verdict"] if row["passed"] is False]
    assert failed and line.startswith(f"{len(failed)} of ") and all(name in line for name in failed)
    make_quick(monkeypatch)
    line = last_line(capsys, 0, *flags, "--grid", "none", "--evaluate")
    assert line.startswith("converged: savings had settled after ") and "every row passes" not in line


# ---- examples


def test_one_iteration_is_shown_step_by_step(tmp_path, capsys):
    """The first and the last one, and in each the step lowers what it is for."""
    runpy.run_path(str(ROOT / "examples" / "one_iteration.py"))["main"](2, str(tmp_path / "shown.png"))
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("iteration ")] == ["1", "2"]
    for line in (line for line in out.splitlines() if "before" in line):
        before, after = [float(line.split(word)[1].split(",")[0]) for word in ("before ", "after ")]
        assert after < before, line
    assert (tmp_path / "shown.png").stat().st_size > 10_000


EXAMPLES = ROOT / "examples"


def run_script(monkeypatch, path, *argv):
    """Exit status of a script that calls dk.main, run here as `python path argv`."""
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name, S, Z, more", [
    ("stochastic_beta", 6, 2, []), ("davila", 3, 1, []), ("ar1", 7, 5, []), ("aiyagari", 7, 1, []),
    ("castaneda", 4, 2, []),
    ("krusell_smith_1998", 6, 2, ["--model", "stochastic-beta"]),
    ("groups", 6, 2, ["--groups", "3", "--spread", "0.002", "--moments", "groups"])])
def test_examples_train(tmp_path, monkeypatch, capsys, quick, name, S, Z, more):
    """Each to its weights, in a folder of its own; the judge is stopped, as other tests hold it."""
    monkeypatch.chdir(tmp_path)
    quick.setattr(dk, "compare", lambda *_: (_ for _ in ()).throw(dk.UserError("enough")), raising=False)
    flags = ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--grid", "none"]
    assert run_script(monkeypatch, EXAMPLES / f"{name}.py", *flags, *more) == 2
    assert "enough" in one_line(capsys.readouterr().err)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(name) and [path.name for path in tmp_path.iterdir()] == ["runs"]
    solution = dk.load(folder / dk.WEIGHTS)
    assert solution.economy.arrays.income.shape == (Z, S) and math.isfinite(solution.K_mean)


def test_an_example_is_judged_to_the_end(tmp_path, monkeypatch, capsys, quick):
    """One state z and no law of motion: every file, and null only where there is no such thing."""
    flags = ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--grid", "none", "--output-dir", tmp_path]
    assert run_script(monkeypatch, EXAMPLES / "davila.py", *flags) == 0
    assert set(tree(tmp_path)) == FILES
    found = strict_json(tmp_path / "metrics.json")
    assert all(math.isfinite(row["network"]) and row["published"] is None for row in found["verdict"])
    nothing = {name for name, x in leaves(found["network"]) if x is None and not name.endswith(".limit.n_agents")}
    still = (".law_of_motion.", ".statistics.corr_", ".statistics.autocorr_", ".r2_law_of_K")
    assert all(any(part in name for part in still) for name in nothing)


@pytest.mark.parametrize("name, argv, words", [
    ("davila", ["--beta", "0.9"], "unrecognized arguments: --beta"),
    ("stochastic_beta", ["--beta", "0.9"], "--beta"), ("ar1", ["--u-bad", "0.2"], "unrecognized arguments: --u-bad"),
    ("ar1", ["--rho-z", "1"], "--rho-z 1.0: give a value in [0, 1)")])
def test_flags_that_an_example_has_no_use_for_are_refused(tmp_path, monkeypatch, capsys, name, argv, words):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, EXAMPLES / f"{name}.py", "--preset", "smoke", *argv) == 2
    assert words in one_line(capsys.readouterr().err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, has, has_not", [("davila", "--n-agents", "--beta"), ("ar1", "--rho-z", "--u-bad")])
def test_help_of_an_example_lists_its_flags(monkeypatch, capsys, name, has, has_not):
    assert run_script(monkeypatch, EXAMPLES / f"{name}.py", "--help") == 0
    words = capsys.readouterr().out.split()
    assert {has, "--grid-n-k", "--K-spread", "--preset", "--seed"} <= set(words) and has_not not in words


# ---- import


def test_import_only_defines(tmp_path):
    """No output, no file, no matplotlib, no thread or default of torch changed; and without the module resource."""
    code = ("import sys, torch; before = torch.get_num_threads(), torch.get_default_dtype();"
            "state = torch.get_rng_state(); sys.modules['resource'] = None; import deepham_ks;"
            "assert before == (torch.get_num_threads(), torch.get_default_dtype());"
            "assert torch.equal(state, torch.get_rng_state());"
            "assert not [name for name in sys.modules if name.split('.')[0] == 'matplotlib']")
    env = os.environ | {"PYTHONPATH": os.path.dirname(dk.__file__), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_without_the_module_resource(tmp_path, monkeypatch, quick):
    """As on Windows: everything is published."""
    monkeypatch.setitem(sys.modules, "resource", None)
    status, _, err = main(tmp_path)
    assert (status, err) == (0, "") and set(tree(tmp_path)) == FILES
