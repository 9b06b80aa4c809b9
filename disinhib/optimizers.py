"""Optimizers whose scalars are traced, so that one compiled program serves every setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax

from disinhib.checks import DECAY, POSITIVE, Option
from disinhib.hyperparameters import Scalar


class Optimizer(NamedTuple):
    """`transformation(scalars)` is optax's, for a value of each of `options`."""

    transformation: Callable[[Mapping[str, Scalar]], optax.GradientTransformation]
    words: str
    options: tuple[Option, ...]


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(
        lambda scalars: optax.adam(
            scalars["learning_rate"], scalars["b1"], scalars["b2"], scalars["eps"]
        ),
        words="Adam (Kingma & Ba 2015)",
        options=(
            Option("learning_rate", 1e-3, POSITIVE, "step size"),
            Option("b1", 0.9, DECAY, "decay of the gradients' mean"),
            Option("b2", 0.999, DECAY, "decay of their squares' mean"),
            Option("eps", 1e-8, POSITIVE, "added to the root of the squares' mean"),
        ),
    ),
    "sgd": Optimizer(
        lambda scalars: optax.chain(
            optax.trace(decay=scalars["momentum"]),
            optax.scale_by_learning_rate(scalars["learning_rate"]),
        ),
        words="stochastic gradient descent with momentum",
        options=(
            Option("learning_rate", 1e-1, POSITIVE, "step size"),
            Option("momentum", 0.0, DECAY, "share of the last step that is taken again"),
        ),
    ),
}
