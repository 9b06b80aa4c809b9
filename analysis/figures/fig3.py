"""`python -m analysis.figures.fig3`: the paper's Figure 3.

One microcircuit as a plasticity experiment: the weight change against the neuron's rate with
top-down feedback (A), without it (B), and for an isolated neuron with clamped inhibition (C). The
inset shows the interneuron's inverse activation and the lines that replace it.
"""

from __future__ import annotations

from collections.abc import Sequence

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
TITLES = (
    "Interneuron's inverse",
    "A  With feedback",
    "B  Without feedback",
    "C  Inhibition clamped",
)
POINTS, QUICK_POINTS = 401, 41


def row(fits: Sequence[Fit], ranges: dict[str, float], points: int) -> pd.DataFrame:
    """Panels inset, A, B and C as rows: panel, rule (exact or linear), theta, delta, target, r_I
    (clamped), x, rate, change. In the inset x is u_I, rate r_I, and change the estimate of u_I.

    A (beside the exact rule) and C are of the first fit, the inset and B of all."""
    circuit = plasticity.PUBLISHED
    estimates = {None: plasticity.exact(circuit), **{fit: plasticity.linear(*fit) for fit in fits}}
    inputs = {panel: jnp.linspace(0, most, points) for panel, most in ranges.items()}
    u = jnp.linspace(0, INSET_U, points)
    r_i = circuit.phi_i.value(u)
    frames = []

    def add(panel: str, fit: Fit | None, curve: plasticity.Curve, **where: float) -> None:
        theta, delta = fit or (np.nan, np.nan)
        rule = {"rule": "linear" if fit else "exact", "theta": theta, "delta": delta}
        where = {"target": np.nan, "r_I": np.nan, **where}
        frames.append(pd.DataFrame({"panel": panel, **rule, **where, **curve._asdict()}))

    for fit, estimate in estimates.items():
        add("inset", fit, plasticity.Curve(u, r_i, estimate(r_i)))
        add("B", fit, plasticity.with_feedback(estimate, inputs["B"], None))
    for target in TARGETS:
        for fit in (None, fits[0]):
            curve = plasticity.with_feedback(estimates[fit], inputs["A"], target)
            add("A", fit, curve, target=target)
    for held in CLAMPED:
        add("C", fits[0], plasticity.clamped(estimates[fits[0]], inputs["C"], held), r_I=held)
    return pd.concat(frames, ignore_index=True)


def draw_row(axes: Sequence[Axes], table: pd.DataFrame, titles: bool = True) -> None:
    """The inset and panels A, B and C of one `row`."""
    inset, a, b, c = axes
    panels = dict(list(table.groupby("panel")))

    for panel, name in ((inset, "inset"), (b, "B")):
        fitted = command.curves(panels[name], "theta", "delta")
        for colour, ((theta, delta), curve) in zip((BLACK, GREEN, BLUE), fitted, strict=False):
            exact = np.isnan(theta)
            if exact and panel is b:
                continue  # it rests on the zero line
            label = "exact" if exact else f"{theta:g} + {delta:g} $r_I$"
            panel.plot(curve["rate"], curve["change"], color=colour, label=label)
    for (target, rule), curve in command.curves(panels["A"], "target", "rule"):
        colour = ORANGE if target == TARGETS[0] else VERMILION
        line = "-" if rule == "linear" else ":"
        label = f"target {target:g}, {rule}"
        a.plot(curve["rate"], curve["change"], color=colour, ls=line, label=label)
    for target in TARGETS:
        a.axvline(target, color=command.GREY, linewidth=0.5, zorder=0)
    for colour, ((held,), curve) in zip(SHADES, command.curves(panels["C"], "r_I"), strict=True):
        c.plot(curve["rate"], curve["change"], color=colour, label=f"$r_I$ = {held:g}")

    inset.set(xlabel="inhibitory rate $r_I$", ylabel="estimate of $u_I$")
    for panel, name, most in ((a, "A", 25), (b, "B", 12), (c, "C", 25)):
        command.clip(panel, -most, most, panels[name]["change"])
        command.zero_line(panel)
        panel.set(xlabel="excitatory rate $r_E$", ylabel="weight change $\\Delta w$")
    for panel, title in zip(axes, TITLES, strict=True):
        if titles:
            panel.set_title(title)
        if titles or panel in (inset, b):  # one legend of A and C for all rows
            panel.legend()


def numbers(quick: bool) -> Tables:
    return {"": row(FITS, RANGES, QUICK_POINTS if quick else POINTS)}


def draw(tables: Tables) -> Figure:
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    draw_row(figure.subplots(1, 4), tables[""])
    return figure


main = command.main_of(command.command("fig3", __doc__), numbers, draw)

if __name__ == "__main__":
    cli.run(main)
