"""The Colab notebook: what the generator makes, runs from top to bottom, does in Colab what it should."""

import re
import runpy
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "notebook.py"))
NOTEBOOK = ROOT / "deepham_ks.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def until_solved(code):
    """Cells up to the one that runs the script, without the one that only shows the device."""
    return [*code[:2], *code[3:5]]


@pytest.fixture(scope="module")
def address(code):
    """The repository that the committed notebook clones; empty where the project has no address yet."""
    return re.search(r'^REPOSITORY = "(.*?)"', code[0], re.MULTILINE)[1]


def test_committed_notebook_is_the_generated_one(address):
    assert NOTEBOOK.read_bytes() == TOOL["text"](address).encode(), "run python tools/notebook.py"


@pytest.mark.parametrize("remote, told", [
    ("https://github.com/some/one.git", "https://github.com/some/one"),
    ("https://github.com/a/b", "https://github.com/a/b"),
    ("git@github.com:a.b/c_d.git", "https://github.com/a.b/c_d"), ("/a/folder", ""), (None, "")])
def test_address_is_the_remotes(tmp_path, remote, told):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if remote:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    assert TOOL["address"](tmp_path) == told
    text = TOOL["text"](told)
    assert f'REPOSITORY = \\"{told}\\"' in text and ("Open In Colab" in text) == bool(told)


def test_is_valid_stripped_and_asks_for_a_t4(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.gpuType == "T4"
    assert notebook.metadata.kernelspec.name == "python3"


def test_badge_opens_this_notebook():
    address = "https://github.com/some/one"
    first = "".join(TOOL["notebook"](address)["cells"][0]["source"])
    opens = f"https://colab.research.google.com/github/some/one/blob/main/{NOTEBOOK.name}"
    assert f"]({opens})" in first and f"]({opens})" in TOOL["badge"](address)


def test_runs_with_the_smoke_preset(notebook, tmp_path, monkeypatch):
    """Every cell, in a folder that holds nothing but the script; a form in which a flag was given."""
    notebook = nbformat.from_dict(notebook)
    assert 'FLAGS = ""' in notebook.cells[2].source
    notebook.cells[2].source = notebook.cells[2].source.replace('FLAGS = ""', 'FLAGS = "--grid none"')
    for name in ("deepham_ks.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, value in {"DEEPHAM_PRESET": "smoke", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "IPYTHONDIR": str(tmp_path / ".ipython")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DEEPHAM_OUTPUT_DIR", raising=False)
    here = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(notebook, timeout=120, resources=here).execute()

    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    files = list((tmp_path / "runs" / "smoke").rglob("*.png"))
    assert len(files) == 6 and len(images) == len(files) + 1  # each file, and the policy functions drawn here
    assert printed.count("\ndevice: ") + printed.startswith("device: ") == 1 and "T4 GPU" in printed
    assert "iteration 3 " in printed and "the installation works" in printed
    assert "law of motion on the grid" in printed and "bad state: a = " in printed
    assert "--resume" not in printed


def in_python(cells, cwd, path, *more):
    """Code cells as one script, in a process that finds path first."""
    script = "\n".join([f"import sys; sys.path[:0] = [{str(path)!r}, '']", *cells, *more])
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_colab_clones_keeps_torch_and_resumes_on_drive(until_solved, tmp_path):
    """With a google.colab, a repository and a Drive of our own; pip is only recorded."""
    origin, content, fake = tmp_path / "origin", tmp_path / "content", tmp_path / "fake"
    for folder in (origin, content, fake / "google" / "colab"):
        folder.mkdir(parents=True)
    (fake / "google" / "colab" / "__init__.py").write_text("")
    (fake / "google" / "colab" / "drive.py").write_text("def mount(path): print('mounted', path)\n")
    shutil.copy(ROOT / "requirements.txt", origin)
    (origin / "deepham_ks.py").write_text("import sys; print('script', *sys.argv[1:])\n")
    git = ["git", "-C", str(origin), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "t"]):
        subprocess.run(git + command, check=True)
    checkpoint = content / "drive" / "MyDrive" / "mine" / "smoke" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()

    until_run = [cell.replace("/content/", f"{content}/") for cell in until_solved]
    until_run[0] += f'\nPRESET, DRIVE_FOLDER, REPOSITORY = "smoke", "mine", "{origin.as_uri()}"\n'
    record = "import subprocess; real = subprocess.run\n" \
             "def spy(command, **more):\n" \
             "    print('ran', *command[1:])\n" \
             "    return real(command, **more) if command[0] == 'git' else None\n" \
             "subprocess.run = spy\n"
    printed = in_python([record, *until_run], content, fake, *until_run[1:])  # run again: nothing is cloned twice

    (line,) = {line for line in printed.splitlines() if line.startswith("ran -m pip")}
    assert "numpy>=" in line and "tqdm>=" in line and "torch" not in line
    assert printed.count("ran clone") == 1
    assert f"mounted {content}/drive" in printed
    assert printed.count(f"\nscript --preset smoke --output-dir {checkpoint.parent} --resume") == 2


@pytest.fixture
def in_colab(tmp_path):
    """A folder with a google.colab, and one to run in."""
    (tmp_path / "fake" / "google" / "colab").mkdir(parents=True)
    (tmp_path / "fake" / "google" / "colab" / "__init__.py").write_text("")
    (tmp_path / "content").mkdir()
    return tmp_path / "fake", tmp_path / "content"


def test_in_colab_an_uploaded_script_is_enough(code, in_colab):
    """No address, no requirements.txt: nothing is cloned or installed."""
    fake, content = in_colab
    (content / "deepham_ks.py").write_text("")
    refuse = "import subprocess\ndef refuse(*a, **b): raise AssertionError(a)\nsubprocess.run = refuse\n"
    in_python([refuse, code[0] + '\nREPOSITORY = ""\n', code[1]], content, fake)


@pytest.mark.parametrize("repository", ["", "file:///nowhere/at/all"])
def test_in_colab_without_script_and_address_one_line_says_what_to_do(code, in_colab, repository):
    fake, content = in_colab
    script = "\n".join([f"import sys; sys.path[:0] = [{str(fake)!r}, '']", code[0], f"REPOSITORY = {repository!r}",
                        code[1]])
    done = subprocess.run([sys.executable, "-c", script], cwd=content, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("upload deepham_ks.py") and "Traceback" not in done.stderr


def test_outside_colab_nothing_is_cloned_or_installed(until_solved, tmp_path):
    refuse = "import subprocess\ndef refuse(*a, **b): raise AssertionError(a)\nsubprocess.run = refuse\n"
    in_python([refuse, *until_solved[:3]], tmp_path, tmp_path)


def test_a_failing_script_fails_the_cell_and_a_failing_row_does_not(until_solved, tmp_path):
    (tmp_path / "deepham_ks.py").write_text("import sys; sys.exit('error: no such thing')\n")
    with pytest.raises(AssertionError, match="exit status 1"):
        in_python(until_solved, tmp_path, tmp_path)
    (tmp_path / "runs" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "metrics.json").touch()
    assert "no such thing" in in_python(until_solved, tmp_path, tmp_path)
