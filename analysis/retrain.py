"""Trains configurations over fresh seeds, to their whole budget, and evaluates the test set once.

    python -m analysis.retrain selected.yaml [seeds=10]            the selected trials of a study
    python -m analysis.retrain experiment=table1 [AXIS=NAME,...]   the grid of an experiment

`seeds` is the number of seeds that no search has used, or a list of them. Options:
conf/retrain.yaml. A retraining is a study whose trials come from a list: the seeds of a
configuration are lanes of one trial, and every seed is a run in MLflow. If interrupted, run the
same command again: finished seeds are skipped, so the parts of a grid add up.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis import configurations, runs, store as stores
from analysis.configurations import Configuration
from analysis.store import Refused, StudyRun
from disinhib import cli, config, hydra_config, process, training
from disinhib.checks import refusal
from disinhib.errors import masked
from disinhib.tuning import engine, lease, mlflow_settings, provenance
from disinhib.tuning.engine import Finished, Job
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    OF_STUDY,
    REPEAT,
    Asked,
    EpochDone,
    EventLog,
    Objective,
    Point,
    Record,
    Tagged,
    TrialConfig,
    replay,
)
from disinhib.tuning.inventory import RETRAINED
from disinhib.tuning.loop import from_list
from disinhib.tuning.manifest import Manifest, read
from disinhib.tuning.mlflow_store import OF_RUN, OF_TRIAL
from disinhib.tuning.resume import FILE, keep_trials

Seeds = Mapping[int | None, Sequence[int]]  # by the repeat in which a configuration was selected
USAGE = "python -m analysis.retrain selected.yaml|experiment=NAME [option=value ...]"


@mlflow_settings.requests()
def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 1 if a configuration could not be trained, 130 if interrupted."""
    files, overrides = cli.split(arguments, __doc__ or "")
    names = {text.partition("=")[0] for text in overrides}
    if len(files) + ("experiment" in names) != 1:
        raise Refused(f"given {' '.join(arguments) or 'nothing'}, needed is {USAGE}")
    command = shlex.join(["python", "-m", "analysis.retrain", *arguments])
    if files:
        settings = configurations.checked_settings(overrides)
        store, study, planned = configurations.of_selection(Path(files[0]), settings, names)
        experiment = store.client.get_experiment(study.run.info.experiment_id).name
        settings["tracking"] = {"uri": store.uri, "experiment": experiment}
        settings["study"] = settings["study"] or study.name + RETRAINED
        used = configurations.used_seeds(store, study.run.info.experiment_id)
    else:
        axes, overrides = configurations.chosen_axes(overrides)
        settings = configurations.checked_settings(overrides)
        store, study, planned = None, None, configurations.of_grid(settings, overrides, axes)
        settings["dataset"] = planned[0].options["dataset"]  # whose provenance is the grid's
        if not settings["study"]:
            raise refusal("study", settings["study"], "the name under which the grid is recorded")
        used = configurations.used_in_experiment(settings)
    for configuration in planned:
        training.check_data(config.parse(configuration.options))
    seeds = {
        repeat: configurations.fresh_seeds(settings["seeds"], used, repeat)
        for repeat in sorted({one.repeat for one in planned}, key=lambda repeat: repeat or 0)
    }
    wanted = sum(len(seeds[one.repeat]) for one in planned)
    if store is not None and study is not None:
        print(stores.said(store, study))
    listed = "; ".join(
        _listed(own) if repeat is None else f"repeat {repeat}: {_listed(own)}"
        for repeat, own in seeds.items()
    )
    of_each = wanted // len(planned)
    print(f"{len(planned)} configurations of {of_each} seeds ({listed})", flush=True)
    try:
        finished = engine.run(
            job(settings, study, planned, seeds, command), Console(file=sys.stdout)
        )
    except Exception as error:
        if (obstacle := engine.obstacle(error)) is None:
            raise
        print(f"error: {obstacle}, then run the command again", file=sys.stderr)
        return 1
    lines, done = summary(finished, planned, seeds)
    print("\n".join(lines))
    for name, count in finished.undelivered.items():
        print(f"{name} lacks {count} records: run the command again when it answers")
    if not finished.whole:
        print("interrupted: run the command again")
        return process.interrupted()[0]
    if done < wanted:
        print(f"{done} of {wanted} seeds are finished: run the command again")
    return 0 if done == wanted and not finished.undelivered else 1


