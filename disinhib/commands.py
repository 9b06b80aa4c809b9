"""`disinhib VERB ...`: every command under one name, and commands as this environment can run them.

A verb runs a module as `python -m MODULE` does, and nothing is imported before one is chosen.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from disinhib import cli
from disinhib.errors import InputError, nearest

STUDY_SCRIPT = Path(__file__).resolve().parents[1] / "tune_main.py"


class Verb(NamedTuple):
    module: str
    words: str  # what it does


VERBS = {
    "train": Verb("disinhib", "one training run"),
    "tune": Verb("tune_main", "one study: many runs of one search space"),
    "select": Verb("analysis.selection", "the best trials of a study, by validation data"),
    "retrain": Verb("analysis.retrain", "what was selected, or a grid, over fresh seeds"),
    "report": Verb("analysis.report", "a study's tables and plots"),
    "study": Verb("analysis.pipeline", "tune, select, retrain and report in a row"),
    "runs": Verb("analysis.runs", "the trials of a study as one table"),
    "replay": Verb("analysis.replay", "a trial, trained again from its MLflow run"),
    "figure fig3": Verb("analysis.figures.fig3", "the paper's Figure 3"),
    "figure fig4": Verb("analysis.figures.fig4", "the paper's Figure 4"),
    "figure figS1": Verb("analysis.figures.figS1", "the paper's Supplementary Figure S1"),
    "figure figS2": Verb("analysis.figures.figS2", "the paper's Supplementary Figure S2"),
    "figure trajectory": Verb("analysis.figures.trajectory", "a trained network in time"),
}
FIGURE = "figure"  # the verb of two words


def main(arguments: list[str]) -> None:
    """Runs the verb that `arguments` begin with. Raises InputError if there is no such verb."""
    if not {*arguments[:2]} - {FIGURE, "-h", "--help"}:
        print(usage())
        return
    words = 2 if arguments[0] == FIGURE else 1
    verb = " ".join(arguments[:words])
    if verb not in VERBS:
        raise InputError(
            f"{verb}: unknown verb, allowed is one of {', '.join(VERBS)}{nearest(verb, VERBS)}"
        )
    sys.argv[1:] = arguments[words:]
    runpy.run_module(VERBS[verb].module, run_name="__main__", alter_sys=True)


def usage() -> str:
    """All verbs, in one screen."""
    width = max(map(len, VERBS))
    verbs = [f"  disinhib {name:{width}}  {verb.words}" for name, verb in VERBS.items()]
    return "\n".join([*verbs, "", "disinhib VERB --help shows the options of a verb."])


def run() -> None:
    """The console script `disinhib`."""
    cli.run(main)


def tool(name: str) -> str:
    """The environment's command `name`, as short as it can be typed from here."""
    path = Path(sys.executable).parent / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def tune_words(*words: str) -> list[str]:
    """The words of a command that runs a study, as it can be typed from here: also where the
    package is installed, and no tune_main.py lies about."""
    name = STUDY_SCRIPT.name
    script = [name] if Path(name).resolve() == STUDY_SCRIPT else ["-m", STUDY_SCRIPT.stem]
    return [tool("python"), *script, *words]
