"""Shapes are checked in tests only; numerics run in float64 where a module asks for it.

All processes of the suite share what they compile, and keep it for its next run in .pytest_cache;
none of them sees or touches what is in the user's home.
"""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Every module of the core checks its annotations with beartype, at trace time: nothing of it
# reaches a subprocess, a Ray worker or a user. Must stand before the first import of disinhib.
PACKAGE = Path(__file__).resolve().parents[1] / "disinhib"
BORDERS = {"tuning", "__main__", "hydra_config", "interactive"}  # know Ray, MLflow, Optuna or Hydra
MODULES = (file.relative_to(PACKAGE.parent).with_suffix("") for file in PACKAGE.rglob("*.py"))
CORE = sorted(
    ".".join(module.parts).removesuffix(".__init__")
    for module in MODULES
    if not BORDERS & {*module.parts} and module.parts != ("disinhib", "__init__")
)
install_import_hook(CORE, "beartype.beartype")

from disinhib import compilation_cache  # noqa: E402

KEPT = PACKAGE.parent / ".pytest_cache"  # between runs of the suite
KEPT_BYTES = 500_000_000
PROGRAMS = {
    compilation_cache.FOLDER_VARIABLE: str(KEPT / "xla" / compilation_cache.processor()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # XLA compiles in half the time, and what it makes is fast enough for small networks.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
# Variables of the user's shell that a study would follow.
FOLLOWED = ("MLFLOW_TRACKING_URI", "JAX_ENABLE_X64", "JAX_PLATFORMS", "XLA_FLAGS")


def pytest_configure(config: pytest.Config) -> None:
    """Sets what child processes and Ray's workers inherit."""
    slow = [hypothesis.HealthCheck.too_slow]  # a busy machine is no fault of a test
    hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("busy")
    home = Path(tempfile.mkdtemp(prefix="disinhib-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ.update(
        HOME=str(home),
        XDG_CACHE_HOME=str(home / ".cache"),
        RAY_AUTH_TOKEN=secrets.token_hex(32),  # one for all Rays of a process, which reads it once
        RAY_TMPDIR=str(home),  # or a study joins what another suite on this machine has started
        RAY_worker_niceness="0",  # else 15: workers would wait until other tests have no work
        MPLCONFIGDIR=str(KEPT / "matplotlib"),  # its list of fonts takes seconds to make
    )
    for name in FOLLOWED:
        os.environ.pop(name, None)
    os.environ.update(PROGRAMS)
    for name, value in PROGRAMS.items():  # jax is imported here already
        kind = type(jax.config.values[name.lower()])
        as_number = kind in (int, float, bool)
        jax.config.update(name.lower(), kind(float(value)) if as_number else value)
    compilation_cache.trim(KEPT / "xla", KEPT_BYTES)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory) -> Path:
    """A new MLflow store in SQLite, whose tables take MLflow seconds to make: a copy of it, put
    where a study will look for its store, is a new store too."""
    from disinhib.tuning import mlflow_connection

    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow_connection._make_sqlite(file)
    return file


@pytest.fixture(scope="module")
def copied_stores(mlflow_template):
    """The module's studies begin with a copy of an MLflow store, where they would make one."""
    from disinhib.tuning import mlflow_connection
    from disinhib.tuning.mlflow_process import MlflowProcess

    call = MlflowProcess.call

    def copy(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            shutil.copyfile(mlflow_template, file)

    def copied(self: MlflowProcess, name: str, *arguments: Any) -> Any:
        if name == "open":  # in the other process, which is not patched
            uri, _, folder = arguments
            file = mlflow_connection.sqlite_file(mlflow_connection.address(uri, folder))
            if file is not None:
                copy(file)
        return call(self, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_connection, "_make_sqlite", copy)
        patch.setattr(MlflowProcess, "call", copied)
        yield


def bring_mlflow_here(patch: pytest.MonkeyPatch) -> None:
    """MLflow is called in this process, as each of its own takes seconds to start."""
    from disinhib.tuning import engine, mlflow_process, mlflow_settings, upkeep

    class Here(mlflow_process.Service):
        def call(self, name: str, *arguments: Any) -> Any:
            with mlflow_settings.requests():
                return getattr(self, name)(*arguments)

        def close(self, *arguments: Any) -> None:
            """Closes the store, if any: the process itself has nothing to end."""
            if arguments:
                super().close(*arguments)

    for module in (engine, upkeep):
        patch.setattr(module, "MlflowProcess", Here)


@pytest.fixture(scope="module")
def mlflow_here():
    """The module's studies have no process of MLflow's own."""
    with pytest.MonkeyPatch.context() as patch:
        bring_mlflow_here(patch)
        yield


@pytest.fixture(scope="module")
def one_ray():
    """The module's studies share one Ray on this machine, whose workers have a core each."""
    from disinhib.tuning import cluster

    local = {"address": None, "cpus_per_trial": 1, "gpus_per_trial": 0, "max_concurrent": None}
    with cluster.cluster(local):
        yield


@pytest.fixture(scope="module")
def float64():
    """The module's arrays are float64: `pytestmark = pytest.mark.usefixtures("float64")`.

    Training is float32, and so are the tests of modules that do not ask.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def strict():
    """No float32 gets in among the module's float64 unseen. (optax would not run under it.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def optimised():
    """XLA compiles the module's programs as for a user: for those that run for long."""
    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    yield
    jax.config.update(name, True)


@pytest.fixture
def compilations():
    """A context that gives the list of seconds of what XLA compiles within it."""

    @contextmanager
    def counted():
        seconds: list[float] = []

        def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                seconds.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield seconds
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted


class Problem(NamedTuple):
    """A small random network and a batch for it."""

    architecture: Any
    parameters: dict[str, np.ndarray]
    x: np.ndarray  # [batch, in], in [0, 1]
    target: np.ndarray  # [batch, out]


@cache
def drawing() -> Callable[..., Any]:
    """Draws (parameters, x, target): jitted, because each draw by itself would be a program."""
    from disinhib.hyperparameters import Architecture
    from disinhib.losses import soft_targets
    from disinhib.network import initial_parameters

    def draw(sizes, use_bias, batch, seed, weight_scale):
        plain = Architecture("disinhibition", "dale", sizes, use_bias=use_bias)
        key = jax.random.fold_in(jax.random.key(1), seed)
        weights, biases, images, labels = jax.random.split(key, 4)
        parameters = initial_parameters(plain, weight_scale, weights)
        for name, value in parameters.items():
            if name.startswith("bias"):
                parameters[name] = 0.3 * jax.random.normal(biases, value.shape)
        x = jax.random.uniform(images, (batch, sizes[0]))
        classes = jax.random.randint(labels, (batch,), 0, sizes[-1])
        return parameters, x, soft_targets(classes, sizes[-1], jax.numpy.asarray(0.99, float))

    return jax.jit(draw, static_argnums=(0, 1, 2))


def hyperparameters() -> Any:
    """The published defaults of the default structure, with the options of every rule beside: a
    function takes those that it knows."""
    from disinhib.checks import defaults, traced
    from disinhib.config import published
    from disinhib.hyperparameters import Architecture
    from disinhib.rules import RULES

    rule: dict[str, Any] = {}
    for entry in RULES.values():
        rule |= {**traced(entry.options, defaults(entry.options)), **entry.chosen}
    return published(Architecture("bp", "dale", (1, 1)), "bp")._replace(rule=rule)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """`problem(seed=, weight_scale=, batch=, **fields of Architecture)`, biases not zero; left out,
    they are those of dis-inhibition in the E-I network."""
    from disinhib.hyperparameters import Architecture

    def make(seed=0, weight_scale=2.0, batch=6, **fields) -> Problem:
        defaults = {"family": "disinhibition", "circuit": "dale", "sizes": (5, 8, 7, 4)}
        architecture = Architecture(**{**defaults, **fields})
        sizes, use_bias = architecture.sizes, architecture.use_bias
        drawn = drawing()(sizes, use_bias, batch, seed, float(weight_scale))
        return Problem(architecture, *jax.tree.map(np.asarray, drawn))

    return make


def forget_programs() -> None:
    from disinhib import training

    training.programs.cache_clear()
    jax.clear_caches()


@pytest.fixture
def recompiled():
    """Programs that are compiled within the test, which changes a table, are not kept."""
    forget_programs()
    yield
    forget_programs()


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What a module has compiled goes with it: the process would grow to gigabytes."""
    yield
    if "disinhib.training" in sys.modules:
        forget_programs()
