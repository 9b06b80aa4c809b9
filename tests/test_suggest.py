"""What is tried next: a function of the seed, the number and the history, live or resumed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings, strategies as st
from optuna.trial import TrialState

from disinhib import hydra_config
from disinhib.errors import ConfigError
from disinhib.tuning import (
    options as _registers_the_groups,  # noqa: F401
    quasi_random,
    space_tree,
    suggest,
    validation,
)
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED, RUNNING, Record
from disinhib.tuning.suggest import SAMPLERS
from disinhib.tuning.turns import Sharing, turn
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
SMALL = {"n_startup_trials": 3, "popsize": 4}  # so that a sampler soon does what it is for
RULES = ("a", "b")


def missing(name):
    needed = SAMPLERS[name].needs
    return needed is not None and importlib.util.find_spec(needed) is None


INSTALLED = [name for name in SAMPLERS if not missing(name)]
LEARNING = [name for name in INSTALLED if SAMPLERS[name].own]  # the others draw at random


def space(trial):
    """Two rules; b has a choice that another number hangs on, as the rules that are shipped."""
    rule = trial.suggest_categorical("trainer", RULES)
    overrides = {
        "trainer": rule,
        "number": trial.number,
        "rate": trial.suggest_float(f"{rule}.rate", 1e-4, 1e-1, log=True),
        "gain": trial.suggest_float(f"{rule}.gain", 0.0, 1.0),
        "size": trial.suggest_int(f"{rule}.size", 1, 9),
    }
    if rule == "b" and not trial.suggest_categorical("b.strong", (False, True)):
        overrides["nudge"] = trial.suggest_float("b.nudge", 0.0, 1.0)
    return overrides


def wider(trial):
    """One rule more, other ranges, fewer parameters."""
    rule = trial.suggest_categorical("trainer", (*RULES, "c"))
    return {"trainer": rule, "number": trial.number,
            "rate": trial.suggest_float(f"{rule}.rate", 1e-5, 1e-1, log=True),
            "gain": trial.suggest_float(f"{rule}.gain", 0.0, 1.5)}  # fmt: skip


def options(name, **given):
    defaults = {option.name: option.default for option in SAMPLERS[name].options}
    return {"name": name, **defaults, **given}


def sampler(name, **given):
    defaults = options(name)
    return suggest.sampler(defaults | {n: v for n, v in SMALL.items() if n in defaults} | given)


def score(overrides, epoch):
    """Best at a gain of 0.8 and a rate of 1e-2; grows with the epochs."""
    rate = math.log10(overrides.get("rate", 1e-3)) + 2
    return epoch / 3 - (overrides.get("gain", 0.5) - 0.8) ** 2 - rate**2


class Course:
    """A study in small: three epochs a trial; `records` are what its log would have."""

    def __init__(self, name="tpe", state=lambda number: COMPLETE, seed=0, rules=RULES, batch=None,
                 space=space, points=(), past=(), repeats=1):  # fmt: skip
        self.sampler, self.state, self.seed, self.space = sampler(name), state, seed, space
        self.rules, self.batch, self.points, self.past = rules, batch, points, past
        self.repeats = repeats
        self.sequence = lambda turn: {}
        if SAMPLERS[name].sequence:
            self.sequence = quasi_random.points(space, seed, rules, repeats)
        self.records, self.overrides = {}, {}

    def turn(self, number):
        return turn(number, self.records, Sharing(self.rules, self.repeats))

    def history(self, number):
        return suggest.history(self.records, self.past, number, self.turn(number), self.batch)

    def propose(self, number):
        return suggest.suggest(
            self.space, self.sampler, self.history(number),
            suggest.sampler_seed(self.seed, number), number,
            self.sequence(self.turn(number))
            | suggest.fixed_params(self.turn(number), self.points),
        )  # fmt: skip

    def ask(self, number):
        self.overrides[number], point = json.loads(json.dumps(self.propose(number)))
        own = self.overrides[number]
        config = {"number": number, "rule": own["trainer"], "epochs": 3, "searched": own}
        self.records[number] = Record(config, point)  # pyright: ignore[reportArgumentType]

    def run(self, number, scores=None, state=None):
        record = self.records[number]
        record.state = state or self.state(number)
        if scores is None:
            epochs = {COMPLETE: 3, PRUNED: 1 + number % 2, FAILED: number % 3}[record.state]
            scores = [score(self.overrides[number], epoch) for epoch in range(1, epochs + 1)]
        record.scores = scores

    def go(self, trials, at_once=1):
        """Trials up to `trials`, of which always `at_once` are out."""
        out = [number for number, record in self.records.items() if not record.ended]
        for number in range(len(self.records), trials):
            self.ask(number)
            out.append(number)
            if len(out) >= at_once:
                self.run(out.pop(len(out) // 2))
        return self

    @property
    def proposals(self):
        return {n: (self.overrides[n], record.point) for n, record in self.records.items()}

    @property
    def params(self):
        return {n: record.point["params"] for n, record in self.records.items()}

    def tried(self, space=space):
        """What it can teach a study of `space`."""
        return suggest.as_tried(self.records.values(), space)


def mixed(number):
    return (COMPLETE, COMPLETE, PRUNED, COMPLETE, FAILED, COMPLETE, COMPLETE)[number % 7]


@cache
def earlier(name="random", trials=40):
    """A study that has been."""
    return Course(name, mixed, seed=9).go(trials)


# The table.


@pytest.mark.parametrize("name", SAMPLERS)
def test_hydra_offers_every_entry_with_its_options_and_defaults(name):
    composed, choices = hydra_config.compose("study", [f"searcher={name}"])
    assert composed["searcher"] == options(name)
    assert choices["searcher"] == name and SAMPLERS[name].words
    for option in SAMPLERS[name].options:
        wrong = {**composed, "searcher": {**composed["searcher"], option.name: object()}}
        with pytest.raises(ConfigError, match=rf"^searcher\.{option.name}: given "):
            validation.check(wrong)


def test_hydra_offers_no_other():
    with pytest.raises(ConfigError) as refusal:
        hydra_config.compose("study", ["searcher=luck"])
    allowed = str(refusal.value).partition("allowed is one of ")[2].split(";")[0]
    assert sorted(allowed.split(", ")) == sorted(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_whose_package_is_missing_is_refused_in_one_line(name):
    composed, _ = hydra_config.compose("study", [f"searcher={name}"])
    if not missing(name):
        validation.check(composed)
        return
    needed = SAMPLERS[name].needs
    with pytest.raises(ConfigError, match=f"^searcher: given {name}, .* the package {needed}$"):
        validation.check(composed)


# A function of the seed.


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [RULES, ()], ids=["balanced", "in common"])
def test_the_same_seed_proposes_the_same(name, rules):
    one, two, other = (Course(name, mixed, seed, rules).go(14) for seed in (5, 5, 6))
    assert one.proposals == two.proposals
    assert one.overrides[0] != other.overrides[0] and one.overrides[13] != other.overrides[13]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [RULES, ()], ids=["balanced", "in common"])
@pytest.mark.parametrize("batch", [None, 4])
def test_a_search_that_goes_on_proposes_what_the_live_one_does(name, rules, batch):
    """From what the log has, which is JSON, and in whatever order its records are listed."""
    live = Course(name, mixed, 3, rules, batch)
    for trials in (1, 13, 20, 30, 37):
        live.go(trials - 1, at_once=1 if batch else 3)
        again = Course(name, mixed, 3, rules, batch)
        again.records = json_copies(reversed(live.records.values()))
        proposed = again.propose(trials - 1)
        live.go(trials, at_once=1 if batch else 3)
        assert json.loads(json.dumps(proposed)) == [*live.proposals[trials - 1]]
    if name == "cmaes" and rules:  # it did more than begin
        attributes = [record.point["system_attrs"] for record in live.records.values()]
        assert max(each.get("cma:generation", 0) for each in attributes) >= 2


def json_copies(records):
    copies = (Record(**json.loads(json.dumps(vars(record)))) for record in records)
    return {record.number: record for record in copies}


GO_ON = """
import json, sys
from disinhib.tuning import suggest
from search_spaces import SPACES
for name, (options, history, fixed) in json.load(sys.stdin).items():
    sampler = suggest.sampler(options)
    proposal = suggest.suggest(SPACES["rules"], sampler, history, 7, 30, fixed)
    print(json.dumps([name, *proposal]))
