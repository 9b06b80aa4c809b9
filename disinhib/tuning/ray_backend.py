"""Ray Tune as the backend of the study loop, by its public interface.

Tune schedules every trial, places and reuses workers, and restarts trials whose worker died. It
asks a searcher for trials and reports results to a scheduler: here both call the study loop. Tune's
own record is a copy, of the trials that ran since the study was last started.
"""

from __future__ import annotations

import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from disinhib.tuning import environment
from disinhib.tuning.event_log import TrialConfig
from disinhib.tuning.loop import Epoch, Failed, Hindered, Loop, Outcome, Started
from disinhib.tuning.ray_workaround import deaths_counted_once
from disinhib.tuning.worker import FAILURE, MACHINE, REPORT, Policy

FOLDER = "ray"  # in the study's folder
WORKERS_LOST = 3  # a trial is restarted after so many deaths of its worker, and no more


@dataclass(eq=False)
class RayBackend(tune.Callback):
    """Runs the trials that the study loop starts, as `trainable` with `resources` (cpu, gpu) each.
    As Tune's callback, it tells the loop which trials run or are lost, and ends Tune if the study
    cannot continue.

    Ray's own record is in `folder`. `on_step()` is called now and then, `on_over_cap()` when the
    cap prevented a trial from writing its checkpoint.
    """

    trainable: type[tune.Trainable]
    resources: Mapping[str, float]
    policy: Policy
    folder: Path
    on_step: Callable[[], None]
    on_over_cap: Callable[[], None]
    queue: deque[TrialConfig] = field(default_factory=deque)
    error: Exception | None = None  # why the study cannot continue
    over: bool = False

    def start(self, config: TrialConfig) -> None:
        self.queue.append(config)

    def run(self, loop: Loop, at_once: int, callbacks: Sequence[tune.Callback] = ()) -> None:
        """Runs `loop` to its end, or until Ctrl-C. Raises the errors of the loop."""
        self.loop = loop
        self.handler = signal.getsignal(signal.SIGUSR1)
        self.tell(None)
        name = lambda trial: f"{trial.config['number']:04d}"
        tuner = tune.Tuner(
            tune.with_resources(self.trainable, dict(self.resources)),
            tune_config=tune.TuneConfig(
                search_alg=RaySearcher(self),
                scheduler=RayScheduler(self),
                num_samples=-1,  # until the searcher says that it has finished
                reuse_actors=True,
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=tune.RunConfig(
                name=FOLDER,
                storage_path=str(self.folder),
                failure_config=tune.FailureConfig(max_failures=WORKERS_LOST),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[*callbacks, self],
                verbose=0,
            ),
        )
        # By default Ray starts one worker at a time and drops it when another becomes free, so
        # that short trials would run one after another.
        pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(at_once)}
        if not self.over:
            try:
                with environment.variables(pending), deaths_counted_once(), _handlers_restored():
                    tuner.fit()
            except Exception:
                if self.error is None:  # Ray wraps errors of its callbacks
                    raise
        if self.error is not None:
            raise self.error

    def tell(self, outcome: Outcome | None) -> bool:
        """Sends `outcome` to the loop, or None to begin it; returns whether the trial has ended."""
        if self.over:
            return True
        try:
            return next(self.loop) if outcome is None else self.loop.send(outcome)
        except StopIteration:
            self.over = True
        except Exception as error:  # kept, because Ray blames the trial for errors in some hooks
            self.error, self.over = error, True
        return True

    def setup(self, **_: Any) -> None:
        # Tune has taken this signal for itself; with ours, the exit code tells which it was.
        if callable(self.handler):
            signal.signal(signal.SIGUSR1, self.handler)

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        self.tell(Started(trial.config["number"]))

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
        # (A scheduler hears of every death of a worker, also if the trial is to go on.)
        self.tell(Failed(trial.config["number"], f"worker lost {WORKERS_LOST + 1} times"))

    def on_step_end(self, **_: Any) -> None:
        if self.error is not None:
            raise self.error
        self.on_step()

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its parts; the state is in the log


class RaySearcher(Searcher):
    """Gives Tune the trials that the loop has started, one after another."""

    def __init__(self, backend: RayBackend):
        super().__init__()
        self.backend = backend

    def suggest(self, trial_id: str) -> Any:
        if self.backend.error is not None:  # else Ray would keep asking for minutes
            raise self.backend.error
        if self.backend.queue:
            return {**self.backend.queue.popleft(), "policy": self.backend.policy}
        return Searcher.FINISHED if self.backend.over else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Does nothing: the scheduler has told the loop."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Does nothing: the state is in the log."""


class RayScheduler(FIFOScheduler):
    """Passes results to the loop, and stops the trials that the loop has ended."""

    def __init__(self, backend: RayBackend):
        super().__init__()
        self.backend = backend

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        number = trial.config["number"]
        for key, outcome in ((FAILURE, Failed), (MACHINE, Hindered)):
            if key in result:
                # The worker raises it in its next step; running the trial again would not help.
                trial.max_failures = 0
                self.backend.tell(outcome(number, result[key]))
                return TrialScheduler.CONTINUE
        report = json.loads(result[REPORT])
        if report.pop("over_cap", False):
            self.backend.on_over_cap()
        ended = self.backend.tell(Epoch(trial=number, **report))
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Tune leaves its own handlers behind, which would swallow the next Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # Tune sets none then
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
