"""The loop: from scratch to a solution, what moves the policy and what does not, rates, laws, centres, the end."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepham_ks as dk

SMOKE = dataclasses.replace(dk.PRESETS["smoke"], iterations=6)
LEARNS = dataclasses.replace(SMOKE, n_agents=40, batch=128, horizon=24, periods=40, hidden=10, iterations=12)
F64 = torch.float64


@pytest.fixture(autouse=True)
def eager():
    dk.compile_kernels("none")


class Bare:
    """Around the loop nothing: an iteration is run once, and watched."""

    def __init__(self, watch=lambda: None):
        self.after_iteration = watch

    def run(self, iteration):
        figures = iteration().tolist()
        return dict(zip(dk.HISTORY[1:], figures)) | {"watched": figures[-len(dk.WATCHED) :], "seconds": 0.0}


@pytest.fixture
def without_V(monkeypatch):
    """V, which moves no policy, takes seconds to fit."""
    monkeypatch.setattr(dk, "fit_value", lambda *given: None)


def begin(cfg, economy=None, seed=0):
    """(tables, state, generator) before the first iteration."""
    economy = economy or dk.krusell_smith()
    econ, rng = economy.tables("cpu", torch.float32), torch.Generator().manual_seed(seed)
    return econ, dk.initial_state(econ, economy, cfg, seed, rng), rng


def train(cfg, economy=None, seed=0):
    econ, state, rng = begin(cfg, economy, seed)
    dk.learn(state, econ, cfg, rng, Bare())
    return state


def everywhere(state, econ):
    """Households at every s and z, k from the limit to four times and K from .7 to 1.8 times the steady state's, in the
    precision of the tables, seeing usual moments."""
    K = econ.K_ss * np.linspace(0.7, 1.8, 9)
    at = dk.on_grid(dk.Axes(econ.k_min + econ.K_ss * np.linspace(0, 4, 40), K, econ.L[:, None].numpy()), econ)
    at = dk.At(*[x.to(econ.TFP.dtype) if x.is_floating_point() else x for x in at])
    return at._replace(M=(state.M_mean + state.M_std).to(econ.TFP.dtype).expand(*at.k.shape, -1))


# ------------------------------------------------------------------------------------------------ from scratch


@pytest.fixture(scope="module")
def trained():
    """The default economy from scratch, at a tenth of the default's work an iteration: 18 seconds."""
    cfg = dataclasses.replace(dk.Config(), n_economies=12, periods=80, horizon=60, batch=512, hidden=16, iterations=46,
                              averaging=10)
    return dk.solve(None, cfg, seed=0, device="cpu")


def test_the_default_economy_is_learnt_from_scratch(trained, smoke_grid):
    """Against the grid, with bounds about twice what is left at these sizes."""
    path = smoke_grid.K_mean * np.linspace(0.95, 1.05, 50)
    distance = dk.policy_distance(trained, smoke_grid, path)
    assert trained.weights["history"]["euler"][-1] < 2.4e-4
    assert trained.K_mean == pytest.approx(smoke_grid.K_mean, abs=0.8)  # over other paths of z
    assert distance["mean"] < 0.004 and distance["max"] < 0.018, distance
    cfg = dataclasses.replace(trained.config, eval_periods=500)
    figures, _ = dk.judge_limit(trained, cfg)
    assert figures["euler_log10"]["mean"] < -4.4 and figures["bellman_own_c"]["mean"] < 2e-4, figures


@pytest.mark.parametrize("N", [0, 40])
def test_every_economy_learns(economy, N, without_V):
    """The loop runs with any S and Z, its figures are numbers, and log c comes nearer to its first-order condition, in
    economies of infinitely many households and of 40."""
    state = train(dataclasses.replace(LEARNS, n_agents=N), economy)
    assert state.iteration == LEARNS.iterations
    assert all(len(column) == LEARNS.iterations and np.isfinite(column).all() for column in state.history.values())
    assert state.history["policy_residual"][-1] < state.history["policy_residual"][0] / 2
    assert state.k.min() >= economy.k_min
    assert set(state.s.flatten().tolist()) <= set(range(len(economy.arrays.beta)))


