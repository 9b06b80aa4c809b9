"""Optimizers whose scalars are traced, so that one compiled program serves every setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import optax

from disinhib.hyperparameters import Scalar

# name: scalars (the options of conf/optimizer/<name>.yaml) -> optax transformation
OPTIMIZERS: dict[str, Callable[[Mapping[str, Scalar]], optax.GradientTransformation]] = {
    "adam": lambda scalars: optax.adam(
        scalars["learning_rate"], scalars["b1"], scalars["b2"], scalars["eps"]
    ),
    "sgd": lambda scalars: optax.chain(
        optax.trace(decay=scalars["momentum"]),
        optax.scale_by_learning_rate(scalars["learning_rate"]),
    ),
}
