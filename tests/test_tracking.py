"""MLflow as the driver writes it: a real SQLite store, Ray trials played by stand-ins."""

import pickle
import socket
import time
from types import SimpleNamespace

import pytest
from mlflow.entities import Param

from disinhib.config import ConfigError
from disinhib.tuning import tracking
from disinhib.tuning.trial import METRICS, SCORE


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    uri = tracking.absolute(None, folder)
    return tracking.open_store(uri, "disinhib", folder / "artifacts")


def ray_trial(number, status="RUNNING", epochs=0, error=None):
    """What the tracker reads of a Ray trial with a budget of 3 epochs."""
    return SimpleNamespace(
        status=status,
        pickled_error_file=error,
        last_result={"training_iteration": epochs, SCORE: 50.0 + epochs} if epochs else {},
        config={
            "number": number,
            "rule": "bp",
            "searched": {"trainer": "bp", "model/vf": "non-dale", "optimizer.learning_rate": 0.01},
            "command": "python -m disinhib trainer=bp",
            "options": {"seed": number, "trainer": {"name": "bp"}},
            "epochs": 3,
            "metric": "valid_accuracy",
        },
    )


def play(tracker, trial, epochs):
    """The trial runs `epochs` epochs."""
    tracker.on_trial_start(iteration=0, trials=[], trial=trial)
    for epoch in range(1, epochs + 1):
        result = {
            "training_iteration": epoch,
            SCORE: 50.0 + epoch,
            METRICS: {"valid_accuracy": 50.0 + epoch, "valid_loss": 1.0 / epoch},
        }
        tracker.on_trial_result(iteration=0, trials=[], trial=trial, result=result)
        trial.last_result = result


def test_params_are_flat_and_dotted():
    searched = {
        "model/vf": "dale",
        "model/vf/activation@model.vf.actI": "tanh",
        "trainer.norm_val": 0.5,
    }
    assert tracking.params(searched) == [
        Param("model.vf", "dale"),
        Param("model.vf.actI", "tanh"),
        Param("trainer.norm_val", "0.5"),
    ]


def test_a_study_is_a_parent_run_and_its_trials_are_children_in_their_states(store, tmp_path):
    tracker = tracking.Tracker(store, "states", {"trials": 4}, "python tune_main.py")
    complete, pruned, failed, unfinished = (ray_trial(number) for number in range(4))
    play(tracker, complete, 3)
    tracker.on_trial_complete(iteration=0, trials=[], trial=complete)
    play(tracker, pruned, 1)
    tracker.on_trial_complete(iteration=0, trials=[], trial=pruned)
    play(tracker, failed, 2)
    failed.status, failed.pickled_error_file = "ERROR", str(tmp_path / "error.pkl")
    (tmp_path / "error.pkl").write_bytes(pickle.dumps(RuntimeError("loss is nan\nand more")))
    tracker.on_trial_error(iteration=0, trials=[], trial=failed)
    play(tracker, unfinished, 1)
    tracker.on_experiment_end(trials=[complete, pruned, failed, unfinished])

    client = store.client
    parent = client.get_run(tracker.study_run)
    assert parent.info.status == "KILLED"  # as one of its trials was
    assert parent.data.tags["command"] == "python tune_main.py"
    children = client.search_runs(
        [store.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.study_run}'"
    )
    found = {
        int(run.data.tags["trial"]): (
            run.info.status,
            run.data.tags["trial_state"],
            run.data.tags["epochs"],
            run.data.tags.get("reason"),
        )
        for run in children
    }
    assert found == {
        0: ("FINISHED", "complete", "3", None),
        1: ("FINISHED", "pruned", "1", None),
        2: ("FAILED", "failed", "2", "RuntimeError: loss is nan"),
        3: ("KILLED", "killed", "1", "the study was interrupted"),
    }
    for run in children:
        history = client.get_metric_history(run.info.run_id, "valid_accuracy")
        epochs = int(run.data.tags["epochs"])
        assert [(m.step, m.value) for m in history] == [
            (epoch, 50.0 + epoch) for epoch in range(1, epochs + 1)
        ]


def test_a_trial_that_fails_before_it_starts_has_a_run_with_the_reason(store):
    tracker = tracking.Tracker(store, "early", {}, "")
    trial = ray_trial(0, status="ERROR")
    tracker.on_trial_error(iteration=0, trials=[], trial=trial)
    tracker.on_step_end(iteration=0, trials=[])
    run = store.client.get_run(tracker.runs[0])
    assert (run.info.status, run.data.tags["epochs"]) == ("FAILED", "0")
    assert run.data.tags["reason"] == "the worker left no error"


def test_options_and_command_are_kept_with_a_trial(store, tmp_path):
    tracker = tracking.Tracker(store, "artifacts", {}, "")
    play(tracker, ray_trial(7), 1)
    tracker.on_step_end(iteration=0, trials=[])
    folder = store.client.download_artifacts(tracker.runs[7], "", str(tmp_path))
    assert (tmp_path / "command.txt").read_text() == "python -m disinhib trainer=bp\n"
    assert "name: bp" in (tmp_path / "config.yaml").read_text()
    assert folder


def test_epochs_are_sent_together(store, monkeypatch):
    tracker = tracking.Tracker(store, "batches", {}, "")
    trial = ray_trial(0)
    play(tracker, trial, 0)
    tracker.on_step_end(iteration=0, trials=[])
    batches = []
    monkeypatch.setattr(
        type(store.client), "log_batch", lambda _, run, **what: batches.append(what)
    )
    for epoch in range(3):
        result = {"training_iteration": epoch + 1, METRICS: {"loss": 1.0, "accuracy": 2.0}}
        tracker.on_trial_result(iteration=0, trials=[], trial=trial, result=result)
        tracker.on_step_end(iteration=0, trials=[])
    tracker.on_trial_complete(iteration=0, trials=[], trial=trial)
    tracker.on_step_end(iteration=0, trials=[])
    assert [len(batch["metrics"]) for batch in batches] == [6]


def test_the_experiment_is_made_once(store, tmp_path):
    again = tracking.open_store(store.uri, "disinhib", tmp_path)
    assert again.experiment_id == store.experiment_id


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
def test_a_store_that_cannot_be_opened_is_refused_in_one_line_and_soon(uri, tmp_path):
    uri = uri.format(port=closed_port())
    begin = time.monotonic()
    with pytest.raises(ConfigError) as refusal:
        tracking.open_store(uri, "disinhib", tmp_path)
    assert str(refusal.value).startswith(f"tracking.uri: given {uri}")
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - begin < 15


def test_a_server_that_accepts_and_says_nothing_is_given_up_on(tmp_path):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=r"tracking\.uri"):
            tracking.open_store(f"http://127.0.0.1:{mute.getsockname()[1]}", "x", tmp_path)
        assert time.monotonic() - begin < 30


def test_relative_sqlite_paths_are_the_drivers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tracking.absolute("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert tracking.absolute("http://host", tmp_path) == "http://host"
