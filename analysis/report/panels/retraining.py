"""What was retrained with other seeds: how each learnt, and where its dynamics end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import plotly.graph_objects as go

from analysis.report.panels.drawing import (
    SCORES,
    Drawn,
    colours,
    counted,
    dashed,
    lined,
    numbered,
    styled,
    told,
    wrapped,
)
from analysis.report.panels.plot_data import Material, Row, grouped, records
from disinhib.tuning.event_log import FAILED

CURVES = {  # metrics of the learning curves: caption, axis, its kind
    "valid_accuracy": ("validation accuracy", SCORES["valid_accuracy"], "linear"),
    "train_CL_loss": ("training loss", "training loss (dimensionless)", "log"),
}
PROBES = {  # metrics of the ODE's integration: caption, axis, its kind
    "ode_gap": ("Gap", "relative gap (dimensionless)", "log"),
    "ode_growth": ("Stability", "largest growth rate (1/s)", "linear"),
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # configurations of a rule


class Seed(NamedTuple):
    """A retrained configuration with one seed."""

    configuration: str
    label: str
    nth: int  # configuration of its rule, data set and depth, from 0
    row: Row  # of runs.retrained


class Curve(NamedTuple):
    seed: Seed
    epochs: tuple[int, ...]
    values: tuple[float, ...]


def seeds(material: Material) -> list[Seed]:
    alike: dict[tuple, list[str]] = {}
    found = []
    for row in records(material.retrained):
        name = row["configuration"]
        others = alike.setdefault((row["rule"], row["dataset"], row["depth"]), [])
        if name not in others:
            others.append(name)
        label = material.labels.get(name, f"{row['rule']} ({name})")
        found.append(Seed(name, label, others.index(name), row))
    return found


def learning_curves(material: Material, metric: str) -> list[Curve]:
    """Of the seeds that have any epoch of this metric."""
    mine = [row for row in records(material.curves) if row["metric"] == metric]
    points = grouped(mine, lambda row: row["run_id"])
    curves = []
    for seed in seeds(material):
        there = sorted((row["epoch"], row["value"]) for row in points.get(seed.row["run_id"], ()))
        if there:
            epochs, values = zip(*there, strict=True)
            curves.append(Curve(seed, epochs, values))
    return curves


def probes(material: Material, metric: str) -> list[tuple[Seed, float]]:
    """Seeds with a number from the ODE's integration: bp on the MLP has no dynamics."""
    found = [(seed, seed.row.get(metric)) for seed in seeds(material)]
    return [(seed, x) for seed, x in found if isinstance(x, float) and math.isfinite(x)]


def draw_learning(material: Material) -> Drawn:
    colour = colours(material)
    figures = {}
    for metric, (what, axis, kind) in CURVES.items():
        curves = grouped(
            learning_curves(material, metric),
            lambda c: (c.seed.row["dataset"], c.seed.row["depth"]),
        )
        for (dataset, depth), there in curves.items():
            figure = _learning(there, colour).update_yaxes(title_text=axis, type=kind)
            if kind == "log":
                figure.update_yaxes(tickformat=".2~g", dtick=_log_ticks(there))
            caption = f"{dataset}, {counted(depth, 'hidden layer')}: {what}"
            figures.setdefault((dataset, depth), []).append((caption, figure))
    return Drawn([*chain.from_iterable(figures.values())])


def _log_ticks(curves: Sequence[Curve]) -> str | None:
    """1, 2 and 5 of each decade; None (plotly chooses) where that is too few or too many."""
    values = [value for curve in curves for value in curve.values if value > 0]
    return "D2" if values and 4 < max(values) / min(values) < 1000 else None


def _learning(curves: Sequence[Curve], colour: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    shown = set()
    for seed, epochs, values in curves:
        of = colour[seed.row["rule"]]
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines" if len(epochs) > 1 else "markers",
            line={"color": of, "width": 1.3, "dash": DASHES[seed.nth % len(DASHES)]},
            name=wrapped(seed.label, 38),
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
                marker={"symbol": "x", "size": 10, "color": of},
                name="a seed failed after this epoch",
                legendgroup=FAILED,
                legendrank=2000,  # last
                showlegend=FAILED not in shown,
                text=[f"seed {seed.row['seed']} failed: {told(seed.row['reason'])}"],
                hovertemplate="%{text}",
            )
            shown.add(FAILED)
    return numbered(styled(figure, 460), "epoch", max(curve.epochs[-1] for curve in curves))


def draw_ode(material: Material) -> Drawn:
    figures = []
    for metric, (caption, axis, kind) in PROBES.items():
        found = probes(material, metric)
        if found:
            figure = _strip(found, colours(material))
            figure.update_xaxes(title_text=axis, type=kind)
            if kind == "log":
                figure.update_xaxes(exponentformat="power", dtick=1)
            else:
                dashed(figure, 0)
            figures.append((caption, figure))
    note = (
        "Not shown are seeds that diverged, and back-propagation on the plain MLP, which has no"
        " dynamics. A flagged seed is one that failed the check."
    )
    return Drawn(figures, note)


def _strip(found: Sequence[tuple[Seed, float]], colour: Mapping[str, str]) -> go.Figure:
    """A line for each configuration, as their names are too long to stand side by side."""
    lines = {seed.configuration: seed.label for seed, _ in reversed(found)}  # plotly counts upwards
    heights = {name: height for height, name in enumerate(lines)}
    figure = go.Figure()
    for name, flagged, symbol in (("a seed", False, "circle-open"), ("a flagged seed", True, "x")):
        there = [(s, value) for s, value in found if bool(told(s.row.get("flag"))) == flagged]
        if there:
            figure.add_scatter(
                x=[value for _, value in there],
                y=[heights[seed.configuration] for seed, _ in there],
                mode="markers",
                marker={"size": 10, "color": [colour[seed.row["rule"]] for seed, _ in there]},
                marker_symbol=symbol,
                name=name,
                showlegend=True,
                text=[_probed(seed.row) for seed, _ in there],
                hovertemplate="%{x:.3g}, %{text}",
            )
    styled(figure, 130 + 70 * len(lines))
    return lined(figure, "configuration", [wrapped(label, 20) for label in lines.values()])


def _probed(row: Row) -> str:
    """What a hover text says of a seed's probe; of a row of runs.retrained."""
    reached = row.get("ode_reached", math.nan)
    share = "" if math.isnan(reached) else f", {100 * reached:.0f} % of the samples reached it"
    return f"seed {row['seed']}{share} {told(row.get('flag'))}".strip()
