"""MLflow as the driver writes it: a real SQLite store, fed with a study's events."""

import itertools
import socket

import pytest
from mlflow import MlflowClient
from mlflow.entities import Param

from disinhib.errors import ConfigError
from disinhib.tuning import mlflow_store
from disinhib.tuning.event_log import (
    ASKED,
    COMPLETE,
    ENDED,
    EPOCH,
    FAILED,
    PRUNED,
    Event,
    Journal,
    Record,
)
from disinhib.tuning.outbox import Delivery

pytestmark = pytest.mark.usefixtures("copied_stores")

IDS = itertools.count(1)
BEGAN = 1_700_000_000.0  # s since 1970


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    uri = mlflow_store.absolute(None, folder)
    return mlflow_store.open_store(uri, "disinhib", folder / "artifacts")


def tracker_of(store, study):
    """A new driver's tracker of the study of that name (and id)."""
    tags, files = {"command": "python tune_main.py"}, {"provenance.json": "{}"}
    return mlflow_store.Tracker(store, study, study, tags, {"config.yaml": "trials: 4\n"}, files)


def config(number):
    return {
        "number": number,
        "rule": "bp",
        "searched": {"trainer": "bp", "model/vf": "non-dale", "optimizer.learning_rate": 0.01},
        "command": "python -m disinhib trainer=bp",
        "options": {"seed": number, "trainer": {"name": "bp"}},
        "seeds": [number, number + 100],
        "epochs": 3,
        "metric": "valid_accuracy",
    }


def course(number, epochs, state=None, reason=None):
    """(trial, kind, epoch, body) of a trial with a budget of 3 epochs."""
    told = [(number, ASKED, 0, {"config": config(number), "point": {}})]
    for epoch in range(1, epochs + 1):
        metrics = {"valid_accuracy": 50.0 + epoch, "valid_loss": 1.0 / epoch}
        place = {"device": "cpu", "host": "here"}
        body = {"score": 50.0 + epoch, "metrics": metrics, "place": place}
        told.append((number, EPOCH, epoch, body))
    if state is not None:
        told.append((number, ENDED, 0, {"state": state, "epochs": epochs, "reason": reason}))
    return told


def events(*arguments, **keywords):
    """A trial's course as the journal tells it, an event a second."""
    return [
        Event(next(IDS), BEGAN + second, *told)
        for second, told in enumerate(course(*arguments, **keywords))
    ]


def children(tracker):
    """The trials' runs, each number's in a list."""
    found = tracker.client.search_runs(
        [tracker.experiment.id], f"tags.`mlflow.parentRunId` = '{tracker.study_run}'"
    )
    runs = {}
    for run in found:
        runs.setdefault(int(run.data.tags["trial"]), []).append(run)
    return runs


