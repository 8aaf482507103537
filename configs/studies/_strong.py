"""Variants of `evidence` around a strong dense run: several choices for a token, neurons that every
token meets, and 2:4 projections."""

from functools import partial
from typing import Any

from configs.studies._base import Variants, changed, sparse
from train.config import Config
from train.study.definition import Options
from train.study.equal_time import SUFFIX, equal_time

FALLING = ", decay over 60%"
"""A rate that falls so is best for dense runs."""

SHORT = ", warm-up 2%" + FALLING
"""How `short` runs."""

PROJECTIONS = {"attention_projections": True}


def falling(config: Config, share: float) -> Config:
    """The rate at its peak until the last `share` of the steps, where it falls linearly."""
    return changed(config, optimizer={"decay": "wsd", "decay_fraction": share})


def thresholded(config: Config) -> Config:
    """A dense end that begins from the thresholded weights."""
    return changed(config, schedule={"threshold_dense": True})


def at_rate(config: Config, factor: float) -> Config:
    """Another learning rate: so many times its own."""
    return changed(config, optimizer={"learning_rate": factor * config.optimizer.learning_rate})


def several(dense: Config, swiglu: Config, options: Options) -> Variants:
    """A token chooses an expert in each of several parts of the neurons: as many neurons meet it,
    and it has a wider choice of them. Most rates fall during the last 60% of the steps, which is
    best for dense runs; recipes at equal wall-clock where their speed is known."""
    make, how = partial(short, dense), SHORT
    variants: Variants = {
        "M8 in 4 60%" + how: make(0.6, m=8, shards=4),
        "M8 in 4 65%" + how: make(0.65, m=8, shards=4),
        "M16 in 4 50%" + how: make(shards=4),
        "M16 in 4 65%" + how: make(0.65, shards=4),
        "M16 in 2 50%" + how: make(shards=2),
        "M32 in 2 50%" + how: make(m=32, shards=2),
        "M16 50%" + how: make(),
        "M32 39%" + how: make(0.39, m=32),
        "M8 in 4 65%, warm-up 2%, decay over 45%": make(0.65, 0.45, m=8, shards=4),
        "M8 in 4 65%, warm-up 2%, decay over 30%": make(0.65, 0.3, m=8, shards=4),
        "M8 in 4 65%, thresholded at dense" + how: thresholded(make(0.65, m=8, shards=4)),
        "M8 in 4 weights dense 65%" + how: make(0.65, m=8, shards=4, weights=False),
        "M8 in 4 weights dense 80%" + how: make(0.8, m=8, shards=4, weights=False),
        "swiglu, decay over 60%": falling(swiglu, 0.6),
        "relu2, decay over 60%, rate's warm-up 15%": _slower_start(falling(dense, 0.6)),
        "relu2, decay over 60%, rate x 2/3": at_rate(falling(dense, 0.6), 2 / 3),
        "relu2, decay over 60%, one order": changed(falling(dense, 0.6), data={"seed": 0}),
        "relu2, decay over 80%": falling(dense, 0.8),
        "relu2, decay over 45%": falling(dense, 0.45),
    }
    return variants | at_equal_time(variants, dense, options, 3)


def shared(dense: Config, options: Options) -> Variants:
    """Every token meets some of the neurons, one block in four or in eight, and is routed among the
    others; M16 with a quarter of them is a little faster than M8, and so is M32 than M16."""
    make, how = partial(short, dense), SHORT
    two = {"shared_every": 4, "shards": 2, "weights": False}
    fast = {"m": 32, "shared_every": 4, **PROJECTIONS}
    alone = {"routing": False, "activations": False, "weights": False}
    variants: Variants = {
        "M32+projections shared 1/4 47%" + how: make(0.47, **fast),
        "M32+projections shared 1/4 60%" + how: make(0.6, **fast),
        "M32+projections shared 1/4 70%" + how: make(0.7, **fast),
        "M32+projections shared 1/8 50%" + how: make(0.5, **fast | {"shared_every": 8}),
        "M16 shared 1/4 in 2 weights dense 65%" + how: make(0.65, **two),
        "M16 shared 1/4 in 2 weights dense 60%" + how: make(0.6, **two),
        "M32+projections shared 1/4 44%" + how: make(0.44, **fast),
        "M32+projections shared 1/4 82%" + how: make(0.82, **fast),
        "M32+projections shared 1/8 40%" + how: make(0.4, **fast | {"shared_every": 8}),
        "M32+projections shared 1/8 74%" + how: make(0.74, **fast | {"shared_every": 8}),
        "M16+projections shared 1/4 in 2 weights dense 60%" + how: make(0.6, **two, **PROJECTIONS),
        "projections alone 47%" + how: make(0.47, **alone, **PROJECTIONS),
        "M32 shared 1/4 52%" + how: make(0.52, m=32, shared_every=4),
        "M16 shared 1/4 65%" + how: make(0.65, shared_every=4),
        "M16 shared 1/4 50%" + how: make(shared_every=4),
        "M16 shared 1/4 in 2 65%" + how: make(0.65, shared_every=4, shards=2),
        "M32 shared 1/4 65%" + how: make(0.65, m=32, shared_every=4),
        "M32 shared 1/4 50%" + how: make(m=32, shared_every=4),
        "M16 shared 1/8 65%" + how: make(0.65, shared_every=8),
        "M8 shared 1/4 65%" + how: make(0.65, m=8, shared_every=4),
        "M16 shared 1/4 weights dense 65%" + how: make(0.65, shared_every=4, weights=False),
        "M16 shared 1/4 weights dense 60%" + how: make(0.6, shared_every=4, weights=False),
        "M32 shared 1/4 weights dense 55%" + how: make(0.55, m=32, shared_every=4, weights=False),
        "M32 shared 1/2 65%" + how: make(0.65, m=32, shared_every=2),
        "M32+projections shared 1/2 65%" + how: make(0.65, **fast | {"shared_every": 2}),
    }
    lower: Variants = {
        "M32+projections shared 1/4 47%" + how + ", rate x 2/3": at_rate(make(0.47, **fast), 2 / 3)
    }
    variants |= at_equal_time(variants, dense, options, 6) | lower
    return variants | at_equal_time(lower, dense, options)


def short(dense: Config, share: float = 0.5, fall: float = 0.6, **sparsity: Any) -> Config:
    """A short dense start, and a rate that falls during the last `fall` of the steps."""
    return falling(sparse(dense, share=share, warmup=0.02, **sparsity), fall)


def _slower_start(config: Config) -> Config:
    """The rate reaches its peak after 15% of the steps: runs with 2:4 projections lead while the
    rate is young, so does what might help a dense run there?"""
    return changed(config, optimizer={"warmup_steps": round(0.15 * config.steps)})


def at_equal_time(
    variants: Variants, dense: Config, options: Options, first: int | None = None
) -> Variants:
    """All of them, or the first so many, at equal wall-clock, where their speed is known."""
    longer: Variants = {}
    for label, recipe in list(variants.items())[:first]:
        speedup = options.speedups.of(label)
        if speedup is not None and isinstance(recipe, Config):
            longer[label + SUFFIX] = equal_time(recipe, dense, speedup)
    return longer
