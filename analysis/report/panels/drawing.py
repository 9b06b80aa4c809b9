"""Shared by all figures: colours, style, axes, and how names and numbers are written."""

from __future__ import annotations

import html as markup
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from analysis.report.panels.plot_data import PlotData, Row, records
from disinhib import rules
from disinhib.metrics import Criterion

# For other rules; of the palettes of Okabe and Ito and of Tol, as those of our rules, which
# colour-blind readers can tell apart.
MORE_COLOURS = ("#332288", "#BBBBBB")
LIGHT, PALE, GREY, INK = "#E6E9ED", "#C3C9D0", "#7F7F7F", "#1C1E21"
SMALL = 270  # pixels: height of a small multiple


class Captioned(NamedTuple):
    caption: str  # may be empty
    figure: go.Figure
    heading: str = ""  # of this and the following figures, if it is another than of those before


class PanelFigures(NamedTuple):
    """The figures of a panel, before they are part of a page."""

    figures: Sequence[Captioned]
    note: str = ""
    width: int = 0  # pixels that each needs at least: a narrower screen scrolls
    beside: int = 1  # how many stand side by side on a wide screen; on a narrow one, fewer


def colours(data: PlotData) -> dict[str, str]:
    """By rule."""
    own = {name: rules.colour(name) for name in rules.COMPETITORS}
    there = {row["rule"] for row in records(data.trials) + records(data.retrained)}
    others = sorted(there - {*own})
    return own | {rule: MORE_COLOURS[i % len(MORE_COLOURS)] for i, rule in enumerate(others)}


def axis_title(metric: Criterion) -> str:
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


def small(figure: go.Figure) -> go.Figure:
    """As one of several with the same axes."""
    return styled(figure, SMALL).update_layout(margin_t=24)


def beside(rules: int) -> int:
    """How many of the small multiples of so many rules stand side by side."""
    return max(1, min(rules, 3))


def numbered(figure: go.Figure, title: str) -> go.Figure:
    """With a horizontal axis from 0; a mark at each whole number if they are few."""
    traces: Any = figure.data
    last = max(x for trace in traces for x in trace.x if x is not None)
    dtick = 1 if last <= 12 and float(last).is_integer() else None
    return figure.update_xaxes(title_text=title, range=[0, 1.02 * last], dtick=dtick)


def limits(values: Iterable[float], kind: str = "linear") -> list[float] | None:
    """The ends of an axis of that kind (linear, log) for all these values, as plotly wants them;
    None if there is nothing that it could show."""
    if kind == "log":
        values = [math.log10(value) for value in values if value > 0]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    pad = 0.05 * (max(values) - min(values)) or 1
    return [min(values) - pad, max(values) + pad]


def context(figure: go.Figure, lines: Iterable[tuple[Sequence[float], Sequence[float | None]]],
            shape: str = "linear") -> None:  # fmt: skip
    """Draws the lines (x, y) of other rules, behind those of the figure's own."""
    x, y = [], []
    for of_x, of_y in lines:
        x += [*of_x, None]
        y += [*of_y, None]
    if x:
        line = {"color": PALE, "width": 1, "shape": shape}
        figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels, moved as little as it takes, so that no two are closer than `gap`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []  # of labels that touch: [their centre, how many they are]
    for i in order:
        blocks.append([heights[i], 1])
        while len(blocks) > 1:
            (low, n), (high, m) = blocks[-2:]
            if high - low >= gap * (n + m) / 2:
                break
            blocks[-2:] = [[(low * n + high * m) / (n + m), n + m]]
    moved = [centre + gap * (k - (n - 1) / 2) for centre, n in blocks for k in range(int(n))]
    return [height for _, height in sorted(zip(order, moved, strict=True))]


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
