"""Losses of one batch and the error signals that drive the controller.

Published `src/core/losses.py`. The error is minus the loss's derivative in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from disinhib.checks import Option

Scalar = Float[Array, ""] | float


class Loss(NamedTuple):
    """Functions of (output, target), both `[batch, out]`, and of the loss's options by name: the
    loss of each sample `[batch]`; its error `[batch, out]`; and, of (output, target, nudge), the
    nudged target `[batch, out]` of weak feedback.

    `damping` of (output, target, gain) is the inverse of 1 + gain S, S = -d(error)/d(output), of
    each sample `[batch, out, out]`: where Newton's method starts. Left out, it is computed.
    """

    value: Callable[..., Float[Array, " batch"]]
    error: Callable[..., Float[Array, "batch out"]]
    nudged_target: Callable[..., Float[Array, "batch out"]]
    words: str
    damping: Callable[..., Float[Array, "batch out out"]] | None = None
    options: tuple[Option, ...] = ()


def bind(kind: str, scalars: Mapping[str, Scalar]) -> Loss:
    """The loss `kind` (a key of LOSSES) with the values of its options filled in."""
    entry = LOSSES[kind]
    damping = partial(_damping, entry.error) if entry.damping is None else entry.damping
    filled = lambda function: partial(function, **scalars) if scalars else function
    return entry._replace(
        value=filled(entry.value),
        error=filled(entry.error),
        nudged_target=filled(entry.nudged_target),
        damping=filled(damping),
    )


def _damping(error, output, target, gain, **scalars):
    """The inverse of 1 + gain S for any error, from its derivative."""

    def of_sample(output, target):
        alone = lambda y: error(y[None], target[None], **scalars)[0]
        slope = jax.jacfwd(alone)(output)
        return jnp.linalg.inv(jnp.eye(len(output), dtype=output.dtype) - gain * slope)

    return jax.vmap(of_sample)(output, target)


def _cross_entropy(output, target):
    return -jnp.sum(target * jax.nn.log_softmax(output), axis=-1)


def _cross_entropy_error(output, target):
    return target - jax.nn.softmax(output)


def _cross_entropy_nudge(output, target, nudge):
    return jax.nn.softmax(output + nudge * _cross_entropy_error(output, target))


def _cross_entropy_damping(output, target, gain):
    # S = diag(p) - p p^T; Sherman and Morrison invert 1 + gain S.
    p = jax.nn.softmax(output)
    diagonal = 1 / (1 + gain * p)
    q = diagonal * p
    rest = 1 - gain * jnp.sum(p * q, axis=-1)
    rank_one = (gain / rest)[:, None, None] * q[:, :, None] * q[:, None, :]
    return diagonal[:, :, None] * jnp.eye(output.shape[-1], dtype=output.dtype) + rank_one


def _squared_error(output, target):
    return 0.5 * jnp.sum((target - output) ** 2, axis=-1)


def _residual(output, target):
    return target - output


def _squared_error_nudge(output, target, nudge):
    return output + nudge * _residual(output, target)


def _squared_error_damping(output, target, gain):
    diagonal = jnp.full_like(output, 1 / (1 + gain))
    return diagonal[:, :, None] * jnp.eye(output.shape[-1], dtype=output.dtype)


LOSSES: dict[str, Loss] = {
    "softmax-cross-entropy": Loss(
        _cross_entropy,
        _cross_entropy_error,
        _cross_entropy_nudge,
        words="cross-entropy between the target and softmax(output)",
        damping=_cross_entropy_damping,
    ),
    "mse": Loss(
        _squared_error,
        _residual,
        _squared_error_nudge,
        words="0.5 * sum of squares of target - output",
        damping=_squared_error_damping,
    ),
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
