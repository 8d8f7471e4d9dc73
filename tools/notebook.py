"""Writes deepham_ks.ipynb, the notebook for Google Colab, from the cells below, and the badge in README.md.

  python tools/notebook.py     # tests/test_notebook.py holds the committed files to this, byte for byte

The address that both clone and open is that of the git remote `origin` where it is on GitHub; a checkout without one
leaves the notebook's form field empty and the README without a badge.
"""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
START, END = "<!-- badge:start -->\n", "<!-- badge:end -->"
WITHOUT_ADDRESS = """In Colab: upload `deepham_ks.ipynb` (File > Upload notebook) and beside it `deepham_ks.py`
(the folder on the left). A badge stands here once `git remote add origin https://github.com/OWNER/NAME` and
`python tools/notebook.py` were run.
"""


def address(root=ROOT) -> str:
    """https://github.com/OWNER/NAME of the remote origin, or nothing."""
    done = subprocess.run(["git", "-C", str(root), "remote", "get-url", "origin"], capture_output=True, text=True)
    found = re.fullmatch(r"(?:https://github\.com/|git@github\.com:)([\w.-]+/[\w.-]+?)(?:\.git)?", done.stdout.strip())
    return f"https://github.com/{found[1]}" if found else ""


def colab(repository: str) -> str:
    """Where Colab opens the notebook of a repository on GitHub."""
    here = repository.replace("https://github.com", "https://colab.research.google.com/github")
    return here + "/blob/main/deepham_ks.ipynb"


def badge(repository: str) -> str:
    return f"[![Open In Colab]({BADGE_IMAGE})]({colab(repository)})\n" if repository else ""


def readme_with_badge(readme: str, repository: str) -> str:
    before, rest = readme.split(START)
    return before + START + (badge(repository) or WITHOUT_ADDRESS) + END + rest.split(END)[1]


MARKDOWN, CODE = "markdown", "code"

