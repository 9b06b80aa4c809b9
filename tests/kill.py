"""Studies that are killed again and again: `python -m tests.kill [times=25] [workers=true]`.

A real study's driver is SIGKILLed at random moments (drawn from `seed`, printed) and started
again, `times` in all, five times a study: while it starts, while its stores catch up, in the midst
of its trials, and the last time as it ends. Each study is then looked at in all three stores and
compared with its event log, trial by trial; what early stopping decided is decided again from the
log; and trials that went on after a kill are trained again without one. `workers=true` kills
workers instead, and the study has to go on by itself. Exit code 0: no violation.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import psutil
import yaml
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune import ExperimentAnalysis
from rich.console import Console
from rich.table import Table

from disinhib import cli
from disinhib.checks import COUNT, FLAG, INDEX, OPTIONAL_TEXT, Option
from disinhib.tuning import early_stopping, environment, mlflow_store, optuna_store, ray_backend
from disinhib.tuning.event_log import (
    COMPLETE,
    ENDED,
    FAILED,
    PRUNED,
    EpochDone,
    EventLog,
    Logged,
    Record,
    follow,
    over_seeds,
    replay,
)
from disinhib.tuning.resume import FILE
from disinhib.tuning.suggest import STATES as OPTUNA_STATES

ROOT = Path(__file__).resolve().parents[1]
NAME = "killed"
# Trials of 0 to 3 s, some of them stopped early and some failed for their large weights.
TRIALS = 24
OPTIONS = (
    *("experiment=smoke", "epochs=8", "batchsize=5"),
    *("model.vf.sizes_hidden=[256]", "max_weight=1.2", "checkpoints.every_seconds=0"),
)
KILLS = 5  # of one study
# What a moment is counted from, and the seconds that there can be between them. Not from the start
# alone: a busy machine takes ten times as long to start Ray as an idle one.
START, TABLES, RECONCILE, END = (
    "start",
    "MLflow's file is there",
    "stores opened",
    "last trial ended",
)
SINCE = {START: (0.5, 15.0), TABLES: (0.0, 3.0), RECONCILE: (0.0, 3.0), END: (0.0, 2.5)}
MORE, AFTER = "trials more", (0.0, 1.0)
OF_WORKERS = (0.0, 3.0)  # s after the last kill of a worker, or the first epoch of all
PATIENCE = 1800.0  # s for which a driver may run, on a busy machine
AFTERLIFE = 600.0  # s in which the processes of a killed driver are gone; Ray's agents take 30
REPLAYED = 2  # trials of a study that are trained again
# Titles that Ray gives to the process of a worker that trains, and of one between two calls, which
# may be about to get another trial.
TRAINS, WAITS = "ray::ResourceTrainable.train", "ray::TrainingTrial"
SERVES = "ray::LaneServer"
STATES = {state: name for name, state in OPTUNA_STATES.items()}
METRIC = "valid_accuracy"  # that the studies are tuned by
# Trains trials again, in the environment of a worker: their runs' ids are the arguments.
REPLAYS = """
import sys
from analysis import replay
codes = [replay.main([run, f"tracking.uri={sys.argv[1]}"]) for run in sys.argv[2:]]
sys.exit(max(codes, default=0))
"""


class Moment(NamedTuple):
    """`seconds` after `since` (a key of SINCE, or MORE: when `trials` more have ended)."""

    since: str
    seconds: float
    trials: int = 0

    def __str__(self) -> str:
        return f"{self.trials or ''} {self.since} + {self.seconds:.2f} s".strip()


class Row(NamedTuple):
    """One start of a driver, and what became of it."""

    study: str
    resumed: bool
    moment: str  # of the kill; empty if it was not to be killed
    code: int  # its exit code, that of SIGKILL if it was killed
    seconds: float
    start: str  # what it said that it resumed with
    repaired: list[str]
    message: str  # its last line on stderr
    ended: frozenset[int]  # trials that had ended before it

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Trial(NamedTuple):
    """A trial as a store has it. Ray has the last epoch only."""

    store: str
    number: int
    state: str
    scores: dict[int, float]  # by epoch


class Failure(RuntimeError):
    """A driver that hangs or that cannot go on."""


def draw(rng: random.Random, times: int, trials: int = TRIALS) -> list[Moment]:
    """`times` moments of one study of so many `trials`, the last around its end, half of the others
    amid trials."""
    drawn = []
    for _ in range(times - 1):
        since = rng.choice((START, TABLES, RECONCILE, MORE, MORE, MORE))
        more = rng.randint(1, trials // 4) if since == MORE else 0
        drawn.append(Moment(since, rng.uniform(*SINCE.get(since, AFTER)), more))
    return [*drawn, Moment(END, rng.uniform(*SINCE[END]))]


def kill_and_resume(
    folder: Path, moments: Sequence[Moment], trials: int = TRIALS, options: Sequence[str] = ()
) -> list[Row]:
    """Runs a study of so many `trials` in `folder` to its end, its driver killed at `moments` of
    its starts in turn. `options` are put on top of OPTIONS.

    A start that ends before its moment ends the study, so there may be fewer kills than moments.

    Raises Failure if a driver hangs, or if one that was not killed does not end well.
    """
    rows, pending, ghosts = [], list(moments), []
    while not rows or rows[-1].code != 0:
        moment = pending.pop(0) if pending else None
        with _driver(folder, len(rows), trials, options) as driver:
            if moment is not None and _comes(driver, moment):
                ghosts += driver.processes()
                os.kill(driver.process.pid, signal.SIGKILL)
            rows.append(driver.end(moment))
        _raise_unless(rows[-1].killed or rows[-1].code == 0, rows[-1])
    _, left = psutil.wait_procs(ghosts, timeout=AFTERLIFE)
    if left:
        raise Failure(f"{NAME}: of killed drivers, still there: {', '.join(map(str, left))}")
    return rows


def kill_workers(folder: Path, rng: random.Random, times: int, lanes: int) -> list[Row]:
    """Runs a study in `folder`, of which `times` workers are killed at random: one that trains,
    one that waits, and so on. With more than one of `lanes`, it is their servers.

    Raises Failure as `kill_and_resume`, or if it ended before all were killed.
    """
    titles = [(TRAINS, "training"), (WAITS, "waiting")] if lanes == 1 else [(SERVES, "serving")]
    with _driver(folder, 0, TRIALS, (f"cluster.lanes={lanes}",)) as driver:
        killed, began = [], time.monotonic()
        while not _finished(driver.study) and driver.runs():
            pass
        for number in range(times):
            title, how = titles[number % len(titles)]
            driver.runs(rng.uniform(*OF_WORKERS))
            while driver.runs():
                workers = [p for p in driver.processes() if _title(p).startswith(title)]
                if workers:
                    rng.choice(workers).kill()
                    killed.append(f"{how} after {time.monotonic() - began:.1f} s")
                    break
        row = driver.end(None)._replace(moment=f"workers {', '.join(killed)}")
    _raise_unless(row.code == 0 and len(killed) == times, row)
    return [row]


def _raise_unless(well: bool, row: Row) -> None:
    if not well:
        raise Failure(f"{row.study}: a driver ended with {row.code}: {row.message}")


class _Driver:
    """A `tune_main.py` that runs the study in `folder`: a new one, or the one that is there."""

    def __init__(self, folder: Path, start: int, trials: int, options: Sequence[str]):
        self.folder, self.study, self.trials = folder, folder / "out" / NAME, trials
        self.resumed = self.study.exists()
        records = replay(read_log(self.study)).values() if self.resumed else ()
        self.ended = frozenset(record.number for record in records if record.ended)
        self.texts = [folder / f"{start:02d}.{stream}" for stream in ("stdout", "stderr")]
        new = (*OPTIONS, f"trials={trials}", *options)
        words = ("resume=true",) if self.resumed else new
        place = [f"study={NAME}", f"out_dir={folder / 'out'}"]
        with self.texts[0].open("w") as out, self.texts[1].open("w") as err:
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, "tune_main.py", *place, *words],
                **{"cwd": ROOT, "env": _environment(folder), "stdout": out, "stderr": err},
            )

    def runs(self, seconds: float = 0.02) -> bool:
        """Whether it still runs after some seconds. Raises Failure if it has too long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            if time.monotonic() - self.began < PATIENCE:
                return True
            raise Failure(f"{NAME}: a driver still runs after {PATIENCE:.0f} s") from None
        return False

    def processes(self) -> list[psutil.Process]:
        """All that it has started, Ray's own among them."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def end(self, moment: Moment | None) -> Row:
        """What became of it, when it has ended."""
        while self.runs():
            pass
        seconds = time.monotonic() - self.began
        said, errors = (path.read_text().splitlines() for path in self.texts)
        resumed = [line for line in said if line.startswith("resumed with ")]
        return Row(
            study=self.folder.name,
            resumed=self.resumed,
            moment="" if moment is None else str(moment),
            code=self.process.returncode,
            seconds=seconds,
            start=resumed[0].removeprefix("resumed with ") if resumed else "",
            repaired=[
                line.removeprefix("repaired: ") for line in said if line.startswith("repaired: ")
            ],
            message=errors[-1] if errors else "",
            ended=self.ended,
        )


@contextmanager
def _driver(folder: Path, start: int, trials: int, options: Sequence[str]) -> Iterator[_Driver]:
    folder.mkdir(parents=True, exist_ok=True)
    driver = _Driver(folder, start, trials, options)
    try:
        yield driver
    finally:
        driver.process.kill()  # unless it has ended
        driver.process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """That of every start, and of the trainings that are compared with them."""
    # Set, it makes Ray's workers compile all that they import.
    left = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"), **left}


def _comes(driver: _Driver, moment: Moment) -> bool:
    """Waits for `moment`; False if the driver ended before."""
    before = _finished(driver.study)
    trials = driver.trials
    wanted = {MORE: min(trials, before + moment.trials), END: trials}.get(moment.since, 0)
    while driver.runs():
        there = {
            TABLES: lambda: (driver.study.parent / "mlflow.db").exists(),
            RECONCILE: lambda: f"study {NAME} in " in driver.texts[0].read_text(),
        }.get(moment.since, lambda: _finished(driver.study) >= wanted)
        if there():
            return driver.runs(moment.seconds)
    return False


def _finished(study: Path) -> int:
    """How many trials have ended, as Optuna's file has it."""
    file = study / optuna_store.FILE
    return sum(trial.state.is_finished() for trial in _optuna(file)) if file.exists() else 0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def read_log(study: Path) -> list[Logged]:
    with closing(EventLog(study)) as log:
        return log.events()


