"""The tables of accuracies, as numbers and as a reader sees them.

Accuracies are in %. A row is a rule as it was tuned and retrained: one configuration, or with
several repeats of the tuning the one that each of them selected; and likewise its published
defaults and what was selected as second best, if they were retrained. `n` counts the networks, over
all repeats, that ran their whole budget; diverged ones are counted separately and excluded from the
means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from analysis import stats
from analysis.report.panels.plot_data import Row, configuration, grouped, records
from analysis.report.tables import NOTHING, interval, number
from analysis.runs import GROUP, RANK, TEST_IMAGES
from analysis.selection import spent
from analysis.stats import Values
from disinhib.metrics import SELECTION, Criterion
from disinhib.tuning.event_log import COMPLETE, FAILED

REFERENCE = "bp"  # what every rule is compared with
TEST, VALID = "test_accuracy", "valid_accuracy"
TUNED, DEFAULTS = "tuned", "published defaults"
ANOTHER = "another study's mean"
# The columns that tell rows of a rule apart, and what a reader sees.
NAMES = {"depth": "hidden layers", "feedback": "feedback", "trial": "trial", "epochs": "epochs"}

Seeds = Sequence[Row]  # of a table's row: rows of `runs.retrained`


class Tuning(NamedTuple):
    """A row of the tables: what was selected, over the seeds of its retraining, in all repeats."""

    rank: int | None  # in its group, from 1; 0: the published defaults; None if none was recorded
    seeds: Seeds

    @property
    def selected(self) -> bool:
        """Whether it is what its rule is judged by: the best of a group or, without ranks (as of a
        grid), any configuration."""
        return self.rank in (1, None)

    @property
    def trials(self) -> list[str]:
        """The runs of the trials that were retrained, one of each repeat."""
        return list(dict.fromkeys(seed["of_run"] for seed in self.seeds))

    def values(self, metric: str) -> Values:
        """Of the seeds that ran their whole budget."""
        return stats.by_repeat((seed for seed in self.seeds if seed["state"] == COMPLETE), metric)


def tunings(retrained: pd.DataFrame, defaults: Iterable[str] = ()) -> list[Tuning]:
    """The rows of the tables: those of one group and rank in every repeat are one.

    Configurations without a rank are a row each, and so are several that have the same rank in the
    same repeat: they come from selections by different metrics. Of the published `defaults` (the
    runs of their trials) those of every repeat are a row if one of them was selected as such: in
    other repeats, they may be the best ones themselves.
    """
    rows: list[Tuning] = []
    apart = {*defaults}
    of_rule = lambda seed: tuple(seed[name] for name in ("dataset", "rule", "depth", "budget"))
    for own in grouped(records(retrained), of_rule).values():
        selections = grouped(own, lambda seed: (_rank(seed), seed[GROUP]))
        by_rank = sorted(selections.items(), key=lambda item: _last_defaults(item[0][0]))
        for (rank, _), seeds in by_rank:
            if rank == 0:
                seeds = [seed for seed in own if seed["of_run"] in apart or _rank(seed) == 0]
                rows.append(Tuning(rank, seeds))
            elif rank is None or _clash(seeds):
                rows += [Tuning(rank, one) for one in grouped(seeds, configuration).values()]
            else:
                rows.append(Tuning(rank, seeds))
    return rows


def _rank(row: Row) -> int | None:
    return None if math.isnan(row[RANK]) else int(row[RANK])


def _last_defaults(rank: int | None) -> float:
    """The order of rows."""
    return rank or (math.inf if rank == 0 else 0)


def _clash(seeds: Seeds) -> bool:
    """Whether they are of several configurations of one repeat."""
    of_repeats = grouped(seeds, lambda seed: seed["repeat"]).values()
    return any(len({*map(configuration, own)}) > 1 for own in of_repeats)


def selected(tunings: Iterable[Tuning]) -> Tuning | None:
    """Of some rows the one that was selected; of several (of other groups, or of a grid) the best
    on validation data. None if there is none."""
    return max((one for one in tunings if one.selected), key=_valid, default=None)


def _valid(tuning: Tuning) -> float:
    values = tuning.values(VALID)
    return stats.summary(values).mean if values else -math.inf


def selected_as(row: Row) -> str:
    """What a row of `results`, or of `runs.retrained`, was selected as."""
    rank = _rank(row)
    if rank is None:
        return NOTHING
    words = {0: DEFAULTS, 1: TUNED}.get(rank, f"rank {rank}")
    return f"{words}, {row[GROUP]}" if row[GROUP] and rank else words


def results(tunings: Sequence[Tuning], trials: pd.DataFrame, metric: str = VALID) -> pd.DataFrame:
    """A row for each of `tunings`.

    Columns: dataset, rule, rank and group (as in `runs.retrained`), depth, feedback, trial (NaN if
    none was selected, or several), epochs, repeats, n; test_mean, test_low, test_high, another_low,
    another_high, tuning_sd, training_sd (stats.Summary of the test accuracy); test_images,
    test_error (its standard error, binomial); diverged, flagged (seeds that failed the check of the
    dynamics); valid_mean, valid_sd (of training); of what was selected, other than bp: bp_mean,
    bp_low, bp_high, bp_p, bp_paired (stats.Difference of test accuracy to bp on the same data with
    the same depth and epochs), bp_better, bp_better_low, bp_better_high (stats.Improvement),
    bp_repeats; tuned (the score of its trials in the search, by `metric`), gap (how much better
    that is than the mean of `metric` over the fresh seeds), search_trials and search_epochs (of the
    rule), configuration (a hash of its options, the same in every store; several, of repeats);
    bp_holm (p, adjusted for the number of comparisons on a data set).
    """
    scores, tried, sign = _scores(trials), records(trials), SELECTION[metric].sign
    rows = []
    for tuning in tunings:
        first = tuning.seeds[0]
        valid = stats.summary(tuning.values(VALID))
        bp = None
        if tuning.selected and first["rule"] != REFERENCE:
            bp = _reference(tunings, first)
        score = _score(tuning, scores)
        same_rule = [row for row in tried if row["rule"] == first["rule"]]
        rows.append(
            {
                **{name: first[name] for name in ("dataset", "rule")},
                **_described(tuning),
                "diverged": sum(seed["state"] == FAILED for seed in tuning.seeds),
                "flagged": sum(bool(seed["flag"]) for seed in tuning.seeds),
                "valid_mean": valid.mean,
                "valid_sd": valid.training_sd,
                **_versus(tuning.values(TEST), bp.values(TEST) if bp else {}, "bp_"),
                "bp_repeats": len(bp.values(TEST)) if bp else 0,
                "tuned": score,
                "gap": sign * (score - stats.summary(tuning.values(metric)).mean),
                "search_trials": len(same_rule),
                "search_epochs": spent(same_rule),
                "configuration": ", ".join(
                    dict.fromkeys(seed["configuration"] for seed in tuning.seeds)
                ),
            }
        )
    rows.sort(
        key=lambda r: (
            *(r["dataset"], r["depth"], r["rule"], _last_defaults(_rank(r))),
            *(r["group"], r["feedback"], r["epochs"]),
        )
    )
    return _adjusted(pd.DataFrame(rows), "bp_")


def _scores(trials: pd.DataFrame) -> dict[str, float]:
    return {row["run_id"]: row["score"] for row in records(trials) if row["state"] == COMPLETE}


def _score(tuning: Tuning, scores: Mapping[str, float]) -> float:
    """Of its trials in the search, the mean over the repeats that have a seed that did not diverge
    (if any has); NaN if one of these trials has none."""
    seeds = [seed for seed in tuning.seeds if seed["state"] == COMPLETE] or tuning.seeds
    trials = Tuning(tuning.rank, seeds).trials
    known = all(trial in scores for trial in trials)
    return stats.mean(scores[trial] for trial in trials) if known else math.nan


def _described(tuning: Tuning) -> Row:
    """What a row is, and its test accuracy."""
    seeds, test = tuning.seeds, stats.summary(tuning.values(TEST))
    first = seeds[0]
    numbers = {seed["trial"] for seed in seeds if not math.isnan(seed["trial"])}
    return {
        RANK: math.nan if tuning.rank is None else tuning.rank,
        GROUP: first[GROUP] if tuning.rank else "",
        "depth": first["depth"],
        "feedback": ", ".join(dict.fromkeys(seed["feedback"] for seed in seeds)),
        "trial": numbers.pop() if len(numbers) == 1 else math.nan,
        "epochs": first["budget"],
        "repeats": test.repeats,
        "n": test.n,
        "test_mean": test.mean,
        "test_low": test.interval.low,
        "test_high": test.interval.high,
        "another_low": test.another.low,
        "another_high": test.another.high,
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


def _reference(tunings: Iterable[Tuning], row: Row) -> Tuning | None:
    """The row of back-propagation that `row` is compared with. None if there is none."""
    return selected(
        tuning
        for tuning in tunings
        if tuning.seeds[0]["rule"] == REFERENCE
        and all(tuning.seeds[0][name] == row[name] for name in ("dataset", "depth", "budget"))
        and tuning.values(TEST)
    )


class Pair(NamedTuple):
    """Two rows of a rule."""

    first: Tuning
    second: Tuning


def differences(pairs: Iterable[Pair]) -> pd.DataFrame:
    """The difference of test accuracy of two rows, first minus second, a row for each pair.
    Columns: dataset, rule, mean, low, high, p, paired (by seed: of the same seeds and depth),
    better, better_low, better_high, holm (as in `results`), and of either row `first_` and
    `second_` rank to test_error (as there)."""
    rows = []
    for pair in pairs:
        first, second = (tuning.values(TEST) for tuning in pair)
        its = pair.first.seeds[0]
        alike = its["depth"] == pair.second.seeds[0]["depth"]
        row = {name: its[name] for name in ("dataset", "rule")}
        row |= _versus(first, second, paired=alike)
        for which, tuning in zip(Pair._fields, pair, strict=True):
            row |= {f"{which}_{name}": value for name, value in _described(tuning).items()}
        rows.append(row)
    return _adjusted(pd.DataFrame(rows))


def tuned(tunings: Sequence[Tuning]) -> pd.DataFrame:
    """`differences` of what was selected of each rule and its published defaults, where these were
    retrained beside."""
    place = lambda tuning: tuple(tuning.seeds[0][name] for name in ("dataset", "rule", "budget"))
    return differences(
        Pair(best, defaults)
        for defaults in tunings
        if defaults.rank == 0
        for best in tunings
        if best.rank == 1 and place(best) == place(defaults)
    )


def warnings(tunings: Sequence[Tuning]) -> list[str]:
    """What a reader must know of how repeats became rows, a line each."""
    lines = []
    names = ("dataset", "rule", "depth", "budget", GROUP)
    alike = lambda tuning: (tuning.rank, *(tuning.seeds[0][name] for name in names))
    for tuning in tunings:
        first = tuning.seeds[0]
        of_repeats = grouped(tuning.seeds, lambda seed: seed["repeat"])
        lost = [str(repeat) for repeat in of_repeats if not tuning.values(TEST).get(repeat)]
        if 0 < len(lost) < len(of_repeats):
            lines.append(
                f"{first['rule']}, {first['dataset']}, {selected_as(first)}: every seed of repeat"
                f" {', '.join(sorted(lost))} diverged; the means are over the other repeats"
            )
    for (rank, *_), rows in grouped(tunings, alike).items():
        seeds = [seed for tuning in rows for seed in tuning.seeds]
        if rank is not None and len(rows) > 1 and len({seed["repeat"] for seed in seeds}) > 1:
            first = seeds[0]
            numbers = sorted({f"{seed['trial']:.0f}" for seed in seeds}, key=int)
            lines.append(
                f"{first['rule']}, {first['dataset']}, {selected_as(first)}: trials"
                f" {', '.join(numbers)} come from several selections; their repeats are not merged"
            )
    return lines


def close(numbers: pd.DataFrame) -> list[str]:
    """A line for each data set, depth and number of epochs of `results` whose best rule leads by
    less than the test set can tell. Of a rule, what was selected counts."""
    lines = []
    alike = lambda row: (row["dataset"], row["depth"], row["epochs"])
    chosen = (row for row in records(numbers) if row["n"] and _rank(row) in (1, None))
    for (dataset, depth, epochs), rows in grouped(chosen, alike).items():
        of_rules = grouped(rows, lambda row: row["rule"])
        best = [max(own, key=lambda row: row["valid_mean"]) for own in of_rules.values()]
        best.sort(key=lambda row: row["test_mean"], reverse=True)
        if len(best) > 1:
            first, second = best[:2]
            lead = first["test_mean"] - second["test_mean"]
            who = f"{first['rule']} leads {second['rule']}"
            where = f"{dataset}, {depth} hidden layer{'s' * (depth != 1)}, {epochs} epochs"
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
        ANOTHER: [
            # Of one tuning it would leave out what varies most from study to study.
            interval(row["another_low"], row["another_high"]) if row["repeats"] > 1 else NOTHING
            for row in rows
        ],
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
    return _without_empty(columns, (ANOTHER, "trial", "sd of tuning", "error of test set"))


def shown_comparisons(numbers: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of `results` with bp, as a reader sees them; no row if there is none."""
    rows = [row for row in records(numbers) if not math.isnan(row["bp_mean"])]
    columns = {
        "rule": [row["rule"] for row in rows],
        **_distinct(rows),
        **_compared(rows, "test minus bp", "P(rule > bp)", "bp_"),
        "compared": [_how(row["bp_paired"], row["repeats"], row["bp_repeats"]) for row in rows],
    }
    return pd.DataFrame(columns)


