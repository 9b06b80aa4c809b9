"""Shared by all figures: colours, style, axes, and how names and numbers are written."""

from __future__ import annotations

import html as markup
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from analysis.report.panels.plot_data import PlotData, Row, records
from disinhib import rules
from disinhib.metrics import Metric

# Of Okabe and Ito's palette, as those of the rules, which colour-blind readers can tell apart.
MORE_COLOURS = ("#E69F00", "#56B4E9")  # for other rules
LIGHT, GREY, INK = "#E6E9ED", "#7F7F7F", "#1C1E21"


class PanelFigures(NamedTuple):
    """The figures of a panel, before they are part of a page."""

    figures: Sequence[tuple[str, go.Figure]]  # (caption, figure)
    note: str = ""
    width: int = 0  # pixels that each needs at least


def colours(data: PlotData) -> dict[str, str]:
    """By rule."""
    own = {name: rules.colour(name) for name in rules.COMPETITORS}
    there = {row["rule"] for row in records(data.trials) + records(data.retrained)}
    others = sorted(there - {*own})
    return own | {rule: MORE_COLOURS[i % len(MORE_COLOURS)] for i, rule in enumerate(others)}


def axis_title(metric: Metric) -> str:
    return f"{metric.words} ({metric.unit})"


def styled(figure: go.Figure, height: int) -> go.Figure:
    """In the style of the report: as wide as the page, the legend below."""
    figure.update_layout(
        template="none",
        title=None,
        width=None,
        height=height,
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 20, "r": 20, "t": 36, "b": 20},  # above: the buttons
        dragmode=False,  # a finger on a figure scrolls the page; the buttons still zoom
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    axes: Row = {"automargin": True, "title_standoff": 8, "title_font_size": 12}
    axes |= {"gridcolor": LIGHT, "zeroline": False}
    return figure.update_xaxes(**axes).update_yaxes(**axes, ticklabelstandoff=4)


def numbered(figure: go.Figure, title: str) -> go.Figure:
    """With a horizontal axis of whole numbers."""
    traces: Any = figure.data
    dtick = 1 if max(x for trace in traces for x in trace.x) <= 12 else None
    return figure.update_xaxes(title_text=title, rangemode="tozero", dtick=dtick)


def dashed(figure: go.Figure, *values: float, **cell: Any) -> None:
    """Draws vertical lines; `cell` is the row and column of a subplot."""
    for value in values:
        figure.add_vline(value, line={"dash": "dash", "color": GREY, "width": 1}, **cell)


def lined(figure: go.Figure, title: str, names: Sequence[str]) -> go.Figure:
    """With a vertical axis that has a line for each name."""
    heights, limits = list(range(len(names))), [-0.5, len(names) - 0.5]
    return figure.update_yaxes(title_text=title, tickvals=heights, ticktext=names, range=limits)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def wrapped(text: str, width: int) -> str:
    """In lines, escaped for plotly's markup; no line break falls within brackets."""
    whole = re.sub(r"\(.*?\)", lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    return "<br>".join(map(markup.escape, textwrap.wrap(whole, width)))


def wrapped_name(parameter: str, width: int = 16) -> str:
    """A parameter's name in lines, broken after dots, and after underscores where that is not
    enough."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?", parameter):
        for piece in [part] if len(part) <= width else re.findall(r"[^_]*_|[^_]+", part):
            if lines[-1] and len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += piece
    return "<br>".join(map(markup.escape, lines))


def hover_text(value: Any) -> str:
    """A reason or flag, escaped; empty if there is none (None, or NaN in a column of others)."""
    return markup.escape(value) if isinstance(value, str) else ""
