# pyright: reportArgumentType=false
"""The study loop on the real Ray Tune, with trials that only play: what each of their ends is in
the log and in Ray, and what ends the study."""

import json
import os
import signal
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import ray
import tiny
from ray import tune
from ray.tune import ExperimentAnalysis

from disinhib.tuning import ray_backend, steering, worker
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    WAITING,
    Asked,
    Ended,
    EpochDone,
    EventLog,
    replay,
)
from disinhib.tuning.loop import StudyStopped, from_list, mean_score, study_loop
from disinhib.tuning.ray_backend import Running

pytestmark = pytest.mark.usefixtures("one_ray", "impatient")

EPOCHS = 3


@pytest.fixture(scope="module")
def impatient():
    """A trial may lose fewer workers, as each takes seconds to be born."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_backend, "WORKERS_LOST", 1)
        yield


class Played(NamedTuple):
    records: dict
    ray: dict  # Ray's own trials, by number
    epochs: list  # that the log has, (trial, epoch)
    workers: list  # pids, in the order of their first results
    over_cap: int  # calls
    said: list  # lines


class Watch(tune.Callback):
    def __init__(self):
        self.workers = []

    def on_trial_result(self, *, result, **_):
        if result["pid"] not in self.workers:
            self.workers.append(result["pid"])


def asked(number, acts=(), epochs=EPOCHS):
    config: Any = {
        "number": number, "rule": "bp", "epochs": epochs, "seeds": [1], "final": False,
        "searched": dict(acts), "command": "", "options": {},
    }  # fmt: skip
    return Asked(number, config)


def play(folder, *trials, at_once=1, observe=lambda event: None, source=None, epochs=EPOCHS):
    """Runs trials, each with its acts by epoch; trials of a score below 0 are stopped."""
    with closing(EventLog(folder)) as log:
        watch, over_cap, said = Watch(), [], []
        records = replay(log.events())
        backend = tiny.backend(tiny.played(), folder, lambda: over_cap.append(1), said.append)
        listed = from_list(asked(number, acts, epochs) for number, acts in enumerate(trials))
        loop = study_loop(
            log, records, source or listed, lambda records, trial: trial.scores[-1] < 0,
            mean_score("valid_accuracy", 1), backend.start, lambda: at_once, observe,
            partial(steering.events_of, add=None, say=said.append),
        )  # fmt: skip
        backend.run(loop, [watch])
        reported = [
            (logged.event.trial, logged.event.epoch)
            for logged in log.events()
            if isinstance(logged.event, EpochDone)
        ]
    in_ray = ExperimentAnalysis(str(folder / ray_backend.FOLDER)).trials or []
    by_number = {trial.config["number"]: trial for trial in in_ray}
    assert len(by_number) == len(in_ray)
    return Played(records, by_number, reported, watch.workers, len(over_cap), said)


STUDY = (
    {}, {"2": "raise"}, {"2": -1.0}, {"2": "over cap"}, {"2": "die once"}, {}, {"2": "die"},
)  # fmt: skip
WHOLE, RAISED, STOPPED, OVER_CAP, DIED_ONCE, AFTER_DEATH, DIED = range(7)


@pytest.fixture(scope="module")
def played(one_ray, impatient, tmp_path_factory):
    before = dict(os.environ)
    played = play(tmp_path_factory.mktemp("played"), *STUDY)
    assert dict(os.environ) == before  # Tune's switches, too
    return played


def test_every_end_in_the_log(played):
    assert {n: (r.state, r.reason, r.epochs) for n, r in played.records.items()} == {
        WHOLE: (COMPLETE, None, EPOCHS),
        RAISED: (FAILED, "RuntimeError: planted", 1),
        STOPPED: (PRUNED, None, 2),
        OVER_CAP: (COMPLETE, None, EPOCHS),
        DIED_ONCE: (COMPLETE, None, EPOCHS),
        AFTER_DEATH: (COMPLETE, None, EPOCHS),
        DIED: (FAILED, "worker lost 2 times", 1),
    }
    assert played.over_cap == 1


def test_what_a_lost_worker_costs_is_said(played):
    (node,) = ray.nodes()
    lost = f"a worker on {node['NodeManagerAddress']} is lost: trial"
    assert all(line.startswith(lost) and "epoch" in line for line in played.said)
    assert str(DIED_ONCE) in played.said[0] and str(DIED) in played.said[-1]


def test_every_end_in_ray(played):
    failed = {RAISED, DIED}
    assert {n: trial.status for n, trial in played.ray.items()} == {
        n: "ERROR" if n in failed else "TERMINATED" for n in range(len(STUDY))
    }
    # What raises is not tried again; what loses its worker is, once.
    lost = {RAISED: 1, DIED_ONCE: 1, DIED: ray_backend.WORKERS_LOST + 1}
    assert {n: trial.num_failures for n, trial in played.ray.items()} == {
        n: lost.get(n, 0) for n in range(len(STUDY))
    }


def test_what_a_trial_reports_again_is_in_the_log_once(played):
    assert len(played.epochs) == len({*played.epochs})
    assert [epoch for trial, epoch in played.epochs if trial == DIED_ONCE] == [1, 2, 3]


def test_workers_are_reused_until_they_die(played):
    """One until a trial raises, one until the first death, and one until each of the others."""
    assert len(played.workers) == 1 + 1 + ray_backend.WORKERS_LOST + 1


def test_deaths_count_only_if_nothing_has_come_of_it(tmp_path):
    """As on machines that are taken away again and again."""
    epochs = ray_backend.WORKERS_LOST + 2
    deaths = {str(epoch): "die in each" for epoch in range(1, epochs + 1)}
    (record,) = play(tmp_path, deaths, epochs=epochs).records.values()
    assert (record.state, record.epochs) == (COMPLETE, epochs)


@pytest.mark.parametrize(("surveyed", "state"), [(True, FAILED), (False, COMPLETE)])
def test_deaths_count_only_where_all_machines_have_proved_themselves(
    surveyed, state, tmp_path, monkeypatch
):
    """On one that has just joined, it may be that no worker can live."""
    there = tiny.cluster_of_one()
    there.surveying = lambda: not surveyed
    monkeypatch.setattr(tiny, "cluster_of_one", lambda: there)
    (record,) = play(tmp_path, {"1": "die twice"}).records.values()
    assert record.state == state


def test_a_worker_that_is_silent_is_ended_and_its_trial_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_backend, "QUIET_SECONDS", 3.0)
    monkeypatch.setattr(ray_backend, "PATIENCE", 1.0)
    played = play(tmp_path, {"2": "hang"})
    assert [record.state for record in played.records.values()] == [COMPLETE]
    assert played.said[0].startswith("trial 0 has been silent for ")
    assert played.said[-1].endswith("is lost: trial 0 goes on from epoch 0")


def test_a_process_is_ended_when_all_of_its_trials_are_silent(tmp_path, monkeypatch):
    """One of them may wait for a program to be compiled."""
    ended, said = [], []
    monkeypatch.setattr(ray_backend, "end_process", lambda *of: ended.append(of))
    backend = tiny.backend(tiny.played(), tmp_path, say=said.append)
    silent, late = ray_backend.QUIET_SECONDS + 1, ray_backend.QUIET_SECONDS - 1
    heard = {0: (7, 0.0), 1: (7, silent - late), 2: (8, 0.0), 3: (9, silent)}
    backend.running = {n: Running(when, "here", pid) for n, (pid, when) in heard.items()}
    backend._end_the_silent(silent)
    assert ended == [("here", 8)]
    backend.running[1].heard = 0.0
    backend._end_the_silent(silent)
    assert ended == [("here", 8), ("here", 7)]
    assert said[1] == "trials 0, 1 have been silent for 61 s: their worker is ended"


def test_a_server_that_waits_for_its_gpu_is_said_once(tmp_path, monkeypatch):
    said = []
    backend = tiny.backend(tiny.played(), tmp_path, say=said.append)
    (machine,) = backend.machines.all.values()
    answers = {"waits": False, "there": True}
    monkeypatch.setattr(
        ray_backend.ray, "wait", lambda refs, timeout: ([r for r in refs if answers[r]], [])
    )
    backend.unplaced = {f"lanes-{machine.id}-{answer}": (answer, 0.0) for answer in answers}
    backend._say_unplaced(ray_backend.PLACE_SECONDS)
    assert not said and [*backend.unplaced] == [f"lanes-{machine.id}-waits"]
    for _ in range(2):
        backend._say_unplaced(ray_backend.PLACE_SECONDS + 1)
    assert len(said) == 1 and said[0].startswith(f"{machine.address}: no lane server has begun")


def test_a_server_that_is_not_there_yet_holds_up_no_trial(monkeypatch):
    """As when another job has its GPU."""

    @ray.remote(num_cpus=0)
    class Server:
        def __init__(self, word):
            self.word, self.asked = word, []

        def admit(self, *asked):
            self.asked.append(asked)
            return True

        def told(self):
            return self.word, self.asked

        def release(self, number):
            """Has nothing to forget."""

    monkeypatch.setattr(worker, "ANSWER_SECONDS", 0.5)
    need: Any = {"id": "admission"}
    names = [worker.server_name(need, machine, 0) for machine in "ab"]
    waits = Server.options(name=names[0], resources={"nowhere": 1}).remote("waits")
    there = Server.options(name=names[1]).remote("there")
    ray.get(there.told.remote())
    order: Any = {
        "number": 0, "seeds": [1, 2], "left_out": [], "apart": False,
        "policy": {"need": need, "lanes": 8},
    }  # fmt: skip
    for apart in (False, True):
        chosen, unanswered = worker._admitted({**order, "apart": apart})
        assert [*unanswered] == names[:1]
        assert ray.get(chosen.told.remote())[0] == "there"
    assert ray.get(there.told.remote())[1] == [(0, 2), (0, 8)]
    for server in (waits, there):
        ray.kill(server)


def test_a_server_finds_a_place_beside_trials_and_forgets_those_that_have_ended(tmp_path):
    @ray.remote
    class Holder:
        def ready(self):
            """Has all of the machine's cores."""

    holder = Holder.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    ray.get(holder.ready.remote())
    backend = tiny.backend(tiny.played(), tmp_path)
    backend.policy.update(need={"id": "place"}, lanes=2)  # type: ignore[typeddict-item]
    (machine,) = backend.machines.all.values()
    machine.servers = 1
    backend.serve()
    (server,) = backend.servers.values()
    admit = lambda *asked: ray.get(server.admit.remote(*asked))
    assert admit(0, 2) and not admit(1, 1)
    backend.tell = lambda outcome: True
    epoch = {"epoch": 1, "metrics": {}, "diverged": {}, "place": {}}
    report = json.dumps({"epochs": [epoch]})
    trial: Any = SimpleNamespace(config=asked(0).config, num_failures=0)
    assert backend.hear(trial, {"pid": 0, ray_backend.REPORT: report})
    while not admit(1, 1):  # until it has heard that the first has ended; no worker tells it
        pass
    for actor in (holder, server):
        ray.kill(actor)


