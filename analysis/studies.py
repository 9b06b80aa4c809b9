"""`python -m analysis.studies VERB [NAME] [option=value ...]`: studies as things.

    list                        the studies in a folder: how each stands
    show NAME                   one of them: settings, leaderboard, what can be done with it
    pause NAME, unpause NAME    no further trial begins, those that run go on; trials begin again
    stop NAME                   ends its driver as Ctrl-C does; it can be resumed
    end NAME TRIAL              ends one trial early (pruned, by hand)
    add NAME OPTION=VALUE ...   a configuration to try next; what is left out is sampled
    rename NAME NEW             in its folder, in MLflow and in Optuna's store
    delete NAME                 from all of them; asks first, unless yes=true
    export NAME file=FILE.zip   into one file; models=false leaves trained networks out
    import FILE.zip             from such a file, into a folder and the stores

Every verb takes out_dir=FOLDER, in which the studies are (out).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from disinhib import cli
from disinhib.checks import INDEX, TEXT, Option, refusal
from disinhib.errors import ConfigError, InputError, nearest
from disinhib.tuning import inventory, steering
from disinhib.tuning.inventory import RUNNING, Entry

TAKEN_IN_SECONDS = 10.0  # for which a command waits for the driver
STUDY = Option("study", cli.REQUIRED, TEXT, "its name")
OUT_DIR = Option("out_dir", "out", TEXT, "the folder of the studies")
TRIAL = Option("trial", cli.REQUIRED, INDEX, "its number")


class Verb(NamedTuple):
    run: Callable[[dict[str, Any]], int]
    words: tuple[Option, ...]  # that stand alone, in this order
    options: tuple[Option, ...] = ()


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help=true"):
        raise cli.Help((__doc__ or "").strip())
    verb, *rest = arguments
    if verb not in VERBS:
        allowed = f"allowed is one of {', '.join(VERBS)}"
        raise InputError(f"{verb}: unknown verb, {allowed}{nearest(verb, VERBS)}")
    run, words, own = VERBS[verb]
    point: list[str] = []
    if verb == steering.ADD:  # every other option is one of the point
        names = {option.name for option in (STUDY, OUT_DIR)}
        point = [text for text in rest if "=" in text and text.partition("=")[0] not in names]
        rest = [text for text in rest if text not in point]
    alone = tuple(option.name for option in words)
    command = cli.Command(f"analysis.studies {verb}", __doc__, (*words, *own, OUT_DIR), alone)
    options = command.parse(rest)
    options["out_dir"] = Path(options["out_dir"]).absolute()
    return run({**options, "point": point})


def list_studies(options: dict[str, Any]) -> int:
    entries, broken = inventory.listed(options["out_dir"])
    rows = [("study", "state", "trials", "best", "size", "last event")]
    rows += [_row(entry) for entry in entries]
    if len(rows) == 1:
        print(f"no study in {options['out_dir']}")
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    for why in broken:
        print(f"left out: {why}")
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    best = ", ".join(f"{rule} {score}" for rule, score in entry.outline.get("best", {}).items())
    kind = "" if entry.search else " seeds, not compared"
    when = datetime.fromtimestamp(entry.when, UTC)
    return (
        entry.name,
        _state(entry),
        _trials(entry),
        best if entry.search else kind.strip(),
        f"{entry.size / 1e6:.1f} MB",
        f"{when:%Y-%m-%d %H:%M} UTC",
    )


def _state(entry: Entry) -> str:
    paused = ", paused" if entry.outline.get("paused") and entry.state != "finished" else ""
    return entry.state + paused


def _trials(entry: Entry) -> str:
    return f"{entry.outline.get('ended', '?')}/{entry.outline.get('trials', '?')}"


def pause(options: dict[str, Any]) -> int:
    return _steer(options, steering.PAUSE)


def unpause(options: dict[str, Any]) -> int:
    return _steer(options, steering.UNPAUSE)


def stop(options: dict[str, Any]) -> int:
    return _steer(options, steering.STOP)


def end(options: dict[str, Any]) -> int:
    return _steer(options, steering.END, trial=options["trial"])


def add(options: dict[str, Any]) -> int:
    from disinhib.tuning.initial_points import read_point
    from disinhib.tuning.options import compose

    entry = inventory.find(options["out_dir"], options["study"])
    if not entry.search:
        raise refusal("study", entry.name, "a search: a retraining has a list")
    study = compose([f"study={entry.name}", f"out_dir={entry.folder.parent}", "resume=true"])
    if study.batch:
        allowed = "false: which trials a reproducible study has is fixed at its start"
        raise refusal("searcher.deterministic", True, allowed)
    if not options["point"]:
        raise ConfigError("add: missing, needed is OPTION=VALUE ... of the search space")
    values: dict[str, Any] = {}
    for text in options["point"]:
        name, _, value = text.partition("=")
        if name in values:
            raise ConfigError(f"{name}: given twice")
        values[name] = yaml.safe_load(value)
    return _steer(options, steering.ADD, point=read_point(values, study.search_space))


def _steer(
    options: dict[str, Any],
    verb: str,
    trial: int | None = None,
    point: dict[str, Any] | None = None,
) -> int:
    """Gives an instruction, and says whether it has been taken in. Raises ConfigError if it makes
    no sense for the study as it stands."""
    entry = inventory.find(options["out_dir"], options["study"])
    running, outline = entry.state == RUNNING, entry.outline
    if verb == steering.STOP and not running:
        raise ConfigError(f"study: {entry.name} is {entry.state}: no driver runs it")
    if entry.state == inventory.FINISHED:
        raise ConfigError(f"study: {entry.name} is finished: resume it with more trials first")
    if outline:
        if verb == steering.END and trial not in outline["unfinished"]:
            listed = ", ".join(map(str, outline["unfinished"])) or "none"
            raise refusal("trial", trial, f"one that has not ended: {listed}")
        if verb == steering.END and not entry.search:
            raise refusal("study", entry.name, "a search: a retraining ends no trial early")
        if verb == steering.ADD and outline["asked"] >= outline["trials"]:
            allowed = f"more than {outline['trials']}: all of them have been asked for"
            raise refusal("trials", outline["trials"], allowed)
    file = steering.give(entry.folder, verb, trial, point)
    deadline = time.monotonic() + TAKEN_IN_SECONDS
    while running and file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not file.exists():
        print(f"{verb}: the driver of {entry.name} has taken it in")
    else:
        when = "takes it in when it can" if running else "takes it in when it is resumed"
        print(f"{verb}: waits in {file}; the study {when}")
    return 0


VERBS = {
    "list": Verb(list_studies, ()),
    steering.PAUSE: Verb(pause, (STUDY,)),
    steering.UNPAUSE: Verb(unpause, (STUDY,)),
    steering.STOP: Verb(stop, (STUDY,)),
    steering.END: Verb(end, (STUDY, TRIAL)),
    steering.ADD: Verb(add, (STUDY,)),
}


if __name__ == "__main__":
    cli.run(main)
