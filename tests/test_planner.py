"""Market, game, planner: Delta against automatic differentiation, brute force and the constrained-efficient economy."""

import dataclasses
import importlib.util
import itertools
import math

import pytest
import torch
from conftest import ROOT, dk, one_z, toy

N, T = 6, 5


@pytest.fixture(scope="module")
def davila():
    spec = importlib.util.spec_from_file_location("davila", ROOT / "examples" / "davila.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decided_by(economy, equilibrium, **changes):
    return dataclasses.replace(economy, equilibrium=equilibrium, **changes)


def economy_of_six(econ, k0, s, z):
    """Six households that save by a rule of k and s alone, so that K moves consumption through cash on hand only:
    k, c, dc/dk and K of each period, (T, N)."""
    slope = 0.6 + 0.1 * torch.arange(len(econ.beta))
    k, columns = k0, []
    for t in range(T):
        K = k.mean().expand(N)
        m, R = dk.cash_on_hand(k, s[t], K, z[t].expand(N), econ)
        k_next = slope[s[t]] * k
        columns.append((k, m - k_next, R - slope[s[t]], K, R))
        k = k_next
    return [torch.stack(x) for x in zip(*columns)]


@pytest.fixture(params=[toy, one_z])
def six(request, rng):
    economy = request.param()
    Z, S = economy.income.shape
    s, z = torch.randint(S, (T, N), generator=rng), torch.randint(Z, (T,), generator=rng)
    return economy, 3 + 4 * torch.rand(N, generator=rng, dtype=torch.float64), s, z


def costates_of(econ, k0, s, z):
    k, c, dc, K, R = economy_of_six(econ, k0, s, z)
    at = k, s, K, z[:, None].expand(T, N)
    u_prime, m_K = dk.marginal_utility(c, econ), dk.cash_of_K(*at, econ)
    Delta = dk.Delta(u_prime, m_K, (u_prime * m_K).mean(1, keepdim=True), econ)
    nothing = torch.zeros(N, dtype=torch.float64)
    return dk.costates(c, dc, k, s, R, Delta, nothing, nothing, 0 * k, 0 * k, 0 * k, 0 * k, econ)[1][0]


def utilities(econ, k0, s, z):
    """Discounted utility of each of the six, (N,)."""
    c = economy_of_six(econ, k0, s, z)[1]
    discount = torch.cat([torch.ones(1, N, dtype=torch.float64), econ.beta[s].cumprod(0)[:-1]])
    return (discount * dk.utility(c, econ)).sum(0)


def with_one_beta(economy):
    """Where discount factors differ a planner weighs households by their own; the test keeps to one."""
    return dataclasses.replace(economy, beta=0.94)


def test_costates_are_the_derivative_of_the_planners_objective(six):
    economy, k0, s, z = six
    econ = decided_by(with_one_beta(economy), "planner").tables()
    k0.requires_grad_()
    (slope,) = torch.autograd.grad(utilities(econ, k0, s, z).sum(), k0)
    assert torch.allclose(costates_of(econ, k0.detach(), s, z), slope, rtol=1e-10)
    market = costates_of(with_one_beta(economy).tables(), k0.detach(), s, z)
    assert (market / slope - 1).abs().max() > 0.01


def test_costates_are_the_derivative_of_a_players_own_utility(six):
    economy, k0, s, z = six
    econ = decided_by(economy, "game", players=N).tables()
    jacobian = torch.autograd.functional.jacobian(lambda k: utilities(econ, k, s, z), k0)
    assert torch.allclose(costates_of(econ, k0, s, z), jacobian.diagonal(), rtol=1e-10)
    market = costates_of(economy.tables(), k0, s, z)
    assert (market / jacobian.diagonal() - 1).abs().max() > 1e-3


def test_cash_of_K_is_a_derivative(tables, rng):
    Z, S = tables.shares.shape
    s, z = torch.randint(S, (50,), generator=rng), torch.randint(Z, (50,), generator=rng)
    k = 20 * torch.rand(50, generator=rng, dtype=torch.float64)
    K = (tables.K_ss * (0.5 + torch.rand(50, generator=rng, dtype=torch.float64))).requires_grad_()
    m, _ = dk.cash_on_hand(k, s, K, z, tables)
    (slope,) = torch.autograd.grad(m.sum(), K)
    assert torch.allclose(dk.cash_of_K(k, s, K, z, tables), slope)


class Saver:
    """Saves part of what it has; the part depends on s and z."""

    def __init__(self, econ):
        self.econ = econ

    def policy(self, k, s, K, z):
        m, _ = dk.cash_on_hand(k, s, K, z, self.econ)
        return self.econ.k_min + (0.8 - 0.02 * s - 0.01 * z) * (m - self.econ.k_min)


@pytest.mark.parametrize("make", [toy, one_z])
def test_planners_Delta_against_everybodys_draws(make, rng):
    """Next period's Delta for each z' is its mean over every combination of s' of three households."""
    econ = decided_by(make(), "planner").tables()
    Z, S = econ.shares.shape
    k = 2 + 5 * torch.rand(1, 3, generator=rng, dtype=torch.float64)
    s, z = torch.tensor([[0, 1, S - 1]]), torch.tensor([[Z // 2]])
    saver, K = Saver(econ), k.mean(1, keepdim=True)
    k_next = saver.policy(k, s, K, z)
    K_next = k_next.mean(1, keepdim=True)
    now, ahead = dk.planner_Delta(saver, k, s, k_next, K, K_next, z, 1.0, econ)
    c = dk.cash_on_hand(k, s, K, z, econ)[0] - k_next
    assert now.item() == pytest.approx((dk.marginal_utility(c, econ) * dk.cash_of_K(k, s, K, z, econ)).mean().item())
    Pi = make().Pi[Z // 2]
    for z_next in range(Z):
        expectation, sure = 0.0, 0.0
        for draw in itertools.product(range(S), repeat=3):
            p = float(torch.tensor([Pi[z_next, s[0, i], draw[i]] for i in range(3)]).prod())
            at = k_next, torch.tensor([draw]), K_next, torch.tensor([[z_next]])
            c = dk.cash_on_hand(*at, econ)[0] - saver.policy(*at)
            expectation += p * (dk.marginal_utility(c, econ) * dk.cash_of_K(*at, econ)).mean().item()
            sure += p
        reachable = make().P_z[Z // 2, z_next] > 0
        assert ahead[0, z_next].item() == pytest.approx(expectation / sure if reachable else 0.0)


def test_a_weighted_cross_section_is_one_of_repeated_households(rng):
    econ = decided_by(toy(), "planner").tables()
    saver = Saver(econ)
    k = 2 + 5 * torch.rand(1, 3, generator=rng, dtype=torch.float64)
    s, z, K = torch.tensor([[0, 1, 2]]), torch.tensor([[1]]), torch.tensor([[4.0]], dtype=torch.float64)
    times = torch.tensor([1, 4, 2])
    found = dk.planner_Delta(saver, k, s, saver.policy(k, s, K, z), K, K, z, times.double(), econ)
    k, s = k.repeat_interleave(times, 1), s.repeat_interleave(times, 1)
    for x, y in zip(found, dk.planner_Delta(saver, k, s, saver.policy(k, s, K, z), K, K, z, 1.0, econ)):
        assert torch.allclose(x, y)


SMALL = dk.GridConfig(n_k=120, n_K=6, n_k_fine=800, n_K_fine=11, periods=2500, burn_in=50, tolerance=1e-5)


def test_the_grid_finds_the_constrained_efficient_economy(davila):
    """Davila et al. (2012): K = 119.084, r = -2.926%, Ginis .8645 / .3861; on a small grid."""
    economy = decided_by(davila.economy(davila.Calibration()), "planner")
    grid = dk.solve_grid(economy, SMALL)
    k = dk.power_grid(800, 0, grid.k_max, 4.0)
    cfg = dk.Config(eval_periods=600, eval_drop=100, eval_states=4000)
    figures, _ = dk.judge_limit({"grid": grid}, economy, grid.econ, cfg, k, 0)
    found = figures["grid"]
    assert found["capital"]["mean"] == pytest.approx(119.084, rel=0.003)
    assert found["interest_rate_percent"] == pytest.approx(-2.926, abs=0.03)
    assert found["capital"]["gini"] == pytest.approx(0.8645, abs=0.003)
    assert found["consumption"]["gini"] == pytest.approx(0.3861, abs=0.003)
    assert found["euler_log10"]["mean"] < -4  # with Delta' of the cross-section itself
    assert found["bellman_own_c"]["mean"] < 1e-3
    law = grid.econ.Delta_law[0]
    assert found["Delta"] == pytest.approx(float(law[0] + law[1] * math.log(found["capital"]["mean"])), rel=1e-3)


def test_the_game_tends_to_the_market():
    """A player saves less than a price-taker, by an amount in proportion to 1 / players."""
    market = dk.solve_grid(config=SMALL)
    K = [dk.solve_grid(decided_by(dk.krusell_smith(), "game", players=n), SMALL).K_mean for n in (50, 5000)]
    assert abs(K[1] / market.K_mean - 1) < 0.1 * abs(K[0] / market.K_mean - 1)
    assert abs(K[0] / market.K_mean - 1) > 1e-3


@pytest.mark.parametrize("equilibrium", ["market", "game", "planner"])
def test_what_the_value_network_stands_for(equilibrium, rng):
    """value_of and equivalent_of are inverse to each other, and the second output of value_of is its slope."""
    econ = decided_by(toy(), equilibrium).tables()
    g = (30 * torch.randn(40, generator=rng, dtype=torch.float64)).requires_grad_()
    s, z = torch.randint(3, (40,), generator=rng), torch.randint(3, (40,), generator=rng)
    V, V_g = dk.value_of(g, s, z, econ)
    assert torch.allclose(dk.equivalent_of(V, s, z, econ), g, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(V.sum(), g)[0], V_g)


@pytest.mark.parametrize("changes, words", [
    ({"equilibrium": "plan"}, "equilibrium: 'plan' is none of market, game, planner"),
    ({"start": 0.0}, "start: 0 is not in (0, 1000)"),
    ({"players": 1}, "players: 1 is not in (1,"),
])
def test_bad_input(changes, words):
    with pytest.raises(dk.UserError) as error:
        dataclasses.replace(toy(), **changes)
    assert words in str(error.value)


def test_a_planner_without_a_stationary_answer(tmp_path, capsys):
    """Krusell & Smith's economy: beta R is nearly one, so the rich save without bound; one sentence says so, and the
    checkpoint stays."""
    sizes = {"n-agents": 60, "n-economies": 6, "periods": 120, "horizon": 60, "batch": 256, "hidden": 12}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    argv = ["--preset", "smoke", "--equilibrium", "planner", "--iterations", "80", "--output-dir", str(tmp_path)]
    assert dk.main(argv + flags) == 2
    error = capsys.readouterr().err
    assert "--equilibrium planner: no stationary answer: at R = 1.0" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [dk.CHECKPOINT]
    stopped = torch.load(tmp_path / dk.CHECKPOINT, weights_only=True)
    assert stopped["unbounded"] == 10 or (stopped["iteration"] == 25 and stopped["unbounded"] > 10)
    assert dk.main([*argv, *flags, "--resume"]) == 2  # the count is part of the checkpoint: one iteration more
    assert "no stationary answer" in capsys.readouterr().err
    assert torch.load(tmp_path / dk.CHECKPOINT, weights_only=True)["iteration"] == stopped["iteration"] + 1
