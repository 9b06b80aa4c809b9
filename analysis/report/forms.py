"""The four forms of a report. All tables in them are texts (`tables.shown`), the same in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jinja2
import pandas as pd
import plotly.offline
from markupsafe import Markup

from analysis.report import contents, panels
from analysis.report.contents import Report
from analysis.report.tables import NOTHING

TEMPLATE = Path(__file__).with_name("report.html.j2")


def as_markdown(report: Report) -> str:
    parts = [f"# {report.study.name}\n"]
    for section in contents.sections(report):
        parts += [f"## {section.title}\n", markdown(section.table), section.note + "\n"]
    if report.warnings:
        parts += ["## Warnings\n", "".join(f"- {line}\n" for line in report.warnings)]
    return "\n".join(parts)


def as_csv(report: Report) -> str:
    """The numbers of `tables.results`, unrounded, or of the search if nothing was retrained."""
    numbers = report.search if report.results.empty else report.results
    return numbers.to_csv(index=False, lineterminator="\n")


def as_latex(report: Report) -> str:
    parts = [f"% {report.study.name}; needs \\usepackage{{booktabs}}\n"]
    for section in contents.sections(report):
        parts.append(f"% {section.title}. {section.note}\n{latex(section.table, section.prose)}")
    return "\n".join(parts)


def as_html(report: Report) -> str:
    """One page that needs no other file."""
    sections = contents.sections(report)
    return page(
        title=report.study.name,
        subtitle=contents.subtitle(report),
        rules=contents.rules(report),
        summary=contents.summary(report),
        tables=[section for section in sections if not section.id],
        parts=[section for section in sections if section.id],
        warnings=report.warnings,
        panels=panels.panels(report.data),
        provenance=contents.provenance(report),
        provenance_json=json.dumps(report.study.provenance, indent=1),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )


def page(**context: object) -> str:
    """The template, filled in. It escapes everything that is not Markup."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plot"] = lambda drawing: Markup(panels.html(drawing))
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(**context)


FORMS: dict[str, Callable[[Report], str]] = {
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


def latex(table: pd.DataFrame, prose: bool = False) -> str:
    """A tabular for the package booktabs; with `prose` its last column is as wide as the page has
    room for."""
    signs = str.maketrans({"±": r"$\pm$", "−": "$-$", NOTHING: "--"})
    columns = "l" * (table.shape[1] - prose) + r"p{0.75\linewidth}" * prose
    return table.to_latex(index=False, escape=True, column_format=columns).translate(signs)
