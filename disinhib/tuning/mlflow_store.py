"""A study in MLflow, written by the driver alone.

A study is a parent run, and each of its trials a child run (tag `mlflow.parentRunId`); in a
retraining, each seed is a child run. A child has the searched parameters as params, under Optuna's
names, the metrics of every epoch with the epoch as step, and, as tags and artifacts, the command,
the options and the provenance, from which the same training can be run again. The parent shows how
the study stands: metrics by the number of trials that have ended, and the leaderboard.
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disinhib.tuning import mlflow_settings  # noqa: F401  # isort: skip (before MLflow)

import yaml
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME

from disinhib.checks import refusal
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    FAILED,
    KILLED,
    PRUNED,
    REPEAT,
    Asked,
    Ended,
    EpochDone,
    Logged,
    Objective,
    Record,
    Tagged,
    TrialConfig,
    follow,
    over_seeds,
)
from disinhib.tuning.mlflow_connection import Experiment, client_of

BEGUN = "runs_begun"  # tag of the study's own run: how many it has of trials or their seeds
RUN_STATUS = {COMPLETE: "FINISHED", PRUNED: "FINISHED", FAILED: "FAILED", KILLED: "KILLED"}
MOST_METRICS = 800  # in one request; MLflow accepts 1000 items of all kinds
# Tags of a retrained seed's run, beside OF_STUDY and those of every trial.
OF_TRIAL, OF_RUN = "retrains_trial", "retrains_run"
SEED, FLAG = "seed", "flag"
ENDING = {"trial_state", "epochs", "reason"}  # tags of a run that has ended
MODEL = "model.msgpack"  # its artifact, which `disinhib.load` reads
DESCRIPTION = "mlflow.note.content"  # tag of a run: what its page says, in Markdown
VIEW = "mlflow.sharedViewState."  # tag of an experiment, with a key: which runs its page shows, how
CLAIM = "disinhib.import."  # tag of an experiment, with a study's id: who imports it at this time


def runs_of_trials(experiment: Experiment, id: str) -> dict[str, str]:
    """The runs of a search's trials, by their numbers."""
    runs = _all_runs(experiment, f"tags.study_id = '{id}'")
    return {run.data.tags["trial"]: run.info.run_id for run in runs if "trial" in run.data.tags}


def claim(experiment: Experiment, id: str, place: str) -> None:
    """Says in the store that the study `id` is being imported into `place`, a folder.

    Raises ConfigError if the store has that study already: two folders must not share its runs. (An
    import into `place` that was interrupted has left some, and can be repeated.)
    """
    client = client_of(experiment.uri)
    by = client.get_experiment(experiment.id).tags.get(CLAIM + id)
    runs = _all_runs(experiment, f"tags.study_id = '{id}'")
    if runs and by != place:
        there = f"it has it as {runs[0].data.tags['study']}"
        there += "" if by is None else f", from an import into {by} that has not ended"
        raise refusal("tracking.uri", experiment.uri, f"a store without the study ({there})")
    client.set_experiment_tag(experiment.id, CLAIM + id, place)


def end_claim(experiment: Experiment, id: str) -> None:
    client_of(experiment.uri).delete_experiment_tag(experiment.id, CLAIM + id)


def delete_study(experiment: Experiment, id: str) -> list[str]:
    """Deletes all runs of a study: MLflow calls them deleted, and shows them no more. Returns their
    ids, also of those that were deleted earlier."""
    client = client_of(experiment.uri)
    runs = _all_runs(experiment, f"tags.study_id = '{id}'", ViewType.ALL)
    for run in runs:
        if run.info.lifecycle_stage != "deleted":
            client.delete_run(run.info.run_id)
    for tag in {VIEW + id, CLAIM + id} & client.get_experiment(experiment.id).tags.keys():
        client.delete_experiment_tag(experiment.id, tag)
    return [run.info.run_id for run in runs]


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
        self.client = client_of(self.address)

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
        # Here, as they come with jax and Optuna, which readers of a store do without.
        from disinhib.metrics import ANGLE, measures
        from disinhib.tuning.space_tree import RULE

        self.params = {**(self.params or {}), **dict.fromkeys(sorted(new))}
        score, angle = (f"metrics.`{name}`" for name in (self.objective.metric, ANGLE))
        records = self.records.values()
        repeat = [f"tags.`{REPEAT}`"] * any(REPEAT in record.tags for record in records)
        aligned = any(measures(record.config["options"], ANGLE) for record in records)
        columns = [
            *dict.fromkeys(["tags.`rule`", *repeat, score, *([angle] if aligned else [])]),
            *("tags.`trial_state`", "tags.`epochs`"),
            *(f"params.`{name}`" for name in self.params if name != RULE),
        ]
        view = {
            "searchFilter": f"tags.study_id = '{self.id}' and tags.trial LIKE '%'",
            "orderByKey": score,
            "orderByAsc": self.objective.sign < 0,
            "selectedColumns": columns,
            "columnOrder": columns,  # else tags come after all parameters
            # Pixels in which a name can be read: else 100, whatever its length.
            "columnWidths": {name: 7 * len(name.split("`")[1]) + 32 for name in columns},
        }
        # Packed as MLflow's page does, for a tag has room for 20,000 characters.
        packed = base64.b64encode(zlib.compress(json.dumps(view).encode())).decode()
        self.client.set_experiment_tag(self.experiment.id, VIEW + self.id, f"deflate;{packed}")

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
                case Tagged() as tagged:
                    tags |= tagged.tags
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
    client, runs, token = client_of(experiment.uri), [], None
    while True:
        page = client.search_runs([experiment.id], criterion, which, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs
