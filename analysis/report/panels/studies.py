"""A rule's trials as a study of Optuna, for the figures that Optuna draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from analysis.report.panels.plot_data import Material, Row, Setting, grouped, settings, trials_of
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


def studies(material: Material) -> dict[str, optuna.Study]:
    """A study in memory for each rule; a trial's number in all of them is in its user_attrs."""
    maximize = material.mode == "max"
    direction = StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE
    searched = settings(material)
    made = {}
    for rule, rows in trials_of(material).items():
        its = grouped(searched[rule], lambda setting: setting.trial["trial"])
        trials = [optuna_trial(row, its.get(row["trial"], ())) for row in rows]
        made[rule] = study_of(rule, direction, trials)
    return made


def study_of(name: str, direction: StudyDirection, trials: Iterable[FrozenTrial]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, direction=direction)
    study.add_trials(trials)
    return study


def optuna_trial(row: Row, searched: Sequence[Setting]) -> FrozenTrial:
    """Of a row of runs.trials."""
    return create_trial(
        state=STATES[row["state"]],
        value=row["score"] if row["state"] == COMPLETE else None,
        params={setting.name: setting.about["value"] for setting in searched},
        distributions={setting.name: distribution(setting.about) for setting in searched},
        intermediate_values=dict(enumerate(row["scores"], start=1)),
        user_attrs={"trial": row["trial"]},
    )


def distribution(described: Mapping[str, Any]) -> BaseDistribution:
    """The inverse of spaces.described."""
    if described["kind"] == "categorical":
        return CategoricalDistribution(described["choices"])
    kind = IntDistribution if described["kind"] == "int" else FloatDistribution
    return kind(described["low"], described["high"], log=described["log"], step=described["step"])


def complete_trials(study: optuna.Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
