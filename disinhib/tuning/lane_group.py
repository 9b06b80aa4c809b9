"""The trials of one structure that a lane server trains, and the slots that they share.

Of those that wait for their next epochs, whoever has the turn trains all by an epoch: so no thread
of its own is needed, and a trial without neighbours is trained in its caller's thread.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from filelock import FileLock

from disinhib import checkpoint, compilation_cache, lanes, memory, training
from disinhib.config import RunConfig
from disinhib.errors import FULL_DISK
from disinhib.lanes import Lanes
from disinhib.training import Data, TrainingState
from disinhib.tuning.event_log import TrialConfig
from disinhib.tuning.retention import checkpoint_file, sizes
from disinhib.tuning.worker import GPU_MB, LANES, Policy

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # with which an error of jax begins
SHARE_OF_MEMORY = 0.9  # of a device's, that slots may fill


class Process:
    """What all groups of a process share: the seconds of each program that it has compiled (or
    loaded from the cache), the programs that it has, and how many slots of each group (by its key)
    fit."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.compilations: list[float] = []
        self.programs: set[str] = set()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations.append(duration_secs)


@dataclass(eq=False)
class Trial:
    """A trial in training. `state` is None while its lanes are in slots.

    `told` of its `reports` have gone to the driver. Those after it are of epochs that were run
    ahead, while the driver was busy, or are its checkpoint's.
    """

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
    words: dict[str, Any] = field(default_factory=dict)  # beside its epochs: what prevented a save
    error: Exception | None = None
    released: bool = False
    asked: float = 0.0  # when, by time.monotonic()
    _waits: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)  # of what is told

    @property
    def names(self) -> tuple[tuple[int, int], ...]:
        """Of its lanes."""
        return tuple((self.config["number"], seed) for seed in self.config["seeds"])

    @property
    def waits(self) -> bool:
        """Whether it waits for its next epoch."""
        with self._lock:
            return self._waits

    @property
    def may_run_ahead(self) -> bool:
        """Whether its next epoch may be run before it is asked for: from its slot, up to the next
        decision of the driver and one further. Not its last epoch, nor one to be saved."""
        with self._lock:
            trained = len(self.reports)
            undecided = [epoch for epoch in self.decisions if self.told <= epoch < trained]
            in_slot = self.state is None and self.error is None
            last = trained >= self.config["epochs"] - 1
            return in_slot and not (undecided or last or self.save_is_due)

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved >= self.policy["every_seconds"]

    def ask(self) -> None:
        with self._lock:
            self.asked, self._waits = time.monotonic(), not self.released
            self.tell()

    def tell(self) -> None:
        """Tells its reports until it need wait no longer: the driver has to decide, or has heard
        nothing for long, or there will be no more of them."""
        epochs, late = self.config["epochs"], self.policy["stretch_seconds"]
        with self._lock:
            while self._waits and self.told < len(self.reports):
                self.told += 1
                final = self.config["final"] and self.told == epochs - 1  # its last takes longer
                decided = self.told in self.decisions or self.told >= epochs
                if decided or final or self.words or time.monotonic() - self.asked >= late:
                    self._waits = False
            if self.failed:
                self._waits = False

    @property
    def failed(self) -> bool:
        """Whether all that there is to tell is why it has failed."""
        return self.error is not None and self.told == len(self.reports)

    def fail(self, error: Exception) -> None:
        with self._lock:
            self.error = error
            self.tell()

    def release(self) -> None:
        with self._lock:
            self.released, self._waits = True, False

    def diverged(self) -> dict[str, str]:
        """Reasons of the seeds that have diverged."""
        return {seed: why for report in self.reports for seed, why in report["diverged"].items()}


