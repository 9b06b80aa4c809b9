"""Many configurations of one structure, trained at once on one device (DESIGN section 4).

A fixed number of slots, each of which may hold a lane: a configuration and a seed, with an age, a
data order and a fate of its own. A lane's result does not depend on its neighbours: it is what it
would be alone, on a CPU bit for bit. A slot that holds none trains a copy of a lane in vain, which
costs a CPU as much as a lane.

On a GPU a step of these networks costs its launches and not its multiplications, so many lanes take
little longer than one; on a CPU they take turns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from disinhib import compilation_cache, memory, training
from disinhib.config import RunConfig
from disinhib.hyperparameters import Hyperparameters
from disinhib.training import Data, TrainingState

Name = Hashable  # of a lane; None is that of a slot without one


class Lanes(NamedTuple):
    """`state` and `hyper` have a leading axis of slots, `names` says which lane each holds."""

    state: TrainingState
    hyper: Hyperparameters
    names: tuple[Name | None, ...]

    @property
    def free(self) -> int:
        return self.names.count(None)


def empty(config: RunConfig, slots: int) -> Lanes:
    """`slots` free slots for the structure of `config`."""
    state = training.initial_state(config, [0] * slots)
    return Lanes(state, training.for_lanes(config.hyperparameters, slots), (None,) * slots)


def of(names: Sequence[Name], state: TrainingState, hyper: Hyperparameters) -> Lanes:
    """As many slots as `names`, which hold `state` `[names, ...]` with the scalars `hyper`."""
    return Lanes(state, training.for_lanes(hyper, len(names)), tuple(names))


def join(
    lanes: Lanes, names: Sequence[Name], state: TrainingState, hyper: Hyperparameters
) -> Lanes:
    """Puts a lane for each of `names` into free slots: `state` `[names, ...]` is where it starts,
    `hyper` has the scalars of all of them. Raises ValueError if there are fewer free slots, or if a
    name is None or not its only one."""
    if len(names) > lanes.free:
        raise ValueError(f"{len(names)} lanes for {lanes.free} free slots")
    if len({None, *lanes.names, *names}) < 1 + len(lanes.names) - lanes.free + len(names):
        raise ValueError(f"{', '.join(map(str, names))}: given, needed are new names")
    slots = [slot for slot, name in enumerate(lanes.names) if name is None][: len(names)]
    held = dict(enumerate(lanes.names)) | dict(zip(slots, names, strict=True))
    own = state, training.for_lanes(hyper, len(names))
    states, scalars = _put((lanes.state, lanes.hyper), np.asarray(slots), own)
    return _copied(Lanes(states, scalars, tuple(held.values())))


def leave(lanes: Lanes, names: Sequence[Name]) -> Lanes:
    """Frees the slots of `names`."""
    left = lanes._replace(names=tuple(None if name in names else name for name in lanes.names))
    return lanes if left.names == lanes.names else _copied(left)


def _copied(lanes: Lanes) -> Lanes:
    """Its free slots hold copies of its lanes, in turn: a loop over lanes at once goes on until the
    last one is done, and what has left, or diverged, or many copies of one lane, could take longer
    than all that stay."""
    held = [slot for slot, name in enumerate(lanes.names) if name is not None]
    if not held or not lanes.free:
        return lanes
    copied = lambda slot, name: held[slot % len(held)] if name is None else slot
    index = [copied(*named) for named in enumerate(lanes.names)]
    states, scalars = _take((lanes.state, lanes.hyper), np.asarray(index))
    return lanes._replace(state=states, hyper=scalars)


def state_of(lanes: Lanes, names: Sequence[Name]) -> TrainingState:
    """The state `[names, ...]` of these lanes, to be kept, or to join others with; on the host if
    the device has no memory for it."""
    if lanes.names == tuple(names):
        return lanes.state
    index = np.asarray([lanes.names.index(name) for name in names])
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    on_host = lambda leaf: leaf[index] if is_key(leaf) else np.asarray(leaf)[index]
    try:
        return _take(lanes.state, index)
    except jax.errors.JaxRuntimeError as error:
        if not memory.is_short(error):
            raise
        return jax.tree.map(on_host, lanes.state)


def resized(lanes: Lanes, slots: int) -> Lanes:
    """With `slots` slots, into which all its lanes must fit: fewer, or more."""
    held = [slot for slot, name in enumerate(lanes.names) if name is not None]
    if slots < len(held):
        raise ValueError(f"{slots} slots for {len(held)} lanes")
    names = tuple(lanes.names[slot] for slot in held) + (None,) * (slots - len(held))
    if names == lanes.names:
        return lanes
    copied = held or [0]
    index = held + [copied[slot % len(copied)] for slot in range(len(held), slots)]
    states, scalars = _take((lanes.state, lanes.hyper), np.asarray(index))
    return Lanes(states, scalars, names)


def _take(of_slots, index):
    return jax.block_until_ready(_taken(of_slots, index))  # here, if there is no memory for it


def _put(of_slots, index, own):
    return jax.block_until_ready(_with(of_slots, index, own))


@jax.jit
def _taken(of_slots, index):
    return jax.tree.map(lambda leaf: leaf[index], of_slots)


@jax.jit
def _with(of_slots, index, own):
    return jax.tree.map(lambda leaf, its: leaf.at[index].set(its), of_slots, own)


def advance(
    config: RunConfig, data: Data, lanes: Lanes
) -> tuple[Lanes, dict[Name, dict[str, float]]]:
    """Trains every lane by one epoch and evaluates it, as `training.advance` does: its metrics by
    its name."""
    state, metrics = training.advance(config, data, lanes.state, lanes.hyper)
    ends = np.asarray(state.epoch) == config.epochs
    told = {
        name: {
            metric: float(values[slot])
            for metric, values in metrics.items()
            if ends[slot] or not metric.startswith("test_")
        }
        for slot, name in enumerate(lanes.names)
        if name is not None
    }
    return lanes._replace(state=state), told


def bytes_needed(config: RunConfig, data: Data, slots: int) -> int:
    """The device's memory that an epoch of so many slots takes, data included, by XLA's analysis of
    the compiled program; on a CPU, where lanes take turns, that of one."""
    state = jax.eval_shape(lambda: training.initial_state(config, [0] * slots))
    hyper = jax.eval_shape(lambda: training.for_lanes(config.hyperparameters, slots))
    lowered = training.programs().epoch.lower(config.architecture, (state, hyper), data)
    with compilation_cache.alone(training.programs_of(config, data, state)):
        compiled = lowered.compile()
    needs = compiled.memory_analysis()
    if needs is None:  # a backend that does not tell
        return 0
    whole = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return whole + needs.generated_code_size_in_bytes - needs.alias_size_in_bytes


def fitting(config: RunConfig, data: Data, most: int, limit: int) -> int:
    """The number of slots, `most` or a half, a quarter ... of it, that `fits`; at least 1."""
    slots = most
    while slots > 1 and not fits(config, data, slots, limit):
        slots //= 2
    return slots


def fits(config: RunConfig, data: Data, slots: int, limit: int) -> bool:
    """Whether an epoch of so many slots takes at most `limit` bytes, and its program compiles."""
    try:
        return bytes_needed(config, data, slots) <= limit
    except jax.errors.JaxRuntimeError as error:
        if not memory.is_short(error):
            raise
        return False
