"""Which of a study's checkpoints stay: those of unfinished trials, and the best few of each
rule."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from disinhib.tuning.event_log import COMPLETE, Record

PARTS = ".*.part"  # files that a kill left half-written
MODELS = "*.model"  # of final trials; MLflow has them when the study has ended


def checkpoint_file(folder: str | Path, number: int) -> Path:
    """The checkpoint of trial `number`."""
    return Path(folder) / f"{number:04d}.msgpack"


def model_file(folder: str | Path, number: int, seed: int) -> Path:
    """The file of the trained model of a final trial's seed."""
    return Path(folder) / f"{number:04d}-{seed}.model"


def folder(study: Path, id: str) -> Path:
    """The folder of the study's checkpoints. Its name has the study's `id`, because a machine that
    does not share the study's folder may have one of an earlier study of the same name."""
    return study / "checkpoints" / id[:8]


def kept(records: Iterable[Record], best: int) -> list[Record]:
    """The `best` complete trials of each rule, by rank: the first of every rule, then the second
    ..., so that the last can be removed first."""
    ranks: dict[str, int] = {}
    ranked = []
    complete = [record for record in records if record.state == COMPLETE]
    for record in sorted(complete, key=lambda r: (-(r.score or 0.0), r.number)):
        rank = ranks[record.rule] = ranks.get(record.rule, 0) + 1
        if rank <= best:
            ranked.append((rank, record))
    return [record for _, record in sorted(ranked, key=lambda pair: pair[0])]


def tidy(folder: Path, records: Iterable[Record], best: int) -> set[int]:
    """Removes the checkpoints of those of `records` that have ended, except those that are kept.
    Returns the numbers of the kept: when another trial ends, only they can be concerned."""
    records = list(records)
    keep = {record.number for record in kept(records, best)}
    for record in records:
        if record.ended and record.number not in keep:
            checkpoint_file(folder, record.number).unlink(missing_ok=True)
    return keep


def remove(folder: Path, pattern: str) -> None:
    """Removes the files of `pattern`: PARTS (no process may be writing) or MODELS."""
    for file in folder.glob(pattern):
        file.unlink()


def sizes(folder: Path) -> dict[Path, int]:
    """The size of each checkpoint in bytes."""
    found = {}
    for file in folder.glob("*.msgpack"):
        with suppress(FileNotFoundError):  # a worker or the driver has just removed it
            found[file] = file.stat().st_size
    return found


def make_room(folder: Path, records: Iterable[Record], best: int, cap_bytes: float) -> bool:
    """Makes room for one more checkpoint under the cap, if necessary by removing the worst kept
    one. Returns whether there is room."""
    used = sizes(folder).values()
    if sum(used) + max(used, default=0) <= cap_bytes:
        return True
    for record in reversed(kept(records, best)):
        file = checkpoint_file(folder, record.number)
        if file.exists():
            file.unlink()
            return True
    return False
