"""Means, intervals, comparisons and expected maxima, against scipy, closed forms, brute force and
simulations."""

import math
import statistics
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, strategies as st

from analysis import stats
from analysis.report.contents import COVERS, FALSE_ALARMS, compared
from benchmarks import coverage
from benchmarks.coverage import (
    ANOTHER,
    ANOTHER_BY_MEAN,
    DIFFERENCE,
    MEAN,
    MIXED,
    PROBABILITIES,
    UNPAIRED,
    Case,
    Rule,
)

# Degenerate input included, nothing that numpy or scipy would warn of is computed.
pytestmark = pytest.mark.filterwarnings("error")

VALUES = [0.31, 0.29, 0.35, 0.33, 0.28, 0.36, 0.3, 0.34, 0.27, 0.32]
REFUSED = [math.nan, math.inf, -math.inf]
floats = st.floats(-1000, 1000)
samples = st.lists(floats, min_size=2, max_size=10)
EQUAL, BETTER, MUCH_BETTER, FAR_BETTER = PROBABILITIES
SIMULATED = {  # where benchmarks.coverage finds the figures of the notes
    "mean": (MEAN, "normal", 1.0, (3, 3, 3)),
    "mean, skewed": (MEAN, "skewed", 0.0, (3,)),
    "mean, strongly skewed": (MEAN, "strongly skewed", 0.0, (3,)),
    "another study's mean": (ANOTHER, "normal", 1.0, (3, 3, 3)),
    "another study's mean, strongly skewed": (ANOTHER, "strongly skewed", 1.0, (3,) * 5),
    "difference": (UNPAIRED, "strongly skewed", 0.0, (3,)),
    "P": (MUCH_BETTER, "skewed", 0.0, (3, 3, 3)),
    "P, strongly skewed": (FAR_BETTER, "strongly skewed", 0.0, (10,)),
    "difference, 3 seeds, of rules": (DIFFERENCE, "normal", 1.0, (3,)),
    "difference, 10 seeds, of rules": (DIFFERENCE, "normal", 1.0, (10,)),
    "difference, one tuning and several, of rules": (MIXED, "normal", 1.0, coverage.SOME_DIVERGED),
}


def once(values):
    """Of a single repeat, by seed."""
    return {1: dict(enumerate(values))}


def repeated(*repeats):
    """By repeat, from 1, and by seed, other ones in each repeat."""
    return {
        number: {1000 * number + seed: value for seed, value in enumerate(values)}
        for number, values in enumerate(repeats, start=1)
    }


# Summaries


@given(samples)
def test_mean_and_sd_are_those_of_exact_arithmetic(values):
    found = stats.summary(once(values))
    assert (found.n, found.repeats) == (len(values), 1)
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.training_sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert math.isnan(found.tuning_sd)


def test_of_no_value_there_is_nothing_and_of_one_the_mean():
    for nothing in ({}, {1: {}}, {1: {}, 2: {}}):
        n, repeats, *rest = stats.summary(nothing)
        assert n == repeats == 0 and np.isnan(np.hstack(rest)).all()
    n, repeats, mean, *rest = stats.summary(once([0.1]))
    assert (n, repeats, mean) == (1, 1, 0.1) and np.isnan(np.hstack(rest)).all()


@pytest.mark.parametrize("value", [0.1, -1e6, 0.0])
@pytest.mark.parametrize("n", [2, 3, 10, 49])
def test_equal_values_have_no_spread_to_the_last_bit_and_no_interval(value, n):
    found = stats.summary(once([value] * n))
    assert found[:3] == (n, 1, value) and found.training_sd == 0.0
    assert np.isnan(found.interval).all()
    found = stats.summary(repeated([value] * n, [value] * n))
    assert (found.mean, found.training_sd, found.tuning_sd) == (value, 0.0, 0.0)
    assert np.isnan(found.interval).all()


def test_values_too_close_to_have_a_variance_count_as_equal():
    assert np.isnan(stats.summary(once([0.0, 1e-200])).interval).all()


