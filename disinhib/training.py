"""Training as a pure function of (configuration, seed) (DESIGN section 4).

`epoch` is one scan over the shuffled training set, for one lane: a configuration and a seed.
`advance` runs it, and the evaluations, over a leading axis of lanes. The compiled programs are kept
by their static `Architecture`, so that every run of a structure in a process shares them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from disinhib import data as datasets
from disinhib.alignment import alignment
from disinhib.checks import refusal
from disinhib.config import RunConfig
from disinhib.errors import one_line
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.losses import accuracy, bind, soft_targets
from disinhib.metrics import METRICS
from disinhib.network import Parameters, initial_parameters
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import FAMILIES, RuleState
from disinhib.solvers import open_loop

log = logging.getLogger(__name__)

# What training itself measures of an epoch.
RESERVED = {
    *("loss", "accuracy", "avg_solver_steps", "residual", "converged_share"),
    *("weight_norm", "largest_weight"),
}
EVALUATION_BATCH = 500  # samples; open loop only, so larger than a training batch

Metrics = dict[str, np.ndarray]


class Diverged(RuntimeError):
    """Training left the numbers that mean something: not finite, too large, or of samples that did
    not converge. The message names the quantity, the layer if it is one's, epoch and seed."""


class Images(NamedTuple):
    """One split on the device."""

    images: UInt8[Array, "n features"] | Float[Array, "n features"]
    labels: Int[Array, " n"]


class Data(NamedTuple):
    """A data set on the device; an image times `scale` lies in [0, 1]."""

    train: Images
    validation: Images
    test: Images
    train_subset: Images  # for the open-loop evaluation on training data; may be empty
    scale: Float[Array, ""]


class TrainingState(NamedTuple):
    """What an epoch takes and gives, for each lane; with `seed` it decides all that follows."""

    parameters: Parameters
    optimizer: Any
    rule: RuleState
    epoch: Int[Array, ""]  # epochs done
    seed: Int[Array, ""]


def check_data(config: RunConfig) -> None:
    """Raises what `prepare` does, but touches no device: for a driver, which trains nothing."""
    _check_fit(config, _shape_of_train(_source(config), datasets.version(config.dataset_path)))


def prepare(config: RunConfig) -> Data:
    """Loads the data set and puts it on the device, once a process.

    Raises data.DataError (files), ConfigError (a batch larger than the training set, inputs or
    outputs that are not the data set's).
    """
    share, version = config.evaluated_share_of_train, datasets.version(config.dataset_path)
    data, shape = _on_device(_source(config), share, version)
    _check_fit(config, shape)
    return data


_Source = tuple[str, str | None, float, int | None]  # the arguments of data.load


def _source(config: RunConfig) -> _Source:
    return config.dataset, config.dataset_path, config.valid_split, config.valid_seed


class _Shape(NamedTuple):
    """Of a training set."""

    samples: int
    features: int
    classes: int


def _shape_of(splits: datasets.Splits) -> _Shape:
    samples, features = splits.train.images.shape
    return _Shape(samples, features, splits.classes)


def _check_fit(config: RunConfig, shape: _Shape) -> None:
    architecture, name = config.architecture, config.dataset
    samples, features, classes = shape
    if architecture.batch_size > samples:
        raise refusal("batchsize", architecture.batch_size, f"1 to {samples} ({name})")
    if architecture.sizes[-1] != classes:
        raise refusal("dataset.dim_output", architecture.sizes[-1], f"{classes} ({name})")
    if architecture.sizes[0] != features:
        raise refusal("dataset.dim_input", architecture.sizes[0], f"{features} ({name})")


@lru_cache(maxsize=16)  # numbers only: a driver asks for many configurations of the same data
def _shape_of_train(source: _Source, version: Any) -> _Shape:
    """`version` is data.version of its path."""
    return _shape_of(datasets.load(*source))


