# pyright: reportArgumentType=false
"""What a study shows: its numbers, one by one, and their lines."""

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from disinhib.tuning import progress
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    KILLED,
    PRUNED,
    RUNNING,
    EpochDone,
    Objective,
    Record,
)

ACCURACY, LOSS = Objective("valid_accuracy", 1), Objective("valid_loss", -1)


def record(number, rule="bp", state=COMPLETE, score=50.0, reason=None, **searched):
    config: Any = {
        "number": number,
        "rule": rule,
        "epochs": 2,
        "final": False,
        "searched": searched,
        "command": "c",
    }
    return Record(config, scores=[score, score], state=state, reason=reason)


def test_only_complete_trials_compete_and_the_first_of_equals_wins():
    records = [
        record(3, score=60.0), record(1, score=60.0), record(2, score=59.0),
        record(4, state=PRUNED, score=90.0), record(5, state=FAILED, score=99.0),
        record(6, state=KILLED, score=99.0), record(7, "taylor", PRUNED, 80.0),
    ]  # fmt: skip
    bp, taylor = progress.standings(records)
    assert bp.best and bp.best.number == 1
    assert taylor.best is None and taylor.tally.pruned == 1
    less_is_better = [
        record(each.number, each.rule, each.state, -each.scores[0]) for each in records
    ]
    lowest = progress.best(less_is_better)
    assert lowest and lowest.number == 2


def test_scores_are_shown_as_they_were_measured():
    assert progress.in_words(-0.25, LOSS) == "0.25"
    assert progress.in_words(75.5, ACCURACY) == "75.50"
    assert progress.in_words(None, LOSS) == "none"


def part(number, epochs, rule="bp", state=RUNNING, final=False, budget=10):
    """A trial of `budget` epochs that has done so many."""
    config: Any = {"number": number, "rule": rule, "epochs": budget, "final": final}
    return Record(config, scores=[50.0] * epochs, state=state)


def test_time_left_is_unknown_before_the_first_epoch():
    assert progress.forecast([part(0, 0)], 4, {}, 1, lambda trial: ()) is None
    assert progress.left_in_words(None) == "time left: known after the first epoch"


def test_time_left_spans_what_early_stopping_and_compiling_may_do():
    """Two trials of four, one of which has had two epochs; all may be stopped after the fifth."""
    records = [part(0, 2), part(1, 0)]
    span = progress.forecast(records, 4, {0: [9.0, 2.0]}, 2, lambda trial: (5,))
    # Low: 3 epochs, and 5 of each other trial. High: 8, then a first one of 9 s and 9 others.
    assert span == pytest.approx(((3 + 5 + 5 + 5) * 2 / 2, (8 * 2 + 3 * (9 + 9 * 2)) / 2))
    never = progress.forecast(records, 4, {0: [2.0, 2.0]}, 2, lambda trial: ())
    assert never == pytest.approx((38.0, 38.0))
    slow = progress.forecast(records, 4, {0: [2.0, 2.0]}, 2, lambda trial: (), slowness=1.5)
    assert slow == pytest.approx((38.0, 57.0))


def test_time_left_is_learnt_from_the_trials_that_have_ended():
    """27 trials have stopped at epoch 5; three more trials would be as the prior has it."""
    ended = [part(n, 5, state=PRUNED) for n in range(27)]
    failed = part(27, 0, state=FAILED)
    seconds = {n: [1.0] * 5 for n in range(27)}
    span = progress.forecast([*ended, failed], 30, seconds, 1, lambda trial: (5,))
    assert span == pytest.approx((2 * 5.0, 2 * (27 * 5 + 3 * 10) / 30))
    assert progress.forecast([*ended, failed], 28, seconds, 1, lambda trial: (5,)) == (0, 0)


def test_rules_have_epochs_of_their_own():
    records = [part(0, 10, state=COMPLETE), part(1, 10, "taylor", COMPLETE)]
    seconds = {0: [1.0] * 10, 1: [3.0] * 10}
    seconds[1] = [3.0, 3.0]  # even if only two have been timed
    span = progress.forecast(records, 4, seconds, 1, lambda trial: ())
    # Two trials, of either rule: first epochs took 2 s on average.
    assert span == pytest.approx((2 * 20.0, 2 * (2 + 9 * 1 + 2 + 9 * 3) / 2))


