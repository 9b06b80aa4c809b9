"""A run's configuration, checked once at the border and then frozen.

`parse` turns plain options (conf/train.yaml, composed and resolved) into a `RunConfig`. Whatever
is wrong with them is a ConfigError of one line: the option, what was given, what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from disinhib import plugins
from disinhib.activations import ACTIVATIONS, RATE
from disinhib.checks import (
    ANY_NUMBER,
    COUNT,
    FLAG,
    INDEX,
    OPTIONAL_TEXT,
    POSITIVE,
    SEED,
    TEXT,
    UNIT,
    Check,
    Option,
    check,
    defaults,
    flatten,
    one_of,
    refusal,
    traced,
)
from disinhib.controller import CONTROLLERS
from disinhib.data import DATASETS, sizes
from disinhib.errors import ConfigError, nearest
from disinhib.hyperparameters import Architecture, Hyperparameters, Newton, Ode
from disinhib.losses import LOSSES
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import FAMILIES, RULES

CIRCUITS = ("dale", "non-dale")  # E-I microcircuits, and the plain MLP
PLUGINS: Check = (
    lambda v: isinstance(v, list) and all(map(TEXT[0], v)),
    "a list of Python files (*.py) and installed modules",
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run's outcome, and where it runs."""

    rule: str
    architecture: Architecture
    hyperparameters: Hyperparameters
    dataset: str
    dataset_path: str | None
    valid_split: float
    valid_seed: int | None
    epochs: int
    seed: int | None
    evaluated_share_of_train: float  # 0: none (OL_eval_on_train)
    test_at_end: bool
    alignment: bool  # measured after each epoch (alignment.py)
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

    def take_all(self, prefix: str, options: Iterable[Option], rates: Check) -> dict[str, Any]:
        """The values of an entry's options; `rates` is the check of those that are a RATE."""
        return {
            option.name: self.take(
                f"{prefix}.{option.name}", rates if option.check is RATE else option.check
            )
            for option in options
        }

    def refuse_the_rest(self) -> None:
        for name in self.left:
            raise ConfigError(f"{name}: unknown option{nearest(name, set(self.flat) - {name})}")


# A part of Hyperparameters: the field of Architecture that names its entry, and the table.
PARTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "optimizer": ("optimizer", OPTIMIZERS),
    "rule": ("family", FAMILIES),
    "controller": ("controller", CONTROLLERS),
    "loss": ("loss", LOSSES),
    "activation_e": ("activation_e", ACTIVATIONS),
    "activation_i": ("activation_i", ACTIVATIONS),
}


def published(architecture: Architecture, rule: str) -> Hyperparameters:
    """The published defaults of every scalar of a structure, trained by `rule` (of its family)."""
    entries = {part: table[getattr(architecture, field)] for part, (field, table) in PARTS.items()}
    parts: dict[str, Any] = {
        part: traced(entry.options, defaults(entry.options)) for part, entry in entries.items()
    }
    parts["rule"] |= RULES[rule].chosen
    return Hyperparameters(**parts)


