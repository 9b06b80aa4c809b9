"""A study's options: composed, checked, and the options of each of its trials.

The driver composes every trial's options itself, so that a trial is one command that
`python -m disinhib` understands, and a worker needs no Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

from disinhib import command_line, config, training
from disinhib.config import (
    COUNT,
    FLAG,
    INDEX,
    NOT_NEGATIVE,
    OPTIONAL_TEXT,
    POSITIVE,
    TEXT,
    Check,
    ConfigError,
    nearest,
    one_of,
    refusal,
)
from disinhib.tuning import schedule, search
from disinhib.tuning.trial import TrialConfig
from search_spaces import SPACES, Overrides

# Root options and groups that only a study has; the rest of its options are those of training.
STUDY_OPTIONS = ("study", "space", "trials", "metric", "mode")
STUDY_GROUPS = ("scheduler", "searcher", "cluster", "tracking", "experiment")
# What selection may rest on, validation only, and which way is better.
METRICS = {"valid_accuracy": "max", "valid_loss": "min"}

OPTIONAL_COUNT: Check = (lambda v: v is None or COUNT[0](v), f"{COUNT[1]}, or null")
CHECKS: dict[str, Check] = {
    "study": (
        lambda v: v is None or (isinstance(v, str) and re.fullmatch(r"[\w.-]*\w", v) is not None),
        "a folder's name or null",
    ),
    "space": (lambda v: isinstance(v, str) and v in SPACES, f"one of {', '.join(SPACES)}"),
    "out_dir": TEXT,
    "trials": COUNT,
    "epochs": COUNT,
    "metric": one_of(METRICS),
    "mode": one_of(("max", "min")),
    "seed": INDEX,
    "scheduler.name": one_of(schedule.SCHEDULERS),
    "scheduler.within_rule": FLAG,
    "scheduler.grace_period": OPTIONAL_COUNT,
    "scheduler.reduction_factor": (lambda v: POSITIVE[0](v) and v > 1, "a number above 1"),
    "scheduler.brackets": COUNT,
    "searcher.name": one_of(search.SAMPLERS),
    "searcher.balanced": FLAG,
    "searcher.n_startup_trials": INDEX,
    "searcher.n_ei_candidates": COUNT,
    "searcher.multivariate": FLAG,
    "searcher.group": FLAG,
    "searcher.constant_liar": FLAG,
    "cluster.address": OPTIONAL_TEXT,
    "cluster.cpus_per_trial": COUNT,
    "cluster.gpus_per_trial": NOT_NEGATIVE,
    "cluster.max_concurrent": OPTIONAL_COUNT,
    "tracking.uri": OPTIONAL_TEXT,
    "tracking.experiment": TEXT,
}


@dataclass(frozen=True)
class Study:
    """A study's checked options. `overrides` are those it was given, before any trial's own."""

    name: str
    out_dir: Path  # absolute; the study's own folder is out_dir / name
    space: str
    trials: int
    epochs: int
    seed: int
    metric: str
    mode: str
    scheduler: Mapping[str, Any]
    searcher: Mapping[str, Any]
    cluster: Mapping[str, Any]
    tracking: Mapping[str, Any]
    overrides: tuple[str, ...]
    options: Mapping[str, Any]  # all of them, resolved

    @property
    def folder(self) -> Path:
        return self.out_dir / self.name


def compose(overrides: Sequence[str]) -> Study:
    """The study that `overrides` (as on the command line) ask for, its own options checked.

    Raises ConfigError: an unknown option, space, scheduler or searcher; a value not allowed.
    """
    settings, _ = command_line.compose("study", [o for o in overrides if _is_for_study(o)])
    _check(settings)
    # The rest may be options of a group that only the space chooses, say of model/vf=dale.
    first = next(search.branches(SPACES[settings["space"]])).overrides
    groups = [f"{name}={value}" for name, value in first.items() if _is_group(name)]
    with _blaming(settings["space"]):
        command_line.compose("study", groups)
    options, _ = command_line.compose("study", [*overrides, *groups])
    _check(options)
    out_dir = Path(options["out_dir"]).absolute()
    command_line.check_folder(out_dir)
    default = f"{options['space']}-{options['dataset']['name']}"
    own = ("space", "trials", "epochs", "seed", "metric", "mode")
    groups = ("scheduler", "searcher", "cluster", "tracking")
    return Study(
        **{name: options[name] for name in (*own, *groups)},
        name=_name(options["study"], default, out_dir),
        out_dir=out_dir,
        overrides=tuple(overrides),
        options=options,
    )


def _is_for_study(override: str) -> bool:
    root = _name_of(override).partition(".")[0].partition("@")[0]
    return root in (*STUDY_OPTIONS, *STUDY_GROUPS)


def _name_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError if an option of the study itself is not allowed."""
    for name, value in config.flatten(_own(options)).items():
        if name not in CHECKS:
            raise ConfigError(f"{name}: unknown option{nearest(name, CHECKS)}")
        test, allowed = CHECKS[name]
        if not test(value):
            names = allowed.removeprefix("one of ").split(", ")
            raise refusal(name, value, allowed + nearest(str(value), names))
    searcher, scheduler = options["searcher"], options["scheduler"]
    if searcher.get("group") and not searcher["multivariate"]:
        raise refusal("searcher.group", True, "false without searcher.multivariate")
    grace = scheduler.get("grace_period")
    if grace is not None and grace > options["epochs"]:
        raise refusal("scheduler.grace_period", grace, f"1 to epochs ({options['epochs']})")
    if options["device"] == "gpu" and not options["cluster"]["gpus_per_trial"]:
        raise refusal("device", "gpu", "auto or cpu without cluster.gpus_per_trial")
    best = METRICS[options["metric"]]
    if options["mode"] != best:
        raise refusal("mode", options["mode"], f"{best} for metric={options['metric']}")
    if options["test_at_end"]:
        raise refusal("test_at_end", True, "false: a search must not see the test set")
    if options["resume"] is not None:
        raise refusal("resume", options["resume"], "null (trials of a study start afresh)")


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `training_options` leaves out, and what a study needs of the rest."""
    names = (*STUDY_OPTIONS, *STUDY_GROUPS, "epochs", "seed", "out_dir")
    return {name: options[name] for name in names if name in options}


def training_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A study's options without its own: what `config.parse` and a worker understand."""
    own = (*STUDY_OPTIONS, *STUDY_GROUPS)
    return {name: value for name, value in options.items() if name not in own}


