"""Stores and studies that were moved, copied, edited, half deleted, or are of something else."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import yaml
from mlflow import MlflowClient

from benchmarks.hostile.case import WORKS, Case, Scene, differences, refused, says
from benchmarks.hostile.environments import PLAIN
from benchmarks.hostile.place import Ended, Expected, Place
from benchmarks.hostile.reference import HALF, NEW, TUNE, WHOLE

EITHER = WORKS | refused()
Change = Callable[[Place], object]
READERS = ("selection", "runs", "report", "replay", "retrain")


def _client(place: Place) -> MlflowClient:
    return MlflowClient(f"sqlite:///{place.cwd / 'out/mlflow.db'}")


def _runs(place: Place, trial: int | None) -> list[str]:
    """The ids of a trial's run, or of the study's own."""
    client = _client(place)
    every = client.search_runs([e.experiment_id for e in client.search_experiments()])
    tag = None if trial is None else str(trial)
    return [run.info.run_id for run in every if run.data.tags.get("trial") == tag]


def _delete_runs(*trials: int | None) -> Change:
    """As the button of MLflow's UI does."""

    def change(place: Place) -> None:
        for trial in trials:
            for run in _runs(place, trial):
                _client(place).delete_run(run)

    return change


def _delete_experiment(place: Place) -> None:
    experiment = _client(place).get_experiment_by_name("disinhib-smoke")
    assert experiment is not None
    _client(place).delete_experiment(experiment.experiment_id)


def _best(place: Place) -> None:
    """Deletes the run of the trial that was selected."""
    selected = yaml.safe_load((place.cwd / "selected.yaml").read_text())["selected"]
    best = max(selected, key=lambda entry: entry["score"])
    _client(place).delete_run(best["run_id"])


