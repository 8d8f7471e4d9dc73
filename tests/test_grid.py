"""The grid solution against known coefficients, its own equations, and finer grids."""

import dataclasses

import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
import torch
from conftest import SMALL, ahead_of, axes_of, dk

KNOWN = np.array([[0.1245, 0.9654], [0.1376, 0.9633]])  # ln K' = a + b ln K, converged grid, rounded to four digits
FEWER = dk.GridConfig(n_k=200, n_fine=1000, periods=10_000, tolerance=3e-6)
F64 = torch.float64


def forecast(alm, K):
    return np.exp(alm[:, :1] + alm[:, 1:] * np.log(K))


def table_nodes(grid):
    """k and K of the policy table."""
    return axes_of(grid)[:2]


def nodes_at(k, K, econ):
    return dk.Axes(k, K, econ.L[:, None].numpy())


def by_law(grid, at):
    """K' by the grid's law of motion; nothing else changes."""
    law = torch.tensor(grid.alm_coefficients)[at.z]
    K_next = torch.exp(law[..., 0] + law[..., 1] * torch.log(at.K))
    return ahead_of(K_next, len(grid.econ.TFP))


def everyone(k, K, econ):
    """At every (z, s, K, k), as one list."""
    return dk.place(*[x.flatten() for x in dk.on_grid(nodes_at(k, K, econ), econ)[:4]], econ)


def states_at_nodes(grid, k_top, every=1):
    """Households at the nodes of the policy table with k <= k_top, and K' by its law of motion; only those whose K'
    lies on the table, for there is no policy beyond."""
    k, K = table_nodes(grid)
    at = everyone(k[k <= k_top], K, grid.econ)
    ahead = by_law(grid, at)
    here = torch.nonzero((ahead.K >= grid.K[0]) & (ahead.K <= grid.K[-1]))[::every, 0]
    return dk.pick(at, here), dk.pick(ahead, here)


def consumption(grid, at):
    return dk.cash_on_hand(at, grid.econ)[0] - grid.policy(at)


@pytest.fixture(scope="module")
def converged():
    """Half of the default's nodes of k, fewer periods and a coarser table: seconds."""
    return dk.solve_grid(config=FEWER)


@pytest.fixture(scope="module")
def nodes(converged):
    return states_at_nodes(converged, 200, 3)


@pytest.fixture(scope="module", params=["toy", "one_z"])
def small(request, economies, small_grids):
    """(economy, its solution on few nodes): three discount factors, debt and three z; and one z."""
    return economies[request.param], small_grids(request.param)


# ------------------------------------------------------------------------------------------------ default economy


def test_attributes(converged):
    assert converged.alm_coefficients.shape == (2, 2) and converged.alm_r2.shape == (2,)
    assert converged.next_capital(40.0, 1, 39.0, 1).shape == ()
    assert converged.notes == () and converged.K[0] < converged.K_mean < converged.K[-1]


def test_law_of_motion_is_that_of_the_whole_path():
    """Nearly all updates see a twentieth of the path; the law that they end at is that of all of it."""
    config, economy = dataclasses.replace(SMALL, n_fine=100, periods=20_000, tolerance=1e-6), dk.krusell_smith()
    grid = dk.solve_grid(economy, config)
    axes, table = axes_of(grid), grid.table.numpy()
    z_path = dk.draw_z_path(config.periods, economy.arrays.P_z, np.random.default_rng(config.seed))
    mass = dk.dispersed_mass(axes.k, grid.K_mean, z_path[0], economy)
    _, mass = dk.simulate_histogram(table, axes, mass, z_path[:4000], economy)
    K_path, _ = dk.simulate_histogram(table, axes, mass, z_path, economy)

    def distance(periods):
        K, z = [torch.from_numpy(x[dk.BURN_IN : periods, None]) for x in (K_path, z_path)]
        law, _ = dk.law_of_motion(K, torch.zeros(*K.shape, 0), z, torch.zeros(2))
        return np.abs((law.numpy() - grid.alm_coefficients) @ [1, np.log(grid.K_mean)]).max()

    assert distance(20_000) < 0.3 * distance(1000) and distance(20_000) < 3e-6
    assert grid.K_mean == pytest.approx(K_path[dk.BURN_IN :].mean(), rel=1e-3)


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
            for K in (29.5, 29.6, 37.0, 41.3, 52.9):
                k_next = converged.next_capital(off_nodes, s, K, z)
                assert np.isfinite(k_next).all() and (k_next >= 0).all() and (np.diff(k_next) >= 0).all()
    assert converged.next_capital(0.0, 0, 39.0, 0) == 0 < converged.next_capital(0.0, 1, 39.0, 0)


