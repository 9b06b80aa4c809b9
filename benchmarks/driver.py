"""What the driver computes for each trial and each epoch that a trial reports.

    python -m benchmarks.driver [trials=200] [epochs=11] [lanes=1] [stretch=1]

Real studies of trials that train nothing, with Ray, the event log, Optuna's store and MLflow (in
SQLite): CPU time of the driver's process, all its threads, from the first trial to the last record
delivered. Two studies that differ in their epochs tell trial and epoch apart. With `lanes`, so many
trials run at once for each core; with `stretch`, each report has so many epochs, as those of trials
whose epochs are shorter than a second.
"""

import json
import tempfile
import time
from collections.abc import Sequence

from ray import tune
from ray.air.constants import TRAINING_ITERATION
from rich.console import Console
from rich.table import Table

from disinhib import cli
from disinhib.checks import COUNT, Option, is_whole
from disinhib.tuning import options, study
from disinhib.tuning.worker import REPORT

COMMAND = cli.Command(
    "benchmarks.driver",
    __doc__,
    (
        Option("trials", 200, COUNT, "of each study"),
        Option(
            "epochs",
            11,
            (lambda n: is_whole(n) and n > 1, "a whole number of at least 2"),
            "of a trial in the second study; in the first it has one",
        ),
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


def cpu_seconds(trials: int, epochs: int, lanes: int = 1, stretch: int = 1) -> tuple[float, float]:
    """(CPU seconds of the driver, wall seconds) of a study without its start and end."""
    measured: list[tuple[float, float]] = []

    class Watch(tune.Callback):
        def on_trial_start(self, **_):
            if not measured:
                measured.append((time.process_time(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        described = [f"trials={trials}", f"epochs={epochs}", "scheduler=none", f"out_dir={folder}"]
        asked = options.compose([*described, f"cluster.lanes={lanes}"])
        finished = study.run(asked, Console(quiet=True), instant(stretch), [Watch()])
        assert len(finished.records) == trials and not finished.undelivered
    (cpu, wall), *_ = measured
    return time.process_time() - cpu, time.perf_counter() - wall


def main(arguments: Sequence[str]) -> None:
    trials, most_epochs, lanes, stretch = COMMAND.parse(arguments).values()
    few, few_wall = cpu_seconds(trials, 1, lanes, stretch)
    many, many_wall = cpu_seconds(trials, most_epochs, lanes, stretch)
    epoch = (many - few) / trials / (most_epochs - 1)
    table = Table("driver CPU", "ms", "trials", "epochs", "CPU s", "wall s", box=None)
    trial = few / trials - epoch
    for name, value, epochs, cpu, wall in (
        ("a trial", trial, 1, few, few_wall),
        ("an epoch", epoch, most_epochs, many, many_wall),
    ):
        table.add_row(
            name, f"{1e3 * value:.1f}", str(trials), str(epochs), f"{cpu:.1f}", f"{wall:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
