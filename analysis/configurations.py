"""The configurations of a retraining: selected ones, or those of a grid.

Invalid input is refused here, in one line, before anything is written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis import runs, store as stores
from analysis.selection import TRAINER
from analysis.store import Refused, Store, StudyRun
from disinhib import config, hydra_config
from disinhib.checks import COUNT, INDEX, check, flatten
from disinhib.errors import ConfigError, InputError, masked, nearest, one_line
from disinhib.tuning import mlflow_connection, options as studies
from disinhib.tuning.event_log import PRUNED, REPEAT
from disinhib.tuning.validation import CHECKS, check_device

MOST_SEEDS = 10_000
CONFIG = "retrain"  # conf/retrain.yaml
OWN = ("seeds", "study", "grid", "checkpoints", "cluster", "tracking", "experiment")
# Training options that may differ from the trial's: where it runs, and from which files.
ELSEWHERE = ("device", "gpu_id", "dataset.path", "out_dir")
NOT_CONFIGURED = {  # options of where and how a run is made, not of what it learns
    *("seed", "out_dir", "resume", "device", "gpu_id", "dataset.path", "plugins"),
    *("test_at_end", "OL_eval_on_train", "diagnostics.alignment"),
    *("min_converged_share", "max_weight"),
}


class Configuration(NamedTuple):
    """A configuration to train over fresh seeds."""

    options: dict[str, Any]  # of training, resolved
    command: str  # trains it, without the seed
    rule: str
    searched: dict[str, str]  # for display
    trial: int | None = None  # the selected trial, if any
    of_run: str | None = None  # the trial's run
    repeat: int | None = None  # in which it was selected; None if tuning was not repeated
    rank: int | None = None  # in its group, from 1; 0: selected as the published defaults
    group: str = ""  # of the selection, in words; "" if it is all trials of the rule
    selected_by: str | None = None  # how it was selected, see runs.SELECTED_BY

    @property
    def key(self) -> str:
        """Identifies it in the records of a retraining."""
        return self.of_run or self.id

    @property
    def id(self) -> str:
        """A hash of its options, the same for all seeds."""
        flat = flatten(self.options)
        return digest({name: flat[name] for name in flat if name not in NOT_CONFIGURED})

    @property
    def words(self) -> str:
        dataset = self.options["dataset"]["name"]
        of_repeat = "" if self.repeat is None else f", repeat {self.repeat}"
        return runs.called(self.rule, self.feedback, self.depth, dataset, self.trial) + of_repeat

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return config.parse(self.options).architecture.hidden_layers

    @property
    def feedback(self) -> str:
        """How feedback weights come about, in words."""
        trainer = self.options["trainer"]
        averaged = trainer.get("average_fb_weights")
        if averaged is None:
            return runs.NO_FEEDBACK
        path = trainer.get("feedback", "jacobian")  # a plugin's rule may have only one
        words = runs.JACOBIAN_FEEDBACK[str(averaged).lower()]
        if path == "jacobian":
            return words
        return f"{path}, averaged" if averaged and path == "sign-symmetric" else path


def digest(plain: Mapping[str, Any]) -> str:
    """A short hash."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def checked_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The retraining's options. Raises ConfigError."""
    settings, _ = hydra_config.compose(CONFIG, overrides)
    checked = {
        **CHECKS,
        "seeds": (_are_seeds, f"a number of seeds up to {MOST_SEEDS}, or a list of different ones"),
    }
    own = ("seeds", "study", "out_dir", "cluster", "tracking", "checkpoints")
    for option, value in flatten({name: settings[name] for name in own}).items():
        if option not in checked:
            raise ConfigError(f"{option}: unknown option{nearest(option, checked)}")
        check(option, value, checked[option])
    check_device(settings)
    return settings


def _are_seeds(value: Any) -> bool:
    if not isinstance(value, list):
        return COUNT[0](value) and value <= MOST_SEEDS
    whole = all(INDEX[0](seed) and seed < 2**31 for seed in value)
    return whole and 0 < len(value) == len(set(value))