@pytest.mark.parametrize("bad", REFUSED)
def test_values_that_are_not_finite_are_refused(bad):
    values, bad_values = once([0.5, 0.6, 0.7]), once([0.5, 0.6, bad])
    for refused in (
        lambda: stats.summary(bad_values),
        lambda: stats.difference(values, bad_values),
        lambda: stats.difference(bad_values, values),
        lambda: stats.unpaired_difference(values, bad_values),
        lambda: stats.unpaired_difference(bad_values, values),
        lambda: stats.improvement(values, bad_values),
        lambda: stats.expected_maximum([0.5, bad]),
        lambda: stats.rank_correlation([(0.5, 0.5), (0.6, bad)]),
    ):
        with pytest.raises(ValueError, match=r"must be finite, got (nan|inf|-inf)"):
            refused()


def test_rank_correlation_is_that_of_scipy():
    pairs = list(np.random.default_rng(0).normal(size=(9, 2)).round(1))
    expected = scipy.stats.spearmanr(pairs)[0]
    assert stats.rank_correlation(pairs) == pytest.approx(expected)
    assert math.isnan(stats.rank_correlation([(1.0, 2.0), (1.0, 3.0)]))
    assert math.isnan(stats.rank_correlation([]))


# Intervals of a mean


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_of_one_tuning_is_students(n):
    direct = scipy.stats.ttest_1samp(VALUES[:n], 0).confidence_interval(0.95)
    assert stats.summary(once(VALUES[:n])).interval == pytest.approx(tuple(direct))


def test_that_of_several_is_students_of_the_means_of_repeats():
    repeats = [VALUES[:3], VALUES[3:5], VALUES[5:]]
    found = stats.summary({**repeated(*repeats), 4: {}})  # of a repeat, every seed diverged
    direct = scipy.stats.ttest_1samp([np.mean(own) for own in repeats], 0)
    assert (found.n, found.repeats) == (10, 3)
    assert found.interval == pytest.approx(tuple(direct.confidence_interval(0.95)))
    assert found.mean == pytest.approx(np.mean([np.mean(own) for own in repeats]))
    error = np.std([np.mean(own) for own in repeats], ddof=1) * math.sqrt(1 / 3 + 1 / 3)
    another = scipy.stats.t(2, found.mean, error).interval(0.95)
    assert found.another == pytest.approx(another)


def test_the_variances_are_those_of_an_analysis_of_variance():
    """Of equally many seeds: the means of squares within and between (Searle et al. 1992)."""
    values = np.random.default_rng(0).normal(np.array([[0.0], [1.0], [2.0], [4.0]]), size=(4, 5))
    found = stats.summary(repeated(*values))
    within = np.mean(np.var(values, axis=1, ddof=1))
    between = 5 * np.var(values.mean(axis=1), ddof=1)
    assert found.training_sd**2 == pytest.approx(within)
    assert found.tuning_sd**2 == pytest.approx((between - within) / 5)


def test_the_variance_of_tuning_is_unbiased_also_of_few_seeds_and_never_negative():
    rng = np.random.default_rng(1)
    case = Case("normal", 2.0, (10, 8, 2))
    simulated = [stats.summary(coverage.study(rng, case, [coverage.Rule()])[0]) for _ in range(400)]
    assert np.mean([found.tuning_sd**2 for found in simulated]) == pytest.approx(4, rel=0.2)
    assert np.mean([found.training_sd**2 for found in simulated]) == pytest.approx(1, rel=0.1)
    assert stats.summary(repeated([0, 2], [2, 0])).tuning_sd == 0.0
    assert math.isnan(stats.summary(repeated([1], [2], [4])).tuning_sd)  # who knows which it was


def test_one_lucky_tuning_makes_the_interval_wide():
    ordinary, lucky = [87.0, 87.2, 87.1, 86.9], [88.9, 89.1, 89.0, 89.0]
    alone = stats.summary(once(lucky)).interval
    assert alone.low > 88  # a single repeat, if it was this one
    found = stats.summary(repeated(ordinary, ordinary, lucky, ordinary, ordinary))
    assert found.interval.low < 87.05 < 87.43 < found.interval.high
    assert found.tuning_sd == pytest.approx(0.87, abs=0.02)
    assert found.training_sd == pytest.approx(0.12, abs=0.01)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=10), floats, st.floats(0.01, 100))
def test_the_interval_moves_and_stretches_with_the_values(values, shift, scale):
    moved = [scale * value + shift for value in values]
    found = stats.summary(once(moved)).interval
    expected = [scale * end + shift for end in stats.summary(once(values)).interval]
    assert list(found) == pytest.approx(expected, abs=1e-6, nan_ok=True)


