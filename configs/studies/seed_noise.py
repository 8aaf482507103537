"""Where does the spread between seeds come from, and what brings it down?

Read the standard deviation and its interval, not the mean: with five seeds the interval spans a
factor of five, so only large differences count. `fixed order` reads the data as they lie, so that
seeds differ in their initialisation alone (its mean says nothing unless the documents were shuffled
beforehand); `64 windows` evaluates on a quarter of the held-out text.
"""

import dataclasses

from configs.studies._base import Variants, base, changed, runs
from train.study.definition import Options, Study


def study(options: Options) -> Study:
    """Dense relu^2; one change at a time; five seeds."""
    config = base(options, tokens=25e6)
    rate, steps = config.optimizer.learning_rate, config.steps
    optimizer = lambda **fields: changed(config, optimizer=fields)
    variants: Variants = {
        "base": config,
        "lr / 3": optimizer(learning_rate=rate / 3),
        "lr x 2": optimizer(learning_rate=2 * rate),
        "init / 2": changed(config, model={"init_scale": config.model.init_scale / 2}),
        "init / 4": changed(config, model={"init_scale": config.model.init_scale / 4}),
        "warm-up 20%": optimizer(warmup_steps=round(0.2 * steps)),
        "lr to zero": optimizer(final_fraction=0.0),
        "fixed order": dataclasses.replace(
            config, data=dataclasses.replace(config.data, shuffle=False)
        ),
        "64 windows": changed(config, log={"eval_windows": 64}),
    }
    return Study(
        name="seed_noise",
        question="Where does the spread between seeds come from?",
        runs=runs(variants, options.seeds or range(5)),
        baseline="base",
    )
