"""The network in time: its differential equations, integrated with diffrax (DESIGN sections 2, 3).

    tau_E du_E/dt = -u_E + a - g_IE phi_I(u_I)
    tau_I du_I/dt = -u_I + g_EI phi_E(u_E) - s,     s = c Q
    tau_E du_y/dt = -u_y + r_L W_out (+ c)
    c, dz/dt: controller.py

Potentials are dimensionless, times in seconds. Published: `src/models/dale/vf.py: __call__`,
`src/core/model.py: _forward` (solver, step-size control and steady-state event with its settings).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.controller import CONTROLLERS
from disinhib.hyperparameters import Architecture, Hyperparameters, Ode
from disinhib.losses import bind
from disinhib.microcircuit import Microcircuit, Neurons, microcircuit
from disinhib.network import NetworkState, Parameters, feedforward_input
from disinhib.solvers.newton import Solution, relative_norm

MAX_STEPS = 100_000  # of one integration; a solve that needs more counts as not converged


class DynamicState(NamedTuple):
    """Potentials of the network and the controller's integral `z`."""

    network: NetworkState
    z: Float[Array, "*batch out"]


class Control(NamedTuple):
    """What closes the loop."""

    target: Float[Array, "*batch out"]
    weights: tuple[Float[Array, "*batch out neurons"], ...]


def resting_state(architecture: Architecture, batch: int) -> DynamicState:
    """All potentials and the controller at zero."""
    layers = lambda: tuple(jnp.zeros((batch, n)) for n in architecture.sizes[1:-1])
    output = jnp.zeros((batch, architecture.sizes[-1]))
    return DynamicState(NetworkState(layers(), layers(), output), output)


def velocity(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    state: DynamicState,
    first_input: Float[Array, " first"],
    control: Control | None,
) -> tuple[DynamicState, Float[Array, " out"]]:
    """(time derivative of `state` in 1/s, control signal c) of one sample.

    `first_input` is x W_1 + b_1, which does not change in time (without hidden layers, x W_out).
    """
    circuit = microcircuit(architecture, hyper)
    u_e, u_i, u_y = state.network
    if control is None:
        c, dz = jnp.zeros_like(u_y), jnp.zeros_like(u_y)
        s = [0.0] * len(u_e)
    else:
        controller = CONTROLLERS[architecture.controller]
        error = bind(architecture.loss, hyper.loss).error(u_y, control.target)
        c = controller.signal(hyper.controller, error, state.z)
        dz = controller.velocity(hyper.controller, error, state.z)
        s = [c @ q for q in control.weights]

    du_e, du_i, a = [], [], first_input
    for layer in range(len(u_e)):
        moves = layer_velocity(circuit, hyper, u_e[layer], u_i[layer], a, s[layer])
        du_e.append(moves[0])
        du_i.append(moves[1])
        rate = circuit.phi_e.value(u_e[layer])
        last = layer == len(u_e) - 1
        a = (
            rate @ parameters["kernel_out"]
            if last
            else feedforward_input(parameters, layer + 1, rate)
        )
    drive = a + c if architecture.fb_to_readout else a
    du_y = (drive - u_y) / hyper.tau_e
    return DynamicState(NetworkState(tuple(du_e), tuple(du_i), du_y), dz), c


def layer_velocity(
    circuit: Microcircuit,
    hyper: Hyperparameters,
    u_e: Neurons,
    u_i: Neurons,
    a: Neurons,
    s: Neurons | float,
) -> tuple[Neurons, Neurons]:
    """(du_E/dt, du_I/dt) in 1/s of E-I microcircuits for the input `a` and dis-inhibition `s`."""
    inhibition = circuit.g_ie * circuit.phi_i.value(u_i)
    excitation = circuit.g_ei * circuit.phi_e.value(u_e)
    return (a - inhibition - u_e) / hyper.tau_e, (excitation - s - u_i) / hyper.tau_i


