"""One outer iteration in the default economy, step by step: what learn() does, each figure beside its equation.

  python examples/one_iteration.py [PICTURE]        # five seconds; draws docs/one_iteration.png
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import deepham_ks as dk  # noqa: E402


@torch.no_grad()
def main(picture: Path, before: int = 5) -> None:
    cfg, economy = dk.Config(n_economies=16, batch=512), dk.krusell_smith()
    econ, rng = economy.tables(dtype=torch.float32), torch.Generator().manual_seed(0)
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    for _ in range(before):  # a policy that is not yet converged
        dk.set_rates(state, cfg)
        paths = dk.simulate_on(state, econ, cfg, rng)
        dk.policy_step(state, dk.roll_out_households(state, paths, econ, cfg, rng), paths, econ, cfg)
        state.iteration += 1
    paths = dk.simulate_on(state, econ, cfg, rng)
    print("1. simulate   ln K' = a(z) + b(z) ln K: a and b by z", state.K_law.numpy().round(4).tolist())
    same = rng.get_state()
    k, path, *_ = dk.sample_households(state, paths, econ, cfg, rng)
    k = dk.roll_out(dk.policy_net(state, econ, cfg), k, path, econ)  # (T + 1, M)
    print(f"2. roll out   k' = R k + income(z, s) w - c: {k.shape[1]} households, k to {k.max():.0f} goods")
    rng.set_state(same)  # the same households again, with labels, at the states that teach
    batch = dk.roll_out_households(state, paths, econ, cfg, rng)
    beta, missed = econ.beta[batch.at.s], dk.policy_residual(batch, econ).abs().mean()
    sides = {"u'(c)": dk.marginal_utility(batch.c, econ), "beta E[R' u'(c')]": beta * batch.expected,
             "beta lambda'": beta * batch.worth}
    for name, x in sides.items():
        print(f"   label      u'(c) = beta lambda', lambda' = E[R' u'(c')] + ...: median of {name} {x.median():.4f}")
    print(f"   residual   r = ln(c~ / c), u'(c~) = beta lambda': mean |r| {missed:.4f}")
    for when, given in (("before", ()), ("after", (paths, econ, cfg))):
        if given:
            print(f"3. step       (J'J + damping D) step = J'r: taken {dk.policy_step(state, batch, *given):.0f}")
        solution = dk.Solution(dk.weights_file(state, economy, cfg, 0), dtype=torch.float32)
        sides[when] = dk.euler_errors(solution, batch.at, batch.ahead, everywhere=True).abs()
        print(f"   error      |1 - c~ / c|, u'(c~) = beta E[R' u'(c')]: mean {sides[when].nanmean():.4f} {when} it")
    with dk.picture(picture, 2, [1.8, 1.8]) as [[simulated, rolled], [label, error]]:
        simulated.plot(paths.at.K[:, :6], linewidth=0.8)
        rolled.plot(k[:, :12], linewidth=0.8)
        simulated.set(xlabel="period", ylabel="1. simulate: K (goods)")
        rolled.set(xlabel="period", ylabel="2. roll out: k (goods)")
        label.loglog(sides["u'(c)"][::2], sides["beta lambda'"][::2], ".", markersize=1.5, color=dk.BLUE)
        label.axline((1, 1), (2, 2), **dk.LINES["grid"])
        label.set(xlabel="u'(c)", ylabel="2. label: beta lambda'", xlim=(0.1, 10), ylim=(0.1, 10))
        for when, color in (("before", "#D55E00"), ("after", dk.BLUE)):
            error.loglog(batch.at.k[::2], sides[when][::2], ".", markersize=1.5, color=color, label=f"{when} the step")
        error.set(xlabel="k (goods)", ylabel="3. step: Euler error", xlim=(0.1, None), ylim=(1e-5, None))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "one_iteration.png")
