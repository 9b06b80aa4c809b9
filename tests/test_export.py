"""Trained models as files: what they compute, and what is refused."""

import json
import pickletools
import subprocess
import sys
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import disinhib
from disinhib import export, hydra_config, training
from disinhib.config import parse
from disinhib.errors import ConfigError

TINY = ("model.vf.nb_hidden=2", "model.vf.sizes_hidden=[16]", "batchsize=20", "epochs=1")
TRAINED = {
    "bp": ("model/vf=non-dale", "trainer=bp", "optimizer.learning_rate=1e-2", *TINY),
    "exact-inv": (
        *("model/vf=dale", "trainer=exact-inv", "model.vf.use_bias=false"),
        *("model.vf.g_EI=1.7", "optimizer.learning_rate=1e-2", *TINY),
    ),
}


def composed(rule):
    return hydra_config.compose("train", TRAINED[rule])[0]


@pytest.fixture(scope="module", params=TRAINED)
def trained(request):
    """(options, one lane's parameters) after an epoch on digits."""
    options = composed(request.param)
    state = training.train(parse(options), [3], lambda *_: None)
    return options, jax.tree.map(lambda leaf: leaf[0], state.parameters)


@pytest.fixture
def plain():
    """(options, parameters) of a network that nobody trained."""
    options = composed("bp")
    state = training.initial_state(parse(options), [0])
    return options, jax.tree.map(lambda leaf: leaf[0], state.parameters)


def written(folder, content):
    path = folder / "model.msgpack"
    path.write_bytes(content)
    return path


def test_a_loaded_model_is_the_network_that_was_trained(trained, tmp_path):
    options, parameters = trained
    config = parse(options)
    network, loaded = disinhib.load(str(written(tmp_path, export.dump(options, parameters))))
    assert network.architecture == config.architecture
    assert network.hyperparameters == config.hyperparameters
    assert (network.dataset, network.options) == ("digits", options)
    assert loaded.keys() == parameters.keys()
    for name, leaf in parameters.items():
        assert loaded[name].dtype == leaf.dtype
        np.testing.assert_array_equal(loaded[name], leaf)

    data = training.prepare(config)
    split, hyper = data.validation, training.as_arrays(config.hyperparameters)
    output = network(loaded, split.images * data.scale)
    hits = np.argmax(output, axis=1) == np.asarray(split.labels)
    measure = jax.jit(partial(training.evaluate, config.architecture))
    measured = measure(parameters, hyper, split, data.scale)
    assert output.shape == (len(hits), 10)
    np.testing.assert_allclose(100 * hits.mean(), measured["accuracy"], rtol=1e-6)
    assert hits.mean() > 0.3  # it has learnt something: chance is 0.1


def test_a_network_of_a_model_compiles_once(plain, tmp_path, compilations):
    path = written(tmp_path, export.dump(*plain))
    x = jnp.ones((3, 64))
    network, parameters = disinhib.load(path)
    first = network(parameters, x)
    with compilations() as compiled:
        again, same = disinhib.load(path)
        second = again(same, x)
    np.testing.assert_array_equal(first, second)
    assert compiled == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_parameters_keep_their_dtype(plain, tmp_path, dtype):
    options, parameters = plain
    with jax.enable_x64(True):
        cast = {name: jnp.asarray(leaf, dtype) for name, leaf in parameters.items()}
        _, loaded = disinhib.load(written(tmp_path, export.dump(options, cast)))
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype(dtype)}


def test_the_file_is_no_pickle_and_its_options_are_json(plain):
    options, parameters = plain
    content = export.dump(options, parameters)
    with pytest.raises(ValueError):  # noqa: PT011  pickletools says only this of other bytes
        list(pickletools.genops(content))
    restored: Any = serialization.msgpack_restore(content)
    assert json.loads(restored["options"]) == options
    assert restored["format"] == export.FORMAT
    assert all(isinstance(leaf, np.ndarray) for leaf in restored["parameters"].values())


def refused(path, named=None):
    """The one line with which loading `path` ends, without its beginning, which names it."""
    with pytest.raises(ConfigError) as error:
        disinhib.load(path)
    message = str(error.value)
    begin = f"model: given {named or path}, "
    assert message.startswith(begin) and "\n" not in message
    return message.removeprefix(begin)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    missing = tmp_path / "model.msgpack"
    assert refused(missing) == "cannot be read (No such file or directory)"
    assert refused(str(missing)) == "cannot be read (No such file or directory)"
    message = refused(tmp_path, tmp_path / "checkpoint.msgpack")
    assert message == "cannot be read (No such file or directory)"


NO_MODELS = {
    "nothing": b"",
    "text": b"not a model",
    "a list": serialization.msgpack_serialize([1, 2]),
    "no parts": serialization.msgpack_serialize({}),
    "options that are no JSON": serialization.msgpack_serialize(
        {"format": 1, "options": "{", "parameters": {}}
    ),
    "options that are a list": serialization.msgpack_serialize(
        {"format": 1, "options": "[1]", "parameters": {}}
    ),
    "parameters that are no arrays": serialization.msgpack_serialize(
        {"format": 1, "options": "{}", "parameters": {"kernel_out": "large"}}
    ),
}


@pytest.mark.parametrize("content", NO_MODELS.values(), ids=NO_MODELS.keys())
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    assert refused(written(tmp_path, content)).startswith("which is no model (")


def test_a_part_of_a_model_is_refused(plain, tmp_path):
    content = export.dump(*plain)
    assert refused(written(tmp_path, content[:-100])).startswith("which is no model (")


def test_another_format_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FORMAT", 2)
    content = export.dump(*plain)
    monkeypatch.undo()
    assert refused(written(tmp_path, content)) == "of format 2, readable is 1"


def test_an_option_that_cannot_be_is_refused(plain, tmp_path):
    options, parameters = plain
    content = export.dump({**options, "epochs": 0}, parameters)
    assert refused(written(tmp_path, content)) == (
        "with an option that cannot be: epochs: given 0, allowed is a whole number of at least 1"
    )


def test_parameters_that_do_not_fit_the_options_are_refused(plain, tmp_path):
    options, parameters = plain
    wrong = {name: leaf for name, leaf in parameters.items() if name != "bias_1"}
    wrong |= {"kernel_0": parameters["kernel_0"][:, :8], "kernel_7": parameters["kernel_out"]}
    assert refused(written(tmp_path, export.dump(options, wrong))) == (
        "whose parameters do not fit its options: bias_1 none (needed (16,)),"
        " kernel_0 (64, 8) (needed (64, 16)), kernel_7 (16, 10) (needed none)"
    )


def test_importing_the_package_leaves_jax_alone():
    """jax reads its environment when it is imported; analysis.replay sets it first."""
    code = "import sys, disinhib; print('jax' in sys.modules, callable(disinhib.load))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]


def test_a_network_cannot_be_changed(plain, tmp_path):
    network, _ = disinhib.load(written(tmp_path, export.dump(*plain)))
    for field in fields(network):
        with pytest.raises(AttributeError):
            setattr(network, field.name, None)
