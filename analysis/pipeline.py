"""`python -m analysis.pipeline [seeds=3] [option=value ...]`: a study, to its report.

    tune       runs the study, as `python tune_main.py [option=value ...]` does
    select     selects the best trial of each rule, by validation data
    retrain    trains the selected trials over `seeds` fresh seeds and evaluates the test set
    report     writes tables and plots

Each step continues with the study and the MLflow store of the step before, whatever `out_dir`,
`study` and `tracking.uri` are. If interrupted, run it again with study=NAME resume=true.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from disinhib import cli
from disinhib.commands import tool
from disinhib.errors import InputError, masked
from disinhib.tuning import study as studies
from disinhib.tuning.engine import Finished
from disinhib.tuning.options import Study, compose, store_of

SEEDS = "seeds=3"
# Options of a study that also apply to its retraining.
HANDED_ON = ("cluster=", "cluster.", "device=", "gpu_id=", "dataset.path=")


class Stage(NamedTuple):
    module: str
    arguments: list[str]  # of its `main`


def main(arguments: list[str]) -> int:
    """Returns the exit code of the first stage that fails, or 0."""
    words, arguments = cli.split(arguments, __doc__ or "")
    if words:
        raise InputError(f"{words[0]}: not understood, allowed is option=value")
    seeds = [text for text in arguments if text.startswith("seeds=")]
    if seeds:  # what retraining would refuse after the whole search
        import_module("analysis.configurations").checked_settings(seeds)
    study = compose([text for text in arguments if text not in seeds])
    code, finished = studies.carry_out(study)
    if code or finished is None:
        return code
    if finished.undelivered or finished.run_id is None:
        print("error: MLflow lacks records of the study: nothing is selected", file=sys.stderr)
        return 1
    for module, given in stages(study, finished, seeds or [SEEDS]):
        print(masked(f"\n{shlex.join([tool('python'), '-m', module, *given])}"), flush=True)
        if code := _main_of(module)(given):
            return code
    return 0


def stages(study: Study, finished: Finished, seeds: Sequence[str]) -> list[Stage]:
    """The stages after `study` has ended.

    (Studies in one store may have the same name if their `out_dir` differs.)
    """
    job, run_id = finished.job, finished.run_id
    selected, here = _shown(job.folder / "selected.yaml"), Path.cwd() / "out"
    store = [f"tracking.uri={finished.tracking_uri}"]
    if finished.tracking_uri == store_of(None, here)[1]:  # it is the default of every command
        store = []
    where = [text for text in study.overrides if text.startswith(HANDED_ON)]
    out = [] if job.out_dir == here else [f"out_dir={_shown(job.out_dir)}"]
    report = f"out={_shown(job.out_dir / f'report-{job.name}')}"
    return [
        Stage("analysis.selection", [f"study={run_id}", f"selected={selected}", *store]),
        Stage("analysis.retrain", [selected, *seeds, *out, *store, *where]),
        Stage("analysis.report", [f"study={run_id}", report, *store]),
    ]


def _shown(path: Path) -> str:
    """A path, from the current folder if it is in it, so that commands are short and mean the same
    when that is moved; whole if it could be taken for an option."""
    here = Path.cwd()
    short = str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
    return str(path) if "=" in short else short


def _main_of(module: str) -> Callable[[list[str]], int]:
    # Imported here, because the report's libraries take seconds, and a refusal should take none.
    imported = import_module(module)
    return getattr(imported, "main", None) or import_module(f"{module}.__main__").main


if __name__ == "__main__":
    cli.run(main)