def _removed(*paths: str) -> Change:
    def change(place: Place) -> None:
        for path in (place.cwd / path for path in paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _written(path: str, content: bytes) -> Change:
    return lambda place: (place.cwd / path).write_bytes(content)


def _cut(path: str, share: float = 0.5) -> Change:
    def change(place: Place) -> None:
        whole = (place.cwd / path).read_bytes()
        (place.cwd / path).write_bytes(whole[: int(share * len(whole))])

    return change


def _edited(path: str, old: str, new: str) -> Change:
    def change(place: Place) -> None:
        text = (place.cwd / path).read_text()
        assert old in text, f"{path} lacks {old!r}"
        (place.cwd / path).write_text(text.replace(old, new))

    return change


def _other_database(path: str) -> Change:
    def change(place: Place) -> None:
        (place.cwd / path).unlink()
        with closing(sqlite3.connect(place.cwd / path)) as database, database:
            database.execute("CREATE TABLE songs (title TEXT)")

    return change


def _statement(path: str, text: str) -> Change:
    def change(place: Place) -> None:
        with closing(sqlite3.connect(place.cwd / path)) as database, database:
            database.execute(text)

    return change


def _locked(place: Place) -> None:
    """The write lock of the event log is held for as long as the benchmark runs."""
    held = sqlite3.connect(place.cwd / f"out/{HALF}/events.db", check_same_thread=False)
    held.isolation_level = None
    held.execute("BEGIN EXCLUSIVE")
    _HELD.append(held)


_HELD: list[sqlite3.Connection] = []


def _readonly(place: Place) -> None:
    for top, folders, files in os.walk(place.cwd / "out", topdown=False):
        for name in (*files, *folders):
            Path(top, name).chmod(0o444 if name in files else 0o555)
    (place.cwd / "out").chmod(0o555)


def _moved(to: str) -> Change:
    def change(place: Place) -> None:
        (place.cwd / to).parent.mkdir(parents=True, exist_ok=True)
        (place.cwd / "out").rename(place.cwd / to)

    return change


def _copied(place: Place) -> None:
    """The name of a study twice in one folder, with the same identity."""
    shutil.copytree(place.cwd / f"out/{HALF}", place.cwd / "out/copy")


STORE = "out/mlflow.db"
ANSWERS = refused("study|mlflow.db|tracking.uri|artifact|run")
# What is done to the store of a whole study; the commands; what they may end in.
CHANGES: tuple[tuple[str, Change, str, Expected], ...] = (
    ("without artifacts", _removed("out/mlflow-artifacts"), " ".join(READERS), ANSWERS),
    ("without one trial's run", _delete_runs(0), "selection report retrain", refused("trial|run")),
    ("without the best trial's run", _best, "selection report retrain", refused("trial|run")),
    ("without the study's run", _delete_runs(None), " ".join(READERS[:3]), refused("study|run")),
    ("without the study's run", _delete_runs(None), "replay", EITHER),
    ("without any run", _delete_runs(0, 1, None), "selection report", ANSWERS),
    ("with its experiment deleted", _delete_experiment, "selection report retrain", ANSWERS),
    ("without mlflow.db", _removed(STORE), " ".join(READERS), refused("mlflow.db")),
    ("with an empty mlflow.db", _written(STORE, b""), " ".join(READERS), refused("mlflow.db")),
    ("with half of mlflow.db", _cut(STORE), "selection report tune", refused("mlflow.db")),
    ("with text in mlflow.db", _written(STORE, b"hello\n" * 99), "selection tune resume",
     refused("mlflow.db")),
    ("with another program's mlflow.db", _other_database(STORE), "selection tune",
     refused("mlflow.db")),
    ("with a later version's mlflow.db",
     _statement(STORE, "UPDATE alembic_version SET version_num = 'ffffffffffff'"),
     "selection tune", refused("mlflow")),
    ("with an old version's mlflow.db",
     _statement(STORE, "UPDATE alembic_version SET version_num = '451aebb31d03'"),
     "tune", refused("db upgrade")),
    ("with a metric missing", _statement(STORE, "DELETE FROM latest_metrics"), "selection report",
     refused("valid_accuracy|trial")),
    ("with a table missing", _statement(STORE, "DROP TABLE metrics"), "report replay", ANSWERS),
    ("with a score edited to NaN", _statement(
        STORE, "UPDATE latest_metrics SET is_nan = 1 WHERE key = 'valid_accuracy'"),
     "selection", refused("valid_accuracy|trial")),
    ("that is read only", _readonly, "selection runs replay report", WORKS | refused("out")),
    ("that is read only", _readonly, "tune resume retrain", refused("out|written|read")),
    ("without its folder", _removed(f"out/{WHOLE}"), "selection runs replay retrain", EITHER),
)  # fmt: skip
# What is done to the study that was interrupted, before it is resumed.
EVENTS, MANIFEST, KEPT, OPTUNA = (
    f"out/{HALF}/{file}" for file in ("events.db", "manifest.json", "study.yaml", "optuna.log")
)
RESUMED: tuple[tuple[str, Change, Expected], ...] = (
    ("as it is", lambda place: None, WORKS),
    ("without its manifest", _removed(MANIFEST), refused("manifest|half")),
    ("with half of its manifest", _cut(MANIFEST), refused("manifest")),
    ("with an empty manifest", _written(MANIFEST, b""), refused("manifest")),
    ("with another manifest", _written(MANIFEST, b'{"id": 7}'), refused("manifest")),
    ("without study.yaml", _removed(KEPT), refused("study")),
    ("with half of study.yaml", _cut(KEPT), refused("study")),
    ("with other trials in study.yaml", _edited(KEPT, "trials: 2", "trials: two"), refused()),
    ("with another budget in study.yaml", _edited(KEPT, "epochs=1", "epochs=3"),
     refused("epochs")),
    ("with binary in study.yaml", _written(KEPT, b"\x00\xff\xfe"), refused("study")),
    ("without events.db", _removed(EVENTS), refused("events.db")),
    ("with an empty events.db", _written(EVENTS, b""), refused("events.db")),
    ("with half of events.db", _cut(EVENTS), refused("events.db")),
    ("with text in events.db", _written(EVENTS, b"hello\n" * 99), refused("events.db")),
    ("with another program's events.db", _other_database(EVENTS), refused("events.db")),
    ("with an event edited", _statement(EVENTS, "UPDATE events SET body = '{' WHERE id = 1"),
     refused("events.db")),
    ("with the first event missing", _statement(EVENTS, "DELETE FROM events WHERE id = 1"),
     refused("events.db")),
    ("while another process holds events.db", _locked, refused("events.db|run")),
    ("with half of optuna.log", _cut(OPTUNA), WORKS),
    ("with optuna.log cut in its last line", _cut(OPTUNA, 0.99), WORKS),
    ("with an empty optuna.log", _written(OPTUNA, b""), WORKS),
    ("with text in optuna.log", _written(OPTUNA, b"hello\n" * 9), WORKS | refused("optuna.log")),
    ("without optuna.log", _removed(OPTUNA), WORKS),
    ("without mlflow.db", _removed(STORE), WORKS),
    ("without artifacts", _removed("out/mlflow-artifacts"), WORKS),
    ("without the study's run", _delete_runs(None), WORKS),
    ("without a trial's run", _delete_runs(0), WORKS),
    ("without any run", _delete_runs(0, 1, None), WORKS),
    ("with its experiment deleted", _delete_experiment, refused("experiment")),
    ("without Ray's record and checkpoints",
     _removed(f"out/{HALF}/ray", f"out/{HALF}/checkpoints"), WORKS),
    ("with checkpoints that are no folder", lambda place: (
        shutil.rmtree(place.cwd / f"out/{HALF}/checkpoints"),
        (place.cwd / f"out/{HALF}/checkpoints").write_text("x")), EITHER),
)  # fmt: skip
SELECTIONS: tuple[tuple[str, Change], ...] = (
    ("that is empty", _written("selected.yaml", b"")),
    ("that is no YAML", _written("selected.yaml", b"{[")),
    ("that is binary", _written("selected.yaml", b"\x00\xff\xfe\x80")),
    ("that is a list", _written("selected.yaml", b"- 1\n- 2\n")),
    ("that is cut", _cut("selected.yaml", 0.6)),
    ("with another run", _edited("selected.yaml", "run_id: ", "run_id: 0")),
    ("of another store", _edited("selected.yaml", "mlflow.db", "other.db")),
    ("of an unknown scheme", _edited("selected.yaml", "sqlite:///", "nonsense://")),
    ("without a selection", _written(
        "selected.yaml", b"study: x\nstudy_run: y\ntracking_uri: sqlite:///out/mlflow.db\n"
        b"selected: []\n")),
    ("with a score edited", _edited("selected.yaml", "score: ", "score: 9")),
    ("that is missing", _removed("selected.yaml")),
    ("that is a folder", lambda place: (
        (place.cwd / "selected.yaml").unlink(), (place.cwd / "selected.yaml").mkdir())),
)  # fmt: skip


def cases() -> list[Case]:
    elsewhere = "far/away/out"
    there = f"tracking.uri=sqlite:///{elsewhere}/mlflow.db"
    return [
        *(
            Case(f"stores: {what}: {command}", command, expected, prepare=change,
                 needs=HALF if command == "resume" else WHOLE,
                 shell=f"exec {PLAIN}{{}}" if change is _readonly else "exec {}")
            for what, change, commands, expected in CHANGES
            for command in commands.split()
        ),
        *(
            Case(f"stores: {what}: runs names it", "runs", says("left out: trial"),
                 words=("-m", "analysis.runs", f"study={WHOLE}"), prepare=change)
            for what, change in (("without one trial's run", _delete_runs(0)),
                                 ("without the best trial's run", _best))
        ),
        *(
            Case(f"stores: half, {what}: resume", "resume", expected, prepare=change)
            for what, change, expected in RESUMED
        ),
        *(
            Case(f"stores: a selection {what}: retrain", "retrain", refused("selected.yaml|run"),
                 prepare=change)
            for what, change in SELECTIONS
        ),
        *(
            Case(f"stores: made elsewhere, read here: {command}", command, moved=True)
            for command in (*READERS, "resume")
        ),
        *(
            Case(f"stores: moved to {elsewhere}: {command}", command, prepare=_moved(elsewhere),
                 options=(there, *more), moved=True, out=elsewhere)
            for command, more in (
                ("selection", ()), ("runs", ()), ("replay", ()),
                ("report", (f"out=out/report-{WHOLE}",)), ("retrain", (f"out_dir={elsewhere}",)))
        ),
        Case(f"stores: moved to {elsewhere}: resume", "resume", prepare=_moved(elsewhere),
             options=(f"out_dir={elsewhere}",), moved=True, out=elsewhere),
        Case("stores: a new study in a moved out: tune", needs=WHOLE, moved=True,
             then=_nothing_at_the_old_place),
        Case("stores: read through a link: selection", "selection", prepare=_linked),
        Case("stores: the study's folder copied under another name: resume", "resume",
             refused("copy"), words=("-m", "tune_main", "study=copy", "resume=true"),
             prepare=_copied),
        Case("stores: resumed twice: resume", "resume", then=_again),
        Case("stores: whole, resumed: tune", "tune", WORKS, needs=WHOLE,
             words=("-m", "tune_main", f"study={WHOLE}", "resume=true")),
        Case("stores: a study of this name is there: tune", "tune", refused("resume=true"),
             words=(*TUNE, f"study={WHOLE}"), needs=WHOLE),
        Case("stores: the newest study is taken, and named: selection", "selection",
             says(WHOLE), words=("-m", "analysis.selection"), needs=WHOLE,
             leaves=("cwd/selected.yaml",)),
        Case("stores: a relative searcher.storage, resumed from elsewhere: tune",
             options=("searcher.storage=sqlite:///optuna.db",), then=_resumed_from_elsewhere,
             leaves=("cwd/optuna.db",)),
    ]  # fmt: skip


def _linked(place: Place) -> None:
    (place.cwd / "out").rename(place.cwd / "real")
    (place.cwd / "out").symlink_to("real")


def _nothing_at_the_old_place(scene: Scene, ended: Ended) -> list[str]:
    old = scene.reference.folder / "made"
    return [f"it has written to the old place, {old}"] if old.exists() else []


def _again(scene: Scene, ended: Ended) -> list[str]:
    case = Case("", "resume")
    again = scene.run(f"exec python -m tune_main study={HALF} resume=true")
    return again.wrong or differences(scene, case, again)


def _resumed_from_elsewhere(scene: Scene, ended: Ended) -> list[str]:
    folder = scene.place.home / ".cache"
    folder.mkdir(exist_ok=True)
    out = scene.place.cwd / "out"
    again = scene.run(f"exec python -m tune_main study={NEW} out_dir={out} resume=true", cwd=folder)
    made = [file.name for file in folder.glob("*.db")]
    return [*again.wrong, *(f"another database: {file}" for file in made)]
