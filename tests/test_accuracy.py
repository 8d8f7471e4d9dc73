"""The yardsticks: known policies, known distributions, and solutions judged against themselves."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch

import deepham_ks as dk

CFG = dataclasses.replace(dk.PRESETS["smoke"], hidden=6, eval_agents=30, eval_economies=3, eval_periods=80,
                          eval_drop=20, eval_every=4, eval_states=300, irf_paths=30, irf_agents=40, irf_periods=25,
                          irf_burn=30)
SMALL = dk.GridConfig(n_k=60, n_K=6, n_k_fine=150, n_K_fine=9, periods=1000, burn_in=50, tolerance=1e-4)
F64 = torch.float64


class Stub(dk.Policy):
    """A solution made of what is given."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def everybody(pooled):
    """States of all households in pooled cross-sections."""
    return dk.states_of(pooled, torch.arange(pooled["k"].numel()))


def untrained(economy):
    """A network solution near the right level of saving."""
    econ = economy.tables()
    share = math.log(economy.c_ss / (economy.K_ss + economy.c_ss))
    policy, value = (dk.initial_parameters(dk.n_inputs(econ, network), 6, bias, seed)
                     for network, bias, seed in (("policy", share, 0), ("value", 0.0, 1)))
    for theta in (policy, value):
        theta[-7:-1] = 0.01 * torch.randn(6, generator=torch.Generator().manual_seed(2))
    state = {"policy": policy, "value": value, "K_mean": economy.K_ss, "k_range": economy.K_ss * torch.tensor([0.1, 5]),
             "settled": 0, "history": {}}
    return dk.Solution(dk.weights_file(state, economy, {}, CFG, 0))


@pytest.fixture(scope="module")
def network():
    return untrained(dk.krusell_smith())


@pytest.fixture(scope="module")
def toy_grid(economies):
    return dk.solve_grid(economies["toy"], SMALL)


def as_network(grid, economy=None):
    """The grid in the network's place."""
    return Stub(econ=grid.econ, economy=economy or dk.krusell_smith(), policy=grid.policy, values=grid.values,
                next_capital=grid.next_capital, K_mean=grid.K_mean)


def table_nodes(grid):
    n_K, n_k = grid.table.shape[2:]
    return dk.power_grid(n_k, grid.econ.k_min, grid.k_max, grid.exponent), np.linspace(grid.K_low, grid.K_high, n_K)


# ------------------------------------------------------------------------------------------------ solutions


SIZES = ("small", "large", "limit")


def test_interchangeable(smoke_grid, network, econ):
    """The grid in both places: no distance of any kind. With the network in one: distances, on the same shocks. A
    solution has the same figures alone and beside another."""
    figures, arrays = dk.compare(as_network(smoke_grid), smoke_grid, CFG)
    for size in SIZES:
        assert figures["comparison"][size]["w1"] == 0 and figures["comparison"][size]["std_ratio"] == 1
        assert repr(figures["network"][size]) == repr(figures["grid"][size])
    of_limit = arrays["limit"]["grid"]
    start = functools.partial(dk.settled_panel, of_limit["k"], [of_limit["mass"]])
    for size, B, N in (("small", CFG.eval_economies, CFG.eval_agents),
                       ("large", CFG.eval_economies_large, CFG.eval_agents_large)):
        again, _ = dk.judge_panel({"alone": smoke_grid}, econ, CFG, B, N, dk.JUDGE_SEED, start)
        assert repr(again["alone"]) == repr(figures["grid"][size])
    assert figures["comparison"]["policy_distance"] == {"mean": 0, "max": 0}
    gaps = dict(figures["comparison"]["impulse_response_gap"])
    assert gaps.pop("n_agents") == CFG.irf_agents and set(gaps.values()) == {0}

    beside, arrays = dk.compare(network, smoke_grid, CFG)
    assert beside["comparison"]["small"]["w1"] > 0.1 and beside["comparison"]["policy_distance"]["mean"] > 0.01
    for size in SIZES:
        assert np.array_equal(arrays[size]["network"]["z_path"], arrays[size]["grid"]["z_path"])
        k, weight = ([arrays[size][name][x] for name in ("network", "grid")] for x in ("k", "weight"))
        assert beside["comparison"][size]["w1"] == scipy.stats.wasserstein_distance(*k, *weight) > 0
        assert repr(beside["grid"][size]) == repr(figures["grid"][size])
    for kind in (0, 1):
        z_network, z_grid = (arrays["irf"][name]["shocks"][kind] for name in ("network", "grid"))
        assert np.array_equal(z_network, z_grid)


def test_panels_beside_each_other_are_the_same(network, smoke_grid, monkeypatch):
    """With two threads the panels share them; with one they come in turn. No thread is kept, in trouble neither."""
    def figures(threads):
        with dk.at_most(threads):
            of, arrays = dk.compare(network, smoke_grid, CFG)
            assert torch.get_num_threads() == threads
        return dk.plain(of["network"]["small"]), dk.plain(of["network"]["large"]), arrays["irf"]["network"]["capital"]

    begun, before = [], torch.get_num_threads()
    monkeypatch.setattr(dk, "beside", lambda work, real=dk.beside: begun.append(work) or real(work))
    (small, large, irf), (small_alone, large_alone, irf_alone) = figures(2), figures(1)
    assert len(begun) == 1
    for ours, theirs in ((small, small_alone), (large, large_alone)):
        assert ours["euler_log10"] == pytest.approx(theirs["euler_log10"], abs=1e-3)
        assert ours["capital"]["quantiles"] == pytest.approx(theirs["capital"]["quantiles"], rel=1e-5)
    assert np.allclose(irf, irf_alone, rtol=1e-5)

    def trouble(*_):
        raise ValueError

    monkeypatch.setattr(dk, "impulse_responses", trouble)
    with pytest.raises(ValueError):
        figures(2)
    assert torch.get_num_threads() == before


