"""A run's configuration, checked once at the border and then frozen.

`parse` turns plain options (conf/train.yaml, composed and resolved) into a `RunConfig`. Whatever
is wrong with them is a ConfigError of one line: the option, what was given, what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from disinhib.activations import ACTIVATIONS, Shape
from disinhib.checks import (
    ANY_NUMBER,
    COUNT,
    DECAY,
    FLAG,
    INDEX,
    NOT_NEGATIVE,
    OPTIONAL_TEXT,
    POSITIVE,
    SEED,
    SHARE,
    TEXT,
    UNIT,
    Check,
    check,
    flatten,
    is_number,
    one_of,
    refusal,
)
from disinhib.controller import CONTROLLERS
from disinhib.data import DATASETS
from disinhib.errors import ConfigError, nearest
from disinhib.hyperparameters import Architecture, Hyperparameters, Newton, Ode
from disinhib.losses import LOSSES
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import RULES


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run's outcome, and where it runs."""

    architecture: Architecture
    hyperparameters: Hyperparameters
    dataset: str
    dataset_path: str | None
    valid_split: float
    epochs: int
    seed: int | None
    evaluated_share_of_train: float  # 0: none (OL_eval_on_train)
    test_at_end: bool
    device: str
    gpu_id: int
    min_converged_share: float  # of an epoch's samples, below which the run has diverged
    max_weight: float  # |weight|, dimensionless, above which the run has diverged


class _Options:
    """Takes options by dotted name, checked, and at the end knows those that nobody took."""

    def __init__(self, options: Mapping[str, Any]):
        self.flat = flatten(options)
        self.left = dict.fromkeys(self.flat)

    def take(self, name: str, wanted: Check) -> Any:
        if name not in self.flat:
            raise ConfigError(f"{name}: missing, needed is {wanted[1]}")
        self.left.pop(name, None)
        return check(name, self.flat[name], wanted)

    def refuse_the_rest(self) -> None:
        for name in self.left:
            raise ConfigError(f"{name}: unknown option{nearest(name, set(self.flat) - {name})}")


def parse(options: Mapping[str, Any]) -> RunConfig:
    """The run that `options` describe. Raises ConfigError."""
    given = _Options(options)
    take = given.take
    optimizer = take("optimizer.name", one_of(OPTIMIZERS))
    soft_target = take("dataset.soft_target_val", SHARE)
    hyper: dict[str, Any] = {
        "optimizer": {
            name: take(f"optimizer.{name}", check) for name, check in OPTIMIZER_CHECKS[optimizer]
        },
        "soft_target": soft_target if take("dataset.soft_targets", FLAG) else 1.0,
    }
    structure: dict[str, Any] = {
        "rule": take("trainer.name", one_of(RULES)),
        "circuit": take("model.vf.name", one_of(("dale", "non-dale"))),
        "use_bias": take("model.vf.use_bias", FLAG),
        "loss": take("dataset.loss.name", one_of(LOSSES)),
        "optimizer": optimizer,
        "batch_size": take("batchsize", COUNT),
        "solver": _solver(take),
        "sizes": _sizes(take),
    }
    hyper["weight_scale"] = take("model.vf.weight_scale", POSITIVE)
    _check_rule_fits(structure["rule"], structure["circuit"])
    read_circuit = _microcircuits if structure["circuit"] == "dale" else _perceptron
    read_circuit(take, structure, hyper)
    if RULES[structure["rule"]].has_feedback:
        _feedback(take, structure, hyper)
    on_train = take("OL_eval_on_train", FLAG)
    share = take("dataset.OL_eval_subset_split", SHARE)
    take("out_dir", TEXT)
    take("resume", OPTIONAL_TEXT)
    config = RunConfig(
        architecture=Architecture(**structure),
        hyperparameters=Hyperparameters(**hyper),
        dataset=take("dataset.name", one_of(DATASETS)),
        dataset_path=take("dataset.path", OPTIONAL_TEXT),
        valid_split=take("dataset.valid_split", SHARE),
        epochs=take("epochs", COUNT),
        seed=take("seed", SEED),
        evaluated_share_of_train=share if on_train else 0.0,
        test_at_end=take("test_at_end", FLAG),
        device=take("device", one_of(("auto", "cpu", "gpu"))),
        gpu_id=take("gpu_id", INDEX),
        min_converged_share=float(take("min_converged_share", UNIT)),
        max_weight=float(take("max_weight", POSITIVE)),
    )
    given.refuse_the_rest()
    return config


