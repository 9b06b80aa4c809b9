"""Trains configurations over fresh seeds, to their whole budget, and opens the test set once.

    python -m analysis.retrain selected.yaml [seeds=10]            what was selected of a study
    python -m analysis.retrain experiment=table1 [AXIS=NAME,...]   the grid of an experiment

`seeds` is how many, of those that no search has seen, or a list. Options: conf/retrain.yaml. All
seeds of a configuration are lanes of one program, configurations are Ray tasks (`cluster.*`), and
every seed is a run in MLflow (`tracking.*`), beside its study. The same command again goes on where
it was: a seed that is done stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ray
import yaml
from filelock import FileLock, Timeout
from flax import serialization
from ray.exceptions import RayError

from analysis import cell as cells, configurations, ledger, store as stores
from analysis.ledger import Cell
from analysis.store import Refused, Store, StudyRun
from disinhib import cli, config, hydra_config, training
from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning import manifest, mlflow_store, provenance, ray_backend

USAGE = "python -m analysis.retrain selected.yaml|experiment=NAME [option=value ...]"
FOLDER = "retraining"  # in out_dir
KEPT = {"config.yaml", "provenance.json"}  # of a grid, beside its run
PROGRESS_SECONDS = 15.0  # between two lines


class Task(NamedTuple):
    """A configuration, and the seeds of it that are trained now."""

    cell: Cell
    lanes: list[int]
    missing: list[int]  # those of them that MLflow lacks
    file: Path  # its checkpoint
    provenance: dict[str, Any]


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 1 if a configuration could not be trained."""
    files, given = cli.split(arguments, __doc__ or "")
    names = {text.partition("=")[0] for text in given}
    if len(files) > 1 or (not files) == ("experiment" not in names):
        raise Refused(f"given {' '.join(arguments) or 'nothing'}, needed is {USAGE}")
    jax.config.update("jax_platforms", "cpu")  # the driver trains nothing, and holds no GPU
    if files:
        settings = configurations.checked_settings(given)
        store, study, planned = configurations.of_selection(Path(files[0]), settings, names)
        _check_data(planned)
    else:
        axes, given = configurations.chosen_axes(given)
        settings = configurations.checked_settings(given)
        planned = configurations.of_grid(settings, given, axes)
        _check_data(planned)
        command = shlex.join(["python", "-m", "analysis.retrain", *arguments])
        store, study = _recorded(settings, command, planned[0])
    seeds = configurations.fresh_seeds(settings["seeds"], configurations.used_seeds(store, study))
    folder = Path(settings["out_dir"]).absolute() / FOLDER / study.id[:8]
    hydra_config.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, study):
        code = _retrain(store, study, planned, seeds, folder, settings)
    if not files:  # that of a search has its own end
        store.client.set_terminated(study.run.info.run_id, "FAILED" if code else "FINISHED")
    return code


def _check_data(planned: Sequence[Cell]) -> None:
    """Raises data.DataError, or ConfigError, before anything is written."""
    for one in planned:
        training.prepare(config.parse(one.options))


def _recorded(settings: Mapping[str, Any], command: str, first: Cell) -> tuple[Store, StudyRun]:
    """The run under which the grid's seeds are, made if it is not there yet."""
    out_dir = Path(settings["out_dir"]).absolute()
    name = settings["study"]
    if not name:
        raise refusal("study", name, "the name under which the grid is recorded")
    hydra_config.check_folder(out_dir)
    uri = mlflow_store.absolute(settings["tracking"]["uri"], out_dir)
    place = settings["tracking"]["experiment"]
    experiment = mlflow_store.open_store(uri, place, out_dir / "mlflow-artifacts")
    store = stores.connect(uri)
    found = [
        run
        for run in store.client.search_runs([experiment.id], f"run_name = '{name}'")
        if run.info.run_name == name
    ]
    if found:
        run_id = found[0].info.run_id
    else:
        tags = {"study": name, "study_id": uuid.uuid4().hex, "command": provenance.masked(command)}
        run_id = store.client.create_run(experiment.id, None, tags, name).info.run_id
    # A kill may have come between its run and what belongs to it.
    if KEPT - {file.path for file in store.client.list_artifacts(run_id)}:
        about = {"metric": "valid_accuracy", "mode": "max"}
        kept = yaml.safe_dump({**settings, **about})
        store.client.log_text(run_id, provenance.masked(kept), "config.yaml")
        threads = settings["cluster"]["cpus_per_trial"]
        collected = provenance.collect(config.parse(first.options), threads)
        store.client.log_text(run_id, json.dumps(collected, indent=1), "provenance.json")
    study = stores.find_study(store, run_id)
    if study.space is not None:
        raise refusal("study", name, f"another name: in {uri} that is a search")
    return store, study


@contextmanager
def _alone(folder: Path, study: StudyRun) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise Refused(f"study {study.name}: is being retrained by another process") from error


