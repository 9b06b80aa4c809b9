"""How hard each rule is to tune: how many of its configurations come close to its best, and what it
costs to reach a score that every rule has reached.

Only drawn configurations count: the initial points were chosen because they are good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from analysis.report.panels import drawing
from analysis.report.panels.drawing import Captioned, PanelFigures
from analysis.report.panels.plot_data import PlotData, Row, trials_of
from analysis.report.panels.search import Budget, budgets
from analysis.runs import SEARCHED
from disinhib.metrics import Criterion
from disinhib.tuning.event_log import COMPLETE, FAILED
from disinhib.tuning.space_tree import RULE

CLOSE = {"%": (1.0, "a point"), "degrees": (1.0, "a degree")}  # by the score's unit
CLOSE_SHARE = 0.05  # of the best score, of any other unit


class Hardness(NamedTuple):
    """Of a rule. NaN: there is no such number."""

    rule: str
    parameters: int  # searched
    tried: int  # drawn configurations
    close: int  # of these, as good as the rule's best complete trial, or nearly
    trials: float  # whose best is expected to reach the target
    epochs: float  # of these trials, over all their seeds
    seconds: float  # of training, of these trials


def close_to(best: float, metric: Criterion) -> tuple[float, str]:
    """By how much a score may be worse than `best` to be close to it, and that in words."""
    return CLOSE.get(metric.unit, (CLOSE_SHARE * abs(best), f"{100 * CLOSE_SHARE:g} %"))


def target(data: PlotData) -> float:
    """The score that every rule with a complete, drawn trial has reached with these: the lowest of
    their best ones. NaN if there is none."""
    best = [max(own) for rows in trials_of(_drawn(data)).values() if (own := _complete(rows))]
    return data.metric.sign * min(best) if best else math.nan


def hardness(data: PlotData) -> list[Hardness]:
    """One for each rule with a complete trial. A pruned trial counts with the score at which it was
    stopped, a failed one is not close."""
    aim = data.metric.sign * target(data)
    drawn = _drawn(data)
    costs, tried = {budget.rule: budget for budget in budgets(drawn)}, trials_of(drawn)
    rows = []
    for rule, trials in trials_of(data).items():
        if not (complete := _complete(trials)):
            continue
        distance, _ = close_to(max(complete), data.metric)
        merits = [row["merit"] for row in tried.get(rule, ()) if row["state"] != FAILED]
        close = sum(merit >= max(complete) - distance for merit in merits)
        budget = costs.get(rule, Budget(rule, [], [], math.nan, math.nan))  # none has a score
        needed = _trials_to(budget, aim, data.metric.sign)
        searched = {name for row in trials for name in row if _searched(row, name)}
        rows.append(
            Hardness(
                rule,
                len(searched - {SEARCHED + RULE}),
                len(tried.get(rule, ())),
                close,
                needed,
                needed * budget.epochs,
                needed * budget.seconds,
            )
        )
    return rows


def _drawn(data: PlotData) -> PlotData:
    """Without the initial points. (Earlier versions recorded of the published defaults alone that
    they are.)"""
    rows = data.trials
    if rows.empty:
        return data
    return data._replace(trials=rows[rows["drawn"] & ~rows["run_id"].isin([*data.defaults])])


def _complete(rows: Sequence[Row]) -> list[float]:
    return [row["merit"] for row in rows if row["state"] == COMPLETE]


def _searched(row: Mapping[str, object], name: str) -> bool:
    return name.startswith(SEARCHED) and isinstance(row[name], str)


def _trials_to(budget: Budget, aim: float, sign: int) -> float:
    """The number of trials whose best is expected to have this merit; between two whole numbers it
    rises in a straight line."""
    merits = [sign * score for score in budget.expected]
    reached = [k for k, merit in enumerate(merits) if merit >= aim]
    if not reached:
        return math.nan
    k = reached[0]
    if k == 0:
        return 1.0
    return k + (aim - merits[k - 1]) / (merits[k] - merits[k - 1])


def hit_rates(tried: int, close: int) -> list[float]:
    """The chance that one of k = 1.. of these configurations, drawn at random, is close."""
    k = np.arange(tried)
    missed = np.maximum(tried - close - k, 0) / (tried - k)
    return (1 - np.cumprod(missed)).tolist()


def draw_hit_rates(data: PlotData) -> PanelFigures:
    figure, palette = go.Figure(), drawing.colours(data)
    rows = [row for row in hardness(data) if row.tried]
    if not rows:
        return PanelFigures([])
    for row in rows:
        rates = hit_rates(row.tried, row.close)
        figure.add_scatter(
            x=[*range(1, row.tried + 1)],
            y=[100 * rate for rate in rates],
            mode="lines" if row.tried > 1 else "markers",
            line={"color": palette[row.rule]},
            name=f"{row.rule} ({row.close} of {row.tried})",
            hovertemplate="%{x} trials: %{y:.0f} %",
        )
    drawing.numbered(drawing.styled(figure, 380), "number k of trials of the rule")
    figure.update_yaxes(title_text="chance that one of k is close to the best (%)", range=[0, 104])
    figure.update_layout(showlegend=True)
    return PanelFigures([Captioned("", figure)], note(data))


def note(data: PlotData) -> str:
    """What is counted, and how far it can be trusted."""
    _, words = close_to(1.0, data.metric)
    sentences = [
        f"Close is within {words} of the score of the rule's best complete trial. A pruned trial"
        " counts with the score at which it was stopped, a failed one is not close. Initial"
        " points (the published defaults, those of points=FILE) and points added by hand are left"
        " out, as they are not drawn."
    ]
    if data.adaptive is not None:
        sentences.append(
            f"The sampler, {data.adaptive}, learns from the scores and draws where they were good:"
            " so these numbers tell how the search went. How hard a rule itself is, searcher=qmc or"
            " random measures."
        )
    return " ".join(sentences)
