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
from conftest import ROOT

import deepham_ks as dk

TOOL = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))
README = ROOT / "README.md"
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][A-Za-z0-9-]*")
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
KIND = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"[\w.*/-]+(\.(py|md|txt|json|csv|png|pth|pt|ipynb|sh|cff|toml|cuh?)|/)|LICENSE|\.ci/run")
# what a user's own run writes
ONLY_IN_RUNS = re.compile(r"(checkpoint(\.previous)?\.pt|figures/moments\.png|(runs|\.venv)/.*)")


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def texts(readme):
    """The README and the files of docs/, as one."""
    return "\n".join([readme, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))])


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
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return set(FLAG.findall(said.getvalue()))


@pytest.mark.skipif(not (ROOT / "benchmarks" / "seeds").is_dir(), reason="no benchmarks/seeds: seeds have not been run")
def test_tables_are_those_of_the_committed_metrics(capsys):
    assert TOOL["main"](["--check"], ROOT) == 0, capsys.readouterr().err


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


def test_every_file_that_is_named_exists(texts):
    text = FENCED.sub("", texts)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    words += [word for line in code_lines(texts) for word in line.split()]
    named = [name for word in words for name in braces(word.strip("'\",;:()")) if PATH.fullmatch(name)]
    named = [name for name in named if not name.startswith("/")]
    assert named
    missing = {name for name in targets + named
               if not ONLY_IN_RUNS.fullmatch(name) and not any(ROOT.glob(name.split("#")[0].rstrip("/")))}
    assert not missing


def test_one_version_everywhere(capsys):
    with pytest.raises(SystemExit) as end:
        dk.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.split()[-1] == dk.__version__
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == dk.__version__ == re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]


def test_badge_is_that_of_the_notebook(readme):
    """With the address of the committed notebook; without one the README says how to go on."""
    notebook = runpy.run_path(str(ROOT / "tools" / "notebook.py"))
    address = re.search(r'REPOSITORY = \\"(.*?)\\"', (ROOT / "deepham_ks.ipynb").read_text(encoding="utf-8"))[1]
    assert notebook["readme_with_badge"](readme, address) == readme, "run python tools/notebook.py"
    assert "Open In Colab" in notebook["readme_with_badge"](readme, "https://github.com/some/one")


def test_every_test_that_is_named_exists(texts):
    """`test_x` and, in the last brackets of a line of a table, the file where it is not test_nothing_lost.py."""
    named = set(re.findall(r"`(test_\w+)`(?: \(`tests/(\w+)\.py`\))?", FENCED.sub("", texts)))
    missing = [name for name, file in named
               if f"def {name}(" not in (ROOT / "tests" / f"{file or 'test_nothing_lost'}.py").read_text()]
    assert not missing


def smoke(module, folder, *flags, **economy):
    """metrics.json of a smoke run of a module that is, or is a changed copy of, deepham_ks."""
    module.draw_figures = lambda *a: None
    argv = ["--preset", "smoke", "--device", "cpu", "--compile", "none", *flags, "--output-dir", str(folder)]
    assert module.main(argv, **economy) == 0
    return json.loads((folder / "metrics.json").read_text())


def from_file(path, name):
    """The module in a file, under another name than any that is loaded."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(monkeypatch):
    """No drawing, and whatever a module or a path is set to is undone."""
    monkeypatch.setattr(dk, "draw_figures", dk.draw_figures)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(dk.Interrupted, "script", dk.Interrupted.script)
    for name in ("changed_script", "changed_example"):
        monkeypatch.setitem(sys.modules, name, None)


def test_risk_aversion_example_runs(readme, tmp_path, quick):
    """The README's worked example, with smoke sizes."""
    (command,) = {line.strip() for line in code_lines(readme) if "--gamma 2" in line}
    words = shlex.split(command)
    flags = words[words.index("deepham_ks.py") + 1 :]
    assert smoke(dk, tmp_path, *flags)["calibration"]["gamma"] == 2


def changed(readme, file):
    """The text of a file after the README's diff of it, whose lines stand in the file one after the other."""
    (diff,) = [block for kind, block in KIND.findall(readme) if kind == "diff" and f"--- {file}\n" in block]
    text, at = (ROOT / file).read_text(encoding="utf-8"), 0
    for hunk in diff.split("\n", 1)[1].split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert any(line[0] == "-" for line in lines) and old in text[at:], hunk
        at = text.index(old, at)
        text = text[:at] + text[at:].replace(old, "".join(line[1:] for line in lines if line[0] in " +"), 1)
    return text


