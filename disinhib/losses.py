"""Losses of one batch and the error signals that drive the controller.

Published `src/core/losses.py`. The error is minus the loss's derivative in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Loss(NamedTuple):
    """Per-sample loss `[batch]`, error `[batch, out]`, and the nudged target `[batch, out]` of weak
    feedback."""

    value: Callable[[Float[Array, "batch out"], Float[Array, "batch out"]], Float[Array, " batch"]]
    error: Callable[
        [Float[Array, "batch out"], Float[Array, "batch out"]], Float[Array, "batch out"]
    ]
    nudged_target: Callable[..., Float[Array, "batch out"]]


def _cross_entropy(output, target):
    return -jnp.sum(target * jax.nn.log_softmax(output), axis=-1)


def _cross_entropy_error(output, target):
    return target - jax.nn.softmax(output)


def _cross_entropy_nudge(output, target, nudge):
    return jax.nn.softmax(output + nudge * _cross_entropy_error(output, target))


def _squared_error(output, target):
    return 0.5 * jnp.sum((target - output) ** 2, axis=-1)


def _residual(output, target):
    return target - output


def _squared_error_nudge(output, target, nudge):
    return output + nudge * _residual(output, target)


LOSSES: dict[str, Loss] = {
    "softmax-cross-entropy": Loss(_cross_entropy, _cross_entropy_error, _cross_entropy_nudge),
    "mse": Loss(_squared_error, _residual, _squared_error_nudge),
}


def soft_targets(
    labels: Int[Array, " batch"], classes: int, value: Float[Array, ""] | float
) -> Float[Array, "batch classes"]:
    """Targets with `value` on the class and the rest spread evenly (published default 0.99).

    `value = 1` gives one-hot targets.
    """
    rest = jnp.asarray((1 - value) / (classes - 1))
    return jax.nn.one_hot(labels, classes, dtype=rest.dtype) * (value - rest) + rest


def accuracy(
    output: Float[Array, "batch out"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """100 where the largest output is the label's, else 0 (per cent)."""
    return 100.0 * (jnp.argmax(output, axis=-1) == labels)
