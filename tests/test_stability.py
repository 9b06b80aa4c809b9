"""The probe: what settles and what does not; eigenvalues against closed forms and against time."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disinhib import hydra_config, rules, solvers, training
from disinhib.config import parse
from disinhib.hyperparameters import Newton, Ode
from disinhib.losses import LOSSES, soft_targets
from disinhib.network import initial_parameters
from disinhib.solvers import ode, stability as probes
from disinhib.solvers.stability import settles

# float32 without, as in training: it is the probe that widens.

SIZES = ("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[12]")
NO_HIDDEN = ("model.vf.nb_hidden=0",)
DALE = ("model/vf=dale", "trainer=exact-inv")
MSE = ("dataset/loss=mse",)  # whose error does not saturate
TAU_E, TAU_C = 20e-3, 100e-3  # s, the defaults


def configured(*overrides):
    return parse(hydra_config.compose("train", [*DALE, *SIZES, *overrides])[0])


SAMPLES = 20  # of every batch, so that one program serves all of a structure


def batch_for(config) -> Any:
    """(parameters, x, target): random weights and images."""
    return drawn(config.architecture, config.hyperparameters.soft_target)


@partial(jax.jit, static_argnums=0)
def drawn(architecture, soft_target):
    weights, images, labels = jax.random.split(jax.random.key(1), 3)
    sizes = architecture.sizes
    return (
        initial_parameters(architecture, 2.0, weights),
        jax.random.uniform(images, (SAMPLES, sizes[0])),
        soft_targets(jax.random.randint(labels, (SAMPLES,), 0, sizes[-1]), sizes[-1], soft_target),
    )


def begun(config) -> Any:
    """The rule's state before it has learnt."""
    state = training.initial_state(config, [0])
    return jax.tree.map(lambda lanes: lanes[0], state.rule)


def probed(config, *batch: Any) -> probes.Probe:
    """The probe of a network that has dynamics, of `batch` or of a random one."""
    parameters, x, target = batch or batch_for(config)
    found = probes.probe(config, parameters, x, target, begun(config))
    assert found is not None
    return found


# --- What settles, and what does not ---------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """(configuration, parameters, images, targets) of two epochs on digits."""
    config = configured("epochs=2", "batchsize=20", "optimizer.learning_rate=1e-2")
    state = training.train(config, [0], lambda *_: None)
    data = training.prepare(config)
    x = data.validation.images[:SAMPLES] * data.scale
    target = soft_targets(data.validation.labels[:SAMPLES], 10, config.hyperparameters.soft_target)
    return config, jax.tree.map(lambda leaf: leaf[0], state.parameters), x, target


def test_a_trained_network_settles(trained):
    found = probed(*trained)
    assert found.gap < 1e-5 and found.reached == 1
    # The controller's integral of what softmax does not see, the same for all outputs, leaks.
    assert found.growth == pytest.approx(-1 / TAU_C, rel=1e-6)
    assert settles(found)
    assert all(type(value) is float for value in found)


def test_whichever_solver_trains_the_same_is_probed(trained):
    """And nothing of float64 is left behind."""
    config, *batch = trained
    by_ode = replace(config, architecture=replace(config.architecture, solver=Ode(T=0.01)))
    assert probed(by_ode, *batch) == probed(config, *batch)
    assert jnp.ones(1).dtype == jnp.float32


UNSTABLE = (*MSE, "model.vf.controller.k_i=10", "trainer.norm_val=30")


def test_an_equilibrium_that_is_unstable_is_flagged():
    """Training itself would have taken it: Newton's method converges."""
    config = configured(*UNSTABLE)
    parameters, x, target = batch_for(config)
    family = rules.RULES["exact-inv"].family
    hyper = training.as_arrays(config.hyperparameters)
    update = jax.jit(family.update, static_argnums=0)
    means = family.initial_state(config.architecture, hyper, jax.random.key(0))
    solution = update(config.architecture, parameters, means, hyper, x, target).solution
    assert bool(solution.converged.all())
    found = probed(config, parameters, x, target)
    assert found.gap > 0.1 and found.reached == 0 and found.growth > 1
    assert not settles(found)


