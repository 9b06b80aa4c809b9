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

import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from disinhib import cli, hydra_config
from disinhib.checks import FLAG, INDEX, OPTIONAL_TEXT, TEXT, Option, refusal
from disinhib.commands import studies_command, tool, tune_words
from disinhib.errors import ConfigError, InputError, masked, nearest
from disinhib.tuning import inventory, progress, steering
from disinhib.tuning.inventory import RUNNING, Entry
from disinhib.tuning.resume import completed

TAKEN_IN_SECONDS = 10.0  # for which a command waits for the driver
STUDY = Option("study", cli.REQUIRED, TEXT, "its name")
OUT_DIR = Option("out_dir", "out", TEXT, "the folder of the studies")
TRIAL = Option("trial", cli.REQUIRED, INDEX, "its number")
TO = Option("to", cli.REQUIRED, TEXT, "its new name")
YES = Option("yes", False, FLAG, "delete without a question")
FILE = Option("file", None, OPTIONAL_TEXT, "the zip file; null: NAME.zip")
MODELS = Option("models", True, FLAG, "with trained networks")
URI = Option("tracking.uri", None, OPTIONAL_TEXT, "its MLflow store; null: where it is recorded")


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
    _print_left_out(broken)
    return 0


def _print_left_out(reasons: list[str]) -> None:
    for why in reasons:
        print(f"left out: {why}")


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


def show(options: dict[str, Any]) -> int:
    console = Console(file=sys.stdout)
    say = lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False)
    entry = inventory.find(options["out_dir"], options["study"])
    kind = "search" if entry.search else "retraining"
    say(f"{kind} {entry.name}: {_state(entry)}, {_trials(entry)} trials ended")
    if entry.driver is not None:
        say(f"run by process {entry.driver['pid']} on {entry.driver['host']}")
    for name, value in _settings(entry):
        say(f"  {name}: {value}")
    records = [entry.records[number] for number in sorted(entry.records)]
    if entry.search and records:
        console.print(progress.leaderboard(records, entry.objective))
        for line in progress.failures(records):
            say(line)
    elif entry.outline.get("best"):
        say("best: " + ", ".join(f"{r} {score}" for r, score in entry.outline["best"].items()))
    say(f"folder: {entry.folder} ({entry.size / 1e6:.1f} MB)")
    say(f"MLflow: {masked(entry.tracking_uri)}")
    beside, broken = inventory.retrainings(entry) if entry.search else ([], [])
    for retraining in beside:
        say(f"retrained in: {retraining.name} ({_state(retraining)})")
    _print_left_out(broken)
    for purpose, command in _next_commands(entry):
        say(f"{purpose}: {command}")
    return 0


def _settings(entry: Entry) -> list[tuple[str, Any]]:
    """What it searches, and what was given on its command line."""
    if not entry.search:
        return [("command", entry.kept.get("command", "not recorded"))]
    its = completed(entry.options)
    names = ("space", "metric", "trials", "repeats", "epochs", "replicates", "seed")
    own = ", ".join(f"{name}={its[name]}" for name in names)
    groups = (its["dataset"]["name"], its["searcher"]["name"], its["scheduler"]["name"])
    chosen = "dataset={}, searcher={}, scheduler={}".format(*groups)
    given = masked(" ".join(entry.kept["overrides"]))
    return [("options", f"{own}, {chosen}"), ("given", given or "nothing")]


def _next_commands(entry: Entry) -> list[tuple[str, str]]:
    name, out_dir = entry.name, entry.folder.parent
    if entry.state == RUNNING:
        verb = steering.UNPAUSE if entry.outline.get("paused") else steering.PAUSE
        return [(v, studies_command(v, name, out_dir)) for v in (verb, steering.STOP)]
    if not entry.search:
        return []
    default = Path("out").absolute() == out_dir
    where = [] if default else [hydra_config.override("out_dir", str(out_dir))]
    resumed = tune_words(hydra_config.override("study", name), *where, "resume=true")
    commands = [("resume", shlex.join(resumed))] if entry.state != inventory.FINISHED else []
    store = [] if default else [f"tracking.uri={masked(entry.tracking_uri)}"]
    of_study = lambda module: shlex.join([tool("python"), "-m", module, f"study={name}", *store])
    retrained = shlex.join([tool("python"), "-m", "analysis.retrain", "selected.yaml", *where])
    return [
        *commands,
        ("select", of_study("analysis.selection")),
        ("retrain", retrained),
        ("report", of_study("analysis.report")),
        ("export", studies_command("export", name, out_dir, f"file={name}.zip")),
    ]


