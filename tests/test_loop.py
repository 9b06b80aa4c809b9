"""The course of a study, with trials that are played here: who is next, what ends it, and that a
study which is killed anywhere ends as the one that was not."""

import errno
import pickle
import random
import tempfile
from collections import Counter
from contextlib import closing
from functools import cache
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings, strategies as st

from disinhib.tuning.early_stopping import Stopping
from disinhib.tuning.event_log import (
    ASKED,
    COMPLETE,
    ENDED,
    EPOCH,
    FAILED,
    PRUNED,
    WAITING,
    Journal,
    records,
)
from disinhib.tuning.loop import Conductor
from disinhib.tuning.suggest import Search

optuna.logging.set_verbosity(optuna.logging.WARNING)

BUDGET = 4
ASHA = {"name": "asha", "within_rule": True, "grace_period": 1, "reduction_factor": 2}
NONE = {"name": "none", "within_rule": False, "grace_period": None}


def space(trial):
    return {"x": trial.suggest_float("x", 0.0, 1.0), "n": trial.suggest_int("n", 0, 9)}


def configure(number, overrides):
    return {"number": number, "rule": "bp", "epochs": BUDGET, "searched": dict(overrides)}


def tpe(seed):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=2)


def conduct(journal, trials=6, at_once=2, scheduler=ASHA, batch=None, seed=0, make=configure):
    return Conductor(
        journal,
        Search(space, tpe, "max", seed, batch=batch),
        Stopping(scheduler, BUDGET, "max", batch),
        make,
        trials,
        at_once,
    )


@pytest.fixture
def journal(tmp_path):
    with closing(Journal(tmp_path)) as opened:
        yield opened


def score(config, epoch):
    return config["searched"]["x"] * epoch - 0.1 * config["searched"]["n"]


def fails(config, epoch):
    return config["searched"]["n"] == 4 and epoch == 2


class Workers:
    """Stands in for Ray: asks for trials, trains those that are out in any order, and tells the
    conductor as Ray's hooks do. A trial that goes on tells all its epochs again."""

    def __init__(self, conductor, draw):
        self.conductor, self.draw = conductor, draw
        self.out: dict[int, int] = {}  # trial -> epochs told by this worker
        self.handed = []

    def ask(self):
        while (record := self.conductor.next()) is not None:
            self.handed.append(record.number)
            if not record.ended:
                self.out[record.number] = 0

    def step(self, number):
        """One epoch of a trial that is out."""
        config, epoch = self.conductor.records[number].config, self.out[number] + 1
        if fails(config, epoch):
            self.end(number, "Diverged: kernel_0")
            return
        self.out[number] = epoch
        body = {"score": score(config, epoch), "metrics": {}}
        stops = epoch < BUDGET and self.conductor.stops(number, epoch, body["score"])
        self.conductor.heard(number, epoch, body)
        if stops or epoch == BUDGET:
            self.end(number)

    def end(self, number, reason=None):
        self.conductor.ended(number, reason)
        del self.out[number]

    def run(self):
        while self.conductor.fatal is None:
            self.ask()
            if not self.out:
                return self
            self.step(sorted(self.out)[self.draw(len(self.out))])
        return self


def in_turn(n):
    return 0


def outcome(conductor):
    return {n: (r.config, r.scores, r.state, r.reason) for n, r in conductor.records.items()}


# Who is next.


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 1, 3]), st.randoms())
@settings(max_examples=30, deadline=None)
def test_so_many_trials_so_many_at_a_time(trials, at_once, batch, order):
    with tempfile.TemporaryDirectory() as folder, closing(Mortal(Path(folder))) as journal:
        conductor = conduct(journal, trials, at_once, batch=batch)
        most = 0

        def draw(n):
            nonlocal most
            most = max(most, n)
            assert conductor.out == {*workers.out}
            return order.randrange(n)

        workers = Workers(conductor, draw)
        workers.run()
        assert conductor.fatal is None
        assert most == min(trials, at_once, batch or trials)
        assert workers.handed == list(range(trials)) == sorted(conductor.records)
        assert all(record.ended for record in conductor.records.values())
        assert conductor.next() is None


def test_the_journal_has_a_trial_before_anyone_is_handed_it(journal):
    conductor = conduct(journal, trials=2)
    first = conductor.next()
    assert [(e.trial, e.kind) for e in journal.events()] == [(0, ASKED)]
    (event,) = journal.events()
    assert event.body["config"] == first.config == configure(0, first.config["searched"])
    assert event.body["point"]["params"] == first.config["searched"]


def test_what_was_heard_is_in_the_journal_and_what_is_heard_again_is_not(journal):
    conductor = conduct(journal, scheduler=NONE)
    conductor.next()
    for epoch in (1, 2, 1, 2, 3):
        conductor.heard(0, epoch, {"score": float(epoch)})
    assert [(e.epoch, e.body) for e in journal.events() if e.kind == EPOCH] == [
        (n, {"score": float(n)}) for n in (1, 2, 3)
    ]
    assert conductor.records[0].scores == [1.0, 2.0, 3.0]


def test_states_of_trials_that_end(journal):
    conductor = conduct(journal, trials=4, at_once=4, scheduler=NONE)
    for epochs, reason in ((BUDGET, None), (1, None), (2, "Diverged"), (0, "DataError")):
        number = conductor.next().number
        for epoch in range(1, epochs + 1):
            conductor.heard(number, epoch, {"score": 0.0})
        conductor.ended(number, reason)
    found = [(r.state, r.reason, r.epochs) for r in conductor.records.values()]
    assert found == [
        (COMPLETE, None, BUDGET), (PRUNED, None, 1),
        (FAILED, "Diverged", 2), (FAILED, "DataError", 0),
    ]  # fmt: skip
    assert outcome(conductor) == {
        n: (r.config, r.scores, r.state, r.reason) for n, r in records(journal.events()).items()
    }
    assert [e.body["epochs"] for e in journal.events() if e.kind == ENDED] == [BUDGET, 1, 2, 0]


def test_a_trial_ends_once(journal):
    conductor = conduct(journal)
    conductor.next()
    conductor.ended(0, "first")
    conductor.ended(0, "second")
    assert [e.body["reason"] for e in journal.events() if e.kind == ENDED] == ["first"]
    assert conductor.records[0].reason == "first" and conductor.out == set()


# Batches.


def test_a_batch_waits_for_the_one_before(journal):
    conductor = conduct(journal, trials=7, at_once=9, batch=3)
    assert [conductor.next().number for _ in range(3)] == [0, 1, 2]
    for number in (2, 0):
        assert conductor.next() is None
        conductor.ended(number)
    assert conductor.next() is None and len(conductor.records) == 3
    conductor.ended(1, "failed ones have ended, too")
    assert [conductor.next().number for _ in range(3)] == [3, 4, 5]
    for number in (3, 4, 5):
        conductor.ended(number)
    assert conductor.next().number == 6 and conductor.next() is None  # no more than there are
    assert len(conductor.records) == 7


def test_a_batch_is_in_the_journal_whole_before_it_is_handed_out(journal, tmp_path):
    conductor = conduct(journal, trials=7, at_once=1, batch=3)
    conductor.next()
    assert [e.trial for e in journal.events()] == [0, 1, 2]
    journal.close()
    with closing(Journal(tmp_path)) as again:
        resumed = conduct(again, trials=7, at_once=3, batch=3)
        assert [resumed.next().number for _ in range(3)] == [0, 1, 2]
        assert resumed.next() is None


# Early stopping.