def shown_validation(numbers: pd.DataFrame, metric: Criterion) -> pd.DataFrame:
    """The validation accuracies of `results` as a reader sees them, and what the `metric` of the
    study lost since the search."""
    rows = records(numbers)
    accuracy = metric == SELECTION[VALID]
    tuned = TUNED if accuracy else f"tuned: {metric.words} ({metric.unit})"
    lost = "tuned minus retrained" if metric.sign > 0 else "retrained minus tuned"
    form = ".2f" if accuracy else ".3g"
    columns = {
        "rule": [row["rule"] for row in rows],
        **_distinct(rows),
        "validation": [number(row["valid_mean"]) for row in rows],
        "sd of training": [number(row["valid_sd"]) for row in rows],
        tuned: [number(row["tuned"], form) for row in rows],
        lost: [number(row["gap"], f"+{form}") for row in rows],
    }
    return _without_empty(columns, (tuned, lost))


def shown_differences(numbers: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """`differences` as a reader sees them; `first` and `second` are what is compared."""
    rows = records(numbers)
    names = dict(zip(Pair._fields, (first, second), strict=True))
    columns = {"rule": [row["rule"] for row in rows]}
    groups = [{row[f"{which}_{GROUP}"]: None for which in names} for row in rows]
    columns[GROUP] = [", ".join(filter(None, own)) or NOTHING for own in groups]
    for name in ("depth", "feedback", "epochs"):
        both = [[str(row[f"{which}_{name}"]) for which in names] for row in rows]
        columns[NAMES[name]] = ["; ".join(dict.fromkeys(values)) for values in both]
    for which, title in names.items():
        columns[f"{title}: trial"] = [number(row[f"{which}_trial"], ".0f") for row in rows]
        columns[f"{title}: test accuracy (n)"] = [
            f"{number(row[f'{which}_test_mean'])} ({row[f'{which}_n']})" for row in rows
        ]
    columns["error of test set"] = [number(row["first_test_error"]) for row in rows]
    columns |= _compared(rows, f"{first} minus {second}", f"P({first} > {second})")
    columns["compared"] = [
        _how(row["paired"], *(row[f"{which}_repeats"] for which in names)) for row in rows
    ]
    trials = [f"{title}: trial" for title in names.values()]
    return _without_empty(columns, (GROUP, *trials, "error of test set"))


def _names(rows: Sequence[Row]) -> dict[str, list[str]]:
    texts = {"trial": lambda value: number(value, ".0f")}
    as_what = {"selected as": [selected_as(row) for row in rows]}
    if {*as_what["selected as"]} <= {TUNED, NOTHING}:  # as expected
        as_what = {}
    return as_what | {
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


def _how(paired: bool, first: int, second: int) -> str:
    """How two rows of so many repeats were compared."""
    if paired:
        return "paired by seed"
    if first > 1 and second > 1:
        return "unpaired, by repeat"
    one_repeated = max(first, second) > 1
    return f"unpaired, {first} against {second} tunings" if one_repeated else "unpaired"


def _without_empty(columns: Mapping[str, list[str]], names: Iterable[str]) -> pd.DataFrame:
    """Without those of the columns `names` in which there is nothing."""
    empty = [name for name in names if {*columns[name]} <= {NOTHING}]
    return pd.DataFrame(columns).drop(columns=empty)
