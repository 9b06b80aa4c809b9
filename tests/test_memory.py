"""A trial's peak memory is its own, in a worker that has run others."""

import jax
import numpy as np
import pytest

from disinhib import memory

BIG = 200e6  # bytes; what the interpreter itself moves is a few MB


def hold(size: float) -> None:
    held = np.ones(int(size), np.uint8)  # written, so resident
    del held


@pytest.fixture
def unwritable(tmp_path, monkeypatch):
    """No mark can be reset."""
    monkeypatch.setattr(memory, "RESET", tmp_path)  # a folder


def test_what_earlier_work_held_is_not_counted():
    first = memory.start()
    hold(BIG)
    before = memory.peak_mb(first)
    assert before >= BIG / 1e6
    second = memory.start()
    assert memory.peak_mb(second) <= before - 0.8 * BIG / 1e6
    hold(BIG / 2)
    assert memory.peak_mb(second) == pytest.approx(second.in_use / 1e6 + BIG / 2e6, rel=0.05)


def test_the_peak_does_not_fall():
    mark = memory.start()
    hold(BIG)
    before = memory.peak_mb(mark)
    assert memory.peak_mb(mark) == before


def test_where_the_mark_cannot_be_reset_an_old_peak_is_not_reported(unwritable):
    hold(BIG)
    mark = memory.start()
    assert mark.peak >= BIG
    hold(BIG / 2)
    assert memory.peak_mb(mark) == pytest.approx(mark.in_use / 1e6, rel=0.05)
    hold(2 * BIG + mark.peak - mark.in_use)
    assert memory.peak_mb(mark) > (mark.peak + BIG) / 1e6


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ({"peak_bytes_in_use": 900, "bytes_in_use": 300}, 300e-6),
        ({"peak_bytes_in_use": 900, "bytes_in_use": 100}, 200e-6),
        ({"peak_bytes_in_use": 950, "bytes_in_use": 300}, 950e-6),
    ],
    ids=["an earlier trial's peak", "less than at the start", "a peak of its own"],
)
def test_on_a_gpu_only_what_is_known_to_be_the_trials(later, expected, monkeypatch):
    class Gpu:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    gpu = Gpu({"peak_bytes_in_use": 900, "bytes_in_use": 200, "bytes_limit": 20_000_000})
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    mark = memory.start()
    assert memory.device_mb() == 20
    gpu.stats = later
    assert memory.peak_mb(mark) == pytest.approx(expected)


def test_without_proc_it_is_the_processs_peak(tmp_path, monkeypatch, unwritable):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "missing")
    mark = memory.start()
    assert mark.peak == mark.in_use > 1e6
    assert memory.device_mb() is None
    assert memory.peak_mb(mark) >= mark.peak / 1e6
