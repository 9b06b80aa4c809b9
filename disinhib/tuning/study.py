"""A study, run: compose -> check -> begin, or go on -> run -> tell.

Everything that can be wrong with the input is found before a trial is started or anything is
written; such an error is one line (ConfigError).
"""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import yaml
from ray import tune
from rich.console import Console

from disinhib import hydra_config
from disinhib.commands import tool, tune_words
from disinhib.errors import ConfigError
from disinhib.tuning import (
    manifest as origins,
    plan,
    progress,
    provenance,
    ray_backend,
    retention,
    worker,
)
from disinhib.tuning.early_stopping import Stopping
from disinhib.tuning.event_log import KILLED, Journal, Record
from disinhib.tuning.loop import Conductor
from disinhib.tuning.options import Study, compose, configure
from disinhib.tuning.outbox import Delivery


@dataclass(frozen=True)
class Finished:
    """What a study leaves: its trials, and where they are to be seen."""

    study: Study
    records: list[Record]
    tracking_uri: str
    run_id: str | None  # None if MLflow never answered
    seconds: float
    undelivered: dict[str, int]  # events that a store did not take, if any
    whole: bool  # all trials have ended: nobody interrupted it


def main(arguments: list[str]) -> int:
    """Runs the study that the command line asks for.

    Returns the exit code: 0, 1 if no trial was completed or the study could not go on, 130 if it
    was interrupted.
    """
    if {"-h", "--help"} & {*arguments}:
        print((hydra_config.CONFIGURATIONS / "study.yaml").read_text(), end="")
        return 0
    return carry_out(compose(arguments))[0]


def carry_out(study: Study) -> tuple[int, Finished | None]:
    """Runs `study`, or plans it, and prints what comes of it: the exit code of `main`, and what
    the study left, if it ran and nothing kept it from going on."""
    console = Console()
    if study.plan:
        plan.run(study, console)
        return 0, None
    try:
        finished = run(study, console)
    except Exception as error:
        full = _full_disk(error)
        if full is None:
            raise
        print(f"error: {full}: make room, then go on: {_resume(study)}", file=sys.stderr)
        return 1, None
    summary(finished, console)
    if not finished.whole:
        return 130, finished
    return 0 if progress.best(finished.records, study.mode) else 1, finished


def run(
    study: Study,
    console: Console,
    trainable: type[tune.Trainable] = worker.TrainingTrial,
    callbacks: Sequence[tune.Callback] = (),
) -> Finished:
    """Runs every trial of `study`, or those that are left of it; shows it on `console`, and
    records it in its journal, in Optuna's store and in MLflow.

    `callbacks` hear what Ray says first.

    Raises ConfigError if cluster, folder or a store cannot be used, or if a study to go on with
    is not what it was: before any trial; execution.StudyStopped if it cannot go on.
    """
    # MLflow takes seconds to import: not for a wrong option.
    from disinhib.tuning import mlflow_store, optuna_store

    started = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with ExitStack() as stack:
        if study.resume:  # first of all: nobody else may be running it
            journal = stack.enter_context(closing(Journal(study.folder)))
            origin = origins.go_on(study)
        else:
            origin = origins.begin(study)
        stack.enter_context(ray_backend.cluster(study.cluster))
        storage = study.searcher["storage"]
        if storage is not None:
            optuna_store.refuse_taken(storage, study.name, study.resume)
        uri = mlflow_store.absolute(study.tracking["uri"], study.out_dir)
        artifacts = study.out_dir / "mlflow-artifacts"
        experiment = mlflow_store.open_store(uri, study.tracking["experiment"], artifacts)
        if not study.resume:
            origins.write(study, origin)
            journal = stack.enter_context(closing(Journal(study.folder)))
        resources = {
            "cpu": study.cluster["cpus_per_trial"],
            "gpu": study.cluster["gpus_per_trial"],
        }
        conductor = Conductor(
            journal,
            origins.searcher(study, origin),
            Stopping(study.scheduler, study.epochs, study.mode, study.batch),
            partial(configure, study),
            study.trials,
            # One more than fit waits ready for the next free worker, which Ray would else end.
            study.cluster["max_concurrent"] or ray_backend.trials_at_once(resources) + 1,
        )
        tracker = mlflow_store.Tracker(
            experiment,
            study.name,
            origin["id"],
            origins.tags(study, origin),
            {"config.yaml": provenance.masked(yaml.safe_dump(dict(study.options)))}
            | origins.files(origin),
            origins.files(origin),
        )
        shown = progress.Progress(console, study.trials, study.metric, study.mode)
        deliveries = [
            Delivery(journal, store, shown.say)
            for store in (
                tracker,
                optuna_store.OptunaStore(
                    study.name, origin["id"], study.mode, storage, study.folder
                ),
            )
        ]
        shown.say(f"study {study.name} in {study.folder}")
        if study.warm_start is not None:
            shown.say(f"learns from {len(origin['past'])} trials of {study.warm_start}")
        try:
            code = origin["provenance"]["code"]
            ray_backend.check_machines(study.folder / origins.ORIGIN, origin["id"], code["files"])
            behind = {delivery.store.name: delivery.reconcile() for delivery in deliveries}
        except ConfigError:
            if not study.resume:  # its name is free again
                shutil.rmtree(study.folder)
            raise
        if study.resume:
            for line in reconciled(conductor, behind):
                shown.say(line)
            shutil.rmtree(study.folder / ray_backend.FOLDER, ignore_errors=True)
        shown.before = progress.tally(conductor.records.values()).ended
        for delivery in deliveries:
            delivery.start()
        folder = retention.folder(study.folder, origin["id"])
        try:
            with shown:
                ray_backend.run(
                    conductor, trainable, resources, _policy(study, folder),
                    reporter(study, folder, conductor, shown), study.folder, callbacks,
                )  # fmt: skip
        finally:
            records = [conductor.records[number] for number in sorted(conductor.records)]
            whole = len(records) == study.trials and all(record.ended for record in records)
            for delivery in deliveries:
                delivery.stop()
            missing = {d.store.name: d.finish(conductor.records, whole) for d in deliveries}
        for record in records:
            if not record.ended:
                record.state = KILLED
    return Finished(
        study,
        records,
        uri,
        tracker.study_run,
        time.monotonic() - started,
        {name: count for name, count in missing.items() if count},
        whole,
    )


