"""Tables and their checks, budget, shocks and exact expectations, each by two routes."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import deepham_ks as dk

# Den Haan, Judd & Juillard (2010): rows and columns (bad, u), (bad, e), (good, u), (good, e); rounded to 1e-6
PUBLISHED = np.array([[0.525, 0.35, 0.03125, 0.09375], [0.038889, 0.836111, 0.002083, 0.122917],
                      [0.09375, 0.03125, 0.291667, 0.583333], [0.009115, 0.115885, 0.024306, 0.850694]])
UNEMPLOYMENT = np.array([0.10, 0.04])
F64 = torch.float64


def sizes(economy):
    return economy.income.shape


def transition(economy) -> np.ndarray:
    """P((z', s') | (z, s)) by loops over the tables that were given."""
    Z, S = sizes(economy)
    P = np.empty((Z, S, Z, S))
    for z, s, z_next, s_next in np.ndindex(P.shape):
        P[z, s, z_next, s_next] = economy.P_z[z, z_next] * economy.Pi[z, z_next, s, s_next]
    return P.reshape(Z * S, Z * S)


def stationary(P: np.ndarray) -> np.ndarray:
    """The left eigenvector of eigenvalue 1."""
    values, vectors = np.linalg.eig(P.T)
    vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return vector / vector.sum()


def every_state(economy):
    """s and z at every (z, s), each (Z S,)."""
    Z, S = sizes(economy)
    return torch.arange(S).repeat(Z), torch.arange(Z).repeat_interleave(S)


# ------------------------------------------------------------------------------------------------ budget


def test_budget_closes(economy, tables):
    """Y = (R - 1 + delta) K + w L, and what households have together is (1 - delta) K + Y where s is at its shares."""
    Z, S = sizes(economy)
    one_k = torch.linspace(economy.k_min, 3 * economy.K_ss, 500, dtype=F64)
    k, s = one_k.repeat(S), torch.arange(S).repeat_interleave(500)
    for z in range(Z):
        at, K = torch.full_like(s, z), one_k.mean().expand_as(k)
        R, w = dk.prices(K, at, tables)
        Y = dk.output(K, at, tables)
        assert torch.allclose(Y, (R - 1 + economy.delta) * K + w * economy.L[z], rtol=1e-13)
        m, R_again = dk.cash_on_hand(k, s, K, at, tables)
        assert torch.equal(R, R_again)
        share = torch.tensor(economy.shares[z] / economy.shares[z].sum() / 500)[s]
        assert float(share @ m) == pytest.approx(float((1 - economy.delta) * K[0] + Y[0]), rel=1e-12)


def test_prices_are_marginal_products(economy, tables):
    for z in range(len(economy.TFP)):
        K = torch.tensor(1.2 * economy.K_ss, dtype=F64, requires_grad=True)
        L = tables.L[z].clone().requires_grad_()
        Y = economy.TFP[z] * K**economy.alpha * L ** (1 - economy.alpha)
        R, w = dk.prices(K, torch.tensor(z), tables)
        Y_K, Y_L = torch.autograd.grad(Y, (K, L))
        assert dk.output(K, torch.tensor(z), tables).item() == pytest.approx(Y.item(), rel=1e-13)
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
        joint = (now @ economy.P[z].reshape(2, 4)).reshape(2, 2)  # (z', s')
        assert joint[:, 0] / joint.sum(1) == pytest.approx(UNEMPLOYMENT, abs=1e-15)


def test_durations():
    """Eight quarters in an aggregate state; 2.5 and 1.5 quarters of unemployment while z stays."""
    P = dk.krusell_smith().P
    assert 1 / (1 - P.sum(-1)[[0, 1], 1, [0, 1]]) == pytest.approx([8, 8])
    assert [1 / (1 - P[z, 0, z, 0] / P[z, 0, z].sum()) for z in (0, 1)] == pytest.approx([2.5, 1.5])


def test_default_tables_follow_the_calibration():
    cal = dk.Calibration(alpha=0.3, delta=0.03, gamma=2.0, beta=0.98, tfp_shock=0.02, z_duration=10.0, mu=0.2)
    economy = dk.krusell_smith(cal)
    assert (economy.alpha, economy.delta, economy.gamma, economy.k_min) == (0.3, 0.03, 2.0, 0.0)
    assert economy.TFP == pytest.approx([0.98, 1.02]) and economy.beta == pytest.approx([0.98, 0.98])
    assert economy.P_z == pytest.approx(np.array([[0.9, 0.1], [0.1, 0.9]]))
    assert economy.income[:, 0] == pytest.approx([0.2, 0.2])
    assert economy.shares == pytest.approx(np.array([[0.05, 0.45], [0.02, 0.48]]))


# ------------------------------------------------------------------------------------------------ tables


def test_chain_is_the_product_of_its_tables(economy):
    Z, S = sizes(economy)
    assert economy.P.reshape(Z * S, -1) == pytest.approx(transition(economy), abs=1e-15)
    assert np.abs(economy.P.sum((2, 3)) - 1).max() < 1e-14


def test_shares_are_stationary(economy):
    """The shares, filled in or given, are the eigenvector."""
    assert economy.shares.reshape(-1) == pytest.approx(stationary(transition(economy)), abs=1e-13)


def test_stationary_probabilities(economy, tables, rng):
    """Shares, the initial panel, and a long simulation agree."""
    B, N, periods = 400, 100, 40
    analytic, n = economy.shares.reshape(-1), economy.shares.size
    panel = dk.initial_panel(B, N, tables, rng, F64)

    def frequencies(s, z):
        return torch.bincount(dk.joint(s, z, tables).flatten(), minlength=n).numpy() / s.numel()

    # z is one draw an economy: standard deviation 0.5 / sqrt(B) = 0.025 at one date, four of them allowed
    assert frequencies(panel.s, panel.z) == pytest.approx(analytic, abs=0.1)
    path = dk.simulate([lambda k, s, K, z: k], panel, periods, tables, rng)
    pooled = np.mean([frequencies(s, z) for s, z, _ in path], 0)
    # correlation r a period: T dates are worth T (1 - r) / (1 + r) of them
    r = np.sort(np.abs(np.linalg.eigvals(transition(economy))))[-2]
    assert pooled == pytest.approx(analytic, abs=4 * 0.025 * ((1 + r) / (1 - r) / periods) ** 0.5)


def test_unemployment_of_a_simulation(econ, rng):
    """In the default economy it is u(z) at every date, up to sampling noise."""
    panel, rates = dk.initial_panel(400, 100, econ, rng, F64), {0: [], 1: []}
    for s, z, _ in dk.simulate([lambda k, s, K, z: k], panel, 40, econ, rng):
        for state in (0, 1):
            rates[state].append((s[z.squeeze(1) == state] == 0).double().mean().item())
    # given z, 20,000 households at a date, correlation .4 at most: deviation of the mean below 0.3 / sqrt(340,000)
    assert np.mean(rates[0]) == pytest.approx(0.10, abs=0.0025)
    assert np.mean(rates[1]) == pytest.approx(0.04, abs=0.0025)


def test_initial_panel_is_dispersed(economy, tables, rng):
    """k - k_min is gamma with mean K_ss - k_min and half of it as standard deviation; in each z the right shares."""
    panel, above = dk.initial_panel(50, 2000, tables, rng), economy.K_ss - economy.k_min
    assert panel.k.shape == panel.s.shape == (50, 2000) and panel.z.shape == (50, 1)
    assert panel.k.min() >= economy.k_min
    assert panel.k.mean() - economy.k_min == pytest.approx(above, rel=0.01)  # deviation 0.5 / sqrt(100,000) = 0.0016
    assert panel.k.std() == pytest.approx(above / 2, rel=0.015)
    for z in panel.z.unique().tolist():
        at = panel.z.squeeze(1) == z
        found = torch.bincount(panel.s[at].flatten(), minlength=len(economy.beta)).numpy() / (2000 * int(at.sum()))
        share = economy.shares[z] / economy.shares[z].sum()
        assert (np.abs(found - share) < 4.5 * (share * (1 - share) / (2000 * int(at.sum()))) ** 0.5).all()


def test_annuity(economy):
    """D = 1 + beta E D', and by summing the discounted chain."""
    D, P, beta = economy.annuity.reshape(-1), transition(economy), np.tile(economy.beta, len(economy.TFP))
    assert D == pytest.approx(1 + beta * (P @ D), rel=1e-12)
    term, total = np.ones(len(D)), np.zeros(len(D))
    while term.max() > 1e-12:
        total, term = total + term, beta * (P @ term)
    assert D == pytest.approx(total, rel=1e-9)


