# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""Everything arrives in every store, in order, nothing twice in effect, whatever a store does."""

import json
import tempfile
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings, strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from disinhib.errors import ConfigError
from disinhib.tuning import optuna_store, outbox
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    Asked,
    Ended,
    EpochDone,
    EventLog,
    Objective,
    replay,
)
from disinhib.tuning.optuna_store import OptunaStore
from disinhib.tuning.outbox import Outbox

ACCURACY, LOSS = Objective("valid_accuracy", 1), Objective("valid_loss", -1)
pytestmark = pytest.mark.usefixtures("copied_stores")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(outbox, "PAUSE", 0.002)
    monkeypatch.setattr(outbox, "RETRY", (0.001, 0.01))


@pytest.fixture
def impatient(monkeypatch):
    """So that nobody waits for a store that stays down."""
    monkeypatch.setattr(outbox, "PATIENCE", 0.3)


@contextmanager
def open_log(folder):
    with closing(EventLog(folder)) as opened:
        # What is tested are stores, and no machine that loses power.
        opened._connection.execute("PRAGMA synchronous = OFF")
        yield opened


@pytest.fixture
def log(tmp_path):
    with open_log(tmp_path) as opened:
        yield opened


def asked(number, rule="bp"):
    config = {"number": number, "rule": rule, "epochs": 3, "command": f"do {number}", "seeds": [1]}
    distributions = {"x": distribution_to_json(FloatDistribution(0.0, 1.0))}
    point = {"params": {"x": number / 10}, "distributions": distributions, "system_attrs": {}}
    return Asked(number, config, point)  # pyright: ignore[reportArgumentType]


def epoch(number, at, score=0.5):
    return EpochDone(number, at, score, {}, {})


def whole(number, state=COMPLETE, reason=None):
    """All events of a trial."""
    epochs = {COMPLETE: 3, PRUNED: 2, FAILED: 1}[state]
    reported = [epoch(number, n, number + n / 10) for n in range(1, epochs + 1)]
    return [asked(number), *reported, Ended(number, state, epochs, reason)]


def silent(line):
    """Says nothing."""


class Down(Exception):
    pass


class Fake:
    """A store in memory; `faults` says before each call how many events it takes of it before it
    fails, None if it does not."""

    name, address, option = "fake", "here", "fake.address"

    def __init__(self, faults=(), there=()):
        self.faults, self.there = iter(faults), set(there)
        self.taken, self.calls, self.closed = [], 0, []
        self.up = threading.Event()  # has once taken all of a delivery

    def _fault(self):
        self.calls += 1
        return next(self.faults, None)

    def load(self, records):
        if self._fault() is not None:
            raise Down("no\nanswer")
        return set(self.there)

    def deliver(self, events):
        fault = self._fault()
        for logged in events[:fault]:
            self.taken.append(logged)
            if isinstance(logged.event, Asked):
                self.there.add(logged.event.trial)
        if fault is not None:
            raise Down("no\nanswer")
        self.up.set()

    def close(self, records, whole):
        self.closed.append(dict(records))

    def effect(self):
        """What a store has that takes twice what is the same twice."""
        return list(dict.fromkeys(logged.id for logged in self.taken))


def deliver(log, store, say=silent):
    """A whole session's delivery."""
    box = Outbox(log, store, say)
    box.start()
    return box.finish(replay(log.events()), whole=True)


# Fake stores.


def test_everything_arrives_in_order_and_once(log):
    store, lines = Fake(), []
    log.append([event for n in range(3) for event in whole(n)])
    box = Outbox(log, store, lines.append)
    assert box.reconcile() == 15
    box.start()
    for number in range(3, 60):
        log.append(whole(number))
    assert box.finish(replay(log.events()), whole=True) == 0
    assert store.taken == log.events() and lines == []
    (closed,) = store.closed
    assert sorted(closed) == list(range(60))


def test_it_delivers_while_the_study_runs(log):
    store = Fake()
    box = Outbox(log, store, silent)
    box.start()
    log.append(whole(0))
    assert store.up.wait(30)
    box.finish({}, whole=True)
    assert store.taken == log.events()


def test_a_backlog_goes_in_parts(log, monkeypatch):
    monkeypatch.setattr(outbox, "BATCH", 4)
    log.append([asked(n) for n in range(12)])
    store = Fake()
    box = Outbox(log, store, silent)
    assert box.reconcile() == 12
    assert store.taken == log.events() and 4 <= store.calls <= 5
    assert log.delivered(box.cursor) == 12