def configure(study: Study, number: int, overrides: Overrides) -> TrialConfig:
    """Trial `number`: the study's options with what the space chose on top.

    Raises ConfigError if the space chose an option that does not exist or a value not allowed.
    """
    seed = search.trial_seed(study.seed, number)
    groups = [f"{name}={value}" for name, value in overrides.items() if _is_group(name)]
    options, choices = deepcopy(_composed("study", (*study.overrides, *groups)))
    options = training_options(options)
    for name, value in overrides.items():
        if not _is_group(name):
            _set(options, name, value)
    options["seed"] = seed
    # A trial writes no folder of its own, so where it would do so is no part of its command.
    options["out_dir"] = _composed(command_line.TRAINING, ())[0]["out_dir"]
    choices = {group: choice for group, choice in choices.items() if group not in STUDY_GROUPS}
    return TrialConfig(
        number=number,
        rule=rule_name(choices),
        searched=dict(overrides),
        command=command_line.command(options, choices),
        options=options,
        seed=seed,
        epochs=config.parse(options).epochs,
        metric=study.metric,
    )


# Hydra takes 90 ms for what every trial of a structure has in common.
_composed = lru_cache(maxsize=64)(command_line.compose)


def _is_group(name: str) -> bool:
    """Group `trainer`, `model/vf` or `model/vf/activation@model.vf.actI`; option `optimizer.b1`."""
    return (command_line.CONFIGURATIONS / name.partition("@")[0]).is_dir()


def _set(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets the dotted option `name`; raises ConfigError if there is none."""
    known = config.flatten(options)
    if name not in known:
        raise ConfigError(f"{name}: unknown option{nearest(name, known)}")
    *parents, leaf = name.split(".")
    for parent in parents:
        options = options[parent]
    options[leaf] = value


def rule_name(choices: Mapping[str, str]) -> str:
    """Under what name a trial competes: back-propagation through the E-I network is another rule
    than through the plain one."""
    on_microcircuits = choices["trainer"] == "bp" and choices["model/vf"] == "dale"
    return "bp-ei" if on_microcircuits else choices["trainer"]


def check_space(study: Study) -> None:
    """Composes a configuration of every branch of the space, and loads its data.

    Raises ConfigError if one is refused, or if the study was given an option that is searched;
    data.DataError if there is no such data.
    """
    jax.config.update("jax_platforms", "cpu")  # the driver trains nothing, and holds no GPU
    given = {_name_of(override): override.partition("=")[2] for override in study.overrides}
    for branch in search.branches(SPACES[study.space]):
        for name, value in branch.overrides.items():
            if given.get(name, str(value)) != str(value):
                raise ConfigError(
                    f"{name}: given {given[name]}, but space={study.space} searches it; leave it"
                    f" out or take another space ({', '.join(SPACES)})"
                )
        with _blaming(study.space):
            trial = configure(study, 0, branch.overrides)
            training.prepare(config.parse(trial["options"]))


@contextmanager
def _blaming(space: str) -> Iterator[None]:
    """Names the space in a refusal of what it chose."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} (in space={space})") from error


def _name(given: str | None, default: str, out_dir: Path) -> str:
    """The study's name: its own folder must not be there yet."""
    if given is None:
        names = [default, *(f"{default}-{i}" for i in range(2, 10_000))]
        return next(name for name in names if not (out_dir / name).exists())
    if (out_dir / given).exists():
        raise refusal("study", given, f"a new name ({out_dir / given} is there already)")
    return given
