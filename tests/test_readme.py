"""The README: its tables are those of the committed metrics, its flags and files exist, its example runs."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))
README = ROOT / "README.md"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"[\w.*/-]+(\.(py|md|txt|json|csv|png|pth|pt|ipynb|sh|cff|toml|cuh?)|/)|LICENSE|\.ci/run")
ONLY_IN_RUNS = re.compile(r"(checkpoint(\.previous)?\.pt|(runs|\.venv)/.*)")  # what a user's own run writes


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf-8")


def code_lines(readme):
    """Lines of the fenced blocks, continued ones joined, without comments."""
    lines = "".join(FENCED.findall(readme)).replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines]


@cache
def flags_of(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(FLAG.findall(done.stdout))


@pytest.mark.skipif(not (ROOT / "benchmarks" / "seeds").is_dir(), reason="no benchmarks/seeds: seeds have not been run")
def test_tables_are_those_of_the_committed_metrics(capsys):
    assert TOOL["main"](["--check"], ROOT) == 0, capsys.readouterr().err


def test_every_flag_in_a_code_block_exists(readme):
    asked = []
    for line in code_lines(readme):
        line = line.replace("bash reproduce.sh test", "").replace("bash reproduce.sh", "python deepham_ks.py")
        for script, rest in re.findall(r"(\S+\.py)\b([^|;&]*)", line):
            asked += [(script, name) for name in FLAG.findall(rest)]
    assert asked, "the README shows no command with a flag"
    unknown = [f"{script} {name}" for script, name in asked if name not in flags_of(script)]
    assert not unknown, f"not in --help: {unknown}"


def test_every_flag_in_the_text_exists(readme):
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", readme))
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


def test_every_file_that_is_named_exists(readme):
    text = FENCED.sub("", readme)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", target)]
    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    words += [word for line in code_lines(readme) for word in line.split()]
    named = [name for word in words for name in braces(word.strip("'\",;:()")) if PATH.fullmatch(name)]
    named = [name for name in named if not name.startswith("/")]
    assert named
    missing = {name for name in targets + named
               if not ONLY_IN_RUNS.fullmatch(name) and not any(ROOT.glob(name.split("#")[0].rstrip("/")))}
    assert not missing


def test_badge_opens_the_notebook(readme):
    notebook = runpy.run_path(str(ROOT / "tools" / "notebook.py"))
    assert notebook["BADGE"] in readme


def test_risk_aversion_example_runs(readme, tmp_path, deepham):
    """The README's worked example, with smoke sizes."""
    (command,) = {line.strip() for line in code_lines(readme) if "--gamma 2" in line}
    words = shlex.split(command)
    flags = words[words.index("deepham_ks.py") + 1 :]
    done = deepham(*flags, "--preset", "smoke", "--output-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["calibration"]["gamma"] == 2


@pytest.fixture
def project(smoke_run, tmp_path):
    """A README with all markers and the metrics of a smoke run in the place of every run's."""
    metrics = json.loads((smoke_run[0] / "metrics.json").read_text())
    (tmp_path / "benchmarks" / "seeds").mkdir(parents=True)

    def write(name, **changes):
        (tmp_path / name).write_text(json.dumps(metrics | changes))

    write("metrics.json")
    for seed in range(5):
        write(f"benchmarks/seeds/seed{seed}.json", seed=seed)
    write("benchmarks/gamma2.json", calibration=metrics["calibration"] | {"gamma": 2.0})
    blocks = [f"text before\n<!-- {name}:start -->\nold\n<!-- {name}:end -->\n" for name in TOOL["BLOCKS"]]
    (tmp_path / "README.md").write_text("".join(blocks) + "text after\n")
    return tmp_path, metrics, write


def test_tables_are_written_between_the_markers(project, capsys):
    root, metrics, write = project
    assert TOOL["main"](["--check"], root) == 1 and "old" in (root / "README.md").read_text()
    assert TOOL["main"]([], root) == 0
    text = (root / "README.md").read_text()
    assert "old" not in text and text.startswith("text before\n") and text.endswith("text after\n")
    (w1,) = {line for line in text.splitlines() if line.startswith("| W1 distance") and line.endswith("| 9.2 |")}
    value = f"{metrics['comparison']['small']['w1']:.3f}"
    assert w1.split("|")[2:5] == [" 20 ", f" {value} ", f" {value} to {value} "]
    assert len([line for line in text.splitlines() if re.match(r"\| [012] \|", line)]) == 3
    assert TOOL["main"](["--check"], root) == 0 and TOOL["main"]([], root) == 0
    better = json.loads(json.dumps(metrics["comparison"]))
    better["small"]["w1"] = 0.125
    write("benchmarks/seeds/seed3.json", seed=3, comparison=better)
    assert TOOL["main"](["--check"], root) == 1 and TOOL["main"]([], root) == 0
    assert f"| 0.125 to {value} |" in (root / "README.md").read_text()


def stale(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=1, config=metrics["config"] | {"hidden": 99})


def misnamed(root, metrics, write):
    write("benchmarks/seeds/seed1.json", seed=2)


def other_gamma(root, metrics, write):
    write("benchmarks/gamma2.json")


def no_reference(root, metrics, write):
    (root / "metrics.json").unlink()


def no_seed(root, metrics, write):
    (root / "benchmarks" / "seeds" / "seed2.json").unlink()


def no_markers(root, metrics, write):
    (root / "README.md").write_text("text\n")


def half_a_marker(root, metrics, write):
    (root / "README.md").write_text("<!-- results:start -->\n")


@pytest.mark.parametrize("spoil, told", [
    (stale, "hidden not as in metrics.json"), (misnamed, "is of seed 2"), (other_gamma, "gamma is 1.0"),
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
