"""What a user could forget when changing the model: each mistake, planted in a copy of the script, fails a test.

Slow, and not part of `bash reproduce.sh test`: python -m pytest -m slow tests/test_mistakes.py
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

NETWORKS, ACCURACY, GRID, TRAINING, PLANNER, MOMENTS, LABOUR, ECONOMY = (f"tests/test_{name}.py" for name in (
    "networks", "accuracy", "grid", "training", "planner", "moments", "labour", "economy"))

# what: (the line as it is, as it is mistaken, file and test that notice; no test: any of the file)
MISTAKES = {
    "income forgets z": (
        "    return econ.income[at.z, at.s] * w, R",
        "    return econ.income[0, at.s] * w, R",
        GRID, "test_euler_equation_by_loops"),
    "wage without its share": (
        "(1 - econ.alpha) * product * ratio",
        "product * ratio",
        ACCURACY, "test_errors_of_the_exact_solution_are_zero"),
    "expectation forgets who is where": (
        "(econ.probability[at.z, at.s].movedim(-1, 0) * values)",
        "(econ.probability[0, at.s].movedim(-1, 0) * values)",
        NETWORKS, "test_expected_worth_is_the_sum_over_every_next_state"),
    "moments of one z' for all": (
        "torch.take_along_dim(ahead.M.unsqueeze(0), of_z, -2)",
        "torch.take_along_dim(ahead.M.unsqueeze(0), 0 * of_z, -2)",
        NETWORKS, "test_expected_worth_is_the_sum_over_every_next_state"),
    "next state ignores z'": (
        "draw(u, econ.cum_s[z, z_next, s])",
        "draw(u, econ.cum_s[z, z, s])",
        NETWORKS, "test_sampled_households"),
    "networks do not see z": (
        "econ.sees[at.z, at.s]]",
        "econ.sees[0, at.s]]",
        NETWORKS, "test_features_tell_states_apart"),
    "V linear in ln K": (
        "x[..., column : column + 1].square()",
        "0 * x[..., column : column + 1]",
        NETWORKS, "test_value_network_sees_the_square_of_ln_K_first"),
    "limit at zero": (
        "    return econ.k_min - torch.expm1(",
        "    return -torch.expm1(",
        NETWORKS, "test_consumption_and_its_slope"),
    "slope of c at the limit as elsewhere": (
        "torch.where(f < 0, share * (R + above * f_k), R)",
        "share * (R + above * f_k)",
        NETWORKS, "test_consumption_and_its_slope"),
    "labels with one discount factor": (
        "gain, loss = of_miss * beta[1:], ",
        "gain, loss = of_miss * beta[:-1], ",
        NETWORKS, "test_labels_by_their_recursion"),
    "labels that take back without bound": (
        "saved[1:] / growth.clamp(min=1.0)",
        "saved[1:] / growth.clamp(max=1.0)",
        NETWORKS, "test_labels_by_their_recursion"),
    "labels without what later periods know": (
        "worth[t] = expected[t] + torch.clamp(",
        "worth[t] = expected[t] + 0 * torch.clamp(",
        NETWORKS, "test_labels_by_their_recursion"),
    "published labels with one discount factor": (
        "u_k[t] + beta[t] * (R - dc)[t] * V_k_T",
        "u_k[t] + econ.beta[0] * (R - dc)[t] * V_k_T",
        NETWORKS, "test_published_labels_are_back_propagation_through_time"),
    "first-order condition with one discount factor": (
        "worth = torch.maximum(econ.beta[batch.at.s] * batch.worth",
        "worth = torch.maximum(econ.beta[0] * batch.worth",
        NETWORKS, "test_policy_step_is_least_squares_of_log_c_on_its_first_order_condition"),
    "large residuals bend the policy": (
        "    free = free * robust(missed, free)\n",
        "",
        NETWORKS, "test_policy_step_is_least_squares_of_log_c_on_its_first_order_condition"),
    "who is at the limit pulls": (
        "free = ((f < 0) | (missed < 0))",
        "free = ((f < 0) | (missed < 9))",
        NETWORKS, "test_policy_step_is_least_squares_of_log_c_on_its_first_order_condition"),
    "learnt moments without their derivative": (
        "jacobian = torch.cat([jacobian, (by_moment.unsqueeze(2) * slopes[part]).sum(1)], 1)",
        "jacobian = torch.cat([jacobian, 0 * slopes[part].sum(1)], 1)",
        NETWORKS, "test_policy_step_is_least_squares_of_log_c_on_its_first_order_condition"),
    "steps that are taken whatever they do": (
        "better = left < least",
        "better = left > -1",
        NETWORKS, "test_gauss_newton_refuses_a_bad_step"),
    "Bellman step without beta": (
        "-econ.probability[at.z, at.s].T * beta * V_g_next",
        "-econ.probability[at.z, at.s].T * V_g_next",
        NETWORKS, "test_value_step_is_least_squares_on_the_bellman_residual_and_the_envelope"),
    "Bellman residual without Delta": (
        "flow, V_k = utility(batch.c, econ) + Delta(u_prime, at, econ) * at.k,",
        "flow, V_k = utility(batch.c, econ),",
        NETWORKS, "test_value_step_is_least_squares_on_the_bellman_residual_and_the_envelope"),
    "roll-outs start in two states": (
        "k, s = state.k.flatten()[found], s.repeat(",
        "k, s = state.k.flatten()[found], (s % 2).repeat(",
        NETWORKS, "test_sampled_households"),
    "labels that see V": (
        "thin(Batch(at, ahead, c, expected, fast.worth_of_saving(expected, c, dc, at, econ), c, date)",
        "thin(Batch(at, ahead, c, expected, fast.worth_of_saving(expected, c, dc, at, econ) + 1e-3 * "
        "fast.network_value(value_net(state, econ, cfg), at, econ)[1], c, date)",
        TRAINING, "test_V_does_not_move_the_policy"),
    "beliefs move while V is fitted": (
        "    state.rates[1:] = 0  #",
        "    state.rates[1:] = 0.5  #",
        TRAINING, "test_fitting_V_lowers_the_bellman_error_and_leaves_the_policy"),
    "an index from the host in each iteration": (
        "return torch.cat([batch[t] for t in taught(cfg)])",
        "return batch[taught(cfg)].flatten()",
        TRAINING, "test_an_iteration_neither_takes_from_the_host_nor_waits_for_it"),
    "law of motion of what came a period later": (
        "approach(state.K_law, law_of_motion(every_K, every_labour, every_z,",
        "approach(state.K_law, law_of_motion(every_K, every_labour, every_z.roll(1, 0),",
        TRAINING, "test_what_a_simulation_leaves"),
    "centre of ln K moves and the network does not": (
        "    b1.add_(K_SCALE * shift * W1[:, K_INPUT])\n",
        "",
        TRAINING, "test_recentring_leaves_the_policy"),
    "moments in new units, the network in the old": (
        "        W1[:, -n:].mul_(unit)\n",
        "",
        MOMENTS, "test_the_policy_stays_the_function_it_was_when_units_change"),
    "steps of Adam on prices of an older policy": (
        "        if step % 20 == 19:",
        "        if False:",
        TRAINING, "test_prices_follow_the_policy_between_the_steps_of_adam"),
    "next moments with everybody's state as it is": (
        "M_next, s_next = [], econ.reach[s]  # (B, N, reachable)",
        "M_next, s_next = [], s.unsqueeze(-1).expand(*s.shape, econ.reach.shape[1])",
        MOMENTS, "test_next_moments_against_every_combination_of_next_states"),
    "planner's Delta left out of what capital is worth": (
        "    return R * u_prime + Delta(u_prime, at, econ)",
        "    return R * u_prime",
        PLANNER, "test_the_first_order_condition_of_a_planner_and_of_a_player"),
    "planner's Delta' over everybody's states alike": (
        "    p = weight * econ.probability[at.z, at.s].movedim(-1, 0)\n",
        "    p = weight * (econ.probability[at.z, at.s].movedim(-1, 0) > 0)\n",
        PLANNER, "test_planners_Delta_against_everybodys_draws"),
    "grid with one discount factor": (
        "scipy.sparse.csr_array(P * a.beta[:, None])",
        "scipy.sparse.csr_array(P * a.beta[0])",
        GRID, "test_euler_equation_of_any_economy"),
    "grid table of two states": (
        "corner = (at.z * table.shape[1] + at.s) * n_L",
        "corner = (at.z * 2 + at.s) * n_L",
        GRID, "test_any_economy_converges"),
    "law of motion of the grid's short path": (
        "steps = steps, new + correction - laws",
        "steps = steps, new - laws",
        GRID, "test_law_of_motion_is_that_of_the_whole_path"),
    "histogram forgets the transition": (
        "mass = a.Pi[z, z_path[(t + 1) % len(z_path)]].T @ moved.reshape(mass.shape)",
        "mass = moved.reshape(mass.shape)",
        GRID, "test_histogram_keeps_mass_mean_and_shares"),
    "histogram moves by one node of K": (
        "moved = move @ (mass[:, None] * weight[:, None]).ravel()",
        "moved = move @ (mass[:, None] * (weight > 0.5)[:, None]).ravel()",
        GRID, "test_histogram_keeps_mass_mean_and_shares"),
    "Euler errors with one discount factor": (
        "implied = inverse_marginal_utility((econ.beta[at.s] * worth).clamp(min=1e-30), econ)\n    implied",
        "implied = inverse_marginal_utility((econ.beta[0] * worth).clamp(min=1e-30), econ)\n    implied",
        GRID, "test_euler_equation_of_any_economy"),
    "Bellman errors with one discount factor": (
        "utility(share * above, econ) + econ.beta[at.s] * expected",
        "utility(share * above, econ) + econ.beta[0] * expected",
        ACCURACY, "test_best_consumption_against_brute_force"),
    "best c at a point of the search, without the parabola": (
        "return torch.maximum(y.amax(0), objective(peak.nan_to_num().clamp(x0, x2)))",
        "return y.amax(0)",
        ACCURACY, "test_errors_of_a_wrong_policy_have_a_closed_form"),
    "panels that start as if everybody were in one state": (
        "for i, held in enumerate(np.maximum.accumulate(mass.cumsum(1), 1)):",
        "for i, held in enumerate(mass.sum(0).cumsum() + 0 * mass):",
        ACCURACY, "test_panel_from_the_limit"),
    "weights of a section are forgotten": (
        "    mass = section.weight.flatten()",
        "    mass = (0 * section.weight + 1).flatten()",
        ACCURACY, "test_states_of_a_section_represent_its_mass"),
    "labour by its mean in z": (
        "    return at.labour[..., 0] if",
        "    return econ.L[at.z] if",
        LABOUR, "test_goods_add_up_in_every_period"),
    "benefits that nobody pays for": (
        "torch.stack([L, paid / L], -1).unsqueeze(1)",
        "torch.stack([L, 0 * paid / L], -1).unsqueeze(1)",
        LABOUR, "test_goods_add_up_in_every_period"),
    "histogram in the middle of the range of L": (
        "mass.sum(1) @ a.labour[z])\n",
        "axes.L[z].mean())\n",
        LABOUR, "test_goods_add_up_in_every_period"),
    "labour next period by today's shares": (
        "labour_of(shares_next(p, z, z_next, econ), z_next, econ)",
        "labour_of(p, z_next, econ)",
        LABOUR, "test_goods_add_up_where_households_are_at_their_shares"),
    "shares as if z stayed": (
        "p.unsqueeze(-2) @ econ.Pi[z[:, 0], z_next[:, 0]]",
        "p.unsqueeze(-2) @ econ.Pi[z[:, 0], z[:, 0]]",
        LABOUR, "test_shares_along_a_path_are_exact"),
    "networks do not see labour": (
        "others.append((at.labour[..., :1] - econ.L_mean)",
        "others.append(0 * (at.labour[..., :1] - econ.L_mean)",
        LABOUR, "test_training_uses_labour"),
    "next_capital() drops L": (
        "at = at._replace(labour=labour_at(L, at.z, econ))\n",
        "at = at._replace(labour=econ.usual[at.z])\n",
        LABOUR, "test_policies_and_values_depend_on_labour"),
    "a tax that is paid on most paths": (
        "    tax = (paid / L).max()\n",
        "    tax = (usual_paid / a.L).max()\n",
        LABOUR, "test_bad_tables_are_refused_in_one_line"),
    "law of labour as if z stayed": (
        "line(L[t], p[t] @ a.Pi[z, z_next] @ a.labour[z_next])",
        "line(L[t], p[t] @ a.Pi[z, z] @ a.labour[z_next])",
        LABOUR, "test_labour_next_period_is_linear_where_there_are_two_states"),
    "law of motion without labour": (
        "value = value + labour[..., 0] * (law[..., 2]",
        "value = value + 0 * labour[..., 0] * (law[..., 2]",
        LABOUR, "test_regression_recovers_a_law_with_labour"),
    "labour of one z' for all": (
        "torch.take_along_dim(ahead.labour.unsqueeze(0), of_z, -2)",
        "torch.take_along_dim(ahead.labour.unsqueeze(0), 0 * of_z, -2)",
        NETWORKS, "test_expected_worth_is_the_sum_over_every_next_state"),
    "nodes that all count the same": (
        "    return (x * (weight.unsqueeze(-1) if x.dim() > weight.dim() else weight)).mean(1)",
        "    return x.mean(1)",
        MOMENTS, "test_moments_are_means_over_households"),
    "nodes whose s moves as if z stayed": (
        "return Panel(k, s, (econ.Pi[z[:, 0], z_next[:, 0]]",
        "return Panel(k, s, (econ.Pi[z[:, 0], z[:, 0]]",
        ECONOMY, "test_infinitely_many_households_move_as_they_save"),
    "shares of the lottery swapped": (
        "torch.stack([b * cd, a * cd, ab * d, ab * c], -2)",
        "torch.stack([b * cd, ab * d, a * cd, ab * c], -2)",
        ECONOMY, "test_the_lottery_keeps_mass_mean_and_variance"),
    "households below the first node are beyond it": (
        "k.clamp(nodes[0], nodes[-1])",
        "k.clamp(max=nodes[-1])",
        ECONOMY, "test_the_lottery_keeps_mass_mean_and_variance"),
    "households drawn from the nodes, each as often": (
        "weight.flatten().clamp(min=0)).double()",
        "(0 * weight.flatten() + 1)).double()",
        NETWORKS, "test_households_drawn_from_nodes_are_distributed_as_they_are"),
    "histograms without what is below zero": (
        "somebody, s = np.abs(mass) > 1e-16",
        "somebody, s = mass > 1e-16",
        PLANNER, "test_the_grid_finds_the_constrained_efficient_economy"),
    "responses to shocks that differ": (
        "        rng.set_state(after)\n",
        "",
        ACCURACY, "test_shocked_paths"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, tmp_path):
    right, wrong, file, test = MISTAKES[mistake]
    where = f"{file}::{test}" if test else file
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
    assert len(MISTAKES) >= 20
    for mistake, (right, wrong, *_) in MISTAKES.items():
        assert script.count(right) == 1 and right != wrong, mistake