def test_euler_equation_at_the_nodes(converged, nodes):
    """u'(c) = beta E[R' u'(c')] with K' of the law of motion. The grid is converged when k' is right to 0.001, and c
    is above 0.3 everywhere, so 3.3e-3 at most; the mean is to beat the 10^-4.11 of simulated states in the design."""
    assert consumption(converged, nodes[0]).min() > 0.3
    error = dk.euler_errors(converged, *nodes).abs()
    error = error[~error.isnan()]
    assert len(error) > 0.8 * len(nodes[0].k)
    assert error.mean() < 10**-4.11 and error.max() < 3.3e-3


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
    own, best = dk.bellman_errors(converged, *[dk.pick(x, slice(None, None, 3)) for x in nodes])
    for error in (own.abs(), best.abs()):
        assert error.mean() < 0.001 and error.max() < 0.004
    assert (best >= own).all()
    assert (best - own).max() < 1e-4


def test_value_slope_is_marginal_utility(converged):
    """The envelope theorem: V_k = R u'(c), over steps wide enough that the table's kinks do not show."""
    at = everyone(np.linspace(5, 150, 30), np.array([37.0, 41.0]), converged.econ)
    slope = (converged.values(at._replace(k=at.k + 1)) - converged.values(at._replace(k=at.k - 1))) / 2
    m, R = dk.cash_on_hand(at, converged.econ)
    envelope = R / (m - converged.policy(at))
    assert (slope / envelope - 1).abs().max() < 0.01


def test_value_is_in_utils(converged):
    """value() is of ln c, values() of ln(c / c_ss): they differ by what ln c_ss for ever is worth."""
    at = everyone(np.linspace(5, 150, 5), np.array([37.0, 41.0]), converged.econ)
    difference = converged.value(*at[:4]) - converged.values(at).numpy()
    assert difference == pytest.approx(np.full(len(at.k), np.log(converged.econ.c_ss) / (1 - 0.99)), rel=1e-9)


# ------------------------------------------------------------------------------------------------ histogram