def _retrain(
    store: Store,
    study: StudyRun,
    planned: Sequence[Cell],
    seeds: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
) -> int:
    written = ledger.read(store, study)
    code = provenance.code(provenance.ROOT)
    hashed = _code_hash(code)
    tasks = []
    for one in planned:
        done = [seed for seed in seeds if (one.key, seed) in written.finished]
        missing = [seed for seed in seeds if seed not in done]
        if any(written.codes[one.key, seed] != hashed for seed in done):
            print(f"warning: {one.called}: seeds that are done were trained by other code")
        file = cells.checkpoint_file(folder, one.key, hashed)
        kept = _lanes(file)
        lanes = kept if {*missing} <= {*kept} else missing
        if lanes is missing or not missing:
            cells.forget(folder, one.key)
        if missing:
            run = config.parse(one.options)
            made = provenance.collect(run, settings["cluster"]["cpus_per_trial"])
            tasks.append(Task(one, lanes, missing, file, made))
    total = len(planned) * len(seeds)
    left = sum(len(task.missing) for task in tasks)
    print(
        f"study {study.name}: {len(planned)} configurations of {len(seeds)} seeds"
        f" ({_listed(seeds)}); {total - left} of {total} are done",
        flush=True,
    )
    if not tasks:
        return 0
    here = folder / manifest.ORIGIN
    here.write_text(json.dumps({"id": study.id}))
    with ray_backend.cluster(settings["cluster"]):
        ray_backend.check_machines(here, study.id, code["files"])
        failed = _run(store, study, tasks, written, settings)
    if failed:
        print(f"{len(failed)} of {len(tasks)} configurations are not done: give the command again")
    return 1 if failed else 0


def _run(
    store: Store,
    study: StudyRun,
    tasks: Sequence[Task],
    written: ledger.Written,
    settings: Mapping[str, Any],
) -> list[Task]:
    """Trains all tasks and writes what comes of them; returns those that could not be trained."""
    share = settings["cluster"]
    train = ray.remote(
        num_cpus=share["cpus_per_trial"],
        num_gpus=share["gpus_per_trial"],
        max_calls=1,  # a process each: XLA keeps its first device, and its memory
        max_retries=ray_backend.WORKERS_LOST,  # of those that died; it goes on from its checkpoint
    )(cells.train)
    every = settings["checkpoints"]["every_seconds"]
    pending = {
        train.remote(task.cell.options, task.lanes, str(task.file), every): task for task in tasks
    }
    failed: list[Task] = []
    began = shown = time.monotonic()
    while pending:
        ready, _ = ray.wait(list(pending), timeout=1)
        for reference in ready:
            task = pending.pop(reference)
            try:
                outcome = ray.get(reference)
            except RayError as error:  # its training raised, or its workers died
                print(
                    f"{task.cell.called}: failed: {ray_backend.reason(error)}",
                    flush=True,
                )
                failed.append(task)
                continue
            try:
                _write(store, study, task, outcome, written)
            except Exception as error:  # drivers, sockets and MLflow itself: each has its own kind
                print(
                    f"{task.cell.called}: MLflow did not take it: {one_line(error)}",
                    flush=True,
                )
                failed.append(task)  # its checkpoint stays
                continue
            cells.forget(task.file.parent, task.cell.key)
            seconds = time.monotonic() - began
            print(f"{task.cell.called}: {_told(outcome)}; {seconds:.0f} s", flush=True)
        if time.monotonic() - shown > PROGRESS_SECONDS and pending:
            shown = time.monotonic()
            print(f"{shown - began:.0f} s: {_progress(list(pending.values()))}", flush=True)
    return failed


def _write(
    store: Store, study: StudyRun, task: Task, outcome: cells.Outcome, written: ledger.Written
) -> None:
    made = task.provenance
    about = {
        **outcome.place,
        "code_sha256": _code_hash(made["code"]),
        "code_version": made["code"]["version"] or "unknown",
        "data_sha256": made["data"]["sha256"],
    }
    files = {"provenance.json": json.dumps(made, indent=1)}
    for seed in outcome.seeds:
        if seed.seed in task.missing:
            begun = written.begun.get((task.cell.key, seed.seed))
            ledger.write(store, study, task.cell, seed, about, files, begun)


def _code_hash(code: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(code["files"], sort_keys=True).encode()).hexdigest()[:16]


def _lanes(file: Path) -> list[int]:
    """The seeds of a checkpoint; none if there is no such file."""
    if not file.exists():
        return []
    content: Any = serialization.msgpack_restore(file.read_bytes())
    return content["state"]["seed"].tolist()


def _told(outcome: cells.Outcome) -> str:
    done = [seed for seed in outcome.seeds if seed.state == cells.COMPLETE]
    scores = [seed.epochs[-1][1]["test_accuracy"] for seed in done]
    parts = [f"{len(done)} of {len(outcome.seeds)} seeds complete"]
    if scores:
        parts.append(f"test accuracy {sum(scores) / len(scores):.2f} %")
    parts += [f"seed {seed.seed} {seed.reason}" for seed in outcome.seeds if seed.reason]
    parts += [f"seed {seed.seed} flagged: {seed.flag}" for seed in outcome.seeds if seed.flag]
    return ", ".join(parts)


def _progress(tasks: Sequence[Task]) -> str:
    told = []
    for task in tasks:
        done, budget = cells.epochs_done(task.file), task.cell.options["epochs"]
        if done:
            checking = ", checking its dynamics" if done == budget else ""
            told.append(f"{task.cell.called} {done}/{budget}{checking}")
    return f"{'; '.join(told) or 'starting'} ({len(tasks)} configurations to go)"


def _listed(seeds: Sequence[int]) -> str:
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if whole and len(seeds) > 1 else ", ".join(map(str, seeds))


if __name__ == "__main__":
    cli.run(main)
