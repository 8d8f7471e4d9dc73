"""Writes the tables of README.md, docs/results.md and docs/method.md, between the lines <!-- NAME:start --> and
<!-- NAME:end -->, from metrics.json files.

  python tools/readme_tables.py            # rewrite them in place
  python tools/readme_tables.py --check    # exit 1 if that would change them

results: the reference run and all seeds, from benchmarks/seeds/seed*.json; that of seed 0 is the committed reference
run, whose metrics.json in the top level a user's own run replaces. summary: the same beside what others publish. seeds:
a row for each of the seeds 0 to 9. gamma2: from benchmarks/gamma2.json. examples, and timings, a line for each: from
benchmarks/examples/*.json. planner, game: from benchmarks/planner/*.json. labour, and learnt, the same in words: from
benchmarks/labour_flows.json. field, aiyagari: from benchmarks/field/*.json. moments: from benchmarks/moments/*.json.
groups: from benchmarks/groups/*.json. mechanisms: from benchmarks/ablation.json.
"""

import argparse
import functools
import json
import math
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md", "docs/method.md")
SEED_ROWS = tuple(range(10))
REFERENCE = "benchmarks/seeds/seed0.json"
EXAMPLES = {"stochastic_beta": "discount factors that change about once a lifetime",
            "davila": "a few earn much (Davila et al. 2012)",
            "castaneda": "very few earn a thousand times more (Castaneda et al. 2003)",
            "ar1": "AR(1) TFP and productivity",
            "labour_flows": "unemployment follows job finding and separation"}
LABOUR = "benchmarks/labour_flows.json"

# Who else solves the default economy: seconds, device, Euler errors (log10 mean, max), W1 to this script's converged
# grid at N = 50; blank where nobody publishes it. Seconds are those that were reported.
OTHERS = [
    ["authors' code (Han, Yang & E 2021)", "4,380", "A100", "", "", "9.2"],
    ["DeepHAMX, the same in JAX", "1,020", "RTX 3090", "", "", ""],
    ["HARK's Krusell-Smith", "142", "CPU", "", "", ""],
    ["published grid (Maliar, Maliar & Valli 2010)", "", "", "", "", "0.16"],
]

# Rows of the verdict (dk.figure_list) that the tables show: name there, name here, digits, and what the authors'
# trained network (Han, Yang & E 2021, first moment) has, against this script's converged grid.
ROWS = [
    ("W1 of capital, N=50", "W1 distance of capital to the grid's, N = 50 (goods)", 3, "9.2"),
    ("W1 of capital, N=inf", "W1 distance of capital to the grid's, N = infinity (goods)", 3, ""),
    ("std of capital over the grid's - 1, N=50", "std of capital over the grid's - 1, N = 50", 4, "-0.57"),
    ("|k' - k' grid|, mean", "\\|k' - grid's k'\\|, mean (goods)", 4, "0.77"),
    ("|k' - k' grid|, max", "\\|k' - grid's k'\\|, max (goods)", 3, "5.5"),
    ("Euler error, log10 mean, N=inf", "Euler error, log10 mean, N = infinity", 2, ""),
    ("Euler error, log10 p99, N=inf", "Euler error, log10 99th percentile", 2, ""),
    ("Euler error, log10 max, N=inf", "Euler error, log10 max", 2, ""),
    ("Bellman error, best c, mean, N=50", "Bellman error, mean, N = 50 (utils)", 5, "0.0184"),
    ("Bellman error, own c, mean, N=inf", "Bellman error, mean, N = infinity (utils)", 6, ""),
    ("Euler error, log10 mean, at the worst K*, N=inf", "Euler error, log10 mean, at the worst K\\*", 2, ""),
    ("response of output, gap (p.p.)", "impulse response of output, gap to the grid's (p.p.)", 4, ""),
]


class BadInput(Exception):
    """What is missing or does not fit, and the command that makes it."""


def at(metrics, path):
    """The number at keys joined by blanks; NaN where it is null."""
    found = functools.reduce(lambda x, key: x[int(key) if isinstance(x, list) else key], path.split(), metrics)
    return math.nan if found is None else float(found)


