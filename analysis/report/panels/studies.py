"""The trials of a rule as an Optuna study, for the figures that Optuna draws."""

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

from analysis.report.panels.plot_data import PlotData, Row, Setting, grouped, settings, trials_of
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


def studies(data: PlotData) -> dict[str, optuna.Study]:
    """A study in memory for each rule. Optuna numbers its trials anew; the user attribute `trial`
    is the number in the study."""
    direction = StudyDirection.MAXIMIZE if data.metric.sign > 0 else StudyDirection.MINIMIZE
    by_rule = settings(data)
    studies = {}
    for rule, rows in trials_of(data).items():
        by_trial = grouped(by_rule[rule], lambda setting: setting.trial["trial"])
        trials = [optuna_trial(row, by_trial.get(row["trial"], ())) for row in rows]
        studies[rule] = study_of(rule, direction, trials)
    return studies


def study_of(name: str, direction: StudyDirection, trials: Iterable[FrozenTrial]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, direction=direction)
    study.add_trials(trials)
    return study


def optuna_trial(row: Row, searched: Sequence[Setting]) -> FrozenTrial:
    """A row of runs.trials with its settings."""
    return create_trial(
        state=STATES[row["state"]],
        value=row["score"] if row["state"] == COMPLETE else None,
        params={setting.name: setting.parameter["value"] for setting in searched},
        distributions={setting.name: distribution(setting.parameter) for setting in searched},
        user_attrs={"trial": row["trial"]},
    )


def distribution(described: Mapping[str, Any]) -> BaseDistribution:
    """The inverse of space_tree.described."""
    if described["kind"] == "categorical":
        return CategoricalDistribution(described["choices"])
    kind = IntDistribution if described["kind"] == "int" else FloatDistribution
    return kind(described["low"], described["high"], log=described["log"], step=described["step"])


def complete_trials(study: optuna.Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