def parse(options: Mapping[str, Any]) -> RunConfig:
    """The run that `options` describe. Raises ConfigError."""
    given = _Options({"plugins": [], **options})  # earlier versions had none
    take = given.take
    for plugin in map(plugins.name_of, take("plugins", PLUGINS)):
        if plugin not in plugins.LOADED:
            raise ConfigError(f"plugins: {plugin} is not loaded: give plugins=[FILE]")
    dataset = take("dataset.name", one_of(DATASETS))
    data = given.take_all("dataset", DATASETS[dataset].options, ANY_NUMBER)
    rule = RULES[take("trainer.name", one_of(RULES))]
    structure: dict[str, Any] = {
        "family": rule.family.name,
        "circuit": take("model.vf.name", one_of(CIRCUITS)),
        "use_bias": take("model.vf.use_bias", FLAG),
        "loss": take("dataset.loss.name", one_of(LOSSES)),
        "optimizer": take("optimizer.name", one_of(OPTIMIZERS)),
        "batch_size": take("batchsize", COUNT),
        "solver": _solver(take),
        "sizes": (data["dim_input"], *_hidden_sizes(take), data["dim_output"]),
    }
    hyper: dict[str, Any] = {
        "weight_scale": take("model.vf.weight_scale", POSITIVE),
        "soft_target": data["soft_target_val"] if data["soft_targets"] else 1.0,
    }
    _check_rule_fits(rule.name, structure["circuit"])
    places = {"optimizer": "optimizer", "loss": "dataset.loss"}
    if structure["circuit"] == "dale":
        places |= {
            "activation_e": "model.vf.actE",
            "activation_i": "model.vf.actI",
            "controller": "model.vf.controller",
        }
        structure["fb_to_readout"] = take("model.vf.fb_to_readout", FLAG)
        for option, name in (
            *(("tauE", "tau_e"), ("tauI", "tau_i")),
            *(("g_EI", "g_ei"), ("g_IE", "g_ie")),
        ):
            hyper[name] = take(f"model.vf.{option}", POSITIVE)
    else:
        places["activation_e"] = "model.vf.activation"
    for part, place in places.items():
        field, table = PARTS[part]
        if field not in structure:
            structure[field] = take(f"{place}.name", one_of(table))
    # The rates of the rule are the interneurons', if it has any.
    inhibitory = structure.get("activation_i", structure["activation_e"])
    rates = ACTIVATIONS[inhibitory].rates
    for part, place in places.items():
        field, table = PARTS[part]
        own = table[structure[field]].options
        hyper[part] = traced(own, given.take_all(place, own, rates))
    hyper["rule"] = {
        **traced(rule.family.options, defaults(rule.family.options)),
        **traced(rule.options, given.take_all("trainer", rule.options, rates)),
        **rule.chosen,
    }
    on_train = take("OL_eval_on_train", FLAG)
    take("out_dir", TEXT)
    take("resume", OPTIONAL_TEXT)
    config = RunConfig(
        rule=rule.name,
        architecture=Architecture(**structure),
        hyperparameters=Hyperparameters(**hyper),
        dataset=dataset,
        dataset_path=data["path"],
        valid_split=data["valid_split"],
        valid_seed=data["valid_seed"],
        epochs=take("epochs", COUNT),
        seed=take("seed", SEED),
        evaluated_share_of_train=data["OL_eval_subset_split"] if on_train else 0.0,
        test_at_end=take("test_at_end", FLAG),
        alignment=take("diagnostics.alignment", FLAG),
        device=take("device", one_of(("auto", "cpu", "gpu"))),
        gpu_id=take("gpu_id", INDEX),
        min_converged_share=float(take("min_converged_share", UNIT)),
        max_weight=float(take("max_weight", POSITIVE)),
    )
    given.refuse_the_rest()
    return config


def with_sizes(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the sizes of a data set that come with its file. Raises data.DataError."""
    dataset = options.get("dataset", {})
    if not dataset.get("path") or None not in (dataset["dim_input"], dataset["dim_output"]):
        return options
    inputs, classes = sizes(dataset["name"], dataset["path"])
    given = {name: value for name, value in dataset.items() if value is not None}
    found = {"dim_input": inputs, "dim_output": classes}
    return {**options, "dataset": {**dataset, **found, **given}}


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


def _hidden_sizes(take) -> list[int]:
    layers = take("model.vf.nb_hidden", INDEX)
    allowed = "one size of at least 1, or a size for each of model.vf.nb_hidden layers"
    hidden = take(
        "model.vf.sizes_hidden",
        (lambda v: isinstance(v, list) and v and all(COUNT[0](n) for n in v), allowed),
    )
    if len(hidden) not in (1, layers):
        raise refusal("model.vf.sizes_hidden", hidden, f"{allowed} (given {layers})")
    return hidden * layers if len(hidden) == 1 else hidden


def _check_rule_fits(rule: str, circuit: str) -> None:
    allowed = RULES[rule].circuits
    if circuit not in allowed:
        fitting = [name for name, entry in RULES.items() if circuit in entry.circuits]
        raise ConfigError(
            f"trainer={rule}: needs model/vf={' or '.join(allowed)}, given model/vf={circuit}"
            f" (which {', '.join(fitting)} can train)"
        )