def fresh_seeds(
    asked: int | Sequence[int], used: Mapping[int, str], repeat: int | None = None
) -> list[int]:
    """The `asked` seeds, disjoint from those `used` by a search (seed -> where). Those of a
    second `repeat` are MOST_SEEDS higher, and so on: with the same seeds, repeats would not be
    independent.

    Raises Refused if a seed in the list was used, or if a repeat has too few of its own.
    """
    first = MOST_SEEDS * ((repeat or 1) - 1)
    if isinstance(asked, int):
        own = itertools.count() if repeat is None else range(first, first + MOST_SEEDS)
        seeds = list(itertools.islice((seed for seed in own if seed not in used), asked))
        if len(seeds) < asked:
            raise Refused(
                f"seeds: given {asked}, but in repeat {repeat} no search has used {len(seeds)}"
            )
        return seeds
    if repeat is not None and max(asked) >= MOST_SEEDS:
        raise Refused(
            f"seeds: given {max(asked)}, allowed are seeds below {MOST_SEEDS}: each repeat of the"
            " tuning has as many of its own"
        )
    seeds = [seed + first for seed in asked]
    for seed in seeds:
        if seed in used:
            raise Refused(f"seeds: given {seed - first}, which a search has used ({used[seed]})")
    return seeds


def used_seeds(store: Store, experiment: str) -> dict[int, str]:
    """Every seed of every search in an MLflow experiment (its id), with its trial: also those of
    studies from which the selected one may have learned."""
    return {
        seed: f"trial {run.data.tags['trial']} of {run.data.tags['study']}"
        for run in stores.trials(store, experiment)
        for seed in stores.seeds_of(run)
    }


def used_in_experiment(settings: Mapping[str, Any]) -> dict[int, str]:
    """The used seeds of the experiment for a grid, which is created if necessary."""
    out_dir = Path(settings["out_dir"]).absolute()
    hydra_config.check_folder(out_dir)
    uri = mlflow_connection.address(settings["tracking"]["uri"], out_dir)
    experiment = mlflow_connection.open_store(
        uri, settings["tracking"]["experiment"], out_dir / mlflow_connection.ARTIFACTS
    )
    return used_seeds(stores.connect(uri), experiment.id)


def of_selection(
    file: Path, settings: Mapping[str, Any], names: set[str]
) -> tuple[Store, StudyRun, list[Configuration]]:
    """The configurations of the trials that `analysis.selection` wrote into `file`, from MLflow.

    Raises Refused if `file` is not a selection, or if a trial is not complete.
    """
    for name in sorted(names):
        if name not in ELSEWHERE and name.partition(".")[0] not in (*OWN, *ELSEWHERE):
            raise Refused(f"{name}: selected configurations are trained as they were tried")
    try:
        selection = yaml.safe_load(file.read_text("utf-8"))
        uri, study_run = str(selection["tracking_uri"]), str(selection["study_run"])
        selected = {
            entry["run_id"]: (_rank(entry.get("rank")), _group(entry.get("group") or {}))
            for entry in selection["selected"]
        }
        # Earlier versions wrote fewer fields.
        selected_by = json.dumps(
            {name: selection[name] for name in runs.HOW_SELECTED if name in selection}
        )
    except OSError as error:
        raise Refused(f"{file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"{file}: is not what analysis.selection writes ({one_line(error)})"
        ) from error
    other_uri = settings["tracking"]["uri"]
    environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    if other_uri is None and masked(environment) == uri:  # with the password
        other_uri = environment
    if other_uri is None and "***" in uri:
        raise Refused(f"tracking.uri: missing, as {file} keeps no passwords ({uri})")
    if other_uri is None:
        uri = _moved_with(file, selection.get("database"), study_run) or uri
    try:
        store = stores.connect(mlflow_connection.address(other_uri or uri, Path()))
    except InputError as error:
        raise Refused(f"{file}: its store is missing: {error}") from error
    study = stores.find_study(store, study_run)
    stores.load_plugins(study.provenance)
    planned = [_of_trial(store, study, id, settings, *how) for id, how in selected.items()]
    return store, study, [one._replace(selected_by=selected_by) for one in planned]


def _rank(value: Any) -> int | None:
    """Of a selected trial; earlier versions wrote none. Raises ValueError if it is none."""
    if value is not None and not INDEX[0](value):
        raise ValueError(f"rank: given {value}, allowed is {INDEX[1]}")
    return value


def _group(group: Mapping[str, str]) -> str:
    """The group of a selected trial in words, without the rule and the repeat, which its run has,
    too."""
    own = {name: value for name, value in group.items() if name not in (TRAINER, REPEAT)}
    return ", ".join(f"{name}={value}" for name, value in own.items())


