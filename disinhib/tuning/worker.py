"""One trial in a Ray worker: Tune's handle on its training, which a `lane_server` does.

The driver composes and checks a trial's options; the worker gets the result as plain values
(`TrialConfig`) and does not use Hydra, Optuna or MLflow. Workers are reused, and the core caches
compiled programs by structure, so the second trial of a structure compiles nothing: the metric
`compilations` of every epoch shows it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError

from disinhib.tuning import machines
from disinhib.tuning.event_log import TrialConfig

# Keys of a result: the reports of its epochs, as JSON, why training failed, or why the machine did;
# the machine (Ray's node id) and the process, with the epoch from which another would go on.
REPORT, FAILURE, MACHINE = "report", "failure", "machine"
NODE, PROCESS, SAVED = "node", "process", "saved"
UNFIT = "unfit"  # the machine has not proved itself
# In a report's place: what the process may take of its GPU's memory, and how many lanes were
# trained at once.
GPU_MB, LANES = "gpu_memory_mb", "lanes"
ADMISSION_SECONDS = 0.2  # between two attempts, if no server has room
# For a server's answer. One that is starting, or has no device yet, does not give any.
ANSWER_SECONDS = 10.0


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
            if anew:
                self._server = _admitted(self._order)
            result = cast(dict, ray.get(self._server.step.remote(self._order, anew)))
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


@ray.remote
class LaneServer:
    """The `lane_server.Server` of a device, as an actor."""

    def __init__(self, slots: int):
        from disinhib.tuning.lane_server import Server

        self._server = Server(slots)

    def step(self, order: Order, anew: bool) -> dict:
        return {**self._server.step(order, anew), **identity()}

    def admit(self, number: int, count: int) -> bool:
        return self._server.admit(number, count)

    def release(self, number: int) -> None:
        self._server.release(number)


def identity() -> dict[str, Any]:
    """Which machine, and which process, trains."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return {NODE: node, PROCESS: os.getpid()}


def server_name(need: machines.Need, *of_device: object) -> str:
    """The name of the server of a device (its machine's node id, and a number there), or what the
    names of all of this session of the study begin with."""
    return "-".join(["lanes", need["id"], *map(str, of_device)])


def _admitted(order: Order) -> Any:
    """A server that has room for the trial; waits for one. Servers of machines that are left out
    are not asked."""
    number, policy = order["number"], order["policy"]
    lanes = policy["lanes"] if order["apart"] else len(order["seeds"])
    study = server_name(policy["need"])
    while True:
        names = sorted(name for name in ray.util.list_named_actors() if name.startswith(study))
        first = number % max(1, len(names))  # trials that begin together try others first
        for name in [*names[first:], *names[:first]]:
            if any(node in name for node in order["left_out"]):
                continue
            try:
                server = ray.get_actor(name)
                if ray.get(server.admit.remote(number, lanes), timeout=ANSWER_SECONDS):
                    return server
            except GetTimeoutError:
                server.release.remote(number)  # it may yet admit it
            except (ValueError, RayError):  # it is gone
                continue
        time.sleep(ADMISSION_SECONDS)
