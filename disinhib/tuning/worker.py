"""One trial in a Ray worker: Tune's handle on its training, which a `lane_server` does.

The driver composes and checks a trial's options; the worker gets the result as plain values
(`TrialConfig`) and does not use Hydra, Optuna or MLflow. Workers are reused, and the core caches
compiled programs by structure, so the second trial of a structure compiles nothing: the metric
`compilations` of every epoch shows it.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypedDict, cast

import ray
from ray import tune
from ray.exceptions import RayError

from disinhib.errors import one_line
from disinhib.tuning import machines
from disinhib.tuning.event_log import TrialConfig

# Keys of a result: the reports of its epochs, as JSON, why training failed, or why the machine did;
# the machine (Ray's node id) and the process, with the epoch from which another would go on.
REPORT, FAILURE, MACHINE = "report", "failure", "machine"
NODE, PROCESS, SAVED = "node", "process", "saved"
UNFIT = "unfit"  # the machine has not proved itself
WAITED = "waited"  # seconds, for a server that has room
GPU_MB = "gpu_memory_mb"  # in a report's place: what the process may take of its GPU's memory
ADMISSION_SECONDS = 0.2  # between two attempts, if no server has room
ANSWER_SECONDS = 1.0  # for a server's answer, before another is asked


class Policy(TypedDict):
    """Where and when a trial saves its state, and how often it reports."""

    folder: str
    every_seconds: float  # between two checkpoints of a trial
    at_end: bool  # also when it has run its whole budget
    cap_bytes: float  # for the whole folder
    stretch_seconds: float  # between two reports, if its epochs are shorter
    need: machines.Need
    lanes: int  # that a server of each device trains at once; 1: each worker trains its own trial


class Order(TrialConfig):
    """What a worker gets."""

    policy: Policy
    decisions: Sequence[int]  # epochs after which the driver decides whether it goes on
    left_out: Sequence[str]  # machines (Ray's node ids) that may not train it
    apart: bool  # no other trial beside it in its server


class TrainingTrial(tune.Trainable):
    """Ray's handle on a training run, whose configuration is an `Order`. A step is an epoch, or
    several if they are short.

    jax is imported only by the server, after Ray has set the process' environment
    (`environment.of_worker`): XLA sizes its thread pool once, when it starts.
    """

    def setup(self, config: dict) -> None:
        self._own: Any = None  # the server in this process
        self._server: Any = None  # the actor that trains the trial
        # Other servers that were asked to admit a trial, its number, and the answer to come.
        self._unanswered: list[tuple[str, int, Any]] = []
        self._order = cast(Order, config)
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        """Prepares for a trial, in a new worker or in a reused one. Whatever can fail happens in
        the first step, whose errors count as the trial's and not as the worker's."""
        self._leave()
        self._order = cast(Order, new_config)
        self._begun, self._failure = False, ""
        return True

    def step(self) -> dict:
        """The trial's next epochs, of its training or of its checkpoint.

        What ends a trial is reported first and raised in the next step, so that the driver can tell
        it from the death of a worker.
        """
        if self._failure:
            raise RuntimeError(self._failure)
        anew, self._begun = not self._begun, True
        if self._order["policy"]["lanes"] == 1:
            result = {**self._here().step(self._order, anew), **identity()}
        else:
            began = time.monotonic()
            if anew:
                self._server, unanswered = _admitted(self._order)
                of_trial = self._order["number"]
                self._unanswered += [(name, of_trial, ref) for name, ref in unanswered.items()]
            waited = time.monotonic() - began
            result = cast(dict, ray.get(self._server.step.remote(self._order, anew)))
            result[WAITED] = waited
            self._decline()
            if self._order["apart"] and REPORT in result:  # not to blame
                self._order["apart"] = False
                self._server.admit.remote(self._order["number"], lanes_of(self._order))
        self._failure = result.get(FAILURE) or result.get(MACHINE) or ""
        return result

    def cleanup(self) -> None:
        self._leave()

    def _here(self) -> Any:
        if self._own is None:
            from disinhib.tuning.lane_server import Server

            self._own = Server()
        return self._own

    def _leave(self) -> None:
        """The server need no longer know the trial that this worker had."""
        if self._own is not None:
            self._own.release(self._order["number"])
        if self._server is not None:
            self._server.release.remote(self._order["number"])
            self._server = None
            self._decline()

    def _decline(self) -> None:
        """Gives back the lanes that further servers have given a trial by now."""
        for asked in list(self._unanswered):
            name, number, answer = asked
            if ray.wait([answer], timeout=0)[0]:
                self._unanswered.remove(asked)
                with suppress(ValueError):
                    ray.get_actor(name).release.remote(number)


class Admission:
    """Who may be in a server of so many lanes. A trial has its lanes until it is released."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.held: dict[int, int] = {}  # lanes of each trial
        self.lock = threading.Lock()

    def admit(self, number: int, lanes: int) -> bool:
        """Whether there is room, or the server empty; a trial that is in it may change its number
        of lanes."""
        with self.lock:
            others = sum(self.held.values()) - self.held.get(number, 0)
            if others and others + lanes > self.lanes:
                return False
            self.held[number] = lanes
            return True

    def release(self, number: int) -> None:
        with self.lock:
            self.held.pop(number, None)


