"""Learning rules against independent derivatives and against each other (float64)."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hyperparameters
from scipy.special import expit, softmax

from disinhib.feedback import LEARNT, RANDOM, SIGN_SYMMETRIC, modified
from disinhib.hyperparameters import Newton
from disinhib.losses import LOSSES
from disinhib.rules import FAMILIES, RULES
from disinhib.rules.disinhibition import Memory
from disinhib.rules.feedback_alignment import FeedbackKernels
from disinhib.solvers import open_loop

pytestmark = pytest.mark.usefixtures("float64", "strict")

TIGHT = Newton(tolerance=1e-12, max_iterations=50)
HYPER = hyperparameters().updated(
    activation_e={"scale": 1.2, "sharpness": 0.9, "shift": 0.1},
    activation_i={"scale": 0.8, "sharpness": 1.3, "shift": -0.2},
    g_ei=1.3,
    g_ie=0.7,
)
FEEDBACK = [name for name, rule in RULES.items() if rule.family.feedback_and_aim]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_is_one_of_its_family(rule):
    assert FAMILIES[rule.family.name] is rule.family
    assert {*rule.options} <= {*rule.family.options}
    others = [each for each in RULES.values() if each.family is rule.family and each is not rule]
    assert all(each.chosen.keys() == rule.chosen.keys() for each in others)
    assert all(each.chosen != rule.chosen for each in others)


def update(problem, rule, hyper, **changes):
    """The update of `rule` on a small problem, and that problem."""
    small = problem(family=RULES[rule].family.name, solver=TIGHT, **changes)
    return updated(small, rule, hyper), small


def updated(small, rule, hyper, state=None):
    hyper = jax.tree.map(jnp.asarray, hyper.updated(rule=RULES[rule].chosen))
    family = RULES[rule].family
    if state is None:
        state = family.initial_state(small.architecture, hyper, jax.random.key(0))
    step = jax.jit(family.update, static_argnums=0)
    found = step(small.architecture, small.parameters, state, hyper, small.x, small.target)
    return jax.tree.map(np.asarray, found)


def opened(small, hyper):
    """The small problem's steady state without control."""
    solve = jax.jit(open_loop, static_argnums=0)
    hyper = jax.tree.map(jnp.asarray, hyper)
    solution = solve(small.architecture, small.parameters, hyper, small.x)
    return jax.tree.map(np.asarray, solution.state)


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("loss", LOSSES)
def test_bp_is_the_gradient_of_a_plain_forward_pass(problem, loss):
    result, small = update(problem, "bp", HYPER, circuit="non-dale", loss=loss)

    def plain(parameters):
        rate = small.x
        for layer in range(2):
            u = rate @ parameters[f"kernel_{layer}"] + parameters[f"bias_{layer}"]
            rate = 1.2 * jax.nn.softplus(0.9 * (u - 0.1))
        return jnp.mean(LOSSES[loss].value(rate @ parameters["kernel_out"], small.target))

    expected = jax.jit(jax.grad(plain))(small.parameters)
    for name, gradient in result.gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-10, atol=1e-14)


def test_bp_through_the_steady_state_is_what_finite_differences_say(problem):
    """Central differences of the loss through the solver itself, whose residual of 1e-12 over a
    step of 1e-5 leaves 1e-7."""
    result, small = update(problem, "bp", HYPER)

    def loss(parameters):
        output = opened(small._replace(parameters=parameters), HYPER).u_y
        logarithm = output - np.log(np.sum(np.exp(output), axis=-1, keepdims=True))
        return -np.mean(np.sum(small.target * logarithm, axis=-1))

    draw = np.random.default_rng(0)
    for name, value in small.parameters.items():
        direction = draw.normal(size=value.shape)
        moved = [
            loss({**small.parameters, name: value + sign * 1e-5 * direction}) for sign in (1, -1)
        ]
        numeric = (moved[0] - moved[1]) / 2e-5
        analytic = np.sum(result.gradients[name] * direction)
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_gradients_are_like_the_parameters(problem, rule, use_bias):
    circuit = next(iter(RULES[rule].circuits))
    result, small = update(problem, rule, HYPER, circuit=circuit, use_bias=use_bias)
    shapes = partial(jax.tree.map, jnp.shape)
    assert shapes(result.gradients) == shapes(small.parameters)
    assert ("bias_0" in result.gradients) == use_bias
    assert bool(result.solution.converged.all())


@pytest.mark.parametrize("rule", ["bp", "exact-inv"])
def test_nothing_to_correct_is_nothing_to_learn(problem, rule):
    """Where the output already is the target there is no error, so no gradient. (The tangent
    rules err about the inverse itself and learn even then.)"""
    small = problem(family=RULES[rule].family.name, solver=TIGHT)
    target = softmax(opened(small, HYPER).u_y, axis=-1)
    result = updated(small._replace(target=target), rule, HYPER)
    assert max(np.max(np.abs(gradient)) for gradient in result.gradients.values()) < 1e-10