def inspect(study: Path) -> list[Trial]:
    """Every trial of the study in folder `study`, as often as each store has it; Ray has those of
    the last session."""
    trials = [
        Trial("log", number, record.state, dict(enumerate(record.scores, start=1)))
        for number, record in replay(read_log(study)).items()
    ]
    for trial in _ray(study):
        last, budget = trial.last_result or {}, trial.config["epochs"]
        epoch = last.get("training_iteration", 0)
        state = {"TERMINATED": COMPLETE if epoch == budget else PRUNED, "ERROR": FAILED}
        scores = {epoch: last[METRIC]} if METRIC in last else {}
        name = str(state.get(trial.status, trial.status))
        trials.append(Trial("ray", trial.config["number"], name, scores))
    for trial in _optuna(study / optuna_store.FILE):
        state = STATES.get(trial.state, trial.state.name)
        trials.append(Trial("optuna", trial.number, state, trial.intermediate_values))
    for run in runs(study):
        tags = run.data.tags
        tag = tags.get("trial_state", "none")
        status = mlflow_store.RUN_STATUS.get(tag)
        state = tag if run.info.status == status else f"{tag} and {run.info.status}"
        scores = dict(_history(study, run, METRIC))
        trials.append(Trial("mlflow", int(tags["trial"]), state, scores))
    return trials


