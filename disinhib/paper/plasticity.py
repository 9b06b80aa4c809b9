"""One E-I microcircuit as a plasticity experiment: how a weight changes with the neuron's rate.

    du_E = -u_E - w_IE phi_I(u_I) + w_XE x
    du_I = -u_I + w_EI phi_E(u_E) + w_XI x - alpha (target - phi_E(u_E))

Without a target (feedback ablated) the last term is absent. The input weight changes by

    dw = x (w_EI r_E - v) phi_E'(u_E)

where v is phi_I^-1(r_I) (exact) or theta + delta r_I (linear). All dimensionless, time in units of
the neurons' time constant. Paper, Fig. 3 and Supplementary Fig. S2; published
`notebooks/Figure 3.ipynb`.

The equilibrium is found on two roads, the published one (Euler steps from rest) and Newton's: the
feedback's share in u_I is a larger gain and a constant, so the circuit is one of microcircuit.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.activations import Activation, bind
from disinhib.hyperparameters import Hyperparameters, Scalar
from disinhib.microcircuit import Microcircuit, inhibitory_potential
from disinhib.solvers.newton import settle
from disinhib.solvers.ode import layer_velocity

STEP, STEPS = 1 / 50, 600  # of the published integration: in time constants, number
UNIT_TIME = Hyperparameters(tau_e=1.0, tau_i=1.0)
# Of Newton's method: steps at most, the residual that ends it (float32 stays above it, and takes
# all steps), and the largest that counts as solved.
NEWTON_STEPS, TOLERANCE, SOLVED = 120, 1e-10, 1e-5

Points = Float[Array, " points"]  # an experiment's inputs, or what belongs to each of them
Inverse = Callable[[Points], Points]  # of r_I: an estimate of u_I


class Circuit(NamedTuple):
    """One microcircuit, its input and its feedback; defaults are the figure's."""

    phi_e: Activation = bind("softrelu", {"shift": 3.0})
    phi_i: Activation = bind("softrelu", {"shift": 3.0})
    w_ie: float = 1.0
    w_ei: float = 1.0
    w_xe: float = 1.0
    w_xi: float = 0.0
    alpha: float = 5.0  # of the feedback


PUBLISHED = Circuit()


class State(NamedTuple):
    """Potentials."""

    u_e: Points
    u_i: Points


def exact(circuit: Circuit) -> Inverse:
    """phi_I^-1."""
    return circuit.phi_i.inverse


def linear(theta: float, delta: float) -> Inverse:
    """The line theta + delta r_I in its place."""
    return lambda r_i: theta + delta * r_i


@partial(jax.jit, static_argnums=(0, 3))
def euler(circuit: Circuit, x: Points, target: Scalar | None, steps: int = STEPS) -> State:
    """The state after the published integration from rest."""
    alone = Microcircuit(circuit.phi_e, circuit.phi_i, circuit.w_ei, circuit.w_ie)

    def step(state: State, _):
        feedback = 0.0
        if target is not None:
            feedback = circuit.alpha * (target - circuit.phi_e.value(state.u_e))
        s = feedback - circuit.w_xi * x
        du_e, du_i = layer_velocity(alone, UNIT_TIME, *state, circuit.w_xe * x, s)
        return State(state.u_e + STEP * du_e, state.u_i + STEP * du_i), None

    return jax.lax.scan(step, State(jnp.zeros_like(x), jnp.zeros_like(x)), length=steps)[0]


@partial(jax.jit, static_argnums=0)
def equilibrium(circuit: Circuit, x: Points, target: Scalar | None) -> State:
    """The steady state by Newton's method; every point is solved for itself."""
    gain, constant = circuit.w_ei, 0.0
    if target is not None:
        gain, constant = circuit.w_ei + circuit.alpha, circuit.alpha * target
    closed = Microcircuit(circuit.phi_e, circuit.phi_i, gain, circuit.w_ie)
    return solved(closed, circuit.w_xe * x, constant - circuit.w_xi * x)


def solved(circuit: Microcircuit, a: Points, s: Points) -> State:
    """Equilibrium of separate microcircuits for the inputs `a` and dis-inhibitions `s`; NaN, and so
    a gap in the curve, where Newton's method has not found it."""
    column = lambda values: values[:, None]  # of a batch with one neuron each
    unknown = jnp.full_like(a, jnp.inf)
    (found,), residual, _ = settle(
        *(circuit, {}, column(a), (column(jnp.zeros_like(a)),), (column(s),)),
        *(unknown, TOLERANCE, NEWTON_STEPS),
    )
    u_e = jnp.where(residual <= SOLVED, found[:, 0], jnp.nan)
    return State(u_e, inhibitory_potential(circuit, u_e, s))


def weight_change(circuit: Circuit, inverse: Inverse, x: Points, u_e: Points, r_i) -> Points:
    """dw for inputs `x`, where the neuron is at `u_e` and its interneuron's rate is `r_i`."""
    r_e = circuit.phi_e.value(u_e)
    return x * (circuit.w_ei * r_e - inverse(r_i)) * circuit.phi_e.derivative(u_e)


class Curve(NamedTuple):
    """A curve of a figure: the neuron's rate, and what the weight changes by at it."""

    x: Points
    rate: Points
    change: Points


def with_feedback(
    inverse: Inverse,
    x: Points,
    target: float | None,
    circuit: Circuit = PUBLISHED,
    road: Callable[..., State] = equilibrium,
) -> Curve:
    """The experiment with the feedback that `target` gives, or without it (None): input varies."""
    state = road(circuit, x, target)
    r_i = circuit.phi_i.value(state.u_i)
    change = weight_change(circuit, inverse, x, state.u_e, r_i)
    return Curve(x, circuit.phi_e.value(state.u_e), change)


def clamped(inverse: Inverse, x: Points, r_i: float, circuit: Circuit = PUBLISHED) -> Curve:
    """The experiment with an isolated neuron, u_E = x, its inhibition clamped at the rate `r_i`."""
    change = weight_change(circuit, inverse, x, x, r_i)
    return Curve(x, circuit.phi_e.value(x), change)
