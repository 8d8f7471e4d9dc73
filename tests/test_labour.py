"""Labour flows: who works depends on the history of z, so aggregate labour is one more state of the economy. Goods add
up, taxes pay for benefits, shares are exact, and the solutions know L."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import axes_of, dk, example, flows, main
from test_cli import EXAMPLES, FILES, leaves, run_script, strict_json
from test_nothing_lost import one_line, tree

F64 = torch.float64
GRID = dk.GridConfig(n_k=60, n_K=5, n_L=3, n_fine=150, n_K_fine=9, n_L_fine=5, periods=2000, tolerance=1e-4)


def three():
    """Unemployed, employed at low and at high pay."""
    to_bad = [[0.80, 0.18, 0.02], [0.06, 0.90, 0.04], [0.03, 0.05, 0.92]]
    to_good = [[0.55, 0.40, 0.05], [0.02, 0.91, 0.07], [0.01, 0.03, 0.96]]
    return dk.Economy(alpha=0.36, delta=0.025, beta=0.99, TFP=[0.99, 1.01], P_z=[[0.9, 0.1], [0.1, 0.9]],
                      Pi=np.array([[to_bad, to_good]]), labour=[0.0, 0.7, 1.5], benefit=[0.3, 0.0, 0.0])


MAKE = {"flows": flows, "three": three, "default": dk.krusell_smith}


@pytest.fixture(scope="module", autouse=True)
def rough(rough_V):
    pass


@pytest.fixture(scope="module", params=MAKE)
def economy(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module", params=["flows", "three"])
def moving(request):
    """One whose labour depends on the history of z."""
    return MAKE[request.param]()


class Saver(dk.Policy):
    """Saves by a rule of all that a household sees, labour too."""

    def __init__(self, economy):
        self.economy, self.econ = economy, economy.tables()

    def policy(self, at):
        m, _ = dk.cash_on_hand(at, self.econ)
        return self.econ.k_min + (0.95 - 0.01 * at.s) * (m - self.econ.k_min)


def path_of(economy, periods=400):
    """K along a path of Saver's histogram, and (z, mass, k', section) of every period."""
    saver, kept = Saver(economy), []
    axes = dk.Axes(dk.power_grid(200, 0.0, 90.0, 3.0), np.linspace(5, 40, 36), dk.labour_nodes(economy, 5))
    z_path = dk.draw_z_path(periods, economy.arrays.P_z, np.random.default_rng(3))
    mass = dk.dispersed_mass(axes.k, 20.0, z_path[0], economy)
    K_path, _ = dk.simulate_histogram(dk.histogram_policy(saver, axes), axes, mass, z_path, economy,
                                      lambda t, *of: kept.append((z_path[t], *of)))
    return K_path, [(*of, dk.histogram_section(saver, axes.k, *of[1:], of[0])) for of in kept]


# ------------------------------------------------------------------------------------------------ adding up


def test_goods_add_up_in_every_period(economy):
    """Y + (1 - delta) K = C + K', with Y by the labour that the histogram supplies, and taxes pay for benefits: what
    households earn is w L."""
    a, (K_path, periods) = economy.arrays, path_of(economy)
    for (z, mass, k_next, section), K, K_next in zip(periods, K_path, K_path[1:]):
        at, weight = section.at, section.weight
        L = mass.sum(1) @ (a.labour[z] if a.labour_moves else a.income[z])
        Y = a.TFP[z] * K**a.alpha * L ** (1 - a.alpha)
        C = (weight * (dk.cash_on_hand(at, economy.tables())[0] - section.k_next)).mean().item()
        assert (section.k_next - Saver(economy).policy(at)).abs().max() < 2e-3 * K  # tables are linear in K and L
        assert Y + (1 - a.delta) * K - C - K_next == pytest.approx(0, abs=1e-10 * Y)
        assert dk.output(at, economy.tables()).item() == pytest.approx(Y, rel=1e-12)
        earned = (weight * dk.earnings(at, economy.tables())[0]).mean().item()
        assert earned == pytest.approx((1 - a.alpha) * Y, rel=1e-12)
    assert a.labour_moves == (np.ptp([of[1].sum(1)[0] for of in periods if of[0] == 0]) > 1e-3)


def test_goods_add_up_where_households_are_at_their_shares(moving):
    """What cross_section() expects of next period: labour and tax for each z', by the shares as they will be."""
    a, (_, periods) = moving.arrays, path_of(moving, 60)
    for (z, mass, _, section), (z_next, after, *_) in zip(periods, periods[1:]):
        L, tax = section.ahead.labour[0, 0, z_next].tolist()
        p = after.sum(1)
        assert L == pytest.approx(p @ a.labour[z_next], rel=1e-12)
        assert tax * L == pytest.approx(p @ a.benefit[z_next], rel=1e-12)