@lru_cache(maxsize=8)  # repeats of a study may each have a split of their own
def _on_device(source: _Source, subset_share: float, version: Any) -> tuple[Data, _Shape]:
    """`version` is data.version of its path."""
    splits = datasets.load(*source)
    put = lambda split: Images(jnp.asarray(split.images), jnp.asarray(split.labels))
    subset = math.ceil(subset_share * len(splits.train.labels))
    data = Data(
        put(splits.train),
        put(splits.validation),
        put(splits.test),
        put(datasets.Split(splits.train.images[:subset], splits.train.labels[:subset])),
        jnp.asarray(splits.scale, float),
    )
    return data, _shape_of(splits)


def initial_state(config: RunConfig, seeds: Sequence[int]) -> TrainingState:
    """A fresh state with a lane for each seed."""
    hyper = as_arrays(config.hyperparameters)
    return _initial_state(config.architecture, hyper, jnp.asarray(seeds, jnp.int32))


@partial(jax.jit, static_argnums=0)
def _initial_state(architecture, hyper, seeds):
    def one(seed):
        keys = _keys(seed)
        parameters = initial_parameters(architecture, hyper.weight_scale, keys.initialisation)
        return TrainingState(
            parameters,
            OPTIMIZERS[architecture.optimizer].transformation(hyper.optimizer).init(parameters),
            FAMILIES[architecture.family].initial_state(architecture, hyper, keys.rule),
            jnp.zeros((), jnp.int32),
            seed,
        )

    return jax.vmap(one)(seeds)


class _Keys(NamedTuple):
    """Of a seed: for its initial weights, its data order, and its rule's initial state."""

    initialisation: PRNGKeyArray
    order: PRNGKeyArray
    rule: PRNGKeyArray


def _keys(seed) -> _Keys:
    key = jax.random.key(seed)
    return _Keys(*(jax.random.fold_in(key, use) for use in range(3)))


def as_arrays(hyper: Hyperparameters) -> Hyperparameters:
    """Exact dtypes: a Python number would be weakly typed and compile another program."""
    return jax.tree.map(lambda value: jnp.asarray(value, float), hyper)


def for_lanes(hyper: Hyperparameters, count: int) -> Hyperparameters:
    """The same scalars for each of `count` lanes."""
    return jax.tree.map(lambda value: jnp.full(count, value, float), hyper)


def epoch(
    architecture: Architecture, state: TrainingState, hyper: Hyperparameters, data: Data
) -> tuple[TrainingState, dict[str, Float[Array, ""]]]:
    """One pass over the training set in an order that (seed, epoch) decides; pure.

    Metrics describe the solution that the rule learnt from (closed loop; for bp open loop), mean
    over batches: loss, accuracy (per cent), solver iterations a sample, largest residual, share
    of samples converged, and the rule's own; and after the epoch the parameters' mean Frobenius
    norm and their largest absolute value (NaN if there is one). Images that do not fill a last
    batch sit this epoch out.
    """
    loss = bind(architecture.loss, hyper.loss).value
    family = FAMILIES[architecture.family]
    optimizer = OPTIMIZERS[architecture.optimizer].transformation(hyper.optimizer)

    def step(carry, batch):
        parameters, optimizer_state, rule_state = carry
        labels = data.train.labels[batch]
        x = data.train.images[batch].astype(data.scale.dtype) * data.scale
        target = soft_targets(labels, architecture.sizes[-1], hyper.soft_target)
        update = family.update(architecture, parameters, rule_state, hyper, x, target)
        changes: Any
        changes, optimizer_state = optimizer.update(update.gradients, optimizer_state, parameters)
        parameters, rule_state = family.step(hyper, parameters, changes, update.rule_state)
        solution = update.solution
        batch_metrics = {
            "loss": jnp.mean(loss(solution.state.u_y, target)),
            "accuracy": jnp.mean(accuracy(solution.state.u_y, labels)),
            "avg_solver_steps": jnp.mean(solution.iterations),
            "residual": jnp.max(solution.residual),
            "converged_share": jnp.mean(solution.converged),
        }
        if taken := RESERVED & update.metrics.keys():
            raise ValueError(f"metrics of {family.name}: {', '.join(taken)} is training's own")
        batch_metrics |= update.metrics
        return (parameters, optimizer_state, rule_state), batch_metrics

    samples, size = len(data.train.labels), architecture.batch_size
    order_key = jax.random.fold_in(_keys(state.seed).order, state.epoch)
    order = jax.random.permutation(order_key, samples)
    batches = order[: samples // size * size].reshape(-1, size)
    carry = (state.parameters, state.optimizer, state.rule)
    (parameters, optimizer_state, rule_state), metrics = jax.lax.scan(step, carry, batches)
    largest = jnp.max(metrics.pop("residual"))
    means = {name: jnp.mean(values) for name, values in metrics.items()}
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(parameters)]
    means |= {
        "residual": largest,
        "weight_norm": jnp.mean(jnp.stack([jnp.linalg.norm(leaf) for leaf in leaves])),
        "largest_weight": jnp.max(jnp.abs(jnp.concatenate(leaves))),
    }
    next_state = TrainingState(parameters, optimizer_state, rule_state, state.epoch + 1, state.seed)
    return next_state, means