"""


def test_another_process_proposes_the_same():
    """Whose sets and dictionaries of strings may have another order."""
    inputs, expected = {}, {}
    for name in INSTALLED:
        rules = ("bp", "exact-inv", "lin-thresh") if options(name)["balanced"] else ()
        live = Course("random", mixed, rules=rules, space=SPACES["rules"]).go(30)
        fixed = suggest.fixed_params(live.turn(30), ())
        inputs[name] = (options(name), live.history(30), fixed)
        make = suggest.sampler(options(name))
        proposal = suggest.suggest(SPACES["rules"], make, live.history(30), 7, 30, fixed)
        expected[name] = json.loads(json.dumps(proposal))
    done = subprocess.run(
        [sys.executable, "-c", GO_ON], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"},
        input=json.dumps(inputs), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())} == expected


def test_a_space_may_branch_on_the_number_of_a_trial():
    """That in the study: Optuna's own counts the history."""

    def alternating(trial):
        name = "even" if trial.number % 2 == 0 else "odd"
        return {"trainer": "a", name: trial.suggest_float(name, 0.0, 1.0)}

    course = Course("tpe", mixed, rules=(), space=alternating, past=earlier().tried()).go(12)
    assert [list(course.params[n]) for n in range(12)] == [["even"], ["odd"]] * 6


