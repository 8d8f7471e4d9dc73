"""What a solution answers from Python, and what a run says of the economy: against brute force and definitions, network
and grid alike."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ECONOMIES, ROOT, SMOKE, dk

COARSE = dk.GridConfig(n_k=60, n_K=5, n_fine=150, n_K_fine=9, periods=3000, tolerance=1e-4)
CFG = dataclasses.replace(dk.PRESETS["smoke"], eval_periods=300, iterations=8)
SERIES = ("z", "K", "L", "Y", "C", "I", "R", "w")
STATISTICS = re.findall(r"`(\w+)`", (ROOT / "docs" / "output.md").read_text(encoding="utf-8").split(
    "## statistics.csv")[1].split("## metrics.json")[0])[2:]


@pytest.fixture(scope="module", autouse=True)
def quick_judge(rough_V):
    """A solution settles over fewer periods; nothing is compiled."""
    dk.compile_kernels("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk.Policy, "config", dataclasses.replace(dk.Config(), eval_periods=600))
        yield


def train(economy, **changes):
    return dk.solve(economy, dataclasses.replace(CFG, **changes), device="cpu", compile="none")


def example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_of_test_python", ROOT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def labour_flows():
    module = example("labour_flows")
    return module.economy(module.Calibration())


def groups():
    module = example("groups")
    return module.economy(module.Calibration(groups=2))


SOLUTIONS = {
    "network": lambda: train(None), "grid": None,
    "game": lambda: train(dataclasses.replace(dk.krusell_smith(), equilibrium="game")),
    "planner": lambda: train(dataclasses.replace(dk.krusell_smith(), equilibrium="planner"), iterations=3),
    "no z": lambda: train(ECONOMIES["one_z"]()),
    "labour moves": lambda: train(labour_flows(), learnt_moments=1),
    "labour moves, grid": lambda: dk.solve_grid(labour_flows(), dataclasses.replace(
        COARSE, n_L=3, n_L_fine=5, periods=2000)),
    "groups": lambda: train(groups(), moments="groups")}


@pytest.fixture(scope="module")
def made(smoke_grid):
    return {"grid": smoke_grid}


def solution_of(made, name):
    """The solution of that name, made where it is not there yet."""
    if name not in made:
        made[name] = SOLUTIONS[name]()
    return made[name]


@pytest.fixture(scope="module", params=SOLUTIONS)
def solved(request, made):
    """One solution after the other."""
    return solution_of(made, request.param)


@pytest.fixture(scope="module", params=("network", "grid"))
def either(request, made):
    """A network and a grid of the default economy."""
    return solution_of(made, request.param)


def gross_return(economy, K, z):
    a = economy.arrays
    return 1 - a.delta + a.alpha * a.TFP[z] * (K / a.L[z]) ** (a.alpha - 1)


# ------------------------------------------------------------------------------------------------ policies


def test_consumption_is_what_the_budget_leaves(either):
    a, k, s, z = either.economy.arrays, np.array([0.0, 3.0, 40.0])[:, None, None], np.arange(2)[:, None], np.arange(2)
    K = 38.5
    w = (1 - a.alpha) * a.TFP * (K / a.L) ** a.alpha
    m = gross_return(either.economy, K, z) * k + a.income[z, s] * w[z]
    c = either.consumption(k, s, K, z)
    assert c.shape == (3, 2, 2) and np.allclose(c, m - either.next_capital(k, s, K, z), rtol=1e-12)
    assert either.consumption(40, 1, K, 0).shape == ()


def test_mpc_is_a_difference_of_next_capital(either):
    k, K, z, windfall = np.array([0.0, 0.7, 30.0]), 38.5, 1, np.array([[0.5], [-0.3], [12.0]])
    k_more = k + windfall / gross_return(either.economy, K, z)
    inside = k_more >= 0
    saved = either.next_capital(k_more.clip(0), 0, K, z) - either.next_capital(k, 0, K, z)
    for i, j in np.argwhere(inside):
        assert either.mpc(k[j], 0, K, z, windfall[i, 0]) == pytest.approx(1 - saved[i, j] / windfall[i, 0], abs=1e-12)
    assert either.mpc(k, 0, K, z, 12.0).shape == (3,) and either.mpc(k[1:], 0, K, z, windfall[[0, 2]]).shape == (2, 2)
    for words in ((0.0, 0, K, z, -0.3), (30.0, 0, K, z, 1e6)):
        with pytest.raises(ValueError, match="outside"):
            either.mpc(*words)


def test_mpc_at_the_margin(made):
    """One where the limit binds; else the slope of consumption in cash."""
    grid = solution_of(made, "grid")
    assert grid.next_capital(0.0, 0, 39.0, 0) == 0 and grid.mpc(0.0, 0, 39.0, 0) == pytest.approx(1, abs=1e-9)
    k = np.array([5.0, 60.0])
    h = 1e-3
    slope = (grid.consumption(k + h, 1, 39.0, 1) - grid.consumption(k, 1, 39.0, 1)) / h
    assert grid.mpc(k, 1, 39.0, 1) == pytest.approx(slope / gross_return(grid.economy, 39.0, 1), rel=0.05)
    assert (np.diff(grid.mpc(np.linspace(1, 80, 9), 1, 39.0, 1)) < 0).all()  # the richer, the lower


# ------------------------------------------------------------------------------------------------ paths


def test_names_and_shapes_are_those_of_every_economy(solved):
    S = len(solved.econ.beta)
    k, mass = solved.distribution()
    assert k.ndim == 1 and mass.shape == (S, len(k)) and mass.sum() == pytest.approx(1) and (np.diff(k) > 0).all()
    assert mass.sum(1) == pytest.approx(solved.economy.arrays.shares.sum(0), abs=0.05)
    for households in (None, 50):
        path = solved.simulate(60, households, dates=[59, 7])
        assert all(getattr(path, name).shape == (60,) for name in SERIES) and path.dates == [7, 59]
        assert set(np.unique(path.z)) <= set(range(len(solved.econ.TFP))) and path.z.dtype.kind == "i"
        for k, mass in path.distributions:
            assert mass.shape == (S, len(k)) and mass.sum() == pytest.approx(1)
            assert households is None or len(k) == households
        found = path.statistics(hp=1600)
        assert sorted(found) == sorted(STATISTICS) and all(np.ndim(x) == 0 for x in found.values())
    response = solved.impulse_response(6, paths=4, households=20)
    assert list(response) == ["capital", "output", "consumption", "interest_rate"]
    assert all(x.shape == (3, 6) for x in response.values())
    c = solved.consumption([0.0, 1.0], 0, solved.K_mean, 0)
    assert c.shape == (2,) and (c > 0).all() and solved.mpc([0.0, 1.0], 0, solved.K_mean, 0).shape == (2,)


def test_goods_add_up_along_a_path_in_the_limit(solved):
    """Prices are marginal products, K is what the distribution holds, and C what its households consume by their own
    policy, moments and labour as they are: everything that is produced is consumed or invested."""
    a, path = solved.economy.arrays, solved.simulate(50, dates=range(0, 50, 7))
    Y = a.TFP[path.z] * path.K**a.alpha * path.L ** (1 - a.alpha)
    assert path.Y == pytest.approx(Y, rel=1e-12) and path.w == pytest.approx((1 - a.alpha) * Y / path.L, rel=1e-12)
    assert path.R == pytest.approx(1 - a.delta + a.alpha * Y / path.K, rel=1e-12)
    assert (1 - a.delta) * path.K[:-1] + path.I[:-1] == pytest.approx(path.K[1:], rel=1e-12)
    assert path.C + path.I == pytest.approx(path.Y, rel=1e-12)
    s = np.arange(len(solved.econ.beta))[:, None]
    seen = isinstance(solved, dk.Solution) and len(solved.net.M_mean)
    for t, (k, mass), section in zip(path.dates, path.distributions, path.sections):
        assert mass.sum(0) @ k == pytest.approx(path.K[t], rel=1e-9)
        assert (mass.sum(1) * a.labour[path.z[t]]).sum() == pytest.approx(path.L[t], rel=1e-6)
        somebody = mass.any(0)
        within = somebody & (k <= solved.reach()[0][1])
        M = section.at.M[0, 0].numpy() if seen else None
        L = path.L[t] if a.labour_moves else None
        c = solved.consumption(k[within], s, path.K[t], path.z[t], M=M, L=L)
        assert (mass[:, within] * c).sum() == pytest.approx(path.C[t], rel=3e-4)  # linear between nodes of K


def test_moments_of_a_path_are_those_of_its_cross_section(made):
    """A panel's households see the moments of their own cross-section, and L by exact shares."""
    solution = solution_of(made, "labour moves")
    path = solution.simulate(30, households=80, dates=[11, 29])
    for t, (k, mass) in zip(path.dates, path.distributions):
        s = mass.argmax(0)
        assert mass.max(0) == pytest.approx(1 / 80) and (mass > 0).sum() == 80 and k.mean() == pytest.approx(path.K[t])
        M = solution.moments(k, s)
        c = solution.consumption(k, s, path.K[t], path.z[t], M=M, L=path.L[t])
        assert c.mean() == pytest.approx(path.C[t], rel=1e-5)
        usual = solution.consumption(k, s, path.K[t], path.z[t]).mean()
        assert abs(usual / path.C[t] - 1) > 1e-5  # or M and L would make no difference


