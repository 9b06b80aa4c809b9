"""The trials of one structure that a lane server trains, and the slots that they share.

Of those that wait for their next epochs, whoever has the turn trains all by an epoch: so no thread
of its own is needed, and a trial without neighbours is trained in its caller's thread.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from filelock import FileLock

from disinhib import checkpoint, compilation_cache, lanes, memory, training
from disinhib.config import RunConfig
from disinhib.errors import FULL_DISK
from disinhib.lanes import Lanes
from disinhib.training import Data, TrainingState
from disinhib.tuning.event_log import LANES
from disinhib.tuning.retention import checkpoint_file, sizes
from disinhib.tuning.worker import GPU_MB, Order, Policy

SHARE_OF_MEMORY = 0.9  # of a device's, that slots may fill


class Process:
    """What the groups of a process share: its device, and what it has compiled."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}  # by their keys
        self.programs: set[str] = set()  # that it has
        self.freeing = threading.Lock()
        self.freed = 0.0  # when memory was freed last, by time.monotonic()
        self._seconds: dict[int, list[float]] = {}  # by thread
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        seconds = self._seconds.get(threading.get_ident())
        if seconds is not None and event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    @contextmanager
    def compiling(self) -> Iterator[list[float]]:
        """The seconds of each program that this thread compiles (or loads from the cache)."""
        self._seconds[threading.get_ident()] = seconds = []
        try:
            yield seconds
        finally:
            del self._seconds[threading.get_ident()]

    def free_memory(self, since: float, asking: Group | None = None) -> bool:
        """Whether another group than the one that asks has given up slots `since` it began what
        there was no memory for, or does so now: the one with the most. Nobody who has a turn may
        call it."""
        with self.freeing:
            if self.freed > since:
                return True
            others = [group for group in list(self.groups.values()) if group is not asking]
            others.sort(key=lambda group: group.slots, reverse=True)
            freed = any(group.give_up_slots() for group in others)
            if freed:
                self.freed = time.monotonic()
            return freed


@dataclass(eq=False)
class Trial:
    """A trial in training. `state` is None while its lanes are in slots.

    `told` of its `reports` have gone to the driver. Those after it are of epochs that were run
    ahead, while the driver was busy, or are its checkpoint's.
    """

    order: Order
    run: RunConfig
    group: Group
    state: TrainingState | None
    reports: list[dict[str, Any]]
    memory: memory.Memory
    compilations: list[float]  # seconds of each, of its start: they count to its next epoch
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
        return tuple((self.order["number"], seed) for seed in self.order["seeds"])

    @property
    def policy(self) -> Policy:
        return self.order["policy"]

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
            decisions = self.order["decisions"]
            undecided = [epoch for epoch in decisions if self.told <= epoch < trained]
            in_slot = self.state is None and self.error is None
            last = trained >= self.order["epochs"] - 1
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
        epochs, late = self.order["epochs"], self.policy["stretch_seconds"]
        with self._lock:
            while self._waits and self.told < len(self.reports):
                self.told += 1
                final = self.order["final"] and self.told == epochs - 1  # its last takes longer
                decided = self.told in self.order["decisions"] or self.told >= epochs
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
            self.error = error.with_traceback(None)  # which would hold arrays
            self.tell()

    def release(self) -> None:
        with self._lock:
            self.released, self._waits = True, False

    def diverged(self) -> dict[str, str]:
        """Reasons of the seeds that have diverged."""
        return {seed: why for report in self.reports for seed, why in report["diverged"].items()}


