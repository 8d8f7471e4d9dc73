"""Writes the tables of README.md, between the lines <!-- NAME:start --> and <!-- NAME:end -->, from metrics.json files.

  python tools/readme_tables.py            # rewrite README.md in place
  python tools/readme_tables.py --check    # exit 1 if that would change it

NAME results: network, seeds, grid and published figures, from benchmarks/seeds/seed*.json; that of seed 0 is the
committed reference run, whose metrics.json in the top level a user's own run replaces. seeds: a row for each of the
seeds 0 to 9.
gamma2: network and grid at risk aversion 2, from benchmarks/gamma2.json. examples: a row for each script in examples/,
from benchmarks/examples/*.json. planner and game: from benchmarks/planner/*.json. calibrations: from
benchmarks/calibrations/*.json. moments: from benchmarks/moments/*.json. groups: from benchmarks/groups/*.json.
"""

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED_ROWS = tuple(range(10))
REFERENCE = "benchmarks/seeds/seed0.json"
EXAMPLES = ("stochastic_beta", "davila", "ar1")


class BadInput(Exception):
    """What is missing or does not fit, and the command that makes it."""


def at(path):
    """Reader of one figure: metrics -> number, at keys joined by blanks; NaN where it is null."""
    def read(metrics):
        for key in path.split():
            metrics = metrics[int(key) if isinstance(metrics, list) else key]
        return math.nan if metrics is None else float(metrics)
    return read


def std_gap(size):
    """Std of capital against the grid's, in percent."""
    return lambda metrics: 100 * (metrics["comparison"][size]["std_ratio"] - 1)


def one_size(name, path, digits, n_agents=None, published="", authors=""):
    """A row whose grid column is empty: the figure is itself a comparison with the grid."""
    return name, n_agents, at(path), None, digits, published, authors


def both(name, size, path, digits, published="", authors=""):
    """A row for the network and the grid, at one of the sizes small, large and limit."""
    return (name, f"comparison {size} n_agents", at(f"network {size} {path}"), at(f"grid {size} {path}"), digits,
            published, authors)


# Last two columns: the stored policy of Maliar, Maliar & Valli (2010; 100 x 4 nodes, splines) and the trained network
# of Han, Yang & E (2021; first moment), both measured in panels from a dispersed start, of which 1,500 of 4,000 periods
# were dropped; Bellman errors as in Han, Yang & E (2021). Distances are to this script's converged grid.
ROWS = [
    one_size("W1 distance of capital to the grid's (goods)", "comparison small w1", 3, "comparison small n_agents",
             "0.16", "9.2"),
    one_size("", "comparison large w1", 3, "comparison large n_agents", "0.16", "9.2"),
    one_size("", "comparison limit w1", 3, "comparison limit n_agents"),
    ("std of capital against the grid's (%)", "comparison small n_agents", std_gap("small"), None, 2, "-0.5", "-57"),
    ("", "comparison large n_agents", std_gap("large"), None, 2, "", ""),
    ("", "comparison limit n_agents", std_gap("limit"), None, 2, "", ""),
    one_size("\\|k' - grid's k'\\|, mean (goods)", "comparison policy_distance mean", 4, None, "0.006", "0.77"),
    one_size("\\|k' - grid's k'\\|, max (goods)", "comparison policy_distance max", 3, None, "0.017", "5.5"),
    both("Euler error, log10 mean", "large", "euler_log10 mean", 2, "-3.96", "-3.34"),
    both("", "limit", "euler_log10 mean", 2),
    both("Euler error, log10 99th percentile", "large", "euler_log10 p99", 2, "-3.47", "-2.61"),
    both("", "limit", "euler_log10 p99", 2),
    both("Euler error, log10 max", "large", "euler_log10 max", 2, "-3.24", "-1.00"),
    both("", "limit", "euler_log10 max", 2),
    both("Bellman error, own c, mean (utils)", "small", "bellman_own_c mean", 5),
    both("", "large", "bellman_own_c mean", 5),
    both("", "limit", "bellman_own_c mean", 5),
    both("Bellman error, best c, mean (utils)", "small", "bellman_best_c mean", 5, "0.0253", "0.0184"),
    both("", "large", "bellman_best_c mean", 5),
    both("law of motion, Den Haan's max error (%)", "large", "law_of_motion den_haan_max_percent", 2),
    both("risky steady state K*, bad state (goods)", "limit", "risky_steady_state K 0", 2),
    both("the same by the law of motion, exp(a / (1 - b))", "limit", "risky_steady_state by_law_of_motion 0", 2),
    both("risky steady state K*, good state (goods)", "limit", "risky_steady_state K 1", 2),
    both("the same by the law of motion", "limit", "risky_steady_state by_law_of_motion 1", 2),
    one_size("impulse response of output, gap to the grid's (p.p.)", "comparison impulse_response_gap output", 4,
             "comparison impulse_response_gap n_agents"),
    one_size("impulse response of capital, gap to the grid's (p.p.)", "comparison impulse_response_gap capital", 4,
             "comparison impulse_response_gap n_agents"),
]