def _ray(study: Path) -> list[Any]:
    folder = study.absolute() / ray_backend.FOLDER
    if not any(folder.glob("experiment_state-*.json")):  # nothing was left for the last session
        return []
    # It misses Ray's own logs, of which there are none.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    return ExperimentAnalysis(str(folder)).trials or []


def _optuna(file: Path) -> list[optuna.trial.FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(file)))
    names = optuna.get_all_study_names(storage)  # none, just after the file was made
    own = [name for name in names if "/" not in name]  # the others have copies, rule by rule
    studies = [optuna.load_study(study_name=name, storage=storage) for name in own]
    return [trial for study in studies for trial in study.get_trials()]


def _client(study: Path) -> MlflowClient:
    return MlflowClient(_uri(study))


def _uri(study: Path) -> str:
    given = yaml.safe_load((study / FILE).read_text())["options"]["tracking"]["uri"]
    return given or f"sqlite:///{study.parent.absolute() / 'mlflow.db'}"


def runs(study: Path, trials: bool = True) -> list[Any]:
    """MLflow's runs of the study's trials, or of the study itself."""
    client = _client(study)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    own = client.search_runs(experiments, f"tags.study = '{study.name}'", max_results=10_000)
    return [run for run in own if ("trial" in run.data.tags) == trials]


