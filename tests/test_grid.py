"""The grid solution against known coefficients, its own equations, and finer grids."""

import dataclasses

import numpy as np
import pytest
import scipy.interpolate
import scipy.signal
import scipy.stats
import torch

import deepham_ks as dk

KNOWN = np.array([[0.1245, 0.9654], [0.1376, 0.9633]])  # ln K' = a + b ln K, converged grid, rounded to four digits
SMALL = dk.GridConfig(n_k=60, n_K=6, n_k_fine=150, n_K_fine=9, periods=1000, burn_in=50, tolerance=1e-4)
F64 = torch.float64


def forecast(alm, K):
    return np.exp(alm[:, :1] + alm[:, 1:] * np.log(K))


def table_nodes(grid):
    """k and K of the policy table."""
    n_K, n_k = grid.table.shape[2:]
    return (dk.power_grid(n_k, grid.econ.k_min, grid.k_max, grid.exponent),
            np.linspace(grid.K_low, grid.K_high, n_K))


def states_at_nodes(grid, k_top):
    """States (k, s, K, z, K') at the nodes of the policy table with k <= k_top, K' by its law of motion; only those
    whose K' lies on the table, for there is no policy beyond."""
    k, K = table_nodes(grid)
    k, s, K, z = [x.flatten() for x in dk.on_grid(k[k <= k_top], K, grid.econ)]
    alm = torch.tensor(grid.alm_coefficients)[z]
    K_next = torch.exp(alm[:, 0] + alm[:, 1] * torch.log(K))
    at = (K_next >= grid.K_low) & (K_next <= grid.K_high)
    return dk.States(*[x[at] for x in (k, s, K, z, K_next)])


def consumption(grid, states):
    return dk.cash_on_hand(*states.now(), grid.econ)[0] - grid.policy(*states.now())


@pytest.fixture(scope="module")
def nodes(converged):
    return states_at_nodes(converged, 200)


@pytest.fixture(scope="module", params=["toy", "one_z"])
def small(request, economies):
    """(economy, its solution on few nodes): three discount factors, debt and three z; and one z."""
    economy = economies[request.param]
    return economy, dk.solve_grid(economy, SMALL)


# ------------------------------------------------------------------------------------------------ default economy


def test_attributes(converged):
    assert converged.alm_coefficients.shape == (2, 2) and converged.alm_r2.shape == (2,)
    assert converged.next_capital(40.0, 1, 39.0, 1).shape == ()
    assert converged.notes == () and converged.K_low < converged.K_mean < converged.K_high


def test_law_of_motion_is_that_of_the_whole_path():
    """Nearly all updates see a twentieth of the path; the law that they end at is that of all of it."""
    config, economy = dataclasses.replace(SMALL, periods=20_000, tolerance=1e-6), dk.krusell_smith()
    grid = dk.solve_grid(economy, config)
    k = dk.power_grid(config.n_k_fine, economy.k_min, grid.k_max, config.exponent)
    K = np.linspace(grid.K_low, grid.K_high, config.n_K_fine)
    z_path = dk.draw_z_path(config.periods, economy, np.random.default_rng(config.seed))
    mass = dk.dispersed_mass(k, grid.K_mean, z_path[0], economy)
    for path in (z_path[:4000], z_path):  # the first brings the distribution where it stays
        K_path, mass = dk.simulate_histogram(grid.table.numpy(), k, K, mass, path, economy)

    def distance(periods):
        kept = [torch.from_numpy(x[config.burn_in : periods, None]) for x in (K_path, z_path)]
        law, _ = dk.law_of_motion(*kept, torch.zeros(2))
        return (law.numpy() - grid.alm_coefficients) @ [1, np.log(grid.K_mean)]

    ln_K, z = np.log(K_path[config.burn_in :]), z_path[config.burn_in : -1]
    whole = distance(20_000)
    law = grid.alm_coefficients + np.stack([whole, 0 * whole], 1)
    luck = dk.luck_of(ln_K[1:] - law[z, 0] - law[z, 1] * ln_K[:-1], z, economy)
    assert np.abs(whole - luck).max() < 0.2 * np.abs(distance(1000)).max()


