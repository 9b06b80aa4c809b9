"""The four forms of a report. All tables in them are texts (`tables.shown`), the same in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jinja2
import pandas as pd
import plotly.offline
from markupsafe import Markup

from analysis.report import panels
from analysis.report.contents import Page
from analysis.report.tables import NOTHING

TEMPLATE = Path(__file__).with_name("report.html.j2")


def as_markdown(page: Page) -> str:
    parts = [f"# {page.title}\n"]
    for section in page.sections:
        parts += [f"## {section.title}\n", markdown(section.table), section.note + "\n"]
    if page.warnings:
        parts += ["## Warnings\n", "".join(f"- {line}\n" for line in page.warnings)]
    return "\n".join(parts)


def as_csv(page: Page) -> str:
    """Unrounded: what was retrained, or the search if nothing was."""
    return page.numbers.to_csv(index=False, lineterminator="\n")


def as_latex(page: Page) -> str:
    parts = [f"% {page.title}; needs \\usepackage{{booktabs}}\n"]
    for section in page.sections:
        parts.append(f"% {section.title}. {section.note}\n{latex(section.table, section.prose)}")
    return "\n".join(parts)


def as_html(page: Page) -> str:
    """One file that needs no other."""
    return filled_in(
        title=page.title,
        subtitle=page.subtitle,
        rules=page.rules,
        summary=page.summary,
        tables=[section for section in page.sections if not section.id],
        parts=[section for section in page.sections if section.id],
        warnings=page.warnings,
        panels=page.panels(),
        provenance=page.provenance,
        provenance_json=json.dumps(page.record, indent=1),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )


def filled_in(**context: object) -> str:
    """The template, filled in. It escapes everything that is not Markup."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plot"] = lambda drawing: Markup(panels.html(drawing))
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(**context)


FORMS: dict[str, Callable[[Page], str]] = {
    "report.md": as_markdown,
    "report.csv": as_csv,
    "report.tex": as_latex,
    "report.html": as_html,
}


def markdown(table: pd.DataFrame) -> str:
    """A pipe table."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def latex(table: pd.DataFrame, prose: int = 0) -> str:
    """A tabular for the package booktabs; its last `prose` columns share the width that the page
    has room for."""
    signs = str.maketrans({"±": r"$\pm$", "−": "$-$", NOTHING: "--"})
    wide = rf"p{{{0.75 / max(prose, 1):.3g}\linewidth}}"
    columns = "l" * (table.shape[1] - prose) + wide * prose
    return table.to_latex(index=False, escape=True, column_format=columns).translate(signs)