def test_new_utility_of_the_readme_runs(readme, tmp_path, quick):
    (tmp_path / "changed.py").write_text(changed(readme, "deepham_ks.py"))
    metrics = smoke(from_file(tmp_path / "changed.py", "changed_script"), tmp_path / "run")
    assert all(np.isfinite(row["network"]) for row in metrics["verdict"])


def test_new_state_of_the_readme_runs(readme, tmp_path, quick):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "changed.py").write_text(changed(readme, "examples/stochastic_beta.py"))
    example = from_file(tmp_path / "examples" / "changed.py", "changed_example")
    coarse = ["--grid-n-k", "40", "--grid-n-k-fine", "80", "--grid-periods", "500", "--grid-tolerance", "1e-3"]
    metrics = smoke(dk, tmp_path / "run", *coarse, economy=example.economy)
    assert np.shape(metrics["economy"]["income"]) == (2, 8)


def test_python_of_the_readme_runs(readme, tmp_path, monkeypatch, capsys):
    """It says which line writes a file: only that one does."""
    monkeypatch.chdir(tmp_path)
    (code,) = [block for kind, block in KIND.findall(readme) if kind == "python"]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert [path.name for path in tmp_path.iterdir()] == re.findall(r'save\("(.*?)"\)', code)
    assert isinstance(names["solution"], dk.Solution) and isinstance(names["grid"], dk.GridSolution)


@pytest.fixture
def project(smoke_run, tmp_path):
    """A README with all markers and the metrics of a smoke run in the place of every run's."""
    metrics = json.loads((smoke_run[0] / "metrics.json").read_text())
    (tmp_path / "benchmarks" / "seeds").mkdir(parents=True)

    def write(name, **changes):
        (tmp_path / name).write_text(json.dumps(metrics | changes))

    for seed in range(10):
        write(f"benchmarks/seeds/seed{seed}.json", seed=seed)
    unpublished = [row | {"published": None} for row in metrics["verdict"]]
    write("benchmarks/gamma2.json", calibration=metrics["calibration"] | {"gamma": 2.0}, verdict=unpublished)
    (tmp_path / "benchmarks" / "examples").mkdir()
    for example in TOOL["EXAMPLES"]:
        write(f"benchmarks/examples/{example}.json", verdict=unpublished)
    for folder in ("planner", "calibrations"):
        (tmp_path / "benchmarks" / folder).mkdir()
    for file in TOOL["PLANNER"]:
        write(f"benchmarks/planner/{file}.json", verdict=unpublished)
    moved = {"network": {"mean": 0.0123, "max": 0.4}, "grid": {"mean": 0.0112, "max": 0.3}}
    for file in ("game", "game_5000"):
        write(f"benchmarks/planner/{file}.json", moved=moved)
    good = {"flags": "--gamma 3", "seed": 0, "w1_percent": 0.1, "std_percent": -0.5, "policy_percent": 0.01,
            "euler_mean": -4.0, "euler_mean_grid": -4.05, "euler_p99": -3.0, "euler_p99_grid": -3.1, "bellman": 1e-4,
            "bellman_grid": 1e-4, "seconds": 100.0, "iterations": 60, "converged": True}
    for i, changes in enumerate(({}, {"seed": 1, "std_percent": 1.5, "bellman": 2e-4}, {"flags": "--mu 0.9"})):
        (tmp_path / f"benchmarks/calibrations/{i}.json").write_text(json.dumps(good | changes))
    (tmp_path / "benchmarks/calibrations/3.json").write_text(json.dumps({"flags": "--mu 1", "seed": 0, "error": "no"}))
    for folder in ("moments", "groups"):
        (tmp_path / "benchmarks" / folder).mkdir()
    learnt = json.loads(json.dumps(metrics["network"]))
    learnt["small"]["moments"] = {name: {"K": [0.25], "unemployment": [-0.75]} for name in ("policy", "value")}
    curvature = [{"draws": 200, "V_utils": x} for x in (4e-5, 6e-7)]
    write("benchmarks/moments/seed0.json", network=learnt, curvature=curvature,
          middle={who: metrics[who]["small"] for who in ("network", "grid")})
    of_judge = {who: {"euler_log10": {"mean": x, "p99": x + 0.5}} for who, x in (("network", -3.9), ("grid", -4.1))}
    for J in (3, 30):
        write(f"benchmarks/groups/J{J}.json", groups=J, states=2 * J, parameters=1000 * J, seconds=10.0 * J,
              iterations=80, memory_gb={"host": 0.5}, w1=0.01 * J, **of_judge)
    blocks = [f"text before\n<!-- {name}:start -->\nto be written\n<!-- {name}:end -->\n" for name in TOOL["BLOCKS"]]
    (tmp_path / "README.md").write_text("".join(blocks) + "text after\n")
    return tmp_path, metrics, write


