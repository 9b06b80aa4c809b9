"""The options of a study and of each of its trials, composed and checked.

The driver composes every trial's options itself, so that a trial is one command that
`python -m disinhib` understands, and a worker needs no Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from disinhib import config, hydra_config, plugins, rules, training
from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError, masked, nearest, one_line
from disinhib.hydra_config import option_of
from disinhib.metrics import SELECTION
from disinhib.tuning import early_stopping, resume, space_tree, suggest
from disinhib.tuning.event_log import Objective, Record, TrialConfig
from disinhib.tuning.initial_points import defaults, grid, read_points
from disinhib.tuning.space_tree import SEARCH
from disinhib.tuning.validation import STUDY_GROUPS, STUDY_OPTIONS, check
from search_spaces import SPACES, Overrides, Space

hydra_config.register("searcher", hydra_config.nodes(suggest.SAMPLERS))
hydra_config.register("scheduler", hydra_config.nodes(early_stopping.EARLY_STOPPING))


@dataclass(frozen=True)
class Study:
    """A study's checked options. Of `overrides`, the user's, `common` apply to every trial; the
    others narrow the search space (`space_tree.narrowed`)."""

    name: str
    out_dir: Path  # absolute; the study's own folder is out_dir / name
    resume: bool
    plan: bool
    space: str
    trials: int  # of each repeat
    repeats: int
    repeat_splits: bool
    budget: str  # of turns.BUDGETS
    epochs: int
    replicates: int
    seed: int
    metric: str
    mode: str  # max or min: that of the metric
    points: str | None  # a file
    warm_start: str | None  # an earlier study's name
    checkpoints: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    searcher: Mapping[str, Any]
    cluster: Mapping[str, Any]
    tracking: Mapping[str, Any]
    overrides: tuple[str, ...]
    common: tuple[str, ...]
    fixed: Mapping[str, Any]  # options that the space would search
    ranges: Mapping[str, Any]
    options: Mapping[str, Any]  # all of them, resolved

    @property
    def search_space(self) -> Space:
        return space_tree.narrowed(SPACES[self.space], self.fixed, self.ranges)

    @property
    def all_trials(self) -> int:
        return self.trials * self.repeats

    @property
    def objective(self) -> Objective:
        return Objective.of(self.metric, self.mode)

    @property
    def folder(self) -> Path:
        return self.out_dir / self.name

    @property
    def resources(self) -> dict[str, float]:
        """Of a trial."""
        return {"cpu": self.cluster["cpus_per_trial"], "gpu": self.cluster["gpus_per_trial"]}

    def stops(self, records: Mapping[int, Record], trial: Record) -> bool:
        """Whether early stopping ends a trial after its newest score."""
        return early_stopping.decide(records, trial, self.scheduler, self.seed, self.batch)

    def decisions(self, trial: TrialConfig) -> list[int]:
        """The epochs after which early stopping may end a trial."""
        number, budget = trial["number"], trial["epochs"]
        return early_stopping.decisions(number, budget, self.scheduler, self.seed)

    @property
    def batch(self) -> int | None:
        """How many trials are proposed together, if that is to be the same however trials are
        timed."""
        return self.searcher["batch"] if self.searcher["deterministic"] else None


def compose(overrides: Sequence[str]) -> Study:
    """The study that `overrides` (as on the command line) describe, with its own options checked.

    With `resume=true` or `extend=true` they come on top of the overrides of the study named; one
    that is resumed has its plugins as it has kept them.

    Raises ConfigError: an unknown option, space, scheduler or searcher; a value not allowed; with
    `resume`, no such study, or options that differ from its own.
    """
    _load_kept_plugins(overrides)
    given = overrides = [*map(_anchored, hydra_config.load_plugins(overrides))]
    settings, earlier = _settings(overrides), None
    if settings["resume"] == "auto" and not resume.begun(settings):
        overrides = [o for o in overrides if option_of(o) != "resume"]
        settings["resume"] = False
    if settings["resume"] or settings["extend"]:
        earlier = resume.read_kept(settings)
        overrides = resume.on_top_of(earlier, overrides, settings)
        if settings["extend"]:
            overrides = hydra_config.load_plugins(overrides)
        settings = _settings(overrides)
    fixed, ranges, common = _narrowing(settings["space"], overrides)
    space = space_tree.narrowed(SPACES[settings["space"]], fixed, ranges)
    # The rest may be options of a group that only the space chooses, say of model/vf=dale.
    chosen = next(space_tree.branches(space)).overrides
    with _blaming(settings["space"]):
        _composed((), chosen)
    options, choices = _composed(common, chosen)
    check(options)
    options["mode"] = SELECTION[options["metric"]].mode  # kept: a plugin may be gone
    out_dir = Path(options["out_dir"]).absolute()
    hydra_config.check_folder(out_dir)
    uri = options["tracking"]["uri"]
    if uri is None:
        then = None
        if earlier is not None and not any(option_of(o) == "tracking.uri" for o in given):
            then = earlier["options"]["tracking"]["uri"] or ""
        options["tracking"]["uri"], uri = store_of(then, out_dir)
    name = options["study"]
    if not options["resume"]:
        experiment = choices.get("experiment", "None").replace("/", "-")
        default = f"{options['space']}-{options['dataset']['name']}"
        default = default if experiment == "None" else experiment
        name = resume.free_name(name, default, out_dir)
    elif earlier is not None:
        options["resume"] = True
        resume.refuse_changes(earlier["options"], options)
    plain = {f.name: options[f.name] for f in fields(Study) if f.name in options}
    own = {"name": name, "out_dir": out_dir, "overrides": tuple(overrides), "options": options}
    narrowing = {"common": tuple(common), "fixed": fixed, "ranges": ranges}
    tracking = {"tracking": {**options["tracking"], "uri": uri}}
    return Study(**{**plain, **own, **narrowing, **tracking})


def _load_kept_plugins(overrides: Sequence[str]) -> None:
    """Loads the plugins of the study that `overrides` resume, if they do, from the study's folder:
    their files may have changed, or lie on another machine.

    Raises ConfigError if there is no such study, or if a plugin is given with another text, which
    is not run.
    """
    from disinhib.tuning import manifest  # which imports this module

    which = [o for o in overrides if option_of(o) in ("resume", "extend", "study", "out_dir")]
    if not any(option_of(o) == "resume" for o in which):
        return
    settings = _settings(which)
    if not settings["resume"] or (settings["resume"] == "auto" and not resume.begun(settings)):
        return
    resume.read_kept(settings)  # it is there
    name = settings["study"]
    provenance = manifest.read(Path(settings["out_dir"]).absolute() / name, name).provenance
    kept = {plugin["name"]: plugin["sha256"] for plugin in provenance.get("plugins", [])}
    for plugin in map(plugins.read, hydra_config.plugins_in(overrides)):
        if kept.get(plugin.name, plugin.sha256) != plugin.sha256:
            raise ConfigError(
                f"resume: {name} began with another text of the plugin {plugin.name} than"
                f" {plugin.file} has; leave plugins out, or start another study from it:"
                f" study={name} extend=true"
            )
    hydra_config.load_kept_plugins(provenance)


def _narrowing(
    name: str, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(the options that the space of that `name` searches and `overrides`, or an experiment, fix;
    other ranges for them; the other overrides).

    Raises ConfigError for a range of an option that is not searched, or that is fixed.
    """
    space = SPACES[name]
    known = space_tree.searched(space)
    ranges: dict[str, Any] = {}
    given: dict[str, Any] = {}
    common, experiment = [], None
    for override in overrides:
        option = option_of(override)
        if option.startswith(SEARCH):
            ranges[option.removeprefix(SEARCH)] = hydra_config.value_of(override)
        elif option in known and not override.startswith("~"):
            given[option] = hydra_config.value_of(override)
        else:
            common.append(override)
            experiment = hydra_config.value_of(override) if option == "experiment" else experiment
    if both := given.keys() & ranges.keys():
        option = min(both)
        raise ConfigError(f"{SEARCH}{option}: given with {option}={given[option]}, needed is one")
    of_experiment = hydra_config.settings_of(experiment)
    fixed = {o: v for o, v in of_experiment.items() if o in known and o not in ranges} | given
    left = {
        name
        for branch in space_tree.branches(space_tree.narrowed(space, fixed, ranges))
        for name in branch.params
    }
    for option in ranges:
        if not space_tree.parameters_for(option, left):
            near = nearest(option, sorted({space_tree.option_of(name) for name in left}))
            raise ConfigError(f"{SEARCH}{option}: space={name} does not search it{near}")
    return fixed, ranges, common


def store_of(then: str | None, out_dir: Path) -> tuple[str | None, str]:
    """(what is kept with a study that is given no `tracking.uri`, the address of its store): the
    environment's, else in `out_dir`. A study that is resumed, or extended, stays where it was:
    `then` is what was kept with it, "" for `out_dir`.

    No password is kept: it stays in the environment. Raises ConfigError if it is not there.
    """
    override = f"tracking.uri={os.environ.get('MLFLOW_TRACKING_URI', '')}"
    there = _anchored(override).partition("=")[2]
    if then is not None and masked(there) != then:
        if "***" in then:
            raise ConfigError(f"tracking.uri: missing, as a study keeps no passwords ({then})")
        there = then
    return masked(there) or None, there or f"sqlite:///{out_dir / 'mlflow.db'}"


def _anchored(override: str) -> str:
    """An override whose relative place, which is relative to the folder of this command, is made
    absolute, so that it means the same when the study is resumed from another folder."""
    name, _, text = override.partition("=")
    place = text.strip("'\"")
    if "${" in place:
        return override
    if name == "dataset.path" and place.lower() not in ("", "null"):
        return f"{name}={Path(os.path.expanduser(place)).absolute()}"
    if name in ("tracking.uri", "searcher.storage") and place.startswith("sqlite:///"):
        return f"{name}=sqlite:///{Path(place.removeprefix('sqlite:///')).absolute()}"
    return override


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The options that only a study has, and those that are checked with them."""
    root = lambda override: re.split("[.@]", hydra_config.option_of(override))[0]
    also = {"out_dir", "epochs", "seed", "device", "test_at_end", "diagnostics"}
    own = [o for o in overrides if root(o) in {*STUDY_OPTIONS, *also}]
    settings, _ = hydra_config.compose_loaded("study", own)
    check(settings)
    return settings


def kept(study: Study) -> dict[str, Any]:
    """The options that are stored, to resume or extend the study."""
    return {"overrides": list(study.overrides), "options": dict(study.options)}


def configure(study: Study, number: int, overrides: Overrides, repeat: int = 1) -> TrialConfig:
    """Trial `number`, of a repeat: the study's options, and the overrides of the space on top.

    Raises ConfigError if the space chose an option that does not exist or a value not allowed.
    """
    seeds = suggest.trial_seeds(study.seed, number, study.replicates)
    composed, choices = _composed(study.common, overrides)
    options = {name: value for name, value in composed.items() if name not in STUDY_OPTIONS}
    options["resume"] = None  # that of a training run is a folder
    # Fixed where the space would search them, and wherever else there is such an option.
    there = flatten(options)
    fixed = {name: value for name, value in study.fixed.items() if name in there}
    for name, value in {**fixed, **overrides}.items():
        if not hydra_config.is_group(name):
            _set(options, name, value)
    options["seed"] = seeds[0]
    if study.repeat_splits:
        options["dataset"]["valid_seed"] = suggest.split_seed(study.seed, repeat)
    # A trial writes no folder of its own, so out_dir is not part of its command.
    options["out_dir"] = _cached(hydra_config.TRAINING, ())[0]["out_dir"]
    choices = {group: choice for group, choice in choices.items() if group not in STUDY_GROUPS}
    return TrialConfig(
        number=number,
        rule=rule_name(choices),
        searched=dict(overrides),
        command=hydra_config.command(options, choices, seeds),
        options=options,
        seeds=seeds,
        epochs=config.parse(options).epochs,
        final=False,
    )


# Cached, because Hydra takes 90 ms for what all trials of a structure share.
_cached = lru_cache(maxsize=64)(hydra_config.compose_loaded)


def _composed(given: Sequence[str], chosen: Overrides) -> tuple[dict[str, Any], dict[str, str]]:
    """A study's options, and its choices of groups: the overrides `given`, and those that its space
    has `chosen` as far as they choose a group."""
    groups = (f"{name}={value}" for name, value in chosen.items() if hydra_config.is_group(name))
    return deepcopy(_cached("study", (*given, *groups)))


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
    """A configuration of every branch of the space, composed, with its data loaded.

    Raises ConfigError if one is refused, or if the space sets an option that is given otherwise;
    data.DataError if the data cannot be loaded.
    """
    checked = []
    own = {hydra_config.option_of(o): o.partition("=")[2] for o in study.common}
    for branch in space_tree.branches(study.search_space):
        for name, value in branch.overrides.items():
            if own.get(name, str(value)) != str(value):
                raise ConfigError(
                    f"{name}: given {own[name]}, but space={study.space} sets {value}; leave it"
                    f" out or take another space ({', '.join(SPACES)})"
                )
        with _blaming(study.space):
            trial = configure(study, 0, branch.overrides)
            training.check_data(config.parse(trial["options"]))
        checked.append(trial)
    there = {name for trial in checked for name in flatten(trial["options"])}
    for name in study.fixed:
        if name != space_tree.RULE and name not in there:
            raise ConfigError(f"{name}: unknown option here{nearest(name, there)}")
    return checked


@contextmanager
def _blaming(space: str) -> Iterator[None]:
    """Adds the space's name to a refusal of its choices."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} (in space={space})") from error


