"""Lanes: each is what it would be alone, whoever is beside it, joins or leaves."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from disinhib import checkpoint, compilation_cache, hydra_config, lanes, training
from disinhib.config import parse

TINY = ("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[16]", "batchsize=100", "epochs=3")


def configured(*overrides):
    return parse(hydra_config.compose("train", [*TINY, "model/vf=dale", *overrides])[0])


# One structure; the last diverges.
CONFIGS = {
    "exact": configured("trainer=exact-inv"),
    "threshold": configured(
        "trainer=lin-thresh", "optimizer.learning_rate=0.01", "trainer.feedback=learnt"
    ),
    "averaged": configured(
        "trainer=exact-inv", "trainer.average_fb_weights=true", "model.vf.g_EI=0.7"
    ),
    "diverging": configured("trainer=exact-inv", "optimizer.learning_rate=1e6"),
}
EXACT = CONFIGS["exact"]


def join(slots, name, seed=0):
    config = CONFIGS[name]
    state = training.initial_state(config, [seed])
    return lanes.join(slots, [name], state, config.hyperparameters)


def alone(name, epochs, seed=0):
    """(the state, metrics of each epoch) of a configuration that has no neighbours."""
    config = CONFIGS[name]
    data, state, told = training.prepare(config), training.initial_state(config, [seed]), []
    for _ in range(epochs):
        state, metrics = training.advance(config, data, state)
        told.append(metrics)
    return state, told


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def agree(metrics, expected):
    assert metrics.keys() == expected.keys()
    for name in metrics.keys() - {"epoch_seconds"}:
        assert metrics[name] == expected[name], name


def test_all_are_one_structure():
    (_,) = {config.architecture for config in CONFIGS.values()}


def test_a_lane_is_what_it_would_be_alone():
    """Of another age, joined in the midst, beside one that diverges, in a slot that was another's,
    before and after slots are compacted."""
    data = training.prepare(EXACT)
    slots = lanes.empty(EXACT, 4)
    slots = join(join(slots, "exact"), "diverging")
    slots, first = lanes.advance(EXACT, data, slots)
    slots = lanes.leave(slots, ["diverging"])
    slots = join(join(slots, "averaged"), "threshold", seed=7)
    assert slots.free == 1
    slots, second = lanes.advance(EXACT, data, slots)
    slots = lanes.leave(slots, ["exact"])
    slots = lanes.resized(slots, 2)
    assert (len(slots.names), slots.free) == (2, 0)
    slots, third = lanes.advance(EXACT, data, slots)
    told = {name: [e[name] for e in (first, second, third) if name in e] for name in CONFIGS}
    for name, seed in (("exact", 0), ("averaged", 0), ("threshold", 7), ("diverging", 0)):
        state, expected = alone(name, len(told[name]), seed)
        for metrics, other in zip(told[name], expected, strict=True):
            agree(metrics, other)
        if name in slots.names:
            same(lanes.state_of(slots, [name]), state)
    assert training.divergence(EXACT, told["diverging"][0], alone("diverging", 1)[0], 0)
    assert [len(told[name]) for name in CONFIGS] == [2, 2, 2, 1]


def test_what_has_left_does_not_go_on_in_its_slot():
    """Where it could hold up the others: a copy of one of them does."""
    slots = join(join(lanes.empty(EXACT, 3), "diverging"), "exact")
    slots, _ = lanes.advance(EXACT, training.prepare(EXACT), slots)
    slots = lanes.leave(slots, ["diverging"])
    assert slots.names == (None, "exact", None)
    for slot in (0, 2):
        of_slot = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], slots.state)
        same(of_slot, lanes.state_of(slots, ["exact"]))
    rates, own = slots.hyper.optimizer, EXACT.hyperparameters.optimizer
    np.testing.assert_array_equal(rates["learning_rate"], np.float32(own["learning_rate"]))
    assert lanes.leave(slots, ["exact"]).free == 3


def test_free_slots_hold_copies_of_all_lanes_in_turn():
    """Of one alone, it could be the one that takes longest."""
    state = training.initial_state(EXACT, [3, 4, 5])
    slots = lanes.join(lanes.empty(EXACT, 6), [*"abc"], state, EXACT.hyperparameters)
    seeds = lambda slots: np.asarray(slots.state.seed).tolist()
    assert seeds(slots) == [3, 4, 5, 3, 4, 5]
    assert seeds(lanes.leave(slots, ["a"])) == [4, 4, 5, 5, 4, 5]
    assert seeds(lanes.resized(lanes.leave(slots, ["a"]), 4)) == [4, 5, 4, 5]


def test_a_lane_goes_on_from_a_checkpoint_among_others(tmp_path):
    data, file = training.prepare(EXACT), tmp_path / "lane"
    slots = join(join(lanes.empty(EXACT, 2), "exact"), "averaged")
    slots, _ = lanes.advance(EXACT, data, slots)
    checkpoint.save(file, CONFIGS["averaged"], lanes.state_of(slots, ["averaged"]))
    restored = checkpoint.load(file, CONFIGS["averaged"]).state
    others = join(lanes.empty(EXACT, 2), "threshold")
    others = lanes.join(others, ["averaged"], restored, CONFIGS["averaged"].hyperparameters)
    others, told = lanes.advance(EXACT, data, others)
    agree(told["averaged"], alone("averaged", 2)[1][1])


def test_seeds_of_a_trial_join_and_leave_together():
    config = replace(EXACT, epochs=1, test_at_end=True)
    names = [("trial", seed) for seed in (3, 4)]
    state = training.initial_state(config, [3, 4])
    slots = lanes.join(lanes.empty(config, 4), names, state, config.hyperparameters)
    slots, told = lanes.advance(config, training.prepare(config), slots)
    expected, metrics = training.advance(config, training.prepare(config), state)
    same(lanes.state_of(slots, names), expected)
    for lane, name in enumerate(names):  # both ended with this epoch
        assert told[name]["test_accuracy"] == metrics["test_accuracy"][lane]


def test_the_test_set_is_for_lanes_at_their_end():
    config = replace(EXACT, epochs=2, test_at_end=True)
    data, slots = training.prepare(config), join(lanes.empty(config, 2), "exact")
    slots, told = lanes.advance(config, data, slots)
    assert "test_accuracy" not in told["exact"]
    slots, told = lanes.advance(config, data, join(slots, "threshold"))
    assert "test_accuracy" in told["exact"] and "test_accuracy" not in told["threshold"]


def test_more_lanes_than_slots_are_refused():
    slots = join(lanes.empty(EXACT, 1), "exact")
    with pytest.raises(ValueError, match="1 lanes for 0 free slots"):
        join(slots, "averaged")
    with pytest.raises(ValueError, match="1 slots for 2 lanes"):
        lanes.resized(join(join(lanes.empty(EXACT, 2), "exact"), "averaged"), 1)
    with pytest.raises(ValueError, match="exact: given, needed are new names"):
        join(join(lanes.empty(EXACT, 3), "exact"), "exact")


@pytest.fixture
def as_on_a_gpu(monkeypatch, recompiled):
    """All lanes in one program."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_lanes_in_one_program_are_what_they_would_be_alone(as_on_a_gpu, monkeypatch):
    """To float32's rounding (2.4e-7 measured); and each as if its neighbours were others."""
    data = training.prepare(EXACT)
    names = [*CONFIGS]
    slots = lanes.empty(EXACT, 4)
    for name in names:
        slots = join(slots, name)
    slots, told = lanes.advance(EXACT, data, slots)
    others = join(join(lanes.empty(EXACT, 4), "threshold"), "exact")
    others, again = lanes.advance(EXACT, data, others)
    for name in ("exact", "threshold"):
        agree(told[name], again[name])
    monkeypatch.undo()
    training.programs.cache_clear()
    for name in ("exact", "threshold", "averaged"):
        _, (expected,) = alone(name, 1)
        for metric in ("train_CL_loss", "valid_loss", "train_CL_weight_norm"):
            np.testing.assert_allclose(told[name][metric], expected[metric], rtol=1e-5)


def test_memory_grows_with_the_slots(as_on_a_gpu):
    data = training.prepare(EXACT)
    assert 0 < lanes.bytes_needed(EXACT, data, 1) < lanes.bytes_needed(EXACT, data, 4)


def test_the_program_that_shows_it_is_compiled_once_a_machine(as_on_a_gpu, monkeypatch):
    held = []

    @contextmanager
    def noted(program):
        held.append(program)
        yield
        held.append("compiled")

    monkeypatch.setattr(compilation_cache, "alone", noted)
    data = training.prepare(EXACT)
    lanes.bytes_needed(EXACT, data, 2)
    state = training.initial_state(EXACT, [0, 1])
    assert held == [training.programs_of(EXACT, data, state), "compiled"]


def test_memory_is_kept_within_a_limit(monkeypatch):
    data = training.prepare(EXACT)
    monkeypatch.setattr(lanes, "bytes_needed", lambda config, data, slots: 100 * slots)
    fitting = {limit: lanes.fitting(EXACT, data, 4, limit) for limit in (400, 399, 199, 0)}
    assert fitting == {400: 4, 399: 2, 199: 1, 0: 1}
