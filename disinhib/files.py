"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, private: bool = False) -> None:
    """Writes `content` to `path`: a reader sees the old file or the whole new one. Of a `private`
    file, its owner is the only reader. Raises OSError.

    (A kill may leave a hidden file beside it, `.NAME.PID.part`.)
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        new = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
