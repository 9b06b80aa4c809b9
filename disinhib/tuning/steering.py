"""Instructions to a study while it runs: files in its folder, for which its driver looks every
second.

An instruction is a whole file with a name of its own, so that nobody reads half of it, on a file
system of several machines too. The driver is the only writer of the event log: it logs what an
instruction changes before it acts, leaves an answer beside it, and then removes the file. One that
is read again, after a kill in between, has no further effect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from disinhib.files import write_whole
from disinhib.tuning.event_log import PRUNED, Asked, Ended, Event, Paused, Record

FOLDER = "instructions"  # in a study's folder
PAUSE, UNPAUSE, STOP, END, ADD = "pause", "unpause", "stop", "end", "add"
VERBS = (PAUSE, UNPAUSE, STOP, END, ADD)
ANSWER = ".answer"  # the ending of its file, beside the instruction
BY_HAND = "ended by hand"  # the reason of such a trial
ADDED = "added"  # tag of a trial that somebody added: the instruction's id

Adder = Callable[[Mapping[str, Any], Mapping[int, Record]], list[Asked]]


@dataclass(frozen=True)
class Instruction:
    """What somebody wants of a study."""

    id: int  # when it was given, in ns since 1970
    verb: str  # of VERBS
    trial: int | None = None  # to END
    point: dict[str, Any] | None = None  # to ADD, by Optuna's names


def give(
    folder: Path, verb: str, trial: int | None = None, point: dict[str, Any] | None = None
) -> Path:
    """Leaves an instruction for whoever runs the study in `folder`, now or later. Returns its file,
    which is gone when it has been taken in."""
    instruction = Instruction(time.time_ns(), verb, trial, point)
    (folder / FOLDER).mkdir(exist_ok=True)
    file = folder / FOLDER / f"{instruction.id}.json"
    write_whole(file, json.dumps(asdict(instruction)).encode())
    return file


def take(folder: Path, say: Callable[[str], None]) -> Iterator[Instruction]:
    """The instructions that wait, the oldest first. Each is removed when the next is asked for."""
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            instruction = Instruction(**json.loads(file.read_text("utf-8")))
            if instruction.verb not in VERBS:
                raise ValueError(instruction.verb)
        except (ValueError, TypeError):
            say(f"{FOLDER}/{file.name} is no instruction that this version knows: removed")
        else:
            yield instruction
        file.unlink(missing_ok=True)


def answer(folder: Path, instruction: Instruction, words: str, done: bool) -> None:
    """Leaves for whoever gave the instruction what has come of it."""
    file = folder / FOLDER / f"{instruction.id}{ANSWER}"
    write_whole(file, json.dumps({"words": words, "done": done}).encode())


def answered(file: Path) -> tuple[str, bool] | None:
    """(in words what has come of the instruction in `file`, whether it is done); None if it has no
    answer. It is read once."""
    try:
        text = file.with_suffix(ANSWER).read_text("utf-8")
    except FileNotFoundError:
        return None
    file.with_suffix(ANSWER).unlink(missing_ok=True)
    there = json.loads(text)
    return there["words"], there["done"]


def forget(folder: Path) -> None:
    """Removes instructions to stop, which the driver that they were for did not live to see, and
    answers that nobody has waited for."""
    for file in (folder / FOLDER).glob(f"*{ANSWER}"):
        file.unlink(missing_ok=True)
    for file in (folder / FOLDER).glob("*.json"):
        with suppress(ValueError):  # `take` names what is no instruction
            if json.loads(file.read_text("utf-8")).get("verb") == STOP:
                file.unlink()


def carry_out(
    folder: Path,
    instruction: Instruction,
    records: Mapping[int, Record],
    add: Adder | None,
    say: Callable[[str], None],
) -> list[Event]:
    """`events_of` an instruction to the study in `folder`, which is answered."""
    said: list[str] = []
    events = events_of(instruction, records, add, said.append)
    for words in said:
        say(words)
        answer(folder, instruction, words, done=bool(events))
    return events


def events_of(
    instruction: Instruction,
    records: Mapping[int, Record],
    add: Adder | None,
    say: Callable[[str], None],
) -> list[Event]:
    """The events that an instruction leads to; `say` tells the user what it is or why there are
    none. `add` asks for a trial; None if the study takes no points."""
    id = str(instruction.id)
    match instruction.verb:
        case "pause" | "unpause" as verb:
            on = verb == PAUSE
            say("paused: no further trial begins" if on else "not paused any more")
            return [Paused(instruction.id, on)]
        case "end":
            record = records.get(-1 if instruction.trial is None else instruction.trial)
            if record is None or record.ended or record.config["final"]:
                final = record is not None and record.config["final"]
                why = "a retraining ends none early" if final else "it is not unfinished"
                say(f"trial {instruction.trial} is not ended: {why}")
                return []
            say(f"trial {record.number} is ended by hand, after epoch {record.epochs}")
            return [Ended(record.number, PRUNED, record.epochs, BY_HAND)]
        case "add":
            if any(record.tags.get(ADDED) == id for record in records.values()):
                return []  # it was read before
            asked = add(instruction.point or {}, records) if add else []
            if not asked:
                why = "no trial is left for it" if add else "the study takes none"
                say(f"a point is not added: {why} ({len(records)} trials are asked for)")
                return []
            say(f"trial {asked[-1].trial} is added by hand")
            return [*asked[:-1], replace(asked[-1], tags={**asked[-1].tags, ADDED: id})]
    return []