def test_comparison_without_a_grid(network, smoke_grid):
    """The network's own figures, the same as beside a grid; nothing to compare."""
    alone, arrays = dk.compare(network, None, CFG)
    beside, _ = dk.compare(network, smoke_grid, CFG)
    assert set(alone) == {"network", "comparison"} and not alone["comparison"]
    for size in SIZES:  # on the same nodes of k but for the highest, where the grid says how far they go
        (own, own_beside), (k, k_beside) = [[of["network"][size][x] for of in (alone, beside)]
                                            for x in ("euler_log10", "capital")]
        assert own == pytest.approx(own_beside, abs=0.02)
        assert k["quantiles"] == pytest.approx(k_beside["quantiles"], rel=0.01)
    assert set(arrays) == {*SIZES, "irf"} and all(set(of) == {"network"} for of in arrays.values())


def test_comparison_in_another_economy(economies, toy_grid):
    """Three z, debt and three discount factors: the grid in both places shows no distance, a poor network does."""
    economy = economies["toy"]
    same, _ = dk.compare(as_network(toy_grid, economy), toy_grid, CFG)
    poor, _ = dk.compare(untrained(economy), toy_grid, CFG)
    for size in SIZES:
        assert same["comparison"][size]["w1"] == 0 < poor["comparison"][size]["w1"]
        assert repr(same["network"][size]) == repr(same["grid"][size])
        assert poor["grid"][size]["law_of_motion"]["coefficients"].shape == (3, 2)
    assert same["comparison"]["policy_distance"] == {"mean": 0, "max": 0}
    assert poor["comparison"]["policy_distance"]["mean"] > 0.01
    # Euler errors of the coarse grid, and of a policy that was never trained
    assert poor["grid"]["limit"]["euler_log10"]["mean"] < -2.5 < -1.7 < poor["network"]["limit"]["euler_log10"]["mean"]


def test_panels_replayed_as_graphs_are_the_same(smoke_grid, econ, monkeypatch):
    """With what a CUDA graph does: the same step on the same memory, its result written where the last one was."""
    steps = []

    def capture(step, tensors, rng):
        result = step().clone()
        steps.append(result.dtype)
        return lambda: result.copy_(step())

    monkeypatch.setattr(dk, "capture", capture)
    both = {"network": as_network(smoke_grid), "grid": smoke_grid}
    (plain, z), (graphs, z_graphs) = [dk.ergodic_states(both, econ, CFG, B=3, N=30, seed=1, graphs=x) for x in (0, 1)]
    assert 2 <= len(steps) <= 4 and torch.equal(z, z_graphs)
    for name in both:
        assert torch.equal(plain[name][1], graphs[name][1])
        for part, x in plain[name][0].items():
            assert torch.equal(x, graphs[name][0][part]), part


def test_ergodic_states(smoke_grid, econ):
    """What is dropped, what is pooled, and K' the mean of k' that followed."""
    def simulated(seed):
        of, z_path = dk.ergodic_states({"grid": smoke_grid}, econ, CFG, B=3, N=30, seed=seed)
        return everybody(of["grid"][0]), of["grid"][1], z_path

    states, K_path, z_path = simulated(5)
    assert K_path.shape == z_path.shape == (60, 3)  # 80 - 20 periods
    assert states.k.shape == (15 * 3 * 30,)  # every 4th of them
    k, K, K_next = (x.view(15, 3, 30) for x in (states.k, states.K, states.K_next))
    assert torch.allclose(k.mean(2), K[..., 0]) and torch.equal(K[..., 0], K_path[::4])
    assert torch.allclose(K_next[..., 0], K_path[1::4])
    assert torch.equal(states.z.view(15, 3, 30)[..., 0], z_path[::4])
    k_next = smoke_grid.policy(*states.now()).view(15, 3, 30)
    assert torch.allclose(k_next.mean(2), K_next[..., 0])
    assert torch.equal(states.k, simulated(5)[0].k) and not torch.equal(states.k, simulated(6)[0].k)


def test_ergodic_states_of_two_solutions(smoke_grid, network, econ):
    """On the same shocks, each as it is alone."""
    solutions = {"network": network, "grid": smoke_grid}
    both, z_path = dk.ergodic_states(solutions, econ, CFG, B=3, N=30, seed=5)
    assert all(torch.equal(both["network"][0][name], both["grid"][0][name]) for name in ("s", "z"))
    for name, solution in solutions.items():
        alone, z_alone = dk.ergodic_states({name: solution}, econ, CFG, B=3, N=30, seed=5)
        assert torch.equal(z_path, z_alone) and torch.equal(both[name][1], alone[name][1])
        assert all(torch.equal(x, alone[name][0][part]) for part, x in both[name][0].items())


def test_panel_from_the_limit(economies, toy_grid):
    """k given s as the histograms say, atoms at the limit included, (z, s) at the stationary shares; each policy goes
    on from its own k, all on the same draws."""
    economy, k = economies["toy"], table_nodes(toy_grid)[0]
    econ, S = economy.tables(), len(economy.beta)
    mass = dk.dispersed_mass(k, toy_grid.K_mean, 1, economy)
    mass[0, 0] += 0.3 * mass[0].sum()  # 3 of 13 of those in s = 0 have nothing
    other = np.roll(mass, 7, 1)
    panel = dk.settled_panel(k, [mass, other, mass], 40, 5000, econ, torch.Generator().manual_seed(1))
    assert panel.k.shape == (3, 40, 5000) and panel.k.dtype == torch.float32
    assert torch.equal(panel.k[0], panel.k[2]) and not torch.equal(panel.k[0], panel.k[1])
    like = dk.initial_panel(40, 5000, econ, torch.Generator().manual_seed(1))
    assert torch.equal(panel.s, like.s) and torch.equal(panel.z, like.z)
    for of_policy, of_mass in zip(panel.k, (mass, other)):
        for s in range(S):
            held, found = of_mass[s].cumsum() / of_mass[s].sum(), of_policy[panel.s == s].numpy()
            if len(found):
                for share in (0.1, 0.5, 0.9):
                    at = np.searchsorted(held, share)
                    assert (found <= k[at]).mean() == pytest.approx(held[at], abs=0.01)
    assert (panel.k[0][panel.s == 0] == econ.k_min).float().mean() == pytest.approx(3 / 13, abs=0.01)
    (_, _, paths), *_ = dk.simulate([toy_grid.policy] * 3, panel, 1, econ, torch.Generator())
    for k_of, (k_now, K, k_next) in zip(panel.k, paths):
        assert torch.equal(k_now, k_of) and torch.equal(K, k_of.mean(1, keepdim=True))


