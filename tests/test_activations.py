"""Every activation of the table: its four closed forms against each other and against jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from disinhib.activations import ACTIVATIONS, bind, tangent_of_inverse
from disinhib.checks import defaults

SOFTRELU = {"scale": 1.5, "sharpness": 0.8, "shift": 0.5}
# For an entry with options, also values that are not their defaults: that all of them count.
CASES = [
    *((kind, defaults(entry.options)) for kind, entry in ACTIVATIONS.items()),
    ("softrelu", SOFTRELU),
]
TABLE = pytest.mark.parametrize(("kind", "scalars"), CASES)
FIXED = settings(derandomize=True, max_examples=40)
POTENTIALS = st.lists(st.floats(-15, 15), min_size=8, max_size=8)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def open_range(kind):
    """The range of an activation's rates, or a part of it where it has no bound."""
    within, _ = ACTIVATIONS[kind].rates
    low = next(low for low in (-20.0, -1.0, 0.0) if within(low + 0.01))
    return low, next(high for high in (60.0, 1.0) if within(high - 0.01))


def rates(kind, scalars, unit):
    """Numbers in [0, 1] moved into the open range of an activation."""
    unit = 0.001 + 0.998 * np.asarray(unit)
    low, high = open_range(kind)
    return jnp.asarray(low + (high - low) * unit)


# Definitions of the published activations, by other routes than the closed forms under test.
WRITTEN_OUT = {
    "softrelu": lambda x, scale, sharpness, shift: (
        scale * jnp.logaddexp(sharpness * (x - shift), 0)
    ),
    "linear": lambda x: x,
    "tanh": lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x)),
    "relu": lambda x: x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-x)),
}


@pytest.mark.parametrize(("kind", "scalars"), [c for c in CASES if c[0] in WRITTEN_OUT])
def test_the_value_is_the_definitions(kind, scalars):
    x = jnp.linspace(-20, 20, 101)
    expected = WRITTEN_OUT[kind](x, **scalars)
    # atol: tanh's exponentials cancel near 0.
    np.testing.assert_allclose(bind(kind, scalars).value(x), expected, rtol=1e-12, atol=1e-16)


@TABLE
@FIXED
@given(x=POTENTIALS)
def test_the_derivative_is_jaxs(kind, scalars, x):
    phi, x = bind(kind, scalars), jnp.asarray(x)
    # relu's derivative at 0 is 0 here and in jax.nn.relu; jnp.maximum's is 1/2.
    x = jnp.where((kind == "relu") & (x == 0), 1.0, x)
    expected = jax.vmap(jax.grad(phi.value))(x)
    # Saturated tanh: 1 - tanh^2 loses all but the absolute precision.
    np.testing.assert_allclose(phi.derivative(x), expected, rtol=1e-9, atol=1e-15)


@TABLE
@FIXED
@given(x=POTENTIALS)
def test_the_derivative_is_a_difference_quotient(kind, scalars, x):
    phi, x, h = bind(kind, scalars), jnp.asarray(x), 1e-5
    x = jnp.where((kind == "relu") & (jnp.abs(x) < 2 * h), 1.0, x)  # the kink
    quotient = (phi.value(x + h) - phi.value(x - h)) / (2 * h)
    # h^2 phi''' / 6 and rounding of 15 / h: 1e-10 each.
    np.testing.assert_allclose(phi.derivative(x), quotient, rtol=1e-8, atol=1e-9)


