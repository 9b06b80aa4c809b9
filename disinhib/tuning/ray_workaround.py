"""A workaround for a bug of Ray: the only module that touches Ray's private parts.

`tests/test_ray_workaround.py` fails when Ray no longer needs it. Ray 2.60 reports to its controller
twice that a worker has died while being reset for its next trial; the first report queues the trial
again, the second one fails it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

AFFECTED = ("2.60.",)  # versions that have the bug


def needed(version: str = ray.__version__) -> bool:
    return version.startswith(AFFECTED)


@contextmanager
def deaths_counted_once() -> Iterator[None]:
    """Within it, Ray handles a worker's death once. Does nothing if Ray does not have the bug."""
    if not needed():
        yield
        return
    process: Any = TuneController._process_trial_failure
    last: dict[str, Any] = {}

    def process_once(self: TuneController, trial: Trial, exception: Any) -> None:
        again = last.get(trial.trial_id) is exception and trial.status == Trial.PENDING
        last[trial.trial_id] = exception
        if again:
            self._resetting_trials.discard(trial)  # else it would wait for this reset forever
        else:
            process(self, trial, exception)

    TuneController._process_trial_failure = process_once
    try:
        yield
    finally:
        TuneController._process_trial_failure = process