def test_panels_start_from_the_limit(network, smoke_grid, monkeypatch):
    """Both sizes and the impulse responses, each solution from its own histogram."""
    seen, real = {}, dk.settled_panel
    monkeypatch.setattr(dk, "settled_panel", lambda *of: seen.setdefault(of[2:4], (of, real(*of)))[1])
    _, arrays = dk.compare(network, smoke_grid, CFG)
    assert set(seen) == {(CFG.eval_economies, CFG.eval_agents), (CFG.eval_economies_large, CFG.eval_agents_large),
                         (CFG.irf_paths, CFG.irf_agents)}
    for (k, masses, *_), _ in seen.values():
        for mass, of in zip(masses, arrays["limit"].values(), strict=True):
            assert np.array_equal(mass, of["mass"]) and np.array_equal(k, of["k"])
            assert np.array_equal(mass.sum(0), of["weight"])


def test_python_interface_broadcasts(network, smoke_grid):
    k, s, K, z = np.linspace(0, 100, 7)[:, None], [0, 1], 39.5, 1
    for function in (network.next_capital, network.value, smoke_grid.next_capital, smoke_grid.value):
        table = function(k, s, K, z)
        assert isinstance(table, np.ndarray) and table.shape == (7, 2) and np.isfinite(table).all()
        for i in range(7):
            for state in (0, 1):
                assert float(function(float(k[i, 0]), state, K, z)) == pytest.approx(table[i, state], rel=1e-12)
        assert function([1.0], [1.0], [39.0], [True]) == function([1.0], [1], [39.0], [1])
        assert (np.diff(table, axis=0) != 0).all() and function(5, 1, 39, 0) != function(5, 1, 39, 1)


@pytest.mark.parametrize("bad, name", [((10, 2, 39, 1), "s"), ((10, 1, 39, -1), "z"), ((10, 0.5, 39, 1), "s"),
                                       ((10, 1, 39, [0, 1, math.nan]), "z"), ((10, 1, 39, 0.99), "z")])
def test_python_interface_refuses_states_that_are_no_index(network, smoke_grid, bad, name):
    for function in (network.next_capital, network.value, smoke_grid.next_capital, smoke_grid.value):
        with pytest.raises(ValueError, match=f"^{name} must be one of 0 to 1"):
            function(*bad)


def test_python_interface_knows_the_number_of_states(economies, toy_grid):
    for solution in (toy_grid, untrained(economies["toy"])):
        assert np.isfinite(solution.value(1.0, [0, 1, 2], 5.0, 2)).all()
        with pytest.raises(ValueError, match="^s must be one of 0 to 2, not 3"):
            solution.next_capital(1.0, 3, 5.0, 0)


@pytest.mark.parametrize("gamma", [0.7, 1.0, 3.0])
def test_network_value_is_in_utils(gamma):
    """next_capital and value of Solution against the kernels: a household has u(c) = c^(1 - gamma) / (1 - gamma) of
    c_ss exp(g / 10) for ever, or ln of it, discounted."""
    network = untrained(dk.krusell_smith(dk.Calibration(gamma=gamma)))
    k, K = torch.tensor([3.0, 40.0]).double(), torch.tensor([38.0, 41.0]).double()
    s, z = torch.tensor([0, 1]), torch.tensor([1, 0])
    layers, econ = network.layers, network.econ
    assert network.next_capital(k, s, K, z) == pytest.approx(
        dk.network_capital(layers["policy"], k, s, K, z, econ).numpy(), rel=1e-12)
    m, _ = dk.cash_on_hand(k, s, K, z, econ)
    g = dk.network(layers["value"], dk.for_value(dk.features(k, s, m, K, z, econ)))
    c = (network.economy.c_ss * torch.exp(g / 10)).numpy()
    u = np.log(c) if gamma == 1 else c ** (1 - gamma) / (1 - gamma)
    assert network.value(k, s, K, z) == pytest.approx(u / (1 - 0.99), rel=1e-9)
    V, _ = dk.network_value(layers["value"], k, s, K, z, econ)
    assert torch.allclose(network.values(k, s, K, z), V, rtol=1e-12)


# ------------------------------------------------------------------------------------------------ errors
# Brock & Mirman (1972): log utility, full depreciation, everybody alike. k = K, k' = alpha beta Y, and the planner's
# V = A(z) + B ln k with B = alpha / (1 - alpha beta)


class BrockMirman:
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

    def policy(self, k, s, K, z):
        return self.saved * dk.output(K, z, self.econ)

    def values(self, k, s, K, z):
        """In units of utility(): ln c less ln c_ss for ever."""
        return self.A[z] + self.B * torch.log(k) - math.log(self.economy.c_ss) / (1 - 0.99)

    def states(self):
        K = torch.linspace(0.05, 0.4, 40, dtype=F64)
        z = torch.arange(40) % 3
        return dk.States(K, torch.zeros_like(z), K, z, self.policy(K, None, K, z))


def test_errors_of_the_exact_solution_are_zero():
    exact = BrockMirman()
    assert dk.euler_errors(exact, exact.states(), exact.econ).abs().max() < 1e-12
    own, best = dk.bellman_errors(exact, exact.states(), exact.econ)
    assert max(own.abs().max(), best.abs().max()) < 1e-12


@pytest.mark.parametrize("saved", [0.25, 0.5])
def test_errors_of_a_wrong_policy_have_a_closed_form(saved):
    """u'(c~) = beta E[alpha Y' / K' / ((1 - s) Y')]: c~ / c = s / (alpha beta). With the planner's value the own c
    loses ln((1 - s) / (1 - ab)) + beta B ln(s / ab), and the best c nothing."""
    wrong = BrockMirman(saved)
    alpha, beta = 0.36, 0.99
    error = dk.euler_errors(wrong, wrong.states(), wrong.econ)
    assert error.numpy() == pytest.approx(np.full(40, 1 - saved / (alpha * beta)), rel=1e-10)
    own, best = dk.bellman_errors(wrong, wrong.states(), wrong.econ)
    loss = math.log((1 - saved) / (1 - alpha * beta)) + beta * wrong.B * math.log(saved / (alpha * beta))
    assert own.numpy() == pytest.approx(np.full(40, loss), rel=1e-9)
    # the parabola leaves less than 0.1% of c, and half its square times a curvature of 4 in utils
    assert best.abs().max() < 2e-6 < loss / -1000


