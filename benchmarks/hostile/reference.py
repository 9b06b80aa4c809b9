"""The commands of the cases, and the numbers that they give in a normal environment.

A study, and one that was interrupted after its first trial, are made once; cases begin with copies.
A command's numbers are made when the first case asks for them.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis import runs, store as stores
from analysis.replay import MACHINE_METRICS
from benchmarks.hostile import place as places
from benchmarks.hostile.place import Ended, Expected, Place, Strike
from disinhib.tuning import mlflow_connection
from disinhib.tuning.event_log import FILE, EventLog, replay

WHOLE, HALF = "whole", "half"  # the studies; a case that begins one calls it
NEW = "new"
OPTIONS = (
    *("experiment=smoke", "searcher.deterministic=true", "searcher.batch=1"),
    *("trials=2", "epochs=1"),
)
TRAINING = ("epochs=1", "model.vf.nb_hidden=1", "model.vf.sizes_hidden=[16]", "batchsize=25")
OF_MACHINE = {*MACHINE_METRICS, "wall_time"}
ENDS_WELL = Expected((0,))
RUN = "RUN"  # stands for the id of the run of the first selected trial


class Failure(RuntimeError):
    """The normal environment gave no numbers to compare with."""


class Command(NamedTuple):
    """A command: its words after `python`, and the numbers it gives.

    `numbers` is given the place, the study's out_dir as seen from the current folder, and how the
    command ended.
    """

    words: tuple[str, ...]
    numbers: Callable[[Place, str, Ended], Any]
    needs: str | None = None  # the study that must be there


class Reference:
    """A folder with the studies as they were made, at a path that is no longer there."""

    def __init__(self, folder: Path, patience: float):
        self.folder, self.patience, self.lock = folder, patience, threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)
        self.template = folder / "mlflow.db"
        if not self.template.exists():
            mlflow_connection._make_sqlite(self.template)

    def study(self, name: str) -> Path:
        """The folder whose cwd/ has the study in out/."""
        kept, made = self.folder / name, self.folder / "made"
        with self.lock:
            if not kept.exists():
                shutil.rmtree(made, ignore_errors=True)
                place = places.make(made)
                self.new_store(place.cwd / "out")
                begin = python("-m", "tune_main", *OPTIONS, f"study={name}")
                if name == HALF:
                    stopped = Expected((0, 128 + signal.SIGINT))
                    self._run(place, begin, stopped, _interrupt_after_a_trial)
                else:
                    self._run(place, begin)
                    self._run(place, python(*COMMANDS["selection"].words))
                made.rename(kept)
        return kept

    def copy(self, study: str, place: Place, moved: bool = False) -> None:
        """Puts a study into a place: as if it had been made there, unless it is `moved`."""
        shutil.copytree(self.study(study) / "cwd", place.cwd, dirs_exist_ok=True, symlinks=True)
        if moved:
            return
        old, new = str(self.folder / "made"), str(place.root)
        with closing(sqlite3.connect(place.cwd / "out/mlflow.db")) as database, database:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                update = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
                database.execute(update, (old, new))
        for file in place.cwd.glob("*.yaml"):
            file.write_text(file.read_text().replace(old, new))

    def new_store(self, out: Path) -> None:
        """A store of MLflow without runs, which MLflow takes seconds to make."""
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.template, out / "mlflow.db")

    def begin(self, place: Place, needs: str | None) -> None:
        self.new_store(place.cwd / "out") if needs is None else self.copy(needs, place)

    def numbers(self, command: str) -> Any:
        """Those of a command in a normal environment."""
        file, entry = self.folder / f"{command}.json", COMMANDS[command]
        with self.lock:
            if not file.exists():
                folder = self.folder / f"now-{command}"  # MLflow keeps what it knows of a path
                shutil.rmtree(folder, ignore_errors=True)
                place = places.make(folder)
                self.begin(place, entry.needs)
                ended = self._run(place, python(*self.words(entry.words)))
                file.write_text(json.dumps(entry.numbers(place, "out", ended)))
                shutil.rmtree(folder)
        return json.loads(file.read_text())

    def words(self, words: tuple[str, ...]) -> list[str]:
        """With the id of a run in the place of RUN."""
        return [self.run_id() if word == RUN else word for word in words]

    def run_id(self) -> str:
        selection = yaml.safe_load((self.study(WHOLE) / "cwd/selected.yaml").read_text())
        return selection["selected"][0]["run_id"]

    def _run(
        self,
        place: Place,
        command: str,
        expected: Expected = ENDS_WELL,
        strike: Strike | None = None,
    ) -> Ended:
        ended = places.run(place, f"exec {command}", expected, self.patience, strike=strike)
        if ended.wrong:
            raise Failure(f"{command}: {'; '.join(ended.wrong)}")
        return ended


def python(*words: str) -> str:
    return shlex.join([sys.executable, *words])


def count(study: Path, kind: str) -> int:
    """How many events of a kind a study's log has; 0 if there is none yet."""
    with suppress(sqlite3.Error):
        address = f"{(study / FILE).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as log:
            return log.execute("SELECT count(*) FROM events WHERE kind = ?", (kind,)).fetchone()[0]
    return 0


