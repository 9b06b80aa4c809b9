"""What a trial costs besides its epochs: `python -m benchmarks.trial_overhead [trials=30]`.

A real study (digits, published network sizes, Ray, Optuna, MLflow, reused workers) with a clock in
its workers. A trial's first epoch ends some seconds after its worker was free for it: since the
last epoch of the trial before it, or, for a worker's first trial, since its process was started.
Subtracted is the epoch itself: the median of the trial's later epochs. What remains is everything
else: the event log, asking Optuna, composing and checking options, Ray's messages, a fresh state,
and, for the first trial of a structure in a worker, compiling. A trial that fails before its second
epoch has no such median: it is named and left out.

Bar: later trials of a structure under 0.5 s and without a compilation.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from ray import tune
from rich.console import Console
from rich.table import Table

from disinhib import cli
from disinhib.checks import COUNT, OPTIONAL_TEXT, Option
from disinhib.tuning import engine, options as study_options, study
from disinhib.tuning.worker import REPORT, TrainingTrial

BAR_SECONDS = 0.5
COMMAND = cli.Command(
    "benchmarks.trial_overhead",
    __doc__,
    (
        Option("trials", 30, COUNT, "of three rules in turn"),
        Option("json", None, OPTIONAL_TEXT, "file to write the numbers to as well"),
    ),
)


class ClockedTrial(TrainingTrial):
    """Reports when its worker was free for it, when its first epoch was over, and the CPU time."""

    def setup(self, config: dict) -> None:
        self.free_since = psutil.Process().create_time()
        super().setup(config)

    def step(self) -> dict:
        start, cpu = time.time(), time.process_time()
        result = super().step()
        now = time.time()
        clocked = {
            "seconds": now - start,
            "since_free": now - self.free_since,
            "cores": (time.process_time() - cpu) / (now - start),
        }
        self.free_since = now
        return {**result, "clocked": clocked}


class Recorder(tune.Callback):
    """Keeps every epoch's clocks in the order of their arrival."""

    def __init__(self):
        self.epochs: dict[int, list[dict[str, Any]]] = {}

    def on_trial_result(self, *, trial, result, **_) -> None:
        if REPORT not in result:  # it failed
            return
        (compilations,) = json.loads(result[REPORT])["epochs"][0]["metrics"]["compilations"]
        # The architecture names all that is static: whatever else differs shares its program.
        about = {"pid": result["pid"], "rule": trial.config["rule"]}
        about["structure"] = structure(trial.config["options"])
        about["compilations"] = int(compilations)
        epoch = result["clocked"] | about
        self.epochs.setdefault(trial.config["number"], []).append(epoch)


def structure(training_options: dict) -> str:
    from disinhib import config

    return repr(config.parse(training_options).architecture)


class Overhead(NamedTuple):
    """Of one trial, in seconds; `first` of its structure in its worker."""

    number: int
    rule: str
    first: bool
    to_first_epoch: float
    epoch: float
    compilations: int

    @property
    def excess(self) -> float:
        return self.to_first_epoch - self.epoch


def overheads(recorded: dict[int, list[dict[str, Any]]]) -> list[Overhead]:
    """Of trials with two epochs or more, in the order in which their first ones ended."""
    known, measured = set(), []
    for number, epochs in recorded.items():
        begin, later = epochs[0], [epoch["seconds"] for epoch in epochs[1:]]
        key = (begin["pid"], begin["structure"])
        if later:
            measured.append(
                Overhead(
                    number,
                    begin["rule"],
                    key not in known,
                    begin["since_free"],
                    statistics.median(later),
                    sum(epoch["compilations"] for epoch in epochs),
                )
            )
        known.add(key)
    return measured


COLUMNS = {
    "s to first epoch": lambda one: one.to_first_epoch,
    "s an epoch": lambda one: one.epoch,
    "excess": lambda one: one.excess,
}


def table(measured: list[Overhead]) -> Table:
    """Medians over the trials of a kind, and the largest excess."""
    drawn = Table("rule", "", "trials", *COLUMNS, "most", "compiled", box=None)
    for rule in sorted({one.rule for one in measured}):
        for first, kind in ((True, "first"), (False, "later")):
            own = [one for one in measured if (one.rule, one.first) == (rule, first)]
            if not own:
                continue
            medians = [statistics.median(map(value, own)) for value in COLUMNS.values()]
            numbers = [f"{value:.2f}" for value in (*medians, max(one.excess for one in own))]
            compiled = sum(one.compilations for one in own)
            drawn.add_row(rule, kind, str(len(own)), *numbers, str(compiled))
    return drawn


def main(arguments: Sequence[str]) -> int:
    options = COMMAND.parse(arguments)
    recorder, console = Recorder(), Console()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"  # none from other studies
        asked = study_options.compose(
            [f"trials={options['trials']}", "epochs=5", "scheduler=none", f"out_dir={folder}"]
        )
        engine.STRETCH_SECONDS = 0.0  # each epoch is a step, which is clocked
        records = study.run(asked, console, ClockedTrial, [recorder]).records
    measured = overheads(recorder.epochs)
    later = [one for one in measured if not one.first]
    excess, compiled = [one.excess for one in later], sum(one.compilations for one in later)
    cores = [epoch["cores"] for epochs in recorder.epochs.values() for epoch in epochs[1:]]
    say = partial(console.print, soft_wrap=True, highlight=False)
    console.print(table(measured))
    if left_out := {record.number for record in records} - {one.number for one in measured}:
        say(f"failed before their second epoch and left out: trials {sorted(left_out)}")
    if not later:
        say("no trial was the second of its structure in its worker: take more trials")
        return 1
    met = max(excess) < BAR_SECONDS and compiled == 0
    say(f"cores that a running epoch keeps busy: at most {max(cores):.2f}")
    say(
        f"later trials: excess {statistics.median(excess):.2f} s (median), at most"
        f" {max(excess):.2f} s, {compiled} compilations; bar: {BAR_SECONDS} s and none:"
        f" {'met' if met else 'missed'}"
    )
    if options["json"]:
        trials = [one._asdict() | {"excess": one.excess} for one in measured]
        Path(options["json"]).write_text(json.dumps(trials, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    cli.run(main)