def test_shares_along_a_path_are_exact(economy, rng):
    """p' = p Pi[z, z'], in 300 periods of three small economies against loops in long double; in float32 up to the
    rounding of where it starts. Those households who are drawn do not move it."""
    a = economy.arrays
    for dtype, miss in ((F64, 1e-14), (torch.float32, 1e-7)):
        econ = economy.tables(dtype=dtype)
        panel = dk.initial_panel(3, 4, econ, 20.0, rng)
        p = (a.shares / a.shares.sum(1, keepdims=True)).astype(np.longdouble)[panel.z[:, 0]]
        path = list(dk.simulate(lambda at, weight: at.k, panel, 300, econ, rng))
        for (now, at, _), (_, then, _) in zip(path, path[1:]):
            found = now.p
            if not a.labour_moves:
                assert found.shape == (3, 0) and at.labour.shape == (3, 1, 0)
                continue
            assert found.dtype == F64 and np.abs(found.numpy() - p).max() < miss
            z, z_next = at.z[:, 0].numpy(), then.z[:, 0].numpy()
            L = (p * a.labour[z]).sum(1)
            want = np.stack([L, (p * a.benefit[z]).sum(1) / L], 1)
            assert at.labour.dtype == dtype and at.labour[:, 0].numpy() == pytest.approx(
                want.astype(float), rel=1e-12 if dtype == F64 else 1e-6)
            p = np.einsum("bi,bij->bj", p, a.Pi[z, z_next].astype(np.longdouble))


def test_a_panel_of_many_households_has_these_shares(moving, rng):
    """20,000 households along the path: their shares are p up to sampling noise, and so is what they supply."""
    econ = moving.tables()
    panel = dk.initial_panel(2, 20_000, econ, 20.0, rng)
    for (*_, p), at, _ in dk.simulate(lambda at, weight: at.k, panel, 40, econ, rng):
        found = torch.nn.functional.one_hot(at.s, p.shape[1]).double().mean(1)
        assert (found - p).abs().max() < 4.5 * 0.5 / 20_000**0.5


# ------------------------------------------------------------------------------------------------ tables


def test_the_default_economy_in_labour_and_benefits(econ):
    """Where shares follow from z both forms are the same economy: no table that households meet differs."""
    cal = dk.Calibration()
    old, new = dk.krusell_smith(), dataclasses.replace(
        dk.krusell_smith(), income=None, labour=[0.0, cal.l_bar], benefit=[cal.mu, 0.0])
    assert not new.arrays.labour_moves and new.arrays.usual.shape == (2, 0)
    for name in ("income", "L", "P", "P_z", "Pi", "shares", "annuity", "beta", "TFP", "sees_s", "weight"):
        assert getattr(new.arrays, name) == pytest.approx(getattr(old.arrays, name), rel=1e-13), name
    assert [getattr(new, name) for name in ("K_ss", "c_ss", "R_ss", "w_ss")] == pytest.approx(
        [getattr(old, name) for name in ("K_ss", "c_ss", "R_ss", "w_ss")], rel=1e-13)


