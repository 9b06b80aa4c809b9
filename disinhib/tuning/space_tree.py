"""A search space as a tree: its paths, its branches, its parameters.

A space is a function of a trial and can only be run (`search_spaces`). Here it runs with a tracer
in place of the trial, which decides the value of each parameter and records it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces import Overrides, Space

RULE = "trainer"  # the parameter by which a space of several rules chooses one
ENDS = ("low", "high")  # of a numeric range

Distribution = FloatDistribution | IntDistribution | CategoricalDistribution
Params = dict[str, Any]


class Branch(NamedTuple):
    """A branch of a space: its choices, and the overrides that the space returns there."""

    choices: Params
    overrides: Overrides


class _Tracer:
    """In place of an `optuna.Trial`: `choose` decides the value of every parameter."""

    def __init__(self, choose: Callable[[str, Distribution], Any]):
        self.choose, self.number = choose, 0
        self.params: Params = {}
        self.distributions: dict[str, Distribution] = {}

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
            self.params[name] = self.choose(name, distribution)
            self.distributions[name] = distribution
        return self.params[name]


class Path(NamedTuple):
    """A path through a space: parameters in the order asked for, and the overrides returned."""

    params: Params
    distributions: dict[str, Distribution]
    overrides: Overrides

    @property
    def choices(self) -> Params:
        return {name: v for name, v in self.params.items() if _is_choice(self.distributions[name])}


def trace(space: Space, choose: Callable[[str, Distribution], Any]) -> Path:
    tracer = _Tracer(choose)
    overrides = space(tracer)  # pyright: ignore[reportArgumentType]
    return Path(tracer.params, tracer.distributions, overrides)


def _is_choice(distribution: Distribution) -> bool:
    return isinstance(distribution, CategoricalDistribution)


def ends_of(distribution: Distribution, end: str) -> Sequence:
    """Every choice, or the `end` of a numeric range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return (getattr(distribution, end),)


def branches(space: Space) -> Iterator[Branch]:
    """Branches of `space` that together make every categorical choice at least once, each with
    its numbers at the low and at the high end of their ranges."""
    todo: list[Params] = [{}]
    seen: set[tuple[str, Any]] = set()
    while todo:
        forced = todo.pop(0)
        low, high = (_first_path(space, forced, end) for end in ENDS)
        yield Branch(low.choices, low.overrides)
        yield Branch(high.choices, high.overrides)
        prefix: Params = {}
        for name, chosen in high.choices.items():
            for value in ends_of(high.distributions[name], "high"):
                if (name, value) not in seen and value != chosen:
                    todo.append({**prefix, name: value})
                seen.add((name, value))
            prefix[name] = chosen


def _first_path(space: Space, forced: Params, end: str) -> Path:
    return trace(space, lambda name, kind: forced.get(name, ends_of(kind, end)[0]))


def rules_of(space: Space) -> list[str]:
    """The rules among which `space` chooses; empty if it has only one."""
    chosen = [branch.choices[RULE] for branch in branches(space) if RULE in branch.choices]
    return list(dict.fromkeys(chosen))


def paths(space: Space, values: Callable[[str, Distribution], Sequence]) -> Iterator[Path]:
    """Every path through `space` with each parameter at any of its `values`, depth first: the
    parameter asked for last varies fastest. Runs the space once for each path."""
    todo: list[Params] = [{}]
    while todo:
        script = todo.pop()
        path = _scripted(space, script, values)
        yield path
        prefix = dict(script)
        for name, value in path.params.items():
            if name not in script:
                _, *others = values(name, path.distributions[name])
                todo += [{**prefix, name: other} for other in reversed(others)]
                prefix[name] = value


def _scripted(
    space: Space, script: Params, values: Callable[[str, Distribution], Sequence]
) -> Path:
    return trace(
        space, lambda name, kind: script[name] if name in script else values(name, kind)[0]
    )


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
        for name in dict.fromkeys((*new, *old))
        if _canonical(old.get(name)) != _canonical(new.get(name))
    ]
    lines = [
        f"{name}: {words(old.get(name))}, now {words(new.get(name))}" for name in sorted(changed)
    ]
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
    return {
        **{option_of(name): "searched" for name in branch["parameters"]},
        **{
            option: "searched" if value is None else shown(value)
            for option, value in branch["overrides"].items()
        },
    }


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
    notes = [
        *(["whole"] if whole else []),
        *(["log"] if described["log"] else []),
        *([f"step {step}"] if step and (not whole or step > 1) else []),
    ]
    range_ = f"{described['low']} to {described['high']}"
    return f"{range_} ({', '.join(notes)})" if notes else range_


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def allows(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(same(value, choice) for choice in distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return False
    if step is None:
        return True
    steps = (value - low) / step
    return abs(steps - round(steps)) < 1e-8  # the tolerance that Optuna has


def same(one: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
