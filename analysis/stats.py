"""The statistics of the numbers that are reported.

A rule's accuracies come as `Values`: by repeat of the tuning, then by seed of the retraining. With
several repeats the mean is over repeats, and its interval has both levels in it: the luck of tuning
and that of training. With one repeat it is over seeds, and says nothing about the luck of tuning.
`python -m benchmarks.coverage` measures how often every interval covers.

Non-finite values are refused everywhere (ValueError): a caller that leaves out a diverged seed has
to say so beside the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

LEVEL = 0.95
DRAWS = 10_000  # for the interval of a probability of improvement

Values = Mapping[int, Mapping[int, float]]  # by repeat, by seed; a repeat may have none


class Interval(NamedTuple):
    """A confidence interval; both ends NaN where there is none."""

    low: float
    high: float


class Summary(NamedTuple):
    """One quantity of a rule. A standard deviation is NaN where it cannot be told."""

    n: int  # values
    repeats: int  # that have a value
    mean: float  # over repeats; NaN of no value
    interval: Interval  # of the mean, 95 %
    another: Interval  # in which the mean of another such study lies, 95 %
    training_sd: float  # between the seeds of a repeat
    tuning_sd: float  # between repeats, without what training contributes; at least 0


class Difference(NamedTuple):
    """The difference of two means, the first minus the second."""

    mean: float  # NaN if there is nothing to subtract
    interval: Interval  # 95 %
    p: float  # that a difference as large comes by chance, two-sided; NaN where no interval is
    paired: bool  # by seed


class Improvement(NamedTuple):
    """How probably one rule beats another."""

    probability: float  # NaN if one of them has no value
    interval: Interval  # 95 %


NO_INTERVAL = Interval(math.nan, math.nan)


def by_repeat(rows: Iterable[Mapping[str, Any]], metric: str) -> Values:
    """The values of retrained seeds, rows of `runs.retrained`: of one rule, of which each repeat
    has one configuration."""
    values: dict[int, dict[int, float]] = {}
    for row in rows:
        values.setdefault(row["repeat"], {})[row["seed"]] = row[metric]
    return values


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, -1 to 1; NaN of fewer than 2 pairs, or if one of the two is always the same."""
    for side in zip(*pairs, strict=True):
        _sample(side)
        if len({*side}) < 2:
            return math.nan
    return (
        float(np.corrcoef(stats.rankdata(pairs, axis=0), rowvar=False)[0, 1]) if pairs else math.nan
    )


def summary(values: Values) -> Summary:
    """Mean, interval and variance components.

    The interval is Student's, over seeds with one repeat and over the repeats' means with several.
    These vary with the variance of tuning plus that of training / n, so that the interval is exact
    for normal data with equally many seeds in each repeat, whatever the ratio of the two variances.

    The mean of another study with as many repeats and seeds varies as much as this one, so the
    interval in which it lies is sqrt(2) times as wide (with one repeat: if it has the same
    configuration). The interval of the mean holds it in 88 % of cases with 5 repeats, and in 83 %
    with many.

    The standard deviation of training is pooled over the repeats. That of tuning is the moment
    estimator: the variance of the repeats' means, less what training contributes to it.

    Bouthillier et al. (2021), Accounting for Variance in Machine Learning Benchmarks, MLSys 3.
    Cumming and Maillardet (2006), Psychological Methods 11, 217-227. Spence and Stanley (2016),
    PLoS ONE 11, e0162874.
    """
    repeats = _repeats(values)
    means = _units(repeats)
    sizes = np.array([len(repeat) for repeat in repeats])
    n = int(sizes.sum())
    training = _within(repeats) / (n - len(repeats)) if n > len(repeats) else math.nan
    tuning = (
        max(0.0, _variance(means) - training * float(np.mean(1 / sizes)))
        if len(repeats) > 1 and not math.isnan(training)
        else math.nan
    )
    mean, (interval, _) = _mean(means), _t_test(means)
    another = Interval(*(mean + math.sqrt(2) * (end - mean) for end in interval))
    return Summary(n, len(repeats), mean, interval, another, math.sqrt(training), math.sqrt(tuning))


