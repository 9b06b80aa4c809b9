"""`python -m analysis.figures.fig4 [form=FORM]`: the paper's Figure 4.

A student learns, while it runs, to imitate its teacher. Drawn are inputs, output and target before
and after learning (control is switched on half-way), and for both learning rules the open-loop loss
and the least-control loss in time. fig4.csv has the losses, fig4-traces.csv the rest.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.progress import Progress

from analysis.figures import command
from analysis.figures.command import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, Tables
from disinhib import cli
from disinhib.checks import Option, one_of
from disinhib.paper import student_teacher
from disinhib.paper.student_teacher import EPOCH, FORMS, RULES

EPOCHS, QUICK_EPOCHS = 60, 3
SHOWN = RULES.index("approximate")  # the student whose output is drawn
EVERY = 5  # samples of a trace are 5 ms apart
LOSSES = {
    "open_loop": "Open-loop loss",
    "control": "Least-control loss $H$",
    "closed_loop": "Closed-loop loss",
}


def numbers(quick: bool, form: str = "published") -> Tables:
    """Losses (rule, epoch, minutes at its start, open_loop, closed_loop, control), and traces
    (when, seconds, output_1, ..., target_1, ..., input_1, input_2) of the approximate rule."""
    epochs = QUICK_EPOCHS if quick else EPOCHS
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Epochs", total=epochs)
        course = student_teacher.experiment(
            epochs=epochs, form=form, report=lambda epoch, losses: progress.advance(bar)
        )
    epoch = np.tile(np.arange(epochs), len(RULES))
    columns = {"rule": np.repeat(RULES, epochs), "epoch": epoch, "minutes": epoch * EPOCH / 60}
    columns |= {name: np.asarray(loss).T.ravel() for name, loss in course.losses._asdict().items()}
    traces = [_traces("before", course, course.before), _traces("after", course, course.after)]
    return {"": pd.DataFrame(columns), "-traces": pd.concat(traces, ignore_index=True)}


def _traces(when: str, course: student_teacher.Course, sample) -> pd.DataFrame:
    columns = {
        "output": sample.output[SHOWN],
        "target": sample.target[SHOWN],
        "input": course.inputs[:, :2],
    }
    values = {
        f"{name}_{number}": np.asarray(trace)[::EVERY, number - 1]
        for name, trace in columns.items()
        for number in (1, 2)
    }
    return pd.DataFrame({"when": when, "seconds": np.asarray(course.times)[::EVERY], **values})


def draw(tables: Tables) -> Figure:
    losses, traces = tables[""], tables["-traces"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplot_mosaic([["before", "after", "inputs"], [*LOSSES]])
    for when in ("before", "after"):
        axes, table = panels[when], traces[traces["when"] == when]
        for number, colour in ((1, GREEN), (2, BLUE)):
            student, teacher = table[f"output_{number}"], table[f"target_{number}"]
            axes.plot(table["seconds"], student, color=colour, label=f"output {number}")
            label = "targets" if number == 2 else None
            axes.plot(table["seconds"], teacher, color=BLACK, ls=":", lw=1, label=label)
        axes.axvspan(EPOCH / 2, EPOCH, color=ORANGE, alpha=0.15, lw=0, label="control on")
        axes.set(title=f"{when.capitalize()} learning", xlabel="time in s", ylabel="rate")
    figure.legend(*panels["before"].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    after = traces[traces["when"] == "after"]
    for number, colour in ((1, GREY), (2, BLACK)):
        panels["inputs"].plot(after["seconds"], after[f"input_{number}"], color=colour)
    panels["inputs"].set(title="Two of the inputs", xlabel="time in s", ylabel="input")
    for column, title in LOSSES.items():
        rules = command.curves(losses, "rule")
        for ((rule,), curve), colour in zip(rules, (VERMILION, BLUE), strict=True):
            panels[column].plot(curve["minutes"], curve[column], color=colour, label=rule)
        panels[column].set(yscale="log", title=title, xlabel="time in min")
        panels[column].yaxis.set_minor_formatter(NullFormatter())
    panels["control"].set_yticks([10, 20, 50], labels=["10", "20", "50"])
    panels["open_loop"].legend(title="learning rule")
    return figure


WORDS = "the learning rules as in the published code, or as in the paper's equations"
FORM = Option("form", "published", one_of(FORMS), WORDS)
main = command.main_of(command.command("fig4", __doc__, FORM), numbers, draw)

if __name__ == "__main__":
    cli.run(main)