def test_tables_are_written_between_the_markers(project, capsys):
    root, metrics, write = project
    assert TOOL["main"](["--check"], root) == 1 and "to be written" in (root / "README.md").read_text()
    assert TOOL["main"]([], root) == 0
    text = (root / "README.md").read_text()
    assert "to be written" not in text and text.startswith("text before\n") and text.endswith("text after\n")
    (w1,) = {line for line in text.splitlines() if line.startswith("| W1 distance") and line.endswith("| 9.2 |")}
    value = f"{metrics['comparison']['small']['w1']:.3f}"
    assert w1.split("|")[2:5] == [" 20 ", f" {value} ", f" {value} to {value} "]
    until = text[: text.index("gamma2")]
    limit = [line.split("|")[1:4] for line in until.splitlines() if "| inf |" in line]
    euler = f" {metrics['network']['limit']['euler_log10']['mean']:.2f} "
    rest = metrics["network"]["limit"]["risky_steady_state"]
    assert len(limit) == 10 and limit[0] == ["  ", " inf ", f" {metrics['comparison']['limit']['w1']:.3f} "]
    assert limit[2] == ["  ", " inf ", euler]
    assert [row[2] for row in limit[6:]] == [f" {rest[of][z]:.2f} " for z in (0, 1) for of in ("K", "by_law_of_motion")]
    assert len([line for line in text.splitlines() if re.match(r"\| [0-4] \| \D", line)]) == 5
    assert TOOL["main"](["--check"], root) == 0 and TOOL["main"]([], root) == 0
    better = json.loads(json.dumps(metrics["comparison"]))
    better["small"]["w1"] = 0.125
    write("benchmarks/seeds/seed3.json", seed=3, comparison=better)
    assert TOOL["main"](["--check"], root) == 1 and TOOL["main"]([], root) == 0
    assert f"| 0.125 to {value} |" in (root / "README.md").read_text()


def block(root, name):
    return (root / "README.md").read_text().split(f"<!-- {name}:start -->")[1].split(f"<!-- {name}:end -->")[0]


def test_a_row_for_each_example(project):
    root, metrics, write = project
    network, grid = metrics["network"]["limit"], metrics["grid"]["limit"]
    davila = metrics | {"economy": {"income": [[1.0, 5.29, 46.55]]}, "seconds": metrics["seconds"] | {"training": 77.4}}
    unpublished = [row | {"published": None} for row in metrics["verdict"]]
    write("benchmarks/examples/davila.json", **davila | {"verdict": unpublished, "peak_memory_gb": {}})
    assert TOOL["main"]([], root) == 0
    rows = [line.split(" | ") for line in block(root, "examples").splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in TOOL["EXAMPLES"]]
    head = [line for line in block(root, "examples").splitlines() if line.startswith("| example")][0].split(" | ")
    assert all(len(row) == len(head) for row in rows)
    assert rows[0][1] == "2 x 2" and rows[1][1:3] == ["3 x 1", "77"]

    def pair(of, digits):
        return " / ".join(f"{of(x):.{digits}f}" for x in (network, grid))

    assert rows[1][4:9] == [
        pair(lambda x: x["capital"]["mean"], 2), pair(lambda x: x["interest_rate_percent"], 3),
        pair(lambda x: x["capital"]["std"], 2), pair(lambda x: x["capital"]["gini"], 4),
        pair(lambda x: x["consumption"]["gini"], 4)]
    assert rows[1][9:11] == [" / ".join(f"{x['capital']['top_percent_hold'][q]:.1f}" for q in ("1", "5", "20"))
                             for x in (network, grid)]
    assert rows[1][11] == f"{metrics['comparison']['limit']['w1']:.3f}"
    assert rows[1][12].removesuffix(" |") == pair(lambda x: x["euler_log10"]["mean"], 2)


