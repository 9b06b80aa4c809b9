"""Newton's road: single neurons, the closed loop over the gains that a study searches, and what
happens where it does not converge. The truth is the dynamics (ode.py, other code): at a
steady state they stand still."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hyperparameters
from hypothesis import given, settings, strategies as st

from disinhib import losses
from disinhib.activations import ACTIVATIONS, bind
from disinhib.checks import POSITIVE, Option, defaults
from disinhib.controller import CONTROLLERS
from disinhib.feedback import disinhibition, jacobian_weights, modified
from disinhib.hyperparameters import Newton
from disinhib.losses import LOSSES
from disinhib.microcircuit import Microcircuit, microcircuit, relax, search_from
from disinhib.network import feedforward_input
from disinhib.solvers import newton, ode

pytestmark = pytest.mark.usefixtures("float64", "strict")

TIGHT = Newton(tolerance=1e-11, max_iterations=60)
PAIRS = pytest.mark.parametrize(
    ("kind_e", "kind_i"), [(kind_e, kind_i) for kind_e in ACTIVATIONS for kind_i in ACTIVATIONS]
)
HYPER = hyperparameters()
FIXED = settings(derandomize=True, max_examples=15)


def traced(hyper):
    """Hyperparameters as arrays, so that one program serves all of them."""
    return jax.tree.map(lambda value: jnp.asarray(value, float), hyper)


as_numpy = partial(jax.tree.map, np.asarray)  # where jax would compile each of a test's sums


def log_uniform(low, high):
    return st.floats(np.log(low), np.log(high)).map(lambda value: float(np.exp(value)))


# --- One neuron --------------------------------------------------------------------------------


@cache
def neurons(kind_e, kind_i):
    """The search for u_E(a, s), jitted: 120 safeguarded steps, which is what halving a bracket of
    1e4 down to rounding takes if every second step is Newton's and wasted."""

    @jax.jit
    def search(a, s, g_ei, g_ie):
        circuit = Microcircuit(bind(kind_e), bind(kind_i), g_ei, g_ie)
        step = lambda _, search: relax(circuit, search, a, s)
        return jax.lax.fori_loop(0, 120, step, search_from(a)).u_e

    return search


PLAIN: dict[str, Any] = {kind: bind(kind).value for kind in ACTIVATIONS} | {
    "softrelu": lambda u: np.logaddexp(0, u),
    "linear": lambda u: u,
    "tanh": np.tanh,
    "relu": lambda u: np.maximum(u, 0),
    "sigmoid": lambda u: 0.5 + 0.5 * np.tanh(u / 2),
}


@PAIRS
@FIXED
@given(
    a=st.lists(st.floats(-30, 30), min_size=16, max_size=16),
    s=st.lists(st.floats(-5, 5), min_size=16, max_size=16),
    g_ei=log_uniform(0.1, 10),
    g_ie=log_uniform(0.1, 10),
)
def test_a_neuron_is_in_equilibrium_whatever_its_activations_and_gains(
    kind_e, kind_i, a, s, g_ei, g_ie
):
    a, s, g_ei, g_ie = map(np.asarray, (a, s, g_ei, g_ie))
    u = np.asarray(neurons(kind_e, kind_i)(a, s, g_ei, g_ie))
    inhibition = g_ie * PLAIN[kind_i](g_ei * PLAIN[kind_e](u) - s)
    # u is known to its last place, 1e-15, and the slope of f is up to 1 + 10 * 10.
    assert np.max(np.abs(u + inhibition - a)) < 1e-11