def _interrupt_after_a_trial(process: subprocess.Popen[str], place: Place) -> None:
    places.wait_for(process, lambda: count(place.cwd / "out" / HALF, "ended") > 0)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)


def of_study(folder: Path) -> dict[str, Any]:
    """Every trial of a study, as its event log has it."""
    with closing(EventLog(folder)) as log:
        records = replay(log.events())
    return {
        str(number): {
            "state": record.state,
            "searched": record.config["searched"],
            "seeds": record.config["seeds"],
            "scores": record.scores,
        }
        for number, record in sorted(records.items())
    }


def of_mlflow(uri: str, study: str) -> dict[str, Any]:
    """Every trial of a study, as MLflow has it: state and last score."""
    store = stores.connect(uri)
    rows = runs.trials(store, stores.find_study(store, study)).rows.to_dict("records")
    return {str(row["trial"]): {"state": row["state"], "score": row["score"]} for row in rows}


def _tuned(study: str, place: Place, out: str, ended: Ended) -> Any:
    """Of the event log; and of MLflow, where it has something else."""
    trials = of_study(place.cwd / out / study)
    if out != "out" or not (place.cwd / "out/mlflow.db").exists():
        return trials
    copies = of_mlflow(f"sqlite:///{place.cwd / 'out/mlflow.db'}", study)
    same = {n: {"state": t["state"], "score": t["scores"][-1]} for n, t in trials.items()}
    return trials if copies == same else {**trials, "in MLflow": copies}


def _selected(place: Place, out: str, ended: Ended) -> Any:
    return of_selection(place.cwd / "selected.yaml")


def of_selection(file: Path) -> Any:
    entries = yaml.safe_load(file.read_text())["selected"]
    return [[entry["trial"], entry["score"], entry["command"]] for entry in entries]


def of_table(file: Path) -> Any:
    """A study's trials in a CSV file."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [{k: v for k, v in row.items() if k not in ("run_id", "seconds")} for row in rows]


def of_report(folder: Path) -> Any:
    return (folder / "report.csv").read_text()


def _trained(place: Place, out: str, ended: Ended) -> Any:
    (file,) = (place.cwd / out).rglob("results.json")
    results = json.loads(file.read_text())
    return {name: value for name, value in results.items() if name not in OF_MACHINE}


def _replayed(place: Place, out: str, ended: Ended) -> Any:
    return [line for line in ended.out.splitlines() if line.startswith(("the same", "different"))]


TUNE = ("-m", "tune_main", *OPTIONS)
COMMANDS = {
    "tune": Command((*TUNE, f"study={NEW}"), partial(_tuned, NEW)),
    "resume": Command(
        ("-m", "tune_main", f"study={HALF}", "resume=true"), partial(_tuned, HALF), HALF
    ),
    "train": Command(("-m", "disinhib", *TRAINING), _trained),
    "selection": Command(("-m", "analysis.selection", f"study={WHOLE}"), _selected, WHOLE),
    "runs": Command(
        ("-m", "analysis.runs", f"study={WHOLE}", "out=runs.csv"),
        lambda place, out, ended: of_table(place.cwd / "runs.csv"),
        WHOLE,
    ),
    "report": Command(
        ("-m", "analysis.report", f"study={WHOLE}"),
        lambda place, out, ended: of_report(place.cwd / f"out/report-{WHOLE}"),
        WHOLE,
    ),
    "retrain": Command(
        ("-m", "analysis.retrain", "selected.yaml", "seeds=1"),
        lambda place, out, ended: of_study(place.cwd / out / f"{WHOLE}-retrained"),
        WHOLE,
    ),
    "replay": Command(("-m", "analysis.replay", RUN), _replayed, WHOLE),
    "pipeline": Command(
        ("-m", "analysis.pipeline", *OPTIONS, f"study={NEW}", "seeds=1"), partial(_tuned, NEW)
    ),
}
