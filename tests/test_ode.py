"""The ODE's road: against Newton's, against closed forms, and where it stops.

Linear activations with squared error make the whole network, controller included, one linear
system, whose solution is a matrix exponential: that is what pins the time constants down, of which
a steady state knows nothing.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hyperparameters
from scipy.linalg import expm
from scipy.special import softmax

from disinhib import solvers
from disinhib.feedback import jacobian_weights, modified
from disinhib.hyperparameters import Newton, Ode
from disinhib.microcircuit import microcircuit
from disinhib.solvers import ode

pytestmark = pytest.mark.usefixtures("float64", "strict")

HYPER = hyperparameters().updated(
    g_ei=1.3, g_ie=0.7, controller={"leak": 1.5, "k_p": 0.5, "k_i": 1.0}
)
NEWTON = Newton(tolerance=1e-12, max_iterations=60)
# 3 s are 45 time constants tau_c / leak: nothing moves any more, and what the integrator's
# tolerances allow on the way has been forgotten.
TIGHT = Ode(T=3.0, rtol=1e-6, atol=1e-9, early_termination=False)


@partial(jax.jit, static_argnums=0)
def both_loops(architecture, parameters, hyper, x, target):
    opened = solvers.open_loop(architecture, parameters, hyper, x)
    raw = jacobian_weights(microcircuit(architecture, hyper), parameters, opened.state)
    weights = modified(hyper, raw)
    closed = solvers.closed_loop(architecture, parameters, hyper, x, target, weights, opened.state)
    return opened, closed


def solved(small, hyper=HYPER):
    architecture, parameters, x, target = small
    return both_loops(architecture, parameters, hyper, x, target)


def close(one, other, **tolerances):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


@pytest.mark.parametrize(
    ("fields", "averaged"),
    [
        ({"sizes": (5, 4), "loss": "mse"}, 0.0),
        (
            {
                "sizes": (5, 8, 4),
                "controller": "proportional",
                "fb_to_readout": False,
                "activation_e": "relu",
                "activation_i": "tanh",
                "use_bias": False,
            },
            1.0,
        ),
    ],
    ids=["no hidden layer, mse", "averaged, proportional, hidden only, relu and tanh, no bias"],
)
def test_both_roads_lead_to_the_same_steady_states(fields, averaged, problem):
    """(The defaults are those of the trajectory below.)"""
    hyper = HYPER.updated(rule={"average_fb_weights": averaged})
    for by_ode, by_newton in zip(
        solved(problem(solver=TIGHT, **fields), hyper),
        solved(problem(solver=NEWTON, **fields), hyper),
        strict=True,
    ):
        assert np.all(by_ode.converged)
        assert np.all(by_newton.converged)
        close(by_ode.state, by_newton.state, rtol=1e-7, atol=1e-8)
        close(by_ode.control, by_newton.control, rtol=1e-7, atol=1e-8)
        assert np.max(by_ode.residual) < 1e-7


def test_an_open_then_closed_trajectory_passes_both_steady_states(problem):
    small = problem(sizes=(5, 8, 4), solver=TIGHT)
    architecture, parameters, x, target = small

    @jax.jit
    def opened_then_closed(parameters, hyper, x, target):
        circuit = microcircuit(architecture, hyper)
        weights_at = lambda state: modified(hyper, jacobian_weights(circuit, parameters, state))
        return ode.open_then_closed_trajectory(
            architecture, parameters, hyper, x, target, weights_at, jnp.linspace(0.0, 3.0, 31)
        )

    found = opened_then_closed(parameters, HYPER, x, target)
    states, signal = jax.tree.map(np.asarray, found)
    by_newton = replace(architecture, solver=NEWTON)
    opened, closed = solved(small._replace(architecture=by_newton))
    at = lambda i: jax.tree.map(lambda value: value[:, i], states.network)
    assert states.network.u_e[0].shape == (6, 62, 8)
    assert signal.shape == (6, 62, 4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(at(0)))  # from rest
    # Tolerances: relaxing modes that rtol 1e-6 per step leaves in a 3 s integration.
    close(at(30), opened.state, rtol=1e-6, atol=1e-7)
    close(at(31), at(30))  # the loop closes where the open one ended
    close(at(61), closed.state, rtol=1e-6, atol=1e-7)
    close(signal[:, 61], closed.control, rtol=1e-6, atol=1e-7)
    assert not np.any(signal[:, :31])
    # At the moment of closing the integral is zero: c = k_p e.
    error = target - softmax(opened.state.u_y, axis=-1)
    close(signal[:, 31], HYPER.controller["k_p"] * error, rtol=1e-6, atol=1e-7)
    # The integral's memory makes the control grow from there.
    assert np.all(np.linalg.norm(signal[:, 61], axis=-1) != np.linalg.norm(signal[:, 31], axis=-1))


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_linear_network_moves_as_its_matrix_exponential_says(problem, closed):
    small = problem(
        sizes=(3, 1, 1),
        batch=2,
        loss="mse",
        activation_e="linear",
        activation_i="linear",
        solver=Ode(rtol=1e-9, atol=1e-11),
    )
    architecture, parameters, x, _ = small
    hyper = HYPER.updated(tau_e=0.03, tau_i=0.004, controller={"tau": 0.07})
    target, q = jnp.array([[0.7], [-0.4]]), 0.6
    control = None
    if closed:
        control = ode.Control(target, (jnp.full((2, 1, 1), q),))
    times = np.array([0.0, 0.002, 0.01, 0.05, 0.2])
    rest = ode.resting_state(architecture, 2)
    trajectory = jax.jit(ode.trajectory, static_argnums=0)
    states, signal = jax.tree.map(
        np.asarray, trajectory(architecture, parameters, hyper, x, control, rest, times)
    )
    a = (x @ parameters["kernel_0"] + parameters["bias_0"])[:, 0]
    w = float(parameters["kernel_out"][0, 0])
    k_p, k_i = (hyper.controller["k_p"], hyper.controller["k_i"]) if closed else (0.0, 0.0)
    taus = np.array([hyper.tau_e, hyper.tau_i, hyper.tau_e, hyper.controller["tau"]])
    for i in range(2):
        # d(u_E, u_I, y, z)/dt = M (u_E, u_I, y, z) + b,  c = k_p (t - y) + k_i z
        t = float(target[i, 0])
        matrix = np.array(
            [
                [-1, -hyper.g_ie, 0, 0],
                [hyper.g_ei, -1, q * k_p, -q * k_i],
                [w, 0, -1 - k_p, k_i],
                [0, 0, -float(closed), -hyper.controller["leak"] * closed],
            ]
        )
        matrix, b = matrix / taus[:, None], np.array([a[i], -q * k_p * t, k_p * t, closed * t])
        b = b / taus
        for j, time in enumerate(times):
            # The last column of exp([[M, b], [0, 0]] t) is the solution from rest.
            whole = expm(np.block([[matrix, b[:, None]], [np.zeros((1, 5))]]) * time)
            u_e, u_i, y, z = whole[:4, 4]
            network = states.network
            found = network.u_e[0][i, j, 0], network.u_i[0][i, j, 0], network.u_y[i, j, 0]
            # rtol 1e-9 per step, over some hundred steps
            np.testing.assert_allclose(found, (u_e, u_i, y), rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(states.z[i, j, 0], z, rtol=1e-7, atol=1e-9)
            c = k_p * (t - y) + k_i * z
            np.testing.assert_allclose(signal[i, j, 0], c, rtol=1e-7, atol=1e-9)


@pytest.fixture
def opened_by(problem):
    """The open loop of one network, integrated as asked."""

    def solve(**settings):
        small = problem(sizes=(5, 8, 4), solver=Ode(**settings))
        solve = jax.jit(partial(solvers.open_loop, small.architecture))
        return jax.tree.map(np.asarray, solve(small.parameters, HYPER, small.x))

    return solve


def test_the_event_stops_early_near_the_steady_state(opened_by):
    stopped, whole = opened_by(), opened_by(early_termination=False)
    assert np.all(stopped.iterations < whole.iterations / 3)
    assert np.all(stopped.converged)
    # The published event looks at |du/dt| (1/s) against 1e-3 |u|; tau_E du/dt is smaller still.
    close(stopped.state, whole.state, rtol=1e-2, atol=1e-2)
    assert np.max(stopped.residual) < 1e-3
    assert np.min(stopped.residual) > 0


def test_fixed_steps_are_as_many_as_fit(opened_by, problem):
    fixed = opened_by(adaptive_stepsize=False, early_termination=False, dt=2e-3, T=0.5)
    assert np.all(fixed.iterations == 250)
    opened, _ = solved(problem(sizes=(5, 8, 4), solver=NEWTON))  # 0.5 s are 25 time constants
    close(fixed.state, opened.state, atol=1e-6)


def test_an_integration_that_ends_before_the_steady_state_has_not_converged(opened_by):
    short = opened_by(T=0.01)
    assert np.min(short.residual) > 1e-2
    assert not np.any(short.converged)


def test_an_integration_that_needs_too_many_steps_is_said_not_raised(opened_by, monkeypatch):
    monkeypatch.setattr(ode, "MAX_STEPS", 5)
    cut = opened_by()
    assert not np.any(cut.converged)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cut.state))
