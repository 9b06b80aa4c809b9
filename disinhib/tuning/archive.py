"""A study, with its retrainings, in one zip file.

    archive.json                    the form, and the SHA-256 of every other file
    NAME/study.yaml manifest.json   as in its folder, without places: stores, folders, a cluster
    NAME/events.jsonl               the event log, an event a line
    NAME/checkpoints/               final states, and the models of retrained seeds
    NAME-retrained/...              each retraining of it, the same
    report/ *.csv                   for readers: what was attached to the study, its tables

The log is the source of truth, so the stores are not in it: who imports the file writes the log,
and brings its own stores up to that.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from disinhib import process
from disinhib.checks import TEXT, check, refusal
from disinhib.errors import ConfigError, masked, one_line
from disinhib.hydra_config import check_folder, option_of
from disinhib.tuning import (
    event_log,
    inventory,
    manifest,
    mlflow_connection,
    mlflow_store,
    resume,
    retention,
    upkeep,
)
from disinhib.tuning.event_log import Asked, Logged
from disinhib.tuning.inventory import FINISHED, Entry
from disinhib.tuning.manifest import MANIFEST
from disinhib.tuning.mlflow_store import OF_RUN, OF_TRIAL
from disinhib.tuning.options import store_of
from disinhib.tuning.resume import FILE
from disinhib.tuning.validation import NAME

FORM = 1  # of the file
INDEX = "archive.json"
EVENTS = "events.jsonl"
REPORT = "report/"  # files of the study's report
# Options that mean something only where the study was, and may hold a password.
PLACES = ("out_dir", "tracking.uri", "searcher.storage", "cluster.address")
_NAME = r"[\w.-]{0,99}\w"
_ID = r"[0-9a-f]{32}"
_OF_STUDY = re.compile(
    rf"({_NAME})/(?:{re.escape(FILE)}|{re.escape(MANIFEST)}|{re.escape(EVENTS)}"
    rf"|checkpoints/{_NAME}\.(?:msgpack|model))"
)
_FOR_READERS = re.compile(rf"{REPORT}{_NAME}|{_NAME}\.csv")


def write(
    file: Path, studies: Sequence[Entry], models: Mapping[str, bytes], more: Mapping[str, bytes]
) -> None:
    """Writes `studies`, the first of which the others retrain, into `file`, whole or not at all.
    `models` and `more` are further files, by their names in it. Raises ConfigError."""
    part = file.with_name(f".{file.name}.part")
    hashes: dict[str, str] = {}
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in _contents(studies, models, more):
                zipped.writestr(name, content)
                hashes[name] = hashlib.sha256(content).hexdigest()
            index = {
                "form": FORM,
                "disinhib": studies[0].manifest.provenance["code"]["version"],
                "study": studies[0].name,
            }
            zipped.writestr(INDEX, json.dumps({**index, "files": hashes}, indent=1))
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        allowed = f"a file that can be written ({error.strerror})"
        raise refusal("file", file, allowed) from error


def _contents(
    studies: Sequence[Entry], models: Mapping[str, bytes], more: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    for entry in studies:
        kept = _without_places(entry.kept)
        yield f"{entry.name}/{FILE}", yaml.safe_dump(kept).encode()
        yield f"{entry.name}/{MANIFEST}", json.dumps(asdict(entry.manifest)).encode()
        lines = (
            json.dumps({"id": id, "time": when, "kind": event.kind, "body": vars(event)})
            for id, when, event in entry.events
        )
        yield f"{entry.name}/{EVENTS}", "".join(f"{line}\n" for line in lines).encode()
    yield from models.items()
    yield from more.items()


def _without_places(kept: Mapping[str, Any]) -> dict[str, Any]:
    options = {**kept["options"]}
    for place in PLACES:
        group, _, leaf = place.rpartition(".")
        if not group:
            options[leaf] = "out"
        elif leaf in options.get(group, {}):
            options[group] = {**options[group], leaf: None}
    left = {**kept, "options": options, "command": masked(kept.get("command", ""))}
    if "overrides" in kept:
        left["overrides"] = [o for o in kept["overrides"] if option_of(o) not in PLACES]
    return left


def checkpoints(entry: Entry) -> dict[str, bytes]:
    """The checkpoints and models in the folder of a study, by their names in an archive."""
    folder = retention.folder(entry.folder, entry.manifest.id)
    files = [*folder.glob("[!.]*.msgpack"), *folder.glob("[!.]*.model")]
    return {f"{entry.name}/checkpoints/{file.name}": file.read_bytes() for file in sorted(files)}


def model(entry: Entry, number: int, seed: int) -> str:
    """The name in an archive of the model of a retrained seed."""
    return f"{entry.name}/checkpoints/{retention.model_file('', number, seed)}"


def read(file: Path, out_dir: Path, uri: str | None = None) -> list[Entry]:
    """Writes the studies in `file` into `out_dir` and into the stores; MLflow's is at `uri`, by
    default where a new study in `out_dir` would be recorded. Returns them, the retrained first.

    The folders appear when the stores have everything, so that an import that was interrupted can
    be repeated. Raises ConfigError if the file is no whole archive of this version, if a study of
    that name, or under another name one of them itself, is there or in the store, or if a store
    does not take it.
    """
    check_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    kept, address = store_of(None, out_dir)
    address = mlflow_connection.address(uri or address, out_dir)
    kept = masked(address) if uri else kept
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=f".{file.stem}.") as made:
        part = Path(made)
        names, reports = _unpacked(file, part)
        begun = {name: _begin(file, part / name, kept) for name in names}
        there = inventory.folders_by_id(out_dir)
        taken = [there[id] for id, _ in begun.values() if id in there]
        if taken := [*taken, *(out_dir / name for name in names if (out_dir / name).exists())]:
            allowed = f"an archive of studies that are not there yet ({taken[0]} is)"
            raise refusal("file", file, allowed)
        artifacts = (
            out_dir / mlflow_connection.ARTIFACTS
        )  # not in `part`, if it is a new experiment
        claims = {
            name: (mlflow_connection.open_store(address, experiment, artifacts), id)
            for name, (id, experiment) in begun.items()
        }
        place = f"{platform.node()}:{out_dir}"
        for claim in claims.values():
            mlflow_store.claim(*claim, place)
        runs: dict[str, str] = {}  # of the first study's trials
        for name in names:
            first = name == names[0]
            _write_log(file, part / name, runs)
            job = upkeep.job_of(entry := inventory.look(part / name), address)
            upkeep.bring_up(job, entry.state == FINISHED, reports if first else {})
            if entry.state == FINISHED:  # MLflow has the models
                retention.remove(job.checkpoint_folder, retention.MODELS)
            runs = mlflow_store.runs_of_trials(*claims[name]) if first else runs
        with process.finishing():
            _move(file, part, out_dir, names)
            for claim in claims.values():
                mlflow_store.end_claim(*claim)
    return [inventory.look(out_dir / name) for name in names]


def _move(file: Path, part: Path, out_dir: Path, names: Sequence[str]) -> None:
    """Moves the studies into `out_dir`, all or none; the first, without which the others are
    nothing, is the last."""
    moved: list[str] = []
    try:
        for name in reversed(names):
            (part / name).rename(out_dir / name)
            moved.append(name)
    except OSError as error:  # somebody has taken the name in the meantime
        for name in moved:
            (out_dir / name).rename(part / name)
        allowed = f"an archive whose folders can be made in {out_dir} ({error.strerror})"
        raise refusal("file", file, allowed) from error


def _unpacked(file: Path, part: Path) -> tuple[list[str], dict[str, bytes]]:
    """(the names of the studies in `file`, which are then in `part`, the retrained first; the files
    of its report). Raises ConfigError."""
    names: dict[str, None] = {}
    reports = {}
    try:
        with zipfile.ZipFile(file) as zipped:
            index = json.loads(zipped.read(INDEX))
            if index["form"] != FORM:
                words = f"form {index['form']}, of disinhib {index['disinhib']}"
                raise refusal("file", file, f"an archive of form {FORM} (it has {words})")
            hashes = index["files"]
            names[check("study", index["study"], NAME)] = None
            if f"{index['study']}/{FILE}" not in hashes:
                raise ValueError(f"it has no {index['study']}/{FILE}")
            if foreign := {*zipped.namelist()} - {*hashes, INDEX}:
                raise ValueError(f"{min(foreign)} is not in its index")
            for path, wanted in hashes.items():
                of_study = _OF_STUDY.fullmatch(path)
                if not of_study and not _FOR_READERS.fullmatch(path):
                    raise ValueError(f"{path} is no file of a study")
                content = zipped.read(path)
                if hashlib.sha256(content).hexdigest() != wanted:
                    raise ValueError(f"{path} has changed")
                if path.startswith(REPORT):
                    reports[path] = content
                elif of_study:
                    names[check("study", of_study[1], NAME)] = None
                    (part / path).parent.mkdir(parents=True, exist_ok=True)
                    (part / path).write_bytes(content)
                    (part / path).chmod(0o600)
    except ConfigError:
        raise
    except OSError as error:
        raise refusal("file", file, f"a file that can be read ({error.strerror})") from error
    except Exception as error:  # zipfile and zlib raise many kinds
        raise _damaged(file, error) from error
    return [*names], reports


def _damaged(file: Path, error: Exception) -> ConfigError:
    return refusal("file", file, f"a whole archive of `export` ({one_line(error)})")


def _begin(file: Path, folder: Path, uri: str | None) -> tuple[str, str]:
    """Makes an unpacked study one that is recorded at `uri`. Returns its id, and the name of its
    experiment."""
    id = manifest.read(folder, folder.name).id
    try:
        if not re.fullmatch(_ID, id):  # it becomes part of paths and queries
            raise ValueError(f"{folder.name} has no id")
        # Whoever made the file may have named places all the same.
        content = _without_places(yaml.safe_load((folder / FILE).read_text("utf-8")))
        tracking = content["options"]["tracking"] = {**content["options"]["tracking"], "uri": uri}
        experiment = check("tracking.experiment", tracking["experiment"], TEXT)
    except ConfigError:
        raise
    except Exception as error:  # of another version
        raise _damaged(file, error) from error
    if (flat := folder / "checkpoints").exists():
        flat.rename(folder / "unpacked")
        flat.mkdir()
        (folder / "unpacked").rename(retention.folder(folder, id))
    else:
        retention.folder(folder, id).mkdir(parents=True)
    resume.keep(folder, content)
    return id, experiment


def _write_log(file: Path, folder: Path, runs: Mapping[str, str]) -> None:
    """Writes the log of an unpacked study. As a retraining, it has trained again those trials whose
    runs are `runs`."""
    try:
        lines = (folder / EVENTS).read_text("utf-8").splitlines()
        events = [_logged(json.loads(line), runs) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # another version's
        raise _damaged(file, error) from error
    try:
        event_log.write(folder, events)
    except sqlite3.IntegrityError as error:  # two have one id
        raise _damaged(file, error) from error
    (folder / EVENTS).unlink()


def _logged(line: Mapping[str, Any], runs: Mapping[str, str]) -> Logged:
    event = event_log.parsed(line["kind"], json.dumps(line["body"]))
    if isinstance(event, Asked) and event.tags.get(OF_TRIAL, "") in runs:
        event = replace(event, tags={**event.tags, OF_RUN: runs[event.tags[OF_TRIAL]]})
    return Logged(line["id"], line["time"], event)
