"""The yardsticks: known policies, known distributions, and solutions judged against themselves."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SMALL, ahead_of, axes_of, dk

F64 = torch.float64
CFG = dataclasses.replace(dk.PRESETS["smoke"], hidden=6, eval_agents=30, eval_economies=3, eval_periods=120,
                          irf_paths=30, irf_agents=40, irf_periods=25)


class Stub(dk.Policy):
    """A solution made of what is given."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def untrained(economy, cfg=CFG):
    """A network solution near the right level of saving."""
    econ, rng = economy.tables(dtype=torch.float32), torch.Generator().manual_seed(0)
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    for theta in (state.policy, state.value):
        theta[-7:-1] += 0.01 * torch.randn(6, generator=rng)
    return dk.Solution(dk.weights_file(state, economy, cfg, 0))


@pytest.fixture(scope="module", autouse=True)
def eager():
    dk.compile_kernels("none")


@pytest.fixture(scope="module")
def network():
    return untrained(dk.krusell_smith())


@pytest.fixture(scope="module")
def small_grid(small_grids):
    return small_grids("log")


@pytest.fixture(scope="module")
def toy_grid(small_grids):
    return small_grids("toy")


@pytest.fixture(scope="module")
def itself(small_grid):
    """compare() of the grid with itself,"""
    return dk.compare({"network": small_grid, "grid": small_grid}, CFG)


@pytest.fixture(scope="module")
def poor(network, small_grid):
    """and of an untrained network with it."""
    return dk.compare({"network": network, "grid": small_grid}, CFG)


def alone(k, s, K, z, K_next, econ):
    """Households (n,) of whom K' is expected, and nothing else."""
    return dk.place(k, s, K, z, econ), ahead_of(K_next, len(econ.TFP))


def section_of(solution, k, s, z, weight=None):
    """The cross-section k, s (D, n) of economies z (D, 1), who save as the solution says."""
    weight = torch.ones_like(k) if weight is None else weight
    at = dk.place(k, s, (weight * k).mean(1, keepdim=True), z, solution.econ)
    return dk.cross_section(solution, at, k.new_zeros(len(k), 0), solution.policy(at), weight)


