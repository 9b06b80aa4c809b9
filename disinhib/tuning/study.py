"""`python tune_main.py [option=value ...]`: a study that searches (options: conf/study.yaml).

Composes and checks the options, begins or resumes the study, runs it and prints its result. Invalid
input is refused, in one line (ConfigError), before a trial starts or anything is written.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

from ray import tune
from rich.console import Console
from rich.text import Text

from disinhib import hydra_config, process
from disinhib.checks import in_hydra
from disinhib.commands import in_browser, tool, tune_words
from disinhib.tuning import engine, manifest, plan, progress, provenance, resume
from disinhib.tuning.early_stopping import EARLY_STOPPING
from disinhib.tuning.engine import Finished, Job
from disinhib.tuning.loop import from_search
from disinhib.tuning.options import Study, compose, kept
from disinhib.tuning.suggest import SAMPLERS
from disinhib.tuning.worker import TrainingTrial


def main(arguments: list[str]) -> int:
    """Runs the study that the command line describes.

    Returns the exit code: 0, 1 if no trial is complete or the study cannot continue, 130 if it was
    interrupted.
    """
    if {"-h", "--help", "help=true"} & {*arguments}:
        print(usage())
        return 0
    return carry_out(compose(arguments))[0]


def usage() -> str:
    """Every option of a study: conf/study.yaml, then the options of each searcher and scheduler."""
    lines = [(hydra_config.CONFIGURATIONS / "study.yaml").read_text("utf-8")]
    for group, table in (("searcher", SAMPLERS), ("scheduler", EARLY_STOPPING)):
        for name, entry in table.items():
            lines.append(f"{group}={name}: {entry.words}")
            lines += [
                f"    {group}.{option.name}={in_hydra(option.default)}  {option.words}"
                for option in entry.options
            ]
    return "\n".join(lines)


def carry_out(study: Study) -> tuple[int, Finished | None]:
    """Runs or plans `study` and prints the result. Returns the exit code of `main`, and the
    finished study unless it was only planned or could not continue."""
    console = Console(file=sys.stdout)
    try:
        if study.plan:
            plan.run(study, console)
            return 0, None
        tell = lambda finished: summary(finished, study, console)
        finished = run(study, console, tell=tell)
    except Exception as error:
        if (obstacle := engine.obstacle(error)) is None:
            raise
        begun = study.folder.exists() and not study.plan
        again = f"resume: {resume_command(study, study.name)}" if begun else "give it again"
        print(f"error: {obstacle}, then {again}", file=sys.stderr)
        return 1, None
    if not finished.whole:
        return process.interrupted()[0], finished
    return 0 if progress.best(finished.records) else 1, finished


def run(
    study: Study,
    console: Console,
    trainable: type[tune.Trainable] = TrainingTrial,
    callbacks: Sequence[tune.Callback] = (),
    tell: Callable[[Finished], object] = lambda finished: None,
) -> Finished:
    """Runs the trials of `study` that have not ended, as `engine.run` does."""
    return engine.run(job(study), console, trainable, callbacks, tell)


def job(study: Study) -> Job:
    """The search that `study` describes, ready to run.

    Raises ConfigError if it is invalid or, when resumed, has changed.
    """
    begun = manifest.of_resumed(study) if study.resume else manifest.of_search(study)
    return Job(
        name=study.name,
        out_dir=study.out_dir,
        resume=study.resume,
        manifest=begun,
        data=[provenance.source_of(study.options)],
        kept=kept(study),
        command=shlex.join(["python", "tune_main.py", *study.overrides]),
        numbered=study.options["study"] is None,
        objective=study.objective,
        source=from_search(manifest.proposer(study, begun), study.all_trials, study.batch),
        stops=study.stops,
        decisions=study.decisions,
        trials=lambda records: study.all_trials,
        cluster=study.cluster,
        checkpoints=study.checkpoints,
        tracking=study.tracking,
        optuna=True,
        storage=study.searcher["storage"],
        add=None if study.batch else manifest.adder(study, begun),
        seeds=study.replicates,
        keep_best=study.checkpoints["keep_best"],
        begin=lambda _: resume.keep_trials(study.folder, study.trials) if study.resume else None,
    )


def resume_command(study: Study, name: str) -> str:
    """To be typed where the study was started."""
    out_dir = study.options["out_dir"]
    out = [] if out_dir == "out" else [hydra_config.override("out_dir", out_dir)]
    more = study.resume and resume.kept_trials(study.folder) != study.trials  # not kept yet
    trials = [f"trials={study.trials}"] if more else []
    named = hydra_config.override("study", name)
    return shlex.join(tune_words(named, *out, "resume=true", *trials))


def summary(finished: Finished, study: Study, console: Console) -> None:
    """Prints the leaderboard and the next commands."""
    records = finished.records
    say = lambda text: console.print(Text(text), soft_wrap=True)
    counts = progress.tally(records)._asdict().items()
    states = ", ".join(f"{n} {state}" for state, n in counts if n)
    clock = progress.clock(finished.seconds)
    say(f"\nstudy {finished.job.name}: {len(records)} trials in {clock}: {states}")
    console.print(progress.leaderboard(records, study.objective))
    for line in progress.failures(records):
        say(line)
    for name, count in finished.undelivered.items():
        say(f"{name} lacks {count} records: resume the study when it answers")
    if finished.tracking_uri:
        say("")
        for line in in_browser("all trials:", finished.tracking_uri, finished.page):
            say(line)
    if finished.undelivered or not finished.whole:
        say(f"resume:      {resume_command(study, finished.job.name)}")
    if top := progress.best(records):
        say(f"best trial:  {tool('python')} {top.config['command'].removeprefix('python ')}")
