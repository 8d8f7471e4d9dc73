"""DeepHAM for heterogeneous-agent economies with aggregate shocks, the grid solution beside it as a judge.

Model: households (k, s) save in capital under shocks to their own state s and to the aggregate state z; prices follow
from mean capital K. The default economy is Krusell & Smith (1998) in the calibration of Den Haan, Judd & Juillard
(2010), s unemployed / employed, z bad / good. Any other is a set of tables: class Economy, and examples/.

Algorithm (Han, Yang & E 2021), one outer iteration:
  1. policy step: raise E[sum_t beta^t u(c_t)] in the consumption share, towards the first-order condition;
  2. value step: fit V to realised utility U_t and V_k to its pathwise derivative, the costate lambda_t;
  3. simulate B economies of N households on under the new policy, shocks drawn first;
  4. roll M price-taking households out for T periods along the simulated paths of (z, K), and go backwards through
     time for U_t and lambda_t; save a checkpoint; repeat. At the end: judge, draw the figures, publish.

`python deepham_ks.py` solves the default preset into this folder, with `--preset smoke` every size is tiny, and
`--help` has the rest: every number of the model and the method is a flag.

Symbols: k, c, m capital, consumption, cash on hand of a household; K mean capital; R, w gross return and wage; `_next`
is a prime. Shapes: B economies, N households of each, M households of a roll-out, T periods, P parameters, J
successors of a state. A policy is any function (k, s, K, z) -> k'.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import contextlib
import copy
import ctypes
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
import threading
import time
import types
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Tuple

import numpy as np
import scipy.interpolate
import scipy.sparse
import scipy.stats
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

__version__ = "2.9.0"

# ---------------------------------------------------------------------------------------------- configuration


def option(default, reason: str, within: str = "(-inf, inf)", choices=None):
    """A dataclass field that is also a command-line flag; reason is its --help text, within an interval."""
    return field(default=default, metadata={"help": reason, "within": within, "choices": choices})


class UserError(RuntimeError):
    """What is wrong, the flag or table and the cure, in one line; main() prints it and returns 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def require(holds, message: str) -> None:
    if not holds:
        raise UserError(message)


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

    n_agents: int = option(125, "N, households an economy", "[1, 1e7]")
    n_economies: int = option(96, "B, economies simulated side by side, each on its own path of z", "[1, 1e6]")
    periods: int = option(100, "periods that each outer iteration simulates on from the last panel", "[2, 1e6]")
    systematic: bool = option(True, "spread shocks to s evenly over households: less sampling noise in K")
    horizon: int = option(75, "T, periods of utility before the value network takes over", "[2, 1e5]")
    batch: int = option(1536, "M, households in a roll-out", "[2, 1e7]")
    states: int = option(5, "periods of a roll-out to learn from, close to each other at its start", "[1, 1e5]")
    iterations: int = option(120, "outer iterations at most: policy step, value step, simulate, roll out", "[1, 1e6]")
    hidden: int = option(28, "width of the two tanh layers of both networks", "[1, 1024]")
    moments: str = option("", "moments of the distribution, beside K, that the networks see: names of MOMENTS")
    value_networks: int = option(1, "value networks, trained on other draws; the policy sees their mean", "[1, 16]")
    learnt_moments: int = option(0, "moments that are learnt, functions of (k, s) averaged over households", "[0, 8]")
    optimizer: str = option(
        "gauss-newton", "gauss-newton needs tens of steps where adam needs thousands", choices=("gauss-newton", "adam")
    )
    policy_rate: float = option(0.6, "gauss-newton: share of the Newton step of log c. adam: rate", "(0, 1]")
    value_rate: float = option(1e-3, "adam: rate of the value network", "(0, 1]")
    policy_steps: int = option(1, "adam: policy steps an outer iteration", "[1, 1e6]")
    value_steps: int = option(1, "adam: value steps an outer iteration", "[1, 1e6]")
    settle: float = option(
        1e-4, "gauss-newton: steps are full until savings have moved less than this share of K ten times", "(0, 1)"
    )
    averaging: int = option(
        14, "gauss-newton: iterations from there on, in which steps fall like 1 / (1 + decay n)", "[0, 1e6]"
    )
    decay: float = option(0.25, "gauss-newton: how fast they fall: in these they average noise out", "[0, 1e3]")
    damping: float = option(3e-5, "gauss-newton: least damping, in units of the diagonal", "(0, 1e6]")
    slope_weight: float = option(
        1.0, "weight of V_k against the costates; 0 fits the value to utility alone", "[0, 1e6]"
    )
    level_weight: float = option(
        0.3, "weight of V against realised utility, in units of the network's output", "(0, 1e6]"
    )
    control_variate: bool = option(True, "take out of the labels the surprises whose mean is exactly zero")
    final_value_steps: int = option(
        4, "gauss-newton: last iterations, in which V is fitted to the policy by its Bellman residual", "[0, 1e6]"
    )
    wide_share: float = option(0.5, "share of roll-outs that start anywhere in the simulated range of k", "[0, 1]")
    wide_top: float = option(1.5, "upper end of these, in multiples of the largest simulated k", "(0, 100]")
    even_share: float = option(
        1.0, "share of roll-outs that start in any s alike: rare states hold most of the error", "[0, 1]"
    )
    K_spread: float = option(
        0.04, "economies are scaled by up to this share before each simulation: K off its usual path", "[0, 0.9]"
    )
    eval_agents: int = option(50, "households an economy when the solution is judged, small", "[2, 1e7]")
    eval_economies: int = option(64, "economies when the solution is judged, small", "[1, 1e6]")
    eval_agents_large: int = option(5000, "households an economy when the solution is judged, large", "[2, 1e7]")
    eval_economies_large: int = option(2, "economies when the solution is judged, large", "[1, 1e6]")
    eval_periods: int = option(2800, "periods simulated to judge a solution, from its limit's distribution", "[3, 1e7]")
    eval_drop: int = option(300, "periods of these that are dropped first", "[0, 1e7]")
    eval_every: int = option(20, "of the rest every so many-th is pooled", "[1, 1e6]")
    eval_states: int = option(50_000, "pooled states at which Bellman and Euler errors are taken", "[10, 1e8]")
    irf_paths: int = option(200, "economies in an impulse response", "[1, 1e6]")
    irf_agents: int = option(200, "households an economy in an impulse response", "[2, 1e7]")
    irf_periods: int = option(60, "periods of an impulse response", "[1, 1e5]")
    irf_burn: int = option(100, "periods before the shock", "[1, 1e6]")


@dataclass(frozen=True)
class GridConfig:
    """Settings of the grid solution; at the defaults a finer grid changes nothing that matters."""

    n_k: int = option(400, "nodes of individual capital k in the household problem", "[10, 1e5]")
    n_K: int = option(12, "nodes of aggregate capital K in the household problem", "[4, 1000]")
    k_max: float = option(25.0, "largest k at first, a multiple of K; doubled while households come near", "[2, 1e6]")
    exponent: float = option(4.0, "k nodes are k_max x^exponent, x uniform: dense near the limit", "[1, 20]")
    K_low: float = option(0.75, "smallest K, a multiple of the centre, which follows the simulation", "(0, 1)")
    K_high: float = option(1.35, "largest K, a multiple of the centre", "(1, 100]")
    n_k_fine: int = option(2000, "k points of the policy table and of the histogram", "[10, 1e6]")
    n_K_fine: int = option(41, "K points of the policy table, which is linear in between", "[2, 1e4]")
    periods: int = option(60_000, "periods simulated for the law of motion, a twentieth in most updates", "[50, 1e7]")
    burn_in: int = option(200, "first periods that the regression leaves out", "[1, 1e7]")
    sweeps: int = option(100, "most EGM sweeps between two updates of the law of motion", "[1, 1e6]")
    damping: float = option(0.5, "weight of the new law of motion; above 0.8 it cycles", "(0, 1]")
    tolerance: float = option(3e-7, "largest relative change of c, and of K' forecast, at the end", "(0, 1)")
    max_updates: int = option(90, "updates of the law of motion before giving up", "[1, 1e6]")
    value_sweeps: int = option(4000, "most sweeps for V of the policy", "[1, 1e7]")
    seed: int = option(0, "seed of the path of z behind the law of motion", "[0, 1e9]")


# Maliar, Maliar & Valli (2010): 100 nodes of k with exponent 7, 4 nodes of K, for Krusell & Smith [0, 1000] x [30, 50]
GRIDS = {"converged": GridConfig(), "published": GridConfig(n_k=100, exponent=7.0, n_K=4, K_low=0.76, K_high=1.27)}
SMOKE_GRID = GridConfig(n_k=100, n_K=6, n_k_fine=300, n_K_fine=11, periods=10_000, burn_in=50, tolerance=1e-5)
PREFIX = {GridConfig: "grid_"}  # of the flags of a dataclass

PRESETS = {
    "default": Config(),
    # game_nn_n50 of the authors' code, as far as this script has the choice
    "paper": Config(n_agents=50, n_economies=384, periods=450, horizon=150, batch=384, states=10_000, iterations=6,
                    averaging=0, hidden=24, optimizer="adam", policy_rate=4e-4, value_rate=1e-3, policy_steps=2000,
                    value_steps=2000, slope_weight=0.0, level_weight=1.0, K_spread=0.0, systematic=False,
                    control_variate=False, wide_share=0.0, even_share=0.0),
    "smoke": Config(n_agents=20, n_economies=4, periods=40, horizon=20, batch=64, states=5, iterations=3, hidden=8,
                    averaging=1, final_value_steps=1,
                    eval_agents=20, eval_economies=4, eval_agents_large=50, eval_periods=60, eval_drop=20,
                    eval_every=5, eval_states=200, irf_paths=4, irf_agents=10, irf_periods=10, irf_burn=10),
}
EQUILIBRIA = ("market", "game", "planner")


@dataclass(frozen=True)
class Run:
    """What to do, where and with which seed."""

    preset: str = option("default", "default is accurate and fast; paper follows the authors; smoke is tiny",
                        choices=tuple(PRESETS))
    seed: int = option(0, "seed of every random number of the training", "[0, 1e9]")
    grid: str = option("converged", "the grid solution that judges; published: Maliar, Maliar & Valli's (2010); none: "
                       "Euler and Bellman errors alone judge", choices=(*GRIDS, "none"))
    equilibrium: str = option("", "who decides: price-takers (market), each of --players (game), a constrained planner "
                              "for all; empty: as the economy says", choices=("", *EQUILIBRIA))
    players: int = option(0, "households of the game; 0: as the economy says", "[0, 1e9]")
    start: float = option(0.0, "where a planner's solution begins, in steady-state capital; 0: as the economy says",
                          "[0, 100]")
    device: str = option("auto", "auto takes CUDA if there is one", choices=("auto", "cuda", "cpu"))
    compile: str = option("torchscript", "networks and roll-outs compiled or eager", choices=("torchscript", "none"))
    cuda_graphs: bool = option(True, "on CUDA: an outer iteration is one graph; turn off to debug")
    output_dir: str = option("", "where results go; empty: . for default, runs/PRESET for the others")
    evaluate: bool = option(False, "train nothing: rebuild every result from NN_weights_biases.pth")
    resume: bool = option(False, "continue from checkpoint.pt in the output directory")


# ---------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Economy:
    """All about the states s = 0..S-1 of a household and z = 0..Z-1 of the economy. Tables may be anything that numpy
    reads and that broadcasts to the shape given; they are checked here, and UserError names the one that is wrong."""

    alpha: float  # capital share
    delta: float  # depreciation rate
    gamma: float = 1.0  # relative risk aversion
    k_min: float = 0.0  # borrowing limit: k' >= k_min
    TFP: np.ndarray  # (Z,), from bad to good
    P_z: np.ndarray  # (Z, Z) P(z' | z)
    Pi: np.ndarray  # (Z, Z, S, S) P(s' | z, z', s)
    beta: np.ndarray  # (S,) discount factor from now to next period
    income: np.ndarray  # (Z, S) share of the wage after taxes and benefits; S and Z are read off its shape
    L: np.ndarray | None = None  # (Z,) labour supply; without it what households earn on average
    shares: np.ndarray | None = None  # (Z, S) stationary shares; needed only where the chain (z, s) is not ergodic
    sees_s: np.ndarray | None = None  # (S, F) what the networks see of s; without it one 0/1 input for each s
    sees_z: np.ndarray | None = None  # (Z, G) and of z; without it evenly spaced from -1 to 1
    weight: np.ndarray | float = 1.0  # (S,) of s in the least-squares problems
    group: np.ndarray | int = 0  # (S,) the group 0, 1, ... that s belongs to, for the moments by group
    s_names: tuple = ()  # for legends
    z_names: tuple = ()
    equilibrium: str = "market"  # or "game", "planner": see Delta()
    players: int = 50  # of the game
    start: float = 1.0  # where a planner's solution begins, a multiple of K_ss: it can have two local optima

    def __post_init__(self):
        Z, S = self.fill_in()
        self.derive_chain(Z, S)
        self.derive_steady_state(Z, S)

    def fill_in(self) -> Tuple[int, int]:
        """Tables as float64 arrays of full shape, those left out at their defaults, every number inside its interval,
        where NaN and infinity never are; (Z, S)."""
        try:
            Z, S = len(np.atleast_1d(self.TFP)), np.array(self.income, float).shape[-1]
        except (IndexError, TypeError, ValueError):
            raise UserError("income: give a table (Z, S) of numbers, and TFP (Z,)") from None
        inf, chance = math.inf, (-1e-12, 1 + 1e-9)
        parts = {"alpha": ((), (0, 1)), "delta": ((), (0, 1 + 1e-12)), "gamma": ((), (0, 100)),
                 "k_min": ((), (-inf, inf)), "start": ((), (0, 1000)), "players": ((), (1, 1e12)),
                 "TFP": ((Z,), (0, inf)), "P_z": ((Z, Z), chance), "Pi": ((Z, Z, S, S), chance),
                 "beta": ((S,), (0, inf)), "income": ((Z, S), (-1e-12, inf)), "weight": ((S,), (0, inf)),
                 "group": ((S,), (-1, inf)), "L": ((Z,), (0, inf)), "shares": ((Z, S), chance),
                 "sees_s": ((S, -1), (-inf, inf)), "sees_z": ((Z, -1), (-inf, inf))}
        even = np.linspace(-1, 1, Z)[:, None] if Z > 1 else np.zeros((1, 0))
        given = {"sees_s": np.eye(S), "sees_z": even} | {name: x for name, x in vars(self).items() if x is not None}
        for name in [name for name in parts if name in given]:
            shape, (low, high) = parts[name]
            try:
                x = np.array(given[name], float)
                x = np.broadcast_to(x, [x.shape[-1] if n < 0 else n for n in shape]).copy()
            except (IndexError, TypeError, ValueError):
                raise UserError(f"{name}: give numbers of shape {shape}; Z = {Z} by TFP, S = {S} by income") from None
            outside = x[~((low < x) & (x < high))]
            if outside.size:
                raise UserError(f"{name}: {outside[0]:g} is not in ({low:g}, {high:g})")
            if shape:
                vars(self)[name] = x
        for name, n in (("s_names", S), ("z_names", Z)):
            names = vars(self)[name] = tuple(given[name]) or tuple(f"{name[0]} = {i}" for i in range(n))
            require(len(names) == n, f"{name}: {len(names)} names for {n} states")
        require(self.equilibrium in EQUILIBRIA, f"equilibrium: {self.equilibrium!r} is none of {', '.join(EQUILIBRIA)}")
        return Z, S

    def derive_chain(self, Z: int, S: int) -> None:
        """P (Z, S, Z, S) of (z, s), and shares and L where they were left out; all tables must fit together."""
        require(set(self.group) == set(range(len(set(self.group)))), "group: give groups 0, 1, 2, ... without a gap")
        for name in ("P_z", "Pi"):
            sums = getattr(self, name).sum(-1).ravel()
            worst = sums[np.abs(sums - 1).argmax()]
            require(abs(worst - 1) <= 1e-9, f"{name}: rows must sum to one, and one has {worst:.9g}")
        vars(self)["P"] = np.einsum("xy,xyij->xiyj", self.P_z, self.Pi)  # P_z(z' | z) Pi(s' | z, z', s)
        P, one = self.P.reshape(Z * S, Z * S), np.ones(Z * S)
        if self.shares is None:
            require((np.abs(np.linalg.eigvals(P)) > 1 - 1e-10).sum() == 1,
                    "P_z, Pi: the chain of (z, s) is not ergodic; give the shares it starts and stays with")
            equations = np.vstack([P.T - np.eye(Z * S), one])
            shares = np.linalg.lstsq(equations, np.append(0 * one, 1.0), rcond=None)[0].clip(0)
            vars(self)["shares"] = (shares / shares.sum()).reshape(Z, S)
        x = self.shares.reshape(-1)
        require((x >= 0).all() and abs(x.sum() - 1) < 1e-9 and np.abs(x @ P - x).max() < 1e-9,
                "shares: not a stationary distribution of P_z and Pi")
        earned = (self.shares * self.income).sum(1) / self.shares.sum(1)
        vars(self)["L"] = earned if self.L is None else self.L
        require((self.L > 0).all(), "L: give labour supplies above 0 (or income, which they follow from)")
        gap = earned / self.L - 1
        z = np.abs(gap).argmax()
        require(not abs(gap[z]) > 1e-6, f"income: in z = {z} households earn {1 + gap[z]:.6g} wages for each unit of "
                "labour L; change income or L, or leave L out")
        seen = np.concatenate([self.sees_s, self.beta[:, None], self.income.T,
                               self.Pi.transpose(2, 0, 1, 3).reshape(S, -1)], 1)
        for name, rows in (("sees_s", len(np.unique(seen, axis=0))), ("sees_z", Z)):
            require(len(np.unique(getattr(self, name), axis=0)) == rows,
                    f"{name}: the networks cannot tell two states apart that differ")

    def derive_steady_state(self, Z: int, S: int) -> None:
        """mean_beta; annuity (Z, S), D = 1 + beta E D', the present value of one util a period for ever; R_ss, K_ss,
        w_ss, c_ss of the representative household at mean TFP and labour, where mean_beta R = 1, the unit of networks;
        K_start and Delta_start, what would let it keep K where a solution starts, u'(c) = beta (R u'(c) + Delta)."""
        discounted = np.tile(self.beta, Z)[:, None] * self.P.reshape(Z * S, Z * S)
        of_z, mean_beta = self.shares.sum(1), float(self.shares.sum(0) @ self.beta)
        growth = np.abs(np.linalg.eigvals(discounted)).max()
        require(growth < 1 and mean_beta < 1, f"beta: utility discounted along the chain grows by {growth:.6g} a "
                "period, so wealth has no bound; lower it")
        annuity = np.linalg.solve(np.eye(Z * S) - discounted, np.ones(Z * S)).reshape(Z, S)
        mean = types.SimpleNamespace(alpha=self.alpha, delta=self.delta, TFP=[of_z @ self.TFP], L=[of_z @ self.L])
        R = 1 / mean_beta
        K = float(mean.L[0] * (self.alpha * mean.TFP[0] / (R - 1 + self.delta)) ** (1 / (1 - self.alpha)))
        require(1e-6 < K < 1e9, f"alpha, beta, delta: steady-state capital is {K:.3g}; bring it into (1e-6, 1e9) by "
                "lower --alpha or --beta, or higher --delta")
        vars(self).update(mean_beta=mean_beta, annuity=annuity, R_ss=R, K_ss=K, w_ss=float(prices(K, 0, mean)[1]),
                          c_ss=float(output(K, 0, mean) - self.delta * K))
        poorest = (R - 1) * self.k_min + self.income.min() * self.w_ss
        require(poorest >= 0 and self.k_min < K, f"k_min: at {self.k_min:g} the poorest have {poorest:.3g} after "
                "interest at steady-state prices; bring it nearer to 0")
        K = K * (self.start if self.equilibrium == "planner" else 1.0)
        c = np.maximum(output(K, 0, mean) - self.delta * K, 0.1 * self.c_ss)
        vars(self).update(K_start=K, Delta_start=float((R - prices(K, 0, mean)[0]) * marginal_utility(c, self)))

    def tables(self, device="cpu", dtype=torch.float64) -> Tables:
        """What the tensor functions use, on one device."""
        Z, S = self.income.shape
        P = self.P.reshape(Z * S, Z * S)
        successors, real = padded([np.flatnonzero(row) for row in P])  # (Z S, J)
        reach, possible = padded([np.flatnonzero(self.Pi[:, :, s].reshape(-1, S).any(0)) for s in range(S)])  # (S, n)
        own = np.take_along_axis(self.Pi, np.broadcast_to(reach, (Z, Z, *reach.shape)), 3) * possible
        members = self.group[:, None] == np.arange(self.group.max() + 1)  # (S, groups)
        arrays = {"TFP": self.TFP, "L": self.L, "beta": self.beta, "income": self.income.reshape(-1),
                  "cum_z": self.P_z.cumsum(1)[:, :-1],
                  "cum_s": own.cumsum(-1)[..., :-1].reshape(Z * Z * S, reach.shape[1] - 1), "reach": reach,
                  "next_s": successors % S, "next_z": successors // S,
                  "probability": np.take_along_axis(P, successors, 1) * real, "annuity": self.annuity.reshape(-1),
                  "sees": np.concatenate([np.tile(self.sees_s, (Z, 1)), np.repeat(self.sees_z, S, 0)], 1),
                  "root_weight": np.sqrt(self.weight), "shares": self.shares,
                  "of_group": members / (self.shares.sum(0) @ members),
                  "lowest": (self.income[0] == self.income[0].min()) * 1.0, "K_mean": np.array(self.K_start),
                  "Delta_law": np.tile([self.Delta_start, 0.0], (Z, 1)), "M_mean": np.zeros((1, 0)),
                  "M_std": np.ones((1, 0))}
        tensors = {name: torch.tensor(x, device=device, dtype=dtype if x.dtype == float else None)
                   for name, x in arrays.items()}
        numbers = (self.alpha, self.delta, self.gamma, self.k_min, self.K_ss, self.c_ss, 8.0, 0.1, self.players)
        return Tables(self.equilibrium, *map(float, numbers), **tensors)


def padded(rows: list) -> Tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as one table, each filled up with its last entry, and which entries are its own."""
    longest = max(map(len, rows))
    table = np.array([np.pad(row, (0, longest - len(row)), "edge") for row in rows])
    return table, np.array([np.arange(longest) < len(row) for row in rows])


class Tables(NamedTuple):
    """An Economy as tensors. A joint index z S + s (see joint()) is the first index of what has (Z S) rows."""

    equilibrium: str
    alpha: float
    delta: float
    gamma: float
    k_min: float
    K_ss: float
    c_ss: float
    K_scale: float  # ln K moves by about a tenth: times 8 it is of the size of the other inputs
    value_unit: float  # one unit of the value network's output is a tenth of consumption for ever
    players: float
    TFP: Tensor  # (Z,)
    L: Tensor  # (Z,)
    beta: Tensor  # (S,)
    income: Tensor  # (Z S,)
    cum_z: Tensor  # (Z, Z - 1) cumulative P(z' | z)
    cum_s: Tensor  # (Z Z S, n - 1) cumulative P(s' | z, z', s) over reach[s]
    reach: Tensor  # (S, n) states s' that s can reach
    next_s: Tensor  # (Z S, J) the reachable successors, in the one order that there is
    next_z: Tensor  # (Z S, J)
    probability: Tensor  # (Z S, J); 0 pads
    annuity: Tensor  # (Z S,)
    sees: Tensor  # (Z S, F + G)
    root_weight: Tensor  # (S,)
    shares: Tensor  # (Z, S)
    of_group: Tensor  # (S, groups) 1 / share of the group that s is of, 0 elsewhere
    lowest: Tensor  # (S,) 1 where income is lowest
    K_mean: Tensor  # () centre of the input ln K; follows the simulation while training, and so does
    Delta_law: Tensor  # (Z, 2) the planner's Delta on (1, ln K) by z
    M_mean: Tensor  # (V, n) centre and
    M_std: Tensor  # (V, n) unit of the moments, see moments_of()


def tables_on(econ: Tables, device) -> Tables:
    return Tables(*[x.to(device) if isinstance(x, Tensor) else x for x in econ])


def krusell_smith(cal: Calibration = Calibration()) -> Economy:
    """s: 0 unemployed / 1 employed; z: 0 bad / 1 good. Unemployment lasts as long as z says, in a new state of z 1.25
    and 0.75 times as probably as usual there, and its rate depends on z alone; a tax on wages pays the benefits."""
    u, z_stay = np.array([cal.u_bad, cal.u_good]), 1 - 1 / cal.z_duration
    stay, L = 1 - 1 / np.array([cal.u_duration_bad, cal.u_duration_good]), cal.l_bar * (1 - u)
    p_uu = np.array([[stay[0], 0.75 * stay[1]], [1.25 * stay[0], stay[1]]])  # (z, z')
    p_eu = (u - u[:, None] * p_uu) / (1 - u[:, None])
    employed = 1 - np.stack([p_uu, p_eu], -1)  # (z, z', s)
    require(((employed >= 0) & (employed <= 1)).all(), "--u-bad, --u-good, --u-duration-bad, --u-duration-good imply a "
            "probability outside [0, 1]; bring the two rates closer together or change the durations")
    require((cal.mu * u < L).all(), "--mu, --u-bad, --u-good and --l-bar imply a tax of 100% or more; lower --mu")
    return Economy(
        alpha=cal.alpha, delta=cal.delta, gamma=cal.gamma, beta=cal.beta,
        TFP=[1 - cal.tfp_shock, 1 + cal.tfp_shock], L=L, P_z=[[z_stay, 1 - z_stay], [1 - z_stay, z_stay]],
        Pi=np.stack([1 - employed, employed], -1),
        income=np.stack([np.full(2, cal.mu), cal.l_bar * (1 - cal.mu * u / L)], 1), shares=np.stack([u, 1 - u], 1) / 2,
        sees_s=[[-1], [1]], weight=[3, 1],
        s_names=("unemployed", "employed"), z_names=("bad state", "good state"))


# ---------------------------------------------------------------------------------------------- shocks


def joint(s: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Row of (z, s) in the tables."""
    return z * econ.beta.shape[0] + s


def group_of(s: Tensor, econ: Tables) -> Tensor:
    """The group (...) that households in s (...) are of."""
    return econ.of_group.argmax(1)[s]


def draw(u: Tensor, cumulative: Tensor) -> Tensor:
    """Index with probabilities of which cumulative (..., n - 1) are the sums, from uniform numbers u (...)."""
    return (u[..., None] >= cumulative).sum(-1)