def show(number, digits):
    return "-" if math.isnan(number) else f"{number + 0.0:.{digits}f}"


def table(header, rows):
    """Markdown; the first column to the left, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def count(metrics, path):
    """Households an economy; inf in the limit."""
    number = at(path)(metrics) if path else 0
    return "inf" if math.isnan(number) else f"{number:,.0f}" if path else ""


def is_default(metrics):
    """Published numbers are of the default economy, and only its verdict has them."""
    return any(row["published"] is not None for row in metrics["verdict"])


def load(root, name, command):
    path = root / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: {error}; make it with: {command}") from error


def load_reference(root):
    return load(root, REFERENCE, "python deepham_ks.py --output-dir runs/seed0")


def load_seeds(root, reference):
    """seed -> metrics, all of the reference run's economy and configuration."""
    seeds = {}
    for path in sorted((root / "benchmarks" / "seeds").glob("seed*.json")):
        command = f"python deepham_ks.py --seed {path.stem[4:]} --output-dir runs/{path.stem}"
        metrics = load(root, path.relative_to(root), command)
        if path.stem != f"seed{metrics['seed']}":
            raise BadInput(f"{path.relative_to(root)} is of seed {metrics['seed']}")
        for kind in ("calibration", "economy", "config", "grid_config"):
            ours, theirs = metrics[kind] or {}, reference[kind] or {}
            odd = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            if odd:
                raise BadInput(f"{path.relative_to(root)}: {', '.join(odd)} not as in {REFERENCE}; run {command}")
        seeds[metrics["seed"]] = metrics
    if not seeds:
        raise BadInput("benchmarks/seeds: no seed*.json; make them with: "
                       "python deepham_ks.py --seed 1 --output-dir runs/seed1, and so on")
    return dict(sorted(seeds.items()))


def machine(metrics):
    """One line: what it ran on and what it took."""
    seconds, memory = metrics["seconds"], metrics["peak_memory_gb"]
    line = (f"{metrics['device']}, torch {metrics['versions']['torch']}: training {seconds['training']:.0f} s, "
            f"grid {seconds['grid']:.0f} s, accuracy {seconds['accuracy']:.0f} s")
    peak = [f"{memory[where]:.1f} GB{said}" for where, said in (("host", ""), ("device", " on the device"))
            if where in memory]
    return line + (f"; peak memory {', '.join(peak)}" if peak else "")


def results(root):
    reference = load_reference(root)
    seeds = load_seeds(root, reference)
    header = ["figure", "N", f"network, seed {reference['seed']}", f"{len(seeds)} seeds, min to max", "grid",
              "published grid", "authors' network"]
    rows = []
    if not is_default(reference):
        raise BadInput(f"{REFERENCE} is not of the default economy; make it with: python deepham_ks.py")
    for name, n_agents, network, grid, digits, published, authors in ROWS:
        spread = sorted(network(metrics) for metrics in seeds.values())
        rows.append([name, count(reference, n_agents), show(network(reference), digits),
                     f"{show(spread[0], digits)} to {show(spread[-1], digits)}",
                     show(grid(reference), digits) if grid else "", published, authors])
    return (f"`python deepham_ks.py` on {machine(reference)}. Other seeds: `python deepham_ks.py --seed 1 --output-dir "
            f"runs/seed1`, and so on.\n\n" + table(header, rows))


