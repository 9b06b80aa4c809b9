# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The event log: nothing twice, nothing half, nothing lost by a kill or on a full disk."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from disinhib.errors import ConfigError
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    FILE,
    PRUNED,
    WAITING,
    Asked,
    Ended,
    EpochDone,
    EventLog,
    Logged,
    follow,
    over_seeds,
    replay,
)

ROOT = Path(__file__).parent.parent


def config(number, rule="bp", epochs=3, seeds=(1,), final=False) -> Any:
    return {"number": number, "rule": rule, "epochs": epochs, "seeds": [*seeds], "final": final}


def asked(number, **about):
    return Asked(number, config(number, **about))


def epoch(number, at, score=0.5, **more):
    return EpochDone(number, at, score, **{"metrics": {}, "place": {}, **more})


def ended(number, state=COMPLETE, reason=None):
    return Ended(number, state, 0, reason)


@pytest.fixture
def log(tmp_path):
    with closing(EventLog(tmp_path)) as opened:
        yield opened


def keys(events):
    return [(event.trial, event.kind, event.epoch) for event in events]


def events_of(log) -> list[Any]:
    return [logged.event for logged in log.events()]


def test_events_come_back_as_they_were_appended(log, tmp_path):
    about = {"metrics": {"valid_loss": [1 / 7, 2.5]}, "place": {"host": "h"},
             "diverged": {"8": "Diverged"}, "flags": {"7": "unstable"}}  # fmt: skip
    point: Any = {
        "params": {"x": 1},
        "distributions": {"x": "{}"},
        "system_attrs": {"a": [1, None]},
    }
    written = [
        Asked(0, config(0), point, {"dataset": "digits"}, {"provenance.json": "{}\n"}),
        epoch(0, 1, 1 / 3, **about), epoch(0, 2, -1e-300),
        Ended(0, FAILED, 2, "π ≠ 3", [{"seed": 7, "state": FAILED}]),
    ]  # fmt: skip
    assert log.append(written) == written
    logged = log.events()
    assert events_of(log) == written
    assert [one.id for one in logged] == [1, 2, 3, 4]
    assert all(0 <= later.time - earlier.time < 60 for earlier, later in pairwise(logged))
    log.close()
    with closing(EventLog(tmp_path)) as again:
        assert again.events() == logged and again.last() == logged[-1].id


def test_a_number_that_is_none_comes_back_as_such(log):
    """JSON has no NaN; that of a seed that has diverged is written all the same."""
    log.append([epoch(0, 1, float("nan"), metrics={"valid_loss": [float("nan"), 1.0]})])
    (event,) = events_of(log)
    assert event.score != event.score
    assert event.metrics["valid_loss"][0] != event.metrics["valid_loss"][0]
    assert event.metrics["valid_loss"][1] == 1.0


def test_what_is_heard_twice_happened_once(log):
    first = log.append([asked(0), epoch(0, 1, 0.25)])
    new = log.append([epoch(0, 1, 0.75), epoch(0, 2), asked(0), epoch(0, 2, 0.75)])
    assert keys(new) == [(0, EpochDone.kind, 2)]
    assert events_of(log) == [*first, *new]
    assert [e.score for e in events_of(log) if isinstance(e, EpochDone)] == [0.25, 0.5]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([epoch, ended]), st.integers(1, 3))))
def test_only_what_is_new_gets_an_id_and_ids_have_no_gaps(calls):
    with closing(_in_memory()) as log:
        events = [make(n, at) if make is epoch else make(n) for n, make, at in calls]
        new = [event for told in events for event in log.append([told])]
        assert keys(new) == list(dict.fromkeys(keys(events)))
        assert [logged.id for logged in log.events()] == list(range(1, len(new) + 1))
        assert log.last() == len(new)


def _in_memory() -> EventLog:
    class Memory:
        def __truediv__(self, name):
            return ":memory:"

    return EventLog(Memory())  # pyright: ignore[reportArgumentType]


def test_events_are_read_on_from_one_and_so_many_at_a_time(log):
    log.append([epoch(0, n) for n in range(1, 8)])
    assert [e.event.epoch for e in log.events(after=2, limit=3)] == [3, 4, 5]
    assert [e.event.epoch for e in log.events(after=5)] == [6, 7]
    assert log.events(after=log.last()) == []


def test_an_empty_log_has_nothing(log):
    assert log.events() == [] and log.last() == 0 and log.delivered("x") == 0


