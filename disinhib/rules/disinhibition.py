"""Dis-inhibitory control: the rules that read each neuron's error off its interneuron.

They run the network open loop, compute feedback weights there, run it closed loop, and learn by

    delta_l = (v_l - g_EI r_l) phi_E'(u_E,l),   dW_l = mean_b r_{l-1}^T delta_l

where v_l estimates the inhibitory potential from the inhibitory rate: exactly (exact-inv), or by
the tangent of phi_I's inverse at a running mean rate (lin-thresh) or at a fixed rate (taylor).
Published: `src/models/dale/trainer.py`, `src/core/trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib import feedback
from disinhib.activations import RATE, tangent_of_inverse
from disinhib.checks import UNIT, Option
from disinhib.feedback import FeedbackWeights, jacobian_weights, modified
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import bind
from disinhib.microcircuit import microcircuit
from disinhib.network import NetworkState, Parameters
from disinhib.rules import branches
from disinhib.rules.base import Competitor, Rule, RuleState, Update
from disinhib.rules.branches import interneurons, log_uniform
from disinhib.solvers import closed_loop, open_loop

Estimate = Callable[..., tuple[list[Array], RuleState]]


def _exact_inverse(architecture, hyper, circuit, rule_state, opened, closed):
    """v = phi_I^-1(r_I) = u_I."""
    return closed.u_i, rule_state


def _linear_threshold(architecture, hyper, circuit, rule_state, opened, closed):
    """Tangent at a running mean over batches of the open-loop r_I, updated before its use."""
    memory = hyper.rule["avg_inh_lambda"]
    y0 = tuple(
        (1 - memory) * old + memory * jnp.mean(circuit.phi_i.value(u_i), axis=0)
        for old, u_i in zip(rule_state, opened.u_i, strict=True)
    )
    return _tangents(circuit, closed, y0), y0


def _taylor(architecture, hyper, circuit, rule_state, opened, closed):
    """Tangent at the fixed rate y0."""
    y0 = [jnp.full(u_i.shape[-1:], hyper.rule["y0"], u_i.dtype) for u_i in closed.u_i]
    return _tangents(circuit, closed, y0), rule_state


def _tangents(circuit, closed: NetworkState, y0):
    estimates = []
    for u_i, rate in zip(closed.u_i, y0, strict=True):
        intercept, slope = tangent_of_inverse(circuit.phi_i, rate)
        estimates.append(intercept + slope * circuit.phi_i.value(u_i))
    return estimates


def disinhibitory_control(
    estimate: Estimate,
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """A feedback rule; `estimate` gives v_l of each hidden layer and the next rule state."""
    loss = bind(architecture.loss, hyper.loss)
    circuit = microcircuit(architecture, hyper)
    opened = open_loop(architecture, parameters, hyper, x)
    weights, aim = feedback_and_aim(architecture, parameters, hyper, opened.state, target)
    closed = closed_loop(architecture, parameters, hyper, x, aim, weights, opened.state)
    estimates, rule_state = estimate(
        architecture, hyper, circuit, rule_state, opened.state, closed.state
    )

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
    return Update(gradients, rule_state, closed)


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
    weights = modified(architecture, hyper, jacobian_weights(circuit, parameters, opened))
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


EXACT_INVERSE = Rule(
    "exact-inv",
    partial(disinhibitory_control, _exact_inverse),
    {
        "dale": Competitor(
            "dis-inhibitory control, by which each excitatory neuron of a microcircuit learns from"
            " how far top-down feedback has moved its interneuron",
            "#0072B2",
            _exact_inverse_branch,
        )
    },
    has_feedback=True,
    options=feedback.OPTIONS,
)
LINEAR_THRESHOLD = Rule(
    "lin-thresh",
    partial(disinhibitory_control, _linear_threshold),
    {
        "dale": Competitor(
            "the same where a neuron knows its interneuron's activation only as a straight line at"
            " its mean rate",
            "#D55E00",
            _linear_threshold_branch,
        )
    },
    has_feedback=True,
    options=(
        *feedback.OPTIONS,
        Option("avg_inh_lambda", 1.0, UNIT, "weight of the newest batch in the running mean"),
        Option("avg_inh_init", 0.8, RATE, "the mean before the first batch, dimensionless"),
    ),
    initial_state=_initial_mean_rates,
)
TAYLOR = Rule(
    "taylor",
    partial(disinhibitory_control, _taylor),
    {"dale": Competitor("the same with that line at a fixed rate", "#009E73")},
    has_feedback=True,
    options=(
        *feedback.OPTIONS,
        Option("y0", 1.0, RATE, "where the tangent touches the inverse, dimensionless"),
    ),
)
