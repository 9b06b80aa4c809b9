"""What to try next: Optuna's samplers, asked for one trial at a time.

With `balanced`, every rule has a sampler of its own and gets the same number of trials, in turn.
In one common study TPE calls the best few trials *of all rules* good: nothing would ever be
learnt about the parameters of a rule that is not the best.

A proposal follows from the study's seed, the trial's number and what was heard of the earlier
trials: so a study that goes on after a kill proposes what it would have proposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, TrialState, create_trial

from disinhib.tuning import event_log
from disinhib.tuning.event_log import ASKED, ENDED, EPOCH, Event
from disinhib.tuning.space_tree import RULE, allows, offered, walk
from search_spaces import Overrides, Space

DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
STATES = {
    event_log.COMPLETE: TrialState.COMPLETE,
    event_log.PRUNED: TrialState.PRUNED,
    event_log.FAILED: TrialState.FAIL,
}
Make = Callable[..., optuna.samplers.BaseSampler]


class Sampler(NamedTuple):
    """`make(**options, seed=...)`; `needs` is a package that it imports and that may be missing;
    `grid`: it is only ever asked for points that are given."""

    make: Make
    needs: str | None = None
    grid: bool = False


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(optuna.samplers.TPESampler),
    "random": Sampler(optuna.samplers.RandomSampler),
    "cmaes": Sampler(optuna.samplers.CmaEsSampler, needs="cmaes"),
    "gp": Sampler(optuna.samplers.GPSampler, needs="torch"),
    "grid": Sampler(optuna.samplers.RandomSampler, grid=True),
}


def trial_seeds(study_seed: int, number: int, replicates: int = 1) -> list[int]:
    """Seeds of trial `number`, independent of all others; below 2**31, as jax takes them."""
    return _seeds(study_seed, (number,), replicates)


def _seeds(entropy: int, key: tuple[int, ...], count: int = 1) -> list[int]:
    drawn = np.random.SeedSequence(entropy, spawn_key=key).generate_state(count)
    return [int(seed) >> 1 for seed in drawn]


def shuffled(points: Sequence[Any], study_seed: int) -> list[Any]:
    """`points` in an order of the study's own."""
    order = np.random.default_rng(_seeds(study_seed, (0, 0, 0))).permutation(len(points))
    return [points[index] for index in order]


class Point(TypedDict):
    """What Optuna chose, in plain values: parameters, their distributions as JSON, and what its
    sampler keeps with a trial."""

    params: dict[str, Any]
    distributions: dict[str, str]
    system_attrs: dict[str, Any]


class Proposal(NamedTuple):
    overrides: Overrides
    point: Point


class Finished(TypedDict):
    """A trial of an earlier study, in plain values."""

    rule: str
    point: Point
    scores: list[float]
    state: str


def finished(events: Iterable[Event], space: Space) -> list[Finished]:
    """What an earlier study can teach one of `space`: its trials that were completed or pruned and
    lie in `space`, as points of it."""
    events = list(events)
    points = {event.trial: event.body["point"] for event in events if event.kind == ASKED}
    ended = [
        Finished(rule=r.rule, point=points[number], scores=r.scores, state=r.state)
        for number, r in event_log.records(events).items()
        if r.state in (event_log.COMPLETE, event_log.PRUNED)
    ]
    return within(ended, space)


def within(trials: Iterable[Finished], space: Space) -> list[Finished]:
    """Those that lie in `space`, as points of it."""
    found = []
    for trial in trials:
        point = _point_of(space, {RULE: trial["rule"], **trial["point"]["params"]})
        if point is not None:
            found.append(Finished(**{**trial, "point": point}))
    return found


def _point_of(space: Space, params: Mapping[str, Any]) -> Point | None:
    """`params` as the point of `space` that they are, with its ranges; None if they are none."""
    way = walk(space, lambda name, kind: params.get(name, offered(kind, "low")[0]))
    known = (
        name in params and allows(kind, params[name]) for name, kind in way.distributions.items()
    )
    return _point(way.params, way.distributions, {}) if all(known) else None


def _point(
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    system_attrs: Mapping[str, Any],
) -> Point:
    texts = {name: distribution_to_json(kind) for name, kind in distributions.items()}
    return Point(params=dict(params), distributions=texts, system_attrs=dict(system_attrs))


