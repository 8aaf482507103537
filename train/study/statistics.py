"""Means, spreads and paired differences of a few runs each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Sample:
    """A label's losses over its seeds.

    Attributes:
      n: seeds.
      mean: their mean.
      sd: standard deviation (n - 1 in the denominator); NaN for fewer than two.
      sd_low, sd_high: 95% interval of the standard deviation, if losses are normal; NaN likewise.
    """

    n: int
    mean: float
    sd: float
    sd_low: float
    sd_high: float


@dataclass(frozen=True)
class Paired:
    """Losses minus the baseline's of the same seeds.

    Attributes:
      n: seeds that both have.
      mean: mean difference; below zero is better than the baseline.
      se: its standard error; NaN for fewer than two pairs.
      low, high: 95% interval of the mean by Student's t with n - 1 degrees of freedom.
      relative: mean difference over the baseline's mean of the same seeds.
    """

    n: int
    mean: float
    se: float
    low: float
    high: float
    relative: float


def sample(losses: Sequence[float]) -> Sample:
    """Mean and spread of losses.

    Raises:
      ValueError: there are none.
    """
    if not losses:
        raise ValueError("no losses to average")
    n, mean = len(losses), float(np.mean(losses))
    if n < 2:
        return Sample(n, mean, math.nan, math.nan, math.nan)
    sd = float(np.std(losses, ddof=1))
    # (n - 1) sd^2 / sigma^2 follows a chi-squared distribution with n - 1 degrees of freedom.
    bounds = (sd * math.sqrt((n - 1) / float(stats.chi2.ppf(q, n - 1))) for q in (0.975, 0.025))
    return Sample(n, mean, sd, *bounds)


def held_out_error(
    batches: Mapping[int, Sequence[float]], baseline: Mapping[int, Sequence[float]]
) -> float:
    """Standard error of a paired difference that comes from the choice of the held-out text.

    Args:
      batches: mean loss of each held-out batch, by seed.
      baseline: likewise, of the same batches.

    Returns:
      The standard error over batches of the difference averaged over the seeds that both have; NaN
      without such seeds, or with fewer than two batches.
    """
    seeds = [seed for seed in batches if len(batches[seed]) == len(baseline.get(seed, ()))]
    if not seeds or len({len(batches[seed]) for seed in seeds}) > 1:
        return math.nan
    pairs = [np.subtract(batches[seed], baseline[seed]) for seed in seeds]
    difference = np.mean(pairs, axis=0)
    if len(difference) < 2:
        return math.nan
    return float(difference.std(ddof=1)) / math.sqrt(len(difference))


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compares losses with a baseline's, seed by seed; None if no seed has both.

    Args:
      losses: final loss by seed.
      baseline: likewise.
    """
    seeds = sorted(losses.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([losses[seed] - baseline[seed] for seed in seeds])
    n, mean = len(seeds), float(differences.mean())
    relative = mean / float(np.mean([baseline[seed] for seed in seeds]))
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan, relative)
    se = float(differences.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * se
    return Paired(n, mean, se, mean - reach, mean + reach, relative)
