"""`python -m analysis.replay RUN_ID`: trains a trial again from its MLflow run.

Prints whether every metric of every epoch is the same, bit for bit (exit code 0), or the
differences (1); on a CPU it should be the same. Needs only the run, which has the options, seeds
and threads. Warns of changes in code, packages and data since then.

Nothing here imports jax before the environment is that of a worker: XLA sizes its thread pool once,
when it starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from analysis import store as stores
from analysis.store import Refused
from disinhib import cli, numerics
from disinhib.checks import TEXT, Option
from disinhib.errors import InputError
from disinhib.tuning import environment, mlflow_settings, provenance
from disinhib.tuning.event_log import ENDED, FAILED, over_seeds

if TYPE_CHECKING:  # it imports jax
    from disinhib.config import RunConfig

RUN = Option("run", cli.REQUIRED, (TEXT[0], "the id of a trial's MLflow run"), "the trial")
COMMAND = cli.Command("analysis.replay", __doc__, (RUN, stores.TRACKING), alone=("run",))
# Of the machine, not of the training.
MACHINE_METRICS = {
    *("epoch_seconds", "epoch_seconds_sd", "compilations", "compilation_seconds"),
    "peak_memory_mb",
}
SHOWN = 10  # differences

Metrics = dict[tuple[int, str], float]  # by epoch (from 1) and name


class Trial(NamedTuple):
    """A trial, as read from its run."""

    tags: dict[str, str]  # no `reason` unless it failed, no `device` if in its first epoch
    seeds: tuple[int, ...]  # a lane each
    epochs: int  # reported
    options: dict[str, Any]
    provenance: dict[str, Any]
    metrics: Metrics


class Comparison(NamedTuple):
    """The metrics of two trainings compared; a missing value counts as a difference, as None."""

    names: list[str]  # compared
    differing: list[tuple[int, str, float | None, float | None]]  # epoch, name, then, now
    only_then: list[str]  # names
    only_now: list[str]


@mlflow_settings.requests()
def main(arguments: Sequence[str]) -> int:
    """Replays one trial and prints the comparison; returns the exit code. Raises Refused."""
    options = COMMAND.parse(arguments)
    trial = read(options["run"], stores.address(options["tracking.uri"]))
    seeds = f"seed{'s' * (len(trial.seeds) > 1)} {', '.join(map(str, trial.seeds))}"
    tags = trial.tags
    print(
        f"study {tags['study']}, trial {tags['trial']}: {tags['rule']}, {tags['trial_state']},"
        f" {_count(trial.epochs, 'epoch')}, {seeds}",
        flush=True,
    )
    # As in the trial's worker: the number of threads may change the bits.
    gpus = int(tags.get("device", "cpu") != "cpu")
    worker = environment.of_worker(trial.provenance["threads"], gpus)
    worker |= numerics.of_worker(trial.provenance.get("numerics", {}))
    for line in numerics.ignored():
        print(f"warning: {line}")
    with environment.variables(worker):
        return _replay(trial)


def read(run_id: str, uri: str) -> Trial:
    """The trial of an MLflow run. Raises Refused."""
    store = stores.connect(uri)
    run = stores.run(store, run_id)
    tags = run.data.tags
    for name in ("study", "trial", "rule", "seeds", "trial_state", "epochs"):
        if name not in tags:
            raise Refused(f"{run_id}: not a trial of a study, or not ended (it has no tag {name})")
    if tags["trial_state"] not in ENDED:
        raise Refused(f"{run_id}: is {tags['trial_state']}, needed is one of {', '.join(ENDED)}")
    with stores.refusing(f"{run_id}: cannot read its artifacts"):
        return Trial(
            tags=tags,
            seeds=stores.seeds_of(run),
            epochs=int(tags["epochs"]),
            options=yaml.safe_load(stores.text(store, run_id, "config.yaml")),
            provenance=json.loads(stores.text(store, run_id, "provenance.json")),
            metrics={
                (metric.step, name): metric.value
                for name in run.data.metrics
                for metric in stores.history(store, run_id, name)
            },
        )


def _replay(trial: Trial) -> int:
    """In the environment of the trial's worker. Raises Refused if the trial cannot run here."""
    import jax

    from disinhib import config, training

    numerics.set_jax()
    stores.load_plugins(trial.provenance)
    try:
        options = config.parse(trial.options)
        training.prepare(options)
    except InputError as error:
        raise Refused(f"the trial cannot run here: {error}") from error
    device = jax.devices()[0].device_kind
    now = provenance.collect(options, trial.provenance["threads"])
    changes = provenance.differences(trial.provenance, now)
    before = trial.tags.get("device", device)
    if device != before:
        changes.append(f"device {before}, now {device}")
    for change in changes:
        print(f"warning: {change}", flush=True)
    metrics, reason = train_again(trial, options)
    comparison = compare(trial.metrics, metrics)
    for names, lacking in (
        (comparison.only_then, "training reports no such metric"),
        (comparison.only_now, "the run has no such metric"),
    ):
        if names:
            print(f"warning: not compared, as {lacking}: {', '.join(names)}")
    epochs, reason_then = _count(trial.epochs, "epoch"), trial.tags.get("reason")
    end = lambda why: f"failed ({why})" if why else f"went on after {epochs}"
    problems = []
    if reason != reason_then:
        problems.append(f"different: then it {end(reason_then)}, now it {end(reason)}")
    if trial.epochs and not comparison.names:
        problems.append("different: the run and training now have no metric in common")
    problems += _table(comparison.differing)
    if not problems:
        compared = f", {_count(len(comparison.names), 'metric')}, bit-equal" if trial.epochs else ""
        print(f"the same: {epochs}{compared}" + (f", then {reason}" if reason else ""))
        return 0
    print("\n".join(problems))
    if trial.tags.get("lanes", "1") != "1" and trial.tags["device"] != "cpu":
        print("(then one of several lanes of a GPU, now alone: the last bits may differ)")
    cpu, cpu_now = trial.provenance["machine"]["cpu"], now["machine"]["cpu"]
    if cpu != cpu_now:  # XLA compiles for the processor
        print(f"(then on {cpu}, now on {cpu_now}: another processor may give other bits)")
    return 1


