"""Market, game, planner: Delta against automatic differentiation, brute force and the constrained-efficient economy."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import dk, example, one_z, toy

N, T = 6, 5


@pytest.fixture(scope="module")
def davila():
    return example("davila")


def decided_by(economy, equilibrium, **changes):
    return dataclasses.replace(economy, equilibrium=equilibrium, **changes)


def economy_of_six(econ, k0, s, z):
    """Six households that save by a rule of k and s alone, so that K moves consumption through cash on hand only:
    k, c, dc/dk and K of each period, (T, N)."""
    slope = 0.6 + 0.1 * torch.arange(len(econ.beta))
    k, columns = k0, []
    for t in range(T):
        K = k.mean().expand(N)
        m, R = dk.cash_on_hand(dk.place(k, s[t], K, z[t].expand(N), econ), econ)
        k_next = slope[s[t]] * k
        columns.append((k, m - k_next, R - slope[s[t]], K, R))
        k = k_next
    return [torch.stack(x) for x in zip(*columns)]


@pytest.fixture(params=[toy, one_z])
def six(request, rng):
    economy = request.param()
    Z, S = economy.arrays.income.shape
    s, z = torch.randint(S, (T, N), generator=rng), torch.randint(Z, (T,), generator=rng)
    return economy, 3 + 4 * torch.rand(N, generator=rng, dtype=torch.float64), s, z


def costates_of(econ, k0, s, z):
    """What a unit of k at the start is worth, by the published labels, Delta being everybody's own or mean gain."""
    k, c, dc, K, _ = economy_of_six(econ, k0, s, z)
    at = dk.place(k, s, K, z[:, None].expand(T, N), econ)
    gain = dk.marginal_utility(c, econ) * dk.cash_of_K(at, econ)
    at, nothing = at._replace(Delta=gain.mean(1, keepdim=True).expand(T, N)), torch.zeros(N, dtype=torch.float64)
    _, worth = dk.published_labels(nothing, nothing, c, dc, at, econ)
    R, _ = dk.prices(at, econ)
    u_prime = dk.marginal_utility(c, econ)
    return (u_prime * dc + dk.Delta(u_prime, at, econ) + econ.beta[s] * (R - dc) * worth)[0]


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
    at = dk.place(k, s, K, z, tables)
    (slope,) = torch.autograd.grad(dk.cash_on_hand(at, tables)[0].sum(), K)
    assert torch.allclose(dk.cash_of_K(at, tables), slope)


class Saver(dk.Policy):
    """Saves part of what it has; the part depends on s and z."""

    def __init__(self, econ):
        self.econ = econ

    def policy(self, at):
        m, _ = dk.cash_on_hand(at, self.econ)
        return self.econ.k_min + (0.8 - 0.02 * at.s - 0.01 * at.z) * (m - self.econ.k_min)

    def section(self, k, s, z, weight=None):
        weight = torch.ones_like(k) if weight is None else weight
        K = (weight * k).mean(1, keepdim=True)
        at = dk.place(k, s, K, z, self.econ)
        return dk.cross_section(self, at, k.new_zeros(len(k), 0), self.policy(at), weight)