def test_trial_seeds_are_independent_and_small_enough_for_jax():
    seeds = [seed for n in range(200) for seed in suggest.trial_seeds(0, n, 3)]
    assert len(set(seeds)) == 600 and max(seeds) < 2**31 and min(seeds) >= 0
    assert suggest.trial_seeds(0, 7, 3)[:1] == suggest.trial_seeds(0, 7)
    assert suggest.trial_seeds(1, 7) != suggest.trial_seeds(0, 7)


def test_an_order_is_the_studys_own():
    points = list(range(50))
    assert suggest.shuffled(points, 1) == suggest.shuffled(points, 1) != suggest.shuffled(points, 2)
    assert sorted(suggest.shuffled(points, 1)) == points != suggest.shuffled(points, 1)


# Rules take turns.


@pytest.mark.parametrize("name", INSTALLED)
def test_rules_take_turns_if_balanced(name):
    course = Course(name, mixed).go(14)
    assert [course.overrides[n]["trainer"] for n in range(14)] == [*RULES] * 7
    assert [course.overrides[n]["number"] for n in range(14)] == list(range(14))


@pytest.mark.parametrize(("rules", "repeats"), [(RULES, 1), (RULES, 2), ((), 2)])
@pytest.mark.parametrize("name", LEARNING)
def test_no_rule_or_repeat_learns_from_another(name, rules, repeats):
    turns = max(1, len(rules)) * repeats
    alone, together = (Course(name, mixed, rules=rules, repeats=repeats) for _ in range(2))
    for n in range(10 * turns):
        for course in (alone, together):
            course.ask(n)
        together.run(n)
        if n % turns == 0:
            alone.run(n)
    for n in range(0, 10 * turns, turns):
        assert alone.records[n].point == together.records[n].point
    if rules:  # in a space with branches CMA-ES would draw at random
        assert alone.proposals != together.proposals