def test_luck_is_what_the_past_of_z_explains(economy):
    """Residuals that are a sum of averages of z in the past: their mean on the path less that of the chain."""
    Z, share, rng = len(economy.TFP), economy.shares.sum(1), np.random.default_rng(3)
    z_path = dk.draw_z_path(20_000, economy, rng)
    weight, centred = rng.normal(size=len(dk.MEMORY)), np.arange(Z) - share @ np.arange(Z)
    before = np.array([[share[i] * economy.P_z[i, j] / share[j] for i in range(Z)] for j in range(Z)])
    e, implied = np.zeros(len(z_path)), np.zeros(Z)
    for w, n in zip(weight, dk.MEMORY):
        e += w * scipy.signal.lfilter([0, 1 / n], [1, 1 / n - 1], centred[z_path])
        ahead = before @ centred  # E[z one period ago | z], then two periods ago, ...
        for lag in range(20 * int(n)):
            implied += w / n * (1 - 1 / n) ** lag * ahead
            ahead = before @ ahead
    means = np.array([e[z_path == z].mean() for z in range(Z)])
    assert dk.luck_of(e - means[z_path], z_path, economy) == pytest.approx(means - implied, abs=1e-8)
    assert Z == 1 or np.abs(means - implied).max() > 1e-4


def test_law_of_motion(converged, smoke_grid):
    """K' forecast to 0.02%: the known coefficients are rounded by 5e-5, which is 5e-5 (1 + ln 40) = 0.023% at most."""
    K = np.linspace(36, 43, 29)
    for grid in (converged, smoke_grid):
        assert np.abs(forecast(grid.alm_coefficients, K) / forecast(KNOWN, K) - 1).max() < 2e-4
        assert (grid.alm_r2 > 0.99999).all() and (grid.alm_r2 <= 1).all()
    good_less_bad = np.diff(forecast(converged.alm_coefficients, K), axis=0)
    assert (good_less_bad > 0.1).all()  # rows are z: the good state saves more


def test_policy_is_a_savings_policy(converged):
    """k' is never negative or NaN, rises with k and never exceeds cash on hand; the poor unemployed save nothing."""
    table = converged.table
    assert torch.isfinite(table).all() and (table >= 0).all()
    assert (table.diff(dim=-1) >= 0).all()
    off_nodes = np.concatenate([np.linspace(0, 5, 501), np.linspace(5, 900, 500)])
    for s in (0, 1):
        for z in (0, 1):
            for K in (25.0, 29.4, 37.0, 41.3, 52.9, 60.0):  # beyond the table too
                k_next = converged.next_capital(off_nodes, s, K, z)
                assert np.isfinite(k_next).all() and (k_next >= 0).all() and (np.diff(k_next) >= 0).all()
    assert converged.next_capital(0.0, 0, 39.0, 0) == 0 < converged.next_capital(0.0, 1, 39.0, 0)


def test_euler_equation_at_the_nodes(converged, nodes):
    """u'(c) = beta E[R' u'(c')] with K' of the law of motion. The grid is converged when k' is right to 0.001, and c
    is above 0.3 everywhere, so 3.3e-3 at most; the mean is to beat the 10^-4.11 of simulated states in the design."""
    assert consumption(converged, nodes).min() > 0.3
    error = dk.euler_errors(converged, nodes, converged.econ).abs()
    assert len(error) > 0.8 * len(nodes.k)
    assert error.mean() < 10**-4.11
    assert error.max() < 3.3e-3


def test_euler_equation_by_loops(converged):
    """The same at single states, from the equations in plain Python: nothing of the script but next_capital."""
    P = {(0, 0): ((0.525, 0.35), (0.03125, 0.09375)), (0, 1): ((0.038889, 0.836111), (0.002083, 0.122917)),
         (1, 0): ((0.09375, 0.03125), (0.291667, 0.583333)), (1, 1): ((0.009115, 0.115885), (0.024306, 0.850694))}

    def resources(k, s, K, z):
        u = (0.10, 0.04)[z]
        L, Z = (1 - u) / 0.9, (0.99, 1.01)[z]
        R, w = 1 - 0.025 + 0.36 * Z * (K / L) ** -0.64, 0.64 * Z * (K / L) ** 0.36
        return R * k + w * (0.15 if s == 0 else (1 - 0.15 * u / L) / 0.9), R

    for z in (0, 1):
        for s in (0, 1):
            for k, K in ((3.0, 38.0), (20.0, 40.5), (80.0, 42.0)):
                k_next = float(converged.next_capital(k, s, K, z))
                K_next = float(forecast(KNOWN, K)[z, 0])
                right = 0.0
                for z1 in (0, 1):
                    for s1 in (0, 1):
                        m, R = resources(k_next, s1, K_next, z1)
                        c = m - float(converged.next_capital(k_next, s1, K_next, z1))
                        right += 0.99 * P[z, s][z1][s1] * R / c
                c = resources(k, s, K, z)[0] - k_next
                # K' of rounded coefficients is off by 0.023%, R' by 0.64 x 0.035 x that and c' by less than it
                assert c * right == pytest.approx(1, abs=5e-4)