def cells_of(repository: str) -> list:
    """(kind, text) of every cell."""
    return [
    (MARKDOWN, f"""
# Krusell & Smith (1998) with DeepHAM

{badge(repository)}
Solves the Krusell–Smith economy with neural networks, after DeepHAM (Han, Yang & E 2021), and with the grid method of
Maliar, Maliar & Valli (2010), compares the two and shows every figure. *Runtime > Run all* does everything; the default
run takes minutes. The method, every file of a run and other economies are explained in README.md of the project.
"""),
    (MARKDOWN, """
## What to run

- `PRESET`: `default` is accurate and fast, `paper` the published algorithm, `smoke` is tiny and only tests the setup.
- `FLAGS`: more flags of the script, `--gamma 2 --seed 1`, say. `!python deepham_ks.py --help` lists them.
- `DRIVE_FOLDER`: a folder of your Google Drive, `deepham`, say. Results and checkpoints go there, and a session that
  was lost goes on where it stopped: run all cells again. Empty: nothing is mounted.
- `OUTPUT_DIR`: where results go without Drive. Empty: `runs/PRESET`. Another model needs another folder.
- `REPOSITORY`: where Colab clones the project from. An uploaded `deepham_ks.py` beside the notebook comes first.
"""),
    (CODE, f"""
# @title Parameters
import os

PRESET = "default"  # @param ["default", "paper", "smoke"]
FLAGS = ""  # @param {{type:"string"}}
DRIVE_FOLDER = ""  # @param {{type:"string"}}
OUTPUT_DIR = ""  # @param {{type:"string"}}
REPOSITORY = "{repository}"  # @param {{type:"string"}}

# for runs without a form
PRESET = os.environ.get("DEEPHAM_PRESET", PRESET)
OUTPUT_DIR = os.environ.get("DEEPHAM_OUTPUT_DIR", OUTPUT_DIR)
"""),
    (MARKDOWN, """
## Setup

In Colab: takes the uploaded script or clones the project, and installs what is missing; Colab's own torch stays.
Elsewhere the notebook expects to stand beside `deepham_ks.py`, with `requirements.txt` installed.
"""),
    (CODE, """
import subprocess
import sys
from pathlib import Path

try:
    import google.colab  # noqa: F401
    IN_COLAB = True
except ImportError:
    IN_COLAB = False

if IN_COLAB and not Path("deepham_ks.py").exists():
    where = REPOSITORY and (Path("deepham_ks").exists() or not subprocess.run(
        ["git", "clone", "--depth", "1", REPOSITORY, "deepham_ks"]).returncode)
    if not where:
        raise SystemExit("upload deepham_ks.py beside this notebook (the folder on the left), or give REPOSITORY above")
    os.chdir("deepham_ks")
if IN_COLAB and Path("requirements.txt").exists():
    lines = Path("requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith(("#", "torch"))]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
"""),
    (CODE, """
import torch

if torch.cuda.is_available():
    print(f"device: {torch.cuda.get_device_name()}; FLAGS = \\"--device cpu\\" uses the CPU")
else:
    print("device: CPU; for a GPU in Colab: Runtime > Change runtime type > T4 GPU, then run all cells again")
"""),
    (CODE, """
output_dir = Path(OUTPUT_DIR or f"runs/{PRESET}").resolve()
if DRIVE_FOLDER and IN_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    output_dir = Path("/content/drive/MyDrive") / DRIVE_FOLDER / PRESET
print("results in", output_dir)
"""),
    (MARKDOWN, """
## Solve

One line an outer iteration; at the end a table with every accuracy figure, its tolerance and the verdict (`smoke` is
too small for one). Where a row fails or the run has not converged the last line says so, and results are there. The
stop button keeps the checkpoint: run this cell again and it goes on from there.
"""),
    (CODE, """
import shlex


def run(*flags):
    \"\"\"The script with these flags, its lines as they come.\"\"\"
    print("python deepham_ks.py", shlex.join(flags), flush=True)
    command = [sys.executable, "-u", "deepham_ks.py", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:  # the stop button reaches the script too: it says how to go on
            print(process.stdout.read(), end="", flush=True)
            raise
    told = process.returncode == 1 and (output_dir / "metrics.json").exists()  # not converged, or a row fails
    if process.returncode and not told:
        raise RuntimeError(f"deepham_ks.py ended with exit status {process.returncode}; its last line says why")


flags = ["--preset", PRESET, "--output-dir", str(output_dir), *shlex.split(FLAGS)]
if (output_dir / "checkpoint.pt").exists():
    flags.append("--resume")
run(*flags)
"""),
    (MARKDOWN, """
## Figures

In every figure the network is a solid line and the grid a dashed one.
"""),
    (CODE, """
from IPython.display import Image, Markdown, display

for path in [output_dir / "distribution_validation.png", *sorted((output_dir / "figures").glob("*.png"))]:
    display(Markdown(f"**{path.stem.replace('_', ' ')}**"), Image(filename=str(path), width=840))
"""),
    (MARKDOWN, """
## The solution in Python

`dk.load` reads the networks of a run, `dk.solve_grid` solves the same economy on a grid. Both have
`next_capital(k, s, K, z)` and `value(k, s, K, z)`: numpy arrays that broadcast; s and z count the states, here s 0
unemployed / 1 employed, z 0 bad / 1 good. `dk.solve(economy)` trains from Python, for any `dk.Economy` of your own.
"""),
    (CODE, """
import numpy as np

import deepham_ks as dk

solution = dk.load(output_dir / dk.WEIGHTS)
tables = solution.economy.arrays  # of the economy
grid = dk.solve_grid(solution.economy, dk.SMOKE_GRID if PRESET == "smoke" else dk.GridConfig())

print("law of motion on the grid, ln K' = a(z) + b(z) ln K:")
for z, state in enumerate(tables.z_names):
    a, b = grid.alm_coefficients[z]
    print(f"  {state:>10}: a = {a:.4f}, b = {b:.4f}, R2 = {grid.alm_r2[z]:.6f}")

K = solution.K_mean
print(f"an employed household with k = K = {K:.1f} in the good state: "
      f"k' = {solution.next_capital(K, 1, K, 1):.3f} (network), {grid.next_capital(K, 1, K, 1):.3f} (grid), "
      f"V = {solution.value(K, 1, K, 1):.2f} utils")
"""),
    (CODE, """
import matplotlib.pyplot as plt

k = np.expm1(np.linspace(0, np.log1p(4 * K), 300))  # finer where households are poor
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for z, ax in enumerate(axes):
    for s, (name, colour) in enumerate(zip(tables.s_names, ("#D55E00", "#0072B2"))):
        ax.plot(k, solution.next_capital(k, s, K, z) - k, color=colour, label=f"{name}, network")
        ax.plot(k, grid.next_capital(k, s, K, z) - k, color="black", linestyle="--", linewidth=1, label=f"{name}, grid")
    ax.set(title=tables.z_names[z], xlabel="individual capital k (goods)", xlim=(0, k[-1]))
axes[0].set_ylabel("k' - k (goods)")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
plt.show()
"""),
]


def notebook(repository: str) -> dict:
    cells = []
    for number, (kind, text) in enumerate(cells_of(repository)):
        cell = {"cell_type": kind, "id": f"cell-{number:02d}", "metadata": {},
                "source": text.strip().splitlines(keepends=True)}
        cells.append(cell | {"execution_count": None, "outputs": []} if kind == CODE else cell)
    metadata = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text(repository: str) -> str:
    return json.dumps(notebook(repository), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path, readme = ROOT / "deepham_ks.ipynb", ROOT / "README.md"
    path.write_text(text(address()), encoding="utf-8")
    readme.write_text(readme_with_badge(readme.read_text(encoding="utf-8"), address()), encoding="utf-8")
    print(f"wrote {path} and the badge of {readme}")