@pytest.mark.parametrize("name", LEARNING)
def test_it_learns(name):
    """Later proposals are better than the first ones, which are random."""
    one = lambda trial: {"gain": trial.suggest_float("gain", 0, 1), "trainer": "a",
                         "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True)}  # fmt: skip
    course = Course(name, rules=(), space=one)
    for n in range(60):
        course.ask(n)
        course.run(n, [score(course.overrides[n], 3)])
    merits = [score(course.overrides[n], 3) for n in range(60)]
    assert np.median(merits[40:]) > np.quantile(merits[:20], 0.75)


# Points and earlier studies.

POINTS = [
    {"trainer": "a", "a.rate": 1e-3, "a.gain": 0.25, "a.size": 3},
    {"trainer": "b", "b.rate": 2e-3, "b.gain": 0.5, "b.size": 4, "b.strong": True},
    {"trainer": "a", "a.gain": 0.75},  # the rest is the sampler's
]


@pytest.mark.parametrize("name", INSTALLED)
def test_points_come_first_each_in_its_rules_turn(name):
    course, free = Course(name, points=POINTS).go(6), Course(name).go(6)
    assert course.params[0] == POINTS[0]
    assert course.params[1] == POINTS[1]
    assert course.params[2].items() > POINTS[2].items()
    assert course.params[2]["a.size"] in range(1, 10)
    assert course.params[3]["b.gain"] != 0.5
    assert course.params[4]["a.gain"] not in (0.25, 0.75)
    assert course.params[0] != free.params[0]


def test_every_repeat_tries_the_points():
    course = Course("random", points=POINTS, repeats=2).go(12)
    assert [course.params[n] for n in range(4)] == [p for p in POINTS[:2] for _ in range(2)]
    for n in (4, 5):
        assert course.params[n].items() > POINTS[2].items()
    assert course.params[6]["b.gain"] != course.params[7]["b.gain"]


def test_points_come_first_in_their_order_if_rules_take_no_turns():
    course = Course("random", rules=(), points=POINTS).go(4)
    for n, point in enumerate(POINTS):
        assert course.params[n].items() >= point.items()


@pytest.mark.parametrize(
    ("number", "rules", "fixed"),
    [
        (0, RULES, POINTS[0]), (1, RULES, POINTS[1]), (2, RULES, POINTS[2]),
        (3, RULES, {"trainer": "b"}), (4, RULES, {"trainer": "a"}),
        (2, (), POINTS[2]), (3, (), {}), (1, ("c", *RULES), POINTS[0]),
    ],
)  # fmt: skip
def test_what_is_decided_already_of_a_trial(number, rules, fixed):
    assert suggest.fixed_params(turn(number, {}, Sharing(rules)), POINTS) == fixed


@pytest.mark.parametrize("name", INSTALLED)
def test_a_search_that_goes_on_among_its_points_goes_on_with_them(name):
    live = Course(name, points=POINTS).go(3)
    again = Course(name, points=POINTS)
    again.records = {0: live.records[0]}
    assert [again.propose(n).point["params"] for n in (1, 2)] == [live.params[1], live.params[2]]


def test_what_an_earlier_study_can_teach():
    course = Course("random", mixed).go(14)
    course.ask(14)  # and has not ended
    tried = course.tried()
    states = [mixed(n) for n in range(14)]
    assert [trial["state"] for trial in tried] == [s for s in states if s != FAILED]
    assert [trial["rule"] for trial in tried] == [
        RULES[n % 2] for n in range(14) if states[n] != FAILED
    ]
    assert tried[0]["point"] == course.records[0].point
    assert tried[0]["scores"] == [score(course.overrides[0], e) for e in (1, 2, 3)]
    assert json.loads(json.dumps(tried)) == tried
    assert suggest.within(tried, space) == tried


@pytest.mark.parametrize("name", INSTALLED)
def test_an_earlier_study_is_learnt_from_and_not_counted(name):
    past = earlier().tried()
    warm, cold = (Course(name, mixed, points=POINTS, past=p).go(12) for p in (past, ()))
    assert [warm.overrides[n]["number"] for n in range(12)] == list(range(12))
    assert [warm.overrides[n]["trainer"] for n in range(12)] == [*RULES] * 6
    assert warm.params[0] == POINTS[0] and warm.params[1] == POINTS[1]
    assert (warm.params[3] != cold.params[3]) == (name in LEARNING)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [("a", "b", "c"), ()], ids=["balanced", "in common"])
def test_an_earlier_study_may_have_had_other_rules_and_ranges(name, rules):
    past = earlier(name).tried(wider)
    assert past
    live = Course(name, mixed, rules=rules, space=wider, past=past).go(24)
    assert len({tuple(params.values()) for params in live.params.values()}) == 24
    again = Course(name, rules=rules, space=wider, past=json.loads(json.dumps(past)))
    again.records = json_copies(live.records.values())
    live.ask(24)
    assert json.loads(json.dumps(again.propose(24))) == [*live.proposals[24]]


@pytest.mark.parametrize("before", ["random", "cmaes"])
def test_cmaes_is_used_after_an_earlier_study_with_other_ranges(before):
    for past in ([], earlier(before).tried(wider)):
        live = Course("cmaes", space=wider, past=past).go(30)
        last = [live.records[n].point["system_attrs"] for n in range(20, 30)]
        assert all("cma:generation" in attributes for attributes in last)


def test_of_an_earlier_study_with_other_choices_what_was_so_chosen_is_left_out():
    def other(trial):
        rule = trial.suggest_categorical("trainer", RULES)
        if rule == "b":
            trial.suggest_categorical("b.strong", ("weak", "very"))
        return {"trainer": rule}

    assert {trial["rule"] for trial in earlier().tried()} == {"a", "b"}
    assert {trial["rule"] for trial in earlier().tried(other)} == {"a"}