def by_hand(mass, k, k_next):
    """mass (S, n) at k moved to the four nodes around k' (S, n), with the shares of Lagrange's cubic."""
    moved, x = np.zeros_like(mass), k_next.clip(k[0], k[-1])
    low = np.clip(np.searchsorted(k, x, "right") - 2, 0, len(k) - 4)
    for s, i in np.ndindex(len(mass), 4):
        nodes = k[low[s] + np.arange(4)[:, None]]
        share = np.prod([(x[s] - nodes[j]) / (nodes[i] - nodes[j]) for j in range(4) if j != i], 0)
        np.add.at(moved[s], low[s] + i, mass[s] * share)
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
    axes, S, table, a = axes_of(grid), len(economy.arrays.beta), grid.table.numpy(), economy.arrays
    k, K, _ = axes
    mass = dk.dispersed_mass(k, grid.K_mean, z_path[0], economy)
    assert mass.sum() == pytest.approx(1, abs=1e-12) and (mass >= 0).all()
    assert (mass * k).sum() == pytest.approx(grid.K_mean, rel=0.01)
    assert mass.sum(1) == pytest.approx(a.shares[z_path[0]] / a.shares[z_path[0]].sum(), abs=1e-12)
    for z, z_next in zip(z_path, z_path[1:]):
        seen = []
        K_path, after = dk.simulate_histogram(table, axes, mass, np.array([z, z_next]), economy,
                                              lambda *of, seen=seen: seen.append(of))
        _, one_period = dk.simulate_histogram(table, axes, mass, np.array([z]), economy)
        now = (mass * k).sum()
        at = [torch.tensor(x) for x in np.broadcast_arrays(k, np.arange(S)[:, None], now, z)]
        k_next = grid.policy(dk.place(*at, grid.econ)).numpy()
        assert K_path == pytest.approx([now, (mass * k_next).sum()], rel=1e-10)
        moved, interpolated = moved_by_hand(mass, k, table[z], K, now), by_hand(mass, k, k_next)
        assert one_period == pytest.approx(a.Pi[z, z].T @ moved, abs=1e-14)
        (t, first, of_first), (t_last, after_one, _) = seen
        assert (t, t_last) == (0, 1) and of_first == pytest.approx(k_next, rel=1e-10)
        assert after_one == pytest.approx(a.Pi[z, z_next].T @ moved, abs=1e-14)
        assert after.sum() == pytest.approx(1, abs=1e-12)
        yield z, z_next, mass, after_one, (np.abs((moved - interpolated).sum(0).cumsum())[:-1] * np.diff(k)).sum()
        mass = after_one


def test_histogram_keeps_mass_mean_and_unemployment(converged):
    """One period at a time: K' is the mean of k' over the histogram, unemployment is u(z')."""
    for _, z_next, _, mass, of_nodes in check_histogram(converged, dk.krusell_smith(),
                                                        np.array([1, 1, 0, 0, 1, 0, 1, 1])):
        assert of_nodes < 1e-3  # W1 from the histogram that k' between the two nodes of K moves
        assert mass[0].sum() == pytest.approx((0.10, 0.04)[z_next], abs=1e-12)


def test_histogram_keeps_mass_mean_and_shares(small):
    """The same in any economy: shares of s follow the chain given the path of z."""
    economy, grid = small
    z_path = dk.draw_z_path(80, economy.arrays.P_z, np.random.default_rng(1))
    assert set(z_path) == set(range(len(economy.arrays.TFP)))
    for z, z_next, before, mass, _ in check_histogram(grid, economy, z_path):
        assert mass.sum(1) == pytest.approx(before.sum(1) @ economy.arrays.Pi[z, z_next], abs=1e-12)


def test_a_path_ends_where_it_begins_again(small):
    """The mass that comes out is at the first z of the path, so that the path can be gone again."""
    economy, grid = small
    of, z_path = (grid.table.numpy(), axes_of(grid)), dk.draw_z_path(40, economy.arrays.P_z, np.random.default_rng(1))
    mass = dk.dispersed_mass(of[1].k, grid.K_mean, z_path[0], economy)
    _, once = dk.simulate_histogram(*of, mass, z_path, economy)
    twice_K, twice = dk.simulate_histogram(*of, mass, np.tile(z_path, 2), economy)
    again_K, again = dk.simulate_histogram(*of, once, z_path, economy)
    assert twice_K[40:] == pytest.approx(again_K, rel=1e-12) and twice == pytest.approx(again, abs=1e-14)


@pytest.mark.parametrize("ends", [(0.9, 0.97), (1.03, 1.1)])
def test_histogram_beyond_the_nodes_of_K(converged, ends):
    """Policies go on as lines there; whom they lead below the limit stays at it."""
    economy, ((k, K), table) = dk.krusell_smith(), (table_nodes(converged), converged.table.numpy())
    K = np.linspace(*ends, len(K)) * converged.K_mean
    mass = dk.dispersed_mass(k, converged.K_mean, 1, economy)
    now = (mass * k).sum()
    assert not K[0] <= now <= K[-1]
    axes = nodes_at(k, K, converged.econ)
    (_, found), after = dk.simulate_histogram(table, axes, mass, np.array([1, 1]), economy)
    moved = moved_by_hand(mass, k, table[1], K, now)
    assert found == pytest.approx((moved * k).sum(), rel=1e-10) and after[after < 0].sum() > -1e-3