def test_reached_is_a_share_of_the_samples(monkeypatch):
    """A bound just below the largest gap leaves out one sample of twenty."""
    config = configured(*MSE)
    gap = probed(config).gap
    monkeypatch.setattr(probes, "REACHED", gap)
    assert settles(probed(config))
    monkeypatch.setattr(probes, "REACHED", np.nextafter(gap, 0))
    found = probed(config)
    assert found.gap == gap and found.reached == 0.95
    assert not settles(found)


def test_where_newton_does_not_converge_nothing_is_reached(monkeypatch):
    monkeypatch.setattr(probes, "NEWTON", Newton(tolerance=1e-9, max_iterations=1))
    found = probed(configured(*MSE))
    assert found.reached == 0 and np.isfinite(found.gap)
    assert not settles(found)


def test_what_is_not_finite_does_not_settle():
    config = configured(*MSE)
    parameters, x, target = batch_for(config)
    broken = {**parameters, "kernel_0": parameters["kernel_0"].at[0, 0].set(jnp.nan)}
    found = probed(config, broken, x, target)
    assert np.isnan(found.gap) and np.isnan(found.growth) and found.reached == 0
    assert not settles(found)


def test_weak_feedback_is_controlled_towards_its_nudge():
    """As strong feedback is towards that nudge given outright; the eigenvalue tells the aims apart
    where control is strong."""
    strong = configured(*MSE, "model.vf.controller.k_i=4", "trainer.norm_val=10")
    weakly = {"strong_fb": 0.0, "target_nudge": 0.3}
    weak = replace(strong, hyperparameters=strong.hyperparameters.updated(rule=weakly))
    parameters, x, target = batch_for(weak)
    solver = replace(weak.architecture, solver=Newton(1e-6, 100))
    hyper = training.as_arrays(weak.hyperparameters)
    opened = jax.jit(solvers.open_loop, static_argnums=0)(solver, parameters, hyper, x)
    nudge = LOSSES["mse"].nudged_target(opened.state.u_y, target, 0.3)
    found = probed(weak, parameters, x, target).growth
    # float32 finds the nudge to 1e-6
    assert found == pytest.approx(probed(strong, parameters, x, nudge).growth, rel=1e-4)
    assert found != pytest.approx(probed(strong, parameters, x, target).growth, rel=1e-2)


def test_kept_feedback_weights_are_those_of_training():
    """The probe is given them: with others it is of another network."""
    config = configured(*MSE, "trainer.feedback=random", "trainer.norm_val=30")
    parameters, x, target = batch_for(config)
    own, other = begun(config), jax.tree.map(lambda q: -q, begun(config))
    growth = [
        found.growth
        for state in (own, other)
        if (found := probes.probe(config, parameters, x, target, state)) is not None
    ]
    assert growth[0] == probed(config, parameters, x, target).growth != growth[1]


# --- Which dynamics there are ----------------------------------------------------------------


def test_the_plain_network_has_none():
    config = configured("model/vf=non-dale", "trainer=bp")
    parameters, x, target = batch_for(config)
    assert probes.probe(config, parameters, x, target, ()) is None


def test_back_propagation_runs_open_loop_only():
    """There a neuron and its interneuron relax faster than the readout, with -1/tau_E; and no
    controller's integral stands still at 0."""
    found = probed(configured("trainer=bp"))
    assert settles(found) and found.gap < 1e-5
    assert found.growth == pytest.approx(-1 / TAU_E, rel=1e-9)


def test_a_proportional_controller_has_no_integral():
    """It would stand still at 0 too."""
    found = probed(configured("model/vf/controller=proportional", "model.vf.controller.k_p=2"))
    assert settles(found) and found.gap < 1e-5
    assert found.growth < -30


