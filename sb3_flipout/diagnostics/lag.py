"""Do the mean weights lag behind the sampled ones? What :class:`~sb3_flipout.diagnostics.NoiseEvalCallback` decides it by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Student's t at 99.9 %, one-sided, by the number of evaluations: what chance alone exceeds once in a thousand times.
_T_999 = {5: 7.173, 6: 5.893, 7: 5.208, 8: 4.785, 9: 4.501, 10: 4.297}
LAST = max(_T_999)  # evaluations that count
_LEAST_LAG = 0.1  # of the larger return: what is smaller is significant perhaps, but nothing to warn of
_LEAST_SHARE = 0.1  # of episodes


def mean_lags(mean: Sequence[float], sampled: Sequence[float]) -> bool:
    """
    Decide whether mean weights lag on average, by the first rule in :class:`~sb3_flipout.diagnostics.NoiseEvalCallback`.

    :param mean: Mean returns of the mean weights, evaluation by evaluation, 10 at most
    :param sampled: Those of sampled weights
    :return: Whether they lag; never with less than 5 evaluations
    """
    if len(mean) < min(_T_999):
        return False
    differences = np.subtract(sampled, mean)
    gap, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(mean))
    larger = max(abs(np.mean(mean)), abs(np.mean(sampled)))
    return bool(gap > _T_999[len(mean)] * error and gap >= _LEAST_LAG * larger and gap > 0)


def excelling(mean: Sequence[float], sampled: Sequence[float]) -> list[float]:
    """
    Give the returns of sampled weights that no episode of the mean weights came near.

    :param mean: Returns of the mean weights, episode by episode
    :param sampled: Those of sampled weights
    :return: Those that exceed the best by a tenth of the larger of the two
    """
    best = max(mean)
    return [one for one in sampled if one - best > _LEAST_LAG * max(abs(one), abs(best))]


def best_lags(mean: Sequence[Sequence[float]], sampled: Sequence[Sequence[float]]) -> bool:
    """
    Decide whether mean weights leave unused what perturbed ones show, by the second rule there.

    :param mean: Returns of the mean weights, evaluation by evaluation and episode by episode, 10 evaluations at most
    :param sampled: Those of sampled weights
    :return: Whether they lag; never with less than 10 evaluations
    """
    if len(mean) < LAST:
        return False
    own, others = ([one for episodes in evaluations for one in episodes] for evaluations in (mean, sampled))
    better = excelling(own, others)
    # That the best k of all episodes are sampled ones, if these were no better: Epstein's exceedance test.
    chance = math.prod((len(others) - i) / (len(others) + len(own) - i) for i in range(len(better)))
    if len(better) < _LEAST_SHARE * len(others) or chance > 0.001:
        return False
    gain = np.mean(better) - max(own)
    averages = [np.mean(episodes) for episodes in mean]
    return bool(np.mean(averages[LAST // 2 :]) - np.mean(averages[: LAST // 2]) < _LEAST_LAG * gain)
