"""A search space as a tree: its paths, its branches, its parameters.

A space is a function of a trial and can only be run (`search_spaces`). Here it runs with a `Path`
in place of the trial, which decides the value of each parameter and records it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from disinhib.checks import is_number, is_whole, refusal
from search_spaces import Space

RULE = "trainer"  # the parameter by which a space of several rules chooses one
SEARCH = "search."  # before an option: `search.optimizer.learning_rate=[1e-4,1e-2]`
ENDS = ("low", "high")  # of a numeric range

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Params = dict[str, Any]


class Path:
    """A path through `space`: its parameters, in the order asked for, and the overrides returned.
    `choose` decides the value of every parameter."""

    number = 0  # an `optuna.Trial` has one

    def __init__(self, space: Space, choose: Callable[[str, Distribution], Any]):
        self._choose = choose
        self.params: Params = {}
        self.distributions: dict[str, Distribution] = {}
        self.overrides = space(self)  # pyright: ignore[reportArgumentType]

    @property
    def choices(self) -> Params:
        kinds = self.distributions
        return {
            n: v for n, v in self.params.items() if isinstance(kinds[n], CategoricalDistribution)
        }

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self._suggest(name, FloatDistribution(low, high, log=log, step=step))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._suggest(name, IntDistribution(low, high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Sequence) -> Any:
        return self._suggest(name, CategoricalDistribution(choices))

    def _suggest(self, name: str, distribution: Distribution) -> Any:
        if name not in self.params:
            self.params[name] = self._choose(name, distribution)
            self.distributions[name] = distribution
        return self.params[name]


class _Narrowed:
    """A trial of which only a part of a space is asked: `space_tree.narrowed`."""

    def __init__(self, trial: Any, fixed: Mapping[str, Any], ranges: Mapping[str, Any]):
        self._trial, self._fixed, self._ranges = trial, fixed, ranges

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_float(self, name: str, low: float, high: float, **kind: Any) -> Any:
        return self._number(self._trial.suggest_float, name, (low, high), kind, is_number)

    def suggest_int(self, name: str, low: int, high: int, **kind: Any) -> Any:
        return self._number(self._trial.suggest_int, name, (low, high), kind, is_whole)

    def suggest_categorical(self, name: str, choices: Sequence) -> Any:
        known = lambda values: all(any(same(value, c) for c in choices) for value in values)
        if option := _named(name, self._fixed):
            value = self._fixed[option]
            if name == RULE and not known([value]):
                raise refusal(option, value, f"one of {', '.join(choices)}")
            return value
        if option := _named(name, self._ranges):
            given = self._ranges[option]
            plain = isinstance(given, list) and not any(isinstance(v, list | dict) for v in given)
            if not plain or not given or (name == RULE and not known(given)):
                several = f"some of {', '.join(choices)}" if name == RULE else "a list of choices"
                raise refusal(SEARCH + option, given, several)
            choices = given
        return self._trial.suggest_categorical(name, choices)

    def _number(
        self,
        suggest: Callable[..., Any],
        name: str,
        range_: Sequence[float],
        kind: dict[str, Any],
        is_one: Callable[[Any], bool],
    ) -> Any:
        if option := _named(name, self._fixed):
            return self._fixed[option]
        if option := _named(name, self._ranges):
            given, least = self._ranges[option], 0 if kind.get("log") else -math.inf
            two = isinstance(given, list) and len(given) == 2 and all(map(is_one, given))
            if not (two and least < given[0] < given[1]):
                whole = "whole " if is_one is is_whole else ""
                above = " above 0" if kind.get("log") else ""
                allowed = f"[LOW,HIGH], two {whole}numbers{above}, LOW below HIGH"
                raise refusal(SEARCH + option, given, allowed)
            range_ = given
        return suggest(name, *range_, **kind)


def _named(parameter: str, options: Mapping[str, Any]) -> str | None:
    """Which of `options` a parameter's name says that it sets."""
    return next((name for name in (parameter, option_of(parameter)) if name in options), None)


