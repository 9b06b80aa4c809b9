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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disinhib.errors import ConfigError

FILE = "driver.lease"  # in a study's folder
BEAT_SECONDS = 1.0
SILENT_SECONDS = 15.0  # after which another machine's driver has ended, or its machine is gone


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
    machine: str = field(default_factory=_machine)
    taken: dict[str, Any] | None = None  # the lease of a driver that has taken the study over

    def check(self) -> None:
        """Raises ConfigError if another driver has taken the study over."""
        if self.taken is not None:
            raise ConfigError(f"study: {self.folder} is now run {_from(self.taken)}")

    def beat(self, count: int) -> None:
        """Writes the lease, unless another driver has, or removed it. (In place: who opens the file
        sees the newest content, on NFS too. What cannot be written now is written next time.)"""
        there = _read(self.folder)
        if there is not None and there["id"] != self.id and count:
            self.taken = there
            return
        own = {"id": self.id, "machine": self.machine, "host": platform.node(), "pid": os.getpid()}
        with suppress(OSError), (self.folder / FILE).open("r+" if count else "w") as file:
            file.write(json.dumps({**own, "beat": count}))
            file.truncate()


@contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Holds the lease on the study in `folder`. If another machine has one, waits until it is known
    whether its driver still lives.

    Raises ConfigError if it does.
    """
    lease = Lease(folder)
    first, began = _read(folder), time.monotonic()
    while first is None and (folder / FILE).exists() and time.monotonic() - began < BEAT_SECONDS:
        first = _read(folder)  # it is being written
    while first is not None and first["machine"] != lease.machine:
        if _read(folder) not in (first, None):
            raise ConfigError(f"study: {folder} is run {_from(first)}")
        if time.monotonic() - began > SILENT_SECONDS:
            break
        time.sleep(BEAT_SECONDS / 4)
    over = threading.Event()

    def write() -> None:
        count = 1
        while not over.wait(BEAT_SECONDS) and lease.taken is None:
            lease.beat(count)
            count += 1

    lease.beat(0)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        if lease.taken is None:
            (folder / FILE).unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any] | None:
    """The lease that is there; None: none, or one that is being written."""
    try:
        there = json.loads((folder / FILE).read_text("utf-8"))
        return there if {"id", "machine", "host", "pid"} <= there.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _from(there: dict[str, Any]) -> str:
    return f"from {there['host']} (process {there['pid']})"
