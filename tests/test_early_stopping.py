# pyright: reportAssignmentType=false
"""Early stopping: what is stopped, when, compared with whom, and the same again on resuming."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

import disinhib.tuning.options  # noqa: F401  (tells Hydra of the table)
from disinhib import hydra_config
from disinhib.errors import ConfigError
from disinhib.tuning import early_stopping, validation
from disinhib.tuning.early_stopping import EARLY_STOPPING, asha, bracket, decide, median
from disinhib.tuning.event_log import REPEAT, Record

EPOCHS = 8


def options(name, **given):
    defaults = {option.name: option.default for option in EARLY_STOPPING[name].options}
    # So that a handful of trials is enough.
    defaults |= {"min_samples_required": 1} if "min_samples_required" in defaults else {}
    return {"name": name, **defaults, **given}


class Judge:
    """A study's records, and what is decided of them; its trials' rules take turns."""

    def __init__(self, name, batch=None, seed=0, rules=("a",), repeats=1, **given):
        self.options, self.batch, self.seed, self.rules = options(name, **given), batch, seed, rules
        self.records, self.repeats = {}, repeats

    def stops(self, number, score):
        """Whether `number` is stopped as it reports `score`; never after its last epoch."""
        record = self.records.setdefault(number, self.new(number))
        record.scores.append(score)
        return record.epochs < EPOCHS and self.decide(number)

    def new(self, number):
        rule = self.rules[number % len(self.rules)]
        tags = {REPEAT: str(number % self.repeats + 1)}
        return Record({"number": number, "rule": rule, "epochs": EPOCHS}, tags=tags)  # pyright: ignore

    def decide(self, number):
        return decide(self.records, self.records[number], self.options, self.seed, self.batch)

    def bracket(self, number):
        return bracket(number, self.seed, self.options, EPOCHS)


class Decision(NamedTuple):
    number: int
    epoch: int
    score: float
    stops: bool


def play(judge, scores, order):
    """What `judge` decides of trials with `scores` [trials][epochs] that report in `order`, until
    they are stopped or done; the rest report one after the other."""
    at, over, decisions = Counter(), set(), []
    rest = [number for number in range(len(scores)) for _ in range(EPOCHS)]
    for number in [*order, *rest]:
        if number in over:
            continue
        at[number] += 1
        score = scores[number][at[number] - 1]
        stops = judge.stops(number, score)
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


def worsening(name, **given):
    """How long each of many trials runs, each worse than all before it."""
    return lasted(play(Judge(name, **given), [[-n] * EPOCHS for n in range(MANY)], ()))


EARLY = [name for name in EARLY_STOPPING if min(worsening(name).values()) < EPOCHS]


# The table.


@pytest.mark.parametrize("name", EARLY_STOPPING)
def test_hydra_offers_every_entry_with_its_options_and_defaults(name):
    composed, choices = hydra_config.compose("study", [f"scheduler={name}"])
    entry = EARLY_STOPPING[name]
    defaults = {option.name: option.default for option in entry.options}
    assert composed["scheduler"] == {"name": name, **defaults}
    assert choices["scheduler"] == name and entry.words
    validation.check(composed)
    for option in entry.options:
        wrong = {**composed, "scheduler": {**composed["scheduler"], option.name: object()}}
        with pytest.raises(ConfigError, match=rf"^scheduler\.{option.name}: given "):
            validation.check(wrong)


def test_hydra_offers_no_other():
    with pytest.raises(ConfigError) as refusal:
        hydra_config.compose("study", ["scheduler=soon"])
    allowed = str(refusal.value).partition("allowed is one of ")[2].split(";")[0]
    assert sorted(allowed.split(", ")) == sorted(EARLY_STOPPING)


@pytest.mark.parametrize("name", EARLY_STOPPING)
@pytest.mark.parametrize("batch", [None, 2])
def test_worse_and_worse_trials_are_stopped_but_never_before_the_grace_period(name, batch):
    ran = worsening(name, batch=batch)
    assert ran[0] == EPOCHS
    assert all(epochs >= EPOCHS // 4 for epochs in ran.values())
    assert (min(ran.values()) < EPOCHS) == (name in EARLY) == (name != "none")


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("grace", [1, 3, 5])
def test_the_first_decision_is_at_the_end_of_the_grace_period(name, grace):
    assert min(worsening(name, grace_period=grace).values()) == grace


@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders, grace=st.integers(1, EPOCHS))
@settings(max_examples=30)
def test_nothing_is_stopped_within_the_grace_period(name, scores, order, grace):
    decisions = play(Judge(name, grace_period=grace), scores, order)
    assert not any(d.stops for d in decisions if d.epoch < grace)


@pytest.mark.parametrize("name", EARLY_STOPPING)
@pytest.mark.parametrize("batch", [None, 2])
@given(scores=curves, order=orders, data=st.data())
@settings(max_examples=30)
def test_it_decides_the_same_whoever_asks_and_in_whatever_order_trials_are_listed(
    name, batch, scores, order, data
):
    """As in a study that goes on: up to any moment from the log, and from there live."""
    if batch is not None:  # one begins when the one before has ended
        order = [*order, *(n for n in range(TRIALS) for _ in range(EPOCHS))]
        order.sort(key=lambda number: number // batch)
    decisions = play(Judge(name, batch=batch), scores, order)
    at = data.draw(st.integers(0, len(decisions)))
    again = Judge(name, batch=batch)
    for number in data.draw(st.permutations(sorted({d.number for d in decisions[:at]}))):
        record = again.records[number] = again.new(number)
        record.scores += [d.score for d in decisions[:at] if d.number == number]
    assert [again.stops(d.number, d.score) for d in decisions[at:]] == [
        d.stops for d in decisions[at:]
    ]


@pytest.mark.parametrize("name", EARLY)
def test_what_is_no_number_is_compared_with_nobody(name):
    """Else no comparison with such a trial's peers would come out as worse any more."""
    broken, good = [[math.nan] * EPOCHS] * 2, [[0.5] * EPOCHS] * 6
    for peers in (good, [*broken, *good]):
        of_one = options(name, grace_period=2, bracket=0)
        assert EARLY_STOPPING[name].stops([0.1, 0.1], peers, EPOCHS, of_one)
        assert not EARLY_STOPPING[name].stops([0.9, 0.9], peers, EPOCHS, of_one)
    assert not EARLY_STOPPING[name].stops([0.1, 0.1], broken, EPOCHS, of_one)


