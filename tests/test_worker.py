"""One trial, as a Ray worker runs it but without Ray's cluster: what it reports, keeps and
repeats."""

import errno
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from ray.air.constants import TRAINING_ITERATION

import disinhib
from disinhib import checkpoint, data, hydra_config, training
from disinhib.config import parse
from disinhib.tuning import environment, lane_server, machines
from disinhib.tuning.event_log import over_seeds
from disinhib.tuning.retention import checkpoint_file, model_file
from disinhib.tuning.worker import FAILURE, MACHINE, REPORT, SAVED, TrainingTrial

EPOCHS = 4
SEEDS = [3, 4]
OPTIONS = [
    *("model/vf=non-dale", "trainer=bp", f"epochs={EPOCHS}"),
    *("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[8]", "batchsize=100"),
]
OF_MACHINE = ("epoch_seconds", "compilations", "compilation_seconds", "peak_memory_mb")


@pytest.fixture(scope="module", autouse=True)
def settings_of_jax(tmp_path_factory):
    """Workers set some of their own, for all of their process."""
    names = (
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        # Ray's Trainable makes a folder.
        patch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH",
                      str(tmp_path_factory.mktemp("ray")), raising=False)  # fmt: skip
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def trial_config(folder, number=0, seeds=SEEDS, options=(), final=False, **policy):
    """What a worker gets, as it gets it."""
    composed, choices = hydra_config.compose("train", [*OPTIONS, *options])
    need = machines.require(Path(folder), [("digits", None, 0.1)], 0)
    config = {
        "number": number, "rule": choices["trainer"], "searched": {}, "command": "",
        "options": composed, "seeds": list(seeds), "epochs": EPOCHS, "final": final,
        "policy": {
            "folder": str(folder), "every_seconds": math.inf, "at_end": False,
            "cap_bytes": math.inf, "need": need, "stretch_seconds": 0, "lanes": 1, **policy,
        },
        "decisions": [], "left_out": [],
    }  # fmt: skip
    return json.loads(json.dumps(config))


@pytest.fixture
def configure(tmp_path):
    """`configure(number=, seeds=, options=, final=, **policy)`: a worker's configuration."""
    return lambda *args, **kwargs: trial_config(tmp_path, *args, **kwargs)


def steps(worker, count):
    return [worker.step() for _ in range(count)]


def report_of(result):
    """What it says of its one epoch, and beside."""
    report = json.loads(result[REPORT])
    (epoch,) = report.pop("epochs")
    return {**epoch, **report}


def computed(result):
    """What follows from options and seeds."""
    report = report_of(result)
    metrics = {n: values for n, values in report["metrics"].items() if n not in OF_MACHINE}
    return {**report, "metrics": metrics}


@pytest.fixture(scope="module")
def whole(settings_of_jax, tmp_path_factory):
    """Results of a trial that nothing interrupts."""
    return steps(TrainingTrial(trial_config(tmp_path_factory.mktemp("none"))), EPOCHS)


# What it reports.


def test_a_step_is_an_epoch_and_no_step_ends_the_trial(whole):
    """The study loop ends it: of a result that says `done`, Tune would not tell its scheduler."""
    assert [result[TRAINING_ITERATION] for result in whole] == [1, 2, 3, 4]
    for epoch, result in enumerate(whole, start=1):
        assert "done" not in result and FAILURE not in result
        report = report_of(result)
        assert report.keys() == {"epoch", "metrics", "place", "diverged"}
        assert report["epoch"] == epoch and report["diverged"] == {}
        for values in report["metrics"].values():
            assert len(values) in (1, len(SEEDS)) and np.isfinite(values).all()
        assert report["place"] == {
            "device": jax.devices()[0].device_kind, "host": platform.node(),
        }  # fmt: skip


def test_ray_shows_means_and_spreads_over_seeds(whole):
    for result in whole:
        expected = over_seeds(report_of(result)["metrics"])
        assert {name: result[name] for name in expected} == expected


