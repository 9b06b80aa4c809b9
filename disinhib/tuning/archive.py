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
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from disinhib.checks import check, refusal
from disinhib.errors import ConfigError, masked, one_line
from disinhib.hydra_config import check_folder, option_of
from disinhib.tuning import (
    event_log,
    inventory,
    manifest,
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
    that name is there, or if a store does not take it.
    """
    check_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    part = out_dir / f".{file.stem}.import"
    shutil.rmtree(part, ignore_errors=True)
    kept, address = (masked(uri), uri) if uri else store_of(None, out_dir)
    address = mlflow_store.address(address, out_dir)
    try:
        names, reports = _unpacked(file, part)
        for taken in (name for name in names if (out_dir / name).exists()):
            allowed = f"an archive of studies that are not there yet ({out_dir / taken} is)"
            raise refusal("file", file, allowed)
        runs: dict[str, str] = {}  # of the first study's trials
        for name in names:
            folder, first = part / name, name == names[0]
            _begin(file, folder, kept, runs)
            job = upkeep.job_of(entry := inventory.look(folder), address)
            named = entry.options["tracking"]["experiment"]
            artifacts = out_dir / mlflow_store.ARTIFACTS  # not in `part`, if it is a new experiment
            experiment = mlflow_store.open_store(address, named, artifacts)
            upkeep.bring_up(job, entry.state == FINISHED, reports if first else {})
            if entry.state == FINISHED:  # MLflow has the models
                retention.remove(job.checkpoint_folder, retention.MODELS)
            runs = mlflow_store.runs_of_trials(experiment, entry.manifest.id) if first else runs
        for name in names:
            (part / name).rename(out_dir / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [inventory.look(out_dir / name) for name in names]


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
            names[index["study"]] = None
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


def _begin(file: Path, folder: Path, uri: str | None, runs: Mapping[str, str]) -> None:
    """Makes an unpacked study one that is recorded at `uri`, and that, as a retraining, has trained
    again those trials whose runs there are `runs`."""
    begun = manifest.read(folder, folder.name)
    if (flat := folder / "checkpoints").exists():
        flat.rename(folder / "unpacked")
        flat.mkdir()
        (folder / "unpacked").rename(retention.folder(folder, begun.id))
    else:
        retention.folder(folder, begun.id).mkdir(parents=True)
    try:
        lines = (folder / EVENTS).read_text("utf-8").splitlines()
        event_log.write(folder, [_logged(json.loads(line), runs) for line in lines])
        content = yaml.safe_load((folder / FILE).read_text("utf-8"))
        content["options"]["tracking"]["uri"] = uri
    except Exception as error:  # of another version
        raise _damaged(file, error) from error
    resume.keep(folder, content)
    (folder / EVENTS).unlink()


def _logged(line: Mapping[str, Any], runs: Mapping[str, str]) -> Logged:
    event = event_log.parsed(line["kind"], json.dumps(line["body"]))
    if isinstance(event, Asked) and event.tags.get(OF_TRIAL, "") in runs:
        event = replace(event, tags={**event.tags, OF_RUN: runs[event.tags[OF_TRIAL]]})
    return Logged(line["id"], line["time"], event)