def difference(a: Values, b: Values) -> Difference:
    """Of two means: paired by seed if each has one repeat and both have the same seeds, at least 2.

    What a seed decides for both (the initial weights, the order of the batches) then cancels. It
    does not decide the split of the data, which is by position: all seeds share it.
    """
    if len(a) == len(b) == 1:
        (first,), (second,) = a.values(), b.values()
        if len(first) > 1 and first.keys() == second.keys():
            _sample([*first.values(), *second.values()])  # refuses what is not finite
            pairs = _sample(first[seed] - second[seed] for seed in first)
            return Difference(_mean(pairs), *_t_test(pairs), paired=True)
    return unpaired_difference(a, b)


def unpaired_difference(a: Values, b: Values) -> Difference:
    """The mean of a minus that of b, by Welch's t test: of seeds or, where there are several
    repeats, of the repeats' means.

    Repeats are tuned independently, so their means are not paired, though rules share the seeds of
    a repeat: what these do to both makes the interval cover more than 95 %, never less.

    Welch (1947), Biometrika 34, 28-35.
    """
    units = [_units(_repeats(values)) for values in (a, b)]
    return Difference(_mean(units[0]) - _mean(units[1]), *_t_test(*units), paired=False)


def improvement(a: Values, b: Values, draws: int = DRAWS) -> Improvement:
    """The probability that a network of rule a, tuned and retrained at random, is better than one
    of b: the share of all pairs in which it is, ties half (Mann and Whitney 1947), over all pairs
    of repeats alike.

    That share is 0 or 1 in many small samples, and then knows no error. So the interval uses how
    far apart values are: it is the generalized confidence interval of Phi(difference of means /
    sqrt(sum of both variances)), drawn from the distributions of mean and variances, given the
    values, on normal data, widened to hold the share. Seeded: the same values, in any order, give
    the same interval. None (NaN) if a rule has fewer than 2 values, or neither's vary: with several
    repeats, the means of these.

    Weerahandi (1993), Generalized Confidence Intervals, JASA 88, 899-905.
    """
    first, second = _repeats(a), _repeats(b)
    if not first or not second:
        return Improvement(math.nan, NO_INTERVAL)
    share = float(np.mean([_share(one, other) for one in first for other in second]))
    units = [_units(repeats) for repeats in (first, second)]
    if min(map(len, units)) < 2 or not sum(map(_variance, units)) > 0:
        return Improvement(share, NO_INTERVAL)
    rng = np.random.default_rng(0)
    (mean, variance), (other_mean, other_variance) = (
        _drawn(repeats, rng, draws) for repeats in (first, second)
    )
    drawn = special.ndtr((mean - other_mean) / np.sqrt(variance + other_variance))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Improvement(share, Interval(min(float(low), share), max(float(high), share)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number: where they are below 0.05, one of them or more is a false alarm in
    at most 5 % of cases. NaN (no test) stays NaN and is not counted.

    Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        adjusted[i] = least = max(least, min(1.0, p * (len(order) - rank)))
    return adjusted


def binomial_error(accuracy: float, images: float) -> float:
    """The standard error of an accuracy in % that is due to the choice of the test images, in
    points. NaN of NaN."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


def expected_maximum(scores: Sequence[float]) -> np.ndarray:
    """The best score to expect of k trials, for k = 1..n: the mean over all subsets of k scores.

    With the scores in ascending order x_(1)..x_(n) that is sum_i C(i-1, k-1) / C(n, k) x_(i): the
    unbiased estimator of the expected maximum of k independent draws. That of Dodge et al. (2019)
    draws with replacement and is too low. Unbiased is not precise: near k = n it hangs on the best
    few scores (Dodge et al. 2021, EMNLP Findings, find its variance the largest of three).
    No scores give an empty array.

    Tang et al. (2020), Showing Your Work Doesn't Always Work, ACL.
    """
    sample = _sample(scores)
    n = len(sample)
    if n == 0:
        return np.empty(0)
    i = np.arange(n, 1, -1)  # descending
    k = np.arange(1, n + 1)[:, None]
    # Binomials overflow, their ratios do not: x_(n) weighs k / n, and the weight of x_(i-1) is that
    # of x_(i) times (i - k) / (i - 1). From i = k on it is 0.
    ratios = np.maximum(i - k, 0) / (i - 1)
    weights = np.cumprod(np.hstack([k / n, ratios]), axis=1)
    # Above the lowest score, as in _mean: equal scores stay what they are.
    curve = sample[0] + weights @ (sample - sample[0])[::-1]
    # So many scores that one of the best is among them: exactly the best, which users compare with.
    curve[np.count_nonzero(sample < sample[-1]) :] = sample[-1]
    return curve


def _sample(values: Iterable[float]) -> np.ndarray:
    """Sorted, so that nothing depends on the order. Raises ValueError if one is not finite."""
    sample = np.sort(np.array(list(values), dtype=float))
    bad = sample[~np.isfinite(sample)]
    if bad.size:
        raise ValueError(f"values must be finite, got {', '.join(map(str, bad))}")
    return sample


def mean(values: Iterable[float]) -> float:
    return _mean(_sample(values))


def _mean(sample: np.ndarray) -> float:
    """About the smallest value: exactly v of equal values v. NaN of none."""
    return float(sample[0] + np.mean(sample - sample[0])) if len(sample) else math.nan


def _variance(sample: np.ndarray) -> float:
    """With divisor n - 1, of 2 values or more; about the smallest: exactly 0 of equal values."""
    return float(np.var(sample - sample[0], ddof=1))


def _repeats(values: Values) -> list[np.ndarray]:
    """The samples of the repeats that have any value."""
    return [_sample(seeds.values()) for _, seeds in sorted(values.items()) if seeds]


def _units(repeats: Sequence[np.ndarray]) -> np.ndarray:
    """What varies independently: the means of several repeats, the values of a single one."""
    return repeats[0] if len(repeats) == 1 else _sample(map(_mean, repeats))


def _within(repeats: Sequence[np.ndarray]) -> float:
    """The sum of squares about the repeats' own means."""
    return sum(_variance(repeat) * (len(repeat) - 1) for repeat in repeats if len(repeat) > 1)


def _t_test(*samples: np.ndarray) -> tuple[Interval, float]:
    """(interval, p) of a mean, or of the difference of two: with the degrees of freedom of Welch
    and Satterthwaite, which are n - 1 of one sample.

    None (NaN) if a sample has fewer than 2 values, or none of them varies: how far they would is
    then below what can be seen.
    """
    if min(map(len, samples)) < 2:
        return NO_INTERVAL, math.nan
    errors = np.array([_variance(sample) / len(sample) for sample in samples])
    squared = float(errors.sum())
    if not squared > 0:
        return NO_INTERVAL, math.nan
    shares = errors / squared
    freedom = 1 / sum(
        share**2 / (len(sample) - 1) for share, sample in zip(shares, samples, strict=True)
    )
    mean = _mean(samples[0]) - sum(map(_mean, samples[1:]))
    error = math.sqrt(squared)
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error  # Student's t
    return Interval(mean - half, mean + half), 2 * float(special.stdtr(freedom, -abs(mean) / error))


def _share(a: np.ndarray, b: np.ndarray) -> float:
    """Of the pairs in which the value of a is larger, ties half."""
    return float(np.mean(np.sign(a[:, None] - b) + 1)) / 2


def _drawn(
    repeats: Sequence[np.ndarray], rng: np.random.Generator, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized pivotal quantities of the mean and of one network's variance, both levels added
    up."""
    units = _units(repeats)
    n = len(units)
    of_units = _variance(units) * (n - 1) / rng.chisquare(n - 1, draws)
    mean = _mean(units) + rng.standard_normal(draws) * np.sqrt(of_units / n)
    sizes = np.array([len(repeat) for repeat in repeats])
    freedom = sizes.sum() - len(repeats)
    if len(repeats) == 1 or freedom == 0:  # a unit is one network
        return mean, of_units
    training = _within(repeats) / rng.chisquare(freedom, draws)
    # That of tuning is of_units - training * mean(1 / sizes). Drawn below 0 it counts as well: at 0
    # it would make the sum too large, and the interval miss a P near 0 or 1.
    return mean, of_units + training * np.mean(1 - 1 / sizes)
