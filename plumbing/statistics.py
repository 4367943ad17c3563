"""Statistics of scores and of means over problems: ranks, AUROC, calibration, intervals.

None of it is the paper's; eval.py's table and train.py's validation print them.
"""
import math
from typing import NamedTuple

import numpy as np


def ranks(values):
    """Ranks from 1 of values (N,); equal values share the mean of theirs."""
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    middle = count.cumsum() - (count - 1) / 2
    return middle[place]


def auroc(scores, positive):
    """Chance that a positive example scores above a negative one, ties counting half; nan where
    either kind is missing. scores, positive: (N,)."""
    good = np.asarray(positive, bool)
    if good.all() or not good.any():
        return math.nan
    rank = ranks(scores)
    return float((rank[good].mean() - rank[~good].mean()) / len(rank) + 0.5)


def spearman(a, b):
    """Correlation of the ranks of a and b, (N,) each; nan where either is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def calibration_error(scores, labels, bins=10):
    """Mean over examples of their bin's |mean score - mean label|; equal bins on [0, 1]."""
    place = np.minimum(np.multiply(scores, bins).astype(int), bins - 1)
    excess = np.bincount(place, np.subtract(scores, labels))  # (bins,) summed over a bin's examples
    return float(np.abs(excess).sum() / len(scores))


def pairwise_accuracy(scores, labels, groups):
    """Share of the pairs within a group, of different labels, that the scores put in the right
    order, ties counting half; nan where there is no pair. All three: (N,)."""
    scores = np.asarray(scores, float)
    labels = np.asarray(labels, float)
    groups = np.asarray(groups)
    gaps = []
    for group in np.unique(groups):
        score = scores[groups == group]
        label = labels[groups == group]
        gap = score[:, None] - score  # (members, members)
        gaps.append(gap[label[:, None] > label])
    gaps = np.concatenate(gaps)
    if len(gaps) == 0:
        return math.nan
    return float((np.sum(gaps > 0) + 0.5 * np.sum(gaps == 0)) / len(gaps))


class Interval(NamedTuple):
    """A mean over problems and its 95% interval."""
    mean: float
    low: float
    high: float


def interval(values, seed=0, draws=2000):
    """The Interval of one value a problem, by bootstrap over problems."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(values), (draws, len(values)))
    means = np.take(values, chosen).mean(1)  # (draws,)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(float(np.mean(values)), low, high)
