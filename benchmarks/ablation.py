"""What each mechanism of the method buys: the default economy solved without it, in three seeds, a process each run.
A mechanism is switched off by a flag or by a change to a copy of the script. Every run is judged as always, and its
figures are added to benchmarks/ablation.json. What this version has run is kept.

  python benchmarks/ablation.py                        # 36 runs of the default: seconds not measured
  python benchmarks/ablation.py --only "robust weights" --seeds 0
  python benchmarks/ablation.py --table                # prints the table of what is there; runs nothing
  python benchmarks/ablation.py --smoke --json x.json  # tiny sizes: whether it works
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import deepham_ks as dk  # noqa: E402

# mechanism -> how it is switched off: in words, flags, and (what the script says, what the copy says)
OFF = {
    "nothing off": ("the default", [], None),
    "robust weights": ("`robust` gives ones", [], ("    return (1 + (residual * of_all[1]",
                                                   "    return 1 + 0 * (1 + (residual * of_all[1]")),
    "least damping": ("`LEAST_DAMPING` is 0", [], ("LEAST_DAMPING = 3e-5", "LEAST_DAMPING = 0.0")),
    "roll-outs of 75 periods": ("`--horizon 40`", ["--horizon", "40"], None),
    "18 iterations of averaging": ("`--averaging 6`", ["--averaging", "6"], None),
    "half of the roll-outs start anywhere in k": ("`--wide-share 0`", ["--wide-share", "0"], None),
    "roll-outs start with k as it is held in s": ("k as anybody holds", [], (
        "(state.s.flatten() == s.unsqueeze(1)) * weight", "(s.unsqueeze(1) >= 0) * weight")),
    "economies are scaled": ("`--K-spread 0`", ["--K-spread", "0"], None),
    "later periods in the labels": ("the first term of `worth_of_saving` alone", [],
                                    ("worth[t] = expected[t] + torch.clamp(",
                                     "worth[t] = expected[t] + 0 * torch.clamp(")),
    "24 economies: 48": ("`--n-economies 48`", ["--n-economies", "48"], None),
    "infinitely many households: 50": ("`--n-agents 50`", ["--n-agents", "50"], None),
    "infinitely many households: 1,000": ("`--n-agents 1000 --n-economies 48`",
                                         ["--n-agents", "1000", "--n-economies", "48"], None),
}
SHORT = ["--irf-paths", "2", "--irf-periods", "2"]  # the responses are not looked at here
SMOKE = ["--preset", "smoke", "--periods", "60", "--device", "cpu"]


def script_without(name: str) -> str:
    """The text of the script with the mechanism switched off."""
    text, change = (ROOT / "deepham_ks.py").read_text(encoding="utf-8"), OFF[name][2]
    if change is None:
        return text
    if text.count(change[0]) != 1:
        sys.exit(f"ablation: {name}: the script has {change[0]!r} {text.count(change[0])} times; mend OFF")
    return text.replace(*change)


def figures(name: str, seed: int, more: list) -> dict:
    """Of one run, or the line in which it ended."""
    with tempfile.TemporaryDirectory() as folder:
        script, found = Path(folder) / "deepham_ks.py", Path(folder) / "run" / "metrics.json"
        script.write_text(script_without(name), encoding="utf-8")
        flags = ["--seed", str(seed), "--output-dir", found.parent, *SHORT, *more, *OFF[name][1]]
        done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
        of_run = {"version": dk.__version__, "smoke": bool(more)}
        if not found.exists():
            return of_run | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        metrics = json.loads(found.read_text())
    limit, both = metrics["network"]["limit"], metrics["comparison"]["limit"]
    return of_run | {
        "w1": both["w1"], "std_gap": both["std_gap"], "euler": limit["euler_log10"],
        "bellman": limit["bellman_own_c"]["mean"], "seconds": metrics["seconds"]["training"],
        "converged": metrics["convergence"]["converged"], "device": metrics["device"],
        "fails": [row["figure"] for row in metrics["verdict"] if row["passed"] is False]}


def span(numbers: list, digits: int) -> str:
    return " to ".join(dict.fromkeys(f"{x + 0.0:.{digits}f}" for x in (min(numbers), max(numbers))))


def table(runs: dict) -> str:
    lines = ["| mechanism | switched off by | seeds | W1 (goods) | std of k, % off | Euler log10 mean | p99 | max | "
             "Bellman, 1e-5 utils | not converged | rows that fail, at most |", "|---|---|" + "---:|" * 9]
    for name, (how, *_) in OFF.items():
        of = [x for key, x in runs.items() if key.rpartition(", seed ")[0] == name]
        ended, of = [x["error"] for x in of if "error" in x], [x for x in of if "error" not in x]
        if of:
            euler = [span([x["euler"][size] for x in of], 2) for size in ("mean", "p99", "max")]
            cells = [span([x["w1"] for x in of], 3), span([100 * x["std_gap"] for x in of], 2), *euler,
                     span([1e5 * x["bellman"] for x in of], 1), str(sum(x["converged"] is False for x in of)),
                     str(max(len(x["fails"]) for x in of))]
            lines.append(f"| {name} | {how} | {len(of)} | {' | '.join(cells)} |")
        lines += [f"| {name} | {how} | | {line} | | | | | | | |" for line in dict.fromkeys(ended)]
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OFF, default=list(OFF), metavar="NAME", help=", ".join(OFF))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "ablation.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args(argv)

    def kept():
        return json.loads(asked.json.read_text()) if asked.json.exists() else {}

    of_run = {"version": dk.__version__, "smoke": asked.smoke}
    for seed in [] if asked.table else asked.seeds:
        for name in asked.only:
            key = f"{name}, seed {seed}"
            if of_run.items() <= kept().get(key, {}).items():
                continue
            found = figures(name, seed, SMOKE if asked.smoke else [])
            asked.json.write_text(json.dumps(kept() | {key: found}, indent=1) + "\n")
            print(key, found.get("error", found.get("euler")), flush=True)
    print(table(kept()))


if __name__ == "__main__":
    main()
