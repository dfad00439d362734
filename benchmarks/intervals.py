"""Bootstrap intervals of means over seeds."""

from __future__ import annotations

import numpy as np


def difference_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return float(ours[0] - theirs[0]), float(ours[0] - theirs[0])
    result = bootstrap((ours, theirs), mean_difference, n_resamples=20_000, method="percentile", rng=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_interval(scores: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0])
    found = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)
