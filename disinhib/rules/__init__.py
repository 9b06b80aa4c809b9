"""Learning rules: from a batch to gradients that an optimizer descends (DESIGN section 2).

Every rule has one signature,

    rule(architecture, parameters, rule_state, hyper, x, target) -> Update

and one entry in RULES. The feedback rules run the network open loop, compute feedback weights
there, run it closed loop, and read each neuron's error off its interneuron:

    delta_l = (v_l - g_EI r_l) phi_E'(u_E,l),   dW_l = mean_b r_{l-1}^T delta_l

where v_l estimates the inhibitory potential from the inhibitory rate: exactly (exact-inv), or by
the tangent of phi_I's inverse at a running mean rate (lin-thresh) or at a fixed rate (taylor).
Published: `src/models/dale/trainer.py`, `src/core/trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.activations import tangent_of_inverse
from disinhib.feedback import FeedbackWeights, jacobian_weights, modified
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import LOSSES
from disinhib.microcircuit import microcircuit
from disinhib.network import NetworkState, Parameters, implicit_output, mlp_forward
from disinhib.solvers import Solution, closed_loop, open_loop

RuleState = tuple[Float[Array, " _neurons"], ...]


class Update(NamedTuple):
    """What one batch brings: `gradients` like the parameters, the rule's next state, and the
    solution that the training metrics describe (closed loop; for bp the open loop)."""

    gradients: Parameters
    rule_state: RuleState
    solution: Solution


class Rule(NamedTuple):
    """`update` as above; `circuits` are those it can train; `has_feedback`: runs closed loop;
    `initial_state(architecture, hyper)` is what it remembers between batches."""

    update: Callable[..., Update]
    circuits: tuple[str, ...]
    has_feedback: bool
    initial_state: Callable[[Architecture, Hyperparameters], RuleState] = lambda *_: ()


def backpropagation(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """Gradient of the mean open-loop loss: through the MLP, or (beyond the published code)
    through the E-I network's own steady state by implicit differentiation."""
    loss = LOSSES[architecture.loss].value
    circuit = microcircuit(architecture, hyper)

    solution = open_loop(architecture, parameters, hyper, x)
    if architecture.circuit == "dale":
        output = lambda p: implicit_output(circuit, p, x, solution.state.u_e)
    else:
        output = lambda p: mlp_forward(architecture, p, hyper, x).u_y
    gradients = jax.grad(lambda p: jnp.mean(loss(output(p), target)))(parameters)
    return Update(gradients, rule_state, solution)


Estimate = Callable[..., tuple[list[Array], RuleState]]


def _exact_inverse(architecture, hyper, circuit, rule_state, opened, closed):
    """v = phi_I^-1(r_I) = u_I."""
    return closed.u_i, rule_state


def _linear_threshold(architecture, hyper, circuit, rule_state, opened, closed):
    """Tangent at a running mean over batches of the open-loop r_I, updated before its use."""
    memory = hyper.avg_inh_lambda
    y0 = tuple(
        (1 - memory) * old + memory * jnp.mean(circuit.phi_i.value(u_i), axis=0)
        for old, u_i in zip(rule_state, opened.u_i, strict=True)
    )
    return _tangents(circuit, closed, y0), y0


def _taylor(architecture, hyper, circuit, rule_state, opened, closed):
    """Tangent at the fixed rate y0."""
    y0 = [jnp.full(u_i.shape[-1:], hyper.y0, u_i.dtype) for u_i in closed.u_i]
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
    loss = LOSSES[architecture.loss]
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
    # Chosen by value: strong and weak feedback are one compiled program.
    nudge = LOSSES[architecture.loss].nudged_target(opened.u_y, target, hyper.target_nudge)
    return weights, jnp.where(jnp.asarray(hyper.strong_fb, bool), target, nudge)


def _initial_mean_rates(architecture: Architecture, hyper: Hyperparameters) -> RuleState:
    return tuple(jnp.full(size, hyper.avg_inh_init) for size in architecture.sizes[1:-1])


RULES: dict[str, Rule] = {
    "bp": Rule(backpropagation, ("non-dale", "dale"), has_feedback=False),
    "exact-inv": Rule(partial(disinhibitory_control, _exact_inverse), ("dale",), has_feedback=True),
    "lin-thresh": Rule(
        partial(disinhibitory_control, _linear_threshold),
        ("dale",),
        has_feedback=True,
        initial_state=_initial_mean_rates,
    ),
    "taylor": Rule(partial(disinhibitory_control, _taylor), ("dale",), has_feedback=True),
}
