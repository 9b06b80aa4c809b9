"""Trained models as files.

A model is one file (MessagePack without pickle) with the resolved options of its training run, from
which the network is built, and the trained parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jaxtyping import Array, Float

from disinhib.config import RunConfig, parse
from disinhib.errors import ConfigError
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.network import Parameters, initial_parameters
from disinhib.plugins import hashes, load as load_plugin, read as read_plugin
from disinhib.solvers import open_loop

FORMAT = 1  # of the file: raised when older readers cannot read newer files


@dataclass(frozen=True)
class Network:
    """The function that a model computes, given parameters; `options` are those of its training."""

    architecture: Architecture
    hyperparameters: Hyperparameters
    dataset: str  # name, of data.DATASETS
    options: Mapping[str, Any]

    def __call__(
        self, parameters: Parameters, x: Float[Array, "batch in"]
    ) -> Float[Array, "batch out"]:
        """The readout's potentials in the open-loop steady state, for inputs in [0, 1]."""
        return _readout(self.architecture, parameters, self.hyperparameters, x)


@partial(jax.jit, static_argnums=0)
def _readout(architecture, parameters, hyper, x):
    return open_loop(architecture, parameters, hyper, x).state.u_y


def dump(options: Mapping[str, Any], parameters: Parameters) -> bytes:
    """The content of a model's file: resolved training options and one lane's parameters."""
    return serialization.msgpack_serialize(
        {
            "format": FORMAT,
            "options": json.dumps(options),
            "plugins": hashes(),
            "parameters": jax.device_get(dict(parameters)),
        }
    )


def load(path: str | Path, plugins: Sequence[str] = ()) -> tuple[Network, Parameters]:
    """The network and the parameters in the file at `path`. A model that was trained with plugins
    needs them (a file is never run because a model names it): `plugins` as in the option.

    Raises ConfigError if the file cannot be read, is not a model, has another format, or has
    invalid options or parameters of another network (naming the differences), or if a plugin is
    missing or has changed.
    """
    try:
        content: Any = serialization.msgpack_restore(Path(path).read_bytes())
        number, options = content["format"], dict(json.loads(content["options"]))
        parameters = {name: jnp.asarray(value) for name, value in content["parameters"].items()}
        needed = dict(content.get("plugins", {}))  # earlier versions had none
    except OSError as error:
        raise ConfigError(f"model: given {path}, cannot be read ({error.strerror})") from error
    except Exception as error:  # msgpack names its errors freely
        raise ConfigError(
            f"model: given {path}, which is no model ({type(error).__name__})"
        ) from error
    if number != FORMAT:
        raise ConfigError(f"model: given {path}, of format {number}, readable is {FORMAT}")
    for given in plugins:
        load_plugin(read_plugin(given))
    lacking = [name for name, sha256 in needed.items() if hashes().get(name) != sha256]
    if lacking:
        text = ", ".join(f"{name} (SHA-256 {needed[name]})" for name in lacking)
        raise ConfigError(f"model: given {path}, needs {text}: load(path, plugins=[FILE])")
    try:
        run = parse(options)
    except ConfigError as error:
        raise ConfigError(f"model: given {path}, with an option that cannot be: {error}") from error
    _check_fit(path, run, parameters)
    return Network(run.architecture, run.hyperparameters, run.dataset, options), parameters


def _check_fit(path: str | Path, run: RunConfig, parameters: Parameters) -> None:
    make = partial(initial_parameters, run.architecture, 1.0)
    needed = {name: leaf.shape for name, leaf in jax.eval_shape(make, jax.random.key(0)).items()}
    found = {name: value.shape for name, value in parameters.items()}
    differences = [
        f"{name} {found.get(name, 'none')} (needed {needed.get(name, 'none')})"
        for name in sorted({*needed, *found})
        if found.get(name) != needed.get(name)
    ]
    if differences:
        raise ConfigError(
            f"model: given {path}, whose parameters do not fit its options:"
            f" {', '.join(differences)}"
        )
