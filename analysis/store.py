"""MLflow, read and written by analysis: any store, on any machine.

A study is found by its name (or its run's id) wherever in the store it is. Whatever is wrong with
the store is one line (Refused). jax is not imported.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from disinhib.tuning import mlflow_settings  # noqa: F401  # isort: skip (before MLflow)

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Run, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from disinhib.checks import OPTIONAL_TEXT, Option
from disinhib.errors import InputError, nearest, one_line
from disinhib.tuning.mlflow_store import OF_STUDY

DEFAULT = Path("out/mlflow.db")
# Options of every command that reads a study.
TRACKING = Option(
    "tracking.uri",
    None,
    OPTIONAL_TEXT,
    f"address of the MLflow store; null: $MLFLOW_TRACKING_URI, else {DEFAULT}",
)
STUDY = Option("study", None, OPTIONAL_TEXT, "the study's name or run id; null: the newest study")
PAGE = 1000  # runs a request


class Refused(InputError):
    """What cannot be analysed, in one line."""


class Store(NamedTuple):
    uri: str
    client: MlflowClient


class StudyRun(NamedTuple):
    """A study's own run, and what it keeps."""

    name: str
    id: str  # the study's own, in the tag `study_id`
    run: Run
    options: dict[str, Any]  # of the study, resolved
    space: (
        dict[str, Any] | None
    )  # disinhib.tuning.space_tree.definition; None if nothing is searched
    provenance: dict[str, Any]


def address(uri: str | None) -> str:
    """The store's: `uri`, else the environment's, else that of the default output folder."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and not DEFAULT.exists():
        raise Refused(
            f"tracking.uri: missing, needed is the address of an MLflow store, as neither"
            f" $MLFLOW_TRACKING_URI nor {DEFAULT} is there"
        )
    return uri or f"sqlite:///{DEFAULT}"


def connect(uri: str) -> Store:
    """Raises Refused unless there is a store that answers; makes none."""
    try:
        if uri.startswith("sqlite:///"):
            _check_sqlite(Path(uri.removeprefix("sqlite:///")))
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # drivers, sockets and MLflow itself: each raises its own kind
        raise unreadable(uri, error) from error
    return Store(uri, client)


def unreadable(uri: str, error: Exception) -> Refused:
    return Refused(f"tracking.uri: cannot read {uri} ({one_line(error)})")


def _check_sqlite(file: Path) -> None:
    """Raises sqlite3.Error unless `file` is a store: MLflow would make it one.

    Not opened read-only: what a kill has left of a transaction could then not be rolled back.
    """
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as connection:
        connection.execute("SELECT 1 FROM runs LIMIT 1")


def text(store: Store, run_id: str, artifact: str) -> str:
    """The text of an artifact; raises what MLflow and its stores of artifacts raise."""
    with tempfile.TemporaryDirectory() as folder:
        file = store.client.download_artifacts(run_id, artifact, folder)
        return Path(file).read_text("utf-8")


def run(store: Store, run_id: str) -> Run:
    """Raises Refused if there is none."""
    try:
        return store.client.get_run(run_id)
    except Exception as error:  # as in `connect`
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise Refused(f"{run_id}: no such run in {store.uri}") from error
        raise unreadable(store.uri, error) from error


def find_study(store: Store, name: str | None = None) -> StudyRun:
    """The study of that name, or whose run has that id; the newest one if none is named.

    Raises Refused if there is none, or several, or if it has not kept what it should.
    """
    experiments = [e.experiment_id for e in store.client.search_experiments()]
    if name is None:
        every = _search(store, experiments, "", newest_first=True)
        newest = next(filter(_is_study, every), None)
        if newest is None:
            raise Refused(f"study: there is none in {store.uri}")
        return _study_of(store, newest)
    quoted = name.replace("'", "")
    matches = list(filter(_is_study, _search(store, experiments, f"run_name = '{quoted}'")))
    matches = [match for match in matches if match.info.run_name == name]
    if not matches:
        matches = list(filter(_is_study, _search(store, experiments, f"run_id = '{quoted}'")))
    if not matches:
        names = {r.info.run_name or "" for r in _search(store, experiments, "") if _is_study(r)}
        there = f"one of {', '.join(sorted(names))}" if names else "none: there is no study"
        raise Refused(
            f"study: given {name}, allowed is {there} (in {store.uri}){nearest(name, names)}"
        )
    if len(matches) > 1:
        ids = ", ".join(match.info.run_id for match in matches)
        raise Refused(f"study: given {name}, which {len(matches)} are called; name its run: {ids}")
    return _study_of(store, matches[0])


def _is_study(run: Run) -> bool:
    """Whether it is a study's own run, and no retraining of another study."""
    tags = run.data.tags
    return "study_id" in tags and MLFLOW_PARENT_RUN_ID not in tags and OF_STUDY not in tags


def _study_of(store: Store, run: Run) -> StudyRun:
    try:
        options = yaml.safe_load(text(store, run.info.run_id, "config.yaml"))
        provenance = json.loads(text(store, run.info.run_id, "provenance.json"))
        files = {file.path for file in store.client.list_artifacts(run.info.run_id)}
        space = None
        if "space.json" in files:
            space = json.loads(text(store, run.info.run_id, "space.json"))
    except Exception as error:  # as in `connect`, and what stores of artifacts raise
        raise Refused(
            f"study {run.info.run_name}: cannot read what it has kept ({one_line(error)})"
        ) from error
    tags = run.data.tags
    return StudyRun(tags["study"], tags["study_id"], run, options, space, provenance)


def children(store: Store, study: StudyRun) -> list[Run]:
    """Runs of which the study's is the parent, the oldest first."""
    return _oldest_first(store, study, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study.run.info.run_id}'")


def retrained(store: Store, study: StudyRun) -> list[Run]:
    """Runs of seeds that were trained over again for the study, the oldest first."""
    runs = _oldest_first(store, study, f"tags.`{OF_STUDY}` = '{study.id}'")
    return [run for run in runs if MLFLOW_PARENT_RUN_ID in run.data.tags]


def _oldest_first(store: Store, study: StudyRun, where: str) -> list[Run]:
    runs = _search(store, [study.run.info.experiment_id], where)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def history(store: Store, run_id: str, metric: str) -> list[Metric]:
    """All that was logged of a metric, by step."""
    entries = store.client.get_metric_history(run_id, metric)
    return sorted(entries, key=lambda entry: (entry.step, entry.timestamp))


def _search(
    store: Store, experiments: Sequence[str], where: str, newest_first: bool = False
) -> Iterator[Run]:
    order = ["attributes.start_time DESC"] if newest_first else None
    token = None
    while True:
        page = store.client.search_runs(
            list(experiments), where, ViewType.ACTIVE_ONLY, PAGE, order, token
        )
        yield from page
        token = page.token
        if not token:
            return


def searched_trials(store: Store, experiment: str) -> list[Run]:
    """All trials of all searches in an MLflow experiment, by its id."""
    trials = _search(store, [experiment], "tags.trial != ''")
    return [run for run in trials if OF_STUDY not in run.data.tags]
