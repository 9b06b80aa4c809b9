"""Back-propagation through the plain MLP: the bar that the local rules are measured against."""

from search_spaces.common import log_uniform


def space(trial):
    return {
        "model/vf": "non-dale",
        "trainer": "bp",
        **log_uniform(trial, "bp", "optimizer.learning_rate", 1e-4, 1e-2),
    }