def test_of_an_earlier_study_what_was_fixed_counts_by_its_value():
    """Whichever of the two searches it: its trials lie in the other's space if their values do."""
    at = lambda rate: space_tree.narrowed(space, {"rate": rate}, {})
    lies = lambda course, rate: suggest.as_tried(course.records.values(), at(rate), {"rate": rate})
    slow, fast = (Course("random", space=at(rate)).go(6) for rate in (0.01, 0.1))
    assert len(lies(slow, 0.01)) == len(lies(fast, 0.1)) == 6
    assert lies(slow, 0.1) == lies(fast, 0.01) == lies(Course("random").go(6), 0.01) == []
    points = [trial["point"]["params"] for trial in slow.tried()]
    assert [params[f"{RULES[n % 2]}.rate"] for n, params in enumerate(points)] == [0.01] * 6


def test_a_trial_of_a_rule_that_is_not_in_the_space_lies_outside():
    """Also if that has the same option `trainer`, as bp has."""
    of_bp_ei = Course("random", rules=(), space=SPACES["bp_ei"]).go(2)
    for record in of_bp_ei.records.values():
        record.config["rule"] = "bp-ei"
    assert len(of_bp_ei.tried(SPACES["bp_ei"])) == 2
    several = {name for name in SPACES if "bp-ei" in space_tree.rules_of(SPACES[name])}
    assert several == {"rules", "all_rules"}
    for name in {*SPACES} - {"bp_ei"}:
        assert len(of_bp_ei.tried(SPACES[name])) == (2 if name in several else 0)
    of_rule = lambda rule: space_tree.narrowed(SPACES["rules"], {"trainer": rule}, {})
    lies = lambda rule: suggest.as_tried(
        of_bp_ei.records.values(), of_rule(rule), {"trainer": rule}
    )
    assert (len(lies("bp-ei")), len(lies("bp"))) == (2, 0)


def test_a_rule_of_a_space_of_ones_own_may_be_fixed_by_its_trainer():
    """There `trainer` may be an option as any other, whatever the name of rule and circuit."""

    def space(trial):
        trainer = trial.suggest_categorical("trainer", ("bp", "exact-inv"))
        return {"model/vf": "dale", "trainer": trainer, "x": trial.suggest_float("x", 0, 1)}

    course = Course("random", rules=(), space=space).go(6)
    for record in course.records.values():
        record.config["rule"] = {"bp": "bp-ei"}.get(record.rule, record.rule)
    own = [n for n, overrides in course.overrides.items() if overrides["trainer"] == "bp"]
    fixed = {"trainer": "bp"}
    narrowed = space_tree.narrowed(space, fixed, {})
    assert 0 < len(own) < 6
    assert len(suggest.as_tried(course.records.values(), narrowed, fixed)) == len(own)


def test_what_was_good_before_is_near_what_is_tried_first():
    first = lambda seed, past: Course(seed=seed, past=past).go(2).overrides
    warm, cold = (
        [score(first(seed, past)[n], 3) for seed in range(12) for n in (0, 1)]
        for past in (earlier().tried(), [])
    )
    assert np.median(warm) > np.median(cold) + 0.1


# Batches.

SIZE = 4


@pytest.mark.parametrize("name", INSTALLED)
def test_a_batch_learns_from_earlier_batches_only(name):
    """Whatever its own trials have reported before the others are proposed, as when it goes on."""
    whole = Course(name, mixed, batch=SIZE)
    for first in range(0, 3 * SIZE, SIZE):
        for n in range(first, first + SIZE):
            whole.ask(n)
        for n in range(first, first + SIZE):
            whole.run(n)
    early = Course(name, mixed, batch=SIZE)
    for n in range(3 * SIZE):
        early.ask(n)
        if n % SIZE == 1:
            early.run(n)
        if n % SIZE == 2:  # it has told of an epoch
            early.run(n, [0.5], RUNNING)
        if n % SIZE == SIZE - 1:
            for other in (n - 3, n - 1, n):
                early.run(other)
    assert early.proposals == whole.proposals


