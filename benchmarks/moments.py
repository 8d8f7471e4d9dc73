"""One learnt moment beside K, three seeds, and the unemployment share given in its place: each run's metrics.json, with
N = 50, 5,000 and the limit in it, and the figures at N = 500 beside them, into benchmarks/moments/. Runs what is not
there yet. The tables of README.md are made from the same files by tools/readme_tables.py.

  python benchmarks/moments.py            # all; or the names of some in RUNS
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT, KEPT = HERE.parent, HERE / "moments"
sys.path.insert(0, str(ROOT))
import deepham_ks as dk  # noqa: E402

LEARNT = ["--learnt-moments", "1", "--n-agents", "50"]
RUNS = {**{f"seed{seed}": [*LEARNT, "--seed", str(seed)] for seed in range(3)},
        "unemployment": ["--moments", "unemployment", "--n-agents", "50"]}
MIDDLE = ["--eval-agents", "500", "--eval-economies", "8", "--irf-paths", "2", "--irf-burn", "2", "--irf-periods", "2"]
DRAWS = 200  # of everybody's s'


def next_draw(solution: dk.Solution, k_next: torch.Tensor, s: torch.Tensor, z: torch.Tensor, z_next: torch.Tensor,
              rng: torch.Generator) -> torch.Tensor:
    """Moments (B, V, n) of one draw of everybody's s'."""
    s_next = dk.draw_s(dk.uniform(s.shape, rng, s.device), z, z_next, s, solution.econ)
    return dk.moments_of(list(solution.layers.values()), k_next, s_next, solution.econ, solution.config)


def curvature(solution: dk.Solution, N: int, B: int = 64) -> dict:
    """What the Bellman and Euler errors leave out: the mean of V(k', s', K', z', M') over 200 draws of everybody's s'
    less V at the mean M', in utils, and the same of u'(c') relative to it; means of absolute values over B economies of
    N households."""
    cfg, econ = solution.config, solution.econ
    rng = torch.Generator().manual_seed(7)
    panel = dk.initial_panel(B, N, econ, rng, torch.float64)
    for s, z, paths in dk.simulate([solution.in_panel], panel, 300, econ, rng):
        pass
    k, K, k_next = [x.double() for x in paths[0]]
    _, M_next = solution.now_and_next_moments(k, s, k_next, z)
    K_next, gaps, gaps_u = k_next.mean(1, keepdim=True).expand_as(k), [], []

    def value_and_marginal(s1, z1, M):
        m, _ = dk.cash_on_hand(k_next, s1, K_next, z1, econ)
        c = m - solution.policy(k_next, s1, K_next, z1, M)
        return torch.stack([solution.values(k_next, s1, K_next, z1, M), dk.marginal_utility(c, econ)])

    for z_next in range(len(econ.TFP)):
        z1, s1 = torch.full_like(s, z_next), s  # own s' is summed over exactly, so any will do
        M = torch.stack([next_draw(solution, k_next, s, z, z1[:, :1], rng) for _ in range(DRAWS)])  # (D, B, V, n)
        expected = sum(value_and_marginal(s1, z1, of_one.unsqueeze(1)) for of_one in M) / DRAWS
        at_mean = value_and_marginal(s1, z1, M.mean(0).unsqueeze(1))  # of these draws: a straight line shows no gap
        gap = (expected - at_mean).abs()
        gaps.append(gap[0].mean())
        gaps_u.append((gap[1] / at_mean[1]).mean())
    return {"N": N, "draws": DRAWS, "V_utils": float(torch.stack(gaps).mean()),
            "marginal_utility_relative": float(torch.stack(gaps_u).mean()), "iterations": cfg.iterations}


def run(name: str, flags: list) -> None:
    """One run on the command line, judged twice; what was found, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "deepham_ks.py"), *flags, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        found, metrics = {"error": done.stderr.strip()[-300:]}, Path(folder) / "metrics.json"
        if metrics.exists():
            found = json.loads(metrics.read_text())
            if name == "seed0":
                (HERE / "moments.png").write_bytes((Path(folder) / "figures" / "moments.png").read_bytes())
            solution = dk.load(Path(folder) / dk.WEIGHTS)
            with torch.no_grad():
                found["curvature"] = [curvature(solution, N, B) for N, B in ((50, 64), (5000, 2))]
            subprocess.run([*command, "--evaluate", *MIDDLE], capture_output=True, text=True)
            again = json.loads(metrics.read_text())
            found["middle"] = {who: again[who]["small"] for who in ("network", "grid")}
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    KEPT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or RUNS:
        if not (KEPT / f"{name}.json").exists():
            print(f"{name}: python deepham_ks.py {' '.join(RUNS[name])}", flush=True)
            run(name, RUNS[name])


if __name__ == "__main__":
    main()
