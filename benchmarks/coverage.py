"""How often a 95 % interval of analysis.stats covers the true mean, on simulated normal data.

    python -m benchmarks.coverage [--n 3 5 10] [--repetitions 1000] [--resamples 10000]

The coverage comes with its binomial standard error, the mean width relative to the t interval's.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from analysis.stats import LEVEL, RESAMPLES, bootstrap_interval


class Coverage(NamedTuple):
    share: float  # of the intervals that hold the true mean
    error: float  # its standard error
    width: float  # mean, relative to the t interval's


def coverage(n: int, repetitions: int, resamples: int = RESAMPLES, seed: int = 0) -> Coverage:
    """Over repetitions of n standard normal values each."""
    samples = np.random.default_rng((seed, n)).standard_normal((repetitions, n))
    # A bootstrap seed of its own each: errors of one set of resamples would not average out.
    found = np.array(
        [bootstrap_interval(row, seed=i, resamples=resamples) for i, row in enumerate(samples)]
    )
    share = float(np.mean((found[:, 0] <= 0) & (found[:, 1] >= 0)))
    widths = 2 * t.ppf((1 + LEVEL) / 2, n - 1) * samples.std(axis=1, ddof=1) / math.sqrt(n)
    return Coverage(
        share,
        math.sqrt(share * (1 - share) / repetitions),
        float(np.mean(found[:, 1] - found[:, 0]) / np.mean(widths)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.coverage", description="coverage of the bootstrap interval"
    )
    parser.add_argument("--n", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    arguments = parser.parse_args()
    for n in arguments.n:
        found = coverage(n, arguments.repetitions, arguments.resamples)
        print(
            f"n = {n:2}: covers {100 * found.share:.1f} ± {100 * found.error:.1f} %,"
            f" {found.width:.2f} of the t interval's width",
            flush=True,
        )


if __name__ == "__main__":
    main()
