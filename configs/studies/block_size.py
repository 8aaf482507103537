"""Which part of the sparsity costs what? M, weights alone, routing alone, 2:4 inside or not.

46 M tokens a run, half of the steps sparse. `M16` is the whole recipe: 2:4 weights, routed tokens,
two of four inside. What no kernel serves (all but M8, M16 and M32) runs as masked dense products on
a GPU: the losses count, the speeds do not.
"""

from configs.studies._base import Variants, base, runs, sparse, tuned
from train.study.definition import Axis, Options, Study


def study(options: Options) -> Study:
    """Dense and SwiGLU beside the parts; three seeds."""
    swiglu, config = (tuned(base(options), ffn, options) for ffn in ("swiglu", "relu2"))
    variants: Variants = {"relu2": config, "swiglu": swiglu}
    for m in (8, 16, 32):
        variants[f"M{m}"] = (sparse(config, m=m), {"m": m, "inside": "two of four"})
    for m in (8, 16, 32):
        varied = sparse(config, m=m, activations=False)
        variants[f"M{m}, four inside"] = (varied, {"m": m, "inside": "all four"})
    variants["weights only"] = sparse(config, routing=False, activations=False)
    variants["routing only, M16"] = sparse(config, m=16, weights=False, activations=False)
    variants["activations only"] = sparse(config, weights=False, routing=False)
    variants["no routing"] = sparse(config, routing=False)
    variants["M16, gradients of two of four tokens"] = sparse(config, weight_gradient="tokens24")
    return Study(
        name="block_size",
        question="Which part of the sparsity costs what?",
        runs=runs(variants, options.seeds or range(3)),
        baseline="relu2",
        axes=(Axis("m", log=True),),
    )
