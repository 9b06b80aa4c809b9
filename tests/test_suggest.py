"""What is tried next: a function of the seed, the number and what was heard, live or resumed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from optuna.trial import TrialState

from disinhib.tuning import suggest
from disinhib.tuning.event_log import ASKED, COMPLETE, ENDED, EPOCH, FAILED, PRUNED, Event
from disinhib.tuning.suggest import SAMPLERS, Search
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "conf" / "searcher"
SMALL = {"n_startup_trials": 3, "popsize": 4}  # so that a sampler soon does what it is for
RULES = ("a", "b")


def _missing(name):
    needed = SAMPLERS[name].needs
    return needed is not None and importlib.util.find_spec(needed) is None


INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(_missing(name), reason=f"{name} is not installed"))
    for name in SAMPLERS
]


def space(trial):
    """Two rules; b has a choice that another number hangs on, as the rules that are shipped."""
    rule = trial.suggest_categorical("trainer", RULES)
    found = {
        "trainer": rule,
        "number": trial.number,
        "rate": trial.suggest_float(f"{rule}.rate", 1e-4, 1e-1, log=True),
        "gain": trial.suggest_float(f"{rule}.gain", 0.0, 1.0),
        "size": trial.suggest_int(f"{rule}.size", 1, 9),
    }
    if rule == "b" and not trial.suggest_categorical("b.strong", (False, True)):
        found["nudge"] = trial.suggest_float("b.nudge", 0.0, 1.0)
    return found


def sampler(name, **given):
    shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    return suggest.sampler(shipped | {n: v for n, v in SMALL.items() if n in shipped} | given)


def searching(name="tpe", seed=0, rules=RULES, batch=None, space=space, mode="max", **given):
    return Search(space, sampler(name), mode, seed, rules, batch=batch, **given)


def score(overrides, epoch):
    """Best at a gain of 0.8 and a rate of 1e-2; grows with the epochs."""
    rate = math.log10(overrides.get("rate", 1e-3)) + 2
    return epoch / 3 - (overrides.get("gain", 0.5) - 0.8) ** 2 - rate**2


class Course:
    """A study in small: three epochs a trial; `events` are as they come out of a journal."""

    def __init__(self, searched, state=lambda number: COMPLETE):
        self.search, self.state = searched, state
        self.events, self.overrides, self.points = [], {}, {}

    def write(self, trial, kind, epoch, body):
        event = Event(len(self.events) + 1, 0.0, trial, kind, epoch, json.loads(json.dumps(body)))
        self.events.append(event)
        self.search.follow(event)

    def ask(self, number):
        proposal = self.search.propose(number)
        self.overrides[number], self.points[number] = proposal
        config = {"number": number, "rule": proposal.overrides["trainer"], "epochs": 3}
        self.write(number, ASKED, 0, {"config": config, "point": proposal.point})

    def run(self, number):
        state = self.state(number)
        epochs = {COMPLETE: 3, PRUNED: 1 + number % 2, FAILED: number % 3}[state]
        for epoch in range(1, epochs + 1):
            body = {"score": score(self.overrides[number], epoch)}
            self.write(number, EPOCH, epoch, body)
        reason = "Diverged" if state == FAILED else None
        self.write(number, ENDED, 0, {"state": state, "epochs": epochs, "reason": reason})

    def go(self, trials, at_once=1):
        """Trials up to `trials`, of which always `at_once` are out."""
        out = [number for number in self.overrides if (number, ENDED) not in self._told()]
        for number in range(len(self.overrides), trials):
            self.ask(number)
            out.append(number)
            if len(out) >= at_once:
                self.run(out.pop(len(out) // 2))
        return self

    def _told(self):
        return {(event.trial, event.kind) for event in self.events}


def mixed(number):
    return (COMPLETE, COMPLETE, PRUNED, COMPLETE, FAILED, COMPLETE, COMPLETE)[number % 7]


def rebuilt(course, name, **given):
    again = searching(name, **given)
    for event in course.events:
        again.follow(event)
    return again


def test_every_sampler_is_shipped():
    assert {file.stem for file in SHIPPED.glob("*.yaml")} == {*SAMPLERS}


# A function of the seed.


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [RULES, ()], ids=["balanced", "in common"])
def test_the_same_seed_proposes_the_same(name, rules):
    one, two, other = (Course(searching(name, seed, rules), mixed).go(14) for seed in (5, 5, 6))
    assert one.overrides == two.overrides and one.points == two.points
    assert one.overrides[0] != other.overrides[0] and one.overrides[13] != other.overrides[13]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [RULES, ()], ids=["balanced", "in common"])
@pytest.mark.parametrize("batch", [None, 4])
def test_a_search_that_goes_on_proposes_what_the_live_one_does(name, rules, batch):
    live = Course(searching(name, 3, rules, batch), mixed)
    for trials in (1, 13, 20, 30, 37):
        live.go(trials - 1, at_once=1 if batch else 3)
        again = rebuilt(live, name, seed=3, rules=rules, batch=batch)
        proposed = again.propose(trials - 1)
        live.go(trials, at_once=1 if batch else 3)
        assert proposed == (live.overrides[trials - 1], live.points[trials - 1])
    if name == "cmaes" and rules:  # it did more than begin
        attributes = [point["system_attrs"] for point in live.points.values()]
        assert max(each.get("cma:generation", 0) for each in attributes) >= 2


GO_ON = """
import json, sys
from disinhib.tuning.event_log import Event
from disinhib.tuning.suggest import Search, sampler
from search_spaces import SPACES
for name, (options, rules, events) in json.load(sys.stdin).items():
    search = Search(SPACES["rules"], sampler(options), "max", 0, rules)
    for event in events:
        search.follow(Event(*event))
    proposal = search.propose(30)
    print(json.dumps([name, proposal.overrides, proposal.point]))
