"""The studies in a folder: how each stands, by its own files. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from disinhib.checks import refusal
from disinhib.errors import ConfigError, nearest
from disinhib.tuning import event_log, lease, manifest, progress
from disinhib.tuning.event_log import OF_STUDY, Logged, Paused, Record, replay
from disinhib.tuning.manifest import MANIFEST, Manifest
from disinhib.tuning.resume import FILE

RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"
RETRAINED = "-retrained"  # follows the study's name in that of its retraining


@dataclass(frozen=True)
class Entry:
    """A study in its folder."""

    folder: Path
    kept: Mapping[str, Any]  # its FILE
    manifest: Manifest
    events: list[Logged]  # none while it runs
    state: str
    driver: Mapping[str, Any] | None  # its lease, while it runs
    outline: Mapping[str, Any]  # progress.outline; of one that has just been started, empty
    records: Mapping[int, Record] = field(default_factory=dict)  # none while it runs

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def options(self) -> Mapping[str, Any]:
        return self.kept["options"]

    @property
    def tracking_uri(self) -> str:
        """The address of its MLflow store as it is kept: where it was written or, if its whole
        output folder was moved, the database that was moved with it."""
        beside = self.folder.with_name("mlflow.db")
        uri = self.options["tracking"]["uri"] or f"sqlite:///{beside}"
        file = Path(uri.removeprefix("sqlite:///"))
        moved = uri.startswith("sqlite:///") and not file.exists() and beside.exists()
        return f"sqlite:///{beside}" if moved else uri

    @property
    def search(self) -> bool:
        """Whether it is a search, and not a retraining."""
        return self.manifest.space is not None

    @property
    def of(self) -> str | None:
        """The id of the study that this retrains; None of a search, or while it runs."""
        tags = (record.tags for record in self.records.values())
        return next((of_trial[OF_STUDY] for of_trial in tags if OF_STUDY in of_trial), None)

    @property
    def when(self) -> float:
        """When something last happened, in s since 1970."""
        if self.state == RUNNING:
            return time.time()
        return self.events[-1].time if self.events else (self.folder / MANIFEST).stat().st_mtime

    @property
    def size(self) -> int:
        """Of its folder, in bytes."""
        return sum(file.lstat().st_size for file in self.folder.rglob("*") if file.is_file())


def look(folder: Path) -> Entry:
    """The study in `folder`. Raises ConfigError if it has none, or none that can be read."""
    try:
        kept = yaml.safe_load((folder / FILE).read_text("utf-8"))
        metric = kept["options"]["metric"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"study: {folder} has no {FILE} that can be read") from error
    begun = manifest.read(folder, folder.name)
    events = event_log.read(folder)
    if events is None:
        driver = lease.read(folder) or {}
        return Entry(folder, kept, begun, [], RUNNING, driver, driver.get("status", {}))
    records = replay(events)
    trials = kept["options"].get("trials", len(records))  # a retraining has a list
    paused = [logged.event.on for logged in events if isinstance(logged.event, Paused)][-1:]
    outline = progress.outline(records, trials, metric, paused == [True])
    state = FINISHED if outline["ended"] >= trials and not outline["unfinished"] else INTERRUPTED
    return Entry(folder, kept, begun, events, state, None, outline, records)


def listed(out_dir: Path) -> tuple[list[Entry], list[str]]:
    """(the studies in `out_dir`, the newest first; of every folder that is no whole study, why)."""
    entries, broken = [], []
    for folder in sorted(file.parent for file in out_dir.glob(f"*/{FILE}")):
        try:
            entries.append(look(folder))
        except (ConfigError, OSError) as error:
            broken.append(str(error))
    leases = lease.elsewhere(entry.folder for entry in entries if entry.state != RUNNING)
    for index, entry in enumerate(entries):
        if entry.folder in leases:
            there = leases[entry.folder]
            status = there.get("status", {})
            entries[index] = replace(entry, state=RUNNING, driver=there, outline=status)
    return sorted(entries, key=lambda entry: -entry.when), broken


def find(out_dir: Path, name: str) -> Entry:
    """The study `name` in `out_dir`. Raises ConfigError if there is none."""
    folder = out_dir / name
    if not (folder / FILE).exists():
        names = sorted(file.parent.name for file in out_dir.glob(f"*/{FILE}"))
        allowed = f"one of {', '.join(names)}" if names else "none: there is no study"
        raise refusal("study", name, f"{allowed} (in {out_dir}){nearest(name, names)}")
    entry = look(folder)
    if entry.state != RUNNING and (there := lease.elsewhere([folder]).get(folder)):
        return replace(entry, state=RUNNING, driver=there, outline=there.get("status", {}))
    return entry


def folders_by_id(out_dir: Path) -> dict[str, Path]:
    """The folders of the studies in `out_dir` whose manifest can be read, by the study's id."""
    found = {}
    for file in out_dir.glob(f"*/{FILE}"):
        with suppress(ConfigError):
            found[manifest.read(file.parent, file.parent.name).id] = file.parent
    return found


def retrainings(entry: Entry) -> list[Entry]:
    """The retrainings of a study that lie beside it."""
    beside, _ = listed(entry.folder.parent)
    named = entry.name + RETRAINED
    of_it = lambda e: e.of == entry.manifest.id or (e.state == RUNNING and e.name == named)
    return [e for e in beside if e.manifest.id != entry.manifest.id and not e.search and of_it(e)]
