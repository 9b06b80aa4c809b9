"""What the terminal shows while a study runs and when it has ended.

First the numbers (`tally`, `best`, `forecast`: pure functions of records), then their display.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from disinhib.checks import is_number
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    FAILED,
    PRUNED,
    RUNNING,
    STATES,
    WAITING,
    EpochDone,
    Objective,
    Record,
    TrialConfig,
)

LIVE_SECONDS = 0.5  # between two updates of a terminal
# Between two lines elsewhere: at first, and at last, in a study of a day.
PLAIN_SECONDS, MOST_PLAIN_SECONDS = 10.0, 600.0
RECENT = 50  # trials of a rule that tell how long an epoch takes
PRIOR = 3  # trials by which what early stopping could do outweighs what it has done
BLOCKS = "▁▂▃▄▅▆▇█"
MOST_BLOCKS = 40
TREND = "trend"  # of a rule's best score
OF_REPEATS = "of each repeat"  # the best scores, the lowest and the highest
UNBOUNDED = 1000  # characters: more than a table needs


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
    count = Counter(record.state for record in records)
    return Tally(*(count[state] for state in STATES))


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
    own: dict[str, list[Record]] = {}
    for record in records:
        own.setdefault(record.rule, []).append(record)
    every = [Standing(rule, best(own[rule]), tally(own[rule])) for rule in sorted(own)]
    return sorted(every, key=lambda standing: merit(standing.best), reverse=True)


def merit(record: Record | None) -> float:
    """A trial's score, signed: more is better; minus infinity if it has none."""
    score = None if record is None else record.score
    return -math.inf if score is None else score


def in_words(score: float | None, objective: Objective) -> str:
    """A score as it was measured, without the sign, as a text."""
    return "none" if score is None else f"{objective.sign * score:.2f}"


class Span(NamedTuple):
    """Seconds, at least and at most."""

    low: float
    high: float


# How long a trial's epochs of this session took, in s. The first one may have waited to compile;
# the last one of a retraining includes the check of its dynamics.
Seconds = Mapping[int, Sequence[float]]
# The epochs after which a trial may be stopped early.
Decisions = Callable[[TrialConfig], Sequence[int]]


def forecast(
    records: Sequence[Record],
    trials: int,
    seconds: Seconds,
    at_once: int,
    decisions: Decisions,
    slowness: float = 1.0,
) -> Span | None:
    """How long it takes until `trials` trials have ended, `at_once` at a time; None before the
    first epoch. `slowness` is by how much trials have taken longer than their epochs.

    Trials train as many epochs as those of their rule that have ended, and PRIOR more trials that
    are all stopped at the first decision (low) or never (high). Their first epoch takes as long as
    later ones (low), or as first epochs did so far (high): most of those have compiled. How long
    the check at the end of a retraining takes is unknown until one of its rule has ended.
    """
    if not seconds:
        return None
    first = fmean(own[0] for own in seconds.values())
    costs: list[Span] = []  # of a new trial of each rule
    rest: list[Span] = []  # of the trials that have been asked and have not ended
    for rule in {record.rule for record in records}:
        of_rule = [record for record in records if record.rule == rule]
        config, budget = of_rule[0].config, of_rule[0].budget
        ended = [r for r in of_rule if r.state in (COMPLETE, PRUNED)]
        few, many = (
            (sum(r.epochs for r in ended) + PRIOR * prior) / (len(ended) + PRIOR)
            for prior in (min((*decisions(config), budget)), budget)
        )
        timed = [(r, seconds[r.number]) for r in of_rule[-RECENT:] if r.number in seconds]
        checked = config["final"]  # in its last epoch
        later = [s for r, own in timed for s in own[1 : -1 if checked and r.ended else None]]
        epoch = median(later or [s for own in seconds.values() for s in own[1:]] or [first])
        checks = [seconds[r.number][-1] - epoch for r in ended if r.number in seconds]
        check = Span(0.0, 0.0)
        if checked:
            check = Span(min(checks), max(checks)) if checks else Span(0.0, math.inf)
        costs.append(Span(few * epoch + check.low, first + (many - 1) * epoch + check.high))
        for r in of_rule:
            if not r.ended:
                begin = 0.0 if r.number in seconds else first - epoch
                low, high = (max(0.0, epochs - r.epochs) * epoch for epochs in (few, many))
                rest.append(Span(low + check.low, high + begin + check.high))
    new = max(0, trials - len(records))
    low, high = (
        sum(own[end] for own in rest) + (new * fmean(own[end] for own in costs) if new else 0.0)
        for end in (0, 1)
    )
    return Span(low / at_once, max(low, high * slowness) / at_once)


