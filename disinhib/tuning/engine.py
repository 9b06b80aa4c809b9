"""The engine: opens a study, runs its loop on Ray Tune, and closes it.

A search, a retraining, a published grid and the timing runs of a plan are all studies (`Job`). They
differ only in the source of their trials and in early stopping.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from ray import tune
from rich.console import Console

from disinhib import data, numerics, plugins, process
from disinhib.commands import in_browser, studies_command
from disinhib.errors import FULL_DISK, ConfigError, masked
from disinhib.tuning import (
    cluster,
    lease,
    machines,
    manifest,
    optuna_store,
    progress,
    retention,
    steering,
)
from disinhib.tuning.event_log import (
    KILLED,
    Ended,
    EpochDone,
    Event,
    EventLog,
    Objective,
    Record,
    TrialConfig,
    replay,
)
from disinhib.tuning.lease import TakenOver
from disinhib.tuning.loop import Source, Stops, StudyStopped, mean_score, never, study_loop
from disinhib.tuning.manifest import Manifest
from disinhib.tuning.mlflow_process import MlflowProcess, RemoteStore
from disinhib.tuning.outbox import Outbox, Store
from disinhib.tuning.provenance import DataSource
from disinhib.tuning.ray_backend import FOLDER, RayBackend
from disinhib.tuning.worker import Policy, TrainingTrial

RAY_LOG = "ray.log"  # in a study's folder
# Between two reports of a trial whose epochs are shorter, alone or as lanes: to hear of a report
# costs the driver 3 ms, to hear of an epoch 0.5.
STRETCH_SECONDS, STRETCH_OF_LANES = 1.0, 10.0


@dataclass(frozen=True)
class Job:
    """A study, ready to run."""

    name: str
    out_dir: Path  # absolute; the study's own folder is out_dir / name
    resume: bool  # its folder exists
    manifest: Manifest
    data: Sequence[DataSource]  # that every machine must have
    kept: Mapping[str, Any]  # of its options, in its folder
    command: str  # runs this study
    objective: Objective
    source: Source
    cluster: Mapping[str, Any]  # options
    checkpoints: Mapping[str, Any]  # options
    tracking: Mapping[str, Any] | None  # options; None: no store gets a copy
    stops: Stops = never
    decisions: Callable[[TrialConfig], Sequence[int]] = lambda trial: ()  # when it may stop a trial
    trials: Callable[[Mapping[int, Record]], int] = len  # how many trials, given the records
    optuna: bool = False  # whether Optuna's store gets a copy
    storage: str | None = None  # its database; None: a file in the study's folder
    tags: Mapping[str, str] = field(default_factory=dict)  # further tags of its run in MLflow
    add: steering.Adder | None = None  # asks for a trial by hand
    seeds: int = 1  # of each trial, at most
    keep_best: int = 0  # complete trials of each rule that keep their final state
    numbered: bool = False  # the user gave it no name: it takes a number if the name is taken
    begin: Callable[[EventLog], object] = lambda log: None  # when nothing can be refused any more

    @property
    def folder(self) -> Path:
        return self.out_dir / self.name

    @property
    def resources(self) -> dict[str, float]:
        return {"cpu": self.cluster["cpus_per_trial"], "gpu": self.cluster["gpus_per_trial"]}

    @property
    def lanes(self) -> int:
        return cluster.lanes(self.cluster, self.seeds)

    @property
    def checkpoint_folder(self) -> Path:
        return retention.folder(self.folder, self.manifest.id)


@dataclass(frozen=True)
class Finished:
    """A study that has run: its trials, and where to see them."""

    job: Job
    records: list[Record]
    tracking_uri: str  # "" if there is no store
    page: str  # where MLflow's UI shows it, after the UI's address
    run_id: str | None  # of the study in MLflow; None if MLflow never answered
    seconds: float
    undelivered: dict[str, int]  # events that a store lacks, by its name
    whole: bool  # all trials have ended: it was not interrupted


def run(
    job: Job,
    console: Console,
    trainable: type[tune.Trainable] = TrainingTrial,
    callbacks: Sequence[tune.Callback] = (),
    tell: Callable[[Finished], object] = lambda finished: None,
) -> Finished:
    """Runs the trials of `job` that have not ended, shows them on `console`, and records them in
    the event log, in MLflow and in Optuna's store. Ray calls `callbacks` first. An interrupt ends
    the study as it is, once it has a folder. `tell` is called with the result before Ray ends: Ray
    takes its seconds for that, in which a signal ends the process at once.

    Raises ConfigError, before any trial, if a store, the cluster or the folder cannot be used;
    StudyStopped if the study cannot continue.
    """
    started = time.monotonic()
    begun = job.resume
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with ExitStack() as stack:
        if job.resume:  # first: another process may be running it
            lease.refuse_live(job.folder)
            log = stack.enter_context(closing(EventLog(job.folder, existing=True)))
        numerics.check()
        mlflow = stack.enter_context(closing(MlflowProcess()))
        check_stores(job, mlflow)  # a wrong address is refused at once, before Ray starts
        stack.enter_context(cluster.cluster(job.cluster))
        if not job.resume:
            kept = {**job.kept, "command": masked(job.command)}
            name = manifest.write(job.folder, job.manifest, kept, job.numbered)
            job = replace(job, name=name)
            # After the log is closed: NFS keeps what is open.
            stack.enter_context(_removed_if_refused(job.folder, lambda: begun))
            log = stack.enter_context(closing(EventLog(job.folder)))
        own = stack.enter_context(lease.held(job.folder))
        steering.forget(job.folder)
        log.guard = own.check
        records = replay(log.events())
        shown = progress.Progress(console, job.trials(records), job.objective, job.decisions)
        outboxes: list[Outbox] = []
        missing: dict[str, int] = {}
        try:
            outboxes += [Outbox(log, store, shown.say) for store in open_stores(job, mlflow)]
            where = f", recorded in {masked(outboxes[0].store.address)}" if outboxes else ""
            shown.say(f"study {job.name} in {job.folder}{where}")
            if job.manifest.past:
                shown.say(f"warm start: {len(job.manifest.past)} trials of earlier studies")
            for line in numerics.ignored():
                shown.say(f"warning: {line}")
            for plugin in plugins.LOADED.values():
                shown.say(f"plugin {plugin.name} ({plugin.file}), SHA-256 {plugin.sha256}")
            for words in {data.words(name, path) for name, path, _ in job.data} - {""}:
                shown.say(words)
            need = machines.require(job.folder, job.data, job.resources["gpu"])
            nodes = machines.Machines(job.resources, need, job.lanes, job.seeds)
            machines.survey(nodes)
            behind = {outbox.store.name: outbox.reconcile() for outbox in outboxes}
            for store in (outbox.store for outbox in outboxes):
                if isinstance(store, RemoteStore) and store.chart:
                    for line in in_browser("watch it:", store.address, store.chart):
                        shown.say(line)
            shown.before = progress.tally(records.values()).ended
            if job.resume:
                _say_resumed(shown, records, behind)
                shutil.rmtree(job.folder / FOLDER, ignore_errors=True)
            for outbox in outboxes:
                outbox.start()
            begun = True
            job.begin(log)
            with shown:
                _run_loop(job, log, records, nodes, trainable, callbacks, shown, own)
        except KeyboardInterrupt:  # Tune itself ends in good order, when it runs
            pass
        finally:
            ended = all(record.ended for record in records.values())
            mine = not own.taken_by()
            whole = mine and ended and len(records) == job.trials(records)
            with process.finishing():
                for outbox in outboxes:
                    outbox.stop()
                for outbox in outboxes if mine else ():
                    missing[outbox.store.name] = outbox.finish(records, whole)
        if whole and not any(missing.values()):  # MLflow has the models
            retention.remove(job.checkpoint_folder, retention.MODELS)
        for record in records.values():
            if not record.ended:
                record.state = KILLED
        recorded = outboxes[0].store if outboxes else None
        finished = Finished(
            job,
            [records[number] for number in sorted(records)],
            recorded.address if recorded else "",
            recorded.page if isinstance(recorded, RemoteStore) else "",
            recorded.study_run if isinstance(recorded, RemoteStore) else None,
            time.monotonic() - started,
            {name: count for name, count in missing.items() if count},
            whole,
        )
        with process.finishing():
            tell(finished)
    return finished


@contextmanager
def _removed_if_refused(folder: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Removes the folder of a study that was refused before it began: its name is free again."""
    try:
        yield
    except ConfigError:
        if not begun():
            shutil.rmtree(folder)
        raise


