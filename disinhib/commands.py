"""`disinhib VERB ...`: every command under one name, and how to type commands in this environment.

A verb runs its module as `python -m MODULE` does; no module is imported before its verb is given.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from disinhib import cli
from disinhib.errors import InputError, masked, nearest

STUDY_SCRIPT = Path(__file__).resolve().parents[1] / "tune_main.py"


class Verb(NamedTuple):
    module: str
    words: str  # for the list of verbs


VERBS = {
    "train": Verb("disinhib", "train one network"),
    "tune": Verb("tune_main", "run a study: trials of a search space"),
    "select": Verb("analysis.selection", "select the best trials, by validation data"),
    "retrain": Verb("analysis.retrain", "train selected trials, or a grid, over fresh seeds"),
    "report": Verb("analysis.report", "write a study's tables and plots"),
    "study": Verb("analysis.pipeline", "tune, select, retrain and report, in this order"),
    "studies": Verb("analysis.studies", "list studies; steer, rename, delete, export one"),
    "runs": Verb("analysis.runs", "write a study's trials and curves as tables"),
    "replay": Verb("analysis.replay", "train a trial again, and compare"),
    "figure fig3": Verb("analysis.figures.fig3", "draw the paper's Figure 3"),
    "figure fig4": Verb("analysis.figures.fig4", "draw the paper's Figure 4"),
    "figure figS1": Verb("analysis.figures.figS1", "draw the paper's Supplementary Figure S1"),
    "figure figS2": Verb("analysis.figures.figS2", "draw the paper's Supplementary Figure S2"),
    "figure trajectory": Verb("analysis.figures.trajectory", "draw a trained network in time"),
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
    """The path of the environment's command `name`, relative to the current folder if possible."""
    path = Path(sys.executable).parent / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def studies_command(verb: str, name: str, out_dir: Path, *more: str) -> str:
    """The command that does something with a study in `out_dir`."""
    where = [] if out_dir == Path("out").absolute() else [f"out_dir={out_dir}"]
    words = [tool("python"), "-m", VERBS["studies"].module, verb, name, *more, *where]
    return shlex.join(words)


def tune_words(*words: str) -> list[str]:
    """The words of a command that runs a study: `tune_main.py` if it is in the current folder, else
    the installed module."""
    name = STUDY_SCRIPT.name
    script = [name] if Path(name).resolve() == STUDY_SCRIPT else ["-m", STUDY_SCRIPT.stem]
    return [tool("python"), *script, *words]


def in_browser(label: str, address: str, page: str) -> list[str]:
    """Lines that say how to see `page` of the MLflow store at `address`: a server shows it; for any
    other store, one has to be started."""
    if address.startswith("http"):
        return [f"{label:12} {masked(address).rstrip('/')}{page}"]
    start = f"{tool('mlflow')} ui --backend-store-uri {shlex.quote(masked(address))}"
    return [f"{label:12} {start}", f"{'':12} then http://127.0.0.1:5000{page}"]
