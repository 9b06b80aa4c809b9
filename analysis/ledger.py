"""What MLflow has of retraining: a run for each configuration and seed, under the study's run.

A run is finished as soon as it has its state; one that a kill left half-written is written again,
into the same run. The driver is the only writer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME

from analysis import store as stores
from analysis.cell import COMPLETE, Seed
from analysis.runs import CONFIGURATION, OF_RUN, OF_STUDY, OF_TRIAL, RETRAINED, called
from analysis.store import Store, StudyRun

MODEL = "model.msgpack"  # the artifact that `disinhib.load` reads
MOST_METRICS = 800  # in one request; MLflow takes 1000 items of all kinds


class Cell(NamedTuple):
    """A configuration that is trained over fresh seeds."""

    name: str
    options: dict[str, Any]  # of training, resolved
    command: str  # that trains it, but for the seed
    rule: str
    depth: int  # hidden layers
    averaged: str  # feedback weights: true or false, none without feedback
    configuration: str  # runs.configuration_id
    searched: dict[str, str]  # params to show
    trial: int | None = None  # that was selected, if one was
    of_run: str | None = None  # the trial's

    @property
    def called(self) -> str:
        dataset = self.options["dataset"]["name"]
        return called(self.rule, self.averaged == "true", self.depth, dataset, self.trial)

    @property
    def key(self) -> str:
        """By which its runs are found again."""
        return self.of_run or self.configuration


class Written(NamedTuple):
    """The runs that are there, by the cell's key and seed."""

    finished: dict[tuple[str, int], str]
    begun: dict[tuple[str, int], str]
    codes: dict[tuple[str, int], str]  # hash of the code that trained a finished one


def read(store: Store, study: StudyRun) -> Written:
    """What is there; of two runs for one seed (a request that was made twice) one is deleted."""
    found = Written({}, {}, {})
    for run in stores.children(store, study):
        tags = run.data.tags
        if OF_STUDY not in tags:
            continue
        key = (tags.get(OF_RUN) or tags[CONFIGURATION], int(tags["seed"]))
        if key in found.finished or (key in found.begun and RETRAINED not in tags):
            store.client.delete_run(run.info.run_id)
            continue
        if RETRAINED in tags:
            if key in found.begun:
                store.client.delete_run(found.begun.pop(key))
            found.finished[key] = run.info.run_id
            found.codes[key] = tags.get("code_sha256", "")
        else:
            found.begun[key] = run.info.run_id
    return found


def write(
    store: Store,
    study: StudyRun,
    cell: Cell,
    seed: Seed,
    about: Mapping[str, str],
    files: Mapping[str, str],
    run_id: str | None,
) -> str:
    """Writes what became of a seed, into `run_id` if that was begun; returns its run's id.

    `about` are tags, `files` (name -> text) artifacts that all seeds have. Last comes the state.
    """
    client = store.client
    command = f"{cell.command} seed={seed.seed} test_at_end=true"
    if run_id is None:
        identity = {
            MLFLOW_SOURCE_NAME: "analysis.retrain",
            MLFLOW_PARENT_RUN_ID: study.run.info.run_id,
            "study": study.name,
            OF_STUDY: study.id,
            **({} if cell.trial is None else {OF_TRIAL: str(cell.trial)}),
            **({} if cell.of_run is None else {OF_RUN: cell.of_run}),
            CONFIGURATION: cell.configuration,
            "rule": cell.rule,
            "dataset": cell.options["dataset"]["name"],
            "depth": str(cell.depth),
            "averaged": cell.averaged,
            "seed": str(seed.seed),
            "budget": str(cell.options["epochs"]),
            "command": command,
        }
        began = int(1000 * seed.epochs[0][0]) if seed.epochs else None
        name = f"{study.name}-{cell.name}-seed{seed.seed}"
        experiment = study.run.info.experiment_id
        run_id = client.create_run(experiment, began, identity, name).info.run_id
    metrics = [
        Metric(name, value, int(1000 * when), epoch)
        for epoch, (when, values) in enumerate(seed.epochs, start=1)
        for name, value in values.items()
    ]
    for first in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run_id, metrics=metrics[first : first + MOST_METRICS])
    with tempfile.TemporaryDirectory() as folder:
        texts = {
            **files,
            "config.yaml": yaml.safe_dump({**cell.options, "seed": seed.seed, "test_at_end": True}),
            "command.txt": command + "\n",
        }
        for file, text in texts.items():
            Path(folder, file).write_text(text)
        if seed.model is not None:
            Path(folder, MODEL).write_bytes(seed.model)
        client.log_artifacts(run_id, folder)
    tags = {
        **about,
        "epochs": str(len(seed.epochs)),
        "flag": seed.flag,
        **({} if seed.reason is None else {"reason": seed.reason}),
        RETRAINED: seed.state,
    }
    client.log_batch(
        run_id,
        params=[Param(name, value) for name, value in cell.searched.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    client.set_terminated(run_id, "FINISHED" if seed.state == COMPLETE else "FAILED")
    return run_id
