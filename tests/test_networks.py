"""Derivatives by hand against autograd, TorchScript against eager, and the safeguard of the Gauss-Newton step."""

import dataclasses
import math
import warnings

import pytest
import torch

import deepham_ks as dk

H = 6
F64 = torch.float64


def random_parameters(seed: int, bias: float = 0.0) -> torch.Tensor:
    """theta (P,) with every layer alive: the initial one has a zero output layer."""
    theta = dk.initial_parameters(H, bias, seed).double()
    theta[-H - 1 : -1] = 0.5 * torch.randn(H, generator=torch.Generator().manual_seed(seed + 100), dtype=F64)
    return theta


@pytest.fixture(scope="module", params=[1.0, 2.0], ids=["log", "gamma2"])
def world(request):
    """econ, policy and value parameters, and paths (k0, eps, K, z) of T = 7 periods, B = 16 households."""
    econ = dk.build_economy(dk.Calibration(gamma=request.param), dtype=F64)
    T, B = 7, 16
    g = torch.Generator().manual_seed(3)
    z = torch.randint(2, (T + 1, B), generator=g)
    eps = torch.randint(2, (T + 1, B), generator=g)
    K = 36 + 8 * torch.rand((T + 1, B), generator=g, dtype=F64)
    k0 = torch.expm1(5 * torch.rand(B, generator=g, dtype=F64))
    k0[:4] = torch.tensor([0.0, 0.01, 0.1, 1.0])
    return econ, random_parameters(0, 0.1), random_parameters(1), (k0, eps, K, z)


@pytest.fixture(scope="module")
def eager():
    return dk.compile_kernels("none")


def config(**changes):
    return dataclasses.replace(dk.Config(horizon=7, batch=16, stride=1, hidden=H), **changes)


def batch_of(world, eager, control_variate):
    econ, policy, value, paths = world
    with torch.no_grad():
        return dk.roll_out_batch(dk.unpack(policy), dk.unpack(value), paths, econ,
                                 config(control_variate=control_variate), eager)


def unrolled(world, theta, k, start=0):
    """sum_t beta^t (u(c_t) - (1 - beta) V_ss) + beta^T V(s_T) of households with k at `start`: the plain graph."""
    econ, _, value, (_, eps, K, z) = world
    U, discount = 0.0, 1.0
    for t in range(start, len(K) - 1):
        m, _ = dk.cash_on_hand(k, eps[t], K[t], z[t], econ)
        k = dk.network_capital(dk.unpack(theta), k, eps[t], K[t], z[t], econ)
        U = U + discount * (dk.utility(m - k, econ) - (1 - econ.beta) * econ.V_ss)
        discount *= econ.beta
    V, _ = dk.network_value(dk.unpack(value), k, eps[-1], K[-1], z[-1], econ)
    return U + discount * V


# ------------------------------------------------------------------------------------------------ networks


def test_pack_unpack():
    for width in (1, 4, 24, 32, 777):
        P = dk.n_parameters(width)
        theta = torch.arange(P, dtype=F64)
        layers = dk.unpack(theta)
        assert dk.hidden_width(P) == width
        assert [tuple(x.shape) for x in layers] == [(width, 5), (width,), (width, width), (width,), (width,), ()]
        assert torch.equal(torch.cat([x.flatten() for x in layers]), theta)
        assert layers[0].data_ptr() == theta.data_ptr()  # views: an optimiser's step on theta shows in the layers


def test_network_is_two_tanh_layers():
    theta, x = random_parameters(4, 0.3), torch.randn(9, 5, dtype=F64)
    W1, b1, W2, b2, w3, b3 = dk.unpack(theta)
    by_hand = [float(w3 @ torch.tanh(W2 @ torch.tanh(W1 @ row + b1) + b2) + b3) for row in x]
    assert dk.network(dk.unpack(theta), x).tolist() == pytest.approx(by_hand, rel=1e-13)


