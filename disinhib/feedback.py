"""Top-down feedback weights, which reach the interneurons of each hidden layer on one of PATHS.

`jacobian`: of the output at the open-loop state (DESIGN section 2), of each sample,

    G_L = W_out^T diag(phi_E'(u_E,L));   G_{l-1} = G_l W_l^T diag(phi_E'(u_E,l-1))
    J_l = G_l diag(phi_I'(u_I,l)),       Q_l = J_l

`sign-symmetric`: the same with sign(W) times the layer's mean |W| in the place of every W (as Liao
et al. 2016 and Xiao et al. 2019 have it in plain networks). The other two know no forward weights;
Q_l is one matrix for all samples: `random` is fixed (as in direct feedback alignment, Nøkland
2016), and `learnt` starts there, leaks and tracks the Jacobian, Q <- Q + rate (mean_b J - Q), as
tau_Q dQ/dt = -Q + J does in the paper's Figure 4.

Whatever the path, Q is then averaged over the batch, clipped and normalised. Published:
`src/models/dale/vf.py: calculate_jacobian`, `src/core/trainer.py: modify_fb_weights`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib.checks import FLAG, POSITIVE, UNIT, Option, one_of
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.microcircuit import Microcircuit
from disinhib.network import NetworkState, Parameters

PATHS = ("jacobian", "sign-symmetric", "random", "learnt")
JACOBIAN, SIGN_SYMMETRIC, RANDOM, LEARNT = range(len(PATHS))  # in `hyper.rule["feedback"]`

PATH_OPTIONS = (
    Option("feedback", "jacobian", one_of(PATHS), "how feedback weights come about", PATHS),
    Option("feedback_rate", 0.01, UNIT, "of learnt ones: share of the way to the Jacobian a batch"),
)
# Of every rule of dis-inhibition. Weights are averaged, clipped, normalised, in this order.
OPTIONS = (
    *PATH_OPTIONS,
    Option("average_fb_weights", False, FLAG, "one matrix, the batch's mean, for all samples"),
    Option("clip_fb_weights", False, FLAG, "clip them to +-clip_val"),
    Option("clip_val", 1.0, POSITIVE, "largest |feedback weight|, dimensionless"),
    Option("norm_fb_weights", True, FLAG, "scale each sample's matrix to norm_val"),
    Option("norm_val", 1.0, POSITIVE, "Frobenius norm of a sample's feedback weights"),
    Option("strong_fb", True, FLAG, "control towards the target itself, else towards a nudge"),
    Option("target_nudge", 0.015, POSITIVE, "of weak feedback: how far from the open-loop output"),
)

FeedbackWeights = tuple[Float[Array, "batch out _neurons"], ...]
KeptWeights = tuple[Float[Array, "out _neurons"], ...]  # from batch to batch


def initial_weights(architecture: Architecture, key: PRNGKeyArray) -> KeptWeights:
    """Random weights of each hidden layer: normal, with a Frobenius norm of about 1."""
    outputs = architecture.sizes[-1]
    return tuple(
        jax.random.normal(jax.random.fold_in(key, layer), (outputs, size)) / (outputs * size) ** 0.5
        for layer, size in enumerate(architecture.sizes[1:-1])
    )


def backward_jacobian(
    circuit: Microcircuit, parameters: Parameters, hyper: Hyperparameters, state: NetworkState
) -> FeedbackWeights:
    """`jacobian_weights`, on the sign-symmetric path those of the weights' signs."""
    symmetric = hyper.rule["feedback"] == SIGN_SYMMETRIC
    backward = {
        name: jnp.where(symmetric, signs(value), value)
        for name, value in parameters.items()
        if name.startswith("kernel") and name != "kernel_0"
    }
    return jacobian_weights(circuit, backward, state)


def tracked(hyper: Hyperparameters, kept: KeptWeights, jacobian: FeedbackWeights) -> KeptWeights:
    """The kept weights after a batch: learnt ones move towards its mean Jacobian."""
    rate = jnp.where(hyper.rule["feedback"] == LEARNT, hyper.rule["feedback_rate"], 0)
    return tuple(
        (1 - rate) * q + rate * jnp.mean(j, axis=0) for q, j in zip(kept, jacobian, strict=True)
    )


def is_kept(hyper: Hyperparameters) -> bool:
    """Whether the path's weights are its own, kept from batch to batch. (Other rules have no
    path.)"""
    return bool(hyper.rule.get("feedback", JACOBIAN) >= RANDOM)


def on_path(
    hyper: Hyperparameters, kept: KeptWeights, jacobian: FeedbackWeights
) -> FeedbackWeights:
    """Q before it is modified. Chosen by value: all paths are one compiled program."""
    own = hyper.rule["feedback"] >= RANDOM
    return tuple(jnp.where(own, q[None], j) for q, j in zip(kept, jacobian, strict=True))


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


def signs(kernel: Float[Array, "pre post"]) -> Float[Array, "pre post"]:
    """The signs of weights, times the mean of their magnitudes: of all matrices that know no more
    of single weights, the one that is nearest to them in least squares."""
    return jnp.sign(kernel) * jnp.mean(jnp.abs(kernel))


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
