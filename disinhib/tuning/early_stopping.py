"""Early stopping: which trials end before their budget is spent.

An entry of EARLY_STOPPING has a pure function of the scores so far,

    stops(scores, peers, budget, options) -> bool

where `scores` are a trial's by epoch (signed: more is better), `peers` the scores of the trials
that it is compared with (read only when a decision is due), `budget` the trial's epochs, and
`options` those of the entry. By default, a trial's peers are trials of its own rule
(`within_rule`): early on, rules that are slow but good would lose to fast ones. Trials of another
repeat of the study never are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from disinhib.checks import COUNT, FLAG, Check, Option, is_number, or_null
from disinhib.tuning.event_log import Record

Options = Mapping[str, Any]
Scores = Sequence[float]

ABOVE_1: Check = (lambda v: is_number(v) and v > 1, "a number above 1")
WITHIN_RULE = Option("within_rule", True, FLAG, "compare a trial only with trials of its own rule")
GRACE = Option(
    "grace_period",
    None,
    or_null(COUNT),
    "epochs before a trial can be stopped; null: a quarter of its budget",
)
FACTOR = Option("reduction_factor", 2, ABOVE_1, "one in so many trials at a rung continues")


def asha(scores: Scores, peers: Iterable[Scores], budget: int, options: Options) -> bool:
    """Asynchronous successive halving (Li et al. 2020, MLSys), with the percentile of Ray Tune's
    AsyncHyperBandScheduler: at a rung, grace x factor^k epochs below the budget, a trial continues
    if its score is at least the (1 - 1/factor) percentile of its peers' scores at that epoch."""
    epoch, factor = len(scores), options["reduction_factor"]
    if epoch not in rungs(options, budget):
        return False
    there = _finite(peer[epoch - 1] for peer in peers if len(peer) >= epoch)
    share = 100 * (1 - 1 / factor)
    return bool(there) and bool(scores[-1] < np.percentile(there, share))


def rungs(options: Options, budget: int) -> list[int]:
    """The epochs at which successive halving decides."""
    factor, grace = options["reduction_factor"], grace_period(options, budget)
    count = int(math.log(budget / grace, factor)) + 1
    epochs = {math.ceil(grace * factor**rung) for rung in range(count)}
    return sorted(epoch for epoch in epochs if epoch < budget)


def median(scores: Scores, peers: Iterable[Scores], budget: int, options: Options) -> bool:
    """Median stopping (Golovin et al. 2017): stops a trial whose best score is worse than the
    median of its peers' running means, from the grace period to the trial's epoch."""
    epoch, grace = len(scores), grace_period(options, budget)
    if epoch < grace:
        return False
    means = _finite(np.mean(peer[grace - 1 : epoch]) for peer in peers if len(peer) >= epoch)
    if len(means) < options["min_samples_required"]:
        return False
    return bool(max(scores) < np.median(means))


def _finite(scores: Iterable[Any]) -> list[float]:
    """Without those of peers whose metric was no number: they would end every comparison."""
    return [float(score) for score in scores if math.isfinite(score)]


def grace_period(options: Options, budget: int) -> int:
    """Epochs before a trial can be stopped; each bracket multiplies those of the bracket before
    by the factor."""
    grace = options["grace_period"] or max(1, budget // 4)
    return min(budget, int(grace * options.get("reduction_factor", 1) ** options.get("bracket", 0)))


def hyperband_brackets(options: Options, budget: int) -> list[float]:
    """Shares of the trials that start in each bracket (Li et al. 2018, JMLR: n of algorithm 1)."""
    factor = options["reduction_factor"]
    last = int(math.log(budget / grace_period(options, budget), factor) + 1e-9)
    sizes = [(last + 1) / (last - k + 1) * factor ** (last - k) for k in range(last + 1)]
    return [size / sum(sizes) for size in sizes]


class EarlyStopping(NamedTuple):
    """`stops` as above, which may be true after the epochs `decides(options, budget)`;
    `brackets(options, budget)` are the shares of the trials whose grace period is a factor longer
    each time."""

    stops: Callable[[Scores, Iterable[Scores], int, Options], bool]
    decides: Callable[[Options, int], Sequence[int]]
    options: tuple[Option, ...]
    words: str
    brackets: Callable[[Options, int], list[float]] = lambda options, budget: [1.0]


EARLY_STOPPING: dict[str, EarlyStopping] = {
    "asha": EarlyStopping(
        asha,
        rungs,
        (WITHIN_RULE, GRACE, FACTOR),
        "asynchronous successive halving: at 1, 2, 4 ... times the grace period, only the better"
        " half of the trials that have got that far continue",
    ),
    "hyperband": EarlyStopping(
        asha,
        rungs,
        (WITHIN_RULE, GRACE, FACTOR),
        "asynchronous HyperBand: successive halving in several brackets, each of which makes its"
        " first decision later than the one before, to give slow starters a chance",
        hyperband_brackets,
    ),
    "median": EarlyStopping(
        median,
        lambda options, budget: range(grace_period(options, budget), budget),
        (
            WITHIN_RULE,
            GRACE,
            Option(
                "min_samples_required",
                3,
                COUNT,
                "peers that have got as far, before a trial is stopped",
            ),
        ),
        "stops a trial whose best score is worse than the median of the others' running means",
    ),
    "none": EarlyStopping(
        lambda scores, peers, budget, options: False,
        lambda options, budget: (),
        (WITHIN_RULE._replace(default=False),),
        "every trial runs its whole budget",
    ),
}


def bracket(number: int, seed: int, options: Options, budget: int) -> int:
    """The bracket of trial `number`, drawn with the study's seed."""
    shares = EARLY_STOPPING[options["name"]].brackets(options, budget)
    return 0 if len(shares) == 1 else _drawn(number, seed, tuple(shares))


@lru_cache(maxsize=100_000)
def _drawn(number: int, seed: int, shares: tuple[float, ...]) -> int:
    return int(np.random.default_rng((seed, number)).choice(len(shares), p=shares))


def decisions(number: int, budget: int, options: Options, seed: int) -> list[int]:
    """The epochs after which trial `number` may be stopped."""
    own = {**options, "bracket": bracket(number, seed, options, budget)}
    return list(EARLY_STOPPING[options["name"]].decides(own, budget))


def decide(
    records: Mapping[int, Record],
    trial: Record,
    options: Options,
    seed: int,
    batch: int | None = None,
) -> bool:
    """Whether `trial`, which has its newest score, ends here. Its own record is not read.

    With `batch`, only trials of earlier batches (`batch` consecutive numbers each) are peers, so
    that no decision depends on which trial was faster.
    """
    number, budget = trial.number, trial.budget
    own = bracket(number, seed, options, budget)
    first = None if batch is None else number // batch * batch
    peers = (
        other.scores
        for other in records.values()
        if other.number != number
        and other.repeat == trial.repeat
        and (first is None or other.number < first)
        and (not options["within_rule"] or other.rule == trial.rule)
        and bracket(other.number, seed, options, budget) == own
    )
    stops = EARLY_STOPPING[options["name"]].stops
    return stops(trial.scores, peers, budget, {**options, "bracket": own})
