"""The figures of a report: `panels` draws those that have something to show, `html` turns one into
an element of a page.

Optuna's figures (`optuna.visualization`) are restyled where they are good, the others drawn with
plotly. In each module, the numbers come before the drawing.
"""

from __future__ import annotations

import html as markup
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import plotly.graph_objects as go

from analysis.report.panels.alignment import draw_alignment
from analysis.report.panels.comparison import (
    Studies,
    draw_best_by_budget,
    draw_best_trials,
    draw_learning as draw_learning_of_studies,
)
from analysis.report.panels.drawing import PanelFigures
from analysis.report.panels.hardness import draw_hit_rates
from analysis.report.panels.importances import draw_importances
from analysis.report.panels.parameters import draw_failures, draw_parallel, draw_slices
from analysis.report.panels.plot_data import PlotData
from analysis.report.panels.retraining import draw_learning, draw_ode
from analysis.report.panels.search import draw_budget, draw_history

CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


T = TypeVar("T")
# Id, title, a sentence that explains it to a reader who has not seen such a figure, what draws it.
Kind = tuple[str, str, str, Callable[[T], PanelFigures]]


class Drawing(NamedTuple):
    id: str  # of its element in the page
    caption: str  # may be empty
    figure: go.Figure
    width: int  # pixels that it needs at least: a narrower screen scrolls
    heading: str  # may be empty


class Panel(NamedTuple):
    id: str
    title: str
    sentence: str
    figures: list[Drawing]
    note: str  # may be empty
    beside: int  # how many figures stand side by side, at most


PANELS: tuple[Kind[PlotData], ...] = (
    (
        "learning",
        "Learning curves",
        "Each coloured line is one retrained network (a selected configuration with one seed), each"
        " grey line the mean of another configuration: first the accuracy on images it was not"
        " trained on (higher is better), then the loss on the training images (lower is better),"
        " which the dis-inhibitory rules compute in closed loop, with the target fed back.",
        draw_learning,
    ),
    (
        "history",
        "History of the search",
        "Each dot is a trial (one configuration, trained for its whole budget), in the order in"
        " which they were tried; the line is the best score of the rule so far (grey: of the other"
        " rules): where it is flat, the search found nothing better.",
        draw_history,
    ),
    (
        "budget",
        "Best score against budget",
        "The expected best score of any k trials of a rule, against their number, their epochs and"
        " their seconds of training: compare rules at the same budget, and see whether more trials"
        " would still have paid.",
        draw_budget,
    ),
    (
        "hits",
        "How soon a search comes close to the best",
        "The chance that at least one of k trials of a rule, drawn at random from all of them, is"
        " about as good as its best: the sooner a line rises, the easier the rule is to tune.",
        draw_hit_rates,
    ),
    (
        "alignment",
        "Does the update point where the gradient does?",
        "The angle between a rule's update and the gradient of the loss on a batch of validation"
        " images (0 degrees is the gradient itself; from 90 on a step no longer lowers the loss):"
        " first with the score of every trial of the search, then by layer and epoch for the best"
        " configuration of each rule (mean and range of its seeds), with the ratio of their sizes.",
        draw_alignment,
    ),
    (
        "importances",
        "Which parameters matter",
        "The share of the variance between a rule's scores that each parameter explains by itself"
        " (fANOVA): of all trials, by their score at an epoch that each of them reached, and of the"
        " complete trials, by their final score.",
        draw_importances,
    ),
    (
        "parallel",
        "All parameters at once",
        "Each line is a complete trial: it starts at its score on the left and crosses the axis of"
        " each parameter at the trial's value (an axis spans the values tried; None means that the"
        " trial had no such parameter); the stronger the line, the better the score.",
        draw_parallel,
    ),
    (
        "slices",
        "Score against each parameter",
        "Each mark is a trial, at its value of one parameter (dimensionless, except time constants"
        " tau, in seconds) and its score; dashed lines mark the range that was searched, and if the"
        " best trial (star) lies near one of them, a wider range may hold a better one.",
        draw_slices,
    ),
    (
        "failures",
        "Where trials failed",
        "Crosses are failed trials, circles all others, at their position in the range of each"
        " parameter: crosses that cluster on one side show which values break training.",
        draw_failures,
    ),
    (
        "ode",
        "Do the dynamics reach the equilibrium?",
        "For each retrained network, the distance from the end of its dynamics, integrated in time,"
        " to the equilibrium that training computed (the gap: smaller is better), and the growth"
        " rate of a small disturbance of that equilibrium (above 0 it is unstable);"
        " right of a dashed line, a seed is flagged.",
        draw_ode,
    ),
)


COMPARED: tuple[Kind[Studies], ...] = (
    (
        "learning",
        "Learning curves",
        "Each line is one retrained network (the best configuration of the rule with one seed): its"
        " accuracy on images it was not trained on.",
        draw_learning_of_studies,
    ),
    (
        "best",
        "The best trial of each rule",
        "How its score rose in the search; the trial was chosen because of this score, so a part of"
        " it is luck.",
        draw_best_trials,
    ),
    (
        "budget",
        "Best score against budget",
        "The expected best score of any k trials of a rule: compare studies at the same k, if their"
        " trials have the same number of epochs.",
        draw_best_by_budget,
    ),
)


def panels(data: T, kinds: Sequence[Kind[T]]) -> list[Panel]:
    """Those that have something to show."""
    panels = []
    for name, title, sentence, draw in kinds:
        figures, note, width, beside = draw(data)
        drawings = [
            Drawing(f"{name}-{number}", one.caption, one.figure, width, one.heading)
            for number, one in enumerate(figures, start=1)
        ]
        if drawings:
            panels.append(Panel(name, title, sentence, drawings, note, beside))
    return panels


def html(drawing: Drawing) -> str:
    """A figure element, without plotly.js, which the page has once."""
    chart = drawing.figure.to_html(
        config=CONFIG, full_html=False, include_plotlyjs=False, div_id=drawing.id
    )
    caption = f"<figcaption>{markup.escape(drawing.caption)}</figcaption>" * bool(drawing.caption)
    return (
        f'<figure class="plot">{caption}<div class="scroll">'
        f'<div style="min-width: {drawing.width}px">{chart}</div></div></figure>'
    )
