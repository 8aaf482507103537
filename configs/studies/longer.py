"""Does the verdict hold in longer runs, and do seeds differ less? 83 M tokens a run.

Dense relu^2, the recipe at equal tokens and tuned SwiGLU, five paired seeds. A quarter longer than
`evidence`, for two questions that its length decides: what of the recipe's lead at equal tokens is
left, and whether the spread of seeds goes on falling once all of them have learned to copy.
`--tuned` gives learning rates and batch.
"""

from configs.studies._base import Variants, base, runs, sparse, tuned
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """Two dense forms and the recipe; five seeds."""
    config = base(options, tokens=83e6)
    dense = tuned(config, "relu2", options)
    variants: Variants = {
        "relu2": dense,
        "M16 50%, warm-up 2%": sparse(dense, warmup=0.02),
        "swiglu": tuned(config, "swiglu", options),
    }
    return Study(
        name="longer",
        question="Does the verdict hold in longer runs, and do seeds differ less?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="relu2",
    )
