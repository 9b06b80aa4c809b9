"""What the terminal shows while a study runs and when it has ended.

First the numbers (`tally`, `best`, `seconds_left`: pure functions of records), then their display.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from disinhib.checks import is_number
from disinhib.metrics import SELECTION
from disinhib.tuning.event_log import COMPLETE, ENDED, FAILED, STATES, WAITING, Record

PLAIN_SECONDS = 10.0  # between two lines if stdout is not a terminal


class Tally(NamedTuple):
    """The number of trials in each state."""

    complete: int
    pruned: int
    failed: int
    running: int
    killed: int

    @property
    def ended(self) -> int:
        return self.complete + self.pruned + self.failed


def tally(records: Iterable[Record]) -> Tally:
    states = [record.state for record in records]
    return Tally(*(states.count(state) for state in STATES))


class Standing(NamedTuple):
    """A rule's best complete trial, if it has one, and the states of its trials."""

    rule: str
    best: Record | None
    tally: Tally


def best(records: Iterable[Record]) -> Record | None:
    """The best complete trial; of equals, the first. None if no trial is complete."""
    complete = (record for record in records if record.state == COMPLETE)
    return max(complete, key=lambda record: (merit(record), -record.number), default=None)


def standings(records: Sequence[Record]) -> list[Standing]:
    """Rules, the best first; those without a complete trial last."""
    rules = sorted({record.rule for record in records})
    own = {rule: [record for record in records if record.rule == rule] for rule in rules}
    every = [Standing(rule, best(own[rule]), tally(own[rule])) for rule in rules]
    return sorted(every, key=lambda standing: merit(standing.best), reverse=True)


def merit(record: Record | None) -> float:
    """A trial's score, signed: more is better; minus infinity if it has none."""
    return -math.inf if record is None or record.score is None else record.score


def in_words(score: float | None, metric: str) -> str:
    """A score as it was measured, without the sign, as a text."""
    return "none" if score is None else f"{SELECTION[metric].sign * score:.2f}"


def seconds_left(
    records: Sequence[Record], trials: int, elapsed: float, before: int = 0
) -> float | None:
    """Seconds until `trials` have ended, at this session's pace (`before` had ended earlier); None
    until enough have ended to make the start and the compilations negligible."""
    ended = tally(records).ended
    enough = max(1, min(10, (trials - before) // 5))
    return elapsed / (ended - before) * (trials - ended) if ended - before >= enough else None


def clock(seconds: float | None) -> str:
    """`75.2` as `1 min 15 s`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def line(
    records: Sequence[Record], trials: int, elapsed: float, metric: str, before: int = 0
) -> str:
    """The study in one line."""
    now = tally(records)
    waiting = sum(record.state == WAITING for record in records)
    scores = [f"{s.rule} {in_words(s.best.score, metric)}" for s in standings(records) if s.best]
    return (
        f"{now.ended}/{trials} trials: {now.complete} complete, {now.pruned} pruned,"
        f" {now.failed} failed, {now.running} running{f', {waiting} waiting' if waiting else ''};"
        f" best {', '.join(scores) or 'not yet'};"
        f" {clock(elapsed)}, {clock(seconds_left(records, trials, elapsed, before))} left"
    )


def leaderboard(records: Sequence[Record], metric: str) -> Table:
    """Each rule's best complete trial and how its trials ended, the best rule first."""
    names, *rows = _leaders(records, metric)
    right = (Column(name, justify="right") for name in names[1:])
    table = Table(names[0], *right, box=None)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(records: Sequence[Record], metric: str) -> str:
    """The leaderboard in Markdown."""
    names, *rows = _leaders(records, metric)
    aligned = ["---", *["---:"] * (len(names) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (names, aligned, *rows))


def _leaders(records: Sequence[Record], metric: str) -> list[list[str]]:
    """The leaderboard's rows; the first has the names of its columns."""
    whole = tally(records)._asdict()
    shown = [state for state in STATES if state in ENDED or whole[state]]
    rows = [["rule", f"best {metric}", "trial", *shown]]
    for rule, top, now in standings(records):
        first = (in_words(top.score, metric), str(top.number)) if top else ("none complete", "")
        rows.append([rule, *first, *(str(now._asdict()[state]) for state in shown)])
    return rows


def failures(records: Sequence[Record]) -> list[str]:
    """Why trials failed, and where in the search space: for each rule, the number of failed trials,
    the reasons, and the parameter that best separates them from the rule's other trials."""
    lines = []
    for rule in sorted({record.rule for record in records if record.state == FAILED}):
        own = [record for record in records if record.rule == rule]
        failed = [record for record in own if record.state == FAILED]
        why = Counter(_kind(record.reason or "") for record in failed)
        reasons = ", ".join(f"{count} x {kind}" for kind, count in why.most_common(3))
        others = [record for record in own if record.ended and record.state != FAILED]
        lines.append(
            f"{rule}: {len(failed)} of {len(own)} failed ({reasons}){_where(failed, others)}"
        )
    return lines


def _kind(reason: str) -> str:
    """A reason without its numbers: `Diverged: kernel_0 has non-finite values`."""
    return reason.partition(" is ")[0].partition(" in epoch ")[0]


def _where(failed: Sequence[Record], others: Sequence[Record]) -> str:
    """The parameter by which `failed` differ most from `others`, and its range in both."""
    ranked = []
    for name in failed[0].config["searched"]:
        bad, good = (
            [r.config["searched"][name] for r in side if is_number(r.config["searched"].get(name))]
            for side in (failed, others)
        )
        if bad and good:
            # Share of pairs in which the failed one is larger; 0.5 means no difference.
            larger = sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / len(bad) / len(good)
            ranked.append((abs(larger - 0.5), name, larger > 0.5, bad, good))
    if not ranked:
        return ""
    _, name, high, bad, good = max(ranked)
    end = "high" if high else "low"
    return (
        f", mostly at {end} {name}: {min(bad):.3g} to {max(bad):.3g}"
        f" (the others {min(good):.3g} to {max(good):.3g})"
    )


class Progress:
    """Shows a study of `trials` trials on `console`: a live table on a terminal, else a line every
    PLAIN_SECONDS; prints failures as they happen."""

    def __init__(self, console: Console, trials: int, metric: str):
        self.console, self.trials, self.metric = console, trials, metric
        self.started = self.shown = time.monotonic()
        self.before = 0  # trials that had ended before this session
        self.live = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def update(self, records: Collection[Record]) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.console.is_terminal else PLAIN_SECONDS):
            return
        self.shown = now
        records = list(records)
        status = line(records, self.trials, now - self.started, self.metric, self.before)
        if self.console.is_terminal:
            board = leaderboard(records, self.metric)
            self.live.update(Group(board, Text(status)), refresh=True)
        else:
            self.say(status)

    def ended(self, record: Record) -> None:
        if record.state == FAILED:
            self.say(f"trial {record.number} failed: {record.reason}")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)
