"""Back-propagation without the forward weights: plain networks whose errors come back on others.

Errors go from layer to layer as in back-propagation, delta_l = (delta_{l+1} B_{l+1}^T) phi'(u_l),
and dW_l = r_{l-1}^T delta_l. The rules differ in B_{l+1}, which has the shape of W_{l+1}:

    fa              fixed and random (Lillicrap et al. 2016, feedback alignment)
    dfa             the same from the output straight to every layer: delta_l = (e B_l^T) phi'(u_l)
                    (Nøkland 2016, direct feedback alignment)
    sign-symmetric  sign(W_{l+1}) (Liao et al. 2016; Xiao et al. 2019), times the mean of |W_{l+1}|:
                    single weights lend it their signs alone, the layer its magnitude, without which
                    errors would grow from layer to layer where no normalisation holds them
    kolen-pollack   learnt: W and B change alike and decay alike (Kolen & Pollack 1994; Akrout et
                    al. 2019), so that B - W shrinks by the decay's share with each batch, exactly

Random weights are drawn as the network's own initial kernels, times `feedback_scale`.

Kolen-Pollack adds the optimizer's step of W to B. Both synapses could compute it: their gradients
are equal (one is the other's transpose), the optimizers work on each weight alone, and so two of
them that began alike go on alike, momentum and second moments included. The decay must not pass
through the optimizer for that: Adam would divide W's and B's, which differ, by different moments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib import activations, losses
from disinhib.checks import DECAY, POSITIVE, Option
from disinhib.feedback import signs
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.network import Parameters, initial_parameters
from disinhib.rules.base import Branch, Competitor, Family, Rule, RuleState, Update
from disinhib.rules.branches import log_uniform
from disinhib.solvers import open_loop

# In `hyper.rule["path"]`: what errors come back on.
RANDOM, DIRECT, SIGNS, LEARNT = 0.0, 1.0, 2.0, 3.0


class FeedbackKernels(NamedTuple):
    """B: `layered` by the names of the kernels in whose place they are, `[pre, post]`; `direct`
    from the output to each hidden layer, `[neurons, out]`. A rule uses one of the two; that all
    have both makes them one compiled program."""

    layered: dict[str, Float[Array, "_pre _post"]]
    direct: tuple[Float[Array, "_neurons out"], ...]


def _initial_kernels(
    architecture: Architecture, hyper: Hyperparameters, key: PRNGKeyArray
) -> FeedbackKernels:
    layered, direct = jax.random.split(key)
    scale = hyper.rule["feedback_scale"]
    kernels = initial_parameters(architecture, scale, layered)
    draw = jax.nn.initializers.lecun_normal()
    return FeedbackKernels(
        {name: kernels[name] for name in _names(architecture)[1:]},
        tuple(
            scale * draw(jax.random.fold_in(direct, layer), (size, architecture.sizes[-1]))
            for layer, size in enumerate(architecture.sizes[1:-1])
        ),
    )


def _names(architecture: Architecture) -> list[str]:
    """Of the kernels, from the inputs to the outputs."""
    return [*(f"kernel_{layer}" for layer in range(architecture.hidden_layers)), "kernel_out"]


def feedback_alignment(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """Gradient of the mean loss with B in the place of W; `rule_state` are FeedbackKernels."""
    loss = losses.bind(architecture.loss, hyper.loss)
    phi = activations.bind(architecture.activation_e, hyper.activation_e)
    path, names = hyper.rule["path"], _names(architecture)
    solution = open_loop(architecture, parameters, hyper, x)
    rates = [x, *(phi.value(u) for u in solution.state.u_e)]
    error = -loss.error(solution.state.u_y, target) / len(x)

    delta, gradients = error, {"kernel_out": rates[-1].T @ error}
    for layer in reversed(range(architecture.hidden_layers)):
        above = names[layer + 1]
        kernel = jnp.where(path == SIGNS, signs(parameters[above]), rule_state.layered[above])
        direct = error @ rule_state.direct[layer].T
        delta = jnp.where(path == DIRECT, direct, delta @ kernel.T)
        delta = delta * phi.derivative(solution.state.u_e[layer])
        gradients[names[layer]] = rates[layer].T @ delta
        if architecture.use_bias:
            gradients[f"bias_{layer}"] = jnp.sum(delta, axis=0)
    return Update(gradients, rule_state, solution)


def _changed_alike(
    hyper: Hyperparameters, parameters: Parameters, changes: Parameters, rule_state: RuleState
) -> tuple[Parameters, RuleState]:
    """The optimizer's `changes`, which with Kolen-Pollack are B's too; both W and B decay then."""
    learns = jnp.where(hyper.rule["path"] == LEARNT, 1.0, 0.0)
    kept = 1 - learns * hyper.rule["feedback_decay"]
    own = rule_state.layered
    parameters = {
        name: (kept * value if name in own else value) + changes[name]
        for name, value in parameters.items()
    }
    layered = {name: kept * value + learns * changes[name] for name, value in own.items()}
    return parameters, rule_state._replace(layered=layered)


_SCALE = Option("feedback_scale", 1.0, POSITIVE, "multiplies the random feedback weights")
_DECAY = Option("feedback_decay", 1e-4, DECAY, "share of W and B that each batch takes away")

FEEDBACK_ALIGNMENT = Family(
    "feedback-alignment",
    feedback_alignment,
    options=(_SCALE, _DECAY),
    initial_state=_initial_kernels,
    step=_changed_alike,
)


def _common_branch(trial, name):
    # Not the scale of fixed weights: it only scales a layer's gradients, and Adam takes that out.
    return {
        "model/vf": "non-dale",
        "trainer": name,
        **log_uniform(trial, name, "optimizer.learning_rate", 1e-4, 1e-2),
    }


def _kolen_pollack_branch(trial):
    return {
        **_common_branch(trial, "kolen-pollack"),
        # Learnt weights have a scale of their own, beside which the initial ones matter or not.
        **log_uniform(trial, "kolen-pollack", "trainer.feedback_scale", 0.1, 10.0),
        **log_uniform(trial, "kolen-pollack", "trainer.feedback_decay", 1e-6, 1e-3),
    }


def _rule(
    name: str,
    path: float,
    words: str,
    colour: str,
    branch: Branch | None = None,
    options: tuple[Option, ...] = (),
) -> Rule:
    branch = branch or (lambda trial: _common_branch(trial, name))
    circuits = {"non-dale": Competitor(words, colour, branch)}
    return Rule(name, FEEDBACK_ALIGNMENT, circuits, options, chosen={"path": path})


FA = _rule(
    "fa",
    RANDOM,
    "feedback alignment: back-propagation whose errors come back on fixed random weights",
    "#E69F00",
    options=(_SCALE,),
)
DFA = _rule(
    "dfa",
    DIRECT,
    "direct feedback alignment: the same from the output straight to every layer",
    "#56B4E9",
    options=(_SCALE,),
)
SIGN_SYMMETRIC = _rule(
    "sign-symmetric",
    SIGNS,
    "back-propagation whose errors come back on the signs of the forward weights",
    "#882255",
)
KOLEN_POLLACK = _rule(
    "kolen-pollack",
    LEARNT,
    "the same on weights that change and decay as the forward weights do (Kolen-Pollack)",
    "#DDCC77",
    _kolen_pollack_branch,
    (_SCALE, _DECAY),
)