def seeds(root):
    runs = load_seeds(root, load_reference(root))
    first = next(iter(runs.values()))
    n, N = (count(first, f"comparison {size} n_agents") for size in ("small", "large"))
    header = ["seed", "trained on", "training (s)", f"W1, N = {n}", f"W1, N = {N}", f"Bellman own c, N = {n}",
              f"Bellman own c, N = {N}", f"Euler log10 mean / p99 / max, N = {N}", "the same, N = inf",
              "\\|dk'\\| mean / max"]
    rows = []
    for seed in SEED_ROWS:
        if seed not in runs:
            raise BadInput(f"benchmarks/seeds/seed{seed}.json: missing; make it with: "
                           f"python deepham_ks.py --seed {seed} --output-dir runs/seed{seed}")
        net, gap = runs[seed]["network"], runs[seed]["comparison"]
        euler = [" / ".join(show(net[size]["euler_log10"][name], 2) for name in ("mean", "p99", "max"))
                 for size in ("large", "limit")]
        rows.append([str(seed), runs[seed]["device"], show(runs[seed]["seconds"]["training"], 1),
                     show(gap["small"]["w1"], 3), show(gap["large"]["w1"], 3),
                     show(net["small"]["bellman_own_c"]["mean"], 5), show(net["large"]["bellman_own_c"]["mean"], 5),
                     *euler,
                     f"{show(gap['policy_distance']['mean'], 4)} / {show(gap['policy_distance']['max'], 3)}"])
    return table(header, rows)


def gamma2(root):
    command = "python deepham_ks.py --gamma 2 --output-dir runs/gamma2"
    metrics = load(root, "benchmarks/gamma2.json", command)
    if metrics["calibration"]["gamma"] != 2:
        raise BadInput(f"benchmarks/gamma2.json: gamma is {metrics['calibration']['gamma']}; run {command}")
    rows = [[name, count(metrics, n_agents), show(network(metrics), digits),
             show(grid(metrics), digits) if grid else ""] for name, n_agents, network, grid, digits, *_ in ROWS]
    return f"`{command}` on {machine(metrics)}.\n\n" + table(["figure", "N", "network", "grid"], rows)


def examples(root):
    """Each example against the grid of the same economy; all but the seconds in the limit N = infinity."""
    header = ["example", "states (s x z)", "training (s)", "grid (s)", "mean K", "r (%)", "std of k", "Gini of wealth",
              "Gini of consumption", "top 1 / 5 / 20% hold (%), network", "grid", "W1 (goods)", "Euler log10 mean"]
    pairs = [("capital mean", 2), ("interest_rate_percent", 3), ("capital std", 2), ("capital gini", 4),
             ("consumption gini", 4)]
    rows = []
    for name in EXAMPLES:
        file, command = f"benchmarks/examples/{name}.json", f"python examples/{name}.py --output-dir runs/{name}"
        metrics = load(root, file, command)
        if is_default(metrics):
            raise BadInput(f"{file} is of the default economy; make it with: {command}")

        def pair(path, digits, metrics=metrics):
            return " / ".join(show(at(f"{solution} limit {path}")(metrics), digits) for solution in ("network", "grid"))

        top = [[show(at(f"{solution} limit capital top_percent_hold {q}")(metrics), 1) for q in (1, 5, 20)]
               for solution in ("network", "grid")]
        income = metrics["economy"]["income"]
        rows.append([f"`{name}`", f"{len(income[0])} x {len(income)}",
                     *(show(at(f"seconds {stage}")(metrics), 0) for stage in ("training", "grid")),
                     *(pair(path, digits) for path, digits in pairs), *(" / ".join(held) for held in top),
                     show(at("comparison limit w1")(metrics), 3), pair("euler_log10 mean", 2)])
    return ("In the limit N = inf; network / grid where two numbers stand.\n\n" + table(header, rows))


PLANNER = {"market": "market", "planner_seed0": "planner, seed 0", "planner_seed1": "planner, seed 1",
           "planner_seed2": "planner, seed 2", "planner_other_start": "planner, `--start 3`",
           "market_shocks": "market, TFP .95 / 1.05", "planner_shocks": "planner, TFP .95 / 1.05"}


def planner(root):
    """Market and planner of Davila et al. (2012), network / grid, in the limit N = infinity."""
    command = "python benchmarks/planner.py"
    pairs = [("capital mean", 2), ("interest_rate_percent", 3), ("capital gini", 4), ("consumption gini", 4),
             ("welfare", 4), ("euler_log10 mean", 2)]
    header = ["economy", "mean K", "r (%)", "Gini of wealth", "Gini of consumption", "welfare (goods)",
              "Euler log10 mean", "W1 (goods)", "training (s)"]
    rows = []
    for file, name in PLANNER.items():
        metrics = load(root, f"benchmarks/planner/{file}.json", command)
        if "error" in metrics:
            rows.append([name, metrics["error"].removeprefix("deepham_ks: ")] + [""] * (len(header) - 2))
            continue
        cells = [" / ".join(show(at(f"{solution} limit {path}")(metrics), digits) for solution in ("network", "grid"))
                 for path, digits in pairs]
        rows.append([name, *cells, show(at("comparison limit w1")(metrics), 3),
                     show(at("seconds training")(metrics), 0)])
    return (f"`{command}`. Network / grid, in the limit N = inf. Welfare: the constant consumption whose utility is "
            "the mean of u(c).\n\n" + table(header, rows))