# Simulated, 600 studies of each kind: the binomial standard error of a coverage is 0.9 points


@pytest.mark.parametrize("seeds", [(3,), (10,), (3, 3, 3), (5,) * 5, coverage.SOME_DIVERGED])
def test_the_interval_of_a_mean_covers_it(seeds):
    case = Case("normal", 2.0 if len(seeds) > 1 else 0.0, seeds)
    assert 0.92 < coverage.coverage(MEAN, case, 600) < 0.97


@pytest.mark.parametrize(
    ("kind", "seeds", "ratio", "least", "most"),
    [
        (DIFFERENCE, (3,), 0.0, 0.92, 0.97),
        (DIFFERENCE, (5, 5, 5), 0.0, 0.94, 1.0),  # the rules share the luck of training
        (DIFFERENCE, (5, 5, 5), 2.0, 0.92, 0.98),
        (UNPAIRED, (3,), 0.0, 0.91, 0.97),
        (UNPAIRED, (5,) * 5, 2.0, 0.92, 0.97),
        (EQUAL, (5,), 0.0, 0.94, 1.0),
        (EQUAL, (5,) * 5, 2.0, 0.94, 1.0),
        (BETTER, (10,), 0.0, 0.92, 0.98),
        (MUCH_BETTER, (3, 3, 3), 0.0, 0.92, 0.98),
        (FAR_BETTER, (3, 3, 3), 0.0, 0.92, 0.98),
        (FAR_BETTER, coverage.SOME_DIVERGED, 0.0, 0.91, 0.98),
        (BETTER, coverage.SOME_DIVERGED, 2.0, 0.94, 1.0),
    ],
)
def test_the_interval_of_a_comparison_covers_it(kind, seeds, ratio, least, most):
    assert least < coverage.coverage(kind, Case("normal", ratio, seeds), 600) < most


@pytest.mark.parametrize("repeats", [3, 5])
def test_the_interval_of_a_mean_holds_that_of_another_study_less_often(repeats):
    """Student's t lies within 1/sqrt(2) of its 95 % quantile in so many cases."""
    t = scipy.stats.t(repeats - 1)
    exact = 1 - 2 * t.sf(t.ppf(0.975) / math.sqrt(2))
    found = coverage.coverage(ANOTHER_BY_MEAN, Case("normal", 1.0, (3,) * repeats), 600)
    assert within(found, 100 * exact, 600)
    assert round(100 * exact) == {3: 91, 5: 88}[repeats]


def test_two_studies_of_the_same_rules_rarely_disagree():
    """A false alarm: of four rules one or more has p < 0.05 (Holm)."""
    rng, rules = np.random.default_rng(0), [Rule()] * 4
    alarms = 0
    for _ in range(200):
        pair = (coverage.study(rng, Case("normal", 1.0, (3,) * 5), rules) for _ in range(2))
        p = [stats.unpaired_difference(a, b).p for a, b in zip(*pair, strict=True)]
        alarms += min(stats.holm(p)) < 0.05
    assert alarms <= 0.08 * 200  # 5 % and two standard errors


def test_rules_tuned_repeatedly_are_rarely_told_apart_if_equal_and_often_if_not():
    equal, better = (coverage.comparison((5, 5, 5), points) for points in (0, 1))
    assert equal.probability == pytest.approx(0.5, abs=0.03)
    assert equal.told <= 0.08  # 5 % and two standard errors of 200 studies
    assert better.probability > 0.8 and better.told > 3 * equal.told


def within(found, percent, repetitions):
    """Three standard errors of so many simulated studies, and a point for the rounding."""
    share = percent / 100
    return abs(found - share) <= 3 * math.sqrt(share * (1 - share) / repetitions) + 0.01


@pytest.mark.parametrize("name", COVERS)
def test_the_notes_of_a_report_say_what_the_intervals_cover(name):
    kind, *case = SIMULATED[name]
    assert within(coverage.coverage(kind, Case(*case), 400, seed=1), COVERS[name], 400)


