"""Shapes are checked in tests only; numerics run in float64 where a module asks for it."""

from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Every module of the core checks its annotations with beartype, at trace time: nothing of it
# reaches a subprocess, a Ray worker or a user. Must stand before the first import of disinhib.
PACKAGE = Path(__file__).resolve().parents[1] / "disinhib"
CORE = [f"disinhib.{file.stem}" for file in PACKAGE.glob("*.py") if not file.stem.startswith("__")]
install_import_hook(CORE, "beartype.beartype")


@pytest.fixture(scope="module")
def float64():
    """The module's arrays are float64: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def unoptimised():
    """XLA compiles the module's programs in half the time, and they run slower."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
