"""The study loop: asks for trials, starts them, hears from them, and ends them. Independent of Ray.

The log is the only state: every step is logged before it takes effect, and a study is resumed by
replaying the log and entering the same loop. An epoch and its consequence (the trial is complete,
or stopped early) are one transaction, so that a kill leaves nothing to repair.

Ray Tune inverts control: it calls us. So the loop is a coroutine: each `yield` waits for the next
outcome, and returns whether the trial that reported last has ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    WAITING,
    Asked,
    Ended,
    EpochDone,
    Event,
    EventLog,
    Record,
    TrialConfig,
    follow,
)


class StudyStopped(RuntimeError):
    """The study cannot continue now but can be resumed; the message says what is in the way and
    what to do about it."""


@dataclass(frozen=True)
class Started:
    """A worker has started the trial."""

    trial: int


@dataclass(frozen=True)
class Epoch:
    """A worker's report of an epoch."""

    trial: int
    epoch: int  # from 1
    metrics: dict[str, list[float]]  # a value for each seed
    place: dict[str, str]
    diverged: dict[str, str] = field(default_factory=dict)  # seed -> reason
    flags: dict[str, str] = field(default_factory=dict)  # seed -> reason
    obstacle: str | None = None  # why the study must stop: no checkpoint can be written


@dataclass(frozen=True)
class Failed:
    """The trial's training raised an error, or its workers died too often."""

    trial: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """The trial has lost its worker, and waits for another."""

    trial: int


@dataclass(frozen=True)
class Hindered:
    """The trial's machine is at fault, not its configuration, and there is no other: the study
    stops until that is mended, and the trial goes on when it is resumed."""

    trial: int
    reason: str  # names the machine


@dataclass(frozen=True)
class Resized:
    """The cluster has become larger or smaller."""


Outcome = Started | Epoch | Failed | Lost | Hindered | Resized
Loop = Generator[bool, Outcome, None]


# The next trials, given the records: none for now, one, or a batch.
Source = Callable[[Mapping[int, Record]], Iterable[Asked]]
Stops = Callable[[Mapping[int, Record], int, float], bool]  # (records, trial, its newest score)
Score = Callable[[Mapping[str, list[float]]], float]  # of an epoch's metrics; more is better


def study_loop(
    log: EventLog,
    records: dict[int, Record],
    source: Source,
    stops: Stops,
    score: Score,
    start: Callable[[TrialConfig], None],
    at_once: Callable[[], int],
    observe: Callable[[Event], None],
) -> Loop:
    """Runs the unfinished trials of `records` and those of `source` to their end, `at_once()` at a
    time; calls `observe` with every event. `start` starts a trial as soon as there is room for it.

    Raises what the log raises, and StudyStopped.
    """

    def write(events: Iterable[Event]) -> None:
        for event in log.append(events):
            follow(records, event)
            observe(event)

    waiting = deque(number for number in sorted(records) if not records[number].ended)
    running: set[int] = set()
    ended = False  # the trial that reported last
    while True:
        while len(running) < at_once():
            if not waiting:
                asked = list(source(records))
                write(asked)
                waiting.extend(event.trial for event in asked)
            if not waiting:
                break
            number = waiting.popleft()
            running.add(number)
            start(records[number].config)
        if not running:
            return
        outcome = yield ended
        if isinstance(outcome, Hindered):
            raise StudyStopped(f"{outcome.reason}: mend it")
        if isinstance(outcome, Resized):
            ended = False
            continue
        record = records[outcome.trial]
        if not record.ended:
            if isinstance(outcome, Started):
                record.state = RUNNING
            elif isinstance(outcome, Lost):
                record.state = WAITING
            else:
                write(events_of(outcome, records, stops, score))
        ended = record.ended
        if ended:
            running.discard(outcome.trial)
        if isinstance(outcome, Epoch) and outcome.obstacle is not None:
            raise StudyStopped(f"{outcome.obstacle}: make room")


def events_of(
    outcome: Epoch | Failed, records: Mapping[int, Record], stops: Stops, score: Score
) -> list[Event]:
    """The events that follow from an outcome; none if it is known, because a trial that continues
    from a checkpoint reports earlier epochs again."""
    record = records[outcome.trial]
    if isinstance(outcome, Failed):
        return [_end(record, FAILED, outcome.reason)]
    if outcome.epoch != record.epochs + 1:
        return []
    value = score(outcome.metrics)
    reported = {name: its for name, its in vars(outcome).items() if name != "obstacle"}
    done = EpochDone(score=value, **reported)
    after = deepcopy(record)
    follow({outcome.trial: after}, done)
    if len(after.diverged) == len(record.config["seeds"]):
        return [done, _end(after, FAILED, next(iter(after.diverged.values()))[1])]
    if done.epoch >= record.budget:
        return [done, _end(after, COMPLETE)]
    if stops(records, outcome.trial, value):
        return [done, _end(after, PRUNED)]
    return [done]


def _end(record: Record, state: str, reason: str | None = None) -> Ended:
    seeds = record.seed_ends(state, reason) if record.config["final"] else []
    return Ended(record.number, state, record.epochs, reason, seeds)


def never(records: Mapping[int, Record], trial: int, score: float) -> bool:
    """No early stopping: every trial runs its whole budget."""
    return False


def mean_score(metric: str, sign: int) -> Score:
    """The mean of `metric` over the seeds that have not diverged; more is better."""

    def score(metrics: Mapping[str, list[float]]) -> float:
        values = [value for value in metrics[metric] if math.isfinite(value)]
        return sign * sum(values) / len(values) if values else math.nan

    return score


def from_list(trials: Iterable[Asked]) -> Source:
    """The `trials` of a list, one after another."""
    listed = deque(trials)

    def source(records: Mapping[int, Record]) -> list[Asked]:
        while listed and listed[0].trial in records:
            listed.popleft()
        return [listed[0]] if listed else []

    return source


Proposer = Callable[[int, Mapping[int, Record]], Asked]


def from_search(propose: Proposer, trials: int, batch: int | None = None) -> Source:
    """`trials` trials, proposed by `propose(number, records)`: one after another, or `batch` at a
    time as soon as all earlier ones have ended."""

    def source(records: Mapping[int, Record]) -> list[Asked]:
        first = len(records)
        if batch is not None and not all(record.ended for record in records.values()):
            return []
        asked, events = {**records}, []
        for number in range(first, min(trials, first + (batch or 1))):
            events.append(propose(number, asked))
            follow(asked, events[-1])
        return events

    return source
