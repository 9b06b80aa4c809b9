"""The two roads to the steady state behind one pair of functions.

`architecture.solver` says which: `Newton` solves the equilibrium equations (newton.py),
`Ode` integrates the dynamics (ode.py). A plain MLP needs neither.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.feedback import FeedbackWeights
from disinhib.hyperparameters import Architecture, Hyperparameters, Newton
from disinhib.network import NetworkState, Parameters, mlp_forward
from disinhib.solvers import newton, ode
from disinhib.solvers.newton import Solution


def open_loop(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
) -> Solution:
    """The state without target: what the network answers to `x`."""
    if architecture.circuit == "non-dale":
        state = mlp_forward(architecture, parameters, hyper, x)
        nothing = jnp.zeros(len(x), x.dtype)
        return Solution(state, jnp.zeros_like(state.u_y), nothing, nothing, nothing == 0)
    if isinstance(architecture.solver, Newton):
        return newton.open_loop(architecture, parameters, hyper, x)
    rest = ode.resting_state(architecture, len(x))
    return ode.steady_state(architecture, parameters, hyper, x, None, rest)


def closed_loop(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
    weights: FeedbackWeights,
    start: NetworkState,
) -> Solution:
    """The state under control towards `target`, started from the open-loop state `start`."""
    if isinstance(architecture.solver, Newton):
        return newton.closed_loop(architecture, parameters, hyper, x, target, weights, start)
    control = ode.Control(target, weights)
    begin = ode.DynamicState(start, jnp.zeros_like(start.u_y))
    return ode.steady_state(architecture, parameters, hyper, x, control, begin)
