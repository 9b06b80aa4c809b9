"""The event log of a study: everything that happened, in order. It is the study's only state.

It is one SQLite file in the study's folder. An event is on disk before anyone acts on it, so a
study that is killed at any moment is exactly what its log says, and is resumed by replaying it.
(trial, kind, epoch) is unique: an epoch that is reported again after a restart counts once. Ray,
Optuna and MLflow get copies (`outbox`).
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple, TypedDict

from disinhib.errors import ConfigError, one_line

FILE = "events.db"

# The states of a trial; they mean the same in Ray, Optuna, MLflow and every report.
WAITING, RUNNING = "waiting", "running"  # not ended yet
COMPLETE = "complete"  # it ran its whole budget
PRUNED = "pruned"  # early stopping ended it
FAILED = "failed"  # it diverged or raised an error
KILLED = "killed"  # its study was interrupted and has not been resumed
ENDED = (COMPLETE, PRUNED, FAILED)
STATES = (*ENDED, RUNNING, KILLED)

OF_STUDY = "retrains_study"  # tag of a retraining and its trials: the id of the study
LANES = "lanes"  # in an epoch's place: those of the program that trained it
EPOCH_SECONDS = ("epoch_seconds", "compilation_seconds")  # metrics: the second is part of the first
REPEAT = "repeat"  # tag of a trial, from 1; none in a study that is not repeated
INITIAL = "initial_point"  # tag of a trial whose point the study has begun with, not drawn

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


class Objective(NamedTuple):
    """What a study's scores are of. Pinned when it starts, so that a study whose metric is a
    plugin's can be shown, renamed and deleted without that plugin."""

    metric: str  # of metrics.SELECTION
    sign: int  # 1 where more is better, -1 where less is: scores in the log are signed by it

    @classmethod
    def of(cls, metric: str, mode: str) -> Objective:
        return cls(metric, 1 if mode == "max" else -1)


class TrialConfig(TypedDict):
    """A trial as its worker gets it. (Plain values: sent between processes and stored as JSON.)"""

    number: int  # from 0, the same in the log, Ray, Optuna and MLflow
    rule: str
    searched: dict[str, Any]  # the Hydra overrides chosen by its space or grid
    command: str  # runs the same training by hand
    options: dict[str, Any]  # resolved training options
    seeds: list[int]  # a lane each
    epochs: int  # its whole budget
    final: bool  # a retraining: it opens the test set, its seeds are reported one by one, and one
    # that diverges ends alone; else one diverged seed fails the trial


class Point(TypedDict):
    """Optuna's proposal, in plain values: parameters, their distributions as JSON, and the
    sampler's attributes of the trial."""

    params: dict[str, Any]
    distributions: dict[str, str]
    system_attrs: dict[str, Any]


NO_POINT = Point(params={}, distributions={}, system_attrs={})


@dataclass(frozen=True)
class Asked:
    """A trial was proposed. `tags` and `files` (name -> text) are for its runs in MLflow."""

    kind: ClassVar = "asked"
    trial: int
    config: TrialConfig
    point: Point = field(default_factory=lambda: NO_POINT)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    epoch: ClassVar = 0


@dataclass(frozen=True)
class EpochDone:
    """A trial reported an epoch."""

    kind: ClassVar = "epoch"
    trial: int
    epoch: int  # from 1
    score: float  # the study's metric, mean over seeds; signed: more is better
    metrics: dict[str, list[float]]  # a value for each seed; NaN after it has diverged
    place: dict[str, str]  # host and device
    diverged: dict[str, str] = field(default_factory=dict)  # seed -> reason, of those that did now
    flags: dict[str, str] = field(default_factory=dict)  # seed -> why its dynamics fail the check


@dataclass(frozen=True)
class Ended:
    """A trial ended: complete, pruned or failed (for a `reason`)."""

    kind: ClassVar = "ended"
    trial: int
    state: str
    epochs: int  # reported
    reason: str | None = None
    seeds: list[dict[str, Any]] = field(default_factory=list)  # `Record.seed_ends` of a final one
    epoch: ClassVar = 0


@dataclass(frozen=True)
class Paused:
    """Somebody paused the study (`on`), or let it go on: an event of no trial, which no store gets
    to know. Its `epoch` is the instruction's id, so that one that is read again counts once."""

    kind: ClassVar = "paused"
    trial: ClassVar = -1
    epoch: int
    on: bool


@dataclass(frozen=True)
class Tagged:
    """A trial's runs in MLflow get other `tags`. Its `epoch` tells several of a trial apart."""

    kind: ClassVar = "tagged"
    trial: int
    epoch: int
    tags: dict[str, str]


