"""The outbox: delivers every event of the log, in order and once, to MLflow and Optuna's store.

Each store has its own thread and its own cursor in the log, which is its queue: a store that does
not answer delays nothing else. A delivery that may not have arrived is repeated, and stores accept
the same event twice.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning.event_log import Asked, EventLog, Logged, Paused, Record, replay
from disinhib.tuning.lease import TakenOver

BATCH = 200  # events in one delivery
PAUSE = 1.0  # s between deliveries, each of all events of the meantime
PATIENCE = 20.0  # s that the end of a study waits for a store that does not answer
RETRY = (1.0, 15.0)  # s between attempts: the first, and the longest


class Store(Protocol):
    """A place that gets copies of the log's events."""

    name: str
    address: str  # another address is another store
    option: str  # the option that sets its address

    def load(self, records: Mapping[int, Record]) -> set[int]:
        """Connects and repairs what a kill left half-done. Returns which of `records` it has."""
        ...

    def deliver(self, events: Sequence[Logged]) -> None:
        """Stores events, in their order; possibly some that it has already."""

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        """Records the end of the study. If it is not `whole`, it was interrupted, and so were its
        unfinished trials."""


class Outbox:
    """Keeps `store` up to date with the `log`; `say` prints a line."""

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
        """Delivers all missing events, in the caller's thread; returns their number.

        Raises ConfigError if the store refuses them.
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
        """Tells the thread to deliver the rest and end."""
        self.stopping.set()

    def finish(self, records: Mapping[int, Record], whole: bool) -> int:
        """Delivers the rest and closes the store; returns how many events (the end of the study is
        one) the store lacks."""
        self.stop()
        before = None
        while self.thread.is_alive():
            self.thread.join(PATIENCE)
            behind = self._behind()
            if behind == before:  # it hangs in a request: give up
                self.say = lambda text: None  # the study has its last word
                break
            if behind and before is None:
                self.say(f"{self.store.name}: waiting for it to take {behind} records")
            before = behind
        if self._behind() or self.thread.is_alive() or not self.loaded:
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
            except TakenOver:  # the other driver delivers
                return
            except Exception as error:  # each store raises its own kinds; events wait
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
        """Loads the store; returns how many events it lacks."""
        events = self.log.events()
        there = self.store.load(replay(events))
        cursor = self.log.delivered(self.cursor)
        delivered = {e.event.trial for e in events if isinstance(e.event, Asked) and e.id <= cursor}
        if delivered - there:  # the store has lost trials: deliver everything again
            self.log.set_delivered(self.cursor, 0)
        self.loaded = True
        return self._behind()

    def _deliver(self) -> bool:
        """Delivers a batch of events; returns whether there may be more."""
        events = self.log.events(self.log.delivered(self.cursor), BATCH)
        if events:
            self.store.deliver([e for e in events if not isinstance(e.event, Paused)])
            self.log.set_delivered(self.cursor, events[-1].id)
        return len(events) == BATCH

    def _failed(self, error: Exception) -> None:
        self.loaded = False  # find out what has arrived when it answers again
        if self.failed is None:
            self.say(
                f"{self.store.name} does not take records ({one_line(error)}); they wait in the"
                " event log until it does"
            )
        self.failed = one_line(error)
