"""A study in MLflow, written by the driver alone.

A study is a parent run, each trial a child run of it (tag `mlflow.parentRunId`). The child has
what was searched as params, every epoch's metrics with the epoch as step, and, as tags and
artifacts, the command, the options and the provenance that run the same training again.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Before MLflow is imported: it reads these once.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A server that does not answer is asked again by `delivery`, which loses nothing meanwhile.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME

from disinhib.checks import refusal
from disinhib.errors import ConfigError, one_line
from disinhib.tuning.event_log import ASKED, COMPLETE, EPOCH, FAILED, KILLED, PRUNED, Event, Record

FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
RUN_STATUS = {COMPLETE: "FINISHED", PRUNED: "FINISHED", FAILED: "FAILED"}
KILLED_RUN = "KILLED"
MOST_METRICS = 800  # in one request; MLflow takes 1000 items of all kinds


class Experiment(NamedTuple):
    """An MLflow experiment: the address of its store, and its id there."""

    uri: str
    id: str


@cache
def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def absolute(uri: str | None, folder: Path) -> str:
    """The tracking URI: SQLite in `folder` by default; a relative SQLite path is the driver's."""
    if uri is None:
        return f"sqlite:///{folder / 'mlflow.db'}"
    scheme, _, path = uri.partition(":///")
    return f"sqlite:///{Path(path).absolute()}" if scheme == "sqlite" else uri


def open_store(uri: str, experiment: str, artifacts: Path) -> Experiment:
    """Connects, and creates tables and experiment where they are missing.

    Once, here, in one process: several that open a fresh SQLite store race in its migration.
    `artifacts` is where files go if the store is a local one; a server has its own place.

    Raises ConfigError if there is no such store or it does not answer.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:///"):
            _make_sqlite(Path(uri.removeprefix("sqlite:///")))
        with _environment(FIRST_CONTACT):
            client = _client(uri)
            found = client.get_experiment_by_name(experiment)
            location = None if "http" in uri.split("://")[0] else artifacts.as_uri()
            if found is None:
                experiment_id = client.create_experiment(experiment, artifact_location=location)
            else:
                experiment_id = found.experiment_id
            if found is not None and found.lifecycle_stage == "deleted":
                allowed = "one that is not deleted (mlflow gc, or mlflow experiments restore)"
                raise refusal("tracking.experiment", experiment, allowed)
    except ConfigError:
        raise
    except Exception as error:  # drivers, sockets and MLflow itself: each raises its own kind
        allowed = f"the address of an MLflow store that answers ({one_line(error)})"
        raise refusal("tracking.uri", uri, allowed) from error
    return Experiment(uri, experiment_id)


def _make_sqlite(file: Path) -> None:
    """Makes the store if there is none, whole or not at all: MLflow takes seconds to make its
    tables, and never opens again what a kill left of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as part:
            made = Path(part, file.name)
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments()
            with suppress(FileExistsError):  # another study has made it meanwhile
                os.link(made, file)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def params(searched: Mapping[str, Any]) -> list[Param]:
    """What was searched, flat and dotted: group `model/vf` is param `model.vf`, and a group with
    a package (`model/vf/activation@model.vf.actI`) goes by the package."""
    return [
        Param(key.rpartition("@")[2].replace("/", "."), str(value))
        for key, value in searched.items()
    ]


def epoch_metrics(event: Event) -> list[Metric]:
    """An epoch's metrics, with the time at which they were heard: told again, they are the same."""
    return [
        Metric(name, value, _milliseconds(event.time), event.epoch)
        for name, value in event.body["metrics"].items()
    ]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


