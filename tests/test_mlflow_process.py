"""MLflow's own process: what it answers, what it survives, and that it never outlives a driver."""

import errno
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny
from ray import tune
from rich.console import Console

from disinhib.errors import ConfigError
from disinhib.tuning import engine, mlflow_connection, mlflow_process, options, outbox, study
from disinhib.tuning.mlflow_process import MlflowProcess


@pytest.fixture
def mlflow():
    process = MlflowProcess()
    yield process
    process.close()


def test_calls_are_answered_by_results_and_by_errors_of_their_own_names(mlflow, tmp_path):
    opened = mlflow.call("open", None, "mine", tmp_path)
    assert opened == (f"sqlite:///{tmp_path / 'mlflow.db'}", "1")
    assert mlflow.call("check", None, "mine", tmp_path) is None
    with pytest.raises(ConfigError, match=r"tracking\.uri: given sqlite:///, allowed is"):
        mlflow.call("check", "sqlite:///", "mine", tmp_path)
    with pytest.raises(RuntimeError) as caught:
        mlflow.call("load", opened, {"no such": "field"}, {})
    assert type(caught.value).__name__ == "TypeError"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:  # behind it, what the system says
        mlflow.call("check", None, "mine", tmp_path / "file" / "below")
    assert getattr(caught.value.__cause__, "errno", None) == errno.ENOTDIR
    assert mlflow.call("open", None, "mine", tmp_path) == opened
    assert mlflow.cpu_seconds > 0


def test_an_interrupted_call_leaves_no_answer_to_the_next(mlflow, tmp_path, monkeypatch):
    def interrupted(file):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_process.pickle, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mlflow.call("open", None, "mine", tmp_path)
    assert mlflow.call("check", None, "mine", tmp_path / "other") is None


def test_a_call_that_hangs_ends_with_the_process_and_starts_no_other(mlflow, tmp_path):
    mlflow.call("check", None, "mine", tmp_path)
    mlflow._process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(mlflow.call, "check", None, "mine", tmp_path)
        mlflow.close()
        with pytest.raises(RuntimeError, match=r"the process of MLflow has (died|been closed)"):
            call.result()
    with pytest.raises(RuntimeError, match="has been closed"):
        mlflow.call("check", None, "mine", tmp_path)


def test_the_driver_does_without_mlflow_and_what_lies_in_its_folder_is_not_imported(tmp_path):
    (tmp_path / "disinhib").mkdir()
    (tmp_path / "disinhib" / "__init__.py").write_text("raise SystemExit('another disinhib')")
    code = (
        "import sys; from pathlib import Path; from disinhib.tuning import engine\n"
        "mlflow = engine.MlflowProcess()\n"
        "mlflow.call('open', None, 'mine', Path('.').absolute())\n"
        "print('mlflow' in sys.modules)"
    )
    words = [sys.executable, "-P", "-c", code]
    own = {**os.environ, "PYTHONPATH": str(Path(mlflow_process.__file__).parents[2])}
    done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_call_that_is_cut_off_ends_it():
    """As by a driver that is killed while it writes."""
    words = [sys.executable, "-m", "disinhib.tuning.mlflow_process"]
    whole = pickle.dumps(("check", (None, "mine", Path())))
    done = subprocess.run(words, input=whole[:-5], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"")


def test_without_stderr_its_answers_are_its_own(tmp_path):
    code = (
        "import sys; from pathlib import Path; from disinhib import process\n"
        "process.open_streams()\n"
        "from disinhib.tuning.mlflow_process import MlflowProcess\n"
        "print(MlflowProcess().call('open', 'sqlite:///m.db', 'mine', Path('.').absolute())[1])"
    )
    words = f'exec "{sys.executable}" -c "{code}" 2>&-'
    done = subprocess.run(["sh", "-c", words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n")


DRIVER = """
import sys
from pathlib import Path
from disinhib.tuning.mlflow_process import MlflowProcess

mlflow = MlflowProcess()
mlflow.call("check", None, "mine", Path(sys.argv[1]))
print(mlflow._process.pid, flush=True)
mlflow.call("check", sys.argv[2], "mine", Path(sys.argv[1]))
"""


def test_it_ends_amid_a_call_when_its_driver_is_killed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        words = ["-c", DRIVER, str(tmp_path), f"http://127.0.0.1:{mute.getsockname()[1]}"]
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as driver:
            assert driver.stdout is not None
            own = psutil.Process(int(driver.stdout.readline()))
            with mute.accept()[0]:  # it waits for an answer
                for number in (signal.SIGINT, signal.SIGTERM):  # for the driver to decide about
                    own.send_signal(number)
                assert own.is_running() and os.getpgid(own.pid) == own.pid
                driver.kill()
                own.wait(60)


source, tiny_space = tiny.source, tiny.tiny_space
MADE: list[MlflowProcess] = []


class Noted(MlflowProcess):
    def __init__(self):
        super().__init__()
        MADE.append(self)


class Killer(tune.Callback):
    """Kills MLflow's process when the second trial starts."""

    def on_trial_start(self, *, trial, **_):
        if trial.config["number"] == 1:
            process = MADE[-1]._process
            assert process is not None
            process.kill()


def test_a_study_survives_its_death(tmp_path, monkeypatch, tiny_space, one_ray):
    monkeypatch.setattr(engine, "MlflowProcess", Noted)
    monkeypatch.setattr(outbox, "RETRY", (0.2, 0.2))
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path}"])
    console = Console(file=(printed := io.StringIO()), width=120)
    done = study.run(asked, console, tiny.played(), [Killer()])
    assert done.whole and done.undelivered == {}
    said = " ".join(printed.getvalue().split())
    assert "mlflow does not take records (Died: the process of MLflow has died)" in said
    assert "mlflow answers again and has all records" in said
    assert MADE[-1]._process is None
    runs = mlflow_connection.client_of(done.tracking_uri).search_runs(["1"], "tags.trial LIKE '%'")
    assert sorted(int(run.data.tags["trial"]) for run in runs) == list(range(tiny.TRIALS))
    assert {run.data.tags["trial_state"] for run in runs} == {"complete"}
