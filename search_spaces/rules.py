"""Which learning rule, and under each rule its own branch.

A study gives every rule the same number of trials (`searcher.balanced`): the question is how good
each one gets when it is tuned equally carefully, not which one wins.
"""

from __future__ import annotations

from disinhib.rules import RULES, Branch

# Of each rule (an option `trainer`) that has one, on the first of its circuits.
BRANCHES: dict[str, Branch] = {
    name: branch
    for name, rule in RULES.items()
    if (branch := next(iter(rule.circuits.values())).branch) is not None
}


def space(trial):
    rule = trial.suggest_categorical("trainer", tuple(BRANCHES))
    return BRANCHES[rule](trial)
