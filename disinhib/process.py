"""What a command does about the process that it runs in: signals, and where its words go.

A scheduler's time limit, `docker stop`, a closed terminal and Ctrl-C are one thing: the work ends
where it is, and can be resumed. A reader who goes away (`... | head`, a lost terminal) ends
nothing.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

LATER = 0.05  # s until a signal that came where exceptions are dropped comes again
INTERRUPTED = 128  # the exit code of a command that a signal ends is this plus the signal's number
# Beside SIGINT, which is Ctrl-C.
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a pipe's reader, a terminal, a descriptor

_received: list[signal.Signals] = []
_unwritten: list[OSError] = []


def end_on_signals() -> None:
    """From now on, ENDING signals interrupt the process as Ctrl-C does: KeyboardInterrupt, or what
    the handler of SIGINT makes of it. Only the first counts, as schedulers send several.

    A signal that is ignored stays ignored (nohup). Must be called in the main thread.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _received:
        return
    if _drops_exceptions(frame):
        threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
        return
    _received.append(signal.Signals(number))
    interrupt()


def interrupt() -> None:
    """Interrupts this process as Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Whether Python ignores what is raised in `frame`: in a callback of its garbage collector (jax
    has one), or in a destructor."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def finishing() -> Iterator[None]:
    """Within it, a signal ends nothing: what is left is to write down what there is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, _note)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _note(number: int, frame: FrameType | None) -> None:
    if not _received:
        _received.append(signal.Signals(number))


def interrupted() -> tuple[int, str]:
    """(the exit code, the signal's name) of a command that has been interrupted."""
    number = _received[0] if _received else signal.SIGINT
    return INTERRUPTED + number, number.name


def open_streams() -> None:
    """Makes output that nobody reads harmless: closed descriptors (`>&-`) lead nowhere, and so does
    a stream from the moment its reader has gone. What the encoding lacks is written as `?`."""
    # The lowest free one: otherwise the next file that is opened, say a database, would take its
    # number and get what is written to stdout.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            setattr(sys, name, _Stream(stream))


class _Stream(io.TextIOWrapper):
    """Goes on as if written when its reader has gone."""

    def __init__(self, stream: TextIO):
        names = ("encoding", "line_buffering", "write_through")
        settings = {name: getattr(stream, name) for name in names}
        super().__init__(stream.buffer, errors="replace", **settings)  # pyright: ignore
        self._before = stream  # handlers of loggers may have it; its end would close the buffer

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        with suppress(OSError):
            super().flush()
        if error.errno not in GONE:  # a full disk: somebody wants these words
            _unwritten.append(error)


def check_written() -> None:
    """Raises the OSError for which words were lost, if any: not where they were written, as the
    work is worth more than they are."""
    if _unwritten:
        raise _unwritten.pop()
