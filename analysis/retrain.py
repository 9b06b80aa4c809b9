"""Trains configurations over fresh seeds, to their whole budget, and opens the test set once.

    python -m analysis.retrain selected.yaml [seeds=10]            what was selected of a study
    python -m analysis.retrain experiment=table1 [AXIS=NAME,...]   the grid of an experiment

`seeds` is how many, of those that no search has seen, or a list. Options: conf/retrain.yaml. All
seeds of a configuration are lanes of one program, configurations are Ray tasks (`cluster.*`), and
every seed is a run in MLflow (`tracking.*`), beside its study. The same command again goes on where
it was: a seed that is done stays as it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ray
import yaml
from filelock import FileLock, Timeout
from flax import serialization
from ray.exceptions import RayError

from analysis import cell as cells, ledger, runs, store as stores
from analysis.ledger import Cell
from analysis.store import Refused, Store, StudyRun
from disinhib import command_line, config, errors, training
from disinhib.config import COUNT, INDEX, ConfigError, flatten, refusal
from disinhib.errors import nearest, one_line
from disinhib.tuning import execution, options as studies, origin, provenance, tracking
from disinhib.tuning.checks import CHECKS

USAGE = "python -m analysis.retrain selected.yaml|experiment=NAME [option=value ...]"
CONFIG = "retrain"  # conf/retrain.yaml
OWN = ("seeds", "study", "grid", "checkpoints", "cluster", "tracking", "experiment")
# What of training may be other than it was for a trial: where, and from which files.
ELSEWHERE = ("device", "gpu_id", "dataset.path", "out_dir")
FOLDER = "retraining"  # in out_dir
PROGRESS_SECONDS = 15.0  # between two lines


class Task(NamedTuple):
    """A configuration, and the seeds of it that are trained now."""

    cell: Cell
    lanes: list[int]
    missing: list[int]  # those of them that MLflow lacks
    file: Path  # its checkpoint
    provenance: dict[str, Any]


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 1 if a configuration could not be trained."""
    files = [text for text in arguments if "=" not in text]
    given = [text for text in arguments if "=" in text]
    names = {text.partition("=")[0] for text in given}
    if len(files) > 1 or any(f.startswith("-") for f in files) or (not files) == (
        "experiment" not in names
    ):  # fmt: skip
        raise Refused(f"given {' '.join(arguments) or 'nothing'}, needed is {USAGE}")
    jax.config.update("jax_platforms", "cpu")  # the driver trains nothing, and holds no GPU
    if files:
        settings = _settings(given)
        store, study, planned = of_selection(Path(files[0]), settings, names)
    else:
        axes, given = _axes(given)
        settings = _settings(given)
        planned = of_grid(settings, given, axes)
        command = shlex.join(["python", "-m", "analysis.retrain", *arguments])
        store, study = _recorded(settings, command, planned[0])
    seeds = fresh_seeds(settings["seeds"], used_seeds(store, study))
    for one in planned:
        training.prepare(config.parse(one.options))  # refused before anything is trained
    folder = Path(settings["out_dir"]).absolute() / FOLDER / study.id[:8]
    command_line.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, study):
        return _retrain(store, study, planned, seeds, folder, settings)


def _settings(given: Sequence[str]) -> dict[str, Any]:
    settings, _ = command_line.compose(CONFIG, given)
    checked = {**CHECKS, "seeds": (_are_seeds, "a number of seeds, or a list of different ones")}
    for name in ("seeds", "out_dir", "cluster", "tracking", "checkpoints"):
        for option, value in flatten({name: settings[name]}).items():
            if option not in checked:
                raise ConfigError(f"{option}: unknown option{nearest(option, checked)}")
            test, allowed = checked[option]
            if not test(value):
                raise refusal(option, value, allowed)
    return settings


def _are_seeds(value: Any) -> bool:
    if isinstance(value, list):
        seeds = [INDEX[0](seed) and seed < 2**31 for seed in value]
        return bool(value) and all(seeds) and len(set(value)) == len(value)
    return COUNT[0](value)


def fresh_seeds(asked: int | Sequence[int], used: Mapping[int, str]) -> list[int]:
    """The seeds that are asked for, disjoint from those `used` by a search (seed -> where).

    Raises Refused if one that is named was used.
    """
    if isinstance(asked, int):
        return list(itertools.islice((s for s in itertools.count() if s not in used), asked))
    for seed in asked:
        if seed in used:
            raise Refused(f"seeds: given {seed}, which the search has seen ({used[seed]})")
    return list(asked)