def test_rows_of_planner_game_and_calibrations(project):
    root, metrics, write = project
    (root / "benchmarks/planner/planner_other_start.json").write_text('{"error": "deepham_ks: error: no answer"}')
    assert TOOL["main"]([], root) == 0
    rows = [line.split(" | ") for line in block(root, "planner").splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [f"| {name}" for name in TOOL["PLANNER"].values()]
    welfare = [metrics[solution]["limit"]["welfare"] for solution in ("network", "grid")]
    assert rows[0][5] == f"{welfare[0]:.4f} / {welfare[1]:.4f}" and rows[4][1] == "error: no answer"
    assert "| 50 | 0.0123 / 0.4000 | 0.0112 / 0.3000 |" in block(root, "game")
    found = block(root, "calibrations")
    assert "2 of 4 runs meet every goal" in found and "| `--gamma 3` | 1 | std, Bellman |" in found
    assert "| `--mu 1` | 0 | no solution |" in found and "--mu 0.9" not in found


def test_rows_of_moments_and_groups(project):
    root, metrics, write = project
    assert TOOL["main"]([], root) == 0
    found = block(root, "moments")
    N50 = [f"{metrics[who]['small']['bellman_own_c']['mean']:.5f}" for who in ("network", "grid")]
    assert f"| 50 | {N50[0]} to {N50[0]} | {N50[0]} | {N50[1]} |" in found
    assert "policy's Q +0.25 with K and -0.75 with the share" in found and "4.0e-05 utils at N = 50" in found
    found = block(root, "groups")
    assert "| 3 | 6 | 3,000 | 30 | 80 | 0.5 | 0.030 | -3.90 / -3.40 | -4.10 / -3.60 | 2e+03 |" in found
    assert "| 30 | 60 |" in found and "| 10 |" not in found and "seven groups" not in found
    spread = metrics | {"calibration": {"beta": 0.9862, "spread": 0.0068}}
    write("benchmarks/groups/spread.json", **spread)
    assert TOOL["main"]([], root) == 0 and "beta 0.9862 +- 0.0068" in block(root, "groups")
    (root / "benchmarks/moments/seed0.json").write_text('{"error": "no"}')
    assert TOOL["main"]([], root) == 2


def test_published_numbers_are_the_default_economys(project):
    root, metrics, write = project
    assert TOOL["main"]([], root) == 0
    assert "published grid | authors' network |" in block(root, "results") and "| 9.2 |" in block(root, "results")
    for name in ("gamma2", "examples", "seeds"):
        assert "published" not in block(root, name) and "authors" not in block(root, name)
        assert not re.search(r"\| (9\.2|-3\.34|0\.0184) \|", block(root, name))


def test_what_was_not_measured_is_left_out(project):
    """Peak memory, where the platform has none, and figures that are null."""
    root, metrics, write = project
    assert TOOL["main"]([], root) == 0 and "peak memory" in block(root, "results")
    network = json.loads(json.dumps(metrics["network"]))
    network["large"]["law_of_motion"]["den_haan_max_percent"] = None
    write(TOOL["REFERENCE"], peak_memory_gb={}, network=network)
    assert TOOL["main"]([], root) == 0 and "peak memory" not in block(root, "results")
    (row,) = [line for line in block(root, "results").splitlines() if "Den Haan" in line]
    assert row.split(" | ")[2] == "-"
    write(TOOL["REFERENCE"], peak_memory_gb={"host": 1.0, "device": 2.0})
    assert TOOL["main"]([], root) == 0 and "; peak memory 1.0 GB, 2.0 GB on the device." in block(root, "results")


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


def default_for_an_example(root, metrics, write):
    write("benchmarks/examples/davila.json")


def older(root, metrics, write):
    write(TOOL["REFERENCE"], comparison={size: metrics["comparison"][size] for size in ("small", "large")})


def other_gamma(root, metrics, write):
    write("benchmarks/gamma2.json")


def no_reference(root, metrics, write):
    (root / TOOL["REFERENCE"]).unlink()


def no_seed(root, metrics, write):
    (root / "benchmarks" / "seeds" / "seed2.json").unlink()


def no_markers(root, metrics, write):
    (root / "README.md").write_text("text\n")


def half_a_marker(root, metrics, write):
    (root / "README.md").write_text("<!-- results:start -->\n")


@pytest.mark.parametrize("spoil, told", [
    (stale, "hidden not as in benchmarks/seeds/seed0.json"), (other_table, "TFP not as in benchmarks/seeds/seed0.json"),
    (other_grid, "n_k, n_K"), (other_economy, "not of the default economy"), (older, "has no 'limit'"),
    (no_example, "python examples/davila.py --output-dir runs/davila"),
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