# Within a rule.


@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders)
@settings(max_examples=30)
def test_a_rule_is_judged_as_if_it_were_alone(name, scores, order):
    rules = ("a", "b")
    together = play(Judge(name, within_rule=True, rules=rules), scores, order)
    for first in (0, 1):
        own = [d for d in together if d.number % 2 == first]
        alone = Judge(name, within_rule=True, rules=rules)
        assert [alone.stops(d.number, d.score) for d in own] == [d.stops for d in own]


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("name", EARLY)
@given(scores=curves, order=orders)
@settings(max_examples=30)
def test_a_repeat_is_judged_as_if_it_were_alone(name, within, scores, order):
    together = play(Judge(name, within_rule=within, repeats=2), scores, order)
    for first in (0, 1):
        own = [d for d in together if d.number % 2 == first]
        alone = Judge(name, within_rule=within, repeats=2)
        assert [alone.stops(d.number, d.score) for d in own] == [d.stops for d in own]


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("batch", [None, 2])
def test_a_worse_rule_is_stopped_only_if_rules_are_compared(name, batch):
    # Every trial of b is better than the one before, and worse than any of a.
    scores = [[100 if n % 2 == 0 else n] * EPOCHS for n in range(MANY)]
    for within in (True, False):
        judge = Judge(name, within_rule=within, batch=batch, rules=("a", "b"))
        ran = lasted(play(judge, scores, ()))
        assert all(ran[n] == EPOCHS for n in range(0, MANY, 2))
        assert (min(ran.values()) == EPOCHS) == within


# Batches.


@pytest.mark.parametrize("name", EARLY_STOPPING)
@given(scores=curves, data=st.data())
@settings(max_examples=40)
def test_in_batches_it_does_not_matter_who_is_faster(name, scores, data):
    size = 3
    order = []
    for first in range(0, TRIALS, size):
        batch = [n for n in range(first, first + size) for _ in range(EPOCHS)]
        order += data.draw(st.permutations(batch))
    interleaved = play(Judge(name, batch=size), scores, order)
    in_turn = play(Judge(name, batch=size), scores, ())
    assert sorted(interleaved) == sorted(in_turn)


@pytest.mark.parametrize("name", EARLY)
def test_without_batches_it_does(name):
    better = WORSE[::-1]
    in_turn = lasted(play(Judge(name), better, ()))
    last_one_first = lasted(play(Judge(name), better, sorted(range(TRIALS), reverse=True) * 8))
    assert in_turn != last_one_first


@pytest.mark.parametrize("name", EARLY)
def test_a_batch_is_compared_with_earlier_ones_only(name):
    ran = lasted(play(Judge(name, batch=3), WORSE, ()))
    assert [ran[n] for n in range(3)] == [EPOCHS] * 3  # nobody to compare with
    assert min(ran[n] for n in range(3, 6)) < EPOCHS


