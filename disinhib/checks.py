"""What an option may be: checks with their words, and options that are declared once.

An entry of a table (a rule, an activation, an optimizer, a sampler ...) carries its options: those
make the defaults in Hydra, the checks at the border and the scalars of compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from disinhib.errors import ConfigError, nearest

Check = tuple[Callable[[Any], bool], str]  # a test, and the words for what passes it


class Option(NamedTuple):
    """An option of a table's entry."""

    name: str
    default: Any
    check: Check
    words: str  # its meaning and unit
    choices: tuple[str, ...] = ()  # of a name; compiled programs know it by its place among them


def defaults(options: Iterable[Option]) -> dict[str, Any]:
    """The default of each option, by name."""
    return {option.name: option.default for option in options}


def traced(options: Iterable[Option], values: Mapping[str, Any]) -> dict[str, float]:
    """What compiled programs get of each option: numbers, flags as 0 or 1, and the places of names
    among their choices."""
    places = {option.name: option.choices.index for option in options if option.choices}
    return {name: float(places.get(name, float)(value)) for name, value in values.items()}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ANY_NUMBER: Check = (is_number, "a finite number")
POSITIVE: Check = (lambda v: is_number(v) and v > 0, "a number above 0")
NOT_NEGATIVE: Check = (lambda v: is_number(v) and v >= 0, "a number of at least 0")
SHARE: Check = (lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")
UNIT: Check = (lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
DECAY: Check = (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
COUNT: Check = (lambda v: is_whole(v) and v >= 1, "a whole number of at least 1")
INDEX: Check = (lambda v: is_whole(v) and v >= 0, "a whole number of at least 0")
SEED: Check = (
    lambda v: v is None or (is_whole(v) and 0 <= v < 2**31),
    "a whole number from 0 to 2147483647, or null",
)
TEXT: Check = (lambda v: isinstance(v, str) and v != "", "a text")


def or_null(check: Check) -> Check:
    test, allowed = check
    return lambda v: v is None or test(v), f"{allowed}, or null"


OPTIONAL_TEXT: Check = or_null(TEXT)


def one_of(names: Iterable[str]) -> Check:
    names = tuple(names)
    return lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}"


def check(name: str, value: Any, wanted: Check) -> Any:
    """`value`, if it passes. Raises ConfigError: the option, what was given, what is allowed."""
    test, allowed = wanted
    if not test(value):
        names = allowed.removeprefix("one of ").split(", ")
        raise refusal(name, value, allowed + nearest(str(value), names))
    return value


def refusal(option: str, given: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{option}: given {in_hydra(given)}, allowed is {allowed}")


def in_hydra(value: Any) -> str:
    """A plain value as Hydra would read it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names; lists are values."""
    flat = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
