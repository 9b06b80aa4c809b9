"""Dis-inhibitory control with the exact inverse of the interneurons' activation."""

from search_spaces.common import feedback, interneurons, log_uniform


def space(trial):
    return {
        "model/vf": "dale",
        "trainer": "exact-inv",
        **log_uniform(trial, "exact-inv", "optimizer.learning_rate", 1e-4, 1e-2),
        **interneurons(trial, "exact-inv"),
        **feedback(trial, "exact-inv"),
    }
