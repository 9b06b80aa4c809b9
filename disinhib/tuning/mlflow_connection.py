"""Where MLflow's store is: its address, and how it is opened, made, moved and cleared.

A store is a database (SQLite by default), with a folder for files beside it, or a server.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from disinhib.tuning import mlflow_settings  # isort: skip (before MLflow is imported)

from mlflow import MlflowClient
from mlflow.entities import Run
from requests.utils import get_environ_proxies
from sqlalchemy import create_engine

from disinhib.checks import refusal
from disinhib.errors import masked, one_line

ARTIFACTS = "mlflow-artifacts"  # a folder
FIRST_CONTACT = "5"  # s; somebody waits at the terminal
MOST_IDS = 1000  # in one command


class Experiment(NamedTuple):
    """An MLflow experiment: the address of its store, and its id there."""

    uri: str
    id: str


@cache
def client_of(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def address(uri: str | None, folder: Path) -> str:
    """The address of the store: the option `uri`, else $MLFLOW_TRACKING_URI, else SQLite in
    `folder`. The path of an SQLite file becomes absolute.

    Raises ConfigError for a path that MLflow cannot open.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    file = sqlite_file(uri)
    in_memory = uri.rpartition("/")[2] in ("", ":memory:")
    if uri.startswith("sqlite:") and (file is None or in_memory or file.is_dir()):
        raise refusal("tracking.uri", uri, "sqlite:///FILE")
    if file is None:
        return uri
    if {*"%?#"} & {*str(file)}:
        allowed = "a file whose path has no %, ? or #, in which MLflow can keep its database"
        raise refusal("tracking.uri", uri, allowed)
    return f"sqlite:///{file}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a store in SQLite; None for any other store."""
    scheme, _, path = uri.partition(":///")
    return Path(os.path.abspath(path)) if scheme == "sqlite" else None


def why(uri: str, error: Exception) -> str:
    """Why a store does not answer, in one line, with what may help."""
    text = one_line(error)
    if " 401" in text or " 403" in text or "Unauthorized" in text:
        text += "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    with suppress(ValueError):  # no address at all
        proxies = get_environ_proxies(uri) if uri.startswith("http") else {}
        scheme = uri.partition(":")[0]
        if proxy := proxies.get(scheme, proxies.get("all")):
            names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
            variable = next((name for name in names if os.environ.get(name) == proxy), "a proxy")
            text += f"; by way of {variable}={proxy} (see no_proxy)"
    return masked(text)


@contextmanager
def first_contact(uri: str) -> Iterator[None]:
    """Somebody waits: within it, requests are given up soon. Raises the error of a database that
    cannot be used, for which MLflow would try for minutes."""
    if uri.startswith(("postgresql", "mysql")):
        engine = create_engine(uri, connect_args={"connect_timeout": int(FIRST_CONTACT)})
        engine.connect().close()
        engine.dispose()
    with mlflow_settings.requests(MLFLOW_HTTP_REQUEST_TIMEOUT=FIRST_CONTACT):
        yield


def check_store(uri: str, experiment: str, artifacts: Path) -> None:
    """Raises ConfigError as `open_store` would. Of a store in SQLite that is not there yet it only
    sees that there is a place for it, and makes nothing."""
    file = sqlite_file(uri)
    if file is None or file.exists():
        open_store(uri, experiment, artifacts)
        return
    try:
        existing = next(folder for folder in file.parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        allowed = f"the address of an MLflow store that can be made ({one_line(error)})"
        raise refusal("tracking.uri", uri, allowed) from error


def open_store(uri: str, experiment: str, artifacts: Path) -> Experiment:
    """Connects, and creates missing tables and a missing experiment.

    Done once, in one process: several that open a fresh SQLite store race in its migration.
    `artifacts` is the folder for files if the store is a database; SQLite has them beside its
    file, and a server has its own.

    Raises ConfigError if there is no such store or it does not answer.
    """
    file = sqlite_file(uri)
    try:
        if file is not None:
            _make_sqlite(file)
            artifacts = file.with_name(ARTIFACTS)
            keep_artifacts_beside(file)
        with first_contact(uri):
            there = (store := client_of(uri)).get_experiment_by_name(experiment)
            location = None if "http" in uri.split("://")[0] else artifacts.as_uri()
            id = there.experiment_id if there else store.create_experiment(experiment, location)
            if not id:
                raise ValueError("it is no MLflow server: it makes no experiment")
    except Exception as error:  # drivers, sockets and MLflow itself: each raises its own kind
        allowed = f"the address of an MLflow store that answers ({why(uri, error)})"
        raise refusal("tracking.uri", uri, allowed) from error
    if there is not None and there.lifecycle_stage == "deleted":
        allowed = "one that is not deleted (mlflow gc, or mlflow experiments restore)"
        raise refusal("tracking.experiment", experiment, allowed)
    return Experiment(uri, id)


def _make_sqlite(file: Path) -> None:
    """Makes the store if there is none, whole or not at all: MLflow takes seconds to make its
    tables, and cannot open a store whose creation was killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as part:
            whole = Path(part, file.name)
            MlflowClient(tracking_uri=f"sqlite:///{whole}").search_experiments()
            with suppress(FileExistsError):  # another study made it in the meantime
                os.link(whole, file)


def keep_artifacts_beside(file: Path) -> None:
    """Corrects the addresses of artifacts in an output folder that was moved or copied, in which
    they still are beside the database `file`. (MLflow has no call for that.)"""
    folder = file.with_name(ARTIFACTS)
    if not folder.is_dir():
        return
    with closing(sqlite3.connect(file)) as connection, connection:
        locations = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        for (old,) in locations:
            path = old.removeprefix("file://")
            if not path.startswith("/") or Path(path).name != ARTIFACTS or old == folder.as_uri():
                continue
            moved = {"old": old, "new": folder.as_uri()}
            connection.execute(
                "UPDATE experiments SET artifact_location = :new WHERE artifact_location = :old",
                moved,
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = :new || substr(artifact_uri, length(:old) + 1)"
                " WHERE substr(artifact_uri, 1, length(:old) + 1) = :old || '/'",
                moved,
            )


def local_artifacts(uri: str, run: Run) -> Path | None:
    """The folder of a run's artifacts beside the SQLite file of its store, wherever MLflow thinks
    they are; None if there is no such folder."""
    file, place = sqlite_file(uri), run.info.artifact_uri or ""
    if file is None or f"/{ARTIFACTS}/" not in place:
        return None
    folder = file.with_name(ARTIFACTS) / place.rpartition(f"/{ARTIFACTS}/")[2]
    return folder if folder.is_dir() else None


def purge(file: Path, run_ids: Sequence[str]) -> str | None:
    """Removes deleted runs, with their artifacts, from a store in SQLite. Returns why that failed,
    as it does if somebody has removed artifacts by hand."""
    keep_artifacts_beside(file)
    for first in range(0, len(run_ids), MOST_IDS):
        ids = ",".join(run_ids[first : first + MOST_IDS])
        command = ["gc", "--backend-store-uri", f"sqlite:///{file}", "--run-ids", ids]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{file}"}
        ended = subprocess.run(
            [sys.executable, "-m", "mlflow", *command],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if ended.returncode:
            return masked((ended.stderr.strip() or "no reason given").splitlines()[-1])
    return None