def test_how_long_the_check_of_a_retraining_takes_is_known_once_one_has_ended():
    first, second = part(0, 9, final=True), part(1, 9, final=True)
    seconds = {0: [1.0] * 9, 1: [1.0] * 9}
    span = progress.forecast([first, second], 2, seconds, 2, lambda trial: ())
    assert span is not None and progress.left_in_words(span) == "at least 5 s left"
    ended = part(0, 10, state=COMPLETE, final=True)
    seconds[0].append(31.0)
    span = progress.forecast([ended, second], 2, seconds, 1, lambda trial: ())
    assert span == pytest.approx((31.0, 31.0))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (24, 269, "25 s to 4 min 30 s left"),
        (30, 45, "about 40 s left"),
        (0, 4, "about 5 s left"),
        (3500, 7300, "58 min 30 s to 2 h 00 min left"),
        (90_000, 90_000, "about 25 h 00 min left"),
    ],
)
def test_time_left_in_words(low, high, words):
    assert progress.left_in_words(progress.Span(low, high)) == words


def test_clock():
    assert [progress.clock(s) for s in (59.6, 75.2, 7300)] == [
        "1 min 00 s",
        "1 min 15 s",
        "2 h 01 min",
    ]


def test_the_line_of_a_study_counts_states_and_names_each_rules_best():
    records = [
        record(0, score=60.0), record(1, "taylor", score=70.0), record(2, state=PRUNED),
        record(3, state=FAILED), record(4, state=RUNNING),
    ]  # fmt: skip
    assert progress.line(records, 10, 8.0, ACCURACY, progress.Span(12, 14)) == (
        "4/10 trials: 2 complete, 1 pruned, 1 failed, 1 running; best taylor 70.00, bp 60.00;"
        " 8 s, about 15 s left"
    )


def test_the_best_so_far_is_of_complete_trials_in_the_order_of_their_numbers():
    records = [
        record(4, score=70.0), record(0, state=PRUNED, score=99.0), record(1, score=60.0),
        record(2, state=FAILED, score=99.0), record(3, score=50.0), record(5, state=RUNNING),
    ]  # fmt: skip
    assert progress.best_so_far(records) == [60, 60, 60, 70]
    assert progress.best_so_far(records[1:2]) == []


def test_sparkline():
    assert progress.sparkline([1, 2, 3, 8], 10) == "▁▂▃█"
    assert progress.sparkline(range(100), 4) == "▁▃▆█"  # of the values 24, 49, 74, 99
    assert progress.sparkline([5.0, 5.0], 10) == "▅▅"
    assert progress.sparkline([], 10) == ""


def test_failures_are_named_by_the_number_that_separates_them():
    rates = {0: 0.1, 1: 0.5, 2: 0.2, 3: 0.9, 4: 2.0}
    why = "Diverged: kernel_0 has non-finite values in epoch"
    records = [
        record(n, state=FAILED if n > 2 else COMPLETE, reason=f"{why} {n}" if n > 2 else None,
               rate=rate, other=1.0, name="x")
        for n, rate in rates.items()
    ]  # fmt: skip
    (line,) = progress.failures([*records, record(5, "taylor", rate=9.0)])
    assert line == (
        "bp: 2 of 5 failed (2 x Diverged: kernel_0 has non-finite values), mostly at high rate:"
        " 0.9 to 2 (the others 0.1 to 0.5)"
    )
    assert progress.failures(records[:3]) == []
    assert progress.failures([record(0, state=FAILED, reason="E: x")]) == [
        "bp: 1 of 1 failed (1 x E: x)"
    ]


def test_progress_prints_lines_where_there_is_no_terminal():
    printed = io.StringIO()
    with progress.Progress(Console(file=printed, width=80), 3, ACCURACY) as shown:
        shown.update([record(0)])
        assert printed.getvalue() == ""  # too soon
        shown.shown -= progress.PLAIN_SECONDS
        shown.update([record(0)])
        shown.ended(record(1, state=FAILED, reason="E: [red]x[/red]"))
        shown.ended(record(2))
    first, second = printed.getvalue().splitlines()
    assert first.startswith("1/3 trials: 1 complete")
    assert second == "trial 1 failed: E: [red]x[/red]"


