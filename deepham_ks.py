"""DeepHAM for the Krusell & Smith (1998) economy, with the grid solution beside it.

Model: households (k, eps) save in capital under uninsurable unemployment and aggregate TFP shocks z; their only
moment of the cross-section is mean capital K (Den Haan, Judd & Juillard 2010 calibration).

Algorithm (Han, Yang & E 2021), one outer iteration:
  1. simulate B economies of N households on to the ergodic set under the current policy;
  2. roll a batch of price-taking households out for T periods along the simulated paths of (z, K);
  3. backwards through time: realised utility U_t and its pathwise derivative, the costate lambda_t;
  4. value step: fit V to U_t and V_k to lambda_t;
  5. policy step: raise E[sum_{t<T} beta^t u(c_t) + beta^T V(s_T)] in the consumption share;
  6. save a checkpoint; repeat. At the end: judge against the grid, draw the figures, publish.

Commands:
  python deepham_ks.py                    # the default preset, results in this folder
  python deepham_ks.py --preset smoke     # every size tiny, a test of the installation
  python deepham_ks.py --evaluate         # rebuild every result from NN_weights_biases.pth
  python deepham_ks.py --resume           # continue a run that was stopped
  python deepham_ks.py --help             # every number of the model and the method is a flag

Symbols: k, c, m capital, consumption, cash on hand of a household; K mean capital; R, w gross return and wage;
z 0 bad / 1 good; eps 0 unemployed / 1 employed (both integer indices); `_next` is a prime. Shapes: B economies,
N households, T periods, P parameters. A policy is any function (k, eps, K, z) -> k'.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Tuple

import numpy as np
import scipy.interpolate
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- configuration


def option(default, reason: str, within: str = "(-inf, inf)", choices=None):
    """A dataclass field that is also a command-line flag; reason is its --help text, within an interval."""
    return field(default=default, metadata={"help": reason, "within": within, "choices": choices})


class UserError(RuntimeError):
    """What is wrong, the flag and the cure, in one line; main() prints it and returns 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Calibration:
    """Krusell & Smith (1998) in the calibration of Den Haan, Judd & Juillard (2010), quarterly."""

    beta: float = option(0.99, "discount factor", "(0, 1)")
    gamma: float = option(1.0, "relative risk aversion; 1 is log utility", "[0.1, 20]")
    alpha: float = option(0.36, "capital share", "(0, 1)")
    delta: float = option(0.025, "depreciation rate", "(0, 1]")
    mu: float = option(0.15, "unemployment benefit, a share of the wage", "[0, 1]")
    l_bar: float = option(1 / 0.9, "time endowment; labour supply is 1 in the bad state", "(0, 100]")
    tfp_shock: float = option(0.01, "TFP is 1 minus this in the bad state, 1 plus this in the good one", "[0, 0.5]")
    u_bad: float = option(0.10, "unemployment rate in the bad state", "[0, 1)")
    u_good: float = option(0.04, "unemployment rate in the good state", "[0, 1)")
    z_duration: float = option(8.0, "expected quarters in an aggregate state", "[1, 1e6]")
    u_duration_bad: float = option(2.5, "expected quarters of unemployment while z stays bad", "[1, 1e6]")
    u_duration_good: float = option(1.5, "expected quarters of unemployment while z stays good", "[1, 1e6]")


@dataclass(frozen=True)
class Config:
    """Everything about the method. The defaults are the preset `default`."""

    n_agents: int = option(500, "N, households an economy: at 50 sampling noise in K blurs the gradient", "[1, 1e7]")
    n_economies: int = option(16, "B, economies simulated side by side", "[1, 1e6]")
    periods: int = option(300, "periods that each outer iteration simulates on from the last panel", "[2, 1e6]")
    systematic: bool = option(True, "spread employment shocks evenly over households: less sampling noise in K")
    horizon: int = option(150, "T, periods of utility before the value network takes over", "[2, 1e5]")
    batch: int = option(2048, "households in a roll-out", "[2, 1e7]")
    stride: int = option(
        15, "every stride-th period of a roll-out is a state to learn from; neighbours say the same", "[1, 1e5]"
    )
    iterations: int = option(50, "outer iterations: policy step, value step, simulate, roll out", "[1, 1e6]")
    hidden: int = option(32, "width of the two tanh layers of both networks", "[1, 1024]")
    optimizer: str = option(
        "gauss-newton", "gauss-newton needs tens of steps where adam needs thousands", choices=("gauss-newton", "adam")
    )
    policy_rate: float = option(
        0.6, "gauss-newton: share of the Newton step of log c; at 1, K cobwebs. adam: rate", "(0, 1]"
    )
    value_rate: float = option(1e-3, "adam: rate of the value network", "(0, 1]")
    policy_steps: int = option(1, "adam: policy steps an outer iteration", "[1, 1e6]")
    value_steps: int = option(1, "adam: value steps an outer iteration", "[1, 1e6]")
    decay_from: int = option(
        20, "gauss-newton: outer iteration from which steps fall like 1 / (1 + decay n)", "[1, 1e6]"
    )
    decay: float = option(0.2, "gauss-newton: how fast they fall: from there on they average noise out", "[0, 1e3]")
    damping: float = option(1e-4, "gauss-newton: least damping of the policy step, of the mean diagonal", "(0, 1e6]")
    slope_weight: float = option(
        1.0, "weight of V_k against the costates; 0 fits the value to utility alone", "[0, 1e6]"
    )
    level_weight: float = option(
        0.3, "weight of V against realised utility, in units of the network's output", "(0, 1e6]"
    )
    control_variate: bool = option(True, "take out of the labels the surprises whose mean is exactly zero")
    final_value_steps: int = option(
        6, "gauss-newton: last iterations, in which V is fitted to the final policy by its Bellman residual", "[0, 1e6]"
    )
    wide_share: float = option(0.5, "share of roll-outs that start anywhere in [0, k_wide], not on the panel", "[0, 1]")
    k_wide: float = option(5.3, "upper end of these, in multiples of steady-state K", "(0, 25]")
    unemployed_share: float = option(
        0.5, "share of roll-outs set unemployed: 7% of households, most of the error", "[0, 1]"
    )
    unemployed_weight: float = option(3.0, "weight of unemployed states in both least-squares problems", "(0, 1e6]")
    K_spread: float = option(
        0.1, "economies are scaled by up to this share before each simulation: K off its usual path", "[0, 0.9]"
    )
    initial_share: float = option(0.06, "consumption share of cash on hand before training", "(0, 1)")
    eval_agents: int = option(50, "households an economy when the solution is judged, small", "[2, 1e7]")
    eval_economies: int = option(64, "economies when the solution is judged, small", "[1, 1e6]")
    eval_agents_large: int = option(5000, "households an economy when the solution is judged, large", "[2, 1e7]")
    eval_economies_large: int = option(2, "economies when the solution is judged, large", "[1, 1e6]")
    eval_periods: int = option(4000, "periods simulated to judge a solution", "[3, 1e7]")
    eval_drop: int = option(1500, "periods of these that are dropped first", "[0, 1e7]")
    eval_every: int = option(20, "of the rest every so many-th is pooled", "[1, 1e6]")
    eval_states: int = option(50_000, "pooled states at which Bellman and Euler errors are taken", "[10, 1e8]")
    irf_paths: int = option(200, "economies in an impulse response", "[1, 1e6]")
    irf_agents: int = option(200, "households an economy in an impulse response", "[2, 1e7]")
    irf_periods: int = option(60, "quarters of an impulse response", "[1, 1e5]")
    irf_burn: int = option(400, "periods before the shock", "[1, 1e6]")


PRESETS = {
    "default": Config(),
    # game_nn_n50 of the authors' code, as far as this script has the choice
    "paper": Config(n_agents=50, n_economies=384, periods=450, batch=384, stride=1, iterations=6, hidden=24,
                    optimizer="adam", policy_rate=4e-4, value_rate=1e-4, policy_steps=2000, value_steps=2000,
                    slope_weight=0.0, level_weight=1.0, unemployed_weight=1.0, K_spread=0.0,
                    systematic=False, control_variate=False, wide_share=0.0, unemployed_share=0.0,
                    initial_share=0.4),
    "smoke": Config(n_agents=20, n_economies=4, periods=40, horizon=20, batch=64, stride=2, iterations=3, hidden=8,
                    final_value_steps=1,
                    eval_agents=20, eval_economies=4, eval_agents_large=50, eval_periods=60, eval_drop=20,
                    eval_every=5, eval_states=200, irf_paths=4, irf_agents=10, irf_periods=10, irf_burn=10),
}


@dataclass(frozen=True)
class Run:
    """What to do, where and with which seed."""

    preset: str = option("default", "default is accurate and fast; paper follows the authors; smoke is tiny",
                        choices=tuple(PRESETS))
    seed: int = option(0, "seed of every random number of the training", "[0, 1e9]")
    device: str = option("auto", "auto takes CUDA if there is one", choices=("auto", "cuda", "cpu"))
    compile: str = option("torchscript", "networks and roll-outs compiled or eager", choices=("torchscript", "none"))
    cuda_graphs: bool = option(True, "on CUDA: an outer iteration is one graph; turn off to debug")
    output_dir: str = option("", "where results go; empty: . for default, runs/PRESET for the others")
    evaluate: bool = option(False, "train nothing: rebuild every result from NN_weights_biases.pth")
    resume: bool = option(False, "continue from checkpoint.pt in the output directory")


# ---------------------------------------------------------------------------------------------- economy and shocks


class Economy(NamedTuple):
    """The calibration as numbers and tables; tables are numpy float64 or tensors of one device and dtype."""

    beta: float
    gamma: float
    alpha: float
    delta: float
    mu: float
    l_bar: float
    Z: Tensor  # (z,) TFP
    L: Tensor  # (z,) labour supply
    tau: Tensor  # (z,) tax rate that pays the benefits
    p_good: Tensor  # (z,) P(z' = 1 | z)
    p_employed: Tensor  # (z, z', eps) P(eps' = 1 | z, z', eps)
    P: Tensor  # (z, eps, z', eps') P(z', eps' | z, eps)
    K_ss: float  # capital, cash on hand, consumption and lifetime utility of the representative household:
    m_ss: float  # the networks measure everything against them, so that scalings follow the calibration
    c_ss: float
    V_ss: float


def employment_transition(cal: Calibration) -> np.ndarray:
    """P(eps' = 1 | z, z', eps) of Krusell & Smith (1998): unemployment durations by z, persistence 1.25 and 0.75
    times the new state's when z changes, and an unemployment rate that depends on z alone."""
    u = np.array([cal.u_bad, cal.u_good])
    stay = 1 - 1 / np.array([cal.u_duration_bad, cal.u_duration_good])
    p_uu = np.array([[stay[0], 0.75 * stay[1]], [1.25 * stay[0], stay[1]]])  # (z, z')
    p_eu = (u - u[:, None] * p_uu) / (1 - u[:, None])
    return 1 - np.stack([p_uu, p_eu], axis=-1)


def build_economy(cal: Calibration, device=None, dtype=None) -> Economy:
    """Tables of the calibration: numpy float64, or tensors when a dtype is given."""
    u = np.array([cal.u_bad, cal.u_good])
    L = cal.l_bar * (1 - u)
    p_good = np.array([1 / cal.z_duration, 1 - 1 / cal.z_duration])
    p_employed = employment_transition(cal)
    p_z, p_eps = np.stack([1 - p_good, p_good], -1), np.stack([1 - p_employed, p_employed], -1)
    P = np.einsum("xy,xyij->xiyj", p_z, p_eps)
    Z = np.array([1 - cal.tfp_shock, 1 + cal.tfp_shock])
    tables = [Z, L, cal.mu * u / L, p_good, p_employed, P]
    if dtype is not None:
        tables = [torch.tensor(table, device=device, dtype=dtype) for table in tables]
    K_ss = steady_state_capital(cal)
    Y_ss = K_ss**cal.alpha * float(L.mean()) ** (1 - cal.alpha)
    c_ss = Y_ss - cal.delta * K_ss
    u_ss = math.log(c_ss) if cal.gamma == 1 else c_ss ** (1 - cal.gamma) / (1 - cal.gamma)
    return Economy(cal.beta, cal.gamma, cal.alpha, cal.delta, cal.mu, cal.l_bar, *tables,
                   K_ss, K_ss + c_ss, c_ss, u_ss / (1 - cal.beta))


def steady_state_capital(cal: Calibration) -> float:
    """K at which beta R = 1 without aggregate risk, labour at the mean of the two states."""
    L = cal.l_bar * (1 - (cal.u_bad + cal.u_good) / 2)
    return L * (cal.alpha / (1 / cal.beta - 1 + cal.delta)) ** (1 / (1 - cal.alpha))


def prices(K: Tensor, z: Tensor, econ: Economy) -> Tuple[Tensor, Tensor]:
    """Gross return R and wage w, marginal products of Y = Z K^alpha L^(1-alpha); any common shape."""
    ratio = K / econ.L[z]
    R = 1 - econ.delta + econ.alpha * econ.Z[z] * ratio ** (econ.alpha - 1)
    w = (1 - econ.alpha) * econ.Z[z] * ratio**econ.alpha
    return R, w


