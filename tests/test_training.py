"""Outer loop: evenly spread shocks, scaled economies, the last value steps, and the path that CUDA graphs take."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import deepham_ks as dk

SMOKE = dataclasses.replace(dk.PRESETS["smoke"], iterations=6, final_value_steps=2)


def run(cfg, graphs=False, seed=0):
    econ = dk.build_economy(dk.Calibration(), "cpu", torch.float32)
    rng = torch.Generator().manual_seed(seed)
    state = dk.initial_state(econ, cfg, seed, rng)
    policies = []
    dk.train(state, econ, cfg, dk.compile_kernels("none"), rng, graphs,
             lambda state: policies.append(state["policy"].clone()))
    return state, policies


def test_systematic_shocks_are_uniform_and_independent_over_time():
    rng = torch.Generator().manual_seed(0)
    eps = (torch.arange(200).expand(4, 200) % 13 > 0).long()
    draws = torch.stack([dk.systematic_uniform(eps, rng) for _ in range(4000)]).double()  # (draw, economy, household)
    assert 0 <= draws.min() and draws.max() < 1
    for household in (0, 1, 13, 199):  # unemployed and employed
        series = draws[:, 2, household].numpy()
        assert scipy.stats.kstest(series, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(series[:-1], series[1:])[0, 1]) < 4 / np.sqrt(len(series))


def test_systematic_shocks_hold_the_unemployment_rate():
    econ, rng = dk.build_economy(dk.Calibration(), "cpu", torch.float32), torch.Generator().manual_seed(1)
    panel, rates = dk.initial_panel(8, 1000, econ, rng), {}
    for systematic in (False, True):
        seen = [(1 - eps.double().mean(1, keepdim=True) - (1 - (econ.L / econ.l_bar)[z])).flatten()
                for _, eps, _, z, _ in dk.simulate(lambda k, *_: k, panel, 300, econ, rng, systematic)][100:]
        rates[systematic] = torch.stack(seen)
    assert abs(rates[True].mean()) < 5e-4
    assert rates[True].std() < rates[False].std() / 4  # binomial noise is .006 to .009


def test_last_iterations_leave_the_policy_and_fit_the_value():
    state, policies = run(SMOKE)
    changed = [not torch.equal(a, b) for a, b in zip(policies, policies[1:])]
    assert changed == [True, True, True, False, False]
    assert state["history"]["policy_taken"][-2:] == [0, 0]


def bellman_residual(state, econ):
    batch = dk.Batch(*[state[f"batch_{name}"] for name in dk.Batch._fields])
    network = dk.Solution(dk.Calibration(), SMOKE, state["policy"], state["value"])
    states = dk.States(*[x.double() if x.is_floating_point() else x
                         for x in (batch.k, batch.eps, batch.K, batch.z, batch.K_next)])
    own, _ = dk.bellman_errors(network, states, dk.build_economy(dk.Calibration(), dtype=torch.float64))
    return own.square().mean().sqrt().item(), batch


def test_bellman_step_lowers_the_bellman_error():
    econ, kernels = dk.build_economy(dk.Calibration(), "cpu", torch.float32), dk.compile_kernels("none")
    cfg = dataclasses.replace(SMOKE, final_value_steps=0, slope_weight=0.0)
    state, _ = run(cfg)
    before, batch = bellman_residual(state, econ)
    damping = torch.tensor(1e-3)
    for _ in range(5):
        state["value"], damping, _ = dk.bellman_step(state["value"], damping, batch, econ, cfg, kernels)
    after, _ = bellman_residual(state, econ)
    assert after < before / 2


def test_graphs_are_captured_once_a_phase_and_change_nothing(monkeypatch):
    captured = []

    def capture(step, tensors, rng):  # what a CUDA graph does: run the same step again
        captured.append(step)
        return step

    monkeypatch.setattr(dk, "capture", capture)
    eager, _ = run(SMOKE)
    assert not captured
    graphs, _ = run(SMOKE, graphs=True)
    assert len(captured) == 2
    for name, value in eager.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, graphs[name]), name


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_economies_are_scaled_before_each_simulation(spread):
    cfg = dataclasses.replace(SMOKE, K_spread=spread, iterations=1, n_economies=32, n_agents=50)
    econ, rng = dk.build_economy(dk.Calibration(), "cpu", torch.float32), torch.Generator().manual_seed(0)
    state = dk.initial_state(econ, cfg, 0, rng)
    start = state["k"].mean(1).clone()
    dk.train(state, econ, cfg, dk.compile_kernels("none"), rng, False, lambda state: None)
    scale = state["K_path"][0] / start
    assert (scale - 1).abs().max() <= spread + 1e-6 and scale.std() == pytest.approx(spread / np.sqrt(3), rel=0.3)