def test_moves_keep_moments_of_capital():
    """Mass, mean and variance of k, in each s and of all m policies together; the ends stay where they are."""
    k = dk.power_grid(30, -0.5, 20.0, 3.0)
    k_next, mass = np.random.default_rng(0).uniform(-0.5, 20, (2, 3, 30)), np.random.default_rng(1).random((2, 3, 30))
    moved = (dk.moves(k_next, k) @ mass.ravel()).reshape(2, 30)
    for power in range(3):
        assert moved @ k**power == pytest.approx((mass * k_next**power).sum((1, 2)), rel=1e-12)
    at_ends = dk.moves(np.tile(k[[0, -1]], 15).reshape(1, 1, 30), k) @ np.ones(30)
    assert at_ends[[0, -1]] == pytest.approx([15, 15]) and not at_ends[1:-1].any()


def test_z_path_follows_the_chain(economy):
    """It starts in the middle, and its transitions have their frequencies."""
    P_z, Z = economy.arrays.P_z, len(economy.arrays.TFP)
    z_path = dk.draw_z_path(20_000, P_z, np.random.default_rng(0))
    assert len(z_path) == 20_000 and z_path[0] == Z // 2
    for z in range(Z):
        found, p = np.bincount(z_path[1:][z_path[:-1] == z], minlength=Z), P_z[z]
        assert (np.abs(found - found.sum() * p) <= 4.5 * (found.sum() * p * (1 - p)) ** 0.5).all()


def test_histogram_agrees_with_households(smoke_grid, econ):
    """Two routes to the cross-section on one path of z: the histogram and 20,000 households."""
    panel = dk.initial_panel(1, 20_000, econ, 39.0, torch.Generator().manual_seed(1))
    panel = panel._replace(k=panel.k.double())
    policy = dk.panel_policy(smoke_grid)
    path = [at for _, at, _ in dk.simulate(policy, panel, 120, econ, torch.Generator().manual_seed(2))]
    z_path, K_households = np.array([at.z.item() for at in path]), np.array([at.K.item() for at in path])
    axes, start = axes_of(smoke_grid), np.zeros((2, smoke_grid.table.shape[3]))
    s, position = path[0].s.numpy().ravel(), np.interp(path[0].k.numpy().ravel(), axes.k, np.arange(len(axes.k)))
    low = np.minimum(position.astype(int), len(axes.k) - 2)
    share = position - low
    np.add.at(start, (s, low), (1 - share) / 20_000)
    np.add.at(start, (s, low + 1), share / 20_000)
    given = smoke_grid.table.numpy(), axes, start
    K_histogram, _ = dk.simulate_histogram(*given, z_path, dk.krusell_smith())
    _, mass = dk.simulate_histogram(*given, z_path[:-1], dk.krusell_smith())
    # K of households strays with their own unemployment: income noise of 3 x 0.3 / sqrt(20,000) a quarter at most,
    # 0.0064, correlated for two quarters and piling up over at most 120 with decay 0.965: four deviations are 0.2
    assert np.abs(K_histogram - K_households).max() < 0.2
    households = path[-1].k.numpy().ravel()
    # W1 of 20,000 draws of std 19 is about 19 x 0.8 / sqrt(20,000) = 0.11, and the means may stray by 0.2
    assert scipy.stats.wasserstein_distance(axes.k, households, mass.sum(0).clip(0)) < 0.45


# ------------------------------------------------------------------------------------------------ law of motion


