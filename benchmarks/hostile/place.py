"""Where a case runs, how its processes are started, and what is wrong with what they did.

Every case has a folder of its own, with a home, a folder of temporary files and a current folder. A
process is known by a variable in its environment, so that nothing it leaves behind is overlooked.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from disinhib import compilation_cache

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
KEPT = ROOT / ".pytest_cache"  # shared by all cases, as by all tests
MARK = "DISINHIB_HOSTILE_CASE"
ENOUGH = 600.0  # s after which a command is ended in any case
AFTERLIFE = 30.0  # s in which the processes of a command are gone
# What may be left in a case's place, beside its out_dir: caches, locks, and what Ray leaves.
LOCKS = f"tmp/disinhib-programs-{os.getuid()}"  # of compilation_cache.alone
LEFT = ("home/.cache", "home/.ray", "tmp/ray", LOCKS, "cwd/runs.csv")
SHOWN = 300  # characters of an output in a line


class Place(NamedTuple):
    root: Path
    env: Mapping[str, str]
    current: str = "cwd"  # name of the current folder

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def cwd(self) -> Path:
        return self.root / self.current


class Expected(NamedTuple):
    """What a command may end in, and what it has to say then."""

    codes: tuple[int, ...]
    # A pattern that its line "error: ..." has, after code 1 or 2; None: nobody can read it.
    error: str | None = ""
    text: str = ""  # a pattern somewhere in its output, after code 0

    def __or__(self, other: Expected) -> Expected:
        return Expected(self.codes + other.codes, self.error or other.error, self.text)


class Ended(NamedTuple):
    """A command that has ended."""

    code: int  # 128 + number if a signal has ended it
    seconds: float
    out: str
    err: str
    wrong: list[str]


Strike = Callable[[subprocess.Popen[str], Place], None]  # sends a signal at some moment


def make(root: Path, current: str = "cwd") -> Place:
    """A new place, and an environment that has only what every environment has."""
    place = Place(root, {}, current)
    for folder in (place.home, place.tmp, place.cwd):
        folder.mkdir(parents=True)
    env = {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin",  # as after `source .venv/bin/activate`
        "HOME": str(place.home),
        "TMPDIR": str(place.tmp),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT),
        "MPLCONFIGDIR": str(KEPT / "matplotlib"),
        "RAY_worker_niceness": "0",
        compilation_cache.FOLDER_VARIABLE: str(KEPT / "xla" / compilation_cache.processor()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        MARK: root.name,
    }
    return place._replace(env=env)


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Waits until something has happened, or the process has ended, or for long enough."""
    deadline = time.monotonic() + ENOUGH
    while process.poll() is None and not happened() and time.monotonic() < deadline:
        time.sleep(0.02)


def run(
    place: Place,
    command: str,
    expected: Expected,
    patience: float,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    strike: Strike | None = None,
) -> Ended:
    """Runs `command` by sh, without a terminal, and says what is wrong with how it ended.

    A None in `env` takes the variable away.
    """
    merged = {**place.env, **(env or {})}
    variables = {name: value for name, value in merged.items() if value is not None}
    files = [place.root / name for name in ("stdout", "stderr")]
    began = time.monotonic()
    with files[0].open("wb") as out, files[1].open("wb") as err:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],  # whatever PATH is
            **{"cwd": cwd or place.cwd, "env": variables, "stdin": subprocess.DEVNULL},
            **{"stdout": out, "stderr": err, "start_new_session": True, "text": True},
        )
        try:
            if strike is not None:
                strike(process, place)
            hangs = _wait(process, variables[MARK], patience)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    said, errors = (file.read_bytes().decode("utf-8", "replace") for file in files)
    for file in files:
        file.unlink()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if hangs:
        wrong = [f"hangs: ended after {seconds:.0f} s; {_tail(said, errors)}"]
        for left in _processes(variables[MARK]):
            with suppress(psutil.Error):
                left.kill()
    else:
        wrong = _wrong(code, said, errors, expected)
    return Ended(code, seconds, said, errors, [*wrong, *_cores(place.root)])


def _wait(process: subprocess.Popen[str], mark: str, patience: float) -> bool:
    """Waits for `process`, and says whether it hangs: whether it took longer than `patience`.

    Time in which it waits for a core counts only by the share that it got: on a busy machine
    nothing hangs for that.
    """
    before, spent, began = time.monotonic(), 0.0, time.monotonic()
    ran, queued = 0.0, 0.0
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        now = time.monotonic()
        ran_now, queued_now = _demand(process, mark)
        took, got, lacked = now - before, max(0.0, ran_now - ran), max(0.0, queued_now - queued)
        asked = got + lacked
        spent += took * (got / asked if asked > 0.2 * took else 1.0)
        before, ran, queued = now, ran_now, queued_now
        if spent > patience or now - began > ENOUGH:
            return process.poll() is None
    return False


