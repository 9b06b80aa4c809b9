"""The command line of every command here: `name=value`, as Hydra writes it.

Lists are `a,b` or `[a,b]`; true, false and null are values. `--name value` and `--name=value` mean
`name=value`, and `--flag` means `flag=true`. `--help`, `-h` or `help=true` prints the help: the
module's docstring and the table of its options.

A command declares its options once and reads them in its `main`, which `run` calls:

    COMMAND = cli.Command("analysis.runs", __doc__, (Option("out", None, OPTIONAL_TEXT, "..."),))

    def main(arguments: Sequence[str]) -> int:
        options = COMMAND.parse(arguments)

Commands whose options Hydra composes (training, tuning, retraining) use `run` alone, or `split`.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from disinhib import process
from disinhib.checks import FLAG, Check, Option, check, in_hydra, refusal
from disinhib.errors import FULL_DISK, ConfigError, InputError, masked, nearest, one_line, printable

REQUIRED: Any = object()  # the default of an option that must be given


class Help(Exception):
    """Raised instead of running when the user asks for help; the message is the help."""


class Command(NamedTuple):
    """A command's options. `alone` names those that words without `name=` set, in this order."""

    name: str  # as `python -m` takes it
    text: str | None  # the module's docstring
    options: tuple[Option, ...] = ()
    alone: tuple[str, ...] = ()

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The value of every option, by name. Raises ConfigError for an option that is unknown,
        missing or refused by its check, and Help."""
        table = {option.name: option for option in self.options}
        flags = {option.name for option in self.options if option.check is FLAG}
        words, overrides = split(arguments, self.help(), flags)
        if len(words) > len(self.alone):
            allowed = "name=value" + "".join(f" and one {name}" for name in self.alone)
            raise ConfigError(
                f"given {' '.join(words)}, allowed is {allowed} (python -m {self.name} --help)"
            )
        values = {option.name: option.default for option in self.options}
        named = [f"{name}={word}" for name, word in zip(self.alone, words, strict=False)]
        for override in [*named, *overrides]:
            name, _, text = override.partition("=")
            if name not in table:
                names = f"; options of {self.name}: {', '.join(table)}"
                raise ConfigError(f"{name}: unknown option{nearest(name, table) or names}")
            values[name] = read(table[name], text)
        for name, value in values.items():
            if value is REQUIRED:
                raise ConfigError(f"{name}: missing, needed is {table[name].check[1]}")
        return values

    def line(self, values: Mapping[str, Any]) -> str:
        """The command line that gives these options their values; without defaults."""
        given = [
            f"{option.name}={_in_hydra(values[option.name])}"
            for option in self.options
            if values.get(option.name, option.default) != option.default
        ]
        return shlex.join(["python", "-m", self.name, *given])

    def help(self) -> str:
        lines = [(self.text or "").strip(), "", "Options:"]
        for option in self.options:
            default = "" if option.default is REQUIRED else f"={_in_hydra(option.default)}"
            lines.append(f"  {option.name}{default}")
            lines += textwrap.wrap(
                f"{option.words} ({option.check[1]})",
                100,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )
        return "\n".join(lines)


def split(
    arguments: Sequence[str], help: str, flags: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """(words that stand alone, options as `name=value`), in order. Those in `flags` need no value.
    A path from / or . is a word, whatever is in it. Raises Help."""
    words, overrides = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help", "help=true"):
            raise Help(help)
        name = argument.removeprefix("--")
        if name == argument:
            is_option = "=" in argument and argument[0] not in "/."
            (overrides if is_option else words).append(argument)
        elif "=" in name:
            overrides.append(name)
        elif name in flags:
            has_value = bool(rest) and rest[0].lower() in ("true", "false")
            overrides.append(f"{name}={rest.pop(0) if has_value else 'true'}")
        else:
            has_value = bool(rest) and not rest[0].startswith("--")
            overrides.append(f"{name}={rest.pop(0) if has_value else ''}")
    return words, overrides


def read(option: Option, text: str) -> Any:
    """`text` as the first type of value that the option's check allows. Raises ConfigError."""
    if not text:
        raise refusal(option.name, "nothing", option.check[1])
    for reading in _readings(text):
        if option.check[0](reading):
            return reading
    return check(option.name, text, option.check)  # raises: `text` was one of the readings


def _readings(text: str) -> Iterator[Any]:
    """Possible values of `text`, the likeliest first: a study may be named 5, and a list may have a
    single item."""
    items = text.removeprefix("[").removesuffix("]").split(",")
    yield [*map(_value, items)] if len(items) > 1 or text[0] == "[" else _value(text)
    yield text
    yield [*map(_value, items)]
    yield items


def _value(text: str) -> Any:
    plain = {"true": True, "false": False, "null": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def list_of(items: Check) -> Check:
    test, allowed = items
    return (
        lambda values: isinstance(values, list) and bool(values) and all(map(test, values)),
        f"a comma-separated list, each {allowed}",
    )


def _in_hydra(value: Any) -> str:
    return ",".join(map(in_hydra, value)) if isinstance(value, list) else in_hydra(value)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main` with the command line's arguments and exits with its code.

    Exits with 2 and one line on stderr for bad input, 1 and one line if the disk is full, 128 plus
    the signal's number if it was interrupted (130 for Ctrl-C, 143 for SIGTERM), and 0 after help.
    """
    process.open_streams()
    process.end_on_signals()
    try:
        _check_folder()
        for argument in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise InputError(f"{argument!r}: not understood, allowed is text in UTF-8")
        code = main(sys.argv[1:])
        sys.stdout.flush()
        process.check_written()
    except Help as text:
        print(text)
        code = 0
    except InputError as error:
        print(f"error: {printable(masked(str(error)))}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"error: {one_line(error)}: make room", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code, name = process.interrupted()
        print(f"interrupted by {name}", file=sys.stderr)
    sys.exit(code)


def _check_folder() -> None:
    """Raises InputError if the current folder is gone: relative paths would have no meaning."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the current folder is gone: change to one that is there") from error
