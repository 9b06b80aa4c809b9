"""Retraining, with the real Ray and MLflow: of a planted study's selection, and of a small grid."""

import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from functools import partial

import jax.numpy as jnp
import numpy as np
import planted
import pytest
import tiny
import yaml
from mlflow import MlflowClient
from mlflow_server import Outage, Server, wait
from ray import tune

import analysis
from analysis import configurations, retrain, runs, selection, store as stores
from analysis.store import Refused
from disinhib import config, data, errors, hydra_config, training
from disinhib.tuning import engine, environment, mlflow_connection, mlflow_store, outbox
from disinhib.tuning.event_log import OF_STUDY, Objective

source = tiny.source
pytestmark = pytest.mark.usefixtures("source", "copied_stores", "mlflow_here", "one_ray")

SELECTED = {"bp": 0, "exact-inv": 1, "lin-thresh": 2}  # the trials of `planted`
SEEDS = 2
ALONE = "cluster.max_concurrent=1"  # as each worker takes seconds to start
GRID = ("experiment=smoke_table1", "checkpoints.every_seconds=0", "trainer=bp,exact-inv")


def call(*arguments):
    """(exit code, what was printed)."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = retrain.main([str(argument) for argument in arguments])
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def study(copied_stores, tmp_path_factory):
    return planted.write(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def selected(study):
    file = study.folder / "selected.yaml"
    assert selection.main([f"selected={file}", f"tracking.uri={study.uri}"]) == 0
    return file


@pytest.fixture(scope="module")
def done(study, selected, mlflow_here, one_ray):
    """What the retraining printed."""
    code, printed = call(selected, f"seeds={SEEDS}", f"out_dir={study.folder}", ALONE)
    assert code == 0, printed
    return printed


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
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert (parent.info.run_name, parent.info.status) == ("planted-retrained", "FINISHED")
        assert run.data.tags[OF_STUDY] == opened[1].id
        assert run.info.status == "FINISHED"
        assert (row["state"], row["epochs"], row["budget"]) == ("complete", 2, 2)
        assert run.data.params == client.get_run(row["of_run"]).data.params


def test_a_retraining_is_no_study_to_analyse(opened):
    store, study = opened
    assert stores.find_study(store).name == study.name  # the newest
    assert len(runs.trials(store, study).rows) == len(planted.TRIALS) - 1


def test_it_says_how_it_went(done, rows):
    opened, *lines = done.splitlines()
    assert opened.startswith("study planted (digits, budget ")
    assert lines[0] == "3 configurations of 2 seeds (0 to 1)"
    for rule, trial in SELECTED.items():
        tests = [row["test_accuracy"] for row in rows if row["rule"] == rule]
        (line,) = (line for line in lines if line.startswith(f"{rule}, 1 hidden layer, digits"))
        mean = sum(tests) / len(tests)
        assert f"(trial {trial}): 2 of 2 seeds complete, test accuracy {mean:.2f} %" in line


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


def test_seeds_that_have_not_ended_are_named_by_their_configuration(opened, monkeypatch):
    present = stores.retrained(*opened)
    for run in present:
        if run.data.tags["rule"] == "lin-thresh":
            del run.data.tags["trial_state"]
    monkeypatch.setattr(stores, "retrained", lambda *_: present)
    rows, dropped = runs.retrained(*opened)
    assert set(rows["rule"]) == {"bp", "exact-inv"}
    name = f"lin-thresh, 1 hidden layer, digits (trial {SELECTED['lin-thresh']})"
    assert dropped == [f"{name}: the retraining of seeds 0, 1 has not ended"]


def test_a_seed_is_what_its_command_trains(study, rows):
    """The pasteable command composes to the options; trained alone it gives the lane's metrics."""
    row = next(row for row in rows if row["rule"] == "exact-inv" and row["seed"] == 1)
    words = shlex.split(row["command"])
    assert words[:3] == ["python", "-m", "disinhib"]
    composed, _ = hydra_config.compose(hydra_config.TRAINING, words[3:])
    epochs = []
    training.train(config.parse(composed), [row["seed"]], lambda _, metrics: epochs.append(metrics))
    for name in ("train_CL_loss", "valid_loss", "valid_accuracy", "test_accuracy"):
        assert row[name] == pytest.approx(float(epochs[-1][name][0]), rel=1e-4), name
    store = stores.connect(study.uri)
    kept = yaml.safe_load(stores.text(store, row["run_id"], "config.yaml"))
    assert {**kept, "out_dir": composed["out_dir"]} == composed