def histories(tracker, run):
    """What MLflow has of every metric: steps and values in its order."""
    return {
        name: [(m.step, m.value) for m in tracker.client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def expected_histories(epochs):
    steps = range(1, epochs + 1)
    return {
        "valid_accuracy": [(epoch, 50.0 + epoch) for epoch in steps],
        "valid_loss": [(epoch, 1.0 / epoch) for epoch in steps],
    }


def files_of(tracker, run_id):
    return {file.path for file in tracker.client.list_artifacts(run_id)}


TRIAL_FILES = {"config.yaml", "command.txt", "provenance.json"}


def test_params_are_flat_and_dotted():
    searched = {
        "model/vf": "dale",
        "model/vf/activation@model.vf.actI": "tanh",
        "trainer.norm_val": 0.5,
    }
    assert mlflow_store.params(searched) == [
        Param("model.vf", "dale"),
        Param("model.vf.actI", "tanh"),
        Param("trainer.norm_val", "0.5"),
    ]


def test_a_study_is_a_parent_run_and_its_trials_are_children_in_their_states(store):
    tracker = tracker_of(store, "states")
    assert tracker.load() == set()
    tracker.deliver(
        [
            *events(0, 3, COMPLETE),
            *events(1, 1, PRUNED),
            *events(2, 2, FAILED, "RuntimeError: loss is nan"),
            *events(3, 1),
        ]
    )
    unfinished = Record(config(3), [51.0], "running")
    ended = [Record(config(0), [51.0, 52.0, 53.0], COMPLETE), Record(config(1), [51.0], PRUNED)]
    tracker.close({0: ended[0], 1: ended[1], 3: unfinished}, whole=False)

    parent = tracker.client.get_run(tracker.study_run or "")
    assert parent.info.status == "KILLED"  # as one of its trials was
    assert parent.data.tags["command"] == "python tune_main.py"
    runs = {number: run for number, (run,) in children(tracker).items()}
    found = {
        number: (
            run.info.status,
            run.data.tags["trial_state"],
            run.data.tags["epochs"],
            run.data.tags.get("reason"),
        )
        for number, run in runs.items()
    }
    assert found == {
        0: ("FINISHED", "complete", "3", None),
        1: ("FINISHED", "pruned", "1", None),
        2: ("FAILED", "failed", "2", "RuntimeError: loss is nan"),
        3: ("KILLED", "killed", "1", "the study was interrupted"),
    }
    for run in runs.values():
        assert histories(tracker, run) == expected_histories(int(run.data.tags["epochs"]))
    assert [runs[n].data.tags["seeds"] for n in range(4)] == ["0,100", "1,101", "2,102", "3,103"]
    assert runs[0].data.tags["host"] == "here"
    assert runs[0].data.params["optimizer.learning_rate"] == "0.01"
    # When it was, not when it was told.
    assert runs[0].info.start_time == BEGAN * 1000
    assert runs[0].info.end_time == (BEGAN + 4) * 1000


def test_a_study_whose_trials_all_ended_is_finished(store):
    tracker = tracker_of(store, "ended")
    tracker.load()
    tracker.deliver(events(0, 3, COMPLETE))
    tracker.close({0: Record(config(0), [51.0, 52.0, 53.0], COMPLETE)}, whole=True)
    assert tracker.client.get_run(tracker.study_run or "").info.status == "FINISHED"


def test_a_trial_that_fails_before_its_first_epoch_has_a_run_with_the_reason(store):
    tracker = tracker_of(store, "early")
    tracker.load()
    tracker.deliver(events(0, 0, FAILED, "OSError: no such file"))
    run = tracker.client.get_run(tracker.runs[0])
    assert (run.info.status, run.data.tags["epochs"]) == ("FAILED", "0")
    assert run.data.tags["reason"] == "OSError: no such file"
    assert run.data.metrics == {}


def test_options_command_and_provenance_are_kept_with_a_trial(store, tmp_path):
    tracker = tracker_of(store, "artifacts")
    tracker.load()
    tracker.deliver(events(7, 1))
    tracker.client.download_artifacts(tracker.runs[7], "", str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == TRIAL_FILES
    assert (tmp_path / "command.txt").read_text() == "python -m disinhib trainer=bp\n"
    assert "name: bp" in (tmp_path / "config.yaml").read_text()
    assert files_of(tracker, tracker.study_run) == {"config.yaml"}


@pytest.fixture
def requests(monkeypatch):
    """What is sent by `log_batch`, which sends it."""
    sent, real = [], MlflowClient.log_batch

    def log_batch(self, run_id, **what):
        sent.append(what)
        return real(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return sent


def test_the_news_of_a_trial_are_sent_together(store, requests):
    tracker = tracker_of(store, "together")
    tracker.load()
    tracker.deliver(events(0, 3, COMPLETE))
    (request,) = requests
    assert len(request["metrics"]) == 6
    assert len(request["params"]) == 3


def test_more_metrics_than_one_request_takes_all_arrive(store, requests):
    tracker = tracker_of(store, "many")
    tracker.load()
    tracker.deliver(events(0, 900))
    assert [len(request["metrics"]) for request in requests] == [800, 800, 200]
    ((run,),) = children(tracker).values()
    assert histories(tracker, run) == expected_histories(900)


def test_what_is_told_twice_arrives_once(store):
    tracker = tracker_of(store, "twice")
    tracker.load()
    told = [*events(0, 3, COMPLETE), *events(1, 2, FAILED, "RuntimeError: no")]
    tracker.deliver(told)
    once = {number: run for number, (run,) in children(tracker).items()}
    tracker.deliver(told)
    again = tracker_of(store, "twice")  # of a driver that was killed before it noted the delivery
    assert again.load() == {0, 1}
    assert again.study_run == tracker.study_run
    again.deliver(told)
    runs = {number: run for number, (run,) in children(tracker).items()}  # one of each
    for number, epochs in ((0, 3), (1, 2)):
        assert runs[number].info.run_id == once[number].info.run_id
        assert runs[number].data.tags == once[number].data.tags
        assert runs[number].data.params == once[number].data.params
        assert runs[number].info.status == once[number].info.status
        assert runs[number].info.end_time == once[number].info.end_time
        assert histories(tracker, runs[number]) == expected_histories(epochs)


@pytest.mark.parametrize("step", ["create_run", "log_artifacts", "log_batch", "set_terminated"])
@pytest.mark.parametrize("arrives", [False, True])
def test_a_delivery_that_failed_is_made_again_and_arrives_once(
    store, step, arrives, tmp_path, monkeypatch
):
    """The second call of `step` fails: before it has done anything, or only its answer is lost."""
    study = f"failed-{step}-{arrives}"
    tracker = tracker_of(store, study)
    real, calls = getattr(MlflowClient, step), itertools.count(1)

    def failing(self, *arguments, **keywords):
        second = next(calls) == 2
        if arrives or not second:
            answer = real(self, *arguments, **keywords)
        if second:
            raise ConnectionError("gone")
        return answer

    journal = Journal(tmp_path)
    journal.append([*course(0, 3, COMPLETE), *course(1, 2, FAILED, "RuntimeError: no")])
    monkeypatch.setattr(MlflowClient, step, failing)
    carrier = Delivery(journal, tracker, print)
    with pytest.raises(ConfigError, match="ConnectionError: gone"):
        carrier.reconcile()
    assert journal.delivered(carrier.cursor) == 0
    Delivery(journal, tracker, print).reconcile()
    assert journal.delivered(carrier.cursor) == journal.last()
    journal.close()

    runs = {number: run for number, (run,) in children(tracker).items()}
    assert {n: (r.info.status, r.data.tags["trial_state"]) for n, r in runs.items()} == {
        0: ("FINISHED", "complete"),
        1: ("FAILED", "failed"),
    }
    for number, epochs in ((0, 3), (1, 2)):
        assert histories(tracker, runs[number]) == expected_histories(epochs)
        assert files_of(tracker, runs[number].info.run_id) == TRIAL_FILES
    (parent,) = mlflow_store._all_runs(store, f"tags.study_id = '{study}' and run_name = '{study}'")
    assert parent.info.run_id == tracker.study_run


def test_a_run_left_by_a_kill_before_its_files_is_completed_and_not_doubled(store, monkeypatch):
    killed = tracker_of(store, "half")
    killed.load()
    told = events(0, 2, PRUNED)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store.Tracker, "_put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.deliver(told)
    ((left,),) = children(killed).values()
    assert files_of(killed, left.info.run_id) == set()

    resumed = tracker_of(store, "half")
    assert resumed.load() == {0}
    resumed.deliver(told)
    ((run,),) = children(resumed).values()
    assert run.info.run_id == left.info.run_id
    assert files_of(resumed, run.info.run_id) == TRIAL_FILES
    assert run.data.tags["trial_state"] == "pruned"
    assert histories(resumed, run) == expected_histories(2)


def test_what_was_interrupted_runs_again_when_the_study_goes_on(store):
    interrupted = tracker_of(store, "again")
    interrupted.load()
    interrupted.deliver([*events(0, 3, COMPLETE), *events(1, 1)])
    done = Record(config(0), [51.0, 52.0, 53.0], COMPLETE)
    interrupted.close({0: done, 1: Record(config(1), [51.0], "running")}, whole=False)

    resumed = tracker_of(store, "again")
    assert resumed.load() == {0, 1}
    runs = {number: run for number, (run,) in children(resumed).items()}
    assert {n: run.info.status for n, run in runs.items()} == {0: "FINISHED", 1: "RUNNING"}
    assert {"trial_state", "epochs", "reason"}.isdisjoint(runs[1].data.tags)
    assert runs[0].data.tags["trial_state"] == "complete"
    assert resumed.client.get_run(resumed.study_run or "").info.status == "RUNNING"

    resumed.deliver(events(1, 3, COMPLETE))
    resumed.close({0: done, 1: Record(config(1), [51.0, 52.0, 53.0], COMPLETE)}, whole=True)
    runs = {number: run for number, (run,) in children(resumed).items()}
    assert runs[1].info.status == "FINISHED"
    assert runs[1].data.tags["trial_state"] == "complete"
    assert "reason" not in runs[1].data.tags
    assert resumed.client.get_run(resumed.study_run or "").info.status == "FINISHED"


def test_a_kill_between_the_tags_and_the_status_of_an_interrupted_run_leaves_no_reason(
    store, monkeypatch
):
    interrupted = tracker_of(store, "between")
    interrupted.load()
    interrupted.deliver(events(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            interrupted.close({0: Record(config(0), [51.0], "running")}, whole=False)
    resumed = tracker_of(store, "between")
    resumed.load()
    ((run,),) = children(resumed).values()
    assert {"trial_state", "epochs", "reason"}.isdisjoint(run.data.tags)


def test_a_run_that_somebody_deleted_comes_back(store, tmp_path):
    tracker = tracker_of(store, "deleted")
    journal = Journal(tmp_path)
    journal.append([*course(0, 3, COMPLETE), *course(1, 2, PRUNED)])
    Delivery(journal, tracker, print).reconcile()
    tracker.client.delete_run(tracker.runs[0])
    again = tracker_of(store, "deleted")
    assert Delivery(journal, again, print).reconcile() == journal.last()
    journal.close()
    runs = {number: run for number, (run,) in children(again).items()}
    assert histories(again, runs[0]) == expected_histories(3)
    assert histories(again, runs[1]) == expected_histories(2)


def test_two_studies_of_one_name_are_told_apart(store):
    """As in two folders that write to one server."""
    one, other = tracker_of(store, "same"), tracker_of(store, "same")
    other.id = "another"
    one.load()
    one.deliver(events(0, 1))
    assert other.load() == set()
    assert other.study_run != one.study_run


def test_the_experiment_is_made_once(store, tmp_path):
    assert mlflow_store.open_store(store.uri, "disinhib", tmp_path) == store


def test_a_deleted_experiment_is_refused(store, tmp_path):
    other = mlflow_store.open_store(store.uri, "deleted", tmp_path)
    mlflow_store._client(store.uri).delete_experiment(other.id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment: given deleted"):
        mlflow_store.open_store(store.uri, "deleted", tmp_path)


def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:{port}",
        "postgresql://nobody@127.0.0.1:{port}/none",
        "sqlite:////dev/null/mlflow.db",
        "gopher://127.0.0.1",
        "./mlruns",
    ],
)
def test_a_store_that_cannot_be_opened_is_refused_in_one_line(uri, tmp_path):
    uri = uri.format(port=closed_port())
    with pytest.raises(ConfigError) as refusal:
        mlflow_store.open_store(uri, "disinhib", tmp_path)
    assert str(refusal.value).startswith(f"tracking.uri: given {uri}")
    assert "\n" not in str(refusal.value)


def test_a_server_that_accepts_and_says_nothing_is_given_up_on(tmp_path):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(ConfigError, match=r"tracking\.uri"):
            mlflow_store.open_store(f"http://127.0.0.1:{mute.getsockname()[1]}", "x", tmp_path)


def test_relative_sqlite_paths_are_the_drivers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mlflow_store.absolute("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert mlflow_store.absolute("http://host", tmp_path) == "http://host"
