"""Scores and failures against the parameters: all at once, one by one, and where trials failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from plotly.subplots import make_subplots

from analysis.report.panels import drawing, plot_data
from analysis.report.panels.drawing import GREY, Captioned, PanelFigures
from analysis.report.panels.plot_data import PlotData, Row, Setting, grouped
from analysis.report.panels.studies import complete_trials, studies
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

LOOKS = {  # marks of slices
    PRUNED: {"symbol": "circle-open", "size": 7},
    COMPLETE: {"symbol": "circle", "size": 8},
    "worse than shown": {"symbol": "triangle-down-open", "size": 9},
    "best": {"symbol": "star", "size": 14, "line": {"width": 1, "color": "white"}},
}
WIDE = 88  # pixels of an axis of parallel coordinates


def best_trial(rows: Sequence[Row]) -> int | None:
    """The number of the best complete trial; of equals, the one that was tried first."""
    complete = [(-row["merit"], row["trial"]) for row in rows if row["state"] == COMPLETE]
    return min(complete)[1] if complete else None


def side_by_side(settings: Sequence[Setting]) -> list[float]:
    """Their positions, shifted so that trials with the same choice do not hide each other."""
    keys = [(setting.name, setting.parameter["value"]) for setting in settings]
    same, seen, positions = Counter(keys), Counter(), []
    for setting, key in zip(settings, keys, strict=True):
        step = min(0.012, 0.4 / same[key]) if setting.parameter["kind"] == "categorical" else 0.0
        shift = seen[key] * (-step if setting.position > 0.5 else step)
        positions.append(setting.position + shift)
        seen[key] += 1
    return positions


def draw_parallel(data: PlotData) -> PanelFigures:
    figures, notes, most = [], [], 0
    for rule, study in studies(data).items():
        trials = complete_trials(study)
        names = sorted({name for trial in trials for name in trial.params})
        complete = drawing.counted(len(trials), "complete trial")
        if len(trials) < 2 or len(names) < 2:
            notes.append(
                f"{rule} is left out: {complete}, {drawing.counted(len(names), 'parameter')}."
            )
            continue
        figures.append(Captioned(f"{rule}, {complete}", _parallel(study, names, data)))
        most = max(most, len(names))
    return PanelFigures(figures, " ".join(notes), width=WIDE * (most + 1))  # and the score


def _parallel(study: optuna.Study, names: Sequence[str], data: PlotData) -> go.Figure:
    """Optuna's figure, with whole names (it cuts them after 17 characters) and in the rule's colour
    (Optuna's palest is invisible)."""
    figure: Any = visualization.plot_parallel_coordinate(study)
    colour = drawing.colours(data)[study.study_name]
    scores = [trial.value for trial in complete_trials(study)]
    low, high = min(scores), max(scores)
    figure.data = figure.data[: len(scores)]  # what follows the lines is a scale of colours
    for line in figure.data:
        good = line.y[0] if data.metric.sign > 0 else 1 - line.y[0]
        line.line = {"color": colour, "width": 1 + good}
        line.opacity = 0.2 + 0.8 * good
    ticks = []
    for tick in sorted(figure.layout.annotations, key=lambda tick: tick.y not in (0, 1)):
        if all(tick.x != other.x or abs(tick.y - other.y) > 0.05 for other in ticks):
            tick.update(bgcolor="rgba(255, 255, 255, 0.7)", borderpad=0)
            if tick.x == 0:  # three digits are too few to tell good scores apart
                tick.text = f"{low + tick.y * (high - low):.4g}"
            ticks.append(tick)
    figure.layout.annotations = ticks
    drawing.styled(figure, 420)
    score = drawing.wrapped(drawing.axis_title(data.metric), 14)
    return figure.update_xaxes(
        ticktext=[score, *(drawing.wrapped_name(name, 14) for name in names)],
        side="top",
        tickangle=0,
        tickfont_size=10.5,
        ticklabeloverflow="allow",
        range=[-0.5, len(names) + 0.4],
    )


def draw_slices(data: PlotData) -> PanelFigures:
    figures = []
    for rule, of_rule in plot_data.settings(data).items():
        scored = [setting for setting in of_rule if setting.trial["state"] != FAILED]
        if scored:
            figures.append(Captioned(rule, _slices(scored, data, drawing.colours(data)[rule])))
    note = "A pruned trial has the score at which it was stopped, before its budget was used up."
    return PanelFigures(figures, note)


def _slices(settings: Sequence[Setting], data: PlotData, colour: str) -> go.Figure:
    """Not Optuna's, which show complete trials only, in one row of plots 300 pixels wide. A mark
    for each trial; if its merit is below the fence, it is drawn there."""
    trials = [*{setting.trial["trial"]: setting.trial for setting in settings}.values()]
    edge = plot_data.fence([trial["merit"] for trial in trials])
    best = best_trial(trials)

    def look(setting: Setting) -> str:
        if setting.trial["trial"] == best:
            return "best"
        return setting.trial["state"] if setting.trial["merit"] >= edge else "worse than shown"

    panes = grouped(settings, lambda setting: setting.name)
    columns = min(2, len(panes))
    rows = math.ceil(len(panes) / columns)
    height = 230 * rows + 100
    figure = make_subplots(
        rows, columns, vertical_spacing=80 / height, horizontal_spacing=0.12, shared_yaxes=True
    )
    drawing.styled(figure, height)
    shown = set()
    for i, (name, of_pane) in enumerate(sorted(panes.items())):
        cell: Row = {"row": i // columns + 1, "col": i % columns + 1}
        parameter = of_pane[0].parameter
        is_choice = parameter["kind"] == "categorical"
        by_look = grouped(of_pane, look)
        for mark in [mark for mark in LOOKS if mark in by_look]:
            values = [setting.parameter["value"] for setting in by_look[mark]]
            tried = [setting.trial for setting in by_look[mark]]
            figure.add_scatter(
                x=[*map(str, values)] if is_choice else values,
                y=[data.metric.sign * max(trial["merit"], edge) for trial in tried],
                mode="markers",
                marker={"color": colour, **LOOKS[mark]},
                name=mark,
                legendgroup=mark,
                showlegend=mark not in shown,
                text=[
                    f"trial {trial['trial']}, {trial['state']} after"
                    f" {drawing.counted(trial['epochs'], 'epoch')}: {trial['score']:.4g}"
                    for trial in tried
                ],
                hovertemplate="%{text} at %{x}",
                **cell,
            )
            shown.add(mark)
        figure.update_xaxes(**_axis(parameter), **cell, title_text=drawing.wrapped_name(name, 26))
        if not is_choice:
            drawing.dashed(figure, parameter["low"], parameter["high"], **cell)
    return figure.update_yaxes(matches="y").update_yaxes(
        title_text=drawing.axis_title(data.metric), title_font_size=11, col=1
    )


def _axis(parameter: Row) -> Row:
    """A parameter's axis: a little wider than its range, with ticks at both ends."""
    if parameter["kind"] == "categorical":
        choices = list(map(str, parameter["choices"]))
        limits = [-0.5, len(choices) - 0.5]
        return {"type": "category", "categoryarray": choices, "range": limits}
    forth, back = (math.log10, lambda x: 10**x) if parameter["log"] else (float, float)
    low, high = forth(parameter["low"]), forth(parameter["high"])
    ticks = [back(x) for x in (low, (low + high) / 2, high)]
    pad = 0.08 * (high - low) or 0.5
    return {
        "type": "log" if parameter["log"] else "linear",
        "range": [low - pad, high + pad],
        "tickvals": ticks,
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def draw_failures(data: PlotData) -> PanelFigures:
    figures = []
    trials = plot_data.trials_of(data)
    for rule, of_rule in plot_data.settings(data).items():
        failed = sum(row["state"] == FAILED for row in trials[rule])
        if failed and of_rule:
            caption = f"{rule}, {failed} of {drawing.counted(len(trials[rule]), 'trial')} failed"
            figures.append(Captioned(caption, _failures(of_rule, drawing.colours(data)[rule])))
    note = (
        "Of a choice, the first option is at 0 and the last at 1; equal choices stand side by side."
    )
    return PanelFigures(figures, note)


def _failures(settings: Sequence[Setting], colour: str) -> go.Figure:
    names = sorted({setting.name for setting in settings}, reverse=True)  # plotly counts upwards
    figure = go.Figure()
    for label, failed, above, marker in (
        ("did not fail", False, -0.14, {"symbol": "circle-open", "color": GREY}),
        ("failed", True, 0.14, {"symbol": "x", "color": colour, "size": 9}),
    ):
        marked = [one for one in settings if (one.trial["state"] == FAILED) == failed]
        figure.add_scatter(
            x=side_by_side(marked),
            y=[names.index(setting.name) + above for setting in marked],
            mode="markers",
            marker=marker,
            name=label,
            text=[_described(setting) for setting in marked],
            hovertemplate="%{text}",
        )
    drawing.dashed(figure, 0, 1)
    drawing.styled(figure, 110 + 44 * len(names))
    figure.update_xaxes(title_text="position in the range (dimensionless)", range=[-0.08, 1.08])
    figure.update_xaxes(tickvals=[0, 0.5, 1], ticktext=["0: low edge", "0.5", "1: high edge"])
    return drawing.lined(figure, "parameter", [drawing.wrapped_name(name) for name in names])


def _described(setting: Setting) -> str:
    value = setting.parameter["value"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    reason = drawing.hover_text(setting.trial["reason"])
    return f"trial {setting.trial['trial']}: {drawing.hover_text(text)} {reason}"
