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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

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
from disinhib.tuning.steering import Instruction


class StudyStopped(RuntimeError):
    """The study cannot continue now but can be resumed; the message says what is in the way and
    what to do about it."""


@dataclass(frozen=True)
class Started:
    """A worker has started the trial."""

    trial: int


@dataclass(frozen=True)
class Epoch:
    """What a worker says of an epoch."""

    epoch: int  # from 1
    metrics: dict[str, list[float]]  # a value for each seed
    place: dict[str, str]
    diverged: dict[str, str] = field(default_factory=dict)  # seed -> reason
    flags: dict[str, str] = field(default_factory=dict)  # seed -> reason


@dataclass(frozen=True)
class Reported:
    """A worker's report of one epoch of a trial, or of several in a row."""

    trial: int
    epochs: Sequence[Epoch]
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


@dataclass(frozen=True)
class Steered:
    """Somebody steers the study."""

    instruction: Instruction


Outcome = Started | Reported | Failed | Lost | Hindered | Resized | Steered
Loop = Generator[bool, Outcome, None]


# The next trials, given the records: none for now, one, or a batch.
Source = Callable[[Mapping[int, Record]], Iterable[Asked]]
# (records, the trial with its newest score, which `records` may lack)
Stops = Callable[[Mapping[int, Record], Record], bool]
Score = Callable[[Mapping[str, list[float]]], float]  # of an epoch's metrics; more is better
Steer = Callable[[Instruction, Mapping[int, Record]], Iterable[Event]]  # what an instruction does


def study_loop(
    log: EventLog,
    records: dict[int, Record],
    source: Source,
    stops: Stops,
    score: Score,
    start: Callable[[TrialConfig], None],
    at_once: Callable[[], int],
    observe: Callable[[Event], None],
    steer: Steer = lambda instruction, records: (),
) -> Loop:
    """Runs the unfinished trials of `records` and those of `source` to their end, `at_once()` at a
    time; calls `observe` with every event. `start` starts a trial as soon as there is room for it.

    Raises what the log raises, and StudyStopped.
    """

    def write(events: Iterable[Event]) -> None:
        for event in log.append(events):
            follow(records, event)
            observe(event)

    def unstarted() -> deque[int]:
        return deque(n for n in sorted(records) if not records[n].ended and n not in running)

    # Once for each number of trials, as it may take the source a whole proposal to say so.
    has_more = cache(lambda asked: bool(list(source(records))))
    running: set[int] = set()
    waiting, paused = unstarted(), log.paused()
    ended = False  # the trial that reported last
    while True:
        while not paused and len(running) < at_once():
            if not waiting:
                asked = list(source(records))
                write(asked)
                waiting.extend(event.trial for event in asked)
            if not waiting:
                break
            number = waiting.popleft()
            running.add(number)
            start(records[number].config)
        if not running and not (paused and (waiting or has_more(len(records)))):
            return
        outcome = yield ended
        if isinstance(outcome, Steered):
            write(steer(outcome.instruction, records))
            waiting, paused, ended = unstarted(), log.paused(), False
            continue
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
        if isinstance(outcome, Reported) and outcome.obstacle is not None:
            raise StudyStopped(f"{outcome.obstacle}: make room")


def events_of(
    outcome: Reported | Failed, records: Mapping[int, Record], stops: Stops, score: Score
) -> list[Event]:
    """The events that follow from an outcome. Epochs that are known are none, because a trial that
    continues from a checkpoint reports earlier epochs again; nor are those after the trial's end.
    """
    record = records[outcome.trial]
    if isinstance(outcome, Failed):
        return [_end(record, FAILED, outcome.reason)]
    after = replace(record, scores=[*record.scores])
    events: list[Event] = []
    for told in outcome.epochs:
        if told.epoch != after.epochs + 1:
            continue
        done = EpochDone(trial=outcome.trial, score=score(told.metrics), **vars(told))
        events.append(done)
        follow({outcome.trial: after}, done)
        if len(after.diverged) == len(record.config["seeds"]):
            end = FAILED, next(iter(after.diverged.values()))[1]
        elif after.epochs >= record.budget:
            end = COMPLETE, None
        elif stops(records, after):
            end = PRUNED, None
        else:
            continue
        return [*events, _end(after, *end)]
    return events


def _end(record: Record, state: str, reason: str | None = None) -> Ended:
    seeds = record.seed_ends(state, reason) if record.config["final"] else []
    return Ended(record.number, state, record.epochs, reason, seeds)


def never(records: Mapping[int, Record], trial: Record) -> bool:
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


Proposer = Callable[..., Asked]  # of a number, the records, and possibly a point


def from_search(propose: Proposer, trials: int, batch: int | None = None) -> Source:
    """`trials` trials, proposed by `propose(number, records)`: one after another, or the rest of a
    `batch` (consecutive numbers) as soon as all earlier ones have ended."""

    def source(records: Mapping[int, Record]) -> list[Asked]:
        first = len(records)
        if batch is not None and not all(record.ended for record in records.values()):
            return []
        asked, events, size = {**records}, [], batch or 1
        for number in range(first, min(trials, (first // size + 1) * size)):
            events.append(propose(number, asked))
            follow(asked, events[-1])
        return events

    return source
