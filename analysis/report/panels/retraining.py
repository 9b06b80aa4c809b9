"""Retrained seeds: their learning curves, and whether their dynamics reach the equilibrium."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import NamedTuple

import plotly.graph_objects as go

from analysis.report.panels import drawing
from analysis.report.panels.drawing import Captioned, PanelFigures
from analysis.report.panels.plot_data import PlotData, Row, configuration, grouped, records
from disinhib.metrics import SELECTION
from disinhib.tuning.event_log import FAILED

CURVES = {  # metrics of the learning curves: caption, axis, its kind
    "valid_accuracy": (
        "validation accuracy",
        drawing.axis_title(SELECTION["valid_accuracy"]),
        "linear",
    ),
    "train_CL_loss": ("training loss", "training loss (dimensionless)", "log"),
}
# Metrics of the ODE's integration: caption, axis, its kind, and above what a seed is flagged (of
# the gap, `REACHED` of solvers.stability, which comes with jax).
PROBES = {
    "ode_gap": ("Gap", "relative gap (dimensionless)", "log", 1e-3),
    "ode_growth": ("Stability", "largest growth rate (1/s)", "linear", 0),
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # configurations of a rule


class Seed(NamedTuple):
    """A retrained configuration with one seed."""

    configuration: str  # plot_data.configuration
    label: str
    nth: int  # configuration of its rule, data set and depth, from 0
    row: Row  # of runs.retrained


class Curve(NamedTuple):
    seed: Seed
    epochs: tuple[int, ...]
    values: tuple[float, ...]


def seeds(data: PlotData) -> list[Seed]:
    alike: dict[tuple, list[str]] = {}
    seeds = []
    for row in records(data.retrained):
        name = configuration(row)
        others = alike.setdefault((row["rule"], row["dataset"], row["depth"]), [])
        if name not in others:
            others.append(name)
        label = data.labels.get(name, f"{row['rule']} ({name})")
        seeds.append(Seed(name, label, others.index(name), row))
    return seeds


def learning_curves(data: PlotData, metric: str) -> list[Curve]:
    """The curves of the seeds that have any epoch of this metric."""
    curves = data.curves.sort_values("epoch")
    by_run = dict(list(curves[curves["metric"] == metric].groupby("run_id")))
    return [
        Curve(seed, tuple(by_run[run]["epoch"]), tuple(by_run[run]["value"]))
        for seed in seeds(data)
        if (run := seed.row["run_id"]) in by_run
    ]


def probes(data: PlotData, metric: str) -> list[tuple[Seed, float]]:
    """Seeds with a finite value of the check of the dynamics: bp on the MLP has no dynamics."""
    values = [(seed, seed.row.get(metric)) for seed in seeds(data)]
    return [(seed, x) for seed, x in values if isinstance(x, float) and math.isfinite(x)]


def draw_learning(data: PlotData) -> PanelFigures:
    """For each data set and depth a figure for each rule, all with the same axes."""
    colour = drawing.colours(data)
    figures: dict[tuple, list[Captioned]] = {}
    most = 1
    for metric, (name, axis, kind) in CURVES.items():
        curves = grouped(
            learning_curves(data, metric),
            lambda c: (c.seed.row["dataset"], c.seed.row["depth"]),
        )
        for (dataset, depth), together in curves.items():
            heading = f"{dataset}, {drawing.counted(depth, 'hidden layer')}: {name}"
            by_rule = grouped(together, lambda c: c.seed.row["rule"])
            most = max(most, len(by_rule))
            for rule, own in by_rule.items():
                figure = _learning(own, [c for c in together if c not in own], colour[rule])
                values = [value for curve in together for value in curve.values]
                limits = drawing.limits(values, kind)
                figure.update_yaxes(title_text=axis, type=kind, range=limits)
                figure.update_xaxes(range=[0, 1.02 * max(max(c.epochs) for c in together)])
                if kind == "log":
                    figure.update_yaxes(tickformat=".2~g", dtick=_log_ticks(together))
                # What the heading says is not said again.
                known = f", {drawing.counted(depth, 'hidden layer')}, {dataset}"
                labels = {curve.seed.label.replace(known, "") for curve in own}
                caption = labels.pop() if len(labels) == 1 else rule
                figures.setdefault((dataset, depth), []).append(Captioned(caption, figure, heading))
    every = [*chain.from_iterable(figures.values())]
    return PanelFigures(every, beside=drawing.beside(most))


def means(curves: Sequence[Curve]) -> list[tuple[tuple[int, ...], list[float]]]:
    """The mean of each configuration's seeds, at the epochs that all of them have."""
    lines = []
    for own in grouped(curves, lambda curve: curve.seed.configuration).values():
        by_epoch = [dict(zip(curve.epochs, curve.values, strict=True)) for curve in own]
        shared = tuple(sorted(set(by_epoch[0]).intersection(*by_epoch)))
        lines.append((shared, [mean(each[epoch] for each in by_epoch) for epoch in shared]))
    return lines


