"""Which parameters the scores of a rule's trials depend on: of all its trials, by the scores at an
epoch that each of them reached, and of its complete trials, by their final scores.

Early stopping ends most trials that have a bad value, so that among the complete ones such a
parameter hardly varies and seems not to matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optuna
import plotly.graph_objects as go
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from plotly.colors import hex_to_rgb

from analysis.report.panels.drawing import (
    Captioned,
    PanelFigures,
    colours,
    counted,
    styled,
    wrapped_name,
)
from analysis.report.panels.plot_data import PlotData, trials_of
from analysis.report.panels.studies import studies, study_of
from disinhib.tuning.event_log import COMPLETE, FAILED
from disinhib.tuning.steering import BY_HAND

ENOUGH = 4  # trials of a rule, for importances
# Of eight parameters, fANOVA put the one that mattered most first in 4 of 10 studies of 10 trials,
# and in 8 of 10 studies of 20 (known functions with noise).
ROUGH = 20
PALE = 0.4  # opacity of the bars of complete trials, beside those of all


class Ranking(NamedTuple):
    """Importances of the parameters that a set of trials share."""

    words: str  # which scores of which trials
    shares: Mapping[str, float]  # of the variance, by parameter
    constant: Mapping[str, Any]  # parameters that have the same value in all trials
    partial: Sequence[str]  # parameters that not every trial has


def early_scores(data: PlotData, rule: str) -> tuple[int, dict[int, float]]:
    """The last epoch that each of the rule's trials reached which has a score, and their scores
    there, by the trials' numbers; (0, {}) if there are none. A trial that a user ended does not
    count: it could have had one epoch, after which scores say little of any trial."""
    rows = [
        row
        for row in trials_of(data).get(rule, ())
        if row["state"] != FAILED and row["reason"] != BY_HAND
    ]
    epoch = min((row["epochs"] for row in rows), default=0)
    there = data.scores[data.scores["epoch"] == epoch]
    by_run = dict(zip(there["run_id"], there["value"], strict=True))
    scores = {row["trial"]: by_run[row["run_id"]] for row in rows if row["run_id"] in by_run}
    return epoch, {number: score for number, score in scores.items() if math.isfinite(score)}


def cannot_rank(trials: Sequence[FrozenTrial]) -> str | None:
    """Why importances cannot be estimated from these scored trials; None if they can."""
    if len(trials) < ENOUGH:
        return f"{counted(len(trials), 'trial')}, at least {ENOUGH} are needed"
    if len({trial.value for trial in trials}) == 1:
        return "all have the same score"
    varied = varying(trials)
    if len(varied) < 2:
        return f"they share only {counted(len(varied), 'parameter')} that varied"
    return None


def varying(trials: Sequence[FrozenTrial]) -> list[str]:
    """The parameters that all trials have, and not all with the same value."""
    shared = intersection_search_space([*trials])
    return [name for name in shared if len({str(trial.params[name]) for trial in trials}) > 1]


def scored(trial: FrozenTrial, score: float) -> FrozenTrial:
    """The trial as a complete one with this score, with the logarithm of every parameter that was
    searched on a log scale: fANOVA weighs a range evenly, and would see little but its highest
    decade."""
    kinds, values = dict(trial.distributions), dict(trial.params)
    for name, kind in trial.distributions.items():
        if isinstance(kind, FloatDistribution | IntDistribution) and kind.log:
            low, high, values[name] = map(math.log, (kind.low, kind.high, values[name]))
            kinds[name] = FloatDistribution(low, high)
    return create_trial(value=score, params=values, distributions=kinds)


def rank(words: str, trials: Sequence[FrozenTrial]) -> Ranking:
    """Of trials that `cannot_rank` has no objection to."""
    varied = varying(trials)
    study = study_of("", StudyDirection.MAXIMIZE, trials)  # a variance has no direction
    # Optuna's default, PED-ANOVA, compares the best tenth with the rest: of so few, two.
    evaluator = FanovaImportanceEvaluator(seed=0)
    shares = evaluator.evaluate(study, params=varied)
    shared = intersection_search_space([*trials])
    constant = {name: trials[0].params[name] for name in shared if name not in varied}
    every = {name for trial in trials for name in trial.params}
    return Ranking(words, shares, constant, sorted(every - {*shared}))


def rankings(data: PlotData, rule: str, study: optuna.Study) -> tuple[list[Ranking], list[str]]:
    """That of all trials of a rule, and that of the complete ones; why one of them is missing."""
    epoch, early = early_scores(data, rule)
    rows = trials_of(data)[rule]
    final = {row["trial"]: row["score"] for row in rows if row["state"] == COMPLETE}
    sets = [(f"final scores of the {counted(len(final), 'complete trial')}", final)]
    if early.keys() != final.keys():  # else nothing was stopped
        which = "all" if len(early) == len(rows) else f"{len(early)} of the"
        words = f"scores after epoch {epoch} of {which} {counted(len(rows), 'trial')}"
        sets.insert(0, (words, early))
    found, why = [], []
    for words, scores in sets:
        trials = [
            scored(trial, scores[number])
            for trial in study.get_trials(deepcopy=False)
            if (number := trial.user_attrs["trial"]) in scores
        ]
        reason = cannot_rank(trials)
        if reason is None:
            found.append(rank(words, trials))
        else:
            why.append(f"{words}: {reason}")
    return found, why


def draw_importances(data: PlotData) -> PanelFigures:
    figures = []
    notes = [
        f"With fewer than about {ROUGH} trials, this is a rough estimate. Where early stopping has"
        " ended the trials with a bad value, only the scores of all trials can show it. Failed"
        " trials have no score, and neither they nor trials that were ended by hand are counted."
    ]
    for rule, study in studies(data).items():
        found, why = rankings(data, rule, study)
        if not found:
            notes.append(f"{rule} is left out: {why[0]}.")
            continue
        notes += [f"{rule}: not drawn are the {reason}." for reason in why]
        figures.append(Captioned(rule, _bars(found, colours(data)[rule])))
        if partial := found[0].partial:
            notes.append(f"{rule}: left out because not every trial has it: {', '.join(partial)}.")
    return PanelFigures(figures, " ".join(notes))


def _bars(rankings: Sequence[Ranking], colour: str) -> go.Figure:
    """A group of bars for each parameter, the one that matters most on top."""
    names = list(dict.fromkeys(name for one in rankings for name in (*one.shares, *one.constant)))
    order = sorted(names, key=lambda name: -rankings[0].shares.get(name, 0.0))
    figure = go.Figure()
    red, green, blue = hex_to_rgb(colour)
    for one, opacity in zip(rankings, (1.0, PALE), strict=False):
        own = [name for name in order if name in one.shares or name in one.constant]
        shares = [one.shares.get(name, 0.0) for name in own]
        figure.add_bar(
            y=[wrapped_name(name, 24) for name in own],
            x=shares,
            orientation="h",
            marker_color=f"rgba({red}, {green}, {blue}, {opacity})",
            name=one.words,
            showlegend=True,
            text=[
                f"all {one.constant[name]}" if name in one.constant else _plain(share)
                for name, share in zip(own, shares, strict=True)
            ],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:.3f}",
        )
    styled(figure, 120 + 24 * len(names) * len(rankings))
    figure.update_layout(bargap=0.3, legend={"traceorder": "normal", "orientation": "v"})
    figure.update_yaxes(title_text="parameter", autorange="reversed")
    widest = max(max(one.shares.values(), default=0.0) for one in rankings)
    return figure.update_xaxes(
        title_text="share of variance (dimensionless)",
        range=[0, 1.25 * widest or 1],  # room for the numbers
    )


def _plain(share: float) -> str:
    return f"{share:.2f}" if share >= 0.01 else "<0.01"
