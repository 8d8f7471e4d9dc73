"""One learnt moment beside K, three seeds, and the unemployment share given in its place: the metrics.json of each run
at N = 50 and in the limit, and its figures at N = 500, into benchmarks/moments/. What this version has run is kept.

  python benchmarks/moments.py            # four runs; or the names of some in RUNS
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
MIDDLE = ["--eval-agents", "500", "--eval-economies", "8", "--irf-paths", "2", "--irf-periods", "2"]
DRAWS = 200  # of everybody's s'


def curvature(solution: dk.Solution, N: int, B: int = 64) -> dict:
    """What Bellman errors leave out: the mean over B economies of N households of |V(k', s', K', z', M') over 200 draws
    of everybody's s' less V at the mean M'|, in the units of utility()."""
    econ, rng, gaps = solution.econ, torch.Generator().manual_seed(7), []
    panel, draws = dk.initial_panel(B, N, econ, solution.K_mean, rng), torch.Generator().manual_seed(8)
    for _, at, k_next in dk.simulate(dk.panel_policy(solution), panel, 300, econ, rng):
        pass
    k_next, s, z = k_next.double(), at.s, at.z
    K_next, alike = k_next.mean(1, keepdim=True), k_next[:, :0]

    def value(z_next, M):  # own s' is summed over exactly
        return solution.values(dk.place(k_next, s, K_next, z_next, econ)._replace(M=M.unsqueeze(1)))

    for z_next in [torch.full_like(z, i) for i in range(len(econ.TFP))]:
        path = torch.stack([z, z_next])
        M = [dk.moments_of(k_next, dk.follow(lambda t, s: dk.uniform(s.shape, draws, s.device), s, path, econ)[1],
                           solution.seen, econ, alike) for _ in range(DRAWS)]
        mean = sum(value(z_next, of_one) for of_one in M) / DRAWS
        gaps.append((mean - value(z_next, sum(M) / DRAWS)).abs().mean())  # of these draws: a line shows no gap
    return {"N": N, "draws": DRAWS, "V_utils": float(torch.stack(gaps).mean())}


def run(name: str, flags: list) -> None:
    """One run on the command line, judged twice; what was found, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "deepham_ks.py"), *flags, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        found, metrics = {"error": done.stderr.strip()[-300:]}, Path(folder) / "metrics.json"
        if metrics.exists():
            found = json.loads(metrics.read_text())
            with torch.no_grad():
                found["curvature"] = curvature(dk.load(Path(folder) / dk.WEIGHTS), 50)
            subprocess.run([*command, "--evaluate", *MIDDLE], capture_output=True, text=True)
            again = json.loads(metrics.read_text())
            found["middle"] = {who: again[who]["small"] for who in ("network", "grid") if who in again}
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    KEPT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or RUNS:
        path = KEPT / f"{name}.json"
        if not path.exists() or json.loads(path.read_text()).get("version") != dk.__version__:
            print(f"{name}: python deepham_ks.py {' '.join(RUNS[name])}", flush=True)
            run(name, RUNS[name])


if __name__ == "__main__":
    main()
