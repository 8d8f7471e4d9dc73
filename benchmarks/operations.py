"""How many tensor operations an outer iteration of the default economy has: what a GPU launches one by one, or as one
graph. Each operation of torch counts once that writes a tensor which is not empty; views write none. Roll-outs are
taken in as few parts as on a GPU. Writes benchmarks/operations.json.

  python benchmarks/operations.py
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import deepham_ks as dk  # noqa: E402


class Operations(TorchDispatchMode):
    """Counts, by name, while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), str(function).split(".")[1]
        views = function.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach"))
        if not views and not (isinstance(out, torch.Tensor) and out.numel() == 0):
            self.count[name] += 1
        return out


@torch.no_grad()
def of_an_iteration() -> dict:
    """Of its parts and of all."""
    dk.compile_kernels("none")
    dk.AT_ONCE["cpu"] = dk.AT_ONCE["cuda"]
    economy, rng = dk.krusell_smith(), torch.Generator().manual_seed(0)
    cfg, econ = dk.sized(dk.Config(), economy), economy.tables("cpu", torch.float32)
    state, found = dk.initial_state(econ, economy, cfg, 0, rng), {}
    dk.set_rates(state, cfg)

    def counted(name, function, *args):
        with Operations() as operations:
            out = function(*args, econ, cfg, *([rng] if name in ("simulate", "roll out") else []))
        found[name] = sum(operations.count.values())
        return out

    paths = counted("simulate", dk.simulate_on, state)
    batch = counted("roll out", dk.roll_out_households, state, paths)
    taken = counted("move the policy", dk.policy_step, state, batch, paths)
    counted("figures", dk.iteration_figures, state, batch, taken)
    return found | {"all": sum(found.values())}


if __name__ == "__main__":
    found = of_an_iteration()
    print("\n".join(f"{name:<16}{n:>8,}" for name, n in found.items()))
    (HERE / "operations.json").write_text(json.dumps({"version": dk.__version__} | found, indent=1) + "\n")
