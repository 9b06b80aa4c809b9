"""The next configuration: builds an Optuna study from the history and asks it once.

A proposal depends only on the space, the sampler, the history and a seed, so a study that is
resumed after a kill proposes what it would have proposed. Balanced rules, deterministic batches and
warm starts are filters on the history.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from disinhib.checks import COUNT, FLAG, INDEX, OPTIONAL_TEXT, POSITIVE, Option, or_null
from disinhib.tuning import event_log
from disinhib.tuning.event_log import Point, Record
from disinhib.tuning.space_tree import RULE, option_of, parameters_for, path_at, same
from disinhib.tuning.turns import Turn
from search_spaces import Overrides, Space

STATES = {
    event_log.COMPLETE: TrialState.COMPLETE,
    event_log.PRUNED: TrialState.PRUNED,
    event_log.FAILED: TrialState.FAIL,
}
LEARNABLE = (event_log.COMPLETE, event_log.PRUNED)
MakeSampler = Callable[..., optuna.samplers.BaseSampler]  # of the keyword `seed`


class Tried(TypedDict):
    """A trial that a sampler learns from, in plain values."""

    rule: str
    point: Point
    scores: list[float]  # by epoch; signed: more is better
    state: str  # a key of STATES if the trial has ended
    searched: dict[str, Any]  # the options that its space has set


def good(trials: int) -> int:
    """As many of so many trials as TPE calls good, in whose neighbourhood it proposes. (One more
    would count as bad, and keep it away from there.)"""
    return min(math.ceil(trials / 10), 25)


class Proposal(NamedTuple):
    overrides: Overrides
    point: Point


def suggest(
    space: Space,
    sampler: MakeSampler,
    history: Sequence[Tried],
    seed: int,
    number: int = 0,
    fixed: Mapping[str, Any] | None = None,
) -> Proposal:
    """The sampler's proposal for trial `number` after `history`, with the parameters `fixed`."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, direction="maximize", sampler=sampler(seed=seed))
    name = storage.get_study_id_from_name(study.study_name)
    for trial in history:  # not study.add_trials, which checks what the log has, each time again
        storage.create_new_trial(name, template_trial=frozen_trial(trial))
    if fixed:
        study.enqueue_trial(dict(fixed))
    trial = study.ask()
    overrides = space(_Numbered(trial, number))  # pyright: ignore[reportArgumentType]
    attributes = study.get_trials(deepcopy=False)[trial.number].system_attrs
    attributes = {name: value for name, value in attributes.items() if name != "fixed_params"}
    return Proposal(overrides, point(trial.params, trial.distributions, attributes))


class _Numbered:
    """An `optuna.Trial` with its number in the study: Optuna's own counts the history."""

    def __init__(self, trial: optuna.Trial, number: int):
        self.trial, self.number = trial, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)


def point(
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    system_attrs: Mapping[str, Any],
) -> Point:
    texts = {name: distribution_to_json(kind) for name, kind in distributions.items()}
    return Point(params=dict(params), distributions=texts, system_attrs=dict(system_attrs))


SOMETIME = datetime(2000, 1, 1)  # no sampler asks when


class _Past(FrozenTrial):
    """A trial that is made for one study, which may have it as it is. Optuna copies each deeply as
    it is added, which for a proposal after 1,000 trials takes longer than the proposal itself."""

    def __deepcopy__(self, memo: Any) -> FrozenTrial:
        return self


def frozen_trial(tried: Tried) -> FrozenTrial:
    """The trial as Optuna stores it."""
    state = STATES.get(tried["state"], TrialState.RUNNING)
    return _Past(
        number=-1,  # the study gives it one
        trial_id=-1,
        state=state,
        value=value(tried["state"], tried["scores"]),
        datetime_start=SOMETIME,
        datetime_complete=SOMETIME if state.is_finished() else None,
        params=tried["point"]["params"],
        distributions={
            name: _distribution(text) for name, text in tried["point"]["distributions"].items()
        },
        user_attrs={},
        system_attrs=tried["point"]["system_attrs"],
        intermediate_values=dict(enumerate(tried["scores"], start=1)),
    )


_distribution = lru_cache(maxsize=1024)(json_to_distribution)  # a space has but a few


def value(state: str, scores: Sequence[float]) -> float | None:
    """As Optuna itself values a trial that has ended in `state`: by its last score, if that is a
    number. One that has failed, or runs, has no value."""
    ended = state in (event_log.COMPLETE, event_log.PRUNED) and len(scores) > 0
    return scores[-1] if ended and math.isfinite(scores[-1]) else None


def tried(record: Record) -> Tried:
    return Tried(
        rule=record.rule,
        point=record.point,
        scores=list(record.scores),
        state=record.state,
        searched=record.config["searched"],
    )


