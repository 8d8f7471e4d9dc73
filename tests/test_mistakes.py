"""What a user could forget when changing the model: each mistake, planted in a copy of the script, fails a test.

Slow, and not part of `bash reproduce.sh test`: python -m pytest -m slow tests/test_mistakes.py
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

ECONOMY, NETWORKS, ACCURACY, GRID, TRAINING, PLANNER, MOMENTS, RANKS = (f"tests/test_{name}.py" for name in (
    "economy", "networks", "accuracy", "grid", "training", "planner", "moments", "ranks"))

# what: (the line as it is, as it is mistaken, where it is noticed)
MISTAKES = {
    "row of the tables with two states": ("    return z * econ.beta.shape[0] + s", "    return 2 * z + s", ECONOMY),
    "income forgets z": ("econ.income[joint(s, z, econ)] * w, R", "econ.income[s] * w, R", ECONOMY),
    "next state without the list of reachable ones": (
        "econ.reach[s, draw(draws(t, s), econ.cum_s[joint(s, z_and_next[t], econ)])]",
        "draw(draws(t, s), econ.cum_s[joint(s, z_and_next[t], econ)])", ECONOMY),
    "next state ignores z'": (
        "z_path[:-1] * econ.TFP.shape[0] + z_path[1:]", "z_path[:-1] * econ.TFP.shape[0] + z_path[:-1]", ECONOMY),
    "expectation forgets who is where": (
        "(econ.probability[joint(s, z, econ)].movedim(-1, 0) * values)",
        "(econ.probability[s].movedim(-1, 0) * values)", ECONOMY),
    "present value with one discount factor": (
        "discounted = np.tile(self.beta, Z)[:, None] * self.P", "discounted = self.beta[0] * self.P", ECONOMY),
    "initial panel forgets the rare state": (
        "draw(u, of_s[z]), z)", "draw(u, of_s[z]) * 0, z)", ECONOMY),
    "networks do not see z": (
        "econ.sees[joint(s, z, econ)]], -1)", "econ.sees[s]], -1)", NETWORKS),
    "control variate takes K' as it came for what was expected": (
        "successors(k_came, s_t, K_next[t:last], z_t, econ)", "successors(k_came, s_t, K_came, z_t, econ)", NETWORKS),
    "law of motion by least squares": (
        "law[:, 1], driven_by_z(law, z))[0]", "law[:, 1], ln_K[:-1])[0]", NETWORKS),
    "law of motion of the grid's short path": ("found + to_long - law for", "found - law for", GRID),
    "law of motion of the grid's own path": ("        long[0][0][:, 0] -= luck_of(", "        (luck_of)(", GRID),
    "costates with one discount factor": (
        "marginal_utility(c, econ) * dc + Delta, econ.beta[s]\n",
        "marginal_utility(c, econ) * dc + Delta, econ.beta[0] + 0 * c\n", NETWORKS),
    "first-order condition with one discount factor": (
        "    return econ.beta[batch.s] * batch.lam_next / marginal_utility(batch.c, econ)",
        "    return econ.beta[0] * batch.lam_next / marginal_utility(batch.c, econ)", NETWORKS),
    "Bellman step over four successors": ("for j in range(len(P)):", "for j in range(min(4, len(P))):", NETWORKS),
    "weights of two states": ("econ.root_weight[batch.s])", "econ.root_weight[batch.s.clamp(max=1)])", NETWORKS),
    "roll-outs start in two states": (
        "any_s = torch.randint(econ.beta.shape[0], (M,)", "any_s = torch.randint(2, (M,)", NETWORKS),
    "limit at zero": ("    return econ.k_min + saved_share(", "    return saved_share(", NETWORKS),
    "grid with one discount factor": ("P = (econ.beta[:, None, None] * econ.P)", "P = (econ.beta[0] * econ.P)", GRID),
    "grid table of two states": ("corner = (joint(s, z, self.econ) * n_K", "corner = ((2 * z + s) * n_K", GRID),
    "histogram forgets the transition": (
        "mass = econ.Pi[z, z_path[min(t + 1, len(z_path) - 1)]].T @ moved.reshape(mass.shape)",
        "mass = moved.reshape(mass.shape)", GRID),
    "histogram moves by one node of K": (
        "moved = move @ (mass[:, None] * weight[:, None]).ravel()",
        "moved = move @ (mass[:, None] * (weight > 0.5)[:, None]).ravel()", GRID),
    "large residuals bend the policy": ("    free = free * robust(newton, free)\n", "", NETWORKS),
    "large residuals bend the value": (
        "level, slope = [weight * robust(r", "unused = [weight * robust(r", NETWORKS),
    "cross-sections of the first policies": ("if 0 < state[\"iteration\"] < DISPERSED", "if False", TRAINING),
    "shocks without regard to wealth": (
        "state[\"k\"].sort(1)", "state[\"k\"], torch.arange(cfg.n_agents).expand_as(state[\"s\"])", TRAINING),
    "replayed graphs share their memory": ("return step().clone()", "return step()", ACCURACY),
    "an index from the host in each iteration": (
        "torch.cat([path[t] for t in taught(cfg)])", "path[taught(cfg)].flatten()", TRAINING),
    "Euler errors with one discount factor": (
        "worth = econ.beta[states.s] * expected(R_next", "worth = econ.beta[0] * expected(R_next", ACCURACY),
    "Bellman errors with one discount factor": (
        "above, beta = m - econ.k_min, econ.beta[states.s]", "above, beta = m - econ.k_min, econ.beta[0]", ACCURACY),
    "planner's Delta left out of the costates": (
        "marginal_utility(c, econ) * dc + Delta, econ.beta[s]",
        "marginal_utility(c, econ) * dc, econ.beta[s]", PLANNER),
    "planner's Delta' over everybody's states alike": (
        "    p = weight * econ.probability[joint(s, z, econ)].movedim(-1, 0)\n",
        "    p = weight * (econ.probability[joint(s, z, econ)].movedim(-1, 0) > 0)\n", PLANNER),
    "next moments with everybody's state as it is": (
        "s_next = econ.reach[s]  # (B, N, reachable)", "s_next = s.unsqueeze(-1).expand(*s.shape, econ.reach.shape[1])",
        MOMENTS),
    "units of the policy's moments in the value network's place": (
        "** 0.5 * econ.M_std[view, -p:]", "** 0.5 * econ.M_std[0, -p:]", MOMENTS),
    "learnt moments without their derivative": (
        "return torch.cat([jacobian, (by_moment.unsqueeze(2) * slopes).sum(1)], 1)",
        "return torch.cat([jacobian, 0 * slopes.sum(1)], 1)", MOMENTS),
    "moments in new units, networks in the old": ("        W1[:, -n:].mul_(unit[view])\n", "", MOMENTS),
    "value networks that learn from the same households": (
        "Batch(*[x[i::n] for x in batch]) for i in range(n)]", "batch for _ in range(n)]", TRAINING),
    "labels of V beyond what utility can be": (
        "D * utility(2 * batch.c.max(), econ))", "D * utility(2 * batch.c.max(), econ) + torch.inf)", NETWORKS),
    "law of motion of a rank's own economies": (
        'K_path, z_path = gathered(state["K_path"], 1), gathered(state["z_path"], 1)',
        'K_path, z_path = state["K_path"], state["z_path"]', RANKS),
    "steps taken by a rank's own loss": ("left = total(loss(trial))", "left = loss(trial)", RANKS),
    "square of ln K at another centre": ("        of_x.add_(2 * shift * of_square)\n", "", TRAINING),
    "square of ln K with random weights": (
        "        W1[:, : n - n_inputs(econ)] = 0", "        W1[:, :0] = 0", TRAINING),
    "V linear in ln K": ("x[..., column : column + 1].square()", "0 * x[..., column : column + 1]", NETWORKS),
    "range of a rank's own households": (
        "ends = gathered(torch.stack([k.min(), k.max()]), 0)", "ends = torch.stack([k.min(), k.max()])", RANKS),
    "ranks with the same random numbers": ("return seed + RANK * 10**10", "return seed", RANKS),
    "a rank that is deaf while it waits": (
        "    while not sums.is_completed():\n", "    while False:\n", RANKS),
    "steps of Adam on prices of an older policy": (
        "            if step % 20 == 19:", "            if False:", TRAINING),
    "errors of the first period, not at rest": (
        "        last[:] = [now]", "        last.extend([now] * (not last))", ACCURACY),
    "panels that start where the first solution is": (
        "for i, mass in enumerate(masses):", "for i, mass in enumerate(masses[:1] * len(masses)):", ACCURACY),
    "panels that start as if everybody were in one state": (
        "for j, held in enumerate(mass.cumsum(1)):", "for j, held in enumerate(mass.sum(0).cumsum() + 0 * mass):",
        ACCURACY),
    "panels that start dispersed": (
        "functools.partial(judge_panel, solutions, econ, cfg, *size, JUDGE_SEED, start, graphs)",
        "functools.partial(judge_panel, solutions, econ, cfg, *size, JUDGE_SEED, graphs=graphs)", ACCURACY),
    "best c at a point of the search, without the parabola": (
        "return torch.maximum(y.amax(0), objective(peak.nan_to_num().clamp(x0, x2)))", "return y.amax(0)", ACCURACY),
    "V waits where the policy sees it": (
        "can_wait = cfg.control_variate and not", "can_wait = not", TRAINING),
    "momentum nowhere": ("        if cfg.learnt_moments:\n            policy = policy + torch.where(",
                         "        if False:\n            policy = policy + torch.where(", NETWORKS),
    "distance of two states": (
        "s, z = np.arange(len(economy.beta)), np.arange(len(economy.TFP))\n    states",
        "s, z = [0, 1], [0]\n    states", ACCURACY),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, tmp_path):
    right, wrong, where = MISTAKES[mistake]
    script = (ROOT / "deepham_ks.py").read_text(encoding="utf-8")
    assert script.count(right) == 1, "the script has moved on: plant the mistake where its line is now"
    (tmp_path / "deepham_ks.py").write_text(script.replace(right, wrong), encoding="utf-8")
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", where]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DEEPHAM_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:]  # a test failed; 0: nobody noticed


def test_each_mistake_still_has_its_line():
    """Quick, so that this list cannot rot unseen."""
    script = (ROOT / "deepham_ks.py").read_text(encoding="utf-8")
    assert len(MISTAKES) >= 14
    for mistake, (right, wrong, _) in MISTAKES.items():
        assert script.count(right) == 1 and right != wrong, mistake
