"""Trials an hour of a whole study, by how its trials share a device.

    python -m benchmarks.packing [gpu=false] [trials=48] [alone=48] [epochs=16] [lanes=8]
                                 [fmnist=FOLDER]

The same study over all rules, with successive halving, once in each way, one after another: a trial
a device (on a CPU: a core), four trials that share a GPU, and lanes. Each begins without compiled
programs, as a first study does. On digits or, with the folder of its files, on Fashion-MNIST (3 x
256). Seconds are those of the study, with the start of Ray; `start s` of them are before every rule
has reported an epoch, or after the last report. `epochs an hour` leaves them out, with the epochs
that were reported by then, as a long study would. For that rate, the studies without lanes may have
fewer trials (`alone`); trials an hour compare studies of as many trials only, as more of them are
pruned earlier.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from disinhib import cli, compilation_cache
from disinhib.checks import COUNT, FLAG, OPTIONAL_TEXT, Option
from disinhib.tuning import environment, options, study
from disinhib.tuning.event_log import EpochDone, EventLog

COMMAND = cli.Command(
    "benchmarks.packing",
    __doc__,
    (
        Option("gpu", False, FLAG, "on GPUs, else on the CPU"),
        Option("trials", 48, COUNT, "of the study in lanes"),
        Option("alone", 48, COUNT, "trials of each other study"),
        Option("epochs", 16, COUNT, "budget of a trial"),
        Option("lanes", 8, COUNT, "of a server"),
        Option("fmnist", None, OPTIONAL_TEXT, "folder of Fashion-MNIST; null: digits"),
    ),
)


class Measured(NamedTuple):
    seconds: float
    start: float  # s before every rule has reported an epoch, or after the last report
    epochs: int
    since: int  # epochs of these that were reported after the start


def ways(gpu: bool, lanes: int) -> dict[str, list[str]]:
    """What a study is given, by its name in the table."""
    alone, packed = ["cluster.lanes=1"], [f"cluster.lanes={lanes}"]
    if not gpu:
        return {"a trial a core": alone, f"{lanes} lanes a core": packed}
    share = lambda of_gpu: f"cluster.gpus_per_trial={of_gpu}"
    return {
        "a trial a GPU": [*alone, share(1)],
        "four trials a GPU": [*alone, share(0.25)],
        f"{lanes} lanes a GPU": [*packed, share(1)],
    }


def measured(overrides: Sequence[str]) -> Measured:
    """A study that begins without compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {compilation_cache.FOLDER_VARIABLE: f"{folder}/programs"}
        with environment.variables(programs):
            asked = options.compose([*overrides, f"out_dir={folder}/out", "study=packing"])
            finished = study.run(asked, Console(quiet=True))
        if not finished.whole:
            sys.exit("interrupted: a part of a study has no rate")
        with closing(EventLog(finished.job.folder)) as log:
            reports = [e for e in log.events() if isinstance(e.event, EpochDone)]
    first: dict[str, float] = {}  # report of each rule
    for report in reports:
        first.setdefault(finished.records[report.event.trial].config["rule"], report.time)
    running, end = max(first.values()), reports[-1].time  # but for its farewells
    since = sum(report.time > running for report in reports)
    return Measured(finished.seconds, finished.seconds - (end - running), len(reports), since)


def main(arguments: Sequence[str]) -> None:
    given = COMMAND.parse(arguments)
    common = [f"epochs={given['epochs']}"]
    if given["fmnist"] is not None:
        common += ["dataset=fmnist", f"dataset.path={given['fmnist']}", "batchsize=100"]
        common += ["model.vf.nb_hidden=3"]
    rates = ("trials an hour", "gain", "epochs an hour", "gain")
    table = Table("trials share", "trials", "epochs", "s", "start s", *rates, box=None)
    first: tuple[float, float] | None = None
    for name, own in ways(given["gpu"], given["lanes"]).items():
        trials = given["trials" if "lanes" in name else "alone"]
        found = measured([*common, *own, f"trials={trials}"])
        of_trials = 3600 * trials / found.seconds
        of_epochs = 3600 * found.since / (found.seconds - found.start)
        first = first or (of_trials, of_epochs)
        gains = of_trials / first[0], of_epochs / first[1]
        counts = (trials, found.epochs, round(found.seconds), round(found.start))
        numbers = (f"{of_trials:.0f}", f"{gains[0]:.2f}", f"{of_epochs:.0f}", f"{gains[1]:.2f}")
        table.add_row(name, *map(str, counts), *numbers)
        Console().print(table)  # each time, as a machine may be lent for a while only


if __name__ == "__main__":
    cli.run(main)