HARD = {  # flags, and the mean Euler error that is allowed: about twice what was left at these sizes
    "risk aversion 10": (dict(gamma=10.0), 3e-3),
    "hardly any benefits": (dict(gamma=5.0, mu=0.05, u_bad=0.15, u_good=0.08), 1.6e-3),
    "impatient and averse to risk": (dict(gamma=4.0, beta=0.94, delta=0.08), 1.4e-4),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags, allowed", HARD.values(), ids=HARD)
def test_hard_calibrations_are_learnt(flags, allowed):
    """At a tenth of the default's sizes, on wide roll-outs: errors of .0016, .0008 and .00006."""
    cfg = dataclasses.replace(dk.Config(), n_economies=12, periods=120, horizon=60, batch=384, hidden=16,
                              iterations=34, averaging=8)
    history = dk.solve(dk.Calibration(**flags), cfg, device="cpu").weights["history"]
    assert history["euler"][-1] < allowed, history["euler"]


def test_deep_debt_can_be_learnt(economies, without_V):
    """Half the debt that the poorest could ever pay: the first simulations stay near the steady state."""
    toy = economies["toy"]
    k_min = -0.5 * toy.arrays.income.min() * toy.w_ss / (toy.R_ss - 1)
    state = train(dataclasses.replace(SMOKE, n_agents=50, iterations=2), dataclasses.replace(toy, k_min=k_min))
    assert 0.5 < state.k.mean() / toy.K_ss < 2 and state.k.min() >= k_min


# ------------------------------------------------------------------------------------------------ what V does


@pytest.mark.parametrize("change", [{}, {"learnt_moments": 1}], ids=str)
def test_V_does_not_move_the_policy(monkeypatch, change):
    """Other weights of V from the start, or V never fitted: every tensor but V's own is bit for bit the same."""
    cfg = dataclasses.replace(SMOKE, iterations=4, **change)
    as_it_is = train(cfg)
    econ, other, rng = begin(cfg)
    other.value.add_(torch.randn(other.value.shape, generator=torch.Generator().manual_seed(9)))
    dk.learn(other, econ, cfg, rng, Bare())
    monkeypatch.setattr(dk, "fit_value", lambda *given: None)
    never = train(cfg)
    assert not torch.equal(as_it_is.value, other.value) and not torch.equal(as_it_is.value, never.value)
    assert torch.equal(as_it_is.policy, other.policy)
    at = everywhere(as_it_is, econ)  # centres of inputs may move while V is fitted, the function may not
    ours, theirs = [dk.network_capital(dk.policy_net(x, econ, cfg), at, econ) for x in (as_it_is, never)]
    assert torch.equal(as_it_is.policy, never.policy) or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    for name in ("K_law", "k", "s", "z", "k_range", "K_centre"):
        assert torch.equal(getattr(as_it_is, name), getattr(other, name)), name
    assert as_it_is.history["euler"] == other.history["euler"] == never.history["euler"]


@pytest.mark.parametrize("name, changes", [("log", {}), ("toy", {}), ("toy", {"equilibrium": "game", "players": 9})])
def test_fitting_V_lowers_the_bellman_error_and_leaves_the_policy(economies, name, changes):
    economy, cfg = dataclasses.replace(economies[name], **changes), dataclasses.replace(LEARNS, iterations=8)
    econ, state, rng = begin(cfg, economy)
    real = dk.fit_value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "fit_value", lambda *given: None)
        dk.learn(state, econ, cfg, rng, Bare())

    def bellman_error(batch):
        class Both(dk.Policy):
            def policy(self, at):
                return dk.network_capital(dk.policy_net(state, econ, cfg), at, econ)

            def values(self, at):
                return dk.network_value(dk.value_net(state, econ, cfg), at, econ)[0]

        Both.econ = econ
        return dk.bellman_errors(Both(), batch.at, batch.ahead)[0].abs().mean().item()

    policy, centre, law = state.policy.clone(), state.K_centre.clone(), state.K_law.clone()
    with torch.no_grad():
        near = dataclasses.replace(cfg, wide_share=0.0)
        batch = dk.roll_out_households(state, dk.simulate_on(state, econ, cfg, rng), econ, near, rng)
        state.K_law.copy_(law)
        before = bellman_error(batch)
        real(state, econ, cfg, rng)
        after = bellman_error(batch)
    assert after < before / 8, (before, after)
    assert torch.equal(state.K_law, law)
    at = everywhere(state, econ)
    earlier = dataclasses.replace(state, policy=policy, K_centre=centre)
    old, new = [dk.network_capital(dk.policy_net(x, econ, cfg), at, econ) for x in (earlier, state)]
    assert torch.allclose(old, new, rtol=1e-4, atol=1e-4 * economy.K_ss)


