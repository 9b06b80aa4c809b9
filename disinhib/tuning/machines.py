"""The machines of a Ray cluster: which may train a study's trials, and how they prove it.

Every machine is surveyed before the first trial, or when it joins, and every worker looks at its
own when it is born, because a machine may change meanwhile. One that is not fit is left out.
"""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from disinhib import plugins
from disinhib.errors import ConfigError, InputError, one_line
from disinhib.files import write_whole
from disinhib.tuning import cluster, provenance

FILE = "driver.json"  # in a study's folder: what the driver has, and every machine must have too
SURVEY_SECONDS = 120.0  # a machine that takes longer to answer, with its data loaded, is left out
CLOCK_SECONDS = 60.0  # by which a clock may be off


class Need(TypedDict):
    """What a machine must show. (Plain values: sent to every worker.)"""

    file: str  # FILE, in a folder that all machines share
    id: str  # in it: of this session of the study
    sources: Sequence[provenance.DataSource]  # of the data
    gpus: float  # of a trial
    plugins: Sequence[Mapping[str, Any]]  # plugins.kept


def require(folder: Path, sources: Sequence[provenance.DataSource], gpus: float) -> Need:
    """Writes down, in a study's folder, what this process has. Raises data.DataError."""
    need = Need(
        file=str(folder / FILE),
        id=uuid.uuid4().hex,
        sources=sources,
        gpus=gpus,
        plugins=plugins.kept(),
    )
    content = {"id": need["id"], "has": [provenance.decisive(source) for source in sources]}
    write_whole(folder / FILE, json.dumps(content).encode())
    return need


def faults(need: Need) -> list[str]:
    """Why this machine may not train trials, a line each with the cure; none if it may. Loads the
    study's plugins, from the texts that the driver has."""
    file = Path(need["file"])
    wanted: dict[str, Any] = {"id": None}
    with suppress(OSError, ValueError):
        wanted = json.loads(file.read_text("utf-8"))
    if wanted["id"] != need["id"]:
        return [f"does not see {file.parent}: out_dir must be a folder that all machines share"]
    differing: dict[str, None] = {}
    try:
        plugins.load_kept(need["plugins"])
    except ConfigError as error:
        return [f"cannot load a plugin: {error}"]
    try:
        for has, source in zip(wanted["has"], need["sources"], strict=True):
            differing |= dict.fromkeys(provenance.differences(has, provenance.decisive(source)))
    except InputError as error:
        return [f"cannot load the data: {error}"]
    lines = []
    if differing:
        lines.append(f"is not as the driver was: {', '.join(differing)}: make it the same")
    if need["gpus"] and (seen := _accelerator()) != "gpu":
        lines.append(f"jax sees no GPU but {seen}: install its CUDA there (docs/cluster.md)")
    return lines


def _accelerator() -> str:
    import jax

    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax raises either
        return f"nothing ({one_line(error)})"


class Look(NamedTuple):
    """What a machine said about itself."""

    faults: list[str]
    seconds: float  # since 1970, by its clock


@ray.remote(num_cpus=0, max_retries=0)
def _look(need: Need) -> Look:
    # Without a GPU, which trials may hold; the workers there look at it.
    return Look(faults({**need, "gpus": 0}), time.time())


@ray.remote(num_cpus=0, max_retries=0)
def _end(pid: int) -> None:
    """Ends a process of this machine if it is (still) a worker of Ray."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return
    if title.startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)


def on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def node_label(left_out: Sequence[str]) -> dict[str, str]:
    """The selector of a placement group that keeps to other nodes."""
    return {"ray.io/node-id": f"!in({', '.join(left_out)})"}


def end_process(node: str, pid: int) -> None:
    """Ends the worker process `pid` on a machine, soon."""
    _end.options(scheduling_strategy=on(node)).remote(pid)


@dataclass
class Machine:
    """A machine of the cluster, as the driver knows it."""

    id: str  # Ray's
    address: str
    room: int  # trials that fit on it at once
    servers: int = 0  # of lanes
    alive: bool = True
    look: Any = None  # ray.ObjectRef of its Look, while it is surveyed
    asked: float = 0.0  # when, in s since 1970
    faults: list[str] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether it may have trials: it has proved itself, or its workers will."""
        return self.alive and not self.faults

    @property
    def fit(self) -> bool:
        return self.open and self.look is None


