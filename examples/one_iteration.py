"""The outer iteration of the default economy, for those who teach it: prints its steps beside their equations in the
first iteration and in a later one, and draws how far the first-order condition is missed before and after the step.

  python examples/one_iteration.py                # the first and the twelfth, into one_iteration.png
  python examples/one_iteration.py 20 my.png      # the first and the twentieth, into my.png
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import deepham_ks as dk  # noqa: E402


def show(state, paths, batch, missed, left, free, econ) -> None:
    """The steps in words and numbers; missed and left (n,) are ln(c~ / c) before and after the step."""
    beta, u_prime = econ.beta[batch.at.s], dk.marginal_utility(batch.c, econ)
    (a, b), K = state.K_law.T.tolist(), float(paths.at.K.mean())
    mean = lambda x: f"{float(x[free].abs().mean()):.1e}"  # noqa: E731
    print(f"\niteration {state.iteration}\n1. simulate: mean K {K:.2f}, and ln K' = a(z) + b(z) ln K with",
          f"a {a[0]:.3f}, {a[1]:.3f}, b {b[0]:.4f}, {b[1]:.4f}")
    print(f"2. roll out: {int(free.sum())} of {len(missed)} states are away from the borrowing limit")
    print(f"     exact condition       beta E[R' u'(c')] / u'(c) - 1    {mean(beta * batch.expected / u_prime - 1)}")
    print(f"     label, later misses   beta lambda' / u'(c) - 1         {mean(beta * batch.worth / u_prime - 1)}")
    print(f"3. move the policy: log c moves by {float(state.rates[0]):g} ln(c~ / c), where u'(c~) = beta lambda'")
    print(f"     |ln(c~ / c)|          before {mean(missed)}, after {mean(left)}")


@torch.no_grad()
def main(last: int = 12, picture: str = "one_iteration.png") -> None:
    economy, rng = dk.krusell_smith(), torch.Generator().manual_seed(0)
    cfg, econ = dk.sized(dk.Config(), economy), economy.tables(dtype=torch.float32)
    state = dk.initial_state(econ, economy, cfg, 0, rng)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panels = dict(zip((1, last), figure.subplots(1, 2)))
    while state.iteration < last:
        dk.set_rates(state, cfg)
        paths = dk.simulate_on(state, econ, cfg, rng)
        batch = dk.roll_out_households(state, paths, econ, cfg, rng)
        dk.policy_step(state, batch, paths, econ, cfg)
        state.iteration += 1
        if ax := panels.get(state.iteration):
            m, _ = dk.cash_on_hand(batch.at, econ)
            c = m - dk.network_capital(dk.policy_net(state, econ, cfg), batch.at, econ)
            missed, left = [dk.policy_residual(batch._replace(c=x), econ) for x in (batch.c, c)]
            free = batch.c < (m - econ.k_min) * (1 - 1e-6)
            show(state, paths, batch, missed, left, free, econ)
            for x, label, color in ((missed, "before", "#56B4E9"), (left, "after", "black")):
                ax.plot(batch.at.k[free][::6], x[free][::6], ".", markersize=2, color=color, label=label)
            ax.set(title=f"iteration {state.iteration}", xlabel="capital k (goods)", xscale="symlog")
            ax.legend(markerscale=5, frameon=False, title="ln(c~ / c)")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*[int(x) if x.isdigit() else x for x in sys.argv[1:]])