def test_initial_network_is_constant():
    theta = dk.initial_parameters(8, math.log(0.06), seed=3)
    assert torch.allclose(dk.network(dk.unpack(theta), torch.randn(50, 5)), torch.tensor(math.log(0.06)))
    assert torch.equal(theta, dk.initial_parameters(8, math.log(0.06), seed=3))
    assert not torch.equal(theta, dk.initial_parameters(8, math.log(0.06), seed=4))


def test_slope_equals_autograd():
    layers = dk.unpack(random_parameters(1))
    x, dx = torch.randn(40, 5, dtype=F64), torch.randn(40, 5, dtype=F64)
    y, slope = dk.network_and_slope(layers, x, dx)
    again, tangent = torch.func.jvp(lambda x: dk.network(layers, x), (x,), (dx,))
    assert torch.equal(y, again)
    assert torch.allclose(slope, tangent, rtol=1e-12, atol=1e-14)


def test_feature_slopes_equal_autograd(world):
    econ, _, _, (k0, eps, K, z) = world
    k = k0.clone().requires_grad_()
    m, R = dk.cash_on_hand(k, eps[0], K[0], z[0], econ)
    x = dk.features(k, eps[0], m, K[0], z[0], econ)
    by_graph = torch.stack([torch.autograd.grad(x[:, i].sum(), k, retain_graph=True, allow_unused=True,
                                                materialize_grads=True)[0] for i in range(x.shape[1])], -1)
    assert torch.allclose(dk.feature_slopes(m, R, econ), by_graph, rtol=1e-12)


def test_jacobians_equal_autograd():
    theta = random_parameters(2)
    x, dx = torch.randn(30, 5, dtype=F64), torch.randn(30, 5, dtype=F64)

    def both(theta):
        return torch.stack(dk.network_and_slope(dk.unpack(theta), x, dx))

    value, slope = torch.func.jacrev(both)(theta)
    assert torch.allclose(dk.network_jacobian(dk.unpack(theta), x), value, rtol=1e-11, atol=1e-13)
    assert torch.allclose(dk.slope_jacobian(dk.unpack(theta), x, dx), slope, rtol=1e-11, atol=1e-13)


def test_value_slope_equals_autograd(world):
    econ, _, value, (k0, eps, K, z) = world
    k = k0.clone().requires_grad_()
    V, V_k = dk.network_value(dk.unpack(value), k, eps[0], K[0], z[0], econ)
    assert torch.allclose(V_k, torch.autograd.grad(V.sum(), k)[0], rtol=1e-12)


def test_consumption_slope_equals_autograd(world):
    """On both sides of the borrowing limit; c and k' share the budget."""
    econ, policy, _, (k0, eps, K, z) = world
    k = k0.clone().requires_grad_()
    c, dc = dk.consumption_and_slope(dk.unpack(policy), k, eps[0], K[0], z[0], econ)
    m, _ = dk.cash_on_hand(k, eps[0], K[0], z[0], econ)
    at_limit = c >= m
    assert at_limit.any() and not at_limit.all()
    assert torch.allclose(dc, torch.autograd.grad(c.sum(), k)[0], rtol=1e-12)
    k_next = dk.network_capital(dk.unpack(policy), k, eps[0], K[0], z[0], econ)
    assert torch.allclose(c + k_next, m, rtol=1e-14)
    assert (k_next >= 0).all() and (k_next[at_limit] == 0).all() and (k_next[~at_limit] > 0).all()


# ------------------------------------------------------------------------------------------------ costates


def test_roll_out_follows_the_policy(world):
    econ, policy, _, (k0, eps, K, z) = world
    path = dk.roll_out(dk.unpack(policy), k0, eps, K, z, econ)
    assert torch.equal(path[0], k0) and path.shape == K.shape
    for t in range(len(K) - 1):
        k_next = dk.network_capital(dk.unpack(policy), path[t], eps[t], K[t], z[t], econ)
        assert torch.allclose(path[t + 1], k_next, rtol=1e-13)


