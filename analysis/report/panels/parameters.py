"""The trials at the values of their parameters: all at once, one by one, and where they failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from plotly.subplots import make_subplots

from analysis.report.panels.drawing import (
    GREY,
    SCORES,
    Drawn,
    colours,
    counted,
    dashed,
    lined,
    styled,
    told,
    wrapped,
    wrapped_name,
)
from analysis.report.panels.plot_data import (
    BEST,
    Material,
    Row,
    Setting,
    fence,
    grouped,
    settings,
    trials_of,
)
from analysis.report.panels.studies import complete_trials, studies
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

LOOKS = {  # marks of slices
    PRUNED: {"symbol": "circle-open", "size": 7},
    COMPLETE: {"symbol": "circle", "size": 8},
    "worse than shown": {"symbol": "triangle-down-open", "size": 9},
    "best": {"symbol": "star", "size": 14, "line": {"width": 1, "color": "white"}},
}
WIDE = 88  # pixels of an axis of parallel coordinates


def best_trial(rows: Sequence[Row], mode: str) -> int | None:
    """The number of the best complete one; of equals, that which was tried first."""
    sign = -1 if mode == "max" else 1
    complete = [(sign * r["score"], r["trial"]) for r in rows if r["state"] == COMPLETE]
    return min(complete)[1] if complete else None


def side_by_side(its: Sequence[Setting]) -> list[float]:
    """Their places, where those with the same choice do not hide each other."""
    keys = [(setting.name, setting.about["value"]) for setting in its]
    same, seen, places = Counter(keys), Counter(), []
    for setting, key in zip(its, keys, strict=True):
        step = min(0.012, 0.4 / same[key]) if setting.about["kind"] == "categorical" else 0.0
        places.append(setting.place + seen[key] * (-step if setting.place > 0.5 else step))
        seen[key] += 1
    return places


def draw_parallel(material: Material) -> Drawn:
    figures, notes, most = [], [], 0
    for rule, study in studies(material).items():
        trials = complete_trials(study)
        names = sorted({name for trial in trials for name in trial.params})
        has = counted(len(trials), "complete trial")
        if len(trials) < 2 or len(names) < 2:
            notes.append(f"{rule} is left out: {has}, {counted(len(names), 'parameter')}.")
            continue
        figures.append((f"{rule}, {has}", _parallel(study, names, material)))
        most = max(most, len(names))
    return Drawn(figures, " ".join(notes), width=WIDE * (most + 1))  # and the score


def _parallel(study: optuna.Study, names: Sequence[str], material: Material) -> go.Figure:
    """Optuna's, with whole names (it cuts them after 17 characters), and in the rule's colour: its
    own palest cannot be seen."""
    figure: Any = visualization.plot_parallel_coordinate(study)
    colour = colours(material)[study.study_name]
    scores = [trial.value for trial in complete_trials(study)]
    low, high = min(scores), max(scores)
    figure.data = figure.data[: len(scores)]  # what follows the lines is a scale of colours
    for line in figure.data:
        good = line.y[0] if material.mode == "max" else 1 - line.y[0]
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
    styled(figure, 420)
    score = wrapped(SCORES[material.metric], 14)
    return figure.update_xaxes(
        ticktext=[score, *(wrapped_name(name, 14) for name in names)],
        side="top",
        tickangle=0,
        tickfont_size=10.5,
        ticklabeloverflow="allow",
        range=[-0.5, len(names) + 0.4],
    )


def draw_slices(material: Material) -> Drawn:
    figures = []
    for rule, its in settings(material).items():
        shown = [setting for setting in its if setting.trial["state"] != FAILED]
        if shown:
            figures.append((rule, _slices(shown, material, colours(material)[rule])))
    note = "A pruned trial has the score at which it was stopped, before its budget was used up."
    return Drawn(figures, note)


def _slices(its: Sequence[Setting], material: Material, colour: str) -> go.Figure:
    """Optuna's slices have complete trials alone, and are one row of 300 pixels each."""
    trials = [*{setting.trial["trial"]: setting.trial for setting in its}.values()]
    edge = fence([trial["score"] for trial in trials], material.mode)
    best = best_trial(trials, material.mode)
    panes = grouped(its, lambda setting: setting.name)
    columns = min(2, len(panes))
    rows = math.ceil(len(panes) / columns)
    height = 230 * rows + 100
    figure = make_subplots(
        rows, columns, vertical_spacing=80 / height, horizontal_spacing=0.12, shared_yaxes=True
    )
    styled(figure, height)
    shown = set()
    for i, (name, there) in enumerate(sorted(panes.items())):
        cell: Row = {"row": i // columns + 1, "col": i % columns + 1}
        for mark in _marks(there, edge, best, material.mode, colour):
            figure.add_trace(mark.update(showlegend=mark.name not in shown), **cell)
            shown.add(mark.name)
        about = there[0].about
        figure.update_xaxes(**_axis(about), **cell, title_text=wrapped_name(name, 26))
        if about["kind"] != "categorical":
            dashed(figure, about["low"], about["high"], **cell)
    return figure.update_yaxes(matches="y").update_yaxes(
        title_text=SCORES[material.metric], title_font_size=11, col=1
    )


def _marks(
    its: Sequence[Setting], edge: float, best: int | None, mode: str, colour: str
) -> list[go.Scatter]:
    """One mark for each trial; what is worse than `edge` stands on it."""
    clip = BEST[mode]

    def look(setting: Setting) -> str:
        trial = setting.trial
        if trial["trial"] == best:
            return "best"
        shown = clip(trial["score"], edge) == trial["score"]
        return trial["state"] if shown else "worse than shown"

    found = grouped(its, look)
    return [
        go.Scatter(
            x=[_x(setting) for setting in found[name]],
            y=[clip(setting.trial["score"], edge) for setting in found[name]],
            mode="markers",
            marker={"color": colour, **marker},
            name=name,
            legendgroup=name,
            text=[
                f"trial {trial['trial']}, {trial['state']} after"
                f" {counted(trial['epochs'], 'epoch')}: {trial['score']:.4g}"
                for _, _, _, trial in found[name]
            ],
            hovertemplate="%{text} at %{x}",
        )
        for name, marker in LOOKS.items()
        if name in found
    ]


def _x(setting: Setting) -> Any:
    value = setting.about["value"]
    return str(value) if setting.about["kind"] == "categorical" else value


def _axis(about: Row) -> Row:
    """A parameter's axis: a little wider than its range, whose ends are ticks."""
    if about["kind"] == "categorical":
        choices = list(map(str, about["choices"]))
        shown = [-0.5, len(choices) - 0.5]
        return {"type": "category", "categoryarray": choices, "range": shown}
    forth, back = (math.log10, lambda x: 10**x) if about["log"] else (float, float)
    low, high = forth(about["low"]), forth(about["high"])
    ticks = [back(x) for x in (low, (low + high) / 2, high)]
    pad = 0.08 * (high - low) or 0.5
    return {
        "type": "log" if about["log"] else "linear",
        "range": [low - pad, high + pad],
        "tickvals": ticks,
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def draw_failures(material: Material) -> Drawn:
    figures = []
    trials = trials_of(material)
    for rule, its in settings(material).items():
        failed = sum(row["state"] == FAILED for row in trials[rule])
        if failed and its:
            caption = f"{rule}, {failed} of {counted(len(trials[rule]), 'trial')} failed"
            figures.append((caption, _failures(its, colours(material)[rule])))
    note = "Of choices, 0 is the first, 1 the last; trials stand side by side there."
    return Drawn(figures, note)


def _failures(its: Sequence[Setting], colour: str) -> go.Figure:
    names = sorted({setting.name for setting in its}, reverse=True)  # plotly counts upwards
    figure = go.Figure()
    for label, failed, above, marker in (
        ("did not fail", False, -0.14, {"symbol": "circle-open", "color": GREY}),
        ("failed", True, 0.14, {"symbol": "x", "color": colour, "size": 9}),
    ):
        there = [setting for setting in its if (setting.trial["state"] == FAILED) == failed]
        figure.add_scatter(
            x=side_by_side(there),
            y=[names.index(setting.name) + above for setting in there],
            mode="markers",
            marker=marker,
            name=label,
            text=[
                f"trial {trial['trial']}: {told(_plain(about['value']))} {told(trial['reason'])}"
                for _, about, _, trial in there
            ],
            hovertemplate="%{text}",
        )
    dashed(figure, 0, 1)
    styled(figure, 110 + 44 * len(names))
    figure.update_xaxes(title_text="place in its range (dimensionless)", range=[-0.08, 1.08])
    figure.update_xaxes(tickvals=[0, 0.5, 1], ticktext=["0: low edge", "0.5", "1: high edge"])
    return lined(figure, "parameter", [wrapped_name(name) for name in names])


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
