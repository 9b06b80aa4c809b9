"""Errors for bad input. Their message is one line, which every command prints (disinhib.cli)."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # numbers of an OSError
LONGEST = 600  # characters of an error's message that are shown
# What SQLAlchemy adds to the message of a database.
_NOISE = re.compile(
    r"\[(SQL|parameters): .*?\]\s*$|\(Background on this error at: \S+\)", re.S | re.M
)


class InputError(ValueError):
    """Input that is not allowed; the message is one line that names the input, the value given and
    what is allowed."""


class ConfigError(InputError):
    """An option whose value is not allowed."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" if one of `names` is like `name`, else an empty text."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# The user, and what follows a colon, of an address; a parameter of one.
_USER = re.compile(r"(\w+)://([^/?#\s:]*)(:?)([^/?#\s]*)@")
_SECRET = re.compile(r"([?&][\w-]*(?:password|passwd|token|secret|api_?key)=)[^&\s]+", re.I)


def masked(text: str) -> str:
    """`text` without the passwords and tokens of the addresses in it."""

    def user(match: re.Match[str]) -> str:
        scheme, name, colon, _ = match.groups()
        if not colon and scheme.startswith("http"):
            name = "***"  # a token
        return f"{scheme}://{name}{':***' if colon else ''}@"

    return _SECRET.sub(r"\1***", _USER.sub(user, text))


def printable(text: str) -> str:
    """`text` in one line, whatever a value in it has: line breaks, a terminal's control codes."""
    plain = (c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return "".join(plain)


def one_line(error: BaseException) -> str:
    """A library's error in one line: `OperationalError: no such table: runs`. Whole, because the
    remedy often stands at its end; of a very long one, both ends."""
    text = " ".join(_NOISE.sub("", str(error)).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return masked(f"{type(error).__name__}: {text}".rstrip(": "))


def reason_of(error: BaseException) -> str:
    """An error's kind and first line, whole: `Diverged: kernel_0 has non-finite values ...`."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
