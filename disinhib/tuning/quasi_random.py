"""Quasi-random points (`searcher=qmc`): trials that cover the space evenly and learn nothing.

The trials of a rule are the points of one scrambled Sobol sequence (Sobol 1967; scrambled after
Matoušek 1998, by SciPy). It has a coordinate for every parameter of the rule's branch; a trial
takes those of the parameters that its choices lead to.

Optuna's own QMCSampler does not fit: it takes the parameters of a study's first trial for the
whole space, and counts its points in the study's attributes, so a study that is rebuilt for every
proposal gets the same point each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from scipy.stats import qmc

from disinhib.tuning import space_tree, suggest
from disinhib.tuning.space_tree import RULE, Distribution, Params
from disinhib.tuning.turns import Turn
from search_spaces import Space


def points(
    space: Space, study_seed: int, rules: Sequence[str] = (), repeats: int = 1
) -> Callable[[Turn], Params]:
    """(turn) -> the point of its trial: of the sequence of its repeat and rule if it is the turn of
    one of `rules`, else of its repeat's sequence for the whole space, the choice of the rule
    included.

    Where a point is given, the sequence's own is left out.
    """
    kinds = {rule: dimensions(space, rule) for rule in rules or [None]}
    sequences = [*product(kinds, range(1, repeats + 1))]

    def of(turn: Turn) -> Params:
        seed = suggest.sequence_seed(study_seed, sequences.index((turn.rule, turn.repeat)))
        return point(kinds[turn.rule], seed, turn.index)

    return of


def dimensions(space: Space, rule: str | None) -> dict[str, Distribution]:
    """The parameters of a rule's branch of `space`, under any of its choices; without a rule, those
    of the whole space. Runs the space for each combination of choices."""
    fixed = {} if rule is None else {RULE: rule}
    reached = space_tree.at_ends(space, fixed)
    kinds = {name: kind for path in reached for name, kind in path.distributions.items()}
    return {name: kind for name, kind in kinds.items() if name not in fixed}


def point(dimensions: Mapping[str, Distribution], seed: int, index: int) -> Params:
    """Point `index` (from 0) of the sequence that `seed` scrambles."""
    if not dimensions:
        return {}
    sequence = qmc.Sobol(len(dimensions), rng=np.random.default_rng(seed))
    if index:
        sequence.fast_forward(index)
    (shares,) = sequence.random(1)
    return {
        name: value_at(kind, float(share))
        for (name, kind), share in zip(dimensions.items(), shares, strict=True)
    }


def value_at(distribution: Distribution, share: float) -> Any:
    """The value at a `share`, 0 to 1 (excluded), of a range on its scale. Choices and values in
    steps have equal shares; whole numbers on a logarithmic scale, those of their neighbourhoods.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        around = 0 if step is None else 0.5
        ends = math.log(low - around), math.log(high + around)
        value = math.exp(ends[0] + share * (ends[1] - ends[0]))
        return min(max(value if step is None else round(value), low), high)
    if step is None:
        return min(low + share * (high - low), high)
    # In decimals, as Optuna does: 0.1 + 2 * 0.1 is 0.3.
    first, width = Decimal(str(low)), Decimal(str(step))
    count = int((Decimal(str(high)) - first) / width) + 1
    return type(low)(first + int(share * count) * width)
