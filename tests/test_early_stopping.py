"""Early stopping: what is stopped, when, compared with whom, and the same again on resuming."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from disinhib.tuning import early_stopping
from disinhib.tuning.early_stopping import SCHEDULERS, SCORE, Stopping

SHIPPED = Path(__file__).parent.parent / "conf" / "scheduler"
EPOCHS = 8
EARLY = [name for name in SCHEDULERS if name != "none"]  # those that stop trials


def options(name, **given):
    shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    # So that a handful of trials is enough.
    shipped |= {"min_samples_required": 1} if "min_samples_required" in shipped else {}
    return {**shipped, **given}


def stopping(name, mode="max", batch=None, epochs=EPOCHS, **given):
    return Stopping(options(name, **given), epochs, mode, batch)


def config(number, rules=("a",)):
    return {"number": number, "rule": rules[number % len(rules)], "epochs": EPOCHS}


class Decision(NamedTuple):
    number: int
    epoch: int
    score: float
    stops: bool


def play(judge, scores, order, rules=("a",)):
    """What `judge` decides of trials with `scores` [trials][epochs] that report in `order`, until
    they are stopped or done; the rest report one after the other."""
    at, over, decisions = Counter(), set(), []
    rest = [number for number in range(len(scores)) for _ in range(EPOCHS)]
    for number in [*order, *rest]:
        if number in over:
            continue
        at[number] += 1
        score = scores[number][at[number] - 1]
        stops = judge.stops(config(number, rules), at[number], score)
        decisions.append(Decision(number, at[number], score, stops))
        if stops or at[number] == EPOCHS:
            over.add(number)
    return decisions


def lasted(decisions):
    """How many epochs each trial ran."""
    return {d.number: d.epoch for d in decisions}


TRIALS = 6
few = st.integers(0, 9).map(lambda n: n / 10)  # with ties
curves = st.lists(st.lists(few, min_size=EPOCHS, max_size=EPOCHS), min_size=TRIALS, max_size=TRIALS)
orders = st.lists(st.integers(0, TRIALS - 1), max_size=TRIALS * EPOCHS)
# Each trial worse than all before it, so that what can be stopped is.
WORSE = [[1 - n / 10 for _ in range(EPOCHS)] for n in range(TRIALS)]
MANY = 24  # some in every bracket


def test_every_scheduler_is_shipped():
    assert {file.stem for file in SHIPPED.glob("*.yaml")} == {*SCHEDULERS}
    assert all(options(name)["name"] == name for name in SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch", [None, 2])
def test_worse_and_worse_trials_are_stopped_but_never_before_the_grace_period(name, batch):
    worse = [[-n] * EPOCHS for n in range(MANY)]
    ran = lasted(play(stopping(name, batch=batch), worse, ()))
    assert ran[0] == EPOCHS
    assert all(epochs >= EPOCHS // 4 for epochs in ran.values())
    if name in EARLY:
        assert min(ran.values()) < EPOCHS
    else:
        assert set(ran.values()) == {EPOCHS}


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("grace", [1, 3, 5])
def test_the_first_decision_is_at_the_end_of_the_grace_period(name, grace):
    worse = [[-n] * EPOCHS for n in range(MANY)]
    assert min(lasted(play(stopping(name, grace_period=grace), worse, ())).values()) == grace


@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders, grace=st.integers(1, EPOCHS))
@settings(max_examples=30)
def test_nothing_is_stopped_within_the_grace_period(name, scores, order, grace):
    decisions = play(stopping(name, grace_period=grace), scores, order)
    assert not any(d.stops for d in decisions if d.epoch < grace)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch", [None, 2])
@given(scores=curves, order=orders, data=st.data())
@settings(max_examples=30)
def test_told_from_the_start_again_it_decides_the_same(name, batch, scores, order, data):
    """As a study does that goes on: up to any moment from the journal, and from there live."""
    if batch is not None:  # one begins when the one before has ended
        order = [*order, *(n for n in range(TRIALS) for _ in range(EPOCHS))]
        order.sort(key=lambda number: number // batch)
    first, second = stopping(name, batch=batch), stopping(name, batch=batch)
    decisions = play(first, scores, order)
    at = data.draw(st.integers(0, len(decisions)))
    again = [second.stops(config(d.number), d.epoch, d.score) for d in decisions[:at]]
    heard = {d.number: d.epoch for d in decisions[:at]}
    assert {n: second.heard_of(n) for n in range(TRIALS)} == {
        n: heard.get(n, 0) for n in range(TRIALS)
    }
    again += [second.stops(config(d.number), d.epoch, d.score) for d in decisions[at:]]
    assert again == [d.stops for d in decisions]


@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders)
@settings(max_examples=30)
def test_least_of_the_negative_is_most(name, scores, order):
    negative = [[-score for score in curve] for curve in scores]
    most = play(stopping(name, "max"), scores, order)
    least = play(stopping(name, "min"), negative, order)
    assert [d.stops for d in most] == [d.stops for d in least]


# Within a rule.


@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders)
@settings(max_examples=30)
def test_a_rule_is_judged_as_if_it_were_alone(name, scores, order):
    together = play(stopping(name, within_rule=True), scores, order, rules=("a", "b"))
    for first in (0, 1):
        own = [d for d in together if d.number % 2 == first]
        alone = stopping(name, within_rule=True)
        assert [alone.stops(config(d.number, ("a", "b")), d.epoch, d.score) for d in own] == [
            d.stops for d in own
        ]


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("batch", [None, 2])
def test_a_worse_rule_is_stopped_only_if_rules_are_compared(name, batch):
    # Every trial of b is better than the one before, and worse than any of a.
    scores = [[100 if n % 2 == 0 else n] * EPOCHS for n in range(MANY)]
    for within in (True, False):
        judge = stopping(name, within_rule=within, batch=batch)
        ran = lasted(play(judge, scores, (), rules=("a", "b")))
        assert all(ran[n] == EPOCHS for n in range(0, MANY, 2))
        assert (min(ran.values()) == EPOCHS) == within


# Batches.


@pytest.mark.parametrize("name", SCHEDULERS)
@given(scores=curves, data=st.data())
@settings(max_examples=40)
def test_in_batches_it_does_not_matter_who_is_faster(name, scores, data):
    size = 3
    order = []
    for first in range(0, TRIALS, size):
        batch = [n for n in range(first, first + size) for _ in range(EPOCHS)]
        order += data.draw(st.permutations(batch))
    interleaved = play(stopping(name, batch=size), scores, order)
    in_turn = play(stopping(name, batch=size), scores, ())
    assert sorted(interleaved) == sorted(in_turn)


@pytest.mark.parametrize("name", EARLY)
def test_without_batches_it_does(name):
    better = WORSE[::-1]
    in_turn = lasted(play(stopping(name), better, ()))
    last_one_first = lasted(play(stopping(name), better, sorted(range(TRIALS), reverse=True) * 8))
    assert in_turn != last_one_first


@pytest.mark.parametrize("name", EARLY)
def test_a_batch_is_compared_with_earlier_ones_only(name):
    ran = lasted(play(stopping(name, batch=3), WORSE, ()))
    assert [ran[n] for n in range(3)] == [EPOCHS] * 3  # nobody to compare with
    assert min(ran[n] for n in range(3, 6)) < EPOCHS


# Hyperband.

# Li et al. 2018, table 1: R = 81, eta = 3: configurations in brackets s = 4 ... 0.
LI = [81, 34, 15, 8, 5]


def test_shares_of_hyperbands_brackets_are_the_published_ones():
    found = early_stopping.hyperband_brackets(
        options("hyperband", grace_period=1, reduction_factor=3), 81
    )
    assert [math.ceil(share / found[-1] * 5 - 1e-9) for share in found] == LI


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1.5, 2, 2.5, 3, 4, 10]))
def test_shares_sum_to_one_and_no_bracket_begins_after_the_end(epochs, grace, factor):
    grace = min(grace, epochs)
    given_ = options("hyperband", grace_period=grace, reduction_factor=factor)
    shares = early_stopping.hyperband_brackets(given_, epochs)
    assert math.isclose(sum(shares), 1) and min(shares) > 0
    last = len(shares) - 1
    assert grace * factor**last <= epochs * (1 + 1e-6) < grace * factor ** (last + 1) * (1 + 2e-6)


def first_decision(judge, epochs):
    """The epoch after which Ray's `judge` stops a trial that is the worst of three from the start;
    `epochs` if it is none before the last."""
    for name, score in (("one", 1.0), ("two", 0.9), ("worst", 0.1)):
        trial = early_stopping._Name(name)
        judge.on_trial_add(None, trial)
        for epoch in range(1, epochs + 1):
            result = {SCORE: score, TRAINING_ITERATION: epoch}
            if judge.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                break
    return epoch


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "expected"),
    [(16, 1, 2, [1, 2, 4, 8, 16]), (27, 3, 3, [3, 9, 27]), (20, None, 2, [5, 10, 20]),
     (20, 3, 4, [3, 12])],
)  # fmt: skip
def test_a_brackets_first_decision_is_a_reduction_factor_later(epochs, grace, factor, expected):
    given_ = options("hyperband", grace_period=grace, reduction_factor=factor)
    brackets = range(len(early_stopping.hyperband_brackets(given_, epochs)))
    make = SCHEDULERS["hyperband"].make
    found = [first_decision(make(given_, epochs, "max", k), epochs) for k in brackets]
    assert found == expected


def test_trials_fall_into_brackets_by_their_shares_and_by_their_number_only():
    judge = stopping("hyperband", epochs=16, grace_period=1)
    groups = [judge._group({"number": n, "rule": "a"}) for n in range(3000)]
    counts = Counter(bracket for _, bracket in groups)  # pyright: ignore
    found = [counts[k] / len(groups) for k in range(len(judge.shares))]
    # Three standard errors of the largest share: 3 * sqrt(0.5 * 0.5 / 3000).
    np.testing.assert_allclose(found, judge.shares, atol=0.028)
    assert [judge._group({"number": n, "rule": "a"}) for n in range(50)] == groups[:50]


@given(scores=curves, order=orders)
@settings(max_examples=30)
def test_a_bracket_is_judged_as_if_it_were_alone(scores, order):
    together = play(stopping("hyperband"), scores, order)
    bracket = {n: stopping("hyperband")._group(config(n)) for n in range(TRIALS)}
    for one in set(bracket.values()):
        own, alone = [d for d in together if bracket[d.number] == one], stopping("hyperband")
        decided = [alone.stops(config(d.number), d.epoch, d.score) for d in own]
        assert decided == [d.stops for d in own]


# Median.

# Means from the grace period (2 epochs) on: 0.3, 0.5 and 0.7 after any number of epochs.
THREE = [[0.0, *[mean] * (EPOCHS - 1)] for mean in (0.7, 0.5, 0.3)]


@pytest.mark.parametrize(("best", "ends"), [(0.49, 2), (0.5, EPOCHS), (0.51, EPOCHS)])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_median_stops_a_trial_whose_best_is_below_the_others_median(best, ends, order):
    scores = [*(THREE[n] for n in order), [0.0, *[best] * (EPOCHS - 1)]]
    judge = stopping("median", min_samples_required=3)
    assert lasted(play(judge, scores[:3], ())) == dict.fromkeys(range(3), EPOCHS)
    epochs = enumerate(scores[3], start=1)
    assert next((n for n, s in epochs if judge.stops(config(3), n, s)), EPOCHS) == ends


def test_median_waits_for_enough_others():
    bad = [0.0] * EPOCHS
    for others, ends in ((2, EPOCHS), (3, 2)):
        judge = stopping("median", min_samples_required=3)
        assert lasted(play(judge, [*THREE[:others], bad], ()))[others] == ends


# Ray itself.


@given(
    scores=curves,
    order=orders,
    grace=st.integers(1, EPOCHS),
    factor=st.sampled_from([2, 3, 4]),
    within=st.booleans(),
)
def test_asha_decides_as_rays_own_does(scores, order, grace, factor, within):
    """Ray's, told of everything as Ray tells it, which tells of a trial's end otherwise."""
    rules = ("a", "b")
    given_ = {"grace_period": grace, "reduction_factor": factor, "within_rule": within}
    ours = play(stopping("asha", **given_), scores, order, rules)
    make = lambda: AsyncHyperBandScheduler(
        metric=SCORE, mode="max", max_t=EPOCHS, grace_period=grace, reduction_factor=factor
    )
    judges = {rule: make() for rule in rules}
    for n in range(TRIALS):
        judges[rules[n % 2 * within]].on_trial_add(None, early_stopping._Name(str(n)))  # pyright: ignore
    for number, epoch, score, stops in ours:
        judge, trial = judges[rules[number % 2 * within]], early_stopping._Name(str(number))
        result = {SCORE: score, TRAINING_ITERATION: epoch}
        if epoch == EPOCHS:
            judge.on_trial_complete(None, trial, result)  # pyright: ignore
            continue
        decided = judge.on_trial_result(None, trial, result)  # pyright: ignore
        assert stops == (decided == TrialScheduler.STOP)


def test_a_trial_nobody_heard_of_has_no_epochs():
    assert stopping("asha").heard_of(3) == 0
