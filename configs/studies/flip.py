"""What should happen around the changes of phase? Warm-up, learning rate, moments, beta, router.

46 M tokens a run, half of the steps sparse; one change of the recipe at a time, compared with the
recipe as it is.
"""

from configs.studies._base import Variants, base, changed, runs, sparse, tuned
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """V:2:16 with 2:4 inside; three seeds."""
    dense = tuned(base(options), "relu2", options)
    recipe = sparse(dense)
    share = lambda fraction: max(round(fraction * dense.steps), 1)
    rewarm = lambda steps, at, **more: changed(
        recipe, optimizer={"rewarm_steps": share(steps), "rewarm_at": at, **more}
    )
    variants: Variants = {
        "recipe": recipe,
        "relu2": dense,
        "rewarm 2%": rewarm(0.02, "both"),
        "rewarm 2% at dense": rewarm(0.02, "dense"),
        "rewarm 7%": rewarm(0.07, "both"),
        "moments reset at dense": rewarm(0.02, "dense", reset_moments="dense"),
        "moments reset at both": rewarm(0.02, "both", reset_moments="both"),
        "beta anew at refreshes": sparse(dense, reestimate_beta=True),
        "rescaled at dense": changed(recipe, schedule={"rescale_dense": True}),
        "warm-up 1%": sparse(dense, warmup=0.01),
        "warm-up 5%": sparse(dense, warmup=0.05),
        "warm-up 20%": sparse(dense, warmup=0.2),
        "no refresh": sparse(dense, refresh_every=0),
        "refresh 4%": sparse(dense, refresh_every=share(0.04)),
        "refresh 15%": sparse(dense, refresh_every=share(0.15)),
        "L2 router": sparse(dense, metric="l2"),
        "biases not fitted": sparse(dense, fit_bias=False),
        "bias rate x 10": sparse(dense, bias_rate=10 * dense.sparsity.bias_rate),
    }
    return Study(
        name="flip",
        question="What should happen around the changes of phase?",
        runs=runs(variants, options.seeds or range(3)),
        baseline="recipe",
    )
