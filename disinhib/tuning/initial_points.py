"""Initial points of a search space: the published defaults, a grid, the points of a file.

A point is Optuna's `params`: values by full name, `exact-inv.optimizer.learning_rate`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution

from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError, nearest
from disinhib.rules import RULES, reported_name
from disinhib.tuning import space_tree
from disinhib.tuning.space_tree import ENDS, RULE, Distribution, Params, Path, option_of
from search_spaces import Space


def defaults(
    space: Space, configured: Callable[[Mapping[str, str]], Mapping[str, Any]]
) -> list[Params]:
    """The published defaults as points of `space`: one for each rule that it has, in order.

    `configured(overrides)` gives the options, flat and by dotted name, under the groups that a
    branch chooses; it ignores overrides that choose no group. A rule is left out if a default of
    its branch lies outside the searched range, or if there is no such option.
    """
    points = []
    for rule in [{RULE: name} for name in space_tree.rules_of(space)] or [{}]:
        # The groups that a branch chooses are known after tracing it, and its path may depend on
        # the defaults of these groups: so it is traced again until the groups no longer change.
        tried: list[dict[str, str]] = [{}]
        while True:
            values = {**configured(tried[-1]), **rule}
            path, whole = space_tree.path_at(space, values, names=lambda n: (n, option_of(n)))
            groups = _groups(path)
            if groups in tried:
                break
            tried.append(groups)
        if whole and groups == tried[-1]:
            points.append(path.params)
    return points


def _groups(path: Path) -> dict[str, str]:
    """The texts that a path sets, its groups among them, except for those that it searches, whose
    default is the configured one. The rule is a choice without a default."""
    return {
        option: value
        for option, value in path.overrides.items()
        if isinstance(value, str)
        and (option == RULE or not space_tree.parameters_for(option, path.params))
    }


def grid(space: Space, points: int) -> list[Params]:
    """All points of the full grid: every choice, and `points` (at least 1) values of every range,
    from its low to its high end, evenly on its scale; the parameter asked for last varies fastest.

    A range with fewer values gives all of them; a single value is the middle of the range.
    """
    values = lambda _, kind: _grid_values(kind, points)
    return [path.params for path in space_tree.paths(space, values)]


def _grid_values(distribution: Distribution, points: int) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(dict.fromkeys(distribution.choices))
    low, high, log, step = (getattr(distribution, name) for name in (*ENDS, "log", "step"))
    if step is None:
        inner = [_between(low, high, share, log) for share in _shares(points)]
        return list(dict.fromkeys(min(max(value, low), high) for value in inner))
    # In decimals, as Optuna does: 0.1 + 2 * 0.1 is 0.3.
    first, width = Decimal(str(low)), Decimal(str(step))
    last = int((Decimal(str(high)) - first) / width)
    indices: list[int] = []
    for share in _shares(min(points, last + 1)):
        index = round(_between(low, high, share, log) - low) if log else round(share * last)
        # Small whole numbers on a logarithmic scale lie closer than 1: take the next one.
        indices.append(max(index, indices[-1] + 1) if indices else index)
    return [type(low)(first + index * width) for index in indices]


def _shares(points: int) -> list[float]:
    return [0.5] if points == 1 else [i / (points - 1) for i in range(points)]


def _between(low: float, high: float, share: float, log: bool) -> float:
    if log and 0 < share < 1:  # the ends are exact
        return 10 ** _between(math.log10(low), math.log10(high), share, log=False)
    return low * (1 - share) + high * share


def read_points(text: str, space: Space) -> list[Params]:
    """Points from YAML, a list of mappings: names as in Optuna (`exact-inv.trainer.norm_val`) or as
    options (`trainer: exact-inv`, `trainer.norm_val: 1`), all or some of a branch's parameters.

    Raises ConfigError, naming the point, if it is not such a list, or if a parameter is not
    searched, a value is out of range, or `trainer` is missing in a space of several rules.
    """
    try:
        listed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(listed, list):
        raise ConfigError("not a list of points, each a mapping of parameters to values")
    points = []
    for number, values in enumerate(listed, start=1):
        try:
            points.append(read_point(values, space))
        except ConfigError as error:
            # In one line, whatever texts the file has.
            raise ConfigError(f"point {number}: {' '.join(str(error).split())}") from error
    return points


def read_point(values: Any, space: Space) -> Params:
    """A point of such a list. Raises ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"given {values}, allowed is a mapping of parameters to values")
    named = {name: _read_number(value) for name, value in flatten(values).items()}
    rule: Params = {}  # it decides what the other names mean
    if rules := space_tree.rules_of(space):
        kind = CategoricalDistribution(rules)
        if RULE not in named:
            raise ConfigError(
                f"{RULE}: missing, needed is {space_tree.words(space_tree.described(kind))}"
            )
        named[RULE] = _rule_meant(named, space, rules)
        rule[RULE] = _read_value(RULE, named[RULE], kind)
    reached = list(space_tree.at_ends(space, rule))
    kinds = {name: kind for path in reached for name, kind in path.distributions.items()}
    point: Params = {}
    for name, value in named.items():
        meant = [name] if name in kinds else space_tree.parameters_for(name, kinds)
        if len(meant) > 1:
            raise ConfigError(f"{name}: could be {' or '.join(meant)}; give the full name")
        if not meant:
            _check_group(name, value, reached)
        elif meant[0] in point:
            raise ConfigError(f"{meant[0]}: given twice")
        else:
            point[meant[0]] = _read_value(name, value, kinds[meant[0]])
    left = {name for path in space_tree.at_ends(space, point) for name in path.params}
    for name in point:
        if name not in left:
            raise ConfigError(f"{name}: not searched with this point's other choices")
    return point


def _rule_meant(named: Mapping[str, Any], space: Space, rules: Sequence[str]) -> Any:
    """The rule of a point under the name by which it competes. A trial's options are a point too,
    and those of bp-ei have `trainer: bp` with another circuit than bp."""
    for rule in rules:
        groups = _groups(space_tree.path_at(space, {RULE: rule})[0])
        if all(named.get(group) == choice for group, choice in groups.items()):
            return rule
    return named[RULE]


def _read_number(value: Any) -> Any:
    """`value`, or the number that it spells: PyYAML, unlike Hydra, reads 1e-3 as a text."""
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if number else value


def _read_value(name: str, value: Any, distribution: Distribution) -> Any:
    if not space_tree.allows(distribution, value):
        choices = map(space_tree.shown, getattr(distribution, "choices", ()))
        allowed = space_tree.words(space_tree.described(distribution))
        raise refusal(name, value, allowed + nearest(str(value), choices))
    return space_tree.converted(distribution, value)


def _check_group(name: str, value: Any, reached: Sequence[Path]) -> None:
    """Raises ConfigError unless `name` is a group that the branch sets to `value`. (Points may
    repeat groups, so that points of a study of several rules suit a study of one.)"""
    chosen = {path.overrides.get(name) for path in reached}
    if name not in _groups(reached[0]) or len(chosen) > 1:
        known = {known for path in reached for p in path.params for known in (p, option_of(p))}
        raise ConfigError(f"{name}: not searched in this branch{nearest(name, sorted(known))}")
    (group,) = chosen
    trainer, circuit = (reached[0].overrides.get(name) for name in (RULE, "model/vf"))
    if name == RULE and trainer in RULES and value == reported_name(str(trainer), str(circuit)):
        return
    if value != group:
        raise refusal(name, value, f"{group} in this space")
