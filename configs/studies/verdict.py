"""Does the recipe keep the quality beside a dense run whose learning rates suit its parts?

Where `evidence` ends: dense runs at the rates that `--tuned` gives their parts and around them, and
recipes that make whole runs at llama1b some 1.15 times as fast, or less, beside them. The dense end
begins from the weights as they are or from the thresholded ones, and the learning rate falls over
more or less of the run. 66 M tokens a run, five seeds; at equal wall-clock where the speed of a
sparse step is known.
"""

from collections.abc import Mapping
from typing import Any

from configs.studies._base import Variants, base, runs, tuned
from configs.studies._rates import RECIPE, VERDICT, WIDE, Rates, at_rates, from_scale
from configs.studies._strong import PROJECTIONS, at_equal_time, falling, short, thresholded
from train.config import Config, Ffn
from train.study.definition import Options, Study

FALLS: Mapping[str, float] = {
    "": 0.6,
    ", decay over 45%": 0.45,
    ", decay over 30%": 0.3,
    ", decay over 40%": 0.4,
    ", decay over 35%": 0.35,
    ", decay over 25%": 0.25,
}
"""Share of the steps in which the rate falls, by what a label says."""

RATES: Mapping[str, Rates] = {
    "": {},
    ", head's rate x 4": {"head_rate": 4},
    ", attention's rate x 1/2": {"attention_rate": 1 / 2},
    ", FFN's rate x 2": {"ffn_rate": 2},
    ", FFN's rate x 1/2": {"ffn_rate": 1 / 2},
    ", attention's rate x 2, head's rate x 4": {"attention_rate": 2, "head_rate": 4},
}
"""What multiplies learning rates, by what a label says."""

WITHOUT_WEIGHTS = "M32 shared 1/4 weights dense 55%"
"""The recipe that came out best at these rates; it and the verdict's run at all of them."""

DENSE_WEIGHTS = {"weights": False}
FIRST = {"dense_layers": 1}
ALONE = {"routing": False, "activations": False, "weights": False}

RECIPES: Mapping[str, tuple[float, Mapping[str, Any]]] = {
    VERDICT: (0.47, RECIPE),
    "M32+projections shared 1/4 25%": (0.25, RECIPE),
    "M32+projections 36%": (0.36, {"m": 32, **PROJECTIONS}),
    "M16+projections 41%": (0.41, {"m": 16, **PROJECTIONS}),
    "M32 shared 1/4 50%": (0.5, WIDE),
    "M32 shared 1/4 52%": (0.52, WIDE),
    "M32 weights dense 40%": (0.4, {"m": 32, **DENSE_WEIGHTS}),
    "M32 shared 1/4 weights dense 25%": (0.25, WIDE | DENSE_WEIGHTS),
    "M32 shared 1/4 weights dense 40%": (0.4, WIDE | DENSE_WEIGHTS),
    "M32 shared 1/4 weights dense 53%": (0.53, WIDE | DENSE_WEIGHTS),
    WITHOUT_WEIGHTS: (0.55, WIDE | DENSE_WEIGHTS),
    "M32+projections shared 1/4 first dense 48%": (0.48, RECIPE | FIRST),
    "M32 first dense weights dense 42%": (0.42, {"m": 32, **DENSE_WEIGHTS, **FIRST}),
    "M32 shared 1/4 first dense weights dense 55%": (0.55, WIDE | DENSE_WEIGHTS | FIRST),
    "M16 shared 1/4 weights dense 58%": (0.58, {"m": 16, "shared_every": 4} | DENSE_WEIGHTS),
    "M32 shared 1/2 weights dense 60%": (0.6, {"m": 32, "shared_every": 2} | DENSE_WEIGHTS),
    "M32 shared 1/2 weights dense 74%": (0.74, {"m": 32, "shared_every": 2} | DENSE_WEIGHTS),
    "M32 shared 1/8 weights dense 47%": (0.47, {"m": 32, "shared_every": 8} | DENSE_WEIGHTS),
    "M64 shared 1/4 weights dense 51%": (0.51, {"m": 64, "shared_every": 4} | DENSE_WEIGHTS),
    "M64 shared 1/2 weights dense 70%": (0.7, {"m": 64, "shared_every": 2} | DENSE_WEIGHTS),
    "projections alone 47%": (0.47, ALONE | PROJECTIONS),
}
"""Share of sparse steps, after a dense warm-up of 2%, and fields of `Sparsity`."""


def _forms(*forms: Config) -> Variants:
    """Dense runs, and from other initialisations."""
    variants: Variants = {}
    for form in forms:
        ffn = form.model.ffn
        for fall, decay in FALLS.items():
            for name, factors in RATES.items():
                variants[ffn + fall + name] = at_rates(falling(form, decay), factors)
        for name, factor in (("2", 2), ("1/2", 1 / 2)):
            variants[f"{ffn}, init x {name}"] = from_scale(falling(form, 0.6), factor)
    return variants


def _recipes(dense: Config, options: Options) -> Variants:
    """Those of `RECIPES` with all falls and the first two rates, two of them with all."""
    variants: Variants = {}
    for label, (share, sparsity) in RECIPES.items():
        few = None if label in (VERDICT, WITHOUT_WEIGHTS) else 2
        for fall, decay in FALLS.items():
            for name, factors in list(RATES.items())[:few]:
                recipe = at_rates(short(dense, share, decay, **sparsity), factors)
                variants[label + fall + name] = recipe
                if recipe.sparsity.weights or recipe.sparsity.attention_projections:
                    variants[f"{label}, thresholded{fall}{name}"] = thresholded(recipe)
    share, sparsity = RECIPES[WITHOUT_WEIGHTS]
    slower = short(dense, share, refresh_every=2000, **sparsity)
    variants[WITHOUT_WEIGHTS + ", clustered every 2000 steps"] = slower
    return variants | at_equal_time(variants, dense, options)


def _gated(gated: Config, options: Options) -> Variants:
    """Both recipes in a gated FFN, beside its own dense run."""
    recipes: dict[str, Config] = {}
    for label in (VERDICT, WITHOUT_WEIGHTS):
        share, sparsity = RECIPES[label]
        for fall, decay in FALLS.items():
            recipes[f"gated {label}{fall}"] = short(gated, share, decay, **sparsity)
    recipes[f"gated {VERDICT}, thresholded"] = thresholded(recipes["gated " + VERDICT])
    variants: Variants = {**recipes}
    return variants | at_equal_time(variants, gated, options)


def study(options: Options) -> Study:
    """Dense runs of the three forms and recipes beside them; relu^2 with a rate that falls during
    the last 45% of the steps, the lowest dense run, is what all are compared with."""
    config = base(options, tokens=66e6)
    forms: tuple[Ffn, ...] = ("relu2", "swiglu", "relu2_gated")
    dense, swiglu, gated = (tuned(config, ffn, options) for ffn in forms)
    variants = _forms(dense, swiglu, gated) | _recipes(dense, options) | _gated(gated, options)
    return Study(
        name="verdict",
        question="Does the recipe keep the quality beside a dense run at rates that suit it?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="relu2, decay over 45%",
    )