def test_value_solves_its_bellman_equation(converged, nodes):
    """V = u(c) + beta E V' with the policy's own c, and no c does better: 0.001 utils on average, a tenth of
    which would still be more than the policy's own error, 0.004 at most: the tolerances of a whole run."""
    own, best = dk.bellman_errors(converged, nodes.at(slice(None, None, 7)), converged.econ)
    for error in (own.abs(), best.abs()):
        assert error.mean() < 0.001 and error.max() < 0.004
    assert (best >= own).all()
    assert (best - own).max() < 1e-4


def test_value_slope_is_marginal_utility(converged):
    """The envelope theorem: V_k = R u'(c), over steps wide enough that the table's kinks do not show."""
    k, s, K, z = [x.flatten() for x in dk.on_grid(np.linspace(5, 150, 30), np.array([37.0, 41.0]), converged.econ)]
    slope = (converged.values(k + 1, s, K, z) - converged.values(k - 1, s, K, z)) / 2
    m, R = dk.cash_on_hand(k, s, K, z, converged.econ)
    envelope = R / (m - converged.policy(k, s, K, z))
    assert (slope / envelope - 1).abs().max() < 0.01


def test_value_is_in_utils(converged):
    """value() is of ln c, values() of ln(c / c_ss): they differ by what ln c_ss for ever is worth."""
    k, s, K, z = [x.flatten() for x in dk.on_grid(np.linspace(5, 150, 5), np.array([37.0, 41.0]), converged.econ)]
    difference = converged.value(k, s, K, z) - converged.values(k, s, K, z).numpy()
    assert difference == pytest.approx(np.full(len(k), np.log(converged.econ.c_ss) / (1 - 0.99)), rel=1e-9)


# ------------------------------------------------------------------------------------------------ histogram


def by_hand(mass, k, k_next):
    """mass (S, n) at k moved to the neighbours of k' (S, n), so that its mean moves to the mean of k'."""
    moved, right = np.zeros_like(mass), np.interp(k_next, k, np.arange(len(k)))
    low = np.minimum(right.astype(int), len(k) - 2)
    for s in range(len(mass)):
        np.add.at(moved[s], low[s], mass[s] * (1 - (right - low)[s]))
        np.add.at(moved[s], low[s] + 1, mass[s] * (right - low)[s])
    return moved


def moved_by_hand(mass, k, table, K, now):
    """By the two nodes of K around now, each with its share; beyond them by k' as it goes on there."""
    j = np.clip(np.searchsorted(K, now, "right") - 1, 0, len(K) - 2)
    share = (now - K[j]) / (K[j + 1] - K[j])
    if not 0 <= share <= 1:
        return by_hand(mass, k, (1 - share) * table[:, j] + share * table[:, j + 1])
    return (1 - share) * by_hand(mass, k, table[:, j]) + share * by_hand(mass, k, table[:, j + 1])