# Successive halving.


@pytest.mark.parametrize(
    ("factor", "budget", "rungs"),
    [
        (2, 16, [1, 2, 4, 8]), (2, 17, [1, 2, 4, 8, 16]), (3, 27, [1, 3, 9]), (4, 3, [1]),
        (10, 1000, [1, 10, 100]), (1.5, 8, [1, 2, 3, 4, 6]), (1.2, 4, [1, 2, 3]),
    ],
)  # fmt: skip
def test_a_trial_is_judged_at_every_rung_and_nowhere_else(factor, budget, rungs):
    """Once at each: where two milestones fall on one epoch (1.2 and 1.44 on 2), Ray's own judges
    the trial again in the next epoch."""
    given_ = options("asha", grace_period=1, reduction_factor=factor)
    peers = [[1.0] * budget] * 3
    judged = [n for n in range(1, budget) if asha([0.0] * n, peers, budget, given_)]
    assert judged == rungs


@pytest.mark.parametrize(
    ("score", "factor", "stops"),
    # The peers at the rung: 1, 2, 3, 4. Their median is 2.5, their upper quartile 3.25.
    [(2.4, 2, True), (2.5, 2, False), (3.2, 4, True), (3.25, 4, False), (5.0, 4, False)],
)
def test_a_trial_goes_on_if_it_is_as_good_as_the_percentile_of_its_peers(score, factor, stops):
    given_ = options("asha", grace_period=2, reduction_factor=factor)
    peers = [[9.0, 1.0], [9.0, 2.0, 9.0], [9.0, 3.0], [9.0, 4.0], [9.0]]
    assert asha([0.0, score], peers, EPOCHS, given_) is stops


# Hyperband.

# Li et al. 2018, table 1: R = 81, eta = 3: configurations in brackets s = 4 ... 0.
LI = [81, 34, 15, 8, 5]


def test_shares_of_hyperbands_brackets_are_the_published_ones():
    given_ = options("hyperband", grace_period=1, reduction_factor=3)
    shares = early_stopping.hyperband_brackets(given_, 81)
    assert [math.ceil(share / shares[-1] * 5 - 1e-9) for share in shares] == LI


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1.5, 2, 2.5, 3, 4, 10]))
def test_shares_sum_to_one_and_no_bracket_begins_after_the_end(epochs, grace, factor):
    grace = min(grace, epochs)
    given_ = options("hyperband", grace_period=grace, reduction_factor=factor)
    shares = early_stopping.hyperband_brackets(given_, epochs)
    assert math.isclose(sum(shares), 1) and min(shares) > 0
    last = len(shares) - 1
    assert grace * factor**last <= epochs * (1 + 1e-6) < grace * factor ** (last + 1) * (1 + 2e-6)


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "expected"),
    [(16, 1, 2, [1, 2, 4, 8, 16]), (27, 3, 3, [3, 9, 27]), (20, None, 2, [5, 10, 20]),
     (20, 3, 4, [3, 12])],
)  # fmt: skip
def test_a_brackets_first_decision_is_a_reduction_factor_later(epochs, grace, factor, expected):
    """Of a trial that is the worst of three from the start; `epochs` if it is never judged."""
    given_ = options("hyperband", grace_period=grace, reduction_factor=factor)
    peers = [[1.0] * epochs, [0.9] * epochs]

    def first(k):
        stops = lambda n: asha([0.1] * n, peers, epochs, {**given_, "bracket": k})
        return next(filter(stops, range(1, epochs)), epochs)

    brackets = range(len(early_stopping.hyperband_brackets(given_, epochs)))
    assert [first(k) for k in brackets] == expected


def test_trials_fall_into_brackets_by_their_shares_their_number_and_the_studys_seed():
    given_ = options("hyperband", grace_period=1)
    shares = early_stopping.hyperband_brackets(given_, 16)
    brackets = [[bracket(n, seed, given_, 16) for n in range(3000)] for seed in (0, 1, 0)]
    assert brackets[0] == brackets[2] != brackets[1]
    for drawn in brackets:
        counts = Counter(drawn)
        # Three standard errors of the largest share: 3 * sqrt(0.5 * 0.5 / 3000).
        np.testing.assert_allclose([counts[k] / 3000 for k in range(len(shares))], shares,
                                   atol=0.028)  # fmt: skip


def test_others_than_hyperband_have_one_bracket():
    for name in {*EARLY_STOPPING} - {"hyperband"}:
        assert {bracket(n, 0, options(name), EPOCHS) for n in range(50)} == {0}