def test_what_has_arrived_is_not_delivered_again_in_the_next_session(log):
    log.append(whole(0))
    deliver(log, Fake())
    log.append(whole(1))
    store = Fake(there=[0])
    box = Outbox(log, store, silent)
    assert box.reconcile() == 5
    assert [e.event.trial for e in store.taken] == [1] * 5


faults = st.lists(st.one_of(st.none(), st.integers(0, 6)), max_size=8)


@given(faults=faults, trials=st.lists(st.integers(0, 3), min_size=1, max_size=4))
@settings(max_examples=25)
def test_a_store_that_fails_for_a_while_gets_everything(faults, trials):
    with tempfile.TemporaryDirectory() as folder, open_log(Path(folder)) as log:
        store = Fake(faults)
        box = Outbox(log, store, silent)
        box.start()
        for number, pieces in enumerate(trials):
            events = whole(number)
            log.append(events[:pieces])
            log.append(events[pieces:])
        assert box.finish({}, whole=True) == 0
        assert store.effect() == [event.id for event in log.events()]  # in order, none left out
        assert len(store.closed) == 1
        # What may have arrived is made again, and no more than that: from a failed delivery on.
        assert len(store.taken) <= len(store.effect()) + sum(f or 0 for f in faults)


def test_a_failure_is_said_in_a_line_and_so_is_its_end(log):
    lines = []
    log.append(whole(0))
    assert deliver(log, Fake([0, 0, None, 2, None, None]), lines.append) == 0
    assert lines == [
        "fake does not take records (Down: no answer); they wait in the event log until it does",
        "fake answers again and has all records",
    ]


def test_it_says_that_all_has_arrived_only_then(log, monkeypatch):
    monkeypatch.setattr(outbox, "BATCH", 4)
    log.append([asked(n) for n in range(12)])
    store, said = Fake([0]), []
    deliver(log, store, lambda line: said.append((line, len(store.taken))))
    assert said[-1] == ("fake answers again and has all records", 12)


def test_a_store_that_lost_a_trial_gets_everything_again(log):
    log.append([event for n in range(3) for event in whole(n)])
    deliver(log, Fake())
    log.append([asked(3)])
    store = Fake(there=[0, 2])
    box = Outbox(log, store, silent)
    assert box.reconcile() == 16
    assert store.taken == log.events()


def test_a_store_that_is_ahead_of_its_cursor_has_lost_nothing(log):
    """It took a delivery, and a kill came before the log knew."""
    log.append([event for n in range(3) for event in whole(n)])
    log.set_delivered(Outbox(log, Fake(), print).cursor, 5)  # trial 0
    store = Fake(there=[0, 1, 2])
    assert Outbox(log, store, silent).reconcile() == 10
    assert [e.id for e in store.taken] == list(range(6, 16))


def test_a_store_that_stays_down_misses_what_it_misses(log, impatient):
    log.append(whole(0))
    box = Outbox(log, store := Fake([None, None, *[0] * 100_000]), silent)
    box.reconcile()
    box.start()
    log.append(whole(1))
    assert box.finish({}, whole=True) == 5 + 1  # the study's end
    assert store.closed == []  # there is no one to say it to
    # The next session makes up for it.
    assert deliver(log, again := Fake(there=[0])) == 0
    assert [e.event.trial for e in again.taken] == [1] * 5


def test_a_store_that_does_not_take_records_at_the_start_is_named(log):
    with pytest.raises(ConfigError, match=r"^fake\.address: given here, .* \(Down: no answer\)$"):
        Outbox(log, Fake([0]), silent).reconcile()


def test_stores_do_not_wait_for_each_other(log, impatient):
    down, up = Fake([0] * 100_000), Fake()
    up.name = "up"
    boxes = [Outbox(log, store, silent) for store in (down, up)]
    for box in boxes:
        box.start()
    log.append(whole(0))
    assert up.up.wait(30)
    assert [box.finish({}, whole=True) for box in boxes] == [5 + 1, 0]
    assert up.taken == log.events() and down.taken == []


def test_a_store_that_fails_only_when_it_is_closed_misses_the_studys_end(log):
    class Closing(Fake):
        def close(self, records, whole):
            raise Down("no answer")

    lines = []
    log.append(whole(0))
    assert deliver(log, store := Closing(), lines.append) == 1
    assert store.taken == log.events()
    assert len(lines) == 1 and "Down: no answer" in lines[0]


# Optuna's store.

STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


@pytest.fixture
def study(log):
    """A log with a trial of each state, and one that has not ended."""
    log.append(whole(0) + whole(1, PRUNED) + whole(2, FAILED, "Diverged: kernel_0"))
    log.append([asked(3, "lin-thresh"), epoch(3, 1, 0.25)])
    return log


