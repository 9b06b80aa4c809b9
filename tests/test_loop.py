# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The study loop, with trials that are played here: who is next, what ends a trial, and that a
study which is killed anywhere ends as the one that was not."""

import errno
import json
import random
import tempfile
from collections import Counter
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings, strategies as st

from disinhib.tuning import early_stopping, steering, suggest
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    FAILED,
    PRUNED,
    RUNNING,
    WAITING,
    Asked,
    Ended,
    EpochDone,
    EventLog,
    Record,
    replay,
)
from disinhib.tuning.loop import (
    Epoch,
    Failed,
    Reported,
    Started,
    Steered,
    StudyStopped,
    from_list,
    from_search,
    mean_score,
    never,
    study_loop,
)
from disinhib.tuning.steering import ADDED, Instruction
from disinhib.tuning.turns import Sharing, turn

optuna.logging.set_verbosity(optuna.logging.WARNING)

BUDGET = 4
ASHA = {"name": "asha", "within_rule": True, "grace_period": 1, "reduction_factor": 2}
PLACE = {"host": "here", "device": "cpu"}
Killed = type("Killed", (BaseException,), {})  # no `except Exception` catches it, as no SIGKILL


def space(trial):
    return {"x": trial.suggest_float("x", 0.0, 1.0), "n": trial.suggest_int("n", 0, 9)}


def configure(number, overrides=None, seeds=(1,), final=False):
    return {
        "number": number, "rule": "bp", "epochs": BUDGET, "searched": dict(overrides or {}),
        "seeds": [*seeds], "final": final,
    }  # fmt: skip


def tpe(seed):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=2)


def propose(number, records, seed=0, batch=None):
    history = suggest.history(records, [], number, turn(number, {}, Sharing()), batch)
    proposal = suggest.suggest(space, tpe, history, suggest.sampler_seed(seed, number), number)
    return Asked(number, configure(number, proposal.overrides), proposal.point)


class Play:
    """Stands in for Ray: runs the trials that the loop has started, in any order, and tells it. A
    trial that goes on tells all its epochs again."""

    def __init__(self, log, trials=6, at_once=2, stops=ASHA, batch=None, seed=0, source=None):
        self.log, self.records = log, replay(log.events())
        self.out = {}  # trial -> epochs told by this worker
        self.started, self.observed, self.said = [], [], []
        self.trials = trials
        if isinstance(stops, dict):
            stops = partial(early_stopping.decide, options=stops, seed=seed, batch=batch)
        make = partial(propose, seed=seed, batch=batch)
        self.loop = study_loop(
            log, self.records, source or from_search(make, trials, batch), stops,
            mean_score("valid_accuracy", 1), self.start, lambda: at_once, self.observed.append,
            partial(steering.events_of, add=self.add, say=self.said.append),
        )  # fmt: skip
        self.over = False
        self.advance(lambda: next(self.loop))

    def add(self, point, records):
        number = len(records)
        return [Asked(number, configure(number, point))] if number < self.trials else []

    def steer(self, verb, id=1, **what):
        assert not self.advance(lambda: self.loop.send(Steered(Instruction(id, verb, **what))))

    def start(self, config):
        self.started.append(config["number"])
        self.out[config["number"]] = 0

    def advance(self, step):
        try:
            return step()
        except StopIteration:
            self.over = True
            return True

    def tell(self, outcome):
        ended = self.advance(lambda: self.loop.send(outcome))
        if ended:
            self.out.pop(outcome.trial, None)
        return ended

    def epoch(self, number, score, epoch=None, obstacle=None, **more):
        """The trial's next epoch, or one again."""
        if epoch is None:
            epoch = self.out[number] = self.out[number] + 1
        metrics = {"valid_accuracy": score if isinstance(score, list) else [score]}
        told = [Epoch(epoch, metrics, PLACE, **more)]
        return self.tell(Reported(number, told, obstacle))

    def step(self, number):
        config = self.records[number].config
        if config["searched"]["n"] == 4 and self.out[number] == 1:
            self.tell(Failed(number, "Diverged: kernel_0"))
        else:
            epoch = self.out[number] + 1
            self.epoch(number, score(config, epoch))

    def run(self, draw=lambda n: 0):
        while not self.over:
            self.step(sorted(self.out)[draw(len(self.out))])
        return self


def score(config, epoch):
    return config["searched"]["x"] * epoch - 0.1 * config["searched"]["n"]