@ray.remote
class LaneServer:
    """The `lane_server.Server` of a device, as an actor. The first step makes the server, as the
    errors of a step are told, and Ray would not start an actor again that cannot be made."""

    def __init__(self, lanes: int):
        self._admission = Admission(lanes)
        self._making, self._made = threading.Lock(), None

    def ready(self) -> None:
        """Returns once it has its device."""

    def admit(self, number: int, lanes: int) -> bool:
        return self._admission.admit(number, lanes)

    def step(self, order: Order, anew: bool) -> dict:
        number = order["number"]
        if number not in self._admission.held:  # Ray has started this server again
            self._admission.held[number] = lanes_of(order)
        try:
            server = self._server()
        except Exception as error:
            why = f"{platform.node()}: {one_line(error)}"
            return {MACHINE: why, UNFIT: False, SAVED: 0, **identity()}
        return {**server.step(order, anew), **identity()}

    def release(self, number: int) -> None:
        self._admission.release(number)
        if self._made is not None:
            self._made.release(number)

    def _server(self) -> Any:
        from disinhib.tuning.lane_server import Server

        with self._making:
            if self._made is None:
                self._made = Server(self._admission.lanes)
            return self._made


def lanes_of(order: Order) -> int:
    """Of a server, that it needs."""
    return order["policy"]["lanes"] if order["apart"] else len(order["seeds"])


def identity() -> dict[str, Any]:
    """Which machine, and which process, trains."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return {NODE: node, PROCESS: os.getpid()}


def server_name(need: machines.Need, *of_device: object) -> str:
    """The name of the server of a device (its machine's node id, and a number there), or what the
    names of all of this session of the study begin with."""
    return "-".join(["lanes", need["id"], *map(str, of_device)])


def _admitted(order: Order) -> tuple[Any, dict[str, Any]]:
    """A server that has room for the trial, and what others were asked and have not answered yet
    (they are starting, or have no device); waits for one. Servers of machines that are left out are
    not asked."""
    number = order["number"]
    study = server_name(order["policy"]["need"])
    asked: dict[str, Any] = {}
    while True:
        names = sorted(name for name in ray.util.list_named_actors() if name.startswith(study))
        first = number % max(1, len(names))  # trials that begin together try others first
        for name in [*names[first:], *names[:first]]:
            if any(node in name for node in order["left_out"]):
                continue
            try:
                server = ray.get_actor(name)
                if name not in asked:
                    asked[name] = server.admit.remote(number, lanes_of(order))
                if not ray.wait([asked[name]], timeout=ANSWER_SECONDS)[0]:
                    continue
                if ray.get(asked.pop(name)):
                    return server, asked
            except (ValueError, RayError):  # it is gone
                asked.pop(name, None)
        time.sleep(ADMISSION_SECONDS)
