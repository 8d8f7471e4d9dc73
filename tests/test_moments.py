"""Moments of the distribution, given and learnt: derivatives against autograd, next period's against every combination
of next states, the networks' own functions through changes of unit, and the whole way through training and judging."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import deepham_ks as dk

F64 = torch.float64
SMOKE = dataclasses.replace(dk.PRESETS["smoke"], moments="variance", learnt_moments=2)


class World:
    """An economy, networks with every layer alive, and B cross-sections of N households."""

    def __init__(self, economy, cfg=SMOKE, B=5, N=6):
        g = torch.Generator().manual_seed(4)
        self.economy, self.cfg = economy, cfg
        self.econ = dk.with_units(economy.tables(), cfg)
        shape = self.econ.M_mean.shape
        self.econ = self.econ._replace(M_mean=torch.randn(shape, generator=g, dtype=F64) / 5,
                                       M_std=0.5 + torch.rand(shape, generator=g, dtype=F64))
        Z, S = economy.income.shape
        sizes = [len(dk.initial_parameters(dk.n_inputs(self.econ, network), cfg.hidden, 0.0, 0))
                 + len(dk.initial_learnt(self.econ, cfg, 0)) for network in ("policy", "value")]
        self.thetas = [0.4 * torch.randn(P, generator=g, dtype=F64) for P in sizes]
        self.k = economy.k_min + economy.K_ss * 2 * torch.rand(B, N, generator=g, dtype=F64)
        self.s = torch.randint(S, (B, N), generator=g)
        self.z = torch.randint(Z, (B, 1), generator=g)

    def layers(self, view=0, theta=None):
        return dk.layers_of(self.thetas[view] if theta is None else theta, self.econ, self.cfg)

    @property
    def networks(self):
        return [self.layers(0), self.layers(1)]

    def seen(self, view):
        """Of the B cross-sections, as of a batch with one state of each."""
        p = self.cfg.learnt_moments
        M = dk.moments_of(self.networks, self.k, self.s, self.econ, self.cfg)[:, view]
        unit, centre = self.econ.M_mean.shape[1] ** 0.5 * self.econ.M_std[view, -p:], self.econ.M_mean[view, -p:]
        return dk.Seen(M, self.k, self.s.to(torch.int16), unit, centre)


@pytest.fixture(params=["log", "toy"])
def world(request, economies):
    return World(economies[request.param])


def test_moments_are_means_over_households(world):
    """V rows of [given, learnt]: the variance as numpy has it, Q one household at a time, in units and centres."""
    econ, (k, s) = world.econ, (world.k, world.s)
    M = dk.moments_of(world.networks, k, s, econ, world.cfg)
    assert M.shape == (len(k), 2, 3)
    raw = M * econ.M_std * 3**0.5 + econ.M_mean
    assert torch.allclose(raw[:, :, 0], ((k / world.economy.K_ss - 1) ** 2).mean(1, keepdim=True).expand(-1, 2))
    for view, layers in enumerate(world.networks):
        for b in range(len(k)):
            q = [dk.Q(layers, dk.learnt_inputs(k_i[None], s_i[None], econ))[0] for k_i, s_i in zip(k[b], s[b])]
            assert torch.allclose(raw[b, view, 1:], sum(q) / len(q), atol=1e-12)
    double = torch.ones_like(k)
    double[:, 0], double[:, 1:] = 2 * 6 / 7, 6 / 7  # the first household counts twice
    again = dk.moments_of(world.networks, torch.cat([k[:, :1], k], 1), torch.cat([s[:, :1], s], 1), econ, world.cfg)
    assert torch.allclose(dk.moments_of(world.networks, k, s, econ, world.cfg, double), again)


@pytest.mark.parametrize("name, moment", [
    ("mean", lambda k, s, e: k.mean()), ("variance", lambda k, s, e: np.mean((k / e.K_ss - 1) ** 2)),
    ("unemployment", lambda k, s, e: np.mean(s == 0)), ("limit", lambda k, s, e: np.mean(k == e.k_min))])
def test_given_moments(economies, name, moment):
    economy = economies["toy"]
    rng = np.random.default_rng(0)
    k, s = economy.k_min + rng.choice([0.0, 1.0, 5.0], 40), rng.integers(3, size=40)
    found = dk.MOMENTS[name](torch.tensor(k), torch.tensor(s), economy.tables())
    assert found.shape == (40, 1) and found.mean() == pytest.approx(moment(k, s, economy), rel=1e-12)


def test_moments_by_group_are_mean_capitals(economies):
    economy = dataclasses.replace(economies["toy"], group=[0, 1, 1])
    k, s = torch.rand(2, 50, dtype=F64), torch.arange(50).expand(2, -1) % 3
    found = dk.MOMENTS["groups"](k, s, economy.tables()).mean(1)
    share = economy.shares.sum(0)
    for group, members in enumerate(([0], [1, 2])):
        in_it = sum((s == i).double() for i in members)
        assert torch.allclose(found[:, group], (k * in_it).mean(1) / share[members].sum())


@pytest.mark.parametrize("name", ["log", "toy"])
def test_next_moments_against_every_combination_of_next_states(economies, name):
    """E[M' | z'] of six households (four where S = 3): the mean of M' over all S^N combinations of s', each with its
    probability by the dense Pi."""
    economy = economies[name]
    S = economy.income.shape[1]
    world = World(economy, B=2, N=6 if S == 2 else 4)
    found = dk.next_moments(world.networks, world.k, world.s, world.z, world.econ, world.cfg)
    for b in range(2):
        z, s = int(world.z[b]), world.s[b].numpy()
        for z_next in range(len(economy.TFP)):
            total, mass = 0.0, 0.0
            for s_next in itertools.product(range(S), repeat=len(s)):
                p = np.prod(economy.Pi[z, z_next, s, s_next])
                if p:
                    at = torch.tensor(s_next)[None]
                    M = dk.moments_of(world.networks, world.k[b : b + 1], at, world.econ, world.cfg)
                    total, mass = total + p * M[0], mass + p
            assert mass == pytest.approx(1) and torch.allclose(found[b, z_next], total, atol=1e-10)


def test_derivatives_through_the_mean_of_the_cross_section(world):
    """Of the networks' output and slope with respect to every parameter, those of Q included, by autograd."""
    econ = world.econ
    batch_k, s, z = world.k[:, 0], world.s[:, 0], world.z[:, 0]
    K = world.k.mean(1)
    m, R = dk.cash_on_hand(batch_k, s, K, z, econ)
    x, dx = dk.features(batch_k, s, m, K, z, econ), dk.feature_slopes(batch_k, m, R, econ)
    for view, (theta, sees) in enumerate(zip(world.thetas, (lambda x: x, dk.for_value))):
        seen, layers = world.seen(view), world.layers(view)
        assert torch.allclose(dk.with_moments(x, layers, seen, econ)[:, -3:], seen.M)

        def both(theta, seen=seen, sees=sees):
            layers = world.layers(theta=theta)
            return torch.stack(dk.network_and_slope(layers, sees(dk.with_moments(x, layers, seen, econ)), sees(dx)))

        auto = torch.autograd.functional.jacobian(both, theta)
        slopes, inputs = dk.learnt_slopes(layers, seen, econ), sees(dk.with_moments(x, layers, seen, econ))
        by_hand = [dk.network_jacobian(layers, inputs), dk.slope_jacobian(layers, inputs, sees(dx))]
        for want, main in zip(auto, by_hand):
            found = dk.with_learnt(main, layers, slopes)
            assert torch.allclose(found, want, atol=1e-10) and want[:, -20:].abs().max() > 1e-6