def reconciled(conductor: Conductor, behind: dict[str, int]) -> list[str]:
    """What a study that goes on finds, and what had to be mended, a line each."""
    ended = progress.tally(conductor.records.values()).ended
    left = [record for record in conductor.records.values() if not record.ended]
    start = ", ".join(f"trial {r.number} after epoch {r.epochs}" for r in left) or "no trial"
    lacked = [f"{name} lacked {count} records" for name, count in behind.items() if count]
    return [
        f"resumed with {ended} of {conductor.trials} trials ended; unfinished: {start}",
        *(f"mended: {what}" for what in (*conductor.mended, *lacked)),
    ]


def reporter(
    study: Study, folder: Path, conductor: Conductor, shown: progress.Progress
) -> ray_backend.Reporter:
    """What is done when Ray says something: checkpoints are tidied in `folder`, progress shown."""
    best, cap = study.checkpoints["keep_best"], study.checkpoints["cap_gb"] * 1e9
    everything = lambda: [conductor.records[n] for n in sorted(conductor.records)]
    retention.remove_parts(folder)
    retention.tidy(folder, everything(), study.mode, best)
    said: list[str] = []

    def on_end(record: Record) -> None:
        retention.tidy(folder, everything(), study.mode, best)
        shown.ended(record)

    def on_over_cap() -> None:
        fits = retention.make_room(folder, everything(), study.mode, best, cap)
        if not fits and not said:
            said.append("once")
            shown.say(
                f"checkpoints.cap_gb={study.checkpoints['cap_gb']:g} is reached by trials that run:"
                " after a kill, some of them would start again"
            )

    return ray_backend.Reporter(conductor, lambda: shown.update(everything()), on_end, on_over_cap)


def _policy(study: Study, folder: Path) -> worker.Checkpoints:
    return worker.Checkpoints(
        folder=str(folder),
        every_seconds=study.checkpoints["every_seconds"],
        at_end=study.checkpoints["keep_best"] > 0,
        cap_bytes=study.checkpoints["cap_gb"] * 1e9,
    )


def _full_disk(error: BaseException | None) -> str | None:
    """What the system said, if it is for want of space that the study could not go on."""
    while error is not None:
        if isinstance(error, ray_backend.StudyStopped):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return " ".join(map(str, filter(None, (error.strerror, error.filename))))
        error = error.__cause__ or error.__context__
    return None


def _resume(study: Study) -> str:
    out = [] if study.options["out_dir"] == "out" else [f"out_dir={study.options['out_dir']}"]
    return shlex.join(tune_words(f"study={study.name}", *out, "resume=true"))


def summary(finished: Finished, console: Console) -> None:
    """Prints the leaderboard and the commands that go on from here."""
    study, records = finished.study, finished.records
    say: Callable[[str], None] = partial(
        console.print, soft_wrap=True, highlight=False, markup=False
    )
    counts = progress.tally(records)._asdict().items()
    told = ", ".join(f"{n} {state}" for state, n in counts if n)
    clock = progress.clock(finished.seconds)
    say(f"\nstudy {study.name}: {len(records)} trials in {clock}: {told}")
    console.print(progress.leaderboard(records, study.metric, study.mode))
    for line in progress.failures(records):
        say(line)
    for name, count in finished.undelivered.items():
        say(f"{name} has not taken {count} records: resume the study when it answers")
    uri = shlex.quote(finished.tracking_uri)
    ui = uri if uri.startswith("http") else f"{tool('mlflow')} ui --backend-store-uri {uri}"
    address = "" if uri.startswith("http") else "   (then http://127.0.0.1:5000)"
    say(f"\nall trials:  {ui}{address}")
    if finished.undelivered or not finished.whole:
        say(f"go on:       {_resume(study)}")
    if top := progress.best(records, study.mode):
        say(f"best trial:  {tool('python')} {top.config['command'].removeprefix('python ')}")