@given(scores=curves, order=orders, seed=st.integers(0, 9))
@settings(max_examples=30)
def test_a_bracket_is_judged_as_if_it_were_alone(scores, order, seed):
    judge = Judge("hyperband", seed=seed)
    together = play(judge, scores, order)
    for one in {judge.bracket(n) for n in range(TRIALS)}:
        own = [d for d in together if judge.bracket(d.number) == one]
        alone = Judge("hyperband", seed=seed)
        assert [alone.stops(d.number, d.score) for d in own] == [d.stops for d in own]


# Median.

# Means from the grace period (2 epochs) on: 0.3, 0.5 and 0.7 after any number of epochs.
THREE = [[0.0, *[mean] * (EPOCHS - 1)] for mean in (0.7, 0.5, 0.3)]


def ends(scores, peers):
    """The epoch after which median stopping ends a trial that has three peers or is let alone."""
    given_ = options("median", min_samples_required=3)
    stops = lambda n: median(scores[:n], peers, EPOCHS, given_)
    return next(filter(stops, range(1, EPOCHS)), EPOCHS)


@pytest.mark.parametrize(("best", "last"), [(0.49, 2), (0.5, EPOCHS), (0.51, EPOCHS)])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_median_stops_a_trial_whose_best_is_below_the_others_median(best, last, order):
    peers = [THREE[n] for n in order]
    assert ends([0.0, *[best] * (EPOCHS - 1)], peers) == last
    assert ends([best] * EPOCHS, peers) == last


def test_a_good_epoch_before_the_grace_period_counts_as_a_trials_best():
    assert ends([0.6, *[0.0] * (EPOCHS - 1)], THREE) == EPOCHS


def test_median_waits_for_enough_others():
    bad = [0.0] * EPOCHS
    assert ends(bad, THREE[:2]) == EPOCHS
    assert ends(bad, THREE) == 2
    assert ends(bad, [*THREE[:2], THREE[2][:4]]) == 2
    assert ends(bad, [*THREE[:2], THREE[2][:1]]) == EPOCHS  # has not got as far


# Ray itself, told of everything as Ray Tune tells it, which tells of a trial's end otherwise.


def decided_by_ray(make, decisions, rules):
    """What Ray's scheduler, one for each rule, decides of the same reports."""
    judges = {rule: make() for rule in {rules(d.number) for d in decisions}}
    trials = {}
    for number in sorted({d.number for d in decisions}):
        trials[number] = RayTrial(number)
        judges[rules(number)].on_trial_add(None, trials[number])
    stops = []
    for number, epoch, score, _ in decisions:
        result = {"score": score, TRAINING_ITERATION: epoch}
        judge, trial = judges[rules(number)], trials[number]
        if epoch == EPOCHS:
            judge.on_trial_complete(None, trial, result)
            stops.append(False)
        else:
            stops.append(judge.on_trial_result(None, trial, result) == TrialScheduler.STOP)
    return stops


class RayTrial:
    """Stands in for Ray's trial, which is a key of its dictionaries."""

    def __init__(self, number):
        self.trial_id = str(number)


@given(
    scores=curves,
    order=orders,
    grace=st.integers(1, EPOCHS),
    factor=st.sampled_from([2, 3, 4]),
    within=st.booleans(),
)
def test_asha_decides_as_rays_own_does(scores, order, grace, factor, within):
    judge = Judge("asha", grace_period=grace, reduction_factor=factor, within_rule=within,
                  rules=("a", "b"))  # fmt: skip
    decisions = play(judge, scores, order)
    make = lambda: AsyncHyperBandScheduler(
        metric="score", mode="max", max_t=EPOCHS, grace_period=grace, reduction_factor=factor
    )
    rules = lambda number: number % 2 if within else 0
    assert decided_by_ray(make, decisions, rules) == [d.stops for d in decisions]


@given(
    scores=curves,
    order=orders,
    grace=st.integers(1, EPOCHS),
    least=st.integers(1, 3),
    within=st.booleans(),
)
def test_median_decides_as_rays_own_does(scores, order, grace, least, within):
    judge = Judge("median", grace_period=grace, min_samples_required=least, within_rule=within,
                  rules=("a", "b"))  # fmt: skip
    decisions = play(judge, scores, order)
    make = lambda: MedianStoppingRule(
        time_attr=TRAINING_ITERATION, metric="score", mode="max", grace_period=grace,
        min_samples_required=least,
        min_time_slice=math.inf,  # pyright: ignore[reportArgumentType]  (never pauses a trial)
    )  # fmt: skip
    rules = lambda number: number % 2 if within else 0
    assert decided_by_ray(make, decisions, rules) == [d.stops for d in decisions]
