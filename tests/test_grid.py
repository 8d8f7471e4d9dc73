"""The grid solution against known coefficients, its own equations, and finer grids."""

import dataclasses

import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
import torch

import deepham_ks as dk

KNOWN = np.array([[0.1245, 0.9654], [0.1376, 0.9633]])  # ln K' = a + b ln K, converged grid, rounded to four digits
CALIBRATION = dk.Calibration()


def forecast(alm, K):
    return np.exp(alm[:, :1] + alm[:, 1:] * np.log(K))


@pytest.fixture(scope="module")
def nodes(converged, econ):
    """States (k, eps, K, z, K') at the nodes of the converged policy table with k <= 200, K' by its law of motion;
    only those whose K' lies on the table, for there is no policy beyond."""
    n_K, n_k = converged.table.shape[2:]
    k = dk.power_grid(n_k, converged.k_max, converged.exponent)
    K = np.linspace(converged.K_low, converged.K_high, n_K)
    z, eps, K, k = [x.ravel() for x in np.meshgrid([0, 1], [0, 1], K, k[k <= 200], indexing="ij")]
    alm = converged.alm_coefficients[z]
    K_next = np.exp(alm[:, 0] + alm[:, 1] * np.log(K))
    at = (K_next >= converged.K_low) & (K_next <= converged.K_high)
    return dk.States(*[torch.tensor(x[at]) for x in (k, eps, K, z, K_next)])


def test_attributes(converged):
    assert converged.alm_coefficients.shape == (2, 2) and converged.alm_r2.shape == (2,)
    assert converged.next_capital(40.0, 1, 39.0, 1).shape == ()


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
    for eps in (0, 1):
        for z in (0, 1):
            for K in (25.0, 29.4, 37.0, 41.3, 52.9, 60.0):  # beyond the table too
                k_next = converged.next_capital(off_nodes, eps, K, z)
                assert np.isfinite(k_next).all() and (k_next >= 0).all() and (np.diff(k_next) >= 0).all()
    assert converged.next_capital(0.0, 0, 39.0, 0) == 0 < converged.next_capital(0.0, 1, 39.0, 0)


def test_euler_equation_at_the_nodes(converged, econ, nodes):
    """u'(c) = beta E[R' u'(c')] with K' of the law of motion. The grid is converged when k' is right to 0.001, and c
    is above 0.3 everywhere, so 3.3e-3 at most; the mean is to beat the 10^-4.11 of simulated states in the design."""
    c = dk.cash_on_hand(nodes.k, nodes.eps, nodes.K, nodes.z, econ)[0] - converged.policy(*nodes[:4])
    assert c.min() > 0.3
    error = dk.euler_errors(converged, nodes, econ).abs()
    assert len(error) > 0.8 * len(nodes.k)
    assert error.mean() < 10**-4.11
    assert error.max() < 3.3e-3


def test_euler_equation_by_loops(converged):
    """The same at single states, from the equations in plain Python: nothing of the script but next_capital."""
    P = {(0, 0): ((0.525, 0.35), (0.03125, 0.09375)), (0, 1): ((0.038889, 0.836111), (0.002083, 0.122917)),
         (1, 0): ((0.09375, 0.03125), (0.291667, 0.583333)), (1, 1): ((0.009115, 0.115885), (0.024306, 0.850694))}

    def resources(k, eps, K, z):
        u = (0.10, 0.04)[z]
        L, Z = (1 - u) / 0.9, (0.99, 1.01)[z]
        R, w = 1 - 0.025 + 0.36 * Z * (K / L) ** -0.64, 0.64 * Z * (K / L) ** 0.36
        return R * k + w * (0.15 if eps == 0 else (1 - 0.15 * u / L) / 0.9), R

    for z in (0, 1):
        for eps in (0, 1):
            for k, K in ((3.0, 38.0), (20.0, 40.5), (80.0, 42.0)):
                k_next = float(converged.next_capital(k, eps, K, z))
                K_next = float(forecast(KNOWN, K)[z, 0])
                right = 0.0
                for z1 in (0, 1):
                    for eps1 in (0, 1):
                        m, R = resources(k_next, eps1, K_next, z1)
                        c = m - float(converged.next_capital(k_next, eps1, K_next, z1))
                        right += 0.99 * P[z, eps][z1][eps1] * R / c
                c = resources(k, eps, K, z)[0] - k_next
                # K' of rounded coefficients is off by 0.023%, R' by 0.64 x 0.035 x that and c' by less than it
                assert c * right == pytest.approx(1, abs=5e-4)


def test_value_solves_its_bellman_equation(converged, econ, nodes):
    """V = u(c) + beta E V' with the policy's own c, and no c does better: 0.001 utils on average, a tenth of
    which would still be more than the policy's own error, 0.004 at most: the tolerances of a whole run."""
    own, best = dk.bellman_errors(converged, dk.States(*[x[::7] for x in nodes]), econ)
    for error in (own.abs(), best.abs()):
        assert error.mean() < 0.001 and error.max() < 0.004
    assert (best >= own).all()
    assert (best - own).max() < 1e-4


