"""What a lane costs: one structure trained in 1, 2, 4 ... lanes at once on the device at hand.

    python -m benchmarks.lanes [lanes=1,2,4,8,16,32,64,128] [steps=100] [repeats=3] [json=FILE]

Layers of 3 x 256 on Fashion-MNIST's shape and a layer of 64 on the digits', batch 100, published
defaults, random images (which cost the same). For each number of lanes: the seconds of an epoch of
54,000 (digits: 1,150) images, from `steps` compiled steps, median of `repeats`; epochs of single
lanes a second; memory, by XLA's analysis; and kernels a step. A kernel is what XLA launches: a
fusion, a product, a sort, a copy. Those of the loops in a step are given for one iteration of each.

Needs jax, flax, optax, diffrax and numpy only, and no data, to be taken to a machine with a GPU.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from disinhib import cli, lanes, numerics, training
from disinhib.checks import COUNT, OPTIONAL_TEXT, Option
from disinhib.config import RunConfig, published
from disinhib.hyperparameters import Architecture
from disinhib.rules import RULES

BATCH = 100
COMMAND = cli.Command(
    "benchmarks.lanes",
    __doc__,
    (
        Option("lanes", [2**n for n in range(8)], cli.list_of(COUNT), "at once"),
        Option("steps", 100, COUNT, "training steps of a measurement"),
        Option("repeats", 3, COUNT, "measurements"),
        Option("json", None, OPTIONAL_TEXT, "file to write the rows to as well"),
    ),
)


class Network(NamedTuple):
    name: str
    sizes: tuple[int, ...]
    images: int  # of an epoch


NETWORKS = (
    Network("3 x 256", (784, 256, 256, 256, 10), 54_000),
    Network("digits", (64, 64, 10), 1_150),
)
COLUMNS = ("rule", "network", "lanes", "s/epoch", "lane-epochs/s", "MB", "compile s", "kernels")


def row(rule: str, network: Network, count: int, steps: int, repeats: int) -> list[Any]:
    circuit = next(iter(RULES[rule].circuits))
    structure = Architecture(RULES[rule].family.name, circuit, network.sizes, batch_size=BATCH)
    hyper = published(structure, rule)
    config = RunConfig(
        *(rule, structure, hyper, "none", None, 0.1, None, 1, 0, 0.0),
        *(False, False, "auto", 0, 0.0, 1e9),
    )
    data = random_data(network, steps)
    slots = lanes.empty(config, count)
    slots = lanes.join(slots, range(count), training.initial_state(config, range(count)), hyper)
    start = time.perf_counter()
    epochs = training.programs().epoch
    program = epochs.lower(structure, (slots.state, slots.hyper), data).compile()
    compilation = time.perf_counter() - start
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(epochs.run(structure, (slots.state, slots.hyper), data))
        seconds.append(time.perf_counter() - start)
    epoch = statistics.median(seconds[1:]) / steps * (network.images // BATCH)
    memory = lanes.bytes_needed(config, data, count) / 1e6
    return [
        rule,
        network.name,
        count,
        epoch,
        count / epoch,
        memory,
        compilation,
        kernels(program, steps),
    ]


def random_data(network: Network, steps: int) -> training.Data:
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (steps * BATCH, network.sizes[0])
    images = jax.random.randint(keys[0], shape, 0, 256).astype(jnp.uint8)
    labels = jax.random.randint(keys[1], shape[:1], 0, network.sizes[-1])
    split = training.Images(images, labels)
    return training.Data(split, split, split, split, jnp.asarray(1 / 255, float))


LAUNCHED = r" (?:fusion|custom-call|dot|convolution|sort|copy|reduce|scatter|gather)\("


def kernels(program: Any, steps: int) -> str:
    """`211 + 54 + 47`: of a training step, and of one iteration of each loop in it."""
    computations = {
        text.split(" ", 1)[0].lstrip("%"): text
        for text in re.split(r"\n(?=%|ENTRY )", program.as_text())
    }
    bodies = lambda text, rest="": re.findall(rf" while\(.*body=%?([\w.\-]+){rest}", text)
    launched = lambda name: len(re.findall(LAUNCHED, computations[name]))
    # Of the loops that run as often as there are batches, the one that has the most to do.
    so_often = rf'.*"known_trip_count":\{{"n":"{steps}"'
    loops = [body for text in computations.values() for body in bodies(text, so_often)]
    step = max(loops, key=launched)
    return " + ".join(str(launched(name)) for name in (step, *bodies(computations[step])))


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    numerics.set_jax()
    rows = []
    print(jax.devices()[0].device_kind)
    print("{:<11}{:<9}{:>7}{:>10}{:>15}{:>8}{:>11}   {}".format(*COLUMNS))
    for network in NETWORKS:
        for rule in ("bp", "exact-inv", "lin-thresh"):
            for count in options["lanes"]:
                rows.append(row(rule, network, count, options["steps"], options["repeats"]))
                layout = "{:<11}{:<9}{:>7}{:>10.3f}{:>15.2f}{:>8.0f}{:>11.1f}   {}"
                print(layout.format(*rows[-1]))
                sys.stdout.flush()
    if options["json"]:
        with open(options["json"], "w") as file:
            named = [dict(zip(COLUMNS, values, strict=True)) for values in rows]
            json.dump({"device": jax.devices()[0].device_kind, "rows": named}, file, indent=2)


if __name__ == "__main__":
    cli.run(main)
