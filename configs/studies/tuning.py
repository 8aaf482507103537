"""Which learning rate, batch and initialisation, for each form? The sweep that `--tuned` reads.

A grid, coarse rates of all forms at half the base's batch first, then a quarter; and smaller
initial weights in the blocks beside one of its points. One seed: all points share the seed of
initialisation and order. 25 M tokens a run, past the steepest part of the curve.
`python -m train.study.tuned` chooses from the exported results.
"""

from configs.studies._base import Variants, base, changed, runs, tuned, with_batch
from train.config import Ffn
from train.study.definition import Axis, Factor, Options, Study

FFNS: tuple[Ffn, ...] = ("relu2", "swiglu", "relu2_gated")
RATES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0.5, (3e-3, 1.5e-3, 6e-3, 7.5e-4)),
    (0.25, (1.5e-3, 3e-3, 7.5e-4)),
)
"""Batches, in batches of the base, and the peak learning rates at each, the likeliest first. At a
whole batch all forms were worse in an earlier sweep (docs/quality.md)."""
SMALLER_INIT = (0.5, 1.5e-3, 0.5)
"""Batch and rate, as above, at which a smaller factor on the blocks' initial weights is tried, and
that factor."""


def study(options: Options) -> Study:
    """Four rates for each of three forms, three at a smaller batch, one other initialisation."""
    config = base(options, tokens=25e6)
    points: list[tuple[float, float, float | None]]
    points = [(share, rate, None) for share, rates in RATES for rate in rates]
    variants: Variants = {}
    for share, rate, scale in [*points, SMALLER_INIT]:
        batch = max(round(share * config.batch_size), 1)
        for ffn in FFNS:
            varied = changed(
                with_batch(tuned(config, ffn, options), batch),
                optimizer={"learning_rate": rate},
            )
            label = f"{ffn} lr{rate:g} b{batch}"
            factors: dict[str, Factor] = {"ffn": ffn, "learning_rate": rate, "batch_size": batch}
            if scale is not None:
                varied = changed(varied, model={"init_scale": scale})
                label += f" init{scale:g}"
                factors["init_scale"] = scale
            variants[label] = (varied, factors)
    return Study(
        name="tuning",
        question="Which learning rate, batch and initialisation, for each form?",
        runs=runs(variants, options.seeds or (0,)),
        baseline=next(iter(variants)),
        axes=(Axis("learning_rate", log=True),),
    )