def test_mean_capital_is_the_judges(either):
    """On shocks of its own a long path has the mean and the spread that the judge finds, and so has the distribution;
    roughly where a network has hardly learnt, whose K swings."""
    near = 0.05 if isinstance(either, dk.GridSolution) else 0.25
    figures, _ = dk.judge_limit(either, dataclasses.replace(CFG, eval_periods=1000))
    path = either.simulate(1000, seed=5, dates=range(0, 1000, 50))
    k, mass = either.distribution()
    for people, nodes in ((mass.sum(0), k), (np.mean([m.sum(0) for _, m in path.distributions], 0), k)):
        mean = people @ nodes
        assert mean == pytest.approx(figures["capital"]["mean"], rel=0.02)
        assert np.sqrt(people @ (nodes - mean) ** 2) == pytest.approx(figures["capital"]["std"], rel=near)
    assert path.K.mean() == pytest.approx(figures["statistics"]["mean_K"], rel=0.02)
    assert abs(path.K[:200].mean() / path.K[-200:].mean() - 1) < near  # no transition
    again, other = either.simulate(40, seed=5), either.simulate(40, seed=6)
    assert np.array_equal(again.K, path.K[:40]) and not np.array_equal(again.z, other.z)


def test_numbers_of_no_use_are_refused(either):
    for words in ({"periods": 0}, {"periods": 9, "households": 1}, {"periods": 9, "dates": [9]},
                  {"periods": 9, "dates": [-1]}, {"periods": 9, "households": 0}):
        with pytest.raises(dk.UserError, match="simulate"):
            either.simulate(**words)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_of_households_by_brute_force(either):
    """A panel of 300 at one date: Gini by the double sum, shares of the three, fifteen, ... richest, deciles of 30."""
    path = either.simulate(12, households=300, dates=[11])
    found, (k, mass) = path.statistics(), path.distributions[0]
    s, K, z = mass.argmax(0), path.K[11], path.z[11]
    R, w, a = path.R[11], path.w[11], either.economy.arrays
    c, mpc = [of(k, s, K, z) for of in (either.consumption, either.mpc)]
    for name, x in (("wealth", k), ("consumption", c), ("income", (R - 1) * k + w * a.income[z, s])):
        gini = np.abs(x[:, None] - x).sum() / (2 * 300**2 * x.mean())
        assert found[f"gini_{name}"] == pytest.approx(gini, rel=1e-4)
    rich = np.sort(k)[::-1]
    for percent in (1, 5, 10, 20, 30):
        assert found[f"top_{percent}_percent_hold"] == pytest.approx(100 * rich[: 3 * percent].sum() / k.sum())
    assert found["mean_mpc"] == pytest.approx(mpc.mean(), rel=1e-4)
    deciles = mpc[np.argsort(k)].reshape(10, 30).mean(1)
    assert [found[f"mpc_decile_{i}"] for i in range(1, 11)] == pytest.approx(deciles, rel=1e-4)


