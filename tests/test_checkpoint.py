"""Checkpoints: bit for bit, atomic, without pickle, and only for their own architecture."""

import pickletools
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import serialization

from disinhib import checkpoint, files, hydra_config, training
from disinhib.config import parse
from disinhib.errors import ConfigError


@pytest.fixture(scope="module")
def config():
    options, _ = hydra_config.compose(
        "train",
        [
            *("model/vf=dale", "trainer=lin-thresh", "trainer.avg_inh_lambda=0.3", "epochs=4"),
            "trainer.feedback=learnt",  # so that the rule has weights of its own
            *("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[8]", "batchsize=100"),
        ],
    )
    return parse(options)


# Of two epochs; numbers that a text could lose digits of.
RESULTS = [{"valid_loss": 1 / 3, "epoch_seconds": 1e-300}, {"valid_loss": 0.1 + 0.2}]


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in leaves)


def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(config, tmp_path):
    path = tmp_path / "state.msgpack"
    kept = {}

    def keep(state, metrics):
        kept[int(state.epoch[0])] = {k: v for k, v in metrics.items() if k != "epoch_seconds"}
        if int(state.epoch[0]) == 2:
            checkpoint.save(path, config, state, RESULTS)

    whole = training.train(config, [3, 4], keep)
    uninterrupted = dict(kept)
    restored, results = checkpoint.load(path, config)
    assert int(restored.epoch[0]) == 2 and restored.seed.tolist() == [3, 4]
    assert results == RESULTS
    resumed = training.train(config, [3, 4], keep, restored)
    assert same(whole, resumed)
    for epoch in (3, 4):
        assert same(uninterrupted[epoch], kept[epoch])


def test_the_file_is_no_pickle(config, tmp_path):
    path = tmp_path / "state.msgpack"
    checkpoint.save(path, config, training.initial_state(config, [0]))
    with pytest.raises(ValueError):  # noqa: PT011  pickletools says only this of other bytes
        list(pickletools.genops(path.read_bytes()))


def test_a_write_that_fails_leaves_the_old_file(config, tmp_path, monkeypatch):
    path = tmp_path / "state.msgpack"
    first = training.initial_state(config, [0])
    checkpoint.save(path, config, first)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, config, training.initial_state(config, [1]))
    assert [file.name for file in tmp_path.iterdir()] == ["state.msgpack"]
    loaded = checkpoint.load(path, config)
    assert same(loaded.state, first) and loaded.results == []


def test_another_architecture_is_refused_with_the_difference(config, tmp_path):
    path = tmp_path / "state.msgpack"
    checkpoint.save(path, config, training.initial_state(config, [0]))
    structure = replace(config.architecture, sizes=(64, 9, 10))
    with pytest.raises(ConfigError) as refused:
        checkpoint.load(path, replace(config, rule="exact-inv", architecture=structure))
    message = str(refused.value)
    assert "rule lin-thresh (checkpoint) and exact-inv (this run)" in message
    assert "sizes (64, 8, 10) (checkpoint) and (64, 9, 10) (this run)" in message
    assert "optimizer" not in message and "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\x81\xa5state\x01"])
def test_a_file_that_is_no_checkpoint_is_refused(config, tmp_path, content):
    path = tmp_path / "state.msgpack"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"resume: given .*, which (does not exist|is no check)"):
        checkpoint.load(path, config)


@pytest.mark.parametrize("parents_and_part", [("state", "parameters", "kernel_0"), ("results",)])
def test_a_checkpoint_that_lacks_a_part_is_refused(config, tmp_path, parents_and_part):
    path = tmp_path / "state.msgpack"
    checkpoint.save(path, config, training.initial_state(config, [0]))
    content: Any = serialization.msgpack_restore(path.read_bytes())
    *parents, part = parents_and_part
    inner = content
    for parent in parents:
        inner = inner[parent]
    del inner[part]
    path.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ConfigError, match="which is no checkpoint") as refused:
        checkpoint.load(path, config)
    assert "\n" not in str(refused.value)


def test_a_truncated_checkpoint_is_refused(config, tmp_path):
    path = tmp_path / "state.msgpack"
    checkpoint.save(path, config, training.initial_state(config, [0]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="which is no checkpoint"):
        checkpoint.load(path, config)