class Tracker:
    """Writes a study into MLflow: a parent run, and under it a run for each trial.

    `tags` and `files` (name -> text) belong to the study's run, `trial_files` to every trial's.
    `id` is the study's own; by it and a trial's number its runs are found again.
    """

    name, option = "mlflow", "tracking.uri"

    def __init__(
        self,
        experiment: Experiment,
        study: str,
        id: str,
        tags: Mapping[str, str],
        files: Mapping[str, str],
        trial_files: Mapping[str, str],
    ):
        self.experiment, self.study, self.id = experiment, study, id
        self.tags, self.files, self.trial_files = tags, files, trial_files
        self.address = experiment.uri
        self.study_run: str | None = None  # as soon as the store is loaded

    @property
    def client(self) -> MlflowClient:
        return _client(self.experiment.uri)

    def load(self) -> set[int]:
        runs = _all_runs(self.experiment, f"tags.study_id = '{self.id}'")
        found: dict[str | None, Run] = {}
        for run in sorted(runs, key=lambda run: run.info.start_time):
            if found.setdefault(run.data.tags.get("trial"), run) is not run:
                # A request that nobody answered in time was carried out none the less.
                self.client.delete_run(run.info.run_id)
        parents = [run for trial, run in found.items() if trial is None]
        trials = {int(trial): run for trial, run in found.items() if trial is not None}
        tags = {**self.tags, "study": self.study, "study_id": self.id}
        self.study_run = parents[0].info.run_id if parents else self._create(self.study, tags)
        self._put(self.study_run, self.files)
        for run in (*parents, *trials.values()):
            if run.info.status in (KILLED_RUN, "RUNNING"):  # it goes on, if it was interrupted
                for tag in ending(KILLED, 0, "").keys() & run.data.tags.keys():
                    self.client.delete_tag(run.info.run_id, tag)
                self.client.update_run(run.info.run_id, "RUNNING")
        self.runs = {number: run.info.run_id for number, run in trials.items()}
        return set(self.runs)

    def deliver(self, events: Sequence[Event]) -> None:
        for number in dict.fromkeys(event.trial for event in events):
            self._deliver(number, [event for event in events if event.trial == number])

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        interrupted = [record for record in records.values() if not record.ended]
        for record in interrupted:
            run, why = self.runs[record.number], "the study was interrupted"
            tags = ending(KILLED, record.epochs, why)
            self.client.log_batch(run, tags=[RunTag(*tag) for tag in tags.items()])
            self.client.set_terminated(run, KILLED_RUN)
        assert self.study_run is not None  # nothing was delivered before it was there
        self.client.set_terminated(self.study_run, "FINISHED" if whole else KILLED_RUN)

    def _deliver(self, number: int, events: Sequence[Event]) -> None:
        """A trial's news, in as few requests as there can be."""
        metrics: list[Metric] = []
        searched: list[Param] = []
        tags: dict[str, str] = {}
        end = None
        for event in events:
            if event.kind == ASKED:
                config = event.body["config"]
                searched = params(config["searched"])
                self._begin(config, event.time)
            elif event.kind == EPOCH:
                metrics += epoch_metrics(event)
                tags |= event.body["place"]
            else:
                end = event
                body = event.body
                tags |= ending(body["state"], body["epochs"], body["reason"])
        run = self.runs[number]
        for first in range(0, max(1, len(metrics)), MOST_METRICS):
            self.client.log_batch(
                run,
                metrics=metrics[first : first + MOST_METRICS],
                params=[] if first else searched,
                tags=[] if first else [RunTag(*tag) for tag in tags.items()],
            )
        if end is not None:
            status = RUN_STATUS[end.body["state"]]
            self.client.set_terminated(run, status, _milliseconds(end.time))

    def _begin(self, config: Mapping[str, Any], began: float) -> None:
        """Makes the trial's run, if a delivery that failed has not made it."""
        number = config["number"]
        if number not in self.runs:
            tags = {
                **self.tags,
                MLFLOW_PARENT_RUN_ID: self.study_run,
                "study": self.study,
                "study_id": self.id,
                "trial": str(number),
                "rule": config["rule"],
                "seeds": ",".join(map(str, config["seeds"])),
                "command": config["command"],
            }
            name = f"{self.study}-{number:04d}"
            self.runs[number] = self._create(name, tags, _milliseconds(began))
        options = yaml.safe_dump(config["options"])
        command = config["command"] + "\n"
        files = {**self.trial_files, "config.yaml": options, "command.txt": command}
        self._put(self.runs[number], files)

    def _create(self, name: str, tags: Mapping[str, str], began: int | None = None) -> str:
        tags = {MLFLOW_SOURCE_NAME: "tune_main.py", **tags}
        run = self.client.create_run(self.experiment.id, began, tags, name)
        return run.info.run_id

    def _put(self, run: str, files: Mapping[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file, text in files.items():
                Path(folder, file).write_text(text)
            self.client.log_artifacts(run, folder)


def ending(state: str, epochs: int, reason: str | None) -> dict[str, str]:
    """Tags that say how a trial ended."""
    why = {} if reason is None else {"reason": reason}
    return {"trial_state": state, "epochs": str(epochs), **why}


def _all_runs(experiment: Experiment, criterion: str) -> list[Run]:
    found, token = [], None
    while True:
        page = _client(experiment.uri).search_runs([experiment.id], criterion, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
