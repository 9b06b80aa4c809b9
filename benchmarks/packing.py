"""Trials an hour of a whole study, by how its trials share a device.

    python -m benchmarks.packing [gpu=false] [trials=48] [epochs=16] [lanes=8]

The same study over all rules, with successive halving, once in each way, one after another: a trial
a device (on a CPU: a core), four trials that share a GPU, and lanes. Each begins without compiled
programs, as a first study does. Seconds are those of the study, with the start of Ray.
"""

import tempfile
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from disinhib import cli, compilation_cache
from disinhib.checks import COUNT, FLAG, Option
from disinhib.tuning import environment, options, study

COMMAND = cli.Command(
    "benchmarks.packing",
    __doc__,
    (
        Option("gpu", False, FLAG, "on GPUs, else on the CPU"),
        Option("trials", 48, COUNT, "of each study"),
        Option("epochs", 16, COUNT, "budget of a trial"),
        Option("lanes", 8, COUNT, "of a server"),
    ),
)


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


def seconds(overrides: Sequence[str]) -> tuple[float, int]:
    """(seconds, epochs trained) of a study that begins without compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        programs = {compilation_cache.FOLDER_VARIABLE: f"{folder}/programs"}
        with environment.variables(programs):
            asked = options.compose([*overrides, f"out_dir={folder}/out", "study=packing"])
            finished = study.run(asked, Console(quiet=True))
    return finished.seconds, sum(record.epochs for record in finished.records)


def main(arguments: Sequence[str]) -> None:
    gpu, trials, epochs, lanes = COMMAND.parse(arguments).values()
    table = Table("trials share", "s", "trials an hour", "epochs", "gain", box=None)
    first = None
    for name, given in ways(gpu, lanes).items():
        took, trained = seconds([f"trials={trials}", f"epochs={epochs}", *given])
        first = first or took
        rate = f"{3600 * trials / took:.0f}"
        table.add_row(name, f"{took:.0f}", rate, str(trained), f"{first / took:.2f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
