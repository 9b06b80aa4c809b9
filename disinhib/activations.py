"""Activation functions: value, derivative, inverse, and the inverse's tangent line.

The published code (fmi-basel/disinhibitory-control, `src/core/activation.py`) has the same five.
Here each is four closed forms of one variable, exact everywhere in their domain and finite in
float32 for arguments of +-100: where a rate saturates, its inverse returns the largest potential
that still can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.checks import ANY_NUMBER, POSITIVE, SHARE, Check, Option, defaults, is_number

Elementwise = Callable[[Float[Array, "..."]], Float[Array, "..."]]


Scalars = Mapping[str, Float[Array, ""] | float]


class Activation(NamedTuple):
    """Elementwise functions of one activation: potential -> rate, and back."""

    value: Elementwise
    derivative: Elementwise
    inverse: Elementwise
    inverse_derivative: Elementwise


class Kind(NamedTuple):
    """An entry of ACTIVATIONS: four elementwise functions of (scalars, x), where `scalars` has a
    value for each of `options`."""

    value: Callable
    derivative: Callable
    inverse: Callable
    inverse_derivative: Callable
    rates: Check  # those at which the inverse has a tangent
    words: str
    options: tuple[Option, ...] = ()


# Of an option that is a rate of the interneurons: what it may be, their activation's entry says.
RATE: Check = (is_number, "a rate of the interneurons' activation")


def bind(kind: str, scalars: Scalars | None = None) -> Activation:
    """The activation `kind` (a key of ACTIVATIONS); `scalars` are its options, those left out
    having their defaults."""
    entry = ACTIVATIONS[kind]
    values = defaults(entry.options) | dict(scalars or {})
    functions = (entry.value, entry.derivative, entry.inverse, entry.inverse_derivative)
    return Activation(*(partial(function, values) for function in functions))


def tangent_of_inverse(
    activation: Activation, y0: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(intercept, slope) of the line that touches the activation's inverse at the rate `y0`.

    The linear-threshold rule's stand-in for the inverse (paper, section 3; published
    `_get_taylorexp_model`).
    """
    slope = activation.inverse_derivative(y0)
    return activation.inverse(y0) - slope * y0, slope


def _smallest(y):
    return jnp.finfo(y.dtype).tiny


def _softrelu(scalars, x):
    return scalars["scale"] * _softplus(scalars["sharpness"] * (x - scalars["shift"]))


@jax.custom_jvp
def _softplus(z):
    """log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)): shares its exponential with its slope.

    Differentiated term by term, it would have the slope 0 at z = 0.
    """
    return jnp.maximum(z, 0) + _log1p_of_share(jnp.exp(-jnp.abs(z)))


def _softplus_slope(z):
    decay = jnp.exp(-jnp.abs(z))
    return jnp.where(z > 0, 1.0, decay) / (1 + decay)


_softplus.defjvps(lambda dz, answer, z: dz * _softplus_slope(z))


# log(1 + e) / e for e in [0, 1] as a ratio of polynomials, lowest power first, fitted by least
# squares reweighted to the smallest largest relative error: 1.9e-8.
_LOG1P_ABOVE = (0.999999981017118, 0.8671936663592985, 0.12376437053073713)
_LOG1P_BELOW = (1.0, 1.3671917196535335, 0.4740590285186291, 0.03109456540622796)


def _log1p_of_share(e):
    """log(1 + e) for e in [0, 1], to float32's precision without a logarithm.

    XLA's log1p takes most of a soft rectifier's time on CPU, and the steady states are made of soft
    rectifiers (benchmarks/step.py). A ratio names `e` seldom enough for XLA to keep it within one
    kernel.
    """
    if e.dtype != jnp.float32:
        return jnp.log1p(e)
    (a0, a1, a2), (b0, b1, b2, b3) = _LOG1P_ABOVE, _LOG1P_BELOW
    return e * (a0 + e * (a1 + e * a2)) / (b0 + e * (b1 + e * (b2 + e * b3)))


def _softrelu_derivative(scalars, x):
    z = scalars["sharpness"] * (x - scalars["shift"])
    return scalars["scale"] * scalars["sharpness"] * _softplus_slope(z)


def _softrelu_inverse(scalars, y):
    # log(expm1(w)) = w + log(-expm1(-w)): right for large w, where expm1 overflows.
    # Published `SoftReLu.inv` drops shift and sharpness for w > 50.
    w = jnp.maximum(y / scalars["scale"], _smallest(y))
    return scalars["shift"] + (w + jnp.log(-jnp.expm1(-w))) / scalars["sharpness"]


def _softrelu_inverse_derivative(scalars, y):
    w = jnp.maximum(y / scalars["scale"], _smallest(y))
    return -1 / (scalars["scale"] * scalars["sharpness"] * jnp.expm1(-w))


def _linear(scalars, x):
    return x


def _linear_derivative(scalars, x):
    return jnp.ones_like(x)


def _tanh(scalars, x):
    return jnp.tanh(x)


def _tanh_derivative(scalars, x):
    return 1 - jnp.tanh(x) ** 2


def _inside(y, low, high):
    """`y` moved off the open interval's ends by the least relative amount."""
    eps = jnp.finfo(y.dtype).eps
    return jnp.clip(y, low + (_smallest(y) if low == 0 else eps), high - eps)


def _tanh_inverse(scalars, y):
    return jnp.arctanh(_inside(y, -1.0, 1.0))


def _tanh_inverse_derivative(scalars, y):
    y = _inside(y, -1.0, 1.0)
    return 1 / ((1 - y) * (1 + y))


def _relu(scalars, x):
    return jnp.maximum(x, 0)


def _relu_derivative(scalars, x):
    return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


def _sigmoid(scalars, x):
    return jax.nn.sigmoid(x)


def _sigmoid_derivative(scalars, x):
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _sigmoid_inverse(scalars, y):
    y = _inside(y, 0.0, 1.0)
    return jnp.log(y) - jnp.log1p(-y)


def _sigmoid_inverse_derivative(scalars, y):
    y = _inside(y, 0.0, 1.0)
    return 1 / (y * (1 - y))


ACTIVATIONS: dict[str, Kind] = {
    "softrelu": Kind(
        _softrelu,
        _softrelu_derivative,
        _softrelu_inverse,
        _softrelu_inverse_derivative,
        rates=POSITIVE,
        words="scale * log(1 + exp(sharpness * (u - shift)))",
        options=(
            Option("scale", 1.0, POSITIVE, "dimensionless"),
            Option("sharpness", 1.0, POSITIVE, "dimensionless; a larger one is nearer to ReLU"),
            Option("shift", 0.0, ANY_NUMBER, "a potential, dimensionless"),
        ),
    ),
    "linear": Kind(
        _linear, _linear_derivative, _linear, _linear_derivative, rates=ANY_NUMBER, words="u"
    ),
    "tanh": Kind(
        _tanh,
        _tanh_derivative,
        _tanh_inverse,
        _tanh_inverse_derivative,
        rates=(lambda v: is_number(v) and -1 < v < 1, "a number between -1 and 1"),
        words="tanh(u)",
    ),
    # The published inverse of ReLU is y for y > 0, else 0: its tangent is the identity.
    "relu": Kind(
        _relu, _relu_derivative, _relu, _linear_derivative, rates=POSITIVE, words="max(u, 0)"
    ),
    "sigmoid": Kind(
        _sigmoid,
        _sigmoid_derivative,
        _sigmoid_inverse,
        _sigmoid_inverse_derivative,
        rates=SHARE,
        words="1 / (1 + exp(-u))",
    ),
}
