"""Dis-inhibitory control: the rules that read each neuron's error off its interneuron.

They run the network open loop, compute feedback weights there, run it closed loop, and learn by

    delta_l = (v_l - g_EI r_l) phi_E'(u_E,l),   dW_l = mean_b r_{l-1}^T delta_l

where v_l estimates the inhibitory potential from the inhibitory rate: exactly (exact-inv), or by
the tangent of phi_I's inverse at a running mean rate (lin-thresh) or at a fixed rate (taylor).
Published: `src/models/dale/trainer.py`, `src/core/trainer.py`.

lin-contrast is ours: it uses lin-thresh's tangent for the change between the two loops only, so
that a neuron without feedback has no error (in open loop u_I = g_EI r_E, and the estimate is that).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib import feedback
from disinhib.activations import RATE, tangent_of_inverse
from disinhib.checks import UNIT, Option
from disinhib.feedback import FeedbackWeights, KeptWeights, modified
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import bind
from disinhib.microcircuit import Microcircuit, microcircuit
from disinhib.network import NetworkState, Parameters
from disinhib.rules import branches
from disinhib.rules.base import Competitor, Family, Rule, RuleState, Update
from disinhib.rules.branches import interneurons, log_uniform
from disinhib.solvers import closed_loop, open_loop

# In `hyper.rule["estimate"]`: how a neuron reads v off the rate of its interneuron.
INVERSE, TANGENT_AT_MEAN, TANGENT_AT_RATE, TANGENT_OF_CHANGE = 0.0, 1.0, 2.0, 3.0


class Memory(NamedTuple):
    """Of each hidden layer: the running mean over batches of the open-loop r_I, and the feedback
    weights of the paths that keep them."""

    means: tuple[Float[Array, " _neurons"], ...]
    feedback: KeptWeights


def _estimates(
    hyper: Hyperparameters,
    circuit: Microcircuit,
    memory: Memory,
    opened: NetworkState,
    closed: NetworkState,
) -> list[Array]:
    """v_l of each hidden layer: phi_I^-1(r_I) = u_I; its tangent at the mean or the fixed rate; or
    u_I in open loop, and by that tangent what has changed since. Chosen by value, so that all rules
    are one compiled program."""
    estimate, estimates = hyper.rule["estimate"], []
    for before, u_i, mean in zip(opened.u_i, closed.u_i, memory.means, strict=True):
        rate = jnp.where(estimate == TANGENT_AT_RATE, hyper.rule["y0"], mean)
        intercept, slope = tangent_of_inverse(circuit.phi_i, rate)
        r_i = circuit.phi_i.value(u_i)
        tangent = intercept + slope * r_i
        changed = before + slope * (r_i - circuit.phi_i.value(before))
        linear = jnp.where(estimate == TANGENT_OF_CHANGE, changed, tangent)
        estimates.append(jnp.where(estimate == INVERSE, u_i, linear))
    return estimates


def _updated(
    hyper: Hyperparameters,
    circuit: Microcircuit,
    memory: Memory,
    opened: NetworkState,
    jacobian: FeedbackWeights,
) -> Memory:
    """The memory after a batch, by which that batch is learnt already."""
    newest = hyper.rule["avg_inh_lambda"]
    means = tuple(
        (1 - newest) * mean + newest * jnp.mean(circuit.phi_i.value(u_i), axis=0)
        for mean, u_i in zip(memory.means, opened.u_i, strict=True)
    )
    return Memory(means, feedback.tracked(hyper, memory.feedback, jacobian))


def disinhibitory_control(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """Learns from the difference that feedback makes; `rule_state` is a Memory."""
    loss = bind(architecture.loss, hyper.loss)
    circuit = microcircuit(architecture, hyper)
    opened = open_loop(architecture, parameters, hyper, x)
    jacobian = feedback.backward_jacobian(circuit, parameters, hyper, opened.state)
    memory = _updated(hyper, circuit, rule_state, opened.state, jacobian)
    weights = modified(hyper, feedback.on_path(hyper, memory.feedback, jacobian))
    aim = _aim(architecture, hyper, opened.state, target)
    closed = closed_loop(architecture, parameters, hyper, x, aim, weights, opened.state)
    estimates = _estimates(hyper, circuit, memory, opened.state, closed.state)

    gradients, rate = {}, x
    for layer, (v, u_e) in enumerate(zip(estimates, closed.state.u_e, strict=True)):
        next_rate = circuit.phi_e.value(u_e)
        delta = (v - circuit.g_ei * next_rate) * circuit.phi_e.derivative(u_e) / len(x)
        gradients[f"kernel_{layer}"] = rate.T @ delta
        if architecture.use_bias:
            gradients[f"bias_{layer}"] = jnp.sum(delta, axis=0)
        rate = next_rate
    if architecture.fb_to_readout:
        delta = rate @ parameters["kernel_out"] - closed.state.u_y
    else:
        delta = -loss.error(opened.state.u_y, target)
    gradients["kernel_out"] = rate.T @ (delta / len(x))
    return Update(gradients, memory, closed)


def feedback_and_aim(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    opened: NetworkState,
    target: Float[Array, "batch out"],
) -> tuple[FeedbackWeights, Float[Array, "batch out"]]:
    """What closes the loop, from the open-loop state: feedback weights (those that are kept as
    they are in the Memory `rule_state`), and what the controller aims at."""
    circuit = microcircuit(architecture, hyper)
    jacobian = feedback.backward_jacobian(circuit, parameters, hyper, opened)
    weights = modified(hyper, feedback.on_path(hyper, rule_state.feedback, jacobian))
    return weights, _aim(architecture, hyper, opened, target)


def _aim(
    architecture: Architecture,
    hyper: Hyperparameters,
    opened: NetworkState,
    target: Float[Array, "batch out"],
) -> Float[Array, "batch out"]:
    """The target itself, or with weak feedback a nudge towards it."""
    loss = bind(architecture.loss, hyper.loss)
    # Chosen by value: strong and weak feedback are one compiled program.
    nudge = loss.nudged_target(opened.u_y, target, hyper.rule["target_nudge"])
    return jnp.where(jnp.asarray(hyper.rule["strong_fb"], bool), target, nudge)


def _initial_memory(
    architecture: Architecture, hyper: Hyperparameters, key: PRNGKeyArray
) -> Memory:
    start, hidden = hyper.rule["avg_inh_init"], architecture.sizes[1:-1]
    means = tuple(jnp.full(size, start) for size in hidden)
    return Memory(means, feedback.initial_weights(architecture, key))


def _common_branch(trial, name):
    return {
        "model/vf": "dale",
        "trainer": name,
        **log_uniform(trial, name, "optimizer.learning_rate", 1e-4, 1e-2),
        **interneurons(trial, name),
        **branches.feedback(trial, name),
    }


def _exact_inverse_branch(trial):
    return _common_branch(trial, "exact-inv")


def _tangent_at_mean_branch(trial, name):
    return {
        **_common_branch(trial, name),
        # Weight of the newest batch in the running mean: 1 forgets all others (published).
        **log_uniform(trial, name, "trainer.avg_inh_lambda", 1e-2, 1.0),
    }


def _linear_threshold_branch(trial):
    return _tangent_at_mean_branch(trial, "lin-thresh")


def _linear_contrast_branch(trial):
    return _tangent_at_mean_branch(trial, "lin-contrast")


def _taylor_branch(trial):
    return {
        **_common_branch(trial, "taylor"),
        **log_uniform(trial, "taylor", "trainer.y0", 0.2, 5.0),
    }


_MEAN_OPTIONS = (
    Option("avg_inh_lambda", 1.0, UNIT, "weight of the newest batch in the running mean"),
    Option("avg_inh_init", 0.8, RATE, "the mean before the first batch, dimensionless"),
)
_RATE_OPTIONS = (Option("y0", 1.0, RATE, "where the tangent touches the inverse, dimensionless"),)

DISINHIBITION = Family(
    "disinhibition",
    disinhibitory_control,
    feedback_and_aim,
    options=(*feedback.OPTIONS, *_MEAN_OPTIONS, *_RATE_OPTIONS),
    initial_state=_initial_memory,
)
EXACT_INVERSE = Rule(
    "exact-inv",
    DISINHIBITION,
    {
        "dale": Competitor(
            "dis-inhibitory control, by which each excitatory neuron of a microcircuit learns from"
            " how far top-down feedback has moved its interneuron",
            "#0072B2",
            _exact_inverse_branch,
        )
    },
    feedback.OPTIONS,
    chosen={"estimate": INVERSE},
)
LINEAR_THRESHOLD = Rule(
    "lin-thresh",
    DISINHIBITION,
    {
        "dale": Competitor(
            "the same where a neuron knows its interneuron's activation only as a straight line at"
            " its mean rate",
            "#D55E00",
            _linear_threshold_branch,
        )
    },
    (*feedback.OPTIONS, *_MEAN_OPTIONS),
    chosen={"estimate": TANGENT_AT_MEAN},
)
LINEAR_CONTRAST = Rule(
    "lin-contrast",
    DISINHIBITION,
    {
        "dale": Competitor(
            "the same where that straight line reads only how far the interneuron's activation"
            " changes as feedback comes in",
            "#661100",
            _linear_contrast_branch,
        )
    },
    (*feedback.OPTIONS, *_MEAN_OPTIONS),
    chosen={"estimate": TANGENT_OF_CHANGE},
)
TAYLOR = Rule(
    "taylor",
    DISINHIBITION,
    {"dale": Competitor("the same with that line at a fixed rate", "#009E73", _taylor_branch)},
    (*feedback.OPTIONS, *_RATE_OPTIONS),
    chosen={"estimate": TANGENT_AT_RATE},
)