def test_shares_below_zero_and_at_the_limit(economies):
    grid = dk.solve_grid(dataclasses.replace(economies["one_z"], k_min=-0.5), COARSE)
    everywhere = grid.simulate(30, households=400, dates=range(30))
    differ = [t for t, (k, mass) in enumerate(everywhere.distributions) if (k == -0.5).mean() != (
        grid.next_capital(k, mass.argmax(0), everywhere.K[t], everywhere.z[t]) == -0.5).mean()]
    path = grid.simulate(30, households=400, dates=differ[:1])  # where k at the limit and k' there are not as many
    found, (k, mass), t = path.statistics(), path.distributions[0], differ[0]
    k_next = grid.next_capital(k, mass.argmax(0), path.K[t], path.z[t])
    assert found["below_zero_percent"] == pytest.approx(100 * (k < 0).mean()) and (k < 0).any()
    assert found["at_limit_percent"] == pytest.approx(100 * (k_next == -0.5).mean()) and (k_next == -0.5).any()


def test_statistics_of_a_path_by_definition(either):
    path = either.simulate(300, seed=2)
    found = path.statistics()
    ln = {name: np.log(getattr(path, name)) for name in ("Y", "C", "I", "K", "R") if (getattr(path, name) > 0).all()}
    assert {"Y", "C", "K", "R"} <= set(ln)
    assert found["mean_K"] == path.K.mean() and found["K_over_Y"] == pytest.approx((path.K / path.Y).mean())
    assert found["interest_rate_percent"] == pytest.approx(100 * (path.R.mean() - 1))
    for name in set(ln) & set("YCI"):
        assert found[f"std_ln_{name}"] == pytest.approx(ln[name].std())
        for lag in (1, 4):
            want = np.corrcoef(ln[name][lag:], ln[name][:-lag])[0, 1]
            assert found[f"autocorr_{lag}_{name}"] == pytest.approx(want)
    for name in set(ln) & set("CIKR"):
        assert found[f"corr_{name}_Y"] == pytest.approx(np.corrcoef(ln[name], ln["Y"])[0, 1])
    r2 = []
    for z in range(2):
        here = path.z[:-1] == z
        r2.append(np.corrcoef(ln["K"][1:][here], ln["K"][:-1][here])[0, 1] ** 2)
    assert found["r2_law_of_K"] == pytest.approx(min(r2), abs=1e-9)
    filtered, cycle = path.statistics(hp=1600), dk.hp_filtered(ln["Y"], 1600)
    assert filtered["std_ln_Y"] == pytest.approx(cycle.std()) and filtered["mean_Y"] == found["mean_Y"]
    assert filtered["corr_C_Y"] == pytest.approx(np.corrcoef(dk.hp_filtered(ln["C"], 1600), cycle)[0, 1])
    assert filtered["gini_wealth"] == found["gini_wealth"]
    for hp in (-1, 0, math.nan, "1600"):
        with pytest.raises(dk.UserError, match="hp"):
            path.statistics(hp=hp)


