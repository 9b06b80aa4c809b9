"""Real studies whose driver, or whose workers, are killed with SIGKILL: nothing is lost, nothing is
there twice, and Ray, Optuna and MLflow say the same. (At any moment, with trials that are played:
tests/test_loop.py. At many more moments: `python -m tests.kill`. A worker that dies between two
trials: tests/test_ray_workaround.py.)"""

import os
import shutil
import signal
import sqlite3
from contextlib import closing

import kill
import pytest
import tiny
from kill import MORE, Moment
from ray import tune

from disinhib.tuning import options, study

pytestmark = pytest.mark.usefixtures("copied_stores", "mlflow_here", "one_ray")
ALONE = "cluster.max_concurrent=1"  # as each worker takes seconds to start
SMALL = ("space=bp", "epochs=4", "model.vf.sizes_hidden=[16]")


def test_a_study_whose_workers_are_killed_goes_on_by_itself(tmp_path):
    class Killer(tune.Callback):
        """Kills the workers of the first two trials that have come to their second epoch."""

        def __init__(self):
            self.trials = []

        def on_trial_result(self, *, trial, result, **_):
            number = trial.config["number"]
            if result["training_iteration"] == 2 and number not in self.trials[:2]:
                self.trials.append(number)
                if len(self.trials) <= 2:
                    os.kill(result["pid"], signal.SIGKILL)

    killer = Killer()
    place = [f"study={kill.NAME}", f"out_dir={tmp_path / 'out'}"]
    asked = options.compose([*kill.OPTIONS, *SMALL, *place, "trials=4"])
    done = study.run(asked, tiny.quiet(), callbacks=[killer])
    assert done.whole
    again = kill.restarted(asked.folder)
    assert again == sorted(killer.trials[:2])
    assert kill.check(asked.folder) == []
    assert kill.check_training(asked.folder, again[:1]) == []


def test_a_study_whose_driver_is_killed_is_whole(tmp_path, mlflow_template):
    """Amid its trials, which are lanes of servers. (As it ends: `make kill`.)"""
    (tmp_path / "1/out").mkdir(parents=True)
    shutil.copyfile(mlflow_template, tmp_path / "1/out/mlflow.db")
    moments = [Moment(MORE, 0.2, trials=2)]
    small = (*SMALL, "cluster.lanes=2")
    rows = kill.kill_and_resume(tmp_path / "1", moments, trials=5, options=small)
    print(*rows, sep="\n")
    assert rows[0].killed and rows[-1].code == 0
    folder = tmp_path / "1/out" / kill.NAME
    assert kill.check(folder, rows[-1].ended) == []
    assert kill.check_training(folder, kill.went_on(rows)[:1]) == []


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM metrics WHERE step = 2 AND key = 'valid_accuracy'",
        "UPDATE metrics SET value = value + 1 WHERE step = 1 AND key = 'valid_accuracy'",
        "UPDATE tags SET value = 'pruned' WHERE key = 'trial_state' AND value = 'complete'",
        "UPDATE runs SET status = 'RUNNING' WHERE status = 'FINISHED'",
        "DELETE FROM tags WHERE key = 'study'",
    ],
)
def test_what_would_be_wrong_is_seen(damage, tmp_path, whole):
    """Or the checks above could not fail."""
    shutil.copytree(whole.parent, tmp_path / "out")
    folder = tmp_path / "out" / whole.name
    assert kill.check(folder) == []
    with closing(sqlite3.connect(tmp_path / "out/mlflow.db")) as store:
        assert store.execute(damage).rowcount
        store.commit()
    assert kill.check(folder) != []


@pytest.fixture(scope="module")
def whole(copied_stores, mlflow_here, one_ray, tmp_path_factory):
    """The folder of a small study that nothing happened to."""
    place = [f"study={kill.NAME}", f"out_dir={tmp_path_factory.mktemp('whole')}"]
    asked = options.compose(["experiment=smoke", "space=bp", "trials=3", ALONE, *place])
    study.run(asked, tiny.quiet(), tiny.played())
    return asked.folder