def test_each_seed_is_trained_as_if_alone(whole, configure):
    # The same seed twice is that seed alone, and the program is the same one.
    for lane, seed in enumerate(SEEDS):
        alone = steps(TrainingTrial(configure(seeds=[seed, seed])), 2)
        for epoch in (0, 1):
            together, by_itself = (report_of(r[epoch])["metrics"] for r in (whole, alone))
            for name in ("valid_accuracy", "valid_loss", "train_CL_loss"):
                assert by_itself[name][0] == by_itself[name][1]
                assert together[name][lane] == pytest.approx(by_itself[name][0], rel=1e-6)
    assert len({*report_of(whole[0])["metrics"]["train_CL_loss"]}) == len(SEEDS)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_means_and_standard_deviations_over_seeds(values):
    summary = over_seeds({"a": values, "b": [1.0] * len(values)})
    mean = sum(values) / len(values)
    assert summary["a"] == pytest.approx(mean, abs=1e-6) and summary["b"] == 1.0
    if len(values) == 1:
        assert summary.keys() == {"a", "b"}
    else:
        squares = sum((value - mean) ** 2 for value in values)
        assert summary["a_sd"] == pytest.approx(math.sqrt(squares / (len(values) - 1)), abs=1e-5)
        assert summary["b_sd"] == 0.0


def test_seeds_that_have_diverged_are_left_out_of_the_mean():
    summary = over_seeds({"a": [1.0, math.nan, 3.0], "b": [math.nan, math.nan]})
    assert summary["a"] == 2.0 and summary["a_sd"] == pytest.approx(math.sqrt(2))
    assert math.isnan(summary["b"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["optimizer.learning_rate=1e30"], r"Diverged: .* in epoch 1 \(seed 3\)"),
        # One evaluation of the network is not enough for any sample; the numbers are no score.
        (
            ["model/vf=dale", "trainer=lin-thresh", "solver.max_iterations=1"],
            r"Diverged: train_CL_converged_share is 0\.\d+ in epoch 1",
        ),
    ],
)
def test_a_trial_that_diverges_says_so_and_raises_in_its_next_step(
    options, reason, configure, tmp_path
):
    """So that the driver knows it from the death of a worker, and Ray counts it as an error."""
    worker = TrainingTrial(configure(options=options, every_seconds=0))
    result = worker.step()
    assert FAILURE in result and not {REPORT, MACHINE} & result.keys()
    assert re.match(reason, result[FAILURE])
    with pytest.raises(RuntimeError, match=re.escape(result[FAILURE])):
        worker.step()
    assert list(tmp_path.glob("*.msgpack")) == []


def test_a_worker_that_has_run_a_trial_runs_another_from_its_start(whole, configure):
    worker = TrainingTrial(configure(number=1, seeds=[8, 9], every_seconds=0))
    other = steps(worker, 2)
    assert worker.reset_config(configure(number=0))
    again = steps(worker, 2)
    assert [computed(r) for r in again] == [computed(r) for r in whole[:2]]
    assert computed(other[0])["metrics"] != computed(again[0])["metrics"]
    assert [report_of(r)["metrics"]["compilations"] for r in again] == [[0], [0]]


def test_a_worker_whose_trial_failed_runs_another(whole, configure):
    worker = TrainingTrial(configure(options=["optimizer.learning_rate=1e30"]))
    assert FAILURE in worker.step()
    assert worker.reset_config(configure())
    assert computed(worker.step()) == computed(whole[0])


# Going on.


@pytest.mark.parametrize("epochs", [1, 3, EPOCHS])
def test_a_trial_that_goes_on_repeats_its_reports_and_then_is_as_if_uninterrupted(
    whole, configure, epochs
):
    config = configure(every_seconds=0, at_end=True)
    before = steps(TrainingTrial(config), epochs)
    after = steps(TrainingTrial(config), EPOCHS)
    assert [*map(report_of, after[:epochs])] == [*map(report_of, before)]  # clocks and all
    assert [r[SAVED] for r in before] == [*range(1, epochs + 1)]
    assert [r[SAVED] for r in after[:epochs]] == [epochs] * epochs
    assert [computed(r) for r in after] == [computed(r) for r in whole]