def test_steady_state(economies):
    """beta R = 1 there at mean TFP and labour, consumption keeps K constant; the scalings follow the calibration."""
    other = dk.krusell_smith(dk.Calibration(beta=0.97, gamma=2.0, delta=0.05, u_good=0.05))
    for economy in (*economies.values(), other):
        of_z, beta = economy.shares.sum(1), economy.shares.sum(0) @ economy.beta
        L, TFP = of_z @ economy.L, of_z @ economy.TFP
        Y = TFP * economy.K_ss**economy.alpha * L ** (1 - economy.alpha)
        R = 1 - economy.delta + economy.alpha * Y / economy.K_ss
        assert beta * R == pytest.approx(1, rel=1e-12) and economy.R_ss == pytest.approx(R, rel=1e-12)
        assert economy.w_ss == pytest.approx((1 - economy.alpha) * Y / L, rel=1e-12)
        assert economy.c_ss == pytest.approx(Y - economy.delta * economy.K_ss, rel=1e-12)
        tables = economy.tables()
        assert (tables.K_ss, tables.c_ss, float(tables.K_mean)) == (economy.K_ss, economy.c_ss, economy.K_ss)


def test_tables_of_float32_are_rounded(economy, tables):
    for name, wide, narrow in zip(dk.Tables._fields, tables, economy.tables(dtype=torch.float32)):
        if isinstance(wide, torch.Tensor) and wide.is_floating_point():
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
    for found, p in ((rows, economy.Pi), (of_z, economy.P_z)):
        for at in np.ndindex(found.shape[:-1]):
            assert_drawn(found[at], p[at])


