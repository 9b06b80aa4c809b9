"""One trial, as a Ray worker runs it but without Ray's cluster: what it reports, keeps and repeats;
and which checkpoints of a study stay."""

import errno
import json
import math
import os
import platform

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from disinhib import checkpoint, hydra_config, training
from disinhib.tuning import retention, worker
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED, WAITING, Record
from disinhib.tuning.worker import DISK_FULL, OVER_CAP, TrainingTrial, checkpoint_file, over_lanes

EPOCHS = 4
SEEDS = [3, 4]
OPTIONS = [
    *("model/vf=non-dale", "trainer=bp", f"epochs={EPOCHS}"),
    *("model.vf.nb_hidden=1", "model.vf.sizes_hidden=[8]", "batchsize=100"),
]


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


@pytest.fixture
def told(tmp_path):
    """`told(number=, seeds=, options=, **policy)`: what a worker gets."""

    def make(number=0, seeds=SEEDS, options=(), **policy):
        composed, choices = hydra_config.compose("train", [*OPTIONS, *options])
        config = {
            "number": number,
            "rule": choices["trainer"],
            "searched": {},
            "command": "",
            "options": composed,
            "seeds": list(seeds),
            "epochs": EPOCHS,
            "metric": "valid_accuracy",
        }
        kept = {
            "folder": str(tmp_path),
            "every_seconds": math.inf,
            "at_end": False,
            "cap_bytes": math.inf,
        }
        return json.loads(json.dumps({**config, "checkpoints": {**kept, **policy}}))

    return make


def steps(worker, count):
    return [worker.step() for _ in range(count)]


def computed(result):
    """What follows from options and seeds."""
    clocks = ("epoch_seconds", "epoch_seconds_sd", "compilations", "peak_memory_mb")
    metrics = {n: v for n, v in result["metrics"].items() if n not in clocks}
    return {**result, "metrics": metrics}


@pytest.fixture(scope="module")
def whole(settings_of_jax, tmp_path_factory):
    """Results of a trial that nothing interrupts."""
    options, choices = hydra_config.compose("train", OPTIONS)
    worker = TrainingTrial(
        {
            "number": 0, "rule": choices["trainer"], "searched": {}, "command": "",
            "options": options, "seeds": SEEDS, "epochs": EPOCHS, "metric": "valid_accuracy",
            "checkpoints": {"folder": str(tmp_path_factory.mktemp("none")), "at_end": False,
                            "every_seconds": math.inf, "cap_bytes": math.inf},
        }
    )  # fmt: skip
    return steps(worker, EPOCHS)


# What it reports.


def test_a_step_is_an_epoch_and_the_last_one_is_done(whole, tmp_path):
    assert [r["training_iteration"] for r in whole] == [1, 2, 3, 4]
    assert [r["done"] for r in whole] == [False, False, False, True]
    for result in whole:
        assert result["score"] == result["metrics"]["valid_accuracy"]
        assert all(math.isfinite(value) for value in result["metrics"].values())
        assert result["place"] == {
            "device": jax.devices()[0].device_kind, "host": platform.node(),
        }  # fmt: skip
        assert DISK_FULL not in result and OVER_CAP not in result
    assert json.loads(json.dumps(whole)) == whole  # as the journal has it


def test_the_score_is_the_mean_over_seeds_each_trained_as_if_alone(whole, told):
    # The same seed twice is that seed alone, and the program is the same one.
    alone = [steps(TrainingTrial(told(seeds=[seed, seed])), 2) for seed in SEEDS]
    for epoch in (0, 1):
        found = whole[epoch]["metrics"]
        for name in ("valid_accuracy", "valid_loss", "train_CL_loss"):
            values = np.array([results[epoch]["metrics"][name] for results in alone])
            assert [results[epoch]["metrics"][f"{name}_sd"] for results in alone] == [0, 0]
            # Means are taken in float32.
            assert found[name] == pytest.approx(values.mean(), rel=1e-6)
            assert found[f"{name}_sd"] == pytest.approx(values.std(ddof=1), rel=1e-3)
            assert found[f"{name}_sd"] > 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_means_and_standard_deviations_over_lanes(values):
    found = over_lanes({"a": np.array(values), "b": np.ones(len(values))})
    mean = sum(values) / len(values)
    assert found["a"] == pytest.approx(mean, abs=1e-6) and found["b"] == 1.0
    if len(values) == 1:
        assert found.keys() == {"a", "b"}
    else:
        squares = sum((value - mean) ** 2 for value in values)
        assert found["a_sd"] == pytest.approx(math.sqrt(squares / (len(values) - 1)), abs=1e-5)
        assert found["b_sd"] == 0.0


