"""Moments of the distribution, given and learnt: derivatives against autograd, next period's against every combination
of next states, and the whole way through training and judging."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import deepham_ks as dk

F64 = torch.float64
SMOKE = dataclasses.replace(dk.PRESETS["smoke"], moments="variance", learnt_moments=2)


@pytest.fixture(autouse=True)
def eager():
    dk.compile_kernels("none")


class World:
    """An economy, networks with every layer alive, and B cross-sections of N households, or of N nodes of infinitely
    many."""

    def __init__(self, economy, cfg=SMOKE, B=5, N=6, weighted=False):
        g = torch.Generator().manual_seed(4)
        self.economy, self.cfg, self.econ = economy, cfg, economy.tables()
        self.state = dk.initial_state(self.econ, economy, cfg, 0, g)
        for name, x in self.state.tensors().items():
            if x.is_floating_point():
                setattr(self.state, name, x.double())
        self.state.policy += 0.3 * torch.randn(self.state.policy.shape, generator=g, dtype=F64)
        layers = dk.policy_net(self.state, self.econ, cfg).layers
        self.moments, self.Q = dk.seen_moments(layers, self.econ, cfg), layers[6:]
        Z, S = economy.arrays.income.shape
        self.k = economy.k_min + economy.K_ss * 2 * torch.rand(B, N, generator=g, dtype=F64)
        self.s = torch.randint(S, (B, N), generator=g)
        self.z = torch.randint(Z, (B, 1), generator=g)
        weight = torch.rand(B, N if weighted else 0, generator=g, dtype=F64)
        self.weight = weight / weight.mean(1, keepdim=True)
        self.section = self.k, self.s, self.weight


@pytest.fixture(params=[("log", False), ("toy", False), ("toy", True)], ids=["log", "toy", "toy, weighted"])
def world(request, economies):
    name, weighted = request.param
    return World(economies[name], weighted=weighted)


def M_of(k, s, moments):
    """Moments of households, who count the same."""
    return dk.moments_of(k, s, moments, k[:, :0])


@pytest.mark.parametrize("name", ["log", "toy"])
def test_moments_are_means_over_households(economies, name):
    """[given, learnt]: the variance as numpy has it, Q one household at a time; weights count households."""
    world = World(economies[name])
    econ, k, s = world.econ, world.k, world.s
    M = M_of(k, s, world.moments)
    assert torch.allclose(M[:, 0], ((k / world.economy.K_ss - 1) ** 2).mean(1))
    for b in range(len(k)):
        q = [dk.Q(world.Q, k_i[None], s_i[None], econ)[0] for k_i, s_i in zip(k[b], s[b])]
        assert torch.allclose(M[b, 1:], sum(q) / len(q), atol=1e-12)
    double = torch.full_like(k, 6 / 7)
    double[:, 0] = 2 * 6 / 7  # the first household counts twice
    again = M_of(torch.cat([k[:, :1], k], 1), torch.cat([s[:, :1], s], 1), world.moments)
    assert torch.allclose(dk.moments_of(k, s, world.moments, double), again)


@pytest.mark.parametrize("name, moment", [
    ("mean", lambda k, s, e: k.mean()), ("variance", lambda k, s, e: np.mean((k / e.K_ss - 1) ** 2)),
    ("unemployment", lambda k, s, e: np.mean(s == 0)), ("limit", lambda k, s, e: np.mean(k == e.k_min))])
def test_given_moments(economies, name, moment):
    economy, rng = economies["toy"], np.random.default_rng(0)
    k, s = economy.k_min + rng.choice([0.0, 1.0, 5.0], 40), rng.integers(3, size=40)
    found = dk.MOMENTS[name](torch.tensor(k), torch.tensor(s), economy.tables())
    assert found.shape == (40, 1) and found.mean() == pytest.approx(moment(k, s, economy), rel=1e-12)


def test_moments_by_group_are_mean_capitals(economies):
    economy = dataclasses.replace(economies["toy"], group=[0, 1, 1])
    k, s = torch.rand(2, 50, dtype=F64), torch.arange(50).expand(2, -1) % 3
    found, share = dk.MOMENTS["groups"](k, s, economy.tables()).mean(1), economy.arrays.shares.sum(0)
    for group, members in enumerate(([0], [1, 2])):
        in_it = sum((s == i).double() for i in members)
        assert torch.allclose(found[:, group], (k * in_it).mean(1) / share[members].sum())


@pytest.mark.parametrize("name, weighted", [("log", False), ("toy", False), ("toy", True)])
def test_next_moments_against_every_combination_of_next_states(economies, name, weighted):
    """E[M' | z'] of six households (four where S = 3): the mean of M' over all S^N combinations of s', each with its
    probability by the dense Pi. So too of households who count differently."""
    economy = economies[name]
    S = economy.arrays.income.shape[1]
    world = World(economy, B=2, N=6 if S == 2 else 4, weighted=weighted)
    found = dk.next_moments(world.k, world.s, world.z, world.moments, world.econ, world.weight)
    for b in range(2):
        z, s = int(world.z[b]), world.s[b].numpy()
        for z_next in range(len(economy.arrays.TFP)):
            total, mass = 0.0, 0.0
            for s_next in itertools.product(range(S), repeat=len(s)):
                p = np.prod(economy.arrays.Pi[z, z_next, s, s_next])
                if p:
                    M = dk.moments_of(world.k[b : b + 1], torch.tensor(s_next)[None], world.moments,
                                      world.weight[b : b + 1])
                    total, mass = total + p * M[0], mass + p
            assert mass == pytest.approx(1) and torch.allclose(found[b, z_next], total, atol=1e-10)


def test_next_moments_of_households_who_stay_what_they_are():
    """Where every s leads to one s' alone nothing is drawn: moments by group of those who save k' are those of k'."""
    economy = dk.Economy(alpha=0.36, delta=0.025, TFP=[1.0], P_z=[[1.0]], Pi=np.eye(2), beta=0.99, income=[[1.0, 1.0]],
                         shares=[[0.25, 0.75]], group=[0, 1], sees_s=[[0], [1]])
    econ, k, s = economy.tables(), torch.rand(3, 8, dtype=F64), torch.arange(8).expand(3, -1) % 2
    seen = dk.seen_moments([], econ, dataclasses.replace(SMOKE, moments="groups", learnt_moments=0))
    found = dk.next_moments(k, s, torch.zeros(3, 1, dtype=torch.long), seen, econ, k[:, :0])
    assert torch.allclose(found[:, 0], M_of(k, s, seen)) and (found > 0).all()


