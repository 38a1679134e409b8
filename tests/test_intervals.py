"""Intervals against numbers worked by hand, the normal distribution, and how often they hold the truth."""

import math

import numpy as np
import pytest

from intervals import Z, bootstrap_interval, paired_share_interval, wilson_interval


def interval_of_mean(values, seed: int = 0) -> tuple[float, float]:
    values = np.asarray(values)
    return bootstrap_interval(lambda picks: values[picks].mean(-1), len(values), seed)


@pytest.mark.parametrize(
    ("values", "interval"),
    [
        ([2.0, 2.0, 2.0], (2.0, 2.0)),
        ([0.0, 1.0], (0.0, 1.0)),  # means 0, 1/2 and 1 with probability 1/4, 1/2, 1/4
        ([0.0, 0.0, 3.0], (0.0, 3.0)),  # 3 k / 3, k ~ Binomial(3, 1/3): P(k = 3) = .037
        ([0.0] * 9 + [1.0], (0.0, 0.3)),  # k / 10, k ~ Binomial(10, 1/10): P(k > 2) = .070, P(k > 3) = .013
        ([-1.0] + [0.0] * 9, (-0.3, 0.0)),
    ],
)
def test_the_bootstrap_interval_of_a_few_values_is_known(values, interval):
    """Worked by hand from the distribution of a resample's mean."""
    assert interval_of_mean(values) == pytest.approx(interval, abs=1e-9)


def test_the_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.3, 2.0, 4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    low, high = interval_of_mean(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_bootstrap_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    intervals = [interval_of_mean(rng.normal(0.5, 1.0, 40), seed) for seed in range(200)]
    assert 0.90 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.98


def test_the_bootstrap_interval_repeats_and_moves_with_the_values():
    values = [0.1, 0.5, -0.2, 0.7, 0.3]
    low, high = interval_of_mean(values)
    assert (low, high) == interval_of_mean(values) and low < np.mean(values) < high
    assert interval_of_mean([value + 1 for value in values]) == pytest.approx((low + 1, high + 1), abs=1e-9)
    assert interval_of_mean([-value for value in values]) == pytest.approx((-high, -low), abs=0.05)


@pytest.mark.parametrize(
    ("count", "n", "interval"),
    [
        (0, 10, (0.0, 0.2775)),  # z² / (n + z²) = 3.8416 / 13.8416
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),  # Newcombe 1998's method 3 on such shares
        (81, 263, (0.2553, 0.3662)),  # the first line of Newcombe 1998, table I
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_is_the_published_one(count, n, interval):
    assert wilson_interval(count, n) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(("count", "n"), [(3, 7), (40, 256), (255, 256)])
def test_at_wilsons_ends_the_share_is_z_deviations_away(count, n):
    for end in wilson_interval(count, n):
        assert abs(count / n - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_a_paired_difference_of_shares_by_hand():
    """20 gained, 8 lost of 98: 20.5 and 8.5 of 100, so .12 ± 1.96 sqrt(29 - 144 / 100) / 100."""
    half = 1.96 * math.sqrt(27.56) / 100
    assert paired_share_interval(gained=20, lost=8, n=98) == pytest.approx((0.12 - half, 0.12 + half), abs=1e-9)
    assert paired_share_interval(gained=8, lost=20, n=98) == pytest.approx((-0.12 - half, -0.12 + half), abs=1e-9)


def test_no_row_that_changed_is_not_certainty():
    low, high = paired_share_interval(gained=0, lost=0, n=8)
    assert low == -high and high == pytest.approx(1.96 / 10)  # half a row gained and half a row lost, of 10
    assert paired_share_interval(gained=8, lost=0, n=8)[1] == 1.0


def test_a_paired_difference_of_shares_covers_the_truth():
    """30 prompts of which each policy ends 95 % and 85 %, the second only where the first does."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        lost = rng.binomial(30, 0.10)
        low, high = paired_share_interval(gained=0, lost=int(lost), n=30)
        held += low <= -0.10 <= high
    assert 0.93 <= held / 1000 <= 0.99


def test_an_interval_of_a_share_holds_the_share():
    """Also where rounding would put an end just short of 0 or 1, which no figure could draw."""
    for n in range(1, 500):
        for count in {0, 1, n // 2, n}:
            low, high = wilson_interval(count, n)
            assert 0 <= low <= count / n <= high <= 1