def events_of(log, kind):
    return [logged.event for logged in log.events() if isinstance(logged.event, kind)]


def listed(*seeds, final=False, trials=1):
    return from_list(
        Asked(n, configure(n, seeds=seeds or (1,), final=final)) for n in range(trials)
    )


def outcome(play):
    return {n: (r.config, r.scores, r.state, r.reason) for n, r in play.records.items()}


@pytest.fixture
def log(tmp_path):
    with closing(EventLog(tmp_path)) as opened:
        yield opened


# Who is next.


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 1, 3]), st.randoms())
@settings(max_examples=30)
def test_so_many_trials_so_many_at_a_time(trials, at_once, batch, order):
    with tempfile.TemporaryDirectory() as folder, closing(Mortal(Path(folder))) as log:
        play = Play(log, trials, at_once, batch=batch)
        most = 0

        def draw(n):
            nonlocal most
            most = max(most, n)
            return order.randrange(n)

        play.run(draw)
        assert most == min(trials, at_once, batch or trials)
        assert play.started == list(range(trials)) == sorted(play.records)
        assert all(record.ended for record in play.records.values())


def test_the_log_has_a_trial_before_it_is_started(log):
    class Looking(Play):
        def start(self, config):
            assert config["number"] in {event.trial for event in events_of(log, Asked)}
            super().start(config)

    play = Looking(log, trials=2, at_once=1)
    (asked,) = events_of(log, Asked)
    assert play.started == [0] and asked.config == play.records[0].config
    assert asked.point["params"] == asked.config["searched"]


def test_what_is_told_is_in_the_log_and_what_is_told_again_is_not(log):
    play = Play(log, stops=never)
    for epoch in (1, 2, 1, 2, 3):
        play.epoch(0, float(epoch), epoch)
    assert [(e.epoch, e.score) for e in events_of(log, EpochDone)] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert play.records[0].scores == [1.0, 2.0, 3.0]


def test_an_epoch_that_comes_too_early_is_not_believed(log):
    play = Play(log, stops=never)
    play.epoch(0, 1.0, 2)
    assert events_of(log, EpochDone) == []


def test_states_of_trials(log):
    play = Play(log, trials=4, at_once=4, stops=lambda records, trial: trial.score < 0)
    assert {record.state for record in play.records.values()} == {WAITING}
    play.tell(Started(0))
    assert play.records[0].state == RUNNING
    for epoch in range(1, BUDGET + 1):
        assert play.epoch(0, 1.0) is (epoch == BUDGET)
    assert play.epoch(1, -1.0) is True
    play.epoch(2, 1.0)
    assert play.tell(Failed(2, "Diverged: kernel_0")) is True
    assert play.tell(Failed(3, "worker lost 4 times")) is True and play.over
    ends = [(r.state, r.reason, r.epochs) for r in play.records.values()]
    assert ends == [
        (COMPLETE, None, BUDGET), (PRUNED, None, 1),
        (FAILED, "Diverged: kernel_0", 1), (FAILED, "worker lost 4 times", 0),
    ]  # fmt: skip
    again = replay(log.events())
    assert {n: (r.state, r.scores) for n, r in again.items()} == {
        n: (r.state, r.scores) for n, r in play.records.items()
    }
    assert [event.epochs for event in events_of(log, Ended)] == [BUDGET, 1, 1, 0]


def test_a_trial_ends_once(log):
    play = Play(log)
    play.tell(Failed(0, "first"))
    assert play.tell(Failed(0, "second")) is True
    assert play.tell(Failed(0, "third")) is True
    assert [event.reason for event in events_of(log, Ended)] == ["first"]


def test_every_event_is_observed_in_its_order(log):
    play = Play(log).run()
    assert play.observed == [logged.event for logged in log.events()]


# Batches and lists.


def test_a_batch_waits_for_the_one_before(log):
    play = Play(log, trials=7, at_once=9, batch=3)
    assert play.started == [0, 1, 2]
    for number in (2, 0):
        play.tell(Failed(number, "failed ones have ended, too"))
        assert play.started == [0, 1, 2] and len(play.records) == 3
    play.tell(Failed(1, "and the last"))
    assert play.started == [0, 1, 2, 3, 4, 5]
    for number in (3, 4, 5):
        play.tell(Failed(number, "all"))
    assert play.started == list(range(7)) and len(play.records) == 7  # no more than there are


