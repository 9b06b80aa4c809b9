"""What decides the bits of a result is set, or recorded."""

import os
import subprocess
import sys
from copy import deepcopy

import jax
import pytest

from disinhib import numerics
from disinhib.errors import ConfigError
from disinhib.tuning import environment, provenance

DRAW = """
from disinhib import numerics
numerics.set_jax()
import jax, jax.numpy as jnp
key = jax.random.key(7)
matrix = jax.random.normal(key, (64, 64))
print(matrix.dtype, float((matrix @ matrix).sum()), float(jnp.float32(1) / 3))
"""


def draw(**variables):
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_of_the_shell_change_no_number():
    odd = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "3",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEBUG_NANS": "1",
    }
    assert draw(**odd) == draw()


def test_every_setting_is_one_of_this_jax_and_its_default_but_for_the_precision_of_products():
    settings = {**numerics.SETTINGS}
    assert settings.pop("jax_default_matmul_precision") == "highest"
    fresh = f"import jax; print([str(jax.config.values[n]) for n in {[*settings]}])"
    plain = {n: v for n, v in os.environ.items() if not n.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", fresh], env=plain, capture_output=True, text=True)
    assert eval(done.stdout) == [*map(str, settings.values())], done.stderr
    assert all(n.lower() in jax.config.values for n in numerics.RECORDED if n.startswith("JAX_"))


def test_a_default_in_other_words_is_not_recorded(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_PGLE", "False")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    assert numerics.recorded() == {}


def test_an_empty_variable_is_none_for_the_libraries(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    numerics.set_jax()
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_what_is_ignored_is_said(monkeypatch):
    for name in numerics.SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    assert numerics.ignored() == []
    monkeypatch.setenv("JAX_ENABLE_X64", "0")  # as we do
    monkeypatch.setenv("JAX_DEBUG_NANS", "False")
    assert numerics.ignored() == []
    monkeypatch.setenv("JAX_ENABLE_X64", "true")
    line = "JAX_ENABLE_X64=true is ignored: training uses jax_enable_x64=False"
    assert numerics.ignored() == [line]


@pytest.fixture(scope="module")
def about():
    return {
        "code": {"files": {}},
        "packages": {},
        "python": "3.11.1",
        "data": {"name": "digits", "sha256": "0"},
        "numerics": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    }


def test_a_variable_of_xla_is_a_difference(about):
    now = deepcopy(about)
    assert provenance.differences(about, now) == []
    now["numerics"] = {"NVIDIA_TF32_OVERRIDE": "0"}
    assert provenance.differences(about, now) == [
        "NVIDIA_TF32_OVERRIDE=not set, now 0",
        "XLA_FLAGS=--xla_cpu_enable_fast_math=true, now not set",
    ]


def test_every_worker_has_the_variables_of_the_driver(monkeypatch):
    for name in numerics.RECORDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    recorded = numerics.recorded()
    assert recorded == {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
    worker = environment.of_worker(cpus=1, gpus=0)
    assert worker.items() >= {**numerics.RECORDED, **recorded}.items()
    # What stands for "not set" means just that.
    settings = {n: v for n, v in numerics.RECORDED.items() if n.startswith("JAX_")}
    assert draw(**settings) == draw()


def test_a_flag_that_xla_does_not_know_is_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    numerics.check()
    for flags, why in (("--xla_nonsense=1", "Unknown flag"), ("nonsense", "Could not open file")):
        monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(ConfigError, match=rf"^XLA_FLAGS: given {flags}, .* \({why}"):
            numerics.check()
