"""Whether seeds differ by how early they learn."""

import numpy as np
import pytest

from train.study.seeds import describe, timings

STEPS = np.arange(1, 201)


def run(seed, delay, end, label="dense", status="finished"):
    """A loss that falls from 5 to 3 around step 100 + delay."""
    loss = 4 - np.tanh((STEPS - 100 - delay) / 20)
    return {
        "label": label,
        "seed": seed,
        "status": status,
        "tokens": 200_000,
        "curve": {"step": STEPS.tolist(), "loss": loss.tolist()},
        "final": {"loss_dense": end},
    }


def test_late_seeds_are_worse_at_the_end():
    delays = (-6, -1, 0, 2, 5)
    late = [run(seed, d, 3 + 0.01 * d) for seed, d in enumerate(delays)]
    late.append(run(9, 50, 9.0, status="non_finite"))
    (found,) = timings([*late, *(run(s, 0, 3.0, "short") for s in range(3))])
    assert (found.label, found.seeds) == ("dense", 5)
    assert found.middle == pytest.approx(1, abs=0.02)
    assert found.order == pytest.approx(1, abs=0.02)
    mean, spread = found.passes
    assert mean == pytest.approx(100_000, rel=0.03)
    assert spread == pytest.approx(1000 * np.std(delays, ddof=1), rel=0.15)
    assert "after 0.1 ± 0.0 M tokens" in describe(found)


def test_spread_at_the_end_alone_has_no_order():
    (found,) = timings([run(s, d, e) for s, d, e in zip(range(4), (-2, -1, 1, 2), (3.1, 3, 3, 3.1),
                                                        strict=True)])  # fmt: skip
    assert abs(found.middle) < 0.1
    assert abs(found.order) < 0.1
    (same,) = timings([run(s, 0, 3.0) for s in range(4)])
    assert np.isnan(same.middle)