def test_a_batch_that_was_cut_short_is_filled_up_first():
    """More trials than before: the same batches as if there had been as many from the start."""
    source = from_search(lambda n, records: Asked(n, configure(n)), 20, batch=6)
    ended = lambda numbers: {n: Record(configure(n), state=COMPLETE) for n in numbers}
    records = ended(range(10))
    assert [event.trial for event in source(records)] == [10, 11]
    records = ended(range(12))
    assert [event.trial for event in source(records)] == list(range(12, 18))


def test_a_batch_is_in_the_log_whole_before_it_is_started(log, tmp_path):
    assert Play(log, trials=7, at_once=1, batch=3).started == [0]
    assert [event.trial for event in events_of(log, Asked)] == [0, 1, 2]
    log.close()
    with closing(EventLog(tmp_path)) as again:
        assert Play(again, trials=7, at_once=3, batch=3).started == [0, 1, 2]


def test_a_list_is_asked_for_as_it_is_needed(log):
    play = Play(log, at_once=2, stops=never, source=listed(trials=4))
    assert play.started == [0, 1] and len(play.records) == 2  # what is not begun can be left out
    play.tell(Failed(1, "why"))
    assert play.started == [0, 1, 2]


# Early stopping.


def test_early_stopping_is_asked_once_for_each_epoch_but_the_last(log):
    asked = Counter()

    def stops(records, trial):
        asked[trial.number, trial.epochs] += 1
        return early_stopping.decide(records, trial, ASHA, 0)

    play = Play(log, trials=8, at_once=3, stops=stops).run(random.Random(0).randrange)
    heard = [(e.trial, e.epoch) for e in events_of(log, EpochDone) if e.epoch < BUDGET]
    assert asked == Counter(heard)
    assert {r.state for r in play.records.values()} >= {COMPLETE, PRUNED}


def test_a_stopped_trial_stays_stopped_whatever_it_tells(log):
    play = Play(log, at_once=3)
    good, bad = play.started[:2]
    for _ in range(2):
        assert play.epoch(good, 1.0) is False
    assert play.epoch(bad, 1.0) is False
    # A worker died, and another one begins again.
    assert play.epoch(bad, 1.0, 1) is False
    assert play.epoch(bad, 0.0, 2) is True
    for epoch in (1, 2, 3):  # and once more, though it had been stopped
        assert play.epoch(bad, 0.0, epoch) is True
    assert play.records[bad].scores == [1.0, 0.0] and play.records[bad].state == PRUNED


# Seeds as results of their own.


def test_a_seed_that_diverges_ends_alone(log):
    play = Play(log, stops=never, source=listed(7, 8, final=True))
    play.epoch(0, [1.0, 3.0])
    play.epoch(0, [2.0, float("nan")], diverged={"8": "Diverged: kernel_0"})
    assert play.records[0].scores == [2.0, 2.0]  # the mean of those that go on
    for _ in range(2):
        play.epoch(0, [3.0, float("nan")], flags={"7": "unstable"})
    (ended,) = events_of(log, Ended)
    assert ended.state == COMPLETE and ended.seeds == [
        {"seed": 7, "state": COMPLETE, "epochs": BUDGET, "reason": None, "flag": "unstable"},
        {"seed": 8, "state": FAILED, "epochs": 1, "reason": "Diverged: kernel_0", "flag": ""},
    ]


def test_a_trial_whose_seeds_have_all_diverged_fails(log):
    play = Play(log, stops=never, source=listed(7, 8, final=True))
    play.epoch(0, [1.0, float("nan")], diverged={"8": "first"})
    assert play.epoch(0, [float("nan")] * 2, diverged={"7": "second"}) is True and play.over
    (ended,) = events_of(log, Ended)
    assert (ended.state, ended.reason) == (FAILED, "first")
    assert [(seed["state"], seed["epochs"]) for seed in ended.seeds] == [(FAILED, 1), (FAILED, 0)]


def test_less_is_better_where_the_metric_says_so(log):
    assert mean_score("valid_loss", -1)({"valid_loss": [1.0, 2.0]}) == -1.5


# Going on.