def test_costates_equal_autograd_through_time(world, eager):
    """U_t and lambda_t = dU_t / dk_t at every t, surprises off: 1e-10 is what seven float64 periods leave."""
    _, policy, _, _ = world
    batch = batch_of(world, eager, control_variate=False)
    for t in range(batch.k.shape[0]):
        k = batch.k[t].clone().requires_grad_()
        U = unrolled(world, policy, k, start=t)
        (lam,) = torch.autograd.grad(U.sum(), k)
        assert torch.allclose(batch.U[t], U, rtol=1e-10, atol=1e-10)
        assert torch.allclose(batch.lam[t], lam, rtol=1e-10, atol=1e-12)
        if t:
            assert torch.equal(batch.lam_next[t - 1], batch.lam[t])


def test_policy_gradient_equals_autograd_through_time(world, eager):
    """The costate form of policy_loss has the gradient of the whole unrolled graph."""
    econ, policy, _, (k0, *_) = world
    batch = batch_of(world, eager, control_variate=False)
    theta = policy.clone().requires_grad_()
    (by_costates,) = torch.autograd.grad(dk.policy_loss(theta, batch, econ), theta)
    theta = policy.clone().requires_grad_()
    (through_time,) = torch.autograd.grad(-unrolled(world, theta, k0).mean(), theta)
    assert through_time.abs().max() > 1e-3
    assert torch.allclose(by_costates, through_time, rtol=1e-9, atol=1e-11 * through_time.abs().max().item())