def valuing_wealth(economy):
    """The untrained policy, and a value that rises with log cash on hand, the first input but the square of ln K: g =
    2.5 of it, up to 1%."""
    network = untrained(economy)
    W1, b1, W2, b2, w3, b3 = (torch.zeros_like(x) for x in network.layers["value"])
    W1[0, 1], W2[0, 0], w3[0] = 0.1, 1.0, 25.0
    network.layers["value"] = [W1, b1, W2, b2, w3, b3]
    return network


@pytest.mark.parametrize("name", ["log", "toy", "one_z"])
def test_best_consumption_against_brute_force(economies, name):
    """The re-maximised error against 1,001 values of c between half and one and a half times the policy's, ends
    included."""
    economy = economies[name]
    network, (Z, S) = valuing_wealth(economy), economy.income.shape
    econ = network.econ
    states = everybody(dk.ergodic_states({"network": network}, econ, CFG, B=3, N=30, seed=1)[0]["network"][0])
    states = states.at(slice(None, None, 25))
    own, best = dk.bellman_errors(network, states, econ)
    m, _ = dk.cash_on_hand(*states.now(), econ)
    c = m - network.policy(*states.now())
    beta, P = torch.tensor(economy.beta)[states.s], torch.tensor(economy.P)[states.z, states.s]
    V, brute, inside = network.values(*states.now()), torch.full_like(c, -math.inf), torch.zeros_like(c).bool()
    for factor in np.linspace(0.5, 1.5, 1001).tolist():
        trial = torch.minimum(factor * c, m - economy.k_min)
        total = dk.utility(trial, econ)
        for z, s in np.ndindex(Z, S):
            one = torch.ones_like(states.z)
            total = total + beta * P[:, z, s] * network.values(m - trial, s * one, states.K_next, z * one)
        inside = torch.where(total - V > brute, (trial < m - economy.k_min) & (0.51 < factor < 1.49), inside)
        brute = torch.maximum(brute, total - V)
        if factor == 1.0:
            assert torch.allclose(own, total - V, atol=1e-9)
    # the objective is concave with curvature of order gamma in ln c: half a step of 1e-3 costs 1e-7
    gap = (best - brute).abs() / (dk.marginal_utility(c, econ) * c)
    assert inside.double().mean() > 0.8 and gap[inside].max() < 1e-6 * max(economy.gamma, 1)
    assert gap.max() < 1e-5
    assert (best - own).max() > 1e-4  # there was something to find


def test_euler_errors_leave_out_the_constrained(smoke_grid, econ):
    """k' = 0 with c~ above m is no error; k' = 0 with c~ below m is one; c~ is never above m."""
    k, s, K, z = (torch.tensor([x], dtype=d) for x, d in ((0.0, F64), (0, torch.long), (39.0, F64), (0, torch.long)))
    states = dk.States(k, s, K, z, K)
    assert smoke_grid.policy(*states.now()) == 0 and dk.euler_errors(smoke_grid, states, econ).numel() == 0

    def eat_all_when_rich(k, s, K, z):
        return torch.where(k > 100, 0.0, smoke_grid.policy(k, s, K, z))

    rich = dk.States(k + 150, s, K, z, K)
    error = dk.euler_errors(Stub(policy=eat_all_when_rich), rich, econ)
    assert error.shape == (1,) and 0 < error < 1  # c~ < c

    def save_half_once(k, s, K, z):
        return torch.where(K == 39.0, 0.5 * dk.cash_on_hand(k, s, K, z, econ)[0], 0.0)

    # saves half of m at K = 39 to eat everything at K = 45: c~ would be above m, and is m = 2 c
    error = dk.euler_errors(Stub(policy=save_half_once), dk.States(k, s + 1, K, z, K + 6), econ)
    assert error.item() == pytest.approx(-1, abs=1e-12)


def test_euler_errors_at_a_limit_below_zero(economies, toy_grid):
    """k' = k_min in debt is no error where c~ is above m - k_min, and the poor are there."""
    economy, econ = economies["toy"], toy_grid.econ
    k = torch.full((3,), economy.k_min, dtype=F64)
    s, z, K = torch.zeros(3, dtype=torch.long), torch.arange(3), torch.full((3,), toy_grid.K_mean, dtype=F64)
    assert (toy_grid.policy(k, s, K, z) == economy.k_min).all()
    assert dk.euler_errors(toy_grid, dk.States(k, s, K, z, K), econ).numel() == 0
    saver = Stub(policy=lambda k, s, K, z: torch.full_like(k, economy.k_min + 0.1))
    assert (dk.euler_errors(saver, dk.States(k, s, K, z, K), econ) < 0).all()  # c~ > c: it should borrow more


@pytest.mark.parametrize("name", ["gamma2", "toy"])
def test_error_figures(economies, name):
    """mean |x|, root mean square and max |x|; in utils, in units of u'(c) c, and log10 of |Euler errors|."""
    network = untrained(economies[name])
    econ, c_ss = network.econ, economies[name].c_ss
    states = everybody(dk.ergodic_states({"network": network}, econ, CFG, B=3, N=30, seed=1)[0]["network"][0])
    figures, arrays = dk.errors_at(network, states, econ)
    m, _ = dk.cash_on_hand(*states.now(), econ)
    c, (own, best) = m - network.policy(*states.now()), dk.bellman_errors(network, states, econ)
    utils = c_ss ** (1 - econ.gamma)  # utility() is of c / c_ss
    for kind, x in (("bellman_own_c", own * utils), ("bellman_best_c", best * utils),
                    ("bellman_in_consumption", own * utils / (c**-econ.gamma * c))):
        x = x.tolist()
        mean, rmse = sum(map(abs, x)) / len(x), math.sqrt(sum(y * y for y in x) / len(x))
        assert figures[kind] == pytest.approx({"mean": mean, "rmse": rmse, "max": max(map(abs, x))})
    euler = dk.euler_errors(network, states, econ).abs().numpy()
    assert figures["euler_log10"] == {"mean": pytest.approx(math.log10(euler.mean())),
                                      "p99": pytest.approx(math.log10(np.percentile(euler, 99))),
                                      "max": pytest.approx(math.log10(euler.max()))}
    assert figures["states"] == len(own)
    assert arrays["bellman"] == pytest.approx((own * utils).numpy()) and np.array_equal(arrays["sample_k"], states.k)


