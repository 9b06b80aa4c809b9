"""What a study shows while it runs and when it is over.

Numbers first (`tally`, `best`, `seconds_left`: pure functions of rows), then their drawing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from disinhib.tuning.trial import COMPLETE, FAILED, KILLED, PRUNED, RUNNING, Row, reason, row

PLAIN_SECONDS = 10.0  # between two lines where stdout is no terminal


STATES = (COMPLETE, PRUNED, FAILED, RUNNING, KILLED)


class Tally(NamedTuple):
    """How many trials are in which state."""

    complete: int
    pruned: int
    failed: int
    running: int
    killed: int

    @property
    def ended(self) -> int:
        return self.complete + self.pruned + self.failed


def tally(rows: Iterable[Row]) -> Tally:
    states = [row.state for row in rows]
    return Tally(*(states.count(state) for state in STATES))


class Standing(NamedTuple):
    """How a rule stands; `best` is its best complete trial, if there is one."""

    rule: str
    best: Row | None
    tally: Tally


def best(rows: Iterable[Row], mode: str) -> Row | None:
    """The best trial; only complete ones compete, and of equals the first wins."""
    complete = sorted((row for row in rows if row.state == COMPLETE), key=lambda row: row.number)
    return max(complete, key=lambda row: _merit(row, mode), default=None)


def standings(rows: Sequence[Row], mode: str) -> list[Standing]:
    """Rules, the best first; those without a complete trial last."""
    rules = sorted({row.rule for row in rows})
    own = {rule: [row for row in rows if row.rule == rule] for rule in rules}
    found = [Standing(rule, best(own[rule], mode), tally(own[rule])) for rule in rules]
    return sorted(found, key=lambda standing: _merit(standing.best, mode), reverse=True)


def _merit(row: Row | None, mode: str) -> float:
    """A score such that more is better, whatever the mode."""
    if row is None or row.score is None:
        return -math.inf
    return {"max": 1, "min": -1}[mode] * row.score


def seconds_left(rows: Sequence[Row], trials: int, elapsed: float) -> float | None:
    """Seconds until `trials` have ended at the pace so far; None before the first has."""
    ended = tally(rows).ended
    return elapsed / ended * (trials - ended) if ended else None


def clock(seconds: float | None) -> str:
    """`75.2` as `1 min 15 s`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def line(rows: Sequence[Row], trials: int, elapsed: float, mode: str) -> str:
    """The study in one line."""
    now = tally(rows)
    scores = [f"{s.rule} {s.best.score:.2f}" for s in standings(rows, mode) if s.best]
    return (
        f"{now.ended}/{trials} trials: {now.complete} complete, {now.pruned} pruned,"
        f" {now.failed} failed, {now.running} running;"
        f" best {', '.join(scores) or 'not yet'};"
        f" {clock(elapsed)}, {clock(seconds_left(rows, trials, elapsed))} left"
    )


def leaderboard(rows: Sequence[Row], metric: str, mode: str) -> Table:
    """Each rule's best complete trial and how its trials ended, the best rule first."""
    whole = tally(rows)._asdict()
    shown = [state for state in STATES if state in (COMPLETE, PRUNED, FAILED) or whole[state]]
    table = Table("rule", f"best {metric}", "trial", *shown, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for rule, top, now in standings(rows, mode):
        score, number = (f"{top.score:.2f}", str(top.number)) if top else ("none complete", "")
        table.add_row(rule, score, number, *(str(now._asdict()[state]) for state in shown))
    return table


class Progress(tune.Callback):
    """Shows a study of `trials` trials on `console`: a live table on a terminal, else a line every
    PLAIN_SECONDS; failures are named as they happen. `rows` are the trials as last seen."""

    def __init__(self, console: Console, trials: int, metric: str, mode: str):
        self.console, self.trials, self.metric, self.mode = console, trials, metric, mode
        self.started = self.shown = time.monotonic()
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.ended: dict[int, Row] = {}

    def __getstate__(self) -> dict:
        # Ray pickles its callbacks along with a study; a terminal is not for keeping.
        return {**self.__dict__, "console": None, "live": None}

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def on_step_end(self, *, trials, **_) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.console.is_terminal else PLAIN_SECONDS):
            return
        self.shown = now
        rows = self._rows(trials)
        status = line(rows, self.trials, now - self.started, self.mode)
        if self.console.is_terminal:
            board = leaderboard(rows, self.metric, self.mode)
            self.live.update(Group(board, Text(status)), refresh=True)
        else:
            self._print(status)

    def on_trial_complete(self, *, trial, **_) -> None:
        self.ended[trial.config["number"]] = row(trial, stopped=True)

    def on_trial_error(self, *, trial, **_) -> None:
        number = trial.config["number"]
        self.ended[number] = row(trial)
        self._print(f"trial {number} failed: {reason(trial)}")

    def on_experiment_end(self, *, trials, **_) -> None:
        # Ray calls what an interruption left running TERMINATED; it ended in no way of its own.
        self.rows = [
            row if row.number in self.ended else row._replace(state=KILLED)
            for row in self._rows(trials)
        ]

    def _rows(self, trials) -> list[Row]:
        return [self.ended.get(trial.config["number"]) or row(trial) for trial in trials]

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)
