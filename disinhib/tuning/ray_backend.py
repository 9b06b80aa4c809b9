"""How Ray runs a study: three thin pieces through which it asks and tells the conductor.

Ray holds no truth of its own: every trial of the journal is handed to it, also those that ended
before a kill, so that its record of a study is whole as well.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.exceptions import RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from disinhib.checks import refusal
from disinhib.errors import ConfigError
from disinhib.tuning import provenance
from disinhib.tuning.early_stopping import SCORE
from disinhib.tuning.event_log import FAILED, RUNNING, Record
from disinhib.tuning.loop import Conductor
from disinhib.tuning.worker import DISK_FULL, METRICS, OVER_CAP, PLACE, Checkpoints, environment

FOLDER = "ray"  # in the study's folder
WORKERS_LOST = 3  # a trial goes on after so many deaths of its worker, and no more
SWITCHES = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the study was started
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables cannot be switched off, those of the old one can
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal has it all
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # `progress` names them in a line each
}


class StudyStopped(RuntimeError):
    """The study cannot go on now, and can be resumed; the message says what to do first."""


class PersistentTrial(Trial):
    """Ray's trial, which goes on elsewhere if its worker dies but not if its training raises:
    that would only raise again."""

    failure: str | None = None

    def handle_error(self, exc: Any = None) -> None:
        super().handle_error(exc)
        self.failure = reason(exc)
        if isinstance(exc, RayTaskError):
            self.max_failures = 0


def reason(error: Any) -> str:
    """Why a trial failed, in one line: its training's own exception where there is one."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"


class _Proposals(Searcher):
    """Ray's searcher: the conductor's trials, one after the other."""

    def __init__(self, conductor: Conductor, checkpoints: Checkpoints):
        super().__init__()
        self.conductor, self.checkpoints = conductor, checkpoints
        self.handed: Record

    def suggest(self, trial_id: str) -> dict | None:
        record = self.conductor.next()
        if record is None:
            if self.conductor.fatal is not None:  # else Ray would go on asking for minutes
                raise self.conductor.fatal
            return None
        self.handed = record
        return {**record.config, "checkpoints": self.checkpoints}

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        """The conductor hears of it from `Reporter`."""


