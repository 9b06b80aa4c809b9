"""Whose trial is next: turns, and budgets of epochs and of seconds."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, strategies as st

from disinhib.checks import refusal
from disinhib.errors import ConfigError
from disinhib.tuning import manifest, options, turns
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    PRUNED,
    RUNNING,
    EpochDone,
    follow,
)
from disinhib.tuning.space_tree import RULE
from disinhib.tuning.turns import Sharing, turn
from search_spaces import SPACES

RULES = ("a", "b", "c")


def record(number, whose, epochs, each=1.0, state=COMPLETE):
    """A trial of `epochs` that took `each` seconds."""
    one = turns.reserved(number, whose, 100)
    one.scores, one.seconds, one.state = [0.0] * epochs, [each] * epochs, state
    return one


def whose_of(one):
    return turns.Turn(one.point["params"].get(RULE), one.repeat, ())


def course(sharing, trials, trial, at_once=1):
    """The trials of a study of which `at_once` run at a time: `trial(whose, number)` gives each one
    as it ends."""
    records = {}
    for number in range(trials):
        for earlier in range(number - at_once + 1):
            whose = whose_of(records[earlier])
            records[earlier] = trial(whose, earlier)
        whose = turn(number, records, sharing)
        records[number] = record(number, whose, 0, state=RUNNING)
    return {number: trial(whose_of(r), number) for number, r in records.items()}


@given(
    rules=st.sampled_from([(), ("a",), RULES]),
    repeats=st.integers(1, 4),
    trials=st.integers(1, 20),
)
def test_every_repeat_has_all_its_trials_and_shares_them_among_the_rules(rules, repeats, trials):
    whose = [turn(number, {}, Sharing(rules, repeats)) for number in range(trials * repeats)]
    for repeat in range(1, repeats + 1):
        own = [turn for turn in whose if turn.repeat == repeat]
        alone = [turn(number, {}, Sharing(rules)) for number in range(trials)]
        assert [(turn.rule, turn.index) for turn in own] == [(t.rule, t.index) for t in alone]
    for number, one in enumerate(whose):
        alike = [n for n in range(number) if whose[n][:2] == one[:2]]
        assert [*one.earlier] == alike


@pytest.mark.parametrize("at_once", [1, 2, 16])
@pytest.mark.parametrize(("rules", "repeats"), [(RULES, 1), (RULES, 3), ((), 3)])
@pytest.mark.parametrize("budget", turns.SPENT)
def test_everyone_spends_as_much_as_the_others(budget, rules, repeats, at_once):
    """Up to what one trial costs, and those that run beside it; early stopping or none."""
    each = {"a": 1.0, "b": 3.0, "c": 5.0, None: 1.0}
    epochs = lambda whose, number: (1 if number % 3 else 4) * (2 if whose.rule == "a" else 1)

    def trial(whose, number):
        state = PRUNED if number % 3 else COMPLETE
        return record(number, whose, epochs(whose, number), each[whose.rule], state)

    records = course(Sharing(rules, repeats, budget), 400, trial, at_once)
    spent: dict[tuple[str, int], float] = defaultdict(float)
    for one in records.values():
        spent[one.rule, one.repeat] += turns.SPENT[budget](one)
    dearest = max(turns.SPENT[budget](one) for one in records.values())
    assert len(spent) == max(1, len(rules)) * repeats
    assert max(spent.values()) - min(spent.values()) <= dearest * (1 + at_once)


@pytest.mark.parametrize("budget", turns.SPENT)
def test_a_rule_whose_trials_fail_at_once_does_not_get_all_of_them(budget):
    def trial(whose, number):
        failed = whose.rule == "a"
        return record(number, whose, 0 if failed else 5, state=FAILED if failed else COMPLETE)

    records = course(Sharing(RULES, 1, budget), 90, trial)
    assert Counter(one.rule for one in records.values()) == dict.fromkeys(RULES, 30)


def test_initial_points_are_tried_first_whatever_they_cost():
    trial = lambda whose, number: record(number, whose, 50 if whose.rule == "a" else 1)
    records = course(Sharing(RULES, 2, "epochs", {"a": 3, "b": 1, "c": 1}), 30, trial)
    tried = Counter((one.rule, one.repeat) for one in records.values())
    assert tried["a", 1] == tried["a", 2] == 3
    first = [(one.rule, one.repeat) for one in records.values()][:10]
    assert Counter(first) == {("a", 1): 3, ("a", 2): 3, **dict.fromkeys(
        [(rule, repeat) for rule in "bc" for repeat in (1, 2)], 1
    )}  # fmt: skip


def test_seconds_are_those_of_the_median_epoch_without_compiling():
    records = {0: record(0, turns.Turn("a", 1, ()), 0)}
    for epoch, (whole, compiling) in enumerate([(9.0, 7.5), (1.0, 0.0), (1.2, 0.0)], start=1):
        metrics = {"epoch_seconds": [whole], "compilation_seconds": [compiling]}
        follow(records, EpochDone(0, epoch, 0.5, metrics, {}))
    assert records[0].training_seconds == pytest.approx(3 * 1.2)
    assert record(0, turns.Turn("a", 1, ()), 0).training_seconds == 0


def test_seconds_of_several_lanes_are_shared():
    records = {0: record(0, turns.Turn("a", 1, ()), 0)}
    metrics = {"epoch_seconds": [9.0, 9.0], "compilation_seconds": [1.0]}
    follow(records, EpochDone(0, 1, 0.5, metrics, {"lanes": "8"}))
    follow(records, EpochDone(0, 2, 0.5, metrics, {}))
    assert records[0].seconds == [2.0, 8.0]  # of two seeds: a quarter of it, and all


def test_a_study_shares_its_trials_as_asked(tmp_path):
    given = ["study=shared", f"out_dir={tmp_path}", "repeats=2", "trials=12", "epochs=3"]
    study = options.compose([*given, "budget=seconds", "searcher=random"])
    begun = manifest.of_search(study)
    propose, records = manifest.proposer(study, begun), {}
    for number in range(study.all_trials):
        asked = propose(number, records)
        follow(records, asked)
        cost = 1 if asked.config["rule"] == "bp" else 4
        for epoch in range(1, 4):
            metrics = {"epoch_seconds": [cost], "compilation_seconds": [0.0]}
            follow(records, EpochDone(number, epoch, 0.5, metrics, {}))
        records[number].state = COMPLETE
        if number < 8:  # the published defaults of everyone
            assert asked.point["params"] == begun.points[number // 2]
    tried = Counter((one.rule, one.repeat) for one in records.values())
    assert tried["bp", 1] >= 6 and tried["bp", 2] >= 6
    assert all(tried[rule, repeat] == 2 for rule, repeat in tried if rule != "bp")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("searcher.deterministic=true", "reproducible trials do not depend on what others took"),
        ("searcher.balanced=false", "with searcher.balanced=false the sampler chooses the rule"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path, given, why):
    with pytest.raises(ConfigError) as error:
        options.compose([f"out_dir={tmp_path}", "budget=seconds", given])
    assert str(error.value) == str(refusal("budget", "seconds", f"trials, as {why}"))
    options.compose([f"out_dir={tmp_path}", "budget=trials", given])


def test_a_rule_is_known_by_its_name_in_the_space(tmp_path, monkeypatch):
    """Whose branch may choose a circuit on which it is reported under another name."""
    on_circuit = lambda trial: {
        "trainer": trial.suggest_categorical("trainer", ("bp", "exact-inv")),
        "model/vf": "dale",
    }
    monkeypatch.setitem(SPACES, "on_circuit", on_circuit)
    study = options.compose(
        [f"out_dir={tmp_path}", "space=on_circuit", "budget=epochs", "epochs=2"]
    )
    propose, records = manifest.proposer(study, manifest.of_search(study)), {}
    for number in range(4):
        follow(records, propose(number, records))
    assert [one.rule for one in records.values()] == ["bp-ei", "exact-inv"] * 2


@pytest.mark.parametrize("budget", turns.BUDGETS)
def test_a_point_that_no_turn_is_left_for_is_not_proposed(tmp_path, monkeypatch, budget):
    """Nor is any other trial, which would take its time."""
    study = options.compose([f"out_dir={tmp_path}", "trials=4", f"budget={budget}"])
    begun = manifest.of_search(study)  # all of them are initial points
    monkeypatch.setattr(manifest.suggest, "suggest", lambda *arguments: pytest.fail("proposed"))
    assert manifest.adder(study, begun)({"trainer": "bp"}, {}) == []
