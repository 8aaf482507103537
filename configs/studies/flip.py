"""What should happen around the changes of phase? Re-warming, warm-up, refreshes, the router.

46 M tokens a run, half of the steps sparse; one change of the recipe at a time, compared with the
recipe as it is.
"""

from configs.studies._base import Variants, base, changed, runs, sparse
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """V:2:16 with 2:4 inside; three seeds."""
    config = base(options)
    recipe = sparse(config)
    share = lambda fraction: max(round(fraction * config.steps), 1)
    variants: Variants = {
        "recipe": recipe,
        "relu2": config,
        "rewarm 2%": changed(recipe, optimizer={"rewarm_steps": share(0.02)}),
        "rewarm 7%": changed(recipe, optimizer={"rewarm_steps": share(0.07)}),
        "warm-up 1%": sparse(config, warmup=0.01),
        "warm-up 5%": sparse(config, warmup=0.05),
        "warm-up 20%": sparse(config, warmup=0.2),
        "no refresh": sparse(config, refresh_every=0),
        "refresh 7%": sparse(config, refresh_every=share(0.07)),
        "L2 router": sparse(config, metric="l2"),
        "faster bias": sparse(config, bias_rate=10 * recipe.sparsity.bias_rate),
    }
    return Study(
        name="flip",
        question="What should happen around the changes of phase?",
        runs=runs(variants, options.seeds or range(3)),
        baseline="recipe",
    )
