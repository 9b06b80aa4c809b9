"""The tables of accuracies, as numbers and as a reader sees them.

Accuracies are in %. A row is a rule as it was tuned and retrained: one configuration, or with
several repeats of the tuning the one that each of them selected. `n` counts the networks, over all
repeats, that ran their whole budget; diverged ones are counted separately and excluded from the
means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import pandas as pd

from analysis import stats
from analysis.report.panels.plot_data import Row, grouped, records
from analysis.report.tables import NOTHING, interval, number
from analysis.runs import TEST_IMAGES
from analysis.selection import spent
from analysis.stats import Values
from disinhib.metrics import Criterion
from disinhib.tuning.event_log import COMPLETE, FAILED

REFERENCE = "bp"  # what every rule is compared with
TEST, VALID = "test_accuracy", "valid_accuracy"
# The columns that tell rows of a rule apart, and what a reader sees.
NAMES = {"depth": "hidden layers", "feedback": "feedback", "trial": "trial", "epochs": "epochs"}

Seeds = Sequence[Row]  # of a table's row: rows of `runs.retrained`


def tunings(
    retrained: pd.DataFrame,
    trials: pd.DataFrame,
    metric: Criterion,
    defaults: Iterable[str] = (),
) -> list[Seeds]:
    """The seeds of each row: of each configuration or, if there are several repeats, of the best
    one of every repeat (then of every second best, and so on). Those of the published `defaults`,
    by their runs, are a row of their own if they were retrained beside others, and among the best
    where nothing else was.
    """
    merit, apart = _merit(trials, metric), {*defaults}
    by_configuration = grouped(
        records(retrained), lambda row: row["of_run"] or row["configuration"]
    )
    rows: list[Seeds] = []
    key = lambda seeds: tuple(seeds[0][name] for name in ("dataset", "rule", "depth", "budget"))
    for own in grouped(by_configuration.values(), key).values():
        of_repeats = grouped(own, lambda seeds: seeds[0]["repeat"])
        if len(of_repeats) == 1:
            rows += own
            continue
        ranked, beside = [], False
        for _, configurations in sorted(of_repeats.items()):
            searched = [seeds for seeds in configurations if seeds[0]["of_run"] not in apart]
            ranked.append(sorted(searched or configurations, key=merit, reverse=True))
            beside |= 0 < len(searched) < len(configurations)
        merged = [[*chain(*equal)] for equal in zip_longest(*ranked, fillvalue=())]
        of_defaults = [seed for seeds in own if seeds[0]["of_run"] in apart for seed in seeds]
        rows += [*merged, *([of_defaults] if beside else [])]
    return rows


def _merit(trials: pd.DataFrame, metric: Criterion) -> Callable[[Seeds], tuple[float, float]]:
    """What seeds are selected by: the score in the search or, without one, on validation data."""
    scores = _scores(trials)

    def merit(seeds: Seeds) -> tuple[float, float]:
        own = [metric.sign * scores[run] for run in _runs(seeds) if run in scores]
        return stats.mean(own) if own else -math.inf, _valid(seeds)

    return merit


def _scores(trials: pd.DataFrame) -> dict[str, float]:
    return {row["run_id"]: row["score"] for row in records(trials) if row["state"] == COMPLETE}


def _searched(seeds: Seeds, scores: Mapping[str, float]) -> bool:
    return all(run in scores for run in _runs(seeds))


def _runs(seeds: Seeds) -> list[str]:
    """Of the trials that they retrain, one of each repeat."""
    return list(dict.fromkeys(seed["of_run"] for seed in seeds))


def _values(seeds: Seeds, metric: str) -> Values:
    """Of the seeds that ran their whole budget."""
    return stats.by_repeat((seed for seed in seeds if seed["state"] == COMPLETE), metric)


def _valid(seeds: Seeds) -> float:
    """The mean on validation data, by which configurations without a search are compared."""
    values = _values(seeds, VALID)
    return stats.summary(values).mean if values else -math.inf


def selected(rows: Iterable[Seeds], trials: pd.DataFrame, metric: Criterion) -> Seeds:
    """Of some rows the one that was selected: the best in the search or, without one, on validation
    data."""
    return max(rows, key=_merit(trials, metric))


def results(tunings: Sequence[Seeds], trials: pd.DataFrame, metric: str = VALID) -> pd.DataFrame:
    """A row for each of `tunings`.

    Columns: dataset, rule, depth, feedback, trial (NaN if none was selected, or several), epochs,
    repeats, n; test_mean, test_low, test_high, tuning_sd, training_sd (stats.Summary of the test
    accuracy); test_images, test_error (its standard error, binomial); diverged, flagged (seeds that
    failed the check of the dynamics); valid_mean, valid_sd (of training); bp_mean, bp_low, bp_high,
    bp_p, bp_paired (stats.Difference of test accuracy to bp on the same data with the same depth
    and epochs), bp_better, bp_better_low, bp_better_high (stats.Improvement); tuned (the score of
    its trials in the search), gap (that minus the mean of `metric` over the fresh seeds),
    search_trials and search_epochs (of the rule), configuration (a hash of its options, the same in
    every store; several, of repeats); bp_holm (p, adjusted for the number of comparisons on a data
    set).
    """
    scores, tried = _scores(trials), records(trials)
    rows = []
    for seeds in tunings:
        first = seeds[0]
        valid = stats.summary(_values(seeds, VALID))
        bp = _reference(tunings, first)
        compared = bool(bp) and bp is not seeds
        tuned = (
            stats.mean(scores[run] for run in _runs(seeds))
            if _searched(seeds, scores)
            else math.nan
        )
        same_rule = [row for row in tried if row["rule"] == first["rule"]]
        rows.append(
            {
                **{name: first[name] for name in ("dataset", "rule")},
                **_described(seeds),
                "diverged": sum(seed["state"] == FAILED for seed in seeds),
                "flagged": sum(bool(seed["flag"]) for seed in seeds),
                "valid_mean": valid.mean,
                "valid_sd": valid.training_sd,
                **_versus(_values(seeds, TEST), _values(bp, TEST) if compared else {}, "bp_"),
                "tuned": tuned,
                "gap": tuned - stats.summary(_values(seeds, metric)).mean,
                "search_trials": len(same_rule),
                "search_epochs": spent(same_rule),
                "configuration": ", ".join(dict.fromkeys(seed["configuration"] for seed in seeds)),
            }
        )
    rows.sort(key=lambda r: (r["dataset"], r["depth"], r["rule"], r["feedback"], r["epochs"]))
    return _adjusted(pd.DataFrame(rows), "bp_")


def _described(seeds: Seeds) -> Row:
    """What the seeds of a row are, and their test accuracy."""
    first, test = seeds[0], stats.summary(_values(seeds, TEST))
    numbers = {seed["trial"] for seed in seeds if not math.isnan(seed["trial"])}
    return {
        "depth": first["depth"],
        "feedback": ", ".join(dict.fromkeys(seed["feedback"] for seed in seeds)),
        "trial": numbers.pop() if len(numbers) == 1 else math.nan,
        "epochs": first["budget"],
        "repeats": test.repeats,
        "n": test.n,
        "test_mean": test.mean,
        "test_low": test.interval.low,
        "test_high": test.interval.high,
        "tuning_sd": test.tuning_sd,
        "training_sd": test.training_sd,
        TEST_IMAGES: first[TEST_IMAGES],
        "test_error": stats.binomial_error(test.mean, first[TEST_IMAGES]),
    }


def _versus(a: Values, b: Values, prefix: str = "", paired: bool = True) -> Row:
    """The difference of two rows' test accuracies, if both have any; by seed, if it can be."""
    test = (stats.difference if paired else stats.unpaired_difference)(a, b)
    better = stats.improvement(a, b)
    row = {
        "mean": test.mean,
        "low": test.interval.low,
        "high": test.interval.high,
        "p": test.p,
        "paired": None if math.isnan(test.mean) else test.paired,
        "better": better.probability,
        "better_low": better.interval.low,
        "better_high": better.interval.high,
    }
    return {prefix + name: value for name, value in row.items()}


