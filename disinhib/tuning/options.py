"""A study's options: composed, checked, and the options of each of its trials.

The driver composes every trial's options itself, so that a trial is one command that
`python -m disinhib` understands, and a worker needs no Hydra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import yaml

from disinhib import config, hydra_config, rules, training
from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError, nearest
from disinhib.tuning import space_tree, suggest
from disinhib.tuning.initial_points import defaults, grid, read_points
from disinhib.tuning.validation import STUDY_GROUPS, STUDY_OPTIONS, check
from disinhib.tuning.worker import TrialConfig
from search_spaces import SPACES, Overrides

FILE = "study.yaml"  # in a study's folder
# What may differ from the study that is resumed: where it runs and writes, not what it does.
RESUMED_WITH = (
    *("resume", "study", "out_dir", "plan", "cluster.address", "cluster.max_concurrent"),
    *("tracking.uri", "checkpoints.", "searcher.storage", "dataset.path"),
)


@dataclass(frozen=True)
class Study:
    """A study's checked options. `overrides` are those it was given, before any trial's own."""

    name: str
    out_dir: Path  # absolute; the study's own folder is out_dir / name
    resume: bool
    plan: bool
    space: str
    trials: int
    epochs: int
    replicates: int
    seed: int
    metric: str
    mode: str
    points: str | None  # a file
    warm_start: str | None  # an earlier study's name
    checkpoints: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    searcher: Mapping[str, Any]
    cluster: Mapping[str, Any]
    tracking: Mapping[str, Any]
    overrides: tuple[str, ...]
    options: Mapping[str, Any]  # all of them, resolved

    @property
    def folder(self) -> Path:
        return self.out_dir / self.name

    @property
    def batch(self) -> int | None:
        """How many trials are proposed together, if that is to be the same however trials are
        timed."""
        return self.searcher["batch"] if self.searcher["deterministic"] else None


def compose(overrides: Sequence[str]) -> Study:
    """The study that `overrides` (as on the command line) ask for, its own options checked.

    `resume=true` and `extend=true` put them on top of those of the study that they name.

    Raises ConfigError: an unknown option, space, scheduler or searcher; a value not allowed; with
    `resume`, no such study, or other options than it has.
    """
    own, _ = hydra_config.compose("study", [o for o in overrides if _is_for_study(o)])
    check(own)
    earlier = None
    if own["resume"] or own["extend"]:
        earlier = read_kept(own)
        overrides = _on_top_of(earlier, overrides, own)
    settings, _ = hydra_config.compose("study", [o for o in overrides if _is_for_study(o)])
    check(settings)
    # The rest may be options of a group that only the space chooses, say of model/vf=dale.
    first = next(space_tree.branches(SPACES[settings["space"]])).overrides
    groups = [f"{name}={value}" for name, value in first.items() if hydra_config.is_group(name)]
    with _blaming(settings["space"]):
        hydra_config.compose("study", groups)
    options, _ = hydra_config.compose("study", [*overrides, *groups])
    check(options)
    out_dir = Path(options["out_dir"]).absolute()
    hydra_config.check_folder(out_dir)
    if options["resume"] and earlier is not None:
        _refuse_changes(earlier["options"], options)
    default = f"{options['space']}-{options['dataset']['name']}"
    plain = {
        *("space", "trials", "epochs", "replicates", "seed", "metric", "mode", "resume", "plan"),
        *("points", "warm_start", "checkpoints"),
        *("scheduler", "searcher", "cluster", "tracking"),
    }
    return Study(
        **{name: options[name] for name in plain},
        name=options["study"] if options["resume"] else _name(options["study"], default, out_dir),
        out_dir=out_dir,
        overrides=tuple(overrides),
        options=options,
    )


def kept(study: Study) -> dict[str, Any]:
    """What is kept of the options, to resume or extend the study."""
    return {"overrides": list(study.overrides), "options": dict(study.options)}


def read_kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `kept` gave of the study that `options` name. Raises ConfigError if there is none."""
    flag = "resume" if options["resume"] else "extend"
    if options["study"] is None:
        raise refusal(flag, True, "false without the name of a study (study=NAME)")
    folder = Path(options["out_dir"]).absolute() / options["study"]
    try:
        kept = yaml.safe_load((folder / FILE).read_text())
        return {name: kept[name] for name in ("overrides", "options")}
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        names = sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))
        allowed = f"one of {', '.join(names)}" if names else "none: there is no study"
        raise refusal("study", options["study"], f"{allowed} (in {folder.parent})") from error


def _on_top_of(
    earlier: Mapping[str, Any], overrides: Sequence[str], own: Mapping[str, Any]
) -> list[str]:
    """Overrides of a study that goes on from an earlier one."""
    # Its place is where it was found; what it started from is no concern of one that extends it.
    left = {_name_of(override) for override in overrides} | {"study", "out_dir"}
    if own["extend"]:
        left |= {"warm_start", "points"}
    # What was given for the searcher, say, goes with the searcher.
    groups = tuple(name.replace("/", ".") + "." for name in left if hydra_config.is_group(name))
    before = [
        o
        for o in earlier["overrides"]
        if _name_of(o) not in left and not _name_of(o).startswith(groups)
    ]
    if own["resume"]:
        return [*before, *overrides]
    new = _name(None, own["study"], Path(own["out_dir"]).absolute())
    given = [o for o in overrides if _name_of(o) not in ("study", "extend")]
    if "seed" not in left:  # or the same trials were proposed once more
        before = [o for o in before if _name_of(o) != "seed"]
        given.append(f"seed={earlier['options']['seed'] + 1}")
    return [*before, *given, f"study={new}", f"warm_start={own['study']}"]


