"""Where updates point: their angle to the gradient, in all trials, and by layer and epoch."""

from __future__ import annotations

import html as markup
import math
import re
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import plotly.graph_objects as go

from analysis import stats
from analysis.report.panels import drawing
from analysis.report.panels.drawing import Captioned, PanelFigures
from analysis.report.panels.plot_data import PlotData, Row, grouped, records, trials_of
from analysis.report.panels.retraining import seeds
from disinhib.metrics import ANGLE, NORM_RATIO
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

MEASURED = {  # metrics: words, axis, its kind
    ANGLE: ("angle by layer", "angle (degrees)", "linear"),
    NORM_RATIO: ("ratio of sizes by layer", "update / gradient", "log"),
}
ALL, OUT = "all", "out"  # all layers together; the last one
# Colours, red, green, blue: of the first layer, and towards the last.
FIRST, LAST = (125, 185, 235), (10, 35, 90)
FEW = 5  # complete trials, below which no correlation is named
LABEL = 13  # pixels: of a label's line


class Layer(NamedTuple):
    """One layer over the epochs: the mean of all seeds, and their range."""

    name: str  # "0", ..., OUT; or ALL
    epochs: tuple[int, ...]
    mean: list[float]
    low: list[float]
    high: list[float]


class Course(NamedTuple):
    """How one metric of a configuration went, in each of its layers."""

    place: tuple[str, ...]  # the data set and depth, as far as they are known
    rule: str
    label: str
    layers: list[Layer]


def courses(data: PlotData, metric: str) -> list[Course]:
    """Of each retrained configuration, over the seeds that have not diverged; of the best trials if
    none was retrained."""
    found = [
        (name, (row["dataset"], drawing.counted(row["depth"], "hidden layer")), row, label)
        for name, label, _, row in seeds(data)
        if row["state"] != FAILED
    ]
    if data.retrained.empty:
        found = [
            (row["run_id"], (), row, f"{row['rule']} (trial {row['trial']})")
            for row in records(data.trials)
        ]
    of_metric = data.curves["metric"].str.startswith(metric)
    by_run = dict(list(data.curves[of_metric].groupby("run_id")))
    found = [one for one in found if one[2]["run_id"] in by_run]
    order = [*trials_of(data)]  # of rules
    every = [
        Course(
            own[0][1], own[0][2]["rule"], own[0][3],
            _layers([by_run[row["run_id"]] for _, _, row, _ in own], metric),
        )
        for own in grouped(found, lambda one: one[0]).values()
    ]  # fmt: skip
    return sorted(every, key=lambda one: order.index(one.rule) if one.rule in order else len(order))


def _layers(runs: Sequence, metric: str) -> list[Layer]:
    """By the curves of each of the runs."""
    layers = []
    names = sorted({*runs[0]["metric"]}, key=_order)
    for name in names:
        of_runs = [run[run["metric"] == name] for run in runs]
        values = [dict(zip(run["epoch"], run["value"], strict=True)) for run in of_runs]
        epochs = tuple(sorted(set(values[0]).intersection(*values)))
        at = [[one[epoch] for one in values] for epoch in epochs]
        layer = name.removeprefix(metric).removeprefix("_") or ALL
        layers.append(Layer(layer, epochs, [*map(mean, at)], [*map(min, at)], [*map(max, at)]))
    return layers


def _order(name: str) -> tuple[int, str]:
    """Layers from the first to the last; then what has no number."""
    last = name.rpartition("_")[2]
    return (int(last), "") if last.isdigit() else (10**9, "a" if last == OUT else "b")


def aligned_trials(data: PlotData) -> dict[str, list[Row]]:
    """The trials of each rule that have a score and an `angle`: the mean of their hidden layers',
    because the readout's, which has a share of the angle of all, is near 0 with every rule."""
    hidden = [name for name in data.trials if re.fullmatch(rf"{ANGLE}_\d+", str(name))]
    by_rule: dict[str, list[Row]] = {}
    for rule, rows in trials_of(data).items():
        for row in rows:
            angles = [row[name] for name in hidden if math.isfinite(row[name])]
            if angles and row["state"] != FAILED:
                by_rule.setdefault(rule, []).append({**row, "angle": mean(angles)})
    return by_rule


def correlation(rows: Sequence[Row]) -> float:
    """The rank correlation of the score with the angle, over the complete trials, which alone have
    trained equally long; NaN if they are too few, or all alike."""
    complete = [row for row in rows if row["state"] == COMPLETE]
    if len(complete) < FEW:
        return math.nan
    return stats.rank_correlation([(row["angle"], row["score"]) for row in complete])