def clock(seconds: float) -> str:
    """`75.2` as `1 min 15 s`, `7300` as `2 h 01 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def left_in_words(span: Span | None) -> str:
    """The time left, no more precise than it is known."""
    if span is None:
        return "time left: known after the first epoch"
    low = _coarse(span.low)
    if span.high == math.inf:
        return f"at least {clock(low)} left"
    high = _coarse(span.high)
    if high <= 1.5 * low or high < 15:
        return f"about {clock(_coarse((span.low + span.high) / 2))} left"
    return f"{clock(low)} to {clock(high)} left"


def _coarse(seconds: float) -> float:
    """Rounded to 5 s, above two minutes to half a minute, above an hour to five minutes."""
    step = 5 if seconds < 120 else 30 if seconds < 3600 else 300
    return step * max(1, round(seconds / step))


def line(
    records: Sequence[Record], trials: int, elapsed: float, objective: Objective, left: Span | None
) -> str:
    """The study in one line."""
    now = tally(records)
    waiting = sum(record.state == WAITING for record in records)
    scores = [f"{s.rule} {in_words(s.best.score, objective)}" for s in standings(records) if s.best]
    return (
        f"{now.ended}/{trials} trials: {now.complete} complete, {now.pruned} pruned,"
        f" {now.failed} failed, {now.running} running{f', {waiting} waiting' if waiting else ''};"
        f" best {', '.join(scores) or 'not yet'}; {clock(elapsed)}, {left_in_words(left)}"
    )


def best_so_far(records: Sequence[Record]) -> list[float]:
    """The best score of a rule's complete trials (signed: more is better), after each of its trials
    that have ended, in the order of their numbers, from the first complete one on."""
    ended = sorted((record for record in records if record.ended), key=lambda r: r.number)
    scores = (merit(record) if record.state == COMPLETE else -math.inf for record in ended)
    return [score for score in accumulate(scores, max) if score > -math.inf]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks of different heights; of more than `width` values, some, the last one
    among them."""
    if len(values) > width:
        values = [values[(k + 1) * len(values) // width - 1] for k in range(width)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    share = lambda value: (value - low) / (high - low) if high > low else 0.5
    return "".join(BLOCKS[round(share(value) * (len(BLOCKS) - 1))] for value in values)


def leaderboard(records: Sequence[Record], objective: Objective, blocks: int = 0) -> Table:
    """Each rule's best complete trial and how its trials ended, the best rule first; with `blocks`
    also how the best score rose, in so many characters."""
    names, *rows = _leaders(records, objective)
    right = (Column(name, justify="right") for name in names[1:])
    table = Table(names[0], *right, *[TREND] * bool(blocks), box=None, pad_edge=False)
    for row in rows:
        own = [record for record in records if record.rule == row[0]] if blocks else []
        table.add_row(*row, *[sparkline(best_so_far(own), blocks)] * bool(blocks))
    return table


def live_board(records: Sequence[Record], objective: Objective, console: Console) -> RenderableType:
    """The leaderboard as the terminal has room for it: with the rise of the best score, or without,
    or, if it is too narrow, in two lines a rule."""
    table = leaderboard(records, objective)
    needs = console.measure(table, options=console.options.update_width(UNBOUNDED)).maximum
    room = console.width - needs
    blocks = (
        0 if console.options.ascii_only else min(MOST_BLOCKS, room - 2)
    )  # and a space each side
    if room >= 0:
        return table if blocks < len(TREND) else leaderboard(records, objective, blocks)
    lines = []
    for rule, top, now in standings(records):
        score = f"{in_words(top.score, objective)} (trial {top.number})" if top else "none complete"
        head = f"{rule} {score} "
        rise = best_so_far([record for record in records if record.rule == rule])
        blocks = 0 if console.options.ascii_only else max(0, console.width - len(head))
        states = ", ".join(f"{n} {state}" for state, n in now._asdict().items() if n)
        lines += [head + (sparkline(rise, blocks) if blocks else ""), f"  {states}"]
    return Text("\n".join(lines), no_wrap=True, overflow="crop")


def markdown(records: Sequence[Record], objective: Objective) -> str:
    """The leaderboard in Markdown."""
    names, *rows = _leaders(records, objective)
    aligned = ["---", *["---:"] * (len(names) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (names, aligned, *rows))


def _leaders(records: Sequence[Record], objective: Objective) -> list[list[str]]:
    """The leaderboard's rows; the first has the names of its columns."""
    whole = tally(records)._asdict()
    shown = [state for state in STATES if state in ENDED or whole[state]]
    repeated = any(record.repeat > 1 for record in records)
    of_repeats = [OF_REPEATS] if repeated else []
    rows = [["rule", f"best {objective.metric}", "trial", *of_repeats, *shown]]
    for rule, top, now in standings(records):
        first = [in_words(top.score, objective), str(top.number)] if top else ["none complete", ""]
        if repeated:
            first.append(_of_repeats([r for r in records if r.rule == rule], objective))
        rows.append([rule, *first, *(str(now._asdict()[state]) for state in shown)])
    return rows


def _of_repeats(records: Sequence[Record], objective: Objective) -> str:
    """The best scores of a rule's repeats, the lowest and the highest."""
    own = (best(r for r in records if r.repeat == k) for k in {r.repeat for r in records})
    scores = sorted(objective.sign * merit(top) for top in own if top)
    return " to ".join(f"{score:.2f}" for score in dict.fromkeys(scores[:1] + scores[-1:]))


def outline(
    records: Mapping[int, Record], trials: int, objective: Objective, paused: bool = False
) -> dict[str, Any]:
    """How a study of `trials` trials stands, in plain values."""
    known = list(records.values())
    now = tally(known)
    return {
        "trials": trials,
        "asked": len(known),
        "ended": now.ended,
        "failed": now.failed,
        "unfinished": sorted(record.number for record in known if not record.ended),
        "paused": paused,
        "best": {s.rule: in_words(s.best.score, objective) for s in standings(known) if s.best},
    }


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
    PLAIN_SECONDS, and less often later; prints failures as they happen."""

    def __init__(
        self,
        console: Console,
        trials: int,
        objective: Objective,
        decisions: Decisions = lambda trial: (),
    ):
        self.console, self.trials, self.objective = console, trials, objective
        self.decisions = decisions
        self.started = self.shown = time.monotonic()
        self.before = 0  # trials that had ended before this session
        self.seconds: dict[int, list[float]] = {}
        self.heard: dict[int, float] = {}  # when each trial last reported an epoch
        self.began = math.inf  # the first of these epochs
        self.at_once = 1  # the most trials that have run at once
        self.moves = console.is_terminal and not console.is_dumb_terminal
        self.live = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Progress:
        if self.moves:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self.live.stop()

    def epoch(self, done: EpochDone, record: Record) -> None:
        """Takes note of the duration of an epoch of the trial `record`."""
        now, last = time.monotonic(), self.heard.get(done.trial)
        seconds = done.metrics.get("epoch_seconds", ())
        took = max((v for v in seconds if math.isfinite(v)), default=0.0)
        if last is not None and record.config["final"] and done.epoch == record.budget:
            took = now - last
        if took:  # else every seed has diverged
            self.seconds.setdefault(done.trial, []).append(took)
            self.heard[done.trial] = now
            self.began = min(self.began, now - took)

    def update(self, records: Collection[Record]) -> None:
        now = time.monotonic()
        elapsed = now - self.started
        pause = min(max(PLAIN_SECONDS, elapsed / 20), MOST_PLAIN_SECONDS)
        if now - self.shown < (LIVE_SECONDS if self.moves else pause):
            return
        self.shown = now
        records = list(records)
        running = sum(record.state == RUNNING for record in records)
        self.at_once = max(self.at_once, running)
        left = self.left(records, now)
        if not self.moves:
            self.say(line(records, self.trials, elapsed, self.objective, left))
            return
        ended = tally(records).ended
        status = f"{ended}/{self.trials} trials, {clock(elapsed)}, {left_in_words(left)}"
        bar = Table.grid()  # a bar alone ends no line
        bar.add_row(ProgressBar(self.trials, ended, width=min(80, self.console.width)))
        board = live_board(records, self.objective, self.console)
        self.live.update(Group(Text(status), bar, board), refresh=True)

    def left(self, records: Sequence[Record], now: float) -> Span | None:
        """The forecast of the moment when an epoch was last heard of, less the time since then."""
        if not self.heard:
            return None
        heard = max(self.heard.values())
        busy = sum(map(sum, self.seconds.values())) / self.at_once
        slowness = max(1.0, (heard - self.began) / busy)
        then = forecast(records, self.trials, self.seconds, self.at_once, self.decisions, slowness)
        return then and Span(*(max(0.0, seconds - (now - heard)) for seconds in then))

    def ended(self, record: Record) -> None:
        if record.state == FAILED:
            self.say(f"trial {record.number} failed: {record.reason}")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)