# ------------------------------------------------------------------------------------------------ distributions


def test_inequality_of_known_distributions():
    n = 20_001
    x = (np.arange(n) + 0.5) / n
    shuffled = np.random.default_rng(0).permutation(x)
    uniform = dk.inequality(10 * shuffled)  # Gini 1/3, Lorenz p^2
    p = np.linspace(0, 1, 21)
    # midpoints of n equal slices: moments and Lorenz curve are exact to order 1 / n^2, quantiles to 1 / n
    assert uniform["gini"] == pytest.approx(1 / 3, abs=1e-7)
    assert uniform["lorenz"] == pytest.approx(p**2, abs=1e-7)
    assert uniform["mean"] == pytest.approx(5) and uniform["std"] == pytest.approx(10 / 12**0.5, rel=1e-7)
    assert uniform["quantiles"] == {str(q): pytest.approx(q / 10, abs=10 / n) for q in (1, 5, 25, 50, 75, 95, 99)}
    assert uniform["top_percent_hold"] == {str(q): pytest.approx(100 * (1 - (1 - q / 100) ** 2), abs=1e-5)
                                           for q in (1, 5, 10, 20)}
    equal = dk.inequality(np.full(50, 3.0))
    assert equal["gini"] == pytest.approx(0, abs=1e-12) and equal["lorenz"] == pytest.approx(p, abs=1e-12)
    assert equal["top_percent_hold"] == {str(q): pytest.approx(q) for q in (1, 5, 10, 20)}
    one_has_all = dk.inequality(np.array([0.0] * 99 + [5.0]))
    assert one_has_all["gini"] == pytest.approx(0.99) and one_has_all["lorenz"][-2] == pytest.approx(0, abs=1e-12)
    assert one_has_all["top_percent_hold"] == {str(q): pytest.approx(100) for q in (1, 5, 10, 20)}
    exponential = dk.inequality(-np.log(1 - x))
    assert exponential["gini"] == pytest.approx(0.5, abs=1e-3)  # the tail beyond the last slice: ln(n) / n
    assert exponential["top_percent_hold"]["10"] == pytest.approx(10 * (1 + math.log(10)), abs=0.1)


def test_inequality_counts_weights():
    """An observation of weight n is n observations, whatever the unit of weights; zero weight is nobody."""
    rng = np.random.default_rng(1)
    x, weight = rng.gamma(2.0, size=300) - 0.3, rng.integers(0, 6, 300)
    weighted, repeated = dk.inequality(x, weight), dk.inequality(np.repeat(x, weight))
    for name in ("mean", "std", "gini"):
        assert weighted[name] == pytest.approx(repeated[name], rel=1e-12), name
    assert weighted["lorenz"] == pytest.approx(repeated["lorenz"], abs=1e-12)
    assert weighted["top_percent_hold"] == {q: pytest.approx(y) for q, y in repeated["top_percent_hold"].items()}
    # quantiles run between the middles of observations, one or several: within the step of two neighbours
    for q, y in weighted["quantiles"].items():
        assert y == pytest.approx(repeated["quantiles"][q], abs=np.diff(np.sort(x)).max())
        assert (np.repeat(x, weight) <= y + 1e-9).mean() == pytest.approx(int(q) / 100, abs=0.01)
    other = dk.inequality(x, weight / 7.3)
    assert other["gini"] == pytest.approx(weighted["gini"]) and other["mean"] == pytest.approx(weighted["mean"])