def obstacle(error: BaseException | None) -> str | None:
    """What is in the way, and what to do about it, if the study can then be resumed: a full disk,
    or a fault of a machine; else None."""
    while error is not None:
        if isinstance(error, StudyStopped | TakenOver):
            return str(error)
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            return f"{error.strerror} {error.filename or ''}".strip() + ": make room"
        error = error.__cause__ or error.__context__
    return None


def check_stores(job: Job, mlflow: MlflowProcess) -> None:
    """Raises ConfigError if a store cannot be used; makes none, as Ray may still be refused."""
    if job.tracking is None:
        return
    if job.storage is not None:
        optuna_store.refuse_taken(job.storage, job.name, job.resume)
    mlflow.call("check", job.tracking["uri"], job.tracking["experiment"], job.out_dir)


def open_stores(
    job: Job,
    mlflow: MlflowProcess,
    more: Mapping[str, bytes] | None = None,
    began: float | None = None,
) -> list[Store]:
    """The stores that are given copies; `more` are further artifacts of the study's run, which
    `began` in s since 1970 (None: now)."""
    if job.tracking is None:
        return []
    files = job.manifest.files()
    options = masked(yaml.safe_dump(dict(job.kept["options"])))
    stores: list[Store] = [
        RemoteStore(
            mlflow,
            mlflow.call("open", job.tracking["uri"], job.tracking["experiment"], job.out_dir),
            study=job.name,
            id=job.manifest.id,
            objective=job.objective,
            tags={**job.manifest.tags(job.command), **job.tags},
            files={"config.yaml": options, **files, **(more or {})},
            trial_files=files,
            models=partial(retention.model_file, job.checkpoint_folder),
            began=began,
        )
    ]
    if job.optuna:
        own = job.name, job.manifest.id, job.objective, job.storage, job.folder
        stores.append(optuna_store.OptunaStore(*own))
    return stores


