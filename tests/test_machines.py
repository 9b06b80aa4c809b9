"""What a machine must show before it may train trials."""

import json

import pytest

from disinhib.data import DATASETS
from disinhib.tuning import machines, provenance

DIGITS = ("digits", None, 0.1)


def test_the_drivers_own_machine_is_fit(tmp_path):
    assert machines.faults(machines.require(tmp_path, [DIGITS], 0)) == []


def test_a_machine_must_see_the_folder_of_this_very_session(tmp_path):
    need = machines.require(tmp_path, [DIGITS], 0)
    machines.require(tmp_path, [DIGITS], 0)
    line = f"does not see {tmp_path}: out_dir must be a folder that all machines share"
    assert machines.faults(need) == [line]
    (tmp_path / machines.FILE).write_text("half-writ")
    assert machines.faults(need) == [line]
    (tmp_path / machines.FILE).unlink()
    assert machines.faults(need) == [line]


@pytest.mark.parametrize(
    ("place", "value", "difference"),
    [
        (("code", "files", "disinhib/training.py"), "0", "disinhib/training.py changed"),
        (("packages", "jaxlib"), "0.1", "jaxlib 0.1, now "),
        (("data", "sha256"), "0", "data digits: other images, labels or split"),
        (("numerics", "XLA_FLAGS"), "--a", "XLA_FLAGS=--a, now not set"),
    ],
)
def test_what_differs_from_the_drivers_is_named(place, value, difference, tmp_path):
    need = machines.require(tmp_path, [DIGITS], 0)
    file = tmp_path / machines.FILE
    content = json.loads(file.read_text())
    (inner,) = content["has"]
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    file.write_text(json.dumps(content))
    (line,) = machines.faults(need)
    assert line.startswith(f"is not as the driver was: {difference}")
    assert line.endswith(": make it the same")


def test_a_machine_must_have_the_data(tmp_path, monkeypatch):
    need = machines.require(tmp_path, [DIGITS], 0)
    need["sources"] = [("mnist", str(tmp_path), 0.1)]
    (line,) = machines.faults(need)
    assert line.startswith("cannot load the data: ") and str(tmp_path) in line


def test_trials_with_a_gpu_never_run_on_the_processor_unseen(tmp_path):
    (line,) = machines.faults(machines.require(tmp_path, [DIGITS], 0.5))
    assert line.startswith("jax sees no GPU but cpu: ")


def test_the_source_of_data_is_that_of_training_options():
    options = {"dataset": {"name": "digits", "path": "/x", "valid_split": 0.2, "loss": {}}}
    assert provenance.source_of(options) == ("digits", "/x", 0.2)
    assert DIGITS[0] in DATASETS


def test_a_machine_that_dies_amid_its_survey_is_no_obstacle(monkeypatch):
    seen = object.__new__(machines.Machines)  # without a Ray
    dead = machines.Machine("dead", "10.0.0.2", 1, faults=["cannot be asked: its node has died"])
    seen.all = {"dead": dead}
    monkeypatch.setattr(machines.ray, "nodes", lambda: [])
    machines.survey(seen)
    assert not dead.alive
