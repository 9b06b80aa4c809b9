"""Access of the analysis to MLflow: any store, on any machine.

A study is found by its name (or its run's id) in any experiment. Problems with the store are one
line (Refused). jax is not imported.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from disinhib.tuning import mlflow_settings  # noqa: F401  # isort: skip (before MLflow)

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from disinhib.checks import OPTIONAL_TEXT, Option
from disinhib.errors import InputError, masked, nearest, one_line
from disinhib.tuning import mlflow_connection
from disinhib.tuning.event_log import OF_STUDY
from disinhib.tuning.mlflow_store import SEED

DEFAULT = Path("out/mlflow.db")
# Options of every command that reads a study.
TRACKING = Option(
    "tracking.uri",
    None,
    OPTIONAL_TEXT,
    f"address of the MLflow store; null: $MLFLOW_TRACKING_URI, else {DEFAULT}",
)
STUDY = Option("study", None, OPTIONAL_TEXT, "the study's name or run id; null: the newest study")
OLDEST_FIRST = ["attributes.start_time ASC"]


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
    space: dict[str, Any] | None  # space_tree.definition; None if nothing is searched
    provenance: dict[str, Any]


def address(uri: str | None) -> str:
    """The store's: `uri`, else the environment's, else that of the default output folder."""
    if not uri and not os.environ.get("MLFLOW_TRACKING_URI") and not DEFAULT.exists():
        raise Refused(
            f"tracking.uri: missing, needed is the address of an MLflow store, as neither"
            f" $MLFLOW_TRACKING_URI nor {DEFAULT} is there"
        )
    return mlflow_connection.address(uri, DEFAULT.parent)


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Raises Refused with `problem` for any error: drivers, sockets, MLflow and its stores of
    artifacts each raise their own kinds."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{problem} ({one_line(error)})") from error


def connect(uri: str) -> Store:
    """Connects to a store, and never creates one. Raises Refused if it does not answer."""
    try:
        if (file := mlflow_connection.sqlite_file(uri)) is not None:
            # MLflow would make a store of any file. (Not opened read-only, so that a transaction
            # that a kill interrupted can be rolled back.)
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as connection:
                connection.execute("SELECT 1 FROM runs LIMIT 1")
        with mlflow_connection.first_contact(uri):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # as in `refusing`
        problem = f"tracking.uri: cannot read {uri} ({mlflow_connection.why(uri, error)})"
        raise Refused(problem) from error
    return Store(uri, client)


def content(store: Store, run_id: str, artifact: str) -> bytes:
    """An artifact. Raises the errors of MLflow and its artifact stores."""
    run = store.client.get_run(run_id)
    if (own := mlflow_connection.local_artifacts(store.uri, run)) is not None:
        return (own / artifact).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = store.client.download_artifacts(run_id, artifact, folder)
        return Path(file).read_bytes()


def text(store: Store, run_id: str, artifact: str) -> str:
    """The text of an artifact, as `content`."""
    return content(store, run_id, artifact).decode("utf-8")


def names(store: Store, run: Run, folder: str | None = None) -> list[str]:
    """The paths of a run's artifacts, or of those in one of their folders."""
    own = mlflow_connection.local_artifacts(store.uri, run)
    if own is None:
        return sorted(file.path for file in store.client.list_artifacts(run.info.run_id, folder))
    return sorted(str(file.relative_to(own)) for file in (own / (folder or "")).glob("*"))


def run(store: Store, run_id: str) -> Run:
    """Raises Refused if there is none."""
    with refusing(f"tracking.uri: cannot read {store.uri}"):
        try:
            return store.client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                raise Refused(f"{run_id}: no such run in {store.uri}") from error
            raise


def find_study(store: Store, name: str | None = None) -> StudyRun:
    """The study with this name or run id; the newest study if `name` is None.

    Raises Refused if there is none, if there are several, or if an artifact is missing.
    """
    experiments = _experiments(store)
    studies = lambda where="": filter(_is_study, _search(store, experiments, where))
    if name is None:
        newest = next(studies(), None)
        _refuse_orphans(store, experiments, "")
        if newest is None:
            raise Refused(f"study: there is none in {store.uri}")
        return _study_of(store, newest)
    matches = _called(store, experiments, name)
    if not matches:
        _refuse_orphans(store, experiments, f" AND tags.study = '{_quoted(name)}'")
        names = {run.info.run_name or "" for run in studies()}
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


def find_studies(store: Store, names: str | None = None) -> list[StudyRun]:
    """The study as `find_study`, or several, with commas between their names. (A name that has a
    comma, which only MLflow allows, is one study.)"""
    several = (names or "").split(",")
    if len(several) == 1 or _called(store, _experiments(store), names or ""):
        return [find_study(store, names)]
    if "" in several:
        raise Refused(f"study: given {names}, allowed are names with a comma between two")
    studies = [find_study(store, name) for name in several]
    if len({study.name for study in studies}) < len(studies):
        raise Refused(f"study: given {names}, allowed are studies of different names")
    return studies


def _experiments(store: Store) -> list[str]:
    return [experiment.experiment_id for experiment in store.client.search_experiments()]


