"""`python -m analysis.figures.fig3`: the paper's Figure 3.

One microcircuit as a plasticity experiment: the weight change against the neuron's rate with
top-down feedback (A), without it (B), and for an isolated neuron with clamped inhibition (C). The
inset shows the interneuron's inverse activation and the lines that replace it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import command
from analysis.figures.command import BLACK, BLUE, GREEN, ORANGE, SHADES, VERMILION, Tables
from disinhib import cli
from disinhib.paper import plasticity

Fit = tuple[float, float]  # (theta, delta): u_I is about theta + delta r_I
FITS: tuple[Fit, ...] = ((1.5, 1.5), (0.9, 1.8))
TARGETS = (4.0, 3.0)
CLAMPED = (0.01, 0.5, 1.0, 2.0)  # r_I
INSET_U = 8.0  # largest u_I of the inset
RANGES = {"A": 10.0, "B": 13.0, "C": 9.0}  # largest input of each panel
POINTS, QUICK_POINTS = 401, 41


def row(fits: Sequence[Fit], ranges: dict[str, float], points: int) -> pd.DataFrame:
    """Panels inset, A, B and C as rows: panel, rule (exact or linear), theta, delta, target, r_I
    (clamped), x, rate, change. In the inset x is u_I, rate r_I, and change the estimate of u_I.

    A (beside the exact rule) and C are of the first fit, the inset and B of all."""
    circuit = plasticity.PUBLISHED
    inverse = plasticity.exact(circuit)
    inputs = {panel: jnp.linspace(0, most, points) for panel, most in ranges.items()}
    u = jnp.linspace(0, INSET_U, points)
    r_i = circuit.phi_i.value(u)
    curves: list[tuple[dict[str, Any], plasticity.Curve]] = []

    def add(panel: str, fit: Fit | None, curve: plasticity.Curve, **where: float) -> None:
        theta, delta = fit or (np.nan, np.nan)
        rule = "linear" if fit else "exact"
        given = {"panel": panel, "rule": rule, "theta": theta, "delta": delta}
        curves.append(({**given, "target": np.nan, "r_I": np.nan, **where}, curve))

    for fit in (None, *fits):
        estimate = plasticity.linear(*fit) if fit else inverse
        add("inset", fit, plasticity.Curve(u, r_i, estimate(r_i)))
        add("B", fit, plasticity.with_feedback(estimate, inputs["B"], None))
    for target in TARGETS:
        for fit in (None, fits[0]):
            estimate = plasticity.linear(*fit) if fit else inverse
            curve = plasticity.with_feedback(estimate, inputs["A"], target)
            add("A", fit, curve, target=target)
    for held in CLAMPED:
        curve = plasticity.clamped(plasticity.linear(*fits[0]), inputs["C"], held)
        add("C", fits[0], curve, r_I=held)
    frames = [pd.DataFrame({**given, **curve._asdict()}) for given, curve in curves]
    return pd.concat(frames, ignore_index=True)


def draw_row(axes: Sequence[Axes], table: pd.DataFrame, titles: bool = True) -> None:
    """The inset and panels A, B and C of one `row`."""
    inset, a, b, c = axes
    panels = dict(list(table.groupby("panel")))
    colours = (GREEN, BLUE)

    fitted = command.curves(panels["inset"], "theta", "delta")
    for number, ((theta, delta), curve) in enumerate(fitted):
        fit = f"{theta:g} + {delta:g} $r_I$"
        colour = colours[number - 1] if number else BLACK
        inset.plot(curve["rate"], curve["change"], label=fit if number else "exact", color=colour)
    inset.set(xlabel="inhibitory rate $r_I$", ylabel="estimate of $u_I$")
    inset.legend()

    for (target, rule), curve in command.curves(panels["A"], "target", "rule"):
        colour = ORANGE if target == TARGETS[0] else VERMILION
        solid = rule == "linear"
        label = f"target {target:g}, {rule}"
        a.plot(curve["rate"], curve["change"], color=colour, ls="-" if solid else ":", label=label)
    for target in TARGETS:
        a.axvline(target, color=command.GREY, linewidth=0.5, zorder=0)
    command.clip(a, -25, 25, panels["A"]["change"])

    # The exact rule rests here, on the zero line; its curve is the first.
    _, *without = command.curves(panels["B"], "theta", "delta")
    for colour, ((theta, delta), curve) in zip(colours, without, strict=False):
        label = f"{theta:g} + {delta:g} $r_I$"
        b.plot(curve["rate"], curve["change"], color=colour, label=label)
    command.clip(b, -12, 12, panels["B"]["change"])

    for colour, ((held,), curve) in zip(SHADES, command.curves(panels["C"], "r_I"), strict=True):
        c.plot(curve["rate"], curve["change"], color=colour, label=f"$r_I$ = {held:g}")
    command.clip(c, -25, 25, panels["C"]["change"])

    for panel in (a, b, c):
        command.zero_line(panel)
        panel.set(xlabel="excitatory rate $r_E$", ylabel="weight change $\\Delta w$")
    b.legend()
    if titles:  # one legend for all rows
        a.legend()
        c.legend()
        inset.set_title("Interneuron's inverse")
        a.set_title("A  With feedback")
        b.set_title("B  Without feedback")
        c.set_title("C  Inhibition clamped")


def numbers(quick: bool) -> Tables:
    return {"": row(FITS, RANGES, QUICK_POINTS if quick else POINTS)}


def draw(tables: Tables) -> Figure:
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    draw_row(figure.subplots(1, 4), tables[""])
    return figure


COMMAND = command.command("fig3", __doc__)
main = partial(command.main, COMMAND, numbers, draw)

if __name__ == "__main__":
    cli.run(main)