def test_a_trial_that_diverges_raises_and_keeps_nothing(told, tmp_path):
    worker = TrainingTrial(told(options=["optimizer.learning_rate=1e30"], every_seconds=0))
    with pytest.raises(training.Diverged, match="epoch 1"):
        worker.step()
    assert list(tmp_path.glob("*.msgpack")) == []


def test_a_trials_peak_memory_is_not_that_of_an_earlier_one(told):
    worker = TrainingTrial(told())
    before = steps(worker, 1)[0]["metrics"]["peak_memory_mb"]
    held = np.ones(400_000_000, np.uint8)  # what a larger trial would have needed
    del held
    assert worker.reset_config(told(number=1))
    assert steps(worker, 1)[0]["metrics"]["peak_memory_mb"] < before + 200


def test_a_worker_that_has_run_a_trial_runs_another_from_its_start(whole, told):
    worker = TrainingTrial(told(number=1, seeds=[8, 9], every_seconds=0))
    other = steps(worker, 2)
    assert worker.reset_config(told(number=0))
    again = steps(worker, 2)
    assert [computed(r) for r in again] == [computed(r) for r in whole[:2]]
    assert computed(other[0])["metrics"] != computed(again[0])["metrics"]
    assert [r["metrics"]["compilations"] for r in again] == [0, 0]


# Going on.


@pytest.mark.parametrize("done", [1, 3, EPOCHS])
def test_a_trial_that_goes_on_tells_its_results_again_and_then_the_same_as_if_uninterrupted(
    whole, told, done
):
    config = told(every_seconds=0, at_end=True)
    before = steps(TrainingTrial(config), done)
    after = steps(TrainingTrial(config), EPOCHS)
    assert after[:done] == before  # clocks and all
    assert [computed(r) for r in after] == [computed(r) for r in whole]


def test_it_goes_on_from_its_last_checkpoint_not_from_its_last_epoch(whole, told, monkeypatch):
    config = told(every_seconds=0)
    worker = TrainingTrial(config)
    worker.step()
    worker._trial["checkpoints"]["every_seconds"] = math.inf  # pyright: ignore
    worker.step()
    trained = []
    run_epoch = training.run_epoch
    monkeypatch.setattr(training, "run_epoch", lambda *a: trained.append(1) or run_epoch(*a))
    after = steps(TrainingTrial(config), 3)
    assert [computed(r) for r in after] == [computed(r) for r in whole[:3]]
    assert len(trained) == 2  # epochs 2 and 3


def test_it_takes_no_other_trials_checkpoint(whole, told):
    steps(TrainingTrial(told(number=1, seeds=[8, 9], every_seconds=0)), 2)
    assert computed(TrainingTrial(told(number=0)).step()) == computed(whole[0])


# When it keeps its state.


@pytest.mark.parametrize(
    ("every_seconds", "at_end", "expected"),
    [(0, True, [1, 2, 3, 4]), (0, False, [1, 2, 3, 3]), (math.inf, True, [0, 0, 0, 4]),
     (math.inf, False, [0, 0, 0, 0])],
)  # fmt: skip
def test_when_there_is_a_checkpoint(told, tmp_path, every_seconds, at_end, expected):
    config = told(every_seconds=every_seconds, at_end=at_end)
    worker, file = TrainingTrial(config), checkpoint_file(tmp_path, 0)
    found = []
    for _ in range(EPOCHS):
        worker.step()
        results = checkpoint.load(file, worker._run).results if file.exists() else []
        found.append(len(results))
    assert found == expected


@pytest.mark.parametrize(("room", "written"), [(1.01, True), (0.99, False)])
def test_a_checkpoint_over_the_cap_is_not_written_and_said(told, tmp_path, room, written):
    config = told(every_seconds=0)
    steps(TrainingTrial(config), 1)
    file = checkpoint_file(tmp_path, 0)
    size = file.stat().st_size
    file.unlink()
    checkpoint_file(tmp_path, 7).write_bytes(b"x" * 10_000)  # of another trial
    (tmp_path / "note.txt").write_bytes(b"x" * 10**6)  # no checkpoint
    config["checkpoints"]["cap_bytes"] = 10_000 + room * size
    # Clocks have a few digits more or less: of a size of several thousand bytes.
    worker = TrainingTrial(config)
    result = worker.step()
    assert file.exists() == written
    assert (OVER_CAP in result) == (not written)
    if not written:  # as soon as there is room, it is
        checkpoint_file(tmp_path, 7).unlink()
        assert OVER_CAP not in worker.step() and file.exists()


