"""Training: lanes, order, what is traced, what is counted, what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disinhib import checkpoint, hydra_config, training
from disinhib.checks import POSITIVE, Option
from disinhib.config import parse
from disinhib.controller import CONTROLLERS
from disinhib.errors import ConfigError
from disinhib.losses import LOSSES, soft_targets
from disinhib.metrics import METRICS, Metric
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import FAMILIES, RULES, Family
from disinhib.solvers import open_loop

# The small programs of many structures: compiling them is what takes the time. The programs that
# users run, optimised, train in test_command_line and test_checkpoint.

TINY = ("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[16]", "batchsize=100", "epochs=2")
DALE = ("model/vf=dale", "trainer=exact-inv")


def configured(*overrides):
    return parse(hydra_config.compose("train", [*TINY, *overrides])[0])


@pytest.fixture(scope="module")
def tiny():
    return configured(*DALE)


def losses(config, seeds, epochs=2):
    data, state, kept = training.prepare(config), training.initial_state(config, seeds), []
    for _ in range(epochs):
        state, metrics = training.run_epoch(config, data, state)
        kept.append(metrics)
    return state, kept


def test_seeds_as_lanes_equal_separate_runs(tiny):
    together, metrics = losses(tiny, range(4))
    for seed in range(4):
        alone, own = losses(tiny, [seed])
        for lane, single in zip(
            jax.tree.leaves(together.parameters), jax.tree.leaves(alone.parameters), strict=True
        ):
            np.testing.assert_array_equal(lane[seed], single[0])
        for epoch in range(2):
            for name in ("train_CL_loss", "valid_loss", "valid_accuracy"):
                assert metrics[epoch][name][seed] == own[epoch][name][0]


def test_lanes_may_be_vmapped(tiny):
    """As they are on a GPU; a CPU takes one lane after another."""
    data, states = training.prepare(tiny), training.initial_state(tiny, [0, 5])
    hyper = training.as_arrays(tiny.hyperparameters)
    one_epoch = lambda state: training.epoch(tiny.architecture, state, hyper, data)
    vmapped, metrics = jax.jit(jax.vmap(one_epoch))(states)
    in_turn, own = training.run_epoch(tiny, data, states)
    for lane in range(2):
        # float32 sums in another order, over eleven steps of Adam
        for name, leaf in in_turn.parameters.items():
            found = vmapped.parameters[name][lane]
            np.testing.assert_allclose(found, leaf[lane], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["loss"][lane], own["train_CL_loss"][lane], rtol=1e-5)
        assert int(vmapped.epoch[lane]) == 1


def test_lanes_differ(tiny):
    _, metrics = losses(tiny, range(4), epochs=1)
    assert len(set(metrics[0]["train_CL_loss"].tolist())) == 4


def test_the_order_of_the_images_depends_on_seed_and_epoch(tiny):
    """With a learning rate of almost nothing, an epoch's y0 (lin-thresh: the last batch's mean
    rates) tells which images came last."""
    config = configured("model/vf=dale", "trainer=lin-thresh", "optimizer.learning_rate=1e-30")
    data = training.prepare(config)
    state = training.initial_state(config, [0, 1])
    # The same network in both lanes: only the order of the images can differ.
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), state.parameters)
    first, _ = training.run_epoch(config, data, state._replace(parameters=same))
    second, _ = training.run_epoch(config, data, first)
    again, _ = training.run_epoch(config, data, state._replace(parameters=same))
    (rates,), (later,), (same_rates,) = (end.rule.means for end in (first, second, again))
    assert not np.array_equal(rates[0], rates[1])
    assert not np.array_equal(rates[0], later[0])
    np.testing.assert_array_equal(rates, same_rates)


def test_hyperparameters_are_traced(tiny, compilations):
    """A second configuration of a structure compiles nothing."""
    losses(tiny, [0], epochs=1)
    other = configured(
        *DALE,
        *("optimizer.learning_rate=2e-3", "model.vf.g_EI=1.5", "model.vf.g_IE=0.7"),
        *("model.vf.actI.sharpness=2", "model.vf.controller.k_p=0.3", "trainer.norm_val=2"),
        *("model.vf.controller.k_i=1", "model.vf.weight_scale=2", "dataset.soft_target_val=0.9"),
    )
    assert other.architecture == tiny.architecture
    with compilations() as compiled:
        _, metrics = losses(other, [5], epochs=1)
    assert compiled == []
    assert np.isfinite(metrics[0]["train_CL_loss"]).all()


def test_strong_and_weak_feedback_are_one_program(tiny, compilations):
    """And differ: a nudged target leaves the output further from the label."""
    _, strong = losses(tiny, [0], epochs=1)
    with compilations() as compiled:
        _, weak = losses(configured(*DALE, "trainer.strong_fb=false"), [0], epochs=1)
    assert compiled == []
    assert weak[0]["train_CL_loss"] > strong[0]["train_CL_loss"]


@pytest.mark.parametrize("samples", [1, 500, 501])
def test_evaluation_counts_every_sample_once(samples):
    tiny = configured("model/vf=non-dale")  # the one that compiles soonest
    data = training.prepare(tiny)
    state = training.initial_state(tiny, [0])
    parameters = jax.tree.map(lambda leaf: leaf[0], state.parameters)
    hyper = training.as_arrays(tiny.hyperparameters)
    split = training.Images(data.train.images[:samples], data.train.labels[:samples])
    measured = jax.jit(training.evaluate, static_argnums=0)(
        tiny.architecture, parameters, hyper, split, data.scale
    )
    x = split.images * data.scale
    output = jax.jit(open_loop, static_argnums=0)(tiny.architecture, parameters, hyper, x).state.u_y
    target = soft_targets(split.labels, 10, 0.99)
    expected = LOSSES["softmax-cross-entropy"].value(output, target).mean()
    np.testing.assert_allclose(measured["loss"], expected, rtol=1e-5)
    hits = 100 * np.mean(np.argmax(output, axis=1) == split.labels)
    np.testing.assert_allclose(measured["accuracy"], hits, rtol=1e-6)


def test_published_names_of_the_metrics(tiny):
    _, (first, last) = losses(replace(tiny, evaluated_share_of_train=0.1, test_at_end=True), [0, 1])
    assert set(first) == {
        *("train_CL_loss", "train_CL_accuracy", "train_CL_avg_solver_steps"),
        *("train_CL_residual", "train_CL_converged_share", "train_CL_weight_norm"),
        "train_CL_largest_weight",
        *(f"{split}_{name}" for split in ("train_OL", "valid") for name in METRICS),
        "epoch_seconds",
    }
    # once, after the last epoch
    assert set(last) - set(first) == {f"test_{name}" for name in METRICS}
    assert {"loss", "accuracy"} <= set(METRICS)
    assert all(values.shape == (2,) for values in last.values())
    assert (last["train_CL_converged_share"] == 1).all()
    assert (last["train_CL_residual"] <= tiny.architecture.solver.tolerance).all()


def diverged(config, state):
    """The message with which the next epoch of `state` ends."""
    with pytest.raises(training.Diverged) as ended:
        training.run_epoch(config, training.prepare(config), state)
    return str(ended.value)


def with_weight(state, layer, lane, value):
    """`state` with one weight of a layer of one lane set."""
    new = np.array(state.parameters[layer])
    new.reshape(len(new), -1)[lane, 0] = value
    return state._replace(parameters={**state.parameters, layer: jnp.asarray(new)})


@pytest.fixture(scope="module")
def still():
    """Two hidden layers that hardly learn: an epoch leaves finite weights as they are."""
    return configured("optimizer=sgd", "optimizer.learning_rate=1e-30", "model.vf.nb_hidden=2")


def test_a_rate_that_is_too_high_ends_the_run_in_its_first_epoch():
    config = configured("optimizer=sgd", "optimizer.learning_rate=1e20")
    with pytest.raises(training.Diverged, match=r"^kernel_\w+ has .* in epoch 1 \(seed 7\)$"):
        training.train(config, [7], lambda *_: None)


def test_a_weight_that_is_not_finite_ends_the_run_of_its_lane(still):
    """Gradients carry it to every layer, of which the first is named."""
    state = training.initial_state(still, [5, 6])._replace(epoch=jnp.array([2, 2]))
    message = diverged(still, with_weight(state, "kernel_1", 1, np.nan))
    assert message == "kernel_0 has non-finite values in epoch 3 (seed 6)"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("broken", "first"),
    [
        (["bias_1", "kernel_1"], "kernel_1"),
        (["kernel_1", "bias_0"], "bias_0"),
        (["kernel_out", "bias_1"], "bias_1"),
        (["kernel_out"], "kernel_out"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(still, monkeypatch, value, broken, first):
    """As the last step of an epoch may leave them."""
    real = training.programs()

    def epoch(*arguments):
        state, metrics = real.epoch.run(*arguments)
        for layer in broken:
            state = with_weight(state, layer, 1, value)
        return state, {**metrics, "largest_weight": jnp.array([1.0, value])}

    monkeypatch.setattr(
        training, "programs", lambda: real._replace(epoch=real.epoch._replace(run=epoch))
    )
    message = diverged(still, training.initial_state(still, [5, 6]))
    assert message == f"{first} has non-finite values in epoch 1 (seed 6)"


@pytest.mark.parametrize("layer", ["kernel_0", "bias_1", "kernel_out"])
def test_a_weight_above_the_limit_ends_the_run_and_names_its_layer(still, layer):
    state = with_weight(training.initial_state(still, [5, 6]), layer, 1, -2500.0)
    assert diverged(still, state) == (
        f"largest |weight| of {layer} is 2500 in epoch 1 (seed 6), above max_weight=1000.0"
    )
    allowed = replace(still, max_weight=2500.0)
    _, metrics = training.run_epoch(allowed, training.prepare(allowed), state)
    largest = max(np.abs(leaf[0]).max() for leaf in state.parameters.values())
    np.testing.assert_array_equal(metrics["train_CL_largest_weight"], [largest, 2500])


def test_a_loss_that_is_not_finite_is_named_where_the_weights_are(monkeypatch, still):
    real = training.programs()

    def evaluate(*arguments):
        return {**real.evaluate.run(*arguments), "loss": jnp.array([1.0, np.inf])}

    patched = real.evaluate._replace(run=evaluate)
    monkeypatch.setattr(training, "programs", lambda: real._replace(evaluate=patched))
    state = training.initial_state(still, [5, 6])
    assert diverged(still, state) == "valid_loss is inf in epoch 1 (seed 6)"


def test_too_few_converged_samples_end_the_run_of_their_lane():
    """Two evaluations of the network are enough for some samples; a limit between the shares of
    two seeds ends the run of one."""
    hasty = configured(*DALE, "solver.max_iterations=2", "min_converged_share=0")
    data, state = training.prepare(hasty), training.initial_state(hasty, [0, 1])
    _, metrics = training.run_epoch(hasty, data, state)
    shares = metrics["train_CL_converged_share"]
    seed, limit = int(np.argmin(shares)), float(np.mean(shares))
    assert shares.min() < limit < shares.max()
    assert diverged(replace(hasty, min_converged_share=limit), state) == (
        f"train_CL_converged_share is {shares.min():.4f} in epoch 1 (seed {seed}),"
        f" below min_converged_share={limit}"
    )


def test_a_lane_that_diverges_leaves_the_other_alone(tiny):
    """The other's metrics and parameters are those of a run without it."""
    broken = with_weight(training.initial_state(tiny, [5, 6]), "kernel_out", 0, np.nan)
    data, alone = training.prepare(tiny), training.initial_state(tiny, [6])
    for epoch in (1, 2):
        broken, metrics = training.advance(tiny, data, broken)
        alone, own = training.run_epoch(tiny, data, alone)
        assert training.divergences(tiny, metrics, broken) == {
            0: f"kernel_0 has non-finite values in epoch {epoch} (seed 5)"
        }
        assert training.divergences(tiny, own, alone) == {}
        assert metrics.keys() == own.keys()
        for name in own.keys() - {"epoch_seconds"}:
            np.testing.assert_allclose(metrics[name][1], own[name][0], rtol=1e-5, err_msg=name)
        for name, leaf in alone.parameters.items():
            np.testing.assert_allclose(broken.parameters[name][1], leaf[0], rtol=1e-5, atol=1e-6)


