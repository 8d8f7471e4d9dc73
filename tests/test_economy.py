"""Budget, shocks and exact expectations, each by two routes."""

import numpy as np
import pytest
import torch

import deepham_ks as dk

# Den Haan, Judd & Juillard (2010): rows and columns (bad, u), (bad, e), (good, u), (good, e); rounded to 1e-6
PUBLISHED = np.array([[0.525, 0.35, 0.03125, 0.09375], [0.038889, 0.836111, 0.002083, 0.122917],
                      [0.09375, 0.03125, 0.291667, 0.583333], [0.009115, 0.115885, 0.024306, 0.850694]])
UNEMPLOYMENT = np.array([0.10, 0.04])


def transition(econ) -> np.ndarray:
    return np.asarray(econ.P).reshape(4, 4)


def stationary(P: np.ndarray) -> np.ndarray:
    """The left eigenvector of eigenvalue 1."""
    values, vectors = np.linalg.eig(P.T)
    vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return vector / vector.sum()


def panel_at_unemployment(z: int, N: int = 1000):
    """k (N,) of a dispersed cross-section and eps with exactly the unemployment rate of z."""
    k = torch.linspace(0, 120, N, dtype=torch.float64)
    eps = (torch.arange(N) * 7919 % N >= N * UNEMPLOYMENT[z]).long()  # the unemployed are spread over k
    return k, eps, torch.full((N,), z)


@pytest.mark.parametrize("z", [0, 1])
def test_budget_closes(econ, z):
    """Y = (R - 1 + delta) K + w L, and what households have together is (1 - delta) K + Y."""
    k, eps, z = panel_at_unemployment(z)
    K = k.mean().expand_as(k)
    R, w = dk.prices(K, z, econ)
    Y = dk.output(K, z, econ)
    assert torch.allclose(Y, (R - 1 + econ.delta) * K + w * econ.L[z], rtol=1e-13)
    m, R_again = dk.cash_on_hand(k, eps, K, z, econ)
    assert torch.equal(R, R_again)
    assert float(m.mean()) == pytest.approx(float((1 - econ.delta) * K[0] + Y[0]), rel=1e-12)


@pytest.mark.parametrize("z", [0, 1])
def test_prices_are_marginal_products(econ, z):
    K = torch.tensor(39.0, dtype=torch.float64, requires_grad=True)
    L = econ.L[z].clone().requires_grad_()
    Z = (0.99, 1.01)[z]
    Y = Z * K**0.36 * L**0.64
    R, w = dk.prices(K, torch.tensor(z), econ)
    Y_K, Y_L = torch.autograd.grad(Y, (K, L))
    assert dk.output(K, torch.tensor(z), econ).item() == pytest.approx(Y.item(), rel=1e-13)
    assert R.item() == pytest.approx(1 - 0.025 + Y_K.item(), rel=1e-13)
    assert w.item() == pytest.approx(Y_L.item(), rel=1e-13)


@pytest.mark.parametrize("z", [0, 1])
def test_benefits_equal_taxes(econ, z):
    _, eps, zs = panel_at_unemployment(z)
    w = torch.full(eps.shape, 2.5, dtype=torch.float64)
    received = dk.income(eps, w, zs, econ)
    unemployed = eps == 0
    assert unemployed.double().mean() == pytest.approx(UNEMPLOYMENT[z])
    taxes = (w * econ.l_bar - received)[~unemployed].sum()
    assert received[unemployed].sum() == pytest.approx(float(taxes), rel=1e-12)
    assert torch.allclose(received[unemployed], 0.15 * w[unemployed], rtol=1e-14)


def test_transition_is_the_published_one(econ):
    P = transition(econ)
    assert np.abs(P - PUBLISHED).max() < 1e-6
    assert np.abs(P.sum(1) - 1).max() < 1e-15


