"""Which learning rule, and under each rule its own branch.

A study gives every rule the same number of trials (`searcher.balanced`): the question is how good
each one gets when it is tuned equally carefully, not which one wins.
"""

from search_spaces import bp, exact_inv, lin_thresh

BRANCHES = {
    "bp": bp.space,
    "exact-inv": exact_inv.space,
    "lin-thresh": lin_thresh.space,
}


def space(trial):
    rule = trial.suggest_categorical("trainer", tuple(BRANCHES))
    return BRANCHES[rule](trial)
