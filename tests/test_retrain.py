"""Retraining, with the real Ray and MLflow: of a planted study's selection, and of a small grid."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import planted
import pytest
import yaml
from mlflow import MlflowClient

import disinhib
from analysis import cell, configurations, ledger, retrain, runs, selection, store as stores
from analysis.store import Refused
from disinhib import config, data, errors, hydra_config, training
from disinhib.tuning import mlflow_store
from disinhib.tuning.worker import environment

pytestmark = pytest.mark.usefixtures("copied_stores")

SELECTED = {"bp": 0, "exact-inv": 1, "lin-thresh": 2}  # the trials of `planted`
SEEDS = 2
GRID = ("experiment=smoke_table1", "checkpoints.every_seconds=0", "trainer=bp,exact-inv")


@pytest.fixture(scope="module")
def programs():
    """Environment of processes that compile quickly, to slower programs."""
    return {
        **os.environ,
        **environment(1, 0),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def command(module, *arguments):
    return [sys.executable, "-m", f"analysis.{module}", *map(str, arguments)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return planted.write(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def selected(study):
    file = study.folder / "selected.yaml"
    assert selection.main([f"selected={file}", f"tracking.uri={study.uri}"]) == 0
    return file


@pytest.fixture(scope="module")
def done(study, selected, programs):
    """The retraining's finished process."""
    words = command("retrain", selected, f"seeds={SEEDS}", f"out_dir={study.folder}")
    finished = subprocess.run(words, env=programs, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def opened(study, done):
    store = stores.connect(study.uri)
    return store, stores.find_study(store, study.study)


@pytest.fixture(scope="module")
def rows(opened):
    return runs.retrained(*opened).rows.to_dict("records")


def test_every_configuration_has_a_run_a_seed_linked_to_its_trial_and_study(study, opened, rows):
    assert sorted((row["rule"], row["trial"], row["seed"]) for row in rows) == sorted(
        (rule, trial, seed) for rule, trial in SELECTED.items() for seed in range(SEEDS)
    )
    trials = runs.trials(*opened).rows
    ids = dict(zip(trials["trial"], trials["run_id"], strict=True))
    assert all(row["of_run"] == ids[row["trial"]] for row in rows)
    client = MlflowClient(tracking_uri=study.uri)
    for row in rows:
        run = client.get_run(row["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == study.run_id
        assert run.info.status == "FINISHED"
        assert (row["state"], row["epochs"], row["budget"]) == ("complete", 2, 2)
        assert run.data.params == client.get_run(row["of_run"]).data.params


def test_seeds_are_none_of_the_search(study, rows):
    assert not {row["seed"] for row in rows} & set(study.seeds)


def test_the_test_set_is_evaluated_once_at_the_last_epoch(study, rows):
    client = MlflowClient(tracking_uri=study.uri)
    for row in rows:
        steps = lambda name, row=row: [
            m.step for m in client.get_metric_history(row["run_id"], name)
        ]
        assert steps("test_accuracy") == steps("test_loss") == [planted.EPOCHS]
        assert steps("valid_accuracy") == [1, 2]


def test_a_seed_is_what_its_command_trains(study, rows):
    """The pasteable command composes to the options; trained alone it gives the lane's metrics."""
    row = next(row for row in rows if row["rule"] == "exact-inv" and row["seed"] == 1)
    words = shlex.split(row["command"])
    assert words[:3] == ["python", "-m", "disinhib"]
    composed, _ = hydra_config.compose(hydra_config.TRAINING, words[3:])
    run = config.parse(composed)
    told = []
    training.train(run, [row["seed"]], lambda _, metrics: told.append(metrics))
    for name in ("train_CL_loss", "valid_loss", "valid_accuracy", "test_accuracy"):
        assert row[name] == pytest.approx(float(told[-1][name][0]), rel=1e-4), name
    store = stores.connect(study.uri)
    kept = yaml.safe_load(stores.text(store, row["run_id"], "config.yaml"))
    assert {**kept, "out_dir": composed["out_dir"]} == composed


def test_a_model_loads_and_is_as_good_as_was_said(study, rows, tmp_path):
    test = data.load("digits", None, 0.2).test
    for row in (row for row in rows if row["seed"] == 0):
        client = MlflowClient(tracking_uri=study.uri)
        file = client.download_artifacts(row["run_id"], ledger.MODEL, str(tmp_path))
        network, parameters = disinhib.load(file)
        output = network(parameters, jnp.asarray(test.images / 16, jnp.float32))
        right = np.mean(np.argmax(np.asarray(output), axis=1) == test.labels)
        assert 100 * right == pytest.approx(row["test_accuracy"], abs=1e-4)
        assert network.architecture.rule == row["rule"]


def test_the_dynamics_are_checked_where_there_are_any(rows):
    for row in rows:
        if row["rule"] == "bp":
            assert math.isnan(row["ode_gap"]) and row["flag"] == ""
        else:
            assert row["ode_reached"] == 1 and row["ode_gap"] < 1e-3 and row["ode_growth"] < 0
            assert row["flag"] == ""


def test_given_again_nothing_is_trained_again(study, selected, done, rows, capsys):
    arguments = [str(selected), f"seeds={SEEDS}", f"out_dir={study.folder}"]
    assert retrain.main(arguments) == 0
    assert "(0 to 1); 6 of 6 are done" in capsys.readouterr().out
    store = stores.connect(study.uri)
    again = runs.retrained(store, stores.find_study(store, study.study)).rows
    assert sorted(again["run_id"]) == sorted(row["run_id"] for row in rows)
    assert not list((study.folder / "retraining").rglob("*.msgpack"))


def test_a_study_that_is_resumed_leaves_retrained_seeds_alone(study, done, rows):
    """They are no trials of it: `tracking.Tracker.load` deletes what is there twice."""
    experiment = mlflow_store.open_store(study.uri, "disinhib", study.folder / "mlflow-artifacts")
    tracker = mlflow_store.Tracker(experiment, study.study, study.study, {}, {}, {})
    assert tracker.load() == set(range(len(planted.TRIALS)))
    store = stores.connect(study.uri)
    again = runs.retrained(store, stores.find_study(store, study.study)).rows
    assert len(again) == len(rows)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"trial": 4}, "trial 4 of planted: is pruned, needed is one that ran its whole budget"),
        ({"trial": 5}, "trial 5 of planted: is failed, needed is one that ran its whole budget"),
        ({"trial": 7}, "trial 7 of planted: is still running, needed is one"),
        ({"run_id": "0" * 32}, f"{'0' * 32}: no such run"),
        ({"study_run": "0" * 32}, f"study: given {'0' * 32}, allowed is one of planted"),
        ({"selected": None}, "is not what analysis.selection writes"),
        ({"tracking_uri": "postgresql://me:***@host/db"}, "missing, as .* keeps no passwords"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(edit, message, study, selected, tmp_path):
    content = yaml.safe_load(selected.read_text())
    if "trial" in edit:
        client = MlflowClient(tracking_uri=study.uri)
        wanted = f"tags.trial = '{edit['trial']}'"
        found = client.search_runs([client.get_run(study.run_id).info.experiment_id], wanted)
        edit = {"run_id": found[0].info.run_id}
    if "run_id" in edit:
        content["selected"][0]["run_id"] = edit["run_id"]
    else:
        content.update(edit)
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(Refused, match=message) as refusal:
        retrain.main([str(file), f"out_dir={tmp_path}"])
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["edited.yaml"]


def test_a_seed_of_the_search_is_refused(study, selected, tmp_path):
    seeds = f"seeds=[3,{study.seeds[4]}]"
    with pytest.raises(
        Refused, match=rf"given {study.seeds[4]}, which a search has used \(trial 4 of planted\)"
    ):
        retrain.main([str(selected), seeds, f"out_dir={tmp_path}"])


def test_fresh_seeds_pass_over_those_of_a_search():
    assert configurations.fresh_seeds(3, {0: "trial 0", 2: "trial 1"}) == [1, 3, 4]
    assert configurations.fresh_seeds([7, 5], {0: "trial 0"}) == [7, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "given nothing, needed is python -m analysis.retrain"),
        (["a.yaml", "b.yaml"], "given a.yaml b.yaml, needed is"),
        (["a.yaml", "experiment=table1"], "given a.yaml experiment=table1, needed is"),
        (["experiment=smoke"], "experiment: given smoke, allowed is one of smoke_table1, table1"),
        (["experiment=table1", "trainer=bp,bpp"], "trainer: given bpp, allowed is one or more of"),
        (["experiment=table1", "seeds=[1,1]"], "seeds: given .*a list of different ones"),
        (["experiment=table1", "seed=3", "epoch=3"], "epoch: unknown option; did you mean epochs"),
        (["experiment=table1", "cluster.cpus_per_trial=0"], "cluster.cpus_per_trial: given 0"),
        (["missing.yaml"], r"missing\.yaml: cannot be read \(No such file or directory\)"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.InputError, match=message) as refusal:
        retrain.main(given)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_selected_configurations_take_no_options_of_training(selected, tmp_path):
    with pytest.raises(Refused, match="epochs: selected configurations are trained as they were"):
        retrain.main([str(selected), "epochs=3", f"out_dir={tmp_path}"])


def test_a_grid_is_every_combination_that_is_asked_for():
    settings, _ = hydra_config.compose(configurations.CONFIG, ["experiment=table1"])
    axes, rest = configurations.chosen_axes(
        ["experiment=table1", "dataset=fmnist", "depth=1,3", "trainer=bp,lin-thresh-averaged"]
    )
    assert rest == ["experiment=table1"]
    planned = configurations.of_grid(settings, rest, axes)
    assert [(one.depth, one.rule, one.averaged) for one in planned] == [
        (1, "bp", "none"), (1, "lin-thresh", "true"), (3, "bp", "none"), (3, "lin-thresh", "true")
    ]  # fmt: skip
    assert len({one.configuration for one in planned}) == 4
    assert planned[1].command == (
        "python -m disinhib trainer=lin-thresh dataset=fmnist model/vf=dale"
        " model.vf.nb_hidden=1 trainer.average_fb_weights=true"
    )
    assert all(one.options["epochs"] == 50 for one in planned)


@pytest.mark.parametrize(
    "file",
    sorted((hydra_config.CONFIGURATIONS / "experiment").glob("*.yaml")),
    ids=lambda f: f.stem,
)
def test_every_experiment_says_what_to_expect_and_every_grid_composes(file):
    text = file.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"experiment={file.stem}" in head and "Expect" in head
    asked = f"experiment={file.stem}"
    if "\ngrid:" in text:
        axes, rest = configurations.chosen_axes([asked])
        planned = configurations.of_grid(configurations.checked_settings(rest), rest, axes)
        assert len(planned) == math.prod(len(names) for names in axes.values())


def test_a_seed_that_diverges_ends_alone(tmp_path, monkeypatch):
    """Planted: the second of two seeds, in its second epoch."""
    settings, _ = hydra_config.compose(configurations.CONFIG, [GRID[0], "epochs=3"])
    planned = configurations.of_grid(
        settings, [GRID[0], "epochs=3"], {"dataset": ["digits"], "depth": ["1"], "trainer": ["bp"]}
    )
    real = training.divergences

    def planted_divergences(run, metrics, state):
        return real(run, metrics, state) | ({1: "planted"} if int(state.epoch[0]) >= 2 else {})

    monkeypatch.setattr(training, "divergences", planted_divergences)
    planned_options = planned[0].options
    outcome = cell.train(planned_options, [4, 5], str(tmp_path / "a.msgpack"), 0)
    well, broken = outcome.seeds
    assert (well.seed, well.state, well.reason, len(well.epochs)) == (4, "complete", None, 3)
    assert (broken.seed, broken.state, broken.reason) == (5, "failed", "Diverged: planted")
    assert len(broken.epochs) == 1 and broken.model is None
    assert "test_accuracy" in well.epochs[-1][1] and "test_accuracy" not in broken.epochs[-1][1]


def finished_runs(folder):
    """Runs of retrained seeds in the store of `folder` that have their state."""
    if not (folder / "mlflow.db").exists():
        return []
    store = stores.connect(f"sqlite:///{folder / 'mlflow.db'}")
    return runs.retrained(store, stores.find_study(store)).rows.to_dict("records")


def kill_when(folder, programs, arguments, due):
    """Starts a retraining and ends it with SIGKILL as soon as `due()`."""
    driver = subprocess.Popen(
        command("retrain", *arguments), env=programs, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not due():
        assert driver.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


def test_a_killed_retraining_goes_on_without_a_lost_or_doubled_seed(tmp_path, programs):
    """Killed in mid-training, and as its first results are being written into MLflow."""
    arguments = [*GRID, "epochs=12", f"out_dir={tmp_path}"]
    kept = lambda: list((tmp_path / "retraining").rglob("*.msgpack"))
    kill_when(tmp_path, programs, arguments, kept)
    assert finished_runs(tmp_path) == []
    models = lambda: list((tmp_path / "mlflow-artifacts").rglob("model.msgpack"))
    kill_when(tmp_path, programs, arguments, models)
    assert len(finished_runs(tmp_path)) < 4
    done = subprocess.run(
        command("retrain", *arguments), env=programs, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = finished_runs(tmp_path)
    assert sorted((row["rule"], row["seed"]) for row in rows) == [
        ("bp", 0), ("bp", 1), ("exact-inv", 0), ("exact-inv", 1)
    ]  # fmt: skip
    store = stores.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    study = stores.find_study(store)
    assert len(stores.children(store, study)) == 4
    assert study.run.info.status == "FINISHED"
    for row in rows:
        for name in ("valid_accuracy", "train_CL_loss"):
            told = stores.history(store, row["run_id"], name)
            assert [entry.step for entry in told] == list(range(1, 13))
        assert json.loads(stores.text(store, row["run_id"], "provenance.json"))["code"]
    assert not kept()
    # What an uninterrupted run gives.
    whole = cell.train(
        _options_of(store, rows, "bp"), [0, 1], str(Path(tmp_path, "whole.msgpack")), 1e9
    )
    for seed in whole.seeds:
        row = next(row for row in rows if (row["rule"], row["seed"]) == ("bp", seed.seed))
        assert row["valid_loss"] == pytest.approx(seed.epochs[-1][1]["valid_loss"], rel=1e-5)


def _options_of(store, rows, rule):
    run_id = next(row["run_id"] for row in rows if row["rule"] == rule)
    return yaml.safe_load(stores.text(store, run_id, "config.yaml"))
