"""Trains trials side by side, in one process on one device: each as lanes of its structure.

A trial asks for its next epochs (`Server.step`), each in a thread of its own, and waits for them.
Whoever has the turn of a structure trains all trials of it that wait by an epoch, so that a server
needs no thread of its own, and one with a single trial trains it in the caller's.

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
from dataclasses import dataclass, field
from typing import Any

import jax
from filelock import FileLock
from ray.air.constants import TRAINING_ITERATION

from disinhib import checkpoint, compilation_cache, export, lanes, memory, numerics, training
from disinhib.config import RunConfig, parse
from disinhib.errors import FULL_DISK, one_line, reason_of
from disinhib.lanes import Lanes
from disinhib.solvers import stability
from disinhib.training import Data, TrainingState
from disinhib.tuning import machines
from disinhib.tuning.event_log import TrialConfig, over_seeds
from disinhib.tuning.retention import checkpoint_file, model_file, sizes
from disinhib.tuning.worker import (
    FAILURE,
    GPU_MB,
    LANES,
    MACHINE,
    REPORT,
    SAVED,
    UNFIT,
    Order,
    Policy,
)

QUIET_EPOCHS = 20  # with half of the slots free, before there are half as many: that compiles
SHARE_OF_MEMORY = 0.9  # of a device's, that slots may fill


class Unfit(RuntimeError):
    """This machine may not train trials of this study."""


class Released(RuntimeError):
    """The trial's worker has been given up: another trains it."""


@dataclass(eq=False)
class Trial:
    """A trial in training. `state` is None while its lanes are in slots."""

    config: TrialConfig
    policy: Policy
    decisions: frozenset[int]  # epochs after which it waits for the driver
    run: RunConfig
    group: Group
    state: TrainingState | None
    reports: list[dict[str, Any]]
    memory: memory.Memory
    compiled: int  # programs of this process before its next epoch
    saved_epochs: int
    saved: float = field(default_factory=time.monotonic)
    told: int = 0
    asked: float = 0.0  # when, by time.monotonic()
    waits: bool = False  # for its next epochs
    words: dict[str, Any] = field(default_factory=dict)  # beside its epochs: what prevented a save
    error: Exception | None = None

    @property
    def names(self) -> tuple[tuple[int, int], ...]:
        """Of its lanes."""
        return tuple((self.config["number"], seed) for seed in self.config["seeds"])

    def tell(self) -> None:
        """Its next report is told, and it waits no longer if that is what it has waited for."""
        self.told += 1
        epochs, late = self.config["epochs"], self.policy["stretch_seconds"]
        final = self.config["final"] and self.told == epochs - 1  # its last one takes longer
        decided = self.told in self.decisions or self.told >= epochs
        if decided or final or self.words or time.monotonic() - self.asked >= late:
            self.waits = False

    def fail(self, error: Exception) -> None:
        self.error, self.waits = error, False

    def diverged(self) -> dict[str, str]:
        """Reasons of the seeds that have diverged."""
        return {seed: why for report in self.reports for seed, why in report["diverged"].items()}