def test_regression_recovers_an_exact_law():
    """Also over several economies at once."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (300, 3))
    ln_K = np.full((300, 3), 3.6)
    for t in range(299):
        ln_K[t + 1] = KNOWN[z[t], 0] + KNOWN[z[t], 1] * ln_K[t]
    K, z, still = torch.tensor(np.exp(ln_K)), torch.tensor(z), torch.zeros(2)
    no_labour = torch.zeros(300, 3, 0)
    alm, r2 = dk.law_of_motion(K, no_labour, z, still)
    assert alm.numpy() == pytest.approx(KNOWN, abs=1e-9) and r2.numpy() == pytest.approx(1, abs=1e-9)
    alone, _ = dk.law_of_motion(K[:, 1:2], no_labour[:, 1:2], z[:, 1:2], still)
    assert alone.numpy() == pytest.approx(KNOWN, abs=1e-9) and (still == 0).all()


def test_regression_says_what_it_cannot_learn():
    """A z that never comes has no level; where K does not move the slope is the given one and the level is learnt; R2
    is NaN in both. The last period has no K' and teaches nothing."""
    still = torch.tensor([0.97, 0.95, 0.9], dtype=F64)
    K = torch.cat([torch.full((50, 1), 39.0), torch.tensor([[40.0]])]).double()
    z = torch.cat([torch.ones(50, 1, dtype=torch.int64), torch.tensor([[2]])])  # z = 2 comes at the end only
    for n, level in ((50, np.log(39.0)), (51, np.log(39.0) + np.log(40 / 39) / 50)):
        alm, r2 = dk.law_of_motion(K[:n], torch.zeros(n, 1, 0), z[:n], still)
        assert alm[[0, 2], 0].isnan().all() and torch.equal(alm[:, 1], still) and r2.isnan().all()
        assert float(alm[1] @ torch.tensor([1, np.log(39.0)])) == pytest.approx(level, rel=1e-12)


# ------------------------------------------------------------------------------------------------ other grids


def test_refinement(converged, econ):
    """Twice the nodes of k and K: the household problem moves k' by less than 0.002 on [0, 200]."""
    economy, fine = dk.krusell_smith(), dataclasses.replace(FEWER, n_k=2 * FEWER.n_k, n_K=2 * FEWER.n_K, tolerance=1e-5)
    K = np.linspace(*converged.reach()[1], fine.n_K)
    nodes = dk.household_nodes(nodes_at(dk.power_grid(fine.n_k, 0.0, converged.k_max, fine.exponent), K, econ), econ)
    assert nodes.m.shape == (2, 2, 24, 400)

    def policy(k):
        return converged.policy(dk.on_grid(nodes_at(k, K, econ), econ)).numpy()

    c, laws = nodes.m - policy(nodes.axes.k), [converged.alm_coefficients, np.zeros((2, 2))]
    for _ in range(4):
        c, k_endo, change, bounded = dk.solve_household(c, laws, nodes, economy, fine)
    assert bounded == 0 and change < fine.tolerance
    k_low = np.linspace(0, 200, 1601)
    assert 0 < np.abs(dk.invert(k_endo, nodes, k_low) - policy(k_low)).max() < 0.002


def test_published_setting_is_close(converged):
    """100 nodes with exponent 7 up to k = 1000, 4 nodes of K on [30, 50], splines: |dk'| below the .006 / .017 that the
    design found for the published policy."""
    published = dk.GRIDS["published"]
    assert (published.n_k, published.exponent, published.n_K) == (100, 7, 4)
    grid = dk.solve_grid(config=dataclasses.replace(published, n_fine=1000, periods=15_000, tolerance=3e-6))
    assert grid.k_max == pytest.approx(1000, rel=0.02)
    assert grid.reach()[1] == pytest.approx((30, 50), rel=0.01)
    states = np.meshgrid(np.linspace(0.5, 160, 640), [0, 1], [37, 39.5, 42], [0, 1], indexing="ij")
    gap = np.abs(grid.next_capital(*states) - converged.next_capital(*states))
    assert 0 < gap.mean() < 0.006 and gap.max() < 0.017


