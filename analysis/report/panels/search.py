"""The course of the search: the best score by the number of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from optuna import visualization

from analysis.report.panels.drawing import PanelFigures, axis_title, colours, numbered, styled
from analysis.report.panels.plot_data import PlotData, fence, trials_of
from analysis.report.panels.studies import complete_trials, studies
from analysis.stats import expected_maximum
from disinhib.tuning.event_log import COMPLETE, FAILED


class Budget(NamedTuple):
    """The best score of a rule by the number k = 1.. of its trials."""

    rule: str
    expected: list[float]  # the best score of any k of its trials
    best: list[float]  # the best complete one so far; NaN before there is any


def budgets(data: PlotData) -> list[Budget]:
    """One for each rule of which any trial has a score.

    In `expected` a pruned trial has the score at which it was stopped, a failed one the worst of
    its rule.
    """
    budgets = []
    for rule, rows in trials_of(data).items():
        merits = [row["merit"] for row in rows if row["state"] != FAILED]
        if merits:
            merits += [min(merits)] * (len(rows) - len(merits))
            complete = [row["merit"] if row["state"] == COMPLETE else math.nan for row in rows]
            curves = expected_maximum(merits), np.fmax.accumulate(complete)
            # As scores again; 0.0 is added so that none is -0.0.
            budgets.append(Budget(rule, *((data.metric.sign * c + 0.0).tolist() for c in curves)))
    return budgets


def draw_history(data: PlotData) -> PanelFigures:
    complete = {rule: s for rule, s in studies(data).items() if complete_trials(s)}
    if not complete:
        return PanelFigures([])
    drawn: Any = visualization.plot_optimization_history([*complete.values()]).data
    palette, traces = colours(data), []
    # Optuna draws three traces a study: scores, the best so far, and infeasible ones (none here).
    for (rule, study), i in zip(complete.items(), range(0, len(drawn), 3), strict=True):
        (dots, line), colour = drawn[i : i + 2], palette[rule]
        dots.update(
            x=[x + 1 for x in dots.x],
            name=f"{rule}: a complete trial",
            marker={"color": colour, "size": 7},
            customdata=[trial.user_attrs["trial"] for trial in complete_trials(study)],
            hovertemplate="trial %{customdata}: %{y:.4g}",
        )
        line.update(
            x=[x + 1 for x in line.x],
            y=[y if math.isfinite(y) else None for y in line.y],  # before any was complete
            name=f"{rule}: best so far",
            line={"color": colour, "width": 1.5, "shape": "hv"},
        )
        traces += [dots, line]
    figure = styled(go.Figure(traces), 440)
    numbered(figure, "trials of the rule", max(len(study.trials) for study in complete.values()))
    scores = [[trial.value for trial in complete_trials(study)] for study in complete.values()]
    note = "Pruned and failed trials are counted on the horizontal axis, but have no dot."
    return PanelFigures([("", figure)], f"{note} {scored(figure, data, scores)}".strip())


def draw_budget(data: PlotData) -> PanelFigures:
    every_rule = budgets(data)
    if not every_rule:
        return PanelFigures([])
    figure, palette, scores = go.Figure(), colours(data), []
    for rule, expected, best in every_rule:
        k, colour = list(range(1, len(expected) + 1)), palette[rule]
        figure.add_scatter(
            x=k, y=expected, mode="lines", line_color=colour, name=f"{rule}: expected best of k"
        )
        scores.append([*expected, *(score for score in best if not math.isnan(score))])
        if not math.isnan(best[-1]):
            figure.add_scatter(
                x=k,
                y=[None if math.isnan(score) else score for score in best],
                mode="lines",
                line={"color": colour, "dash": "dot", "shape": "hv"},
                name=f"{rule}: best of the first k",
            )
    styled(figure, 460)
    numbered(figure, "number k of trials of the rule", max(len(b.expected) for b in every_rule))
    note = (
        "The expected best is the mean over all sets of k trials of the rule (unbiased); a pruned"
        " trial counts with the score at which it was stopped, a failed one with the worst score of"
        " its rule. It assumes independent trials, which does not hold if the searcher learns from"
        " them. The best of the first k counts complete trials only."
    )
    return PanelFigures([("", figure)], f"{note} {scored(figure, data, scores)}".strip())


def scored(figure: go.Figure, data: PlotData, groups: Sequence[Sequence[float]]) -> str:
    """Scales the vertical axis to the scores, a group for each rule; returns a note if some lie
    outside."""
    figure.update_yaxes(title_text=axis_title(data.metric))
    sign = data.metric.sign
    merits = [[sign * score for score in group] for group in groups]
    # The lowest of the rules' fences: every rule is in sight, however much worse than the others.
    edge = min(map(fence, merits))
    if edge == min(map(min, merits)):
        return ""
    edge = sign * edge
    low, high = sorted((edge, sign * max(map(max, merits))))
    pad = 0.06 * (high - low) or 1
    figure.update_yaxes(range=[low - pad, high + pad])
    return f"Scores worse than {edge:.4g} lie outside the figure; zoom out to see them."
