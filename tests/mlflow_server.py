"""`mlflow server` on loopback, a process of its own that can go away and come back."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path


def serve(host: str, port: int, store: str, folder: Path) -> subprocess.Popen:
    """Starts a server whose artifacts are in `folder`, and waits until it answers."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
            *("--workers", "1", "--backend-store-uri", store),
            *("--allowed-hosts", f"{host}:{port}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # its workers go with it
    )

    def answers() -> bool:
        assert process.poll() is None, "mlflow server ended"
        with suppress(OSError, HTTPException):  # a client may be given this port, and meet itself
            urllib.request.urlopen(f"http://{host}:{port}/health", timeout=1).close()
            return True
        return False

    wait(answers)
    return process


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
        self.process = serve("127.0.0.1", self.port, store, self.folder)

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
