"""A study in MLflow, written by the driver alone.

A study is a parent run, and each of its trials a child run (tag `mlflow.parentRunId`); in a
retraining, each seed is a child run. A child has the searched parameters as params, under Optuna's
names, the metrics of every epoch with the epoch as step, and, as tags and artifacts, the command,
the options and the provenance, from which the same training can be run again. The parent shows how
the study stands: metrics by the number of trials that have ended, and the leaderboard.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from disinhib.tuning import mlflow_settings  # isort: skip (before MLflow is imported)

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME
from requests.utils import get_environ_proxies
from sqlalchemy import create_engine

from disinhib.checks import refusal
from disinhib.errors import masked, one_line
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    FAILED,
    KILLED,
    PRUNED,
    Asked,
    Ended,
    EpochDone,
    Logged,
    Objective,
    Record,
    TrialConfig,
    follow,
    over_seeds,
)

ARTIFACTS = "mlflow-artifacts"  # a folder
BEGUN = "runs_begun"  # tag of the study's own run: how many it has of trials or their seeds
FIRST_CONTACT = "5"  # s; somebody waits at the terminal
RUN_STATUS = {COMPLETE: "FINISHED", PRUNED: "FINISHED", FAILED: "FAILED", KILLED: "KILLED"}
MOST_IDS = 1000  # in one command
MOST_METRICS = 800  # in one request; MLflow accepts 1000 items of all kinds
# Tags of a retrained seed's run, beside OF_STUDY and those of every trial.
OF_TRIAL, OF_RUN = "retrains_trial", "retrains_run"
SEED, FLAG = "seed", "flag"
ENDING = {"trial_state", "epochs", "reason"}  # tags of a run that has ended
MODEL = "model.msgpack"  # its artifact, which `disinhib.load` reads
DESCRIPTION = "mlflow.note.content"  # tag of a run: what its page says, in Markdown
VIEW = "mlflow.sharedViewState."  # tag of an experiment, with a key: which runs its page shows, how
CLAIM = "disinhib.import."  # tag of an experiment, with a study's id: who imports it at this time


class Experiment(NamedTuple):
    """An MLflow experiment: the address of its store, and its id there."""

    uri: str
    id: str


@cache
def _client(uri: str) -> MlflowClient:
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
            client = _client(uri)
            there = client.get_experiment_by_name(experiment)
            location = None if "http" in uri.split("://")[0] else artifacts.as_uri()
            id = there.experiment_id if there else client.create_experiment(experiment, location)
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


def runs_of_trials(experiment: Experiment, id: str) -> dict[str, str]:
    """The runs of a search's trials, by their numbers."""
    runs = _all_runs(experiment, f"tags.study_id = '{id}'")
    return {run.data.tags["trial"]: run.info.run_id for run in runs if "trial" in run.data.tags}


def claim(experiment: Experiment, id: str, place: str) -> None:
    """Says in the store that the study `id` is being imported into `place`, a folder.

    Raises ConfigError if the store has that study already: two folders must not share its runs. (An
    import into `place` that was interrupted has left some, and can be repeated.)
    """
    client = _client(experiment.uri)
    by = client.get_experiment(experiment.id).tags.get(CLAIM + id)
    runs = _all_runs(experiment, f"tags.study_id = '{id}'")
    if runs and by != place:
        there = f"it has it as {runs[0].data.tags['study']}"
        there += "" if by is None else f", from an import into {by} that has not ended"
        raise refusal("tracking.uri", experiment.uri, f"a store without the study ({there})")
    client.set_experiment_tag(experiment.id, CLAIM + id, place)


def end_claim(experiment: Experiment, id: str) -> None:
    _client(experiment.uri).delete_experiment_tag(experiment.id, CLAIM + id)


def delete_study(experiment: Experiment, id: str) -> list[str]:
    """Deletes all runs of a study: MLflow calls them deleted, and shows them no more. Returns their
    ids, also of those that were deleted earlier."""
    client = _client(experiment.uri)
    runs = _all_runs(experiment, f"tags.study_id = '{id}'", ViewType.ALL)
    for run in runs:
        if run.info.lifecycle_stage != "deleted":
            client.delete_run(run.info.run_id)
    for tag in {VIEW + id, CLAIM + id} & client.get_experiment(experiment.id).tags.keys():
        client.delete_experiment_tag(experiment.id, tag)
    return [run.info.run_id for run in runs]


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


