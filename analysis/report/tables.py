"""The tables of a report about its search, as numbers and as a reader sees them, and how a reader
sees numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import selection
from analysis.report.panels.hardness import Hardness, close_to
from analysis.report.panels.plot_data import Row
from analysis.runs import SEARCHED
from analysis.selection import spent
from disinhib.metrics import Criterion
from disinhib.tuning import space_tree
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED
from disinhib.tuning.space_tree import RULE

NOTHING = "–"


def search(trials: pd.DataFrame, metric: Criterion) -> pd.DataFrame:
    """The search budget of each rule. Columns: rule, trials, complete, pruned, failed, epochs (over
    all seeds), hours (of all trials), best (score of a complete trial; NaN if none is)."""
    rows = []
    for rule, group in trials.groupby("rule", sort=False):
        scores = metric.sign * group["score"][group["state"] == COMPLETE]
        rows.append(
            {
                "rule": rule,
                "trials": len(group),
                **{state: sum(group["state"] == state) for state in (COMPLETE, PRUNED, FAILED)},
                "epochs": spent(group.to_dict("records")),
                "hours": sum(group["seconds"]) / 3600,
                "best": metric.sign * scores.max(),
            }
        )
    return pd.DataFrame(rows)


def winners(
    trials: pd.DataFrame, retrained: pd.DataFrame, defaults: Iterable[str], metric: Criterion
) -> list[Row]:
    """The trials that were retrained or, if none was, the best complete one of each rule and
    repeat; in the order of their numbers. The published `defaults` (their runs) are not among them,
    unless they are the best."""
    complete = [row for row in trials.to_dict("records") if row["state"] == COMPLETE]
    best: dict[tuple[str, int], Row] = {}
    for row in complete:  # of equals, the first
        key = row["rule"], row["repeat"]
        if key not in best or metric.sign * (row["score"] - best[key]["score"]) > 0:
            best[key] = row
    by_number = sorted(best.values(), key=lambda row: row["trial"])
    own = {row["run_id"] for row in by_number}
    again = set() if retrained.empty else {*retrained["of_run"]} - ({*defaults} - own)
    return [row for row in complete if row["run_id"] in again] or by_number


def chosen(rows: Sequence[Row], space: Mapping[str, Any]) -> pd.DataFrame:
    """What the search has chosen: for each trial of `rows`, the values of its searched parameters.
    Columns: rule, trial, option, value, searched (its range), published default; texts."""
    texts = []
    for row in rows:
        published = selection.published(row["rule"])
        for name, kind in space["parameters"].items():
            value, option = row.get(SEARCHED + name), space_tree.option_of(name)
            if name == RULE or not isinstance(value, str):  # else not searched by this trial
                continue
            texts.append(
                {
                    "rule": row["rule"],
                    "trial": str(row["trial"]),
                    "option": option,
                    "value": _plain(value),
                    "searched": space_tree.words(kind),
                    "published default": _plain(str(published.get(option, NOTHING))),
                }
            )
    return pd.DataFrame(texts)


def _plain(value: str) -> str:
    """A number to four digits, any other value as it is."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def number(value: float, form: str = ".2f") -> str:
    return NOTHING if math.isnan(value) else format(value, form).replace("-", "−")


def interval(low: float, high: float, form: str = ".2f") -> str:
    return NOTHING if math.isnan(low) else f"[{number(low, form)}, {number(high, form)}]"


def shown_search(numbers: pd.DataFrame) -> pd.DataFrame:
    """`search` as a reader sees it."""
    texts = numbers.astype(str)
    texts[["hours", "best"]] = numbers[["hours", "best"]].map(number)
    return texts.rename(columns={"best": "best validation score"})


def shown_hardness(rows: Sequence[Hardness], target: float, metric: Criterion) -> pd.DataFrame:
    """How hard each rule is to tune, as a reader sees it."""
    _, close = close_to(1.0, metric)
    columns = {
        "rule": [row.rule for row in rows],
        "searched parameters": [str(row.parameters) for row in rows],
        f"within {close} of its best": [f"{row.close} of {row.tried}" for row in rows],
        "one in": [number(row.tried / row.close if row.close else math.nan, ".1f") for row in rows],
        f"trials to {target:.4g}": [number(row.trials, ".1f") for row in rows],
        "epochs to it": [number(row.epochs, ".0f") for row in rows],
        "seconds of training to it": [number(row.seconds, ".3g") for row in rows],
    }
    empty = [name for name, texts in columns.items() if set(texts) == {NOTHING}]
    return pd.DataFrame(columns).drop(columns=empty)