def test_the_hp_filter():
    """A line has no cycle; without smoothing there is none either; with a great deal of it the trend is the line of
    least squares; and the first-order condition of its least-squares problem holds."""
    rng, t = np.random.default_rng(0), np.arange(80.0)
    x = np.sin(t / 5) + rng.normal(size=80)
    assert np.abs(dk.hp_filtered(3 - 0.2 * t, 1600)).max() < 1e-9 and np.abs(dk.hp_filtered(x, 0.0)).max() < 1e-12
    assert dk.hp_filtered(x, 1e10) == pytest.approx(x - np.polyval(np.polyfit(t, x, 1), t), abs=1e-4)
    cycle = dk.hp_filtered(x, 1600)
    bend = np.diff(np.eye(80), 2, axis=0)
    assert cycle == pytest.approx(1600 * bend.T @ bend @ (x - cycle), abs=1e-9) and abs(cycle.sum()) < 1e-9


def test_what_does_not_move_has_no_correlation(made):
    still = solution_of(made, "no z").simulate(40).statistics()
    assert all(np.isnan(still[name]) for name in ("corr_C_Y", "autocorr_1_Y", "r2_law_of_K"))
    assert still["std_ln_Y"] < 1e-6 and 0 < still["gini_wealth"] < 1


# ------------------------------------------------------------------------------------------------ responses


