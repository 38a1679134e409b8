"""How far a figure of a sample might be off by the luck of the draw: its 95 % interval."""

import math
from collections.abc import Callable

import numpy as np

BLOCK = 10**6  # indices that are drawn at a time
Z = 1.96  # a normal variable is within so many standard deviations of its mean 95 times in 100


def bootstrap_interval(statistic: Callable, n: int, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of n rows, by resampling them with replacement.

    `statistic` takes indices of rows, (draws, n), and gives its value for each draw, (draws,). One of two policies'
    responses to the same prompts, such as the difference of their means, is paired: a prompt is drawn for both or none.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    blocks = [statistic(rng.integers(0, n, (min(rows, draws - start), n))) for start in range(0, draws, rows)]
    low, high = np.quantile(np.concatenate(blocks), [0.025, 0.975])
    return float(low), float(high)


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Of the share count / n, by Wilson 1927: the p for which |count / n - p| = Z sqrt(p (1 - p) / n).

    It has a width at shares of 0 and 1, too.
    """
    share = count / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # holds the share, rounded or not


def paired_share_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Of the difference (gained - lost) / n between two shares of the same n rows, by Agresti and Min 2005.

    gained, lost: rows that only the second or only the first share counts. Wald's interval with half a row more in each
    of the four kinds of rows, so that it has a width where no row changed.
    """
    gained, lost, n = gained + 0.5, lost + 0.5, n + 2
    centre = (gained - lost) / n
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)