def test_a_model_loads_and_is_as_good_as_was_said(study, rows):
    test = data.load("digits", None, 0.2).test
    for row in (row for row in rows if row["seed"] == 0):
        network, parameters = analysis.study(study.run_id, study.uri).load(row["run_id"])
        output = network(parameters, jnp.asarray(test.images / 16, jnp.float32))
        right = np.mean(np.argmax(np.asarray(output), axis=1) == test.labels)
        assert 100 * right == pytest.approx(row["test_accuracy"], abs=1e-4)
        assert network.options["trainer"]["name"] == row["rule"]


def test_the_dynamics_are_checked_where_there_are_any(rows):
    for row in rows:
        if row["rule"] == "bp":
            assert math.isnan(row["ode_gap"]) and row["flag"] == ""
        else:
            assert row["ode_reached"] == 1 and row["ode_gap"] < 1e-3 and row["ode_growth"] < 0
            assert row["flag"] == ""


def test_given_again_nothing_is_trained_again(study, selected, done, rows):
    code, printed = call(selected, f"seeds={SEEDS}", f"out_dir={study.folder}")
    assert code == 0 and printed.splitlines()[-3:] == done.splitlines()[-3:]
    store = stores.connect(study.uri)
    again = runs.retrained(store, stores.find_study(store, study.study)).rows
    assert sorted(again["run_id"]) == sorted(row["run_id"] for row in rows)
    folder = study.folder / "planted-retrained"
    assert not [*folder.rglob("*.msgpack"), *folder.rglob("*.model")]


def test_selected_again_otherwise_seeds_say_so_without_training(study, selected, done, rows):
    store = stores.connect(study.uri)
    told = lambda: {
        row["rule"]: (row["rank"], row["group"], json.loads(row["selected_by"])["metric"])
        for row in runs.retrained(store, stores.find_study(store, study.study)).rows.to_dict(
            "records"
        )
    }
    first = told()
    file = study.folder / "otherwise.yaml"
    content = yaml.safe_load(selected.read_text()) | {"metric": "valid_loss"}
    (bp,) = (one for one in content["selected"] if one["trial"] == SELECTED["bp"])
    bp |= {"rank": 2, "group": {"trainer": "bp", "trainer.feedback": "random"}}
    file.write_text(yaml.safe_dump(content | {"selected": [bp]}))
    assert call(file, f"seeds={SEEDS}", f"out_dir={study.folder}")[0] == 0
    assert told() == first | {"bp": (2, "trainer.feedback=random", "valid_loss")}
    assert call(selected, f"seeds={SEEDS}", f"out_dir={study.folder}")[0] == 0
    assert told() == first  # also that it is of no group


def test_a_study_that_is_resumed_leaves_retrained_seeds_alone(study, opened, rows):
    """They are no trials of it: `MlflowStore.load` deletes what is there twice."""
    experiment = mlflow_connection.open_store(
        study.uri, "disinhib", study.folder / "mlflow-artifacts"
    )
    none = lambda number, seed: study.folder / "none"
    accuracy = Objective("valid_accuracy", 1)
    store = mlflow_store.MlflowStore(
        experiment,
        study.study,
        opened[1].id,
        accuracy,
        {"data_sha256": "0"},
        {},
        {},
        none,
    )
    store.load({})
    assert {number for number, _ in store.runs} == set(range(len(planted.TRIALS)))
    store = stores.connect(study.uri)
    again = runs.retrained(store, stores.find_study(store, study.study)).rows
    assert len(again) == len(rows)