def test_V_is_fitted_where_the_policy_leads(monkeypatch):
    """Roll-outs start anywhere until the policy is final, then in the simulated cross-section alone."""
    shares, real = [], dk.sample_households
    monkeypatch.setattr(dk, "sample_households", lambda *of: (shares.append(of[3].wide_share), real(*of))[1])
    train(SMOKE)
    assert shares == [SMOKE.wide_share] * SMOKE.iterations + [0.0] * dk.VALUE_ROUNDS and SMOKE.wide_share > 0


# ------------------------------------------------------------------------------------------------ the start


def test_initial_policy_keeps_the_steady_state(economy):
    """Who has what the representative household has, K_ss + c_ss, consumes c_ss: K stays where it is. All consume the
    same share of what they have above the limit."""
    econ, state, _ = begin(SMOKE, economy)
    at = everywhere(state, econ)
    m, _ = dk.cash_on_hand(at, econ)
    c = m - dk.network_capital(dk.policy_net(state, econ, SMOKE), at, econ)
    share = economy.c_ss / (economy.K_ss + economy.c_ss - economy.k_min)
    assert torch.allclose(c, share * (m - economy.k_min), rtol=1e-4, atol=1e-5 * economy.c_ss)


def test_initial_value_is_steady_state_consumption_for_ever(economy):
    econ, state, _ = begin(SMOKE, economy)
    at = everywhere(state, econ)
    V, V_k = dk.network_value(dk.value_net(state, econ, SMOKE), at, econ)
    for_ever = econ.annuity[at.z, at.s] * dk.utility(torch.tensor(econ.c_ss), econ)
    assert torch.allclose(V, for_ever, rtol=1e-4, atol=1e-4) and not V_k.any()


def test_what_begins_with_weights_of_zero():
    """Moments come in as they are needed, and so does the square of ln K, far off under the first policies."""
    cfg = dataclasses.replace(SMOKE, moments="variance", learnt_moments=1)
    econ, state, _ = begin(cfg)
    policy, value = dk.policy_net(state, econ, cfg).layers[0], dk.value_net(state, econ, cfg).layers[0]
    n = policy.shape[1]
    assert (policy == 0).all(0).nonzero().flatten().tolist() == [n - 2, n - 1]
    assert (value == 0).all(0).nonzero().flatten().tolist() == [0, n - 1, n]


def test_the_same_seed_is_the_same_start_and_another_is_not():
    starts = [begin(SMOKE, seed=seed)[1] for seed in (3, 3, 4)]
    for name in ("policy", "value", "k"):
        first, again, other = [getattr(state, name) for state in starts]
        assert torch.equal(first, again) and not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------ one iteration