def job(
    settings: Mapping[str, Any],
    study: StudyRun | None,
    planned: Sequence[Configuration],
    seeds: Seeds,
    command: str,
) -> Job:
    """The retraining as a study: of the trials of `study`, or of a grid.

    Raises ConfigError if its folder cannot be written, or belongs to a search.
    """
    name, out_dir = settings["study"], Path(settings["out_dir"]).absolute()
    hydra_config.check_folder(out_dir)
    threads = settings["cluster"]["cpus_per_trial"]
    folder = out_dir / name
    resume = (folder / FILE).exists()
    records: dict[int, Record] = {}
    if resume:
        manifest = read(folder, name)
        if manifest.space is not None:
            raise refusal("study", name, f"another name: {folder} is a search")
        lease.refuse_live(folder)
        with closing(EventLog(folder, existing=True)) as log:
            records = replay(log.events())
        check_code(records)
    else:
        first = config.parse(planned[0].options)
        manifest = Manifest(id=uuid.uuid4().hex, provenance=provenance.collect(first, threads))
    uri = settings["tracking"]["uri"]
    default = uri in (None, f"sqlite:///{out_dir / 'mlflow.db'}")  # also when that is moved
    tracking = {**settings["tracking"], "uri": None if default else masked(uri)}  # no password
    origin = {OF_STUDY: manifest.id if study is None else study.id}
    asked = lacking(planned, seeds, records, threads, origin)
    trials = len(records) + len(asked)
    shown = {"metric": runs.DEFAULT_METRIC, "mode": "max"}

    def begin(log: EventLog) -> None:
        if resume:
            keep_trials(folder, trials)
            log.append(retagged(planned, records, log.last() + 1))

    return Job(
        name=name,
        out_dir=out_dir,
        resume=resume,
        manifest=manifest,
        data=list(dict.fromkeys(provenance.source_of(one.options) for one in planned)),
        kept={"options": {**settings, "tracking": tracking, "trials": trials, **shown}},
        command=command,
        objective=Objective.of(**shown),
        source=from_list(asked),
        trials=lambda _: trials,
        cluster=settings["cluster"],
        checkpoints={**settings["checkpoints"], "cap_gb": math.inf},
        tracking=settings["tracking"],
        tags={} if study is None else origin,
        seeds=max((len(one.config["seeds"]) for one in asked), default=1),
        begin=begin,
    )


def check_code(records: Mapping[int, Record]) -> None:
    """Warns of trials that other code has finished. Raises ConfigError if other code has begun a
    trial that is unfinished."""
    code = code_hash(provenance.code(provenance.ROOT))
    for record in records.values():
        if record.tags["code_sha256"] != code:
            if not record.ended:
                allowed = "another name (study=NAME), or the code that began it"
                raise refusal("study", "one that other code has begun", allowed)
            print(f"warning: trial {record.number} was trained by other code")


def code_hash(code: Mapping[str, Any]) -> str:
    return configurations.digest(code["files"])


def lacking(
    planned: Sequence[Configuration],
    seeds: Seeds,
    records: Mapping[int, Record],
    threads: int,
    origin: Mapping[str, str],
) -> list[Asked]:
    """A trial for each configuration that lacks seeds: new ones, or those of a trial that could not
    end."""
    known = {
        (_key(record), seed)
        for record in records.values()
        if not _could_not_end(record)
        for seed in record.config["seeds"]
    }
    asked = []
    for key, one in {one.key: one for one in planned}.items():
        left = [seed for seed in seeds[one.repeat] if (key, seed) not in known]
        if left:
            asked.append(_asked(len(records) + len(asked), one, left, threads, origin))
    return asked


