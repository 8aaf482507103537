"""What the studies share: the run they vary, and ways to vary it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import configs
from sparsejax.spec import Sparsity
from train.config import CheckpointConfig, Config, Ffn, LogConfig, ScheduleConfig
from train.study.definition import Factor, Options, Run, Settings

EVAL_WINDOWS = 0
"""Held-out windows of an evaluation: all. A pass over them costs a few steps, and the noise of the
evaluation should not decide anything."""

DENSE = ScheduleConfig(warmup_steps=0, sparse_fraction=0.0)

WARMUP = 0.1
"""Share of the steps that are dense before the sparse phase, where a study does not vary it."""

RECIPE: Settings = {
    "model": {"qk_norm": True},
    "optimizer": {"decay": "linear", "final_fraction": 0.0},
}
"""What makes runs of a minute settle: logits of attention that stay bounded at high learning rates,
and a rate that ends at zero, so that the last steps do not decide the loss. `dense_recipe` varies
it."""

TUNED: dict[Ffn, Settings] = {"relu2": RECIPE, "relu2_gated": RECIPE, "swiglu": RECIPE}
"""What all that is compared with a dense run starts from, by form, on top of the configuration;
`--tuned FILE.json` sets learning rates, batch and whatever else it names over it."""

Variants = dict[str, Config | tuple[Config, Mapping[str, Factor]]]
"""By label, a configuration or one with its factors."""


def base(options: Options, *, default: str = "small", tokens: float | None = None) -> Config:
    """The run that a study varies, dense, on the data asked for.

    Args:
      options: of the command line.
      default: configuration to take where the options name none.
      tokens: length of the run, rounded to whole steps; None, or another configuration than the
        default, keeps the configuration's own.
    """
    config = configs.get(options.base or default)
    if options.backend is not None:
        config = changed(config, sparsity={"backend": options.backend})
    if tokens is not None and options.base in (None, default):
        config = of_tokens(config, tokens)
    if options.tuned is not None:
        config = with_batch(config, options.tuned.batch_size)
    return dataclasses.replace(
        config,
        data=options.data,
        schedule=DENSE,
        # A run of a minute starts over when it is lost.
        checkpoint=CheckpointConfig(every=0, keep=1, final=False),
        log=dataclasses.replace(_logged(config), eval_windows=EVAL_WINDOWS, tensorboard=False),
    )


def tuned(config: Config, ffn: Ffn, options: Options) -> Config:
    """`config` with an FFN of this form and the settings that were found best for it.

    Gated relu^2 gets as many neurons as SwiGLU, so that forms are compared at equal parameters: its
    own default is larger (1536 for 1408 in `small`), for the sake of kernels.

    Raises:
      ValueError: the options' sweep has no rate for this form.
    """
    config = changed(changed(config, **TUNED[ffn]), model={"ffn": ffn})
    if ffn == "relu2_gated":
        swiglu = dataclasses.replace(config.model, ffn="swiglu")
        config = changed(config, model={"hidden": swiglu.ffn_hidden})
    if options.tuned is None:
        return config
    if ffn not in options.tuned.learning_rate:
        known = ", ".join(options.tuned.learning_rate)
        raise ValueError(f"--tuned has no learning rate for {ffn}, only for {known}")
    config = changed(config, **options.tuned.settings)
    config = changed(config, **options.tuned.form_settings.get(ffn, {}))
    scale = options.tuned.init_scale.get(ffn, config.model.init_scale)
    rate = options.tuned.learning_rate[ffn]
    return changed(config, model={"init_scale": scale}, optimizer={"learning_rate": rate})


def of_tokens(config: Config, tokens: float) -> Config:
    """The same run with as many steps as make these tokens; the learning rate's warm-up keeps its
    share of them."""
    steps = max(round(tokens / config.tokens_per_step), 1)
    warmup = round(config.optimizer.warmup_steps * steps / config.steps)
    return dataclasses.replace(
        config,
        steps=steps,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
    )


def _logged(config: Config) -> LogConfig:
    """A curve of 140 points and two evaluations, whatever the number of steps."""
    every, eval_every = max(config.steps // 140, 1), -(-config.steps // 2)
    return dataclasses.replace(config.log, every=every, eval_every=eval_every)


def with_batch(config: Config, batch_size: int) -> Config:
    """As many tokens with another batch: fewer or more steps, the evaluations at the same
    tokens."""
    tokens = config.steps * config.tokens_per_step
    scaled = of_tokens(dataclasses.replace(config, batch_size=batch_size), tokens)
    warmup = round(config.optimizer.warmup_steps * scaled.steps / config.steps)
    return dataclasses.replace(
        scaled,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
        log=_logged(scaled),
    )


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with fields of its sections replaced: changed(config, model={"ffn": "swiglu"})."""
    new = {k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    return dataclasses.replace(config, **new)


def sparse(
    config: Config, *, share: float = 0.5, warmup: float = WARMUP, **sparsity: Any
) -> Config:
    """`config` through all three phases.

    Args:
      config: a dense run of a relu^2 form, tuned.
      share: of the steps that are sparse.
      warmup: share of the steps before them that are dense.
      sparsity: fields of `Sparsity` that differ from `config`'s.
    """
    spec: Sparsity = dataclasses.replace(config.sparsity, **sparsity)
    schedule = ScheduleConfig(warmup_steps=round(warmup * config.steps), sparse_fraction=share)
    return dataclasses.replace(config, schedule=schedule, sparsity=spec)


def runs(variants: Variants, seeds: Sequence[int]) -> tuple[Run, ...]:
    """Every variant with every seed, seed by seed, so that whatever is done when time is up makes
    pairs.

    Args:
      variants: what to run.
      seeds: of initialisation and data order (unless a variant has a data seed of its own).
    """
    found = []
    no_factors: Mapping[str, Factor] = {}
    for seed in seeds:
        for label, variant in variants.items():
            config, factors = variant if isinstance(variant, tuple) else (variant, no_factors)
            found.append(Run(label, seed, dataclasses.replace(config, seed=seed), factors))
    return tuple(found)
