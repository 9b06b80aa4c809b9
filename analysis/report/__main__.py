"""`python -m analysis.report [study=NAME] [out=FOLDER]`: the numbers of a study, or of several.

Reads the study's trials and its retrained seeds from MLflow and writes their tables, report.md,
report.csv and report.tex, and report.html: one self-contained page with tables and figures; and
checklist.md: what reproducibility checklists ask, filled in from the study's record. All of them
are attached to the study's run in MLflow, too.

`study=NAME,NAME` puts studies side by side: what differs between them, the best of each rule, and
the differences in test accuracy. Those files are not attached, as they belong to several studies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis import runs, store as stores
from analysis.report import checklist, comparison, contents, forms
from analysis.store import Refused, Store, StudyRun
from disinhib import cli
from disinhib.checks import OPTIONAL_TEXT, Option
from disinhib.errors import masked, one_line
from disinhib.tuning import mlflow_connection, mlflow_settings

STUDY = stores.STUDY._replace(words=f"{stores.STUDY.words}; several, with commas: their comparison")
OUT = Option("out", None, OPTIONAL_TEXT, "folder to write to; null: out/report-NAME")
COMMAND = cli.Command("analysis.report", __doc__, (STUDY, stores.TRACKING, OUT))
ARTIFACTS = "report"  # folder in the study's run


@mlflow_settings.requests()
def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 if MLflow did not take the files."""
    options = COMMAND.parse(arguments)
    store = stores.connect(stores.address(options["tracking.uri"]))
    studies = stores.find_studies(store, options["study"])
    for study in studies:
        print(stores.said(store, study), flush=True)
        stores.load_plugins(study.provenance, beside=len(studies) > 1)
        runs.refuse_missing(store, study)
        runs.refuse_missing_seeds(store, study)
    comparison.refuse_unlike(studies)
    folder = Path(options["out"] or f"out/report-{','.join(study.name for study in studies)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"out: given {folder}, allowed is a folder ({error.strerror})") from error
    reports = [contents.read(store, study) for study in studies]
    page = contents.page(reports[0]) if len(reports) == 1 else comparison.page(reports)
    files = {folder / name: form(page) for name, form in forms.FORMS.items()}
    if len(reports) == 1:
        files[folder / checklist.FILE] = checklist.text(reports[0])
    for file, text in files.items():
        runs.write(file, text)
    print(forms.as_markdown(page))
    print(f"written: {', '.join(map(str, files))}")
    return 0 if len(studies) > 1 else _attach(store, studies[0], files)


def _attach(store: Store, study: StudyRun, files: Iterable[Path]) -> int:
    """Gives the files to the study's run in MLflow; returns the exit code."""
    try:
        if (database := mlflow_connection.sqlite_file(store.uri)) is not None:
            mlflow_connection.keep_artifacts_beside(database)
        for file in files:
            store.client.log_artifact(study.run.info.run_id, str(file), ARTIFACTS)
    except Exception as error:  # MLflow's stores of artifacts raise their own kinds
        print(f"error: MLflow did not take the report: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"attached: {ARTIFACTS}/ of run {study.run.info.run_id} in {masked(store.uri)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
