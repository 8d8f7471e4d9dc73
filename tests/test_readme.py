"""The README and docs/: tables are those of the committed metrics, flags, files and tests exist, the examples run."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT

import deepham_ks as dk

TOOL = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))
README = ROOT / "README.md"
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][A-Za-z0-9-]*")
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
KIND = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"[\w.*/-]+(\.(py|md|txt|json|csv|png|pth|pt|ipynb|sh|cff|toml|cuh?)|/)|LICENSE|\.ci/run")
# what a user's own run writes
ONLY_IN_RUNS = re.compile(r"(checkpoint(\.previous)?\.pt|NN_weights_biases\.previous\.pth|figures/moments\.png|"
                          r"(runs|\.venv)/.*)")


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def change():
    """docs/change.md, which has the diffs."""
    return (ROOT / "docs" / "change.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def texts(readme):
    """The README and the files of docs/, as one."""
    return "\n".join([readme, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))])


@pytest.fixture(scope="module")
def reference():
    """metrics.json of the committed run."""
    return json.loads((ROOT / TOOL["REFERENCE"]).read_text())


def code_lines(readme):
    """Lines of the fenced blocks, continued ones joined, without comments."""
    lines = "".join(FENCED.findall(readme)).replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


@cache
def flags_of(script):
    """Those of python script --help."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.delitem(sys.modules, "ipykernel", raising=False)  # of test_notebook.py; main() takes it for a notebook
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return set(FLAG.findall(said.getvalue()))


def test_tables_are_those_of_the_committed_metrics(capsys):
    assert TOOL["main"](["--check"], ROOT) == 0, capsys.readouterr().err


def test_every_page_is_short_and_the_readme_has_a_list_of_all(readme):
    assert readme.count("\n") <= 150 and len(readme.split()) <= 1500
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert sorted(re.findall(r"^- \[docs/(.*?)\]", readme, re.MULTILINE)) == pages
    assert all((ROOT / "docs" / page).read_text(encoding="utf-8").count("\n") < 200 for page in pages)


def test_the_committed_run_is_the_one_of_the_tables():
    """As committed: the job of reproduce.sh replaces metrics.json, and the tables stay."""
    shown = subprocess.run(["git", "-C", str(ROOT), "show", "HEAD:metrics.json"], capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("no git checkout")
    assert json.loads(shown.stdout) == json.loads((ROOT / TOOL["REFERENCE"]).read_text())


def test_every_flag_in_a_code_block_exists(texts):
    asked = []
    for line in code_lines(texts):
        line = line.replace("bash reproduce.sh test", "").replace("bash reproduce.sh", "python deepham_ks.py")
        for script, rest in re.findall(r"(\S+\.py)\b([^|;&]*)", line):
            asked += [(script, name) for name in FLAG.findall(rest)]
    assert asked, "the README shows no command with a flag"
    unknown = [f"{script} {name}" for script, name in asked if name not in flags_of(script)]
    assert not unknown, f"not in --help: {unknown}"


def test_every_flag_in_the_text_exists(texts):
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", texts))
    known = flags_of("deepham_ks.py") | flags_of("tools/readme_tables.py")
    unknown = {name for span in spans if span.startswith("--") for name in FLAG.findall(span)} - known
    assert not unknown, f"not in --help: {unknown}"


def braces(name):
    """a{b,c} -> ab, ac."""
    found = re.search(r"\{([^{}]*)\}", name)
    if not found:
        return [name]
    return [full for part in found[1].split(",")
            for full in braces(name[: found.start()] + part.strip() + name[found.end() :])]


def test_every_link_leads_to_a_file():
    """From the page that it stands in."""
    pages = [README, ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
             if not re.match(r"\w+:|#", link)]
    assert links and not [link for page, link in links if not (page.parent / link.split("#")[0]).exists()]


def test_every_file_that_is_named_exists(texts):
    text = re.sub(r"\]\([^)\s]+\)", "]", FENCED.sub("", texts))
    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    words += [word for line in code_lines(texts) for word in line.split()]
    named = [name for word in words for name in braces(word.strip("'\",;:()")) if PATH.fullmatch(name)]
    named = [name for name in named if not name.startswith("/")]
    assert named
    missing = {name for name in named if not ONLY_IN_RUNS.fullmatch(name) and not any(ROOT.glob(name.rstrip("/")))}
    assert not missing


def test_one_version_everywhere(readme, capsys):
    with pytest.raises(SystemExit) as end:
        dk.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.split()[-1] == dk.__version__
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.findall(r"version = \{(.*?)\}", readme) == [cited]
    assert cited == dk.__version__ == re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]


