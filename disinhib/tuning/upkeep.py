"""What is done with a study that nobody runs: brought in step in its stores, renamed, deleted.

A study's folder is the truth, also of its name. The stores follow it when they are loaded, so that
a renaming that was interrupted is finished by the same command, or when the study is resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from disinhib.checks import check, refusal
from disinhib.errors import ConfigError, masked
from disinhib.hydra_config import option_of
from disinhib.tuning import engine, lease, mlflow_connection, mlflow_store, optuna_store, resume
from disinhib.tuning.engine import Job
from disinhib.tuning.event_log import OF_STUDY, EventLog, replay
from disinhib.tuning.inventory import (
    DELETED,
    FINISHED,
    RETRAINED,
    RUNNING,
    Entry,
    find,
    look,
    retrainings,
)
from disinhib.tuning.loop import from_list
from disinhib.tuning.mlflow_process import MlflowProcess
from disinhib.tuning.options import store_of
from disinhib.tuning.outbox import Outbox
from disinhib.tuning.resume import FILE
from disinhib.tuning.validation import NAME

RENAMED = "renamed_from"  # in FILE, until all stores know the new name


def address(entry: Entry, given: str | None = None) -> str:
    """The address of its MLflow store, `given` or its own, with the environment's password. Raises
    ConfigError."""
    out_dir = entry.folder.parent
    return mlflow_connection.address(given or store_of(entry.tracking_uri, out_dir)[1], out_dir)


def job_of(entry: Entry, uri: str) -> Job:
    """The study as the engine knows it, with nothing left to do."""
    options = entry.options
    return Job(
        name=entry.name,
        out_dir=entry.folder.parent,
        resume=True,
        manifest=entry.manifest,
        data=[],
        kept=entry.kept,
        command=entry.kept.get("command", ""),
        objective=entry.objective,
        source=from_list([]),
        cluster=options["cluster"],
        checkpoints=options["checkpoints"],
        tracking={**options["tracking"], "uri": uri},
        optuna=entry.search,
        storage=options["searcher"]["storage"] if entry.search else None,
        tags={OF_STUDY: entry.of} if entry.of not in (None, entry.manifest.id) else {},
    )


def bring_up(job: Job, whole: bool, more: Mapping[str, bytes] | None = None) -> None:
    """Brings every store up to the log and the folder's name; `more` are further artifacts of the
    study's run. Raises ConfigError if a store cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with ExitStack() as stack:
        log = stack.enter_context(closing(EventLog(job.folder, existing=True)))
        mlflow = stack.enter_context(closing(MlflowProcess()))
        events = log.events()
        records = replay(events)
        for store in engine.open_stores(job, mlflow, more, events[0].time if events else None):
            Outbox(log, store, lambda line: None).reconcile()
            store.close(records, whole)


def refuse_running(entry: Entry) -> None:
    """Raises ConfigError if somebody runs the study, here or elsewhere."""
    if entry.state == RUNNING:
        host, pid = ((entry.driver or {}).get(name, "?") for name in ("host", "pid"))
        raise ConfigError(f"study: {entry.name} runs (process {pid} on {host}): stop it first")
    lease.refuse_live(entry.folder)


def rename(out_dir: Path, old: str, new: str, uri: str | None = None) -> list[str]:
    """Renames a study, and the retraining that is named after it. Returns what was done, and which
    folders were left out, a line each.

    Raises ConfigError if the new name is taken, if somebody runs the study, or if a store does not
    answer.
    """
    check("to", new, NAME)
    names = {old + RETRAINED: new + RETRAINED, old: new}
    begun = [_half_renamed(out_dir, *pair) for pair in names.items()]
    done = [_renamed(e, e.kept[RENAMED], address(e, uri)) for e in begun if e is not None]
    if done and not (out_dir / old).exists():
        return done
    entry = find(out_dir, old)
    beside, broken = retrainings(entry)
    family = [e for e in (*beside, entry) if e.name in names]
    with closing(MlflowProcess()) as mlflow, ExitStack() as logs:
        for one in family:
            refuse_running(one)
            logs.enter_context(closing(EventLog(one.folder, existing=True)))  # nobody begins to
            if (out_dir / names[one.name]).exists():
                raise refusal("to", new, f"a new name ({out_dir / names[one.name]} is there)")
            job = replace(job_of(one, address(one, uri)), name=names[one.name], resume=False)
            engine.check_stores(job, mlflow)
        for one in family:
            _keep_name(one, names[one.name])
            one.folder.rename(out_dir / names[one.name])
    for one in family:
        there = look(out_dir / names[one.name])
        done.append(_renamed(there, one.name, address(there, uri)))
    return [*done, *(f"left out: {why}" for why in broken)]


