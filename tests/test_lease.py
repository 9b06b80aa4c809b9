"""One driver a study, whatever the file system's locks are worth."""

import json
import threading

import pytest
import tiny

from disinhib.errors import ConfigError
from disinhib.tuning import lease, options, study

OTHER = {"id": "0", "machine": "another", "host": "far", "pid": 7}


@pytest.fixture
def other(tmp_path):
    """Writes the lease of another machine's driver, again and again until the end."""
    over = threading.Event()

    def live():
        count = 0
        while not over.is_set():
            (tmp_path / lease.FILE).write_text(json.dumps({**OTHER, "beat": count}))
            count += 1

    thread = threading.Thread(target=live)
    yield thread
    over.set()
    thread.join()


def test_a_study_that_another_machine_runs_is_refused(other, tmp_path):
    (tmp_path / lease.FILE).write_text(json.dumps(OTHER))
    other.start()
    with pytest.raises(ConfigError, match=r"is run from far \(process 7\)$"), lease.held(tmp_path):
        pass


def test_a_dead_drivers_lease_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.1)
    (tmp_path / lease.FILE).write_text(json.dumps(OTHER))
    with lease.held(tmp_path) as own:
        assert json.loads((tmp_path / lease.FILE).read_text())["id"] == own.id
    assert not (tmp_path / lease.FILE).exists()


def test_a_lease_of_this_machine_is_no_obstacle(tmp_path):
    with lease.held(tmp_path) as first, lease.held(tmp_path) as second:
        assert first.machine == second.machine


def test_a_removed_folder_is_not_made_again(tmp_path):
    own = lease.Lease(tmp_path)
    own.beat(0)
    (tmp_path / lease.FILE).unlink()
    own.beat(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("copied_stores", "one_ray")
def test_a_driver_whose_study_another_has_taken_over_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    words = ["experiment=smoke", "space=bp", "study=taken", f"out_dir={tmp_path}"]
    asked = options.compose(words)

    class Waiting(tiny.played()):
        def step(self):
            (asked.folder / lease.FILE).write_text(json.dumps(OTHER))
            return super().step()

    with pytest.raises(ConfigError, match=r"is now run from far \(process 7\)$"):
        study.run(asked, tiny.quiet(), Waiting)
    assert json.loads((asked.folder / lease.FILE).read_text()) == OTHER
