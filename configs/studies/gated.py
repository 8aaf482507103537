"""Does the recipe reach tuned SwiGLU in its gated form? relu(X W1)^2 * (X Wg), routed.

46 M tokens a run, half of the steps sparse; all three forms have as many parameters.
"""

from configs.studies._base import Variants, base, runs, sparse, tuned
from train.study.definition import Axis, Options, Study


def study(options: Options) -> Study:
    """M of 8, 16, 32 and 2:4 inside or not; three seeds."""
    config = base(options)
    gated = tuned(config, "relu2_gated", options)
    variants: Variants = {
        "swiglu": tuned(config, "swiglu", options),
        "relu2_gated": gated,
        "relu2": tuned(config, "relu2", options),
    }
    for m in (16, 8, 32):
        variants[f"gated M{m}"] = (sparse(gated, m=m), {"m": m, "share": 0.5})
    variants["gated M16, four inside"] = sparse(gated, activations=False)
    variants["gated, weights only"] = sparse(gated, routing=False, activations=False)
    variants["gated M16 70%"] = (sparse(gated, share=0.7), {"m": 16, "share": 0.7})
    variants["M16"] = sparse(tuned(config, "relu2", options))
    return Study(
        name="gated",
        question="Does the recipe reach tuned SwiGLU in its gated form?",
        runs=runs(variants, options.seeds or range(3)),
        baseline="swiglu",
        axes=(Axis("m", log=True),),
    )
