"""From studies to numbers: selection, retraining, report, replay, figures. Reads MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.frames import Study


def study(name: str | None = None, tracking_uri: str | None = None) -> Study:
    """A study as pandas frames, by its name or its run's id; by default the newest.

        study = analysis.study("rules-digits")
        study.trials, study.curves, study.best, study.retrained

    The store is found as by the commands: `tracking_uri`, else $MLFLOW_TRACKING_URI, else
    `out/mlflow.db`. Raises Refused, in one line, if there is no such study or store.
    """
    # Here, as MLflow takes seconds to import, and most modules of the package have their own use.
    from analysis import frames

    return frames.study(name, tracking_uri)