def test_impulse_response_begins_with_the_step_of_z(either, made):
    a = either.economy.arrays
    found = either.impulse_response(5, paths=6, households=40)
    step = 100 * (a.TFP[0] * a.L[0] ** (1 - a.alpha) / (a.TFP[1] * a.L[1] ** (1 - a.alpha)) - 1)
    assert found["output"][:, 0] == pytest.approx([step] * 3, rel=1e-4) and (found["capital"][:, 0] == 0).all()
    assert (found["output"][1] <= found["output"][2]).all()
    still = solution_of(made, "no z").impulse_response(4, paths=3, households=20)
    assert all((x == 0).all() for x in still.values())


def test_households_too_few_for_a_solution_are_refused(smoke_grid, monkeypatch):
    """K of two of them goes where no policy was found."""
    few = "^households 2: in .*% of the periods .*; take more"
    with pytest.raises(dk.UserError, match=few):
        smoke_grid.simulate(100, households=2, seed=3)
    smoke_grid.simulate(100, households=50, seed=3)
    smoke_grid.impulse_response(5, paths=4, households=2)
    monkeypatch.setattr(dk, "OUTSIDE", 0.0)
    with pytest.raises(dk.UserError, match=few):
        smoke_grid.impulse_response(5, paths=4, households=2)


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_prints_and_writes_what_people_quote(smoke_run):
    folder, process = smoke_run
    lines = (folder / "statistics.csv").read_text().splitlines()
    assert lines[0] == "statistic,network,grid"
    rows = {name: [float(x) for x in numbers] for name, *numbers in (line.split(",") for line in lines[1:])}
    assert sorted(rows) == sorted(STATISTICS)
    metrics = json.loads((folder / "metrics.json").read_text())
    for i, name in enumerate(("network", "grid")):
        limit = metrics[name]["limit"]
        assert {k: pytest.approx(x, rel=1e-6, nan_ok=True) for k, x in limit["statistics"].items()} == {
            k: x[i] for k, x in rows.items()}
        assert limit["statistics"]["gini_wealth"] == pytest.approx(limit["capital"]["gini"])
        assert limit["statistics"]["mean_K"] == pytest.approx(limit["capital"]["mean"], rel=0.01)  # every 20th period
    shown = process.stdout[: process.stdout.index("results in")]
    assert len(dk.QUOTED) == 11 and set(dk.QUOTED) <= set(rows)
    for name, words in dk.QUOTED.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{words}  ")]
        assert [float(x) for x in line[len(words) :].split()] == pytest.approx(rows[name], rel=6e-4)


def test_statistics_come_before_the_verdict_and_without_a_grid(tmp_path, capsys, quick):
    argv = [*SMOKE, "--preset", "default", "--grid", "none", "--hidden", "6", "--output-dir", str(tmp_path / "run")]
    for name in ("n_agents", "n_economies", "periods", "horizon", "batch", "iterations", "averaging", "eval_agents",
                 "eval_economies", "eval_periods", "irf_paths", "irf_agents", "irf_periods"):
        argv += [dk.flag(name), str(getattr(dk.PRESETS["smoke"], name))]
    assert dk.main(argv) in (0, 1)
    out = capsys.readouterr().out
    assert out.index("Gini of wealth") < out.index("verdict")
    assert (tmp_path / "run" / "statistics.csv").read_text().startswith("statistic,network\n")


def test_responses_are_read_by_numpy(smoke_run):
    for path in (smoke_run[0] / "irf").iterdir():
        assert path.read_text().startswith("# ")
        assert np.loadtxt(path, delimiter=",").shape == (dk.PRESETS["smoke"].irf_paths, dk.PRESETS["smoke"].irf_periods)


