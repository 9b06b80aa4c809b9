"""What happened in a study, in order: the truth that Ray, Optuna and MLflow are given copies of.

One SQLite file in the study's folder. An event is written, and on disk, before anyone acts on it,
so a study that is killed at any moment is what its journal says. (trial, kind, epoch) is unique:
what is heard twice, because a trial went on from a checkpoint, happened once.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from disinhib.errors import ConfigError

FILE = "journal.db"
ASKED, EPOCH, ENDED = "asked", "epoch", "ended"

WAITING, RUNNING = "waiting", "running"  # of trials that have not ended
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
KILLED = "killed"  # its study was interrupted and not resumed since

TABLES = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    trial INTEGER NOT NULL,
    kind TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (trial, kind, epoch)
);
CREATE TABLE IF NOT EXISTS delivered (store TEXT PRIMARY KEY, event INTEGER NOT NULL);
"""


class Event(NamedTuple):
    """`asked`: a trial was proposed (body: `config`, and `point`, what Optuna chose).
    `epoch`: it reported `score` and `metrics` after epoch `epoch`.
    `ended`: `state` is complete, pruned or failed; `reason` is set if failed."""

    id: int
    time: float  # s since 1970
    trial: int
    kind: str
    epoch: int  # 0 but for an epoch's
    body: dict[str, Any]


@dataclass
class Record:
    """A trial as the journal has it."""

    config: Mapping[str, Any]  # trial.TrialConfig
    scores: list[float] = field(default_factory=list)  # by epoch
    state: str = WAITING  # until it has ended
    reason: str | None = None

    @property
    def number(self) -> int:
        return self.config["number"]

    @property
    def rule(self) -> str:
        return self.config["rule"]

    @property
    def epochs(self) -> int:
        return len(self.scores)

    @property
    def budget(self) -> int:
        return self.config["epochs"]

    @property
    def score(self) -> float | None:
        """That of the last epoch."""
        return self.scores[-1] if self.scores else None

    @property
    def ended(self) -> bool:
        return self.state in (COMPLETE, PRUNED, FAILED)


def follow(records: dict[int, Record], event: Event) -> None:
    """Brings `records`, trials by number, up to `event`."""
    if event.kind == ASKED:
        records[event.trial] = Record(event.body["config"])
    elif event.kind == EPOCH:
        records[event.trial].scores.append(event.body["score"])
    else:
        records[event.trial].state = event.body["state"]
        records[event.trial].reason = event.body["reason"]


class Journal:
    """An open journal; nobody else can open it until it is closed, or its process has ended.

    Raises ConfigError if another process has it open, OSError(ENOSPC) if the disk is full: then
    nothing of that call was written.
    """

    def __init__(self, folder: Path):
        self._lock = threading.Lock()  # the stores' threads read it
        self._connection = sqlite3.connect(
            folder / FILE, timeout=1, isolation_level=None, check_same_thread=False
        )
        try:
            # Held by the operating system, so that a killed process leaves no lock behind.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            with self._transaction():
                for statement in TABLES.split(";"):
                    self._connection.execute(statement)
        except sqlite3.OperationalError as error:
            self._connection.close()
            if error.sqlite_errorname != "SQLITE_BUSY":
                raise
            raise ConfigError(f"study: {folder} is open in another process") from error

    def close(self) -> None:
        self._connection.close()

    def append(self, events: Iterable[tuple[int, str, int, Mapping[str, Any]]]) -> list[Event]:
        """Writes (trial, kind, epoch, body) of all `events` or of none; returns those that are
        news."""
        new = []
        with self._lock, self._transaction() as execute:
            for trial, kind, epoch, body in events:
                now, text = time.time(), json.dumps(body)
                cursor = execute(
                    "INSERT OR IGNORE INTO events (time, trial, kind, epoch, body)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (now, trial, kind, epoch, text),
                )
                if cursor.rowcount:
                    # From its text, so that it is the same now and when it is read again.
                    new.append(
                        Event(cursor.lastrowid or 0, now, trial, kind, epoch, json.loads(text))
                    )
        return new

    def events(self, after: int = 0, limit: int = -1) -> list[Event]:
        """Those after event `after`, the oldest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT id, time, trial, kind, epoch, body FROM events WHERE id > ?"
                " ORDER BY id LIMIT ?",
                (after, limit),
            ).fetchall()
        return [Event._make((*row[:5], json.loads(row[5]))) for row in rows]

    def last(self) -> int:
        """Id of the newest event, 0 if there is none."""
        with self._lock:
            return self._connection.execute("SELECT MAX(id) FROM events").fetchone()[0] or 0

    def delivered(self, store: str) -> int:
        """The event up to which `store` has all."""
        with self._lock:
            row = self._connection.execute(
                "SELECT event FROM delivered WHERE store = ?", (store,)
            ).fetchone()
        return row[0] if row else 0

    def deliver(self, store: str, event: int) -> None:
        with self._lock, self._transaction() as execute:
            execute("INSERT OR REPLACE INTO delivered VALUES (?, ?)", (store, event))

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection.execute
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            full = ("SQLITE_FULL", "SQLITE_IOERR_WRITE")
            if getattr(error, "sqlite_errorname", None) in full:
                raise OSError(errno.ENOSPC, "no space left for the journal") from error
            raise


def records(events: Iterable[Event]) -> dict[int, Record]:
    """The trials of `events`, by number."""
    found: dict[int, Record] = {}
    for event in events:
        follow(found, event)
    return found
