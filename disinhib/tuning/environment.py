"""Environment variables of workers, and of calls that need some for their duration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from disinhib import numerics

# The share of a GPU's memory that jax takes when it starts; the second name is deprecated, and jax
# refuses both at once.
MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
IN_USE = 0.9  # of the GPU's memory: each process has a context of its own beside
# Whoever imports MLflow without these sends its makers what it is used for.
UNTRACKED = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@contextmanager
def variables(variables: Mapping[str, str], also: Iterable[str] = ()) -> Iterator[None]:
    """Sets `variables`, and restores their old values and those of `also`, which others may set."""
    before = {name: os.environ.get(name) for name in (*variables, *also)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def as_set(defaults: Mapping[str, str]) -> dict[str, str]:
    """The values that the user has set, and `defaults` of the others."""
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def of_worker(cpus: float, gpus: float) -> dict[str, str]:
    """Environment of a worker that may use `cpus` cores and `gpus` GPUs (counts, or shares).

    XLA's CPU pool uses every core of the machine unless PJRT_NPROC is set. (Measured with jax
    0.10.2 on 2 cores, matrix products of 1024: CPU/wall 1.94, with PJRT_NPROC=1 1.00; XLA_FLAGS
    with `--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1` 1.94.) Ray no longer
    hides GPUs from an actor without GPUs, so JAX_PLATFORMS does. XLA compiles in the same pool,
    which is all that it needs of the CPU once there is a GPU: so with one it has every core. (H200,
    16 cores: the program of 64 lanes takes 9 s, and with PJRT_NPROC=1, beside two others, 60 s.)
    Trials that share a GPU must not each take three quarters of its memory, as jax does by default.
    """
    threads = str(max(1, int(cpus)))
    memory = {name: os.environ[name] for name in MEMORY if name in os.environ}
    if 0 < gpus < 1 and not memory:
        memory = {MEMORY[0]: f"{IN_USE * gpus:.3f}"}
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        **(memory if gpus else {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": threads}),
        **numerics.of_worker(numerics.recorded()),
        **{name: os.environ[name] for name in ("DISINHIB_DATA",) if name in os.environ},
    }