def visited(solution, n=300):
    """States of a panel of 30 households that the solution visits."""
    rng = torch.Generator().manual_seed(1)
    panel = dk.initial_panel(3, 30, solution.econ, solution.economy.K_ss, rng)
    sections = [dk.cross_section(solution, at, now.p, k_next, torch.ones_like(k_next)) for t, (now, at, k_next) in
                enumerate(dk.simulate(dk.panel_policy(solution), panel, 40, solution.econ, rng)) if t % 10 == 9]
    at, ahead = [type(of[0])(*map(torch.cat, zip(*of))) for of in zip(*[dk.states_of(x, n // 4) for x in sections])]
    return at, ahead


# ------------------------------------------------------------------------------------------------ comparing


def test_a_solution_beside_itself_shows_no_distance(itself):
    figures, arrays = itself
    for size in ("small", "limit"):
        assert figures["comparison"][size]["w1"] == 0
        assert repr(figures["network"][size]) == repr(figures["grid"][size])
    assert figures["comparison"]["policy_distance"] == {"mean": 0, "max": 0}
    assert set(figures["comparison"]["impulse_response_gap"].values()) == {0}
    assert np.array_equal(arrays["small"]["network"]["k"], arrays["small"]["grid"]["k"])


def test_a_poor_network_is_told_from_the_grid_on_the_same_shocks(poor):
    beside, arrays = poor
    assert beside["comparison"]["small"]["w1"] > 0.1 and beside["comparison"]["policy_distance"]["mean"] > 0.01
    for size in ("small", "limit"):
        of = [arrays[size][name] for name in ("network", "grid")]
        assert np.array_equal(of[0]["z_path"], of[1]["z_path"])
        if size == "small":
            w1 = scipy.stats.wasserstein_distance(*[x["k"] for x in of])
        else:  # some nodes have a little less than nothing, which wasserstein_distance() does not take
            assert min(x["weight"].min() for x in of) < 0
            nodes = np.union1d(*[x["k"] for x in of])
            below = [np.append(0, (x["weight"] / x["weight"].sum()).cumsum())[np.searchsorted(x["k"], nodes, "right")]
                     for x in of]
            w1 = np.abs(below[0] - below[1])[:-1] @ np.diff(nodes)
        # in the limit distribution functions are linear between nodes, not steps at them
        assert beside["comparison"][size]["w1"] == pytest.approx(w1, rel=1e-3 if size == "limit" else 1e-12)
    for ours, theirs in zip(*[arrays["irf"][name]["shocks"] for name in ("network", "grid")]):
        assert np.array_equal(ours, theirs)


def test_policy_distance(economies):
    """k from the limit to four times mean capital, K at three percentiles of a path, all z and s: distances that depend
    on each in a known way."""
    economy, seen = economies["toy"], {}

    def other(at):
        seen.update(at._asdict())
        return 0.25 + 0.5 * (at.s == 2) * (at.z == 1) * (at.K > 41) + 0 * at.k

    zero = Stub(policy=lambda at: 0 * at.k, econ=economy.tables(), economy=economy)
    path = np.interp(np.linspace(0, 100, 1001), (0, 2, 50, 98, 100), (36, 37, 39.5, 42, 50))[:, None]
    found = dk.policy_distance(zero, Stub(policy=other), path)
    assert found == {"mean": pytest.approx(0.25 + 0.5 / 27), "max": pytest.approx(0.75)}
    assert economy.k_min < seen["k"].min() < economy.k_min + 0.6 and seen["k"].max() == pytest.approx(4.07 * 39.5)
    assert np.unique(seen["K"]) == pytest.approx([37, 39.5, 42])
    assert set(np.unique(seen["s"])) == set(np.unique(seen["z"])) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------ from Python


def test_python_interface_broadcasts(network, small_grid):
    k, s, K, z = np.linspace(1, 100, 7)[:, None], [0, 1], network.K_mean, 1
    for solution in (network, small_grid):
        for function in (solution.next_capital, solution.value):
            table = function(k, s, K, z)
            assert isinstance(table, np.ndarray) and table.shape == (7, 2) and np.isfinite(table).all()
            for i, state in np.ndindex(7, 2):
                assert float(function(float(k[i, 0]), state, K, z)) == pytest.approx(table[i, state], rel=1e-12)
            assert (np.diff(table, axis=0) != 0).all() and function(5, 1, K, 0) != function(5, 1, K, 1)


@pytest.mark.parametrize("bad, words", [
    ((10, 2, 39, 1), "^s must be one of 0 to 1, not 2"), ((10, 1, 39, -1), "^z must be one of 0 to 1"),
    ((10, 0.5, 39, 1), "^s must"), ((10, 1, 39, [0, 1, math.nan]), "^z must"), ((-1, 1, 39, 1), "^k = -1 is outside"),
    ((1e6, 1, 39, 1), "^k = 1e[+]06 is outside"), ((10, 1, 10, 1), "^K = 10 is outside"),
    ((math.nan, 1, 39, 1), "^k = nan is outside"), ((10, 1, 90, 1), "^K = 90 is outside")], ids=str)
def test_python_interface_refuses_what_was_never_solved_for(network, small_grid, bad, words):
    for solution in (network, small_grid):
        for function in (solution.next_capital, solution.value):
            with pytest.raises(ValueError, match=words):
                function(*bad)


@pytest.mark.parametrize("gamma", [0.7, 1.0, 3.0])
def test_network_value_is_in_utils(gamma):
    """A household has u(c) = c^(1 - gamma) / (1 - gamma) of c_ss exp(g / 10) for ever, or ln of it, discounted."""
    network = untrained(dk.krusell_smith(dk.Calibration(gamma=gamma)))
    K = torch.full((2,), network.K_mean, dtype=F64)
    at = dk.place(torch.tensor([3.0, 40.0], dtype=F64), torch.tensor([0, 1]), K, torch.tensor([1, 0]),
                  network.econ)
    assert network.next_capital(*at[:4]) == pytest.approx(network.policy(at).numpy(), rel=1e-12)
    m, net = dk.cash_on_hand(at, network.econ)[0], network.value_net
    g = dk.network(net.layers, dk.for_value(dk.features(at, m, net, network.econ)))
    c = (network.economy.c_ss * torch.exp(g / 10)).numpy()
    u = np.log(c) if gamma == 1 else c ** (1 - gamma) / (1 - gamma)
    assert network.value(*at[:4]) == pytest.approx(u / (1 - 0.99), rel=1e-9)


# ------------------------------------------------------------------------------------------------ errors
# Brock & Mirman (1972): log utility, full depreciation, everybody alike. k = K, k' = alpha beta Y, and the planner's
# V = A(z) + B ln k with B = alpha / (1 - alpha beta)


class BrockMirman(dk.Policy):
    """Saves a share of output, alpha beta being optimal; its value is the planner's optimum whatever it saves."""

    def __init__(self, saved=None):
        alpha, beta, TFP = 0.36, 0.99, np.array([0.9, 0.95, 1.1])
        P_z = np.array([[0.8, 0.2, 0.0], [0.1, 0.7, 0.2], [0.05, 0.15, 0.8]])
        self.economy = dk.Economy(alpha=alpha, delta=1.0, beta=beta, TFP=TFP, P_z=P_z, Pi=0.5, income=[1.1, 1.1])
        self.econ = self.economy.tables()
        self.saved = alpha * beta if saved is None else saved
        self.B = alpha / (1 - alpha * beta)
        # A(z) = ln((1 - a b) Z L^(1-a)) + beta B ln(a b Z L^(1-a)) + beta E A(z')
        ZL = TFP * 1.1 ** (1 - alpha)
        flow = np.log((1 - alpha * beta) * ZL) + beta * self.B * np.log(alpha * beta * ZL)
        self.A = torch.tensor(np.linalg.solve(np.eye(3) - beta * P_z, flow))

    def policy(self, at):
        return self.saved * dk.output(at, self.econ) + 0 * at.k

    def values(self, at):
        """In units of utility(): ln c less ln c_ss for ever."""
        return self.A[at.z] + self.B * torch.log(at.k) - math.log(self.economy.c_ss) / (1 - 0.99)

    def states(self):
        K, z = torch.linspace(0.05, 0.4, 40, dtype=F64), torch.arange(40) % 3
        return alone(K, torch.zeros_like(z), K, z, self.policy(dk.place(K, z, K, z, self.econ)), self.econ)


def test_errors_of_the_exact_solution_are_zero():
    exact = BrockMirman()
    assert dk.euler_errors(exact, *exact.states()).abs().max() < 1e-12
    own, best = dk.bellman_errors(exact, *exact.states())
    assert max(own.abs().max(), best.abs().max()) < 1e-12


@pytest.mark.parametrize("saved", [0.25, 0.5])
def test_errors_of_a_wrong_policy_have_a_closed_form(saved):
    """u'(c~) = beta E[alpha Y' / K' / ((1 - s) Y')]: c~ / c = s / (alpha beta). With the planner's value the own c
    loses ln((1 - s) / (1 - ab)) + beta B ln(s / ab), and the best c nothing."""
    wrong, alpha, beta = BrockMirman(saved), 0.36, 0.99
    error = dk.euler_errors(wrong, *wrong.states())
    assert error.numpy() == pytest.approx(np.full(40, 1 - saved / (alpha * beta)), rel=1e-10)
    own, best = dk.bellman_errors(wrong, *wrong.states())
    loss = math.log((1 - saved) / (1 - alpha * beta)) + beta * wrong.B * math.log(saved / (alpha * beta))
    assert own.numpy() == pytest.approx(np.full(40, loss), rel=1e-9)
    # the parabola leaves less than 0.1% of c, and half its square times a curvature of 4 in utils
    assert best.abs().max() < 2e-6 < loss / -1000


@pytest.mark.parametrize("name", ["log", "toy"])
def test_best_consumption_against_brute_force(economies, name):
    """The re-maximised error against 501 values of c between half and one and a half times the policy's, ends
    included, by a sum over the dense P; V rises with log cash on hand."""
    economy, a = economies[name], economies[name].arrays
    network = untrained(economy)
    W1, b1, W2, b2, w3, b3 = (torch.zeros_like(x) for x in network.value_net.layers)
    W1[0, 1], W2[0, 0], w3[0] = 0.1, 1.0, 25.0
    network.value_net = network.value_net._replace(layers=[W1, b1, W2, b2, w3, b3])
    at, ahead = [dk.pick(x, slice(None, None, 20)) for x in visited(network)]
    own, best = dk.bellman_errors(network, at, ahead)
    m, V = dk.cash_on_hand(at, network.econ)[0], network.values(at)
    c, beta = m - network.policy(at), torch.tensor(a.beta)[at.s]
    brute, inside = torch.full_like(c, -math.inf), torch.zeros_like(c).bool()
    for factor in np.linspace(0.5, 1.5, 501).tolist():
        trial = torch.minimum(factor * c, m - economy.k_min)
        total = dk.utility(trial, network.econ)
        for z, s in np.ndindex(*a.income.shape):
            one = torch.ones_like(at.z)
            nexts = dk.place(m - trial, s * one, ahead.K, z * one, network.econ)
            total = total + beta * torch.tensor(a.P)[at.z, at.s, z, s] * network.values(nexts)
        inside = torch.where(total - V > brute, (trial < m - economy.k_min) & (0.51 < factor < 1.49), inside)
        brute = torch.maximum(brute, total - V)
        if factor == 1.0:
            assert torch.allclose(own, total - V, atol=1e-9)
    # the objective is concave with curvature of order gamma in ln c: half a step of 2e-3 costs 5e-7
    gap = (best - brute).abs() / (dk.marginal_utility(c, network.econ) * c)
    assert inside.double().mean() > 0.7 and gap[inside].max() < 2e-6 * max(economy.gamma, 1)
    assert gap.max() < 1e-5 and (best - own).max() > 1e-4  # there was something to find


def test_euler_errors_leave_out_the_constrained(small_grid, econ):
    """k' = 0 with c~ above m is NaN; k' = 0 with c~ below m is one; c~ is never above m."""
    k, s, K, z = (torch.tensor([x], dtype=d) for x, d in ((0.0, F64), (0, torch.long), (39.0, F64), (0, torch.long)))
    assert small_grid.policy(dk.place(k, s, K, z, econ)) == 0
    assert dk.euler_errors(small_grid, *alone(k, s, K, z, K, econ)).isnan().all()
    eats_when_rich = Stub(econ=econ, policy=lambda at: torch.where(at.k > 100, 0.0, small_grid.policy(at)))
    error = dk.euler_errors(eats_when_rich, *alone(k + 150, s, K, z, K, econ))
    assert error.shape == (1,) and 0 < error < 1  # c~ < c
    # saves half of m at K = 39 to eat everything at K = 45: c~ would be above m, and is m = 2 c
    once = Stub(econ=econ, policy=lambda at: torch.where(at.K == 39.0, 0.5 * dk.cash_on_hand(at, econ)[0], 0.0))
    assert dk.euler_errors(once, *alone(k, s + 1, K, z, K + 6, econ)).item() == pytest.approx(-1, abs=1e-12)


def test_euler_errors_at_a_limit_below_zero(economies, toy_grid):
    """k' = k_min in debt is no error where c~ is above m - k_min, and the poor are there."""
    economy, z = economies["toy"], torch.arange(2)
    k, K = torch.full((2,), economy.k_min, dtype=F64), torch.full((2,), toy_grid.K_mean, dtype=F64)
    given = alone(k, 0 * z, K, z, K, toy_grid.econ)
    assert (toy_grid.policy(given[0]) == economy.k_min).all() and dk.euler_errors(toy_grid, *given).isnan().all()
    saver = Stub(econ=toy_grid.econ, policy=lambda at: torch.full_like(at.k, economy.k_min + 0.1))
    assert (dk.euler_errors(saver, *given) < 0).all()  # c~ > c: it should borrow more


# ------------------------------------------------------------------------------------------------ distributions


def test_inequality_of_known_distributions():
    n = 20_001
    x, every = (np.arange(n) + 0.5) / n, np.ones(n)
    uniform = dk.inequality(10 * np.random.default_rng(0).permutation(x), every)  # Gini 1/3, Lorenz p^2
    p, tops = np.linspace(0, 1, 21), (1, 5, 10, 20, 30)
    # midpoints of n equal slices: moments and Lorenz curve are exact to order 1 / n^2, quantiles to 1 / n
    assert uniform["gini"] == pytest.approx(1 / 3, abs=1e-7) and uniform["lorenz"] == pytest.approx(p**2, abs=1e-7)
    assert uniform["mean"] == pytest.approx(5) and uniform["std"] == pytest.approx(10 / 12**0.5, rel=1e-7)
    assert uniform["quantiles"] == {str(q): pytest.approx(q / 10, abs=10 / n) for q in (1, 5, 25, 50, 75, 95, 99)}
    assert uniform["top_percent_hold"] == {str(q): pytest.approx(100 * (1 - (1 - q / 100) ** 2), abs=1e-5)
                                           for q in tops}
    equal = dk.inequality(np.full(50, 3.0), np.ones(50))
    assert equal["gini"] == pytest.approx(0, abs=1e-12) and equal["lorenz"] == pytest.approx(p, abs=1e-12)
    one_has_all = dk.inequality(np.array([0.0] * 99 + [5.0]), np.ones(100))
    assert one_has_all["gini"] == pytest.approx(0.99)
    assert one_has_all["top_percent_hold"] == {str(q): pytest.approx(100) for q in tops}
    exponential = dk.inequality(-np.log(1 - x), every)
    assert exponential["gini"] == pytest.approx(0.5, abs=1e-3)  # the tail beyond the last slice: ln(n) / n
    assert exponential["top_percent_hold"]["10"] == pytest.approx(10 * (1 + math.log(10)), abs=0.1)


def test_inequality_counts_weights():
    """An observation of weight n is n observations, whatever the unit of weights; zero weight is nobody."""
    rng = np.random.default_rng(1)
    x, weight = rng.gamma(2.0, size=300) - 0.3, rng.integers(0, 6, 300)
    weighted, repeated = dk.inequality(x, weight), dk.inequality(np.repeat(x, weight), np.ones(weight.sum()))
    for name in ("mean", "std", "gini"):
        assert weighted[name] == pytest.approx(repeated[name], rel=1e-12), name
    assert weighted["lorenz"] == pytest.approx(repeated["lorenz"], abs=1e-12)
    assert weighted["top_percent_hold"] == {q: pytest.approx(y) for q, y in repeated["top_percent_hold"].items()}
    assert dk.inequality(x, weight / 7.3)["gini"] == pytest.approx(weighted["gini"])


def synthetic_law(shock=0.0):
    law, z, ln_K = np.array([[0.12, 0.965], [0.14, 0.963]]), (np.arange(400) // 8) % 2, np.full(400, 3.65)
    for t in range(399):
        ln_K[t + 1] = law[z[t]] @ (1, ln_K[t]) + (shock if t == 199 else 0.0)
    return law, np.exp(ln_K)[:, None], np.zeros((400, 1, 0)), z[:, None]


def test_law_of_motion_figures_of_an_exact_law():
    """Also where one more z never comes: its coefficients are NaN, its R2 too."""
    law, K, labour, z = synthetic_law()
    figures = dk.law_of_motion_figures(K, labour, z, 3)
    assert figures["coefficients"][:2] == pytest.approx(law, abs=1e-9)
    assert figures["r2"][:2] == pytest.approx(1, abs=1e-9)
    assert np.isnan(figures["coefficients"][2]).all() and np.isnan(figures["r2"][2])
    assert figures["den_haan_max_percent"] < 1e-7


def test_den_haan_error_accumulates():
    """One shock of 1%: the path that the law draws by itself never learns of it, so the dynamic error is about 1%
    (the regression takes up a little), falling at 0.965 a period; one-step errors would all but one be zero."""
    _, K, labour, z = synthetic_law(shock=0.01)
    figures = dk.law_of_motion_figures(K, labour, z, 2)
    alm = dk.law_of_motion(*map(torch.tensor, (K, labour, z)), torch.zeros(2))[0].numpy()
    forecast = [math.log(K[0, 0])]
    for t in range(399):
        forecast.append(alm[z[t, 0]] @ (1, forecast[-1]))
    error = 100 * np.abs(np.array(forecast) - np.log(K[:, 0]))
    assert figures["den_haan_max_percent"] == pytest.approx(error.max(), rel=1e-9) and 0.8 < error.max() < 1.2
    assert figures["den_haan_mean_percent"] == pytest.approx(error.mean(), rel=1e-9)


# ------------------------------------------------------------------------------------------------ cross-sections


def test_a_panel_is_a_histogram_of_equal_weights(toy_grid, rng):
    """Households with weights 1 to 4, and each as many times: the same K, K', errors, distributions and welfare."""
    D, n = 3, 20
    k = 12 * torch.rand(D, n, generator=rng, dtype=F64) ** 2 - 0.5
    s, z, times = torch.randint(3, (D, n), generator=rng), torch.tensor([[0], [1], [2]]), torch.arange(n) % 4 + 1
    panels = []
    for repeat in (False, True):
        k_of, s_of = [x.repeat_interleave(times, 1) if repeat else x for x in (k, s)]
        weight = torch.ones_like(k_of) if repeat else (times / times.double().mean()).expand(D, n).clone()
        K = (weight * k_of).mean(1, keepdim=True)
        sections = [section_of(toy_grid, *[x[d : d + 1] for x in (k_of, s_of, z, weight)]) for d in range(D)]
        path = np.concatenate([K.numpy(), K.numpy() * 1.01]), np.concatenate([z.numpy()] * 2)
        panels.append((sections, dk.judged(toy_grid, sections, *path, np.zeros((2 * D, 1, 0)))[0]))
    (weighted, ours), (repeated, theirs) = panels
    for x, y in zip(weighted, repeated):
        assert torch.allclose(x.at.K, y.at.K) and torch.allclose(x.ahead.K, y.ahead.K)
    for name in ("capital", "consumption"):
        for figure in ("mean", "std", "gini"):
            assert ours[name][figure] == pytest.approx(theirs[name][figure], rel=1e-10)
    assert ours["welfare"] == pytest.approx(theirs["welfare"], rel=1e-10)
    each = [dk.states_of(section, 50) for section in weighted], [dk.states_of(section, 50) for section in repeated]
    for (at, ahead), (at_repeated, _) in zip(*each):  # 50 states of 50 people: the very same
        assert torch.equal(at.k, at_repeated.k) and torch.equal(at.s, at_repeated.s)


def test_states_of_a_section_represent_its_mass(toy_grid):
    """Each date's states are spread evenly over its mass: as many in each household as its weight, and K, z, K' of its
    date."""
    rng = np.random.default_rng(1)
    weight = torch.tensor(rng.dirichlet(np.ones(40), 3) * 40)
    k, s = torch.arange(120, dtype=F64).view(3, 40) / 10, torch.arange(120).view(3, 40) % 3
    z, k_next = torch.tensor([[0], [1], [2]]), torch.arange(120, dtype=F64).view(3, 40) / 9
    at = dk.place(k, s, (weight * k).mean(1, keepdim=True), z, toy_grid.econ)
    section = dk.cross_section(toy_grid, at, torch.zeros(3, 0), k_next, weight)
    at, ahead = dk.states_of(section, 6000)
    chosen = (at.k * 10).round().long()
    assert torch.equal(at.s, chosen % 3) and torch.equal(at.z, chosen // 40)
    assert torch.equal(at.K, section.at.K[at.z, 0]) and torch.equal(ahead.K, section.ahead.K[at.z, 0])
    assert torch.allclose(section.ahead.K, (weight * k_next).mean(1, keepdim=True))
    assert (torch.bincount(chosen, minlength=120) - weight.flatten() / 120 * 6000).abs().max() <= 1


@pytest.mark.parametrize("name", ["gamma2", "toy"])
def test_error_figures(economies, name):
    """mean |x|, root mean square and max |x|; in utils, in units of u'(c) c, and log10 of |Euler errors|; welfare is
    what consumed by everybody for ever is worth as much as what they consume."""
    network, rng = untrained(economies[name]), torch.Generator().manual_seed(1)
    econ, c_ss, gamma = network.econ, economies[name].c_ss, economies[name].gamma
    k = economies[name].k_min + economies[name].K_ss * 2 * torch.rand(1, 200, generator=rng, dtype=F64)
    s, z = torch.randint(len(econ.beta), (1, 200), generator=rng), torch.tensor([[0]])
    section = section_of(network, k, s, z)
    figures, arrays = dk.judged(network, [section], np.full((3, 1), k.mean()), np.zeros((3, 1), int),
                                np.zeros((3, 1, 0)))
    at, ahead = dk.states_of(section, 200)
    assert torch.equal(at.k, k[0]) and figures["states"] == 200
    c, (own, best) = dk.cash_on_hand(at, econ)[0] - section.k_next[0], dk.bellman_errors(network, at, ahead)
    utils = c_ss ** (1 - gamma)  # utility() is of c / c_ss
    for kind, x in (("bellman_own_c", own * utils), ("bellman_best_c", best * utils),
                    ("bellman_in_consumption", own * utils / (c**-gamma * c))):
        x = x.tolist()
        mean, rmse = sum(map(abs, x)) / len(x), math.sqrt(sum(y * y for y in x) / len(x))
        assert figures[kind] == pytest.approx({"mean": mean, "rmse": rmse, "max": max(map(abs, x))})
    euler = dk.euler_errors(network, at, ahead).abs().numpy()
    euler = euler[~np.isnan(euler)]
    assert figures["euler_log10"] == pytest.approx({"mean": math.log10(euler.mean()), "max": math.log10(euler.max()),
                                                    "p99": math.log10(np.percentile(euler, 99))})
    assert figures["welfare"] == pytest.approx((c ** (1 - gamma)).mean().item() ** (1 / (1 - gamma)))
    assert figures["consumption"]["mean"] == pytest.approx(c.mean().item())
    assert figures["capital"]["mean"] == pytest.approx(k.mean().item())


def test_panel_from_the_limit(economies, toy_grid):
    """k given s as the histogram says, atoms at the limit included, (z, s) at the stationary shares."""
    economy, k = economies["toy"], axes_of(toy_grid).k
    econ = economy.tables()
    mass = dk.dispersed_mass(k, toy_grid.K_mean, 1, economy)
    mass[0, 0] += 0.3 * mass[0].sum()  # 3 of 13 of those in s = 0 have nothing
    panel = dk.settled_panel(k, mass, 40, 5000, econ, torch.Generator().manual_seed(1))
    like = dk.initial_panel(40, 5000, econ, 1.0, torch.Generator().manual_seed(1))
    assert panel.k.shape == (40, 5000) and torch.equal(panel.s, like.s) and torch.equal(panel.z, like.z)
    for s in range(3):
        held, found = mass[s].cumsum() / mass[s].sum(), panel.k[panel.s == s].numpy()
        for share in (0.1, 0.5, 0.9):
            at = np.searchsorted(held, share)
            assert (found <= k[at]).mean() == pytest.approx(held[at], abs=0.01)
    assert (panel.k[panel.s == 0] == econ.k_min).double().mean() == pytest.approx(3 / 13, abs=0.01)


def test_what_is_pooled_of_a_panel(small_grid):
    """The first tenth is dropped, every twentieth period of the rest is pooled, K is the mean of households."""
    k = axes_of(small_grid).k
    figures, arrays = dk.judge_panel(small_grid, CFG, k, dk.dispersed_mass(k, 39.0, 1, dk.krusell_smith()))
    assert arrays["K_path"].shape == arrays["z_path"].shape == (108, 3) and figures["periods"] == 108
    of = arrays["k"].reshape(6, 3, 30)
    assert np.allclose(of.mean(2), arrays["K_path"][::20], rtol=1e-12) and np.ptp(arrays["weight"]) == 0
    assert figures["n_agents"] == 30 and figures["n_economies"] == 3 and figures["states"] == 6 * 3 * 30


# ------------------------------------------------------------------------------------------------ the limit


def test_stationary_mass_is_where_a_long_simulation_ends(economies):
    """With one z the histogram goes there from anywhere; its K is as usual and one more period leaves it."""
    economy = economies["one_z"]
    grid = dk.solve_grid(economy, dataclasses.replace(SMALL, n_K_fine=21, tolerance=1e-6))
    k = axes_of(grid).k
    mass, start = dk.stationary_mass(grid, k), dk.dispersed_mass(k, 0.8 * grid.K_mean, 0, economy)
    _, end = dk.simulate_histogram(grid.table.numpy(), axes_of(grid), start, np.zeros(3000, int), economy)
    assert mass.shape == (1, 3, len(k)) and mass.sum() == pytest.approx(1, abs=1e-12)
    assert mass[0].sum(1) == pytest.approx(economy.arrays.shares[0], abs=1e-5)
    people, people_then = mass[0].sum(0).clip(0), end.sum(0).clip(0)  # the lottery leaves a node a little below zero
    assert scipy.stats.wasserstein_distance(k, k, people, people_then) < 2e-3 * grid.K_mean
    assert mass[0].sum(0) @ k == pytest.approx(end.sum(0) @ k, rel=2e-3)


def test_stationary_mass_of_aggregate_shocks(small_grid):
    """(z, s) at their shares, and mean capital near that of the simulated path."""
    k = axes_of(small_grid).k
    mass = dk.stationary_mass(small_grid, k)
    assert mass.sum(2) == pytest.approx(dk.krusell_smith().arrays.shares, abs=1e-5)
    assert mass.sum((0, 1)) @ k == pytest.approx(small_grid.K_mean, rel=0.01)
    assert mass.sum() == pytest.approx(1, abs=1e-12) and mass[mass < 0].sum() > -1e-4


@pytest.fixture(scope="module")
def limit(small_grid):
    """(figures, arrays) of the small grid on a path of 500 periods."""
    return dk.judge_limit(small_grid, dataclasses.replace(CFG, eval_periods=500))


def test_limit_closes_the_budget(limit, econ):
    """C = (1 - delta) K + Y - K' at every pooled date: mean consumption by two routes. Mean capital is that of the
    pooled path, the interest rate that of the whole one."""
    figures, arrays = limit
    K, z = torch.tensor(arrays["K_path"][:, 0]), torch.tensor(arrays["z_path"][:, 0])
    path, at = dk.place(K, z, K, z, econ), torch.arange(0, 449, 20)
    assert len(K) == 450
    C = (1 - econ.delta) * K[at] + dk.output(path, econ)[at] - K[at + 1]
    assert figures["consumption"]["mean"] == pytest.approx(C.mean().item(), rel=1e-8)
    assert figures["capital"]["mean"] == pytest.approx(K[at].mean().item(), rel=1e-8)
    R, _ = dk.prices(path, econ)
    assert figures["statistics"]["interest_rate_percent"] == pytest.approx(100 * (R.mean().item() - 1), rel=1e-9)
    assert figures["n_agents"] is None and figures["moves"] < dk.MOVES
    assert arrays["weight"].sum() == pytest.approx(1) and arrays["mass"].sum(0) == pytest.approx(arrays["weight"])


def test_limit_knows_the_law_of_motion_and_where_the_economy_rests(limit, small_grid):
    """The law is the grid's own. K*(z) is a fixed point near that of the law of z, above it in the good state."""
    figures, rest = limit[0], limit[0]["risky_steady_state"]
    x = np.array([1, np.log(39.0)])
    assert figures["law_of_motion"]["coefficients"] @ x == pytest.approx(small_grid.alm_coefficients @ x, abs=2e-4)
    by_law = np.exp(small_grid.alm_coefficients[:, 0] / (1 - small_grid.alm_coefficients[:, 1]))
    assert rest["K"] == pytest.approx(by_law, rel=0.03) and np.diff(rest["K"])[0] > 1


def test_limit_agrees_with_households(limit, small_grid, econ):
    """The histogram on a path of z, and 20,000 households who live through the same z."""
    arrays, rng = limit[1], torch.Generator().manual_seed(3)
    z_path = dk.draw_z_path(500, dk.krusell_smith().arrays.P_z, np.random.default_rng(dk.JUDGE_SEED))
    assert np.array_equal(arrays["z_path"][:, 0], z_path[50:])
    panel, K_path = dk.settled_panel(arrays["k"], arrays["mass"], 1, 20_000, econ, rng), []
    k, s, z = panel.k, panel.s, torch.tensor(z_path)[:, None, None]
    for z_now, z_next in zip(z[200:], [*z[201:], z[-1]]):
        K = k.mean(1, keepdim=True)
        K_path.append(K.item())
        k = small_grid.policy(dk.place(k, s, K, z_now, econ))
        s = dk.draw_s(torch.rand(s.shape, generator=rng), s, z_now, z_next, econ)
    # the noise of 20,000 households: income that piles up with decay 0.965, 0.2 at most; from 200 on as what came
    # before is forgotten at .965 a period
    assert np.abs(np.array(K_path) - arrays["K_path"][150:, 0])[150:].max() < 0.2


def test_errors_where_the_economy_rests(economies, toy_grid):
    """Followed by hand in a state z that stays: K comes to rest, and the Euler errors are those of every (s, k), each
    with its mass, the sums over (z', s') written out."""
    economy, a, grid = economies["toy"], economies["toy"].arrays, toy_grid
    axes, S, Z = axes_of(grid), 3, 3
    k = axes.k
    cfg = dataclasses.replace(CFG, eval_periods=67)  # 67 - 6 periods
    mass, table = dk.dispersed_mass(k, grid.K_mean, 1, economy), grid.table.numpy()
    found = dk.risky_steady_state(grid, table, axes, mass, cfg)
    for z in range(Z):
        seen = []
        K_path, _ = dk.simulate_histogram(table, axes, mass, np.full(61, z), economy,
                                          lambda t, *of, seen=seen: seen.append(of))
        assert found["K"][z] == K_path[-1]
        (mass_z, k_next), s, worth = seen[-1], np.arange(S)[:, None], np.zeros((S, len(k)))
        K_next = (mass_z * k_next).sum()
        for z_next, s_next in np.ndindex(Z, S):
            p = a.P_z[z, z_next] * a.Pi[z, z_next, :, s_next][:, None]
            at = dk.place(*map(torch.as_tensor, np.broadcast_arrays(k_next, s_next, K_next, z_next)), grid.econ)
            m, R = dk.cash_on_hand(at, grid.econ)
            worth += (p * a.beta[:, None] * R.numpy()) * (m - grid.policy(at)).numpy() ** -3.0
        here = map(torch.as_tensor, np.broadcast_arrays(k, s, K_path[-1], z))
        m, _ = dk.cash_on_hand(dk.place(*here, grid.econ), grid.econ)
        implied, m = np.minimum(worth ** (-1 / 3), m.numpy() - k[0]), m.numpy()
        error = np.abs(1 - implied / (m - k_next))
        free = mass_z * ((k_next > k[0]) | (implied < m - k[0]))
        assert found["euler_log10"][z] == pytest.approx(np.log10((free * error).sum() / free.sum()), abs=0.03)


# ------------------------------------------------------------------------------------------------ impulse responses


@pytest.fixture(scope="module")
def responses(small_grid):
    k = axes_of(small_grid).k
    return dk.impulse_responses(small_grid, CFG, k, dk.dispersed_mass(k, 39.0, 1, dk.krusell_smith()))


def test_impulse_response_is_a_ratio_of_means():
    benchmark, shocked = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [2.0, 8.0]])
    responses = {"output": (benchmark, shocked), "interest_rate": (benchmark, shocked)}
    mean, _, _ = dk.impulse_response(responses, "output")
    assert mean == pytest.approx([100 * (1.5 / 2 - 1), 100 * (4.5 / 3 - 1)])
    mean, low, high = dk.impulse_response(responses, "interest_rate")
    assert mean == pytest.approx([-50, 150])
    assert low == pytest.approx([-90, -50]) and high == pytest.approx([-10, 350])  # 10 and 90% between two paths


def test_shocked_paths(responses):
    """z_0 is bad everywhere in one and good in the other; afterwards both follow from the same uniform numbers, so a
    benchmark is never in recession without its shocked twin, and twins that meet stay together."""
    benchmark, shocked = responses["shocks"]
    assert set(responses) == set(dk.SERIES) and benchmark.shape == (30, 25)
    assert (benchmark[:, 0] == 1).all() and (shocked[:, 0] == 0).all() and (shocked <= benchmark).all()
    differ = benchmark != shocked
    assert (differ[:, 1:] <= differ[:, :-1]).all()
    # p_good(1) - p_good(0) = 0.75 of the twins are still apart a quarter later: 1e-3 after 24
    assert differ[:, -1].mean() < 0.1 and 0.4 < differ[:, 1].mean() < 1
    K, Y, R = responses["capital"], responses["output"], responses["interest_rate"]
    assert np.array_equal(K[0][:, 0], K[1][:, 0]) and (K[1][:, 1] < K[0][:, 1]).all()  # chosen a period before
    for name in ("output", "consumption"):
        assert (responses[name][1][:, 0] < responses[name][0][:, 0]).all()
    for kind, (Z, L) in enumerate(((1.01, 0.96 / 0.9), (0.99, 0.90 / 0.9))):
        assert Y[kind][:, 0] == pytest.approx(Z * K[kind][:, 0] ** 0.36 * L**0.64, rel=1e-12)
        assert R[kind][:, 0] == pytest.approx(0.975 + 0.36 * Z * (K[kind][:, 0] / L) ** -0.64, rel=1e-12)


def test_shocks_of_every_economy(economy, tables):
    """From the middle state to the one below; the same shocks for every solution. Where there is one z, both paths are
    one."""
    k = np.linspace(economy.k_min, 40, 50)
    mass = dk.dispersed_mass(k, 10.0, 0, economy)
    first, second = [dk.impulse_responses(Stub(econ=tables, policy=lambda at, share=share: share * (
        at.k + at.s + at.z)), CFG, k, mass) for share in (0.5, 0.9)]
    middle, (path, shocked), Z = len(economy.arrays.TFP) // 2, first["shocks"], len(economy.arrays.TFP)
    assert all(np.array_equal(a, b) for a, b in zip(first["shocks"], second["shocks"]))
    assert not np.array_equal(first["capital"], second["capital"])
    assert (path[:, 0] == middle).all() and (shocked[:, 0] == max(middle - 1, 0)).all() and (shocked <= path).all()
    assert Z > 1 or all(np.array_equal(*pair) for pair in first.values())
    for z in range(Z):  # transitions after 0 are those of P_z
        found = np.bincount(path[:, 1:][path[:, :-1] == z].astype(int), minlength=Z)
        n, p = found.sum(), economy.arrays.P_z[z]
        assert (np.abs(found - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5 + 1).all() and (found[p == 0] == 0).all()


def test_employment_follows_the_shock(econ):
    """A policy that saves for employment alone writes s_t into K_{t+1}: the bad state at 0 comes with its unemployment,
    the good one with its own, and a quarter before both were good."""
    cfg, k = dataclasses.replace(CFG, irf_paths=100, irf_agents=200, irf_periods=2), np.linspace(0, 90, 50)
    mass = dk.dispersed_mass(k, 39.0, 1, dk.krusell_smith())
    census = dk.impulse_responses(Stub(econ=econ, policy=lambda at: at.s.double()), cfg, k, mass)
    idle = [1 - K for K in census["capital"]]
    # 20,000 households; a deviation is sqrt(0.1 x 0.9 / 20,000) = 0.0021
    assert np.array_equal(idle[0][:, 0], idle[1][:, 0])
    assert idle[0][:, 0].mean() == pytest.approx(0.04, abs=4 * 0.0014)  # the quarter before, good for all
    assert idle[0][:, 1].mean() == pytest.approx(0.04, abs=4 * 0.0014)
    assert idle[1][:, 1].mean() == pytest.approx(0.10, abs=4 * 0.0021)
    assert (idle[1][:, 1] >= idle[0][:, 1]).all()  # the same uniform numbers: nobody finds work through the shock


# ------------------------------------------------------------------------------------------------ verdict


def check_rows(rows):
    """A figure that has a tolerance passes where it is within it."""
    for name, ours, _, _, tolerance, passed in rows:
        size = ours if name.startswith("Euler") else abs(ours)  # Euler errors are logarithms
        assert passed == (None if tolerance is None else size <= tolerance), name


def rows_of(compared, economy):
    return {row["figure"]: tuple(row.values()) for row in dk.verdict(compared[0], economy, CFG)}


def test_verdict(itself, poor):
    """A grid in the network's place passes where it is compared with itself; a poor network fails there. Without a grid
    nothing passes or fails. Where a distribution still moves nothing is judged."""
    without = ({"network": poor[0]["network"], "comparison": {}},)
    own, far, alone = [rows_of(x, dk.krusell_smith()) for x in (itself, poor, without)]
    distances = [row for row in own if row.startswith(("W1", "std", "|k'", "response"))]
    assert len(distances) >= 8
    for row in distances:
        assert own[row][1] == 0 and own[row][-1] is True and far[row][1] != 0
    assert far["|k' - k' grid|, mean"][-1] is False
    check_rows([*own.values(), *far.values()])
    assert len(alone) >= 6 and all(row[2] is row[4] is row[5] is None for row in alone.values())
    assert all(math.isfinite(row[1]) for row in alone.values())
    moving = {name: dict(of) for name, of in itself[0].items()}
    moving["network"] |= {"limit": moving["network"]["limit"] | {"moves": 0.1}}
    assert all(row[-1] is None for row in rows_of((moving,), dk.krusell_smith()).values())


def test_panels_that_leave_the_grid_are_not_judged(itself, small_grid):
    """Few households of whom some may be very rich, say, as in Davila et al.'s economy: the limit and the responses are
    judged as ever. A narrower grid has more of the same paths outside its nodes."""
    outside, K = itself[0]["comparison"]["outside_K"], itself[1]["small"]["grid"]["K_path"]
    low, high = small_grid.reach()[1]
    assert outside["small"] == ((K < low) | (K > high)).mean() < 0.01 and outside["limit"] == 0
    narrow = dk.compare({"network": small_grid, "grid": dataclasses.replace(
        small_grid, K=small_grid.K.clamp(*np.quantile(K, (0.1, 0.9))))}, CFG)[0]["comparison"]["outside_K"]
    assert narrow["small"] > 0.1
    alone = dk.compare({"network": small_grid}, CFG)[0]["comparison"]  # what it knows itself
    assert alone == {"outside_K": {"small": outside["small"], "limit": 0, "irf": 0}}
    wide = itself[0]["comparison"] | {"outside_K": outside | {"small": 0.02}}
    rows = rows_of((itself[0] | {"comparison": wide},), dk.krusell_smith())
    assert rows["W1 of capital, N=30"][-1] is None and rows["std of capital over the grid's - 1, N=30"][-1] is None
    assert rows["W1 of capital, N=inf"][-1] is True and rows["response of output, gap (p.p.)"][-1] is True


def test_verdict_of_another_economy(economies, poor, itself):
    """Nothing is published; the grid's own figures measure, and a poor network fails."""
    far, own = [rows_of(x, economies["gamma2"]) for x in (poor, itself)]
    assert all(row[3] is None for row in far.values()) and sum(row[-1] is False for row in far.values()) >= 5
    assert all(row[-1] is not False for name, row in own.items() if not name.startswith("Euler"))
    check_rows([*far.values(), *own.values()])
    W1 = far["W1 of capital, N=inf"]
    assert W1[4] == pytest.approx(0.004 * poor[0]["grid"]["limit"]["capital"]["mean"])
