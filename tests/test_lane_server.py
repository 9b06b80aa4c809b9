"""Studies whose trials are lanes of servers: the same as if each had a worker of its own."""

import json
import os
import signal
import threading
import time
from contextlib import closing
from typing import Any

import jax
import pytest
import ray
import tiny
from ray import tune
from test_worker import computed, report_of, trial_config

from disinhib import checkpoint, lanes, memory, training
from disinhib.tuning import engine, options, ray_backend, study, worker
from disinhib.tuning.event_log import COMPLETE, FAILED, LANES, PRUNED, EpochDone, EventLog
from disinhib.tuning.lane_group import Group, Process
from disinhib.tuning.lane_server import Released, Server
from disinhib.tuning.retention import checkpoint_file
from disinhib.tuning.worker import FAILURE, PROCESS
from search_spaces import SPACES

source = tiny.source
OF_MACHINE = ("epoch_seconds", "compilations", "compilation_seconds", "peak_memory_mb")


# One server, in this process.


NEEDS: dict[Any, Any] = {}  # by folder; trials of one study have the same


def order(folder, number=0, seeds=(3,), options=(), **policy):
    config = trial_config(folder, number, seeds, options, lanes=4, **policy)
    newest = NEEDS.setdefault(folder, {})  # which a machine shows that it sees
    newest.update(config["policy"]["need"])
    config["policy"]["need"] = newest
    return config