class Server:
    """Trains trials of any structure, of each at most `slots` lanes at once (but as many as one
    trial has)."""

    def __init__(self, slots: int = 1):
        self.slots = slots
        self.trials: dict[int, Trial] = {}
        self.groups: dict[str, Group] = {}
        self.make_group = Group
        self.admitted: dict[int, int] = {}  # lanes of each trial
        self.programs: set[str] = set()  # that this process has
        self.compilations = count_compilations()
        self.proved = False
        self.lock = threading.Lock()  # of all of these

    def admit(self, number: int, count: int) -> bool:
        """Whether there is room for the `count` lanes of a trial, which then has it until it is
        released."""
        with self.lock:
            held = sum(self.admitted.values()) - self.admitted.get(number, 0)
            if held and held + count > self.slots:
                return False
            self.admitted[number] = count
            return True

    def release(self, number: int) -> None:
        """Forgets a trial."""
        with self.lock:
            self.admitted.pop(number, None)
            trial = self.trials.pop(number, None)
            if trial is not None:
                trial.waits = False
                trial.group.trials.remove(trial)
                if not trial.group.trials:
                    self.groups.pop(trial.group.key, None)

    def step(self, order: Order, anew: bool = False) -> dict[str, Any]:
        """Trains a trial until the driver must decide, or the policy's `stretch_seconds` have
        passed: the result for Ray. `anew`: from its checkpoint or its start, whatever is known of
        it."""
        number = order["number"]
        if anew:
            self.release(number)
        trial = self.trials.get(number)
        try:
            if trial is None:
                trial = self._begin(order)
            first = trial.told
            trial.group.train(trial)
            result = {**self._result(trial, first), SAVED: trial.saved_epochs}
        except Exception as error:  # of the machine, or of the trial
            saved = 0 if trial is None else trial.saved_epochs
            return {**_fault(error, begun=trial is not None), SAVED: saved}
        if self.trials.get(number) is not trial:
            raise Released(f"trial {number}")
        return result

    def _begin(self, order: Order) -> Trial:
        """Loads the data, and the trial's checkpoint if it has one."""
        policy = order["policy"]
        with self.lock:
            if not self.proved:
                if lines := machines.faults(policy["need"]):
                    raise Unfit("; ".join(lines))
                numerics.set_jax()
                compilation_cache.share()  # here, because it needs the device, which may be missing
                self.proved = True
        mark, compiled = memory.start(), len(self.compilations)  # the first epoch has the start
        run = parse(order["options"])
        data = training.prepare(run)
        file, reports = checkpoint_file(policy["folder"], order["number"]), []
        if file.exists():
            state, reports = checkpoint.load(file, run)
        else:
            state = training.initial_state(run, order["seeds"])
        evaluated = run.epochs, run.test_at_end, run.evaluated_share_of_train
        key = str((run.architecture, run.dataset, run.dataset_path, run.valid_split, *evaluated))
        with self.lock:
            group = self.groups.setdefault(key, self.make_group(key, run, data, self))
            trial = Trial(
                config=order,
                policy=policy,
                decisions=frozenset(order["decisions"]),
                run=run,
                group=group,
                state=state,
                reports=reports,
                memory=mark,
                compiled=compiled,
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
            if trial.config["final"] and trial.told == trial.config["epochs"]:
                epochs[-1] = {**self._checked(trial, epochs[-1]), "epoch": trial.told}
            # No `done` after the last epoch: the study loop ends every trial, and Tune would not
            # pass a result with `done` to its scheduler.
            result = {
                **over_seeds(epochs[-1]["metrics"]),
                REPORT: json.dumps({"epochs": epochs, **trial.words}),
                TRAINING_ITERATION: trial.told,
            }
        trial.words = {}
        return result if trial.error is None else {**result, **_fault(trial.error, begun=True)}

    def _checked(self, trial: Trial, report: Mapping[str, Any]) -> dict[str, Any]:
        """The last report of a final trial, with the results of the check of its dynamics. Writes a
        file for each trained model beside the checkpoint."""
        config, run, data = trial.config, trial.run, trial.group.data
        metrics, flags = dict(report["metrics"]), {}
        diverged = trial.diverged()
        state = trial.group.state_of(trial)
        images, labels = (array[: run.architecture.batch_size] for array in data.validation)
        for lane, seed in enumerate(config["seeds"]):
            if str(seed) in diverged:
                continue
            parameters = jax.tree.map(lambda leaf, lane=lane: leaf[lane], state.parameters)
            images_of_floats = images.astype(float) * data.scale
            measured, flag = stability.check(run, parameters, images_of_floats, labels)
            for name, value in measured.items():
                metrics.setdefault(name, [math.nan] * len(config["seeds"]))[lane] = value
            if flag:
                flags[str(seed)] = flag
            file = model_file(trial.policy["folder"], config["number"], seed)
            file.write_bytes(export.dump({**config["options"], "seed": seed}, parameters))
        return {**report, "metrics": metrics, "flags": flags}


class Group:
    """The trials of one structure (and data), and the slots that they share."""

    def __init__(self, key: str, run: RunConfig, data: Data, server: Server):
        self.key, self.run, self.data, self.server = key, run, data, server
        self.trials: list[Trial] = []
        self.lanes: Lanes | None = None
        self.most: int | None = None  # slots, once it is known what fits into the memory
        self.quiet = 0  # epochs with half of the slots free
        self.taken = False  # whether a thread has the turn, and with it `lanes` and all states
        self.news = threading.Condition()  # the turn is free again

    def train(self, trial: Trial) -> None:
        """Trains until the trial need wait no longer, and with it all others that wait."""
        trial.asked, trial.waits = time.monotonic(), True
        while trial.waits and trial.told < len(trial.reports):  # its checkpoint has them
            trial.tell()
        while self._turn(lambda: trial.waits):
            try:
                self._epoch()
            finally:
                self._give_turn()

    def state_of(self, trial: Trial) -> TrainingState:
        self._turn(lambda: True)
        try:
            return self._state_of(trial)
        finally:
            self._give_turn()

    def _turn(self, wanted: Callable[[], bool]) -> bool:
        """Takes the turn as soon as it is free; False if it is `wanted` no longer."""
        with self.news:
            self.news.wait_for(lambda: not self.taken or not wanted())
            if not wanted():
                return False
            self.taken = True
            return True

    def _give_turn(self) -> None:
        with self.news:
            self.taken = False
            self.news.notify_all()

    def _state_of(self, trial: Trial) -> TrainingState:
        if trial.state is not None:
            return trial.state
        assert self.lanes is not None
        return lanes.state_of(self.lanes, trial.names)

    def _epoch(self) -> None:
        """Trains the trials that wait by an epoch, as many as there is room for."""
        waiting = [trial for trial in list(self.trials) if trial.waits]
        if not waiting:  # the last one has just been released
            return
        try:
            self._place(waiting)
            assert self.lanes is not None
            seconds = self._prepare()
            self.lanes, told = lanes.advance(self.run, self.data, self.lanes)
        except Exception as error:
            if not (_is_out_of_memory(error) and self._halve()):
                self.lanes = None
                for trial in waiting:
                    trial.fail(error)
            return
        for trial in waiting:
            if trial.state is None:
                try:
                    self._report(trial, told, seconds)
                except Exception as error:  # this trial's alone
                    trial.fail(error)

    def _place(self, waiting: list[Trial]) -> None:
        """Takes out the lanes of trials that do not wait, and puts in those that do."""
        needed = sum(len(trial.names) for trial in waiting)
        outside = [trial for trial in waiting if trial.state is not None]
        if self.lanes is not None:
            for trial in list(self.trials):
                if trial.state is None and trial not in waiting:
                    trial.state = self._state_of(trial)
            staying = {name for trial in waiting if trial.state is None for name in trial.names}
            self.lanes = lanes.leave(self.lanes, [n for n in self.lanes.names if n not in staying])
            if not staying:
                self.lanes = None
        slots = self._slots(needed, max(len(trial.names) for trial in waiting))
        if self.lanes is None:
            first, *outside = outside
            assert first.state is not None
            self.lanes = lanes.of(first.names, first.state, first.run.hyperparameters)
            first.state = None
        self.lanes = lanes.resized(self.lanes, slots)
        for trial in outside:
            if len(trial.names) <= self.lanes.free:
                assert trial.state is not None
                scalars = trial.run.hyperparameters
                self.lanes = lanes.join(self.lanes, trial.names, trial.state, scalars)
                trial.state = None

    def _slots(self, needed: int, largest: int) -> int:
        """How many there are from now on. On a CPU, where lanes take turns, as many as lanes; else
        as many as fit, and a half, a quarter ... of it once the others have long been free."""
        if self.most is None:
            self.most = self._fitting()
        if jax.default_backend() == "cpu":
            return max(largest, min(needed, self.most)) if self.server.slots > 1 else needed
        enough = max(self.most, largest)
        if self.lanes is None:
            self.quiet = 0
            return enough
        now = len(self.lanes.names)
        while enough // 2 >= max(needed, largest):
            enough //= 2
        self.quiet = self.quiet + 1 if enough < now else 0
        if enough > now or self.quiet > QUIET_EPOCHS:
            self.quiet = 0
            return enough
        return now

    def _fitting(self) -> int:
        """The number of slots that the device has memory for."""
        limit = memory.device_mb()
        if self.server.slots == 1 or limit is None:
            return self.server.slots
        room = int(SHARE_OF_MEMORY * limit * 1e6)
        return lanes.fitting(self.run, self.data, self.server.slots, room)

    def _halve(self) -> bool:
        """Takes all lanes out, to go on with half as many; says whether that is possible."""
        largest = max((len(trial.names) for trial in self.trials), default=1)
        if self.lanes is None or len(self.lanes.names) <= largest:
            return False
        for trial in self.trials:
            if trial.state is None:
                trial.state = self._state_of(trial)
        self.most, self.lanes = max(largest, len(self.lanes.names) // 2), None
        return True

    def _prepare(self) -> float:
        """Traces and compiles what trains the slots, unless this process has it; takes seconds."""
        start = time.perf_counter()
        assert self.lanes is not None
        run = (self.run, self.data, self.lanes.state)
        if (needed := training.programs_of(*run)) not in self.server.programs:
            lowered = training.lowered_programs(*run)
            with compilation_cache.alone(needed):
                for program in lowered:
                    program.compile()
            self.server.programs.add(needed)
        return time.perf_counter() - start

    def _report(
        self, trial: Trial, told: Mapping[Any, Mapping[str, float]], preparation: float
    ) -> None:
        """Notes an epoch of a trial, and saves its state if that is due. In a search, raises
        training.Diverged if one seed diverges: its numbers are a failure, never a score."""
        assert self.lanes is not None
        before, diverged = trial.diverged(), {}
        for name in trial.names:
            slot, seed = self.lanes.names.index(name), str(name[1])
            why = training.divergence(trial.run, told[name], self.lanes.state, slot)
            if why is None or seed in before:
                continue
            if not trial.config["final"]:
                raise training.Diverged(why)
            diverged[seed] = f"Diverged: {why}"
        dead = {*before, *diverged}
        metrics = {
            metric: [
                math.nan if str(name[1]) in dead else told[name][metric] for name in trial.names
            ]
            for metric in told[trial.names[0]]
        }
        metrics["epoch_seconds"] = [s + preparation for s in metrics["epoch_seconds"]]
        compilations = self.server.compilations[trial.compiled :]
        trial.compiled += len(compilations)
        metrics["compilations"] = [float(len(compilations))]
        metrics["compilation_seconds"] = [sum(compilations)]
        metrics["peak_memory_mb"] = [memory.peak_mb(trial.memory)]
        place = {"device": jax.devices()[0].device_kind, "host": platform.node()}
        if (limit := memory.device_mb()) is not None:
            place[GPU_MB] = f"{limit:.0f}"
        if self.server.slots > 1:
            place[LANES] = str(len(self.lanes.names))
        trial.reports.append({"metrics": metrics, "place": place, "diverged": diverged})
        self._save(trial)
        trial.tell()

    def _save(self, trial: Trial) -> None:
        """Writes a checkpoint if one is due, or notes why it could not."""
        policy, config = trial.policy, trial.config
        last = len(trial.reports) >= config["epochs"]
        due = time.monotonic() - trial.saved >= policy["every_seconds"]
        if not (policy["at_end"] or config["final"] if last else due):
            return
        file = checkpoint_file(policy["folder"], config["number"])
        try:
            with FileLock(file.with_name(".lock")):
                beside = sum(n for other, n in sizes(file.parent).items() if other != file)
                room = policy["cap_bytes"] - beside
                state = self._state_of(trial)
                written = checkpoint.save(file, trial.run, state, trial.reports, room)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            trial.words["obstacle"] = f"{error.strerror}: {file.parent}"
            return
        if not written:
            if last:
                file.unlink(missing_ok=True)  # an earlier epoch's is not the final state
            trial.words["over_cap"] = True
            return
        trial.saved, trial.saved_epochs = time.monotonic(), len(trial.reports)


# What a jax error begins with if another machine would raise it too: a smaller network would fit.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
OF_CONFIGURATION = (OUT_OF_MEMORY, "INVALID_ARGUMENT", "UNIMPLEMENTED")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(OUT_OF_MEMORY)


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


def count_compilations() -> list[float]:
    """A list that from now on gets the seconds of each program that this process compiles (or loads
    from the cache)."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds
