"""Newton's road: single neurons, the closed loop over the gains that a study searches, and what
happens where it does not converge. The truth is the dynamics (ode.py, other code): at a
steady state they stand still."""

from functools import cache, partial

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


PLAIN = {kind: bind(kind).value for kind in ACTIVATIONS} | {
    "softrelu": jax.nn.softplus,
    "linear": lambda u: u,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
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
    a, s = jnp.asarray(a), jnp.asarray(s)
    u = neurons(kind_e, kind_i)(a, s, *(jnp.asarray(g) for g in (g_ei, g_ie)))
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
    x = jnp.tile(jnp.linspace(-20, 20, 400)[:, None], (1, 2))
    small = problem(sizes=(2, 2, 2), activation_e=kind_e, activation_i=kind_i, use_bias=False)
    parameters = small.parameters | {"kernel_0": jnp.eye(2)}
    solve = jax.jit(partial(newton.open_loop, small.architecture))
    for g_ei, g_ie in ((0.25, 4.0), (1.0, 1.0), (4.0, 1.0), (4.0, 4.0), (1.0, 10.0)):
        hyper = traced(HYPER._replace(g_ei=g_ei, g_ie=g_ie))
        solution = solve(parameters, hyper, x)
        assert np.all(solution.converged), (g_ei, g_ie)
        u_e, u_i = solution.state.u_e[0], solution.state.u_i[0]
        np.testing.assert_allclose(u_i, g_ei * PLAIN[kind_e](u_e), rtol=1e-12, atol=1e-15)
        imbalance = jnp.linalg.norm(u_e + g_ie * PLAIN[kind_i](u_i) - x, axis=-1)
        size = 1 + jnp.linalg.norm(u_e, axis=-1)
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
    return program(architecture, parameters, traced(hyper), x, target)


def speed(problem, hyper, solution, weights):
    """The largest tau * |d/dt| of any variable of the network and its controller at `solution`."""
    architecture, parameters, x, target = problem
    error = LOSSES[architecture.loss].error(solution.state.u_y, target)
    z = error / hyper.controller["leak"]  # the integral's own equilibrium
    control = ode.Control(target, weights)
    first = x @ parameters[f"kernel_{0 if architecture.hidden_layers else 'out'}"]
    first = first + parameters.get("bias_0", jnp.zeros(first.shape[-1]))
    rate, signal = jax.vmap(partial(ode.velocity, architecture, parameters, hyper))(
        ode.DynamicState(solution.state, z), first, control
    )
    np.testing.assert_allclose(signal, solution.control, atol=1e-9)
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(rate)) * hyper.tau_e