class NothingFromTheHost(TorchDispatchMode):
    """Refuses a tensor made of Python numbers, an index that is a list, a number read back: no CUDA graph can hold
    them."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [{}, {"n_agents": 0, "moments": "variance,groups"}, {
    "moments": "unemployment", "learnt_moments": 1}, {"n_agents": 0, "learnt_moments": 1}], ids=str)
@pytest.mark.parametrize("name, equilibrium", [("log", "market"), ("toy", "planner"), ("one_z", "game")])
def test_an_iteration_neither_takes_from_the_host_nor_waits_for_it(economies, name, equilibrium, change, without_V):
    cfg, economy = dataclasses.replace(SMOKE, **change), economies[name]
    econ, state, rng = begin(cfg, dataclasses.replace(economy, equilibrium=equilibrium))
    guarded = []

    class Watched(Bare):
        def run(self, iteration):
            def strictly():
                with NothingFromTheHost():
                    guarded.append(iteration())
                return guarded[-1]
            return super().run(strictly if state.iteration else iteration)

    dk.learn(state, econ, dataclasses.replace(cfg, iterations=2), rng, Watched())
    assert len(guarded) == 1


def test_nothing_that_changes_hides_outside_the_state(without_V):
    """An iteration from the same tensors and the same random numbers is the same, whatever came in between: what a
    checkpoint, a taken-back iteration and a CUDA graph count on."""
    cfg, ends = dataclasses.replace(SMOKE, learnt_moments=1, iterations=4), []
    econ, state, rng = begin(cfg)

    class Twice(Bare):
        def run(self, iteration):
            before, at = {name: x.clone() for name, x in state.tensors().items()}, rng.get_state()
            for _ in range(2):
                for name, x in state.tensors().items():
                    x.copy_(before[name])
                rng.set_state(at)
                figures = super().run(iteration)
                ends.append({name: x.clone() for name, x in state.tensors().items()} | figures)
            return figures

    dk.learn(state, econ, cfg, rng, Twice())
    for first, again in zip(ends[::2], ends[1::2]):
        for name, x in first.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(again[name])) or name == "seconds", name


def test_euler_errors_of_an_iteration_are_the_judges(economies):
    """The column euler is the mean Euler error, by the judge's function, at the states that taught, under the policy
    that the iteration began with."""
    economy, kept = economies["toy"], {}
    econ, state, rng = begin(SMOKE, economy)
    real = dk.roll_out_households

    def keep(state, *rest):
        kept.update(policy=state.policy.clone(), centre=state.K_centre.clone(), batch=real(state, *rest))
        return kept["batch"]

    def euler():
        if state.iteration == SMOKE.iterations:
            before = dataclasses.replace(state, policy=kept["policy"], K_centre=kept["centre"])
            net = dk.policy_net(before, econ, SMOKE)
            double = dk.Net([layer.double() for layer in net.layers], *[x.double() for x in net[1:]])
            tables = economy.tables()

            class Stub(dk.Policy):
                econ = tables

                def policy(self, at):
                    return dk.network_capital(double, at, tables)

            at, ahead = [type(x)(*[part.double() if part.is_floating_point() else part for part in x])
                         for x in (kept["batch"].at, kept["batch"].ahead)]
            kept["error"] = dk.euler_errors(Stub(), at, ahead).abs().nanmean().item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dk, "roll_out_households", keep)
        patch.setattr(dk, "fit_value", lambda *given: None)
        dk.learn(state, econ, SMOKE, rng, Bare(euler))
    assert state.history["euler"][-1] == pytest.approx(kept["error"], rel=2e-3)


@pytest.mark.parametrize("N", [0, 50])
@pytest.mark.parametrize("k_min", [0.0, 20.0])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_economies_are_scaled_before_each_simulation(k_min, spread, N):
    """K - k_min by up to the spread, evenly, also where every household has to hold some capital."""
    economy = dataclasses.replace(dk.krusell_smith(), k_min=k_min)
    cfg = dataclasses.replace(SMOKE, K_spread=spread, n_economies=64, n_agents=N)
    econ, state, rng = begin(cfg, economy)
    start = dk.mean_over(state.k, state.weight)
    with torch.no_grad():
        paths = dk.simulate_on(state, econ, cfg, rng)
    scale = (paths.at.K[0] - k_min) / (start - k_min)
    assert (scale - 1).abs().max() <= spread + 1e-5 and scale.std() == pytest.approx(spread / np.sqrt(3), rel=0.3,
                                                                                   abs=1e-5)
    assert state.k.min() >= k_min


def test_groups_are_scaled_each_by_a_factor_of_its_own():
    economy = dk.Economy(alpha=0.36, delta=0.025, TFP=[1.0], P_z=[[1.0]], Pi=np.eye(2), beta=0.99, income=[[1.0, 1.0]],
                         shares=[[0.25, 0.75]], group=[0, 1], sees_s=[[0], [1]])
    cfg = dataclasses.replace(SMOKE, K_spread=0.3, n_economies=16, n_agents=40, moments="groups")
    econ, state, rng = begin(cfg, economy)
    k, s = state.k.clone(), state.s.clone()
    with torch.no_grad():
        ratio = dk.scaled(state, econ, cfg, rng).k / k
    of = torch.stack([ratio.masked_fill(s != i, 0).sum(1) / (s == i).sum(1) for i in (0, 1)])
    assert torch.allclose(ratio, of.T.gather(1, s), rtol=1e-4)
    assert (of[0] - of[1]).abs().min() > 1e-4 and of.min() > 0.69 and of.max() < 1.31


@pytest.mark.parametrize("N", [0, 20])
def test_what_a_simulation_leaves(economy, N):
    """K is the mean of the cross-section, K' expected follows the law that the state holds, the economies stand where
    the path ends, and the law is the regression of this path in the first iteration and half the way to it later."""
    cfg = dataclasses.replace(SMOKE, n_economies=12, n_agents=N)
    econ, state, rng = begin(cfg, economy)
    laws = []
    with torch.no_grad():
        for iteration in range(2):
            state.iteration = iteration
            dk.set_rates(state, cfg)
            law = state.K_law.clone()
            paths = dk.simulate_on(state, econ, cfg, rng)
            assert paths.at.K.shape == (cfg.periods, 12)
            assert torch.allclose(dk.mean_over(state.k, state.weight), paths.at.K[-1])
            assert torch.equal(state.z[:, 0], paths.at.z[-1])
            found, _ = dk.law_of_motion(paths.at.K, paths.at.labour, paths.at.z, torch.zeros(len(econ.TFP)))
            share = (1.0, 0.5)[iteration]
            assert torch.allclose(state.K_law, torch.where(found.isnan(), law, law + share * (found - law)))
            a, b = state.K_law[paths.at.z[:-1]].movedim(-1, 0)
            assert torch.allclose(paths.ahead.K, torch.exp(a + b * paths.at.K[:-1].double().log()).float(), rtol=1e-5)
            laws.append(state.K_law.clone())
    assert not torch.equal(*laws)


@pytest.mark.parametrize("N", [0, 20])
def test_where_moments_are_seen_next_capital_is_what_is_saved(N):
    cfg = dataclasses.replace(SMOKE, moments="variance", learnt_moments=1, n_agents=N)
    econ, state, rng = begin(cfg)
    with torch.no_grad():
        paths = dk.simulate_on(state, econ, cfg, rng)
    assert torch.equal(paths.ahead.K, paths.at.K[1:])
    K = [dk.mean_over(k, weight) for k, _, weight in zip(*paths.held)]
    assert torch.allclose(paths.at.K, torch.stack(K), rtol=1e-5)
    assert paths.at.M.shape == (cfg.periods, cfg.n_economies, 2)


def test_simulated_range_grows_at_once_and_shrinks_slowly():
    ends = torch.tensor([2.0, 100.0])
    dk.widen(ends, torch.tensor([300.0, 1.0]))
    assert torch.equal(ends, torch.tensor([1.0, 300.0]))
    dk.widen(ends, torch.tensor([11.0, 200.0]))
    assert torch.allclose(ends, torch.tensor([2.0, 290.0]))


# ------------------------------------------------------------------------------------------------ centres


def off_centre(economy, factor, moments=""):
    """A policy network with every layer alive, and a path whose mean of ln K is ln(factor) from the centre."""
    cfg = dataclasses.replace(SMOKE, moments=moments)
    econ, state, g = begin(cfg, economy)
    econ = economy.tables()
    for name, x in state.tensors().items():
        if x.is_floating_point():
            setattr(state, name, x.double())
    state.policy += 0.3 * torch.randn(state.policy.shape, generator=g, dtype=F64)
    spread = torch.randn(40, 4, generator=g, dtype=F64) / 20
    return econ, cfg, state, state.K_centre * factor * torch.exp(spread - spread.mean())


def capital(state, at, econ, cfg):
    return dk.network_capital(dk.policy_net(state, econ, cfg), at, econ)


@pytest.mark.parametrize("factor", [0.85, 1.5])
def test_recentring_leaves_the_policy(economy, factor):
    """Where mean K has moved by more than a tenth ln K is centred on it, and the policy stays the function it was."""
    econ, cfg, state, K_path = off_centre(economy, factor)
    at = everywhere(state, econ)
    before, theta, centre = capital(state, at, econ, cfg), state.policy.clone(), state.K_centre.clone()
    dk.recentre(state, K_path, torch.zeros(40, 4, 0), econ, cfg)
    assert float(state.K_centre / centre) == pytest.approx(factor, rel=1e-12)
    assert torch.allclose(capital(state, at, econ, cfg), before, rtol=1e-10, atol=1e-10 * economy.K_ss)
    assert not torch.allclose(capital(dataclasses.replace(state, policy=theta), at, econ, cfg), before, rtol=1e-3)


@pytest.mark.parametrize("factor", [0.92, 1.0, 1.09])
def test_recentring_does_nothing_near_the_centre(economy, factor):
    econ, cfg, state, K_path = off_centre(economy, factor)
    before = {name: x.clone() for name, x in state.tensors().items()}
    dk.recentre(state, K_path, torch.zeros(40, 4, 0), econ, cfg)
    assert all(torch.equal(before[name], x) for name, x in state.tensors().items()) and abs(math.log(factor)) < 0.1


def test_the_centre_follows_a_training(economies):
    """The toy economy holds more capital than its steady state: the centre moves there, and the solution keeps it."""
    cfg = dataclasses.replace(LEARNS, periods=80, iterations=24)  # until K hardly moves
    state = train(cfg, economies["toy"])
    centre, K = float(state.K_centre), float(dk.mean_over(state.k, state.weight).mean())
    assert abs(math.log(centre / economies["toy"].K_ss)) > 0.1 and abs(math.log(centre / K)) < 0.15
    assert dk.Solution(dk.weights_file(state, economies["toy"], cfg, 0)).net.K_centre.item() == centre


# ------------------------------------------------------------------------------------------------ the end


def test_movement_compares_means_of_five():
    """Noise that alternates is averaged out; a drift of d an iteration is five of it between the two means."""
    assert dk.movement([]) == dk.movement([[1.0]]) == 1.0
    noise = [[1.0 + 0.1 * (-1) ** t] * 3 for t in range(10)]
    assert dk.movement(noise) == pytest.approx(0.04)  # five of an alternating series: one is left over
    assert dk.movement([[1.0 + 0.01 * t, 2.0 - 0.01 * t] for t in range(25)]) == pytest.approx(0.05)


def test_watched_savings_are_those_of_the_policy(economy):
    econ, cfg, state, _ = off_centre(economy, 1.0)
    found, K = dk.watched_savings(state, econ, cfg), float(state.K_centre)
    for i in (0, 4, 9):
        k, total = economy.k_min + dk.WATCHED[i] * (K - economy.k_min), 0.0
        for (z, s), share in np.ndenumerate(economy.arrays.shares):
            for of_K in (0.97, 1.0, 1.03):
                at = [torch.tensor(x) for x in (k, s, of_K * K, z)]
                total += share / 3 * capital(state, dk.place(*at, econ), econ, cfg).item()
        assert found[i].item() == pytest.approx(total / K, rel=1e-5)


def test_a_run_ends_when_savings_have_settled(without_V):
    """Steps are full until savings have moved less than --settle ten times in a row and Euler errors neither fall nor
    rise, then they fall like 1 / n for as many iterations as are averaged."""
    cfg = dataclasses.replace(SMOKE, batch=128, iterations=80, averaging=3, settle=0.9, policy_rate=0.3)
    state = train(cfg)
    settled, moved, euler = state.settled, state.history["movement"], np.array(state.history["euler"])
    change = [euler[t - 5 : t].mean() / euler[t - 10 : t - 5].mean() for t in range(11, settled + 1)]
    assert moved[0] == 1.0 and max(moved[1:]) < 0.9 and settled >= 11 and 0.8 < change[-1] < 1.25
    assert all(not 0.8 < x < 1.25 for x in change[:-1])
    assert state.iteration == settled + 3 < cfg.iterations
    rate = np.array(state.history["rate"])
    assert rate[:settled] == pytest.approx(0.3) and rate[settled:] == pytest.approx(0.3 / (1 + 0.25 * np.arange(3)))


def test_a_run_that_never_settles_keeps_room_for_averaging_and_goes_on_with_full_steps(without_V):
    never = dataclasses.replace(SMOKE, settle=1e-9, iterations=8, averaging=3, policy_rate=0.3)
    econ, state, rng = begin(never)
    dk.learn(state, econ, never, rng, Bare())
    assert state.settled == 0 and state.iteration == 8 and dk.full_steps(state, never) == 5
    assert state.history["rate"][5:] == pytest.approx([0.3, 0.3 / 1.25, 0.3 / 1.5])
    dk.learn(state, econ, dataclasses.replace(never, iterations=12), rng, Bare())
    assert state.iteration == 12 and state.history["rate"][8] == pytest.approx(0.3)


def test_sizes_of_steps():
    """The first law of motion is taken whole, later ones by halves; all steps fall after the end of the full ones, and
    are smaller after trouble; a planner's Delta waits for a policy that is near."""
    cfg = dataclasses.replace(SMOKE, policy_rate=0.6, iterations=30, averaging=10)
    _, state, _ = begin(cfg)

    def rates(iteration, residuals=(), caution=1.0, settled=0, cfg=cfg):
        state.iteration, state.caution, state.settled = iteration, caution, settled
        state.history["policy_residual"] = list(residuals)
        dk.set_rates(state, cfg)
        return pytest.approx(state.rates.tolist())

    assert rates(0) == [0.6, 1.0, 0.0] and rates(7, [0.3, 0.2]) == [0.6, 0.5, 0.0]
    assert rates(20, [0.01] * 3) == [0.6, 0.5, 0.2] and rates(24, [0.01] * 3) == [0.3, 0.25, 0.2]
    assert rates(12, [0.04, 0.2, 0.2], settled=8) == [0.3, 0.25, 0.2]
    assert rates(7, [0.04, 0.2, 0.2, 0.2], caution=0.5) == [0.3, 0.25, 0.0]
    assert rates(7, cfg=dataclasses.replace(cfg, optimizer="adam")) == [0.6, 1.0, 0.0]


