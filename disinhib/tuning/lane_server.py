"""Trains trials side by side, in one process on one device: each as lanes of its structure.

A trial asks for its next epochs (`Server.step`), each in a thread of its own, and waits for them;
the trials of one structure are a `lane_group.Group`, which trains them.

A trial's checkpoint has its state and its reports so far. A server that continues from a checkpoint
first repeats these reports, so that no epoch is lost that the driver did not hear of before a kill;
the study loop ignores those that it has.
"""

from __future__ import annotations

import json
import math
import platform
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from ray.air.constants import TRAINING_ITERATION

from disinhib import checkpoint, compilation_cache, export, memory, numerics, training
from disinhib.config import parse
from disinhib.errors import one_line, reason_of
from disinhib.solvers import stability
from disinhib.tuning import machines
from disinhib.tuning.event_log import over_seeds
from disinhib.tuning.lane_group import Group, Process, Trial
from disinhib.tuning.retention import checkpoint_file, model_file
from disinhib.tuning.worker import FAILURE, MACHINE, REPORT, SAVED, UNFIT, Order

T = TypeVar("T")


class Unfit(RuntimeError):
    """This machine may not train trials of this study."""


class Released(RuntimeError):
    """The trial's worker has been given up: another trains it."""


class Server:
    """Trains trials of any structure, of each at most `slots` lanes at once (but as many as one
    trial has)."""

    def __init__(self, slots: int = 1):
        self.slots = slots
        self.trials: dict[int, Trial] = {}
        self.process = Process()
        self.lock = threading.Lock()  # of the trials and the groups
        self.proved = False
        # One trial begins at a time: the next one finds its data and its first programs.
        self.beginning = threading.Lock()

    def release(self, number: int) -> None:
        """Forgets a trial."""
        with self.lock:
            self._forget(number)

    def _forget(self, number: int) -> None:
        trial = self.trials.pop(number, None)
        if trial is not None:
            trial.release()
            trial.group.trials.remove(trial)
            self._drop(trial.group)

    def _drop(self, group: Group) -> None:
        """Forgets a group without trials, but not while a thread trains it: a new trial joins it
        then, as a second group of the same structure would need as much memory again."""
        groups = self.process.groups
        if groups.get(group.key) is group and not (group.trials or group.taken):
            del groups[group.key]

    def step(self, order: Order, anew: bool = False) -> dict[str, Any]:
        """Trains a trial until the driver must decide, or the policy's `stretch_seconds` have
        passed: the result for Ray. `anew`: from its checkpoint or its start, whatever is known of
        it."""
        number = order["number"]
        with self.lock:
            if anew:
                self._forget(number)
            trial = self.trials.get(number)
        try:
            if trial is None:
                with self.beginning:
                    trial = self._with_memory(lambda: self._begin(order))
            first = trial.told
            trial.group.train(trial)
            result = {**self._result(trial, first), SAVED: trial.saved_epochs}
        except Exception as error:  # of the machine, or of the trial
            saved = 0 if trial is None else trial.saved_epochs
            return {**_fault(error, begun=trial is not None), SAVED: saved}
        finally:
            with self.lock:
                for group in [*self.process.groups.values()]:
                    self._drop(group)
        if self.trials.get(number) is not trial:
            raise Released(f"trial {number}")
        return result

    def _with_memory(self, work: Callable[[], T]) -> T:
        """What `work` gives; after a group has given up slots, if the device has no memory."""
        while True:
            began = time.monotonic()
            try:
                return work()
            except jax.errors.JaxRuntimeError as error:
                if not (memory.is_short(error) and self.process.free_memory(began)):
                    raise

    def _begin(self, order: Order) -> Trial:
        """Loads the data, and the trial's checkpoint if it has one."""
        policy = order["policy"]
        if not self.proved:
            if lines := machines.faults(policy["need"]):
                raise Unfit("; ".join(lines))
            numerics.set_jax()
            compilation_cache.share()  # here, because it needs the device, which may be missing
            self.proved = True
        mark = memory.start()
        run, reports = parse(order["options"]), []
        file = checkpoint_file(policy["folder"], order["number"])
        with self.process.compiling() as compilations:
            data = training.prepare(run)
            if file.exists():
                state, reports = checkpoint.load(file, run)
            else:
                state = training.initial_state(run, order["seeds"])
        trained_on = run.dataset, run.dataset_path, run.valid_split, run.valid_seed
        evaluated = run.epochs, run.test_at_end, run.evaluated_share_of_train, run.alignment
        key = str((run.architecture, *trained_on, *evaluated))
        with self.lock:
            new = Group(key, run, data, self.slots, self.process)
            group = self.process.groups.setdefault(key, new)
            trial = Trial(
                order=order,
                run=run,
                group=group,
                state=state,
                reports=reports,
                memory=mark,
                compilations=compilations,
                saved_epochs=len(reports),
            )
            group.trials.append(trial)
            self.trials[order["number"]] = trial
        return trial

    def _result(self, trial: Trial, first: int) -> dict[str, Any]:
        """The result for Ray: what is told of the epochs after epoch `first`, and why there are no
        more of them."""
        epochs = [
            {**report, "epoch": epoch}
            for epoch, report in enumerate(trial.reports[: trial.told], start=1)
            if epoch > first
        ]
        result: dict[str, Any] = {}
        if epochs:
            if trial.order["final"] and trial.told == trial.order["epochs"]:
                checked = self._with_memory(lambda: self._checked(trial, epochs[-1]))
                epochs[-1] = {**checked, "epoch": trial.told}
            # No `done` after the last epoch: the study loop ends every trial, and Tune would not
            # pass a result with `done` to its scheduler.
            result = {
                **over_seeds(epochs[-1]["metrics"]),
                REPORT: json.dumps({"epochs": epochs, **trial.words}),
                TRAINING_ITERATION: trial.told,
            }
        trial.words = {}
        if trial.error is not None and trial.failed:
            result |= _fault(trial.error, begun=True)
        return result

    def _checked(self, trial: Trial, report: Mapping[str, Any]) -> dict[str, Any]:
        """The last report of a final trial, with the results of the check of its dynamics. Writes a
        file for each trained model beside the checkpoint."""
        order, run, data = trial.order, trial.run, trial.group.data
        metrics, flags = dict(report["metrics"]), {}
        diverged = trial.diverged()
        state = trial.group.state_of(trial)
        images, labels = (array[: run.architecture.batch_size] for array in data.validation)
        for lane, seed in enumerate(order["seeds"]):
            if str(seed) in diverged:
                continue
            own = (state.parameters, state.rule)
            parameters, rule = jax.tree.map(lambda leaf, lane=lane: leaf[lane], own)
            images_of_floats = images.astype(float) * data.scale
            measured, flag = stability.check(run, parameters, images_of_floats, labels, rule)
            for name, value in measured.items():
                metrics.setdefault(name, [math.nan] * len(order["seeds"]))[lane] = value
            if flag:
                flags[str(seed)] = flag
            file = model_file(trial.policy["folder"], order["number"], seed)
            kept = export.with_feedback(run, parameters, rule)
            file.write_bytes(export.dump({**order["options"], "seed": seed}, kept))
        return {**report, "metrics": metrics, "flags": flags}


# What a jax error begins with if another machine would raise it too: a smaller network would fit.
OF_CONFIGURATION = (memory.OUT_OF_MEMORY, "INVALID_ARGUMENT", "UNIMPLEMENTED")


def of_machine(error: Exception, begun: bool) -> bool:
    """Whether an error is the machine's: a file, a device that is gone; before training has `begun`
    also any other, as the driver has checked the options and seen the data."""
    if isinstance(error, MemoryError):
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(OF_CONFIGURATION)
    return not begun or isinstance(error, OSError | ImportError)


def _fault(error: Exception, begun: bool) -> dict[str, Any]:
    """What Ray is told of an error."""
    if not of_machine(error, begun):
        return {FAILURE: reason_of(error)}
    unfit = isinstance(error, Unfit)
    why = str(error) if unfit else one_line(error)
    return {MACHINE: f"{platform.node()}: {why}", UNFIT: unfit}
