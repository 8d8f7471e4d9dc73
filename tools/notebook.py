"""Writes deepham_ks.ipynb, the notebook for Google Colab, from deepham_ks.py and the cells below, and the badge in
README.md.

  python tools/notebook.py     # tests/test_notebook.py holds the committed files to this, byte for byte

The notebook has the whole script in a folded cell: that one file is enough, wherever it is opened. The badge has the
address of the git remote `origin` where that is on GitHub; a checkout without one leaves README.md without a badge.
"""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
START, END = "<!-- badge:start -->\n", "<!-- badge:end -->"
UPLOAD = """In Colab: File > Upload notebook > `deepham_ks.ipynb`. That one file is enough, as it has the
script in it.
"""


def address(root=ROOT) -> str:
    """https://github.com/OWNER/NAME of the remote origin, or nothing."""
    done = subprocess.run(["git", "-C", str(root), "remote", "get-url", "origin"], capture_output=True, text=True)
    found = re.fullmatch(r"(?:https://github\.com/|git@github\.com:)([\w.-]+/[\w.-]+?)(?:\.git)?", done.stdout.strip())
    return f"https://github.com/{found[1]}" if found else ""


def badge(repository: str) -> str:
    """What opens the notebook of a repository on GitHub in Colab."""
    here = repository.replace("https://github.com", "https://colab.research.google.com/github")
    return f"[![Open In Colab]({BADGE_IMAGE})]({here}/blob/main/deepham_ks.ipynb)\n" if repository else ""


def readme_with_badge(readme: str, repository: str) -> str:
    before, rest = readme.split(START)
    return before + START + badge(repository) + UPLOAD + END + rest.split(END)[1]