def test_unemployment_depends_on_z_alone(econ):
    """From u(z) it goes to u(z') exactly, whatever z and z'."""
    for z in range(2):
        now = np.array([UNEMPLOYMENT[z], 1 - UNEMPLOYMENT[z]])
        joint = (now @ np.asarray(econ.P)[z].reshape(2, 4)).reshape(2, 2)  # (z', eps')
        assert joint[:, 0] / joint.sum(1) == pytest.approx(UNEMPLOYMENT, abs=1e-15)


def test_durations(econ):
    """Eight quarters in an aggregate state; 2.5 and 1.5 quarters of unemployment while z stays."""
    P = np.asarray(econ.P)
    assert 1 / (1 - P.sum(-1)[[0, 1], 1, [0, 1]]) == pytest.approx([8, 8])
    assert [1 / (1 - P[z, 0, z, 0] / P[z, 0, z].sum()) for z in (0, 1)] == pytest.approx([2.5, 1.5])


def test_stationary_probabilities(econ, rng):
    """Analytic, eigenvector, the initial panel, and a long simulation agree."""
    analytic = 0.5 * np.array([0.10, 0.90, 0.04, 0.96])
    assert stationary(transition(econ)) == pytest.approx(analytic, abs=1e-14)
    B, N, periods = 400, 100, 40
    panel = dk.initial_panel(B, N, econ, rng, torch.float64)

    def frequencies(eps, z):
        return torch.bincount((2 * z + eps).flatten(), minlength=4).numpy() / eps.numel()

    # z is one draw an economy: standard deviation 0.5 / sqrt(B) = 0.025 at one date, four of them allowed
    assert frequencies(panel.eps, panel.z) == pytest.approx(analytic, abs=0.1)
    pooled, rates = [], {0: [], 1: []}
    for _, eps, _, z, _ in dk.simulate(lambda k, eps, K, z: k, panel, periods, econ, rng):
        pooled.append(frequencies(eps, z))
        for state in (0, 1):
            rates[state].append((eps[z.squeeze(1) == state] == 0).double().mean().item())
    # correlation .75 a quarter: 40 dates are worth 40 / 7 of them, so the deviation is 0.025 / sqrt(5.7) = 0.0105
    assert np.mean(pooled, 0) == pytest.approx(analytic, abs=0.042)
    # given z, 20,000 households at a date, correlation .4 at most: deviation of the mean below 0.3 / sqrt(340,000)
    assert np.mean(rates[0]) == pytest.approx(0.10, abs=0.0025)
    assert np.mean(rates[1]) == pytest.approx(0.04, abs=0.0025)


def test_initial_panel_is_dispersed(econ, rng):
    """Gamma with mean near 39 and standard deviation near 18; in each z the right unemployment."""
    panel = dk.initial_panel(50, 2000, econ, rng)
    assert panel.k.shape == panel.eps.shape == (50, 2000) and panel.z.shape == (50, 1)
    assert panel.k.mean() == pytest.approx(39, abs=0.6)  # deviation 18 / sqrt(100,000) = 0.06; 39 and 18 are rounded
    assert panel.k.std() == pytest.approx(18, abs=0.6)
    for z in (0, 1):
        at = panel.z.squeeze(1) == z
        share = 1 - panel.eps[at].double().mean().item()
        assert share == pytest.approx(UNEMPLOYMENT[z], abs=4 * 0.3 / (2000 * int(at.sum())) ** 0.5)


def test_simulate_moves_the_panel(econ, rng):
    """Each period starts from the k' of the one before; K is the mean over the economy; shocks do not depend on the
    policy."""
    panel = dk.initial_panel(3, 20, econ, torch.Generator().manual_seed(1), torch.float64)
    seen = []
    for factor in (0.9, 0.5):
        path = list(dk.simulate(lambda k, eps, K, z, f=factor: f * k + eps, panel, 6, econ,
                                torch.Generator().manual_seed(2)))
        assert len(path) == 6 and torch.equal(path[0][0], panel.k)
        for now, then in zip(path, path[1:]):
            assert torch.equal(then[0], now[4]) and torch.equal(now[4], factor * now[0] + now[1])
            assert torch.allclose(now[2], now[0].mean(1, keepdim=True))
        seen.append(torch.stack([2 * z + eps for _, eps, _, z, _ in path]))
    assert torch.equal(*seen) and (seen[0][1:] != seen[0][:-1]).any()