def test_derivatives_through_the_mean_of_the_cross_section(world):
    """Q_jacobian, and the inputs with learnt moments in the place of their values, by autograd."""
    econ, cfg, state, seen = world.econ, world.cfg, world.state, world.section
    by_hand = dk.Q_jacobian(world.Q, *seen, econ)
    net, size = dk.policy_net(state, econ, cfg), by_hand.shape[2]

    def means(tail):
        theta = torch.cat([state.policy[:-size], tail])
        return dk.mean_over(dk.Q(dk.unpack(theta, dk.policy_shapes(econ, cfg))[6:], *seen[:2], econ), seen[2])

    by_graph = torch.autograd.functional.jacobian(means, state.policy[-size:])
    assert torch.allclose(by_hand, by_graph, atol=1e-12) and by_graph.abs().max() > 1e-4
    K, z = world.k.mean(1), world.z[:, 0]
    at = dk.place(world.k[:, 0], world.s[:, 0], K, z, econ)._replace(
        M=dk.moments_of(*seen[:2], world.moments, seen[2]))
    x = dk.features(at, dk.cash_on_hand(at, econ)[0], net, econ)
    assert torch.allclose(dk.with_learnt(x, world.Q, seen, net, econ), x, atol=1e-12)
    unit = 3**0.5 * state.M_std[-2:]
    assert torch.allclose(dk.learnt_slopes(world.Q, seen, net, econ), by_hand / unit.unsqueeze(1))


@pytest.mark.parametrize("shift, spread", [(0.0, 5.0), (3.0, 1.0), (3.0, 0.01)])
def test_the_policy_stays_the_function_it_was_when_units_change(world, shift, spread):
    """recentre() moves centres and units of the moments; k' of the same cross-sections does not move."""
    econ, cfg, state = world.econ, world.cfg, world.state
    at = dk.place(world.k, world.s, world.k.mean(1, keepdim=True), world.z, econ)._replace(
        M=M_of(world.k, world.s, world.moments).unsqueeze(1))
    before, units = dk.network_capital(dk.policy_net(state, econ, cfg), at, econ), state.M_std.clone()
    M = shift + spread * torch.randn(60, 4, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    dk.recentre(state, state.K_centre.expand(60, 4), M, econ, cfg)
    assert torch.allclose(state.M_mean, M.flatten(0, 1).mean(0)) and not torch.equal(state.M_std, units)
    assert torch.allclose(state.M_std, M.flatten(0, 1).std(0))
    after = dk.network_capital(dk.policy_net(state, econ, cfg), at, econ)
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-9)


