"""How long may the sparse phase be? 25 to 90% of the steps, against dense at equal tokens.

46 M tokens a run, about a minute on an H100. The dense warm-up is 5% of the steps; at 90% as much
is left for the dense end.
"""

from configs.studies._base import Variants, base, runs, sparse, tuned
from train.study.definition import Axis, Options, Study

SHARES = (0.25, 0.5, 0.7, 0.8, 0.9)


def study(options: Options) -> Study:
    """V:2:16 with 2:4 inside; three seeds."""
    swiglu, config = (tuned(base(options), ffn, options) for ffn in ("swiglu", "relu2"))
    variants: Variants = {"relu2": config, "swiglu": swiglu}
    for share in SHARES:
        varied = sparse(config, share=share, warmup=0.05)
        variants[f"sparse {share:.0%}"] = (varied, {"sparse_share": share})
    return Study(
        name="sparse_share",
        question="How long may the sparse phase be?",
        runs=runs(variants, options.seeds or range(3)),
        baseline="relu2",
        axes=(Axis("sparse_share"),),
    )