def test_labour_next_period_is_linear_where_there_are_two_states():
    """L' = a + b L by (z, z'), and benefits by z, exactly: along a path that starts anywhere."""
    a = flows().arrays
    z_path, p = dk.draw_z_path(2000, a.P_z, np.random.default_rng(8)), np.array([0.6, 0.4])
    for z, z_next in zip(z_path, z_path[1:]):
        after = p @ a.Pi[z, z_next]
        L, L_next = p @ a.labour[z], after @ a.labour[z_next]
        assert [1, L] @ a.L_law[z, z_next] == pytest.approx(L_next, abs=1e-12)
        assert [1, L] @ a.benefit_law[z] == pytest.approx(p @ a.benefit[z], abs=1e-12)
        p = after
    assert a.L_r2 == pytest.approx(1, abs=1e-12) and 0.99 < three().arrays.L_r2.min() < 1 - 1e-4


def test_range_of_labour_holds_every_path(moving):
    """And is reached: a z that lasts comes near its end."""
    a, rng = moving.arrays, np.random.default_rng(9)
    z_path = dk.draw_z_path(20_000, a.P_z, rng)
    p = dk.share_path(a, z_path, a.shares[z_path[0]] / a.shares[z_path[0]].sum())[200:]
    for z in range(2):
        L = p[z_path[200:] == z] @ a.labour[z]
        low, high = a.L_range[z]
        assert low - 1e-3 < L.min() and L.max() < high + 1e-3
        assert L.min() - low < 0.2 * (high - low) and high - L.max() < 0.2 * (high - low)


# ------------------------------------------------------------------------------------------------ refused


def spells(benefit):
    """At usual unemployment a benefit of 2.2 wages takes 75% of earnings in the bad state; after a long time in it,
    when a third is unemployed, 110%."""
    return {"benefit": [benefit, 0.0]}


REFUSED = {
    "negative labour": ({"labour": [-0.1, 1.0]}, "labour: -0.1 is not in"),
    "nobody works": ({"labour": [0.0, 0.0]}, "labour: nobody supplies any"),
    "nobody works in one state": ({"labour": [[0.0, 1.0], [0.0, 0.0]]}, "labour: nobody supplies any"),
    "a benefit that nobody can pay": (spells(2.2), "benefit: takes a tax of 110% of labour income on some path"),
    "a negative benefit": (spells(-0.1), "benefit: -0.1 is not in"),
    "labour of another shape": ({"labour": np.ones((3, 2))}, "labour: give numbers of shape (2, 2)"),
    "labour of words": ({"labour": ["none", "all"]}, "labour: "),
    "no labour": ({"labour": None}, "labour: "),
    "labour in logs": ({"labour": [-2.0, 0.1]}, "labour: -2 is not in (-1e-12, inf); logs? take exp"),
    "a state that does not recur": ({"P_z": [[0.9, 0.1], [0.0, 1.0]]}, "P_z: z = 0 does not recur"),
    "shares that do not stay": ({"shares": [[0.25, 0.25], [0.25, 0.25]]}, "shares: not a stationary distribution"),
    "income beside labour": ({"income": [0.4, 1.0]}, "income: takes the place of labour and benefit"),
    "L beside labour": ({"L": [0.9, 1.0]}, "L: follows from labour and the shares of s"),
    "income by z": ({"labour": None, "benefit": None, "income": [0.4, 1.0]}, "give labour and benefit in place"),
    "income and L by z": ({"labour": None, "benefit": None, "income": [0.4, 1.0], "L": [0.8571, 0.9583]},
                          ""),
}


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_bad_tables_are_refused_in_one_line(tmp_path, capsys, changes, words):
    """From Python and, as the economy of a script, with status 2."""
    with pytest.raises(dk.UserError) as error:
        dataclasses.replace(flows(), **changes)
    assert words in str(error.value)
    status = dk.main(["--preset", "smoke", "--device", "cpu", "--output-dir", str(tmp_path / "run")],
                     economy=lambda cal: dataclasses.replace(flows(), **changes))
    assert status == 2 and str(error.value) in one_line(capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_a_benefit_that_every_path_can_pay_is_taken():
    """At 1.9 wages the tax is 95% after a long time in the bad state."""
    made = dataclasses.replace(flows(), **spells(1.9))
    assert (made.arrays.income > 0).all() and 0.5 < made.arrays.usual[0, 1] < 0.95


def test_a_flag_of_the_example_that_nobody_can_pay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, EXAMPLES / "labour_flows.py", "--preset", "smoke", "--separation-bad", "0.9") == 2
    assert "benefit: takes a tax of" in one_line(capsys.readouterr().err) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ solutions


