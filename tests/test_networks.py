"""Networks, labels and steps: derivatives by hand against autograd, sums over the dense P, compiled against eager."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import dk, flows

F64 = torch.float64
T, M = 7, 16
CFG = dataclasses.replace(dk.PRESETS["smoke"], n_agents=20, hidden=6, horizon=T, batch=M, moments="variance")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def alive(economy, cfg, seed=4):
    """(tables, state) in float64 with every layer alive: the initial networks are constants."""
    econ, g = economy.tables(), torch.Generator().manual_seed(seed)
    state = dk.initial_state(econ, economy, cfg, seed, g)
    for name, x in state.tensors().items():
        if x.is_floating_point():
            setattr(state, name, x.double())
    for theta in (state.policy, state.value):
        theta += 0.3 * torch.randn(theta.shape, generator=g, dtype=F64)
    n = len(state.M_mean)
    state.M_mean, state.M_std = torch.rand(n, generator=g, dtype=F64), 0.5 + torch.rand(n, generator=g, dtype=F64)
    return econ, state


class World(NamedTuple):
    """An economy, networks, and where M households are at T + 1 dates."""

    economy: dk.Economy
    econ: dk.Tables
    state: dk.State
    k0: torch.Tensor  # (M,)
    path: dk.At  # (T + 1, M), without k
    ahead: dk.Ahead  # (T, M)

    @property
    def net(self):
        return dk.policy_net(self.state, self.econ, CFG)

    @property
    def value_net(self):
        return dk.value_net(self.state, self.econ, CFG)

    @property
    def at(self):
        """(T + 1, M) with k as the policy rolls it out."""
        return self.path._replace(k=dk.roll_out(self.net, self.k0, self.path, self.econ))


def make_world(economy):
    econ, state = alive(economy, CFG)
    rng, g, (Z, S) = np.random.default_rng(3), torch.Generator().manual_seed(3), economy.arrays.income.shape
    joint, P = [rng.integers(Z * S, size=M)], economy.arrays.P.reshape(Z * S, Z * S)
    for _ in range(T):
        joint.append(np.array([rng.choice(Z * S, p=P[now]) for now in joint[-1]]))
    joint = torch.tensor(np.array(joint))
    K = economy.K_ss * (0.9 + 0.2 * torch.rand((T + 1, M), generator=g, dtype=F64))
    k0 = torch.expm1(1.25 * torch.rand(M, generator=g, dtype=F64) * math.log(4 * economy.K_ss))
    k0[:4] = torch.tensor([0.0, 0.01, 0.1, 1.0])
    seen = torch.rand((T + 1, M, Z + 1, 1), generator=g, dtype=F64)
    planner = 0.01 / economy.c_ss * (economy.equilibrium == "planner")
    Delta = planner * torch.rand((T + 1, M, Z + 1), generator=g, dtype=F64)
    s, z, every_z = joint % S, joint // S, torch.arange(Z).expand(T, M, Z)
    path = dk.place(0 * K, s, K, z, econ)._replace(M=seen[:, :, 0], Delta=Delta[:, :, 0])
    if econ.labour_moves:
        low, high = torch.tensor(economy.arrays.L_range).T
        L, L_next = [low[of] + (high - low)[of] * torch.rand(of.shape, generator=g, dtype=F64) for of in (z, every_z)]
        path, labour_next = path._replace(labour=dk.labour_at(L, z, econ)), dk.labour_at(L_next, every_z, econ)
    else:
        labour_next = econ.usual[every_z]
    ahead = dk.Ahead(0.98 * K[1:], seen[:-1, :, 1:], Delta[:-1, :, 1:], labour_next)
    world = World(economy, econ, state, economy.k_min + k0, path, ahead)
    bias = sum(math.prod(shape) for shape in dk.policy_shapes(econ, CFG)) - 1
    f = output_at(world, path._replace(k=world.k0.expand_as(K)))
    state.policy[bias] -= f.median() + 1e-3  # half of the states are at the borrowing limit
    return world


def output_at(world, at):
    return dk.network(world.net.layers, dk.features(at, dk.cash_on_hand(at, world.econ)[0], world.net, world.econ))


@pytest.fixture(scope="module")
def world(economy):
    return make_world(economy)


@pytest.fixture(scope="module", params=["log", "toy", "flows", "planner", "game"])
def decided(request, economies):
    """Worlds of those who decide: households that take prices as given, labour of their economy by z or by the history
    of z; a planner; players."""
    if request.param == "flows":
        return make_world(flows())
    if request.param in economies:
        return make_world(economies[request.param])
    return make_world(dataclasses.replace(economies["toy"], equilibrium=request.param, players=7))


@pytest.fixture(autouse=True)
def eager():
    dk.compile_kernels("none")


def by_dense_P(world, at, k_next, ahead):
    """(probability, household) for each (z', s'), by the dense P: impossible ones come with probability zero."""
    P, (Z, S) = torch.tensor(world.economy.arrays.P), world.economy.arrays.income.shape
    for z, s in np.ndindex(Z, S):
        one = torch.ones_like(at.s)
        nexts = dk.place(k_next, s * one, ahead.K, z * one, world.econ)
        yield P[at.z, at.s, z, s], nexts._replace(M=ahead.M[..., z, :], Delta=ahead.Delta[..., z],
                                                  labour=ahead.labour[..., z, :])


def consumption(world, at):
    return dk.cash_on_hand(at, world.econ)[0] - dk.network_capital(world.net, at, world.econ)


# ------------------------------------------------------------------------------------------------ networks


def test_network_is_two_tanh_layers():
    shapes = dk.layer_shapes(5, 6)
    theta, x = random(sum(map(math.prod, shapes)), seed=4), random(9, 5)
    W1, b1, W2, b2, w3, b3 = layers = dk.unpack(theta, shapes)
    assert [tuple(layer.shape) for layer in layers] == shapes and W1.data_ptr() == theta.data_ptr()  # views
    by_hand = [float(w3 @ torch.tanh(W2 @ torch.tanh(W1 @ row + b1) + b2) + b3) for row in x]
    assert dk.network(layers, x).tolist() == pytest.approx(by_hand, rel=1e-13)


def test_slopes_and_jacobians_equal_autograd():
    shapes = dk.layer_shapes(5, 6)
    theta, x, dx = random(sum(map(math.prod, shapes)), seed=2), random(30, 5), random(30, 5, seed=1)
    y, slope = dk.network_and_slope(dk.unpack(theta, shapes), x, dx)
    again, tangent = torch.autograd.functional.jvp(lambda x: dk.network(dk.unpack(theta, shapes), x), x, dx)
    assert torch.allclose(y, again) and torch.allclose(slope, tangent, rtol=1e-12, atol=1e-14)
    value, slope = torch.autograd.functional.jacobian(
        lambda theta: torch.stack(dk.network_and_slope(dk.unpack(theta, shapes), x, dx)), theta)
    layers = dk.unpack(theta, shapes)
    found = dk.network_jacobian(layers, x[None], torch.ones_like(x[None, :, 0]))
    assert torch.allclose(found, value, rtol=1e-11, atol=1e-13)
    assert torch.allclose(dk.slope_jacobian(layers, x, dx), slope, rtol=1e-11, atol=1e-13)


def test_features_tell_states_apart(economy):
    """Every (k, s, K, z) has inputs of its own, of order one but for the steep one of k; one column is of K, around its
    centre; s is seen as the economy's table has it, z evenly spaced."""
    econ, a, Z = economy.tables(), economy.arrays, len(economy.arrays.TFP)
    sees_z = np.linspace(-1, 1, Z)[:, None][:, : int(Z > 1)]
    k, K = np.linspace(economy.k_min, 4 * economy.K_ss, 9), economy.K_ss * np.linspace(0.8, 1.25, 4)
    at = dk.on_grid(dk.Axes(k, K, a.L[:, None]), econ)
    m, nothing = dk.cash_on_hand(at, econ)[0], torch.zeros(0, dtype=F64)
    x = dk.features(at, m, dk.Net([], torch.tensor(economy.K_ss), nothing, nothing), econ)
    assert (x.abs().amax((0, 1, 2, 3)) < 5.9).sum() == x.shape[-1] - 1 and 5.9 < x.abs().max() < 12
    assert len(x.reshape(-1, x.shape[-1]).unique(dim=0)) == m.numel()
    assert torch.allclose(x[..., dk.K_INPUT], 8 * torch.log(at.K / economy.K_ss))
    assert np.array_equal(x[..., dk.N_OWN :], np.concatenate([a.sees_s[at.s], sees_z[at.z]], -1))
    other = dk.features(at, m, dk.Net([], torch.tensor(2 * economy.K_ss), nothing, nothing), econ)
    assert (x != other).any(0).any(0).any(0).any(0).nonzero().flatten().tolist() == [dk.K_INPUT]


