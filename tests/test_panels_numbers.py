"""What the figures of hand-made tables are drawn from, exactly."""

import math

import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from test_panels import FULL, LABELS, LOSSES, TRIALS, history, lin, trial

from analysis import runs
from analysis.report.panels import (
    drawing,
    hardness,
    importances,
    parameters,
    plot_data,
    retraining,
    search,
    studies,
)
from disinhib.rules import COMPETITORS
from disinhib.tuning import space_tree
from disinhib.tuning.event_log import COMPLETE, EPOCH_SECONDS, PRUNED
from disinhib.tuning.steering import BY_HAND
from disinhib.tuning.suggest import SAMPLERS


def test_what_k_trials_give():
    bp, lin_thresh = search.budgets(FULL)
    # 80, then 60 where it was pruned, then the worst, 60, as it failed; any two of the three
    assert bp.expected == pytest.approx([200 / 3, (80 + 80 + 60) / 3, 80])
    assert bp.best == [80, 80, 80]
    assert lin_thresh.best == pytest.approx([math.nan, 72, 78, 78, 78, 78], nan_ok=True)
    assert lin_thresh.expected[0] == pytest.approx((60 + 72 + 78 + 76 + 78 + 60) / 6)
    assert lin_thresh.expected[-1] == 78


def test_what_k_trials_give_of_a_loss():
    bp, lin_thresh = search.budgets(LOSSES)
    assert bp.expected == pytest.approx([(80 + 60 + 80) / 3, (60 + 80 + 60) / 3, 60])
    assert bp.best == [80, 80, 80]  # complete ones only
    assert lin_thresh.best == pytest.approx([math.nan, 72, 72, 72, 72, 72], nan_ok=True)


def test_a_rule_without_any_score_has_no_budget():
    only_failed = FULL._replace(trials=pd.DataFrame([TRIALS[4]]))
    assert search.budgets(only_failed) == []


def test_how_hard_a_rule_is_to_tune():
    """Both have reached 78. Of bp 80 is the best of three, 60 where it was stopped or failed: the
    best of two is 73.3, of three 80."""
    bp, lin_thresh = hardness.hardness(FULL)
    assert hardness.target(FULL) == 78
    assert (bp.rule, bp.parameters, bp.tried, bp.close) == ("bp", 1, 3, 1)
    assert bp.trials == pytest.approx(2 + (78 - 220 / 3) / (80 - 220 / 3))
    assert bp.epochs == pytest.approx(bp.trials * 4 / 3)
    assert bp.seconds == pytest.approx(bp.epochs * 0.5)
    # Two of 78 among six: any five have one of them. The nudge is searched by some only.
    assert lin_thresh[:5] == ("lin-thresh", 4, 6, 2, 5)
    assert lin_thresh.seconds == pytest.approx(lin_thresh.epochs * 2)


def test_points_that_were_not_drawn_are_neither_counted_nor_reached_with():
    """Of bp the one of 80 is left, so its drawn ones reach 60 only where they were stopped; of
    lin-thresh one of 78, and its best is still what is close to."""
    rows = FULL.trials.assign(drawn=FULL.trials["trial"] != 7)
    bp, lin_thresh = hardness.hardness(FULL._replace(trials=rows, defaults=["run5", "run0"]))
    assert (bp.tried, bp.close) == (2, 0) and math.isnan(bp.trials + bp.epochs)
    assert lin_thresh[2:4] == (4, 0)  # 60, 72, 76 and a failed one: 78 - 1 is not reached
    given = FULL._replace(trials=rows, defaults=["run5", "run0"])
    assert hardness.target(given) == 76 and lin_thresh.trials == 4
    none = FULL._replace(trials=FULL.trials.assign(drawn=False))
    assert [row[2:4] for row in hardness.hardness(none)] == [(0, 0), (0, 0)]


def test_a_score_that_has_been_reached_is_reached_with_all_trials():
    """13.9... + (87.1... - 13.9...) is less than 87.1... in the arithmetic of floats."""
    scores = [13.937282229965156, 87.10801393728222]
    rows = pd.DataFrame([lin(number, COMPLETE, [score]) for number, score in enumerate(scores)])
    (row,) = hardness.hardness(FULL._replace(trials=rows))
    assert row.trials == 2