def retagged(
    planned: Sequence[Configuration], records: Mapping[int, Record], number: int
) -> list[Tagged]:
    """What makes seeds that were trained earlier say how their trial was selected now. `number` is
    that of no earlier such event."""
    now = {one.key: _selection_tags(one) for one in planned if one.rank is not None}
    return [
        Tagged(record.number, number, tags)
        for record in records.values()
        if (tags := now.get(_key(record)))
        and any(record.tags.get(name, "") != value for name, value in tags.items())
    ]


def _selection_tags(one: Configuration) -> dict[str, str]:
    """As what it was selected, and how. A group of "" takes the place of an earlier one; where
    nothing was selected there is none."""
    group = None if one.rank is None else one.group
    tags = {runs.RANK: one.rank, runs.GROUP: group, runs.SELECTED_BY: one.selected_by}
    return {name: str(value) for name, value in tags.items() if value is not None}


def _key(record: Record) -> str:
    return record.tags.get(OF_RUN) or record.tags[runs.CONFIGURATION]


def _could_not_end(record: Record) -> bool:
    """Whether it raised or lost its workers. (That seeds diverge is a result.)"""
    return record.state == FAILED and len(record.diverged) < len(record.config["seeds"])


def _asked(
    number: int, one: Configuration, seeds: list[int], threads: int, origin: Mapping[str, str]
) -> Asked:
    """The trial that trains a configuration over `seeds`. `origin` names the study in MLflow."""
    its = provenance.collect(config.parse(one.options), threads)
    tags = {
        **origin,
        **({OF_TRIAL: str(one.trial), OF_RUN: one.of_run} if one.of_run else {}),
        **({} if one.repeat is None else {REPEAT: str(one.repeat)}),
        **_selection_tags(one),
        runs.CONFIGURATION: one.id,
        "dataset": one.options["dataset"]["name"],
        "depth": str(one.depth),
        "feedback": one.feedback,
        "budget": str(one.options["epochs"]),
        "code_sha256": code_hash(its["code"]),
        "code_version": its["code"]["version"] or "unknown",
        "data_sha256": its["data"]["sha256"],
        runs.TEST_IMAGES: str(its["data"]["samples"]["test"]),
    }
    trial = TrialConfig(
        number=number,
        rule=one.rule,
        searched=one.searched,
        command=one.command,
        options={**one.options, "test_at_end": True, "seed": seeds[0]},
        seeds=seeds,
        epochs=one.options["epochs"],
        final=True,
    )
    point = Point(params=one.searched, distributions={}, system_attrs={})
    return Asked(number, trial, point, tags, {"provenance.json": json.dumps(its, indent=1)})


def summary(
    finished: Finished, planned: Sequence[Configuration], seeds: Seeds
) -> tuple[list[str], int]:
    """(a line for each configuration, the number of finished seeds)."""
    with closing(EventLog(finished.job.folder)) as log:
        last = {e.event.trial: e.event for e in log.events() if isinstance(e.event, EpochDone)}
    lines, done = [], 0
    for one in planned:
        ended = [record for record in finished.records if record.ended and _key(record) == one.key]
        ends = [
            (record.number, lane, end)
            for record in ended
            if not _could_not_end(record)
            for lane, end in enumerate(record.seed_ends(record.state, record.reason))
            if end["seed"] in seeds[one.repeat]
        ]
        tests = [
            last[number].metrics["test_accuracy"][lane]
            for number, lane, end in ends
            if end["state"] == COMPLETE
        ]
        notes = [
            f"seed {end['seed']} {end['reason'] or 'flagged: ' + end['flag']}"
            for *_, end in ends
            if end["reason"] or end["flag"]
        ]
        if len(ends) < len(seeds[one.repeat]):  # else it went well in the end
            notes += [record.reason or "" for record in ended if _could_not_end(record)]
        accuracy = [f"test accuracy {sum(tests) / len(tests):.2f} %"] if tests else []
        parts = [f"{len(tests)} of {len(seeds[one.repeat])} seeds complete", *accuracy, *notes]
        lines.append(f"{one.words}: {', '.join(parts)}")
        done += len(ends)
    return lines, done


def _listed(seeds: Sequence[int]) -> str:
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if whole and len(seeds) > 1 else ", ".join(map(str, seeds))


if __name__ == "__main__":
    cli.run(main)
