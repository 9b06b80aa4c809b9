"""`python tune_main.py [option=value ...]`: one study that searches (options: conf/study.yaml).

compose -> check -> begin, or go on -> run -> tell. Everything that can be wrong with the input is
found before a trial is started or anything is written; such an error is one line (ConfigError).
"""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial

from ray import tune
from rich.console import Console

from disinhib import hydra_config
from disinhib.checks import in_hydra
from disinhib.commands import tool, tune_words
from disinhib.tuning import engine, manifest, plan, progress
from disinhib.tuning.early_stopping import EARLY_STOPPING
from disinhib.tuning.engine import Finished, Job
from disinhib.tuning.loop import StudyStopped, from_search
from disinhib.tuning.options import Study, compose, kept
from disinhib.tuning.suggest import SAMPLERS
from disinhib.tuning.worker import TrainingTrial


def main(arguments: list[str]) -> int:
    """Runs the study that the command line asks for.

    Returns the exit code: 0, 1 if no trial was completed or the study could not go on, 130 if it
    was interrupted.
    """
    if {"-h", "--help"} & {*arguments}:
        print(usage())
        return 0
    return carry_out(compose(arguments))[0]


def usage() -> str:
    """Every option of a study: conf/study.yaml, and what its groups offer."""
    lines = [(hydra_config.CONFIGURATIONS / "study.yaml").read_text()]
    for group, table in (("searcher", SAMPLERS), ("scheduler", EARLY_STOPPING)):
        for name, entry in table.items():
            lines.append(f"{group}={name}: {entry.words}")
            lines += [
                f"    {group}.{option.name}={in_hydra(option.default)}  {option.words}"
                for option in entry.options
            ]
    return "\n".join(lines)


def carry_out(study: Study) -> tuple[int, Finished | None]:
    """Runs `study`, or plans it, and prints what comes of it: the exit code of `main`, and what
    the study left, if it ran and nothing kept it from going on."""
    console = Console()
    if study.plan:
        plan.run(study, console)
        return 0, None
    try:
        finished = run(study, console)
    except Exception as error:
        obstacle = _full_disk(error)
        if obstacle is None:
            raise
        print(f"error: {obstacle}: make room, then go on: {resume_command(study)}", file=sys.stderr)
        return 1, None
    summary(finished, study, console)
    if not finished.whole:
        return 130, finished
    return 0 if progress.best(finished.records) else 1, finished


def run(
    study: Study,
    console: Console,
    trainable: type[tune.Trainable] = TrainingTrial,
    callbacks: Sequence[tune.Callback] = (),
) -> Finished:
    """Runs every trial of `study`, or those that are left of it. As `engine.run`."""
    return engine.run(job(study), console, trainable, callbacks)


def job(study: Study) -> Job:
    """The search that `study` asks for.

    Raises ConfigError if it cannot be or, resumed, is not what it was.
    """
    begun = manifest.of_resumed(study) if study.resume else manifest.of_search(study)
    return Job(
        name=study.name,
        out_dir=study.out_dir,
        resume=study.resume,
        manifest=begun,
        kept=kept(study),
        command=shlex.join(["python", "tune_main.py", *study.overrides]),
        metric=study.metric,
        source=from_search(manifest.proposer(study, begun), study.trials, study.batch),
        stops=study.stops,
        trials=lambda records: study.trials,
        cluster=study.cluster,
        checkpoints=study.checkpoints,
        tracking=study.tracking,
        optuna=True,
        storage=study.searcher["storage"],
        keep_best=study.checkpoints["keep_best"],
    )


def _full_disk(error: BaseException | None) -> str | None:
    """What the system said, if it is for want of space that the study could not go on."""
    while error is not None:
        if isinstance(error, StudyStopped):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return " ".join(map(str, filter(None, (error.strerror, error.filename))))
        error = error.__cause__ or error.__context__
    return None


def resume_command(study: Study) -> str:
    out = [] if study.options["out_dir"] == "out" else [f"out_dir={study.options['out_dir']}"]
    return shlex.join(tune_words(f"study={study.name}", *out, "resume=true"))


def summary(finished: Finished, study: Study, console: Console) -> None:
    """Prints the leaderboard and the commands that go on from here."""
    records = finished.records
    say: Callable[[str], None] = partial(
        console.print, soft_wrap=True, highlight=False, markup=False
    )
    counts = progress.tally(records)._asdict().items()
    states = ", ".join(f"{n} {state}" for state, n in counts if n)
    clock = progress.clock(finished.seconds)
    say(f"\nstudy {study.name}: {len(records)} trials in {clock}: {states}")
    console.print(progress.leaderboard(records, study.metric))
    for line in progress.failures(records):
        say(line)
    for name, count in finished.undelivered.items():
        say(f"{name} has not taken {count} records: resume the study when it answers")
    uri = shlex.quote(finished.tracking_uri)
    ui = uri if uri.startswith("http") else f"{tool('mlflow')} ui --backend-store-uri {uri}"
    address = "" if uri.startswith("http") else "   (then http://127.0.0.1:5000)"
    say(f"\nall trials:  {ui}{address}")
    if finished.undelivered or not finished.whole:
        say(f"go on:       {resume_command(study)}")
    if top := progress.best(records):
        say(f"best trial:  {tool('python')} {top.config['command'].removeprefix('python ')}")
