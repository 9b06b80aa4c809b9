"""Activation functions: value, derivative, inverse, and the inverse's tangent line.

The published code (fmi-basel/disinhibitory-control, `src/core/activation.py`) has the same five.
Here each is four closed forms of one variable, exact everywhere in their domain and finite in
float32 for arguments of +-100: where a rate saturates, its inverse returns the largest potential
that still can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Elementwise = Callable[[Float[Array, "..."]], Float[Array, "..."]]


class Shape(NamedTuple):
    """Parameters of the soft rectifier (dimensionless); the other activations have none."""

    scale: Float[Array, ""] | float = 1.0
    sharpness: Float[Array, ""] | float = 1.0
    shift: Float[Array, ""] | float = 0.0


class Activation(NamedTuple):
    """Elementwise functions of one activation: potential -> rate, and back."""

    value: Elementwise
    derivative: Elementwise
    inverse: Elementwise
    inverse_derivative: Elementwise


def bind(kind: str, shape: Shape) -> Activation:
    """The activation `kind` (a key of ACTIVATIONS) with its shape parameters filled in."""
    return Activation(*(partial(function, shape) for function in ACTIVATIONS[kind]))


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


def _softrelu(shape, x):
    return shape.scale * _softplus(shape.sharpness * (x - shape.shift))


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


def _log1p_of_share(e):
    """log(1 + e) for e in [0, 1], to float32's precision by a series that needs no logarithm.

    log(1 + e) = 2 artanh(w), w = e / (2 + e) <= 1/3. XLA's log1p takes most of a soft rectifier's
    time on CPU, and the steady states are made of soft rectifiers (benchmarks/step.py).
    """
    if e.dtype != jnp.float32:
        return jnp.log1p(e)
    w = e / (2 + e)
    square, series = w * w, 1 / 15
    for odd in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1 / odd
    return 2 * w * series


def _softrelu_derivative(shape, x):
    z = shape.sharpness * (x - shape.shift)
    return shape.scale * shape.sharpness * _softplus_slope(z)


def _softrelu_inverse(shape, y):
    # log(expm1(w)) = w + log(-expm1(-w)): right for large w, where expm1 overflows.
    # Published `SoftReLu.inv` drops shift and sharpness for w > 50.
    w = jnp.maximum(y / shape.scale, _smallest(y))
    return shape.shift + (w + jnp.log(-jnp.expm1(-w))) / shape.sharpness


def _softrelu_inverse_derivative(shape, y):
    w = jnp.maximum(y / shape.scale, _smallest(y))
    return -1 / (shape.scale * shape.sharpness * jnp.expm1(-w))


def _linear(shape, x):
    return x


def _linear_derivative(shape, x):
    return jnp.ones_like(x)


def _tanh(shape, x):
    return jnp.tanh(x)


def _tanh_derivative(shape, x):
    return 1 - jnp.tanh(x) ** 2


def _inside(y, low, high):
    """`y` moved off the open interval's ends by the least relative amount."""
    eps = jnp.finfo(y.dtype).eps
    return jnp.clip(y, low + (_smallest(y) if low == 0 else eps), high - eps)


def _tanh_inverse(shape, y):
    return jnp.arctanh(_inside(y, -1.0, 1.0))


def _tanh_inverse_derivative(shape, y):
    y = _inside(y, -1.0, 1.0)
    return 1 / ((1 - y) * (1 + y))


def _relu(shape, x):
    return jnp.maximum(x, 0)


def _relu_derivative(shape, x):
    return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


def _sigmoid(shape, x):
    return jax.nn.sigmoid(x)


def _sigmoid_derivative(shape, x):
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)


def _sigmoid_inverse(shape, y):
    y = _inside(y, 0.0, 1.0)
    return jnp.log(y) - jnp.log1p(-y)


def _sigmoid_inverse_derivative(shape, y):
    y = _inside(y, 0.0, 1.0)
    return 1 / (y * (1 - y))


# kind: (value, derivative, inverse, derivative of the inverse), each of (shape, x).
ACTIVATIONS: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "softrelu": (
        _softrelu,
        _softrelu_derivative,
        _softrelu_inverse,
        _softrelu_inverse_derivative,
    ),
    "linear": (_linear, _linear_derivative, _linear, _linear_derivative),
    "tanh": (_tanh, _tanh_derivative, _tanh_inverse, _tanh_inverse_derivative),
    # The published inverse of ReLU is y for y > 0, else 0: its tangent is the identity.
    "relu": (_relu, _relu_derivative, _relu, _linear_derivative),
    "sigmoid": (_sigmoid, _sigmoid_derivative, _sigmoid_inverse, _sigmoid_inverse_derivative),
}
