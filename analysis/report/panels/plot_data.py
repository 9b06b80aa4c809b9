"""What the figures of a study are drawn from, and what several of them compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from analysis import runs
from disinhib.tuning.space_tree import RULE, option_of

BEST = {"max": max, "min": min}  # of scores, by the mode
WORST = {"max": min, "min": max}
FAR = 3.0  # see `fence`
NOTHING = {"parameters": {}, "branches": []}  # a space in which nothing is searched
Row = dict[str, Any]
T = TypeVar("T")


class Material(NamedTuple):
    """All that a report's figures are drawn from."""

    metric: str  # of drawing.SCORES
    mode: str  # "max" or "min"
    space: Mapping[str, Any] | None  # spaces.definition; None if nothing was searched
    trials: pd.DataFrame  # rows of runs.trials
    retrained: pd.DataFrame  # rows of runs.retrained
    curves: pd.DataFrame  # runs.curves of the retrained, for retraining.CURVES
    labels: Mapping[str, str]  # of configurations, as in tables


class Setting(NamedTuple):
    """A parameter of a trial."""

    name: str
    about: Row  # of runs.parameters_of
    place: float  # in its range: 0 the low, 1 the high edge
    trial: Row  # of runs.trials


def records(table: pd.DataFrame) -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """In the order in which the keys first come."""
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def trials_of(material: Material) -> dict[str, list[Row]]:
    """Rows of the trials of each rule."""
    return grouped(records(material.trials), lambda row: row["rule"])


def settings(material: Material) -> dict[str, list[Setting]]:
    """Of each rule, without the choice of the rule itself."""
    found = {}
    for rule, rows in trials_of(material).items():
        about = [(row, runs.parameters_of(material.space or NOTHING, row)) for row in rows]
        names = short_names(sorted({name for _, its in about for name in its} - {RULE}))
        found[rule] = [
            Setting(names[name], its[name], place(its[name]), row)
            for row, its in about
            for name in names
            if name in its
        ]
    return found


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What parameters are called: the options that they move, where no two move the same."""
    options = Counter(map(option_of, names))
    return {name: option_of(name) if options[option_of(name)] == 1 else name for name in names}


def place(parameter: Mapping[str, Any]) -> float:
    """As runs.position, and for choices: evenly, in their order."""
    if parameter["kind"] != "categorical":
        return runs.position(parameter)
    choices = parameter["choices"]
    return choices.index(parameter["value"]) / (len(choices) - 1) if len(choices) > 1 else 0.5


def fence(scores: Sequence[float], mode: str) -> float:
    """The worst of the scores that is drawn where it is: not farther from the median than FAR times
    the best. Trials that learnt nothing would press all others into one line."""
    if mode == "min":
        return -fence([-score for score in scores], "max")
    median = float(np.median(scores))
    return min(score for score in scores if score >= median - FAR * (max(scores) - median))
