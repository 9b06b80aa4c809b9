"""`mlflow server` on loopback, a process of its own that can go away and come back."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path


class Server:
    def __init__(self, folder: Path, template: Path):
        """Keeps its store in `folder`: at first a copy of `template`."""
        with closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        shutil.copyfile(template, folder / "server.db")

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
                time.sleep(0.1)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Outage:
    """Takes `server` away in the midst of a study, and brings it back when the study has noticed.

    Trials wait for it (`until`), so that there are epochs before, during and after it, however
    busy the machine is."""

    AWAY, BACK = "away", "back"

    def __init__(self, server: Server, marks: Path):
        self.server, self.marks = server, marks
        self.times: list[float] = []

    def run(self, begun, noticed):
        """`begun()` and `noticed()` say when the study has come that far."""
        wait(begun)
        self.server.stop()
        self._mark(self.AWAY)
        wait(noticed)
        self.server.start()
        self._mark(self.BACK)

    def _mark(self, name):
        self.times.append(time.time())
        (self.marks / name).touch()


def wait(condition, seconds: float = 300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
