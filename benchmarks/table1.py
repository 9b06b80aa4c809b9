"""The published grid in lanes: the seconds of each structure, the test accuracy of each cell.

    python -m benchmarks.table1 [dataset=fmnist] [seeds=10] [epochs=50] [path=FOLDER] [json=FILE]

All seeds of all cells (conf/experiment/table1.yaml) with the same structure and data are trained at
once, as a study's lane server does, but here in this process, without Ray and without records. The
published numbers come from `analysis.retrain experiment=table1`; this is what a device needs for
them. `path` has a folder for each data set, in which its files are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from analysis import configurations
from disinhib import cli, compilation_cache, lanes, numerics, training
from disinhib.checks import COUNT, OPTIONAL_TEXT, Option, one_of
from disinhib.config import RunConfig, parse

FOLDERS = {"mnist": "mnist", "fmnist": "fashion-mnist"}  # in `path`
COMMAND = cli.Command(
    "benchmarks.table1",
    __doc__,
    (
        Option("dataset", ["fmnist"], cli.list_of(one_of(FOLDERS)), "one or several"),
        Option("seeds", 10, COUNT, "of each cell"),
        Option("epochs", 50, COUNT, "of each seed"),
        Option("path", None, OPTIONAL_TEXT, "folder of the data sets' folders; null: downloads"),
        Option("json", None, OPTIONAL_TEXT, "file to write the rows to as well"),
    ),
)


def cells(dataset: str, path: str | None) -> dict[str, RunConfig]:
    """The grid's cells of a data set, by their names."""
    overrides = ["experiment=table1", f"dataset={dataset}"]
    axes, overrides = configurations.chosen_axes(overrides)
    if path is not None:
        overrides.append(f"dataset.path={Path(path, FOLDERS[dataset])}")
    settings = configurations.checked_settings(overrides)
    grid = configurations.of_grid(settings, overrides, axes)
    return {one.words: replace(parse(one.options), test_at_end=True) for one in grid}


def trained(
    together: Mapping[str, RunConfig], seeds: Sequence[int], epochs: int
) -> tuple[list[dict[str, Any]], float, float]:
    """(a row for each seed of each cell, seconds to compile, seconds to train and evaluate)."""
    start = time.perf_counter()
    run = replace(next(iter(together.values())), epochs=epochs)
    data = training.prepare(run)
    slots = lanes.empty(run, len(together) * len(seeds))
    for name, cell in together.items():
        state = training.initial_state(cell, seeds)
        names = [(name, seed) for seed in seeds]
        slots = lanes.join(slots, names, state, cell.hyperparameters)
    for program in training.lowered_programs(run, data, slots.state):
        program.compile()
    compiled, told, diverged = time.perf_counter(), {}, {}
    for _ in range(epochs):
        slots, told = lanes.advance(run, data, slots)
        for slot, lane in enumerate(slots.names):
            if why := training.divergence(run, told[lane], slots.state, slot):
                diverged.setdefault(lane, why)
    rows = [
        {"cell": name, "seed": seed, "diverged": diverged.get((name, seed)), **told[name, seed]}
        for name in together
        for seed in seeds
    ]
    return rows, compiled - start, time.perf_counter() - compiled


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    numerics.set_jax()
    compilation_cache.share()
    console, rows = Console(), []
    print(jax.devices()[0].device_kind)
    seeds, begun = range(options["seeds"]), time.perf_counter()
    times = Table("structure", "lanes", "compile s", "train s", "lane-epochs/s", box=None)
    scores = Table("cell", "test accuracy", "sd", "seeds", "diverged", box=None)
    for dataset in options["dataset"]:
        grid = cells(dataset, options["path"])
        for structure in dict.fromkeys(run.architecture for run in grid.values()):
            together = {name: run for name, run in grid.items() if run.architecture == structure}
            found, compiling, training_s = trained(together, seeds, options["epochs"])
            words = (
                f"{dataset}, {structure.hidden_layers} x {structure.sizes[1]}, {structure.family}"
            )
            speed = len(found) * options["epochs"] / training_s
            seconds = (f"{compiling:.1f}", f"{training_s:.1f}", f"{speed:.1f}")
            times.add_row(words, str(len(found)), *seconds)
            for name in together:
                own = [row for row in found if row["cell"] == name]
                whole = [row["test_accuracy"] for row in own if row["diverged"] is None]
                mean = f"{np.mean(whole):.2f}" if whole else ""
                spread = f"{np.std(whole, ddof=1):.2f}" if len(whole) > 1 else ""
                scores.add_row(name, mean, spread, str(len(whole)), str(len(own) - len(whole)))
            rows += found
            if options["json"]:
                Path(options["json"]).write_text(json.dumps(rows, indent=1))
            console.print(words, *seconds)
    console.print(times)
    console.print(scores)
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    cli.run(main)