@pytest.fixture
def from_above(monkeypatch):
    """At the borrowing limit the derivative is that from above: autograd of clamp() has it up to torch 2.13."""
    def clamp(x, min=None, max=None):
        low, high = [torch.as_tensor(end, dtype=x.dtype) for end in (-math.inf if min is None else min,
                                                                     math.inf if max is None else max)]
        return torch.where(x < low, low, torch.where(x > high, high, x))

    monkeypatch.setattr(torch.Tensor, "clamp", clamp)


def test_feature_slopes_equal_autograd(world, from_above):
    at = dk.pick(world.path, slice(0, 1))._replace(k=world.k0.clone().unsqueeze(0).requires_grad_())
    m, R = dk.cash_on_hand(at, world.econ)
    x = dk.features(at, m, world.net, world.econ)
    by_graph = torch.stack([torch.autograd.grad(x[..., i].sum(), at.k, retain_graph=True, allow_unused=True,
                                                materialize_grads=True)[0] for i in range(x.shape[-1])], -1)
    slopes = dk.feature_slopes(at.k, m, R, x.shape[-1], world.econ)
    assert torch.allclose(slopes, by_graph, rtol=1e-12) and (slopes[..., :3] > 0).all()


def test_moments_are_seen_around_their_centres_in_their_units(world):
    x, n = dk.features(world.at, dk.cash_on_hand(world.at, world.econ)[0], world.net, world.econ), 1
    assert torch.allclose(x[..., -n:], (world.path.M - world.state.M_mean) / world.state.M_std)
    assert (output_at(world, world.at) != output_at(world, world.at._replace(M=2 * world.path.M))).all()


