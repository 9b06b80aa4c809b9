"""What to try next: Optuna's ask and tell behind Ray's `Searcher`.

Ray's own OptunaSearch tells Optuna that a trial stopped by the scheduler is COMPLETE, so TPE
mixes budgets, and leaves a NaN trial RUNNING for ever. Here every epoch is reported and a trial
ends as COMPLETE, PRUNED or FAIL (DESIGN section 6).

With `balanced`, every rule has a sampler of its own and gets the same number of trials, in turn.
In one common study TPE calls the best few trials *of all rules* good: nothing would ever be
learnt about the parameters of a rule that is not the best.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.air.constants import TRAINING_ITERATION
from ray.tune.search import Searcher

from disinhib.tuning import trial as trials
from search_spaces import Overrides, Space

RULE = "trainer"  # the parameter by which a space chooses its rule, if it does
DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
STATES = {
    trials.COMPLETE: TrialState.COMPLETE,
    trials.PRUNED: TrialState.PRUNED,
    trials.FAILED: TrialState.FAIL,
}


def tpe(options: Mapping[str, Any], seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # `group` is what makes multivariate TPE fit a space with branches; it has been in Optuna,
        # unchanged and marked experimental, since 2.8.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(**options, seed=seed)


def random(options: Mapping[str, Any], seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(**options, seed=seed)


SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {"tpe": tpe, "random": random}


def trial_seed(study_seed: int, number: int) -> int:
    """Seed of trial `number`, independent of all others; below 2**31, as jax takes it."""
    return _seed(study_seed, number)


def sampler_seed(study_seed: int, branch: int) -> int:
    return _seed(study_seed, branch, 0)


def _seed(entropy: int, *key: int) -> int:
    return int(np.random.SeedSequence(entropy, spawn_key=key).generate_state(1)[0]) >> 1


class Branch(NamedTuple):
    """One way through a space: the choices made, and what it returned."""

    choices: dict[str, Any]
    overrides: Overrides


def branches(space: Space) -> Iterator[Branch]:
    """Ways through `space` that together make every categorical choice at least once, each with
    its numbers at the low and at the high end of their ranges."""
    todo: list[dict[str, Any]] = [{}]
    seen: set[tuple[str, Any]] = set()
    while todo:
        forced = todo.pop(0)
        for end in ("low", "high"):
            probe = _Probe(forced, end)
            yield Branch(probe.choices, space(probe))  # pyright: ignore[reportArgumentType]
        path: dict[str, Any] = {}
        for name, chosen in probe.choices.items():
            for value in probe.offered[name]:
                if (name, value) not in seen and value != chosen:
                    todo.append({**path, name: value})
                seen.add((name, value))
            path[name] = chosen


class _Probe:
    """Stands in for an `optuna.Trial`: takes the `forced` choices, else the first on offer, and
    the same `end` of every numeric range."""

    def __init__(self, forced: dict[str, Any], end: str):
        self.forced, self.end, self.number = forced, end, 0
        self.choices: dict[str, Any] = {}
        self.offered: dict[str, Sequence] = {}

    def suggest_categorical(self, name: str, choices: Sequence) -> Any:
        self.offered[name] = choices
        self.choices[name] = self.forced.get(name, choices[0])
        return self.choices[name]

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return low if self.end == "low" else high

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return low if self.end == "low" else high


def rules_of(space: Space) -> list[str]:
    """The rules among which `space` chooses; empty if it has one only."""
    chosen = [branch.choices[RULE] for branch in branches(space) if RULE in branch.choices]
    return list(dict.fromkeys(chosen))


class _Asked(NamedTuple):
    guess: optuna.Trial  # in the study of its sampler
    entry: optuna.Trial  # in the record
    config: trials.TrialConfig


class Search(Searcher):
    """Ray's searcher for one study.

    `record` is the Optuna study of all trials, in order of their numbers. What is suggested comes
    from `guessers`: one Optuna study for each rule of `rules`, or a single one for all.

    `configure(number, overrides)` turns what the space chose into a trial's configuration.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        sampler: Callable[[int], optuna.samplers.BaseSampler],
        configure: Callable[[int, Overrides], trials.TrialConfig],
        mode: str,
        rules: Sequence[str] = (),
    ):
        super().__init__(metric=trials.SCORE, mode=mode)
        direction = DIRECTIONS[mode]
        self.space, self.configure, self.rules = space, configure, tuple(rules)
        # The record only writes down: all its parameters are given (`enqueue_trial`).
        self.record = optuna.create_study(
            study_name=name, direction=direction, sampler=optuna.samplers.RandomSampler()
        )
        self.guessers = [
            optuna.create_study(direction=direction, sampler=sampler(index))
            for index in range(max(1, len(self.rules)))
        ]
        self.asked: dict[str, _Asked] = {}

    def suggest(self, trial_id: str) -> dict:
        """A new configuration; the same one again when asked again for the same trial."""
        if trial_id not in self.asked:
            self.asked[trial_id] = self._ask(number=len(self.asked))
        return dict(self.asked[trial_id].config)

    def _ask(self, number: int) -> _Asked:
        guesser = self._guesser(number)
        if self.rules:
            guesser.enqueue_trial({RULE: self.rules[number % len(self.rules)]})
        guess = guesser.ask()
        self.space(guess)
        self.record.enqueue_trial(guess.params)
        entry = self.record.ask()
        return _Asked(guess, entry, self.configure(entry.number, self.space(entry)))

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        asked, epoch = self.asked[trial_id], result[TRAINING_ITERATION]
        recorded = self.record.get_trials(deepcopy=False)[asked.entry.number]
        if epoch not in recorded.intermediate_values:
            asked.guess.report(result[trials.SCORE], epoch)
            asked.entry.report(result[trials.SCORE], epoch)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        guess, entry, config = self.asked[trial_id]
        if result:
            # Ray withholds the last result, at which a trial stops, from `on_trial_result`.
            self.on_trial_result(trial_id, result)
        epochs = result[TRAINING_ITERATION] if result else 0
        state = trials.state("ERROR" if error else "TERMINATED", epochs, config["epochs"])
        value = result[trials.SCORE] if result and state == trials.COMPLETE else None
        for study, trial in ((self._guesser(entry.number), guess), (self.record, entry)):
            study.tell(trial, value, state=STATES[state])

    def _guesser(self, number: int) -> optuna.Study:
        return self.guessers[number % len(self.guessers)]

    def save(self, checkpoint_path: str) -> None:
        state = (self.record, self.guessers, self.asked)
        with open(checkpoint_path, "wb") as file:
            pickle.dump(state, file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.record, self.guessers, self.asked = pickle.load(file)
