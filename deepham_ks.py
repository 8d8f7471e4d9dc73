"""DeepHAM (Han, Yang & E 2021): heterogeneous households under aggregate shocks, and a grid solution that judges.

The economy. A household with capital k in state s has cash on hand m = R k + income(z, s) w, consumes c and saves
k' = m - c >= k_min. It discounts by beta(s) and has utility u(c) of risk aversion gamma. R and w are the marginal
products of Y = TFP(z) K^alpha L^(1 - alpha), K is mean capital, L the labour that households supply, income what they
earn and get, less a tax that pays for benefits, and (z, s) a Markov chain. The default economy is Krusell & Smith
(1998) as Den Haan, Judd & Juillard (2010) calibrate it. Any other is a set of tables: class Economy, and examples/.

The algorithm is learn(), one outer iteration after the other:
  1. simulate: B economies go on for some periods under the policy network as it is, each of infinitely many
     households: weights on nodes (s, k), which move without sampling noise;
  2. roll out: M single households live T periods on the simulated paths of (z, K). Five of these teach. The label is
     what a unit of k' is worth next period, lambda' = E[R' u'(c')], an exact sum over (s', z') under the policy itself,
     and by how much the same condition is missed later on, discounted back along the path;
  3. move the policy: a Gauss-Newton step of log c towards the first-order condition u'(c) = beta lambda';
  4. settled? once savings hardly move, steps fall like 1 / n for some iterations, which averages noise out.
After the last one the value network solves the Bellman equation of the final policy: 5. fit V.

How this differs from the paper, which `--preset paper` follows:
  - V is trained in turn with the policy there and stands for utility after T. Here no label sees V: it is there for
    Bellman errors, welfare, and whoever wants a value function.
  - K' is what N households happened to save there. Here households believe ln K' = a(z) + b(z) ln K, fitted to the
    simulated paths, with terms in L and L^2 where L depends on the history of z. Where flags let networks see moments
    of the distribution it is the simulated K'.
  - Steps. There Adam climbs simulated utility. Here the first-order condition is a least-squares problem.

Read first: the section "household", learn(), roll_out_households(), worth_of_saving(), policy_step(). From class Policy
on solutions are used, judged and drawn; then tables are checked; last comes the machine, and one run.

Symbols: k, c, m capital, consumption, cash on hand; K mean capital; R, w gross return and wage; M moments of the
distribution; Delta what K is worth to whoever decides (game, planner); `_next` is a prime. Shapes: B economies, N
households of each or nodes (s, k), M households of a roll-out, T periods, J successors (s', z') of a state, Z and S
numbers of states, P parameters. `--help` has all flags; import deepham_ks as dk, and dk.solve(economy) is a solution.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Tuple

import numpy as np
import scipy.interpolate
import scipy.optimize
import scipy.sparse.linalg
import scipy.stats
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

__version__ = "3.4.1"

# ---------------------------------------------------------------------------------------------- settings


class UserError(RuntimeError):
    """What is wrong, the flag or table and the cure, in one line; main() prints it and returns 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def require(holds, message: str) -> None:
    if not holds:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def option(default, reason: str, within: str = "(-inf, inf)", choices=None):
    """A dataclass field that is a command-line flag, whose --help text is reason. check_options() holds numbers to the
    interval within and words to choices; other fields are no flags and are not checked."""
    return field(default=default, metadata={"help": reason, "within": within, "choices": choices})


def inside(x, within: str):
    """Whether a number or an array lies in an interval such as "[0, 1)". NaN lies in none, infinity in no open end."""
    low, high = map(float, within[1:-1].split(","))
    return (low < x) & (x < high) | (x == low) & (within[0] == "[") | (x == high) & (within[-1] == "]")


@dataclass(frozen=True)
class Calibration:
    """Krusell & Smith (1998) in the calibration of Den Haan, Judd & Juillard (2010), quarterly."""

    beta: float = option(0.99, "discount factor", "(0, 1)")
    gamma: float = option(1.0, "relative risk aversion; 1 is log utility", "[0.1, 20]")
    alpha: float = option(0.36, "capital share", "(0, 1)")
    delta: float = option(0.025, "depreciation rate", "(0, 1]")
    k_min: float = option(0.0, "borrowing limit: k' is at least this, in goods", "(-1e6, 1e6)")
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
    """The method; the defaults are the preset `default`. Most other numbers of it are constants beside their use."""

    n_agents: int = option(0, "N, households an economy; 0: infinitely many, 125 if moments say who earns", "[0, 1e7]")
    n_economies: int = option(0, "B, economies at a time; 0: 96, or 16 to 24 of infinitely many households", "[0, 1e6]")
    periods: int = option(0, "periods simulated in each outer iteration; 0: 25 more than --horizon", "[0, 1e6]")
    horizon: int = option(0, "T, periods of a roll-out; 0: 75, or 200 where groups for ever differ in beta", "[0, 1e5]")
    batch: int = option(1536, "M, households in a roll-out", "[2, 1e7]")
    iterations: int = option(120, "outer iterations at most", "[1, 1e6]")
    hidden: int = option(28, "width of the two tanh layers of both networks", "[1, 1024]")
    moments: str = option("", "moments of the distribution, beside K, that the networks see: names of MOMENTS")
    learnt_moments: int = option(0, "moments that are learnt, functions of (k, s) averaged over households", "[0, 8]")
    optimizer: str = option("gauss-newton", "adam: the published algorithm", choices=("gauss-newton", "adam"))
    policy_rate: float = option(0.6, "gauss-newton: share of the Newton step of log c. adam: rate", "(0, 1]")
    policy_steps: int = option(2000, "adam: policy steps an outer iteration", "[1, 1e6]")
    value_steps: int = option(2000, "adam: value steps an outer iteration", "[1, 1e6]")
    settle: float = option(1e-4, "savings have settled when they move less than this share of K ten times", "(0, 1)")
    averaging: int = option(18, "iterations after that, in which steps fall and average noise out", "[0, 1e6]")
    K_spread: float = option(0.04, "share by which economies are scaled, at most, before each simulation", "[0, 0.9]")
    wide_share: float = option(0.5, "share of roll-outs that start anywhere in the simulated range of k", "[0, 1]")
    eval_agents: int = option(50, "households an economy when the solution is judged in a panel", "[2, 1e7]")
    eval_economies: int = option(64, "economies of that panel", "[1, 1e6]")
    eval_periods: int = option(2800, "periods simulated to judge a solution; the first tenth is dropped", "[20, 1e7]")
    irf_paths: int = option(200, "economies in an impulse response", "[1, 1e6]")
    irf_agents: int = option(200, "households an economy in an impulse response", "[2, 1e7]")
    irf_periods: int = option(60, "periods of an impulse response", "[1, 1e5]")
    value_rate: float = 1e-3  # of the value network with adam

    @property
    def published(self) -> bool:
        """Whether the algorithm is that of Han, Yang & E (2021)."""
        return self.optimizer == "adam"


@dataclass(frozen=True)
class GridConfig:
    """The grid solution; at the defaults a finer grid changes nothing that matters."""

    n_k: int = option(200, "nodes of individual capital k in the household problem", "[10, 1e5]")
    n_K: int = option(12, "nodes of aggregate capital K in the household problem", "[4, 1000]")
    periods: int = option(60_000, "periods behind the final law of motion, a twentieth in most updates", "[1000, 1e7]")
    damping: float = option(0.5, "weight of the new law of motion; above 0.8 it cycles", "(0, 1]")
    tolerance: float = option(3e-7, "largest relative change of c, and of K' forecast, at the end", "(0, 1)")
    max_updates: int = option(90, "updates of the law of motion before giving up", "[1, 1e6]")
    seed: int = 0  # of the path of z behind the law of motion
    n_fine: int = 2000  # k points of the policy table
    k_max: float = 25.0  # largest k at first, a multiple of K; doubled while households come near
    exponent: float = 4.0  # k nodes are k_max x^exponent, x uniform: dense near the limit
    n_K_fine: int = 41  # K points of the policy table, which is linear in between
    n_L: int = 5  # nodes of aggregate labour in the household problem, where it depends on the history of z, and
    n_L_fine: int = 9  # points of the policy table
    K_range: tuple = (0.75, 1.35)  # of the nodes of K, multiples of the centre, which follows the simulation


# Maliar, Maliar & Valli (2010): 100 nodes of k with exponent 7, 4 nodes of K, for Krusell & Smith [0, 1000] x [30, 50]
GRIDS = {"converged": GridConfig(), "published": GridConfig(n_k=100, exponent=7.0, n_K=4, K_range=(0.76, 1.27))}
SMOKE_GRID = GridConfig(n_k=100, n_K=6, n_fine=300, n_K_fine=11, periods=10_000, tolerance=1e-5)

PRESETS = {
    "default": Config(),
    # after game_nn_n50 of the authors' code; --equilibrium stays what the economy says
    "paper": Config(n_agents=50, n_economies=384, periods=450, horizon=150, batch=384, iterations=6, averaging=0,
                    hidden=24, optimizer="adam", policy_rate=4e-4, K_spread=0.0, wide_share=0.0),
    "smoke": Config(n_agents=20, n_economies=4, periods=40, horizon=20, batch=64, iterations=3, averaging=1, hidden=8,
                    eval_agents=20, eval_economies=4, eval_periods=60, irf_paths=4, irf_agents=10, irf_periods=10),
}
EQUILIBRIA = ("market", "game", "planner")


@dataclass(frozen=True)
class Run:
    """What to do, where and with which seed."""

    preset: str = option("default", "default: accurate, fast; paper: the authors'; smoke: tiny", choices=tuple(PRESETS))
    seed: int = option(0, "seed of every random number of the training", "[0, 1e9]")
    grid: str = option("converged", "the judge; published: Maliar, Maliar & Valli's (2010); none: no comparison",
                       choices=(*GRIDS, "none"))
    equilibrium: str = option("", "who decides: price-takers (market), each of --players (game), a constrained planner "
                              "for all; empty: as the economy says", choices=("", *EQUILIBRIA))
    players: int = option(0, "households of the game; 0: as the economy says", "[0, 1e9]")
    start: float = option(0.0, "where a planner begins, in steady-state capital; 0: as the economy says", "[0, 100]")
    device: str = option("auto", "auto takes CUDA if there is one", choices=("auto", "cuda", "cpu"))
    compile: str = option("torchscript", "networks and roll-outs compiled or eager", choices=("torchscript", "none"))
    cuda_graphs: bool = option(True, "on CUDA: an outer iteration is one graph; turn off to debug")
    output_dir: str = option("", "of results; empty: . for the default run, else a folder in runs/ named by the flags")
    evaluate: bool = option(False, "train nothing: rebuild every result from NN_weights_biases.pth")
    resume: bool = option(False, "continue from checkpoint.pt in the output directory")


# ---------------------------------------------------------------------------------------------- the default economy


def krusell_smith(cal: Calibration = Calibration()) -> "Economy":
    """s: 0 unemployed / 1 employed; z: 0 bad / 1 good. Unemployment lasts as long as z says, in a new state of z 1.25
    and 0.75 times as probably as usual there, and its rate depends on z alone; a tax on wages pays the benefits."""
    check_options(cal)
    u, z_stay = np.array([cal.u_bad, cal.u_good]), 1 - 1 / cal.z_duration
    stay, L = 1 - 1 / np.array([cal.u_duration_bad, cal.u_duration_good]), cal.l_bar * (1 - u)
    p_uu = np.array([[stay[0], 0.75 * stay[1]], [1.25 * stay[0], stay[1]]])  # (z, z')
    p_eu = (u - u[:, None] * p_uu) / (1 - u[:, None])
    employed = 1 - np.stack([p_uu, p_eu], -1)  # (z, z', s)
    require(((employed >= 0) & (employed <= 1)).all(), "--u-bad, --u-good, --u-duration-bad, --u-duration-good imply a "
            "probability outside [0, 1]; bring the two rates closer together or change the durations")
    require((cal.mu * u < L).all(), "--mu, --u-bad, --u-good and --l-bar imply a tax of 100% or more; lower --mu")
    return Economy(
        alpha=cal.alpha, delta=cal.delta, gamma=cal.gamma, beta=cal.beta, k_min=cal.k_min,
        TFP=np.array([1 - cal.tfp_shock, 1 + cal.tfp_shock]),
        P_z=np.array([[z_stay, 1 - z_stay], [1 - z_stay, z_stay]]), Pi=np.stack([1 - employed, employed], -1),
        income=np.stack([np.full(2, cal.mu), cal.l_bar * (1 - cal.mu * u / L)], 1),
        sees_s=np.array([[-1.0], [1.0]]), weight=np.array([3.0, 1.0]),
        s_names=("unemployed", "employed"), z_names=("bad state", "good state"))


# ---------------------------------------------------------------------------------------------- economies

ROUNDING = 1e-4  # what a number of four digits, or of float32, may be off; tables are normalised within it
CHANCE, NOT_NEGATIVE = f"({-ROUNDING:g}, {1 + ROUNDING:g})", "(-1e-12, inf)"


def table(shape: str, within: str, default=dataclasses.MISSING):
    """A field of Economy: its shape, by the letters of its dimensions, and the interval of its numbers."""
    return field(default=default, metadata={"shape": shape, "within": within})


