"""Microseconds a sample of one training step: rules, depths and solvers in one process.

    python -m benchmarks.step [repeats=7] [steps=20] [json=FILE]

Fashion-MNIST shapes (784 inputs, 10 classes), hidden layers of 256, batch 100, published
defaults; the images are random, which costs the same. Each row is a compiled scan of steps,
exactly the one that trains. Rows take turns, and medians over `repeats` rounds are compared,
so that a machine that drifts changes all of them. `ode` is the published way to the steady state
(Tsit5 with its tolerances and its steady-state event); bp runs on the plain MLP.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from disinhib import cli, numerics, training
from disinhib.checks import COUNT, OPTIONAL_TEXT, Option
from disinhib.config import RunConfig, published
from disinhib.hyperparameters import Architecture, Newton, Ode
from disinhib.rules import RULES

BATCH = 100
ODE_STEPS = 2  # it is that slow
REPEATS = Option("repeats", 7, COUNT, "rounds")
STEPS = Option("steps", 20, COUNT, "training steps in a round")
JSON = Option("json", None, OPTIONAL_TEXT, "file to write the rows to as well")
COMMAND = cli.Command("benchmarks.step", __doc__, (REPEATS, STEPS, JSON))


class Row(NamedTuple):
    rule: str
    hidden: int
    solver: str
    microseconds: float  # a sample, median
    to_bp: float
    ode_to_newton: float | None


def architecture(rule: str, hidden: int, solver: Newton | Ode) -> Architecture:
    return Architecture(
        RULES[rule].family.name,
        next(iter(RULES[rule].circuits)),
        (784, *[256] * hidden, 10),
        batch_size=BATCH,
        solver=solver,
    )


def random_data(steps: int) -> training.Data:
    """Images with Fashion-MNIST's share of dark pixels, enough for `steps` batches."""
    key_dark, key_light, key_label = jax.random.split(jax.random.key(0), 3)
    shape = (steps * BATCH, 784)
    light = jax.random.randint(key_light, shape, 1, 256)
    images = jnp.where(jax.random.bernoulli(key_dark, 0.5, shape), light, 0).astype(jnp.uint8)
    labels = jax.random.randint(key_label, shape[:1], 0, 10)
    split = training.Images(images, labels)
    return training.Data(split, split, split, split, jnp.asarray(1 / 255, float))


def prepared(
    rule: str, hidden: int, solver: Newton | Ode, steps: int, lanes: int = 1
) -> Callable[[], float]:
    """A function that runs `steps` training steps of every lane, compiled, and returns seconds a
    step (of all lanes)."""
    structure = architecture(rule, hidden, solver)
    hyper = published(structure, rule)
    config = RunConfig(
        *(rule, structure, hyper, "fmnist", None, 0.1, None, 1, 0, 0.0),
        *(False, False, "auto", 0, 0.9, 1e3),
    )
    state, hyper = training.initial_state(config, range(lanes)), training.for_lanes(hyper, lanes)
    data = random_data(steps)

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(training.programs().epoch.run(structure, (state, hyper), data))
        return (time.perf_counter() - start) / steps

    run()
    return run


def measure(repeats: int, steps: int) -> list[Row]:
    """Every rule, depth and solver; the slow ode has fewer rounds and steps."""
    runs, seconds = {}, {}
    for hidden in (1, 3):
        runs["bp", hidden, "newton"] = prepared("bp", hidden, Newton(), steps)
        for rule in ("exact-inv", "lin-thresh"):
            runs[rule, hidden, "newton"] = prepared(rule, hidden, Newton(), steps)
            runs[rule, hidden, "ode"] = prepared(rule, hidden, Ode(), ODE_STEPS)
    for _ in range(repeats):
        for key, run in runs.items():
            seconds.setdefault(key, []).append(run())
    medians = {key: 1e6 * statistics.median(values) / BATCH for key, values in seconds.items()}
    return [
        Row(
            rule,
            hidden,
            "none" if rule == "bp" else solver,
            value,
            value / medians["bp", hidden, "newton"],
            medians[rule, hidden, "ode"] / value
            if (rule, hidden, "ode") in medians and solver == "newton"
            else None,
        )
        for (rule, hidden, solver), value in medians.items()
    ]


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    numerics.set_jax()
    rows = measure(options["repeats"], options["steps"])
    device = jax.devices()[0]
    table = Table(title=f"one training step, batch {BATCH}, layers of 256, {device.device_kind}")
    for name in ("rule", "hidden layers", "solver", "µs a sample", "to bp", "ode / newton"):
        table.add_column(name, justify="left" if name in ("rule", "solver") else "right")
    for row in rows:
        ratio = "" if row.ode_to_newton is None else f"{row.ode_to_newton:.0f}"
        table.add_row(
            row.rule,
            str(row.hidden),
            row.solver,
            f"{row.microseconds:.1f}",
            f"{row.to_bp:.1f}",
            ratio,
        )
    Console().print(table)
    if options["json"]:
        content = {"device": device.device_kind, "rows": [row._asdict() for row in rows]}
        with open(options["json"], "w") as file:
            json.dump(content, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
