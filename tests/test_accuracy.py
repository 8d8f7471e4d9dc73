"""The yardsticks: known policies, known distributions, and solutions judged against themselves."""

import dataclasses
import math
import types

import numpy as np
import pytest
import scipy.stats
import torch

import deepham_ks as dk

CFG = dataclasses.replace(dk.PRESETS["smoke"], eval_agents=30, eval_economies=3, eval_periods=80, eval_drop=20,
                          eval_every=4, eval_states=300, irf_paths=30, irf_agents=40, irf_periods=25, irf_burn=30)


@pytest.fixture(scope="module")
def network():
    """A network policy near the right level of saving, not trained."""
    policy, value = (dk.initial_parameters(6, bias, seed) for bias, seed in ((math.log(0.065), 0), (0.0, 1)))
    for theta in (policy, value):
        theta[-7:-1] = 0.01 * torch.randn(6, generator=torch.Generator().manual_seed(2))
    return dk.Solution(dk.Calibration(), CFG, policy, value)


def as_network(grid, econ):
    """The grid in the network's place."""
    return types.SimpleNamespace(econ=econ, policy=grid.policy, values=grid.values, next_capital=grid.next_capital)


# ------------------------------------------------------------------------------------------------ solutions


def test_interchangeable(smoke_grid, network, econ):
    """The grid in both places: no distance of any kind. With the network in one: distances, on the same shocks."""
    figures, arrays = dk.compare(as_network(smoke_grid, econ), smoke_grid, CFG)
    for size in ("small", "large"):
        assert figures["comparison"][size]["w1"] == 0 and figures["comparison"][size]["std_ratio"] == 1
        again = dk.judge(smoke_grid, econ, CFG, CFG.eval_economies if size == "small" else CFG.eval_economies_large,
                         CFG.eval_agents if size == "small" else CFG.eval_agents_large, dk.JUDGE_SEED)[0]
        assert repr(again) == repr(figures["network"][size]) == repr(figures["grid"][size])
    assert figures["comparison"]["policy_distance"] == {"mean": 0, "max": 0}
    gaps = dict(figures["comparison"]["impulse_response_gap"])
    assert gaps.pop("n_agents") == CFG.irf_agents and set(gaps.values()) == {0}

    figures, arrays = dk.compare(network, smoke_grid, CFG)
    assert figures["comparison"]["small"]["w1"] > 0.1 and figures["comparison"]["policy_distance"]["mean"] > 0.01
    for size in ("small", "large"):
        assert np.array_equal(arrays["network", size]["z_path"], arrays["grid", size]["z_path"])
        w1 = scipy.stats.wasserstein_distance(arrays["network", size]["k"], arrays["grid", size]["k"])
        assert figures["comparison"][size]["w1"] == w1
    for kind in (0, 1):
        z_network, z_grid = (arrays[name, "irf"]["shocks"][kind] for name in ("network", "grid"))
        assert np.array_equal(z_network, z_grid)


def test_ergodic_states(smoke_grid, econ):
    """What is dropped, what is pooled, and K' the mean of k' that followed."""
    states, K_path, z_path = dk.ergodic_states(smoke_grid, econ, CFG, B=3, N=30, seed=5)
    assert K_path.shape == z_path.shape == (60, 3)  # 80 - 20 periods
    assert states.k.shape == (15 * 3 * 30,)  # every 4th of them
    k, K, K_next = (x.view(15, 3, 30) for x in (states.k, states.K, states.K_next))
    assert torch.allclose(k.mean(2), K[..., 0]) and torch.equal(K[..., 0], K_path[::4])
    assert torch.allclose(K_next[..., 0], K_path[1::4])
    k_next = smoke_grid.policy(*states[:4]).view(15, 3, 30)
    assert torch.allclose(k_next.mean(2), K_next[..., 0])
    again = dk.ergodic_states(smoke_grid, econ, CFG, B=3, N=30, seed=5)[0]
    other = dk.ergodic_states(smoke_grid, econ, CFG, B=3, N=30, seed=6)[0]
    assert torch.equal(states.k, again.k) and not torch.equal(states.k, other.k)


def test_python_interface_broadcasts(network, smoke_grid):
    k, eps, K, z = np.linspace(0, 100, 7)[:, None], [0, 1], 39.5, 1
    for function in (network.next_capital, network.value, smoke_grid.next_capital):
        table = function(k, eps, K, z)
        assert isinstance(table, np.ndarray) and table.shape == (7, 2) and np.isfinite(table).all()
        for i in range(7):
            for e in (0, 1):
                assert float(function(float(k[i, 0]), e, K, z)) == pytest.approx(table[i, e], rel=1e-12)
        assert function([1.0], [1.0], [39.0], [True]) == function([1.0], [1], [39.0], [1])
        assert (np.diff(table, axis=0) != 0).all() and function(5, 1, 39, 0) != function(5, 1, 39, 1)


