# pyright: reportArgumentType=false
"""Which checkpoints of a study stay."""

from typing import Any

import pytest

from disinhib.tuning import retention
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED, WAITING, Record
from disinhib.tuning.retention import checkpoint_file, model_file


def record(number, score, state=COMPLETE, rule="bp"):
    config: Any = {"number": number, "rule": rule, "epochs": 1}
    return Record(config, scores=[score], state=state)


MIXED = [
    record(0, 0.5), record(1, 0.9), record(2, 0.7), record(3, 0.9),
    record(4, 0.6, rule="lin-thresh"), record(5, 0.1, rule="lin-thresh"),
    record(6, 1.0, PRUNED), record(7, 1.0, FAILED, "lin-thresh"), record(8, 1.0, WAITING),
]  # fmt: skip
LESS_IS_BETTER = [
    record(each.number, -each.scores[0], each.state, each.rule) for each in MIXED
]  # scores are signed


@pytest.mark.parametrize(
    ("records", "best", "expected"),
    [
        (MIXED, 0, []),
        (MIXED, 1, [1, 4]),
        (MIXED, 2, [1, 4, 3, 5]),  # of equals the first; all first ones before all second ones
        (MIXED, 9, [1, 4, 3, 5, 2, 0]),
        (LESS_IS_BETTER, 1, [5, 0]),
        (LESS_IS_BETTER, 2, [5, 0, 2, 4]),
    ],
)
def test_the_best_complete_trials_of_each_rule_are_kept(records, best, expected):
    kept = [r.number for r in retention.kept(records, best)]
    assert sorted(kept) == sorted(expected)
    rank = lambda number: [n for n in expected if MIXED[n].rule == MIXED[number].rule].index(number)
    assert [rank(number) for number in kept] == sorted(rank(number) for number in kept)
    assert kept == [r.number for r in retention.kept(records[::-1], best)]


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
        retention.tidy(folder, iter(MIXED), best)
        assert files(folder) == expected


def test_room_is_made_by_what_is_worth_least(folder):
    retention.tidy(folder, MIXED, 2)
    assert retention.make_room(folder, iter(MIXED), 2, cap_bytes=1)
    assert files(folder) == [1, 3, 4, 5, 8]  # one more fits
    gone, before = [], files(folder)
    while retention.make_room(folder, iter(MIXED), 2, cap_bytes=-1):
        gone += {*before} - {*files(folder)}
        before = files(folder)
    assert set(gone[:2]) == {3, 5} and set(gone[2:]) == {1, 4}  # second ones, then first ones
    assert files(folder) == [8]


def test_files_are_named_so_that_they_sort(tmp_path):
    assert checkpoint_file(tmp_path, 7) == tmp_path / "0007.msgpack"
    assert checkpoint_file(str(tmp_path), 12345) == tmp_path / "12345.msgpack"
    assert model_file(tmp_path, 7, 42) == tmp_path / "0007-42.model"


def test_what_a_kill_left_half_written_and_models_that_mlflow_has_go(folder):
    before = files(folder)
    for name in (".0001.msgpack.12.part", "0001-3.model"):
        (folder / name).touch()
    retention.remove(folder, retention.PARTS)
    assert not list(folder.glob(".*")) and list(folder.glob("*.model"))
    retention.remove(folder, retention.MODELS)
    assert not list(folder.glob("*.model")) and files(folder) == before


def test_a_study_keeps_its_checkpoints_by_its_id(tmp_path):
    """A machine that does not share the study's folder may have an earlier study's there."""
    one, other = (retention.folder(tmp_path, id) for id in ("0123456789", "abcdefghij"))
    assert one != other and one.parent == other.parent == tmp_path / "checkpoints"
