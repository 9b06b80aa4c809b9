"""What the driver computes for each trial and each epoch that a trial reports.

    python -m benchmarks.driver [trials=200] [epochs=11] [lanes=1] [stretch=1]

Real studies of trials that train nothing, with Ray, the event log, Optuna's store and MLflow (in
SQLite): CPU time of the driver's process, all its threads, and of MLflow's beside it, from the
first trial to the last record delivered. Two studies that differ in their epochs tell trial and
epoch apart. With `lanes`, so many trials run at once for each core; with `stretch`, each report has
so many epochs, as those of trials whose epochs are short (`engine.STRETCH_SECONDS`).
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ray import tune
from ray.air.constants import TRAINING_ITERATION
from rich.console import Console
from rich.table import Table

from disinhib import cli
from disinhib.checks import COUNT, Option
from disinhib.tuning import engine, mlflow_process, options, study
from disinhib.tuning.worker import REPORT

COMMAND = cli.Command(
    "benchmarks.driver",
    __doc__,
    (
        Option("trials", 200, COUNT, "of each study"),
        Option("epochs", 11, COUNT, "of a trial in the second study; the first has one"),
        Option("lanes", 1, COUNT, "cluster.lanes of the studies"),
        Option("stretch", 1, COUNT, "epochs of a report"),
    ),
)
NAMES = [f"metric_{n}" for n in range(14)]  # as many as training has


def instant(stretch: int = 1):
    """A trainable whose epochs take no time. (A local class: Ray sends it to the workers.)"""

    class Instant(tune.Trainable):
        def setup(self, config):
            self.reset_config(config)

        def reset_config(self, new_config):
            self.epoch, self.trial = 0, new_config
            return True

        def step(self):
            score = (self.trial["number"] * 7919) % 1000 / 10
            first, self.epoch = self.epoch, min(self.epoch + stretch, self.trial["epochs"])
            reports = [
                {
                    "epoch": epoch,
                    "metrics": {name: [score] for name in (*NAMES, "valid_accuracy")},
                    "place": {"device": "cpu", "host": "here"},
                    "diverged": {},
                }
                for epoch in range(first + 1, self.epoch + 1)
            ]
            text = json.dumps({"epochs": reports})
            return {REPORT: text, TRAINING_ITERATION: self.epoch}

    return Instant


class Seconds(NamedTuple):
    driver: float  # of CPU
    mlflow: float
    wall: float
    disk: float  # bytes in the study's folder, and in MLflow's store


class Noted(mlflow_process.MlflowProcess):
    """Leaves the CPU seconds of its last answer behind."""

    seconds: ClassVar = 0.0

    def call(self, name: str, *arguments: Any) -> Any:
        answer = super().call(name, *arguments)
        Noted.seconds = self.cpu_seconds
        return answer


class Watch(tune.Callback):
    """Notes the seconds when the first trial starts."""

    begun: ClassVar[list[tuple[float, float, float]]] = []

    def on_trial_start(self, **_: Any) -> None:
        if not self.begun:
            self.begun.append((time.process_time(), Noted.seconds, time.perf_counter()))


def measured(trials: int, epochs: int, lanes: int = 1, stretch: int = 1) -> Seconds:
    """Of a study without its start and end."""
    Watch.begun.clear()
    engine.MlflowProcess = Noted
    with tempfile.TemporaryDirectory() as folder:
        described = [f"trials={trials}", f"epochs={epochs}", "scheduler=none", f"out_dir={folder}"]
        asked = options.compose([*described, f"cluster.lanes={lanes}"])
        finished = study.run(asked, Console(quiet=True), instant(stretch), [Watch()])
        ended = time.process_time(), Noted.seconds, time.perf_counter()
        assert len(finished.records) == trials and not finished.undelivered
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        disk = sum(file.stat().st_size for file in files)
    driver, mlflow, wall = (b - a for a, b in zip(Watch.begun[0], ended, strict=True))
    return Seconds(driver, mlflow, wall, disk)


def main(arguments: Sequence[str]) -> None:
    trials, most_epochs, lanes, stretch = COMMAND.parse(arguments).values()
    few = measured(trials, 1, lanes, stretch)
    rows = [("a trial", few, [cost / trials for cost in few], 1)]
    if most_epochs > 1:
        many = measured(trials, most_epochs, lanes, stretch)
        further = trials * (most_epochs - 1)
        costs = [(b - a) / further for a, b in zip(few, many, strict=True)]
        rows.append(("an epoch", many, costs, most_epochs))
    columns = ("driver, CPU ms", "MLflow, CPU ms", "kB on disk", "trials", "epochs", "wall s")
    table = Table("", *columns, box=None)
    for name, whole, (driver, mlflow, _, disk), epochs in rows:
        cells = (f"{1e3 * driver:.2f}", f"{1e3 * mlflow:.2f}", f"{disk / 1e3:.1f}")
        table.add_row(name, *cells, str(trials), str(epochs), f"{whole.wall:.1f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
