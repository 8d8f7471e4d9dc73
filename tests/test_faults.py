"""Faults that used to say nothing (issue 26): each gives the right value now, or one line that says why not."""

import dataclasses
import re

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import axes_of, dk, example, toy

GRID = dk.GridConfig(n_k=60, n_K=4, n_fine=150, n_K_fine=11, periods=1500, tolerance=1e-5)
ROUGH = dataclasses.replace(GRID, tolerance=1e-3)  # where any policy will do
SMOKE = dk.PRESETS["smoke"]
# a network that has learnt Aiyagari's economies, in seconds
SHORT = dk.Config(n_economies=8, batch=256, hidden=16, iterations=16, averaging=4, settle=1e-3, horizon=50,
                  periods=60)


def economy(**changes):
    """Two states of each, Pi a function of neither z nor z'."""
    return dk.Economy(**dict(alpha=0.36, delta=0.025, beta=0.99, TFP=[0.99, 1.01], P_z=[[0.9, 0.1], [0.1, 0.9]],
                             Pi=[[0.5, 0.5], [0.05, 0.95]], income=[0.4, 1.0]) | changes)


def refused(act, *words, **options) -> str:
    """The one line with which act() is refused; it has these words."""
    with pytest.raises(dk.UserError) as error:
        act(**options)
    told = str(error.value)
    assert "\n" not in told and all(word in told for word in words), told
    return told


def interest(solution) -> float:
    """Percent a period, at mean capital, where nothing moves z."""
    K, z = torch.tensor(float(solution.K_mean), dtype=torch.float64), torch.tensor(0)
    R, _ = dk.prices(dk.place(K, z, K, z, solution.econ), solution.econ)
    return 100 * (float(R) - 1)


def aiyagari(sigma=0.4, rho=0.6, gamma=3.0, **more):
    """Aiyagari (1994): log labour in seven states at -3 to 3 standard deviations, Tauchen cells half way between."""
    x = np.linspace(-3, 3, 7) * sigma
    cells = scipy.stats.norm.cdf(((x[1:] + x[:-1]) / 2 - rho * x[:, None]) / (sigma * np.sqrt(1 - rho**2)))
    Pi = np.diff(np.hstack([np.zeros((7, 1)), cells, np.ones((7, 1))]))
    return dk.Economy(alpha=0.36, delta=0.08, beta=0.96, gamma=gamma, TFP=[1.0], P_z=[[1.0]], Pi=Pi, income=np.exp(x),
                      **more)


# ------------------------------------------------------------------------------------------ distributions are whole


CASTANEDA = np.array([[0.9624, 0.0114, 0.0039, 0.0001], [0.0307, 0.9433, 0.0037, 0], [0.0150, 0.0043, 0.9582, 0.0002],
                      [0.1066, 0.0049, 0.0611, 0.8051]])


def test_households_far_above_the_first_nodes():
    """Castaneda, Diaz-Gimenez & Rios-Rull's (2003) earnings: K 43.38 and r 1.94%, where nodes that cut the rich off
    have 36.70 and 2.80%."""
    Pi = CASTANEDA / CASTANEDA.sum(1, keepdims=True)
    earnings = dk.Economy(alpha=0.376, delta=0.059, beta=0.942, gamma=1.5, TFP=[1.0], P_z=[[1.0]], Pi=Pi,
                          income=[1, 3.15, 9.78, 1061])
    grid = dk.solve_grid(earnings, dataclasses.replace(GRID, n_k=100, n_fine=300, tolerance=1e-4))
    assert grid.K_mean == pytest.approx(43.38, abs=0.1) and interest(grid) == pytest.approx(1.94, abs=0.01)
    assert any("the largest k is" in note for note in grid.notes)


@pytest.fixture(scope="module", autouse=True)
def rough(rough_V):
    pass


@pytest.fixture(scope="module")
def aiyagari_grid():
    return dk.solve_grid(aiyagari(), GRID)


def test_first_nodes_that_are_too_short(aiyagari_grid):
    """Nodes of k that begin at twice mean capital end where the usual ones do."""
    grid = dk.solve_grid(aiyagari(), dataclasses.replace(GRID, k_max=2.0))
    assert grid.K_mean == pytest.approx(aiyagari_grid.K_mean, rel=2e-3) and grid.reach()[0][1] > 5 * grid.K_mean