def test_how_hard_a_rule_is_to_tune_by_a_loss():
    bp, lin_thresh = hardness.hardness(LOSSES)
    assert hardness.target(LOSSES) == 80
    assert (bp.close, bp.tried) == (2, 3)  # 80, and 60 where it was stopped
    assert (lin_thresh.close, lin_thresh.trials) == (2, 1)  # 60 and 72, within 5 % of 72
    assert "within 5 %" in hardness.note(LOSSES)


def test_a_rule_without_a_complete_trial_is_neither_hard_nor_easy():
    only = FULL._replace(trials=FULL.trials[FULL.trials["state"] != COMPLETE])
    assert hardness.hardness(only) == [] and math.isnan(hardness.target(only))


def test_the_chance_of_a_hit():
    assert hardness.hit_rates(4, 2) == pytest.approx(
        [1 / 2, 1 - 1 / 6, 1, 1]
    )  # 1 of 6 pairs misses
    assert hardness.hit_rates(3, 0) == [0, 0, 0] and hardness.hit_rates(2, 2) == [1, 1]


def test_an_adaptive_search_does_not_measure_how_hard_a_rule_is():
    assert "searcher=qmc" not in hardness.note(FULL)
    assert "tpe, learns from the scores" in hardness.note(FULL._replace(adaptive="tpe"))
    assert [name for name, entry in SAMPLERS.items() if not entry.adaptive] == [
        "random", "qmc", "grid"
    ]  # fmt: skip


def test_training_seconds_leave_out_compiling(monkeypatch):
    """The median epoch, for a worker's first ones also trace their program; of a trial that has
    one epoch only, that one."""
    epochs = [("a", 1, 9.0, 4.0), ("a", 2, 1.0, 0.0), ("a", 3, 2.0, 0.0), ("b", 1, 7.0, 6.5)]
    table = pd.DataFrame(
        [(run, name, n, value) for run, n, *values in epochs
         for name, value in zip(EPOCH_SECONDS, values, strict=True)],
        columns=["run_id", "metric", "epoch", "value"],
    )  # fmt: skip
    monkeypatch.setattr(runs, "curves", lambda store, run_ids, metrics: table)
    rows = [{"run_id": run, "epochs": n} for run, n in (("a", 3), ("b", 1), ("c", 0), ("d", 2))]
    got = runs.training_seconds(None, rows)  # pyright: ignore[reportArgumentType]
    assert got == pytest.approx([6.0, 0.5, 0.0, math.nan], nan_ok=True)


def test_the_best_trial_is_complete_and_of_equals_the_first():
    rows = plot_data.trials_of(FULL)["lin-thresh"]
    assert parameters.best_trial(rows) == 5  # and 7 with the same score
    rows = plot_data.trials_of(LOSSES)["lin-thresh"]
    assert parameters.best_trial(rows) == 3  # 1 was pruned, 8 failed
    assert parameters.best_trial(rows[:1]) is None


@pytest.mark.parametrize(
    ("scores", "worst"),
    [
        ([10, 80, 84, 88], 80),  # the median is 82, the best 6 from it: 64 is the farthest drawn
        ([64, 80, 84, 88], 64),
        ([70, 70, 70], 70),
        ([5], 5),
    ],
)
def test_fence(scores, worst):
    assert plot_data.fence(scores) == worst


def test_the_merit_is_the_score_and_more_of_it_is_better():
    for data, sign in ((FULL, 1), (LOSSES, -1)):
        rows = plot_data.trials_of(data)["bp"]
        assert [row["merit"] for row in rows[:2]] == [sign * row["score"] for row in rows[:2]]
        assert math.isnan(rows[2]["merit"])


def test_a_loss_of_zero_has_no_sign():
    rows = pd.DataFrame([lin(1, COMPLETE, [0.0])])
    (budget,) = search.budgets(LOSSES._replace(trials=rows))
    assert (str(budget.expected[0]), str(budget.best[0])) == ("0.0", "0.0")


