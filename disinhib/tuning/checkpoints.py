"""Which of a study's checkpoints stay: those of trials that may go on, and the best few of each
rule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from disinhib.tuning.journal import COMPLETE, Record
from disinhib.tuning.progress import merit
from disinhib.tuning.trial import checkpoint_file

FOLDER = "checkpoints"  # in the study's folder


def kept(records: Iterable[Record], mode: str, best: int) -> list[Record]:
    """The `best` complete trials of each rule: all first ones before all second ones, so that the
    last is the one to do without."""
    ranks: dict[str, int] = {}
    ranked = []
    complete = [record for record in records if record.state == COMPLETE]
    for record in sorted(complete, key=lambda r: (-merit(r, mode), r.number)):
        rank = ranks[record.rule] = ranks.get(record.rule, 0) + 1
        if rank <= best:
            ranked.append((rank, record))
    return [record for _, record in sorted(ranked, key=lambda pair: pair[0])]


def tidy(folder: Path, records: Iterable[Record], mode: str, best: int) -> None:
    """Removes what trials that have ended left, except for those that are kept."""
    records = list(records)
    keep = {record.number for record in kept(records, mode, best)}
    for record in records:
        if record.ended and record.number not in keep:
            checkpoint_file(folder, record.number).unlink(missing_ok=True)


def make_room(folder: Path, records: Iterable[Record], mode: str, best: int) -> Record | None:
    """Removes the kept checkpoint that is worth least; says whose, or None if there is none."""
    for record in reversed(kept(records, mode, best)):
        file = checkpoint_file(folder, record.number)
        if file.exists():
            file.unlink()
            return record
    return None
