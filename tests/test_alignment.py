"""The angle between a rule's update and the gradient, against closed cases (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hyperparameters

from disinhib import hydra_config, training
from disinhib.alignment import ANGLE, NORM_RATIO, alignment
from disinhib.config import parse
from disinhib.hyperparameters import Newton
from disinhib.rules import RULES

LAYERS = ("", "_0", "_1", "_out")
# Degrees by which weak control may turn an update: it moves every rate by its own size, which is
# 2e-6 of the error, and a layer has less than ten.
CHANGED = 1e-3


@pytest.mark.parametrize(
    "words",
    [
        ["model/vf=non-dale", "trainer=sign-symmetric"],
        ["model/vf=dale", "trainer=lin-thresh", "trainer.feedback=sign-symmetric"],
    ],
    ids=" ".join,
)
def test_rules_whose_feedback_knows_the_signs_of_weights_point_downhill(words):
    small = ["model.vf.sizes_hidden=[6]", "model.vf.nb_hidden=2", "diagnostics.alignment=true"]
    config = parse(hydra_config.compose("train", [*words, *small])[0])
    state = training.initial_state(config, [0, 1])
    for _ in range(2):
        state, metrics = training.advance(config, training.prepare(config), state)
    for layer in LAYERS:
        assert np.all(metrics[ANGLE + layer] < 90), layer
    assert np.all(metrics[ANGLE] > 0)  # but not where the gradient does


def test_it_is_measured_of_each_lane_and_changes_nothing():
    words = [
        "model/vf=dale",
        "trainer=lin-thresh",
        "model.vf.sizes_hidden=[6]",
        "model.vf.nb_hidden=2",
    ]
    of = lambda *more: parse(hydra_config.compose("train", [*words, *more])[0])
    plain, observed = of(), of("diagnostics.alignment=true")
    data = training.prepare(plain)
    results = [
        training.advance(config, data, training.initial_state(config, [0, 1]))
        for config in (plain, observed)
    ]
    (state, metrics), (observed_state, with_alignment) = results
    jax.tree.map(np.testing.assert_array_equal, state, observed_state)
    added = with_alignment.keys() - metrics.keys()
    assert added == {name + layer for name in (ANGLE, NORM_RATIO) for layer in LAYERS}
    angles = with_alignment[ANGLE]
    assert angles.shape == (2,) and len({*angles}) == 2 and np.all((angles > 0) & (angles < 90))


@pytest.fixture
def measured(problem):
    """What is measured of a rule in float64, while training is float32."""

    @jax.enable_x64(True)
    def measure(rule, kept=lambda state, parameters: state, **fields):
        family = RULES[rule].family
        small = problem(family=family.name, solver=Newton(1e-12, 60), **fields)
        hyper = hyperparameters().updated(rule=RULES[rule].chosen)
        weak = {"k_p": 1e-6, "k_i": 1e-6}
        hyper = hyper.updated(rule={"norm_fb_weights": 0.0}, controller=weak, g_ei=1.3, g_ie=0.7)
        hyper = jax.tree.map(jnp.asarray, hyper)
        state = family.initial_state(small.architecture, hyper, jax.random.key(0))
        state = kept(state, small.parameters)
        step = jax.jit(alignment, static_argnums=0)
        found = step(small.architecture, small.parameters, state, hyper, small.x, small.target)
        return {name: float(value) for name, value in found.items()}

    return measure


@pytest.mark.parametrize("circuit", ["dale", "non-dale"])
def test_back_propagation_points_where_the_gradient_does(measured, circuit):
    found = measured("bp", circuit=circuit)
    assert {ANGLE + layer for layer in LAYERS} | {NORM_RATIO + layer for layer in LAYERS} == {
        *found
    }
    for layer in LAYERS:
        assert found[ANGLE + layer] == 0
        assert found[NORM_RATIO + layer] == 1


def test_weak_control_of_a_linear_network_points_where_the_gradient_does(measured):
    """The control then is the error, times one number. Interneurons damp every layer by one number,
    1 + g_IE g_EI, which the feedback weights do not know: each layer's angle is 0, but not that of
    all."""
    linear = {"activation_e": "linear", "activation_i": "linear"}
    found = measured("exact-inv", **linear)
    for layer in LAYERS[1:]:
        assert found[ANGLE + layer] < CHANGED
    damping = 1 + 1.3 * 0.7
    ratios = [found[NORM_RATIO + layer] for layer in LAYERS[1:]]
    np.testing.assert_allclose(ratios[0] / ratios[1], damping, rtol=np.radians(CHANGED))
    # With soft rectifiers the damping is each neuron's own: downhill, not straight.
    assert CHANGED < measured("exact-inv")[f"{ANGLE}_0"] < 90


def test_feedback_alignment_on_the_forward_weights_is_back_propagation(measured):
    forward = lambda state, parameters: state._replace(
        layered={name: jnp.asarray(parameters[name]) for name in state.layered}
    )
    found = measured("fa", forward, circuit="non-dale")
    for layer in LAYERS:
        assert found[ANGLE + layer] < 1e-10
        np.testing.assert_allclose(found[NORM_RATIO + layer], 1, rtol=1e-12)
    other = measured("fa", circuit="non-dale")  # on random weights
    assert other[f"{ANGLE}_0"] > CHANGED and other[f"{ANGLE}_out"] < 1e-10