def check_histogram(grid, economy, z_path):
    """One period at a time along z_path: mass is one, K' is the mean of k' over the histogram, and s moves by Pi."""
    (k, K), S, table = table_nodes(grid), len(economy.beta), grid.table.numpy()
    mass = dk.dispersed_mass(k, grid.K_mean, z_path[0], economy)
    assert mass.sum() == pytest.approx(1, abs=1e-12) and (mass >= 0).all()
    assert (mass * k).sum() == pytest.approx(grid.K_mean, rel=0.01)
    assert mass.sum(1) == pytest.approx(economy.shares[z_path[0]] / economy.shares[z_path[0]].sum(), abs=1e-12)
    for z, z_next in zip(z_path, z_path[1:]):
        seen = []
        K_path, after = dk.simulate_histogram(table, k, K, mass, np.array([z, z_next]), economy,
                                              lambda *args, seen=seen: seen.append(args))
        _, one_period = dk.simulate_histogram(table, k, K, mass, np.array([z]), economy)
        now = (mass * k).sum()
        k_next = grid.next_capital(k, np.arange(S)[:, None], now, z)
        assert K_path == pytest.approx([now, (mass * k_next).sum()], rel=1e-10)
        moved, interpolated = moved_by_hand(mass, k, table[z], K, now), by_hand(mass, k, k_next)
        assert one_period == pytest.approx(economy.Pi[z, z].T @ moved, abs=1e-14)  # the last z stays
        (t, first, of_first), (t_last, mass, _) = seen
        assert (t, t_last) == (0, 1) and of_first == pytest.approx(k_next, rel=1e-10)
        assert mass == pytest.approx(economy.Pi[z, z_next].T @ moved, abs=1e-14)
        assert mass.sum() == pytest.approx(1, abs=1e-12) and after.sum() == pytest.approx(1, abs=1e-12)
        yield z, z_next, first, mass, (np.abs((moved - interpolated).sum(0).cumsum())[:-1] * np.diff(k)).sum()


def test_histogram_keeps_mass_mean_and_unemployment(converged):
    """One period at a time: K' is the mean of k' over the histogram, unemployment is u(z')."""
    for _, z_next, _, mass, of_nodes in check_histogram(converged, dk.krusell_smith(),
                                                        np.array([1, 1, 0, 0, 1, 0, 1, 1])):
        assert of_nodes < 1e-3  # W1 from the histogram that k' between the two nodes of K moves
        assert mass[0].sum() == pytest.approx((0.10, 0.04)[z_next], abs=1e-12)


def test_histogram_keeps_mass_mean_and_shares(small):
    """The same in any economy: shares of s follow the chain given the path of z."""
    economy, grid = small
    z_path = dk.draw_z_path(80, economy, np.random.default_rng(1))
    assert set(z_path) == set(range(len(economy.TFP)))
    for z, z_next, before, mass, _ in check_histogram(grid, economy, z_path):
        assert mass.sum(1) == pytest.approx(before.sum(1) @ economy.Pi[z, z_next], abs=1e-12)


@pytest.mark.parametrize("ends", [(0.9, 0.97), (1.03, 1.1)])
def test_histogram_beyond_the_nodes_of_K(converged, ends):
    """Policies go on as lines there, and no mass is negative."""
    economy, ((k, K), table) = dk.krusell_smith(), (table_nodes(converged), converged.table.numpy())
    K = np.linspace(*ends, len(K)) * converged.K_mean
    mass = dk.dispersed_mass(k, converged.K_mean, 1, economy)
    now = (mass * k).sum()
    assert not K[0] <= now <= K[-1]
    (_, found), after = dk.simulate_histogram(table, k, K, mass, np.array([1, 1]), economy)
    moved = moved_by_hand(mass, k, table[1], K, now)
    assert found == pytest.approx((moved * k).sum(), rel=1e-10) and (after >= 0).all()


def test_histogram_ends_where_the_chain_does(small):
    """Over a long path it forgets its start: shares of s are the eigenvector's on average."""
    economy, grid = small
    (k, K), shares = table_nodes(grid), []
    z_path = dk.draw_z_path(4000, economy, np.random.default_rng(4))
    mass = np.eye(len(economy.beta))[[0]].T * np.eye(len(k))[[60]]  # all in the first state with one k
    dk.simulate_histogram(grid.table.numpy(), k, K, mass, z_path, economy,
                          lambda t, mass, k_next: shares.append(mass.sum(1)))
    # given z the share of s is off by 0.2 at most, correlated for about ten periods: 0.2 / sqrt(400) = 0.01
    assert np.mean(shares, 0) == pytest.approx(economy.shares.sum(0), abs=0.04)
    assert shares[0] == pytest.approx(np.eye(len(economy.beta))[0])


def test_z_path_follows_the_chain(economy):
    """It starts in the middle, and its transitions have their frequencies."""
    z_path, Z = dk.draw_z_path(20_000, economy, np.random.default_rng(0)), len(economy.TFP)
    assert len(z_path) == 20_000 and z_path[0] == Z // 2
    for z in range(Z):
        found, p = np.bincount(z_path[1:][z_path[:-1] == z], minlength=Z), economy.P_z[z]
        assert (np.abs(found - found.sum() * p) <= 4.5 * (found.sum() * p * (1 - p)) ** 0.5).all()


