"""What else makes a dense baseline strong, and its seeds agree? One change at a time.

The rest of the recipe around `dense_sweep`'s factors: norms of queries and keys, what the blocks,
the head and the embedding start from, the decay of the learning rate, rates of parts of the blocks,
weight decay, Adam's second moment, clipping, warm-up. 25 M tokens a run, relu^2 and SwiGLU
(`--only "relu2*"` for one), three seeds: read the mean and the standard deviation. What helps goes
into the `settings` of a file for `--tuned`, around which the study then varies the rest, and the
learning rate.
"""

from configs.studies._base import Variants, base, changed, runs, tuned
from train.config import Config, Ffn
from train.study.definition import Factor, Options, Settings, Study

FFNS: tuple[Ffn, ...] = ("relu2", "swiglu")
CHANGES: dict[str, Settings] = {
    "as tuned": {},
    "no qk-norm": {"model": {"qk_norm": False}},
    "cosine to zero": {"optimizer": {"decay": "cosine"}},
    "cosine to 10%": {"optimizer": {"decay": "cosine", "final_fraction": 0.1}},
    "wsd 30% to zero": {
        "optimizer": {"decay": "wsd", "decay_fraction": 0.3, "final_fraction": 0.0}
    },
    "outputs from zero": {"model": {"output_scale": 0.0}},
    "head from zero": {"model": {"head_scale": 0.0}},
    "embedding of 1": {"model": {"embedding_scale": 1.0}},
    "blocks from half": {"model": {"init_scale": 0.5}},
    "weight decay 0": {"optimizer": {"weight_decay": 0.0}},
    "weight decay 0.3": {"optimizer": {"weight_decay": 0.3}},
    "b2 0.99": {"optimizer": {"b2": 0.99}},
    "b2 0.999": {"optimizer": {"b2": 0.999}},
    "clip at 0.3": {"optimizer": {"clip_norm": 0.3}},
    "attention's rate x 1/2": {"optimizer": {"attention_rate": 0.5}},
    "attention's rate x 2": {"optimizer": {"attention_rate": 2.0}},
    "blocks' rate x 1/2": {"optimizer": {"attention_rate": 0.5, "ffn_rate": 0.5}},
    "embedding of 1, outputs from zero": {"model": {"embedding_scale": 1.0, "output_scale": 0.0}},
    "embedding of 1, b2 0.99": {"model": {"embedding_scale": 1.0}, "optimizer": {"b2": 0.99}},
}


def _changes(config: Config) -> dict[str, Settings]:
    """All of them, with those that depend on the run's length and peak learning rate."""
    warmup = lambda share: {"warmup_steps": round(share * config.steps)}
    times = lambda factor: {"learning_rate": factor * config.optimizer.learning_rate}
    return CHANGES | {
        "warm-up 2%": {"optimizer": warmup(0.02)},
        "warm-up 15%": {"optimizer": warmup(0.15)},
        "rate x 2/3": {"optimizer": times(2 / 3)},
        "rate x 3/2": {"optimizer": times(3 / 2)},
        "warm-up 15%, rate x 3/2": {"optimizer": warmup(0.15) | times(3 / 2)},
        "warm-up 15%, outputs from zero": {
            "model": {"output_scale": 0.0},
            "optimizer": warmup(0.15),
        },
    }


def study(options: Options) -> Study:
    """25 recipes for each of two FFNs; three seeds."""
    config = base(options, tokens=25e6)
    variants: Variants = {}
    forms = {ffn: tuned(config, ffn, options) for ffn in FFNS}
    changes = {ffn: _changes(form) for ffn, form in forms.items()}
    for name in changes[FFNS[0]]:
        for ffn, form in forms.items():
            factors: dict[str, Factor] = {"ffn": ffn, "change": name}
            variants[f"{ffn}, {name}"] = (changed(form, **changes[ffn][name]), factors)
    return Study(
        name="dense_recipe",
        question="What else makes a dense baseline strong, and its seeds agree?",
        runs=runs(variants, options.seeds or range(3)),
        baseline=next(iter(variants)),
    )
