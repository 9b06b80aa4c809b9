"""Search spaces: what a study may change, each a define-by-run function.

A space takes an `optuna.Trial` and returns Hydra overrides: group choices (`"model/vf": "dale"`)
and dotted options (`"model.vf.g_EI": 1.3`). They go after the overrides that the study itself was
given, so every trial is one command that `python -m disinhib` understands; a study checks that
before its first trial (`disinhib.tuning.space_tree.branches`).

Names in Optuna carry the branch in front (`exact-inv.optimizer.learning_rate`): the same name
always has the same distribution, and what is good for one rule says nothing about another. The
single-rule spaces are the branches that the rules' entries have (`disinhib.rules`), names included,
so a study of one warms up the other; a space of your own is a function, made of the same pieces
(`disinhib.rules.branches`) or not, and an entry in SPACES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from disinhib.rules import BRANCHES, Branch
from search_spaces import rules

if TYPE_CHECKING:
    import optuna

Overrides = Mapping[str, str | float | bool]
Space = Callable[["optuna.Trial"], Overrides]

SPACES: dict[str, Space] = {
    "rules": rules.compared,
    "all_rules": rules.every,
    "feedback_paths": rules.feedback_paths,
}


def offer(branches: Mapping[str, Branch]) -> None:
    """Makes each rule's branch a space of its own."""
    SPACES.update({name.replace("-", "_"): branch for name, branch in branches.items()})


offer(BRANCHES)
