"""The script as its users run it: files on disk, --evaluate, bad input, other calibrations, the Python interface."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import deepham_ks as dk

SMOKE = dk.PRESETS["smoke"]
SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")


def snapshot(folder):
    """Every file's bytes; folders as None."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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


@pytest.fixture(scope="module")
def metrics(smoke_run):
    return json.loads((smoke_run[0] / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------ results on disk


def test_smoke_run_succeeds(smoke_run):
    folder, process = smoke_run
    assert process.returncode == 0, process.stderr
    out = process.stdout
    assert "no CUDA device found: running on the CPU" in out
    assert "departs from the authors' game_nn_n50" in out and f"n_agents {SMOKE.n_agents} (paper 50)" in out
    iterations = [line for line in out.splitlines() if line.startswith("iteration ")]
    assert len(iterations) == SMOKE.iterations and all("mean_K" in line for line in iterations)
    assert "verdict" in out and out.count("pass") + out.count("FAIL") >= 10
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
    assert not list(folder.rglob(".deepham-*"))
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
    cal = dk.Calibration()
    assert weights["calibration"] == dataclasses.asdict(cal) and weights["config"] == dataclasses.asdict(SMOKE)
    econ = dk.build_economy(cal, dtype=torch.float64)
    assert weights["scalings"] == {name: getattr(econ, name) for name in ("K_ss", "m_ss", "c_ss", "V_ss")}
    solution = dk.load(path)
    k, eps = torch.tensor([2.0, 50.0]).double(), torch.tensor([0, 1])
    K, z = torch.tensor(39.0).double(), torch.tensor(1)
    R, w = dk.prices(K, z, econ)
    m = R * k + dk.income(eps, w, z, econ)
    x = torch.stack([torch.log(m / econ.m_ss), k / econ.K_ss - 1, (8 * (K / econ.K_ss - 1.05)).expand(2),
                     2.0 * eps - 1, torch.ones(2).double()], 1)
    layers = {name: weight.double() for name, weight in weights["policy"].items()}
    h = torch.tanh(x @ layers["W1"].T + layers["b1"])
    h = torch.tanh(h @ layers["W2"].T + layers["b2"])
    share = torch.exp(h @ layers["w3"] + layers["b3"]).clamp(max=1.0)
    assert solution.next_capital(k, eps, 39.0, 1) == pytest.approx(((1 - share) * m).numpy(), rel=1e-10)
    assert solution.value(k, eps, 39.0, 1).shape == (2,)
    assert not np.allclose(solution.value(k, eps, 39.0, 1), econ.V_ss)


def test_metrics(metrics):
    assert {"network", "grid", "comparison", "verdict", "calibration", "config", "seed", "device", "versions",
            "seconds", "peak_memory_gb"} <= set(metrics)
    for solution in ("network", "grid"):
        for size, N in (("small", SMOKE.eval_agents), ("large", SMOKE.eval_agents_large)):
            figures = metrics[solution][size]
            assert figures["n_agents"] == N
            assert set(figures["bellman_own_c"]) == set(figures["bellman_best_c"]) == {"mean", "rmse", "max"}
            assert set(figures["euler_log10"]) == {"mean", "p99", "max"}
            assert {"mean", "std", "quantiles", "gini", "lorenz"} <= set(figures["capital"])
            assert set(figures["capital"]["quantiles"]) == {"1", "5", "25", "50", "75", "95", "99"}
            assert {"coefficients", "r2", "den_haan_max_percent"} <= set(figures["law_of_motion"])
            assert metrics["comparison"][size]["n_agents"] == N and metrics["comparison"][size]["w1"] >= 0
    assert {"training", "grid", "accuracy", "results"} <= set(metrics["seconds"])
    assert {"python", "torch", "numpy", "scipy", "matplotlib"} <= set(metrics["versions"])
    assert 0.05 < metrics["peak_memory_gb"]["host"] < 50
    assert metrics["seed"] == 0 and metrics["config"] == dataclasses.asdict(SMOKE)
    figures = [(n, x) for n, x in leaves({k: metrics[k] for k in ("network", "grid", "comparison")})]
    assert len(figures) > 100 and all(np.isfinite(x) for _, x in figures)


def test_metrics_are_json_for_everyone(smoke_run):
    strict_json(smoke_run[0] / "metrics.json")


# ------------------------------------------------------------------------------------------------ --evaluate, seeds


@pytest.fixture(scope="module")
def evaluated(smoke_run, deepham, tmp_path_factory):
    """The smoke run's weights alone in another directory, and --evaluate there."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copy(smoke_run[0] / "NN_weights_biases.pth", folder)
    return folder, deepham("--preset", "smoke", "--evaluate", "--output-dir", ".", cwd=folder)


def test_evaluate_reproduces_the_run(smoke_run, metrics, evaluated):
    folder, process = evaluated
    again = json.loads((folder / "metrics.json").read_text())
    for timing in ("seconds", "peak_memory_gb"):
        assert again.pop(timing)
    ours = {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_gb")}
    assert repr(list(leaves(again))) == repr(list(leaves(ours)))  # repr: NaN is NaN
    for path in (*smoke_run[0].glob("*.txt"), *smoke_run[0].glob("irf/*.csv"), smoke_run[0] / "NN_weights_biases.pth"):
        assert (folder / path.relative_to(smoke_run[0])).read_bytes() == path.read_bytes(), path.name
    assert {path.relative_to(folder) for path in folder.rglob("*.png")} == {
        path.relative_to(smoke_run[0]) for path in smoke_run[0].rglob("*.png")}
    assert "\niteration " not in process.stdout


def test_evaluate_exits_1_when_a_figure_fails(evaluated):
    """A smoke network is nowhere near the grid; a finished run of the same ends with 0 (test_smoke_run_succeeds)."""
    folder, process = evaluated
    rows = json.loads((folder / "metrics.json").read_text())["verdict"]
    assert not all(row["passed"] for row in rows)
    assert process.returncode == 1 and "FAIL" in process.stdout and not process.stderr


def test_same_seed_same_results(smoke_run, deepham, tmp_path):
    process = deepham("--preset", "smoke", "--seed", 0, cwd=tmp_path)  # and the usual directory
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "smoke"
    assert (folder / "results.txt").read_bytes() == (smoke_run[0] / "results.txt").read_bytes()


def test_another_seed_another_start():
    econ = dk.build_economy(dk.Calibration(), dtype=torch.float32)
    one, same, other = (dk.initial_state(econ, SMOKE, seed, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name in ("policy", "value", "k"):
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert not torch.equal(one["policy"], one["value"])


# ------------------------------------------------------------------------------------------------ other calibrations


@pytest.mark.parametrize("flags", [("--gamma", "2"), ("--mu", "0", "--tfp-shock", "0.02")], ids=" ".join)
def test_other_calibrations(deepham, tmp_path, flags):
    """Risk aversion 2 (the README's example), and Krusell & Smith's own economy without benefits, twice the shock."""
    process = deepham("--preset", "smoke", "--output-dir", ".", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name, value in zip(flags[::2], flags[1::2]):
        assert metrics["calibration"][name.removeprefix("--").replace("-", "_")] == float(value)
    figures = leaves({key: metrics[key] for key in ("network", "grid", "comparison")})
    assert all(np.isfinite(x) for _, x in figures)
    # 100 nodes, K of 50 households: the Euler error stays below 10^-2, the law of motion stays one
    assert metrics["grid"]["large"]["euler_log10"]["mean"] < -2
    assert min(metrics["grid"]["law_of_motion"]["r2"]) > 0.999
    solution, cal = dk.load(tmp_path / "NN_weights_biases.pth"), metrics["calibration"]
    assert dataclasses.asdict(solution.calibration) == cal
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


def test_risk_aversion_2_in_python():
    """The worked example without the command line: more risk, more precautionary saving of the poor employed."""
    cautious = dk.solve_grid(dk.Calibration(gamma=2.0), dk.SMOKE_GRID)
    log = dk.solve_grid(dk.Calibration(), dk.SMOKE_GRID)
    k = np.array([0.5, 2.0, 5.0])
    assert (cautious.next_capital(k, 1, 40.0, 0) > log.next_capital(k, 1, 40.0, 0)).all()


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
    (["--alpha", "0.99"], "--alpha"),
    (["--periods", "10"], "--periods"),
    (["--horizon", "1"], "--horizon"),
    (["--eval-drop", "60"], "--eval-drop"),
    (["--evaluate", "--resume"], "--evaluate"),
    (["--evaluate"], "--evaluate"),
    (["--output-dir", "a\nb"], "--output-dir"),
    (["--output-dir", "file.txt"], "--output-dir"),
    (["--output-dir", "file.txt/below"], "--output-dir"),
    (["--output-dir", "x" * 5000], "--output-dir"),
    (["--evaluate", "--output-dir", "nowhere"], "--evaluate"),
]


def refused(argv, capsys, folder):
    """Run main(argv) as refused: exit status 2, one line on stderr, nothing else said, no file touched."""
    before = snapshot(folder)
    assert dk.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.endswith("\n") and len(said.err) > 40
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


def test_load_without_a_file(tmp_path):
    with pytest.raises(dk.UserError):
        dk.load(tmp_path / "nothing.pth")


# ------------------------------------------------------------------------------------------------ help, import


def test_help_lists_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        dk.main(["--help"])
    assert end.value.code == 0
    said = "".join(capsys.readouterr().out.split())  # without white space: lines wrap anywhere
    for kind in (dk.Config, dk.Calibration, dk.Run):
        for item in dataclasses.fields(kind):
            assert "--" + item.name.replace("_", "-") in said
            assert "".join(f"{item.metadata['help']} (default {item.default!r}".split()) in said, item.name
            assert len(item.metadata["help"]) > 10
    assert f"smoke{SMOKE.n_agents!r}" in said


def test_presets_and_flags():
    """A flag changes its field and nothing else; presets keep theirs; the directory follows the preset."""
    cal, cfg, run = dk.parse([])
    assert (cal, cfg) == (dk.Calibration(), dk.Config()) and run.output_dir == "." and dk.PRESETS["default"] == cfg
    cal, cfg, run = dk.parse(["--preset", "paper", "--n-agents", "60", "--no-control-variate", "--gamma", "3"])
    assert cfg == dataclasses.replace(dk.PRESETS["paper"], n_agents=60, control_variate=False)
    assert cal == dk.Calibration(gamma=3.0) and run.output_dir == "runs/paper" and run.preset == "paper"
    paper = dk.PRESETS["paper"]
    assert (paper.n_agents, paper.hidden, paper.horizon, paper.optimizer) == (50, 24, 150, "adam")
    assert not paper.slope_weight and not paper.wide_share and not paper.unemployed_share


def test_import_only_defines(tmp_path):
    """No output, no file, no matplotlib, no thread or default of torch changed."""
    code = ("import sys, torch; before = torch.get_num_threads(), torch.get_default_dtype();"
            "state = torch.get_rng_state(); import deepham_ks;"
            "assert before == (torch.get_num_threads(), torch.get_default_dtype());"
            "assert torch.equal(state, torch.get_rng_state());"
            "assert not [name for name in sys.modules if name.split('.')[0] == 'matplotlib']")
    env = os.environ | {"PYTHONPATH": os.path.dirname(dk.__file__), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