def used_seeds(store: Store, study: StudyRun) -> dict[int, str]:
    """Every seed of every search in the study's MLflow experiment, and whose it was: also those
    of studies that this one may have learnt from."""
    return {
        seed: f"trial {run.data.tags['trial']} of {run.data.tags['study']}"
        for run in stores.every_trial(store, study)
        for seed in runs.seeds_of(run)
    }


def of_selection(
    file: Path, settings: Mapping[str, Any], names: set[str]
) -> tuple[Store, StudyRun, list[Cell]]:
    """What `analysis.selection` wrote into `file`, as MLflow has it.

    Raises Refused if it is not what selection writes, or if a trial is not a complete one.
    """
    wrong = [name for name in sorted(names) if name.partition(".")[0] not in (*OWN, *ELSEWHERE)]
    wrong = [name for name in wrong if name not in ELSEWHERE]
    if wrong:
        raise Refused(f"{wrong[0]}: selected configurations are trained as they were tried")
    try:
        chosen = yaml.safe_load(file.read_text())
        uri, study_run = chosen["tracking_uri"], chosen["study_run"]
        run_ids = [entry["run_id"] for entry in chosen["selected"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Refused(
            f"{file}: is not what analysis.selection writes ({one_line(error)})"
        ) from error
    given = settings["tracking"]["uri"]
    if given is None and ":***@" in uri:
        raise Refused(f"tracking.uri: missing, as {file} keeps no passwords ({uri})")
    store = stores.connect(given or uri)
    study = stores.find_study(store, study_run)
    return store, study, [_of_trial(store, study, run_id, settings) for run_id in run_ids]


def _of_trial(store: Store, study: StudyRun, run_id: str, settings: Mapping[str, Any]) -> Cell:
    run = stores.run(store, run_id)
    tags = run.data.tags
    if tags.get("study_id") != study.id or "trial" not in tags:
        raise Refused(f"{run_id}: is no trial of study {study.name}")
    number, state = int(tags["trial"]), tags.get("trial_state", "still running")
    if state != runs.COMPLETE:
        raise Refused(
            f"trial {number} of {study.name}: is {state}, needed is one that ran its whole budget"
            f" ({runs.COMPLETE})"
        )
    try:
        kept = yaml.safe_load(stores.text(store, run_id, "config.yaml"))
    except Exception as error:  # MLflow's stores of artifacts raise their own kinds
        raise Refused(f"{run_id}: cannot read what it has kept ({one_line(error)})") from error
    kept.update({name: settings[name] for name in ("device", "gpu_id")})
    if settings["dataset"]["path"] is not None:
        kept["dataset"]["path"] = settings["dataset"]["path"]
    # Its command, but for the seeds (`python -m disinhib -m seed=1,2 ...`, if it had several).
    _, _, program, *words = shlex.split(tags["command"])
    words = [word for word in words if word != "-m" and not word.startswith("seed=")]
    command = shlex.join(["python", "-m", program, *words])
    return _cell(f"{number:04d}", kept, command, tags["rule"], run.data.params, number, run_id)


def _cell(
    name: str,
    options: dict[str, Any],
    command: str,
    rule: str,
    searched: Mapping[str, str],
    trial: int | None = None,
    of_run: str | None = None,
) -> Cell:
    run = config.parse(options)
    averaged = options["trainer"].get("average_fb_weights")
    return Cell(
        name=name,
        options=options,
        command=command,
        rule=rule,
        depth=run.architecture.hidden_layers,
        averaged="none" if averaged is None else str(averaged).lower(),
        configuration=runs.configuration_id(flatten(options)),
        searched=dict(searched),
        trial=trial,
        of_run=of_run,
    )


def _axes(given: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(which names of which axes of the grid, the other options)."""
    experiment = [text for text in given if text.partition("=")[0] == "experiment"]
    grid = command_line.compose(CONFIG, experiment)[0]["grid"]
    if grid is None:
        folder = command_line.CONFIGURATIONS / "experiment"
        have = [f.stem for f in sorted(folder.glob("*.yaml")) if "\ngrid:" in f.read_text()]
        raise Refused(
            f"{experiment[0].replace('=', ': given ')}, allowed is one of {', '.join(have)}"
        )
    chosen, rest = {axis: [str(name) for name in names] for axis, names in grid.items()}, []
    for text in given:
        axis, _, names = text.partition("=")
        if axis not in grid:
            rest.append(text)
            continue
        wanted = names.split(",")
        for name in wanted:
            if name not in chosen[axis] and name not in map(str, grid[axis]):
                allowed = ", ".join(map(str, grid[axis]))
                raise Refused(f"{axis}: given {name}, allowed is one or more of {allowed}")
        chosen[axis] = wanted
    return chosen, rest


def of_grid(
    settings: Mapping[str, Any], given: Sequence[str], axes: Mapping[str, Sequence[str]]
) -> list[Cell]:
    """Every combination of the `axes` of the experiment's grid that are asked for."""
    grid = {axis: {str(n): o for n, o in names.items()} for axis, names in settings["grid"].items()}
    planned = []
    for names in itertools.product(*axes.values()):
        place = dict(zip(axes, names, strict=True))
        overrides = [o for axis, name in place.items() for o in grid[axis][name]]
        composed, choices = command_line.compose(CONFIG, [*given, *overrides])
        options = {name: value for name, value in composed.items() if name not in OWN}
        # Its folder of checkpoints is no part of the command.
        options["out_dir"] = command_line.compose(command_line.TRAINING, ())[0]["out_dir"]
        options["seed"], options["resume"] = 0, None
        choices = {g: c for g, c in choices.items() if g.partition("/")[0] not in OWN}
        command = command_line.command(options, choices)
        planned.append(_cell("-".join(names), options, command, studies.rule_name(choices), place))
    return planned


def _recorded(settings: Mapping[str, Any], command: str, first: Cell) -> tuple[Store, StudyRun]:
    """The run under which the grid's seeds are, made if it is not there yet."""
    out_dir = Path(settings["out_dir"]).absolute()
    name = settings["study"]
    if not name:
        raise refusal("study", name, "the name under which the grid is recorded")
    command_line.check_folder(out_dir)
    uri = tracking.absolute(settings["tracking"]["uri"], out_dir)
    place = settings["tracking"]["experiment"]
    experiment = tracking.open_store(uri, place, out_dir / "mlflow-artifacts")
    store = stores.connect(uri)
    found = [
        run
        for run in store.client.search_runs([experiment.id], f"run_name = '{name}'")
        if run.info.run_name == name
    ]
    if not found:
        tags = {"study": name, "study_id": uuid.uuid4().hex, "command": provenance.masked(command)}
        made = store.client.create_run(experiment.id, None, tags, name)
        about = {"metric": "valid_accuracy", "mode": "max"}
        grid = {axis: {str(n): o for n, o in of.items()} for axis, of in settings["grid"].items()}
        kept = yaml.safe_dump({**settings, "grid": grid, **about})
        store.client.log_text(made.info.run_id, provenance.masked(kept), "config.yaml")
        threads = settings["cluster"]["cpus_per_trial"]
        collected = provenance.collect(config.parse(first.options), threads)
        store.client.log_text(made.info.run_id, json.dumps(collected, indent=1), "provenance.json")
    study = stores.find_study(store, found[0].info.run_id if found else name)
    if study.space is not None:
        raise refusal("study", name, f"another name: in {uri} that is a search")
    return store, study


@contextmanager
def _alone(folder: Path, study: StudyRun) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise Refused(f"study {study.name}: is being retrained by another process") from error


def _retrain(
    store: Store,
    study: StudyRun,
    planned: Sequence[Cell],
    seeds: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
) -> int:
    written = ledger.read(store, study)
    code = provenance.code(provenance.ROOT)
    hashed = _code_hash(code)
    tasks = []
    for one in planned:
        done = [seed for seed in seeds if (one.key, seed) in written.finished]
        missing = [seed for seed in seeds if seed not in done]
        if any(written.codes[one.key, seed] != hashed for seed in done):
            print(f"warning: {_called(one)}: seeds that are done were trained by other code")
        # Not of other code, nor of another program: lanes of one are not resumed by another.
        file = folder / f"{one.key[:16]}-{one.options['epochs']}-{hashed[:8]}.msgpack"
        kept = _lanes(file)
        if missing:
            lanes = kept if {*missing} <= {*kept} else missing
            if lanes is missing:
                cells.forget(file)
            run = config.parse(one.options)
            made = provenance.collect(run, settings["cluster"]["cpus_per_trial"])
            tasks.append(Task(one, lanes, missing, file, made))
    total = len(planned) * len(seeds)
    left = sum(len(task.missing) for task in tasks)
    print(
        f"study {study.name}: {len(planned)} configurations of {len(seeds)} seeds"
        f" ({_listed(seeds)}); {total - left} of {total} are done",
        flush=True,
    )
    if not tasks:
        return 0
    here = folder / origin.ORIGIN
    here.write_text(json.dumps({"id": study.id}))
    with execution.cluster(settings["cluster"]):
        execution.check_machines(here, study.id, code["files"])
        failed = _run(store, study, tasks, written, settings)
    if failed:
        print(f"{len(failed)} of {len(tasks)} configurations are not done: give the command again")
    return 1 if failed else 0


def _run(
    store: Store,
    study: StudyRun,
    tasks: Sequence[Task],
    written: ledger.Written,
    settings: Mapping[str, Any],
) -> list[Task]:
    """Trains all tasks and writes what comes of them; returns those that could not be trained."""
    share = settings["cluster"]
    train = ray.remote(
        num_cpus=share["cpus_per_trial"],
        num_gpus=share["gpus_per_trial"],
        max_calls=1,  # a process each: XLA keeps its first device, and its memory
        max_retries=execution.WORKERS_LOST,  # of those that died; it goes on from its checkpoint
    )(cells.train)
    every = settings["checkpoints"]["every_seconds"]
    pending = {
        train.remote(task.cell.options, task.lanes, str(task.file), every): task for task in tasks
    }
    failed: list[Task] = []
    began = shown = time.monotonic()
    while pending:
        ready, _ = ray.wait(list(pending), timeout=1)
        for reference in ready:
            task = pending.pop(reference)
            try:
                outcome = ray.get(reference)
            except RayError as error:  # its training raised, or its workers died
                print(f"{_called(task.cell)}: failed: {execution.reason(error)}", flush=True)
                failed.append(task)
                continue
            try:
                _write(store, study, task, outcome, written)
            except Exception as error:  # drivers, sockets and MLflow itself: each has its own kind
                print(
                    f"{_called(task.cell)}: MLflow did not take it: {one_line(error)}", flush=True
                )
                failed.append(task)  # its checkpoint stays
                continue
            cells.forget(task.file)
            seconds = time.monotonic() - began
            print(f"{_called(task.cell)}: {_told(outcome)}; {seconds:.0f} s", flush=True)
        if time.monotonic() - shown > PROGRESS_SECONDS and pending:
            shown = time.monotonic()
            print(f"{shown - began:.0f} s: {_progress(list(pending.values()))}", flush=True)
    return failed


def _write(
    store: Store, study: StudyRun, task: Task, outcome: cells.Outcome, written: ledger.Written
) -> None:
    made = task.provenance
    about = {
        **outcome.place,
        "code_sha256": _code_hash(made["code"]),
        "code_version": made["code"]["version"] or "unknown",
        "data_sha256": made["data"]["sha256"],
    }
    files = {"provenance.json": json.dumps(made, indent=1)}
    for seed in outcome.seeds:
        if seed.seed in task.missing:
            begun = written.begun.get((task.cell.key, seed.seed))
            ledger.write(store, study, task.cell, seed, about, files, begun)


def _code_hash(code: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(code["files"], sort_keys=True).encode()).hexdigest()[:16]


def _lanes(file: Path) -> list[int]:
    """The seeds of a checkpoint; none if there is no such file."""
    if not file.exists():
        return []
    content: Any = serialization.msgpack_restore(file.read_bytes())
    return content["state"]["seed"].tolist()


def _called(cell: Cell) -> str:
    trial = f" (trial {cell.trial})" if cell.trial is not None else ""
    averaged = ", averaged feedback" if cell.averaged == "true" else ""
    layers = f"{cell.depth} hidden layer{'s' * (cell.depth != 1)}"
    return f"{cell.rule}{averaged}, {layers}, {cell.options['dataset']['name']}{trial}"


def _told(outcome: cells.Outcome) -> str:
    done = [seed for seed in outcome.seeds if seed.state == cells.COMPLETE]
    scores = [seed.epochs[-1][1]["test_accuracy"] for seed in done]
    parts = [f"{len(done)} of {len(outcome.seeds)} seeds complete"]
    if scores:
        parts.append(f"test accuracy {sum(scores) / len(scores):.2f} %")
    parts += [f"seed {seed.seed} {seed.reason}" for seed in outcome.seeds if seed.reason]
    parts += [f"seed {seed.seed} flagged: {seed.flag}" for seed in outcome.seeds if seed.flag]
    return ", ".join(parts)


def _progress(tasks: Sequence[Task]) -> str:
    told = [
        f"{_called(task.cell)} {done}/{task.cell.options['epochs']}"
        for task in tasks
        if (done := cells.epochs_done(task.file))
    ]
    return f"{'; '.join(told) or 'starting'} ({len(tasks)} left)"


def _listed(seeds: Sequence[int]) -> str:
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if whole and len(seeds) > 1 else ", ".join(map(str, seeds))


if __name__ == "__main__":
    errors.run(main, __doc__)