def row_of(metrics, name):
    """A row of the verdict; KeyError where there is none."""
    found = {row["figure"]: row for row in metrics["verdict"]}
    return found[name]


def show(number, digits):
    return "-" if number is None or math.isnan(number) else f"{number + 0.0:.{digits}f}"


def table(header, rows):
    """Markdown; the first column to the left, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    for seed in SEED_ROWS:
        name = f"benchmarks/seeds/seed{seed}.json"
        command = f"python deepham_ks.py --seed {seed} --output-dir runs/seed{seed}"
        metrics = load(root, name, command)
        if metrics["seed"] != seed:
            raise BadInput(f"{name} is of seed {metrics['seed']}")
        for kind in ("calibration", "economy", "config", "grid_config"):
            ours, theirs = [json.loads(json.dumps(of[kind] or {}), parse_float=lambda x: round(float(x), 12))
                            for of in (metrics, reference)]  # machines differ in the last bit
            odd = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            if odd:
                raise BadInput(f"{name}: {', '.join(odd)} not as in {REFERENCE}; run {command}")
        seeds[seed] = metrics
    return seeds


def machine(metrics):
    """One line: what it ran on and what it took."""
    seconds = metrics["seconds"]
    return (f"{metrics['device']}, torch {metrics['versions']['torch']}: training {seconds['training']:.0f} s, "
            f"grid {seconds['grid']:.0f} s, accuracy {seconds['accuracy']:.0f} s")


def span(numbers, digits):
    """The least and the largest of them, or one where both read the same."""
    ends = [show(number, digits) for number in (min(numbers), max(numbers))]
    return " to ".join(dict.fromkeys(ends))


def load_runs(root):
    """The reference run, which is of the default economy, and all seeds."""
    reference = load_reference(root)
    if not is_default(reference):
        raise BadInput(f"{REFERENCE} is not of the default economy; make it with: python deepham_ks.py")
    return reference, load_seeds(root, reference)


def summary(root):
    """This script, what others publish, and the grid that judges."""
    reference, seeds = load_runs(root)
    judged = [("Euler error, log10 mean, N=inf", 2), ("Euler error, log10 max, N=inf", 2), ("W1 of capital, N=50", 3)]

    def figures(who):
        return [show(row_of(reference, name)[who], digits) for name, digits in judged]

    spans = [span([row_of(metrics, name)["network"] for metrics in seeds.values()], digits) for name, digits in judged]
    seconds = reference["seconds"]
    return table(["", "seconds", "device", "Euler error, log10 mean", "max", "W1 (goods)"], [
        [f"this script, seed {reference['seed']}", show(seconds["training"], 0), reference["device"],
         *figures("network")],
        [f"{len(seeds)} seeds, least to most", span([at(x, "seconds training") for x in seeds.values()], 0),
         "CPU, 1 or 2 threads", *spans], *OTHERS,
        ["converged grid", show(seconds["grid"], 0), "CPU, 1 thread", *figures("grid")[:2], ""]])


def results(root):
    reference, seeds = load_runs(root)
    header = ["figure", f"network, seed {reference['seed']}", f"{len(seeds)} seeds, min to max", "grid",
              "published", "authors' network"]
    rows = []
    for name, shown, digits, authors in ROWS:
        row = row_of(reference, name)
        compared = name.startswith(("W1", "std", "|k'", "response"))  # with the grid, which has no such figure itself
        rows.append([shown, show(row["network"], digits),
                     span([row_of(metrics, name)["network"] for metrics in seeds.values()], digits),
                     "" if compared else show(row["grid"], digits),
                     "" if row["published"] is None else f"{row['published']:g}", authors])
    return f"`python deepham_ks.py` on {machine(reference)}.\n\n" + table(header, rows)


def seeds(root):
    """A row for each seed, and which rows of the verdict it fails."""
    header = ["seed", "trained on", "training (s)", "W1, N = 50", "W1, N = infinity", "Euler log10 mean / p99 / max",
              "Bellman, N = 50", "Bellman, N = infinity", "rows that fail"]
    rows = []
    for seed, metrics in load_seeds(root, load_reference(root)).items():
        numbers = [show(row_of(metrics, name)["network"], digits) for name, _, digits, *_ in ROWS]
        failed = [row["figure"] for row in metrics["verdict"] if row["passed"] is False]
        rows.append([str(seed), metrics["device"], show(metrics["seconds"]["training"], 1), *numbers[:2],
                     " / ".join(numbers[5:8]), *numbers[8:10], "; ".join(failed).replace("|", "\\|") or "none"])
    return table(header, rows)


def gamma2(root):
    command = "python deepham_ks.py --gamma 2 --output-dir runs/gamma2"
    metrics = load(root, "benchmarks/gamma2.json", command)
    if metrics["calibration"]["gamma"] != 2:
        raise BadInput(f"benchmarks/gamma2.json: gamma is {metrics['calibration']['gamma']}; run {command}")
    rows = [[shown, *(show(row_of(metrics, name)[who], digits) for who in ("network", "grid"))]
            for name, shown, digits, *_ in ROWS if "N=inf" in name]
    return f"`{command}` on {machine(metrics)}.\n\n" + table(["figure", "network", "grid"], rows)


def pairs(metrics, figures):
    """network / grid of figures (path, digits) in the limit."""
    return [" / ".join(show(at(metrics, f"{who} limit {path}"), digits) for who in ("network", "grid"))
            for path, digits in figures]


def load_examples(root):
    """name -> metrics, and states in words."""
    found = {}
    for name in EXAMPLES:
        file = f"benchmarks/examples/{name}.json"
        command = f"python examples/{name}.py --output-dir runs/{name}"
        metrics = load(root, file, command)
        if is_default(metrics):
            raise BadInput(f"{file} is of the default economy; make it with: {command}")
        economy = metrics["economy"]
        income = economy["income"] if "income" in economy else economy["labour"]
        found[name] = metrics, f"{len(income[0])} x {len(income)}"
    return found


def timings(root):
    """A line for each example: the command, what it is, what it takes, how near the grid it comes."""
    return "\n".join(
        f"- `python examples/{name}.py`: {EXAMPLES[name]}, {states} states, "
        f"{show(at(metrics, 'seconds training'), 0)} s, std of capital "
        f"{100 * at(metrics, 'comparison limit std_gap'):+.1f}% against the grid's{failing(metrics)}"
        for name, (metrics, states) in load_examples(root).items())


def failing(metrics):
    """How many rows of a run's verdict fail, if any."""
    rows = [row["passed"] for row in metrics["verdict"] if row["passed"] is not None]
    return f", {rows.count(False)} of {len(rows)} rows FAIL" if False in rows else ""