def _say_resumed(
    shown: progress.Progress, records: Mapping[int, Record], behind: Mapping[str, int]
) -> None:
    left = [record for record in records.values() if not record.ended]
    start = ", ".join(f"trial {r.number} after epoch {r.epochs}" for r in left) or "no trial"
    shown.say(f"resumed with {shown.before} of {shown.trials} trials ended; unfinished: {start}")
    for name, count in behind.items():
        if count:
            shown.say(f"repaired: {name} lacked {count} records")


def _run_loop(
    job: Job,
    log: EventLog,
    records: dict[int, Record],
    nodes: machines.Machines,
    trainable: type[tune.Trainable],
    callbacks: Sequence[tune.Callback],
    shown: progress.Progress,
    own: lease.Lease,
) -> None:
    """Runs the study loop on Ray Tune, tidies checkpoints and shows progress."""
    folder, cap = job.checkpoint_folder, job.checkpoints["cap_gb"] * 1e9
    say_once = cache(shown.say)
    retention.remove(folder, retention.PARTS)
    kept = retention.tidy(folder, records.values(), job.keep_best)
    outlined = own.beats

    def outline() -> None:
        nonlocal outlined
        outlined = own.beats
        own.status = progress.outline(records, job.trials(records), job.objective, log.paused())

    def update() -> None:
        shown.update(records.values())
        if own.beats != outlined:  # not after every event: it looks at all trials
            outline()

    def observe(event: Event) -> None:
        nonlocal kept
        if isinstance(event, EpochDone):
            shown.epoch(event, records[event.trial])
        if isinstance(event, Ended):
            concerned = [records[number] for number in {*kept, event.trial}]
            kept = retention.tidy(folder, concerned, job.keep_best)
            shown.ended(records[event.trial])

    def on_over_cap() -> None:
        if not retention.make_room(folder, records.values(), job.keep_best, cap):
            say_once(
                f"checkpoints.cap_gb={job.checkpoints['cap_gb']:g} is reached by running trials:"
                " after a kill, some of them would start from their first epoch"
            )

    policy = Policy(
        folder=str(folder),
        every_seconds=job.checkpoints["every_seconds"],
        at_end=job.keep_best > 0,
        cap_bytes=cap,
        stretch_seconds=STRETCH_SECONDS if job.lanes == 1 else STRETCH_OF_LANES,
        need=nodes.need,
        lanes=job.lanes,
    )
    # One more trial than fit is ready for the next free worker, which Ray would otherwise end.
    most = job.cluster["max_concurrent"]
    at_once = lambda: most or backend.room() + 1
    backend = RayBackend(
        trainable,
        job.resources,
        policy,
        job.decisions,
        job.folder,
        nodes,
        update,
        on_over_cap,
        shown.say,
        None if most is None else math.ceil(most * job.seeds / job.lanes),
    )
    score = mean_score(*job.objective)
    steer = lambda order, records: steering.carry_out(
        job.folder, order, records, job.add, shown.say
    )
    loop = study_loop(
        log, records, job.source, job.stops, score, backend.start, at_once, observe, steer
    )
    outline()
    if log.paused():
        shown.say(
            f"paused: no trial begins until {studies_command('unpause', job.name, job.out_dir)}"
        )
    # Ray prints what its processes say of themselves, pages of it when a machine is lost.
    with (
        open(job.folder / RAY_LOG, "a", encoding="utf-8") as words,
        redirect_stdout(words),
        redirect_stderr(words),
    ):
        backend.run(loop, callbacks)