def train_again(trial: Trial, config: RunConfig) -> tuple[Metrics, str | None]:
    """Trains the epochs that the trial reported, and for a failed trial also the next one: their
    metrics, and why it failed."""
    from disinhib import training

    data = training.prepare(config)
    metrics: Metrics = {}
    try:
        state = training.initial_state(config, trial.seeds)
        for epoch in range(1, trial.epochs + 1):
            state, lanes = training.run_epoch(config, data, state)
            values = over_seeds({name: lane.tolist() for name, lane in lanes.items()})
            metrics |= {(epoch, name): value for name, value in values.items()}
        if trial.tags["trial_state"] == FAILED:
            training.run_epoch(config, data, state)
    except training.Diverged as error:
        return metrics, f"Diverged: {error}"
    return metrics, None


def compare(then: Metrics, now: Metrics) -> Comparison:
    """Compares the metrics that both have, except MACHINE_METRICS; NaN equals NaN."""
    names_then = {name for _, name in then} - MACHINE_METRICS
    names_now = {name for _, name in now} - MACHINE_METRICS
    both = names_then & names_now
    pairs = [(*key, then.get(key), now.get(key)) for key in sorted({*then, *now})]
    differing = [pair for pair in pairs if pair[1] in both and not _equal(*pair[2:])]
    return Comparison(
        sorted(both), differing, sorted(names_then - names_now), sorted(names_now - names_then)
    )


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return False
    return one == other or (math.isnan(one) and math.isnan(other))


def _table(differing: Sequence[tuple[int, str, float | None, float | None]]) -> list[str]:
    """The first values that differ, and by how much all do, in lines; none if none does."""
    if not differing:
        return []
    relative = [
        abs(now - then) / max(abs(then), abs(now))
        for _, _, then, now in differing
        if then is not None and now is not None
    ]
    largest = f", by {max(relative):.3g} at most (relative)" if relative else ""
    shown = differing[:SHOWN]
    width = max(len(name) for _, name, _, _ in shown)
    return [
        f"different: {_count(len(differing), 'value')}{largest}",
        f"epoch  {'metric':{width}}  {'then':24}now",
        *(f"{epoch:5}  {name:{width}}  {then!s:24}{now}" for epoch, name, then, now in shown),
        *(["..."] if len(differing) > SHOWN else []),
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    cli.run(main)