def local_artifacts(uri: str, run: Run) -> Path | None:
    """The folder of a run's artifacts beside the SQLite file of its store, wherever MLflow thinks
    they are; None if there is no such folder."""
    file, place = sqlite_file(uri), run.info.artifact_uri or ""
    if file is None or f"/{ARTIFACTS}/" not in place:
        return None
    folder = file.with_name(ARTIFACTS) / place.rpartition(f"/{ARTIFACTS}/")[2]
    return folder if folder.is_dir() else None


RunKey = tuple[int, int | None]  # a trial's number and, in a retraining, the seed


@dataclass
class MlflowStore:
    """Writes a study into MLflow: a parent run, and under it a run for each trial or seed.

    `objective` is the study's, `tags` are for all runs, `files` (name -> text) for the study's run,
    `trial_files` for those of trials. Models are read from `models(number, seed)`. Runs are found
    again by the study's `id` and the trial's number (and seed).
    """

    name, option = "mlflow", "tracking.uri"

    experiment: Experiment
    study: str
    id: str
    objective: Objective
    tags: Mapping[str, str]
    files: Mapping[str, str | bytes]
    trial_files: Mapping[str, str]
    models: Callable[[int, int], Path]
    study_run: str | None = None  # set when the store is loaded
    runs: dict[RunKey, str] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)  # trials that it knows to have ended
    params: dict[str, None] | None = None  # names, of all trials that the page knows
    began: float | None = None  # when the study began, in s since 1970; None: now
    last: int | None = None  # when something last happened, in ms since 1970

    def __post_init__(self) -> None:
        self.address = self.experiment.uri
        self.client = _client(self.address)

    def load(self, records: Mapping[int, Record]) -> set[int]:
        self.records = dict(records)
        by_key: dict[RunKey | None, Run] = {}
        runs = _all_runs(self.experiment, f"tags.study_id = '{self.id}'")
        for run in sorted(runs, key=lambda run: run.info.start_time):
            tags = run.data.tags
            seed = int(tags[SEED]) if SEED in tags else None
            key = (int(tags["trial"]), seed) if "trial" in tags else None  # the study's own run
            if by_key.setdefault(key, run) is not run:
                # A request that was not answered in time had been carried out nevertheless.
                self.client.delete_run(run.info.run_id)
        parent = by_key.pop(None, None)
        self.last = parent.info.end_time if parent else None
        self.study_run = parent.info.run_id if parent else self._create_own()
        if parent and parent.data.tags["study"] != self.study:
            self._rename([*by_key.values(), parent])
        for run in by_key.values():  # the study's own run may have been deleted and made again
            if run.data.tags.get(MLFLOW_PARENT_RUN_ID) != self.study_run:
                self.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, self.study_run)
        self._put(self.study_run, self.files)
        if parent:
            self.client.update_run(self.study_run, "RUNNING")
        for run in by_key.values():
            if run.info.status in ("KILLED", "RUNNING"):  # it goes on, if it was interrupted
                for tag in ENDING & run.data.tags.keys():
                    self.client.delete_tag(run.info.run_id, tag)
                self.client.update_run(run.info.run_id, "RUNNING")
        self.runs = {key: run.info.run_id for key, run in by_key.items() if key is not None}
        ended = (int(r.data.tags["trial"]) for r in by_key.values() if _has_ended(r))
        self.told = {number for number in ended if number in self.records}
        self._count()
        self._set_view(name for record in records.values() for name in record.point["params"])
        return {
            number
            for number, record in self.records.items()
            if all((number, seed) in self.runs for seed in _seeds(record.config))
        }

    def deliver(self, events: Sequence[Logged]) -> None:
        self.last = _milliseconds(events[-1].time) if events else self.last
        standings: list[Metric] = []
        for logged in events:
            if isinstance(logged.event, Asked):
                self._begin(logged.event, logged.time)
            elif not (isinstance(logged.event, EpochDone) and self._has(logged.event)):
                follow(self.records, logged.event)
            if isinstance(logged.event, Ended):
                self.told.add(logged.event.trial)
                standings += self._standings(logged.time)
        for number in dict.fromkeys(logged.event.trial for logged in events):
            own = [logged for logged in events if logged.event.trial == number]
            for lane, seed in enumerate(_seeds(self.records[number].config)):
                self._deliver(number, lane, seed, own)
        self._count()
        if standings:
            self._describe(standings)

    def _count(self) -> None:
        """Tells every reader how many runs there must be."""
        assert self.study_run is not None  # it exists before anything is delivered
        begun = sum(len(_seeds(record.config)) for record in self.records.values())
        self.client.set_tag(self.study_run, BEGUN, str(begun))

    def _has(self, done: EpochDone) -> bool:
        """Whether an epoch is delivered again."""
        return done.epoch <= self.records[done.trial].epochs

    def _standings(self, when: float) -> list[Metric]:
        """How the trials that have ended until then stand."""
        from disinhib.tuning import progress

        records = [self.records[number] for number in sorted(self.told)]
        now, sign = progress.tally(records), self.objective.sign
        values: dict[str, float] = {"trials_ended": now.ended, "trials_failed": now.failed}
        if not any(record.config["final"] for record in records):  # those do not compete
            for rule, best, _ in progress.standings(records):
                if best is not None and best.score is not None:
                    values[f"best_{rule}"] = sign * best.score
        return [Metric(n, v, _milliseconds(when), now.ended) for n, v in values.items()]

    def _describe(self, standings: Sequence[Metric]) -> None:
        """Says on the study's own run how it stands, and has stood."""
        from disinhib.tuning import progress

        assert self.study_run is not None
        records = list(self.records.values())
        tags = []
        if not any(record.config["final"] for record in records):
            tags = [RunTag(DESCRIPTION, progress.markdown(records, self.objective))]
        for first in range(0, len(standings), MOST_METRICS):
            part = standings[first : first + MOST_METRICS]
            self.client.log_batch(self.study_run, metrics=part, tags=tags)

    def _set_view(self, params: Iterable[str]) -> None:
        """Presets what the experiment's page shows at the address that the study prints:
        the runs of its trials, the best first, with the columns that matter. (MLflow's own page
        writes such a tag when somebody shares what they see: no interface says so.)"""
        new = dict.fromkeys(params).keys() - (self.params or {}).keys()
        if self.params is not None and not new:
            return
        # Here, as it comes with jax, which readers of a store do without.
        from disinhib.metrics import ANGLE, measures

        self.params = {**(self.params or {}), **dict.fromkeys(sorted(new))}
        score, angle = (f"metrics.`{name}`" for name in (self.objective.metric, ANGLE))
        records = self.records.values()
        aligned = any(measures(record.config["options"], ANGLE) for record in records)
        view = {
            "searchFilter": f"tags.study_id = '{self.id}' and tags.trial LIKE '%'",
            "orderByKey": score,
            "orderByAsc": self.objective.sign < 0,
            "selectedColumns": [
                *dict.fromkeys(["tags.`rule`", score, *([angle] if aligned else [])]),
                *("tags.`trial_state`", "tags.`epochs`"),
                *(f"params.`{name}`" for name in self.params),
            ],
        }
        self.client.set_experiment_tag(self.experiment.id, VIEW + self.id, json.dumps(view))

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        for record in (record for record in records.values() if not record.ended):
            tags = _ending(KILLED, record.epochs, "the study was interrupted")
            for seed in _seeds(record.config):
                run = self.runs[record.number, seed]
                self.client.log_batch(run, tags=[RunTag(*tag) for tag in tags.items()])
                self.client.set_terminated(run, RUN_STATUS[KILLED])
        assert self.study_run is not None
        status, ended_at = (COMPLETE, self.last) if whole else (KILLED, None)
        self.client.set_terminated(self.study_run, RUN_STATUS[status], ended_at)

    def _deliver(self, number: int, lane: int, seed: int | None, events: Sequence[Logged]) -> None:
        """Sends a run's events in as few requests as possible."""
        run = self.runs[number, seed]
        metrics: list[Metric] = []
        params: list[Param] = []
        tags: dict[str, str] = {}
        status, ended_at = None, 0
        for logged in events:
            match logged.event:
                case Asked() as asked:
                    params = [Param(n, str(v)) for n, v in asked.point["params"].items()]
                case EpochDone() as done:
                    tags |= done.place
                    metrics += _metrics(done, None if seed is None else lane, logged.time)
                case Ended() as ended:
                    end = vars(ended) if seed is None else ended.seeds[lane]
                    tags |= _ending(end["state"], end["epochs"], end["reason"])
                    tags |= {FLAG: end["flag"]} if "flag" in end else {}
                    status, ended_at = RUN_STATUS[end["state"]], _milliseconds(logged.time)
        for first in range(0, max(1, len(metrics)), MOST_METRICS):
            self.client.log_batch(
                run,
                metrics=metrics[first : first + MOST_METRICS],
                params=[] if first else params,
                tags=[] if first else [RunTag(*tag) for tag in tags.items()],
            )
        if status is not None:
            if seed is not None and (model := self.models(number, seed)).exists():
                self._put(run, {MODEL: model.read_bytes()})
            self.client.set_terminated(run, status, ended_at)
            if seed is None:
                from disinhib.tuning import progress

                record = self.records[number]
                complete = progress.in_words(record.score, self.objective)
                end = complete if record.state == COMPLETE else record.state
                self.client.update_run(run, name=f"{_name(record.config)} {end}")

    def _begin(self, asked: Asked, began: float) -> None:
        """Makes the trial's runs, except those that an earlier, failed delivery has made."""
        if asked.trial not in self.records:
            follow(self.records, asked)
        self._set_view(asked.point["params"])
        config = asked.config
        for seed in _seeds(config):
            command, options, seeds = config["command"], config["options"], config["seeds"]
            if seed is not None:  # what trains this seed by itself
                command += f" seed={seed} test_at_end=true"
                options, seeds = {**options, "seed": seed}, [seed]
            if (asked.trial, seed) not in self.runs:
                tags = {
                    MLFLOW_PARENT_RUN_ID: self.study_run,
                    "trial": str(asked.trial),
                    "rule": config["rule"],
                    "seeds": ",".join(map(str, seeds)),
                    "command": command,
                    **asked.tags,
                    **({} if seed is None else {SEED: str(seed)}),
                }
                name = _name(config) + ("" if seed is None else f" retrained, seed {seed}")
                self.runs[asked.trial, seed] = self._create(name, tags, _milliseconds(began))
            data = self._data(config, asked.tags)
            self.client.log_inputs(self.runs[asked.trial, seed], [DatasetInput(data)])
            files = {
                **self.trial_files,
                **asked.files,
                "config.yaml": yaml.safe_dump(options),
                "command.txt": command + "\n",
            }
            self._put(self.runs[asked.trial, seed], files)

    def _data(self, config: TrialConfig, tags: Mapping[str, str]) -> Dataset:
        """The data set that a trial trains on: its name, and a hash of all splits."""
        options = config["options"]["dataset"]
        digest = {**self.tags, **tags}["data_sha256"][:8]
        source = json.dumps({"path": options.get("path")})
        return Dataset(options["name"], digest, "local", source)

    def _create_own(self) -> str:
        began = None if self.began is None else _milliseconds(self.began)
        return self._create(self.study, {}, began)

    def _create(self, name: str, tags: Mapping[str, str], began: int | None = None) -> str:
        of_study = {**self.tags, "study": self.study, "study_id": self.id}
        tags = {MLFLOW_SOURCE_NAME: "disinhib", **of_study, **tags}
        run = self.client.create_run(self.experiment.id, began, tags, name)
        return run.info.run_id

    def _rename(self, runs: Iterable[Run]) -> None:
        """Gives runs the study's name; its own run is the last, so that a kill leaves it to do."""
        for run in runs:
            self.client.set_tag(run.info.run_id, "study", self.study)
            if run.info.run_id == self.study_run:
                self.client.update_run(run.info.run_id, name=self.study)

    def _put(self, run: str, files: Mapping[str, str | bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                Path(folder, file).parent.mkdir(exist_ok=True)
                Path(folder, file).write_bytes(data)
            self.client.log_artifacts(run, folder)


def _has_ended(run: Run) -> bool:
    return run.data.tags.get("trial_state") in ENDED


def _name(config: TrialConfig) -> str:
    return f"{config['number']:04d} {config['rule']}"


def _seeds(config: TrialConfig) -> list[int | None]:
    """The seeds that have a run each; [None] if the trial has one run."""
    return [*config["seeds"]] if config["final"] else [None]


def _metrics(done: EpochDone, lane: int | None, when: float) -> list[Metric]:
    """An epoch's metrics, with the time of the event: the same when delivered again."""
    if lane is None:
        values = over_seeds(done.metrics)
    else:
        own = {n: each[lane if len(each) > 1 else 0] for n, each in done.metrics.items()}
        values = {name: value for name, value in own.items() if not math.isnan(value)}
    return [Metric(name, v, _milliseconds(when), done.epoch) for name, v in values.items()]


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _ending(state: str, epochs: int, reason: str | None) -> dict[str, str]:
    """Tags of a trial's end."""
    return {"trial_state": state, "epochs": str(epochs), **({"reason": reason} if reason else {})}


def _all_runs(
    experiment: Experiment, criterion: str, which: int = ViewType.ACTIVE_ONLY
) -> list[Run]:
    client, runs, token = _client(experiment.uri), [], None
    while True:
        page = client.search_runs([experiment.id], criterion, which, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs
