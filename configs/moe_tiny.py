"""`tiny` as a mixture: 8 experts, 2 for each token, in all three phases, on embedded text.

An expert has 256 neurons. `--model.hidden 4096 --sparsity.m 64` makes larger ones, in two clusters.
"""

import dataclasses

from configs import tiny
from sparsejax.spec import Sparsity
from train.config import Config


def config() -> Config:
    """As many active parameters, and FLOPs, as `tiny`; four times the FFN parameters."""
    base = tiny.config()
    return dataclasses.replace(
        base,
        name="moe-tiny",
        model=dataclasses.replace(base.model, experts=8, experts_per_token=2),
        sparsity=Sparsity(m=32, v=128, refresh_every=80, bias_rate=0.01),
    )