def test_each_store_has_a_cursor_that_stays(log, tmp_path):
    log.set_delivered("one", 3)
    log.set_delivered("one", 5)
    log.set_delivered("other", 1)
    log.close()
    with closing(EventLog(tmp_path)) as again:
        assert [again.delivered(name) for name in ("one", "other", "none")] == [5, 1, 0]


# One at a time.

OPEN = """
import sys
from pathlib import Path
from typing import Any
from disinhib.errors import ConfigError
from disinhib.tuning.event_log import EventLog
try:
    EventLog(Path(sys.argv[1]))
except ConfigError as error:
    sys.exit(f"refused: {error}")
"""


def script(text, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("written", [True, False], ids=["has been written", "only opened again"])
def test_a_second_opener_is_refused_in_one_line(tmp_path, written):
    first = EventLog(tmp_path)
    if written:
        first.append([asked(0)])
    else:
        first.close()
        first = EventLog(tmp_path)
    refusal = f"study: {tmp_path} is open in another process"
    if written:
        assert script(OPEN, tmp_path).stderr.strip() == f"refused: {refusal}"
    with pytest.raises(ConfigError) as refused:
        EventLog(tmp_path)
    assert str(refused.value) == refusal
    first.append([asked(1)])  # the first one does not notice
    first.close()
    EventLog(tmp_path).close()


# Kills.

WRITE = """
import itertools, sys
from pathlib import Path
from typing import Any
from disinhib.tuning.event_log import EpochDone, EventLog
log = EventLog(Path(sys.argv[1]))
for number in itertools.count(1):
    # Two at a time, and long enough to cross pages.
    metrics = {str(n): [float(number)] for n in range(200)}
    pair = [EpochDone(0, 2 * number + half, number / 3, metrics, {}) for half in (0, 1)]
    for event in log.append(pair):
        print(event.epoch, flush=True)
"""


@pytest.mark.parametrize("after", [1, 61])
def test_what_a_killed_process_had_written_is_there(tmp_path, after):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(after)]
    writer.send_signal(signal.SIGKILL)
    said += writer.stdout.read().splitlines(keepends=True)  # what was in the pipe
    writer.wait()
    printed = [int(line) for line in said if line.endswith("\n")]
    assert len(printed) >= after
    with closing(EventLog(tmp_path)) as log:
        ids, events = [logged.id for logged in log.events()], events_of(log)
        assert ids == list(range(1, len(events) + 1))
        assert len(events) >= len(printed) and len(events) % 2 == 0  # no half of a pair
        assert all(later.epoch == earlier.epoch + 1 for earlier, later in pairwise(events))
        assert {e.score for e in events} == {e.epoch // 2 / 3 for e in events}
        assert len(log.append([ended(0)])) == 1
    assert _intact(tmp_path)


def _intact(folder):
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# A full disk.


def test_a_full_log_takes_all_of_a_call_or_nothing(log, tmp_path):
    log.append([asked(0), epoch(0, 1)])
    before = events_of(log)
    pages = log._connection.execute("PRAGMA page_count").fetchone()[0]
    log._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = epoch(0, 3, place={"x": "x" * 100_000})
    with pytest.raises(OSError, match="no space left") as full:
        log.append([epoch(0, 2), large])
    assert full.value.errno == errno.ENOSPC
    assert events_of(log) == before
    log.set_delivered("store", 2)  # what needs no room is still possible
    log._connection.execute("PRAGMA max_page_count = 10000")
    assert log.append([epoch(0, 2), large]) == [epoch(0, 2), large]
    log.close()
    with closing(EventLog(tmp_path)) as again:
        assert events_of(again) == [*before, epoch(0, 2), large]
        assert again.delivered("store") == 2
    assert _intact(tmp_path)


FULL = """
import json, resource, sys
from pathlib import Path
from typing import Any
from disinhib.tuning.event_log import FILE, EpochDone, EventLog
folder = Path(sys.argv[1])
log = EventLog(folder)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
limit = (folder / FILE).stat().st_size + 50_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
epoch = lambda trial, at: EpochDone(trial, at, 0.5, {}, {"x": "x" * 3000})
taken, code = [], None
for number in range(1, 100):
    try:
        taken += log.append([epoch(0, 2 * number), epoch(0, 2 * number + 1)])
    except OSError as error:
        code = error.errno
        break
there = [logged.event for logged in log.events()] == taken
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
taken += log.append([epoch(1, 1)])
there = there and [logged.event for logged in log.events()] == taken
print(json.dumps([code, there, [[event.trial, event.epoch] for event in taken]]))
"""


def test_a_file_that_cannot_grow_loses_nothing(tmp_path):
    """As a disk that is full for a while, with the operating system's own refusal."""
    done = script(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    code, there, taken = json.loads(done.stdout)
    assert code == errno.ENOSPC and there
    assert 3 <= len(taken) < 100
    with closing(EventLog(tmp_path)) as again:
        assert [[event.trial, event.epoch] for event in events_of(again)] == taken
    assert _intact(tmp_path)


@pytest.mark.parametrize("raised", [TypeError, KeyboardInterrupt])
def test_a_call_that_breaks_off_writes_nothing_and_the_next_one_works(log, raised):
    def events():
        yield asked(0)
        raise raised

    with pytest.raises(raised):
        log.append(events())
    assert log.events() == []  # the stores' threads read at any time
    assert log.append([asked(1)]) == [asked(1)]


# What follows from events.


@st.composite
def studies(draw):
    """Events of a few trials, each in its order and all interleaved; and what came of them."""
    own, outcomes = [], {}
    for number in range(draw(st.integers(0, 4))):
        scores = draw(st.lists(st.floats(-1, 1), max_size=3))
        state = draw(st.sampled_from([COMPLETE, PRUNED, FAILED, WAITING]))
        reason = "Diverged" if state == FAILED else None
        own.append([asked(number), *(epoch(number, n, s) for n, s in enumerate(scores, start=1))])
        if state != WAITING:
            own[-1].append(ended(number, state, reason))
        outcomes[number] = (scores, state, reason)
    events = []
    while any(own):
        events.append(draw(st.sampled_from([some for some in own if some])).pop(0))
    return [Logged(n, 0.0, event) for n, event in enumerate(events, start=1)], outcomes


@given(studies())
def test_records_are_what_the_events_say(study):
    events, outcomes = study
    records = replay(events)
    assert {n: (r.scores, r.state, r.reason) for n, r in records.items()} == outcomes
    for number, record in records.items():
        scores, state, _ = outcomes[number]
        assert (record.number, record.rule, record.budget) == (number, "bp", 3)
        assert record.epochs == len(scores)
        assert record.score == (scores[-1] if scores else None)
        assert record.ended == (state != WAITING)


@given(studies(), st.data())
def test_records_can_be_followed_on_from_any_event(study, data):
    events, _ = study
    at = data.draw(st.integers(0, len(events)))
    records = replay(events[:at])
    for logged in events[at:]:
        follow(records, logged.event)
    assert records == replay(events)


def test_a_record_has_what_became_of_each_seed():
    records = {}
    for event in (
        Asked(0, config(0, seeds=(7, 8, 9), final=True), tags={"dataset": "digits"}),
        epoch(0, 1),
        epoch(0, 2, diverged={"8": "Diverged: kernel_0"}),
        epoch(0, 3, flags={"9": "unstable"}),
    ):
        follow(records, event)
    (record,) = records.values()
    assert record.tags == {"dataset": "digits"}
    assert record.seed_ends(COMPLETE, None) == [
        {"seed": 7, "state": COMPLETE, "epochs": 3, "reason": None, "flag": ""},
        {"seed": 8, "state": FAILED, "epochs": 1, "reason": "Diverged: kernel_0", "flag": ""},
        {"seed": 9, "state": COMPLETE, "epochs": 3, "reason": None, "flag": "unstable"},
    ]


def test_metrics_over_seeds_are_means_and_deviations_of_finite_values():
    nan = float("nan")
    assert over_seeds({"a": [2.0], "b": [1.0, 3.0], "c": [1.0, nan, 3.0], "d": [nan, 5.0]}) == {
        "a": 2.0,
        **{"b": 2.0, "b_sd": 2**0.5},
        **{"c": 2.0, "c_sd": 2**0.5},
        **{"d": 5.0, "d_sd": 0.0},
    }
    assert all(value != value for value in over_seeds({"x": [nan, nan]}).values())


def test_the_log_needs_no_more_than_its_own_file(log, tmp_path):
    log.append([asked(0)])
    log.close()
    assert os.listdir(tmp_path) == [FILE]