def test_surprises(world, eager):
    """V(s_{t+1}) - E_t V by loops at every t, and mean zero: exactly, over the four successors of each state."""
    econ, _, value, (k, eps, K, z) = world
    path = 40 * torch.rand(K.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    layers, P = dk.unpack(value), econ.P.reshape(4, 4)
    found = dk.next_value_surprise(layers, path, eps, K, z, econ)
    one = torch.ones_like(eps[0])
    for t in range(len(K) - 1):
        now = 2 * z[t] + eps[t]
        options = [dk.network_value(layers, path[t + 1], s % 2 * one, K[t + 1], s // 2 * one, econ) for s in range(4)]
        for i in range(2):  # V, V_k
            successors = torch.stack([option[i] for option in options])  # (4, B)
            mean = (P[now].T * successors).sum(0)
            realised = dk.network_value(layers, path[t + 1], eps[t + 1], K[t + 1], z[t + 1], econ)[i]
            assert torch.allclose(found[i][t], realised - mean, rtol=1e-10, atol=1e-11)
    total = 0.0
    for s in range(4):
        one_step = [torch.stack([x[0], fixed]) for x, fixed in ((eps, s % 2 * one), (z, s // 2 * one))]
        surprise = dk.next_value_surprise(layers, path[:2], one_step[0], K[:2], one_step[1], econ)
        total = total + P[2 * z[0] + eps[0], s] * torch.stack(surprise)[:, 0]
    assert total.abs().max() < 1e-11 * found[0].abs().max().clamp(min=1)


def test_control_variate_takes_the_last_draw_out(world, eager):
    """One period before the end the labels are exact expectations: the same whatever the last draw, and their mean
    over the draws is what they are without the control variate."""
    econ, policy, value, (k0, eps, K, z) = world
    P, one = econ.P.reshape(4, 4), torch.ones_like(eps[0])
    labels = {True: [], False: []}
    for s in range(4):
        paths = k0, torch.stack([eps[0], s % 2 * one]), K[:2], torch.stack([z[0], s // 2 * one])
        for control_variate, out in labels.items():
            cfg = config(horizon=1, control_variate=control_variate)
            batch = dk.roll_out_batch(dk.unpack(policy), dk.unpack(value), paths, econ, cfg, eager)
            out.append(torch.stack([batch.U[0], batch.lam[0], batch.lam_next[0]]))
    exact, noisy = torch.stack(labels[True]), torch.stack(labels[False])
    assert torch.allclose(exact, exact[:1].expand_as(exact), rtol=1e-10, atol=1e-10)
    assert (noisy - noisy[:1]).abs().max() > 1e-3
    mean = (P[2 * z[0] + eps[0]].T.unsqueeze(1) * noisy).sum(0)
    assert torch.allclose(exact[0], mean, rtol=1e-10, atol=1e-10)


def test_sampled_households(econ, rng):
    """Windows of the simulated economies, employment at the rate of z given the first draw, k over [0, k_wide]."""
    cfg = config(batch=4000, horizon=5, wide_share=0.5, k_wide=5.0, unemployed_share=0.0)
    panel = dk.initial_panel(7, 300, econ, rng)
    path = [(K[:, 0], z[:, 0]) for _, _, K, z, _ in dk.simulate(lambda k, eps, K, z: k, panel, 30, econ, rng)]
    K_path, z_path = (torch.stack(x) for x in zip(*path))
    K_path = K_path + torch.arange(30).unsqueeze(1)  # every (period, economy) its own number
    k, eps, K, z = dk.sample_households(panel, K_path, z_path, econ, cfg, rng)
    assert k.shape == (4000,) and eps.shape == K.shape == z.shape == (6, 4000)
    for b in range(0, 4000, 97):
        period, economy = ((K_path - K[0, b]).abs() < 1e-6).nonzero()[0].tolist()
        assert torch.equal(K[:, b], K_path[period : period + 6, economy])
        assert torch.equal(z[:, b], z_path[period : period + 6, economy])
    for before in range(8):  # (z, z', eps): who has work next follows the transition
        state = before // 4, before // 2 % 2, before % 2
        at = (z[:-1] == state[0]) & (z[1:] == state[1]) & (eps[:-1] == state[2])
        p, n = econ.p_employed[state].item(), int(at.sum())
        assert n > 20 and eps[1:][at].double().mean().item() == pytest.approx(p, abs=4.5 * (p * (1 - p) / n) ** 0.5)
    on_panel = torch.isin(k, panel.k)
    assert on_panel.double().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    wide = k[~on_panel]
    assert wide.min() < 1 and 4.5 * econ.K_ss < wide.max() <= 5 * econ.K_ss
    all_idle = dk.sample_households(panel, K_path, z_path, econ, dataclasses.replace(cfg, unemployed_share=1.0), rng)
    assert (all_idle[1][0] == 0).all() and (all_idle[1][1] == 1).any()


# ------------------------------------------------------------------------------------------------ kernels


def test_torchscript_agrees_with_eager(world, eager):
    econ, policy, value, (k0, eps, K, z) = world
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = dk.compile_kernels("torchscript")
    p, v = dk.unpack(policy), dk.unpack(value)
    x, dx = torch.randn(16, 5, dtype=F64), torch.randn(16, 5, dtype=F64)
    path = dk.roll_out(p, k0, eps, K, z, econ)
    same = torch.rand((7, 16), dtype=F64)
    arguments = {
        "network_capital": (p, k0, eps[0], K[0], z[0], econ), "network_value": (v, k0, eps[0], K[0], z[0], econ),
        "roll_out": (p, k0, eps, K, z, econ), "consumption_and_slope": (p, k0, eps[0], K[0], z[0], econ),
        "next_value_surprise": (v, path, eps, K, z, econ),
        "costates": (1 + same, same, 1 + same, same[0], same[1], same, same, econ),
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
    """The step by plain linear algebra: damping and the mean squared residual of n states, of the mean diagonal."""
    A = J.T @ J
    damped = A + (damping + residual.square().sum() / n) * A.diagonal().mean() * torch.eye(len(A), dtype=F64)
    return torch.linalg.solve(damped, J.T @ residual)


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


def test_gauss_newton_refuses_a_bad_step(linear_problem):
    """Uphill (the Jacobian's sign wrong), and into NaN: theta stays, the damping rises until the step is tiny."""
    J, residual, loss, theta = linear_problem
    for jacobian, judged in ((-J, loss), (J, lambda theta: loss(theta) * math.nan)):
        damping = torch.tensor(1e-3, dtype=F64)
        new, after, taken = dk.gauss_newton_step(theta, rows(jacobian, residual, theta), 30,
                                                 torch.tensor(1.0, dtype=F64), damping, 1e-4, judged)
        assert not taken and torch.equal(new, theta) and after > 5 * damping


def test_value_step_is_least_squares_on_levels_and_slopes(world, eager):
    """The step of value_step against one from an autograd Jacobian of all residuals."""
    econ, _, value, _ = world
    cfg = config(slope_weight=0.75, level_weight=0.5, unemployed_weight=4.0)
    batch = dk.Batch(*[x.flatten() for x in batch_of(world, eager, control_variate=True)])
    rate, damping = torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=F64)
    u_prime, scale = dk.marginal_utility(batch.c, econ), dk.value_scale(econ)

    def residuals(theta):
        V, V_k = dk.network_value(dk.unpack(theta), batch.k, batch.eps, batch.K, batch.z, econ)
        weight = 2.0 - batch.eps  # the square root of the weight
        return torch.cat([0.5 * weight * (batch.U - V) / scale, 0.75 * weight * (batch.lam - V_k) / u_prime])

    J = -torch.autograd.functional.jacobian(residuals, value)
    expected = value + rate * levenberg_marquardt(J, residuals(value), damping, batch.k.numel())
    new, _, taken = dk.value_step(value, rate, damping, batch, econ, cfg, eager)
    assert taken and residuals(new).square().sum() < residuals(value).square().sum()
    assert torch.allclose(new, expected, rtol=1e-8, atol=1e-10)


def test_policy_step_moves_log_c_by_its_newton_step(world, eager):
    """Where the limit binds and the household would rather eat more, nothing pulls; elsewhere log c goes towards
    log c + (1 - beta lambda' / u'(c)) / gamma."""
    econ, policy, _, _ = world
    batch = dk.Batch(*[x.flatten() for x in batch_of(world, eager, control_variate=True)])
    m, _ = dk.cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    x = dk.features(batch.k, batch.eps, m, batch.K, batch.z, econ)
    f = dk.network(dk.unpack(policy), x)
    wish = ((1 - econ.beta * batch.lam_next * batch.c**econ.gamma) / econ.gamma).clamp(-0.5, 0.5)
    free = ~((batch.c >= m) & (wish >= 0))
    assert free.any() and not free.all() and (free & (batch.c >= m)).any()
    weight = 2.0 - batch.eps[free]
    J = torch.func.jacrev(lambda theta: dk.network(dk.unpack(theta), x))(policy)[free] * weight.unsqueeze(1)
    rate, damping = torch.tensor(0.2, dtype=F64), torch.tensor(0.1, dtype=F64)
    expected = policy + rate * levenberg_marquardt(J, weight * wish[free], damping, len(wish))
    new, _, taken = dk.policy_step(policy, rate, damping, batch, econ, config(unemployed_weight=4.0), eager)
    assert taken and torch.allclose(new, expected, rtol=1e-8, atol=1e-10)
    moved = dk.network(dk.unpack(new), x)[free] - f[free]
    assert torch.dot(weight * moved, weight * wish[free]) > 0


def test_thin_keeps_the_first_half(world, eager):
    batch = batch_of(world, eager, control_variate=False)
    thinned = dk.thin(batch, config(horizon=7, stride=2))
    assert torch.equal(thinned.k, torch.cat([batch.k[0], batch.k[2]]))
    assert torch.equal(thinned.lam_next, torch.cat([batch.lam_next[0], batch.lam_next[2]]))