@given(
    number=st.integers(0, 15),
    told=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.booleans()), max_size=40),
    balanced=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_known_of_a_batch_is_that_it_runs(number, told, balanced):
    """The history that a proposal may learn from does not depend on what its own batch, or a later
    one, has reported: so the order of reports does not matter."""
    rules = RULES if balanced else ()
    records = {}
    for n in range(16):
        config: Any = {"number": n, "rule": RULES[n % 2], "epochs": 3, "searched": {}}
        records[n] = Record(config)
    first = number // SIZE * SIZE
    for n in range(first):
        records[n].scores, records[n].state = [0.1 * n] * 3, COMPLETE
    whose = turn(number, {}, Sharing(rules))
    before = suggest.history(records, [], number, whose, SIZE)
    for n, epochs, over in told:
        if n >= first:
            records[n].scores, records[n].state = [0.5] * epochs, PRUNED if over else RUNNING
    assert suggest.history(records, [], number, whose, SIZE) == before
    own = [n for n in range(number) if not balanced or n % 2 == number % 2]
    assert [len(trial["scores"]) for trial in before] == [3 if n < first else 0 for n in own]
    assert all(trial["state"] == RUNNING for trial in before if not trial["scores"])


def test_without_batches_the_order_of_reports_matters():
    early, late = (Course(state=mixed) for _ in range(2))
    for course in (early, late):
        for n in range(16):
            course.ask(n)
            if course is early or n < 8:
                course.run(n)
    assert early.records[8].point == late.records[8].point
    assert early.records[15].point != late.records[15].point


# What Optuna is told.


def test_optuna_is_told_every_state_by_its_name_and_failed_trials_have_no_value():
    course = Course(state=mixed).go(14)
    course.ask(14)
    states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}
    for number, record in course.records.items():
        trial = suggest.frozen_trial(suggest.tried(record))
        assert trial.state == states.get(record.state, TrialState.RUNNING)
        assert trial.intermediate_values == dict(enumerate(record.scores, start=1))
        assert trial.value == (record.score if record.state in (COMPLETE, PRUNED) else None)
        assert trial.params == course.params[number]
        trial._validate()


def test_the_newest_trials_and_the_best_of_the_others_are_remembered():
    """And all that run, however many: more may run at once than are remembered."""
    states = {3: PRUNED, 4: FAILED, 5: RUNNING, 90: RUNNING}
    scores = {n: [float(n % 50)] for n in range(101)} | {3: [1e3], 4: [math.nan], 7: [99.0]}
    ends = [(states.get(n, COMPLETE), s) for n, s in scores.items()]
    assert suggest.good(30) == 3
    assert suggest.remembered(ends, 30) == [5, 7, 48, 49, *range(73, 101)]
    running = [(RUNNING, [])] * 200
    assert suggest.remembered(ends + running, 30)[-200:] == [*range(101, 301)]
    assert suggest.remembered(ends, 99) == suggest.remembered(ends, None) == list(range(101))


def test_a_history_that_is_too_long_is_that_of_the_remembered_trials():
    """Of an earlier study's and its own, of the rule whose turn it is."""
    most = 28
    course = Course(state=mixed, past=earlier().tried()).go(3 * most)
    whole = course.history(3 * most)
    whose = course.turn(3 * most)
    kept = suggest.history(course.records, course.past, 3 * most, whose, None, most)
    ends = [(trial["state"], trial["scores"]) for trial in whole]
    assert kept == [whole[n] for n in suggest.remembered(ends, most)]
    learnt = [trial for trial in kept if trial["state"] != FAILED]
    assert len(learnt) == most < len(kept) < len(whole)  # failed ones count for nothing


@pytest.mark.parametrize("name", INSTALLED)
def test_nan_is_never_told_as_a_value(name):
    course = Course(name)
    for n in range(16):
        course.ask(n)
        merit = score(course.overrides[n], 1)
        course.run(n, *(([merit, math.nan], FAILED) if n % 3 == 0 else ([merit], COMPLETE)))
    trials = [suggest.frozen_trial(trial) for n in (16, 17) for trial in course.history(n)]
    assert sum(trial.state == TrialState.FAIL for trial in trials) == 6
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.value is None
        else:
            assert trial.value is not None and math.isfinite(trial.value)
    rates = [params[f"{RULES[n % 2]}.rate"] for n, params in course.params.items()]
    assert all(map(math.isfinite, rates))


def test_no_warnings_of_optunas_own_experiments():
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        for name in INSTALLED:
            Course(name).go(3)