def rename(options: dict[str, Any]) -> int:
    from disinhib.tuning import upkeep

    out_dir, uri = options["out_dir"], options["tracking.uri"]
    for line in upkeep.rename(out_dir, options["study"], options["to"], uri):
        print(line)
    return 0


def delete(options: dict[str, Any]) -> int:
    from disinhib.tuning import upkeep

    out_dir, name = options["out_dir"], options["study"]
    swept = [upkeep.sweep(out_dir / n) for n in (name, name + inventory.RETRAINED)]
    if any(swept) and not (out_dir / name).exists():
        print(f"deleted: {name}: what an interrupted deletion had left of its folder")
        return 0
    entry = inventory.find(out_dir, name)
    beside, broken = inventory.retrainings(entry)
    family = [*beside, entry]
    for one in family:
        upkeep.refuse_running(one)
    _print_left_out(broken)
    addresses = {one.name: upkeep.address(one, options["tracking.uri"]) for one in family}
    if not options["yes"]:
        if not sys.stdin.isatty():
            raise refusal("yes", False, "true where there is no terminal to ask on")
        for one in family:
            where = f"{one.folder} ({one.size / 1e6:.1f} MB) and {masked(addresses[one.name])}"
            print(f"{one.name}: {_trials(one)} trials ended, in {where}")
        if input("delete for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is deleted")
            return 0
    for one in family:
        for line in upkeep.delete(one, addresses[one.name]):
            print(f"deleted: {line}", flush=True)
    return 0


def export(options: dict[str, Any]) -> int:
    from analysis import supplement
    from disinhib.tuning import archive, upkeep

    entry = inventory.find(options["out_dir"], options["study"])
    if not entry.search and entry.of != entry.manifest.id:  # nor a grid
        raise refusal("study", entry.name, "a search: with it its retrainings are exported")
    beside, broken = inventory.retrainings(entry)
    studies = [entry, *beside]
    for one in studies:
        upkeep.refuse_running(one)
    _print_left_out(broken)
    uri = upkeep.address(entry, options["tracking.uri"])
    models, more = supplement.files(studies, uri, options["models"])
    archive.write(file := Path(options["file"] or f"{entry.name}.zip"), studies, models, more)
    left = "" if options["models"] else ", without models"
    named = ", ".join(one.name for one in studies)
    print(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB{left}): {named}")
    return 0


def import_study(options: dict[str, Any]) -> int:
    from disinhib.tuning import archive

    file, uri = Path(options["file"]), options["tracking.uri"]
    for entry in archive.read(file, options["out_dir"], uri):
        print(
            f"imported: {entry.name} ({_state(entry)}, {_trials(entry)} trials) in {entry.folder}"
        )
    return 0


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
        name = hydra_config.option_of(text)
        if name in values:
            raise ConfigError(f"{name}: given twice")
        values[name] = hydra_config.value_of(text)
    return _steer(options, steering.ADD, point=read_point(values, study.search_space))


def _steer(
    options: dict[str, Any],
    verb: str,
    trial: int | None = None,
    point: dict[str, Any] | None = None,
) -> int:
    """Gives an instruction, and says what has come of it. Returns the exit code: 1 if the driver
    does not do it. Raises ConfigError if it makes no sense for the study as it stands."""
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
    if file.exists():
        when = "takes it in when it can" if running else "takes it in when it is resumed"
        print(f"{verb}: waits in {file}; the study {when}")
        return 0
    words, done = steering.answered(file) or ("", True)
    if words:
        print(f"{entry.name}: {words}")
    else:
        print(f"{verb}: the driver of {entry.name} has taken it in")
    return 0 if done else 1


VERBS = {
    "list": Verb(list_studies, ()),
    "show": Verb(show, (STUDY,)),
    steering.PAUSE: Verb(pause, (STUDY,)),
    steering.UNPAUSE: Verb(unpause, (STUDY,)),
    steering.STOP: Verb(stop, (STUDY,)),
    steering.END: Verb(end, (STUDY, TRIAL)),
    steering.ADD: Verb(add, (STUDY,)),
    "rename": Verb(rename, (STUDY, TO), (URI,)),
    "delete": Verb(delete, (STUDY,), (YES, URI)),
    "export": Verb(export, (STUDY,), (FILE, MODELS, URI)),
    "import": Verb(import_study, (FILE._replace(default=cli.REQUIRED, check=TEXT),), (URI,)),
}


if __name__ == "__main__":
    cli.run(main)
