"""A bug of Ray, worked around until it is mended there: the only room that touches Ray's private
parts. `tests/test_ray_workaround.py` fails when Ray no longer needs it.

Ray 2.60 tells its controller twice of a worker that dies while it is being reset for its next
trial, and the second time fails the trial that the first time has queued again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

AFFECTED = ("2.60.",)  # versions that were seen to have it


def needed(version: str = ray.__version__) -> bool:
    return version.startswith(AFFECTED)


@contextmanager
def deaths_counted_once() -> Iterator[None]:
    """For its time, a worker's death is told once; nothing where Ray does not have the bug."""
    if not needed():
        yield
        return
    process: Any = TuneController._process_trial_failure
    last: dict[str, Any] = {}

    def process_once(self: TuneController, trial: Trial, exception: Any) -> None:
        again = last.get(trial.trial_id) is exception and trial.status == Trial.PENDING
        last[trial.trial_id] = exception
        if again:
            self._resetting_trials.discard(trial)  # or it would wait for this reset for ever
        else:
            process(self, trial, exception)

    TuneController._process_trial_failure = process_once
    try:
        yield
    finally:
        TuneController._process_trial_failure = process
