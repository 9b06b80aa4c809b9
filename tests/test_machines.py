"""What a machine must show before it may train trials."""

import json
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize(
    ("lanes", "seeds", "room"), [(1, 3, 2), (32, 1, 64), (32, 10, 6), (4, 10, 2)]
)
def test_trials_of_a_machine_and_where_there_are_none(lanes, seeds, room, monkeypatch, tmp_path):
    """As many as their seeds have lanes; on a machine without a GPU none, though they need no GPU
    themselves."""
    nodes: list[Any] = [
        {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": has}
        for name, has in (("a", {"CPU": 4.0, "GPU": 2.0}), ("b", {"CPU": 64.0}))
    ]
    context = SimpleNamespace(get_node_id=lambda: "a")
    monkeypatch.setattr(machines.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(machines.ray, "nodes", lambda: nodes)
    need = machines.require(tmp_path, [DIGITS], 1)
    found = machines.Machines({"cpu": 1, "gpu": 1}, need, lanes, seeds)
    found.refresh()
    assert found.room() == room
    assert found.all["a"].servers == (0 if lanes == 1 else 2)
    assert found.left_out() == ["b"]


def test_a_machine_that_dies_amid_its_survey_is_no_obstacle(monkeypatch):
    seen = object.__new__(machines.Machines)  # without a Ray
    dead = machines.Machine("dead", "10.0.0.2", 1, faults=["cannot be asked: its node has died"])
    seen.all = {"dead": dead}
    monkeypatch.setattr(machines.ray, "nodes", lambda: [])
    machines.survey(seen)
    assert not dead.alive
