"""What a notebook or a script calls: training, loading, states, and studies as frames."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import planted
import pytest
import yaml

import analysis
import disinhib
from analysis import runs
from analysis.store import Refused
from disinhib import activations, checkpoint, data, export, hydra_config, training
from disinhib.config import parse
from disinhib.errors import ConfigError
from disinhib.tuning.event_log import COMPLETE, Ended, EpochDone

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SEEDS = (3, 1)
TINY = ["model.vf.nb_hidden=2", "model.vf.sizes_hidden=[12]", "batchsize=50", "epochs=2"]
CONFIGS = {
    "bp": ["trainer=bp", "optimizer.learning_rate=1e-2", *TINY],
    # A path with weights of its own, and gains that are not 1.
    "learnt": [
        *("model/vf=dale", "trainer=exact-inv", "trainer.feedback=learnt"),
        *("trainer.feedback_rate=0.1", "model.vf.g_EI=1.3", "model.vf.g_IE=0.7"),
        *("solver.tolerance=1e-5", *TINY),
    ],
}


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request):
    """(overrides, what `train` gave)."""
    overrides = CONFIGS[request.param]
    return overrides, disinhib.train(overrides, seeds=SEEDS)


@pytest.fixture(scope="module")
def learnt():
    return disinhib.train(CONFIGS["learnt"], seeds=[0])


@pytest.fixture(scope="module")
def images():
    """(inputs in [0, 1], labels) of the first digits."""
    split = data.load("digits").validation
    return jnp.asarray(split.images[:7] / 16, jnp.float32), split.labels[:7]


def test_training_gives_what_the_command_computes(trained):
    overrides, result = trained
    config = parse(hydra_config.compose("train", overrides)[0])
    epochs = []
    keep = lambda _, metrics: epochs.append(metrics)
    state = training.train(config, SEEDS, keep)
    table = result.metrics
    assert list(table.columns[:2]) == ["seed", "epoch"]
    assert [*zip(table["seed"], table["epoch"], strict=True)] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for lane, seed in enumerate(SEEDS):
        own = table[table["seed"] == seed]
        for name in set(epochs[0]) - {"epoch_seconds"}:
            assert own[name].tolist() == [float(metrics[name][lane]) for metrics in epochs], name
        for name, leaf in state.parameters.items():
            np.testing.assert_array_equal(result.parameters[seed][name], leaf[lane])
    assert result.network.architecture == config.architecture
    assert result.rule_states.keys() == result.parameters.keys() == {*SEEDS}


REFUSED = {
    "a text": ("epochs=1", {}, "config: given epochs=1, allowed is a list of overrides"),
    "a typo": (["epoch=1"], {}, "epoch: unknown option; did you mean epochs?"),
    "a folder": (["out_dir=here"], {}, "out_dir: given here, allowed is none: nothing is written"),
    "a device": (["device=gpu"], {}, "device: given gpu, allowed is none: it is jax's own here"),
    "two seeds": (["seed=1"], {"seeds": [2]}, "seed: given 1, allowed is none beside seeds=[2]"),
    "a number": ([], {"seeds": 3}, "seeds: given 3, allowed is different whole numbers"),
    "no seed": ([], {"seeds": []}, "seeds: given [], allowed is different whole numbers"),
    "one twice": ([], {"seeds": [1, 1]}, "seeds: given [1, 1], allowed is different whole"),
    "below 0": ([], {"seeds": [-1]}, "seeds: given [-1], allowed is different whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case):
    config, options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as no:
        disinhib.train(config, **options)
    assert "\n" not in str(no.value)


def test_a_process_that_trains_needs_no_ray_mlflow_or_optuna_and_keeps_its_settings():
    code = (
        "import jax, sys, disinhib; jax.config.update('jax_enable_x64', True);"
        "r = disinhib.train(['model.vf.sizes_hidden=[4]', 'epochs=1', 'seed=5']);"
        "print(*r.parameters, r.parameters[5]['kernel_0'].dtype, jax.config.jax_enable_x64,"
        " *{'ray', 'mlflow', 'optuna'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["5", "float32", "True"], run.stderr


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_is_loaded_by_its_folder_its_checkpoint_or_its_model(trained, images, tmp_path):
    overrides, result = trained
    config, options = parse(result.network.options), result.network.options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict(options)))
    parameters, rule_state = result.parameters[3], result.rule_states[3]
    began = training.initial_state(config, [3])
    own = {name: leaf for name, leaf in parameters.items() if name in began.parameters}
    lane = jax.tree.map(lambda leaf: leaf[None], (own, rule_state))
    state = began._replace(parameters=lane[0], rule=lane[1])
    checkpoint.save(tmp_path / "checkpoint.msgpack", config, state)
    (tmp_path / "model.msgpack").write_bytes(export.dump(options, parameters))
    x, labels = images
    closed = [labels] if "trainer=bp" not in overrides else []
    for path in (tmp_path, tmp_path / "checkpoint.msgpack", str(tmp_path / "model.msgpack")):
        network, loaded = disinhib.load(path)
        assert network == result.network
        same(loaded, parameters)
        for target in (None, *closed):
            same(network.states(loaded, x, target), result.network.states(parameters, x, target))


def test_a_checkpoint_without_its_options_is_refused(learnt, tmp_path):
    config = parse(learnt.network.options)
    file = tmp_path / "checkpoint.msgpack"
    checkpoint.save(file, config, training.initial_state(config, [0]))
    for path in (tmp_path, file):
        with pytest.raises(ConfigError, match=r"needs the options of its run in .*config\.yaml"):
            disinhib.load(path)
    other = {**learnt.network.options, "model": {**learnt.network.options["model"]}}
    other["model"]["vf"] = {**other["model"]["vf"], "sizes_hidden": [5]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ConfigError, match=r"model: .* is of another architecture: sizes"):
        disinhib.load(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**other, "plugins": ["mine.py"]}))
    with pytest.raises(ConfigError, match=r"needs plugin mine\.py: give plugins=\[FILE\]"):
        disinhib.load(tmp_path)


# The residual, 1e-5 at most, is relative to 1 + the layer's norm.
SETTLED: Any = {"rtol": 0, "atol": 1e-4}
FLOAT32: Any = {"rtol": 1e-5, "atol": 1e-6}


def test_open_loop_is_the_equilibrium_of_every_layer(trained, images):
    """Truth: the equations of DESIGN section 2, to the solver's tolerance or, of what is not solved
    for, that of float32."""
    overrides, result = trained
    parameters, network = result.parameters[3], result.network
    states = network.states(parameters, images[0])
    hyper = network.hyperparameters
    assert np.all(states.converged) and not np.any(states.control)
    np.testing.assert_allclose(states.u_y, network(parameters, images[0]), **FLOAT32)
    bounds = FLOAT32 if "trainer=bp" in overrides else SETTLED
    rate = images[0]
    for layer in range(2):
        a = rate @ parameters[f"kernel_{layer}"] + parameters[f"bias_{layer}"]
        if "trainer=bp" not in overrides:
            np.testing.assert_allclose(states.u_i[layer], 1.3 * states.r_e[layer], **bounds)
            a = a - 0.7 * states.r_i[layer]
        np.testing.assert_allclose(states.u_e[layer], a, **bounds)
        rate = states.r_e[layer]
        phi = activations.bind("softrelu", hyper.activation_e)
        np.testing.assert_allclose(rate, phi.value(states.u_e[layer]), rtol=1e-5)
        assert rate.shape == (7, 12)
    np.testing.assert_allclose(states.u_y, rate @ parameters["kernel_out"], **bounds)
    if "trainer=bp" in overrides:
        assert states.u_i == states.r_i == ()


def test_closed_loop_is_the_equilibrium_under_control_on_the_kept_weights(learnt, images):
    """Truth: c = (k_p + k_i / leak) e, and u_I = g_EI r_E - c Q, with Q of Frobenius norm 1."""
    x, labels = images
    parameters, network = learnt.parameters[0], learnt.network
    states = network.states(parameters, x, labels)
    assert np.all(states.converged)
    target = np.full((7, 10), 0.01 / 9)
    target[np.arange(7), labels] = 0.99
    error = target - jax.nn.softmax(states.u_y)
    np.testing.assert_allclose(states.control, (0.2 + 0.4) * error, **SETTLED)
    for layer in range(2):
        q = parameters[f"feedback_{layer}"]
        moved = states.control @ (q / np.linalg.norm(q))
        expected = 1.3 * states.r_e[layer] - moved
        np.testing.assert_allclose(states.u_i[layer], expected, **SETTLED)
    same(states, network.states(parameters, x, target.astype(np.float32)))
    opened = network.states(parameters, x)
    assert np.max(np.abs(states.u_i[1] - opened.u_i[1])) > 1e-3


def test_arrays_that_cannot_be_are_refused(trained, images):
    overrides, result = trained
    x, labels = images
    states = lambda *given: result.network.states(result.parameters[3], *given)
    wrong = {
        "x: given uint8 [7, 64], allowed is fractions": [(x * 16).astype(np.uint8)],
        "x: given float32 [64], allowed is fractions": [x[0]],
    }
    if "trainer=bp" in overrides:
        wrong["target: given one, allowed is none: bp has no closed loop"] = [x, labels]
    else:
        wrong |= {
            "target: given int32 [7], allowed is labels from 0 to 9": [x, labels + 9],
            "target: given int32 [6], allowed is labels from 0 to 9": [x, labels[:6]],
            "target: given float64 [7], allowed is labels from 0": [x, np.zeros(7)],
        }
        bare = {name: v for name, v in result.parameters[3].items() if "feedback" not in name}
        with pytest.raises(ConfigError, match=r"lacking feedback_0, feedback_1, .*=learnt"):
            result.network.states(bare, x, labels)
    for message, given in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            states(*given)


# Studies.


def retrained(record):
    """Two epochs of three seeds, of which one of a rule diverges."""
    seeds = record.config["seeds"]
    for epoch in (1, 2):
        scores = [80.0 - 3 * record.number + math.sin(seed) + epoch for seed in seeds]
        lanes = {"valid_accuracy": scores}
        if epoch == 2:
            lanes["test_accuracy"] = [score - 2 for score in scores]
        yield EpochDone(record.number, epoch, 0.0, lanes, planted.PLACE)
        record.scores.append(0.0)
    yield Ended(record.number, COMPLETE, 2, None, record.seed_ends(COMPLETE, None))


@pytest.fixture(scope="module")
def written(copied_stores, tmp_path_factory):
    """A planted study, its best trials retrained over three seeds; in `out` of its folder."""
    folder = tmp_path_factory.mktemp("planted") / "out"
    folder.mkdir()
    store = planted.write(folder)
    planted.retrain(store, range(3), retrained)
    return store


@pytest.fixture(scope="module")
def study(written):
    return analysis.study(tracking_uri=written.uri)


def test_a_study_is_frames_of_trials_best_and_retrained(study, written):
    assert repr(study).startswith("study planted (digits, budget 2 epochs")
    with pytest.warns(UserWarning, match="study planted: left out: trial 7: it has not ended"):
        trials = study.trials
    table = runs.trials(study.store, study.run).rows
    assert list(trials.columns) == list(table.columns) and len(trials) == 7
    rates = trials["searched.exact-inv.optimizer.learning_rate"]
    assert rates.dropna().tolist() == [0.004, 0.004]  # numbers, as text in MLflow
    assert trials["searched.exact-inv.trainer.strong_fb"].dropna().tolist() == [True, True]
    assert study.best["trial"].tolist() == [0, 1, 2]
    assert study.best["score"].tolist() == [90.0, 85.0, 80.0]
    again = study.retrained
    assert sorted(zip(again["trial"], again["seed"], strict=True)) == [
        (trial, seed) for trial in range(3) for seed in range(3)
    ]
    assert study.metric == "valid_accuracy"


def test_curves_are_every_metric_of_trials_and_retrained_seeds(study):
    curves = study.curves
    columns = ["run_id", "trial", "rule", "retrained", "seed", "metric", "epoch", "value"]
    assert list(curves.columns) == columns
    searched = curves[~curves["retrained"]]
    scores = searched[searched["metric"] == "valid_accuracy"]
    for number, trial in enumerate(planted.TRIALS):  # also of the one that still runs
        own = scores[scores["trial"] == number]
        assert own["value"].tolist() == list(trial.scores)
        assert own["epoch"].tolist() == [*range(1, len(trial.scores) + 1)]
    assert "test_accuracy" in set(searched[searched["trial"] == 3]["metric"])
    again = curves[curves["retrained"] & (curves["metric"] == "valid_accuracy")]
    for row in again.to_dict("records"):
        value = 80.0 - 3 * row["trial"] + math.sin(row["seed"]) + row["epoch"]
        assert row["value"] == pytest.approx(value, abs=1e-12)
    assert len(again) == 3 * 3 * 2


def test_the_command_writes_the_same_as_csv_and_parquet(study, written, tmp_path, capsys):
    files = {form: (tmp_path / f"runs.{form}", tmp_path / f"curves.{form}") for form in READ}
    for out, curves in files.values():
        given = [f"tracking.uri={written.uri}", f"out={out}", f"curves={curves}"]
        assert runs.main(given) == 0
        assert f"written: {curves}" in capsys.readouterr().out
    table = runs.trials(study.store, study.run).rows
    for form, (out, curves) in files.items():
        assert READ[form](out)["score"].equals(table["score"])
        pd.testing.assert_frame_equal(READ[form](curves), study.curves)
    with pytest.raises(
        ConfigError, match=r"curves: given c\.xlsx, allowed is a file named \*\.csv"
    ):
        runs.main(["curves=c.xlsx"])


READ = {"csv": pd.read_csv, "parquet": pd.read_parquet}


def test_a_study_that_is_not_there_and_a_run_without_a_model_are_refused(study, written):
    with pytest.raises(Refused, match="study: given planetd, allowed is one of planted"):
        analysis.study("planetd", written.uri)
    with pytest.raises(Refused, match=r"cannot read its model\.msgpack"):
        study.load(study.best["run_id"][0])


def test_importing_analysis_leaves_mlflow_and_jax_alone():
    code = (
        "import sys, analysis; print(callable(analysis.study), *{'jax','mlflow'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"]


assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_as_it_stands(notebook, written, tmp_path):
    """In a process and a folder of its own, at the place that it has in the checkout."""
    cells = [
        c for c in json.loads(notebook.read_text("utf-8"))["cells"] if c["cell_type"] == "code"
    ]
    assert not any(cell["outputs"] for cell in cells)
    place = tmp_path / "docs" / "notebooks"
    place.mkdir(parents=True)
    shutil.copytree(written.folder, tmp_path / "out")
    (place / "cells.py").write_text("\n".join("".join(cell["source"]) + "\n" for cell in cells))
    own = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    words = [sys.executable, "cells.py"]
    run = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    said = {
        "compare-two-rules": r"bp: -3\.00 \(paired by seed\)\n95 % interval: nan to nan\n",
        "look-inside-a-network": r"lin-thresh \{'ode_gap': '\S+', 'ode_reached': '1',",
    }
    assert re.search(said[notebook.stem], run.stdout)


def test_the_page_names_the_notebooks_which_have_no_path_of_a_machine():
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    for notebook in NOTEBOOKS:
        assert f"notebooks/{notebook.name}" in page
        assert not re.search(r"/(home|tmp|work|Users)/", notebook.read_text("utf-8"))