@pytest.mark.parametrize(
    ("kind_e", "kind_i"),
    [
        ("softrelu", "softrelu"),
        ("softrelu", "tanh"),
        ("sigmoid", "tanh"),
        ("tanh", "relu"),
        ("relu", "tanh"),
        ("relu", "sigmoid"),
        ("tanh", "sigmoid"),
    ],
)
def test_the_open_loop_settles_within_its_steps(kind_e, kind_i, problem):
    # An identity kernel makes x the neurons' input; Newton's plain method cycles for some of these.
    x = np.tile(np.linspace(-20, 20, 400)[:, None], (1, 2))
    small = problem(sizes=(2, 2, 2), activation_e=kind_e, activation_i=kind_i, use_bias=False)
    parameters = small.parameters | {"kernel_0": np.eye(2)}
    solve = jax.jit(partial(newton.open_loop, small.architecture))
    for g_ei, g_ie in ((0.25, 4.0), (1.0, 1.0), (4.0, 1.0), (4.0, 4.0), (1.0, 10.0)):
        hyper = traced(HYPER._replace(g_ei=g_ei, g_ie=g_ie))
        solution = as_numpy(solve(parameters, hyper, x))
        assert np.all(solution.converged), (g_ei, g_ie)
        u_e, u_i = solution.state.u_e[0], solution.state.u_i[0]
        np.testing.assert_allclose(u_i, g_ei * PLAIN[kind_e](u_e), rtol=1e-12, atol=1e-15)
        imbalance = np.linalg.norm(u_e + g_ie * PLAIN[kind_i](u_i) - x, axis=-1)
        size = 1 + np.linalg.norm(u_e, axis=-1)
        np.testing.assert_allclose(solution.residual, imbalance / size, rtol=1e-6, atol=1e-13)
        assert np.max(imbalance / size) <= small.architecture.solver.tolerance


# --- The closed loop ---------------------------------------------------------------------------


def both_loops(architecture, parameters, hyper, x, target):
    """(open loop, closed loop, feedback weights) with the solver of `architecture`."""
    opened = newton.open_loop(architecture, parameters, hyper, x)
    raw = jacobian_weights(microcircuit(architecture, hyper), parameters, opened.state)
    weights = modified(hyper, raw)
    closed = newton.closed_loop(architecture, parameters, hyper, x, target, weights, opened.state)
    return opened, closed, weights


shared = jax.jit(both_loops, static_argnums=0)  # tests with the same structure compile it once


def solved(problem, hyper=HYPER, program=shared):
    architecture, parameters, x, target = problem
    return as_numpy(program(architecture, parameters, traced(hyper), x, target))


@partial(jax.jit, static_argnums=0)
def moved(architecture, parameters, hyper, x, target, state, weights):
    """(d/dt of a network and its controller in closed loop, control) at `state`."""
    error = LOSSES[architecture.loss].error(state.u_y, target)
    z = error / hyper.controller["leak"]  # the integral's own equilibrium
    first = x @ parameters[f"kernel_{0 if architecture.hidden_layers else 'out'}"]
    first = first + parameters.get("bias_0", jnp.zeros(first.shape[-1]))
    return jax.vmap(partial(ode.velocity, architecture, parameters, hyper))(
        ode.DynamicState(state, z), first, ode.Control(target, weights)
    )


def speed(problem, hyper, solution, weights, control_to=1e-9):
    """The largest tau * |d/dt| of any variable of the network and its controller at `solution`."""
    architecture, parameters, x, target = problem
    rate, signal = moved(
        architecture, parameters, traced(hyper), x, target, solution.state, weights
    )
    np.testing.assert_allclose(signal, solution.control, atol=control_to)
    return max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(rate)) * hyper.tau_e


