"""What a call sets for its time does not outlive it: environment variables, logging filters."""

import logging
import os
from contextlib import nullcontext

import pytest
import ray
import yaml

from analysis import replay, retrain, runs, selection, store
from analysis.report import __main__ as report
from disinhib.errors import ConfigError, InputError
from disinhib.tuning import cluster, environment, mlflow_connection, mlflow_settings

LOCAL = {"address": None, "cpus_per_trial": 1, "gpus_per_trial": 0, "max_concurrent": None}


def state():
    """What of this process a call might leave changed."""
    loggers = [logging.root, *map(logging.getLogger, [*logging.root.manager.loggerDict])]
    return dict(os.environ), {logger.name: (logger.level, [*logger.filters]) for logger in loggers}


@pytest.mark.parametrize("before", [None, "theirs"])
@pytest.mark.parametrize("raised", [False, True])
def test_variables_are_what_they_were(monkeypatch, before, raised):
    monkeypatch.delenv("DISINHIB_X", raising=False)
    if before is not None:
        monkeypatch.setenv("DISINHIB_X", before)
    with (
        pytest.raises(ZeroDivisionError) if raised else nullcontext(),
        environment.variables({"DISINHIB_X": "ours"}),
    ):
        assert os.environ["DISINHIB_X"] == "ours"
        assert not raised or 1 / 0
    assert os.environ.get("DISINHIB_X") == before


@pytest.fixture
def no_ray(monkeypatch):
    """A cluster of one machine with two cores, without Ray: what is done when Ray is there."""
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def test_a_cluster_leaves_no_variable_and_no_filter(no_ray):
    logging.getLogger("ray.tune.tune")
    before = state()
    with cluster.cluster(LOCAL):
        assert os.environ.items() >= cluster.SWITCHES.items()
        assert logging.getLogger("ray.tune.tune").filters != before[1]["ray.tune.tune"][1]
    assert state() == before and no_ray[1:] == ["shutdown"]
    with pytest.raises(KeyError), cluster.cluster(LOCAL):
        raise KeyError
    assert state() == before and no_ray[3:] == ["shutdown"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("cpus_per_trial", 3, r"^cluster\.cpus_per_trial: given 3, allowed is at most 2, "),
        ("gpus_per_trial", 1, r"^cluster\.gpus_per_trial: given 1, allowed is at most 0, "),
    ],
)
def test_nor_does_one_that_is_refused(no_ray, option, value, message):
    logging.getLogger("ray.tune.tune")
    before = state()
    with pytest.raises(ConfigError, match=message), cluster.cluster({**LOCAL, option: value}):
        pass
    assert state() == before and no_ray[1:] == ["shutdown"]


def test_tunes_summary_is_not_printed_and_all_else_is(no_ray):
    logger = logging.getLogger("ray.tune.tune")
    record = lambda text: logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None)
    with cluster.cluster(LOCAL):
        assert not logger.filter(record("Trials did not complete: [trial_0]"))
        assert logger.filter(record("something else"))
    assert logger.filter(record("Trials did not complete: [trial_0]"))


# Every command that speaks to MLflow.

COMMANDS = {
    "runs": (runs.main, ["study=s"]),
    "selection": (selection.main, ["study=s"]),
    "report": (report.main, ["study=s"]),
    "replay": (replay.main, ["0123"]),
    "retrain": (retrain.main, ["{selected}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_analysis_has_the_settings_of_tuning_and_leaves_none(
    name, tmp_path, monkeypatch
):
    for variable in mlflow_settings._REQUESTS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selected.yaml").write_text(
        yaml.safe_dump({"tracking_uri": "http://here", "study_run": "0", "selected": []})
    )
    seen = []

    def connect(tracking_uri):
        seen.append(dict(os.environ))
        raise ConnectionError("no answer")

    monkeypatch.setattr(store, "MlflowClient", connect)
    main, arguments = COMMANDS[name]
    words = [word.format(selected="selected.yaml") for word in arguments]
    before = dict(os.environ)
    with pytest.raises(InputError, match=r"tracking\.uri: cannot read http://here .*no answer"):
        main([*words, "tracking.uri=http://here"])
    assert dict(os.environ) == before
    soon = {"MLFLOW_HTTP_REQUEST_TIMEOUT": mlflow_connection.FIRST_CONTACT}
    assert seen == [{**before, **mlflow_settings._REQUESTS, **soon}]


def test_what_the_user_has_set_keeps_its_value(monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    expected = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "false"}
    assert environment.as_set(environment.UNTRACKED) == expected