def draw_alignment(data: PlotData) -> PanelFigures:
    """Small multiples with the same axes: of trials, by rule; of layers, by configuration."""
    trials = aligned_trials(data)
    figures = [_against(data, rule, trials) for rule in trials]
    by_layer = {metric: courses(data, metric) for metric in MEASURED}
    for metric, every in by_layer.items():
        for place, together in grouped(every, lambda course: course.place).items():
            heading = f"{', '.join((*place, 'best of each rule'))}: {MEASURED[metric][0]}"
            for course in together:
                # What the heading says is not said again.
                known = f", {', '.join(reversed(place))}" if place else ""
                figure = _by_layer(course, together, metric)
                figures.append(Captioned(course.label.replace(known, ""), figure, heading))
    most = max(map(len, (trials, *by_layer.values())))
    note = (
        "Angles of trials are means over the hidden layers: the readout learns from its own error"
        " with every rule. A pruned trial has the angle and the score of the epoch at which it was"
        " stopped, so the rank correlation (Spearman's, of score with angle) is that of the"
        " complete trials, which early stopping has chosen by their scores. Layers are named as"
        " the metrics are: 0 is the first hidden one, “all” is all parameters together."
    )
    return PanelFigures(figures, note, beside=drawing.beside(most))


def _against(data: PlotData, rule: str, trials: dict[str, list[Row]]) -> Captioned:
    """Score against angle: the trials of one rule, in its colour, before those of the others."""
    figure, colour = go.Figure(), drawing.colours(data)[rule]
    others = [row for other, rows in trials.items() if other != rule for row in rows]
    marks = [(others, {"color": drawing.PALE, "size": 4})]
    for state, symbol in ((PRUNED, "circle-open"), (COMPLETE, "circle")):
        own = [row for row in trials[rule] if row["state"] == state]
        marks.append((own, {"color": colour, "size": 7, "symbol": symbol}))
    for rows, marker in marks:
        if rows:
            figure.add_scatter(
                x=[row["angle"] for row in rows],
                y=[row["score"] for row in rows],
                mode="markers",
                marker=marker,
                text=[
                    markup.escape(f"{row['rule']}, trial {row['trial']}, epoch {row['epochs']}")
                    for row in rows
                ],
                hovertemplate="%{text}: %{x:.1f} degrees, %{y:.4g}<extra></extra>",
            )
    every = [row for rows in trials.values() for row in rows]
    drawing.small(figure).update_layout(showlegend=False)
    angle, score = "angle, mean of hidden layers (degrees)", drawing.axis_title(data.metric)
    figure.update_xaxes(title_text=angle, range=drawing.limits(row["angle"] for row in every))
    figure.update_yaxes(title_text=score, range=drawing.limits(row["score"] for row in every))
    rank = correlation(trials[rule])
    named = (
        "" if math.isnan(rank) else f", rank correlation {rank:+.2f}".replace("-", "\N{MINUS SIGN}")
    )
    heading = "All trials of the search, at their last epoch (filled: complete; open: pruned)"
    return Captioned(rule + named, figure, heading)


def _by_layer(course: Course, together: Sequence[Course], metric: str) -> go.Figure:
    """A line for each layer, with its name at the end and the range of the seeds."""
    _, axis, kind = MEASURED[metric]
    every = [v for one in together for of in one.layers for v in (*of.low, *of.high)]
    limits, figure = drawing.limits(every, kind), go.Figure()
    depth = sum(layer.name != ALL for layer in course.layers)
    colours = [drawing.INK if layer.name == ALL else _shade(nth / depth)
               for nth, layer in enumerate(course.layers)]  # fmt: skip
    for layer, colour in zip(course.layers, colours, strict=True):
        if layer.low != layer.high:
            figure.add_scatter(
                x=[*layer.epochs, *reversed(layer.epochs)],
                y=[*layer.high, *reversed(layer.low)],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=colour,
                opacity=0.2,
                hoverinfo="skip",
            )
        figure.add_scatter(
            x=layer.epochs,
            y=layer.mean,
            mode="lines" if len(layer.epochs) > 1 else "markers",
            line={"color": colour, "width": 1.5, "dash": "dot" if layer.name == ALL else "solid"},
            hovertemplate=f"layer {layer.name}, epoch %{{x}}: %{{y:.3g}}<extra></extra>",
        )
    drawing.numbered(drawing.small(figure), "epoch").update_layout(showlegend=False, margin_r=34)
    figure.update_yaxes(title_text=axis, type=kind, range=limits, tickformat=".2~g")
    ends = [(layer, layer.mean[-1], colour)
            for layer, colour in zip(course.layers, colours, strict=True)
            if kind == "linear" or layer.mean[-1] > 0]  # fmt: skip
    if limits is None or not ends:
        return figure
    at = lambda value: math.log10(value) if kind == "log" else value  # as plotly places labels
    gap = LABEL * (limits[1] - limits[0]) / (drawing.SMALL - 80)  # without margins and axis title
    heights = drawing.apart([at(value) for _, value, _ in ends], gap)
    up = max(0, limits[0] + gap / 2 - min(heights))  # no label is drawn outside the axes
    for (layer, _, colour), height in zip(ends, heights, strict=True):
        figure.add_annotation(
            x=layer.epochs[-1], y=height + up, text=layer.name, showarrow=False,
            xanchor="left", xshift=4, font={"color": colour, "size": 11},
        )  # fmt: skip
    return figure


def _shade(share: float) -> str:
    """From that of the first layer (0) to that of the last (1)."""
    mixed = (round(a + (b - a) * share) for a, b in zip(FIRST, LAST, strict=True))
    return f"rgb({', '.join(map(str, mixed))})"