def test_every_lane_that_has_diverged_is_named(still):
    state = training.initial_state(still, [5, 6, 7])
    state = with_weight(with_weight(state, "kernel_1", 0, np.inf), "bias_0", 2, 2500.0)
    state, metrics = training.advance(still, training.prepare(still), state)
    assert metrics["epoch_seconds"].shape == (3,)
    assert training.divergences(still, metrics, state) == {
        0: "kernel_0 has non-finite values in epoch 1 (seed 5)",
        2: "largest |weight| of bias_0 is 2500 in epoch 1 (seed 7), above max_weight=1000.0",
    }


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ConfigError, match=r"batchsize: given 1151, allowed is 1 to 1150 \(digits\)"
    ):
        training.prepare(configured("batchsize=1151"))


def test_outputs_that_are_not_the_classes_are_refused():
    with pytest.raises(
        ConfigError, match=r"dataset\.dim_output: given 5, allowed is 10 \(digits\)"
    ):
        training.prepare(configured("dataset.dim_output=5"))


# Structures that the tables' defaults would leave out.
SPECIAL = [
    ("model/vf=non-dale", "trainer=bp", "dataset/loss=mse", "optimizer=sgd"),
    ("model/vf=dale", "trainer=bp", "model.vf.use_bias=false"),
    ("model/vf=dale", "trainer=exact-inv", "model.vf.nb_hidden=0"),
    (
        *("model/vf=dale", "trainer=lin-thresh", "optimizer=sgd", "dataset/loss=mse"),
        *("trainer.average_fb_weights=true", "trainer.clip_fb_weights=true"),
        "trainer.strong_fb=false",
    ),
    (
        *("model/vf=dale", "trainer=taylor", "model/vf/controller=proportional"),
        *("model.vf.fb_to_readout=false",),
    ),
    (  # too short an integration to converge, but soon done
        *("model/vf=dale", "trainer=exact-inv", "solver=ode", "batchsize=575", "model.T=0.2"),
        *("min_converged_share=0",),
    ),
]