def first_points(study: Study, known: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The initial points: the published defaults of each rule, the points of the study's file, and
    for a grid all its points except the `known` ones, shuffled by the study's seed.

    Raises ConfigError if a point is not in the space, if a rule has fewer trials than points, or
    if a grid has fewer points than the study has trials.
    """
    space = study.search_space
    points = defaults(space, lambda chosen: flatten(_composed(study.common, chosen)[0]))
    if study.points is not None:
        try:
            points += read_points(Path(study.points).read_text("utf-8"), space)
        except ConfigError as error:
            raise ConfigError(f"points: {study.points}: {error}") from error
        except (OSError, ValueError) as error:  # no file, or no text
            allowed = f"a file of text that can be read ({one_line(error)})"
            raise refusal("points", study.points, allowed) from error
    if suggest.SAMPLERS[study.searcher["name"]].grid:
        whole = grid(space, study.searcher["points_per_range"])
        left = [point for point in whole if point not in points and point not in known]
        points += suggest.shuffled(left, study.seed)
        if study.trials > len(points):
            raise refusal("trials", study.trials, f"at most {len(points)}, the whole grid")
    elif study.points is not None:
        rules = (study.searcher["balanced"] and space_tree.rules_of(space)) or [None]
        for index, rule in enumerate(rules):
            count = sum(rule in (None, point.get(space_tree.RULE)) for point in points)
            least = (count - 1) * len(rules) + index + 1
            if study.trials < least:
                allowed = f"at least {least}, for all points to be tried"
                raise refusal("trials", study.trials, allowed)
    return points