class Group:
    """The trials of one structure (and data), and the slots that they share."""

    def __init__(self, key: str, run: RunConfig, data: Data, slots: int, process: Process):
        self.key, self.run, self.data = key, run, data
        self.given, self.process = slots, process
        self.trials: list[Trial] = []
        self.lanes: Lanes | None = None
        self.most: int | None = process.most.get(key)  # slots that fit into the device's memory
        self.slots = self.most or 0  # on a GPU
        self.quiet = 0.0  # seconds of epochs for which fewer would have done
        self.compiling = 0.0  # seconds that its newest program took
        self.preparation = 0.0  # seconds before the next epoch
        self.taken = False  # whether a thread has the turn, and with it `lanes` and all states
        self.news = threading.Condition()  # the turn is free again

    def train(self, trial: Trial) -> None:
        """Trains until the trial need wait no longer, and with it all others that wait."""
        trial.ask()
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
        """Trains the trials that wait by an epoch, as many as there is room for, and in the room
        that is left those that may run ahead: a slot of a GPU costs as much without a lane."""
        trials = list(self.trials)
        waiting = [trial for trial in trials if trial.waits]
        if not waiting:  # the last one has just been released
            return
        room = self.given if self.most is None else self.most
        training = list(waiting)
        for trial in trials:
            lanes_of = sum(len(other.names) for other in (*training, trial))
            if trial not in waiting and trial.may_run_ahead and lanes_of <= room:
                training.append(trial)
        start = time.perf_counter()
        try:
            self._place(training)
            assert self.lanes is not None
            compiled = self._prepare()
            self.preparation += time.perf_counter() - start
            if compiled:  # so long that others may wait by now
                self.compiling = self.preparation
                return
            start = time.perf_counter()
            self.lanes, told = lanes.advance(self.run, self.data, self.lanes)
            self.quiet += time.perf_counter() - start
            preparation, self.preparation = self.preparation, 0.0
        except Exception as error:
            if not (_is_out_of_memory(error) and self._halve()):
                self._give_up(waiting, error)
            return
        for trial in training:
            if trial.state is None:
                try:
                    self._report(trial, told, preparation)
                except Exception as error:  # this trial's alone
                    trial.fail(error)

    def _give_up(self, waiting: list[Trial], error: Exception) -> None:
        """Fails those that waited for this epoch; the others are where they were before it."""
        for trial in waiting:
            trial.fail(error)
        for trial in list(self.trials):
            if trial.state is None and trial.error is None:
                try:
                    trial.state = self._state_of(trial)
                except Exception as of_device:
                    trial.fail(of_device)
        self.lanes = None

    def _place(self, training: list[Trial]) -> None:
        """Takes out the lanes of other trials, and puts in those of these."""
        needed = sum(len(trial.names) for trial in training)
        outside = [trial for trial in training if trial.state is not None]
        outside.sort(key=lambda trial: trial.asked)
        if self.lanes is not None:
            for trial in list(self.trials):
                if trial.state is None and trial.error is None and trial not in training:
                    trial.state = self._state_of(trial)
            staying = {name for trial in training if trial.state is None for name in trial.names}
            self.lanes = lanes.leave(self.lanes, [n for n in self.lanes.names if n not in staying])
            if not staying:
                self.lanes = None
        slots = self._slots(needed, max(len(trial.names) for trial in training))
        if self.lanes is None:
            first, *outside = outside
            assert first.state is not None
            self.lanes = lanes.of(first.names, first.state, first.run.hyperparameters)
            first.state = None
        self.lanes = lanes.resized(self.lanes, slots)
        for trial in outside:
            if len(trial.names) <= self.lanes.free:  # else it waits for another epoch
                assert trial.state is not None
                scalars = trial.run.hyperparameters
                self.lanes = lanes.join(self.lanes, trial.names, trial.state, scalars)
                trial.state = None

    def _slots(self, needed: int, largest: int) -> int:
        """How many there are from now on. On a CPU, where lanes take turns, as many as lanes; else,
        as each number is a program to compile, all of what fits, or half or a quarter of it: more
        as soon as they are needed, fewer when fewer have been enough for as long as it took to
        compile a program."""
        if self.most is None:
            self.most = self.process.most[self.key] = self._fitting()
            self.slots = self.most  # which has just been compiled, to see whether it fits
        if jax.default_backend() == "cpu":
            return max(largest, min(needed, self.most)) if self.given > 1 else needed
        enough = max(self.most, largest)
        while enough // 2 >= max(needed, largest, self.most // 4):
            enough //= 2
        if max(enough, needed) >= self.slots:
            self.quiet = 0.0
        if enough > self.slots or self.quiet > self.compiling:
            self.slots, self.quiet = enough, 0.0
        return self.slots

    def _fitting(self) -> int:
        """The number of slots that the device has memory for."""
        limit = memory.device_mb()
        if self.given == 1 or limit is None:
            return self.given
        room = int(SHARE_OF_MEMORY * limit * 1e6)
        return lanes.fitting(self.run, self.data, self.given, room)

    def _halve(self) -> bool:
        """Takes all lanes out, to go on with half as many; says whether that is possible."""
        largest = max((len(trial.names) for trial in self.trials), default=1)
        if self.lanes is None or len(self.lanes.names) <= largest:
            return False
        for trial in list(self.trials):
            if trial.state is None and trial.error is None:
                trial.state = self._state_of(trial)
        self.most, self.slots, self.lanes = max(largest, len(self.lanes.names) // 2), 0, None
        self.process.most[self.key] = self.most
        return True

    def _prepare(self) -> bool:
        """Traces and compiles what trains the slots, unless this process has it."""
        assert self.lanes is not None
        run = (self.run, self.data, self.lanes.state)
        if (needed := training.programs_of(*run)) in self.process.programs:
            return False
        lowered = training.lowered_programs(*run)
        with compilation_cache.alone(needed):
            for program in lowered:
                program.compile()
        self.process.programs.add(needed)
        return True

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
        compilations = self.process.compilations[trial.compiled :]
        trial.compiled += len(compilations)
        metrics["compilations"] = [float(len(compilations))]
        metrics["compilation_seconds"] = [sum(compilations)]
        metrics["peak_memory_mb"] = [memory.peak_mb(trial.memory)]
        place = {"device": jax.devices()[0].device_kind, "host": platform.node()}
        if (limit := memory.device_mb()) is not None:
            place[GPU_MB] = f"{limit:.0f}"
        if self.given > 1:
            place[LANES] = str(len(self.lanes.names))
        trial.reports.append({"metrics": metrics, "place": place, "diverged": diverged})
        if trial.waits:  # else the driver may have ended it, and removed its checkpoint
            self._save(trial)
        trial.tell()

    def _save(self, trial: Trial) -> None:
        """Writes a checkpoint if one is due, or notes why it could not."""
        policy, config = trial.policy, trial.config
        last = len(trial.reports) >= config["epochs"]
        if not (policy["at_end"] or config["final"] if last else trial.save_is_due):
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


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(OUT_OF_MEMORY)