def test_unfinished_trials_go_on_first(log, tmp_path):
    play = Play(log, trials=6, at_once=4, stops=never)
    play.epoch(1, 0.5)
    play.tell(Failed(2, "why"))
    play.tell(Failed(0, "why"))
    log.close()
    with closing(EventLog(tmp_path)) as again:
        resumed = Play(again, trials=6, at_once=2, stops=never)
        assert resumed.started == [1, 3] and resumed.records[1].epochs == 1
        resumed.tell(Failed(3, "why"))
        assert resumed.started == [1, 3, 4]


def test_the_last_epoch_and_the_end_are_one_write(log):
    """So a study that goes on has nothing to mend."""
    play = Play(log, trials=2, at_once=2, stops=lambda records, trial: trial.score < 0)
    sizes = []
    append = log.append
    log.append = lambda events: sizes.append(len(events)) or append(events)
    for _ in range(BUDGET):
        play.epoch(0, 1.0)
    play.epoch(1, -1.0)
    assert [size for size in sizes if size] == [1, 1, 1, 2, 2]


# What cannot go on.


@pytest.mark.parametrize("calls", range(1, 8))
def test_what_the_log_raises_ends_the_loop_and_nothing_is_lost(tmp_path, calls):
    full = OSError(errno.ENOSPC, "no space left for the event log")
    with closing(Mortal(tmp_path)) as log:
        log.life, log.error = calls, full
        with pytest.raises(OSError, match="no space left") as raised:
            Play(log).run()
        assert raised.value is full
    with closing(EventLog(tmp_path)) as again:
        resumed = Play(again).run()
        with tempfile.TemporaryDirectory() as folder, closing(EventLog(Path(folder))) as other:
            assert outcome(Play(other).run()) == outcome(resumed)


def test_a_checkpoint_that_cannot_be_written_stops_the_study(log):
    play = Play(log)
    with pytest.raises(StudyStopped, match="No space left: there"):
        play.epoch(0, 1.0, obstacle="No space left: there")
    assert [event.epoch for event in events_of(log, EpochDone)] == [1]  # it had come that far


def test_a_configuration_that_is_refused_ends_the_loop_and_leaves_no_trial(log):
    def refuse(number, records):
        if number == 1:
            raise ValueError("no such option")
        return propose(number, records)

    with pytest.raises(ValueError, match="no such option"):
        Play(log, source=from_search(refuse, 3))
    assert [event.trial for event in events_of(log, Asked)] == [0]


# Steering.


def test_a_paused_study_begins_no_trial_until_it_goes_on(log):
    play = Play(log, trials=4, at_once=2, stops=never)
    play.steer("pause")
    for _ in range(BUDGET):
        play.epoch(0, 1.0)
    assert play.started == [0, 1] and not play.over
    play.tell(Failed(1, "the last that runs"))
    assert play.started == [0, 1] and not play.over and len(play.records) == 2
    play.steer("unpause", 2)
    assert play.started == [0, 1, 2, 3]


def test_while_paused_the_source_is_asked_once_whether_it_has_more(log):
    """It may take a whole proposal to say so."""
    asked, source = [], from_search(lambda number, records: propose(number, records), 4)
    ask = lambda records: asked.append(len(records)) or source(records)
    play = Play(log, at_once=1, source=ask)
    play.steer("pause")
    play.tell(Failed(0, "why"))
    for id in range(2, 6):
        play.steer("pause", id)
    assert asked == [0, 1] and not play.over


def test_the_last_word_counts_whatever_the_clocks_say(log):
    play = Play(log, trials=2, at_once=1)
    play.steer("pause", 9)
    play.steer("unpause", 5)  # from a machine whose clock is slow
    assert not log.paused()


def test_it_is_still_paused_when_it_is_resumed_and_ends_if_nothing_is_left(log, tmp_path):
    Play(log, trials=2, at_once=2).steer("pause")
    log.close()
    with closing(EventLog(tmp_path)) as again:
        play = Play(again, trials=2, at_once=2)
        assert play.started == [] and not play.over
        play.steer("unpause", 2)
        assert play.started == [0, 1]
        play.steer("pause", 3)
        play.steer("unpause", 2)  # read once more
        assert again.paused()
        play.tell(Failed(0, "why"))
        play.tell(Failed(1, "why"))
        assert play.over


def test_a_trial_that_is_ended_by_hand_is_pruned_and_stops_at_its_next_report(log):
    play = Play(log, trials=3, at_once=2, stops=never)
    play.epoch(0, 1.0)
    play.steer("end", trial=0)
    record = play.records[0]
    assert (record.state, record.epochs, record.reason) == (PRUNED, 1, steering.BY_HAND)
    assert play.started == [0, 1]  # its worker is busy until then
    assert play.epoch(0, 2.0) is True
    assert record.epochs == 1 and play.started == [0, 1, 2]