@pytest.mark.parametrize("economy, r", [(aiyagari(rho=0.9, gamma=5.0), -0.086), (aiyagari(k_min=-1.0), 3.075)],
                         ids=["K far away", "debt"])
def test_aiyagari(economy, r):
    """Interest rates of an independent solver, also where nodes of K have to move; this grid is coarse."""
    assert interest(dk.solve_grid(economy, GRID)) == pytest.approx(r, abs=0.03)


# ------------------------------------------------------------------------------------------ the limit is stationary


def std_of(people, k) -> float:
    people = people / people.sum()
    return float(np.sqrt(people @ (k - people @ k) ** 2))


@pytest.fixture(scope="module")
def two_groups():
    """Two groups for ever with discount factors .9794 and .9930, on a coarse grid: households mix slowly."""
    groups = example("groups")
    return dk.solve_grid(groups.economy(groups.Calibration(groups=2, spread=0.0136, beta=0.9862)), dk.SMOKE_GRID)


def test_what_is_judged_is_stationary(two_groups, monkeypatch):
    """Mean and std of capital are those of the same policy after as many passes over the same path of z as it takes to
    forget where they began, to twice what they are said to have to go."""
    monkeypatch.setattr(dk, "ERROR_STATES", 500)
    cfg = dk.Config(eval_periods=1000)
    figures, arrays = dk.judge_limit(two_groups, cfg)
    assert figures["moves"] < dk.MOVES
    k, mass, a = arrays["k"], arrays["mass"], two_groups.economy.arrays
    axes, found = axes_of(two_groups)._replace(k=k), [np.inf]
    z_path = dk.draw_z_path(1000, a.P_z, np.random.default_rng(dk.JUDGE_SEED))
    table = dk.histogram_policy(two_groups, axes)
    for _ in range(40):
        kept = []

        def keep(t, mass, k_next, kept=kept):
            kept.append(mass.sum(0))

        _, mass = dk.simulate_histogram(table, axes, mass, z_path, two_groups.economy, keep)
        people = np.mean(kept[100::20], 0)
        found.append(std_of(people, k))
        if abs(found[-1] / found[-2] - 1) < 1e-4:
            break
    assert figures["capital"]["mean"] == pytest.approx(people @ k, rel=2 * dk.MOVES)
    assert figures["capital"]["std"] == pytest.approx(found[-1], rel=2 * dk.MOVES)


def test_twice_as_many_nodes_change_nothing():
    """Mean, std and Gini of the stationary distribution on the judge's nodes and with one more between any two."""
    grid, found = dk.solve_grid(config=ROUGH), []
    k = dk.histogram_nodes(grid.reach()[0][1], grid.econ)
    fine = np.interp(np.linspace(0, len(k) - 1, 2 * len(k) - 1), np.arange(len(k)), k)
    for nodes in (k, fine):
        of = dk.inequality(nodes, dk.stationary_mass(grid, nodes).sum((0, 1)))
        found.append([of[name] for name in ("mean", "std", "gini")])
    assert found[0] == pytest.approx(found[1], rel=2e-4)


# ------------------------------------------------------------------------------------------ labour adds up


FINDING, SEPARATION = np.array([0.1, 0.3]), np.array([0.05, 0.01])  # by z or z'
FLOWS = np.array([[1 - FINDING, FINDING], [SEPARATION, 1 - SEPARATION]]).transpose(2, 0, 1)  # (z, s, s')


def goods_missing(Pi, periods=20_000):
    """Least and largest (Y + (1 - delta) K - C - K') / Y along a path, by the definition, at any K and any savings."""
    e, K, rng = economy(), 35.0, np.random.default_rng(5)
    P = np.einsum("xy,xyij->xiyj", e.arrays.P_z, np.broadcast_to(Pi, (2, 2, 2, 2))).reshape(4, 4)
    shares = np.linalg.matrix_power(P, 10_000)[0].reshape(2, 2)
    shares /= shares.sum(1, keepdims=True)
    z, p, gaps = 0, shares[0], []
    for _ in range(periods):
        L = shares[z] @ [0.4, 1.0]
        Y = e.arrays.TFP[z] * K**0.36 * L**0.64
        R, w = 1 - 0.025 + 0.36 * Y / K, 0.64 * Y / L
        spent = R * K + w * p @ [0.4, 1.0]  # C + K' of households together
        gaps.append((Y + 0.975 * K - spent) / Y)
        z_next = int(rng.random() < e.arrays.P_z[z, 1])
        p, z = p @ np.broadcast_to(Pi, (2, 2, 2, 2))[z, z_next], z_next
    return 100 * min(gaps), 100 * max(gaps)


