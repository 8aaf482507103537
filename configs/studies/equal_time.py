"""Is the recipe better than dense training of equal wall-clock? Needs the speed of a sparse step.

The dense baseline's time is the budget: a sparse run that is faster gets the time it saves as
extra tokens, with its whole schedule stretched. Runs of equal tokens stand beside, and, the other
way round, a dense run cut to the time that the sparse recipe needs for the baseline's tokens.
Give the speed by `--speedup` or `--speedup-from` (labels: sparse, sparse gated). Five paired seeds.
"""

from configs.studies._base import Variants, base, changed, runs, sparse
from train.study.definition import Options, Study
from train.study.equal_time import equal_time


def study(options: Options) -> Study:
    """V:2:16 with 2:4 inside, half of the steps sparse."""
    config = base(options, tokens=40e6)
    recipe, gated = sparse(config), sparse(config, ffn="relu2_gated")
    swiglu = changed(config, model={"ffn": "swiglu"})
    s, s_gated = (options.speedups.required(label) for label in ("sparse", "sparse gated"))
    variants: Variants = {
        "relu2": config,
        "sparse, equal time": equal_time(recipe, config, s),
        "sparse": recipe,
        "swiglu": swiglu,
        "sparse gated, equal time": equal_time(gated, config, s_gated),
        "sparse gated": gated,
        "relu2, time of sparse": equal_time(config, recipe, s),
    }
    return Study(
        name="equal_time",
        question="Is the recipe better than dense training of equal wall-clock?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="relu2",
    )