@TABLE
@FIXED
@given(unit=st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_value_undoes_inverse(kind, scalars, unit):
    phi, y = bind(kind, scalars), rates(kind, scalars, unit)
    np.testing.assert_allclose(phi.value(phi.inverse(y)), y, rtol=1e-10)


@TABLE
@FIXED
@given(x=POTENTIALS)
def test_inverse_undoes_value(kind, scalars, x):
    phi, x = bind(kind, scalars), jnp.asarray(x)
    if kind == "relu":  # silent below 0: the inverse gives 0 there
        x = jnp.maximum(x, 0)
    if (
        open_range(kind)[1] == 1.0
    ):  # at 15 a double's rate holds a potential to 1e-16 / phi'(15) = 1e-3
        x = x / 3
    np.testing.assert_allclose(phi.inverse(phi.value(x)), x, rtol=1e-10, atol=1e-10)


@TABLE
@FIXED
@given(x=st.lists(st.floats(-100, 100), min_size=8, max_size=8))
def test_rates_never_fall_as_potentials_rise(kind, scalars, x):
    value = bind(kind, scalars).value(jnp.sort(jnp.asarray(x)))
    assert np.all(np.diff(value) >= 0)


@TABLE
@FIXED
@given(unit=st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_the_inverses_derivative_is_one_over_the_derivative(kind, scalars, unit):
    phi, y = bind(kind, scalars), rates(kind, scalars, unit)
    expected = 1 / phi.derivative(phi.inverse(y))
    # 1 - tanh^2 of a potential that rounding moved: 1e-16 / 2e-3^2 of it.
    np.testing.assert_allclose(phi.inverse_derivative(y), expected, rtol=1e-9)


@TABLE
@FIXED
@given(unit=st.lists(st.floats(0.01, 0.9), min_size=8, max_size=8))
def test_the_tangent_touches_the_inverse(kind, scalars, unit):
    phi, y = bind(kind, scalars), rates(kind, scalars, unit)
    intercept, slope = tangent_of_inverse(phi, y)
    h = 1e-5
    np.testing.assert_allclose(intercept + slope * y, phi.inverse(y), rtol=1e-10, atol=1e-10)
    # Off by the curvature: h^2 of it, and the inverse curves by up to 1e4 near its range's end.
    np.testing.assert_allclose(
        intercept + slope * (y + h), phi.inverse(y + h), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@TABLE
def test_everything_is_finite_for_arguments_of_up_to_100(kind, scalars, dtype):
    phi, x = bind(kind, scalars), jnp.linspace(-100, 100, 4001, dtype=dtype)
    y = phi.value(x)
    found = {
        "value": y,
        "derivative": phi.derivative(x),
        "inverse of the value": phi.inverse(y),
        "inverse": phi.inverse(jnp.abs(x) if kind == "softrelu" else x),
        "gradient": jax.vmap(jax.grad(phi.value))(x),
    }
    for name, values in found.items():
        assert np.isfinite(values).all(), name
        assert values.dtype == dtype, name
    # A rate outside an activation's range (as the running mean may start) has a finite tangent.
    for part in tangent_of_inverse(phi, jnp.asarray([0.8, 1.0], dtype)):
        assert np.isfinite(part).all()
        assert part.dtype == dtype


def test_the_soft_rectifiers_inverse_is_right_where_the_published_one_is_not():
    phi = bind("softrelu", SOFTRELU)
    y = jnp.asarray([80.0, 1000.0])  # y / scale > 50: there phi is its asymptote, to e^-53
    np.testing.assert_allclose(phi.inverse(y), 0.5 + y / 1.5 / 0.8, rtol=1e-14)


def test_the_soft_rectifiers_ratio_is_good_to_a_few_units_in_the_last_place():
    # The ratio of `_log1p_of_share` is float32's alone; float64's log1p is the truth.
    x = np.concatenate([np.linspace(-100, 20, 40_001), -np.geomspace(1e-6, 80, 2_001)])
    x = x.astype(np.float32)
    value = np.asarray(bind("softrelu").value(jnp.asarray(x)), float)
    wide = x.astype(float)
    truth = np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
    normal = truth > 2 * np.finfo(np.float32).tiny  # XLA flushes subnormal numbers to zero
    ulp = np.spacing(truth.astype(np.float32)).astype(float)
    # exp's own error of 1 to 2 ulp (3 where |z| is large) comes on top of the ratio's roundings.
    assert np.max(np.abs(value - truth)[normal] / ulp[normal]) < 6
    assert np.max(value[~normal]) < 4e-38
