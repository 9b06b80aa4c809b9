"""The course of a study: who is next, who has been heard, who ends. Knows no Ray.

Whatever happens is written to the journal first and then followed, by the same code that follows
the journal of a study that goes on. So a resumed study is where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from disinhib.tuning import event_log as journals
from disinhib.tuning.early_stopping import Stopping
from disinhib.tuning.event_log import (
    ASKED,
    COMPLETE,
    ENDED,
    EPOCH,
    FAILED,
    PRUNED,
    Event,
    Journal,
    Record,
)
from disinhib.tuning.suggest import Search
from search_spaces import Overrides


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps what goes wrong in `fatal`, for whoever ends the study, and does nothing after it:
    Ray takes an error in some of its hooks for the trial's own."""

    @wraps(method)
    def guarded(self: Conductor, *arguments: Any) -> Any:
        if self.fatal is not None:
            return None
        try:
            return method(self, *arguments)
        except Exception as error:
            self.fatal = error

    return guarded


class Conductor:
    """`configure(number, overrides)` makes a trial's configuration of what was proposed; at most
    `at_once` trials are out at a time, until `trials` were."""

    def __init__(
        self,
        journal: Journal,
        search: Search,
        stopping: Stopping,
        configure: Callable[[int, Overrides], Mapping[str, Any]],
        trials: int,
        at_once: int,
    ):
        self.journal, self.search, self.stopping = journal, search, stopping
        self.configure, self.trials, self.at_once = configure, trials, at_once
        self.records: dict[int, Record] = {}
        self.stopped: set[int] = set()  # trials whose stopping is decided
        self.out: set[int] = set()  # handed out, and not ended
        self.fatal: Exception | None = None  # why the study cannot go on
        for event in journal.events():
            self._follow(event)
        self.mended = self._settle()
        # To be handed out: those that have ended first, as they only have to be known, then those
        # that go on.
        unfinished = lambda number: not self.records[number].ended
        self.queue = deque(sorted(self.records, key=lambda number: (unfinished(number), number)))

    def __getstate__(self) -> dict:
        return {}  # Ray keeps a copy of all that it is given; ours is the journal

    def _settle(self) -> list[str]:
        """Ends trials that had done all they had to do when the study was killed; says which."""
        ends = []
        for number, record in self.records.items():
            if not record.ended and record.epochs >= record.budget:
                ends.append((number, COMPLETE))
            elif not record.ended and number in self.stopped:
                ends.append((number, PRUNED))
        for number, state in ends:
            self._end(number, state, None)
        return [f"trial {number} had ended as {state}" for number, state in ends]

    @_guarded
    def next(self) -> Record | None:
        """The trial to hand out now, if there is one; ended ones do not count as out."""
        free = len(self.out) < self.at_once
        if not self.queue and free and len(self.records) < self.trials:
            self._propose()
        if self.queue and (free or self.records[self.queue[0]].ended):
            record = self.records[self.queue.popleft()]
            if not record.ended:
                self.out.add(record.number)
            return record
        return None

    def _propose(self) -> None:
        """Proposes the next trial, or the next batch once all others have ended."""
        first, batch = len(self.records), self.search.batch
        if batch is not None and not all(record.ended for record in self.records.values()):
            return
        asked = []
        for number in range(first, min(self.trials, first + (batch or 1))):
            proposal = self.search.propose(number)
            config = self.configure(number, proposal.overrides)
            asked.append((number, ASKED, 0, {"config": config, "point": proposal.point}))
        self._write(asked)
        self.queue.extend(number for number, *_ in asked)

    def stops(self, number: int, epoch: int, score: float) -> bool:
        """Whether the trial is to end after `epoch`; decided once."""
        if epoch > self.stopping.heard_of(number) and self.stopping.stops(
            self.records[number].config, epoch, score
        ):
            self.stopped.add(number)
        # One that goes on from a checkpoint tells of earlier epochs again.
        return number in self.stopped and epoch == self.stopping.heard_of(number)

    @_guarded
    def heard(self, number: int, epoch: int, body: Mapping[str, Any]) -> None:
        """A trial reported `body` (score, metrics, ...) after `epoch`."""
        if epoch > self.records[number].epochs:
            self._write([(number, EPOCH, epoch, body)])

    @_guarded
    def ended(self, number: int, reason: str | None = None) -> None:
        """A trial ended by itself, or was stopped, or failed for a `reason`."""
        record = self.records[number]
        whole = record.epochs >= record.budget
        state = FAILED if reason is not None else COMPLETE if whole else PRUNED
        self._end(number, state, reason)
        self.out.discard(number)

    def _end(self, number: int, state: str, reason: str | None) -> None:
        body = {"state": state, "epochs": self.records[number].epochs, "reason": reason}
        self._write([(number, ENDED, 0, body)])

    def _write(self, events: list[tuple[int, str, int, Mapping[str, Any]]]) -> None:
        for event in self.journal.append(events):
            self._follow(event)

    def _follow(self, event: Event) -> None:
        journals.follow(self.records, event)
        self.search.follow(event)
        if event.kind == EPOCH:
            self.stops(event.trial, event.epoch, event.body["score"])
