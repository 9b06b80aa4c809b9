"""A study from its opening to its end: what is refused before it starts, and that nothing which it
needed for its time stays."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
import ray
import tiny
from conftest import bring_mlflow_here
from mlflow import MlflowClient
from ray import tune
from rich.console import Console

from disinhib import process
from disinhib.errors import ConfigError
from disinhib.tuning import (
    cluster,
    engine,
    event_log,
    lease,
    manifest,
    mlflow_process,
    options,
    study,
)
from disinhib.tuning.event_log import COMPLETE, KILLED
from disinhib.tuning.loop import StudyStopped
from disinhib.tuning.worker import MACHINE

source, tiny_space = tiny.source, tiny.tiny_space
pytestmark = pytest.mark.usefixtures("tiny_space", "copied_stores")

REFUSED = {
    "tracking.uri=http://127.0.0.1:9": ["tracking.uri: given http://127.0.0.1:9", "answers"],
    "tracking.uri=sqlite:////dev/null/m.db": ["tracking.uri: given sqlite:", "can be made"],
    "searcher.storage=nosuch://x": ["searcher.storage: given nosuch://x", "null, or the URL"],
    "cluster.address=127.0.0.1:1": ["cluster.address: given 127.0.0.1:1", "running Ray cluster"],
}


# MLflow's come and go; Ray's stays, as the process has read it for good.
NOT_OURS = ("_MLFLOW_", "RAY_AUTH_MODE")


def settings():
    """What a call may set for its time."""
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    return {
        "environment": {n: v for n, v in os.environ.items() if not n.startswith(NOT_OURS)},
        "filters": {logger.name: list(logger.filters) for logger in loggers if logger.filters},
        "jax": {name: jax.config.values[name] for name in sorted(jax.config.values)},
    }


def changes(before):
    now = settings()
    return {
        (kind, name): (before[kind].get(name), now[kind].get(name))
        for kind in before
        for name in {*before[kind], *now[kind]}
        if before[kind].get(name) != now[kind].get(name)
    }


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_store_or_cluster_is_refused_before_ray_starts(override, tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path / 'out'}", override])
    job = study.job(asked)  # loads data: its libraries set some for themselves
    before = settings()
    with pytest.raises(ConfigError) as refusal:
        engine.run(job, tiny.quiet())
    assert changes(before) == {}
    line = str(refusal.value)
    assert "\n" not in line
    for part in REFUSED[override]:
        assert part in line
    assert not list(tmp_path.iterdir())


def test_a_study_leaves_no_setting_behind(tmp_path, monkeypatch):
    """On a Ray that it starts and ends itself."""
    for name in cluster.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path}", "trials=2"])
    job = study.job(asked)
    before = settings()
    within = []

    class Look(tune.Callback):
        def on_trial_result(self, **_):
            within.append(changes(before))

    done = engine.run(job, tiny.quiet(), tiny.played(), [Look()])
    assert [record.state for record in done.records] == [COMPLETE] * 2
    assert changes(before) == {}
    assert not ray.is_initialized()
    # They were there when they were needed.
    names = {name for _, name in within[0]}
    assert names >= {*cluster.SWITCHES, "TUNE_MAX_PENDING_TRIALS_PG", "ray.tune.tune"}
    assert not [name for kind, name in within[0] if kind == "jax"]


def test_a_store_that_takes_no_record_leaves_the_studys_name_free(tmp_path, monkeypatch, one_ray):
    def broken(self, records):
        raise OSError("no such table: runs")

    monkeypatch.setattr(mlflow_process.RemoteStore, "load", broken)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path}", "study=mine"])
    with pytest.raises(ConfigError, match=r"tracking\.uri: .* \(OSError: no such table: runs\)"):
        study.run(asked, tiny.quiet(), tiny.played())
    assert not asked.folder.exists()


@pytest.fixture
def ending():
    """This process ends on signals, as a command does."""
    before = {number: signal.getsignal(number) for number in process.ENDING}
    process.end_on_signals()
    yield
    process._received.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = {2: signal.SIGINT, 3: signal.SIGTERM, 4: signal.SIGUSR1}  # each in a trial


def test_an_interrupted_study_says_so_and_goes_on(tmp_path, monkeypatch, one_ray, ending):
    """The first time with MLflow in its own process."""
    handlers = lambda: [signal.getsignal(each) for each in (signal.SIGINT, *process.ENDING)]
    before, printed, trials = handlers(), io.StringIO(), 5

    class Interrupt(tune.Callback):
        def on_trial_result(self, *, trial, **_):
            if trial.config["number"] == at:
                signal.raise_signal(number)

    def in_mlflow(done):
        """(the study's status, its trials' states)."""
        client = MlflowClient(done.tracking_uri)
        run = client.get_run(done.run_id or "")
        found = client.search_runs([run.info.experiment_id], "tags.trial LIKE '%'")
        states = {int(r.data.tags["trial"]): r.data.tags["trial_state"] for r in found}
        return run.info.status, states

    place = [f"out_dir={tmp_path}", "study=mine"]
    words = [*tiny.STUDY, *place, f"trials={trials}"]
    for at, number in SIGNALS.items():
        done = study.run(options.compose(words), tiny.quiet(), tiny.played(), [Interrupt()])
        assert not done.whole and done.undelivered == {}
        assert process.interrupted() == (128 + number, number.name)
        assert handlers() == before
        assert [record.state for record in done.records] == [COMPLETE] * at + [KILLED]
        assert in_mlflow(done) == ("KILLED", {**dict.fromkeys(range(at), COMPLETE), at: KILLED})
        process._received.clear()
        words = [*place, "resume=true"]
        bring_mlflow_here(monkeypatch)

    done = study.run(options.compose(words), Console(file=printed, width=120), tiny.played())
    assert done.whole and [record.state for record in done.records] == [COMPLETE] * trials
    said = f"resumed with {at} of {trials} trials ended; unfinished: trial {at} after epoch 1"
    assert said in printed.getvalue()
    assert in_mlflow(done) == ("FINISHED", dict.fromkeys(range(trials), COMPLETE))


def test_the_lease_says_how_the_study_stands_once_a_beat(tmp_path, monkeypatch, one_ray):
    """Not after each event, as it takes a look at all trials."""
    bring_mlflow_here(monkeypatch)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path}", "study=mine", "trials=4"])
    outlines, known = [], []
    whole = engine.progress.outline
    noted = lambda *arguments: outlines.append(whole(*arguments)) or outlines[-1]
    monkeypatch.setattr(engine.progress, "outline", noted)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    beat = lambda: (lease.read(asked.folder) or {}).get("beat", 0)

    class Wait(tune.Callback):
        def on_trial_complete(self, **_):
            known.append(outlines[-1]["ended"])
            before = beat()
            while beat() <= before:  # what is not said by now is said after this step
                pass

    study.run(asked, tiny.quiet(), tiny.played(), [Wait()])
    assert all(ended >= n for n, ended in enumerate(known)) and len(known) == 4

    outlines.clear()
    monkeypatch.setattr(lease, "BEAT_SECONDS", 3600.0)
    again = options.compose([f"out_dir={tmp_path}", "study=mine", "resume=true", "trials=8"])
    assert study.run(again, tiny.quiet(), tiny.played()).whole
    assert [outline["ended"] for outline in outlines] == [4]


def test_a_choice_that_is_refused_in_the_midst_deletes_nothing(tmp_path, monkeypatch, one_ray):
    bring_mlflow_here(monkeypatch)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path}", "study=mine", "trials=4"])
    configure = manifest.configure

    def refused(study, number, *chosen):
        if number == 2:
            raise ConfigError("x: unknown option")
        return configure(study, number, *chosen)

    job = study.job(asked)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "configure", refused)
        with pytest.raises(ConfigError, match="x: unknown option"):
            engine.run(job, tiny.quiet(), tiny.played())
    job = study.job(options.compose([f"out_dir={tmp_path}", "study=mine", "resume=true"]))
    assert [r.state for r in engine.run(job, tiny.quiet(), tiny.played()).records] == [COMPLETE] * 4


@pytest.mark.parametrize("content", [None, b"no database, by any means, but some text" * 100])
def test_a_study_without_its_log_is_refused(content, tmp_path):
    tiny.begin(f"out_dir={tmp_path}", "study=mine")
    file = tmp_path / "mine" / event_log.FILE
    file.unlink() if content is None else file.write_bytes(content)
    job = study.job(options.compose([f"out_dir={tmp_path}", "study=mine", "resume=true"]))
    with pytest.raises(ConfigError, match=r"study: .*events\.db"):
        engine.run(job, tiny.quiet())


def test_a_fault_of_a_machine_is_no_failed_trial(tmp_path, monkeypatch, one_ray):
    bring_mlflow_here(monkeypatch)

    class Hindered(tiny.played()):
        def step(self):
            if self.trial["number"] == 2 and not Path(self.trial["searched"]["mended"]).exists():
                self.failure = OSError("planted")
                return {MACHINE: "h: OSError: planted"}
            return super().step()

    mended = tmp_path / "mended"
    words = [f"out_dir={tmp_path}", "study=mine"]
    job = study.job(options.compose([*tiny.STUDY, *words, "trials=4"]))
    marked = with_searched(job, mended=str(mended))
    with pytest.raises(StudyStopped) as stopped:
        engine.run(marked, tiny.quiet(), Hindered)
    assert engine.obstacle(stopped.value) == "h: OSError: planted: mend it"
    mended.touch()
    job = study.job(options.compose([*words, "resume=true"]))
    done = engine.run(with_searched(job, mended=str(mended)), tiny.quiet(), Hindered)
    assert [record.state for record in done.records] == [COMPLETE] * 4


def with_searched(job, **more):
    """The job, whose trials carry `more` to their workers."""

    def source(records):
        for event in job.source(records):
            event.config["searched"].update(more)
            yield event

    return replace(job, source=source)


def test_the_printed_command_resumes_a_study_that_a_signal_ended(tmp_path, mlflow_template):
    """Pasted where it was printed, whatever the folder is called."""
    out = tmp_path / "lr=0.1, (a)"
    out.mkdir()
    shutil.copyfile(mlflow_template, out / "mlflow.db")
    root = Path(engine.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    start = partial(subprocess.Popen, cwd=tmp_path, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    words = ["experiment=smoke", "space=bp", "trials=1", "epochs=1", f"out_dir={out.name}"]
    begun = start([sys.executable, "-u", str(root / "tune_main.py"), *words])
    said = []
    assert begun.stdout is not None
    for line in begun.stdout:
        said.append(line)
        begun.send_signal(signal.SIGTERM)  # again and again
    assert begun.wait() == 128 + signal.SIGTERM, said
    command = next(line.removeprefix("resume:") for line in said if line.startswith("resume:"))
    resumed = start(["sh", "-c", command])
    printed, _ = resumed.communicate()
    assert resumed.returncode == 0, printed
    assert "1 complete" in printed
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [out.name]