Event = Asked | EpochDone | Ended | Paused | Tagged
KINDS = {kind.kind: kind for kind in (Asked, EpochDone, Ended, Paused, Tagged)}


class Logged(NamedTuple):
    """An event with its position in the log."""

    id: int
    time: float  # s since 1970
    event: Event


@dataclass
class Record:
    """A trial, as replayed from the log."""

    config: TrialConfig
    point: Point = field(default_factory=lambda: NO_POINT)
    scores: list[float] = field(default_factory=list)  # by epoch; signed: more is better
    seconds: list[float] = field(default_factory=list)  # by epoch, without compiling
    state: str = WAITING
    reason: str | None = None
    diverged: dict[str, tuple[int, str]] = field(default_factory=dict)  # seed -> (epoch, reason)
    flags: dict[str, str] = field(default_factory=dict)  # seed -> reason
    tags: Mapping[str, str] = field(default_factory=dict)  # of its runs in MLflow

    @property
    def number(self) -> int:
        return self.config["number"]

    @property
    def rule(self) -> str:
        return self.config["rule"]

    @property
    def repeat(self) -> int:
        """Of the tuning of its rule, from 1."""
        return int(self.tags.get(REPEAT, 1))

    @property
    def epochs(self) -> int:
        """Number of epochs reported so far."""
        return len(self.scores)

    @property
    def training_seconds(self) -> float:
        """Its epochs at the time of its median one: a worker's first ones also load programs."""
        return self.epochs * median(self.seconds) if self.seconds else 0.0

    @property
    def budget(self) -> int:
        return self.config["epochs"]

    @property
    def score(self) -> float | None:
        """The score of the last epoch; signed: more is better."""
        return self.scores[-1] if self.scores else None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def seed_ends(self, state: str, reason: str | None) -> list[dict[str, Any]]:
        """How each seed of a final trial ends, if the trial ends in `state` now."""
        ends = []
        for seed in self.config["seeds"]:
            end: dict[str, Any] = {"state": state, "epochs": self.epochs, "reason": reason}
            if str(seed) in self.diverged:
                epoch, why = self.diverged[str(seed)]
                end = {"state": FAILED, "epochs": epoch - 1, "reason": why}
            ends.append({"seed": seed, **end, "flag": self.flags.get(str(seed), "")})
        return ends


def follow(records: dict[int, Record], event: Event) -> None:
    """Updates `records`, trials by number, with `event`."""
    match event:
        case Asked():
            records[event.trial] = Record(event.config, event.point, tags=event.tags)
        case EpochDone():
            record = records[event.trial]
            record.scores.append(event.score)
            record.seconds.append(_own_seconds(event))
            newly = {seed: (event.epoch, why) for seed, why in event.diverged.items()}
            record.diverged = {**record.diverged, **newly}
            record.flags = {**record.flags, **event.flags}
        case Ended():
            records[event.trial].state = event.state
            records[event.trial].reason = event.reason
        case Tagged():
            records[event.trial].tags = {**records[event.trial].tags, **event.tags}


def _own_seconds(event: EpochDone) -> float:
    """Of an epoch without compiling; of trials that are trained together, a trial's share."""
    whole, compiling = (event.metrics.get(name, (0.0,)) for name in EPOCH_SECONDS)
    lanes = max(len(whole), int(event.place.get(LANES, 1)))
    return (whole[0] - compiling[0]) * len(whole) / lanes


def replay(events: Iterable[Logged]) -> dict[int, Record]:
    """The trials of a log, by number."""
    records: dict[int, Record] = {}
    for logged in events:
        follow(records, logged.event)
    return records


def read(folder: Path, copied: bool = False) -> list[Logged] | None:
    """The events of a log that is not open; None if it is, in a process of this machine. Where one
    of another machine may have it open, a copy is read: to open a log rolls back what was not
    committed.

    Raises ConfigError if there is none, or if it cannot be read.
    """
    if not (folder / FILE).exists():
        raise ConfigError(f"study: {folder} has no {FILE}: it is no whole copy of the study")
    if copied:
        with tempfile.TemporaryDirectory() as part:
            for file in folder.glob(f"{FILE}*"):  # and its journal
                with suppress(FileNotFoundError):
                    shutil.copyfile(file, Path(part, file.name))
            return read(Path(part))
    try:
        address = f"{(folder / FILE).absolute().as_uri()}?mode=rw"  # a kill may have left a journal
        with closing(sqlite3.connect(address, timeout=0, uri=True)) as connection:
            rows = connection.execute("SELECT id, time, kind, body FROM events ORDER BY id")
            return [Logged(id, when, parsed(kind, body)) for id, when, kind, body in rows]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname == "SQLITE_BUSY":
            return None
        raise ConfigError(f"study: cannot read {folder / FILE} ({one_line(error)})") from error
    except (KeyError, TypeError, ValueError) as error:
        why = f"another version wrote it: {one_line(error)}"
        raise ConfigError(f"study: cannot read {folder / FILE} ({why})") from error