def test_steps_see_the_moments_that_the_simulation_had(world):
    """At the dates of a batch, each network its own: as kept after the simulation, and as its Q has them."""
    econ, cfg = world.econ, world.cfg
    state = dk.initial_state(econ, cfg, 0, torch.Generator().manual_seed(0))
    shape = cfg.periods, cfg.n_economies, cfg.n_agents
    g, (Z, S) = torch.Generator().manual_seed(1), world.economy.income.shape
    k, s = world.economy.K_ss * torch.rand(shape, generator=g, dtype=F64), torch.randint(S, shape, generator=g)
    for name in ("M", "M_next", "k_panel"):
        state[name] = state[name].double()
    state["z_path"] = torch.randint(Z, shape[:2], generator=g)
    dk.keep_moments(state, world.networks, k, s, econ, cfg)
    at = torch.tensor([0, 7, 150, 20])
    nothing = torch.zeros(len(at), 0, dtype=F64)
    for view in (0, 1):
        found = dk.with_moments(nothing, world.layers(view), dk.seen_by(view, state, at, econ, cfg), econ)
        assert torch.allclose(found, dk.by_date(state, "M")[at, view]) and found.std() > 1e-3


def trained(economy, cfg=SMOKE, seed=0, **options):
    return dk.solve(economy, cfg, seed=seed, device="cpu", compile="none", **options)