@pytest.fixture(scope="module")
def grids():
    rough = dataclasses.replace(GRID, n_k=40, n_fine=100, tolerance=1e-3)
    return {"flows": dk.solve_grid(flows(), GRID), "three": dk.solve_grid(three(), rough)}


@pytest.fixture(scope="module")
def networks():
    """Networks that have hardly learnt, but see L."""
    cfg = dataclasses.replace(dk.PRESETS["smoke"], n_agents=40, batch=128, hidden=10, iterations=8, eval_periods=60)
    return {name: dk.solve(MAKE[name](), cfg, device="cpu", compile="none") for name in ("flows", "three")}


def test_training_uses_labour(networks):
    """Errors fall, and the column of L, which begins at zero, does not stay there."""
    for name, network in networks.items():
        residual = network.weights["history"]["policy_residual"]
        assert residual[-1] < residual[0] / 2, name
        column = dk.N_OWN + network.econ.sees.shape[2]
        assert network.net.layers[0].shape[1] == column + 1 and network.net.layers[0][:, column].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["flows", "three"])
@pytest.mark.parametrize("of", ["networks", "grids"])
def test_policies_and_values_depend_on_labour(request, of, name):
    """More labour means other prices and another policy; without L it is as usual at z; outside its range, and where
    there is no such state, it is refused."""
    solution = request.getfixturevalue(of)[name]
    a, K, z = solution.economy.arrays, solution.K_mean, np.arange(2)
    k = K * np.array([0.3, 1.0, 2.0])[:, None]
    (low, high), usual = a.L_range.T, a.usual[:, 0]
    for function in (solution.next_capital, solution.value):
        at_low, at_high, as_usual = [function(k, 1, K, z, L=L) for L in (low, high, usual)]
        assert at_low.shape == (3, 2) and (np.abs(at_high / at_low - 1) > 1e-4).all()
        # of three states the tax follows from L by a regression, which is not exact at the usual L
        assert function(k, 1, K, z) == pytest.approx(as_usual, rel=1e-12 if name == "flows" else 1e-3)
        for bad in (low - 0.01, high + 0.01, -1.0, math.inf):
            with pytest.raises(ValueError, match="^L = .* is outside"):
                function(k, 1, K, z, L=bad)


def test_labour_is_no_argument_where_it_follows_from_z(smoke_grid):
    with pytest.raises(ValueError, match="L follows from z"):
        smoke_grid.next_capital(40.0, 1, 39.0, 1, L=1.0)


def test_grid_solves_its_equations(grids):
    """The law of motion forecasts K on the histogram's path, and Euler errors in the limit are small, on few nodes."""
    for name, grid in grids.items():
        assert (grid.alm_r2 > 0.9999).all() and grid.alm_coefficients.shape == (2, 4)
        assert grid.L.shape == (2, 5) and grid.table.shape[:2] == (2, len(grid.econ.beta))
        assert any("R2 of the law of labour" in note for note in grid.notes) == (name == "three")
    cfg = dataclasses.replace(dk.PRESETS["smoke"], eval_periods=300)
    figures, arrays = dk.judge_limit(grids["flows"], cfg)
    assert figures["euler_log10"]["mean"] < -3.5 and figures["bellman_own_c"]["mean"] < 5e-3
    assert figures["law_of_motion"]["den_haan_max_percent"] < 0.5
    # without L in it the law of motion is far worse: what L is there for
    axes, a = axes_of(grids["flows"]), flows().arrays
    z_path = dk.draw_z_path(2000, a.P_z, np.random.default_rng(2))
    mass = dk.dispersed_mass(axes.k, grids["flows"].K_mean, z_path[0], flows())
    K, _ = dk.simulate_histogram(grids["flows"].table.numpy(), axes, mass, z_path, flows())
    labour = dk.labour_along(flows(), z_path, mass)
    missed = {seen: 1 - dk.law_of_motion(*map(torch.from_numpy, (K[200:, None], of[200:, None], z_path[200:, None])),
                                         torch.zeros(2))[1].min().item()
              for seen, of in ((True, labour), (False, labour[:, :0]))}
    assert missed[True] < missed[False] / 20