def examples(root):
    """Each example against the grid of the same economy."""
    header = ["example", "states (s x z)", "training (s)", "grid (s)", "mean K", "r (%)", "std of k", "Gini of wealth",
              "top 1 / 5 / 20% hold (%), network", "grid", "W1 (goods)", "Euler log10 mean"]
    shown = [("capital mean", 2), ("statistics interest_rate_percent", 3), ("capital std", 2), ("capital gini", 4)]
    rows = []
    for name, (metrics, states) in load_examples(root).items():
        top = [" / ".join(show(at(metrics, f"{who} limit capital top_percent_hold {q}"), 1) for q in (1, 5, 20))
               for who in ("network", "grid")]
        rows.append([f"`{name}`", states,
                     *(show(at(metrics, f"seconds {stage}"), 0) for stage in ("training", "grid")),
                     *pairs(metrics, shown), *top, show(at(metrics, "comparison limit w1"), 3),
                     *pairs(metrics, [("euler_log10 mean", 2)])])
    return table(header, rows)


PLANNER = {"market": "market", "planner_seed0": "planner"}


def planner(root):
    """Market and planner of Davila et al. (2012)."""
    command = "python benchmarks/planner.py"
    shown = [("capital mean", 2), ("statistics interest_rate_percent", 3), ("capital gini", 4), ("consumption gini", 4),
             ("welfare", 4), ("euler_log10 mean", 2)]
    header = ["economy", "mean K", "r (%)", "Gini of wealth", "Gini of consumption", "welfare (goods)",
              "Euler log10 mean", "W1 (goods)", "training (s)"]
    rows = []
    for file, name in PLANNER.items():
        metrics = load(root, f"benchmarks/planner/{file}.json", command)
        if "error" in metrics:
            rows.append([name, metrics["error"].removeprefix("deepham_ks: ")] + [""] * (len(header) - 2))
            continue
        rows.append([name, *pairs(metrics, shown), show(at(metrics, "comparison limit w1"), 3),
                     show(at(metrics, "seconds training"), 0)])
    return (f"`{command}`. Network / grid, N = infinity. Welfare: the constant consumption whose utility is the mean "
            "of u(c).\n\n" + table(header, rows))