def test_histogram_agrees_with_households(converged, econ):
    """Two routes to the cross-section on one path of z: Young's histogram and 20,000 households."""
    panel = dk.initial_panel(1, 20_000, econ, torch.Generator().manual_seed(1), F64)
    path = [(k, s, K.item(), z.item()) for s, z, [(k, K, _)] in
            dk.simulate([converged.policy], panel, 150, econ, torch.Generator().manual_seed(2))]
    z_path, K_households = np.array([p[3] for p in path]), np.array([p[2] for p in path])
    k, K = table_nodes(converged)
    start, n_k = np.zeros((2, len(k))), len(k)
    position = np.interp(path[0][0].numpy().ravel(), k, np.arange(n_k))
    low, s = np.minimum(position.astype(int), n_k - 2), path[0][1].numpy().ravel()
    np.add.at(start, (s, low), (1 - (position - low)) / 20_000)
    np.add.at(start, (s, low + 1), (position - low) / 20_000)
    K_histogram, mass = dk.simulate_histogram(converged.table.numpy(), k, K, start, z_path, dk.krusell_smith())
    # K of households strays with their own unemployment: income noise of 3 x 0.3 / sqrt(20,000) a quarter at most,
    # 0.0064, correlated for two quarters and piling up over at most 150 with decay 0.965: four deviations are 0.2
    assert np.abs(K_histogram - K_households).max() < 0.2
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    households = path[-1][0].numpy().ravel()
    # W1 of 20,000 draws of std 19 is about 19 x 0.8 / sqrt(20,000) = 0.11, and the means may stray by 0.2
    assert scipy.stats.wasserstein_distance(k, households, mass.sum(0)) < 0.35


# ------------------------------------------------------------------------------------------------ law of motion


def test_regression_recovers_an_exact_law():
    """Also over several economies at once."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (300, 3))
    ln_K = np.full((300, 3), 3.6)
    for t in range(299):
        ln_K[t + 1] = KNOWN[z[t], 0] + KNOWN[z[t], 1] * ln_K[t]
    K, z, still = torch.tensor(np.exp(ln_K)), torch.tensor(z), torch.zeros(2)
    alm, r2 = dk.law_of_motion(K, z, still)
    assert alm.numpy() == pytest.approx(KNOWN, abs=1e-9) and r2.numpy() == pytest.approx(1, abs=1e-9)
    alone, _ = dk.law_of_motion(K[:, 1:2], z[:, 1:2], still)
    assert alone.numpy() == pytest.approx(KNOWN, abs=1e-9) and (still == 0).all()


def test_regression_says_what_it_cannot_learn():
    """A z that never comes has no level; where K does not move the slope is the given one and the level is learnt; R2
    is NaN in both. The last period has no K' and teaches nothing."""
    still = torch.tensor([0.97, 0.95, 0.9], dtype=F64)
    K = torch.cat([torch.full((50, 1), 39.0), torch.tensor([[40.0]])]).double()
    z = torch.cat([torch.ones(50, 1, dtype=torch.int64), torch.tensor([[2]])])  # z = 2 comes at the end only
    for n, level in ((50, np.log(39.0)), (51, np.log(39.0) + np.log(40 / 39) / 50)):
        alm, r2 = dk.law_of_motion(K[:n], z[:n], still)
        assert alm[[0, 2], 0].isnan().all() and torch.equal(alm[:, 1], still) and r2.isnan().all()
        assert float(alm[1] @ torch.tensor([1, np.log(39.0)])) == pytest.approx(level, rel=1e-12)


# ------------------------------------------------------------------------------------------------ other grids