def test_expected_equals_loops(econ, rng):
    """Every state at once against four nested loops over the published order."""
    n = 24
    eps, z = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    k_next, K_next = 40 * torch.rand(n, generator=rng).double(), 30 + 10 * torch.rand(n, generator=rng).double()

    def g(k, eps, K, z):
        eps, z = torch.as_tensor(eps).double(), torch.as_tensor(z).double()
        return (1 + k) ** (0.3 + 0.2 * eps) * K ** (0.1 + 0.4 * z) + 3 * eps * z

    exact = dk.expected(g(*dk.successors(k_next, K_next)), eps, z, econ)
    P = transition(econ)
    for i in range(n):
        total = 0.0
        for z_next in range(2):
            for eps_next in range(2):
                p = P[2 * int(z[i]) + int(eps[i]), 2 * z_next + eps_next]
                total += p * float(g(k_next[i], eps_next, K_next[i], z_next))
        assert float(exact[i]) == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("z", [0, 1])
@pytest.mark.parametrize("eps", [0, 1])
def test_expected_equals_monte_carlo(econ, rng, z, eps):
    """The sampler and the exact sum know the same transition."""
    n = 400_000
    weights = torch.tensor([1.0, -2.0, 3.0, 7.0], dtype=torch.float64)  # a value of (z', eps') each
    z_now, eps_now = torch.full((n,), z), torch.full((n,), eps)
    z_next = dk.draw_z(torch.rand(n, generator=rng), z_now, econ)
    eps_next = dk.draw_eps(torch.rand(n, generator=rng), z_now, z_next, eps_now, econ)
    drawn = weights[2 * z_next + eps_next]
    one = torch.zeros(1, dtype=torch.float64)
    _, eps1, _, z1 = dk.successors(one, one)
    exact = dk.expected(weights[2 * z1 + eps1], torch.tensor([eps]), torch.tensor([z]), econ).item()
    assert drawn.mean().item() == pytest.approx(exact, abs=4.5 * drawn.std().item() / n**0.5)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 0.5])
def test_marginal_utility_is_the_derivative(gamma):
    econ = dk.build_economy(dk.Calibration(gamma=gamma), dtype=torch.float64)
    c = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    u = dk.utility(c, econ)
    (slope,) = torch.autograd.grad(u.sum(), c)
    assert torch.allclose(slope, dk.marginal_utility(c, econ), rtol=1e-13)
    assert torch.allclose(-c * torch.autograd.functional.hessian(lambda c: dk.utility(c, econ).sum(), c).diagonal()
                          / slope, torch.full_like(c, gamma))


def test_steady_state():
    """beta R = 1 there at mean TFP and labour, consumption keeps K constant; the scalings follow the calibration."""
    for cal in (dk.Calibration(), dk.Calibration(beta=0.97, gamma=2.0, delta=0.05, u_good=0.05)):
        econ = dk.build_economy(cal)
        L = cal.l_bar * (1 - (cal.u_bad + cal.u_good) / 2)
        Y = econ.K_ss**cal.alpha * L ** (1 - cal.alpha)
        assert cal.beta * (1 - cal.delta + cal.alpha * Y / econ.K_ss) == pytest.approx(1, rel=1e-12)
        assert econ.c_ss == pytest.approx(Y - cal.delta * econ.K_ss, rel=1e-12)
        assert econ.m_ss == pytest.approx(econ.K_ss + econ.c_ss, rel=1e-12)
        u = float(dk.utility(torch.tensor(econ.c_ss, dtype=torch.float64), econ))
        assert econ.V_ss == pytest.approx(u / (1 - cal.beta), rel=1e-12)
