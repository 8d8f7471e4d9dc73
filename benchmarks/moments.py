"""One learnt moment beside K, three seeds, and the unemployment share given in its place: the metrics.json of each run
at N = 50 and in the limit, and its figures at N = 500, into benchmarks/moments/. Makes the runs that this version has
not made yet.

  python benchmarks/moments.py            # all, about 20 minutes on one thread; or the names of some in RUNS
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, KEPT = HERE.parent, HERE / "moments"
sys.path.insert(0, str(ROOT))
import deepham_ks as dk  # noqa: E402

LEARNT = ["--learnt-moments", "1"]
RUNS = {**{f"seed{seed}": [*LEARNT, "--seed", str(seed)] for seed in range(3)},
        "unemployment": ["--moments", "unemployment"]}
MIDDLE = ["--eval-agents", "500", "--eval-economies", "8", "--irf-paths", "2", "--irf-periods", "2"]


def run(name: str, flags: list) -> None:
    """One run on the command line, judged twice; what was found, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "deepham_ks.py"), *flags, "--output-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        found, metrics = {"error": done.stderr.strip()[-300:]}, Path(folder) / "metrics.json"
        if metrics.exists():
            found = json.loads(metrics.read_text())
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
