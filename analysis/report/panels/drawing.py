"""What figures share: colours, looks, axes, and names and numbers in words."""

from __future__ import annotations

import html as markup
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from analysis.report.panels.plot_data import Material, Row, records
from disinhib import rules

SCORES = {
    "valid_accuracy": "validation accuracy (%)",
    "valid_loss": "validation loss (dimensionless)",
}
# Of Okabe and Ito's palette, which colour-blind readers can tell apart: a rule has one colour.
COLOURS = {name: rules.colour(name) for name in rules.COMPETITORS}
MORE_COLOURS = ("#E69F00", "#56B4E9")  # for other rules
LIGHT, GREY, INK = "#E6E9ED", "#7F7F7F", "#1C1E21"


class Drawn(NamedTuple):
    """What a function of PANELS gives."""

    figures: Sequence[tuple[str, go.Figure]]  # with captions
    note: str = ""
    width: int = 0


def colours(material: Material) -> dict[str, str]:
    tried = {row["rule"] for row in records(material.trials) + records(material.retrained)}
    others = sorted(tried - {*COLOURS})
    return COLOURS | {rule: MORE_COLOURS[i % len(MORE_COLOURS)] for i, rule in enumerate(others)}


def styled(figure: go.Figure, height: int) -> go.Figure:
    """In the looks of the report: as wide as the page, its legend below."""
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


def numbered(figure: go.Figure, title: str, last: int) -> go.Figure:
    """With a horizontal axis of whole numbers up to `last`."""
    dtick = 1 if last <= 12 else None
    return figure.update_xaxes(title_text=title, rangemode="tozero", dtick=dtick)


def dashed(figure: go.Figure, *places: float, **cell: Any) -> None:
    """Draws vertical lines; `cell` is the row and column of a subplot."""
    for place in places:
        figure.add_vline(place, line={"dash": "dash", "color": GREY, "width": 1}, **cell)


def lined(figure: go.Figure, title: str, names: Sequence[str]) -> go.Figure:
    """With a vertical axis that has a line for each name."""
    places = list(range(len(names)))
    shown = [-0.5, len(names) - 0.5]
    return figure.update_yaxes(title_text=title, tickvals=places, ticktext=names, range=shown)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def wrapped(text: str, width: int) -> str:
    """Lines of plotly's own markup, in which the text stands as it is; brackets are not broken."""
    whole = re.sub(r"\(.*?\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
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


def told(value: Any) -> str:
    """A reason or flag in a hover text: none is None, or NaN in a column of others."""
    return markup.escape(value) if isinstance(value, str) else ""
