"""Back-propagation: the bar that the local rules are measured against.

Through the plain MLP, or (beyond the published code) through the E-I network's own open-loop steady
state by implicit differentiation: the same network as the local rules train, with the exact
gradient instead of theirs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import bind
from disinhib.microcircuit import microcircuit
from disinhib.network import Parameters, implicit_output, mlp_forward
from disinhib.rules.base import Competitor, Family, Rule, RuleState, Update
from disinhib.rules.branches import interneurons, log_uniform
from disinhib.solvers import open_loop


def backpropagation(
    architecture: Architecture,
    parameters: Parameters,
    rule_state: RuleState,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
) -> Update:
    """Gradient of the mean open-loop loss."""
    loss = bind(architecture.loss, hyper.loss).value
    solution = open_loop(architecture, parameters, hyper, x)
    if architecture.circuit == "dale":
        circuit = microcircuit(architecture, hyper)
        output = lambda p: implicit_output(circuit, p, x, solution.state.u_e)
    else:
        output = lambda p: mlp_forward(architecture, p, hyper, x).u_y
    gradients = jax.grad(lambda p: jnp.mean(loss(output(p), target)))(parameters)
    return Update(gradients, rule_state, solution)


def _plain(trial):
    return {
        "model/vf": "non-dale",
        "trainer": "bp",
        **log_uniform(trial, "bp", "optimizer.learning_rate", 1e-4, 1e-2),
    }


def _on_microcircuits(trial):
    return {
        "model/vf": "dale",
        "trainer": "bp",
        **log_uniform(trial, "bp-ei", "optimizer.learning_rate", 1e-4, 1e-2),
        **interneurons(trial, "bp-ei"),
    }


BP = Rule(
    "bp",
    Family("bp", backpropagation),
    {
        "non-dale": Competitor(
            "back-propagation through a plain network, which the others are compared with",
            "#000000",
            _plain,
        ),
        "dale": Competitor(
            "back-propagation through the network of excitatory-inhibitory microcircuits",
            "#CC79A7",
            _on_microcircuits,
            name="bp-ei",
        ),
    },
)
