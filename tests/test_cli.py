"""The script as its users run it: files on disk, --evaluate, --grid, bad input, other calibrations and economies, the
examples, the Python interface."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT
from test_nothing_lost import main, one_line

import deepham_ks as dk

SMOKE = dk.PRESETS["smoke"]
SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")
DATA = {"NN_weights_biases.pth", "checkpoint.pt", "metrics.json", "results.txt", "training.csv",
        *(f"irf/agg_{series}_{kind}.csv" for series in SERIES for kind in ("benchmark", "shocked"))}
FILES = {*DATA, "distribution_validation.png",
         *(f"figures/{name}.png" for name in ("bellman_errors", "capital_path", "impulse_responses",
                                              "policy_functions", "training_history"))}


def snapshot(folder):
    """Every file's bytes; folders as None."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def strict_json(path):
    """metrics.json as other programs read it: NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def leaves(tree, name=""):
    """(path, value) of every leaf of nested dictionaries and lists."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, tree


def missing(metrics):
    """Paths of the figures that are null; n_agents is in the limit."""
    figures = leaves({key: metrics[key] for key in ("network", "grid", "comparison") if key in metrics})
    return {name for name, x in figures if x is None and not name.endswith(".limit.n_agents")}


@pytest.fixture(scope="module")
def metrics(smoke_run):
    return strict_json(smoke_run[0] / "metrics.json")


# ------------------------------------------------------------------------------------------------ results on disk


def test_smoke_run_succeeds(smoke_run):
    folder, process = smoke_run
    assert process.returncode == 0, process.stderr
    out = process.stdout
    assert "no CUDA device found: running on the CPU" in out
    assert "departs from the authors' game_nn_n50" in out and f"n_agents {SMOKE.n_agents} (paper 50)" in out
    iterations = [line for line in out.splitlines() if line.startswith("iteration ")]
    assert len(iterations) == SMOKE.iterations and all("mean_K" in line for line in iterations)
    assert "sizes this small have no verdict" in out and "tolerance" not in out and "FAIL" not in out
    assert process.stderr == ""
    assert files(folder) == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"run"}


def test_results_txt(smoke_run, metrics):
    path = smoke_run[0] / "results.txt"
    k = np.loadtxt(path)
    pooled = len(range(SMOKE.eval_drop, SMOKE.eval_periods, SMOKE.eval_every))
    assert k.shape == (SMOKE.eval_agents * SMOKE.eval_economies * pooled,)
    assert (k >= 0).all() and k.std() > 0
    assert k.mean() == pytest.approx(metrics["network"]["small"]["capital"]["mean"], abs=1e-4)
    header = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for words in (f"N = {SMOKE.eval_agents}", f"{SMOKE.eval_periods - SMOKE.eval_drop} periods", "seed 0", "bellman"):
        assert words in header
    assert f"{metrics['network']['small']['bellman_own_c']['mean']:.6f}" in header


@pytest.mark.parametrize("kind", ["benchmark", "shocked"])
@pytest.mark.parametrize("series", SERIES)
def test_impulse_response_files(smoke_run, series, kind):
    rows = list(csv.reader((smoke_run[0] / "irf" / f"agg_{series}_{kind}.csv").open()))
    paths = np.array(rows, float)
    assert paths.shape == (SMOKE.irf_paths, SMOKE.irf_periods) and np.isfinite(paths).all()
    if series == "shocks":
        assert np.isin(paths, (0, 1)).all() and (paths[:, 0] == (kind == "benchmark")).all()
    else:
        bounds = {"capital": (5, 200), "output": (1, 10), "consumption": (0.5, 10), "interest_rate": (0.98, 1.1)}
        low, high = bounds[series]
        assert (paths > low).all() and (paths < high).all()
        assert (np.diff(paths, axis=1) != 0).all()  # the last column too is a period of its own


def test_pictures(smoke_run):
    from matplotlib.image import imread

    folder = smoke_run[0]
    pictures = sorted((folder / "figures").iterdir())
    assert len(pictures) == 5 and all(path.suffix == ".png" for path in pictures)
    for path in (folder / "distribution_validation.png", *pictures):
        image = imread(path)
        assert image.shape[0] > 300 and image.shape[1] > 600
        assert 0.001 < (image[..., :3].min(-1) < 0.9).mean() < 0.7, path  # ink, and paper


