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
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from disinhib.errors import ConfigError
from disinhib.process import ENDING, open_streams
from disinhib.tuning.event_log import Logged, Record

if TYPE_CHECKING:  # MLflow takes seconds to import, and the driver does without
    from disinhib.tuning.mlflow_store import MlflowStore


class Died(RuntimeError):
    """The process has died."""


class MlflowProcess:
    """Makes calls in another process. That starts with the first, and again if it has died."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0  # of the process, with its last answer
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a method of `Service`. Raises its ConfigError, for any other of its errors a
        RuntimeError of that error's name, or Died; from an OSError with the number of the system's
        error behind it, if there is one."""
        process = self._process = self._process or self._started()
        if self._over:  # another thread has closed it in the meantime
            self._kill()
            raise Died("the process of MLflow has been closed")
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((name, arguments), process.stdin)
            process.stdin.flush()
            result, failure, self.cpu_seconds = pickle.load(process.stdout)
        except (EOFError, OSError) as lost:
            self._kill()
            raise Died("the process of MLflow has died") from lost
        except BaseException:  # an interrupt: the answer would be taken for the next call's
            self._kill()
            raise
        if failure is not None:
            kind, text, number = failure
            known = ConfigError if kind == ConfigError.__name__ else type(kind, (RuntimeError,), {})
            raise known(text) from (OSError(number, os.strerror(number)) if number else None)
        return result

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._over = True
        self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._over:
            raise Died("the process of MLflow has been closed")
        # With the modules of this process (-P: and none that lie in the current folder), in a group
        # of its own, which Ctrl-C does not reach.
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "disinhib.tuning.mlflow_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
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
    """A `MlflowStore` in MLflow's process: an `outbox.Store`. It is made of the `experiment` (its
    address and id) and the other `fields`."""

    name, option = "mlflow", "tracking.uri"

    def __init__(self, process: MlflowProcess, experiment: tuple[str, str], **fields: Any):
        self.process, self.experiment, self.fields = process, experiment, fields
        self.address, _ = experiment
        self.study_run: str | None = None  # set when the store is loaded

    @property
    def page(self) -> str:
        """Where MLflow's UI lists the trials, after the UI's own address."""
        shown = f"workflowType=machine_learning&viewStateShareKey={self.fields['id']}"
        return f"/#/experiments/{self.experiment[1]}/runs?{shown}"

    @property
    def chart(self) -> str | None:
        """Where MLflow's UI shows how the study stands, and has stood; None before it is loaded."""
        shown = f"{self.study_run}/model-metrics?workflowType=machine_learning"
        return self.study_run and f"/#/experiments/{self.experiment[1]}/runs/{shown}"

    def load(self, records: Mapping[int, Record]) -> set[int]:
        loaded = self.process.call("load", self.experiment, self.fields, records)
        there, self.study_run = loaded
        return there

    def deliver(self, events: Sequence[Logged]) -> None:
        self.process.call("deliver", events)

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        try:
            self.process.call("close", records, whole)
        except Died:  # since its last delivery
            self.load(records)
            self.process.call("close", records, whole)


class Service:
    """What can be called in MLflow's process. `uri` is the option `tracking.uri`, and `folder` the
    study's `out_dir`."""

    store: MlflowStore | None = None

    def check(self, uri: str | None, experiment: str, folder: Path) -> None:
        """Raises ConfigError as `open` would, but makes no store."""
        from disinhib.tuning import mlflow_connection

        artifacts = folder / mlflow_connection.ARTIFACTS
        mlflow_connection.check_store(mlflow_connection.address(uri, folder), experiment, artifacts)

    def open(self, uri: str | None, experiment: str, folder: Path) -> tuple[str, str]:
        """The fields of an `Experiment`, of mlflow_connection, which the driver does not import."""
        from disinhib.tuning import mlflow_connection

        address = mlflow_connection.address(uri, folder)
        artifacts = folder / mlflow_connection.ARTIFACTS
        opened = mlflow_connection.open_store(address, experiment, artifacts)
        return opened.uri, opened.id

    def load(
        self,
        experiment: tuple[str, str],
        fields: Mapping[str, Any],
        records: Mapping[int, Record],
    ) -> tuple[set[int], str | None]:
        """(which of `records` the store has, the study's own run)."""
        from disinhib.tuning.mlflow_connection import Experiment
        from disinhib.tuning.mlflow_store import MlflowStore

        self.store = MlflowStore(Experiment(*experiment), **fields)
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
        try:
            while True:
                waiting.put(pickle.load(calls))
        except EOFError:
            pass
        except Exception:  # of a call that was cut off, too
            traceback.print_exc()
        finally:
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
                failure = type(error).__name__, str(error), _number(error)
            pickle.dump((result, failure, time.process_time()), results)
            results.flush()


def _number(error: BaseException | None) -> int | None:
    """Of the system's error that is behind `error`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    # The driver decides when it ends; what it says must not stop it.
    for signal_number in (signal.SIGINT, signal.SIGTTOU, *ENDING):
        signal.signal(signal_number, signal.SIG_IGN)
    open_streams()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what MLflow prints is no answer
    serve(sys.stdin.buffer, answers)
