"""Selection from a planted study: by validation alone, among complete trials alone."""

import contextlib
import io
import math
import re
import shutil
import sqlite3

import pandas as pd
import planted
import pytest
import yaml

from analysis import configurations, runs, selection, store as stores
from analysis.store import Refused
from disinhib.errors import InputError
from disinhib.metrics import SELECTION

ACCURACY, LOSS = SELECTION["valid_accuracy"], SELECTION["valid_loss"]

pytestmark = pytest.mark.usefixtures("copied_stores")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return planted.write(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def opened(study):
    store = stores.connect(study.uri)
    return store, stores.find_study(store, study.study)


@pytest.fixture(scope="module")
def selected(study, tmp_path_factory):
    """What the command printed, and the file that it wrote."""
    file = tmp_path_factory.mktemp("selected") / "selected.yaml"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        arguments = [f"study={study.study}", f"tracking.uri={study.uri}", f"selected={file}"]
        assert selection.main(arguments) == 0
    return printed.getvalue().splitlines(), yaml.safe_load(file.read_text())


def test_runs_are_one_tidy_table_and_what_is_left_out_is_said(opened):
    rows, dropped = runs.trials(*opened)
    assert rows["trial"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert rows["state"].tolist() == [t.state for t in planted.TRIALS[:7]]
    assert rows["epochs"].tolist() == [len(t.scores) for t in planted.TRIALS[:7]]
    assert rows["score"].tolist()[:5] == [t.scores[-1] for t in planted.TRIALS[:5]]
    failed = rows.to_dict("records")[5]
    assert math.isnan(failed["score"]) and failed["reason"] == planted.TRIALS[5].reason
    assert rows["searched.bp.optimizer.learning_rate"].tolist()[0] == "0.005"
    assert rows["searched.exact-inv.optimizer.learning_rate"].tolist()[1] == "0.004"
    assert rows["saw_test"].tolist() == [False, False, False, True, False, False, False]
    assert dropped == ["trial 7: it has not ended"]


def test_parameters_are_those_of_the_trials_branch_of_the_space(opened):
    store, study = opened
    rows = runs.trials(store, study).rows.to_dict("records")
    parameters = runs.parameters_of(study.space, rows[1])
    values = {name: parameter["value"] for name, parameter in parameters.items()}
    assert values == {"trainer": "exact-inv"} | {
        f"exact-inv.{name}": value
        for name, value in planted.WAY["exact-inv"].items()
        if name not in ("trainer", "model/vf")
    }
    rate = parameters["exact-inv.optimizer.learning_rate"]
    assert runs.position({**rate, "value": rate["low"]}) == 0
    assert runs.position({**rate, "value": rate["high"]}) == 1
    assert runs.position({**rate, "value": 1e-3}) == pytest.approx(0.5)  # 1e-4 to 1e-2, log
    assert runs.parameters_of(study.space, {"rule": "taylor"}) == {}


def test_best_complete_trials_by_validation_and_of_equals_the_first(selected):
    """Not the one that is best on test (3), nor the pruned (4) or the running one (7) with the
    best scores."""
    _, kept = selected
    assert [entry["trial"] for entry in kept["selected"]] == [0, 1, 2]
    assert [entry["group"] for entry in kept["selected"]] == [
        {"trainer": rule} for rule in ("bp", "exact-inv", "lin-thresh")
    ]
    assert [entry["score"] for entry in kept["selected"]] == [90.0, 85.0, 80.0]
    assert kept["selected"][0]["tied_with"] == [6]
    assert "COMPLETE" in kept["rule"] and "valid_accuracy" in kept["rule"]


def test_runners_up_and_warnings_are_told(selected):
    lines, kept = selected
    assert "bp, rank 1: trial 0, valid_accuracy 90; as good: trials 6; next trial 6 by 0, trial 3 by 2" in lines  # fmt: skip  # noqa: E501
    assert "left out: trial 7: it has not ended" in lines
    text = "\n".join(kept["warnings"])
    assert "the groups had unequal budgets: bp 3 trials of 6 epochs" in text
    assert "trial 3 evaluated the test set during the search" in text
    assert "trial 2 (lin-thresh): 1 of the 1 trials nearest to it failed" in text
    assert "edge" not in text
    assert [line.removeprefix("warning: ") for line in lines if line.startswith("warning")] == (
        kept["warnings"]
    )


def test_a_value_at_the_edge_of_its_range_is_warned_of(opened):
    store, study = opened
    rows, _ = runs.trials(store, study)
    chosen = selection.select(rows, ["trainer"], 2, ACCURACY)
    assert [(c.row["trial"], c.rank) for c in chosen if c.row["rule"] == "bp"] == [(0, 1), (6, 2)]
    lines = selection.warnings(rows, chosen, ["trainer"], study.space, ACCURACY)
    edge = "trial 6 (bp): optimizer.learning_rate=0.0099 lies at the upper edge of its range"
    assert f"{edge} (0.0001 to 0.01); next best trials there: 0 of 2" in lines


def frame(*rows):
    """Trials as (rule, state, score, **searched)."""
    return pd.DataFrame(
        {
            "trial": number, "run_id": str(number), "rule": rule, "repeat": 1, "state": state,
            "score": score, "epochs": 2, "seeds": (number,), "saw_test": False, "searched.a": a,
        }
        for number, (rule, state, score, a) in enumerate(rows)
    )  # fmt: skip


def test_the_smallest_wins_if_less_is_better_and_nan_never():
    rows = frame(
        ("bp", "complete", 0.5, "x"), ("bp", "complete", 0.2, "y"), ("bp", "failed", math.nan, "x")
    )
    assert [c.row["trial"] for c in selection.select(rows, ["trainer"], 3, LOSS)] == [1, 0]


def test_groups_are_made_by_what_was_searched():
    rows = frame(("bp", "complete", 1.0, "x"), ("bp", "complete", 2.0, "y"),
                 ("lin-thresh", "complete", 0.0, None))  # fmt: skip
    chosen = selection.select(rows, ["trainer", "a"], 1, ACCURACY)
    assert [c.group for c in chosen] == [
        {"trainer": "bp", "a": "x"},
        {"trainer": "bp", "a": "y"},
        {"trainer": "lin-thresh", "a": "none"},
    ]
    with pytest.raises(Refused, match="per: given b, allowed is one of a, trainer"):
        selection.select(rows, ["b"], 1, ACCURACY)


def test_each_repeat_has_its_own_best():
    rows = frame(*(("bp", "complete", score, "x") for score in (1.0, 2.0, 4.0, 3.0)))
    rows["repeat"] = [1, 2, 1, 2]
    chosen = selection.select(rows, ["trainer"], 1, ACCURACY)
    groups = [{"trainer": "bp", "repeat": repeat} for repeat in ("1", "2")]
    assert [(c.group, c.row["trial"]) for c in chosen] == [(groups[0], 2), (groups[1], 3)]


def test_groups_may_be_made_by_an_option_that_each_rule_searches_under_its_own_name():
    rows = frame(("bp", "complete", 1.0, None), ("lin-thresh", "complete", 0.0, None))
    rows["searched.bp.x"], rows["searched.lin-thresh.x"] = ["1", None], [None, "2"]
    chosen = selection.select(rows, ["x"], 1, ACCURACY)
    assert [(c.group, c.row["trial"]) for c in chosen] == [({"x": "1"}, 0), ({"x": "2"}, 1)]


def test_the_next_best_trials_at_the_same_edge_are_counted():
    """Complete ones of the same rule that have the parameter, at the same end, by their score."""
    rates = {"kind": "float", "low": 0.0, "high": 1.0, "log": False, "step": None}
    rows = frame(
        ("bp", "complete", 9.0, "0.98"), ("bp", "complete", 8.0, "0.99"),
        ("bp", "pruned", 9.5, "1.0"), ("taylor", "complete", 9.0, "1.0"),
        ("bp", "complete", 7.0, "0.01"), ("bp", "complete", 6.0, None),
        ("bp", "complete", 5.0, "1.0"), ("bp", "complete", 4.0, "0.5"),
        ("bp", "complete", 3.0, "1.0"),
    )  # fmt: skip
    space = {"parameters": {"a": rates}}
    edge = "trial {} (bp): a={} lies at the {} edge of its range (0 to 1); next best trials"
    for metric, told in (
        (ACCURACY, edge.format(0, 0.98, "upper")),  # trials 1, 4, 6, 7
        (LOSS, edge.format(8, 1, "upper")),  # trials 7, 6, 4, 1
    ):
        won, _ = selection.select(rows, ["trainer"], 1, metric)
        (line,) = selection._on_the_edge(won, rows.to_dict("records"), space, metric)
        assert line == f"{told} there: 2 of 4"


def test_equal_budgets_are_no_warning_and_a_group_with_few_complete_trials_is():
    rows = frame(*[("bp", "complete", 1.0, "x")] * 4, ("bp", "pruned", 1.0, "x"),
                 *[("taylor", "complete", 1.0, "x")] * 5,
                 *[("exact-inv", "pruned", 2.0, "x")] * 5)  # fmt: skip
    chosen = selection.select(rows, ["trainer"], 1, ACCURACY)
    assert selection.warnings(rows, chosen, ["trainer"], None, ACCURACY) == [
        "bp: 4 of 5 trials ran the whole budget; the best of so few says little about the rule",
        "exact-inv: no trial ran its whole budget, none is selected",
    ]


def test_rules_that_were_to_spend_equally_much_may_have_unequal_numbers_of_trials():
    rows = frame(*[("bp", "complete", 1.0, "x")] * 9, *[("taylor", "complete", 1.0, "x")] * 5)
    chosen = selection.select(rows, ["trainer"], 1, ACCURACY)
    warnings = lambda budget: selection.warnings(rows, chosen, ["trainer"], None, ACCURACY, budget)
    (line,) = warnings("trials")
    assert line.startswith("the groups had unequal budgets: bp 9 trials")
    assert warnings("seconds") == warnings("epochs") == []


def test_budgets_are_compared_by_rule_over_all_repeats():
    """Repeats of a rule, of which one was stopped early more often, are none to compare."""
    rows = frame(*[(rule, "complete", 1.0, "x") for rule in ("bp", "taylor") for _ in range(10)])
    rows["repeat"] = [1, 2] * 10
    rows["epochs"] = [1, 4] * 10
    assert selection._unequal_budgets(selection.groups(rows, ["trainer"])) == []
    rows["epochs"] = [1, 1] * 5 + [1, 4] * 5
    assert selection._unequal_budgets(selection.groups(rows, ["trainer"])) == [
        "the groups had unequal budgets: bp 10 trials of 10 epochs, taylor 10 trials of 25 epochs"
    ]


def test_how_trials_were_selected_is_told_as_it_was_asked():
    assert selection.how("valid_loss").startswith(
        "Of the trials of each rule that ran their whole budget (COMPLETE): the one with the best"
        " valid_loss after"
    )
    words = selection.how("valid_accuracy", ["trainer", "a"], 2, defaults=True, repeated=True)
    assert "each rule and a and repeat that ran" in words and ": the 2 with the best" in words
    assert words.endswith(
        "of each rule and repeat the trial with the published defaults, whatever its score."
    )


def test_a_choice_that_was_hardly_tried_is_a_warning():
    """In fewer than three trials, or in fewer than 5 % of those that had the parameter; but not
    because they are few and evenly split."""
    space = {"parameters": {"a": {"kind": "categorical", "choices": ["x", "y", "z"]}}}
    of = lambda count, choice: [("bp", "complete", 1.0, choice)] * count
    for rows, rare in (
        (frame(*of(3, "x"), *of(1, "y"), *of(9, None)), "a=y (1 of 4), a=z (0 of 4)"),
        (frame(*of(50, "x"), *of(46, "y"), *of(4, "z")), "a=z (4 of 100)"),
    ):
        warned = selection._rarely_tried(rows.to_dict("records"), space)
        assert warned == [f"hardly tried (trials): {rare}"]
    for rows in (
        frame(*of(50, "x"), *of(45, "y"), *of(5, "z")),
        frame(*of(2, "x"), *of(2, "y"), *of(2, "z")),
    ):
        assert not selection._rarely_tried(rows.to_dict("records"), space)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["metric=test_accuracy"],
            "metric: given test_accuracy, allowed is one of valid_loss, valid_accuracy",
        ),
        (
            ["metric=alignment_angle"],
            "metric: given alignment_angle, but study planted ran without diagnostics.alignment",
        ),
        (["study=plantet"], "study: given plantet, allowed is one of planted .*did you mean"),
        (["top=0"], "top: given 0, allowed is a whole number of at least 1"),
        (["per=learning_rate"], "per: given learning_rate, allowed is one of"),
        (["selected=/nowhere/selected.yaml"], "selected: given /nowhere/selected.yaml, allowed is"),
        (["tops=1"], "tops: unknown option; did you mean top?"),
        (["--top"], "top: given nothing, allowed is a whole number of at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, message, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as refusal:
        selection.main([f"tracking.uri={study.uri}", *given])
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_no_password_is_written_into_the_file(opened):
    _, study = opened
    kept = selection.content(
        study, "postgresql://me:secret@host/db", None, [], {"metric": "valid_loss"}, []
    )
    assert kept["tracking_uri"] == "postgresql://me:***@host/db"


def test_a_study_is_the_newest_or_that_of_a_run_id(study, opened):
    store, _ = opened
    assert stores.find_study(store).name == study.study
    assert stores.find_study(store, study.run_id).run.info.run_id == study.run_id


def test_a_store_whose_last_transaction_was_killed_is_opened(tmp_path):
    """It has a journal that has to be rolled back, which a read-only connection cannot do."""
    study = planted.write(tmp_path / "whole", trials=planted.TRIALS[:1])
    database = tmp_path / "whole" / "mlflow.db"
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that the change reaches the file
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("CREATE TABLE more (text)")
    connection.executemany("INSERT INTO more VALUES (?)", [("x" * 5000,)] * 100)
    killed = tmp_path / "killed.db"
    for suffix in ("", "-journal"):
        shutil.copy(f"{database}{suffix}", f"{killed}{suffix}")
    connection.close()
    store = stores.connect(f"sqlite:///{killed}")
    assert stores.find_study(store).name == study.study
    assert len(runs.trials(store, stores.find_study(store)).rows) == 1


def select(study, folder):
    arguments = [f"study={study.study}", f"tracking.uri={study.uri}"]
    return selection.main([*arguments, f"selected={folder / 'selected.yaml'}"])


def test_every_command_says_first_what_it_reads(selected, study):
    what = "digits, budget 2 epochs, hidden layers [16]"
    assert selected[0][0] == f"study planted ({what}) in {study.uri}"


def test_nothing_is_selected_while_a_trials_run_is_missing(tmp_path):
    study = planted.write(tmp_path)
    store = stores.connect(study.uri)
    best = runs.trials(store, stores.find_study(store)).rows.iloc[1]
    store.client.delete_run(best["run_id"])
    line = f"study planted: the runs of trials 1 are missing in {study.uri}; restore them"
    with pytest.raises(Refused, match=re.escape(line)):
        select(study, tmp_path)
    rows, dropped = runs.trials(store, stores.find_study(store))
    assert 1 not in list(rows["trial"]) and "trial 1: its run is missing" in dropped
    store.client.restore_run(best["run_id"])
    assert select(study, tmp_path) == 0


def test_a_study_whose_own_run_was_deleted_is_not_another_study(tmp_path):
    study = planted.write(tmp_path, "newer")
    stores.connect(study.uri).client.delete_run(study.run_id)
    line = "study: the run of newer itself was deleted in"
    with pytest.raises(Refused, match=line):
        select(study, tmp_path)
    with pytest.raises(Refused, match=line):  # not the newest that is left
        selection.main([f"tracking.uri={study.uri}", f"selected={tmp_path / 'selected.yaml'}"])


def test_a_moved_folder_is_read_where_it_is(tmp_path):
    then, now = tmp_path / "then", tmp_path / "now, here (a)=1"
    study = planted.write(then / "out")
    assert select(study, then) == 0
    before = yaml.safe_load((then / "selected.yaml").read_text())
    assert before["database"] == "out/mlflow.db"
    then.rename(now)
    moved = study._replace(uri=f"sqlite:///{now}/out/mlflow.db")
    settings = configurations.checked_settings([])
    store, found, planned = configurations.of_selection(now / "selected.yaml", settings, set())
    assert (store.uri, found.name, len(planned)) == (moved.uri, "planted", len(before["selected"]))
    assert select(moved, now) == 0
    after = yaml.safe_load((now / "selected.yaml").read_text())
    assert after == {**before, "tracking_uri": moved.uri}


def test_the_environments_store_is_that_of_every_command(tmp_path, monkeypatch):
    study = planted.write(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", study.uri)
    assert stores.address(None) == study.uri
    assert stores.address("http://h") == "http://h"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"tracking.uri: missing"):
        stores.address(None)


@pytest.mark.parametrize("name", ["no/such", "x" * 300, "mlflow.db/x"])
def test_a_file_that_cannot_be_written_is_one_line(name, study, tmp_path):
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(Refused, match="allowed is a file that can be written"):
        runs.write(tmp_path / name, "text")
