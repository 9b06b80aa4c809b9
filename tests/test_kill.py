"""Real studies whose driver, or whose workers, are killed with SIGKILL: nothing is lost, nothing is
there twice, and Ray, Optuna and MLflow tell the same."""

import random
from functools import partial

import pytest
from rich.console import Console

from benchmarks import kill
from disinhib.tuning import options, study
from disinhib.tuning.event_log import COMPLETE

pytestmark = pytest.mark.slow
SEED = 4
say = partial(print, flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All studies in it share what they compile."""
    return tmp_path_factory.mktemp("studies")


def show(rows, place, again):
    Console(width=150).print(kill.table(rows))
    states = [trial.state for trial in kill.inspect(place) if trial.store == "journal"]
    say({state: states.count(state) for state in sorted({*states})}, "trained again:", again)


def test_a_study_whose_driver_is_killed_five_times_is_whole(folder):
    rng, kills = random.Random(SEED), 0
    while kills < kill.KILLS:  # on a fast machine a study may end before its moments have come
        moments = kill.draw(rng, kill.KILLS - kills)
        say(f"seed {SEED}, to be killed at:", *moments, sep="\n  ")
        place = folder / f"driver-{kills}"
        done = place / "out" / kill.NAME
        rows = kill.kill_and_resume(place, moments)
        kills += sum(row.killed for row in rows)
        again = kill.went_on(rows)[: kill.REPLAYED]
        show(rows, done, again)
        assert kill.check(done) == []
        assert kill.check_training(done, again) == []


def test_a_study_whose_workers_are_killed_goes_on_by_itself(folder):
    place = folder / "workers"
    done = place / "out" / kill.NAME
    rows = kill.kill_workers(place, random.Random(SEED), 2)
    again = kill.restarted(done)
    show(rows, done, again)
    assert again, "no trial had to go on elsewhere"
    assert kill.check(done) == []
    assert kill.check_training(done, again) == []


def test_a_trial_goes_on_whose_worker_dies_as_it_is_given_to_it(folder):
    words = ["experiment=smoke", "trials=4", "space=bp", "scheduler=none", f"out_dir={folder}"]
    asked = options.compose([*words, "study=reset"])
    records = study.run(asked, Console(), kill.DiesOnce).records
    (mark,) = asked.folder.rglob("died")
    died = int(mark.read_text())
    say("its worker died: trial", died)
    assert [(r.number, r.state, r.reason) for r in records] == [
        (number, COMPLETE, None) for number in range(4)
    ]
    assert kill.restarted(asked.folder) == [died]