# --- Eigenvalues -----------------------------------------------------------------------------


def slower_pole(k_p, k_i, leak):
    """Of tau_E du/dt = -u + a + k_p e + k_i z,  tau_c dz/dt = e - leak z,  e = target - u."""
    trace = -(1 + k_p) / TAU_E - leak / TAU_C
    determinant = ((1 + k_p) * leak + k_i) / (TAU_E * TAU_C)
    return (trace / 2 + np.sqrt(complex(trace**2 / 4 - determinant))).real


@pytest.mark.parametrize("k_i", [0.1, 8.0], ids=["two real", "a pair"])
def test_the_readout_alone_has_the_poles_of_its_control_loop(k_i):
    control = "model.vf.controller"
    config = configured(
        *(*NO_HIDDEN, *MSE, f"{control}.k_p=0.5", f"{control}.k_i={k_i}", f"{control}.leak=1.5")
    )
    found = probed(config)
    assert found.growth == pytest.approx(slower_pole(0.5, k_i, 1.5), rel=1e-9)
    assert settles(found)


def test_a_slow_controller_is_given_its_time():
    """tau_c / leak is 10 s."""
    config = configured(*NO_HIDDEN, *MSE, "model.vf.controller.leak=0.01")
    found = probed(config)
    assert settles(found) and found.gap < 1e-6


@partial(jax.jit, static_argnums=(0, 1))
def depart(architecture, solver, parameters, rule_state, hyper, x, target, times):
    """Distance `[time]` from the closed-loop equilibrium of one sample that starts a little off."""
    network = architecture, parameters, hyper, x
    opened = solvers.open_loop(*network).state
    loop = parameters, rule_state, hyper, opened, target
    feedback_and_aim = rules.FAMILIES[architecture.family].feedback_and_aim
    assert feedback_and_aim is not None
    weights, aim = feedback_and_aim(architecture, *loop)
    closed = solvers.closed_loop(*network, aim, weights, opened).state
    error = LOSSES[architecture.loss].error(closed.u_y, aim)
    rest = ode.DynamicState(closed, error / hyper.controller["leak"])
    start = jax.tree.map(lambda value: value + 1e-8 * jnp.cos(value), rest)
    control = ode.Control(aim, weights)
    by_ode = replace(architecture, solver=solver)
    moved, _ = ode.trajectory(by_ode, parameters, hyper, x, control, start, times)
    off = jax.tree.map(lambda at, end: at[0] - end, moved, rest)
    return sum(jnp.sum(leaf**2, axis=-1) for leaf in jax.tree.leaves(off)) ** 0.5


@pytest.mark.parametrize(
    ("overrides", "stable"),
    [(MSE, True), (UNSTABLE, False)],
    ids=["it comes back", "it runs away"],
)
def test_growth_is_how_fast_a_small_departure_changes(overrides, stable):
    """Fitted to a trajectory once the faster modes are gone: neighbours of the slowest are not
    quite, and a pair's distance swings about its exponential."""
    config = configured(*overrides)
    times = np.concatenate([[0.0], np.linspace(0.3, 0.7, 101)])
    architecture = replace(config.architecture, solver=Newton(1e-12, 100))
    parameters, *batch = batch_for(config)
    one = [array[:1] for array in batch]
    with jax.enable_x64(True):
        arrays = jax.tree.map(
            lambda value: jnp.asarray(value, jnp.float64),
            (parameters, begun(config), config.hyperparameters, *one, times),
        )
        distance = np.asarray(depart(architecture, Ode(rtol=1e-8, atol=1e-15), *arrays))
    slope, _ = np.polyfit(times[1:], np.log(distance[1:]), 1)
    found = probed(config, parameters, *(jnp.repeat(array, SAMPLES, axis=0) for array in one))
    assert (found.growth < 0) == stable
    assert slope == pytest.approx(found.growth, rel=0.05)
