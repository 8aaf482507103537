"""What else makes a dense baseline strong, and its seeds agree? One change at a time.

The rest of the recipe around `dense_sweep`'s factors: norms of queries and keys, what the blocks,
the head and the embedding start from, the decay of the learning rate, weight decay, Adam's second
moment, clipping, warm-up. 25 M tokens a run, relu^2 and SwiGLU (`--only "relu2*"` for one), three
seeds: read the mean and the standard deviation. What helps goes into `_base.TUNED`.
"""

from configs.studies._base import Sections, Variants, base, changed, runs, tuned
from train.config import Ffn
from train.study.definition import Factor, Options, Study

FFNS: tuple[Ffn, ...] = ("relu2", "swiglu")
CHANGES: dict[str, Sections] = {
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
    "weight decay 0": {"optimizer": {"weight_decay": 0.0}},
    "weight decay 0.3": {"optimizer": {"weight_decay": 0.3}},
    "b2 0.99": {"optimizer": {"b2": 0.99}},
    "clip at 0.3": {"optimizer": {"clip_norm": 0.3}},
}


def study(options: Options) -> Study:
    """12 recipes for each of two FFNs and two lengths of the warm-up; three seeds."""
    config = base(options, tokens=25e6)
    variants: Variants = {}
    warmups = {f"warm-up {share:.0%}": round(share * config.steps) for share in (0.02, 0.15)}
    changes = CHANGES | {k: {"optimizer": {"warmup_steps": v}} for k, v in warmups.items()}
    for name, sections in changes.items():
        for ffn in FFNS:
            factors: dict[str, Factor] = {"ffn": ffn, "change": name}
            variants[f"{ffn}, {name}"] = (changed(tuned(config, ffn, options), **sections), factors)
    return Study(
        name="dense_recipe",
        question="What else makes a dense baseline strong, and its seeds agree?",
        runs=runs(variants, options.seeds or range(3)),
        baseline=next(iter(variants)),
    )
