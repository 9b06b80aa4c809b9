"""What is remembered of a study: MLflow runs, written by the driver alone.

A study is a parent run, each trial a child run of it (tag `mlflow.parentRunId`). The child has
what was searched as params, every epoch's metrics with the epoch as step, and, as tags and
artifacts, the command and the options that run the same training again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Before MLflow is imported: it reads these once.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME
from ray import tune
from ray.air.constants import TRAINING_ITERATION

from disinhib.config import ConfigError, refusal
from disinhib.tuning.trial import (
    COMPLETE,
    FAILED,
    KILLED,
    METRICS,
    PRUNED,
    Row,
    TrialConfig,
    reason,
    row,
)

# A server is asked once and waited for 5 s before a study starts; afterwards
# MLflow's own patience (7 retries, 120 s) holds.
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
FLUSH_SECONDS = 2.0
RUN_STATUS = {COMPLETE: "FINISHED", PRUNED: "FINISHED", FAILED: "FAILED", KILLED: "KILLED"}


class Store(NamedTuple):
    """An MLflow store and the experiment in it. (Plain values: Ray pickles its callbacks.)"""

    uri: str
    experiment_id: str

    @property
    def client(self) -> MlflowClient:
        return _client(self.uri)


@cache
def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def absolute(uri: str | None, folder: Path) -> str:
    """The tracking URI: SQLite in `folder` by default; a relative SQLite path is the driver's."""
    if uri is None:
        return f"sqlite:///{folder / 'mlflow.db'}"
    scheme, _, path = uri.partition(":///")
    return f"sqlite:///{Path(path).absolute()}" if scheme == "sqlite" else uri


def open_store(uri: str, experiment: str, artifacts: Path) -> Store:
    """Connects, and creates tables and experiment where they are missing.

    Once, here, in one process: several that open a fresh SQLite store race in its migration.
    `artifacts` is where files go if the store is a local one; a server has its own place.

    Raises ConfigError if there is no such store or it does not answer.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
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
        allowed = f"the address of an MLflow store that answers ({_one_line(error)})"
        raise refusal("tracking.uri", uri, allowed) from error
    return Store(uri, experiment_id)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _one_line(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}"


def params(searched: Mapping[str, Any]) -> list[Param]:
    """What was searched, flat and dotted: group `model/vf` is param `model.vf`, and a group with
    a package (`model/vf/activation@model.vf.actI`) goes by the package."""
    return [
        Param(key.rpartition("@")[2].replace("/", "."), str(value))
        for key, value in searched.items()
    ]


def epoch_metrics(values: Mapping[str, float], epoch: int, milliseconds: int) -> list[Metric]:
    return [Metric(name, value, milliseconds, epoch) for name, value in values.items()]


def ending(ended: Row, why: str | None = None) -> dict[str, str]:
    """Tags that say how a trial ended."""
    return {
        "trial_state": ended.state,
        "epochs": str(ended.epochs),
        **({"reason": why} if why else {}),
    }


class Tracker(tune.Callback):
    """Writes a study into `store` as Ray goes through it; `study_run` is its parent run.

    A write takes some 20 ms. So trials' beginnings and ends wait for the end of Ray's step, when
    free workers have their next task, and epochs up to FLUSH_SECONDS, to be sent together.
    """

    def __init__(self, store: Store, study: str, options: Mapping[str, Any], command: str):
        self.store, self.study = store, study
        self.runs: dict[int, str] = {}  # number of a trial -> its run
        self.ended: set[int] = set()
        self.begun: list[TrialConfig] = []  # not yet written, as are the two below
        self.epochs: dict[int, list[Metric]] = {}
        self.ends: list[tuple[TrialConfig, Row, str | None]] = []
        self.flushed = time.monotonic()
        tags = {"study": study, "command": command}
        self.study_run = self._create(study, tags, {"config.yaml": yaml.safe_dump(options)})

    def on_trial_start(self, *, trial, **_) -> None:
        self.begun.append(trial.config)

    def on_trial_result(self, *, trial, result, **_) -> None:
        now = int(time.time() * 1000)
        metrics = epoch_metrics(result[METRICS], result[TRAINING_ITERATION], now)
        self.epochs.setdefault(trial.config["number"], []).extend(metrics)

    def on_trial_complete(self, *, trial, **_) -> None:
        self.ends.append((trial.config, row(trial, stopped=True), None))

    def on_trial_error(self, *, trial, **_) -> None:
        self.ends.append((trial.config, row(trial), reason(trial)))

    def on_step_end(self, **_) -> None:
        self._write(epochs=time.monotonic() - self.flushed > FLUSH_SECONDS)

    def on_experiment_end(self, *, trials, **_) -> None:
        """Ends the study's run, and what an interruption left running."""
        self._write(epochs=False)
        for trial in trials:
            number = trial.config["number"]
            if number in self.runs and number not in self.ended:
                left = row(trial)._replace(state=KILLED)
                self.ends.append((trial.config, left, "the study was interrupted"))
        status = "KILLED" if self.ends else "FINISHED"
        self._write(epochs=True)
        self.store.client.set_terminated(self.study_run, status)

    def _write(self, epochs: bool) -> None:
        """Sends what has waited; `epochs` of trials that go on, too."""
        while self.begun:
            self._run_of(self.begun.pop(0))
        while self.ends:
            config, ended, why = self.ends.pop(0)
            run = self._run_of(config)
            tags = [RunTag(key, value) for key, value in ending(ended, why).items()]
            metrics = self.epochs.pop(ended.number, [])
            self.store.client.log_batch(run, metrics=metrics, tags=tags)
            self.store.client.set_terminated(run, RUN_STATUS[ended.state])
            self.ended.add(ended.number)
        if epochs:
            while self.epochs:
                number, metrics = self.epochs.popitem()
                self.store.client.log_batch(self.runs[number], metrics=metrics)
            self.flushed = time.monotonic()

    def _run_of(self, config: TrialConfig) -> str:
        """The trial's run; made when it is first heard of (one may fail before it starts)."""
        number = config["number"]
        if number not in self.runs:
            tags = {
                MLFLOW_PARENT_RUN_ID: self.study_run,
                "study": self.study,
                "trial": str(number),
                "rule": config["rule"],
                "command": config["command"],
            }
            texts = {
                "config.yaml": yaml.safe_dump(config["options"]),
                "command.txt": config["command"] + "\n",
            }
            self.runs[number] = self._create(f"{self.study}-{number:04d}", tags, texts)
            self.store.client.log_batch(self.runs[number], params=params(config["searched"]))
        return self.runs[number]

    def _create(self, name: str, tags: Mapping[str, str], texts: Mapping[str, str]) -> str:
        client = self.store.client
        run = client.create_run(
            self.store.experiment_id,
            run_name=name,
            tags={MLFLOW_SOURCE_NAME: "tune_main.py", **tags},
        )
        for file, text in texts.items():
            client.log_text(run.info.run_id, text, file)
        return run.info.run_id