@pytest.mark.parametrize("settled, euler, words", [
    (0, [1e-3] * 9, "savings moved by 5.0e-05 of K in ten iterations (--settle 0.0001)"),
    (2, [1.0, 1.0] + [1e-3] * 3 + [1e-4] * 3 + [9e-5] * 3, ""),
    (2, [1.0, 1.0] + [1e-3] * 3 + [1e-4] * 3 + [7e-5] * 3,
     "Euler errors fell to 7.0e-05 in 3 iterations, from 1.0e-04"),
])
def test_what_is_still_moving(settled, euler, words):
    cfg = dataclasses.replace(SMOKE, averaging=9)
    found = dk.still_moving({"euler": euler, "movement": [5e-5]}, settled, cfg)
    assert found.startswith(words) and bool(found) == bool(words)
    assert not dk.still_moving({"euler": euler, "movement": [5e-5]}, settled,
                               dataclasses.replace(cfg, optimizer="adam"))


# ------------------------------------------------------------------------------------------------ the published steps

ADAM = dataclasses.replace(dk.PRESETS["smoke"], optimizer="adam", policy_steps=45, value_steps=41, policy_rate=1e-2,
                           iterations=2, averaging=0)


def test_prices_follow_the_policy_between_the_steps_of_adam(monkeypatch):
    """V's steps see a new roll-out every twentieth, the policy's each its own, in economies that go on every
    twentieth."""
    seen, real = [], dk.roll_out_households
    monkeypatch.setattr(dk, "roll_out_households", lambda state, paths, *of: (seen.append(paths.at.K), real(
        state, paths, *of))[1])
    econ, state, rng = begin(ADAM)
    with torch.no_grad():
        paths = dk.simulate_on(state, econ, ADAM, rng)
        dk.published_steps(state, paths, econ, ADAM, rng)
    changes = [i for i in range(1, len(seen)) if not torch.equal(seen[i], seen[i - 1])]
    assert len(seen) == 3 + 45 and changes == [3 + 19, 3 + 39]
    assert state.adam_steps.tolist() == [45, 41]