@pytest.mark.parametrize("changes", [{"mu": 0.0, "tfp_shock": 0.02}, {"gamma": 5.0}, {"beta": 0.95}],
                         ids=str)
def test_other_calibrations_converge(changes):
    """The smoke grid follows the calibration: k' within the budget and Euler errors as small as on its own nodes."""
    grid = dk.solve_grid(dk.Calibration(**changes), SMALL)
    econ = grid.econ
    assert (grid.alm_r2 > 0.999).all() and (np.abs(grid.alm_coefficients[:, 1] - 0.95) < 0.05).all()
    at = everyone(econ.K_ss * np.linspace(0.1, 4, 50), econ.K_ss * np.linspace(0.95, 1.1, 4), econ)
    error = dk.euler_errors(grid, at, by_law(grid, at)).abs()
    assert error.nanmean() < 2e-3  # 60 nodes for 400: the spline's error, of fourth order, is 2,000 times 10^-5 at most
    assert (consumption(grid, at) > 0).all()


# ------------------------------------------------------------------------------------------------ other economies


def test_any_economy_converges(small):
    """A stable law of motion that saves more in better states, and a policy between the limit and cash on hand that
    rises with k; the centre of K is near its mean."""
    economy, grid = small
    assert grid.notes == () and ((grid.alm_coefficients[:, 1] > 0.85) & (grid.alm_coefficients[:, 1] < 1)).all()
    Z, S = economy.arrays.income.shape
    n_K = len(table_nodes(grid)[1])  # more where K moves a lot, so that they stay as dense
    assert grid.table.shape == grid.value_table.shape == (Z, S, n_K, SMALL.n_fine)
    spread = (grid.K[-1] - grid.K[0]) / (n_K - 1) * (SMALL.n_K_fine - 1)
    assert spread <= 1.3 * np.ptp(SMALL.K_range) * grid.K_mean and (Z == 3) == (n_K > SMALL.n_K_fine)
    assert (np.diff(forecast(grid.alm_coefficients, np.array([grid.K_mean])), axis=0) > 0).all()
    if Z > 1:
        assert (grid.alm_r2 > 0.99).all()
    else:  # K does not move: the law of motion says where it is
        assert forecast(grid.alm_coefficients, grid.K_mean)[0, 0] == pytest.approx(grid.K_mean, rel=1e-4)
    assert torch.isfinite(grid.value_table).all() and (grid.value_table.diff(dim=-1) > 0).all()
    assert (grid.table >= economy.k_min).all() and (grid.table.diff(dim=-1) >= 0).all()
    assert (grid.table == economy.k_min).any()
    assert (consumption(grid, states_at_nodes(grid, 4 * grid.K_mean)[0]) > 0).all()
    assert grid.K[0] < grid.K_mean < grid.K[-1]


def test_euler_equation_of_any_economy(small):
    """At the nodes, by loops over the dense P and the tables as they were given; K' lies between nine nodes of K where
    the default has 41, so errors are up to (40 / 8)^2 = 25 times the 10^-4.6 there."""
    grid, a = small[1], small[0].arrays
    at, ahead = states_at_nodes(grid, 4 * grid.K_mean)
    m, c = dk.cash_on_hand(at, grid.econ)[0], consumption(grid, at)
    right = torch.zeros_like(c)
    for z, s, z1, s1 in np.ndindex(a.P.shape):
        here = (at.z == z) & (at.s == s)
        k1, K1 = (m - c)[here], ahead.K[here]
        after = dk.place(k1, torch.full_like(at.s[here], s1), K1, torch.full_like(at.z[here], z1), grid.econ)
        ratio = K1 / a.L[z1]
        R = 1 - a.delta + a.alpha * a.TFP[z1] * ratio ** (a.alpha - 1)
        w = (1 - a.alpha) * a.TFP[z1] * ratio**a.alpha
        c1 = R * k1 + a.income[z1, s1] * w - grid.policy(after)
        right[here] += a.beta[s] * a.P[z, s, z1, s1] * R * c1**-a.gamma
    implied = torch.minimum(right ** (-1 / a.gamma), m - a.k_min)
    error = (1 - implied / c).abs()
    assert error.mean() < 6e-4 and error.quantile(0.99) < 3e-3
    free = m - c > a.k_min
    assert free.any() and not free.all()
    assert dk.euler_errors(grid, at, ahead).abs().nansum() == pytest.approx(float(error.sum()), rel=1e-9)