def narrowed(space: Space, fixed: Mapping[str, Any], ranges: Mapping[str, Any]) -> Space:
    """`space` with the options in `fixed` at their values, and not searched, and those in `ranges`
    searched within another range, [low, high], or among other choices.

    The result raises ConfigError if a range is none, or if there is no such rule.
    """
    if not fixed and not ranges:
        return space
    return lambda trial: space(_Narrowed(trial, fixed, ranges))  # pyright: ignore


def searched(space: Space) -> set[str]:
    """The options that `space` searches."""
    parameters = {name for branch in branches(space) for name in branch.params}
    return {name for parameter in parameters for name in (parameter, option_of(parameter))}


def ends_of(distribution: Distribution, end: str) -> Sequence:
    """Every choice, or the `end` of a numeric range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return (getattr(distribution, end),)


def path_at(
    space: Space,
    values: Mapping[str, Any],
    end: str = "low",
    names: Callable[[str], Iterable[str]] = lambda parameter: (parameter,),
) -> tuple[Path, bool]:
    """The path with the `values`, and whether these decide it. A parameter's value stands under one
    of its `names`; without one that is allowed, it is its first choice or the `end` of its range.
    """
    missing: list[str] = []

    def choose(parameter: str, kind: Distribution) -> Any:
        for name in names(parameter):
            if name in values and allows(kind, values[name]):
                return converted(kind, values[name])
        missing.append(parameter)
        return ends_of(kind, end)[0]

    return Path(space, choose), not missing


def branches(space: Space) -> Iterator[Path]:
    """Branches of `space` that together make every categorical choice at least once, each with
    its numbers at the low and at the high end of their ranges."""
    todo: list[Params] = [{}]
    seen: set[tuple[str, Any]] = set()
    while todo:
        forced = todo.pop(0)
        low, high = (path_at(space, forced, end)[0] for end in ENDS)
        yield from (low, high)
        prefix: Params = {}
        for name, chosen in high.choices.items():
            for value in ends_of(high.distributions[name], "high"):
                if (name, value) not in seen and value != chosen:
                    todo.append({**prefix, name: value})
                seen.add((name, value))
            prefix[name] = chosen


def rules_of(space: Space) -> list[str]:
    """The rules among which `space` chooses; empty if it has only one."""
    return list(dict.fromkeys(b.choices[RULE] for b in branches(space) if RULE in b.choices))


def paths(space: Space, values: Callable[[str, Distribution], Sequence]) -> Iterator[Path]:
    """Every path through `space` with each parameter at any of its `values`, depth first: the
    parameter asked for last varies fastest. Runs the space once for each path."""
    todo: list[Params] = [{}]
    while todo:
        script = todo.pop()
        path = Path(
            space, lambda name, kind, script=script: script.get(name, values(name, kind)[0])
        )
        yield path
        prefix = dict(script)
        for name, value in path.params.items():
            if name not in script:
                _, *others = values(name, path.distributions[name])
                todo += [{**prefix, name: other} for other in reversed(others)]
                prefix[name] = value


def at_ends(space: Space, fixed: Params) -> Iterator[Path]:
    """Every path through `space` with the values in `fixed`, every other choice, and every other
    number at the low and at the high end of its range."""
    for end in ENDS:
        yield from paths(
            space,
            lambda name, kind, end=end: (fixed[name],) if name in fixed else ends_of(kind, end),
        )


def definition(space: Space) -> dict[str, Any]:
    """A definition of `space` in JSON's types: spaces with equal definitions search the same.

    `parameters` has the range or the choices of each. `branches` has, for every combination of
    choices, the numbers searched there and the options set: null if a number changes it, else its
    value. Runs the space for each end of each combination.
    """
    parameters: dict[str, Any] = {}
    by_choices: dict[str, list[Path]] = {}
    for path in at_ends(space, {}):
        parameters.update({name: described(kind) for name, kind in path.distributions.items()})
        by_choices.setdefault(_canonical(path.choices), []).append(path)
    return {
        "parameters": parameters,
        "branches": [_described_branch(by_choices[choices]) for choices in sorted(by_choices)],
    }


def described(distribution: Distribution) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"kind": "categorical", "choices": list(distribution.choices)}
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    return {"kind": kind, **{name: getattr(distribution, name) for name in (*ENDS, "log", "step")}}


def _described_branch(paths: Sequence[Path]) -> dict[str, Any]:
    """A branch of the definition, from its paths (only one if a number decides a choice)."""
    numbers = sorted({name for path in paths for name in path.params if name not in path.choices})
    overrides: dict[str, Any] = {}
    for path in paths:
        for option, value in path.overrides.items():
            searched = parameters_for(option, numbers) or overrides.get(option, value) != value
            overrides[option] = None if searched else value
    return {"choices": paths[0].choices, "parameters": numbers, "overrides": overrides}


def parameters_for(option: str, parameters: Iterable[str]) -> list[str]:
    """Those of `parameters` whose name says that they set `option`."""
    return [name for name in parameters if option in (name, option_of(name))]


def option_of(parameter: str) -> str:
    """The option in a parameter's name, without the branch in front."""
    return parameter.partition(".")[2] or parameter


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def fingerprint(definition: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(definition).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two definitions: a line for each parameter, and for each option that is
    set to another value; empty only if the two are equal."""
    if _canonical(before) == _canonical(now):
        return []
    old, new = before["parameters"], now["parameters"]
    changed = [
        name
        for name in sorted({*new, *old})
        if _canonical(old.get(name)) != _canonical(new.get(name))
    ]
    lines = [f"{name}: {words(old.get(name))}, now {words(new.get(name))}" for name in changed]
    lines += [
        f"{option}: {was}, now {becomes}{_where(places)}"
        for (option, was, becomes), places in sorted(_changed_settings(before, now).items())
        if not parameters_for(option, changed)
    ]
    return lines or ["parameters are searched under other choices"]


def _changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[tuple[str, str, str], list[Params]]:
    """(option, what it was, what it is now) of the branches that are in both: choices of each."""
    old = {_canonical(branch["choices"]): _settings(branch) for branch in before["branches"]}
    changed: dict[tuple[str, str, str], list[Params]] = {}
    for branch in now["branches"]:
        new = _settings(branch)
        was = old.get(_canonical(branch["choices"]), new)
        for option in {*was, *new}:
            change = (option, was.get(option, "not set"), new.get(option, "not set"))
            if change[1] != change[2]:
                changed.setdefault(change, []).append(branch["choices"])
    return changed


def _settings(branch: Mapping[str, Any]) -> dict[str, str]:
    """How a branch of a definition sets each option, in words."""
    settings = {**dict.fromkeys(map(option_of, branch["parameters"])), **branch["overrides"]}
    return {name: "searched" if v is None else shown(v) for name, v in settings.items()}


def _where(places: Sequence[Params]) -> str:
    """The choices that `places` have in common."""
    shared = [
        f"{name}={shown(value)}"
        for name, value in places[0].items()
        if all(name in place and same(place[name], value) for place in places)
    ]
    return f" (where {', '.join(shared)})" if shared else ""


def words(described: Mapping[str, Any] | None) -> str:
    """The range or the choices of a parameter, in words."""
    if described is None:
        return "not searched"
    if described["kind"] == "categorical":
        return f"one of {', '.join(shown(choice) for choice in described['choices'])}"
    whole, step = described["kind"] == "int", described["step"]
    notes = {"whole": whole, "log": described["log"], f"step {step}": step and step > whole}
    range_ = f"{described['low']} to {described['high']}"
    said = ", ".join(note for note, holds in notes.items() if holds)
    return f"{range_} ({said})" if said else range_


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def allows(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(same(value, choice) for choice in distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return False
    steps = 0 if step is None else (value - low) / step
    return abs(steps - round(steps)) < 1e-8  # the tolerance that Optuna has


def same(one: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def converted(distribution: Distribution, value: Any) -> Any:
    """An allowed value, in the type that Optuna would suggest."""
    if isinstance(distribution, CategoricalDistribution):
        return next(choice for choice in distribution.choices if same(value, choice))
    return int(value) if isinstance(distribution, IntDistribution) else float(value)