def _history(study: Path, run: Any, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of all that was logged, in its order."""
    history = _client(study).get_metric_history(run.info.run_id, metric)
    return [(entry.step, entry.value) for entry in history]


def check(study: Path, ended_before: Collection[int] = ()) -> list[str]:
    """What is wrong with a study that is over: lost, twice, unfinished or not the same. Ray has
    none of the trials that had `ended_before` the last session."""
    options = yaml.safe_load((study / FILE).read_text())["options"]
    numbers = range(options["trials"])
    trials, wrong = inspect(study), []
    expected = {store: {*numbers} for store in ("log", "optuna", "mlflow")}
    expected["ray"] = {*numbers} - {*ended_before}
    for store, own in expected.items():
        times = Counter(trial.number for trial in trials if trial.store == store)
        for number in sorted({*own, *times}):
            if times[number] != (number in own):
                wrong.append(f"trial {number} is {times[number]} times in {store}")
    truth = {trial.number: trial for trial in trials if trial.store == "log"}
    for trial in trials:
        if trial.state not in ENDED:
            wrong.append(f"trial {trial.number} is {trial.state} in {trial.store}")
        same = truth.get(trial.number)
        if same is None:
            continue
        if trial.state != same.state:
            wrong.append(
                f"trial {trial.number} is {trial.state} in {trial.store}, not {same.state}"
            )
        last = dict(list(same.scores.items())[-1:])
        failed_in_ray = trial.store == "ray" and same.state == FAILED  # its last result is why
        if trial.scores != (last if trial.store == "ray" else same.scores) and not failed_in_ray:
            wrong.append(
                f"trial {trial.number} has epochs {[*trial.scores]} in {trial.store}, not"
                f" {[*same.scores]}, or other scores"
            )
    events = read_log(study)
    return [*wrong, *_check_runs(study, events), *_check_decisions(events, options)]


def _check_runs(study: Path, events: Sequence[Logged]) -> list[str]:
    """What is wrong with MLflow's runs besides their states: every metric has every epoch of the
    log, once and with its value."""
    wrong, parents = [], runs(study, trials=False)
    if [run.info.status for run in parents] != ["FINISHED"]:
        wrong.append(f"the study's own runs are {[run.info.status for run in parents]}")
    histories: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for event in (logged.event for logged in events):
        own = histories.setdefault(event.trial, {})
        if isinstance(event, EpochDone):
            for name, value in over_seeds(event.metrics).items():
                own.setdefault(name, []).append((event.epoch, value))
    for run in runs(study):
        number = int(run.data.tags["trial"])
        expected = histories[number]
        for metric in sorted({*expected, *run.data.metrics}):
            history = _history(study, run, metric)
            if history != expected.get(metric):
                epochs = [epoch for epoch, _ in history]
                wrong.append(f"trial {number} has epochs {epochs} of {metric} in mlflow, or values")
        epochs = len(expected.get(METRIC, []))
        if run.data.tags.get("epochs") != str(epochs):
            wrong.append(f"trial {number} is tagged with {run.data.tags.get('epochs')} epochs")
        if run.data.tags.get(MLFLOW_PARENT_RUN_ID) not in {run.info.run_id for run in parents}:
            wrong.append(f"trial {number} is no child of its study")
        kept = {file.path for file in _client(study).list_artifacts(run.info.run_id)}
        lacks = {"config.yaml", "command.txt", "provenance.json", "space.json"} - kept
        if lacks or not run.data.params:
            wrong.append(f"trial {number} lacks {', '.join(sorted(lacks)) or 'params'} in mlflow")
    return wrong


def _check_decisions(events: Sequence[Logged], options: dict[str, Any]) -> list[str]:
    """Trials that did not end where and as an uninterrupted study had ended them."""
    searcher = options["searcher"]
    batch = searcher["batch"] if searcher["deterministic"] else None
    records: dict[int, Record] = {}
    stops: dict[int, int] = {}
    for event in (logged.event for logged in events):
        follow(records, event)
        if isinstance(event, EpochDone) and event.epoch < (own := records[event.trial]).budget:
            decision = (records, own, options["scheduler"], options["seed"])
            if early_stopping.decide(*decision, batch):
                stops.setdefault(event.trial, event.epoch)
    lost = [r for r in records.values() if r.reason and not r.reason.startswith("Diverged: ")]
    failed = [f"trial {record.number} failed: {record.reason}" for record in lost]
    ends = {n: r.epochs for n, r in records.items() if r.state == PRUNED}
    return failed + [
        f"trial {n} was stopped after epoch {ends.get(n)}, not {stops.get(n)}"
        for n in sorted({*ends, *stops})
        if ends.get(n) != stops.get(n)
    ]


def went_on(rows: Sequence[Row]) -> list[int]:
    """Trials that were in the midst of their epochs when a driver was killed."""
    text = " ".join(row.start for row in rows)
    unfinished = re.findall(r"trial (\d+) after epoch (\d+)", text)
    return list(dict.fromkeys(int(number) for number, epoch in unfinished if int(epoch)))


def restarted(study: Path) -> list[int]:
    """Trials that went on when their worker had died."""
    died = [trial for trial in _ray(study) if trial.num_failures]
    return sorted(trial.config["number"] for trial in died if trial.status == "TERMINATED")


def check_training(study: Path, numbers: Sequence[int]) -> list[str]:
    """Whether the trials `numbers` have other metrics than an uninterrupted training."""
    ids = {int(run.data.tags["trial"]): run.info.run_id for run in runs(study)}
    variables = environment.of_worker(cpus=1, gpus=0) | _environment(study.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", REPLAYS, _uri(study), *(ids[number] for number in numbers)],
        **{"cwd": ROOT, "env": variables, "capture_output": True, "text": True},
    )
    said = (done.stdout + done.stderr).strip().splitlines()
    return (
        [f"of trials {numbers}, trained again: {' | '.join(said[-8:])}"] if done.returncode else []
    )


def table(rows: Sequence[Row]) -> Table:
    """A line for each start of a driver: trials that had ended, those that went on with the epochs
    they had, and what the stores lacked."""
    drawn = Table("study", "", "to be killed", "was, after", "ended", "went on", "mended", box=None)
    for row in rows:
        ended = re.match(r"\d+", row.start)
        unfinished = re.findall(r"trial (\d+) after epoch (\d+)", row.start)
        drawn.add_row(
            row.study,
            "resumed" if row.resumed else "new",
            row.moment or "never",
            f"{row.seconds:.1f} s" if row.killed else f"exit code {row.code}, {row.seconds:.1f} s",
            ended.group() if ended else "",
            ", ".join(f"{number} ({epoch})" for number, epoch in unfinished),
            "; ".join(row.repaired),
        )
    return drawn


COMMAND = cli.Command(
    "tests.kill",
    __doc__,
    (
        Option("times", 25, COUNT, "kills in all"),
        Option("seed", 0, INDEX, "seed of the moments"),
        Option("workers", False, FLAG, "kill workers (or servers of lanes), not the driver"),
        Option("lanes", 1, COUNT, "cluster.lanes of the studies"),
        Option("folder", None, OPTIONAL_TEXT, "folder to leave the studies in; null: none"),
        Option("json", None, OPTIONAL_TEXT, "file to write the rows to as well"),
    ),
)


def main(arguments: Sequence[str]) -> int:
    options = COMMAND.parse(arguments)
    rng, console = random.Random(options["seed"]), Console(width=150)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    rows, wrong, left, number = [], [], options["times"], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["folder"] or temporary).absolute()
        while left:
            number += 1
            place, times = folder / f"{number}", min(left, KILLS)
            study = place / "out" / NAME
            try:
                if options["workers"]:
                    most = min(times, ray_backend.WORKERS_LOST)
                    new = kill_workers(place, rng, most, options["lanes"])
                    left -= min(times, ray_backend.WORKERS_LOST)
                    again = restarted(study)
                else:
                    moments = draw(rng, times)
                    say(f"study {number}, seed {options['seed']}: {', '.join(map(str, moments))}")
                    new = kill_and_resume(
                        place, moments, options=(f"cluster.lanes={options['lanes']}",)
                    )
                    left -= sum(row.killed for row in new)
                    again = went_on(new)
                console.print(table(new))
                wrong_here = check(study, new[-1].ended)
                problems = [*wrong_here, *check_training(study, again[:REPLAYED])]
            except Failure as failure:
                new, problems, left = [], [str(failure)], left - times
                again = []
            say(f"trained again: {', '.join(map(str, again[:REPLAYED])) or 'none'}")
            for problem in problems:
                say(f"VIOLATION: {problem}")
            rows += new
            wrong += problems
    say(f"{sum(row.killed for row in rows)} kills, {len(rows)} starts, {len(wrong)} violations")
    if options["json"]:
        starts = [{**row._asdict(), "ended": sorted(row.ended)} for row in rows]
        Path(options["json"]).write_text(json.dumps(starts, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
