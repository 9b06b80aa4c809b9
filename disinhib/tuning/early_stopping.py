"""Which trials are stopped before their budget is spent: Ray's early stopping, asked directly.

A decision follows from the scores so far and nothing else, so a resumed study makes the decisions
that the uninterrupted one made. A rule is to be tuned as carefully as the others, so by default a
trial is compared with trials of its own rule only (`within_rule`): early on, slow but good rules
would lose to fast ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

SCORE = "score"
Options = Mapping[str, Any]


def _grace(options: Options, epochs: int) -> int:
    """Epochs before a trial can be stopped."""
    return options["grace_period"] or max(1, epochs // 4)


def asha(options: Options, epochs: int, mode: str, bracket: int) -> TrialScheduler:
    """Asynchronous successive halving; `epochs` is a trial's whole budget."""
    factor = options["reduction_factor"]
    grace = min(epochs, int(_grace(options, epochs) * factor**bracket))
    return AsyncHyperBandScheduler(
        metric=SCORE, mode=mode, max_t=epochs, grace_period=grace, reduction_factor=factor
    )


def hyperband_brackets(options: Options, epochs: int) -> list[float]:
    """Shares of the trials that start in each bracket; a bracket's first decision is a reduction
    factor later than that of the one before (Li et al. 2018, eq. of n in algorithm 1)."""
    factor = options["reduction_factor"]
    most = int(math.log(epochs / _grace(options, epochs), factor) + 1e-9)
    sizes = [(most + 1) / (most - k + 1) * factor ** (most - k) for k in range(most + 1)]
    return [size / sum(sizes) for size in sizes]


def median(options: Options, epochs: int, mode: str, bracket: int) -> TrialScheduler:
    """Stops a trial whose best score is worse than the median of the others' running means."""
    return MedianStoppingRule(
        time_attr=TRAINING_ITERATION,
        metric=SCORE,
        mode=mode,
        grace_period=_grace(options, epochs),
        min_samples_required=options["min_samples_required"],
        min_time_slice=math.inf,  # pyright: ignore[reportArgumentType]  (never pauses a trial)
    )


def none(options: Options, epochs: int, mode: str, bracket: int) -> TrialScheduler:
    """Every trial runs its whole budget."""
    return FIFOScheduler()


def _one_bracket(options: Options, epochs: int) -> list[float]:
    return [1.0]


class Scheduler(NamedTuple):
    """`make(options, epochs, mode, bracket)` gives Ray's; `brackets` the shares of the trials;
    `remember`, a method of Ray's, adds a result of a trial that it does not judge."""

    make: Callable[[Options, int, str, int], TrialScheduler]
    brackets: Callable[[Options, int], list[float]] = _one_bracket
    remember: Callable[..., Any] = FIFOScheduler.on_trial_result


SCHEDULERS: dict[str, Scheduler] = {
    "asha": Scheduler(asha, remember=AsyncHyperBandScheduler.on_trial_result),
    "hyperband": Scheduler(
        asha, hyperband_brackets, remember=AsyncHyperBandScheduler.on_trial_result
    ),
    "median": Scheduler(median, remember=MedianStoppingRule.on_trial_complete),
    "none": Scheduler(none),
}


class _Name(NamedTuple):
    """All that Ray's early stopping asks of a trial."""

    trial_id: str


class Stopping:
    """The early stopping of a study whose trials have a budget of `epochs`.

    With `batch`, a trial is compared with those of earlier batches only, `batch` consecutive
    numbers each: no decision then depends on which trial was faster.
    """

    def __init__(self, options: Options, epochs: int, mode: str, batch: int | None = None):
        self.options, self.epochs, self.mode, self.batch = options, epochs, mode, batch
        self.scheduler = SCHEDULERS[options["name"]]
        self.shares = self.scheduler.brackets(options, epochs)
        self.heard: dict[int, tuple[Hashable, list[float]]] = {}  # number -> (group, scores)
        self.judges: dict[Hashable, TrialScheduler] = {}  # by group, or by number in batches
        self.first = 0  # number of the batch

    def stops(self, config: Mapping[str, Any], epoch: int, score: float) -> bool:
        """Whether the trial ends here; to be asked once for each of its epochs, in order."""
        number = config["number"]
        group, scores = self.heard.setdefault(number, (self._group(config), []))
        judge = self._judge(number, group)
        if not scores:
            judge.on_trial_add(None, _Name(str(number)))  # pyright: ignore[reportArgumentType]
        scores.append(score)
        decision = judge.on_trial_result(*_told(number, epoch, score))
        return decision == TrialScheduler.STOP

    def heard_of(self, number: int) -> int:
        """How many epochs of a trial it has been asked about."""
        return len(self.heard[number][1]) if number in self.heard else 0

    def _group(self, config: Mapping[str, Any]) -> Hashable:
        """Trials are compared within their group."""
        drawn = np.random.default_rng(config["number"])
        bracket = int(drawn.choice(len(self.shares), p=self.shares))
        return config["rule"] if self.options["within_rule"] else None, bracket

    def _judge(self, number: int, group: Any) -> TrialScheduler:
        if self.batch is None:
            if group not in self.judges:
                self.judges[group] = self._fresh(group)
            return self.judges[group]
        first = number // self.batch * self.batch
        if first != self.first:  # of these judges nothing will be asked any more
            self.first, self.judges = first, {}
        if group not in self.judges:
            judge = self.judges[group] = self._fresh(group)
            for other, (theirs, scores) in sorted(self.heard.items()):
                if other < first and theirs == group:
                    judge.on_trial_add(None, _Name(str(other)))  # pyright: ignore
                    for epoch, score in enumerate(scores, start=1):
                        self.scheduler.remember(judge, *_told(other, epoch, score))
        if number not in self.judges:
            self.judges[number] = copy.deepcopy(self.judges[group])
        return self.judges[number]

    def _fresh(self, group: Any) -> TrialScheduler:
        _, bracket = group
        return self.scheduler.make(self.options, self.epochs, self.mode, bracket)


def _told(number: int, epoch: int, score: float) -> Any:
    """Arguments of Ray's methods: its controller, which they do not use, trial and result."""
    return None, _Name(str(number)), {SCORE: score, TRAINING_ITERATION: epoch}