def game(root):
    """How far a player's k' is from a price-taker's, network and grid."""
    command = "python benchmarks/planner.py"
    rows = []
    for file in ("game", "game_5000"):
        metrics = load(root, f"benchmarks/planner/{file}.json", command)
        moved = metrics["moved"]
        rows.append([f"{metrics['economy']['players']:,}",
                     *(f"{moved[who]['mean']:.4f} / {moved[who]['max']:.4f}" for who in ("network", "grid")),
                     *(show(at(f"{solution} limit capital mean")(metrics), 3) for solution in ("network", "grid"))])
    return table(["players", "\\|k' - market's k'\\| mean / max (goods), network", "grid", "mean K, network", "grid"],
                 rows)


def calibrations(root):
    """How many of the runs of benchmarks/calibrations.py meet their goals, and those that do not."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import calibrations as runs

    found = [json.loads(path.read_text()) for path in sorted((root / "benchmarks" / "calibrations").glob("*.json"))]
    if not found:
        raise BadInput("benchmarks/calibrations: no runs; make them with: python benchmarks/calibrations.py")
    missed = {(x["flags"], x["seed"]): ["no solution"] if "error" in x else runs.misses(x) for x in found}
    rows = [[f"`{flags}`", str(seed), ", ".join(names)] for (flags, seed), names in missed.items() if names]
    met = len(found) - len(rows)
    text = (f"`python benchmarks/calibrations.py`: {met} of {len(found)} runs meet every goal "
            "(`benchmarks/calibrations.md`).")
    return text if not rows else f"{text} The others:\n\n" + table(["flags", "seed", "misses"], rows)


def moments(root):
    """One learnt moment, the unemployment share given, K alone and the grid in K, on the same shocks."""
    command = "python benchmarks/moments.py"
    runs = {path.stem: load(root, f"benchmarks/moments/{path.name}", command)
            for path in sorted((root / "benchmarks" / "moments").glob("*.json"))}
    learnt = [metrics for name, metrics in runs.items() if name.startswith("seed")]
    if not learnt or any("error" in metrics for metrics in runs.values()):
        raise BadInput(f"benchmarks/moments: runs are missing or ended in an error; make them with: {command}")
    only_K = load_reference(root)
    given = [runs["unemployment"]] if "unemployment" in runs else []
    header = ["figure", "N", f"one learnt moment, {len(learnt)} seeds",
              *("unemployment share given" for _ in given), "K alone", "grid in K"]
    rows = []
    for name, figure, digits in (("Bellman error, own c, mean (utils)", "bellman_own_c mean", 5),
                                 ("Euler error, log10 mean", "euler_log10 mean", 2),
                                 ("Euler error, log10 99th percentile", "euler_log10 p99", 2),
                                 ("std of capital (goods)", "capital std", 2)):
        for N, size in (("50", "small"), ("500", "middle"), ("5,000", "large"), ("inf", "limit")):
            def of(metrics, who, size=size, figure=figure):
                return at(figure)(metrics["middle"][who] if size == "middle" else metrics[who][size])

            spread = sorted(of(metrics, "network") for metrics in learnt)
            rows.append([name if N == "50" else "", N,
                         f"{show(spread[0], digits)} to {show(spread[-1], digits)}",
                         *(show(of(metrics, "network"), digits) for metrics in given),
                         "" if size == "middle" else show(of(only_K, "network"), digits),
                         show(of(learnt[0], "grid"), digits)])
    meaning, left = learnt[0]["network"]["small"]["moments"], learnt[0]["curvature"]
    told = [f"{network}'s Q {float(r['K'][0]):+.2f} with K and {float(r['unemployment'][0]):+.2f} with the share of "
            "unemployed" for network, r in meaning.items()]
    seconds = [show(metrics["seconds"]["training"], 0) for metrics in learnt]
    return (f"`{command}`. Training {' / '.join(seconds)} s ({learnt[0]['device']}).\n\n" + table(header, rows)
            + f"\n\nCorrelations at N = 50, seed 0: {'; '.join(told)}. The expectation takes next period's moments at "
            f"their mean given z'; over {left[0]['draws']} draws of everybody's s' V differs from that by "
            f"{left[0]['V_utils']:.1e} utils at N = 50 and {left[1]['V_utils']:.1e} at N = 5,000.")


def groups(root):
    """J identical groups against the default economy's grid, and seven groups that differ."""
    command = "python benchmarks/thirty_states.py"
    rows, kept = [], root / "benchmarks" / "groups"
    made = [J for J in (1, 3, 10, 30) if (kept / f"J{J}.json").exists()]
    if not made:
        raise BadInput(f"benchmarks/groups: no runs; make them with: {command}")
    for J in made:
        x = load(root, f"benchmarks/groups/J{J}.json", command)
        euler = [" / ".join(show(x[who]["euler_log10"][part], 2) for part in ("mean", "p99")) for who in
                 ("network", "grid")]
        memory = x["memory_gb"].get("device", x["memory_gb"].get("host"))
        rows.append([str(J), str(x["states"]), f"{x['parameters']:,}", show(x["seconds"], 0), str(x["iterations"]),
                     show(memory, 1), show(x["w1"], 3), *euler, f"{12.0**J:.0e}"])
    header = ["J", "states s", "parameters of a network", "training (s)", "iterations", "memory (GB)",
              "W1 to the truth (goods)", "Euler log10 mean / p99", "truth in K", "nodes of a grid, 12 each"]
    text = f"`{command}`, J identical groups, N = 5,000 ({x['device']}).\n\n" + table(header, rows)
    if not (kept / "spread.json").exists():
        return text
    x = load(root, "benchmarks/groups/spread.json", command)
    if "error" in x:
        return f"{text}\n\nWith discount factors that differ: {x['error']}"
    pairs = [("capital mean", 2), ("capital gini", 4), *((f"capital top_percent_hold {q}", 1) for q in (1, 5, 20))]
    cells = [" / ".join(show(at(f"{who} limit {path}")(x), digits) for who in ("network", "grid"))
             for path, digits in pairs]
    euler = [" / ".join(show(x[who][size]["euler_log10"]["mean"], 2) for who in ("network", "grid"))
             for size in ("large", "limit")]
    header = ["seven groups, network / grid in K", "mean K", "Gini of wealth", "top 1% hold (%)", "top 5%", "top 20%",
              "Euler log10 mean, N = 5,000", "N = inf", "W1, N = inf", "training (s)", "grid (s)"]
    row = [f"beta {x['calibration']['beta']} +- {x['calibration']['spread']}", *cells, *euler,
           show(at("comparison limit w1")(x), 3), *(show(x["seconds"][stage], 0) for stage in ("training", "grid"))]
    return text + "\n\n" + table(header, [row])


