# pyright: reportAttributeAccessIssue=false
"""What a study does when what it needs fails: a real MLflow server that goes away for a while, a
disk that is full."""

import io
import threading
import time
from contextlib import closing
from functools import partial

import mlflow
import pytest
import tiny
from conftest import bring_mlflow_here
from mlflow_server import Outage, Server
from rich.console import Console

from disinhib.tuning import options, outbox, study
from disinhib.tuning.event_log import COMPLETE, Asked, EpochDone, EventLog, replay

pytestmark = pytest.mark.usefixtures("copied_stores", "one_ray")
TRIALS, EPOCHS = 3, 8


@pytest.fixture
def server(tmp_path, mlflow_template):
    server = Server(tmp_path, mlflow_template)
    server.start()
    yield server
    server.stop()


def waits_for(marks):
    """A trainable that waits after its second epoch until the server is away, and before its last
    one until it is back."""
    waits = {3: marks / Outage.AWAY, EPOCHS: marks / Outage.BACK}

    class Waits(tiny.played()):
        def step(self):
            mark = waits.get(self.epoch + 1)
            while mark is not None and not mark.exists():
                time.sleep(0.05)
            return super().step()

    return Waits


def test_metrics_arrive_once_though_the_server_was_away(server, tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY", (0.2, 0.2))
    asked = options.compose(
        [
            *("experiment=smoke", f"trials={TRIALS}", f"epochs={EPOCHS}", "scheduler=none"),
            *("space=bp", f"tracking.uri={server.uri}", f"out_dir={tmp_path / 'out'}"),
        ]
    )
    client = mlflow.MlflowClient(server.uri)
    printed = io.StringIO()
    outage = Outage(server, tmp_path)
    away = "mlflow does not take records"
    interference = threading.Thread(
        target=outage.run,
        # Away only when a trial has reported: before it the workers are still starting.
        args=(
            lambda: any(run.data.metrics for run in study_runs(client)),
            lambda: away in printed.getvalue(),
        ),
    )
    interference.start()
    finished = study.run(asked, Console(file=printed, width=200), waits_for(tmp_path))
    interference.join()

    assert finished.undelivered == {}
    assert away in printed.getvalue()
    assert "mlflow answers again and has all records" in printed.getvalue()
    with closing(EventLog(asked.folder)) as log:
        logged = [(each.time, each.event) for each in log.events()]
    times = [when for when, event in logged if isinstance(event, EpochDone)]
    epochs = {
        (event.trial, event.epoch): event for _, event in logged if isinstance(event, EpochDone)
    }
    assert len(epochs) == len(times) == TRIALS * EPOCHS
    begin, end = outage.times
    assert sum(begin < when < end for when in times) >= EPOCHS - 3  # the trials went on
    runs = {int(run.data.tags["trial"]): run for run in study_runs(client)}
    assert sorted(runs) == list(range(TRIALS))
    for number, run in runs.items():
        assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "complete")
        history = client.get_metric_history(run.info.run_id, "valid_accuracy")
        expected = [
            (n, epochs[number, n].metrics["valid_accuracy"][0]) for n in range(1, EPOCHS + 1)
        ]
        assert [(metric.step, metric.value) for metric in history] == expected
    assert client.get_run(finished.run_id or "").info.status == "FINISHED"


def study_runs(client):
    """The runs of trials."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, "tags.trial LIKE '%'")


def full_checkpoints(patch):
    """Trials cannot write their checkpoints. (Of their worker: tests/test_worker.py.)"""

    class Full(tiny.played()):
        def reset_config(self, new_config):
            return super().reset_config({**new_config, "searched": {"2": "full"}})

    return Full


def full_log(patch):
    """SQLite can give the log no more pages: what a full disk is to it."""
    append = EventLog.append

    def limited(self, events):
        events = list(events)
        if any(isinstance(event, EpochDone) for event in events):
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count = {pages}")
        return append(self, events)

    patch.setattr(EventLog, "append", limited)
    return tiny.played()


FULL = {
    full_checkpoints: "No space left on device: there",
    full_log: "no space left for the event log",
}


def test_a_full_disk_ends_the_study_and_it_resumes_when_there_is_room(
    tmp_path, monkeypatch, capsys
):
    bring_mlflow_here(monkeypatch)
    run, out = study.run, f"out_dir={tmp_path / 'out'}"
    small = ("experiment=smoke", "space=bp", "trials=2", "epochs=3", "cluster.max_concurrent=1")
    words = [*small, "study=full", out]
    for fault, says in FULL.items():
        with monkeypatch.context() as patch:
            patch.setattr(study, "run", partial(run, trainable=fault(patch)))
            assert study.main(words) == 1
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {says}: make room, then resume: ")
        assert line.endswith(f"study=full {out} resume=true")
        words = ["study=full", out, "resume=true"]

    monkeypatch.setattr(study, "run", partial(run, trainable=tiny.played()))
    assert study.main(words) == 0
    with closing(EventLog(tmp_path / "out/full")) as log:
        events = log.events()
    records = replay(events)
    assert (
        sorted(records)
        == [0, 1]
        == sorted(logged.event.trial for logged in events if isinstance(logged.event, Asked))
    )
    assert {record.state for record in records.values()} == {COMPLETE}