def opened(folder):
    store = OptunaStore("s", "id", ACCURACY, None, folder)
    there = store.load({})
    return store, there


def content(folder, name="s"):
    """What optuna-dashboard shows of the study."""
    backend = JournalFileBackend(str(folder / optuna_store.FILE))
    study = optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    return [
        (t.number, t.state, t.value, t.params, t.intermediate_values, t.user_attrs)
        for t in study.get_trials()
    ]


EXPECTED = [
    (0, TrialState.COMPLETE, 0.3, {"x": 0.0}, {1: 0.1, 2: 0.2, 3: 0.3}),
    (1, TrialState.PRUNED, 1.2, {"x": 0.1}, {1: 1.1, 2: 1.2}),
    (2, TrialState.FAIL, None, {"x": 0.2}, {1: 2.1}),
    (3, TrialState.RUNNING, None, {"x": 0.3}, {1: 0.25}),
]


def test_optuna_shows_what_the_log_has(study, tmp_path):
    assert deliver(study, OptunaStore("s", "id", ACCURACY, None, tmp_path)) == 0
    shown = content(tmp_path)
    assert [trial[:5] for trial in shown] == EXPECTED
    attributes = [trial[5] for trial in shown]
    assert [a["rule"] for a in attributes] == ["bp", "bp", "bp", "lin-thresh"]
    assert [a["command"] for a in attributes] == [f"do {n}" for n in range(4)]
    assert [a.get("reason") for a in attributes] == [None, None, "Diverged: kernel_0", None]
    study = optuna.load_study(study_name="s", storage=optuna_store.open_storage(None, tmp_path))
    assert study.best_trial.number == 0
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE


@given(data=st.data())
@settings(max_examples=15)
def test_what_optuna_is_given_again_changes_nothing(data):
    with tempfile.TemporaryDirectory() as name, open_log(Path(name)) as log:
        folder = Path(name)
        log.append(whole(0) + whole(1, PRUNED) + whole(2, FAILED, "Diverged: kernel_0"))
        log.append([asked(3, "lin-thresh"), epoch(3, 1, 0.25)])
        events = log.events()
        store, _ = opened(folder)
        store.deliver(events[: (at := data.draw(st.integers(0, len(events))))])
        if data.draw(st.booleans()):  # a new session
            store, there = opened(folder)
            assert there == {e.event.trial for e in events[:at]}
        store.deliver(events[data.draw(st.integers(0, at)) :])
        store.deliver(events)
        assert [trial[:5] for trial in content(folder)] == EXPECTED
        store.close(replay(events), whole=True)
        assert [trial[:5] for trial in content(folder)] == EXPECTED


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_cut_short_is_mended_and_written_again(study, tmp_path, cut):
    events = study.events()
    store, _ = opened(tmp_path)
    store.deliver(events[:-1])
    file = tmp_path / optuna_store.FILE
    before = file.stat().st_size
    store.deliver(events[-1:])
    last = file.read_bytes()[before:]
    with file.open("r+b") as cut_short:  # the kill came before all of it was written
        cut_short.truncate(before + min(cut, len(last) - 1))
    store, there = opened(tmp_path)
    assert there == {0, 1, 2, 3}
    assert all(json.loads(line) for line in file.read_bytes().splitlines())
    store.deliver(events[-1:])
    assert [trial[:5] for trial in content(tmp_path)] == EXPECTED


@pytest.mark.parametrize("text", [b"", b"{", b'{"op_code":0,"worker_id"'])
def test_a_file_that_has_no_whole_line_yet_is_a_new_one(study, tmp_path, text):
    (tmp_path / optuna_store.FILE).write_bytes(text)
    store, there = opened(tmp_path)
    assert there == set()
    store.deliver(study.events())
    assert [trial[:5] for trial in content(tmp_path)] == EXPECTED


@pytest.mark.parametrize("link", [True, False])
def test_a_lock_that_nobody_holds_is_removed(study, tmp_path, link):
    """Optuna itself would wait half a minute for it, at every record."""
    file = tmp_path / optuna_store.FILE
    opened(tmp_path)
    lock = file.with_name(f"{file.name}.lock")
    lock.symlink_to(file) if link else lock.touch()
    store, _ = opened(tmp_path)
    assert not lock.exists() and not lock.is_symlink()
    store.deliver(study.events())
    assert [trial[:5] for trial in content(tmp_path)] == EXPECTED