def test_it_goes_on_from_its_last_checkpoint_not_from_its_last_epoch(whole, configure, monkeypatch):
    config = configure(every_seconds=0)
    worker = TrainingTrial(config)
    worker.step()
    worker._order["policy"]["every_seconds"] = math.inf
    worker.step()
    trained = []
    advance = training.advance
    monkeypatch.setattr(training, "advance", lambda *a: trained.append(1) or advance(*a))
    after = steps(TrainingTrial(configure(every_seconds=0)), 3)
    assert [computed(r) for r in after] == [computed(r) for r in whole[:3]]
    assert len(trained) == 2  # epochs 2 and 3


def test_it_takes_no_other_trials_checkpoint(whole, configure):
    steps(TrainingTrial(configure(number=1, seeds=[8, 9], every_seconds=0)), 2)
    assert computed(TrainingTrial(configure(number=0)).step()) == computed(whole[0])


# When it keeps its state.


@pytest.mark.parametrize(
    ("every_seconds", "at_end", "expected"),
    [(0, True, [1, 2, 3, 4]), (0, False, [1, 2, 3, 3]), (math.inf, True, [0, 0, 0, 4]),
     (math.inf, False, [0, 0, 0, 0])],
)  # fmt: skip
def test_when_there_is_a_checkpoint(configure, tmp_path, every_seconds, at_end, expected):
    config = configure(every_seconds=every_seconds, at_end=at_end)
    worker = TrainingTrial(config)
    file, kept = checkpoint_file(tmp_path, 0), []
    for _ in range(EPOCHS):
        worker.step()
        kept.append(
            len(checkpoint.load(file, parse(config["options"])).results) if file.exists() else 0
        )
    assert kept == expected


def over_cap(result):
    return report_of(result).get("over_cap", False)


@pytest.mark.parametrize(("room", "written"), [(1.01, True), (0.99, False)])
def test_a_checkpoint_over_the_cap_is_not_written_and_said(configure, tmp_path, room, written):
    config = configure(every_seconds=0)
    steps(TrainingTrial(config), 1)
    file = checkpoint_file(tmp_path, 0)
    size = file.stat().st_size
    file.unlink()
    checkpoint_file(tmp_path, 7).write_bytes(b"x" * 10_000)  # of another trial
    (tmp_path / "note.txt").write_bytes(b"x" * 10**6)  # no checkpoint
    config["policy"]["cap_bytes"] = 10_000 + room * size
    # Clocks have a few digits more or less: of a size of several thousand bytes.
    worker = TrainingTrial(config)
    result = worker.step()
    assert file.exists() == written
    assert over_cap(result) == (not written)
    if not written:  # as soon as there is room, it is
        checkpoint_file(tmp_path, 7).unlink()
        assert not over_cap(worker.step()) and file.exists()


def test_its_own_last_checkpoint_takes_no_room_and_stays_if_there_is_none(configure, tmp_path):
    config, file = configure(every_seconds=0), checkpoint_file(tmp_path, 0)
    worker = TrainingTrial(config)
    worker.step()
    worker._order["policy"]["cap_bytes"] = 1.5 * file.stat().st_size
    assert not over_cap(worker.step())
    kept = file.read_bytes()
    worker._order["policy"]["cap_bytes"] = 10.0
    assert over_cap(worker.step())
    assert file.read_bytes() == kept