def test_draw_z_and_draw_s(economy, tables, rng):
    """From every (z, z', s), those too that P_z never joins."""
    n, (Z, S) = 20_000, sizes(economy)
    for z, z_next, s in np.ndindex(Z, Z, S):
        at = [torch.full((n,), i) for i in (z, z_next, s)]
        drawn = dk.draw_s(torch.rand(n, generator=rng), *at, tables)
        assert_drawn(torch.bincount(drawn, minlength=S).numpy(), economy.Pi[z, z_next, s])
    for z in range(Z):
        drawn = dk.draw_z(torch.rand(n, generator=rng), torch.full((n,), z), tables)
        assert_drawn(torch.bincount(drawn, minlength=Z).numpy(), economy.P_z[z])


def test_draws_at_the_ends_of_the_unit_interval(economy):
    """The least and the largest uniform number give a reachable state, in float32 too."""
    tables, (Z, S) = economy.tables(dtype=torch.float32), sizes(economy)
    for u in (0.0, 1 - 2.0**-24):
        for z in range(Z):
            z_next = int(dk.draw_z(torch.tensor([u]), torch.tensor([z]), tables))
            assert economy.P_z[z, z_next] > 0
            for s in range(S):
                args = [torch.tensor([x]) for x in (u, z, z_next, s)]
                assert economy.Pi[z, z_next, s, int(dk.draw_s(*args, tables))] > 0


@pytest.mark.parametrize("systematic", [False, True])
def test_draw_shocks(economy, tables, rng, systematic):
    """Paths start where they should, and every transition has its frequency; one z' an economy."""
    panel = dk.initial_panel(60, 50, tables, rng)
    s, z = dk.draw_shocks(panel.s, panel.z, 300, tables, rng, systematic)
    assert s.shape == (301, 60, 50) and z.shape == (301, 60, 1)
    assert torch.equal(s[0], panel.s) and torch.equal(z[0], panel.z)
    assert_follows_the_chain(economy, s, z)


def households_in(S):
    """s (4, 200) with every state, the first rare."""
    household = torch.arange(200)
    return torch.where(household % 13 == 0, 0, 1 + household % (S - 1)).expand(4, 200)


