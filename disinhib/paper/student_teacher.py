"""A student that learns while it runs, its teacher beside it (paper, Fig. 4).

Two layers of E-I microcircuits, the second of which is read as phi_E(u_E). Activity, controller,
feedback weights and feed-forward weights evolve at once, as one differential equation:

    tau_E du_E/dt = -u_E + r_pre W + b - phi_I(u_I)      tau_I du_I/dt = -u_I + phi_E(u_E) - c Q
    tau_c dz/dt = e - leak z,  c = k_p e + k_i z,  e = target - output
    tau_Q dQ/dt = -Q + J      J: the Jacobian at the present state, scaled to Frobenius norm 7.5
    tau_W dW/dt = r_pre^T delta,    tau_W db/dt = delta

delta comes in two forms, each with the exact inverse of the interneuron's activation and with an
approximate one, its tangent at the rate y0 = 0.5:

                    exact                           approximate
    published   (r_E - u_I) phi_E'(r_E)     (r_E - tangent of phi_E^-1 at u_I) phi_E'(r_E)
    textbook    (r_E - u_I) phi_E'(u_E)     (r_E - tangent of phi_I^-1 at r_I) phi_E'(u_E)

The published code evaluates the derivative at the rate where the paper's equations have the
potential, and takes its tangent from phi_E and at the potential u_I; its figure is that of
"published", the default.

Published: `notebooks/Figure 4.ipynb`. There inputs and targets are interpolated between samples of
1 ms and an epoch ends with its last sample; here the sines are continuous and the teacher is part
of the equation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from disinhib.activations import tangent_of_inverse
from disinhib.config import published
from disinhib.controller import CONTROLLERS
from disinhib.feedback import jacobian_weights, modified
from disinhib.hyperparameters import Architecture, Ode
from disinhib.microcircuit import Microcircuit, Neurons, microcircuit
from disinhib.network import NetworkState, Parameters, feedforward_input
from disinhib.solvers.ode import MAX_STEPS, layer_velocity, step_size

INPUTS, HIDDEN, OUTPUTS = 30, 20, 2
TAU_Q, TAU_W = 30.0, 60.0  # s, of the feedback weights and of the feed-forward ones
EPOCH = 5.0  # s
SAMPLES = 5000  # of an epoch: one a millisecond
Y0 = 0.5  # a rate: where the approximate rule's tangent touches
SOLVER = Ode()  # Tsit5, rtol 1e-3, atol 1e-6, first step 1 ms
# The output layer is a hidden layer whose readout is the identity: its Jacobian is the core's.
ARCHITECTURE = Architecture(
    "disinhibition", "dale", (INPUTS, HIDDEN, OUTPUTS, OUTPUTS), solver=SOLVER
)
HYPER = published(ARCHITECTURE, "exact-inv").updated(
    activation_e={"scale": 5.0, "shift": 3.0},
    activation_i={"shift": 3.0},
    controller={"k_p": 30.0, "k_i": 15.0, "leak": 0.5},
    rule={"norm_val": 7.5},
)


class Sines(NamedTuple):
    """The inputs amplitude * sin(2 pi frequency t + phase): amplitudes dimensionless, Hz, rad."""

    amplitude: Float[Array, " inputs"]
    frequency: Float[Array, " inputs"]
    phase: Float[Array, " inputs"]

    def __call__(self, t) -> Float[Array, " inputs"]:
        return self.amplitude * jnp.sin(2 * jnp.pi * self.frequency * t + self.phase)


class Student(NamedTuple):
    """A network and all that changes in it: potentials `[neurons]` by layer, the controller's
    integral, feedback weights `[outputs, neurons]` by layer, and kernels and biases."""

    u_e: tuple[Float[Array, " _neurons"], ...]
    u_i: tuple[Float[Array, " _neurons"], ...]
    z: Float[Array, " outputs"]
    feedback: tuple[Float[Array, "outputs _neurons"], ...]
    parameters: Parameters


class Pair(NamedTuple):
    """The student and the teacher, which runs open loop and does not learn."""

    student: Student
    teacher: Student


class Sample(NamedTuple):
    """What is seen of a pair at one time; `effort` is |c Q_1|^2 + |c Q_2|^2 (in open loop of the
    controller as it would be, were it connected)."""

    output: Float[Array, "*time outputs"]
    target: Float[Array, "*time outputs"]
    effort: Float[Array, "*time"]


class Losses(NamedTuple):
    """Of an epoch: the summed squared error in open and in closed loop, and the least-control
    loss H, each a mean over time."""

    open_loop: Float[Array, "*lanes"]
    closed_loop: Float[Array, "*lanes"]
    control: Float[Array, "*lanes"]


class Course(NamedTuple):
    """An experiment: losses `[epochs, rules]`; what was seen before and after learning, `[rules,
    time, ...]`, in open loop for half an epoch and then controlled; the `inputs` of the one after
    learning; and the `times` of all these, in s from their start."""

    losses: Losses
    before: Sample
    after: Sample
    inputs: Float[Array, "time inputs"]
    times: Float[Array, " time"]


class Phase(NamedTuple):
    """What happens beside the potentials' moving; 1 or 0 each, traced, so that all are one
    compiled program."""

    controlled: float = 0.0
    feedback_learns: float = 0.0
    weights_learn: float = 0.0


BURN_IN, OPEN, CLOSED = Phase(feedback_learns=1.0), Phase(), Phase(controlled=1.0)
LEARNING = Phase(1.0, 1.0, 1.0)

Delta = Callable[[Microcircuit, Neurons, Neurons], Neurons]  # of (circuit, u_E, u_I)


def _published_exact(circuit, u_e, u_i):
    rate = circuit.phi_e.value(u_e)
    return (rate - u_i) * circuit.phi_e.derivative(rate)


def _published_approximate(circuit, u_e, u_i):
    rate = circuit.phi_e.value(u_e)
    intercept, slope = tangent_of_inverse(circuit.phi_e, jnp.asarray(Y0, u_i.dtype))
    return (rate - (intercept + slope * u_i)) * circuit.phi_e.derivative(rate)


def _textbook_exact(circuit, u_e, u_i):
    return (circuit.phi_e.value(u_e) - u_i) * circuit.phi_e.derivative(u_e)


def _textbook_approximate(circuit, u_e, u_i):
    intercept, slope = tangent_of_inverse(circuit.phi_i, jnp.asarray(Y0, u_i.dtype))
    estimate = intercept + slope * circuit.phi_i.value(u_i)
    return (circuit.phi_e.value(u_e) - estimate) * circuit.phi_e.derivative(u_e)


RULES = ("approximate", "exact")  # the lanes of a run, in this order
# form (see above): delta of each of RULES
FORMS: dict[str, tuple[Delta, Delta]] = {
    "published": (_published_approximate, _published_exact),
    "textbook": (_textbook_approximate, _textbook_exact),
}


def initial_network(key: PRNGKeyArray) -> Student:
    """A network at rest with random weights (sd 2 / sqrt(inputs of the layer)) and biases (sd
    2 / sqrt(neurons of the layer)), and the feedback weights that belong to them."""
    keys = jax.random.split(key, 4)
    sizes = (INPUTS, HIDDEN, OUTPUTS)
    parameters = {"kernel_out": jnp.eye(OUTPUTS)}
    for layer, (pre, post) in enumerate(pairwise(sizes)):
        kernel, bias = keys[layer], keys[2 + layer]
        parameters[f"kernel_{layer}"] = jax.random.normal(kernel, (pre, post)) * 2 / pre**0.5
        parameters[f"bias_{layer}"] = jax.random.normal(bias, (post,)) * 2 / post**0.5
    rest = tuple(jnp.zeros(size) for size in sizes[1:])
    jacobian = _feedback_target(parameters, rest, rest)
    return Student(rest, rest, jnp.zeros(OUTPUTS), jacobian, parameters)


def draw(seed: int = 2) -> tuple[Sines, Student, Student]:
    """(inputs, student, teacher). Seed 2 is the published figure's, and so are the draws: jax's
    random bits of before `jax_threefry_partitionable` became the default (for this call alone)."""
    with jax.threefry_partitionable(False):
        inputs, student, teacher = jax.random.split(jax.random.key(seed), 3)
        ranges = ((0.1, 1.0), (0.1, 2.0), (0.0, jnp.pi))  # of amplitude, frequency in Hz, phase
        keys = jax.random.split(inputs, 3)
        sines = Sines(
            *(jax.random.uniform(k, (INPUTS,), minval=a, maxval=b)
              for k, (a, b) in zip(keys, ranges, strict=True))
        )  # fmt: skip
        return sines, initial_network(student), initial_network(teacher)


def _circuit() -> Microcircuit:
    return microcircuit(ARCHITECTURE, HYPER)


def _feedback_target(parameters, u_e, u_i):
    batch_of_one = lambda layers: tuple(u[None] for u in layers)
    state = NetworkState(batch_of_one(u_e), batch_of_one(u_i), jnp.zeros((1, OUTPUTS)))
    weights = jacobian_weights(_circuit(), parameters, state)
    return tuple(q[0] for q in modified(HYPER, weights))


def _output(student: Student) -> Float[Array, " outputs"]:
    return _circuit().phi_e.value(student.u_e[-1])


def _control(student: Student, error: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
    return CONTROLLERS["leaky-pi"].signal(HYPER.controller, error, student.z)


def _activity(student: Student, x: Float[Array, " inputs"], control: Float[Array, " outputs"]):
    """(du_E/dt of each layer, du_I/dt of each layer, what each layer's weights are given)."""
    circuit, du_e, du_i, given = _circuit(), [], [], [x]
    for layer, (u_e, u_i, q) in enumerate(
        zip(student.u_e, student.u_i, student.feedback, strict=True)
    ):
        a = feedforward_input(student.parameters, layer, given[-1])
        excitatory, inhibitory = layer_velocity(circuit, HYPER, u_e, u_i, a, control @ q)
        du_e.append(excitatory)
        du_i.append(inhibitory)
        given.append(circuit.phi_e.value(u_e))
    return tuple(du_e), tuple(du_i), given[:-1]


def velocity(
    phase: Phase,
    deltas: tuple[Delta, ...],
    rule: Int[Array, ""],
    student: Student,
    x: Float[Array, " inputs"],
    target: Float[Array, " outputs"],
) -> Student:
    """d(student)/dt, per second, for the input `x`; `rule` says which of `deltas` it learns by."""
    circuit, parameters = _circuit(), student.parameters
    error = target - _output(student)
    control = phase.controlled * _control(student, error)
    dz = CONTROLLERS["leaky-pi"].velocity(HYPER.controller, error, student.z)
    aims = _feedback_target(parameters, student.u_e, student.u_i)
    per_second = phase.feedback_learns / TAU_Q
    dq = [per_second * (aim - q) for aim, q in zip(aims, student.feedback, strict=True)]
    du_e, du_i, given = _activity(student, x, control)
    changes = {"kernel_out": jnp.zeros_like(parameters["kernel_out"])}
    for layer, (pre, u_e, u_i) in enumerate(zip(given, student.u_e, student.u_i, strict=True)):
        delta = jnp.stack([delta(circuit, u_e, u_i) for delta in deltas])[rule]
        changes[f"bias_{layer}"] = phase.weights_learn / TAU_W * delta
        changes[f"kernel_{layer}"] = jnp.outer(pre, changes[f"bias_{layer}"])
    return Student(du_e, du_i, phase.controlled * dz, tuple(dq), changes)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None, None, 0, None))
