"""Ray Tune as the backend of the study loop, by its public interface.

Tune schedules every trial, places and reuses workers, and restarts trials whose worker died. It
asks a searcher for trials and reports results to a scheduler: here both call the study loop. Tune's
own record is a copy, of the trials that ran since the study was last started.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from disinhib import process
from disinhib.tuning import environment, steering
from disinhib.tuning.event_log import TrialConfig
from disinhib.tuning.loop import (
    Epoch,
    Failed,
    Hindered,
    Loop,
    Lost,
    Outcome,
    Reported,
    Resized,
    Started,
    Steered,
)
from disinhib.tuning.machines import Machines, end_process, node_label, on
from disinhib.tuning.ray_workaround import deaths_counted_once
from disinhib.tuning.worker import (
    FAILURE,
    MACHINE,
    NODE,
    PROCESS,
    REPORT,
    SAVED,
    UNFIT,
    WAITED,
    LaneServer,
    Order,
    Policy,
    server_name,
)

FOLDER = "ray"  # in the study's folder
LEFT_OUT, APART = "left_out", "apart"  # of an Order, which is what Tune knows of a trial
WORKERS_LOST = 3  # a trial is restarted after so many deaths of its worker without a new epoch
# After so many it trains apart, so that a trial which is to blame for its server's deaths ends
# alone and not with all its neighbours.
SUSPECTED = 2
MOST_FORGIVEN = 20  # deaths of a trial's workers, while machines that have joined are surveyed
LOOK_SECONDS = 1.0  # between two looks at the cluster
# A worker is ended if it has reported nothing for PATIENCE times as long as its trial has ever
# taken, and for QUIET_SECONDS. (Of one that has never reported, nobody knows how long it takes.)
PATIENCE, QUIET_SECONDS = 20.0, 60.0
HOLD_SECONDS = 15.0  # before a lost worker is said: it may be its machine that is gone
PLACE_SECONDS = 60.0  # in which a lane server has its GPU, or it is said


@dataclass
class Running:
    """A trial's worker, as far as its reports tell."""

    heard: float  # when it last reported, by time.monotonic()
    node: str = ""
    pid: int = 0
    longest: float = 0.0  # s between two reports
    checks: bool = False  # its next report is a final trial's last, which has checks to do

    def silent(self, now: float) -> bool:
        """For longer than a worker may be."""
        return now - self.heard > max(QUIET_SECONDS, PATIENCE * self.longest)