def test_value_network_sees_the_square_of_ln_K_first(world):
    """And then what the policy network sees; of slopes the same, since one household's k moves neither."""
    m, R = dk.cash_on_hand(world.at, world.econ)
    x = dk.features(world.at, m, world.net, world.econ)
    seen, slopes = dk.for_value(x), dk.for_value(dk.feature_slopes(world.at.k, m, R, x.shape[-1], world.econ))
    assert torch.allclose(seen[..., 0], (8 * torch.log(world.path.K / world.net.K_centre)) ** 2)
    assert torch.equal(seen[..., 1:], x) and not slopes[..., 0].any() and slopes[..., 1:4].all()


def test_value_and_its_slope(decided, from_above):
    """V_k by autograd; V is the equivalent of the network's output, in utility of c_ss exp(g / 10) for ever."""
    world, at = decided, dk.pick(decided.at, slice(0, 1))
    at = at._replace(k=at.k.clone().requires_grad_())
    V, V_k = dk.network_value(world.value_net, at, world.econ)
    assert torch.allclose(V_k, torch.autograd.grad(V.sum(), at.k)[0], rtol=1e-12)
    g = dk.equivalent_of(V, at, world.econ)
    again, V_g = dk.value_of(g, at, world.econ)
    assert torch.allclose(again, V, rtol=1e-10)
    assert torch.allclose(V_g, (dk.value_of(g + 1e-5, at, world.econ)[0] - again) / 1e-5, rtol=1e-4)
    if world.econ.equilibrium == "market":
        D = torch.tensor(world.economy.arrays.annuity)[at.z, at.s]
        assert torch.allclose(V, D * dk.utility(world.econ.c_ss * torch.exp(g / 10), world.econ))


def test_consumption_and_its_slope(world, from_above):
    """dc/dk by autograd on both sides of the borrowing limit; c and k' share the budget; k' is k_min exactly where the
    network is positive, above it elsewhere, and never all there is."""
    econ, at = world.econ, world.at
    at = at._replace(k=at.k.clone().requires_grad_())
    c, dc = dk.consumption_and_slope(world.net, at, econ)
    assert torch.allclose(dc, torch.autograd.grad(consumption(world, at).sum(), at.k)[0], rtol=1e-11)
    k_next, m = dk.network_capital(world.net, at, econ), dk.cash_on_hand(at, econ)[0]
    assert torch.allclose(c + k_next, m, rtol=1e-13) and (k_next < m).all()
    f = output_at(world, at)
    assert (f >= 0).any() and (f < 0).any()
    assert (k_next[f >= 0] == econ.k_min).all() and (k_next[f < 0] > econ.k_min).all()


def test_roll_out_follows_the_policy(world):
    at = world.at
    assert torch.equal(at.k[0], world.k0)
    for t in range(T):
        k_next = dk.network_capital(world.net, dk.pick(at, t), world.econ)
        assert torch.allclose(at.k[t + 1], k_next, rtol=1e-13)


# ------------------------------------------------------------------------------------------------ labels


def test_expected_worth_is_the_sum_over_every_next_state(decided):
    """E[R' u'(c') + Delta'] by the dense P, each z' with its own moments and Delta."""
    world, econ, at = decided, decided.econ, dk.pick(decided.at, slice(0, T))
    k_next, total = dk.network_capital(world.net, at, econ), 0.0
    for p, nexts in by_dense_P(world, at, k_next, world.ahead):
        R, _ = dk.prices(nexts, econ)
        u_prime = dk.marginal_utility(consumption(world, nexts), econ)
        gain = {"market": 0.0, "planner": nexts.Delta, "game": u_prime * dk.cash_of_K(nexts, econ) / 7}
        total = total + p * (R * u_prime + gain[econ.equilibrium])
    found = dk.expected_worth(world.net, at, k_next, world.ahead, econ)
    assert torch.allclose(found, total, rtol=1e-11)
    market = dk.expected_worth(world.net, at, k_next, world.ahead, econ._replace(equilibrium="market"))
    assert torch.allclose(found, market) == (econ.equilibrium == "market")


