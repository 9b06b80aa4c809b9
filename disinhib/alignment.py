"""Does a rule's update point where the gradient does?

A rule's gradients of one batch are compared with those that back-propagation has of the same batch
through the same network: through its open-loop steady state, by implicit differentiation.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.metrics import ANGLE, NORM_RATIO
from disinhib.network import Parameters
from disinhib.rules import FAMILIES, RuleState
from disinhib.rules.backprop import backpropagation


def alignment(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> dict[str, Float[Array, ""]]:
    """The angle (degrees, 0 to 180) between the rule's gradients and the exact ones, and the ratio
    of their norms: of all parameters, and of each layer's (`_0`, ..., `_out`).

    A layer that the rule, or the loss, leaves alone has an angle of 90 degrees; one that the loss
    does not depend on has a ratio of 0.
    """
    family = FAMILIES[architecture.family]
    own = family.update(architecture, parameters, rule_state, hyper, x, target).gradients
    exact = backpropagation(architecture, parameters, (), hyper, x, target).gradients
    layers = [*map(str, range(architecture.hidden_layers)), "out"]
    of_layer = {f"_{name}": [f"kernel_{name}", f"bias_{name}"] for name in layers}
    measured = {}
    for suffix, names in {"": list(exact), **of_layer}.items():
        there = [name for name in names if name in exact]
        a, b = (jnp.concatenate([jnp.ravel(of[name]) for name in there]) for of in (own, exact))
        measured[ANGLE + suffix] = _angle(a, b)
        size = jnp.linalg.norm(b)
        ratio = jnp.linalg.norm(a) / jnp.where(size > 0, size, 1)
        measured[NORM_RATIO + suffix] = jnp.where(size > 0, ratio, 0)
    return measured


def _angle(a: Array, b: Array) -> Float[Array, ""]:
    """In degrees; by the difference and the sum of unit vectors, as an arc cosine is inexact near
    0."""
    tiny = jnp.finfo(a.dtype).tiny
    a, b = (v / jnp.maximum(jnp.linalg.norm(v), tiny) for v in (a, b))
    return jnp.degrees(2 * jnp.atan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))
