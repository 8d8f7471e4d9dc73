"""The Colab notebook: the generated one, with the script in it; runs alone from top to bottom; does in Colab what it
should."""

import runpy
import shutil
import subprocess
import sys
import zipfile

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
    """Cells of code but for the script."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code" and "%%" not in cell.source[:2]]


@pytest.fixture(scope="module")
def until_run(code):
    """The cell of what to run and the one that runs it, without the one that shows the device."""
    return code[1:3]


def test_committed_notebook_is_the_generated_one():
    assert NOTEBOOK.read_bytes() == TOOL["text"]().encode(), "run python tools/notebook.py"


def test_the_script_in_the_notebook_is_the_script(notebook):
    """Folded; with nothing but a title more."""
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith("%%writefile deepham_ks.py\n")]
    _, title, script = cell.source.split("\n", 2)
    assert title.startswith("#@title ") and script == (ROOT / "deepham_ks.py").read_text(encoding="utf-8")
    assert cell.metadata.cellView == "form" and cell.metadata.jupyter.source_hidden


@pytest.mark.parametrize("remote, told", [
    ("https://github.com/some/one.git", "https://github.com/some/one"),
    ("https://github.com/a/b", "https://github.com/a/b"),
    ("git@github.com:a.b/c_d.git", "https://github.com/a.b/c_d"), ("/a/folder", ""), (None, "")])
def test_address_of_the_badge_is_the_remotes(tmp_path, remote, told):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if remote:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    assert TOOL["address"](tmp_path) == told
    opens = f"]({told.replace('github.com', 'colab.research.google.com/github')}/blob/main/{NOTEBOOK.name})"
    assert (opens in TOOL["badge"](told)) == bool(told)


def test_is_valid_stripped_and_asks_for_a_t4(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.gpuType == "T4"
    assert notebook.metadata.kernelspec.name == "python3"


def test_runs_alone_in_an_empty_folder(notebook, tmp_path, tmp_path_factory, monkeypatch):
    """Every cell, with `smoke` chosen in the form; all that it writes is in one folder."""
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.from_dict(notebook)
    (form,) = [cell for cell in notebook.cells if 'RUN = "default"  #@param [' in cell.source]
    form.source = form.source.replace('RUN = "default"', 'RUN = "smoke"')
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
    here = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(notebook, timeout=240, resources=here).execute()

    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    results = tmp_path / "deepham" / "results" / "smoke_seed-0"
    files = list(results.rglob("*.png"))
    assert len(files) == 9 and len(images) == len(files) + 1  # each file, and the policy functions drawn here
    assert {path.name for path in tmp_path.iterdir()} == {NOTEBOOK.name, "deepham"}
    assert printed.startswith("No GPU: ") and "T4 GPU" in printed
    assert "iteration 3 " in printed and "the installation works" in printed and "--resume" not in printed
    for words in ("\nmean capital (goods) ", "\nEuler error, log10 mean ", " published  tolerance  verdict",
                  "law of motion on their grid", "bad state: a = ", "|k' of the network - k' of their grid| at K = ",
                  "network: mean capital ", "grid: mean capital ",
                  f"all results are in {tmp_path / 'deepham' / 'smoke_seed-0.zip'}"):
        assert words in printed, words
    names = zipfile.ZipFile(tmp_path / "deepham" / "smoke_seed-0.zip").namelist()
    assert {"metrics.json", "NN_weights_biases.pth", "results.txt", "figures/policy_functions.png"} <= set(names)


def in_python(cells, cwd, *paths):
    """Code cells as one script, in a process that finds paths first; what it prints."""
    script = "\n".join([f"import sys; sys.path[:0] = {[*map(str, paths), '']}", *cells])
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """The folder of a notebook, with a script in it that only says what it was asked."""
    (tmp_path / "deepham").mkdir()
    (tmp_path / "deepham" / "deepham_ks.py").write_text("import sys; print('script', *sys.argv[1:])\n")
    return tmp_path / "deepham"


def asked(until_run, folder, change=""):
    """What the script was asked, and all that was printed."""
    out = in_python([until_run[0].replace('RUN = "default"', change or 'RUN = "default"'), until_run[1]], folder.parent)
    (line,) = [line for line in out.splitlines() if line.startswith("script ")]
    return line, out


def test_the_form_becomes_flags_and_a_folder_of_their_own(until_run, folder):
    line, _ = asked(until_run, folder)
    assert line == "script --preset default --seed 0 --output-dir results/default_seed-0"
    change = until_run[0].replace("SEED = 0", "SEED = 3").replace('FLAGS = ""', 'FLAGS = "--gamma 2"')
    line, _ = asked([change, until_run[1]], folder, 'RUN = "paper"')
    assert line == "script --preset paper --seed 3 --output-dir results/paper_seed-3_--gamma_2 --gamma 2"


def test_evaluate_reads_the_weights_of_a_default_run_and_trains_where_there_are_none(until_run, folder):
    line, out = asked(until_run, folder, 'RUN = "evaluate"')
    assert line.endswith(" --preset default --seed 0 --output-dir results/default_seed-0")
    assert "no weights there yet: training first" in out
    results = folder / "results" / "default_seed-0"
    results.mkdir(parents=True)
    (results / "checkpoint.pt").touch()
    line, out = asked(until_run, folder, 'RUN = "evaluate"')
    assert line.endswith("default_seed-0 --resume") and "no weights" not in out
    (results / "NN_weights_biases.pth").touch()
    assert asked(until_run, folder, 'RUN = "evaluate"')[0].endswith("default_seed-0 --evaluate")
    assert asked(until_run, folder)[0].endswith("default_seed-0 --resume")


def test_in_colab_everything_goes_to_drive_and_goes_on_there(until_run, code, tmp_path):
    """With a google.colab of our own; the form's cell runs twice."""
    colab, content = tmp_path / "fake" / "google" / "colab", tmp_path / "content"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "drive.py").write_text("def mount(path): print('mounted', path)\n")
    (colab / "files.py").write_text("def download(path): print('downloaded', path)\n")
    mine = content / "drive" / "MyDrive" / "mine"
    (mine / "results" / "smoke_seed-0").mkdir(parents=True)
    (mine / "results" / "smoke_seed-0" / "checkpoint.pt").touch()
    (mine / "deepham_ks.py").write_text("import sys; print('script', *sys.argv[1:])\n")
    form = until_run[0].replace("/content/", f"{content}/").replace('RUN = "default"', 'RUN = "smoke"')
    form = form.replace('DRIVE_FOLDER = ""', 'DRIVE_FOLDER = "mine"')
    out = in_python([form, form, until_run[1], code[-1]], content, tmp_path / "fake")
    assert f"mounted {content}/drive" in out
    assert "script --preset smoke --seed 0 --output-dir results/smoke_seed-0 --resume" in out
    assert f"downloaded {mine / 'smoke_seed-0.zip'}" in out


def test_a_failing_script_fails_the_cell_and_a_failing_row_does_not(until_run, folder):
    (folder / "deepham_ks.py").write_text("import sys; sys.exit('error: no such thing')\n")
    with pytest.raises(AssertionError, match="exit status 1"):
        in_python(until_run, folder.parent)
    (folder / "results" / "default_seed-0").mkdir(parents=True)
    (folder / "results" / "default_seed-0" / "metrics.json").touch()
    assert "no such thing" in in_python(until_run, folder.parent)
