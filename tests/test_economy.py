"""Tables and their checks, budget, shocks and exact expectations, each by two routes."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import ahead_of, dk

# Den Haan, Judd & Juillard (2010): rows and columns (bad, u), (bad, e), (good, u), (good, e); rounded to 1e-6
PUBLISHED = np.array([[0.525, 0.35, 0.03125, 0.09375], [0.038889, 0.836111, 0.002083, 0.122917],
                      [0.09375, 0.03125, 0.291667, 0.583333], [0.009115, 0.115885, 0.024306, 0.850694]])
UNEMPLOYMENT = np.array([0.10, 0.04])
F64 = torch.float64


def sizes(economy):
    return economy.arrays.income.shape


def transition(economy) -> np.ndarray:
    """P((z', s') | (z, s)) by loops over the tables."""
    Z, S = sizes(economy)
    P_z, Pi = economy.arrays.P_z, economy.arrays.Pi
    P = np.empty((Z, S, Z, S))
    for z, s, z_next, s_next in np.ndindex(P.shape):
        P[z, s, z_next, s_next] = P_z[z, z_next] * Pi[z, z_next, s, s_next]
    return P.reshape(Z * S, Z * S)


def stationary(P: np.ndarray) -> np.ndarray:
    """The left eigenvector of eigenvalue 1."""
    values, vectors = np.linalg.eig(P.T)
    vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return vector / vector.sum()


def given_z(economy) -> np.ndarray:
    """Shares of s given z, (Z, S)."""
    return economy.arrays.shares / economy.arrays.shares.sum(1, keepdims=True)


def every_state(economy):
    """s and z at every (z, s), each (Z S,)."""
    Z, S = sizes(economy)
    return torch.arange(S).repeat(Z), torch.arange(Z).repeat_interleave(S)


def stays(at, weight):
    """A policy: everybody keeps what they have."""
    return at.k


# ------------------------------------------------------------------------------------------------ budget


def test_budget_closes(economy, tables):
    """Y = (R - 1 + delta) K + w L, and what households have together is (1 - delta) K + Y where s is at its shares."""
    Z, S = sizes(economy)
    one_k = torch.linspace(economy.k_min, 3 * economy.K_ss, 500, dtype=F64)
    k, s = one_k.repeat(S), torch.arange(S).repeat_interleave(500)
    for z in range(Z):
        K = one_k.mean().expand_as(k)
        at = dk.place(k, s, K, torch.full_like(s, z), tables)
        (R, w), Y = dk.prices(at, tables), dk.output(at, tables)
        assert torch.allclose(Y, (R - 1 + economy.delta) * K + w * economy.arrays.L[z], rtol=1e-13)
        m, R_again = dk.cash_on_hand(at, tables)
        assert torch.equal(R, R_again)
        share = torch.tensor(given_z(economy)[z] / 500)[s]
        assert float(share @ m) == pytest.approx(float((1 - economy.delta) * K[0] + Y[0]), rel=1e-12)


def test_prices_are_marginal_products(economy, tables):
    for z in range(sizes(economy)[0]):
        K = torch.tensor(1.2 * economy.K_ss, dtype=F64, requires_grad=True)
        L = tables.L[z].clone().requires_grad_()
        Y = economy.TFP[z] * K**economy.alpha * L ** (1 - economy.alpha)
        at = dk.place(K, torch.tensor(0), K, torch.tensor(z), tables)
        R, w = dk.prices(at, tables)
        Y_K, Y_L = torch.autograd.grad(Y, (K, L))
        assert dk.output(at, tables).item() == pytest.approx(Y.item(), rel=1e-13)
        assert R.item() == pytest.approx(1 - economy.delta + Y_K.item(), rel=1e-13)
        assert w.item() == pytest.approx(Y_L.item(), rel=1e-13)


@pytest.mark.parametrize("z", [0, 1])
def test_benefits_equal_taxes(econ, z):
    """The default economy: mu of the wage goes to the unemployed, and a tax on the employed pays exactly that."""
    u, w, l_bar = UNEMPLOYMENT[z], 2.5, 1 / 0.9
    received = w * econ.income.reshape(2, 2)[z].numpy()
    assert received[0] == pytest.approx(0.15 * w, rel=1e-14)
    assert u * received[0] == pytest.approx((1 - u) * (w * l_bar - received[1]), rel=1e-12)
    assert econ.L[z] == pytest.approx(l_bar * (1 - u), rel=1e-14)


# ------------------------------------------------------------------------------------------------ Krusell & Smith


def test_transition_is_the_published_one():
    P = transition(dk.krusell_smith())
    assert np.abs(P - PUBLISHED).max() < 1e-6
    assert np.abs(P.sum(1) - 1).max() < 1e-15


def test_unemployment_depends_on_z_alone():
    """From u(z) it goes to u(z') exactly, whatever z and z'."""
    economy = dk.krusell_smith()
    for z in range(2):
        now = np.array([UNEMPLOYMENT[z], 1 - UNEMPLOYMENT[z]])
        joint = (now @ economy.arrays.P[z].reshape(2, 4)).reshape(2, 2)  # (z', s')
        assert joint[:, 0] / joint.sum(1) == pytest.approx(UNEMPLOYMENT, abs=1e-15)


def test_durations():
    """Eight quarters in an aggregate state; 2.5 and 1.5 quarters of unemployment while z stays."""
    P = dk.krusell_smith().arrays.P
    assert 1 / (1 - P.sum(-1)[[0, 1], 1, [0, 1]]) == pytest.approx([8, 8])
    assert [1 / (1 - P[z, 0, z, 0] / P[z, 0, z].sum()) for z in (0, 1)] == pytest.approx([2.5, 1.5])


def test_default_tables_follow_the_calibration():
    cal = dk.Calibration(alpha=0.3, delta=0.03, gamma=2.0, beta=0.98, tfp_shock=0.02, z_duration=10.0, mu=0.2)
    economy = dk.krusell_smith(cal)
    assert (economy.alpha, economy.delta, economy.gamma, economy.k_min) == (0.3, 0.03, 2.0, 0.0)
    assert economy.arrays.TFP == pytest.approx([0.98, 1.02]) and economy.arrays.beta == pytest.approx([0.98, 0.98])
    assert economy.arrays.P_z == pytest.approx(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert economy.arrays.income[:, 0] == pytest.approx([0.2, 0.2])
    assert economy.arrays.shares == pytest.approx(np.array([[0.05, 0.45], [0.02, 0.48]]))


# ------------------------------------------------------------------------------------------------ tables


def test_chain_is_the_product_of_its_tables(economy):
    Z, S = sizes(economy)
    assert economy.arrays.P.reshape(Z * S, -1) == pytest.approx(transition(economy), abs=1e-15)
    assert np.abs(economy.arrays.P.sum((2, 3)) - 1).max() < 1e-14


def test_shares_are_stationary(economy):
    """The shares, filled in or given, are the eigenvector."""
    assert economy.arrays.shares.reshape(-1) == pytest.approx(stationary(transition(economy)), abs=1e-13)


def test_stationary_probabilities(economy, tables, rng):
    """Shares, the initial panel, and a long simulation agree."""
    B, N, periods = 400, 100, 40
    analytic, n = economy.arrays.shares.reshape(-1), economy.arrays.shares.size
    panel = dk.initial_panel(B, N, tables, economy.K_ss, rng)

    def frequencies(s, z):
        return torch.bincount((z * len(tables.beta) + s).flatten(), minlength=n).numpy() / s.numel()

    # z is one draw an economy: standard deviation 0.5 / sqrt(B) = 0.025 at one date, four of them allowed
    assert frequencies(panel.s, panel.z) == pytest.approx(analytic, abs=0.1)
    path = dk.simulate(stays, panel, periods, tables, rng)
    pooled = np.mean([frequencies(at.s, at.z) for _, at, _ in path], 0)
    # correlation r a period: T dates are worth T (1 - r) / (1 + r) of them
    r = np.sort(np.abs(np.linalg.eigvals(transition(economy))))[-2]
    assert pooled == pytest.approx(analytic, abs=4 * 0.025 * ((1 + r) / (1 - r) / periods) ** 0.5)


def test_unemployment_of_a_simulation(econ, rng):
    """In the default economy it is u(z) at every date, up to sampling noise."""
    panel, rates = dk.initial_panel(400, 100, econ, econ.K_ss, rng), {0: [], 1: []}
    for _, at, _ in dk.simulate(stays, panel, 40, econ, rng):
        for state in (0, 1):
            rates[state].append((at.s[at.z.squeeze(1) == state] == 0).double().mean().item())
    # given z, 20,000 households at a date, correlation .4 at most: deviation of the mean below 0.3 / sqrt(340,000)
    assert np.mean(rates[0]) == pytest.approx(0.10, abs=0.0025)
    assert np.mean(rates[1]) == pytest.approx(0.04, abs=0.0025)


def test_initial_panel_is_dispersed(economy, tables, rng):
    """k - k_min is gamma with mean K - k_min and half of it as standard deviation; in each z the right shares."""
    above = 1.3 * economy.K_ss - economy.k_min
    panel = dk.initial_panel(50, 2000, tables, 1.3 * economy.K_ss, rng)
    assert panel.k.shape == panel.s.shape == (50, 2000) and panel.z.shape == (50, 1)
    assert panel.k.min() >= economy.k_min
    assert panel.k.mean() - economy.k_min == pytest.approx(above, rel=0.01)  # deviation 0.5 / sqrt(100,000) = 0.0016
    assert panel.k.std() == pytest.approx(above / 2, rel=0.015)
    for z in panel.z.unique().tolist():
        at = panel.z.squeeze(1) == z
        n, share = 2000 * int(at.sum()), given_z(economy)[z]
        found = torch.bincount(panel.s[at].flatten(), minlength=len(share)).numpy() / n
        assert (np.abs(found - share) < 4.5 * (share * (1 - share) / n) ** 0.5).all()


def test_annuity(economy):
    """D = 1 + beta E D', and by summing the discounted chain."""
    a, P = economy.arrays, transition(economy)
    D, beta = a.annuity.reshape(-1), np.tile(a.beta, len(a.TFP))
    assert D == pytest.approx(1 + beta * (P @ D), rel=1e-12)
    term, total = np.ones(len(D)), np.zeros(len(D))
    while term.max() > 1e-12:
        total, term = total + term, beta * (P @ term)
    assert D == pytest.approx(total, rel=1e-9)


def test_steady_state(economies):
    """beta R = 1 there at mean TFP and labour, consumption keeps K constant; the scalings follow the calibration."""
    other = dk.krusell_smith(dk.Calibration(beta=0.97, gamma=2.0, delta=0.05, u_good=0.05))
    for economy in (*economies.values(), other):
        a = economy.arrays
        of_z, beta = a.shares.sum(1), a.shares.sum(0) @ a.beta
        L, TFP = of_z @ a.L, of_z @ a.TFP
        Y = TFP * economy.K_ss**economy.alpha * L ** (1 - economy.alpha)
        R = 1 - economy.delta + economy.alpha * Y / economy.K_ss
        assert beta * R == pytest.approx(1, rel=1e-12) and economy.R_ss == pytest.approx(R, rel=1e-12)
        assert economy.mean_beta == pytest.approx(beta, rel=1e-14)
        assert economy.w_ss == pytest.approx((1 - economy.alpha) * Y / L, rel=1e-12)
        assert economy.c_ss == pytest.approx(Y - economy.delta * economy.K_ss, rel=1e-12)
        assert (economy.tables().K_ss, economy.tables().c_ss) == (economy.K_ss, economy.c_ss)


def test_tables_of_float32_are_rounded(economy, tables):
    for name, wide, narrow in zip(dk.Tables._fields, tables, economy.tables(dtype=torch.float32)):
        if isinstance(wide, torch.Tensor) and wide.is_floating_point() and name != "Pi":
            assert narrow.dtype == torch.float32 and torch.equal(narrow, wide.to(torch.float32)), name
        else:
            assert narrow is wide or torch.equal(torch.as_tensor(narrow), torch.as_tensor(wide)), name


# ------------------------------------------------------------------------------------------------ shocks


def assert_drawn(found, p):
    """found (n,) counts are draws with probabilities p (n,); what is impossible never came."""
    deviation = (found.sum() * p * (1 - p)) ** 0.5
    assert (np.abs(found - found.sum() * p) <= 4.5 * deviation).all(), (found, found.sum() * p)


def assert_follows_the_chain(economy, s, z):
    """Every transition along paths s (T, B, N), z (T, B, 1) has its frequency; s and z may hold several paths."""
    Z, S = sizes(economy)
    rows, of_z, one = np.zeros((Z, Z, S, S)), np.zeros((Z, Z)), torch.ones_like(s[1:])
    np.add.at(rows, tuple((x * one).numpy().ravel() for x in (z[:-1], z[1:], s[:-1], s[1:])), 1)
    np.add.at(of_z, (z[:-1].numpy().ravel(), z[1:].numpy().ravel()), 1)
    for found, p in ((rows, economy.arrays.Pi), (of_z, economy.arrays.P_z)):
        for at in np.ndindex(found.shape[:-1]):
            assert_drawn(found[at], p[at])


def followed(u, s, z, z_next, tables):
    """s' of households in s that draw u (n,), while z goes to z_next."""
    return dk.draw_s(u, *[torch.full((len(u),), x) for x in (s, z, z_next)], tables)


def test_states_that_are_drawn_along_a_given_path(economy, tables, rng):
    """From every (z, z', s), those too that P_z never joins: an impulse response may force them."""
    n, (Z, S) = 20_000, sizes(economy)
    for z, z_next, s in np.ndindex(Z, Z, S):
        drawn = followed(torch.rand(n, generator=rng), s, z, z_next, tables)
        assert_drawn(torch.bincount(drawn, minlength=S).numpy(), economy.arrays.Pi[z, z_next, s])


def test_draws_at_the_ends_of_the_unit_interval(economy):
    """The least and the largest uniform number give a reachable state, in float32 too."""
    tables, (Z, S) = economy.tables(dtype=torch.float32), sizes(economy)
    for u in (torch.tensor([0.0]), torch.tensor([1 - 2.0**-24])):
        for z in range(Z):
            assert economy.arrays.P_z[z, int(dk.draw(u, tables.cum_z[[z]]))] > 0
            for z_next, s in np.ndindex(Z, S):
                assert economy.arrays.Pi[z, z_next, s, int(followed(u, s, z, z_next, tables))] > 0


# ------------------------------------------------------------------------------------------------ simulation


def test_simulate_moves_the_panel(economy, tables):
    """Each period starts from the k' of the one before; K is the mean over the economy; shocks do not depend on the
    policy."""
    panel = dk.initial_panel(3, 20, tables, economy.K_ss, torch.Generator().manual_seed(1))
    panel, seen = panel._replace(k=panel.k.double()), []
    for factor in (0.9, 0.5):
        def policy(at, weight, factor=factor):
            return factor * at.k + at.s + 0.1 * at.K + at.z

        path = list(dk.simulate(policy, panel, 6, tables, torch.Generator().manual_seed(2)))
        assert len(path) == 6 and path[0][0] is panel
        for (now, at, k_next), (then, *_) in zip(path, path[1:]):
            assert all(torch.equal(getattr(at, name), getattr(now, name)) for name in "ksz")
            assert torch.equal(then.k, k_next) and torch.equal(k_next, policy(at, None))
            assert torch.allclose(at.K, at.k.mean(1, keepdim=True))
        seen.append(torch.stack([at.z * len(tables.beta) + at.s for _, at, _ in path]))
    assert torch.equal(*seen) and (seen[0][1:] != seen[0][:-1]).any()


def test_a_simulation_follows_the_chain(economy, tables, rng):
    """Every transition has its frequency; one z' an economy."""
    panel = dk.initial_panel(60, 50, tables, economy.K_ss, rng)
    path = [at for _, at, _ in dk.simulate(stays, panel, 301, tables, rng)]
    assert_follows_the_chain(economy, *[torch.stack([getattr(at, name) for at in path]) for name in "sz"])


# ------------------------------------------------------------------------------------------------ infinitely many


ROUNDING = {torch.float32: 1e-5, F64: 1e-13}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_lottery_keeps_mass_mean_and_variance(econ, rng, dtype):
    """Of households anywhere between the nodes, on them and at both ends; beyond these they are put there."""
    nodes = dk.k_nodes(torch.linspace(0, 1, 80, dtype=dtype), torch.tensor(100.0, dtype=dtype), econ)
    assert nodes[0] == 0 and nodes[-1].item() == pytest.approx(100) and (nodes.diff() > 0).all()
    k = torch.cat([100 * torch.rand(3000, generator=rng, dtype=dtype) ** 2, nodes, nodes[[0, -1]]])
    first, share = dk.lottery(k, nodes)
    to = nodes[first + torch.arange(4).unsqueeze(1)]
    assert share.shape == (4, len(k)) and (to[0] <= k).all() and (k <= to[3]).all()
    assert torch.allclose(share.sum(0), torch.ones_like(k), rtol=ROUNDING[dtype], atol=0)
    assert torch.allclose((share * to).sum(0), k, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    variance = (share * (to - k) ** 2).sum(0) / (to[3] - to[0]) ** 2
    assert variance.abs().max() < ROUNDING[dtype]
    inside = (first > 0) & (first < 76)  # the two nodes next to k are the middle ones
    assert ((to[1] <= k) & (k <= to[2]))[inside].all()
    _, of_nodes = dk.lottery(nodes, nodes)
    assert torch.allclose(of_nodes.abs().amax(0), torch.ones_like(nodes), rtol=ROUNDING[dtype])
    assert (of_nodes != 0).sum() == 80
    first, beyond = dk.lottery(torch.tensor([-9.0, 150.0], dtype=dtype), nodes)
    ends = torch.eye(4, dtype=dtype)[[0, 3]]
    assert first.tolist() == [0, 76] and torch.allclose(beyond.T, ends, rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_what_is_spread_on_nodes_keeps_its_moments(econ, rng, dtype):
    """Total mass, mean and variance of a cross-section, in each of its rows."""
    nodes = dk.k_nodes(torch.linspace(0, 1, 80, dtype=dtype), torch.tensor(100.0, dtype=dtype), econ)
    k, weight = torch.rand(2, 3, 2, 500, generator=rng, dtype=dtype)
    k = 90 * k
    found = dk.spread(weight, k, nodes)
    assert found.shape == (3, 2, 80)
    for power in range(3):
        assert torch.allclose((found * nodes**power).sum(-1), (weight * k**power).sum(-1), rtol=10 * ROUNDING[dtype])


def saves(k_min):
    """A policy under which K is stable and the rich are always there."""
    def policy(at, weight):
        return k_min + 0.9 * (at.k - k_min) + (0.06 + 0.04 * at.s + 0.01 * at.z) * (at.K - k_min)

    return policy


def on_nodes(B, economy, tables, rng):
    """Cross-sections of infinitely many households in the precision of the tables."""
    panel = dk.initial_panel(B, 0, tables, economy.K_ss, rng)
    return panel._replace(k=panel.k.to(tables.TFP.dtype))


def nodes_of(panel, S):
    """(n,) nodes of k of a cross-section of infinitely many households, and its mass (S, n) in the first economy."""
    n = panel.k.shape[1] // S
    return panel.k[0, :n].double().numpy(), panel.weight[0].double().view(S, n).numpy() / (S * n)


def test_a_cross_section_of_infinitely_many(economy, tables, rng):
    """Weights have mean one; each s has its share given z; k is dispersed as in a panel."""
    S, K = sizes(economy)[1], 1.3 * economy.K_ss
    panel = dk.initial_panel(6, 0, tables, K, rng)
    assert panel.k.shape == panel.s.shape == panel.weight.shape == (6, S * dk.NODES)
    assert torch.allclose(panel.weight.mean(1), torch.ones(6, dtype=F64))
    share = torch.stack([dk.mean_over((panel.s == s).double(), panel.weight) for s in range(S)], 1)
    assert torch.allclose(share, torch.tensor(given_z(economy))[panel.z[:, 0]])
    mean = dk.mean_over(panel.k, panel.weight)
    std = dk.mean_over((panel.k - mean.unsqueeze(1)) ** 2, panel.weight).sqrt()
    assert mean.numpy() == pytest.approx(np.full(6, K), rel=0.005)
    assert std.numpy() == pytest.approx(np.full(6, (K - economy.k_min) / 2), rel=0.01)


def test_infinitely_many_households_move_as_they_save(economy, tables, rng):
    """Next period's K is the mean of k', the mean of k'^2 is theirs too, and s follows from z exactly."""
    S, Pi = sizes(economy)[1], torch.tensor(economy.arrays.Pi)
    path = list(dk.simulate(saves(economy.k_min), on_nodes(4, economy, tables, rng), 40, tables, rng))
    for (now, _, k_next), (then, at, _) in zip(path, path[1:]):
        assert torch.allclose(at.K[:, 0], dk.mean_over(k_next, now.weight), rtol=1e-10)
        assert torch.allclose(dk.mean_over(then.k**2, then.weight), dk.mean_over(k_next**2, now.weight), rtol=1e-10)
        share, share_next = [x.weight.view(4, S, -1).mean(2) / S for x in (now, then)]
        moved = torch.einsum("bi,bij->bj", share, Pi[now.z[:, 0], then.z[:, 0]])
        assert torch.allclose(share_next, moved, rtol=1e-10)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (F64, 1e-10)])
def test_infinitely_many_households_are_those_of_the_judges_histogram(economy, dtype, near):
    """On the same nodes, policy and path of z the two simulations have the same K."""
    tables, S, policy = economy.tables(dtype=dtype), sizes(economy)[1], saves(economy.k_min)
    rng = torch.Generator().manual_seed(3)
    panel = on_nodes(1, economy, tables, rng)
    path = [at for _, at, _ in dk.simulate(policy, panel, 60, tables, rng)]
    k, mass = nodes_of(panel, S)

    def table(mass, K, z):
        s, K, z = torch.arange(S).unsqueeze(1), torch.tensor([[K]]), torch.tensor([[z]])
        return policy(dk.place(torch.tensor(k).expand(S, -1), s, K, z, tables), None).numpy()

    z_path = np.array([at.z.item() for at in path])
    K_path, _ = dk.simulate_histogram(table, dk.Axes(k, None, economy.arrays.L[:, None]), mass, z_path, economy)
    assert [at.K.item() for at in path] == pytest.approx(K_path.tolist(), rel=near)
    assert np.ptp(K_path) > 0.005 * economy.K_ss


def test_infinitely_many_households_are_the_limit_of_many(economy, tables):
    """A panel of 100,000 under the same shocks has the same mean and spread of k, up to sampling noise."""
    N, found = 100_000, {}
    for n in (0, N):
        panel = dk.initial_panel(1, n, tables, economy.K_ss, torch.Generator().manual_seed(4))
        rng = torch.Generator().manual_seed(5)
        path = [(at, now.weight) for now, at, _ in dk.simulate(saves(economy.k_min), panel, 30, tables, rng)]
        found[n] = np.array([(at.z.item(), at.K.item(), dk.mean_over((at.k - at.K) ** 2, weight).sqrt().item())
                             for at, weight in path])
    (z, K, std), (z_panel, K_panel, std_panel) = found[0].T, found[N].T
    assert np.array_equal(z, z_panel)
    assert K_panel - economy.k_min == pytest.approx(K - economy.k_min, rel=0.006)  # .5 / sqrt(N) = .0016 at first
    assert std_panel == pytest.approx(std, rel=0.015)


def test_ends_of_a_cross_section():
    """Of households least and largest k; of nodes those of a thousandth of a thousandth or more, in any economy."""
    none, z = torch.zeros(2, 0), torch.zeros(2, 1, dtype=torch.long)
    k = torch.tensor([[3.0, 1.0, 2.0], [5.0, 9.0, 4.0]])
    assert dk.ends_of(dk.Panel(k, k.long(), none, z, none)).tolist() == [1, 9]
    k, s = torch.arange(5.0).repeat(2, 2), torch.arange(2).repeat_interleave(5).repeat(2, 1)
    weight = torch.tensor([[0, 0.3, 0.2, 0, 1e-9, -1e-3, 0, 0.5, 1e-4, 0], [1e-9, 0, 1, 0, 0, 0, 0, 1, 0, -1e-3]])
    assert dk.ends_of(dk.Panel(k, s, weight, z, none)).tolist() == [1, 3]
    weight[1, 0] = 0.1
    assert dk.ends_of(dk.Panel(k, s, weight, z, none)).tolist() == [0, 3]
    weight[0, 9] = 1e-3
    assert dk.ends_of(dk.Panel(k, s, weight, z, none)).tolist() == [0, 4]


# ------------------------------------------------------------------------------------------------ expectations


def test_successors_are_the_reachable_states(economy, tables):
    """By loops over the dense P: each list holds what has positive probability, once, and padding of probability 0."""
    Z, S = sizes(economy)
    P = transition(economy)
    assert tables.next_s.shape == tables.next_z.shape == tables.probability.shape
    assert tables.probability.shape[2] == (P > 0).sum(1).max()
    for z, s in np.ndindex(Z, S):
        row, listed = z * S + s, {}
        for j in range(tables.probability.shape[2]):
            at = int(tables.next_z[z, s, j]) * S + int(tables.next_s[z, s, j])
            p = float(tables.probability[z, s, j])
            if p > 0:
                assert at not in listed
                listed[at] = p
            assert P[row, at] > 0  # padding repeats a state that can come
        for at in range(Z * S):
            assert listed.get(at, 0) == pytest.approx(P[row, at], abs=1e-15)
        assert sum(listed.values()) == pytest.approx(1, abs=1e-14)


def test_expected_equals_loops(economy, tables, rng):
    """Every state at once against nested loops over the dense transition."""
    Z, S = sizes(economy)
    s, z = every_state(economy)
    k_next = economy.K_ss * torch.rand(len(s), generator=rng).double()
    K_next = economy.K_ss * (0.8 + 0.4 * torch.rand(len(s), generator=rng).double())

    def g(k, s, K, z):
        s, z = torch.as_tensor(s).double(), torch.as_tensor(z).double()
        return (1 + k) ** (0.3 + 0.2 * s) * K ** (0.1 + 0.4 * z) + 3 * s * z

    at = dk.place(k_next, s, K_next, z, tables)
    nexts = dk.successors(at, k_next, ahead_of(K_next, Z), tables)
    assert all(x.shape == (tables.probability.shape[2], len(s)) for x in nexts[:4])
    exact, P = dk.expected(g(*nexts[:4]), at, tables), transition(economy)
    for i in range(len(s)):
        total = 0.0
        for z_next in range(Z):
            for s_next in range(S):
                p = P[S * int(z[i]) + int(s[i]), S * z_next + s_next]
                total += p * float(g(k_next[i], s_next, K_next[i], z_next))
        assert float(exact[i]) == pytest.approx(total, rel=1e-13)


def test_successors_see_what_depends_on_z_next(economy, tables, rng):
    """Moments and Delta of next period are those of the z' that comes."""
    Z, S = sizes(economy)
    s, z = every_state(economy)
    K = torch.ones(len(s), dtype=F64)
    M, Delta = torch.rand(len(s), Z, 2, generator=rng).double(), torch.rand(len(s), Z, generator=rng).double()
    ahead = ahead_of(K, Z)._replace(M=M, Delta=Delta)
    nexts = dk.successors(dk.place(K, s, K, z, tables), K, ahead, tables)
    for j, i in np.ndindex(*nexts.z.shape):
        assert torch.equal(nexts.M[j, i], M[i, nexts.z[j, i]]) and nexts.Delta[j, i] == Delta[i, nexts.z[j, i]]


def test_successors_keep_the_shape(tables):
    """(T, M) states have successors (J, T, M), each of its own."""
    Z = len(tables.TFP)
    s, z = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    s[1, 2], k, K = 1, torch.arange(6.0, dtype=F64).view(2, 3), torch.arange(6.0, dtype=F64).view(2, 3) + 10
    at = dk.place(k, s, K, z, tables)
    nexts = dk.successors(at, k, ahead_of(K, Z), tables)
    for t, i in np.ndindex(2, 3):
        alone = dk.successors(dk.At(*[x[t, i] for x in at]), k[t, i], ahead_of(K[t, i], Z), tables)
        assert all(torch.equal(x[:, t, i], y) for x, y in zip(nexts[:4], alone[:4]))
    assert torch.allclose(dk.expected(nexts.k + nexts.K, at, tables), k + K)


def test_expected_equals_monte_carlo(economy, tables, rng):
    """The sampler and the exact sum know the same transition, from every state."""
    n, (Z, S) = 400_000, sizes(economy)
    weights = 7 * torch.rand(Z * S, generator=rng, dtype=F64) - 2  # a value of (z', s') each
    one = torch.zeros(1, dtype=F64)
    for z, s in np.ndindex(Z, S):
        k, s_now, z_now = torch.zeros(n, 1), torch.full((n, 1), s), torch.full((n, 1), z)
        panel = dk.Panel(k, s_now, k[:, :0], z_now, k[:, :0])
        (*_, (_, then, _)) = dk.simulate(stays, panel, 2, tables, rng)
        drawn = weights[S * then.z + then.s]
        at = dk.place(one, torch.tensor([s]), one, torch.tensor([z]), tables)
        nexts = dk.successors(at, one, ahead_of(one, Z), tables)
        exact = dk.expected(weights[S * nexts.z + nexts.s], at, tables).item()
        assert drawn.mean().item() == pytest.approx(exact, abs=4.5 * drawn.std().item() / n**0.5)


# ------------------------------------------------------------------------------------------------ utility


GAMMAS = [0.5, 1.0, 2.0, 3.0, 10.0]


def with_gamma(gamma):
    return dk.krusell_smith(dk.Calibration(gamma=gamma)).tables()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_marginal_utility_is_the_derivative(gamma):
    """Relative risk aversion is gamma; utility is of consumption in units of the steady state's."""
    econ = with_gamma(gamma)
    c = econ.c_ss * torch.tensor([0.1, 1.0, 3.0], dtype=F64)
    c.requires_grad_()
    u = dk.utility(c, econ)
    (slope,) = torch.autograd.grad(u.sum(), c)
    assert torch.allclose(slope, dk.marginal_utility(c, econ), rtol=1e-13)
    assert torch.allclose(-c * torch.autograd.functional.hessian(lambda c: dk.utility(c, econ).sum(), c).diagonal()
                          / slope, torch.full_like(c, gamma))
    assert u[1].item() == pytest.approx(0 if gamma == 1 else 1 / (1 - gamma), abs=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_inverse_utilities(gamma):
    econ = with_gamma(gamma)
    c = econ.c_ss * torch.logspace(-2, 2, 41, dtype=F64)
    for there, back in ((dk.utility, dk.inverse_utility), (dk.marginal_utility, dk.inverse_marginal_utility)):
        assert torch.allclose(back(there(c, econ), econ), c, rtol=1e-12), there.__name__


@pytest.mark.parametrize("gamma", GAMMAS)
def test_consumption_equivalent(economies, gamma):
    """g -> V -> g, dV/dg by autograd, and g = 0 where life is worth c_ss for ever."""
    for economy in economies.values():
        tables = dataclasses.replace(economy, gamma=gamma).tables()
        s, z = [x.repeat_interleave(31) for x in every_state(economy)]
        at = dk.place(torch.ones(len(s), dtype=F64), s, torch.ones(len(s), dtype=F64), z, tables)
        g = torch.linspace(-15, 15, 31, dtype=F64).repeat(economy.arrays.shares.size).requires_grad_()
        V, V_g = dk.value_of(g, at, tables)
        assert torch.allclose(V_g, torch.autograd.grad(V.sum(), g)[0], rtol=1e-12)
        assert torch.allclose(dk.equivalent_of(V, at, tables), g, rtol=1e-9, atol=1e-9)
        c_ss = torch.tensor(tables.c_ss, dtype=F64)
        for_ever = torch.tensor(economy.arrays.annuity)[z, s] * dk.utility(c_ss, tables)
        assert torch.allclose(V[g == 0], for_ever[g == 0], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ checks of an economy


def refused(economy, **changes) -> str:
    """The one line with which the economy with other tables is refused."""
    with pytest.raises(dk.UserError) as error, np.errstate(all="ignore"):
        dataclasses.replace(economy, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def toy(economies):
    return economies["toy"]


def altered(table, *index, by):
    """A copy of table with one number changed."""
    table = np.array(table, float)
    table[index] = by
    return table


@pytest.mark.parametrize("name, shape", [("TFP", (2, 3)), ("P_z", (2, 2)), ("P_z", (3, 2)), ("Pi", (2, 2)),
                                         ("Pi", (2, 3, 3, 3)), ("beta", (2,)), ("beta", (3, 3)), ("income", (2, 3)),
                                         ("weight", (2,)), ("L", (2,)), ("shares", (2, 3)), ("sees_s", (2, 2)),
                                         ("sees_s", (3, 1, 1)), ("group", (2,)),
                                         ("k_min", (3,))])
def test_wrong_shape(toy, name, shape):
    assert refused(toy, **{name: np.full(shape, 0.5)}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["P_z", "Pi", "beta", "TFP", "income", "sees_s"])
def test_no_table_of_numbers(toy, name):
    assert name in refused(toy, **{name: "none"})


@pytest.mark.parametrize("name", ["Pi", "beta", "income"])
def test_rows_of_unequal_length(toy, name):
    assert refused(toy, **{name: [[0.5, 0.5, 0.5], [0.5]]}).startswith(f"{name}: ")


def test_wrong_number_of_names(toy):
    assert refused(toy, s_names=("poor", "rich")).startswith("s_names: ")
    assert refused(toy, z_names=("bad", "good")).startswith("z_names: ")


@pytest.mark.parametrize("name, index", [("P_z", (0, 0)), ("P_z", (2, 1)), ("Pi", (0, 0, 1, 1)), ("Pi", (2, 2, 1, 2))])
def test_rows_sum_to_one(toy, name, index):
    """What is off by more than rounding is refused with its size."""
    table = getattr(toy.arrays, name)
    for change in (1e-3, -1e-3, 0.1):
        told = refused(toy, **{name: altered(table, *index, by=table[index] + change)})
        assert told.startswith(f"{name}: ") and f"misses by {change:.3g}" in told


@pytest.mark.parametrize("name, row", [("P_z", (1,)), ("Pi", (1, 2, 1))])
def test_negative_probability(toy, name, row):
    told = refused(toy, **{name: altered(getattr(toy.arrays, name), *row, by=[-0.2, 0.7, 0.5])})
    assert told.startswith(f"{name}: ") and "-0.2" in told


@pytest.mark.parametrize("name, index", [("TFP", (1,)), ("P_z", (1, 1)), ("Pi", (0, 0, 1, 1)), ("beta", (2,)),
                                         ("income", (0, 2)), ("weight", (0,)), ("L", (1,)), ("shares", (1, 1)),
                                         ("sees_s", (0, 0)), ("alpha", ()), ("delta", ()),
                                         ("gamma", ()), ("k_min", ())])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_are_finite(toy, name, index, value):
    table = getattr(toy.arrays, name)
    told = refused(toy, **{name: altered(table, *index, by=value) if index else value})
    assert told.startswith(f"{name}: ")


@pytest.mark.parametrize("name, index, value", [("TFP", (0,), 0), ("TFP", (0,), -1), ("beta", (1,), 0),
                                                ("weight", (1,), 0), ("income", (0, 0), -0.1), ("L", (1,), 0)])
def test_signs(toy, name, index, value):
    assert refused(toy, **{name: altered(getattr(toy.arrays, name), *index, by=value)}).startswith(f"{name}: ")


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"alpha": 1.0}, {"delta": 0.0}, {"delta": 1.1}, {"gamma": 0.0},
                                     {"gamma": -1.0}, {"gamma": 1000.0}, {"k_min": 4.0}], ids=str)
def test_intervals(toy, changes):
    assert refused(toy, **changes).startswith(f"{next(iter(changes))}: ")


def test_discounted_chain_must_not_grow(toy):
    """A state with beta above one is allowed where it soon ends, not where discounted utility has no bound: by the
    spectral radius, whether mean beta is above one or not."""
    assert refused(toy, beta=1.01).startswith("beta: ")
    stay = np.array([[0.999, 0.001, 0.0], [0.0005, 0.999, 0.0005], [0.0, 0.001, 0.999]])
    patient = [0.9, 0.9, 1.01]
    economy = dataclasses.replace(toy, Pi=stay)
    assert economy.arrays.shares.sum(0) @ patient < 1
    assert refused(economy, beta=patient).startswith("beta: ")
    soon = dataclasses.replace(toy, beta=patient)
    growth, annuity = np.tile(patient, 3)[:, None] * transition(soon), soon.arrays.annuity
    assert np.abs(np.linalg.eigvals(growth)).max() < 1 and np.isfinite(annuity).all() and (annuity > 1).all()


def test_chain_that_is_not_ergodic_needs_shares(toy):
    """Permanent groups: refused without shares, accepted with shares that stay, refused with others."""
    groups = np.eye(3)
    told = refused(toy, Pi=groups)
    assert told.startswith("P_z, Pi: ") and "shares" in told
    shares = stationary(toy.arrays.P_z)[:, None] * np.array([0.2, 0.5, 0.3])
    economy = dataclasses.replace(toy, Pi=groups, shares=shares)
    assert economy.arrays.shares == pytest.approx(shares)
    assert economy.mean_beta == pytest.approx(shares.sum(0) @ toy.beta)
    assert economy.arrays.L == pytest.approx(toy.arrays.income @ [0.2, 0.5, 0.3])
    assert refused(toy, Pi=groups, shares=np.full((3, 3), 1 / 9)).startswith("shares: ")
    assert refused(toy, P_z=np.eye(3)).startswith("P_z, Pi: ")
    swinging = dk.krusell_smith(dk.Calibration(z_duration=1.0)).arrays  # a cycle has one stationary distribution
    assert swinging.shares.sum(1) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("S", [1, 3])
def test_states_that_never_change(toy, rng, S):
    """Households all alike, or in permanent groups: every state follows itself, whatever z does."""
    of_z = stationary(toy.arrays.P_z)
    economy = dataclasses.replace(toy, Pi=np.eye(S), shares=of_z[:, None] * np.full(S, 1 / S), weight=1.0,
                                  beta=toy.beta[:S], income=toy.arrays.income[:, -S:], s_names=())
    tables = economy.tables()
    panel = dk.initial_panel(4, 30, tables, economy.K_ss, rng)
    path = [at for _, at, _ in dk.simulate(stays, panel, 21, tables, rng)]
    assert all(torch.equal(at.s, panel.s) for at in path) and any((at.z != panel.z).any() for at in path)
    (s, z), one = every_state(economy), torch.zeros(3 * S, dtype=F64)
    assert (dk.successors(dk.place(one, s, one, z, tables), one, ahead_of(one, 3), tables).s == s).all()


def test_shares_must_be_stationary(toy):
    shares = toy.arrays.shares
    assert dataclasses.replace(toy, shares=shares).arrays.shares == pytest.approx(shares)
    for wrong in (shares.T, 2 * shares, shares + np.array([1e-3, -1e-3, 0])):
        assert refused(toy, shares=wrong).startswith("shares: ")
    assert refused(toy, shares=-shares).startswith("shares: ")


def test_states_that_the_networks_cannot_tell_apart(toy):
    """Equal inputs are refused where discount factor, income or transition differ, and allowed where nothing does."""
    assert refused(toy, sees_s=[[0.0], [1.0], [1.0]]).startswith("sees_s: ")
    # the last two alike in all: nothing of the economy depends on which of them it is
    alike = dict(beta=[0.9, 0.95, 0.95], income=[0.5, 1.0, 1.0], k_min=0.0, sees_s=[[0.0], [1.0], [1.0]],
                 Pi=[[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]])
    dataclasses.replace(toy, **alike)
    for name, index, value in (("beta", (2,), 0.94), ("income", (2,), 1.1), ("Pi", (2,), [0.2, 0.4, 0.4])):
        assert refused(toy, **alike | {name: altered(alike[name], *index, by=value)}).startswith("sees_s: "), name


def test_income_and_labour_must_fit(toy):
    """What households earn on average is the wage for each unit of labour, in every z."""
    L = toy.arrays.L
    for wrong in (L * 1.01, altered(L, 2, by=1.0)):
        told = refused(toy, L=wrong)
        assert told.startswith("income: ") and "L" in told
    told = refused(toy, L=L, income=altered(toy.income, 1, 1, by=1.2))
    assert told.startswith("income: ") and "z = 1" in told


def test_tables_broadcast_and_are_copied():
    """A number, a row, or lists do for a whole table; what is used is a copy, of full shape."""
    beta, Pi = np.array([0.95]), np.array([[0.9, 0.1], [0.2, 0.8]])
    economy = dk.Economy(alpha=0.3, delta=0.1, TFP=[0.9, 1.1], P_z=[[0.8, 0.2], [0.3, 0.7]], Pi=Pi, beta=beta,
                         income=[0.5, 1.5])
    a = economy.arrays
    assert a.beta.shape == (2,) and a.Pi.shape == (2, 2, 2, 2) and a.income.shape == (2, 2)
    assert a.shares.shape == (2, 2) and a.L.shape == a.TFP.shape == (2,) and a.P.shape == (2, 2, 2, 2)
    Pi[0], beta[0] = 7, 7
    assert a.Pi.max() == 0.9 and a.beta.max() == 0.95
    assert a.L == pytest.approx(a.income[0] @ np.array([2 / 3, 1 / 3]))
    assert np.array_equal(a.sees_s, np.eye(2))
    assert economy.tables().sees[:, 0].tolist() == [[1, 0, -1], [1, 0, 1]]  # s = 0, and z
    assert a.s_names == ("s = 0", "s = 1") and a.z_names == ("z = 0", "z = 1")
    assert a.weight.tolist() == [1, 1] and economy.gamma == 1 and economy.k_min == 0


def test_fields_stay_as_they_were_given(economy):
    """dataclasses.replace() with nothing changed is the same economy, bit for bit; with a table changed, what follows
    from it is new."""
    again = dataclasses.replace(economy)
    for name, x in vars(economy.arrays).items():
        assert np.array_equal(x, getattr(again.arrays, name)), name
    assert (again.K_ss, again.c_ss, again.R_ss, again.w_ss) == (economy.K_ss, economy.c_ss, economy.R_ss, economy.w_ss)
    for name in ("TFP", "P_z", "Pi", "beta", "income"):
        assert getattr(again, name) is getattr(economy, name)


@pytest.mark.parametrize("name, value", [("TFP", [0.9, 1.0, 1.2]), ("beta", 0.93), ("income", [0.5, 1.0, 2.0]),
                                         ("P_z", np.full((3, 3), 1 / 3)), ("Pi", np.full((3, 3), 1 / 3))])
def test_replacing_a_table_is_making_the_economy_anew(toy, name, value):
    given = {f.name: getattr(toy, f.name) for f in dataclasses.fields(toy)}
    replaced, made = dataclasses.replace(toy, **{name: value}), dk.Economy(**given | {name: value})
    assert all(np.array_equal(x, getattr(made.arrays, key)) for key, x in vars(replaced.arrays).items())
    assert replaced.K_ss == made.K_ss and any(
        not np.array_equal(getattr(toy.arrays, key), getattr(made.arrays, key)) for key in ("L", "shares", "annuity",
                                                                                            name))
