"""Which learning rule, and under each rule its own branch.

A study gives every rule the same number of trials (`searcher.balanced`): the question is how good
each one gets when it is tuned equally carefully, not which one wins.
"""

from __future__ import annotations

from disinhib.feedback import PATH_OPTIONS, PATHS
from disinhib.rules import RULES, Branch

PAPER = ("bp", "exact-inv", "lin-thresh")  # the rules that the paper compares


def branches() -> dict[str, Branch]:
    """Of each rule (an option `trainer`) that has one, on the first of its circuits."""
    return {
        name: branch
        for name, rule in RULES.items()
        if (branch := next(iter(rule.circuits.values())).branch) is not None
    }


def paper(trial):
    """The rules that the paper compares."""
    return branches()[trial.suggest_categorical("trainer", PAPER)](trial)


def every(trial):
    """All rules, those of plugins too."""
    offered = branches()
    return offered[trial.suggest_categorical("trainer", tuple(offered))](trial)


def feedback_paths(trial):
    """How feedback reaches the interneurons, under each rule that has these paths. (Averaging over
    the batch changes nothing where one matrix serves all samples, on the paths random and learnt.)
    """
    have_paths = {name for name, rule in RULES.items() if {*PATH_OPTIONS} <= {*rule.options}}
    offered = {name: branch for name, branch in branches().items() if name in have_paths}
    rule = trial.suggest_categorical("trainer", tuple(offered))
    overrides = dict(offered[rule](trial))
    path = trial.suggest_categorical(f"{rule}.trainer.feedback", PATHS)
    overrides["trainer.feedback"] = path
    if path == "learnt":
        name = "trainer.feedback_rate"
        overrides[name] = trial.suggest_float(f"{rule}.{name}", 1e-3, 1.0, log=True)
    return overrides
