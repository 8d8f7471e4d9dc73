"""Does training ever lose its way? Hard economies with a quarter of the economies and a sixth of the households of the
default, as they are and with steps of full size and next to no damping: how many iterations were taken back, and the
Euler error after 40 iterations. Writes benchmarks/hard_starts.md.

  python benchmarks/hard_starts.py        # about 5 minutes on one core
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402

SMALL = "--n-economies 24 --n-agents 40 --batch 256 --iterations 40"
ECONOMIES = ("", "--gamma 5", "--gamma 5 --mu 0", "--gamma 10 --mu 0", "--gamma 20 --mu 0",
             "--gamma 10 --tfp-shock 0.1")
METHODS = ("", "--policy-rate 1 --damping 1e-7", "--policy-rate 1 --damping 1e-7 --horizon 20")


def run(flags: str) -> tuple:
    """Iterations taken back, Euler errors after the first and the last step of the policy; or the line it ended in."""
    said, write = [], dk.tqdm.write
    dk.tqdm.write = said.append
    try:
        asked = dk.parse(flags.split())
        euler = dk.solve(asked.economy, asked.config, seed=0, device="cpu").weights["history"]["euler"]
        end = f"{euler[0]:.0e} to {euler[-1 - asked.config.final_value_steps]:.0e}"
    except dk.UserError as error:
        end = str(error)
    finally:
        dk.tqdm.write = write
    return sum("taken back" in line for line in said), end


def main():
    lines = ["# Hard starts", "",
             f"`python benchmarks/hard_starts.py`, seed 0, version {dk.__version__}, all with `{SMALL}`.", "",
             "| economy | method | iterations taken back | mean Euler error, first to last |", "|---|---|---|---|"]
    for economy in ECONOMIES:
        for method in METHODS:
            taken_back, end = run(f"{SMALL} {economy} {method}")
            names = [f"`{flags}`" if flags else "as it is" for flags in (economy, method)]
            lines.append(f"| {' | '.join(names)} | {taken_back} | {end} |")
    (HERE / "hard_starts.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