class Group:
    """The trials of one structure (and data), and the slots that they share: at most `limit`, or as
    many as one trial has lanes."""

    def __init__(self, key: str, run: RunConfig, data: Data, limit: int, process: Process):
        self.key, self.run, self.data = key, run, data
        self.limit, self.process = limit, process
        self.trials: list[Trial] = []
        self.lanes: Lanes | None = None
        self.most: int | None = None  # slots that fit into the device's memory, once it is known
        self.slots = 0  # of the newest attempt
        self.quiet = 0.0  # seconds of epochs for which fewer would have done
        self.compiling = 0.0  # seconds that its newest program took
        self.preparation = 0.0  # seconds before the next epoch
        self.compilations: list[float] = []  # seconds of each, within these
        self.taken = False  # whether a thread has the turn, and with it `lanes` and all states
        self.others = 0  # threads that wait for it, but not to train: they go first
        self.news = threading.Condition()  # the turn is free again

    def train(self, trial: Trial) -> None:
        """Trains until the trial need wait no longer, and with it all others that wait."""
        trial.ask()
        while True:
            with self._turn(lambda: trial.waits) as mine:
                if not mine:
                    return
                began = time.monotonic()
                waiting = [other for other in list(self.trials) if other.waits]
                try:
                    self._epoch(waiting)
                    continue
                except Exception as error:
                    if not memory.is_short(error):
                        self._give_up(waiting, error)
                        continue
                    if self._halve():
                        continue
                    short = error.with_traceback(None)
            if not (self._fits_alone() and self.process.free_memory(began, self)):
                with self._turn():
                    self._give_up(waiting, short)

    def state_of(self, trial: Trial) -> TrainingState:
        with self._turn():
            return self._state_of(trial)

    def give_up_slots(self) -> bool:
        """Goes on with half as many slots; says whether there were some to give up."""
        with self._turn():
            return self.lanes is not None and self._halve()

    @contextmanager
    def _turn(self, to_train: Callable[[], bool] | None = None) -> Iterator[bool]:
        """The turn, as soon as it is free; False, without it, if none is wanted `to_train`."""
        with self.news:
            if to_train is None:
                self.others += 1
                self.news.wait_for(lambda: not self.taken)
                self.others -= 1
                mine = True
            else:
                self.news.wait_for(lambda: not (self.taken or self.others) or not to_train())
                mine = to_train()
            self.taken = self.taken or mine
        try:
            yield mine
        finally:
            if mine:
                with self.news:
                    self.taken = False
                    self.news.notify_all()

    def _state_of(self, trial: Trial) -> TrainingState:
        if trial.state is not None:
            return trial.state
        assert self.lanes is not None
        return lanes.state_of(self.lanes, trial.names)

    def _epoch(self, waiting: list[Trial]) -> None:
        """Trains the trials that wait by an epoch, as many as there is room for, and in the room
        that is left those that may run ahead: a slot of a GPU costs as much without a lane. Raises
        what concerns all of them."""
        if not waiting:  # the last one has just been released
            return
        room = self.limit if self.most is None else self.most
        together = list(waiting)
        for trial in list(self.trials):
            lanes_of = sum(len(other.names) for other in (*together, trial))
            if trial not in waiting and trial.may_run_ahead and lanes_of <= room:
                together.append(trial)
        with self.process.compiling() as seconds:
            start = time.perf_counter()
            try:
                self._place(together)
                compiled = self._prepare()
            finally:
                self.preparation += time.perf_counter() - start
                self.compilations += seconds
        if compiled:  # so long that others may wait by now
            self.compiling = self.preparation
            return
        assert self.lanes is not None
        with self.process.compiling() as seconds:
            start = time.perf_counter()
            self.lanes, told = lanes.advance(self.run, self.data, self.lanes)
            self.quiet += time.perf_counter() - start
        self.compilations += seconds
        for trial in together:
            if trial.state is None:
                try:
                    self._report(trial, told)
                except Exception as error:  # this trial's alone
                    trial.fail(error)
        self.preparation, self.compilations = 0.0, []

    def _give_up(self, waiting: list[Trial], error: Exception) -> None:
        """Fails those that waited for this epoch; the others are where they were before it."""
        for trial in waiting:
            if trial.waits:
                trial.fail(error)
        self._take_out(self.trials)
        self.lanes, self.preparation, self.compilations = None, 0.0, []

    def _halve(self) -> bool:
        """Takes all lanes out, to go on with half as many slots; says whether that is possible."""
        largest = max((len(trial.names) for trial in self.trials), default=1)
        if self.slots <= largest:
            return False
        self._take_out(self.trials)
        self.lanes = None
        self.most = self.slots = max(largest, min(self.most or self.slots, self.slots // 2))
        return True

    def _fits_alone(self) -> bool:
        """Whether the device would have memory for the newest attempt, without other groups."""
        room = self._memory()
        return room is None or lanes.fits(self.run, self.data, max(1, self.slots), room)

    def _take_out(self, trials: Sequence[Trial]) -> None:
        """Keeps the states of these trials outside of the slots."""
        for trial in list(trials):
            if trial.state is None and trial.error is None:
                try:
                    trial.state = self._state_of(trial)
                except Exception as of_device:
                    trial.fail(of_device)

    def _place(self, together: list[Trial]) -> None:
        """Takes out the lanes of other trials, and puts in those of these."""
        needed = sum(len(trial.names) for trial in together)
        outside = [trial for trial in together if trial.state is not None]
        outside.sort(key=lambda trial: trial.asked)
        staying = {name for trial in together if trial.state is None for name in trial.names}
        if self.lanes is not None:
            self._take_out([trial for trial in list(self.trials) if trial not in together])
            self.lanes = lanes.leave(self.lanes, [n for n in self.lanes.names if n not in staying])
            if not staying:
                self.lanes = None
        least = max(len(staying), *(len(trial.names) for trial in together))
        self.slots = self._slots(needed, least)
        if self.lanes is None:
            first, *outside = outside
            assert first.state is not None
            self.lanes = lanes.of(first.names, first.state, first.run.hyperparameters)
            first.state = None
        self.lanes = lanes.resized(self.lanes, self.slots)
        for trial in outside:
            if len(trial.names) <= self.lanes.free:  # else it waits for another epoch
                assert trial.state is not None
                scalars = trial.run.hyperparameters
                self.lanes = lanes.join(self.lanes, trial.names, trial.state, scalars)
                trial.state = None

    def _slots(self, needed: int, least: int) -> int:
        """How many there are from now on, at least `least`. On a CPU, where lanes take turns, as
        many as are `needed`; else, as each number is a program to compile, all of what fits, or
        half or a quarter of it: more as soon as they are needed, fewer when fewer have been enough
        for as long as it took to compile a program."""
        if self.most is None:
            self.most = self._fitting()
        # At first as many as have just been compiled, to see whether they fit.
        slots, most = self.slots or self.most, self.most
        if jax.default_backend() == "cpu":
            return max(least, min(needed, most)) if self.limit > 1 else needed
        enough = max(most, least)
        while enough // 2 >= max(needed, least, most // 4):
            enough //= 2
        if max(enough, needed) >= slots:
            self.quiet = 0.0
        if enough > slots or self.quiet > self.compiling:
            slots, self.quiet = enough, 0.0
        return slots

    def _fitting(self) -> int:
        """The number of slots that the device has memory for."""
        room = self._memory()
        if self.limit == 1 or room is None:
            return self.limit
        return lanes.fitting(self.run, self.data, self.limit, room)

    def _memory(self) -> int | None:
        """Bytes of the device that slots may fill; None on a CPU."""
        device_mb = memory.device_mb()
        return None if device_mb is None else int(SHARE_OF_MEMORY * device_mb * 1e6)

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

    def _report(self, trial: Trial, told: Mapping[Any, Mapping[str, float]]) -> None:
        """Notes an epoch of a trial, and saves its state if that is due. In a search, raises
        training.Diverged if one seed diverges: its numbers are a failure, never a score."""
        assert self.lanes is not None
        before, diverged = trial.diverged(), {}
        for name in trial.names:
            slot, seed = self.lanes.names.index(name), str(name[1])
            why = training.divergence(trial.run, told[name], self.lanes.state, slot)
            if why is None or seed in before:
                continue
            if not trial.order["final"]:
                raise training.Diverged(why)
            diverged[seed] = f"Diverged: {why}"
        dead = {*before, *diverged}
        metrics = {
            metric: [
                math.nan if str(name[1]) in dead else told[name][metric] for name in trial.names
            ]
            for metric in told[trial.names[0]]
        }
        before_epoch = self.preparation + sum(trial.compilations)
        metrics["epoch_seconds"] = [s + before_epoch for s in metrics["epoch_seconds"]]
        compilations, trial.compilations = [*trial.compilations, *self.compilations], []
        metrics["compilations"] = [float(len(compilations))]
        metrics["compilation_seconds"] = [sum(compilations)]
        metrics["peak_memory_mb"] = [memory.peak_mb(trial.memory)]
        place = {"device": jax.devices()[0].device_kind, "host": platform.node()}
        if (limit := memory.device_mb()) is not None:
            place[GPU_MB] = f"{limit:.0f}"
        if self.limit > 1:
            place[LANES] = str(len(self.lanes.names))
        trial.reports.append({"metrics": metrics, "place": place, "diverged": diverged})
        if trial.waits:  # else the driver may have ended it, and removed its checkpoint
            self._save(trial)
        trial.tell()

    def _save(self, trial: Trial) -> None:
        """Writes a checkpoint if one is due, or notes why it could not."""
        policy, order = trial.policy, trial.order
        last = len(trial.reports) >= order["epochs"]
        if not (policy["at_end"] or order["final"] if last else trial.save_is_due):
            return
        file = checkpoint_file(policy["folder"], order["number"])
        try:
            with FileLock(file.with_name(".lock")):
                if trial.released:  # meanwhile: another worker may have written it
                    return
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
