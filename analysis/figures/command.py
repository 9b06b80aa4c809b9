"""What the figures' commands share: their options, how they look, and how they are saved."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disinhib.errors import InputError, one_line

Tables = Mapping[str, pd.DataFrame]  # by the ending of the file's name: "" for the main one
LOOKS: dict[Any, Any] = {
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
# Okabe and Ito's, which colour-blind readers can tell apart
ORANGE, BLUE, GREEN, VERMILION, SKY = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9"
GREY, BLACK = "#8C8C8C", "#000000"
SHADES = ("#9ECAE1", "#6BAED6", "#3182BD", "#08519C")  # of something that grows


class Parser(argparse.ArgumentParser):
    """Refuses as every command here does: in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def parser(name: str, help: str | None) -> Parser:
    """Options of every figure: `--out FOLDER` and `--quick`."""
    made = Parser(
        prog=f"python -m analysis.figures.{name}",
        description=(help or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Path("out/figures")
    made.add_argument("--out", type=Path, default=default, help=f"folder to write in ({default})")
    made.add_argument("--quick", action="store_true", help="fewer points, to see it work")
    return made


def check_folder(folder: Path) -> None:
    """Makes `folder`. Raises InputError if it cannot be, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--out: given {folder}, allowed is a folder that can be written ({error.strerror})"
        ) from error


def save(folder: Path, name: str, tables: Tables, draw: Callable[[Tables], Figure]) -> None:
    """Writes `name`.pdf, .png and a .csv for each table, each whole or not at all, and says so.

    Raises InputError if they cannot be written.
    """
    with mpl.rc_context(LOOKS):
        figure = draw(tables)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
                for ending, table in tables.items():
                    table.to_csv(
                        Path(part, f"{name}{ending}.csv"), index=False, float_format="%.6g"
                    )
                # Without its date, the same figure is the same file.
                figure.savefig(Path(part, f"{name}.pdf"), metadata={"CreationDate": None})
                figure.savefig(Path(part, f"{name}.png"), dpi=200)
                for file in sorted(Path(part).iterdir()):
                    print(file.replace(folder / file.name))
        except OSError as error:
            raise InputError(f"--out: given {folder}: {one_line(error)}") from error


def main(
    name: str,
    help: str | None,
    numbers: Callable[[bool], Tables],
    draw: Callable[[Tables], Figure],
    given: Sequence[str],
) -> None:
    """The command of a figure that has no options of its own."""
    options = parser(name, help).parse_args(given)
    check_folder(options.out)
    save(options.out, name, numbers(options.quick), draw)


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
