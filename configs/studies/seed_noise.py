"""Where does the spread between seeds come from, and what brings it down?

Read the standard deviation and its interval, not the mean: with five seeds the interval spans a
factor of five, so only large differences count. `one order` gives all seeds the same batches, so
that they differ in their initialisation alone; `64 windows` evaluates on a small part of the
held-out text. The paired differences that decide other studies are less noisy than single runs:
both runs of a pair share initialisation and order.
"""

from configs.studies._base import Variants, base, changed, runs, tuned
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """Dense relu^2; one change at a time; five seeds."""
    config = tuned(base(options, tokens=25e6), "relu2", options)
    rate = config.optimizer.learning_rate
    optimizer = lambda **fields: changed(config, optimizer=fields)
    variants: Variants = {
        "base": config,
        "one order": changed(config, data={"seed": 0}),
        "lr / 2": optimizer(learning_rate=rate / 2),
        "lr x 2": optimizer(learning_rate=2 * rate),
        "no qk-norm": changed(config, model={"qk_norm": False}),
        "cosine to 10%": optimizer(decay="cosine", final_fraction=0.1),
        "64 windows": changed(config, log={"eval_windows": 64}),
    }
    variants |= {"swiglu": tuned(base(options, tokens=25e6), "swiglu", options)}
    return Study(
        name="seed_noise",
        question="Where does the spread between seeds come from?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="base",
    )
