"""A study, run: compose -> check -> run -> tell.

Everything that can be wrong with the input is found before a trial is started or anything is
written; such an error is one line (ConfigError).
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import ray
import yaml
from ray import tune
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from disinhib import command_line
from disinhib.config import refusal
from disinhib.tuning import progress, schedule, search, trial
from disinhib.tuning.options import Study, check_space, compose, configure
from search_spaces import SPACES

RAY_SWITCHES = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the study was started
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables cannot be switched off, those of the old one can
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has it all
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # `progress` names them in a line each
}


@dataclass(frozen=True)
class Finished:
    """What a study leaves: its trials as Ray and as Optuna have them, and where MLflow's are."""

    study: Study
    rows: list[trial.Row]
    record: optuna.Study
    tracking_uri: str
    run_id: str
    seconds: float


def main(arguments: list[str]) -> int:
    """Runs the study that the command line asks for.

    Returns the exit code: 0, 1 if no trial was completed, 130 if the study was interrupted.
    """
    if {"-h", "--help"} & {*arguments}:
        print((command_line.CONFIGURATIONS / "study.yaml").read_text(), end="")
        return 0
    study = compose(arguments)
    check_space(study)
    console = Console()
    finished = run(study, console)
    summary(finished, console)
    if progress.tally(finished.rows).killed:
        return 130
    return 0 if progress.best(finished.rows, study.mode) else 1


def run(
    study: Study,
    console: Console,
    trainable: type[tune.Trainable] = trial.TrainingTrial,
    callbacks: Sequence[tune.Callback] = (),
) -> Finished:
    """Runs every trial of `study`, shows it on `console`, records it in MLflow.

    `callbacks` hear what Ray says before MLflow does.

    Raises ConfigError if cluster, folder or tracking store cannot be used: before any trial.
    """
    from disinhib.tuning import tracking  # MLflow takes seconds to import: not for a wrong option

    started = time.monotonic()
    os.environ.update(RAY_SWITCHES)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Said once more at the end, as an error, of trials that `progress` has named.
    unsaid = "Trials did not complete"
    logging.getLogger("ray.tune.tune").addFilter(lambda record: unsaid not in str(record.msg))
    with _cluster(study):
        uri = tracking.absolute(study.tracking["uri"], study.out_dir)
        artifacts = study.out_dir / "mlflow-artifacts"
        store = tracking.open_store(uri, study.tracking["experiment"], artifacts)
        study.folder.mkdir(parents=True)
        (study.folder / "study.yaml").write_text(yaml.safe_dump(dict(study.options)))
        tracker = tracking.Tracker(store, study.name, study.options, command(study))
        shown = progress.Progress(console, study.trials, study.metric, study.mode)
        searcher = _searcher(study)
        console.print(f"study {study.name} in {study.folder}", soft_wrap=True, highlight=False)
        with shown:
            _tuner(study, trainable, searcher, [*callbacks, tracker, shown]).fit()
    return Finished(
        study, shown.rows, searcher.record, uri, tracker.study_run, time.monotonic() - started
    )


@contextmanager
def _cluster(study: Study) -> Iterator[None]:
    """Ray, started here or joined, for the time of the study."""
    cpus, gpus = study.cluster["cpus_per_trial"], study.cluster["gpus_per_trial"]
    with warnings.catch_warnings():
        # jax warns of forks; Ray's are all followed by an exec at once.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        address = study.cluster["address"]
        try:
            _reach(address)
            ray.init(
                address=address,
                runtime_env={"env_vars": trial.environment(cpus, gpus)},
                include_dashboard=False if address is None else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except OSError as error:  # ConnectionError is one
            allowed = "auto or HOST:PORT of a running Ray cluster, or null"
            raise refusal("cluster.address", address, allowed) from error
    try:
        for option, kind, asked in (("cpus", "CPU", cpus), ("gpus", "GPU", gpus)):
            most = max(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
            if asked > most:
                allowed = f"at most {most:g}, what the largest machine has"
                raise refusal(f"cluster.{option}_per_trial", asked, allowed)
        yield
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError if nobody listens there: Ray would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _searcher(study: Study) -> search.Search:
    options = dict(study.searcher)
    sampler, balanced = search.SAMPLERS[options.pop("name")], options.pop("balanced")
    space = SPACES[study.space]
    return search.Search(
        study.name,
        space,
        lambda branch: sampler(options, search.sampler_seed(study.seed, branch)),
        partial(configure, study),
        study.mode,
        search.rules_of(space) if balanced else (),
    )


def _scheduler(study: Study) -> TrialScheduler:
    options = dict(study.scheduler)
    make, within_rule = schedule.SCHEDULERS[options.pop("name")], options.pop("within_rule")
    build = partial(make, options, study.epochs, study.mode)
    return schedule.WithinRule(build) if within_rule else build()


def _tuner(study, trainable, searcher, callbacks) -> tune.Tuner:
    cluster = study.cluster
    resources = {"cpu": cluster["cpus_per_trial"], "gpu": cluster["gpus_per_trial"]}
    name = lambda t: f"{t.config['number']:04d}"
    return tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(study),
            num_samples=study.trials,
            # Never null: Ray would start one worker at a time and give it up as soon as another
            # falls free, so that short trials run one after the other. One more than fit waits
            # ready for the next free worker, which Ray would else send away.
            max_concurrent_trials=cluster["max_concurrent"] or _trials_at_once(resources) + 1,
            reuse_actors=True,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=study.name,
            storage_path=str(study.out_dir),
            failure_config=tune.FailureConfig(max_failures=0),  # it would only diverge again
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def _trials_at_once(resources: dict[str, float]) -> int:
    """How many trials that need `resources` fit on the cluster as it is now."""
    return sum(
        min(int(node["Resources"].get(kind.upper(), 0) // n) for kind, n in resources.items() if n)
        for node in ray.nodes()
        if node["Alive"]
    )


def command(study: Study) -> str:
    """The study's own command line."""
    return shlex.join(["python", "tune_main.py", *study.overrides])


def summary(finished: Finished, console: Console) -> None:
    """Prints the leaderboard and the commands that go on from here."""
    study, rows = finished.study, finished.rows
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    counts = ", ".join(f"{n} {state}" for state, n in progress.tally(rows)._asdict().items() if n)
    say(f"\nstudy {study.name}: {len(rows)} trials in {progress.clock(finished.seconds)}: {counts}")
    console.print(progress.leaderboard(rows, study.metric, study.mode))
    uri = shlex.quote(finished.tracking_uri)
    ui = uri if uri.startswith("http") else f"{_tool('mlflow')} ui --backend-store-uri {uri}"
    address = "" if uri.startswith("http") else "   (then http://127.0.0.1:5000)"
    say(f"\nall trials:  {ui}{address}")
    if top := progress.best(rows, study.mode):
        say(f"best trial:  {_tool('python')} {top.command.removeprefix('python ')}")


def _tool(name: str) -> str:
    """The environment's command `name`, as short as it can be typed from here."""
    path = Path(sys.executable).parent / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