def test_badge_is_that_of_the_notebook(readme):
    """With the address that it has, if any."""
    notebook = runpy.run_path(str(ROOT / "tools" / "notebook.py"))
    opens = re.search(r"research\.google\.com/(github)/([\w.-]+/[\w.-]+)/blob/", readme)
    address = opens and f"https://{opens[1]}.com/{opens[2]}"
    assert notebook["readme_with_badge"](readme, address or "") == readme, "run python tools/notebook.py"
    assert "Open In Colab" in notebook["readme_with_badge"](readme, "https://github.com/some/one")


def test_every_test_that_is_named_exists(texts):
    """`test_x` and, in the last brackets of a line of a table, the file where it is not test_nothing_lost.py."""
    named = set(re.findall(r"`(test_\w+)`(?: \(`tests/(\w+)\.py`\))?", FENCED.sub("", texts)))
    missing = [name for name, file in named
               if f"def {name}(" not in (ROOT / "tests" / f"{file or 'test_nothing_lost'}.py").read_text()]
    assert not missing


def keys_of(x):
    """Keys of nested dicts, in words."""
    if not isinstance(x, dict):
        return set()
    return {key for key in x if not key.isdigit()} | {key for part in x.values() for key in keys_of(part)}


def test_output_names_every_key_and_column(reference):
    """Of the committed run: docs/output.md has each key of metrics.json and of the weights, each column."""
    told = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "output.md").read_text(encoding="utf-8")))
    tables = ("calibration", "economy", "config", "grid_config", "versions", "seconds", "impulse_response_gap")
    found = keys_of({name: {} if name in tables else x for name, x in reference.items() if name != "comparison"})
    found |= keys_of({name: x for name, x in reference["comparison"].items() if name not in tables})
    found |= {*reference["verdict"][0], *dk.HISTORY, *dk.load(ROOT / dk.WEIGHTS).weights}
    assert not found - told


def from_file(path, name):
    """The module in a file, under another name than any that is loaded."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(monkeypatch):
    """Whatever a module or a path is set to is undone."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
    for name in ("changed_script", "changed_example"):
        monkeypatch.setitem(sys.modules, name, None)


def test_another_calibration_has_a_folder_of_its_own(change):
    """The worked example, and where it goes without --output-dir."""
    (command,) = {line.strip() for line in code_lines(change) if "--gamma 2" in line}
    words = shlex.split(command)
    assert dk.parse(words[words.index("deepham_ks.py") + 1 :]).economy.gamma == 2
    assert f"`{dk.parse(['--gamma', '2']).run.output_dir}`" in change and dk.parse([]).run.output_dir == "."


@pytest.mark.parametrize("script, flags", [
    ("stochastic_beta", ["--beta", "0.9"]), ("davila", ["--z-duration", "9"]),
    ("castaneda", ["--tfp-shock", "0", "--z-duration", "9"]),
    ("groups", ["--groups", "1", "--spread", "0.01"])])
def test_an_example_refuses_a_flag_that_has_no_effect(script, flags, quick):
    example = runpy.run_path(str(ROOT / "examples" / f"{script}.py"))
    with pytest.raises(dk.UserError, match=flags[-2]):
        dk.parse(flags, example["economy"], example["Calibration"])
    assert len((ROOT / "examples" / f"{script}.py").read_text().splitlines()) <= 60


def changed(change, file):
    """The text of a file after the page's diff of it, whose lines stand in the file one after the other."""
    (diff,) = [block for kind, block in KIND.findall(change) if kind == "diff" and f"--- {file}\n" in block]
    text, at = (ROOT / file).read_text(encoding="utf-8"), 0
    for hunk in diff.split("\n", 1)[1].split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert any(line[0] == "-" for line in lines) and old in text[at:], hunk
        at = text.index(old, at)
        text = text[:at] + text[at:].replace(old, "".join(line[1:] for line in lines if line[0] in " +"), 1)
    return text


def test_new_utility_of_the_page_runs(change, tmp_path, quick):
    (tmp_path / "changed.py").write_text(changed(change, "deepham_ks.py"))
    script = from_file(tmp_path / "changed.py", "changed_script")
    solution = script.solve(None, "smoke", compile="none", device="cpu")
    assert np.isfinite(list(solution.weights["history"].values())).all()
    c = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert torch.allclose(script.inverse_utility(script.utility(c, solution.econ), solution.econ), c)
    assert torch.allclose(script.inverse_marginal_utility(script.marginal_utility(c, solution.econ), solution.econ), c)


