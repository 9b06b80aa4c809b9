"""The tables of accuracies, from rows as `runs.retrained` gives them: no study is needed."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import stats
from analysis.report import accuracy, comparison, contents
from benchmarks import coverage
from disinhib.metrics import SELECTION

METRIC = SELECTION["valid_accuracy"]
IMAGES = 360


def seeds_of(rule, values, trial=None, valid=None, **other):
    """The seeds of a configuration, of which None has diverged; `valid` is 1 more."""
    return [
        {
            "of_run": None if trial is None else f"run-{trial}", "configuration": f"{rule}-{trial}",
            "rule": rule, "repeat": 1, "dataset": "digits", "depth": 1, "budget": 2, "flag": "",
            "feedback": "none" if rule == "bp" else "per sample",
            "trial": math.nan if trial is None else trial,
            "rank": math.nan if trial is None else 1, "group": "",
            "seed": seed, "state": "failed" if value is None else "complete",
            "test_accuracy": math.nan if value is None else value,
            "valid_accuracy": math.nan if value is None else value + 1,
            "test_images": IMAGES, **other,
        }
        for seed, value in enumerate(values)
    ]  # fmt: skip


def trials_of(scores):
    """A search: the score of each trial by its number."""
    return pd.DataFrame(
        [
            {"run_id": f"run-{trial}", "rule": "bp", "state": "complete", "score": score,
             "epochs": 2, "seeds": (0,)}
            for trial, score in scores.items()
        ]
    )  # fmt: skip


def results(rows, scores=None, defaults=()):
    trials = trials_of(scores or {})
    return accuracy.results(tunings_of(rows, defaults), trials)


def tunings_of(rows, defaults=()):
    return accuracy.tunings(pd.DataFrame(rows), defaults)


def trials_in(tunings):
    """(rank, the trials of its seeds) of each row."""
    return [(one.rank, [seed["trial"] for seed in one.seeds]) for one in tunings]


def test_seeds_without_a_partner_are_compared_unpaired():
    rows = [*seeds_of("bp", [90.0, 91.0, 92.0]), *seeds_of("taylor", [79.0, 81.0])]
    numbers = results(rows)
    _, taylor = numbers.to_dict("records")
    assert (taylor["rule"], taylor["bp_mean"], taylor["bp_paired"]) == ("taylor", -11, False)
    assert "tuned" not in accuracy.shown_validation(numbers, METRIC)
    shown = accuracy.shown(numbers)
    assert {"trial", "repeats", accuracy.ANOTHER}.isdisjoint(shown)
    (line,) = accuracy.shown_comparisons(numbers).to_dict("records")
    assert line["test minus bp"] == "−11.00" and line["compared"] == "unpaired"


REPEATED = [
    row
    for repeat, (bp, rule) in enumerate(
        [([90.0, 91.0], [87.0, 88.0]), ([91.0, 92.0], [89.0, 90.0]), ([92.0, 93.0], [88.5, None])],
        start=1,
    )
    for row in (
        *seeds_of("bp", bp, trial=repeat, repeat=repeat),
        *seeds_of("exact-inv", rule, trial=10 + repeat, repeat=repeat),
    )
]


def test_a_rule_that_was_tuned_several_times_is_one_row_with_both_levels():
    scores = {1: 95.0, 2: 96.0, 3: 97.0, 11: 92.0, 12: 93.0, 13: 94.0}
    numbers = results(REPEATED, scores)
    bp, rule = numbers.to_dict("records")
    assert (bp["repeats"], bp["n"], rule["repeats"], rule["n"]) == (3, 6, 3, 5)
    assert (bp["test_mean"], bp["training_sd"]) == pytest.approx((91.5, math.sqrt(0.5)))
    assert bp["tuning_sd"] == pytest.approx(math.sqrt(1 - 0.5 / 2))
    assert (bp["test_low"], bp["test_high"]) == pytest.approx(
        tuple(stats.summary({1: {0: 90.5, 1: 91.5, 2: 92.5}}).interval)
    )
    assert math.isnan(bp["trial"]) and (bp["tuned"], bp["gap"]) == pytest.approx((96.0, 3.5))
    assert rule["diverged"] == 1 and not rule["bp_paired"]
    assert rule["bp_mean"] == pytest.approx(np.mean([87.5, 89.5, 88.5]) - 91.5)
    assert rule["bp_better"] == pytest.approx(1 / 72)  # 90 and 90, a pair of 4 of 9 repeats
    assert rule["bp_p"] == rule["bp_holm"]
    shown, compared = accuracy.shown(numbers), accuracy.shown_comparisons(numbers)
    assert [*shown["repeats"]] == ["3", "3"] and [*shown["sd of tuning"]] == ["0.87", "0.82"]
    assert [*shown[accuracy.ANOTHER]] == ["[87.99, 95.01]", "[84.99, 92.01]"]
    assert [*compared["compared"]] == ["unpaired, by repeat"]
    words = contents.note(numbers)
    assert "the luck of tuning and that of training in it, but not the choice" in words
    assert (
        "retraining seeds of one tuning" not in words and "choice of the 360 test images" in words
    )


def test_a_note_says_of_one_tuning_what_its_interval_leaves_out():
    words = contents.note(results(seeds_of("bp", [90.0, 91.0])))
    assert (
        "over retraining seeds of one tuning: not the luck of tuning, nor the choice of the test"
        " images" in words
    )


def test_repeats_are_merged_by_rank_and_the_defaults_of_all_of_them_are_a_row():
    rows = [
        *seeds_of("bp", [90.0], trial=1, repeat=1, rank=2),
        *seeds_of("bp", [91.0], trial=2, repeat=1),  # the best of the first repeat
        *seeds_of("bp", [80.0], trial=3, repeat=1, rank=0),  # its defaults
        *seeds_of("bp", [92.0], trial=4, repeat=2),  # both, in the second
    ]
    defaults = ("run-3", "run-4")
    tunings = tunings_of(rows, defaults)
    assert trials_in(tunings) == [(1, [2, 4]), (2, [1]), (0, [3, 4])]
    only = [row for row in rows if row["trial"] != 3]  # the defaults were not asked for
    assert trials_in(tunings_of(only, defaults)) == [(1, [2, 4]), (2, [1])]
    (row,) = accuracy.tuned(tunings).to_dict("records")
    assert row["mean"] == 91.5 - 86.0 and (row["first_repeats"], row["second_repeats"]) == (2, 2)
    assert [*accuracy.shown(results(rows, defaults=defaults))["selected as"]] == [
        "tuned", "rank 2", "published defaults"
    ]  # fmt: skip


def test_what_was_selected_is_compared_whatever_the_others_reached_in_retraining():
    rows = [
        *seeds_of("bp", [90.0, 91.0], trial=1),
        *seeds_of("bp", [95.0, 96.0], trial=2, rank=2),  # better with fresh seeds
        *seeds_of("bp", [98.0, 99.0], trial=3, rank=0),
        *seeds_of("taylor", [89.0, 90.5], trial=4),
        *seeds_of("taylor", [97.0, 98.0], trial=5, rank=2),
    ]
    numbers = results(rows, {1: 95.0, 2: 94.0, 4: 93.0, 5: 92.0}, defaults=["run-3"])
    compared = numbers[numbers["bp_mean"].notna()]
    assert [*compared["trial"]] == [4] and [*compared["bp_mean"]] == [-0.75]
    assert [*compared["bp_holm"]] == [*compared["bp_p"]]  # of one comparison
    best = accuracy.selected(tunings_of(rows[:6], ["run-3"]))
    assert best is not None and trials_in([best]) == [(1, [1, 1])]
    (line,) = accuracy.close(numbers)
    assert line.startswith("digits, 1 hidden layer, 2 epochs: bp leads taylor by 0.75 points")


def test_groups_of_a_selection_are_not_merged():
    rows = [
        row
        for repeat in (1, 2)
        for i, group in enumerate(["feedback=jacobian", "feedback=random"])
        for row in seeds_of("taylor", [90.0], trial=2 * repeat + i, repeat=repeat, group=group)
    ]
    assert trials_in(tunings_of(rows)) == [(1, [2, 4]), (1, [3, 5])]
    shown = accuracy.shown(results(rows))
    assert [*shown["selected as"]] == ["tuned, feedback=jacobian", "tuned, feedback=random"]


def test_selections_by_different_metrics_are_not_merged():
    rows = [
        *seeds_of("bp", [90.0], trial=1, repeat=1),
        *seeds_of("bp", [91.0], trial=2, repeat=2),
        *seeds_of("bp", [92.0], trial=3, repeat=2),  # also the best, of another metric
    ]
    tunings = tunings_of(rows)
    assert trials_in(tunings) == [(1, [1]), (1, [2]), (1, [3])]
    assert accuracy.warnings(tunings) == [
        "bp, digits, tuned: trials 1, 2, 3 come from several selections; their repeats are not"
        " merged"
    ]


def test_a_repeat_whose_seeds_all_diverged_is_left_out_of_score_and_gap():
    rows = [
        *seeds_of("bp", [90.0, 91.0], trial=1, repeat=1),
        *seeds_of("bp", [None, None], trial=2, repeat=2),
        *seeds_of("taylor", [90.0, 91.0], trial=3, repeat=1),
        *seeds_of("taylor", [90.0, 92.0], trial=4, repeat=2),
    ]
    numbers = results(rows, {1: 95.0, 2: 97.0, 3: 95.0, 4: 95.0})
    bp, _ = numbers.to_dict("records")
    assert (bp["tuned"], bp["gap"], bp["repeats"]) == (95.0, 3.5, 1)
    assert accuracy.warnings(tunings_of(rows)) == [
        "bp, digits, tuned: every seed of repeat 2 diverged; the means are over the other repeats"
    ]
    (line,) = accuracy.shown_comparisons(numbers).to_dict("records")
    assert line["compared"] == "unpaired, 2 against 1 tunings"


def test_a_loss_is_shown_in_its_unit_and_its_gap_is_what_was_lost():
    rows = seeds_of("bp", [90.0, 91.0], trial=1, valid_loss=0.5)
    numbers = accuracy.results(tunings_of(rows), trials_of({1: 0.3}), "valid_loss")
    shown = accuracy.shown_validation(numbers, SELECTION["valid_loss"])
    assert [*shown["retrained minus tuned"]] == ["+0.2"]
    (tuned,) = (title for title in shown if title.startswith("tuned: "))
    assert SELECTION["valid_loss"].words in tuned and [*shown[tuned]] == ["0.3"]


def test_configurations_of_a_grid_are_rows_of_their_own():
    rows = [
        *seeds_of("bp", [90.0, 91.0], configuration="a"),
        *seeds_of("bp", [92.0, 93.0], configuration="b"),
        *seeds_of("taylor", [91.0, 92.0]),
    ]
    numbers = results(rows)
    assert [*numbers["n"]] == [2, 2, 2] and {*map(math.isnan, numbers["rank"])} == {True}
    (line,) = accuracy.shown_comparisons(numbers).to_dict("records")  # with the better bp
    assert (line["rule"], line["test minus bp"]) == ("taylor", "−1.00")


def test_comparisons_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    values = {rule: rng.normal(90, 1, 4) for rule in ("bp", "exact-inv", "lin-thresh", "taylor")}
    numbers = results([row for rule, own in values.items() for row in seeds_of(rule, own)])
    p = {row["rule"]: (row["bp_p"], row["bp_holm"]) for row in numbers.to_dict("records")}
    assert math.isnan(p.pop("bp")[1])
    assert stats.holm([single for single, _ in p.values()]) == [
        adjusted for _, adjusted in p.values()
    ]
    smallest = min(p.values())
    assert smallest[1] == pytest.approx(3 * smallest[0])


@pytest.mark.parametrize(("lead", "named"), [(100 / IMAGES, True), (3.0, False)])
def test_a_winner_by_less_than_the_test_set_can_tell_is_named(lead, named):
    rows = [*seeds_of("bp", [90.0, 91.0]), *seeds_of("exact-inv", [90.0 + lead, 91.0 + lead])]
    words = (
        "digits, 1 hidden layer, 2 epochs: exact-inv leads bp by 0.28 points (1.0 of 360 test"
        " images), less than the standard error of the test set (1.52 points)"
    )
    assert accuracy.close(results(rows)) == [words] * named
    assert accuracy.close(results(rows[:2])) == []  # nothing to lead


def test_without_the_number_of_test_images_nothing_is_said_of_them():
    rows = seeds_of("bp", [90.0, 91.0], test_images=math.nan)
    numbers = results([*rows, *seeds_of("taylor", [90.1, 91.1], test_images=math.nan)])
    assert "error of test set" not in accuracy.shown(numbers)
    assert accuracy.close(numbers) == [] and "images" not in contents.note(numbers).split(".")[-2]


def test_a_row_whose_seeds_all_diverged_is_told():
    numbers = results([*seeds_of("bp", [90.0, 91.0]), *seeds_of("taylor", [None, None])])
    taylor = accuracy.shown(numbers).to_dict("records")[1]
    assert (taylor["n"], taylor["test accuracy"], taylor["diverged"]) == ("0", "–", "2")
    assert accuracy.shown_comparisons(numbers).empty


def test_planted_rules_equal_and_better_by_a_point():
    """Three repeats of five seeds; tuning and training vary by 0.2 points each."""
    rng = np.random.default_rng(4)
    case = coverage.Case("normal", 1.0, (5, 5, 5))
    rules = ("bp", "equal", "better")
    study = coverage.study(rng, case, [coverage.Rule(), coverage.Rule(), coverage.Rule(mean=5)])
    rows = [
        row
        for rule, values in zip(rules, study, strict=True)
        for repeat, seeds in values.items()
        for row in seeds_of(
            rule, [90 + 0.2 * v for v in seeds.values()], trial=repeat, repeat=repeat,
            configuration=f"{rule}-{repeat}", of_run=f"{rule}-{repeat}",
        )
    ]  # fmt: skip
    found = {row["rule"]: row for row in results(rows).to_dict("records")}
    assert found["equal"]["bp_holm"] > 0.05 and 0.2 < found["equal"]["bp_better"] < 0.8
    assert found["equal"]["bp_low"] < 0 < found["equal"]["bp_high"]
    assert found["better"]["bp_holm"] < 0.05 and found["better"]["bp_better"] > 0.95
    assert found["better"]["bp_low"] < 1 < found["better"]["bp_high"]


# Two studies


def planted(name, seed=0, space=True, repeats=5, better=0.0, rules=("bp", "taylor"), **options):
    """A study and its rows; the last rule is better by so many points, all vary by 0.3 points."""
    rng = np.random.default_rng((7, seed))
    rows = [
        row
        for i, rule in enumerate(rules)
        for repeat in range(1, repeats + 1)
        for row in seeds_of(
            rule, rng.normal(90 + better * (i == len(rules) - 1), 0.3, 3), 10 * i + repeat,
            repeat=repeat, configuration=f"{rule}-{repeat}",
        )
    ]  # fmt: skip
    options = {"seed": seed, "epochs": 2, "repeats": repeats, **options}
    study: Any = SimpleNamespace(
        name=name, options=options, space={"parameters": {}} if space else None
    )
    return study, {one.seeds[0]["rule"]: one for one in tunings_of(rows)}


def agreement(*studies):
    (first, own), (second, its) = studies
    pairs = [accuracy.Pair(own[rule], its[rule]) for rule in own if rule in its]
    return comparison.agreement((first, second), accuracy.differences(pairs))


@pytest.mark.parametrize("space", [True, False], ids=["search", "grid"])
def test_two_studies_of_other_seeds_agree_or_not(space):
    first = planted("A", 1, space)
    significant = "differences is significant (p < 0.05, Holm). The intervals say how large"
    words = agreement(first, planted("B", 2, space))
    assert words == f"A and B agree: none of 2 {significant} they may be."
    words = agreement(first, planted("B", 2, space, better=1.5))
    assert words == f"A and B do not agree on taylor: 1 of 2 {significant} they may be."
    words = agreement(first, planted("B", 2, space, rules=("bp",)))
    assert words.startswith("A and B agree: none of 1 ")  # taylor is only in the first


def test_whether_others_agree_is_not_told():
    first, cannot = planted("A", 1), "Whether A and B agree cannot be told: "
    words = agreement(first, planted("B", 2, epochs=3, loss="mse", repeats=4, depth=3))
    assert words == "A and B need not agree: they differ in epochs, repeats."
    options = {f"option{i}": i for i in range(5)}
    words = agreement(
        planted("A", 1, True, **dict.fromkeys(options, 0)), planted("B", 2, True, **options)
    )
    assert words.endswith("they differ in option1, option2, option3 and more.")
    assert agreement(first, planted("B", 1)) == f"{cannot}they have the same seed."
    words = agreement(*(planted(name, i, repeats=1) for i, name in enumerate("AB")))
    assert words == (
        f"{cannot}with one tuning, its luck is not in the intervals (repeats=5 puts it in)."
    )