def test_networks_stay_the_functions_they_were_when_units_change(world):
    """recentre() moves centres and units of the moments; k' and V of the same cross-sections do not move."""
    econ = dk.with_units(world.economy.tables(dtype=torch.float32), world.cfg)
    rng = torch.Generator().manual_seed(0)
    state = dk.initial_state(econ, world.cfg, 0, rng)
    for name in ("policy", "value"):
        state[name] += 0.1 * torch.randn(state[name].shape, generator=rng)
    k, s, z = world.k.float(), world.s, world.z

    def answers():
        networks = [dk.layers_of(state[name], econ, world.cfg) for name in ("policy", "value")]
        M = dk.moments_of(networks, k, s, econ, world.cfg).unsqueeze(1)
        at = k, s, k.mean(1, keepdim=True), z
        of_value = M[..., 1, :].expand(-1, k.shape[1], -1)
        return dk.network_capital(networks[0], *at, econ, M[..., 0, :]), \
            dk.network_value(networks[1], *[x.expand_as(k) for x in at], econ, of_value)[0]

    before, units = answers(), (econ.M_mean.clone(), econ.M_std.clone())
    state["K_path"] += econ.K_mean
    state["M"].copy_(3 + 5 * torch.randn(state["M"].shape, generator=rng))
    dk.recentre(state, econ, world.cfg)
    assert (econ.M_mean - units[0]).abs().min() > 1 and (econ.M_std - units[1]).min() > 1
    assert state["M"].mean().abs() < 0.1 and abs(3**0.5 * state["M"].std() - 1) < 0.1
    for x, y in zip(before, answers()):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4)


