"""A case of the table, and how it is run and judged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.hostile import place as places, servers
from benchmarks.hostile.place import Ended, Expected, Place, Strike
from benchmarks.hostile.reference import COMMANDS, Reference, python

WORKS = Expected((0,))
PASSWORD = "Gr3ta-Hx9q"
PLACE = "PLACE"  # stands for the case's folder
GO_ON = r"^resume: +(.+)$"  # the line with the command that resumes
UI = r"^all trials: +(.+)$"
BEST = r"^best trial: +(.+)$"


def says(pattern: str) -> Expected:
    """It works, and says so."""
    return Expected((0,), text=pattern)


def refused(pattern: str = "") -> Expected:
    return Expected((2,), pattern)


def in_path(path: str) -> Expected:
    """MLflow can have no SQLite file whose path has these characters: then it may be refused."""
    return WORKS | refused("no %, . or #") if {*"%?#"} & {*path} else WORKS


def stops(pattern: str = "") -> Expected:
    """It cannot continue, as a study on a full disk."""
    return Expected((1,), pattern)


class Scene(NamedTuple):
    """A case that is being run."""

    place: Place
    reference: Reference
    patience: float
    env: Mapping[str, str | None]

    def run(self, command: str, expected: Expected = WORKS, cwd: Path | None = None) -> Ended:
        return places.run(self.place, command, expected, self.patience, self.env, cwd)


Then = Callable[[Scene, Ended], list[str]]  # what is wrong with what a command left or printed


class Case(NamedTuple):
    """A command in a hostile environment, and what it may end in.

    PLACE in options, variables and `shell` is the case's folder, PORT_NAME a server's port.
    """

    name: str
    command: str = "tune"  # of COMMANDS: if it succeeds, its numbers are those of the reference
    expected: Expected = WORKS
    options: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None  # instead of the command's own; then numbers do not count
    env: Mapping[str, str | None] = {}
    shell: str = "exec {}"  # how sh runs it
    prepare: Callable[[Place], Any] | None = None
    out: str = "out"  # out_dir, from the current folder
    current: str = "cwd"  # name of the current folder
    strike: Strike | None = None
    then: Then | None = None
    needs: str | None = None  # a study, beside the command's own need
    fresh: bool = False  # out/mlflow.db is not there yet
    moved: bool = False  # the study was made elsewhere
    leaves: tuple[str, ...] = ()  # what it may leave, from the place
    secret: bool = False  # PASSWORD is in it, and may be nowhere else


def perform(
    case: Case, root: Path, reference: Reference, ports: Mapping[str, int], patience: float
) -> list[str]:
    """Runs a case in the folder `root`, and says what is wrong with how it ended."""
    entry = COMMANDS[case.command]
    own = {**ports, servers.FREE: servers.unused_port()}
    filled = lambda text: re.sub(
        r"PORT_(\w+?)\b", lambda match: str(own[match[1]]), text.replace(PLACE, str(root))
    )
    place = places.make(root, case.current)
    try:
        needs = case.needs or entry.needs
        if needs is not None:
            reference.copy(needs, place, case.moved)
        elif not case.fresh and case.command in ("tune", "pipeline"):
            reference.new_store(place.cwd / case.out)
        if case.prepare is not None:
            case.prepare(place)
        before = places.snapshot(place)
        env = {name: value and filled(value) for name, value in case.env.items()}
        scene = Scene(place, reference, patience, env)
        words = (*(entry.words if case.words is None else case.words), *map(filled, case.options))
        command = python(*reference.words(words))
        shell = filled(case.shell).replace("{}", command)
        ended = places.run(place, shell, case.expected, patience, env, strike=case.strike)
        wrong = ended.wrong
        if not wrong and ended.code == 0 and case.words is None and case.strike is None:
            wrong = wrong + differences(scene, case, ended)
        if not wrong and case.then is not None:
            wrong = wrong + case.then(scene, ended)
        left = (root / filled(path) for path in case.leaves)
        allowed = [Path(os.path.normpath(path)) for path in (place.cwd / case.out, *left)]
        wrong = [*wrong, *places.survivors(place), *places.leftovers(place, before, allowed)]
        return [*wrong, *(secrets(place, ended) if case.secret else [])]
    finally:
        places.remove(root)


def differences(scene: Scene, case: Case, ended: Ended) -> list[str]:
    """Whether a command that has succeeded gives other numbers than in a normal environment."""
    try:
        found = COMMANDS[case.command].numbers(scene.place, case.out, ended)
    except Exception as error:  # whatever is wrong with what it has written
        return [f"no numbers: {type(error).__name__}: {error}"]
    wanted = scene.reference.numbers(case.command)
    found = json.loads(json.dumps(found))
    if found == wanted:
        return []
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
        return [f"other numbers: {n}: {found.get(n)!s:.150}, not {wanted.get(n)!s:.150}"
                for n in names[:2]]  # fmt: skip
    return [f"other numbers: {found!s:.150}, not {wanted!s:.150}"]


def secrets(place: Place, ended: Ended) -> list[str]:
    """Where the password can be read."""
    lines = (ended.out + "\n" + ended.err).splitlines()
    wrong = [f"the password is printed: {line[:150]}" for line in lines if PASSWORD in line]
    files = list(places.readable(place, PASSWORD))
    return [*wrong[:1], *(f"others can read the password in {file}" for file in files[:3])]


def printed(ended: Ended, pattern: str) -> str | None:
    """The command in the line of this pattern."""
    found = re.search(pattern, ended.out + "\n" + ended.err, re.M)
    return found and found[1]


def pasted(pattern: str, command: str = "tune", expected: Expected = WORKS) -> Then:
    """The command in the printed line of this pattern, as it stands, works in the same folder; the
    study then has the numbers of `command`."""

    def then(scene: Scene, ended: Ended) -> list[str]:
        line = printed(ended, pattern)
        if line is None:
            return [f"it prints no line like {pattern!r}: {ended.out[-200:]!r}"]
        again = scene.run(line, expected)
        return [f"pasted, {line[:150]}: {wrong}" for wrong in again.wrong]

    return then