class Search:
    """The proposals of one study.

    `rules` has those that take turns, or nothing; `points` are parameters to try first, and
    `past` are trials of earlier studies. With `batch`, proposals are made for `batch` consecutive
    numbers together and learn from earlier batches only, in the order of their numbers.
    """

    def __init__(
        self,
        space: Space,
        sampler: Make,
        mode: str,
        seed: int,
        rules: Sequence[str] = (),
        points: Sequence[Mapping[str, Any]] = (),
        past: Iterable[Finished] = (),
        batch: int | None = None,
    ):
        self.space, self.sampler, self.seed, self.batch = space, sampler, seed, batch
        self.rules = tuple(rules)
        self.guessers = [
            optuna.create_study(direction=DIRECTIONS[mode]) for _ in range(max(1, len(rules)))
        ]
        self.points = [[p for p in points if self._belongs(p.get(RULE), i)] for i in self._indices]
        self.ids: dict[int, int] = {}  # trial -> its id in its guesser's storage
        self.late: list[Event] = []  # heard in this batch
        for trial in past:
            self._learn(trial)

    def propose(self, number: int) -> Proposal:
        """The configuration of trial `number`; numbers come in order, each once."""
        self._begin(number)
        guesser, given = self._guesser(number), self._given(number)
        guesser.sampler = self.sampler(seed=_seeds(self.seed, (number, 0))[0])
        if given:
            guesser.enqueue_trial(given)
        guess = guesser.ask()
        self.space(guess)
        self.ids[number] = guess._trial_id
        kept = guesser.get_trials(deepcopy=False)[guess.number].system_attrs
        attributes = {name: value for name, value in kept.items() if name != "fixed_params"}
        point = _point(guess.params, guess.distributions, attributes)
        # Again, for the number: that of the guess counts its own rule's trials.
        return Proposal(self.space(FixedTrial(guess.params, number)), point)  # pyright: ignore

    def follow(self, event: Event) -> None:
        """Learns from an event of the study, or of the study before it was resumed."""
        if event.kind == ASKED:
            if event.trial not in self.ids:
                self._begin(event.trial)
                self.ids[event.trial] = self._add(
                    self._guesser(event.trial), event.body["point"], TrialState.RUNNING
                )
        elif self.batch is None:
            self._tell(event)
        else:
            self.late.append(event)

    def _begin(self, number: int) -> None:
        if self.batch is not None and number % self.batch == 0:
            for event in sorted(self.late, key=lambda e: (e.trial, e.kind == ENDED, e.epoch)):
                self._tell(event)
            self.late.clear()

    def _tell(self, event: Event) -> None:
        guesser, guess = self._guesser(event.trial), self.ids[event.trial]
        if event.kind == EPOCH:
            optuna.Trial(guesser, guess).report(event.body["score"], event.epoch)
            return
        state, index = event.body["state"], optuna.Trial(guesser, guess).number
        scores = guesser.get_trials(deepcopy=False)[index].intermediate_values
        value = scores[max(scores)] if state == event_log.COMPLETE else None
        guesser.tell(index, value, state=STATES[state])

    def _given(self, number: int) -> dict[str, Any]:
        """What is decided already of trial `number`."""
        turn, index = divmod(number, len(self.guessers))
        points = self.points[index]
        rule = {RULE: self.rules[index]} if self.rules else {}
        return {**(points[turn] if turn < len(points) else {}), **rule}

    def _learn(self, trial: Finished) -> None:
        """Adds a trial of an earlier study to those that its rule's sampler knows."""
        point = trial["point"]
        for index in self._indices:
            if self._belongs(trial["rule"], index):
                state = STATES[trial["state"]]
                self._add(self.guessers[index], point, state, trial["scores"])

    @property
    def _indices(self) -> range:
        return range(len(self.guessers))

    def _belongs(self, rule: str | None, index: int) -> bool:
        return not self.rules or rule == self.rules[index]

    def _guesser(self, number: int) -> optuna.Study:
        return self.guessers[number % len(self.guessers)]

    def _add(
        self, guesser: optuna.Study, point: Point, state: TrialState, scores: Sequence[float] = ()
    ) -> int:
        guesser.add_trial(
            create_trial(
                state=state,
                value=scores[-1] if state == TrialState.COMPLETE else None,
                params=point["params"],
                distributions={
                    name: json_to_distribution(text)
                    for name, text in point["distributions"].items()
                },
                system_attrs=point["system_attrs"],
                intermediate_values=dict(enumerate(scores, start=1)),
            )
        )
        return guesser.get_trials(deepcopy=False)[-1]._trial_id


def sampler(options: Mapping[str, Any]) -> Make:
    """`make(seed=...)` of the sampler that a study's `searcher` options name."""
    own = {name: value for name, value in options.items() if name not in SEARCHER_OPTIONS}
    entry = SAMPLERS[options["name"]]

    def make(**seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            # Multivariate TPE's `group`, which makes it fit a space with branches, has been in
            # Optuna, unchanged and marked experimental, since 2.8; CMA-ES and GP have such, too.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return entry.make(**own, **seed)

    return make


# What a searcher has beside its sampler's own arguments.
SEARCHER_OPTIONS = ("name", "balanced", "deterministic", "batch", "storage", "points_per_range")
