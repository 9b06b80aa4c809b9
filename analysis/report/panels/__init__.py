"""The figures of a study's report: `panels` has those that have something to show, `html` makes one
a piece of a page.

What Optuna draws well (`optuna.visualization`) is only dressed here; the rest is drawn with plotly.
In a room, the numbers come before the drawing. Each imports only from those above it:

- `material`: what figures are drawn from, and what several of them compute
- `studies`: a rule's trials as a study of Optuna
- `drawing`: colours, looks, axes, names and numbers in words
- `search`: history, budget
- `importances`: importances
- `parameters`: parallel, slices, failures
- `retraining`: learning, ode
"""

from __future__ import annotations

import html as markup
from collections.abc import Callable
from typing import NamedTuple

import plotly.graph_objects as go

from analysis.report.panels.drawing import Drawn
from analysis.report.panels.importances import draw_importances
from analysis.report.panels.parameters import draw_failures, draw_parallel, draw_slices
from analysis.report.panels.plot_data import Material
from analysis.report.panels.retraining import draw_learning, draw_ode
from analysis.report.panels.search import draw_budget, draw_history

CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


class Drawing(NamedTuple):
    id: str  # of its element in the page
    caption: str  # may be empty
    figure: go.Figure
    width: int  # pixels that it needs at least: a narrower screen scrolls


class Panel(NamedTuple):
    id: str
    title: str
    sentence: str  # what it shows, to a reader who knows nothing
    figures: list[Drawing]
    note: str  # may be empty


PANELS: tuple[tuple[str, str, str, Callable[[Material], Drawn]], ...] = (
    (
        "learning",
        "Learning curves",
        "Each thin line is one retrained network (a selected configuration with one seed), epoch by"
        " epoch: first the share of images it does not train on that it tells rightly (higher is"
        " better), then its loss on those that it trains on, which for the dis-inhibitory rules is"
        " that of the closed loop, with the target fed back (lower is better).",
        draw_learning,
    ),
    (
        "history",
        "History of the search",
        "Each dot is a trial (one configuration, trained for its whole budget), from left to right"
        " as they were tried; the line is the best score of its rule so far: if it has been flat"
        " for long, the search had stopped finding better ones.",
        draw_history,
    ),
    (
        "budget",
        "Best score against budget",
        "How good the best of k trials is: to be expected from any k of a rule's trials (solid),"
        " and as the study found it in its first k (dotted); compare rules at the same k.",
        draw_budget,
    ),
    (
        "importances",
        "Which parameters matter",
        "How much of the difference between a rule's complete trials each parameter explains by"
        " itself (fANOVA): the longer its bar, the more the score depends on it.",
        draw_importances,
    ),
    (
        "parallel",
        "All parameters at once",
        "Each line is a complete trial: it starts on the left at its score and passes every"
        " parameter's axis at the value it had (an axis spans the values tried, None: the trial had"
        " no such parameter); the stronger the line, the better its score.",
        draw_parallel,
    ),
    (
        "slices",
        "Score against each parameter",
        "Each mark is a trial, at its value of one parameter (dimensionless, but for times tau in"
        " seconds) and at its score; between the dashed lines lies what was searched, and if the"
        " best trial (star) is near one of them, a wider range might hold a better one.",
        draw_slices,
    ),
    (
        "failures",
        "Where trials failed",
        "Crosses are trials that failed, circles all others, for each parameter at their place in"
        " its range: crosses that crowd on one side say which values break training.",
        draw_failures,
    ),
    (
        "ode",
        "Do the dynamics reach the equilibrium?",
        "For each retrained network, how far its dynamics, integrated in time, end from the"
        " equilibrium that training computed (the gap: smaller is better), and how fast a small"
        " disturbance of that equilibrium grows (right of the dashed line it is unstable); a gap"
        " above 0.001 or an unstable equilibrium flags a seed.",
        draw_ode,
    ),
)


def panels(material: Material) -> list[Panel]:
    """Those that have something to show."""
    made = []
    for name, title, sentence, draw in PANELS:
        drawn = draw(material)
        figures = [
            Drawing(f"{name}-{number}", caption, figure, drawn.width)
            for number, (caption, figure) in enumerate(drawn.figures, start=1)
        ]
        if figures:
            made.append(Panel(name, title, sentence, figures, drawn.note))
    return made


def html(drawing: Drawing) -> str:
    """A figure element, without plotly.js, which the page has once."""
    chart = drawing.figure.to_html(
        config=CONFIG,
        full_html=False,
        include_plotlyjs=False,
        div_id=drawing.id,
        default_width="100%",
    )
    caption = f"<figcaption>{markup.escape(drawing.caption)}</figcaption>" * bool(drawing.caption)
    return (
        f'<figure class="plot">{caption}<div class="scroll">'
        f'<div style="min-width: {drawing.width}px">{chart}</div></div></figure>'
    )
