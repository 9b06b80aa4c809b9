"""The journal: nothing twice, nothing half, nothing lost by a kill or on a full disk."""

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

import pytest
from hypothesis import given, strategies as st

from disinhib.errors import ConfigError
from disinhib.tuning import event_log as journals
from disinhib.tuning.event_log import (
    ASKED,
    COMPLETE,
    ENDED,
    EPOCH,
    FAILED,
    PRUNED,
    WAITING,
    Event,
    Journal,
)

ROOT = Path(__file__).parent.parent


def config(number, rule="bp", epochs=3):
    return {"number": number, "rule": rule, "epochs": epochs}


def asked(number, **about):
    return (number, ASKED, 0, {"config": config(number, **about), "point": {}})


def epoch(number, at, score=0.5):
    return (number, EPOCH, at, {"score": score, "metrics": {}})


def ended(number, state=COMPLETE, reason=None):
    return (number, ENDED, 0, {"state": state, "reason": reason})


@pytest.fixture
def journal(tmp_path):
    with closing(Journal(tmp_path)) as opened:
        yield opened


def keys(events):
    return [(event.trial, event.kind, event.epoch) for event in events]


def test_events_come_back_as_they_were_appended(journal, tmp_path):
    written = [asked(0), epoch(0, 1, 1 / 3), epoch(0, 2, -1e-300), ended(0, FAILED, "π ≠ 3")]
    returned = journal.append(written)
    assert [(e.trial, e.kind, e.epoch, e.body) for e in returned] == written
    assert journal.events() == returned
    journal.close()
    with closing(Journal(tmp_path)) as again:
        assert again.events() == returned and again.last() == returned[-1].id


def test_what_is_heard_twice_happened_once(journal):
    first = journal.append([asked(0), epoch(0, 1, 0.25)])
    news = journal.append([epoch(0, 1, 0.75), epoch(0, 2), asked(0), epoch(0, 2, 0.75)])
    assert keys(news) == [(0, EPOCH, 2)]
    assert journal.events() == [*first, *news]
    assert [e.body["score"] for e in journal.events() if e.kind == EPOCH] == [0.25, 0.5]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([EPOCH, ENDED]), st.integers(0, 3))))
def test_only_news_gets_an_id_and_ids_have_no_gaps(told):
    with closing(_in_memory()) as journal:
        news = [event for key in told for event in journal.append([(*key, {})])]
        assert keys(news) == list(dict.fromkeys(told))
        assert [event.id for event in news] == list(range(1, len(news) + 1))
        assert journal.last() == len(news)


def _in_memory() -> Journal:
    class Memory:
        def __truediv__(self, name):
            return ":memory:"

    return Journal(Memory())  # pyright: ignore[reportArgumentType]


def test_events_are_read_on_from_one_and_so_many_at_a_time(journal):
    journal.append([epoch(0, n) for n in range(1, 8)])
    assert [e.epoch for e in journal.events(after=2, limit=3)] == [3, 4, 5]
    assert [e.epoch for e in journal.events(after=5)] == [6, 7]
    assert journal.events(after=journal.last()) == []


def test_an_empty_journal_has_nothing(journal):
    assert journal.events() == [] and journal.last() == 0 and journal.delivered("x") == 0


def test_each_store_has_a_cursor_that_stays(journal, tmp_path):
    journal.deliver("one", 3)
    journal.deliver("one", 5)
    journal.deliver("other", 1)
    journal.close()
    with closing(Journal(tmp_path)) as again:
        assert [again.delivered(name) for name in ("one", "other", "none")] == [5, 1, 0]


# One at a time.