BLOCKS = {"results": results, "seeds": seeds, "gamma2": gamma2, "examples": examples, "planner": planner, "game": game,
          "calibrations": calibrations, "moments": moments, "groups": groups}


def rewritten(text, root):
    """README text with every block that it has markers for."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != text.count(end) or text.count(start) > 1:
            raise BadInput(f"README.md: {start} and {end} must stand there once each, or not at all")
        if start in text:
            before, rest = text.split(start)
            if end not in rest:
                raise BadInput(f"README.md: {end} stands before {start}")
            text = f"{before}{start}\n{block(root)}\n{end}{rest.split(end)[1]}"
    if "<!-- results:start -->" not in text:
        raise BadInput("README.md: no line <!-- results:start -->")
    return text


def main(argv=None, root=ROOT):
    """0 done or nothing to do, 1 --check found a difference, 2 a file is missing or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md would change")
    check, readme = parser.parse_args(argv).check, root / "README.md"
    try:
        before = readme.read_text(encoding="utf-8")
        after = rewritten(before, root)
    except KeyError as error:
        print(f"readme_tables: a metrics file has no {error}; make it with this deepham_ks.py", file=sys.stderr)
        return 2
    except (BadInput, OSError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    if after == before:
        return 0
    if check:
        print("README.md: tables are not those of the metrics; run python tools/readme_tables.py", file=sys.stderr)
        return 1
    readme.write_text(after, encoding="utf-8")
    print("README.md: tables rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