BOTH = [record(0, score=60.0), record(3, score=61.25), record(1, "exact-inv", PRUNED),
        record(2, state=RUNNING)]  # fmt: skip


@pytest.fixture(autouse=True)
def _colour_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def screen(width, encoding="utf-8"):
    """What a terminal of this width shows of BOTH."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=printed, width=width, force_terminal=True)
    with progress.Progress(console, 9, ACCURACY) as shown:
        shown.shown -= progress.PLAIN_SECONDS
        shown.update(BOTH)
    printed.seek(0)
    return printed.read()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()


def test_a_wide_terminal_shows_a_table_with_the_rise_of_the_best_score():
    status, bar, head, first, second, *_ = plain(screen(200))
    assert status.startswith("3/9 trials, 0 s, time left: known after")
    assert len(bar) == 80
    names = ["rule", "best", "valid_accuracy", "trial", "complete", "pruned", "failed", "running"]
    assert head.split() == [*names, "trend"]
    assert first.split() == ["bp", "61.25", "3", "2", "0", "0", "1", "▁█"]
    assert second.split() == ["exact-inv", "none", "complete", "0", "1", "0", "0"]


def test_a_narrow_terminal_shows_two_lines_a_rule():
    lines = plain(screen(40))
    assert all(len(line) <= 40 for line in lines)
    first = next(n for n, line in enumerate(lines) if line.startswith("bp"))
    assert [line.rstrip() for line in lines[first : first + 4]] == [
        "bp 61.25 (trial 3) ▁█", "  2 complete, 1 running", "exact-inv none complete", "  1 pruned",
    ]  # fmt: skip


def test_colours_blocks_and_movement_are_left_out_where_they_are_not_wanted(monkeypatch):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(screen(80))
    assert "█" in screen(40) and "█" not in screen(40, encoding="ascii")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(screen(80))
    monkeypatch.setenv("TERM", "dumb")
    (line,) = plain(screen(80))
    assert line.startswith("3/9 trials: 2 complete, 1 pruned, 0 failed, 1 running; best bp 61.25;")


def test_lines_become_rarer(monkeypatch):
    """A line after 10 s, then whenever 5 % of what has passed, up to 10 min, has passed since the
    last: 219 in a day."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    printed = io.StringIO()
    with progress.Progress(Console(file=printed, width=80), 3, ACCURACY) as shown:
        for clock[0] in range(0, 86_400, 5):
            shown.update([record(0)])
    assert len(printed.getvalue().splitlines()) == 219


def test_time_left_falls_between_two_epochs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    printed = io.StringIO()
    with progress.Progress(Console(file=printed, width=80), 1, ACCURACY) as shown:
        clock[0] = 20.0
        shown.epoch(EpochDone(0, 1, 50.0, {"epoch_seconds": [20.0]}, {}), part(0, 1))
        shown.update([part(0, 1)])
        clock[0] = 80.0
        shown.update([part(0, 1)])
    first, second = (line.rpartition(", ")[2] for line in printed.getvalue().splitlines())
    assert (first, second) == ("about 3 min 00 s left", "about 2 min 00 s left")


def test_progress_takes_note_of_the_durations_of_epochs():
    shown = progress.Progress(Console(file=io.StringIO()), 3, ACCURACY)
    seconds = {"epoch_seconds": [7.0, math.nan], "compilation_seconds": [5.0]}  # within
    shown.epoch(EpochDone(0, 1, 50.0, seconds, {}), part(0, 1))
    shown.epoch(EpochDone(0, 2, 50.0, {"epoch_seconds": [2.0]}, {}), part(0, 2))
    shown.epoch(EpochDone(1, 1, 50.0, {"epoch_seconds": [math.nan]}, {}), part(1, 1))
    assert shown.seconds == {0: [7.0, 2.0]}