def test_an_obstacle_ends_the_study(tmp_path):
    with pytest.raises(StudyStopped, match="No space left on device: there"):
        play(tmp_path, {"2": "full"}, {})
    with closing(EventLog(tmp_path)) as log:
        (record,) = replay(log.events()).values()
    assert (record.state, record.epochs) == (WAITING, 2)  # it can go on


def test_a_proposal_that_raises_ends_the_study(tmp_path):
    planted = ValueError("no such option")

    def source(records):
        if records:
            raise planted
        return [asked(0)]

    with pytest.raises(ValueError, match="no such option") as raised:
        play(tmp_path, source=source)
    assert raised.value is planted


@pytest.mark.parametrize("then", [steering.UNPAUSE, steering.STOP])
def test_a_paused_study_that_runs_nothing_still_takes_instructions(then, tmp_path):
    """Tune then asks for a trial for minutes, and looks for nothing else, not even Ctrl-C."""

    steering.give(tmp_path, steering.PAUSE)  # taken in while the first trial begins

    def steer(event):
        if isinstance(event, Ended) and event.trial == 0:
            steering.give(tmp_path, then)

    slow = {str(epoch): "stay" for epoch in range(1, EPOCHS + 1)}
    done = play(tmp_path, slow, {}, observe=steer)
    went_on = then == steering.UNPAUSE
    assert [r.state for r in done.records.values()] == [COMPLETE] * (1 + went_on)
    words = "not paused any more" if went_on else "stopped by hand"
    assert done.said[:2] == ["paused: no further trial begins", words]
    assert not [*(tmp_path / steering.FOLDER).glob("*.json")]


def test_ctrl_c_ends_the_study_and_the_next_session_has_the_rest(tmp_path):
    """Ray's own record is then of those trials alone."""

    def interrupt(event):
        if isinstance(event, EpochDone) and event.trial == 1:
            signal.raise_signal(signal.SIGINT)

    trials = {}, {"2": "wait"}, {}
    first = play(tmp_path, *trials, observe=interrupt)
    assert [r.state for r in first.records.values()] == [COMPLETE, RUNNING]
    (tmp_path / ray_backend.FOLDER).rename(tmp_path / "before")
    (tmp_path / "go").touch()
    second = play(tmp_path, *trials)
    assert [r.state for r in second.records.values()] == [COMPLETE] * 3
    assert sorted(second.ray) == [1, 2]
    assert sorted(second.epochs) == [(n, e) for n in range(3) for e in range(1, EPOCHS + 1)]