def uniform(shape, rng: torch.Generator, device) -> Tensor:
    """Uniform numbers of the generator, on device: a generator on the CPU gives every device the same."""
    return torch.rand(shape, generator=rng, device=rng.device).to(device)


def draw_z(u: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """z' from uniform numbers u of z's shape."""
    return draw(u, econ.cum_z[z])


def draw_s(u: Tensor, z: Tensor, z_next: Tensor, s: Tensor, econ: Tables) -> Tensor:
    """s' given z and z', from uniform numbers u of s's shape; z, z' broadcast against it."""
    return follow(lambda t, s: u, s, torch.stack([z, z_next]), econ)[1]


def follow(draws: Callable, s: Tensor, z_path: Tensor, econ: Tables) -> Tensor:
    """Path s (periods + 1, ...) from s along z_path (periods + 1, ...), which broadcasts against it; draws(t, s) are
    the uniform numbers of period t."""
    s_path = s.new_empty(len(z_path), *s.shape)
    s_path[0] = s
    z_and_next = z_path[:-1] * econ.TFP.shape[0] + z_path[1:]
    for t in range(len(z_and_next)):
        s = s_path[t]
        s_path[t + 1] = econ.reach[s, draw(draws(t, s), econ.cum_s[joint(s, z_and_next[t], econ)])]
    return s_path


def own_transition(s: Tensor, z: Tensor, z_next: int, econ: Tables) -> Tensor:
    """P(s' | z, z', s) of the states s' that s can reach, reach[s]: (...) -> (..., n)."""
    cumulative = econ.cum_s[joint(s, z * econ.TFP.shape[0] + z_next, econ)]
    ends = torch.zeros_like(cumulative[..., :1]), torch.ones_like(cumulative[..., :1])
    return torch.diff(torch.cat([ends[0], cumulative, ends[1]], -1))


def successors(k_next: Tensor, s: Tensor, K_next: Tensor, z: Tensor,
               econ: Tables) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The J states (k', s', K', z') that may follow (s, z), stacked in front: (J, ...)."""
    at = joint(s, z, econ)
    s_next, z_next = econ.next_s[at].movedim(-1, 0), econ.next_z[at].movedim(-1, 0)
    shape = s_next.shape
    return k_next.unsqueeze(0).expand(shape), s_next, K_next.unsqueeze(0).expand(shape), z_next


def expected(values: Tensor, s: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """E[values | z, s] as the exact sum over the successors: (J, ...) -> (...)."""
    return (econ.probability[joint(s, z, econ)].movedim(-1, 0) * values).sum(0)


def spread_uniform(s: Tensor, start: Tensor) -> Tensor:
    """Uniform numbers (B, N) from start (B, 1), independent over time for a household but evenly spread over the
    households of an economy in the same s (golden-ratio steps): as many leave as in a far larger economy."""
    order = s.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(s.shape[1], device=s.device).expand_as(order))
    return (rank.double() * 0.6180339887498949 + start).frac()


def draw_shocks(s: Tensor, z: Tensor, periods: int, econ: Tables, rng: torch.Generator, systematic: bool = False):
    """Paths s (periods + 1, B, N) and z (periods + 1, B, 1) from s (B, N), z (B, 1)."""
    z_path = [z]
    for u in uniform((periods, *z.shape), rng, z.device):
        z_path.append(draw_z(u, z_path[-1], econ))
    u = uniform((periods, *(z if systematic else s).shape), rng, s.device)
    z_path = torch.stack(z_path)
    return follow(lambda t, s: spread_uniform(s, u[t]) if systematic else u[t], s, z_path, econ), z_path


# ---------------------------------------------------------------------------------------------- household


def prices(K: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """Gross return R and wage w, marginal products of Y = TFP K^alpha L^(1-alpha); any common shape."""
    ratio = K / econ.L[z]
    product = econ.TFP[z] * ratio ** (econ.alpha - 1)  # Y / K
    return 1 - econ.delta + econ.alpha * product, (1 - econ.alpha) * product * ratio


def output(K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Y = TFP K^alpha L^(1-alpha)."""
    return econ.TFP[z] * K**econ.alpha * econ.L[z] ** (1 - econ.alpha)


def earnings(s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """(income(z, s) w, R): what cash on hand is made of, beside k."""
    R, w = prices(K, z, econ)
    return econ.income[joint(s, z, econ)] * w, R


def cash(k: Tensor, y: Tensor, R: Tensor) -> Tensor:
    """m = R k + y, what c + k' is paid from."""
    return R * k + y


def cash_on_hand(k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """(m, R), with y = income(z, s) w in m."""
    y, R = earnings(s, K, z, econ)
    return cash(k, y, R), R


# Period utility: these four, each in units of steady-state consumption, are all that the method knows of it.
def utility(c: Tensor, econ: Tables) -> Tensor:
    x = c / econ.c_ss
    if econ.gamma == 1.0:
        return torch.log(x)
    return x ** (1 - econ.gamma) / (1 - econ.gamma)


def marginal_utility(c: Tensor, econ: Tables) -> Tensor:
    return (c / econ.c_ss) ** (-econ.gamma) / econ.c_ss


def inverse_marginal_utility(u_prime: Tensor, econ: Tables) -> Tensor:
    return econ.c_ss * (econ.c_ss * u_prime) ** (-1 / econ.gamma)


def inverse_utility(u: Tensor, econ: Tables) -> Tensor:
    if econ.gamma == 1.0:
        return econ.c_ss * torch.exp(u)
    return econ.c_ss * ((1 - econ.gamma) * u).clamp(min=1e-30) ** (1 / (1 - econ.gamma))


# What moving aggregate capital is worth to whoever decides is one more term, Delta (Davila et al. 2012): households
# behave like price-takers with period utility u(c) + Delta k, Delta taken as given.
def cash_of_K(k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """dm/dK: a unit more of K lowers R and raises w."""
    R, w = prices(K, z, econ)
    return ((econ.alpha - 1) * (R - 1 + econ.delta) * k + econ.alpha * w * econ.income[joint(s, z, econ)]) / K


def Delta(u_prime: Tensor, m_K: Tensor, common: Tensor, econ: Tables) -> Tensor:
    """Delta of a household with marginal utility u_prime and dm/dK m_K: nothing where it takes prices as given, its own
    gain from its share of K in the game, and for a planner the mean of u'(c) dm/dK over all households, common."""
    if econ.equilibrium == "planner":
        return common + 0.0 * u_prime
    if econ.equilibrium == "game":
        return u_prime * m_K / econ.players
    return 0.0 * u_prime


def gain_from_K(k: Tensor, s: Tensor, k_next: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """u'(c) dm/dK of a household that saves k_next; its mean over the cross-section is the planner's Delta."""
    m, _ = cash_on_hand(k, s, K, z, econ)
    return marginal_utility(m - k_next, econ) * cash_of_K(k, s, K, z, econ)


def by_law(law: Tensor, ln_K: Tensor) -> Tensor:
    """a + b ln K of coefficients law (..., 2): what is expected of ln K', or of a planner's Delta."""
    return law[..., 0] + law[..., 1] * ln_K


def expected_Delta(u_prime: Tensor, k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Delta where only K and z are known of the cross-section: the planner's by its law, in each z linear in ln K."""
    if econ.equilibrium == "market":
        return 0.0 * u_prime
    return Delta(u_prime, cash_of_K(k, s, K, z, econ), by_law(econ.Delta_law[z], torch.log(K)), econ)


# ---------------------------------------------------------------------------------------------- networks
# The policy network's output f is the log of the share of cash on hand (above the limit) that is consumed, where that
# is below one; the value network's output g is a consumption equivalent, so both are of order one whatever gamma is.

K_INPUT, N_OWN = 3, 4  # column of ln K among the inputs, and how many inputs stand before what is seen of s and z


def capital_inputs(k: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """Two functions of k: one so steep near the limit that units of the first layer differ within each bend that it
    makes in c, this period or next, and one of order one."""
    rest = (k - econ.k_min).clamp(min=0.0)
    return torch.log(rest / econ.c_ss + 0.1) / 0.4, rest / (rest + econ.K_ss)


def features(k: Tensor, s: Tensor, m: Tensor, K: Tensor, z: Tensor, econ: Tables,
             M: Tensor | None = None) -> Tensor:
    """Inputs of the policy network, and of the value network but for_value(), (...) -> (..., N_OWN + F + G + n).
    M (..., n): the moments that this network sees, if there are any."""
    return with_own(k, m, features_of_others(k, s, K, z, econ, M), econ)


def with_own(k: Tensor, m: Tensor, others: Tensor, econ: Tables) -> Tensor:
    """What k and m say, and others. Log cash on hand carries the curvature, log capital what is left of it where the
    limit is near and cash hardly moves with k; the third is bounded."""
    above = (m - econ.k_min).clamp(min=1e-6 * econ.c_ss)
    own = [torch.log(above / (econ.K_ss + econ.c_ss)), *capital_inputs(k, econ)]
    return torch.cat([torch.stack(own, -1), others], -1)


def features_of_others(like: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables, M: Tensor | None = None) -> Tensor:
    """The inputs that a household's own capital does not move, of like's shape (...): ln K, s and z, moments."""
    ln_K = (econ.K_scale * torch.log(K / econ.K_mean)).expand_as(like).unsqueeze(-1)
    x = torch.cat([ln_K, econ.sees[joint(s, z, econ)]], -1)
    return x if M is None else torch.cat([x, M.expand(x.shape[:-1] + M.shape[-1:])], -1)


def feature_slopes(k: Tensor, m: Tensor, R: Tensor, econ: Tables) -> Tensor:
    """d features / dk: (...) -> (..., N_OWN + F + G + n). One household's k does not move the moments."""
    above, rest = (m - econ.k_min).clamp(min=1e-6 * econ.c_ss), (k - econ.k_min).clamp(min=0.0)
    own = [R / above, 1 / (rest + 0.1 * econ.c_ss) / 0.4, econ.K_ss / (rest + econ.K_ss) ** 2, torch.zeros_like(k)]
    others = [econ.sees.shape[1] + econ.M_mean.shape[1]]
    zeros = torch.zeros(list(k.shape) + others, dtype=k.dtype, device=k.device)
    return torch.cat([torch.stack(own, -1), zeros], -1)


def for_value(x: Tensor, column: int = K_INPUT) -> Tensor:
    """What the value network sees: x and, in front, the square of ln K, in which V bends where the policy hardly does.
    Of feature slopes as well, in which ln K is zero."""
    return torch.cat([x[..., column : column + 1].square(), x], -1)


def n_inputs(econ: Tables, network: str = "policy") -> int:
    return N_OWN + econ.sees.shape[1] + econ.M_mean.shape[1] + (network == "value")


def layer_shapes(n: int, H: int) -> List[tuple]:
    """W1, b1, W2, b2, w3, b3 of a network with n inputs and two layers of H units."""
    return [(H, n), (H,), (H, H), (H,), (H,), ()]


def unpack(theta: Tensor, H: int, more=()) -> List[Tensor]:
    """Layers W1 (H, n), b1, W2 (H, H), b2, w3 (H,), b3 as views of the parameter vector theta (P,), and those of the
    shapes more that follow them."""
    main = theta.numel() - sum(map(math.prod, more))
    shapes = [*layer_shapes((main - 1) // H - H - 3, H), *more]
    parts = torch.split(theta, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def averaged(networks: list) -> List[Tensor]:
    """The layers of a network whose output is the mean of those of several: units side by side, blind to each other."""
    if len(networks) == 1:
        return networks[0]
    W1, b1, W2, b2, w3, b3 = zip(*networks)
    return [torch.cat(W1), torch.cat(b1), torch.block_diag(*W2), torch.cat(b2), torch.cat(w3) / len(networks),
            torch.stack(b3).mean()]


def network(layers: List[Tensor], x: Tensor) -> Tensor:
    """Two tanh layers and a linear output: (..., n) -> (...)."""
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
    """d output / d theta, by hand: (M, n) -> (M, P)."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    d2 = (1 - h2 * h2) * layers[4]
    d1 = (1 - h * h) * torch.matmul(d2, layers[2])
    return torch.cat([outer(d1, x), d1, outer(d2, h), d2, h2, torch.ones_like(h2[:, :1])], 1)


def slope_jacobian(layers: List[Tensor], x: Tensor, dx: Tensor) -> Tensor:
    """d slope / d theta of network_and_slope, by hand: (M, n) -> (M, P). d and e are the adjoints of the
    pre-activations and of their tangents."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    slope, a = 1 - h * h, linear(dx, layers[0])
    dh = slope * a
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    slope2, a2 = 1 - h2 * h2, linear(dh, layers[2])
    e2 = slope2 * layers[4]
    d2 = -2 * h2 * a2 * e2
    e1 = slope * torch.matmul(e2, layers[2])
    d1 = slope * torch.matmul(d2, layers[2]) - 2 * h * a * e1
    W1, W2 = outer(e1, dx) + outer(d1, x), outer(e2, dh) + outer(d2, h)
    return torch.cat([W1, d1, W2, d2, slope2 * a2, torch.zeros_like(h2[:, :1])], 1)


def initial_parameters(n: int, H: int, output_bias: float, seed: int) -> Tensor:
    """theta (P,) with a zero output layer: a constant function, output_bias."""
    rng = torch.Generator().manual_seed(seed)
    W1, b1 = torch.randn(H, n, generator=rng) / n**0.5, torch.randn(H, generator=rng) / 2
    W2, b2 = torch.randn(H, H, generator=rng) / H**0.5, torch.randn(H, generator=rng) / 5
    return torch.cat([W1.flatten(), b1, W2.flatten(), b2, torch.zeros(H), torch.tensor([output_bias])])


def initial_learnt(econ: Tables, cfg: Config, seed: int) -> Tensor:
    """Random parameters of Q."""
    rng = torch.Generator().manual_seed(seed + 2)
    parts = [torch.randn(shape, generator=rng) / shape[-1] ** 0.5 for shape in learnt_shapes(econ, cfg)]
    return torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)


def saved_share(f: Tensor) -> Tensor:
    """1 - min(1, exp f): nothing is saved, k' = k_min, exactly where the network is positive."""
    return 1 - torch.exp(f.clamp(max=0.0))


def network_capital(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables,
                    M: Tensor | None = None) -> Tensor:
    """k' of the policy network; K and z broadcast against k and s, M against k with one dimension more."""
    m, _ = cash_on_hand(k, s, K, z, econ)
    return savings(policy, features(k, s, m, K, z, econ, M), m, econ)


def savings(policy: List[Tensor], x: Tensor, m: Tensor, econ: Tables) -> Tensor:
    """k' of the policy network at inputs x and cash on hand m."""
    return econ.k_min + saved_share(network(policy, x)) * (m - econ.k_min)


def periods_at_once(k: Tensor, successors: int) -> int:
    """How many periods of paths (T, M) to evaluate together: on a CPU few, which stay in its cache; on a GPU, which
    waits for launches, as many as hold four million states."""
    on_cpu = 4 if successors == 1 else 2
    return max(1, 4_194_304 // (successors * k.shape[1])) if k.is_cuda else on_cpu


def consumption_and_slope(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables,
                          M: Tensor | None = None, at: Tensor | None = None) -> Tuple[Tensor, Tensor]:
    """c and dc/dk of the policy network at the states of a path, (T, M); a few periods at a time stay in the cache.
    The moments of the states are the rows at (T, M) of M (dates, V, n)."""
    c, dc = torch.empty_like(k), torch.empty_like(k)
    chunk = periods_at_once(k, 1)
    for t in range(0, k.shape[0], chunk):
        k_t, s_t, K_t, z_t = k[t : t + chunk], s[t : t + chunk], K[t : t + chunk], z[t : t + chunk]
        M_t = policy_view(M, at, t, t + chunk)
        m, R = cash_on_hand(k_t, s_t, K_t, z_t, econ)
        f, f_k = network_and_slope(policy, features(k_t, s_t, m, K_t, z_t, econ, M_t), feature_slopes(k_t, m, R, econ))
        share, above = 1 - saved_share(f), m - econ.k_min
        c[t : t + chunk], dc[t : t + chunk] = share * above, torch.where(f < 0, share * (R + above * f_k), R)
    return c, dc


def policy_view(M: Tensor | None, at: Tensor | None, first: int, last: int) -> Tensor | None:
    """The policy's moments at the dates first to last of paths at, (last - first, M, n)."""
    if M is None or at is None:
        return None
    return M[at[first:last], 0]


def utility_ss(econ: Tables) -> float:
    """u(c_ss)."""
    return 0.0 if econ.gamma == 1.0 else 1 / (1 - econ.gamma)


def value_of(g: Tensor, s: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """V = D(z, s) u(c_ss exp(g / 10)) and dV/dg: g is 0 where life is worth steady-state consumption for ever. With
    Delta k in it V may have any sign: there V = D (u(c_ss) + sinh(g / 10))."""
    x, D = econ.value_unit * g, econ.annuity[joint(s, z, econ)]
    if econ.equilibrium != "market":
        return D * (utility_ss(econ) + torch.sinh(x)), econ.value_unit * D * torch.cosh(x)
    c = econ.c_ss * torch.exp(x)
    return D * utility(c, econ), econ.value_unit * D * marginal_utility(c, econ) * c


def equivalent_of(V: Tensor, s: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """g at which the network's value is V."""
    per_period = V / econ.annuity[joint(s, z, econ)]
    if econ.equilibrium != "market":
        return torch.asinh(per_period - utility_ss(econ)) / econ.value_unit
    return torch.log(inverse_utility(per_period, econ) / econ.c_ss) / econ.value_unit


def network_value(value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables,
                  M: Tensor | None = None) -> Tuple[Tensor, Tensor]:
    """(V, V_k) of the value network, utility in the units of utility()."""
    m, R = cash_on_hand(k, s, K, z, econ)
    x, dx = features(k, s, m, K, z, econ, M), feature_slopes(k, m, R, econ)
    g, g_k = network_and_slope(value, for_value(x), for_value(dx))
    V, V_g = value_of(g, s, z, econ)
    return V, V_g * g_k


# ---------------------------------------------------------------------------------------------- moments
# Beside K and z the networks may see moments M of the cross-section: means over households of given functions of
# (k, s) and of learnt ones, Q(k, s; theta), small networks whose parameters stand at the end of theta. Policy and value
# network have their own Q, so M is (..., V, n): V = 2 views where anything is learnt, one for both where nothing is.

# name -> (k, s, econ) -> (..., n), of which a moment is the mean over households: a line more is a moment more
MOMENTS = {
    "mean": lambda k, s, econ: k.unsqueeze(-1),
    "variance": lambda k, s, econ: ((k / econ.K_ss - 1) ** 2).unsqueeze(-1),
    "unemployment": lambda k, s, econ: econ.lowest[s].unsqueeze(-1),  # the share of s with the lowest income
    "limit": lambda k, s, econ: (k <= econ.k_min).to(k.dtype).unsqueeze(-1),
    "groups": lambda k, s, econ: k.unsqueeze(-1) * econ.of_group[s],  # mean capital of each Economy.group
}
Q_HIDDEN = 12  # width of the two tanh layers of Q, as in the authors' code


def learnt_shapes(econ: Tables, cfg: Config) -> List[tuple]:
    """V1, c1, V2, c2, V3, c3 of Q, with one linear output for each learnt moment; none where nothing is learnt."""
    n, p, H = 2 + econ.sees.shape[1], cfg.learnt_moments, Q_HIDDEN
    return [(H, n), (H,), (H, H), (H,), (p, H), (p,)] if p else []


def layers_of(theta: Tensor, econ: Tables, cfg: Config) -> List[Tensor]:
    """The six layers of a network, and after them the six of its Q."""
    return unpack(theta, cfg.hidden, learnt_shapes(econ, cfg))


def value_networks(state: dict, econ: Tables, cfg: Config) -> list:
    """The layers of each value network, views of the state."""
    return [layers_of(theta, econ, cfg) for theta in state["value"].detach().chunk(cfg.value_networks)]


def networks_of(state: dict, econ: Tables, cfg: Config) -> list:
    """The layers of the policy network and of the value network, the mean of all there are."""
    return [layers_of(state["policy"], econ, cfg), averaged(value_networks(state, econ, cfg))]


def given_moments(cfg: Config) -> List[str]:
    return [name for name in cfg.moments.split(",") if name]


def needs_noise(cfg: Config) -> bool:
    """Whether the networks see who is in which s: then economies must differ in it as finite ones do."""
    return cfg.learnt_moments > 0 or "unemployment" in given_moments(cfg)


def with_units(econ: Tables, cfg: Config) -> Tables:
    """Tables with a centre and a unit for each moment that the networks see; UserError for a name that is none."""
    for name in given_moments(cfg):
        require(name in MOMENTS, f"--moments: {name!r} is none of {', '.join(MOMENTS)}")
    anybody = torch.zeros(1, 1, dtype=econ.beta.dtype, device=econ.beta.device)
    given = [MOMENTS[name](anybody, anybody.long(), econ) for name in given_moments(cfg)]
    n, V = sum(x.shape[-1] for x in given) + cfg.learnt_moments, 2 if cfg.learnt_moments else 1
    require(2 * n <= cfg.n_agents, f"--moments, --learnt-moments: {n} moments of {cfg.n_agents} households; raise "
            "--n-agents or take fewer")
    require(cfg.value_networks == 1 or not cfg.learnt_moments, "--value-networks: the value network has learnt moments "
            "of its own, so there is one; give 1 or no --learnt-moments")
    require(cfg.value_networks <= cfg.batch // RANKS, f"--value-networks {cfg.value_networks}: more than the "
            f"{cfg.batch // RANKS} households of --batch to learn from; give fewer")
    return econ._replace(M_mean=anybody.new_zeros(V, n), M_std=anybody.new_ones(V, n))


def learnt_inputs(k: Tensor, s: Tensor, econ: Tables) -> Tensor:
    """What Q sees of a household, (...) -> (..., 2 + F + G)."""
    return torch.cat([torch.stack(capital_inputs(k, econ), -1), econ.sees[s]], -1)


def Q(layers: List[Tensor], x: Tensor) -> Tensor:
    """(..., 2 + F + G) -> (..., p)."""
    h = torch.tanh(linear(x, layers[6], layers[7]))
    h = torch.tanh(linear(h, layers[8], layers[9]))
    return linear(h, layers[10], layers[11])


def Q_jacobian(layers: List[Tensor], k: Tensor, s: Tensor, econ: Tables) -> Tensor:
    """d (mean of Q over the households of a cross-section) / d its parameters: k, s (n, N) -> (n, p, parameters)."""
    x, N = learnt_inputs(k, s, econ), k.shape[1]
    h = torch.tanh(linear(x, layers[6], layers[7]))
    h2 = torch.tanh(linear(h, layers[8], layers[9]))
    one_of_p, columns = torch.eye(len(layers[11]), dtype=k.dtype, device=k.device), []
    for of_output, row in zip(one_of_p, layers[10]):
        d2 = (1 - h2 * h2) * row / N
        d1 = (1 - h * h) * torch.matmul(d2, layers[8])
        V3 = of_output.unsqueeze(1) * h2.mean(1).unsqueeze(1)
        parts = (d1.mT @ x, d1.sum(1), d2.mT @ h, d2.sum(1), V3, of_output.expand(len(k), -1))
        columns.append(torch.cat([part.flatten(1) for part in parts], 1))
    return torch.stack(columns, 1)


def contributions(networks: list, k: Tensor, s: Tensor, econ: Tables, cfg: Config) -> Tensor:
    """What households add to the moments that networks (lists of layers) see: (...) -> (..., V, n)."""
    given = [MOMENTS[name](k, s, econ) for name in given_moments(cfg)]
    if not cfg.learnt_moments:
        return torch.cat(given, -1).unsqueeze(-2)
    x = learnt_inputs(k, s, econ)
    return torch.stack([torch.cat([*given, Q(layers, x)], -1) for layers in networks], -2)


def standard(M: Tensor, econ: Tables) -> Tensor:
    """Moments (..., V, n), or the policy's alone (..., 1, n), as inputs that are together of order one: many of them
    are then held by the damping of the steps while labels are noisy."""
    V, n = M.shape[-2:]
    return (M - econ.M_mean[:V]) / (n**0.5 * econ.M_std[:V])


def moments_of(networks: list, k: Tensor, s: Tensor, econ: Tables, cfg: Config,
               weight: Tensor | float = 1.0) -> Tensor:
    """Moments of cross-sections k, s (B, N) -> (B, V, n); weight (B, N) of households, whose mean is one."""
    q = contributions(networks, k, s, econ, cfg)
    return standard((q if isinstance(weight, float) else weight[..., None, None] * q).mean(1), econ)


def next_moments(networks: list, k_next: Tensor, s: Tensor, z: Tensor, econ: Tables, cfg: Config,
                 weight: Tensor | float = 1.0) -> Tensor:
    """E[M' | z'] for each z', everybody's s' in expectation, an exact sum: k', s (B, N), z (B, 1) -> (B, Z, V, n).
    weight (B, N) of households whose mean is one."""
    s_next = econ.reach[s]  # (B, N, reachable)
    q = contributions(networks, k_next.unsqueeze(-1).expand(s_next.shape), s_next, econ, cfg)
    of_z = []
    for z_next in range(len(econ.TFP)):
        p = own_transition(s, z, z_next, econ) * (weight if isinstance(weight, float) else weight.unsqueeze(-1))
        of_z.append(torch.einsum("bni,bnivm->bvm", p, q) / k_next.shape[1])
    return standard(torch.stack(of_z, 1), econ)


def path_moments(networks: list, k: Tensor, s: Tensor, z: Tensor, econ: Tables, cfg: Config) -> Tuple[Tensor, Tensor]:
    """M and E[M' | z'] at the dates of simulated economies k, s (periods, B, N), z (periods, B): (periods B, V, n) and
    (periods B, Z, V, n), of which the last period of the second is not known, and zero."""
    chunk, M, M_next = max(1, 2**16 // k[0].numel()), [], []
    for t in range(0, len(k), chunk):
        some = slice(t, min(t + chunk, len(k) - 1))
        M.append(moments_of(networks, k[t : t + chunk].flatten(0, 1), s[t : t + chunk].flatten(0, 1), econ, cfg))
        k_next = k[some.start + 1 : some.stop + 1].flatten(0, 1)
        M_next.append(next_moments(networks, k_next, s[some].flatten(0, 1), z[some].flatten().unsqueeze(1), econ, cfg))
    M_next.append(torch.zeros_like(M_next[0][: k.shape[1]]))
    return torch.cat(M), torch.cat(M_next)


class Seen(NamedTuple):
    """What one network sees of the cross-sections at the n states of a batch."""

    M: Tensor  # (n, n_m) moments as they were simulated
    k: Tensor  # (n, N) the cross-sections, where moments are learnt
    s: Tensor
    unit: Tensor  # (p,) unit and
    centre: Tensor  # (p,) centre of the learnt moments


def by_date(state: dict, name: str) -> Tensor | None:
    """Moments, or cross-sections, at all dates of all economies of the simulation, one a row; None without moments."""
    return state[name].flatten(0, 1) if name in state else None


def seen_by(view: int, state: dict, at: Tensor, econ: Tables, cfg: Config) -> Seen | None:
    """view 0: the policy network, -1: the value network; at (n,) the dates of the states."""
    if not econ.M_mean.numel():
        return None
    p = cfg.learnt_moments
    of_view = by_date(state, "M")[at, view], by_date(state, "k_panel")[at], by_date(state, "s_panel")[at]
    return Seen(*of_view, econ.M_mean.shape[1] ** 0.5 * econ.M_std[view, -p:], econ.M_mean[view, -p:])


def with_moments(x: Tensor, layers: List[Tensor], seen: Seen | None, econ: Tables) -> Tensor:
    """Inputs x (n, inputs) and the moments of the states, the learnt ones by the Q of these layers."""
    if seen is None:
        return x
    if len(layers) == 6:
        return torch.cat([x, seen.M], -1)
    learnt = Q(layers, learnt_inputs(seen.k, seen.s.long(), econ)).mean(-2)
    return torch.cat([x, seen.M[..., : -len(seen.unit)], (learnt - seen.centre) / seen.unit], -1)


def learnt_slopes(layers: List[Tensor], seen: Seen | None, econ: Tables) -> Tensor | None:
    """d moment / d parameters of Q at the states, (n, p, parameters)."""
    if seen is None or len(layers) == 6:
        return None
    size = max(1, 2**18 // seen.k.shape[1])
    parts = [Q_jacobian(layers, k, s.long(), econ) for k, s in zip(seen.k.split(size), seen.s.split(size))]
    return torch.cat(parts) / seen.unit.unsqueeze(1)


def with_learnt(jacobian: Tensor, layers: List[Tensor], slopes: Tensor | None) -> Tensor:
    """A jacobian (n, P) with the columns of Q beside it, zero without slopes: moments enter where b1 does, through
    W1."""
    if len(layers) == 6:
        return jacobian
    if slopes is None:
        return torch.nn.functional.pad(jacobian, (0, sum(layer.numel() for layer in layers[6:])))
    H, n = layers[0].shape
    by_moment = jacobian[:, H * n : H * n + H] @ layers[0][:, -slopes.shape[1] :]
    return torch.cat([jacobian, (by_moment.unsqueeze(2) * slopes).sum(1)], 1)


# ---------------------------------------------------------------------------------------------- simulation


class Panel(NamedTuple):
    """The cross-section of B economies at one date."""

    k: Tensor  # (B, N), or (policies, B, N)
    s: Tensor  # (B, N)
    z: Tensor  # (B, 1)


AT_ONCE = 2**22  # shocks drawn at once: 32 MB, whatever N is


def dispersed(shape, rng: torch.Generator) -> Tensor:
    """Gamma draws of mean one and standard deviation one half, on the generator's device."""
    return torch._standard_gamma(torch.full(shape, 4.0, device=rng.device), generator=rng) / 4


def initial_panel(B: int, N: int, econ: Tables, rng: torch.Generator, dtype=torch.float32) -> Panel:
    """A dispersed cross-section (from a point mass it would need 2,000 periods to spread): k - k_min is gamma with
    mean K_mean - k_min and half of that as standard deviation, (z, s) at the stationary shares."""
    device, shape, above = econ.TFP.device, (B, N), econ.K_mean - econ.k_min
    k = econ.k_min + above * dispersed(shape, rng).to(device, dtype)
    of_z = econ.shares.sum(1)
    z = draw(uniform((B, 1), rng, device), of_z.cumsum(0)[:-1])
    of_s = (econ.shares / of_z.unsqueeze(1)).cumsum(1)[:, :-1]
    u = uniform(shape, rng, device)
    if econ.of_group.shape[1] > 1:  # groups may be for ever: as many households in each as their share says
        u = (torch.arange(N, device=device) + u) / N
    return Panel(k.to(dtype), draw(u, of_s[z]), z)


def simulate(policies: List[Callable], panel: Panel, periods: int, econ: Tables, rng: torch.Generator,
             systematic: bool = False) -> Iterator:
    """The N-agent economy under each policy on the same shocks, period by period: yields s (B, N), z (B, 1) and for
    each policy (k, K, k') with k, k' (B, N), K (B, 1)."""
    (k, s, z), chunk = panel, max(1, AT_ONCE // panel.s.numel())
    k_of = list(k) if k.dim() == 3 else [k] * len(policies)
    for start in range(0, periods, chunk):
        n = min(chunk, periods - start)
        s_path, z_path = draw_shocks(s, z, n, econ, rng, systematic)
        for t in range(n):
            K_of = [k.mean(1, keepdim=True) for k in k_of]
            k_next = [policy(k, s_path[t], K, z_path[t]) for policy, k, K in zip(policies, k_of, K_of)]
            yield s_path[t], z_path[t], list(zip(k_of, K_of, k_next))
            k_of = k_next
        s, z = s_path[n], z_path[n]


def regress_by_z(y: Tensor, x: Tensor, z: Tensor, still: Tensor, instrument: Tensor | None = None):
    """y = a(z) + b(z) x by least squares, or by an instrument of x, float64, over (periods, B): coefficients (Z, 2) and
    R2 (Z,). Where x does not move (one z, say), or little with the instrument, b is still(z); where it does not move
    R2 is NaN, and where z never comes a."""
    here = (z == torch.arange(len(still), device=still.device).view(-1, 1, 1)).double()  # (Z, periods, B)

    def mean(v):
        return (here * v).sum((1, 2)) / here.sum((1, 2))

    x_mean, y_mean = mean(x), mean(y)
    dx, dy = x - x_mean.view(-1, 1, 1), y - y_mean.view(-1, 1, 1)
    v = x if instrument is None else instrument
    dv = v - mean(v).view(-1, 1, 1)
    moves = (mean(dx * dx) > 1e-10) & (mean(dv * dx) ** 2 > 0.1 * mean(dv * dv) * mean(dx * dx))
    b = torch.where(moves, mean(dv * dy) / mean(dv * dx), still.double())
    r2 = 1 - mean((dy - b.view(-1, 1, 1) * dx) ** 2) / torch.where(moves, mean(dy * dy), torch.nan)
    return torch.stack([y_mean - b * x_mean, b], 1), r2


def law_of_motion(K_path: Tensor, z_path: Tensor, still: Tensor) -> Tuple[Tensor, Tensor]:
    """ln K' on (1, ln K) by z over paths (periods, B), as regress_by_z() has it."""
    ln_K = torch.log(K_path.double())
    return regress_by_z(ln_K[1:], ln_K[:-1], z_path[:-1], still)


def driven_by_z(law: Tensor, z_path: Tensor) -> Tensor:
    """The part of ln K that the history of z alone explains, by a law of motion (Z, 2): (periods, B)."""
    a, b = (law[:, 0] - law[:, 0].nanmean()).nan_to_num(), law[:, 1].mean().clamp(0.0, 0.999)
    t = torch.arange(len(z_path), device=z_path.device)
    lag = t.unsqueeze(1) - t - 1
    return torch.where(lag < 0, 0.0, b ** lag.clamp(min=0)) @ a[z_path]


def belief(K_path: Tensor, z_path: Tensor, econ: Tables) -> Tensor:
    """The law of motion (Z, 2) of infinitely many households, from simulated paths of few: what ln K owes to luck of
    the rich, or to K_spread, lasts longer than what it owes to z, and would make b too large, so the history of z is
    the instrument. NaN where z never comes."""
    ln_K, z = torch.log(K_path.double()), z_path[:-1]
    law, _ = law_of_motion(K_path, z_path, torch.zeros_like(econ.TFP))
    return regress_by_z(ln_K[1:], ln_K[:-1], z, law[:, 1], driven_by_z(law, z))[0]


def approach(law: Tensor, found: Tensor, share: Tensor) -> None:
    """The law (Z, 2), in place, moves this share of the way to what was found, where z came."""
    law.add_(share * torch.where(found.isnan(), 0.0, found - law))


def expected_capital(K_path: Tensor, z_path: Tensor, law: Tensor, econ: Tables) -> Tensor:
    """E[K' | K, z] by a law of motion at all but the last date of simulated paths (periods, B); realised K' also has
    the sampling noise of N households in it. Where networks see moments it is K' itself, which these are there to
    tell."""
    if econ.M_mean.numel():
        return K_path[1:]
    return torch.exp(by_law(law[z_path[:-1]], torch.log(K_path[:-1].double()))).to(K_path.dtype)


# ---------------------------------------------------------------------------------------------- ranks
# Under torchrun each rank has its share of the economies and of the roll-out's households, and its own random stream.
# What the run decides on are sums over all of them, so that every rank decides alike. With one process these functions
# do nothing.

RANKS, RANK = (int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
               for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)))
# the dimension along which ranks share a tensor of the state; of `batch_` it is the first
SHARED = dict.fromkeys(("k", "s", "z"), 0) | dict.fromkeys(
    ("K_path", "K_next", "z_path", "M", "M_next", "k_panel", "s_panel"), 1)


def join_ranks(device: str) -> None:
    """Once for every process: NCCL for what is on a GPU, gloo for what is not."""
    if RANKS == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    together(lambda: dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"))
    atexit.register(dist.destroy_process_group)


def together(work: Callable) -> None:
    """work(), which waits for every rank. UserError where one of them is gone."""
    try:
        work()
    except RuntimeError as error:
        raise UserError(f"a rank was lost after iteration {Interrupted.iteration}; the checkpoint of that iteration "
                        "stays, go on with the same command and --resume") from error


def heard(sums) -> None:
    """Waits for sums where a signal is heard: inside all_reduce it is not, and a rank that hangs or is lost in the
    middle of a message would leave this one there."""
    while not sums.is_completed():
        time.sleep(1e-4)
    sums.wait()


def total(x: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if RANKS > 1:
        together(lambda: dist.all_reduce(x) if x.is_cuda else heard(dist.all_reduce(x, async_op=True)))
    return x


def gathered(x: Tensor, dim: int) -> Tensor:
    """The ranks' tensors, one after the other along dim, bit for bit: zeros are added to their bytes."""
    if RANKS == 1:
        return x
    parts = x.new_zeros(RANKS, *x.shape)
    parts[RANK] = x
    total(parts.view(torch.uint8))
    return torch.cat(list(parts), dim)


def of_first(make: Callable):
    """What make() returns on the first rank."""
    box = [make() if RANK == 0 else None]
    if RANKS > 1:
        together(lambda: dist.broadcast_object_list(box, device=torch.device("cpu")))
    return box[0]


def agreed(x: Tensor) -> None:
    """x becomes what it is on the first rank: other machines round in other ways."""
    if RANKS > 1:
        x.copy_(total(x * (RANK == 0)))


def own_share(cfg: Config) -> Config:
    """What one rank simulates and rolls out."""
    for name in ("n_economies", "batch"):
        size = getattr(cfg, name)
        require(size % RANKS == 0, f"{flag(name)} {size} is no multiple of the {RANKS} ranks: give "
                f"{RANKS * math.ceil(size / RANKS)}")
    return dataclasses.replace(cfg, n_economies=cfg.n_economies // RANKS, batch=cfg.batch // RANKS)


def shared_along(name: str) -> int | None:
    return 0 if name.startswith("batch_") else SHARED.get(name)


def whole(state: dict) -> dict:
    """The state of all ranks, on the CPU."""
    return {name: x if shared_along(name) is None else gathered(x.cpu(), shared_along(name))
            for name, x in state.items()}


def own_part(state: dict) -> dict:
    """Of a whole state."""
    return {name: x if shared_along(name) is None else x.chunk(RANKS, shared_along(name))[RANK].clone()
            for name, x in state.items()}


# ---------------------------------------------------------------------------------------------- learning


def roll_out(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables,
             M: Tensor | None = None, at: Tensor | None = None) -> Tensor:
    """k (T + 1, M) of M price-taking households along given paths s, K, z (T + 1, M), from k (M,); the moments are
    the rows at (T + 1, M) of M (dates, V, n)."""
    path, T = torch.empty_like(K), K.shape[0] - 1
    path[0] = k
    y, R = earnings(s, K, z, econ)
    others = features_of_others(path[:T], s[:T], K[:T], z[:T], econ, policy_view(M, at, 0, T))
    for t in range(T):
        m = cash(path[t], y[t], R[t])
        path[t + 1] = savings(policy, with_own(path[t], m, others[t], econ), m, econ)
    return path


def value_and_costate(policy: List[Tensor], value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
                      econ: Tables, M: Tensor | None = None) -> Tuple[Tensor, Tensor]:
    """V of the value network and, by the envelope condition, V_k = R u'(c) + Delta of the policy network: sharper than
    the slope of V, as the policy network has the kink of the borrowing limit."""
    m, R = cash_on_hand(k, s, K, z, econ)
    x = features(k, s, m, K, z, econ, None if M is None else M[..., 0, :])
    x_value = x if M is None or M.shape[-2] == 1 else features(k, s, m, K, z, econ, M[..., 1, :])
    u_prime = marginal_utility((1 - saved_share(network(policy, x))) * (m - econ.k_min), econ)
    V, _ = value_of(network(value, for_value(x_value)), s, z, econ)
    return V, R * u_prime + expected_Delta(u_prime, k, s, K, z, econ)


def surprises(policy: List[Tensor], value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
              K_next: Tensor, econ: Tables, M: Tensor | None = None, M_next: Tensor | None = None,
              at: Tensor | None = None) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Control variates, (T, M) from paths (T + 1, M) and K_next = E[K' | K, z] (T, M): V(k', s', K', z') as it came
    less its expectation, and the same of V_k. Their mean is zero, and they carry nearly all the noise of the realised
    utility and of the costate: that of s' and z', and that of K', which N households leave. Then V and V_k as they
    came. Moments: rows at (T + 1, M) of M (dates, V, n), and of M_next (dates, Z, V, n), which is E[M' | z']."""
    T = k.shape[0] - 1
    surprise, surprise_k, came, came_k = [torch.empty_like(k[:T]) for _ in range(4)]
    chunk = periods_at_once(k, econ.next_s.shape[1])
    for t in range(0, T, chunk):
        last = min(t + chunk, T)
        s_t, z_t = s[t:last], z[t:last]
        k_came, K_came = k[t + 1 : last + 1], K[t + 1 : last + 1]
        s_came, z_came = s[t + 1 : last + 1], z[t + 1 : last + 1]
        k1, s1, K1, z1 = successors(k_came, s_t, K_next[t:last], z_t, econ)
        M_came: Tensor | None = None
        M1: Tensor | None = None
        if M is not None and M_next is not None and at is not None:
            M_came, M1 = M[at[t + 1 : last + 1]], M_next[at[t:last].expand(z1.shape), z1]
        V, V_k = value_and_costate(policy, value, k1, s1, K1, z1, econ, M1)
        came[t:last], came_k[t:last] = value_and_costate(policy, value, k_came, s_came, K_came, z_came, econ, M_came)
        surprise[t:last] = came[t:last] - expected(V, s_t, z_t, econ)
        surprise_k[t:last] = came_k[t:last] - expected(V_k, s_t, z_t, econ)
    return surprise, surprise_k, came, came_k


def costates(c: Tensor, dc: Tensor, k: Tensor, s: Tensor, R: Tensor, Delta: Tensor, V_T: Tensor, V_k_T: Tensor,
             surprise: Tensor, surprise_k: Tensor, came: Tensor, came_k: Tensor,
             econ: Tables) -> Tuple[Tensor, Tensor, Tensor]:
    """Backwards through the roll-out, each (T, M): realised utility U_t = u(c_t) + Delta_t k_t + beta(s_t) U_{t+1}, its
    derivative lambda_t = u'(c_t) dc/dk + Delta_t + beta(s_t) lambda_{t+1} dk'/dk, and the next costate that the
    household weighs against u'(c_t). Equal to back-propagation through time when surprises, V and V_k as they came are
    zero.

    lambda_{t+1} is V_k as it came and, for the rest, Euler errors of later periods, each weighted by the growth of beta
    dk'/dk u'(c) since t. Where risk aversion is high one household in a thousand loses its income with next to nothing
    saved, its u'(c) grows a thousandfold, and its label is all noise. So the rest comes back by at most
    one for one in each period (Munos et al. 2016), and is at most as large as E V_k: at the solution it is zero."""
    u, u_k, beta = utility(c, econ) + Delta * k, marginal_utility(c, econ) * dc + Delta, econ.beta[s]
    saved = torch.cat([(1 - dc / R)[1:], torch.ones_like(R[:1])])  # of a unit of cash next period
    growth = beta * (saved * came_k).abs() / marginal_utility(c, econ)
    kept, expected_k = 1 / growth.clamp(min=1.0), came_k - surprise_k
    most = torch.where(came_k == 0, math.inf, expected_k.abs())
    flow, of_next, of_saving = u + beta * ((1 - kept) * came - surprise), beta * kept, beta * (R - dc)
    least, U, lam, lam_next = -most / 2, torch.empty_like(c), torch.empty_like(c), torch.empty_like(c)
    U_t, lam_t = V_T, V_k_T
    for i in range(c.shape[0]):
        t = c.shape[0] - 1 - i
        rest = torch.clamp(kept[t] * (lam_t - came_k[t]), least[t], most[t])
        lam_next[t] = expected_k[t] + rest
        U_t = torch.addcmul(flow[t], of_next[t], U_t)
        lam_t = torch.addcmul(u_k[t], of_saving[t], lam_next[t])
        U[t], lam[t] = U_t, lam_t
    return U, lam, lam_next


class Kernels(NamedTuple):
    """The functions that run inside loops, TorchScript-compiled or as they are."""

    network_capital: Callable
    network_value: Callable
    roll_out: Callable
    consumption_and_slope: Callable
    surprises: Callable
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
    """What a roll-out of M households over T periods teaches, each (T, M)."""

    k: Tensor
    s: Tensor
    K: Tensor
    z: Tensor
    K_next: Tensor  # E[K' | K, z]
    c: Tensor
    U: Tensor  # realised utility, then V
    lam: Tensor  # its derivative, a sample of V_k
    lam_next: Tensor  # lambda_{t+1}: what a unit of k' is worth
    at: Tensor  # date and economy, a row of the state's moments


def sample_households(panel: Panel, K_path: Tensor, K_next: Tensor, z_path: Tensor, k_range: Tensor, econ: Tables,
                      cfg: Config, rng: torch.Generator) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Initial k (M,), paths s, K, z (T + 1, M), E[K' | K, z] (T, M) and the rows of their dates (T + 1, M): windows of
    the simulated economies (periods, B), s drawn anew. A share of the households starts anywhere in the simulated
    range of k (2,) and a little beyond: the ergodic set of a wrong policy never visits the tails that decide the
    distribution."""
    M, device = cfg.batch, K_path.device
    economy = torch.randint(K_path.shape[1], (M,), generator=rng, device=device)
    start = torch.randint(K_path.shape[0] - cfg.horizon, (M,), generator=rng, device=device)
    window = start + torch.arange(cfg.horizon + 1, device=device).unsqueeze(1)
    K, z = K_path[window, economy], z_path[window, economy]
    start_wide, start_even, drawn = uniform((3, M), rng, device)
    household = torch.randint(panel.k.numel(), (M,), generator=rng, device=device)
    low, unit = (k_range[0] - econ.k_min) / 10, 0.1 * econ.c_ss
    high = torch.maximum(cfg.wide_top * k_range[1], 5 * econ.K_mean) - econ.k_min  # at first the panel is too narrow
    wide = econ.k_min + low + unit * ((1 + (high - low) / unit) ** drawn - 1)  # log-uniform: dense where c bends most
    k = torch.where(start_wide < cfg.wide_share, wide, panel.k.flatten()[household])
    any_s = torch.randint(econ.beta.shape[0], (M,), generator=rng, device=device)
    s = torch.where(start_even < cfg.even_share, any_s, panel.s.flatten()[household])
    shocks = uniform(z.shape, rng, device)
    s_path = follow(lambda t, s: shocks[t], s, z, econ)
    return k, s_path, K, z, K_next[window[:-1], economy], window * K_path.shape[1] + economy


def roll_out_batch(policy: List[Tensor], value: List[Tensor], paths, econ: Tables, cfg: Config,
                   kernels: Kernels, M: Tensor | None = None, M_next: Tensor | None = None) -> Batch:
    """Forward along the paths, backward with utilities and costates. M and M_next as path_moments() has them."""
    k0, s, K, z, K_next, at = paths
    k = kernels.roll_out(policy, k0, s, K, z, econ, M, at)
    c, dc = kernels.consumption_and_slope(policy, k[:-1], s[:-1], K[:-1], z[:-1], econ, M, at[:-1])
    if cfg.control_variate:
        surprise = kernels.surprises(policy, value, k, s, K, z, K_next, econ, M, M_next, at)
        V_T, V_k_T = surprise[2][-1], surprise[3][-1]
    else:
        surprise, M_T = [torch.zeros_like(c)] * 4, None if M is None else M[at[-1], -1]
        V_T, V_k_T = kernels.network_value(value, k[-1], s[-1], K[-1], z[-1], econ, M_T)
    k, s, K, z = k[:-1], s[:-1], K[:-1], z[:-1]
    R, _ = prices(K, z, econ)
    Delta = expected_Delta(marginal_utility(c, econ), k, s, K, z, econ)
    labels = kernels.costates(c, dc, k, s, R, Delta, V_T, V_k_T, *surprise, econ)
    return Batch(k, s, K, z, K_next, c, *labels, at[:-1])


def worth_of_saving(batch: Batch, econ: Tables) -> Tensor:
    """beta lambda' / u'(c): one where the first-order condition holds."""
    return econ.beta[batch.s] * batch.lam_next / marginal_utility(batch.c, econ)


def policy_residual(batch: Batch, econ: Tables) -> Tensor:
    """ln(c~ / c) with u'(c~) = beta lambda', within half a unit: how far log c is from its first-order condition."""
    worth = worth_of_saving(batch, econ).clamp(min=1e-6) * marginal_utility(batch.c, econ)
    return torch.log(inverse_marginal_utility(worth, econ) / batch.c).clamp(-0.5, 0.5)


def add_gram(A: Tensor, jacobian: Tensor) -> None:
    """A += jacobian' jacobian in the lower triangle and the blocks on the diagonal, which is all that a Cholesky factor
    is made of: seven twelfths of the work."""
    P = len(A)
    for block in range(6):
        low, high = P * block // 6, P * (block + 1) // 6
        A[low:high, :high].addmm_(jacobian[:, low:high].T, jacobian[:, :high])


def gauss_newton_step(theta: Tensor, rows: Callable, n: int, rate: Tensor, damping: Tensor, floor: float,
                      loss: Callable, parts: tuple = (1,)) -> Tuple[Tensor, Tensor, Tensor]:
    """rate times a Levenberg-Marquardt step, solved in float64. rows(part) gives, for a slice of the n states, pairs
    of a residual and its jacobian = -d residual / d theta (n, P). The damping is in units of each parameter's own
    diagonal (Marquardt 1963), so that what only few states see, the bends near the limit, is free to move, and of a
    tenth of the mean one. The mean squared residual is added to it (Yamashita & Fukushima 2001): careful far from the
    solution, free near it. A step that does not lower the loss is not taken, and the damping rises tenfold: decided on
    the device, so that nothing waits for it. parts: whether all of it is tried, or a third of it, and so on: the one
    that leaves the least loss is taken. Returns theta, damping and whether a step was taken."""
    A, gradient, now = theta.new_zeros(len(theta), len(theta)), theta.new_zeros(len(theta)), total(loss(theta))
    for start in range(0, n, 2048):  # in parts: the whole jacobian would not fit a cache
        for residual, jacobian in rows(slice(start, start + 2048)):
            add_gram(A, jacobian)
            gradient.addmv_(jacobian.T, residual)
    A, gradient = total(A).double(), total(gradient)
    A.diagonal().add_((damping + now / (n * RANKS)) * (A.diagonal() + 0.1 * A.diagonal().mean()))
    factor, _ = torch.linalg.cholesky_ex(A)
    step = torch.cholesky_solve(gradient.double().unsqueeze(1), factor).squeeze(1)
    best, least = theta, now
    for part in parts:
        trial = theta + rate / part * step.to(theta.dtype)
        left = total(loss(trial))
        better = left < least
        best, least = torch.where(better, trial, best), torch.where(better, left, least)
    taken = least < now
    damping = torch.where(taken, (damping / 3).clamp(min=floor), (damping * 10).clamp(max=1e6))
    return best, damping, taken


class Inputs(NamedTuple):
    """The states of a batch as both networks and all three least-squares problems see them."""

    m: Tensor  # (n,)
    x: Tensor  # (n, inputs without moments)
    dx: Tensor  # (n, inputs)
    weight: Tensor  # (n,) square root of the weight


def inputs_of(batch: Batch, econ: Tables) -> Inputs:
    m, R = cash_on_hand(batch.k, batch.s, batch.K, batch.z, econ)
    x, dx = features(batch.k, batch.s, m, batch.K, batch.z, econ), feature_slopes(batch.k, m, R, econ)
    return Inputs(m, x, dx, econ.root_weight[batch.s])


def value_targets(batch: Batch, econ: Tables) -> Tuple[Tensor, Tensor, Tensor]:
    """What g and dg/dk should be for V = U and V_k = lambda, and V_g / u'(c), which makes slopes unit-free. Utility may
    have a bound that a noisy sample U passes: it is held to half the least and twice the most consumption for ever."""
    U, D = batch.U, econ.annuity[joint(batch.s, batch.z, econ)]
    if econ.equilibrium == "market":
        U = U.clamp(D * utility(batch.c.min() / 2, econ), D * utility(2 * batch.c.max(), econ))
    g = equivalent_of(U, batch.s, batch.z, econ)
    _, V_g = value_of(g, batch.s, batch.z, econ)
    return g, batch.lam / V_g, V_g / marginal_utility(batch.c, econ)


def utility_level(layers: List[Tensor], x: Tensor, at: Inputs, batch: Batch, econ: Tables, kernels: Kernels):
    """How far g is from realised utility, a function of layers and g, and minus its derivative, of a slice."""
    g_target, _, _ = value_targets(batch, econ)
    return lambda _, g: g_target - g, lambda part: kernels.network_jacobian(layers, x[part])


def bellman_level(layers: List[Tensor], x: Tensor, at: Inputs, batch: Batch, econ: Tables, kernels: Kernels,
                  M_next: Tensor | None = None):
    """The same of the Bellman residual u(c) + Delta k + beta E V(s') - V(s) of the policy as it is for ever: an exact
    sum, with nothing to average, but 1 - beta small, so by 1 / (1 - beta) heavier."""
    here, beta = joint(batch.s, batch.z, econ), econ.beta[batch.s]
    u_prime = marginal_utility(batch.c, econ)
    flow = utility(batch.c, econ) + expected_Delta(u_prime, batch.k, batch.s, batch.K, batch.z, econ) * batch.k
    k1, s1, K1, z1 = successors(at.m - batch.c, batch.s, batch.K_next, batch.z, econ)
    M1 = None if M_next is None else M_next[batch.at.expand(z1.shape), z1][..., -1, :]
    x1 = for_value(features(k1, s1, cash_on_hand(k1, s1, K1, z1, econ)[0], K1, z1, econ, M1))
    V_g = value_of(network(layers, x), batch.s, batch.z, econ)[1]
    unit = econ.annuity[here] / V_g
    P = econ.probability[here].T * beta * unit * value_of(network(layers, x1), s1, z1, econ)[1]

    def gap(layers, g):
        V1 = value_of(network(layers, x1), s1, z1, econ)[0]
        return unit * (flow + beta * expected(V1, batch.s, batch.z, econ) - value_of(g, batch.s, batch.z, econ)[0])

    def jacobian(part):
        out = (unit * V_g)[part].unsqueeze(1) * kernels.network_jacobian(layers, x[part])
        for j in range(len(P)):
            out -= P[j, part].unsqueeze(1) * kernels.network_jacobian(layers, x1[j, part])
        return out

    return gap, jacobian


def robust(residual: Tensor, weight: Tensor) -> Tensor:
    """Root weights (n,) of the pseudo-Huber loss: residuals that are many times the weighted mean one, next to the
    kinks that the limit makes in c, count by their size and no longer by its square, or they would bend the network
    everywhere else."""
    of_all = total(torch.stack([(weight.square() * residual.abs()).sum(), weight.square().sum()]))
    return (1 + (residual * of_all[1] / of_all[0].clamp(min=1e-30)).square()) ** -0.25


def value_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Tables, cfg: Config,
               kernels: Kernels, bellman: bool = False, seen: Seen | None = None, M_next: Tensor | None = None):
    """Gauss-Newton on the value network's level and slope together (Huge & Savine 2020: fit the slopes too): the slope
    goes to the costate, the level to realised utility or, with bellman, to what the Bellman equation says; learnt
    moments then stay as they are, since next period's are not seen."""
    at, layers = inputs_of(batch, econ), layers_of(theta, econ, cfg)

    def inputs(layers):
        return for_value(with_moments(at.x, layers, seen, econ))

    x, dx = inputs(layers), for_value(at.dx)
    slopes = None if bellman else learnt_slopes(layers, seen, econ)
    _, g_k_target, unit = value_targets(batch, econ)
    level, slope = cfg.level_weight * at.weight, cfg.slope_weight * at.weight * unit
    if bellman:
        gap, jacobian = bellman_level(layers, x, at, batch, econ, kernels, M_next)
    else:
        gap, jacobian = utility_level(layers, x, at, batch, econ, kernels)

    def residuals(theta):
        layers = layers_of(theta, econ, cfg)
        g, g_k = network_and_slope(layers, inputs(layers), dx)
        return torch.stack([level * gap(layers, g), slope * (g_k_target - g_k)])

    now = residuals(theta)
    if bellman:  # no noise in it, so what is large is next to a kink
        level, slope = [weight * robust(r, torch.ones_like(r)) for weight, r in zip((level, slope), now)]
        now = residuals(theta)

    def rows(part):
        of_part = None if slopes is None else slopes[part]
        yield now[0, part], with_learnt(level[part].unsqueeze(1) * jacobian(part), layers, of_part)
        slope_rows = kernels.slope_jacobian(layers, x[part], dx[part] * slope[part].unsqueeze(1))
        yield now[1, part], with_learnt(slope_rows, layers, of_part)

    floor, parts = (cfg.damping / 3, (1, 3, 9)) if bellman else (cfg.damping, (1,))
    return gauss_newton_step(theta, rows, len(at.x), rate, damping, floor,
                             lambda theta: residuals(theta).square().sum(), parts)


def policy_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Tables, cfg: Config,
                kernels: Kernels, seen: Seen | None = None):
    """Gauss-Newton on the utility objective: move log c to its first-order condition, wherever the borrowing limit
    leaves room."""
    at, layers = inputs_of(batch, econ), layers_of(theta, econ, cfg)
    x, slopes = with_moments(at.x, layers, seen, econ), learnt_slopes(layers, seen, econ)
    f, newton = network(layers, x), policy_residual(batch, econ)
    free = ((f < 0) | (newton < 0)) * at.weight
    free = free * robust(newton, free)

    def rows(part):
        jacobian = kernels.network_jacobian(layers, x[part]) * free[part].unsqueeze(1)
        yield newton[part] * free[part], with_learnt(jacobian, layers, None if slopes is None else slopes[part])

    def loss(theta):
        layers = layers_of(theta, econ, cfg)
        return ((f + newton - network(layers, with_moments(at.x, layers, seen, econ))) * free).square().sum()

    return gauss_newton_step(theta, rows, len(at.x), rate, damping, cfg.damping, loss)


def shares_of(batch: Batch, cfg: Config) -> List[Batch]:
    """The households that each value network learns from."""
    n = cfg.value_networks
    return [batch] if n == 1 else [Batch(*[x[i::n] for x in batch]) for i in range(n)]


def value_loss(theta: Tensor, batch: Batch, econ: Tables, cfg: Config, seen: Seen | None = None) -> Tensor:
    """Half the mean squared error of g, and of its slope, for Adam."""
    at, (g_target, g_k_target, unit) = inputs_of(batch, econ), value_targets(batch, econ)
    layers = layers_of(theta, econ, cfg)
    g, g_k = network_and_slope(layers, for_value(with_moments(at.x, layers, seen, econ)), for_value(at.dx))
    level, slope = cfg.level_weight * (g_target - g), cfg.slope_weight * unit * (g_k_target - g_k)
    return (level.square() + slope.square()).mean() / 2


def mean_value_loss(theta: Tensor, state: dict, batch: Batch, econ: Tables, cfg: Config) -> Tensor:
    """Of all value networks, each on its own share of the households."""
    losses = [value_loss(part, own, econ, cfg, seen_by(-1, state, own.at, econ, cfg))
              for part, own in zip(theta.chunk(cfg.value_networks), shares_of(batch, cfg))]
    return torch.stack(losses).mean()


def policy_loss(theta: Tensor, batch: Batch, econ: Tables, cfg: Config, seen: Seen | None = None) -> Tensor:
    """Minus the utility objective up to a constant: its gradient is -sum_t beta^t (dU/d log c) d log c / d theta,
    back-propagation through time without the graph through time."""
    layers = layers_of(theta, econ, cfg)
    f = network(layers, with_moments(inputs_of(batch, econ).x, layers, seen, econ)).clamp(max=0.0)
    first_order = (1 - worth_of_saving(batch, econ)) * marginal_utility(batch.c, econ) * batch.c
    discount = econ.beta[batch.s].cumprod(0) / econ.beta[batch.s]
    return -(discount * first_order * f).sum(0).mean()


def taught(cfg: Config) -> List[int]:
    """Periods of a roll-out whose states teach. All lie in its first half, so that labels have at least T / 2 periods
    of realised utility in them before V takes over; many lie early, where households are where they were put."""
    last = max(cfg.horizon // 2 - 1, 0)
    return sorted({round(last * (i / max(cfg.states - 1, 1)) ** 3) for i in range(cfg.states)})


def thin(batch: Batch, cfg: Config) -> Batch:
    """The states that teach, as one list."""
    return Batch(*[torch.cat([path[t] for t in taught(cfg)]) for path in batch])


HISTORY = ("seconds", "mean_K", "objective", "policy_residual", "value_residual", "slope_residual", "value_spread",
           "at_limit", "euler", "policy_taken", "value_taken", "policy_damping", "value_damping", "rate", "movement")
WATCHED = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 3.0)  # multiples of mean capital at which savings are watched


def watched_savings(state: dict, econ: Tables, cfg: Config) -> Tensor:
    """k' as a share of K at WATCHED, a mean over (z, s) and over K up to 3% off its mean: (10,)."""
    Z, S = econ.shares.shape
    device, K = econ.TFP.device, econ.K_mean
    above = K - econ.k_min
    k = econ.k_min + torch.stack([multiple * above for multiple in WATCHED]).view(-1, 1, 1, 1)
    of_K = torch.stack([0.97 * K, K, 1.03 * K]).view(-1, 1, 1)
    at = torch.broadcast_tensors(k, torch.arange(S, device=device), of_K, torch.arange(Z, device=device).view(-1, 1))
    M = torch.zeros_like(econ.M_mean[0]) if econ.M_mean.numel() else None  # moments at their means
    k_next = network_capital(layers_of(state["policy"], econ, cfg), *at, econ, M)  # (10, 3, Z, S)
    return (k_next * econ.shares).sum((2, 3)).mean(1) / K


def movement(watched: list) -> float:
    """Mean change between two means of five iterations in a row of watched_savings(), which averages noise out."""
    n = min(5, len(watched) // 2)
    if n == 0:
        return 1.0
    means = np.array(watched[-2 * n :]).reshape(2, n, -1).mean(1)
    return float(np.abs(means[1] - means[0]).mean())


def iteration_figures(state: dict, objective: Tensor, batch: Batch, econ: Tables, cfg: Config, taken) -> Tensor:
    """The figures of HISTORY from mean_K to value_damping and watched_savings(), on the device."""
    at, (g_target, g_k_target, unit) = inputs_of(batch, econ), value_targets(batch, econ)
    (layers, value), M = networks_of(state, econ, cfg), by_date(state, "M")
    x = for_value(at.x if M is None else torch.cat([at.x, M[batch.at, -1]], 1))
    g, g_k = network_and_slope(value, x, for_value(at.dx))
    apart = torch.stack([network(one, x) - g for one in value_networks(state, econ, cfg)]).square().mean()
    free = batch.c < (at.m - econ.k_min) * (1 - 1e-6)
    at_limit = 1 - free.to(at.m.dtype).mean()
    first_order = torch.where(free, policy_residual(batch, econ), torch.zeros_like(at.m))
    squares = [x.square().mean() for x in (first_order, econ.value_unit * (g_target - g), unit * (g_k_target - g_k))]
    states = States.expected(batch, econ)
    if M is not None:
        states = states._replace(M=M[batch.at], M_next=by_date(state, "M_next")[batch.at])

    def policy(k, s, K, z, M=None):
        return network_capital(layers, k, s, K, z, econ, None if M is None else M[..., 0, :])

    error, counts = euler_residuals(policy, states, econ)
    euler, n = (error.abs() * counts).sum(), counts.sum()
    mean_K, objective, *squares, apart, at_limit, euler, n = total(torch.stack(
        [state["k"].mean(), objective, *squares, apart, at_limit, euler, n])) / RANKS
    rms, damping = [square.sqrt() for square in (*squares, apart)], state["damping"]
    rms[-1] *= econ.value_unit
    figures = torch.stack([mean_K, objective, *rms, at_limit, euler / n, *taken, damping[0], damping[1:].mean()])
    return torch.cat([figures, watched_savings(state, econ, cfg)])


def iterate(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator, optimizers) -> Tensor:
    """One outer iteration, in place on the tensors of the state: learn from the states of the last roll-out, then
    simulate and roll out under the new policy. Returns its figures without waiting for them."""
    states = Batch(*[state[f"batch_{name}"] for name in Batch._fields])
    taken = state["damping"].new_zeros(2)
    if state["iteration"] > 0 and cfg.optimizer == "gauss-newton":
        taken = gauss_newton_updates(state, states, econ, cfg, kernels)
    if cfg.optimizer == "adam":
        taken = adam_updates(state, econ, cfg, kernels, rng, optimizers)
    for name in ("policy", "value"):
        agreed(state[name])
    simulate_on(state, econ, cfg, kernels, rng)
    if learns(state, cfg) == "value":  # V of the final policy matters where that policy leads
        cfg = dataclasses.replace(cfg, wide_share=0.0)
    batch = roll_out_sample(state, econ, cfg, kernels, rng)
    keep_batch(state, batch, cfg)
    if state["iteration"] == 0 and cfg.optimizer == "gauss-newton":
        for _ in range(10 if cfg.learnt_moments else 4):  # the value network, a constant so far, meets its first labels
            value_update(state, states, state["rates"][1], econ, cfg, kernels)
    return iteration_figures(state, batch.U[0].mean(), states, econ, cfg, taken)


def simulate_on(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator) -> None:
    """The economies go on from where they are, under the current policy, and what is learnt of them is kept in the
    state: paths, beliefs, range and centre of capital, moments."""
    networks = networks_of(state, econ, cfg)

    def policy(k, s, K, z):
        M = moments_of(networks[:1], k, s, econ, cfg) if econ.M_mean.numel() else None
        return kernels.network_capital(networks[0], k, s, K, z, econ, M)

    k, order = state["k"].sort(1)  # by wealth: shocks are spread evenly over the rich and over the poor, too
    s, groups = state["s"].gather(1, order), econ.of_group.shape[1]
    scale = 1 + cfg.K_spread * (2 * uniform((cfg.n_economies, groups), rng, state["z"].device) - 1)
    scale = scale.gather(1, group_of(s, econ)) if groups > 1 else scale  # each group's capital by a factor of its own
    panel = Panel(econ.k_min + (k - econ.k_min) * scale, s, state["z"])
    gains, k_path, s_path = torch.zeros_like(state["K_path"]), [], []
    economies = simulate([policy], panel, cfg.periods, econ, rng, cfg.systematic and not needs_noise(cfg))
    for t, (s, z, [(k, K, k_next)]) in enumerate(economies):
        state["K_path"][t], state["z_path"][t] = K[:, 0], z[:, 0]
        if econ.M_mean.numel():
            k_path.append(k)
            s_path.append(s)
        if econ.equilibrium == "planner":
            gains[t] = gain_from_K(k, s, k_next, K, z, econ).mean(1)
        panel = Panel(k, s, z)
    for name, tensor in zip(Panel._fields, panel):
        state[name].copy_(tensor)
    K_path, z_path = gathered(state["K_path"], 1), gathered(state["z_path"], 1)
    if econ.equilibrium == "planner":
        law, _ = regress_by_z(gathered(gains, 1).double(), torch.log(K_path.double()), z_path, econ.TFP * 0)
        approach(econ.Delta_law, law, state["rates"][2])
    if not econ.M_mean.numel():
        approach(state["K_law"], belief(K_path, z_path, econ), state["rates"][3])
    state["K_next"].copy_(expected_capital(state["K_path"], state["z_path"], state["K_law"], econ))
    state["k_range"].copy_(widened(state["k_range"], panel.k))
    if k_path:
        keep_moments(state, networks, torch.stack(k_path), torch.stack(s_path), econ, cfg)
    recentre(state, econ, cfg)


DISPERSED = 15  # outer iterations that start from disperse()


def disperse(state: dict, econ: Tables, rng: torch.Generator) -> None:
    """Everybody's k anew, dispersed as in initial_panel() around the mean of the household's economy and group. Under
    the first policies, far from a solution, the cross-section collapses, and what K' is then, and for the 2,000 periods
    that it takes to spread again, is not the law of motion."""
    k, s = state["k"], state["s"]
    draws = dispersed(k.shape, rng).to(k.device)

    def mean(x):
        return MOMENTS["groups"](x, s, econ).mean(1).gather(1, group_of(s, econ))

    k.copy_(econ.k_min + draws * mean(k - econ.k_min) / mean(draws))


def range_of(k: Tensor) -> Tensor:
    """Least and largest k on all ranks (2,)."""
    ends = gathered(torch.stack([k.min(), k.max()]), 0)
    return torch.stack([ends.min(), ends.max()])


def widened(k_range: Tensor, k: Tensor) -> Tensor:
    """The simulated range of capital (2,): it grows at once and shrinks by a tenth an iteration, so that rare states
    are learnt from all the time and not by fits."""
    now = range_of(k)
    slowly = k_range + 0.1 * (now - k_range)
    return torch.stack([torch.minimum(now, slowly)[0], torch.maximum(now, slowly)[1]])


def recentre(state: dict, econ: Tables, cfg: Config) -> None:
    """Where mean K has moved by more than a tenth, the input ln K is centred there anew; the first biases take the
    difference up, so that both networks stay the functions they were."""
    shift = total(torch.log(state["K_path"] / econ.K_mean).mean()) / RANKS
    shift = torch.where(shift.abs() > 0.1, shift, torch.zeros_like(shift))
    econ.K_mean.mul_(torch.exp(shift))
    policy, values = layers_of(state["policy"].detach(), econ, cfg), value_networks(state, econ, cfg)
    shift = econ.K_scale * shift  # of the input
    policy[1].add_(shift * policy[0][:, K_INPUT])
    for W1, b1, *_ in values:  # x = x' + shift, and x^2 = x'^2 + 2 shift x' + shift^2
        of_square, of_x = W1[:, 0], W1[:, 1 + K_INPUT]
        b1.add_(shift * (of_x + shift * of_square))
        of_x.add_(2 * shift * of_square)
    if not econ.M_mean.numel():
        return
    M, n = gathered(state["M"], 1).flatten(0, 1), econ.M_mean.shape[1]
    shift, unit = M.mean(0) * n**0.5, M.std(0) * n**0.5  # (V, n)
    moved = (shift.abs() > 0.5) | (unit > 2) | ((unit < 0.5) & (unit > 1e-6))
    shift, unit = torch.where(moved, shift, 0.0), torch.where(moved & (unit > 1e-6), unit, 1.0)
    for view, (W1, b1, *_) in ((0, policy), *((-1, layers) for layers in values)):
        b1.add_(W1[:, -n:] @ shift[view] / n**0.5)
        W1[:, -n:].mul_(unit[view])
    econ.M_mean.add_(econ.M_std * shift)
    econ.M_std.mul_(unit)
    for name in ("M", "M_next"):
        state[name].sub_(shift / n**0.5).div_(unit)


def keep_moments(state: dict, networks: list, k: Tensor, s: Tensor, econ: Tables, cfg: Config) -> None:
    """Moments at all dates of the simulation k, s (periods, B, N) and, where they are learnt, the cross-sections."""
    M, M_next = path_moments(networks, k, s, state["z_path"], econ, cfg)
    state["M"].copy_(M.view_as(state["M"]))
    state["M_next"].copy_(M_next.view_as(state["M_next"]))
    if cfg.learnt_moments:
        state["k_panel"].copy_(k)
        state["s_panel"].copy_(s)


def roll_out_sample(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator) -> Batch:
    """Labels of freshly drawn households under the current networks."""
    panel = Panel(state["k"], state["s"], state["z"])
    of_state = [state[name] for name in ("K_path", "K_next", "z_path", "k_range")]
    paths = sample_households(panel, *of_state, econ, cfg, rng)
    policy, value = networks_of(state, econ, cfg)
    return roll_out_batch(policy, value, paths, econ, cfg, kernels, by_date(state, "M"), by_date(state, "M_next"))


def keep_batch(state: dict, batch: Batch, cfg: Config) -> None:
    for name, tensor in zip(Batch._fields, thin(batch, cfg)):
        state[f"batch_{name}"].copy_(tensor)


def value_update(state: dict, states: Batch, rate, econ: Tables, cfg: Config, kernels: Kernels, bellman: bool = False):
    """A step of each value network on its own share of the households; whether all were taken."""
    damping, taken = state["damping"][1:], []
    for i, (theta, own) in enumerate(zip(state["value"].chunk(cfg.value_networks), shares_of(states, cfg))):
        found, damping[i], step_taken = value_step(theta, rate, damping[i], own, econ, cfg, kernels, bellman,
                                                   seen_by(-1, state, own.at, econ, cfg), by_date(state, "M_next"))
        theta.copy_(found)
        taken.append(step_taken)
    return torch.stack(taken).all()


def gauss_newton_updates(state: dict, states: Batch, econ: Tables, cfg: Config, kernels: Kernels) -> Tensor:
    """A step of each network that learns, on the same states; whether they were taken, (2,)."""
    which, (policy_rate, value_rate, _, _, momentum), damping = learns(state, cfg), state["rates"], state["damping"]
    taken = value_taken = torch.zeros_like(damping[0], dtype=torch.bool)
    if which != "value":
        policy, damping[0], taken = policy_step(state["policy"], policy_rate, damping[0], states, econ, cfg, kernels,
                                                seen_by(0, state, states.at, econ, cfg))
        if cfg.learnt_moments:
            policy = policy + torch.where(taken, momentum * state["last_step"], torch.zeros_like(policy))
            state["last_step"].copy_(policy - state["policy"])
        state["policy"].copy_(policy)
    if which == "both":
        value_taken = value_update(state, states, value_rate, econ, cfg, kernels)
    if which == "value":
        n = min(4, len(states.k) // cfg.value_networks)  # a quarter is enough where there is no noise to average
        for i in range(12):
            some = Batch(*[x[i % n :: n] for x in states])
            value_taken = value_update(state, some, torch.ones_like(value_rate), econ, cfg, kernels, bellman=True)
    return torch.stack([taken, value_taken]).to(damping.dtype)


def change_of(series: list, n: int) -> float:
    """Mean of the last n over the mean of the n before."""
    return float(np.mean(series[-n:]) / np.mean(series[-2 * n : -n]))


def has_settled(history: dict, cfg: Config) -> bool:
    """Savings moved little ten times in a row, and Euler errors neither fall nor rise."""
    moved = history["movement"][-10:]
    return len(moved) == 10 and max(moved) < cfg.settle and 0.8 < change_of(history["euler"], 5) < 1.25


def full_steps(state: dict, cfg: Config) -> int:
    """Iterations with steps of full size: until savings have settled, or as many as there is room for."""
    if cfg.optimizer == "adam":
        return cfg.iterations
    return state["settled"] or max(cfg.iterations - cfg.averaging - cfg.final_value_steps, 0)


def last_iteration(state: dict, cfg: Config) -> int:
    return min(full_steps(state, cfg) + cfg.averaging + cfg.final_value_steps, cfg.iterations)


NEAR = {"policy_residual": 0.05, "slope_residual": 0.005}  # below which a network is near a solution


def is_near(state: dict, residual: str) -> bool:
    """Whether this residual was below NEAR in one of the last three iterations."""
    return min(state["history"][residual][-3:], default=1.0) < NEAR[residual]


def learns(state: dict, cfg: Config) -> str:
    """Which network learns: both; the policy alone once both are near a solution, as with control variates no label of
    the policy sees V (but a moment that V learns takes all the time there is); in the last outer iterations V alone,
    fitted to the policy as it is."""
    first = last_iteration(state, cfg) - cfg.final_value_steps
    if cfg.optimizer == "gauss-newton" and state["iteration"] >= first > 0:
        return "value"
    can_wait = cfg.control_variate and not cfg.learnt_moments
    return "policy" if can_wait and all(is_near(state, residual) for residual in NEAR) else "both"


def adam_updates(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng, optimizers: dict) -> Tensor:
    """value_steps of Adam, a roll-out for every twenty, then policy_steps, each on one of its own, in economies that
    follow."""

    def descend(name, loss):
        theta = optimizers[name].param_groups[0]["params"][0]
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(theta), theta)
        theta.grad = total(gradient) / RANKS
        optimizers[name].step()

    if state["iteration"] > 0:  # before, there is no simulated path
        for step in range(cfg.value_steps):
            if step % 20 == 0:  # the luck of one sample would soon be learnt by heart
                states = thin(roll_out_sample(state, econ, cfg, kernels, rng), cfg)
            descend("value", lambda theta, states=states: mean_value_loss(theta, state, states, econ, cfg))
        for step in range(cfg.policy_steps):
            if step % 20 == 19:  # the paper simulates at every step: prices follow what households save
                simulate_on(state, econ, cfg, kernels, rng)
            batch = roll_out_sample(state, econ, cfg, kernels, rng)
            seen = seen_by(0, state, batch.at, econ, cfg)
            descend("policy", lambda theta, batch=batch, seen=seen: policy_loss(theta, batch, econ, cfg, seen))
    return state["damping"].new_ones(2)


def make_optimizers(state: dict, cfg: Config) -> dict:
    """Adam on the state's own tensors, for the presets that use it, with the momentum of the authors' code."""
    if cfg.optimizer != "adam":
        return {}
    return {name: torch.optim.Adam([state[name].requires_grad_()], getattr(cfg, f"{name}_rate"), betas=(0.99, 0.99))
            for name in ("policy", "value")}


def resting_share(econ: Tables) -> float:
    """Consumption as a share of cash on hand above the limit at which the representative household keeps K_mean."""
    of_z, K = econ.shares.sum(1), econ.K_mean
    Y = output(K, 0, econ._replace(TFP=[of_z @ econ.TFP], L=[of_z @ econ.L]))
    return float((Y - econ.delta * K) / (Y + (1 - econ.delta) * K - econ.k_min))


def initial_state(econ: Tables, cfg: Config, seed: int, rng: torch.Generator) -> dict:
    """Everything that a run carries from one outer iteration to the next."""
    device = econ.TFP.device
    panel = initial_panel(cfg.n_economies, cfg.n_agents, econ, rng)
    n_states = cfg.batch * len(taught(cfg))

    def started(bias, seed, network):
        n = n_inputs(econ, network)
        theta = torch.cat([initial_parameters(n, cfg.hidden, bias, seed), initial_learnt(econ, cfg, seed)]).to(device)
        W1 = layers_of(theta, econ, cfg)[0]
        W1[:, n - econ.M_mean.shape[1] :] = 0  # moments come in as they are needed
        W1[:, : n - n_inputs(econ)] = 0  # and so does the square of ln K, which is large while K is far from its centre
        return theta

    policy = started(math.log(resting_share(econ)), seed, "policy")
    value = torch.cat([started(0.0, seed + 1 + i, "value") for i in range(cfg.value_networks)])
    dates, moments = (cfg.periods, cfg.n_economies), {}
    if econ.M_mean.numel():
        moments = {"M_mean": econ.M_mean, "M_std": econ.M_std,
                   "M": torch.zeros(*dates, *econ.M_mean.shape, device=device),
                   "M_next": torch.zeros(*dates, len(econ.TFP), *econ.M_mean.shape, device=device),
                   "k_panel": torch.zeros(*dates, cfg.n_agents if cfg.learnt_moments else 0, device=device)}
        moments["s_panel"] = moments["k_panel"].to(torch.int16)
        if cfg.learnt_moments:
            moments["last_step"] = torch.zeros_like(policy)  # of the policy, for momentum
    return {
        "iteration": 0,
        "policy": policy,
        "value": value,
        "damping": torch.full((1 + cfg.value_networks,), 1e-2, device=device),
        "rates": torch.zeros(5, device=device),  # of the policy step, the value step, the laws of Delta and K, momentum
        "k_range": range_of(panel.k),
        "caution": 1.0,
        "settled": 0,  # iteration at which savings had settled
        "watched": [],  # the last ten of watched_savings()
        "unbounded": 0,  # iterations in a row in which a planner's households saved without bound
        **panel._asdict(),
        "K_mean": econ.K_mean,
        "Delta_law": econ.Delta_law,
        "K_law": torch.tensor([0.0, 1.0], dtype=torch.float64, device=device).repeat(len(econ.TFP), 1),
        "K_path": torch.zeros(cfg.periods, cfg.n_economies, device=device),
        "K_next": torch.zeros(cfg.periods - 1, cfg.n_economies, device=device),  # E[K' | K, z]
        "z_path": torch.zeros(cfg.periods, cfg.n_economies, device=device, dtype=torch.int64),
        **moments,
        **{f"batch_{name}": torch.zeros(n_states, device=device,
                                        dtype=torch.int64 if name in ("s", "z", "at") else None)
           for name in Batch._fields},
        "history": {name: [] for name in HISTORY},
    }


def set_rates(state: dict, cfg: Config, optimizers: dict) -> None:
    """Steps of full size until savings have settled, then falling like 1 / n: from there on they average the noise
    out. Adam keeps its rates. All are smaller for a while after an iteration that was taken back. The cross-section of
    a policy that is still far from its first-order condition says nothing of the planner's Delta, which waits; the law
    of motion of K that households believe in follows by halves, and falling like the steps. Where moments are learnt
    the policy has momentum near the end of the full steps, for the last slow errors, which one step hardly moves."""
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = state["caution"] * getattr(cfg, f"{name}_rate")
    fall = 1 + cfg.decay * max(state["iteration"] - full_steps(state, cfg), 0)
    step, law = state["caution"] / fall, 1.0 if state["iteration"] == 0 or optimizers else 0.5
    momentum = 0.4 if cfg.learnt_moments and not optimizers and movement(state["watched"]) < 10 * cfg.settle else 0.0
    of_Delta = 0.2 * is_near(state, "policy_residual")
    rates = [(1 - momentum) * cfg.policy_rate * step, step, of_Delta, law * step, momentum]
    state["rates"].copy_(torch.tensor(rates))


def find_trouble(figures: dict, last_residual: float, econ: Tables) -> str | None:
    """The first quantity that says the iteration went wrong."""
    for name, figure in figures.items():
        if not math.isfinite(figure):
            return f"{name} is {figure}"
    if not 0.01 < figures["mean_K"] / econ.K_ss < 100:
        return f"mean_K is {figures['mean_K']:.3g}, far from {econ.K_ss:.3g} of the steady state"
    if figures["at_limit"] > 0.9:
        return f"at_limit is {figures['at_limit']:.2f}: the policy network is saturated, nobody saves"
    if figures["policy_residual"] > max(2 * last_residual, 0.05):
        return f"policy_residual rose from {last_residual:.3g} to {figures['policy_residual']:.3g}"
    return None


def unbounded_saving(state: dict, econ: Tables, cfg: Config) -> str:
    """Why a planner's problem has no stationary answer, or nothing. A household with u'(c) (1 - beta R) < beta Delta
    saves more and more; what bounds its wealth is R < 1 alone."""
    k, s, z = (gathered(state[name], SHARED[name]) for name in Panel._fields)
    K = k.mean(1, keepdim=True)
    networks = [layers_of(state["policy"], econ, cfg)]
    M = moments_of(networks, k, s, econ, cfg) if econ.M_mean.numel() else None
    k_next = network_capital(networks[0], k, s, K, z, econ, M)
    m, R = cash_on_hand(k, s, K, z, econ)
    richest, R = k.argmax(), float(R.mean())
    u_prime = marginal_utility((m - k_next).flatten()[richest], econ)
    beta = econ.beta[s.flatten()[richest]]
    gain = float(beta * (expected_Delta(u_prime, k, s, K, z, econ).mean() + R * u_prime) / u_prime)
    if R > 1 and gain > 1:
        return (f"--equilibrium planner: no stationary answer: at R = {R:.4f} a unit that the richest household saves "
                f"is worth {gain:.3f} of one that it consumes, Delta included, so it saves without bound; "
                "the checkpoint stays, take --equilibrium market or game, or a lower discount factor")
    return ""


def train(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator, graphs: bool,
          after_iteration: Callable[[dict], None]) -> None:
    """The outer loop, from state['iteration'] to last_iteration(). An iteration that went wrong is taken back and
    tried again with new draws and half the step; three in a row raise UserError. One wait for the device an
    iteration: its figures."""
    optimizers = make_optimizers(state, cfg)
    for name, optimizer in optimizers.items():
        if f"adam_{name}" in state:
            optimizer.load_state_dict(state[f"adam_{name}"])
    tensors = [value.detach() for value in state.values() if isinstance(value, Tensor)]
    graphs_of_phase, failures = {}, 0
    while state["iteration"] < last_iteration(state, cfg):
        start, before = time.perf_counter(), [tensor.clone() for tensor in tensors]
        optimizers_before = copy.deepcopy({name: optimizer.state_dict() for name, optimizer in optimizers.items()})
        set_rates(state, cfg, optimizers)
        if 0 < state["iteration"] < DISPERSED and not optimizers:
            disperse(state, econ, rng)
        with torch.no_grad():
            if graphs and state["iteration"] > 0 and not optimizers:
                phase = learns(state, cfg)
                if phase not in graphs_of_phase:
                    step = functools.partial(iterate, state, econ, cfg, kernels, rng, optimizers)
                    graphs_of_phase[phase] = capture(step, tensors, rng)
                figures = graphs_of_phase[phase]()
            else:
                figures = iterate(state, econ, cfg, kernels, rng, optimizers)
        *figures, watched = figures[: -len(WATCHED)].tolist() + [figures[-len(WATCHED) :].tolist()]
        figures = dict(zip(HISTORY[1:], figures))
        residuals = [] if optimizers else state["history"]["policy_residual"]  # Adam's labels are too noisy to compare
        if residuals and learns(state, cfg) == "value":  # the policy is what it was, the states are others
            figures["policy_residual"] = residuals[-1]
        trouble = find_trouble(figures, residuals[-1] if residuals else math.inf, econ)
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
        state["watched"] = [*state["watched"][-9:], watched]
        figures.update(seconds=time.perf_counter() - start, rate=float(state["rates"][0]),
                       movement=movement(state["watched"]))
        for name, column in state["history"].items():
            column.append(figures[name])
        state["iteration"] += 1
        if state["settled"] == 0 and has_settled(state["history"], cfg):
            state["settled"] = state["iteration"]
        state.update({f"adam_{name}": optimizer.state_dict() for name, optimizer in optimizers.items()})
        why = unbounded_saving(state, econ, cfg) if econ.equilibrium == "planner" else ""
        state["unbounded"] = state["unbounded"] + 1 if why else 0
        after_iteration(state)
        if state["unbounded"] >= 10 and state["iteration"] >= 25:  # before, no policy is near a solution
            raise UserError(why)


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
        # with several ranks NCCL's own thread looks at earlier sums meanwhile, and may
        with torch.cuda.graph(graph, capture_error_mode="global" if RANKS == 1 else "thread_local"):
            figures = step()
    except RuntimeError as error:  # after a failed capture the generator and the allocator are of no more use
        if is_out_of_memory(error):
            raise
        raise UserError(f"this torch cannot capture an iteration as a CUDA graph ({str(error).splitlines()[0]}); "
                        "continue with --resume --no-cuda-graphs") from error

    def replay() -> Tensor:
        graph.replay()
        return figures

    return replay


def replayed(policy: Callable) -> Callable:
    """The same function of tensors of one shape, k first, as a CUDA graph for each dtype of k."""
    graphs = {}

    def replay(*now: Tensor) -> Tensor:
        if now[0].dtype not in graphs:
            held = [x.clone() for x in now]
            step = capture(lambda: policy(*held), [], torch.Generator())  # it draws nothing
            graphs[now[0].dtype] = held, step
        held, step = graphs[now[0].dtype]
        for of_graph, x in zip(held, now):
            of_graph.copy_(x)
        return step().clone()

    return replay


# ---------------------------------------------------------------------------------------------- solutions


class Policy:
    """What the network's and the grid's solution share: a policy and a value, on tensors and on numpy arrays."""

    sees_moments = False  # beside K

    def in_panel(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """k' of whole cross-sections k, s (B, N), K, z (B, 1)."""
        return self.policy(k, s, K, z)

    def now_and_next_moments(self, k: Tensor, s: Tensor, k_next: Tensor, z: Tensor,
                             weight: Tensor | float = 1.0) -> tuple:
        """(M, E[M' | z']) of cross-sections (B, N), z (B, 1), or nothing where only K is seen of them."""
        return ()

    def of_mass(self, k: np.ndarray) -> Callable | None:
        """For a policy that sees moments: k' (s, n) at nodes k as a function of the mass (s, n), K and z."""
        return None

    def next_capital(self, k, s, K, z, M=None) -> np.ndarray:
        """k' for numbers or arrays that broadcast: k, K in goods, s and z indices, or else a ValueError; M (..., V, n)
        as moments() gives it, without which moments, if there are any, are as usual at K and z."""
        return self.on_arrays(self.policy, k, s, K, z, M)

    def value(self, k, s, K, z, M=None) -> np.ndarray:
        """Expected discounted utility in utils, arguments as in next_capital."""
        return self.on_arrays(self.utils, k, s, K, z, M)

    def utils(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor, *M: Tensor) -> Tensor:
        """V with u(c) = c^(1 - gamma) / (1 - gamma) or ln c, where values() has c in units of c_ss."""
        econ = self.econ
        if econ.gamma == 1.0:
            return self.values(k, s, K, z, *M) + econ.annuity[joint(s, z, econ)] * math.log(econ.c_ss)
        return self.values(k, s, K, z, *M) * econ.c_ss ** (1 - econ.gamma)

    @property
    def device(self):
        return self.econ.TFP.device

    def on_arrays(self, function: Callable, k, s, K, z, M=None) -> np.ndarray:
        """Call a tensor function of the state with numbers or arrays."""
        k, s, K, z = np.broadcast_arrays(k, s, K, z)
        for name, index, n in (("s", s, len(self.econ.beta)), ("z", z, len(self.econ.TFP))):
            wrong = index[~np.isin(index, np.arange(n))]
            if wrong.size:
                raise ValueError(f"{name} must be one of 0 to {n - 1}, not {wrong.flat[0]}")
        types = torch.float64, torch.int64, torch.float64, torch.int64
        tensors = [torch.tensor(x, dtype=dtype, device=self.device) for x, dtype in zip((k, s, K, z), types)]
        if M is None:
            return function(*tensors).cpu().numpy()
        if not self.sees_moments or np.shape(M)[-2:] != tuple(self.econ.M_mean.shape):
            raise ValueError(f"M is (..., V, n) as moments() gives it, here {np.shape(M)}")
        M = np.broadcast_to(M, (*k.shape, *np.shape(M)[-2:]))
        return function(*tensors, torch.tensor(M, dtype=torch.float64, device=self.device)).cpu().numpy()


class Solution(Policy):
    """A trained policy and value network, in float64: what is judged, saved and loaded. Made of the dict that
    NN_weights_biases.pth holds."""

    def __init__(self, weights: dict, device="cpu", mode="none"):
        self.weights, self.config = weights, Config(**weights["config"])
        tables = weights["economy"].items()
        self.economy = Economy(**{name: x.numpy() if isinstance(x, Tensor) else x for name, x in tables})
        self.econ, self.layers = self.on(device, torch.float64)
        self.single = self.on(device, torch.float32)
        self.K_mean, self.usual_moments = weights["K_mean"], weights["M_law"].to(device)
        self.kernels = compile_kernels(mode)

    def on(self, device, dtype) -> Tuple[Tables, dict]:
        """Tables and layers in a precision."""
        units = {name: torch.as_tensor(self.weights[name]).to(device, dtype) for name in ("K_mean", "M_mean", "M_std")}
        layers = {name: [layer.to(device, dtype) for layer in self.weights[name].values()]
                  for name in ("policy", "value")}
        return self.economy.tables(device, dtype)._replace(**units), layers

    def policy(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor, M: Tensor | None = None) -> Tensor:
        """k' for tensors that broadcast against k, float64, or float32 as long simulations have them; M (..., V, n)
        the moments where the networks see any, without which they are as usual at K and z."""
        econ, layers = self.single if k.dtype == torch.float32 else (self.econ, self.layers)
        M = self.usual(K, z) if M is None and self.sees_moments else M
        return self.kernels.network_capital(layers["policy"], k, s, K, z, econ, None if M is None else M[..., 0, :])

    def values(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor, M: Tensor | None = None) -> Tensor:
        """V in the units of utility(), float64 tensors of one shape, and M as in policy()."""
        m, _ = cash_on_hand(k, s, K, z, self.econ)
        M = self.usual(K, z) if M is None and self.sees_moments else M
        x = features(k, s, m, K, z, self.econ, None if M is None else M[..., -1, :])
        return value_of(network(self.layers["value"], for_value(x)), s, z, self.econ)[0]

    @property
    def sees_moments(self) -> bool:
        return self.econ.M_mean.numel() > 0

    def usual(self, K: Tensor, z: Tensor) -> Tensor:
        """What is expected of the moments given K and z, (...) -> (..., V, n)."""
        return by_law(self.usual_moments[z], torch.log(K)[..., None, None])

    def in_panel(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        if not self.sees_moments:
            return self.policy(k, s, K, z)
        econ, layers = self.single if k.dtype == torch.float32 else (self.econ, self.layers)
        return self.policy(k, s, K, z, moments_of([layers["policy"]], k, s, econ, self.config).unsqueeze(1))

    def moments(self, k, s) -> np.ndarray:
        """M (..., V, n) of cross-sections k, s (..., N), in the units in which next_capital() and value() take it."""
        if not self.sees_moments:
            raise ValueError("this solution sees nothing but K of the cross-section")
        k, s = np.broadcast_arrays(k, s)
        sections = [torch.tensor(x.reshape(-1, x.shape[-1]), device=self.device) for x in (k.astype(float), s)]
        M = moments_of(list(self.layers.values()), *sections, self.econ, self.config)
        return M.reshape(*k.shape[:-1], *M.shape[1:]).cpu().numpy()

    def now_and_next_moments(self, k: Tensor, s: Tensor, k_next: Tensor, z: Tensor,
                             weight: Tensor | float = 1.0) -> tuple:
        if not self.sees_moments:
            return ()
        networks = list(self.layers.values())
        return moments_of(networks, k, s, self.econ, self.config, weight), \
            next_moments(networks, k_next, s, z, self.econ, self.config, weight)

    def of_mass(self, k: np.ndarray) -> Callable | None:
        if not self.sees_moments:
            return None
        if self.device.type == "cuda":  # so little work a period that launching it takes longer
            return Solution(self.weights).of_mass(k)
        (econ, layers), S = self.single, len(self.economy.beta)
        nodes = np.append(k[:-1:5], k[-1])  # k' is interpolated in between
        of_all, of_nodes = [torch.tensor(x, dtype=torch.float32, device=self.device).expand(S, -1) for x in (k, nodes)]
        s = torch.arange(S, device=self.device).unsqueeze(1)
        q = contributions(list(layers.values()), of_all, s.expand_as(of_all), econ, self.config).flatten(0, 1)

        def rule(mass, K, z):
            mass = torch.tensor(mass / mass.sum(), dtype=torch.float32, device=self.device).flatten()
            M = standard(torch.tensordot(mass, q, 1), econ)
            K, z = torch.tensor(K, dtype=torch.float32, device=self.device), torch.tensor(z, device=self.device)
            k_next = self.policy(of_nodes, s.expand_as(of_nodes), K.expand(1, 1), z.expand(1, 1), M).cpu().numpy()
            return np.array([np.interp(k, nodes, row) for row in k_next])

        return rule

    def save(self, path) -> None:
        save_checkpoint(Path(path), self.weights)


# ---------------------------------------------------------------------------------------------- grid solution
# Maliar, Maliar & Valli (2010), by endogenous gridpoints

C_MIN, C_MAX = 1e-12, 1e4  # of c_ss: keep u'(c) finite where there is nothing, and c where saving is worth nothing


def power_grid(n: int, low: float, high: float, exponent: float) -> np.ndarray:
    return low + (high - low) * np.linspace(0, 1, n) ** exponent


def between(x: np.ndarray, nodes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The node below x, but for the last, and how far x is on the way to the next."""
    position = np.interp(x, nodes, np.arange(len(nodes)))
    i = np.minimum(position.astype(int), len(nodes) - 2)
    return i, position - i


def on_grid(k: np.ndarray, K: np.ndarray, econ: Tables) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states (k, s, K, z) at every (z, s, K, k), in this order of axes."""
    s, z = np.arange(len(econ.beta)), np.arange(len(econ.TFP))
    z, s, K, k = [torch.from_numpy(x) for x in np.meshgrid(z, s, K, k, indexing="ij")]
    return k, s, K, z


def household_nodes(k: np.ndarray, K: np.ndarray, econ: Tables) -> types.SimpleNamespace:
    """The household problem at k (n_k,), K (n_K,): R (z, n_K), income y (z, s, n_K), cash on hand m (z, s, n_K, n_k),
    and slope (n_k, n_k): values at k -> derivatives at k of the cubic spline through them."""
    m, R = [x.numpy() for x in cash_on_hand(*on_grid(k, K, econ), econ)]
    slope = scipy.interpolate.CubicSpline(k, np.eye(len(k))).derivative()(k)
    return types.SimpleNamespace(k=k, K=K, R=R[:, 0, :, 0], y=m[..., 0] - R[..., 0] * k[0], m=m, slope=slope)


def invert(k_endo: np.ndarray, nodes, k: np.ndarray) -> np.ndarray:
    """k'(k) from the k (..., n_k) at which each k' of the grid is chosen: cubic Hermite, slopes by splines,
    and k_min below the first k_endo, so that no polynomial bends across the kink of the borrowing limit."""
    found = zip(*[between(k, column) for column in k_endo.reshape(-1, len(nodes.k))])
    i, t = [np.array(x).reshape(*k_endo.shape[:-1], len(k)) for x in found]
    rise, run = nodes.k[i + 1] - nodes.k[i], np.take_along_axis(np.diff(k_endo), i, -1)
    dk_next = 1 / (k_endo @ nodes.slope.T)
    d0, d1 = run * np.take_along_axis(dk_next, i, -1), run * np.take_along_axis(dk_next, i + 1, -1)
    k_next = nodes.k[i] + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return np.where(k > k_endo[..., :1], k_next.clip(nodes.k[0]), nodes.k[0])


def forecast(alm: np.ndarray, nodes) -> Tuple[np.ndarray, np.ndarray]:
    """K' (z, n_K) by the law of motion, and (z, n_K, n_K) values at K -> values at K' of their cubic spline."""
    K_next = np.exp(by_law(alm[:, None], np.log(nodes.K)))
    return K_next, scipy.interpolate.CubicSpline(nodes.K, np.eye(len(nodes.K)))(K_next)


def expected_on_grid(values: np.ndarray, econ: Economy) -> np.ndarray:
    """beta(s) E[values | z, s]: (z, z', s', n_K, n_k) -> (z, s, n_K, n_k)."""
    Z, S = econ.income.shape
    P = (econ.beta[:, None, None] * econ.P).reshape(Z, S, Z * S)
    return (P @ values.reshape(Z, Z * S, -1)).reshape(Z, S, *values.shape[3:])


def solve_household(c: np.ndarray, laws: list, nodes, econ: Economy, config: GridConfig):
    """Sweeps of Carroll (2006) backwards from c (z, s, n_K, n_k), given the laws of motion ln K' = a(z) + b(z) ln K and
    Delta' = a(z') + b(z') ln K', coefficients (Z, 2) each: the new c, the k_endo at which each k' of the grid is
    optimal, the last change of c, and the share of nodes at which saving is worth nothing, so that c was bounded."""
    K_next, spline = forecast(laws[0], nodes)
    R_next, _ = prices(K_next[:, None], np.arange(len(K_next))[:, None], econ)  # (z, z', n_K)
    planned = by_law(laws[1][:, None], np.log(K_next)[:, None])  # (z, z', n_K)
    m_K = 0.0
    if econ.equilibrium == "game":  # (z, z', s', n_K, n_k)
        m_K = np.array([cash_of_K(*on_grid(nodes.k, K, econ), econ.tables()).numpy() for K in K_next])
    least = marginal_utility(np.float64(C_MAX * econ.c_ss), econ)
    for _ in range(config.sweeps):
        c_next = np.maximum(spline[:, None, None] @ c, C_MIN * econ.c_ss)  # (z, z', s', n_K, n_k)
        u_prime = marginal_utility(c_next, econ)
        worth = R_next[:, :, None, :, None] * u_prime
        if econ.equilibrium != "market":
            worth += Delta(u_prime, m_K, planned[:, :, None, :, None], econ)
        worth = expected_on_grid(worth, econ)
        c_endo = inverse_marginal_utility(np.maximum(worth, least), econ)
        k_endo = (c_endo + nodes.k - nodes.y[..., None]) / nodes.R[:, None, :, None]
        c_last, c = c, nodes.m - invert(k_endo, nodes, nodes.k)
        change = np.max(np.abs(c - c_last) / np.maximum(c, C_MIN * econ.c_ss))
        if change < config.tolerance:
            break
    return c, k_endo, change, (worth < least).mean()


def lottery(k_next: np.ndarray, k: np.ndarray) -> scipy.sparse.csc_array:
    """The matrix (S n, S m n) that moves mass (S, m, n) to the two of the nodes k (n,) around k' (S, m, n), so that its
    mean is k'."""
    (S, _, n), (low, share) = k_next.shape, between(k_next, k)
    rows = np.stack([low, low + 1], -1) + n * np.arange(S)[:, None, None, None]
    return scipy.sparse.csc_array((np.stack([1 - share, share], -1).ravel(), rows.ravel(),
                                   2 * np.arange(low.size + 1)), (S * n, low.size))


def simulate_histogram(table: np.ndarray, k: np.ndarray, K: np.ndarray, mass: np.ndarray, z_path: np.ndarray,
                       econ: Economy, keep: Callable | None = None):
    """Non-stochastic simulation of Young (2010), the limit of infinitely many households: mass (s, n) at k moves to the
    two neighbours of k', which keeps the mean. table (z, s, n_K, n) of k', linear in K (n_K,), or a function of (mass,
    K, z). Between two nodes of K each moves its share of the mass, which is the same but for households whose k' passes
    a node of k there. Returns K (periods,) and the last mass; keep(t, mass, k') sees every period."""
    K_path, k_of_all = np.empty(len(z_path)), np.tile(k, len(mass))

    @functools.cache
    def between_nodes(z, j):
        return lottery(table[z][:, j : j + 2], k)

    for t, z in enumerate(z_path):
        K_path[t] = mass.ravel() @ k_of_all
        if callable(table):
            k_next, weight = table(mass, K_path[t], z)[:, None], np.ones(1)  # (s, 1, n)
        else:
            position = (K_path[t] - K[0]) / (K[1] - K[0])
            j = min(max(int(position), 0), len(K) - 2)
            k_next, weight = table[z][:, j : j + 2], np.array([j + 1 - position, position - j])
        if weight.min() < 0:  # beyond the nodes of K
            k_next, weight = (weight @ k_next)[:, None], np.ones(1)
        if keep:
            keep(t, mass, weight @ k_next)
        move = between_nodes(z, j) if len(weight) == 2 else lottery(k_next, k)
        moved = move @ (mass[:, None] * weight[:, None]).ravel()
        mass = econ.Pi[z, z_path[min(t + 1, len(z_path) - 1)]].T @ moved.reshape(mass.shape)
    return K_path, mass


def dispersed_mass(k: np.ndarray, K: float, z: int, econ: Economy) -> np.ndarray:
    """(s, n) on the nodes k: the gamma distribution of initial_panel() with mean about K, s at its share given z."""
    above = np.append(scipy.stats.gamma.cdf((k[1:] + k[:-1]) / 2 - k[0], 4, scale=(K - k[0]) / 4), 1)
    return np.diff(above, prepend=0) * (econ.shares[z] / econ.shares[z].sum())[:, None]


def draw_z_path(periods: int, econ: Economy, rng: np.random.Generator) -> np.ndarray:
    """Aggregate states z (periods,), from the middle one."""
    z_path, cumulative = [len(econ.TFP) // 2], econ.P_z.cumsum(1)[:, :-1]
    for u in rng.random(periods - 1):
        z_path.append(int(draw(u, cumulative[z_path[-1]])))
    return np.array(z_path)


def evaluate_grid(k_next: np.ndarray, nodes, k: np.ndarray, alm: np.ndarray, tables: Tables, econ: Economy,
                  sweeps: int) -> Tuple[np.ndarray, float]:
    """V = u(c) + Delta k + beta E V' (z, s, n_K, n) of a policy k' at nodes k, K, by sweeps, and what the last one
    still changed. What they leave over is soon the same number everywhere, and MacQueen's bound takes it out."""
    at = on_grid(k, nodes.K, econ)
    c = (cash_on_hand(*at, tables)[0] - torch.from_numpy(k_next)).clamp(min=C_MIN * econ.c_ss)
    u = (utility(c, tables) + expected_Delta(marginal_utility(c, tables), *at, tables) * at[0]).numpy()
    at_k_next, (_, spline) = lottery(k_next.reshape(-1, 1, len(k)), k).T, forecast(alm, nodes)
    D = econ.annuity[..., None, None]
    V = u * D
    for _ in range(sweeps):
        EV = expected_on_grid(spline[:, None, None] @ V, econ)
        change = u + (at_k_next @ EV.ravel()).reshape(EV.shape) - V
        V += change + change.mean() * (D - 1)
        if np.ptp(change) < 1e-7:
            break
    return V, float(np.ptp(change))


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSolution(Policy):
    """Policy table on power-spaced k and uniform K; law of motion ln K' = a(z) + b(z) ln K behind it."""

    econ: Tables
    table: Tensor  # (z, s, n_K_fine, n_k_fine) k', float64
    value_table: Tensor  # (z, s, n_K_fine, n_k_fine) V of this policy in the units of utility()
    k_max: float
    exponent: float
    K_low: float
    K_high: float
    K_mean: float  # over the path behind the law of motion
    alm_coefficients: np.ndarray  # (z, 2) intercept and slope
    alm_r2: np.ndarray  # (z,)
    Delta_r2: np.ndarray  # (z,) of the planner's econ.Delta_law
    notes: tuple  # what a user should know of it

    @functools.cached_property
    def nodes(self) -> Tensor:
        """k (n_k_fine,) of the tables."""
        nodes = power_grid(self.table.shape[3], self.econ.k_min, self.k_max, self.exponent)
        return torch.from_numpy(nodes).to(self.device)

    def interpolate(self, table: Tensor, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """A table at states of one shape: bilinear in (k, K), linear beyond the ends; the spacing saves a search."""
        n_K, n_k = table.shape[2:]
        low, width = self.econ.k_min, self.k_max - self.econ.k_min
        i = (((k - low).clamp(min=0.0) / width) ** (1 / self.exponent) * (n_k - 1)).long().clamp(max=n_k - 2)
        left, right = self.nodes[i], self.nodes[i + 1]
        position = (K - self.K_low) / (self.K_high - self.K_low) * (n_K - 1)
        j = position.floor().clamp(0, n_K - 2)
        along_k, along_K, flat = (k - left) / (right - left), position - j, table.reshape(-1)
        corner = (joint(s, z, self.econ) * n_K + j.long()) * n_k + i
        low, low1, high, high1 = [flat[corner + step] for step in (0, 1, n_k, n_k + 1)]
        below = low + along_k * (low1 - low)
        return below + along_K * (high + along_k * (high1 - high) - below)

    def policy(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """k' for float64 tensors that broadcast, on the table's device."""
        return self.interpolate(self.table, k, s, K, z).clamp(min=self.econ.k_min)

    def values(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """V in the units of utility(), arguments as in policy."""
        return self.interpolate(self.value_table, k, s, K, z)

    def to(self, device) -> GridSolution:
        return dataclasses.replace(self, econ=tables_on(self.econ, device), table=self.table.to(device),
                                   value_table=self.value_table.to(device))


def solve_grid(economy=None, config: GridConfig = GridConfig(), progress: bool = False) -> GridSolution:
    """Krusell & Smith's (1998) fixed point: households believe a law of motion of K, which their savings confirm.
    economy: an Economy, a Calibration, or None for the default. The nodes follow the cross-section: K around its mean,
    k as far as capital is held. Raises UserError where there is no convergence."""
    econ = as_economy(economy)
    with tqdm(desc="grid solution", disable=None if progress else True) as bar:
        return law_of_motion_fixed_point(econ, config, econ.K_start, config.k_max * econ.K_start, bar)


MEMORY = np.array([30.0, 100.0, 300.0, 1000.0])  # periods over which z is averaged, see luck_of()


def luck_of(residual: np.ndarray, z_path: np.ndarray, econ: Economy) -> np.ndarray:
    """What the intercepts (Z,) of a law of motion, with these residuals (periods,), owe to the past of z on this path:
    the distribution of capital remembers it for a thousand periods. In each z the residuals are regressed on averages
    of z in the past, whose means on this path differ from those that the chain implies: a control variate."""
    share, Z = econ.shares.sum(1), len(econ.TFP)
    back = (share[:, None] * econ.P_z).T / share[:, None]  # P(z before | z)
    centred, past = np.arange(Z) - share @ np.arange(Z), np.zeros((len(z_path), len(MEMORY)))
    for t in range(1, len(z_path)):
        past[t] = past[t - 1] + (centred[z_path[t - 1]] - past[t - 1]) / MEMORY
    implied = np.stack([back @ np.linalg.solve(np.eye(Z) - (1 - 1 / n) * back, centred) / n for n in MEMORY], 1)
    luck = np.zeros(Z)
    for z in np.flatnonzero(np.bincount(z_path, minlength=Z) > 100):
        found, e = past[z_path == z], residual[z_path == z]
        weights, *_ = np.linalg.lstsq(found - found.mean(0), e - e.mean(), rcond=None)
        luck[z] = weights @ (found.mean(0) - implied[z])
    return luck


def simulated_laws(table: np.ndarray, k: np.ndarray, K: np.ndarray, mass: np.ndarray, z_path: np.ndarray, laws: list,
                   econ: Economy, config: GridConfig):
    """The policy table through the histogram: K (periods,), the last mass, and the laws [of ln K', of the planner's
    Delta] that come out, each (coefficients (Z, 2), R2); where z never comes coefficients stay as in laws."""
    tables, s, Deltas = econ.tables(), torch.arange(len(econ.beta))[:, None], np.zeros(len(z_path))

    def keep(t, mass, k_next):
        gain = gain_from_K(torch.from_numpy(k), s, torch.from_numpy(k_next), torch.tensor(mass.sum(0) @ k),
                           torch.tensor(z_path[t]), tables)
        Deltas[t] = (mass * gain.numpy()).sum()

    K_path, mass = simulate_histogram(table, k, K, mass, z_path, econ, keep if econ.equilibrium == "planner" else None)
    kept = [torch.from_numpy(x[config.burn_in :, None]) for x in (K_path, Deltas, z_path)]
    of_K = law_of_motion(kept[0], kept[2], torch.from_numpy(laws[0][:, 1]))
    of_Delta = regress_by_z(kept[1], torch.log(kept[0]), kept[2], torch.zeros(len(laws[1]), dtype=torch.float64))
    new = [(np.where(found.isnan(), law, found.numpy()), r2.numpy())
           for (found, r2), law in zip((of_K, of_Delta), laws)]
    return K_path, mass, new


def law_of_motion_fixed_point(econ: Economy, config: GridConfig, centre: float, k_max: float, bar, tries: int = 60):
    """The fixed point on nodes of K around centre and of k up to k_max or, where the cross-section leaves them, on the
    next nodes to try. Few sweeps an update, so that the policy and the laws of motion converge together."""
    require(tries, "grid: K and k leave every range of nodes that was tried; judge with --grid none")
    nodes = household_nodes(power_grid(config.n_k, econ.k_min, k_max, config.exponent),
                            centre * np.linspace(config.K_low, config.K_high, config.n_K), econ.tables())
    k = power_grid(config.n_k_fine, econ.k_min, k_max, config.exponent)
    K = np.linspace(nodes.K[0], nodes.K[-1], config.n_K_fine)
    z_path, burn_in = draw_z_path(config.periods, econ, np.random.default_rng(config.seed)), config.burn_in
    comes = [burn_in + np.flatnonzero(z_path[burn_in:] == z)[:20][-1] for z in np.unique(z_path[burn_in:])]
    short, Z = max(config.periods // 20, 2 * burn_in, max(comes) + 2), len(econ.TFP)  # every z comes 20 times
    laws = [np.array([[0.035 * np.log(centre), 0.965]] * Z), econ.tables().Delta_law.numpy()]  # of ln K' and of Delta
    wage, above = prices(nodes.K, np.arange(Z)[:, None], econ)[1], nodes.m - econ.k_min
    permanent = 0.9 * (econ.L[:, None] * wage)[:, None, :, None]
    c = np.minimum(above, (1 - econ.mean_beta) * above + permanent).clip(C_MIN * econ.c_ss)
    mass = dispersed_mass(k, centre, z_path[0], econ)
    x = np.stack([np.ones(2), np.log(centre * np.array([0.9, 1.1]))])  # where two laws are compared
    gap, damping, long, steps = np.inf, config.damping, None, np.zeros((2, Z, 2))
    correction = np.zeros((2, Z, 2))  # of both laws, from those of the short path to those of the long one
    for update in range(config.max_updates):
        c, k_endo, change, bounded = solve_household(c, laws, nodes, econ, config)
        table = invert(scipy.interpolate.CubicSpline(nodes.K, k_endo, axis=2)(K), nodes, k)
        K_path, mass, new = simulated_laws(table, k, K, mass, z_path[:short], laws, econ, config)
        kept = K_path[burn_in:]
        near = update >= 4 or econ.equilibrium == "planner"  # at first, a market's policies are far from any solution
        low, high = (0.8, 1.28) if near else (0.4, 2.5)
        if not low < kept.mean() / centre < high or not (K_path > max(econ.k_min, 0)).all():
            centre *= np.clip(kept.mean() / centre, 1 / 1.3, 1.3)
            return law_of_motion_fixed_point(econ, config, centre, k_max, bar, tries - 1)
        if update >= 4 and (mass * np.where(k > 0.6 * k_max, k, 0)).sum() > 1e-4 * kept[-1]:
            return law_of_motion_fixed_point(econ, config, centre, 2 * k_max, bar, tries - 1)
        last, steps = steps, [found + to_long - law for (found, _), to_long, law in zip(new, correction, laws)]
        gap_last, gap = gap, max(np.abs(steps[0] @ x).max(), np.abs(steps[1] @ x).max() * econ.c_ss)
        if long is None and gap < max(3e-5, 2 * config.tolerance):  # from here on the short path's error is the same
            long_path, mass, long = simulated_laws(table, k, K, mass, z_path, laws, econ, config)
            for _ in range(2):  # from the end of a short path, as always
                _, mass, new = simulated_laws(table, k, K, mass, z_path[:short], laws, econ, config)
            ln_K, at = np.log(long_path), z_path[:-1]
            residual = ln_K[1:] - by_law(long[0][0][at], ln_K[:-1])
            long[0][0][:, 0] -= luck_of(residual[burn_in:], at[burn_in:], econ)
            correction = np.array([of_long - of_short for (of_long, _), (of_short, _) in zip(long, new)])
            gap = gap_last = math.inf
        bar.update()
        bar.set_postfix_str(f"change of c {change:.0e}, of the laws of motion {gap:.0e}")
        if max(gap, change) < config.tolerance:
            tables = econ.tables()._replace(Delta_law=torch.from_numpy(laws[1]))
            V, left = evaluate_grid(invert(k_endo, nodes, k), nodes, k, laws[0], tables, econ, config.value_sweeps)
            notes = [f"grid: the largest k is {k_max:.4g}"] if k_max > config.k_max * econ.K_start else []
            if left >= 1e-7:
                notes.append(f"grid: values still changed by {left:.0e} after {config.value_sweeps} sweeps")
            if bounded:
                notes.append(f"grid: at {100 * bounded:.2g}% of the nodes saving is worth nothing; c is bounded there")
            values = scipy.interpolate.CubicSpline(nodes.K, V, axis=2)(K)
            return GridSolution(econ=tables, table=torch.from_numpy(table), value_table=torch.from_numpy(values),
                                k_max=k_max, exponent=config.exponent, K_low=K[0], K_high=K[-1],
                                K_mean=long_path[burn_in:].mean(), alm_coefficients=laws[0], alm_r2=long[0][1],
                                Delta_r2=long[1][1], notes=tuple(notes))
        if gap > gap_last and any(np.vdot(new @ x, old @ x) < 0 for new, old in zip(steps, last)):
            damping /= 2  # the law of motion overshoots: more K expected means less saved
        laws = [law + damping * step for law, step in zip(laws, steps)]
    raise UserError(f"grid: no convergence in {config.max_updates} updates of the law of motion "
                    f"(c moves {change:.0e}, K forecast {gap:.0e}); lower --grid-damping or judge with --grid none")


# ---------------------------------------------------------------------------------------------- judging


class States(NamedTuple):
    """States visited on the ergodic set, each (n,), with the K' that followed."""

    k: Tensor
    s: Tensor
    K: Tensor
    z: Tensor
    K_next: Tensor
    Delta: Tensor | None = None  # the planner's, read off the cross-section
    Delta_next: Tensor | None = None  # (n, Z) next period's for each z', everybody's s' in expectation
    M: Tensor | None = None  # (n, V, n_m) moments, and
    M_next: Tensor | None = None  # (n, Z, V, n_m) next period's for each z', everybody's s' in expectation

    def now(self) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.s, self.K, self.z

    def at(self, index) -> States:
        return States(*[x if x is None else x[index] for x in self])

    def moments(self, z_next: Tensor | None = None) -> tuple:
        """What policies and values take beside (k, s, K, z): the moments now, or at z' (J, n); nothing if none."""
        if self.M is None:
            return ()
        return (self.M,) if z_next is None else (self.M_next[torch.arange(len(self.k), device=z_next.device), z_next],)

    @staticmethod
    def expected(batch: Batch, econ: Tables) -> States:
        """Those of a batch, K' and the planner's Delta' as their laws of motion expect them."""
        ahead = by_law(econ.Delta_law, torch.log(batch.K_next).unsqueeze(1))
        return States(batch.k, batch.s, batch.K, batch.z, batch.K_next, None, ahead)


def planner_Delta(solution, k: Tensor, s: Tensor, k_next: Tensor, K: Tensor, K_next: Tensor, z: Tensor,
                  weight: Tensor | float, econ: Tables) -> Tuple[Tensor, Tensor]:
    """The mean gain from K over cross-sections k, s, k' (B, N) with K, K', z (B, 1), each household with its weight:
    now (B,), and next period for each z' (B, Z)."""
    weight = weight * torch.ones_like(k)
    now = (weight * gain_from_K(k, s, k_next, K, z, econ)).sum(1) / weight.sum(1)
    nexts = successors(k_next, s, K_next, z, econ)
    gain = gain_from_K(nexts[0], nexts[1], solution.policy(*nexts), nexts[2], nexts[3], econ)  # moments as usual
    p = weight * econ.probability[joint(s, z, econ)].movedim(-1, 0)
    to = [p * (nexts[3] == z_next) for z_next in range(len(econ.TFP))]
    return now, torch.stack([((x * gain).sum((0, 2)) / x.sum((0, 2))).nan_to_num() for x in to], 1)


def settled_panel(k: np.ndarray, masses: list, B: int, N: int, econ: Tables, rng: torch.Generator) -> Panel:
    """(z, s) as in initial_panel(), and k (policies, B, N) given s as the mean histogram (s, n) of each policy at nodes
    k (n,) has it, on the same draws."""
    panel = initial_panel(B, N, econ, rng)
    s, u = panel.s.cpu().numpy(), uniform(panel.s.shape, rng, "cpu").numpy()
    k_of = np.empty((len(masses), B, N), np.float32)
    for i, mass in enumerate(masses):
        for j, held in enumerate(mass.cumsum(1)):
            k_of[i][s == j] = np.interp(u[s == j] * held[-1], held, k)
    return panel._replace(k=torch.from_numpy(k_of).to(econ.TFP.device))


def ergodic_states(solutions: dict, econ: Tables, cfg: Config, B: int, N: int, seed: int,
                   start: Callable = initial_panel, graphs: bool = False):
    """Simulate solutions on the same shocks from start(B, N, econ, rng), on CUDA as graphs if asked: name ->
    (cross-sections of the pooled periods, a dict of tensors (D, B, ...), K_path (periods, B)), and z_path (periods,
    B)."""
    rng = torch.Generator().manual_seed(seed)  # on the CPU: the same shocks on every device
    panel = start(B, N, econ, rng)
    pooled, K_path, z_path = {name: [] for name in solutions}, {name: [] for name in solutions}, []
    policies = [replayed(solution.in_panel) if graphs else solution.in_panel for solution in solutions.values()]
    periods = simulate(policies, panel, cfg.eval_periods, econ, rng)
    periods = tqdm(periods, f"simulation, N = {N}", cfg.eval_periods, leave=False, disable=None)
    for t, (s, z, paths) in enumerate(periods):
        if t < cfg.eval_drop:
            continue
        z_path.append(z[:, 0])
        for name, (k, K, k_next) in zip(solutions, paths):
            K_path[name].append(K[:, 0].double())
            if (t - cfg.eval_drop) % cfg.eval_every == 0:
                pooled[name].append(cross_section(solutions[name], k.double(), s, K.double(), z, k_next.double(), econ))
    stacked = {name: {part: torch.stack([x[part] for x in of]) for part in of[0]} for name, of in pooled.items()}
    return {name: (stacked[name], torch.stack(K_path[name])) for name in solutions}, torch.stack(z_path)


def cross_section(solution, k: Tensor, s: Tensor, K: Tensor, z: Tensor, k_next: Tensor, econ: Tables,
                  weight: Tensor | float = 1.0) -> dict:
    """The fields of States: k, s (B, N), and what all households of an economy share, (B, ...). weight (B, N) of
    households, whose mean is one."""
    now = {"k": k, "s": s, "K": K[:, 0], "z": z[:, 0], "K_next": (weight * k_next).mean(1)}
    now |= zip(("M", "M_next"), solution.now_and_next_moments(k, s, k_next, z, weight))
    if econ.equilibrium == "planner":
        of_all = planner_Delta(solution, k, s, k_next, K, now["K_next"].unsqueeze(1), z, weight, econ)
        now |= zip(("Delta", "Delta_next"), of_all)
    return now


def states_of(pooled: dict, some: Tensor) -> States:
    """The households some of all in pooled cross-sections."""
    N = pooled["k"].shape[-1]
    of_household = {name: pooled[name].flatten()[some] for name in ("k", "s")}
    return States(**of_household, **{name: x.flatten(0, 1)[some // N] for name, x in pooled.items()
                                     if name not in of_household})


def bellman_errors(solution, states: States, econ: Tables) -> Tuple[Tensor, Tensor]:
    """u(c) + Delta k + beta E V(s') - V(s), Delta given, at the policy's own c and at the best one (golden-section
    search), in the units of utility(): the Bellman error of Han, Yang & E (2021) is the second."""
    m, _ = cash_on_hand(*states.now(), econ)
    above, beta = m - econ.k_min, econ.beta[states.s]
    k_next = solution.policy(*states.now(), *states.moments())
    gain = Delta(marginal_utility(m - k_next, econ), cash_of_K(*states.now(), econ), states.Delta, econ)
    V = solution.values(*states.now(), *states.moments()) - gain * states.k

    def objective(share):
        nexts = successors(econ.k_min + (1 - share) * above, states.s, states.K_next, states.z, econ)
        V = solution.values(*nexts, *states.moments(nexts[3]))
        return utility(share * above, econ) + beta * expected(V, states.s, states.z, econ)

    own_share = 1 - (k_next - econ.k_min) / above
    own, best = objective(own_share), best_of(objective, own_share * 0.5, (own_share * 1.5).clamp(max=1.0))
    return own - V, torch.maximum(own, best) - V


def best_of(objective: Callable, low: Tensor, high: Tensor) -> Tensor:
    """The largest value of a function with one peak between low and high: golden-section search down to a tenth of the
    way, then the parabola through the best point and its neighbours."""
    golden = (math.sqrt(5) - 1) / 2
    x = torch.stack([low, high - golden * (high - low), low + golden * (high - low), high])
    y = torch.stack([objective(point) for point in x])
    for _ in range(5):
        below = y[1] > y[2]
        new = torch.where(below, x[2] - golden * (x[2] - x[0]), x[1] + golden * (x[3] - x[1]))
        x, y = [torch.where(below, torch.stack([p[0], p_new, p[1], p[2]]), torch.stack([p[1], p[2], p_new, p[3]]))
                for p, p_new in ((x, new), (y, objective(new)))]
    (x0, x1, x2), (y0, y1, y2) = [torch.where(y[1] > y[2], points[:3], points[1:]) for points in (x, y)]
    rise, fall = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    peak = (x0 + x1) / 2 + rise * (x2 - x0) / (2 * (rise - fall))
    return torch.maximum(y.amax(0), objective(peak.nan_to_num().clamp(x0, x2)))


def euler_residuals(policy: Callable, states: States, econ: Tables) -> Tuple[Tensor, Tensor]:
    """1 - c~ / c with u'(c~) = beta E[R' u'(c') + Delta'], c~ at most what there is above the limit; and where the
    limit does not hold c = c~ there."""
    m, _ = cash_on_hand(*states.now(), econ)
    k_next = policy(*states.now(), *states.moments())
    nexts = successors(k_next, states.s, states.K_next, states.z, econ)
    m_next, R_next = cash_on_hand(*nexts, econ)
    u_prime = marginal_utility(m_next - policy(*nexts, *states.moments(nexts[3])), econ)
    common = None if states.Delta_next is None else states.Delta_next.gather(1, nexts[3].T).T
    gain = Delta(u_prime, cash_of_K(*nexts, econ), common, econ)
    worth = econ.beta[states.s] * expected(R_next * u_prime + gain, states.s, states.z, econ)
    implied = torch.minimum(inverse_marginal_utility(worth.clamp(min=1e-30), econ), m - econ.k_min)
    return 1 - implied / (m - k_next), (k_next > econ.k_min) | (implied < m - econ.k_min)


def euler_errors(solution, states: States, econ: Tables) -> Tensor:
    """euler_residuals() of a solution without the states where the limit holds."""
    error, free = euler_residuals(solution.policy, states, econ)
    return error[free]


def euler_sizes(solution, states: States, econ: Tables) -> dict:
    """log10 of the absolute Euler errors, 10^-16 at least."""
    error = np.maximum(euler_errors(solution, states, econ).abs().cpu().numpy(), 1e-16)
    error = error if len(error) else np.array([1e-16])
    return {name: np.log10(of(error)) for name, of in
            (("mean", np.mean), ("p99", lambda x: np.percentile(x, 99)), ("max", np.max))}


def inequality(x: np.ndarray, weight: np.ndarray | float = 1.0) -> dict:
    """Moments, quantiles, Gini, top shares and Lorenz curve (share held by the poorest 0, 5, ..., 100%) of x (n,), each
    with its weight."""
    order = np.argsort(x, kind="stable")
    x, weight = x[order], np.broadcast_to(weight, x.shape)[order] / np.broadcast_to(weight, x.shape).sum()
    mean = weight @ x
    people = np.concatenate([[0.0], weight.cumsum()])
    held = np.concatenate([[0.0], (weight * x).cumsum() / mean])
    middle = people[:-1] + weight / 2
    return {
        "mean": mean, "std": np.sqrt(weight @ (x - mean) ** 2),
        "quantiles": {str(q): np.interp(q / 100, middle, x) for q in (1, 5, 25, 50, 75, 95, 99)},
        "gini": 1 - 2 * np.trapezoid(held, people),
        "top_percent_hold": {str(q): 100 * (1 - np.interp(1 - q / 100, people, held)) for q in (1, 5, 10, 20)},
        "lorenz": list(np.interp(np.linspace(0, 1, 21), people, held)),
    }


def law_of_motion_figures(K_path: np.ndarray, z_path: np.ndarray, Z: int) -> dict:
    """ln K' = a(z) + b(z) ln K by regression, and Den Haan's (2010) dynamic error: the largest distance in percent
    between K and the path that the law of motion draws by itself from the same z."""
    alm, r2 = [x.numpy() for x in law_of_motion(*map(torch.from_numpy, (K_path, z_path, np.full(Z, np.nan))))]
    ln_K = np.log(K_path)
    forecast = ln_K.copy()
    for t in range(len(ln_K) - 1):
        forecast[t + 1] = by_law(alm[z_path[t]], forecast[t])
    error = 100 * np.abs(forecast - ln_K)
    return {"coefficients": alm, "r2": r2, "den_haan_max_percent": error.max(), "den_haan_mean_percent": error.mean()}


def meaning(pooled: dict, econ: Tables, cfg: Config) -> dict:
    """Correlation, over pooled cross-sections (D, B, ...), of each learnt moment with K and with the share of
    households in the state of lowest income, by network."""
    of = torch.stack([pooled["K"].flatten(), econ.lowest[pooled["s"]].mean(-1).flatten()])
    found = {}
    for view, name in enumerate(("policy", "value")):
        learnt = pooled["M"][:, :, view, -cfg.learnt_moments :].flatten(0, 1).T
        r = torch.corrcoef(torch.cat([of, learnt]))[:2, 2:]
        found[name] = {"K": r[0], "unemployment": r[1]}
    return found


def errors_at(solution, states: States, econ: Tables) -> Tuple[dict, dict]:
    """Bellman errors (utils, and as a share of consumption) and Euler errors at given states, and the arrays."""
    n, part = len(states.k), len(states.k) if states.k.is_cuda else 4096  # which a CPU holds in its cache
    parts = [bellman_errors(solution, states.at(slice(i, i + part)), econ) for i in range(0, n, part)]
    own, best = [torch.cat(x) for x in zip(*parts)]
    m, _ = cash_on_hand(states.k, states.s, states.K, states.z, econ)
    c = m - solution.policy(*states.now(), *states.moments())
    in_consumption = (own / (marginal_utility(c, econ) * c)).cpu().numpy()
    utils = econ.c_ss ** (1 - econ.gamma)
    own, best = [utils * x.cpu().numpy() for x in (own, best)]

    def sizes(error):
        return {"mean": np.abs(error).mean(), "rmse": np.sqrt(np.mean(error**2)), "max": np.abs(error).max()}

    figures = {"states": len(own), "bellman_own_c": sizes(own), "bellman_best_c": sizes(best),
               "bellman_in_consumption": sizes(in_consumption), "euler_log10": euler_sizes(solution, states, econ)}
    return figures, {"sample_k": states.k.cpu().numpy(), "bellman": own}


def judge_panel(solutions: dict, econ: Tables, cfg: Config, B: int, N: int, seed: int, start: Callable = initial_panel,
                graphs: bool = False) -> Tuple[dict, dict]:
    """All figures of solutions at one N on the same shocks, and the arrays behind them: name -> dict."""
    simulated, z_path = ergodic_states(solutions, econ, cfg, B, N, seed, start, graphs)
    figures, arrays, z_path = {}, {}, z_path.cpu().numpy()
    for name, (pooled, K_path) in simulated.items():
        some = torch.randperm(pooled["k"].numel(), generator=torch.Generator().manual_seed(seed))[: cfg.eval_states]
        figures[name], arrays[name] = errors_at(solutions[name], states_of(pooled, some.to(econ.TFP.device)), econ)
        k, K_path = np.sort(pooled["k"].flatten().cpu().numpy()), K_path.cpu().numpy()
        figures[name] |= {"n_agents": N, "n_economies": B, "periods": cfg.eval_periods - cfg.eval_drop,
                          "capital": inequality(k),
                          "law_of_motion": law_of_motion_figures(K_path, z_path, len(econ.TFP))}
        arrays[name] |= {"k": k, "weight": np.ones(len(k)), "K_path": K_path, "z_path": z_path}
        if "M" in pooled and cfg.learnt_moments:
            figures[name]["moments"] = meaning(pooled, econ, cfg)
    return figures, arrays


def judge_limit(solutions: dict, economy: Economy, econ: Tables, cfg: Config, k: np.ndarray,
                seed: int) -> Tuple[dict, dict]:
    """The same in the limit N = infinity, where sampling noise hides nothing: both policies, tabulated at nodes k and
    around their mean K unless they see moments, through the same histogram on the same path of z, once for its start
    and once to be judged."""
    z_path, figures, arrays = draw_z_path(cfg.eval_periods, economy, np.random.default_rng(seed)), {}, {}
    for name, solution in solutions.items():
        K = solution.K_mean * np.linspace(GridConfig.K_low, GridConfig.K_high, GridConfig.n_K_fine)
        table, pooled = solution.of_mass(k), []
        if table is None:
            at = [x.to(econ.TFP.device) for x in on_grid(k, K, econ)]
            table = np.array([[solution.policy(*[x[z, s] for x in at]).cpu().numpy() for s in range(at[0].shape[1])]
                              for z in range(at[0].shape[0])])

        def keep(t, mass, k_next, pooled=pooled):
            if t >= cfg.eval_drop and (t - cfg.eval_drop) % cfg.eval_every == 0 and t + 1 < len(z_path):
                pooled.append((t, mass, k_next))

        mass = dispersed_mass(k, solution.K_mean, z_path[0], economy)
        _, mass = simulate_histogram(table, k, K, mass, z_path, economy)
        K_path, mass = simulate_histogram(table, k, K, mass, z_path, economy, keep)
        states = histogram_states(pooled, k, K_path, z_path, econ, cfg.eval_states, solution)
        figures[name], arrays[name] = errors_at(solution, states, econ)
        c, weight = consumption_distribution(pooled, k, K_path, z_path, econ)
        mean_mass = np.mean([mass for _, mass, _ in pooled], 0)
        kept, z_kept = K_path[cfg.eval_drop :, None], z_path[cfg.eval_drop :, None]
        R, _ = prices(kept, z_kept, economy)
        figures[name] |= {"n_agents": None, "periods": len(kept), "capital": inequality(k, mean_mass.sum(0)),
                          "consumption": inequality(c, weight), "interest_rate_percent": 100 * (R.mean() - 1),
                          "welfare": ergodic_welfare(c, weight, econ),
                          "law_of_motion": law_of_motion_figures(kept, z_kept, len(econ.TFP))}
        figures[name]["risky_steady_state"] = risky_steady_state(
            solution, table, k, K, mass, economy, econ, cfg, figures[name]["law_of_motion"]["coefficients"])
        if states.Delta is not None:
            figures[name]["Delta"] = float(states.Delta.mean())
        arrays[name] |= {"k": k, "weight": mean_mass.sum(0), "mass": mean_mass, "K_path": kept, "z_path": z_kept}
    return figures, arrays


def risky_steady_state(solution, table, k: np.ndarray, K: np.ndarray, mass: np.ndarray, economy: Economy, econ: Tables,
                       cfg: Config, alm: np.ndarray) -> dict:
    """K*(z), at which the economy rests while z stays what it is and households still fear the other states: the full
    distribution followed for as many periods as are judged, how much K still moved in the last tenth of them, what the
    law of motion says, exp(a / (1 - b)), and the mean Euler error of the solution there, K' being what follows."""
    periods, last, found = cfg.eval_periods - cfg.eval_drop, [], {"K": [], "still_moves": [], "euler_log10": []}

    def keep(*now):  # period, mass and k'
        last[:] = [now]

    for z in range(len(economy.TFP)):
        z_path = np.full(periods, z)
        path, _ = simulate_histogram(table, k, K, mass, z_path, economy, keep)
        states = histogram_states(last, k, path, z_path, econ, cfg.eval_states // 10, solution)
        found["K"].append(path[-1])
        found["still_moves"].append(np.ptp(path[-max(periods // 10, 2) :]))
        found["euler_log10"].append(euler_sizes(solution, states, econ)["mean"])
    return found | {"by_law_of_motion": np.exp(alm[:, 0] / (1 - alm[:, 1]))}


def histogram_states(pooled: list, k: np.ndarray, K_path: np.ndarray, z_path: np.ndarray, econ: Tables, n: int,
                     solution) -> States:
    """About n States, spread evenly over the mass (s, n_k) of each pooled period."""
    each, device, columns = max(1, n // len(pooled)), econ.TFP.device, []
    for t, mass, k_next in pooled:
        at = np.searchsorted(mass.cumsum(), (np.arange(each) + 0.5) / each * mass.sum() * (1 - 1e-12))
        everybody = np.broadcast_to(k, mass.shape), np.indices(mass.shape)[0], k_next, mass * mass.size / mass.sum()
        k_all, s, next_all, weight = [torch.tensor(x, device=device).reshape(1, -1) for x in everybody]
        K, z = [torch.tensor(x, device=device).view(1, 1) for x in (K_path[t], z_path[t])]
        section = cross_section(solution, k_all, s, K, z, next_all, econ, weight)
        one_period = {name: x.unsqueeze(0) for name, x in section.items()}
        columns.append(states_of(one_period, torch.from_numpy(at).to(device)))
    return States(*[None if x[0] is None else torch.cat(x) for x in zip(*columns)])


def consumption_distribution(pooled: list, k: np.ndarray, K_path: np.ndarray, z_path: np.ndarray, econ: Tables):
    """c and mass at every (s, k) of the pooled periods, flat."""
    host, c, weight = tables_on(econ, "cpu"), [], []
    k, s = torch.from_numpy(k), torch.arange(len(econ.beta))[:, None]
    for t, mass, k_next in pooled:
        m, _ = cash_on_hand(k, s, torch.tensor(K_path[t]), torch.tensor(z_path[t]), host)
        c.append(m.numpy() - k_next)
        weight.append(mass)
    return np.array(c).ravel(), np.array(weight).ravel()


def ergodic_welfare(c: np.ndarray, weight: np.ndarray, econ: Tables) -> float:
    """The constant consumption whose utility is the mean of u(c), in goods."""
    u = utility(torch.from_numpy(c).clamp(min=C_MIN * econ.c_ss), econ).numpy()
    return float(inverse_utility(torch.tensor(weight @ u / weight.sum()), econ))


def policy_distance(network, grid, economy: Economy, K_path: np.ndarray) -> dict:
    """Mean and largest |k' - k' of the grid| over k up to four times mean capital and K at the 2nd, 50th and 98th
    percentile of a path, all (z, s)."""
    K = np.percentile(K_path, (2, 50, 98))
    k = economy.k_min + (4.07 * K[1] - economy.k_min) * np.linspace(1 / 320, 1, 640)
    s, z = np.arange(len(economy.beta)), np.arange(len(economy.TFP))
    states = np.meshgrid(k, s, K, z, indexing="ij")
    gap = np.abs(network.next_capital(*states) - grid.next_capital(*states))
    return {"mean": gap.mean(), "max": gap.max()}


# ---------------------------------------------------------------------------------------------- impulse responses

SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")


def impulse_responses(solutions: dict, econ: Tables, cfg: Config, seed: int, start: Callable = initial_panel) -> dict:
    """name -> series -> (benchmark, shocked), each (paths, periods): economies that were in the middle state a period
    before 0 (the upper one of two) and are at 0 in it, or one state below. Every random number is the same whatever
    the solution and the state at 0."""
    rng = torch.Generator().manual_seed(seed)
    panel = start(cfg.irf_paths, cfg.irf_agents, econ, rng)
    names, policies = list(solutions), [solution.in_panel for solution in solutions.values()]
    burn = simulate(policies, panel, cfg.irf_burn, econ, rng)
    for s, z, paths in tqdm(burn, "impulse responses", cfg.irf_burn, leave=False, disable=None):
        pass
    usual = torch.full_like(z, len(econ.TFP) // 2)
    s = draw_s(uniform(s.shape, rng, s.device), z, usual, s, econ)
    draws, after = uniform(s.shape, rng, s.device), rng.get_state()
    out = {name: {series: [] for series in SERIES} for name in names}
    for z_0 in (usual, (usual - 1).clamp(min=0)):
        for name, policy, (_, _, k) in zip(names, policies, paths):
            k = policy(k, s, k.mean(1, keepdim=True), usual)
            panel = Panel(k, draw_s(draws, usual, z_0, s, econ), z_0)
            rng.set_state(after)
            columns = []
            for s_t, z_t, [(k, K, k_next)] in simulate([policy], panel, cfg.irf_periods, econ, rng):
                m, R = cash_on_hand(k, s_t, K, z_t, econ)
                Y, C = output(K, z_t, econ)[:, 0], (m - k_next).mean(1)
                columns.append([K[:, 0], Y, C, R[:, 0], z_t[:, 0].double()])
            for series, values in zip(SERIES, zip(*columns)):
                out[name][series].append(torch.stack(values, 1).cpu().numpy())
    return out


# ---------------------------------------------------------------------------------------------- figures
# name -> data, where the network is a solid line and the grid, if there is one, a dashed one

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False,
         "legend.handlelength": 3.0, "legend.columnspacing": 1.0, "axes.formatter.useoffset": False}
BLUE, SKY = "#0072B2", "#56B4E9"  # Okabe & Ito (2008)
LINES = {"network": dict(color=SKY, linestyle="-", linewidth=2.8),  # light and wide: dashes show on it in grey too
         "grid": dict(color="black", linestyle=(0, (4, 2)), linewidth=1.1)}  # drawn second: dashes on the solid line


@contextlib.contextmanager
def figure(path, height, note=""):
    """A figure in the common style, with every label above all panels, written to path at the end; no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(7, height), layout="constrained")
        yield fig
        labels = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        if labels:
            fig.legend(labels.values(), labels, loc="outside upper center", ncols=4)
        fig.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="0.3")
        fig.savefig(path, dpi=160, format="png")


def plot_lines(ax, gap, x, of, label):
    """Each solution's y over x, and network minus grid in the strip below."""
    for name, y in of.items():
        ax.plot(x, y, label=name, **LINES[name])
    if "grid" in of:
        gap.plot(x, of["network"] - of["grid"], color=BLUE, linewidth=1.0, label="network - grid (lower panel)")
    gap.axhline(0, **LINES["grid"])
    ax.set(ylabel=label, xlim=(x[0], x[-1]))
    gap.set_ylabel("difference")


def plot_distribution(path, arrays, title, note):
    """Density and left tail of individual capital k (n,)."""
    k_of = {name: of["k"] for name, of in arrays.items()}
    low = min(k.min() for k in k_of.values())
    top = max(low + 1, *(np.quantile(k, 0.9995) for k in k_of.values()))
    poor = np.linspace(low, low + (top - low) / 15, 201)
    with figure(path, 3.6, note) as fig:
        density, tail = fig.subplots(1, 2, width_ratios=(2, 1))
        for name, k in k_of.items():
            label = f"{name}: mean {k.mean():.2f}, std {k.std():.2f}"
            density.stairs(*np.histogram(k, 80, (low, top), density=True), label=label, **LINES[name])
            tail.plot(poor, [100 * np.mean(k <= x) for x in poor], **LINES[name])
        density.set(title=title, xlabel="individual capital k (goods)", ylabel="density (per good)", xlim=(low, top))
        tail.set(title="the poorest", xlabel="k (goods)", ylabel="households with capital up to k (%)")


def plot_history(path, history):
    """Training over outer iterations, name -> (iterations,)."""
    panels = {"mean_K": "mean capital K (goods)", "objective": "policy objective (u in units of c_ss)",
              "policy_residual": "policy residual (rms of ln c~ / c)",
              "value_residual": "value residual (rms of ln consumption)"}
    with figure(path, 4.6, f"By outer iteration; {sum(history['seconds']):.0f} s in all.") as fig:
        for ax, (name, title) in zip(fig.subplots(2, 2, sharex=True).flat, panels.items()):
            ax.plot(range(1, len(history[name]) + 1), history[name], ".-", color=BLUE)
            ax.set(title=title, yscale="log" if "residual" in name else "linear")


def plot_policies(path, solutions, K, k_max, economy):
    """k' - k at aggregate capital K for the first and the last s, in z around the middle."""
    k = np.sinh(np.linspace(np.arcsinh(economy.k_min), np.arcsinh(k_max), 400))
    Z, S = economy.income.shape
    of_z, of_s = sorted({(Z - 1) // 2, Z // 2}), sorted({0, S - 1})
    with figure(path, 1 + 2.7 * len(of_z), f"Over individual capital k (goods), at mean capital K = {K:.1f}.") as fig:
        axes = fig.subplots(2 * len(of_z), len(of_s), sharex=True, squeeze=False, height_ratios=(3, 1.2) * len(of_z))
        for row, column in np.ndindex(len(of_z), len(of_s)):
            (ax, gap), z, s = axes[2 * row : 2 * row + 2, column], of_z[row], of_s[column]
            saved = {name: solution.next_capital(k, s, K, z) - k for name, solution in solutions.items()}
            plot_lines(ax, gap, k, saved, "k' - k (goods)")
            ax.set_title(f"{economy.z_names[z]}, {economy.s_names[s]}")
            gap.set_xscale("symlog", linthresh=1, linscale=1 / np.log(10))  # linear up to 1, and log from there on


def plot_bellman_errors(path, arrays, note):
    """Mean and 95th percentile of |error| at the states that a solution visits, in groups of equally many by k."""
    with figure(path, 4.2, f"{note}; a point is a fortieth of the states.") as fig:
        ax = fig.subplots()
        for name, of in arrays.items():
            groups = np.array_split(np.argsort(of["sample_k"]), min(40, len(of["sample_k"])))
            k = [of["sample_k"][group].mean() for group in groups]
            error = [np.abs(of["bellman"][group]) for group in groups]
            ax.plot(k, [x.mean() for x in error], label=f"{name}, mean", **LINES[name])
            ax.plot(k, [np.percentile(x, 95) for x in error], ".", label=f"{name}, 95th percentile",
                    color=LINES[name]["color"])
        ax.set(xscale="symlog", yscale="log", xlabel="individual capital k (goods)",
               ylabel="|Bellman error|, policy's own c (utils)")


def impulse_response(benchmark, shocked, points=False):
    """Response of a series (paths, periods) in percent, a ratio of means, or in percentage points:
    mean, 10th and 90th percentile of the single paths' responses, each (periods,)."""
    def change(b, s):
        return 100 * (s - b) if points else 100 * (s / b - 1)
    low, high = np.percentile(change(benchmark, shocked), (10, 90), axis=0)
    return change(benchmark.mean(0), shocked.mean(0)), low, high


def plot_impulse_responses(path, responses, note):
    """Responses to a lower state at period 0: name -> series -> (benchmark, shocked), both (paths, periods)."""
    with figure(path, 4.6, f"{note}; periods after the shock.") as fig:
        for ax, series in zip(fig.subplots(2, 2, sharex=True).flat, SERIES):
            points = series == "interest_rate"
            for name, solution in responses.items():
                mean, low, high = impulse_response(*solution[series], points)
                if name == "network":
                    ax.fill_between(range(len(mean)), low, high, color=SKY, alpha=0.25, linewidth=0,
                                    label="network, 10-90% of paths")
                ax.plot(mean, label=f"{name}, mean", **LINES[name])
            ax.axhline(0, color="0.5", linewidth=0.7, zorder=1)
            ax.set_title(f"{series.replace('_', ' ')} ({'percentage points' if points else 'percent'})")


def plot_capital_paths(path, arrays, z_names, note):
    """Mean capital K on the first periods of one path of z; the lower states are shaded."""
    z, low = arrays["network"]["z_path"][:400, 0], len(z_names) // 2
    with figure(path, 4.0, note) as fig:
        ax, gap = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        ax.fill_between(range(len(z)), z < low, step="mid", color="0.9", linewidth=0, zorder=0.5,
                        transform=ax.get_xaxis_transform(), label=" / ".join(z_names[:low]))
        paths = {name: of["K_path"][:400, 0] for name, of in arrays.items()}
        plot_lines(ax, gap, range(len(z)), paths, "mean capital K (goods)")
        gap.set_xlabel("period")


def plot_moments(path, network, meaning, k_max):
    """What a household with capital k adds to each learnt moment, by s, in units of the moment's own movement."""
    k = np.linspace(network.economy.k_min, k_max, 300)
    S, learnt = len(network.economy.s_names), network.config.learnt_moments
    k_all = torch.tensor(k, device=network.device).expand(S, -1)
    s = torch.arange(S, device=network.device).unsqueeze(1).expand_as(k_all)
    q = standard(contributions(list(network.layers.values()), k_all, s, network.econ, network.config), network.econ)
    shown = sorted({0, S - 1})
    with figure(path, 1.0 + 2.4 * learnt) as fig:
        for row, axes in enumerate(fig.subplots(learnt, 2, squeeze=False)):
            for view, (ax, name) in enumerate(zip(axes, ("policy", "value"))):
                for i, color in zip(shown, (BLUE, "#D55E00")):
                    ax.plot(k, q[i, :, view, row - learnt].cpu(), color=color, label=network.economy.s_names[i])
                r = [float(meaning[name][of][row]) for of in ("K", "unemployment")]
                ax.set(title=f"{name} network: correlation {r[0]:+.2f} with K,\n{r[1]:+.2f} with the share "
                             f"in the lowest income", xlabel="individual capital k (goods)", ylabel="Q(k, s)",
                       xlim=(k[0], k[-1]))


def draw_figures(folder: Path, network: Solution, grid: GridSolution | None, figures: dict, arrays: dict,
                 cfg: Config) -> None:
    """Every picture of the output directory."""
    draw, economy, of = folder / "figures", network.economy, figures["network"]
    draw.mkdir()
    small, large = [f"N = {x['n_agents']}, {x['n_economies']} economies, {x['periods']} periods"
                    for x in (of["small"], of["large"])]
    title = f"distribution: W1 distance {figures['comparison']['small']['w1']:.3f} goods" if grid else "distribution"
    plot_distribution(folder / "distribution_validation.png", arrays["small"], title, small)
    plot_history(draw / "training_history.png", network.weights["history"])
    solutions = {"network": network} | ({"grid": grid} if grid else {})
    top = max(np.quantile(arrays["large"]["network"]["k"], 0.9999), economy.k_min + 1)
    plot_policies(draw / "policy_functions.png", solutions, of["limit"]["capital"]["mean"], top, economy)
    plot_bellman_errors(draw / "bellman_errors.png", arrays["large"], large)
    if cfg.learnt_moments:
        plot_moments(draw / "moments.png", network, of["small"]["moments"], top)
    paths = f"{cfg.irf_paths} paths, N = {cfg.irf_agents}"
    plot_impulse_responses(draw / "impulse_responses.png", arrays["irf"], paths)
    plot_capital_paths(draw / "capital_path.png", arrays["large"], economy.z_names, large)


# ---------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; --help lists every flag")


class Settings(NamedTuple):
    """What the command line says."""

    economy: Economy
    calibration: dict  # flags of the economy and their values; empty where it has none
    config: Config
    grid: GridConfig | None
    run: Run


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv, economy=krusell_smith, calibration=Calibration, config: Config = PRESETS["default"]) -> Settings:
    """economy: an Economy without flags, or a function that makes one of a calibration, the dataclass of its flags;
    config: its default preset. Raises UserError."""
    presets, fixed = PRESETS | {"default": config}, isinstance(economy, Economy)
    parser = Parser("deepham_ks", "%(prog)s [--flag value ...]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)  # the preset decides the defaults
    parser.add_argument("--version", action="version", version=f"deepham_ks {__version__}")
    for kind in (Run, Config, GridConfig) if fixed else (Run, calibration, Config, GridConfig):
        section = parser.add_argument_group(kind.__name__, kind.__doc__)
        for item in dataclasses.fields(kind):
            of = presets if kind is Config else {"default": kind()}
            values = {name: getattr(preset, item.name) for name, preset in of.items()}
            shown = [f"{n} {v!r}" for n, v in values.items() if n == "default" or v != values["default"]]
            told = f"{item.metadata['help']} ({', '.join(shown)})".replace("%", "%%")
            how = {"type": type(item.default), "choices": item.metadata["choices"]}
            if isinstance(item.default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            section.add_argument(flag(PREFIX.get(kind, "") + item.name), help=told, **how)
    given = vars(parser.parse_args(argv))

    def filled(base):
        """base with the flags given. NaN and infinity lie in no interval that has an open end there."""
        prefix = PREFIX.get(type(base), "")
        for item in dataclasses.fields(base):
            value = given.get(prefix + item.name, getattr(base, item.name))
            base, within = dataclasses.replace(base, **{item.name: value}), item.metadata["within"]
            low, high = map(float, within[1:-1].split(","))
            at_end = (value == low and within[0] == "[") or (value == high and within[-1] == "]")
            if isinstance(value, (int, float)) and not (at_end or low < value < high):
                raise UserError(f"{flag(prefix + item.name)} {value}: give a value in {within}")
        return base

    run = filled(Run())
    cal, cfg = None if fixed else filled(calibration()), filled(presets[run.preset])
    small = run.preset == "smoke" and run.grid == "converged"
    grid = filled(SMOKE_GRID if small else GRIDS.get(run.grid, GridConfig()))
    check(cfg, grid, run)
    parts = [Path(Interrupted.script).stem] * (economy is not krusell_smith) + [run.preset] * (run.preset != "default")
    usual = "/".join(["runs", *parts]) if parts else "."
    decided = {name: getattr(run, name) for name in ("equilibrium", "players", "start") if getattr(run, name)}
    economy = economy if fixed else economy(cal)
    economy = dataclasses.replace(economy, **decided) if decided else economy
    return Settings(economy, {} if fixed else dataclasses.asdict(cal), cfg, None if run.grid == "none" else grid,
                    dataclasses.replace(run, output_dir=run.output_dir or usual))


def check(cfg: Config, grid: GridConfig, run: Run) -> None:
    """Values that are possible one by one and impossible together or here."""
    require(run.output_dir.isprintable(), f"--output-dir {run.output_dir!r}: leave control characters out of the name")
    require(not (run.evaluate and run.resume),
            "--evaluate trains nothing and --resume goes on training; give one of the two")
    require(run.device != "cuda" or torch.cuda.is_available(),
            "--device cuda: torch finds no CUDA device here; use --device cpu or --device auto")
    if RANKS > 1:
        gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        require(not run.evaluate, "--evaluate trains nothing: run it with python, without torchrun")
        require(run.device == "cpu" or gpus == 0 or here <= gpus, f"--nproc-per-node {here} on a machine with {gpus} "
                f"GPUs: give --nproc-per-node {gpus}, or --device cpu")
        own_share(cfg)
    require(cfg.eval_drop <= cfg.eval_periods - 3,
            f"--eval-drop {cfg.eval_drop} leaves too little of --eval-periods {cfg.eval_periods}: lower it")
    require(cfg.periods > cfg.horizon, f"--periods {cfg.periods} is too short for --horizon {cfg.horizon}: "
            f"give --periods {cfg.horizon + 1} or more")
    require(grid.burn_in <= grid.periods // 5 - 3, f"--grid-burn-in {grid.burn_in} leaves too little of "
            f"--grid-periods {grid.periods}: lower it")


def departures(cfg, reference) -> List[str]:
    """Where cfg is not the reference, which is the preset paper."""
    pairs = [(f.name, getattr(cfg, f.name), getattr(reference, f.name)) for f in dataclasses.fields(cfg)]
    return [f"{name} {ours} (paper {theirs})" for name, ours, theirs in pairs if ours != theirs]


# ---------------------------------------------------------------------------------------------- run folder

FORMAT = 10  # of checkpoint.pt and NN_weights_biases.pth; raise it whenever their keys change
PUBLISHING = ".deepham-publishing"  # all that is temporary is called .deepham-*


@contextlib.contextmanager
def disk_errors(output_dir):
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: {error}; earlier files are as they were; "
                        "see to space and permissions there, or name another directory") from error


def prepare(output_dir: Path):
    """Before any work: refuse a directory that cannot be made or written, and leave no trace in it. What a killed run
    left goes, but for results that were being published: these are published."""
    with disk_errors(output_dir):
        nearest = next(p for p in (output_dir, *output_dir.parents) if p.exists())
        tempfile.TemporaryFile(dir=nearest).close()  # root passes os.access() on a read-only disk
        if (output_dir / PUBLISHING).exists():
            finish_publishing(output_dir)
        for left in output_dir.glob(".deepham-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def sealed(data) -> bytes:
    """A zip file ends with the length of its comment and the comment; in ours that is the rest's checksum. torch.load
    checks none: from a damaged directory entry it returned uninitialised memory."""
    return data + (32).to_bytes(2, "little") + hashlib.sha256(data).digest()


def packed(state: dict) -> bytes:
    buffer = io.BytesIO()  # on a full disk torch.save(path) fails with a RuntimeError that names no cause
    torch.save(state, buffer)
    return sealed(buffer.getvalue()[:-2])


def save_checkpoint(path: Path, state: dict):
    """path holds its old bytes or the new ones, never a part."""
    data, partial = packed({"format": FORMAT} | state), path.with_name(f".deepham-{path.name}")
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
        intact = data == sealed(data[:-34])
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if intact else None
    except Exception:  # sealed by someone, but of another make: code in it, say
        state = None
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        told = f"is damaged or no file of this script; move it away and run without {asked}"
    elif state["format"] != FORMAT:
        age = "a newer" if state["format"] > FORMAT else "an older"
        told = (f"has format {state['format']}, of {age} deepham_ks.py; use that one (this one reads {FORMAT}), "
                f"or move the file away, run without {asked}")
    elif differs := difference(state, like):
        told = f"is of another run: {differs}; give the flags of the run that wrote it, or another --output-dir"
    else:
        return state
    raise UserError(f"{asked}: {path} {told}")


def difference(found, like, name: str = "") -> str:
    """In words, the first place where found has not the keys, types, shapes or settings of like."""
    if isinstance(like, dict) and isinstance(found, dict):
        inner = ((f"{name}.{key}".lstrip("."), key) for key in like)
        told = (difference(found[k], like[k], at) if k in found else f"{at} is missing" for at, k in inner)
        return next(filter(None, told), "")

    def described(value):
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {tuple(value.shape)} {value.layout}"
        return repr(value) if name.startswith(("calibration.", "config.", "economy.")) else type(value).__name__

    here, there = described(like), described(found)
    if here == there and name.startswith("economy.") and isinstance(like, Tensor) and not torch.equal(like, found):
        return f"{name} has other numbers in the file than in this run"
    return "" if here == there else f"{name} is {there} in the file and {here} in this run"


@contextlib.contextmanager
def staged(output_dir: Path):
    """A hidden folder for the results; they replace the earlier ones together when all are written."""
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".deepham-", dir=output_dir, ignore_cleanup_errors=True) as staging:
            yield Path(staging)
            os.replace(staging, output_dir / PUBLISHING)  # from here on even kill -9 loses no result
            finish_publishing(output_dir)


def finish_publishing(output_dir: Path):
    """Move the files of PUBLISHING in, earlier ones aside; where a move fails, all go back. File by file, so that what
    else a user keeps in figures/ or irf/ stays."""
    new, old = output_dir / PUBLISHING, output_dir / ".deepham-earlier"
    names = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    moves = [move for name in names for move in ((output_dir / name, old / name), (new / name, output_dir / name))]
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):  # which were made is read off the disk
            if target.exists() and not source.exists():
                os.replace(target, source)
        raise
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new)


# ---------------------------------------------------------------------------------------------- how a run ends


class Interrupted(BaseException):
    """SIGINT or SIGTERM. `except Exception` must not swallow it."""

    iteration = 0  # the training loop sets what the checkpoint holds
    script = "deepham_ks.py"  # what to run to go on
    pending = 0  # the signal, if one came: Python drops what is raised inside a destructor or a callback


def is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "NOT_INITIALIZED",
             "Storage size calculation overflowed", "array is too big")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def exit_status(work, argv: list) -> int:
    """work(argv), where a user's error, a signal or too little memory ends in one line on stderr."""
    def interrupt(signum, frame):
        Interrupted.pending = signum
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    Interrupted.iteration = Interrupted.pending = 0
    status = 2
    try:
        return work(argv)
    except UserError as error:
        line = f"error: {error}"
    except Interrupted as stop:
        again = shlex.join(["--resume", *(a for a in argv if a != "--resume")])
        saved = stop.iteration or "--resume" in argv
        python = "python" if RANKS == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        again = f"{python} {shlex.quote(Interrupted.script)} {again}"
        cure = f"continue with: {again}" if saved else "nothing was saved yet"
        cure = "; results are as they were" if "--evaluate" in argv else f" after iteration {stop.iteration}; {cure}"
        line = f"stopped by {signal.Signals(stop.args[0]).name}{cure}"
        status = 128 + stop.args[0]
    except OSError as error:  # standard output is a closed pipe or on a full disk
        line = f"error: {error}; results and checkpoint are as they were"
    except (MemoryError, RuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
        line = ("error: out of memory; lower --n-agents, --n-economies, --batch or --horizon, after the training "
                "--eval-agents-large, --eval-economies-large, --irf-agents or --irf-paths")
    finally:
        Interrupted.pending = 0
        for signum, handler in before.items():  # torchrun ends the others once one is lost: the first has yet to say it
            signal.signal(signum, handler if RANKS == 1 or RANK > 0 else signal.SIG_IGN)
    if RANK > 0 and status == 2:
        time.sleep(10)  # what the first rank has to say ends this one; alone with a trouble it speaks
    if RANK == 0 or status == 2:
        print(f"deepham_ks: {f'rank {RANK}: ' * (RANK > 0)}{line}", file=sys.stderr, flush=True)
    if RANKS > 1 and status > 128:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # the end of Python would wait for what other ranks still owe
    return status


# ---------------------------------------------------------------------------------------------- results

JUDGE_SEED = 20_000  # shocks on which every run is judged: far from the seeds of training, the same for all
WEIGHTS, CHECKPOINT = "NN_weights_biases.pth", "checkpoint.pt"
LAYERS = ("W1", "b1", "W2", "b2", "w3", "b3", "V1", "c1", "V2", "c2", "V3", "c3")  # the last six of Q


def as_economy(economy) -> Economy:
    """An Economy as it is, Krusell & Smith's for a Calibration, the default for None."""
    return economy if isinstance(economy, Economy) else krusell_smith(economy or Calibration())


def economy_dict(economy: Economy) -> dict:
    """The tables as files keep them."""
    tables = dataclasses.asdict(economy).items()
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in tables}


def weights_file(state: dict, economy: Economy, calibration: dict, cfg: Config, seed: int) -> dict:
    """Everything needed to use the networks: layers, tables, configuration, what ln K and the moments are centred on,
    and what is usual of the moments at (1, ln K) in each z: M_law (Z, V, n, 2)."""
    econ = with_units(economy.tables(), cfg)
    networks = {name: dict(zip(LAYERS, (layer.detach().cpu().clone() for layer in layers)))
                for name, layers in zip(("policy", "value"), networks_of(state, econ, cfg))}
    V, n = econ.M_mean.shape
    laws = torch.zeros(len(econ.TFP), V, n, 2, dtype=torch.float64)
    for v, i in np.ndindex(V, n):
        path = state["M"][:, :, v, i].double()
        law, _ = regress_by_z(path, torch.log(state["K_path"].double()), state["z_path"], 0 * path[0, : len(econ.TFP)])
        laws[:, v, i] = law.nan_to_num().cpu()
    units = {name: state.get(name, getattr(econ, name)).cpu().clone() for name in ("M_mean", "M_std")}
    return {**networks, **units, "M_law": laws, "economy": economy_dict(economy), "calibration": calibration,
            "K_mean": float(state["K_mean"]), "k_range": state["k_range"].cpu().clone(),
            "config": dataclasses.asdict(cfg), "seed": seed, "settled": state["settled"],
            "history": {name: list(column) for name, column in state["history"].items()}}


def still_moving(weights: dict) -> str:
    """Which quantity a run left moving, or nothing. Euler errors are exact sums on states of fresh roll-outs, at K' and
    Delta' as their laws expect them: noise-free but for the choice of states."""
    cfg, history, settled = Config(**weights["config"]), weights["history"], weights["settled"]
    if cfg.optimizer == "adam":
        return ""
    euler = history["euler"][settled : settled + cfg.averaging] if settled else history["euler"]
    n = min(len(euler) // 3, 10)
    if n and change_of(euler, n) < 0.8:
        last, before = np.mean(euler[-n:]), np.mean(euler[-2 * n : -n])
        return f"Euler errors fell to {last:.1e} in {n} iterations, from {before:.1e}"
    if not settled:
        return f"savings moved by {history['movement'][-1]:.1e} of K in ten iterations (--settle {cfg.settle:g})"
    return ""


def load(path=WEIGHTS, device="cpu", compile="none", settings: Settings | None = None) -> Solution:
    """The solution in a weights file, with next_capital(k, s, K, z) and value(k, s, K, z) on numpy arrays.
    Raises UserError when the file is missing or damaged or, where settings are given, of another economy or width."""
    like = dict.fromkeys(("config", "calibration", "economy", "policy", "value", "history"), {})
    like |= {"seed": 0, "settled": 0, "K_mean": 0.0, "k_range": torch.zeros(2)}
    if settings:
        cfg = settings.config
        econ = with_units(settings.economy.tables(), cfg)
        policy, value = ({name: torch.zeros(shape) for name, shape in zip(
            LAYERS, layer_shapes(n_inputs(econ, network), n * cfg.hidden) + learnt_shapes(econ, cfg))}
            for network, n in (("policy", 1), ("value", cfg.value_networks)))
        asked = {name: getattr(cfg, name) for name in ("hidden", "value_networks", "moments", "learnt_moments")}
        like |= {"config": asked, "calibration": settings.calibration,
                 "economy": economy_dict(settings.economy), "policy": policy, "value": value}
    weights = load_checkpoint(Path(path), like, "--evaluate")
    return Solution(weights, choose_device(device), compile)


def compare(network: Solution, grid: GridSolution | None, cfg: Config, graphs: bool = False) -> Tuple[dict, dict]:
    """Every accuracy figure of both on the same shocks, by solution and size: small, large, and the limit of infinitely
    many households; under comparison the distances between both. The arrays behind the pictures, by size and
    solution. On CUDA panels can be simulated as graphs."""
    econ, economy = network.econ, network.economy
    solutions = {"network": network} | ({"grid": grid} if grid else {})
    sizes = (cfg.eval_economies, cfg.eval_agents), (cfg.eval_economies_large, cfg.eval_agents_large)
    top = grid.k_max if grid else 4 * float(network.weights["k_range"][1])
    k = power_grid(GridConfig.n_k_fine, economy.k_min, top, GridConfig.exponent)
    of_limit = judge_limit(solutions, economy, econ, cfg, k, JUDGE_SEED)
    start = functools.partial(settled_panel, k, [arrays["mass"] for arrays in of_limit[1].values()])
    of_small, of_large = [functools.partial(judge_panel, solutions, econ, cfg, *size, JUDGE_SEED, start, graphs)
                          for size in sizes]
    threads = torch.get_num_threads()
    two = network.device.type == "cpu" and threads > 1  # panels beside each other, with half of the threads each
    with at_most(threads // 2 if two else threads), beside(of_large) if two else nullcontext(of_large) as of_large:
        small, of_irf = of_small(), impulse_responses(solutions, econ, cfg, JUDGE_SEED, start)
        judged = {"small": small, "large": of_large(), "limit": of_limit}
    figures = {name: {size: of[name] for size, (of, _) in judged.items()} for name in solutions} | {"comparison": {}}
    arrays = {size: of for size, (_, of) in judged.items()}
    arrays["irf"] = of_irf
    if not grid:
        return figures, arrays
    both, gaps = figures["comparison"], {}
    for size, of in figures["grid"].items():
        (k, weight), (k_grid, weight_grid) = [(x["k"], x["weight"]) for x in arrays[size].values()]
        both[size] = {"n_agents": of["n_agents"],
                      "std_ratio": figures["network"][size]["capital"]["std"] / of["capital"]["std"],
                      "w1": scipy.stats.wasserstein_distance(k, k_grid, weight, weight_grid)}
    for series in SERIES[:4]:
        ours, theirs = [impulse_response(*x[series], series == "interest_rate")[0] for x in arrays["irf"].values()]
        gaps[series] = np.abs(ours - theirs).max()
    both |= {"policy_distance": policy_distance(network, grid, economy, arrays["limit"]["grid"]["K_path"]),
             "impulse_response_gap": gaps | {"n_agents": cfg.irf_agents}}
    figures["grid"] |= {"law_of_motion": {"coefficients": grid.alm_coefficients, "r2": grid.alm_r2},
                        "notes": list(grid.notes)}
    if economy.equilibrium == "planner":
        figures["grid"]["Delta_law"] = {"coefficients": grid.econ.Delta_law, "r2": grid.Delta_r2}
    return figures, arrays


COLUMNS = ("figure", "network", "grid", "published", "tolerance", "passed")


def verdict(figures: dict, economy: Economy, cfg: Config) -> list:
    """Rows of COLUMNS. In the default economy tolerances are absolute, tighter for networks that see who is unemployed,
    and published stands for Maliar, Maliar & Valli (2010) as their stored policy does in panels from a dispersed start
    (Bellman errors: Han, Yang & E 2021, first or generalised moment). In any other a figure is measured by the grid's
    of the same economy. Without a grid nothing passes or fails."""
    net, both, judged = figures["network"], figures["comparison"], "grid" in figures
    grid = figures["grid"] if judged else net  # its numbers are then left out
    default = not difference(economy_dict(economy), economy_dict(krusell_smith()), "economy")
    rows, N = [], {size: f"N={net[size]['n_agents'] or 'inf'}" for size in ("small", "large", "limit")}
    sees = needs_noise(cfg)

    def row(name, network, of_grid, published, absolute, relative=None, size=abs):
        tolerance = (absolute if default else relative) if judged else None
        passed = None if tolerance is None else bool(size(network) <= tolerance)
        rows.append((name, network, of_grid if judged else None, published if default else None, tolerance, passed))

    if judged:
        K = grid["limit"]["capital"]["mean"]
        for size in N:
            row(f"W1 of capital, {N[size]}", both[size]["w1"], 0.0, 0.16, 0.15, 0.004 * K)
            row(f"std of capital over the grid's - 1, {N[size]}", both[size]["std_ratio"] - 1, 0.0, -0.005, 0.01, 0.01)
        row("|k' - k' grid|, mean", both["policy_distance"]["mean"], 0.0, 0.006, 0.005, 0.00015 * K)
        row("|k' - k' grid|, max", both["policy_distance"]["max"], 0.0, 0.017, 0.03)
    if sees:
        ours, of_grid = [x["small"]["euler_log10"]["mean"] for x in (net, grid)]
        row(f"Euler error, log10 mean, {N['small']}", ours, of_grid, None, -3.9, of_grid, float)
    for size in ("large", "limit"):
        mean = -4.3 if sees else -4.0
        for name, published, absolute, slack in (("mean", -3.96, mean, 0.1), ("p99", -3.47, -3.4, 0.15),
                                                 ("max", -3.24, -2.0, None)):
            ours, of_grid = [x[size]["euler_log10"][name] for x in (net, grid)]
            row(f"Euler error, log10 {name}, {N[size]}", ours, of_grid, published if size == "large" else None,
                absolute, of_grid + slack if slack and size == "large" else None, float)
    bellman = {"small": 0.0005, "large": 0.00015, "limit": 0.00015} if sees else \
        {"small": 0.004, "large": 0.001, "limit": 0.001}
    for size, absolute in bellman.items():
        published = (0.0153 if cfg.learnt_moments else 0.0184) if size == "small" else None
        for c in ("own", "best"):
            ours, of_grid = [x[size][f"bellman_{c}_c"]["mean"] for x in (net, grid)]
            row(f"Bellman error, {c} c, mean, {N[size]}", ours, of_grid, published, absolute)
    if not default:
        ours, of_grid = [x["large"]["bellman_in_consumption"]["mean"] for x in (net, grid)]
        row(f"Bellman error over u'(c) c, mean, {N['large']}", ours, of_grid, None, None, 1.5 * of_grid + 1e-5)
    rest = [x["limit"]["risky_steady_state"] for x in (net, grid)]
    # households who know more than K rest elsewhere (benchmarks/resting.md)
    near = None if cfg.moments or cfg.learnt_moments else 0.001
    for name, ours, of_grid in zip(economy.z_names, *[x["K"] for x in rest]):
        row(f"K* resting in {name} over the grid's - 1, N=inf", ours / of_grid - 1, 0.0, None, near, near)
    ours, of_grid = [max(x["euler_log10"]) for x in rest]
    row("Euler error, log10 mean, at the worst K*, N=inf", ours, of_grid, None, *[of_grid + 0.1] * 2, float)
    for series in ("output", "capital") if judged else ():
        row(f"response of {series}, gap (p.p.)", both["impulse_response_gap"][series], 0.0, None, 0.02, 0.02)
    return rows


def print_verdict(rows: list) -> None:
    line = "{:<52}{:>10}{:>10}{:>11}{:>11}  {}"
    print("\n" + line.format(*COLUMNS[:-1], "verdict"))
    for name, *numbers, passed in rows:
        shown = ["-" if x is None else f"{x:.4g}" for x in numbers]
        print(line.format(name, *shown, {True: "pass", False: "FAIL", None: "-"}[passed]))


def write_results(folder: Path, network: Solution, grid: GridSolution | None, figures: dict, arrays: dict,
                  cfg: Config) -> None:
    """Every file of the output directory but metrics.json, into folder."""
    save_checkpoint(folder / WEIGHTS, network.weights)
    small = figures["network"]["small"]
    header = [f"ergodic distribution of individual capital k (goods), policy network, N = {small['n_agents']}, "
              f"{small['n_economies']} economies, {small['periods']} periods, every {cfg.eval_every}th pooled, "
              f"seed {network.weights['seed']}"]
    for of in (small, figures["network"]["large"]):
        for kind in ("bellman_own_c", "bellman_best_c"):
            header.append(f"{kind} (utils), N = {of['n_agents']}: mean {of[kind]['mean']:.6f} "
                          f"rmse {of[kind]['rmse']:.6f} max {of[kind]['max']:.6f}")
    k = arrays["small"]["network"]["k"]
    np.savetxt(folder / "results.txt", k[:: max(1, len(k) // 100_000)], fmt="%.4f", header="\n".join(header))
    history = network.weights["history"]
    np.savetxt(folder / "training.csv", np.array(list(history.values())).T, delimiter=",", fmt="%.6g",
               header=",".join(history), comments="")
    (folder / "irf").mkdir()
    for series, pair in arrays["irf"]["network"].items():
        for kind, paths in zip(("benchmark", "shocked"), pair):
            np.savetxt(folder / "irf" / f"agg_{series}_{kind}.csv", paths, delimiter=",",
                       fmt="%d" if series == "shocks" else "%.6f")
    draw_figures(folder, network, grid, figures, arrays, cfg)


# ---------------------------------------------------------------------------------------------- one run


@contextlib.contextmanager
def stage(seconds: dict, name: str):
    """Wall time of a stage into seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


@contextlib.contextmanager
def beside(work: Callable) -> Iterator[Callable]:
    """work(), without gradients in a thread of its own while the block runs: the function that waits for its result.
    What is still at work when the block ends, after an interrupt say, is stopped: a thread that outlives the program
    would abort it."""
    future = concurrent.futures.Future()

    def run():
        try:
            with torch.no_grad():
                future.set_result(work())
        except BaseException as error:
            if not future.done():
                future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield future.result
    finally:
        while not future.done():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(0.1)
        thread.join()


@contextlib.contextmanager
def at_most(threads: int):
    """So many threads of torch in each thread of Python."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(device: str) -> str:
    if device == "auto" and not torch.cuda.is_available():
        driver, hidden = Path("/proc/driver/nvidia/version"), os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        require(hidden or not (torch.version.cuda and driver.exists()), "the NVIDIA driver here is too old for torch "
                f"{torch.__version__}: install torch from the cu126 wheels, or give --device cpu")
        print("no CUDA device found: running on the CPU (in Colab: Runtime > Change runtime type > T4 GPU)")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def peak_memory_gb(device: str) -> dict:
    """Most memory held, where the platform counts it: Windows has no module resource."""
    peak = {}
    with contextlib.suppress(ImportError):
        import resource

        unit = 2**30 if sys.platform == "darwin" else 2**20  # getrusage counts bytes there, kilobytes on Linux
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device == "cuda":
        peak["device"] = torch.cuda.max_memory_reserved() / 2**30  # allocated leaves the graphs' own pool out
    return peak


def limit_memory() -> None:
    """On Linux: what is available now is the most this process may take, so that too large a size fails with an error
    to report, where the kernel would kill the run without a word."""
    with contextlib.suppress(OSError, ValueError, ImportError, IndexError):
        import resource

        available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((available + used) * 1024, most))


def solve(economy=None, config: Config = Config(), *, seed: int = 0, device: str = "auto", compile: str = "torchscript",
          cuda_graphs: bool = True, output_dir=None, resume: bool = False, calibration: dict | None = None) -> Solution:
    """Train and return the Solution. economy: an Economy, a Calibration, or None for the default. With output_dir a
    checkpoint is saved there after every outer iteration, and resume goes on from it; without, nothing touches the
    disk. Raises UserError where the training fails or the checkpoint is of another run."""
    calibration = dataclasses.asdict(economy) if isinstance(economy, Calibration) else calibration or {}
    economy, device = as_economy(economy), choose_device(device)
    torch.set_float32_matmul_precision("highest")  # no TF32: it would show in the accuracy figures
    join_ranks(device)
    econ, kernels = with_units(economy.tables(device, torch.float32), config), compile_kernels(compile)
    state = trained(econ, config, kernels, seed, cuda_graphs and device == "cuda", output_dir, resume,
                    {"calibration": calibration, "economy": economy_dict(economy)})
    return Solution(weights_file(state, economy, calibration, config, seed), device, compile)


def seed_of_rank(seed: int) -> int:
    return seed + RANK * 10**10


def generator(device: str, seed: int) -> torch.Generator:
    """Of this rank's random numbers."""
    rng = torch.Generator()
    if device == "cuda":
        torch.cuda.init()
        rng = torch.cuda.default_generators[torch.cuda.current_device()]
        torch._C._jit_set_texpr_fuser_enabled(False)  # compiles inside a capture; and the CPU build has no such fuser
    return rng.manual_seed(seed_of_rank(seed))


def resumed(state: dict, saved: dict, rng: torch.Generator, seed: int) -> bool:
    """The state goes on from a checkpoint; whether with its random numbers."""
    size = len(rng.get_state())
    same = len(saved["rng"]) == RANKS * size  # of another size on another kind of device
    if same:
        rng.set_state(saved["rng"][RANK * size : (RANK + 1) * size].clone())
    else:
        print("the checkpoint is of another number of ranks or another kind of device: economies are shared anew and "
              "random numbers start anew, so not bit for bit")
        rng.manual_seed(seed_of_rank(seed + saved["iteration"]))
    device = state["policy"].device
    state |= {name: x.to(device) if isinstance(x, Tensor) else x for name, x in own_part(saved).items()
              if name in state or name.startswith("adam_")}
    return same


def trained(econ: Tables, config: Config, kernels: Kernels, seed: int, graphs: bool, output_dir, resume: bool,
            of_run: dict) -> dict:
    """The state of all ranks after the training, with a checkpoint after every outer iteration. of_run: what else a
    checkpoint tells of its run."""
    cfg, rng = own_share(config), generator(econ.TFP.device.type, seed)
    state, path = initial_state(econ, cfg, seed, rng), output_dir and Path(output_dir) / CHECKPOINT
    free = ("iterations", "eval_", "irf_")  # a run may be resumed to more iterations, or judged at other sizes
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if not name.startswith(free)}
    of_run = of_run | {"config": fixed | {"seed": seed}}
    if resume:
        like = of_run | whole(state)
        same = resumed(state, of_first(lambda: load_checkpoint(path, like, "--resume")), rng, seed)
        follow = ("K_mean", "Delta_law", "M_mean", "M_std")
        econ = econ._replace(**{name: state[name] for name in follow if name in state})
        if not same and state["iteration"] > 0:
            with torch.no_grad():
                keep_batch(state, roll_out_sample(state, econ, cfg, kernels, rng), cfg)
    Interrupted.iteration = state["iteration"]

    def after_iteration(state: dict) -> None:
        if path:
            everything = of_run | whole(state) | {"rng": gathered(rng.get_state(), 0)}
            if RANK == 0:
                if state["iteration"] == 1 and path.exists():  # of an earlier run
                    with disk_errors(output_dir):
                        os.replace(path, path.with_name("checkpoint.previous.pt"))
                save_checkpoint(path, everything)
        Interrupted.iteration = state["iteration"]
        last = {name: column[-1] for name, column in state["history"].items()}
        shown = ("mean_K", "value_residual", "policy_residual", "objective")
        words = " ".join(f"{name} {last[name]:.4g}" for name in shown)
        bar.set_postfix_str(words, refresh=False)
        bar.update()
        if bar.disable:
            print(f"iteration {state['iteration']} {words} seconds {last['seconds']:.2f}", flush=True)

    hidden = True if RANK else None  # None: on a terminal only
    with tqdm(total=config.iterations, initial=state["iteration"], desc="DeepHAM", disable=hidden, unit="it") as bar:
        train(state, econ, cfg, kernels, rng, graphs, after_iteration)
    return whole(state)


def work(settings: Settings) -> int:
    """Train or read, judge, write and print."""
    import matplotlib

    economy, calibration, cfg, grid_config, run = settings
    output_dir = Path(run.output_dir)
    if RANK == 0:
        prepare(output_dir)
    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    if not on_gpu:
        limit_memory()
    seconds = {}

    def of_grid():
        with stage(seconds, "grid"):
            return solve_grid(economy, grid_config, progress=True) if grid_config else None

    if run.evaluate:
        network = load(output_dir / WEIGHTS, run.device, run.compile, settings)
    if run.preset != "paper":
        print(f"preset {run.preset} departs from the authors' game_nn_n50:")
        print("  " + ", ".join(departures(cfg, PRESETS["paper"])))
    # on a GPU the processor has nothing to do until the networks are judged
    with beside(of_grid) if on_gpu and RANK == 0 else nullcontext(of_grid) as of_grid:
        if not run.evaluate:
            with stage(seconds, "training_with_checkpoints"):
                network = solve(economy, cfg, seed=run.seed, device=run.device, compile=run.compile, resume=run.resume,
                                cuda_graphs=run.cuda_graphs, output_dir=output_dir, calibration=calibration)
        if RANK > 0:
            return 0
        grid = of_grid()
    grid = grid and grid.to(network.device)
    with stage(seconds, "accuracy"), torch.no_grad():
        graphs = run.cuda_graphs and network.device.type == "cuda"
        figures, arrays = compare(network, grid, cfg, graphs)
    rows = verdict(figures, economy, cfg)
    with staged(output_dir) as folder:
        with stage(seconds, "results"):
            write_results(folder, network, grid, figures, arrays, cfg)
        history, moving = network.weights["history"], still_moving(network.weights)
        seconds["training"] = sum(history["seconds"])
        device = network.device.type
        versions = {module.__name__: module.__version__ for module in (torch, np, scipy, matplotlib)}
        metrics = {
            **figures, "verdict": [dict(zip(COLUMNS, row)) for row in rows], "calibration": calibration,
            "economy": economy_dict(economy), "config": dataclasses.asdict(cfg),
            "grid_config": grid_config and dataclasses.asdict(grid_config), "seed": network.weights["seed"],
            "convergence": {"converged": None if cfg.optimizer == "adam" else not moving, "still_moving": moving,
                            "settled": network.weights["settled"], "iterations": len(history["seconds"]),
                            "movement": history["movement"], "euler": history["euler"]},
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            "version": __version__, "versions": {"python": platform.python_version(), **versions}, "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(device)}
        (folder / "metrics.json").write_text(json.dumps(plain(metrics), indent=1, allow_nan=False) + "\n")
    for note in figures["grid"]["notes"] if grid else ():
        print(note)
    if run.preset == "smoke":
        print("sizes this small have no verdict: the installation works; the default preset solves the economy")
    else:
        print_verdict(rows)
    spent = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("training", "grid", "accuracy"))
    print(f"\n{spent}; results in {output_dir.resolve()}: open distribution_validation.png first")
    if run.preset == "smoke":
        return 0
    if cfg.optimizer == "adam":
        print("whether adam has converged is not known: look at figures/training_history.png")
    elif moving:
        print(f"not converged: {moving}; go on with --resume --iterations {2 * len(history['seconds'])}")
    else:
        print(f"converged: savings had settled after {network.weights['settled']} outer iterations")
    return int(any(row[-1] is False for row in rows) if run.evaluate else bool(moving))


def plain(x):
    """Nested figures as JSON has them: arrays as lists, what is not finite as null."""
    text = json.dumps(x, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda not_finite: None)


def main(argv: List[str] | None = None, economy=krusell_smith, calibration=Calibration,
         config: Config = PRESETS["default"]) -> int:
    """The command line of any economy: economy is an Economy, or a function that makes one of a calibration, a
    dataclass whose fields, made by option(), become flags; config is its default preset. Returns 0 done, 1 an accuracy
    figure fails in --evaluate, 2 a user's error, 130 / 143 interrupted."""
    Interrupted.script = "deepham_ks.py" if economy is krusell_smith else sys.argv[0]
    with contextlib.redirect_stdout(io.StringIO()) if RANK else nullcontext():
        return exit_status(lambda argv: work(parse(argv, economy, calibration, config)),
                           sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
