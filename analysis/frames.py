"""A study as pandas frames, for a notebook or a script: `analysis.study("NAME")`."""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import runs, store as stores
from analysis.runs import SEARCHED, Table
from analysis.store import Store, StudyRun
from disinhib.tuning import mlflow_settings
from disinhib.tuning.mlflow_store import MODEL

if TYPE_CHECKING:
    from disinhib.export import Network
    from disinhib.network import Parameters


@dataclass(frozen=True, eq=False)
class Study:
    """A study in MLflow. Each frame is read once, when it is first asked for; of a study that runs,
    ask for the study again. Runs that a frame leaves out are named in a warning."""

    store: Store
    run: StudyRun

    def __repr__(self) -> str:
        return stores.said(self.store, self.run)

    @property
    def metric(self) -> str:
        """What the study was tuned by: the `score` of its trials."""
        return self.run.options["metric"]

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The trials, by number, with the columns of `runs.trials`; searched values are numbers,
        flags and names (there, MLflow's texts)."""
        with mlflow_settings.requests():
            rows = _told(self.run, runs.trials(self.store, self.run))
        return _typed(rows, self.run)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Every metric of every trial and retrained seed, by epoch: `runs.all_curves`."""
        with mlflow_settings.requests():
            return runs.all_curves(self.store, self.run)

    @cached_property
    def best(self) -> pd.DataFrame:
        """The best complete trial of each rule and repeat, by `selection.HOW`: rows of
        `trials`, by rule.

        Raises Refused if a trial's run is missing, or if the study's metric is none of validation
        data.
        """
        from analysis import selection  # with jax

        with mlflow_settings.requests():
            runs.refuse_missing(self.store, self.run)
        stores.load_plugins(self.run.provenance)
        metric = selection.metric_of(self.run)
        chosen = selection.select(self.trials, [selection.TRAINER], 1, metric)
        numbers = [choice.row["trial"] for choice in chosen]
        return self.trials.set_index("trial", drop=False).loc[numbers].reset_index(drop=True)

    @cached_property
    def retrained(self) -> pd.DataFrame:
        """The retrained seeds, with the columns of `runs.retrained`: among them every metric after
        the last epoch. Raises Refused if a seed's run is missing."""
        with mlflow_settings.requests():
            runs.refuse_missing_seeds(self.store, self.run)
            return _told(self.run, runs.retrained(self.store, self.run))

    def load(self, run_id: str) -> tuple[Network, Parameters]:
        """The network and the parameters of a retrained seed, by the id of its run. Raises Refused
        if the run has no model."""
        from disinhib import export

        stores.load_plugins(self.run.provenance)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / MODEL
            problem = f"run {run_id}: cannot read its {MODEL}, which retrained seeds have"
            with mlflow_settings.requests(), stores.refusing(problem):
                file.write_bytes(stores.content(self.store, run_id, MODEL))
            return export.load(file)


@mlflow_settings.requests()
def study(name: str | None, tracking_uri: str | None) -> Study:
    store = stores.connect(stores.address(tracking_uri))
    return Study(store, stores.find_study(store, name))


def _told(study: StudyRun, table: Table) -> pd.DataFrame:
    for reason in table.dropped:
        warnings.warn(f"study {study.name}: left out: {reason}", stacklevel=4)
    return table.rows


def _typed(rows: pd.DataFrame, study: StudyRun) -> pd.DataFrame:
    """`rows` with the searched values instead of their texts, where a trial has them."""
    if study.space is None:
        return rows
    found = [runs.parameters_of(study.space, row) for row in rows.to_dict("records")]
    columns = {
        SEARCHED + name: [its[name]["value"] if name in its else math.nan for its in found]
        for name in study.space["parameters"]
        if SEARCHED + name in rows
    }
    return rows.assign(**columns)