SMALL = {"sizes": (5, 8, 4), "batch": 20, "solver": TIGHT}  # what one program serves
DEEP = {**SMALL, "sizes": (5, 8, 7, 6, 4)}
HIDDEN_ONLY = {
    **SMALL,
    **{"fb_to_readout": False, "loss": "mse", "controller": "proportional", "use_bias": False},
}
OTHER = {**SMALL, "activation_e": "tanh", "activation_i": "relu"}
VARIANTS = {
    "no hidden layer": {**SMALL, "sizes": (5, 4), "loss": "mse"},
    "three hidden layers": DEEP,
    "feedback to hidden layers only, mse, proportional, no bias": HIDDEN_ONLY,
    "averaged": {**SMALL, "average_fb_weights": 1.0},
    "clipped": {**SMALL, "clip_fb_weights": 1.0, "norm_fb_weights": 0.0},
    "other activations": OTHER,
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_nothing_moves_at_the_steady_state_in_closed_loop(fields, problem):
    flags = {name: value for name, value in fields.items() if name in HYPER.rule}
    small = problem(**{k: v for k, v in fields.items() if k not in flags})
    rule = {"clip_val": 0.05, **flags}
    hyper = HYPER.updated(g_ei=1.3, g_ie=0.7, controller={"leak": 0.5}, rule=rule)
    _, closed, weights = solved(small, hyper)
    assert np.all(closed.converged)
    assert speed(small, hyper, closed, weights) < 1e-9
    # Control does something, so that standing still says something.
    assert np.min(np.max(np.abs(closed.control), axis=-1)) > 0.05
    if flags.get("average_fb_weights"):
        assert all(np.all(q == q[:1]) for q in weights)


def test_without_hidden_layers_the_closed_loop_has_a_closed_form(problem):
    small = problem(**VARIANTS["no hidden layer"])
    opened, closed, weights = solved(small)
    assert weights == ()
    gain = 0.2 + 0.4 / 1.0
    np.testing.assert_allclose(opened.state.u_y, small.x @ small.parameters["kernel_out"])
    # y = a + c and c = gain (target - y)
    c = gain / (1 + gain) * (small.target - opened.state.u_y)
    np.testing.assert_allclose(closed.control, c, rtol=1e-10)
    np.testing.assert_allclose(closed.state.u_y, opened.state.u_y + c, rtol=1e-10)


SEARCHED = {
    **{"sizes": (5, 12, 12, 12, 10), "batch": 20},
    "solver": Newton(tolerance=1e-6, max_iterations=30),
}


@pytest.mark.parametrize("kind_i", ["softrelu", "tanh"])
def test_the_closed_loop_converges_over_the_searched_gains(kind_i, problem):
    # 45 settings, as many as DESIGN section 3 reports, to its tolerance of 1e-6.
    draw = np.random.default_rng(0)
    between = lambda low, high: float(np.exp(draw.uniform(np.log(low), np.log(high))))
    evaluations = []
    for seed in range(45):
        # 0.7 to 4 times the initial weights: from untrained to well beyond trained ones.
        small = problem(seed, between(0.7, 4), activation_i=kind_i, **SEARCHED)
        hyper = HYPER.updated(
            g_ei=between(0.25, 4),
            g_ie=between(0.25, 4),
            controller={"k_p": between(0.02, 2), "k_i": between(0.02, 4)},
        )
        opened, closed, weights = solved(small, hyper)
        assert np.all(opened.converged), hyper
        assert np.all(closed.converged), hyper
        assert np.all(closed.residual <= 1e-6)
        evaluations.append(np.mean(closed.iterations))
        if seed < 5:  # what it calls converged is an equilibrium
            # Norms over a layer of 12, relative to 1 + |u|: 1e-6 grows to some 1e-5.
            assert speed(small, hyper, closed, weights, control_to=1e-4) < 1e-4
    assert np.mean(evaluations) < 5


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_starts_newton_from_its_own_curvature(kind):
    """damping = (1 + gain S)^-1, S = -d(error)/d(output) by jax."""
    loss = losses.bind(kind, defaults(LOSSES[kind].options))
    assert loss.damping is not None
    draw = np.random.default_rng(0)
    output, target = draw.normal(size=(3, 4)), draw.dirichlet(np.ones(4), size=3)
    alone = lambda y, t: loss.error(y[None], t[None])[0]
    slopes, damping = (
        np.asarray(jax.jit(jax.vmap(jax.jacfwd(alone)))(output, target)),
        jax.jit(loss.damping),
    )
    for gain in (0.02, 0.6, 20.0):
        found = np.asarray(damping(output, target, gain))
        for i in range(3):
            np.testing.assert_allclose(
                found[i] @ (np.eye(4) - gain * slopes[i]), np.eye(4), atol=1e-12
            )


def test_a_new_loss_needs_its_error_only(problem, monkeypatch):
    """It had softmax's curvature once, whatever its own. Here the error is weighed by a number of
    the loss's own; without hidden layers the right start is within one step of the solution."""
    weighed = losses.Loss(
        value=lambda output, target, weight: weight * jnp.sum((target - output) ** 2, -1) / 2,
        error=lambda output, target, weight: weight * (target - output),
        nudged_target=lambda output, target, nudge, weight: output + nudge * (target - output),
        words="squared error, weighed",
        options=(Option("weight", 1.0, POSITIVE, "dimensionless"),),
    )
    monkeypatch.setitem(LOSSES, "weighed", weighed)
    small = problem(sizes=(5, 4), loss="weighed", solver=TIGHT)
    hyper = HYPER._replace(loss={"weight": 3.0})
    opened, closed, _ = solved(small, hyper)
    gain = 3.0 * (0.2 + 0.4)
    c = gain / (1 + gain) * (small.target - opened.state.u_y)
    np.testing.assert_allclose(closed.control, c, rtol=1e-9)
    assert np.all(closed.iterations <= 2)


# --- Hard and impossible cases -----------------------------------------------------------------


def test_saturating_neurons_settle_in_closed_loop_too(problem):
    """Newton's method on tanh neurons held by rectifying interneurons jumps from one side of the
    root to the other for ever; a step that brings no neuron nearer has to be halved."""
    hyper = HYPER._replace(g_ei=6.0, g_ie=6.0)
    small = problem(weight_scale=3.0, **OTHER)
    _, closed, _ = solved(small, hyper)
    assert np.all(closed.converged)


STRONG = HYPER.updated(controller={"k_p": 2.0, "k_i": 4.0}, g_ei=2.0)


def test_newtons_method_finds_the_same_steady_state_in_fewer_evaluations(problem, monkeypatch):
    small = problem(weight_scale=1.0, **SMALL)
    solutions = []
    for evaluations in (60, 1):
        monkeypatch.setattr(newton, "BROYDEN_EVALUATIONS", evaluations)
        program = jax.jit(lambda *arguments: both_loops(*arguments), static_argnums=0)
        solutions.append(solved(small, STRONG, program)[1])
    by_broyden, by_newton = solutions
    assert np.all(by_broyden.converged)
    assert np.all(by_newton.converged)
    np.testing.assert_allclose(by_newton.control, by_broyden.control, atol=1e-9)
    # To 1e-11, quadratically; measured: 5 and 12.
    assert np.max(by_newton.iterations) <= 6
    assert np.max(by_newton.iterations) < np.max(by_broyden.iterations)


def test_newtons_method_takes_over_where_broydens_does_not_get_there(problem):
    small = problem(weight_scale=4.0, **SMALL)
    _, closed, _ = solved(small, STRONG)
    assert np.max(closed.iterations) > newton.BROYDEN_EVALUATIONS
    assert np.all(closed.converged)


def test_a_loose_tolerance_is_reached_where_feedback_is_strong(problem):
    shape = {"sizes": (20, 40, 40, 40, 10), "batch": 60}
    solver = Newton(tolerance=1e-4, max_iterations=30)
    for seed, scale, g_ei, g_ie, k_p, k_i, norm_val in (
        (5, 7.6, 0.34, 1.41, 0.43, 0.55, 3.2),
        (7, 8.4, 0.51, 2.57, 0.21, 0.41, 2.0),
        (106, 5.25, 0.99, 0.33, 0.21, 0.90, 4.0),
    ):
        hyper = HYPER.updated(
            g_ei=g_ei, g_ie=g_ie, controller={"k_p": k_p, "k_i": k_i}, rule={"norm_val": norm_val}
        )
        _, closed, _ = solved(problem(seed, scale, solver=solver, **shape), hyper)
        assert np.max(closed.iterations) > newton.BROYDEN_EVALUATIONS
        assert np.all(closed.converged)


def test_what_does_not_converge_is_said_not_raised(problem):
    small = problem(sizes=(5, 8, 4), solver=Newton(tolerance=1e-11, max_iterations=1))
    _, closed, _ = solved(small)
    assert not np.any(closed.converged)
    assert np.all(closed.iterations == 1)
    assert np.all(closed.residual > 1e-11)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(closed))