@pytest.mark.parametrize("S", [2, 3])
def test_spread_uniform_is_uniform_and_independent_over_time(S):
    rng, s = torch.Generator().manual_seed(0), households_in(S)
    assert len(s.unique()) == S
    draws = torch.stack([dk.spread_uniform(s, torch.rand(4, 1, generator=rng)) for _ in range(4000)])
    assert draws.shape == (4000, 4, 200) and 0 <= draws.min() and draws.max() < 1
    for household in (0, 1, 2, 13, 199):  # in every s
        series = draws[:, 2, household].numpy()
        assert scipy.stats.kstest(series, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(series[:-1], series[1:])[0, 1]) < 4 / np.sqrt(len(series))
    assert not torch.equal(draws[:, 0], draws[:, 1])  # each economy has a start of its own


@pytest.mark.parametrize("S", [2, 3])
def test_spread_uniform_is_even_in_each_state(S):
    """Below any threshold p lie n p of the n households of a state up to four, where chance strays by 0.5 sqrt(n)."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        s = torch.randint(S, (5, 3000), generator=rng)
        uniform = dk.spread_uniform(s, torch.rand(5, 1, generator=rng))
        for economy in range(5):
            for state in range(S):
                drawn = uniform[economy, s[economy] == state].sort().values
                below = torch.arange(len(drawn), dtype=F64)
                assert (drawn * len(drawn) - below).abs().max() < 4
    by_chance = torch.rand(1000, generator=rng).sort().values * 1000
    assert (by_chance - torch.arange(1000)).abs().max() > 4


def test_systematic_shocks_hold_the_shares(economy, tables, rng):
    """Shares of s in an economy follow the chain given z, with a quarter of the noise of independent draws at most."""
    panel, strays = dk.initial_panel(8, 1000, tables, rng), {}
    Pi, S = torch.tensor(economy.Pi), len(economy.beta)
    for systematic in (False, True):
        s, z = dk.draw_shocks(panel.s, panel.z, 200, tables, rng, systematic)
        share = torch.nn.functional.one_hot(s, S).double().mean(2)  # (T, B, S)
        expected = torch.einsum("tbi,tbij->tbj", share[:-1], Pi[z[:-1, :, 0], z[1:, :, 0]])
        strays[systematic] = share[1:] - expected
        assert strays[systematic].mean((0, 1)).abs().max() < 5e-4
    assert strays[True].std() < strays[False].std() / 4


def test_systematic_shocks_hold_the_unemployment_rate(econ):
    """The default economy's does not drift from u(z) over 300 periods."""
    rng, u = torch.Generator().manual_seed(1), torch.tensor(UNEMPLOYMENT)
    panel, rates = dk.initial_panel(8, 1000, econ, rng), {}
    for systematic in (False, True):
        path = dk.simulate([lambda k, *_: k], panel, 300, econ, rng, systematic)
        rates[systematic] = torch.stack([((s == 0).double().mean(1) - u[z[:, 0]]) for s, z, _ in path][100:])
    assert abs(rates[True].mean()) < 5e-4
    assert rates[True].std() < rates[False].std() / 4  # binomial noise is .006 to .009


# ------------------------------------------------------------------------------------------------ simulation


def simulated(policies, panel, periods, tables, seed=2, **options):
    return list(dk.simulate(policies, panel, periods, tables, torch.Generator().manual_seed(seed), **options))


def test_simulate_moves_the_panel(economy, tables):
    """Each period starts from the k' of the one before; K is the mean over the economy; shocks do not depend on the
    policy."""
    panel = dk.initial_panel(3, 20, tables, torch.Generator().manual_seed(1), F64)
    seen = []
    for factor in (0.9, 0.5):
        path = simulated([lambda k, s, K, z, f=factor: f * k + s + 0.1 * K + z], panel, 6, tables)
        assert len(path) == 6
        assert all(torch.equal(a, b) for a, b in zip((path[0][2][0][0], path[0][0], path[0][1]), panel))
        for (s, z, [(k, K, k_next)]), (_, _, [(k_then, _, _)]) in zip(path, path[1:]):
            assert torch.equal(k_then, k_next) and torch.equal(k_next, factor * k + s + 0.1 * K + z)
            assert torch.allclose(K, k.mean(1, keepdim=True))
        seen.append(torch.stack([dk.joint(s, z, tables) for s, z, _ in path]))
    assert torch.equal(*seen) and (seen[0][1:] != seen[0][:-1]).any()