def _run(
    form: str, rule, phase: Phase, sines: Sines, pair: Pair, times: Array
) -> tuple[Pair, Sample]:
    """(the pair at the last of `times`, what is seen at each of them), from the first of them;
    a lane is a student that learns by `rule`."""

    def field(t, pair: Pair, _):
        student, teacher = pair
        x, target = sines(t), _output(teacher)
        du_e, du_i, _ = _activity(teacher, x, jnp.zeros_like(target))
        return Pair(
            velocity(phase, FORMS[form], rule, student, x, target),
            jax.tree.map(jnp.zeros_like, teacher)._replace(u_e=du_e, u_i=du_i),
        )

    def seen(t, pair: Pair, _):
        output, target = _output(pair.student), _output(pair.teacher)
        c = _control(pair.student, target - output)
        efforts = [jnp.sum((c @ q) ** 2) for q in pair.student.feedback]
        return Sample(output, target, jnp.stack(efforts).sum())

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=SOLVER.dt,
        y0=pair,
        stepsize_controller=step_size(SOLVER),
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(ts=times, fn=seen), diffrax.SubSaveAt(t1=True)]
        ),
        max_steps=MAX_STEPS,
    )
    samples, end = solution.ys  # pyright: ignore[reportGeneralTypeIssues]
    return jax.tree.map(lambda value: value[-1], end), samples


