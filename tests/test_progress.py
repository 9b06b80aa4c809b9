# pyright: reportArgumentType=false
"""What a study shows: its numbers, one by one, and their lines."""

import io
from typing import Any

from rich.console import Console

from disinhib.tuning import progress
from disinhib.tuning.event_log import COMPLETE, FAILED, KILLED, PRUNED, RUNNING, Record


def record(number, rule="bp", state=COMPLETE, score=50.0, reason=None, **searched):
    config: Any = {
        "number": number,
        "rule": rule,
        "epochs": 2,
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
    assert progress.in_words(-0.25, "valid_loss") == "0.25"
    assert progress.in_words(75.5, "valid_accuracy") == "75.50"
    assert progress.in_words(None, "valid_loss") == "none"


def test_time_left_is_at_the_pace_of_this_session():
    assert progress.seconds_left([], 10, 5.0) is None
    one = [record(0), record(1, state=RUNNING)]
    assert progress.seconds_left(one, 9, 5.0) == 40.0
    assert progress.seconds_left(one, 60, 5.0) is None  # too few to tell
    three = [record(number) for number in range(3)]
    assert progress.seconds_left(three, 10, 5.0, before=2) == 35.0
    assert progress.seconds_left(three, 10, 5.0, before=3) is None
    assert progress.clock(75.2) == "1 min 15 s"


def test_the_line_of_a_study_counts_states_and_names_each_rules_best():
    records = [
        record(0, score=60.0), record(1, "taylor", score=70.0), record(2, state=PRUNED),
        record(3, state=FAILED), record(4, state=RUNNING),
    ]  # fmt: skip
    assert progress.line(records, 10, 8.0, "valid_accuracy") == (
        "4/10 trials: 2 complete, 1 pruned, 1 failed, 1 running; best taylor 70.00, bp 60.00;"
        " 8 s, 12 s left"
    )


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
    with progress.Progress(Console(file=printed, width=80), 3, "valid_accuracy") as shown:
        shown.update([record(0)])
        assert printed.getvalue() == ""  # too soon
        shown.shown -= progress.PLAIN_SECONDS
        shown.update([record(0)])
        shown.ended(record(1, state=FAILED, reason="E: [red]x[/red]"))
        shown.ended(record(2))
    first, second = printed.getvalue().splitlines()
    assert first.startswith("1/3 trials: 1 complete")
    assert second == "trial 1 failed: E: [red]x[/red]"


def test_progress_is_a_live_table_on_a_terminal():
    printed = io.StringIO()
    console = Console(file=printed, width=80, force_terminal=True)
    with progress.Progress(console, 3, "valid_accuracy") as shown:
        shown.shown -= progress.PLAIN_SECONDS
        shown.update([record(0, score=61.25)])
    assert "best valid_accuracy" in printed.getvalue() and "61.25" in printed.getvalue()