def test_an_open_loop_that_is_not_finite_is_not_called_converged(problem):
    small = problem(**SMALL)
    parameters = {name: value * np.nan for name, value in small.parameters.items()}
    opened, closed, _ = solved(small._replace(parameters=parameters))
    assert not np.any(opened.converged)
    assert not np.any(closed.converged)


@partial(jax.jit, static_argnums=0)
def settled(architecture, parameters, hyper, x, weights, u_e, control):
    """(residual, output, the output's slope) of neurons that settle at `control`."""
    circuit = microcircuit(architecture, hyper)
    first = feedforward_input(parameters, 0, x)
    relief, unknown = disinhibition(control, weights), jnp.full(len(x), jnp.inf)
    u_e, residual, _ = newton.settle(circuit, parameters, first, u_e, relief, unknown, 1e-12, 60)
    u_y = circuit.phi_e.value(u_e[-1]) @ parameters["kernel_out"]
    network = newton._network(architecture, parameters, hyper)
    samples = newton._Samples(x, first, control, weights)  # the target does not count
    _, moves = newton._linearised(network, samples, u_e, control)
    slope = jnp.swapaxes(moves[:, 1:], 1, 2)
    return residual, u_y + control if architecture.fb_to_readout else u_y, slope


@pytest.mark.parametrize("fields", [DEEP, HIDDEN_ONLY], ids=["to all layers", "to hidden ones"])
def test_the_slope_of_the_output_is_that_of_neurons_that_settle(fields, problem):
    """Central differences of the output of settled neurons, in each direction of the control."""
    small = problem(**fields)
    architecture, parameters, x, _ = small
    hyper = HYPER.updated(g_ei=1.3, g_ie=0.7)
    _, closed, weights = solved(small, hyper)
    arrays = parameters, traced(hyper), x, weights, closed.state.u_e
    residual, _, found = as_numpy(settled(architecture, *arrays, closed.control))
    assert np.all(residual <= 1e-12)
    for direction in range(4):
        step = 1e-5 * np.eye(4)[direction]
        above, below = (
            np.asarray(settled(architecture, *arrays, closed.control + sign * step)[1])
            for sign in (1, -1)
        )
        np.testing.assert_allclose(found[..., direction], (above - below) / 2e-5, atol=1e-8)
    assert (
        np.max(np.abs(found - architecture.fb_to_readout * np.eye(4))) > 1e-3
    )  # the layers' own share


