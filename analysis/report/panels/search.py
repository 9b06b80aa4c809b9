"""The course of the search: the best score by the number of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from analysis.report.panels.drawing import PanelFigures, axis_title, colours, numbered, styled
from analysis.report.panels.plot_data import PlotData, Row, fence, trials_of
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
    figure, palette, scores = go.Figure(), colours(data), []
    for rule, _, best in budgets(data):
        rows = enumerate(trials_of(data)[rule], start=1)
        complete = {k: row for k, row in rows if row["state"] == COMPLETE}
        if complete:
            scores.append([row["score"] for row in complete.values()])
            figure.add_scatter(
                x=[*complete],
                y=scores[-1],
                mode="markers",
                marker={"color": palette[rule], "size": 7},
                name=f"{rule}: a complete trial",
                customdata=[row["trial"] for row in complete.values()],
                hovertemplate="trial %{customdata}: %{y:.4g}",
            )
            line = {"color": palette[rule], "width": 1.5, "shape": "hv"}
            _add_line(figure, best, f"{rule}: best so far", line)
    note = "Pruned and failed trials are counted on the horizontal axis, but have no dot."
    return _scored(figure, "trials of the rule", data, scores, note)


def draw_budget(data: PlotData) -> PanelFigures:
    figure, palette, scores = go.Figure(), colours(data), []
    for rule, expected, best in budgets(data):
        line = {"color": palette[rule]}
        _add_line(figure, expected, f"{rule}: expected best of k", line)
        scores.append([*expected, *(score for score in best if not math.isnan(score))])
        if not math.isnan(best[-1]):
            line |= {"dash": "dot", "shape": "hv"}
            _add_line(figure, best, f"{rule}: best of the first k", line)
    note = (
        "The expected best is the mean over all sets of k trials of the rule (unbiased); a pruned"
        " trial counts with the score at which it was stopped, a failed one with the worst score of"
        " its rule. It assumes independent trials, which does not hold if the searcher learns from"
        " them. The best of the first k counts complete trials only."
    )
    return _scored(figure, "number k of trials of the rule", data, scores, note)


def _add_line(figure: go.Figure, scores: Sequence[float], name: str, line: Row) -> None:
    """From the first trial on, with a gap at NaN."""
    y = [None if math.isnan(score) else score for score in scores]
    figure.add_scatter(x=list(range(1, len(y) + 1)), y=y, mode="lines", line=line, name=name)


def _scored(
    figure: go.Figure, title: str, data: PlotData, scores: Sequence[Sequence[float]], note: str
) -> PanelFigures:
    """With a vertical axis scaled to the scores, a list for each rule; the note says if some lie
    outside."""
    if not scores:
        return PanelFigures([])
    numbered(styled(figure, 460), title).update_yaxes(title_text=axis_title(data.metric))
    sign = data.metric.sign
    merits = [[sign * score for score in of_rule] for of_rule in scores]
    # The lowest of the rules' fences: every rule is in sight, however much worse than the others.
    edge = min(map(fence, merits))
    if edge > min(map(min, merits)):
        low, high = sorted((sign * edge, sign * max(map(max, merits))))
        pad = 0.06 * (high - low) or 1
        figure.update_yaxes(range=[low - pad, high + pad])
        note += (
            f" Scores worse than {sign * edge:.4g} lie outside the figure; zoom out to see them."
        )
    return PanelFigures([("", figure)], note)
