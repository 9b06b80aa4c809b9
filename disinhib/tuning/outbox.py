"""The outbox: from the event log to the stores that people look at, in order, everything, nothing
twice.

Each store has a thread of its own and a cursor in the log, so a store that does not answer holds up
nothing: the log is its queue. A delivery that may or may not have arrived is made
again, and stores take twice what is the same twice.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning.event_log import Asked, EventLog, Logged, Record, replay

BATCH = 200  # events in one delivery
PAUSE = 1.0  # s between deliveries: what comes in the meantime goes together
PATIENCE = 20.0  # s that a study's end waits for a store that does not answer
RETRY = (1.0, 15.0)  # s between attempts: the first, and the longest


class Store(Protocol):
    """A place that is given copies of the log's events."""

    name: str
    address: str  # where it is: another place is another store
    option: str  # that gives its address

    def load(self, records: Mapping[int, Record]) -> set[int]:
        """Connects, mends what a kill left half-done; which of `records` are there already."""
        ...

    def deliver(self, events: Sequence[Logged]) -> None:
        """Takes events, in their order; again, perhaps, what it has taken before."""
        ...

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        """The study has ended, and was interrupted if it is not whole: the trials that have not
        ended, by it."""
        ...


class Outbox:
    """Brings `store` up to the `log`, now and then for as long as it runs; `say` prints a line."""

    def __init__(self, log: EventLog, store: Store, say: Callable[[str], None]):
        self.log, self.store, self.say = log, store, say
        self.loaded = False
        self.failed: str | None = None  # why the last attempt failed
        self.stopping = threading.Event()
        # (Hashed, as an address may hold a password.)
        place = hashlib.sha256(store.address.encode()).hexdigest()[:16]
        self.cursor = f"{store.name} {place}"
        self.thread = threading.Thread(target=self._run, name=store.name, daemon=True)

    def reconcile(self) -> int:
        """Delivers all that is missing, in the caller's own thread; returns how many events were.

        Raises ConfigError if the store does not take them.
        """
        try:
            behind = self._load()
            while self._deliver():
                pass
        except Exception as error:  # each store raises its own kinds
            allowed = f"the address of a store that takes records ({one_line(error)})"
            raise refusal(self.store.option, self.store.address, allowed) from error
        return behind

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Asks the thread to deliver the rest and to end."""
        self.stopping.set()

    def finish(self, records: Mapping[int, Record], whole: bool) -> int:
        """Delivers the rest and closes the store; returns how many events, of which the study's
        end is one, it did not take."""
        self.stop()
        before = None
        while self.thread.is_alive():
            self.thread.join(PATIENCE)
            behind = self._behind()
            if behind == before:  # it hangs in a request, and is left to itself
                break
            if behind and before is None:
                self.say(f"{self.store.name}: waiting for it to take {behind} records")
            before = behind
        if self._behind() or self.thread.is_alive():
            return self._behind() + 1
        try:
            self.store.close(records, whole)
        except Exception as error:  # as in `_run`
            self._failed(error)
            return 1
        return 0

    def _run(self) -> None:
        pause, deadline = RETRY[0], None
        while True:
            last_round = self.stopping.is_set()
            try:
                if not self.loaded:
                    self._load()
                more = self._deliver()
            except Exception as error:  # each store raises its own kinds; none is lost, all wait
                self._failed(error)
                deadline = deadline or (time.monotonic() + PATIENCE if last_round else None)
                if deadline and time.monotonic() > deadline:
                    return
                time.sleep(pause) if last_round else self.stopping.wait(pause)
                pause = min(2 * pause, RETRY[1])
                continue
            pause = RETRY[0]
            if self.failed and not more:
                self.say(f"{self.store.name} answers again and has all records")
                self.failed = None
            if last_round and not more:
                return
            if not more:
                self.stopping.wait(PAUSE)

    def _behind(self) -> int:
        return self.log.last() - self.log.delivered(self.cursor)

    def _load(self) -> int:
        """How many events the store lacks."""
        events = self.log.events()
        there = self.store.load(replay(events))
        cursor = self.log.delivered(self.cursor)
        delivered = {e.event.trial for e in events if isinstance(e.event, Asked) and e.id <= cursor}
        if delivered - there:  # the store itself lost something: all of it again
            cursor = 0
            self.log.set_delivered(self.cursor, cursor)
        self.loaded = True
        return self.log.last() - cursor

    def _deliver(self) -> bool:
        """Delivers what there is; whether there may be more."""
        events = self.log.events(self.log.delivered(self.cursor), BATCH)
        if events:
            self.store.deliver(events)
            self.log.set_delivered(self.cursor, events[-1].id)
        return len(events) == BATCH

    def _failed(self, error: Exception) -> None:
        self.loaded = False  # what arrived of the last attempt is known when it is back
        if self.failed is None:
            self.say(
                f"{self.store.name} does not take records ({one_line(error)}); they wait in the"
                " event log until it does"
            )
        self.failed = one_line(error)