def test_studies():
    by_rule = studies.studies(FULL)
    assert list(by_rule) == ["bp", "lin-thresh"]
    bp = by_rule["bp"].trials
    assert [t.state for t in bp] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [t.value for t in bp] == [80, None, None]
    assert [t.user_attrs["trial"] for t in bp] == [0, 2, 4]
    assert bp[0].params == {"optimizer.learning_rate": 1e-3}
    assert bp[0].distributions == {
        "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True)
    }
    assert by_rule["lin-thresh"].trials[0].params == {
        "model.vf.g_EI": 0.5,
        "optimizer.learning_rate": 1e-4,
        "trainer.strong_fb": False,
        "trainer.target_nudge": 0.5,
    }
    assert by_rule["lin-thresh"].best_trial.user_attrs["trial"] == 5
    assert studies.studies(LOSSES)["lin-thresh"].best_trial.user_attrs["trial"] == 3


def test_studies_of_a_study_that_searched_nothing():
    by_rule = studies.studies(FULL._replace(space=None))
    assert [t.params for t in by_rule["bp"].trials] == [{}, {}, {}]


@pytest.mark.parametrize(
    "kind",
    [
        FloatDistribution(0.1, 10, log=True),
        FloatDistribution(0, 1, step=0.25),
        IntDistribution(1, 9, step=2),
        CategoricalDistribution([None, 1, "x"]),
    ],
)
def test_distribution_is_the_inverse_of_described(kind):
    assert studies.distribution(space_tree.described(kind)) == kind


def test_settings_and_their_positions():
    by_rule = plot_data.settings(FULL)
    every = by_rule["bp"] + by_rule["lin-thresh"]
    positions = {(s.trial["trial"], s.name): s.position for s in every}
    assert positions[0, "optimizer.learning_rate"] == pytest.approx(0.5)  # log
    assert positions[1, "optimizer.learning_rate"] == 0
    assert positions[4, "optimizer.learning_rate"] == 1
    assert positions[3, "model.vf.g_EI"] == pytest.approx(0.25)
    assert positions[1, "trainer.strong_fb"] == 0 and positions[3, "trainer.strong_fb"] == 1
    assert positions[6, "trainer.target_nudge"] == pytest.approx(0.2)
    assert (3, "trainer.target_nudge") not in positions
    assert not any(name == space_tree.RULE for _, name in positions)


def test_short_names_where_they_are_unambiguous():
    assert plot_data.short_names(["bp.optimizer.b1", "x.optimizer.b2", "y.optimizer.b2"]) == {
        "bp.optimizer.b1": "optimizer.b1",
        "x.optimizer.b2": "x.optimizer.b2",
        "y.optimizer.b2": "y.optimizer.b2",
    }


def test_the_same_choices_stand_side_by_side():
    of_rule = plot_data.settings(FULL)["lin-thresh"]
    beside = parameters.side_by_side([s for s in of_rule if s.name == "trainer.strong_fb"])
    assert beside == pytest.approx([0, 1, 1 - 0.012, 0.012, 1 - 0.024, 1 - 0.036])


def test_logarithms_for_importances():
    first = studies.studies(FULL)["lin-thresh"].trials[0]
    scaled = importances.scored(first, 60.0)
    assert scaled.value == 60 and scaled.state == TrialState.COMPLETE
    assert scaled.params["optimizer.learning_rate"] == math.log(1e-4)
    assert scaled.distributions["optimizer.learning_rate"] == FloatDistribution(
        math.log(1e-4), math.log(1e-2)
    )
    assert scaled.params["model.vf.g_EI"] == 0.5
    assert scaled.distributions["model.vf.g_EI"] == FloatDistribution(0.5, 2.5)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (TRIALS[:1], "1 trial, at least 4 are needed"),
        ([lin(n, COMPLETE, [50.0], gain=1 + n / 9, rate=1e-3 + n / 999) for n in range(5)], "same"),
        ([lin(n, COMPLETE, [50.0 + n], gain=1 + n / 9) for n in range(5)], "1 parameter that"),
        ([r for r in TRIALS if r["rule"] != "bp"], None),
    ],
)
def test_when_there_are_no_importances(rows, why):
    (study,) = studies.studies(FULL._replace(trials=pd.DataFrame(rows))).values()
    reason = importances.cannot_rank(studies.complete_trials(study))
    assert reason is None if why is None else reason is not None and why in reason


