"""The study loop: it asks for trials, starts them, hears of them, and ends them. Knows no Ray.

The log is the only state: every step is written before it is acted upon, and going on after a kill
is replaying the log and entering the same loop. An epoch and what it leads to (the trial is
complete, or stopped early) are one transaction, so there is nothing to be mended.

Ray Tune turns control around, it asks and tells. So the loop is a coroutine: each `yield` is where
it waits for the next outcome, and gives back whether the trial that spoke last has ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
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
    """The study cannot go on now, and can be resumed; the message says what to do first."""


@dataclass(frozen=True)
class Started:
    """A worker has taken up the trial."""

    trial: int


@dataclass(frozen=True)
class Epoch:
    """What a worker reports after an epoch."""

    trial: int
    epoch: int  # from 1
    metrics: Mapping[str, list[float]]  # a value for each seed
    place: Mapping[str, str]
    diverged: Mapping[str, str] = field(default_factory=dict)  # seed -> reason
    flags: Mapping[str, str] = field(default_factory=dict)  # seed -> reason
    obstacle: str | None = None  # why the study has to stop: no checkpoint can be written


@dataclass(frozen=True)
class Raised:
    """The trial's training raised."""

    trial: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """The trial's workers died, again and again."""

    trial: int
    reason: str


Outcome = Started | Epoch | Raised | Lost
Loop = Generator[bool, Outcome, None]


class Backend(Protocol):
    """What runs the trials."""

    def start(self, config: TrialConfig) -> None:
        """Hands over a trial, to be run as soon as there is room for it."""
        ...


# What may be asked for next, given the records: nothing now, or a trial, or a batch of them.
Source = Callable[[Mapping[int, Record]], Iterable[Asked]]
Stops = Callable[[Mapping[int, Record], int, float], bool]  # (records, trial, its newest score)


def study_loop(
    log: EventLog,
    records: dict[int, Record],
    source: Source,
    stops: Stops,
    score: Callable[[Mapping[str, list[float]]], float],
    backend: Backend,
    at_once: int,
    observe: Callable[[Event], None],
) -> Loop:
    """Runs the trials that are left of `records` and those of `source` to their end, `at_once` at a
    time; `observe` is called with every event that has happened.

    `score` of an epoch's metrics is signed: more is better. Raises what the log raises, and
    StudyStopped.
    """

    def write(events: Iterable[Event]) -> None:
        for event in log.append(events):
            follow(records, event)
            observe(event)

    waiting = deque(number for number in sorted(records) if not records[number].ended)
    running: set[int] = set()
    ended = False  # the trial that spoke last
    while True:
        while len(running) < at_once:
            if not waiting:
                asked = list(source(records))
                write(asked)
                waiting.extend(event.trial for event in asked)
            if not waiting:
                break
            number = waiting.popleft()
            running.add(number)
            backend.start(records[number].config)
        if not running:
            return
        outcome = yield ended
        record = records[outcome.trial]
        if not record.ended:
            if isinstance(outcome, Started):
                record.state = RUNNING
            else:
                write(events_of(outcome, records, stops, score))
        ended = record.ended
        if ended:
            running.discard(outcome.trial)
        if isinstance(outcome, Epoch) and outcome.obstacle is not None:
            raise StudyStopped(outcome.obstacle)


def events_of(
    outcome: Epoch | Raised | Lost,
    records: Mapping[int, Record],
    stops: Stops,
    score: Callable[[Mapping[str, list[float]]], float],
) -> list[Event]:
    """What follows from an outcome; nothing if it is known already, as a trial that goes on from a
    checkpoint reports earlier epochs again."""
    record = records[outcome.trial]
    if isinstance(outcome, Raised | Lost):
        return [_end(record, FAILED, outcome.reason)]
    if outcome.epoch != record.epochs + 1:
        return []
    value = score(outcome.metrics)
    done = EpochDone(
        outcome.trial,
        outcome.epoch,
        value,
        dict(outcome.metrics),
        dict(outcome.place),
        dict(outcome.diverged),
        dict(outcome.flags),
    )
    after = Record(**{**vars(record), "scores": [*record.scores, value]})
    after.diverged = record.diverged | {s: (done.epoch, why) for s, why in done.diverged.items()}
    after.flags = record.flags | done.flags
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
    """Of a study whose trials all run their whole budget."""
    return False


def mean_score(metric: str, sign: int) -> Callable[[Mapping[str, list[float]]], float]:
    """The mean over seeds of `metric`, those that have diverged apart; more is better."""

    def score(metrics: Mapping[str, list[float]]) -> float:
        values = [value for value in metrics[metric] if math.isfinite(value)]
        return sign * sum(values) / len(values) if values else math.nan

    return score


def from_list(trials: Iterable[Asked]) -> Source:
    """The `trials`, one after the other, in the order in which they are listed."""
    listed = list(trials)

    def source(records: Mapping[int, Record]) -> list[Asked]:
        return [asked for asked in listed if asked.trial not in records][:1]

    return source


Proposer = Callable[[int, Mapping[int, Record]], Asked]


def from_search(propose: Proposer, trials: int, batch: int | None = None) -> Source:
    """The trials that `propose(number, records)` gives, `trials` in all: one after the other, or
    with `batch` so many together as soon as all earlier ones have ended."""

    def source(records: Mapping[int, Record]) -> list[Asked]:
        first = len(records)
        if batch is not None and not all(record.ended for record in records.values()):
            return []
        asked: dict[int, Record] = {**records}
        events: list[Any] = []
        for number in range(first, min(trials, first + (batch or 1))):
            event = propose(number, asked)
            events.append(event)
            asked[number] = Record(event.config, event.point)
        return events

    return source