def test_solutions_with_moments(economies, tmp_path, monkeypatch):
    """In a cross-section the policy sees its moments, without one they are as usual at K and z; a saved solution is
    the same; the histogram's rule is the policy at the histogram's moments."""
    economy = economies["toy"]
    weights = trained(economy).weights
    for name in ("policy", "value"):
        weights[name]["W1"][:, -3:] += 0.1  # after so few steps moments may not matter yet
    solution = dk.Solution(weights)
    econ, cfg = solution.econ, solution.config
    world = World(economy, B=3, N=8)
    k, s, z = world.k, world.s, world.z
    K, networks = k.mean(1, keepdim=True), list(solution.layers.values())
    M = dk.moments_of(networks, k, s, econ, cfg)
    here = solution.in_panel(k, s, K, z)
    assert torch.equal(here, solution.policy(k, s, K, z, M.unsqueeze(1)))
    usual = solution.policy(k, s, K, z)
    assert (here - usual).abs().max() > 1e-9
    assert torch.allclose(usual, torch.from_numpy(solution.next_capital(k, s, K, z)))
    (M_now, M_next), k_next = solution.now_and_next_moments(k, s, here, z), here
    assert torch.equal(M_now, M) and M_next.shape == (3, 3, 2, 3)
    assert torch.equal(M_next, dk.next_moments(networks, k_next, s, z, econ, cfg))
    given = solution.moments(k.numpy(), s.numpy())
    assert given.shape == (3, 2, 3) and torch.allclose(torch.from_numpy(given), M)
    assert np.allclose(solution.moments(k[1], s[1]), given[1])
    assert np.allclose(solution.next_capital(k, s, K, z, given[:, None]), here.numpy())
    assert np.allclose(solution.next_capital(k[1], s[1], K[1], z[1], given[1]), here[1].numpy())
    V = solution.values(k, s, K.expand_as(k), z.expand_as(s), M.unsqueeze(1).expand(3, 8, 2, 3))
    assert np.allclose(solution.value(k, s, K, z, given[:, None]), V * economy.c_ss ** (1 - economy.gamma))
    for M_bad in (given[:, None, :, :2], given[:, None, :1], 0.0):
        with pytest.raises(ValueError, match="as moments"):
            solution.next_capital(k, s, K, z, M_bad)
    solution.save(tmp_path / "w.pth")
    again = dk.load(tmp_path / "w.pth")
    assert torch.equal(again.in_panel(k, s, K, z), here) and torch.equal(again.policy(k, s, K, z), usual)
    nodes = dk.power_grid(101, economy.k_min, 8 * economy.K_ss, 4.0)
    mass = np.random.default_rng(1).dirichlet(np.ones(3 * 101)).reshape(3, 101)
    k_all, s_all = [torch.tensor(x).reshape(1, -1) for x in
                    (np.broadcast_to(nodes, mass.shape), np.indices(mass.shape)[0])]
    weight = torch.tensor(mass * mass.size).reshape(1, -1)
    of_mass = dk.moments_of(networks, k_all, s_all, econ, cfg, weight).unsqueeze(1)
    K0, z0 = float(mass.sum(0) @ nodes), 1
    want = solution.policy(k_all, s_all, torch.tensor([[K0]]), torch.tensor([[z0]]), of_mass)
    found = solution.of_mass(nodes)(mass, K0, z0)
    at_nodes = np.append(np.arange(0, 100, 5), 100)
    assert np.abs(found - want.numpy().reshape(3, -1))[:, at_nodes].max() < 1e-4 * economy.K_ss


def test_training_with_moments_learns_and_resumes_exactly(economies, tmp_path, monkeypatch):
    """Six iterations at once, and three and three; Q is not what it was at first."""
    economy, cfg = economies["log"], dataclasses.replace(SMOKE, iterations=6, final_value_steps=2)
    whole, save = trained(economy, cfg).weights, dk.save_checkpoint

    def save_and_stop(path, state):
        save(path, state)
        if state["iteration"] == 3:
            raise InterruptedError

    monkeypatch.setattr(dk, "save_checkpoint", save_and_stop)
    with pytest.raises(InterruptedError):
        trained(economy, cfg, output_dir=tmp_path)
    monkeypatch.undo()
    resumed = trained(economy, cfg, output_dir=tmp_path, resume=True).weights
    for name in ("policy", "value"):
        assert all(torch.equal(tensor, resumed[name][layer]) for layer, tensor in whole[name].items())
    assert torch.equal(whole["M_law"], resumed["M_law"]) and whole["M_law"].abs().max() > 0
    econ = dk.with_units(economy.tables(dtype=torch.float32), cfg)
    first = dk.initial_state(econ, cfg, 0, torch.Generator().manual_seed(0))
    for name in ("policy", "value"):
        moved = dk.layers_of(first[name], econ, cfg)[6] - whole[name]["V1"]
        assert moved.abs().max() > 1e-4