def test_every_axis_of_every_picture_is_labelled(tmp_path, monkeypatch):
    """In its own panel; a panel with a strip below shares its x."""
    import matplotlib.figure

    seen = {}
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda fig, path, **_: seen.update({path.name: fig}))
    network = train(None, learnt_moments=1, iterations=2, eval_periods=60)
    with dk.torch.no_grad():
        figures, arrays = dk.compare({"network": network}, network.config)
    dk.draw_pictures(tmp_path, {"network": network}, figures, arrays)
    assert {"consumption_functions.png", "euler_errors.png", "lorenz_curves.png", "policy_functions.png",
            "bellman_errors.png", "moments.png", "capital_path.png", "distribution_validation.png",
            "impulse_responses.png", "training_history.png"} == set(seen)
    for name, fig in seen.items():
        strips = [ax for ax in fig.axes if ax.get_ylabel() == "difference"]
        assert all(ax.get_ylabel() for ax in fig.axes), name
        assert all(ax.get_xlabel() for ax in fig.axes if not strips or ax in strips), name


def test_pictures_of_solutions_that_know_other_k_and_K(smoke_grid, tmp_path, monkeypatch):
    """Each is drawn where there is one: a grid up to its last k, and nowhere where its nodes of K are elsewhere."""
    import matplotlib.figure

    seen, network = {}, train(None, iterations=2, eval_periods=60)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda fig, path, **_: seen.update({path.name: fig}))
    with dk.torch.no_grad():
        figures, arrays = dk.compare({"network": network, "grid": smoke_grid}, network.config)
    for name, changes, known in (("k", {"k_max": 20.0}, lambda k: k <= 20),
                                 ("K", {"K": 2 * smoke_grid.K}, lambda k: k < 0)):
        (tmp_path / name).mkdir()
        grid = dataclasses.replace(smoke_grid, **changes)
        dk.draw_pictures(tmp_path / name, {"network": network, "grid": grid}, figures, arrays)
        for file in ("policy_functions.png", "consumption_functions.png"):
            of_network, of_grid = seen[file].axes[0].lines
            assert of_network.get_xdata()[-1] > 20 and np.isfinite(of_network.get_ydata()).all()
            assert (np.isfinite(of_grid.get_ydata()) == known(of_grid.get_xdata())).all()


# ------------------------------------------------------------------------------------------------ the field's models


def test_the_tables_of_krusell_and_smith():
    """Hours, benefits and discount factors as the paper has them; labour follows from z in each."""
    module = example("krusell_smith_1998")
    for model, gamma, S, k_min in (("benchmark", 1, 2, 0), ("risk-aversion", 5, 2, 0), ("stochastic-beta", 1, 6, -2.4)):
        economy = module.economy(module.Calibration(model=model))
        a = economy.arrays
        assert (a.gamma, len(a.beta), a.k_min, a.labour_moves) == (gamma, S, k_min, False)
        assert a.L == pytest.approx(0.3271 * np.array([0.9, 0.96]), abs=1e-4)
        assert (a.income[:, ::2] * 2.387).max() == pytest.approx(0.07 if S == 6 else 0, abs=1e-9)
        assert (a.shares * a.income).sum(1) == pytest.approx((a.shares * a.labour).sum(1), rel=1e-9)
    assert np.unique(a.beta) == pytest.approx([0.9858, 0.9894, 0.9930])
    of_type = a.shares.sum(0).reshape(3, 2).sum(1)
    assert of_type == pytest.approx([0.1, 0.8, 0.1], abs=1e-6)