def test_weak_feedback_learns_as_bp_does(problem):
    """With unnormalised Jacobian feedback and a vanishing controller gain, delta is the output
    error sent back through the network's own weights, so exact-inv descends nearly along bp. Not
    exactly: the published feedback weights leave out how much each interneuron holds its neuron
    (the loop gain), which is here about a third."""
    weak = HYPER.updated(controller={"k_p": 1e-3, "k_i": 1e-3})
    bare = weak.updated(rule={"norm_fb_weights": 0.0})
    ours, _ = update(problem, "exact-inv", bare, fb_to_readout=False)
    bp, _ = update(problem, "bp", weak)
    for layer in range(2):
        name = f"kernel_{layer}"
        assert cosine(ours.gradients[name].ravel(), bp.gradients[name].ravel()) > 0.9
    # Without feedback to the readout, its gradient is that of bp itself.
    np.testing.assert_allclose(
        ours.gradients["kernel_out"], bp.gradients["kernel_out"], rtol=0.05, atol=1e-3
    )


def test_exact_inverse_reads_the_dis_inhibition(problem):
    """delta_l = u_I - g_EI r_E = -s_l: the exact rule is the feedback itself, times phi_E'."""
    result, small = update(problem, "exact-inv", HYPER)
    state = result.solution.state
    rate = 1.2 * np.logaddexp(0, 0.9 * (state.u_e[0] - 0.1))
    slope = 1.2 * 0.9 * expit(0.9 * (state.u_e[0] - 0.1))
    delta = (state.u_i[0] - 1.3 * rate) * slope
    expected = small.x.T @ delta / len(small.x)
    np.testing.assert_allclose(result.gradients["kernel_0"], expected, rtol=1e-9, atol=1e-15)


def test_taylor_is_linear_threshold_at_a_fixed_rate(problem):
    """With lambda = 0, the running mean stays at its start."""
    frozen = HYPER.updated(rule={"avg_inh_lambda": 0.0, "avg_inh_init": 0.6, "y0": 0.6})
    tangent, _ = update(problem, "taylor", frozen)
    threshold, _ = update(problem, "lin-thresh", frozen)
    for name, gradient in tangent.gradients.items():
        np.testing.assert_allclose(gradient, threshold.gradients[name], rtol=1e-12)


def test_without_feedback_the_contrast_has_no_error(problem):
    """Where lin-thresh mistakes the curvature of its interneuron's activation for an error."""
    silent = HYPER.updated(rule={"norm_val": 1e-9})
    contrast, _ = update(problem, "lin-contrast", silent)
    threshold, _ = update(problem, "lin-thresh", silent)
    for layer in range(2):
        assert np.abs(contrast.gradients[f"kernel_{layer}"]).max() < 1e-8
        assert np.abs(threshold.gradients[f"kernel_{layer}"]).max() > 1e-3


def test_the_contrast_of_small_feedback_is_the_exact_error_in_other_units(problem):
    """To first order each neuron's error is that of exact-inv times a positive factor, which is 1
    where its interneuron is at the mean: its slope there over that at the mean."""
    weak = HYPER.updated(rule={"norm_val": 1e-4})
    exact, _ = update(problem, "exact-inv", weak)
    contrast, _ = update(problem, "lin-contrast", weak)
    threshold, _ = update(problem, "lin-thresh", weak)
    for layer in range(2):
        same = exact.gradients[f"kernel_{layer}"].ravel()
        assert cosine(contrast.gradients[f"kernel_{layer}"].ravel(), same) > 0.95
        assert cosine(threshold.gradients[f"kernel_{layer}"].ravel(), same) < 0.5


def test_linear_threshold_remembers_the_open_loop_rates(problem):
    result, small = update(problem, "lin-thresh", HYPER.updated(rule={"avg_inh_lambda": 0.25}))
    for y0, u_i in zip(result.rule_state.means, opened(small, HYPER).u_i, strict=True):
        mean = np.mean(0.8 * np.logaddexp(0, 1.3 * (u_i + 0.2)), axis=0)
        np.testing.assert_allclose(y0, 0.75 * 0.8 + 0.25 * mean, rtol=1e-9)


