"""How should the dense baselines be trained? Learning rate, initialisation and batch of three FFNs.

A star around one centre for each FFN: one factor moves at a time, so that a sweep costs a sum of
runs and not a product. 25 M tokens a run, about half a minute on an H100 at 25 M body parameters.
Narrow it with `--only "swiglu*"`. The centre is what `_base.TUNED` says, so that after a first star
the same command makes one around its best point; `dense_recipe` varies the rest.
"""

from collections.abc import Iterator

from configs.studies._base import Variants, base, changed, runs, tuned, with_batch
from train.config import Config, Ffn
from train.study.definition import Axis, Factor, Options, Study

FFNS: tuple[Ffn, ...] = ("relu2", "relu2_gated", "swiglu")
SWEEPS: dict[str, tuple[float, ...]] = {
    "learning_rate": (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 9e-3, 1.2e-2),
    "init_scale": (0.25, 0.5, 1.0),
    "batch": (0.5, 1.0, 2.0),
}
"""`batch` is in batches of the base configuration."""


def points(centre: dict[str, float]) -> Iterator[dict[str, float]]:
    """The centre, then every other point of the star."""
    yield centre
    for factor, values in SWEEPS.items():
        for value in values:
            if value != centre[factor]:
                yield {**centre, factor: value}


def _at(config: Config, point: dict[str, float], batch: int) -> Config:
    return changed(
        with_batch(config, batch),
        model={"init_scale": point["init_scale"]},
        optimizer={"learning_rate": point["learning_rate"]},
    )


def study(options: Options) -> Study:
    """A star of 11 or so points for each of three FFNs, one seed."""
    config = base(options, tokens=25e6)
    variants: Variants = {}
    stars = {}
    for ffn in FFNS:
        dense = tuned(config, ffn, options)
        centre = {
            "learning_rate": dense.optimizer.learning_rate,
            "init_scale": dense.model.init_scale,
            "batch": 1.0,
        }
        stars[ffn] = dense, list(points(centre))
    # Point by point, so that whatever is done when time is up compares the forms.
    for i in range(max(len(star) for _, star in stars.values())):
        for ffn, (dense, star) in stars.items():
            if i >= len(star):
                continue
            point = star[i]
            sequences = max(round(point["batch"] * config.batch_size), 1)
            label = f"{ffn} lr{point['learning_rate']:g} init{point['init_scale']:g} b{sequences}"
            factors: dict[str, Factor] = {
                "ffn": ffn,
                "learning_rate": point["learning_rate"],
                "init_scale": point["init_scale"],
                "batch_size": sequences,
            }
            variants[label] = (_at(dense, point, sequences), factors)
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