def _called(store: Store, experiments: list[str], name: str) -> list[Run]:
    """The studies with this name or run id."""
    studies = lambda where: filter(_is_study, _search(store, experiments, where))
    by_name = [run for run in studies(f"run_name = '{_quoted(name)}'") if run.info.run_name == name]
    return by_name or [*studies(f"run_id = '{_quoted(name)}'")]


def _quoted(name: str) -> str:
    return name.replace("'", "")


def of_id(store: Store, id: str) -> StudyRun:
    """The study with this id, whatever its name. Raises Refused if the store has none."""
    experiments = _experiments(store)
    run = next(filter(_is_study, _search(store, experiments, f"tags.study_id = '{id}'")), None)
    if run is None:
        raise Refused(f"study: {masked(store.uri)} has no study with the id {id}")
    return _study_of(store, run)


def _refuse_orphans(store: Store, experiments: list[str], where: str) -> None:
    """Raises Refused if the newest trial's study has no run of its own: it was deleted."""
    of_trials = _search(store, experiments, f"tags.trial != ''{where}")
    trial = next((run for run in of_trials if OF_STUDY not in run.data.tags), None)
    if trial is None:
        return
    name, id = trial.data.tags["study"], trial.data.tags["study_id"]
    of_study = _search(store, experiments, f"tags.study_id = '{id}'")
    if not any("trial" not in run.data.tags for run in of_study):
        raise Refused(
            f"study: the run of {name} itself was deleted in {store.uri}, not its trials; restore"
            f" it, or resume the study (python tune_main.py study={name} resume=true)"
        )


def _is_study(run: Run) -> bool:
    """Whether this is a study's own run, but not that of a retraining."""
    tags = run.data.tags
    return "study_id" in tags and MLFLOW_PARENT_RUN_ID not in tags and OF_STUDY not in tags


def _study_of(store: Store, run: Run) -> StudyRun:
    run_id, tags = run.info.run_id, run.data.tags
    with refusing(f"study {run.info.run_name}: cannot read its artifacts"):
        files = names(store, run)
        return StudyRun(
            tags["study"],
            tags["study_id"],
            run,
            yaml.safe_load(text(store, run_id, "config.yaml")),
            json.loads(text(store, run_id, "space.json")) if "space.json" in files else None,
            json.loads(text(store, run_id, "provenance.json")),
        )


def load_plugins(provenance: Mapping[str, Any], beside: bool = False) -> None:
    """As `hydra_config.load_kept_plugins`."""
    from disinhib import hydra_config  # with jax

    hydra_config.load_kept_plugins(provenance, beside)


def trials(store: Store, experiment: str, study_id: str | None = None) -> list[Run]:
    """The trials of all searches in an MLflow experiment (its id), or only of the one with this
    `study_id`, oldest first."""
    where = "tags.trial != ''"
    if study_id is not None:
        where += f" AND tags.study_id = '{study_id}'"
    runs = _search(store, [experiment], where, OLDEST_FIRST)
    return [run for run in runs if OF_STUDY not in run.data.tags]


def retrained(store: Store, study: StudyRun) -> list[Run]:
    """The runs of the study's retrained seeds, oldest first; those of a trial, which begin at the
    same time, by seed."""
    where = f"tags.`{OF_STUDY}` = '{study.id}' AND tags.trial != ''"
    runs = _search(store, [study.run.info.experiment_id], where)
    number = lambda run, tag: int(run.data.tags[tag])
    key = lambda run: (run.info.start_time, number(run, "trial"), number(run, SEED))
    return sorted(runs, key=key)


def retrainings(store: Store, study: StudyRun) -> list[Run]:
    """The own runs of the study's retrainings; a grid is its own."""
    experiment = study.run.info.experiment_id
    of_study = _search(store, [experiment], f"tags.`{OF_STUDY}` = '{study.id}'", OLDEST_FIRST)
    own = [run for run in of_study if "trial" not in run.data.tags]
    return own if study.space is not None else [study.run, *own]


def said(store: Store, study: StudyRun) -> str:
    """What is read, in one line, which every command prints first."""
    options = study.options
    sizes = options.get("model", {}).get("vf", {}).get("sizes_hidden")
    what = [
        options["dataset"]["name"],
        f"budget {options['epochs']} epochs",
        *([f"hidden layers {sizes}"] if sizes else []),
    ]
    return f"study {study.name} ({', '.join(what)}) in {masked(store.uri)}"


def seeds_of(run: Run) -> tuple[int, ...]:
    """The seeds of a trial."""
    return tuple(map(int, run.data.tags["seeds"].split(",")))


def history(store: Store, run_id: str, metric: str) -> list[Metric]:
    """All that was logged of a metric, by step."""
    entries = store.client.get_metric_history(run_id, metric)
    return sorted(entries, key=lambda entry: (entry.step, entry.timestamp))


def _search(
    store: Store, experiments: list[str], where: str, order: list[str] | None = None
) -> Iterator[Run]:
    """Runs, by default the newest first."""
    token: str | None = ""
    while token is not None:
        page = store.client.search_runs(experiments, where, order_by=order, page_token=token)
        yield from page
        token = page.token or None
