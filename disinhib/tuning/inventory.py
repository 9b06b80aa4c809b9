"""The studies in a folder: how each stands, by its own files. Nothing is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from disinhib.checks import refusal
from disinhib.errors import ConfigError, nearest
from disinhib.metrics import SELECTION
from disinhib.tuning import event_log, lease, manifest, progress
from disinhib.tuning.event_log import OF_STUDY, Logged, Objective, Paused, Record, replay
from disinhib.tuning.manifest import MANIFEST, Manifest
from disinhib.tuning.resume import FILE

RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"
RETRAINED = "-retrained"  # follows the study's name in that of its retraining
DELETED = ".{}.deleted"  # what is left of a folder while it is being deleted


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
    objective: Objective
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
        total = 0
        for folder, _, files in os.walk(self.folder):
            for file in files:
                with suppress(FileNotFoundError):  # it runs: a checkpoint has just been removed
                    total += os.lstat(os.path.join(folder, file)).st_size
        return total


def look(folder: Path) -> Entry:
    """The study in `folder`. Raises ConfigError if it has none, or none that can be read."""
    return _look(folder, lease.elsewhere([folder]).get(folder))


def _look(folder: Path, driver: Mapping[str, Any] | None) -> Entry:
    """The study in `folder`, which `driver`, if any, runs on another machine. Its log is not opened
    then: that machine's locks may not hold here, and what it is writing would be rolled back."""
    try:
        kept = yaml.safe_load((folder / FILE).read_text("utf-8"))
        objective = _objective(**kept["options"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(f"study: {folder} has no {FILE} that can be read") from error
    begun = manifest.read(folder, folder.name)
    events = None
    if driver is None:
        events = event_log.read(folder, copied=lease.foreign(folder))
        driver = lease.read(folder) or {}
    if events is None:
        status = driver.get("status", {})
        return Entry(folder, kept, begun, [], RUNNING, driver, status, objective)
    records = replay(events)
    # An earlier version's retraining has no number of trials, nor has any retraining repeats.
    trials = kept["options"].get("trials", len(records)) * kept["options"].get("repeats", 1)
    paused = [logged.event.on for logged in events if isinstance(logged.event, Paused)][-1:]
    outline = progress.outline(records, trials, objective, paused == [True])
    state = FINISHED if outline["ended"] >= trials and not outline["unfinished"] else INTERRUPTED
    return Entry(folder, kept, begun, events, state, None, outline, objective, records)


def _objective(metric: str, mode: str | None = None, **_: Any) -> Objective:
    return Objective.of(metric, mode or SELECTION[metric].mode)  # an earlier version kept no mode


def listed(out_dir: Path) -> tuple[list[Entry], list[str]]:
    """(the studies in `out_dir`, the newest first; of every folder that is no whole study, why)."""
    entries, broken = [], []
    folders = _folders(out_dir)
    leases = lease.elsewhere(folders)
    for folder in folders:
        try:
            entries.append(_look(folder, leases.get(folder)))
        except (ConfigError, OSError) as error:
            broken.append(str(error))
    return sorted(entries, key=lambda entry: -entry.when), broken


def find(out_dir: Path, name: str) -> Entry:
    """The study `name` in `out_dir`. Raises ConfigError if there is none."""
    folder = out_dir / name
    if not (folder / FILE).exists():
        names = [folder.name for folder in _folders(out_dir)]
        allowed = f"one of {', '.join(names)}" if names else "none: there is no study"
        raise refusal("study", name, f"{allowed} (in {out_dir}){nearest(name, names)}")
    return look(folder)


def _folders(out_dir: Path) -> list[Path]:
    """The folders of studies, without those that are being deleted."""
    folders = sorted(file.parent for file in out_dir.glob(f"*/{FILE}"))
    return [folder for folder in folders if not fnmatch(folder.name, DELETED.format("*"))]


def folders_by_id(out_dir: Path) -> dict[str, Path]:
    """The folders of the studies in `out_dir`, by their ids, which every version keeps alike."""
    found = {}
    for folder in _folders(out_dir):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it has none: it is nobody's copy
            found[json.loads((folder / MANIFEST).read_text("utf-8"))["id"]] = folder
    return found


def retrainings(entry: Entry) -> tuple[list[Entry], list[str]]:
    """(the retrainings of a study that lie beside it; of every folder there that is no whole
    study, and so may be one, why)."""
    beside, broken = listed(entry.folder.parent)
    named = entry.name + RETRAINED
    of_it = lambda e: e.of == entry.manifest.id or (e.state == RUNNING and e.name == named)
    others = [e for e in beside if e.manifest.id != entry.manifest.id and not e.search]
    return [e for e in others if of_it(e)], broken
