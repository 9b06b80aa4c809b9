"""One microcircuit as a plasticity experiment, and four models beside it.

Truth: the published integration against Newton's method, and what the equations say of the zeros.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from disinhib.paper import plasticity
from disinhib.paper.error_modulation import GREEDY_SLOPE, MODELS, PHI, W_IE
from disinhib.paper.plasticity import clamped, equilibrium, euler, exact, linear, with_feedback

pytestmark = pytest.mark.usefixtures("float64", "strict")

CIRCUIT = plasticity.PUBLISHED
FITS = ((1.5, 1.5), (0.9, 1.8))


def inputs(most, points=2001):
    return jnp.linspace(0, most, points)


def crossings(curve, value="rate"):
    """(where the change crosses zero, whether it rises there), by linear interpolation."""
    at, change = np.asarray(getattr(curve, value)), np.asarray(curve.change)
    left = np.flatnonzero(change[:-1] * change[1:] < 0)
    share = change[left] / (change[left] - change[left + 1])
    return jnp.asarray(at[left] + share * (at[left + 1] - at[left])), change[left] < 0


@pytest.mark.parametrize("target", [4.0, 3.0, None])
@pytest.mark.parametrize("most", [10.0, 20.0])
def test_euler_and_newton_agree(target, most):
    """The published 600 steps are 12 time constants. With feedback u_I = 6 r_E - 5 target moves six
    times as far as r_E, and 2e-3 of its way (e^-12, times an Euler step's excess) is then still to
    go: so 1e-4 holds for u_E at once, and for both potentials after half as many steps again."""
    newton = equilibrium(CIRCUIT, inputs(most), target)
    published = euler(CIRCUIT, inputs(most), target)
    rates = [CIRCUIT.phi_e.value(state.u_e) for state in (newton, published)]
    for ours, theirs in ((newton.u_e, published.u_e), rates):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    if target is None:
        np.testing.assert_allclose(newton.u_i, published.u_i, atol=1e-4)
    settled = euler(CIRCUIT, inputs(most), target, steps=3 * plasticity.STEPS // 2)
    for ours, theirs in zip(newton, settled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("road", [equilibrium, euler])
@pytest.mark.parametrize("target", [4.0, 3.0])
def test_the_exact_rule_changes_sign_at_the_target(target, road):
    at, rises = crossings(with_feedback(exact(CIRCUIT), inputs(10.0), target, road=road))
    np.testing.assert_allclose(at, [target], atol=1e-3)
    assert not rises[0]


def test_without_feedback_the_exact_rule_rests():
    curve = with_feedback(exact(CIRCUIT), inputs(13.0), None)
    np.testing.assert_allclose(curve.change, 0, atol=1e-8)


@pytest.mark.parametrize("fit", FITS)
def test_without_feedback_the_linear_rule_has_a_threshold(fit):
    """Depression at low rates, potentiation at high ones, and a zero wherever the line is right.

    (At the highest rates of the panel it depresses again: the line is steeper than the inverse.)
    """
    curve = with_feedback(linear(*fit), inputs(13.0), None)
    at, rises = crossings(curve)
    assert list(rises) == [True, False]
    theta, delta = fit
    np.testing.assert_allclose(theta + delta * CIRCUIT.phi_i.value(at), at, atol=1e-3)
    low, high = np.asarray(curve.rate) < at[0], np.asarray(curve.rate) > at[0]
    assert np.all(np.asarray(curve.change)[low][1:] < 0)
    assert np.max(np.asarray(curve.change)[high]) > -np.min(np.asarray(curve.change)[low])


@pytest.mark.parametrize("fit", FITS)
def test_clamped_inhibition_shifts_the_threshold(fit):
    theta, delta = fit
    held = (0.01, 0.5, 1.0, 2.0)
    found = [crossings(clamped(linear(*fit), inputs(9.0), r_i)) for r_i in held]
    assert all(list(rises) == [True] for _, rises in found)
    thresholds = [at[0] for at, _ in found]
    assert np.all(np.diff(thresholds) > 0)
    np.testing.assert_allclose(thresholds, [theta + delta * r_i for r_i in held], atol=1e-4)


def zero_is_where_the_equations_say(name, curve, target):
    """What must vanish at the zero `x` of a model's curve."""
    rate, _ = crossings(curve)
    x, falls = crossings(curve, "x")
    assert len(x) == 1 and not falls[0], name
    if name == "sacramento":  # no apical potential: w_IE phi(u_I) + target = 0, u_I at its rest
        u_i = (rate + target) / 1.1  # g_leak + g_D
        return -W_IE * PHI.value(u_i) - target
    if name == "greedy":  # the output's event rate is the target
        return PHI.value(rate) - target
    return rate - target


@pytest.mark.parametrize("target", [4.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_other_models_have_their_zero_where_their_equations_say(name, target):
    # Not at x = 0, where every change vanishes.
    curve = MODELS[name].feedback(jnp.linspace(0.05, 10.0, 4001), target)
    np.testing.assert_allclose(zero_is_where_the_equations_say(name, curve, target), 0, atol=1e-3)


def test_without_feedback_other_models_rest_or_depress():
    x = inputs(13.0)
    for name, model in MODELS.items():
        change = np.asarray(model.feedback(x, None).change)
        if name == "sacramento":  # its interneuron still inhibits the apical dendrite
            assert np.all(change[1:] < 0)
        else:
            np.testing.assert_array_equal(change, 0)


def test_clamped_other_models_without_inhibition_rest_and_with_it_depress():
    x = inputs(10.0)
    for name in ("sacramento", "meulemans"):
        of = MODELS[name].clamped
        assert of is not None
        np.testing.assert_array_equal(of(x, 0.0).change, 0)
        assert np.all(np.asarray(of(x, 1.0).change)[1:] < 0)


def test_clamped_inhibition_shifts_greedys_threshold_to_where_bursts_are_at_baseline():
    of = MODELS["greedy"].clamped
    assert of is not None
    found = [crossings(of(inputs(25.0), r_i)) for r_i in (0.0, 1.0, 2.0, 3.0)]
    thresholds = jnp.stack([at[0] for at, _ in found])
    assert np.all(np.diff(thresholds) > 0)
    x = PHI.inverse(thresholds)
    relative = PHI.derivative(x) / thresholds
    logits = -GREEDY_SLOPE * np.arange(4.0) * relative
    bursts = 1.6 * (1 - np.exp(-thresholds / 10)) / (1 + np.exp(-logits))
    np.testing.assert_allclose(bursts, 0.5, atol=1e-4)
