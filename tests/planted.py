"""A study whose trials are made up, as tune_main.py would have written it into MLflow.

Its options, search space and configurations are the real ones of experiment=smoke; how its trials
went is planted, among it what must not be selected.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from disinhib.tuning import manifest as origins, mlflow_store, options
from disinhib.tuning.event_log import ASKED, COMPLETE, ENDED, EPOCH, FAILED, PRUNED, Event

BEGAN = 1_700_000_000.0  # s since 1970
EPOCHS = 2
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
    uri: str
    folder: Path
    study: str
    run_id: str  # the study's
    seeds: list[int]  # of its trials


def write(folder: Path, study: str = "planted", trials=TRIALS) -> Store:
    """A store in `folder` with a study of that name."""
    asked = options.compose(
        ["experiment=smoke", f"study={study}", f"out_dir={folder}", f"trials={len(trials)}"]
    )
    origin = origins.begin(asked)
    uri = mlflow_store.absolute(None, folder)
    experiment = mlflow_store.open_store(uri, "disinhib", folder / "mlflow-artifacts")
    files = origins.files(origin)
    own = {"config.yaml": yaml.safe_dump(dict(asked.options)), **files}
    tracker = mlflow_store.Tracker(
        experiment, study, study, origins.tags(asked, origin), own, files
    )
    tracker.load()
    seeds = []
    ids = itertools.count(1)
    for number, trial in enumerate(trials):
        overrides: dict[str, Any] = dict(WAY[trial.rule])
        if trial.rate is not None:
            overrides["optimizer.learning_rate"] = trial.rate
        config = options.configure(asked, number, overrides)
        seeds += config["seeds"]
        told = [(ASKED, 0, {"config": config})]
        for epoch, score in enumerate(trial.scores, start=1):
            metrics = {"valid_accuracy": score, "valid_loss": 1 - score / 100}
            if trial.test_accuracy is not None:
                metrics["test_accuracy"] = trial.test_accuracy
            body = {"score": score, "metrics": metrics, "place": {"device": "cpu", "host": "h"}}
            told.append((EPOCH, epoch, body))
        if trial.state is not None:
            end = {"state": trial.state, "epochs": len(trial.scores), "reason": trial.reason}
            told.append((ENDED, 0, end))
        tracker.deliver([
            Event(next(ids), BEGAN + 10 * number + second, number, kind, epoch, body)
            for second, (kind, epoch, body) in enumerate(told)
        ])  # fmt: skip
    tracker.close({}, True)
    assert tracker.study_run is not None
    return Store(uri, folder, study, tracker.study_run, seeds)
