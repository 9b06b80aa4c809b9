"""Which learning rule, and under each rule its own branch.

A study gives every rule the same number of trials (`searcher.balanced`): the question is how good
each one gets when it is tuned equally carefully, not which one wins.
"""

from __future__ import annotations

from disinhib.rules import RULES, Branch


def branches() -> dict[str, Branch]:
    """Of each rule (an option `trainer`) that has one, on the first of its circuits."""
    return {
        name: branch
        for name, rule in RULES.items()
        if (branch := next(iter(rule.circuits.values())).branch) is not None
    }


def space(trial):
    offered = branches()
    return offered[trial.suggest_categorical("trainer", tuple(offered))](trial)