@pytest.mark.parametrize("make", [toy, one_z])
def test_planners_Delta_against_everybodys_draws(make, rng):
    """Next period's Delta for each z' is its mean over every combination of s' of three households."""
    econ = decided_by(make(), "planner").tables()
    Z, S = econ.shares.shape
    k = 2 + 5 * torch.rand(1, 3, generator=rng, dtype=torch.float64)
    s, z, saver = torch.tensor([[0, 1, S - 1]]), torch.tensor([[Z // 2]]), Saver(econ)
    at, ahead, k_next, _ = saver.section(k, s, z)

    def mean_gain(at):
        c = dk.cash_on_hand(at, econ)[0] - saver.policy(at)
        return (dk.marginal_utility(c, econ) * dk.cash_of_K(at, econ)).mean().item()

    assert at.Delta.item() == pytest.approx(mean_gain(at)) and ahead.K.item() == pytest.approx(k_next.mean().item())
    a = make().arrays
    for z_next in range(Z):
        expectation, sure = 0.0, 0.0
        for draw in itertools.product(range(S), repeat=3):
            p = float(torch.tensor([a.Pi[Z // 2, z_next, s[0, i], draw[i]] for i in range(3)]).prod())
            nexts = dk.place(k_next, torch.tensor([draw]), ahead.K, torch.tensor([[z_next]]), econ)
            expectation, sure = expectation + p * mean_gain(nexts), sure + p
        reachable = a.P_z[Z // 2, z_next] > 0
        assert ahead.Delta[0, 0, z_next].item() == pytest.approx(expectation / sure if reachable else 0.0)


def test_a_weighted_cross_section_is_one_of_repeated_households(rng):
    econ = decided_by(toy(), "planner").tables()
    saver = Saver(econ)
    k = 2 + 5 * torch.rand(1, 3, generator=rng, dtype=torch.float64)
    s, z, times = torch.tensor([[0, 1, 2]]), torch.tensor([[1]]), torch.tensor([1, 4, 2])
    weighted = saver.section(k, s, z, (times * 3 / 7).double().unsqueeze(0))
    repeated = saver.section(k.repeat_interleave(times, 1), s.repeat_interleave(times, 1), z)
    for x, y in zip((weighted.at.K, weighted.at.Delta, *weighted.ahead), (repeated.at.K, repeated.at.Delta,
                                                                          *repeated.ahead)):
        assert torch.allclose(x, y)


def test_the_first_order_condition_of_a_planner_and_of_a_player(rng):
    """Euler errors with Delta' by a sum over the dense P: u'(c) = beta E[R' u'(c') + Delta']."""
    for equilibrium in ("planner", "game"):
        economy = decided_by(toy(), equilibrium, players=5)
        econ, a = economy.tables(), economy.arrays
        saver = Saver(econ)
        k = 2 + 5 * torch.rand(1, 4, generator=rng, dtype=torch.float64)
        at, ahead, k_next, _ = saver.section(k, torch.tensor([[0, 1, 2, 1]]), torch.tensor([[1]]))
        at, ahead, worth = *dk.states_of(dk.Section(at, ahead, k_next, torch.ones_like(k)), 4), 0.0
        for z, s in itertools.product(range(3), range(3)):
            one = torch.ones_like(at.s)
            nexts = dk.place(k_next[0], s * one, ahead.K, z * one, econ)
            (m, R), u_prime = dk.cash_on_hand(nexts, econ), None
            u_prime = dk.marginal_utility(m - saver.policy(nexts), econ)
            gain = ahead.Delta[:, z] if equilibrium == "planner" else u_prime * dk.cash_of_K(nexts, econ) / 5
            worth = worth + torch.tensor(a.P)[at.z, at.s, z, s] * (R * u_prime + gain)
        implied = dk.inverse_marginal_utility(econ.beta[at.s] * worth, econ)
        m = dk.cash_on_hand(at, econ)[0]
        want = 1 - torch.minimum(implied, m - econ.k_min) / (m - k_next[0])
        assert torch.allclose(dk.euler_errors(saver, at, ahead), want, rtol=1e-9)


SMALL = dk.GridConfig(n_k=120, n_K=6, n_fine=600, n_K_fine=11, periods=5000, tolerance=1e-5)


def test_the_grid_finds_the_constrained_efficient_economy(davila):
    """Davila et al. (2012): K = 119.084, r = -2.926%, Ginis .8645 / .3861; on a small grid."""
    economy = decided_by(davila.economy(davila.Calibration()), "planner")
    grid = dk.solve_grid(economy, SMALL)
    found, _ = dk.judge_limit(grid, dk.Config(eval_periods=600))
    assert found["capital"]["mean"] == pytest.approx(119.084, rel=0.003)
    assert found["statistics"]["interest_rate_percent"] == pytest.approx(-2.926, abs=0.03)
    assert found["capital"]["gini"] == pytest.approx(0.8645, abs=0.003)
    assert found["consumption"]["gini"] == pytest.approx(0.3861, abs=0.003)
    assert found["euler_log10"]["mean"] < -4  # with Delta' of the cross-section itself
    assert found["bellman_own_c"]["mean"] < 1e-3
    law = grid.Delta_law[0]
    assert found["Delta"] == pytest.approx(float(law[0] + law[1] * math.log(found["capital"]["mean"])), rel=1e-3)


def test_the_game_tends_to_the_market():
    """A player saves less than a price-taker, by an amount in proportion to 1 / players."""
    coarse = dataclasses.replace(SMALL, n_k=80, n_fine=200)
    market = dk.solve_grid(config=coarse)
    K = [dk.solve_grid(decided_by(dk.krusell_smith(), "game", players=n), coarse).K_mean for n in (50, 5000)]
    assert abs(K[1] / market.K_mean - 1) < 0.1 * abs(K[0] / market.K_mean - 1)
    assert abs(K[0] / market.K_mean - 1) > 1e-3


@pytest.mark.parametrize("equilibrium", ["market", "game", "planner"])
def test_what_the_value_network_stands_for(equilibrium, rng):
    """value_of and equivalent_of are inverse to each other, and the second output of value_of is its slope."""
    econ = decided_by(toy(), equilibrium).tables()
    g = (30 * torch.randn(40, generator=rng, dtype=torch.float64)).requires_grad_()
    s, z = torch.randint(3, (40,), generator=rng), torch.randint(3, (40,), generator=rng)
    at = dk.place(0 * g.detach(), s, 0 * g.detach(), z, econ)
    V, V_g = dk.value_of(g, at, econ)
    assert torch.allclose(dk.equivalent_of(V, at, econ), g, rtol=1e-6)
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
    sizes = {"n-agents": 40, "n-economies": 4, "periods": 70, "horizon": 40, "batch": 128, "hidden": 10}
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