@dataclass(frozen=True, kw_only=True, eq=False)
class Economy:
    """All about the states s = 0..S-1 of a household and z = 0..Z-1 of the economy. Tables may be anything that numpy
    reads and that broadcasts to the shape given; UserError names the one that is wrong. Fields stay as they were given,
    so that dataclasses.replace() works; tables of full shape, and what follows from them, are in `arrays`: P (Z, S, Z,
    S) of the chain (z, s), shares, L, annuity (Z, S), the present value of one util a period for ever. K_ss, R_ss,
    w_ss, c_ss are those of the representative household at mean TFP and labour, where mean_beta R = 1.

    The shares p (S,) of s follow p' = p Pi[z, z'] along a path of z. Aggregate labour is L = sum_s p_s labour(z, s),
    the tax tau = sum_s p_s benefit(z, s) / L, and income(z, s) = (1 - tau) labour(z, s) + benefit(z, s). Where L and
    tau follow from z alone they are tables; elsewhere L is one more state of the economy, and labour_moves is True."""

    alpha: float = table("", "(0, 1)")  # capital share
    delta: float = table("", "(0, 1]")  # depreciation rate
    gamma: float = table("", "(0, 100)", 1.0)  # relative risk aversion
    k_min: float = table("", "(-inf, inf)", 0.0)  # borrowing limit: k' >= k_min
    TFP: np.ndarray = table("Z", "(0, inf)")  # from bad to good
    P_z: np.ndarray = table("ZZ", CHANCE)  # P(z' | z)
    Pi: np.ndarray = table("ZZSS", CHANCE)  # P(s' | z, z', s), or (S, S) P(s' | s)
    beta: np.ndarray = table("S", "(0, inf)")  # discount factor from now to next period
    labour: np.ndarray | None = table("ZS", NOT_NEGATIVE, None)  # efficiency units of labour that a household supplies
    benefit: np.ndarray | None = table("ZS", NOT_NEGATIVE, None)  # in wages; a tax on this period's wages pays for it
    income: np.ndarray | None = table("ZS", NOT_NEGATIVE, None)  # in place of both: in wages, after taxes and benefits
    L: np.ndarray | None = table("Z", "(0, inf)", None)  # beside income: labour supply, which is what households earn
    shares: np.ndarray | None = table("ZS", CHANCE, None)  # stationary; needed only where the chain is not ergodic
    sees_s: np.ndarray | None = table("SF", "(-inf, inf)", None)  # what networks see of s; without it 0/1 for each s
    weight: np.ndarray | float = table("S", "(0, inf)", 1.0)  # of s in the least-squares problems
    group: np.ndarray | int = table("S", "(-1, inf)", 0)  # 0, 1, ... that s belongs to, for the moments by group
    s_names: tuple = ()  # for legends
    z_names: tuple = ()
    equilibrium: str = "market"  # or "game", "planner": see Delta()
    players: int = table("", "(1, 1e12)", 50)  # of the game
    start: float = table("", "(0, 1000)", 1.0)  # of a planner's solution, in K_ss: there can be two local optima

    def __post_init__(self):
        arrays = checked_tables(self)
        add_chain(arrays)
        vars(self).update(arrays=arrays, **steady_state(self, arrays))

    def tables(self, device="cpu", dtype=torch.float64) -> "Tables":
        """What the tensor functions use, on one device."""
        a, (Z, S) = self.arrays, self.arrays.income.shape
        P = a.P.reshape(Z * S, Z * S)
        nexts, real = padded(P)
        reach, possible = padded(a.Pi.any((0, 1)))  # (S, n)
        own = np.take_along_axis(a.Pi, np.broadcast_to(reach, (Z, Z, *reach.shape)), 3) * possible
        members = a.group[:, None] == np.arange(a.group.max() + 1)  # (S, groups)
        sees_z = np.tile(np.linspace(-1, 1, Z)[:, None, None], (1, S, int(Z > 1)))
        found = vars(self) | vars(a) | {
            "cum_z": a.P_z.cumsum(1)[:, :-1], "cum_s": own.cumsum(-1)[..., :-1], "reach": reach,
            "next_s": (nexts % S).reshape(Z, S, -1), "next_z": (nexts // S).reshape(Z, S, -1),
            "probability": (np.take_along_axis(P, nexts, 1) * real).reshape(Z, S, -1),
            "sees": np.concatenate([np.tile(a.sees_s, (Z, 1, 1)), sees_z], 2),
            "root_weight": np.sqrt(a.weight), "of_group": members / (a.shares.sum(0) @ members),
            "lowest": (a.income[0] == a.income[0].min()) * 1.0}
        for name, kind in Tables.__annotations__.items():
            if kind is Tensor:
                kept = dtype if found[name].dtype == float and name != "Pi" else None
                found[name] = torch.tensor(found[name], device=device, dtype=kept)
        return Tables(**{name: found[name] for name in Tables._fields})


def padded(table: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Columns in which a row of table is not zero, (rows, as many as any row has), filled up with the row's last one;
    and which of them do not just fill up."""
    n = np.count_nonzero(table, 1)[:, None]
    order, i = np.argsort(table == 0, 1, kind="stable"), np.arange(n.max())
    return np.take_along_axis(order, np.minimum(i, n - 1), 1), i < n


def steady_state(economy: Economy, a: types.SimpleNamespace) -> dict:
    """mean_beta; R_ss, K_ss, w_ss, c_ss of the representative household at mean TFP and labour, the unit of networks;
    K_start and Delta_start, what would let it keep K where a solution starts: u'(c) = beta (R u'(c) + Delta)."""
    Z, S = a.income.shape
    discounted = np.tile(a.beta, Z)[:, None] * a.P.reshape(Z * S, Z * S)
    of_z, mean_beta = a.shares.sum(1), float(a.shares.sum(0) @ a.beta)
    growth = np.abs(np.linalg.eigvals(discounted)).max()
    require(growth < 1 and mean_beta < 1, f"beta: utility discounted along the chain grows by {growth:.6g} a period, "
            "so wealth has no bound; lower it")
    a.annuity = np.linalg.solve(np.eye(Z * S) - discounted, np.ones(Z * S)).reshape(Z, S)
    TFP, L, R = of_z @ a.TFP, of_z @ a.L, 1 / mean_beta
    K = float(L * (a.alpha * TFP / (R - 1 + a.delta)) ** (1 / (1 - a.alpha)))
    require(1e-6 < K < 1e9, f"alpha, beta, delta: steady-state capital is {K:.3g}; bring it into (1e-6, 1e9) by lower "
            "--alpha or --beta, or higher --delta")
    require(a.k_min < K, f"k_min: {a.k_min:g} is more than steady-state capital, {K:.4g}; lower it")
    K_start = K * (a.start if economy.equilibrium == "planner" else 1.0)
    c_ss, c = [TFP * capital**a.alpha * L ** (1 - a.alpha) - a.delta * capital for capital in (K, K_start)]
    c = max(c, 0.1 * c_ss)
    R_start = 1 - a.delta + a.alpha * TFP * (K_start / L) ** (a.alpha - 1)
    Delta_start = float((R - R_start) * (c / c_ss) ** -a.gamma / c_ss)
    return {"mean_beta": mean_beta, "R_ss": R, "K_ss": K, "w_ss": float((1 - a.alpha) * TFP * (K / L) ** a.alpha),
            "c_ss": float(c_ss), "K_start": K_start, "Delta_start": Delta_start}


class Tables(NamedTuple):
    """An Economy as tensors."""

    equilibrium: str
    alpha: float
    delta: float
    gamma: float
    k_min: float
    K_ss: float
    c_ss: float
    players: float
    TFP: Tensor  # (Z,)
    L: Tensor  # (Z,)
    beta: Tensor  # (S,)
    income: Tensor  # (Z, S)
    cum_z: Tensor  # (Z, Z - 1) cumulative P(z' | z)
    cum_s: Tensor  # (Z, Z, S, n - 1) cumulative P(s' | z, z', s) over reach[s]
    reach: Tensor  # (S, n) states s' that s can reach
    next_s: Tensor  # (Z, S, J) the reachable successors, in the one order that there is
    next_z: Tensor  # (Z, S, J)
    probability: Tensor  # (Z, S, J); 0 pads
    annuity: Tensor  # (Z, S)
    sees: Tensor  # (Z, S, F + 1), (1, S, F) where Z is one: what networks see of s and z
    root_weight: Tensor  # (S,)
    shares: Tensor  # (Z, S)
    of_group: Tensor  # (S, groups) 1 / share of the group that s is of, 0 elsewhere
    lowest: Tensor  # (S,) 1 where income is lowest
    labour_moves: bool  # whether L and the tax depend on the history of z
    labour: Tensor  # (Z, S)
    benefit: Tensor  # (Z, S)
    Pi: Tensor  # (Z, Z, S, S) float64
    usual: Tensor  # (Z, 2) mean L and tax given z; (Z, 0) where they follow from z
    L_mean: Tensor  # () and std of L, its units as an input
    L_std: Tensor
    benefit_law: Tensor  # (Z, 2) benefits paid are a + b L


# ---------------------------------------------------------------------------------------------- household


class At(NamedTuple):
    """Where households are: what one has, its state, and what it sees of the economy. k, s, K, z and Delta broadcast
    against each other; M and labour have one dimension more."""

    k: Tensor  # (...) capital, goods
    s: Tensor  # (...) its state
    K: Tensor  # (...) mean capital
    z: Tensor  # (...) aggregate state
    M: Tensor  # (..., n) moments of the cross-section beside K; n = 0 where networks see none
    Delta: Tensor  # (...) a planner's mean gain from K; zero in market and game
    labour: Tensor  # (..., 2) aggregate labour L and the tax; (..., 0) where both follow from z


class Ahead(NamedTuple):
    """What is expected of the economy next period, for each z' where it depends on it."""

    K: Tensor  # (...)
    M: Tensor  # (..., Z, n)
    Delta: Tensor  # (..., Z)
    labour: Tensor  # (..., Z, 2)


def place(k: Tensor, s: Tensor, K: Tensor, z: Tensor, econ: Tables) -> At:
    """Households of whom nothing else matters, where labour is as usual in z."""
    zero = torch.zeros_like(K)
    return At(k, s, K, z, zero.unsqueeze(-1)[..., :0], zero, econ.usual[z])


def supplied(at: At, econ: Tables) -> Tensor:
    """Aggregate labour L."""
    return at.labour[..., 0] if econ.labour_moves else econ.L[at.z]


def prices(at: At, econ: Tables) -> Tuple[Tensor, Tensor]:
    """Gross return R and wage w, marginal products of Y = TFP K^alpha L^(1-alpha)."""
    ratio = at.K / supplied(at, econ)
    product = econ.TFP[at.z] * ratio ** (econ.alpha - 1)  # Y / K
    return 1 - econ.delta + econ.alpha * product, (1 - econ.alpha) * product * ratio


def output(at: At, econ: Tables) -> Tensor:
    """Y = TFP K^alpha L^(1-alpha)."""
    return econ.TFP[at.z] * at.K**econ.alpha * supplied(at, econ) ** (1 - econ.alpha)


def earnings(at: At, econ: Tables) -> Tuple[Tensor, Tensor]:
    """(income(z, s) w, R): what cash on hand is made of, beside k."""
    R, w = prices(at, econ)
    if econ.labour_moves:
        return ((1 - at.labour[..., 1]) * econ.labour[at.z, at.s] + econ.benefit[at.z, at.s]) * w, R
    return econ.income[at.z, at.s] * w, R


def cash_on_hand(at: At, econ: Tables) -> Tuple[Tensor, Tensor]:
    """(m, R), m = R k + income(z, s) w, what c + k' is paid from."""
    y, R = earnings(at, econ)
    return R * at.k + y, R


# Period utility: these four, in units of c_ss, are all that the training knows of it; Delta_start in steady_state(),
# Policy.value() and the utils of judged() have the power of gamma, too.
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
def cash_of_K(at: At, econ: Tables) -> Tensor:
    """dm/dK: a unit more of K lowers R and raises w."""
    y, R = earnings(at, econ)
    return ((econ.alpha - 1) * (R - 1 + econ.delta) * at.k + econ.alpha * y) / at.K


def Delta(u_prime: Tensor, at: At, econ: Tables) -> Tensor:
    """Delta of a household with marginal utility u_prime: nothing where it takes prices as given, its own gain from its
    share of K in the game, and for a planner the mean of u'(c) dm/dK over all households, at.Delta."""
    if econ.equilibrium == "planner":
        return at.Delta + 0.0 * u_prime
    if econ.equilibrium == "game":
        return u_prime * cash_of_K(at, econ) / econ.players
    return 0.0 * u_prime


def gain_from_K(k_next: Tensor, at: At, econ: Tables) -> Tensor:
    """u'(c) dm/dK of a household that saves k_next; its mean over the cross-section is the planner's Delta."""
    m, _ = cash_on_hand(at, econ)
    return marginal_utility(m - k_next, econ) * cash_of_K(at, econ)


def worth_of_cash(c: Tensor, R: Tensor, at: At, econ: Tables) -> Tensor:
    """V_k = R u'(c) + Delta: what a unit of k is worth to a household that consumes c (envelope condition)."""
    u_prime = marginal_utility(c, econ)
    return R * u_prime + Delta(u_prime, at, econ)


def by_law(law: Tensor, ln_K: Tensor, labour: Tensor) -> Tensor:
    """a + b ln K of coefficients law (..., 2), or a + b ln K + c L + d L^2 of (..., 4) where labour moves: what is
    expected of ln K', of a planner's Delta, or of a moment."""
    value = law[..., 0] + law[..., 1] * ln_K
    if labour.shape[-1]:
        value = value + labour[..., 0] * (law[..., 2] + labour[..., 0] * law[..., 3])
    return value


def successors(at: At, k_next: Tensor, ahead: Ahead, econ: Tables) -> At:
    """The J states that may follow, stacked in front: (J, ...), each with what is expected for its z'."""
    s, z = econ.next_s[at.z, at.s].movedim(-1, 0), econ.next_z[at.z, at.s].movedim(-1, 0)
    of_z = z.unsqueeze(-1).unsqueeze(-1)
    M = torch.take_along_dim(ahead.M.unsqueeze(0), of_z, -2).squeeze(-2)
    gain = torch.take_along_dim(ahead.Delta.unsqueeze(0), of_z.squeeze(-1), -1).squeeze(-1)
    labour = torch.take_along_dim(ahead.labour.unsqueeze(0), of_z, -2).squeeze(-2)
    return At(k_next.unsqueeze(0).expand(z.shape), s, ahead.K.unsqueeze(0).expand(z.shape), z, M, gain, labour)


def expected(values: Tensor, at: At, econ: Tables) -> Tensor:
    """E[values | z, s] as the exact sum over the successors: (J, ...) -> (...)."""
    return (econ.probability[at.z, at.s].movedim(-1, 0) * values).sum(0)


# ---------------------------------------------------------------------------------------------- shocks


def draw(u: Tensor, cumulative: Tensor) -> Tensor:
    """Index with probabilities of which cumulative (..., n - 1) are the sums, from uniform numbers u (...)."""
    return (u.unsqueeze(-1) >= cumulative).sum(-1)


def uniform(shape, rng: torch.Generator, device) -> Tensor:
    """Uniform numbers of the generator, on device: a generator on the CPU gives every device the same."""
    return torch.rand(shape, generator=rng, device=rng.device).to(device)


def draw_z_path(periods: int, P_z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Aggregate states z (periods,), from the middle one."""
    z_path, cumulative = [len(P_z) // 2], P_z.cumsum(1)[:, :-1]
    for u in rng.random(periods - 1):
        z_path.append(int((u >= cumulative[z_path[-1]]).sum()))
    return np.array(z_path)


def draw_s(u: Tensor, s: Tensor, z: Tensor, z_next: Tensor, econ: Tables) -> Tensor:
    """s' of households in s where z' comes after z, from uniform numbers u; all (...), z and z' broadcast."""
    return econ.reach[s, draw(u, econ.cum_s[z, z_next, s])]


class Panel(NamedTuple):
    """The cross-section of B economies at one date: N households, or N nodes (s, k) of infinitely many."""

    k: Tensor  # (B, N)
    s: Tensor  # (B, N)
    weight: Tensor  # (B, N) of the nodes, with mean one; (B, 0) for households, who count the same
    z: Tensor  # (B, 1)
    p: Tensor  # (B, S) float64: shares of s as they are along the path of z; (B, 0) where labour follows from z


def shares_next(p: Tensor, z: Tensor, z_next: Tensor, econ: Tables) -> Tensor:
    """p' = p Pi[z, z'], exact: p (B, S), z and z' (B, 1)."""
    if not econ.labour_moves:
        return p
    p = (p.unsqueeze(-2) @ econ.Pi[z[:, 0], z_next[:, 0]]).squeeze(-2)
    return p / p.sum(-1, keepdim=True)


def labour_of(p: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """L = sum_s p_s labour(z, s) and the tax that pays benefits, sum_s p_s benefit(z, s) / L: p (B, S), z (B, 1) ->
    (B, 1, 2); (B, 1, 0) where both follow from z."""
    if not econ.labour_moves:
        return econ.usual[z]
    L, paid = (p * econ.labour[z[:, 0]]).sum(1), (p * econ.benefit[z[:, 0]]).sum(1)
    return torch.stack([L, paid / L], -1).unsqueeze(1).to(econ.beta.dtype)


def labour_ahead(p: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """The same next period, for each z': (B, 1, Z, 2)."""
    every_z = [torch.full_like(z, z_next) for z_next in range(len(econ.TFP))]
    return torch.stack([labour_of(shares_next(p, z, z_next, econ), z_next, econ) for z_next in every_z], 2)


def mean_over(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of x (B, N, ...) over a cross-section of this weight, see Panel."""
    if not weight.numel():
        return x.mean(1)
    return (x * (weight.unsqueeze(-1) if x.dim() > weight.dim() else weight)).mean(1)


def initial_panel(B: int, N: int, econ: Tables, K: float, rng: torch.Generator) -> Panel:
    """A dispersed cross-section (from a point mass it would need 2,000 periods to spread): k - k_min is gamma with mean
    K - k_min and half of that as standard deviation, (z, s) at the stationary shares. N = 0: infinitely many."""
    device, of_z = econ.TFP.device, econ.shares.sum(1)
    z = draw(uniform((B, 1), rng, device), of_z.cumsum(0)[:-1])
    given_z = econ.shares / of_z.unsqueeze(1)
    p = given_z[z[:, 0]].double() if econ.labour_moves else econ.usual[z[:, 0]].double()
    if N == 0:
        quantiles = scipy.stats.gamma.ppf((np.arange(500) + 0.5) / 500, 4, scale=0.25)
        k = (econ.k_min + (K - econ.k_min) * torch.from_numpy(quantiles)).to(given_z)
        nodes = k_nodes(torch.linspace(0, 1, NODES).to(given_z), 5 * k.mean(), econ)
        mass = spread(torch.full_like(k, NODES / 500)[None], k[None], nodes)
        weight = given_z[z[:, 0]].unsqueeze(2) * len(econ.beta) * mass
        s = torch.arange(len(econ.beta), device=device).repeat_interleave(NODES)
        return Panel(nodes.repeat(B, len(econ.beta)), s.repeat(B, 1), weight.flatten(1), z, p)
    k = econ.k_min - (K - econ.k_min) * uniform((4, B, N), rng, device).clamp(min=1e-12).log().mean(0)
    u = uniform((B, N), rng, device)
    if econ.of_group.shape[1] > 1:  # groups may be for ever: as many households in each as their share says
        u = (torch.arange(N, device=device) + u) / N
    return Panel(k, draw(u, given_z.cumsum(1)[:, :-1][z]), k[:, :0], z, p)


NODES = 80  # of k, in each s, of a cross-section of infinitely many households
NEAR_LIMIT = 0.05  # of c_ss: this near the limit networks and nodes have k linearly, far above it its log. Where it is
# a default argument, as others are, TorchScript reads it there: it knows no globals


def k_nodes(x: Tensor, top: Tensor, econ: Tables) -> Tensor:
    """k from k_min to top at x in [0, 1], log-uniform: dense where c bends most."""
    unit = NEAR_LIMIT * econ.c_ss
    return econ.k_min + unit * ((1 + (top - econ.k_min) / unit) ** x - 1)


def lottery(k: Tensor, nodes: Tensor) -> Tuple[Tensor, Tensor]:
    """Households at k (..., m) go to the four of the nodes (n,) around each: the first of them (..., m) and the shares
    that go to each (..., 4, m), those of cubic interpolation, which keep mean and variance of k. Between two nodes
    only, as Young (2010) has it, k would spread by itself. Some nodes get a little less than nothing."""
    first = (torch.searchsorted(nodes, k.contiguous(), right=True) - 2).clamp(0, len(nodes) - 4)
    four = nodes.unfold(0, 4, 1)
    apart = (four.unsqueeze(2) - four.unsqueeze(1) + torch.eye(4, device=k.device)).prod(2)  # (n - 3, 4)
    a, b, c, d = k.clamp(nodes[0], nodes[-1]) - four[first].movedim(-1, 0)
    ab, cd = a * b, c * d
    return first, torch.stack([b * cd, a * cd, ab * d, ab * c], -2) / apart[first].mT


def spread(weight: Tensor, k: Tensor, nodes: Tensor) -> Tensor:
    """The weight (..., m) of households at k (..., m) on the nodes, (..., n), by lottery()."""
    first, share = lottery(k, nodes)
    to = first.unsqueeze(-2) + torch.arange(4, device=k.device).unsqueeze(1)
    mass = (weight.unsqueeze(-2) * share).flatten(-2)
    return weight.new_zeros(*weight.shape[:-1], len(nodes)).scatter_add_(-1, to.flatten(-2), mass)


def next_panel(panel: Panel, k_next: Tensor, z_next: Tensor, econ: Tables, rng: torch.Generator) -> Panel:
    """The cross-section a period on, where k' (B, N) was saved and z' (B, 1) came."""
    k, s, weight, z, p = panel
    p = shares_next(p, z, z_next, econ)
    if weight.numel():
        B, S, n = len(k), len(econ.beta), k.shape[1] // len(econ.beta)
        moved = spread(weight.view(B, S, n), k_next.view(B, S, n), k[0, :n])
        return Panel(k, s, (econ.Pi[z[:, 0], z_next[:, 0]].to(moved).mT @ moved).flatten(1), z_next, p)
    return Panel(k_next, draw_s(uniform(s.shape, rng, s.device), s, z, z_next, econ), weight, z_next, p)


def simulate(policy: Callable, panel: Panel, periods: int, econ: Tables, rng: torch.Generator) -> Iterator:
    """The economies under a policy, (At, weight) -> k', period by period: yields the Panel; where its households are,
    At of k, s (B, N), K, z (B, 1), labour (B, 1, 2) and no moments; and k' (B, N)."""
    for u in uniform((periods, *panel.z.shape), rng, panel.z.device):
        at = place(panel.k, panel.s, mean_over(panel.k, panel.weight).unsqueeze(1), panel.z, econ)
        at = at._replace(labour=labour_of(panel.p, panel.z, econ))
        k_next = policy(at, panel.weight)
        yield panel, at, k_next
        panel = next_panel(panel, k_next, draw(u, econ.cum_z[panel.z]), econ, rng)


# ---------------------------------------------------------------------------------------------- networks
# The policy network's output f is the log of the share of cash on hand (above the limit) that is consumed, where that
# is below one; the value network's output g is a consumption equivalent, so both are of order one whatever gamma is.

K_SCALE = 8.0  # ln K moves by about a tenth: times 8 it is of the size of the other inputs
VALUE_UNIT = 0.1  # one unit of g is a tenth of consumption for ever
K_INPUT, N_OWN = 3, 4  # column of ln K among the inputs, and how many inputs stand before what is seen of s and z


class Net(NamedTuple):
    """A network and the units of its inputs."""

    layers: List[Tensor]  # W1 (H, inputs), b1 (H,), W2 (H, H), b2 (H,), w3 (H,), b3 ()
    K_centre: Tensor  # () mean capital around which ln K is seen
    M_mean: Tensor  # (n,) centre and
    M_std: Tensor  # (n,) unit of the moments


def capital_inputs(k: Tensor, econ: Tables, near: float = NEAR_LIMIT) -> Tuple[Tensor, Tensor]:
    """Two functions of k: one steep near the limit, where c bends, and one of order one."""
    rest = (k - econ.k_min).clamp(min=0.0)
    return 2 * torch.log(rest / econ.c_ss + near), rest / (rest + econ.K_ss)


def above_limit(m: Tensor, econ: Tables) -> Tensor:
    """Cash on hand above the limit: what can be consumed. At prices far from any solution there may be none."""
    return (m - econ.k_min).clamp(min=1e-6 * econ.c_ss)


def features(at: At, m: Tensor, net: Net, econ: Tables) -> Tensor:
    """Inputs of the policy network, (...) -> (..., inputs)."""
    return with_k(at.k, above_limit(m, econ), features_beside_k(at, net, econ), econ)


def with_k(k: Tensor, above: Tensor, others: Tensor, econ: Tables) -> Tensor:
    """What k and cash above the limit say, and the other inputs. Log cash carries the curvature, log capital what is
    left of it where the limit is near and cash hardly moves with k."""
    near_limit, bounded = capital_inputs(k, econ)
    own = [torch.log(above / (econ.K_ss + econ.c_ss)), near_limit, bounded]
    return torch.cat([x.unsqueeze(-1) for x in own] + [others], -1)


def features_beside_k(at: At, net: Net, econ: Tables, scale: float = K_SCALE) -> Tensor:
    """The inputs that a household's own capital does not move: ln K, s and z, labour where it moves, and moments, which
    are of order one together, so that the damping of the steps holds many of them while labels are noisy."""
    others = [(scale * torch.log(at.K / net.K_centre)).unsqueeze(-1), econ.sees[at.z, at.s]]
    if econ.labour_moves:
        others.append((at.labour[..., :1] - econ.L_mean) / econ.L_std)
    n = at.M.shape[-1]
    if n > 0:
        others.append((at.M - net.M_mean) / (n**0.5 * net.M_std))
    return torch.cat([x.expand(list(at.k.shape) + [x.shape[-1]]) for x in others], -1)


def feature_slopes(k: Tensor, m: Tensor, R: Tensor, n: int, econ: Tables, near: float = NEAR_LIMIT) -> Tensor:
    """d features / dk: (...) -> (..., n), n inputs. One household's k moves neither K nor the moments."""
    rest = (k - econ.k_min).clamp(min=0.0)
    own = [R / above_limit(m, econ), 2 / (rest + near * econ.c_ss), econ.K_ss / (rest + econ.K_ss) ** 2]
    zeros = torch.zeros(list(k.shape) + [n - 3], dtype=k.dtype, device=k.device)
    return torch.cat([torch.stack(own, -1), zeros], -1)


def for_value(x: Tensor, column: int = K_INPUT) -> Tensor:
    """What the value network sees: in front of features x, or of their slopes, the square of ln K, in which V bends
    where the policy hardly does."""
    return torch.cat([x[..., column : column + 1].square(), x], -1)


def layer_shapes(n: int, H: int, outputs: tuple = ()) -> List[tuple]:
    """W1, b1, W2, b2, w3, b3 of a network with n inputs, two layers of H units and one output, or (p,) of them."""
    return [(H, n), (H,), (H, H), (H,), (*outputs, H), outputs]


def unpack(theta: Tensor, shapes: list) -> List[Tensor]:
    """Layers of these shapes, views of the front of the parameter vector theta (P,)."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(theta[: sum(sizes)].split(sizes), shapes)]


def network(layers: List[Tensor], x: Tensor) -> Tensor:
    """Two tanh layers and a linear output: (..., inputs) -> (...)."""
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


def network_jacobian(layers: List[Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """d sum_j weight_j output(x_j) / d theta, by hand: x (J, M, inputs), weight (J, M) -> (M, P)."""
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    d2 = weight.unsqueeze(-1) * (1 - h2 * h2) * layers[4]
    d1 = (1 - h * h) * torch.matmul(d2, layers[2])
    W1, W2 = torch.einsum("jma,jmb->mab", d1, x), torch.einsum("jma,jmb->mab", d2, h)
    w3, b3 = (weight.unsqueeze(-1) * h2).sum(0), weight.sum(0).unsqueeze(-1)
    return torch.cat([W1.flatten(1), d1.sum(0), W2.flatten(1), d2.sum(0), w3, b3], 1)


def slope_jacobian(layers: List[Tensor], x: Tensor, dx: Tensor) -> Tensor:
    """d slope / d theta of network_and_slope, by hand: (M, inputs) -> (M, P). d and e are the adjoints of the
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
    W1 = e1[:, :, None] * dx[:, None] + d1[:, :, None] * x[:, None]
    W2 = e2[:, :, None] * dh[:, None] + d2[:, :, None] * h[:, None]
    return torch.cat([W1.flatten(1), d1, W2.flatten(1), d2, slope2 * a2, torch.zeros_like(h2[:, :1])], 1)


def initial_parameters(n: int, H: int, output_bias: float, seed: int, idle: List[int]) -> Tensor:
    """theta (P,) with a zero output layer: a constant function, output_bias. Nor do inputs idle enter W1."""
    rng = torch.Generator().manual_seed(seed)
    W1, b1 = torch.randn(H, n, generator=rng) / n**0.5, torch.randn(H, generator=rng) / 2
    W1[:, idle] = 0
    W2, b2 = torch.randn(H, H, generator=rng) / H**0.5, torch.randn(H, generator=rng) / 5
    return torch.cat([W1.flatten(), b1, W2.flatten(), b2, torch.zeros(H), torch.tensor([output_bias])])


def network_capital(net: Net, at: At, econ: Tables) -> Tensor:
    """k' of the policy network: what is above the limit less the share min(1, exp f) of it that is consumed."""
    m, _ = cash_on_hand(at, econ)
    above = above_limit(m, econ)
    f = network(net.layers, with_k(at.k, above, features_beside_k(at, net, econ), econ))
    return econ.k_min - torch.expm1(f.clamp(max=0.0)) * above


def value_output(net: Net, at: At, econ: Tables) -> Tensor:
    """g of the value network."""
    m, _ = cash_on_hand(at, econ)
    return network(net.layers, for_value(features(at, m, net, econ)))


def value_of(g: Tensor, at: At, econ: Tables, unit: float = VALUE_UNIT) -> Tuple[Tensor, Tensor]:
    """V = D(z, s) u(c_ss exp(g / 10)) and dV/dg: g is 0 where life is worth steady-state consumption for ever. With
    Delta k in it V may have any sign: there V = D (u(c_ss) + sinh(g / 10))."""
    x, D = unit * g, econ.annuity[at.z, at.s]
    c = econ.c_ss * torch.exp(x)
    if econ.equilibrium != "market":
        return D * (utility(torch.ones_like(x) * econ.c_ss, econ) + torch.sinh(x)), unit * D * torch.cosh(x)
    return D * utility(c, econ), unit * D * marginal_utility(c, econ) * c


def equivalent_of(V: Tensor, at: At, econ: Tables) -> Tensor:
    """g at which the network's value is V."""
    per_period = V / econ.annuity[at.z, at.s]
    if econ.equilibrium != "market":
        return torch.asinh(per_period - utility(torch.ones_like(V) * econ.c_ss, econ)) / VALUE_UNIT
    return torch.log(inverse_utility(per_period, econ) / econ.c_ss) / VALUE_UNIT


def network_value(net: Net, at: At, econ: Tables) -> Tuple[Tensor, Tensor]:
    """(V, V_k) of the value network, utility in the units of utility()."""
    m, R = cash_on_hand(at, econ)
    x = features(at, m, net, econ)
    dx = feature_slopes(at.k, m, R, x.shape[-1], econ)
    g, g_k = network_and_slope(net.layers, for_value(x), for_value(dx))
    V, V_g = value_of(g, at, econ)
    return V, V_g * g_k


# ---------------------------------------------------------------------------------------------- the loop

HISTORY = ("seconds", "mean_K", "policy_residual", "euler", "at_limit", "policy_taken", "policy_damping", "rate",
           "movement")  # columns of training.csv, a row an outer iteration


@dataclass
class State:
    """What a run carries from one outer iteration to the next. Tensors change in place."""

    policy: Tensor  # (P,) parameters of the policy network, behind them those of its learnt moments
    policy_before: Tensor  # (P,) before the last step: where a step that went wrong goes back to
    value: Tensor  # (P_V,) parameters of the value network
    damping: Tensor  # () of the policy step
    rates: Tensor  # (3,) sizes of the policy step and of the steps of both laws, see set_rates()
    k: Tensor  # (B, N) the economies as they are: capital,
    s: Tensor  # (B, N) states of households
    weight: Tensor  # (B, N or 0) how many they are, see Panel,
    z: Tensor  # (B, 1) and of the economy,
    p: Tensor  # (B, S) exact shares of s, see Panel
    K_centre: Tensor  # () of the input ln K
    M_mean: Tensor  # (n,) centre and
    M_std: Tensor  # (n,) unit of the moments
    K_law: Tensor  # (Z, 2) float64: households believe ln K' = a(z) + b(z) ln K; (Z, 4) where labour moves, by_law()
    Delta_law: Tensor  # (Z, 2 or 4) the planner's Delta on the same
    k_range: Tensor  # (2,) least and largest k, and
    K_range: Tensor  # (2,) K, of late simulations
    adam: Tensor  # (2, P + P_V) means of gradients and of their squares; (2, 0) outside the published algorithm
    adam_steps: Tensor  # (2,) float64: steps of policy and value network
    iteration: int = 0
    settled: int = 0  # iteration at which savings had settled
    caution: float = 1.0  # factor of the step, smaller after an iteration that was undone
    unbounded: int = 0  # iterations in a row in which a planner's households saved without bound
    watched: list = field(default_factory=list)  # the last ten of watched_savings()
    history: dict = field(default_factory=lambda: {name: [] for name in HISTORY})

    def tensors(self) -> dict:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


@torch.no_grad()
def learn(state: State, econ: Tables, cfg: Config, rng: torch.Generator, guard: "Guard") -> None:
    """The algorithm, in place on the state. guard wraps it: it runs an iteration as a CUDA graph, takes it back where
    it went wrong, saves a checkpoint and shows progress."""

    def iteration() -> Tensor:
        """Steps 1 to 3, which never wait for the host. Returns what is known of them."""
        # 1. Simulate. B economies go on under the policy as it is. K, a few percent off its usual path in each, gives
        #    the law of motion that households believe in, ln K' = a(z) + b(z) ln K.
        paths = simulate_on(state, econ, cfg, rng)

        # 2. Roll out. M households on windows of these paths, half of them put anywhere in the range of k. The label
        #    is what a unit of k' is worth next period, lambda' = E[R' u'(c')] + what is missed of this later on.
        batch = roll_out_households(state, paths, econ, cfg, rng)

        # 3. Move the policy: a damped Gauss-Newton step of log c towards u'(c) = beta lambda'. The published algorithm
        #    trains V as well, and its steps roll out anew.
        if cfg.published:
            taken = published_steps(state, paths, econ, cfg, rng)
        else:
            taken = policy_step(state, batch, paths, econ, cfg)
        return iteration_figures(state, batch, taken, econ, cfg)

    while state.iteration < min(full_steps(state, cfg) + cfg.averaging, cfg.iterations):
        set_rates(state, cfg)  # full steps at first; in the last cfg.averaging iterations they fall like 1 / n
        figures = guard.run(iteration)
        state.watched = [*state.watched[-9:], figures["watched"]]
        figures |= {"rate": float(state.rates[0]), "movement": movement(state.watched)}
        for name, column in state.history.items():
            column.append(figures[name])
        state.iteration += 1

        # 4. Settled? Savings have hardly moved for ten iterations and Euler errors neither fall nor rise. Another
        #    cfg.averaging iterations follow.
        if not state.settled and has_settled(state, cfg):
            state.settled = state.iteration
        guard.after_iteration()

    # 5. Fit V to the Bellman equation of the policy, which stays what it is.
    if not cfg.published:
        fit_value(state, econ, cfg, rng)


def full_steps(state: State, cfg: Config) -> int:
    """Iterations with steps of full size: until savings have settled, or as many as there is room for."""
    return cfg.iterations if cfg.published else state.settled or max(cfg.iterations - cfg.averaging, 0)


DECAY = 0.25  # how fast steps fall: fast enough to average over all of cfg.averaging, slow enough to go on learning


def set_rates(state: State, cfg: Config) -> None:
    """Sizes of the steps: of the policy; of the law of K, which follows by halves; of the planner's Delta, which waits
    until the policy is near its first-order condition. The first two fall once savings have settled."""
    fall = 1 + DECAY * max(state.iteration - full_steps(state, cfg), 0)
    step, near = state.caution / fall, min(state.history["policy_residual"][-3:], default=1.0) < 0.05
    law = 1.0 if state.iteration == 0 or cfg.published else 0.5
    state.rates.copy_(torch.tensor([cfg.policy_rate * step, law * step, 0.2 * near]))


WATCHED = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 3.0)  # of K - k_min: k above k_min at which savings are watched


def watched_savings(state: State, econ: Tables, cfg: Config) -> Tensor:
    """k' as a share of K at WATCHED, a mean over (z, s) and over K up to 3% off its centre: (10,)."""
    K, (Z, S), device = state.K_centre, econ.shares.shape, econ.TFP.device
    z, s = torch.arange(Z, device=device).unsqueeze(1), torch.arange(S, device=device)
    k = econ.k_min + torch.stack([multiple * (K - econ.k_min) for multiple in WATCHED]).view(-1, 1, 1, 1)
    of_K = torch.stack([0.97 * K, K, 1.03 * K]).view(-1, 1, 1)
    at = place(*torch.broadcast_tensors(k, s, of_K, z), econ)._replace(M=state.M_mean)
    k_next = network_capital(policy_net(state, econ, cfg), at, econ)  # (10, 3, Z, S)
    return (k_next * econ.shares).sum((2, 3)).mean(1) / K


def two_means(series: list, n: int) -> np.ndarray:
    """Means of the n before the last n, and of the last n, (2, ...)."""
    return np.reshape(series[-2 * n :], (2, n, -1)).mean(1)


def movement(watched: list) -> float:
    """Mean change between two means of five iterations in a row of watched_savings(), which averages noise out."""
    n = min(5, len(watched) // 2)
    return float(np.abs(np.diff(two_means(watched, n), axis=0)).mean()) if n else 1.0


def iteration_figures(state: State, batch: "Batch", taken: Tensor, econ: Tables, cfg: Config) -> Tensor:
    """The figures of HISTORY from mean_K to policy_damping, and watched_savings(), on the device."""
    net, at, (m, _) = policy_net(state, econ, cfg), batch.at, cash_on_hand(batch.at, econ)
    if cfg.published:  # whose labels are realised, not expected
        batch = batch._replace(expected=fast.expected_worth(net, at, m - batch.c, batch.ahead, econ))
    free = batch.c < above_limit(m, econ) * (1 - 1e-6)
    error = 1 - inverse_marginal_utility((econ.beta[at.s] * batch.expected).clamp(min=1e-30), econ) / batch.c
    missed, error = [torch.where(free, x, 0.0) for x in (policy_residual(batch, econ), error)]
    mean_K, share = mean_over(state.k, state.weight).mean(), free.float().mean()
    means = torch.stack([mean_K, missed.square().mean(), error.abs().sum(), free.sum().float(), 1 - share])
    mean_K, missed, euler, n, at_limit = total(means) / RANKS
    figures = torch.stack([mean_K, missed.sqrt(), euler / n, at_limit, taken, state.damping])
    return torch.cat([figures, watched_savings(state, econ, cfg)])


def has_settled(state: State, cfg: Config) -> bool:
    """Savings moved little ten times in a row, and Euler errors neither fall nor rise."""
    moved = state.history["movement"][-10:]
    if len(moved) < 10 or max(moved) >= cfg.settle:
        return False
    (before,), (last,) = two_means(state.history["euler"], 5)
    return 0.8 < last / before < 1.25


def still_moving(history: dict, settled: int, cfg: Config) -> str:
    """Which quantity a run left moving, or nothing."""
    if cfg.published:
        return ""
    euler = history["euler"][settled:]
    if n := min(len(euler) // 3, 10):
        (before,), (last,) = two_means(euler, n)
        if last < 0.8 * before:
            return f"Euler errors fell to {last:.1e} in {n} iterations, from {before:.1e}"
    if not settled:
        return f"savings moved by {history['movement'][-1]:.1e} of K in ten iterations (--settle {cfg.settle:g})"
    return ""


# ---------------------------------------------------------------------------------------------- 1. simulate


class Paths(NamedTuple):
    """What a simulation of B economies leaves to learn from."""

    at: At  # (periods, B) where they are; k and s are nobody's
    ahead: Ahead  # (periods - 1, B)
    held: tuple  # k, s and weight (periods, B, N or 0) of the cross-sections, where moments are learnt; else ()


def simulate_on(state: State, econ: Tables, cfg: Config, rng: torch.Generator) -> Paths:
    """The economies go on from where they are, under the current policy; what the state holds of them follows."""
    net, M, rows, held, gains = policy_net(state, econ, cfg), [], [], [], []
    seen = seen_moments(net.layers, econ, cfg)

    def policy(at, weight):
        M.append(moments_of(at.k, at.s, seen, weight))
        return fast.network_capital(net, at._replace(M=M[-1].unsqueeze(1)), econ)

    for panel, at, k_next in simulate(policy, scaled(state, econ, cfg, rng), cfg.periods, econ, rng):
        k, s, weight, z, p = panel
        rows.append((at.K[:, 0], z[:, 0], at.labour[:, 0], p, next_moments(k_next, s, z, seen, econ, weight)))
        if cfg.learnt_moments:
            held.append((k, s, weight))
        if econ.equilibrium == "planner":
            gains.append(mean_over(gain_from_K(k_next, at, econ), weight))
    M, (K, z, labour, p, M_next) = torch.stack(M), [torch.stack(x) for x in zip(*rows)]
    labour_next = labour_ahead(p[:-1].flatten(0, 1), z[:-1].view(-1, 1), econ).view(*M_next[1:].shape[:3], -1)
    held = tuple(torch.stack(x) for x in zip(*held))
    every_K, every_z, every_labour = [gathered(x, 1) for x in (K, z, labour)]
    if M.numel():  # where moments are seen K' is the simulated one: they are there to tell it
        K_next = K[1:]
    else:
        approach(state.K_law, law_of_motion(every_K, every_labour, every_z, 0 * econ.TFP)[0], state.rates[1])
        K_next = torch.exp(by_law(state.K_law[z[:-1]], torch.log(K[:-1].double()), labour[:-1].double())).to(K.dtype)
    Delta, Delta_next = torch.zeros_like(K), torch.zeros_like(K_next).unsqueeze(-1).expand(-1, -1, len(econ.TFP))
    if gains:
        found, _ = regress_by_z(gathered(torch.stack(gains), 1), every_K, every_labour, every_z, 0 * econ.TFP)
        approach(state.Delta_law, found, state.rates[2])
        law = state.Delta_law.to(K.dtype)
        Delta = by_law(law[z], torch.log(K), labour)
        Delta_next = by_law(law, torch.log(K_next).unsqueeze(-1), labour_next)
    widen(state.k_range, gathered(ends_of(panel), 0))
    widen(state.K_range, every_K)
    for name, x in panel._asdict().items():  # only here: the first date was the state itself
        getattr(state, name).copy_(x)
    recentre(state, every_K, gathered(M, 1), econ, cfg)
    return Paths(At(K, z, K, z, M, Delta, labour), Ahead(K_next, M_next[:-1], Delta_next, labour_next), held)


def scaled(state: State, econ: Tables, cfg: Config, rng: torch.Generator) -> Panel:
    """The economies with each group's capital scaled by up to cfg.K_spread, on nodes that reach far enough."""
    k, s, weight, z, p = (getattr(state, name) for name in Panel._fields)
    scale = 1 + cfg.K_spread * (2 * uniform((len(k), econ.of_group.shape[1]), rng, k.device) - 1)
    k = econ.k_min + (k - econ.k_min) * scale.gather(1, econ.of_group.argmax(1)[s])
    if weight.numel():
        B, S, n = len(k), len(econ.beta), k.shape[1] // len(econ.beta)
        nodes = k_nodes(torch.linspace(0, 1, n, device=k.device), learnt_top(state.k_range[1], state.K_centre), econ)
        weight, k = spread(weight.view(B, S, n), k.view(B, S, n), nodes).flatten(1), nodes.repeat(B, S)
        weight = weight / weight.mean(1, keepdim=True)  # of rounding
    return Panel(k, s, weight, z, p)


RARE = 1e-6  # a share of infinitely many households that does not count as any


def ends_of(panel: Panel) -> Tensor:
    """Least and largest k that households hold, (2,)."""
    if not panel.weight.numel():
        return torch.stack(panel.k.aminmax())
    k, order = panel.k[0].sort(stable=True)
    below = panel.weight.clamp(min=0)[:, order].double().cumsum(1)
    share = below / below[:, -1:]
    reached = (share > RARE) & (share.roll(1, 1) < 1 - RARE)
    reached[:, 0] = share[:, 0] > RARE
    return torch.stack([torch.where(reached, k, torch.inf).min(), torch.where(reached, k, -torch.inf).max()])


def regress_by_z(y: Tensor, K: Tensor, labour: Tensor, z: Tensor, still: Tensor) -> Tuple[Tensor, Tensor]:
    """y on ln K and, where labour (periods, B, 2) moves, L and L^2, by least squares over (periods, B), in float64:
    coefficients (Z, 2 or 4) as by_law() takes them, and R2 (Z,). Where K does not move (one z, say) slopes are
    (still(z), 0, 0) and R2 is NaN; where z never comes the constant is NaN."""
    L = [labour[..., 0].double()] if labour.shape[-1] else []
    x = [torch.log(K.double()), *L, *[v.square() for v in L]]
    here = (z == torch.arange(len(still), device=still.device).view(-1, 1, 1)).double()  # (Z, periods, B)

    def mean(v):
        return (here * v).sum((1, 2)) / here.sum((1, 2))

    means = [mean(v.double()) for v in (y, *x)]
    dy, *dx = [v.double() - of_z.view(-1, 1, 1) for v, of_z in zip((y, *x), means)]
    moves = mean(dx[0] * dx[0]) > 1e-10
    if len(x) == 1:
        b = torch.where(moves, mean(dx[0] * dy) / mean(dx[0] * dx[0]), still.double()).unsqueeze(1)
    else:
        A = torch.stack([torch.stack([mean(v * w) for w in dx], 1) for v in dx], 1)
        A.diagonal(dim1=1, dim2=2).mul_(1 + 1e-12).add_(1e-20)  # labour need not move in every z
        b, _ = torch.linalg.solve_ex(A, torch.stack([mean(v * dy) for v in dx], 1))
        b = torch.where(moves.unsqueeze(1), b, torch.stack([still.double(), *[0 * moves.double()] * (len(x) - 1)], 1))
    left = dy - sum(of_z.view(-1, 1, 1) * v for of_z, v in zip(b.T, dx))
    r2 = 1 - mean(left**2) / torch.where(moves, mean(dy * dy), torch.nan)
    return torch.cat([(means[0] - (b.T * torch.stack(means[1:])).sum(0)).unsqueeze(1), b], 1), r2


def law_of_motion(K_path: Tensor, labour: Tensor, z_path: Tensor, still: Tensor) -> Tuple[Tensor, Tensor]:
    """ln K' by regress_by_z() over paths K, z (periods, B), labour (periods, B, 2)."""
    return regress_by_z(torch.log(K_path[1:].double()), K_path[:-1], labour[:-1], z_path[:-1], still)


def approach(law: Tensor, found: Tensor, share: Tensor) -> None:
    """The law (Z, n), in place, moves this share of the way to what was found, where z came."""
    law.add_(share * torch.where(found.isnan(), 0.0, found - law))


def widen(ends: Tensor, now: Tensor) -> None:
    """A simulated range (2,), in place: it grows at once and shrinks slowly, so that rare states always teach."""
    now = torch.stack(now.aminmax())
    slowly = ends + 0.1 * (now - ends)
    ends.copy_(torch.stack([torch.minimum(now, slowly)[0], torch.maximum(now, slowly)[1]]))


def recentre(state: State, K_path: Tensor, M: Tensor, econ: Tables, cfg: Config) -> None:
    """Inputs are centred anew where mean K has moved by a tenth, or a moment by half its unit; the first layer takes
    the difference up, so that the policy network stays the function it was."""
    W1, b1, *_ = policy_net(state, econ, cfg).layers
    shift = torch.log(K_path / state.K_centre).mean()
    shift = torch.where(shift.abs() > 0.1, shift, 0.0)
    state.K_centre.mul_(torch.exp(shift))
    b1.add_(K_SCALE * shift * W1[:, K_INPUT])
    n, M = len(state.M_mean), M.flatten(0, 1)
    if n:
        shift, unit = (M.mean(0) - state.M_mean) / state.M_std, M.std(0) / state.M_std
        moved = (shift.abs() > 0.5) | (unit > 2) | ((unit < 0.5) & (unit > 1e-6))
        shift, unit = torch.where(moved, shift, 0.0), torch.where(moved & (unit > 1e-6), unit, 1.0)
        b1.add_(W1[:, -n:] @ shift / n**0.5)
        W1[:, -n:].mul_(unit)
        state.M_mean.add_(state.M_std * shift)
        state.M_std.mul_(unit)


# ---------------------------------------------------------------------------------------------- 2. roll out


class Batch(NamedTuple):
    """Roll-outs of M households over T periods, each (T, M), or the states of them that teach (n,)."""

    at: At
    ahead: Ahead
    c: Tensor
    expected: Tensor  # E[R' u'(c') + Delta'] under the policy; in the published algorithm worth
    worth: Tensor  # lambda', the label
    U: Tensor  # realised utility in the published algorithm, elsewhere c
    date: Tensor  # row of the cross-section among all dates and economies


def pick(x, index):
    """A tensor, or named tuples of tensors however deep, at an index of the first dimensions."""
    return x[index] if isinstance(x, Tensor) else type(x)(*[pick(part, index) for part in x])


TAUGHT = 5  # periods of a roll-out that teach


def taught(cfg: Config) -> List[int]:
    """Periods of a roll-out whose states teach: in its first half, so that T / 2 periods follow, and most of them
    early, where households are where they were put. The published algorithm's V learns from all of the first half."""
    last = max(cfg.horizon // 2 - 1, 0)
    if cfg.published:
        return list(range(last + 1))
    return sorted({round(last * (i / (TAUGHT - 1)) ** 3) for i in range(TAUGHT)})


def sample_households(state: State, paths: Paths, econ: Tables, cfg: Config, rng: torch.Generator):
    """k (M,) at first, path (T + 1, M), what is expected (T, M) and dates (T, M) of M households in windows of the
    simulated economies. A share of them start anywhere from near the limit to learnt_top(): the ergodic set of a wrong
    policy never visits the tails that decide the distribution."""
    M, (periods, B), device = cfg.batch, paths.at.K.shape, paths.at.K.device
    economy = torch.randint(B, (M,), generator=rng, device=device)
    start = torch.randint(periods - cfg.horizon, (M,), generator=rng, device=device)
    window = start + torch.arange(cfg.horizon + 1, device=device).unsqueeze(1)
    start_wide, drawn = uniform((2, M), rng, device)
    top, low = learnt_top(state.k_range[1], state.K_centre), (state.k_range[0] - econ.k_min) / 10
    wide = low + k_nodes(drawn, top - low, econ)
    k, s = some_households(state, M, econ, cfg, rng)
    k = torch.where(start_wide < cfg.wide_share, wide, k)
    path, ahead = pick(paths.at, (window, economy)), pick(paths.ahead, (window[:-1], economy))
    shocks, s_path = uniform(path.z.shape, rng, device), [s]
    for t in range(cfg.horizon):
        s_path.append(draw_s(shocks[t], s_path[t], path.z[t], path.z[t + 1], econ))
    return k, path._replace(s=torch.stack(s_path)), ahead, window[:-1] * B + economy


def some_households(state: State, M: int, econ: Tables, cfg: Config, rng: torch.Generator) -> Tuple[Tensor, Tensor]:
    """k, s (M,) of households drawn from the last cross-sections, as many in each s, since rare states hold most of the
    error; as they are in the published algorithm."""
    (B, N), S, device = state.k.shape, len(econ.beta), state.k.device
    if cfg.published:
        household = torch.randint(B * N, (M,), generator=rng, device=device)
        return state.k.flatten()[household], state.s.flatten()[household]
    s, weight = torch.arange(S, device=device), state.weight if state.weight.numel() else torch.ones_like(state.k)
    held = ((state.s.flatten() == s.unsqueeze(1)) * weight.flatten().clamp(min=0)).double().cumsum(1)  # (S, B N)
    each = math.ceil(M / S)
    drawn, off = uniform((2, S, each), rng, device)
    found = torch.searchsorted(held, drawn * held[:, -1:]).clamp(max=B * N - 1).T.flatten()[:M]
    k, s = state.k.flatten()[found], s.repeat(each)[:M]
    if state.weight.numel():  # between two nodes
        n = N // S
        k = k_nodes((found % n + off.T.flatten()[:M] - 0.5).clamp(0, n - 1) / (n - 1), state.k.max(), econ)
    return k, s


def learnt_top(k_high, K):
    """Largest k that roll-outs start from; at first the cross-section is too narrow."""
    return torch.maximum(1.5 * k_high, 5 * K)


AT_ONCE = {"cpu": 2**15, "cuda": 2**22}  # states: what stays in a cache; a GPU waits for launches


def roll_out_households(state: State, paths: Paths, econ: Tables, cfg: Config, rng: torch.Generator) -> Batch:
    """M fresh households under the current policy, with their labels: the states that teach (n,), or in the published
    algorithm all (T, M)."""
    net = policy_net(state, econ, cfg)
    k0, path, ahead, date = sample_households(state, paths, econ, cfg, rng)
    path = path._replace(k=fast.roll_out(net, k0, path, econ))
    at, k_next = pick(path, slice(cfg.horizon)), path.k[1:]
    n = max(1, AT_ONCE[k0.device.type] // (econ.next_s.shape[2] * cfg.batch))
    parts = [slice(t, t + n) for t in range(0, cfg.horizon, n)]
    c, dc = map(torch.cat, zip(*[fast.consumption_and_slope(net, pick(at, part), econ) for part in parts]))
    if cfg.published:
        V_T = fast.network_value(value_net(state, econ, cfg), pick(path, -1), econ)
        U, worth = fast.published_labels(*V_T, c, dc, at, econ)
        return Batch(at, ahead, c, worth, worth, U, date)
    expected = torch.cat([fast.expected_worth(net, pick(at, part), k_next[part], pick(ahead, part), econ)
                          for part in parts])
    return thin(Batch(at, ahead, c, expected, fast.worth_of_saving(expected, c, dc, at, econ), c, date), cfg)


def thin(batch, cfg: Config):
    """The states that teach of a Batch, or of a tensor or tuple in it, as one list (n,)."""
    if isinstance(batch, Tensor):
        return torch.cat([batch[t] for t in taught(cfg)])
    return type(batch)(*[thin(part, cfg) for part in batch])


def consumption_and_slope(net: Net, at: At, econ: Tables) -> Tuple[Tensor, Tensor]:
    """c and dc/dk of the policy network."""
    m, R = cash_on_hand(at, econ)
    x = features(at, m, net, econ)
    f, f_k = network_and_slope(net.layers, x, feature_slopes(at.k, m, R, x.shape[-1], econ))
    share, above = torch.exp(f.clamp(max=0.0)), above_limit(m, econ)
    return share * above, torch.where(f < 0, share * (R + above * f_k), R)


def expected_worth(net: Net, at: At, k_next: Tensor, ahead: Ahead, econ: Tables) -> Tensor:
    """E[R' u'(c') + Delta']: what k' is worth next period under the policy network, an exact sum over (s', z')."""
    nexts = successors(at, k_next, ahead, econ)
    m, R = cash_on_hand(nexts, econ)
    f = network(net.layers, features(nexts, m, net, econ))
    c = torch.exp(f.clamp(max=0.0)) * above_limit(m, econ)
    return expected(worth_of_cash(c, R, nexts, econ), at, econ)


def roll_out(net: Net, k: Tensor, path: At, econ: Tables) -> Tensor:
    """k (T + 1, M) of M households from k (M,) along a path (T + 1, M) of all that is not theirs."""
    k_path, T = torch.empty_like(path.K), path.K.shape[0] - 1
    k_path[0] = k
    y, R = earnings(path, econ)
    others = features_beside_k(path, net, econ)  # of all periods at once
    for t in range(T):
        above = above_limit(R[t] * k_path[t] + y[t], econ)
        f = network(net.layers, with_k(k_path[t], above, others[t], econ))
        k_path[t + 1] = econ.k_min - torch.expm1(f.clamp(max=0.0)) * above
    return k_path


def worth_of_saving(expected: Tensor, c: Tensor, dc: Tensor, at: At, econ: Tables) -> Tensor:
    """The labels (T, M): what a unit of k' is worth, lambda_{t+1}, backwards through a roll-out,

      lambda_{t+1} = E_t[R' u'(c') + Delta'] + (dk'/dk)_{t+1} (beta lambda_{t+2} - u'(c_{t+1})),

    whose second term is the miss of the first-order condition one period on: all later ones are in it, and at the
    solution it is zero. It comes back by at most one for one, as beta dk'/dk V_k' / (R' u'(c)) can be a thousand for
    who loses the income with next to nothing saved (Munos et al. 2016), and is -1/2 to 1 times the first."""
    beta, u_prime, (R, _) = econ.beta[at.s], marginal_utility(c, econ), prices(at, econ)
    saved = R - dc  # dk'/dk
    growth = beta[:-1] * (saved / R * worth_of_cash(c, R, at, econ))[1:].abs() / u_prime[:-1]
    of_miss, high, low = saved[1:] / growth.clamp(min=1.0), expected.abs(), -expected.abs() / 2
    gain, loss = of_miss * beta[1:], of_miss * u_prime[1:]
    worth = expected.clone()  # nothing is known of what follows the last period
    for t in range(c.shape[0] - 2, -1, -1):
        worth[t] = expected[t] + torch.clamp(gain[t] * worth[t + 1] - loss[t], low[t], high[t])
    return worth


def published_labels(V_T: Tensor, V_k_T: Tensor, c: Tensor, dc: Tensor, at: At,
                     econ: Tables) -> Tuple[Tensor, Tensor]:
    """Realised utility U_t = u(c_t) + Delta_t k_t + beta U_{t+1} and next period's costate lambda_{t+1}, with lambda_t
    = u'(c_t) dc/dk + Delta_t + beta lambda_{t+1} dk'/dk, from V and V_k at T: back-propagation through time."""
    beta, u_prime, (R, _) = econ.beta[at.s], marginal_utility(c, econ), prices(at, econ)
    gain = Delta(u_prime, at, econ)
    u, u_k = utility(c, econ) + gain * at.k, u_prime * dc + gain
    U, lam_next = torch.empty_like(c), torch.empty_like(c)
    for t in range(c.shape[0] - 1, -1, -1):
        lam_next[t] = V_k_T
        V_T, V_k_T = u[t] + beta[t] * V_T, u_k[t] + beta[t] * (R - dc)[t] * V_k_T
        U[t] = V_T
    return U, lam_next


KERNELS = ("network_capital", "network_value", "roll_out", "consumption_and_slope", "expected_worth", "worth_of_saving",
           "published_labels", "network_jacobian", "slope_jacobian")
fast = types.SimpleNamespace(**{name: globals()[name] for name in KERNELS})  # as they run


def compile_kernels(mode: str) -> None:
    """`fast` holds the compiled functions (mode 'torchscript') or the eager ones ('none', and where none compiles)."""
    vars(fast).update({name: globals()[name] for name in KERNELS})
    if mode == "torchscript":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                vars(fast).update({name: torch.jit.script(function) for name, function in vars(fast).items()})
        except Exception as error:
            print(f"TorchScript does not compile here ({first_line(error)}): running eagerly")


# ---------------------------------------------------------------------------------------------- 3. move the policy


def policy_residual(batch: Batch, econ: Tables) -> Tensor:
    """ln(c~ / c) with u'(c~) = beta lambda', within half a unit: how far log c is from its first-order condition."""
    u_prime = marginal_utility(batch.c, econ)
    worth = torch.maximum(econ.beta[batch.at.s] * batch.worth, 1e-6 * u_prime)
    return torch.log(inverse_marginal_utility(worth, econ) / batch.c).clamp(-0.5, 0.5)


def policy_step(state: State, batch: Batch, paths: Paths, econ: Tables, cfg: Config) -> Tensor:
    """The output of the policy network, the log of the share that is consumed, moves by policy_residual() wherever the
    borrowing limit leaves room. Whether the step was taken."""
    net, at = policy_net(state, econ, cfg), batch.at
    m, _ = cash_on_hand(at, econ)
    x, seen = features(at, m, net, econ), [held.flatten(0, 1)[batch.date] for held in paths.held]
    f, missed = network(net.layers, x), policy_residual(batch, econ)
    free = ((f < 0) | (missed < 0)) * econ.root_weight[at.s]
    free = free * robust(missed, free)
    slopes = learnt_slopes(net.layers[6:], seen, net, econ) if seen else None

    def residuals(theta):
        layers = policy_net(dataclasses.replace(state, policy=theta), econ, cfg).layers
        return ((f + missed - network(layers, with_learnt(x, layers[6:], seen, net, econ))) * free).unsqueeze(0)

    def jacobians(part):
        jacobian = fast.network_jacobian(net.layers, x[None, part], free[None, part])
        if slopes is not None:  # a moment enters where b1 does, through its column of W1
            H, n = net.layers[0].shape
            by_moment = jacobian[:, H * n : H * n + H] @ net.layers[0][:, -slopes.shape[1] :]
            jacobian = torch.cat([jacobian, (by_moment.unsqueeze(2) * slopes[part]).sum(1)], 1)
        yield jacobian

    state.policy_before.copy_(state.policy)
    return gauss_newton_step(state.policy, state.damping, state.rates[0], residuals, jacobians)


LEAST_DAMPING = 3e-5  # in units of the diagonal: less lets noise bend the networks where there are few states


def gauss_newton_step(theta: Tensor, damping: Tensor, rate, residuals: Callable, jacobians: Callable,
                      noisy: bool = True) -> Tensor:
    """rate times a Levenberg-Marquardt step of theta (P,), in place, solved in float64; returns whether it was taken.
    residuals(theta) are rows of residuals (R, n), jacobians(part) for each row -d residuals / d theta (n, P) of a slice
    of the n states. The damping is in units of each parameter's own diagonal (Marquardt 1963), so that what only few
    states see is free to move, and of a tenth of the mean one. The mean squared residual is added to it (Yamashita &
    Fukushima 2001), a thousandth of it where there is no noise. Of the step, a third and a ninth of it the one that
    leaves the smallest residuals is taken if it lowers them; if none does the damping rises tenfold."""
    now = residuals(theta)
    least, n = total(now.square().sum()), now.shape[1]
    A, gradient, best = theta.new_zeros(len(theta), len(theta)), torch.zeros_like(theta), theta
    for start in range(0, n, 2048):  # in parts: the whole jacobian would not fit a cache
        part = slice(start, start + 2048)
        for residual, jacobian in zip(now[:, part], jacobians(part)):
            for low, high in itertools.pairwise(len(A) * i // 6 for i in range(7)):  # a Cholesky factor reads no more
                A[low:high, :high].addmm_(jacobian[:, low:high].T, jacobian[:, :high])
            gradient.addmv_(jacobian.T, residual)
    A, gradient, at_start = total(A).double(), total(gradient), least
    care, floor = (1.0, LEAST_DAMPING) if noisy else (0.001, LEAST_DAMPING / 30)
    A.diagonal().add_((damping + care * least / (n * RANKS)) * (A.diagonal() + 0.1 * A.diagonal().mean()))
    factor, _ = torch.linalg.cholesky_ex(A)
    step = torch.cholesky_solve(gradient.double().unsqueeze(1), factor).squeeze(1).to(theta.dtype)
    for share in (1, 3, 9):
        trial = theta + rate / share * step
        left = total(residuals(trial).square().sum())
        better = left < least
        best, least = torch.where(better, trial, best), torch.where(better, left, least)
    taken = least < at_start
    damping.copy_(torch.where(taken, (damping / 3).clamp(min=floor), (damping * 10).clamp(max=1e6)))
    agreed(theta.copy_(best))
    return taken.to(damping.dtype)


def robust(residual: Tensor, weight: Tensor) -> Tensor:
    """Root weights (n,) of the pseudo-Huber loss: residuals many times the mean one, next to the kinks that the limit
    makes in c, count by their size and not its square, or they would bend the network everywhere else."""
    of_all = total(torch.stack([(weight.square() * residual.abs()).sum(), weight.square().sum()]))
    return (1 + (residual * of_all[1] / of_all[0].clamp(min=1e-30)).square()) ** -0.25


# ---------------------------------------------------------------------------------------------- the published steps


def published_steps(state: State, paths: Paths, econ: Tables, cfg: Config, rng: torch.Generator) -> Tensor:
    """Han, Yang & E (2021): value_steps of Adam on realised utility, then policy_steps on the utility of roll-outs, in
    economies that follow the policy."""
    for step in range(cfg.value_steps):
        if step % 20 == 0:  # the luck of one sample would soon be learnt by heart
            states = thin(roll_out_households(state, paths, econ, cfg, rng), cfg)
        adam_step(state, "value", value_loss, states, paths, econ, cfg)
    for step in range(cfg.policy_steps):
        if step % 20 == 19:  # prices follow what households save
            paths = simulate_on(state, econ, cfg, rng)
        batch = roll_out_households(state, paths, econ, cfg, rng)
        adam_step(state, "policy", policy_loss, batch, paths, econ, cfg)
    return torch.ones_like(state.damping)


def value_loss(state: State, states: Batch, paths: Paths, econ: Tables, cfg: Config) -> Tensor:
    """Half the mean squared error of g against realised utility, held to what half the least and twice the most
    consumption give for ever, as utility may have a bound."""
    D, U = econ.annuity[states.at.z, states.at.s], states.U
    if econ.equilibrium == "market":
        U = U.clamp(D * utility(states.c.min() / 2, econ), D * utility(2 * states.c.max(), econ))
    g = value_output(value_net(state, econ, cfg), states.at, econ)
    return (equivalent_of(U, states.at, econ) - g).square().mean() / 2


def policy_loss(state: State, batch: Batch, paths: Paths, econ: Tables, cfg: Config) -> Tensor:
    """Its gradient is that of minus utility, -sum_t beta^t (dU/d log c) d log c / d theta: back-propagation through
    time without the graph through time."""
    net, (m, _), beta = policy_net(state, econ, cfg), cash_on_hand(batch.at, econ), econ.beta[batch.at.s]
    seen = [held.flatten(0, 1)[batch.date.flatten()] for held in paths.held]
    x = with_learnt(features(batch.at, m, net, econ).flatten(0, 1), net.layers[6:], seen, net, econ)
    f = network(net.layers, x).view(beta.shape).clamp(max=0.0)
    first_order = (marginal_utility(batch.c, econ) - beta * batch.worth) * batch.c
    return -(beta.cumprod(0) / beta * first_order * f).sum(0).mean()


def adam_step(state: State, name: str, loss: Callable, batch: Batch, paths: Paths, econ: Tables, cfg: Config) -> None:
    """A step of Adam (Kingma & Ba 2015) with the momentum of the authors' code, .99 for both means."""
    of_value, P = name == "value", len(state.policy)
    theta, count = getattr(state, name), state.adam_steps[int(of_value)]
    mean, square = state.adam[:, P:] if of_value else state.adam[:, :P]
    with torch.enable_grad():
        at = theta.clone().requires_grad_()
        tried = dataclasses.replace(state, **{name: at})
        (gradient,) = torch.autograd.grad(loss(tried, batch, paths, econ, cfg), at)
    gradient = total(gradient) / RANKS
    mean.lerp_(gradient, 0.01)
    square.lerp_(gradient.square(), 0.01)
    unbiased = (1 - 0.99 ** count.add_(1)).to(theta.dtype)
    rate = state.caution * (cfg.value_rate if of_value else cfg.policy_rate)
    agreed(theta.sub_(rate * mean / unbiased / ((square / unbiased).sqrt() + 1e-8)))


# ---------------------------------------------------------------------------------------------- 5. fit V

VALUE_ROUNDS = 12  # samples of states at most, until V moves by
VALUE_MOVES = 3e-5  # units of the network's output, and
VALUE_STEPS = 6  # steps on each, every one on a part of the states, as there is no noise to average, but on
VALUE_STATES = 3  # states for each parameter at least: on fewer V bends between them
LEVEL_WEIGHT = 0.3  # of the level of V, in units of the network's output, against its slope, a share of u'(c)


def fit_value(state: State, econ: Tables, cfg: Config, rng: torch.Generator) -> None:
    """V of the policy as it is, on states where the policy leads: u(c) + Delta k + beta E V(s') - V(s) = 0, E an exact
    sum over (s', z'), and V_k = R u'(c) + Delta (fit the slopes too: Huge & Savine 2020). K goes farther than before:
    in panels of few households it does."""
    damping = torch.full_like(state.damping, 1e-2)
    cfg = dataclasses.replace(cfg, wide_share=0.0, K_spread=min(3 * cfg.K_spread, 0.9))
    state.rates[1:] = 0  # what households believe stays what it is
    for _ in range(VALUE_ROUNDS):
        paths = simulate_on(state, econ, cfg, rng)
        batch = roll_out_households(state, paths, econ, cfg, rng)
        n = max(1, RANKS * len(batch.c) // (VALUE_STATES * len(state.value)))
        before = value_output(value_net(state, econ, cfg), batch.at, econ)
        for i in range(VALUE_STEPS):
            value_step(state, pick(batch, slice(i % n, None, n)), damping, econ, cfg)
        moved = value_output(value_net(state, econ, cfg), batch.at, econ) - before
        if total(moved.abs().mean()) < VALUE_MOVES * RANKS:
            break


def value_step(state: State, batch: Batch, damping: Tensor, econ: Tables, cfg: Config) -> None:
    """A Gauss-Newton step of the value network."""
    net, at, beta = value_net(state, econ, cfg), batch.at, econ.beta[batch.at.s]
    m, R = cash_on_hand(at, econ)
    x = for_value(features(at, m, net, econ))
    dx = for_value(feature_slopes(at.k, m, R, x.shape[-1] - 1, econ))
    nexts = successors(at, m - batch.c, batch.ahead, econ)
    x_next = for_value(features(nexts, cash_on_hand(nexts, econ)[0], net, econ))
    u_prime = marginal_utility(batch.c, econ)
    flow, V_k = utility(batch.c, econ) + Delta(u_prime, at, econ) * at.k, worth_of_cash(batch.c, R, at, econ)
    V_g, V_g_next = value_of(network(net.layers, x), at, econ)[1], value_of(network(net.layers, x_next), nexts, econ)[1]
    weight = econ.root_weight[at.s]
    # the level is in units of g, the slope in u'(c); 1 - beta is small, so the first counts 1 / (1 - beta) times
    level, slope = LEVEL_WEIGHT * weight * econ.annuity[at.z, at.s] / V_g, weight / u_prime
    all_x = torch.cat([x.unsqueeze(0), x_next])
    all_V_g = torch.cat([V_g.unsqueeze(0), -econ.probability[at.z, at.s].T * beta * V_g_next])  # of minus the residual

    def both(theta):
        layers = value_net(dataclasses.replace(state, value=theta), econ, cfg).layers
        g, g_k = network_and_slope(layers, x, dx)
        V_next = value_of(network(layers, x_next), nexts, econ)[0]
        return flow + beta * expected(V_next, at, econ) - value_of(g, at, econ)[0], V_k - V_g * g_k

    # there is no noise in the residuals, so what is large is next to a kink
    level, slope = [w * robust(w * r, torch.ones_like(r)) for w, r in zip((level, slope), both(state.value))]

    def residuals(theta):
        return torch.stack([w * r for w, r in zip((level, slope), both(theta))])

    def jacobians(part):
        yield fast.network_jacobian(net.layers, all_x[:, part], (level * all_V_g)[:, part])
        yield fast.slope_jacobian(net.layers, x[part], dx[part] * (slope * V_g)[part].unsqueeze(1))

    gauss_newton_step(state.value, damping, 1.0, residuals, jacobians, noisy=False)


# ---------------------------------------------------------------------------------------------- moments
# Beside K and z the networks may see moments M of the cross-section: means over households of given functions of
# (k, s) and of learnt ones, Q(k, s), a small network whose parameters stand behind those of the policy network.

# name -> (k, s, econ) -> (..., n), of which a moment is the mean over households: a line more is a moment more
MOMENTS = {
    "mean": lambda k, s, econ: k.unsqueeze(-1),
    "variance": lambda k, s, econ: ((k / econ.K_ss - 1) ** 2).unsqueeze(-1),
    "unemployment": lambda k, s, econ: econ.lowest[s].unsqueeze(-1),  # the share of s with the lowest income
    "limit": lambda k, s, econ: (k <= econ.k_min).to(k.dtype).unsqueeze(-1),
    "groups": lambda k, s, econ: k.unsqueeze(-1) * econ.of_group[s],  # mean capital of each Economy.group
}
Q_HIDDEN = 12  # width of the two tanh layers of Q, as in the authors' code


def sees_who_earns(cfg: Config) -> bool:
    return cfg.learnt_moments > 0 or "unemployment" in cfg.moments.split(",")


def n_moments(econ: Tables, cfg: Config) -> int:
    """How many the networks see. UserError for a name that is none, and where households are too few to tell so many
    apart."""
    anybody, n, N = torch.zeros(1, dtype=econ.beta.dtype, device=econ.beta.device), cfg.learnt_moments, cfg.n_agents
    for name in filter(None, cfg.moments.split(",")):
        require(name in MOMENTS, f"--moments: {name!r} is none of {', '.join(MOMENTS)}")
        n += MOMENTS[name](anybody, anybody.long(), econ).shape[-1]
    require(N == 0 or 2 * n <= N, f"--moments, --learnt-moments: {n} moments of {N} households; raise --n-agents or "
            "take fewer")
    return n


def policy_shapes(econ: Tables, cfg: Config) -> List[tuple]:
    """Six tensors of the policy network and, where moments are learnt, six of Q."""
    seen, p = econ.sees.shape[2], cfg.learnt_moments
    shapes = layer_shapes(N_OWN + seen + econ.labour_moves + n_moments(econ, cfg), cfg.hidden)
    return shapes + (layer_shapes(2 + seen, Q_HIDDEN, (p,)) if p else [])


def policy_net(state: State, econ: Tables, cfg: Config) -> Net:
    return Net(unpack(state.policy, policy_shapes(econ, cfg)), state.K_centre, state.M_mean, state.M_std)


def value_net(state: State, econ: Tables, cfg: Config) -> Net:
    """It has one input more: see for_value()."""
    shapes = layer_shapes(policy_shapes(econ, cfg)[0][1] + 1, cfg.hidden)
    return Net(unpack(state.value, shapes), state.K_centre, state.M_mean, state.M_std)


def seen_moments(layers: List[Tensor], econ: Tables, cfg: Config) -> Callable | None:
    """What households k, s (...) add to the moments that the networks see, a function -> (..., n); None where they see
    none. layers: the policy network's, behind which stand those of Q."""
    of = [MOMENTS[name] for name in cfg.moments.split(",") if name]
    of += [functools.partial(Q, layers[6:])] if cfg.learnt_moments else []
    return (lambda k, s: torch.cat([moment(k, s, econ) for moment in of], -1)) if of else None


def Q(layers: List[Tensor], k: Tensor, s: Tensor, econ: Tables) -> Tensor:
    """(..., p) of households k, s (...)."""
    x = torch.cat([torch.stack(capital_inputs(k, econ), -1), econ.sees[0, s]], -1)
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h = torch.tanh(linear(h, layers[2], layers[3]))
    return linear(h, layers[4], layers[5])


def Q_jacobian(layers: List[Tensor], k: Tensor, s: Tensor, weight: Tensor, econ: Tables) -> Tensor:
    """d (mean of Q over a cross-section) / d its parameters: k, s, weight (n, N or 0) -> (n, p, parameters)."""
    x, N = torch.cat([torch.stack(capital_inputs(k, econ), -1), econ.sees[0, s]], -1), k.shape[1]
    h = torch.tanh(linear(x, layers[0], layers[1]))
    h2 = torch.tanh(linear(h, layers[2], layers[3]))
    one_of_p, columns = torch.eye(len(layers[5]), dtype=k.dtype, device=k.device), []
    for of_output, row in zip(one_of_p, layers[4]):
        d2 = (1 - h2 * h2) * row / N
        if weight.numel():
            d2 = d2 * weight.unsqueeze(2)
        d1 = (1 - h * h) * torch.matmul(d2, layers[2])
        V3 = of_output.unsqueeze(1) * mean_over(h2, weight).unsqueeze(1)
        parts = (d1.mT @ x, d1.sum(1), d2.mT @ h, d2.sum(1), V3, of_output.expand(len(k), -1))
        columns.append(torch.cat([part.flatten(1) for part in parts], 1))
    return torch.stack(columns, 1)


def moments_of(k: Tensor, s: Tensor, seen: Callable | None, weight: Tensor) -> Tensor:
    """Moments (B, n) of cross-sections k, s, weight (B, N or 0), see Panel."""
    return mean_over(seen(k, s), weight) if seen else k.new_zeros(len(k), 0)


def next_moments(k_next: Tensor, s: Tensor, z: Tensor, seen: Callable | None, econ: Tables, weight: Tensor) -> Tensor:
    """E[M' | z'] for each z', everybody's s' in expectation, an exact sum: k', s (B, N), z (B, 1) -> (B, Z, n)."""
    if not seen:
        return k_next.new_zeros(len(k_next), len(econ.TFP), 0)
    M_next, s_next = [], econ.reach[s]  # (B, N, reachable)
    q, zero = seen(k_next.unsqueeze(-1).expand(s_next.shape), s_next), torch.zeros_like(k_next).unsqueeze(-1)
    for z_next in range(len(econ.TFP)):
        p = econ.cum_s[z, z_next, s].diff(prepend=zero, append=zero + 1)  # P(s' | z, z', s)
        M_next.append(mean_over((p.unsqueeze(-1) * q).sum(2), weight))
    return torch.stack(M_next, 1)


def with_learnt(x: Tensor, layers: List[Tensor], seen: tuple, net: Net, econ: Tables) -> Tensor:
    """Inputs x (n, inputs), the learnt moments among them as Q of these layers has them."""
    if not seen:
        return x
    (k, s, weight), p, n = seen, len(layers[5]), len(net.M_mean)
    learnt = (mean_over(Q(layers, k, s, econ), weight) - net.M_mean[-p:]) / (n**0.5 * net.M_std[-p:])
    return torch.cat([x[..., :-p], learnt], -1)


def learnt_slopes(layers: List[Tensor], seen: tuple, net: Net, econ: Tables) -> Tensor:
    """d learnt moments / d parameters of Q as inputs at the states, (n, p, parameters)."""
    size, p, n = max(1, 2**18 // seen[0].shape[1]), len(layers[5]), len(net.M_mean)
    parts = [Q_jacobian(layers, *part, econ) for part in zip(*[x.split(size) for x in seen])]
    return torch.cat(parts) / (n**0.5 * net.M_std[-p:]).unsqueeze(1)


def sized(cfg: Config, economy: Economy) -> Config:
    """With the sizes that are left to the method. Who is in which s matters in finite economies alone."""
    a = economy.arrays
    N = cfg.n_agents or (125 if sees_who_earns(cfg) and not a.labour_moves else 0)
    B = cfg.n_economies or (96 if N else min(max(round(96 / a.shares.shape[1]), 16), 24))
    T = cfg.horizon or (75 if a.ergodic or np.ptp(a.beta) == 0 else 200)
    periods = cfg.periods or T + 25
    require(T > 1, "--horizon 1: give 2 or more")
    require(periods > T, f"--periods {periods} is too short for --horizon {T}: give --periods {T + 1} or more")
    plain = {x.name: type(x.default)(getattr(cfg, x.name)) for x in dataclasses.fields(cfg)}  # which files can hold
    return dataclasses.replace(cfg, **plain | {"n_agents": N, "n_economies": B, "horizon": T, "periods": periods})


def initial_state(econ: Tables, economy: Economy, cfg: Config, seed: int, rng: torch.Generator) -> State:
    """Before the first iteration: everybody consumes the share of cash on hand above the limit at which the
    representative household would stay where it is, and V is c_ss for ever."""
    n, a, K, of_z = n_moments(econ, cfg), economy.arrays, economy.K_start, economy.arrays.shares.sum(1)
    Y = float(of_z @ a.TFP * K**a.alpha * (of_z @ a.L) ** (1 - a.alpha))
    share = (Y - a.delta * K) / (Y + (1 - a.delta) * K - a.k_min)
    rng_Q = torch.Generator().manual_seed(seed + 2)
    (_, inputs), *_ = shapes = policy_shapes(econ, cfg)
    Q = [torch.randn(shape, generator=rng_Q).flatten() / shape[-1] ** 0.5 for shape in shapes[6:]]
    panel = initial_panel(cfg.n_economies, cfg.n_agents, econ, K, rng)
    idle = list(range(inputs - n - econ.labour_moves, inputs))  # labour and moments come in as they are needed,
    policy = torch.cat([initial_parameters(inputs, cfg.hidden, math.log(share), seed, idle), *Q]).to(econ.TFP.device)
    idle = [0, *[i + 1 for i in idle]]  # and so does the square of ln K
    value = initial_parameters(inputs + 1, cfg.hidden, 0.0, seed + 1, idle).to(econ.TFP.device)
    k, K_all = [gathered(x, 0).aminmax() for x in (ends_of(panel), mean_over(panel.k, panel.weight))]
    with econ.TFP.device:
        law = torch.zeros(len(of_z), 4 if econ.labour_moves else 2, dtype=torch.float64)
        law[:, 1] = 1  # K' = K
        return State(
            policy=policy, policy_before=policy.clone(), value=value, damping=torch.tensor(1e-2), rates=torch.zeros(3),
            **panel._asdict(), K_centre=torch.tensor(K).float(), M_mean=torch.zeros(n), M_std=torch.ones(n),
            K_law=law, Delta_law=economy.Delta_start * law.roll(-1, 1), k_range=torch.stack(k),
            K_range=torch.stack(K_all), adam=torch.zeros(2, (len(policy) + len(value)) * cfg.published),
            adam_steps=torch.zeros(2, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- solutions


class Policy:
    """What the network's and the grid's solution share, on tensors and on numpy arrays. Each has `economy`, its tables
    `econ`, mean capital K_mean (goods) and its mean given z, K_of_z (Z,), and on float64 tensors policy(at), k' of
    households, and values(at), V in the units of utility(). reach() is the least and largest k, and K, at which there
    is a solution; k was learnt or solved up to k_max. Below, n_m is the number of moments that the networks see, zero
    for a grid."""

    config = Config()  # how it is judged
    seen = None  # of the cross-section, see seen_moments()
    settled = True  # whether savings had, so that what is judged can be meant

    def usual(self, at: At) -> At:
        """The same with the moments that are usual at K and z, if any are seen."""
        if not self.seen:
            return at
        return at._replace(M=by_law(self.usual_moments[at.z], torch.log(at.K).unsqueeze(-1), at.labour.unsqueeze(-2)))

    def next_capital(self, k, s, K, z, M=None, L=None) -> np.ndarray:
        """k' (goods) for numbers or arrays that broadcast: k, K in goods, s and z indices. M (..., n_m) as moments()
        gives it, without which moments, if there are any, are as usual at K and z. L is aggregate labour, in economies
        where it depends on the history of z; without it labour is as usual in z. ValueError outside the range of K and
        L that was learnt or solved, beyond the k that is held, see `stationary`, and for states that do not exist."""
        return self.policy(self.at(k, s, K, z, M, L)).cpu().numpy()

    def value(self, k, s, K, z, M=None, L=None) -> np.ndarray:
        """Expected discounted utility in utils, u(c) = c^(1 - gamma) / (1 - gamma) or ln c; the rest as in
        next_capital()."""
        at, econ = self.at(k, s, K, z, M, L), self.econ
        if econ.gamma == 1.0:
            return (self.values(at) + econ.annuity[at.z, at.s] * math.log(econ.c_ss)).cpu().numpy()
        return (self.values(at) * econ.c_ss ** (1 - econ.gamma)).cpu().numpy()

    def consumption(self, k, s, K, z, M=None, L=None) -> np.ndarray:
        """c (goods a period), cash on hand less k'; the rest as in next_capital()."""
        at = self.at(k, s, K, z, M, L)
        return (cash_on_hand(at, self.econ)[0] - self.policy(at)).cpu().numpy()

    def mpc(self, k, s, K, z, windfall=0.0, M=None, L=None) -> np.ndarray:
        """Marginal propensity to consume: the share of a windfall (goods, positive or negative) that is consumed in the
        period in which it comes, of the next unit where it is 0; the rest as in next_capital(). ValueError also where
        k and the windfall together lie outside the range."""
        windfall = np.where(np.equal(windfall, 0), MARGIN * self.econ.c_ss, windfall)
        more = k + windfall / prices(self.at(k, s, K, z, M, L), self.econ)[0].cpu().numpy()
        return (self.consumption(more, s, K, z, M, L) - self.consumption(k, s, K, z, M, L)) / windfall

    @functools.cached_property
    def stationary(self) -> Tuple[np.ndarray, np.ndarray]:
        """Nodes of k (n,) and the mass (Z, S, n) of stationary_mass() on them. Where households hold capital near the
        largest k that a network has learnt the nodes go on, up to eight times as far: nothing that it sees of k bends
        there. A grid has seen to that, and where types are for ever nobody goes so far and comes back."""
        farther = isinstance(self, Solution) and self.economy.arrays.ergodic
        for doubled in range(4 if farther else 1):
            k = histogram_nodes(self.k_max * 2**doubled, self.econ)
            mass = stationary_mass(self, k)
            held = mass.sum((0, 1)) * k
            if held[k > 0.6 * k[-1]].sum() < 1e-4 * held.sum():
                break
        return k, mass

    def known_K(self) -> Tuple[float, float]:
        """Least and largest K at which this solution is judged, a multiple of mean capital or more."""
        ends = [*(self.K_mean * np.array(GridConfig.K_range)), *self.reach()[1]]
        return min(ends), max(ends)

    def require_known(self, K: np.ndarray, households: int) -> None:
        """Refuses panels that are too small: their K may lie where this solution means nothing."""
        low, high = self.known_K()
        outside = outside_share(K, low, high)
        require(outside < OUTSIDE, f"households {households}: in {100 * outside:.2g}% of the periods K of so few lies "
                f"outside [{low:.4g}, {high:.4g}], where this solution is known; take more, or simulate() without any")

    @functools.cached_property
    def histogram(self) -> types.SimpleNamespace:
        return settled_histogram(self, self.config)

    def distribution(self) -> Tuple[np.ndarray, np.ndarray]:
        """The stationary distribution, a mean over z: nodes k (n,) in goods, and mass (S, n), the share of households
        at each node in each s, a little below zero at some, see lottery(). UserError where savings do not settle."""
        return self.histogram.axes.k, self.histogram.mean_mass

    def simulate(self, periods: int, households: int | None = None, seed: int = 0, dates=None) -> "Simulation":
        """A path of the economy from its stationary distribution. households None: the limit of infinitely many, by
        histogram; a number: a panel of so many. dates: periods, from 0, whose distributions are kept and stand behind
        the statistics of households; every 20th without it. UserError for numbers of no use, and where households are
        so few that their K leaves what is known."""
        whole = all(isinstance(x, (int, np.integer)) for x in (periods, seed, 2 if households is None else households))
        dates = range(0, periods, POOLED_EVERY) if whole and dates is None else sorted(set(np.ravel(dates).tolist()))
        require(whole and periods >= 1 and seed >= 0 and (households is None or households >= 2) and
                set(dates) <= set(range(periods)), "simulate: give whole numbers: periods from 1, households from 2 or "
                "None, seed from 0, dates from 0 to periods - 1")
        of, (k, mass) = self.histogram, self.distribution()
        if households is None:
            z = draw_z_path(BURN + periods, self.economy.arrays.P_z, np.random.default_rng(seed))
            K, labour, kept, _ = histogram_path(of.table, of.axes, of.mass, z, self.economy, {BURN + t for t in dates})
            sections, held = [histogram_section(self, k, *at) for at in kept], [(k, mass) for mass, *_ in kept]
            return Simulation(self, z[BURN:], K[BURN:], labour[BURN:], sections, dates, held)
        rng, states = torch.Generator().manual_seed(seed), np.arange(len(self.econ.beta))[:, None]
        panel = settled_panel(k, mass, 1, households, self.econ, rng)
        sections, *paths = panel_path(self, panel, periods, BURN, dates, rng)
        K, z, labour, C, K_next = [x[:, 0] for x in paths]
        self.require_known(K, households)
        held = [(x.at.k[0].cpu().numpy(), (x.at.s[0].cpu().numpy() == states) / households) for x in sections]
        return Simulation(self, z, np.append(K, K_next[-1]), labour, sections, dates, held, C)

    def impulse_response(self, periods: int = 60, paths: int = 200, households: int = 200) -> dict:
        """Response to a period 0 in the state below the middle one (the upper one of two) instead of in it, in percent,
        of the interest rate in percentage points: series -> (3, periods), of the mean over paths of panels of so many
        households, and the 10th and 90th percentile of the paths' own. UserError as in simulate()."""
        cfg = Config(irf_periods=periods, irf_paths=paths, irf_agents=households)
        check_options(cfg)
        found = impulse_responses(self, cfg, *self.distribution())
        self.require_known(np.stack(found["capital"]), households)
        return {series: np.stack(impulse_response(found, series)) for series in SERIES[:4]}

    def moments(self, k, s) -> np.ndarray:
        """M (..., n_m) of cross-sections k, s (..., N)."""
        if not self.seen:
            raise ValueError("this solution sees nothing but K of the cross-section")
        k, s = np.broadcast_arrays(np.atleast_1d(np.asarray(k, float)), s)
        if not k.size or not np.isfinite(k).all() or not np.isin(s, np.arange(len(self.econ.beta))).all():
            raise ValueError(f"k must be finite, and s one of 0 to {len(self.econ.beta) - 1}")
        sections = [torch.tensor(x.reshape(-1, x.shape[-1]), device=self.device) for x in (k, s.astype(int))]
        return moments_of(*sections, self.seen, sections[0][:, :0]).reshape(*k.shape[:-1], -1).cpu().numpy()

    def at(self, k, s, K, z, M=None, L=None) -> At:
        """Where households are; the arguments and errors of next_capital()."""
        econ, given = self.econ, L is not None
        if given and not econ.labour_moves:
            raise ValueError("L follows from z in this economy; leave it out")
        lead = np.zeros(np.shape(M)[:-1])  # M may have dimensions of its own
        k, s, K, z, L, _ = np.broadcast_arrays(k, s, K, z, L if given else 0.0, lead)
        for name, index, n in (("s", s, len(econ.beta)), ("z", z, len(econ.TFP))):
            wrong = index[~np.isin(index, np.arange(n))]
            if wrong.size:
                raise ValueError(f"{name} must be one of 0 to {n - 1}, not {wrong.flat[0]}")
        ranges = [("k", k, *self.reach()[0]), ("K", K, *self.reach()[1])]
        if given:
            ranges.append(("L", L, *np.moveaxis(self.economy.arrays.L_range[z.astype(int)], -1, 0)))
        for name, x, low, high in ranges:
            slack = 1e-6 * (high - low)  # of float32
            wrong = ~((x >= low - slack) & (x <= high + slack))
            if wrong.any():
                raise ValueError(f"{name} = {x[wrong][0]:g} is outside [{np.min(low):.6g}, {np.max(high):.6g}], where "
                                 "this solution was found")
        k, K, L = [torch.tensor(x, dtype=torch.float64, device=self.device) for x in (k, K, L)]
        s, z = [torch.tensor(x, dtype=torch.int64, device=self.device) for x in (s, z)]
        at = place(k, s, K, z, econ)
        if given:
            at = at._replace(labour=labour_at(L, at.z, econ))
        at = self.usual(at)
        n = at.M.shape[-1]
        if M is None:
            return at
        if not n or np.shape(M)[-1:] != (n,) or not np.isfinite(M).all():
            raise ValueError(f"M is (..., {n}) finite numbers as moments() gives them, here of shape {np.shape(M)}")
        M = np.broadcast_to(M, (*k.shape, n))
        return at._replace(M=torch.tensor(M, dtype=torch.float64, device=self.device))

    @property
    def device(self):
        return self.econ.TFP.device


def labour_at(L: Tensor, z: Tensor, econ: Tables) -> Tensor:
    """(L, tax) (..., 2) of L (...), the tax by the law of the benefits paid; (..., 0) where both follow from z."""
    if not econ.labour_moves:
        return econ.usual[z]
    law = econ.benefit_law[z]
    return torch.stack([L, (law[..., 0] + law[..., 1] * L) / L], -1)


MARGIN = 1e-5  # of c_ss: the unit of a marginal propensity to consume
BURN = 100  # periods before a path, and before a shock, in which K forgets where it started


class Simulation:
    """A path of an economy. Series (periods,): z, an index; mean capital K (goods); labour L (efficiency units); output
    Y, consumption C and investment I = K' - (1 - delta) K (goods a period); gross return R, wage w (goods a unit of L).
    Y = C + I in the limit, and in a panel up to who is in which s there, as prices know L alone. dates, and at each of
    them distributions: k (n,), mass (S, n) as in Policy.distribution(), each household of a panel a node; sections: all
    else about the households there."""

    def __init__(self, solution, z, K, labour, sections, dates=(), distributions=(), C=None):
        """K (periods + 1,), labour (periods, 2)."""
        self.solution, self.sections, self.dates, self.distributions = solution, sections, list(dates), distributions
        econ, self.z, self.K, K_next = solution.economy.tables(), z, K[:-1], K[1:]
        at = place(*map(torch.from_numpy, (self.K, z, self.K, z)), econ)._replace(labour=torch.from_numpy(labour))
        self.R, self.w, self.Y, self.L = [x.numpy() for x in (*prices(at, econ), output(at, econ), supplied(at, econ))]
        self.I = K_next - (1 - econ.delta) * self.K
        self.C = self.Y - self.I if C is None else C

    def statistics(self, hp: float | None = None) -> dict:
        """Moments of the path and of households at its dates, numbers by name (docs/output.md says which and their
        units). hp: logs are filtered by Hodrick & Prescott (1997), 1,600 for quarters. NaN where nothing moves.
        UserError for an hp of no use."""
        econ, columns, unit = self.solution.econ, [], MARGIN * self.solution.econ.c_ss
        require(hp is None or isinstance(hp, (int, float, np.number)) and 0 < hp < math.inf,
                f"statistics: hp = {hp!r}: give a number above 0, or None for no filter")
        ln = {name: np.log(np.where(x > 0, x, np.nan)) for name, x in vars(self).items() if name in tuple("YCIKR")}
        ln = {name: x if hp is None else hp_filtered(x, hp) for name, x in ln.items()}

        def correlation(x, y):
            dx, dy = x - x.mean(), y - y.mean()
            return dx @ dy / math.sqrt(dx @ dx * (dy @ dy)) if min(np.ptp(x), np.ptp(y)) > 1e-7 else math.nan

        K, L, z = [torch.from_numpy(x)[:, None] for x in (self.K, self.L, self.z)]
        law = law_of_motion(K, L.unsqueeze(-1)[..., : int(econ.labour_moves)], z, torch.full(econ.TFP.shape, torch.nan))
        found = {
            **{f"mean_{name}": getattr(self, name).mean() for name in ("K", "L", "Y", "C", "I", "w")},
            "interest_rate_percent": 100 * (self.R.mean() - 1), "K_over_Y": (self.K / self.Y).mean(),
            **{f"std_ln_{name}": ln[name].std() for name in ("Y", "C", "I")},
            **{f"corr_{name}_Y": correlation(ln[name], ln["Y"]) for name in ("C", "I", "K", "R")},
            **{f"autocorr_{lag}_{name}": correlation(ln[name][lag:], ln[name][:-lag]) for lag in (1, 4)
               for name in ("Y", "C", "I") if len(z) > lag}, "r2_law_of_K": float(law[1].min())}
        if not self.sections:
            return found
        for at, _, k_next, weight in self.sections:
            m, R = cash_on_hand(at, econ)
            saved = self.solution.policy(at._replace(k=at.k + unit / R)) - self.solution.policy(at)
            columns.append(torch.stack([x.flatten() for x in (at.k, m - k_next, m - at.k, 1 - saved / unit, k_next,
                                                              weight / weight.shape[1])]))
        k, c, income, mpc, k_next, weight = torch.cat(columns, 1).cpu().numpy()
        of, share = [inequality(x, weight) for x in (k, c, income)], weight / weight.sum()
        people, consumed = [np.append(0, x[np.argsort(k, kind="stable")].cumsum()) for x in (share, share * mpc)]
        deciles = 10 * np.diff(np.interp(np.linspace(0, 1, 11), np.maximum.accumulate(people), consumed))
        return found | {
            **{f"gini_{name}": x["gini"] for name, x in zip(("wealth", "consumption", "income"), of)},
            **{f"top_{q}_percent_hold": held for q, held in of[0]["top_percent_hold"].items()},
            "below_zero_percent": 100 * (share @ (k < 0)),
            "at_limit_percent": 100 * (share @ (k_next < econ.k_min + 1e-9 * econ.c_ss)), "mean_mpc": share @ mpc,
            **{f"mpc_decile_{i + 1}": x for i, x in enumerate(deciles)}}


def hp_filtered(x: np.ndarray, smoothing: float) -> np.ndarray:
    """x (periods,) less the trend of Hodrick & Prescott (1997)."""
    bend = scipy.sparse.diags_array([1.0, -2.0, 1.0], offsets=[0, 1, 2], shape=(max(len(x) - 2, 0), len(x)))
    return x - scipy.sparse.linalg.spsolve((scipy.sparse.eye_array(len(x)) + smoothing * bend.T @ bend).tocsc(), x)


class Solution(Policy):
    """A trained policy and value network, in float64: what is judged, saved and loaded. Made of the dict that
    NN_weights_biases.pth holds."""

    def __init__(self, weights: dict, device="cpu", dtype=torch.float64):
        self.weights, self.config = weights, Config(**weights["config"])
        tables = weights["economy"].items()
        self.economy = Economy(**{name: x.numpy() if isinstance(x, Tensor) else x for name, x in tables})
        self.econ = self.economy.tables(device, dtype)
        units = [torch.as_tensor(weights[name]).to(device, dtype) for name in ("K_centre", "M_mean", "M_std")]
        policy, value = [[layer.to(device, dtype) for layer in weights[name].values()] for name in ("policy", "value")]
        self.net, self.value_net = Net(policy[:6], *units), Net(value, *units)
        self.seen = seen_moments(policy, self.econ, self.config)
        self.K_mean, self.K_of_z = weights["K_mean"], weights["K_of_z"].numpy()
        self.usual_moments, self.settled = weights["M_law"].to(device), weights["settled"] > 0
        self.k_max = float(learnt_top(weights["k_range"][1], weights["K_centre"].double()))

    def policy(self, at: At) -> Tensor:
        return fast.network_capital(self.net, at, self.econ)

    def values(self, at: At) -> Tensor:
        return value_of(value_output(self.value_net, at, self.econ), at, self.econ)[0]

    def reach(self) -> tuple:
        return (self.econ.k_min, float(self.stationary[0][-1])), tuple(self.weights["K_range"].tolist())

    def save(self, path) -> None:
        save_checkpoint(Path(path), self.weights)


def weights_file(state: State, economy: Economy, cfg: Config, seed: int) -> dict:
    """What NN_weights_biases.pth holds (docs/output.md): all that is needed to use the networks."""
    econ = economy.tables(state.policy.device, torch.float32)
    with torch.no_grad():  # the economies a while longer, as they are
        rng = generator(state.policy.device.type, seed + state.iteration + 1)
        paths = simulate_on(state, econ, dataclasses.replace(cfg, K_spread=0.0), rng)
    K, z, M, labour = [gathered(getattr(paths.at, name), 1) for name in ("K", "z", "M", "labour")]
    require_payable(economy, K.double().cpu().numpy(), z.cpu().numpy(), labour.double().cpu().numpy())
    M_law = torch.zeros(len(econ.TFP), M.shape[-1], state.K_law.shape[1], dtype=torch.float64)
    for i in range(M.shape[-1]):
        M_law[:, i] = regress_by_z(M[..., i], K, labour, z, 0 * econ.TFP)[0].nan_to_num()
    of_z = [K[z == i].mean() if (z == i).any() else K.mean() for i in range(len(econ.TFP))]
    nets = {"policy": policy_net(state, econ, cfg), "value": value_net(state, econ, cfg)}
    layers = "W1", "b1", "W2", "b2", "w3", "b3", "V1", "c1", "V2", "c2", "V3", "c3"  # the last six of Q
    networks = {name: dict(zip(layers, (layer.cpu().clone() for layer in net.layers))) for name, net in nets.items()}
    units = {name: getattr(state, name).cpu().clone() for name in ("K_centre", "M_mean", "M_std", "k_range", "K_range")}
    return {**networks, **units, "K_mean": float(K.double().mean()), "K_of_z": torch.stack(of_z).double().cpu(),
            "M_law": M_law, "economy": economy_dict(economy), "config": dataclasses.asdict(cfg), "seed": seed,
            "settled": state.settled, "history": {name: list(x) for name, x in state.history.items()}}


# ---------------------------------------------------------------------------------------------- errors


class Section(NamedTuple):
    """Cross-sections at D dates. A panel is a histogram of equal weights."""

    at: At  # k, s (D, n); K, z, Delta (D, 1); M (D, 1, n_m), labour (D, 1, 2)
    ahead: Ahead  # K (D, 1), M (D, 1, Z, n_m), Delta (D, 1, Z), labour (D, 1, Z, 2)
    k_next: Tensor  # (D, n)
    weight: Tensor  # (D, n), whose mean over n is one


def cross_section(solution: Policy, at: At, p: Tensor, k_next: Tensor, weight: Tensor) -> Section:
    """What households k, s, k' (D, n) of the economies z (D, 1) with shares p (D, S) see, and what is expected of their
    economies: K' is what they save, labour is known for each z', moments and a planner's Delta, the mean gain from K
    over households, are in expectation over everybody's s', for each z'."""
    econ, K, K_next = solution.econ, (weight * at.k).mean(1, keepdim=True), (weight * k_next).mean(1, keepdim=True)
    M = moments_of(at.k, at.s, solution.seen, weight).unsqueeze(1)
    M_next = next_moments(k_next, at.s, at.z, solution.seen, econ, weight).unsqueeze(1)
    zero = torch.zeros_like(K)
    at = at._replace(K=K, M=M, Delta=zero, labour=labour_of(p, at.z, econ))
    ahead = Ahead(K_next, M_next, zero.unsqueeze(-1).expand(-1, -1, len(econ.TFP)), labour_ahead(p, at.z, econ))
    if econ.equilibrium == "planner":
        nexts = successors(at, k_next, ahead, econ)
        gain = gain_from_K(solution.policy(solution.usual(nexts)), nexts, econ)
        p = weight * econ.probability[at.z, at.s].movedim(-1, 0)
        to = [p * (nexts.z == z_next) for z_next in range(len(econ.TFP))]
        Delta_next = torch.stack([((x * gain).sum((0, 2)) / x.sum((0, 2))).nan_to_num() for x in to], 1).unsqueeze(1)
        at = at._replace(Delta=(weight * gain_from_K(k_next, at, econ)).mean(1, keepdim=True))
        ahead = ahead._replace(Delta=Delta_next)
    return Section(at, ahead, k_next, weight)


def states_of(section: Section, n: int) -> Tuple[At, Ahead]:
    """n households spread evenly over the mass of all dates, each (n,)."""
    mass = section.weight.flatten().double().clamp(min=0).cumsum(0)
    at = (torch.arange(n, device=mass.device) + 0.5) / n * mass[-1] * (1 - 1e-12)
    chosen = torch.searchsorted(mass, at).clamp(max=len(mass) - 1)
    date, (k, s, *of_all) = chosen // section.weight.shape[1], section.at
    own = [x.flatten()[chosen] for x in (k, s)]
    return At(*own, *[x[date, 0] for x in of_all]), pick(section.ahead, (date, 0))


def euler_errors(solution: Policy, at: At, ahead: Ahead) -> Tensor:
    """1 - c~ / c (n,) with u'(c~) = beta E[R' u'(c') + Delta'], c~ at most what there is above the limit; NaN where the
    limit binds."""
    econ, (m, _), k_next = solution.econ, cash_on_hand(at, solution.econ), solution.policy(at)
    nexts = successors(at, k_next, ahead, econ)
    m_next, R_next = cash_on_hand(nexts, econ)
    worth = expected(worth_of_cash(m_next - solution.policy(nexts), R_next, nexts, econ), at, econ)
    implied = inverse_marginal_utility((econ.beta[at.s] * worth).clamp(min=1e-30), econ)
    implied = torch.minimum(implied, m - econ.k_min)
    error, free = 1 - implied / (m - k_next), (k_next > econ.k_min) | (implied < m - econ.k_min)
    return torch.where(free, error, torch.nan)


def bellman_errors(solution: Policy, at: At, ahead: Ahead) -> Tuple[Tensor, Tensor]:
    """u(c) + Delta k + beta E V(s') - V(s), Delta given, at the policy's own c and at the best one, in the units of
    utility(): the Bellman error of Han, Yang & E (2021) is the second."""
    econ, (m, _), k_next = solution.econ, cash_on_hand(at, solution.econ), solution.policy(at)
    above = m - econ.k_min
    V = solution.values(at) - Delta(marginal_utility(m - k_next, econ), at, econ) * at.k

    def objective(share):
        nexts = successors(at, econ.k_min + (1 - share) * above, ahead, econ)
        return utility(share * above, econ) + econ.beta[at.s] * expected(solution.values(nexts), at, econ)

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


# ---------------------------------------------------------------------------------------------- judging

JUDGE_SEED = 20_000  # shocks on which every run is judged: far from the seeds of training, the same for all
POOLED_EVERY = 20  # periods: cross-sections of which errors and statistics are taken
ERROR_STATES = 50_000  # states at which errors are taken
C_MIN = 1e-12  # of c_ss: keeps u'(c) finite where there is nothing to consume
OUTSIDE = 0.01  # most periods in which K of panels may lie where no solution is known


def outside_share(K: np.ndarray, low: float, high: float) -> float:
    return np.mean((K < low) | (K > high))


def inequality(x: np.ndarray, weight: np.ndarray) -> dict:
    """Moments, quantiles, Gini, top shares and Lorenz curve (share held by the poorest 0, 5, ..., 100%) of x (n,), each
    with its weight, some of them a little below zero, see lottery()."""
    order = np.argsort(x, kind="stable")
    x, weight = x[order], weight[order] / weight.sum()
    mean = weight @ x
    people, held = [np.concatenate([[0.0], part.cumsum()]) for part in (weight, weight * x / mean)]
    reached, middle = map(np.maximum.accumulate, (people, people[:-1] + weight / 2))
    return {
        "mean": mean, "std": np.sqrt(weight @ (x - mean) ** 2),
        "quantiles": {str(q): np.interp(q / 100, middle, x) for q in (1, 5, 25, 50, 75, 95, 99)},
        "gini": 1 - 2 * np.trapezoid(held, people),
        "top_percent_hold": {str(q): 100 * (1 - np.interp(1 - q / 100, reached, held)) for q in (1, 5, 10, 20, 30)},
        "lorenz": list(np.interp(np.linspace(0, 1, 21), reached, held)),
    }


def law_of_motion_figures(K_path: np.ndarray, labour: np.ndarray, z_path: np.ndarray, Z: int) -> dict:
    """The law of ln K' by regression over (periods, B), see by_law(), and Den Haan's (2010) dynamic error: the largest
    distance in percent between K and the path that the law of motion draws by itself from the same z."""
    K, labour, z, still = map(torch.from_numpy, (K_path, labour, z_path, np.full(Z, np.nan)))
    alm, r2 = law_of_motion(K, labour, z, still)
    ln_K = np.log(K_path)
    forecast = ln_K.copy()
    for t in range(len(ln_K) - 1):
        forecast[t + 1] = by_law(alm[z[t]], torch.from_numpy(forecast[t]), labour[t]).numpy()
    error = 100 * np.abs(forecast - ln_K)
    return {"coefficients": alm.numpy(), "r2": r2.numpy(), "den_haan_max_percent": error.max(),
            "den_haan_mean_percent": error.mean()}


def euler_sizes(error: Tensor) -> dict:
    """log10 of absolute Euler errors, 10^-16 at least, where the limit does not hold."""
    error = torch.where(error.isnan().all(), 0.0, error)  # where nobody is free nobody errs
    error = error[~error.isnan()].abs().clamp(min=1e-16).cpu().numpy()
    return {"mean": np.log10(error.mean()), "p99": np.log10(np.percentile(error, 99)), "max": np.log10(error.max())}


def judged(solution: Policy, sections: List[Section], K_path: np.ndarray, z_path: np.ndarray,
           labour: np.ndarray) -> Tuple[dict, dict]:
    """All figures of a solution on pooled cross-sections and paths (periods, B), labour (periods, B, 2), and the arrays
    behind them."""
    econ, each = solution.econ, max(1, ERROR_STATES // len(sections))
    of_section = [states_of(section, min(each, section.weight.numel())) for section in sections]
    at, ahead = [type(of[0])(*map(torch.cat, zip(*of))) for of in zip(*of_section)]
    size = len(at.k) if at.k.is_cuda else 4096  # which a CPU holds in its cache
    parts = [slice(i, i + size) for i in range(0, len(at.k), size)]
    own, best = [torch.cat(x) for x in zip(*[bellman_errors(solution, pick(at, part), pick(ahead, part))
                                             for part in parts])]
    c, utils = cash_on_hand(at, econ)[0] - solution.policy(at), econ.c_ss ** (1 - econ.gamma)

    def sizes(error):
        error = error.cpu().numpy()
        return {"mean": np.abs(error).mean(), "rmse": np.sqrt(np.mean(error**2)), "max": np.abs(error).max()}

    every_c, k, weight = [torch.cat([x.flatten() for x in of]).cpu().numpy() for of in zip(*[
        (cash_on_hand(x.at, econ)[0] - x.k_next, x.at.k, x.weight / x.weight.shape[1]) for x in sections])]
    euler = euler_errors(solution, at, ahead)
    u = utility(torch.from_numpy(every_c).clamp(min=C_MIN * econ.c_ss), econ).numpy()
    figures = {
        "periods": len(K_path), "states": len(at.k), "bellman_own_c": sizes(utils * own),
        "bellman_best_c": sizes(utils * best), "bellman_in_consumption": sizes(own / (marginal_utility(c, econ) * c)),
        "euler_log10": euler_sizes(euler), "capital": inequality(k, weight), "consumption": inequality(every_c, weight),
        "welfare": float(inverse_utility(torch.tensor(weight @ u / weight.sum()), econ)),
        "law_of_motion": law_of_motion_figures(K_path, labour, z_path, len(econ.TFP))}
    if econ.equilibrium == "planner":
        figures["Delta"] = float(at.Delta.mean())
    sample = {"sample_k": at.k, "sample_s": at.s, "sample_z": at.z, "bellman": utils * own, "euler": euler}
    return figures, {"k": k, "weight": weight, "K_path": K_path, "z_path": z_path} | {
        name: x.cpu().numpy() for name, x in sample.items()}


def panel_policy(solution: Policy) -> Callable:
    """At -> k' of whole cross-sections, in the precision that is fast: of a network float32."""
    if isinstance(solution, Solution):
        solution = Solution(solution.weights, solution.device, torch.float32)
    dtype = solution.econ.beta.dtype

    def policy(at, weight):
        M = moments_of(at.k.to(dtype), at.s, solution.seen, weight).unsqueeze(1)
        return solution.policy(at._replace(k=at.k.to(dtype), K=at.K.to(dtype), M=M, labour=at.labour.to(dtype)))
    return policy


def settled_panel(k: np.ndarray, mass: np.ndarray, B: int, N: int, econ: Tables, rng: torch.Generator) -> Panel:
    """(z, s) as in initial_panel(), and k given s as the histogram mass (S, n) at nodes k (n,) has it."""
    panel = initial_panel(B, N, econ, 1.0 + econ.k_min, rng)
    s, u = panel.s.cpu().numpy(), uniform(panel.s.shape, rng, "cpu").numpy()
    k_of = np.empty((B, N))
    for i, held in enumerate(np.maximum.accumulate(mass.cumsum(1), 1)):
        k_of[s == i] = np.interp(u[s == i] * held[-1], held, k)
    return panel._replace(k=torch.from_numpy(k_of).to(econ.TFP.device))


def panel_path(solution: Policy, panel: Panel, periods: int, first: int, dates, rng: torch.Generator):
    """A panel's cross-sections at dates, and its K, z (periods, B), labour (periods, B, 2), C, K' (periods, B) after
    first periods that nothing is taken from; dates count from there."""
    sections, rows = [], []
    simulated = simulate(panel_policy(solution), panel, first + periods, solution.econ, rng)
    for t, (now, at, k_next) in enumerate(tqdm(simulated, "panel", first + periods, leave=False, disable=None), -first):
        if t >= 0:
            C, K_next = [x.mean(1, keepdim=True) for x in (cash_on_hand(at, solution.econ)[0] - k_next, k_next)]
            rows.append([at.K, at.z, at.labour, C, K_next])
        if t in dates:
            weight = torch.ones_like(at.k).double()
            sections.append(cross_section(solution, at._replace(k=at.k.double()), now.p, k_next.double(), weight))
    paths = [torch.stack(x)[:, :, 0].cpu().numpy() for x in zip(*rows)]
    return sections, *[x if x.dtype == int else x.astype(float) for x in paths]


def judge_panel(solution: Policy, cfg: Config, k: np.ndarray, mass: np.ndarray) -> Tuple[dict, dict]:
    """Figures in panels of N households, which start from the solution's own distribution in the limit. The shocks are
    the same whatever the solution and the device."""
    econ, rng, first = solution.econ, torch.Generator().manual_seed(JUDGE_SEED), cfg.eval_periods // 10
    panel, periods = settled_panel(k, mass, cfg.eval_economies, cfg.eval_agents, econ, rng), cfg.eval_periods - first
    sections, *path, _, _ = panel_path(solution, panel, periods, first, range(0, periods, POOLED_EVERY), rng)
    figures, arrays = judged(solution, sections, *path)
    if solution.config.learnt_moments:
        figures["moments"] = meaning(sections, econ, solution.config.learnt_moments)
    return {"n_agents": cfg.eval_agents, "n_economies": cfg.eval_economies} | figures, arrays


def meaning(sections: List[Section], econ: Tables, p: int) -> dict:
    """Correlation of each learnt moment with K and with the share of households in the state of lowest income."""
    columns = [torch.cat([x.at.K, (econ.lowest[x.at.s] * x.weight).mean(-1, keepdim=True), x.at.M[:, 0, -p:]], 1).T
               for x in sections]
    r = torch.corrcoef(torch.cat(columns, 1))
    return {"K": r[0, 2:], "unemployment": r[1, 2:]}


def power_grid(n: int, low: float, high: float, exponent: float) -> np.ndarray:
    return low + (high - low) * np.linspace(0, 1, n) ** exponent


def moves(k_next: np.ndarray, k: np.ndarray) -> scipy.sparse.csc_array:
    """The matrix (S n, S m n) that moves mass (S, m, n) to the nodes k (n,) around k' (S, m, n), by lottery()."""
    (S, _, n), (first, share) = k_next.shape, lottery(torch.from_numpy(k_next), torch.from_numpy(k))
    to = first.numpy()[..., None] + np.arange(4) + n * np.arange(S)[:, None, None, None]
    return scipy.sparse.csc_array((share.mT.numpy().ravel(), to.ravel(), 4 * np.arange(first.numel() + 1)),
                                  (S * n, first.numel()))


class Axes(NamedTuple):
    """Nodes of a table (z, s, n_L n_K, n): of k (n,), K (n_K,) and, by z, of aggregate labour L (Z, n_L); n_L is one
    where L follows from z."""

    k: np.ndarray
    K: np.ndarray
    L: np.ndarray


def labour_nodes(economy: Economy, n: int) -> np.ndarray:
    """(Z, n) over the range of L in each z; (Z, 1) where labour follows from z."""
    a = economy.arrays
    return np.linspace(*a.L_range.T, n).T if a.labour_moves else a.L[:, None]


def corners(axes: Axes, z: int, K: float, L: float) -> Tuple[Tuple[int, ...], np.ndarray]:
    """The nodes of (L, K) around a point, and their weights, which are below 0 beyond the ends."""
    def cell(x, nodes):
        position = (x - nodes[0]) / (nodes[1] - nodes[0])
        j = min(max(int(position), 0), len(nodes) - 2)
        return j, np.array([j + 1 - position, position - j])

    j, weight = cell(K, axes.K)
    if axes.L.shape[1] == 1:
        return (j, j + 1), weight
    (i, of_L), n_K = cell(L, axes.L[z]), len(axes.K)
    return (i * n_K + j, i * n_K + j + 1, (i + 1) * n_K + j, (i + 1) * n_K + j + 1), np.outer(of_L, weight).ravel()


def simulate_histogram(table, axes: Axes, mass: np.ndarray, z_path: np.ndarray, economy: Economy,
                       keep: Callable | None = None):
    """Simulation without sampling noise, the limit of infinitely many households (Young 2010): mass (s, n) at k moves
    to the nodes around k' by lottery(). table (z, s, n_L n_K, n) of k' on the axes, linear in K and L, each of whose
    nodes moves its share of the mass, or a function of (mass, K, z). Returns K (periods,) and the mass after it, at the
    first z again; keep(t, mass, k') sees every period."""
    a, K_path, every_k = economy.arrays, np.empty(len(z_path)), np.tile(axes.k, len(mass))

    @functools.cache
    def between_nodes(z, index):
        return moves(table[z][:, list(index)], axes.k)

    for t, z in enumerate(z_path):
        K_path[t] = mass.ravel() @ every_k
        if callable(table):
            k_next, weight = table(mass, K_path[t], z)[:, None], np.ones(1)  # (s, 1, n)
        else:
            index, weight = corners(axes, z, K_path[t], mass.sum(1) @ a.labour[z])
            k_next = table[z][:, list(index)]
        if weight.min() < -1e-12:  # beyond the nodes
            k_next, weight = (weight @ k_next)[:, None], np.ones(1)
        if keep:
            keep(t, mass, weight @ k_next)
        move = between_nodes(z, index) if len(weight) > 1 else moves(k_next, axes.k)
        moved = move @ (mass[:, None] * weight[:, None]).ravel()
        mass = a.Pi[z, z_path[(t + 1) % len(z_path)]].T @ moved.reshape(mass.shape)
    return K_path, mass


def labour_along(economy: Economy, z_path: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Labour (periods, 2) along a path of z from the histogram mass (s, n), see labour_of()."""
    if not economy.arrays.labour_moves:
        return np.zeros((len(z_path), 0))
    p = torch.from_numpy(share_path(economy.arrays, z_path, mass.sum(1)))
    return labour_of(p, torch.from_numpy(z_path)[:, None], economy.tables())[:, 0].numpy()


def histogram_path(table, axes: Axes, mass: np.ndarray, z_path: np.ndarray, economy: Economy, dates):
    """simulate_histogram() with all that a Simulation is made of: K (periods + 1,), labour (periods, 2), (mass, k', z)
    at dates, and the mass at the end."""
    kept = []

    def keep(t, mass, k_next):
        if t in dates:
            kept.append((mass, k_next, z_path[t]))

    K, last = simulate_histogram(table, axes, mass, z_path, economy, keep)
    return np.append(K, last.sum(0) @ axes.k), labour_along(economy, z_path, mass), kept, last


def dispersed_mass(k: np.ndarray, K: float, z: int, economy: Economy) -> np.ndarray:
    """(s, n) on the nodes k: the gamma distribution of initial_panel() with mean about K, s at its share given z."""
    above, shares = scipy.stats.gamma.cdf((k[1:] + k[:-1]) / 2 - k[0], 4, scale=(K - k[0]) / 4), economy.arrays.shares
    return np.diff(np.append(above, 1), prepend=0) * (shares[z] / shares[z].sum())[:, None]


def stationary_mass(solution: Policy, k: np.ndarray) -> np.ndarray:
    """(Z, S, n) distribution of (z, s, k) on nodes k (n,) where K is always as usual in z, at the level of K at which
    mean capital is K: one sparse linear system for each level that is tried. Where households mix slowly no path is
    long enough to come here from anywhere else."""
    economy, (Z, S), n = solution.economy, solution.economy.arrays.shares.shape, len(k)
    start = np.stack([dispersed_mass(k, solution.K_mean, z, economy) * economy.arrays.shares[z].sum()
                      for z in range(Z)])
    back = 1e-9  # of the mass starts anew each period, so that groups for ever keep their shares
    order = np.arange(Z * S * n).reshape(-1, n).T.ravel()  # nodes outermost: what moves a little is near the diagonal
    z, s, nodes = [torch.from_numpy(x).to(solution.device) for x in np.meshgrid(
        np.arange(Z), np.arange(S), k, indexing="ij")]
    chain, found = scipy.sparse.kron(economy.arrays.P.reshape(Z * S, Z * S).T, scipy.sparse.eye_array(n)), []

    def excess(level):
        """Of mean capital over the K at which households save, a log."""
        K = torch.tensor(solution.K_of_z * math.exp(level), device=solution.device)
        at = solution.usual(place(nodes, s, K[z], z, solution.econ))
        k_next = solution.policy(at).cpu().numpy().reshape(Z * S, n)
        system = scipy.sparse.eye_array(Z * S * n) - (1 - back) * (chain @ moves(k_next[:, None], k))
        system = system.tocsc()[order][:, order]
        mass = scipy.sparse.linalg.splu(system, permc_spec="NATURAL").solve(back * start.ravel()[order])
        mass = mass.reshape(n, Z, S).transpose(1, 2, 0) / mass.sum()
        found.append(mass)
        return math.log(max(mass.sum((0, 1)) @ k, 1e-9) / (mass.sum((1, 2)) @ K.cpu().numpy()))

    if excess(-0.05) <= 0 or excess(0.05) >= 0:  # the usual K is not that of this policy: a path has to tell
        return start
    scipy.optimize.brentq(excess, -0.05, 0.05, xtol=1e-7, rtol=1e-12, maxiter=60)
    return found[-1]


HISTOGRAM = 400  # nodes of k in each s: with twice as many, Gini and std change in the fifth digit
MOVES = 0.001  # most that mean and std of capital may still have to go when they are judged
PASSES = 60  # over the judged path of z, at most, until they have less to go


def histogram_nodes(top: float, econ: Tables) -> np.ndarray:
    """(HISTOGRAM,) from k_min to top, see k_nodes()."""
    x = torch.linspace(0, 1, HISTOGRAM, dtype=torch.float64)
    return k_nodes(x, torch.tensor(top, dtype=torch.float64), econ).numpy()


def settled_histogram(solution: Policy, cfg: Config) -> types.SimpleNamespace:
    """Infinitely many households, from their stationary distribution over one path of z again and again, so that no
    transition is seen, until mean and std of capital have less than MOVES to go: a pass that moves them by d, the one
    before by d / r, leaves d r / (1 - r), and d / 2 at least. Of the last pass, less its first tenth: z (periods,), K
    (periods + 1,), labour (periods, 2), pooled (mass (S, n), k' (S, n), z) of some dates, their mean_mass, the mass
    after it, at the first z, the axes and table of histogram_policy(), and how far it still moves. UserError where that
    leads out of the range of the solution."""
    economy, first, (k, mass) = solution.economy, cfg.eval_periods // 10, solution.stationary
    z = draw_z_path(cfg.eval_periods, economy.arrays.P_z, np.random.default_rng(JUDGE_SEED))
    axes = Axes(k, np.linspace(*solution.known_K(), GridConfig.n_K_fine), labour_nodes(economy, GridConfig.n_L_fine))
    mass, dates = mass[z[0]] / mass[z[0]].sum(), range(first, cfg.eval_periods, POOLED_EVERY)
    slow = solution.seen and not economy.arrays.ergodic  # for which a table, as usual at K, finds most of the way
    for usual in (True, False) if slow else (False,):
        table, change, last = histogram_policy(solution, axes, usual), np.inf, np.inf
        for i in range(PASSES):
            K, labour, pooled, mass = histogram_path(table, axes, mass, z, economy, dates)
            mean_mass = np.mean([mass for mass, *_ in pooled], 0)
            people = mean_mass.sum(0)
            now = np.array([people @ k, np.sqrt(people @ (k - people @ k) ** 2)])
            change_before, change, last = change, np.abs(now / last - 1).max(), now
            ratio = min(change / change_before, 0.98)
            moving = float(change * max(ratio / (1 - ratio), 0.5))
            if i > 1 and moving < MOVES:  # two changes at least tell how fast they fall
                break
    at_end = people[-1] * k[-1] / now[0]
    of_grid = isinstance(solution, GridSolution)
    require(at_end < 1e-3 or not solution.settled, f"judge: {100 * at_end:.2g}% of capital lies at the largest k that "
            f"the {'grid' if of_grid else 'network'} knows, {k[-1]:.4g}: savings do not settle below it; "
            f"{'judge with --grid none' if of_grid else 'train longer'}")
    if of_grid:
        require(solution.K[0] < K.min() and K.max() < solution.K[-1], f"grid: K goes from {K.min():.4g} to "
                f"{K.max():.4g}, beyond its nodes; judge with --grid none")
    return types.SimpleNamespace(axes=axes, table=table, z=z[first:], K=K[first:], labour=labour[first:],
                                 pooled=pooled, mean_mass=mean_mass, mass=mass, moves=moving)


def judge_limit(solution: Policy, cfg: Config) -> Tuple[dict, dict]:
    """Figures in the limit N = infinity, where sampling noise hides nothing."""
    found = settled_histogram(solution, cfg)
    sections = [histogram_section(solution, found.axes.k, *of) for of in found.pooled]
    figures, arrays = judged(solution, sections, found.K[:-1, None], found.z[:, None], found.labour[:, None])
    figures["statistics"] = Simulation(solution, found.z, found.K, found.labour, sections).statistics()
    figures["risky_steady_state"] = risky_steady_state(solution, found.table, found.axes, found.mass, cfg)
    return {"n_agents": None, "moves": found.moves} | figures, arrays | {
        "k": found.axes.k, "weight": found.mean_mass.sum(0), "mass": found.mean_mass}


def histogram_policy(solution: Policy, axes: Axes, usual: bool = False):
    """The policy as simulate_histogram() takes it: a table (Z, S, n_L n_K, n), or where moments are seen, and not just
    as usual at K, a function."""
    Z, S = solution.economy.arrays.shares.shape
    if usual or not solution.seen:
        at = solution.usual(on_grid(axes, solution.econ))
        return np.concatenate([solution.policy(pick(at, slice(z, z + 1))).cpu().numpy() for z in range(Z)])
    solution = Solution(solution.weights)  # on the CPU: so little work a period that launching it takes longer
    nodes = np.append(axes.k[:-1:5], axes.k[-1])  # k' is interpolated in between
    (every_k, every_s), (k, s) = [torch.broadcast_tensors(torch.from_numpy(x), torch.arange(S).unsqueeze(1))
                                  for x in (axes.k, nodes)]
    q = solution.seen(every_k, every_s).flatten(0, 1)

    def rule(mass, K, z):
        mass = torch.from_numpy(mass / mass.sum())
        at = place(k, s, torch.full_like(k, K), torch.full_like(s[:, :1], z), solution.econ)
        labour = labour_of(mass.sum(1).unsqueeze(0), torch.tensor([[z]]), solution.econ)
        at = at._replace(M=torch.tensordot(mass.flatten(), q, 1), labour=labour)
        return np.array([np.interp(axes.k, nodes, row) for row in solution.policy(at).numpy()])

    return rule


def histogram_section(solution: Policy, k: np.ndarray, mass: np.ndarray, k_next: np.ndarray, z: int) -> Section:
    """A period of the histogram, mass (S, n), where anybody is."""
    somebody, s = np.abs(mass) > 1e-16, np.indices(mass.shape)[0]
    rows = np.broadcast_to(k, mass.shape), s, k_next, mass * somebody.sum() / mass[somebody].sum()
    k, s, k_next, weight, p, z = [torch.tensor(x, device=solution.device).unsqueeze(0) for x in (
        *[x[somebody] for x in rows], mass.sum(1) / mass.sum(), [z])]
    return cross_section(solution, place(k, s, k.mean(1, keepdim=True), z, solution.econ), p, k_next, weight)


def risky_steady_state(solution: Policy, table, axes: Axes, mass: np.ndarray, cfg: Config) -> dict:
    """K*(z), at which the economy rests while z stays what it is and households still fear the other states: the full
    distribution followed for as many periods as are judged, and the mean Euler error there."""
    periods, found = cfg.eval_periods - cfg.eval_periods // 10, {"K": [], "euler_log10": []}
    for z in range(len(solution.economy.arrays.TFP)):
        K, _, [last], _ = histogram_path(table, axes, mass, np.full(periods, z), solution.economy, [periods - 1])
        states = states_of(histogram_section(solution, axes.k, *last), ERROR_STATES // 10)
        found["K"].append(K[-2])
        found["euler_log10"].append(euler_sizes(euler_errors(solution, *states))["mean"])
    return found | {"worst_euler": max(found["euler_log10"])}


def policy_distance(network: Policy, grid: Policy, K_path: np.ndarray) -> dict:
    """Mean and largest |k' - k' of the grid| over k up to four times mean capital and K at the 2nd, 50th and 98th
    percentile of a path, all (z, s)."""
    K, a, k_min = np.percentile(K_path, (2, 50, 98)), network.economy.arrays, network.econ.k_min
    k = k_min + (4.07 * K[1] - k_min) * np.linspace(1 / 320, 1, 640)
    k, s, K, z = np.meshgrid(k, np.arange(len(a.beta)), K, np.arange(len(a.TFP)), indexing="ij")
    at = place(*[torch.tensor(x, device=network.device) for x in (k, s, K, z)], network.econ)
    gap = (network.policy(network.usual(at)) - grid.policy(at)).abs()
    return {"mean": float(gap.mean()), "max": float(gap.max())}


def w1_of_histograms(k: np.ndarray, k_other: np.ndarray, mass: np.ndarray, mass_other: np.ndarray) -> float:
    """W1 of two histograms, mass (n,) on nodes k (n,) that differ: the area between their distribution functions, each
    linear from half way between two nodes to half way to the next. As steps at the nodes they would be a quarter of the
    nodes' distance apart where they are the same."""
    ends = [np.concatenate([k[:1], (k[1:] + k[:-1]) / 2, k[-1:]]) for k in (k, k_other)]
    shares = [np.concatenate([mass[:1], mass.cumsum()]) / mass.sum() for mass in (mass, mass_other)]
    at = np.unique(np.concatenate(ends))
    gap = np.interp(at, ends[0], shares[0]) - np.interp(at, ends[1], shares[1])
    return float(np.trapezoid(np.abs(gap), at))


def compare(solutions: dict, cfg: Config) -> Tuple[dict, dict]:
    """Every accuracy figure of solutions (name -> Policy) on the same shocks: small (a panel of N households), limit
    (infinitely many); under comparison the distances between network and grid, and the share of periods in which K of a
    panel, or of a response, lies outside the grid's nodes, or without a grid outside what the network knows. The arrays
    behind the pictures, by size and solution."""
    figures, arrays = {name: {} for name in solutions}, {"small": {}, "limit": {}, "irf": {}}
    for name, solution in solutions.items():
        of_limit, behind = judge_limit(solution, cfg)
        figures[name]["small"], arrays["small"][name] = judge_panel(solution, cfg, behind["k"], behind["mass"])
        figures[name]["limit"], arrays["limit"][name] = of_limit, behind
        arrays["irf"][name] = impulse_responses(solution, cfg, behind["k"], behind["mass"])
    ends = solutions["grid"].reach()[1] if "grid" in solutions else solutions["network"].known_K()
    both = figures["comparison"] = {"outside_K": {
        size: max(outside_share(np.stack(x["capital"] if size == "irf" else x["K_path"]), *ends) for x in of.values())
        for size, of in arrays.items()}}
    if "grid" not in solutions:
        return figures, arrays
    of_network, of_grid = arrays["limit"].values()
    for size in ("small", "limit"):
        ours, theirs = [figures[name][size]["capital"]["std"] for name in solutions]
        both[size] = {"std_gap": ours / theirs - 1}
    both["small"]["w1"] = scipy.stats.wasserstein_distance(*[x["k"] for x in arrays["small"].values()])
    both["limit"]["w1"] = w1_of_histograms(*[x[name] for name in ("k", "weight") for x in (of_network, of_grid)])
    rest, rest_grid = [np.array(figures[name]["limit"]["risky_steady_state"]["K"]) for name in solutions]
    gaps = {series: np.subtract(*[impulse_response(x, series)[0] for x in arrays["irf"].values()])
            for series in SERIES[:4]}
    return figures | {"comparison": both | {
        "resting_gap": rest / rest_grid - 1,
        "policy_distance": policy_distance(*solutions.values(), of_grid["K_path"]),
        "impulse_response_gap": {series: np.abs(gap).max() for series, gap in gaps.items()}}}, arrays


# ---------------------------------------------------------------------------------------------- grid solution
# Maliar, Maliar & Valli (2010), by endogenous gridpoints

C_MAX = 1e4  # of c_ss: keeps c finite where saving is worth nothing
SWEEPS = 100  # most sweeps between two updates of the law of motion
BURN_IN = 200  # first periods that the regressions leave out
VALUE_SWEEPS = 4000  # most sweeps for V of the policy


def on_grid(axes: Axes, econ: Tables) -> At:
    """Households at every (z, s, (L, K), k), in this order of axes."""
    (Z, n_L), n_K = axes.L.shape, len(axes.K)
    z, s, j, k = [torch.from_numpy(x).to(econ.TFP.device) for x in np.meshgrid(
        np.arange(Z), np.arange(len(econ.beta)), np.arange(n_L * n_K), axes.k, indexing="ij")]
    at = place(k, s, torch.from_numpy(axes.K).to(k.device)[j % n_K], z, econ)
    return at._replace(labour=labour_at(torch.from_numpy(axes.L).to(k.device)[z, j // n_K], z, econ))


def household_nodes(axes: Axes, econ: Tables) -> types.SimpleNamespace:
    """The household problem on the axes: at, everywhere there, and cash on hand m, R and income y, each (z, s, A, n_k),
    A = n_L n_K; slope (n_k, n_k), from values at k to derivatives at k of the cubic spline through them."""
    at, k = on_grid(axes, econ), axes.k
    m, R = [x.numpy() for x in cash_on_hand(at, econ)]
    slope = scipy.interpolate.CubicSpline(k, np.eye(len(k))).derivative()(k)
    return types.SimpleNamespace(axes=axes, at=at, m=m, R=R, y=m[..., :1] - R[..., :1] * k[0], slope=slope)


def refined(x: np.ndarray, axes: Axes, finer: Axes) -> np.ndarray:
    """Values (z, s, n_L n_K, n) on the axes -> on finer ones, by cubic splines in K and L."""
    x = x.reshape(*x.shape[:2], axes.L.shape[1], len(axes.K), -1)
    x = scipy.interpolate.CubicSpline(axes.K, x, axis=3)(finer.K)
    if axes.L.shape[1] > 1:  # even between the ends of L in each z
        at, to = [np.linspace(0, 1, of.L.shape[1]) for of in (axes, finer)]
        x = scipy.interpolate.CubicSpline(at, x, axis=2)(to)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def invert(k_endo: np.ndarray, nodes: types.SimpleNamespace, k: np.ndarray) -> np.ndarray:
    """k'(k) from the k (..., n_k) at which each k' of the grid is chosen: cubic Hermite, slopes by splines,
    and k_min below the first k_endo, so that no polynomial bends across the kink of the borrowing limit."""
    k_endo, k_next, n = np.ascontiguousarray(k_endo), nodes.axes.k, k_endo.shape[-1]
    every_k = torch.from_numpy(k).expand(*k_endo.shape[:-1], len(k)).contiguous()
    i = torch.searchsorted(torch.from_numpy(k_endo), every_k, right=True).numpy().clip(1, n - 1) - 1
    here = i + np.arange(0, k_endo.size, n).reshape(*k_endo.shape[:-1], 1)  # in all of k_endo
    rise, run = k_next[i + 1] - k_next[i], k_endo.take(here + 1) - k_endo.take(here)
    t = ((k - k_endo.take(here)) / run).clip(0, 1)
    dk_next = 1 / (k_endo @ nodes.slope.T)
    d0, d1 = run * dk_next.take(here), run * dk_next.take(here + 1)
    found = k_next[i] + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return np.where(k > k_endo[..., :1], found.clip(k_next[0]), k_next[0])


def forecast(law: np.ndarray, axes: Axes, economy: Economy) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K' (z, A) by the law of motion (Z, 2 or 4), L' (z, z', A), and (z, z', A, A) values at (L, K) -> values at
    (L', K') of their cubic splines; where labour follows from z there is one z' for all, and L', which nobody reads, is
    L."""
    (Z, n_L), a = axes.L.shape, economy.arrays
    K, L = np.tile(axes.K, n_L), np.repeat(axes.L, len(axes.K), 1)  # (A,), (z, A)
    labour = labour_at(torch.from_numpy(L), torch.arange(Z).unsqueeze(1), economy.tables())
    K_next = np.exp(by_law(torch.from_numpy(law).unsqueeze(1), torch.from_numpy(np.log(K)), labour).numpy())
    in_K = scipy.interpolate.CubicSpline(axes.K, np.eye(len(axes.K)))(K_next)
    if n_L == 1:
        return K_next, L[:, None], in_K[:, None]
    L_next = (a.L_law[..., :1] + a.L_law[..., 1:] * L[:, None]).clip(axes.L[:, :1], axes.L[:, -1:])
    in_L = [[scipy.interpolate.CubicSpline(nodes, np.eye(n_L))(x) for nodes, x in zip(axes.L, of_z)] for of_z in L_next]
    return K_next, L_next, np.einsum("xyal,xak->xyalk", in_L, in_K).reshape(Z, Z, len(K), len(K))


def expected_on_grid(values: np.ndarray, economy: Economy) -> np.ndarray:
    """beta(s) E[values | z, s]: (z, z', s', A, n_k) -> (z, s, A, n_k)."""
    (Z, S), a = economy.arrays.shares.shape, economy.arrays
    out = [scipy.sparse.csr_array(P * a.beta[:, None]) @ v.reshape(Z * S, -1) for P, v in
           zip(a.P.reshape(Z, S, Z * S), values)]
    return np.array(out).reshape(Z, S, *values.shape[3:])


def solve_household(c: np.ndarray, laws: np.ndarray, nodes: types.SimpleNamespace, economy: Economy,
                    config: GridConfig):
    """Sweeps of Carroll (2006) backwards from c (z, s, A, n_k), given the laws of motion of K and of the planner's
    Delta, coefficients (Z, 2 or 4) each, see by_law(): the new c, the k_endo at which each k' of the grid is
    optimal, the last change of c, and the share of nodes at which saving is worth nothing, so that c was bounded."""
    econ = economy.tables()
    K_next, L_next, spline = forecast(laws[0], nodes.axes, economy)
    K, L = [torch.from_numpy(x)[..., None] for x in (K_next[:, None, None], L_next[:, :, None])]
    at = nodes.at._replace(K=K.expand(len(K), *nodes.m.shape))  # by z now: (z, z', s', A, n_k)
    at = at._replace(labour=labour_at(L.expand(at.K.shape), at.z, econ))
    at = at._replace(Delta=by_law(torch.from_numpy(laws[1])[at.z], torch.log(at.K), at.labour))
    R, _ = prices(at, econ)
    least = float(marginal_utility(torch.tensor(C_MAX * econ.c_ss), econ))
    for _ in range(SWEEPS):
        c_next = np.maximum(spline[:, :, None] @ c, C_MIN * econ.c_ss)  # (z, z', s', A, n_k)
        worth = expected_on_grid(worth_of_cash(torch.from_numpy(c_next), R, at, econ).numpy(), economy)
        c_endo = inverse_marginal_utility(np.maximum(worth, least), econ)
        k_endo = (c_endo + nodes.axes.k - nodes.y) / nodes.R
        c_last, c = c, nodes.m - invert(k_endo, nodes, nodes.axes.k)
        change = np.max(np.abs(c - c_last) / np.maximum(c, C_MIN * econ.c_ss))
        if change < config.tolerance:
            break
    return c, k_endo, change, (worth < least).mean()


def evaluate_grid(k_next: np.ndarray, axes: Axes, laws: np.ndarray, economy: Economy) -> Tuple[np.ndarray, float]:
    """V = u(c) + Delta k + beta E V' (z, s, A, n) of a policy k' on the axes, by sweeps, and what the last one still
    changed, as a share of 1 + |V|. What they leave over is soon the same number nearly everywhere, and MacQueen's
    bound takes it out (the median: where there is next to nothing to consume u has no bound)."""
    econ = economy.tables()
    at = on_grid(axes, econ)
    at = at._replace(Delta=by_law(torch.from_numpy(laws[1])[at.z], torch.log(at.K), at.labour))
    c = (cash_on_hand(at, econ)[0] - torch.from_numpy(k_next)).clamp(min=C_MIN * econ.c_ss)
    u = (utility(c, econ) + Delta(marginal_utility(c, econ), at, econ) * at.k).numpy()
    position = np.interp(k_next, axes.k, np.arange(len(axes.k)))
    low = np.minimum(position.astype(int), len(axes.k) - 2)  # the node below k', but for the last, and
    share = position - low  # how far k' is on the way to the next
    low += np.arange(0, low.size, len(axes.k)).reshape(*low.shape[:-1], 1)  # in all of V
    _, _, spline = forecast(laws[0], axes, economy)
    D = economy.arrays.annuity[..., None, None]
    V, left, steep = u * D, math.inf, econ.equilibrium == "market" and float(c.min()) < 1e-3 * econ.c_ss
    for sweep in range(VALUE_SWEEPS):
        EV = expected_on_grid(spline[:, :, None] @ V, economy)
        if steep:  # where next to nothing may be left V is linear between nodes in the consumption that it is worth
            EV = inverse_utility(torch.from_numpy(EV / D), econ).numpy()
        EV = (1 - share) * EV.take(low) + share * EV.take(low + 1)
        change = u + (D * utility(torch.from_numpy(EV), econ).numpy() if steep else EV) - V
        V += change
        if sweep % 10 == 9:
            middle = np.median(change)
            V += middle * (D - 1)
            left = float((np.abs(change - middle) / (1 + np.abs(V))).max())
            if left < 1e-7:
                break
    return V, left


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSolution(Policy):
    """Policy table on power-spaced k, uniform K and, where labour moves, uniform L; the law of motion behind it."""

    economy: Economy
    econ: Tables
    table: Tensor  # (z, s, n_L n_K, n_fine) k', float64
    value_table: Tensor  # (z, s, n_L n_K, n_fine) V of this policy in the units of utility()
    k: Tensor  # (n_fine,) nodes of both
    K: Tensor  # (n_K,)
    L: Tensor  # (Z, n_L)
    k_max: float  # the last of k
    K_mean: float  # over the path behind the law of motion
    K_of_z: np.ndarray  # (Z,) its mean given z
    alm_coefficients: np.ndarray  # (z, 2) intercept and slope, (z, 4) where labour moves: see by_law()
    alm_r2: np.ndarray  # (z,)
    Delta_law: np.ndarray  # (z, 2 or 4) the planner's Delta on the same
    Delta_r2: np.ndarray  # (z,)
    notes: tuple  # what a user should know of it

    def interpolate(self, table: Tensor, at: At) -> Tensor:
        """A table at states: linear in k, K and L, and beyond their ends."""
        k, n_L, flat = self.k, self.L.shape[1], table.reshape(-1)
        of_K, of_L = len(k), len(k) * len(self.K)  # how far apart neighbours are

        def cell(x, low, high, n):
            position = (x - low) / (high - low) * (n - 1)
            below = position.floor().clamp(0, n - 2)
            return below.long(), position - below

        i = (torch.searchsorted(k, at.k.contiguous(), right=True) - 1).clamp(0, len(k) - 2)
        along_k = (at.k - k[i]) / (k[i + 1] - k[i])
        j, along_K = cell(at.K, self.K[0], self.K[-1], len(self.K))
        corner = (at.z * table.shape[1] + at.s) * n_L * of_L + j * of_K + i

        def in_k(corner):
            below = flat[corner]
            return below + along_k * (flat[corner + 1] - below)

        def in_K(corner):
            below = in_k(corner)
            return below + along_K * (in_k(corner + of_K) - below)

        if n_L == 1:
            return in_K(corner)
        j, along_L = cell(at.labour[..., 0], self.L[at.z, 0], self.L[at.z, -1], n_L)
        below = in_K(corner + j * of_L)
        return below + along_L * (in_K(corner + (j + 1) * of_L) - below)

    def policy(self, at: At) -> Tensor:
        return self.interpolate(self.table, at).clamp(min=self.econ.k_min)

    def values(self, at: At) -> Tensor:
        return self.interpolate(self.value_table, at)

    def reach(self) -> tuple:
        return (self.econ.k_min, self.k_max), (float(self.K[0]), float(self.K[-1]))

    def to(self, device) -> "GridSolution":
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, econ=self.economy.tables(device), **tensors)


def solve_grid(economy=None, config: GridConfig = GridConfig(), progress: bool = False) -> GridSolution:
    """Krusell & Smith's (1998) fixed point: households believe a law of motion of K, which their savings confirm.
    economy: an Economy, a Calibration, or None for the default. The nodes follow the cross-section: K around its mean,
    k as far as capital is held. Raises UserError where there is no convergence."""
    require(isinstance(config, GridConfig), f"config: give a GridConfig, not {type(config).__name__}")
    check_options(config)
    economy, threads = as_economy(economy), torch.get_num_threads()
    found = config, economy.K_start, config.k_max * economy.K_start
    torch.set_num_threads(1)  # its tensors are small: threads would wait for each other
    try:
        with tqdm(desc="grid solution", disable=None if progress else True) as bar:
            for _ in range(60):
                found = law_of_motion_fixed_point(economy, *found, bar)
                if isinstance(found, GridSolution):
                    return found
    finally:
        torch.set_num_threads(threads)
    raise UserError("grid: K and k leave every range of nodes that was tried; "
                    f"{advice(economy.tables(), 'judge with --grid none')}")


def simulated_laws(table: np.ndarray, axes: Axes, mass: np.ndarray, z_path: np.ndarray, laws: np.ndarray,
                   economy: Economy):
    """The policy table on the axes through the histogram: K (periods,), the last mass, the laws of ln K' and of the
    planner's Delta that come out (2, Z, 2 or 4), and their R2 (2, Z); where z never comes coefficients stay."""
    econ, s, Deltas = economy.tables(), torch.arange(len(economy.arrays.beta))[:, None], np.zeros(len(z_path))
    labour, k = torch.from_numpy(labour_along(economy, z_path, mass)), torch.from_numpy(axes.k)

    def keep(t, mass, k_next):
        at = place(k, s, torch.tensor(mass.sum(0) @ axes.k), torch.tensor(z_path[t]), econ)._replace(labour=labour[t])
        Deltas[t] = (mass * gain_from_K(torch.from_numpy(k_next), at, econ).numpy()).sum()

    K_path, mass = simulate_histogram(table, axes, mass, z_path, economy,
                                      keep if econ.equilibrium == "planner" else None)
    K, Delta, z, labour = [torch.as_tensor(x)[BURN_IN:, None] for x in (K_path, Deltas, z_path, labour)]
    both = (law_of_motion(K, labour, z, torch.from_numpy(laws[0, :, 1])),
            regress_by_z(Delta, K, labour, z, torch.zeros(laws.shape[1], dtype=torch.float64)))
    found, r2 = [torch.stack(x).numpy() for x in zip(*both)]
    return K_path, mass, np.where(np.isnan(found), laws, found), r2


def law_of_motion_fixed_point(economy: Economy, config: GridConfig, centre: float, k_max: float, bar):
    """The fixed point on nodes of K around centre and of k up to k_max: a GridSolution or, where the cross-section
    leaves the nodes, the next (config, centre, k_max) to try. Few sweeps an update, so that the policy and the laws of
    motion converge together, on a short path of z; how much its luck moves the laws is measured once on a long one."""
    econ, Z = economy.tables(), len(economy.arrays.TFP)
    ends = centre * np.array(config.K_range)
    coarse, fine = [Axes(power_grid(n_k, econ.k_min, k_max, config.exponent), np.linspace(*ends, n_K),
                         labour_nodes(economy, n_L)) for n_k, n_K, n_L in
                    ((config.n_k, config.n_K, config.n_L), (config.n_fine, config.n_K_fine, config.n_L_fine))]
    axes = fine._replace(k=histogram_nodes(k_max, econ))
    nodes, k, K = household_nodes(coarse, econ), axes.k, axes.K
    z_path = draw_z_path(config.periods, economy.arrays.P_z, np.random.default_rng(config.seed))
    comes = [BURN_IN + np.flatnonzero(z_path[BURN_IN:] == z)[:20][-1] for z in np.unique(z_path[BURN_IN:])]
    short = max(config.periods // 20, 2 * BURN_IN, max(comes) + 2)  # every z comes 20 times
    laws = np.zeros((2, Z, 2 + 2 * econ.labour_moves))
    laws[0, :, :2], laws[1, :, 0] = (0.035 * np.log(centre), 0.965), economy.Delta_start
    above, wages = nodes.m - econ.k_min, (supplied(nodes.at, econ) * prices(nodes.at, econ)[1]).numpy()
    c = np.minimum(above, (1 - economy.mean_beta) * above + 0.9 * wages).clip(C_MIN * econ.c_ss)
    mass = dispersed_mass(k, centre, z_path[0], economy)
    ln_K, L = [x.ravel() for x in np.meshgrid(np.log(centre * np.array([0.9, 1.1])), [axes.L.min(), axes.L.max()])]
    x = np.stack([np.ones(4), ln_K, L, L**2])[: laws.shape[2]]  # where two laws are compared
    gap, damping, long = math.inf, config.damping, None
    correction = steps = np.zeros_like(laws)  # correction: from the laws of the short path to the long one's
    for update in range(config.max_updates):
        c, k_endo, change, bounded = solve_household(c, laws, nodes, economy, config)
        table = invert(refined(k_endo, coarse, axes), nodes, k)
        K_path, mass, new, _ = simulated_laws(table, axes, mass, z_path[:short], laws, economy)
        last, steps = steps, new + correction - laws
        gap_last, gap = gap, (np.abs(steps @ x).max((1, 2)) * [1, econ.c_ss]).max()
        converged = long is not None and max(gap, change) < config.tolerance
        settled, to_centre = update >= 4 or converged, K_path[BURN_IN:].mean() / centre
        low, high = (0.8, 1.28) if settled or econ.equilibrium == "planner" else (0.4, 2.5)  # a market starts far away
        if not low < to_centre < high or not (K_path > max(k[0], 0)).all():
            return config, centre * np.clip(to_centre, 1 / 1.3, 1.3), k_max
        if settled and (mass * np.where(k > 0.6 * k_max, k, 0)).sum() > 1e-4 * K_path[-1]:
            return config, centre, 2 * k_max
        if long is None and gap < max(3e-5, 2 * config.tolerance):  # from here on the short path's error is the same
            start = mass
            long_path, mass, long, r2 = simulated_laws(table, axes, mass, z_path, laws, economy)
            for _ in range(2):  # from the end of a short path, as always
                _, mass, new, _ = simulated_laws(table, axes, mass, z_path[:short], laws, economy)
            correction, gap, gap_last = long - new, math.inf, math.inf
        bar.update()
        bar.set_postfix_str(f"change of c {change:.0e}, of the laws of motion {gap:.0e}")
        if converged:
            break
        if gap > gap_last and ((steps @ x) * (last @ x)).sum((1, 2)).min() < 0:
            damping /= 2  # the law of motion overshoots: more K expected means less saved
        laws = laws + damping * steps
    else:
        raise UserError(f"grid: no convergence in {config.max_updates} updates of the law of motion "
                        f"(c moves {change:.0e}, K forecast {gap:.0e}); lower --grid-damping or judge with --grid none")
    kept, z_kept = long_path[BURN_IN:], z_path[BURN_IN:]
    if not K[0] < kept.min() <= kept.max() < K[-1]:  # nodes over all of the path, as dense as before
        low, high = config.K_range
        ends = min(low, 0.95 * (kept.min() / centre)), max(high, 1.05 * (kept.max() / centre))
        n_K, n_K_fine = [math.ceil(n * np.ptp(ends) / (high - low)) for n in (config.n_K, config.n_K_fine)]
        return dataclasses.replace(config, K_range=ends, n_K=n_K, n_K_fine=n_K_fine), centre, k_max
    require_payable(economy, kept, z_kept, labour_along(economy, z_path, start)[BURN_IN:])
    notes = [f"grid: the largest k is {k_max:.4g}"] if k_max > config.k_max * economy.K_start else []
    if bounded:
        notes.append(f"grid: at {100 * bounded:.2g}% of the nodes saving is worth nothing; c is bounded there")
    if econ.labour_moves and len(econ.beta) > 2:
        notes.append(f"grid: R2 of the law of labour is {economy.arrays.L_r2.min():.6f}")
    on_fine_k = coarse._replace(k=fine.k)
    V, left = evaluate_grid(invert(k_endo, nodes, fine.k), on_fine_k, laws, economy)
    if left >= 1e-7:
        notes.append(f"grid: values still changed by {left:.0e} after {VALUE_SWEEPS} sweeps")
    values = refined(V, on_fine_k, fine)
    table = invert(refined(k_endo, coarse, fine), nodes, fine.k)
    table, values, k, K, L = map(torch.from_numpy, (table, values, *fine))
    return GridSolution(
        economy=economy, econ=econ, table=table, value_table=values, k=k, K=K, L=L, k_max=k_max, K_mean=kept.mean(),
        K_of_z=np.array([kept[z_kept == z].mean() if (z_kept == z).any() else kept.mean() for z in range(Z)]),
        alm_coefficients=laws[0], alm_r2=r2[0], Delta_law=laws[1], Delta_r2=r2[1], notes=tuple(notes))


# ---------------------------------------------------------------------------------------------- impulse responses

SERIES = ("capital", "output", "consumption", "interest_rate", "shocks")


def impulse_responses(solution: Policy, cfg: Config, k: np.ndarray, mass: np.ndarray) -> dict:
    """series -> (benchmark, shocked), each (paths, periods): economies that were in the middle state a period before 0
    (the upper one of two) and are at 0 in it, or one state below. They start from the histogram mass (S, n) at k (n,).
    Every random number is the same whatever the solution and the state at 0."""
    econ, policy, rng = solution.econ, panel_policy(solution), torch.Generator().manual_seed(JUDGE_SEED)
    out, panel = {series: [] for series in SERIES}, settled_panel(k, mass, cfg.irf_paths, cfg.irf_agents, econ, rng)
    for last, _, k_next in simulate(policy, panel, BURN, econ, rng):
        pass
    usual = torch.full_like(last.z, len(econ.TFP) // 2)
    before, after = next_panel(last, k_next, usual, econ, rng), rng.get_state()
    _, _, k_next = next(simulate(policy, before, 1, econ, rng))
    for z_0 in (usual, (usual - 1).clamp(min=0)):
        rng.set_state(after)
        now, columns = next_panel(before, k_next, z_0, econ, rng), []
        for _, at, k in simulate(policy, now, cfg.irf_periods, econ, rng):
            m, R = cash_on_hand(at, econ)
            columns.append([at.K[:, 0], output(at, econ)[:, 0], (m - k).mean(1), R[:, 0], at.z[:, 0]])
        for series, values in zip(SERIES, zip(*columns)):
            out[series].append(torch.stack(values, 1).double().cpu().numpy())
    return out


def impulse_response(responses: dict, series: str):
    """A series of impulse_responses() in percent, a ratio of means, or the interest rate in percentage points:
    mean, 10th and 90th percentile of the single paths' responses, each (periods,)."""
    def change(b, s):
        return 100 * (s - b) if series == "interest_rate" else 100 * (s / b - 1)
    benchmark, shocked = responses[series]
    low, high = np.percentile(change(benchmark, shocked), (10, 90), axis=0)
    return change(benchmark.mean(0), shocked.mean(0)), low, high


# ---------------------------------------------------------------------------------------------- the list of figures


def figure_list(economy: Economy, cfg: Config) -> List[tuple]:
    """Every figure that is judged, in the order in which it is shown: name; keys in metrics.json, with {} of a solution
    and else of a comparison with the grid; what is published at N = 50, by Maliar, Maliar & Valli (2010) and of Bellman
    errors by Han, Yang & E (2021); the tolerance in the default economy; and that in any other, a number or (the grid's
    figure, its mean K) -> number. Networks that see who is unemployed have tighter tolerances at small N; those that
    know more than K rest elsewhere than the grid. Where labour moves no path leads to K*: nobody there is judged."""
    sees, N, moves = sees_who_earns(cfg), f"N={cfg.eval_agents}", economy.arrays.labour_moves
    rests = None if cfg.moments or cfg.learnt_moments or moves else 0.001
    return [
        (f"W1 of capital, {N}", "comparison small w1", 0.16, 0.15, lambda x, K: 0.004 * K),
        ("W1 of capital, N=inf", "comparison limit w1", None, 0.06, lambda x, K: 0.004 * K),
        (f"std of capital over the grid's - 1, {N}", "comparison small std_gap", -0.005, 0.01, 0.01),
        ("std of capital over the grid's - 1, N=inf", "comparison limit std_gap", None, 0.01, 0.01),
        ("|k' - k' grid|, mean", "comparison policy_distance mean", 0.006, 0.005, lambda x, K: 0.00015 * K),
        ("|k' - k' grid|, max", "comparison policy_distance max", 0.017, 0.03, None),
        *[(f"Euler error, log10 mean, {N}", "{} small euler_log10 mean", None, -3.9, lambda x, K: x)] * sees,
        ("Euler error, log10 mean, N=inf", "{} limit euler_log10 mean", None, -4.8, lambda x, K: max(x + 0.15, -4.3)),
        ("Euler error, log10 p99, N=inf", "{} limit euler_log10 p99", None, -4.2, lambda x, K: max(x + 0.15, -3.5)),
        ("Euler error, log10 max, N=inf", "{} limit euler_log10 max", None, -3.0, None),
        (f"Bellman error, best c, mean, {N}", "{} small bellman_best_c mean",
         0.0153 if cfg.learnt_moments else 0.0184, 0.0005 if sees else 0.004, None),
        ("Bellman error, own c, mean, N=inf", "{} limit bellman_own_c mean", None, 0.00015 if sees else 0.0001, None),
        ("Bellman error over u'(c) c, mean, N=inf", "{} limit bellman_in_consumption mean", None, None,
         lambda x, K: max(1.5 * x + 1e-5, 5e-4)),
        *[(f"K* resting in {name} over the grid's - 1, N=inf", f"comparison resting_gap {z}", None, rests, rests)
          for z, name in enumerate(economy.arrays.z_names)],
        ("Euler error, log10 mean, at the worst K*, N=inf", "{} limit risky_steady_state worst_euler", None, -3.6,
         None if moves else lambda x, K: max(x + 0.1, -3.6)),
        ("response of output, gap (p.p.)", "comparison impulse_response_gap output", None, 0.02, 0.02),
        ("response of capital, gap (p.p.)", "comparison impulse_response_gap capital", None, 0.02, 0.02)]


def verdict(figures: dict, economy: Economy, cfg: Config) -> List[dict]:
    """A row a figure. In the default economy tolerances are absolute, in any other a figure is measured by the grid's
    of the same economy. Without a grid, or where a distribution still moves, nothing passes or fails, nor do panels
    whose K leaves the grid's nodes: few households who may be very rich."""
    grid, rows = figures.get("grid"), []
    judged = grid and max(figures[name]["limit"]["moves"] for name in ("network", "grid")) < MOVES
    default = not difference(economy_dict(economy), economy_dict(krusell_smith()), "economy")

    def found_at(path):
        return functools.reduce(lambda x, key: x[key if isinstance(x, dict) else int(key)], path.split(), figures)

    for name, path, published, tolerance, elsewhere in figure_list(economy, cfg):
        compares = "{}" not in path
        if compares and not grid:
            continue
        ours = found_at(path.format("network"))
        theirs = (0.0 if compares else found_at(path.format("grid"))) if grid else None
        behind = "irf" if "impulse" in path else "small" if " small " in path else "limit"
        known = judged and figures["comparison"]["outside_K"][behind] < OUTSIDE
        tolerance = (tolerance if default else elsewhere) if known else None
        if callable(tolerance):
            tolerance = tolerance(theirs, grid["limit"]["capital"]["mean"])
        size = ours if name.startswith("Euler") else abs(ours)
        rows.append({"figure": name, "network": ours, "grid": theirs,
                     "published": published if default and cfg.eval_agents == 50 else None, "tolerance": tolerance,
                     "passed": None if tolerance is None else bool(size <= tolerance)})
    return rows


def print_verdict(rows: List[dict]) -> None:
    line = "{:<52}{:>10}{:>10}{:>11}{:>11}  {}"
    print("\n" + line.format("figure", "network", "grid", "published", "tolerance", "verdict"))
    for name, *numbers, passed in (row.values() for row in rows):
        shown = ["-" if x is None else f"{x:.4g}" for x in numbers]
        print(line.format(name, *shown, {True: "pass", False: "FAIL", None: "-"}[passed]))


QUOTED = {"mean_K": "mean capital K (goods)", "interest_rate_percent": "interest rate r (%)", "K_over_Y": "K / Y",
          **{f"std_ln_{name}": f"std of ln {name}" for name in "YCI"}, "corr_C_Y": "correlation of ln C and ln Y",
          "gini_wealth": "Gini of wealth", "top_10_percent_hold": "the richest 10% hold (%)",
          "mean_mpc": "mean MPC", "r2_law_of_K": "R2 of the law of K, least over z"}


def print_statistics(figures: dict) -> None:
    """What people quote of an economy, in the limit."""
    found = {name: figures[name]["limit"]["statistics"] for name in ("network", "grid") if name in figures}
    print("\n" + f"{'economy, N=inf':<52}" + "".join(f"{name:>10}" for name in found))
    for name, words in QUOTED.items():
        print(f"{words:<52}" + "".join(f"{x[name]:>10.{'7f' if name[0] == 'r' else '4g'}}" for x in found.values()))


# ---------------------------------------------------------------------------------------------- pictures
# name -> data, where the network is a solid line and the grid, if there is one, a dashed one

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False,
         "legend.handlelength": 3.0, "legend.columnspacing": 1.0, "axes.formatter.useoffset": False}
BLUE, SKY = "#0072B2", "#56B4E9"  # Okabe & Ito (2008)
LINES = {"network": dict(color=SKY, linestyle="-", linewidth=2.8),  # light and wide: dashes show on it in grey too
         "grid": dict(color="black", linestyle=(0, (4, 2)), linewidth=1.1)}  # drawn second: dashes on the solid line


@contextlib.contextmanager
def picture(path, panels, heights, note="", **more):
    """Axes in the common style, panels side by side in rows of these heights (inches), with every label above them
    all; written to path at the end; no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        height = 0.35 + 0.75 * len(heights) + sum(heights)
        fig = Figure(figsize=(7, height))
        gap = 0.75 * len(heights) / sum(heights)  # by hand: matplotlib's layouts take as long as all else
        fig.subplots_adjust(0.13, 0.6 / height, 0.97, 1 - 0.5 / height, 0.33, gap)
        yield fig.subplots(len(heights), panels, height_ratios=heights, squeeze=False, **more)
        labels = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        fig.legend(labels.values(), labels, loc="upper center", ncols=4)
        fig.text(0.01, 0.05 / height, note, fontsize=7.5, color="0.3")
        fig.savefig(path, dpi=110, format="png")


def plot_lines(ax, x, of, gap=None):
    """Each solution's y over x, and network minus grid in a strip below."""
    for name, y in of.items():
        ax.plot(x, y, label=name, **LINES[name])
    if gap:
        if "grid" in of:
            gap.plot(x, of["network"] - of["grid"], color=BLUE, linewidth=1.0, label="network - grid (lower panel)")
        gap.axhline(0, **LINES["grid"])
        gap.set(ylabel="difference", xlim=ax.set_xlim(x[0], x[-1]))


def draw_pictures(folder: Path, solutions: dict, figures: dict, arrays: dict) -> None:
    """Every picture of the output directory."""
    network, of, draw = solutions["network"], figures["network"], folder / "figures"
    cfg, a = network.config, network.economy.arrays
    draw.mkdir()
    limit, (Z, S) = f"N = infinity, {of['limit']['periods']} periods", a.income.shape
    on_k = "individual capital k (goods)"
    z_of, s_of = sorted({(Z - 1) // 2, Z // 2}), sorted({0, S - 1})  # drawn: the middle of z, both ends of s

    # density and left tail of individual capital in the panel
    judged = f": W1 distance {figures['comparison']['small']['w1']:.3f} goods" if "grid" in figures else ""
    k_of = {name: x["k"] for name, x in arrays["small"].items()}
    low = min(k.min() for k in k_of.values())
    top = max(low + 1, *(np.quantile(k, 0.9995) for k in k_of.values()))
    poor = np.linspace(low, low + (top - low) / 15, 201)
    small = f"N = {cfg.eval_agents}, {cfg.eval_economies} economies, {of['small']['periods']} periods"
    with picture(folder / "distribution_validation.png", 2, [2.6], small, width_ratios=(2, 1)) as [(density, tail)]:
        for name, k in k_of.items():
            label = f"{name}: mean {k.mean():.2f}, std {k.std():.2f}"
            density.stairs(*np.histogram(k, 80, (low, top), density=True), label=label, **LINES[name])
            tail.plot(poor, [100 * np.mean(k <= x) for x in poor], **LINES[name])
        density.set(title="distribution" + judged, xlabel=on_k, ylabel="density (per good)", xlim=(low, top))
        tail.set(title="the poorest", xlabel="k (goods)", ylabel="households with capital up to k (%)")

    # training over outer iterations
    history = network.weights["history"]
    with picture(draw / "training_history.png", 2, [1.8] * 2, f"{sum(history['seconds']):.0f} s in all") as axes:
        for ax, (name, label) in zip(axes.flat, {
                "mean_K": "mean capital K (goods)", "policy_residual": "policy residual (rms)",
                "euler": "Euler error (mean)", "movement": "savings move (share of K)"}.items()):
            ax.plot(range(1, len(history[name]) + 1), history[name], ".-", color=BLUE)
            ax.set(xlabel="outer iteration", ylabel=label, yscale="linear" if name == "mean_K" else "log")

    # errors at the states that a solution visits, in groups of equally many by k
    note = f"{limit}; a point is a twentieth of a panel."
    for of_error, label in (("bellman", "|Bellman error|, own c (utils)"), ("euler", "|Euler error| (share of c)")):
        with picture(draw / f"{of_error}_errors.png", len(s_of), [2.7] * len(z_of), note) as axes:
            for ax, (z, s) in zip(axes.flat, itertools.product(z_of, s_of)):
                ax.set(yscale="log", ylabel=label, xlabel=on_k, title=f"{a.z_names[z]}, {a.s_names[s]}")
                for name, x in arrays["limit"].items():
                    here = (x["sample_z"] == z) & (x["sample_s"] == s) & ~np.isnan(x[of_error])
                    k, error = x["sample_k"][here], np.abs(x[of_error][here])
                    groups = [i for i in np.array_split(np.argsort(k), 20) if len(i)]
                    at, high = [k[i].mean() for i in groups], [np.percentile(error[i], 95) for i in groups]
                    ax.plot(at, [error[i].mean() for i in groups], label=f"{name}, mean", **LINES[name])
                    ax.plot(at, high, ".", label=f"{name}, 95th percentile", color=LINES[name]["color"])

    # mean capital on the first periods of the judged path of z; the lower states are shaded
    z, lower = arrays["limit"]["network"]["z_path"][:400, 0], Z // 2
    with picture(draw / "capital_path.png", 1, [2.1, 0.9], limit) as [[ax], [gap]]:
        ax.fill_between(range(len(z)), z < lower, step="mid", color="0.9", linewidth=0, zorder=0.5,
                        transform=ax.get_xaxis_transform(), label=" / ".join(a.z_names[:lower]))
        plot_lines(ax, range(len(z)), {name: x["K_path"][:400, 0] for name, x in arrays["limit"].items()}, gap)
        ax.set_ylabel("mean capital K (goods)")
        gap.set_xlabel("period")

    # savings and consumption at mean K, each solution where there is one
    K, top = np.clip(of["limit"]["capital"]["mean"], *network.reach()[1]), np.quantile(k_of["network"], 0.9999)
    k = power_grid(400, a.k_min, max(top, a.k_min + 1), 4.0)
    for file, found, label, less in (("policy", "next_capital", "k' - k (goods)", k),
                                     ("consumption", "consumption", "c (goods)", 0)):
        note, heights = f"At mean capital K = {K:.1f}.", [1.9, 0.8] * len(z_of)
        with picture(draw / f"{file}_functions.png", len(s_of), heights, note) as axes:
            for (row, z), (column, s) in itertools.product(enumerate(z_of), enumerate(s_of)):
                (ax, gap), lines = axes[2 * row : 2 * row + 2, column], {}
                for name, solution in solutions.items():
                    near_k, near_K = [np.clip(x, *ends) for x, ends in zip((k, K), solution.reach())]
                    y = getattr(solution, found)(near_k, s, near_K, z) - less
                    lines[name] = np.where((near_k == k) & (near_K == K), y, np.nan)
                plot_lines(ax, k, lines, gap)
                ax.set(ylabel=label, title=f"{a.z_names[z]}, {a.s_names[s]}")
                gap.set_xlabel(on_k)
                for axis in (ax, gap):  # linear up to 1, and log from there on
                    axis.set_xscale("symlog", linthresh=1, linscale=1 / np.log(10))

    # the share that the poorest hold, and consume
    with picture(draw / "lorenz_curves.png", 2, [2.6], limit) as [axes]:
        for ax, what in zip(axes, ("capital", "consumption")):
            ax.axline((0, 0), (100, 100), color="0.5", linewidth=0.7)
            held = {name: figures[name]["limit"][what] for name in solutions}
            plot_lines(ax, np.linspace(0, 100, 21), {name: 100 * np.array(x["lorenz"]) for name, x in held.items()})
            ginis = ", ".join(f"{name} {x['gini']:.3f}" for name, x in held.items())
            ax.set(title=f"{what}, Gini: {ginis}", xlabel="households, the poorest first (%)", ylabel="their share (%)")

    # responses to a lower state at period 0
    note = f"{cfg.irf_paths} paths, N = {cfg.irf_agents}"
    with picture(draw / "impulse_responses.png", 2, [1.8] * 2, note) as axes:
        for ax, series in zip(axes.flat, SERIES):
            points, t = series == "interest_rate", range(cfg.irf_periods)
            found = {name: impulse_response(responses, series) for name, responses in arrays["irf"].items()}
            ax.fill_between(t, *found["network"][1:], color=SKY, alpha=0.25, linewidth=0, label="network, 10-90%")
            plot_lines(ax, t, {name: x[0] for name, x in found.items()})
            ax.axhline(0, color="0.5", linewidth=0.7, zorder=1)
            ax.set(xlabel="periods after the shock",
                   ylabel=f"{series.replace('_', ' ')} ({'p.p.' if points else 'percent'})")

    # what a household with capital k adds to each learnt moment, by s, in units of the moment's own movement
    if p := network.config.learnt_moments:
        meant = of["small"]["moments"]
        at_k = torch.linspace(a.k_min, k[-1], 300, dtype=torch.float64, device=network.device).expand(len(s_of), -1)
        s = torch.tensor(s_of, device=network.device).unsqueeze(1).expand_as(at_k)
        q = (network.seen(at_k, s) - network.net.M_mean) / network.net.M_std
        with picture(draw / "moments.png", 1, [2.4] * p) as axes:
            for row, ax in enumerate(axes.flat):
                for line, i, color in zip(q[..., row - p].cpu(), s_of, (BLUE, "#D55E00")):
                    ax.plot(at_k[0].cpu(), line, color=color, label=a.s_names[i])
                ax.set(title=f"correlation {meant['K'][row]:+.2f} with K, {meant['unemployment'][row]:+.2f} with the "
                       "share in the lowest income", xlabel=on_k, ylabel="Q(k, s)")


# ---------------------------------------------------------------------------------------------- tables that are given
# Every table is checked, filled up and made to fit the others before anything is solved.


def checked_tables(given: Economy) -> types.SimpleNamespace:
    """What was given as float64 arrays of full shape, what was left out at its default, every number inside its
    interval."""
    try:
        of_S = "labour" if given.income is None else "income"
        Z, S = len(np.atleast_1d(given.TFP)), np.shape(getattr(given, of_S))[-1]
    except (IndexError, TypeError, ValueError):
        raise UserError(f"{of_S}: give labour (or income) as a table (Z, S) of numbers, and TFP (Z,)") from None
    require(given.income is None or given.labour is given.benefit is None, "income: takes the place of labour and "
            "benefit; leave it out, or these")
    require(given.income is not None or given.L is None, "L: follows from labour and the shares of s; leave it out")
    lengths, full = {"Z": Z, "S": S, "F": -1}, types.SimpleNamespace(shares=None, income=None, L=None)
    defaults = {"benefit": 0.0, "sees_s": np.eye(S)}
    for item in filter(lambda item: item.metadata, dataclasses.fields(given)):
        name, within, shape = item.name, item.metadata["within"], tuple(lengths[n] for n in item.metadata["shape"])
        x = getattr(given, name)
        x = defaults.get(name) if x is None else x
        if x is None and item.default is None:
            continue
        try:
            x = np.asarray(x, dtype=float)
            require(name != "Pi" or x.ndim != 3, f"Pi: shape {x.shape} does not say whether it depends on z or on z'; "
                    "give Pi[:, None] where it depends on z now, Pi[None] where on z' next period")
            require(name != "Pi" or x.shape != (Z * S, Z * S) or Z == 1, f"Pi: shape {x.shape} is the joint matrix of "
                    f"(z, s); give P_z, Pi = dk.from_joint(P, {Z}, {S})")
            x = np.broadcast_to(x, [x.shape[-1] if n < 0 else n for n in shape]).copy()
        except (IndexError, TypeError, ValueError):
            raise UserError(f"{name}: give numbers of shape {shape}; Z = {Z} by TFP, S = {S} by {of_S}") from None
        outside = x[~inside(x, within)]
        hint = "; logs? take exp of them" if name in ("income", "labour", "TFP", "L") and (x < 0).any() else ""
        require(not outside.size, f"{name}: {outside.min(initial=math.inf):g} is not in {within}{hint}")
        setattr(full, name, x if shape else float(x))
    for name, n in (("s_names", S), ("z_names", Z)):
        names = getattr(given, name)
        require(isinstance(names, (list, tuple, np.ndarray)) and len(names) in (0, n), f"{name}: give a list of {n} "
                "names, one for each state")
        setattr(full, name, tuple(map(str, names)) or tuple(f"{name[0]} = {i}" for i in range(n)))
    full.equilibrium = str(given.equilibrium)
    require(full.equilibrium in EQUILIBRIA, f"equilibrium: {given.equilibrium!r} is none of {', '.join(EQUILIBRIA)}")
    require((np.diff(full.TFP) >= 0).all(), "TFP: falls with z; order the states z from bad to good, in every table")
    return full


def from_joint(P, Z: int, S: int) -> Tuple[np.ndarray, np.ndarray]:
    """P_z (Z, Z) and Pi (Z, Z, S, S) of the joint matrix P (Z S, Z S), rows and columns in the order (z, s): z = 0 with
    every s, then z = 1, and so on. UserError where the probability of z' depends on s."""
    try:
        P = np.asarray(P, dtype=float)
    except (TypeError, ValueError):
        raise UserError("from_joint: P: give a matrix of numbers") from None
    require(P.shape == (Z * S, Z * S) and inside(P, CHANCE).all(), "from_joint: P: give probabilities of "
            f"shape {(Z * S, Z * S)}; it has shape {P.shape} and numbers from {P.min(initial=math.inf):g} to "
            f"{P.max(initial=-math.inf):g}")
    joint = P.reshape(Z, S, Z, S).transpose(0, 2, 1, 3)  # (z, z', s, s')
    to_z = joint.sum(3, keepdims=True)
    miss = np.ptp(to_z, axis=2).max()
    require(miss <= S * ROUNDING, f"from_joint: the probability of z' depends on s, by up to {miss:.3g}; rows and "
            "columns must be in the order (z, s)")
    never = to_z == 0  # where z' never follows z any Pi will do
    return to_z.mean((2, 3)), np.where(never, np.eye(S), joint) / np.where(never, 1, to_z)


def add_chain(a: types.SimpleNamespace) -> None:
    """Rows that sum to one; P (Z, S, Z, S) of (z, s); shares where they were left out; labour and income. All must fit
    together."""
    Z, S = len(a.TFP), len(a.beta)
    require(set(a.group) == set(range(len(set(a.group)))), "group: give groups 0, 1, 2, ... without a gap")
    for name in ("P_z", "Pi"):
        rows = getattr(a, name).clip(0)
        miss = rows.sum(-1) - 1
        worst = miss.flat[np.abs(miss).argmax()]
        require(abs(worst) <= rows.shape[-1] * ROUNDING, f"{name}: rows must sum to one, and one misses by {worst:.3g}")
        setattr(a, name, rows / rows.sum(-1, keepdims=True))
    a.P = np.einsum("xy,xyij->xiyj", a.P_z, a.Pi)  # P_z(z' | z) Pi(s' | z, z', s)
    P = a.P.reshape(Z * S, Z * S)
    a.ergodic = (np.abs(np.linalg.eigvals(P) - 1) < 1e-10).sum() == 1
    require(a.ergodic or a.shares is not None,
            "P_z, Pi: the chain of (z, s) is not ergodic; give the shares it starts and stays with")
    if a.ergodic:
        found = np.linalg.lstsq(np.vstack([P.T - np.eye(Z * S), np.ones(Z * S)]), np.eye(Z * S + 1)[-1], rcond=None)[0]
    else:  # what these shares lead to; a lazy chain forgets where a cycle stands
        start = a.shares.reshape(-1).clip(0)
        found = start / start.sum() @ np.linalg.matrix_power((P + np.eye(Z * S)) / 2, 2**30)
    found = found.clip(0) / found.clip(0).sum()
    miss = 0 if a.shares is None else np.abs(a.shares.reshape(-1) - found).max()
    require(miss <= ROUNDING, f"shares: not a stationary distribution of P_z and Pi, by {miss:.3g}")
    a.shares = found.reshape(Z, S)
    of_group = np.array([a.shares[:, a.group == g].sum() for g in range(len(set(a.group)))])
    require((of_group > 1e-12).all(), f"group: nobody is ever in a state of group {of_group.argmin()}; leave its "
            "states out")
    of_z = a.shares.sum(1)
    require((of_z > 1e-9).all(), f"P_z: z = {of_z.argmin()} does not recur: once left it never comes again; leave it "
            "out, or give it a way back")
    supply_of_labour(a)
    seen = np.concatenate([a.sees_s, a.beta[:, None], a.income.T, a.Pi.transpose(2, 0, 1, 3).reshape(S, -1)], 1)
    require(len(np.unique(a.sees_s, axis=0)) == len(np.unique(seen, axis=0)),
            "sees_s: the networks cannot tell two states apart that differ")


def share_path(a: types.SimpleNamespace, z_path: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Shares (periods, S) of s along a path of z, p' = p Pi[z, z'], from p (S,)."""
    moves = zip(z_path[:-1], z_path[1:])
    return np.array([*itertools.accumulate(moves, lambda p, move: p @ a.Pi[move], initial=p)])


def supply_of_labour(a: types.SimpleNamespace) -> None:
    """L (Z,) and income (Z, S) by z; whether labour moves with the history of z, and then usual (Z, 2), mean L and tau
    given z; L_std, of L around it; L_range (Z, 2); laws L' = a + b L by (z, z') in L_law (Z, Z, 2), L_r2 its R2, and
    sum_s p_s benefit(z, s) = a + b L by z in benefit_law (Z, 2). Both are exact where S is 2."""
    (Z, S), given_z = a.shares.shape, a.shares / a.shares.sum(1, keepdims=True)
    a.labour_moves, a.usual, a.benefit_law = False, np.zeros((Z, 0)), np.zeros((Z, 2))
    a.L_mean, a.L_std = np.zeros(()), np.ones(())
    z_path = draw_z_path(20_000, a.P_z, np.random.default_rng(0))
    lasting = np.flatnonzero(a.P_z.diagonal() > 0)  # each of these for as long as it takes
    paths = [z_path, *(np.full(1000, z) for z in lasting)]
    every_z, p = np.concatenate(paths), np.concatenate([share_path(a, path, given_z[path[0]]) for path in paths])
    by_z = a.income is not None  # and by nothing else
    if by_z:
        a.labour, a.benefit = a.income, np.zeros((Z, S))
    given_L, (L, paid) = a.L, [(p * table[every_z]).sum(1) for table in (a.labour, a.benefit)]
    a.L, usual_paid = [(given_z * table).sum(1) for table in (a.labour, a.benefit)]
    require(min(L.min(), a.L.min()) > 0, f"{'income' if by_z else 'labour'}: nobody supplies any labour in some "
            "period; give somebody more than 0")
    gap = np.zeros(Z) if given_L is None else a.L / given_L - 1
    z = np.abs(gap).argmax()
    require(abs(gap[z]) <= ROUNDING, f"income: in z = {z} households earn {1 + gap[z]:.6g} wages for each unit of "
            "labour L; change income or L, or leave L out")
    gap = (1 - a.alpha) * (L / a.L[every_z] - 1)
    tax = (paid / L).max()
    require(not by_z or np.abs(gap).max() <= ROUNDING, "Pi: the shares of s depend on the history of z, not on z "
            f"alone, so income by z misses what households supply: goods are off by {100 * gap.min():.2g} to "
            f"{100 * gap.max():+.2g}% of output; give labour and benefit in place of income")
    require(tax < 1, f"benefit: takes a tax of {100 * tax:.4g}% of labour income on some path of z; lower it")
    a.income = (1 - usual_paid / a.L)[:, None] * a.labour + a.benefit
    if by_z or max(np.abs(L - a.L[every_z]).max() / L.max(), np.abs(paid - usual_paid[every_z]).max()) < 1e-9:
        return
    n, a.labour_moves, a.usual = len(z_path), True, np.stack([a.L, usual_paid / a.L], 1)
    a.L_range = np.array([[L[every_z == z].min(), L[every_z == z].max()] for z in range(Z)])
    L, paid, p = L[:n], paid[:n], p[:n]
    a.L_mean, a.L_std = L.mean(), L.std()
    a.L_law, a.L_r2 = np.stack([np.tile(a.L, (Z, 1)), np.zeros((Z, Z))], 2), np.ones((Z, Z))
    for z in range(Z):
        a.benefit_law[z], _ = line(L[z_path == z], paid[z_path == z])
        for z_next in range(Z):
            t = np.flatnonzero((z_path[:-1] == z) & (z_path[1:] == z_next))
            if len(t):
                a.L_law[z, z_next], a.L_r2[z, z_next] = line(L[t], p[t] @ a.Pi[z, z_next] @ a.labour[z_next])


def line(x: np.ndarray, y: np.ndarray) -> Tuple[Tuple[float, float], float]:
    """(a, b) of y = a + b x by least squares, and R2; where x does not move b is 0, where y does not R2 is 1."""
    dx, dy = x - x.mean(), y - y.mean()
    b = dx @ dy / (dx @ dx) if np.abs(dx).max() > 1e-9 else 0.0
    return (y.mean() - b * x.mean(), b), 1 - ((dy - b * dx) ** 2).sum() / (dy @ dy) if np.abs(dy).max() > 1e-9 else 1.0


def short_of_interest(econ: Tables, K: Tensor, z: Tensor, labour: Tensor) -> float:
    """Goods that the poorest at the limit are short of to stay there, at the worst of K, z (...), labour (..., 2)."""
    at = place(torch.full_like(K, econ.k_min).unsqueeze(-1), torch.arange(len(econ.beta), device=K.device),
               K.unsqueeze(-1), z.unsqueeze(-1), econ)
    m, _ = cash_on_hand(at._replace(labour=labour.unsqueeze(-2)), econ)
    return float((econ.k_min - m).max())


def advice(econ: Tables, usual: str) -> str:
    """What to do where no solution is found: what is usual, and first the limit where the poorest may owe too much."""
    z = torch.arange(len(econ.TFP), device=econ.TFP.device)
    short = short_of_interest(econ, torch.full_like(econ.TFP, econ.K_ss), z, econ.usual)
    nearer = "bring k_min nearer to 0, as the poorest cannot pay interest there at the steady state's prices, or "
    return nearer + usual if short > 0 else usual


def require_payable(economy: Economy, K: np.ndarray, z: np.ndarray, labour: np.ndarray) -> None:
    """Refuses a limit at which the poorest cannot pay interest at some of the K, z (...) and labour (..., 2) that a
    solution visits: its prices decide, and those of the steady state do not."""
    econ = economy.tables()
    short = short_of_interest(econ, *map(torch.from_numpy, (np.maximum(K, 1e-9), z, labour)))
    require(short <= 1e-9 * econ.c_ss, f"k_min: at {econ.k_min:g} the poorest are {short:.3g} goods short of "
            "interest at the prices of the solution; bring it nearer to 0")


def as_economy(economy) -> Economy:
    """An Economy as it is, Krusell & Smith's for a Calibration, the default for None."""
    if economy is None or isinstance(economy, Calibration):
        return krusell_smith(economy or Calibration())
    require(isinstance(economy, Economy), f"economy: give an Economy or a Calibration, not {type(economy).__name__}")
    return economy


def economy_dict(economy: Economy) -> dict:
    """What was given, as files keep it: arrays of full shape, numbers and words."""
    kept = {f.name: getattr(economy.arrays, f.name, getattr(economy, f.name)) for f in dataclasses.fields(economy)
            if getattr(economy, f.name) is not None}
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in kept.items()}


# ============================================================================================== the machine
# From here on: several processes, CUDA graphs, files, the command line, one run.

# ---------------------------------------------------------------------------------------------- ranks
# Under torchrun each rank has its share of the economies and of the roll-out's households, and its own random stream.
# Decisions rest on sums over all of them, so every rank decides alike. With one process these functions do nothing.

RANKS, RANK = (int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
               for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)))


def join_ranks(device: str, task: str) -> None:
    """Once for every process: NCCL for what is on a GPU, gloo for what is not. task: what all must have in common."""
    if RANKS == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"torchrun: the processes do not find each other: {first_line(error)}") from error
        atexit.register(dist.destroy_process_group)
    tasks = gathered(torch.tensor([list(hashlib.sha256(task.encode()).digest())], dtype=torch.uint8), 0)
    require((tasks == tasks[0]).all(), "torchrun: the processes do not solve the same economy with the same flags; "
            "start them with one command, and draw nothing at random before dk.solve()")


def total(x: Tensor) -> Tensor:
    """The sum over ranks, in place. The processor waits where a signal is heard: inside all_reduce none is. Raises
    UserError where a rank is gone."""
    if RANKS > 1:
        try:
            sums = dist.all_reduce(x, async_op=not x.is_cuda)
            while sums and not sums.is_completed():
                time.sleep(1e-4)
            if sums:
                sums.wait()
        except RuntimeError as error:
            raise UserError(f"a rank was lost after iteration {Interrupted.iteration}; the checkpoint of that "
                            "iteration stays, go on with the same command and --resume") from error
    return x


def gathered(x: Tensor, dim: int) -> Tensor:
    """The ranks' tensors, one after the other along dim, bit for bit: zeros are added to their bytes."""
    if RANKS == 1:
        return x
    parts = x.new_zeros(RANKS, *x.shape)
    parts[RANK] = x
    total(parts.view(torch.uint8))
    return torch.cat(list(parts), dim)


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


# ---------------------------------------------------------------------------------------------- around the loop


class Guard:
    """What surrounds learn(): an iteration as a CUDA graph, one that went wrong taken back and tried again with new
    draws and half the step (three in a row raise UserError), the checkpoint and progress."""

    def __init__(self, state: State, econ: Tables, cfg: Config, rng: torch.Generator, graphs: bool, save: Callable):
        self.state, self.econ, self.cfg, self.rng, self.save = state, econ, cfg, rng, save
        self.graphs, self.graph = graphs and not cfg.published, None

    def run(self, iteration: Callable) -> dict:
        """Figures of an iteration that went well."""
        state, start = self.state, time.perf_counter()
        before = {name: x.clone() for name, x in state.tensors().items()}
        for _ in range(3):
            if self.graphs and state.iteration > 0 and not self.graph:
                self.graph = capture(iteration, list(state.tensors().values()), self.rng)
            figures = (self.graph or iteration)().tolist()  # the one wait for the device
            watched, figures = figures[-len(WATCHED) :], dict(zip(HISTORY[1:], figures))
            trouble = self.trouble(figures)
            if not trouble:
                state.caution = min(1.0, 1.5 * state.caution)
                return figures | {"watched": watched, "seconds": time.perf_counter() - start}
            if RANK == 0:
                print(f"iteration {state.iteration + 1} taken back: {trouble}", flush=True)
            for name, x in state.tensors().items():
                x.copy_(before[name])
            state.policy.copy_(state.policy_before)  # it was the last step that led here
            state.caution /= 2
            set_rates(state, self.cfg)
        raise UserError(f"{trouble}; tried three times; {advice(self.econ, 'lower --policy-rate')}")

    def trouble(self, figures: dict) -> str:
        """The first quantity that says the iteration went wrong, or nothing."""
        K, residual, euler, at_limit = (figures[name] for name in HISTORY[1:5])
        K_ss, earlier = self.econ.K_ss, self.state.history["policy_residual"]
        last = earlier[-1] if earlier and not self.cfg.published else math.inf  # whose labels are too noisy to compare
        if not np.isfinite([K, residual, euler, at_limit]).all():
            return f"mean_K is {K}, policy_residual {residual}, euler {euler}, at_limit {at_limit}"
        if not 0.01 < K / K_ss < 100:
            return f"mean_K is {K:.3g}, far from {K_ss:.3g} of the steady state"
        if at_limit > 0.9:
            return f"at_limit is {at_limit:.2f}: the policy network is saturated, nobody saves"
        if residual > max(2 * last, 0.05):
            return f"policy_residual rose from {last:.3g} to {residual:.3g}"
        return ""

    def after_iteration(self) -> None:
        state, cfg = self.state, self.cfg
        why = self.econ.equilibrium == "planner" and unbounded_saving(state, self.econ, cfg)
        state.unbounded = state.unbounded + 1 if why else 0
        self.save()
        K, euler, moved, seconds = (state.history[name][-1] for name in ("mean_K", "euler", "movement", "seconds"))
        left = state.settled + cfg.averaging - state.iteration
        to_go = f", settled: {left} to go, {left * seconds:.0f} s" if state.settled else ""
        if RANK == 0:
            print(f"iteration {state.iteration} of at most {cfg.iterations}: K {K:.4g}, Euler error {euler:.1e}, "
                  f"savings move {moved:.0e} of K{to_go}", flush=True)
        require(state.unbounded < 10 or state.iteration < 25, why)  # before the 25th no policy is near a solution


def unbounded_saving(state: State, econ: Tables, cfg: Config) -> str:
    """Why a planner's problem has no stationary answer, or nothing. A household with u'(c) (1 - beta R) < beta Delta
    saves more and more; what bounds its wealth is R < 1 alone."""
    k, s, weight, z, p = (gathered(getattr(state, name), 0) for name in Panel._fields)
    K, labour, net = mean_over(k, weight).unsqueeze(1), labour_of(p, z, econ), policy_net(state, econ, cfg)
    M = moments_of(k, s, seen_moments(net.layers, econ, cfg), weight).unsqueeze(1)
    at = At(k, s, K, z, M, by_law(state.Delta_law[z], torch.log(K), labour).to(k.dtype), labour)
    c, R = cash_on_hand(at, econ)[0] - network_capital(net, at, econ), prices(at, econ)[0]
    richest, R = torch.where(k <= state.k_range[1], k, -torch.inf).argmax(), float(R.mean())
    u_prime, beta = marginal_utility(c.flatten()[richest], econ), econ.beta[s.flatten()[richest]]
    gain = float(beta * (at.Delta.mean() + R * u_prime) / u_prime)
    if R > 1 and gain > 1:
        return (f"--equilibrium planner: no stationary answer: at R = {R:.4f} a unit that the richest household saves "
                f"is worth {gain:.3f} of one that it consumes, Delta included, so it saves without bound; "
                "the checkpoint stays, take --equilibrium market or game, or a lower discount factor")
    return ""


def capture(step: Callable[[], Tensor], tensors: List[Tensor], rng: torch.Generator) -> Callable[[], Tensor]:
    """The whole iteration as one CUDA graph: about 10^4 small kernels without a launch from Python each. After one that
    failed the generator and the allocator of this process are of no more use."""
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
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"this torch cannot capture an iteration as a CUDA graph ({first_line(error)}): "
                        "go on with --resume --no-cuda-graphs") from error

    def replay() -> Tensor:
        graph.replay()
        return figures

    return replay


def generator(device: str, seed: int) -> torch.Generator:
    """Of this rank's random numbers."""
    rng = torch.Generator()
    if device == "cuda":
        torch.cuda.init()
        rng = torch.cuda.default_generators[torch.cuda.current_device()]
        with contextlib.suppress(AttributeError):  # compiles inside a capture; and the CPU build has no such fuser
            torch._C._jit_set_texpr_fuser_enabled(False)
    return rng.manual_seed(seed + RANK * 10**10)


# ---------------------------------------------------------------------------------------------- files

FORMAT = 13  # of checkpoint.pt and NN_weights_biases.pth; raise it whenever their keys change
WEIGHTS, PREVIOUS, CHECKPOINT = "NN_weights_biases.pth", "NN_weights_biases.previous.pth", "checkpoint.pt"
PUBLISHING, LOCK = ".deepham-publishing", ".deepham-lock.sqlite"  # all that is temporary is called .deepham-*


@contextlib.contextmanager
def held(output_dir: Path):
    """The directory for this run alone. The lock is one of SQLite, which goes with its process on every system. Results
    that a killed run was publishing are published; at the end all that is temporary goes, of a killed run, too."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(output_dir / LOCK, timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        require("is locked" not in str(error), f"--output-dir {output_dir}: another run is at work there; wait for it, "
                "or name another directory")
        raise
    try:
        publish(output_dir)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps what is open
            for left in output_dir.glob(".deepham-*"):
                if left.name != LOCK and not (output_dir / PUBLISHING).exists():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        with contextlib.suppress(OSError):
            (output_dir / LOCK).unlink()
        lock.close()


def move(source: Path, target: Path) -> None:
    """In one step; on Windows, where who reads a file holds it, a virus scanner, say, tried for a second."""
    for wait in (0.1, 0.3, 0.6) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    return os.replace(source, target)


def publish(output_dir: Path) -> None:
    """Move the files of PUBLISHING in, if it is there, earlier ones aside; where a move fails, all go back. File by
    file, so that what else a user keeps in figures/ or irf/ stays."""
    new, old = output_dir / PUBLISHING, output_dir / ".deepham-earlier"
    names = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    moves = [pair for name in names for pair in ((output_dir / name, old / name), (new / name, output_dir / name))]
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                move(source, target)
    except BaseException:
        for source, target in reversed(moves):  # which were made is read off the disk
            if target.exists() and not source.exists():
                move(target, source)
        raise
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def sealed(data) -> bytes:
    """A zip file ends with the length of its comment and the comment; in ours that is the rest's checksum. torch.load
    checks none: from a damaged directory entry it returned uninitialised memory."""
    return data + (32).to_bytes(2, "little") + hashlib.sha256(data).digest()


def save_checkpoint(path: Path, content: dict) -> None:
    """path holds its old bytes or the new ones, never a part."""
    buffer, partial = io.BytesIO(), path.with_name(f".deepham-{path.name}")
    torch.save({"format": FORMAT} | content, buffer)  # on a full disk torch.save(path) names no cause
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            file.write(sealed(buffer.getvalue()[:-2]))
            file.flush()
            os.fsync(file.fileno())
        move(partial, path)
        Interrupted.iteration = content.get("iteration", Interrupted.iteration)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    if Interrupted.pending:
        raise Interrupted(Interrupted.pending)


def load_checkpoint(path: Path, like: dict, asked: str) -> dict:
    """What save_checkpoint wrote, if what is in like is in it, or a refusal. asked: the flag or function that asks."""
    at, content = f"{asked}: {path}", None
    try:
        data = path.read_bytes()
        if data == sealed(data[:-34]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{at}: {error.strerror}; give the file that a run wrote, in its --output-dir") from error
    except Exception:  # sealed by someone, but of another make: code in it, say
        pass
    require(isinstance(content, dict) and "format" in content, f"{at} is damaged or no file of this script; move it "
            f"away and run without {asked}")
    age = "a newer" if content["format"] > FORMAT else "an older"
    require(content["format"] == FORMAT, f"{at} has format {content['format']}, of {age} deepham_ks.py; use that one "
            f"(this one reads {FORMAT}), or move the file away and run without {asked}")
    differs = difference(content, like)
    require(not differs, f"{at} is of another run: {differs}; give the flags of the run that wrote it, or another "
            "--output-dir")
    return content


def difference(found, like, name: str = "") -> str:
    """In words, the first place where found has not what is in like, or an economy has more, or nothing."""
    if isinstance(like, dict) and isinstance(found, dict):
        keys = [*like, *(found if name == "economy" and like else ())]
        return next(filter(None, (difference(found.get(key), like.get(key), f"{name}.{key}".lstrip("."))
                                  for key in keys)), "")
    if np.array_equal(found, like):
        return ""
    there, here = (type(x).__name__ if isinstance(x, (dict, Tensor)) else repr(x) for x in (found, like))
    return f"{name} is {there} in the file and {here} in this run" if there != here else (
        f"{name} has other numbers in the file than in this run")


def write_results(folder: Path, network: Solution, figures: dict, arrays: dict) -> None:
    """The numbers of the output directory but metrics.json, into folder."""
    save_checkpoint(folder / WEIGHTS, network.weights)
    small, cfg, history = figures["network"]["small"], network.config, network.weights["history"]
    header = (f"ergodic distribution of individual capital k (goods), policy network, N = {cfg.eval_agents}, "
              f"{cfg.eval_economies} economies, {small['periods']} periods, every {POOLED_EVERY}th pooled, "
              f"seed {network.weights['seed']}")
    for kind in ("bellman_own_c", "bellman_best_c"):
        sizes = " ".join(f"{name} {size:.6f}" for name, size in small[kind].items())
        header += f"\n{kind} (utils), N = {cfg.eval_agents}: {sizes}"
    k = np.sort(arrays["small"]["network"]["k"])
    np.savetxt(folder / "results.txt", k[:: max(1, len(k) // 100_000)], fmt="%.4f", header=header)
    np.savetxt(folder / "training.csv", np.array(list(history.values())).T, delimiter=",", fmt="%.6g",
               header=",".join(history), comments="")
    found = {name: figures[name]["limit"]["statistics"] for name in ("network", "grid") if name in figures}
    lines = [",".join([name, *(f"{x[name]:.8g}" for x in found.values())]) for name in found["network"]]
    (folder / "statistics.csv").write_text("\n".join([",".join(["statistic", *found]), *lines]) + "\n")
    (folder / "irf").mkdir()
    for series, pair in arrays["irf"]["network"].items():
        for kind, paths in zip(("benchmark", "shocked"), pair):
            np.savetxt(folder / "irf" / f"agg_{series}_{kind}.csv", paths, delimiter=",",
                       fmt="%d" if series == "shocks" else "%.6f",
                       header=f"{series} of the {kind} economy: a row a path, a column a period")


# ---------------------------------------------------------------------------------------------- from Python


def choose_device(device: str) -> str:
    require(device != "cuda" or torch.cuda.is_available(),
            "--device cuda: torch finds no CUDA device here; use --device cpu or --device auto")
    if device == "auto" and not torch.cuda.is_available():
        driver, hidden = Path("/proc/driver/nvidia/version"), os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        require(hidden or not (torch.version.cuda and driver.exists()), "the NVIDIA driver here is too old for torch "
                f"{torch.__version__}: install torch from the cu126 wheels, or give --device cpu")
        print("no CUDA device found: running on the CPU (in Colab: Runtime > Change runtime type > T4 GPU)")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def solve(economy=None, config: Config | str = "default", *, seed: int = 0, device: str = "auto",
          compile: str = "torchscript", cuda_graphs: bool = True, output_dir=None, resume: bool = False) -> Solution:
    """Train and return the Solution. economy: an Economy, a Calibration, or None for the default; config: a Config or
    the name of a preset. With output_dir a checkpoint is saved there after every outer iteration, and resume goes on
    from it; without, nothing touches the disk. Raises UserError where an argument is of no use, the training fails or
    the checkpoint is of another run, OSError where it cannot be written."""
    config = PRESETS.get(config, config) if isinstance(config, str) else config
    require(isinstance(config, Config), f"config: {config!r}: give a Config or a preset's name: {', '.join(PRESETS)}")
    check_options(Run(seed=seed, device=device, compile=compile))
    require(output_dir is None or isinstance(output_dir, (str, Path)), "output_dir: give the path of a folder")
    require(output_dir or not resume, "resume: give the output_dir whose checkpoint is to go on")
    check_options(config)
    economy, device = as_economy(economy), choose_device(device)
    config, seed = sized(config, economy), int(seed)
    # a run may be resumed to more iterations, and judged at other sizes
    fixed = {name: x for name, x in dataclasses.asdict(config).items() if not name.startswith(("iterations", *JUDGING))}
    of_run = {"economy": economy_dict(economy), "config": fixed | {"seed": seed}}
    torch.set_float32_matmul_precision("highest")  # no TF32: it would show in the accuracy figures
    join_ranks(device, json.dumps([of_run, vars(config)], default=lambda table: table.tolist()))
    compile_kernels(compile)
    cfg, econ, rng = own_share(config), economy.tables(device, torch.float32), generator(device, seed)
    if RANKS > 1 and RANK == 0:
        print(f"{RANKS} processes share the simulation and the roll-outs: {cfg.n_economies} of {config.n_economies} "
              f"economies and {cfg.batch} of {config.batch} households each; the first alone judges and writes")
    state, path = initial_state(econ, economy, cfg, seed, rng), output_dir and Path(output_dir) / CHECKPOINT
    if resume:
        resumed(state, load_checkpoint(path, of_run, "--resume"), rng, seed)
    Interrupted.iteration = state.iteration

    def save():
        """The state of all ranks, on the CPU, and their random numbers."""
        if path:
            tensors = {name: gathered(x, 0) if name in Panel._fields else x for name, x in state.tensors().items()}
            content = of_run | vars(state) | {name: x.cpu() for name, x in tensors.items()}
            content["rng"] = gathered(rng.get_state(), 0)
        if path and RANK == 0:
            if state.iteration == 1 and path.exists():
                move(path, path.with_name("checkpoint.previous.pt"))
            save_checkpoint(path, content)

    guard, start = Guard(state, econ, cfg, rng, cuda_graphs and device == "cuda", save), time.perf_counter()
    earlier = sum(state.history["seconds"])
    learn(state, econ, cfg, rng, guard)
    weights = weights_file(state, economy, config, seed) | {"seconds": earlier + time.perf_counter() - start}
    return Solution(weights, device)


JUDGING = ("eval_", "irf_")  # how fields of Config begin that say how a solution is judged, not how it is found


def resumed(state: State, saved: dict, rng: torch.Generator, seed: int) -> None:
    """The state goes on from a checkpoint, with its random numbers where ranks and device are the same."""
    size = len(rng.get_state())
    if len(saved["rng"]) == RANKS * size:  # of another size on another kind of device
        rng.set_state(saved["rng"][RANK * size : (RANK + 1) * size].clone())
    else:
        print("the checkpoint is of another number of ranks or another kind of device: economies are shared anew and "
              "random numbers start anew, so not bit for bit")
        rng.manual_seed(seed + RANK * 10**10 + saved["iteration"])
    tensors = state.tensors()
    for name, x in tensors.items():
        x.copy_(saved[name].chunk(RANKS)[RANK] if name in Panel._fields else saved[name])
    vars(state).update((name, saved[name]) for name in vars(state).keys() - tensors.keys())


def load(path=WEIGHTS, device="cpu", compile="none", settings: "Settings | None" = None) -> Solution:
    """The solution in a weights file, with next_capital(k, s, K, z) and value(k, s, K, z) on numpy arrays. Raises
    UserError when the file is missing or damaged or, where settings are given, of another economy or width."""
    like = dict.fromkeys(("policy", "value", "economy", "config"), {})  # layers; a checkpoint has all in one
    if settings:
        like["config"] = {name: getattr(settings.config, name) for name in ("hidden", "moments", "learnt_moments")}
        like["economy"] = economy_dict(settings.economy)
    compile_kernels(compile)
    require(isinstance(path, (str, Path)), f"load: give the path of a weights file, not {type(path).__name__}")
    return Solution(load_checkpoint(Path(path), like, "--evaluate" if settings else "load"), choose_device(device))


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


def parse(argv, economy=krusell_smith, calibration=Calibration) -> Settings:
    """economy: an Economy without flags, or a function that makes one of a calibration, a dataclass whose fields, made
    by option(), become flags. Raises UserError."""
    fixed = isinstance(economy, Economy)
    parser = Parser("deepham_ks", "%(prog)s [--flag value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    epilog="exit status: 0 converged and every row of the verdict passes; 1 not converged, no grid "
                    "solution though asked for, or a row FAILs: the last line says which; 2 a user's error, in one "
                    "line; 130 / 143 interrupted")
    parser.add_argument("--version", action="version", version=f"deepham_ks {__version__}")
    for kind in (Run, Config, GridConfig) if fixed else (Run, calibration, Config, GridConfig):
        section = parser.add_argument_group(kind.__name__, kind.__doc__)
        prefix, presets = "grid_" if kind is GridConfig else "", PRESETS.items() if kind is Config else ()
        for item in filter(lambda item: item.metadata, dataclasses.fields(kind)):
            others = [(name, getattr(preset, item.name)) for name, preset in presets]
            shown = [f"default {item.default!r}", *(f"{name} {x!r}" for name, x in others if x != item.default)]
            how = {"action": argparse.BooleanOptionalAction} if isinstance(item.default, bool) else {
                "type": type(item.default), "choices": item.metadata["choices"]}
            told = f"{item.metadata['help']} ({', '.join(shown)})".replace("%", "%%")
            section.add_argument(flag(prefix + item.name), help=told, **how)
    given = vars(parser.parse_args(argv))
    changed = [given["preset"]] if given.get("preset", "default") != "default" else []  # names the folder
    name_no_folder = ("preset", "device", "compile", "cuda_graphs", "output_dir", "evaluate", "resume")

    def filled(base):
        """base with the flags given."""
        prefix = "grid_" if isinstance(base, GridConfig) else ""
        flags = [item.name for item in dataclasses.fields(base) if item.metadata]
        asked = {name: given[prefix + name] for name in flags if prefix + name in given}
        changed.extend(f"{flag(prefix + name)[2:]}-{value}" for name, value in asked.items()
                       if value != getattr(base, name) and name not in name_no_folder)
        base = dataclasses.replace(base, **asked)
        check_options(base, lambda name: flag(prefix + name))
        return base

    run, cal = filled(Run()), None if fixed else filled(calibration())
    cfg, small = filled(PRESETS[run.preset]), run.preset == "smoke" and run.grid == "converged"
    grid = filled(SMOKE_GRID if small else GRIDS.get(run.grid, GridConfig()))

    # no flag may be without effect here and now
    idle = {"settle", "averaging"} if cfg.published else {"policy_steps", "value_steps"}
    if run.grid == "none":
        idle |= {name for name in given if name.startswith("grid_")}
    require(run.output_dir.isprintable(), f"--output-dir {run.output_dir!r}: leave control characters out of the name")
    require(not (run.evaluate and (run.resume or RANKS > 1)),
            "--evaluate trains nothing: run it with python, without torchrun and without --resume")
    if RANKS > 1:
        gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        require(run.device == "cpu" or gpus == 0 or here <= gpus, f"--nproc-per-node {here} on a machine with {gpus} "
                f"GPUs: give --nproc-per-node {gpus}, or --device cpu")

    made = economy if fixed else economy(cal)
    if decided := {name: getattr(run, name) for name in ("equilibrium", "players", "start") if getattr(run, name)}:
        made = dataclasses.replace(made, **decided)
    idle |= {name for name, who in (("players", "game"), ("start", "planner")) if made.equilibrium != who}
    idle = ", ".join(map(flag, sorted(idle & set(given))))
    require(not idle, f"{idle}: without effect here; leave it out")
    n_moments(made.tables(), own_share(sized(cfg, made)))

    # the checkout for the default economy with the default flags; nothing else may overwrite the reference run
    parts = changed if economy is krusell_smith else [Path(Interrupted.script).stem, *changed]
    name = "_".join(parts).replace("/", "-")
    if len(name) >= 100:
        name = f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    run = dataclasses.replace(run, output_dir=run.output_dir or (f"runs/{name}" if parts else "."))
    return Settings(made, {} if fixed else dataclasses.asdict(cal), cfg, None if run.grid == "none" else grid, run)


def check_options(x, name_of: Callable = lambda name: name) -> None:
    """Every option of a dataclass: its type, interval and choices."""
    for item in filter(lambda item: item.metadata, dataclasses.fields(x)):
        value, within, name = getattr(x, item.name), item.metadata["within"], name_of(item.name)
        kind, choices = type(item.default), item.metadata["choices"]
        fits = isinstance(value, (int, float, np.number)) if kind is float else isinstance(value, (kind, np.integer))
        require(fits and isinstance(value, bool) == (kind is bool),
                f"{name} {value!r}: give {'a number' if kind is float else f'one of type {kind.__name__}'}")
        require(not choices or value in choices, f"{name} {value!r}: give one of {', '.join(choices or ())}")
        require(kind in (bool, str) or inside(value, within), f"{name} {value}: give a value in {within}")


# ---------------------------------------------------------------------------------------------- how a run ends


class Interrupted(BaseException):
    """SIGINT or SIGTERM. `except Exception` must not swallow it."""

    iteration = 0  # what the checkpoint holds
    script, argv = "deepham_ks.py", ()  # what to run to go on
    pending = 0  # the signal, if one came: Python drops what is raised inside a destructor or a callback


def is_out_of_memory(error: BaseException) -> bool:
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "NOT_INITIALIZED",
             "Storage size calculation overflowed", "array is too big")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def signals_heard():
    """SIGINT and SIGTERM raise Interrupted; off the main thread, where Python has no handlers, they are left alone."""
    def interrupt(signum, frame):
        Interrupted.pending = signum
        raise Interrupted(signum)

    on_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM) if on_main}
    Interrupted.iteration = Interrupted.pending = 0
    try:
        yield
    finally:
        Interrupted.pending = 0
        for signum, handler in before.items():  # torchrun ends the others once one is lost: the first has yet to say it
            handler = handler or signal.SIG_DFL  # none: it was not Python's
            signal.signal(signum, handler if RANKS == 1 or RANK > 0 else signal.SIG_IGN)


def again(first: str, *more: str) -> str:
    """The command of this run with other flags."""
    python = ["python"] if RANKS == 1 else ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    same = [a for a in Interrupted.argv if a not in ("--resume", "--evaluate")]
    command = [*python, Interrupted.script, first, *same, *more]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


# ---------------------------------------------------------------------------------------------- one run


def work(settings: Settings) -> int:
    """Train or read, judge, write and print; the exit status."""
    economy, _, cfg, _, run = settings
    folder, device, seconds, found = Path(run.output_dir), choose_device(run.device), {}, []

    def find_grid():
        """The grid solution, or why there is none: that costs the comparison and not the run."""
        start = time.perf_counter()
        try:
            found.append((settings.grid and solve_grid(economy, settings.grid, progress=True), ""))
            seconds["grid"] = time.perf_counter() - start
        except UserError as error:
            found.append((None, str(error)))

    with held(folder) if RANK == 0 else contextlib.nullcontext():
        beside = threading.Thread(target=find_grid, daemon=True)
        if device == "cuda" and RANK == 0:
            beside.start()  # on a GPU the processor has nothing to do until the networks are judged
        if run.evaluate:
            network = load(folder / WEIGHTS, device, run.compile, settings)
            judging = {name: x for name, x in dataclasses.asdict(cfg).items() if name.startswith(JUDGING)}
            network.config = dataclasses.replace(network.config, **judging)
        else:
            network = solve(economy, cfg, seed=run.seed, device=device, compile=run.compile, resume=run.resume,
                            cuda_graphs=run.cuda_graphs, output_dir=folder)
            if RANK > 0:
                return 0
            if (folder / WEIGHTS).exists() and not (folder / PREVIOUS).exists():  # of the results that are still there
                move(folder / WEIGHTS, folder / PREVIOUS)
            network.save(folder / WEIGHTS)
        while beside.is_alive():
            beside.join(0.2)  # on Windows no signal is heard inside a wait
        if not found:
            find_grid()
        (grid, why), start = found[0], time.perf_counter()
        solutions = {"network": network} | ({"grid": grid.to(network.device)} if grid else {})
        with torch.no_grad():
            figures, arrays = compare(solutions, network.config)
        seconds |= {"accuracy": time.perf_counter() - start, "training": network.weights["seconds"]}
        rows, weights = verdict(figures, economy, network.config), network.weights
        moves = {name: figures[name]["limit"]["moves"] for name in solutions}
        moving = still_moving(weights["history"], weights["settled"], network.config) or next(
            (f"the {name}'s distribution of capital moves by {100 * x:.2g}% over what is judged"
             for name, x in moves.items() if x >= MOVES), "")
        staging = Path(tempfile.mkdtemp(prefix=".deepham-", dir=folder))
        write_results(staging, network, figures, arrays)
        draw_pictures(staging, solutions, figures, arrays)
        metrics = figures | run_metrics(settings, network, seconds, moving) | {"verdict": rows}
        text = json.dumps(metrics, default=lambda array: array.tolist())
        finite = json.loads(text, parse_constant=lambda infinite: None)
        (staging / "metrics.json").write_text(json.dumps(finite, indent=1) + "\n")
        move(staging, folder / PUBLISHING)  # from here on even kill -9 loses no result
        publish(folder)
        (folder / PREVIOUS).unlink(missing_ok=True)
    for note in grid.notes if grid else ():
        print(note)
    told = ", ".join(f"{name} {100 * x:.2g}%" for name, x in moves.items())
    print(f"mean and std of capital still move over what is judged by: {told}")
    print_statistics(figures)
    if run.preset != "smoke":
        print_verdict(rows)
    for size, what, name in (("small", "panel", "eval_agents"), ("irf", "response", "irf_agents")):
        if (outside := figures["comparison"]["outside_K"][size]) >= OUTSIDE:
            print(f"{what}, N={getattr(cfg, name)}: in {100 * outside:.2g}% of the periods K of so few households lies "
                  f"where no solution is known, and nothing of it is judged; {flag(name)} takes more")
    spent = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("training", "grid", "accuracy") if name in seconds)
    print(f"\n{spent}; results in {folder.resolve()}: open distribution_validation.png first")
    last_line, status = outcome(settings, network, rows, why, moving)
    print(last_line)
    return status


def run_metrics(settings: Settings, network: Solution, seconds: dict, moving: str) -> dict:
    """What was solved, how and on what: the rest of metrics.json."""
    import matplotlib

    weights, history, config, a = network.weights, network.weights["history"], network.config, network.economy.arrays
    return {
        "calibration": settings.calibration, "config": dataclasses.asdict(config), "seed": weights["seed"],
        "economy": weights["economy"] | {"L": a.L, "shares": a.shares},
        "grid_config": settings.grid and dataclasses.asdict(settings.grid),
        "convergence": {"converged": None if config.published else not moving, "still_moving": moving,
                        "settled": weights["settled"], "iterations": len(history["seconds"]),
                        "movement": history["movement"], "euler": history["euler"]},
        "device": torch.cuda.get_device_name() if network.device.type == "cuda" else (
            f"CPU, {torch.get_num_threads()} threads"),
        "version": __version__, "seconds": seconds, "versions": {"python": platform.python_version()} | {
            module.__name__: module.__version__ for module in (torch, np, scipy, matplotlib)}}


def outcome(settings: Settings, network: Solution, rows: list, why: str, moving: str) -> Tuple[str, int]:
    """The last line of a run and its exit status."""
    judged = [row for row in rows if row["passed"] is not None]
    failed = [row["figure"] for row in judged if not row["passed"]]
    folder = "--output-dir", settings.run.output_dir
    if why:
        return f"no comparison: {why}; then: {again('--evaluate', *folder)}", 1
    if settings.run.preset == "smoke":
        return "sizes this small have no verdict: the installation works; the default preset solves the economy", 0
    if moving:
        twice = str(2 * len(network.weights["history"]["seconds"]))
        return f"not converged: {moving}; go on with: {again('--resume', *folder, '--iterations', twice)}", 1
    if failed:
        return f"{len(failed)} of {len(judged)} rows FAIL: {'; '.join(failed)}", 1
    if network.config.published:
        return "whether adam has converged is not known: look at figures/training_history.png", 0
    passes = "every row passes" if judged else "no grid solution judged it"
    return f"converged: savings had settled after {network.weights['settled']} outer iterations; {passes}", 0


def main(argv: List[str] | None = None, economy=krusell_smith, calibration=Calibration) -> int:
    """The command line of any economy; parse() says what it is. Returns 0 converged and every row passes, 1 not
    converged or a row fails, 2 a user's error, 130 / 143 interrupted."""
    Interrupted.script = "deepham_ks.py" if economy is krusell_smith else sys.argv[0]
    in_notebook = "kernel" in Path(sys.argv[0]).name  # whose own arguments are not ours
    argv = Interrupted.argv = ([] if in_notebook else sys.argv[1:]) if argv is None else list(argv)
    status = 2
    with contextlib.redirect_stdout(io.StringIO()) if RANK else contextlib.nullcontext(), signals_heard():
        try:
            return work(parse(argv, economy, calibration))
        except UserError as error:
            line = f"error: {error}"
        except Interrupted as stop:
            line, status = f"stopped by {signal.Signals(stop.args[0]).name}", 128 + stop.args[0]
            if "--evaluate" in argv:
                line += "; results are as they were"
            elif stop.iteration or "--resume" in argv:
                line += f" after iteration {stop.iteration}; continue with: {again('--resume')}"
            else:
                line += " after iteration 0; nothing was saved yet"
        except (OSError, sqlite3.Error) as error:  # of the folder, or standard output is a closed pipe
            cure = "" if isinstance(error, BrokenPipeError) else (
                "; see to space and permissions, or name another --output-dir")
            line = f"error: {error}; earlier files are whole{cure}"
        except (MemoryError, RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                raise
            line = ("error: out of memory; lower --n-agents, --n-economies, --batch or --horizon, after the training "
                    "--eval-agents, --eval-economies, --irf-agents or --irf-paths")
    if RANK > 0 and status == 2:
        time.sleep(10)  # what the first rank has to say ends this one; alone with a trouble it speaks
    if RANK == 0 or status == 2:
        print(f"deepham_ks: {f'rank {RANK}: ' * (RANK > 0)}{line}", file=sys.stderr, flush=True)
    if RANKS > 1 and status > 128:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # the end of Python would wait for what other ranks still owe
    return status


if __name__ == "__main__":
    sys.exit(main())