def test_an_earlier_epochs_checkpoint_is_no_final_state(configure, tmp_path):
    config, file = configure(every_seconds=0, at_end=True), checkpoint_file(tmp_path, 0)
    worker = TrainingTrial(config)
    steps(worker, EPOCHS - 1)
    worker._order["policy"]["cap_bytes"] = 10.0
    assert over_cap(worker.step()) and not file.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_fails_no_trial(whole, configure, tmp_path, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "save", full)
    worker = TrainingTrial(configure(every_seconds=0))
    report = computed(worker.step())
    assert report.pop("obstacle") == f"{os.strerror(code)}: {tmp_path}"
    assert report == computed(whole[0])
    monkeypatch.undo()
    assert "obstacle" not in report_of(worker.step()) and checkpoint_file(tmp_path, 0).exists()


def test_another_error_of_the_disk_is_the_machines(configure, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save", forbidden)
    worker = TrainingTrial(configure(every_seconds=0))
    assert worker.step()[MACHINE].startswith(f"{platform.node()}: PermissionError: ")
    with pytest.raises(RuntimeError, match="PermissionError"):
        worker.step()


def test_a_checkpoint_that_the_driver_removes_meanwhile_fails_no_other_trial(configure, tmp_path):
    gone = checkpoint_file(tmp_path, 7)
    gone.symlink_to(tmp_path / "nowhere")  # is listed, and has no size
    TrainingTrial(configure(every_seconds=0)).step()
    assert checkpoint_file(tmp_path, 0).exists()


# A final trial: seeds as results of their own.


def final_config(folder, **policy):
    return trial_config(folder, options=["test_at_end=true"], final=True, **policy)


@pytest.fixture(scope="module")
def final(settings_of_jax, tmp_path_factory):
    """(results, folder) of a final trial."""
    folder = tmp_path_factory.mktemp("final")
    return steps(TrainingTrial(final_config(folder)), EPOCHS), folder


def test_a_final_trial_opens_the_test_set_after_its_last_epoch(whole, final):
    results, _ = final
    *earlier, last = (computed(result) for result in results)
    assert earlier == [computed(result) for result in whole[:-1]]
    tests = {name for name in last["metrics"] if name.startswith("test_")}
    assert tests == {"test_accuracy", "test_loss"}
    without = {name: values for name, values in last["metrics"].items() if name not in tests}
    assert without == computed(whole[-1])["metrics"]
    assert last["flags"] == {}


def test_it_leaves_a_model_of_each_seed_as_good_as_it_says(final):
    results, folder = final
    images, labels = data.load("digits", None, 0.2).test
    for lane, seed in enumerate(SEEDS):
        network, parameters = disinhib.load(model_file(folder, 0, seed))
        output = network(parameters, jax.numpy.asarray(images / 16, jax.numpy.float32))
        right = np.mean(np.argmax(np.asarray(output), axis=1) == labels)
        accuracy = report_of(results[-1])["metrics"]["test_accuracy"][lane]
        assert 100 * right == pytest.approx(accuracy, abs=1e-4)


def test_one_that_goes_on_after_its_last_epoch_makes_the_same_report(final):
    results, folder = final
    for model in folder.glob("*.model"):
        model.unlink()
    again = steps(TrainingTrial(final_config(folder)), EPOCHS)
    assert [*map(report_of, again)] == [*map(report_of, results)]
    assert len(list(folder.glob("*.model"))) == len(SEEDS)


def test_a_seed_that_diverges_ends_alone(tmp_path, monkeypatch):
    """Planted: the second of two seeds, in its second epoch."""
    real = training.divergence

    def planted(run, metrics, state, lane):
        broken = lane == 1 and int(state.epoch[1]) >= 2
        return "planted" if broken else real(run, metrics, state, lane)

    monkeypatch.setattr(training, "divergence", planted)
    reports = [report_of(r) for r in steps(TrainingTrial(final_config(tmp_path)), EPOCHS)]
    assert [r["diverged"] for r in reports] == [{}, {"4": "Diverged: planted"}, {}, {}]
    for epoch, report in enumerate(reports, start=1):
        well, broken = report["metrics"]["valid_loss"]
        assert math.isfinite(well) and math.isnan(broken) == (epoch > 1)
    well, broken = reports[-1]["metrics"]["test_accuracy"]
    assert math.isfinite(well) and math.isnan(broken)
    assert [file.name for file in tmp_path.glob("*.model")] == ["0000-3.model"]


# Its environment.


def test_the_pools_of_a_worker_are_of_its_share_of_the_cores():
    shared = environment.of_worker(cpus=1, gpus=0)
    assert shared["PJRT_NPROC"] == "1" and shared["JAX_PLATFORMS"] == "cpu"
    of_gpu = environment.of_worker(cpus=2, gpus=0.5)  # which compiles on all cores
    assert not {"JAX_PLATFORMS", "PJRT_NPROC"} & of_gpu.keys()


def test_trials_that_share_a_gpu_share_its_memory(monkeypatch):
    for name in environment.MEMORY:
        monkeypatch.delenv(name, raising=False)
    mine = lambda gpus: {n: v for n, v in environment.of_worker(1, gpus).items() if "MEM_F" in n}
    assert mine(0) == mine(1) == {}
    assert mine(0.25) == {"XLA_CLIENT_MEM_FRACTION": "0.225"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")  # jax refuses both
    assert mine(0.25) == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}


CORES = """
import os, time
os.sched_setaffinity(0, range(os.cpu_count()))
import jax, jax.numpy as jnp
product = jax.jit(lambda a: jax.lax.fori_loop(0, 40, lambda _, b: jnp.tanh(b @ a), a))
a = jnp.ones((1024, 1024)) / 1024
product(a).block_until_ready()
wall, cpu = time.perf_counter(), time.process_time()
product(a).block_until_ready()
print((time.process_time() - cpu) / (time.perf_counter() - wall))
"""


def test_xla_keeps_to_that_share():
    measured = subprocess.run(
        [sys.executable, "-c", CORES],
        env=os.environ | environment.of_worker(cpus=1, gpus=0),
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(measured.stdout) < 1.2


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (RuntimeError("planted"), FAILURE),
        (ValueError("planted"), FAILURE),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), FAILURE),
        (MemoryError(), FAILURE),
        (jax.errors.JaxRuntimeError("INTERNAL: the device is gone"), MACHINE),
        (OSError(5, "Input/output error"), MACHINE),
        (ImportError("libcudart.so"), MACHINE),
    ],
)
@pytest.mark.parametrize("amid", ["lowered_programs", "advance"])
def test_errors_in_training_are_the_trials_or_the_machines(
    error, key, amid, configure, monkeypatch
):
    def broken(*_):
        raise error

    worker = TrainingTrial(configure())
    monkeypatch.setattr(training, amid, broken)
    (result,) = [worker.train()]
    assert key in result and (FAILURE in result) + (MACHINE in result) == 1
    assert result[key].startswith(platform.node() if key == MACHINE else type(error).__name__)
    with pytest.raises(RuntimeError, match=re.escape(result[key])):
        worker.train()


def test_the_first_epoch_counts_the_time_of_its_programs(configure, monkeypatch):
    worker, preparations = (
        TrainingTrial(configure()),
        iter([(1e6, True), (0.0, False), (0.0, False)]),
    )

    def planted(group):
        seconds, compiled = next(preparations)
        group.preparation += seconds
        return compiled

    monkeypatch.setattr(lane_server.Group, "_prepare", planted)
    first, second = (report_of(result)["metrics"]["epoch_seconds"] for result in steps(worker, 2))
    assert min(first) > 1e6 > max(second)


def test_a_network_that_is_too_large_is_the_trials_fault_from_the_start(configure, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(training, "initial_state", broken)
    assert "RESOURCE_EXHAUSTED" in TrainingTrial(configure()).train()[FAILURE]


def test_data_that_this_machine_lacks_are_the_machines_fault(configure, tmp_path):
    worker = TrainingTrial(configure(options=[f"dataset.path={tmp_path}", "dataset=mnist"]))
    (result,) = [worker.train()]
    assert result[MACHINE].startswith(f"{platform.node()}: DataError: ")
