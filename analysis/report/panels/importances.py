"""Importances of the parameters that all complete trials of a rule have."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna import visualization
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial, create_trial

from analysis.report.panels.drawing import PanelFigures, colours, counted, styled, wrapped_name
from analysis.report.panels.plot_data import PlotData
from analysis.report.panels.studies import complete_trials, studies, study_of

ENOUGH = 4  # complete trials of a rule, for importances
# Of eight parameters, fANOVA put the one that mattered most first in 4 of 10 studies of 10 trials,
# and in 8 of 10 studies of 20 (known functions with noise).
ROUGH = 20


def cannot_rank(trials: list[FrozenTrial]) -> str | None:
    """Why importances cannot be estimated from these complete trials; None if they can."""
    if len(trials) < ENOUGH:
        return f"it has {counted(len(trials), 'complete trial')}, at least {ENOUGH} are needed"
    if len({trial.value for trial in trials}) == 1:
        return "all its complete trials have the same score"
    shared = intersection_search_space(trials)
    varied = [name for name in shared if len({str(t.params[name]) for t in trials}) > 1]
    if len(varied) < 2:
        return f"its complete trials share only {counted(len(varied), 'parameter')} that varied"
    return None


def on_search_scale(study: optuna.Study) -> optuna.Study:
    """The complete trials, with the logarithm of every parameter that was searched on a log scale:
    fANOVA weighs a range evenly, and would see little but its highest decade."""
    trials = []
    for trial in complete_trials(study):
        kinds, values = dict(trial.distributions), dict(trial.params)
        for name, kind in trial.distributions.items():
            if isinstance(kind, FloatDistribution | IntDistribution) and kind.log:
                low, high, values[name] = map(math.log, (kind.low, kind.high, values[name]))
                kinds[name] = FloatDistribution(low, high)
        trials.append(create_trial(value=trial.value, params=values, distributions=kinds))
    return study_of(study.study_name, study.direction, trials)


def draw_importances(data: PlotData) -> PanelFigures:
    figures = []
    notes = [f"With fewer than about {ROUGH} complete trials, this is a rough estimate."]
    for rule, study in studies(data).items():
        trials = complete_trials(study)
        names = [*intersection_search_space(trials)]  # those that every trial has
        reason = cannot_rank(trials)
        if reason is not None:
            notes.append(f"{rule} is left out: {reason}.")
            continue
        figure: Any = visualization.plot_param_importances(
            on_search_scale(study),
            # Optuna's default, PED-ANOVA, compares the best tenth with the rest: of so few, two.
            evaluator=FanovaImportanceEvaluator(seed=0),
        )
        bars = figure.data[0]
        bars.update(y=[wrapped_name(name, 24) for name in bars.y], hovertemplate=None)
        bars.marker.color = colours(data)[rule]
        styled(figure, 100 + 34 * len(names))
        figure.update_yaxes(title_text="parameter")
        figure.update_xaxes(
            title_text="share of variance (dimensionless)",
            range=[0, 1.2 * max(bars.x)],  # room for the numbers
        )
        figures.append((f"{rule}, {counted(len(trials), 'complete trial')}", figure))
        others = sorted({name for trial in trials for name in trial.params} - {*names})
        if others:
            notes.append(f"{rule}: left out because not every trial has it: {', '.join(others)}.")
    return PanelFigures(figures, " ".join(notes))
