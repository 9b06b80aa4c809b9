"""The numbers behind the plots, and what several plots compute from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from analysis import runs
from disinhib.metrics import Criterion
from disinhib.tuning.space_tree import RULE, option_of

FAR = 3.0  # see `fence`
Row = dict[str, Any]
T = TypeVar("T")


class PlotData(NamedTuple):
    """All numbers that the figures of a report are drawn from."""

    metric: Criterion  # of metrics.SELECTION, the study's
    space: Mapping[str, Any] | None  # space_tree.definition; None if nothing was searched
    trials: pd.DataFrame  # runs.trials, and where known training_seconds
    retrained: pd.DataFrame  # runs.retrained
    # runs.curves of the retrained seeds, of the metrics retraining.CURVES and of the alignment (if
    # there are none, of the alignment of the best trials)
    curves: pd.DataFrame
    labels: Mapping[str, str]  # by `configuration`, as in the tables
    scores: pd.DataFrame  # runs.curves of the trials, of the study's metric
    defaults: Sequence[str] = ()  # runs of the trials with the published defaults
    adaptive: str | None = None  # the sampler, if it learns from the scores


class Setting(NamedTuple):
    """The value of one parameter in one trial."""

    name: str
    parameter: Row  # of runs.parameters_of
    position: float  # in its range: 0 is the low, 1 the high edge
    trial: Row  # of trials_of


def records(table: pd.DataFrame) -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """In the order in which the keys first come."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def configuration(seed: Row) -> str:
    """What tells the configuration of a retrained seed from others: the run of its trial or, of a
    grid, the hash of its options. (In several repeats, trials may have the same options.)"""
    return seed["of_run"] or seed["configuration"]


def trials_of(data: PlotData) -> dict[str, list[Row]]:
    """The trials of each rule: rows of runs.trials, and `merit`, their score with the sign that
    makes more better."""
    rows = records(data.trials)
    for row in rows:
        row["merit"] = data.metric.sign * row["score"]
    return grouped(rows, lambda row: row["rule"])


def settings(data: PlotData) -> dict[str, list[Setting]]:
    """The settings of each rule's trials, without the choice of the rule itself."""
    space, settings = data.space or {"parameters": {}}, {}
    for rule, rows in trials_of(data).items():
        searched = [runs.parameters_of(space, row) for row in rows]
        names = short_names(sorted(set[str]().union(*searched) - {RULE}))
        settings[rule] = [
            Setting(short, parameters[name], position_in_range(parameters[name]), row)
            for row, parameters in zip(rows, searched, strict=True)
            for name, short in names.items()
            if name in parameters
        ]
    return settings


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Parameters by the option that they set, or by their full name if two of them set the same."""
    options = Counter(map(option_of, names))
    return {name: option_of(name) if options[option_of(name)] == 1 else name for name in names}


def position_in_range(parameter: Mapping[str, Any]) -> float:
    """As runs.position; choices are spaced evenly, in their order."""
    if parameter["kind"] != "categorical":
        return runs.position(parameter)
    choices = parameter["choices"]
    return choices.index(parameter["value"]) / (len(choices) - 1) if len(choices) > 1 else 0.5


def fence(merits: Sequence[float]) -> float:
    """The lowest merit that is drawn where it is: at most FAR times as far below the median as the
    best lies above it. Trials that learned nothing would otherwise squeeze all others together."""
    median = float(np.median(merits))
    return min(merit for merit in merits if merit >= median - FAR * (max(merits) - median))
