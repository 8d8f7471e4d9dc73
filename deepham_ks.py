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

Commands:
  python deepham_ks.py                    # the default preset, results in this folder
  python deepham_ks.py --preset smoke     # every size tiny, a test of the installation
  python deepham_ks.py --evaluate         # rebuild every result from NN_weights_biases.pth
  python deepham_ks.py --resume           # continue a run that was stopped
  python deepham_ks.py --help             # every number of the model and the method is a flag

Symbols: k, c, m capital, consumption, cash on hand of a household; K mean capital; R, w gross return and wage; s and z
are integer indices into the tables; `_next` is a prime. Shapes: B economies, N households of each, M households of a
roll-out, T periods, P parameters, J successors of a state. A policy is any function (k, s, K, z) -> k'.
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
import types
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

__version__ = "2.2.0"

# ---------------------------------------------------------------------------------------------- configuration


def option(default, reason: str, within: str = "(-inf, inf)", choices=None):
    """A dataclass field that is also a command-line flag; reason is its --help text, within an interval."""
    return field(default=default, metadata={"help": reason, "within": within, "choices": choices})


class UserError(RuntimeError):
    """What is wrong, the flag or table and the cure, in one line; main() prints it and returns 2."""

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

    n_agents: int = option(125, "N, households an economy", "[1, 1e7]")
    n_economies: int = option(32, "B, economies simulated side by side, each on its own path of z", "[1, 1e6]")
    periods: int = option(300, "periods that each outer iteration simulates on from the last panel", "[2, 1e6]")
    systematic: bool = option(True, "spread shocks to s evenly over households: less sampling noise in K")
    horizon: int = option(150, "T, periods of utility before the value network takes over", "[2, 1e5]")
    batch: int = option(1536, "M, households in a roll-out", "[2, 1e7]")
    states: int = option(6, "periods of a roll-out to learn from, close to each other at its start", "[1, 1e5]")
    iterations: int = option(120, "outer iterations at most: policy step, value step, simulate, roll out", "[1, 1e6]")
    hidden: int = option(32, "width of the two tanh layers of both networks", "[1, 1024]")
    optimizer: str = option(
        "gauss-newton", "gauss-newton needs tens of steps where adam needs thousands", choices=("gauss-newton", "adam")
    )
    policy_rate: float = option(0.6, "gauss-newton: share of the Newton step of log c. adam: rate", "(0, 1]")
    momentum: float = option(0.4, "gauss-newton: share of the last policy step in the next one", "[0, 1)")
    value_rate: float = option(1e-3, "adam: rate of the value network", "(0, 1]")
    policy_steps: int = option(1, "adam: policy steps an outer iteration", "[1, 1e6]")
    value_steps: int = option(1, "adam: value steps an outer iteration", "[1, 1e6]")
    settle: float = option(
        1e-4, "gauss-newton: steps are full until savings have moved less than this share of K ten times", "(0, 1)"
    )
    averaging: int = option(
        26, "gauss-newton: iterations from there on, in which steps fall like 1 / (1 + decay n)", "[0, 1e6]"
    )
    decay: float = option(0.25, "gauss-newton: how fast they fall: in these they average noise out", "[0, 1e3]")
    damping: float = option(1e-4, "gauss-newton: least damping of the policy step, of the mean diagonal", "(0, 1e6]")
    slope_weight: float = option(
        1.0, "weight of V_k against the costates; 0 fits the value to utility alone", "[0, 1e6]"
    )
    level_weight: float = option(
        0.3, "weight of V against realised utility, in units of the network's output", "(0, 1e6]"
    )
    control_variate: bool = option(True, "take out of the labels the surprises whose mean is exactly zero")
    final_value_steps: int = option(
        4, "gauss-newton: last iterations, in which V is fitted to the final policy by its Bellman residual", "[0, 1e6]"
    )
    wide_share: float = option(0.5, "share of roll-outs that start anywhere in the simulated range of k", "[0, 1]")
    wide_top: float = option(1.5, "upper end of these, in multiples of the largest simulated k", "(0, 100]")
    even_share: float = option(
        1.0, "share of roll-outs that start in any s alike: rare states hold most of the error", "[0, 1]"
    )
    K_spread: float = option(
        0.1, "economies are scaled by up to this share before each simulation: K off its usual path", "[0, 0.9]"
    )
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
    irf_periods: int = option(60, "periods of an impulse response", "[1, 1e5]")
    irf_burn: int = option(400, "periods before the shock", "[1, 1e6]")


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
    periods: int = option(12_000, "periods simulated for the law of motion; a fifth of them at first", "[50, 1e7]")
    burn_in: int = option(200, "first periods that the regression leaves out", "[1, 1e7]")
    sweeps: int = option(100, "most EGM sweeps between two updates of the law of motion", "[1, 1e6]")
    damping: float = option(0.5, "weight of the new law of motion; above 0.8 it cycles", "(0, 1]")
    tolerance: float = option(3e-7, "largest relative change of c, and of K' forecast, at the end", "(0, 1)")
    max_updates: int = option(90, "updates of the law of motion before giving up", "[1, 1e6]")
    value_sweeps: int = option(4000, "most sweeps for V of the policy", "[1, 1e7]")
    seed: int = option(0, "seed of the path of z behind the law of motion", "[0, 1e9]")


# Maliar, Maliar & Valli (2010): 100 nodes of k with exponent 7, 4 nodes of K, for Krusell & Smith [0, 1000] x [30, 50]
GRIDS = {"converged": GridConfig(), "published": GridConfig(n_k=100, exponent=7.0, n_K=4, K_low=0.76, K_high=1.27)}
SMOKE_GRID = GridConfig(n_k=100, n_K=6, n_k_fine=300, n_K_fine=11, periods=2000, burn_in=50, tolerance=1e-5)

