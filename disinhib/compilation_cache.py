"""A cache of compiled programs on disk: a process loads programs that another one has compiled.

XLA takes 2 to 6 s to compile a program and 0.1 s to load it (measured: E-I rules on one core). Each
kind of machine that XLA compiles for has its own folder. The longest unused programs are removed
when all folders together exceed a bound.

The bound is implemented here and not by `jax_compilation_cache_max_size`. With jax 0.10.2, that
reads all entries again for each one written (72 ms among 200 entries, 414 ms among 2,000; without
it 0.3 ms), and a process that is killed between the two files of an entry ends all writing until
somebody empties the folder (https://github.com/jax-ml/jax/issues/39880).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import pooch
from filelock import FileLock, Timeout

FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # jax's own; a user who sets it manages that folder
MAX_BYTES = 1_000_000_000  # a default study leaves about 10 MB
LONGEST_COMPILATION = 600.0  # s
CPU_INFO = Path("/proc/cpuinfo")  # Linux
log = logging.getLogger("disinhib")


def share(root: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
    """Makes this process load and store compiled programs in the cache.

    `root` has a folder for each kind of machine; by default it is in the user's cache. The whole
    cache is trimmed to `max_bytes` first. If it cannot be written, this process logs a warning and
    compiles its own programs.
    """
    # jax's own thresholds would keep none of our programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if FOLDER_VARIABLE in os.environ:
        return
    root = root or pooch.os_cache("disinhib") / "xla"
    folder = root / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        trim(root, max_bytes)
    except OSError as error:
        log.warning("compiled programs are not kept: %s: %s", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


@contextmanager
def alone(program: str) -> Iterator[None]:
    """Only one process of this machine at a time compiles `program`, named by a description; the
    others wait, and then load it from the cache. Where there is none, nobody waits."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        yield
        return
    folder = Path(tempfile.gettempdir(), f"disinhib-programs-{os.getuid()}")
    lock = FileLock(folder / hashlib.sha256(program.encode()).hexdigest()[:16])
    with suppress(OSError, Timeout):  # then it compiles beside others
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid == os.getuid():  # in another user's, a lock could be any file
            lock.acquire(timeout=LONGEST_COMPILATION)
    try:
        yield
    finally:
        lock.release()


def machine() -> str:
    """What XLA compiles for: the processor and, if one is used, the GPU.

    (jax's own key of each program has the versions of jaxlib and of the GPU's driver.)
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return processor()
    return f"{processor()}-{re.sub(r'[^a-z0-9]+', '-', device.device_kind.lower())}"


def processor() -> str:
    """The architecture, and a hash of the processor's model and instruction-set flags."""
    try:
        first = CPU_INFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = [f"model name: {platform.processor()}"]
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in first)}
    models = ("model name", "CPU implementer", "CPU part")  # the last two: ARM
    flags = fields.get("flags", fields.get("Features", "")).split()
    described = "\n".join([*(fields.get(name, "") for name in models), *sorted(flags)])
    return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def trim(root: Path, max_bytes: int) -> None:
    """Removes files below `root`, the longest unused first, until at most `max_bytes` are left.

    Most file systems update the access time once a day, some never: then the oldest go first.
    """
    files = []
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):  # another process trims too
            if path.is_file():
                status = path.stat()
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(file_size for _, file_size, _ in files)
    for _, file_size, path in sorted(files):
        if size <= max_bytes:
            return
        path.unlink(missing_ok=True)
        size -= file_size
