"""`python -m analysis.report [study=NAME] [out=FOLDER] [tracking.uri=URI]`: the numbers of a study.

Reads what MLflow has of the study's trials and of what was retrained, and writes report.md,
report.csv, report.tex (the tables) and report.html (one page that needs nothing else, with figures)
into `out`, by default out/report-NAME. They are attached to the study's run in MLflow, too.
Without `study` it is the newest one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import plotly.offline
from markupsafe import Markup

from analysis import runs, selection, stats, store as stores
from analysis.report import panels, tables
from analysis.report.panels import retraining
from analysis.runs import COMPLETE, FAILED
from analysis.selection import METRICS, Choice
from analysis.store import Refused, Store, StudyRun
from disinhib import errors, rules
from disinhib.errors import one_line
from disinhib.tuning.provenance import masked

USAGE = "python -m analysis.report [study=NAME] [out=FOLDER] [tracking.uri=URI]"
TEMPLATE = Path(__file__).with_name("report.html.j2")
ARTIFACTS = "report"  # folder in the study's run


class Report(NamedTuple):
    """All that a report says, before it is written down."""

    study: StudyRun
    metric: str
    mode: str
    trials: pd.DataFrame
    retrained: pd.DataFrame
    curves: pd.DataFrame
    results: pd.DataFrame  # tables.results
    search: pd.DataFrame  # tables.search
    warnings: list[str]


def read(store: Store, study: StudyRun) -> Report:
    metric = study.options["metric"]
    trials, dropped = runs.trials(store, study)
    retrained, unfinished = runs.retrained(store, study)
    if trials.empty and retrained.empty:
        raise Refused(f"study {study.name}: nothing has ended yet that could be reported")
    complete = [] if retrained.empty else list(retrained["run_id"])
    return Report(
        study,
        metric,
        METRICS[metric],
        trials,
        retrained,
        runs.curves(store, complete, tuple(retraining.CURVES)),
        tables.results(retrained, trials, metric),
        tables.search(trials, METRICS[metric]) if len(trials) else pd.DataFrame(),
        [
            *(f"left out: {why}" for why in (*dropped, *unfinished)),
            *_warnings(study, trials, retrained),
        ],
    )


def _warnings(study: StudyRun, trials: pd.DataFrame, retrained: pd.DataFrame) -> list[str]:
    lines = []
    again = retrained.to_dict("records")
    if len(trials):
        chosen = {row["of_run"] for row in again}
        choices = [
            Choice({selection.TRAINER: row["rule"]}, 1, row, [], [])
            for row in trials.to_dict("records")
            if row["run_id"] in chosen
        ]
        lines += selection.warnings(trials, choices, [selection.TRAINER], study.space)
    for row in again:
        if row["state"] == FAILED:
            lines.append(f"{_called(row)}, seed {row['seed']} diverged: {row['reason']}")
        elif row["flag"]:
            lines.append(f"{_called(row)}, seed {row['seed']}: {row['flag']}")
    if len({row["code"] for row in again}) > 1:
        lines.append("retrained seeds were trained by different versions of the code")
    return lines


def _called(row: Any) -> str:
    """A configuration in words; of a row of `runs.retrained`."""
    return runs.called(row["rule"], row["averaged"], row["depth"], row["dataset"], row["trial"])


def datasets(report: Report) -> list[tuple[str, pd.DataFrame, str]]:
    """(data set, its table as texts, what has to be known to read it)."""
    if report.results.empty:
        return []
    found = []
    for dataset in dict.fromkeys(report.results["dataset"]):
        own = pd.DataFrame(report.results[report.results["dataset"] == dataset])
        found.append((dataset, tables.shown(own), _note(own)))
    return found


def _note(numbers: pd.DataFrame) -> str:
    """What a reader has to know of the table, and how far its intervals can be trusted."""
    sentences = [
        "Per cent, mean ± standard deviation over n seeds that no search had seen; the test set was"
        " evaluated once, after the last epoch."
    ]
    rows = numbers.to_dict("records")
    pairs = {row["bp_paired"] for row in rows if not math.isnan(row["bp_mean"])}
    if pairs:
        how = {True: "seed by seed", False: "between unpaired seeds"}
        words = " or ".join(how[pair] for pair in sorted(pairs, reverse=True))
        sentences.append(f"Differences to bp (of the same data, depth and epochs) are {words}.")
    if not all(math.isnan(row["tuned"]) for row in rows):
        sentences.append(
            "“tuned” is the selected trial's score in the search: what is lost from it to fresh"
            " seeds is what was selected by luck."
        )
    low = stats.low_coverage(min(row["n"] for row in rows))
    sentences.append(
        "Intervals are bootstrapped (10,000 resamples, expanded percentiles)"
        + (f"; {low}." if low else ".")
    )
    if any(row["diverged"] for row in rows):
        sentences.append("Diverged seeds are in no mean.")
    if any(row["flagged"] for row in rows):
        sentences.append(
            "Flagged: seeds at whose end the integrated dynamics do not bear out the steady states."
        )
    return " ".join(sentences)


def summary(report: Report) -> list[str]:
    """The table in sentences, best first."""
    lines = []
    rows = report.results.to_dict("records")
    for row in sorted(rows, key=lambda row: row["test_mean"] if row["n"] else 0, reverse=True):
        if row["n"] == 0:
            lines.append(f"{_named(row)}: no seed ran its whole budget.")
            continue
        line = f"{_named(row)}: {row['test_mean']:.2f} % of test images right (n = {row['n']})"
        if not pd.isna(row["bp_mean"]):
            words = "above" if row["bp_mean"] >= 0 else "below"
            line += f", {abs(row['bp_mean']):.2f} points {words} bp"
        lines.append(line + ".")
    return lines


def _named(row: Any) -> str:
    return _called({**row, "averaged": row["feedback"] == tables.FEEDBACK["true"]})


SEARCH_NOTE = (
    "What each rule got of the search. Epochs are counted over all seeds of a trial; hours are its"
    " trials' one after another. Pruned trials were stopped by the scheduler, failed ones"
    " diverged or raised an error; only complete ones compete."
)


def as_markdown(report: Report) -> str:
    parts = [f"# {report.study.name}\n"]
    for dataset, table, note in datasets(report):
        parts += [f"## Test accuracy on {dataset}\n", tables.markdown(table), note + "\n"]
    if len(report.search):
        shown = tables.markdown(tables.shown_search(report.search))
        parts += ["## What the search cost\n", shown, SEARCH_NOTE + "\n"]
    if report.warnings:
        parts += ["## Warnings\n", "".join(f"- {line}\n" for line in report.warnings)]
    return "\n".join(parts)


def as_csv(report: Report) -> str:
    """The numbers of `tables.results`, unrounded; of a study of which nothing was retrained those
    of the search."""
    numbers = report.search if report.results.empty else report.results
    return numbers.to_csv(index=False, lineterminator="\n")


def as_latex(report: Report) -> str:
    parts = [f"% {report.study.name}; needs \\usepackage{{booktabs}}\n"]
    for dataset, table, note in datasets(report):
        parts.append(f"% Test accuracy on {dataset}. {note}\n{tables.latex(table)}")
    if len(report.search):
        shown = tables.latex(tables.shown_search(report.search))
        parts.append(f"% {SEARCH_NOTE}\n{shown}")
    return "\n".join(parts)


def as_html(report: Report) -> str:
    material = panels.Material(
        metric=report.metric,
        mode=report.mode,
        space=report.study.space,
        trials=report.trials,
        retrained=report.retrained,
        curves=report.curves,
        labels={row["configuration"]: _called(row) for row in report.retrained.to_dict("records")},
    )
    # Not by tables' names alone: with autoescape on, all but what is marked safe is escaped.
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text("utf-8"))
    search = None
    if len(report.search):
        table = Markup(tables.html(tables.shown_search(report.search)))
        search = {"title": "What the search cost", "note": SEARCH_NOTE, "html": table}
    return template.render(
        title=report.study.name,
        subtitle=_subtitle(report),
        rules=[(name, rules.words(name)) for name in rules.COMPETITORS if name in _rules(report)],
        summary=summary(report),
        tables=[
            {"title": f"Test accuracy on {name}", "note": note, "html": Markup(tables.html(table))}
            for name, table, note in datasets(report)
        ],
        search=search,
        warnings=report.warnings,
        panels=[
            {
                "id": panel.id,
                "title": panel.title,
                "sentence": panel.sentence,
                "note": panel.note,
                "divs": [Markup(panels.html(figure)) for figure in panel.figures],
            }
            for panel in panels.panels(material)
        ],
        provenance=_provenance(report),
        provenance_json=json.dumps(report.study.provenance, indent=1),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )


def _rules(report: Report) -> set[str]:
    return {*report.trials["rule"], *(report.retrained["rule"] if len(report.retrained) else ())}


def _subtitle(report: Report) -> str:
    told = []
    if len(report.trials):
        complete = list(report.trials["state"]).count(COMPLETE)
        told.append(f"{len(report.trials)} trials, {complete} of them complete")
    if len(report.retrained):
        told.append(f"{len(report.retrained)} retrained seeds")
    return f"{', '.join(told)}; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _provenance(report: Report) -> list[tuple[str, str]]:
    """Where the numbers come from: (name, value)."""
    study = report.study
    tags, made = study.run.data.tags, study.provenance
    code = made["code"]
    again = report.retrained.to_dict("records")
    listed = lambda name: ", ".join(sorted({str(row[name]) for row in again if row[name]}))
    data = {(made["data"]["name"], made["data"]["sha256"])}
    data |= {(row["dataset"], row["data"]) for row in again}
    return [
        ("study", f"{study.name} ({study.id})"),
        ("command", tags.get("command", "")),
        ("report", f"python -m analysis.report study={study.name}"),
        ("code", f"disinhib {code['version']}, commit {code['commit'] or 'unknown'}"
         + (", with changes that are not committed" if code["diff"] else "")),
        ("packages", ", ".join(f"{n} {v}" for n, v in made["packages"].items() if v)),
        ("python", made["python"]),
        ("machine", f"{made['machine']['cpu']}, {made['machine']['cores']} cores,"
         f" {made['machine']['system']}"),
        ("data", ", ".join(f"{name}, SHA-256 {sha256}" for name, sha256 in sorted(data))),
        *([("retrained on", f"{listed('device')} ({listed('host')})"),
           ("retraining's code", f"SHA-256 of its files begins with {listed('code')}")]
          if again else []),
    ]  # fmt: skip


FORMS = {
    "report.md": as_markdown,
    "report.csv": as_csv,
    "report.tex": as_latex,
    "report.html": as_html,
}


def main(arguments: Sequence[str]) -> int:
    alone, options = stores.arguments(
        arguments, USAGE, {"study": None, "out": None, "tracking.uri": None}
    )
    if alone:
        raise Refused(f"given {' '.join(alone)}, needed is {USAGE}")
    store = stores.connect(stores.address(options["tracking.uri"]))
    study = stores.find_study(store, options["study"])
    folder = Path(options["out"] or f"out/report-{study.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"out: given {folder}, allowed is a folder ({error.strerror})") from error
    report = read(store, study)
    for file, form in FORMS.items():
        runs.write(folder / file, form(report))
    print(as_markdown(report))
    print(f"written: {', '.join(str(folder / file) for file in FORMS)}")
    try:
        for file in FORMS:
            store.client.log_artifact(study.run.info.run_id, str(folder / file), ARTIFACTS)
    except Exception as error:  # MLflow's stores of artifacts raise their own kinds
        print(f"error: MLflow did not take the report: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"attached: {ARTIFACTS}/ of run {study.run.info.run_id} in {masked(store.uri)}")
    return 0


if __name__ == "__main__":
    errors.run(main, __doc__)