def steady_state(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    control: Control | None,
    start: DynamicState,
) -> Solution:
    """Integrates each sample from `start` for T seconds or up to the steady-state event.

    A sample has converged if the event came, or if it ends with a residual within the tolerances.
    """
    solver = architecture.solver
    assert isinstance(solver, Ode)

    def solve(first_input, control, start):
        event = diffrax.steady_state_event(solver.rtol, solver.atol)
        solution, states = _integrate(
            *(architecture, parameters, hyper, first_input, control, start, solver.T),
            event=diffrax.Event(event) if solver.early_termination else None,
            throw=False,
        )
        state = jax.tree.map(lambda value: value[-1], states)
        rest, c = velocity(architecture, parameters, hyper, state, first_input, control)
        residual = _residual(architecture, hyper, state, rest)
        # Having used up T is no arrival; without the event, the residual has to say.
        arrived = diffrax.is_event(solution.result) | (residual <= solver.rtol + solver.atol)
        converged = diffrax.is_okay(solution.result) & arrived
        return state.network, c, solution.stats["num_steps"], residual, converged

    first_input = _first_input(architecture, parameters, x)
    network, c, steps, residual, converged = jax.vmap(solve)(first_input, control, start)
    return Solution(network, c, steps.astype(x.dtype), residual, converged)


def trajectory(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    control: Control | None,
    start: DynamicState,
    times: Float[Array, " time"],
) -> tuple[DynamicState, Float[Array, "batch time out"]]:
    """States `[batch, time, ...]` and control signals at `times` (seconds, increasing from 0)."""
    solver = architecture.solver
    assert isinstance(solver, Ode)

    def solve(first_input, control, start):
        _, states = _integrate(
            *(architecture, parameters, hyper, first_input, control, start, times[-1]),
            saveat=diffrax.SaveAt(ts=times),
        )
        signal = jax.vmap(
            lambda state: velocity(architecture, parameters, hyper, state, first_input, control)[1]
        )
        return states, signal(states)

    return jax.vmap(solve)(_first_input(architecture, parameters, x), control, start)


def open_then_closed_trajectory(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
    weights_at,
    times: Float[Array, " time"],
) -> tuple[DynamicState, Float[Array, "batch 2*time out"]]:
    """Open loop from rest for `times`, then closed loop for `times` again, concatenated.

    `weights_at(state) -> FeedbackWeights` gives the feedback weights at the open loop's end.
    """
    arguments = (architecture, parameters, hyper, x)
    rest = resting_state(architecture, len(x))
    opened, no_signal = trajectory(*arguments, None, rest, times)
    end = jax.tree.map(lambda value: value[:, -1], opened)
    control = Control(target, weights_at(end.network))
    closed, signal = trajectory(*arguments, control, end, times)
    join = lambda first, second: jnp.concatenate([first, second], axis=1)
    return jax.tree.map(join, opened, closed), join(no_signal, signal)


def _integrate(
    architecture, parameters, hyper, first_input, control, start: DynamicState, until, **options
) -> tuple[Any, DynamicState]:
    """(diffrax's solution, the states it saved) of one sample from 0 to `until` seconds."""
    solver = architecture.solver
    # A list of arrays: diffrax stumbles over the empty tuples of a network without hidden layers.
    leaves, structure = jax.tree.flatten(start)

    def field(t, leaves, _):
        state = jax.tree.unflatten(structure, leaves)
        rate, _ = velocity(architecture, parameters, hyper, state, first_input, control)
        return jax.tree.leaves(rate)

    solution: Any = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=until,
        dt0=solver.dt,
        y0=leaves,
        stepsize_controller=step_size(solver),
        max_steps=MAX_STEPS,
        **options,
    )
    return solution, jax.tree.unflatten(structure, solution.ys)


def _first_input(architecture, parameters, x):
    if architecture.hidden_layers:
        return feedforward_input(parameters, 0, x)
    return x @ parameters["kernel_out"]


def step_size(solver: Ode) -> diffrax.AbstractStepSizeController:
    """diffrax's step-size control with the published coefficients; bounds follow `solver.dt`."""
    if not solver.adaptive_stepsize:
        return diffrax.ConstantStepSize()
    return diffrax.PIDController(
        rtol=solver.rtol,
        atol=solver.atol,
        pcoeff=0.1,
        icoeff=0.3,
        dcoeff=0.1,
        dtmin=solver.dt / 10,
        dtmax=solver.dt * 10,
        factormin=0.1,
        factormax=2.0,
    )


def _residual(architecture, hyper, state: DynamicState, rate: DynamicState):
    """tau du/dt of one sample, measured as Newton measures its residual."""
    network, controller = rate.network, CONTROLLERS[architecture.controller]
    scaled = DynamicState(
        NetworkState(
            tuple(hyper.tau_e * d for d in network.u_e),
            tuple(hyper.tau_i * d for d in network.u_i),
            hyper.tau_e * network.u_y,
        ),
        controller.tau(hyper.controller) * rate.z,
    )
    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(relative_norm, scaled, state))))