def _solver(take) -> Newton | Ode:
    ode = Ode(
        dt=take("model.dt", POSITIVE),
        T=take("model.T", POSITIVE),
        rtol=take("model.rtol", POSITIVE),
        atol=take("model.atol", POSITIVE),
        adaptive_stepsize=take("model.adaptive_stepsize", FLAG),
        early_termination=take("model.early_termination", FLAG),
    )
    if take("solver.name", one_of(("newton", "ode"))) == "ode":
        return ode
    return Newton(take("solver.tolerance", POSITIVE), take("solver.max_iterations", COUNT))


def _sizes(take) -> tuple[int, ...]:
    layers = take("model.vf.nb_hidden", INDEX)
    allowed = "one size of at least 1, or a size for each of model.vf.nb_hidden layers"
    hidden = take(
        "model.vf.sizes_hidden",
        (lambda v: isinstance(v, list) and v and all(COUNT[0](n) for n in v), allowed),
    )
    if len(hidden) not in (1, layers):
        raise refusal("model.vf.sizes_hidden", hidden, f"{allowed} (given {layers})")
    hidden = hidden * layers if len(hidden) == 1 else hidden
    return (take("dataset.dim_input", COUNT), *hidden, take("dataset.dim_output", COUNT))


def _check_rule_fits(rule: str, circuit: str) -> None:
    allowed = RULES[rule].circuits
    if circuit not in allowed:
        fitting = [name for name, entry in RULES.items() if circuit in entry.circuits]
        raise ConfigError(
            f"trainer={rule}: needs model/vf={' or '.join(allowed)}, given model/vf={circuit}"
            f" (which {', '.join(fitting)} can train)"
        )


def _activation(take, prefix: str) -> tuple[str, Shape]:
    kind = take(f"{prefix}.name", one_of(ACTIVATIONS))
    if kind != "softrelu":
        return kind, Shape()
    return kind, Shape(
        take(f"{prefix}.scale", POSITIVE),
        take(f"{prefix}.sharpness", POSITIVE),
        take(f"{prefix}.shift", ANY_NUMBER),
    )


def _perceptron(take, structure: dict, hyper: dict) -> None:
    structure["activation_e"], hyper["shape_e"] = _activation(take, "model.vf.activation")


def _microcircuits(take, structure: dict, hyper: dict) -> None:
    structure["activation_e"], hyper["shape_e"] = _activation(take, "model.vf.actE")
    structure["activation_i"], hyper["shape_i"] = _activation(take, "model.vf.actI")
    structure["fb_to_readout"] = take("model.vf.fb_to_readout", FLAG)
    for option, name in (("tauE", "tau_e"), ("tauI", "tau_i"), ("g_EI", "g_ei"), ("g_IE", "g_ie")):
        hyper[name] = take(f"model.vf.{option}", POSITIVE)
    controller = take("model.vf.controller.name", one_of(CONTROLLERS))
    structure["controller"] = controller
    if controller == "leaky-pi":
        hyper["k_p"] = take("model.vf.controller.k_p", NOT_NEGATIVE)
        hyper["k_i"] = take("model.vf.controller.k_i", NOT_NEGATIVE)
        hyper["leak"] = take("model.vf.controller.leak", POSITIVE)
        hyper["tau_c"] = take("model.vf.controller.tau", POSITIVE)
    else:
        hyper["k_p"] = take("model.vf.controller.k_p", POSITIVE)


def _feedback(take, structure: dict, hyper: dict) -> None:
    for flag in ("average_fb_weights", "clip_fb_weights", "norm_fb_weights"):
        structure[flag] = take(f"trainer.{flag}", FLAG)
    hyper["strong_fb"] = float(take("trainer.strong_fb", FLAG))
    hyper["clip_val"] = take("trainer.clip_val", POSITIVE)
    hyper["norm_val"] = take("trainer.norm_val", POSITIVE)
    hyper["target_nudge"] = take("trainer.target_nudge", POSITIVE)
    rate = RATE_CHECKS[structure["activation_i"]]
    if structure["rule"] == "lin-thresh":
        hyper["avg_inh_lambda"] = take("trainer.avg_inh_lambda", UNIT)
        hyper["avg_inh_init"] = take("trainer.avg_inh_init", rate)
    if structure["rule"] == "taylor":
        hyper["y0"] = take("trainer.y0", rate)


OPTIMIZER_CHECKS: dict[str, tuple[tuple[str, Check], ...]] = {
    "adam": (("learning_rate", POSITIVE), ("b1", DECAY), ("b2", DECAY), ("eps", POSITIVE)),
    "sgd": (("learning_rate", POSITIVE), ("momentum", DECAY)),
}
# Rates at which an interneuron's activation has an inverse with a tangent.
RATE_CHECKS: dict[str, Check] = {
    "softrelu": POSITIVE,
    "relu": POSITIVE,
    "sigmoid": SHARE,
    "tanh": (lambda v: is_number(v) and -1 < v < 1, "a number between -1 and 1"),
    "linear": ANY_NUMBER,
}