class Listening(Stopping):
    """Counts what it is asked."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = Counter()

    def stops(self, config, epoch, score):
        self.asked[config["number"], epoch] += 1
        return super().stops(config, epoch, score)


def test_early_stopping_is_asked_once_for_each_epoch(journal):
    conductor = conduct(journal, trials=8, at_once=3)
    conductor.stopping = Listening(ASHA, BUDGET, "max", None)
    chosen = random.Random(0)
    Workers(conductor, chosen.randrange).run()
    heard = [(e.trial, e.epoch) for e in journal.events() if e.kind == EPOCH]
    assert conductor.stopping.asked == Counter(heard)
    assert {r.state for r in conductor.records.values()} >= {COMPLETE, PRUNED}


def test_a_trial_that_tells_earlier_epochs_again_is_stopped_where_it_was(journal):
    conductor = conduct(journal, at_once=3)
    good, bad = conductor.next(), conductor.next()
    for epoch, stops in ((1, False), (2, False)):
        assert conductor.stops(good.number, epoch, 1.0) is stops
        conductor.heard(good.number, epoch, {"score": 1.0})
    assert conductor.stops(bad.number, 1, 1.0) is False
    conductor.heard(bad.number, 1, {"score": 1.0})
    # A worker died, and another one begins again.
    assert conductor.stops(bad.number, 1, 1.0) is False
    assert conductor.stops(bad.number, 2, 0.0) is True
    conductor.heard(bad.number, 2, {"score": 0.0})
    for _ in range(2):  # and once more, though it had been stopped
        assert conductor.stops(bad.number, 1, 1.0) is False
        assert conductor.stops(bad.number, 2, 0.0) is True
        conductor.heard(bad.number, 2, {"score": 0.0})
    assert conductor.records[bad.number].scores == [1.0, 0.0]


# Going on.


def reopened(journal, folder, **given):
    journal.close()
    again = Journal(folder)
    return again, conduct(again, **given)


def test_ended_trials_are_handed_out_first_and_take_no_place(journal, tmp_path):
    conductor = conduct(journal, trials=6, at_once=4, scheduler=NONE)
    for _ in range(4):
        conductor.next()
    conductor.heard(1, 1, {"score": 0.5})
    conductor.ended(2)
    conductor.ended(0, "Diverged")
    again, resumed = reopened(journal, tmp_path, trials=6, at_once=2, scheduler=NONE)
    with closing(again):
        assert resumed.mended == []
        handed = [resumed.next() for _ in range(5)]
        assert [r.number for r in handed[:4]] == [0, 2, 1, 3] and handed[4] is None
        assert [r.state for r in handed[:4]] == [FAILED, PRUNED, WAITING, WAITING]
        assert resumed.out == {1, 3} and handed[2].epochs == 1
        resumed.ended(3)
        assert resumed.next().number == 4


def test_settling_ends_what_had_done_all_it_had_to_do(journal, tmp_path):
    conductor = conduct(journal, trials=4, at_once=4)
    for _ in range(4):
        conductor.next()
    for epoch in range(1, BUDGET + 1):
        conductor.heard(0, epoch, {"score": 1.0})
    conductor.heard(1, 1, {"score": 0.0})  # decided as soon as it is heard
    conductor.heard(2, 1, {"score": 2.0})  # goes on
    again, resumed = reopened(journal, tmp_path, trials=4, at_once=4)
    with closing(again):
        assert resumed.mended == ["trial 0 had ended as complete", "trial 1 had ended as pruned"]
        assert [r.state for r in resumed.records.values()] == [COMPLETE, PRUNED, WAITING, WAITING]
        assert [resumed.next().number for _ in range(4)] == [0, 1, 2, 3]
        assert resumed.out == {2, 3}
        told = [(e.trial, e.body) for e in again.events() if e.kind == ENDED]
        assert told == [
            (0, {"state": COMPLETE, "epochs": BUDGET, "reason": None}),
            (1, {"state": PRUNED, "epochs": 1, "reason": None}),
        ]
    third = Journal(tmp_path)
    with closing(third):
        assert conduct(third, trials=4).mended == []


# What cannot go on.


class Broken(Journal):
    """Takes so many calls, and then none."""

    calls = 3
    error: BaseException = OSError(errno.ENOSPC, "no space left for the journal")

    def append(self, events):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().append(events)


@pytest.mark.parametrize("calls", range(8))
def test_what_the_journal_raises_is_kept_and_nothing_is_written_after_it(tmp_path, calls):
    with closing(Broken(tmp_path)) as journal:
        journal.calls = calls
        conductor = conduct(journal)
        Workers(conductor, in_turn).run()
        assert conductor.fatal is journal.error
        before = journal.events()
        assert len(before) == calls
        journal.calls = 100  # there is room again, but what came in between is not there
        out = sorted(conductor.records)
        assert conductor.next() is None
        for number in out:
            conductor.heard(number, 1 + conductor.records[number].epochs, {"score": 0.0})
            conductor.ended(number)
        assert journal.events() == before and journal.calls == 100
    with closing(Journal(tmp_path)) as again:
        resumed = conduct(again)
        Workers(resumed, in_turn).run()
        assert resumed.fatal is None
        with tempfile.TemporaryDirectory() as folder, closing(Journal(Path(folder))) as other:
            assert outcome(Workers(conduct(other), in_turn).run().conductor) == outcome(resumed)


def test_a_configuration_that_is_refused_is_fatal_and_leaves_no_trial(journal):
    def refuse(number, overrides):
        if number == 1:
            raise ValueError("no such option")
        return configure(number, overrides)

    conductor = conduct(journal, make=refuse)
    assert conductor.next().number == 0
    assert conductor.next() is None
    assert str(conductor.fatal) == "no such option"
    assert [e.trial for e in journal.events()] == [0]


# Kills.


class Kill(BaseException):
    """No `except Exception` catches it, as nothing catches SIGKILL."""


class Mortal(Journal):
    """Is killed at its call number `life`: before it writes, or just after."""

    life, after = -1, False

    def __init__(self, folder):
        super().__init__(folder)
        # It is this process's kills that are played, not the machine's.
        self._connection.execute("PRAGMA synchronous = OFF")

    def append(self, events):
        events = list(events)
        self.life -= 1
        if self.life == 0:
            if self.after:
                super().append(events)
            raise Kill
        return super().append(events)


def play(lives, order, **given):
    """How a study ends that is killed after each of `lives` calls and then left alone; its workers
    report in an order that `order` seeds."""
    with tempfile.TemporaryDirectory() as folder:
        return _play(Path(folder), lives, random.Random(order), **given)


def _play(folder, lives, chosen, **given):
    for life, after in [*lives, (-1, False)]:
        with closing(Mortal(folder)) as journal:
            journal.life, journal.after = life, after
            try:
                conductor = conduct(journal, **given)
                Workers(conductor, chosen.randrange).run()
            except Kill:
                continue
            assert conductor.fatal is None
            assert conductor.next() is None
            events = journal.events()
            keys = [(e.trial, e.kind, e.epoch) for e in events]
            assert len(keys) == len(set(keys))
            assert outcome(conductor) == {
                n: (r.config, r.scores, r.state, r.reason) for n, r in records(events).items()
            }
            points = {e.trial: e.body["point"] for e in events if e.kind == ASKED}
            return outcome(conductor), points
    raise AssertionError("the last one is never killed")


@cache
def whole(seed, **given):
    return play([], 0, seed=seed, **given)


deaths = st.lists(st.tuples(st.integers(1, 25), st.booleans()), max_size=4)


@given(deaths, st.integers(0, 99), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_a_study_killed_anywhere_ends_as_one_that_was_not(lives, order, seed):
    """In batches, whatever the order in which its workers report."""
    given_ = {"trials": 8, "at_once": 3, "batch": 4}
    assert play(lives, order, seed=seed, **given_) == whole(seed, **given_)


def test_such_studies_have_trials_of_every_state():
    found = [whole(seed, trials=8, at_once=3, batch=4)[0] for seed in range(5)]
    states = {state for trials in found for _, _, state, _ in trials.values()}
    assert states == {COMPLETE, PRUNED, FAILED}


@given(deaths, st.integers(0, 99), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_a_killed_study_loses_and_doubles_no_trial(lives, order, at_once):
    """And with one trial at a time it is the same study without batches, too."""
    killed, points = play(lives, order, trials=7, at_once=at_once)
    assert sorted(killed) == list(range(7))
    assert {state for _, _, state, _ in killed.values()} <= {COMPLETE, PRUNED, FAILED}
    for config, scores, state, _ in killed.values():
        assert scores == [score(config, n) for n in range(1, len(scores) + 1)]
        assert (state == COMPLETE) == (len(scores) == BUDGET)
    if at_once == 1:
        assert (killed, points) == whole(0, trials=7, at_once=1)


def test_ray_is_given_no_copy_of_the_journal(journal):
    pickle.dumps(conduct(journal))