def test_weights_file(smoke_run):
    """All that is needed to use the networks; the Python interface is what these layers say."""
    path = smoke_run[0] / "NN_weights_biases.pth"
    weights = torch.load(path, weights_only=True)
    assert weights["calibration"] == dataclasses.asdict(dk.Calibration())
    assert weights["config"] == dataclasses.asdict(SMOKE)
    assert (weights["format"], weights["seed"]) == (dk.FORMAT, 0)
    assert len(weights["history"]["mean_K"]) == SMOKE.iterations
    econ, ours, tables = dk.krusell_smith(), weights["economy"], dk.economy_dict(dk.krusell_smith())
    assert ours.keys() == tables.keys() and not dk.difference(ours, tables, "economy")
    solution = dk.load(path)
    k, s, K, z = np.array([2.0, 50.0]), np.array([0, 1]), 39.0, 1
    R, w = dk.prices(torch.tensor(K).double(), torch.tensor(z), econ.tables())
    m = float(R) * k + ours["income"][z].numpy() * float(w)
    ln_K = np.full(2, 8 * np.log(K / weights["K_mean"]))
    x = np.stack([np.log(m / (econ.K_ss + econ.c_ss)), np.log(k / econ.c_ss + 0.1) / 0.4, k / (k + econ.K_ss), ln_K,
                  2.0 * s - 1, np.ones(2)], 1)
    seen = {"policy": x, "value": np.column_stack([ln_K**2, x])}

    def output(name):
        layers = {layer: x.double().numpy() for layer, x in weights[name].items()}
        h = np.tanh(seen[name] @ layers["W1"].T + layers["b1"])
        return np.tanh(h @ layers["W2"].T + layers["b2"]) @ layers["w3"] + layers["b3"]

    trained = torch.load(path.with_name("checkpoint.pt"), weights_only=True)
    assert weights["K_mean"] == float(trained["K_mean"]) == float(solution.econ.K_mean)
    assert np.ptp(output("policy")) > 1e-3
    saved = 1 - np.exp(output("policy")).clip(max=1.0)
    assert solution.next_capital(k, s, K, z) == pytest.approx(saved * m, rel=1e-10)
    for_ever = 1 / (1 - dk.Calibration().beta)  # log utility of a consumption equivalent
    assert solution.value(k, s, K, z) == pytest.approx(for_ever * np.log(econ.c_ss * np.exp(output("value") / 10)))
    assert np.ptp(output("value")) > 1e-3


def test_metrics(metrics):
    assert {"network", "grid", "comparison", "verdict", "calibration", "economy", "config", "grid_config", "seed",
            "device", "versions", "seconds", "peak_memory_gb"} <= set(metrics)
    for solution in ("network", "grid"):
        for size, N in (("small", SMOKE.eval_agents), ("large", SMOKE.eval_agents_large), ("limit", None)):
            figures = metrics[solution][size]
            assert figures["n_agents"] == N
            for kind in ("bellman_own_c", "bellman_best_c", "bellman_in_consumption"):
                assert set(figures[kind]) == {"mean", "rmse", "max"}
            assert set(figures["euler_log10"]) == {"mean", "p99", "max"}
            for name in ("capital", *(("consumption",) if size == "limit" else ())):
                assert {"mean", "std", "quantiles", "gini", "top_percent_hold", "lorenz"} <= set(figures[name])
                assert set(figures[name]["quantiles"]) == {"1", "5", "25", "50", "75", "95", "99"}
                assert set(figures[name]["top_percent_hold"]) == {"1", "5", "10", "20"}
            assert {"coefficients", "r2", "den_haan_max_percent"} <= set(figures["law_of_motion"])
            assert metrics["comparison"][size]["n_agents"] == N and metrics["comparison"][size]["w1"] >= 0
        assert -3 < metrics[solution]["limit"]["interest_rate_percent"] < 5
    assert {"training", "grid", "accuracy", "results"} <= set(metrics["seconds"])
    assert {"python", "torch", "numpy", "scipy", "matplotlib"} <= set(metrics["versions"])
    assert metrics["version"] == dk.__version__
    assert 0.05 < metrics["peak_memory_gb"]["host"] < 50
    assert metrics["seed"] == 0 and metrics["config"] == dataclasses.asdict(SMOKE)
    assert metrics["grid_config"] == dataclasses.asdict(dk.SMOKE_GRID)
    assert metrics["economy"] == json.loads(json.dumps(dk.plain(dk.economy_dict(dk.krusell_smith()))))
    assert len(list(leaves(metrics["network"]))) > 100 and not missing(metrics)


def test_what_is_not_finite_becomes_null():
    figures = {"a": [math.nan, 1.0], "b": {"c": np.array([np.inf, 2.0]), "d": torch.tensor(-math.inf)},
               "e": (None, "x"), "f": np.float64(np.nan), "g": np.int64(3), "h": True}
    plain = {"a": [None, 1.0], "b": {"c": [None, 2.0], "d": None}, "e": [None, "x"], "f": None, "g": 3, "h": True}
    assert dk.plain(figures) == plain and json.dumps(dk.plain(figures), allow_nan=False)


# ------------------------------------------------------------------------------------------------ --evaluate, seeds


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes longer than all the rest of a smoke run."""
    monkeypatch.setattr(dk, "draw_figures", lambda *a: None)


@pytest.fixture(scope="module")
def evaluated(smoke_run, deepham, tmp_path_factory):
    """The smoke run's weights alone in another directory, and --evaluate there, in a process with as many threads."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copy(smoke_run[0] / "NN_weights_biases.pth", folder)
    process = deepham("--preset", "smoke", "--evaluate", "--output-dir", ".", cwd=folder)
    return folder, process.stdout, process.stderr


