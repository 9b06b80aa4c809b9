"""What four seeds as lanes of one program cost, relative to one.

    python -m benchmarks.lanes [repeats=7] [steps=20]

Network and data as in benchmarks/step.py, 3 hidden layers, medians of rounds taken in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import jax

from benchmarks.step import BATCH, REPEATS, STEPS, prepared
from disinhib import cli
from disinhib.hyperparameters import Newton

COMMAND = cli.Command("benchmarks.lanes", __doc__, (REPEATS, STEPS))


def main(arguments: Sequence[str]) -> None:
    repeats, steps = COMMAND.parse(arguments).values()
    print(f"{jax.devices()[0].device_kind}, 3 hidden layers of 256, batch {BATCH}")
    for rule in ("bp", "exact-inv", "lin-thresh"):
        one, four = (prepared(rule, 3, Newton(), steps, lanes) for lanes in (1, 4))
        rounds = [(one(), four()) for _ in range(repeats)]
        single = statistics.median(first for first, _ in rounds)
        ratio = statistics.median(second / first for first, second in rounds)
        print(f"{rule:10}  1 lane {1e3 * single:5.1f} ms a step, 4 lanes {ratio:.2f} times that")


if __name__ == "__main__":
    cli.run(main)
