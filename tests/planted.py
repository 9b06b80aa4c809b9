"""A study whose trials are made up, as tune_main.py would have written it into MLflow.

Its options, search space and configurations are the real ones of experiment=smoke; how its trials
went is planted, among it what must not be selected.
"""

import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis import configurations, retrain as retraining, selection
from disinhib.tuning import manifest, mlflow_connection, options, retention
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    REPEAT,
    Asked,
    Ended,
    EpochDone,
    Event,
    Logged,
    Objective,
    Point,
    Record,
    TrialConfig,
)
from disinhib.tuning.initial_points import read_points
from disinhib.tuning.manifest import Manifest
from disinhib.tuning.mlflow_store import MlflowStore
from disinhib.tuning.options import Study
from search_spaces import SPACES

BEGAN = 1_700_000_000.0  # s since 1970
EPOCHS = 2
PLACE = {"device": "cpu", "host": "h"}
WAY = {
    "bp": {"model/vf": "non-dale", "trainer": "bp", "optimizer.learning_rate": 0.005},
    "exact-inv": {
        "model/vf": "dale", "trainer": "exact-inv", "optimizer.learning_rate": 0.004,
        "model.vf.g_EI": 1.5, "model.vf.g_IE": 0.8, "model.vf.actI.sharpness": 1.0,
        "model.vf.controller.k_p": 0.2, "model.vf.controller.k_i": 0.4, "trainer.norm_val": 1.0,
        "trainer.average_fb_weights": False, "trainer.strong_fb": True,
    },
}  # fmt: skip
WAY["lin-thresh"] = {
    **WAY["exact-inv"], "trainer": "lin-thresh", "trainer.avg_inh_lambda": 0.5
}  # fmt: skip


class Planted(NamedTuple):
    """How a trial went; `scores` are of validation, by epoch."""

    rule: str
    scores: tuple[float, ...]
    state: str | None = COMPLETE
    reason: str | None = None
    test_accuracy: float | None = None  # as if it had been looked at
    rate: float | None = None  # learning rate, if it is another
    repeat: int | None = None  # of the tuning; None if it is not repeated


TRIALS = (
    Planted("bp", (70.0, 90.0)),
    Planted("exact-inv", (60.0, 85.0)),
    Planted("lin-thresh", (50.0, 80.0)),
    Planted("bp", (70.0, 88.0), test_accuracy=99.0),  # best on test, not on validation
    Planted("exact-inv", (99.0,), PRUNED),  # the best score, but stopped
    Planted("lin-thresh", (), FAILED, "Diverged: kernel_0 has non-finite values"),
    Planted("bp", (75.0, 90.0), rate=0.0099),  # as good as the first, and at the edge
    Planted("exact-inv", (98.0,), None),  # still running
)


class Store(NamedTuple):
    """Where a planted study is."""

    uri: str
    folder: Path
    study: str
    run_id: str  # the study's
    seeds: list[int]  # of its trials


def write(folder: Path, study: str = "planted", trials: Iterable[Planted] = TRIALS) -> Store:
    """A store in `folder` with a study of that name."""
    composed, begun = _smoke()
    begun = replace(begun, id=uuid.uuid4().hex)
    store = mlflow(folder, study, begun, dict(composed.options))
    events, seeds = [], []
    for number, trial in enumerate(trials):
        config, point = _configured(number, trial.rule, trial.rate)
        seeds += config["seeds"]
        tags = {} if trial.repeat is None else {REPEAT: str(trial.repeat)}
        events.append(Asked(number, config, point, tags))
        for epoch, score in enumerate(trial.scores, start=1):
            metrics = {"valid_accuracy": [score], "valid_loss": [1 - score / 100]}
            if trial.test_accuracy is not None:
                metrics["test_accuracy"] = [trial.test_accuracy]
            events.append(EpochDone(number, epoch, score, metrics, PLACE))
        if trial.state is not None:
            events.append(Ended(number, trial.state, len(trial.scores), trial.reason))
    deliver(store, events)
    assert store.study_run is not None
    return Store(store.address, folder, study, store.study_run, seeds)


def retrain(
    written: Store,
    seeds: Iterable[int],
    trained: Callable[[Record], Iterable[Event]],
    name: str = "again",
    select: Iterable[str] = (),
) -> None:
    """A retraining of the selected trials over `seeds` (of each repeat), in the study's store.
    `trained` gives the events of one; `select` are options of the selection."""
    selected = written.folder / f"{name}.yaml"
    where = [f"study={written.study}", f"tracking.uri={written.uri}", f"selected={selected}"]
    assert selection.main([*where, *select]) == 0
    settings = configurations.checked_settings([f"out_dir={written.folder}", f"study={name}"])
    _, study, chosen = configurations.of_selection(selected, settings, {"out_dir", "study"})
    settings["tracking"] = {"uri": written.uri, "experiment": "disinhib"}
    repeats = {one.repeat for one in chosen}
    of_repeats = {one: configurations.fresh_seeds([*seeds], {}, one) for one in repeats}
    job = retraining.job(settings, study, chosen, of_repeats, "python -m analysis.retrain")
    events, records = [], {}
    while asked := [*job.source(records)]:
        for one in asked:
            records[one.trial] = Record(one.config, one.point, tags=one.tags)
            events += [one, *trained(records[one.trial])]
    again = mlflow(written.folder, job.name, job.manifest, settings, job.tags)
    deliver(again, events, BEGAN + 1e6)


# Hydra takes seconds for what all planted studies have in common.


@cache
def _smoke() -> tuple[Study, Manifest]:
    with tempfile.TemporaryDirectory() as folder:
        composed = options.compose(["experiment=smoke", "study=planted", f"out_dir={folder}"])
        return composed, manifest.of_search(composed)


@cache
def _configured(number: int, rule: str, rate: float | None) -> tuple[TrialConfig, Point]:
    """A trial's configuration, and what Optuna would have chosen for it."""
    overrides: dict[str, Any] = dict(WAY[rule])
    if rate is not None:
        overrides["optimizer.learning_rate"] = rate
    (params,) = read_points(yaml.safe_dump([overrides]), SPACES["rules"])
    point = Point(params=params, distributions={}, system_attrs={})
    return options.configure(_smoke()[0], number, overrides), point


def mlflow(
    folder: Path,
    study: str,
    begun: Manifest,
    of_study: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> MlflowStore:
    """What the engine would write the study with."""
    uri = mlflow_connection.address(None, folder)
    experiment = mlflow_connection.open_store(uri, "disinhib", folder / "mlflow-artifacts")
    files = begun.files()
    own = {"config.yaml": yaml.safe_dump(dict(of_study)), **files}
    models = lambda number, seed: retention.model_file(folder, number, seed)
    tags = {**begun.tags("python tune_main.py"), **(tags or {})}
    return MlflowStore(
        experiment, study, begun.id, Objective("valid_accuracy", 1), tags, own, files, models
    )


def deliver(store: MlflowStore, events: Iterable[Event], began: float = BEGAN) -> None:
    """As the outbox does, with a second between two events."""
    store.load({})
    store.deliver([Logged(i, began + i, event) for i, event in enumerate(events, start=1)])
    # The study itself has ended, and left alone what still runs.
    store.close({}, True)