def synthetic_law(shock=0.0):
    law = np.array([[0.12, 0.965], [0.14, 0.963]])
    z = (np.arange(400) // 8) % 2
    ln_K = np.full(400, 3.65)
    for t in range(399):
        ln_K[t + 1] = law[z[t]] @ (1, ln_K[t]) + (shock if t == 199 else 0.0)
    return law, np.exp(ln_K)[:, None], z[:, None]


def test_law_of_motion_figures_of_an_exact_law():
    """Also where one more z never comes: its coefficients are NaN, its R2 too."""
    law, K, z = synthetic_law()
    figures = dk.law_of_motion_figures(K, z, 3)
    assert figures["coefficients"][:2] == pytest.approx(law, abs=1e-9)
    assert figures["r2"][:2] == pytest.approx(1, abs=1e-9)
    assert np.isnan(figures["coefficients"][2]).all() and np.isnan(figures["r2"][2])
    assert figures["den_haan_max_percent"] < 1e-7


def test_den_haan_error_accumulates():
    """One shock of 1%: the path that the law draws by itself never learns of it, so the dynamic error is about 1%
    (the regression takes up a little), falling at 0.965 a period; one-step errors would all but one be zero."""
    _, K, z = synthetic_law(shock=0.01)
    figures = dk.law_of_motion_figures(K, z, 2)
    alm = dk.law_of_motion(torch.tensor(K), torch.tensor(z), torch.zeros(2))[0].numpy()
    forecast = [math.log(K[0, 0])]
    for t in range(399):
        forecast.append(alm[z[t, 0]] @ (1, forecast[-1]))
    error = 100 * np.abs(np.array(forecast) - np.log(K[:, 0]))
    assert figures["den_haan_max_percent"] == pytest.approx(error.max(), rel=1e-9)
    assert figures["den_haan_mean_percent"] == pytest.approx(error.mean(), rel=1e-9)
    assert 0.8 < error.max() < 1.2


def test_policy_distance(economies):
    """k from the limit to four times mean capital, K at three percentiles of the grid's path, all z and s: distances
    that depend on each in a known way."""
    seen = {}

    def other(k, s, K, z):
        seen.update(k=k, s=s, K=K, z=z)
        return np.full(np.shape(k), 0.25) + 0.5 * (s == 2) * (z == 1) * (K > 41)

    zero = Stub(next_capital=lambda k, s, K, z: np.zeros(np.shape(k)))
    path = np.interp(np.linspace(0, 100, 1001), (0, 2, 50, 98, 100), (36, 37, 39.5, 42, 50))
    judged, economy = path[:, None], economies["toy"]
    found = dk.policy_distance(Stub(next_capital=other), zero, economy, judged)
    assert found == {"mean": pytest.approx(0.25 + 0.5 / 27), "max": pytest.approx(0.75)}
    assert economy.k_min < seen["k"].min() < economy.k_min + 0.6 and seen["k"].max() == pytest.approx(4.07 * 39.5)
    assert np.unique(seen["K"]) == pytest.approx([37, 39.5, 42])
    assert set(np.unique(seen["s"])) == set(np.unique(seen["z"])) == {0, 1, 2}
    assert found == dk.policy_distance(zero, Stub(next_capital=other), economy, judged)


# ------------------------------------------------------------------------------------------------ the limit

LONG = dataclasses.replace(CFG, eval_periods=400, eval_drop=300, eval_every=10, eval_states=500)


@pytest.mark.parametrize("name", ["log", "toy", "one_z"])
def test_limit_of_the_same_solution_twice(economies, name):
    """No distance between the two, whatever their names; other figures for another policy."""
    economy = economies[name]
    grid = dk.solve_grid(economy, SMALL)
    solutions = {"one": grid, "two": grid, "network": untrained(economy)}
    cfg = dataclasses.replace(LONG, eval_periods=120, eval_drop=60)
    figures, arrays = dk.judge_limit(solutions, economy, grid.econ, cfg, table_nodes(grid)[0], seed=1)
    one, two, other = [arrays[x] for x in solutions]
    assert scipy.stats.wasserstein_distance(one["k"], two["k"], one["weight"], two["weight"]) == 0
    assert repr(figures["one"]) == repr(figures["two"]) and np.array_equal(one["K_path"], two["K_path"])
    assert scipy.stats.wasserstein_distance(one["k"], other["k"], one["weight"], other["weight"]) > 0.001
    assert np.array_equal(one["z_path"], other["z_path"]) and one["z_path"].shape == (60, 1)
    assert one["weight"].sum() == pytest.approx(1, abs=1e-12) and (one["weight"] >= 0).all()
    assert figures["one"]["n_agents"] is None and figures["one"]["periods"] == 60


def test_limit_closes_the_budget(smoke_grid, econ):
    """C = (1 - delta) K + Y - K' at every pooled date: mean consumption by two routes. Mean capital is that of the
    pooled path, the interest rate that of the whole one."""
    economy = dk.krusell_smith()
    figures, arrays = dk.judge_limit({"grid": smoke_grid}, economy, econ, LONG, table_nodes(smoke_grid)[0], seed=1)
    K, z = torch.tensor(arrays["grid"]["K_path"][:, 0]), torch.tensor(arrays["grid"]["z_path"][:, 0])
    at = torch.arange(0, 99, 10)
    C = (1 - economy.delta) * K[at] + dk.output(K, z, econ)[at] - K[at + 1]
    assert figures["grid"]["consumption"]["mean"] == pytest.approx(C.mean().item(), rel=1e-9)
    assert figures["grid"]["capital"]["mean"] == pytest.approx(K[at].mean().item(), rel=1e-9)
    R, _ = dk.prices(K, z, econ)
    assert figures["grid"]["interest_rate_percent"] == pytest.approx(100 * (R.mean().item() - 1), rel=1e-9)
    assert figures["grid"]["law_of_motion"]["coefficients"] == pytest.approx(smoke_grid.alm_coefficients, abs=0.01)
    assert figures["grid"]["states"] == 500


def test_limit_agrees_with_households(smoke_grid, econ):
    """The histogram on a path of z, and 20,000 households who live through the same z."""
    figures, arrays = dk.judge_limit({"grid": smoke_grid}, dk.krusell_smith(), econ, LONG, table_nodes(smoke_grid)[0],
                                     seed=1)
    z_path = dk.draw_z_path(LONG.eval_periods, dk.krusell_smith(), np.random.default_rng(1))
    assert np.array_equal(arrays["grid"]["z_path"][:, 0], z_path[300:])
    rng = torch.Generator().manual_seed(3)
    k, s, _ = dk.initial_panel(1, 20_000, econ, rng, F64)
    K_path = []
    for t, z in enumerate(torch.tensor(z_path)):
        K = k.mean(1, keepdim=True)
        if t >= 300:
            K_path.append(K.item())
        k = smoke_grid.policy(k, s, K, z)
        s = dk.draw_s(torch.rand(s.shape, generator=rng), z, torch.tensor(z_path[min(t + 1, 399)]), s, econ)
    # the same noise of 20,000 households as in test_grid: income that piles up with decay 0.965, 0.2 at most
    assert np.abs(np.array(K_path) - arrays["grid"]["K_path"][:, 0]).max() < 0.2
    assert figures["grid"]["capital"]["mean"] == pytest.approx(np.mean(K_path[::10]), abs=0.2)


def test_risky_steady_state_and_the_errors_there(economies, toy_grid):
    """Followed by hand in a state z that stays: K comes to rest, and the Euler errors are those of every (s, k), each
    with its mass, the sums over (z', s') written out."""
    economy, grid = economies["toy"], toy_grid
    (k, K), S, Z = table_nodes(grid), 3, 3
    cfg = dataclasses.replace(CFG, eval_states=20_000)  # 80 - 20 periods
    mass, alm = dk.dispersed_mass(k, grid.K_mean, 1, economy), np.array([[0.1, 0.9]] * Z)
    found = dk.risky_steady_state(grid, grid.table.numpy(), k, K, mass, economy, grid.econ, cfg, alm)
    np.testing.assert_allclose(found["by_law_of_motion"], np.exp(0.1 / 0.1))
    for z in range(Z):
        seen = []
        K_path, _ = dk.simulate_histogram(grid.table.numpy(), k, K, mass, np.full(60, z), economy,
                                          lambda t, mass, k_next, seen=seen: seen.append((mass, k_next)))
        assert found["K"][z] == K_path[-1] and found["still_moves"][z] == np.ptp(K_path[-6:])
        (mass_z, k_next), K_next = seen[-1], (seen[-1][0] * seen[-1][1]).sum()
        s, worth = np.arange(S)[:, None], np.zeros((S, len(k)))
        for z_next, s_next in np.ndindex(Z, S):
            p = economy.P_z[z, z_next] * economy.Pi[z, z_next, :, s_next][:, None]
            m, R = dk.cash_on_hand(*map(torch.as_tensor, (k_next, s_next, K_next, z_next)), grid.econ)
            c = m.numpy() - grid.next_capital(k_next, s_next, K_next, z_next)
            worth += p * economy.beta[:, None] * float(R) * c**-3.0
        m, _ = dk.cash_on_hand(*map(torch.as_tensor, (k, s, K_path[-1], z)), grid.econ)
        c_implied = np.minimum(worth ** (-1 / 3), m.numpy() - k[0])
        error = np.abs(1 - c_implied / (m.numpy() - k_next))
        free = mass_z * ((k_next > k[0]) | (c_implied < m.numpy() - k[0]))
        assert abs(found["euler_log10"][z] - np.log10((free * error).sum() / free.sum())) < 0.02


def test_histogram_states_represent_the_mass(economies, toy_grid):
    """Each date's states are spread evenly over its mass: shares of s and quantiles of k, K and z of the date."""
    economy, (k, K) = economies["toy"], table_nodes(toy_grid)
    z_path, pooled = dk.draw_z_path(60, economy, np.random.default_rng(1)), []
    mass = dk.dispersed_mass(k, toy_grid.K_mean, z_path[0], economy)
    K_path, _ = dk.simulate_histogram(toy_grid.table.numpy(), k, K, mass, z_path, economy,
                                      lambda *args: pooled.append(args))
    some = [pooled[t] for t in (3, 20, 41)]
    states = dk.histogram_states(some, k, K_path, z_path, toy_grid.econ, 3000, toy_grid)
    assert all(x.shape == (3000,) for x in states[:5])
    for part, (t, mass, _) in enumerate(some):
        one = states.at(slice(1000 * part, 1000 * (part + 1)))
        assert (one.K == K_path[t]).all() and (one.z == z_path[t]).all()
        assert one.K_next.numpy() == pytest.approx(K_path[t + 1], rel=1e-12)
        found = torch.bincount(one.s, minlength=3).numpy() / 1000
        assert found == pytest.approx(mass.sum(1), abs=2e-3)
        for s in range(3):  # the distribution of k given s, as exactly as 1,000 states can have it
            i = np.searchsorted(k, one.k[one.s == s].numpy())
            assert np.array_equal(k[i], one.k[one.s == s])
            below = np.bincount(i, minlength=len(k)).cumsum() / 1000
            assert np.abs(below - mass[s].cumsum()).max() < 2.1e-3


# ------------------------------------------------------------------------------------------------ impulse responses


def test_same_solution_twice_gives_no_response(smoke_grid, econ):
    """Two solutions in one call, and two calls: the same paths."""
    both = dk.impulse_responses({"one": smoke_grid, "two": smoke_grid}, econ, CFG, seed=3)
    again = dk.impulse_responses({"one": smoke_grid}, econ, CFG, seed=3)
    assert set(both["one"]) == set(dk.SERIES)
    for name in dk.SERIES:
        for kind in (0, 1):
            first = both["one"][name][kind]
            assert first.shape == (30, 25)
            assert np.array_equal(first, both["two"][name][kind]) and np.array_equal(first, again["one"][name][kind])
            for points in (True, False):
                if name != "shocks" or points:
                    mean, low, high = dk.impulse_response(first, both["two"][name][kind], points)
                    assert not mean.any() and not low.any() and not high.any()


def test_impulse_response_is_a_ratio_of_means():
    benchmark, shocked = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 1.0], [2.0, 8.0]])
    mean, low, high = dk.impulse_response(benchmark, shocked)
    assert mean == pytest.approx([100 * (1.5 / 2 - 1), 100 * (4.5 / 3 - 1)])
    mean, low, high = dk.impulse_response(benchmark, shocked, points=True)
    assert mean == pytest.approx([-50, 150])
    assert low == pytest.approx([-90, -50]) and high == pytest.approx([-10, 350])  # 10 and 90% between two paths