def test_new_state_of_the_page_runs(change, tmp_path, quick):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "changed.py").write_text(changed(change, "examples/stochastic_beta.py"))
    example = from_file(tmp_path / "examples" / "changed.py", "changed_example")
    solution = dk.solve(example.economy(example.Calibration()), "smoke", compile="none", device="cpu")
    assert solution.next_capital(40.0, range(8), solution.K_mean, 1).shape == (8,)


def test_python_of_the_readme_runs(readme, tmp_path, monkeypatch, capsys):
    """An economy and what comes out of it. It says which line writes a file: only that one does."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for kind, block in KIND.findall(readme) if kind == "python"]
    assert [len(block.splitlines()) <= most for block, most in zip(blocks, (15, 10))] == [True, True]
    code, names = "".join(blocks), {}
    exec(compile(code, "README.md", "exec"), names)
    assert [path.name for path in tmp_path.iterdir()] == re.findall(r'save\("(.*?)"\)', code)
    assert isinstance(names["solution"], dk.Solution) and isinstance(names["grid"], dk.GridSolution)
    assert names["economy"].arrays.income[0] == pytest.approx([0.3, 1 - 0.075, 2 * (1 - 0.075)])  # after taxes
    assert capsys.readouterr().out and names["mean"].shape == (40,)


def labour_flows():
    """As benchmarks/labour_flows.py writes it."""
    def run(seed, mean, r2, path, **more):
        euler = {"mean": mean, "p99": mean + 0.5, "max": mean + 1}
        return {"seed": seed, "euler": euler, "std": 20 + seed, "gini": 0.3, "mean": 39.0, "r2": r2, "path": path,
                "seconds": 99.0, **more}

    says = [{"r2_on_K_and_L": 0.9, "explains": {"std of k": one, "mean of root k": other}}
            for one, other in ((0.5, 0.61), (0.9, 0.62), (0.6, 0.84))]
    grid = {name: x for name, x in run(0, -4.4, [0.99985, 0.9999], [10, 10]).items() if name not in ("seed", "seconds")}
    return {"K alone": [run(0, -2.96, [0.991, 0.98765], [10, 10.2])],
            "(K, L)": [run(i, -4.5 + i / 10, [0.9999, 0.9998], [10, 9.99]) for i in range(3)],
            "learnt": [run(i, -5.0, [0.99991, 0.9999], [10, 10], says=says[i]) for i in range(3)], "grid": grid}


@pytest.fixture
def project(reference, tmp_path):
    """All pages with their markers, the metrics of the reference run in the place of every run's."""
    metrics = json.loads(json.dumps(reference))
    unpublished = [row | {"published": None} for row in metrics["verdict"]]
    for folder in ("benchmarks/seeds", "benchmarks/examples", "benchmarks/planner", "docs"):
        (tmp_path / folder).mkdir(parents=True)

    def write(name, **changes):
        (tmp_path / name).write_text(json.dumps(metrics | changes))

    for seed in range(10):
        write(f"benchmarks/seeds/seed{seed}.json", seed=seed)
    write("benchmarks/gamma2.json", calibration=metrics["calibration"] | {"gamma": 2.0}, verdict=unpublished)
    for example in TOOL["EXAMPLES"]:
        write(f"benchmarks/examples/{example}.json", verdict=unpublished)
    for file in TOOL["PLANNER"]:
        write(f"benchmarks/planner/{file}.json", verdict=unpublished)
    moved = {"network": {"mean": 0.0123, "max": 0.4}, "grid": {"mean": 0.0112, "max": 0.3}}
    for file in ("game", "game_5000"):
        write(f"benchmarks/planner/{file}.json", moved=moved)
    (tmp_path / TOOL["LABOUR"]).write_text(json.dumps(labour_flows()))
    for folder in ("benchmarks/groups", "benchmarks/moments"):
        (tmp_path / folder).mkdir()
    for file in TOOL["GROUPS"]:
        write(f"benchmarks/groups/{file}.json")
    for file in ("seed0", "seed1", "seed2", "unemployment"):
        write(f"benchmarks/moments/{file}.json", middle={who: metrics[who]["small"] for who in ("network", "grid")})
    off = {"w1": 0.02, "std_gap": -0.001, "bellman": 4e-5, "converged": True, "fails": ["W1"],
           "euler": {"mean": -5.1, "p99": -4.5, "max": -3.7}}
    runs = {f"{name}, seed {seed}": off for name in ("nothing off", "robust weights") for seed in range(3)}
    (tmp_path / "benchmarks/ablation.json").write_text(json.dumps(runs))
    for page, names in (("README.md", ("summary", "timings", "learnt")), ("docs/method.md", ("mechanisms",)),
                        ("docs/results.md", ("results", "seeds", "gamma2", "examples", "planner", "game", "labour",
                                             "groups", "moments"))):
        blocks = [f"text before\n<!-- {name}:start -->\nto be written\n<!-- {name}:end -->\n" for name in names]
        (tmp_path / page).write_text("".join(blocks) + "text after\n")
    return tmp_path, metrics, write