@pytest.mark.parametrize("bad, name", [((10, 2, 39, 1), "eps"), ((10, 1, 39, -1), "z"), ((10, 0.5, 39, 1), "eps"),
                                       ((10, 1, 39, [0, 1, math.nan]), "z"), ((10, 1, 39, 0.99), "z")])
def test_python_interface_refuses_states_that_are_no_index(network, smoke_grid, bad, name):
    for function in (network.next_capital, network.value, smoke_grid.next_capital):
        with pytest.raises(ValueError, match=f"^{name} must be 0 or 1"):
            function(*bad)


def test_network_value_is_in_utils(network):
    """next_capital and value of Solution against the kernels; the level is V_ss of the calibration."""
    k, K = torch.tensor([3.0, 40.0]).double(), torch.tensor([38.0, 41.0]).double()
    eps, z = torch.tensor([0, 1]), torch.tensor([1, 0])
    layers = [dk.unpack(network.parameters[name]) for name in ("policy", "value")]
    assert network.next_capital(k, eps, K, z) == pytest.approx(
        dk.network_capital(layers[0], k, eps, K, z, network.econ).numpy(), rel=1e-12)
    V = dk.network_value(layers[1], k, eps, K, z, network.econ)[0] + network.econ.V_ss
    assert network.value(k, eps, K, z) == pytest.approx(V.numpy(), rel=1e-12)


# ------------------------------------------------------------------------------------------------ errors
# Brock & Mirman (1972): log utility, full depreciation, everybody employed. k = K, k' = alpha beta Y, and the
# planner's V = A(z) + B ln k with B = alpha / (1 - alpha beta)


class BrockMirman:
    """Saves a share of output, alpha beta being optimal; its value is the planner's optimum whatever it saves."""

    calibration = dk.Calibration(delta=1.0, u_bad=0.0, u_good=0.0, tfp_shock=0.1)

    def __init__(self, saved=None):
        self.econ = dk.build_economy(self.calibration, dtype=torch.float64)
        alpha, beta = self.econ.alpha, self.econ.beta
        self.saved = alpha * beta if saved is None else saved
        self.B = alpha / (1 - alpha * beta)
        # A(z) = ln((1 - a b) Z L^(1-a)) + beta B ln(a b Z L^(1-a)) + beta E A(z'), a 2 x 2 system
        ZL = self.econ.Z * self.econ.L ** (1 - alpha)
        P = torch.stack([1 - self.econ.p_good, self.econ.p_good], 1)
        flow = torch.log((1 - alpha * beta) * ZL) + beta * self.B * torch.log(alpha * beta * ZL)
        self.A = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - beta * P, flow)

    def policy(self, k, eps, K, z):
        return self.saved * dk.output(K, z, self.econ)

    def values(self, k, eps, K, z):
        return self.A[z] + self.B * torch.log(k)

    def states(self):
        K = torch.linspace(0.05, 0.4, 40, dtype=torch.float64)
        z = torch.arange(40) % 2
        return dk.States(K, torch.ones_like(z), K, z, self.policy(K, None, K, z))


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
    alpha, beta = wrong.econ.alpha, wrong.econ.beta
    error = dk.euler_errors(wrong, wrong.states(), wrong.econ)
    assert error.numpy() == pytest.approx(np.full(40, 1 - saved / (alpha * beta)), rel=1e-10)
    own, best = dk.bellman_errors(wrong, wrong.states(), wrong.econ)
    loss = math.log((1 - saved) / (1 - alpha * beta)) + beta * wrong.B * math.log(saved / (alpha * beta))
    assert own.numpy() == pytest.approx(np.full(40, loss), rel=1e-9)
    # thirty golden sections leave 1e-6 of the share, and its square in utils
    assert best.abs().max() < 1e-10