def test_optuna_gets_everything_again_if_its_file_is_lost(study, tmp_path):
    assert deliver(study, OptunaStore("s", "id", ACCURACY, None, tmp_path)) == 0
    (tmp_path / optuna_store.FILE).unlink()
    box = Outbox(study, OptunaStore("s", "id", ACCURACY, None, tmp_path), silent)
    assert box.reconcile() == len(study.events())
    assert [trial[:5] for trial in content(tmp_path)] == EXPECTED


def of_rules(number, rule, state=COMPLETE):
    """The events of a trial of a space of several rules."""
    first, *others = whole(number, state)
    space = CategoricalDistribution(("bp", "lin-thresh"))
    point = {
        **first.point,
        "params": {**first.point["params"], "trainer": rule},
        "distributions": {
            **first.point["distributions"], "trainer": distribution_to_json(space)
        },
    }  # fmt: skip
    return [replace(first, point=point, config={**first.config, "rule": rule}), *others]


def test_what_a_rules_study_has_is_a_copy(log, tmp_path):
    """A storage may give its own trials, and then the study of all would have lost their rule."""
    log.append(of_rules(0, "bp") + of_rules(1, "lin-thresh", PRUNED))
    store = OptunaStore("s", "id", ACCURACY, None, tmp_path)
    store.load({})
    store.deliver(log.events())
    trials = store.storage.get_all_trials(store.study_id, deepcopy=False)
    assert [trial.params["trainer"] for trial in trials] == ["bp", "lin-thresh"]
    assert not any("trial" in trial.user_attrs for trial in trials)


def test_each_rule_has_a_study_of_its_own_once(log, tmp_path):
    """Whatever is delivered again, cut off or renamed; the metric has its name."""
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    log.append(of_rules(0, "bp") + of_rules(1, "lin-thresh", PRUNED))
    log.append(of_rules(2, "bp", FAILED) + of_rules(3, "lin-thresh")[:-1])
    events = log.events()

    def there(name):
        study = optuna.load_study(study_name=name, storage=url)
        assert study.metric_names == ["valid_accuracy"]
        return [(t.user_attrs["trial"], t.state, t.value, t.params) for t in study.get_trials()]

    for name in ("s", "renamed"):
        for _ in range(2):
            store = OptunaStore(name, "id", ACCURACY, url, tmp_path)
            store.load({})
            store.deliver(events)
            store.deliver(events)
            assert set(optuna.get_all_study_names(url)) == {
                name,
                f"{name}/bp",
                f"{name}/lin-thresh",
            }
            bp = [(0, TrialState.COMPLETE, 0.3, {"x": 0.0}), (2, TrialState.FAIL, None, {"x": 0.2})]
            assert there(f"{name}/bp") == bp
            assert there(f"{name}/lin-thresh") == [(1, TrialState.PRUNED, 1.2, {"x": 0.1})]
    # A kill, or a study of an older version: the study is complete, that of a rule is not there.
    optuna.delete_study(study_name="renamed/bp", storage=url)
    store.load({})
    assert there("renamed/bp") == bp
    optuna.delete_study(study_name="renamed", storage=url)
    with pytest.raises(ConfigError, match="has a study renamed/"):
        optuna_store.refuse_taken(url, "renamed", resume=False)
    assert optuna_store.delete_study(url, "id") and not optuna.get_all_study_names(url)


def test_optunas_store_may_be_a_database(study, tmp_path):
    """Its scores are as they were measured: those of the log are signed, so that more is better."""
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    Outbox(study, OptunaStore("s", "id", LOSS, url, tmp_path), print).reconcile()
    there = optuna.load_study(study_name="s", storage=url)
    assert [
        (t.number, t.state, t.value, t.params, t.intermediate_values) for t in there.get_trials()
    ] == [
        (number, state, None if value is None else -value, params,
         {epoch: -score for epoch, score in scores.items()})
        for number, state, value, params, scores in EXPECTED
    ]  # fmt: skip
    assert there.direction == optuna.study.StudyDirection.MINIMIZE
    assert there.metric_names == ["valid_loss"]


def test_another_study_of_that_name_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    optuna_store.refuse_taken(url, "s", resume=False)
    optuna.create_study(storage=url, study_name="s")
    optuna_store.refuse_taken(url, "s", resume=True)
    optuna_store.refuse_taken(url, "other", resume=False)
    with pytest.raises(ConfigError, match=r"^study: given s, .* has a study s\)$"):
        optuna_store.refuse_taken(url, "s", resume=False)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "oracle://x/y"])
def test_a_database_that_does_not_answer_is_refused_in_one_line(url, tmp_path):
    with pytest.raises(ConfigError) as refused:
        optuna_store.open_storage(url, tmp_path)
    assert str(refused.value).startswith(f"searcher.storage: given {url}, ")
    assert "\n" not in str(refused.value)