VARIANTS = {
    "no hidden layer": {"sizes": (5, 4), "loss": "mse"},
    "five hidden layers": {"sizes": (5, 6, 6, 5, 5, 4, 4)},
    "feedback to hidden layers only": {"sizes": (5, 8, 4), "fb_to_readout": False},
    "mse, proportional, no bias": {
        "sizes": (5, 8, 4),
        "loss": "mse",
        "controller": "proportional",
        "use_bias": False,
    },
    "averaged": {"sizes": (5, 8, 4), "average_fb_weights": 1.0},
    "clipped": {"sizes": (5, 8, 4), "clip_fb_weights": 1.0, "norm_fb_weights": 0.0},
    "other activations": {"sizes": (5, 8, 4), "activation_e": "relu", "activation_i": "tanh"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_nothing_moves_at_the_steady_state_in_closed_loop(fields, problem):
    flags = {name: value for name, value in fields.items() if name in HYPER.rule}
    small = problem(solver=TIGHT, **{k: v for k, v in fields.items() if k not in flags})
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
    small = problem(sizes=(5, 4), loss="mse", solver=TIGHT)
    opened, closed, weights = solved(small)
    assert weights == ()
    gain = 0.2 + 0.4 / 1.0
    np.testing.assert_allclose(opened.state.u_y, small.x @ small.parameters["kernel_out"])
    # y = a + c and c = gain (target - y)
    c = gain / (1 + gain) * (small.target - opened.state.u_y)
    np.testing.assert_allclose(closed.control, c, rtol=1e-10)
    np.testing.assert_allclose(closed.state.u_y, opened.state.u_y + c, rtol=1e-10)


@pytest.mark.parametrize("kind_i", ["softrelu", "tanh"])
def test_the_closed_loop_converges_over_the_searched_gains(kind_i, problem):
    # 45 settings, as many as DESIGN section 3 reports, to its tolerance of 1e-6.
    draw = np.random.default_rng(0)
    between = lambda low, high: float(np.exp(draw.uniform(np.log(low), np.log(high))))
    solver = Newton(tolerance=1e-6, max_iterations=30)
    sizes = {"sizes": (5, 12, 12, 12, 10), "activation_i": kind_i, "solver": solver}
    evaluations = []
    for seed in range(45):
        # 0.7 to 4 times the initial weights: from untrained to well beyond trained ones.
        small = problem(seed=seed, batch=20, weight_scale=between(0.7, 4), **sizes)
        hyper = HYPER.updated(
            g_ei=between(0.25, 4),
            g_ie=between(0.25, 4),
            controller={"k_p": between(0.02, 2), "k_i": between(0.02, 4)},
        )
        opened, closed, weights = solved(small, hyper)
        assert np.all(opened.converged), hyper
        assert np.all(closed.converged), hyper
        assert np.all(closed.residual <= 1e-6)
        evaluations.append(float(jnp.mean(closed.iterations)))
        if seed < 5:  # what it calls converged is an equilibrium
            rate = ode.velocity
            state = ode.DynamicState(
                closed.state,
                LOSSES["softmax-cross-entropy"].error(closed.state.u_y, small.target)
                / hyper.controller["leak"],
            )
            first = small.x @ small.parameters["kernel_0"] + small.parameters["bias_0"]
            control = ode.Control(small.target, weights)
            moved, _ = jax.vmap(partial(rate, small.architecture, small.parameters, hyper))(
                state, first, control
            )
            # Norms over a layer of 12, relative to 1 + |u|: 1e-6 grows to some 1e-5.
            largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(moved))
            assert largest * hyper.tau_e < 1e-4
    assert np.mean(evaluations) < newton.BROYDEN_EVALUATIONS


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("gain", [0.02, 0.6, 20.0])
def test_a_loss_starts_newton_from_its_own_curvature(kind, gain):
    """damping = (1 + gain S)^-1, S = -d(error)/d(output) by jax."""
    loss = losses.bind(kind, defaults(LOSSES[kind].options))
    assert loss.damping is not None
    draw = np.random.default_rng(0)
    output = jnp.asarray(draw.normal(size=(3, 4)))
    target = jnp.asarray(draw.dirichlet(np.ones(4), size=3))
    found = loss.damping(output, target, jnp.asarray(gain))
    for i in range(3):
        alone = lambda y, i=i: loss.error(y[None], target[i : i + 1])[0]
        matrix = jnp.eye(4) - gain * jax.jacfwd(alone)(output[i])
        np.testing.assert_allclose(found[i] @ matrix, jnp.eye(4), atol=1e-12)


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
    root to the other for ever; the bracket has to be kept from step to step."""
    hyper = HYPER._replace(g_ei=6.0, g_ie=6.0)
    small = problem(weight_scale=3.0, batch=40, activation_e="tanh", activation_i="relu")
    _, closed, _ = solved(small, hyper)
    assert np.all(closed.converged)


STRONG = HYPER.updated(controller={"k_p": 2.0, "k_i": 4.0}, g_ei=2.0)


def test_the_exact_jacobian_finds_the_same_steady_state_in_fewer_steps(problem, monkeypatch):
    small = problem(sizes=(5, 8, 4), weight_scale=1.0, solver=TIGHT)

    def after(evaluations):
        monkeypatch.setattr(newton, "BROYDEN_EVALUATIONS", evaluations)
        program = jax.jit(lambda *arguments: both_loops(*arguments), static_argnums=0)
        return solved(small, STRONG, program)[1]

    by_newton, by_broyden = after(1), after(60)
    assert np.all(by_broyden.converged)
    assert np.all(by_newton.converged)
    np.testing.assert_allclose(by_newton.control, by_broyden.control, atol=1e-9)
    # To 1e-11, quadratically; measured: 7 and 12.
    assert np.max(by_newton.iterations) <= 8
    assert np.max(by_newton.iterations) < np.max(by_broyden.iterations)


def test_the_exact_jacobian_takes_over_where_broyden_does_not_get_there(problem):
    # Strong control of large weights; the brief of twelve evaluations is the shipped one.
    small = problem(weight_scale=4.0, batch=40, solver=TIGHT)
    _, closed, _ = solved(small, STRONG)
    assert np.max(closed.iterations) > newton.BROYDEN_EVALUATIONS
    assert np.all(closed.converged)


def test_what_does_not_converge_is_said_not_raised(problem):
    small = problem(solver=Newton(tolerance=1e-11, max_iterations=1))
    _, closed, _ = solved(small)
    assert not np.any(closed.converged)
    assert np.all(closed.iterations == 1)
    assert np.all(closed.residual > 1e-11)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(closed))


def test_an_open_loop_that_is_not_finite_is_not_called_converged(problem):
    small = problem(sizes=(5, 8, 4))
    parameters = {name: value * jnp.nan for name, value in small.parameters.items()}
    opened, closed, _ = solved(small._replace(parameters=parameters))
    assert not np.any(opened.converged)
    assert not np.any(closed.converged)


@pytest.mark.parametrize("to_readout", [True, False])
def test_the_slope_of_the_output_is_that_of_neurons_that_settle(to_readout, problem):
    """Central differences of the output of settled neurons, in each direction of the control."""
    small = problem(sizes=(5, 8, 7, 6, 4), fb_to_readout=to_readout, solver=TIGHT)
    architecture, parameters, x, _ = small
    hyper = HYPER.updated(g_ei=1.3, g_ie=0.7)
    _, closed, weights = solved(small, hyper)
    circuit = microcircuit(architecture, traced(hyper))
    first = x @ parameters["kernel_0"] + parameters["bias_0"]

    @jax.jit
    def output(control):
        unknown = jnp.full(len(x), jnp.inf)
        relief = disinhibition(control, weights)
        u_e, residual, _ = newton.settle(
            circuit, parameters, first, closed.state.u_e, relief, unknown, 1e-12, 60
        )
        u_y = circuit.phi_e.value(u_e[-1]) @ parameters["kernel_out"]
        return u_e, u_y + control * float(to_readout), residual

    u_e, _, residual = output(closed.control)
    assert np.all(residual <= 1e-12)
    found = newton._output_slope(architecture, parameters, circuit, weights, u_e, closed.control)
    for direction in range(4):
        step = 1e-5 * jnp.eye(4)[direction]
        above, below = (output(closed.control + sign * step)[1] for sign in (1, -1))
        np.testing.assert_allclose(found[..., direction], (above - below) / 2e-5, atol=1e-8)
    assert np.max(np.abs(found - float(to_readout) * jnp.eye(4))) > 1e-3  # the layers' own share


def test_a_sample_of_which_nothing_more_can_be_made_is_given_up(problem):
    """No arithmetic reaches this tolerance; each is as good as it can be, after few evaluations."""
    small = problem(sizes=(5, 8, 4), solver=Newton(tolerance=1e-30, max_iterations=60))
    _, closed, _ = solved(small)
    assert not np.any(closed.converged)
    assert np.max(closed.residual) < 1e-14 and np.max(closed.iterations) < 30


@pytest.mark.parametrize("kind_i", ["softrelu", "tanh"])
def test_a_sample_settles_as_if_it_were_alone(kind_i, problem):
    """Also one that needs more than the first steps, beside others that need more still."""
    small = problem(sizes=(5, 12, 12, 12, 4), weight_scale=6.0, batch=20, activation_i=kind_i)
    solve = jax.jit(partial(newton.open_loop, small.architecture))
    hyper = traced(HYPER._replace(g_ei=4.0, g_ie=4.0))
    together = solve(small.parameters, hyper, small.x)
    assert np.all(together.converged) and np.all(together.iterations > 1)
    for i in range(len(small.x)):
        alone = solve(small.parameters, hyper, jnp.broadcast_to(small.x[i], small.x.shape))
        assert np.all(alone.converged)
        np.testing.assert_allclose(alone.residual[0], together.residual[i], rtol=1e-6, atol=1e-14)
        np.testing.assert_allclose(alone.state.u_y[0], together.state.u_y[i], rtol=1e-12)


def test_a_sample_is_solved_as_if_it_were_alone(problem):
    small = problem(sizes=(5, 8, 4), weight_scale=4.0)
    _, together, _ = solved(small)
    assert len(set(np.asarray(together.iterations))) > 1  # some wait for others
    for i in range(3):
        copies = lambda rows, i=i: jnp.broadcast_to(rows[i], rows.shape)
        _, alone, _ = solved(small._replace(x=copies(small.x), target=copies(small.target)))
        assert np.all(alone.iterations == together.iterations[i])
        np.testing.assert_allclose(alone.control[0], together.control[i], rtol=1e-12)
        np.testing.assert_allclose(alone.residual[0], together.residual[i], rtol=1e-6, atol=1e-14)


def test_more_control_brings_the_output_closer_to_its_target(problem):
    small = problem(sizes=(5, 8, 4), solver=TIGHT)
    values = []
    for k_i in (0.0, 0.4, 4.0, 40.0):
        _, closed, _ = solved(small, HYPER.updated(controller={"k_i": k_i}))
        assert np.all(closed.converged)
        loss = LOSSES["softmax-cross-entropy"].value(closed.state.u_y, small.target)
        values.append(float(jnp.mean(loss)))
    assert values == sorted(values, reverse=True)
    gain = CONTROLLERS["leaky-pi"].gain({**HYPER.controller, "k_i": 40.0, "leak": 2.0})
    assert gain == pytest.approx(20.2)