def test_without_moments_training_is_what_it_was_before_there_were_any(monkeypatch):
    """With none given and none learnt no function of theirs runs, networks have six layers, nothing of them is kept;
    and the same inputs under an idle moment, whose column of W1 is zero, give the same policy."""
    cfg = dataclasses.replace(SMOKE, moments="", learnt_moments=0)
    idle = dataclasses.replace(cfg, learnt_moments=1)
    with monkeypatch.context() as patch:
        for name in ("Q", "Q_jacobian", "contributions", "standard", "path_moments", "next_moments", "keep_moments"):
            patch.setattr(dk, name, lambda *args, **kwargs: pytest.fail("moments are at work"))
        found = dk.solve(None, cfg, seed=5, device="cpu", compile="none")
    assert len(found.layers["policy"]) == 6 and not found.sees_moments
    with pytest.raises(ValueError, match="nothing but K"):
        found.moments([1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="as moments"):
        found.next_capital(1.0, 0, 40.0, 1, [[0.5]])
    state = dk.initial_state(dk.with_units(dk.krusell_smith().tables("cpu", torch.float32), cfg), cfg, 5,
                             torch.Generator().manual_seed(5))
    assert not {"M", "M_next", "M_mean", "k_panel"} & state.keys()
    econ = dk.with_units(found.econ, idle)
    W1, *others = found.layers["policy"]
    layers = [torch.cat([W1, torch.zeros_like(W1[:, :1])], 1), *others]
    k, s, K, z = torch.linspace(0, 90, 50).double(), torch.arange(50) % 2, torch.full((50,), 39.0).double(), 1
    M = torch.randn(50, 1, generator=torch.Generator().manual_seed(1)).double()
    z = torch.full_like(s, z)
    assert torch.allclose(dk.network_capital(layers, k, s, K, z, econ, M), found.policy(k, s, K, z), rtol=1e-12)


def test_a_learnt_moment_is_told_by_its_figures(tmp_path, economies):
    """Preset smoke on the command line: the picture is there, correlations are between -1 and 1."""
    argv = ["--preset", "smoke", "--device", "cpu", "--learnt-moments", "1", "--output-dir", str(tmp_path / "run")]
    assert dk.main(argv) == 0
    assert (tmp_path / "run" / "figures" / "moments.png").stat().st_size > 5000
    solution = dk.load(tmp_path / "run" / dk.WEIGHTS)
    figures, _ = dk.judge_panel({"network": solution}, solution.econ, solution.config, 3, 30, 1)
    for name in ("policy", "value"):
        r = torch.stack(list(figures["network"]["moments"][name].values()))
        assert r.shape == (2, 1) and (r.abs() <= 1).all() and r.abs().min() > 0
    assert dk.main([*argv, "--evaluate"]) in (0, 1)


@pytest.mark.parametrize("flags, told", [
    (["--moments", "skewness"], "--moments: 'skewness' is none of mean, variance"),
    (["--moments", "variance,"], ""),
    (["--learnt-moments", "8", "--n-agents", "10"], "--learnt-moments: 8 moments of 10 households"),
    (["--learnt-moments", "9"], "--learnt-moments")])
def test_bad_moments(tmp_path, capsys, flags, told):
    argv = ["--preset", "smoke", "--device", "cpu", "--output-dir", str(tmp_path / "run"), *flags]
    status, error = dk.main(argv), capsys.readouterr().err
    if not told:
        assert status == 0  # an empty name is no moment
        return
    assert status == 2 and told in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--learnt-moments", "2"], ["--moments", "variance"], []])
def test_weights_of_other_moments_are_refused(tmp_path, capsys, flags):
    argv = ["--preset", "smoke", "--device", "cpu", "--output-dir", str(tmp_path)]
    dk.solve(None, dataclasses.replace(dk.PRESETS["smoke"], learnt_moments=1), device="cpu", compile="none",
             calibration=dataclasses.asdict(dk.Calibration())).save(tmp_path / dk.WEIGHTS)
    capsys.readouterr()
    assert dk.main([*argv, "--evaluate", *flags]) == 2
    assert "is of another run: config." in capsys.readouterr().err


def test_who_is_unemployed_needs_finite_economies():
    """Shocks spread evenly over households would leave nothing to learn from."""
    assert not dk.needs_noise(dk.Config()) and not dk.needs_noise(dk.Config(moments="variance,groups"))
    assert dk.needs_noise(dk.Config(learnt_moments=1)) and dk.needs_noise(dk.Config(moments="limit,unemployment"))