def test_labels_by_their_recursion(decided):
    """One household and one period after the other; what later periods give back is held, here and there by both."""
    econ, at = decided.econ, dk.pick(decided.at, slice(0, T))
    expected = torch.exp(0.7 * random(T, M, seed=5)) / econ.c_ss
    c, dc = econ.c_ss * torch.exp(random(T, M)), torch.rand(T, M, dtype=F64, generator=torch.Generator().manual_seed(1))
    found, held, u_prime = dk.worth_of_saving(expected, c, dc, at, econ), [0, 0], dk.marginal_utility(c, econ)
    R = dk.prices(at, econ)[0]
    V_k = R * u_prime + {"market": 0.0, "planner": at.Delta,
                         "game": u_prime * dk.cash_of_K(at, econ) / 7}[econ.equilibrium]
    for i in range(M):
        worth = expected[-1, i]
        for t in reversed(range(T - 1)):
            beta, beta_next = econ.beta[at.s[t, i]], econ.beta[at.s[t + 1, i]]
            saved = R[t + 1, i] - dc[t + 1, i]
            size = float(beta * saved / R[t + 1, i] * V_k[t + 1, i].abs() / u_prime[t, i])
            back = saved * (beta_next * worth - u_prime[t + 1, i]) / max(1.0, size)
            kept = min(max(float(back), -float(expected[t, i]) / 2), float(expected[t, i]))
            held = [held[0] + (size > 1), held[1] + (kept != float(back))]
            worth = expected[t, i] + kept
            assert float(found[t, i]) == pytest.approx(float(worth), rel=1e-10)
    assert torch.equal(found[-1], expected[-1])
    assert all(5 < n < M * (T - 1) - 5 for n in held)


def test_labels_are_what_is_expected_where_the_first_order_condition_holds(world):
    """u'(c) = beta E[R' u'(c')] in every period leaves nothing to correct; a miss of one period is seen by all before
    it and by none after."""
    econ, at = world.econ, dk.pick(world.at, slice(0, T))
    expected = torch.exp(0.1 * random(T, M, seed=5)) / econ.c_ss
    c, dc = dk.inverse_marginal_utility(econ.beta[at.s] * expected, econ), torch.full((T, M), 0.1, dtype=F64)
    assert torch.allclose(dk.worth_of_saving(expected, c, dc, at, econ), expected, rtol=1e-12)
    c[3] *= 1.05  # too much is consumed then: what is saved is worth more in all earlier periods
    found = dk.worth_of_saving(expected, c, dc, at, econ)
    assert torch.allclose(found[3:], expected[3:], rtol=1e-12) and (found[:3] > expected[:3]).all()


def unrolled(world, net, k, first=0):
    """Utility from `first` on and V of the end, discounted, by the plain graph; Delta is given: (U, Delta-less U)."""
    econ, U, discount = world.econ, 0.0, 1.0
    for t in range(first, T):
        at = dk.pick(world.path, t)._replace(k=k)
        k_next = dk.network_capital(net, at, econ)
        c = dk.cash_on_hand(at, econ)[0] - k_next
        gain = dk.Delta(dk.marginal_utility(c, econ), at, econ).detach()
        U, discount, k = U + discount * (dk.utility(c, econ) + gain * k), discount * econ.beta[at.s], k_next
    return U + discount * dk.network_value(world.value_net, dk.pick(world.path, T)._replace(k=k), econ)[0]


def published(world):
    """(U, worth, c) of the published labels."""
    at, econ = dk.pick(world.at, slice(0, T)), world.econ
    c, dc = dk.consumption_and_slope(world.net, at, econ)
    last = dk.network_value(world.value_net, dk.pick(world.at, T), econ)
    return *dk.published_labels(*last, c, dc, at, econ), c


def test_published_labels_are_back_propagation_through_time(decided, from_above):
    """U_t and the derivative of U_{t+1} in k_{t+1} by autograd at every t, Delta taken as given."""
    world = decided
    U, worth, _ = published(world)
    for t in range(T):
        k = world.at.k[t].clone().requires_grad_()
        by_graph = unrolled(world, world.net, k, t)
        assert torch.allclose(U[t], by_graph, rtol=1e-10)
        if t:
            assert torch.allclose(worth[t - 1], torch.autograd.grad(by_graph.sum(), k)[0], rtol=1e-9, atol=1e-12)
    V_k = dk.network_value(world.value_net, dk.pick(world.at, T), world.econ)[1]
    assert torch.allclose(worth[T - 1], V_k)


def test_published_policy_gradient_is_that_of_the_whole_graph(world):
    econ, state = world.econ, world.state
    U, worth, c = published(world)
    batch = dk.Batch(dk.pick(world.at, slice(0, T)), world.ahead, c, worth, worth, U, world.path.s[:-1])
    theta = state.policy.clone().requires_grad_()
    (by_costates,) = torch.autograd.grad(dk.policy_loss(
        dataclasses.replace(state, policy=theta), batch, dk.Paths(None, None, ()), econ, CFG), theta)
    moved = state.policy.clone().requires_grad_()
    net = world.net._replace(layers=dk.unpack(moved, dk.policy_shapes(econ, CFG)))
    (through_time,) = torch.autograd.grad(-unrolled(world, net, world.k0).mean(), moved)
    assert through_time.abs().max() > 1e-4
    assert torch.allclose(by_costates, through_time, rtol=1e-8, atol=1e-10 * through_time.abs().max().item())


