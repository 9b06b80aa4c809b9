"""Which trials are stopped before their budget is spent: Ray's schedulers, rule by rule.

A rule is to be tuned as carefully as the others, so a trial is by default compared with trials of
its own rule only (`within_rule`): early on, slow but good rules would lose to fast ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from disinhib.tuning.trial import SCORE


def asha(options: Mapping[str, Any], epochs: int, mode: str) -> TrialScheduler:
    """Asynchronous successive halving; `epochs` is a trial's whole budget."""
    grace_period = options["grace_period"] or max(1, epochs // 4)
    return AsyncHyperBandScheduler(
        metric=SCORE, mode=mode, max_t=epochs, **{**options, "grace_period": grace_period}
    )


def none(options: Mapping[str, Any], epochs: int, mode: str) -> TrialScheduler:
    """Every trial runs its whole budget."""
    return FIFOScheduler(**options)


SCHEDULERS: dict[str, Callable[..., TrialScheduler]] = {"asha": asha, "none": none}


class WithinRule(FIFOScheduler):
    """Starts trials in their order and leaves each to its rule's own scheduler from `make`."""

    def __init__(self, make: Callable[[], TrialScheduler]):
        super().__init__()
        self.make = make
        self.of_rule: dict[str, TrialScheduler] = {}

    def _scheduler(self, trial) -> TrialScheduler:
        rule = trial.config["rule"]
        if rule not in self.of_rule:
            self.of_rule[rule] = self.make()
        return self.of_rule[rule]

    def on_trial_add(self, tune_controller, trial):
        self._scheduler(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller, trial):
        self._scheduler(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller, trial, result):
        return self._scheduler(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller, trial, result):
        self._scheduler(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller, trial):
        self._scheduler(trial).on_trial_remove(tune_controller, trial)
