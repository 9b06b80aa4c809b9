"""What an exported study has beside its log: trained networks, and for readers its tables and its
report, from MLflow."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis import runs, store as stores
from analysis.store import Store, StudyRun
from disinhib.tuning import archive, mlflow_settings
from disinhib.tuning.event_log import EpochDone
from disinhib.tuning.inventory import Entry
from disinhib.tuning.mlflow_store import MODEL, SEED

ONLY_THERE = ["run_id", "of_run"]  # columns that mean nothing in another store


@mlflow_settings.requests()
def files(
    studies: Sequence[Entry], uri: str, models: bool
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(checkpoints and models of `studies`, a search and its retrainings; tables and report), by
    their names in an archive. Raises Refused if MLflow lacks something of the search."""
    store = stores.connect(uri)
    study = stores.of_id(store, studies[0].manifest.id)
    runs.refuse_missing(store, study)
    runs.refuse_missing_seeds(store, study)
    trained: dict[str, bytes] = {}
    if models:
        for entry in studies:
            trained |= archive.checkpoints(entry) | _models(store, study, entry)
    tables = {"runs.csv": runs.trials(store, study).rows}
    tables["retrained.csv"] = runs.retrained(store, study).rows
    tables["curves.csv"] = curves(studies)
    shown = {
        name: table.drop(columns=ONLY_THERE, errors="ignore").to_csv(index=False).encode()
        for name, table in tables.items()
        if len(table)
    }
    with stores.refusing(f"study {study.name}: cannot read its report"):
        report = archive.REPORT.rstrip("/")
        attached = stores.names(store, study.run, report)
        return trained, shown | {
            name: stores.content(store, study.run.info.run_id, name) for name in attached
        }


def _models(store: Store, study: StudyRun, entry: Entry) -> dict[str, bytes]:
    """The models of the retrained seeds of `entry` that MLflow has."""
    found = {}
    with stores.refusing(f"study {entry.name}: cannot read its models (or models=false)"):
        for run in stores.retrained(store, study):
            tags = run.data.tags
            if tags["study_id"] == entry.manifest.id and MODEL in stores.names(store, run):
                name = archive.model(entry, int(tags["trial"]), int(tags[SEED]))
                found[name] = stores.content(store, run.info.run_id, MODEL)
    return found


def curves(studies: Sequence[Entry]) -> pd.DataFrame:
    """Every metric of every epoch and seed, from the logs: columns study, trial, seed, epoch,
    metric, value. The seed of a value that all seeds share is "all"."""
    rows = []
    for entry in studies:
        for _, _, event in entry.events:
            if isinstance(event, EpochDone):
                seeds = entry.records[event.trial].config["seeds"]
                for metric, values in event.metrics.items():
                    shared = len(values) < len(seeds)  # one value for all seeds
                    of_seeds = zip(["all"] if shared else seeds, values, strict=True)
                    head = entry.name, event.trial
                    rows += [(*head, seed, event.epoch, metric, value) for seed, value in of_seeds]
    return pd.DataFrame(rows, columns=["study", "trial", "seed", "epoch", "metric", "value"])
