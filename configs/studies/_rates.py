"""Variants of `evidence` in what a fair comparison must have tuned: learning rates of parts of the
model and scales of the initialisation, of the dense forms and of the recipe."""

from collections.abc import Mapping

from configs.studies._base import Variants, changed, sparse
from configs.studies._strong import (
    FALLING,
    PROJECTIONS,
    SHORT,
    at_equal_time,
    at_rate,
    falling,
    short,
    thresholded,
)
from train.config import Config
from train.study.definition import Options

VERDICT = "M32+projections shared 1/4 47%"
"""The verdict's recipe."""

WIDE = {"m": 32, "shared_every": 4}
RECIPE = WIDE | PROJECTIONS
"""What it has of `Sparsity`, without 2:4 projections and with them."""

Rates = Mapping[str, float]
"""What multiplies the fields of `OptimizerConfig` of these names."""


def _blocks(factor: float, rate: float = 1) -> Rates:
    """So many times the learning rate, and of that so many times in attention and FFN."""
    return {"learning_rate": rate, "attention_rate": factor, "ffn_rate": factor}


PARTS: Mapping[str, Rates] = {
    ", attention's rate x 2": {"attention_rate": 2},
    ", attention's rate x 1/2": {"attention_rate": 1 / 2},
    ", attention's rate x 1/4": {"attention_rate": 1 / 4},
    ", FFN's rate x 2": {"ffn_rate": 2},
    ", FFN's rate x 1/2": {"ffn_rate": 1 / 2},
    ", embedding's rate x 2": {"embedding_rate": 2},
    ", embedding's rate x 1/2": {"embedding_rate": 1 / 2},
    ", head's rate x 1/2": {"head_rate": 1 / 2},
    ", head's rate x 1/4": {"head_rate": 1 / 4},
    ", blocks' rate x 3/2": _blocks(3 / 2),
    ", blocks' rate x 2/3": _blocks(2 / 3),
    ", blocks' rate x 1/2": _blocks(1 / 2),
    ", blocks' rate x 1/3": _blocks(1 / 3),
    ", blocks' rate x 1/5": _blocks(1 / 5),
    ", rate x 2, blocks' rate x 1/4": _blocks(1 / 4, 2),
    ", rate x 2, blocks' rate x 1/6": _blocks(1 / 6, 2),
    ", rate x 2, blocks' rate x 1/8": _blocks(1 / 8, 2),
    ", rate x 4, blocks' rate x 1/12": _blocks(1 / 12, 4),
    ", rate x 4, blocks' rate x 1/24": _blocks(1 / 24, 4),
    ", rate x 3/2, attention's rate x 1/3": {"learning_rate": 3 / 2, "attention_rate": 1 / 3},
}
"""By what a label says."""

CHOSEN = (", attention's rate x 1/2", ", blocks' rate x 1/2")
"""Those at which all recipes run."""

VERDICT_ONLY = (
    ", rate x 2, blocks' rate x 1/8",
    ", attention's rate x 2",
    ", FFN's rate x 2",
    ", blocks' rate x 3/2",
    ", blocks' rate x 2/3",
)
"""Those at which only the verdict's recipe does."""

GATED_PARTS: Mapping[str, Rates] = {
    ", rate x 1/2": {"learning_rate": 1 / 2},
    ", rate x 1/3": {"learning_rate": 1 / 3},
    ", rate x 1/2, attention's rate x 1/2": {"learning_rate": 1 / 2, "attention_rate": 1 / 2},
    ", blocks' rate x 1/3": _blocks(1 / 3),
    ", blocks' rate x 1/5": _blocks(1 / 5),
    ", rate x 2, blocks' rate x 1/6": _blocks(1 / 6, 2),
    ", rate x 2, blocks' rate x 1/10": _blocks(1 / 10, 2),
}
"""Those of the gated form from twice its initialisation."""


