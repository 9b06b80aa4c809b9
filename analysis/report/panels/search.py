"""The course of the search: the best score by the number of trials, and by what they cost."""

from __future__ import annotations

import html as markup
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from analysis import selection
from analysis.report.panels.drawing import (
    Captioned,
    PanelFigures,
    apart,
    axis_title,
    beside,
    colours,
    context,
    numbered,
    small,
    styled,
)
from analysis.report.panels.plot_data import PlotData, fence, trials_of
from analysis.stats import expected_maximum
from disinhib.tuning.event_log import COMPLETE, FAILED

HEIGHT, LABEL = 400, 17  # pixels: of a figure of the budget, of a label's line


class Budget(NamedTuple):
    """The best score of a rule by the number k = 1.. of its trials."""

    rule: str
    expected: list[float]  # the best score of any k of its trials
    best: list[float]  # the best complete one so far; NaN before there is any
    epochs: float  # of a trial, the mean; over its seeds
    seconds: float  # of training, of a trial, the mean; NaN if it was not recorded


# What a budget may be counted in: axis, and the cost of a trial of the rule.
COSTS: tuple[tuple[str, Callable[[Budget], float]], ...] = (
    ("number k of trials of the rule", lambda budget: 1),
    ("epochs, over all seeds", lambda budget: budget.epochs),
    ("seconds of training", lambda budget: budget.seconds),
)


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
            expected, best = ((data.metric.sign * c + 0.0).tolist() for c in curves)
            seconds = [row.get("training_seconds", math.nan) for row in rows]
            epochs = selection.spent(rows) / len(rows)
            budgets.append(Budget(rule, expected, best, epochs, float(np.mean(seconds))))
    return budgets


def draw_history(data: PlotData) -> PanelFigures:
    """A figure for each rule, all with the same axes."""
    palette, of_rules, by_rule = colours(data), {}, trials_of(data)
    for budget in budgets(data):
        rows = enumerate(by_rule[budget.rule], start=1)
        if complete := {k: row for k, row in rows if row["state"] == COMPLETE}:
            of_rules[budget.rule] = complete, _gaps(budget.best)
    if not of_rules:
        return PanelFigures([])
    drawn = [row["score"] for complete, _ in of_rules.values() for row in complete.values()]
    limits, note = _limits(data, drawn)
    if none := [rule for rule in by_rule if rule not in of_rules]:
        note += f" Without a complete trial: {', '.join(none)}."
    most = max(len(best) for _, best in of_rules.values())
    figures = []
    for rule, (complete, best) in of_rules.items():
        figure = go.Figure()
        others = [line for other, (_, line) in of_rules.items() if other != rule]
        context(figure, [(range(1, len(line) + 1), line) for line in others], "hv")
        figure.add_scatter(
            x=[*complete],
            y=[row["score"] for row in complete.values()],
            mode="markers",
            marker={"color": palette[rule], "size": 7},
            name="a complete trial",
            customdata=[row["trial"] for row in complete.values()],
            hovertemplate="trial %{customdata}: %{y:.4g}",
        )
        line = {"color": palette[rule], "width": 1.5, "shape": "hv"}
        x = [*range(1, len(best) + 1)]
        figure.add_scatter(x=x, y=best, mode="lines", line=line, name="best so far")
        numbered(small(figure), "trials of the rule").update_xaxes(range=[0, 1.04 * most])
        figure.update_yaxes(title_text=axis_title(data.metric), range=limits)
        figures.append(Captioned(rule, figure.update_layout(showlegend=False)))
    note = f"Pruned and failed trials are counted on the horizontal axis, but have no dot.{note}"
    return PanelFigures(figures, note, beside=beside(len(figures)))


def draw_budget(data: PlotData) -> PanelFigures:
    """A figure for each cost, with all rules, because they are compared; each line has its rule's
    name at its end."""
    every = budgets(data)
    if not every:
        return PanelFigures([])
    limits, outside = _limits(data, [score for budget in every for score in budget.expected])
    figures = [
        Captioned("", _budget(data, every, title, cost, limits))
        for title, cost in COSTS
        if not any(math.isnan(cost(budget)) for budget in every)
    ]
    note = (
        "The mean over all sets of k trials of the rule (unbiased), against k and against what k"
        " trials of the rule cost on average; a pruned trial counts with the score at which it was"
        " stopped, a failed one with the worst score of its rule. It assumes independent trials,"
        f" which does not hold if the searcher learns from them.{outside}"
    )
    width = 290 + 7 * max(len(budget.rule) for budget in every)
    return PanelFigures(figures, note, width=width, beside=beside(len(figures)))


def _budget(
    data: PlotData,
    every: Sequence[Budget],
    title: str,
    cost: Callable[[Budget], float],
    limits: tuple[float, float],
) -> go.Figure:
    figure, palette = go.Figure(), colours(data)
    for budget in every:
        number = len(budget.expected)
        figure.add_scatter(
            x=[k * cost(budget) for k in range(1, number + 1)],
            y=budget.expected,
            mode="lines" if number > 1 else "markers",
            line={"color": palette[budget.rule]},
            name=budget.rule,
            customdata=[*range(1, number + 1)],
            hovertemplate="best of %{customdata} (%{x:.4g}): %{y:.4g}",
        )
    numbered(styled(figure, HEIGHT), title)
    figure.update_yaxes(title_text=axis_title(data.metric), range=limits)
    gap = LABEL * (limits[1] - limits[0]) / (HEIGHT - 110)  # without margins and axis title
    ends = [min(max(budget.expected[-1], limits[0]), limits[1]) for budget in every]
    for budget, height in zip(every, apart(ends, gap), strict=True):
        figure.add_annotation(
            x=len(budget.expected) * cost(budget), y=height, text=markup.escape(budget.rule),
            showarrow=False, xanchor="left", xshift=5, font={"color": palette[budget.rule]},
        )  # fmt: skip
    longest = max(len(budget.rule) for budget in every)
    return figure.update_layout(showlegend=False, margin_r=20 + 7 * longest)


def _gaps(scores: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores]


def _limits(data: PlotData, drawn: Sequence[float]) -> tuple[tuple[float, float], str]:
    """The ends of the vertical axis, the same for all figures of the search, and a sentence, if
    some of the scores that are drawn lie outside."""
    merits = []
    for rows in trials_of(data).values():
        ended = [row for row in rows if row["state"] != FAILED]
        complete = [row["merit"] for row in ended if row["state"] == COMPLETE]
        if ended:
            merits.append(complete or [row["merit"] for row in ended])
    # The lowest of the rules' fences: every rule is in sight, however much worse than the others.
    sign, edge = data.metric.sign, min(map(fence, merits))
    low, high = sorted((sign * edge, sign * max(map(max, merits))))
    pad = 0.06 * (high - low) or 1
    outside = f" Scores worse than {sign * edge:.4g} lie outside the figure; zoom out to see them."
    return (low - pad, high + pad), outside if any(sign * x < edge for x in drawn) else ""
