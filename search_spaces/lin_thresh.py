"""Dis-inhibitory control with a linear-threshold plasticity rule: the inverse is replaced by its
tangent at a running mean of each interneuron's rate."""

from search_spaces.common import feedback, interneurons, log_uniform


def space(trial):
    return {
        "model/vf": "dale",
        "trainer": "lin-thresh",
        **log_uniform(trial, "lin-thresh", "optimizer.learning_rate", 1e-4, 1e-2),
        **interneurons(trial, "lin-thresh"),
        **feedback(trial, "lin-thresh"),
        # Weight of the newest batch in the running mean: 1 forgets all others (published).
        **log_uniform(trial, "lin-thresh", "trainer.avg_inh_lambda", 1e-2, 1.0),
    }