def test_value_slope_is_marginal_utility(converged, econ):
    """The envelope theorem: V_k = R u'(c), over steps wide enough that the table's kinks do not show."""
    k = np.linspace(5, 150, 30)
    z, eps, K, k = [torch.tensor(x.ravel()) for x in np.meshgrid([0, 1], [0, 1], [37.0, 41.0], k, indexing="ij")]
    slope = (converged.values(k + 1, eps, K, z) - converged.values(k - 1, eps, K, z)) / 2
    m, R = dk.cash_on_hand(k, eps, K, z, econ)
    envelope = R / (m - converged.policy(k, eps, K, z))
    assert (slope / envelope - 1).abs().max() < 0.01


def test_histogram_keeps_mass_mean_and_unemployment(converged, econ):
    """One period at a time: K' is the mean of k' over the histogram, unemployment is u(z')."""
    numbers = dk.build_economy(CALIBRATION)
    n_K, n_k = converged.table.shape[2:]
    k = dk.power_grid(n_k, converged.k_max, converged.exponent)
    K = np.linspace(converged.K_low, converged.K_high, n_K)
    mass = scipy.stats.gamma.pdf(k[1:], 4.7, scale=39 / 4.7) * np.diff(k)
    mass = np.append(0, mass / mass.sum()) * np.array([[0.04], [0.96]])
    z_path = np.array([1, 1, 0, 0, 1, 0, 1, 1])
    for z, z_next in zip(z_path, z_path[1:]):
        K_path, after = dk.simulate_histogram(converged.table.numpy(), k, K, mass, np.array([z, z_next]), numbers)
        _, one_period = dk.simulate_histogram(converged.table.numpy(), k, K, mass, np.array([z]), numbers)
        now = (mass * k).sum()
        k_next = converged.next_capital(k, np.array([[0], [1]]), now, z)
        assert K_path == pytest.approx([now, (mass * k_next).sum()], rel=1e-10)
        assert one_period.sum() == pytest.approx(1, abs=1e-12)
        # the state before the last transition: move by hand to its employment in z_next
        moved = np.stack([np.zeros(n_k), np.zeros(n_k)])
        right = scipy.interpolate.interp1d(k, np.arange(n_k))(k_next)
        low = np.minimum(right.astype(int), n_k - 2)
        for eps in (0, 1):
            np.add.at(moved[eps], low[eps], mass[eps] * (1 - (right - low)[eps]))
            np.add.at(moved[eps], low[eps] + 1, mass[eps] * (right - low)[eps])
        p = np.asarray(econ.p_employed)[z, z_next]
        mass = np.stack([(1 - p) @ moved, p @ moved])
        assert mass[0].sum() == pytest.approx((0.10, 0.04)[z_next], abs=1e-12)
        assert after.sum() == pytest.approx(1, abs=1e-12)


def test_histogram_agrees_with_households(converged, econ):
    """Two routes to the cross-section on one path of z: Young's histogram and 20,000 households."""
    numbers = dk.build_economy(CALIBRATION)
    panel = dk.initial_panel(1, 20_000, econ, torch.Generator().manual_seed(1), torch.float64)
    path = [(k, eps, K.item(), z.item()) for k, eps, K, z, _ in
            dk.simulate(converged.policy, panel, 150, econ, torch.Generator().manual_seed(2))]
    z_path, K_households = np.array([p[3] for p in path]), np.array([p[2] for p in path])
    n_K, n_k = converged.table.shape[2:]
    k = dk.power_grid(n_k, converged.k_max, converged.exponent)
    K = np.linspace(converged.K_low, converged.K_high, n_K)
    start = np.zeros((2, n_k))
    position = np.interp(path[0][0].numpy().ravel(), k, np.arange(n_k))
    low, eps = np.minimum(position.astype(int), n_k - 2), path[0][1].numpy().ravel()
    np.add.at(start, (eps, low), (1 - (position - low)) / 20_000)
    np.add.at(start, (eps, low + 1), (position - low) / 20_000)
    K_histogram, mass = dk.simulate_histogram(converged.table.numpy(), k, K, start, z_path, numbers)
    # K of households strays with their own unemployment: income noise of 3 x 0.3 / sqrt(20,000) a quarter at most,
    # 0.0064, correlated for two quarters and piling up over at most 150 with decay 0.965: four deviations are 0.2
    assert np.abs(K_histogram - K_households).max() < 0.2
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    households = path[-1][0].numpy().ravel()
    # W1 of 20,000 draws of std 19 is about 19 x 0.8 / sqrt(20,000) = 0.11, and the means may stray by 0.2
    assert scipy.stats.wasserstein_distance(k, households, mass.sum(0)) < 0.35