def test_its_own_last_checkpoint_takes_no_room_and_stays_if_there_is_none(told, tmp_path):
    config = told(every_seconds=0)
    first, file = TrainingTrial(config), checkpoint_file(tmp_path, 0)
    first.step()
    first._trial["checkpoints"]["cap_bytes"] = 1.5 * file.stat().st_size  # pyright: ignore
    assert OVER_CAP not in first.step()
    kept = file.read_bytes()
    first._trial["checkpoints"]["cap_bytes"] = 10.0  # pyright: ignore
    result = first.step()
    assert result[OVER_CAP] is True and result["training_iteration"] == 3
    assert file.read_bytes() == kept


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_fails_no_trial(whole, told, tmp_path, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "save", full)
    worker = TrainingTrial(told(every_seconds=0))
    result = worker.step()
    assert result.pop(DISK_FULL) == f"{os.strerror(code)}: {tmp_path}"
    assert computed(result) == computed(whole[0])
    monkeypatch.undo()
    assert DISK_FULL not in worker.step() and checkpoint_file(tmp_path, 0).exists()


def test_another_error_of_the_disk_is_raised(told, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save", forbidden)
    with pytest.raises(PermissionError):
        TrainingTrial(told(every_seconds=0)).step()


def test_a_checkpoint_that_the_driver_removes_meanwhile_fails_no_other_trial(told, tmp_path):
    gone = checkpoint_file(tmp_path, 7)
    gone.symlink_to(tmp_path / "nowhere")  # is found, and has no size
    TrainingTrial(told(every_seconds=0)).step()
    assert checkpoint_file(tmp_path, 0).exists()


# Which checkpoints stay.


def record(number, score, state=COMPLETE, rule="bp"):
    return Record({"number": number, "rule": rule, "epochs": 1}, [score], state)


MIXED = [
    record(0, 0.5), record(1, 0.9), record(2, 0.7), record(3, 0.9),
    record(4, 0.6, rule="lin-thresh"), record(5, 0.1, rule="lin-thresh"),
    record(6, 1.0, PRUNED), record(7, 1.0, FAILED, "lin-thresh"), record(8, 1.0, WAITING),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "best", "expected"),
    [
        ("max", 0, []),
        ("max", 1, [1, 4]),
        ("max", 2, [1, 4, 3, 5]),  # of equals the first one; all first ones before all second ones
        ("max", 9, [1, 4, 3, 5, 2, 0]),
        ("min", 1, [5, 0]),
        ("min", 2, [5, 0, 2, 4]),
    ],
)
def test_the_best_complete_trials_of_each_rule_are_kept(mode, best, expected):
    kept = [r.number for r in retention.kept(MIXED, mode, best)]
    assert sorted(kept) == sorted(expected)
    rank = lambda number: [n for n in expected if MIXED[n].rule == MIXED[number].rule].index(number)
    assert [rank(number) for number in kept] == sorted(rank(number) for number in kept)
    assert kept == [r.number for r in retention.kept(MIXED[::-1], mode, best)]


def files(folder):
    return sorted(int(file.stem) for file in folder.glob("*.msgpack"))


@pytest.fixture
def folder(tmp_path):
    for each in MIXED:
        checkpoint_file(tmp_path, each.number).touch()
    return tmp_path


@pytest.mark.parametrize(("best", "expected"), [(0, [8]), (1, [1, 4, 8]), (2, [1, 3, 4, 5, 8])])
def test_tidying_leaves_the_best_and_those_that_may_go_on(folder, best, expected):
    for _ in range(2):
        retention.tidy(folder, iter(MIXED), "max", best)
        assert files(folder) == expected


def test_room_is_made_by_what_is_worth_least(folder):
    retention.tidy(folder, MIXED, "max", 2)
    gone, before = [], files(folder)
    while retention.make_room(folder, iter(MIXED), "max", 2, cap_bytes=-1):
        gone += {*before} - {*files(folder)}
        before = files(folder)
    assert set(gone[:2]) == {3, 5} and set(gone[2:]) == {1, 4}
    assert files(folder) == [8]


def test_files_are_named_so_that_they_sort(tmp_path):
    assert worker.checkpoint_file(tmp_path, 7) == tmp_path / "0007.msgpack"
    assert worker.checkpoint_file(str(tmp_path), 12345) == tmp_path / "12345.msgpack"
