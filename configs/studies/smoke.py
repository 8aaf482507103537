"""Does the machinery work? Dense, sparse and SwiGLU, seconds on a CPU.

The losses mean nothing at this size.
"""

import dataclasses

from configs.studies._base import Variants, base, changed, runs, sparse
from train.config import LogConfig
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """D 32, 2 layers, 24 steps of 256 tokens."""
    config = dataclasses.replace(
        base(options, default="tiny"),
        steps=24,
        batch_size=4,
        sequence_length=64,
        log=LogConfig(every=3, eval_every=12, eval_windows=16),
    )
    config = changed(
        config,
        model={"width": 32, "num_layers": 2, "num_heads": 2, "hidden": None},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 4},
    )
    variants: Variants = {
        "relu2": config,
        "sparse": sparse(config, warmup=0.25, m=8, v=32, refresh_every=0),
        "swiglu": changed(config, model={"ffn": "swiglu"}),
    }
    return Study(
        name="smoke",
        question="Does the machinery work?",
        runs=runs(variants, options.seeds or (0,)),
        baseline="relu2",
    )