def _demand(process: subprocess.Popen[str], mark: str) -> tuple[float, float]:
    """Seconds for which all threads of a command have run, and waited for a core."""
    ran = queued = 0
    for one in _processes(mark):
        for task in Path(f"/proc/{one.pid}/task").glob("*/schedstat"):
            with suppress(OSError, ValueError):
                own, waited, _ = map(int, task.read_text().split())
                ran, queued = ran + own, queued + waited
    return ran / 1e9, queued / 1e9


def _processes(mark: str) -> list[psutil.Process]:
    """Those of a case."""
    text, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, psutil.Error):
            if text in (folder / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(folder.name)))
    return found


def _wrong(code: int, said: str, errors: str, expected: Expected) -> list[str]:
    """What is wrong with a command that has ended."""
    wrong = []
    if "Traceback" in said + errors:
        wrong.append(f"a traceback: {_last(said if 'Traceback' in said else errors)}")
    if code not in expected.codes:
        allowed = " or ".join(map(str, expected.codes))
        return [*wrong, f"exit code {code}, not {allowed}; {_tail(said, errors)}"]
    lines = [line for line in errors.splitlines() if line.strip()]
    refusals = [line for line in lines if line.startswith("error: ")]
    if code and expected.error is None:
        return wrong
    if code in (1, 2) and (len(refusals) != 1 or lines[-1] != refusals[0]):
        wrong.append(f"code {code} without one line 'error: ...' at the end; {_tail('', errors)}")
    elif code in (1, 2) and not re.search(expected.error or "", refusals[0]):
        wrong.append(f"it should say {expected.error!r}: {refusals[0][:SHOWN]}")
    if code == 2:
        others = [line for line in lines if line not in refusals and not _warns(line)]
        wrong += [f"beside its error: {' | '.join(others)[:SHOWN]}"] if others else []
    if code == 0 and not re.search(expected.text, said + errors):
        wrong.append(f"it should say {expected.text!r}; {_tail(said, errors)}")
    return wrong


def _warns(line: str) -> bool:
    return "warning" in line.lower()


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:SHOWN] if lines else "nothing"


def _tail(said: str, errors: str) -> str:
    lines = [line for line in (*said.splitlines()[-2:], *errors.splitlines()[-3:]) if line.strip()]
    return f"it said: {' | '.join(lines)[-SHOWN:] or 'nothing'}"


def _cores(folder: Path) -> list[str]:
    """Core files in `folder`, which are removed: they are large."""
    found = [Path(top, file) for top, _, files in os.walk(folder) for file in files
             if re.fullmatch(r"core(\.\d+)?", file)]  # fmt: skip
    lines = [f"a core file of {file.stat().st_size / 1e6:.0f} MB" for file in found]
    for file in found:
        file.unlink()
    return lines


def snapshot(place: Place) -> set[Path]:
    """Everything that is in a place now, links not followed."""
    return {
        Path(top, name)
        for top, folders, files in os.walk(place.root)
        for name in (*folders, *files)
    }


def leftovers(place: Place, before: set[Path], allowed: Sequence[Path]) -> list[str]:
    """What has come into a place since `before`, and may not be there."""
    rooms = [*(place.root / name for name in LEFT), *allowed]
    known = {path for room in rooms for path in (room, *room.parents)}
    new = sorted(snapshot(place) - before - known)
    new = [path for path in new if not any(path.is_relative_to(room) for room in rooms)]
    tops = [path for path in new if path.parent not in new]
    return [f"left outside out_dir: {path.relative_to(place.root)!s}" for path in tops[:3]]


def survivors(place: Place) -> list[str]:
    """The processes of a case that outlive it, which are killed."""
    deadline = time.monotonic() + AFTERLIFE
    while (left := _processes(place.env[MARK])) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = [f"still runs: {_title(process)}" for process in left[:3]]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return lines


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:100]
    return f"process {process.pid}"


def readable(place: Place, secret: str) -> Iterator[str]:
    """The files of a place that hold `secret` and that others could read."""
    for top, _, files in os.walk(place.root):
        for file in (Path(top, name) for name in files):
            with suppress(OSError):
                others = file.stat().st_mode & 0o077
                if file.is_file() and others and secret.encode() in file.read_bytes():
                    yield str(file.relative_to(place.root))


def remove(root: Path) -> None:
    for top, folders, _ in os.walk(root):
        for folder in folders:
            with suppress(OSError):
                Path(top, folder).chmod(0o700)
    shutil.rmtree(root, ignore_errors=True)