def game(root):
    """How far a player's k' is from a price-taker's, network and grid."""
    rows = []
    for file in ("game",):
        metrics = load(root, f"benchmarks/planner/{file}.json", "python benchmarks/planner.py")
        moved = metrics["moved"]
        rows.append([f"{metrics['economy']['players']:,.0f}",
                     *(f"{moved[who]['mean']:.4f} / {moved[who]['max']:.4f}" for who in ("network", "grid")),
                     *(show(at(metrics, f"{who} limit capital mean"), 3) for who in ("network", "grid"))])
    return table(["players", "\\|k' - market's k'\\| mean / max (goods), network", "grid", "mean K, network", "grid"],
                 rows)


KINDS = ("K alone", "(K, L)", "learnt", "grid")


def load_labour(root):
    """kind of beliefs -> figures of each seed."""
    found = load(root, LABOUR, "python benchmarks/labour_flows.py")
    return {kind: found[kind] if isinstance(found[kind], list) else [found[kind]] for kind in KINDS}


def labour(root):
    """Where labour depends on the history of z: what beliefs of each kind leave."""
    rows = []
    for kind, runs in load_labour(root).items():
        rows.append([kind, str(len(runs)) if kind != "grid" else "", span([min(run["r2"]) for run in runs], 6),
                     *(span([run["euler"][size] for run in runs], 2) for size in ("mean", "p99")),
                     span([run["std"] for run in runs], 2), span([run["gini"] for run in runs], 4)])
    return table(["households see", "seeds", "R2 of the law of K, least over z", "Euler log10 mean", "p99",
                  "std of capital (goods)", "Gini of wealth"], rows)


def learnt(root):
    """The same in words, with what the learnt moment says."""
    runs = load_labour(root)
    euler = {kind: span([run["euler"]["mean"] for run in of], 2) for kind, of in runs.items()}
    r2 = {kind: span([min(run["r2"]) for run in of], 4) for kind, of in runs.items()}
    path = runs["learnt"][0]["path"]
    off = {kind: 100 * max(abs(K / K_learnt - 1) for K, K_learnt in zip(runs[kind][0]["path"], path))
           for kind in KINDS[:2]}
    says = [run["says"] for run in runs["learnt"]]
    shares = {name: [100 * of["explains"][name] for of in says] for name in says[0]["explains"]}
    best = max(shares, key=lambda name: min(shares[name]))
    return (f"Seeing K alone, households believe a law whose R2 is {r2['K alone']}, and Euler errors are "
            f"{euler['K alone']} (log10 mean).\nSeeing labour L as well, the default, they have {r2['(K, L)']} and "
            f"{euler['(K, L)']}; the grid in (K, L) has {euler['grid']}.\nWith one learnt moment more errors are "
            f"{euler['learnt']}. The {best} explains {span(shares[best], 0)}% of what K and L leave of that moment.\n"
            f"Through ten bad years, and ten good ones, K is up to {off['K alone']:.2f}% off that of the learnt moment "
            f"where K alone is seen, {off['(K, L)']:.2f}% where (K, L) is.")


def countercyclical(root):
    """Davila et al.'s economy where productivity is riskier in the bad state, beside Han, Yang & E (2021)."""
    rows = []
    for name, (K, r) in {"market": (34.30, 4.68), "planner": (95.81, -1.43)}.items():
        metrics = load(root, f"benchmarks/planner/cis_{name}.json", "python benchmarks/planner.py")
        if "error" in metrics:
            rows.append([name, metrics["error"].removeprefix("deepham_ks: "), "", "", "", "", "", ""])
            continue
        limit = [show(at(metrics, f"network limit {path}"), digits) for path, digits in
                 (("capital mean", 2), ("statistics interest_rate_percent", 2), ("capital gini", 3),
                  ("consumption gini", 3), ("euler_log10 mean", 2))]
        rows.append([name, *limit, f"{K:.2f}", f"{r:.2f}"])
    return table(["economy", "mean K", "r (%)", "Gini of wealth", "Gini of consumption", "Euler log10 mean",
                  "mean K, paper", "r (%), paper"], rows)


