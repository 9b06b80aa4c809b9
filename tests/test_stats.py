"""Means, intervals and expected maxima, against scipy, closed forms and brute force."""

import math
import statistics
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, strategies as st

from analysis import stats
from benchmarks.coverage import coverage

# Degenerate input included, nothing that numpy or scipy would warn of is computed.
pytestmark = pytest.mark.filterwarnings("error")

VALUES = [0.31, 0.29, 0.35, 0.33, 0.28, 0.36, 0.3, 0.34, 0.27, 0.32]
REFUSED = [math.nan, math.inf, -math.inf]
floats = st.floats(-1000, 1000)
samples = st.lists(floats, min_size=2, max_size=10)


def by_seed(values):
    return dict(enumerate(values))


def expanded_tail(n, freedom, level=0.95):
    """Hesterberg's formula; both samples of a difference have n values."""
    z = -math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + level) / 2, freedom)
    return float(scipy.stats.norm.cdf(z))


# Summaries


@given(samples)
def test_mean_and_sd_are_those_of_exact_arithmetic(values):
    found = stats.summary(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert found.interval == stats.bootstrap_interval(values)


def test_mean_and_sd_are_those_of_scipy():
    described = scipy.stats.describe(VALUES)
    found = stats.summary(VALUES)
    assert (found.n, found.mean) == (described.nobs, pytest.approx(described.mean))
    assert found.sd**2 == pytest.approx(described.variance)


def test_of_no_value_there_is_nothing_and_of_one_the_mean():
    n, mean, sd, interval = stats.summary([])
    assert n == 0 and np.isnan([mean, sd, *interval]).all()
    n, mean, sd, interval = stats.summary([0.1])
    assert (n, mean) == (1, 0.1) and np.isnan([sd, *interval]).all()


@pytest.mark.parametrize("value", [0.1, -1e6, 0.0])
@pytest.mark.parametrize("n", [2, 3, 10, 49])
def test_equal_values_have_no_spread_to_the_last_bit(value, n):
    assert stats.summary([value] * n) == (n, value, 0.0, (value, value))


def test_values_too_close_to_have_a_variance_count_as_equal():
    low, high = stats.bootstrap_interval([0.0, 1e-200])
    assert low == high == pytest.approx(5e-201)


@pytest.mark.parametrize("bad", REFUSED)
def test_values_that_are_not_finite_are_refused(bad):
    values, bad_values = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.5, 1: 0.6, 3: bad}  # 3: without a partner
    for refused in (
        lambda: stats.summary([0.5, bad]),
        lambda: stats.bootstrap_interval([bad]),
        lambda: stats.paired_difference(values, bad_values),
        lambda: stats.paired_difference(bad_values, values),
        lambda: stats.unpaired_difference(values, bad_values),
        lambda: stats.unpaired_difference(bad_values, values),
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


# Intervals


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_scipys_percentile_interval_at_the_expanded_level(n, level):
    direct = scipy.stats.bootstrap(
        (sorted(VALUES[:n]),),
        np.mean,
        method="percentile",
        confidence_level=1 - 2 * expanded_tail(n, n - 1, level),
        n_resamples=10_000,
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert stats.bootstrap_interval(VALUES[:n], level, seed=7) == pytest.approx(tuple(direct))


def test_the_expanded_level_is_hesterbergs():
    # his R package, resample 0.6: pnorm(qt(0.025, n - 1) * sqrt(n / (n - 1))); by hand for n = 10,
    # qt = -2.262157 (any table): -2.384519, and 0.855 % lie below
    assert expanded_tail(10, 9) == pytest.approx(0.00855, abs=5e-6)


def test_a_seed_gives_an_interval_whatever_the_order_and_another_seed_another():
    first = stats.bootstrap_interval(VALUES)
    assert stats.bootstrap_interval(VALUES[::-1], seed=0) == first
    assert stats.bootstrap_interval(VALUES, seed=1) != first


@given(samples, floats, st.floats(0.01, 100))
def test_the_interval_moves_and_stretches_with_the_values(values, shift, scale):
    moved = [scale * value + shift for value in values]
    found = stats.bootstrap_interval(moved, resamples=200)
    expected = [scale * end + shift for end in stats.bootstrap_interval(values, resamples=200)]
    assert list(found) == pytest.approx(expected, abs=1e-7)


@given(samples)
def test_the_interval_lies_within_the_range(values):
    low, high = stats.bootstrap_interval(values, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_a_higher_level_gives_a_wider_interval():
    widths = [
        high - low for low, high in (stats.bootstrap_interval(VALUES, p) for p in (0.5, 0.9, 0.99))
    ]
    assert widths == sorted(widths) and len(set(widths)) == 3


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(ValueError, match=f"above 0 and below 1, got level={level}"):
        stats.bootstrap_interval(VALUES, level)


def test_of_three_values_the_interval_is_the_range():
    assert stats.bootstrap_interval(VALUES[:3]) == pytest.approx((0.29, 0.35))


def test_the_interval_covers_the_mean_of_normal_data():
    found = coverage(n=10, repetitions=1000, resamples=2000)
    print(f"n = 10: covers {100 * found.share:.1f} ± {100 * found.error:.1f} %")
    assert 0.93 <= found.share <= 0.97  # 0.95 and three standard errors of 1,000 repetitions
    assert found.width == pytest.approx(1, abs=0.03)  # of the t interval's; a percentile's: 0.83


@pytest.mark.parametrize("n", stats.LOW_COVERAGE)
def test_the_low_coverage_that_is_told_is_that_of_a_simulation(n):
    found = coverage(n, repetitions=500, resamples=1000)
    assert 100 * found.share == pytest.approx(stats.LOW_COVERAGE[n], abs=300 * found.error)
    assert f"n = {n}: " in (stats.low_coverage(n) or "")


def test_low_coverage_is_told_of_small_samples_only():
    assert "needs 2 values" in (stats.low_coverage(1) or "")
    assert stats.low_coverage(0) and stats.low_coverage(5)
    assert not stats.low_coverage(6) and not stats.low_coverage(10)


# Differences


def test_pairs_cancel_what_a_seed_does_to_both():
    effect = np.random.default_rng(0).normal(scale=10, size=10)
    a, b = by_seed(effect + VALUES), by_seed(effect)
    paired, unpaired = stats.paired_difference(a, b), stats.unpaired_difference(a, b)
    assert paired.mean == pytest.approx(np.mean(VALUES)) == unpaired.mean
    assert paired.interval == pytest.approx(stats.bootstrap_interval(VALUES))
    assert paired.interval.low > 0 > unpaired.interval.low
    assert (paired.n, paired.paired) == (10, True)
    assert (unpaired.n, unpaired.paired) == (10, False)


def test_pairs_are_made_by_seed_of_those_that_both_have():
    found = stats.paired_difference({3: 1.0, 1: 2.0, 9: 50.0}, {1: 1.5, 3: 0.5, 4: -50.0})
    assert found == (0.5, (0.5, 0.5), 2, True)


@pytest.mark.parametrize("ratio", [1, 5])
def test_unpaired_is_near_welchs_t_interval_on_normal_data(ratio):
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, size=30), rng.normal(0, ratio, size=30)
    found = stats.unpaired_difference(by_seed(a), by_seed(b))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = welch.confidence_interval()
    assert found.mean == pytest.approx((low + high) / 2)
    # skewness of a sample of 30 shifts the ends by a few per cent of the width
    assert list(found.interval) == pytest.approx([low, high], abs=0.04 * (high - low))


def test_unpaired_is_scipys_percentile_interval_at_welchs_expanded_level():
    a, b = VALUES[:5], [2 * value for value in VALUES[5:]]
    freedom = scipy.stats.ttest_ind(a, b, equal_var=False).df  # pyright: ignore[reportAttributeAccessIssue]
    direct = scipy.stats.bootstrap(
        (sorted(a), sorted(b)),
        lambda x, y, axis: np.mean(x, axis) - np.mean(y, axis),
        method="percentile",
        confidence_level=1 - 2 * expanded_tail(5, freedom),
        n_resamples=10_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    found = stats.unpaired_difference(by_seed(a), by_seed(b), seed=3)
    assert found.interval == pytest.approx(tuple(direct))


def test_unpaired_counts_the_smaller_sample_and_needs_two_values_of_each():
    two, three, one = {0: 1.0, 1: 2.0}, {5: 0.5, 6: 1.0, 7: 0.0}, {0: 4.0}
    assert stats.unpaired_difference(two, three)[::2] == (1.0, 2)
    mean, interval, n, _ = stats.unpaired_difference(one, two)
    assert (mean, n) == (2.5, 1) and np.isnan(interval).all()
    mean, interval, n, _ = stats.unpaired_difference(one, {})
    assert n == 0 and np.isnan([mean, *interval]).all()
    assert np.isnan(stats.paired_difference(two, three).mean)


def test_a_difference_of_two_constants_is_a_point():
    assert stats.unpaired_difference(by_seed([0.3] * 3), by_seed([0.1] * 5)) == (
        0.3 - 0.1,
        (0.3 - 0.1, 0.3 - 0.1),
        3,
        False,
    )


def test_with_one_constant_the_interval_is_that_of_the_other():
    constant = stats.unpaired_difference(by_seed(VALUES), by_seed([0.1] * 4)).interval
    alone = stats.bootstrap_interval([value - 0.1 for value in VALUES])
    # resampled with other random numbers; width 0.042
    assert list(constant) == pytest.approx(list(alone), abs=0.002)


def test_a_difference_is_paired_if_the_seeds_are_the_same_and_two_at_least():
    a, b = by_seed(VALUES), by_seed(VALUES[::-1])
    assert stats.difference(a, b, seed=2) == stats.paired_difference(a, b, seed=2)
    del b[3]
    assert stats.difference(a, b, seed=2) == stats.unpaired_difference(a, b, seed=2)
    assert not stats.difference({0: 1.0}, {0: 2.0}).paired
    assert not stats.difference({}, {}).paired


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


@given(st.lists(floats, min_size=1, max_size=50))
def test_it_rises_from_the_mean_to_the_best(scores):
    curve = stats.expected_maximum(scores)
    assert curve[0] == pytest.approx(np.mean(scores), abs=1e-9)
    assert curve[-1] == pytest.approx(max(scores), abs=1e-9)
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
