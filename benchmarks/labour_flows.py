"""Where mean capital is not enough: examples/labour_flows.py solved with beliefs of three kinds, each judged in the
limit of infinitely many households. K alone: households see K and z, and ln K' is a law in ln K. (K, L): the default.
Learnt: one moment more, that the network has found. Keeps figures in benchmarks/labour_flows.json and draws
docs/labour_flows.png.

  python benchmarks/labour_flows.py        # about 25 minutes on two cores
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import labour_flows  # noqa: E402

import deepham_ks as dk  # noqa: E402

FOUND = ROOT / "benchmarks" / "labour_flows.json"
SEEDS, YEARS = (0, 1, 2), 10
BAD = 4 * YEARS  # quarters in the bad state
REGRESS = dk.regress_by_z
KINDS = {"K alone": {}, "(K, L)": {}, "learnt": {"learnt_moments": 1}}


def solved(kind: str, seed: int) -> tuple:
    """A network and its figures. K alone: L is no regressor of the law, and as an input of the network it does not
    move."""
    economy = labour_flows.economy(labour_flows.Calibration())
    if kind == "K alone":
        dk.regress_by_z = lambda y, K, labour, z, still: REGRESS(y, K, 0 * labour, z, still)
        economy.arrays.L_std = np.array(np.inf)
    solution = dk.solve(economy, dataclasses.replace(dk.Config(), **KINDS[kind]), seed=seed)
    figures = settled(solution)
    dk.regress_by_z = REGRESS
    return solution, figures


def settled(solution: dk.Policy) -> dict:
    """Figures in the limit, and the path of K (BAD + 40,): ten bad years after a good spell, then good ones."""
    figures, _ = dk.judge_limit(solution, solution.config)
    held, economy = solution.histogram, solution.economy
    z = np.repeat([1, 0, 1], [60, BAD, 40])
    K, _ = dk.simulate_histogram(held.table, held.axes, held.mean_mass, z, economy)
    return {"euler": figures["euler_log10"], "std": figures["capital"]["std"], "gini": figures["capital"]["gini"],
            "mean": figures["capital"]["mean"], "r2": figures["law_of_motion"]["r2"], "path": K[59:]}


def what_is_learnt(solution: dk.Solution) -> dict:
    """R2 of the learnt moment on K and L, by z, over the judged path, and with one more regressor: what it says beyond
    them, by the share of what K and L leave that each candidate explains."""
    held = solution.histogram
    k, rows = held.axes.k, []
    for mass, _, z in held.pooled:
        at = [torch.from_numpy(np.tile(k, (len(mass), 1)).reshape(1, -1)),
              torch.arange(len(mass)).repeat_interleave(len(k))[None],
              torch.from_numpy((mass / mass.sum() * mass.size).reshape(1, -1))]
        M = float(dk.moments_of(*at[:2], solution.seen, at[2])[0, -1])
        people, K = mass.sum(0), mass.sum(0) @ k
        rows.append([z, M, K, mass[1].sum(), mass[0] @ k / mass[0].sum(), people @ np.log(k + 1), people @ np.sqrt(k),
                     (people @ (k - K) ** 2) ** 0.5, people[k < 0.25 * K].sum()])
    names = ["capital of the unemployed", "mean of ln(1 + k)", "mean of root k", "std of k",
             "share of households below a quarter of K"]
    z, M, K, L, *others = np.array(rows).T

    def left(y):
        out = np.empty_like(y)
        for i in np.unique(z):
            x = np.stack([np.ones_like(K), K, L, L**2, K**2, K * L], 1)[z == i]
            out[z == i] = y[z == i] - x @ np.linalg.lstsq(x, y[z == i], rcond=None)[0]
        return out

    of_M = left(M)
    return {"r2_on_K_and_L": 1 - of_M.var() / M.var(),
            "explains": {name: np.corrcoef(of_M, left(x))[0, 1] ** 2 for name, x in zip(names, others)}}


def draw(found: dict, path: Path) -> None:
    with dk.picture(path, 2, [2.6], "From a good spell: ten bad years, then good ones") as [[ax, gap]]:
        t = np.arange(len(found["grid"]["path"])) / 4
        for name, style in (("grid", {"color": "k", "linestyle": "--"}), ("K alone", {"color": "#D55E00"}),
                            ("(K, L)", {"color": "#0072B2"}), ("learnt", {"color": "#009E73"})):
            path = np.array((found[name][0] if name != "grid" else found[name])["path"])
            ax.plot(t, path, label=name, **style)
            gap.plot(t, 100 * (path / np.array(found["learnt"][0]["path"]) - 1), **style)
        ax.set(xlabel="years", ylabel="mean capital K (goods)")
        gap.set(xlabel="years", ylabel="K over that of the learnt moment - 1 (%)")


def main() -> None:
    found = {}
    for kind in KINDS:
        found[kind] = []
        for seed in SEEDS[:1] if kind == "K alone" else SEEDS:
            solution, figures = solved(kind, seed)
            found[kind].append({"seed": seed, **figures, "seconds": sum(solution.weights["history"]["seconds"])})
            if kind == "learnt":
                found[kind][-1]["says"] = what_is_learnt(solution)
            print(kind, seed, found[kind][-1]["euler"], found[kind][-1].get("says", ""), flush=True)
    found["grid"] = settled(dk.solve_grid(solution.economy))
    FOUND.write_text(json.dumps(found, indent=1, default=lambda x: x.tolist()) + "\n")
    draw(found, ROOT / "docs" / "labour_flows.png")


if __name__ == "__main__":
    main()