# Krusell & Smith (1998), tables 1 and 2 and the text: top 1 / 5 / 10 / 20 / 30%, below zero (%), Gini, mean K,
# corr(C, Y), std of I, corr(Y, Y 4 quarters before); None where they print nothing
KS98 = {"benchmark": ((3, 11, 19, 35, 46), 0, 0.25, 11.61, 0.701, 0.030, 0.481),
        "risk-aversion": ((None,) * 5, None, None, 12.32, 0.741, 0.033, 0.524),
        "stochastic-beta": ((24, 55, 73, 88, 92), 11, 0.82, 11.78, 0.825, 0.027, 0.459)}


def field(root):
    """Krusell & Smith's (1998) three models: the paper, network and grid."""
    rows = []
    for model, (top, below, *numbers) in KS98.items():
        metrics = load(root, f"benchmarks/field/{model}.json", "python benchmarks/field.py")
        rows.append([f"{model}, paper", " / ".join("-" if x is None else str(x) for x in top),
                     *["-" if x is None else f"{x:g}" for x in (below, *numbers)], ""])
        for who in ("network", "grid"):
            of = metrics[who]["limit"]["statistics"]
            held = " / ".join(show(of[f"top_{q}_percent_hold"], 1) for q in (1, 5, 10, 20, 30))
            rows.append([f"{model}, {who}", held, show(of["below_zero_percent"], 1), show(of["gini_wealth"], 3),
                         show(of["mean_K"], 2), show(of["corr_C_Y"], 3), show(of["std_ln_I"] * of["mean_I"], 4),
                         show(of["autocorr_4_Y"], 3), show(at(metrics, f"{who} limit euler_log10 mean"), 2)])
    return table(["model", "top 1 / 5 / 10 / 20 / 30% hold (%)", "k < 0 (%)", "Gini", "mean K", "corr(C, Y)",
                  "std of I (goods)", "autocorr. of Y, 4 quarters", "Euler log10 mean"], rows)


# Aiyagari (1994), table II: r in percent at (sigma, rho), for relative risk aversion 1, 3, 5
AIYAGARI = {(0.2, 0): (4.1666, 4.1456, 4.0858), (0.2, 0.3): (4.1365, 4.0432, 3.9054),
            (0.2, 0.6): (4.0912, 3.8767, 3.5857), (0.2, 0.9): (3.9305, 3.2903, 2.5260),
            (0.4, 0): (4.0649, 3.7816, 3.4177), (0.4, 0.3): (3.9554, 3.4188, 2.8032),
            (0.4, 0.6): (3.7567, 2.7835, 1.8070), (0.4, 0.9): (3.3054, 1.2894, -0.3456)}


def aiyagari(root):
    """Aiyagari's (1994) interest rates: the paper, network and grid."""
    cells, rows = load(root, "benchmarks/field/aiyagari.json", "python benchmarks/field.py")["cells"], []
    for (sigma, rho), published in AIYAGARI.items():
        row = [f"{sigma:g}, {rho:g}"]
        for gamma, r in zip((1, 3, 5), published):
            found = cells.get(f"{sigma:g} {rho:g} {gamma:g}")
            ours = [show(found[who]["r"] if found else None, 3) for who in ("network", "grid")]
            row.append(" / ".join([f"{r:.3f}", *ours]))
        rows.append(row)
    return table(["sigma, rho", *(f"risk aversion {gamma}" for gamma in (1, 3, 5))], rows)


GROUPS = {"two": ("2 groups, beta .9794 / .9930", "--groups 2 --spread 0.0136 --beta 0.9862"),
          "seven": ("7 groups, beta .9862 +- .0068, seeing their means",
                    "--groups 7 --spread 0.0068 --beta 0.9862 --moments groups")}