def test_two_policies_see_the_same_shocks(economy, tables):
    """Side by side each has the path that it has alone."""
    panel = dk.initial_panel(3, 20, tables, torch.Generator().manual_seed(1), F64)
    policies = [lambda k, s, K, z: 0.9 * k + s + z, lambda k, s, K, z: 0.5 * k + 0.2 * K + z]
    both = simulated(policies, panel, 8, tables, systematic=True)
    for i, policy in enumerate(policies):
        path = simulated([policy], panel, 8, tables, systematic=True)
        for (s, z, pair), (s_alone, z_alone, [alone]) in zip(both, path, strict=True):
            assert torch.equal(s, s_alone) and torch.equal(z, z_alone)
            assert all(torch.equal(a, b) for a, b in zip(pair[i], alone))
    assert not torch.equal(both[-1][2][0][0], both[-1][2][1][0])


@pytest.mark.parametrize("at_once", [1, 3 * 60 * 50])
def test_chunks_change_nothing(economy, tables, rng, monkeypatch, at_once):
    """Shocks drawn a period or three at a time: every transition, those between chunks too, has its frequency, and
    each period starts from the k' of the one before. 301 periods leave a chunk that is not full."""
    monkeypatch.setattr(dk, "AT_ONCE", at_once)
    panel = dk.initial_panel(60, 50, tables, rng)
    path = list(dk.simulate([lambda k, s, K, z: 0.9 * k + s], panel, 301, tables, rng))
    assert len(path) == 301 and torch.equal(path[0][0], panel.s) and torch.equal(path[0][1], panel.z)
    for (s, _, [(k, _, k_next)]), (_, _, [(k_then, _, _)]) in zip(path, path[1:]):
        assert torch.equal(k_next, k_then) and torch.equal(k_next, 0.9 * k + s)
    s, z = torch.stack([x[0] for x in path]), torch.stack([x[1] for x in path])
    assert_follows_the_chain(economy, s, z)
    first = torch.arange(2, 300, 3)  # from the last period of one chunk of three to the first of the next
    assert_follows_the_chain(economy, *[torch.stack([x[first], x[first + 1]]).flatten(1, 2) for x in (s, z)])


# ------------------------------------------------------------------------------------------------ expectations


def test_successors_are_the_reachable_states(economy, tables):
    """By loops over the dense P: each list holds what has positive probability, once, and padding of probability 0."""
    Z, S = sizes(economy)
    P = transition(economy)
    assert tables.next_s.shape == tables.next_z.shape == tables.probability.shape
    assert tables.probability.shape[1] == (P > 0).sum(1).max()
    for z, s in np.ndindex(Z, S):
        row, listed = z * S + s, {}
        assert int(dk.joint(torch.tensor(s), torch.tensor(z), tables)) == row
        for j in range(tables.probability.shape[1]):
            at = int(tables.next_z[row, j]) * S + int(tables.next_s[row, j])
            p = float(tables.probability[row, j])
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

    nexts = dk.successors(k_next, s, K_next, z, tables)
    assert all(x.shape == (tables.probability.shape[1], len(s)) for x in nexts)
    exact, P = dk.expected(g(*nexts), s, z, tables), transition(economy)
    for i in range(len(s)):
        total = 0.0
        for z_next in range(Z):
            for s_next in range(S):
                p = P[S * int(z[i]) + int(s[i]), S * z_next + s_next]
                total += p * float(g(k_next[i], s_next, K_next[i], z_next))
        assert float(exact[i]) == pytest.approx(total, rel=1e-13)


