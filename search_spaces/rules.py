"""Which learning rule, and under each rule its own branch.

A study gives every rule the same number of trials (`searcher.balanced`): the question is how good
each one gets when it is tuned equally carefully, not which one wins.
"""

from __future__ import annotations

from disinhib.feedback import PATH_OPTIONS, PATHS
from disinhib.rules import BRANCHES, RULES

# The paper compares bp, exact-inv and lin-thresh. bp-ei, the exact gradient in the circuit of the
# other two, tells what the circuit loses (bp minus bp-ei) from what the rule does (bp-ei minus it).
COMPARED = ("bp", "bp-ei", "exact-inv", "lin-thresh")


def compared(trial):
    """The rules that the paper compares, and back-propagation through their circuit."""
    return BRANCHES[trial.suggest_categorical("trainer", COMPARED)](trial)


def every(trial):
    """All rules, those of plugins too."""
    return BRANCHES[trial.suggest_categorical("trainer", tuple(BRANCHES))](trial)


def feedback_paths(trial):
    """How feedback reaches the interneurons, under each rule that has these paths. (Averaging over
    the batch changes nothing where one matrix serves all samples, on the paths random and learnt.)
    """
    have_paths = [name for name, rule in RULES.items() if {*PATH_OPTIONS} <= {*rule.options}]
    rule = trial.suggest_categorical("trainer", [name for name in have_paths if name in BRANCHES])
    overrides = dict(BRANCHES[rule](trial))
    path = trial.suggest_categorical(f"{rule}.trainer.feedback", PATHS)
    overrides["trainer.feedback"] = path
    if path == "learnt":
        name = "trainer.feedback_rate"
        overrides[name] = trial.suggest_float(f"{rule}.{name}", 1e-3, 1.0, log=True)
    return overrides