@pytest.mark.parametrize("seeds", FALSE_ALARMS)
def test_they_say_how_often_one_tuning_raises_a_false_alarm(seeds):
    found = coverage.comparison((seeds,), 0, seed=1).told
    assert within(found, FALSE_ALARMS[seeds], coverage.STUDIES)


def test_a_comparison_of_one_tuning_says_that_it_is_of_configurations():
    once_, several, mixed = map(" ".join, map(compared, ({False}, {True}, {False, True})))
    for words in (once_, mixed):
        assert "of these configurations, not of the rules" in words and "76 %" in words
    assert "of these configurations" not in several
    assert "with several" in mixed and "with several" not in once_


# Differences


def test_pairs_cancel_what_a_seed_does_to_both():
    effect = np.random.default_rng(0).normal(scale=10, size=10)
    a, b = once(effect + VALUES), once(effect)
    paired, unpaired = stats.difference(a, b), stats.unpaired_difference(a, b)
    assert paired.mean == pytest.approx(np.mean(VALUES)) == unpaired.mean
    assert paired.interval == pytest.approx(stats.summary(once(VALUES)).interval)
    assert paired.interval.low > 0 > unpaired.interval.low
    assert paired.paired and not unpaired.paired
    assert paired.p == pytest.approx(scipy.stats.ttest_rel(effect + VALUES, effect)[1])


def test_pairs_are_made_by_seed():
    found = stats.difference({1: {3: 1.0, 1: 2.0}}, {1: {1: 1.5, 3: 0.0}})
    assert (found.mean, found.paired) == (0.75, True)


@pytest.mark.parametrize("ratio", [1, 5])
def test_unpaired_is_welchs(ratio):
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, size=3), rng.normal(0, ratio, size=5)
    found = stats.unpaired_difference(once(a), once(b))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert found.interval == pytest.approx(tuple(welch.confidence_interval()))
    assert found.p == pytest.approx(welch[1])


def test_with_several_repeats_their_means_are_compared_though_seeds_are_shared():
    a, b = repeated(VALUES[:3], VALUES[3:6]), repeated(VALUES[2:5], VALUES[7:])
    means = [[np.mean([*own.values()]) for own in values.values()] for values in (a, b)]
    welch = scipy.stats.ttest_ind(*means, equal_var=False)
    found = stats.difference(a, b)
    assert found.interval == pytest.approx(tuple(welch.confidence_interval()))
    assert not found.paired
    one = stats.difference(a, once(VALUES))  # of one tuning: its seeds
    welch = scipy.stats.ttest_ind(means[0], VALUES, equal_var=False)
    assert one.interval == pytest.approx(tuple(welch.confidence_interval()))


def test_unpaired_needs_two_values_of_each():
    two, one = once([1.0, 2.0]), once([4.0])
    mean, *rest = stats.unpaired_difference(one, two)[:3]
    assert mean == 2.5 and np.isnan(np.hstack(rest)).all()
    mean, *rest = stats.difference(one, {})[:3]
    assert np.isnan(np.hstack([mean, *rest])).all()


def test_a_difference_of_two_constants_has_no_interval():
    for found in (
        stats.unpaired_difference(once([0.3] * 3), once([0.1] * 5)),
        stats.difference(once([0.3] * 3), once([0.1] * 3)),
    ):
        assert found.mean == 0.3 - 0.1 and np.isnan([*found.interval, found.p]).all()


def test_with_one_constant_the_interval_is_that_of_the_other():
    found = stats.unpaired_difference(once(VALUES), once([0.0] * 4)).interval
    assert found == pytest.approx(stats.summary(once(VALUES)).interval)


def test_a_difference_is_paired_if_the_seeds_are_the_same_and_two_at_least():
    a, b = once(VALUES), once(VALUES[::-1])
    assert stats.difference(a, b).paired
    del b[1][3]
    assert stats.difference(a, b) == stats.unpaired_difference(a, b)
    assert not stats.difference({1: {0: 1.0}}, {1: {0: 2.0}}).paired
    assert not stats.difference({}, {}).paired


# The probability of improvement


def test_the_probability_is_mann_and_whitneys():
    a, b = VALUES[:5], [0.3, 0.31, 0.28, 0.4]
    u = scipy.stats.mannwhitneyu(a, b).statistic
    assert stats.improvement(once(a), once(b)).probability == u / 20
    assert stats.improvement(once(b), once(a)).probability == 1 - u / 20