def trained(economy, cfg=SMOKE, **options):
    return dk.solve(economy, cfg, device="cpu", compile="none", **options)


def test_solutions_with_moments(economies):
    """In a cross-section the policy sees its moments, without one they are as usual at K and z; the histogram's rule is
    the policy at the histogram's moments."""
    economy = economies["toy"]
    weights = trained(economy).weights
    for name in ("policy", "value"):
        weights[name]["W1"][:, -3:] += 0.1  # after so few steps moments may not matter yet
    solution = dk.Solution(weights)
    world, econ = World(economy, B=3, N=8), solution.econ
    K_low, K_high = [float(x) for x in weights["K_range"]]
    above = world.k - economy.k_min
    k = economy.k_min + above * ((K_low + K_high) / 2 - economy.k_min) / above.mean(1, keepdim=True)
    K, s, z = k.mean(1, keepdim=True), world.s, world.z
    M = M_of(k, s, solution.seen)
    here = dk.panel_policy(solution)(dk.place(k, s, K, z, econ), k[:, :0])
    at = dk.place(k, s, K, z, econ)._replace(M=M.unsqueeze(1))
    assert torch.allclose(here.double(), solution.policy(at), rtol=1e-5)
    assert (here - solution.policy(solution.usual(at))).abs().max() > 1e-3
    assert np.allclose(solution.next_capital(k, s, K, z), solution.policy(solution.usual(at)))
    given = solution.moments(k.numpy(), s.numpy())
    assert given.shape == (3, 3) and np.allclose(given, M) and np.allclose(solution.moments(k[1], s[1]), given[1])
    assert np.allclose(solution.next_capital(k, s, K, z, given[:, None]), here)
    assert np.allclose(solution.next_capital(k[1], s[1], K[1], z[1], given[1]), here[1])
    assert np.allclose(solution.value(k, s, K, z, given[:, None]),
                       solution.values(at) * economy.c_ss ** (1 - economy.gamma))
    many = solution.next_capital(k[1], s[1], K[1], z[1], given[:, None])  # M may have dimensions of its own
    assert many.shape == (3, 8) and np.allclose(many[1], here[1])
    for bad in (given[:, None, :2], given[:, None, :1], 0.0, np.full(3, np.nan)):
        with pytest.raises(ValueError, match="as moments"):
            solution.next_capital(k, s, K, z, bad)
    section = dk.cross_section(solution, at, torch.zeros(3, 0), here, torch.ones_like(k))
    assert torch.allclose(section.at.M[:, 0], M)
    assert torch.allclose(section.ahead.M[:, 0], dk.next_moments(here, s, z, solution.seen, econ, k[:, :0]))
    nodes = dk.power_grid(101, economy.k_min, 8 * economy.K_ss, 4.0)
    mass = np.random.default_rng(1).dirichlet(np.ones(303)).reshape(3, 101)
    of_mass = dk.histogram_section(solution, nodes, mass, np.broadcast_to(nodes, mass.shape), 1)
    axes = dk.Axes(nodes, None, dk.labour_nodes(economy, 1))
    found = dk.histogram_policy(solution, axes)(mass, float(mass.sum(0) @ nodes), 1)
    want = solution.policy(of_mass.at).numpy().reshape(3, 101)
    at_nodes = np.append(np.arange(0, 100, 5), 100)
    assert np.abs(found - want)[:, at_nodes].max() < 1e-9 * economy.K_ss and np.abs(found - want).max() < 0.1


def test_training_with_moments_learns_them():
    """Q is not what it was at first, and the usual moments are told."""
    cfg = dataclasses.replace(SMOKE, iterations=5)
    weights = trained(None, cfg).weights
    econ = dk.krusell_smith().tables(dtype=torch.float32)
    first = dk.initial_state(econ, dk.krusell_smith(), cfg, 0, torch.Generator().manual_seed(0))
    assert (dk.policy_net(first, econ, cfg).layers[6] - weights["policy"]["V1"]).abs().max() > 1e-5
    assert weights["M_law"].abs().max() > 0 and "V1" not in weights["value"]