OPEN = """
import sys
from pathlib import Path
from disinhib.errors import ConfigError
from disinhib.tuning.event_log import Journal
try:
    Journal(Path(sys.argv[1]))
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
    first = Journal(tmp_path)
    if written:
        first.append([asked(0)])
    else:
        first.close()
        first = Journal(tmp_path)
    refusal = f"study: {tmp_path} is open in another process"
    if written:
        assert script(OPEN, tmp_path).stderr.strip() == f"refused: {refusal}"
    with pytest.raises(ConfigError) as refused:
        Journal(tmp_path)
    assert str(refused.value) == refusal
    first.append([asked(1)])  # the first one does not notice
    first.close()
    Journal(tmp_path).close()


# Kills.

WRITE = """
import itertools, sys
from pathlib import Path
from disinhib.tuning.event_log import Journal
journal = Journal(Path(sys.argv[1]))
for number in itertools.count(1):
    # Two at a time, and long enough to cross pages.
    body = {"score": number / 3, "metrics": {str(n): number for n in range(200)}}
    pair = [(0, "epoch", 2 * number, body), (0, "epoch", 2 * number + 1, body)]
    for event in journal.append(pair):
        print(event.id, flush=True)
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
    with closing(Journal(tmp_path)) as journal:
        events = journal.events()
        assert [e.id for e in events] == list(range(1, len(events) + 1))
        assert len(events) >= len(printed) and len(events) % 2 == 0  # no half of a pair
        assert all(later.epoch == earlier.epoch + 1 for earlier, later in pairwise(events))
        assert {e.body["score"] for e in events} == {e.epoch // 2 / 3 for e in events}
        assert len(journal.append([ended(0)])) == 1
    assert _intact(tmp_path)


def _intact(folder):
    with closing(sqlite3.connect(folder / journals.FILE)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# A full disk.


def test_a_full_journal_takes_all_of_a_call_or_nothing(journal, tmp_path):
    journal.append([asked(0), epoch(0, 1)])
    before = journal.events()
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = {"score": 0.5, "metrics": {"x": "x" * 100_000}}
    with pytest.raises(OSError, match="no space left") as full:
        journal.append([epoch(0, 2), (0, EPOCH, 3, large)])
    assert full.value.errno == errno.ENOSPC
    assert journal.events() == before
    journal.deliver("store", 2)  # what needs no room is still possible
    journal._connection.execute("PRAGMA max_page_count = 10000")
    news = journal.append([epoch(0, 2), (0, EPOCH, 3, large)])
    assert keys(news) == [(0, EPOCH, 2), (0, EPOCH, 3)]
    journal.close()
    with closing(Journal(tmp_path)) as again:
        assert again.events() == [*before, *news] and again.delivered("store") == 2
    assert _intact(tmp_path)


FULL = """
import json, resource, sys
from pathlib import Path
from disinhib.tuning.event_log import FILE, Journal
folder = Path(sys.argv[1])
journal = Journal(folder)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
limit = (folder / FILE).stat().st_size + 50_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
body, kept, error = {"score": 0.5, "metrics": "x" * 3000}, [], None
for number in range(1, 100):
    try:
        kept += journal.append([(0, "epoch", 2 * number, body), (0, "epoch", 2 * number + 1, body)])
    except OSError as error:
        code = error.errno
        break
there = journal.events() == kept
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
kept += journal.append([(1, "epoch", 1, body)])
there = there and journal.events() == kept
print(json.dumps([code, there, [list(event) for event in kept]]))
"""


def test_a_file_that_cannot_grow_loses_nothing(tmp_path):
    """As a disk that is full for a while, with the operating system's own refusal."""
    done = script(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    code, there, kept = json.loads(done.stdout)
    assert code == errno.ENOSPC and there
    assert 3 <= len(kept) < 100
    with closing(Journal(tmp_path)) as again:
        assert [list(event) for event in again.events()] == kept
    assert _intact(tmp_path)


@pytest.mark.parametrize("raised", [TypeError, KeyboardInterrupt])
def test_a_call_that_breaks_off_writes_nothing_and_the_next_one_works(journal, raised):
    def events():
        yield asked(0)
        raise raised

    with pytest.raises(raised):
        journal.append(events())
    assert journal.events() == []  # the stores' threads read at any time
    assert keys(journal.append([asked(1)])) == [(1, ASKED, 0)]


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
    return [Event(n, 0.0, *event) for n, event in enumerate(events, start=1)], outcomes


@given(studies())
def test_records_are_what_the_events_say(study):
    events, outcomes = study
    found = journals.records(events)
    assert {n: (r.scores, r.state, r.reason) for n, r in found.items()} == outcomes
    for number, record in found.items():
        scores, state, _ = outcomes[number]
        assert (record.number, record.rule, record.budget) == (number, "bp", 3)
        assert record.epochs == len(scores)
        assert record.score == (scores[-1] if scores else None)
        assert record.ended == (state != WAITING)


@given(studies(), st.data())
def test_records_can_be_followed_on_from_any_event(study, data):
    events, _ = study
    at = data.draw(st.integers(0, len(events)))
    found = journals.records(events[:at])
    for event in events[at:]:
        journals.follow(found, event)
    assert found == journals.records(events)


def test_the_journal_needs_no_more_than_its_own_file(journal, tmp_path):
    journal.append([asked(0)])
    journal.close()
    assert os.listdir(tmp_path) == [journals.FILE]
