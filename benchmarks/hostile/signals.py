"""Signals at random moments, after which the printed command finishes the study."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.hostile.case import (
    GO_ON,
    WORKS,
    Case,
    Scene,
    differences,
    printed,
)
from benchmarks.hostile.place import Ended, Expected, Place, Strike, wait_for
from benchmarks.hostile.reference import COMMANDS, NEW, count, python

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
SUMMARY = rf"^(study {NEW}: \d+ trials)"
Happened = Callable[[Place, Path], bool]  # whether a moment has come; given a study's folder
# What a moment is counted from, and the seconds that there can be between them.
START, RAY, TRIALS, END = "in the first second", "while Ray starts", "amid trials", "at the end"
MOMENTS: dict[str, tuple[Happened, tuple[float, float]]] = {
    START: (lambda place, study: True, (0.0, 1.0)),
    RAY: (lambda place, study: any(place.tmp.glob("ray/session_*")), (0.0, 3.0)),
    TRIALS: (lambda place, study: count(study, "asked") > 0, (0.0, 4.0)),
    END: (lambda place, study: count(study, "ended") == 2, (0.0, 1.0)),
}


def strike(number: signal.Signals, moment: str, seconds: float, group: bool, out: str) -> Strike:
    happened, _ = MOMENTS[moment]

    def send(process: subprocess.Popen[str], place: Place) -> None:
        wait_for(process, lambda: happened(place, place.cwd / out / NEW))
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, number) if group else process.send_signal(number)

    return send


def goes_on(case: Case) -> Callable[[Scene, Ended], list[str]]:
    """The command that is printed, pasted as it stands, finishes the study; so does the first
    command, where nothing was written yet."""

    def then(scene: Scene, ended: Ended) -> list[str]:
        line, study = printed(ended, GO_ON), scene.place.cwd / case.out / NEW
        if ended.code and count(study, "asked") and printed(ended, SUMMARY) is None:
            return [f"it prints no summary: {(ended.out + ended.err)[-200:]!r}"]
        if ended.code == 0 or (line is None and study.exists()):  # whole, though interrupted
            return differences(scene, case, ended)
        again = scene.run(line or python(*COMMANDS[case.command].words, *case.options))
        if again.wrong:
            return [f"pasted, {line}: {wrong}" for wrong in again.wrong]
        return differences(scene, case, again)

    return then


def _stopped(number: signal.Signals) -> Expected:
    return Expected((0, 128 + number))


def _drawn(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for number in SIGNALS:
        for moment in MOMENTS:
            group = rng.random() < 0.5
            yield _struck(rng, number, moment, group)
    for number, moment, group in (
        (signal.SIGTERM, TRIALS, True),
        (signal.SIGINT, TRIALS, True),
        (signal.SIGHUP, RAY, True),
        (signal.SIGTERM, START, True),
    ):
        yield _struck(rng, number, moment, group)
    for out in ("lr=0.1 (a)", "it's [1]; `id`", "tüb $HOME"):
        yield _struck(rng, signal.SIGTERM, TRIALS, False, out)
    yield _struck(rng, signal.SIGTERM, TRIALS, False, command="pipeline")


def _struck(
    rng: random.Random,
    number: signal.Signals,
    moment: str,
    group: bool,
    out: str = "out",
    command: str = "tune",
) -> Case:
    seconds = rng.uniform(*MOMENTS[moment][1])
    whom = "the group" if group else "the driver"
    where = "" if out == "out" else f", out_dir={out!a}"
    case = Case(
        f"signals: {number.name} to {whom} {moment} + {seconds:.2f} s{where}: {command}",
        command,
        _stopped(number),
        options=() if out == "out" else (f"out_dir={out}",),
        out=out,
        strike=strike(number, moment, seconds, group, out),
    )
    return case._replace(then=goes_on(case))


def _at(number: signal.Signals, seconds: float) -> Strike:
    def send(process: subprocess.Popen[str], place: Place) -> None:
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(number)

    return send


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed + 1)
    others = [
        Case(f"signals: {number.name} after {seconds:.2f} s: {command}", command, _stopped(number),
             strike=_at(number, seconds))
        for command, longest in (("train", 8.0), ("selection", 6.0), ("report", 8.0),
                                 ("replay", 8.0), ("retrain", 15.0))
        for number, seconds in ((rng.choice(SIGNALS), rng.uniform(0.0, longest)),)
    ]  # fmt: skip
    ignored = Case(
        "signals: SIGHUP to a study under nohup: tune", shell="exec nohup {}",
        strike=_at(signal.SIGHUP, 6.0), expected=WORKS,
        then=lambda scene, ended: differences(scene, Case("", "tune"), ended),
    )  # fmt: skip
    twice = _struck(rng, signal.SIGTERM, TRIALS, True)
    twice = twice._replace(name=f"signals: three times {twice.name.partition(': ')[2]}",
                           strike=_three_times(twice.strike))  # fmt: skip
    return [*_drawn(seed), *others, ignored, twice]


def _three_times(send: Strike | None) -> Strike:
    def again(process: subprocess.Popen[str], place: Place) -> None:
        assert send is not None
        send(process, place)
        for _ in range(2):
            time.sleep(0.3)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)

    return again