def test_regression_recovers_an_exact_law():
    """Also over several economies at once, and NaN where a state never comes."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (300, 3))
    ln_K = np.full((300, 3), 3.6)
    for t in range(299):
        ln_K[t + 1] = KNOWN[z[t], 0] + KNOWN[z[t], 1] * ln_K[t]
    alm, r2 = dk.regress_law_of_motion(np.exp(ln_K), z)
    assert alm == pytest.approx(KNOWN, abs=1e-9) and r2 == pytest.approx(1, abs=1e-9)
    alone, _ = dk.regress_law_of_motion(np.exp(ln_K[:, 1]), z[:, 1])
    assert alone == pytest.approx(KNOWN, abs=1e-9)


def test_refinement(converged):
    """Twice the nodes of k and K: the household problem moves k' by less than 0.001 on [0, 200], and the
    distribution of the same households under it, on twice the points of the table, by less than 0.02 in W1."""
    base = dk.GridConfig()
    fine = dataclasses.replace(base, n_k=2 * base.n_k, n_K=2 * base.n_K)
    numbers = dk.build_economy(CALIBRATION)
    nodes = dk.household_nodes(fine, numbers.K_ss, numbers)
    z, eps, K, k = np.meshgrid([0, 1], [0, 1], nodes.K, nodes.k, indexing="ij")
    c = nodes.m - converged.next_capital(k, eps, K, z)
    for _ in range(10):
        c, k_endo, change = dk.solve_household(c, converged.alm_coefficients, nodes, numbers, fine)
        if change < fine.tolerance:
            break
    assert change < fine.tolerance
    k_low = np.linspace(0, 200, 1601)
    z, eps, K, k = np.meshgrid([0, 1], [0, 1], nodes.K, k_low, indexing="ij")
    finer = dk.invert(k_endo, nodes, k_low)
    assert np.abs(finer - converged.next_capital(k, eps, K, z)).max() < 0.001

    k = dk.power_grid(2 * base.n_k_fine - 1, fine.k_max, fine.exponent)
    K = np.linspace(converged.K_low, converged.K_high, 2 * base.n_K_fine - 1)
    table = dk.invert(scipy.interpolate.CubicSpline(nodes.K, k_endo, axis=2)(K), nodes, k)
    economy = dk.build_economy(CALIBRATION, dtype=torch.float64)
    distributions = []
    for grid in (converged, dataclasses.replace(converged, table=torch.from_numpy(table))):
        panel = dk.initial_panel(4, 500, economy, torch.Generator().manual_seed(1), torch.float64)
        path = dk.simulate(grid.policy, panel, 1500, economy, torch.Generator().manual_seed(2))
        pooled = [k.flatten() for t, (k, *_) in enumerate(path) if t % 20 == 0 and t >= 500]
        distributions.append(np.concatenate(pooled))
    assert 0 < scipy.stats.wasserstein_distance(*distributions) < 0.02


def test_published_setting_is_close(converged):
    """100 nodes with exponent 7 on [0, 1000], 4 nodes of K on [30, 50], splines: |dk'| below the .006 / .017 that the
    design found for the published policy."""
    published = dk.PUBLISHED_GRID
    econ = dk.build_economy(CALIBRATION)
    nodes = dk.household_nodes(published, econ.K_ss, econ)
    assert (published.n_k, published.exponent, published.k_max, published.n_K) == (100, 7, 1000, 4)
    assert nodes.K == pytest.approx(np.linspace(30, 50, 4))
    grid = dk.solve_grid(config=published)
    states = np.meshgrid(np.linspace(0.5, 160, 640), [0, 1], [37, 39.5, 42], [0, 1], indexing="ij")
    gap = np.abs(grid.next_capital(*states) - converged.next_capital(*states))
    assert 0 < gap.mean() < 0.006 and gap.max() < 0.017


@pytest.mark.parametrize("changes", [{"gamma": 2.0}, {"mu": 0.0, "tfp_shock": 0.02}, {"gamma": 5.0}, {"beta": 0.95}],
                         ids=str)
def test_other_calibrations_converge(changes):
    """The smoke grid follows the calibration: k' within the budget and Euler errors as small as on its own nodes."""
    cal = dk.Calibration(**changes)
    grid, econ = dk.solve_grid(cal, dk.SMOKE_GRID), dk.build_economy(cal, dtype=torch.float64)
    assert (grid.alm_r2 > 0.999).all() and (np.abs(grid.alm_coefficients[:, 1] - 0.95) < 0.05).all()
    k, K = econ.K_ss * np.linspace(0.1, 4, 50), econ.K_ss * np.linspace(0.95, 1.1, 4)
    z, eps, K, k = [x.ravel() for x in np.meshgrid([0, 1], [0, 1], K, k, indexing="ij")]
    alm = grid.alm_coefficients[z]
    states = dk.States(*[torch.tensor(x) for x in (k, eps, K, z, np.exp(alm[:, 0] + alm[:, 1] * np.log(K)))])
    error = dk.euler_errors(grid, states, econ).abs()
    assert error.mean() < 1e-3  # 100 nodes for 400: the spline's error, of fourth order, is 256 times 10^-5 at most