"""


def test_another_process_proposes_the_same():
    """Whose sets and dictionaries of strings may have another order."""
    told, expected = {}, {}
    for name in (name for name in SAMPLERS if not _missing(name)):
        options = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        rules = ("bp", "exact-inv", "lin-thresh") if options["balanced"] else ()
        made = Search(SPACES["rules"], suggest.sampler(options), "max", 0, rules)
        live = Course(made, mixed).go(30)
        told[name] = (options, rules, live.events)
        proposal = made.propose(30)
        expected[name] = json.loads(json.dumps([proposal.overrides, proposal.point]))
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", GO_ON], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
            input=json.dumps(told), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
        assert found == expected


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
    course = Course(searching(name), mixed).go(14)
    assert [course.overrides[n]["trainer"] for n in range(14)] == [*RULES] * 7
    assert [course.overrides[n]["number"] for n in range(14)] == list(range(14))


def test_a_rule_learns_nothing_from_another_if_balanced():
    alone, together = (Course(searching(), mixed) for _ in range(2))
    for n in range(20):
        for course in (alone, together):
            course.ask(n)
        together.run(n)
        if n % 2 == 0:
            alone.run(n)
    for n in range(0, 20, 2):
        assert alone.points[n] == together.points[n]


@pytest.mark.parametrize("name", [p for p in INSTALLED if p.values[0] in ("tpe", "cmaes", "gp")])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_it_learns(name, mode):
    """Later proposals are better than the first ones, which are random."""
    one = lambda trial: {"gain": trial.suggest_float("gain", 0, 1), "trainer": "a",
                         "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True)}  # fmt: skip
    sign = {"max": 1, "min": -1}[mode]
    course = Course(searching(name, rules=(), space=one, mode=mode))
    for n in range(60):
        course.ask(n)
        final = sign * score(course.overrides[n], 3)
        course.write(n, EPOCH, 1, {"score": final})
        course.write(n, ENDED, 0, {"state": COMPLETE, "epochs": 1, "reason": None})
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
    course = Course(searching(name, points=POINTS)).go(6)
    assert course.points[0]["params"] == POINTS[0]
    assert course.points[1]["params"] == POINTS[1]
    assert course.points[2]["params"].items() > POINTS[2].items()
    assert course.points[2]["params"]["a.size"] in range(1, 10)
    free = Course(searching(name)).go(6)
    assert course.points[3]["params"]["b.gain"] != 0.5
    assert course.points[4]["params"]["a.gain"] not in (0.25, 0.75)
    assert course.points[0] != free.points[0]


def test_points_come_first_in_their_order_if_rules_take_no_turns():
    course = Course(searching("random", rules=(), points=POINTS)).go(4)
    for n, point in enumerate(POINTS):
        assert course.points[n]["params"].items() >= point.items()


@pytest.mark.parametrize("name", INSTALLED)
def test_a_search_that_goes_on_among_its_points_goes_on_with_them(name):
    live = Course(searching(name, points=POINTS)).go(1)
    again = rebuilt(live, name, points=POINTS)
    live.go(3)
    assert [again.propose(n).point for n in (1, 2)] == [live.points[1], live.points[2]]


def test_what_an_earlier_study_can_teach():
    course = Course(searching("random"), mixed).go(14)
    course.ask(14)  # and has not ended
    found = suggest.finished(course.events, space)
    states = [mixed(n) for n in range(14)]
    assert [f["state"] for f in found] == [s for s in states if s != FAILED]
    assert [f["rule"] for f in found] == [RULES[n % 2] for n in range(14) if states[n] != FAILED]
    assert found[0]["point"] == course.points[0]
    assert found[0]["scores"] == [score(course.overrides[0], e) for e in (1, 2, 3)]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", INSTALLED)
def test_an_earlier_study_is_learnt_from_and_not_counted(name):
    past = suggest.finished(Course(searching("random", seed=9), mixed).go(40).events, space)
    warm, cold = (Course(searching(name, points=POINTS, past=p)).go(12) for p in (past, ()))
    assert [warm.overrides[n]["number"] for n in range(12)] == list(range(12))
    assert [warm.overrides[n]["trainer"] for n in range(12)] == [*RULES] * 6
    assert warm.points[0]["params"] == POINTS[0] and warm.points[1]["params"] == POINTS[1]
    learnt = warm.points[3]["params"] != cold.points[3]["params"]
    assert learnt == (name not in ("random", "grid"))


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("rules", [("a", "b", "c"), ()], ids=["balanced", "in common"])
def test_an_earlier_study_may_have_had_other_rules_and_ranges(name, rules):
    def wider(trial):
        rule = trial.suggest_categorical("trainer", ("a", "b", "c"))
        return {"trainer": rule, "rate": trial.suggest_float(f"{rule}.rate", 1e-5, 1e-1, log=True),
                "gain": trial.suggest_float(f"{rule}.gain", 0.0, 1.5)}  # fmt: skip

    past = suggest.finished(Course(searching(name, seed=9), mixed).go(40).events, wider)
    assert past
    live = Course(searching(name, rules=rules, space=wider, past=past), mixed).go(24)
    assert len({tuple(point["params"].values()) for point in live.points.values()}) == 24
    again = rebuilt(live, name, rules=rules, space=wider, past=past)
    live.ask(24)
    assert again.propose(24) == (live.overrides[24], live.points[24])


@pytest.mark.skipif(_missing("cmaes"), reason="cmaes is not installed")
@pytest.mark.parametrize("before", ["random", "cmaes"])
def test_cmaes_is_used_after_an_earlier_study_with_other_ranges(before):
    def wider(trial):
        rule = trial.suggest_categorical("trainer", RULES)
        return {"trainer": rule, "rate": trial.suggest_float(f"{rule}.rate", 1e-5, 1e-1, log=True),
                "gain": trial.suggest_float(f"{rule}.gain", 0.0, 1.5)}  # fmt: skip

    events = Course(searching(before, seed=9)).go(40).events
    for past in ([], suggest.finished(events, wider)):
        live = Course(searching("cmaes", space=wider, past=past)).go(30)
        last = [live.points[n]["system_attrs"] for n in range(20, 30)]
        assert all("cma:generation" in attributes for attributes in last)


def test_of_an_earlier_study_with_other_choices_what_was_so_chosen_is_left_out():
    events = Course(searching("random")).go(12).events

    def other(trial):
        rule = trial.suggest_categorical("trainer", RULES)
        if rule == "b":
            trial.suggest_categorical("b.strong", ("weak", "very"))
        return {"trainer": rule}

    assert {f["rule"] for f in suggest.finished(events, space)} == {"a", "b"}
    assert {f["rule"] for f in suggest.finished(events, other)} == {"a"}


def test_what_was_good_before_is_near_what_is_tried_first():
    past = suggest.finished(Course(searching("random", seed=9)).go(120).events, space)
    first = lambda seed, past: Course(searching(seed=seed, past=past)).go(2).overrides
    merits = {
        len(p): [score(first(seed, p)[n], 3) for seed in range(12) for n in (0, 1)]
        for p in (past, [])
    }
    assert np.median(merits[120]) > np.median(merits[0]) + 0.1


def test_a_search_that_goes_on_has_learnt_from_the_earlier_study_too():
    past = suggest.finished(Course(searching("random", seed=9), mixed).go(20).events, space)
    live = Course(searching(past=past), mixed).go(9, at_once=3)
    again = rebuilt(live, "tpe", past=past)
    live.ask(9)
    assert again.propose(9) == (live.overrides[9], live.points[9])


# Batches.

SIZE = 4


class Deaf:
    def follow(self, event):
        pass


def in_batches(name, orders):
    """Proposals of three batches, whose events come in the orders that `orders` draw."""
    course = Course(searching(name, batch=SIZE), mixed)
    for order in orders:
        first = len(course.overrides)
        numbers = range(first, first + SIZE)
        for n in numbers:
            course.ask(n)
        silent = Course(Deaf(), mixed)
        silent.overrides = course.overrides
        for n in numbers:
            silent.run(n)
        own = {n: [e for e in silent.events if e.trial == n] for n in numbers}
        for n in order:
            if own[first + n]:
                event = own[first + n].pop(0)
                course.write(event.trial, event.kind, event.epoch, event.body)
        for rest in own.values():
            for event in rest:
                course.write(event.trial, event.kind, event.epoch, event.body)
    return course


@pytest.mark.parametrize("name", INSTALLED)
@given(orders=st.lists(st.lists(st.integers(0, SIZE - 1), max_size=16), min_size=5, max_size=5))
@settings(max_examples=8, deadline=None)
def test_in_batches_the_order_of_reports_does_not_matter(name, orders):
    in_turn, drawn = in_batches(name, [()] * 5), in_batches(name, orders)
    assert drawn.points == in_turn.points


def test_without_batches_it_does():
    early, late = (Course(searching(), mixed) for _ in range(2))
    for course in (early, late):
        for n in range(16):
            course.ask(n)
            if course is early or n < 8:
                course.run(n)
    assert early.points[8] == late.points[8] and early.points[15] != late.points[15]


def test_a_batch_learns_from_earlier_batches_only():
    """Even if some of its own have ended before the others are proposed, as when it goes on."""
    whole = Course(searching(batch=SIZE)).go(3 * SIZE)
    early = Course(searching(batch=SIZE))
    for n in range(3 * SIZE):
        early.ask(n)
        if n % SIZE == 1:
            early.run(n)
        if n % SIZE == SIZE - 1:
            for other in (n - 3, n - 1, n):
                early.run(other)
    assert early.points == whole.points


# What Optuna is told.


def test_optuna_is_told_every_state_by_its_name_and_failed_trials_have_no_value():
    course = Course(searching(), mixed).go(14)
    course.ask(14)
    kinds = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}
    for index, guesser in enumerate(course.search.guessers):
        for turn, trial in enumerate(guesser.get_trials()):
            number = turn * 2 + index
            if number == 14:
                assert trial.state == TrialState.RUNNING
                continue
            state = mixed(number)
            assert trial.state == kinds[state]
            scores = [e.body["score"] for e in course.events
                      if e.trial == number and e.kind == EPOCH]  # fmt: skip
            assert trial.intermediate_values == dict(enumerate(scores, start=1))
            assert trial.value == (None if state == FAILED else scores[-1])


@pytest.mark.parametrize("name", INSTALLED)
def test_nan_is_never_told_as_a_value(name):
    course = Course(searching(name))
    for n in range(16):
        course.ask(n)
        course.write(n, EPOCH, 1, {"score": score(course.overrides[n], 1)})
        state, reason = COMPLETE, None
        if n % 3 == 0:
            course.write(n, EPOCH, 2, {"score": math.nan})
            state, reason = FAILED, "Diverged: valid_loss is nan"
        course.write(n, ENDED, 0, {"state": state, "epochs": 1, "reason": reason})
    trials = [t for guesser in course.search.guessers for t in guesser.get_trials()]
    assert sum(t.state == TrialState.FAIL for t in trials) == 6
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.value is None
        else:
            assert trial.value is not None and math.isfinite(trial.value)
    assert all(math.isfinite(p["params"][f"{RULES[n % 2]}.rate"]) for n, p in course.points.items())


def test_no_warnings_of_optunas_own_experiments():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        Course(searching("tpe")).go(3)
