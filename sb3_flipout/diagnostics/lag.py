"""Do the mean weights lag behind the sampled ones? What :class:`~sb3_flipout.callbacks.NoiseEvalCallback` decides it by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_ERROR = 0.001  # chance alone makes a whole training lag so often at most
_EVERY = 5  # evaluations between two looks
_LEAST = 10  # evaluations that a look is about, where there are so many
_LEAST_LAG = 0.1  # of the larger return: what is smaller is significant perhaps, but nothing to warn of
_LEAST_SHARE = 0.1  # of episodes

Returns = Sequence[Sequence[float]]  # evaluation by evaluation, and episode by episode


class LagTest:
    """
    Decides after each evaluation whether the mean weights lag, and errs in one training of a thousand however long it is.

    A test that is repeated errs again and again. So only every fifth evaluation is looked at, and the k-th look may err with a
    probability of ``0.001 / (k (k + 1))``; over all looks these add up to 0.001. A look is about the later half of all
    evaluations, so it becomes stricter and sees more. Each of its two rules takes half of that probability.
    """

    def __init__(self) -> None:
        self._looks = 0

    @staticmethod
    def window(evaluations: int) -> int:
        """
        Say how many of the last evaluations a look is about.

        :param evaluations: How many there have been
        :return: The later half, 10 at least
        """
        return min(evaluations, max(_LEAST, evaluations // 2))

    def look(self, mean: Returns, sampled: Returns) -> bool:
        """
        Decide, by the rules in :class:`~sb3_flipout.callbacks.NoiseEvalCallback`; call it after each evaluation.

        :param mean: Returns of the mean weights in all evaluations so far
        :param sampled: Those of sampled weights
        :return: Whether the mean weights lag; ``False`` between two looks
        """
        if len(mean) % _EVERY:
            return False
        self._looks += 1
        error = _ERROR / (self._looks * (self._looks + 1)) / 2
        last = self.window(len(mean))
        return mean_lags(mean[-last:], sampled[-last:], error) or best_lags(mean[-last:], sampled[-last:], error)


def mean_lags(mean: Returns, sampled: Returns, error: float) -> bool:
    """
    Decide whether mean weights lag on average.

    :param mean: Returns of the mean weights
    :param sampled: Those of sampled weights, in the same evaluations
    :param error: How often chance alone may decide so
    :return: Whether they lag
    """
    own, others = ([float(np.mean(episodes)) for episodes in returns] for returns in (mean, sampled))
    differences = np.subtract(others, own)
    gap, spread = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(own)))
    if gap <= 0 or gap < _LEAST_LAG * max(abs(np.mean(own)), abs(np.mean(others))):
        return False
    return spread == 0 or student_tail(gap / spread, len(own) - 1) <= error


def best_lags(mean: Returns, sampled: Returns, error: float) -> bool:
    """
    Decide whether mean weights leave unused what perturbed ones show.

    :param mean: Returns of the mean weights
    :param sampled: Those of sampled weights, in the same evaluations
    :param error: How often chance alone may decide so
    :return: Whether they lag; never with less than 10 evaluations
    """
    if len(mean) < _LEAST:
        return False
    own, others = ([one for episodes in returns for one in episodes] for returns in (mean, sampled))
    better = excelling(own, others)
    # That the best k of all episodes are sampled ones, if these were no better: Epstein's exceedance test.
    chance = math.prod((len(others) - i) / (len(others) + len(own) - i) for i in range(len(better)))
    if len(better) < _LEAST_SHARE * len(others) or chance > error:
        return False
    gain = np.mean(better) - max(own)
    averages, half = [np.mean(episodes) for episodes in mean], len(mean) // 2
    return bool(np.mean(averages[half:]) - np.mean(averages[:half]) < _LEAST_LAG * gain)


def excelling(mean: Sequence[float], sampled: Sequence[float]) -> list[float]:
    """
    Select the returns of sampled weights that no episode of the mean weights came near.

    :param mean: Returns of the mean weights, episode by episode
    :param sampled: Those of sampled weights
    :return: Those that exceed the best by a tenth of the larger of the two
    """
    best = max(mean)
    return [one for one in sampled if one - best > _LEAST_LAG * max(abs(one), abs(best))]


def student_tail(t: float, freedom: int) -> float:
    """
    Compute how often Student's t exceeds a value (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: a finite sum).

    :param t: Value, >= 0
    :param freedom: Degrees of freedom, >= 1
    :return: Probability, exact to about 1e-15
    """
    theta = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for power in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (power - 1) / power
    inside = 2 / math.pi * (theta + sine * total) if freedom % 2 else sine * total
    return (1.0 - inside) / 2
