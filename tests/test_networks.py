"""Derivatives by hand against autograd, TorchScript against eager, and the safeguard of the Gauss-Newton step."""

import dataclasses
import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch

import deepham_ks as dk

H = 6
F64 = torch.float64


def random_parameters(n: int, seed: int, bias: float = 0.0) -> torch.Tensor:
    """theta (P,) of a network with n inputs and every layer alive: the initial one has a zero output layer."""
    theta = dk.initial_parameters(n, H, bias, seed).double()
    theta[-H - 1 : -1] = 0.5 * torch.randn(H, generator=torch.Generator().manual_seed(seed + 100), dtype=F64)
    return theta


def random_inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class World(NamedTuple):
    economy: dk.Economy
    econ: dk.Tables
    policy: torch.Tensor  # theta
    value: torch.Tensor
    paths: tuple  # k0 (M,), s, K, z (T + 1, M)
    K_next: torch.Tensor  # E[K' | K, z], (T, M): not the K' that came


T, M = 7, 16


@pytest.fixture(scope="module")
def world(economy):
    """An economy, policy and value parameters, and paths of T periods and M households that the dense P allows."""
    econ, rng, g = economy.tables(), np.random.default_rng(3), torch.Generator().manual_seed(3)
    Z, S = economy.income.shape
    state, P = [rng.integers(Z * S, size=M)], economy.P.reshape(Z * S, Z * S)
    for _ in range(T):
        state.append(np.array([rng.choice(Z * S, p=P[now]) for now in state[-1]]))
    state = torch.tensor(np.array(state))
    K = economy.K_ss * (0.9 + 0.2 * torch.rand((T + 1, M), generator=g, dtype=F64))
    k0 = torch.expm1(1.25 * torch.rand(M, generator=g, dtype=F64) * math.log(4 * economy.K_ss))
    k0[:4] = torch.tensor([0.0, 0.01, 0.1, 1.0])
    paths, n = (economy.k_min + k0, state % S, K, state // S), dk.n_inputs(econ)
    policy, value = random_parameters(n, 4), random_parameters(dk.n_inputs(econ, "value"), 1)
    policy[-1] -= output_at(paths, policy, econ).median() + 1e-3  # half of the states are at the borrowing limit
    return World(economy, econ, policy, value, paths, 0.98 * K[1:])


def output_at(paths, theta, econ):
    """The network's output at k0 and every date of the paths, (T + 1, M)."""
    k, s, K, z = torch.broadcast_tensors(*paths)
    return dk.network(dk.unpack(theta, H), dk.features(k, s, dk.cash_on_hand(k, s, K, z, econ)[0], K, z, econ))


@pytest.fixture(scope="module")
def eager():
    return dk.compile_kernels("none")


@pytest.fixture(scope="module")
def script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dk.compile_kernels("torchscript")


def layers_of(theta):
    return dk.unpack(theta, H)


def config(**changes):
    return dataclasses.replace(dk.Config(horizon=T, batch=M, states=99, hidden=H), **changes)


def batch_of(world, eager, control_variate):
    with torch.no_grad():
        paths = (*world.paths, world.K_next, torch.zeros_like(world.paths[1]))
        return dk.roll_out_batch(layers_of(world.policy), layers_of(world.value), paths, world.econ,
                                 config(control_variate=control_variate), eager)


def flat_batch(world, eager):
    return dk.Batch(*[x.flatten() for x in batch_of(world, eager, control_variate=True)])


def possible(economy, s, z):
    """By the dense P: (s', z', p) of one possible successor of every state after the other, each (M,); where a state
    has fewer than others the last one comes again, with p = 0."""
    Z, S = economy.income.shape
    rows = economy.P.reshape(Z * S, Z * S)[z.numpy() * S + s.numpy()]
    lists = [np.flatnonzero(row) for row in rows]
    for j in range(max(map(len, lists))):
        at = np.array([options[min(j, len(options) - 1)] for options in lists])
        p = [row[a] if j < len(options) else 0 for row, a, options in zip(rows, at, lists)]
        yield torch.tensor(at % S), torch.tensor(at // S), torch.tensor(p, dtype=F64)


def unrolled(world, theta, k, start=0):
    """sum_t (beta(s_0) ... beta(s_{t-1})) u(c_t), and the same discount times V(s_T), of households with k at `start`:
    the plain graph."""
    _, econ, _, value, (_, s, K, z), _ = world
    U, discount = 0.0, 1.0
    for t in range(start, len(K) - 1):
        m, _ = dk.cash_on_hand(k, s[t], K[t], z[t], econ)
        k = dk.network_capital(layers_of(theta), k, s[t], K[t], z[t], econ)
        U = U + discount * dk.utility(m - k, econ)
        discount = discount * econ.beta[s[t]]
    V, _ = dk.network_value(layers_of(value), k, s[-1], K[-1], z[-1], econ)
    return U + discount * V


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("n", [1, 6, 11])
def test_pack_unpack(n):
    for width in (1, 4, 24, 32, 777):
        P = dk.initial_parameters(n, width, 0.0, 0).numel()
        theta = torch.arange(P, dtype=F64)
        layers = dk.unpack(theta, width)
        assert [tuple(x.shape) for x in layers] == [(width, n), (width,), (width, width), (width,), (width,), ()]
        assert [tuple(x.shape) for x in layers] == dk.layer_shapes(n, width)
        assert torch.equal(torch.cat([x.flatten() for x in layers]), theta)
        assert layers[0].data_ptr() == theta.data_ptr()  # views: an optimiser's step on theta shows in the layers


def test_network_is_two_tanh_layers():
    theta, x = random_parameters(5, 4, 0.3), random_inputs(9, 5)
    W1, b1, W2, b2, w3, b3 = layers_of(theta)
    by_hand = [float(w3 @ torch.tanh(W2 @ torch.tanh(W1 @ row + b1) + b2) + b3) for row in x]
    assert dk.network(layers_of(theta), x).tolist() == pytest.approx(by_hand, rel=1e-13)


def test_initial_network_is_constant():
    theta = dk.initial_parameters(6, 8, math.log(0.06), seed=3)
    x = random_inputs(50, 6).to(torch.float32)
    assert torch.allclose(dk.network(dk.unpack(theta, 8), x), torch.tensor(math.log(0.06)))
    assert torch.equal(theta, dk.initial_parameters(6, 8, math.log(0.06), seed=3))
    assert not torch.equal(theta, dk.initial_parameters(6, 8, math.log(0.06), seed=4))


def test_slope_equals_autograd():
    layers = layers_of(random_parameters(5, 1))
    x, dx = random_inputs(40, 5), random_inputs(40, 5, seed=1)
    y, slope = dk.network_and_slope(layers, x, dx)
    again, tangent = torch.func.jvp(lambda x: dk.network(layers, x), (x,), (dx,))
    assert torch.equal(y, again)
    assert torch.allclose(slope, tangent, rtol=1e-12, atol=1e-14)


def test_features_tell_states_apart(world):
    """Every (k, s, K, z) has inputs of its own, all of order one but for the steep one of k, ln K / K_mean is the one
    column of K, and s and z are seen as the economy's tables have them."""
    economy, econ, *_ = world
    k = torch.linspace(economy.k_min, 4 * economy.K_ss, 9, dtype=F64)
    k, s, K, z = dk.on_grid(k.numpy(), economy.K_ss * np.linspace(0.8, 1.25, 4), econ)
    m, _ = dk.cash_on_hand(k, s, K, z, econ)
    x = dk.features(k, s, m, K, z, econ)
    assert x.shape == (*k.shape, dk.n_inputs(econ)) and (x.abs().amax((0, 1, 2, 3)) < 6).sum() == x.shape[-1] - 1
    assert 6 < x.abs().max() < 12
    assert len(x.reshape(-1, x.shape[-1]).unique(dim=0)) == k.numel()
    assert torch.allclose(x[..., dk.K_INPUT], 8 * torch.log(K / economy.K_ss))
    seen = np.concatenate([economy.sees_s[s], economy.sees_z[z]], -1)
    assert np.array_equal(x[..., dk.N_OWN :], seen) and dk.n_inputs(econ) == dk.N_OWN + seen.shape[-1]
    other = dk.features(k, s, m, K, z, econ._replace(K_mean=2 * econ.K_mean))
    assert (x != other).any((0, 1, 2, 3)).nonzero().flatten().tolist() == [dk.K_INPUT]


def test_feature_slopes_equal_autograd(world):
    _, econ, _, _, (k0, s, K, z), _ = world
    k = k0.clone().requires_grad_()
    m, R = dk.cash_on_hand(k, s[0], K[0], z[0], econ)
    x = dk.features(k, s[0], m, K[0], z[0], econ)
    by_graph = torch.stack([torch.autograd.grad(x[:, i].sum(), k, retain_graph=True, allow_unused=True,
                                                materialize_grads=True)[0] for i in range(x.shape[1])], -1)
    slopes = dk.feature_slopes(k, m, R, econ)
    assert slopes.shape == x.shape and torch.allclose(slopes, by_graph, rtol=1e-12)
    assert (slopes[:, :3] > 0).all()


def test_value_network_sees_the_square_of_ln_K_first(world):
    """And then what the policy network sees; of slopes the same, since one household's k moves neither."""
    _, econ, _, value, (k0, s, K, z), _ = world
    m, R = dk.cash_on_hand(k0, s[0], K[0], z[0], econ)
    x, dx = dk.features(k0, s[0], m, K[0], z[0], econ), dk.feature_slopes(k0, m, R, econ)
    seen, slopes = dk.for_value(x), dk.for_value(dx)
    assert torch.allclose(seen[:, 0], (8 * torch.log(K[0] / econ.K_mean)) ** 2) and torch.equal(seen[:, 1:], x)
    assert not slopes[:, 0].any() and torch.equal(slopes[:, 1:], dx)
    assert seen.shape[1] == dk.n_inputs(econ, "value") == dk.n_inputs(econ) + 1


def test_jacobians_equal_autograd():
    theta = random_parameters(5, 2)
    x, dx = random_inputs(30, 5), random_inputs(30, 5, seed=1)

    def both(theta):
        return torch.stack(dk.network_and_slope(layers_of(theta), x, dx))

    value, slope = torch.func.jacrev(both)(theta)
    assert torch.allclose(dk.network_jacobian(layers_of(theta), x), value, rtol=1e-11, atol=1e-13)
    assert torch.allclose(dk.slope_jacobian(layers_of(theta), x, dx), slope, rtol=1e-11, atol=1e-13)


def test_value_slope_equals_autograd(world):
    _, econ, _, value, (k0, s, K, z), _ = world
    k = k0.clone().requires_grad_()
    V, V_k = dk.network_value(layers_of(value), k, s[0], K[0], z[0], econ)
    assert torch.allclose(V_k, torch.autograd.grad(V.sum(), k)[0], rtol=1e-12)
    m, _ = dk.cash_on_hand(k, s[0], K[0], z[0], econ)
    g = dk.network(layers_of(value), dk.for_value(dk.features(k, s[0], m, K[0], z[0], econ)))
    assert torch.allclose(dk.equivalent_of(V, s[0], z[0], econ), g, rtol=1e-10, atol=1e-10)


def test_consumption_slope_equals_autograd(world):
    """On both sides of the borrowing limit; c and k' share the budget."""
    economy, econ, policy, _, (k0, s, K, z), _ = world
    k = k0.clone().requires_grad_()
    c, dc = dk.consumption_and_slope(layers_of(policy), k.expand_as(K), s, K, z, econ)
    m, _ = dk.cash_on_hand(k, s, K, z, econ)
    at_limit = c >= m - economy.k_min
    assert at_limit.any() and not at_limit.all()
    assert torch.allclose(dc.sum(0), torch.autograd.grad(c.sum(), k)[0], rtol=1e-12)
    for t in range(T + 1):
        m_t, _ = dk.cash_on_hand(k, s[t], K[t], z[t], econ)
        c_t = m_t - dk.network_capital(layers_of(policy), k, s[t], K[t], z[t], econ)
        assert torch.allclose(dc[t], torch.autograd.grad(c_t.sum(), k)[0], rtol=1e-11)
    k_next = dk.network_capital(layers_of(policy), k.expand_as(K), s, K, z, econ)
    assert torch.allclose(c + k_next, m, rtol=1e-13)
    assert (k_next >= economy.k_min).all() and (k_next[at_limit] == economy.k_min).all()
    assert (k_next[~at_limit] > economy.k_min).all()


def test_network_capital_keeps_the_borrowing_limit(world):
    """Never below k_min, exactly k_min where the network is positive, above it where it is negative; (T, M) states as
    (M,) ones."""
    economy, econ, policy, _, (k0, s, K, z), _ = world
    for bias in (-3.0, -0.3, 0.3, 3.0):
        theta = policy.clone()
        theta[-1] += bias
        k_next = dk.network_capital(layers_of(theta), k0.expand_as(K), s, K, z, econ)
        m, _ = dk.cash_on_hand(k0, s, K, z, econ)
        f = output_at(world.paths, theta, econ)
        assert (k_next[f >= 0] == economy.k_min).all() and (k_next[f < 0] > economy.k_min).all()
        assert (k_next < m).all()
        alone = [dk.network_capital(layers_of(theta), k0, s[t], K[t], z[t], econ) for t in range(T + 1)]
        assert torch.allclose(k_next, torch.stack(alone), rtol=1e-13)
    assert (f >= 0).all() and (k_next == economy.k_min).all()


# ------------------------------------------------------------------------------------------------ costates


def test_roll_out_follows_the_policy(world):
    _, econ, policy, _, (k0, s, K, z), _ = world
    path = dk.roll_out(layers_of(policy), k0, s, K, z, econ)
    assert torch.equal(path[0], k0) and path.shape == K.shape
    for t in range(T):
        k_next = dk.network_capital(layers_of(policy), path[t], s[t], K[t], z[t], econ)
        assert torch.allclose(path[t + 1], k_next, rtol=1e-13)


def test_batch_belongs_to_its_states(world, eager):
    """Each field at the date of the others, and c is what the budget leaves."""
    _, econ, policy, _, (_, s, K, z), K_next = world
    batch = batch_of(world, eager, control_variate=True)
    assert all(x.shape == (T, M) for x in batch)
    assert torch.equal(batch.s, s[:-1]) and torch.equal(batch.z, z[:-1])
    assert torch.equal(batch.K, K[:-1]) and torch.equal(batch.K_next, K_next)
    m, _ = dk.cash_on_hand(batch.k, batch.s, batch.K, batch.z, econ)
    assert torch.allclose((m - batch.c)[:-1], batch.k[1:], rtol=1e-12, atol=1e-12)


def test_costates_equal_autograd_through_time(world, eager):
    """U_t and lambda_t = dU_t / dk_t at every t, surprises off: 1e-10 is what seven float64 periods leave."""
    batch = batch_of(world, eager, control_variate=False)
    for t in range(T):
        k = batch.k[t].clone().requires_grad_()
        U = unrolled(world, world.policy, k, start=t)
        (lam,) = torch.autograd.grad(U.sum(), k)
        assert torch.allclose(batch.U[t], U, rtol=1e-10, atol=1e-10)
        assert torch.allclose(batch.lam[t], lam, rtol=1e-10, atol=1e-12)
        if t:
            assert torch.equal(batch.lam_next[t - 1], batch.lam[t])


def test_policy_gradient_equals_autograd_through_time(world, eager):
    """The costate form of policy_loss has the gradient of the whole unrolled graph."""
    econ, policy, k0 = world.econ, world.policy, world.paths[0]
    batch = batch_of(world, eager, control_variate=False)
    theta = policy.clone().requires_grad_()
    (by_costates,) = torch.autograd.grad(dk.policy_loss(theta, batch, econ, config()), theta)
    theta = policy.clone().requires_grad_()
    (through_time,) = torch.autograd.grad(-unrolled(world, theta, k0).mean(), theta)
    assert through_time.abs().max() > 1e-3
    assert torch.allclose(by_costates, through_time, rtol=1e-9, atol=1e-11 * through_time.abs().max().item())


def test_surprises(world):
    """X(s_{t+1}, K_{t+1}) - E_t X(s', E K') by loops at every t, of V and of R u'(c), and mean zero over the successors
    of each state where K' is what was expected."""
    economy, econ, policy, value, (k, s, K, z), K_next = world
    g = torch.Generator().manual_seed(5)
    path = economy.k_min + 2 * economy.K_ss * torch.rand(K.shape, dtype=F64, generator=g)
    policy, value = layers_of(policy), layers_of(value)

    def by_hand(k, s, K, z):
        m, R = dk.cash_on_hand(k, s, K, z, econ)
        c = m - dk.network_capital(policy, k, s, K, z, econ)
        return torch.stack([dk.network_value(value, k, s, K, z, econ)[0], R * dk.marginal_utility(c, econ)])

    *found, came, came_k = dk.surprises(policy, value, path, s, K, z, K_next, econ)
    found = torch.stack(found)
    for t in range(T):
        mean = sum(p * by_hand(path[t + 1], s1, K_next[t], z1) for s1, z1, p in possible(economy, s[t], z[t]))
        realised = by_hand(path[t + 1], s[t + 1], K[t + 1], z[t + 1])
        assert torch.allclose(found[:, t], realised - mean, rtol=1e-10, atol=1e-11)
        assert torch.allclose(torch.stack([came[t], came_k[t]]), realised, rtol=1e-12)
    total = 0.0
    for s1, z1, p in possible(economy, s[0], z[0]):
        s_two, z_two = torch.stack([s[0], s1]), torch.stack([z[0], z1])
        found = torch.stack(dk.surprises(policy, value, path[:2], s_two, K[:2], z_two, K[1:2], econ)[:2])
        total = total + p * found[:, 0]
    assert total.abs().max() < 1e-11 * found.abs().max().clamp(min=1)


def test_control_variate_takes_the_last_draw_out(world, eager):
    """One period before the end U is an exact expectation: the same whatever the last draw and however far K' came from
    what was expected. Where K' came as expected, its mean over the draws is what it is without, and the next costate is
    the mean of the envelope's. Here nothing holds what later periods give back, however large: V and V_k as they came
    are left out."""
    economy, econ, policy, value, (k0, s, K, z), K_next = world

    def without_bounds(*arguments):
        *labels, came, came_k, econ = arguments
        return dk.costates(*labels, 0 * came, 0 * came_k, econ)

    eager = eager._replace(costates=without_bounds)
    ways = {"without": (False, K[1:2]), "with": (True, K[1:2]), "K' came otherwise": (True, K_next[:1])}
    mean, U, EV_k = dict.fromkeys(ways, 0.0), {way: [] for way in ways}, 0.0
    k1 = dk.network_capital(layers_of(policy), k0, s[0], K[0], z[0], econ)
    for s1, z1, p in possible(economy, s[0], z[0]):
        EV_k = EV_k + p * dk.value_and_costate(layers_of(policy), layers_of(value), k1, s1, K[1], z1, econ)[1]
        for way, (control_variate, K_expected) in ways.items():
            paths = k0, torch.stack([s[0], s1]), K[:2], torch.stack([z[0], z1]), K_expected, 0 * s[:2]
            cfg = config(horizon=1, control_variate=control_variate)
            batch = dk.roll_out_batch(layers_of(policy), layers_of(value), paths, econ, cfg, eager)
            mean[way] = mean[way] + p * torch.stack([batch.U[0], batch.lam[0], batch.lam_next[0]])
            U[way].append(batch.U[0])
    spread = {way: (torch.stack(x) - x[0]).abs().max() for way, x in U.items()}
    assert spread["without"] > 1e-3 and spread["with"] < 1e-9 and spread["K' came otherwise"] < 1e-9
    assert torch.allclose(mean["with"][0], mean["without"][0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(mean["with"][2], EV_k, rtol=1e-10)
    assert all(not torch.allclose(*ends, rtol=1e-6) for ends in zip(mean["with"], mean["K' came otherwise"]))


def test_what_later_periods_give_back_is_held(tables):
    """U and the next costate by loops over the definition, where u'(c) grows a hundredfold now and then: what comes
    back is at most one for one, in units of u'(c), and lambda_{t+1} between half and twice E V_k."""
    g = torch.Generator().manual_seed(1)
    c, came_k = (torch.exp(1.5 * torch.randn(5, 40, generator=g, dtype=F64)) for _ in range(2))
    came, surprise, dc, V_T, V_k_T = torch.rand(5, 5, 40, generator=g, dtype=F64)
    R, s = torch.full_like(c, 1.01), torch.randint(2, (5, 40), generator=g)
    surprise_k = came_k * (1 - 2 * torch.rand(5, 40, generator=g, dtype=F64))
    econ = tables._replace(beta=torch.tensor([0.9, 0.97], dtype=F64))
    found = dk.costates(c, dc, c, s, R, 0 * c, V_T[0], V_k_T[0], surprise, surprise_k, came, came_k, econ)
    u_prime, held = dk.marginal_utility(c, econ), [0, 0]
    for i in range(40):
        U, lam = V_T[0, i], V_k_T[0, i]
        for t in reversed(range(5)):
            beta, dk_dm = econ.beta[s[t, i]], 1 - dc[t + 1, i] / 1.01 if t < 4 else 1.0
            share = min(1.0, float(u_prime[t, i] / (beta * dk_dm * came_k[t, i])))
            ahead, back = came_k[t, i] - surprise_k[t, i], share * (lam - came_k[t, i])
            lam_next = ahead + min(max(back, -ahead / 2), ahead)
            held = [held[0] + (share < 1), held[1] + bool(lam_next != ahead + back)]
            U = dk.utility(c[t, i], econ) + beta * (came[t, i] - surprise[t, i] + share * (U - came[t, i]))
            lam = u_prime[t, i] * dc[t, i] + beta * (1.01 - dc[t, i]) * lam_next
            expected = torch.stack([U, lam, lam_next])
            assert torch.allclose(torch.stack([x[t, i] for x in found]), expected, rtol=1e-10)
    assert all(20 < n < 180 for n in held)


def paths_by_law(noise, slow=0.0):
    """ln K (400, 200) by the law 0.12 + 0.01 z + 0.965 ln K, and beside it what is not due to z and dies out at the
    rate slow."""
    g = torch.Generator().manual_seed(0)
    z = (torch.rand(400, 200, generator=g) < 0.125).cumsum(0) % 2  # eight periods in a state
    by_z, beside = torch.full((400, 200), 3.57, dtype=F64), torch.zeros(400, 200, dtype=F64)
    for t in range(399):
        by_z[t + 1] = 0.12 + 0.01 * z[t] + 0.965 * by_z[t]
        beside[t + 1] = slow * beside[t] + noise * torch.randn(200, generator=g, dtype=F64)
    return by_z + beside, z


def test_expected_capital_takes_the_sampling_noise_out():
    """Exact where K' follows a law of motion; the realised K' of paths with noise lies around it, with mean zero in
    each z."""
    econ = dk.krusell_smith().tables()
    for noise in (0.0, 1e-3):
        ln_K, z = paths_by_law(noise)
        law = dk.belief(ln_K.exp(), z, econ)
        gap = ln_K[1:] - torch.log(dk.expected_capital(ln_K.exp(), z, law, econ))
        assert gap.shape == (399, 200) and all(gap[z[:-1] == i].mean().abs() < 1e-12 for i in (0, 1))
        assert gap.std() == pytest.approx(noise * (1 + 0.965**2) ** 0.5, rel=0.05, abs=1e-12)


@pytest.mark.parametrize("slow", [0.9, 0.99])
def test_belief_is_of_what_z_does_to_capital(slow):
    """Where ln K has in it what is not due to z and dies out more or less slowly, least squares takes the persistence
    of both for that of one; the history of z as an instrument does not."""
    econ = dk.krusell_smith().tables()
    ln_K, z = paths_by_law(6e-3, slow)
    plain, _ = dk.law_of_motion(ln_K.exp(), z, torch.zeros(2))
    ours = dk.belief(ln_K.exp(), z, econ)
    wrong = (plain[:, 1] - 0.965).abs().min()
    assert wrong > 0.005 and (ours[:, 1] - 0.965).abs().max() < 0.2 * wrong


def test_belief_where_z_says_nothing():
    """One z, a z that never comes, or capital that z does not move: as least squares has it."""
    g, econ = torch.Generator().manual_seed(0), dk.krusell_smith().tables()
    K = torch.exp(3.6 + 0.01 * torch.randn(200, 5, generator=g, dtype=F64))
    for z in (torch.zeros(200, 5, dtype=torch.int64), torch.randint(2, (200, 5), generator=g)):
        plain, _ = dk.law_of_motion(K, z, torch.zeros(2))
        assert torch.allclose(dk.belief(K, z, econ), plain, equal_nan=True)


def test_sampled_households(economy, tables, rng):
    """Windows of the simulated economies, s as in the panel or any alike and then by the chain, k from the panel or
    between the limit and beyond the simulated range."""
    cfg = config(batch=4000, horizon=5, wide_share=0.5, wide_top=1.5, even_share=0.0)
    panel = dk.initial_panel(7, 300, tables, rng)
    simulated = dk.simulate([lambda k, s, K, z: k], panel, 30, tables, rng)
    K_path, z_path = (torch.stack(x) for x in zip(*[(paths[0][1][:, 0], z[:, 0]) for _, z, paths in simulated]))
    K_path = K_path + torch.arange(30).unsqueeze(1)  # every (period, economy) its own number
    k_range = torch.stack([panel.k.min(), panel.k.max()])
    expected = dk.expected_capital(K_path, z_path, dk.belief(K_path, z_path, tables), tables)
    k, s, K, z, K_next, row = dk.sample_households(panel, K_path, expected, z_path, k_range, tables, cfg, rng)
    assert K_next.shape == (5, 4000)
    assert k.shape == (4000,) and s.shape == K.shape == z.shape == (6, 4000)
    starts = set()
    for b in range(0, 4000, 97):
        period, at = ((K_path - K[0, b]).abs() < 1e-6).nonzero()[0].tolist()
        assert torch.equal(K[:, b], K_path[period : period + 6, at])
        assert torch.equal(z[:, b], z_path[period : period + 6, at])
        assert torch.equal(K_next[:, b], expected[period : period + 5, at])
        assert torch.equal(K[:, b], K_path.flatten()[row[:, b]])
        starts.add((period, at))
    assert len({at for _, at in starts}) == 7 and len({period for period, _ in starts}) > 10
    Z, S = economy.income.shape
    for state in np.ndindex(Z, Z, S):  # who comes next follows the transition
        at = (z[:-1] == state[0]) & (z[1:] == state[1]) & (s[:-1] == state[2])
        p, n = economy.Pi[state], int(at.sum())
        found = torch.bincount(s[1:][at], minlength=S).numpy()
        assert (np.abs(found - n * p) <= 4.5 * (n * p * (1 - p)) ** 0.5).all()
        assert n > 20 or Z * S > 4
    on_panel = torch.isin(k, panel.k)
    assert on_panel.double().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    wide, top = k[~on_panel], max(1.5 * panel.k.max().item(), 5 * economy.K_ss)
    assert 0.9 * top < wide.max() <= top and economy.k_min <= wide.min() < panel.k.min()
    household = (panel.k.flatten().unsqueeze(1) == k[on_panel]).int().argmax(0)
    assert torch.equal(s[0, on_panel], panel.s.flatten()[household])
    evenly = dataclasses.replace(cfg, even_share=1.0)
    even = dk.sample_households(panel, K_path, expected, z_path, k_range, tables, evenly, rng)[1][0]
    for state in range(S):
        assert (even == state).double().mean() == pytest.approx(1 / S, abs=4 * 0.5 / 4000**0.5)


# ------------------------------------------------------------------------------------------------ kernels


def test_torchscript_agrees_with_eager(world, eager, script):
    _, econ, policy, value, (k0, s, K, z), _ = world
    p, v = layers_of(policy), layers_of(value)
    n = dk.n_inputs(econ)
    x, dx, same = random_inputs(16, n), random_inputs(16, n, seed=1), random_inputs(T, M).sigmoid()
    path = dk.roll_out(p, k0, s, K, z, econ)
    arguments = {
        "network_capital": (p, k0, s[0], K[0], z[0], econ), "network_value": (v, k0, s[0], K[0], z[0], econ),
        "roll_out": (p, k0, s, K, z, econ), "consumption_and_slope": (p, path, s, K, z, econ),
        "surprises": (p, v, path, s, K, z, world.K_next, econ),
        "costates": (1 + same, same, same, s[:-1], 1 + same, same, same[0], same[1], same, same, same, same, econ),
        "network_jacobian": (p, x), "slope_jacobian": (p, x, dx),
    }
    assert set(arguments) == set(dk.Kernels._fields)
    for name, args in arguments.items():
        for _ in range(3):  # the third call runs the fused code
            ours, theirs = getattr(script, name)(*args), getattr(eager, name)(*args)
            pairs = zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs), name


def test_python_3_14_falls_back_to_eager_with_one_warning(monkeypatch):
    monkeypatch.setattr(dk.sys, "version_info", (3, 14, 0))
    with pytest.warns(UserWarning, match="TorchScript") as caught:
        kernels = dk.compile_kernels("torchscript")
    assert len(caught) == 1
    assert kernels == dk.compile_kernels("none")


# ------------------------------------------------------------------------------------------------ Gauss-Newton


@pytest.fixture
def linear_problem():
    """residual(theta) = y - J theta."""
    g = torch.Generator().manual_seed(0)
    J, y = torch.randn(30, 5, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    theta = torch.randn(5, generator=g, dtype=F64)
    return J, lambda theta: y - J @ theta, lambda theta: (y - J @ theta).square().sum(), theta


def rows(jacobian, residual, theta):
    return lambda part: [(residual(theta)[part], jacobian[part])]


def levenberg_marquardt(J, residual, damping, n):
    """The step by plain linear algebra: damping and the mean squared residual of n states, of each parameter's diagonal
    and a tenth of the mean one."""
    A = J.T @ J
    damped = A + (damping + residual.square().sum() / n) * torch.diag(A.diagonal() + 0.1 * A.diagonal().mean())
    return torch.linalg.solve(damped, J.T @ residual)


def test_gram_matrix():
    """The lower triangle of J' J, whatever the number of columns; what is above it is not read."""
    for P in (1, 3, 4, 5, 50):
        J, A = random_inputs(20, P), torch.zeros(P, P, dtype=F64)
        dk.add_gram(A, J)
        assert torch.allclose(A.tril(), (J.T @ J).tril(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate, damping", [(1.0, 1e-9), (0.3, 0.5)])
def test_gauss_newton_takes_a_good_step(linear_problem, rate, damping):
    J, residual, loss, theta = linear_problem
    expected = theta + rate * levenberg_marquardt(J, residual(theta), damping, 30)
    new, after, taken = dk.gauss_newton_step(theta, rows(J, residual, theta), 30, torch.tensor(rate, dtype=F64),
                                             torch.tensor(damping, dtype=F64), 0.9 * damping, loss)
    assert taken and loss(new) < loss(theta)
    assert torch.allclose(new, expected, rtol=1e-11)
    assert after.item() == pytest.approx(0.9 * damping)  # it falls, never below the floor


def test_gauss_newton_ends_at_least_squares(linear_problem):
    """Where the residual can vanish, a few full steps find the solution: the damping goes with the residual."""
    J, _, _, theta = linear_problem
    solution, damping = torch.arange(5, dtype=F64), torch.tensor(1.0, dtype=F64)

    def residual(theta):
        return J @ (solution - theta)

    for _ in range(60):
        theta, damping, _ = dk.gauss_newton_step(theta, rows(J, residual, theta), 30, torch.tensor(1.0, dtype=F64),
                                                 damping, 1e-9, lambda theta: residual(theta).square().sum())
    assert torch.allclose(theta, solution, atol=1e-7)


def test_gauss_newton_takes_a_third_of_a_step_that_is_three_times_too_long(linear_problem):
    """Of the step, a third and a ninth of it the one that leaves the least loss."""
    J, _, _, theta = linear_problem
    solution, one, small = torch.arange(5, dtype=F64), torch.tensor(1.0, dtype=F64), torch.tensor(1e-12, dtype=F64)
    for too_long in (1, 3, 9):
        new, _, taken = dk.gauss_newton_step(
            solution + 1e-6, rows(J / too_long, lambda theta: J @ (solution - theta), solution + 1e-6), 30, one, small,
            1e-12, lambda theta: (J @ (solution - theta)).square().sum(), (1, 3, 9))
        assert taken and torch.allclose(new, solution, atol=1e-9)


def test_gauss_newton_refuses_a_bad_step(linear_problem):
    """Uphill (the Jacobian's sign wrong), and into NaN: theta stays, the damping rises until the step is tiny."""
    J, residual, loss, theta = linear_problem
    for jacobian, judged in ((-J, loss), (J, lambda theta: loss(theta) * math.nan)):
        damping = torch.tensor(1e-3, dtype=F64)
        new, after, taken = dk.gauss_newton_step(theta, rows(jacobian, residual, theta), 30,
                                                 torch.tensor(1.0, dtype=F64), damping, 1e-4, judged)
        assert not taken and torch.equal(new, theta) and after > 5 * damping


def states_of(batch):
    return batch.k, batch.s, batch.K, batch.z


def output_and_slope(value, batch, econ):
    """g and dg/dk of the value network by autograd through everything."""
    k = batch.k.clone().requires_grad_()
    m, _ = dk.cash_on_hand(k, batch.s, batch.K, batch.z, econ)
    g = dk.network(layers_of(value), dk.for_value(dk.features(k, batch.s, m, batch.K, batch.z, econ)))
    (g_k,) = torch.autograd.grad(g.sum(), k, create_graph=True)
    return g, g_k


def value_by_hand(g, batch, economy):
    """V = D u(c_ss exp(g / 10)) in units of c_ss, from the tables of the economy."""
    D = torch.tensor(economy.annuity)[batch.z, batch.s]
    return D * (g / 10 if economy.gamma == 1 else torch.exp((1 - economy.gamma) * g / 10) / (1 - economy.gamma))



def test_labels_stay_where_utility_has_values(world, eager):
    """For gamma > 1 utility is below zero and for gamma < 1 above: a noisy U beyond that has no equivalent. Any other
    is what it was."""
    batch = batch_of(world, eager, True)
    g, _, _ = dk.value_targets(batch, world.econ)
    assert torch.equal(g, dk.equivalent_of(batch.U, batch.s, batch.z, world.econ))
    beyond = -torch.sign(torch.tensor(dk.utility_ss(world.econ))) * 1e-3  # zero for log utility, which has no bound
    U = batch.U.clone()
    U[:2] = beyond
    g, slope, unit = dk.value_targets(batch._replace(U=U), world.econ)
    assert g.isfinite().all() and slope.isfinite().all() and unit.isfinite().all()
    if world.econ.gamma != 1:
        end = batch.c.max() * 2 if world.econ.gamma > 1 else batch.c.min() / 2
        equivalent = world.econ.c_ss * torch.exp(world.econ.value_unit * g[:2])
        assert torch.allclose(equivalent, end.expand(g[:2].shape), rtol=1e-3)


def test_value_step_is_least_squares_on_levels_and_slopes(world, eager):
    """The step of value_step against one from an autograd Jacobian of all residuals: g at which V = U, and dg/dk at
    which V_k = lambda, in units of u'(c)."""
    economy, econ, _, value, *_ = world
    cfg = config(slope_weight=0.75, level_weight=0.5)
    batch = flat_batch(world, eager)
    rate, damping = torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=F64)
    target = dk.equivalent_of(batch.U, batch.s, batch.z, econ).requires_grad_()
    V = value_by_hand(target, batch, economy)
    assert torch.allclose(V, batch.U, rtol=1e-9)
    (V_g,) = torch.autograd.grad(V.sum(), target)
    target = target.detach()
    u_prime, weight = dk.marginal_utility(batch.c, econ), torch.tensor(economy.weight)[batch.s].sqrt()

    def residuals(theta):
        g, g_k = output_and_slope(theta, batch, econ)
        return torch.cat([0.5 * weight * (target - g), 0.75 * weight * (batch.lam - V_g * g_k) / u_prime])

    J = -torch.autograd.functional.jacobian(residuals, value)
    expected = value + rate * levenberg_marquardt(J, residuals(value).detach(), damping, batch.k.numel())
    new, _, taken = dk.value_step(value, rate, damping, batch, econ, cfg, eager)
    assert taken and residuals(new).square().sum() < residuals(value).square().sum()
    assert torch.allclose(new, expected, rtol=1e-8, atol=1e-10)
    loss = dk.value_loss(value, batch, econ, cfg)  # of Adam: the same without weights
    assert loss.item() == pytest.approx((residuals(value) / weight.repeat(2)).square().sum().item() / 2 / len(weight))


def test_bellman_step_is_least_squares_on_the_bellman_residual(world, eager):
    """The same with bellman: u(c) + beta E V(s') - V(s) by the dense P, in units of the network's output, robust."""
    economy, econ, _, value, *_ = world
    cfg, batch = config(slope_weight=0.75, level_weight=0.5), flat_batch(world, eager)
    rate, damping = torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=F64)
    m, _ = dk.cash_on_hand(*states_of(batch), econ)
    u_prime, weight = dk.marginal_utility(batch.c, econ), torch.tensor(economy.weight)[batch.s].sqrt()
    beta, D = torch.tensor(economy.beta)[batch.s], torch.tensor(economy.annuity)[batch.z, batch.s]

    def slope_at(g):
        g = g.detach().requires_grad_()
        return torch.autograd.grad(value_by_hand(g, batch, economy).sum(), g)[0]

    V_g_now = slope_at(output_and_slope(value, batch, econ)[0])
    V_g_target = slope_at(dk.equivalent_of(batch.U, batch.s, batch.z, econ))

    def residuals(theta):
        g, g_k = output_and_slope(theta, batch, econ)
        EV = sum(p * dk.network_value(layers_of(theta), m - batch.c, s1, batch.K_next, z1, econ)[0]
                 for s1, z1, p in possible(economy, batch.s, batch.z))
        bellman = dk.utility(batch.c, econ) + beta * EV - value_by_hand(g, batch, economy)
        return torch.cat([0.5 * weight * bellman * D / V_g_now,
                          0.75 * weight * (batch.lam - V_g_target * g_k) / u_prime])

    now = residuals(value).detach()
    size = now.view(2, -1).abs().mean(1, keepdim=True)
    robust = ((1 + (now.view(2, -1) / size) ** 2) ** -0.25).flatten()  # large ones, next to kinks, do not bend the rest
    J = -torch.autograd.functional.jacobian(residuals, value) * robust.unsqueeze(1)
    expected = value + rate * levenberg_marquardt(J, robust * now, damping, batch.k.numel())
    new, _, taken = dk.value_step(value, rate, damping, batch, econ, cfg, eager, bellman=True)
    assert taken and torch.allclose(new, expected, rtol=1e-8, atol=1e-10)


def test_policy_step_moves_log_c_by_its_newton_step(world, eager):
    """Where the limit binds and the household would rather eat more, nothing pulls; elsewhere log c goes towards
    log c~ with u'(c~) = beta lambda', by a loss that is quadratic for small residuals and linear for large ones."""
    economy, econ, policy, *_ = world
    batch = flat_batch(world, eager)
    m, _ = dk.cash_on_hand(*states_of(batch), econ)
    x = dk.features(batch.k, batch.s, m, batch.K, batch.z, econ)
    f = dk.network(layers_of(policy), x)
    worth = torch.tensor(economy.beta)[batch.s] * batch.lam_next
    wish = torch.log(dk.inverse_marginal_utility(worth, econ) / batch.c)
    wish = torch.where(worth > 0, wish, math.inf)  # capital that is worth nothing is eaten
    assert (wish.abs() < 0.5).any() and (wish.abs() > 0.5).any()
    wish = wish.clamp(-0.5, 0.5)
    at_limit = batch.c >= m - economy.k_min
    free = ~(at_limit & (wish >= 0))
    assert free.any() and not free.all() and (free & at_limit).any()
    weight = torch.tensor(economy.weight).sqrt()[batch.s[free]]
    size = (weight**2 * wish[free].abs()).sum() / (weight**2).sum()
    weight = weight / (1 + (wish[free] / size) ** 2) ** 0.25  # the largest residuals do not bend the rest
    J = torch.func.jacrev(lambda theta: dk.network(layers_of(theta), x))(policy)[free] * weight.unsqueeze(1)
    rate, damping = torch.tensor(0.2, dtype=F64), torch.tensor(0.1, dtype=F64)
    expected = policy + rate * levenberg_marquardt(J, weight * wish[free], damping, len(wish))
    new, _, taken = dk.policy_step(policy, rate, damping, batch, econ, config(), eager)
    assert taken and torch.allclose(new, expected, rtol=1e-8, atol=1e-10)
    moved = dk.network(layers_of(new), x)[free] - f[free]
    assert torch.dot(weight * moved, weight * wish[free]) > 0


def test_one_residual_of_many_hardly_bends_a_robust_fit():
    """A constant fitted to nine zeros and a one by the weights it converges to: far below the mean, a tenth."""
    x, weight, fit = torch.tensor([0.0] * 9 + [1.0], dtype=F64), torch.ones(10, dtype=F64), 0.0
    for _ in range(100):
        w = dk.robust(x - fit, weight) ** 2
        fit = float((w * x).sum() / w.sum())
    assert 0 < fit < 0.03
    assert dk.robust(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)).tolist() == [1, 1, 1]


def test_thin_keeps_early_periods(world, eager):
    """Whole periods, all fields alike, the first one among them and none of the second half: labels late in a roll-out
    hold little realised utility."""
    batch, cfg = batch_of(world, eager, control_variate=False), config(horizon=12, states=3)
    thinned, periods = dk.thin(batch, cfg), dk.taught(cfg)
    assert periods == sorted(set(periods)) and periods[0] == 0 and 3 == len(periods) and periods[-1] < cfg.horizon / 2
    for whole, part in zip(batch, thinned):
        assert torch.equal(part, torch.cat([whole[t] for t in periods]))
    state = dk.initial_state(world.economy.tables(dtype=torch.float32), cfg, 0, torch.Generator())
    assert len(state["batch_k"]) == len(thinned.k)
    assert dk.taught(config(horizon=40, states=10_000)) == list(range(20)) and dk.taught(config(horizon=2)) == [0]
    assert dk.taught(dk.Config(states=1)) == [0] and len(dk.taught(dk.Config())) == dk.Config.states


def test_simulated_range_grows_at_once_and_shrinks_slowly():
    k_range = torch.tensor([2.0, 100.0])
    assert torch.equal(dk.widened(k_range, torch.tensor([[1.0, 300.0]])), torch.tensor([1.0, 300.0]))
    assert torch.allclose(dk.widened(k_range, torch.tensor([[12.0, 90.0]])), torch.tensor([3.0, 99.0]))


def test_momentum_repeats_a_share_of_the_last_step(world, eager):
    """Where moments are learnt theta moves by its step and momentum times the last move, once savings hardly move;
    elsewhere there is none."""
    econ, moved, sizes = world.economy.tables(dtype=torch.float32), {}, dict(n_agents=20, n_economies=3, periods=20)
    for learnt in (0, 1):
        cfg = config(horizon=12, states=3, policy_rate=0.1, learnt_moments=learnt, **sizes)
        econ, rng = dk.with_units(econ, cfg), torch.Generator().manual_seed(0)
        state = dk.initial_state(econ, cfg, 0, rng)
        dk.set_rates(state, cfg, {})
        assert state["rates"][4] == 0  # not in the first steps
        dk.iterate(state, econ, cfg, eager, rng, {})
        state["watched"] = 10 * [[0.5] * 10]  # savings that hardly move
        dk.set_rates(state, cfg, {})
        momentum = 0.4 * learnt
        assert state["rates"].tolist() == pytest.approx([0.1 * (1 - momentum), 1, 0, 1, momentum])
        assert ("last_step" in state) == (learnt > 0)
    states = dk.Batch(*[state[f"batch_{name}"] for name in dk.Batch._fields])
    for last in (0.0, 1e-3):
        again = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
        again["last_step"].fill_(last)
        taken = dk.gauss_newton_updates(again, states, econ, cfg, eager)
        moved[last] = again["last_step"]
        assert taken[0] == 1 and torch.equal(moved[last], again["policy"] - state["policy"])
    assert torch.allclose(moved[1e-3] - moved[0.0], torch.full_like(moved[0.0], 4e-4), atol=1e-6)
