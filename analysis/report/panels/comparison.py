"""Studies side by side: a figure for each rule, in it a colour for each study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import plotly.graph_objects as go

from analysis.report.panels import drawing
from analysis.report.panels.drawing import Captioned, PanelFigures
from analysis.report.panels.plot_data import PlotData, grouped, records, trials_of
from analysis.report.panels.retraining import learning_curves
from analysis.report.panels.search import budgets
from disinhib.metrics import SELECTION
from disinhib.tuning.event_log import COMPLETE

# Of the palette of Okabe and Ito; here rules have figures of their own, instead of colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
Studies = Mapping[str, PlotData]  # by the name of the study


class Line(NamedTuple):
    caption: str  # of its figure
    study: str
    hover: str  # what it is, before a value of x
    x: Sequence[float]
    y: Sequence[float]


def learning(studies: Studies) -> list[Line]:
    """Validation accuracy of the retrained seeds, by epoch."""
    return [
        Line(
            f"{row['rule']}, {drawing.counted(row['depth'], 'hidden layer')}, {row['dataset']}",
            name,
            f"seed {row['seed']}, epoch",
            curve.epochs,
            curve.values,
        )
        for name, data in studies.items()
        for curve in learning_curves(data, "valid_accuracy")
        if (row := curve.seed.row)
    ]


def best_trials(studies: Studies) -> list[Line]:
    """The score by epoch of each rule's best complete trial; of equals, the first."""
    lines = []
    for name, data in studies.items():
        curves = grouped(records(data.scores), lambda row: row["run_id"])
        for rule, rows in trials_of(data).items():
            if complete := [row for row in rows if row["state"] == COMPLETE]:
                best = max(complete, key=lambda row: row["merit"])
                own = curves[best["run_id"]]  # by epoch
                x, y = [row["epoch"] for row in own], [row["value"] for row in own]
                lines.append(Line(rule, name, f"trial {best['trial']}, epoch", x, y))
    return lines


def best_by_budget(studies: Studies) -> list[Line]:
    """The expected best score of k trials of a rule, by k."""
    return [
        Line(rule, name, "best of", [*range(1, len(expected) + 1)], expected)
        for name, data in studies.items()
        for rule, expected, *_ in budgets(data)
    ]


def draw_learning(studies: Studies) -> PanelFigures:
    axis = drawing.axis_title(SELECTION["valid_accuracy"])
    return _small_multiples(studies, learning(studies), "epoch", axis)


def draw_best_trials(studies: Studies) -> PanelFigures:
    return _small_multiples(studies, best_trials(studies), "epoch", _score(studies))


def draw_best_by_budget(studies: Studies) -> PanelFigures:
    title = "number k of trials of the rule"
    return _small_multiples(studies, best_by_budget(studies), title, _score(studies))


def _score(studies: Studies) -> str:
    """The axis of the score, which all searches share."""
    searched = [data for data in studies.values() if len(data.trials)]
    return drawing.axis_title(searched[0].metric) if searched else ""


def _small_multiples(studies: Studies, lines: Iterable[Line], x: str, y: str) -> PanelFigures:
    colour = dict(zip(studies, cycle(COLOURS)))
    figures = []
    for caption, own in grouped(lines, lambda line: line.caption).items():
        figure, named = go.Figure(), set[str]()
        for line in own:
            figure.add_scatter(
                x=line.x,
                y=line.y,
                mode="lines" if len(line.x) > 1 else "markers",
                line={"color": colour[line.study], "width": 1.5},
                name=drawing.wrapped(line.study, 38),
                legendgroup=line.study,
                showlegend=line.study not in named,
                hovertemplate=f"{line.hover} %{{x}}: %{{y:.4g}}",
            )
            named.add(line.study)
        drawing.numbered(drawing.small(figure), x).update_yaxes(title_text=y)
        figure.update_layout(showlegend=True, height=drawing.SMALL + 24 * len(named))
        figures.append(Captioned(caption, figure))
    note = "Each figure has a vertical axis of its own."
    return PanelFigures(figures, note, beside=drawing.beside(len(figures)))
