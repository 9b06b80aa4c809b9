"""Input that cannot be, and how every command says so: one line on stderr, exit code 2."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """What somebody gave and cannot be; the message is one line: what, given, allowed."""


class ConfigError(InputError):
    """An option that cannot be, in one line."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" if one of `names` is like `name`, else nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """What others raise, in one line: `OperationalError: no such table: runs`."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}".rstrip(": ")


def reason_of(error: BaseException) -> str:
    """An error's kind and first line, whole: `Diverged: kernel_0 has non-finite values ...`."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def run(main: Callable[[list[str]], int | None], help: str | None = None) -> None:
    """Runs `main` on the command line's arguments and exits with its code.

    Bad input is one line on stderr and exit code 2, without a traceback. `help`, if given, is what
    `--help` prints.
    """
    if help is not None and {"-h", "--help"} & {*sys.argv[1:]}:
        print(help.strip())
        sys.exit(0)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