def history(
    records: Mapping[int, Record],
    past: Iterable[Tried],
    number: int,
    turn: Turn,
    batch: int | None = None,
    most: int | None = None,
) -> list[Tried]:
    """The trials that the proposal of trial `number` may learn from, oldest first.

    A rule that has its `turn` learns from its own trials only: in one common study, TPE would call
    the best few trials *of all rules* good and learn nothing about the parameters of the other
    rules. So does a repeat, for which those of another repeat have not been tried. With `batch`,
    the trials of the same batch (`batch` consecutive numbers) count as running, so that no proposal
    depends on which trial was faster. `past` are trials of earlier studies. Of more than `most`
    trials, those are left that are `remembered`.
    """
    size = batch or 1
    learnt = [trial for trial in past if turn.rule in (None, trial["rule"])]
    own = [n for n in turn.earlier if n in records]
    runs = lambda n: n // size == number // size
    ends = [(trial["state"], trial["scores"]) for trial in learnt]
    ends += [
        (event_log.RUNNING, []) if runs(n) else (records[n].state, records[n].scores) for n in own
    ]
    known = []
    for index in remembered(ends, most):
        if index < len(learnt):
            known.append(learnt[index])
            continue
        earlier = own[index - len(learnt)]
        trial = tried(records[earlier])
        if runs(earlier):
            trial = Tried(**{**trial, "scores": [], "state": event_log.RUNNING})
        known.append(trial)
    return known


def remembered(ends: Sequence[tuple[str, Sequence[float]]], most: int | None) -> list[int]:
    """Of trials (each one's state and scores), oldest first, the indices of those that run, and of
    at most `most` that TPE learns from (it ignores failed ones): the newest, with what has failed
    since, and the best of the others (as many as are `good`).
    """
    learnt = [n for n, (state, _) in enumerate(ends) if state in LEARNABLE]
    if most is None or len(learnt) <= most:
        return list(range(len(ends)))
    newest = learnt[good(most) - most]
    older = [n for n in range(newest) if ends[n][0] in event_log.ENDED]
    scores = {
        n: score
        for n in older
        if ends[n][0] == event_log.COMPLETE and (score := value(*ends[n])) is not None
    }
    best = sorted(scores, key=lambda n: scores[n], reverse=True)[: good(most)]
    forgotten = {*older} - {*best}
    return [n for n in range(len(ends)) if n not in forgotten]