def test_successors_keep_the_shape(tables):
    """(T, M) states have successors (J, T, M), each of its own."""
    s, z = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    s[1, 2], k, K = 1, torch.arange(6.0, dtype=F64).view(2, 3), torch.arange(6.0, dtype=F64).view(2, 3) + 10
    k1, s1, K1, z1 = dk.successors(k, s, K, z, tables)
    for t, i in np.ndindex(2, 3):
        alone = dk.successors(k[t, i], s[t, i], K[t, i], z[t, i], tables)
        assert all(torch.equal(x[:, t, i], y) for x, y in zip((k1, s1, K1, z1), alone))
    assert torch.equal(dk.expected(k1 + K1, s, z, tables), dk.expected((k1 + K1).clone(), s, z, tables))
    assert torch.allclose(dk.expected(k1 + K1, s, z, tables), k + K)


def test_expected_equals_monte_carlo(economy, tables, rng):
    """The sampler and the exact sum know the same transition, from every state."""
    n, (Z, S) = 400_000, sizes(economy)
    weights = 7 * torch.rand(Z * S, generator=rng, dtype=F64) - 2  # a value of (z', s') each
    one = torch.zeros(1, dtype=F64)
    for z, s in np.ndindex(Z, S):
        z_now, s_now = torch.full((n,), z), torch.full((n,), s)
        z_next = dk.draw_z(torch.rand(n, generator=rng), z_now, tables)
        s_next = dk.draw_s(torch.rand(n, generator=rng), z_now, z_next, s_now, tables)
        drawn = weights[S * z_next + s_next]
        _, s1, _, z1 = dk.successors(one, s_now[:1], one, z_now[:1], tables)
        exact = dk.expected(weights[S * z1 + s1], s_now[:1], z_now[:1], tables).item()
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
        g = torch.linspace(-15, 15, 31, dtype=F64).repeat(economy.income.size).requires_grad_()
        V, V_g = dk.value_of(g, s, z, tables)
        assert torch.allclose(V_g, torch.autograd.grad(V.sum(), g)[0], rtol=1e-12)
        assert torch.allclose(dk.equivalent_of(V, s, z, tables), g, rtol=1e-9, atol=1e-9)
        c_ss = torch.tensor(tables.c_ss, dtype=F64)
        for_ever = torch.tensor(economy.annuity)[z, s] * dk.utility(c_ss, tables)
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


ANEW = {"shares": None, "L": None}  # has the tables which follow from the chain filled in again


def altered(table, *index, by):
    """A copy of table with one number changed."""
    table = np.array(table, float)
    table[index] = by
    return table


@pytest.mark.parametrize("name, shape", [("TFP", (2, 3)), ("P_z", (2, 2)), ("P_z", (3, 2)), ("Pi", (2, 2)),
                                         ("Pi", (2, 3, 3, 3)), ("beta", (2,)), ("beta", (3, 3)), ("income", (2, 3)),
                                         ("weight", (2,)), ("L", (2,)), ("shares", (2, 3)), ("sees_s", (2, 2)),
                                         ("sees_s", (3, 1, 1)), ("sees_z", (2, 1)), ("sees_z", (4,))])
def test_wrong_shape(toy, name, shape):
    assert refused(toy, **{name: np.full(shape, 0.5)}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["P_z", "Pi", "beta", "TFP", "income", "sees_s"])
def test_no_table_of_numbers(toy, name):
    assert refused(toy, **{name: "none"}).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["Pi", "beta", "income"])
def test_rows_of_unequal_length(toy, name):
    assert refused(toy, **{name: [[0.5, 0.5, 0.5], [0.5]]}).startswith(f"{name}: ")


def test_wrong_number_of_names(toy):
    assert refused(toy, s_names=("poor", "rich")).startswith("s_names: ")
    assert refused(toy, z_names=("bad", "good")).startswith("z_names: ")


@pytest.mark.parametrize("name, index", [("P_z", (0, 0)), ("P_z", (2, 1)), ("Pi", (0, 1, 2, 1)), ("Pi", (2, 2, 1, 2))])
def test_rows_sum_to_one(toy, name, index):
    table = getattr(toy, name)
    for change in (1e-3, -1e-3, 1e-6):
        told = refused(toy, **ANEW, **{name: altered(table, *index, by=table[index] + change)})
        assert told.startswith(f"{name}: ") and f"{1 + change:.6g}" in told


