"""`llama1b` as a mixture: 8 experts, 2 for each token; 4.3 B parameters, 1.8 B of them active.

The experts' products are those of `llama1b`'s FFN, grouped. Parameters and Adam's moments take 52
GB, to be spread over devices (`--mesh.fsdp 8`); one device holds it with fewer layers
(`--model.num-layers 4`). An expert has 4,096 neurons, enough to be routed further:
`--sparsity.m 64` makes two clusters of 2,048, 128 four of 1,024.
"""

import dataclasses

from configs import llama1b
from sparsejax.spec import Sparsity
from train.config import Config


def config() -> Config:
    """1 M tokens a step, 60,000 steps; phases and learning rate are those of `llama1b`."""
    base = llama1b.config()
    return dataclasses.replace(
        base,
        name="moe1b",
        model=dataclasses.replace(base.model, experts=8, experts_per_token=2),
        sparsity=Sparsity(m=32, v=128),
    )