def at_once(server, orders):
    """The results of a step of each, asked for at the same time."""
    results, ready = {}, threading.Barrier(len(orders))

    def step(asked):
        ready.wait()
        results[asked["number"]] = server.step(asked)

    threads = [threading.Thread(target=step, args=[asked]) for asked in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Reports of epochs of a trial that has no neighbours."""
    folder = tmp_path_factory.mktemp("alone")
    server = Server()
    return [computed(server.step(order(folder))) for _ in range(3)]


def without_place(report):
    return {name: value for name, value in report.items() if name != "place"}


def test_a_trial_is_what_it_would_be_alone(alone, tmp_path):
    """Beside others that join and leave, one that diverges, and one of another structure."""
    server = Server(4)
    mine, broken = order(tmp_path), order(tmp_path, 1, options=["optimizer.learning_rate=1e30"])
    other = order(tmp_path, 2, seeds=[5, 6], options=["optimizer.learning_rate=0.1"])
    apart = order(tmp_path, 3, options=["model.vf.sizes_hidden=[9]"])
    first = at_once(server, [mine, broken, apart])
    assert first[1][FAILURE].startswith("Diverged: ")
    server.release(1)
    second = at_once(server, [mine, other])
    server.step(other)  # while the first is not asked for
    third = at_once(server, [mine, other, apart])
    mine_told = [computed(results[0]) for results in (first, second, third)]
    assert [*map(without_place, mine_told)] == [*map(without_place, alone)]
    assert {int(told["place"][LANES]) for told in mine_told} <= {1, 2, 3}
    assert report_of(third[2])["epoch"] == 3 and report_of(third[3])["epoch"] == 2


def test_there_is_room_for_so_many_lanes():
    server = worker.Admission(4)
    assert server.admit(0, 2) and server.admit(1, 2)
    assert not server.admit(2, 1)
    assert server.admit(1, 2)  # it has its own
    server.release(0)
    assert server.admit(2, 1)
    assert worker.Admission(4).admit(0, 10)  # more than there are slots: it trains alone


def test_an_error_in_one_trial_fails_no_other(alone, tmp_path, monkeypatch):
    """Planted: as its state is saved."""
    save = checkpoint.save

    def broken(file, *args):
        if file == checkpoint_file(tmp_path, 1):
            raise ValueError("planted")
        return save(file, *args)

    monkeypatch.setattr(checkpoint, "save", broken)
    server = Server(4)
    orders = [order(tmp_path, number, every_seconds=0) for number in (0, 1)]
    results = at_once(server, orders)
    assert results[1][FAILURE] == "ValueError: planted"
    told = [results[0], server.step(orders[0])]
    assert [without_place(computed(r)) for r in told] == [*map(without_place, alone[:2])]


def test_an_error_of_all_that_train_leaves_those_alone_that_do_not(alone, tmp_path, monkeypatch):
    """Planted: amid an epoch in which one trial is not asked for."""
    server = Server(4)
    orders = [order(tmp_path, number) for number in (0, 1)]
    first = at_once(server, orders)
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "advance", lambda *_: 1 / 0)
        while FAILURE not in (result := server.step(orders[1])):  # epochs that were run ahead
            pass
        assert result[FAILURE].startswith("ZeroDivisionError")
    told = [first[0], server.step(orders[0]), server.step(orders[0])]
    assert [without_place(computed(r)) for r in told] == [*map(without_place, alone)]
    assert server.step(orders[1])[FAILURE].startswith("ZeroDivisionError")  # it stays so


def out_of_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def train_to_the_end(folder, number=4, **policy):
    """What four trials tell that are asked for at once."""
    server = Server(number)
    orders = [order(folder, n, stretch_seconds=1e9, **policy) for n in range(number)]
    results = at_once(server, orders)
    return [json.loads(results[n]["report"])["epochs"] for n in range(number)]


def check_epochs(told, alone):
    assert [epoch["epoch"] for epoch in told] == [1, 2, 3, 4]
    for epoch, expected in zip(told, alone, strict=False):
        assert epoch["metrics"]["valid_loss"] == expected["metrics"]["valid_loss"]


@pytest.mark.parametrize("name", ["advance", "resized", "join"])
def test_what_does_not_fit_goes_on_with_half_of_the_slots(alone, tmp_path, monkeypatch, name):
    """Planted: more than two slots are too much for the memory, also when they are made."""
    works, tried = getattr(lanes, name), []

    def scarce(*arguments):
        slots = next(len(x.names) for x in arguments if isinstance(x, lanes.Lanes))
        tried.append(max(slots, arguments[1]) if name == "resized" else slots)
        return out_of_memory() if tried[-1] > 2 else works(*arguments)

    monkeypatch.setattr(lanes, name, scarce)
    for told in train_to_the_end(tmp_path):
        check_epochs(told, alone)
    assert sum(slots > 2 for slots in tried) == 1


def test_states_are_kept_on_the_host_if_the_device_has_no_memory(alone, tmp_path, monkeypatch):
    """Planted: as lanes are taken out, to be saved or to go on with half as many."""
    advance = lanes.advance

    def scarce(run, data, slots):
        return out_of_memory() if len(slots.names) > 2 else advance(run, data, slots)

    monkeypatch.setattr(lanes, "advance", scarce)
    monkeypatch.setattr(lanes, "_taken", out_of_memory)
    for told in train_to_the_end(tmp_path, every_seconds=0):
        check_epochs(told, alone)
    for number in range(4):
        assert checkpoint_file(tmp_path, number).exists()


def test_a_number_of_slots_whose_program_cannot_be_compiled_does_not_fit(
    alone, tmp_path, monkeypatch
):
    needed = lanes.bytes_needed
    scarce = lambda run, data, slots: out_of_memory() if slots > 1 else needed(run, data, slots)
    monkeypatch.setattr(memory, "device_mb", lambda: 1e5)
    monkeypatch.setattr(lanes, "bytes_needed", scarce)
    (told,) = train_to_the_end(tmp_path, 1)
    check_epochs(told, alone)


@pytest.mark.parametrize("place", [(lanes, "advance"), (training, "initial_state")])
def test_a_structure_gets_memory_that_another_one_has(alone, tmp_path, monkeypatch, place):
    """Planted: the device holds three slots in all, or no first state beside three."""
    works, server = getattr(*place), Server(4)
    held = lambda: sum(g.slots for g in server.process.groups.values() if g.lanes is not None)
    most = 3 if place[0] is lanes else 2
    orders = [order(tmp_path, number) for number in range(3)]
    told = at_once(server, orders)
    assert held() == 3
    scarce = lambda *arguments: out_of_memory() if held() > most else works(*arguments)
    monkeypatch.setattr(*place, scarce)
    other = order(tmp_path, 3, options=["model.vf.sizes_hidden=[9]"])
    assert report_of(server.step(other))["epoch"] == 1
    assert held() <= 2
    told = [told[0], server.step(orders[0])]
    assert [without_place(computed(result)) for result in told] == [*map(without_place, alone[:2])]


def test_what_fits_nowhere_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "advance", out_of_memory)
    server = Server(4)
    results = at_once(server, [order(tmp_path, number) for number in range(2)])
    assert all("RESOURCE_EXHAUSTED" in result[FAILURE] for result in results.values())


def test_a_network_too_large_for_the_device_takes_nothing_from_others(tmp_path, monkeypatch):
    advance, server = lanes.advance, Server(4)
    at_once(server, [order(tmp_path, number) for number in range(3)])
    (group,) = server.process.groups.values()
    large = order(tmp_path, 3, options=["model.vf.sizes_hidden=[9]"])
    fails = lambda run, *rest: (
        out_of_memory() if run.architecture.sizes[1] == 9 else advance(run, *rest)
    )
    monkeypatch.setattr(lanes, "advance", fails)
    monkeypatch.setattr(lanes, "bytes_needed", lambda *_: 10**12)
    monkeypatch.setattr(memory, "device_mb", lambda: 1e5)
    assert "RESOURCE_EXHAUSTED" in server.step(large)[FAILURE]
    assert group.slots == 3


def test_who_needs_the_turn_for_a_moment_goes_before_those_that_train():
    nothing: Any = None
    group, went = Group("", nothing, nothing, 8, Process()), []

    def takes(name, *to_train):
        with group._turn(*to_train):
            went.append(name)

    threads = [
        threading.Thread(target=takes, args=["trains", lambda: True]),
        threading.Thread(target=takes, args=["for a moment"]),
    ]
    with group._turn():
        for thread in threads:
            thread.start()
        while not group.others:
            threads[1].join(0.01)
    for thread in threads:
        thread.join()
    assert went == ["for a moment", "trains"]


def test_fewer_slots_than_lanes_that_stay_are_not_made(tmp_path):
    """After a trial of four seeds, for which there were more slots than else fit."""
    server = Server(8)
    many, *others = (order(tmp_path, n, seeds=[1, 2, 3, 4][: 4 if n == 0 else 1]) for n in range(5))
    at_once(server, others[:2])
    (group,) = server.process.groups.values()
    group.most = 2
    at_once(server, [many, *others])
    server.release(0)
    results = at_once(server, others)
    assert not any(FAILURE in result for result in results.values())


def test_a_trial_joins_the_group_whose_last_trial_is_still_being_trained(tmp_path, monkeypatch):
    """A second group of that structure would take as much memory again."""
    advance, amid, go_on = lanes.advance, threading.Event(), threading.Event()

    def slow(*arguments):
        amid.set()
        assert go_on.wait(60)
        return advance(*arguments)

    monkeypatch.setattr(lanes, "advance", slow)
    server, first, second = Server(4), order(tmp_path, 0), order(tmp_path, 1)
    released: list[Any] = []

    def step():
        try:
            server.step(first)
        except Released as error:
            released.append(error)

    threads = [threading.Thread(target=step), threading.Thread(target=server.step, args=[second])]
    threads[0].start()
    assert amid.wait(60)
    (group,) = server.process.groups.values()
    server.release(0)
    threads[1].start()
    while not group.trials:  # the second has not begun
        threads[1].join(0.01)
    assert [*server.process.groups.values()] == [group]
    go_on.set()
    for thread in threads:
        thread.join()
    assert released and server.trials[1].group is group
    server.release(1)
    assert not server.process.groups


def test_an_epoch_counts_the_programs_that_its_own_structure_compiled(tmp_path):
    server = Server(4)
    mine = order(tmp_path)
    other = order(tmp_path, 1, options=["model.vf.sizes_hidden=[23]"])
    server.step(mine)
    begun = report_of(server.step(other))["metrics"]
    later = report_of(server.step(mine))["metrics"]
    assert later["compilations"] == [0.0] and later["compilation_seconds"] == [0.0]
    assert 0 < begun["compilation_seconds"][0] < begun["epoch_seconds"][0]


def test_a_step_ends_where_the_driver_decides(tmp_path):
    server = Server(4)
    asked = order(tmp_path, stretch_seconds=1e9)
    asked["decisions"] = [1, 3]
    told = [json.loads(server.step(asked)["report"])["epochs"] for _ in range(3)]
    assert [[epoch["epoch"] for epoch in epochs] for epochs in told] == [[1], [2, 3], [4]]


@pytest.mark.usefixtures("recompiled")
def test_in_one_program_a_trial_is_what_it_would_be_alone(alone, tmp_path, monkeypatch):
    """As on a GPU, whose slots stay when a trial goes; to float32's rounding. They begin as those
    that fit, for which the program has been compiled."""
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    server = Server(4)
    mine, other = order(tmp_path), order(tmp_path, 1, options=["optimizer.learning_rate=0.1"])
    told = [computed(at_once(server, orders)[0]) for orders in ([mine], [mine, other], [mine])]
    slots = [epoch["place"][LANES] for epoch in told]
    assert slots == ["4", "4", "4"]
    for epoch, expected in zip(told, alone, strict=True):
        for name in ("train_CL_loss", "valid_loss"):
            assert epoch["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-5)


def test_slots_are_given_up_when_they_were_free_for_as_long_as_a_program_compiles(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    nothing: Any = None
    group: Any = Group("", nothing, nothing, 8, Process())

    def slots(needed, least=1):
        group.slots = group._slots(needed, least)
        return group.slots

    assert slots(1) == 8
    group.compiling, group.quiet = 20.0, 19.0
    assert slots(1) == 8
    group.quiet = 21.0
    assert slots(1) == 2  # a quarter of what fits
    assert slots(3) == 4
    assert slots(30) == 8
    assert slots(10, least=10) == 10  # the seeds of one trial stay together


def test_a_trial_is_trained_ahead_while_the_driver_is_busy(alone, tmp_path):
    """To the epoch after its next decision, and not its last epoch; what it then tells is what it
    would have told."""
    server = Server(4)
    busy, other = order(tmp_path), order(tmp_path, 1)
    busy["decisions"] = [2]
    at_once(server, [busy, other])
    for _ in range(3):
        server.step(other)
    trial = server.trials[0]
    assert (trial.told, len(trial.reports)) == (1, 3)
    told = [computed(server.step(busy)) for _ in range(2)]
    assert [*map(without_place, told)] == [*map(without_place, alone[1:])]


def test_an_epoch_that_is_to_be_saved_is_not_run_ahead(tmp_path):
    server = Server(4)
    busy, other = order(tmp_path, every_seconds=0), order(tmp_path, 1)
    at_once(server, [busy, other])
    for _ in range(2):
        server.step(other)
    trial = server.trials[0]
    assert (trial.told, len(trial.reports), trial.saved_epochs) == (1, 1, 1)


# Whole studies.


TRIALS, PRUNED_TRIAL, DIVERGED_TRIAL = 6, 4, 5


def space(trial):
    """Of back-propagation; one trial cannot learn, one diverges."""
    rate = trial.suggest_float("optimizer.learning_rate", 1e-3, 2e-2, log=True)
    rate = {PRUNED_TRIAL: 1e-12, DIVERGED_TRIAL: 1e30}.get(trial.number, rate)
    return {"model/vf": "non-dale", "trainer": "bp", "optimizer.learning_rate": rate}


def asked(folder, *overrides):
    return options.compose(
        [
            *("experiment=smoke", "space=of_lanes", f"trials={TRIALS}", "epochs=4"),
            *("searcher.deterministic=true", "searcher.batch=4", "scheduler.grace_period=1"),
            *("searcher.balanced=false", "study=lanes", f"out_dir={folder}", *overrides),
        ]
    )


def outcome(folder):
    """What the log says of each trial, but for clocks and memory."""
    with closing(EventLog(folder, existing=True)) as log:
        told = {}
        for _, _, event in log.events():
            body = {**vars(event)}
            body.pop("place", None)
            if isinstance(event, EpochDone):
                kept = {n: v for n, v in event.metrics.items() if n not in OF_MACHINE}
                body["metrics"] = kept
            told.setdefault(event.trial, []).append((event.kind, body))
    return told


@pytest.fixture(scope="module")
def apart(source, copied_stores, mlflow_here, one_ray, tmp_path_factory):
    """What a study leaves whose trials have a worker each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPACES, "of_lanes", space)
        yield of_workers(tmp_path_factory)