def _adjusted(table: pd.DataFrame, prefix: str = "") -> pd.DataFrame:
    """With the column `holm`: p, adjusted for the number of comparisons on a data set."""
    if len(table):
        of_data = table.groupby("dataset", sort=False)[prefix + "p"]
        table[prefix + "holm"] = of_data.transform(lambda p: stats.holm([*p]))
    return table


def _reference(tunings: Iterable[Seeds], row: Row) -> Seeds:
    """The seeds of back-propagation that `row` is compared with; of several rows the best. Empty if
    there are none."""
    candidates = [
        seeds
        for seeds in tunings
        if seeds[0]["rule"] == REFERENCE
        and all(seeds[0][name] == row[name] for name in ("dataset", "depth", "budget"))
        and _values(seeds, TEST)
    ]
    return max(candidates, key=_valid, default=())


class Pair(NamedTuple):
    """Two rows of a rule, by their seeds."""

    first: Seeds
    second: Seeds


def differences(pairs: Iterable[Pair]) -> pd.DataFrame:
    """The difference of test accuracy of two rows, first minus second, a row for each pair.
    Columns: dataset, rule, mean, low, high, p, paired (by seed: of the same seeds and depth),
    better, better_low, better_high, holm (as in `results`), and of either row `first_` and
    `second_` depth to test_error (as there)."""
    rows = []
    for pair in pairs:
        first, second = (_values(seeds, TEST) for seeds in pair)
        alike = pair.first[0]["depth"] == pair.second[0]["depth"]
        row = {name: pair.first[0][name] for name in ("dataset", "rule")}
        row |= _versus(first, second, paired=alike)
        for which, seeds in zip(Pair._fields, pair, strict=True):
            row |= {f"{which}_{name}": value for name, value in _described(seeds).items()}
        rows.append(row)
    return _adjusted(pd.DataFrame(rows))


