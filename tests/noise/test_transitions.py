"""What members draw for stored transitions: against Python integers, and the laws of the draws (false-fail rate 1e-6 each)."""

import math

import numpy as np
import oracle
import torch as th
from scipy.stats import norm

from sb3_flipout.noise.transitions import in_bootstrap, reward_draws

NUMBERS = th.tensor([0, 1, -5, 2**62, -(2**63)])
MEMBERS = th.tensor([0, 3, 1, 9, 0])
FALSE_FAIL = 1e-6


def word(number: int, purpose: int, member: int) -> int:
    return oracle.fold(number, purpose, member) & ((1 << 64) - 1)


def test_masks_are_those_of_the_published_hash() -> None:
    for share in (1e-9, 0.3, 0.5, 1.0):
        expected = [
            (word(n, 0, k) & ((1 << 53) - 1)) / 2**53 < share for n, k in zip(NUMBERS.tolist(), MEMBERS.tolist(), strict=True)
        ]
        assert in_bootstrap(NUMBERS, MEMBERS, share).tolist() == expected


def test_draws_are_those_of_the_published_hash() -> None:
    table = oracle.normal_table()
    expected = [table[word(n, 1, k) & 0xFFFF] for n, k in zip(NUMBERS.tolist(), MEMBERS.tolist(), strict=True)]
    assert reward_draws(NUMBERS, MEMBERS, th.float64).tolist() == expected


def test_every_member_has_its_own_sample() -> None:
    """40,000 transitions, 10 members: shares, and agreements of pairs of members, by the normal approximation."""
    numbers, members, share = th.arange(40_000)[:, None], th.arange(10), 0.3
    kept = in_bootstrap(numbers, members, share).numpy()
    bound = norm.isf(FALSE_FAIL / 2 / 10)
    assert np.all(np.abs(kept.mean(0) - share) < bound * math.sqrt(share * (1 - share) / len(kept)))
    both = share**2 + (1 - share) ** 2
    bound = norm.isf(FALSE_FAIL / 2 / 45)
    for a in range(10):
        for b in range(a):
            agreed = (kept[:, a] == kept[:, b]).mean()
            assert abs(agreed - both) < bound * math.sqrt(both * (1 - both) / len(kept)), (a, b)


def test_reward_draws_are_normal_and_independent() -> None:
    """Mean, variance and correlation over 40,000 transitions of two members."""
    draws = reward_draws(th.arange(40_000)[:, None], th.arange(2), th.float64).numpy()
    bound = norm.isf(FALSE_FAIL / 2 / 5) / math.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0)) < bound)
    assert np.all(np.abs((draws**2).mean(0) - 1) < bound * math.sqrt(2))
    assert abs((draws[:, 0] * draws[:, 1]).mean()) < bound
    masks = in_bootstrap(th.arange(40_000), th.tensor(0), 0.5).numpy()
    assert abs((draws[:, 0] * (2.0 * masks - 1)).mean()) < bound  # what a member learns from says nothing of what it adds
