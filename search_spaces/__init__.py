"""Search spaces: what a study may change, one define-by-run function a file.

A space takes an `optuna.Trial` and returns Hydra overrides: group choices (`"model/vf": "dale"`)
and dotted options (`"model.vf.g_EI": 1.3`). They go after the overrides that the study itself was
given, so every trial is one command that `python -m disinhib` understands; a study checks that
before its first trial (`disinhib.tuning.space_tree.branches`).

Names in Optuna carry the branch in front (`exact-inv.optimizer.learning_rate`): the same name
always has the same distribution, and what is good for one rule says nothing about another. The
single-rule spaces are the branches of `rules`, names included, so a study of one warms up the
other.
"""

from collections.abc import Callable, Mapping

import optuna

from search_spaces import bp, bp_ei, exact_inv, lin_thresh, rules

Overrides = Mapping[str, str | float | bool]
Space = Callable[[optuna.Trial], Overrides]

SPACES: dict[str, Space] = {
    "rules": rules.space,
    "bp": bp.space,
    "bp_ei": bp_ei.space,
    "exact_inv": exact_inv.space,
    "lin_thresh": lin_thresh.space,
}