def test_shocked_paths(smoke_grid, econ):
    """z_0 is bad everywhere in one and good in the other; afterwards both follow from the same uniform numbers, so a
    benchmark is never in recession without its shocked twin, and twins that meet stay together."""
    responses = dk.impulse_responses({"grid": smoke_grid}, econ, CFG, seed=3)["grid"]
    benchmark, shocked = responses["shocks"]
    assert (benchmark[:, 0] == 1).all() and (shocked[:, 0] == 0).all()
    assert (shocked <= benchmark).all()
    differ = benchmark != shocked
    assert (differ[:, 1:] <= differ[:, :-1]).all()
    # p_good(1) - p_good(0) = 0.75 of the twins are still apart a quarter later: 1e-3 after 24
    assert differ[:, -1].mean() < 0.1 and 0.4 < differ[:, 1].mean() < 1
    K = responses["capital"]
    assert np.array_equal(K[0][:, 0], K[1][:, 0])  # chosen a period before the shock
    assert (K[1][:, 1] < K[0][:, 1]).all()
    for name in ("output", "consumption"):
        assert (responses[name][1][:, 0] < responses[name][0][:, 0]).all()
    assert np.isfinite(np.stack([x for pair in responses.values() for x in pair])).all()
    output, R = responses["output"], responses["interest_rate"]
    for kind, (Z, L) in enumerate(((1.01, 0.96 / 0.9), (0.99, 0.90 / 0.9))):
        assert output[kind][:, 0] == pytest.approx(Z * K[kind][:, 0] ** 0.36 * L**0.64, rel=1e-12)
        assert R[kind][:, 0] == pytest.approx(0.975 + 0.36 * Z * (K[kind][:, 0] / L) ** -0.64, rel=1e-12)