@pytest.mark.parametrize("Pi", [FLOWS[None], FLOWS[:, None]], ids=["by z'", "by z"])
def test_labour_by_the_history_of_z(Pi):
    """Refused, with the size: 7% of output for flows by z' (7.2 and 6.8)."""
    told = refused(economy, "Pi: ", "history of z", "% of output", Pi=Pi)
    sizes = sorted(abs(float(x)) for x in re.search(r"by (\S+) to (\S+)% of output", told).groups())
    assert sizes == pytest.approx(sorted(map(abs, goods_missing(Pi))), rel=0.05)
    if Pi is FLOWS[None]:
        assert sizes == pytest.approx([6.8, 7.2], abs=0.1)


def test_shares_that_follow_from_z_alone_are_taken():
    """Drawn anew given z', whatever s was; or moving at another pace in each z."""
    anew = economy(Pi=np.array([[[0.1, 0.9]] * 2, [[0.04, 0.96]] * 2])[None])
    assert anew.arrays.shares == pytest.approx(np.array([[0.05, 0.45], [0.02, 0.48]]))
    assert anew.arrays.L == pytest.approx([0.94, 0.976])
    paces = economy(Pi=np.array([[[0.5, 0.5], [0.05, 0.95]], [[0.7, 0.3], [0.03, 0.97]]])[:, None])
    assert paces.arrays.shares == pytest.approx(np.array([[1, 10], [1, 10]]) / 22)


@pytest.mark.parametrize("P_z, z", [([[0.9, 0.1], [0, 1]], 0), ([[1, 0], [0.1, 0.9]], 1)])
def test_a_state_that_does_not_recur(P_z, z):
    refused(economy, f"P_z: z = {z} does not recur", P_z=P_z)
    refused(economy, f"P_z: z = {z} does not recur", P_z=P_z, Pi=np.eye(2), shares=np.eye(2)[[1 - z]].T * [[0.3, 0.7]])


def test_one_of_three_states_that_does_not_recur():
    refused(economy, "P_z: z = 1 does not recur", TFP=[0.9, 1.0, 1.1],
            P_z=[[0.9, 0, 0.1], [0.1, 0.8, 0.1], [0.1, 0, 0.9]])


def test_Pi_by_z_or_by_z_next():
    """(Z, S, S) says neither, and the line says how to; so it does where Z = S."""
    told = refused(economy, "Pi: shape (2, 2, 2)", "Pi[:, None]", "Pi[None]", Pi=FLOWS)
    assert told.index("Pi[:, None]") < told.index("z now") < told.index("Pi[None]") < told.index("z' next")
    refused(economy, "Pi: shape (2, 3, 3)", "Pi[:, None]", Pi=np.full((2, 3, 3), 1 / 3), income=[1, 2, 3])


JOINT = dk.krusell_smith().arrays.P.reshape(4, 4)


def test_the_joint_matrix_is_named():
    """As Pi or as P_z the textbook's 4 x 4 matrix is refused; as Pi the line says what takes it."""
    refused(economy, "Pi: ", "dk.from_joint(P, 2, 2)", Pi=JOINT)
    refused(economy, "Pi: ", "dk.from_joint(P, 2, 3)", Pi=np.full((6, 6), 1 / 6), income=[1, 2, 3])
    refused(economy, "P_z: ", P_z=JOINT)


@pytest.mark.parametrize("whole, digits, miss", [("log", 16, 1e-12), ("log", 6, 1e-5), ("log", 4, 1e-3),
                                                 ("toy", 16, 1e-12), ("toy", 6, 1e-5)])