def test_published_values_stay_where_utility_has_them(world):
    """A noisy U beyond what half the least and twice the most consumption are worth has no equivalent: it is held."""
    econ, state = world.econ, world.state
    U, worth, c = published(world)
    batch = dk.Batch(dk.pick(world.at, slice(0, T)), world.ahead, c, worth, worth, U, world.path.s[:-1])
    plain = dk.value_loss(state, batch, None, econ, CFG)
    g = dk.equivalent_of(U, batch.at, econ)
    x = dk.for_value(dk.features(batch.at, dk.cash_on_hand(batch.at, econ)[0], world.net, econ))
    D, ends = torch.tensor(world.economy.arrays.annuity)[batch.at.z, batch.at.s], (c.min() / 2, 2 * c.max())
    inside = U.clamp(*[D * dk.utility(end, econ) for end in ends])
    assert torch.equal(plain, dk.value_loss(state, batch._replace(U=inside), None, econ, CFG))
    if torch.equal(inside, U):
        assert plain.item() == pytest.approx((g - dk.network(world.value_net.layers, x)).square().mean().item() / 2)
    beyond = torch.full_like(U, 1e3 if econ.gamma > 1 else -1e5)
    assert dk.value_loss(state, batch._replace(U=beyond), None, econ, CFG).isfinite()


# ------------------------------------------------------------------------------------------------ steps


def levenberg_marquardt(J, residual, damping, n, care=1.0):
    """The step by plain linear algebra: damping and so much of the mean squared residual of n states, in units of each
    parameter's diagonal and of a tenth of the mean one."""
    A = J.T @ J
    damped = A + (damping + care * residual.square().sum() / n) * torch.diag(A.diagonal() + 0.1 * A.diagonal().mean())
    return torch.linalg.solve(damped, J.T @ residual)


J, Y, START = random(30, 5), random(30, seed=1), random(5, seed=2)  # residual(theta) = Y - J theta


def linear_step(theta, damping, rate=1.0, y=Y, jacobian=J, judged=None):
    def residuals(theta):
        return (judged or (lambda theta: y - J @ theta))(theta).unsqueeze(0)

    def jacobians(part):
        yield jacobian[part]

    theta, damping = theta.clone(), torch.tensor(damping, dtype=F64)
    taken = dk.gauss_newton_step(theta, damping, rate, residuals, jacobians)
    return theta, damping, taken


@pytest.mark.parametrize("P", [1, 3, 6, 7, 50])
def test_gauss_newton_with_any_number_of_parameters(P):
    """J' J is put together in blocks, whatever the number of columns."""
    jacobian, theta = random(60, P), torch.zeros(P, dtype=F64)
    y = jacobian @ torch.ones(P, dtype=F64)
    new, _, taken = linear_step(theta, 0.1, judged=lambda theta: y - jacobian @ theta, jacobian=jacobian)
    assert taken and torch.allclose(new, levenberg_marquardt(jacobian, y, 0.1, 60), rtol=1e-10)


@pytest.mark.parametrize("rate, damping", [(1.0, 1e-4), (0.3, 0.5)])
def test_gauss_newton_takes_a_good_step(rate, damping):
    new, after, taken = linear_step(START, damping, rate)
    assert taken and (Y - J @ new).square().sum() < (Y - J @ START).square().sum()
    assert torch.allclose(new, START + rate * levenberg_marquardt(J, Y - J @ START, damping, 30), rtol=1e-11)
    assert after.item() == pytest.approx(max(damping / 3, dk.LEAST_DAMPING))


def test_gauss_newton_ends_at_least_squares():
    """Where residuals can vanish a few full steps find the solution: the damping goes with the residual."""
    solution, theta, damping = torch.arange(5, dtype=F64), START, 1.0
    for _ in range(40):
        theta, damping, _ = linear_step(theta, float(damping), y=J @ solution)
    assert torch.allclose(theta, solution, atol=1e-7)


@pytest.mark.parametrize("too_long", [1, 3, 9])
def test_gauss_newton_takes_a_third_of_a_step_that_is_three_times_too_long(too_long):
    solution = torch.arange(5, dtype=F64)
    new, _, taken = linear_step(solution + 1e-6, 1e-12, y=J @ solution, jacobian=J / too_long)
    assert taken and torch.allclose(new, solution, atol=1e-9)


@pytest.mark.parametrize("jacobian, judged", [(-J, None), (J, lambda theta: (Y - J @ theta) * (
    1.0 if torch.equal(theta, START) else math.nan))], ids=["uphill", "nan"])
def test_gauss_newton_refuses_a_bad_step(jacobian, judged):
    """theta stays and the damping rises tenfold, until the step is tiny."""
    new, after, taken = linear_step(START, 1e-3, jacobian=jacobian, judged=judged)
    assert not taken and torch.equal(new, START) and after.item() == pytest.approx(1e-2)