def test_the_interest_rate_of_aiyagari():
    """2.915 percent by an independent solver; the labour process by its own moments."""
    module = example("aiyagari")
    x, P = module.tauchen(0.4, 0.6)
    assert P.sum(1) == pytest.approx(np.ones(7)) and P[3] == pytest.approx(P[3, ::-1]) and x[-1] == pytest.approx(1.2)
    shares = np.linalg.matrix_power(P, 200)[0]
    assert shares @ (P @ x * x) / (shares @ x**2) == pytest.approx(0.6, abs=0.02)
    grid = dk.solve_grid(module.economy(module.Calibration()), dk.SMOKE_GRID)
    assert grid.simulate(5, dates=[]).statistics()["interest_rate_percent"] == pytest.approx(2.915, abs=0.03)


# ------------------------------------------------------------------------------------------------ the page


def test_the_session_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """On the committed weights; on others of the default economy while these are of another format."""
    monkeypatch.chdir(tmp_path)
    try:
        dk.load(ROOT / dk.WEIGHTS)
        shutil.copy(ROOT / dk.WEIGHTS, tmp_path)
    except dk.UserError:
        train(None).save(tmp_path / dk.WEIGHTS)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"),
                         re.DOTALL | re.MULTILINE)
    assert 25 <= len(code.splitlines()) <= 45
    names = {}
    exec(compile(code, "python.md", "exec"), names)
    assert names["c"].shape == (2, 161) and names["mpc"].shape == names["saved"].shape == (161,)
    assert np.abs(names["left"]).max() < 1e-9 and names["mean"].shape == (40,) and names["mass_200"].sum() > 0.999
    assert names["panel"].K.shape == names["path"].K.shape == (400,) and set(names["found"]) == set(STATISTICS)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][-2:] == ["network", "grid"]
    assert [path.name for path in tmp_path.iterdir()] == [dk.WEIGHTS]


def test_what_numpy_gives_is_kept_in_a_file_that_can_be_read(tmp_path):
    """Names, words and numbers of numpy become Python's: a weights file holds no others."""
    base = dk.krusell_smith()
    economy = dataclasses.replace(base, s_names=np.array(["a", "b"]), equilibrium=np.str_("market"))
    sizes = dataclasses.replace(dk.PRESETS["smoke"], hidden=np.int64(8), settle=np.float64(1e-4), iterations=1)
    dk.solve(economy, sizes, seed=np.int64(1), device="cpu", compile="none").save(tmp_path / "x.pth")
    assert dk.load(tmp_path / "x.pth").economy.s_names == ("a", "b")


def test_a_file_of_an_economy_with_one_table_more_is_refused(tmp_path):
    base = dk.krusell_smith()
    labour = {"income": None, "labour": base.income, "benefit": [[0.1, 0.0]]}
    sizes = dataclasses.replace(dk.PRESETS["smoke"], iterations=1)
    with_benefit = dataclasses.replace(base, **labour)
    dk.solve(with_benefit, sizes, device="cpu", compile="none", output_dir=tmp_path)
    with pytest.raises(dk.UserError, match="economy.benefit"):
        dk.solve(dataclasses.replace(with_benefit, benefit=None), sizes, device="cpu", compile="none",
                 output_dir=tmp_path, resume=True)


@pytest.mark.parametrize("call", [
    lambda x: x.simulate(10.0), lambda x: x.simulate(10, seed=-1), lambda x: x.simulate(10, dates=10),
    lambda x: x.impulse_response(0), lambda x: x.impulse_response(5, households=1)])
def test_numbers_of_no_use_are_refused_in_one_line(solved, call):
    with pytest.raises(dk.UserError):
        call(solved)


def test_a_group_of_nobody_is_refused():
    with pytest.raises(dk.UserError, match="group: nobody is ever in a state of group 1"):
        dk.Economy(alpha=0.36, delta=0.1, beta=0.9, TFP=[1.0], P_z=[[1.0]], labour=[1.0, 1.0], Pi=np.eye(2),
                   shares=[[1.0, 0.0]], group=[0, 1])


def test_types_for_ever_are_judged_as_far_as_was_learnt(made):
    """Nobody goes so far and comes back: further out savings that nothing has taught may grow for ever."""
    solution = dk.Solution(solution_of(made, "groups").weights)
    solution.k_max = 1.2 * solution.K_mean  # where much capital lies
    assert solution.reach()[0][1] == pytest.approx(solution.k_max)