def write(folder: Path, events: Iterable[Logged]) -> None:
    """A new log in `folder` with the events of another, at their times."""
    with closing(EventLog(folder)) as log:
        log.copy(events)


def over_seeds(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over seeds of each metric and, of several, its standard deviation (n - 1) as
    `<name>_sd`; of finite values, if there are any."""
    summary = {}
    for name, values in metrics.items():
        finite = [value for value in values if math.isfinite(value)] or [math.nan]
        mean = summary[name] = sum(finite) / len(finite)
        if len(values) > 1:
            spread = sum((value - mean) ** 2 for value in finite)
            summary[f"{name}_sd"] = math.sqrt(spread / max(1, len(finite) - 1))
    return summary


class EventLog:
    """An open log. No other process can open it until it is closed or this process has ended.

    Raises ConfigError if another process has it open, if it cannot be read, or, of an `existing`
    study, if it is missing; OSError(ENOSPC) if the disk is full, and has then written nothing.
    """

    def __init__(self, folder: Path, existing: bool = False):
        if existing and not (folder / FILE).exists():
            raise ConfigError(f"study: {folder} has no {FILE}: it is no whole copy of the study")
        self.guard: Callable[[], object] = lambda: None  # called before every write; may raise
        self._lock = threading.Lock()  # the outboxes' threads read it
        self._connection = sqlite3.connect(
            folder / FILE, timeout=1, isolation_level=None, check_same_thread=False
        )
        try:
            # The operating system holds the lock, so that a killed process leaves none behind.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            with self._transaction():
                for statement in TABLES.split(";"):
                    self._connection.execute(statement)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            if error.sqlite_errorname == "SQLITE_BUSY":
                raise ConfigError(f"study: {folder} is open in another process") from error
            raise ConfigError(f"study: cannot use {folder / FILE} ({one_line(error)})") from error

    def close(self) -> None:
        self._connection.close()

    def append(self, events: Iterable[Event]) -> list[Event]:
        """Writes all `events` or none; returns the new ones, as they will be read."""
        new = []
        with self._lock, self._transaction() as execute:
            for event in events:
                text = json.dumps(vars(event))
                cursor = execute(
                    "INSERT OR IGNORE INTO events (time, trial, kind, epoch, body)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (time.time(), event.trial, event.kind, event.epoch, text),
                )
                if cursor.rowcount:
                    new.append(parsed(event.kind, text))
        return new

    def copy(self, events: Iterable[Logged]) -> None:
        """Writes the events of another log, with their numbers and times."""
        rows = [
            (id, when, event.trial, event.kind, event.epoch, json.dumps(vars(event)))
            for id, when, event in events
        ]
        with self._lock, self._transaction() as execute:
            for row in rows:
                execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", row)

    def events(self, after: int = 0, limit: int = -1) -> list[Logged]:
        """The events after event `after`, oldest first."""
        query = "SELECT id, time, kind, body FROM events WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._rows(query, after, limit)
        return [Logged(id, when, parsed(kind, body)) for id, when, kind, body in rows]

    def paused(self) -> bool:
        """Whether the study is paused: no trial begins."""
        query = "SELECT body FROM events WHERE trial = ? AND kind = ? ORDER BY id DESC LIMIT 1"
        rows = self._rows(query, Paused.trial, Paused.kind)
        return bool(rows) and json.loads(rows[0][0])["on"]

    def last(self) -> int:
        """Id of the newest event, 0 if there is none."""
        return self._rows("SELECT MAX(id) FROM events")[0][0] or 0

    def delivered(self, store: str) -> int:
        """The last event that `store` has; it has all earlier ones too."""
        return self._rows("SELECT MAX(event) FROM delivered WHERE store = ?", store)[0][0] or 0

    def set_delivered(self, store: str, event: int) -> None:
        with self._lock, self._transaction() as execute:
            execute("INSERT OR REPLACE INTO delivered VALUES (?, ?)", (store, event))

    def _rows(self, query: str, *values: str | int) -> list[tuple]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        self.guard()
        try:
            with self._connection as connection:  # commits, or rolls back after an error
                connection.execute("BEGIN IMMEDIATE")
                yield connection.execute
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", None) in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
                raise OSError(errno.ENOSPC, "no space left for the event log") from error
            raise


def parsed(kind: str, text: str) -> Event:
    return KINDS[kind](**json.loads(text))