def test_early_scores_are_at_the_last_epoch_that_all_trials_reached():
    assert importances.early_scores(FULL, "lin-thresh") == (1, {n: 60 + n for n in (1, 3, 5, 6, 7)})
    assert importances.early_scores(FULL, "bp") == (1, {0: 60, 2: 62})
    alone = FULL._replace(trials=FULL.trials[:1])
    assert importances.early_scores(alone, "bp") == (3, {0: 80})
    assert importances.early_scores(FULL, "taylor") == (0, {})


def test_a_trial_that_was_ended_by_hand_sets_no_epoch_for_the_others():
    rows = [lin(n, COMPLETE, [50.0, 60.0 + n], gain=n) for n in range(4)]
    rows.append(lin(4, PRUNED, [50.0], gain=4) | {"reason": BY_HAND})
    data = FULL._replace(trials=pd.DataFrame(rows), scores=history(rows))
    assert importances.early_scores(data, "lin-thresh")[0] == 2


@pytest.mark.parametrize(
    ("heights", "moved"),
    [
        ([1, 5, 3], [1, 5, 3]),
        ([1, 1, 5], [0.5, 1.5, 5]),
        ([5, 4.8, 5.2, 4], [5.25, 4.25, 6.25, 3.25]),  # four that touch, about their mean, 4.75
        ([], []),
    ],
)
def test_labels_are_moved_apart(heights, moved):
    assert drawing.apart(heights, 1) == pytest.approx(moved)


def test_seeds_and_their_curves():
    seeds = retraining.seeds(FULL)
    assert [(seed.label, seed.nth) for seed in seeds] == [
        *[(LABELS["a"], 0)] * 2,
        *[(LABELS["b"], 0)] * 2,
        (LABELS["c"], 1),
        (LABELS["d"], 0),
    ]
    curves = retraining.learning_curves(FULL._replace(curves=FULL.curves[6:]), "valid_accuracy")
    assert [curve.seed.row["run_id"] for curve in curves] == ["a-2", "b-1", "c-1", "d-1"]
    assert curves[0].epochs == (1, 2, 3) and curves[0].values == (20, 40, 60)
    assert retraining.seeds(FULL._replace(labels={}))[0].label == "bp (a)"


def test_probes_of_the_seeds_that_have_dynamics():
    gaps = [(seed.configuration, gap) for seed, gap in retraining.probes(FULL, "ode_gap")]
    assert gaps == [("b", 1e-4), ("c", 1e-2)]
    without = FULL._replace(retrained=FULL.retrained.drop(columns=["ode_gap"]))
    assert retraining.probes(without, "ode_gap") == []


def test_every_rule_has_a_colour_of_its_own():
    other = pd.DataFrame([trial(9, "new", PRUNED, [1.0], 1e-3)])
    colours = drawing.colours(FULL._replace(trials=pd.concat([FULL.trials, other])))
    assert colours["bp"] == drawing.colours(FULL)["bp"]
    assert len({*colours.values()}) == len(colours) == len(COMPETITORS) + 1


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("optimizer.b1", "optimizer.b1"),
        ("model.vf.controller.k_i", "model.vf.<br>controller.k_i"),
        ("trainer.average_fb_weights", "trainer.<br>average_fb_<br>weights"),
        ("a<b", "a&lt;b"),
    ],
)
def test_wrapped_names(name, lines):
    assert drawing.wrapped_name(name, 14) == lines


def test_wrapped_labels_keep_brackets_whole():
    assert drawing.wrapped("a network <x> (trial 55)", 16) == (
        "a network &lt;x&gt;<br>(trial\N{NO-BREAK SPACE}55)"
    )