def test_from_joint(whole, digits, miss, economies):
    """The economy comes back, nearly where its matrix was rounded."""
    whole = economies[whole]
    Z, S = whole.arrays.shares.shape
    P_z, Pi = dk.from_joint(whole.arrays.P.reshape(Z * S, -1).round(digits), Z, S)
    made = dataclasses.replace(whole, P_z=P_z, Pi=Pi, shares=None, L=None)
    assert made.arrays.P == pytest.approx(whole.arrays.P, abs=miss)
    assert made.arrays.shares == pytest.approx(whole.arrays.shares, abs=miss)
    assert made.K_ss == pytest.approx(whole.K_ss, rel=miss)


@pytest.mark.parametrize("P, Z, S, words", [
    (JOINT, 2, 3, ["shape (4, 4)", "(6, 6)"]), (JOINT[:, :3], 2, 2, ["shape (4, 3)"]),
    (JOINT.reshape(2, 2, 2, 2).transpose(1, 0, 3, 2).reshape(4, 4), 2, 2, ["depends on s", "order (z, s)"]),
    (JOINT.T, 2, 2, ["from_joint"]), (JOINT / 2, 2, 2, []), (-JOINT, 2, 2, ["from_joint", "from -"]),
    (JOINT * np.nan, 2, 2, ["from_joint", "nan"]), ("P", 2, 2, ["from_joint"]), ([[1, 2], [3]], 2, 2, ["from_joint"]),
    (None, 2, 2, ["from_joint"]), ([], 1, 2, ["from_joint", "shape (0,)"])],
    ids=["sizes", "not square", "order", "transposed", "sums", "signs", "nan", "word", "ragged", "nothing", "empty"])
def test_from_joint_misused(P, Z, S, words):
    """One line, here or at the latest from the economy that is made of it."""
    refused(lambda: economy(**dict(zip(("P_z", "Pi"), dk.from_joint(P, Z, S)))), *words)


