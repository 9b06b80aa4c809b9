"""MLflow in a process of its own, where it does not hold up the study loop: the threads of one
Python process take turns, and a record costs MLflow more than the rest of the driver.

The process ends as soon as the driver has ended, even if that was killed: it must deliver nothing
beside the driver that goes on.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from disinhib.errors import ConfigError
from disinhib.process import ENDING
from disinhib.tuning.event_log import Logged, Record

if TYPE_CHECKING:  # MLflow takes seconds to import, and the driver does without
    from disinhib.tuning.mlflow_store import Experiment, MlflowStore


class MlflowProcess:
    """Makes calls in another process. That starts with the first, and again if it has died."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0  # of the process, with its last answer
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a method of `Service`. Raises its ConfigError, for any other of its errors a
        RuntimeError of that error's name, or RuntimeError if the process has died."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((name, arguments), process.stdin)
            process.stdin.flush()
            result, failure, self.cpu_seconds = pickle.load(process.stdout)
        except (EOFError, OSError) as lost:
            self._kill()
            raise RuntimeError("the process of MLflow has died") from lost
        except BaseException:  # an interrupt: the answer would be taken for the next call's
            self._kill()
            raise
        if failure is not None:
            kind, text = failure
            known = ConfigError if kind == ConfigError.__name__ else type(kind, (RuntimeError,), {})
            raise known(text)
        return result

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._over = True
        self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._over:
            raise RuntimeError("the process of MLflow has been closed")
        # In a group of its own, which Ctrl-C does not reach.
        return subprocess.Popen(
            [sys.executable, "-m", "disinhib.tuning.mlflow_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,
        )

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # a call that it did not read
                    pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


class RemoteStore:
    """A `MlflowStore(experiment, **fields)` in MLflow's process: an `outbox.Store`."""

    name, option = "mlflow", "tracking.uri"

    def __init__(self, process: MlflowProcess, experiment: Experiment, **fields: Any):
        self.process, self.fields = process, {"experiment": experiment, **fields}
        self.address = experiment.uri
        self.study_run: str | None = None  # set when the store is loaded

    def load(self, records: Mapping[int, Record]) -> set[int]:
        there, self.study_run = self.process.call("load", self.fields, records)
        return there

    def deliver(self, events: Sequence[Logged]) -> None:
        self.process.call("deliver", events)

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        self.process.call("close", records, whole)


class Service:
    """What can be called in MLflow's process. `uri` is the option `tracking.uri`, and `folder` the
    study's `out_dir`."""

    store: MlflowStore | None = None

    def check(self, uri: str | None, experiment: str, folder: Path) -> None:
        """Raises ConfigError as `open` would, but makes no store."""
        from disinhib.tuning import mlflow_store

        artifacts = folder / mlflow_store.ARTIFACTS
        mlflow_store.check_store(mlflow_store.address(uri, folder), experiment, artifacts)

    def open(self, uri: str | None, experiment: str, folder: Path) -> Experiment:
        from disinhib.tuning import mlflow_store

        artifacts = folder / mlflow_store.ARTIFACTS
        return mlflow_store.open_store(mlflow_store.address(uri, folder), experiment, artifacts)

    def load(
        self, fields: Mapping[str, Any], records: Mapping[int, Record]
    ) -> tuple[set[int], str | None]:
        """(which of `records` the store has, the study's own run)."""
        from disinhib.tuning.mlflow_store import MlflowStore

        self.store = MlflowStore(**fields)
        return self.store.load(records), self.store.study_run

    def deliver(self, events: Sequence[Logged]) -> None:
        assert self.store is not None
        self.store.deliver(events)

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        assert self.store is not None
        self.store.close(records, whole)


def serve(calls: IO[bytes], results: IO[bytes]) -> None:
    """Makes the calls that come, and ends this process when there can be no more."""
    waiting: queue.Queue[tuple[str, tuple]] = queue.Queue()

    def read() -> None:
        with suppress(EOFError):
            while True:
                waiting.put(pickle.load(calls))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    from disinhib.tuning import mlflow_settings

    service = Service()
    with mlflow_settings.requests():
        while True:
            name, arguments = waiting.get()
            result, failure = None, None
            try:
                result = getattr(service, name)(*arguments)
            except Exception as error:  # of MLflow, a database, a server: not all can be pickled
                failure = type(error).__name__, str(error)
            pickle.dump((result, failure, time.process_time()), results)
            results.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, *ENDING):  # the driver decides
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what MLflow prints is no answer
    serve(sys.stdin.buffer, answers)