def at_rates(config: Config, factors: Rates) -> Config:
    """So many times the run's own learning rates, by field of its optimiser."""
    own = config.optimizer
    return changed(
        config, optimizer={name: factor * getattr(own, name) for name, factor in factors.items()}
    )


def from_scale(config: Config, factor: float) -> Config:
    """Blocks that start from so many times their own standard deviation."""
    return changed(config, model={"init_scale": factor * config.model.init_scale})


def by_part(dense: Config, swiglu: Config, options: Options) -> Variants:
    """Learning rates of their own for parts of the model: 2:4 projections gain what a lower rate in
    the attention does, and a dense run gains more than the recipe from rates that suit it."""
    recipes = {
        VERDICT: short(dense, 0.47, **RECIPE),
        "M32 shared 1/4 47%": short(dense, 0.47, **WIDE),
        "M32+projections shared 1/4 60%": short(dense, 0.6, **RECIPE),
        "M32+projections shared 1/4 70%": short(dense, 0.7, **RECIPE),
    }
    variants: Variants = {}
    for name, factors in PARTS.items():
        variants[f"relu2{FALLING}{name}"] = at_rates(falling(dense, 0.6), factors)
        variants[f"swiglu{FALLING}{name}"] = at_rates(falling(swiglu, 0.6), factors)
        chosen: Variants = {
            f"{label}{SHORT}{name}": at_rates(recipe, factors)
            for label, recipe in recipes.items()
            if name in CHOSEN or (name in VERDICT_ONLY and label == VERDICT)
        }
        variants |= chosen | at_equal_time(chosen, dense, options)
    return variants


def from_scales(dense: Config, swiglu: Config) -> Variants:
    """Whether blocks that learn slower want to start from larger weights."""
    return {
        f"{form.model.ffn}{FALLING}, init x {name}": from_scale(falling(form, 0.6), factor)
        for form in (dense, swiglu)
        for name, factor in (("2", 2), ("1/2", 1 / 2))
    }


def phases(dense: Config, options: Options) -> Variants:
    """The recipe's sparse phase after the model has learned to copy from its context, which it may
    delay; one whose clusters are made once; one whose dense end begins at the peak rate; and one
    whose dense end begins from the thresholded weights."""
    variants: Variants = {
        f"{VERDICT}, warm-up {warmup:.0%}{FALLING}": falling(
            sparse(dense, share=0.47, warmup=warmup, **RECIPE), 0.6
        )
        for warmup in (0.05, 0.1, 0.2, 0.3)
    }
    variants |= {
        f"{VERDICT}{SHORT}, clustered once": short(dense, 0.47, refresh_every=0, **RECIPE),
        f"{VERDICT}, warm-up 2%, decay over 45%": short(dense, 0.47, 0.45, **RECIPE),
        f"{VERDICT}, thresholded at dense{SHORT}": thresholded(short(dense, 0.47, **RECIPE)),
    }
    return variants | at_equal_time(variants, dense, options)


def gated_shared(gated: Config | None, options: Options) -> Variants:
    """The gated form of the verdict's recipe, its dense twin, and both at other rates and from
    another initialisation: the dense run takes SwiGLU's time, the longer ones of equal wall-clock
    as well."""
    if gated is None:
        return {}
    forms = {
        "": gated,
        ", rate x 2/3": at_rate(gated, 2 / 3),
        ", rate x 1/2": at_rate(gated, 1 / 2),
        ", init x 2": from_scale(gated, 2),
    }
    forms |= {
        ", init x 2" + name: at_rates(from_scale(gated, 2), factors)
        for name, factors in GATED_PARTS.items()
    }
    variants: Variants = {}
    for name, form in forms.items():
        recipe: Variants = {f"gated {VERDICT}{SHORT}{name}": short(form, 0.47, **RECIPE)}
        variants[f"relu2_gated{FALLING}{name}"] = falling(form, 0.6)
        variants |= recipe | at_equal_time(recipe, form, options)
    return variants
