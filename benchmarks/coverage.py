"""How often a 95 % interval of analysis.stats covers the true mean, on simulated normal data.

    python -m benchmarks.coverage [n=3,5,10] [repetitions=1000] [resamples=10000]

The coverage comes with its binomial standard error, the mean width relative to the t interval's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from analysis.stats import LEVEL, RESAMPLES, bootstrap_interval
from disinhib import cli
from disinhib.checks import COUNT, Option, is_whole

SIZE = (lambda n: is_whole(n) and n > 1, "a whole number of at least 2")
COMMAND = cli.Command(
    "benchmarks.coverage",
    __doc__,
    (
        Option("n", [3, 5, 10], cli.list_of(SIZE), "sample sizes"),
        Option("repetitions", 1000, COUNT, "samples of each size"),
        Option("resamples", RESAMPLES, COUNT, "resamples of each interval"),
    ),
)


class Coverage(NamedTuple):
    share: float  # of the intervals that hold the true mean
    error: float  # its standard error
    width: float  # mean, relative to the t interval's


def coverage(n: int, repetitions: int, resamples: int = RESAMPLES, seed: int = 0) -> Coverage:
    """Over repetitions of n standard normal values each."""
    samples = np.random.default_rng((seed, n)).standard_normal((repetitions, n))
    # A bootstrap seed of its own each: errors of one set of resamples would not average out.
    low, high = np.array(
        [bootstrap_interval(row, seed=i, resamples=resamples) for i, row in enumerate(samples)]
    ).T
    share = float(np.mean((low <= 0) & (high >= 0)))
    widths = 2 * t.ppf((1 + LEVEL) / 2, n - 1) * samples.std(axis=1, ddof=1) / math.sqrt(n)
    return Coverage(
        share,
        math.sqrt(share * (1 - share) / repetitions),
        float(np.mean(high - low) / np.mean(widths)),
    )


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    for n in options["n"]:
        share, error, width = coverage(n, options["repetitions"], options["resamples"])
        print(
            f"n = {n:2}: covers {100 * share:.1f} ± {100 * error:.1f} %,"
            f" {width:.2f} of the t interval's width",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)