@pytest.mark.parametrize("name, row", [("P_z", (1,)), ("Pi", (1, 2, 1))])
def test_negative_probability(toy, name, row):
    table = getattr(toy, name).copy()
    table[row] = [-0.2, 0.7, 0.5]
    told = refused(toy, **ANEW, **{name: table})
    assert told.startswith(f"{name}: ") and "-0.2" in told


@pytest.mark.parametrize("name, index", [("TFP", (1,)), ("P_z", (1, 1)), ("Pi", (0, 0, 1, 1)), ("beta", (2,)),
                                         ("income", (0, 2)), ("weight", (0,)), ("L", (1,)), ("shares", (1, 1)),
                                         ("sees_s", (0, 0)), ("sees_z", (2, 0)), ("alpha", ()), ("delta", ()),
                                         ("gamma", ()), ("k_min", ())])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_are_finite(toy, name, index, value):
    table = getattr(toy, name)
    told = refused(toy, **{name: altered(table, *index, by=value) if index else value})
    assert told.startswith(f"{name}: ") or (name == "L" and "income: " in told and "labour L;" in told)


@pytest.mark.parametrize("name, index, value", [("TFP", (0,), 0), ("TFP", (0,), -1), ("beta", (1,), 0),
                                                ("weight", (1,), 0), ("income", (0, 0), -0.1), ("L", (1,), 0)])
def test_signs(toy, name, index, value):
    assert refused(toy, **{name: altered(getattr(toy, name), *index, by=value)}).startswith(f"{name}: ")


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"alpha": 1.0}, {"delta": 0.0}, {"delta": 1.1}, {"gamma": 0.0},
                                     {"gamma": -1.0}, {"gamma": 1000.0}], ids=str)
def test_intervals(toy, changes):
    assert refused(toy, **changes).startswith(f"{next(iter(changes))}: ")


def test_discounted_chain_must_not_grow(toy):
    """A state with beta above one is allowed where it soon ends, not where discounted utility has no bound: by the
    spectral radius, whether mean beta is above one or not."""
    assert refused(toy, beta=1.01).startswith("beta: ")
    stay = np.array([[0.999, 0.001, 0.0], [0.0005, 0.999, 0.0005], [0.0, 0.001, 0.999]])
    patient = [0.9, 0.9, 1.01]
    economy = dataclasses.replace(toy, Pi=stay, **ANEW)
    assert economy.shares.sum(0) @ patient < 1
    assert refused(economy, beta=patient).startswith("beta: ")
    soon = dataclasses.replace(toy, beta=[0.9, 0.9, 1.01])
    growth = np.tile(soon.beta, 3)[:, None] * transition(soon)
    assert np.abs(np.linalg.eigvals(growth)).max() < 1 and np.isfinite(soon.annuity).all() and (soon.annuity > 1).all()


def test_chain_that_is_not_ergodic_needs_shares(toy):
    """Permanent groups: refused without shares, accepted with shares that stay, refused with others."""
    groups = np.eye(3)
    told = refused(toy, Pi=groups, **ANEW)
    assert told.startswith("P_z, Pi: ") and "shares" in told
    of_z = stationary(toy.P_z)
    shares = of_z[:, None] * np.array([0.2, 0.5, 0.3])
    economy = dataclasses.replace(toy, Pi=groups, shares=shares, L=None)
    assert economy.shares == pytest.approx(shares) and economy.mean_beta == pytest.approx(shares.sum(0) @ toy.beta)
    assert economy.L == pytest.approx(toy.income @ [0.2, 0.5, 0.3])
    assert refused(toy, Pi=groups, L=None, shares=np.full((3, 3), 1 / 9)).startswith("shares: ")
    assert refused(toy, P_z=np.eye(3), **ANEW).startswith("P_z, Pi: ")
    swinging = np.eye(3)[[1, 2, 0]]  # periodic: it never settles by itself either
    assert refused(toy, P_z=swinging, **ANEW).startswith("P_z, Pi: ")


