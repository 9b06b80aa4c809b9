"""Shared by the figures' commands: options, style, and how figures are saved."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disinhib import cli, numerics
from disinhib.checks import FLAG, TEXT, Option
from disinhib.errors import InputError, one_line

Tables = Mapping[str, pd.DataFrame]  # by the ending of the file's name: "" for the main one
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text
}
# of Okabe and Ito, which colour-blind readers can tell apart
ORANGE, BLUE, GREEN, VERMILION, SKY = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9"
GREY, BLACK = "#8C8C8C", "#000000"
SHADES = ("#9ECAE1", "#6BAED6", "#3182BD", "#08519C")  # of a growing quantity


OUT = Option("out", "out/figures", TEXT, "folder to write to")
QUICK = Option("quick", False, FLAG, "fewer points, for a first look")


def command(
    name: str, text: str | None, *options: Option, alone: tuple[str, ...] = ()
) -> cli.Command:
    """The command of a figure: its own options, then those of every figure."""
    return cli.Command(f"analysis.figures.{name}", text, (*options, OUT, QUICK), alone)


def check_folder(name: str) -> Path:
    """Makes the folder that `out` names. Raises InputError if nothing can be written there."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"out: given {folder}, allowed is a folder that can be written ({error.strerror})"
        ) from error
    return folder


def set_jax() -> None:
    """Numbers do not depend on the shell's variables; those that are ignored are named."""
    numerics.set_jax()
    for line in numerics.ignored():
        print(f"warning: {line}", file=sys.stderr)


def save(folder: Path, name: str, tables: Tables, draw: Callable[[Tables], Figure]) -> None:
    """Writes `name`.pdf, .png and a .csv for each table, each whole or not at all, and prints the
    names. Raises InputError if that fails."""
    with mpl.rc_context(STYLE):
        figure = draw(tables)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
                for ending, table in tables.items():
                    table.to_csv(
                        Path(part, f"{name}{ending}.csv"), index=False, float_format="%.6g"
                    )
                # No date, so that the same figure is the same file.
                figure.savefig(Path(part, f"{name}.pdf"), metadata={"CreationDate": None})
                figure.savefig(Path(part, f"{name}.png"), dpi=200)
                for file in sorted(Path(part).iterdir()):
                    print(file.replace(folder / file.name))
        except OSError as error:
            raise InputError(f"out: given {folder}: {one_line(error)}") from error


def main_of(
    command: cli.Command, numbers: Callable[..., Tables], draw: Callable[[Tables], Figure]
) -> Callable[[Sequence[str]], None]:
    """The `main` of a figure's command; `numbers` takes all of its options but `out`."""

    def main(arguments: Sequence[str]) -> None:
        options = command.parse(arguments)
        folder = check_folder(options.pop("out"))
        set_jax()
        save(folder, command.name.rpartition(".")[2], numbers(**options), draw)

    return main


def curves(table: pd.DataFrame, *columns: str) -> list[tuple[list[Any], pd.DataFrame]]:
    """(the values of `columns`, the rows that have them), in the order of the table."""
    parts = table.groupby(list(columns), sort=False, dropna=False)
    return [([part[column].iloc[0] for column in columns], part) for _, part in parts]


def zero_line(axes: Axes) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--", zorder=0)


def clip(axes: Axes, low: float, high: float, changes: Any) -> None:
    """Shows `changes` from `low` to `high` at most: they grow with the square of the rate."""
    least, most = float(np.nanmin(changes)), float(np.nanmax(changes))
    margin = 0.05 * (min(high, most) - max(low, least) or 20.0)
    axes.set_ylim(max(low, least) - margin, min(high, most) + margin)