def test_regression_recovers_a_law_with_labour(rng):
    """ln K' = a + b ln K + c L + d L^2 by z."""
    law = torch.tensor([[0.1, 0.96, 0.2, -0.05], [0.15, 0.955, 0.1, 0.02]], dtype=F64)
    z, L = torch.randint(2, (400, 2), generator=rng), 0.8 + 0.2 * torch.rand(400, 2, generator=rng, dtype=F64)
    ln_K, labour = torch.full((400, 2), 3.5, dtype=F64), torch.stack([L, 0 * L], -1)
    for t in range(399):
        ln_K[t + 1] = dk.by_law(law[z[t]], ln_K[t], labour[t])
        now = torch.stack([ln_K[t, 0] ** 0, ln_K[t, 0], L[t, 0], L[t, 0] ** 2])
        assert ln_K[t + 1, 0].item() == pytest.approx((law[z[t, 0]] @ now).item(), rel=1e-13)
    found, r2 = dk.law_of_motion(torch.exp(ln_K), labour, z, torch.zeros(2))
    assert torch.allclose(found, law, atol=1e-7) and torch.allclose(r2, torch.ones(2, dtype=F64))


# ------------------------------------------------------------------------------------------------ end to end


def test_the_example_from_training_to_evaluate(tmp_path, monkeypatch, no_pictures, capsys):
    """Every file, finite figures of network and grid; --evaluate gets those of the network from the weights alone. The
    judge's tables have few nodes of K and L, and pictures are not drawn."""
    monkeypatch.setattr(dk.GridConfig, "n_K_fine", 9)
    monkeypatch.setattr(dk.GridConfig, "n_L_fine", 3)
    monkeypatch.setattr(dk, "SMOKE_GRID", dataclasses.replace(dk.SMOKE_GRID, n_fine=150))
    sizes = [f"--grid-{name}={size}" for name, size in (("n-k", 60), ("n-K", 4), ("periods", 2000))]
    folder, flags = tmp_path / "run", ["--preset", "smoke", "--device", "cpu", "--compile", "none", "--output-dir"]
    run = example_run(monkeypatch, capsys, *sizes, "--grid-tolerance=1e-3", *flags, folder)
    assert "no verdict" in run and set(tree(folder)) == FILES
    found = strict_json(folder / "metrics.json")
    assert found["calibration"]["finding_bad"] == 0.1 and found["economy"]["labour"] == [[0, 1], [0, 1]]
    assert found["economy"]["L"] == pytest.approx(flows().arrays.L)
    for name in ("network", "grid"):
        assert len(found[name]["limit"]["law_of_motion"]["coefficients"][0]) == 4
        missing = {path for path, x in leaves(found[name]) if x is None and not path.endswith(".limit.n_agents")}
        assert not missing
    weights = dk.load(folder / dk.WEIGHTS)
    assert weights.economy.arrays.labour_moves and np.isfinite(weights.next_capital(10.0, 0, weights.K_mean, 1, L=0.9))
    (folder / "metrics.json").unlink()
    example_run(monkeypatch, capsys, "--grid", "none", "--evaluate", *flags, folder)
    again = strict_json(folder / "metrics.json")
    for name in ("network", "calibration", "economy", "config", "seed", "convergence"):
        assert again[name] == found[name], name
    status, _, err = main(folder, "--evaluate")  # the default economy's script
    assert status == 2 and "is of another run" in one_line(err)


def example_run(monkeypatch, capsys, *flags):
    """What the example prints."""
    status = run_script(monkeypatch, EXAMPLES / "labour_flows.py", *flags)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def test_calibration_of_the_example():
    """Stationary unemployment of a z that stays: separation over separation and finding."""
    module = example("labour_flows")
    a = module.economy(module.Calibration(finding_bad=0.2, separation_bad=0.1)).arrays
    assert a.L_range[0, 0] == pytest.approx(1 - 0.1 / 0.3, abs=1e-9) and a.benefit[0].tolist() == [0.4, 0.0]