def test_without_moments_nothing_of_theirs_is_kept():
    """And the same inputs under an idle moment, whose column of W1 is zero, give the same policy."""
    cfg = dataclasses.replace(SMOKE, moments="", learnt_moments=0)
    found = trained(None, cfg)
    assert set(found.weights["policy"]) == {"W1", "b1", "W2", "b2", "w3", "b3"} and found.seen is None
    with pytest.raises(ValueError, match="nothing but K"):
        found.moments([1.0, 2.0], [0, 1])
    K = found.K_mean
    with pytest.raises(ValueError, match="as moments"):
        found.next_capital(1.0, 0, K, 1, [[0.5]])
    W1, *others = found.net.layers
    one = torch.ones(1, dtype=F64)
    idle = dk.Net([torch.cat([W1, torch.zeros_like(W1[:, :1])], 1), *others], found.net.K_centre, one, one)
    at = dk.place(torch.linspace(0, 90, 50, dtype=F64), torch.arange(50) % 2, torch.full((50,), K, dtype=F64),
                  torch.ones(50, dtype=torch.long), found.econ)
    seen = at._replace(M=torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=F64))
    assert torch.allclose(dk.network_capital(idle, seen, found.econ), found.policy(at), rtol=1e-12)


def test_a_learnt_moment_is_told_by_its_correlations():
    """A learnt moment that is K, or the share of those with the lowest income, correlates with it by one."""
    solution = trained(None, dataclasses.replace(SMOKE, moments="", iterations=2))
    g, sections = torch.Generator().manual_seed(0), []
    for _ in range(30):
        k, s = 50 * torch.rand(4, 20, generator=g, dtype=F64), torch.randint(2, (4, 20), generator=g)
        at = dk.place(k, s, k.mean(1, keepdim=True), torch.ones(4, 1, dtype=torch.long), solution.econ)
        section = dk.cross_section(solution, at, torch.zeros(4, 0), k, torch.ones_like(k))
        M = torch.stack([3 - 2 * k.mean(1), (s == 0).double().mean(1)], 1).unsqueeze(1)
        sections.append(section._replace(at=section.at._replace(M=M)))
    r = dk.meaning(sections, solution.econ, 2)
    assert r["K"][0] == pytest.approx(-1) and r["unemployment"][1] == pytest.approx(1)
    assert abs(r["K"][1]) < 0.4 and abs(r["unemployment"][0]) < 0.4


@pytest.mark.parametrize("flags, told", [
    (["--moments", "skewness"], "--moments: 'skewness' is none of mean, variance"),
    (["--learnt-moments", "8", "--n-agents", "10"], "--learnt-moments: 8 moments of 10 households"),
    (["--learnt-moments", "9"], "--learnt-moments")])
def test_bad_moments(tmp_path, capsys, flags, told):
    argv = ["--preset", "smoke", "--device", "cpu", "--output-dir", str(tmp_path / "run"), *flags]
    status, error = dk.main(argv), capsys.readouterr().err
    assert status == 2 and told in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_empty_name_is_no_moment():
    econ = dk.krusell_smith().tables()
    sees = [dk.n_moments(econ, dataclasses.replace(SMOKE, moments=names)) for names in ("", "variance", "variance,")]
    assert sees == [2, 3, 3]


def test_who_sees_which_households_earn():
    """They have tolerances of their own: learnt moments and unemployment tell it, moments of k do not."""
    sees = [dk.sees_who_earns(dk.Config(**change)) for change in (
        {}, {"moments": "variance,groups"}, {"learnt_moments": 1}, {"moments": "limit,unemployment"})]
    assert sees == [False, False, True, True]


def test_the_published_algorithm_learns_a_moment(tmp_path, capsys):
    """Each period of a roll-out sees the cross-section of its own date."""
    sizes = ["--n-agents", "20", "--n-economies", "4", "--periods", "40", "--horizon", "20", "--batch", "20"]
    short = ["--iterations", "1", "--policy-steps", "2", "--value-steps", "2", "--eval-economies", "2",
             "--eval-periods", "40", "--irf-paths", "2", "--irf-periods", "2", "--grid", "none", "--compile", "none",
             "--device", "cpu"]
    flags = ["--preset", "paper", "--learnt-moments", "1", *sizes, *short, "--output-dir", str(tmp_path)]
    assert dk.main(flags) == 0 and not capsys.readouterr().err
    assert dk.load(tmp_path / dk.WEIGHTS).moments(np.linspace(1, 60, 20), 1).shape == (1,)
