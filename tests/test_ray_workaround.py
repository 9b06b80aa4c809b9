# pyright: reportArgumentType=false
"""The workaround of Ray's bug: that Ray still has it, and that nothing of it stays."""

import os
import signal
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
from ray.tune.execution.tune_controller import TuneController

from disinhib.tuning import ray_backend, ray_workaround
from disinhib.tuning.event_log import COMPLETE, FAILED, Asked, EventLog
from disinhib.tuning.loop import from_list, mean_score, never, study_loop

TRIALS = 3


def dies_in_reset():
    """Its worker dies when it is given another trial, once in every trial."""

    class Dies(tiny.played()):
        def reset_config(self, new_config):
            mark = Path(new_config["policy"]["folder"], f"reset-{new_config['number']}")
            if hasattr(self, "trial") and not mark.exists():  # it has had a trial before
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().reset_config(new_config)

    return Dies


def ends(folder):
    """How trials end whose workers die while they are reset."""
    config: Any = {"rule": "bp", "epochs": 1, "seeds": [1], "final": False, "searched": {}}
    trials = [Asked(number, config | {"number": number}) for number in range(TRIALS)]
    backend = tiny.backend(dies_in_reset(), folder)
    records = {}
    with closing(EventLog(folder)) as log:
        score = mean_score("valid_accuracy", 1)
        loop = study_loop(
            log,
            records,
            from_list(trials),
            never,
            score,
            backend.start,
            lambda: 1,
            lambda event: None,
        )
        backend.run(loop)
    return [records[number].state for number in range(TRIALS)]


@pytest.mark.usefixtures("one_ray")
def test_a_trial_goes_on_whose_worker_dies_as_it_is_given_to_it(tmp_path):
    assert ends(tmp_path) == [COMPLETE] * TRIALS
    assert len(list(tmp_path.glob("reset-*"))) == TRIALS - 1


@pytest.mark.usefixtures("one_ray")
def test_ray_still_needs_the_workaround(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_backend, "deaths_counted_once", nullcontext)
    assert FAILED in ends(tmp_path), (
        f"Ray {ray.__version__} lets such a trial go on: name the last version that does not in"
        " AFFECTED, and delete disinhib/tuning/ray_workaround.py when pyproject.toml asks for more"
    )


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.60.0", True), ("2.60.3", True), ("2.59.1", False), ("2.61.0", False), ("3.0.0", False)],
)
def test_it_is_for_versions_that_have_the_bug(version, needed):
    assert ray_workaround.needed(version) == needed


@pytest.mark.parametrize("needed", [True, False])
def test_nothing_stays_patched(needed, monkeypatch):
    monkeypatch.setattr(ray_workaround, "needed", lambda: needed)
    before = dict(vars(TuneController))
    with ray_workaround.deaths_counted_once():
        within = dict(vars(TuneController))
    changed = {name for name in within if within[name] is not before.get(name)}
    assert changed == ({"_process_trial_failure"} if needed else set())
    assert dict(vars(TuneController)) == before
    with pytest.raises(KeyError), ray_workaround.deaths_counted_once():
        raise KeyError
    assert dict(vars(TuneController)) == before