def tuned(
    tunings: Sequence[Seeds], trials: pd.DataFrame, metric: Criterion, defaults: Iterable[str]
) -> pd.DataFrame:
    """`differences` of each rule of which the published `defaults`, by their runs, were retrained
    beside what was selected: they may be the best trial themselves, or the only one."""
    of_rule, apart = grouped(tunings, lambda seeds: seeds[0]["rule"]), {*defaults}
    pairs = (
        Pair(selected(of_rule[seeds[0]["rule"]], trials, metric), seeds)
        for seeds in tunings
        if apart.issuperset(_runs(seeds))
    )
    return differences(pair for pair in pairs if pair.first != pair.second)


def close(numbers: pd.DataFrame) -> list[str]:
    """A line for each data set and depth of `results` whose best rule leads by less than the test
    set can tell."""
    lines = []
    alike = lambda row: (row["dataset"], row["depth"], row["epochs"])
    for (dataset, depth, _), rows in grouped(records(numbers), alike).items():
        of_rules = grouped((row for row in rows if row["n"]), lambda row: row["rule"])
        best = [max(own, key=lambda row: row["test_mean"]) for own in of_rules.values()]
        best.sort(key=lambda row: row["test_mean"], reverse=True)
        if len(best) > 1:
            first, second = best[:2]
            lead = first["test_mean"] - second["test_mean"]
            who = f"{first['rule']} leads {second['rule']}"
            where = f"{dataset}, {depth} hidden layer{'s' * (depth != 1)}"
            lines += _close(f"{where}: {who}", lead, first[TEST_IMAGES], first["test_error"])
    return lines


def close_pairs(numbers: pd.DataFrame, first: str, second: str) -> list[str]:
    """A line for each of `differences` that is less than the test set can tell."""
    lines = []
    for row in records(numbers):
        names = (first, second) if row["mean"] >= 0 else (second, first)
        who = f"{row['rule']}, {row['dataset']}: {names[0]} leads {names[1]}"
        lines += _close(who, abs(row["mean"]), row[f"first_{TEST_IMAGES}"], row["first_test_error"])
    return lines


def _close(who: str, lead: float, images: float, error: float) -> list[str]:
    if not lead < error:  # also if one of them is unknown
        return []
    return [
        f"{who} by {lead:.2f} points ({lead * images / 100:.1f} of {images:.0f} test images), less"
        f" than the standard error of the test set ({error:.2f} points)"
    ]


def shown(numbers: pd.DataFrame) -> pd.DataFrame:
    """The test accuracies of `results` as a reader sees them: texts, without empty columns."""
    rows = records(numbers)
    columns = {
        "rule": [row["rule"] for row in rows],
        **_distinct(rows),
        "test accuracy": [number(row["test_mean"]) for row in rows],
        "95 % interval": [interval(row["test_low"], row["test_high"]) for row in rows],
        "repeats": [str(row["repeats"]) for row in rows],
        "n": [str(row["n"]) for row in rows],
        "sd of tuning": [number(row["tuning_sd"]) for row in rows],
        "sd of training": [number(row["training_sd"]) for row in rows],
        "error of test set": [number(row["test_error"]) for row in rows],
        **{title: texts for title, texts in _names(rows).items() if title not in _distinct(rows)},
        "diverged": [str(row["diverged"]) for row in rows],
        "flagged": [str(row["flagged"]) for row in rows],
    }
    if all(row["repeats"] < 2 for row in rows):
        del columns["repeats"]
    return _without_empty(columns, ("trial", "sd of tuning", "error of test set"))