def evaluate(
    architecture: Architecture,
    parameters: Parameters,
    hyper: Hyperparameters,
    split: Images,
    scale: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """Every entry of METRICS in open loop, mean over every sample of `split`."""
    loss = bind(architecture.loss, hyper.loss)
    samples = len(split.labels)
    chunks = -(-samples // EVALUATION_BATCH)
    # Wrap around to fill the last chunk; what is there twice counts once.
    index = jnp.arange(chunks * EVALUATION_BATCH)
    counts = (index < samples).reshape(chunks, -1)

    def chunk(indices):
        labels = split.labels[indices]
        x = split.images[indices].astype(scale.dtype) * scale
        output = open_loop(architecture, parameters, hyper, x).state.u_y
        target = soft_targets(labels, architecture.sizes[-1], hyper.soft_target)
        return {
            name: metric.value(loss, output, target, labels) for name, metric in METRICS.items()
        }

    values = jax.lax.map(chunk, (index % samples).reshape(chunks, -1))
    mean = lambda of_samples: jnp.sum(jnp.where(counts, of_samples, 0)) / samples
    return {name: mean(of_samples) for name, of_samples in values.items()}


def align(
    architecture: Architecture,
    state: TrainingState,
    hyper: Hyperparameters,
    split: Images,
    scale: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """`alignment.alignment` of the rule, on the first batch of `split`."""
    images, labels = (array[: architecture.batch_size] for array in split)
    target = soft_targets(labels, architecture.sizes[-1], hyper.soft_target)
    x = images.astype(scale.dtype) * scale
    return alignment(architecture, state.parameters, state.rule, hyper, x, target)


class Program(NamedTuple):
    """`run(architecture, lanes, *shared)` takes and gives pytrees with a leading axis of lanes;
    `lower` takes the same, or their shapes, and is jax's."""

    run: Callable[..., Any]
    lower: Callable[..., Any]


class Programs(NamedTuple):
    """Compiled by structure."""

    epoch: Program  # lanes of (states, hyperparameters); shared: data
    evaluate: Program  # lanes of (parameters, hyperparameters); shared: split, scale
    align: Program  # lanes of (states, hyperparameters); shared: split, scale


# YNNPACK's fusions take the soft rectifiers before a sum out of XLA's vectorised loops: an epoch of
# exact-inv takes a fifth longer with them (jaxlib 0.10.2).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
# An H200 runs 128 lanes of exact-inv (3 x 256) as fast with cuBLAS's own choice of kernels as with
# the best that timing finds, which takes 33 s instead of 10 s to compile, and is another one each
# time (jaxlib 0.11.2). Loops within a CUDA graph need not ask the host whether they go on: one lane
# is a fifth faster.
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
    "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}


def understood(options: Mapping[str, str | bool | int]) -> dict[str, str | bool | int]:
    """Those of XLA's compiler `options` that this jaxlib knows; warns of the others."""
    known = {}
    for name, value in options.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            log.warning("training may be slower: %s", one_line(error))
        else:
            known[name] = value
    return known


@lru_cache(maxsize=1)
def programs() -> Programs:
    """Made at first use, because they depend on the device, which is chosen after import."""
    if jax.default_backend() == "cpu":
        over_lanes = partial(_in_turn, understood(CPU_OPTIONS))
    else:
        over_lanes = partial(_at_once, understood(GPU_OPTIONS))

    def epoch_of(architecture, lane, data):
        state, hyper = lane
        return epoch(architecture, state, hyper, data)

    def evaluation_of(architecture, lane, split, scale):
        parameters, hyper = lane
        return evaluate(architecture, parameters, hyper, split, scale)

    def alignment_of(architecture, lane, split, scale):
        state, hyper = lane
        return align(architecture, state, hyper, split, scale)

    return Programs(over_lanes(epoch_of), over_lanes(evaluation_of), over_lanes(alignment_of))


def _at_once(options: Mapping[str, str | bool | int], function: Callable[..., Any]) -> Program:
    """Over all lanes in one program, compiled for their number."""

    @partial(jax.jit, static_argnums=0, compiler_options=dict(options))
    def run(architecture, lanes, *shared):
        return jax.vmap(lambda lane: function(architecture, lane, *shared))(lanes)

    return Program(run, run.lower)


def _in_turn(options: Mapping[str, str | bool | int], function: Callable[..., Any]) -> Program:
    """One lane after another, which keeps a CPU as busy as all at once, with the memory of one. Nor
    does the program, and so no bit of a result, depend on their number."""
    single = jax.jit(function, static_argnums=0, compiler_options=dict(options))

    def run(architecture, lanes, *shared):
        count = len(jax.tree.leaves(lanes)[0])
        return _stacked([single(architecture, _lane(lanes, n), *shared) for n in range(count)])

    def lower(architecture, lanes, *shared):
        return single.lower(architecture, jax.eval_shape(_lane, lanes, 0), *shared)

    return Program(run, lower)


@jax.jit
def _lane(lanes, number):
    return jax.tree.map(lambda leaf: leaf[number], lanes)


@jax.jit
def _stacked(lanes):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)


def programs_of(config: RunConfig, data: Data, state: TrainingState) -> str:
    """The programs that `advance` calls, described: runs with the same description share them."""
    lanes = 1 if jax.default_backend() == "cpu" else len(state.seed)
    arrays = jax.eval_shape(_lane, state, 0), data
    shapes = [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(arrays)]
    splits = _evaluated(config, data, at_end=True)
    described = [jax.__version__, config.architecture, lanes, *splits, config.alignment, *shapes]
    return " ".join(map(str, described))


def lowered_programs(
    config: RunConfig, data: Data, state: TrainingState
) -> list[jax.stages.Lowered]:
    """What `advance` calls, traced: once they are compiled, it compiles nothing."""
    hyper = for_lanes(config.hyperparameters, len(state.seed))
    lowered = [programs().epoch.lower(config.architecture, (state, hyper), data)]
    for split in _evaluated(config, data, at_end=True).values():
        lanes = (state.parameters, hyper)
        lowered.append(programs().evaluate.lower(config.architecture, lanes, split, data.scale))
    if config.alignment:
        probe = (config.architecture, (state, hyper), data.validation, data.scale)
        lowered.append(programs().align.lower(*probe))
    return lowered


def _evaluated(config: RunConfig, data: Data, at_end: bool) -> dict[str, Images]:
    """The splits that are evaluated after an epoch, by the prefix of their metrics."""
    splits = {"valid": data.validation}
    if config.evaluated_share_of_train:
        splits["train_OL"] = data.train_subset
    if config.test_at_end and at_end:
        splits["test"] = data.test
    return splits


def run_epoch(config: RunConfig, data: Data, state: TrainingState) -> tuple[TrainingState, Metrics]:
    """`advance` where one diverged lane ends all: raises Diverged with the first one's reason."""
    state, metrics = advance(config, data, state)
    reasons = divergences(config, metrics, state)
    if reasons:
        raise Diverged(reasons[min(reasons)])
    return state, metrics


def advance(
    config: RunConfig, data: Data, state: TrainingState, hyper: Hyperparameters | None = None
) -> tuple[TrainingState, Metrics]:
    """Trains one epoch and evaluates; metrics under the published names, each `[lanes]`.

    `hyper` has the scalars of each lane, if they are not those of `config`.

    `train_CL_*` describe training (closed loop), `valid_*` the open loop on the validation set,
    `train_OL_*` and `test_*` likewise where the configuration asks for them (the test set only
    after the last epoch of a lane), `alignment_*` the rule's update of the first validation batch,
    if asked for; `epoch_seconds` is the wall time of all of it. A lane that
    diverges does not touch the others: nothing is raised, `divergences` says which have.
    """
    start = time.perf_counter()
    if hyper is None:
        hyper = for_lanes(config.hyperparameters, len(state.seed))
    state, trained = programs().epoch.run(config.architecture, (state, hyper), data)
    metrics = {f"train_CL_{name}": np.asarray(values) for name, values in trained.items()}
    at_end = bool(np.any(np.asarray(state.epoch) == config.epochs))
    for name, split in _evaluated(config, data, at_end).items():
        lanes = (state.parameters, hyper)
        measured = programs().evaluate.run(config.architecture, lanes, split, data.scale)
        metrics |= {f"{name}_{what}": np.asarray(values) for what, values in measured.items()}
    if config.alignment:
        probe = (config.architecture, (state, hyper), data.validation, data.scale)
        measured = programs().align.run(*probe)
        metrics |= {name: np.asarray(values) for name, values in measured.items()}
    metrics["epoch_seconds"] = np.full(len(state.seed), time.perf_counter() - start)
    return state, metrics


def divergences(config: RunConfig, metrics: Metrics, state: TrainingState) -> dict[int, str]:
    """Lanes that have diverged, each with its reason, by what `advance` has given of an epoch."""
    reasons = {
        lane: divergence(config, {name: float(v[lane]) for name, v in metrics.items()}, state, lane)
        for lane in range(len(state.seed))
    }
    return {lane: reason for lane, reason in reasons.items() if reason is not None}


def divergence(
    config: RunConfig, metrics: Mapping[str, float], state: TrainingState, lane: int
) -> str | None:
    """Why a lane of `state` that has these `metrics` has diverged, if it has; causes (a layer) go
    before consequences."""
    where = lambda: f"in epoch {int(state.epoch[lane])} (seed {int(state.seed[lane])})"
    if not metrics["train_CL_largest_weight"] <= config.max_weight:  # nor is NaN
        parameters = {name: np.asarray(leaf[lane]) for name, leaf in state.parameters.items()}
        return _broken_layer(config, parameters, where())
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"{name} is {value} {where()}"
    share = metrics["train_CL_converged_share"]
    if share < config.min_converged_share:
        return (
            f"train_CL_converged_share is {share:.4f} {where()},"
            f" below min_converged_share={config.min_converged_share}"
        )
    return None


def _broken_layer(config: RunConfig, parameters: dict[str, np.ndarray], where: str) -> str:
    """Names the first layer with non-finite weights, else the one with the largest weight."""
    layers = [*map(str, range(config.architecture.hidden_layers)), "out"]
    names = [f"{kind}_{layer}" for layer in layers for kind in ("kernel", "bias")]
    largest = {name: np.max(np.abs(parameters[name])) for name in names if name in parameters}
    for name, value in largest.items():
        if not np.isfinite(value):
            return f"{name} has non-finite values {where}"
    name = max(largest, key=lambda name: largest[name])
    return (
        f"largest |weight| of {name} is {largest[name]:.6g} {where},"
        f" above max_weight={config.max_weight}"
    )


def train(
    config: RunConfig,
    seeds: Sequence[int],
    report: Callable[[TrainingState, Metrics], None],
    state: TrainingState | None = None,
) -> TrainingState:
    """Trains to `config.epochs`, from `state` if given; `report` is called after every epoch.

    Raises ConfigError, data.DataError, Diverged.
    """
    data = prepare(config)
    if state is None:
        state = initial_state(config, seeds)
    while int(state.epoch[0]) < config.epochs:
        state, metrics = run_epoch(config, data, state)
        report(state, metrics)
    return state
