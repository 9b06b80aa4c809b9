"""A student that learns while it runs, against the published run (its notebook's losses)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disinhib.activations import tangent_of_inverse
from disinhib.paper import student_teacher
from disinhib.paper.student_teacher import FORMS, HYPER, RULES

pytestmark = pytest.mark.usefixtures("optimised")
# Of the published run, by (epoch, loss): approximate, exact.
PUBLISHED = {
    (0, "open_loop"): (5.264, 5.264),
    (0, "closed_loop"): (0.00123, 0.00124),
    (0, "control"): (82.99, 86.87),
    (1, "open_loop"): (1.529, 2.976),
    (59, "open_loop"): (0.00143, 0.00293),
    (59, "closed_loop"): (0.000118, 0.000173),
    (59, "control"): (7.964, 11.296),
}


@pytest.fixture(scope="module")
def course():
    return student_teacher.experiment()


def test_the_losses_are_the_published_ones(course):
    for (epoch, loss), published in PUBLISHED.items():
        found = np.asarray(getattr(course.losses, loss))[epoch]
        np.testing.assert_allclose(found, published, rtol=0.03, err_msg=f"{loss}, epoch {epoch}")


def test_control_brings_the_output_to_the_target_before_learning(course):
    half = student_teacher.SAMPLES // 2
    error = np.abs(np.asarray(course.before.output - course.before.target)).max(axis=-1)
    assert error[:, :half].mean() > 1
    assert error[:, half + 200 :].mean() < 0.05  # 0.2 s after it was switched on
    assert np.abs(np.asarray(course.after.output - course.after.target)).mean() < 0.05


def test_both_students_start_equal_and_see_the_same_teacher(course):
    np.testing.assert_array_equal(course.before.output[0], course.before.output[1])
    # After five minutes of steps of their own, to float32's precision.
    np.testing.assert_allclose(course.after.target[0], course.after.target[1], atol=1e-5)
    assert course.losses.open_loop[1, 0] != course.losses.open_loop[1, 1]


def test_the_published_draws_leave_the_process_as_it_was():
    before = jax.config.values["jax_threefry_partitionable"]
    sines, student, teacher = student_teacher.draw()
    assert jax.config.values["jax_threefry_partitionable"] == before
    for value, (low, high) in zip(sines, ((0.1, 1), (0.1, 2), (0, np.pi)), strict=True):
        assert np.all((value >= low) & (value <= high))
    assert not np.array_equal(student.parameters["kernel_0"], teacher.parameters["kernel_0"])
    for q in student.feedback:
        np.testing.assert_allclose(jnp.linalg.norm(q), HYPER.rule["norm_val"], rtol=1e-5)


@pytest.mark.parametrize("lane", range(len(RULES)), ids=RULES)
def test_the_forms_of_delta_differ_as_they_say(lane):
    circuit = student_teacher._circuit()
    u_e, u_i = jnp.asarray([0.5, 1.5, 2.5]), jnp.asarray([1.0, 2.0, 3.0])
    rate = circuit.phi_e.value(u_e)
    published, textbook = (FORMS[form][lane](circuit, u_e, u_i) for form in FORMS)
    estimates = [u_i, u_i]
    if RULES[lane] == "approximate":
        y0 = jnp.asarray(0.5)
        (e, e_slope), (i, i_slope) = (
            tangent_of_inverse(phi, y0) for phi in (circuit.phi_e, circuit.phi_i)
        )
        estimates = [e + e_slope * u_i, i + i_slope * circuit.phi_i.value(u_i)]
    slopes = [circuit.phi_e.derivative(rate), circuit.phi_e.derivative(u_e)]
    for found, estimate, slope in zip((published, textbook), estimates, slopes, strict=True):
        np.testing.assert_allclose(found, (rate - estimate) * slope, rtol=1e-5)