def shown_comparisons(numbers: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of `results` with bp, as a reader sees them; no row if there is none."""
    rows = [row for row in records(numbers) if not math.isnan(row["bp_mean"])]
    several = any(row["repeats"] > 1 for row in rows)
    columns = {
        "rule": [row["rule"] for row in rows],
        **_distinct(rows),
        **_compared(rows, "test minus bp", "P(rule > bp)", "bp_"),
        "compared": [_how(bool(row["bp_paired"]), several) for row in rows],
    }
    return pd.DataFrame(columns)


def shown_validation(numbers: pd.DataFrame) -> pd.DataFrame:
    """The validation accuracies of `results` as a reader sees them, and what they lost since the
    search."""
    rows = records(numbers)
    columns = {
        "rule": [row["rule"] for row in rows],
        **_distinct(rows),
        "validation": [number(row["valid_mean"]) for row in rows],
        "sd of training": [number(row["valid_sd"]) for row in rows],
        "tuned": [number(row["tuned"]) for row in rows],
        "tuned minus retrained": [number(row["gap"], "+.2f") for row in rows],
    }
    return _without_empty(columns, ("tuned", "tuned minus retrained"))


def shown_differences(numbers: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """`differences` as a reader sees them; `first` and `second` are what is compared."""
    rows = records(numbers)
    names = dict(zip(Pair._fields, (first, second), strict=True))
    columns = {"rule": [row["rule"] for row in rows]}
    for name in ("depth", "feedback", "epochs"):
        both = [[str(row[f"{which}_{name}"]) for which in names] for row in rows]
        columns[NAMES[name]] = [", ".join(dict.fromkeys(values)) for values in both]
    for which, title in names.items():
        columns[f"{title}: trial"] = [number(row[f"{which}_trial"], ".0f") for row in rows]
        columns[f"{title}: test accuracy (n)"] = [
            f"{number(row[f'{which}_test_mean'])} ({row[f'{which}_n']})" for row in rows
        ]
    columns["error of test set"] = [number(row["first_test_error"]) for row in rows]
    columns |= _compared(rows, f"{first} minus {second}", f"P({first} > {second})")
    several = lambda row: max(row[f"{which}_repeats"] for which in names) > 1
    columns["compared"] = [_how(row["paired"], several(row)) for row in rows]
    trials = [f"{title}: trial" for title in names.values()]
    return _without_empty(columns, (*trials, "error of test set"))


def _names(rows: Sequence[Row]) -> dict[str, list[str]]:
    texts = {"trial": lambda value: number(value, ".0f")}
    return {
        title: [texts.get(name, str)(row[name]) for row in rows] for name, title in NAMES.items()
    }


def _distinct(rows: Sequence[Row]) -> dict[str, list[str]]:
    """`_names`, as far as they are needed to tell the rows apart."""
    if len({row["rule"] for row in rows}) == len(rows):
        return {}
    return {title: texts for title, texts in _names(rows).items() if len({*texts}) > 1}


def _compared(
    rows: Sequence[Row], difference: str, probability: str, prefix: str = ""
) -> dict[str, list[str]]:
    of = lambda row, name: row[prefix + name]
    return {
        difference: [number(of(row, "mean"), "+.2f") for row in rows],
        "its 95 % interval": [interval(of(row, "low"), of(row, "high"), "+.2f") for row in rows],
        "p (Holm)": [p_value(of(row, "holm")) for row in rows],
        probability: [number(of(row, "better")) for row in rows],
        "95 % interval of P": [
            interval(of(row, "better_low"), of(row, "better_high")) for row in rows
        ],
    }


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else number(p, ".3f")


def _how(paired: bool, repeated: bool) -> str:
    return "paired by seed" if paired else "unpaired, by repeat" if repeated else "unpaired"


def _without_empty(columns: Mapping[str, list[str]], names: Iterable[str]) -> pd.DataFrame:
    """Without those of the columns `names` in which there is nothing."""
    empty = [name for name in names if {*columns[name]} <= {NOTHING}]
    return pd.DataFrame(columns).drop(columns=empty)