def test_a_trial_that_waits_never_begins_if_it_is_ended(log):
    play = Play(log, trials=4, at_once=1, batch=3, stops=never)
    play.steer("end", trial=1)
    play.tell(Failed(0, "why"))
    assert play.started == [0, 2]


@pytest.mark.parametrize("trial", [0, 9, None])
def test_a_trial_that_has_ended_or_is_not_there_is_said(trial, log):
    play = Play(log, trials=3, at_once=1)
    play.tell(Failed(0, "why"))
    play.steer("end", trial=trial)
    assert play.records[0].state == FAILED
    assert play.said == [f"trial {trial} is not ended: it is not unfinished"]


def test_a_point_is_tried_next_and_once_however_often_it_is_read(log):
    play = Play(log, trials=3, at_once=1, stops=never)
    for _ in range(2):
        play.steer("add", 7, point={"x": 0.25, "n": 3})
    assert len(play.records) == 2 and play.records[1].tags == {ADDED: "7"}
    play.tell(Failed(0, "why"))
    assert play.started == [0, 1] and play.records[1].config["searched"] == {"x": 0.25, "n": 3}
    play.tell(Failed(1, "why"))
    play.steer("add", 8, point={"x": 0.5, "n": 3})
    assert len(play.records) == 3
    assert play.said[-1] == (
        "a point is not added: no trial is left for it (3 trials are asked for)"
    )


# Kills.


class Mortal(EventLog):
    """Is killed at its call number `life`: before it writes, or just after."""

    life, after, error = -1, False, Killed()

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
            raise self.error
        return super().append(events)


def play(lives, order, **given):
    """How a study ends that is killed after each of `lives` calls and then left alone; its workers
    report in an order that `order` seeds."""
    with tempfile.TemporaryDirectory() as folder:
        return _play(Path(folder), lives, random.Random(order), **given)


def _play(folder, lives, chosen, **given):
    for life, after in [*lives, (-1, False)]:
        with closing(Mortal(folder)) as log:
            log.life, log.after = life, after
            try:
                studied = Play(log, **given).run(chosen.randrange)
            except Killed:
                continue
            events = [logged.event for logged in log.events()]
            keys = [(e.trial, e.kind, e.epoch) for e in events]
            assert len(keys) == len(set(keys))
            assert outcome(studied) == {
                n: (r.config, r.scores, r.state, r.reason) for n, r in replay(log.events()).items()
            }
            points = {e.trial: json.dumps(e.point) for e in events if isinstance(e, Asked)}
            return outcome(studied), points
    raise AssertionError("the last one is never killed")


@cache
def whole(seed, **given):
    return play([], 0, seed=seed, **given)


deaths = st.lists(st.tuples(st.integers(1, 25), st.booleans()), max_size=4)


@given(deaths, st.integers(0, 99), st.integers(0, 4))
@settings(max_examples=25)
def test_a_study_killed_anywhere_ends_as_one_that_was_not(lives, order, seed):
    """In batches, whatever the order in which its workers report."""
    given_ = {"trials": 8, "at_once": 3, "batch": 4}
    assert play(lives, order, seed=seed, **given_) == whole(seed, **given_)


def test_such_studies_have_trials_of_every_state():
    studies = [whole(seed, trials=8, at_once=3, batch=4)[0] for seed in range(5)]
    states = {state for trials in studies for _, _, state, _ in trials.values()}
    assert states == {COMPLETE, PRUNED, FAILED}


@given(deaths, st.integers(0, 99), st.sampled_from([1, 2, 4]))
@settings(max_examples=25)
def test_a_killed_study_loses_and_doubles_no_trial(lives, order, at_once):
    """And with one trial at a time it is the same study without batches, too."""
    killed, points = play(lives, order, trials=7, at_once=at_once)
    assert sorted(killed) == list(range(7))
    assert {state for _, _, state, _ in killed.values()} <= {*ENDED}
    for config, scores, state, _ in killed.values():
        assert scores == [score(config, n) for n in range(1, len(scores) + 1)]
        assert (state == COMPLETE) == (len(scores) == BUDGET)
    if at_once == 1:
        assert (killed, points) == whole(0, trials=7, at_once=1)
