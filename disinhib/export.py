"""Trained networks, as functions and as files.

A model is one file (MessagePack without pickle) with the resolved options of its training run, from
which the network is built, and the trained parameters. A training run's checkpoint, with the
options beside it, is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import serialization
from jaxtyping import Array, Bool, Float

from disinhib import activations, checkpoint, feedback
from disinhib.checkpoint import CHECKPOINT, CONFIG
from disinhib.checks import refusal
from disinhib.config import RunConfig, parse
from disinhib.errors import ConfigError, one_line
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import soft_targets
from disinhib.network import Layers, Parameters, initial_parameters
from disinhib.plugins import LOADED, hashes, load as load_plugin, name_of, read as read_plugin
from disinhib.rules import FAMILIES, RuleState
from disinhib.rules.disinhibition import Memory, feedback_and_aim
from disinhib.solvers import Solution, closed_loop, open_loop

FORMAT = 1  # of the file: raised when older readers cannot read newer files


class States(NamedTuple):
    """A steady state, dimensionless; of the hidden layers a tuple with an array `[batch, neurons]`
    each. The plain network has no interneurons: its `u_i` and `r_i` are empty."""

    u_e: Layers  # potentials of the excitatory neurons, or of those of the plain network
    u_i: Layers  # of the interneurons
    r_e: Layers  # their rates
    r_i: Layers
    u_y: Float[Array, "batch out"]  # potentials of the readout
    control: Float[Array, "batch out"]  # the control signal c; 0 in open loop
    converged: Bool[Array, " batch"]  # whether the solver reached its tolerance


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

    def states(self, parameters: Parameters, x: Any, target: Any = None) -> States:
        """The steady state of every layer, for inputs `[batch, in]` in [0, 1].

        Without `target` it is the open loop. With one the loop is closed, as the rule does it when
        it learns: labels `[batch]` (the training's soft targets are made of them), or a target of
        each output, `[batch, out]`. Averaged feedback weights are the mean over this batch.

        Raises ConfigError for arrays of other shapes or types; for a target, also if the rule has
        no feedback, or if `parameters` lack weights that its feedback path keeps (models that were
        saved by earlier versions).
        """
        x = jnp.asarray(x)
        features, classes = self.architecture.sizes[0], self.architecture.sizes[-1]
        if x.shape[1:] != (features,) or not jnp.issubdtype(x.dtype, jnp.floating):
            allowed = f"fractions in [0, 1], [batch, {features}]"
            raise refusal("x", f"{x.dtype} {list(x.shape)}", allowed)
        if target is None:
            return _open(self.architecture, parameters, self.hyperparameters, x)
        if FAMILIES[self.architecture.family].feedback_and_aim is None:
            rule = self.options["trainer"]["name"]
            raise refusal("target", "one", f"none: {rule} has no closed loop")
        target = _targets(target, len(x), classes, self.hyperparameters)
        memory = self.memory(parameters)
        return _closed(self.architecture, parameters, self.hyperparameters, x, target, memory)

    def memory(self, parameters: Parameters) -> Memory:
        """What closing the loop needs of the rule's state: feedback weights, if its path keeps them
        (zeros, which it ignores, if not). Raises ConfigError if they are not among `parameters`, or
        for a plugin's rule, of whose state only its checkpoints know."""
        if FAMILIES[self.architecture.family].feedback_and_aim is not feedback_and_aim:
            rule = self.options["trainer"]["name"]
            raise ConfigError(
                f"no state of {rule} from which its loop could be closed: the checkpoint of its run"
                " has it, a model has not"
            )
        if feedback.is_kept(self.hyperparameters):
            names = _feedback_names(self.architecture)
            if lacking := [name for name in names if name not in parameters]:
                path = self.options["trainer"]["feedback"]
                raise ConfigError(
                    f"parameters: lacking {', '.join(lacking)}, the feedback weights of"
                    f" trainer.feedback={path} (earlier versions did not save them in models)"
                )
            return Memory((), tuple(parameters[name] for name in names))
        outputs = self.architecture.sizes[-1]
        sizes = self.architecture.sizes[1:-1]
        return Memory((), tuple(jnp.zeros((outputs, neurons)) for neurons in sizes))


def _targets(
    given: Any, samples: int, classes: int, hyper: Hyperparameters
) -> Float[Array, "batch out"]:
    """Soft targets of labels; targets as they are."""
    target = np.asarray(given)
    if target.shape == (samples, classes):
        return jnp.asarray(target, float)
    labels = target.shape == (samples,) and np.issubdtype(target.dtype, np.integer)
    if not labels or np.any((target < 0) | (target >= classes)):
        allowed = f"labels from 0 to {classes - 1}, [{samples}], or [{samples}, {classes}]"
        raise refusal("target", f"{target.dtype} {list(target.shape)}", allowed)
    return soft_targets(jnp.asarray(target, jnp.int32), classes, hyper.soft_target)


@partial(jax.jit, static_argnums=0)
def _readout(architecture, parameters, hyper, x):
    return open_loop(architecture, parameters, hyper, x).state.u_y


@partial(jax.jit, static_argnums=0)
def _open(architecture, parameters, hyper, x) -> States:
    return _states(architecture, hyper, open_loop(architecture, parameters, hyper, x))


@partial(jax.jit, static_argnums=0)
def _closed(architecture, parameters, hyper, x, target, memory) -> States:
    opened = open_loop(architecture, parameters, hyper, x)
    weights, aim = feedback_and_aim(architecture, parameters, memory, hyper, opened.state, target)
    closed = closed_loop(architecture, parameters, hyper, x, aim, weights, opened.state)
    states = _states(architecture, hyper, closed)
    return states._replace(converged=opened.converged & closed.converged)


def _states(architecture: Architecture, hyper: Hyperparameters, solution: Solution) -> States:
    phi_e = activations.bind(architecture.activation_e, hyper.activation_e)
    r_i: Layers = ()
    if solution.state.u_i:
        phi_i = activations.bind(architecture.activation_i, hyper.activation_i)
        r_i = tuple(map(phi_i.value, solution.state.u_i))
    return States(
        u_e=solution.state.u_e,
        u_i=solution.state.u_i,
        r_e=tuple(map(phi_e.value, solution.state.u_e)),
        r_i=r_i,
        u_y=solution.state.u_y,
        control=solution.control,
        converged=solution.converged,
    )


def network_of(run: RunConfig, options: Mapping[str, Any]) -> Network:
    """The network that `options`, whose checked form is `run`, describe."""
    return Network(run.architecture, run.hyperparameters, run.dataset, options)


def with_feedback(run: RunConfig, parameters: Parameters, rule_state: RuleState) -> Parameters:
    """`parameters` and, as `feedback_0`, ..., the feedback weights `[out, neurons]` that the rule's
    path keeps from batch to batch, if it does: all that the closed loop needs. Of one lane."""
    if not isinstance(rule_state, Memory) or not feedback.is_kept(run.hyperparameters):
        return dict(parameters)
    names = _feedback_names(run.architecture)
    return {**parameters, **dict(zip(names, rule_state.feedback, strict=True))}


def _feedback_names(architecture: Architecture) -> list[str]:
    return [f"feedback_{layer}" for layer in range(architecture.hidden_layers)]


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
    """The network and the parameters of a model, or of a training run (its folder, or the
    checkpoint in it). One that was trained with plugins needs them (a file is never run because a
    model names it): `plugins` as in the option.

    Raises ConfigError if the file cannot be read, is not a model, has another format, or has
    invalid options or parameters of another network (naming the differences), or if a plugin is
    missing or has changed.
    """
    for given in plugins:
        load_plugin(read_plugin(given))
    file = Path(path)
    try:
        if file.is_dir():
            file = file / CHECKPOINT
        content: Any = serialization.msgpack_restore(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"model: given {file}, cannot be read ({error.strerror})") from error
    except Exception as error:  # msgpack names its errors freely
        raise _no_model(file, error) from error
    is_checkpoint = isinstance(content, dict) and "architecture" in content
    return _of_run(file) if is_checkpoint else _of_model(file, content)


def _of_model(file: Path, content: Any) -> tuple[Network, Parameters]:
    try:
        number, options = content["format"], dict(json.loads(content["options"]))
        parameters = {name: jnp.asarray(value) for name, value in content["parameters"].items()}
        needed = dict(content.get("plugins", {}))  # earlier versions had none
    except Exception as error:
        raise _no_model(file, error) from error
    if number != FORMAT:
        raise ConfigError(f"model: given {file}, of format {number}, readable is {FORMAT}")
    lacking = [name for name, sha256 in needed.items() if hashes().get(name) != sha256]
    if lacking:
        text = ", ".join(f"{name} (SHA-256 {needed[name]})" for name in lacking)
        raise ConfigError(f"model: given {file}, needs {text}: give plugins=[FILE]")
    run = _parsed(file, options)
    _check_fit(file, run, parameters)
    return network_of(run, options), parameters


def _of_run(file: Path) -> tuple[Network, Parameters]:
    """Of a training run's checkpoint, with the options beside it."""
    beside = file.with_name(CONFIG)
    try:
        options = dict(yaml.safe_load(beside.read_text("utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        why = f"needs the options of its run in {beside} ({one_line(error)})"
        raise ConfigError(f"model: given {file}, {why}") from error
    given = [name for name in options.get("plugins", []) if name_of(name) not in LOADED]
    if given:
        text = f"plugin {', '.join(given)}: give plugins=[FILE]"
        raise ConfigError(f"model: given {file}, needs {text}")
    for plugin in LOADED.values():
        kept = file.parent / "plugins" / f"{plugin.name}.py"
        if kept.exists() and kept.read_text("utf-8") != plugin.text:
            changed = f"{plugin.file} has changed since: give plugins={kept}"
            raise ConfigError(f"model: given {file}: {changed}")
    run = _parsed(file, options)
    state = checkpoint.load(file, run, "model").state
    parameters, rule_state = jax.tree.map(lambda leaf: leaf[0], (state.parameters, state.rule))
    return network_of(run, options), with_feedback(run, parameters, rule_state)


def _parsed(file: Path, options: Mapping[str, Any]) -> RunConfig:
    try:
        return parse(options)
    except ConfigError as error:
        raise ConfigError(f"model: given {file}, with an option that cannot be: {error}") from error


def _no_model(file: Path, error: Exception) -> ConfigError:
    return ConfigError(f"model: given {file}, which is no model ({type(error).__name__})")


def _check_fit(file: Path, run: RunConfig, parameters: Parameters) -> None:
    """Raises ConfigError for parameters that are not those of `run`'s network. Kept feedback
    weights may be missing (earlier versions did not save them), all together."""
    architecture = run.architecture
    make = partial(initial_parameters, architecture, 1.0)
    needed = {name: leaf.shape for name, leaf in jax.eval_shape(make, jax.random.key(0)).items()}
    found = {name: value.shape for name, value in parameters.items()}
    names = _feedback_names(architecture)
    if feedback.is_kept(run.hyperparameters) and {*names} & found.keys():
        needed |= {
            name: (architecture.sizes[-1], neurons)
            for name, neurons in zip(names, architecture.sizes[1:-1], strict=True)
        }
    differences = [
        f"{name} {found.get(name, 'none')} (needed {needed.get(name, 'none')})"
        for name in sorted({*needed, *found})
        if found.get(name) != needed.get(name)
    ]
    if differences:
        raise ConfigError(
            f"model: given {file}, whose parameters do not fit its options:"
            f" {', '.join(differences)}"
        )