def test_tables_of_float32_are_taken():
    """And give the economy of float64."""
    e = dk.krusell_smith()
    names = ("Pi", "P_z", "TFP", "income", "L", "beta")
    narrow = {name: np.asarray(getattr(e.arrays, name), np.float32) for name in names}
    made = dataclasses.replace(e, **narrow, shares=e.arrays.shares.astype(np.float32))
    assert made.arrays.P.sum((2, 3)) == pytest.approx(np.ones((2, 2)), abs=1e-14)
    assert made.arrays.shares == pytest.approx(e.arrays.shares, abs=1e-6)
    assert made.K_ss == pytest.approx(e.K_ss, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_tables_of_torch_are_taken_in_silence():
    made = economy(Pi=torch.tensor([[0.5, 0.5], [0.05, 0.95]], dtype=torch.float64), TFP=torch.tensor([0.99, 1.01]))
    assert made.arrays.Pi == pytest.approx(economy().arrays.Pi)


def test_tables_of_four_digits_are_taken():
    """Normalised within rounding, with shares and L or without."""
    e = dk.krusell_smith()
    rounded = {name: np.round(getattr(e.arrays, name), 4) for name in ("Pi", "P_z", "income", "L")}
    for more in ({"shares": None, "L": None}, {"shares": None}, {"shares": e.arrays.shares.round(4)}):
        made = dataclasses.replace(e, **rounded | more)
        assert made.arrays.shares == pytest.approx(e.arrays.shares, abs=1e-4)
        assert made.arrays.L == pytest.approx(e.arrays.L, abs=3e-4)
        assert made.arrays.P.sum((2, 3)) == pytest.approx(np.ones((2, 2)), abs=1e-14)
    assert economy(Pi=[[0.3333, 0.6666], [0.0501, 0.9498]]).arrays.Pi.sum(-1) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("changes, words", [
    ({"Pi": [[0.5, 0.5], [0.05, 0.94]]}, ["Pi: ", "-0.01"]), ({"P_z": [[0.9, 0.101], [0.1, 0.9]]}, ["P_z: ", "0.001"]),
    ({"shares": [[0.055, 0.445], [0.045, 0.455]]}, ["shares: ", "0.00955"]),
    ({"L": [0.955, 0.945]}, ["income: ", "z = 0", "0.990"])], ids=["Pi", "P_z", "shares", "L"])
def test_beyond_rounding_the_size_is_told(changes, words):
    refused(economy, *words, **changes)


def test_TFP_falls():
    """States of z go from bad to good; those of equal TFP may differ in something else."""
    refused(economy, "TFP: falls", "bad to good", TFP=[1.01, 0.99])
    refused(economy, "TFP: falls", TFP=[0.9, 1.1, 1.0], P_z=np.full((3, 3), 1 / 3))
    assert economy(TFP=1.0, P_z=[[1.0]]).arrays.L == pytest.approx(economy(TFP=[1.0, 1.0]).arrays.L[0], rel=1e-14)


@pytest.mark.parametrize("changes", [{"income": [-1.2, 0.4]}, {"TFP": [-0.01, 0.01]}, {"L": [-0.1, 0.1]}], ids=str)
def test_logs(changes):
    refused(economy, f"{next(iter(changes))}: ", "logs? take exp", **changes)


# ------------------------------------------------------------------------------------------ what is given stays


@pytest.mark.parametrize("changes", [{"Pi": [[0.5, 0.5], [0.05, 0.95]]}, {"P_z": [[0.9, 0.1], [0.2, 0.8]]},
                                     {"income": [0.2, 1.0]}], ids=str)
def test_replacing_a_table(changes):
    """What follows from it follows anew, in the default economy, too."""
    name, value = next(iter(changes.items()))
    for e in (economy(), dk.krusell_smith()):
        made = dataclasses.replace(e, **changes)
        assert getattr(made, name) is value
        a = made.arrays
        P = a.P.reshape(4, 4)
        assert a.shares.reshape(-1) @ P == pytest.approx(a.shares.reshape(-1), abs=1e-14)
        assert a.L == pytest.approx((a.shares * a.income).sum(1) / a.shares.sum(1), rel=1e-12)


# ------------------------------------------------------------------------------------------ limits


def test_a_limit_is_payable_at_the_prices_of_the_solution():
    """Interest on -9 is more than the lowest income at 1 / beta - 1 = 4.2%, less at the 3.5% of the solution; that on
    -12 is more there."""
    taken = aiyagari(k_min=-9.0)
    assert (taken.R_ss - 1) * 9 > taken.arrays.income.min() * taken.w_ss
    grid = dk.solve_grid(taken, GRID)
    assert interest(grid) == pytest.approx(3.515, abs=0.03)
    refused(lambda: dk.solve_grid(aiyagari(k_min=-12.0), GRID), "k_min: at -12", "at the prices of the solution")


def test_a_network_asks_the_prices_of_its_solution():
    """-9 as above, in a few iterations; -20 from the start."""
    few = dataclasses.replace(SHORT, iterations=12)
    assert interest(dk.solve(aiyagari(k_min=-9.0), few, device="cpu", compile="none")) == pytest.approx(3.5, abs=0.4)
    refused(lambda: dk.solve(aiyagari(k_min=-20.0), SMOKE, device="cpu", compile="none"), "k_min: at -20",
            "prices of the solution")


def test_a_limit_out_of_every_reach_is_what_is_to_blame():
    """Where nothing is found and the poorest could not pay at any price, the cure is the limit; elsewhere it is not."""
    far = dk.krusell_smith(dk.Calibration(k_min=-1000.0))
    refused(lambda: dk.solve(far, SMOKE, device="cpu", compile="none"), "three times", "bring k_min nearer to 0")
    refused(lambda: dk.solve_grid(far, GRID), "grid: ", "bring k_min nearer to 0")


def test_the_default_economys_limit_is_a_flag():
    e = dk.krusell_smith(dk.Calibration(k_min=-2.0))
    assert e.k_min == -2.0 and dk.parse(["--k-min", "-2"]).economy.k_min == -2.0
    refused(dk.krusell_smith, "k_min: 50 is more than steady-state capital", cal=dk.Calibration(k_min=50.0))


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("gamma", [2.0, 5.0])
def test_values_where_income_can_be_zero(gamma):
    """Where households are V is worth about what they consume for ever, and its slope is R u'(c): the envelope."""
    grid = dk.solve_grid(dk.Calibration(gamma=gamma, mu=0.0), dataclasses.replace(GRID, n_k=100, n_fine=1200))
    econ, K = grid.econ, float(grid.K_mean)
    k = K * np.array([0.2, 0.5, 1.0, 1.5, 2.0])
    V, step = grid.value(k, 1, K, 0), 0.03 * k
    for_ever = (0.01 * (1 - gamma) * V) ** (1 / (1 - gamma))
    assert (0.7 * econ.c_ss < for_ever).all() and (for_ever < 1.3 * econ.c_ss).all()
    slope = (grid.value(k + step, 1, K, 0) - grid.value(k - step, 1, K, 0)) / (2 * step)
    at = dk.place(*[torch.as_tensor(x) for x in (k, np.ones(5, int), np.full(5, K), np.zeros(5, int))], econ)
    m, R = dk.cash_on_hand(at, econ)
    assert slope == pytest.approx(R.numpy() * (m.numpy() - grid.next_capital(k, 1, K, 0)) ** -gamma, rel=0.02)


# ------------------------------------------------------------------------------------------ from Python


@pytest.fixture(scope="module")
def solutions(aiyagari_grid):
    """A network and a grid, of Aiyagari's economy."""
    return {"network": dk.solve(aiyagari(), SHORT, device="cpu", compile="none"), "grid": aiyagari_grid}


def test_K_mean_is_mean_capital(solutions):
    """Of the network and of the grid: 2.9%, where the centre of an input has 3.3%."""
    network, grid = solutions.values()
    assert network.K_mean == pytest.approx(grid.K_mean, rel=0.015)
    assert interest(network) == pytest.approx(2.915, abs=0.06) and interest(grid) == pytest.approx(2.915, abs=0.03)


@pytest.mark.parametrize("which", ["network", "grid"])
@pytest.mark.parametrize("function", ["next_capital", "value"])
def test_outside_what_was_learnt(solutions, which, function):
    """ValueError, and nothing is clipped; the ends themselves are inside."""
    solution = solutions[which]
    ask, ((k_low, k_high), (K_low, K_high)) = getattr(solution, function), solution.reach()
    K = solution.K_mean
    assert k_low == 0 and K_low < K < K_high and k_high > 5 * K
    assert np.isfinite(ask([k_low, k_high], 3, K, 0)).all() and np.isfinite(ask(K, 3, [K_low, K_high], 0)).all()
    for k, s, at_K, z in ((-3, 3, K, 0), (-0.01, 3, K, 0), (1.01 * k_high, 3, K, 0), (np.nan, 3, K, 0),
                          (K, 3, 100 * K, 0), (K, 3, 0.98 * K_low, 0), (K, 3, -K, 0), (K, 3, np.inf, 0),
                          ([K, -3], 3, K, 0), (K, 7, K, 0), (K, -1, K, 0), (K, 0.5, K, 0), (K, 3, K, 1)):
        with pytest.raises(ValueError, match="outside|must be one of"):
            ask(k, s, at_K, z)


def test_presets_by_their_names():
    solution = dk.solve(toy(), "smoke", device="cpu")
    assert solution.config == SMOKE and len(solution.weights["history"]["seconds"]) == SMOKE.iterations


@pytest.mark.parametrize("options, words", [
    ({"config": "smok"}, ["config: 'smok'", "smoke"]), ({"config": None}, ["config: "]),
    ({"config": {"n_agents": 3}}, ["config: "]), ({"config": dk.GridConfig()}, ["config: ", "GridConfig"]),
    ({"economy": "smoke"}, ["economy: ", "str"]), ({"economy": dk.krusell_smith}, ["economy: "]),
    ({"economy": dk.Economy}, ["economy: "]), ({"economy": dk.krusell_smith().tables()}, ["economy: ", "Tables"]),
    ({"resume": True}, ["resume: ", "output_dir"]), ({"device": "gpu"}, ["device 'gpu'"]),
    ({"device": None}, ["device"]), ({"seed": "0"}, ["seed"]), ({"seed": 0.5}, ["seed"]), ({"seed": None}, ["seed"]),
    ({"output_dir": 3}, ["output_dir"]), ({"compile": "inductor"}, ["compile"]), ({"compile": False}, ["compile"])],
    ids=lambda x: str(x)[:40])
def test_arguments_of_solve(options, words):
    """One line for each that is of no use."""
    refused(dk.solve, *words, **{"config": SMOKE, "device": "cpu"} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device():
    """What was asked for and is not there is refused, as on the command line."""
    refused(dk.solve, "cuda", config=SMOKE, device="cuda")


@pytest.mark.parametrize("changes", [{"n_agents": -1}, {"n_agents": "20"}, {"n_agents": 20.5}, {"iterations": 0},
                                     {"policy_rate": float("nan")}, {"policy_rate": 2.0}, {"optimizer": "sgd"},
                                     {"moments": "foo"}, {"moments": ["variance"]}, {"learnt_moments": -1},
                                     {"horizon": 40}], ids=str)
def test_a_config_that_no_flag_could_give(changes):
    """From Python as from the command line: the field is named."""
    refused(dk.solve, next(iter(changes)), config=dataclasses.replace(SMOKE, **changes), device="cpu")


@pytest.mark.parametrize("config", ["smoke", None, dk.Config(), dataclasses.replace(GRID, n_k=0),
                                    dataclasses.replace(GRID, damping=float("nan")),
                                    dataclasses.replace(GRID, periods="1000")], ids=lambda x: str(x)[:12])
def test_a_grid_that_no_flag_could_give(config):
    refused(dk.solve_grid, config=config)


@pytest.mark.parametrize("changes", [{"z_duration": 0.0}, {"u_duration_bad": 0.0}, {"u_bad": 2.0}, {"beta": "high"},
                                     {"tfp_shock": -0.01}, {"l_bar": 0.0}], ids=str)
@pytest.mark.filterwarnings("error")
def test_a_calibration_that_no_flag_could_give(changes):
    refused(dk.krusell_smith, cal=dk.Calibration(**changes))


@pytest.mark.parametrize("name", ["alpha", "delta", "gamma", "beta"])
def test_numbers_as_words(name):
    """alpha="0.36" works in an economy; a word in a calibration, or that is no number, is refused by its field."""
    value = getattr(economy(), name)
    assert economy(**{name: str(value)}).K_ss == economy().K_ss
    refused(dk.krusell_smith, name, cal=dk.Calibration(**{name: "0.36"}))
    refused(economy, f"{name}: ", **{name: "x"})


def test_a_solution_of_numbers_as_words():
    """It is trained and solved on a grid as any other."""
    made = economy(alpha="0.36", gamma="1", k_min="0")
    assert dk.solve(made, "smoke", device="cpu").K_mean == dk.solve(economy(), "smoke", device="cpu").K_mean
    assert dk.solve_grid(made, ROUGH).K_mean == dk.solve_grid(economy(), ROUGH).K_mean


@pytest.mark.parametrize("name", ["alpha", "delta", "gamma", "k_min", "TFP", "P_z", "Pi", "beta", "income", "weight",
                                  "group", "start", "players"])
@pytest.mark.parametrize("value", [None, {}, "x", object()], ids=["None", "dict", "word", "object"])
def test_fields_of_another_type(name, value):
    """Named in one line."""
    refused(economy, name, **{name: value})


@pytest.mark.parametrize("changes", [{"s_names": 3}, {"z_names": 3}, {"s_names": ("a",)}, {"equilibrium": None},
                                     {"equilibrium": ["market"]}, {"equilibrium": "Market"}], ids=str)
def test_names(changes):
    refused(economy, f"{next(iter(changes))}: ", **changes)


@pytest.mark.parametrize("path", ["nothing.pth", ".", "text", "empty", 3, None, "cut"], ids=str)
def test_load_what_is_no_weights_file(path, tmp_path, monkeypatch, solutions):
    """One line that names the file, and speaks of no flag that was not given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("not weights")
    (tmp_path / "empty").touch()
    solutions["network"].save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-1000])
    assert dk.load("whole").next_capital(5.0, 3, 7.0, 0) == solutions["network"].next_capital(5.0, 3, 7.0, 0)
    told = refused(lambda: dk.load(path), *([path] if isinstance(path, str) else ["load"]))
    assert "--evaluate" not in told and "--output-dir" not in told.replace("in its --output-dir", "")