class Source(SearchGenerator):
    """Makes Ray's trials of the conductor's; an ended one arrives as ended as it is."""

    searcher: _Proposals

    def create_trial_if_possible(self, experiment_spec: dict) -> Trial | None:
        trial = super().create_trial_if_possible(experiment_spec)
        if trial is None:
            return None
        record = self.searcher.handed
        trial.__class__ = PersistentTrial
        if record.ended:
            trial.init_local_path()
            if record.epochs:
                trial.update_last_result({SCORE: record.score, TRAINING_ITERATION: record.epochs})
            trial.set_status(Trial.ERROR if record.state == FAILED else Trial.TERMINATED)
        return trial

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: the journal has it."""

    def has_checkpoint(self, dirpath: str) -> bool:
        return False


class Judge(FIFOScheduler):
    """Starts trials in their order and ends those that the conductor stops."""

    def __init__(self, conductor: Conductor):
        super().__init__()
        self.conductor = conductor

    def on_trial_result(self, tune_controller, trial, result) -> str:
        stops = self.conductor.stops(
            trial.config["number"], result[TRAINING_ITERATION], result[SCORE]
        )
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


class Reporter(tune.Callback):
    """Tells the conductor what Ray says, and ends the study if it cannot go on.

    `on_step()` is called now and then, `on_end(record)` when a trial has ended, and
    `on_over_cap()` when the cap kept a trial from writing its checkpoint.
    """

    def __init__(
        self,
        conductor: Conductor,
        on_step: Callable[[], None],
        on_end: Callable[[Record], None],
        on_over_cap: Callable[[], None],
    ):
        self.conductor = conductor
        self.on_step, self.on_end, self.on_over_cap = on_step, on_end, on_over_cap

    def __getstate__(self) -> dict:
        return {}  # as the conductor's

    def on_trial_start(self, *, trial, **_) -> None:
        self.conductor.records[trial.config["number"]].state = RUNNING

    def on_trial_result(self, *, trial, result, **_) -> None:
        body = {name: result[name] for name in (SCORE, METRICS, PLACE)}
        self.conductor.heard(trial.config["number"], result[TRAINING_ITERATION], body)
        if DISK_FULL in result:
            self.conductor.fatal = StudyStopped(result[DISK_FULL])
        if OVER_CAP in result:
            self.on_over_cap()

    def on_trial_complete(self, *, trial, **_) -> None:
        self._ended(trial, None)

    def on_trial_error(self, *, trial, **_) -> None:
        self._ended(trial, trial.failure)

    def _ended(self, trial, failure: str | None) -> None:
        number = trial.config["number"]
        self.conductor.ended(number, failure)
        if self.conductor.fatal is None:
            self.on_end(self.conductor.records[number])

    def on_step_end(self, **_) -> None:
        if self.conductor.fatal is not None:
            raise self.conductor.fatal
        self.on_step()


def run(
    conductor: Conductor,
    trainable: type[tune.Trainable],
    resources: Mapping[str, float],
    checkpoints: Checkpoints,
    reporter: Reporter,
    folder: Path,
    callbacks: Sequence[tune.Callback] = (),
) -> None:
    """Runs the conductor's trials, of `trainable` with `resources` (cpu, gpu) each, to their end
    or until Ctrl-C; Ray's own record goes into `folder`.

    Raises whatever `conductor.fatal` came to be.
    """
    # Ray would start one worker at a time and give it up as soon as another falls free, so that
    # short trials run one after the other.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(conductor.at_once)
    name = lambda trial: f"{trial.config['number']:04d}"
    tuner = tune.Tuner(
        tune.with_resources(trainable, dict(resources)),
        tune_config=tune.TuneConfig(
            search_alg=Source(_Proposals(conductor, checkpoints)),
            scheduler=Judge(conductor),
            num_samples=conductor.trials,
            reuse_actors=True,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=FOLDER,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=WORKERS_LOST),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[*callbacks, reporter],
            verbose=0,
        ),
    )
    try:
        with _deaths_counted_once():
            tuner.fit()
    except Exception:
        # Ray wraps what its callbacks raise.
        if conductor.fatal is None:
            raise
    if conductor.fatal is not None:
        raise conductor.fatal


@contextmanager
def _deaths_counted_once() -> Iterator[None]:
    """Ray tells its controller twice of a worker that dies while it is being reset for its next
    trial, and the second time fails the trial that the first time has queued again (2.60)."""
    process, handled = TuneController._process_trial_failure, {}

    def process_once(self: TuneController, trial: Trial, exception: Any) -> None:
        again = handled.get(trial.trial_id) is exception and trial.status == Trial.PENDING
        handled[trial.trial_id] = exception
        if again:
            self._resetting_trials.discard(trial)  # or it would wait for this reset for ever
        else:
            process(self, trial, exception)

    TuneController._process_trial_failure = process_once
    try:
        yield
    finally:
        TuneController._process_trial_failure = process


@contextmanager
def cluster(options: Mapping[str, Any]) -> Iterator[None]:
    """Ray, started here or joined, for the time of the study."""
    os.environ.update(SWITCHES)
    # Said once more at the end, as an error, of trials that `progress` has named.
    unsaid = "Trials did not complete"
    logging.getLogger("ray.tune.tune").addFilter(lambda record: unsaid not in str(record.msg))
    cpus, gpus = options["cpus_per_trial"], options["gpus_per_trial"]
    with warnings.catch_warnings():
        # jax warns of forks; Ray's are all followed by an exec at once.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        address = options["address"]
        try:
            _reach(address)
            ray.init(
                address=address,
                runtime_env={"env_vars": environment(cpus, gpus)},
                include_dashboard=False if address is None else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except OSError as error:  # ConnectionError is one
            allowed = "auto or HOST:PORT of a running Ray cluster, or null"
            raise refusal("cluster.address", address, allowed) from error
    try:
        for option, kind, asked in (("cpus", "CPU", cpus), ("gpus", "GPU", gpus)):
            most = max(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
            if asked > most:
                allowed = f"at most {most:g}, what the largest machine has"
                raise refusal(f"cluster.{option}_per_trial", asked, allowed)
        if not trials_at_once({"cpu": cpus, "gpu": gpus}):
            allowed = f"what one machine has together with {cpus} CPUs"
            raise refusal("cluster.gpus_per_trial", gpus, allowed)
        yield
    finally:
        ray.shutdown()


def check_machines(origin: Path, id: str, files: Mapping[str, str]) -> None:
    """Raises ConfigError if a machine of the cluster does not see the study's file `origin`, with
    its `id`, or has other code than `files` (provenance.code): its trials would start again after
    a kill, or be those of another program."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    on = lambda node: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    looks = [_look.options(scheduling_strategy=on(node)).remote(str(origin)) for node in nodes]
    for node, looked in zip(nodes, looks, strict=True):
        machine = node["NodeManagerAddress"]
        there, code = ray.get(looked)
        if there != id:
            allowed = f"a folder that all machines share ({machine} does not see it)"
            raise refusal("out_dir", origin.parent.parent, allowed)
        if code != files:
            other = sorted(file for file in {*code, *files} if code.get(file) != files.get(file))
            raise ConfigError(f"cluster: {machine} has other code: {', '.join(other)}")


@ray.remote(num_cpus=0)
def _look(origin: str) -> tuple[str | None, dict[str, str]]:
    """What this machine sees: the id in the file `origin`, and the code's files with hashes."""
    file = Path(origin)
    there = json.loads(file.read_text())["id"] if file.exists() else None
    return there, provenance.code(provenance.ROOT)["files"]


def _reach(address: str | None) -> None:
    """Raises OSError if nobody listens there: Ray would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def trials_at_once(resources: Mapping[str, float]) -> int:
    """How many trials that need `resources` fit on the cluster as it is now."""
    return sum(
        min(
            int(node["Resources"].get(kind.upper(), 0) / share + 1e-9)  # five of 0.2 are one
            for kind, share in resources.items()
            if share
        )
        for node in ray.nodes()
        if node["Alive"]
    )