def test_a_sample_of_which_nothing_more_can_be_made_is_given_up(problem):
    """No arithmetic reaches this tolerance; each is as good as it can be, after few evaluations."""
    small = problem(sizes=(5, 8, 4), solver=Newton(tolerance=1e-30, max_iterations=60))
    _, closed, _ = solved(small)
    assert not np.any(closed.converged)
    assert np.max(closed.residual) < 1e-14 and np.max(closed.iterations) < 30


@pytest.mark.parametrize("kind_i", ["softrelu", "tanh"])
def test_a_sample_settles_as_if_it_were_alone(kind_i, problem):
    """Also one that needs more than the first steps, beside others that need more still."""
    small = problem(weight_scale=6.0, activation_i=kind_i, **SEARCHED)
    hyper = HYPER._replace(g_ei=4.0, g_ie=4.0)
    together, *_ = solved(small, hyper)
    assert np.all(together.converged) and np.all(together.iterations > 1)
    for i in range(len(small.x)):
        alone, *_ = solved(small._replace(x=np.tile(small.x[i], (20, 1))), hyper)
        assert np.all(alone.converged)
        np.testing.assert_allclose(alone.residual[0], together.residual[i], rtol=1e-6, atol=1e-14)
        np.testing.assert_allclose(alone.state.u_y[0], together.state.u_y[i], rtol=1e-12)