def combinations():
    """SPECIAL, and one for each entry of a table that is in none of them."""
    yield from SPECIAL
    named = {override for overrides in SPECIAL for override in overrides}
    groups = {
        **{"trainer": RULES, "optimizer": OPTIMIZERS, "dataset/loss": LOSSES},
        "model/vf/controller": CONTROLLERS,
    }
    for group, table in groups.items():
        for name in table:
            if f"{group}={name}" not in named:
                rule = name if group == "trainer" else "exact-inv"
                circuit = next(iter(RULES[rule].circuits))
                own = () if group == "trainer" else (f"{group}={name}",)
                yield (f"model/vf={circuit}", f"trainer={rule}", *own)


@pytest.mark.parametrize("overrides", [*combinations()], ids=" ".join)
def test_a_combination_trains(overrides):
    config = configured(*overrides)
    before = training.initial_state(config, [0])
    state, metrics = losses(config, [0], epochs=1)
    assert all(np.isfinite(values).all() for values in metrics[0].values())
    for name, leaf in state.parameters.items():
        assert not np.array_equal(leaf, before.parameters[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_training_learns(rule):
    """A rule that descends leaves chance (log 10 = 2.30) far behind in 15 epochs of digits; the
    slowest, taylor, came to 1.37 and 59 %."""
    circuit = next(iter(RULES[rule].circuits))
    config = configured(
        *(f"model/vf={circuit}", f"trainer={rule}", "optimizer.learning_rate=1e-2", "epochs=15"),
    )
    _, metrics = losses(config, [0], epochs=15)
    assert metrics[-1]["valid_loss"][0] < 1.6
    assert metrics[-1]["valid_accuracy"][0] > 50


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kolen_pollack_brings_its_two_weights_together(optimizer):
    """By the decay's share a batch, whatever the optimizer adds to both: float32 leaves 1e-6."""
    config = configured(
        *("trainer=kolen-pollack", "trainer.feedback_decay=0.05"),
        *(f"optimizer={optimizer}", "optimizer.learning_rate=0.01"),
    )
    begun = training.initial_state(config, [0])
    ended, _ = training.run_epoch(config, training.prepare(config), begun)
    apart = lambda state: state.rule.layered["kernel_out"] - state.parameters["kernel_out"]
    np.testing.assert_allclose(apart(ended), 0.95**11 * apart(begun), atol=1e-6)
    assert np.max(np.abs(ended.parameters["kernel_out"] - begun.parameters["kernel_out"])) > 0.05


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_feedback_alignment_keeps_its_weights(rule):
    config = configured(f"trainer={rule}")
    begun = training.initial_state(config, [0, 1])
    ended, _ = training.run_epoch(config, training.prepare(config), begun)
    for before, after in zip(jax.tree.leaves(begun.rule), jax.tree.leaves(ended.rule), strict=True):
        np.testing.assert_array_equal(before, after)
        assert not np.array_equal(before[0], before[1])  # every seed has its own


# --- What an entry may bring ---------------------------------------------------------------------


def test_a_new_metric_is_reported_of_every_split(monkeypatch, recompiled):
    share = Metric(lambda loss, output, target, labels: target[:, 0], 1, "first target", "")
    monkeypatch.setitem(METRICS, "first_target", share)
    config = replace(configured("model/vf=non-dale"), evaluated_share_of_train=0.1)
    _, (metrics,) = losses(config, [0], epochs=1)
    assert 0 < metrics["valid_first_target"][0] < 0.99
    assert "train_OL_first_target" in metrics


def with_draws(*arguments):
    """A rule that remembers a random key, and reports what it draws from it."""
    *rest, state, hyper, x, target = arguments
    update = FAMILIES["bp"].update(*rest, (), hyper, x, target)
    key, use = jax.random.split(state["key"])
    state = {"key": key, "batches": state["batches"] + 1, "nothing": None}
    draw = jax.random.uniform(use)
    return update._replace(rule_state=state, metrics={"draw": draw, "scale": hyper.rule["scale"]})


@pytest.fixture
def random_rule(monkeypatch, recompiled):
    start = lambda architecture, hyper, key: {
        "key": key, "batches": jnp.zeros((), jnp.int32), "nothing": None
    }  # fmt: skip
    own = (Option("scale", 2.0, POSITIVE, "dimensionless"),)
    family = Family("random", with_draws, options=own, initial_state=start)
    entry = RULES["bp"]._replace(name="random", family=family, options=own)
    monkeypatch.setitem(RULES, "random", entry)
    monkeypatch.setitem(FAMILIES, "random", family)
    options, _ = hydra_config.compose("train", TINY)
    return parse({**options, "trainer": {"name": "random", "scale": 3.0}})


def test_a_rule_may_be_random_and_report_metrics_of_its_own(random_rule, tmp_path, compilations):
    config = random_rule
    data, state = training.prepare(config), training.initial_state(config, [0, 1])
    first, metrics = training.advance(config, data, state)
    draws = metrics["train_CL_draw"]
    assert draws[0] != draws[1] and np.all((draws > 0.1) & (draws < 0.9))
    np.testing.assert_array_equal(metrics["train_CL_scale"], [3, 3])
    np.testing.assert_array_equal(first.rule["batches"], [11, 11])
    # A checkpoint holds such a state, and goes on with the same draws.
    checkpoint.save(tmp_path / "state", config, first)
    restored = checkpoint.load(tmp_path / "state", config).state
    assert jax.tree.structure(restored) == jax.tree.structure(first)
    with compilations() as compiled:
        _, once_more = training.advance(config, data, restored)
    _, second = training.advance(config, data, first)
    np.testing.assert_array_equal(once_more["train_CL_draw"], second["train_CL_draw"])
    assert compiled == []


def test_a_rules_metric_may_not_take_the_name_of_trainings(monkeypatch, random_rule):
    taken = lambda *arguments: with_draws(*arguments)._replace(metrics={"loss": jnp.ones(())})
    monkeypatch.setitem(FAMILIES, "random", FAMILIES["random"]._replace(update=taken))
    with pytest.raises(ValueError, match="metrics of random: loss is training's own"):
        losses(random_rule, [0], epochs=1)


def test_data_are_checked_without_a_device(monkeypatch):
    """Numbers only: a driver that trains nothing starts no backend."""
    monkeypatch.setattr(training, "jnp", None)
    monkeypatch.setattr(training, "jax", None)
    training.check_data(configured())
    for wrong in ("batchsize=1151", "dataset.dim_output=5", "dataset.dim_input=63"):
        with pytest.raises(ConfigError, match=f"{wrong.partition('=')[0]}: given"):
            training.check_data(configured(wrong))


def test_an_option_that_xla_does_not_know_is_left_out(caplog):
    name = "xla_made_up_by_a_test"
    for options in (training.CPU_OPTIONS, training.GPU_OPTIONS):
        assert training.understood({name: "", **options}) == options
    assert "training may be slower" in caplog.text and name in caplog.text


def test_training_runs_without_an_option_that_xla_does_not_know(monkeypatch, recompiled):
    monkeypatch.setattr(training, "CPU_OPTIONS", {"xla_made_up_by_a_test": ""})
    _, (metrics,) = losses(configured("model/vf=non-dale"), [0], epochs=1)
    assert np.isfinite(metrics["valid_loss"]).all()
