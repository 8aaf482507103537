"""How should the dense baselines be trained? Learning rate, initialisation and batch of three FFNs.

A star around one centre for each FFN: one factor moves at a time, so that a sweep costs a sum of
runs and not a product. 25 M tokens a run, about half a minute on an H100 at 25 M body parameters.
Narrow it with `--only "swiglu*"`; move the centre by editing CENTRE once the first star is in.
"""

from collections.abc import Iterator

from configs.studies._base import Variants, base, changed, runs, with_batch
from train.study.definition import Axis, Factor, Options, Study

FFNS = ("relu2", "relu2_gated", "swiglu")
CENTRE = {"learning_rate": 3e-3, "init_scale": 1.0, "batch": 1.0}
SWEEPS: dict[str, tuple[float, ...]] = {
    "learning_rate": (1e-3, 2e-3, 3e-3, 6e-3, 1.2e-2),
    "init_scale": (0.25, 0.5, 1.0),
    "batch": (0.5, 1.0, 2.0),
}
"""`batch` is in batches of the base configuration."""


def points() -> Iterator[dict[str, float]]:
    """The centre, then every other point of the star."""
    yield dict(CENTRE)
    for factor, values in SWEEPS.items():
        for value in values:
            if value != CENTRE[factor]:
                yield {**CENTRE, factor: value}


def study(options: Options) -> Study:
    """9 points for each of three FFNs, one seed."""
    config = base(options, tokens=25e6)
    variants: Variants = {}
    for point in points():
        for ffn in FFNS:
            sequences = max(round(point["batch"] * config.batch_size), 1)
            varied = changed(
                with_batch(config, sequences),
                model={"ffn": ffn, "init_scale": point["init_scale"]},
                optimizer={"learning_rate": point["learning_rate"]},
            )
            label = f"{ffn} lr{point['learning_rate']:g} init{point['init_scale']:g} b{sequences}"
            factors: dict[str, Factor] = {
                "ffn": ffn,
                "learning_rate": point["learning_rate"],
                "init_scale": point["init_scale"],
                "batch_size": sequences,
            }
            variants[label] = (varied, factors)
    return Study(
        name="dense_sweep",
        question="How should the dense baselines be trained?",
        runs=runs(variants, options.seeds or (0,)),
        baseline=next(iter(variants)),
        axes=(
            Axis("learning_rate", log=True),
            Axis("init_scale", log=True),
            Axis("batch_size", log=True),
        ),
    )