@pytest.mark.parametrize("S", [1, 3])
def test_states_that_never_change(toy, rng, S):
    """Households all alike, or in permanent groups: every state follows itself, whatever z does."""
    of_z = stationary(toy.P_z)
    economy = dataclasses.replace(toy, Pi=np.eye(S), shares=of_z[:, None] * np.full(S, 1 / S), L=None, weight=1.0,
                                  group=0, beta=toy.beta[:S], income=toy.income[:, -S:], sees_s=None, s_names=())
    tables = economy.tables()
    panel = dk.initial_panel(4, 30, tables, rng)
    for systematic in (False, True):
        s, z = dk.draw_shocks(panel.s, panel.z, 20, tables, rng, systematic)
        assert (s == panel.s).all() and (z[1:] != z[:-1]).any()
    at, one = every_state(economy), torch.zeros(3 * S, dtype=F64)
    assert (dk.successors(one, at[0], one, at[1], tables)[1] == at[0]).all()


def test_shares_must_be_stationary(toy):
    shares = toy.shares
    assert dataclasses.replace(toy, shares=shares).shares == pytest.approx(shares)
    for wrong in (shares.T, 2 * shares, shares + np.array([1e-3, -1e-3, 0]), -shares):
        assert refused(toy, L=None, shares=wrong).startswith("shares: ")


def test_borrowing_limit_must_be_affordable(toy):
    """Just affordable from income at steady-state prices is accepted, a little more debt is not; a limit above mean
    capital is none."""
    least = -toy.income.min() * toy.w_ss / (toy.R_ss - 1)
    assert dataclasses.replace(toy, k_min=0.999 * least).k_min == 0.999 * least
    for k_min in (1.001 * least, toy.K_ss, 2 * toy.K_ss):
        assert refused(toy, k_min=k_min).startswith("k_min: ")


def test_states_that_the_networks_cannot_tell_apart(toy):
    """Equal inputs are refused where discount factor, income or transition differ, and allowed where nothing does."""
    assert refused(toy, sees_s=[[0.0], [1.0], [1.0]]).startswith("sees_s: ")
    assert refused(toy, sees_z=[[0.0], [1.0], [1.0]]).startswith("sees_z: ")
    # the last two alike in all: nothing of the economy depends on which of them it is
    alike = dict(beta=[0.9, 0.95, 0.95], income=[0.5, 1.0, 1.0], **ANEW, k_min=0.0,
                 Pi=[[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]], sees_s=[[0.0], [1.0], [1.0]])
    dataclasses.replace(toy, **alike)
    for name, index, value in (("beta", (2,), 0.94), ("income", (2,), 1.1), ("Pi", (2,), [0.2, 0.4, 0.4])):
        assert refused(toy, **alike | {name: altered(alike[name], *index, by=value)}).startswith("sees_s: "), name


def test_income_and_labour_must_fit(toy):
    """What households earn on average is the wage for each unit of labour, in every z."""
    for wrong in (toy.L * 1.01, altered(toy.L, 2, by=1.0)):
        told = refused(toy, L=wrong)
        assert told.startswith("income: ") and "L" in told
    told = refused(toy, income=altered(toy.income, 1, 1, by=1.2))
    assert told.startswith("income: ") and "z = 1" in told


def test_tables_broadcast_and_are_copied():
    """A number, a row, or lists do for a whole table; the economy keeps arrays of its own, of full shape."""
    beta, Pi = np.array([0.95]), np.array([[0.9, 0.1], [0.2, 0.8]])
    economy = dk.Economy(alpha=0.3, delta=0.1, TFP=[0.9, 1.1], P_z=[[0.8, 0.2], [0.3, 0.7]], Pi=Pi, beta=beta,
                         income=[0.5, 1.5])
    assert economy.beta.shape == (2,) and economy.Pi.shape == (2, 2, 2, 2) and economy.income.shape == (2, 2)
    assert economy.shares.shape == (2, 2) and economy.L.shape == economy.TFP.shape == (2,)
    Pi[0], beta[0] = 7, 7
    assert economy.Pi.max() == 0.9 and economy.beta.max() == 0.95
    assert economy.L == pytest.approx(economy.income[0] @ np.array([2 / 3, 1 / 3]))
    assert np.array_equal(economy.sees_s, np.eye(2)) and economy.sees_z.tolist() == [[-1], [1]]
    assert economy.s_names == ("s = 0", "s = 1") and economy.z_names == ("z = 0", "z = 1")
    assert economy.weight.tolist() == [1, 1] and economy.gamma == 1 and economy.k_min == 0