def _moved_with(file: Path, database: str | None, study_run: str) -> str | None:
    """The address of the `database` in SQLite, as seen from `file`, if it is there and has the
    study: both may have been moved or copied together."""
    if database is None:
        return None
    place = Path(os.path.abspath(file)).parent / database
    try:
        beside = mlflow_connection.address(f"sqlite:///{place}", place.parent)
        stores.run(stores.connect(beside), study_run)
    except InputError:  # no such database, or one of other studies
        return None
    return beside


def _of_trial(
    store: Store,
    study: StudyRun,
    run_id: str,
    settings: Mapping[str, Any],
    rank: int | None,
    group: str,
) -> Configuration:
    run = stores.run(store, run_id)
    tags = run.data.tags
    if tags.get("study_id") != study.id or "trial" not in tags:
        raise Refused(f"{run_id}: is not a trial of study {study.name}")
    number, state = int(tags["trial"]), tags.get("trial_state", "still running")
    if run.info.lifecycle_stage == "deleted":
        raise Refused(f"trial {number} of {study.name}: its run was deleted in MLflow; restore it")
    # The published defaults (rank 0) were selected for what they are, not for their score.
    if state not in ((runs.COMPLETE, PRUNED) if rank == 0 else (runs.COMPLETE,)):
        raise Refused(
            f"trial {number} of {study.name}: is {state}, needed is one that ran its whole budget"
            f" ({runs.COMPLETE})"
        )
    with stores.refusing(f"{run_id}: cannot read its artifacts"):
        options = yaml.safe_load(stores.text(store, run_id, "config.yaml"))
    options.update({name: settings[name] for name in ("device", "gpu_id")})
    if settings["dataset"]["path"] is not None:
        options["dataset"]["path"] = settings["dataset"]["path"]
    # Its command without the seeds (`python -m disinhib -m seed=1,2 ...`, if it had several).
    _, _, program, *words = shlex.split(tags["command"])
    words = [word for word in words if word != "-m" and not word.startswith("seed=")]
    command = shlex.join(["python", "-m", program, *words])
    repeat = int(tags[REPEAT]) if REPEAT in tags else None
    return Configuration(
        options, command, tags["rule"], run.data.params, number, run_id, repeat, rank, group
    )


def chosen_axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(the names chosen on each axis of the grid, the other options)."""
    experiment = [text for text in overrides if text.partition("=")[0] == "experiment"]
    grid = hydra_config.compose(CONFIG, experiment)[0]["grid"]
    if grid is None:
        folder = hydra_config.CONFIGURATIONS / "experiment"
        text = lambda name: (folder / f"{name}.yaml").read_text("utf-8")
        have = [n for n in hydra_config.choices_of("experiment") if "\ngrid:" in text(n)]
        raise Refused(
            f"{experiment[0].replace('=', ': given ')}, allowed is one of {', '.join(have)}"
        )
    allowed = {axis: [*map(str, names)] for axis, names in grid.items()}
    chosen, rest = dict(allowed), []
    for text in overrides:
        axis, _, names = text.partition("=")
        if axis not in grid:
            rest.append(text)
            continue
        chosen[axis] = names.split(",")
        for name in chosen[axis]:
            if name not in allowed[axis]:
                every = ", ".join(allowed[axis])
                raise Refused(f"{axis}: given {name}, allowed is one or more of {every}")
    return chosen, rest


def of_grid(
    settings: Mapping[str, Any], overrides: Sequence[str], axes: Mapping[str, Sequence[str]]
) -> list[Configuration]:
    """Every combination of the names chosen on the `axes` of the experiment's grid."""
    grid = {axis: {str(n): o for n, o in names.items()} for axis, names in settings["grid"].items()}
    default, _ = hydra_config.compose(hydra_config.TRAINING, ())
    not_in_command = {name: default[name] for name in ("seed", "out_dir", "resume")}
    planned = []
    for names in itertools.product(*axes.values()):
        cell = dict(zip(axes, names, strict=True))
        own = [override for axis, name in cell.items() for override in grid[axis][name]]
        composed, choices = hydra_config.compose(CONFIG, [*overrides, *own])
        options = {name: value for name, value in composed.items() if name not in OWN}
        options |= not_in_command
        command = hydra_config.command(options, choices)
        planned.append(Configuration(options, command, studies.rule_name(choices), cell))
    return planned
