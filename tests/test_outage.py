"""What a study does when the services around it fail: a real MLflow server that goes away for a
while, a disk that fills up."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from rich.console import Console

from disinhib.tuning import event_log, options, study
from disinhib.tuning.worker import TrainingTrial

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
OUTAGE = 20.0  # s


def slow_trial():
    """Real training whose epochs last long enough for something to happen meanwhile. (A local
    class: Ray sends it to workers, which cannot import this file.)"""

    class SlowTrial(TrainingTrial):
        def _epoch(self):
            time.sleep(0.5)
            return super()._epoch()

    return SlowTrial


class Server:
    """`mlflow server` on loopback, a process of its own."""

    def __init__(self, folder: Path):
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self):
        store = f"sqlite:///{self.folder / 'server.db'}"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
                *("--port", str(self.port), "--workers", "1", "--backend-store-uri", store),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its workers go with it
        )
        while True:
            assert self.process.poll() is None, "mlflow server ended"
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def test_metrics_arrive_once_though_the_server_was_away(server, tmp_path):
    asked = options.compose(
        [
            *("experiment=smoke", "trials=6", "epochs=30", "scheduler=none", "space=bp"),
            *(f"tracking.uri={server.uri}", f"out_dir={tmp_path / 'out'}"),
        ]
    )
    client = mlflow.MlflowClient(server.uri)
    away = []

    def interfere():
        while not study_runs(client):
            time.sleep(0.5)
        time.sleep(4)
        server.stop()
        away.append(time.time())
        time.sleep(OUTAGE)
        server.start()
        away.append(time.time())

    interference = threading.Thread(target=interfere)
    interference.start()
    printed = io.StringIO()
    finished = study.run(asked, Console(file=printed, width=200), slow_trial())
    interference.join()

    assert finished.undelivered == {}
    assert "mlflow does not take records" in printed.getvalue()
    assert "mlflow answers again and has all records" in printed.getvalue()
    with closing(event_log.Journal(asked.folder)) as opened:
        events = opened.events()
    heard = {(e.trial, e.epoch): e for e in events if e.kind == event_log.EPOCH}
    assert len(heard) == 6 * 30
    during = [e for e in heard.values() if away[0] < e.time < away[0] + OUTAGE]
    assert len(during) > 20  # the trials went on
    runs = {int(run.data.tags["trial"]): run for run in study_runs(client)}
    assert sorted(runs) == list(range(6))
    for number, run in runs.items():
        assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "complete")
        for name in ("valid_accuracy", "train_CL_loss"):
            history = client.get_metric_history(run.info.run_id, name)
            expected = [(n, heard[number, n].body["metrics"][name]) for n in range(1, 31)]
            assert [(metric.step, metric.value) for metric in history] == expected
    parent = client.get_run(finished.run_id or "")
    assert parent.info.status == "FINISHED"


def study_runs(client):
    """The runs of trials."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, "tags.trial LIKE '%'")


# A study on a small file system with a file that fills most of it, and the same study resumed
# without that file. In namespaces of its own, where everybody may mount: $1 is the folder, $2 the
# size of the file, the rest the study's options.
DISK = 40 * 2**20  # bytes
FULL_DISK = f"""
set -u
disk=$1 ballast=$2; shift 2
mount -t tmpfs -o size={DISK} tmpfs "$disk" || exit 99
head -c "$ballast" /dev/zero > "$disk/ballast"
"$PYTHON" "$SCRIPT" "$@"
echo "$?" > stopped
rm "$disk/ballast"
"$PYTHON" "$SCRIPT" study=full "out_dir=$disk/out" resume=true > resumed.log 2>&1
echo "$?" > resumed
cp -r "$disk/out/full" kept
"""


def on_full_disk(disk: Path, room: int, *arguments: str) -> str:
    """What the study that stopped has said on stderr; the folder of the test gets the rest."""
    disk.mkdir()
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh"]
    run = subprocess.run(
        [*words, str(disk), str(DISK - room), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "SCRIPT": str(ROOT / "tune_main.py")},
        cwd=disk.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, f"needs user namespaces (unshare --user --mount): {run.stderr}"
    return run.stderr


# Bytes of room, and what meets the end of it first: a trial's checkpoint, or the study's journal.
FIRST = {
    "checkpoint": (3_300_000, ("checkpoints.every_seconds=0", "model.vf.sizes_hidden=[500]")),
    "journal": (890_000, ("checkpoints.keep_best=0", "epochs=40", "scheduler=none")),
}


@pytest.mark.parametrize("first", FIRST)
def test_a_full_disk_ends_the_study_and_it_resumes_when_there_is_room(
    first, tmp_path, mlflow_template
):
    disk = tmp_path / "disk"
    room, own = FIRST[first]
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    said = on_full_disk(
        disk, room, "experiment=smoke", "trials=12", "epochs=4", "checkpoints.keep_best=9",
        "study=full", f"out_dir={disk / 'out'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
        *own,
    )  # fmt: skip
    assert (tmp_path / "stopped").read_text() == "1\n", said
    *_, line = said.strip().splitlines()
    assert "No space left on device" in line or "no space left for the " + first in line
    assert f"study=full out_dir={disk / 'out'} resume=true" in line
    assert (tmp_path / "resumed").read_text() == "0\n", (tmp_path / "resumed.log").read_text()
    with closing(event_log.Journal(tmp_path / "kept")) as opened:
        records = event_log.records(opened.events())
    assert sorted(records) == list(range(12))
    assert all(record.ended for record in records.values())
