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
from disinhib import cli
from disinhib.checks import TEXT, Option
from disinhib.errors import InputError, one_line
from disinhib.tuning import environment, mlflow_settings, provenance
from disinhib.tuning.event_log import ENDED, over_seeds

if TYPE_CHECKING:  # it imports jax
    from disinhib.config import RunConfig

RUN = Option("run", cli.REQUIRED, (TEXT[0], "the id of a trial's MLflow run"), "the trial")
COMMAND = cli.Command("analysis.replay", __doc__, (RUN, stores.TRACKING), alone="run")
# Of the machine, not of the training.
MACHINE_METRICS = (
    *("epoch_seconds", "epoch_seconds_sd", "compilations", "compilation_seconds"),
    "peak_memory_mb",
)
SHOWN = 10  # differences

Metrics = dict[tuple[int, str], float]  # by epoch (from 1) and name


class Trial(NamedTuple):
    """A trial, as read from its run."""

    study: str
    number: str
    rule: str
    state: str
    reason: str | None  # why it failed
    epochs: int  # reported
    seeds: tuple[int, ...]  # a lane each
    device: str | None  # its kind, as jax names it; None if it failed in its first epoch
    options: dict[str, Any]
    provenance: dict[str, Any]
    metrics: Metrics


class Outcome(NamedTuple):
    """The result of training again."""

    metrics: Metrics
    reason: str | None


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
    print(
        f"study {trial.study}, trial {trial.number}: {trial.rule}, {trial.state},"
        f" {_count(trial.epochs, 'epoch')}, {seeds}",
        flush=True,
    )
    # As in the trial's worker: the number of threads may change the bits.
    on_cpu = trial.device in (None, "cpu")
    worker = environment.of_worker(trial.provenance["threads"], gpus=0 if on_cpu else 1)
    with environment.variables(worker):
        return _replay(trial)


def _replay(trial: Trial) -> int:
    """In the environment of the trial's worker."""
    threads = trial.provenance["threads"]
    config, device = _prepared(trial)
    now = provenance.collect(config, threads)
    changes = provenance.differences(trial.provenance, now)
    if device != (trial.device or device):
        changes.append(f"device {trial.device}, now {device}")
    for change in changes:
        print(f"warning: {change}", flush=True)
    outcome = train_again(trial, config)
    comparison = compare(trial.metrics, outcome.metrics)
    for names, lacking in (
        (comparison.only_then, "training reports no such metric"),
        (comparison.only_now, "the run has no such metric"),
    ):
        if names:
            print(f"warning: not compared, as {lacking}: {', '.join(names)}")
    problems = _problems(trial, outcome, comparison)
    if not problems:
        compared = [_count(trial.epochs, "epoch")]
        if trial.epochs:
            compared += [_count(len(comparison.names), "metric"), "bit-equal"]
        if trial.reason is not None:
            compared.append(f"then {trial.reason}")
        print(f"the same: {', '.join(compared)}")
        return 0
    print("\n".join(problems))
    cpu, cpu_now = trial.provenance["machine"]["cpu"], now["machine"]["cpu"]
    if cpu != cpu_now:  # XLA compiles for the processor
        print(f"(then on {cpu}, now on {cpu_now}: another processor may give other bits)")
    return 1


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
    try:
        options = yaml.safe_load(stores.text(store, run_id, "config.yaml"))
        about = json.loads(stores.text(store, run_id, "provenance.json"))
        metrics = {
            (metric.step, name): metric.value
            for name in run.data.metrics
            for metric in stores.history(store, run_id, name)
        }
    except Exception as error:  # drivers, sockets, MLflow and its stores of artifacts
        raise Refused(f"{run_id}: cannot read its artifacts ({one_line(error)})") from error
    return Trial(
        study=tags["study"],
        number=tags["trial"],
        rule=tags["rule"],
        state=tags["trial_state"],
        reason=tags.get("reason"),
        epochs=int(tags["epochs"]),
        seeds=tuple(map(int, tags["seeds"].split(","))),
        device=tags.get("device"),
        options=options,
        provenance=about,
        metrics=metrics,
    )


def _prepared(trial: Trial) -> tuple[RunConfig, str]:
    """(the run's configuration with its data loaded, the kind of device). Raises Refused."""
    import jax

    from disinhib import training
    from disinhib.config import parse

    try:
        config = parse(trial.options)
        training.prepare(config)
    except InputError as error:
        raise Refused(f"the trial cannot run here: {error}") from error
    return config, jax.devices()[0].device_kind


def train_again(trial: Trial, config: RunConfig) -> Outcome:
    """Trains the epochs that the trial reported, and for a failed trial also the next one."""
    from disinhib import training

    data = training.prepare(config)
    metrics: Metrics = {}
    try:
        state = training.initial_state(config, trial.seeds)
        for epoch in range(1, trial.epochs + 1):
            state, lanes = training.run_epoch(config, data, state)
            metrics |= {
                (epoch, name): value
                for name, value in over_seeds({n: v.tolist() for n, v in lanes.items()}).items()
            }
        if trial.state == "failed":
            training.run_epoch(config, data, state)
    except training.Diverged as error:
        return Outcome(metrics, f"Diverged: {error}")
    return Outcome(metrics, None)


def compare(then: Metrics, now: Metrics) -> Comparison:
    """Compares the metrics that both have, except MACHINE_METRICS; NaN equals NaN."""
    names_then = {name for _, name in then} - {*MACHINE_METRICS}
    names_now = {name for _, name in now} - {*MACHINE_METRICS}
    both = names_then & names_now
    differing = [
        (epoch, name, then.get((epoch, name)), now.get((epoch, name)))
        for epoch, name in sorted({*then, *now})
        if name in both and not _equal(then.get((epoch, name)), now.get((epoch, name)))
    ]
    return Comparison(
        sorted(both), differing, sorted(names_then - names_now), sorted(names_now - names_then)
    )


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return False
    return one == other or (math.isnan(one) and math.isnan(other))


def _problems(trial: Trial, outcome: Outcome, comparison: Comparison) -> list[str]:
    """The differences between the outcome and the trial, in lines."""
    lines = []
    if outcome.reason != trial.reason:
        lines.append(
            f"different: then it {_end(trial.reason, trial)}, now it {_end(outcome.reason, trial)}"
        )
    if trial.epochs and not comparison.names:
        lines.append("different: the run and training now have no metric in common")
    if comparison.differing:
        lines += _table(comparison)
    return lines


def _end(reason: str | None, trial: Trial) -> str:
    return f"failed ({reason})" if reason else f"went on after {_count(trial.epochs, 'epoch')}"


def _table(comparison: Comparison) -> list[str]:
    differing = comparison.differing
    relative = [
        abs(now - then) / max(abs(then), abs(now))
        for _, _, then, now in differing
        if then is not None and now is not None
    ]
    largest = f", by {max(relative):.3g} at most (relative)" if relative else ""
    width = max(len(name) for _, name, _, _ in differing[:SHOWN])
    return [
        f"different: {_count(len(differing), 'value')}{largest}",
        f"epoch  {'metric':{width}}  {'then':24}now",
        *(
            f"{epoch:5}  {name:{width}}  {then!s:24}{now}"
            for epoch, name, then, now in differing[:SHOWN]
        ),
        *(["..."] if len(differing) > SHOWN else []),
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    cli.run(main)
