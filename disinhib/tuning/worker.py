"""One trial in a Ray worker: a configuration trained epoch by epoch, its seeds as lanes.

The driver composes and checks a trial's options; the worker gets the result as plain values
(`TrialConfig`) and does not use Hydra, Optuna or MLflow. Workers are reused, and the core caches
compiled programs by structure, so the second trial of a structure compiles nothing: the metric
`compilations` of every epoch shows it.

A trial's checkpoint has its state and its reports so far. A worker that continues from a checkpoint
first repeats these reports, so that no epoch is lost that the driver did not hear of before a kill;
the study loop ignores those that it has.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import ray
from filelock import FileLock
from ray import tune
from ray.air.constants import TRAINING_ITERATION

from disinhib.errors import FULL_DISK, one_line, reason_of
from disinhib.tuning import machines
from disinhib.tuning.event_log import TrialConfig, over_seeds
from disinhib.tuning.retention import checkpoint_file, model_file, sizes

# Keys of a result: the report of an epoch, as JSON, why training failed, or why the machine did;
# and the machine (Ray's node id), with the epoch from which another would go on.
REPORT, FAILURE, MACHINE = "report", "failure", "machine"
NODE, SAVED = "node", "saved"
UNFIT = "unfit"  # the machine has not proved itself
GPU_MB = "gpu_memory_mb"  # in a report's place: what the worker may take of its GPU's memory


class Policy(TypedDict):
    """Where and when a trial saves its state."""

    folder: str
    every_seconds: float  # between two checkpoints of a trial
    at_end: bool  # also when it has run its whole budget
    cap_bytes: float  # for the whole folder
    need: machines.Need


class Unfit(RuntimeError):
    """This machine may not train trials of this study."""


class TrainingTrial(tune.Trainable):
    """Ray's handle on a training run; a step is one epoch.

    Its configuration is a `TrialConfig` and, under `policy`, a `Policy`. jax is imported only here,
    after Ray has set the worker's environment (`environment.of_worker`): XLA sizes its thread pool
    once, when it starts.
    """

    def setup(self, config: dict) -> None:
        self._compilations = count_compilations()
        self._programs: set[str] = set()  # that this process has
        self._proved = False
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        """Prepares for a trial, in a new worker or in a reused one. Whatever can fail happens in
        the first step, whose errors count as the trial's and not as the worker's."""
        self._trial = cast(TrialConfig, new_config)
        self._policy = cast(Policy, new_config["policy"])
        self._begun, self._failure, self._saved_epochs = False, None, 0
        return True

    def step(self) -> dict:
        """Trains one epoch, or repeats the report of an epoch in the checkpoint.

        An error is reported first and raised in the next step, so that the driver can tell it
        from the death of a worker.
        """
        if self._failure is not None:
            raise self._failure
        try:
            result = self._step()
        except Exception as error:
            self._failure = error
            if of_machine(error, self._begun):
                unfit = isinstance(error, Unfit)
                why = str(error) if unfit else one_line(error)
                result = {MACHINE: f"{platform.node()}: {why}", UNFIT: unfit}
            else:
                result = {FAILURE: reason_of(error)}
        return {**result, NODE: self._node, SAVED: self._saved_epochs}

    def _step(self) -> dict:
        if not self._begun:
            self._begin()
        self._told += 1
        obstacle: dict[str, Any] = {}
        if self._told > len(self._reports):
            self._reports.append(self._epoch())
            obstacle = self._save()
        report = self._reports[self._told - 1]
        if self._trial["final"] and self._told == self._trial["epochs"]:
            report = self._checked(report)
        # No `done` after the last epoch: the study loop ends every trial, and Tune would not pass a
        # result with `done` to its scheduler.
        return {
            **over_seeds(report["metrics"]),
            REPORT: json.dumps({**report, "epoch": self._told, **obstacle}),
            TRAINING_ITERATION: self._told,
        }

    def _begin(self) -> None:
        """Loads the data, and the trial's checkpoint if it has one; reuses data and compiled
        programs of earlier trials."""
        from disinhib import checkpoint, compilation_cache, config, memory, numerics, training

        if not self._proved:
            if lines := machines.faults(self._policy["need"]):
                raise Unfit("; ".join(lines))
            self._proved = True
        numerics.set_jax()
        compilation_cache.share()  # here, because it needs the device, which may be missing
        self._memory = memory.start()
        self._compiled = len(self._compilations)  # the first epoch includes the start
        self._run = config.parse(self._trial["options"])
        self._data = training.prepare(self._run)
        self._reports: list[dict[str, Any]] = []
        self._told, self._saved = 0, time.monotonic()
        file = checkpoint_file(self._policy["folder"], self._trial["number"])
        if file.exists():
            self._state, self._reports = checkpoint.load(file, self._run)
            self._saved_epochs = len(self._reports)
        else:
            self._state = training.initial_state(self._run, self._trial["seeds"])
        self._begun = True
        self._preparation = self._prepare()

    def _prepare(self) -> float:
        """Traces and compiles the trial's programs, unless this process has them; takes seconds."""
        from disinhib import compilation_cache, training

        start = time.perf_counter()
        run = (self._run, self._data, self._state)
        if (needed := training.programs_of(*run)) not in self._programs:
            lowered = training.lowered_programs(*run)
            with compilation_cache.alone(needed):
                for program in lowered:
                    program.compile()
            self._programs.add(needed)
        return time.perf_counter() - start

    def _epoch(self) -> dict[str, Any]:
        """The report of one epoch. In a search, raises training.Diverged if one seed diverges: its
        numbers are a failure, never a score."""
        import jax

        from disinhib import memory, training

        advance = training.advance if self._trial["final"] else training.run_epoch
        self._state, lanes = advance(self._run, self._data, self._state)
        lanes["epoch_seconds"] = lanes["epoch_seconds"] + self._preparation
        self._preparation = 0.0
        reasons = training.divergences(self._run, lanes, self._state)
        before = self._diverged()
        seeds = [*map(str, self._trial["seeds"])]
        diverged = {
            seeds[lane]: f"Diverged: {why}"
            for lane, why in reasons.items()
            if seeds[lane] not in before
        }
        dead = {*before, *diverged}
        metrics = {
            name: [math.nan if seeds[lane] in dead else float(v) for lane, v in enumerate(values)]
            for name, values in lanes.items()
        }
        compilations = self._compilations[self._compiled :]
        self._compiled = len(self._compilations)
        metrics["compilations"] = [float(len(compilations))]
        metrics["compilation_seconds"] = [sum(compilations)]
        metrics["peak_memory_mb"] = [memory.peak_mb(self._memory)]
        place = {"device": jax.devices()[0].device_kind, "host": platform.node()}
        if (limit := memory.device_mb()) is not None:
            place[GPU_MB] = f"{limit:.0f}"
        return {"metrics": metrics, "place": place, "diverged": diverged}

    def _diverged(self) -> dict[str, str]:
        """Reasons of the seeds that have diverged up to the epoch being reported."""
        reports = self._reports[: self._told]
        return {seed: why for report in reports for seed, why in report["diverged"].items()}

    def _checked(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The last report of a final trial, with the results of the check of its dynamics. Writes a
        file for each trained model beside the checkpoint."""
        import jax

        from disinhib import export
        from disinhib.solvers import stability

        metrics, flags = dict(report["metrics"]), {}
        diverged = self._diverged()
        size = self._run.architecture.batch_size
        images, labels = (array[:size] for array in self._data.validation)
        for lane, seed in enumerate(self._trial["seeds"]):
            if str(seed) in diverged:
                continue
            parameters = jax.tree.map(lambda leaf, lane=lane: leaf[lane], self._state.parameters)
            measured, flag = stability.check(
                self._run, parameters, images.astype(float) * self._data.scale, labels
            )
            for name, value in measured.items():
                metrics.setdefault(name, [math.nan] * len(self._trial["seeds"]))[lane] = value
            if flag:
                flags[str(seed)] = flag
            options = {**self._trial["options"], "seed": seed}
            file = model_file(self._policy["folder"], self._trial["number"], seed)
            file.write_bytes(export.dump(options, parameters))
        return {**report, "metrics": metrics, "flags": flags}

    def _save(self) -> dict[str, Any]:
        """Writes a checkpoint if one is due. Returns why it could not, if so."""
        from disinhib import checkpoint

        policy, last = self._policy, len(self._reports) >= self._trial["epochs"]
        due = time.monotonic() - self._saved >= policy["every_seconds"]
        if not (policy["at_end"] or self._trial["final"] if last else due):
            return {}
        file = checkpoint_file(policy["folder"], self._trial["number"])
        try:
            with FileLock(file.with_name(".lock")):
                beside = sum(n for other, n in sizes(file.parent).items() if other != file)
                room = policy["cap_bytes"] - beside
                written = checkpoint.save(file, self._run, self._state, self._reports, room)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            return {"obstacle": f"{error.strerror}: {file.parent}"}
        if not written:
            if last:
                file.unlink(missing_ok=True)  # an earlier epoch's is not the final state
            return {"over_cap": True}
        self._saved, self._saved_epochs = time.monotonic(), len(self._reports)
        return {}


# What a jax error begins with if another machine would raise it too: a smaller network would fit.
OF_CONFIGURATION = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


def of_machine(error: Exception, begun: bool) -> bool:
    """Whether an error is the machine's: a file, a device that is gone; before training has `begun`
    also any other, as the driver has checked the options and seen the data."""
    import jax

    if isinstance(error, MemoryError):
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(OF_CONFIGURATION)
    return not begun or isinstance(error, OSError | ImportError)


def count_compilations() -> list[float]:
    """A list that from now on gets the seconds of each program that this process compiles (or loads
    from the cache)."""
    from jax import monitoring

    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    return seconds