class Machines:
    """The machines of the cluster that Ray is connected to. `trial` has the resources of a trial
    or, if there are several `lanes`, of a server, for trials of so many `seeds`; a machine without
    room for one is not surveyed, nor is the driver's own, which has what the driver has."""

    def __init__(self, trial: Mapping[str, float], need: Need, lanes: int = 1, seeds: int = 1):
        self.trial, self.need = trial, need
        self.served = lanes > 1
        self.side_by_side = max(1, lanes // seeds)
        self.all: dict[str, Machine] = {}
        self.own = ray.get_runtime_context().get_node_id()

    def room(self) -> int:
        """How many trials fit on the machines that may have some. (To wait for a survey would keep
        a machine that joins idle for as long as its first workers take to start.)"""
        return sum(machine.room for machine in self.all.values() if machine.open)

    def surveying(self) -> bool:
        """Whether a machine has not yet proved itself."""
        return any(machine.look is not None for machine in self.all.values())

    def name(self, node: str) -> str:
        """Its address."""
        return self.all[node].address if node in self.all else "a machine"

    def elsewhere(self, node: str) -> bool:
        """Whether another machine has room for trials."""
        others = (machine for machine in self.all.values() if machine.id != node)
        return any(machine.open and machine.room for machine in others)

    def leave_out(self, node: str, why: str) -> None:
        """Gives a machine no new trials."""
        if node in self.all:
            self.all[node].faults.append(why)

    def take_back(self, node: str) -> None:
        """Gives a machine trials again."""
        if node in self.all:
            self.all[node].faults.clear()

    def left_out(self) -> list[str]:
        """The node ids of machines that must not be given trials: those at fault and, as a trial in
        lanes needs no GPU of its own, those without room for a server."""
        return [m.id for m in self.all.values() if m.alive and (m.faults or not m.room)]

    def hindrance(self) -> str | None:
        """The faults of all machines, if there are some but none that is fit or may be."""
        there = [m for m in self.all.values() if m.alive and m.room]
        if not there or not all(m.faults for m in there):
            return None
        return "; ".join(f"{m.address} {', '.join(m.faults)}" for m in there)

    def refresh(self) -> tuple[list[Machine], list[Machine]]:
        """(the machines that have joined, those that are gone) since the last call; those that have
        joined are being surveyed."""
        now = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        gone = [m for m in self.all.values() if m.alive and m.id not in now]
        for machine in gone:
            machine.alive, machine.look = False, None
        joined = []
        for id, node in now.items():
            if id not in self.all:
                fits = cluster.room(node["Resources"], self.trial)
                room, servers = fits * self.side_by_side, fits if self.served else 0
                machine = Machine(id, node["NodeManagerAddress"], room, servers)
                self.all[id] = machine
                joined.append(machine)
                if room and id != self.own:
                    machine.asked = time.time()
                    machine.look = _look.options(scheduling_strategy=on(id)).remote(self.need)
        return joined, gone

    def surveyed(self, seconds: float = 0.0) -> list[Machine]:
        """The machines whose survey has ended, after waiting for at most `seconds` for all."""
        waited = [machine for machine in self.all.values() if machine.look is not None]
        if not waited:
            return []
        ready, _ = ray.wait(
            [machine.look for machine in waited], num_returns=len(waited), timeout=seconds
        )
        ended = []
        for machine in waited:
            late = time.time() - machine.asked > SURVEY_SECONDS
            if machine.look in ready or late:
                look, machine.look = machine.look, None
                if machine.faults:  # a worker has been faster
                    continue
                machine.faults += (
                    _answer(look, machine.asked)
                    if look in ready
                    else [f"did not answer within {SURVEY_SECONDS:.0f} s"]
                )
                ended.append(machine)
        return ended


def _answer(look: Any, asked: float) -> list[str]:
    """The faults in a machine's answer."""
    try:
        answer = cast(Look, ray.get(look))
    except RayError as error:  # it has other code, or none, or is gone
        return [f"cannot be asked: {one_line(error)}"]
    off = max(asked - answer.seconds, answer.seconds - time.time())
    clock = [f"its clock is {off:.0f} s off: set it"] if off > CLOCK_SECONDS else []
    return [*answer.faults, *clock]


def survey(machines: Machines) -> None:
    """Waits until every machine has proved itself or is gone. Raises ConfigError with faults."""
    machines.refresh()
    while machines.surveying():
        machines.surveyed(SURVEY_SECONDS)
    machines.refresh()  # one that has died meanwhile could not answer
    unfit = [machine for machine in machines.all.values() if machine.alive and machine.faults]
    if unfit:
        words = "; ".join(f"{m.address} {', '.join(m.faults)}" for m in unfit)
        raise ConfigError(f"cluster: {words}")
