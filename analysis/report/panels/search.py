"""How the search went: its best score by the number of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from optuna import visualization

from analysis.report.panels.drawing import SCORES, Drawn, colours, numbered, styled
from analysis.report.panels.plot_data import BEST, WORST, Material, fence, trials_of
from analysis.report.panels.studies import complete_trials, studies
from analysis.stats import expected_maximum
from disinhib.tuning.event_log import COMPLETE, FAILED


class Budget(NamedTuple):
    """What the first k trials of a rule, k = 1.., give."""

    rule: str
    expected: list[float]  # the best score of any k of its trials
    best: list[float]  # the best complete one so far; NaN before there is any


def budgets(material: Material) -> list[Budget]:
    """Of the rules of which any trial has a score.

    In `expected` a pruned trial has the score at which it was stopped, a failed one the worst of
    its rule.
    """
    found = []
    mode = "max" if material.mode == "max" else "min"
    better = np.fmax if mode == "max" else np.fmin
    for rule, rows in trials_of(material).items():
        scores = [row["score"] for row in rows if row["state"] != FAILED]
        if scores:
            scores += [WORST[mode](scores)] * (len(rows) - len(scores))
            complete = [r["score"] if r["state"] == COMPLETE else math.nan for r in rows]
            expected = expected_maximum(scores, mode)
            found.append(Budget(rule, expected.tolist(), better.accumulate(complete).tolist()))
    return found


def draw_history(material: Material) -> Drawn:
    having = {rule: s for rule, s in studies(material).items() if complete_trials(s)}
    if not having:
        return Drawn([])
    drawn: Any = visualization.plot_optimization_history([*having.values()]).data
    palette, kept = colours(material), []
    # Of each study Optuna draws scores, the best so far, and what is infeasible (nothing here).
    for (rule, study), i in zip(having.items(), range(0, len(drawn), 3), strict=True):
        (dots, line), colour = drawn[i : i + 2], palette[rule]
        dots.update(
            x=[x + 1 for x in dots.x],
            name=f"{rule}: a complete trial",
            marker={"color": colour, "size": 7},
            customdata=[trial.user_attrs["trial"] for trial in complete_trials(study)],
            hovertemplate="trial %{customdata}: %{y:.4g}",
        )
        line.update(
            x=[x + 1 for x in line.x],
            y=[y if math.isfinite(y) else None for y in line.y],  # before any was complete
            name=f"{rule}: best so far",
            line={"color": colour, "width": 1.5, "shape": "hv"},
        )
        kept += [dots, line]
    figure = styled(go.Figure(kept), 440)
    numbered(figure, "trials of the rule", max(len(study.trials) for study in having.values()))
    scores = [[trial.value for trial in complete_trials(study)] for study in having.values()]
    note = "Pruned and failed trials have a place on the horizontal axis, but no dot."
    return Drawn([("", figure)], f"{note} {scored(figure, material, scores)}".strip())


def draw_budget(material: Material) -> Drawn:
    found = budgets(material)
    if not found:
        return Drawn([])
    figure, palette, scores = go.Figure(), colours(material), []
    for rule, expected, best in found:
        k, colour = list(range(1, len(expected) + 1)), palette[rule]
        figure.add_scatter(
            x=k, y=expected, mode="lines", line_color=colour, name=f"{rule}: expected best of k"
        )
        scores.append([*expected, *(score for score in best if not math.isnan(score))])
        if not math.isnan(best[-1]):
            figure.add_scatter(
                x=k,
                y=[None if math.isnan(score) else score for score in best],
                mode="lines",
                line={"color": colour, "dash": "dot", "shape": "hv"},
                name=f"{rule}: best of the first k",
            )
    styled(figure, 460)
    numbered(figure, "number k of trials of the rule", max(len(b.expected) for b in found))
    note = (
        "Expected is the mean over all sets of k trials of the rule (unbiased), where a pruned"
        " trial has the score at which it was stopped, a failed one the worst score of its rule; it"
        " takes trials for independent draws, which they are not if the searcher learns. The best"
        " of the first k is of complete trials only."
    )
    return Drawn([("", figure)], f"{note} {scored(figure, material, scores)}".strip())


def scored(figure: go.Figure, material: Material, groups: Sequence[Sequence[float]]) -> str:
    """Gives the figure a vertical axis for the scores of each rule; returns what to know of it."""
    figure.update_yaxes(title_text=SCORES[material.metric])
    scores = [score for group in groups for score in group]
    best, worst = BEST[material.mode], WORST[material.mode]
    # The worst of the rules' own: no rule is out of sight, however much worse than the others.
    edge = worst(fence(group, material.mode) for group in groups)
    if edge == worst(scores):
        return ""
    low, high = sorted((edge, best(scores)))
    pad = 0.06 * (high - low) or 1
    figure.update_yaxes(range=[low - pad, high + pad])
    return f"Scores worse than {edge:.4g} lie outside the figure; zoom out to see them."