def test_gauss_newton_over_many_states_and_rows_of_residuals():
    """5,000 states come in parts, and two rows are one problem."""
    jacobians, y = random(2, 5000, 5, seed=7), random(2, 5000, seed=8)

    def parts(part):
        yield from jacobians[:, part]

    new = START.clone()
    taken = dk.gauss_newton_step(new, torch.tensor(0.1, dtype=F64), 0.5, lambda theta: y - jacobians @ theta, parts)
    now = (y - jacobians @ START).flatten()
    assert taken and torch.allclose(new, START + 0.5 * levenberg_marquardt(jacobians.flatten(0, 1), now, 0.1, 5000))


def test_one_residual_of_many_hardly_bends_a_robust_fit():
    """A constant fitted to nine zeros and a one by the weights it converges to: far below the mean, a tenth."""
    x, weight, fit = torch.tensor([0.0] * 9 + [1.0], dtype=F64), torch.ones(10, dtype=F64), 0.0
    for _ in range(100):
        w = dk.robust(x - fit, weight) ** 2
        fit = float((w * x).sum() / w.sum())
    assert 0 < fit < 0.03
    assert dk.robust(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("learnt", [0, 2])
@pytest.mark.parametrize("name", ["log", "toy"])
def test_policy_step_is_least_squares_of_log_c_on_its_first_order_condition(economies, name, learnt):
    """Against a step from an autograd Jacobian, parameters of Q included. Where the limit binds and the household would
    rather eat more, nothing pulls; elsewhere log c goes towards log c~ with u'(c~) = beta lambda', within half a
    unit, by a loss that is quadratic for small residuals and linear for large ones."""
    economy, n = economies[name], 60
    cfg = dataclasses.replace(CFG, learnt_moments=learnt)
    econ, state = alive(economy, cfg)
    (Z, S), g = economy.arrays.income.shape, torch.Generator().manual_seed(1)
    k, weight = torch.rand(2, 5, 3, 8, generator=g, dtype=F64)
    weight = weight / weight.mean(2, keepdim=True) if name == "toy" else weight[..., :0]
    held = economy.k_min + 2 * economy.K_ss * k, torch.randint(S, k.shape, generator=g), weight
    paths = dk.Paths(None, None, held if learnt else ())
    date, rates = torch.randint(15, (n,), generator=g), torch.tensor([0.2, 0, 0], dtype=F64)
    *_, weight = seen = [x.flatten(0, 1)[date] for x in held]
    state.rates, moments = rates, dk.seen_moments(dk.policy_net(state, econ, cfg).layers, econ, cfg)
    k = economy.k_min + economy.K_ss * torch.rand(n, generator=g, dtype=F64) ** 3
    s, z = [torch.randint(of, (n,), generator=g) for of in (S, Z)]
    at = dk.place(k, s, dk.mean_over(seen[0], weight), z, econ)._replace(
        M=dk.moments_of(*seen[:2], moments, weight))
    net, shapes = dk.policy_net(state, econ, cfg), dk.policy_shapes(econ, cfg)
    f = dk.network(net.layers, dk.features(at, dk.cash_on_hand(at, econ)[0], net, econ))
    state.policy[sum(map(math.prod, shapes[:6])) - 1] -= f.median()
    m = dk.cash_on_hand(at, econ)[0]
    c = m - dk.network_capital(net, at, econ)
    worth = dk.marginal_utility(c * torch.exp(-0.4 * torch.randn(n, generator=g, dtype=F64)), econ)

    def output(theta):
        of = net._replace(layers=dk.unpack(theta, shapes))
        M_now = dk.moments_of(*seen[:2], dk.seen_moments(of.layers, econ, cfg), weight)
        return dk.network(of.layers, dk.features(at._replace(M=M_now), m, of, econ))

    f, wish = output(state.policy), torch.log(dk.inverse_marginal_utility(econ.beta[at.s] * worth, econ) / c)
    assert (wish.abs() < 0.5).any() and (wish.abs() > 0.5).any()
    wish = wish.clamp(-0.5, 0.5)
    free = (f < 0) | (wish < 0)
    assert not free.all() and (free & (f >= 0)).any()
    pull = torch.tensor(economy.arrays.weight)[at.s].sqrt() * free
    size = (pull**2 * wish.abs()).sum() / (pull**2).sum()
    pull = pull / (1 + (wish / size) ** 2) ** 0.25
    jacobian = torch.autograd.functional.jacobian(output, state.policy) * pull.unsqueeze(1)
    step = levenberg_marquardt(jacobian, pull * wish, state.damping, n)
    before = state.policy.clone()
    batch = dk.Batch(at, None, c, worth, worth, c, date)
    assert dk.policy_step(state, batch, paths, econ, cfg) == 1
    assert torch.equal(state.policy_before, before)
    assert torch.allclose(state.policy, before + 0.2 * step, rtol=1e-7, atol=1e-9)
    if learnt:
        size = sum(map(math.prod, shapes[6:]))
        assert (state.policy - before)[-size:].abs().max() > 1e-5


def test_value_step_is_least_squares_on_the_bellman_residual_and_the_envelope(decided):
    """u(c) + Delta k + beta E V(s') - V(s) by the dense P in units of g, and V_k = R u'(c) + Delta, both robust: a step
    from an autograd Jacobian."""
    world, econ, state = decided, decided.econ, decided.state
    at, ahead = [dk.pick(x, (slice(None),)) for x in (dk.pick(world.at, slice(0, T)), world.ahead)]
    at, ahead = [type(x)(*[part.flatten(0, 1) for part in x]) for x in (at, ahead)]
    c = consumption(world, at)
    batch, (m, R), value_net = dk.Batch(at, ahead, c, c, c, c, at.s), dk.cash_on_hand(at, econ), world.value_net
    u_prime, weight = dk.marginal_utility(c, econ), torch.tensor(world.economy.arrays.weight)[at.s].sqrt()
    gain = dk.Delta(u_prime, at, econ)
    D, shapes = torch.tensor(world.economy.arrays.annuity)[at.z, at.s], [x.shape for x in value_net.layers]
    V, V_k = dk.network_value(value_net, at, econ)
    V_g = dk.value_of(dk.equivalent_of(V, at, econ), at, econ)[1]

    def residuals(theta):
        net = value_net._replace(layers=dk.unpack(theta, shapes))
        (V, V_k), V_next = dk.network_value(net, at, econ), 0.0
        for p, nexts in by_dense_P(world, at, m - c, ahead):
            V_next = V_next + p * dk.network_value(net, nexts, econ)[0]
        bellman = dk.utility(c, econ) + gain * at.k + econ.beta[at.s] * V_next - V
        g_k = V_k / dk.value_of(dk.equivalent_of(V, at, econ), at, econ)[1]
        return torch.stack([dk.LEVEL_WEIGHT * weight * bellman * D / V_g,
                            weight * (R * u_prime + gain - V_g * g_k) / u_prime])

    now = residuals(state.value)
    robust = (1 + (now / now.abs().mean(1, keepdim=True)) ** 2) ** -0.25
    jacobian = -torch.autograd.functional.jacobian(residuals, state.value) * robust.unsqueeze(2)
    step = levenberg_marquardt(jacobian.flatten(0, 1), (robust * now).flatten(), 10.0, len(c), care=0.001)
    before = state.value.clone()
    dk.value_step(state, batch, torch.tensor(10.0, dtype=F64), econ, CFG)
    assert any(torch.allclose(state.value, before + step / share, rtol=1e-6, atol=1e-8) for share in (1, 3, 9))


# ------------------------------------------------------------------------------------------------ roll-outs


def test_states_that_teach_are_early_ones_of_the_roll_out():
    """Whole periods, all fields alike, the first one among them and none of the second half."""
    cfg = dataclasses.replace(CFG, horizon=80)
    periods = dk.taught(cfg)
    assert periods == sorted(set(periods)) and periods[0] == 0 and len(periods) == dk.TAUGHT and periods[-1] < 40
    x = torch.arange(80).unsqueeze(1) * 100 + torch.arange(3)
    thinned = dk.thin(dk.Ahead(x, x.double(), x + 1, x), cfg)
    assert torch.equal(thinned.K, torch.cat([x[t] for t in periods])) and torch.equal(thinned.Delta, thinned.K + 1)
    assert dk.taught(dataclasses.replace(cfg, optimizer="adam")) == list(range(40))
    assert dk.taught(dataclasses.replace(cfg, horizon=2)) == [0]


def constant_paths(K, z, Z):
    """Paths of K, z (periods, B) that expect twice the K that comes, in economies without moments."""
    none, none_next = torch.zeros(*K.shape, 0), torch.zeros(len(K) - 1, K.shape[1], Z, 0)
    ahead = dk.Ahead(2 * K[1:], none_next, none_next.sum(-1), none_next)
    return dk.Paths(dk.At(K, z, K, z, none, 0 * K, none), ahead, ())


@pytest.mark.parametrize("name, N", [("log", 300), ("toy", 300), ("toy", 0)])
def test_sampled_households(economies, name, N, rng):
    """Windows of the simulated economies, as many in each s and then by the chain, k from the panel or between the
    limit and beyond the simulated range; what is expected is that of the same dates."""
    economy, B = economies[name], 7
    econ, (Z, S) = economy.tables(), economy.arrays.income.shape
    cfg = dataclasses.replace(CFG, batch=4000, horizon=5, periods=30, n_economies=B, n_agents=N, moments="")
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    K = economy.K_ss * (1 + torch.rand(30, B, generator=rng, dtype=F64))  # every date and economy its own number
    z = [torch.tensor(dk.draw_z_path(30, economy.arrays.P_z, np.random.default_rng(b))) for b in range(B)]
    paths = constant_paths(K, torch.stack(z, 1), Z)
    k, path, ahead, date = dk.sample_households(state, paths, econ, cfg, rng)
    assert k.shape == (4000,) and path.K.shape == path.s.shape == path.z.shape == (6, 4000) == (6, *ahead.K.shape[1:])
    first, economy_of = date[0] // B, date[0] % B
    for t in range(6):
        assert torch.equal(path.K[t], K[first + t, economy_of])
        assert torch.equal(path.z[t], paths.at.z[first + t, economy_of])
    assert torch.equal(ahead.K, 2 * path.K[1:]) and torch.equal(date[4], (first + 4) * B + economy_of)
    assert len(economy_of.unique()) == B and first.min() == 0 and first.max() == 24
    for at in np.ndindex(Z, Z, S):  # who comes next follows the transition
        here = (path.z[:-1] == at[0]) & (path.z[1:] == at[1]) & (path.s[:-1] == at[2])
        p, n = economy.arrays.Pi[at], int(here.sum())
        found = torch.bincount(path.s[1:][here], minlength=S).numpy()
        assert (np.abs(found - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5).all()
    for s in range(S):
        assert abs((path.s[0] == s).sum().item() - 4000 / S) < 1
    top = max(1.5 * float(state.k_range[1]), 5 * economy.K_ss)
    assert 0.9 * top < k.max() <= top and economy.k_min <= k.min()
    if N:
        in_panel = torch.isin(k, state.k)
        assert in_panel.double().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
        assert k[~in_panel].min() < state.k.min()


@pytest.mark.parametrize("name", ["log", "toy"])
def test_households_drawn_from_nodes_are_distributed_as_they_are(economies, name, rng):
    """As many in each s, with the mean and standard deviation of k that it has, up to what the spread around a node
    adds; hardly any two have the same k."""
    economy, cfg = economies[name], dataclasses.replace(CFG, n_agents=0, n_economies=3)
    econ = economy.tables()
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    state.weight.mul_(torch.where(state.s == 0, torch.exp(-state.k / economy.K_ss), 1.0))  # s = 0 is poorer
    k, s = dk.some_households(state, 40_001, econ, cfg, rng)
    assert k.min() >= economy.k_min and len(k.unique()) > 39_000
    for i in range(len(econ.beta)):
        weight = state.weight * (state.s == i)
        mean = (weight * state.k).sum() / weight.sum()
        std = ((weight * (state.k - mean) ** 2).sum() / weight.sum()).sqrt()
        assert abs((s == i).sum().item() - 40_001 / len(econ.beta)) < 1
        assert k[s == i].mean().item() == pytest.approx(mean.item(), rel=0.02)
        assert k[s == i].std().item() == pytest.approx(std.item(), rel=0.03)


def test_published_households_keep_their_states(econ, rng):
    cfg = dataclasses.replace(CFG, optimizer="adam", periods=20, horizon=5, batch=500, moments="", n_agents=200,
                              wide_share=0.0)
    state = dk.initial_state(econ, dk.krusell_smith(), cfg, 0, rng)
    state.s.copy_((state.k > 40).long())  # so that each k says which s is its
    z = torch.zeros(20, cfg.n_economies, dtype=torch.long)
    k, path, *_ = dk.sample_households(state, constant_paths(z + 39.0, z, 2), econ, cfg, rng)
    assert torch.equal(path.s[0], (k > 40).long()) and torch.isin(k, state.k).all()


# ------------------------------------------------------------------------------------------------ kernels


def test_torchscript_agrees_with_eager(decided):
    world, econ, at = decided, decided.econ, decided.at
    now, x = dk.pick(at, slice(0, T)), random(16, 9)
    layers = dk.unpack(random(sum(map(math.prod, dk.layer_shapes(9, 6)))), dk.layer_shapes(9, 6))
    c, dc = dk.consumption_and_slope(world.net, now, econ)
    expected = dk.expected_worth(world.net, now, at.k[1:], world.ahead, econ)
    last = dk.network_value(world.value_net, dk.pick(at, T), econ)
    arguments = {
        "network_capital": (world.net, at, econ), "network_value": (world.value_net, at, econ),
        "roll_out": (world.net, world.k0, world.path, econ), "consumption_and_slope": (world.net, now, econ),
        "expected_worth": (world.net, now, at.k[1:], world.ahead, econ),
        "worth_of_saving": (expected, c, dc, now, econ), "published_labels": (*last, c, dc, now, econ),
        "network_jacobian": (layers, x[None], random(1, len(x), seed=2)),
        "slope_jacobian": (layers, x, random(16, 9, seed=1))}
    assert set(arguments) == set(dk.KERNELS)
    dk.compile_kernels("torchscript")
    assert all(isinstance(getattr(dk.fast, name), torch.jit.ScriptFunction) for name in dk.KERNELS)
    for name, given in arguments.items():
        for _ in range(3):  # the third call runs the fused code
            ours, theirs = getattr(dk.fast, name)(*given), getattr(dk, name)(*given)
            pairs = zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]
            assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in pairs), name


def test_without_torchscript_the_run_goes_on_eagerly(monkeypatch, capsys):
    def refuses(function):
        raise RuntimeError("not on this Python\nand a second line")

    monkeypatch.setattr(torch.jit, "script", refuses)
    dk.compile_kernels("torchscript")
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "TorchScript" in told and dk.fast.roll_out is dk.roll_out
