"""Top-down feedback weights: the Jacobian of the output at the open-loop state (DESIGN section 2).

    G_L = W_out^T diag(phi_E'(u_E,L));   G_{l-1} = G_l W_l^T diag(phi_E'(u_E,l-1))
    Q_l = G_l diag(phi_I'(u_I,l)), then averaged, clipped, normalised

Published `src/models/dale/vf.py: calculate_jacobian`, `src/core/trainer.py: modify_fb_weights`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.checks import FLAG, POSITIVE, Option
from disinhib.hyperparameters import Hyperparameters
from disinhib.microcircuit import Microcircuit
from disinhib.network import NetworkState, Parameters

# Of every rule that runs closed loop. Weights are averaged, clipped, normalised, in this order.
OPTIONS = (
    Option("average_fb_weights", False, FLAG, "one matrix, the batch's mean, for all samples"),
    Option("clip_fb_weights", False, FLAG, "clip them to +-clip_val"),
    Option("clip_val", 1.0, POSITIVE, "largest |feedback weight|, dimensionless"),
    Option("norm_fb_weights", True, FLAG, "scale each sample's matrix to norm_val"),
    Option("norm_val", 1.0, POSITIVE, "Frobenius norm of a sample's feedback weights"),
    Option("strong_fb", True, FLAG, "control towards the target itself, else towards a nudge"),
    Option("target_nudge", 0.015, POSITIVE, "of weak feedback: how far from the open-loop output"),
)

FeedbackWeights = tuple[Float[Array, "batch out _neurons"], ...]


def jacobian_weights(
    circuit: Microcircuit, parameters: Parameters, state: NetworkState
) -> FeedbackWeights:
    """Unmodified feedback weights of each hidden layer at the open-loop `state`."""
    downstream = parameters["kernel_out"].T[None]
    weights = []
    for layer in reversed(range(len(state.u_e))):
        jacobian = downstream * circuit.phi_e.derivative(state.u_e[layer])[:, None, :]
        weights.append(jacobian * circuit.phi_i.derivative(state.u_i[layer])[:, None, :])
        if layer > 0:
            downstream = jacobian @ parameters[f"kernel_{layer}"].T
    return tuple(reversed(weights))


def modified(hyper: Hyperparameters, weights: FeedbackWeights) -> FeedbackWeights:
    """Average over the batch, clip, normalise: each where its flag is set, which is traced, so that
    all combinations are one compiled program."""
    flag = {name: hyper.rule[f"{name}_fb_weights"] != 0 for name in ("average", "clip", "norm")}
    limit = jnp.where(flag["clip"], hyper.rule["clip_val"], jnp.inf)
    changed = []
    for q in weights:
        q = jnp.where(flag["average"], jnp.mean(q, axis=0, keepdims=True), q)
        q = jnp.clip(q, -limit, limit)
        changed.append(q * jnp.where(flag["norm"], hyper.rule["norm_val"] / _frobenius(q), 1))
    return tuple(changed)


def disinhibition(
    control: Float[Array, "batch out"], weights: FeedbackWeights
) -> list[Float[Array, "batch _neurons"]]:
    """s_l = c Q_l of each hidden layer."""
    # Products, not sums: XLA would fuse a sum into every use of s and do it again for each.
    return [jnp.einsum("bo,bon->bn", control, q) for q in weights]


def _frobenius(q):
    norm = jnp.sqrt(jnp.sum(q**2, axis=(1, 2), keepdims=True))
    # A silent layer has no feedback; it must not become NaN. (Squares underflow below this.)
    return jnp.maximum(norm, jnp.finfo(q.dtype).tiny ** 0.5)