def block(root, name):
    text = "".join((root / page).read_text() for page in TOOL["PAGES"])
    return text.split(f"<!-- {name}:start -->")[1].split(f"<!-- {name}:end -->")[0]


def test_tables_are_written_between_the_markers(project, capsys):
    root, metrics, write = project
    assert TOOL["main"](["--check"], root) == 1 and "to be written" in (root / "README.md").read_text()
    assert TOOL["main"]([], root) == 0
    for page in TOOL["PAGES"]:
        text = (root / page).read_text()
        assert "to be written" not in text and text.startswith("text before\n") and text.endswith("text after\n")
    w1 = [line for line in block(root, "results").splitlines() if line.startswith("| W1 distance")][0].split(" | ")
    value = f"{metrics['comparison']['small']['w1']:.3f}"
    assert w1[1:] == [value, value, "", "0.16", "9.2 |"]
    assert len([line for line in block(root, "results").splitlines() if line.startswith("| ")]) == 2 + 12
    assert len([line for line in block(root, "seeds").splitlines() if re.match(r"\| [0-9] \| ", line)]) == 10
    rows = [line.split(" | ") for line in block(root, "summary").splitlines() if line.startswith("| ")][2:]
    assert len(rows) <= 8 and rows[0][-1] == f"{value} |" and [row[-1] for row in rows[2:]].count(" |") == 3
    assert rows[0][1:3] == [f"{metrics['seconds']['training']:.0f}", metrics["device"]]
    assert rows[-1][1] == f"{metrics['seconds']['grid']:.0f}" and "9.2 |" in rows[2] and "0.16 |" in rows[-2]
    assert TOOL["main"](["--check"], root) == 0 and TOOL["main"]([], root) == 0
    worse = json.loads(json.dumps(metrics["verdict"]))
    worse[0] |= {"network": 99.125, "passed": False}
    write("benchmarks/seeds/seed3.json", seed=3, verdict=worse)
    assert TOOL["main"](["--check"], root) == 1 and TOOL["main"]([], root) == 0
    assert f"| {value} to 99.125 |" in block(root, "results") and f"{value} to 99.125 |" in block(root, "summary")
    (row,) = [line for line in block(root, "seeds").splitlines() if line.startswith("| 3 |")]
    assert worse[0]["figure"] in row.split(" | ")[-1]


