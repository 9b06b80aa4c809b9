"""A study's options: composed, checked, and the options of each of its trials.

The driver composes every trial's options itself, so that a trial is one command that
`python -m disinhib` understands, and a worker needs no Hydra.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disinhib import command_line, config
from disinhib.config import ConfigError
from disinhib.tuning import schedule, search
from disinhib.tuning.trial import TrialConfig
from search_spaces import SPACES, Overrides

# Root options that only a study has; the rest of its options are those of training.
STUDY_OPTIONS = ("study", "space", "trials", "metric", "mode")
STUDY_GROUPS = ("scheduler", "searcher", "cluster", "tracking", "experiment")


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
    """The study that `overrides` (as on the command line) ask for.

    Raises ConfigError: unknown option, space, scheduler or searcher; a value that is not allowed.
    """
    options, _ = command_line.compose("study", overrides)
    base = config.parse(training_options(options))
    _one_of("space", options["space"], SPACES)
    _one_of("mode", options["mode"], ("max", "min"))
    _one_of("scheduler.name", options["scheduler"]["name"], schedule.SCHEDULERS)
    _one_of("searcher.name", options["searcher"]["name"], search.SAMPLERS)
    _at_least("trials", options["trials"], 1, int)
    _at_least("cluster.cpus_per_trial", options["cluster"]["cpus_per_trial"], 1, int)
    _at_least("cluster.gpus_per_trial", options["cluster"]["gpus_per_trial"], 0, (int, float))
    if options["cluster"]["max_concurrent"] is not None:
        _at_least("cluster.max_concurrent", options["cluster"]["max_concurrent"], 1, int)
    grace = options["scheduler"].get("grace_period", 1)
    if not 1 <= grace <= base.epochs:
        raise ConfigError(
            f"scheduler.grace_period: given {grace}, allowed is 1 to epochs ({base.epochs})"
        )
    out_dir = Path(options["out_dir"]).absolute()
    groups = {name: options[name] for name in STUDY_GROUPS if name in options}
    return Study(
        name=_name(options["study"], f"{options['space']}-{options['dataset']['name']}", out_dir),
        out_dir=out_dir,
        epochs=base.epochs,
        overrides=tuple(overrides),
        options=options,
        **{name: options[name] for name in ("space", "trials", "seed", "metric", "mode")},
        **groups,
    )


def training_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A study's options without its own: what `config.parse` and a worker understand."""
    own = (*STUDY_OPTIONS, *STUDY_GROUPS)
    return {name: value for name, value in options.items() if name not in own}


def configure(study: Study, number: int, overrides: Overrides) -> TrialConfig:
    """Trial `number`: the study's options with what the space chose on top.

    Raises ConfigError if the space chose an option that does not exist or a value not allowed.
    """
    seed = search.trial_seed(study.seed, number)
    chosen = [f"{name}={value}" for name, value in overrides.items()]
    options, choices = command_line.compose("study", [*study.overrides, *chosen, f"seed={seed}"])
    options = training_options(options)
    config.parse(options)
    choices = {group: choice for group, choice in choices.items() if group not in STUDY_GROUPS}
    return TrialConfig(
        number=number,
        rule=rule_name(choices),
        searched=dict(overrides),
        command=command_line.command(options, choices),
        options=options,
        epochs=study.epochs,
        metric=study.metric,
    )


def rule_name(choices: Mapping[str, str]) -> str:
    """Under what name a trial competes: back-propagation through the E-I network is another rule
    than through the plain one."""
    on_microcircuits = choices["trainer"] == "bp" and choices["model/vf"] == "dale"
    return "bp-ei" if on_microcircuits else choices["trainer"]


def check_space(study: Study) -> None:
    """Composes a configuration of every branch of the space.

    Raises ConfigError if one is refused, or if the study was given an option that is searched.
    """
    given = {name.lstrip("+~"): value for name, _, value in map(_split, study.overrides)}
    for branch in search.branches(SPACES[study.space]):
        for name, value in branch.overrides.items():
            if given.get(name, str(value)) != str(value):
                raise ConfigError(
                    f"{name}: given {given[name]}, but space={study.space} searches it; leave it"
                    f" out or take another space ({', '.join(SPACES)})"
                )
        try:
            configure(study, 0, branch.overrides)
        except ConfigError as error:
            raise ConfigError(f"space={study.space}: {error}") from error


def _split(override: str) -> tuple[str, str, str]:
    return override.partition("=")


def _name(given: str | None, default: str, out_dir: Path) -> str:
    """The study's name: its own folder must not be there yet."""
    if given is None:
        names = [default, *(f"{default}-{i}" for i in range(2, 10_000))]
        return next(name for name in names if not (out_dir / name).exists())
    if (out_dir / given).exists():
        raise ConfigError(
            f"study: given {given}, allowed is a new name ({out_dir / given} is there already)"
        )
    return given


def _one_of(option: str, given: Any, allowed: Iterable[str]) -> None:
    if given not in allowed:
        near = difflib.get_close_matches(str(given), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{option}: given {given}, allowed are {', '.join(allowed)}{hint}")


def _at_least(option: str, given: Any, least: int, kinds: type | tuple[type, ...]) -> None:
    if isinstance(given, bool) or not isinstance(given, kinds) or given < least:
        what = "a whole number" if kinds is int else "a number"
        raise ConfigError(f"{option}: given {given}, allowed is {what} of at least {least}")