def _log_ticks(curves: Sequence[Curve]) -> str | None:
    """Ticks at 1, 2 and 5 of each decade; None (plotly chooses) if too few or too many."""
    values = [value for curve in curves for value in curve.values if value > 0]
    return "D2" if values and 4 < max(values) / min(values) < 1000 else None


def _learning(curves: Sequence[Curve], others: Sequence[Curve], of_rule: str) -> go.Figure:
    """The seeds of one rule, in its colour `of_rule`, before the means of others."""
    figure = go.Figure()
    drawing.context(figure, means(others))
    shown = set()
    for seed, epochs, values in curves:
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines" if len(epochs) > 1 else "markers",
            line={"color": of_rule, "width": 1.3, "dash": DASHES[seed.nth % len(DASHES)]},
            name=drawing.wrapped(seed.label, 38),
            legendgroup=seed.configuration,
            showlegend=seed.configuration not in shown,
            hovertemplate=f"seed {seed.row['seed']}, epoch %{{x}}: %{{y:.4g}}",
        )
        shown.add(seed.configuration)
        if seed.row["state"] == FAILED:
            figure.add_scatter(
                x=epochs[-1:],
                y=values[-1:],
                mode="markers",
                marker={"symbol": "x", "size": 10, "color": of_rule},
                name="a seed failed after this epoch",
                legendgroup=FAILED,
                legendrank=2000,  # last
                showlegend=FAILED not in shown,
                text=[f"seed {seed.row['seed']} failed: {drawing.hover_text(seed.row['reason'])}"],
                hovertemplate="%{text}",
            )
            shown.add(FAILED)
    named = len({curve.seed.configuration for curve in curves}) > 1 or FAILED in shown
    drawing.numbered(drawing.small(figure), "epoch").update_layout(showlegend=named)
    return figure.update_layout(height=drawing.SMALL + 24 * len(shown) * named)


def draw_ode(data: PlotData) -> PanelFigures:
    figures = []
    for metric, (caption, axis, kind, bound) in PROBES.items():
        values = probes(data, metric)
        if values:
            figure = _strip(values, drawing.colours(data))
            figure.update_xaxes(title_text=axis, type=kind)
            if kind == "log":
                figure.update_xaxes(exponentformat="power", dtick=1)
            drawing.dashed(figure, bound)
            figures.append(Captioned(caption, figure))
    note = (
        "Diverged seeds are not shown, nor is back-propagation on the plain MLP, which has no"
        " dynamics. Flagged seeds failed the check."
    )
    return PanelFigures(figures, note)


def _strip(values: Sequence[tuple[Seed, float]], colour: Mapping[str, str]) -> go.Figure:
    """A line for each configuration: their names are too long to stand side by side."""
    # Reversed, as plotly counts upwards.
    lines = {seed.configuration: seed.label for seed, _ in reversed(values)}
    heights = {name: height for height, name in enumerate(lines)}
    by_flag = grouped(values, lambda value: bool(drawing.hover_text(value[0].row.get("flag"))))
    figure = go.Figure()
    for name, flagged, symbol in (("a seed", False, "circle-open"), ("a flagged seed", True, "x")):
        if marks := by_flag.get(flagged):
            figure.add_scatter(
                x=[value for _, value in marks],
                y=[heights[seed.configuration] for seed, _ in marks],
                mode="markers",
                marker={"size": 10, "color": [colour[seed.row["rule"]] for seed, _ in marks]},
                marker_symbol=symbol,
                name=name,
                showlegend=True,
                text=[_probed(seed.row) for seed, _ in marks],
                hovertemplate="%{x:.3g}, %{text}",
            )
    drawing.styled(figure, 130 + 70 * len(lines))
    return drawing.lined(
        figure, "configuration", [drawing.wrapped(label, 20) for label in lines.values()]
    )


def _probed(row: Row) -> str:
    """The hover text of a seed; of a row of runs.retrained."""
    reached = row.get("ode_reached", math.nan)
    share = "" if math.isnan(reached) else f", {100 * reached:.0f} % of the samples reached it"
    return f"seed {row['seed']}{share} {drawing.hover_text(row.get('flag'))}".strip()