def test_rows_of_examples_planner_and_game(project):
    root, metrics, write = project
    network, grid = metrics["network"]["limit"], metrics["grid"]["limit"]
    unpublished = [row | {"published": None} for row in metrics["verdict"]]
    write("benchmarks/examples/davila.json", economy={"labour": [[1.0, 5.29, 46.55]]}, verdict=unpublished)
    (root / "benchmarks/planner/planner_seed0.json").write_text('{"error": "deepham_ks: error: no answer"}')
    assert TOOL["main"]([], root) == 0
    rows = [line.split(" | ") for line in block(root, "examples").splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in TOOL["EXAMPLES"]]
    assert rows[0][1] == "2 x 2" and rows[1][1] == "3 x 1"
    lines = block(root, "timings").strip().splitlines()
    assert [line.split("`")[1] for line in lines] == [f"python examples/{name}.py" for name in TOOL["EXAMPLES"]]
    assert "3 x 1 states" in lines[1] and f"{100 * metrics['comparison']['limit']['std_gap']:+.1f}%" in lines[1]
    assert rows[1][4] == " / ".join(f"{x['capital']['mean']:.2f}" for x in (network, grid))
    rows = [line.split(" | ") for line in block(root, "planner").splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [f"| {name}" for name in TOOL["PLANNER"].values()]
    assert rows[0][5] == f"{network['welfare']:.4f} / {grid['welfare']:.4f}" and rows[1][1] == "error: no answer"
    assert "| 50 | 0.0123 / 0.4000 | 0.0112 / 0.3000 |" in block(root, "game")


def test_groups_moments_and_mechanisms(project):
    root, metrics, _ = project
    assert TOOL["main"]([], root) == 0
    both = metrics["network"]["limit"], metrics["grid"]["limit"]
    rows = {name: [line[2:-2].split(" | ") for line in block(root, name).splitlines() if line.startswith("| ")]
            for name in ("groups", "moments", "mechanisms")}
    assert rows["groups"][-1][2] == " / ".join(f"{x['capital']['std']:.2f}" for x in both)
    small = f"{metrics['network']['small']['euler_log10']['mean']:.2f}"
    assert [row[1] for row in rows["moments"]][2:] == ["50", "500", "infinity"] * 2 and rows["moments"][5][2] == small
    assert [row[0] for row in rows["mechanisms"]] == ["mechanism", "nothing off", "robust weights"]
    assert rows["mechanisms"][2][2:4] == ["3", "0.020"] and rows["mechanisms"][2][-1] == "1"


def test_labour_in_a_table_and_in_words(project):
    root, *_ = project
    assert TOOL["main"]([], root) == 0
    rows = [line.strip("| ").split(" | ") for line in block(root, "labour").splitlines() if line.startswith("| ")][2:]
    assert rows == [["K alone", "1", "0.987650", "-2.96", "-2.46", "20.00", "0.3000"],
                    ["(K, L)", "3", "0.999800", "-4.50 to -4.30", "-4.00 to -3.80", "20.00 to 22.00", "0.3000"],
                    ["learnt", "3", "0.999900", "-5.00", "-4.50", "20.00 to 22.00", "0.3000"],
                    ["grid", "", "0.999850", "-4.40", "-3.90", "20.00", "0.3000"]]
    words = block(root, "learnt")
    assert "R2 is 0.9876" in words or "R2 is 0.9877" in words
    assert "The mean of root k explains 61 to 84%" in words and "2.00% off" in words and "0.10% where" in words


def test_published_numbers_are_the_default_economys(project):
    root, metrics, write = project
    assert TOOL["main"]([], root) == 0
    assert "published | authors' network |" in block(root, "results") and "| 9.2 |" in block(root, "results")
    for name in ("gamma2", "examples", "seeds"):
        assert "published" not in block(root, name) and "authors" not in block(root, name)
        assert not re.search(r"\| (9\.2|0\.16|0\.0184) \|", block(root, name))


def stale(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=1, config=metrics["config"] | {"hidden": 99})


def misnamed(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=2)


def other_table(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=1, economy=metrics["economy"] | {"TFP": [0.5, 1.5]})


def other_grid(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=1, grid_config=None)


def other_economy(root, metrics, write):
    write(TOOL["REFERENCE"], verdict=[row | {"published": None} for row in metrics["verdict"]])


def no_example(root, metrics, write):
    (root / "benchmarks" / "examples" / "davila.json").unlink()


def no_labour(root, metrics, write):
    (root / TOOL["LABOUR"]).unlink()


def default_for_an_example(root, metrics, write):
    write("benchmarks/examples/davila.json")


def older(root, metrics, write):
    write(TOOL["REFERENCE"], verdict=[row for row in metrics["verdict"] if "W1" not in row["figure"]])


def other_gamma(root, metrics, write):
    write("benchmarks/gamma2.json")


def no_reference(root, metrics, write):
    (root / TOOL["REFERENCE"]).unlink()


def no_seed(root, metrics, write):
    (root / "benchmarks" / "seeds" / "seed2.json").unlink()


def no_markers(root, metrics, write):
    (root / "README.md").write_text("text\n")


def half_a_marker(root, metrics, write):
    (root / "README.md").write_text("<!-- summary:start -->\n")


@pytest.mark.parametrize("spoil, told", [
    (stale, "hidden not as in benchmarks/seeds/seed0.json"), (other_table, "TFP not as in benchmarks/seeds/seed0.json"),
    (other_grid, "n_k, n_K"), (other_economy, "not of the default economy"), (older, "has no 'W1 of capital, N=50'"),
    (no_example, "python examples/davila.py --output-dir runs/davila"),
    (no_labour, "make it with: python benchmarks/labour_flows.py"),
    (default_for_an_example, "davila.json is of the default economy"), (misnamed, "is of seed 2"),
    (other_gamma, "gamma is 1.0"),
    (no_reference, "make it with: python deepham_ks.py"), (no_seed, "--seed 2"), (no_markers, "no line"),
    (half_a_marker, "once each")])
def test_what_does_not_fit_is_refused_in_a_line(project, capsys, spoil, told):
    root, metrics, write = project
    spoil(*project)
    before = (root / "README.md").read_text()
    assert TOOL["main"]([], root) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert (root / "README.md").read_text() == before
