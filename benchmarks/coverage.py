"""How often the intervals of analysis.stats cover, and how often its tests raise a false alarm.

    python -m benchmarks.coverage [n=3,5,10] [repeats=1,3,5] [repetitions=1000]

Simulates the retrained seeds of rules: the mean of a repeat varies with the luck of tuning, a seed
about it with that of training, `ratio` being the standard deviation of the first in those of the
second. Data are normal; skewed (a gamma distribution's skewness of -1: some networks are much
worse); strongly skewed (an exponential's, -2); or counted: normal with a standard deviation of one
test image, rounded to whole images. Columns are repeats x seeds; in the last one, seeds of three
repeats have diverged. A single repeat has no luck of tuning in its values.

Values that do not vary have no interval, and are not counted. The standard error of a coverage is
0.7 points. It takes some minutes of one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from analysis import stats
from analysis.stats import Interval, Values
from disinhib import cli
from disinhib.checks import COUNT, Option, is_whole

SIZE = (lambda n: is_whole(n) and n > 1, "a whole number of at least 2")
COMMAND = cli.Command(
    "benchmarks.coverage",
    __doc__,
    (
        Option("n", [3, 5, 10], cli.list_of(SIZE), "numbers of seeds"),
        Option("repeats", [1, 3, 5], cli.list_of(COUNT), "numbers of repeats of the tuning"),
        Option("repetitions", 1000, COUNT, "studies of each kind"),
    ),
)
STUDIES = 200  # that are simulated of rules compared with bp
SOME_DIVERGED = (10, 8, 2)  # seeds of three repeats
RATIOS = (0.0, 2.0)
COUNTED = "counted"
# Each with mean 0 and standard deviation 1.
DATA: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "skewed": lambda rng, size: 2 - rng.gamma(4, 0.5, size),
    "strongly skewed": lambda rng, size: 1 - rng.exponential(1, size),
    COUNTED: lambda rng, size: rng.standard_normal(size),  # rounded in `study`
}


class Case(NamedTuple):
    """How values vary."""

    data: str
    ratio: float
    seeds: tuple[int, ...]  # of each repeat


class Rule(NamedTuple):
    mean: float = 0.0  # in standard deviations of training
    spread: float = 1.0  # of tuning and of training, in those of other rules
    shared: float = 0.0  # share of training's variance that a seed gives to all rules alike


class Kind(NamedTuple):
    """An interval that the report prints."""

    name: str
    rules: tuple[Rule, ...]
    interval: Callable[..., Interval]  # of the values of the rules
    probability: bool = False  # whether it is of P(A > B), else of means, whose truth is 0


KINDS = (
    Kind("mean", (Rule(),), lambda a: stats.summary(a).interval),
    Kind(
        "difference; half of training's variance is the seeds'",
        (Rule(shared=0.5), Rule(shared=0.5)),
        lambda a, b: stats.difference(a, b).interval,
    ),
    Kind(
        "difference, unpaired; one rule varies twice as much",
        (Rule(), Rule(spread=2)),
        lambda a, b: stats.unpaired_difference(a, b).interval,
    ),
    Kind(
        "P(A > B) of equal rules",
        (Rule(), Rule()),
        lambda a, b: stats.improvement(a, b, draws=1000).interval,
        probability=True,
    ),
    Kind(
        "P(A > B), A better by a standard deviation of training",
        (Rule(mean=1), Rule()),
        lambda a, b: stats.improvement(a, b, draws=1000).interval,
        probability=True,
    ),
)


def study(rng: np.random.Generator, case: Case, rules: Sequence[Rule]) -> list[Values]:
    """The values of each rule."""
    return [
        {
            repeat: dict(enumerate(map(float, row[:n])))
            for repeat, (row, n) in enumerate(zip(drawn, case.seeds, strict=True), start=1)
        }
        for drawn in _drawn(rng, case, rules)
    ]


def _drawn(rng: np.random.Generator, case: Case, rules: Sequence[Rule]) -> list[np.ndarray]:
    """The values of each rule, [repeats, seeds]."""
    draw, size = DATA[case.data], (len(case.seeds), max(case.seeds))
    of_seeds = draw(rng, size)
    between = rng.random()  # whole images, the true means lie
    values = []
    for rule in rules:
        own = math.sqrt(1 - rule.shared) * draw(rng, size)
        training = own + math.sqrt(rule.shared) * of_seeds
        tuning = case.ratio * draw(rng, (size[0], 1))
        drawn = rule.mean + rule.spread * (tuning + training)
        values.append(np.round(drawn + between) - between if case.data == COUNTED else drawn)
    return values


def coverage(kind: Kind, case: Case, repetitions: int, seed: int = 0) -> float:
    """The share of the intervals that hold the truth, of those that there are."""
    rng = np.random.default_rng((seed, *case.seeds))
    truth = _probability(kind.rules, case.data, case.ratio) if kind.probability else 0.0
    ends = np.array([kind.interval(*study(rng, case, kind.rules)) for _ in range(repetitions)])
    low, high = ends[~np.isnan(ends[:, 0])].T
    return float(np.mean((low <= truth) & (truth <= high)))


@cache
def _probability(rules: tuple[Rule, ...], data: str, ratio: float) -> float:
    """The true P(A > B), from one network of each of many tunings."""
    networks = Case(data, ratio, (1,) * 400_000)
    a, b = _drawn(np.random.default_rng(0), networks, rules)
    return float(np.mean(np.sign(a - b) + 1)) / 2


class Comparison(NamedTuple):
    """Of simulated studies, in each of which three rules are compared with bp."""

    probability: float  # mean of P(rule > bp)
    told: float  # share of the studies in which a rule differs from bp, by Holm's p < 0.05


def comparison(
    seeds: tuple[int, ...], points: float, studies: int = STUDIES, seed: int = 0
) -> Comparison:
    """The rules are better than bp by so many points; tuning and training have a standard deviation
    of half a point each (a single repeat has none of tuning)."""
    rng = np.random.default_rng((seed, *seeds))
    case = Case("normal", 1.0 if len(seeds) > 1 else 0.0, seeds)
    rules = [Rule(shared=0.5), *3 * [Rule(points / 0.5, shared=0.5)]]
    probabilities, told = [], []
    for _ in range(studies):
        bp, *others = study(rng, case, rules)
        probabilities += [stats.improvement(rule, bp, draws=1).probability for rule in others]
        adjusted = stats.holm([stats.difference(rule, bp).p for rule in others])
        told.append(min(adjusted) < 1 - stats.LEVEL)
    return Comparison(float(np.mean(probabilities)), float(np.mean(told)))


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    columns = [(n,) * repeats for repeats in options["repeats"] for n in options["n"]]
    cases = [*columns, SOME_DIVERGED]
    for kind in KINDS:
        print(f"{kind.name}: coverage in %")
        print(f"{'data':16}{'ratio':>6}" + "".join(f"{_name(seeds):>9}" for seeds in cases))
        for data in DATA:
            covered = []
            for ratio in RATIOS:
                cells = [
                    coverage(kind, Case(data, ratio, seeds), options["repetitions"])
                    if ratio == 0 or len(seeds) > 1
                    else math.nan
                    for seeds in cases
                ]
                texts = ("" if math.isnan(cell) else f"{100 * cell:.1f}" for cell in cells)
                print(f"{data:16}{ratio:6.1f}" + "".join(map("{:>9}".format, texts)), flush=True)
                covered += [100 * cell for cell in cells if not math.isnan(cell)]
            print(f"{data:16}{'all':>6}   {min(covered):.1f} to {max(covered):.1f}")
        print()
    print(f"Three rules and bp, {STUDIES} studies: P(rule > bp), share with a rule that differs")
    for seeds in columns:
        equal, better = (comparison(seeds, points) for points in (0, 1))
        print(
            f"{_name(seeds):>8}  equal rules: {equal.probability:.2f}, {100 * equal.told:.1f} %;"
            f"  better by a point: {better.probability:.2f}, {100 * better.told:.1f} %",
            flush=True,
        )


def _name(seeds: tuple[int, ...]) -> str:
    return f"{len(seeds)} x {seeds[0]}" if len({*seeds}) == 1 else ", ".join(map(str, seeds))


if __name__ == "__main__":
    cli.run(main)