def test_evaluate_reproduces_the_run(smoke_run, metrics, evaluated):
    folder, out, err = evaluated
    again = strict_json(folder / "metrics.json")
    for timing in ("seconds", "peak_memory_gb"):
        assert again.pop(timing)
    ours = {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_gb")}
    assert again == ours and err == ""
    for path in (*smoke_run[0].glob("*.txt"), *smoke_run[0].glob("irf/*.csv"), smoke_run[0] / "NN_weights_biases.pth"):
        assert (folder / path.relative_to(smoke_run[0])).read_bytes() == path.read_bytes(), path.name
    assert {path.relative_to(folder) for path in folder.rglob("*.png")} == {
        path.relative_to(smoke_run[0]) for path in smoke_run[0].rglob("*.png")}
    assert "\niteration " not in out


def as_flags(config, usual, prefix=""):
    """The flags that make config of usual."""
    return [word for item in dataclasses.fields(config) if getattr(config, item.name) != getattr(usual, item.name)
            for word in (dk.flag(prefix + item.name), str(getattr(config, item.name)))]


SMALL = [*as_flags(SMOKE, dk.Config()), *as_flags(dk.SMOKE_GRID, dk.GridConfig(), "grid_")]


def test_evaluate_exits_1_when_a_figure_fails(tmp_path, capsys, undrawn):
    """The default preset at the sizes of smoke, whose network is nowhere near the grid. The run itself ends with 1 too,
    as it did not converge, and says so. Nothing passes or fails without a grid."""
    argv = ["--device", "cpu", "--compile", "none", "--output-dir", str(tmp_path), *SMALL]
    for flags, status in (([], 1), (["--evaluate"], 1), (["--evaluate", "--grid", "none"], 0)):
        assert dk.main([*argv, *flags]) == status
        (out, err), rows = capsys.readouterr(), strict_json(tmp_path / "metrics.json")["verdict"]
        passed = [row["passed"] for row in rows]
        assert "not converged: " in out and "go on with --resume --iterations 6" in out
        table = out[out.index("\nfigure") :]
        assert not err and table.count("pass") == passed.count(True) and table.count("FAIL") == passed.count(False)
        if "none" in flags:
            assert set(passed) == {None} and all(row["tolerance"] is None and row["grid"] is None for row in rows)
        else:
            assert not all(passed) and None not in passed and len(rows) >= 15
        assert all(math.isfinite(row["network"]) for row in rows)


def test_same_seed_same_results(smoke_run, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    assert dk.main(["--preset", "smoke", "--device", "cpu", "--seed", "0"]) == 0  # and the usual directory
    assert (tmp_path / "runs/smoke/results.txt").read_bytes() == (smoke_run[0] / "results.txt").read_bytes()


def test_another_seed_another_start():
    econ = dk.krusell_smith().tables(dtype=torch.float32)
    one, same, other = (dk.initial_state(econ, SMOKE, seed, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name in ("policy", "value", "k"):
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert not torch.equal(one["policy"], one["value"])


# ------------------------------------------------------------------------------------------------ --grid, resource


def test_without_a_grid_every_file_is_there(tmp_path, monkeypatch):
    """--grid none, and --evaluate with it: the network's figures, no grid's, every picture."""
    before = None
    for flags in ([], ["--evaluate"]):
        if flags:  # the pictures are the run's
            monkeypatch.setattr(dk, "draw_figures", lambda *a: None)
        status, out, err = main(tmp_path, "--compile", "none", "--grid", "none", *flags)
        assert (status, err) == (0, "") and "FAIL" not in out
        metrics = strict_json(tmp_path / "metrics.json")
        assert files(tmp_path) == FILES and not missing(metrics)
        assert "grid" not in metrics and metrics["grid_config"] is None and metrics["comparison"] == {}
        assert set(metrics["network"]) == {"small", "large", "limit"}
        assert all(row["passed"] is None and row["grid"] is None for row in metrics["verdict"])
        assert before in (None, metrics["network"])
        before = metrics["network"]


def test_the_published_grid_judges_too(tmp_path, undrawn, metrics):
    """100 nodes of k and 4 of K, an economy's size apart from the converged grid's; other grid flags count here too."""
    flags = ["--grid", "published", "--grid-periods", "2000", "--grid-burn-in", "50", "--grid-tolerance", "1e-5"]
    status, _, err = main(tmp_path, "--compile", "none", *flags)
    assert (status, err) == (0, "")
    published = strict_json(tmp_path / "metrics.json")
    changes = {"periods": 2000, "burn_in": 50, "tolerance": 1e-5}
    assert published["grid_config"] == dataclasses.asdict(dataclasses.replace(dk.GRIDS["published"], **changes))
    assert published["grid_config"]["n_K"] == 4 and not missing(published)
    assert published["grid"]["law_of_motion"]["coefficients"] != metrics["grid"]["law_of_motion"]["coefficients"]
    ours, theirs = [x["grid"]["limit"]["capital"]["mean"] for x in (published, metrics)]
    assert ours == pytest.approx(theirs, rel=0.02)


def test_without_the_module_resource(tmp_path, monkeypatch, undrawn):
    """As on Windows: everything is published, only the host's peak memory is not known."""
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(ImportError):
        import resource  # noqa: F401
    status, _, err = main(tmp_path, "--compile", "none")
    assert (status, err) == (0, "") and files(tmp_path) == DATA
    assert strict_json(tmp_path / "metrics.json")["peak_memory_gb"] == {}


# ------------------------------------------------------------------------------------------------ other calibrations


@pytest.mark.parametrize("flags", [("--gamma", "2"), ("--mu", "0", "--tfp-shock", "0.02")], ids=" ".join)
def test_other_calibrations(tmp_path, undrawn, flags):
    """Risk aversion 2 (the README's example), and Krusell & Smith's own economy without benefits, twice the shock."""
    status, _, err = main(tmp_path, "--compile", "none", *flags)
    assert (status, err) == (0, "")
    metrics = strict_json(tmp_path / "metrics.json")
    for name, value in zip(flags[::2], flags[1::2]):
        assert metrics["calibration"][name.removeprefix("--").replace("-", "_")] == float(value)
    assert not missing(metrics)
    # 100 nodes, K of 50 households: the Euler error stays below 10^-2, the law of motion stays one
    assert metrics["grid"]["large"]["euler_log10"]["mean"] < -2
    assert min(metrics["grid"]["law_of_motion"]["r2"]) > 0.999
    solution, cal = dk.load(tmp_path / "NN_weights_biases.pth"), metrics["calibration"]
    assert solution.weights["calibration"] == cal and solution.economy.gamma == cal["gamma"]
    # what the household has is the new calibration's: k' below cash on hand of it
    K, u = 40.0, cal["u_bad"]
    L = cal["l_bar"] * (1 - u)
    Z = 1 - cal["tfp_shock"]
    R = 1 - cal["delta"] + cal["alpha"] * Z * (K / L) ** (cal["alpha"] - 1)
    w = (1 - cal["alpha"]) * Z * (K / L) ** cal["alpha"]
    k = np.array([1.0, 10.0, 100.0])
    m = R * k + w * cal["mu"]
    k_next = solution.next_capital(k, 0, K, 0)
    assert (k_next < m).all() and (k_next >= 0).all()


def test_risk_aversion_2_in_python(smoke_grid):
    """The worked example without the command line: more risk, more precautionary saving of the poor employed."""
    cautious = dk.solve_grid(dk.Calibration(gamma=2.0), dk.SMOKE_GRID)
    k = np.array([0.5, 2.0, 5.0])
    assert (cautious.next_capital(k, 1, 40.0, 0) > smoke_grid.next_capital(k, 1, 40.0, 0)).all()


# ------------------------------------------------------------------------------------------------ from Python

STATES = np.array([0.0, 1.0, 40.0])[:, None, None], np.arange(2)[:, None], 38.0, np.arange(2)


def test_solve_touches_no_file_and_a_saved_solution_is_all_there_is(tmp_path, monkeypatch, capsys):
    """A calibration from Python to numpy arrays, to a file, and back to the same bits."""
    monkeypatch.chdir(tmp_path)
    solution = dk.solve(dk.Calibration(gamma=2.0), SMOKE, device="cpu", compile="none")
    assert isinstance(solution, dk.Solution) and not list(tmp_path.iterdir())
    assert solution.economy.gamma == 2 and len(solution.weights["history"]["mean_K"]) == SMOKE.iterations
    path = tmp_path / "elsewhere" / "mine.pth"
    solution.save(path)
    assert files(tmp_path) == {"elsewhere/mine.pth"}
    again = dk.load(path)
    for name in ("next_capital", "value"):
        ours, theirs = [getattr(x, name)(*STATES) for x in (solution, again)]
        assert ours.shape == (3, 2, 2) and np.isfinite(ours).all() and ours.tobytes() == theirs.tobytes()
    assert not dk.difference(dk.economy_dict(again.economy), dk.economy_dict(solution.economy), "economy")


def test_solve_resumes_exactly(tmp_path, capsys):
    economy, cfg = dk.krusell_smith(), dataclasses.replace(SMOKE, final_value_steps=0)
    how = {"seed": 5, "device": "cpu", "compile": "none"}
    whole = dk.solve(economy, cfg, **how)
    short = dataclasses.replace(cfg, iterations=cfg.iterations - 1)
    dk.solve(economy, short, **how, output_dir=tmp_path)
    assert files(tmp_path) == {"checkpoint.pt"}
    resumed = dk.solve(economy, cfg, **how, output_dir=tmp_path, resume=True)
    for network in ("policy", "value"):
        for layer, x in whole.weights[network].items():
            assert torch.equal(x, resumed.weights[network][layer])
    assert resumed.weights["K_mean"] == whole.weights["K_mean"]
    assert resumed.weights["history"]["mean_K"] == whole.weights["history"]["mean_K"]
    with pytest.raises(dk.UserError, match="config.seed is 5 in the file and 6"):
        dk.solve(economy, cfg, **how | {"seed": 6}, output_dir=tmp_path, resume=True)


# ------------------------------------------------------------------------------------------------ bad input

BAD = [
    (["--n-agent", "5"], "--n-agent"),
    (["extra"], "extra"),
    (["--n-agents", "0"], "--n-agents"),
    (["--n-agents", "2.5"], "--n-agents"),
    (["--n-agents"], "--n-agents"),
    (["--beta", "1"], "--beta"),
    (["--beta", "nan"], "--beta"),
    (["--gamma", "inf"], "--gamma"),
    (["--gamma", "0"], "--gamma"),
    (["--alpha", "-0.3"], "--alpha"),
    (["--delta", "x"], "--delta"),
    (["--policy-rate", "0"], "--policy-rate"),
    (["--seed", "-1"], "--seed"),
    (["--preset", "huge"], "--preset"),
    (["--device", "tpu"], "--device"),
    (["--compile", "jit"], "--compile"),
    (["--optimizer", "sgd"], "--optimizer"),
    (["--u-bad", "0.95"], "--u-bad"),
    (["--mu", "1", "--u-bad", "0.5", "--u-good", "0.49", "--l-bar", "0.5"], "--mu"),
    (["--alpha", "0.99"], "alpha"),
    (["--periods", "10"], "--periods"),
    (["--horizon", "1"], "--horizon"),
    (["--eval-drop", "60"], "--eval-drop"),
    (["--grid", "coarse"], "--grid"),
    (["--grid-n-k", "9"], "--grid-n-k"),
    (["--grid-n-K", "1001"], "--grid-n-K"),
    (["--grid-k-max", "inf"], "--grid-k-max"),
    (["--grid-exponent", "0.9"], "--grid-exponent"),
    (["--grid-periods", "6e3"], "--grid-periods"),
    (["--grid-burn-in", "1998"], "--grid-burn-in"),
    (["--grid-damping", "0", "--grid", "none"], "--grid-damping"),
    (["--evaluate", "--resume"], "--evaluate"),
    (["--evaluate"], "--evaluate"),
    (["--output-dir", "a\nb"], "--output-dir"),
    (["--output-dir", "file.txt"], "--output-dir"),
    (["--output-dir", "file.txt/below"], "--output-dir"),
    (["--output-dir", "x" * 5000], "--output-dir"),
    (["--evaluate", "--output-dir", "nowhere"], "--evaluate"),
]


def refused(argv, capsys, folder, **economy):
    """Run main(argv) as refused: exit status 2, one line on stderr, nothing else said, no file touched."""
    before = snapshot(folder)
    assert dk.main(argv, **economy) == 2
    said = capsys.readouterr()
    assert said.out == "" or "--resume" in argv  # the checkpoint is read after the first lines
    assert said.err.count("\n") == 1 and said.err.endswith("\n") and len(said.err) > 40
    assert "Traceback" not in said.err
    assert snapshot(folder) == before
    return said.err


@pytest.mark.parametrize("argv, name", BAD, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "")
def test_bad_input(tmp_path, monkeypatch, capsys, argv, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    assert name in refused(["--preset", "smoke", "--device", "cpu", *argv], capsys, tmp_path)


@pytest.mark.parametrize("argv, name", [(["--device", "cuda"], "--device cuda"),
                                        (["--output-dir", "/proc/here"], "--output-dir")], ids=lambda x: str(x)[:30])
def test_bad_input_on_the_real_command_line(deepham, tmp_path, argv, name):
    process = deepham("--preset", "smoke", *argv, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and name in process.stderr and "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())


def test_too_old_a_driver_is_named(tmp_path, monkeypatch, capsys):
    """A CUDA build of torch that finds no CUDA where there is an NVIDIA driver: not a word of a missing GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dk, "Path", lambda name: tmp_path)
    for chosen in (None, "0"):  # of a scheduler, say
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if chosen:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(dk.UserError, match="NVIDIA driver.*cu126.*--device cpu"):
            dk.choose_device("auto")
    assert dk.choose_device("cpu") == "cpu" and capsys.readouterr().out == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a user who hides the GPU wants the CPU
    assert dk.choose_device("auto") == "cpu" and "no CUDA device found" in capsys.readouterr().out
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dk.choose_device("auto") == "cpu" and "no CUDA device found" in capsys.readouterr().out


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "empty":
        data = b""
    elif how == "text":
        data = b"weights\n" * 1000
    elif how == "another zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "a")
        return
    elif how == "another torch file":
        torch.save({"policy": torch.zeros(3)}, path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "another zip", "another torch file"])
def test_damaged_weights(smoke_run, tmp_path, capsys, how):
    path = tmp_path / "NN_weights_biases.pth"
    shutil.copy(smoke_run[0] / path.name, path)
    damage(path, how)
    argv = ["--preset", "smoke", "--device", "cpu", "--evaluate", "--output-dir", str(tmp_path)]
    error = refused(argv, capsys, tmp_path)
    assert "--evaluate" in error and path.name in error
    with pytest.raises(dk.UserError):
        dk.load(path)


@pytest.mark.parametrize("flags", [["--beta", "0.98"], ["--gamma", "2"], ["--mu", "0"], ["--hidden", "9"]],
                         ids=" ".join)
def test_weights_of_another_run(smoke_run, tmp_path, capsys, flags):
    shutil.copy(smoke_run[0] / "NN_weights_biases.pth", tmp_path)
    argv = ["--preset", "smoke", "--device", "cpu", "--evaluate", "--output-dir", str(tmp_path), *flags]
    error = refused(argv, capsys, tmp_path)
    assert "--evaluate" in error and flags[0].removeprefix("--") in error


EXAMPLES = ROOT / "examples"


def economy_of(example):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        script = runpy.run_path(str(EXAMPLES / f"{example}.py"))
    return script["ECONOMY"] if "ECONOMY" in script else script["economy"](script.get("Calibration", dk.Calibration)())


@pytest.fixture(scope="module")
def of_default(tmp_path_factory):
    """Checkpoint and weights of the default economy, as the command line writes them."""
    folder = tmp_path_factory.mktemp("of_default")
    cal = dk.Calibration()
    dk.solve(cal, SMOKE, device="cpu", compile="none", output_dir=folder).save(folder / dk.WEIGHTS)
    return folder


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("name, told", [("stochastic_beta", "economy."), ("davila", "calibration.beta is missing")])
def test_files_of_another_economy(tmp_path, capsys, flag, name, told):
    """Of an example in the default's place, refused by the table or the parameter."""
    calibration = {} if name == "davila" else dataclasses.asdict(dk.Calibration())
    other = dk.solve(economy_of(name), SMOKE, device="cpu", compile="none", output_dir=tmp_path,
                     calibration=calibration)
    other.save(tmp_path / dk.WEIGHTS)
    capsys.readouterr()
    argv = ["--preset", "smoke", "--device", "cpu", flag, "--output-dir", str(tmp_path)]
    error = refused(argv, capsys, tmp_path)
    assert f"{flag}: {tmp_path}" in error and "is of another run" in error and told in error


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(dk.Economy)])
def test_a_table_changed_in_one_number(of_default, capsys, flag, name):
    """Any part of an economy: the file of the unchanged one is refused by its name."""
    economy = dk.krusell_smith()
    changed = getattr(economy, name)
    if name == "equilibrium":
        changed = "game"
    elif name == "group":
        changed = [0, 1]
    elif isinstance(changed, np.ndarray):
        changed = changed.copy()
        changed.flat[-1] -= 1e-10
    else:
        changed = changed[::-1] if isinstance(changed, tuple) else changed + 1e-10
    economy = dataclasses.replace(economy, **{name: changed})
    argv = ["--preset", "smoke", "--device", "cpu", flag, "--output-dir", str(of_default)]
    error = refused(argv, capsys, of_default, economy=economy)
    assert f"{flag}: {of_default}" in error and f"another run: economy.{name} " in error


# ------------------------------------------------------------------------------------------------ examples

COARSE = ["--grid-n-k", "40", "--grid-n-K", "4", "--grid-n-k-fine", "80", "--grid-n-K-fine", "5",
          "--grid-periods", "500", "--grid-tolerance", "1e-3"]


@pytest.mark.parametrize("name, S, Z, more", [
    ("stochastic_beta", 6, 2, []), ("davila", 3, 1, []), ("ar1", 7, 5, []),
    ("groups", 6, 2, ["--groups", "3", "--spread", "0.002", "--moments", "groups"])])
def test_examples(tmp_path, name, S, Z, more):
    """The real command line, beside another folder: every file, every figure; only where a state z never comes, or K
    does not move, is a law of motion null."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    more = [*more, *(["--compile", "none"] if name != "ar1" else [])]
    flags = ["--preset", "smoke", "--output-dir", "run", *COARSE, *more]
    command = [sys.executable, "-B", str(EXAMPLES / f"{name}.py"), *flags]
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
    assert files(tmp_path / "run") == FILES and [path.name for path in tmp_path.iterdir()] == ["run"]
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert np.shape(metrics["economy"]["income"]) == (Z, S) and metrics["calibration"]
    law = {path.rsplit(".law_of_motion.")[-1].split(".")[0] for path in missing(metrics)
           if ".risky_steady_state.by_law_of_motion." not in path}
    allowed = {"coefficients", "r2", "den_haan_max_percent", "den_haan_mean_percent"}
    assert law <= (set() if name in ("stochastic_beta", "groups") else allowed), missing(metrics)
    assert all(math.isfinite(row["network"]) and row["published"] is None for row in metrics["verdict"])
    saved = dk.load(tmp_path / "run" / dk.WEIGHTS).economy
    if name != "groups":
        assert not dk.difference(dk.economy_dict(saved), dk.economy_dict(economy_of(name)), "economy")


def run_script(monkeypatch, path, *argv):
    """Exit status of a script that calls dk.main, run here as `python path argv`."""
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("name, has, has_not", [
    ("stochastic_beta", "--u-bad", "--rho-z"), ("davila", "--n-agents", "--beta"), ("ar1", "--rho-z", "--u-bad")])
def test_help_of_an_example_lists_its_flags(monkeypatch, capsys, name, has, has_not):
    assert run_script(monkeypatch, EXAMPLES / f"{name}.py", "--help") == 0
    words = capsys.readouterr().out.split()
    assert {has, "--grid-n-k", "--K-spread", "--preset", "--seed"} <= set(words) and has_not not in words


def test_an_economy_without_a_calibration_has_no_such_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, EXAMPLES / "davila.py", "--preset", "smoke", "--beta", "0.9") == 2
    assert "unrecognized arguments: --beta" in one_line(capsys.readouterr().err)
    assert run_script(monkeypatch, EXAMPLES / "ar1.py", "--preset", "smoke", "--rho-z", "1") == 2
    assert "--rho-z 1.0: give a value in [0, 1)" in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_example_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """With its own name, as it was called; and so it does."""
    monkeypatch.chdir(ROOT)
    flags = ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--grid", "none"]
    flags += ["--output-dir", str(tmp_path)]
    iterate = dk.iterate

    def interrupted(state, *rest):
        if state["iteration"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(dk, "iterate", interrupted)
        assert run_script(monkeypatch, "examples/davila.py", *flags) == 130
    assert one_line(capsys.readouterr().err) == (
        "deepham_ks: stopped by SIGINT after iteration 2; continue with: "
        f"python examples/davila.py --resume {' '.join(flags)}\n")
    monkeypatch.setattr(dk, "draw_figures", lambda *a: None)
    assert run_script(monkeypatch, "examples/davila.py", "--resume", *flags) == 0
    assert "iteration 3 " in capsys.readouterr().out and (tmp_path / "metrics.json").exists()


def test_a_fourth_type_is_a_change_of_two_tables(tmp_path, monkeypatch, capsys, undrawn):
    """examples/stochastic_beta.py with other BETA and TYPES, in a folder beside the script."""
    shutil.copy(ROOT / "deepham_ks.py", tmp_path)
    lines = (EXAMPLES / "stochastic_beta.py").read_text().splitlines()
    tables = {"BETA": "BETA = np.array([0.98, 0.9858, 0.9894, 0.993])",
              "TYPES": "TYPES = 0.99 * np.eye(4) + 0.0025"}
    changed = [tables.get(line.split(" = ")[0], line) for line in lines]
    assert sum(a != b for a, b in zip(lines, changed)) == 2
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "four.py").write_text("\n".join(changed) + "\n")
    flags = ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--output-dir", str(tmp_path / "run")]
    assert run_script(monkeypatch, tmp_path / "examples" / "four.py", *flags, *COARSE) == 0
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    assert files(tmp_path / "run") == DATA and not missing(metrics)
    assert sorted(set(metrics["economy"]["beta"])) == [0.98, 0.9858, 0.9894, 0.993]
    assert np.shape(metrics["economy"]["income"]) == (2, 8) and len(metrics["economy"]["s_names"]) == 8


def test_load_without_a_file(tmp_path):
    with pytest.raises(dk.UserError):
        dk.load(tmp_path / "nothing.pth")


# ------------------------------------------------------------------------------------------------ benchmarks


@pytest.fixture
def benchmark(monkeypatch):
    """The names of a script in benchmarks/, with presets of smoke sizes."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    eager = dk.compile_kernels("none")
    monkeypatch.setattr(dk, "compile_kernels", lambda mode: eager)
    monkeypatch.setitem(dk.PRESETS, "default", SMOKE)
    monkeypatch.setitem(dk.GRIDS, "converged", dk.SMOKE_GRID)
    return lambda name: runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


def test_time_to_accuracy_and_stages_run(benchmark, smoke_run, smoke_grid, metrics, capsys):
    """On the sizes of smoke, where they find the smoke run's own network and its distance to the grid."""
    bench = benchmark("bench")
    with torch.no_grad():
        rows = bench["time_to_accuracy"]("default", SMOKE, 0, "cpu", *bench["judge"](SMOKE, "cpu"), 1)
        seconds = bench["stages"](SMOKE, "cpu")
    assert [row[:3] for row in rows] == [("default", 0, i) for i in range(1, SMOKE.iterations + 1)]
    assert all(0 < x < 10 for x in seconds.values()) and len(seconds) == 5
    assert seconds["whole iteration"] > seconds["simulate"]
    network = dk.load(smoke_run[0] / "NN_weights_biases.pth")
    longer = dataclasses.replace(SMOKE, **{name: getattr(SMOKE, name) + bench["FORGET"]
                                           for name in ("eval_periods", "eval_drop")})
    sizes = dk.krusell_smith().tables(), longer, SMOKE.eval_economies, SMOKE.eval_agents, dk.JUDGE_SEED
    found, _ = dk.ergodic_states({"network": network, "grid": smoke_grid}, *sizes)
    w1 = scipy.stats.wasserstein_distance(*[pooled["k"].flatten().numpy() for pooled, _ in found.values()])
    assert rows[-1][4] == pytest.approx(w1, rel=1e-3)
    assert rows[-1][5] == pytest.approx(metrics["comparison"]["policy_distance"]["mean"], rel=0.05)
    assert bench["policy_step_flops"](dk.Config()) > 1e9


HOLD = '''
import os, sys, torch
import deepham_ks as dk
torch.set_num_threads(2)
judge_panel = dk.judge_panel
def tell(*of):
    os.write(1, b"judging\\n")  # in one piece, from two threads
    return judge_panel(*of)
dk.judge_panel = tell
sys.exit(dk.main())
'''


def test_work_beside_goes_on_at_once_and_its_errors_are_the_callers():
    """As the grid is solved while a GPU trains."""
    began, go_on = threading.Event(), threading.Event()

    def work():
        began.set()
        assert go_on.wait(60)
        return 3

    with dk.beside(work) as result:
        assert began.wait(60)
        go_on.set()
        assert result() == 3
    with pytest.raises(dk.UserError, match="no convergence"):
        with dk.beside(lambda: dk.require(False, "no convergence")) as result:
            result()


def test_work_beside_does_not_outlive_its_block():
    """Neither where its result was not wanted, nor in an interrupt."""
    before = threading.active_count()

    def for_ever():
        while True:
            time.sleep(0.001)

    for error in (None, dk.Interrupted, ValueError):
        with pytest.raises(error) if error else contextlib.nullcontext(), dk.beside(for_ever):
            if error:
                raise error
        assert threading.active_count() == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_panels_are_judged_beside_each_other(tmp_path, sent):
    """One line and the usual status, though a thread is at work."""
    shutil.copy(ROOT / dk.WEIGHTS, tmp_path)
    argv = [sys.executable, "-c", HOLD, "--evaluate", "--grid", "none", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = (line for line in process.stdout if line == "judging\n")
    assert next(said) and next(said)
    time.sleep(1)  # both are simulated now
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert error == f"deepham_ks: stopped by {sent.name}; results are as they were\n"


def test_operations_of_an_iteration_do_not_creep_up(monkeypatch):
    """On a GPU every one is a launch. A period of simulation takes 49 and one of roll-outs 29, of shocks 16, of
    costates 9; the committed count of the default preset is that many times its periods, and little else."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    committed = json.loads((ROOT / "benchmarks" / "operations.json").read_text())["default"]
    found = runpy.run_path(str(ROOT / "benchmarks" / "operations.py"))["operations"](dk.krusell_smith(), SMOKE)
    sizes = {"simulate": SMOKE.periods, "draw_shocks": SMOKE.periods, "roll_out": SMOKE.horizon,
             "costates": SMOKE.horizon}
    default = dataclasses.asdict(dk.Config())
    for stage, periods in sizes.items():
        of_default = default["periods" if periods == SMOKE.periods else "horizon"]
        before_the_loop = 2  # operations a period, over as few as these
        assert found[stage] / periods <= committed[stage] / of_default + before_the_loop, stage
    assert committed["all"] <= 12_000 and committed["all"] - sum(committed[stage] for stage in sizes) < 4000
    assert sum(found.values()) == 2 * found["all"]


def test_every_variant_of_the_ablation_is_a_command(benchmark, metrics):
    ablation, columns = benchmark("ablation"), set()
    for name, flags in ablation["VARIANTS"].items():
        asked = dk.parse([*ablation["SHORT"], *flags])
        assert dk.departures(asked.config, dk.parse(ablation["SHORT"]).config), name
        columns |= {ablation["row"](name, flags, found).count("|") for found in (metrics, "error: no")}
    assert len(columns) == 1


# ------------------------------------------------------------------------------------------------ help, import


def test_help_lists_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        dk.main(["--help"])
    assert end.value.code == 0
    said = "".join(capsys.readouterr().out.split())  # without white space: lines wrap anywhere
    for kind in (dk.Config, dk.Calibration, dk.GridConfig, dk.Run):
        for item in dataclasses.fields(kind):
            prefix = "--grid-" if kind is dk.GridConfig else "--"
            assert prefix + item.name.replace("_", "-") in said
            assert "".join(f"{item.metadata['help']} (default {item.default!r}".split()) in said, item.name
            assert len(item.metadata["help"]) > 10
    assert f"smoke{SMOKE.n_agents!r}" in said


def test_presets_and_flags():
    """A flag changes its field and nothing else; presets keep theirs; the directory follows the preset."""
    asked = dk.parse([])
    assert asked.calibration == dataclasses.asdict(dk.Calibration()) and asked.config == dk.Config()
    assert not dk.difference(dk.economy_dict(asked.economy), dk.economy_dict(dk.krusell_smith()), "economy")
    assert asked.grid == dk.GridConfig() and asked.run.output_dir == "." and dk.PRESETS["default"] == asked.config
    asked = dk.parse(["--preset", "paper", "--n-agents", "60", "--no-control-variate", "--gamma", "3"])
    assert asked.config == dataclasses.replace(dk.PRESETS["paper"], n_agents=60, control_variate=False)
    assert asked.calibration == dataclasses.asdict(dk.Calibration(gamma=3.0)) and asked.economy.gamma == 3
    assert (asked.run.output_dir, asked.run.preset, asked.grid) == ("runs/paper", "paper", dk.GridConfig())
    paper = dk.PRESETS["paper"]
    assert (paper.n_agents, paper.hidden, paper.horizon, paper.optimizer) == (50, 24, 150, "adam")
    assert not paper.slope_weight and not paper.wide_share and not paper.even_share


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
