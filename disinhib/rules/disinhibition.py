"""Dis-inhibitory control: the rules that read each neuron's error off its interneuron.

They run the network open loop, compute feedback weights there, run it closed loop, and learn by

    delta_l = (v_l - g_EI r_l) phi_E'(u_E,l),   dW_l = mean_b r_{l-1}^T delta_l

where v_l estimates the inhibitory potential from the inhibitory rate: exactly (exact-inv), or by
the tangent of phi_I's inverse at a running mean rate (lin-thresh) or at a fixed rate (taylor).
Published: `src/models/dale/trainer.py`, `src/core/trainer.py`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib import feedback
from disinhib.activations import RATE, tangent_of_inverse
from disinhib.checks import UNIT, Option
from disinhib.feedback import FeedbackWeights, jacobian_weights, modified
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import bind
from disinhib.microcircuit import Microcircuit, microcircuit
from disinhib.network import NetworkState, Parameters
from disinhib.rules import branches
from disinhib.rules.base import Competitor, Family, Rule, RuleState, Update
from disinhib.rules.branches import interneurons, log_uniform
from disinhib.solvers import closed_loop, open_loop

# In `hyper.rule["estimate"]`: how a neuron reads v off the rate of its interneuron.
INVERSE, TANGENT_AT_MEAN, TANGENT_AT_RATE = 0.0, 1.0, 2.0


def _estimates(
    hyper: Hyperparameters, circuit: Microcircuit, means: RuleState, closed: NetworkState
) -> list[Array]:
    """v_l of each hidden layer: phi_I^-1(r_I) = u_I, or its tangent at the mean or the fixed rate.
    Chosen by value, so that all rules are one compiled program."""
    estimate, estimates = hyper.rule["estimate"], []
    for u_i, mean in zip(closed.u_i, means, strict=True):
        rate = jnp.where(estimate == TANGENT_AT_MEAN, mean, hyper.rule["y0"])
        intercept, slope = tangent_of_inverse(circuit.phi_i, rate)
        tangent = intercept + slope * circuit.phi_i.value(u_i)
        estimates.append(jnp.where(estimate == INVERSE, u_i, tangent))
    return estimates


def _updated_means(
    hyper: Hyperparameters, circuit: Microcircuit, means: RuleState, opened: NetworkState
) -> RuleState:
    """The running means over batches of the open-loop r_I `[neurons]`, of each hidden layer."""
    memory = hyper.rule["avg_inh_lambda"]
    return tuple(
        (1 - memory) * mean + memory * jnp.mean(circuit.phi_i.value(u_i), axis=0)
        for mean, u_i in zip(means, opened.u_i, strict=True)
    )


def disinhibitory_control(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """Learns from the difference that feedback makes; `rule_state` has the mean rates."""
    loss = bind(architecture.loss, hyper.loss)
    circuit = microcircuit(architecture, hyper)
    opened = open_loop(architecture, parameters, hyper, x)
    weights, aim = feedback_and_aim(architecture, parameters, hyper, opened.state, target)
    closed = closed_loop(architecture, parameters, hyper, x, aim, weights, opened.state)
    means = _updated_means(hyper, circuit, rule_state, opened.state)
    estimates = _estimates(hyper, circuit, means, closed.state)

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
    return Update(gradients, means, closed)


def feedback_and_aim(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    opened: NetworkState,
    target: Float[Array, "batch out"],
) -> tuple[FeedbackWeights, Float[Array, "batch out"]]:
    """What closes the loop, from the open-loop state: feedback weights, and what the controller
    aims at (the target itself, or with weak feedback a nudge towards it)."""
    circuit = microcircuit(architecture, hyper)
    weights = modified(hyper, jacobian_weights(circuit, parameters, opened))
    loss = bind(architecture.loss, hyper.loss)
    # Chosen by value: strong and weak feedback are one compiled program.
    nudge = loss.nudged_target(opened.u_y, target, hyper.rule["target_nudge"])
    return weights, jnp.where(jnp.asarray(hyper.rule["strong_fb"], bool), target, nudge)


def _initial_mean_rates(
    architecture: Architecture, hyper: Hyperparameters, key: PRNGKeyArray
) -> RuleState:
    return tuple(jnp.full(size, hyper.rule["avg_inh_init"]) for size in architecture.sizes[1:-1])


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


def _linear_threshold_branch(trial):
    return {
        **_common_branch(trial, "lin-thresh"),
        # Weight of the newest batch in the running mean: 1 forgets all others (published).
        **log_uniform(trial, "lin-thresh", "trainer.avg_inh_lambda", 1e-2, 1.0),
    }


_MEAN_OPTIONS = (
    Option("avg_inh_lambda", 1.0, UNIT, "weight of the newest batch in the running mean"),
    Option("avg_inh_init", 0.8, RATE, "the mean before the first batch, dimensionless"),
)
_RATE_OPTIONS = (Option("y0", 1.0, RATE, "where the tangent touches the inverse, dimensionless"),)

DISINHIBITION = Family(
    "disinhibition",
    disinhibitory_control,
    has_feedback=True,
    options=(*feedback.OPTIONS, *_MEAN_OPTIONS, *_RATE_OPTIONS),
    initial_state=_initial_mean_rates,
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
TAYLOR = Rule(
    "taylor",
    DISINHIBITION,
    {"dale": Competitor("the same with that line at a fixed rate", "#009E73")},
    (*feedback.OPTIONS, *_RATE_OPTIONS),
    chosen={"estimate": TANGENT_AT_RATE},
)
