"""One trial: a configuration trained epoch by epoch in a Ray worker, and how the driver reads it.

The driver composes and checks a trial's options; the worker gets the plain result (`TrialConfig`)
and knows nothing of Hydra, Optuna or MLflow. Workers are reused, and the core caches its compiled
programs by structure, so the second trial of a structure compiles nothing: `compilations` of
every epoch is reported to prove it.
"""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import pooch
from ray import cloudpickle, tune
from ray.air.constants import TRAINING_ITERATION
from ray.tune.experiment import Trial as RayTrial

# Ray, the scheduler and the searcher see one number a trial and epoch under this name: the mean
# over lanes of the study's metric.
SCORE = "score"
LEAST_CONVERGED = 0.9  # share of an epoch's samples whose closed loop must be a steady state
METRICS = "metrics"
CHECKPOINT = "checkpoint.msgpack"

WAITING, RUNNING = "waiting", "running"
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
KILLED = "killed"  # the study was interrupted while it ran


class TrialConfig(TypedDict):
    """What a worker gets. (Plain values only: it crosses processes and is stored by Ray.)"""

    number: int  # from 0, the same in Ray, Optuna and MLflow
    rule: str
    searched: dict[str, Any]  # Hydra overrides that the space chose
    command: str  # runs the same training by hand
    options: dict[str, Any]  # resolved training options
    seed: int
    epochs: int
    metric: str


class TrainingTrial(tune.Trainable):
    """Ray's handle on a training run; a step is one epoch.

    jax is imported only here, after Ray has set the worker's environment (`environment`): XLA
    sizes its thread pool once, when it starts.
    """

    def setup(self, config: dict) -> None:
        share_compilations()
        self._compilations = count_compilations()
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        """Starts another trial in this worker; data and compiled programs stay."""
        from disinhib import config, training

        self._compiled = len(self._compilations)  # the first epoch answers for a trial's start
        self._trial = cast(TrialConfig, new_config)
        self._run = config.parse(self._trial["options"])
        self._data = training.prepare(self._run)
        self._state = training.initial_state(self._run, [self._trial["seed"]])
        return True

    def step(self) -> dict:
        """Trains one epoch.

        Raises `training.Diverged` when a lane's score is not finite, or when too few of a lane's
        samples reached their steady state: such numbers are a failure, never a score.
        """
        from disinhib import training

        self._state, lanes = training.run_epoch(self._run, self._data, self._state)
        means = {name: float(values.mean()) for name, values in lanes.items()}
        metric, epoch = self._trial["metric"], self.iteration + 1
        if not math.isfinite(means[metric]):
            raise training.Diverged(f"{metric} is {means[metric]} in epoch {epoch}")
        converged = float(lanes["train_CL_converged_share"].min())
        if converged < LEAST_CONVERGED:
            raise training.Diverged(
                f"train_CL_converged_share is {converged:.3f} in epoch {epoch}, below"
                f" {LEAST_CONVERGED}"
            )
        means["compilations"] = len(self._compilations) - self._compiled
        self._compiled = len(self._compilations)
        return {
            SCORE: means[metric],
            METRICS: means,
            "done": epoch >= self._trial["epochs"],
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        from disinhib import checkpoint

        checkpoint.save(Path(checkpoint_dir) / CHECKPOINT, self._run, self._state)

    def load_checkpoint(self, checkpoint: str) -> None:
        from disinhib.checkpoint import load

        self._state = load(Path(checkpoint) / CHECKPOINT, self._run)


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
    }


def share_compilations() -> None:
    """Lets a worker load what another one compiled, now or in an earlier study.

    A program takes XLA 2 to 8 s and 0.1 s to load (measured: E-I rules on a core). jax's own
    thresholds would keep none of them. By machine, as XLA compiles for its very CPU.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = pooch.os_cache("disinhib") / "xla" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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


class Row(NamedTuple):
    """A trial as the driver knows it; `score` is that of its last epoch."""

    number: int
    rule: str
    state: str
    epochs: int
    budget: int
    score: float | None
    searched: dict[str, Any]
    command: str


def row(trial: RayTrial, stopped: bool = False) -> Row:
    """Reads a Ray trial; `stopped` says that Ray is just ending it (its status comes later)."""
    config = cast(TrialConfig, trial.config)
    epochs = trial.last_result.get(TRAINING_ITERATION, 0)
    return Row(
        number=config["number"],
        rule=config["rule"],
        state=state(trial.status, epochs, config["epochs"], stopped),
        epochs=epochs,
        budget=config["epochs"],
        score=trial.last_result.get(SCORE),
        searched=config["searched"],
        command=config["command"],
    )


def state(status: str, epochs: int, budget: int, stopped: bool = False) -> str:
    """Complete ran its whole budget, pruned was stopped before, failed raised."""
    if status == RayTrial.ERROR:
        return FAILED
    if stopped or status == RayTrial.TERMINATED:
        return COMPLETE if epochs >= budget else PRUNED
    return RUNNING if status == RayTrial.RUNNING else WAITING


def reason(trial: RayTrial) -> str:
    """Why a trial failed, in one line: the worker's own exception where there is one."""
    path = trial.pickled_error_file  # on the driver's disk; not yet in storage
    if path is None:
        return "the worker left no error"
    error = cloudpickle.loads(Path(path).read_bytes())
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