def test_best_consumption_against_brute_force(network, econ):
    """The re-maximised error against 1,001 values of c between half and one and a half times the policy's."""
    states = dk.ergodic_states(network, econ, CFG, B=3, N=30, seed=1)[0]
    states = dk.States(*[x[::50] for x in states])
    own, best = dk.bellman_errors(network, states, econ)
    m, _ = dk.cash_on_hand(states.k, states.eps, states.K, states.z, econ)
    c = m - network.policy(*states[:4])
    V, brute = network.values(*states[:4]), torch.full_like(c, -math.inf)
    for factor in np.linspace(0.5, 1.5, 1001):
        trial = torch.minimum(factor * c, m)
        total = dk.utility(trial, econ)
        for s in range(4):
            p = econ.P.reshape(4, 4)[2 * states.z + states.eps, s]
            one = torch.ones_like(states.z)
            total = total + econ.beta * p * network.values(m - trial, s % 2 * one, states.K_next, s // 2 * one)
        brute = torch.maximum(brute, total - V)
        if factor == 1.0:
            assert torch.allclose(own, total - V, atol=1e-9)
    # the objective is concave with curvature of order one in ln c: half a step of 1e-3 costs 1e-7
    assert (best - brute).abs().max() < 1e-6
    assert (best - own).max() > 1e-4  # there was something to find


def test_euler_errors_leave_out_the_constrained(smoke_grid, econ):
    """k' = 0 with c~ above m is no error; k' = 0 with c~ below m is one; c~ is never above m."""
    k, eps, K, z = (torch.tensor([x], dtype=d) for x, d in ((0.0, torch.float64), (0, torch.long),
                                                            (39.0, torch.float64), (0, torch.long)))
    states = dk.States(k, eps, K, z, K)
    assert smoke_grid.policy(*states[:4]) == 0 and dk.euler_errors(smoke_grid, states, econ).numel() == 0

    def eat_all_when_rich(k, eps, K, z):
        return torch.where(k > 100, 0.0, smoke_grid.policy(k, eps, K, z))

    rich = dk.States(k + 150, eps, K, z, K)
    error = dk.euler_errors(types.SimpleNamespace(policy=eat_all_when_rich), rich, econ)
    assert error.shape == (1,) and 0 < error < 1  # c~ < c

    def save_half_once(k, eps, K, z):
        return torch.where(K == 39.0, 0.5 * dk.cash_on_hand(k, eps, K, z, econ)[0], 0.0)

    # saves half of m at K = 39 to eat everything at K = 45: c~ would be above m, and is m = 2 c
    error = dk.euler_errors(types.SimpleNamespace(policy=save_half_once), dk.States(k, eps + 1, K, z, K + 6), econ)
    assert error.item() == pytest.approx(-1, abs=1e-12)


def test_error_figures():
    figures = dk.error_figures(np.array([-3.0, 1.0, 2.0]))
    assert figures == {"mean": 2.0, "rmse": pytest.approx(math.sqrt(14 / 3)), "max": 3.0}


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
    equal = dk.inequality(np.full(50, 3.0))
    assert equal["gini"] == pytest.approx(0, abs=1e-12) and equal["lorenz"] == pytest.approx(p, abs=1e-12)
    one_has_all = dk.inequality(np.array([0.0] * 99 + [5.0]))
    assert one_has_all["gini"] == pytest.approx(0.99) and one_has_all["lorenz"][-2] == pytest.approx(0, abs=1e-12)
    exponential = dk.inequality(-np.log(1 - x))
    assert exponential["gini"] == pytest.approx(0.5, abs=1e-3)  # the tail beyond the last slice: ln(n) / n


def synthetic_law(shock=0.0):
    law = np.array([[0.12, 0.965], [0.14, 0.963]])
    z = (np.arange(400) // 8) % 2
    ln_K = np.full(400, 3.65)
    for t in range(399):
        ln_K[t + 1] = law[z[t]] @ (1, ln_K[t]) + (shock if t == 199 else 0.0)
    return law, np.exp(ln_K)[:, None], z[:, None]


def test_law_of_motion_figures_of_an_exact_law():
    law, K, z = synthetic_law()
    figures = dk.law_of_motion_figures(K, z)
    assert figures["coefficients"] == pytest.approx(law, abs=1e-9) and figures["r2"] == pytest.approx(1, abs=1e-9)
    assert figures["den_haan_max_percent"] < 1e-7


def test_den_haan_error_accumulates():
    """One shock of 1%: the path that the law draws by itself never learns of it, so the dynamic error is about 1%
    (the regression takes up a little), falling at 0.965 a period; one-step errors would all but one be zero."""
    _, K, z = synthetic_law(shock=0.01)
    figures = dk.law_of_motion_figures(K, z)
    alm, _ = dk.regress_law_of_motion(K, z)
    forecast = [math.log(K[0, 0])]
    for t in range(399):
        forecast.append(alm[z[t, 0]] @ (1, forecast[-1]))
    error = 100 * np.abs(np.array(forecast) - np.log(K[:, 0]))
    assert figures["den_haan_max_percent"] == pytest.approx(error.max(), rel=1e-9)
    assert figures["den_haan_mean_percent"] == pytest.approx(error.mean(), rel=1e-9)
    assert 0.8 < error.max() < 1.2


def test_policy_distance(econ):
    """k in [0.5, 160], K in {37, 39.5, 42}, all z and eps: distances that depend on each in a known way."""
    seen = {}

    def other(k, eps, K, z):
        seen.update(k=k, eps=eps, K=K, z=z)
        return np.full(np.shape(k), 0.25) + 0.5 * eps * z * (K > 41)

    zero = types.SimpleNamespace(next_capital=lambda k, eps, K, z: np.zeros(np.shape(k)))
    found = dk.policy_distance(types.SimpleNamespace(next_capital=other), zero, econ)
    assert found == {"mean": pytest.approx(0.25 + 0.5 / 12), "max": pytest.approx(0.75)}
    assert seen["k"].min() == pytest.approx(0.5) and seen["k"].max() == pytest.approx(160)
    assert np.unique(seen["K"]) == pytest.approx([37, 39.5, 42])
    assert set(np.unique(seen["eps"])) == set(np.unique(seen["z"])) == {0, 1}
    assert found == dk.policy_distance(zero, types.SimpleNamespace(next_capital=other), econ)


# ------------------------------------------------------------------------------------------------ impulse responses


def test_same_path_twice_gives_no_response(smoke_grid, econ):
    first, second = (dk.impulse_paths(smoke_grid, econ, CFG, 1, seed=3) for _ in range(2))
    assert set(first) == set(dk.SERIES)
    for name in dk.SERIES:
        assert first[name].shape == (30, 25)
        for points in (True, False):
            if name != "shocks" or points:
                mean, low, high = dk.impulse_response(first[name], second[name], points)
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
    responses = dk.impulse_responses(smoke_grid, econ, CFG, seed=3)
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


def test_employment_follows_the_shock(econ):
    """A policy that saves for employment alone writes eps_t into K_{t+1}, eps_{t} being all that differs: the bad
    state at 0 comes with its unemployment, the good one with its own, and a quarter before both were good."""
    cfg = dataclasses.replace(CFG, irf_paths=100, irf_agents=200, irf_periods=2, irf_burn=3)
    census = types.SimpleNamespace(policy=lambda k, eps, K, z: eps.double())
    idle = [1 - dk.impulse_paths(census, econ, cfg, z_0, seed=1)["capital"] for z_0 in (1, 0)]
    # 20,000 households; a deviation is sqrt(0.1 x 0.9 / 20,000) = 0.0021
    assert np.array_equal(idle[0][:, 0], idle[1][:, 0])
    assert idle[0][:, 0].mean() == pytest.approx(0.04, abs=4 * 0.0014)  # the quarter before, good for all
    assert idle[0][:, 1].mean() == pytest.approx(0.04, abs=4 * 0.0014)
    assert idle[1][:, 1].mean() == pytest.approx(0.10, abs=4 * 0.0021)
    assert (idle[1][:, 1] >= idle[0][:, 1]).all()  # the same uniform numbers: nobody finds work through the shock


def test_consumption_closes_the_budget(smoke_grid, econ):
    """C + K' = (1 - delta) K + Y up to the draw of unemployment, which moves income by the gap of w's."""
    cfg = dataclasses.replace(CFG, irf_agents=4000, irf_paths=4)
    series = dk.impulse_paths(smoke_grid, econ, cfg, 1, seed=1)
    K, Y, C = series["capital"], series["output"], series["consumption"]
    gap = C[:, :-1] + K[:, 1:] - 0.975 * K[:, :-1] - Y[:, :-1]
    # income differs by 2.4 at most between the states of eps: 2.4 x 0.3 / sqrt(4000) = 0.011 is one deviation
    assert np.abs(gap).max() < 5 * 0.011


# ------------------------------------------------------------------------------------------------ verdict


def test_verdict_rows(smoke_grid, network, econ):
    """A grid in the network's place passes where it is compared with itself; a poor network fails there."""
    itself = {row[0]: row for row in dk.verdict(dk.compare(as_network(smoke_grid, econ), smoke_grid, CFG)[0])}
    poor = {row[0]: row for row in dk.verdict(dk.compare(network, smoke_grid, CFG)[0])}
    distances = [name for name in itself if name.startswith(("W1", "std", "|k'", "response"))]
    assert len(distances) >= 8
    for name in distances:
        assert itself[name][1] == 0 and itself[name][-1] is True
        assert poor[name][1] != 0
    assert not poor["|k' - k' grid|, mean"][-1]
    for name, network_figure, _, _, tolerance, passed in [*itself.values(), *poor.values()]:
        size = network_figure if "Euler" in name else abs(network_figure)  # Euler errors are logarithms
        assert passed == (size <= tolerance), name
