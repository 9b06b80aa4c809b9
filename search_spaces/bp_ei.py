"""Back-propagation through the E-I network's own steady state (implicit differentiation): the same
network as the local rules train, with the exact gradient instead of theirs."""

from search_spaces.common import interneurons, log_uniform


def space(trial):
    return {
        "model/vf": "dale",
        "trainer": "bp",
        **log_uniform(trial, "bp_ei", "optimizer.learning_rate", 1e-4, 1e-2),
        **interneurons(trial, "bp_ei"),
    }
