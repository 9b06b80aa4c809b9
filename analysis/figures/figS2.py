"""`python -m analysis.figures.figS2`: the paper's Supplementary Figure S2.

The panels of Figure 3, in a row for each line (theta, delta) that replaces the interneuron's
inverse activation: good lines and bad ones.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import command, fig3
from analysis.figures.command import Tables
from disinhib import cli

FITS: tuple[fig3.Fit, ...] = ((1.5, 0.5), (-0.5, 1.5), (1.5, 2.0), (4.0, 1.0), (1.75, 1.25))
RANGES = {"A": 20.0, "B": 20.0, "C": 10.0}


def numbers(quick: bool) -> Tables:
    points = fig3.QUICK_POINTS if quick else fig3.POINTS
    rows = [
        fig3.row([fit], RANGES, points).assign(row=number)
        for number, fit in enumerate(FITS, start=1)
    ]
    return {"": pd.concat(rows, ignore_index=True)}


def draw(tables: Tables) -> Figure:
    figure = Figure(figsize=(10, 2.4 * len(FITS)), layout="constrained")
    axes = figure.subplots(len(FITS), 4)
    for number, (_, table) in enumerate(command.curves(tables[""], "row")):
        fig3.draw_row(axes[number], table, titles=number == 0)
    return figure


main = command.main_of(command.command("figS2", __doc__), numbers, draw)

if __name__ == "__main__":
    cli.run(main)