def fixed_params(turn: Turn, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parameters of a trial that are not sampled: its rule if it is the `turn` of one, and an
    initial point if any of `points`, which each repeat tries, are left."""
    own = [point for point in points if turn.rule in (None, point.get(RULE))]
    chosen = {} if turn.rule is None else {RULE: turn.rule}
    return {**own[turn.index], **chosen} if turn.index < len(own) else chosen


def as_tried(
    records: Iterable[Record], space: Space, fixed: Mapping[str, Any] | None = None
) -> list[Tried]:
    """The complete and pruned trials among `records` that lie in `space`, as points of it."""
    own = (tried(record) for record in records if record.state in LEARNABLE)
    return within(own, space, fixed)


def within(
    trials: Iterable[Tried], space: Space, fixed: Mapping[str, Any] | None = None
) -> list[Tried]:
    """The trials that lie in `space`, as points of it, with its ranges: an option that was fixed
    then and is searched now counts by its value, and one that is `fixed` now must have had it."""
    inside = []
    for trial in trials:
        then, params = {**trial["searched"], RULE: trial["rule"]}, trial["point"]["params"]
        not_searched = {o: value for o, value in then.items() if not parameters_for(o, params)}
        values = {**not_searched, **params}
        path, whole = path_at(space, values, names=lambda name: (name, option_of(name)))
        if whole and all(_had(trial, *option) for option in (fixed or {}).items()):
            there = point(path.params, path.distributions, {})
            inside.append(Tried(**{**trial, "point": there}))
    return inside


def _had(trial: Tried, option: str, value: Any) -> bool:
    """Whether an option had this value, if the trial had it. A rule may be meant by the name under
    which it competes, or by its trainer: bp-ei is trainer=bp in another circuit."""
    if option == RULE and value == trial["rule"]:
        return True
    return same(trial["searched"].get(option, value), value)


def trial_seeds(study_seed: int, number: int, replicates: int = 1) -> list[int]:
    """The seeds of trial `number`, independent of those of other trials; below 2**31, for jax."""
    return _seeds(study_seed, (number,), replicates)


def sampler_seed(study_seed: int, number: int) -> int:
    """The sampler's seed for trial `number`."""
    return _seeds(study_seed, (number, 0))[0]


def split_seed(study_seed: int, repeat: int) -> int:
    """The seed that draws the validation set of a repeat (from 1)."""
    return _seeds(study_seed, (repeat, 0, 0))[0]


def sequence_seed(study_seed: int, sequence: int) -> int:
    """The seed of a study's quasi-random sequence, of which each rule and repeat has one."""
    return _seeds(study_seed, (sequence, 0, 1))[0]


def shuffled(points: Sequence[Any], study_seed: int) -> list[Any]:
    """`points`, shuffled by the study's seed."""
    order = np.random.default_rng(_seeds(study_seed, (0, 0, 0))).permutation(len(points))
    return [points[index] for index in order]


def _seeds(entropy: int, key: tuple[int, ...], count: int = 1) -> list[int]:
    drawn = np.random.SeedSequence(entropy, spawn_key=key).generate_state(count)
    return [int(seed) >> 1 for seed in drawn]


class Sampler(NamedTuple):
    """An entry of SAMPLERS. `make(**options, seed=...)` is Optuna's class, `own` its options;
    `needs` is a package that it imports and that may be missing; `grid` says that all its points
    are initial points, `sequence` that they are those of a quasi-random sequence; `memory` is the
    number of ended trials (of a rule, if balanced) that it learns from, None if it needs all."""

    make: MakeSampler
    own: tuple[Option, ...]
    words: str
    needs: str | None = None
    grid: bool = False
    sequence: bool = False
    memory: int | None = None

    @property
    def adaptive(self) -> bool:
        """Whether its proposals follow the scores."""
        return self.make is not optuna.samplers.RandomSampler

    @property
    def options(self) -> tuple[Option, ...]:
        """All options: those of every searcher, then its own."""
        balanced, *common = COMMON
        points = (POINTS_PER_RANGE,) if self.grid else ()
        return (balanced._replace(default=not self.grid), *common, *points, *self.own)


COMMON = (
    Option(
        "balanced", True, FLAG, "every rule has the same number of trials and a sampler of its own"
    ),
    Option(
        "deterministic",
        False,
        FLAG,
        "reproducible: proposals and decisions do not depend on timing, in batches",
    ),
    Option("batch", 6, COUNT, "trials in a batch, if deterministic"),
    Option(
        "storage",
        None,
        OPTIONAL_TEXT,
        "Optuna's copy of the study: a database's URL; null: a file in the study's folder",
    ),
)
POINTS_PER_RANGE = Option(
    "points_per_range", 3, COUNT, "values of each range, from one end to the other"
)
_quiet = Option(
    "warn_independent_sampling", False, FLAG, "warn about parameters that are sampled independently"
)
_startup = lambda count: Option(
    "n_startup_trials", count, INDEX, "random trials first (per rule, if balanced)"
)

SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(
        optuna.samplers.TPESampler,
        # Every argument is here, as Optuna 5 changed defaults.
        (
            _startup(5),
            Option("n_ei_candidates", 24, COUNT, "candidates, of which the best is proposed"),
            Option("multivariate", True, FLAG, "model parameters jointly"),
            Option("group", True, FLAG, "sample jointly within each branch of the space"),
            Option("constant_liar", True, FLAG, "avoid the neighbourhood of running trials"),
        ),
        "tree-structured Parzen estimator (Bergstra et al. 2011), of the newest 90 trials and the"
        " best 10 of the others",
        memory=100,  # each makes a proposal 30 µs slower
    ),
    "random": Sampler(
        optuna.samplers.RandomSampler,
        (),
        "independent draws from the distributions of the search space",
    ),
    "qmc": Sampler(
        optuna.samplers.RandomSampler,
        (),
        "quasi-random: the points of a scrambled Sobol sequence (for each rule, if balanced), which"
        " cover the search space more evenly than independent draws and do not follow the scores",
        sequence=True,
    ),
    "cmaes": Sampler(
        optuna.samplers.CmaEsSampler,
        (
            _startup(5),
            Option("sigma0", None, or_null(POSITIVE), "initial step; null: a sixth of the ranges"),
            Option(
                "popsize",
                None,
                or_null(COUNT),
                "trials in a generation; null: 4 + 3 log(parameters)",
            ),
            Option("consider_pruned_trials", False, FLAG, "learn from pruned trials, too"),
            Option("use_separable_cma", False, FLAG, "use a diagonal covariance matrix"),
            Option(
                "with_margin", False, FLAG, "use a margin, for whole numbers (Hamano et al. 2022)"
            ),
            Option("lr_adapt", False, FLAG, "adapt the learning rate (Nomura et al. 2023)"),
            _quiet,
        ),
        "CMA-ES on the numeric parameters of a branch; choices are drawn at random",
        needs="cmaes",
    ),
    "gp": Sampler(
        optuna.samplers.GPSampler,
        (
            _startup(10),
            Option("deterministic_objective", False, FLAG, "scores have no noise"),
            _quiet,
        ),
        "Gaussian process with expected improvement; needs the package torch",
        needs="torch",
    ),
    "grid": Sampler(
        optuna.samplers.RandomSampler,
        (),
        "every combination of every choice and of points_per_range values of every range,"
        " shuffled by the study's seed; the published defaults come first",
        grid=True,
    ),
}


def sampler(options: Mapping[str, Any]) -> MakeSampler:
    """`make(seed=...)` of the sampler in a study's `searcher` options."""
    entry = SAMPLERS[options["name"]]
    own = {option.name: options[option.name] for option in entry.own}

    def make(**seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            # Multivariate TPE's `group`, which makes it fit a space with branches, has been in
            # Optuna, unchanged and marked experimental, since 2.8; CMA-ES and GP have such, too.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return entry.make(**own, **seed)

    return make
