"""The progress bar of a single training run, within and between epochs."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from disinhib import __main__ as program


@pytest.mark.parametrize(
    ("past", "elapsed", "after", "share", "words"),
    [
        ([], 12.4, 3, 0.0, "12 s in the first epoch"),
        ([50.0], 10.0, 1, 0.2, "10/50 s, 0:01:30 left"),  # all that is known
        ([50.0, 10.0, 12.0, 11.0], 5.5, 2, 0.5, "6/11 s, 0:00:28 left"),  # the first compiled
        ([10.0, 10.0], 60.0, 0, 0.99, "60/10 s, 0:00:00 left"),  # late
    ],
)
def test_an_epoch_is_timed_by_those_before(past, elapsed, after, share, words):
    assert program.epoch_share(past, elapsed) == share
    assert program.epoch_clock(past, elapsed, after) == words


@pytest.mark.parametrize("width", [40, 200])
def test_the_bar_fits_the_terminal_and_moves_within_an_epoch(width, monkeypatch):
    monkeypatch.setattr(program.time, "monotonic", lambda: 105.0)
    printed = io.StringIO()
    console = Console(file=printed, width=width, force_terminal=True, color_system=None)
    columns = TextColumn("epoch 3/4"), program.EpochBar(), program.EpochClock()
    with Progress(*columns, console=console, expand=True, auto_refresh=False) as progress:
        fields = {"epoch": 3, "past": [50.0, 10.0], "began": 100.0}
        bar = progress.add_task("", total=4, completed=2, **fields)
        progress.refresh()
        assert program.EpochBar().render(progress.tasks[0]).completed == 2.5
        progress.update(bar, completed=4)
        assert program.EpochBar().render(progress.tasks[0]).completed == 4
    shown = printed.getvalue()
    assert "epoch 3/4 ━" in shown and " 5/10 s, 0:00:15 left" in shown
