"""The tables of a report, as numbers and as a reader sees them.

Accuracies are in %. `n` counts the seeds that ran their whole budget; diverged ones are counted
separately and excluded from the means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd

from analysis import stats
from analysis.report.panels.plot_data import Row, grouped, records
from analysis.runs import SEARCHED
from analysis.selection import spent
from disinhib import hydra_config
from disinhib.checks import flatten
from disinhib.metrics import Criterion
from disinhib.rules import RULES, reported_name
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
    rule), key.
    """
    groups = grouped(records(retrained), lambda row: row["of_run"] or row["configuration"])
    tried = trials.to_dict("records")
    scores = {row["run_id"]: row["score"] for row in tried}
    rows = []
    for key, seeds in groups.items():
        first = seeds[0]
        test, valid, score = (
            stats.summary([*_by_seed(seeds, name).values()]) for name in (TEST, VALID, metric)
        )
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
                "gap": tuned - score.mean,
                "search_trials": len(same_rule),
                "search_epochs": spent(same_rule),
                "key": key,
            }
        )
    rows.sort(key=lambda r: (r["dataset"], r["depth"], r["rule"], r["feedback"], r["epochs"]))
    return pd.DataFrame(rows)


def _by_seed(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Of the seeds that ran their whole budget."""
    return {row["seed"]: row[metric] for row in rows if row["state"] == COMPLETE}


def _reference(groups: Mapping[str, Sequence[Row]], row: Row) -> Sequence[Row]:
    """The seeds of back-propagation that `row` is compared with; of several configurations the one
    that is best on validation data. Empty if there are none."""
    candidates = [
        seeds
        for seeds in groups.values()
        if seeds[0]["rule"] == REFERENCE
        and all(seeds[0][name] == row[name] for name in ("dataset", "depth", "budget"))
        and _by_seed(seeds, TEST)
    ]
    mean = lambda seeds: stats.summary([*_by_seed(seeds, VALID).values()]).mean
    return max(candidates, key=mean, default=())


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


def winners(trials: pd.DataFrame, retrained: pd.DataFrame, metric: Criterion) -> list[Row]:
    """The trials that were retrained or, if none was, the best complete one of each rule; in the
    order of their numbers."""
    complete = [row for row in trials.to_dict("records") if row["state"] == COMPLETE]
    selected = set() if retrained.empty else {*retrained["of_run"]}
    if chosen := [row for row in complete if row["run_id"] in selected]:
        return chosen
    best: dict[str, Row] = {}
    for row in complete:  # of equals, the first
        if row["rule"] not in best or metric.sign * (row["score"] - best[row["rule"]]["score"]) > 0:
            best[row["rule"]] = row
    return sorted(best.values(), key=lambda row: row["trial"])


def chosen(rows: Sequence[Row], space: Mapping[str, Any]) -> pd.DataFrame:
    """What the search has chosen: for each trial of `rows`, the values of its searched parameters.
    Columns: rule, trial, option, value, searched (its range), published default; texts."""
    texts = []
    for row in rows:
        published = _published(row["rule"])
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


@cache
def _published(rule: str) -> Mapping[str, Any]:
    """The published defaults of a rule, by option; of one that this version lacks, none."""
    for trainer, entry in RULES.items():
        for circuit in entry.circuits:
            if reported_name(trainer, circuit) == rule:
                groups = [f"trainer={trainer}", f"model/vf={circuit}"]
                return flatten(hydra_config.compose(hydra_config.TRAINING, groups)[0])
    return {}


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
        "95 % interval": [_interval(row["test_low"], row["test_high"]) for row in rows],
        "validation": [_spread(row, "valid") for row in rows],
        "test minus bp": [_number(row["bp_mean"], "+.2f") for row in rows],
        "its 95 % interval": [_interval(row["bp_low"], row["bp_high"], "+.2f") for row in rows],
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


def _interval(low: float, high: float, form: str = ".2f") -> str:
    return NOTHING if math.isnan(low) else f"[{_number(low, form)}, {_number(high, form)}]"


def shown_search(numbers: pd.DataFrame) -> pd.DataFrame:
    """`search` as a reader sees it."""
    texts = numbers.astype(str)
    texts[["hours", "best"]] = numbers[["hours", "best"]].map(_number)
    return texts.rename(columns={"best": "best validation score"})
