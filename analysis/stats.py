"""The statistics of the numbers that are reported.

Means over seeds with bootstrap intervals, differences of two such means, and the best score to
expect of k trials. The bootstrap is seeded: the same values, in any order, give the same interval.

Non-finite values are refused everywhere (ValueError): a caller that leaves out a diverged seed has
to say so beside the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
# Of the 95 % interval of a mean: its coverage in per cent, by the number of values, on normal data
# (`python -m benchmarks.coverage`). With 6 values it is 93 %, from 8 on 94 to 95 %.
LOW_COVERAGE = {2: 50.0, 3: 75.0, 4: 87.5, 5: 92.0}


class Interval(NamedTuple):
    """A confidence interval; both ends NaN where there is none."""

    low: float
    high: float


class Summary(NamedTuple):
    """One quantity over seeds."""

    n: int
    mean: float  # NaN of no value
    sd: float  # with n - 1; NaN of fewer than 2 values
    interval: Interval  # of the mean, 95 %; as `bootstrap_interval`


class Difference(NamedTuple):
    """The difference of two means, the first minus the second."""

    mean: float  # NaN if there is nothing to subtract
    interval: Interval  # 95 %
    n: int  # of pairs; unpaired, of values in the smaller sample
    paired: bool


NO_INTERVAL = Interval(math.nan, math.nan)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, -1 to 1; NaN of fewer than 2 pairs, or if one of the two is always the same."""
    for side in zip(*pairs, strict=True):
        _sample(side)
        if len({*side}) < 2:
            return math.nan
    return (
        float(np.corrcoef(stats.rankdata(pairs, axis=0), rowvar=False)[0, 1]) if pairs else math.nan
    )


def summary(values: Sequence[float]) -> Summary:
    """Count, mean, standard deviation and interval."""
    sample = _sample(values)
    n = len(sample)
    # About the smallest value, as in _mean: exactly 0 of equal values.
    sd = float(np.std(sample - sample[0], ddof=1)) if n > 1 else math.nan
    return Summary(n, _mean(sample), sd, bootstrap_interval(values))


def bootstrap_interval(
    values: Sequence[float], level: float = LEVEL, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The expanded percentile interval of the mean.

    A percentile interval is too narrow for a small sample: resamples vary as the variance with
    divisor n, and its quantiles are the normal's, not Student's. The expanded one corrects both
    in the probabilities of its tails (see `_tail`). On 10 normal values it covers the mean with
    94 to 95 %; percentile and BCa with 90 %. On skewed ones it covers less, as Student's interval
    does (10 exponential values: both 90 %).

    It lies within the sample's range, which misses the median of any continuous distribution with
    probability 2^(1 - n): of 3 values it covers the mean with 75 % at most. `low_coverage` is the
    warning for small n.

    Equal values give the interval [v, v], fewer than 2 none (NaN). Raises ValueError if the level
    is not a probability.

    Hesterberg (2015), What Teachers Should Know About the Bootstrap, The American Statistician
    69(4), 371-386.
    """
    return _interval([_sample(values)], seed, level, resamples)


def low_coverage(n: int) -> str | None:
    """A warning if a 95 % interval from n values covers too little; None if it does not.

    Holds for a mean and for a paired difference of n pairs. For an unpaired one, n being the
    smaller sample's size, it is the worst case: that all variance is in the smaller sample.
    """
    if n < 2:
        return f"n = {n}: an interval needs 2 values"
    if n in LOW_COVERAGE:
        return (
            f"n = {n}: the 95 % interval covers the mean of normal data in only about"
            f" {LOW_COVERAGE[n]:g} % of cases, as a bootstrap never leaves the sample's range"
        )
    return None


def difference(a: Mapping[int, float], b: Mapping[int, float], seed: int = 0) -> Difference:
    """Of two means, values by seed: paired if both have the same seeds, at least 2."""
    paired = len(a) > 1 and a.keys() == b.keys()
    return paired_difference(a, b, seed) if paired else unpaired_difference(a, b, seed)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], seed: int = 0) -> Difference:
    """The mean of a - b over the seeds that both have, and its `bootstrap_interval`.

    What a seed decides for both (the initial weights, the order of the batches) cancels. It does
    not decide the split of the data, which is by position: all seeds share it.
    """
    _sample([*a.values(), *b.values()])  # refuses those without a partner, too
    sample = _sample(a[key] - b[key] for key in a.keys() & b.keys())
    return Difference(_mean(sample), _interval([sample], seed), len(sample), paired=True)


def unpaired_difference(
    a: Mapping[int, float], b: Mapping[int, float], seed: int = 0
) -> Difference:
    """The mean of a minus that of b, whatever their seeds; each sample is resampled on its own.

    The percentile interval of that difference, expanded to Welch's t interval as the one of a mean
    is to Student's (see `_tail`). None (NaN) if a sample has fewer than 2 values.
    """
    samples = [_sample(a.values()), _sample(b.values())]
    mean = _mean(samples[0]) - _mean(samples[1])
    return Difference(mean, _interval(samples, seed), min(map(len, samples)), paired=False)


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
    return sample[0] + weights @ (sample - sample[0])[::-1]


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


def _statistic(first: np.ndarray, *second: np.ndarray, axis: int) -> np.ndarray:
    """The mean, minus that of the second sample, if there is one."""
    return np.mean(first, axis=axis) - sum(np.mean(sample, axis=axis) for sample in second)


def _interval(
    samples: Sequence[np.ndarray], seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """The expanded percentile interval of a mean or of a difference of means."""
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got level={level}")
    if min(map(len, samples)) < 2:
        return NO_INTERVAL
    # About the smallest value, as in _mean: exactly 0 of equal values.
    variances = np.array([np.var(sample - sample[0], ddof=1) for sample in samples])
    if not variances.any():
        value = _mean(samples[0]) - sum(map(_mean, samples[1:]))
        return Interval(value, value)
    n = np.array([len(sample) for sample in samples])
    interval = stats.bootstrap(
        samples,
        _statistic,
        vectorized=True,
        method="percentile",
        confidence_level=1 - 2 * _tail(n, variances, level),
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def _tail(n: np.ndarray, variances: np.ndarray, level: float) -> float:
    """The probability of either tail of the expanded percentile interval, samples of size n.

    Means of resamples have quantiles m ± z s' / √n, with s' of divisor n; wanted are Student's,
    m ± t s / √n with s of divisor n - 1. They agree at z = t √(n / (n - 1)), the tail Phi(-z)
    (Hesterberg 2015). For a difference of means both variances add up, and so the same holds with
    the degrees of freedom of Welch (1947, Biometrika 34, 28-35) and Satterthwaite and with the
    ratio of the two sums of variances.
    """
    share = variances / n / np.sum(variances / n)  # of a sample in the difference's variance
    freedom = 1 / np.sum(share**2 / (n - 1))
    narrowness = np.sqrt(np.sum(share * (n - 1) / n))
    return float(stats.norm.cdf(-stats.t.ppf((1 + level) / 2, freedom) / narrowness))
