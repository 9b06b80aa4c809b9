"""`python -m analysis.runs [study=NAME] [out=FILE.csv] [curves=FILE.parquet]`: a study as tables.

A row of `out` is a trial, read from MLflow: its searched parameters, state and score. A row of
`curves` is a metric of a trial, or of a retrained seed, in one epoch. Runs that are left out of
`out` are counted, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import store as stores
from analysis.store import Refused, Store, StudyRun
from disinhib import cli
from disinhib.checks import Check, Option, or_null
from disinhib.files import write_whole
from disinhib.tuning import mlflow_settings
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    EPOCH_SECONDS,
    FAILED,
    INITIAL,
    OF_STUDY,
    REPEAT,
)
from disinhib.tuning.mlflow_store import BEGUN, OF_RUN, OF_TRIAL, SEED
from disinhib.tuning.steering import ADDED

if TYPE_CHECKING:  # MLflow is imported after its settings
    from mlflow.entities import Run

FORMS = (".csv", ".parquet")
TABLE: Check = or_null(
    (lambda v: isinstance(v, str) and v.endswith(FORMS), f"a file named *{' or *'.join(FORMS)}")
)
OUT = Option("out", None, TABLE, "file to write; null: print the table")
CURVES = Option("curves", None, TABLE, "file to write every metric of every epoch to")
COMMAND = cli.Command("analysis.runs", __doc__, (stores.STUDY, stores.TRACKING, OUT, CURVES))
DEFAULT_METRIC = "valid_accuracy"
SEARCHED = "searched."  # prefix of the columns of searched parameters, by Optuna's names
ALIGNMENT = "alignment_"  # prefix of what disinhib/alignment.py measures
NO_FEEDBACK = "none"
# In words, by whether feedback weights are averaged (the tag `averaged` of older retrainings).
JACOBIAN_FEEDBACK = {"none": NO_FEEDBACK, "false": "per sample", "true": "averaged"}
CONFIGURATION = "configuration"  # tag of a retrained seed: the id of its configuration
# Tag of a retrained seed: how its trial was selected, these fields of selected.yaml as JSON.
SELECTED_BY = "selected_by"
HOW_SELECTED = ("metric", "rule", "per", "top", "command")
TEST_IMAGES = "test_images"  # tag of a retrained seed: how many its test set has
# Tags of a retrained seed, if it was selected: what as. Repeats of the tuning are merged by both.
RANK = "rank"  # in its group, from 1; 0: as the published defaults
GROUP = "group"  # in words, if groups are more than the rules


class Table(NamedTuple):
    """Rows, and the reasons for which runs were left out, a line each."""

    rows: pd.DataFrame
    dropped: list[str]


def trials(store: Store, study: StudyRun) -> Table:
    """The study's trials, in the order of their numbers.

    Columns: trial, run_id, rule, repeat (from 1), state, reason, epochs (done), budget (epochs),
    score (the study's metric at its last epoch; NaN if it has none), seeds (a tuple), seconds,
    host, device, command, saw_test (its run has a metric of the test set), drawn (it is neither an
    initial point nor one that was added by hand), the alignment after the last epoch, where it was
    measured, and `searched.<parameter>`, by Optuna's names.
    """
    metric, budget = study.options["metric"], int(study.options["epochs"])
    rows, dropped = [], []
    present = stores.trials(store, study.run.info.experiment_id, study.id)
    dropped += [f"trial {number}: its run is missing" for number in missing(study, present)]
    for run in present:
        tags, info = run.data.tags, run.info
        name = f"trial {tags['trial']}"
        state = tags.get("trial_state")
        if state not in ENDED:
            dropped.append(f"{name}: {'it has not ended' if state is None else f'it was {state}'}")
            continue
        epochs = int(tags["epochs"])
        score = run.data.metrics.get(metric, math.nan)  # the last one; metrics arrive in order
        if state == COMPLETE and epochs != budget:
            dropped.append(f"{name}: complete after {epochs} epochs of {budget}")
            continue
        if state != FAILED and not math.isfinite(score):
            dropped.append(f"{name}: {state}, but it has no {metric}")
            continue
        rows.append(
            {
                "trial": int(tags["trial"]),
                "run_id": info.run_id,
                "rule": tags["rule"],
                "repeat": _repeat(run),
                "state": state,
                "reason": tags.get("reason"),
                "epochs": epochs,
                "budget": budget,
                "score": score,
                "seeds": stores.seeds_of(run),
                "seconds": ((info.end_time or math.nan) - info.start_time) / 1000,
                **{name: tags.get(name) for name in ("host", "device")},
                "command": tags["command"],
                "drawn": not tags.keys() & {INITIAL, ADDED},
                "saw_test": any(name.startswith("test_") for name in run.data.metrics),
                **{n: v for n, v in run.data.metrics.items() if n.startswith(ALIGNMENT)},
                **{SEARCHED + name: value for name, value in run.data.params.items()},
            }
        )
    rows.sort(key=lambda row: row["trial"])
    twice = [n for n, count in Counter(row["trial"] for row in rows).items() if count > 1]
    if twice:
        raise Refused(f"study {study.name}: trial {twice[0]} has more than one run in {store.uri}")
    return Table(
        pd.DataFrame(rows, columns=None if rows else ["trial", "rule", "repeat", "state"]), dropped
    )


def missing(study: StudyRun, present: Sequence[Run]) -> list[int]:
    """Numbers of the trials that a search has begun, by its own record, and that are not among the
    runs `present`."""
    if study.space is None:
        return []
    numbers = {int(run.data.tags["trial"]) for run in present}
    begun = int(study.run.data.tags.get(BEGUN, 0))
    return [number for number in range(begun) if number not in numbers]


def refuse_missing(store: Store, study: StudyRun) -> None:
    """Raises Refused if a trial's run is missing: it may have been the best."""
    present = stores.trials(store, study.run.info.experiment_id, study.id)
    if numbers := missing(study, present):
        raise Refused(
            f"study {study.name}: the runs of trials {', '.join(map(str, numbers))} are missing in"
            f" {store.uri}; restore them, or resume the study, which writes them again (python"
            f" tune_main.py study={study.name} resume=true)"
        )


def refuse_missing_seeds(store: Store, study: StudyRun) -> None:
    """Raises Refused if a retrained seed's run is missing: a mean without it would mislead."""
    present = Counter(run.data.tags["study_id"] for run in stores.retrained(store, study))
    for retraining in stores.retrainings(store, study):
        tags = retraining.data.tags
        begun, there = int(tags.get(BEGUN, 0)), present[tags["study_id"]]
        if there < begun:
            raise Refused(
                f"study {study.name}: {begun - there} of the {begun} runs of {tags['study']} are"
                f" missing in {store.uri}; restore them, or run the retraining's command again,"
                " which writes them again"
            )


def retrained(store: Store, study: StudyRun) -> Table:
    """The study's retrained seeds: a row is a configuration with one seed.

    Columns: run_id, trial (number; NaN if no trial of a search), of_run, configuration, rule,
    repeat (of the tuning, from 1), rank (of the selection, from 1; 0: the published defaults; NaN
    if none was recorded), group (of the selection within the rule; "" if it is the whole), dataset,
    depth (hidden layers), feedback (how its weights come about, in words), seed, state, reason,
    epochs (done), budget, command, flag (why the ODE check failed, else ""), host, device, code and
    data (hashes), selected_by (how its trial was selected, HOW_SELECTED as JSON; empty if that was
    not recorded), test_images (their number; NaN if it was not recorded), and every metric after
    the last epoch.
    """
    rows, unfinished = [], {}
    own = study.provenance["data"]
    images = {own["sha256"]: own.get("samples", {}).get("test", math.nan)}
    for run in stores.retrained(store, study):
        tags = run.data.tags
        trial = int(tags[OF_TRIAL]) if OF_TRIAL in tags else math.nan
        feedback = tags.get("feedback") or JACOBIAN_FEEDBACK[tags["averaged"]]
        if tags.get("trial_state") not in ENDED:
            name = called(tags["rule"], feedback, int(tags["depth"]), tags["dataset"], trial)
            unfinished.setdefault(name, []).append(int(tags["seed"]))
            continue
        rows.append(
            {
                "run_id": run.info.run_id,
                "trial": trial,
                "of_run": tags.get(OF_RUN),
                **{name: tags[name] for name in (CONFIGURATION, "rule", "dataset", "command")},
                "repeat": _repeat(run),
                RANK: float(tags.get(RANK, math.nan)),
                GROUP: tags.get(GROUP, ""),
                **{name: int(tags[name]) for name in ("depth", "seed", "epochs", "budget")},
                "feedback": feedback,
                "state": tags["trial_state"],
                "flag": tags.get("flag", ""),
                **{name: tags.get(name) for name in ("reason", "host", "device")},
                "code": tags.get("code_sha256"),
                "data": tags.get("data_sha256"),
                SELECTED_BY: tags.get(SELECTED_BY, "{}"),
                TEST_IMAGES: float(
                    tags.get(TEST_IMAGES) or images.get(tags.get("data_sha256"), math.nan)
                ),
                **run.data.metrics,
            }
        )
    dropped = [
        f"{name}: the retraining of {'seed' if len(seeds) == 1 else 'seeds'}"
        f" {', '.join(map(str, sorted(seeds)))} has not ended"
        for name, seeds in unfinished.items()
    ]
    return Table(pd.DataFrame(rows, columns=None if rows else ["run_id", "state"]), dropped)


def _repeat(run: Run) -> int:
    return int(run.data.tags.get(REPEAT, 1))


def curves(store: Store, run_ids: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Metrics of runs by epoch: columns run_id, metric, epoch, value."""
    return pd.DataFrame(
        [
            (run_id, metric, entry.step, entry.value)
            for run_id in run_ids
            for metric in metrics
            for entry in stores.history(store, run_id, metric)
        ],
        columns=["run_id", "metric", "epoch", "value"],
    )


def training_seconds(store: Store, trials: Sequence[Mapping[Any, Any]]) -> list[float]:
    """How long each of these rows of `trials` has trained: its epochs at the time of its median
    one, without compiling, as a worker's first epochs also trace and load programs. NaN if that was
    not recorded, 0 of a trial without an epoch."""
    epochs = curves(store, [row["run_id"] for row in trials], EPOCH_SECONDS)
    epochs["net"] = epochs["value"] * np.where(epochs["metric"] == EPOCH_SECONDS[0], 1, -1)
    net = epochs.groupby(["run_id", "epoch"], as_index=False).agg({"net": "sum"})
    medians = net.groupby("run_id").agg({"net": "median"})["net"].to_dict()
    return [
        row["epochs"] * medians.get(row["run_id"], math.nan) if row["epochs"] else 0.0
        for row in trials
    ]


def all_curves(store: Store, study: StudyRun) -> pd.DataFrame:
    """Every metric of every trial and retrained seed, by epoch; also of trials that have not ended.

    Columns: run_id, trial (number; of a retrained seed, that of its trial, NaN if it has none),
    rule, retrained (whether it is a retrained seed), seed (NaN of a trial that has several, whose
    curves are their mean), metric, epoch, value.
    """
    tables = []
    searched = stores.trials(store, study.run.info.experiment_id, study.id)
    for run in [*searched, *stores.retrained(store, study)]:
        tags, again = run.data.tags, OF_STUDY in run.data.tags
        seeds = [int(tags[SEED])] if again else stores.seeds_of(run)
        number = tags.get(OF_TRIAL) if again else tags["trial"]
        table = curves(store, [run.info.run_id], sorted(run.data.metrics))
        if table.empty:
            continue
        table.insert(1, "trial", math.nan if number is None else int(number))
        table.insert(2, "rule", tags["rule"])
        table.insert(3, "retrained", again)
        table.insert(4, "seed", seeds[0] if len(seeds) == 1 else math.nan)
        tables.append(table)
    columns = ["run_id", "trial", "rule", "retrained", "seed", "metric", "epoch", "value"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def called(rule: str, feedback: str, depth: int, dataset: str, trial: float | None) -> str:
    """A configuration in words; `trial` is None or NaN if no trial was selected."""
    usual = feedback in (NO_FEEDBACK, JACOBIAN_FEEDBACK["false"])
    feedback = "" if usual else f", {feedback} feedback"
    number = "" if trial is None or math.isnan(trial) else f" (trial {trial:.0f})"
    return f"{rule}{feedback}, {depth} hidden layer{'s' * (depth != 1)}, {dataset}{number}"


def parameters_of(space: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of `space` (definition) that a trial has, by name, each with its range or
    choices and its `value`."""
    return {
        name: {**described, "value": _value(described, row[SEARCHED + name])}
        for name, described in space["parameters"].items()
        if isinstance(row.get(SEARCHED + name), str)
    }


def _value(described: Mapping[str, Any], text: str) -> Any:
    """A parameter's value, from MLflow's text."""
    if described["kind"] == "categorical":
        return next(choice for choice in described["choices"] if str(choice) == text)
    return int(text) if described["kind"] == "int" else float(text)


def position(parameter: Mapping[str, Any]) -> float:
    """The position of a numeric parameter of `parameters_of` in its range, from 0 (low edge) to 1
    (high edge), on the scale of the search."""
    low, high, value = (parameter[name] for name in ("low", "high", "value"))
    if parameter["log"]:
        low, high, value = map(math.log, (low, high, value))
    return 0.5 if low == high else (value - low) / (high - low)


@mlflow_settings.requests()
def main(arguments: list[str]) -> int:
    options = COMMAND.parse(arguments)
    store = stores.connect(stores.address(options["tracking.uri"]))
    study = stores.find_study(store, options["study"])
    print(stores.said(store, study))
    rows, dropped = trials(store, study)
    counts = ", ".join(f"{n} {state}" for state, n in Counter(rows["state"]).items())
    print(f"study {study.name}: {len(rows)} trials ({counts or 'none'}), {len(dropped)} left out")
    for why in dropped:
        print(f"left out: {why}")
    again, unfinished = retrained(store, study)
    if len(again) or unfinished:
        print(f"retrained: {len(again)} seeds, {len(unfinished)} left out")
        for why in unfinished:
            print(f"left out: {why}")
    if options["out"] is None:
        hidden = ["command", "run_id", "reason", "saw_test", "drawn", "seeds", "host", "device"]
        hidden += [name for name in rows if name.startswith(ALIGNMENT)]
        shown = rows.drop(columns=hidden, errors="ignore")
        shown = shown.rename(columns=lambda name: name.removeprefix(SEARCHED))
        print(shown.to_string(index=False, max_colwidth=24))
    else:
        write_table(Path(options["out"]), rows, "out")
    if options["curves"] is not None:
        write_table(Path(options["curves"]), all_curves(store, study), "curves")
    return 0


def write_table(file: Path, table: pd.DataFrame, option: str) -> None:
    """Writes the file given by `option`, in the form that its name says, as `write`."""
    if file.suffix == ".parquet":
        write(file, table.to_parquet(index=False), option)
    else:
        write(file, table.to_csv(index=False), option)
    print(f"written: {file}")


def write(file: Path, content: str | bytes, option: str = "out") -> None:
    """Writes the file given by `option`, whole or not at all. Raises Refused if that fails."""
    try:
        write_whole(file, content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise Refused(
            f"{option}: given {file}, allowed is a file that can be written ({error.strerror})"
        ) from error


if __name__ == "__main__":
    cli.run(main)