def of_workers(tmp_path_factory):
    alone = "cluster.max_concurrent=1"  # as each worker takes seconds to start
    described = asked(tmp_path_factory.mktemp("apart"), "cluster.lanes=1", alone)
    done = study.run(described, tiny.quiet())
    assert {record.state for record in done.records} == {COMPLETE, PRUNED, FAILED}
    return outcome(described.folder)


def test_a_study_in_lanes_is_the_same_study(apart, tmp_path):
    """With early stopping, a lane that diverges, and more trials than slots; however many run at a
    time (`searcher.deterministic=true`)."""
    described = asked(tmp_path, "cluster.lanes=2")
    done = study.run(described, tiny.quiet())
    assert done.whole and outcome(described.folder) == apart


def test_a_server_that_is_killed_costs_no_trial_and_no_epoch(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "STRETCH_OF_LANES", 0.0)

    class Killer(tune.Callback):
        """Ends the server that is the first to report a second epoch."""

        def __init__(self):
            self.killed = []

        def on_trial_result(self, *, result, **_):
            if not self.killed and result["training_iteration"] == 2:
                self.killed.append(result[PROCESS])
                os.kill(result[PROCESS], signal.SIGKILL)

    killer = Killer()
    described = asked(tmp_path, "cluster.lanes=8", "checkpoints.every_seconds=0")
    done = study.run(described, tiny.quiet(), callbacks=[killer])
    assert killer.killed and done.whole and outcome(described.folder) == apart


