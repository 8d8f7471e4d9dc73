"""How many operations an outer iteration launches: counted on a CPU, with the chunks that a GPU would take, so that
anyone can do it. Views, which launch nothing, are left out.

  python benchmarks/operations.py          # the default preset; writes benchmarks/operations.json
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

VIEWS = {"view", "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute", "as_strided",
         "split", "split_with_sizes", "unbind", "diagonal", "alias", "detach", "_unsafe_view", "unfold", "lift_fresh",
         "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_reshape_alias", "chunk"}
STAGES = ("draw_shocks", "simulate", "sample_households", "roll_out", "consumption_and_slope", "surprises", "costates",
          "policy_step", "value_step", "path_moments", "iteration_figures")


class Count(TorchDispatchMode):
    """Operations by the innermost of STAGES that runs."""

    def __init__(self):
        super().__init__()
        self.by_stage, self.stack = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in VIEWS:
            self.by_stage[self.stack[-1] if self.stack else "other"] += 1
        return func(*args, **(kwargs or {}))

    def watched(self, name):
        real = getattr(dk, name)

        def call(*args, **kwargs):
            self.stack.append(name)
            result = real(*args, **kwargs)
            self.stack.pop()
            return result

        def steps(*args, **kwargs):
            iterator = real(*args, **kwargs)
            while True:
                self.stack.append(name)
                step = next(iterator, None)
                self.stack.pop()
                if step is None:
                    return
                yield step

        return steps if name == "simulate" else call


def operations(economy: dk.Economy, cfg: dk.Config) -> dict:
    """Launching operations of the third outer iteration, in which both networks learn, by stage and in all."""
    count, names = Count(), {name: getattr(dk, name) for name in (*STAGES, "periods_at_once")}
    try:
        for name in STAGES:
            setattr(dk, name, count.watched(name))
        dk.periods_at_once = lambda k, successors: max(1, 2**22 // (successors * k.shape[1]))  # as on a GPU
        econ = dk.with_units(economy.tables(dtype=torch.float32), cfg)
        rng, kernels = torch.Generator().manual_seed(0), dk.compile_kernels("none")
        state = dk.initial_state(econ, cfg, 0, rng)
        with torch.no_grad():
            for _ in range(3):
                dk.set_rates(state, cfg, {})
                count.by_stage.clear()
                with count:
                    dk.iterate(state, econ, cfg, kernels, rng, {})
                state["iteration"] += 1
    finally:
        for name, real in names.items():
            setattr(dk, name, real)
    return {"all": sum(count.by_stage.values()), **dict(count.by_stage.most_common())}


def main():
    found = {name: operations(dk.krusell_smith(), cfg) for name, cfg in (
        ("default", dk.Config()), ("one learnt moment", dk.Config(learnt_moments=1, n_agents=50)))}
    found["version"] = dk.__version__
    (HERE / "operations.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
