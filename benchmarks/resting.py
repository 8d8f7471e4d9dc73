"""Where does the economy rest while z stays what it is? Households who know K alone expect the K' of economies that
have just come there, so the grid solution in K and a network in K rest at the same wrong place. Beside them a network
with one learnt moment, and one that has practised: eight of its economies keep their z in training. Each is held to the
exact policy at rest: what households do who know that K stays, given only how they save when z has switched, taken from
the solution itself. Writes benchmarks/resting.json and benchmarks/resting.md.

  python benchmarks/resting.py        # about 8 minutes on two cores
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

ECONOMY, MOMENT = dk.krusell_smith(), dataclasses.replace(dk.Config(), n_agents=50, learnt_moments=1)
AT = (500, 1499, 6000)  # periods of which K is shown; the second is where a run reports K*
STAY = 4  # economies for each z whose z stays, of those who practise


@contextlib.contextmanager
def practising():
    """In training the first economies keep their z. Labels are not led astray: surprises are taken out of them."""
    draw_z = dk.draw_z

    def kept(u, z, econ):
        z_next = draw_z(u, z, econ)
        if z.shape == (MOMENT.n_economies, 1):
            for stays in range(len(econ.TFP)):
                z_next[stays * STAY : (stays + 1) * STAY] = stays
        return z_next

    dk.draw_z = kept
    try:
        yield
    finally:
        dk.draw_z = draw_z


def on_nodes(function, k, K: float, z: int) -> np.ndarray:
    """A function of (k, s, K, z) at nodes k (n,): (S, n)."""
    states = np.broadcast_arrays(k, np.arange(len(ECONOMY.beta))[:, None], np.float64(K), z)
    return function(*[torch.tensor(x) for x in states]).numpy()


def exact_policy(K: float, z: int, switched, k: np.ndarray, econ: dk.Tables) -> np.ndarray:
    """k' (S, n) while K and z stay, where households expect to save switched(k', s', K, z') once z has become z': by
    endogenous gridpoints."""
    m, R, c, (Z, S) = [], [], [], ECONOMY.income.shape
    for z_next in range(len(econ.TFP)):
        found = [on_nodes(lambda *at, i=i: dk.cash_on_hand(*at, econ)[i] + 0 * at[0], k, K, z_next) for i in (0, 1)]
        m, R = [*m, found[0]], [*R, float(found[1].mean())]
        c.append(0.05 * m[-1] if z_next == z else m[-1] - on_nodes(switched, k, K, z_next))
    for _ in range(5000):
        worth = np.array(R)[:, None, None] * dk.marginal_utility(np.array(c), econ)
        worth = dk.expected_on_grid(np.broadcast_to(worth[:, :, None], (Z, Z, S, 1, len(k))), ECONOMY)[z, :, 0]
        k_endo = (dk.inverse_marginal_utility(worth, econ) + k - (m[z] - R[z] * k)) / R[z]
        k_next = np.array([np.interp(k, of_s, k) for of_s in k_endo])
        last, c[z] = c[z], m[z] - k_next
        if np.abs(c[z] - last).max() < 1e-11:
            return k_next
    raise RuntimeError("the policy at rest did not converge")


def follow(table, k, K, mass, z: int):
    """K at AT, and the mass and k' of the period in which a run reports K*."""
    kept = {}
    path, _ = dk.simulate_histogram(table, k, K, mass, np.full(AT[-1] + 1, z), ECONOMY,
                                    lambda t, mass, k_next: kept.update({t: (mass, k_next)} if t == AT[1] else {}))
    return path, kept[AT[1]]


def rest(solution, grid: dk.GridSolution) -> list:
    """For each z: K of the solution, Euler error at K*, and K of the exact policy given the solution's switches."""
    econ, nodes = solution.econ, dk.power_grid(1500, grid.econ.k_min, grid.k_max, grid.exponent)
    k, K = dk.power_grid(2000, econ.k_min, grid.k_max, grid.exponent), np.linspace(grid.K_low, grid.K_high, 41)
    table = solution.of_mass(k)
    if table is None:
        table = np.array([[[solution.next_capital(k, s, x, z) for x in K] for s in (0, 1)] for z in (0, 1)])
    z_path = dk.draw_z_path(1500, ECONOMY, np.random.default_rng(1))
    _, mass = dk.simulate_histogram(table, k, K, dk.dispersed_mass(k, grid.K_mean, z_path[0], ECONOMY), z_path, ECONOMY)
    found = []
    for z, name in enumerate(ECONOMY.z_names):
        path, (mass_there, k_next) = follow(table, k, K, mass, z)
        there, z_path = [(AT[1], mass_there, k_next)], np.full(len(path), z)
        states = dk.histogram_states(there, k, path, z_path, econ, 5000, solution)
        M_next = None if states.M_next is None else states.M_next[0]  # (Z, V, n), what is expected once z has switched

        def switched(k, s, K, z, M_next=M_next):
            return solution.policy(k, s, K, z, *([] if M_next is None else [M_next[z]]))

        near = path[AT[1]] + np.linspace(-0.5, 0.5, 11)  # the exact policy is linear in K between these
        exact = np.zeros((2, 2, len(near), len(k)))
        exact[z] = np.stack([[np.interp(k, nodes, of_s) for of_s in exact_policy(x, z, switched, nodes, grid.econ)]
                             for x in near], 1)
        exact_path, _ = follow(exact, k, near, mass, z)
        found.append({"z": name, "K": path[list(AT)], "exact_K": exact_path[list(AT)],
                      "euler_log10": dk.euler_sizes(solution, states, econ)["mean"]})
    return found


def main():
    grid = dk.solve_grid(ECONOMY)
    with torch.no_grad():
        found = {"grid in K": rest(grid, grid), "network in K": rest(dk.load(HERE.parent / dk.WEIGHTS), grid)}
    for seed in (0, 1):
        solution = dk.solve(ECONOMY, MOMENT, seed=seed)
        with torch.no_grad():
            found[f"one learnt moment, seed {seed}"] = rest(solution, grid)
        with practising():
            solution = dk.solve(ECONOMY, MOMENT, seed=seed)
        with torch.no_grad():
            found[f"the same, has practised, seed {seed}"] = rest(solution, grid)
    (HERE / "resting.json").write_text(json.dumps(dk.plain(found), indent=1) + "\n")
    lines = ["# Where the economy rests while z stays", "",
             f"`python benchmarks/resting.py`, version {dk.__version__}. K after {AT[0]:,} / {AT[1] + 1:,} / {AT[2]:,} "
             "periods in which z stays; exact: the policy of households who know that K stays, given what the solution "
             "does once z has switched.",
             "", "| solution | z | K | exact K | Euler log10 mean at K* |", "|---|---|---|---|---|"]
    for name, of_z in found.items():
        for x in of_z:
            K, exact = [" / ".join(f"{K:.3f}" for K in x[which]) for which in ("K", "exact_K")]
            lines.append(f"| {name} | {x['z']} | {K} | {exact} | {x['euler_log10']:.2f} |")
    (HERE / "resting.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