def bellman_in_consumption(grid):
    """|Bellman error| in units of u'(c) c at the nodes: of the policy's own c, and what the best c would add."""
    at, ahead = states_at_nodes(grid, 4 * grid.K_mean, 3)
    own, best = dk.bellman_errors(grid, at, ahead)
    c = consumption(grid, at)
    unit = dk.marginal_utility(c, grid.econ) * c
    assert (best >= own).all()
    return (own / unit).abs().mean().item(), ((best - own) / unit).mean().item()


def test_nodes_follow_all_of_the_path_of_K(small):
    """In an economy whose K moves by half of its mean, and in one whose K stands still. The toy economy's K rises to
    7.2 in its best years, and its nodes begin with 1.35 times their centre, 6.0."""
    economy, grid = small
    axes, a = axes_of(grid), economy.arrays
    z_path = dk.draw_z_path(5000, a.P_z, np.random.default_rng(7))
    mass = dk.dispersed_mass(axes.k, grid.K_mean, 0, economy)
    K_path = dk.simulate_histogram(grid.table.numpy(), axes, mass, z_path, economy)[0][200:]
    assert grid.K[0] < K_path.min() and K_path.max() < grid.K[-1]
    assert len(a.TFP) == 1 or K_path.max() > 6.5


def test_value_of_any_economy(small):
    """V = u(c) + beta E V' of the policy as it is, up to V being linear between nine nodes of K: less than half with
    seventeen. No c does better."""
    economy, grid = small
    own, gain = bellman_in_consumption(grid)
    assert own < 2e-3 and gain < 1e-4
    finer = dk.solve_grid(economy, dataclasses.replace(SMALL, n_K_fine=17))
    assert bellman_in_consumption(finer)[0] < own / 2
    at, _ = states_at_nodes(grid, 4 * grid.K_mean)
    utils = grid.value(*at[:4]) / economy.c_ss ** (1 - economy.gamma)
    assert utils == pytest.approx(grid.values(at).numpy(), rel=1e-12)


def test_grid_grows_with_the_households(economies, small_grids):
    """From a largest k that is too small the nodes are doubled, to the same solution, and a note says so; from a centre
    of K that is not where K is, they follow."""
    enough = small_grids("toy")
    grown = dk.solve_grid(economies["toy"], dataclasses.replace(SMALL, k_max=3.0))
    assert grown.k_max > 3.0 * grown.econ.K_ss and any("largest k" in note for note in grown.notes)
    assert grown.K_mean == pytest.approx(enough.K_mean, rel=3e-3)
    assert enough.K[0] > SMALL.K_range[0] * enough.econ.K_ss  # this economy holds more capital than its steady state


def test_nodes_of_k_grow_from_Python_and_from_nowhere_else(economies, small_grids):
    """Where households hold next to nothing near the end the nodes stay as they were asked for."""
    grid = small_grids("one_z")
    assert grid.k_max == pytest.approx(SMALL.k_max * economies["one_z"].K_ss) and grid.notes == ()


def test_no_convergence_is_told():
    with pytest.raises(dk.UserError, match="^grid: no convergence in 2 updates") as error:
        dk.solve_grid(config=dataclasses.replace(SMALL, max_updates=2))
    assert "\n" not in str(error.value) and "--grid-damping" in str(error.value)
