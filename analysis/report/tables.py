"""The tables of a report, as numbers and as a reader sees them.

Accuracies are in %. `n` counts the seeds that ran their whole budget; diverged ones are counted
separately and excluded from the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from analysis import selection, stats
from analysis.report.panels.hardness import Hardness, close_to
from analysis.report.panels.plot_data import Row, grouped, records
from analysis.runs import SEARCHED
from analysis.selection import spent
from disinhib.metrics import Criterion
from disinhib.tuning import space_tree
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED
from disinhib.tuning.space_tree import RULE

REFERENCE = "bp"  # what every rule is compared with
TEST, VALID = "test_accuracy", "valid_accuracy"
NOTHING = "–"


def results(
    retrained: pd.DataFrame, trials: pd.DataFrame, metric: str = "valid_accuracy"
) -> pd.DataFrame:
    """A row for each retrained configuration.

    Columns: dataset, rule, depth, feedback, trial (NaN if none was selected), epochs, n, diverged,
    flagged (seeds that failed the check of the dynamics), test_mean, test_sd, test_low, test_high,
    valid_mean, valid_sd, bp_mean, bp_low, bp_high, bp_paired (difference of test accuracy to bp on
    the same data with the same depth and epochs), tuned (the trial's score in the search), gap
    (that minus the mean of `metric` over the fresh seeds), search_trials and search_epochs (of the
    rule), configuration (a hash of its options, the same in every store).
    """
    groups = configurations(retrained)
    tried = trials.to_dict("records")
    scores = {row["run_id"]: row["score"] for row in tried if row["state"] == COMPLETE}
    rows = []
    for seeds in groups.values():
        first = seeds[0]
        test, valid = (stats.summary([*_by_seed(seeds, n).values()]) for n in (TEST, VALID))
        score = stats.mean(_by_seed(seeds, metric).values())
        bp = _reference(groups, first)
        compared = bool(bp) and bp is not seeds
        versus = stats.difference(_by_seed(seeds, TEST), _by_seed(bp if compared else (), TEST))
        tuned = scores.get(first["of_run"], math.nan)
        same_rule = [row for row in tried if row["rule"] == first["rule"]]
        rows.append(
            {
                "dataset": first["dataset"],
                "rule": first["rule"],
                "depth": first["depth"],
                "feedback": first["feedback"],
                "trial": first["trial"],
                "epochs": first["budget"],
                "n": test.n,
                "diverged": sum(seed["state"] == FAILED for seed in seeds),
                "flagged": sum(bool(seed["flag"]) for seed in seeds),
                "test_mean": test.mean,
                "test_sd": test.sd,
                "test_low": test.interval.low,
                "test_high": test.interval.high,
                "valid_mean": valid.mean,
                "valid_sd": valid.sd,
                "bp_mean": versus.mean,
                "bp_low": versus.interval.low,
                "bp_high": versus.interval.high,
                "bp_paired": versus.paired if compared else None,
                "tuned": tuned,
                "gap": tuned - score,
                "search_trials": len(same_rule),
                "search_epochs": spent(same_rule),
                "configuration": first["configuration"],
            }
        )
    rows.sort(key=lambda r: (r["dataset"], r["depth"], r["rule"], r["feedback"], r["epochs"]))
    return pd.DataFrame(rows)


def configurations(retrained: pd.DataFrame) -> dict[str, list[Row]]:
    """The seeds of each retrained configuration."""
    return grouped(records(retrained), lambda row: row["of_run"] or row["configuration"])


def _by_seed(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Of the seeds that ran their whole budget."""
    return {row["seed"]: row[metric] for row in rows if row["state"] == COMPLETE}


def _reference(groups: Mapping[str, Sequence[Row]], row: Row) -> Sequence[Row]:
    """The seeds of back-propagation that `row` is compared with; of several configurations the
    best. Empty if there are none."""
    candidates = [
        seeds
        for seeds in groups.values()
        if seeds[0]["rule"] == REFERENCE
        and all(seeds[0][name] == row[name] for name in ("dataset", "depth", "budget"))
        and _by_seed(seeds, TEST)
    ]
    return max(candidates, key=_valid, default=())


def _valid(seeds: Sequence[Row]) -> float:
    """The mean on validation data, by which configurations without a search are compared."""
    values = _by_seed(seeds, VALID).values()
    return stats.mean(values) if values else -math.inf


class Pair(NamedTuple):
    """Two retrained configurations of a rule, by their seeds."""

    first: Sequence[Row]
    second: Sequence[Row]


def selected(groups: Iterable[Sequence[Row]], trials: pd.DataFrame, metric: Criterion) -> list[Row]:
    """Of some configurations the one that was selected: the best in the search or, without one, on
    validation data."""
    complete = [row for row in trials.to_dict("records") if row["state"] == COMPLETE]
    merits = {row["run_id"]: metric.sign * row["score"] for row in complete}
    merit = lambda seeds: (merits.get(seeds[0]["of_run"], -math.inf), _valid(seeds))
    return list(max(groups, key=merit))


def differences(pairs: Iterable[Pair]) -> pd.DataFrame:
    """The difference of test accuracy of two configurations, first minus second, a row for each
    pair. Columns: dataset, rule, paired (by seed: of the same seeds and depth), mean, low, high
    (NaN where there is none), n (stats.Difference), and of either configuration `first_` and
    `second_` depth, feedback, trial, epochs, test_mean, test_sd, n."""
    rows = []
    for pair in pairs:
        first, second = (_by_seed(seeds, TEST) for seeds in pair)
        alike = pair.first[0]["depth"] == pair.second[0]["depth"]
        difference = (stats.difference if alike else stats.unpaired_difference)(first, second)
        row = {
            "dataset": pair.first[0]["dataset"],
            "rule": pair.first[0]["rule"],
            "paired": difference.paired,
            "mean": difference.mean,
            "low": difference.interval.low,
            "high": difference.interval.high,
            "n": difference.n,
        }
        for which, seeds, own in zip(Pair._fields, pair, (first, second), strict=True):
            test = stats.summary([*own.values()])
            its = {name: seeds[0][name] for name in ("depth", "feedback", "trial")}
            its |= {"epochs": seeds[0]["budget"], "test_mean": test.mean, "test_sd": test.sd}
            row |= {f"{which}_{name}": value for name, value in {**its, "n": test.n}.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def shown_differences(numbers: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """`differences` as a reader sees them; `first` and `second` are what is compared."""
    rows = numbers.to_dict("records")
    names = dict(zip(Pair._fields, (first, second), strict=True))
    columns = {"rule": [row["rule"] for row in rows]}
    for name, title in (("depth", "hidden layers"), ("feedback", "feedback"), ("epochs", "epochs")):
        both = [[str(row[f"{which}_{name}"]) for which in names] for row in rows]
        columns[title] = [", ".join(dict.fromkeys(values)) for values in both]
    for which, title in names.items():
        columns[f"{title}: trial"] = [_number(row[f"{which}_trial"], ".0f") for row in rows]
        columns[f"{title}: test accuracy (n)"] = [
            f"{_spread(row, f'{which}_test')} ({row[f'{which}_n']})" for row in rows
        ]
    columns[f"{first} minus {second}"] = [_number(row["mean"], "+.2f") for row in rows]
    columns["its 95 % interval"] = [interval(row["low"], row["high"], "+.2f") for row in rows]
    columns["compared"] = ["paired by seed" if row["paired"] else "unpaired" for row in rows]
    empty = [name for name, texts in columns.items() if set(texts) == {NOTHING}]
    return pd.DataFrame(columns).drop(columns=[name for name in empty if name.endswith("trial")])


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
    """The trials that were retrained or, if none was, the best complete one of each rule; in the
    order of their numbers. The published `defaults` (their runs) are not among them, unless they
    are the best."""
    complete = [row for row in trials.to_dict("records") if row["state"] == COMPLETE]
    best: dict[str, Row] = {}
    for row in complete:  # of equals, the first
        if row["rule"] not in best or metric.sign * (row["score"] - best[row["rule"]]["score"]) > 0:
            best[row["rule"]] = row
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


def shown(numbers: pd.DataFrame) -> pd.DataFrame:
    """`results` as a reader sees them: texts, to two decimals, without empty columns."""
    rows = numbers.to_dict("records")
    columns: dict[str, list[str]] = {
        "rule": [row["rule"] for row in rows],
        "hidden layers": [str(row["depth"]) for row in rows],
        "feedback": [row["feedback"] for row in rows],
        "trial": [_number(row["trial"], ".0f") for row in rows],
        "epochs": [str(row["epochs"]) for row in rows],
        "test accuracy (n)": [f"{_spread(row, 'test')} ({row['n']})" for row in rows],
        "95 % interval": [interval(row["test_low"], row["test_high"]) for row in rows],
        "validation": [_spread(row, "valid") for row in rows],
        "test minus bp": [_number(row["bp_mean"], "+.2f") for row in rows],
        "its 95 % interval": [interval(row["bp_low"], row["bp_high"], "+.2f") for row in rows],
        "tuned": [_number(row["tuned"]) for row in rows],
        "tuned minus retrained": [_number(row["gap"], "+.2f") for row in rows],
        "diverged": [str(row["diverged"]) for row in rows],
        "flagged": [str(row["flagged"]) for row in rows],
    }
    optional = ("trial", "test minus bp", "its 95 % interval", "tuned", "tuned minus retrained")
    empty = [name for name in optional if set(columns[name]) == {NOTHING}]
    return pd.DataFrame(columns).drop(columns=empty)


def _number(value: float, form: str = ".2f") -> str:
    return NOTHING if math.isnan(value) else format(value, form).replace("-", "−")


def _spread(row: Row, what: str) -> str:
    return f"{_number(row[f'{what}_mean'])} ± {_number(row[f'{what}_sd'])}"


def interval(low: float, high: float, form: str = ".2f") -> str:
    return NOTHING if math.isnan(low) else f"[{_number(low, form)}, {_number(high, form)}]"


def shown_search(numbers: pd.DataFrame) -> pd.DataFrame:
    """`search` as a reader sees it."""
    texts = numbers.astype(str)
    texts[["hours", "best"]] = numbers[["hours", "best"]].map(_number)
    return texts.rename(columns={"best": "best validation score"})


def shown_hardness(rows: Sequence[Hardness], target: float, metric: Criterion) -> pd.DataFrame:
    """How hard each rule is to tune, as a reader sees it."""
    _, close = close_to(1.0, metric)
    columns = {
        "rule": [row.rule for row in rows],
        "searched parameters": [str(row.parameters) for row in rows],
        f"within {close} of its best": [f"{row.close} of {row.tried}" for row in rows],
        "one in": [
            _number(row.tried / row.close if row.close else math.nan, ".1f") for row in rows
        ],
        f"trials to {target:.4g}": [_number(row.trials, ".1f") for row in rows],
        "epochs to it": [_number(row.epochs, ".0f") for row in rows],
        "seconds of training to it": [_number(row.seconds, ".3g") for row in rows],
    }
    empty = [name for name, texts in columns.items() if set(texts) == {NOTHING}]
    return pd.DataFrame(columns).drop(columns=empty)