@pytest.mark.parametrize("rule", FEEDBACK)
def test_linear_interneurons_make_all_rules_one(problem, rule):
    """The inverse of a linear activation is its own tangent."""
    exact, _ = update(problem, "exact-inv", HYPER, activation_i="linear")
    other, _ = update(problem, rule, HYPER, activation_i="linear")
    for name, gradient in exact.gradients.items():
        np.testing.assert_allclose(gradient, other.gradients[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("rule", FEEDBACK)
def test_linear_interneurons_only_pass_the_product_of_the_gains(problem, rule):
    """u_I scales with g_EI and its effect with g_IE: with g_EI and the feedback doubled and g_IE
    halved, excitatory neurons and output do as before, and hidden errors are read off doubled."""
    one, _ = update(problem, rule, HYPER, activation_i="linear")
    doubled = {"norm_val": 2 * HYPER.rule["norm_val"]}
    scaled = HYPER.updated(g_ei=2 * HYPER.g_ei, g_ie=HYPER.g_ie / 2, rule=doubled)
    two, _ = update(problem, rule, scaled, activation_i="linear")
    for old, new in zip(one.solution.state.u_e, two.solution.state.u_e, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(two.solution.control, one.solution.control, rtol=1e-9)
    for name, gradient in one.gradients.items():
        factor = 1 if name == "kernel_out" else 2
        np.testing.assert_allclose(two.gradients[name], factor * gradient, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_silent_layer_gets_no_feedback(dtype):
    q = np.zeros((6, 4, 8), dtype)
    q[0] = 1e-3
    hyper = HYPER.updated(rule={"norm_val": jnp.asarray(1e4, dtype)})
    (scaled,) = map(np.asarray, jax.jit(modified)(hyper, (q,)))
    assert scaled.dtype == dtype
    np.testing.assert_allclose(np.linalg.norm(scaled[0]), 1e4, rtol=1e-5)
    assert not np.any(scaled[1:])  # and no NaN


@pytest.mark.parametrize(("average", "clip", "norm"), list(itertools.product((0.0, 1.0), repeat=3)))
def test_feedback_weights_are_averaged_then_clipped_then_normalised(average, clip, norm):
    """The order counts: the same by hand, in numpy."""
    q = np.random.default_rng(2).normal(size=(6, 4, 8))
    flags = {"average_fb_weights": average, "clip_fb_weights": clip, "norm_fb_weights": norm}
    hyper = HYPER.updated(rule={"clip_val": 0.5, "norm_val": 3.0, **flags})
    (found,) = jax.jit(modified)(hyper, (q,))
    expected = q
    if average:
        expected = np.broadcast_to(np.mean(expected, axis=0), q.shape)
    if clip:
        expected = np.minimum(np.maximum(expected, -0.5), 0.5)
    if norm:
        expected = np.stack([3.0 * sample / np.linalg.norm(sample) for sample in expected])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_nudge_moves_the_output_a_little_towards_the_target():
    draw = np.random.default_rng(0)
    output, target = draw.normal(size=(3, 4)), draw.dirichlet(np.ones(4), size=3)
    softmax = lambda y: np.exp(y) / np.sum(np.exp(y), axis=-1, keepdims=True)
    expected = {
        "softmax-cross-entropy": softmax(output + 0.1 * (target - softmax(output))),
        "mse": output + 0.1 * (target - output),
    }
    for loss, entry in LOSSES.items():
        found = entry.nudged_target(jnp.asarray(output), jnp.asarray(target), 0.1)
        np.testing.assert_allclose(found, expected[loss], rtol=1e-12)


def test_weak_feedback_controls_towards_the_nudge(problem):
    """The control vanishes with the nudge, and is that of the nudged target given outright."""
    for nudge in (0.0, 0.1):
        weak = HYPER.updated(rule={"strong_fb": 0.0, "target_nudge": nudge})
        result, small = update(problem, "exact-inv", weak)
        entry = LOSSES["softmax-cross-entropy"]
        aim = entry.nudged_target(opened(small, weak).u_y, small.target, nudge)
        # At equilibrium c = (k_p + k_i / leak) e.
        expected = (0.2 + 0.4) * (aim - softmax(result.solution.state.u_y, axis=-1))
        np.testing.assert_allclose(result.solution.control, expected, rtol=1e-8, atol=1e-11)
        assert (np.max(np.abs(expected)) > 1e-3) == (nudge > 0)


# --- Feedback paths of the E-I network -----------------------------------------------------------


def on_path(path, **rule):
    return HYPER.updated(rule={"feedback": float(path), **rule})


def test_random_feedback_weights_are_as_given(problem):
    """And stay: s = g_EI r_E - u_I of each neuron is the control through them, normalised."""
    small, draw = problem(solver=TIGHT), np.random.default_rng(0)
    given: Any = tuple(draw.normal(size=(4, size)) for size in (8, 7))
    means: Any = tuple(np.ones(size) for size in (8, 7))
    state = Memory(means, given)
    result = updated(small, "exact-inv", on_path(RANDOM, norm_val=2.0), state)
    found = result.solution.state
    for q, u_e, u_i in zip(given, found.u_e, found.u_i, strict=True):
        rate = 1.2 * np.logaddexp(0, 0.9 * (u_e - 0.1))
        expected = result.solution.control @ q * 2.0 / np.linalg.norm(q)
        np.testing.assert_allclose(1.3 * rate - u_i, expected, rtol=1e-8, atol=1e-11)
    for q, kept in zip(given, result.rule_state.feedback, strict=True):
        np.testing.assert_array_equal(q, kept)


def test_learnt_feedback_weights_move_to_the_mean_jacobian(problem):
    """Each batch closes the given share of the distance; all of it, and they are the averaged
    Jacobian path."""
    averaged, small = update(problem, "exact-inv", HYPER.updated(rule={"average_fb_weights": 1.0}))
    whole = updated(small, "exact-inv", on_path(LEARNT, feedback_rate=1.0))
    for name, gradient in averaged.gradients.items():
        np.testing.assert_allclose(whole.gradients[name], gradient, rtol=1e-9, atol=1e-14)
    start = updated(small, "exact-inv", on_path(RANDOM)).rule_state
    first = updated(small, "exact-inv", on_path(LEARNT, feedback_rate=0.25), start)
    second = updated(small, "exact-inv", on_path(LEARNT, feedback_rate=0.25), first.rule_state)
    aims = whole.rule_state.feedback
    for steps, result in ((1, first), (2, second)):
        for aim, q, begun in zip(aims, result.rule_state.feedback, start.feedback, strict=True):
            np.testing.assert_allclose(q - aim, 0.75**steps * (begun - aim), rtol=1e-10)


# --- Plain networks without the forward weights --------------------------------------------------


def signs_alone(parameters):
    """With kernels of one magnitude each."""
    return {
        name: np.where(value > 0, 0.7, -0.7) if name.startswith("kernel") else value
        for name, value in parameters.items()
    }


@pytest.mark.parametrize(
    ("rule", "reference", "hyper"),
    [
        ("sign-symmetric", "bp", HYPER),
        ("exact-inv", "exact-inv", on_path(SIGN_SYMMETRIC, norm_fb_weights=0.0)),
    ],
)
def test_signs_of_weights_of_one_magnitude_are_the_weights(problem, rule, reference, hyper):
    circuit = next(iter(RULES[rule].circuits))
    small = problem(family=RULES[rule].family.name, circuit=circuit, solver=TIGHT)
    small = small._replace(parameters=signs_alone(small.parameters))
    result, exact = updated(small, rule, hyper), updated(small, reference, hyper.updated(
        rule={"feedback": 0.0}
    ))  # fmt: skip
    for name, gradient in result.gradients.items():
        np.testing.assert_allclose(gradient, exact.gradients[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", ["fa", "kolen-pollack"])
def test_errors_that_come_back_on_the_forward_weights_are_those_of_bp(problem, rule, loss):
    bp, small = update(problem, "bp", HYPER, circuit="non-dale", loss=loss)
    kernels = {name: small.parameters[name] for name in ("kernel_1", "kernel_out")}
    direct: Any = tuple(np.ones((size, 4)) for size in (8, 7))
    state = FeedbackKernels(kernels, direct)
    result = updated(small, rule, HYPER, state)
    assert result.gradients.keys() == bp.gradients.keys()
    for name, gradient in bp.gradients.items():
        np.testing.assert_allclose(result.gradients[name], gradient, rtol=1e-10, atol=1e-14)


def test_direct_errors_skip_the_layers(problem):
    """With W_out in their place the last hidden layer learns as by bp; the first knows nothing of
    the second."""
    bp, small = update(problem, "bp", HYPER, circuit="non-dale")
    first: Any = np.random.default_rng(0).normal(size=(8, 4))
    kernels = {name: np.ones_like(small.parameters[name]) for name in ("kernel_1", "kernel_out")}
    state = FeedbackKernels(kernels, (first, small.parameters["kernel_out"]))
    result = updated(small, "dfa", HYPER, state)
    for name in ("kernel_1", "bias_1", "kernel_out"):
        np.testing.assert_allclose(result.gradients[name], bp.gradients[name], rtol=1e-10)
    u = small.x @ small.parameters["kernel_0"] + small.parameters["bias_0"]
    error = softmax(result.solution.state.u_y, axis=-1) - small.target
    delta = error @ first.T * 1.2 * 0.9 * expit(0.9 * (u - 0.1))
    expected = small.x.T @ delta / len(small.x)
    np.testing.assert_allclose(result.gradients["kernel_0"], expected, rtol=1e-9, atol=1e-14)