# Refusals.


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
        wanted = f"tags.trial = '{edit['trial']}' AND tags.study = 'planted'"
        trials = client.search_runs([client.get_run(study.run_id).info.experiment_id], wanted)
        edit = {"run_id": trials[0].info.run_id}
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


def test_no_two_repeats_have_a_seed_in_common():
    most = configurations.MOST_SEEDS
    seeds = [configurations.fresh_seeds(most, {}, repeat) for repeat in (1, 2, 3)]
    assert len({seed for own in seeds for seed in own}) == 3 * most
    assert configurations.fresh_seeds([7, 5], {}, 2) == [most + 7, most + 5]
    with pytest.raises(Refused, match=r"given 7, which a search has used \(trial 3\)"):
        configurations.fresh_seeds([7, 5], {most + 7: "trial 3"}, 2)
    with pytest.raises(Refused, match=f"given {most}, allowed are seeds below {most}"):
        configurations.fresh_seeds([0, most], {}, 1)
    assert configurations.fresh_seeds([0, most], {}) == [0, most]  # without repeats, any
    with pytest.raises(
        Refused, match=f"given {most}, but in repeat 2 no search has used {most - 1}"
    ):
        configurations.fresh_seeds(most, {most: "trial 3"}, 2)


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


# Grids.


def test_a_grid_is_every_combination_that_is_asked_for():
    settings, _ = hydra_config.compose(configurations.CONFIG, ["experiment=table1"])
    axes, rest = configurations.chosen_axes(
        ["experiment=table1", "dataset=fmnist", "depth=1,3", "trainer=bp,lin-thresh-averaged"]
    )
    assert rest == ["experiment=table1"]
    planned = configurations.of_grid(settings, rest, axes)
    assert [(one.depth, one.rule, one.feedback) for one in planned] == [
        (depth, rule, feedback)
        for depth in (1, 3)
        for rule, feedback in (("bp", "none"), ("lin-thresh", "averaged"))
    ]
    assert len({one.id for one in planned}) == 4
    assert planned[1].command == (
        "python -m disinhib trainer=lin-thresh dataset=fmnist model/vf=dale"
        " model.vf.nb_hidden=1 trainer.average_fb_weights=true"
    )
    assert all(one.options["epochs"] == 50 for one in planned)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "per sample"),
        (["trainer.feedback=random"], "random"),
        (["trainer.feedback=learnt", "trainer.average_fb_weights=true"], "learnt"),
        (["trainer.feedback=sign-symmetric"], "sign-symmetric"),
        (
            ["trainer.feedback=sign-symmetric", "trainer.average_fb_weights=true"],
            "sign-symmetric, averaged",
        ),
    ],
)
def test_a_feedback_path_is_told_from_others(overrides, words):
    options, _ = hydra_config.compose("train", ["model/vf=dale", "trainer=exact-inv", *overrides])
    one = configurations.Configuration(options, "", "exact-inv", {})
    named = "" if words == "per sample" else f", {words} feedback"
    assert (one.feedback, one.words) == (words, f"exact-inv{named}, 3 hidden layers, digits")


