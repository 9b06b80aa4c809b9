"""The table: every case, by the kind of its hostility."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

from benchmarks.hostile import (
    addresses,
    descriptors,
    environments,
    folders,
    signals,
    stores,
    values,
)
from benchmarks.hostile.case import Case
from disinhib.errors import InputError


def chosen(only: str | None, number: int | None, seed: int) -> list[Case]:
    """The cases whose names match; without a pattern, `number` of all (None: all), of each kind its
    share, drawn by `seed` as the moments of signals are.

    Raises InputError if there is none.
    """
    kinds = [
        values.cases(),
        addresses.cases(),
        stores.cases(),
        environments.cases(),
        folders.cases(),
        descriptors.cases(),
        signals.cases(seed),
    ]
    every = [case for kind in kinds for case in kind]
    twice = [name for name, times in Counter(case.name for case in every).items() if times > 1]
    assert not twice, f"names that are there twice: {twice}"
    if only is None:
        rng, share = random.Random(seed), 1.0 if number is None else number / len(every)
        drawn = (rng.sample(kind, min(len(kind), math.ceil(share * len(kind)))) for kind in kinds)
        return [case for kind in drawn for case in kind]
    try:
        found = [case for case in every if re.search(only, case.name)]
    except re.error as error:
        raise InputError(f"only: given {only}, allowed is a regular expression ({error})") from None
    if not found:
        raise InputError(f"only: given {only}, which no name of {len(every)} has (list=true)")
    return found