def _half_renamed(out_dir: Path, old: str, new: str) -> Entry | None:
    """The study whose folder has its new name already, while a store may not know it."""
    if (out_dir / old).exists() or not (out_dir / new / FILE).exists():
        return None
    entry = look(out_dir / new)
    return entry if entry.kept.get(RENAMED) == old else None


def _keep_name(entry: Entry, name: str) -> None:
    kept: dict[str, Any] = {**entry.kept, RENAMED: entry.name}
    if "overrides" in kept:
        others = [o for o in kept["overrides"] if option_of(o) != "study"]
        kept["overrides"] = [*others, f"study={name}"]
    kept["options"] = {**kept["options"], "study": name}
    resume.keep(entry.folder, kept)


def _renamed(entry: Entry, old: str, uri: str) -> str:
    bring_up(job_of(entry, uri), entry.state == FINISHED)
    resume.keep(entry.folder, {n: value for n, value in entry.kept.items() if n != RENAMED})
    return f"{old} is now {entry.name}, in its folder, in {masked(uri)} and for Optuna"


def delete(entry: Entry, uri: str) -> list[str]:
    """Deletes a study from MLflow, Optuna's store and its folder, which is the last, so that the
    same command goes on if it was interrupted. Returns what was deleted, a line each.

    Raises ConfigError if somebody runs it, or if a store does not answer; the folder is there then.
    """
    refuse_running(entry)
    lines = []
    folder = entry.folder
    with closing(EventLog(folder, existing=True)):  # nobody begins to run it
        if line := _delete_in_mlflow(entry, uri):
            lines.append(line)
        storage = entry.options["searcher"]["storage"] if entry.search else None
        if storage is not None and optuna_store.delete_study(storage, entry.manifest.id):
            lines.append(f"{entry.name}: its study in {masked(storage)}")
        size = entry.size
        sweep(folder)  # of an earlier study of that name
        folder.rename(folder.with_name(DELETED.format(entry.name)))
    sweep(folder)  # after the log is closed: NFS keeps what is open
    return [*lines, f"{entry.name}: its folder {folder} ({size / 1e6:.1f} MB)"]


def sweep(folder: Path) -> bool:
    """Removes what an interrupted deletion of `folder` has left; returns whether there was any."""
    left = folder.with_name(DELETED.format(folder.name))
    if left.exists():
        shutil.rmtree(left)
        return True
    return False


def _delete_in_mlflow(entry: Entry, uri: str) -> str | None:
    file = mlflow_connection.sqlite_file(uri)
    if file is not None and not file.exists():
        return None
    name = entry.options["tracking"]["experiment"]
    experiment = mlflow_connection.open_store(
        uri, name, entry.folder.parent / mlflow_connection.ARTIFACTS
    )
    runs = mlflow_store.delete_study(experiment, entry.manifest.id)
    if not runs:
        return None
    line = f"{entry.name}: its {len(runs)} runs in {masked(uri)}"
    if file is None:
        return f"{line} (in MLflow's trash, until somebody runs mlflow gc there)"
    if why := mlflow_connection.purge(file, runs):
        return f"{line} (in MLflow's trash, as mlflow gc fails: {why})"
    return f"{line}, with their artifacts"
