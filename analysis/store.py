"""Access of the analysis to MLflow: any store, on any machine.

A study is found by its name (or its run's id) in any experiment. Problems with the store are one
line (Refused). jax is not imported.
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
    """Input that cannot be analysed; the message is one line."""


class Store(NamedTuple):
    uri: str
    client: MlflowClient


class StudyRun(NamedTuple):
    """A study's own run, with its artifacts."""

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
    """Connects to a store, and never creates one. Raises Refused if it does not answer."""
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
    """Raises sqlite3.Error unless `file` is a store: MLflow would turn it into one.

    Not opened read-only, so that a transaction that a kill interrupted can be rolled back.
    """
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as connection:
        connection.execute("SELECT 1 FROM runs LIMIT 1")


def text(store: Store, run_id: str, artifact: str) -> str:
    """The text of an artifact. Raises the errors of MLflow and its artifact stores."""
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
    """The study with this name or run id; the newest study if `name` is None.

    Raises Refused if there is none, if there are several, or if an artifact is missing.
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
        raise Refused(
            f"study: given {name}, the name of {len(matches)} studies; give a run id: {ids}"
        )
    return _study_of(store, matches[0])


def _is_study(run: Run) -> bool:
    """Whether this is a study's own run, but not that of a retraining."""
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
            f"study {run.info.run_name}: cannot read its artifacts ({one_line(error)})"
        ) from error
    tags = run.data.tags
    return StudyRun(tags["study"], tags["study_id"], run, options, space, provenance)


def children(store: Store, study: StudyRun) -> list[Run]:
    """The child runs of the study's run, oldest first."""
    return _oldest_first(store, study, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study.run.info.run_id}'")


def retrained(store: Store, study: StudyRun) -> list[Run]:
    """The runs of the study's retrained seeds, oldest first."""
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
