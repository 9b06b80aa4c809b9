"""`python -m analysis.figures.figS1`: the paper's Supplementary Figure S1.

The experiment of Figure 3 with four other models of error-modulated plasticity: with feedback
towards a target, without feedback, and with inhibition clamped.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import command
from analysis.figures.command import BLACK, ORANGE, SHADES, VERMILION, Tables
from analysis.figures.fig3 import POINTS, QUICK_POINTS, TARGETS
from disinhib import cli
from disinhib.paper.error_modulation import MODELS

CLAMPED = (0.0, 1.0, 2.0, 3.0)  # r_I
SHOWN = (-15.0, 12.0)  # of the weight changes
WIDE = (-40.0, 150.0)  # the same, where inhibition is clamped in Greedy et al.'s model


def numbers(quick: bool) -> Tables:
    """Columns: model, panel, target, r_I (clamped), x, rate, change."""
    points = QUICK_POINTS if quick else POINTS
    frames = []
    for name, model in MODELS.items():
        for target in (*TARGETS, None):
            panel = "without feedback" if target is None else "with feedback"
            most = model.x_without if target is None else model.x_with_target
            curve = model.feedback(jnp.linspace(0, most, points), target)
            shown = np.nan if target is None else target
            frames.append({"model": name, "panel": panel, "target": shown, **curve._asdict()})
        if model.clamped is None or model.x_clamped is None:
            continue
        for r_i in CLAMPED:
            curve = model.clamped(jnp.linspace(0, model.x_clamped, points), r_i)
            frames.append({"model": name, "panel": "clamped", "r_I": r_i, **curve._asdict()})
    return {"": pd.concat([pd.DataFrame(frame) for frame in frames], ignore_index=True)}


def draw(tables: Tables) -> Figure:
    panels = ("with feedback", "without feedback", "clamped")
    parts = {tuple(which): part for which, part in command.curves(tables[""], "model", "panel")}
    figure = Figure(figsize=(8, 2.3 * len(MODELS)), layout="constrained")
    grid = figure.subplots(len(MODELS), len(panels))
    for axes_of_model, (name, model) in zip(grid, MODELS.items(), strict=True):
        for axes, panel in zip(axes_of_model, panels, strict=True):
            table = parts.get((name, panel))
            if table is None:
                axes.set_axis_off()
                continue
            varied = "r_I" if panel == "clamped" else "target"
            colours = SHADES if panel == "clamped" else (ORANGE, VERMILION)
            curves = command.curves(table, varied)
            for colour, ((value,), curve) in zip(colours, curves, strict=False):
                symbol = "$r_I$" if panel == "clamped" else "target"
                style = {"color": colour, "label": f"{symbol} = {value:g}"}
                if panel == "without feedback":
                    style = {"color": BLACK}
                axes.plot(curve["rate"], curve["change"], **style)
            wide = name == "greedy" and panel == "clamped"
            command.clip(axes, *(WIDE if wide else SHOWN), table["change"])
            command.zero_line(axes)
            axes.set(xlabel=model.rate)
            if panel != "without feedback" and name == next(iter(MODELS)):
                axes.legend()  # the same for all models
        axes_of_model[0].set_ylabel("weight change $\\Delta w$")
        axes_of_model[0].set_title(f"{model.citation}\nwith feedback")
        axes_of_model[1].set_title("without feedback")
        if model.clamped:
            axes_of_model[2].set_title("inhibition clamped")
    return figure


main = command.main_of(command.command("figS1", __doc__), numbers, draw)

if __name__ == "__main__":
    cli.run(main)