def test_shocks_of_every_economy(economy, tables):
    """From the middle state to the one below; the same shocks for every solution and on both paths. Where there is one
    z, both paths are one."""
    solutions = {str(share): Stub(policy=lambda k, s, K, z, share=share: share * (k + s + z))
                 for share in (0.5, 0.9)}
    responses = dk.impulse_responses(solutions, tables, CFG, seed=3)
    middle = len(economy.TFP) // 2
    first, second = [responses[name]["shocks"] for name in solutions]
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(responses["0.5"]["capital"], responses["0.9"]["capital"])
    assert (first[0][:, 0] == middle).all() and (first[1][:, 0] == max(middle - 1, 0)).all()
    differ = first[0] != first[1]
    assert (first[1] <= first[0]).all() and (differ[:, 1:] <= differ[:, :-1]).all()  # twins that meet stay together
    if len(economy.TFP) == 1:
        assert all(np.array_equal(*pair) for pair in responses["0.5"].values())
    else:
        assert differ[:, 0].all() and not differ[:, -1].all()
    # transitions after 0 are those of P_z
    for path in first:
        for z in range(len(economy.TFP)):
            found = np.bincount(path[:, 1:][path[:, :-1] == z].astype(int), minlength=len(economy.TFP))
            n, p = found.sum(), economy.P_z[z]
            assert (np.abs(found - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5 + 1).all() and (found[p == 0] == 0).all()


def test_employment_follows_the_shock(econ):
    """A policy that saves for employment alone writes s_t into K_{t+1}: the bad state at 0 comes with its unemployment,
    the good one with its own, and a quarter before both were good. Another policy saves for the same households."""
    cfg = dataclasses.replace(CFG, irf_paths=100, irf_agents=200, irf_periods=2, irf_burn=3)
    census = Stub(policy=lambda k, s, K, z: s.double())
    double = Stub(policy=lambda k, s, K, z: 2 * s.double())
    responses = dk.impulse_responses({"census": census, "double": double}, econ, cfg, seed=1)
    idle = [1 - K for K in responses["census"]["capital"]]
    # 20,000 households; a deviation is sqrt(0.1 x 0.9 / 20,000) = 0.0021
    assert np.array_equal(idle[0][:, 0], idle[1][:, 0])
    assert idle[0][:, 0].mean() == pytest.approx(0.04, abs=4 * 0.0014)  # the quarter before, good for all
    assert idle[0][:, 1].mean() == pytest.approx(0.04, abs=4 * 0.0014)
    assert idle[1][:, 1].mean() == pytest.approx(0.10, abs=4 * 0.0021)
    assert (idle[1][:, 1] >= idle[0][:, 1]).all()  # the same uniform numbers: nobody finds work through the shock
    for once, twice in zip(responses["census"]["capital"], responses["double"]["capital"]):
        assert twice == pytest.approx(2 * once, rel=1e-14)


def test_consumption_closes_the_budget(smoke_grid, econ):
    """C + K' = (1 - delta) K + Y up to the draw of unemployment, which moves income by the gap of w's."""
    cfg = dataclasses.replace(CFG, irf_agents=4000, irf_paths=4)
    for kind in (0, 1):
        series = {name: pair[kind] for name, pair in
                  dk.impulse_responses({"grid": smoke_grid}, econ, cfg, seed=1)["grid"].items()}
        K, Y, C = series["capital"], series["output"], series["consumption"]
        gap = C[:, :-1] + K[:, 1:] - 0.975 * K[:, :-1] - Y[:, :-1]
        # income differs by 2.4 at most between the states of s: 2.4 x 0.3 / sqrt(4000) = 0.011 is one deviation
        assert np.abs(gap).max() < 5 * 0.011


# ------------------------------------------------------------------------------------------------ verdict


def verdict(network, grid, economy):
    return {row[0]: row for row in dk.verdict(dk.compare(network, grid, CFG)[0], economy, CFG)}


def check_rows(rows):
    """A figure that has a tolerance passes where it is within it."""
    for name, network_figure, _, _, tolerance, passed in rows:
        size = network_figure if "Euler" in name else abs(network_figure)  # Euler errors are logarithms
        assert passed == (None if tolerance is None else size <= tolerance), name


def test_verdict_rows(smoke_grid, network):
    """A grid in the network's place passes where it is compared with itself; a poor network fails there."""
    economy = dk.krusell_smith()
    itself = verdict(as_network(smoke_grid), smoke_grid, economy)
    poor = verdict(network, smoke_grid, economy)
    distances = [name for name in itself if name.startswith(("W1", "std", "|k'", "response"))]
    assert len(distances) >= 8
    for name in distances:
        assert itself[name][1] == 0 and itself[name][-1] is True
        assert poor[name][1] != 0
    assert not poor["|k' - k' grid|, mean"][-1]
    check_rows([*itself.values(), *poor.values()])


def test_a_network_that_sees_moments_is_judged_at_rest_by_its_euler_errors(smoke_grid):
    """The grid in K is no judge of where it rests; of its errors there it is."""
    figures = dk.compare(as_network(smoke_grid), smoke_grid, CFG)[0]
    figures["network"]["limit"]["risky_steady_state"]["K"] = [36.0, 42.0]
    for moments, judged in (("", True), ("variance", False)):
        cfg = dataclasses.replace(CFG, moments=moments)
        rows = {row[0]: row for row in dk.verdict(figures, dk.krusell_smith(), cfg)}
        rest = [row for name, row in rows.items() if name.startswith("K*")]
        assert len(rest) == 2 and all(row[5] is (False if judged else None) for row in rest)
        assert rows["Euler error, log10 mean, at the worst K*, N=inf"][5] is True
    figures["network"]["limit"]["risky_steady_state"]["euler_log10"] = [-9.0, -1.0]
    rows = {row[0]: row for row in dk.verdict(figures, dk.krusell_smith(), CFG)}
    assert rows["Euler error, log10 mean, at the worst K*, N=inf"][1::4] == (-1.0, False)


def test_verdict_of_another_economy(economies, toy_grid):
    """Measured by the grid's figures of the same economy: nothing published, the grid passes by itself, a poor network
    does not."""
    economy = economies["toy"]
    itself = verdict(as_network(toy_grid, economy), toy_grid, economy)
    poor = verdict(untrained(economy), toy_grid, economy)
    for rows in (itself, poor):
        assert all(row[3] is None for row in rows.values())
        check_rows(rows.values())
    assert all(row[-1] is not False for row in itself.values())
    assert sum(row[-1] is True for row in itself.values()) >= 8
    assert sum(row[-1] is False for row in poor.values()) >= 5


@pytest.mark.parametrize("name", ["log", "toy"])
def test_verdict_without_a_grid(economies, name):
    """Figures without tolerances: nothing passes, nothing fails."""
    rows = verdict(untrained(economies[name]), None, economies[name]).values()
    assert len(rows) >= 8 and all(row[2] is row[4] is row[5] is None for row in rows)
    assert all(math.isfinite(row[1]) for row in rows)
