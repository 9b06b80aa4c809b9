"""Checkpoints: one file, written atomically, without pickle.

MessagePack (flax.serialization) of the architecture and of the whole training state: parameters,
optimizer, rule state, epoch and seed, from which every key derives; and, as JSON, of the results
so far, so that state and results are always of the same epoch. Resuming repeats the uninterrupted
run bit for bit on CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import serialization

from disinhib import plugins
from disinhib.checks import flatten
from disinhib.config import RunConfig
from disinhib.errors import ConfigError
from disinhib.files import write_whole
from disinhib.training import TrainingState, initial_state

# In the folder of a single run: its options, and its state after the last epoch.
CONFIG, CHECKPOINT = "config.yaml", "checkpoint.msgpack"


class Checkpoint(NamedTuple):
    """A run's training state, and the report of each epoch that it has done."""

    state: TrainingState
    results: list[dict[str, Any]]


def save(
    path: Path,
    config: RunConfig,
    state: TrainingState,
    results: Sequence[Mapping[str, Any]] = (),
    most_bytes: float = math.inf,
) -> bool:
    """Writes `state` and `results` to `path`, unless that took more than `most_bytes`; says whether
    it did. A reader sees the old file or the whole new one."""
    content = serialization.msgpack_serialize(
        {
            "architecture": _described(config),
            "state": serialization.to_state_dict(jax.device_get(_plain(state))),
            "results": json.dumps([dict(epoch) for epoch in results]),
        }
    )
    if len(content) > most_bytes:
        return False
    write_whole(path, content)
    return True


def load(path: Path, config: RunConfig, option: str = "resume") -> Checkpoint:
    """The state in `path`, given by `option`, with its lanes, and the results.

    Raises ConfigError: no such file, not a checkpoint, or one of another architecture (the
    differences are named).
    """
    try:
        content: Any = serialization.msgpack_restore(path.read_bytes())
        saved, state = content["architecture"], content["state"]
        seeds = state["seed"].tolist()
        results = json.loads(content["results"])
    except FileNotFoundError as error:
        raise ConfigError(f"{option}: given {path}, which does not exist") from error
    except Exception as error:  # msgpack names its errors freely
        raise _no_checkpoint(path, option, error) from error
    wanted = _described(config)
    # A plugin that only this process has loaded makes no difference.
    differences = [
        f"{name} {saved.get(name, 'none')} (checkpoint) and {wanted.get(name, 'none')} (this run)"
        for name in sorted({*saved, *(wanted.keys() - plugins.hashes().keys())})
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ConfigError(f"{option}: {path} is of another architecture: {', '.join(differences)}")
    template = initial_state(config, seeds)
    try:
        restored = serialization.from_state_dict(_plain(template), state)
    except ValueError as error:  # parts that are missing or unknown
        raise _no_checkpoint(path, option, error) from error
    return Checkpoint(_with_rule_of(template, jax.tree.map(jnp.asarray, restored)), results)


def _plain(state: TrainingState) -> TrainingState:
    """`state` in types that flax and MessagePack know: a rule's may be any pytree, so it is written
    as the list of its leaves, and random keys as their bits."""
    leaves = jax.tree.leaves(state.rule)
    return state._replace(
        rule=[jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    )


def _with_rule_of(template: TrainingState, plain: TrainingState) -> TrainingState:
    """What `_plain` made of a state whose rule's is like that of `template`."""
    leaves, structure = jax.tree.flatten(template.rule)
    restored = [
        jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else bits
        for leaf, bits in zip(leaves, plain.rule, strict=True)
    ]
    return plain._replace(rule=jax.tree.unflatten(structure, restored))


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _no_checkpoint(path: Path, option: str, error: Exception) -> ConfigError:
    return ConfigError(f"{option}: given {path}, which is no checkpoint ({type(error).__name__})")


def _described(config: RunConfig) -> dict[str, str]:
    description = {"rule": config.rule, **plugins.hashes(), **asdict(config.architecture)}
    description["solver"]["name"] = type(config.architecture.solver).__name__.lower()
    return {name: str(value) for name, value in flatten(description).items()}