def test_refinement(converged, econ):
    """Twice the nodes of k and K: the household problem moves k' by less than 0.001 on [0, 200], and the
    distribution of the same households under it, on twice the points of the table, by less than 0.02 in W1."""
    base, economy = dk.GridConfig(), dk.krusell_smith()
    fine = dataclasses.replace(base, n_k=2 * base.n_k, n_K=2 * base.n_K)
    nodes = dk.household_nodes(dk.power_grid(fine.n_k, 0.0, converged.k_max, fine.exponent),
                               np.linspace(converged.K_low, converged.K_high, fine.n_K), econ)
    assert nodes.m.shape == (2, 2, 24, 800)

    def policy(k):
        return converged.policy(*dk.on_grid(k, nodes.K, econ)).numpy()

    c = nodes.m - policy(nodes.k)
    laws = converged.alm_coefficients, np.zeros((2, 2))
    for _ in range(10):
        c, k_endo, change, bounded = dk.solve_household(c, laws, nodes, economy, fine)
        assert bounded == 0
        if change < fine.tolerance:
            break
    assert change < fine.tolerance
    k_low = np.linspace(0, 200, 1601)
    assert np.abs(dk.invert(k_endo, nodes, k_low) - policy(k_low)).max() < 0.001

    k = dk.power_grid(2 * base.n_k_fine - 1, 0.0, converged.k_max, fine.exponent)
    K = np.linspace(converged.K_low, converged.K_high, 2 * base.n_K_fine - 1)
    table = dk.invert(scipy.interpolate.CubicSpline(nodes.K, k_endo, axis=2)(K), nodes, k)
    grids = converged, dataclasses.replace(converged, table=torch.from_numpy(table))
    panel = dk.initial_panel(4, 500, econ, torch.Generator().manual_seed(1), F64)
    path = dk.simulate([grid.policy for grid in grids], panel, 1500, econ, torch.Generator().manual_seed(2))
    pooled = [[k.flatten() for k, _, _ in paths] for t, (_, _, paths) in enumerate(path) if t % 20 == 0 and t >= 500]
    assert 0 < scipy.stats.wasserstein_distance(*map(np.concatenate, zip(*pooled))) < 0.02


def test_published_setting_is_close(converged):
    """100 nodes with exponent 7 up to k = 1000, 4 nodes of K on [30, 50], splines: |dk'| below the .006 / .017 that the
    design found for the published policy."""
    published = dk.GRIDS["published"]
    assert (published.n_k, published.exponent, published.n_K) == (100, 7, 4)
    grid = dk.solve_grid(config=published)
    assert grid.k_max == pytest.approx(1000, rel=0.02)
    assert (grid.K_low, grid.K_high) == pytest.approx((30, 50), rel=0.01)
    states = np.meshgrid(np.linspace(0.5, 160, 640), [0, 1], [37, 39.5, 42], [0, 1], indexing="ij")
    gap = np.abs(grid.next_capital(*states) - converged.next_capital(*states))
    assert 0 < gap.mean() < 0.006 and gap.max() < 0.017


@pytest.mark.parametrize("changes", [{"gamma": 2.0}, {"mu": 0.0, "tfp_shock": 0.02}, {"gamma": 5.0}, {"beta": 0.95}],
                         ids=str)
def test_other_calibrations_converge(changes):
    """The smoke grid follows the calibration: k' within the budget and Euler errors as small as on its own nodes."""
    grid = dk.solve_grid(dk.Calibration(**changes), dk.SMOKE_GRID)
    econ = grid.econ
    assert (grid.alm_r2 > 0.999).all() and (np.abs(grid.alm_coefficients[:, 1] - 0.95) < 0.05).all()
    k, K = econ.K_ss * np.linspace(0.1, 4, 50), econ.K_ss * np.linspace(0.95, 1.1, 4)
    k, s, K, z = [x.flatten() for x in dk.on_grid(k, K, econ)]
    alm = torch.tensor(grid.alm_coefficients)[z]
    states = dk.States(k, s, K, z, torch.exp(alm[:, 0] + alm[:, 1] * torch.log(K)))
    error = dk.euler_errors(grid, states, econ).abs()
    assert error.mean() < 1e-3  # 100 nodes for 400: the spline's error, of fourth order, is 256 times 10^-5 at most
    assert (consumption(grid, states) > 0).all()


# ------------------------------------------------------------------------------------------------ other economies


def test_any_economy_converges(small):
    """A stable law of motion that saves more in better states, and a policy between the limit and cash on hand that
    rises with k; the centre of K is near its mean."""
    economy, grid = small
    assert grid.notes == () and ((grid.alm_coefficients[:, 1] > 0.85) & (grid.alm_coefficients[:, 1] < 1)).all()
    Z, S = economy.income.shape
    assert grid.table.shape == grid.value_table.shape == (Z, S, SMALL.n_K_fine, SMALL.n_k_fine)
    assert (np.diff(forecast(grid.alm_coefficients, np.array([grid.K_mean])), axis=0) > 0).all()
    if Z > 1:
        assert (grid.alm_r2 > 0.99).all()
    else:  # K does not move: the law of motion says where it is
        assert forecast(grid.alm_coefficients, grid.K_mean)[0, 0] == pytest.approx(grid.K_mean, rel=1e-4)
    assert torch.isfinite(grid.value_table).all() and (grid.value_table.diff(dim=-1) > 0).all()
    assert (grid.table >= economy.k_min).all() and (grid.table.diff(dim=-1) >= 0).all()
    assert (grid.table == economy.k_min).any()
    states = states_at_nodes(grid, 4 * grid.K_mean)
    assert (consumption(grid, states) > 0).all()
    assert grid.K_low < grid.K_mean < grid.K_high