@dataclass(eq=False)
class RayBackend(tune.Callback):
    """Runs the trials that the study loop starts, as `trainable` with `resources` (cpu, gpu) each,
    or as many as the policy has lanes; `decisions` are the epochs after which one may be stopped.
    As Tune's callback, it tells the loop which trials run or are lost, and ends Tune if the study
    cannot continue.

    Ray's own record is in `folder`. `on_step()` is called now and then, `on_over_cap()` when the
    cap prevented a trial from writing its checkpoint; `say` tells the user what happens to
    `machines`.
    """

    trainable: type[tune.Trainable]
    resources: Mapping[str, float]
    policy: Policy
    decisions: Callable[[TrialConfig], Sequence[int]]
    folder: Path
    machines: Machines
    on_step: Callable[[], None]
    on_over_cap: Callable[[], None]
    say: Callable[[str], None]
    most_servers: int | None = None
    servers: dict[str, Any] = field(default_factory=dict)  # actors of lanes, by name
    # Of those that have no device yet: the answer that they will give, and since when.
    unplaced: dict[str, tuple[Any, float]] = field(default_factory=dict)
    queue: deque[TrialConfig] = field(default_factory=deque)
    running: dict[int, Running] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)  # the newest of each trial
    saved: dict[int, int] = field(default_factory=dict)  # epochs in each trial's checkpoint
    accused: dict[int, list[str]] = field(default_factory=dict)  # machines, by each trial
    # Trials that lost their worker, and where and when, until it is said.
    lost: list[tuple[int, str, float]] = field(default_factory=list)
    looked: float = 0.0  # at the cluster, by time.monotonic()
    error: Exception | None = None  # why the study cannot continue
    over: bool = False

    def start(self, config: TrialConfig) -> None:
        self.queue.append(config)

    def run(self, loop: Loop, callbacks: Sequence[tune.Callback] = ()) -> None:
        """Runs `loop` to its end, or until Ctrl-C. Raises the errors of the loop."""
        self.loop = loop
        self.handler = signal.getsignal(signal.SIGUSR1)
        self.tell(None)
        name = lambda trial: f"{trial.config['number']:04d}"
        tuner = tune.Tuner(
            # Ray keeps a copy of this function, which knows only what the configuration says.
            tune.with_resources(self.trainable, partial(_request, self.of_trial())),
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
        if not self.over:
            try:
                self.serve()
                # Tune counts our callbacks, and imports MLflow's to tell it from them.
                variables = {**VARIABLES, **environment.as_set(environment.UNTRACKED)}
                with environment.variables(variables), deaths_counted_once(), _handlers_restored():
                    tuner.fit()
                self._say_lost(math.inf)
            except Exception:
                if self.error is None:  # Ray wraps errors of its callbacks
                    raise
            finally:
                if ray.is_initialized():  # it may be what has failed
                    for server in self.servers.values():
                        ray.kill(server)
        if self.error is not None:
            raise self.error

    def of_trial(self) -> Mapping[str, float]:
        """What Tune needs for a trial: its own resources or, with lanes, a share of the CPUs of
        all. (Ray counts to four places.)"""
        cpus, lanes = self.resources["cpu"], self.policy["lanes"]
        return self.resources if lanes == 1 else {"cpu": int(1e4 * cpus / lanes) / 1e4}

    def serve(self) -> None:
        """Starts the servers of machines that may have trials, and ends those of others."""
        lanes = self.policy["lanes"]
        for machine in self.machines.all.values():
            for number in range(machine.servers):
                name = server_name(self.policy["need"], machine.id, number)
                few = self.most_servers is None or len(self.servers) < self.most_servers
                if machine.open and few and name not in self.servers:
                    self.servers[name] = server = LaneServer.options(
                        name=name,
                        num_cpus=0,  # or trials, which wait for it, could leave it none
                        num_gpus=self.resources["gpu"],
                        max_concurrency=2 * lanes + 8,  # a call for each trial, and those of others
                        max_restarts=-1,
                        scheduling_strategy=on(machine.id),
                    ).remote(lanes)
                    self.unplaced[name] = server.ready.remote(), time.monotonic()
                elif not machine.open and name in self.servers:
                    ray.kill(self.servers.pop(name))
                    self.unplaced.pop(name, None)

    def order(self, config: TrialConfig) -> Order:
        """What a worker gets to know of a trial."""
        return Order(
            **config,
            policy=self.policy,
            decisions=self.decisions(config),
            left_out=self.machines.left_out(),
            apart=False,
        )

    def _release(self, number: int) -> None:
        """No server need know the trial: it has ended, or lost its worker."""
        for server in self.servers.values():
            server.release.remote(number)

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

    def room(self) -> int:
        """How many trials there may be: those that fit, and those that end where no other may
        begin."""
        open = {id for id, machine in self.machines.all.items() if machine.open}
        elsewhere = sum(bool(w.node) and w.node not in open for w in self.running.values())
        return self.machines.room() + elsewhere

    def hear(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        """Tells the loop of a worker's report; returns whether the trial has ended."""
        number, now = trial.config["number"], time.monotonic()
        worker = self.running.setdefault(number, Running(now))
        worker.longest = max(worker.longest, now - worker.heard - result.get(WAITED, 0.0))
        worker.heard, worker.node = now, result.get(NODE, "")
        worker.pid = result.get(PROCESS, result["pid"])
        self.saved[number] = result.get(SAVED, 0)
        ended = REPORT in result and self._hear_of_epochs(trial, worker, result[REPORT])
        if not ended and (FAILURE in result or MACHINE in result):
            # The worker raises it in its next step; running the trial again would not help, except
            # on another machine.
            trial.max_failures = 0
            if FAILURE in result:
                self.tell(Failed(number, result[FAILURE]))
            else:
                self._blame(trial, worker.node, result)
            return False
        if ended:
            self.running.pop(number, None)
            self._release(number)  # its worker does it too, if it lives
        return ended

    def _hear_of_epochs(self, trial: Trial, worker: Running, text: str) -> bool:
        """Tells the loop of epochs; returns whether the trial has ended."""
        number, report = trial.config["number"], json.loads(text)
        if report.get("over_cap"):
            self.on_over_cap()
        epochs = [Epoch(**epoch) for epoch in report["epochs"]]
        last = epochs[-1].epoch
        if last > self.epochs.get(number, 0):  # deaths count if nothing has come of it
            self.epochs[number] = last
            trial.max_failures = trial.num_failures + WORKERS_LOST
        worker.checks = trial.config["final"] and last >= trial.config["epochs"] - 1
        return self.tell(Reported(number, epochs, report.get("obstacle")))

    def _blame(self, trial: Trial, node: str, result: Mapping[str, Any]) -> None:
        """A machine that is at fault is left out, and its trial goes elsewhere. If that is so on a
        second one, it is not the machines."""
        number, reason = trial.config["number"], result[MACHINE]
        others = self.accused.setdefault(number, [])
        if others and not result.get(UNFIT):
            for other in others:
                self.machines.take_back(other)
            self.tell((Failed if number in self.epochs else Hindered)(number, reason))
        elif self.machines.elsewhere(node):
            if not result.get(UNFIT):
                others.append(node)
            trial.max_failures = trial.num_failures + WORKERS_LOST
            if node not in self.machines.left_out():  # nor said by its survey
                _, _, why = reason.partition(": ")
                self.machines.leave_out(node, why)
                self.serve()  # no server there must take the trial again
                self.say(f"{self.machines.name(node)} is left out: {why}")
        else:
            self.tell(Hindered(number, reason))

    def setup(self, **_: Any) -> None:
        # Tune has taken this signal for itself; with ours, the exit code tells which it was.
        if callable(self.handler):
            signal.signal(signal.SIGUSR1, self.handler)
        self.tunes = signal.getsignal(signal.SIGINT)

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt has reached Tune, whose handler is gone then."""
        return signal.getsignal(signal.SIGINT) is not self.tunes

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        number = trial.config["number"]
        self.running[number] = Running(time.monotonic())
        self._forgive(trial)
        self.tell(Started(number))

    def on_trial_recover(self, *, trial: Trial, **_: Any) -> None:
        number, now = trial.config["number"], time.monotonic()
        worker = self.running.pop(number, Running(now))
        self._release(number)
        self.lost.append((number, worker.node, now))
        deaths = trial.num_failures - (trial.max_failures - WORKERS_LOST)
        known = {LEFT_OUT: self.machines.left_out(), APART: deaths >= SUSPECTED}
        trial.set_config({**trial.config, **known})
        self._forgive(trial)
        self.tell(Lost(number))

    def _forgive(self, trial: Trial) -> None:
        """Deaths do not count while a machine is surveyed: it may be that no worker can live there.
        (For a while: machines may join, and die, for ever.)"""
        if self.machines.surveying() and trial.num_failures < MOST_FORGIVEN:
            trial.max_failures = trial.num_failures + WORKERS_LOST

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
        number = trial.config["number"]
        self._release(number)
        if self.running.pop(number, None) is None and not self.saved:  # no worker was ever born
            why = "see ray.log; do all machines have the same token?"
            self.tell(Hindered(number, f"Ray could not start a worker ({why})"))
        else:
            self.tell(Failed(number, f"worker lost {WORKERS_LOST + 1} times"))

    def on_step_end(self, **_: Any) -> None:
        if self.error is not None:
            raise self.error
        now = time.monotonic()
        if now - self.looked > LOOK_SECONDS:
            stood_still = now - self.looked if self.looked else 0.0
            self.looked = now
            if stood_still > 10 * LOOK_SECONDS:  # the driver itself: reports may be waiting
                for worker in self.running.values():
                    worker.heard += stood_still
            self.look()
        self.on_step()

    def look(self) -> None:
        """Takes in instructions. Looks at the cluster: says which machines have come and gone, and
        where lost trials go on; lets the loop fill new room; ends workers that have long been
        silent; ends the study if no machine is fit."""
        for instruction in steering.take(self.folder, self.say):
            if instruction.verb == steering.STOP:
                self.say("stopped by hand")
                process.interrupt()
            else:
                self.tell(Steered(instruction))
        now, before = time.monotonic(), self.machines.room()
        _, gone = self.machines.refresh()
        for machine in gone:
            self.say(f"{machine.address} is gone{self._go_on(machine.id)}")
        for machine in self.machines.surveyed():
            if machine.faults:
                self.say(f"{machine.address} is left out: {'; '.join(machine.faults)}")
            elif machine.fit:
                self.say(f"{machine.address} joined: {machine.room} more at once")
        self.serve()
        self._say_unplaced(now)
        self._say_lost(now - HOLD_SECONDS)
        if self.machines.room() != before:
            self.tell(Resized())
        self._end_the_silent(now)
        trains = any(worker.pid for worker in self.running.values())  # not before its first report
        if not trains and (hindrance := self.machines.hindrance()):
            self.tell(Hindered(0, hindrance))

    def _say_unplaced(self, now: float) -> None:
        """Says which lane servers have waited for long for a GPU."""
        for name, (answer, since) in list(self.unplaced.items()):
            if ray.wait([answer], timeout=0)[0]:
                del self.unplaced[name]
            elif now - since > PLACE_SECONDS:
                del self.unplaced[name]
                where = next(m.address for m in self.machines.all.values() if m.id in name)
                self.say(
                    f"{where}: no lane server has begun there for {now - since:.0f} s: are its"
                    " GPUs another job's?"
                )

    def _end_the_silent(self, now: float) -> None:
        """Ends processes all of whose trials have long been silent, but for one whose last report
        has checks to do."""
        processes: dict[tuple[str, int], list[int]] = {}
        for number, worker in self.running.items():
            if worker.pid and not worker.checks:
                processes.setdefault((worker.node, worker.pid), []).append(number)
        for process_of, numbers in processes.items():
            workers = [self.running[number] for number in numbers]
            if not all(worker.silent(now) for worker in workers):
                continue
            several = len(numbers) > 1
            named = f"trial{'s' if several else ''} {', '.join(map(str, sorted(numbers)))}"
            quiet = min(now - worker.heard for worker in workers)
            have, their = ("have", "their") if several else ("has", "its")
            self.say(f"{named} {have} been silent for {quiet:.0f} s: {their} worker is ended")
            end_process(*process_of)
            for worker in workers:
                worker.heard = now

    def _say_lost(self, until: float) -> None:
        """Says which workers were lost until then, without their machines being gone."""
        for node in dict.fromkeys(node for _, node, when in self.lost if when <= until):
            name = self.machines.name(node)
            left_out = node in self.machines.left_out()
            start = f"{name} is left out" if left_out else f"a worker on {name} is lost"
            self.say(f"{start}{self._go_on(node)}")

    def _go_on(self, node: str) -> str:
        """`: trials 4, 7 go on from epochs 11, 6`, of those that were lost on a machine."""
        own = sorted({number for number, where, _ in self.lost if where == node})
        self.lost = [entry for entry in self.lost if entry[1] != node]
        if not own:
            return ""
        numbers = ", ".join(map(str, own))
        several = len(own) > 1
        start = f": trials {numbers} go on" if several else f": trial {numbers} goes on"
        if any(number not in self.saved for number in own):
            return f"{start} from {'their checkpoints' if several else 'its checkpoint'}"
        epochs = ", ".join(str(self.saved[number]) for number in own)
        return f"{start} from epoch{'s' if several else ''} {epochs}"

    def __getstate__(self) -> dict:
        return {}  # Ray pickles its parts; the state is in the log


def _request(
    resources: Mapping[str, float], config: Mapping[str, Any]
) -> tune.PlacementGroupFactory:
    """What a trial needs of a machine, and the machines that it may not have."""
    return _placement(tuple(resources.items()), tuple(config.get(LEFT_OUT) or ()))


@lru_cache(maxsize=256)  # Tune asks again and again whether two trials need the same
def _placement(
    resources: tuple[tuple[str, float], ...], left_out: tuple[str, ...]
) -> tune.PlacementGroupFactory:
    bundle = {kind.upper(): share for kind, share in resources}
    if not left_out:
        return tune.PlacementGroupFactory([bundle])
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[node_label(left_out)])


VARIABLES = {
    # By default Ray starts one worker at a time and drops it when another becomes free, so that
    # short trials would run one after another. The loop decides how many trials there are.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    # Tune's record of its trials, 39 kB each, is written whole each time, and nobody reads it.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


class RaySearcher(Searcher):
    """Gives Tune the trials that the loop has started, one after another."""

    def __init__(self, backend: RayBackend):
        super().__init__()
        self.backend = backend

    def suggest(self, trial_id: str) -> Any:
        if not self.backend.queue:  # of a paused study, Tune does nothing but ask, for minutes
            self.backend.on_step_end()
        if self.backend.error is not None:
            raise self.backend.error
        if self.backend.queue:
            return self.backend.order(self.backend.queue.popleft())
        over = self.backend.over or self.backend.interrupted
        return Searcher.FINISHED if over else None

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
        ended = self.backend.hear(trial, result)
        return TrialScheduler.STOP if ended else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first that waits. (Tune's own looks through all that have ended, at every step.)"""
        live = tune_controller.get_live_trials()
        waiting = (trial for trial in live if trial.status == Trial.PENDING)
        return min(waiting, key=lambda trial: trial.config["number"], default=None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_error(tune_controller, trial)
        if trial.status == Trial.ERROR:  # it is about to wait for another worker
            left_out = {LEFT_OUT: self.backend.machines.left_out()}
            trial.update_resources(_request(self.backend.of_trial(), left_out))


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