def _refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError if `now` are not the options `before`: then it were another study."""
    was, given = flatten(before), flatten(now)
    changed = [
        f"{name}={was.get(name)} (now {given.get(name)})"
        for name in sorted({*was, *given})
        if was.get(name) != given.get(name) and not name.startswith(RESUMED_WITH)
    ]
    if changed:
        raise ConfigError(
            f"resume: {now['study']} ran with {', '.join(changed)}; resume it as it was, or start"
            f" another from it: study={now['study']} extend=true"
        )


def _is_for_study(override: str) -> bool:
    root = _name_of(override).partition(".")[0].partition("@")[0]
    return root in (*STUDY_OPTIONS, *STUDY_GROUPS, "out_dir")


def _name_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def training_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A study's options without its own: what `config.parse` and a worker understand."""
    own = (*STUDY_OPTIONS, *STUDY_GROUPS)
    rest = {name: value for name, value in options.items() if name not in own}
    return {**rest, "resume": None}  # that of a training run is a folder


def configure(study: Study, number: int, overrides: Overrides) -> TrialConfig:
    """Trial `number`: the study's options with what the space chose on top.

    Raises ConfigError if the space chose an option that does not exist or a value not allowed.
    """
    seeds = suggest.trial_seeds(study.seed, number, study.replicates)
    groups = [f"{name}={value}" for name, value in overrides.items() if hydra_config.is_group(name)]
    options, choices = deepcopy(_composed("study", (*study.overrides, *groups)))
    options = training_options(options)
    for name, value in overrides.items():
        if not hydra_config.is_group(name):
            _set(options, name, value)
    options["seed"] = seeds[0]
    # A trial writes no folder of its own, so where it would do so is no part of its command.
    options["out_dir"] = _composed(hydra_config.TRAINING, ())[0]["out_dir"]
    choices = {group: choice for group, choice in choices.items() if group not in STUDY_GROUPS}
    return TrialConfig(
        number=number,
        rule=rule_name(choices),
        searched=dict(overrides),
        command=hydra_config.command(options, choices, seeds),
        options=options,
        seeds=seeds,
        epochs=config.parse(options).epochs,
        metric=study.metric,
    )


# Hydra takes 90 ms for what every trial of a structure has in common.
_composed = lru_cache(maxsize=64)(hydra_config.compose)


def _set(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets the dotted option `name`; raises ConfigError if there is none."""
    known = flatten(options)
    if name not in known:
        raise ConfigError(f"{name}: unknown option{nearest(name, known)}")
    *parents, leaf = name.split(".")
    for parent in parents:
        options = options[parent]
    options[leaf] = value


def rule_name(choices: Mapping[str, str]) -> str:
    """Under what name a trial competes."""
    return rules.reported_name(choices["trainer"], choices["model/vf"])


def check_space(study: Study) -> list[TrialConfig]:
    """A configuration of every branch of the space, composed and its data loaded.

    Raises ConfigError if one is refused, or if the study was given an option that is searched;
    data.DataError if there is no such data.
    """
    checked = []
    jax.config.update("jax_platforms", "cpu")  # the driver trains nothing, and holds no GPU
    given = {_name_of(override): override.partition("=")[2] for override in study.overrides}
    for branch in space_tree.branches(SPACES[study.space]):
        for name, value in branch.overrides.items():
            if given.get(name, str(value)) != str(value):
                raise ConfigError(
                    f"{name}: given {given[name]}, but space={study.space} searches it; leave it"
                    f" out or take another space ({', '.join(SPACES)})"
                )
        with _blaming(study.space):
            trial = configure(study, 0, branch.overrides)
            training.prepare(config.parse(trial["options"]))
        checked.append(trial)
    return checked


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
        there = f"a new name, or resume=true ({out_dir / given} is there already)"
        raise refusal("study", given, there)
    return given


def first_points(study: Study, known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """What is tried first: the published defaults of each rule, then the points of the study's
    file, then for a grid all of it but what is `known`, in an order of the study's own.

    Raises ConfigError if a point is not in the space, if a rule has fewer trials than points, or
    if a grid has fewer points than the study trials.
    """
    space = SPACES[study.space]
    points = defaults(space, partial(_configured, study))
    if study.points is not None:
        try:
            text = Path(study.points).read_text()
        except OSError as error:
            allowed = f"a file that can be read ({error.strerror})"
            raise refusal("points", study.points, allowed) from error
        try:
            points += read_points(text, space)
        except ConfigError as error:
            raise ConfigError(f"points: {study.points}: {error}") from error
    if suggest.SAMPLERS[study.searcher["name"]].grid:
        whole = grid(space, study.searcher["points_per_range"])
        left = [point for point in whole if point not in points and point not in known]
        points += suggest.shuffled(left, study.seed)
        if study.trials > len(points):
            raise refusal("trials", study.trials, f"at most {len(points)}, the whole grid")
    elif study.points is not None:
        rules = space_tree.rules_of(space) if study.searcher["balanced"] else []
        for index, rule in enumerate(rules or [None]):
            count = sum(rule in (None, point.get(space_tree.RULE)) for point in points)
            if count > len(range(index, study.trials, max(1, len(rules)))):
                least = f"at least {(count - 1) * max(1, len(rules)) + index + 1}"
                raise refusal("trials", study.trials, f"{least}, for all points to be tried")
    return points


def _configured(study: Study, overrides: Overrides) -> dict[str, Any]:
    """The study's options, flat, under the groups that a branch of its space chooses."""
    groups = [f"{name}={value}" for name, value in overrides.items() if hydra_config.is_group(name)]
    return flatten(_composed("study", (*study.overrides, *groups))[0])
