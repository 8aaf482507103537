"""Means, spreads and paired differences against tables and scipy's own tests."""

import math

import numpy as np
import pytest
from scipy import stats

from train.study.statistics import held_out_error, paired, sample


def test_spread_of_a_sample():
    found = sample([1.0, 2.0, 4.0])
    assert found.n == 3
    assert found.mean == pytest.approx(7 / 3)
    assert found.sd == pytest.approx(math.sqrt(7 / 3))
    # Printed tables: chi-squared with 2 degrees of freedom, 2.5% and 97.5%: 0.0506 and 7.378.
    assert found.sd_low == pytest.approx(found.sd * math.sqrt(2 / 7.378), rel=1e-3)
    assert found.sd_high == pytest.approx(found.sd * math.sqrt(2 / 0.0506), rel=1e-3)


def test_one_seed_has_no_spread():
    found = sample([2.5])
    assert (found.n, found.mean) == (1, 2.5)
    assert all(map(math.isnan, (found.sd, found.sd_low, found.sd_high)))
    with pytest.raises(ValueError, match="no losses"):
        sample([])


def test_paired_interval_agrees_with_the_paired_t_test():
    rng = np.random.default_rng(0)
    baseline = dict(enumerate(rng.normal(3.0, 0.05, 5)))
    losses = {seed: loss - 0.02 + rng.normal(0, 0.01) for seed, loss in baseline.items()}
    found = paired(losses, baseline)
    test = stats.ttest_rel(list(losses.values()), list(baseline.values()))
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.mean / found.se == pytest.approx(test.statistic)
    assert found.relative == pytest.approx(found.mean / np.mean(list(baseline.values())))
    # What pairing is for: the seeds' common spread does not count.
    assert found.high - found.low < sample(list(losses.values())).sd


def test_only_common_seeds_are_compared():
    found = paired({0: 2.0, 1: 2.5, 7: 9.0}, {1: 2.0, 0: 2.0, 5: 0.0})
    assert (found.n, found.mean, found.se) == (2, 0.25, 0.25)
    # t with one degree of freedom at 97.5% is 12.706.
    assert found.high - found.mean == pytest.approx(12.706 * 0.25, rel=1e-4)
    assert paired({0: 1.0}, {1: 1.0}) is None
    single = paired({0: 1.5}, {0: 1.0})
    assert (single.n, single.mean) == (1, 0.5)
    assert math.isnan(single.se)


def test_held_out_error_is_that_of_the_paired_batches():
    rng = np.random.default_rng(0)
    text = rng.normal(3.0, 0.3, 40)  # how hard each batch is, which both runs share
    base = {seed: (text + rng.normal(0, 0.01, 40)).tolist() for seed in range(3)}
    mine = {seed: (text + 0.02 + rng.normal(0, 0.01, 40)).tolist() for seed in range(3)}
    differences = np.mean([np.subtract(mine[s], base[s]) for s in range(3)], axis=0)
    found = held_out_error(mine, base)
    assert found == pytest.approx(stats.sem(differences))
    assert found < 0.003
    assert held_out_error({0: [1.0, 2.0]}, {0: [1.0, 1.0], 1: [5.0, 5.0]}) == pytest.approx(0.5)
    for unknown in ({}, {0: [1.0]}, {0: [1.0, 2.0, 3.0]}):
        assert math.isnan(held_out_error(unknown, {0: [1.0, 1.0]}))
    assert math.isnan(held_out_error({0: [1.0]}, {0: [2.0]}))