def test_a_repeat_counts_the_same_however_many_seeds_it_has():
    a = repeated([2.0], [0.0] * 9)
    assert stats.improvement(a, once([1.0, 1.0])).probability == 0.5


def test_the_interval_holds_the_share_and_does_not_depend_on_the_order():
    a, b = repeated([3.0, 4.0], [5.0, 3.5]), repeated([1.0, 2.0], [0.5, 2.5])
    found = stats.improvement(a, b)
    assert found.probability == found.interval.high == 1.0 and 0 < found.interval.low < 0.9
    turned = {2: dict(reversed(a[2].items())), 1: a[1]}
    assert stats.improvement(turned, b) == found


def test_values_that_do_not_vary_or_are_too_few_give_no_interval_of_it():
    for a, b, share in (
        ([2.0, 2.0], [1.0, 1.0], 1.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([2.0], [1.0, 3.0], 0.5),
    ):
        found = stats.improvement(once(a), once(b))
        assert found.probability == share and np.isnan(found.interval).all()
    assert np.isnan(np.hstack(stats.improvement({}, once(VALUES)))).all()


# Several comparisons, and the test set


def test_holms_correction_is_that_of_his_paper():
    # Holm (1979): the smallest of m is multiplied by m, the next by m - 1, none below the last
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    found = stats.holm([0.02, math.nan, 0.01])
    assert math.isnan(found[1]) and found[::2] == pytest.approx([0.02, 0.02])
    assert stats.holm([]) == []


def test_the_error_of_a_test_set_is_binomial():
    assert stats.binomial_error(90, 360) == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 360))
    assert stats.binomial_error(100, 360) == 0.0
    assert math.isnan(stats.binomial_error(math.nan, 360))


# The expected maximum


@pytest.mark.parametrize(("sign", "best"), [(1, max), (-1, min)])
@given(scores=st.lists(floats, min_size=1, max_size=7))
def test_the_expected_maximum_is_the_mean_over_all_subsets(sign, best, scores):
    expected = [
        np.mean([best(subset) for subset in combinations(scores, k)])
        for k in range(1, len(scores) + 1)
    ]
    curve = sign * stats.expected_maximum([sign * score for score in scores])
    assert curve == pytest.approx(expected, abs=1e-9)


def test_of_all_scores_it_is_the_best_one_to_the_last_bit():
    scores = [13.937282229965156, 87.10801393728222]
    assert stats.expected_maximum(scores)[-1] == scores[-1]


@given(st.lists(floats, min_size=1, max_size=50))
def test_it_rises_from_the_mean_to_the_best(scores):
    curve = stats.expected_maximum(scores)
    assert curve[0] == pytest.approx(np.mean(scores), abs=1e-9)
    from_here = len(scores) - scores.count(max(scores))  # so many may be without a best one
    assert (curve[from_here:] == max(scores)).all()
    assert (np.diff(curve) >= -1e-9).all()


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_it_is_exact_where_binomials_overflow(n):
    # the expected largest of k of the numbers 1..n is k (n + 1) / (k + 1)
    k = np.arange(1, n + 1)
    found = stats.expected_maximum(range(n, 0, -1))
    np.testing.assert_allclose(found, k * (n + 1) / (k + 1), rtol=1e-12)


def test_it_is_unbiased_where_drawing_with_replacement_is_not():
    # the expected largest of k uniform numbers is k / (k + 1)
    draws = np.random.default_rng(0).random((20_000, 4))
    found = np.mean([stats.expected_maximum(scores) for scores in draws], axis=0)
    k = np.arange(1, 5)
    standard_error = 0.29 / math.sqrt(20_000)  # at most: of one uniform number
    np.testing.assert_allclose(found, k / (k + 1), atol=4 * standard_error)
    ordered = np.sort(draws).mean(axis=0)
    plug_in = ((k / 4) ** 4 - ((k - 1) / 4) ** 4) @ ordered  # Dodge et al. 2019, of 4 draws
    assert plug_in < 4 / 5 - 20 * standard_error


def test_no_scores_have_no_expected_maximum_and_equal_ones_themselves():
    assert stats.expected_maximum([]).shape == (0,)
    assert stats.expected_maximum([0.1] * 9).tolist() == [0.1] * 9
