"""One driver a study, whatever the file system's locks are worth."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from ray import tune

from disinhib.errors import ConfigError
from disinhib.tuning import lease, options, study
from disinhib.tuning.event_log import COMPLETE

OTHER = {"id": "0", "machine": "another", "host": "far", "pid": 7}


def write(folder, **more):
    (Path(folder) / lease.FILE).write_text(json.dumps({**OTHER, **more}))


@pytest.fixture
def live(tmp_path):
    """Another machine's driver, which writes its lease again and again."""
    over = threading.Event()

    def beat():
        for count in range(10**9):
            if over.is_set():
                return
            write(tmp_path / "next", beat=count)
            (tmp_path / "next" / lease.FILE).replace(tmp_path / lease.FILE)

    (tmp_path / "next").mkdir()
    write(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("live")
def test_a_study_that_another_machine_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is run from far \(process 7\)$"):
        lease.refuse_live(tmp_path)


@pytest.mark.parametrize("left", ["", '{"id": ', json.dumps(OTHER)], ids=["none", "half", "whole"])
def test_what_a_dead_driver_has_left_is_no_obstacle(left, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    if left:
        (tmp_path / lease.FILE).write_text(left)
    lease.refuse_live(tmp_path)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 1e9)  # it does not wait again
    lease.refuse_live(tmp_path)
    with lease.held(tmp_path) as own:
        assert json.loads((tmp_path / lease.FILE).read_text())["id"] == own.id
        own.check()
    assert not (tmp_path / lease.FILE).exists()


def test_on_this_machine_the_log_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 1e9)  # it does not wait
    with lease.held(tmp_path):
        lease.refuse_live(tmp_path)


def test_the_lease_is_renewed_until_another_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    with lease.held(tmp_path) as own:
        while own.beats < 3:
            pass
        while own.taken_by() is None:  # a beat that was under way may come after it
            write(tmp_path)
        with pytest.raises(lease.TakenOver, match=r"is now run from far \(process 7\)"):
            own.check()
    assert json.loads((tmp_path / lease.FILE).read_text()) == OTHER


def test_a_removed_lease_is_not_made_again(tmp_path):
    own = lease.Lease(tmp_path)
    own.write()
    (tmp_path / lease.FILE).unlink()
    own.write()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def asked(tmp_path):
    place = f"out_dir={tmp_path / 'out'}"
    small = ("experiment=smoke", "space=bp", "trials=2", "cluster.max_concurrent=1")
    return options.compose([*small, "study=mine", place])


@pytest.mark.usefixtures("copied_stores", "mlflow_here", "one_ray")
def test_a_driver_whose_study_another_has_taken_over_ends(asked):
    file, text = asked.folder / lease.FILE, json.dumps(OTHER)

    class Taken(tiny.played()):
        def step(self):
            file.write_text(text)
            return super().step()

    with pytest.raises(lease.TakenOver, match=r"is now run from far \(process 7\)"):
        study.run(asked, tiny.quiet(), Taken)
    assert json.loads(file.read_text()) == OTHER


@pytest.mark.usefixtures("copied_stores", "mlflow_here", "one_ray")
def test_the_same_command_again_is_refused_and_the_first_goes_on(asked):
    said = []

    class Again(tune.Callback):
        def on_trial_result(self, **_):
            if not said:
                place = ["study=mine", f"out_dir={asked.out_dir}", "resume=true"]
                said.append(
                    subprocess.run(
                        [sys.executable, "tune_main.py", *place], capture_output=True, text=True
                    )
                )

    finished = study.run(asked, tiny.quiet(), tiny.played(), [Again()])
    assert {record.state for record in finished.records} == {COMPLETE}
    assert said[0].returncode == 2 and said[0].stderr.startswith("error: study: ")
    assert "is open in another process" in said[0].stderr