PRESETS = {
    "default": Config(),
    # game_nn_n50 of the authors' code, as far as this script has the choice
    "paper": Config(n_agents=50, n_economies=384, periods=450, batch=384, states=10_000, iterations=6, averaging=0,
                    hidden=24, optimizer="adam", policy_rate=4e-4, value_rate=1e-4, policy_steps=2000, value_steps=2000,
                    slope_weight=0.0, level_weight=1.0, K_spread=0.0, systematic=False, control_variate=False,
                    wide_share=0.0, even_share=0.0),
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
    grid: str = option("converged", "the grid solution that judges; published is Maliar, Maliar & Valli's (2010); "
                       "none judges by Euler and Bellman errors alone", choices=(*GRIDS, "none"))
    equilibrium: str = option("", "who decides: households that take prices as given (market), each household of a "
                              "game of --players, or a constrained planner for all; empty: as the economy says",
                              choices=("", *EQUILIBRIA))
    players: int = option(0, "households of the game; 0: as the economy says", "[0, 1e9]")
    start: float = option(0.0, "where the planner's solution begins, a multiple of steady-state capital: there can be "
                          "two local optima; 0: as the economy says", "[0, 100]")
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
    s_names: tuple = ()  # for legends
    z_names: tuple = ()
    equilibrium: str = "market"  # or "game", "planner": see Delta()
    players: int = 50  # of the game
    start: float = 1.0  # where a planner's solution begins, a multiple of K_ss: it can have two local optima

    def __post_init__(self):
        Z, S = self.fill_in()
        self.check_numbers()
        self.check_chain(Z, S)
        gap = self.earned / self.L - 1
        if np.abs(gap).max() > 1e-6:
            z = np.abs(gap).argmax()
            raise UserError(f"income: in z = {z} households earn {1 + gap[z]:.6g} wages for each unit of labour L; "
                            "change income or L, or leave L out")

    def fill_in(self) -> Tuple[int, int]:
        """Tables as float64 arrays of full shape, those left out at their defaults; (Z, S)."""
        try:
            Z, S = np.atleast_1d(self.TFP).shape[0], np.array(self.income, np.float64).shape[-1]
        except (IndexError, TypeError, ValueError):
            raise UserError("income: give a table (Z, S) of numbers, and TFP (Z,)") from None
        shapes = {"TFP": (Z,), "P_z": (Z, Z), "Pi": (Z, Z, S, S), "beta": (S,), "income": (Z, S), "weight": (S,),
                  "L": (Z,), "shares": (Z, S), "sees_s": (S, -1), "sees_z": (Z, -1)}
        even = np.linspace(-1, 1, Z)[:, None] if Z > 1 else np.zeros((1, 0))
        defaults = {"sees_s": np.eye(S), "sees_z": even}
        for name, shape in shapes.items():
            table = getattr(self, name)
            table = defaults.get(name) if table is None else table
            if table is not None:
                try:
                    table = np.array(table, np.float64)
                    shape = table.shape if -1 in shape and table.ndim == 2 and len(table) == shape[0] else shape
                    table = np.broadcast_to(table, shape).copy()
                except (TypeError, ValueError):
                    raise UserError(f"{name}: give a table {shape}; Z = {Z} by TFP, S = {S} by income") from None
            object.__setattr__(self, name, table)
        for name, n, letter in (("s_names", S, "s"), ("z_names", Z, "z")):
            names = tuple(getattr(self, name)) or tuple(f"{letter} = {i}" for i in range(n))
            object.__setattr__(self, name, names)
            if len(names) != n:
                raise UserError(f"{name}: {len(names)} names for {n} states")
        return Z, S

    def check_numbers(self):
        for name in ("TFP", "P_z", "Pi", "beta", "income", "weight", "sees_s", "sees_z"):
            if not np.isfinite(getattr(self, name)).all():
                raise UserError(f"{name}: not a finite number everywhere")
        for name, least in (("TFP", 0), ("beta", 0), ("weight", 0)):
            if not (getattr(self, name) > least).all():
                raise UserError(f"{name}: give numbers above {least}")
        if self.equilibrium not in EQUILIBRIA:
            raise UserError(f"equilibrium: {self.equilibrium!r} is none of {', '.join(EQUILIBRIA)}")
        bounds = {"alpha": (0, 1), "delta": (0, 1 + 1e-12), "gamma": (0, 100), "start": (0, 1000), "players": (1, 1e12)}
        for name, (low, high) in bounds.items():
            if not low < getattr(self, name) < high:
                raise UserError(f"{name}: {getattr(self, name)} is not in ({low:g}, {high:g})")
        if (self.income < 0).any():
            raise UserError("income: give shares of the wage of at least 0")
        for name in ("P_z", "Pi"):
            P = getattr(self, name)
            if (P < -1e-12).any() or np.abs(P.sum(-1) - 1).max() > 1e-9:
                raise UserError(f"{name}: rows must be probabilities that sum to one, and one has "
                                f"{P.sum(-1).flat[np.abs(P.sum(-1) - 1).argmax()]:.9g}, least {P.min():.3g}")

    def check_chain(self, Z: int, S: int):
        """Shares, discount factors, what the networks see, and the borrowing limit: all follow from the chain."""
        P = self.P.reshape(Z * S, Z * S)
        sizes = np.sort(np.abs(np.linalg.eigvals(P)))[::-1]
        ergodic = len(sizes) == 1 or sizes[1] < 1 - 1e-10
        if self.shares is None and not ergodic:
            raise UserError("P_z, Pi: the chain of (z, s) is not ergodic; give the shares it starts and stays with")
        if self.shares is None:
            equations = np.vstack([P.T - np.eye(Z * S), np.ones(Z * S)])
            shares = np.linalg.lstsq(equations, np.append(np.zeros(Z * S), 1.0), rcond=None)[0].clip(0)
            object.__setattr__(self, "shares", (shares / shares.sum()).reshape(Z, S))
        x = self.shares.reshape(-1)
        if not ((x >= 0).all() and abs(x.sum() - 1) < 1e-9 and np.abs(x @ P - x).max() < 1e-9):
            raise UserError("shares: not a stationary distribution of P_z and Pi")
        if self.L is None:
            object.__setattr__(self, "L", self.earned)
        if not ((self.L > 0) & np.isfinite(self.L)).all():
            raise UserError("L: give labour supplies above 0 (or income, which they follow from)")
        if self.mean_beta < 1 and not 1e-6 < self.K_ss < 1e9:
            raise UserError(f"alpha, beta, delta: steady-state capital is {self.K_ss:.3g}; bring it into (1e-6, 1e9) "
                            "by lower --alpha or --beta, or higher --delta")
        discounted = np.abs(np.linalg.eigvals(np.tile(self.beta, Z)[:, None] * P)).max()
        if discounted >= 1 or self.mean_beta >= 1:
            raise UserError(f"beta: utility discounted along the chain grows by {discounted:.6g} a period, so wealth "
                            "has no bound; lower it")
        alike = np.concatenate([self.beta[:, None], self.income.T, self.Pi.transpose(2, 0, 1, 3).reshape(S, -1)], 1)
        for s in range(S):
            for other in range(s):
                if (self.sees_s[s] == self.sees_s[other]).all() and (alike[s] != alike[other]).any():
                    raise UserError(f"sees_s: the networks cannot tell s = {other} from s = {s}, which differ")
        if len(np.unique(self.sees_z, axis=0)) < Z:
            raise UserError("sees_z: the networks cannot tell two states z apart")
        poorest = (self.R_ss - 1) * self.k_min + self.income.min() * self.w_ss
        if poorest < 0 or not np.isfinite(self.k_min) or self.k_min >= self.K_ss:
            raise UserError(f"k_min: at {self.k_min:g} the poorest have {poorest:.3g} after interest at steady-state "
                            "prices; bring it nearer to 0")

    @property
    def P(self) -> np.ndarray:
        """(Z, S, Z, S) P(z', s' | z, s) = P_z(z' | z) Pi(s' | z, z', s)."""
        return np.einsum("xy,xyij->xiyj", self.P_z, self.Pi)

    @property
    def earned(self) -> np.ndarray:
        """(Z,) mean income, in wages."""
        return (self.shares * self.income).sum(1) / self.shares.sum(1)

    @property
    def mean_beta(self) -> float:
        return float(self.shares.sum(0) @ self.beta)

    # The representative household at mean TFP and labour, where mean_beta R = 1: units for the networks, and a start.
    @property
    def representative(self):
        """What prices() and output() need of an economy with mean TFP and labour."""
        z = self.shares.sum(1)
        return types.SimpleNamespace(alpha=self.alpha, delta=self.delta, TFP=[z @ self.TFP], L=[z @ self.L])

    @property
    def R_ss(self) -> float:
        return 1 / self.mean_beta

    @property
    def K_ss(self) -> float:
        mean = self.representative
        ratio = (self.alpha * mean.TFP[0] / (self.R_ss - 1 + self.delta)) ** (1 / (1 - self.alpha))
        return float(mean.L[0] * ratio)

    @property
    def w_ss(self) -> float:
        return float(prices(self.K_ss, 0, self.representative)[1])

    @property
    def c_ss(self) -> float:
        return float(output(self.K_ss, 0, self.representative) - self.delta * self.K_ss)

    @property
    def K_start(self) -> float:
        return self.K_ss * (self.start if self.equilibrium == "planner" else 1.0)

    @property
    def Delta_start(self) -> float:
        """What the planner's Delta would be if the representative household kept K where solutions start: u'(c) =
        beta (R u'(c) + Delta)."""
        K = self.K_start
        c = np.maximum(output(K, 0, self.representative) - self.delta * K, 0.1 * self.c_ss)
        return float((self.R_ss - prices(K, 0, self.representative)[0]) * marginal_utility(c, self))

    @property
    def annuity(self) -> np.ndarray:
        """(Z, S) D = 1 + beta E D': the present value of one util a period for ever."""
        P = self.P.reshape(self.income.size, -1)
        beta = np.tile(self.beta, len(self.TFP))
        return np.linalg.solve(np.eye(len(P)) - beta[:, None] * P, np.ones(len(P))).reshape(self.income.shape)

    def tables(self, device="cpu", dtype=torch.float64) -> Tables:
        """What the tensor functions use, on one device."""
        Z, S = self.income.shape
        P = self.P.reshape(Z * S, Z * S)
        successors, real = padded([np.flatnonzero(row) for row in P])  # (Z S, J)
        reach, possible = padded([np.flatnonzero(self.Pi[:, :, s].reshape(-1, S).any(0)) for s in range(S)])  # (S, n)
        own = np.take_along_axis(self.Pi, np.broadcast_to(reach, (Z, Z, *reach.shape)), 3) * possible
        sees = np.concatenate([np.tile(self.sees_s, (Z, 1)), np.repeat(self.sees_z, S, 0)], 1)
        integers = {"next_s": successors % S, "next_z": successors // S, "reach": reach}
        real_tables = {"TFP": self.TFP, "L": self.L, "beta": self.beta, "income": self.income.reshape(-1),
                       "cum_z": self.P_z.cumsum(1)[:, :-1],
                       "cum_s": own.cumsum(-1)[..., :-1].reshape(Z * Z * S, reach.shape[1] - 1),
                       "probability": np.take_along_axis(P, successors, 1) * real,
                       "annuity": self.annuity.reshape(-1), "sees": sees, "root_weight": np.sqrt(self.weight),
                       "shares": self.shares, "K_mean": np.array(self.K_start),
                       "Delta_law": np.tile([self.Delta_start, 0.0], (Z, 1))}
        tensors = {name: torch.tensor(table, device=device, dtype=dtype) for name, table in real_tables.items()}
        tensors |= {name: torch.tensor(table, device=device) for name, table in integers.items()}
        numbers = (self.alpha, self.delta, self.gamma, self.k_min, self.K_ss, self.c_ss, 8.0, 0.1, self.players)
        return Tables(self.equilibrium, *map(float, numbers), **tensors)


def padded(lists: list) -> Tuple[np.ndarray, np.ndarray]:
    """Lists of unequal length as one table, each filled up with its last entry, and which entries are its own."""
    lengths = np.array([len(row) for row in lists])
    table = np.array([np.append(row, np.full(lengths.max() - len(row), row[-1])) for row in lists])
    return table, np.arange(lengths.max()) < lengths[:, None]


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
    K_mean: Tensor  # () centre of the input ln K; follows the simulation while training, and so does
    Delta_law: Tensor  # (Z, 2) the planner's Delta on (1, ln K) by z


def tables_on(econ: Tables, device) -> Tables:
    return Tables(*[x.to(device) if isinstance(x, Tensor) else x for x in econ])


def employment_transition(cal: Calibration) -> np.ndarray:
    """P(employed' | z, z', s) of Krusell & Smith (1998): unemployment durations by z, persistence 1.25 and 0.75
    times the new state's when z changes, and an unemployment rate that depends on z alone."""
    u = np.array([cal.u_bad, cal.u_good])
    stay = 1 - 1 / np.array([cal.u_duration_bad, cal.u_duration_good])
    p_uu = np.array([[stay[0], 0.75 * stay[1]], [1.25 * stay[0], stay[1]]])  # (z, z')
    p_eu = (u - u[:, None] * p_uu) / (1 - u[:, None])
    return 1 - np.stack([p_uu, p_eu], axis=-1)


def krusell_smith(cal: Calibration = Calibration()) -> Economy:
    """s: 0 unemployed / 1 employed; z: 0 bad / 1 good; a tax on wages pays the benefits."""
    u = np.array([cal.u_bad, cal.u_good])
    L = cal.l_bar * (1 - u)
    stay = 1 - 1 / cal.z_duration
    employed = employment_transition(cal)
    if not ((employed >= 0) & (employed <= 1)).all():
        raise UserError("--u-bad, --u-good, --u-duration-bad, --u-duration-good imply a probability outside "
                        "[0, 1]; bring the two rates closer together or change the durations")
    if (cal.mu * u >= L).any():
        raise UserError("--mu, --u-bad, --u-good and --l-bar imply a tax of 100% or more; lower --mu")
    return Economy(
        alpha=cal.alpha, delta=cal.delta, gamma=cal.gamma, beta=cal.beta,
        TFP=[1 - cal.tfp_shock, 1 + cal.tfp_shock], L=L, P_z=[[stay, 1 - stay], [1 - stay, stay]],
        Pi=np.stack([1 - employed, employed], -1),
        income=np.stack([np.full(2, cal.mu), cal.l_bar * (1 - cal.mu * u / L)], 1), shares=np.stack([u, 1 - u], 1) / 2,
        sees_s=[[-1], [1]], sees_z=[[-1], [1]], weight=[3, 1],
        s_names=("unemployed", "employed"), z_names=("bad state", "good state"))


# ---------------------------------------------------------------------------------------------- shocks


def joint(s: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Row of (z, s) in the tables."""
    return z * econ.beta.shape[0] + s


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
    row = joint(s, z * econ.TFP.shape[0] + z_next, econ)
    return econ.reach[s, draw(u, econ.cum_s[row])]


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


def spread_uniform(s: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform numbers (B, N), independent over time for a household but evenly spread over the households of an
    economy in the same s (golden-ratio steps from a random start): as many leave as in a far larger economy."""
    rank = s.argsort(dim=1, stable=True).argsort(dim=1)
    spread = (rank * 2654435769 % 2**32).to(torch.float32) / 2**32  # rank times the golden ratio, modulo 1
    return (spread + uniform((len(s), 1), rng, s.device)) % 1.0


def draw_shocks(s: Tensor, z: Tensor, periods: int, econ: Tables, rng: torch.Generator, systematic: bool = False):
    """Paths s (periods + 1, B, N) and z (periods + 1, B, 1) from s (B, N), z (B, 1)."""
    s_path, z_path = s.new_empty(periods + 1, *s.shape), z.new_empty(periods + 1, *z.shape)
    s_path[0], z_path[0] = s, z
    for t in range(periods):
        z_next = draw_z(uniform(z.shape, rng, z.device), z_path[t], econ)
        draws = spread_uniform(s_path[t], rng) if systematic else uniform(s.shape, rng, s.device)
        s_path[t + 1], z_path[t + 1] = draw_s(draws, z_path[t], z_next, s_path[t], econ), z_next
    return s_path, z_path


# ---------------------------------------------------------------------------------------------- household


def prices(K: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """Gross return R and wage w, marginal products of Y = TFP K^alpha L^(1-alpha); any common shape."""
    ratio = K / econ.L[z]
    R = 1 - econ.delta + econ.alpha * econ.TFP[z] * ratio ** (econ.alpha - 1)
    w = (1 - econ.alpha) * econ.TFP[z] * ratio**econ.alpha
    return R, w


def output(K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Y = TFP K^alpha L^(1-alpha)."""
    return econ.TFP[z] * K**econ.alpha * econ.L[z] ** (1 - econ.alpha)


def cash_on_hand(k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tuple[Tensor, Tensor]:
    """m = R k + income(z, s) w, what c + k' is paid from; returns (m, R)."""
    R, w = prices(K, z, econ)
    return R * k + econ.income[joint(s, z, econ)] * w, R


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


def features(k: Tensor, s: Tensor, m: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """Inputs of both networks, (...) -> (..., N_OWN + F + G). Log cash on hand carries the curvature, log capital what
    is left of it where the limit is near and cash hardly moves with k; the third is bounded."""
    above, rest = (m - econ.k_min).clamp(min=1e-6 * econ.c_ss), (k - econ.k_min).clamp(min=0.0)
    own = [torch.log(above / (econ.K_ss + econ.c_ss)), torch.log(rest / econ.c_ss + 0.1) / 3, rest / (rest + econ.K_ss),
           (econ.K_scale * torch.log(K / econ.K_mean)).expand_as(k)]
    return torch.cat([torch.stack(own, -1), econ.sees[joint(s, z, econ)]], -1)


def feature_slopes(k: Tensor, m: Tensor, R: Tensor, econ: Tables) -> Tensor:
    """d features / dk: (...) -> (..., N_OWN + F + G)."""
    above, rest = (m - econ.k_min).clamp(min=1e-6 * econ.c_ss), (k - econ.k_min).clamp(min=0.0)
    own = [R / above, 1 / (rest + 0.1 * econ.c_ss) / 3, econ.K_ss / (rest + econ.K_ss) ** 2, torch.zeros_like(k)]
    zeros = torch.zeros(k.shape + econ.sees.shape[1:], dtype=k.dtype, device=k.device)
    return torch.cat([torch.stack(own, -1), zeros], -1)


def n_inputs(econ: Tables) -> int:
    return N_OWN + econ.sees.shape[1]


def layer_shapes(n: int, H: int) -> List[tuple]:
    """W1, b1, W2, b2, w3, b3 of a network with n inputs and two layers of H units."""
    return [(H, n), (H,), (H, H), (H,), (H,), ()]


def unpack(theta: Tensor, H: int) -> List[Tensor]:
    """Layers W1 (H, n), b1, W2 (H, H), b2, w3 (H,), b3 as views of the parameter vector theta (P,)."""
    shapes = layer_shapes((theta.numel() - 1) // H - H - 3, H)
    parts = torch.split(theta, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


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


def saved_share(f: Tensor) -> Tensor:
    """1 - min(1, exp f): nothing is saved, k' = k_min, exactly where the network is positive."""
    return 1 - torch.exp(f.clamp(max=0.0))


def network_capital(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """k' of the policy network; K and z broadcast against k and s."""
    m, _ = cash_on_hand(k, s, K, z, econ)
    return econ.k_min + saved_share(network(policy, features(k, s, m, K, z, econ))) * (m - econ.k_min)


def consumption_and_slope(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
                          econ: Tables) -> Tuple[Tensor, Tensor]:
    """c and dc/dk of the policy network at the states of a path, (T, M); a few periods at a time stay in the cache."""
    c, dc = torch.empty_like(k), torch.empty_like(k)
    chunk = 4
    for t in range(0, k.shape[0], chunk):
        k_t, s_t, K_t, z_t = k[t : t + chunk], s[t : t + chunk], K[t : t + chunk], z[t : t + chunk]
        m, R = cash_on_hand(k_t, s_t, K_t, z_t, econ)
        f, f_k = network_and_slope(policy, features(k_t, s_t, m, K_t, z_t, econ), feature_slopes(k_t, m, R, econ))
        share, above = 1 - saved_share(f), m - econ.k_min
        c[t : t + chunk], dc[t : t + chunk] = share * above, torch.where(f < 0, share * (R + above * f_k), R)
    return c, dc


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


def network_value(value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
                  econ: Tables) -> Tuple[Tensor, Tensor]:
    """(V, V_k) of the value network, utility in the units of utility()."""
    m, R = cash_on_hand(k, s, K, z, econ)
    g, g_k = network_and_slope(value, features(k, s, m, K, z, econ), feature_slopes(k, m, R, econ))
    V, V_g = value_of(g, s, z, econ)
    return V, V_g * g_k


# ---------------------------------------------------------------------------------------------- simulation


class Panel(NamedTuple):
    """The cross-section of B economies at one date."""

    k: Tensor  # (B, N)
    s: Tensor  # (B, N)
    z: Tensor  # (B, 1)


AT_ONCE = 2**22  # shocks drawn at once: 32 MB, whatever N is


def initial_panel(B: int, N: int, econ: Tables, rng: torch.Generator, dtype=torch.float32) -> Panel:
    """A dispersed cross-section (from a point mass it would need 2,000 periods to spread): k - k_min is gamma with
    mean K_mean - k_min and half of that as standard deviation, (z, s) at the stationary shares."""
    device, shape, above = econ.TFP.device, (B, N), econ.K_mean - econ.k_min
    gamma = torch._standard_gamma(torch.full(shape, 4.0, device=rng.device), generator=rng).to(device, dtype)
    of_z = econ.shares.sum(1)
    z = draw(uniform((B, 1), rng, device), of_z.cumsum(0)[:-1])
    of_s = (econ.shares / of_z.unsqueeze(1)).cumsum(1)[:, :-1]
    return Panel((gamma * above / 4 + econ.k_min).to(dtype), draw(uniform(shape, rng, device), of_s[z]), z)


def simulate(policies: List[Callable], panel: Panel, periods: int, econ: Tables, rng: torch.Generator,
             systematic: bool = False) -> Iterator:
    """The N-agent economy under each policy on the same shocks, period by period: yields s (B, N), z (B, 1) and for
    each policy (k, K, k') with k, k' (B, N), K (B, 1)."""
    (k, s, z), chunk = panel, max(1, AT_ONCE // panel.s.numel())
    k_of = [k] * len(policies)
    for start in range(0, periods, chunk):
        n = min(chunk, periods - start)
        s_path, z_path = draw_shocks(s, z, n, econ, rng, systematic)
        for t in range(n):
            K_of = [k.mean(1, keepdim=True) for k in k_of]
            k_next = [policy(k, s_path[t], K, z_path[t]) for policy, k, K in zip(policies, k_of, K_of)]
            yield s_path[t], z_path[t], list(zip(k_of, K_of, k_next))
            k_of = k_next
        s, z = s_path[n], z_path[n]


def regress_by_z(y: Tensor, x: Tensor, z: Tensor, still: Tensor) -> Tuple[Tensor, Tensor]:
    """y = a(z) + b(z) x by least squares, float64, over (periods, B): coefficients (Z, 2) and R2 (Z,). Where x does not
    move (one z, say) b is still(z) and R2 is NaN; where z never comes a is NaN as well."""
    here = (z == torch.arange(len(still), device=still.device).view(-1, 1, 1)).double()  # (Z, periods, B)

    def mean(v):
        return (here * v).sum((1, 2)) / here.sum((1, 2))

    x_mean, y_mean = mean(x), mean(y)
    dx, dy = x - x_mean.view(-1, 1, 1), y - y_mean.view(-1, 1, 1)
    moves = mean(dx * dx) > 1e-10
    b = torch.where(moves, mean(dx * dy) / mean(dx * dx), still.double())
    r2 = 1 - mean((dy - b.view(-1, 1, 1) * dx) ** 2) / torch.where(moves, mean(dy * dy), torch.nan)
    return torch.stack([y_mean - b * x_mean, b], 1), r2


def law_of_motion(K_path: Tensor, z_path: Tensor, still: Tensor) -> Tuple[Tensor, Tensor]:
    """ln K' on (1, ln K) by z over paths (periods, B), as regress_by_z() has it."""
    ln_K = torch.log(K_path.double())
    return regress_by_z(ln_K[1:], ln_K[:-1], z_path[:-1], still)


def expected_capital(K_path: Tensor, z_path: Tensor, econ: Tables) -> Tensor:
    """E[K' | K, z] at all but the last date of simulated paths (periods, B); realised K' also has the sampling noise of
    N households in it."""
    alm, _ = law_of_motion(K_path, z_path, torch.zeros_like(econ.TFP))
    return torch.exp(by_law(alm[z_path[:-1]], torch.log(K_path[:-1].double()))).to(K_path.dtype)


# ---------------------------------------------------------------------------------------------- learning


def roll_out(policy: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """k (T + 1, M) of M price-taking households along given paths s, K, z (T + 1, M), from k (M,)."""
    path = torch.empty_like(K)
    path[0] = k
    for t in range(K.shape[0] - 1):
        path[t + 1] = network_capital(policy, path[t], s[t], K[t], z[t], econ)
    return path


def value_and_costate(policy: List[Tensor], value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
                      econ: Tables) -> Tuple[Tensor, Tensor]:
    """V of the value network and, by the envelope condition, V_k = R u'(c) + Delta of the policy network: sharper than
    the slope of V, as the policy network has the kink of the borrowing limit."""
    m, R = cash_on_hand(k, s, K, z, econ)
    x = features(k, s, m, K, z, econ)
    u_prime = marginal_utility((1 - saved_share(network(policy, x))) * (m - econ.k_min), econ)
    return value_of(network(value, x), s, z, econ)[0], R * u_prime + expected_Delta(u_prime, k, s, K, z, econ)


def surprises(policy: List[Tensor], value: List[Tensor], k: Tensor, s: Tensor, K: Tensor, z: Tensor,
              K_next: Tensor, econ: Tables) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Control variates, (T, M) from paths (T + 1, M) and K_next = E[K' | K, z] (T, M): V(k', s', K', z') as it came
    less its expectation, and the same of V_k. Their mean is zero, and they carry nearly all the noise of the realised
    utility and of the costate: that of s' and z', and that of K', which N households leave. Then V and V_k as they
    came."""
    T = k.shape[0] - 1
    surprise, surprise_k, came, came_k = [torch.empty_like(k[:T]) for _ in range(4)]
    chunk = 2  # periods at a time: memory on a GPU, cache on a CPU
    for t in range(0, T, chunk):
        last = min(t + chunk, T)
        s_t, z_t = s[t:last], z[t:last]
        k_came, K_came = k[t + 1 : last + 1], K[t + 1 : last + 1]
        s_came, z_came = s[t + 1 : last + 1], z[t + 1 : last + 1]
        k1, s1, K1, z1 = successors(k_came, s_t, K_next[t:last], z_t, econ)
        V, V_k = value_and_costate(policy, value, k1, s1, K1, z1, econ)
        came[t:last], came_k[t:last] = value_and_costate(policy, value, k_came, s_came, K_came, z_came, econ)
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
    lost = 1 - 1 / growth.clamp(min=1.0)
    most = torch.where(came_k == 0, math.inf, (came_k - surprise_k).abs())
    U, lam, lam_next = torch.empty_like(c), torch.empty_like(c), torch.empty_like(c)
    U_t, lam_t = V_T, V_k_T
    for i in range(c.shape[0]):
        t = c.shape[0] - 1 - i
        rest = (1 - lost[t]) * (lam_t - came_k[t])
        lam_next[t] = came_k[t] - surprise_k[t] + torch.minimum(torch.maximum(rest, -most[t] / 2), most[t])
        U_t = u[t] + beta[t] * (U_t - surprise[t] - lost[t] * (U_t - came[t]))
        lam_t = u_k[t] + beta[t] * (R[t] - dc[t]) * lam_next[t]
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


def sample_households(panel: Panel, K_path: Tensor, K_next: Tensor, z_path: Tensor, k_range: Tensor, econ: Tables,
                      cfg: Config, rng: torch.Generator) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Initial k (M,), paths s, K, z (T + 1, M) and E[K' | K, z] (T, M): windows of the simulated economies
    (periods, B), s drawn anew. A share of the households starts anywhere in the simulated range of k (2,) and a little
    beyond: the ergodic set of a wrong policy never visits the tails that decide the distribution."""
    M, device = cfg.batch, K_path.device
    economy = torch.randint(K_path.shape[1], (M,), generator=rng, device=device)
    start = torch.randint(K_path.shape[0] - cfg.horizon, (M,), generator=rng, device=device)
    window = start + torch.arange(cfg.horizon + 1, device=device).unsqueeze(1)
    K, z = K_path[window, economy], z_path[window, economy]
    start_wide, start_even, drawn = uniform((3, M), rng, device)
    household = torch.randint(panel.k.numel(), (M,), generator=rng, device=device)
    poorest = k_range[0] - econ.k_min
    low, unit = poorest / 10, poorest.clamp(min=0.1 * econ.c_ss)
    high = torch.maximum(cfg.wide_top * k_range[1], 5 * econ.K_mean) - econ.k_min  # at first the panel is too narrow
    wide = econ.k_min + low + unit * ((1 + (high - low) / unit) ** drawn - 1)  # log-uniform: dense near the poorest
    k = torch.where(start_wide < cfg.wide_share, wide, panel.k.flatten()[household])
    any_s = torch.randint(econ.beta.shape[0], (M,), generator=rng, device=device)
    s = torch.where(start_even < cfg.even_share, any_s, panel.s.flatten()[household])
    s_path = torch.empty_like(z)
    s_path[0] = s
    shocks = uniform(z.shape, rng, device)
    for t in range(cfg.horizon):
        s_path[t + 1] = draw_s(shocks[t], z[t], z[t + 1], s_path[t], econ)
    return k, s_path, K, z, K_next[window[:-1], economy]


def roll_out_batch(policy: List[Tensor], value: List[Tensor], paths, econ: Tables, cfg: Config,
                   kernels: Kernels) -> Batch:
    """Forward along the paths, backward with utilities and costates."""
    k0, s, K, z, K_next = paths
    k = kernels.roll_out(policy, k0, s, K, z, econ)
    c, dc = kernels.consumption_and_slope(policy, k[:-1], s[:-1], K[:-1], z[:-1], econ)
    V_T, V_k_T = kernels.network_value(value, k[-1], s[-1], K[-1], z[-1], econ)
    surprise = [torch.zeros_like(c)] * 4
    if cfg.control_variate:
        surprise = kernels.surprises(policy, value, k, s, K, z, K_next, econ)
    k, s, K, z = k[:-1], s[:-1], K[:-1], z[:-1]
    R, _ = prices(K, z, econ)
    Delta = expected_Delta(marginal_utility(c, econ), k, s, K, z, econ)
    labels = kernels.costates(c, dc, k, s, R, Delta, V_T, V_k_T, *surprise, econ)
    return Batch(k, s, K, z, K_next, c, *labels)


def worth_of_saving(batch: Batch, econ: Tables) -> Tensor:
    """beta lambda' / u'(c): one where the first-order condition holds."""
    return econ.beta[batch.s] * batch.lam_next / marginal_utility(batch.c, econ)


def policy_residual(batch: Batch, econ: Tables) -> Tensor:
    """ln(c~ / c) with u'(c~) = beta lambda', within half a unit: how far log c is from its first-order condition."""
    worth = worth_of_saving(batch, econ).clamp(min=1e-6) * marginal_utility(batch.c, econ)
    return torch.log(inverse_marginal_utility(worth, econ) / batch.c).clamp(-0.5, 0.5)


def add_gram(A: Tensor, jacobian: Tensor) -> None:
    """A += jacobian' jacobian in the lower triangle and the blocks on the diagonal, which is all that a Cholesky factor
    is made of: five eighths of the work."""
    P = len(A)
    for block in range(4):
        low, high = P * block // 4, P * (block + 1) // 4
        A[low:high, :high].addmm_(jacobian[:, low:high].T, jacobian[:, :high])


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
            add_gram(A, jacobian)
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


class Inputs(NamedTuple):
    """The states of a batch as both networks and all three least-squares problems see them."""

    m: Tensor  # (n,)
    x: Tensor  # (n, inputs)
    dx: Tensor  # (n, inputs)
    weight: Tensor  # (n,) square root of the weight


def inputs_of(batch: Batch, econ: Tables) -> Inputs:
    m, R = cash_on_hand(batch.k, batch.s, batch.K, batch.z, econ)
    x, dx = features(batch.k, batch.s, m, batch.K, batch.z, econ), feature_slopes(batch.k, m, R, econ)
    return Inputs(m, x, dx, econ.root_weight[batch.s])


def value_targets(batch: Batch, econ: Tables) -> Tuple[Tensor, Tensor, Tensor]:
    """What g and dg/dk should be for V = U and V_k = lambda, and V_g / u'(c), which makes slopes unit-free."""
    g = equivalent_of(batch.U, batch.s, batch.z, econ)
    _, V_g = value_of(g, batch.s, batch.z, econ)
    return g, batch.lam / V_g, V_g / marginal_utility(batch.c, econ)


def utility_level(layers: List[Tensor], at: Inputs, batch: Batch, econ: Tables, kernels: Kernels):
    """How far g is from realised utility, a function of layers and g, and minus its derivative, of a slice."""
    g_target, _, _ = value_targets(batch, econ)
    return lambda _, g: g_target - g, lambda part: kernels.network_jacobian(layers, at.x[part])


def bellman_level(layers: List[Tensor], at: Inputs, batch: Batch, econ: Tables, kernels: Kernels):
    """The same of the Bellman residual u(c) + Delta k + beta E V(s') - V(s) of the policy as it is for ever: an exact
    sum, with nothing to average, but 1 - beta small, so by 1 / (1 - beta) heavier."""
    here, beta = joint(batch.s, batch.z, econ), econ.beta[batch.s]
    u_prime = marginal_utility(batch.c, econ)
    flow = utility(batch.c, econ) + expected_Delta(u_prime, batch.k, batch.s, batch.K, batch.z, econ) * batch.k
    k1, s1, K1, z1 = successors(at.m - batch.c, batch.s, batch.K_next, batch.z, econ)
    x1 = features(k1, s1, cash_on_hand(k1, s1, K1, z1, econ)[0], K1, z1, econ)
    V_g = value_of(network(layers, at.x), batch.s, batch.z, econ)[1]
    unit = econ.annuity[here] / V_g
    P = econ.probability[here].T * beta * unit * value_of(network(layers, x1), s1, z1, econ)[1]

    def gap(layers, g):
        V1 = value_of(network(layers, x1), s1, z1, econ)[0]
        return unit * (flow + beta * expected(V1, batch.s, batch.z, econ) - value_of(g, batch.s, batch.z, econ)[0])

    def jacobian(part):
        out = (unit * V_g)[part].unsqueeze(1) * kernels.network_jacobian(layers, at.x[part])
        for j in range(len(P)):
            out -= P[j, part].unsqueeze(1) * kernels.network_jacobian(layers, x1[j, part])
        return out

    return gap, jacobian


def value_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Tables, cfg: Config,
               kernels: Kernels, bellman: bool = False):
    """Gauss-Newton on the value network's level and slope together (Huge & Savine 2020: fit the slopes too): the slope
    goes to the costate, the level to realised utility or, with bellman, to what the Bellman equation says."""
    at, layers = inputs_of(batch, econ), unpack(theta, cfg.hidden)
    _, g_k_target, unit = value_targets(batch, econ)
    level, slope = cfg.level_weight * at.weight, cfg.slope_weight * at.weight * unit
    gap, jacobian = (bellman_level if bellman else utility_level)(layers, at, batch, econ, kernels)

    def residuals(theta):
        layers = unpack(theta, cfg.hidden)
        g, g_k = network_and_slope(layers, at.x, at.dx)
        return torch.stack([level * gap(layers, g), slope * (g_k_target - g_k)])

    now = residuals(theta)

    def rows(part):
        yield now[0, part], level[part].unsqueeze(1) * jacobian(part)
        yield now[1, part], kernels.slope_jacobian(layers, at.x[part], at.dx[part] * slope[part].unsqueeze(1))

    return gauss_newton_step(theta, rows, len(at.x), rate, damping, cfg.damping / 10,
                             lambda theta: residuals(theta).square().sum())


def policy_step(theta: Tensor, rate: Tensor, damping: Tensor, batch: Batch, econ: Tables, cfg: Config,
                kernels: Kernels):
    """Gauss-Newton on the utility objective: move log c to its first-order condition, wherever the borrowing limit
    leaves room."""
    at, layers = inputs_of(batch, econ), unpack(theta, cfg.hidden)
    f, newton = network(layers, at.x), policy_residual(batch, econ)
    free = ((f < 0) | (newton < 0)) * at.weight

    def rows(part):
        yield newton[part] * free[part], kernels.network_jacobian(layers, at.x[part]) * free[part].unsqueeze(1)

    def loss(theta):
        return ((f + newton - network(unpack(theta, cfg.hidden), at.x)) * free).square().sum()

    return gauss_newton_step(theta, rows, len(at.x), rate, damping, cfg.damping, loss)


def value_loss(theta: Tensor, batch: Batch, econ: Tables, cfg: Config) -> Tensor:
    """Half the mean squared error of g, and of its slope, for Adam."""
    at, (g_target, g_k_target, unit) = inputs_of(batch, econ), value_targets(batch, econ)
    g, g_k = network_and_slope(unpack(theta, cfg.hidden), at.x, at.dx)
    level, slope = cfg.level_weight * (g_target - g), cfg.slope_weight * unit * (g_k_target - g_k)
    return (level.square() + slope.square()).mean() / 2


def policy_loss(theta: Tensor, batch: Batch, econ: Tables, cfg: Config) -> Tensor:
    """Minus the utility objective up to a constant: its gradient is -sum_t beta^t (dU/d log c) d log c / d theta,
    back-propagation through time without the graph through time."""
    f = network(unpack(theta, cfg.hidden), inputs_of(batch, econ).x).clamp(max=0.0)
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
    return Batch(*[path[taught(cfg)].flatten() for path in batch])


HISTORY = ("seconds", "mean_K", "objective", "policy_residual", "value_residual", "slope_residual", "at_limit", "euler",
           "policy_taken", "value_taken", "policy_damping", "value_damping", "rate", "movement")
WATCHED = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 3.0)  # multiples of mean capital at which savings are watched


def watched_savings(state: dict, econ: Tables, cfg: Config) -> Tensor:
    """k' as a share of K at WATCHED, a mean over (z, s) and over K up to 3% off its mean: (10,)."""
    Z, S = econ.shares.shape
    device, K = econ.TFP.device, econ.K_mean
    k = econ.k_min + torch.tensor(WATCHED, device=device).view(-1, 1, 1, 1) * (K - econ.k_min)
    of_K = K * torch.tensor([0.97, 1.0, 1.03], device=device).view(-1, 1, 1)
    at = torch.broadcast_tensors(k, torch.arange(S, device=device), of_K, torch.arange(Z, device=device).view(-1, 1))
    k_next = network_capital(unpack(state["policy"], cfg.hidden), *at, econ)  # (10, 3, Z, S)
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
    g, g_k = network_and_slope(unpack(state["value"], cfg.hidden), at.x, at.dx)
    free = batch.c < (at.m - econ.k_min) * (1 - 1e-6)
    at_limit = 1 - free.to(at.m.dtype).mean()
    first_order = torch.where(free, policy_residual(batch, econ), torch.zeros_like(at.m))
    rms = [x.square().mean().sqrt() for x in (first_order, econ.value_unit * (g_target - g), unit * (g_k_target - g_k))]
    layers = unpack(state["policy"], cfg.hidden)
    policy = functools.partial(network_capital, layers, econ=econ)
    error, counts = euler_residuals(policy, States.expected(batch, econ), econ)
    euler = (error.abs() * counts).sum() / counts.sum()
    figures = torch.stack([state["k"].mean(), objective, *rms, at_limit, euler, *taken, *state["damping"]])
    return torch.cat([figures, watched_savings(state, econ, cfg)])


def iterate(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator, optimizers) -> Tensor:
    """One outer iteration, in place on the tensors of the state: learn from the states of the last roll-out, then
    simulate and roll out under the new policy. Returns its figures without waiting for them."""
    states = Batch(*[state[f"batch_{name}"] for name in Batch._fields])
    taken = torch.zeros_like(state["damping"])
    if state["iteration"] > 0 and cfg.optimizer == "gauss-newton":
        update = bellman_update if value_only(state, cfg) else gauss_newton_updates
        taken = update(state, states, econ, cfg, kernels)
    if cfg.optimizer == "adam":
        taken = adam_updates(state, econ, cfg, kernels, rng, optimizers)
    layers = unpack(state["policy"], cfg.hidden)

    def policy(k, s, K, z):
        return kernels.network_capital(layers, k, s, K, z, econ)

    scale = 1 + cfg.K_spread * (2 * uniform(state["z"].shape, rng, state["z"].device) - 1)
    panel = Panel(econ.k_min + (state["k"] - econ.k_min) * scale, state["s"], state["z"])
    gains = torch.zeros_like(state["K_path"])
    for t, (s, z, [(k, K, k_next)]) in enumerate(simulate([policy], panel, cfg.periods, econ, rng, cfg.systematic)):
        state["K_path"][t], state["z_path"][t] = K[:, 0], z[:, 0]
        if econ.equilibrium == "planner":
            gains[t] = gain_from_K(k, s, k_next, K, z, econ).mean(1)
        panel = Panel(k, s, z)
    for name, tensor in zip(Panel._fields, panel):
        state[name].copy_(tensor)
    if econ.equilibrium == "planner":
        law, _ = regress_by_z(gains.double(), torch.log(state["K_path"].double()), state["z_path"], econ.TFP * 0)
        econ.Delta_law.add_(state["rates"][3] * torch.where(law.isnan(), 0.0, law - econ.Delta_law))
    state["K_next"].copy_(expected_capital(state["K_path"], state["z_path"], econ))
    state["k_range"].copy_(widened(state["k_range"], panel.k))
    recentre(state, econ, cfg)
    if value_only(state, cfg):  # V of the final policy matters where that policy leads
        cfg = dataclasses.replace(cfg, wide_share=0.0)
    batch = roll_out_sample(state, econ, cfg, kernels, rng)
    for name, tensor in zip(Batch._fields, thin(batch, cfg)):
        state[f"batch_{name}"].copy_(tensor)
    if state["iteration"] == 0 and cfg.optimizer == "gauss-newton":
        for _ in range(10):  # the value network, a constant so far, meets its first labels
            value_update(state, states, state["rates"][1], econ, cfg, kernels)
    return iteration_figures(state, batch.U[0].mean(), states, econ, cfg, taken)


def widened(k_range: Tensor, k: Tensor) -> Tensor:
    """The simulated range of capital (2,): it grows at once and shrinks by a tenth an iteration, so that rare states
    are learnt from all the time and not by fits."""
    now = torch.stack([k.min(), k.max()])
    slowly = k_range + 0.1 * (now - k_range)
    return torch.stack([torch.minimum(now, slowly)[0], torch.maximum(now, slowly)[1]])


def recentre(state: dict, econ: Tables, cfg: Config) -> None:
    """Where mean K has moved by more than a tenth, the input ln K is centred there anew; the first biases take the
    difference up, so that both networks stay the functions they were."""
    shift = torch.log(state["K_path"] / econ.K_mean).mean()
    shift = torch.where(shift.abs() > 0.1, shift, torch.zeros_like(shift))
    econ.K_mean.mul_(torch.exp(shift))
    for name in ("policy", "value"):
        W1, b1 = unpack(state[name].detach(), cfg.hidden)[:2]
        b1.add_(econ.K_scale * shift * W1[:, K_INPUT])


def roll_out_sample(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng: torch.Generator) -> Batch:
    """Labels of freshly drawn households under the current networks."""
    panel = Panel(state["k"], state["s"], state["z"])
    of_state = [state[name] for name in ("K_path", "K_next", "z_path", "k_range")]
    paths = sample_households(panel, *of_state, econ, cfg, rng)
    policy, value = [unpack(state[name], cfg.hidden) for name in ("policy", "value")]
    return roll_out_batch(policy, value, paths, econ, cfg, kernels)


def value_update(state: dict, states: Batch, rate, econ: Tables, cfg: Config, kernels: Kernels, bellman: bool = False):
    damping = state["damping"]
    value, damping[1], taken = value_step(state["value"], rate, damping[1], states, econ, cfg, kernels, bellman)
    state["value"].copy_(value)
    return taken


def gauss_newton_updates(state: dict, states: Batch, econ: Tables, cfg: Config, kernels: Kernels) -> Tensor:
    """One policy and one value step on the same states; whether they were taken, (2,)."""
    (policy_rate, value_rate, momentum, _), damping = state["rates"], state["damping"]
    policy, damping[0], taken = policy_step(state["policy"], policy_rate, damping[0], states, econ, cfg, kernels)
    value_taken = value_update(state, states, value_rate, econ, cfg, kernels)
    policy = policy + torch.where(taken, momentum * state["last_step"], torch.zeros_like(policy))
    state["last_step"].copy_(policy - state["policy"])
    state["policy"].copy_(policy)
    return torch.stack([taken, value_taken]).to(policy.dtype)


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


def value_only(state: dict, cfg: Config) -> bool:
    """The last outer iterations leave the policy alone and fit the value network to it."""
    first = last_iteration(state, cfg) - cfg.final_value_steps
    return cfg.optimizer == "gauss-newton" and state["iteration"] >= first > 0


def bellman_update(state: dict, states: Batch, econ: Tables, cfg: Config, kernels: Kernels) -> Tensor:
    one = torch.ones_like(state["rates"][1])
    taken = value_update(state, states, one, econ, cfg, kernels, bellman=True)
    return torch.stack([torch.zeros_like(taken), taken]).to(one.dtype)


def adam_updates(state: dict, econ: Tables, cfg: Config, kernels: Kernels, rng, optimizers: dict) -> Tensor:
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
            descend("policy", lambda theta, batch=batch: policy_loss(theta, batch, econ, cfg))
    return torch.ones_like(state["damping"])


def make_optimizers(state: dict, cfg: Config) -> dict:
    """Adam on the state's own tensors, for the presets that use it."""
    if cfg.optimizer != "adam":
        return {}
    rates = {"policy": cfg.policy_rate, "value": cfg.value_rate}
    return {name: torch.optim.Adam([state[name].requires_grad_()], lr=rate) for name, rate in rates.items()}


def resting_share(econ: Tables) -> float:
    """Consumption as a share of cash on hand above the limit at which the representative household keeps K_mean."""
    of_z, K = econ.shares.sum(1), econ.K_mean
    Y = output(K, 0, econ._replace(TFP=[of_z @ econ.TFP], L=[of_z @ econ.L]))
    return float((Y - econ.delta * K) / (Y + (1 - econ.delta) * K - econ.k_min))


def initial_state(econ: Tables, cfg: Config, seed: int, rng: torch.Generator) -> dict:
    """Everything that a run carries from one outer iteration to the next."""
    device, n = econ.TFP.device, n_inputs(econ)
    panel = initial_panel(cfg.n_economies, cfg.n_agents, econ, rng)
    n_states = cfg.batch * len(taught(cfg))
    share = resting_share(econ)
    return {
        "iteration": 0,
        "policy": initial_parameters(n, cfg.hidden, math.log(share), seed).to(device),
        "value": initial_parameters(n, cfg.hidden, 0.0, seed + 1).to(device),
        "damping": torch.full((2,), 1e-2, device=device),
        "rates": torch.zeros(4, device=device),  # of the policy step, the value step, momentum, the law of Delta
        "last_step": torch.zeros(sum(map(math.prod, layer_shapes(n, cfg.hidden))), device=device),
        "k_range": torch.stack([panel.k.min(), panel.k.max()]),
        "caution": 1.0,
        "settled": 0,  # iteration at which savings had settled
        "watched": [],  # the last ten of watched_savings()
        "unbounded": 0,  # iterations in a row in which a planner's households saved without bound
        **panel._asdict(),
        "K_mean": econ.K_mean,
        "Delta_law": econ.Delta_law,
        "K_path": torch.zeros(cfg.periods, cfg.n_economies, device=device),
        "K_next": torch.zeros(cfg.periods - 1, cfg.n_economies, device=device),  # E[K' | K, z]
        "z_path": torch.zeros(cfg.periods, cfg.n_economies, device=device, dtype=torch.int64),
        **{f"batch_{name}": torch.zeros(n_states, device=device, dtype=torch.int64 if name in ("s", "z") else None)
           for name in Batch._fields},
        "history": {name: [] for name in HISTORY},
    }


def set_rates(state: dict, cfg: Config, optimizers: dict) -> None:
    """Steps of full size until savings have settled, near the end of that phase with momentum, which is for the last
    slow errors; then falling like 1 / n: from there on they average the noise out. Adam keeps its rates. All are
    smaller for a while after an iteration that was taken back. The cross-section of a policy that is still far from
    its first-order condition says nothing of the planner's Delta, which waits."""
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = state["caution"] * getattr(cfg, f"{name}_rate")
    fall = 1 + cfg.decay * max(state["iteration"] - full_steps(state, cfg), 0)
    momentum = cfg.momentum if movement(state["watched"]) < 10 * cfg.settle and not optimizers else 0.0
    near = min(state["history"]["policy_residual"][-3:], default=1.0) < 0.05
    rates = [state["caution"] * (1 - momentum) * cfg.policy_rate / fall, state["caution"] / fall, momentum, 0.2 * near]
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
    k, s, z = state["k"], state["s"], state["z"]
    K = k.mean(1, keepdim=True)
    k_next = network_capital(unpack(state["policy"], cfg.hidden), k, s, K, z, econ)
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
        with torch.no_grad():
            if graphs and state["iteration"] > 0 and not optimizers:
                phase = value_only(state, cfg)
                if phase not in graphs_of_phase:
                    step = functools.partial(iterate, state, econ, cfg, kernels, rng, optimizers)
                    graphs_of_phase = {phase: capture(step, tensors, rng)}
                figures = graphs_of_phase[phase]()
            else:
                figures = iterate(state, econ, cfg, kernels, rng, optimizers)
        *figures, watched = figures[: -len(WATCHED)].tolist() + [figures[-len(WATCHED) :].tolist()]
        figures = dict(zip(HISTORY[1:], figures))
        residuals = [] if optimizers else state["history"]["policy_residual"]  # Adam's labels are too noisy to compare
        trouble = find_trouble(figures, max(residuals[-3:], default=math.inf), econ)  # one draw may be lucky
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
        with torch.cuda.graph(graph):
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


# ---------------------------------------------------------------------------------------------- solutions


class Policy:
    """What the network's and the grid's solution share: a policy and a value, on tensors and on numpy arrays."""

    def next_capital(self, k, s, K, z) -> np.ndarray:
        """k' for numbers or arrays that broadcast: k, K real (goods), s and z indices. ValueError where s or z is
        none."""
        return on_arrays(self.policy, self.states, self.device, k, s, K, z)

    def value(self, k, s, K, z) -> np.ndarray:
        """Expected discounted utility in utils, arguments as in next_capital."""
        return on_arrays(self.utils, self.states, self.device, k, s, K, z)

    def utils(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """V with u(c) = c^(1 - gamma) / (1 - gamma) or ln c, where values() has c in units of c_ss."""
        econ = self.econ
        if econ.gamma == 1.0:
            return self.values(k, s, K, z) + econ.annuity[joint(s, z, econ)] * math.log(econ.c_ss)
        return self.values(k, s, K, z) * econ.c_ss ** (1 - econ.gamma)

    @property
    def device(self):
        return self.econ.TFP.device

    @property
    def states(self) -> dict:
        return {"s": len(self.econ.beta), "z": len(self.econ.TFP)}


class Solution(Policy):
    """A trained policy and value network, in float64: what is judged, saved and loaded. Made of the dict that
    NN_weights_biases.pth holds."""

    def __init__(self, weights: dict, device="cpu", mode="none"):
        self.weights, self.config = weights, Config(**weights["config"])
        tables = weights["economy"].items()
        self.economy = Economy(**{name: x.numpy() if isinstance(x, Tensor) else x for name, x in tables})
        K_mean = torch.tensor(weights["K_mean"], device=device, dtype=torch.float64)
        self.econ = self.economy.tables(device)._replace(K_mean=K_mean)
        self.layers = {name: [weights[name][layer].to(device, torch.float64) for layer in LAYERS]
                       for name in ("policy", "value")}
        self.single = [layer.float() for layer in self.layers["policy"]], \
            self.economy.tables(device, torch.float32)._replace(K_mean=K_mean.float())
        self.kernels = compile_kernels(mode)

    def policy(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """k' for tensors that broadcast against k, float64, or float32 as long simulations have them."""
        layers, econ = self.single if k.dtype == torch.float32 else (self.layers["policy"], self.econ)
        return self.kernels.network_capital(layers, k, s, K, z, econ)

    def values(self, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """V in the units of utility(), float64 tensors of one shape."""
        m, _ = cash_on_hand(k, s, K, z, self.econ)
        return value_of(network(self.layers["value"], features(k, s, m, K, z, self.econ)), s, z, self.econ)[0]

    def save(self, path) -> None:
        save_checkpoint(Path(path), self.weights)


def on_arrays(function: Callable, states: dict, device, k, s, K, z) -> np.ndarray:
    """Call a tensor function of the state with numbers or arrays; ValueError where s or z is no index."""
    k, s, K, z = np.broadcast_arrays(k, s, K, z)
    for name, index in (("s", s), ("z", z)):
        if not np.isin(index, np.arange(states[name])).all():
            wrong = index[~np.isin(index, np.arange(states[name]))].flat[0]
            raise ValueError(f"{name} must be one of 0 to {states[name] - 1}, not {wrong}")
    real = [torch.tensor(x, dtype=torch.float64, device=device) for x in (k, K)]
    index = [torch.tensor(x.astype(np.int64), device=device) for x in (s, z)]
    return function(real[0], index[0], real[1], index[1]).cpu().numpy()


# ---------------------------------------------------------------------------------------------- grid solution
# Maliar, Maliar & Valli (2010), by endogenous gridpoints

C_MIN, C_MAX = 1e-12, 1e4  # of c_ss: keep u'(c) finite where there is nothing, and c where saving is worth nothing


class Nodes(NamedTuple):
    """The household problem on its nodes."""

    k: np.ndarray  # (n_k,)
    K: np.ndarray  # (n_K,)
    R: np.ndarray  # (z, n_K)
    y: np.ndarray  # (z, s, n_K) income
    m: np.ndarray  # (z, s, n_K, n_k) cash on hand
    slope: np.ndarray  # (n_k, n_k) values at k -> derivatives at k of the cubic spline through them


def power_grid(n: int, low: float, high: float, exponent: float) -> np.ndarray:
    return low + (high - low) * np.linspace(0, 1, n) ** exponent


def on_grid(k: np.ndarray, K: np.ndarray, econ: Tables) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states (k, s, K, z) at every (z, s, K, k), in this order of axes."""
    s, z = np.arange(len(econ.beta)), np.arange(len(econ.TFP))
    z, s, K, k = [torch.from_numpy(x) for x in np.meshgrid(z, s, K, k, indexing="ij")]
    return k, s, K, z


def household_nodes(k: np.ndarray, K: np.ndarray, econ: Tables) -> Nodes:
    m, R = [x.numpy() for x in cash_on_hand(*on_grid(k, K, econ), econ)]
    y = m[..., 0] - R[..., 0] * k[0]
    return Nodes(k, K, R[:, 0, :, 0], y, m, scipy.interpolate.CubicSpline(k, np.eye(len(k))).derivative()(k))


def invert(k_endo: np.ndarray, nodes: Nodes, k: np.ndarray) -> np.ndarray:
    """k'(k) from the k (..., n_k) at which each k' of the grid is chosen: cubic Hermite, slopes by splines,
    and k_min below the first k_endo, so that no polynomial bends across the kink of the borrowing limit."""
    count = np.arange(len(nodes.k))
    position = np.array([np.interp(k, column, count) for column in k_endo.reshape(-1, len(count))])
    position = position.reshape(*k_endo.shape[:-1], len(k))
    i = np.minimum(position.astype(int), len(count) - 2)
    t, rise = position - i, nodes.k[i + 1] - nodes.k[i]
    run = np.take_along_axis(np.diff(k_endo), i, -1)
    dk_next = 1 / (k_endo @ nodes.slope.T)
    d0, d1 = run * np.take_along_axis(dk_next, i, -1), run * np.take_along_axis(dk_next, i + 1, -1)
    k_next = nodes.k[i] + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return np.where(k > k_endo[..., :1], k_next.clip(nodes.k[0]), nodes.k[0])


class Forecast(NamedTuple):
    """What households at the nodes of K expect of next period's aggregates."""

    spline: np.ndarray  # (z, n_K, n_K) values at K -> values at K' of the cubic spline through them
    R: np.ndarray  # (z, z', n_K)
    m_K: np.ndarray  # (z, z', s', n_K, n_k) dm/dK
    Delta: np.ndarray  # (z, z', n_K) the planner's


def forecast(alm: np.ndarray, Delta_law: np.ndarray, nodes: Nodes, econ: Economy) -> Forecast:
    """By the laws of motion ln K' = a(z) + b(z) ln K and Delta' = a(z') + b(z') ln K', coefficients (Z, 2) each."""
    K_next = np.exp(by_law(alm[:, None], np.log(nodes.K)))  # (z, n_K)
    m_K = np.zeros((1, 1, 1, 1, 1))
    if econ.equilibrium == "game":
        m_K = np.array([cash_of_K(*on_grid(nodes.k, K, econ), econ.tables()).numpy() for K in K_next])
    return Forecast(scipy.interpolate.CubicSpline(nodes.K, np.eye(len(nodes.K)))(K_next),
                    prices(K_next[:, None], np.arange(len(alm))[:, None], econ)[0], m_K,
                    by_law(Delta_law[:, None], np.log(K_next)[:, None]))


def expected_on_grid(values: np.ndarray, econ: Economy) -> np.ndarray:
    """beta(s) E[values | z, s]: (z, z', s', n_K, n_k) -> (z, s, n_K, n_k)."""
    Z, S = econ.income.shape
    P = (econ.beta[:, None, None] * econ.P).reshape(Z, S, Z * S)
    return (P @ values.reshape(Z, Z * S, -1)).reshape(Z, S, *values.shape[3:])


def euler_step(c: np.ndarray, nodes: Nodes, ahead: Forecast, econ: Economy):
    """One backward step of Carroll (2006): the k (z, s, n_K, n_k) at which each k' of the grid is optimal, from next
    period's c, and the share of nodes at which saving is worth nothing, so that consumption had to be bounded."""
    c_next = np.maximum(ahead.spline[:, None, None] @ c, C_MIN * econ.c_ss)  # (z, z', s', n_K, n_k)
    u_prime = marginal_utility(c_next, econ)
    worth = ahead.R[:, :, None, :, None] * u_prime
    if econ.equilibrium != "market":
        worth += Delta(u_prime, ahead.m_K, ahead.Delta[:, :, None, :, None], econ)
    worth = expected_on_grid(worth, econ)
    least = marginal_utility(np.float64(C_MAX * econ.c_ss), econ)
    c = inverse_marginal_utility(np.maximum(worth, least), econ)
    return (c + nodes.k - nodes.y[..., None]) / nodes.R[:, None, :, None], (worth < least).mean()


def solve_household(c: np.ndarray, ahead: Forecast, nodes: Nodes, econ: Economy, config: GridConfig):
    """EGM sweeps on c (z, s, n_K, n_k) given the laws of motion; returns c, k_endo, the change of c and the share of
    nodes where c was bounded."""
    for _ in range(config.sweeps):
        k_endo, bounded = euler_step(c, nodes, ahead, econ)
        c_last, c = c, nodes.m - invert(k_endo, nodes, nodes.k)
        change = np.max(np.abs(c - c_last) / np.maximum(c, C_MIN * econ.c_ss))
        if change < config.tolerance:
            break
    return c, k_endo, change, bounded


def simulate_histogram(table: np.ndarray, k: np.ndarray, K: np.ndarray, mass: np.ndarray, z_path: np.ndarray,
                       econ: Economy, keep: Callable = lambda t, mass, k_next: None):
    """Non-stochastic simulation of Young (2010), the limit of infinitely many households: mass (s, n) at k moves to the
    two neighbours of k', which keeps the mean. table (z, s, n_K, n) of k', linear in K (n_K,). Returns K (periods,)
    and the last mass; keep(t, mass, k') sees every period."""
    K_path, n = np.empty(len(z_path)), len(k)
    for t, z in enumerate(z_path):
        K_path[t] = mass.sum(0) @ k
        position = (K_path[t] - K[0]) / (K[1] - K[0])
        j = min(max(int(position), 0), len(K) - 2)
        k_next = table[z, :, j] + (position - j) * (table[z, :, j + 1] - table[z, :, j])  # (s, n)
        keep(t, mass, k_next)
        position = np.interp(k_next, k, np.arange(n))
        i = np.minimum(position.astype(int), n - 2)
        right = mass * (position - i)
        moved = [np.bincount(low, m - r, n) + np.bincount(low + 1, r, n) for low, m, r in zip(i, mass, right)]
        mass = econ.Pi[z, z_path[min(t + 1, len(z_path) - 1)]].T @ np.array(moved)
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


def evaluate_grid(k_next: np.ndarray, nodes: Nodes, k: np.ndarray, ahead: Forecast, tables: Tables, econ: Economy,
                  config: GridConfig) -> Tuple[np.ndarray, float]:
    """V = u(c) + Delta k + beta E V' (z, s, n_K, n) of a policy k' at nodes k, K, by sweeps, and what the last one
    still changed. What they leave over is soon the same number everywhere, and MacQueen's bound takes it out."""
    at = on_grid(k, nodes.K, econ)
    c = (cash_on_hand(*at, tables)[0] - torch.from_numpy(k_next)).clamp(min=C_MIN * econ.c_ss)
    u = (utility(c, tables) + expected_Delta(marginal_utility(c, tables), *at, tables) * at[0]).numpy()
    position = np.interp(k_next, k, np.arange(len(k)))
    i = np.minimum(position.astype(int), len(k) - 2)
    D = econ.annuity[..., None, None]
    V = u * D
    for _ in range(config.value_sweeps):
        EV = expected_on_grid(ahead.spline[:, None, None] @ V, econ)
        low, high = np.take_along_axis(EV, i, -1), np.take_along_axis(EV, i + 1, -1)
        change = u + low + (position - i) * (high - low) - V
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

    def interpolate(self, table: Tensor, k: Tensor, s: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """A table at states of one shape: bilinear in (k, K), linear beyond the ends. No search, as k is power-spaced
        and K uniform."""
        n_K, n_k = table.shape[2:]
        low, width = self.econ.k_min, self.k_max - self.econ.k_min
        i = (((k - low).clamp(min=0.0) / width) ** (1 / self.exponent) * (n_k - 1)).floor().clamp(max=n_k - 2)
        left, right = [low + width * (x / (n_k - 1)) ** self.exponent for x in (i, i + 1)]
        position = (K - self.K_low) / (self.K_high - self.K_low) * (n_K - 1)
        j = position.floor().clamp(0, n_K - 2)
        along_k, along_K, flat = (k - left) / (right - left), position - j, table.reshape(-1)
        corner = (joint(s, z, self.econ) * n_K + j.long()) * n_k + i.long()
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


class Outgrown(Exception):
    """The cross-section has left the nodes: (centre, k_max) to try next."""


def solve_grid(economy=None, config: GridConfig = GridConfig(), progress: bool = False) -> GridSolution:
    """Krusell & Smith's (1998) fixed point: households believe a law of motion of K, which their savings confirm.
    economy: an Economy, a Calibration, or None for the default. The nodes follow the cross-section: K around its mean,
    k as far as capital is held. Raises UserError where there is no convergence."""
    econ = as_economy(economy)
    centre = econ.K_start
    k_max = config.k_max * centre
    with tqdm(desc="grid solution", disable=None if progress else True) as bar:
        for _ in range(60):
            try:
                return law_of_motion_fixed_point(econ, config, centre, k_max, bar)
            except Outgrown as nodes:
                centre, k_max = nodes.args
    raise UserError("grid: K and k leave every range of nodes that was tried; judge with --grid none")


def simulated_laws(table: np.ndarray, k: np.ndarray, K: np.ndarray, mass: np.ndarray, z_path: np.ndarray, laws: list,
                   econ: Economy, config: GridConfig):
    """The policy table through the histogram: K (periods,), the last mass, and the laws [of ln K', of the planner's
    Delta] that come out, each (coefficients (Z, 2), R2); where z never comes coefficients stay as in laws."""
    tables, s, Deltas = econ.tables(), torch.arange(len(econ.beta))[:, None], np.zeros(len(z_path))

    def keep(t, mass, k_next):
        if econ.equilibrium == "planner":
            gain = gain_from_K(torch.from_numpy(k), s, torch.from_numpy(k_next), torch.tensor(mass.sum(0) @ k),
                               torch.tensor(z_path[t]), tables)
            Deltas[t] = (mass * gain.numpy()).sum()

    K_path, mass = simulate_histogram(table, k, K, mass, z_path, econ, keep)
    kept = [torch.from_numpy(x[config.burn_in :, None]) for x in (K_path, Deltas, z_path)]
    of_K = law_of_motion(kept[0], kept[2], torch.from_numpy(laws[0][:, 1]))
    of_Delta = regress_by_z(kept[1], torch.log(kept[0]), kept[2], torch.zeros(len(laws[1]), dtype=torch.float64))
    new = [(np.where(found.isnan(), law, found.numpy()), r2.numpy())
           for (found, r2), law in zip((of_K, of_Delta), laws)]
    return K_path, mass, new


def law_of_motion_fixed_point(econ: Economy, config: GridConfig, centre: float, k_max: float, bar) -> GridSolution:
    """The fixed point on nodes of K around centre and of k up to k_max, or Outgrown. Few EGM sweeps an update, so that
    the policy and the laws of motion converge together."""
    nodes = household_nodes(power_grid(config.n_k, econ.k_min, k_max, config.exponent),
                            centre * np.linspace(config.K_low, config.K_high, config.n_K), econ.tables())
    k = power_grid(config.n_k_fine, econ.k_min, k_max, config.exponent)
    K = np.linspace(nodes.K[0], nodes.K[-1], config.n_K_fine)
    z_path = draw_z_path(config.periods, econ, np.random.default_rng(config.seed))
    Z = len(econ.TFP)
    laws = [np.array([[0.035 * np.log(centre), 0.965]] * Z), econ.tables().Delta_law.numpy()]  # of ln K' and of Delta
    wage = prices(nodes.K, np.arange(Z)[:, None], econ)[1]
    permanent = 0.9 * (econ.L[:, None] * wage)[:, None, :, None]
    c = np.minimum(nodes.m - econ.k_min, (1 - econ.mean_beta) * (nodes.m - econ.k_min) + permanent)
    c = np.maximum(c, C_MIN * econ.c_ss)
    mass = dispersed_mass(k, centre, z_path[0], econ)
    x = np.stack([np.ones(2), np.log(centre * np.array([0.9, 1.1]))])  # where two laws are compared
    gap, damping, settled = np.inf, config.damping, False
    for update in range(config.max_updates):
        ahead = forecast(*laws, nodes, econ)
        c, k_endo, change, bounded = solve_household(c, ahead, nodes, econ, config)
        table = invert(scipy.interpolate.CubicSpline(nodes.K, k_endo, axis=2)(K), nodes, k)
        settling, settled = not settled and gap < 3e-5, settled or gap < 3e-5  # then on the long path, for good
        path = z_path if settled else z_path[: config.periods // 5]
        K_path, mass, new = simulated_laws(table, k, K, mass, path, laws, econ, config)
        kept = K_path[config.burn_in :]
        near = update >= 4 or econ.equilibrium == "planner"  # at first, a market's policies are far from any solution
        low, high = (0.8, 1.28) if near else (0.4, 2.5)
        if not low < kept.mean() / centre < high or not (K_path > max(econ.k_min, 0)).all():
            raise Outgrown(centre * np.clip(kept.mean() / centre, 1 / 1.3, 1.3), k_max)
        if update >= 4 and (mass * np.where(k > 0.6 * k_max, k, 0)).sum() > 1e-4 * kept[-1]:
            raise Outgrown(centre, 2 * k_max)
        steps = [found - law for (found, _), law in zip(new, laws)]
        gap_last, gap = gap, max(np.abs(steps[0] @ x).max(), np.abs(steps[1] @ x).max() * econ.c_ss)
        bar.update()
        bar.set_postfix_str(f"change of c {change:.0e}, of the laws of motion {gap:.0e}")
        if max(gap, change) < config.tolerance:
            tables = econ.tables()._replace(Delta_law=torch.from_numpy(laws[1]))
            V, left = evaluate_grid(invert(k_endo, nodes, k), nodes, k, ahead, tables, econ, config)
            notes = [f"grid: the largest k is {k_max:.4g}"] if k_max > config.k_max * econ.K_start else []
            if left >= 1e-7:
                notes.append(f"grid: values still changed by {left:.0e} after {config.value_sweeps} sweeps")
            if bounded:
                notes.append(f"grid: at {100 * bounded:.2g}% of the nodes saving is worth nothing; c is bounded there")
            values = scipy.interpolate.CubicSpline(nodes.K, V, axis=2)(K)
            return GridSolution(econ=tables, table=torch.from_numpy(table), value_table=torch.from_numpy(values),
                                k_max=k_max, exponent=config.exponent, K_low=K[0], K_high=K[-1], K_mean=kept.mean(),
                                alm_coefficients=laws[0], alm_r2=new[0][1], Delta_r2=new[1][1], notes=tuple(notes))
        if gap > gap_last and not settling:  # the law of motion overshoots: more K expected means less saved
            damping /= 2
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

    def now(self) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.s, self.K, self.z

    def at(self, index) -> States:
        return States(*[x if x is None else x[index] for x in self])

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
    gain = gain_from_K(nexts[0], nexts[1], solution.policy(*nexts), nexts[2], nexts[3], econ)
    p = weight * econ.probability[joint(s, z, econ)].movedim(-1, 0)
    to = [p * (nexts[3] == z_next) for z_next in range(len(econ.TFP))]
    return now, torch.stack([((x * gain).sum((0, 2)) / x.sum((0, 2))).nan_to_num() for x in to], 1)


def ergodic_states(solutions: dict, econ: Tables, cfg: Config, B: int, N: int, seed: int):
    """Simulate solutions on the same shocks from the same dispersed panel: name -> (pooled States, K_path (periods,
    B)), and z_path (periods, B)."""
    rng = torch.Generator().manual_seed(seed)  # on the CPU: the same shocks on every device
    panel = initial_panel(B, N, econ, rng)
    pooled, K_path, z_path = {name: [] for name in solutions}, {name: [] for name in solutions}, []
    periods = simulate([solution.policy for solution in solutions.values()], panel, cfg.eval_periods, econ, rng)
    periods = tqdm(periods, f"simulation, N = {N}", cfg.eval_periods, leave=False, disable=None)
    for t, (s, z, paths) in enumerate(periods):
        if t < cfg.eval_drop:
            continue
        z_path.append(z[:, 0])
        for name, (k, K, k_next) in zip(solutions, paths):
            K_path[name].append(K[:, 0].double())
            if (t - cfg.eval_drop) % cfg.eval_every == 0:
                k, K, k_next = k.double(), K.double(), k_next.double()
                now = [k, s, K, z, k_next.mean(1, keepdim=True)]
                if econ.equilibrium == "planner":
                    here, ahead = planner_Delta(solutions[name], k, s, k_next, K, now[-1], z, 1.0, econ)
                    now += [here[:, None], ahead[:, None]]
                pooled[name].append([x.expand(*k.shape, *x.shape[2:]).flatten(0, 1) for x in now])
    return {name: (States(*map(torch.cat, zip(*pooled[name]))), torch.stack(K_path[name])) for name in solutions}, \
        torch.stack(z_path)


def bellman_errors(solution, states: States, econ: Tables) -> Tuple[Tensor, Tensor]:
    """u(c) + Delta k + beta E V(s') - V(s), Delta given, at the policy's own c and at the best one (golden-section
    search), in the units of utility(): the Bellman error of Han, Yang & E (2021) is the second."""
    m, _ = cash_on_hand(*states.now(), econ)
    above, beta, k_next = m - econ.k_min, econ.beta[states.s], solution.policy(*states.now())
    gain = Delta(marginal_utility(m - k_next, econ), cash_of_K(*states.now(), econ), states.Delta, econ)
    V = solution.values(*states.now()) - gain * states.k

    def objective(share):
        nexts = successors(econ.k_min + (1 - share) * above, states.s, states.K_next, states.z, econ)
        return utility(share * above, econ) + beta * expected(solution.values(*nexts), states.s, states.z, econ)

    own_share = 1 - (k_next - econ.k_min) / above
    own, golden = objective(own_share), (math.sqrt(5) - 1) / 2
    low, high = own_share * 0.5, (own_share * 1.5).clamp(max=1.0)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = objective(left), objective(right)
    for _ in range(13):  # to 0.1% of c: the objective is flat there to 1e-6
        better = at_left > at_right
        low, high = torch.where(better, low, left), torch.where(better, right, high)
        new = torch.where(better, high - golden * (high - low), low + golden * (high - low))
        at_new = objective(new)
        left, right = torch.where(better, new, right), torch.where(better, left, new)
        at_left, at_right = torch.where(better, at_new, at_right), torch.where(better, at_left, at_new)
    return own - V, torch.maximum(torch.maximum(own, at_left), at_right) - V


def euler_residuals(policy: Callable, states: States, econ: Tables) -> Tuple[Tensor, Tensor]:
    """1 - c~ / c with u'(c~) = beta E[R' u'(c') + Delta'], c~ at most what there is above the limit; and where the
    limit does not hold c = c~ there."""
    m, _ = cash_on_hand(*states.now(), econ)
    k_next = policy(*states.now())
    nexts = successors(k_next, states.s, states.K_next, states.z, econ)
    m_next, R_next = cash_on_hand(*nexts, econ)
    u_prime = marginal_utility(m_next - policy(*nexts), econ)
    common = None if states.Delta_next is None else states.Delta_next.gather(1, nexts[3].T).T
    gain = Delta(u_prime, cash_of_K(*nexts, econ), common, econ)
    worth = econ.beta[states.s] * expected(R_next * u_prime + gain, states.s, states.z, econ)
    implied = torch.minimum(inverse_marginal_utility(worth.clamp(min=1e-30), econ), m - econ.k_min)
    return 1 - implied / (m - k_next), (k_next > econ.k_min) | (implied < m - econ.k_min)


def euler_errors(solution, states: States, econ: Tables) -> Tensor:
    """euler_residuals() of a solution without the states where the limit holds."""
    error, free = euler_residuals(solution.policy, states, econ)
    return error[free]


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


def errors_at(solution, states: States, econ: Tables) -> Tuple[dict, dict]:
    """Bellman errors (utils, and as a share of consumption) and Euler errors at given states, and the arrays."""
    own, best = bellman_errors(solution, states, econ)
    m, _ = cash_on_hand(states.k, states.s, states.K, states.z, econ)
    c = m - solution.policy(*states.now())
    in_consumption = (own / (marginal_utility(c, econ) * c)).cpu().numpy()
    utils = econ.c_ss ** (1 - econ.gamma)
    own, best = [utils * x.cpu().numpy() for x in (own, best)]
    euler = np.maximum(euler_errors(solution, states, econ).abs().cpu().numpy(), 1e-16)
    euler = euler if len(euler) else np.array([1e-16])

    def sizes(error):
        return {"mean": np.abs(error).mean(), "rmse": np.sqrt(np.mean(error**2)), "max": np.abs(error).max()}

    figures = {"states": len(own), "bellman_own_c": sizes(own), "bellman_best_c": sizes(best),
               "bellman_in_consumption": sizes(in_consumption),
               "euler_log10": {"mean": np.log10(euler.mean()), "p99": np.log10(np.percentile(euler, 99)),
                               "max": np.log10(euler.max())}}
    return figures, {"sample_k": states.k.cpu().numpy(), "bellman": own}


def judge_panel(solutions: dict, econ: Tables, cfg: Config, B: int, N: int, seed: int) -> Tuple[dict, dict]:
    """All figures of solutions at one N on the same shocks, and the arrays behind them: name -> dict."""
    simulated, z_path = ergodic_states(solutions, econ, cfg, B, N, seed)
    figures, arrays, z_path = {}, {}, z_path.cpu().numpy()
    for name, (states, K_path) in simulated.items():
        some = torch.randperm(len(states.k), generator=torch.Generator().manual_seed(seed))[: cfg.eval_states]
        figures[name], arrays[name] = errors_at(solutions[name], states.at(some.to(states.k.device)), econ)
        k, K_path = states.k.cpu().numpy(), K_path.cpu().numpy()
        figures[name] |= {"n_agents": N, "n_economies": B, "periods": cfg.eval_periods - cfg.eval_drop,
                          "capital": inequality(k),
                          "law_of_motion": law_of_motion_figures(K_path, z_path, len(econ.TFP))}
        arrays[name] |= {"k": k, "weight": np.ones(len(k)), "K_path": K_path, "z_path": z_path}
    return figures, arrays


def judge_limit(solutions: dict, economy: Economy, econ: Tables, cfg: Config, k: np.ndarray, K: np.ndarray,
                seed: int) -> Tuple[dict, dict]:
    """The same in the limit N = infinity, where sampling noise hides nothing: both policies, tabulated at nodes k and
    K, through the same histogram on the same path of z, once for its start and once to be judged."""
    z_path, figures, arrays = draw_z_path(cfg.eval_periods, economy, np.random.default_rng(seed)), {}, {}
    at = [x.to(econ.TFP.device) for x in on_grid(k, K, econ)]
    for name, solution in solutions.items():
        rows = [[solution.policy(*[x[z, s] for x in at]).cpu().numpy() for s in range(at[0].shape[1])]
                for z in range(at[0].shape[0])]
        table, pooled = np.array(rows), []

        def keep(t, mass, k_next, pooled=pooled):
            if t >= cfg.eval_drop and (t - cfg.eval_drop) % cfg.eval_every == 0 and t + 1 < len(z_path):
                pooled.append((t, mass, k_next))

        mass = dispersed_mass(k, float(econ.K_mean), z_path[0], economy)
        _, mass = simulate_histogram(table, k, K, mass, z_path, economy)
        K_path, _ = simulate_histogram(table, k, K, mass, z_path, economy, keep)
        states = histogram_states(pooled, k, K_path, z_path, econ, cfg.eval_states, solution)
        figures[name], arrays[name] = errors_at(solution, states, econ)
        c, weight = consumption_distribution(pooled, k, K_path, z_path, econ)
        mean_mass = np.mean([mass.sum(0) for _, mass, _ in pooled], 0)
        kept, z_kept = K_path[cfg.eval_drop :, None], z_path[cfg.eval_drop :, None]
        R, _ = prices(kept, z_kept, economy)
        figures[name] |= {"n_agents": None, "periods": len(kept), "capital": inequality(k, mean_mass),
                          "consumption": inequality(c, weight), "interest_rate_percent": 100 * (R.mean() - 1),
                          "welfare": ergodic_welfare(c, weight, econ),
                          "law_of_motion": law_of_motion_figures(kept, z_kept, len(econ.TFP))}
        if states.Delta is not None:
            figures[name]["Delta"] = float(states.Delta.mean())
        arrays[name] |= {"k": k, "weight": mean_mass, "K_path": kept, "z_path": z_kept}
    return figures, arrays


def histogram_states(pooled: list, k: np.ndarray, K_path: np.ndarray, z_path: np.ndarray, econ: Tables, n: int,
                     solution=None) -> States:
    """About n States, spread evenly over the mass (s, n_k) of each pooled period."""
    each, device = max(1, n // len(pooled)), econ.TFP.device
    columns = []
    for t, mass, k_next in pooled:
        at = np.searchsorted(mass.cumsum(), (np.arange(each) + 0.5) / each * mass.sum() * (1 - 1e-12))
        s, i = np.unravel_index(at, mass.shape)
        now = [k[i], s, np.full(each, K_path[t]), np.full(each, z_path[t]), np.full(each, K_path[t + 1])]
        if econ.equilibrium == "planner":
            everybody = np.broadcast_to(k, mass.shape), np.indices(mass.shape)[0], k_next, mass
            k_all, s_all, next_all, weight = [torch.tensor(x, device=device).reshape(1, -1) for x in everybody]
            K, K_next, z = [torch.tensor(x, device=device).view(1, 1) for x in (K_path[t], K_path[t + 1], z_path[t])]
            here, ahead = planner_Delta(solution, k_all, s_all, next_all, K, K_next, z, weight, econ)
            now += [here.expand(each).cpu().numpy(), ahead.expand(each, -1).cpu().numpy()]
        columns.append(now)
    return States(*[torch.from_numpy(np.concatenate(x)).to(device) for x in zip(*columns)])


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


def impulse_responses(solutions: dict, econ: Tables, cfg: Config, seed: int) -> dict:
    """name -> series -> (benchmark, shocked), each (paths, periods): economies that were in the middle state a period
    before 0 (the upper one of two) and are at 0 in it, or one state below. Every random number is the same whatever
    the solution and the state at 0."""
    rng = torch.Generator().manual_seed(seed)
    panel = initial_panel(cfg.irf_paths, cfg.irf_agents, econ, rng)
    names, policies = list(solutions), [solution.policy for solution in solutions.values()]
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
    """A figure 7 inches wide in the common style, with every label above all panels, where no data are. Written to path
    at the end; no display, no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(7, height), layout="constrained")
        yield fig
        labels = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        if labels:
            fig.legend(labels.values(), labels, loc="outside upper center", ncols=4)
        if note:
            fig.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="0.3")
        fig.savefig(path, dpi=160, format="png", pil_kwargs={"optimize": True})


def capital_axis(ax, k_min, k_max):
    """k on a scale of ln(1 + k - k_min), so that poor households show."""
    ax.set_xscale("function", functions=(lambda k: np.log1p(np.maximum(k - k_min, 0)), lambda x: np.expm1(x) + k_min))
    decades = [k for exponent in range(8) for k in (10**exponent, 3 * 10**exponent)]
    ax.set_xticks([k for k in (0, *decades) if k_min <= k <= k_max][-9:])
    ax.set(xlim=(k_min, k_max), xlabel="individual capital k (goods)")


def log_axis(ax):
    """y on a log scale over whole decades, where anything is positive."""
    if ax.dataLim.y1 > 0:
        ax.set(yscale="log", ylim=10 ** (np.floor(np.log10([ax.dataLim.minposy, ax.dataLim.y1])) + (0, 1)))


def plot_lines(ax, gap, x, of):
    """Each solution's y over x, and network minus grid in the strip below."""
    for name, y in of.items():
        ax.plot(x, y, label=name, **LINES[name])
    if "grid" in of:
        gap.plot(x, of["network"] - of["grid"], color=BLUE, linewidth=1.0, label="network - grid (lower panel)")
    gap.axhline(0, **LINES["grid"])


def plot_distribution(path, arrays, title, note):
    """Density and left tail of individual capital k (n,)."""
    k_of = {name: of["k"] for name, of in arrays.items()}
    low = min(0.0, *(k.min() for k in k_of.values()))
    top = max(low + 1, *(np.quantile(k, 0.9995) for k in k_of.values()))
    bins, poor = np.linspace(low, top, 81), np.linspace(low, low + (top - low) / 15, 201)
    with figure(path, 3.6, note) as fig:
        density, tail = fig.subplots(1, 2, width_ratios=(2, 1))
        for name, k in k_of.items():
            density.stairs(np.histogram(k, bins)[0] / len(k) / np.diff(bins), bins,
                           label=f"{name}: mean {k.mean():.2f}, std {k.std():.2f}", **LINES[name])
            tail.plot(poor, [100 * np.mean(k <= x) for x in poor], **LINES[name])
        density.set(title=title, xlabel="individual capital k (goods)", ylabel="density (per good)", xlim=(low, top))
        tail.set(title="the poorest", xlabel="k (goods)", ylabel="households with capital up to k (%)",
                 xlim=(low, poor[-1]), ylim=(0, None))


def plot_history(path, history):
    """Training over outer iterations, name -> (iterations,)."""
    panels = {"mean_K": "mean capital K (goods)", "objective": "policy objective (u in units of c_ss)",
              "policy_residual": "policy residual (rms of ln c~ / c)",
              "value_residual": "value residual (rms, ln consumption equivalent)"}
    n = len(history["seconds"])
    with figure(path, 4.6) as fig:
        for ax, (name, title) in zip(fig.subplots(2, 2, sharex=True).flat, panels.items()):
            ax.plot(range(1, n + 1), history[name], color=BLUE, linewidth=1.2, marker="o", markersize=2.5)
            ax.set(title=title, xlim=(0, n + 1))
            if "residual" in name:
                log_axis(ax)
                ax.set_xlabel(f"outer iteration ({sum(history['seconds']):.0f} s in all)")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def plot_policies(path, solutions, K, k_max, economy):
    """k' - k at aggregate capital K for the first and the last s, in z around the middle."""
    k = economy.k_min - 1 + np.geomspace(1, 1 + k_max - economy.k_min, 400)
    last, middle = len(economy.s_names) - 1, len(economy.z_names) // 2
    z_shown, s_shown = sorted({max(middle - 1, 0), middle}), sorted({0, last})
    with figure(path, 1 + 2.7 * len(z_shown), f"Aggregate capital K = {K:.1f}.") as fig:
        axes = fig.subplots(2 * len(z_shown), len(s_shown), sharex=True, squeeze=False,
                            height_ratios=(3, 1.2) * len(z_shown))
        for row, column in np.ndindex(len(z_shown), len(s_shown)):
            (ax, gap), z, s = axes[2 * row : 2 * row + 2, column], z_shown[row], s_shown[column]
            plot_lines(ax, gap, k, {name: x.next_capital(k, s, K, z) - k for name, x in solutions.items()})
            ax.set_title(f"{economy.z_names[z]}, {economy.s_names[s]}")
        for ax, gap in axes[:, 0].reshape(-1, 2):
            ax.set_ylabel("k' - k (goods)")
            gap.set_ylabel("difference\n(goods)")
        for ax in axes[-1]:
            capital_axis(ax, economy.k_min, k_max)


def plot_bellman_bins(path, arrays, k_min, note):
    """Mean and 95th percentile of |error| at the states that a solution visits, by bins of capital, equally wide in
    ln(1 + k - k_min)."""
    top = max(k_min + 1, *(of["sample_k"].max() for of in arrays.values()))
    edges = k_min - 1 + np.geomspace(1, 1 + top - k_min, 23)
    with figure(path, 4.2, note) as fig:
        ax, share = fig.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        for name, of in arrays.items():
            k, error = of["sample_k"], np.abs(of["bellman"])
            bins = np.digitize(k, edges[1:-1])
            groups = [np.flatnonzero(bins == b) for b in range(len(edges) - 1)]
            least = min(20, max(map(len, groups)))  # a percentile needs some observations
            groups = [group for group in groups if len(group) >= least]
            x = [k[group].mean() for group in groups]
            style = LINES[name] | {"marker": {"network": "o", "grid": "s"}[name], "markersize": 4}
            ax.plot(x, [error[group].mean() for group in groups], label=f"{name}, mean", **style)
            ax.plot(x, [np.percentile(error[group], 95) for group in groups], label=f"{name}, 95th percentile",
                    **style | {"linewidth": style["linewidth"] / 2, "markerfacecolor": "white"})
        share.hist(k, edges, weights=np.full(len(k), 100 / len(k)), color="0.75", ec="white")
        ax.set_ylabel("|Bellman error|, policy's own c (utils)")
        log_axis(ax)
        share.set_ylabel("households\n(%)")
        capital_axis(share, k_min, edges[-1])


def impulse_response(benchmark, shocked, points=False):
    """Response of a series (paths, periods) in percent, a ratio of means, or in percentage points:
    mean, 10th and 90th percentile of the single paths' responses, each (periods,)."""
    def change(b, s):
        return 100 * (s - b) if points else 100 * (s / b - 1)
    low, high = np.percentile(change(benchmark, shocked), (10, 90), axis=0)
    return change(benchmark.mean(0), shocked.mean(0)), low, high


def plot_impulse_responses(path, responses, note):
    """Responses to a lower state at period 0. responses: name -> series -> (benchmark, shocked), both (paths,
    periods); interest_rate holds the gross return R, shocks the index z."""
    titles = {"capital": "capital (percent)", "output": "output (percent)", "consumption": "consumption (percent)",
              "interest_rate": "interest rate (percentage points)", "shocks": "aggregate state (mean change of z)"}
    with figure(path, 4.6, note) as fig:
        for i, (series, title) in enumerate(titles.items()):
            ax = fig.add_subplot(2, 3, i + 1)
            for name, solution in responses.items():
                mean, low, high = impulse_response(*solution[series], points=series in ("interest_rate", "shocks"))
                if series == "shocks":  # an index, not a percentage; and a single path is in one state or the other
                    mean = mean / 100
                elif name == "network":
                    ax.fill_between(range(len(mean)), low, high, color=SKY, alpha=0.25, linewidth=0,
                                    label="network, 10-90% of paths")
                ax.plot(mean, label=f"{name}, mean", **LINES[name])
            ax.axhline(0, color="0.5", linewidth=0.7, zorder=1)
            ax.set(title=title, xlabel="periods after the shock", xlim=(0, max(len(mean) - 1, 1)))


def plot_capital_paths(path, arrays, z_names, note):
    """Mean capital K on the first periods of one path of z; the lower states are shaded."""
    z, low = arrays["network"]["z_path"][:400, 0], len(z_names) // 2
    edges, lower = np.arange(len(z) + 1) - 0.5, z_names[0] if low == 1 else f"below {z_names[low]}"
    with figure(path, 4.0, note) as fig:
        ax, gap = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        for panel, label in ((ax, lower if (z < low).any() else None), (gap, None)):
            panel.fill_between(edges, np.append(z < low, 0), step="post", color="0.9", linewidth=0, zorder=0.5,
                               transform=panel.get_xaxis_transform(), label=label)
        plot_lines(ax, gap, range(len(z)), {name: of["K_path"][:400, 0] for name, of in arrays.items()})
        ax.set(ylabel="mean capital K (goods)", xlim=(0, max(len(z) - 1, 1)))
        gap.set(ylabel="difference\n(goods)", xlabel="period")


def draw_figures(folder: Path, network: Solution, grid: GridSolution | None, figures: dict, arrays: dict,
                 cfg: Config) -> None:
    """Every picture of the output directory."""
    (folder / "figures").mkdir()
    draw, economy, of = folder / "figures", network.economy, figures["network"]
    small, large = [f"N = {x['n_agents']}, {x['n_economies']} economies, {x['periods']} periods"
                    for x in (of["small"], of["large"])]
    title = f"distribution: W1 distance {figures['comparison']['small']['w1']:.3f} goods" if grid else "distribution"
    plot_distribution(folder / "distribution_validation.png", arrays["small"], title, small)
    plot_history(draw / "training_history.png", network.weights["history"])
    K, k = of["limit"]["capital"]["mean"], arrays["large"]["network"]["k"]
    solutions = {"network": network} | ({"grid": grid} if grid else {})
    top = max(np.quantile(k, 0.9999), economy.k_min + 1)
    plot_policies(draw / "policy_functions.png", solutions, K, top, economy)
    plot_bellman_bins(draw / "bellman_errors.png", arrays["large"], economy.k_min, large)
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


PREFIX = {GridConfig: "grid_"}  # of the flags of a dataclass


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
            extra = {"help": f"{item.metadata['help']} ({', '.join(shown)})".replace("%", "%%")}
            if isinstance(item.default, bool):
                extra["action"] = argparse.BooleanOptionalAction
            else:
                choices, form = item.metadata["choices"], type(item.default)
                extra |= {"type": form, "choices": choices, "metavar": None if choices else form.__name__.upper()}
            section.add_argument(flag(PREFIX.get(kind, "") + item.name), **extra)
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
    return Settings(economy, {} if fixed else dataclasses.asdict(cal), cfg,
                    None if run.grid == "none" else grid,
                    dataclasses.replace(run, output_dir=run.output_dir or usual))


def check(cfg: Config, grid: GridConfig, run: Run):
    """Values that are possible one by one and impossible together or here."""
    if not run.output_dir.isprintable():
        raise UserError(f"--output-dir {run.output_dir!r}: name a directory without control characters")
    if run.evaluate and run.resume:
        raise UserError("--evaluate trains nothing and --resume goes on training; give one of the two")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or --device auto")
    if cfg.eval_drop > cfg.eval_periods - 3:
        raise UserError(f"--eval-drop {cfg.eval_drop} leaves too little of --eval-periods {cfg.eval_periods}: lower it")
    if cfg.periods < cfg.horizon + 1:
        raise UserError(f"--periods {cfg.periods} is too short for --horizon {cfg.horizon}: "
                        f"give --periods {cfg.horizon + 1} or more")
    if grid.burn_in > grid.periods // 5 - 3:
        raise UserError(f"--grid-burn-in {grid.burn_in} leaves too little of a fifth of --grid-periods {grid.periods}: "
                        "lower it")


def departures(cfg, reference) -> List[str]:
    """Where cfg is not the reference, which is the preset paper."""
    pairs = [(f.name, getattr(cfg, f.name), getattr(reference, f.name)) for f in dataclasses.fields(cfg)]
    return [f"{name} {ours} (paper {theirs})" for name, ours, theirs in pairs if ours != theirs]


# ---------------------------------------------------------------------------------------------- run folder

FORMAT = 4  # of checkpoint.pt and NN_weights_biases.pth; raise it whenever their keys change
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


def seal(data) -> bytes:
    """A zip file ends with the length of its comment and the comment; in ours that is the rest's checksum. torch.load
    checks none: from a damaged directory entry it returned uninitialised memory."""
    return (32).to_bytes(2, "little") + hashlib.sha256(data).digest()


def packed(state: dict) -> bytes:
    buffer = io.BytesIO()  # on a full disk torch.save(path) fails with a RuntimeError that names no cause
    torch.save(state, buffer)
    data = buffer.getvalue()[:-2]
    return data + seal(data)


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
        intact = data[-34:] == seal(data[:-34])
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
            new = Path(staging, "new")
            new.mkdir()
            yield new
            os.replace(staging, output_dir / PUBLISHING)  # from here on even kill -9 loses no result
            finish_publishing(output_dir)


def finish_publishing(output_dir: Path):
    """Move the files of PUBLISHING/new in, earlier ones aside; where a move fails, all go back. File by file, so that
    what else a user keeps in figures/ or irf/ stays."""
    new, old = output_dir / PUBLISHING / "new", output_dir / PUBLISHING / "old"
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
    shutil.rmtree(output_dir / PUBLISHING)


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
        cure = f"continue with: python {shlex.quote(Interrupted.script)} {again}" if saved else "nothing was saved yet"
        line = f"stopped by {signal.Signals(stop.args[0]).name} after iteration {stop.iteration}; {cure}"
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
        for signum, handler in before.items():
            signal.signal(signum, handler)
    print(f"deepham_ks: {line}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------------------------------- results

JUDGE_SEED = 20_000  # shocks on which every run is judged: far from the seeds of training, the same for all
WEIGHTS, CHECKPOINT = "NN_weights_biases.pth", "checkpoint.pt"
LAYERS = ("W1", "b1", "W2", "b2", "w3", "b3")


def as_economy(economy) -> Economy:
    """An Economy as it is, Krusell & Smith's for a Calibration, the default for None."""
    return economy if isinstance(economy, Economy) else krusell_smith(economy or Calibration())


def economy_dict(economy: Economy) -> dict:
    """The tables as files keep them."""
    tables = dataclasses.asdict(economy).items()
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in tables}


def weights_file(state: dict, economy: Economy, calibration: dict, cfg: Config, seed: int) -> dict:
    """Everything needed to use the networks: layers, tables, configuration and what ln K is centred on."""
    networks = {name: dict(zip(LAYERS, (layer.detach().cpu().clone() for layer in unpack(state[name], cfg.hidden))))
                for name in ("policy", "value")}
    return {**networks, "economy": economy_dict(economy), "calibration": calibration, "K_mean": float(state["K_mean"]),
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
    like |= {"seed": 0, "settled": 0, "K_mean": 0.0}
    if settings:
        shapes = layer_shapes(n_inputs(settings.economy.tables()), settings.config.hidden)
        layers = {name: torch.zeros(shape) for name, shape in zip(LAYERS, shapes)}
        like |= {"config": {"hidden": settings.config.hidden}, "calibration": settings.calibration,
                 "economy": economy_dict(settings.economy), "policy": layers, "value": layers}
    weights = load_checkpoint(Path(path), like, "--evaluate")
    return Solution(weights, choose_device(device), compile)


def compare(network: Solution, grid: GridSolution | None, cfg: Config) -> Tuple[dict, dict]:
    """Every accuracy figure of both on the same shocks, by solution and size: small, large, and the limit of infinitely
    many households; under comparison the distances between both. The arrays behind the pictures, by size and
    solution."""
    econ, economy = network.econ, network.economy
    solutions = {"network": network} | ({"grid": grid} if grid else {})
    judged = {"small": judge_panel(solutions, econ, cfg, cfg.eval_economies, cfg.eval_agents, JUDGE_SEED),
              "large": judge_panel(solutions, econ, cfg, cfg.eval_economies_large, cfg.eval_agents_large, JUDGE_SEED)}
    K_seen = np.concatenate([of["K_path"].ravel() for of in judged["small"][1].values()])
    top = grid.k_max if grid else 4 * max(arrays["network"]["k"].max() for _, arrays in judged.values())
    k = power_grid(GridConfig.n_k_fine, economy.k_min, top, GridConfig.exponent)
    K = np.linspace(0.95 * K_seen.min(), 1.05 * K_seen.max(), GridConfig.n_K_fine)
    judged["limit"] = judge_limit(solutions, economy, econ, cfg, k, K, JUDGE_SEED)
    figures = {name: {size: of[name] for size, (of, _) in judged.items()} for name in solutions} | {"comparison": {}}
    arrays = {size: of for size, (_, of) in judged.items()}
    arrays["irf"] = impulse_responses(solutions, econ, cfg, JUDGE_SEED)
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


def verdict(figures: dict, economy: Economy) -> list:
    """Rows of COLUMNS. In the default economy tolerances are absolute, and published stands for Maliar, Maliar & Valli
    (2010) as their stored policy does on this protocol (Bellman errors: Han, Yang & E 2021, first moment). In any other
    a figure is measured by the grid's of the same economy. Without a grid nothing passes or fails."""
    net, both, judged = figures["network"], figures["comparison"], "grid" in figures
    grid = figures["grid"] if judged else net  # its numbers are then left out
    default = not difference(economy_dict(economy), economy_dict(krusell_smith()), "economy")
    rows, N = [], {size: f"N={net[size]['n_agents'] or 'inf'}" for size in ("small", "large", "limit")}

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
    for size in ("large", "limit"):
        for name, published, absolute, slack in (("mean", -3.96, -4.0, 0.1), ("p99", -3.47, -3.4, 0.15),
                                                 ("max", -3.24, -2.0, None)):
            ours, of_grid = [x[size]["euler_log10"][name] for x in (net, grid)]
            row(f"Euler error, log10 {name}, {N[size]}", ours, of_grid, published if size == "large" else None,
                absolute, of_grid + slack if slack and size == "large" else None, float)
    for size, published, absolute in (("small", 0.0184, 0.004), ("large", None, 0.001), ("limit", None, 0.001)):
        for c in ("own", "best"):
            ours, of_grid = [x[size][f"bellman_{c}_c"]["mean"] for x in (net, grid)]
            row(f"Bellman error, {c} c, mean, {N[size]}", ours, of_grid, published, absolute)
    if not default:
        ours, of_grid = [x["large"]["bellman_in_consumption"]["mean"] for x in (net, grid)]
        row(f"Bellman error over u'(c) c, mean, {N['large']}", ours, of_grid, None, None, 1.5 * of_grid + 1e-5)
    for series in ("output", "capital") if judged else ():
        row(f"response of {series}, gap (p.p.)", both["impulse_response_gap"][series], 0.0, None, 0.02, 0.02)
    return rows


def print_verdict(rows: list) -> None:
    line = "{:<44}{:>10}{:>10}{:>11}{:>11}  {}"
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


def choose_device(device: str) -> str:
    if device == "auto" and not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version")
        if torch.version.cuda and driver.exists():
            raise UserError(f"the NVIDIA driver here ({driver.read_text().splitlines()[0]}) is too old for torch "
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
    econ, kernels = economy.tables(device, torch.float32), compile_kernels(compile)
    rng = torch.Generator()
    if device == "cuda":
        torch.cuda.init()
        rng = torch.cuda.default_generators[0]
        torch._C._jit_set_texpr_fuser_enabled(False)  # compiles inside a capture; and the CPU build has no such fuser
        torch.backends.cuda.preferred_linalg_library("cusolver")  # a Cholesky factor that can be captured
    rng.manual_seed(seed)
    state, path = initial_state(econ, config, seed, rng), output_dir and Path(output_dir) / CHECKPOINT
    free = ("iterations", "eval_", "irf_")  # a run may be resumed to more iterations, or judged at other sizes
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if not name.startswith(free)}
    of_run = {"calibration": calibration, "economy": economy_dict(economy), "config": fixed | {"seed": seed}}
    if resume:
        saved = load_checkpoint(path, of_run | state, "--resume")
        if saved["rng"].shape == rng.get_state().shape:  # of another size on another kind of device
            rng.set_state(saved["rng"])
        else:
            print("the checkpoint is of another kind of device: random numbers start anew, so not bit for bit")
            rng.manual_seed(seed + saved["iteration"])
        state |= {name: x.to(device) if isinstance(x, Tensor) else x for name, x in saved.items()
                  if name in state or name.startswith("adam_")}
        econ = econ._replace(K_mean=state["K_mean"], Delta_law=state["Delta_law"])
    Interrupted.iteration = state["iteration"]

    def after_iteration(state: dict) -> None:
        if path:
            if state["iteration"] == 1 and path.exists():  # of an earlier run
                with disk_errors(output_dir):
                    os.replace(path, path.with_name("checkpoint.previous.pt"))
            save_checkpoint(path, of_run | state | {"rng": rng.get_state()})
        Interrupted.iteration = state["iteration"]
        last = {name: column[-1] for name, column in state["history"].items()}
        shown = ("mean_K", "value_residual", "policy_residual", "objective")
        words = " ".join(f"{name} {last[name]:.4g}" for name in shown)
        bar.set_postfix_str(words, refresh=False)
        bar.update()
        if bar.disable:
            print(f"iteration {state['iteration']} {words} seconds {last['seconds']:.2f}", flush=True)

    with tqdm(total=config.iterations, initial=state["iteration"], desc="DeepHAM", disable=None, unit="it") as bar:
        train(state, econ, config, kernels, rng, cuda_graphs and device == "cuda", after_iteration)
    return Solution(weights_file(state, economy, calibration, config, seed), device, compile)


def work(settings: Settings) -> int:
    """Train or read, judge, write and print."""
    import matplotlib

    economy, calibration, cfg, grid_config, run = settings
    output_dir = Path(run.output_dir)
    prepare(output_dir)
    if run.device == "cpu" or not torch.cuda.is_available():
        limit_memory()
    seconds = {}
    if run.evaluate:
        network = load(output_dir / WEIGHTS, run.device, run.compile, settings)
    if run.preset != "paper":
        print(f"preset {run.preset} departs from the authors' game_nn_n50:")
        print("  " + ", ".join(departures(cfg, PRESETS["paper"])))
    if not run.evaluate:
        with stage(seconds, "training_with_checkpoints"):
            network = solve(economy, cfg, seed=run.seed, device=run.device, compile=run.compile, resume=run.resume,
                            cuda_graphs=run.cuda_graphs, output_dir=output_dir, calibration=calibration)
    with stage(seconds, "grid"):
        grid = solve_grid(economy, grid_config, progress=True).to(network.device) if grid_config else None
    with stage(seconds, "accuracy"), torch.no_grad():
        figures, arrays = compare(network, grid, cfg)
    rows = verdict(figures, economy)
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
    return exit_status(lambda argv: work(parse(argv, economy, calibration, config)),
                       sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
