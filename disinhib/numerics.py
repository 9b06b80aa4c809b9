"""What decides the bits of a result beside code, data, options and processor.

Settings of jax are set here: a variable of the user's shell must not turn float32 into float64.
XLA's own variables are recorded, because there are too many flags to know which matter, and are the
same in every worker of a study. Does not import jax, which reads its variables when it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from disinhib.checks import refusal

# By their names in jax.config; the variable of each is its name in capitals.
SETTINGS = {
    "jax_enable_x64": False,
    # float32 on GPUs too, whose own default has 10 bits of mantissa (TF32): with it, a few samples
    # in 10,000 never reach the solver's tolerance, and an epoch takes a tenth longer (emulated).
    "jax_default_matmul_precision": "highest",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_threefry_gpu_kernel_lowering": False,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_allow_f16_reductions": True,
    "jax_softmax_custom_jvp": False,
    "jax_disable_jit": False,
    "jax_debug_nans": False,  # it raises where training would report a divergence
    "jax_debug_infs": False,
}
# Variables, and the value of each that means the same as none.
RECORDED = {
    "XLA_FLAGS": "",
    "LIBTPU_INIT_ARGS": "",
    "NVIDIA_TF32_OVERRIDE": "",
    "CUBLAS_WORKSPACE_CONFIG": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
    "JAX_OPTIMIZATION_LEVEL": "UNKNOWN",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "0.0",
    "JAX_MEMORY_FITTING_EFFORT": "0.0",
    "JAX_MEMORY_FITTING_LEVEL": "O2",
    "JAX_COMPILER_ENABLE_REMAT_PASS": "true",
    "JAX_ENABLE_PGLE": "false",
}


def set_jax() -> None:
    """Sets jax's SETTINGS, those that this version has. Removes RECORDED variables that are empty
    (`of_worker`), which libraries may take for 0."""
    for name in RECORDED:
        if os.environ.get(name) == "":
            del os.environ[name]
    import jax

    for name, value in SETTINGS.items():
        if name in jax.config.values and jax.config.values[name] != value:
            jax.config.update(name, value)


@contextmanager
def settings() -> Iterator[None]:
    """Within it, jax is set as by `set_jax`: for a process that has settings of its own."""
    import jax

    before = {name: jax.config.values[name] for name in SETTINGS if name in jax.config.values}
    try:
        set_jax()
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)


def check() -> None:
    """Raises ConfigError if XLA does not know a flag in $XLA_FLAGS: it would end the process."""
    if flags := os.environ.get("XLA_FLAGS"):
        tried = [sys.executable, "-c", "import jax; jax.devices()"]
        done = subprocess.run(tried, capture_output=True, text=True)
        wrong = re.search(r"Unknown flags? in .*|Could not open file \S+", done.stderr)
        if done.returncode != 0 and wrong:
            raise refusal("XLA_FLAGS", flags, f"flags of this jaxlib ({wrong[0]})")


def ignored() -> list[str]:
    """The user's variables that `set_jax` overrides, a line each."""
    lines = []
    for name, value in SETTINGS.items():
        text = os.environ.get(name.upper(), "")
        if text and _plain(text) != _plain(str(value)):
            lines.append(f"{name.upper()}={text} is ignored: training uses {name}={value}")
    return lines


def _plain(text: str) -> str:
    truth = {"1": "true", "yes": "true", "on": "true", "t": "true", "y": "true"}
    lies = {"0": "false", "no": "false", "off": "false", "f": "false", "n": "false"}
    return {**truth, **lies}.get(text.lower(), text.lower())


def recorded() -> dict[str, str]:
    """The variables of RECORDED that are set to something else, by name."""
    values = {name: os.environ.get(name) or default for name, default in RECORDED.items()}
    differs = lambda name: _plain(values[name]) != _plain(RECORDED[name])
    return {name: values[name] for name in filter(differs, values)}


def of_worker(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a process computes as one with the `recorded` variables does: all
    of RECORDED, because a machine's own must not count."""
    return {**RECORDED, **variables}