def groups(root):
    """Permanent groups who differ in patience, network / grid in K."""
    shown = [("capital mean", 2), ("capital std", 2), ("capital gini", 4), ("euler_log10 mean", 2),
             ("euler_log10 p99", 2)]
    rows = []
    for file, (name, flags) in GROUPS.items():
        metrics = load(root, f"benchmarks/groups/{file}.json", f"python examples/groups.py {flags}")
        top = [" / ".join(show(at(metrics, f"{who} limit capital top_percent_hold {q}"), 1) for q in (1, 5, 20))
               for who in ("network", "grid")]
        rows.append([name, *pairs(metrics, shown), *top, show(at(metrics, "comparison limit w1"), 2),
                     show(at(metrics, "seconds training"), 0)])
    return table(["economy", "mean K", "std of k", "Gini of wealth", "Euler log10 mean", "p99",
                  "top 1 / 5 / 20% hold (%), network", "grid", "W1 (goods)", "training (s)"], rows)


def moments(root):
    """One learnt moment, in three seeds, beside the unemployment share given in its place and K alone."""
    command, reference = "python benchmarks/moments.py", load_reference(root)
    learnt = [load(root, f"benchmarks/moments/seed{seed}.json", command) for seed in range(3)]
    given = load(root, "benchmarks/moments/unemployment.json", command)

    def of(metrics, who, size):
        return metrics["middle"][who] if size == "middle" else metrics[who][size]

    rows = []
    for name, path, digits in (("Bellman error, own c, mean (utils)", "bellman_own_c mean", 5),
                               ("Euler error, log10 mean", "euler_log10 mean", 2)):
        for N, size in (("50", "small"), ("500", "middle"), ("infinity", "limit")):
            alone = "" if size == "middle" else show(at(reference["network"][size], path), digits)
            rows.append([name, N, span([at(of(run, "network", size), path) for run in learnt], digits),
                         show(at(of(given, "network", size), path), digits), alone,
                         show(at(of(given, "grid", size), path), digits)])
            name = ""
    return table(["figure", "N", "one learnt moment", "unemployment share given", "K alone", "grid in K"], rows)


def mechanisms(root):
    """What each mechanism buys, as benchmarks/ablation.py has it."""
    runs = load(root, "benchmarks/ablation.json", "python benchmarks/ablation.py")
    return runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))["table"](runs)


BLOCKS = {"summary": summary, "results": results, "seeds": seeds, "gamma2": gamma2, "timings": timings,
          "examples": examples, "planner": planner, "countercyclical": countercyclical, "game": game, "labour": labour,
          "learnt": learnt, "field": field, "aiyagari": aiyagari, "groups": groups,
          "moments": moments, "mechanisms": mechanisms}


def rewritten(text, root, page):
    """A page with every block that it has markers for."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if text.count(start) != text.count(end) or text.count(start) > 1:
            raise BadInput(f"{page}: {start} and {end} must stand there once each, or not at all")
        if start in text:
            before, rest = text.split(start)
            if end not in rest:
                raise BadInput(f"{page}: {end} stands before {start}")
            text = f"{before}{start}\n{block(root)}\n{end}{rest.split(end)[1]}"
    if page == "README.md" and "<!-- summary:start -->" not in text:
        raise BadInput("README.md: no line <!-- summary:start -->")
    return text


def main(argv=None, root=ROOT):
    """0 done or nothing to do, 1 --check found a difference, 2 a file is missing or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page would change")
    check = parser.parse_args(argv).check
    try:
        before = {page: (root / page).read_text(encoding="utf-8") for page in PAGES}
        after = {page: rewritten(text, root, page) for page, text in before.items()}
    except KeyError as error:
        print(f"readme_tables: a metrics file has no {error}; make it with this deepham_ks.py", file=sys.stderr)
        return 2
    except (BadInput, OSError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    changed = [page for page in PAGES if after[page] != before[page]]
    if check and changed:
        print(f"{', '.join(changed)}: tables are not those of the metrics; run python tools/readme_tables.py",
              file=sys.stderr)
        return 1
    for page in changed:
        (root / page).write_text(after[page], encoding="utf-8")
        print(f"{page}: tables rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