def test_a_step_of_adam_is_torchs():
    """Three steps each of policy and value network on a known loss, in turn, with .99 for both means."""
    econ, state, _ = begin(ADAM)
    target = {"policy": torch.ones_like(state.policy), "value": -torch.ones_like(state.value)}
    theirs = {name: getattr(state, name).clone().requires_grad_() for name in target}
    optimizers = {name: torch.optim.Adam([theirs[name]], lr=lr, betas=(0.99, 0.99)) for name, lr in
                  (("policy", ADAM.policy_rate), ("value", ADAM.value_rate))}
    for step in range(3):
        for name, goal in target.items():
            def loss(state, *_, name=name, goal=goal, step=step):
                return ((getattr(state, name) - goal) ** 2 * (1 + step)).sum()

            with torch.no_grad():
                dk.adam_step(state, name, loss, None, None, econ, ADAM)
            optimizers[name].zero_grad()
            loss(dataclasses.replace(state, **{name: theirs[name]})).backward()
            optimizers[name].step()
    for name, x in theirs.items():
        assert torch.allclose(getattr(state, name), x, rtol=1e-4, atol=1e-6), name


def test_the_published_algorithm_learns():
    """Realised utility rises: the policy comes nearer to its first-order condition, in expectation."""
    cfg = dataclasses.replace(ADAM, n_agents=50, batch=128, policy_steps=30, value_steps=30, policy_rate=3e-3,
                              value_rate=3e-3, iterations=4)
    state = train(cfg)
    assert np.isfinite(state.history["euler"]).all() and state.history["euler"][-1] < 0.7 * state.history["euler"][0]
    assert state.history["policy_taken"] == [1.0] * 4 and state.adam_steps.tolist() == [120, 120]


@pytest.mark.parametrize("batch, horizon", [(2, 2), (3, 5)])
def test_few_households_are_enough_to_run(batch, horizon):
    state = train(dataclasses.replace(SMOKE, batch=batch, horizon=horizon, iterations=2))
    assert state.value.isfinite().all() and state.policy.isfinite().all() and len(state.history["euler"]) == 2
