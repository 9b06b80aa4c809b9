"""One trial in a Ray worker: a configuration trained epoch by epoch, seeds as lanes.

The driver composes and checks a trial's options; the worker gets the plain result (`TrialConfig`)
and knows nothing of Hydra, Optuna or MLflow. Workers are reused, and the core caches its compiled
programs by structure, so the second trial of a structure compiles nothing: `compilations` of
every epoch is reported to prove it.

A trial's checkpoint has its results so far beside its state. A worker that goes on from one first
reports them again, so that no epoch is lost that the driver had not yet heard of when it, or the
worker, was killed; who has heard of an epoch ignores it (`journal`).
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from filelock import FileLock
from ray import tune
from ray.air.constants import TRAINING_ITERATION

from disinhib.tuning.early_stopping import SCORE

# Ray, the scheduler and the searcher see one number a trial and epoch under the name SCORE: the
# mean over lanes of the study's metric.
METRICS, PLACE = "metrics", "place"
DISK_FULL, OVER_CAP = "disk_full", "over_cap"  # why no checkpoint was written


class Checkpoints(TypedDict):
    """Where and when a trial keeps its state."""

    folder: str
    every_seconds: float  # between two of a trial
    at_end: bool  # also when it has run its whole budget
    cap_bytes: float  # for the whole folder


class TrialConfig(TypedDict):
    """What a worker gets. (Plain values only: it crosses processes and is kept as JSON.)"""

    number: int  # from 0, the same in Ray, Optuna and MLflow
    rule: str
    searched: dict[str, Any]  # Hydra overrides that the space chose
    command: str  # runs the same training by hand
    options: dict[str, Any]  # resolved training options
    seeds: list[int]
    epochs: int
    metric: str


class TrainingTrial(tune.Trainable):
    """Ray's handle on a training run; a step is one epoch.

    Its configuration is a `TrialConfig` and, under `checkpoints`, a `Checkpoints`. jax is imported
    only here, after Ray has set the worker's environment (`environment`): XLA sizes its thread
    pool once, when it starts.
    """

    def setup(self, config: dict) -> None:
        self._compilations = count_compilations()
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        """Makes ready for a trial, in a new worker or in one that has run others. What can fail
        is left to the first step, whose errors are the trial's own and not the worker's."""
        self._trial = cast(TrialConfig, new_config)
        self._begun = False
        return True

    def step(self) -> dict:
        """Trains one epoch, or reports one again that a checkpoint has.

        Raises `training.Diverged` where that does: such numbers are a failure, never a score.
        """
        if not self._begun:
            self._begin()
        obstacle = {}
        self._told += 1
        if self._told > len(self._results):
            self._results.append(self._epoch())
            obstacle = self._save()
        last = self._told >= self._trial["epochs"]
        body = self._results[self._told - 1]
        return {**body, TRAINING_ITERATION: self._told, "done": last, **obstacle}

    def _begin(self) -> None:
        """Loads data, and the trial's checkpoint if it has one; data and compiled programs of
        earlier trials are still there."""
        from disinhib import checkpoint, compilation_cache, config, memory, training

        compilation_cache.share()  # here, as it asks for the device, which may be missing
        self._memory = memory.start()
        self._compiled = len(self._compilations)  # the first epoch answers for a trial's start
        self._run = config.parse(self._trial["options"])
        self._data = training.prepare(self._run)
        self._results: list[dict[str, Any]] = []
        self._told, self._saved, self._begun = 0, time.monotonic(), True
        kept = checkpoint_file(self._checkpoints["folder"], self._trial["number"])
        if kept.exists():
            self._state, self._results = checkpoint.load(kept, self._run)
        else:
            self._state = training.initial_state(self._run, self._trial["seeds"])

    def _epoch(self) -> dict[str, Any]:
        from disinhib import memory, training

        self._state, lanes = training.run_epoch(self._run, self._data, self._state)
        metrics = over_lanes(lanes)
        metrics["compilations"] = len(self._compilations) - self._compiled
        metrics["peak_memory_mb"] = memory.peak_mb(self._memory)
        self._compiled = len(self._compilations)
        return {SCORE: metrics[self._trial["metric"]], METRICS: metrics, PLACE: place()}

    def _save(self) -> dict[str, Any]:
        """Writes a checkpoint if one is due; says what kept it from doing so."""
        from disinhib import checkpoint

        policy, last = self._checkpoints, len(self._results) >= self._trial["epochs"]
        due = time.monotonic() - self._saved >= policy["every_seconds"]
        if not (policy["at_end"] if last else due):
            return {}
        file = checkpoint_file(policy["folder"], self._trial["number"])
        try:
            with FileLock(file.with_name(".lock")):
                room = policy["cap_bytes"] - _bytes_beside(file)
                written = checkpoint.save(file, self._run, self._state, self._results, room)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return {DISK_FULL: f"{error.strerror}: {file.parent}"}
        if not written:
            if last:
                file.unlink(missing_ok=True)  # that of an earlier epoch is not its final state
            return {OVER_CAP: True}
        self._saved = time.monotonic()
        return {}

    @property
    def _checkpoints(self) -> Checkpoints:
        return self._trial["checkpoints"]  # pyright: ignore[reportGeneralTypeIssues]


def checkpoint_file(folder: str | Path, number: int) -> Path:
    """The checkpoint of trial `number`."""
    return Path(folder) / f"{number:04d}.msgpack"


def _bytes_beside(file: Path) -> int:
    """What the other checkpoints in the folder of `file` take."""
    sizes = []
    for other in file.parent.glob("*.msgpack"):
        with suppress(FileNotFoundError):  # the driver removes some meanwhile
            sizes.append(other.stat().st_size if other != file else 0)
    return sum(sizes)


def over_lanes(lanes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean over lanes of each metric and, of several lanes, its standard deviation (n - 1) as
    `<name>_sd`."""
    means = {name: float(values.mean()) for name, values in lanes.items()}
    spread = {f"{n}_sd": float(v.std(ddof=1)) for n, v in lanes.items() if len(v) > 1}
    return means | spread


def place() -> dict[str, str]:
    """Where this process computes."""
    import jax

    return {"device": jax.devices()[0].device_kind, "host": platform.node()}


def environment(cpus: float, gpus: float) -> dict[str, str]:
    """Environment of a worker that may use `cpus` cores and `gpus` GPUs (counts, or shares).

    XLA's CPU pool takes every core of the machine unless PJRT_NPROC is set. (Measured with jax
    0.10.2 on 2 cores, matrix products of 1024: CPU/wall 1.94, with PJRT_NPROC=1 1.00; XLA_FLAGS
    with `--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1` 1.94.) Ray no longer
    hides GPUs from an actor that asked for none, so jax is told.
    """
    threads = str(max(1, int(cpus)))
    pools = ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(pools, threads),
        **({} if gpus else {"JAX_PLATFORMS": "cpu"}),
        **{name: os.environ[name] for name in ("DISINHIB_DATA",) if name in os.environ},
    }


def count_compilations() -> list[float]:
    """Starts a list that grows by the seconds of each program that is compiled (or, shared, loaded)
    in this process."""
    from jax import monitoring

    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    return seconds
