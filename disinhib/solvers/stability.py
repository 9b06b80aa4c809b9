"""Does the network, in time, come to the equilibrium that Newton's method found? (DESIGN section 3)

High gains can make an equilibrium unstable for the real dynamics; what a rule learns there is of no
network that could be built. So a batch is solved on both roads, in float64 and with tight
tolerances, and the dynamics are linearised at the equilibrium.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from disinhib.config import RunConfig
from disinhib.controller import CONTROLLERS
from disinhib.hyperparameters import Architecture, Hyperparameters, Newton, Ode
from disinhib.losses import bind, soft_targets
from disinhib.network import Parameters, feedforward_input
from disinhib.rules import FAMILIES, RuleState
from disinhib.solvers import newton, ode
from disinhib.solvers.newton import Solution, relative_norm
from disinhib.solvers.ode import Control, DynamicState

# A gap up to here is an arrival. Measured: where the dynamics settle 5e-6 at most (on networks of
# 3 x 256 trained on digits 7e-7), which is what the integration's rtol leaves; where they do not,
# in limit cycles and other equilibria, 0.09 and more. Training itself stops at residuals of 1e-4.
REACHED = 1e-3
EIGENVALUE_SAMPLES = 3  # the batch's first; one takes 2 s with 3 hidden layers of 256
# How long a loop is integrated, in time constants: of neurons, whose transients have to pass all
# layers, and of the controller (tau_c / leak), of which e^-20 is 2e-9.
NEURON_TIMES, CONTROLLER_TIMES = 30, 20
NEWTON = Newton(tolerance=1e-9, max_iterations=100)


class Probe(NamedTuple):
    """How well the dynamics bear out Newton's equilibria.

    `gap`: the largest |ODE's state - Newton's| / (1 + |Newton's|), in Euclidean norms over a layer
    (u_E, u_I, u_y) or the control, over all of them, loops and samples. `reached`: the share of
    samples whose gap is at most REACHED and where Newton's method converged. `growth`: the largest
    real part, in 1/s, of the eigenvalues of the linearised dynamics at the equilibria of the first
    samples (of those where Newton's method failed, where it ended).
    """

    gap: float
    reached: float
    growth: float


def settles(found: Probe) -> bool:
    """Whether every sample came to its equilibrium, and it is stable; not if a number is NaN."""
    return found.reached == 1 and found.growth < 0


def probe(
    config: RunConfig,
    parameters: Parameters,
    x: Float[Array, "batch in"],
    target: Float[Array, "batch out"],
    rule_state: RuleState,
) -> Probe | None:
    """Solves a batch by Newton's method and by integration, whichever of them `config` trains with.

    `parameters` and `rule_state` are one lane's, `target` is what the rule learns from (soft). The
    network of a feedback rule is looked at in open loop, from rest, and from there in closed loop,
    with the feedback weights and the aim of training; it is linearised in closed loop. That of
    another rule runs open loop only. None for the plain MLP, which has no dynamics.

    With 100 samples on one core: 13 s for one hidden layer of 256, 28 s for three, of which 11 s
    and 17 s are compilation and come once a structure. Where nothing settles it can take 90 s more.
    """
    architecture = config.architecture
    if architecture.circuit == "non-dale":
        return None
    if not all(np.isfinite(leaf).all() for leaf in parameters.values()):
        # Nor would anything of it be; and an integration of NaN ends after MAX_STEPS only.
        return Probe(gap=float("nan"), reached=0.0, growth=float("nan"))
    with jax.enable_x64(True):
        wide = lambda value: jnp.asarray(value, jnp.float64)
        network = jax.tree.map(wide, (parameters, config.hyperparameters, x))
        by_newton = replace(architecture, solver=NEWTON)
        loops = equilibria(by_newton, *network, wide(target), widened(rule_state))
        start, gaps, converged = ode.resting_state(architecture, len(x)), [], []
        for control, found in loops:
            by_ode = replace(
                architecture, solver=_integration(architecture, config.hyperparameters, control)
            )
            end, loop_gaps = _integrated(by_ode, *network, control, start, found)
            start = start._replace(network=end)
            gaps.append(np.asarray(loop_gaps))
            converged.append(np.asarray(found.converged))
        jacobians = np.asarray(_jacobians(by_newton, *network, *loops[-1]))
    largest = np.max(gaps, axis=0)
    return Probe(
        gap=float(np.max(largest)),
        reached=float(np.mean((largest <= REACHED) & np.all(converged, axis=0))),
        growth=float(np.max([_growth(jacobian) for jacobian in jacobians])),
    )


def check(
    config: RunConfig,
    parameters: Parameters,
    x: Float[Array, "batch in"],
    labels: Int[Array, " batch"],
    rule_state: RuleState,
) -> tuple[dict[str, float], str]:
    """(metrics of `probe` under their names in MLflow, why the dynamics are not to be trusted: ""
    if they are); no metrics for the plain MLP."""
    classes = config.architecture.sizes[-1]
    target = soft_targets(labels, classes, config.hyperparameters.soft_target)
    measured = probe(config, parameters, x, target, rule_state)
    if measured is None:
        return {}, ""
    reasons = []
    if measured.reached != 1:
        reasons.append(
            f"the ODE reaches Newton's steady state in {100 * measured.reached:.0f} % of {len(x)}"
            f" samples only (gap {measured.gap:.2g})"
        )
    if not measured.growth < 0:
        reasons.append(f"the steady state is unstable (eigenvalue {measured.growth:+.2g} /s)")
    metrics = {
        "ode_gap": measured.gap,
        "ode_reached": measured.reached,
        "ode_growth": measured.growth,
    }
    return metrics, "; ".join(reasons)


def _integration(
    architecture: Architecture, hyper: Hyperparameters, control: Control | None
) -> Ode:
    """Tight, and to the end: the steady-state event fires early."""
    seconds = NEURON_TIMES * max(hyper.tau_e, hyper.tau_i)
    if control is not None:
        settling = CONTROLLERS[architecture.controller].settling(hyper.controller)
        seconds = max(seconds, CONTROLLER_TIMES * settling)
    first_step = float(min(hyper.tau_e, hyper.tau_i))
    return Ode(first_step, float(seconds), rtol=1e-6, atol=1e-9, early_termination=False)


def widened(rule_state: RuleState) -> RuleState:
    """With its real numbers in float64; a rule may also remember whole numbers, or a key."""
    is_real = lambda leaf: jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    wide = lambda leaf: jnp.asarray(leaf, jnp.float64) if is_real(leaf) else leaf
    return jax.tree.map(wide, rule_state)


@partial(jax.jit, static_argnums=0)
def equilibria(
    architecture, parameters, hyper, x, target, rule_state
) -> list[tuple[Control | None, Solution]]:
    """What closes the loop, and Newton's solution: of the open loop and, of a rule that learns in
    one, of the closed loop."""
    network = architecture, parameters, hyper, x
    opened = newton.open_loop(*network)
    feedback_and_aim = FAMILIES[architecture.family].feedback_and_aim
    if feedback_and_aim is None:
        return [(None, opened)]
    loop = parameters, rule_state, hyper, opened.state, target
    weights, aim = feedback_and_aim(architecture, *loop)
    closed = newton.closed_loop(*network, aim, weights, opened.state)
    return [(None, opened), (Control(aim, weights), closed)]


@partial(jax.jit, static_argnums=0)
def _integrated(architecture, parameters, hyper, x, control, start, found):
    """(state to which the ODE comes from `start`, each sample's gap between it and `found`)."""
    reached = ode.steady_state(architecture, parameters, hyper, x, control, start)
    gap = lambda newton, ode: relative_norm(ode - newton, newton)
    of = lambda solution: (solution.state, solution.control)
    gaps = jax.tree.leaves(jax.tree.map(gap, of(found), of(reached)))
    return reached.state, jnp.max(jnp.stack(gaps), axis=0)


@partial(jax.jit, static_argnums=0)
def _jacobians(
    architecture, parameters, hyper, x, control, found
) -> Float[Array, "samples state state"]:
    """d(velocity)/d(state), in 1/s, at the equilibria `found` of the first samples."""
    few = lambda tree: jax.tree.map(lambda value: value[:EIGENVALUE_SAMPLES], tree)
    x, control, found = few((x, control, found))
    z = jnp.zeros_like(found.control)
    if control is not None:  # where dz/dt = 0
        error = bind(architecture.loss, hyper.loss).error(found.state.u_y, control.target)
        z = CONTROLLERS[architecture.controller].integral(hyper.controller, error)
    if architecture.hidden_layers:
        first_input = feedforward_input(parameters, 0, x)
    else:
        first_input = x @ parameters["kernel_out"]

    def jacobian(state, first_input, control):
        flat, unravel = ravel_pytree(state)

        def velocity(flat):
            rate, _ = ode.velocity(
                architecture, parameters, hyper, unravel(flat), first_input, control
            )
            return ravel_pytree(rate)[0]

        return jax.jacfwd(velocity)(flat)

    return jax.vmap(jacobian)(DynamicState(found.state, z), first_input, control)


def _growth(jacobian: np.ndarray) -> float:
    """The largest real part of the eigenvalues of one sample's Jacobian `[state, state]`."""
    # What never moves is no state: the integral in open loop, or of a proportional controller.
    moving = np.any(jacobian != 0, axis=1)
    jacobian = jacobian[np.ix_(moving, moving)]
    if not np.isfinite(jacobian).all():
        return float("nan")
    # On busy cores BLAS's threads wait for each other: 1,556 states take one thread 2.5 s, and two
    # threads took 45 s on two such cores.
    with threadpool_limits(1, "blas"):
        return float(np.max(np.linalg.eigvals(jacobian).real))