def output(K: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """Y = Z K^alpha L^(1-alpha)."""
    return econ.Z[z] * K**econ.alpha * econ.L[z] ** (1 - econ.alpha)


def income(eps: Tensor, w: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """After-tax wage of the employed, benefit of the unemployed."""
    return (1 - econ.tau[z]) * econ.l_bar * eps * w + econ.mu * w * (1 - eps)


def cash_on_hand(k: Tensor, eps: Tensor, K: Tensor, z: Tensor, econ: Economy) -> Tuple[Tensor, Tensor]:
    """m = R k + income, what c + k' is paid from; returns (m, R)."""
    R, w = prices(K, z, econ)
    return R * k + income(eps, w, z, econ), R


def utility(c: Tensor, econ: Economy) -> Tensor:
    if econ.gamma == 1.0:
        return torch.log(c)
    return c ** (1 - econ.gamma) / (1 - econ.gamma)


def marginal_utility(c: Tensor, econ: Economy) -> Tensor:
    return c ** (-econ.gamma)


def draw_z(uniform: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """z' from uniform numbers of z's shape."""
    return (uniform < econ.p_good[z]).long()


def draw_eps(uniform: Tensor, z: Tensor, z_next: Tensor, eps: Tensor, econ: Economy) -> Tensor:
    """eps' given z and z', from uniform numbers of eps's shape; z, z' broadcast against it."""
    return (uniform < econ.p_employed[z, z_next, eps]).long()


def successors(k_next: Tensor, K_next: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four states (k', eps', K', z') of next period, stacked in front: (4, ...); z' slow, eps' fast."""
    index = torch.arange(4, device=k_next.device).view([4] + [1] * k_next.dim())
    shape = [4] + list(k_next.shape)
    eps_next, z_next = (index % 2).expand(shape), (index // 2).expand(shape)
    return k_next.unsqueeze(0).expand(shape), eps_next, K_next.unsqueeze(0).expand(shape), z_next


def probabilities(eps: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """P(z', eps' | z, eps) of the four successors: (...) -> (4, ...)."""
    return econ.P[z, eps].flatten(-2).movedim(-1, 0)


def expected(values: Tensor, eps: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """E[values | z, eps] as the exact sum over the four successors: (4, ...) -> (...)."""
    return (probabilities(eps, z, econ) * values).sum(0)


# ---------------------------------------------------------------------------------------------- networks

N_FEATURES = 5


def features(k: Tensor, eps: Tensor, m: Tensor, K: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """Inputs of both networks, of order one: (...) -> (..., 5). Log cash on hand carries the curvature."""
    log_m = torch.log(m.clamp(min=1e-6) / econ.m_ss)
    return torch.stack([log_m, k / econ.K_ss - 1, 8 * (K / econ.K_ss - 1.05), 2.0 * eps - 1, 2.0 * z - 1], -1)


def feature_slopes(m: Tensor, R: Tensor, econ: Economy) -> Tensor:
    """d features / dk: (...) -> (..., 5)."""
    zero = torch.zeros_like(m)
    return torch.stack([R / m.clamp(min=1e-6), torch.full_like(m, 1 / econ.K_ss), zero, zero, zero], -1)


def unpack(theta: Tensor) -> List[Tensor]:
    """Layers W1 (H, 5), b1, W2 (H, H), b2, w3 (H,), b3 as views of the parameter vector theta (P,)."""
    H = hidden_width(theta.numel())
    sizes = [(H, N_FEATURES), (H,), (H, H), (H,), (H,), ()]
    parts = torch.split(theta, [math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes)]


def n_parameters(H: int) -> int:
    return H * (N_FEATURES + H + 3) + 1


def hidden_width(P: int) -> int:
    """Width H of a network of P = H^2 + (N_FEATURES + 3) H + 1 parameters."""
    return round((math.sqrt((N_FEATURES + 3) ** 2 + 4 * (P - 1)) - N_FEATURES - 3) / 2)


def network(layers: List[Tensor], x: Tensor) -> Tensor:
    """Two tanh layers and a linear output: (..., 5) -> (...)."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h = torch.tanh(linear(h, layers[2], layers[3]))
    return torch.matmul(h, layers[4]) + layers[5]


def network_and_slope(layers: List[Tensor], x: Tensor, dx: Tensor) -> Tuple[Tensor, Tensor]:
    """The output and its derivative in the direction dx, carried forward through the layers."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    dh = (1 - h * h) * linear(dx, layers[0])
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    dh2 = (1 - h2 * h2) * linear(dh, layers[2])
    return torch.matmul(h2, layers[4]) + layers[5], torch.matmul(dh2, layers[4])


def outer(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def network_jacobian(layers: List[Tensor], x: Tensor) -> Tensor:
    """d output / d theta, by hand: (n, 5) -> (n, P)."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    d2 = (1 - h2 * h2) * layers[4]
    d1 = (1 - h * h) * torch.matmul(d2, layers[2])
    return torch.cat([outer(d1, x), d1, outer(d2, h), d2, h2, torch.ones_like(h2[:, :1])], 1)


def slope_jacobian(layers: List[Tensor], x: Tensor, dx: Tensor) -> Tensor:
    """d slope / d theta of network_and_slope, by hand: (n, 5) -> (n, P). d and e are the adjoints of the
    pre-activations and of their tangents."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    s, a = 1 - h * h, linear(dx, layers[0])
    dh = s * a
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    s2, a2 = 1 - h2 * h2, linear(dh, layers[2])
    e2 = s2 * layers[4]
    d2 = -2 * h2 * a2 * e2
    e1 = s * torch.matmul(e2, layers[2])
    d1 = s * torch.matmul(d2, layers[2]) - 2 * h * a * e1
    W1, W2 = outer(e1, dx) + outer(d1, x), outer(e2, dh) + outer(d2, h)
    return torch.cat([W1, d1, W2, d2, s2 * a2, torch.zeros_like(h2[:, :1])], 1)


def initial_parameters(H: int, output_bias: float, seed: int) -> Tensor:
    """theta (P,) with a zero output layer: a constant function, output_bias."""
    rng = torch.Generator().manual_seed(seed)
    W1, b1 = torch.randn(H, N_FEATURES, generator=rng) / N_FEATURES**0.5, torch.randn(H, generator=rng) / 2
    W2, b2 = torch.randn(H, H, generator=rng) / H**0.5, torch.randn(H, generator=rng) / 5
    return torch.cat([W1.flatten(), b1, W2.flatten(), b2, torch.zeros(H), torch.tensor([output_bias])])


def consumption_share(policy: List[Tensor], k: Tensor, eps: Tensor, m: Tensor, K: Tensor, z: Tensor,
                      econ: Economy) -> Tensor:
    """c / m = min(1, exp(network)): the limit k' >= 0 binds exactly where the network is positive."""
    return torch.exp(network(policy, features(k, eps, m, K, z, econ)).clamp(max=0.0))


def network_capital(policy: List[Tensor], k: Tensor, eps: Tensor, K: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """k' of the policy network; K and z broadcast against k and eps."""
    m, _ = cash_on_hand(k, eps, K, z, econ)
    return (1 - consumption_share(policy, k, eps, m, K.expand_as(k), z.expand_as(k), econ)) * m


def network_value(value: List[Tensor], k: Tensor, eps: Tensor, K: Tensor, z: Tensor,
                  econ: Economy) -> Tuple[Tensor, Tensor]:
    """(V - V_ss, V_k) of the value network, in utils and utils per unit of k."""
    m, R = cash_on_hand(k, eps, K, z, econ)
    V, V_k = network_and_slope(value, features(k, eps, m, K, z, econ), feature_slopes(m, R, econ))
    scale = value_scale(econ)
    return scale * V, scale * V_k


def value_scale(econ: Economy) -> float:
    """Utils per unit of the value network's output: ten times u'(c) c at the steady state."""
    return 10.0 * econ.c_ss ** (1 - econ.gamma)


# ---------------------------------------------------------------------------------------------- simulation


class Panel(NamedTuple):
    """The cross-section of B economies at one date."""

    k: Tensor  # (B, N)
    eps: Tensor  # (B, N)
    z: Tensor  # (B, 1)


def uniform(shape, like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng, device=like.device)


def initial_panel(B: int, N: int, econ: Economy, rng: torch.Generator, dtype=torch.float32) -> Panel:
    """A dispersed cross-section, gamma with mean 0.9935 K_ss = 39 and std 0.46 of that (from a point mass it would need
    2,000 periods to spread), z at its stationary probability, eps at the unemployment rate of z."""
    device, shape = econ.Z.device, (B, N)
    concentration = torch.full(shape, 4.7, device=device)
    k = torch._standard_gamma(concentration, generator=rng).to(dtype) * (0.9935 * econ.K_ss / 4.7)
    p_leave_bad, p_leave_good = econ.p_good[0], 1 - econ.p_good[1]
    z = (torch.rand((B, 1), generator=rng, device=device) < p_leave_bad / (p_leave_bad + p_leave_good)).long()
    eps = (torch.rand(shape, generator=rng, device=device) < (econ.L / econ.l_bar)[z]).long()
    return Panel(k, eps, z)


def systematic_uniform(eps: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform numbers (B, N), independent over time for a household but evenly spread over the unemployed and over the
    employed of an economy (golden-ratio steps from a random start): the numbers that find and lose work hardly
    fluctuate, as if N were far larger."""
    rank = torch.where(eps == 1, eps.cumsum(1), (1 - eps).cumsum(1))
    spread = (rank * 2654435769 % 2**32).to(torch.float32) / 2**32  # rank times the golden ratio, modulo 1
    start = torch.rand((len(eps), 2), generator=rng, device=eps.device)
    return (spread + start.gather(1, eps)) % 1.0


def simulate(policy: Callable, panel: Panel, periods: int, econ: Economy, rng: torch.Generator,
             systematic: bool = False) -> Iterator:
    """The N-agent economy, period by period: yields (k, eps, K, z, k') with k, eps, k' (B, N) and K, z (B, 1).
    The same rng state gives the same shocks whatever the policy. systematic: less sampling noise in K, for training;
    solutions are judged with independent draws."""
    k, eps, z = panel
    for _ in range(periods):
        K = k.mean(1, keepdim=True)
        k_next = policy(k, eps, K, z)
        yield k, eps, K, z, k_next
        z_next = draw_z(uniform(z.shape, k, rng), z, econ)
        draws = systematic_uniform(eps, rng) if systematic else uniform(eps.shape, k, rng)
        eps = draw_eps(draws, z, z_next, eps, econ)
        k, z = k_next, z_next


# ---------------------------------------------------------------------------------------------- DeepHAM


def roll_out(policy: List[Tensor], k: Tensor, eps: Tensor, K: Tensor, z: Tensor, econ: Economy) -> Tensor:
    """k (T + 1, B) of B price-taking households along given paths eps, K, z (T + 1, B), from k (B,)."""
    path = torch.empty_like(K)
    path[0] = k
    for t in range(K.shape[0] - 1):
        path[t + 1] = network_capital(policy, path[t], eps[t], K[t], z[t], econ)
    return path


def consumption_and_slope(policy: List[Tensor], k: Tensor, eps: Tensor, K: Tensor, z: Tensor,
                          econ: Economy) -> Tuple[Tensor, Tensor]:
    """c and dc/dk of the policy network at the states of a path, (T, B); a few periods at a time stay in the cache."""
    c, dc = torch.empty_like(k), torch.empty_like(k)
    chunk = 4
    for t in range(0, k.shape[0], chunk):
        k_t, eps_t, K_t, z_t = k[t : t + chunk], eps[t : t + chunk], K[t : t + chunk], z[t : t + chunk]
        m, R = cash_on_hand(k_t, eps_t, K_t, z_t, econ)
        f, f_k = network_and_slope(policy, features(k_t, eps_t, m, K_t, z_t, econ), feature_slopes(m, R, econ))
        c_t = m * torch.exp(f.clamp(max=0.0))
        c[t : t + chunk], dc[t : t + chunk] = c_t, torch.where(f < 0, R * c_t / m + c_t * f_k, R)
    return c, dc


def next_value_surprise(value: List[Tensor], k: Tensor, eps: Tensor, K: Tensor, z: Tensor,
                        econ: Economy) -> Tuple[Tensor, Tensor]:
    """Control variates: V(s_{t+1}) - E_t V(s') and the same of V_k, (T, B) from paths (T + 1, B). Their mean is
    exactly zero, and they carry nearly all the noise of the realised utility and of the costate."""
    T = k.shape[0] - 1
    surprise, surprise_k = torch.empty_like(k[:T]), torch.empty_like(k[:T])
    chunk = 2  # periods at a time: memory on a GPU, cache on a CPU
    for t in range(0, T, chunk):
        last = min(t + chunk, T)
        k1, eps1, K1, z1 = successors(k[t + 1 : last + 1], K[t + 1 : last + 1])
        V, V_k = network_value(value, k1, eps1, K1, z1, econ)
        now = (2 * z + eps)[t + 1 : last + 1].unsqueeze(0)
        at = (eps[t:last], z[t:last])
        surprise[t:last] = V.gather(0, now).squeeze(0) - expected(V, at[0], at[1], econ)
        surprise_k[t:last] = V_k.gather(0, now).squeeze(0) - expected(V_k, at[0], at[1], econ)
    return surprise, surprise_k


def costates(c: Tensor, dc: Tensor, R: Tensor, V_T: Tensor, V_k_T: Tensor, surprise: Tensor, surprise_k: Tensor,
             econ: Economy) -> Tuple[Tensor, Tensor, Tensor]:
    """Backwards through the roll-out, each (T, B): realised utility U_t = u(c_t) + beta U_{t+1} (above V_ss),
    its derivative lambda_t = u'(c_t) dc/dk + beta lambda_{t+1} dk'/dk, and the next costate that the household
    weighs against u'(c_t). Equal to back-propagation through time when the surprises are zero."""
    u, u_prime = utility(c, econ) - (1 - econ.beta) * econ.V_ss, marginal_utility(c, econ)
    U, lam, lam_next = torch.empty_like(c), torch.empty_like(c), torch.empty_like(c)
    U_t, lam_t = V_T, V_k_T
    for i in range(c.shape[0]):
        t = c.shape[0] - 1 - i
        lam_next[t] = lam_t - surprise_k[t]
        U_t = u[t] + econ.beta * (U_t - surprise[t])
        lam_t = u_prime[t] * dc[t] + econ.beta * (R[t] - dc[t]) * lam_next[t]
        U[t], lam[t] = U_t, lam_t
    return U, lam, lam_next


class Kernels(NamedTuple):
    """The functions that run inside loops, TorchScript-compiled or as they are."""

    network_capital: Callable
    network_value: Callable
    roll_out: Callable
    consumption_and_slope: Callable
    next_value_surprise: Callable
    costates: Callable
    network_jacobian: Callable
    slope_jacobian: Callable


def compile_kernels(mode: str) -> Kernels:
    """mode 'torchscript' or 'none'. TorchScript ends with Python 3.14: there one warning, and eager mode."""
    functions = [globals()[name] for name in Kernels._fields]
    if mode == "torchscript" and sys.version_info >= (3, 14):
        warnings.warn("TorchScript does not run on Python 3.14 or later: using --compile none", stacklevel=2)
    elif mode == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            functions = [torch.jit.script(function) for function in functions]
    return Kernels(*functions)


class Batch(NamedTuple):
    """What a roll-out of B households over T periods teaches, each (T, B)."""

    k: Tensor
    eps: Tensor
    K: Tensor
    z: Tensor
    K_next: Tensor
    c: Tensor
    U: Tensor  # realised utility less V_ss, then V
    lam: Tensor  # its derivative, a sample of V_k
    lam_next: Tensor  # lambda_{t+1}: what a unit of k' is worth


def sample_households(panel: Panel, K_path: Tensor, z_path: Tensor, econ: Economy, cfg: Config,
                      rng: torch.Generator) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Initial k (B,) and paths eps, K, z (T + 1, B): windows of the simulated economies, employment drawn anew.
    A share of the households starts anywhere in [0, k_wide]: the ergodic set of a wrong policy never visits the
    tails that decide the distribution."""
    B, device = cfg.batch, K_path.device
    economy = torch.randint(K_path.shape[1], (B,), generator=rng, device=device)
    start = torch.randint(K_path.shape[0] - cfg.horizon, (B,), generator=rng, device=device)
    window = start + torch.arange(cfg.horizon + 1, device=device).unsqueeze(1)
    K, z = K_path[window, economy], z_path[window, economy]
    draw = torch.rand((3, B), generator=rng, device=device)
    household = torch.randint(panel.k.numel(), (B,), generator=rng, device=device)
    wide = cfg.k_wide * econ.K_ss * draw[0] ** 4  # dense near the limit, where c bends most
    k = torch.where(draw[1] < cfg.wide_share, wide, panel.k.flatten()[household])
    eps = torch.empty_like(z)
    eps[0] = panel.eps.flatten()[household] * (draw[2] >= cfg.unemployed_share)
    shocks = torch.rand(eps.shape, generator=rng, device=device)
    for t in range(cfg.horizon):
        eps[t + 1] = draw_eps(shocks[t], z[t], z[t + 1], eps[t], econ)
    return k, eps, K, z


def roll_out_batch(policy: List[Tensor], value: List[Tensor], paths, econ: Economy, cfg: Config,
                   kernels: Kernels) -> Batch:
    """Forward along the paths, backward with utilities and costates."""
    k0, eps, K, z = paths
    k = kernels.roll_out(policy, k0, eps, K, z, econ)
    c, dc = kernels.consumption_and_slope(policy, k[:-1], eps[:-1], K[:-1], z[:-1], econ)
    V_T, V_k_T = kernels.network_value(value, k[-1], eps[-1], K[-1], z[-1], econ)
    surprises = torch.zeros_like(c), torch.zeros_like(c)
    if cfg.control_variate:
        surprises = kernels.next_value_surprise(value, k, eps, K, z, econ)
    R, _ = prices(K[:-1], z[:-1], econ)
    labels = kernels.costates(c, dc, R, V_T, V_k_T, *surprises, econ)
    return Batch(k[:-1], eps[:-1], K[:-1], z[:-1], K[1:], c, *labels)


def policy_residual(batch: Batch, econ: Economy) -> Tensor:
    """dU/d log c over u'(c) c, the first-order condition 1 = beta lambda' / u'(c), over gamma: the Newton step
    of log c."""
    return (1 - econ.beta * batch.lam_next / marginal_utility(batch.c, econ)) / econ.gamma


def state_weights(eps: Tensor, cfg: Config) -> Tensor:
    """Square roots of the weights in the least-squares problems."""
    return 1 + (math.sqrt(cfg.unemployed_weight) - 1) * (1.0 - eps)


def value_residuals(V: Tensor, V_k: Tensor, batch: Batch, econ: Economy, cfg: Config) -> Tensor:
    """Weighted errors of V against realised utility and of V_k against the costates, (2, n): both unit-free."""
    level = cfg.level_weight * (batch.U - V) / value_scale(econ)
    slope = cfg.slope_weight * (batch.lam - V_k) / marginal_utility(batch.c, econ)
    return state_weights(batch.eps, cfg) * torch.stack([level, slope])


def gauss_newton_step(theta: Tensor, rows: Callable, n: int, rate: Tensor, damping: Tensor, floor: float,
                      loss: Callable) -> Tuple[Tensor, Tensor, Tensor]:
    """rate times a Levenberg-Marquardt step, solved in float64. rows(part) gives, for a slice of the n states, pairs
    of a residual and its jacobian = -d residual / d theta (n, P). The mean squared residual is added to the damping
    (Yamashita & Fukushima 2001): careful far from the solution, free near it. A step that does not lower the loss is
    not taken, and the damping rises tenfold: decided on the device, so that nothing waits for it. Returns theta,
    damping and whether the step was taken."""
    A, gradient, now = theta.new_zeros(len(theta), len(theta)), theta.new_zeros(len(theta)), loss(theta)
    for start in range(0, n, 2048):  # in parts: the whole jacobian would not fit a cache
        for residual, jacobian in rows(slice(start, start + 2048)):
            A.addmm_(jacobian.T, jacobian)
            gradient.addmv_(jacobian.T, residual)
    A = A.double()
    A.diagonal().add_((damping + now / n) * A.diagonal().mean())
    factor, _ = torch.linalg.cholesky_ex(A)
    step = torch.cholesky_solve(gradient.double().unsqueeze(1), factor).squeeze(1)
    trial = theta + rate * step.to(theta.dtype)
    taken = loss(trial) < now
    theta = torch.where(taken, trial, theta)
    damping = torch.where(taken, (damping / 3).clamp(min=floor), (damping * 10).clamp(max=1e6))
    return theta, damping, taken


def value_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Economy, cfg: Config,
               kernels: Kernels):
    """Gauss-Newton on realised utilities and costates together (Huge & Savine 2020: fit the slopes too)."""
    m, R = cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    x, dx = features(batch.k, batch.eps, m, batch.K, batch.z, econ), feature_slopes(m, R, econ)
    layers, scale = unpack(theta), value_scale(econ)
    slope_scale = (scale * cfg.slope_weight / marginal_utility(batch.c, econ)).unsqueeze(1)

    def residuals(theta):
        V, V_k = network_and_slope(unpack(theta), x, dx)
        return value_residuals(scale * V, scale * V_k, batch, econ, cfg)

    now, weight = residuals(theta), state_weights(batch.eps, cfg).unsqueeze(1)

    def rows(part):
        yield now[0, part], cfg.level_weight * weight[part] * kernels.network_jacobian(layers, x[part])
        yield now[1, part], kernels.slope_jacobian(layers, x[part], dx[part] * slope_scale[part] * weight[part])

    return gauss_newton_step(theta, rows, len(x), rate, damping, cfg.damping / 10,
                             lambda theta: residuals(theta).square().sum())


def bellman_step(theta: Tensor, damping: Tensor, batch: Batch, econ: Economy, cfg: Config, kernels: Kernels):
    """Gauss-Newton on the Bellman residual u(c) + beta E V(s') - V(s) of the policy as it is, divided by 1 - beta: the
    expectation is an exact sum, so there is no noise to average. The slopes stay tied to the costates."""
    m, R = cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    k1, eps1, K1, z1 = successors(m - batch.c, batch.K_next)
    m1, _ = cash_on_hand(k1, eps1, K1, z1, econ)
    x, dx = features(batch.k, batch.eps, m, batch.K, batch.z, econ), feature_slopes(m, R, econ)
    x1, layers, scale = features(k1, eps1, m1, K1, z1, econ), unpack(theta), value_scale(econ)
    u = (utility(batch.c, econ) - (1 - econ.beta) * econ.V_ss) / scale
    weight = state_weights(batch.eps, cfg)
    level = weight * cfg.level_weight / (1 - econ.beta)
    slope = weight * cfg.slope_weight / marginal_utility(batch.c, econ)

    def residuals(theta):
        V, V_k = network_and_slope(unpack(theta), x, dx)
        EV = expected(network(unpack(theta), x1), batch.eps, batch.z, econ)
        return torch.stack([level * (u + econ.beta * EV - V), slope * (batch.lam - scale * V_k)])

    now, P = residuals(theta), probabilities(batch.eps, batch.z, econ).unsqueeze(2)

    def rows(part):
        jacobian = kernels.network_jacobian(layers, x[part])
        for j in range(4):
            jacobian -= econ.beta * P[j, part] * kernels.network_jacobian(layers, x1[j, part])
        yield now[0, part], level[part].unsqueeze(1) * jacobian
        yield now[1, part], kernels.slope_jacobian(layers, x[part], dx[part] * (scale * slope[part]).unsqueeze(1))

    return gauss_newton_step(theta, rows, len(x), torch.ones_like(damping), damping, cfg.damping / 100,
                             lambda theta: residuals(theta).square().sum())


def policy_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Economy, cfg: Config,
                kernels: Kernels):
    """Gauss-Newton on the utility objective: move log c by its Newton step, wherever the borrowing limit leaves
    room."""
    m, _ = cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    x, layers = features(batch.k, batch.eps, m, batch.K, batch.z, econ), unpack(theta)
    f, newton = network(layers, x), policy_residual(batch, econ).clamp(-0.5, 0.5)
    free = ((f < 0) | (newton < 0)) * state_weights(batch.eps, cfg)

    def rows(part):
        yield newton[part] * free[part], kernels.network_jacobian(layers, x[part]) * free[part].unsqueeze(1)

    def loss(theta):
        return ((f + newton - network(unpack(theta), x)) * free).square().sum()

    return gauss_newton_step(theta, rows, len(x), rate, damping, cfg.damping, loss)


def value_loss(theta: Tensor, batch: Batch, econ: Economy, cfg: Config) -> Tensor:
    """Half the mean squared value residual, for Adam."""
    V, V_k = network_value(unpack(theta), batch.k, batch.eps, batch.K, batch.z, econ)
    return value_residuals(V, V_k, batch, econ, cfg).square().sum(0).mean() / 2


def policy_loss(theta: Tensor, batch: Batch, econ: Economy) -> Tensor:
    """Minus the utility objective up to a constant: its gradient is -sum_t beta^t (dU/d log c) d log c / d theta,
    back-propagation through time without the graph through time."""
    m, _ = cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    f = network(unpack(theta), features(batch.k, batch.eps, m, batch.K, batch.z, econ)).clamp(max=0.0)
    first_order = policy_residual(batch, econ) * econ.gamma * marginal_utility(batch.c, econ) * batch.c
    discount = econ.beta ** torch.arange(len(f), device=f.device, dtype=f.dtype).unsqueeze(1)
    return -(discount * first_order * f).sum(0).mean()


def thin(batch: Batch, cfg: Config) -> Batch:
    """Every stride-th period of the first half, as one list of states: their labels have at least T / 2 periods of
    realised utility in them before V takes over."""
    return Batch(*[path[: cfg.horizon // 2 : cfg.stride].flatten() for path in batch])


HISTORY = ("seconds", "mean_K", "objective", "policy_residual", "value_residual", "slope_residual", "at_limit",
           "policy_taken", "value_taken", "policy_damping", "value_damping", "rate")


def iteration_figures(state: dict, objective: Tensor, batch: Batch, econ: Economy, cfg: Config, taken) -> Tensor:
    """The figures of HISTORY from mean_K to value_damping, on the device."""
    V, V_k = network_value(unpack(state["value"]), batch.k, batch.eps, batch.K, batch.z, econ)
    level, slope = batch.U - V, (batch.lam - V_k) / marginal_utility(batch.c, econ)
    m, _ = cash_on_hand(batch.k, batch.eps, batch.K, batch.z, econ)
    free = batch.c < m * (1 - 1e-6)
    at_limit = 1 - free.to(m.dtype).mean()
    first_order = torch.where(free, policy_residual(batch, econ), torch.zeros_like(m))
    rms = [x.square().mean().sqrt() for x in (first_order, level, slope)]
    return torch.stack([state["k"].mean(), objective, *rms, at_limit, *taken, *state["damping"]])


def iterate(state: dict, econ: Economy, cfg: Config, kernels: Kernels, rng: torch.Generator, optimizers) -> Tensor:
    """One outer iteration, in place on the tensors of the state: learn from the states of the last roll-out, then
    simulate and roll out under the new policy. Returns its figures without waiting for them."""
    states = Batch(*[state[f"batch_{name}"] for name in Batch._fields])
    taken = torch.zeros_like(state["rates"])
    if state["iteration"] > 0 and cfg.optimizer == "gauss-newton":
        update = bellman_update if value_only(state, cfg) else gauss_newton_updates
        taken = update(state, states, econ, cfg, kernels)
    if cfg.optimizer == "adam":
        taken = adam_updates(state, econ, cfg, kernels, rng, optimizers)
    layers = unpack(state["policy"])

    def policy(k, eps, K, z):
        return kernels.network_capital(layers, k, eps, K, z, econ)

    scale = 1 + cfg.K_spread * (2 * uniform(state["z"].shape, state["k"], rng) - 1)
    panel = Panel(state["k"] * scale, state["eps"], state["z"])
    for t, (k, eps, K, z, _) in enumerate(simulate(policy, panel, cfg.periods, econ, rng, cfg.systematic)):
        state["K_path"][t], state["z_path"][t] = K[:, 0], z[:, 0]
        panel = Panel(k, eps, z)
    for name, tensor in zip(Panel._fields, panel):
        state[name].copy_(tensor)
    batch = roll_out_sample(state, econ, cfg, kernels, rng)
    for name, tensor in zip(Batch._fields, thin(batch, cfg)):
        state[f"batch_{name}"].copy_(tensor)
    if state["iteration"] == 0 and cfg.optimizer == "gauss-newton":
        for _ in range(10):  # the value network, a constant so far, meets its first labels
            value_update(state, states, state["rates"][1], econ, cfg, kernels)
    return iteration_figures(state, econ.V_ss + batch.U[0].mean(), states, econ, cfg, taken)


def roll_out_sample(state: dict, econ: Economy, cfg: Config, kernels: Kernels, rng: torch.Generator) -> Batch:
    """Labels of freshly drawn households under the current networks."""
    panel = Panel(state["k"], state["eps"], state["z"])
    paths = sample_households(panel, state["K_path"], state["z_path"], econ, cfg, rng)
    return roll_out_batch(unpack(state["policy"]), unpack(state["value"]), paths, econ, cfg, kernels)


def value_update(state: dict, states: Batch, rate: Tensor, econ: Economy, cfg: Config, kernels: Kernels) -> Tensor:
    damping = state["damping"]
    value, damping[1], taken = value_step(state["value"], rate, damping[1], states, econ, cfg, kernels)
    state["value"].copy_(value)
    return taken


def gauss_newton_updates(state: dict, states: Batch, econ: Economy, cfg: Config, kernels: Kernels) -> Tensor:
    """One policy and one value step on the same states; whether they were taken, (2,)."""
    (policy_rate, value_rate), damping = state["rates"], state["damping"]
    policy, damping[0], taken = policy_step(state["policy"], policy_rate, damping[0], states, econ, cfg, kernels)
    value_taken = value_update(state, states, value_rate, econ, cfg, kernels)
    state["policy"].copy_(policy)
    return torch.stack([taken, value_taken]).to(policy.dtype)


def value_only(state: dict, cfg: Config) -> bool:
    """The last outer iterations leave the policy alone and fit the value network to it."""
    return cfg.optimizer == "gauss-newton" and state["iteration"] >= cfg.iterations - cfg.final_value_steps > 0


def bellman_update(state: dict, states: Batch, econ: Economy, cfg: Config, kernels: Kernels) -> Tensor:
    damping = state["damping"]
    value, damping[1], taken = bellman_step(state["value"], damping[1], states, econ, cfg, kernels)
    state["value"].copy_(value)
    return torch.stack([torch.zeros_like(taken), taken]).to(value.dtype)


def adam_updates(state: dict, econ: Economy, cfg: Config, kernels: Kernels, rng, optimizers: dict) -> Tensor:
    """value_steps of Adam on one roll-out, then policy_steps, each on a roll-out of its own."""

    def descend(name, loss):
        theta = optimizers[name].param_groups[0]["params"][0]
        with torch.enable_grad():
            (theta.grad,) = torch.autograd.grad(loss(theta), theta)
        optimizers[name].step()

    if state["iteration"] > 0:  # before, there is no simulated path
        states = thin(roll_out_sample(state, econ, cfg, kernels, rng), cfg)
        for _ in range(cfg.value_steps):
            descend("value", lambda theta: value_loss(theta, states, econ, cfg))
        for _ in range(cfg.policy_steps):
            batch = roll_out_sample(state, econ, cfg, kernels, rng)
            descend("policy", lambda theta, batch=batch: policy_loss(theta, batch, econ))
    return torch.ones_like(state["rates"])


def make_optimizers(state: dict, cfg: Config) -> dict:
    """Adam on the state's own tensors, for the presets that use it."""
    if cfg.optimizer != "adam":
        return {}
    rates = {"policy": cfg.policy_rate, "value": cfg.value_rate}
    return {name: torch.optim.Adam([state[name].requires_grad_()], lr=rate) for name, rate in rates.items()}


def initial_state(econ: Economy, cfg: Config, seed: int, rng: torch.Generator) -> dict:
    """Everything that a run carries from one outer iteration to the next."""
    device = econ.Z.device
    panel = initial_panel(cfg.n_economies, cfg.n_agents, econ, rng)
    n_states = cfg.batch * len(range(0, cfg.horizon // 2, cfg.stride))
    return {
        "iteration": 0,
        "policy": initial_parameters(cfg.hidden, math.log(cfg.initial_share), seed).to(device),
        "value": initial_parameters(cfg.hidden, 0.0, seed + 1).to(device),
        "damping": torch.full((2,), 1e-2, device=device),
        "rates": torch.zeros(2, device=device),
        "caution": 1.0,
        **panel._asdict(),
        "K_path": torch.zeros(cfg.periods, cfg.n_economies, device=device),
        "z_path": torch.zeros(cfg.periods, cfg.n_economies, device=device, dtype=torch.int64),
        **{f"batch_{name}": torch.zeros(n_states, device=device, dtype=torch.int64 if name in ("eps", "z") else None)
           for name in Batch._fields},
        "history": {name: [] for name in HISTORY},
    }


def set_rates(state: dict, cfg: Config, optimizers: dict) -> None:
    """Steps of full size up to decay_from, then falling like 1 / n: from there on they average the noise out. Adam
    keeps its rates. All are smaller for a while after an iteration that was taken back."""
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = state["caution"] * getattr(cfg, f"{name}_rate")
    fall = 1 + cfg.decay * max(state["iteration"] - cfg.decay_from, 0)
    state["rates"][0] = state["caution"] * cfg.policy_rate / (1 if optimizers else fall)
    state["rates"][1] = state["caution"] / fall


def find_trouble(figures: dict, last_residual: float) -> str | None:
    """The first quantity that says the iteration went wrong."""
    for name, figure in figures.items():
        if not math.isfinite(figure):
            return f"{name} is {figure}"
    if not 0.1 < figures["mean_K"] < 1000:
        return f"mean_K is {figures['mean_K']:.3g}, outside (0.1, 1000)"
    if figures["at_limit"] > 0.9:
        return f"at_limit is {figures['at_limit']:.2f}: the policy network is saturated, nobody saves"
    if figures["policy_residual"] > max(2 * last_residual, 0.05):
        return f"policy_residual rose from {last_residual:.3g} to {figures['policy_residual']:.3g}"
    return None


def train(state: dict, econ: Economy, cfg: Config, kernels: Kernels, rng: torch.Generator, graphs: bool,
          after_iteration: Callable[[dict], None]) -> None:
    """The outer loop, from state['iteration'] to cfg.iterations. An iteration that went wrong is taken back and
    tried again with new draws and half the step; three in a row raise UserError. One wait for the device an
    iteration: its figures."""
    optimizers = make_optimizers(state, cfg)
    for name, optimizer in optimizers.items():
        if f"adam_{name}" in state:
            optimizer.load_state_dict(state[f"adam_{name}"])
    tensors = [value.detach() for value in state.values() if isinstance(value, Tensor)]
    graphs_of_phase, failures = {}, 0
    while state["iteration"] < cfg.iterations:
        start, before = time.perf_counter(), [tensor.clone() for tensor in tensors]
        optimizers_before = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in optimizers.items()})
        set_rates(state, cfg, optimizers)
        with torch.no_grad():
            if graphs and state["iteration"] > 0 and not optimizers:
                phase = value_only(state, cfg)
                if phase not in graphs_of_phase:
                    step = functools.partial(iterate, state, econ, cfg, kernels, rng, optimizers)
                    graphs_of_phase = {phase: capture(step, tensors, rng)}
                figures = graphs_of_phase[phase]()
            else:
                figures = iterate(state, econ, cfg, kernels, rng, optimizers)
        figures = dict(zip(HISTORY[1:], figures.tolist()))
        residuals = [] if optimizers else state["history"]["policy_residual"]  # Adam's labels are too noisy to compare
        trouble = find_trouble(figures, residuals[-1] if residuals else math.inf)
        if trouble:
            failures += 1
            tqdm.write(f"iteration {state['iteration'] + 1} taken back: {trouble}")
            if failures == 3:
                raise UserError(f"{trouble}; tried three times; lower --policy-rate or raise --damping")
            for tensor, old in zip(tensors, before):
                tensor.copy_(old)
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(optimizers_before[name])
            state["caution"] /= 2
            continue
        failures, state["caution"] = 0, min(1.0, 1.5 * state["caution"])
        figures.update(seconds=time.perf_counter() - start, rate=float(state["rates"][0]))
        for name, column in state["history"].items():
            column.append(figures[name])
        state["iteration"] += 1
        state.update({f"adam_{name}": optimizer.state_dict() for name, optimizer in optimizers.items()})
        after_iteration(state)


def capture(step: Callable[[], Tensor], tensors: List[Tensor], rng: torch.Generator) -> Callable[[], Tensor]:
    """The whole iteration as one CUDA graph: about 10^4 small kernels without a launch from Python each."""
    before, rng_before = [tensor.clone() for tensor in tensors], rng.get_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuBLAS, cuSOLVER and TorchScript set themselves up outside the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, old in zip(tensors, before):
        tensor.copy_(old)
    rng.set_state(rng_before)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            figures = step()
    except RuntimeError as error:  # a library call that this torch cannot capture
        tqdm.write(f"no CUDA graph, iterations are launched from Python and slower: {str(error).splitlines()[0]}")
        return step

    def replay() -> Tensor:
        graph.replay()
        return figures

    return replay


# ---------------------------------------------------------------------------------------------- solutions


class Solution:
    """A trained policy and value network, in float64: what is judged, saved and loaded."""

    def __init__(self, cal: Calibration, cfg: Config, policy: Tensor, value: Tensor, device="cpu", mode="none"):
        self.calibration, self.config = cal, cfg
        self.econ = build_economy(cal, device, torch.float64)
        self.parameters = {"policy": policy.detach().to(device, torch.float64),
                           "value": value.detach().to(device, torch.float64)}
        self.kernels = compile_kernels(mode)

    def policy(self, k: Tensor, eps: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """k' for float64 tensors that broadcast against k."""
        return self.kernels.network_capital(unpack(self.parameters["policy"]), k, eps, K, z, self.econ)

    def values(self, k: Tensor, eps: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """V in utils, float64 tensors of one shape."""
        V, _ = self.kernels.network_value(unpack(self.parameters["value"]), k, eps, K, z, self.econ)
        return V + self.econ.V_ss

    def next_capital(self, k, eps, K, z) -> np.ndarray:
        """k' for numbers or arrays that broadcast: k, K real, eps 0 unemployed / 1 employed, z 0 bad / 1 good."""
        return on_arrays(self.policy, self.econ.Z.device, k, eps, K, z)

    def value(self, k, eps, K, z) -> np.ndarray:
        """Expected discounted utility in utils, arguments as in next_capital."""
        return on_arrays(self.values, self.econ.Z.device, k, eps, K, z)


def on_arrays(function: Callable, device, k, eps, K, z) -> np.ndarray:
    """Call a tensor function of the state with numbers or arrays; ValueError where eps or z is no index."""
    k, eps, K, z = np.broadcast_arrays(k, eps, K, z)
    for name, index in (("eps", eps), ("z", z)):
        if not np.isin(index, (0, 1)).all():
            raise ValueError(f"{name} must be 0 or 1, not {index[~np.isin(index, (0, 1))].flat[0]}")
    real = [torch.tensor(x, dtype=torch.float64, device=device) for x in (k, K)]
    index = [torch.tensor(x.astype(np.int64), device=device) for x in (eps, z)]
    return function(real[0], index[0], real[1], index[1]).cpu().numpy()


# ---------------------------------------------------------------------------------------------- accuracy


class States(NamedTuple):
    """States visited on the ergodic set, each (n,), with the K' that followed."""

    k: Tensor
    eps: Tensor
    K: Tensor
    z: Tensor
    K_next: Tensor


def ergodic_states(solution, econ: Economy, cfg: Config, B: int, N: int, seed: int):
    """Simulate a solution from the dispersed panel: pooled States, and K_path, z_path (periods, B). The same seed
    gives every solution the same shocks."""
    rng = torch.Generator(econ.Z.device).manual_seed(seed)
    panel = initial_panel(B, N, econ, rng, torch.float64)
    pooled, K_path, z_path = [], [], []
    periods = simulate(solution.policy, panel, cfg.eval_periods, econ, rng)
    periods = tqdm(periods, f"simulation, N = {N}", cfg.eval_periods, leave=False, disable=None)
    for t, (k, eps, K, z, k_next) in enumerate(periods):
        if t >= cfg.eval_drop:
            K_path.append(K[:, 0])
            z_path.append(z[:, 0])
            if (t - cfg.eval_drop) % cfg.eval_every == 0:
                K_next = k_next.mean(1, keepdim=True)
                pooled.append([x.expand_as(k).flatten() for x in (k, eps, K, z, K_next)])
    return States(*map(torch.cat, zip(*pooled))), torch.stack(K_path), torch.stack(z_path)


def next_value(solution, k_next: Tensor, states: States, econ: Economy) -> Tensor:
    """E V(s') at a choice of k', any number of states."""
    return expected(solution.values(*successors(k_next, states.K_next)), states.eps, states.z, econ)


def bellman_errors(solution, states: States, econ: Economy) -> Tuple[Tensor, Tensor]:
    """u(c) + beta E V(s') - V(s) at the policy's own c and at the best one (golden-section search), in utils: the
    Bellman error of Han, Yang & E (2021) is the second."""
    m, _ = cash_on_hand(states.k, states.eps, states.K, states.z, econ)
    V = solution.values(*states[:4])

    def objective(share):
        return utility(share * m, econ) + econ.beta * next_value(solution, (1 - share) * m, states, econ)

    own_share = 1 - solution.policy(*states[:4]) / m
    low, high, golden = own_share * 0.5, (own_share * 1.5).clamp(max=1.0), (math.sqrt(5) - 1) / 2
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        better = objective(left) > objective(right)
        low, high = torch.where(better, low, left), torch.where(better, right, high)
    own = objective(own_share)
    best = torch.maximum(own, objective((low + high) / 2))
    return own - V, best - V


def euler_errors(solution, states: States, econ: Economy) -> Tensor:
    """1 - c~ / c with u'(c~) = beta E[R' u'(c')], c~ at most m, where the limit k' >= 0 does not hold c = c~ = m."""
    m, _ = cash_on_hand(states.k, states.eps, states.K, states.z, econ)
    k_next = solution.policy(*states[:4])
    nexts = successors(k_next, states.K_next)
    m_next, R_next = cash_on_hand(*nexts, econ)
    c_next = m_next - solution.policy(*nexts)
    implied = (econ.beta * expected(R_next * marginal_utility(c_next, econ), states.eps, states.z, econ))
    implied = torch.minimum(implied ** (-1 / econ.gamma), m)
    free = (k_next > 0) | (implied < m)
    return (1 - implied / (m - k_next))[free]


def error_figures(error: np.ndarray) -> dict:
    size = np.abs(error)
    return {"mean": size.mean(), "rmse": np.sqrt(np.mean(error**2)), "max": size.max()}


def inequality(k: np.ndarray) -> dict:
    """Moments, quantiles, Gini and Lorenz curve (share of capital held by the poorest 0, 5, ..., 100%)."""
    k = np.sort(k)
    held = np.concatenate([[0.0], np.cumsum(k) / k.sum()])
    people = np.linspace(0, 1, len(held))
    return {
        "mean": k.mean(), "std": k.std(),
        "quantiles": {str(q): np.percentile(k, q) for q in (1, 5, 25, 50, 75, 95, 99)},
        "gini": 1 - 2 * np.trapezoid(held, people),
        "lorenz": list(np.interp(np.linspace(0, 1, 21), people, held)),
    }


def law_of_motion_figures(K_path: np.ndarray, z_path: np.ndarray) -> dict:
    """ln K' = a(z) + b(z) ln K by regression, and Den Haan's (2010) dynamic error: the largest distance in percent
    between K and the path that the law of motion draws by itself from the same z."""
    alm, r2 = regress_law_of_motion(K_path, z_path)
    ln_K = np.log(K_path)
    forecast = ln_K.copy()
    for t in range(len(ln_K) - 1):
        forecast[t + 1] = alm[z_path[t], 0] + alm[z_path[t], 1] * forecast[t]
    error = 100 * np.abs(forecast - ln_K)
    return {"coefficients": alm, "r2": r2, "den_haan_max_percent": error.max(), "den_haan_mean_percent": error.mean()}


def judge(solution, econ: Economy, cfg: Config, B: int, N: int, seed: int) -> Tuple[dict, dict]:
    """All figures of one solution at one N, and the arrays behind them."""
    states, K_path, z_path = ergodic_states(solution, econ, cfg, B, N, seed)
    some = torch.randperm(len(states.k), generator=torch.Generator().manual_seed(seed))[: cfg.eval_states]
    sample = States(*[x[some.to(x.device)] for x in states])
    own, best = [x.cpu().numpy() for x in bellman_errors(solution, sample, econ)]
    euler = euler_errors(solution, sample, econ).abs().cpu().numpy()
    k, K_path, z_path = states.k.cpu().numpy(), K_path.cpu().numpy(), z_path.cpu().numpy()
    figures = {
        "n_agents": N, "n_economies": B, "periods": cfg.eval_periods - cfg.eval_drop, "states": len(sample.k),
        "bellman_own_c": error_figures(own), "bellman_best_c": error_figures(best),
        "euler_log10": {"mean": np.log10(euler.mean()), "p99": np.log10(np.percentile(euler, 99)),
                        "max": np.log10(euler.max())},
        "capital": inequality(k), "law_of_motion": law_of_motion_figures(K_path, z_path),
    }
    arrays = {"k": k, "K_path": K_path, "z_path": z_path, "sample_k": sample.k.cpu().numpy(), "bellman": own}
    return figures, arrays


def policy_distance(network, grid, econ: Economy) -> dict:
    """Mean and largest |k' - k' of the grid| over k in [0.5, 160] and K in {37, 39.5, 42} (scaled with K_ss where
    the calibration differs), both z, both eps."""
    scale = econ.K_ss / steady_state_capital(Calibration())
    k, K = scale * np.linspace(0.5, 160, 640), scale * np.array([37, 39.5, 42])
    states = np.meshgrid(k, [0, 1], K, [0, 1], indexing="ij")
    gap = np.abs(network.next_capital(*states) - grid.next_capital(*states))
    return {"mean": gap.mean(), "max": gap.max()}


# ---------------------------------------------------------------------------------------------- impulse responses

SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")


def impulse_paths(solution, econ: Economy, cfg: Config, z_0: int, seed: int) -> dict:
    """Series (paths, periods) of economies that were in the good state a period before 0 and are in z_0 at 0.
    Every random number is the same whatever z_0 and the solution; employment at 0 is drawn given both states."""
    rng = torch.Generator(econ.Z.device).manual_seed(seed)
    panel = initial_panel(cfg.irf_paths, cfg.irf_agents, econ, rng, torch.float64)
    burn = simulate(solution.policy, panel, cfg.irf_burn, econ, rng)
    for k, eps, _, z, k_next in tqdm(burn, "impulse responses", cfg.irf_burn, leave=False, disable=None):
        pass
    good, bad_or_good = torch.ones_like(z), torch.full_like(z, z_0)
    eps = draw_eps(uniform(eps.shape, k, rng), z, good, eps, econ)
    k = solution.policy(k_next, eps, k_next.mean(1, keepdim=True), good)
    panel = Panel(k, draw_eps(uniform(eps.shape, k, rng), good, bad_or_good, eps, econ), bad_or_good)
    columns = []
    for k, eps, K, z, k_next in simulate(solution.policy, panel, cfg.irf_periods, econ, rng):
        m, R = cash_on_hand(k, eps, K, z, econ)
        columns.append([K[:, 0], output(K, z, econ)[:, 0], (m - k_next).mean(1), R[:, 0], z[:, 0].double()])
    return {name: torch.stack(series, 1).cpu().numpy() for name, series in zip(SERIES, zip(*columns))}


def impulse_responses(solution, econ: Economy, cfg: Config, seed: int) -> dict:
    """Series -> (benchmark, shocked), each (paths, periods): z_0 good and z_0 bad."""
    benchmark, shocked = [impulse_paths(solution, econ, cfg, z_0, seed) for z_0 in (1, 0)]
    return {name: (benchmark[name], shocked[name]) for name in SERIES}


# ---------------------------------------------------------------------------------------------- grid solution
# Maliar, Maliar & Valli (2010), by endogenous gridpoints


@dataclass(frozen=True)
class GridConfig:
    """Settings of the grid solution; at the defaults a finer grid changes nothing that matters."""

    n_k: int = option(400, "nodes of individual capital k in the household problem")
    n_K: int = option(12, "nodes of aggregate capital K in the household problem")
    k_max: float = option(1000.0, "largest k; no household comes near it")
    exponent: float = option(4.0, "k nodes are k_max x^exponent, x uniform: dense near the borrowing limit")
    K_low: float = option(0.75, "smallest K, a multiple of steady-state capital")
    K_high: float = option(1.35, "largest K, a multiple of steady-state capital")
    n_k_fine: int = option(2000, "k points of the policy table and of the histogram")
    n_K_fine: int = option(41, "K points of the policy table, which is linear in between")
    periods: int = option(6000, "periods simulated for the law of motion; a fifth of them at first")
    burn_in: int = option(200, "first periods that the regression leaves out")
    sweeps: int = option(100, "most EGM sweeps between two updates of the law of motion")
    damping: float = option(0.5, "weight of the new law of motion; above 0.8 it cycles")
    tolerance: float = option(3e-7, "largest relative change of c, and of K' forecast, at the end")
    max_updates: int = option(60, "updates of the law of motion before giving up")
    seed: int = option(0, "seed of the path of z behind the law of motion")


# Maliar, Maliar & Valli (2010): 100 nodes of k with exponent 7 on [0, 1000], 4 nodes of K on [30, 50]
PUBLISHED_GRID = GridConfig(n_k=100, exponent=7.0, n_K=4, K_low=30 / steady_state_capital(Calibration()),
                            K_high=50 / steady_state_capital(Calibration()))
# for the preset smoke
SMOKE_GRID = GridConfig(n_k=100, n_K=6, n_k_fine=300, n_K_fine=11, periods=2000, burn_in=50, tolerance=1e-5)
C_MIN = 1e-12  # keeps u'(c) finite for a household with nothing: k = 0, unemployed, no benefits


def interpolate_table(table: Tensor, k: Tensor, eps: Tensor, K: Tensor, z: Tensor, grid: GridSolution) -> Tensor:
    """A table (z, eps, n_K, n_k) at states of one shape: bilinear in (k, K), linear beyond the ends. No search, as k
    is power-spaced and K uniform."""
    n_K, n_k = table.shape[2], table.shape[3]
    i = ((k.clamp(min=0.0) / grid.k_max) ** (1 / grid.exponent) * (n_k - 1)).floor().clamp(max=n_k - 2)
    left, right = [grid.k_max * (x / (n_k - 1)) ** grid.exponent for x in (i, i + 1)]
    position = (K - grid.K_low) / (grid.K_high - grid.K_low) * (n_K - 1)
    j = position.floor().clamp(0, n_K - 2)
    along_k, along_K, flat = (k - left) / (right - left), position - j, table.reshape(-1)
    corner = ((2 * z + eps) * n_K + j.long()) * n_k + i.long()
    low, low1, high, high1 = [flat[corner + step] for step in (0, 1, n_k, n_k + 1)]
    below = low + along_k * (low1 - low)
    return below + along_K * (high + along_k * (high1 - high) - below)


@dataclass(frozen=True)
class GridSolution:
    """Policy table on power-spaced k and uniform K; law of motion ln K' = a(z) + b(z) ln K behind it."""

    table: Tensor  # (z, eps, n_K_fine, n_k_fine) k', float64
    k_max: float
    exponent: float
    K_low: float
    K_high: float
    alm_coefficients: np.ndarray  # (z, 2) intercept and slope
    alm_r2: np.ndarray  # (z,)

    value_table: Tensor  # (z, eps, n_K_fine, n_k_fine) V of this policy in utils, float64

    def policy(self, k: Tensor, eps: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """k' for float64 tensors that broadcast, on the table's device."""
        return interpolate_table(self.table, k, eps, K, z, self).clamp(min=0.0)

    def values(self, k: Tensor, eps: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """V in utils, arguments as in policy."""
        return interpolate_table(self.value_table, k, eps, K, z, self)

    def next_capital(self, k, eps, K, z) -> np.ndarray:
        """k' for numbers or arrays that broadcast, as in Solution.next_capital."""
        return on_arrays(self.policy, self.table.device, k, eps, K, z)

    def to(self, device) -> GridSolution:
        tables = {"table": self.table.to(device), "value_table": self.value_table.to(device)}
        return dataclasses.replace(self, **tables)


class Nodes(NamedTuple):
    """The household problem on its nodes."""

    k: np.ndarray  # (n_k,)
    K: np.ndarray  # (n_K,)
    R: np.ndarray  # (z, n_K)
    y: np.ndarray  # (z, eps, n_K)
    m: np.ndarray  # (z, eps, n_K, n_k) cash on hand
    slope: np.ndarray  # (n_k, n_k) values at k -> derivatives at k of the cubic spline through them


def power_grid(n: int, k_max: float, exponent: float) -> np.ndarray:
    return k_max * np.linspace(0, 1, n) ** exponent


def household_nodes(config: GridConfig, K_ss: float, econ: Economy) -> Nodes:
    k = power_grid(config.n_k, config.k_max, config.exponent)
    K, z = K_ss * np.linspace(config.K_low, config.K_high, config.n_K), np.arange(2)[:, None]
    R, w = prices(K, z, econ)
    y = np.stack([income(eps, w, z, econ) for eps in range(2)], axis=1)
    m = R[:, None, :, None] * k + y[..., None]
    return Nodes(k, K, R, y, m, scipy.interpolate.CubicSpline(k, np.eye(len(k))).derivative()(k))


def invert(k_endo: np.ndarray, nodes: Nodes, k: np.ndarray) -> np.ndarray:
    """k'(k) from the k (..., n_k) at which each k' of the grid is chosen: cubic Hermite, slopes by splines,
    and 0 below the first k_endo, so that no polynomial bends across the kink of the borrowing limit."""
    count = np.arange(len(nodes.k))
    position = np.array([np.interp(k, column, count) for column in k_endo.reshape(-1, len(count))])
    position = position.reshape(*k_endo.shape[:-1], len(k))
    i = np.minimum(position.astype(int), len(count) - 2)
    t, rise = position - i, nodes.k[i + 1] - nodes.k[i]
    run = np.take_along_axis(np.diff(k_endo), i, -1)
    dk_next = 1 / (k_endo @ nodes.slope.T)
    d0, d1 = run * np.take_along_axis(dk_next, i, -1), run * np.take_along_axis(dk_next, i + 1, -1)
    k_next = nodes.k[i] + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return np.where(k > k_endo[..., :1], k_next.clip(0), 0.0)


def to_next_K(alm: np.ndarray, K: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """K' (z, n_K) that the law of motion expects from nodes K, and the matrix (z, n_K, n_K) of the cubic spline that
    takes values at K to values at K'."""
    K_next = np.exp(alm[:, :1] + alm[:, 1:] * np.log(K))
    return K_next, scipy.interpolate.CubicSpline(K, np.eye(len(K)))(K_next)


def euler_step(c: np.ndarray, nodes: Nodes, to_K_next: np.ndarray, R_next: np.ndarray, econ: Economy):
    """One backward step of Carroll (2006): the k (z, eps, n_K, n_k) at which each k' of the grid is
    optimal, from next period's c. to_K_next (z, n_K, n_K) interpolates from K to K'; R_next (z, z', n_K)."""
    c_next = np.maximum(to_K_next[:, None, None] @ c, C_MIN)  # (z, z', eps', n_K, n_k)
    gain = R_next[:, :, None, :, None] * c_next**-econ.gamma
    u_prime = econ.beta * (econ.P.reshape(2, 2, 4) @ gain.reshape(2, 4, -1)).reshape(c.shape)
    return (u_prime ** (-1 / econ.gamma) + nodes.k - nodes.y[..., None]) / nodes.R[:, None, :, None]


def solve_household(c: np.ndarray, alm: np.ndarray, nodes: Nodes, econ: Economy, config: GridConfig):
    """EGM sweeps on c (z, eps, n_K, n_k) given the law of motion; returns c, k_endo and the change of c."""
    K_next, to_K_next = to_next_K(alm, nodes.K)
    R_next = prices(K_next[:, None], np.arange(2)[:, None], econ)[0]
    for _ in range(config.sweeps):
        k_endo = euler_step(c, nodes, to_K_next, R_next, econ)
        c_last, c = c, nodes.m - invert(k_endo, nodes, nodes.k)
        change = np.max(np.abs(c - c_last) / np.maximum(c, C_MIN))
        if change < config.tolerance:
            break
    return c, k_endo, change


def simulate_histogram(table: np.ndarray, k: np.ndarray, K: np.ndarray, mass: np.ndarray, z_path: np.ndarray,
                       econ: Economy):
    """Non-stochastic simulation of Young (2010): mass (eps, n_k_fine) at k moves to the two neighbours of k',
    which keeps the mean. table (z, eps, n_K_fine, n_k_fine). Returns K (periods,) and the last mass."""
    K_path, n = np.empty(len(z_path)), len(k)
    for t, z in enumerate(z_path):
        K_path[t] = mass.sum(0) @ k
        position = (K_path[t] - K[0]) / (K[1] - K[0])
        j = min(max(int(position), 0), len(K) - 2)
        k_next = table[z, :, j] + (position - j) * (table[z, :, j + 1] - table[z, :, j])  # (eps, n_k_fine)
        position = np.interp(k_next, k, np.arange(n))
        i = np.minimum(position.astype(int), n - 2)
        right = mass * (position - i)
        moved = [np.bincount(i[eps], mass[eps] - right[eps], n) + np.bincount(i[eps] + 1, right[eps], n)
                 for eps in range(2)]
        employed = econ.p_employed[z, z_path[min(t + 1, len(z_path) - 1)]] @ moved
        mass = np.stack([moved[0] + moved[1] - employed, employed])
    return K_path, mass


def regress_law_of_motion(K_path: np.ndarray, z_path: np.ndarray):
    """ln K' on (1, ln K) in each z, from paths (periods,) or (periods, B): coefficients (z, 2) and R2 (z,)."""
    alm, r2 = np.full((2, 2), np.nan), np.full(2, np.nan)
    for z in np.unique(z_path[:-1]):
        at = z_path[:-1] == z
        x, y = np.log(K_path[:-1][at]), np.log(K_path[1:][at])
        alm[z] = np.polynomial.polynomial.polyfit(x, y, 1)
        r2[z] = 1 - np.var(y - alm[z, 0] - alm[z, 1] * x) / np.var(y)
    return alm, r2


def evaluate_grid(k_next: np.ndarray, k: np.ndarray, K: np.ndarray, alm: np.ndarray, cal: Calibration) -> np.ndarray:
    """V = u(c) + beta E V' (z, eps, n_K, n_k) of a policy k' at nodes k, K by sweeps. What they leave over is soon the
    same number everywhere, and MacQueen's bound takes it out: the rest falls by 0.97 a sweep, not by beta."""
    econ = build_economy(cal, dtype=torch.float64)
    states = [torch.tensor(x) for x in np.meshgrid([0, 1], [0, 1], K, k, indexing="ij")]
    m, _ = cash_on_hand(states[3], states[1], states[2], states[0], econ)
    u = utility((m - torch.tensor(k_next)).clamp(min=C_MIN), econ).numpy()
    position = np.interp(k_next, k, np.arange(len(k)))
    i = np.minimum(position.astype(int), len(k) - 2)
    _, spline = to_next_K(alm, K)
    V = np.full_like(u, econ.V_ss)
    for _ in range(2000):
        EV = spline[:, None] @ np.einsum("xiyj,yjKk->xiKk", econ.P.numpy(), V)
        low, high = np.take_along_axis(EV, i, -1), np.take_along_axis(EV, i + 1, -1)
        change = u + cal.beta * (low + (position - i) * (high - low)) - V
        V += change + change.mean() * cal.beta / (1 - cal.beta)
        if np.ptp(change) < 1e-6:
            break
    return V


def solve_grid(cal: Calibration = Calibration(), config: GridConfig = GridConfig(),
               progress: bool = False) -> GridSolution:
    """Krusell & Smith's (1998) fixed point: households believe a law of motion of K, which their savings
    confirm. Few EGM sweeps an update, so that the policy and the law of motion converge together."""
    econ, K_ss = build_economy(cal), steady_state_capital(cal)
    nodes = household_nodes(config, K_ss, econ)
    k = power_grid(config.n_k_fine, config.k_max, config.exponent)
    K = np.linspace(nodes.K[0], nodes.K[-1], config.n_K_fine)
    z_path, rng = [1], np.random.default_rng(config.seed)
    for u in rng.random(config.periods - 1):
        z_path.append(int(u < econ.p_good[z_path[-1]]))
    z_path = np.array(z_path)

    alm = np.array([[0.035 * np.log(K_ss), 0.965]] * 2)
    c = np.minimum(nodes.m, (1 - cal.beta) * nodes.m + 0.9 * nodes.y[:, 1:, :, None])  # permanent income
    mass = np.zeros((2, len(k)))
    mass[:, np.searchsorted(k, K_ss)] = cal.u_good, 1 - cal.u_good
    x = np.stack([np.ones(2), np.log(K_ss * np.array([0.9, 1.1]))])  # where two laws of motion are compared
    gap, damping, settled = np.inf, config.damping, False
    updates = tqdm(range(config.max_updates), "grid solution", disable=None if progress else True)
    for _ in updates:
        c, k_endo, change = solve_household(c, alm, nodes, econ, config)
        table = invert(scipy.interpolate.CubicSpline(nodes.K, k_endo, axis=2)(K), nodes, k)
        settling, settled = not settled and gap < 3e-5, settled or gap < 3e-5  # then on the long path, for good
        path = z_path if settled else z_path[: config.periods // 5]
        K_path, mass = simulate_histogram(table, k, K, mass, path, econ)
        if not (K_path > 0).all() or len(np.unique(path[config.burn_in :])) < 2:
            break  # no economy that a law of motion could describe
        new, r2 = regress_law_of_motion(K_path[config.burn_in :], path[config.burn_in :])
        gap_last, gap = gap, np.abs((new - alm) @ x).max()
        updates.set_postfix_str(f"change of c {change:.0e}, of ln K' {gap:.0e}")
        if max(gap, change) < config.tolerance:
            V = evaluate_grid(invert(k_endo, nodes, k), k, nodes.K, alm, cal)
            tables = [torch.from_numpy(x) for x in (table, scipy.interpolate.CubicSpline(nodes.K, V, axis=2)(K))]
            return GridSolution(tables[0], config.k_max, config.exponent, K[0], K[-1], alm, r2, tables[1])
        if gap > gap_last and not settling:  # the law of motion overshoots: more K expected means less saved
            damping /= 2
        alm = alm + damping * (new - alm)
    raise UserError(f"grid: no convergence in {config.max_updates} updates of the law of motion "
                       f"(c moves {change:.0e}, K forecast {gap:.0e}); lower damping or widen K_low, K_high")


# ---------------------------------------------------------------------------------------------- figures
# arrays in, one PNG out; the network is a solid line, the grid a dashed one

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False,
         "legend.handlelength": 3.0, "axes.formatter.useoffset": False}
BLUE, SKY = "#0072B2", "#56B4E9"  # Okabe & Ito (2008)
NETWORK = dict(color=SKY, linestyle="-", linewidth=2.8)  # light and wide: dashes on it show in grey print too
GRID = dict(color="black", linestyle=(0, (4, 2)), linewidth=1.1)  # drawn second: dashes on the solid line
GOODS = "(goods)"  # the unit of k, K, Y and c


@contextlib.contextmanager
def figure(path, height, note=""):
    """A figure 7 inches wide in the common style, written to path at the end; no display, no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(7, height), layout="constrained")
        yield fig
        if note:
            fig.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="0.3")
        fig.savefig(path, dpi=160, format="png", pil_kwargs={"optimize": True})


def legend_above(fig, *axes, ncols=3):
    """The labels of axes above all panels, where no data are."""
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside upper center", ncols=ncols)


def capital_axis(ax, k_max):
    """k on a scale of ln(1+k), so that poor households show."""
    ax.set_xscale("function", functions=(np.log1p, np.expm1))
    ax.set_xticks([k for k in (0, 1, 3, 10, 30, 100, 300, 1000) if k <= max(k_max, 1)])
    ax.set(xlim=(0, max(k_max, 1)), xlabel=f"individual capital k {GOODS}")


def log_axis(ax):
    """y on a log scale over whole decades, where anything is positive."""
    if ax.dataLim.y1 > 0:
        decades = np.floor(np.log10([ax.dataLim.minposy, ax.dataLim.y1])) + (0, 1)
        ax.set(yscale="log", ylim=10.0**decades)


def plot_gap(ax, x, gap):
    """Network minus grid, the strip under a panel."""
    ax.plot(x, gap, color=BLUE, linewidth=1.0, label="network - grid (lower panel)")
    ax.axhline(0, **GRID)
    ax.set_ylabel(f"difference\n{GOODS}")


def plot_distribution(path, k_net, k_grid, w1, note=""):
    """Density and left tail of individual capital k (n,); w1 is their Wasserstein-1 distance, in goods."""
    with figure(path, 3.6, note) as fig:
        density, tail = fig.subplots(1, 2, width_ratios=(2, 1))
        bins, low = np.linspace(0, max(k_net.max(), k_grid.max(), 1.0), 81), np.linspace(0, 10, 201)
        for name, k, style in (("network", k_net, NETWORK), ("grid", k_grid, GRID)):
            label = f"{name}: mean {k.mean():.2f}, std {k.std():.2f}"
            density.stairs(np.histogram(k, bins, density=True)[0], bins, label=label, **style)
            tail.plot(low, 100 * np.searchsorted(np.sort(k), low, side="right") / len(k), **style)
        density.set(xlabel=f"individual capital k {GOODS}", ylabel="density (per good)",
                    title=f"distribution: W1 distance {w1:.3f} goods", xlim=(0, bins[-1]), ylim=(0, None))
        tail.set(xlabel=f"k {GOODS}", ylabel="households with capital up to k (%)", title="the poorest",
                 xlim=(0, 10), xticks=range(0, 11, 2), ylim=(0, None))
        legend_above(fig, density)


def plot_history(path, history, note=""):
    """Training over outer iterations. history: name -> (iterations,); missing names leave a panel out."""
    panels = {"mean_K": f"mean capital K {GOODS}", "objective": "policy objective (utils)",
              "policy_residual": "policy residual (rms, unit-free)",
              "value_residual": "value residual (rms, utils)"}
    n = max(map(len, history.values()), default=0)
    seconds = f" ({np.sum(history.get('seconds', 0)):.0f} s in all)"
    with figure(path, 4.6, note) as fig:
        for ax, (name, title) in zip(fig.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
            y = np.asarray(history.get(name, np.full(n, np.nan)), float)
            ax.plot(1 + np.arange(len(y)), y, color=BLUE, linewidth=1.2, marker="o", markersize=2.5)
            ax.set(title=title if np.isfinite(y).any() else f"{title}: none", xlim=(0, n + 1))
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if "residual" in name:
                log_axis(ax)
        for ax in fig.axes[2:]:
            ax.set_xlabel(f"outer iteration{seconds}")


def plot_policies(path, next_capital_net, next_capital_grid, K, k_max, note=""):
    """k' - k at aggregate capital K by (z, eps), network minus grid below; of next_capital(k, eps, K, z)."""
    k = np.expm1(np.linspace(0, np.log1p(k_max), 400))
    with figure(path, 6.4, f"Aggregate capital K = {K:.1f}. {note}") as fig:
        axes = fig.subplots(4, 2, sharex=True, height_ratios=(3, 1.2, 3, 1.2))
        for z, state in enumerate(("bad state", "good state")):
            for eps, status in enumerate(("unemployed", "employed")):
                change, gap = axes[2 * z : 2 * z + 2, eps]
                k_net, k_grid = (np.asarray(f(k, eps, K, z)) for f in (next_capital_net, next_capital_grid))
                change.plot(k, k_net - k, label="network", **NETWORK)
                change.plot(k, k_grid - k, label="grid", **GRID)
                plot_gap(gap, k, k_net - k_grid)
                change.set(title=f"{state}, {status}", ylabel=f"k' - k {GOODS}")
                capital_axis(gap, k_max)
        for ax in axes[:, 1]:
            ax.set_ylabel("")
        for ax in axes[1]:
            ax.set_xlabel("")
        legend_above(fig, axes[0, 0], axes[1, 0])


def plot_bellman_bins(path, net, grid, label, note=""):
    """Mean and 95th percentile of |error| by bins of capital, equally wide in ln(1+k); net and grid: (k, error) at
    the states that each solution visits, (n,)."""
    edges = np.expm1(np.linspace(0, np.log1p(max(net[0].max(), grid[0].max(), 1.0)), 23))
    with figure(path, 4.2, note) as fig:
        ax, share = fig.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        for name, (k, error), style in (("network", net, NETWORK | {"marker": "o", "markersize": 4.5}),
                                        ("grid", grid, GRID | {"marker": "s", "markersize": 4})):
            index = np.clip(np.searchsorted(edges, k, side="right") - 1, 0, len(edges) - 2)
            count = np.bincount(index, minlength=len(edges) - 1)
            bins = np.flatnonzero(count >= min(20, count.max()))  # a percentile needs some observations
            x = [k[index == b].mean() for b in bins]
            groups = [np.abs(error[index == b]) for b in bins]
            ax.plot(x, [np.mean(g) for g in groups], label=f"{name}, mean", **style)
            ax.plot(x, [np.percentile(g, 95) for g in groups], label=f"{name}, 95th percentile",
                    **style | {"linewidth": style["linewidth"] / 2, "markerfacecolor": "white"})
        share.bar(edges[:-1], 100 * count / len(k), np.diff(edges), align="edge", color="0.75", ec="white")
        ax.set_ylabel(label)
        log_axis(ax)
        share.set_ylabel("households\n(%)")
        capital_axis(share, edges[-1])
        legend_above(fig, ax, ncols=2)


def impulse_response(benchmark, shocked, points=False):
    """Response of a series (paths, periods) in percent, a ratio of means, or in percentage points:
    mean, 10th and 90th percentile of the single paths' responses, each (periods,)."""
    def change(b, s):
        return 100 * (s - b) if points else 100 * (s / b - 1)
    low, high = np.percentile(change(benchmark, shocked), (10, 90), axis=0)
    return change(benchmark.mean(0), shocked.mean(0)), low, high


def plot_impulse_responses(path, net, grid, note=""):
    """Responses to a bad state at period 0. net and grid: series -> (benchmark, shocked), both (paths,
    periods); interest_rate holds the gross return R, shocks the index z (0 bad, 1 good)."""
    names = ("capital", "output", "consumption", "interest_rate", "shocks")
    with figure(path, 4.6, note) as fig:
        *axes, legend_axis = fig.subplots(2, 3, sharex=True).flat
        for ax, name in zip(axes, names, strict=True):
            points = name in ("interest_rate", "shocks")
            for solution, style, label in ((net, NETWORK, "network, mean"), (grid, GRID, "grid, mean")):
                benchmark, shocked = (-x if name == "shocks" else x for x in solution[name])  # -z counts bad
                mean, low, high = impulse_response(benchmark, shocked, points)
                t = np.arange(len(mean))
                if solution is net and name != "shocks":  # a single path is in one state or the other
                    ax.fill_between(t, low, high, color=SKY, alpha=0.25, linewidth=0,
                                    label="network, 10-90% of paths")
                ax.plot(t, mean, label=label, **style)
            ax.axhline(0, color="0.5", linewidth=0.7, zorder=1)
            ax.set(title="paths in the bad state" if name == "shocks" else name.replace("_", " "),
                   ylabel="percentage points" if points else "percent", xlim=(0, max(t[-1], 1)))
        legend_axis.set_axis_off()
        legend_axis.legend(*fig.axes[0].get_legend_handles_labels(), loc="center")
        for ax in axes[2:]:
            ax.set_xlabel("quarters after the shock")
            ax.tick_params(labelbottom=True)


def plot_capital_paths(path, K_net, K_grid, z, note=""):
    """Mean capital K (T,) of both solutions on one path of z (T,), and network minus grid."""
    with figure(path, 4.0, note) as fig:
        ax, gap = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        change = np.flatnonzero(np.diff(np.r_[False, np.asarray(z) == 0, False]))
        for start, end in change.reshape(-1, 2):
            for panel in (ax, gap):
                panel.axvspan(start - 0.5, end - 0.5, color="0.9", linewidth=0, zorder=0.5,
                              label="bad state" if panel is ax and start == change[0] else None)
        ax.plot(K_net, label="network", **NETWORK)
        ax.plot(K_grid, label="grid", **GRID)
        plot_gap(gap, np.arange(len(K_net)), K_net - K_grid)
        ax.set(ylabel=f"mean capital K {GOODS}", xlim=(0, max(len(K_net) - 1, 1)))
        gap.set_xlabel("period (quarters)")
        legend_above(fig, ax, gap, ncols=4)


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; --help lists every flag")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flag(section, item):
    """One dataclass field as a flag. Its default stays out of argparse: the preset decides it."""
    values = {"default": item.default} | {n: getattr(p, item.name, item.default) for n, p in PRESETS.items()}
    shown = [f"{n} {v!r}" for n, v in values.items() if n == "default" or v != item.default]
    extra = {"help": f"{item.metadata['help']} ({', '.join(shown)})".replace("%", "%%")}
    if isinstance(item.default, bool):
        extra["action"] = argparse.BooleanOptionalAction
    else:
        extra |= {"type": type(item.default), "choices": item.metadata["choices"]}
        extra["metavar"] = None if extra["choices"] else type(item.default).__name__.upper()
    section.add_argument(flag(item.name), **extra)


def parse(argv) -> Tuple[Calibration, Config, Run]:
    parser = Parser("deepham_ks", "%(prog)s [--flag value ...]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for kind in (Run, Calibration, Config):
        section = parser.add_argument_group(kind.__name__, kind.__doc__)
        for item in dataclasses.fields(kind):
            add_flag(section, item)
    given = vars(parser.parse_args(argv))

    def filled(base):
        return dataclasses.replace(base, **{f.name: given[f.name] for f in dataclasses.fields(base) if f.name in given})

    run = filled(Run())
    cal, cfg = filled(Calibration()), filled(PRESETS[run.preset])
    usual = "." if run.preset == "default" else f"runs/{run.preset}"
    run = dataclasses.replace(run, output_dir=run.output_dir or usual)
    check_run(run)
    check(cal, cfg)
    return cal, cfg, run


def refuse_outside(settings):
    """NaN and infinity lie in no interval that has an open end there."""
    for item in dataclasses.fields(settings):
        value, within = getattr(settings, item.name), item.metadata["within"]
        low, high = map(float, within[1:-1].split(","))
        at_end = (value == low and within[0] == "[") or (value == high and within[-1] == "]")
        if isinstance(value, (int, float)) and not (at_end or low < value < high):
            raise UserError(f"{flag(item.name)} {value}: give a value in {within}")


def check_run(run):
    refuse_outside(run)
    if not run.output_dir.isprintable():
        raise UserError(f"--output-dir {run.output_dir!r}: name a directory without control characters")
    if run.evaluate and run.resume:
        raise UserError("--evaluate trains nothing and --resume goes on training; give one of the two")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or --device auto")


def check(cal, cfg):
    """Values that are possible one by one and impossible together."""
    refuse_outside(cal)
    refuse_outside(cfg)
    p = employment_transition(cal)
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError("--u-bad, --u-good, --u-duration-bad, --u-duration-good imply a probability outside "
                        "[0, 1]; bring the two rates closer together or change the durations")
    for u in (cal.u_bad, cal.u_good):
        if cal.mu * u >= cal.l_bar * (1 - u):
            raise UserError("--mu, --u-bad, --u-good and --l-bar imply a tax of 100% or more; lower --mu")
    if not 0.1 < steady_state_capital(cal) < 1000:
        raise UserError(f"--alpha, --beta and --delta imply a capital of {steady_state_capital(cal):.3g}; "
                        "bring it into (0.1, 1000)")
    if cfg.eval_drop > cfg.eval_periods - 3:
        raise UserError(f"--eval-drop {cfg.eval_drop} leaves too little of --eval-periods {cfg.eval_periods}: lower it")
    if cfg.periods < cfg.horizon + 1:
        raise UserError(f"--periods {cfg.periods} is too short for --horizon {cfg.horizon}: "
                        f"give --periods {cfg.horizon + 1} or more")


def departures(cfg, reference, name: str = "paper") -> List[str]:
    pairs = [(f.name, getattr(cfg, f.name), getattr(reference, f.name)) for f in dataclasses.fields(cfg)]
    return [f"{field_name} {ours} ({name} {theirs})" for field_name, ours, theirs in pairs if ours != theirs]


# ---------------------------------------------------------------------------------------------- run folder

FORMAT = 1  # of checkpoint.pt and NN_weights_biases.pth; raise it whenever their keys change
PUBLISHING = ".deepham-publishing"  # all that is temporary is called .deepham-*


@contextlib.contextmanager
def disk_errors(output_dir):
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: {error}; earlier files are as they were; "
                        "see to space and permissions there, or name another directory") from error


def check_writable(directory: Path):
    """Refuse, before any work, a directory that cannot be made or written; leave no trace in it."""
    with disk_errors(directory):
        nearest = next(p for p in (directory, *directory.parents) if p.exists())
        tempfile.TemporaryFile(dir=nearest).close()  # root passes os.access() on a read-only disk


def tidy(output_dir: Path):
    """What a killed run left: results that were being published are published, half-written files go."""
    with disk_errors(output_dir):
        if (output_dir / PUBLISHING).exists():
            finish_publishing(output_dir)
        for left in output_dir.glob(".deepham-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_atomically(path: Path, data):
    """path holds its old bytes or the new ones, never a part."""
    partial = path.with_name(f".deepham-{path.name}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def seal(data) -> bytes:
    """A zip file ends with the length of its comment and the comment; in ours that is the rest's checksum.

    torch.load checks none: from a damaged directory entry it returned uninitialised memory.
    """
    return (32).to_bytes(2, "little") + hashlib.sha256(data).digest()


def packed(state: dict) -> bytes:
    buffer = io.BytesIO()  # on a full disk torch.save(path) fails with a RuntimeError that names no cause
    torch.save(state, buffer)
    data = buffer.getvalue()[:-2]
    return data + seal(data)


def save_checkpoint(path: Path, state: dict):
    write_atomically(path, packed({"format": FORMAT} | state))
    if Interrupted.pending:
        raise Interrupted(Interrupted.pending)


def load_checkpoint(path: Path, like: dict, asked: str) -> dict:
    """What save_checkpoint wrote, if like in kind, or a refusal. asked: the flag that wants the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{asked}: {path}: {error.strerror}; run without {asked} first, "
                        "or set --output-dir to the run's directory") from error
    try:
        intact = data[-34:] == seal(data[:-34])
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if intact else None
    except Exception:  # sealed by someone, but of another make: code in it, say
        state = None
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise UserError(f"{asked}: {path} is damaged or no file of this script; "
                        f"move it away and run without {asked}")
    if state["format"] != FORMAT:
        age = "a newer" if state["format"] > FORMAT else "an older"
        raise UserError(f"{asked}: {path} has format {state['format']}, of {age} deepham_ks.py; "
                        f"use that one (this one reads {FORMAT}), or move the file away, run without {asked}")
    if told := difference(state, like):
        raise UserError(f"{asked}: {path} is of another run: {told}; "
                        "give the flags of the run that wrote it, or another --output-dir")
    return state


def difference(found, like, name: str = "") -> str:
    """In words, the first place where found has not the keys, types, shapes or settings of like."""
    if isinstance(like, dict) and isinstance(found, dict):
        inner = ((f"{name}.{key}".lstrip("."), key) for key in like)
        told = (difference(found[k], like[k], at) if k in found else f"{at} is missing" for at, k in inner)
        return next(filter(None, told), "")

    def described(value):
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {tuple(value.shape)} {value.layout}"
        return repr(value) if name.startswith(("calibration.", "config.")) else type(value).__name__

    here, there = described(like), described(found)
    return "" if here == there else f"{name} is {there} in the file and {here} in this run"


@contextlib.contextmanager
def staged(output_dir: Path):
    """A hidden folder for the results; they replace the earlier ones together when all are written."""
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".deepham-", dir=output_dir))
        try:
            (staging / "new").mkdir()
            yield staging / "new"
            os.replace(staging, output_dir / PUBLISHING)  # from here on even kill -9 loses no result
            finish_publishing(output_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def finish_publishing(output_dir: Path):
    """Move the files of PUBLISHING/new in, earlier ones aside; where a move fails, all go back.

    File by file, so that what else a user keeps in figures/ or irf/ stays.
    """
    new, old = output_dir / PUBLISHING / "new", output_dir / PUBLISHING / "old"
    names = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    try:
        for name in names:
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            if (output_dir / name).is_file():
                os.replace(output_dir / name, old / name)
            os.replace(new / name, output_dir / name)
    except BaseException:
        for name in names:  # which moves were made is read off the disk
            if not (new / name).exists():
                os.replace(output_dir / name, new / name)
            if (old / name).exists():
                os.replace(old / name, output_dir / name)
        raise
    shutil.rmtree(output_dir / PUBLISHING)


# ---------------------------------------------------------------------------------------------- how a run ends


class Interrupted(BaseException):
    """SIGINT or SIGTERM. `except Exception` must not swallow it."""

    iteration = 0  # the training loop sets what the checkpoint holds
    pending = 0  # the signal, if one came: Python drops what is raised inside a destructor or a callback


def interrupt(signum, frame):
    Interrupted.pending = signum
    raise Interrupted(signum)


def is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "Storage size calculation overflowed",
             "array is too big")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def exit_status(work, argv: list) -> int:
    """work(argv), where a user's error, a signal or too little memory ends in one line on stderr."""
    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    Interrupted.iteration = Interrupted.pending = 0
    try:
        return work(argv)
    except UserError as error:
        line, status = f"error: {error}", 2
    except Interrupted as stop:
        again = shlex.join(["--resume", *(a for a in argv if a != "--resume")])
        saved = stop.iteration or "--resume" in argv
        cure = f"continue with: python deepham_ks.py {again}" if saved else "nothing was saved yet"
        line = f"stopped by {signal.Signals(stop.args[0]).name} after iteration {stop.iteration}; {cure}"
        status = 128 + stop.args[0]
    except OSError as error:  # standard output is a closed pipe or on a full disk
        line, status = f"error: {error}; results and checkpoint are as they were", 2
    except (MemoryError, RuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
        line, status = "error: out of memory; lower --n-agents, --n-economies, --batch or --horizon, after the " \
                       "training --eval-agents-large, --eval-economies-large, --irf-agents or --irf-paths", 2
    finally:
        Interrupted.pending = 0
        for signum, handler in before.items():
            signal.signal(signum, handler)
    print(f"deepham_ks: {line}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------------------------------- results


JUDGE_SEED = 20_000  # shocks on which every run is judged: far from the seeds of training, the same for all
WEIGHTS, CHECKPOINT = "NN_weights_biases.pth", "checkpoint.pt"
LAYERS = ("W1", "b1", "W2", "b2", "w3", "b3")


def weights_file(state: dict, cal: Calibration, cfg: Config, econ: Economy, run: Run) -> dict:
    """Everything needed to use the networks: layers, calibration, configuration and what inputs are scaled by."""
    networks = {name: dict(zip(LAYERS, (layer.detach().cpu().clone() for layer in unpack(state[name]))))
                for name in ("policy", "value")}
    return {**networks, "calibration": dataclasses.asdict(cal), "config": dataclasses.asdict(cfg), "seed": run.seed,
            "scalings": {name: getattr(econ, name) for name in ("K_ss", "m_ss", "c_ss", "V_ss")},
            "history": {name: list(column) for name, column in state["history"].items()}}


def read_weights(path: Path, cal: Calibration | None = None, hidden: int | None = None) -> dict:
    """The weights file, refused with a UserError if it is damaged or, where they are given, of another calibration
    or width."""
    layers = dict(zip(LAYERS, unpack(torch.zeros(n_parameters(hidden))))) if hidden else {}
    like = {"config": {"hidden": hidden} if hidden else {}, "calibration": dataclasses.asdict(cal) if cal else {},
            "policy": layers, "value": layers, "seed": 0, "history": {}}
    return load_checkpoint(path, like, "--evaluate")


def solution_from(weights: dict, device="cpu", mode="none") -> Solution:
    theta = [torch.cat([weights[name][layer].flatten() for layer in LAYERS]) for name in ("policy", "value")]
    return Solution(Calibration(**weights["calibration"]), Config(**weights["config"]), *theta, device, mode)


def load(path=WEIGHTS) -> Solution:
    """The solution in a weights file, with next_capital(k, eps, K, z) and value(k, eps, K, z) on numpy arrays.
    Raises UserError when the file is missing or damaged."""
    return solution_from(read_weights(Path(path)))


def compare(network: Solution, grid: GridSolution, cfg: Config) -> Tuple[dict, dict]:
    """Every accuracy figure of both on the same shocks, and the arrays behind the figures."""
    econ, figures, arrays = network.econ, {"network": {}, "grid": {}, "comparison": {}}, {}
    solutions = {"network": network, "grid": grid}
    for size, B, N in (("small", cfg.eval_economies, cfg.eval_agents),
                       ("large", cfg.eval_economies_large, cfg.eval_agents_large)):
        for name, solution in solutions.items():
            figures[name][size], arrays[name, size] = judge(solution, econ, cfg, B, N, JUDGE_SEED)
        k_net, k_grid = arrays["network", size]["k"], arrays["grid", size]["k"]
        figures["comparison"][size] = {"n_agents": N, "w1": scipy.stats.wasserstein_distance(k_net, k_grid),
                                       "std_ratio": k_net.std() / k_grid.std()}
    for name, solution in solutions.items():
        arrays[name, "irf"] = impulse_responses(solution, econ, cfg, JUDGE_SEED)
    gaps = {}
    for series in SERIES[:4]:
        points = series == "interest_rate"
        net, reference = [impulse_response(*arrays[name, "irf"][series], points)[0] for name in solutions]
        gaps[series] = np.abs(net - reference).max()
    figures["comparison"] |= {"policy_distance": policy_distance(network, grid, econ),
                              "impulse_response_gap": gaps | {"n_agents": cfg.irf_agents}}
    figures["grid"]["law_of_motion"] = {"coefficients": grid.alm_coefficients, "r2": grid.alm_r2}
    return figures, arrays


def verdict(figures: dict) -> list:
    """Rows (figure, network, grid, published, tolerance, passed). Published: Maliar, Maliar & Valli (2010) as their
    stored policy does on this protocol; Bellman errors: Han, Yang & E (2021), first moment."""
    net, grid, both = figures["network"], figures["grid"], figures["comparison"]
    n, N = both["small"]["n_agents"], both["large"]["n_agents"]
    rows = []

    def row(name, network, grid, published, tolerance, size=abs):
        rows.append((name, network, grid, published, tolerance, bool(size(network) <= tolerance)))

    for label, size in ((f"N={n}", "small"), (f"N={N}", "large")):
        row(f"W1 of capital, {label}", both[size]["w1"], 0.0, 0.16, 0.15)
        row(f"std of capital over the grid's - 1, {label}", both[size]["std_ratio"] - 1, 0.0, -0.005, 0.01)
    distance = both["policy_distance"]
    row("|k' - k' grid|, mean", distance["mean"], 0.0, 0.006, 0.005)
    row("|k' - k' grid|, max", distance["max"], 0.0, 0.017, 0.03)
    for name, published, tolerance in (("mean", -3.96, -4.0), ("p99", -3.47, -3.4), ("max", -3.24, -2.0)):
        pair = [x["large"]["euler_log10"][name] for x in (net, grid)]
        row(f"Euler error, log10 {name}, N={N}", *pair, published, tolerance, size=float)
    for label, size, tolerance in ((f"N={N}", "large", 0.001), (f"N={n}", "small", 0.004)):
        for kind, name in (("bellman_own_c", "own c"), ("bellman_best_c", "best c")):
            pair = [x[size][kind]["mean"] for x in (net, grid)]
            row(f"Bellman error, {name}, mean, {label}", *pair, 0.0184, tolerance)
    for series in ("output", "capital"):
        row(f"response of {series}, gap (p.p.)", both["impulse_response_gap"][series], 0.0, None, 0.02)
    return rows


def print_verdict(rows: list) -> None:
    print(f"\n{'figure':<44}{'network':>10}{'grid':>10}{'published':>11}{'tolerance':>11}  verdict")
    for name, *numbers, passed in rows:
        network, grid, published, tolerance = ["-" if x is None else f"{x:.4g}" for x in numbers]
        print(f"{name:<44}{network:>10}{grid:>10}{published:>11}{tolerance:>11}  {'pass' if passed else 'FAIL'}")


def write_results(folder: Path, weights: dict, grid: GridSolution, network: Solution, figures: dict, arrays: dict,
                  cfg: Config) -> None:
    """Every file of the output directory but metrics.json, into folder."""
    save_checkpoint(folder / WEIGHTS, weights)
    small = figures["network"]["small"]
    header = [f"ergodic distribution of individual capital k (goods), policy network, N = {small['n_agents']}, "
              f"{small['n_economies']} economies, {small['periods']} periods, every {cfg.eval_every}th pooled, "
              f"seed {weights['seed']}"]
    for size in ("small", "large"):
        for kind in ("bellman_own_c", "bellman_best_c"):
            x = figures["network"][size][kind]
            header.append(f"{kind} (utils), N = {figures['network'][size]['n_agents']}: mean {x['mean']:.6f} "
                          f"rmse {x['rmse']:.6f} max {x['max']:.6f}")
    k = arrays["network", "small"]["k"]
    np.savetxt(folder / "results.txt", k[:: max(1, len(k) // 100_000)], fmt="%.4f", header="\n".join(header))
    history = weights["history"]
    np.savetxt(folder / "training.csv", np.array(list(history.values())).T, delimiter=",", fmt="%.6g",
               header=",".join(history), comments="")
    (folder / "irf").mkdir()
    for series, pair in arrays["network", "irf"].items():
        for kind, paths in zip(("benchmark", "shocked"), pair):
            form = "%d" if series == "shocks" else "%.6f"
            np.savetxt(folder / "irf" / f"agg_{series}_{kind}.csv", paths, delimiter=",", fmt=form)
    draw_figures(folder, grid, network, figures, arrays, history, cfg)


def draw_figures(folder: Path, grid: GridSolution, network: Solution, figures: dict, arrays: dict, history: dict,
                 cfg: Config) -> None:
    (folder / "figures").mkdir()
    draw, K_ss = folder / "figures", network.econ.K_ss
    small, large = (f"N = {figures['network'][size]['n_agents']}, {figures['network'][size]['n_economies']} economies, "
                    f"{figures['network'][size]['periods']} periods" for size in ("small", "large"))
    plot_distribution(folder / "distribution_validation.png", arrays["network", "small"]["k"],
                      arrays["grid", "small"]["k"], figures["comparison"]["small"]["w1"], small)
    plot_history(draw / "training_history.png", history)
    plot_policies(draw / "policy_functions.png", network.next_capital, grid.next_capital, 1.04 * K_ss, 4.2 * K_ss)
    pairs = [(arrays[name, "large"]["sample_k"], arrays[name, "large"]["bellman"]) for name in ("network", "grid")]
    plot_bellman_bins(draw / "bellman_errors.png", *pairs, "|Bellman error|, policy's own c (utils)", large)
    plot_impulse_responses(draw / "impulse_responses.png", arrays["network", "irf"], arrays["grid", "irf"],
                           f"{cfg.irf_paths} paths, N = {cfg.irf_agents}")
    first = [arrays[name, "large"]["K_path"][:400, 0] for name in ("network", "grid")]
    plot_capital_paths(draw / "capital_path.png", *first, arrays["network", "large"]["z_path"][:400, 0], large)


# ---------------------------------------------------------------------------------------------- one run


@contextlib.contextmanager
def stage(seconds: dict, name: str):
    """Wall time of a stage into seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def choose_device(run: Run) -> str:
    if run.device == "auto" and not torch.cuda.is_available():
        print("no CUDA device found: running on the CPU (in Colab: Runtime > Change runtime type > T4 GPU)")
    return "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"


def peak_memory_gb(device: str) -> dict:
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, kilobytes on Linux
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def limit_memory() -> None:
    """On Linux: what is available now is the most this process may take, so that too large a size fails with an error
    to report, where the kernel would kill the run without a word."""
    with contextlib.suppress(OSError, ValueError, ImportError, StopIteration):
        import resource

        with open("/proc/meminfo") as meminfo:
            available = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((available + used) * 1024, most))


def checkpoint_of(state: dict, cal: Calibration, cfg: Config, run: Run, rng: torch.Generator) -> dict:
    """The state and what it belongs to. A run may be resumed to more iterations, or judged at other sizes."""
    free = ("iterations", "eval_", "irf_")
    config = {name: value for name, value in dataclasses.asdict(cfg).items() if not name.startswith(free)}
    return state | {"calibration": dataclasses.asdict(cal), "rng": rng.get_state(),
                    "config": config | {"seed": run.seed, "device": rng.device.type}}


def solve(cal: Calibration, cfg: Config, run: Run, output_dir: Path, device: str) -> dict:
    """Train from the start or from the checkpoint, saving one after every outer iteration; returns the state."""
    econ, kernels = build_economy(cal, device, torch.float32), compile_kernels(run.compile)
    rng = torch.cuda.default_generators[0] if device == "cuda" else torch.Generator()
    rng.manual_seed(run.seed)
    state, path = initial_state(econ, cfg, run.seed, rng), output_dir / CHECKPOINT
    if run.resume:
        saved = load_checkpoint(path, checkpoint_of(state, cal, cfg, run, rng), "--resume")
        rng.set_state(saved["rng"])
        for name, value in state.items():
            state[name] = saved[name].to(device) if isinstance(value, Tensor) else saved[name]
        state |= {name: value for name, value in saved.items() if name.startswith("adam_")}
    bar = tqdm(total=cfg.iterations, initial=state["iteration"], desc="DeepHAM", disable=None, unit="it")

    def after_iteration(state: dict) -> None:
        if state["iteration"] == 1 and path.exists():  # of an earlier run
            with disk_errors(output_dir):
                os.replace(path, output_dir / "checkpoint.previous.pt")
        save_checkpoint(path, checkpoint_of(state, cal, cfg, run, rng))
        Interrupted.iteration = state["iteration"]
        last = {name: column[-1] for name, column in state["history"].items()}
        shown = {name: f"{last[name]:.4g}" for name in ("mean_K", "value_residual", "policy_residual", "objective")}
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if bar.disable:
            words = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"iteration {state['iteration']} {words} seconds {last['seconds']:.2f}", flush=True)

    Interrupted.iteration = state["iteration"]
    with bar:
        train(state, econ, cfg, kernels, rng, run.cuda_graphs and device == "cuda", after_iteration)
    return weights_file(state, cal, cfg, econ, run)


def work(argv: List[str]) -> int:
    cal, cfg, run = parse(argv)
    output_dir = Path(run.output_dir)
    check_writable(output_dir)
    tidy(output_dir)
    weights = read_weights(output_dir / WEIGHTS, cal, cfg.hidden) if run.evaluate else None
    device = choose_device(run)
    if device == "cpu":
        limit_memory()
    torch.set_float32_matmul_precision("highest")  # no TF32: it would show in the accuracy figures
    if run.preset != "paper":
        print(f"preset {run.preset} departs from the authors' game_nn_n50:")
        print("  " + ", ".join(departures(cfg, PRESETS["paper"])))
    seconds = {}
    if weights is None:
        with stage(seconds, "training_with_checkpoints"):
            weights = solve(cal, cfg, run, output_dir, device)
    with stage(seconds, "grid"):
        grid = solve_grid(cal, SMOKE_GRID if run.preset == "smoke" else GridConfig(), progress=True).to(device)
    network = solution_from(weights, device, run.compile)
    with stage(seconds, "accuracy"):
        figures, arrays = compare(network, grid, cfg)
    rows = verdict(figures)
    with staged(output_dir) as folder:
        with stage(seconds, "results"):
            write_results(folder, weights, grid, network, figures, arrays, cfg)
        seconds["training"] = sum(weights["history"]["seconds"])
        columns = ("figure", "network", "grid", "published", "tolerance", "passed")
        metrics = {**figures, "verdict": [dict(zip(columns, row)) for row in rows],
                   "calibration": weights["calibration"], "config": dataclasses.asdict(cfg),
                   "seed": weights["seed"], "device": device_name(device),
                   "versions": versions(), "seconds": seconds, "peak_memory_gb": peak_memory_gb(device)}
        text = json.dumps(metrics, indent=1, default=lambda x: x.tolist())
        (folder / "metrics.json").write_text(text + "\n")
    print_verdict(rows)
    spent = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("training", "grid", "accuracy"))
    print(f"\n{spent}; results in {output_dir.resolve()}")
    return 1 if run.evaluate and not all(row[-1] for row in rows) else 0


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict:
    import matplotlib
    import scipy

    modules = {"torch": torch, "numpy": np, "scipy": scipy, "matplotlib": matplotlib}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}}


def main(argv: List[str] | None = None) -> int:
    """The command line: 0 done, 1 an accuracy figure fails in --evaluate, 2 a user's error, 130 / 143 interrupted."""
    return exit_status(work, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())