def test_euler_equation_of_any_economy(small):
    """At the nodes, by loops over the dense P and the tables as they were given; K' lies between nine nodes of K where
    the default has 41, so errors are up to (40 / 8)^2 = 25 times the 10^-4.6 there."""
    economy, grid = small
    states = states_at_nodes(grid, 4 * grid.K_mean)
    m, c = dk.cash_on_hand(*states.now(), grid.econ)[0], consumption(grid, states)
    right = torch.zeros_like(c)
    for z, s, z1, s1 in np.ndindex(economy.P.shape):
        at = (states.z == z) & (states.s == s)
        k1, K1 = (m - c)[at], states.K_next[at]
        after = torch.full_like(states.s[at], s1), K1, torch.full_like(states.z[at], z1)
        ratio = K1 / economy.L[z1]
        R = 1 - economy.delta + economy.alpha * economy.TFP[z1] * ratio ** (economy.alpha - 1)
        w = (1 - economy.alpha) * economy.TFP[z1] * ratio**economy.alpha
        c1 = R * k1 + economy.income[z1, s1] * w - grid.policy(k1, *after)
        right[at] += economy.beta[s] * economy.P[z, s, z1, s1] * R * c1**-economy.gamma
    implied = torch.minimum(right ** (-1 / economy.gamma), m - economy.k_min)
    error = (1 - implied / c).abs()
    assert error.mean() < 6e-4 and error.quantile(0.99) < 3e-3
    free = m - c > economy.k_min
    assert free.any() and not free.all()
    assert dk.euler_errors(grid, states, grid.econ).abs().sum() == pytest.approx(float(error.sum()), rel=1e-9)


def bellman_in_consumption(grid):
    """|Bellman error| in units of u'(c) c at the nodes: of the policy's own c, and what the best c would add."""
    states = states_at_nodes(grid, 4 * grid.K_mean)
    own, best = dk.bellman_errors(grid, states, grid.econ)
    c = consumption(grid, states)
    unit = dk.marginal_utility(c, grid.econ) * c
    assert (best >= own).all()
    return (own / unit).abs().mean().item(), ((best - own) / unit).mean().item()


def test_value_of_any_economy(small):
    """V = u(c) + beta E V' of the policy as it is, up to V being linear between nine nodes of K: less than half with
    seventeen. No c does better."""
    economy, grid = small
    own, gain = bellman_in_consumption(grid)
    assert own < 2e-3 and gain < 1e-4
    finer = dk.solve_grid(economy, dataclasses.replace(SMALL, n_K_fine=17))
    assert bellman_in_consumption(finer)[0] < own / 2
    states = states_at_nodes(grid, 4 * grid.K_mean)
    utils = grid.value(*states.now()) / economy.c_ss ** (1 - economy.gamma)
    assert utils == pytest.approx(grid.values(*states.now()).numpy(), rel=1e-12)


def test_grid_grows_with_the_households(economies):
    """From a largest k that is too small the nodes are doubled, to the same solution, and a note says so; from a centre
    of K that is not where K is, they follow."""
    enough = dk.solve_grid(economies["toy"], SMALL)
    grown = dk.solve_grid(economies["toy"], dataclasses.replace(SMALL, k_max=3.0))
    assert grown.k_max > 3.0 * grown.econ.K_ss and any("largest k" in note for note in grown.notes)
    assert grown.K_mean == pytest.approx(enough.K_mean, rel=3e-3)
    assert enough.K_low > SMALL.K_low * enough.econ.K_ss  # this economy holds more capital than its steady state


def test_no_convergence_is_told():
    with pytest.raises(dk.UserError, match="^grid: no convergence in 2 updates") as error:
        dk.solve_grid(config=dataclasses.replace(SMALL, max_updates=2))
    assert "\n" not in str(error.value) and "--grid-damping" in str(error.value)
