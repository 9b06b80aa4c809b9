"""Peak memory of a piece of work, in a process that has done other work before.

    mark = memory.start()
    ...
    memory.peak_mb(mark)

On a GPU it is the memory of the device, else of the process. Memory held at the start (libraries,
data and compiled programs) counts, because the work needs it.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax

RESET = Path("/proc/self/clear_refs")  # Linux, as is the next
STATUS = Path("/proc/self/status")
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # with which an error of jax begins
RESET_PEAK = "5"  # proc_pid_clear_refs(5): the high-water mark becomes what is held now


class Memory(NamedTuple):
    """In bytes."""

    peak: int  # the most since the process began or the mark was reset
    in_use: int


def start() -> Memory:
    """Marks the beginning of a piece of work. There is one mark a process: the newest."""
    with suppress(OSError):  # no Linux, or a container that forbids it: `peak_mb` knows what to do
        RESET.write_text(RESET_PEAK)
    return _now()


def peak_mb(mark: Memory) -> float:
    """The most memory held since `mark`, in MB.

    A high-water mark that could not be reset tells the peak only if it has risen since `mark`. If
    it has not, the result is the memory in use now: a lower bound that counts no earlier work.
    """
    now = _now()
    return (now.peak if now.peak > mark.peak else max(now.in_use, mark.in_use)) / 1e6


def device_mb() -> float | None:
    """What this process may take of its device's memory, in MB; None on a CPU."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / 1e6


def is_short(error: Exception) -> bool:
    """Whether the device had no memory for what raised `error`."""
    return isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(OUT_OF_MEMORY)


def _now() -> Memory:
    device = jax.devices()[0].memory_stats() or {}  # none of a CPU
    if "peak_bytes_in_use" in device:
        return Memory(device["peak_bytes_in_use"], device["bytes_in_use"])
    try:
        lines = (line.split() for line in STATUS.read_text().splitlines())
        kibibytes = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "VmRSS:")}
        return Memory(kibibytes["VmHWM:"] * 1024, kibibytes["VmRSS:"] * 1024)
    except (OSError, KeyError):  # no Linux: only the most that the process ever held is known
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(peak, peak)