def test_lanes_are_solved_as_if_they_were_alone(problem, monkeypatch):
    """In one program, in which samples that take long go on by three, of two lanes: of the first
    lane none does, of the others up to all 20."""
    monkeypatch.setattr(newton, "BROYDEN_EVALUATIONS", 5)
    for name, few in (("FEW_SAMPLES", 4), ("SAMPLES_OF_LANES", 3), ("LANES_AT_ONCE", 2)):
        monkeypatch.setattr(newton, name, few)
    problems = [problem(seed, scale, **SMALL) for seed, scale in enumerate((0.1, 4, 5, 6, 4))]
    gains = [HYPER, STRONG, STRONG, HYPER, STRONG]
    architecture = problems[0].architecture
    stacked = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    arrays = stacked(
        [(p.parameters, traced(h), p.x, p.target) for p, h in zip(problems, gains, strict=True)]
    )
    program = jax.jit(lambda *arguments: both_loops(*arguments), static_argnums=0)
    lanes = lambda *arrays: program(architecture, *arrays)
    _, together, _ = as_numpy(jax.jit(jax.vmap(lanes))(*arrays))
    assert np.all(together.converged)
    took_long = np.sum(together.iterations > newton.BROYDEN_EVALUATIONS, axis=1)
    assert took_long[0] == 0 and np.all(took_long[1:] > newton.FEW_SAMPLES)
    for lane, (small, hyper) in enumerate(zip(problems, gains, strict=True)):
        _, alone, _ = solved(small, hyper, program)
        np.testing.assert_array_equal(alone.iterations, together.iterations[lane])
        np.testing.assert_allclose(alone.control, together.control[lane], rtol=1e-9, atol=1e-12)


def test_few_samples_at_a_time_are_solved_as_if_all_were(problem, monkeypatch):
    small = problem(weight_scale=8.0, **SMALL)
    _, together, _ = solved(small, STRONG)
    assert np.sum(together.iterations > newton.BROYDEN_EVALUATIONS) > 3
    monkeypatch.setattr(newton, "FEW_SAMPLES", 3)
    program = jax.jit(lambda *arguments: both_loops(*arguments), static_argnums=0)
    _, few, _ = solved(small, STRONG, program)
    np.testing.assert_array_equal(few.iterations, together.iterations)
    np.testing.assert_allclose(few.control, together.control, rtol=1e-9, atol=1e-12)


def test_a_sample_is_solved_as_if_it_were_alone(problem):
    small = problem(weight_scale=4.0, **SMALL)
    _, together, _ = solved(small)
    assert len(set(together.iterations)) > 1  # some wait for others
    for i in range(3):
        copies = lambda rows, i=i: np.broadcast_to(rows[i], rows.shape)
        _, alone, _ = solved(small._replace(x=copies(small.x), target=copies(small.target)))
        assert np.all(alone.iterations == together.iterations[i])
        np.testing.assert_allclose(alone.control[0], together.control[i], rtol=1e-12)
        np.testing.assert_allclose(alone.residual[0], together.residual[i], rtol=1e-6, atol=1e-14)


def test_more_control_brings_the_output_closer_to_its_target(problem):
    small = problem(**SMALL)
    values = []
    for k_i in (0.0, 0.4, 4.0, 40.0):
        _, closed, _ = solved(small, HYPER.updated(controller={"k_i": k_i}))
        assert np.all(closed.converged)
        loss = LOSSES["softmax-cross-entropy"].value(closed.state.u_y, small.target)
        values.append(np.mean(loss))
    assert values == sorted(values, reverse=True)
    gain = CONTROLLERS["leaky-pi"].gain({**HYPER.controller, "k_i": 40.0, "leak": 2.0})
    assert gain == pytest.approx(20.2)