@pytest.mark.parametrize("name", hydra_config.choices_of("experiment"))
def test_every_experiment_says_what_to_expect_and_every_grid_composes(name):
    text = (hydra_config.CONFIGURATIONS / f"experiment/{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    experiment = f"experiment={name}"
    assert experiment in head and "expect" in head.lower()
    if "\ngrid:" in text:
        axes, rest = configurations.chosen_axes([experiment])
        planned = configurations.of_grid(configurations.checked_settings(rest), rest, axes)
        assert len(planned) == math.prod(len(names) for names in axes.values())


def trained(uri, rules=("bp", "exact-inv")):
    """(rows of retrained seeds, the grid's own run, every epoch of every seed)."""
    store = stores.connect(uri)
    grid = stores.find_study(store)
    rows = runs.retrained(store, grid).rows.to_dict("records")
    rows = [row for row in rows if row["rule"] in rules]
    epochs = {
        (row["rule"], row["seed"]): [
            entry.step for entry in stores.history(store, row["run_id"], "valid_accuracy")
        ]
        for row in rows
    }
    assert len(epochs) == len(rows)  # no seed twice
    return rows, grid.run, epochs


def play(monkeypatch, trainable):
    """Retrainings play with `trainable`."""
    monkeypatch.setattr(engine, "run", partial(RUN, trainable=trainable))


RUN = engine.run


def acts_of(**acts):
    """A trainable whose trials do what is said of their rule."""

    class Acts(tiny.played()):
        def reset_config(self, new_config):
            return super().reset_config(
                {**new_config, "searched": acts.get(new_config["rule"], {})}
            )

    return Acts


def test_the_parts_of_a_grid_add_up(tmp_path, monkeypatch):
    play(monkeypatch, tiny.played())
    parts = [
        (["trainer=bp", "seeds=2"], {("bp", 0), ("bp", 1)}),
        (["trainer=bp,exact-inv", "seeds=[1,5]"], {("bp", 5), ("exact-inv", 1), ("exact-inv", 5)}),
        (["trainer=bp", "seeds=3"], {("bp", 2)}),
        (["trainer=exact-inv", "seeds=[5]"], set()),
    ]
    seeds, uri = set(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    for words, new in parts:
        code, printed = call(GRID[0], *words, ALONE, f"out_dir={tmp_path}")
        assert code == 0, printed
        rows, parent, epochs = trained(uri)
        assert {*epochs} - seeds == new and {*epochs} >= seeds
        seeds = {*epochs}
        assert set(map(tuple, epochs.values())) == {(1, 2)}
        assert {row["state"] for row in rows} == {"complete"}
        assert parent.info.status == "FINISHED"
    tags = MlflowClient(tracking_uri=uri).get_run(rows[0]["run_id"]).data.tags
    assert {runs.RANK, runs.GROUP, runs.SELECTED_BY}.isdisjoint(tags)  # nothing was selected


def test_what_raised_is_trained_again_and_a_seed_that_diverged_is_a_result(tmp_path, monkeypatch):
    words = [*GRID, "epochs=3", ALONE, f"out_dir={tmp_path}"]
    diverged = "1 of 2 seeds complete, test accuracy 50.00 %, seed 1 Diverged: planted"
    play(monkeypatch, acts_of(**{"bp": {"2": "diverge"}, "exact-inv": {"2": "raise"}}))
    code, printed = call(*words)
    assert code == 1 and "2 of 4 seeds are finished: run the command again" in printed
    assert "0 of 2 seeds complete, RuntimeError: planted" in printed and diverged in printed
    play(monkeypatch, tiny.played())
    code, printed = call(*words)
    assert code == 0 and printed.count("2 of 2 seeds complete") == 1
    assert "RuntimeError" not in printed and diverged in printed
    rows, _, epochs = trained(f"sqlite:///{tmp_path / 'mlflow.db'}", rules=["bp"])
    assert epochs == {("bp", 0): [1, 2, 3], ("bp", 1): [1]}
    ends = {row["seed"]: (row["state"], row["epochs"]) for row in rows}
    assert ends == {0: ("complete", 3), 1: ("failed", 1)}
    assert {row["seed"]: row["reason"] for row in rows}[1] == "Diverged: planted"


def test_what_other_code_has_begun_does_not_go_on(tmp_path, monkeypatch):
    class Interrupt(tune.Callback):
        def on_trial_result(self, **_):
            signal.raise_signal(signal.SIGINT)

    words = [GRID[0], "trainer=bp", f"out_dir={tmp_path}"]
    monkeypatch.setattr(
        engine, "run", partial(RUN, trainable=tiny.played(), callbacks=[Interrupt()])
    )
    assert call(*words)[0] == 130
    play(monkeypatch, tiny.played())
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "code_hash", lambda code: "other")
        with pytest.raises(errors.ConfigError, match="study: given one that other code has begun"):
            call(*words)
    code, printed = call(*words)
    assert code == 0 and "warning" not in printed
    monkeypatch.setattr(retrain, "code_hash", lambda code: "other")
    code, printed = call(*words)  # what is finished stands
    assert code == 0 and "warning: trial 0 was trained by other code" in printed


def test_a_killed_retraining_goes_on_without_a_lost_or_doubled_seed(tmp_path, mlflow_template):
    """Killed in the midst of real training, when it has a checkpoint."""
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    words = [GRID[0], "trainer=bp", "epochs=40", "batchsize=25", f"out_dir={tmp_path}"]
    words.append("checkpoints.every_seconds=0")  # compiled already: as in `done`
    driver = subprocess.Popen(
        [sys.executable, "-m", "analysis.retrain", *words],
        env={**os.environ, **environment.of_worker(1, 0)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    kept = lambda: [*tmp_path.glob("smoke-table1/checkpoints/*/*.msgpack")]
    wait(lambda: kept() or driver.poll() is not None)
    os.killpg(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    code, printed = call(*words)
    assert code == 0, printed
    assert "resumed with 0 of 1 trials ended; unfinished: trial 0" in printed
    rows, parent, epochs = trained(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert parent.info.status == "FINISHED"
    assert epochs == {("bp", seed): list(range(1, 41)) for seed in (0, 1)}
    store = stores.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for row in rows:
        assert json.loads(stores.text(store, row["run_id"], "provenance.json"))["code"]
    assert not [*kept(), *tmp_path.rglob("*.model")]
    # What an uninterrupted training gives.
    own = {row["seed"]: row for row in rows}
    options = yaml.safe_load(stores.text(store, own[0]["run_id"], "config.yaml"))
    whole = []
    training.train(config.parse(options), [0, 1], lambda _, metrics: whole.append(metrics))
    for lane, seed in enumerate((0, 1)):
        for name in ("valid_loss", "test_loss"):
            assert own[seed][name] == pytest.approx(float(whole[-1][name][lane]), rel=1e-5)


def test_an_outage_of_mlflow_in_its_midst_loses_nothing(tmp_path, mlflow_template, monkeypatch):
    server = Server(tmp_path, mlflow_template)
    server.start()
    monkeypatch.setattr(outbox, "RETRY", (0.2, 0.2))
    outage, last = Outage(server, tmp_path), 6
    waits = {3: tmp_path / Outage.AWAY, last: tmp_path / Outage.BACK}

    class Waits(tiny.played()):
        def step(self):
            mark = waits.get(self.epoch + 1)
            while mark is not None and not mark.exists():
                time.sleep(0.05)
            return super().step()

    play(monkeypatch, Waits)
    client = MlflowClient(server.uri)
    experiments = lambda: [each.experiment_id for each in client.search_experiments()]
    printed = io.StringIO()
    interference = threading.Thread(
        target=outage.run,
        args=(
            lambda: client.search_runs(experiments(), "tags.seed LIKE '%'"),
            lambda: "mlflow does not take records" in printed.getvalue(),
        ),
    )
    interference.start()
    try:
        words = [*GRID, f"epochs={last}", f"tracking.uri={server.uri}", f"out_dir={tmp_path}"]
        with redirect_stdout(printed):
            code = retrain.main(words)
        interference.join()
        assert code == 0, printed.getvalue()
        assert "mlflow answers again and has all records" in printed.getvalue()
        rows, parent, epochs = trained(server.uri)
    finally:
        server.stop()
    assert epochs == {
        (rule, seed): [*range(1, last + 1)] for rule in ("bp", "exact-inv") for seed in (0, 1)
    }
    assert {row["state"] for row in rows} == {"complete"}
    assert parent.info.status == "FINISHED"
