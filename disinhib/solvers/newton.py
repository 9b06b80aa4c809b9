"""The Newton road to the steady state (DESIGN section 3).

Open loop: a few scalar Newton steps a neuron, layer by layer, in one forward pass.
Closed loop: given the control c, the network is again one forward pass, so all that is unknown
is c (as many numbers a sample as there are outputs): the root of

    F(c) = K e(y(c)) - c,        K the controller's equilibrium gain.

Broyden's method finds it from an analytic first Jacobian; every evaluation starts from the last
potentials. Where it has not converged after `BROYDEN_EVALUATIONS`, Newton's method with the exact
Jacobian goes on up to the solver's cap. Nothing raises: residual, evaluations and convergence of
every sample come back as data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from disinhib.controller import CONTROLLERS
from disinhib.feedback import FeedbackWeights, disinhibition
from disinhib.hyperparameters import Architecture, Hyperparameters, Newton
from disinhib.losses import Loss, bind
from disinhib.microcircuit import (
    Microcircuit,
    imbalance,
    inhibitory_potential,
    microcircuit,
    relax,
    search_from,
)
from disinhib.network import NetworkState, Parameters, feedforward_input

BROYDEN_EVALUATIONS = 12
NEAR = (
    1e-2  # residual from which Newton's steps on the neurons can be left to converge by themselves
)


class Solution(NamedTuple):
    """A steady state and how well it was reached; the last three are per sample `[batch]`.

    `residual` is the largest, over layers and controller, of |equilibrium error| / (1 + |value|)
    in Euclidean norms. `iterations` counts evaluations of the network in closed loop (Newton; in
    open loop rounds of two steps on the neurons, the same for all samples) or integration steps.
    """

    state: NetworkState
    control: Float[Array, "batch out"]
    iterations: Float[Array, " batch"]
    residual: Float[Array, " batch"]
    converged: Bool[Array, " batch"]


def open_loop(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
) -> Solution:
    """Steady state without target: c = 0, s = 0."""
    solver = architecture.solver
    assert isinstance(solver, Newton)
    circuit = microcircuit(architecture, hyper)
    potentials, rate = [], x
    residual, rounds = jnp.zeros(len(x), x.dtype), 0
    for layer in range(architecture.hidden_layers):
        a = feedforward_input(parameters, layer, rate)
        # Newton's first step from u = 0 is the same line for every neuron.
        zero = jnp.zeros((), a.dtype)
        f_0, slope_0 = imbalance(circuit, zero, zero, 0.0)
        u_e, layer_residual, layer_rounds = settle(
            circuit, (a - f_0) / slope_0, a, 0.0, 2, solver.tolerance, solver.max_iterations
        )
        potentials.append(u_e)
        rate = circuit.phi_e.value(u_e)
        residual = jnp.maximum(residual, layer_residual)
        rounds = jnp.maximum(rounds, layer_rounds)
    u_y = rate @ parameters["kernel_out"]
    state = NetworkState(
        tuple(potentials), tuple(inhibitory_potential(circuit, u, 0.0) for u in potentials), u_y
    )
    return Solution(
        state,
        jnp.zeros_like(u_y),
        jnp.broadcast_to(jnp.asarray(rounds, x.dtype), residual.shape),
        residual,
        residual <= solver.tolerance,
    )


def settle(
    circuit: Microcircuit, start: Array, a: Array, s: Array | float, steps: int, goal, cap: int
) -> tuple[Array, Array, Array]:
    """(u_E, residual of each sample, rounds of `steps`) of one layer for the input `a` and the
    dis-inhibition `s` `[batch, neurons]`: rounds until every residual is below `goal`, at most
    `cap`."""

    def one_round(carry):
        search, _, rounds = carry
        search = relax(circuit, search, a, s, steps)
        return search, _neuron_residual(circuit, search.u_e, a, s), rounds + 1

    def unsettled(carry):
        _, residual, rounds = carry
        return jnp.any(residual > goal) & (rounds < cap)

    first = one_round((search_from(start), None, jnp.zeros((), int)))
    search, residual, rounds = jax.lax.while_loop(unsettled, one_round, first)
    return search.u_e, residual, rounds


def _neuron_residual(circuit, u_e, a, s):
    f, _ = imbalance(circuit, u_e, a, s)
    return relative_norm(f, u_e)


def relative_norm(error: Array, value: Array) -> Array:
    """|error| / (1 + |value|) with Euclidean norms over the last axis."""
    norm = lambda v: jnp.sqrt(jnp.einsum("...n,...n->...", v, v))
    return norm(error) / (1 + norm(value))


class _Iterate(NamedTuple):
    """Carry of the closed-loop iteration."""

    control: Float[Array, "batch out"]
    mismatch: Float[Array, "batch out"]  # F(c)
    u_e: tuple[Float[Array, "batch neurons"], ...]
    residual: Float[Array, " batch"]
    inverse: Float[Array, "batch out out"]  # of dF/dc
    iterations: Float[Array, " batch"]
    evaluations: Array


def closed_loop(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
    weights: FeedbackWeights,
    start: NetworkState,
) -> Solution:
    """Steady state under control towards `target`, from the open-loop state `start`."""
    solver = architecture.solver
    assert isinstance(solver, Newton)
    circuit = microcircuit(architecture, hyper)
    evaluate = _evaluation(architecture, parameters, hyper, circuit, x, target, weights)

    def unsolved(iterate: _Iterate):
        return iterate.residual > solver.tolerance

    def advance(iterate: _Iterate, step, update_inverse) -> _Iterate:
        """Moves the samples that have not converged by `step`, and leaves the others alone."""
        active = unsolved(iterate)[:, None]
        control = jnp.where(active, iterate.control + step, iterate.control)
        u_e, mismatch, residual = evaluate(control, iterate.u_e)
        inverse = update_inverse(control - iterate.control, mismatch - iterate.mismatch)
        return _Iterate(
            control,
            jnp.where(active, mismatch, iterate.mismatch),
            tuple(jnp.where(active, new, old) for new, old in zip(u_e, iterate.u_e, strict=True)),
            jnp.where(active[:, 0], residual, iterate.residual),
            inverse,
            iterate.iterations + active[:, 0].astype(x.dtype),
            iterate.evaluations + 1,
        )

    def broyden(iterate: _Iterate) -> _Iterate:
        step = -_apply(iterate.inverse, iterate.mismatch)
        return advance(iterate, step, lambda dc, df: _broyden_update(iterate.inverse, dc, df))

    def newton(iterate: _Iterate) -> _Iterate:
        directions = jnp.eye(iterate.control.shape[-1], dtype=x.dtype)

        def derivative(direction):
            tangent = jnp.broadcast_to(direction, iterate.control.shape)
            f = lambda control: evaluate(control, iterate.u_e)[1]
            return jax.jvp(f, (iterate.control,), (tangent,))[1]

        jacobian = jnp.moveaxis(jax.vmap(derivative)(directions), 0, -1)
        step = -jnp.linalg.solve(jacobian, iterate.mismatch[..., None])[..., 0]
        return advance(iterate, step, lambda dc, df: iterate.inverse)

    loss = bind(architecture.loss, hyper.loss)
    gain = CONTROLLERS[architecture.controller].gain(hyper.controller)
    control = jnp.zeros_like(start.u_y)
    # At c = 0 the open-loop state solves every neuron; only the control is off.
    mismatch = gain * loss.error(start.u_y, target)
    iterate = _Iterate(
        control,
        mismatch,
        start.u_e,
        jnp.full(len(x), jnp.inf, x.dtype),
        _first_inverse(architecture, loss, gain, start.u_y, target),
        jnp.zeros(len(x), x.dtype),
        jnp.zeros((), jnp.int32),
    )
    brief = min(BROYDEN_EVALUATIONS, solver.max_iterations)
    for method, cap in ((broyden, brief), (newton, solver.max_iterations)):
        iterate = jax.lax.while_loop(
            lambda iterate, cap=cap: jnp.any(unsolved(iterate)) & (iterate.evaluations < cap),
            method,
            iterate,
        )
    s = disinhibition(iterate.control, weights)
    u_i = tuple(
        inhibitory_potential(circuit, u, s_l) for u, s_l in zip(iterate.u_e, s, strict=True)
    )
    rate = circuit.phi_e.value(iterate.u_e[-1]) if iterate.u_e else x
    u_y = _output(architecture, parameters, rate, iterate.control)
    return Solution(
        NetworkState(iterate.u_e, u_i, u_y),
        iterate.control,
        iterate.iterations,
        iterate.residual,
        iterate.residual <= solver.tolerance,  # not of a NaN, which ends the iteration as well
    )


def _output(architecture, parameters, rate, control):
    u_y = rate @ parameters["kernel_out"]
    return u_y + control if architecture.fb_to_readout else u_y


def _evaluation(
    architecture, parameters, hyper, circuit, x, target, weights
) -> Callable[[Array, tuple], tuple[tuple, Array, Array]]:
    """(control, last u_E) -> (u_E, F(control), residual of each sample): one forward pass."""
    error = bind(architecture.loss, hyper.loss).error
    gain = CONTROLLERS[architecture.controller].gain(hyper.controller)
    near, cap = max(NEAR, architecture.solver.tolerance), architecture.solver.max_iterations
    # The first layer's input does not depend on the control.
    first = feedforward_input(parameters, 0, x) if architecture.hidden_layers else x

    def evaluate(control, last):
        potentials, residual = [], jnp.zeros(len(x), x.dtype)
        a, rate = first, x
        for layer, s in enumerate(disinhibition(control, weights)):
            if layer > 0:
                a = feedforward_input(parameters, layer, rate)
            # One step as a rule: what it leaves shrinks with the next evaluation's.
            u_e, layer_residual, _ = settle(circuit, last[layer], a, s, 1, near, cap)
            potentials.append(u_e)
            rate = circuit.phi_e.value(u_e)
            residual = jnp.maximum(residual, layer_residual)
        u_y = _output(architecture, parameters, rate, control)
        mismatch = gain * error(u_y, target) - control
        residual = jnp.maximum(residual, relative_norm(mismatch, control))
        return tuple(potentials), mismatch, residual

    return evaluate


def _first_inverse(architecture: Architecture, loss: Loss, gain, output, target) -> Array:
    """Inverse of an approximate dF/dc = -(1 + K S dy/dc) at the open-loop state, S = -de/dy.

    The controller's direct effect on the readout is all of dy/dc that counts here: adding the
    hidden layers' share, by a Gram matrix of the feedback weights, saved no evaluation in 8 epochs
    of Fashion-MNIST (3 x 256) and cost half of one; Broyden's updates find it.
    """
    if architecture.fb_to_readout:
        assert loss.damping is not None  # `bind` has filled it in
        return -loss.damping(output, target, gain)
    out = output.shape[-1]
    return -jnp.broadcast_to(jnp.eye(out, dtype=output.dtype), (len(output), out, out))


def _apply(matrix, vector):
    return jnp.einsum("bij,bj->bi", matrix, vector)


def _broyden_update(inverse, dc, df):
    """Broyden's "good" rank-one update of the inverse Jacobian; none where nothing moved."""
    hy = _apply(inverse, df)
    dch = jnp.einsum("bi,bij->bj", dc, inverse)
    denominator = jnp.sum(dc * hy, axis=-1)
    usable = jnp.abs(denominator) > jnp.finfo(dc.dtype).tiny
    scale = jnp.where(usable, 1 / jnp.where(usable, denominator, 1), 0)
    return inverse + (scale[:, None] * (dc - hy))[:, :, None] * dch[:, None, :]
