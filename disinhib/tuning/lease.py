"""Who runs a study: a file in its folder that its driver writes again every second.

On one machine the event log's lock keeps a second driver out. On a file system that several
machines share, locks may hold on each machine alone (NFS); there the lease does it. A driver that
was killed leaves its lease behind, but it is no longer written.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disinhib.errors import ConfigError

FILE = "driver.lease"  # in a study's folder
BEAT_SECONDS = 1.0
LOOKS, LOOK_SECONDS = 60, 0.25  # at another machine's lease, until its driver counts as ended
LIST_SECONDS = 3.0  # the same where nothing hangs on it: a list of studies


class TakenOver(RuntimeError):
    """Another driver runs this study now."""


def _machine() -> str:
    """What tells this machine, since it was started, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return platform.node()


@dataclass
class Lease:
    """Of this process, on the study in `folder`."""

    folder: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    status: dict[str, Any] = field(default_factory=dict)  # of the study, for whoever asks

    def taken_by(self) -> dict[str, Any] | None:
        """The lease of another driver that has taken the study over."""
        there = read(self.folder)
        return there if there is not None and there["id"] != self.id else None

    def check(self) -> None:
        """Raises TakenOver. (Before every write: this machine may have been suspended.)"""
        if there := self.taken_by():
            raise TakenOver(f"study {self.folder} is now run {_from(there)}: end that one")

    def write(self) -> None:
        """Writes the lease, in place: whoever opens the file sees the newest content, on NFS too.
        One that is gone is not made again; what cannot be written now is written the next time."""
        own = {"id": self.id, "machine": _machine(), "host": platform.node(), "pid": os.getpid()}
        whole = json.dumps({**own, "beat": self.beats, "status": self.status})
        with suppress(OSError), (self.folder / FILE).open("r+" if self.beats else "w") as file:
            file.write(whole)
            file.truncate()
            self.beats += 1


def refuse_live(folder: Path) -> None:
    """Raises ConfigError if a driver on another machine runs the study in `folder`. If there is a
    lease of one, that takes LOOKS * LOOK_SECONDS to find out; a dead one's is then removed."""
    first = None
    for look in range(LOOKS):
        there = read(folder)
        if there is None and (look > 1 / LOOK_SECONDS or not (folder / FILE).exists()):
            break  # there is none, or one that was never finished
        if there is not None and there["machine"] == _machine():
            return
        first = first or there
        if there is not None and there != first:
            raise ConfigError(f"study: {folder} is run {_from(there)}")
        time.sleep(LOOK_SECONDS)
    (folder / FILE).unlink(missing_ok=True)


def elsewhere(folders: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The leases on studies that drivers on other machines run now. Takes LIST_SECONDS if there
    are any that may."""
    foreign = {folder: read(folder) for folder in folders}
    foreign = {f: there for f, there in foreign.items() if there and there["machine"] != _machine()}
    if foreign:
        time.sleep(LIST_SECONDS)
    now = {folder: read(folder) for folder in foreign}
    return {folder: there for folder, there in now.items() if there and there != foreign[folder]}


def foreign(folder: Path) -> bool:
    """Whether there is a lease that is not of this machine: its driver may be alive."""
    there = None
    for _ in range(round(1 / LOOK_SECONDS)):
        there = read(folder)
        if there is not None or not (folder / FILE).exists():
            break
        time.sleep(LOOK_SECONDS)  # it is being written
    return (folder / FILE).exists() and (there is None or there["machine"] != _machine())


@contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Holds the lease on the study in `folder`, which nobody else runs."""
    lease, over = Lease(folder), threading.Event()

    def renew() -> None:
        while not over.wait(BEAT_SECONDS) and not lease.taken_by():
            lease.write()

    lease.write()
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        if not lease.taken_by():
            (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The lease that is there; None: none, or one that is being written."""
    try:
        there = json.loads((folder / FILE).read_text("utf-8"))
        return there if {"id", "machine", "host", "pid"} <= there.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _from(there: dict[str, Any]) -> str:
    return f"from {there['host']} (process {there['pid']})"