@jax.jit
def _losses(opened: Sample, closed: Sample) -> Losses:
    """Of an epoch, whose last sample is the next one's first."""
    error = lambda seen: jnp.sum((seen.output - seen.target) ** 2, axis=-1)[:, :-1].mean(axis=1)
    return Losses(error(opened), error(closed), closed.effort[:, :-1].mean(axis=1))


def _times(first: float, last: float) -> Array:
    """SAMPLES + 1 from `first` to `last` seconds, both among them: one shape, one program."""
    return jnp.linspace(first, last, SAMPLES + 1)


def _later(sines: Sines, seconds: float) -> Sines:
    """The same inputs with `seconds` as time 0: float32 cannot tell milliseconds in minutes."""
    phase = np.asarray(sines.phase, np.float64)
    turned = phase + 2 * np.pi * np.asarray(sines.frequency, np.float64) * seconds
    return sines._replace(phase=jnp.asarray(turned % (2 * np.pi), sines.phase.dtype))


def experiment(
    burn_in: int = 4,
    epochs: int = 60,
    form: str = "published",
    seed: int = 2,
    report: Callable[[int, Losses], None] = lambda epoch, losses: None,
) -> Course:
    """Two equal students, one for each of RULES and a lane each, learn from the same teacher.

    For `burn_in` epochs of 5 s only activity and feedback weights evolve, without control; for
    `epochs` everything does, and `report(epoch, losses of both)` is called after each. Time runs
    on, and so do the inputs. Before an epoch the student is also run in open loop, from where it
    is, which does not move it. `form` is one of FORMS. 60 epochs take half a minute on 2 cores.
    """
    sines, student, teacher = draw(seed)
    lanes = lambda value: jnp.stack([value] * len(RULES))
    pairs = jax.tree.map(lanes, Pair(student, teacher))
    every, half = _times(0.0, EPOCH), EPOCH / 2

    def run(phase, epoch, pairs, times=every):
        sines_of_epoch = _later(sines, epoch * EPOCH)
        return _run(form, jnp.arange(len(RULES)), phase, sines_of_epoch, pairs, times)

    def demonstrate(epoch, pairs) -> Sample:
        middle, opened = run(OPEN, epoch, pairs, _times(0.0, half))
        _, closed = run(CLOSED, epoch, middle, _times(half, EPOCH))
        join = lambda first, second: jnp.concatenate([first[:, :-1:2], second[:, ::2]], axis=1)
        return jax.tree.map(join, opened, closed)

    for epoch in range(burn_in):
        pairs, _ = run(BURN_IN, epoch, pairs)
    before = demonstrate(burn_in, pairs)
    losses = []
    for epoch in range(burn_in, burn_in + epochs):
        _, opened = run(OPEN, epoch, pairs)
        pairs, closed = run(LEARNING, epoch, pairs)
        losses.append(_losses(opened, closed))
        report(epoch - burn_in, losses[-1])
    after = demonstrate(burn_in + epochs, pairs)
    inputs = jax.vmap(_later(sines, (burn_in + epochs) * EPOCH))(every)
    stacked = jax.tree.map(lambda *epochs: jnp.stack(epochs), *losses)
    return Course(stacked, before, after, inputs, every)