MARKDOWN, CODE, FOLDED = "markdown", "code", "folded"
CELLS = [  # (kind, text); SCRIPT stands for deepham_ks.py
    (MARKDOWN, """
# Krusell & Smith (1998) with DeepHAM

Solves the Krusell–Smith economy with neural networks, after DeepHAM (Han, Yang & E 2021), and on a grid, and compares
the two. *Runtime > Run all* does everything; the default run takes minutes. This file is all that is needed: the script
`deepham_ks.py` is in it.
"""),
    (MARKDOWN, """
## Is there a GPU?
"""),
    (CODE, """
import torch

if torch.cuda.is_available():
    print(f"GPU: {torch.cuda.get_device_name()}. The run uses it, and the grid is solved meanwhile on the CPU.")
else:
    print("No GPU: the run uses the CPU, where the default takes a few minutes and paper hours.")
    print("For a GPU in Colab: Runtime > Change runtime type > T4 GPU, then run all cells again.")
"""),
    (MARKDOWN, """
## What to run

- `RUN`: `default` is accurate and fast, `paper` the published algorithm, `smoke` is tiny and only shows that everything
  works; `evaluate` rebuilds the results of a default run from its weights, and trains first where there are none.
- `SEED`: of every random number of the training.
- `FLAGS`: more flags of the script, `--gamma 2`, say. `!python deepham_ks.py --help` lists them.
- `DRIVE_FOLDER`: a folder of your Google Drive, `deepham`, say. Everything goes there, and a session that was lost goes
  on where it stopped: run all cells again. Empty: everything goes to the folder `deepham` here.
"""),
    (CODE, """
#@title What to run
import os
import shlex
from pathlib import Path

RUN = "default"  #@param ["smoke", "default", "paper", "evaluate"]
SEED = 0  #@param {type:"integer"}
FLAGS = ""  #@param {type:"string"}
DRIVE_FOLDER = ""  #@param {type:"string"}

START = globals().get("START", Path.cwd())  # this cell may run again
folder = START / "deepham"
if DRIVE_FOLDER:
    from google.colab import drive

    drive.mount("/content/drive")
    folder = Path("/content/drive/MyDrive") / DRIVE_FOLDER
folder.mkdir(parents=True, exist_ok=True)
os.chdir(folder)
preset = "default" if RUN == "evaluate" else RUN
output_dir = Path("results", "_".join([preset, f"seed-{SEED}", *shlex.split(FLAGS)]).replace("/", "-"))
print("results in", output_dir.resolve())
"""),
    (FOLDED, "%%writefile deepham_ks.py\n#@title The script: written to the folder, open it to read\nSCRIPT"),
    (MARKDOWN, """
## Run

One line an outer iteration; at the end a table with every accuracy figure, its tolerance and the verdict (`smoke` is
too small for one). Where a row fails or the run has not converged the last line says so, and results are there. The
stop button keeps the checkpoint: run this cell again and it goes on from there.
"""),
    (CODE, """
import subprocess
import sys

flags = ["--preset", preset, "--seed", str(SEED), "--output-dir", str(output_dir), *shlex.split(FLAGS)]
if RUN == "evaluate" and (output_dir / "NN_weights_biases.pth").exists():
    flags.append("--evaluate")
elif (output_dir / "checkpoint.pt").exists():
    flags.append("--resume")
elif RUN == "evaluate":
    print("no weights there yet: training first")
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
"""),
    (MARKDOWN, """
## Pictures

In every figure the network is a solid line and the grid a dashed one.
"""),
    (CODE, """
from IPython.display import Image, Markdown, display

for path in [output_dir / "distribution_validation.png", *sorted((output_dir / "figures").glob("*.png"))]:
    display(Markdown(f"**{path.stem.replace('_', ' ')}**"), Image(filename=str(path), width=840))
"""),
    (MARKDOWN, """
## The main numbers

`metrics.json` has all of them. N = infinity is the limit of infinitely many households.
"""),
    (CODE, """
import json

import deepham_ks as dk

metrics = json.loads((output_dir / "metrics.json").read_text())
rows = {name: metrics[name]["limit"] for name in ("network", "grid") if name in metrics}
numbers = {"mean capital (goods)": lambda x: x["capital"]["mean"], "std of capital": lambda x: x["capital"]["std"],
           "Gini of capital": lambda x: x["capital"]["gini"],
           "interest rate (%)": lambda x: x["statistics"]["interest_rate_percent"],
           "Euler error, log10 mean": lambda x: x["euler_log10"]["mean"],
           "Bellman error, mean (utils)": lambda x: x["bellman_own_c"]["mean"]}
print(f"{'N = infinity':<30}" + "".join(f"{name:>12}" for name in rows))
for name, number in numbers.items():
    print(f"{name:<30}" + "".join(f"{number(x):>12.5g}" for x in rows.values()))
dk.print_verdict(metrics["verdict"])
"""),
    (MARKDOWN, """
## Against the grid of Maliar, Maliar & Valli (2010)

Their 100 x 4 nodes, and the converged grid that judged the run, beside the networks. All three have
`next_capital(k, s, K, z)` and `value(k, s, K, z)`: numpy arrays that broadcast; s and z count the states, here s 0
unemployed / 1 employed, z 0 bad / 1 good.
"""),
    (CODE, """
import dataclasses

import matplotlib.pyplot as plt
import numpy as np

solution = dk.load(output_dir / dk.WEIGHTS)
tables, K = solution.economy.arrays, solution.K_mean
published = dk.GRIDS["published"]
if RUN == "smoke":
    published = dataclasses.replace(published, periods=10_000, n_fine=300, n_K_fine=11, tolerance=1e-5)
grid = dk.solve_grid(solution.economy, published)

print("law of motion on their grid, ln K' = a(z) + b(z) ln K:")
for (a, b), r2, state in zip(grid.alm_coefficients, grid.alm_r2, tables.z_names):
    print(f"  {state:>10}: a = {a:.4f}, b = {b:.4f}, R2 = {r2:.6f}")
k = np.linspace(0.01, 1, 300)[:, None, None] * 4 * K
s, z = np.arange(len(tables.beta))[:, None], np.arange(len(tables.TFP))
k_next = [x.next_capital(k, s, K, z) for x in (solution, grid)]
gap = np.abs(k_next[0] - k_next[1])
print(f"|k' of the network - k' of their grid| at K = {K:.2f}: mean {gap.mean():.4f}, max {gap.max():.4f} goods")

fig, axes = plt.subplots(1, len(tables.TFP), figsize=(10, 3.8), sharey=True, layout="constrained", squeeze=False)
for z, ax in enumerate(axes[0]):
    for s, name in enumerate(tables.s_names):
        (line,) = ax.plot(k[:, 0, 0], (k_next[0] - k)[:, s, z], label=f"{name}, network")
        ax.plot(k[:, 0, 0], (k_next[1] - k)[:, s, z], "--", color=line.get_color(), label=f"{name}, their grid")
    ax.set(title=tables.z_names[z], xlabel="individual capital k (goods)", xlim=(0, k.max()))
axes[0, 0].set_ylabel("k' - k (goods)")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
plt.show()
"""),
    (MARKDOWN, """
## An economy of your own

Tables over the states z of the economy and s of a household: the labour that it supplies, and benefits, which a tax on
labour income pays for. `dataclasses.replace(dk.krusell_smith(), gamma=2.0)` changes one number of a ready economy.
Sizes are tiny here: for a solution to trust leave out `dk.SMOKE_GRID` and write `"default"` for `"smoke"`.
"""),
    (CODE, """
economy = dk.Economy(
    alpha=0.36, delta=0.08, gamma=2.0, beta=0.95, k_min=-1.0,  # yearly, with credit of up to one good
    TFP=[0.98, 1.02], P_z=[[0.75, 0.25], [0.25, 0.75]],
    labour=[0.0, 1.0, 2.0],  # of s; the same in each z
    benefit=[0.4, 0.0, 0.0],  # in wages
    Pi=[[0.6, 0.4, 0.0], [0.05, 0.9, 0.05], [0.0, 0.1, 0.9]],
    s_names=["unemployed", "middle", "high"], z_names=["bad", "good"])
own_grid = dk.solve_grid(economy, dk.SMOKE_GRID)
own = dk.solve(economy, "smoke", seed=SEED)
for name, x in (("network", own), ("grid", own_grid)):
    k_next = x.next_capital(2.0, [0, 1, 2], own_grid.K_mean, 1)
    print(f"{name:>8}: mean capital {x.K_mean:.2f}, k' from k = 2 in the good state by s: {np.round(k_next, 3)}")
"""),
    (MARKDOWN, """
## Take the results home
"""),
    (CODE, """
import shutil

archive = shutil.make_archive(output_dir.name, "zip", output_dir)
try:
    from google.colab import files

    files.download(archive)
except ImportError:
    print("all results are in", archive)
"""),
]


def text_of(kind: str, cell: str) -> str:
    script = (ROOT / "deepham_ks.py").read_text(encoding="utf-8")
    return cell.replace("SCRIPT", script) if kind == FOLDED else cell.strip()


def notebook() -> dict:
    cells = []
    for number, (kind, text) in enumerate(CELLS):
        cell = {"cell_type": MARKDOWN if kind == MARKDOWN else CODE, "id": f"cell-{number:02d}", "metadata": {},
                "source": text_of(kind, text).splitlines(keepends=True)}
        if kind == FOLDED:  # in Colab, and in Jupyter
            cell["metadata"] = {"cellView": "form", "jupyter": {"source_hidden": True}}
        cells.append(cell if kind == MARKDOWN else cell | {"execution_count": None, "outputs": []})
    metadata = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text() -> str:
    return json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path, readme = ROOT / "deepham_ks.ipynb", ROOT / "README.md"
    path.write_text(text(), encoding="utf-8", newline="\n")
    readme.write_text(readme_with_badge(readme.read_text(encoding="utf-8"), address()), encoding="utf-8", newline="\n")
    print(f"wrote {path} and the badge of {readme}")
