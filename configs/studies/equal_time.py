"""Is the recipe better than dense training of equal wall-clock? Needs the speed of a sparse step.

The dense relu^2 baseline's time is the budget: a sparse run that is faster gets the time it saves
as extra tokens, with its whole schedule stretched ("M16 50%, equal time"). Runs of equal tokens
stand beside ("M16 50%"), so that both halves of the verdict come from the same seeds. Give the
speed by `--speedup`, or by `--speedup-from` with keys such as "M16" and "gated M16" (from the step
benchmark at the size that matters). Five paired seeds, seed by seed; finalists alone with `--only
relu2 swiglu "M16 50%*"`.
"""

from configs.studies._base import Variants, base, runs, sparse, tuned
from train.config import Ffn
from train.study.definition import Options, Study
from train.study.equal_time import SUFFIX, equal_time

RECIPES: tuple[tuple[Ffn, int, float], ...] = (
    ("relu2", 16, 0.5),
    ("relu2_gated", 16, 0.5),
    ("relu2", 16, 0.7),
    ("relu2", 32, 0.7),
    ("relu2_gated", 16, 0.7),
)
"""Form, M, and share of the steps that are sparse; the most important first."""


def study(options: Options) -> Study:
    """Three dense baselines, and five recipes at equal tokens and at equal time."""
    config = base(options, tokens=40e6)
    dense = tuned(config, "relu2", options)
    variants: Variants = {"relu2": dense, "swiglu": tuned(config, "swiglu", options)}
    for ffn, m, share in RECIPES:
        label = f"{'gated ' if ffn == 'relu2_gated' else ''}M{m} {share:.0%}"
        recipe = sparse(tuned(config, ffn, options), m=m, share=share)
        speedup = options.speedups.required(label)
        variants[label + SUFFIX] = equal_time(recipe, dense, speedup)
        variants[label] = recipe
    variants["relu2_gated"] = tuned(config, "relu2_gated", options)
    return Study(
        name="equal_time",
        question="Is the recipe better than dense training of equal wall-clock?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="relu2",
    )
