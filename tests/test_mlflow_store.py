# pyright: reportArgumentType=false
"""MLflow as the driver writes it: a real SQLite store, fed with a study's events."""

import base64
import itertools
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from disinhib.errors import ConfigError
from disinhib.tuning import mlflow_connection, mlflow_settings, mlflow_store
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    Asked,
    Ended,
    EpochDone,
    Event,
    EventLog,
    Logged,
    Objective,
    replay,
)
from disinhib.tuning.mlflow_store import BEGUN, MlflowStore
from disinhib.tuning.outbox import Outbox

pytestmark = pytest.mark.usefixtures("copied_stores")

ACCURACY = Objective("valid_accuracy", 1)
ROOT = Path(__file__).parent.parent
BEGAN = 1_700_000_000.0  # s since 1970
DATA = {"data_sha256": "0123456789abcdef"}
PARAMS = {"trainer": "bp", "bp.optimizer.learning_rate": 0.01, "bp.strong": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where workers leave the models of final trials."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    uri = mlflow_connection.address(None, folder)
    return mlflow_connection.open_store(uri, "disinhib", folder / "artifacts")


@pytest.fixture
def new_store(experiment, models):
    """`new_store(name)`: a new driver's, of the study of that name (and id)."""

    def make(study):
        tags = {"command": "python tune_main.py", **DATA}
        files = {"provenance.json": "{}"}
        own = {"config.yaml": "trials: 4\n"}
        model = lambda number, seed: models / f"{study}-{number}-{seed}"
        return MlflowStore(experiment, study, study, ACCURACY, tags, own, files, model)

    return make


def config(number, final=False) -> Any:
    return {
        "number": number,
        "rule": "bp",
        "searched": {"trainer": "bp", "model/vf": "non-dale", "optimizer.learning_rate": 0.01},
        "command": "python -m disinhib trainer=bp",
        "options": {"seed": number, "trainer": {"name": "bp"}, "dataset": {"name": "digits"}},
        "seeds": [number, number + 100],
        "epochs": 3,
        "final": final,
    }


def point(params) -> Any:
    return {"params": params, "distributions": {}, "system_attrs": {}}


def trial(number, epochs, state=None, reason=None):
    """The events of a trial of two seeds, with a budget of 3 epochs."""
    events: list[Event] = [Asked(number, config(number), point(PARAMS))]
    for epoch in range(1, epochs + 1):
        # Means over seeds, with a deviation of 0.
        metrics = {"valid_accuracy": [50.0 + epoch] * 2, "valid_loss": [1.0 / epoch] * 2}
        place = {"device": "cpu", "host": "here"}
        events.append(EpochDone(number, epoch, 50.0 + epoch, metrics, place))
    if state is not None:
        events.append(Ended(number, state, epochs, reason))
    return events


def logged(*events):
    """As the log has them, an event a second."""
    return [Logged(1 + second, BEGAN + second, event) for second, event in enumerate(events)]


def records(*events):
    return replay(logged(*events))


def deliver(store, *events):
    store.load({})
    store.deliver(logged(*events))


def children(store):
    """The runs below the study's."""
    return store.client.search_runs(
        [store.experiment.id], f"tags.`mlflow.parentRunId` = '{store.study_run}'"
    )


def only_runs(store):
    """The runs of trials, each of which has one."""
    runs = {int(run.data.tags["trial"]): run for run in children(store)}
    assert len(runs) == len(children(store))
    return runs


def histories(store, run):
    """What MLflow has of every metric, deviations apart: steps and values in its order."""
    return {
        name: [(m.step, m.value) for m in store.client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if not name.endswith("_sd")
    }


def expected_histories(epochs):
    steps = range(1, epochs + 1)
    return {
        "valid_accuracy": [(epoch, 50.0 + epoch) for epoch in steps],
        "valid_loss": [(epoch, 1.0 / epoch) for epoch in steps],
    }


def files_of(store, run_id):
    return {file.path for file in store.client.list_artifacts(run_id)}


TRIAL_FILES = {"config.yaml", "command.txt", "provenance.json"}


def test_a_study_is_a_parent_run_and_its_trials_are_children_in_their_states(new_store):
    store = new_store("states")
    assert store.load({}) == set()
    events = [
        *trial(0, 3, COMPLETE),
        *trial(1, 1, PRUNED),
        *trial(2, 2, FAILED, "RuntimeError: loss is nan"),
        *trial(3, 1),
    ]
    store.deliver(logged(*events))
    store.close(records(*events), whole=False)

    parent = store.client.get_run(store.study_run)
    assert parent.info.status == "KILLED"  # as one of its trials was
    assert parent.data.tags["command"] == "python tune_main.py"
    runs = only_runs(store)
    ends = {
        number: (
            run.info.status,
            run.data.tags["trial_state"],
            run.data.tags["epochs"],
            run.data.tags.get("reason"),
        )
        for number, run in runs.items()
    }
    assert ends == {
        0: ("FINISHED", "complete", "3", None),
        1: ("FINISHED", "pruned", "1", None),
        2: ("FAILED", "failed", "2", "RuntimeError: loss is nan"),
        3: ("KILLED", "killed", "1", "the study was interrupted"),
    }
    for run in runs.values():
        assert histories(store, run) == expected_histories(int(run.data.tags["epochs"]))
    assert [runs[n].data.tags["seeds"] for n in range(4)] == ["0,100", "1,101", "2,102", "3,103"]
    assert runs[0].data.tags["host"] == "here"
    # When it was, not when it was told.
    assert runs[0].info.start_time == BEGAN * 1000
    assert runs[0].info.end_time == (BEGAN + 4) * 1000


def test_params_are_what_optuna_chose_under_its_names(new_store):
    store = new_store("params")
    store.load({})
    store.deliver(logged(*trial(0, 0)))
    (run,) = only_runs(store).values()
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}


def test_a_study_whose_trials_all_ended_is_finished(new_store):
    store = new_store("ended")
    store.load({})
    store.deliver(logged(*trial(0, 3, COMPLETE)))
    store.close(records(*trial(0, 3, COMPLETE)), whole=True)
    assert store.client.get_run(store.study_run).info.status == "FINISHED"


def test_a_trial_that_fails_before_its_first_epoch_has_a_run_with_the_reason(new_store):
    store = new_store("early")
    store.load({})
    store.deliver(logged(*trial(0, 0, FAILED, "OSError: no such file")))
    run = store.client.get_run(store.runs[0, None])
    assert (run.info.status, run.data.tags["epochs"]) == ("FAILED", "0")
    assert run.data.tags["reason"] == "OSError: no such file"
    assert run.data.metrics == {}


def test_options_command_and_provenance_are_kept_with_a_trial(new_store, tmp_path):
    store = new_store("artifacts")
    store.load({})
    store.deliver(logged(Asked(7, config(7), tags={"dataset": "d"}, files={"more.txt": "m"})))
    run = store.client.get_run(store.runs[7, None])
    store.client.download_artifacts(run.info.run_id, "", str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {*TRIAL_FILES, "more.txt"}
    assert (tmp_path / "command.txt").read_text() == "python -m disinhib trainer=bp\n"
    assert (tmp_path / "more.txt").read_text() == "m" and run.data.tags["dataset"] == "d"
    assert "name: bp" in (tmp_path / "config.yaml").read_text()
    assert files_of(store, store.study_run) == {"config.yaml"}


# A retraining: a run for each seed.


def retraining(number=0):
    """Seed `number` ends with a flag, seed `number` + 100 diverges in the second epoch."""
    of_seeds = [(1, [51.0, 52.0]), (2, [53.0, math.nan]), (3, [55.0, math.nan])]
    why, flag = f"{number + 100}", f"{number}"
    return [
        Asked(number, config(number, final=True), point({"trainer": "bp"})),
        *(
            EpochDone(
                number, epoch, values[0],
                {"valid_accuracy": values, "compilations": [float(epoch)]},
                {"host": "here", "device": "cpu"},
                {why: "Diverged: kernel_0"} if epoch == 2 else {},
                {flag: "unstable"} if epoch == 3 else {},
            )
            for epoch, values in of_seeds
        ),
        Ended(number, COMPLETE, 3, None, [
            {"seed": number, "state": COMPLETE, "epochs": 3, "reason": None, "flag": "unstable"},
            {"seed": number + 100, "state": FAILED, "epochs": 1,
             "reason": "Diverged: kernel_0", "flag": ""},
        ]),
    ]  # fmt: skip


def by_seed(store):
    return {int(run.data.tags["seed"]): run for run in children(store)}


def check_retraining(store):
    """That MLflow has `retraining()` once."""
    assert len(children(store)) == 2
    one, other = (by_seed(store)[seed] for seed in (0, 100))
    assert one.info.run_name == "0000 bp retrained, seed 0"
    assert (one.info.status, other.info.status) == ("FINISHED", "FAILED")
    about = lambda run: [run.data.tags.get(n) for n in ("trial", "seeds", "trial_state", "epochs")]
    assert about(one) == ["0", "0", "complete", "3"]
    assert about(other) == ["0", "100", "failed", "1"]
    assert (one.data.tags["flag"], other.data.tags["flag"]) == ("unstable", "")
    assert other.data.tags["reason"] == "Diverged: kernel_0" and "reason" not in one.data.tags
    assert histories(store, one) == {
        "valid_accuracy": [(1, 51.0), (2, 53.0), (3, 55.0)],
        "compilations": [(1, 1.0), (2, 2.0), (3, 3.0)],  # of the worker, for all its seeds
    }
    assert histories(store, other)["valid_accuracy"] == [(1, 52.0)]  # and no NaN
    assert one.data.params == other.data.params == {"trainer": "bp"}


def test_each_seed_of_a_retraining_has_a_run_with_its_own_end(new_store, tmp_path):
    store = new_store("seeds")
    store.load({})
    store.models(0, 0).write_bytes(b"the trained model")
    store.deliver(logged(*retraining()))
    check_retraining(store)
    one, other = (by_seed(store)[seed].info.run_id for seed in (0, 100))
    assert files_of(store, one) == {*TRIAL_FILES, "model.msgpack"}
    assert files_of(store, other) == TRIAL_FILES
    store.client.download_artifacts(one, "", str(tmp_path))
    assert (tmp_path / "model.msgpack").read_bytes() == b"the trained model"
    # What trains this seed by itself.
    text = (tmp_path / "command.txt").read_text()
    assert text == "python -m disinhib trainer=bp seed=0 test_at_end=true\n"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 0
    assert by_seed(store)[100].data.tags["command"].endswith("seed=100 test_at_end=true")


@pytest.mark.parametrize("at", range(1, 5))
def test_a_retraining_that_is_killed_is_resumed_in_the_same_runs(new_store, at):
    """After so many of its five events: interrupted, or killed while another one is delivered."""
    before, study = retraining()[:at], f"resumed-{at}"
    first = new_store(study)
    first.load({})
    first.deliver(logged(*before))
    ids = {run.info.run_id for run in children(first)}
    first.close(records(*before), whole=False)
    assert {run.info.status for run in children(first)} == {"KILLED"}

    again = new_store(study)
    assert again.load(records(*before)) == {0}
    assert again.study_run == first.study_run
    assert {run.info.status for run in children(again)} == {"RUNNING"}
    again.deliver(logged(*retraining())[at:])
    again.deliver(logged(*retraining()))  # all of it, as after a delivery whose answer was lost
    assert {run.info.run_id for run in children(again)} == ids
    check_retraining(again)


def test_a_retraining_of_which_a_seeds_run_is_missing_is_not_there(new_store):
    """As after a kill between the two."""
    store = new_store("half-seeds")
    store.load({})
    store.deliver(logged(*retraining()))
    store.client.delete_run(store.runs[0, 100])
    again = new_store("half-seeds")
    assert again.load(records(*retraining())) == set()
    again.deliver(logged(*retraining()))
    check_retraining(again)


# What MLflow's pages show.

OF_STUDY = {"trials_ended", "trials_failed"}


def test_the_studys_own_run_shows_how_it_stands(new_store):
    store = new_store("stands")
    store.load({})
    events = [*trial(0, 2, PRUNED), *trial(1, 1, FAILED, "why"), *trial(2, 3, COMPLETE)]
    store.deliver(logged(*events[:4]))
    store.deliver(logged(*events)[4:])
    run = store.client.get_run(store.study_run)
    assert histories(store, run) == {
        "trials_ended": [(1, 1.0), (2, 2.0), (3, 3.0)],
        "trials_failed": [(1, 0.0), (2, 1.0), (3, 1.0)],
        "best_bp": [(3, 53.0)],
    }
    assert run.data.tags[mlflow_store.DESCRIPTION] == (
        "| rule | best valid_accuracy | trial | complete | pruned | failed |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| bp | 53.00 | 2 | 1 | 1 | 1 |\n"
    )
    # The same when it is delivered again, by another driver.
    again = new_store("stands")
    again.load(records(*events))
    again.deliver(logged(*events))
    assert again.client.get_run(store.study_run).data.metrics == run.data.metrics


def test_runs_are_named_by_number_rule_and_end_and_have_the_data_set(new_store):
    store = new_store("names")
    store.load({})
    store.deliver(logged(*trial(0, 1), *trial(1, 2, PRUNED), *trial(2, 3, COMPLETE)))
    runs = {run.info.run_name: run for run in children(store)}
    assert runs.keys() == {"0000 bp", "0001 bp pruned", "0002 bp 53.00"}
    for run in runs.values():
        (given,) = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("digits", "01234567")


def view_of(store):
    """What the experiment's page shows of the study."""
    tag = store.client.get_experiment(store.experiment.id).tags[f"{mlflow_store.VIEW}{store.id}"]
    form, _, packed = tag.partition(";")
    assert form == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_page_of_a_study_shows_its_trials_and_what_matters_of_them(new_store):
    """MLflow's UI shows it so at the address that a study prints (looked at in a browser)."""
    store = new_store("page")
    store.load({})
    store.deliver(logged(*trial(0, 3, COMPLETE)))
    view = view_of(store)
    columns = [
        *("tags.`rule`", "metrics.`valid_accuracy`", "tags.`trial_state`", "tags.`epochs`"),
        *(f"params.`{name}`" for name in sorted(PARAMS) if name != "trainer"),
    ]
    widths = view.pop("columnWidths")
    assert view == {
        "searchFilter": "tags.study_id = 'page' and tags.trial LIKE '%'",
        "orderByKey": "metrics.`valid_accuracy`",
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
    }
    assert widths.keys() == {*columns}
    shown = store.client.search_runs([store.experiment.id], view["searchFilter"])
    assert [run.data.tags["trial"] for run in shown] == ["0"]


def test_the_page_shows_the_angle_to_the_gradient_if_it_is_measured(new_store):
    store = new_store("aligned")
    store.load({})
    own = config(0)
    own["options"] |= {"diagnostics": {"alignment": True}}
    store.deliver(logged(Asked(0, own, point(PARAMS))))
    columns = view_of(store)["selectedColumns"]
    assert columns[1:3] == ["metrics.`valid_accuracy`", "metrics.`alignment_angle`"]


# Deliveries.


@pytest.fixture
def requests(monkeypatch):
    """What is sent by `log_batch`, which sends it."""
    sent, real = [], MlflowClient.log_batch

    def log_batch(self, run_id, **what):
        sent.append(what)
        return real(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return sent


def test_the_news_of_a_trial_are_sent_together(new_store, requests):
    store = new_store("together")
    store.load({})
    store.deliver(logged(*trial(0, 3, COMPLETE)))
    request, of_study = requests
    assert len(request["metrics"]) == 12  # two of three epochs, with their deviations
    assert len(request["params"]) == 3
    assert {metric.key for metric in of_study["metrics"]} == {*OF_STUDY, "best_bp"}


def test_more_metrics_than_one_request_takes_all_arrive(new_store, requests):
    store = new_store("many")
    store.load({})
    store.deliver(logged(*trial(0, 450)))
    assert [len(request["metrics"]) for request in requests] == [800, 800, 200]
    (run,) = only_runs(store).values()
    assert histories(store, run) == expected_histories(450)


def test_what_is_told_twice_arrives_once(new_store):
    store = new_store("twice")
    store.load({})
    events = [*trial(0, 3, COMPLETE), *trial(1, 2, FAILED, "RuntimeError: no")]
    store.deliver(logged(*events))
    once = only_runs(store)
    store.deliver(logged(*events))
    again = new_store("twice")  # of a driver that was killed before it noted the delivery
    assert again.load(records(*events)) == {0, 1}
    assert again.study_run == store.study_run
    again.deliver(logged(*events))
    runs = only_runs(store)
    for number, epochs in ((0, 3), (1, 2)):
        assert runs[number].info.run_id == once[number].info.run_id
        assert runs[number].data.tags == once[number].data.tags
        assert runs[number].data.params == once[number].data.params
        assert runs[number].info.status == once[number].info.status
        assert runs[number].info.end_time == once[number].info.end_time
        assert histories(store, runs[number]) == expected_histories(epochs)


@pytest.mark.parametrize("step", ["create_run", "log_artifacts", "log_batch", "set_terminated"])
@pytest.mark.parametrize("arrives", [False, True])
def test_a_delivery_that_failed_is_made_again_and_arrives_once(
    new_store, step, arrives, tmp_path, monkeypatch
):
    """The second call of `step` fails: before it has done anything, or only its answer is lost."""
    store = new_store(f"failed-{step}-{arrives}")
    real, calls = getattr(MlflowClient, step), itertools.count(1)

    def failing(self, *arguments, **keywords):
        second = next(calls) == 2
        if arrives or not second:
            answer = real(self, *arguments, **keywords)
        if second:
            raise ConnectionError("gone")
        return answer

    with closing(EventLog(tmp_path)) as log:
        log.append([*trial(0, 3, COMPLETE), *trial(1, 2, FAILED, "RuntimeError: no")])
        monkeypatch.setattr(MlflowClient, step, failing)
        box = Outbox(log, store, print)
        with pytest.raises(ConfigError, match="ConnectionError: gone"):
            box.reconcile()
        assert log.delivered(box.cursor) == 0
        Outbox(log, store, print).reconcile()
        assert log.delivered(box.cursor) == log.last()

    runs = only_runs(store)
    assert {n: (r.info.status, r.data.tags["trial_state"]) for n, r in runs.items()} == {
        0: ("FINISHED", "complete"),
        1: ("FAILED", "failed"),
    }
    for number, epochs in ((0, 3), (1, 2)):
        assert histories(store, runs[number]) == expected_histories(epochs)
        assert files_of(store, runs[number].info.run_id) == TRIAL_FILES
    own = f"tags.study_id = '{store.id}' and run_name = '{store.study}'"
    (parent,) = mlflow_store._all_runs(store.experiment, own)
    assert parent.info.run_id == store.study_run


def test_a_run_left_by_a_kill_before_its_files_is_completed_and_not_doubled(new_store, monkeypatch):
    killed, events = new_store("half"), trial(0, 2, PRUNED)
    killed.load({})
    with monkeypatch.context() as patch:
        patch.setattr(MlflowStore, "_put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.deliver(logged(*events))
    (left,) = children(killed)
    assert files_of(killed, left.info.run_id) == set()

    resumed = new_store("half")
    assert resumed.load(records(*events)) == {0}
    resumed.deliver(logged(*events))
    (run,) = children(resumed)
    assert run.info.run_id == left.info.run_id
    assert files_of(resumed, run.info.run_id) == TRIAL_FILES
    assert run.data.tags["trial_state"] == "pruned"
    assert histories(resumed, run) == expected_histories(2)


def test_what_was_interrupted_runs_again_when_the_study_goes_on(new_store):
    interrupted, before = new_store("again"), [*trial(0, 3, COMPLETE), *trial(1, 1)]
    interrupted.load({})
    interrupted.deliver(logged(*before))
    interrupted.close(records(*before), whole=False)

    resumed = new_store("again")
    assert resumed.load(records(*before)) == {0, 1}
    runs = only_runs(resumed)
    assert {n: run.info.status for n, run in runs.items()} == {0: "FINISHED", 1: "RUNNING"}
    assert {"trial_state", "epochs", "reason"}.isdisjoint(runs[1].data.tags)
    assert runs[0].data.tags["trial_state"] == "complete"
    assert resumed.client.get_run(resumed.study_run).info.status == "RUNNING"

    resumed.deliver(logged(*trial(1, 3, COMPLETE)))
    resumed.close(records(*trial(0, 3, COMPLETE), *trial(1, 3, COMPLETE)), whole=True)
    runs = only_runs(resumed)
    assert runs[1].info.status == "FINISHED"
    assert runs[1].data.tags["trial_state"] == "complete"
    assert "reason" not in runs[1].data.tags
    assert resumed.client.get_run(resumed.study_run).info.status == "FINISHED"


def test_a_kill_between_the_tags_and_the_status_of_an_interrupted_run_leaves_no_reason(
    new_store, monkeypatch
):
    interrupted = new_store("between")
    interrupted.load({})
    interrupted.deliver(logged(*trial(0, 1)))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            interrupted.close(records(*trial(0, 1)), whole=False)
    resumed = new_store("between")
    resumed.load(records(*trial(0, 1)))
    (run,) = children(resumed)
    assert {"trial_state", "epochs", "reason"}.isdisjoint(run.data.tags)


def test_a_run_that_somebody_deleted_comes_back(new_store, tmp_path):
    store = new_store("deleted")
    with closing(EventLog(tmp_path)) as log:
        log.append([*trial(0, 3, COMPLETE), *trial(1, 2, PRUNED)])
        Outbox(log, store, print).reconcile()
        store.client.delete_run(store.runs[0, None])
        again = new_store("deleted")
        assert Outbox(log, again, print).reconcile() == log.last()
    runs = only_runs(again)
    assert histories(again, runs[0]) == expected_histories(3)
    assert histories(again, runs[1]) == expected_histories(2)


def test_two_studies_of_one_name_are_told_apart(new_store):
    """As in two folders that write to one server."""
    one, other = new_store("same"), new_store("same")
    other.id = "another"
    one.load({})
    one.deliver(logged(*trial(0, 1)))
    assert other.load({}) == set()
    assert other.study_run != one.study_run


# Stores that can and cannot be opened.


def test_a_new_store_has_mlflows_tables_and_no_half_of_them(tmp_path, mlflow_template):
    """The one that the suite's tests copy was made by `_make_sqlite`."""
    with closing(sqlite3.connect(f"file:{mlflow_template}?mode=ro", uri=True)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert {"runs", "metrics", "params", "tags", "alembic_version"} <= tables
    assert [file.name for file in mlflow_template.parent.iterdir()] == [mlflow_template.name]


def test_the_experiment_is_made_once(experiment, tmp_path):
    assert mlflow_connection.open_store(experiment.uri, "disinhib", tmp_path) == experiment


def test_a_deleted_experiment_is_refused(experiment, tmp_path):
    other = mlflow_connection.open_store(experiment.uri, "deleted", tmp_path)
    mlflow_connection.client_of(experiment.uri).delete_experiment(other.id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment: given deleted"):
        mlflow_connection.open_store(experiment.uri, "deleted", tmp_path)


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
        mlflow_connection.open_store(uri, "disinhib", tmp_path)
    assert str(refusal.value).startswith(f"tracking.uri: given {uri}")
    assert "\n" not in str(refusal.value)


def test_a_server_that_accepts_and_says_nothing_is_given_up_on(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_connection, "FIRST_CONTACT", "1")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(ConfigError, match=r"tracking\.uri"):
            mlflow_connection.open_store(f"http://127.0.0.1:{mute.getsockname()[1]}", "x", tmp_path)


def test_relative_sqlite_paths_are_the_drivers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mlflow_connection.address("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert mlflow_connection.address("http://host", tmp_path) == "http://host"


# MLflow's settings.

OURS = {**mlflow_settings._ONCE, **mlflow_settings._REQUESTS}


def test_requests_have_our_settings_and_nothing_outlives_them(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with mlflow_settings.requests():
        now = dict(os.environ)
        with mlflow_settings.requests(MLFLOW_HTTP_REQUEST_TIMEOUT="3"):  # at first contact
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
        assert dict(os.environ) == now == {**before, **mlflow_settings._REQUESTS}
        with pytest.raises(ZeroDivisionError), mlflow_settings.requests(MLFLOW_X="1"):
            assert os.environ["MLFLOW_X"] == str(1 // 0)
    assert dict(os.environ) == before


def test_what_a_user_has_set_stands(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with mlflow_settings.requests(MLFLOW_HTTP_REQUEST_TIMEOUT="3"):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


IMPORT = """
import os
before = dict(os.environ)
import analysis.store, disinhib.tuning.mlflow_store
assert dict(os.environ) == before, {*os.environ.items()} ^ {*before.items()}
"""


def test_importing_analysis_and_tuning_sets_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_option_the_environment_and_the_default_give_the_address(tmp_path, monkeypatch):
    own = f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_connection.address(None, tmp_path) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert mlflow_connection.address(None, tmp_path) == "http://there"
    assert mlflow_connection.address("http://here", tmp_path) == "http://here"


@pytest.mark.parametrize("character", "%?#")
def test_a_path_that_mlflow_cannot_open_is_refused_at_once(character, tmp_path):
    with pytest.raises(ConfigError, match="whose path has no %, \\? or #"):
        mlflow_connection.address(None, tmp_path / f"a{character}b")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:////tmp"])
def test_a_store_without_a_file_is_refused(uri, tmp_path):
    with pytest.raises(ConfigError, match="allowed is sqlite:///FILE"):
        mlflow_connection.address(uri, tmp_path)


@pytest.mark.parametrize("name", ["a b", "it's", "lr=0.1, (a)", "[x]{y}", "é–漢", "a&b;c", "-x"])
def test_any_other_folder_holds_a_store(name, tmp_path):
    folder = tmp_path / name
    uri = mlflow_connection.address(None, folder)
    experiment = mlflow_connection.open_store(uri, "disinhib", folder)
    store = MlflowStore(
        experiment, "s", "s", ACCURACY, DATA, {"config.yaml": "a: 1"}, {}, lambda *_: folder
    )
    deliver(store, *trial(0, 3, COMPLETE))
    store.close({}, True)
    assert (folder / "mlflow.db").exists()
    assert list(folder.glob("mlflow-artifacts/*/artifacts/config.yaml"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]


def test_a_run_of_the_study_that_was_deleted_is_made_again_above_its_trials(new_store):
    store = new_store("orphaned")
    deliver(store, *trial(0, 3, COMPLETE), *trial(1, 3, COMPLETE))
    store.client.delete_run(store.study_run)
    again = new_store("orphaned")
    again.load(records(*trial(0, 3, COMPLETE), *trial(1, 3, COMPLETE)))
    assert again.study_run != store.study_run
    assert len(children(again)) == 2
    assert again.client.get_run(again.study_run).data.tags[BEGUN] == "2"


def test_the_studys_run_tells_how_many_trials_it_has_begun(new_store):
    store = new_store("counted")
    deliver(store, *trial(0, 3, COMPLETE), *trial(1, 1))
    assert store.client.get_run(store.study_run).data.tags[BEGUN] == "2"


def test_artifacts_of_a_moved_folder_are_found_beside_their_database(tmp_path):
    then, now = tmp_path / "then", tmp_path / "now here"
    uri = mlflow_connection.address(None, then)
    experiment = mlflow_connection.open_store(uri, "disinhib", then)
    store = MlflowStore(
        experiment, "s", "s", ACCURACY, DATA, {"config.yaml": "a: 1"}, {}, lambda *_: then
    )
    deliver(store, *trial(0, 3, COMPLETE))
    then.rename(now)
    uri = mlflow_connection.address(None, now)
    run = MlflowClient(uri).get_run(store.study_run)
    beside = mlflow_connection.local_artifacts(uri, run)
    assert beside is not None and (beside / "config.yaml").read_text() == "a: 1"
    # A new study there does not write to the old place, and MLflow itself finds everything.
    experiment = mlflow_connection.open_store(uri, "disinhib", now)
    run = MlflowClient(uri).get_run(store.study_run)
    assert (run.info.artifact_uri or "").startswith((now / "mlflow-artifacts").as_uri())
    another = MlflowStore(
        experiment, "t", "t", ACCURACY, DATA, {"config.yaml": "a: 2"}, {}, lambda *_: now
    )
    deliver(another, *trial(0, 3, COMPLETE))
    assert not then.exists()


def test_a_database_that_does_not_answer_is_refused_soon(monkeypatch, tmp_path):
    monkeypatch.setattr(
        mlflow_connection, "client_of", lambda uri: pytest.fail("MLflow would try on")
    )
    with pytest.raises(ConfigError, match="answers"):
        mlflow_connection.open_store("postgresql://me:secret@127.0.0.1:9/db", "disinhib", tmp_path)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("API request failed with error code 401 != 200", "set MLFLOW_TRACKING_USERNAME and"),
        ("[SQL: SELECT 1]", ""),
        (f"{'x' * 900} run mlflow db upgrade", "run mlflow db upgrade"),
        ("one\ntwo: mlflow db upgrade", "one two: mlflow db upgrade"),
    ],
)
def test_what_may_help_is_kept(text, hint):
    line = mlflow_connection.why("http://h", RuntimeError(text))
    assert hint in line and "\n" not in line and "SQL" not in line


def test_a_proxy_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:8080")
    line = mlflow_connection.why("http://h", RuntimeError("no route"))
    assert "by way of http_proxy=http://me:***@proxy:8080" in line
