"""Closed descriptors, readers that go away, full disks, limits, and two at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.hostile.case import WORKS, Case, Scene, refused, stops
from benchmarks.hostile.place import Ended, Expected, Place
from benchmarks.hostile.reference import NEW, OPTIONS, of_study

EITHER = WORKS | refused()
FULL = stops("[Nn]o space|make room")
ANY = WORKS | stops() | refused()
# (how sh runs a command, the commands, what they may end in)
SHELLS = (
    ("exec {} >&-", "tune selection train runs report", WORKS),
    ("exec {} 2>&-", "tune selection train", WORKS),
    ("exec {} <&-", "tune selection train", WORKS),
    ("exec {} <&- >&- 2>&-", "tune selection train report", WORKS),
    ("{} | true", "tune selection train report", WORKS),
    ("{} 2>&1 | head -n 1", "tune runs", WORKS),
    ("{} 2>&1 | cat", "tune", WORKS),
    ("exec {} > /dev/full", "selection runs train tune", FULL | WORKS),
    ("exec {} 2> /dev/full", "selection train tune", WORKS),
    ("exec {} > /dev/null 2>&1 < /dev/full", "tune", WORKS),
    ("ulimit -n 64; exec {}", "tune train selection", ANY),
    ("ulimit -n 16; exec {}", "selection train", ANY),
    ("ulimit -f 8; exec {}", "tune selection train report", ANY),
    ("ulimit -v 3000000; exec {}", "selection", ANY),
    ("ulimit -s 256; exec {}", "selection", ANY),
    ("ulimit -t 600; exec {}", "selection", WORKS),
    ("umask 777; exec {}", "selection", ANY),
    ("umask 077; exec {}", "tune selection", WORKS),
    ("exec nice -n 19 {}", "tune", WORKS),
    ("exec taskset -c 0 {}", "tune train", WORKS),
    ("exec setsid -w {}", "tune", WORKS),
    ("trap '' TERM HUP; exec {}", "selection", WORKS),
    ("trap '' PIPE; {} | true", "selection", WORKS),
    ("exec timeout 300 {}", "tune", WORKS),
    ("sleep 0 & exec {}", "selection", WORKS),
    ("echo yes | {}", "tune selection", WORKS),
    ("yes | {}", "selection", WORKS),
    ("exec script -q -e -c '{}' /dev/null", "tune selection train", WORKS),
    ("cd .. && cd - > /dev/null && exec {}", "selection", WORKS),
)
# The current folder is gone.
GONE = "mkdir gone && cd gone && rmdir ../gone && exec {}"
# Two studies without a name, started at once.
TWICE = (
    "{} > a 2>&1 & a=$!; {} > b 2>&1 & b=$!; wait $a; a=$?; wait $b; b=$?; cat a b; rm a b;"
    " exit $((a > b ? a : b))"
)
# And two of the same name, one of which is refused.
SAME = TWICE.replace("cat a b;", "grep -h error: a b >&2;")
# As a container's user: no name, no home, few processes.
NOBODY = "exec setpriv --reuid 54321 --regid 54321 --clear-groups {}"


def _two_studies(scene: Scene, ended: Ended) -> list[str]:
    wanted = scene.reference.numbers("tune")
    out = scene.place.cwd / "out"
    studies = sorted(file.parent.name for file in out.glob("*/events.db"))
    if len(studies) != 2:
        return [f"the studies are {studies}"]
    return [f"other numbers in {study}" for study in studies if of_study(out / study) != wanted]


def _has_python() -> bool:
    """Whether another user can run this Python, which may lie in root's home."""
    python = Path(sys.executable).resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (python, *python.parents))


def _open(place: Place) -> None:
    place.root.chmod(0o777)
    for folder in (place.home, place.tmp, place.cwd, *place.cwd.rglob("*")):
        folder.chmod(0o777)


def cases() -> list[Case]:
    unnamed = ("-m", "tune_main", *OPTIONS)
    nobody = [
        Case("descriptors: a user without a name: tune", prepare=_open, shell=NOBODY),
        Case("descriptors: a user without a name: selection", "selection", prepare=_open,
             shell=NOBODY),
        Case("descriptors: a user with few processes: train", "train", ANY, prepare=_open,
             shell="ulimit -u 3; " + NOBODY),
    ]  # fmt: skip
    return [
        *(nobody if os.geteuid() == 0 and _has_python() else []),
        *(
            Case(f"descriptors: {shell.replace('exec ', '').replace('{}', '...')}: {command}",
                 command, expected, shell=shell)
            for shell, commands, expected in SHELLS
            for command in commands.split()
        ),
        Case("descriptors: --help | true", "runs", WORKS, shell="{} | true",
             words=("-m", "tune_main", "--help")),
        Case("descriptors: --help >&-", "runs", WORKS, shell="exec {} >&-",
             words=("-m", "disinhib", "--help")),
        Case("descriptors: --help > /dev/full", "runs", FULL, shell="exec {} > /dev/full",
             words=("-m", "analysis.runs", "--help")),
        Case("descriptors: a refusal 2>&-", "runs", Expected((2,), None), shell="exec {} 2>&-",
             words=("-m", "tune_main", "trials=-1")),
        *(
            Case(f"descriptors: the current folder is gone: {module}", "runs", refused(),
                 shell=GONE, words=("-m", module))
            for module in ("tune_main", "disinhib", "analysis.selection")
        ),
        Case("descriptors: two unnamed studies at once: tune", words=unnamed, shell=TWICE,
             then=_two_studies, leaves=("cwd/a", "cwd/b")),
        Case("descriptors: two studies of one name at once: tune", "tune", refused("study"),
             words=(*unnamed, f"study={NEW}"), shell=SAME, leaves=("cwd/a", "cwd/b")),
    ]  # fmt: skip