def test_a_trial_that_ends_its_server_again_and_again_fails_alone(
    source, copied_stores, mlflow_here, one_ray, tmp_path, monkeypatch
):
    """As a kernel of the operating system would, for its memory: all that it takes down with it are
    suspects, and train apart."""
    culprit = 1

    class Fragile:  # here, so that it goes to Ray's workers by value
        """It ends when all four are in it, or the culprit apart; the others are admitted beside the
        culprit, or apart."""

        def __init__(self, lanes):
            self.admission, self.server = worker.Admission(lanes), Server(lanes)

        def ready(self):
            """It is."""

        def admit(self, number, lanes):
            beside = number == culprit or culprit in self.admission.held
            allowed = beside or lanes == self.admission.lanes
            return allowed and self.admission.admit(number, lanes)

        def step(self, order, anew):
            if order["number"] == culprit:
                while not order["apart"] and len(self.admission.held) < 4:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if anew and not order["apart"]:
                threading.Event().wait()
            return {**self.server.step(order, anew), **worker.identity()}

        def release(self, number):
            self.admission.release(number)
            self.server.release(number)

    monkeypatch.setitem(SPACES, "of_lanes", space)
    monkeypatch.setattr(ray_backend, "LaneServer", ray.remote(Fragile))
    monkeypatch.setattr(ray_backend, "WORKERS_LOST", 2)
    monkeypatch.setattr(ray_backend, "SUSPECTED", 1)
    one = "cluster.max_concurrent=4"  # server
    done = study.run(asked(tmp_path, "cluster.lanes=4", "trials=4", one), tiny.quiet())
    states = {record.number: (record.state, record.reason) for record in done.records}
    assert states.pop(culprit) == (FAILED, "worker lost 3 times")
    assert [*states] == [0, 2, 3]
    assert {state for state, _ in states.values()} <= {COMPLETE, PRUNED}
