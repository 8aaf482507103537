"""Does the recipe keep the quality, and is it worth its time? All that the verdict needs, in order.

Everything is compared with dense relu^2 of the same seed: tuned SwiGLU, the recipe at equal tokens
and at equal wall-clock (as `equal_time`), the share of sparse steps, M, parts of the recipe, and
what happens around the changes of phase. 66 M tokens a run. What decides most has five seeds and
runs first, what may become a default has three; `--tuned` gives learning rates and batch,
`--speedup-from` the speed of a sparse step.
"""

from configs.studies._base import Variants, base, changed, runs, sparse, tuned
from configs.studies._rates import by_part, from_scales, gated_shared, phases
from configs.studies._strong import PROJECTIONS, at_rate, falling, several, shared
from train.config import Config
from train.study.definition import Options, Run, Study
from train.study.equal_time import SUFFIX, equal_time

GATED = "gated M16"
"""The gated recipe, whose sparse step has a speed of its own."""

FASTEST = "M32+projections 65%, warm-up 2%"
"""The fastest sparse step in 16 bits, for a whole run 1.3 times as fast as a dense one."""

ROUNDS: tuple[tuple[str, int], ...] = (
    *(("verdict", seed) for seed in range(5)),
    *(("fastest", seed) for seed in range(5)),
    *(("held", seed) for seed in range(5)),
    *(("shards", seed) for seed in range(5)),
    *(("shared", seed) for seed in range(5)),
    *(("parts", seed) for seed in range(5)),
    *(("phases", seed) for seed in range(5)),
    ("scales", 0),
    *(("leading", seed) for seed in range(3)),
    *(("ends", seed) for seed in range(3)),
    *(("gated", seed) for seed in range(3)),
    *(("gated shared", seed) for seed in range(5)),
    ("rates", 0),
    *(("others", seed) for seed in range(2)),
)
"""Which variants with which seed, in the order in which they run."""


def _verdict(dense: Config, swiglu: Config, options: Options) -> Variants:
    recipe, short = sparse(dense), sparse(dense, warmup=0.02)
    speedup = options.speedups.required("M16 50%")
    return {
        "relu2": dense,
        "M16 50%": recipe,
        "M16 50%" + SUFFIX: equal_time(recipe, dense, speedup),
        "swiglu": swiglu,
        "M16 50%, warm-up 2%": short,
        "M16 50%, warm-up 2%" + SUFFIX: equal_time(short, dense, speedup),
    }


def _leading(dense: Config, gated: Config | None) -> Variants:
    """What may become a default, and the gated form."""
    variants: Variants = {
        "M16 80%": sparse(dense, share=0.8, warmup=0.05),
        "M32 50%": sparse(dense, m=32),
        "M16 70%": sparse(dense, share=0.7),
    }
    if gated is not None:
        variants |= {"relu2_gated": gated, GATED + " 50%": sparse(gated)}
    return variants


def _fastest(dense: Config, options: Options) -> Variants:
    """A whole run 1.3 times as fast: what five seeds say, and whether a dense run gains the same
    from its schedule. At equal wall-clock, if its speed is known, it takes 86 M tokens."""
    recipe = falling(_fast(dense), 0.33)
    variants: Variants = {
        "relu2, decay at the end": falling(dense, 0.3),
        FASTEST + ", decay at the end": recipe,
    }
    speedup = options.speedups.by_label.get(FASTEST.partition(" ")[0])
    if speedup is not None:
        label = FASTEST + ", decay at the end" + SUFFIX
        variants[label] = equal_time(recipe, dense, speedup)
    return variants


def _fast(dense: Config) -> Config:
    return sparse(dense, share=0.65, warmup=0.02, m=32, **PROJECTIONS)


def _held(dense: Config, options: Options) -> Variants:
    """A rate that stays at its peak beyond the flip: the dense end begins with steps of full size.
    The dense run of the same decay and rate is `_fastest`'s. What a small model on a CPU found
    best, and lower peaks, since a rate that is held is a higher one on average."""
    held = lambda share=0.5, **sparsity: falling(
        sparse(dense, share=share, warmup=0.02, **sparsity), 0.3
    )
    recipe, speedup = held(), options.speedups.required("M16 50%")
    label = "M16 50%, warm-up 2%, decay over 30%"
    variants: Variants = {
        label: recipe,
        label + SUFFIX: equal_time(recipe, dense, speedup),
        label + ", rate x 3/2": at_rate(recipe, 3 / 2),
        "M8 50%, warm-up 2%, decay over 30%": held(m=8),
        "M8 65%, warm-up 2%, decay over 30%": held(0.65, m=8),
        FASTEST + ", decay over 20%": falling(_fast(dense), 0.2),
    }
    for factor, name in ((2 / 3, ", rate x 2/3"), (1 / 2, ", rate x 1/2")):
        variants |= {
            "relu2, decay over 30%" + name: at_rate(falling(dense, 0.3), factor),
            label + name: at_rate(recipe, factor),
            "M8 65%, warm-up 2%, decay over 30%" + name: at_rate(held(0.65, m=8), factor),
        }
    return variants


def _ends(dense: Config) -> Variants:
    """What a short dense end can make good, where the learning rate has fallen less before it.

    "Decay at the end": it stays at its peak until the flip. "Over 60%": it falls during the last
    60% of the steps, and is about half of its peak then.
    """
    short = lambda share, m=16: sparse(dense, share=share, warmup=0.02, m=m)
    longest = falling(short(0.7, m=32), 0.28)
    return {
        "relu2, decay over 60%": falling(dense, 0.6),
        FASTEST: _fast(dense),
        FASTEST + ", decay over 60%": falling(_fast(dense), 0.6),
        "M32 70%, warm-up 2%, decay at the end": longest,
        "M32 70%, warm-up 2%, rescaled, decay at the end": changed(
            longest, schedule={"rescale_dense": True}
        ),
        "M16 70%, warm-up 2%": short(0.7),
        "M16 70%, warm-up 2%, decay at the end": falling(short(0.7), 0.28),
        "M16 80%, warm-up 2%, decay at the end": falling(short(0.8), 0.18),
        "M16 50%, warm-up 2%, decay at the end": falling(short(0.5), 0.48),
        "M32 60%, warm-up 2%": short(0.6, m=32),
    }


def _gated(gated: Config | None, options: Options) -> Variants:
    """The gated recipe at equal wall-clock, where its own speed was measured."""
    speedup = options.speedups.by_label.get(GATED)
    if gated is None or speedup is None:
        return {}
    recipes = {
        " 50%": sparse(gated),
        " 50%, warm-up 2%": sparse(gated, warmup=0.02),
        " 25%, warm-up 2%": sparse(gated, share=0.25, warmup=0.02),
    }
    return {
        GATED + label + SUFFIX: equal_time(recipe, gated, speedup)
        for label, recipe in recipes.items()
    }


def _rates(*forms: Config) -> Variants:
    """Whether the rates that a shorter sweep found are right for runs of this length."""
    return {
        f"{form.model.ffn}, {name} rate": at_rate(form, factor)
        for form in forms
        for name, factor in (("lower", 2 / 3), ("higher", 3 / 2))
    }


def _others(dense: Config, options: Options) -> Variants:
    recipe, longer = sparse(dense), sparse(dense, share=0.7)
    steps = lambda share: max(round(share * dense.steps), 1)
    rewarmed = lambda at, **more: changed(
        recipe, optimizer={"rewarm_steps": steps(0.03), "rewarm_at": at, **more}
    )
    return {
        "M16 50%, rewarm at dense": rewarmed("dense"),
        "M16 50%, refresh 10%": sparse(dense, refresh_every=steps(0.1)),
        "M16 90%": sparse(dense, share=0.9, warmup=0.05),
        "M16 25%": sparse(dense, share=0.25),
        "M8 50%": sparse(dense, m=8),
        "weights only 50%": sparse(dense, routing=False, activations=False),
        "no routing 50%": sparse(dense, routing=False),
        "M16 50%, rescaled at dense": changed(recipe, schedule={"rescale_dense": True}),
        "M16 50%, moments reset at dense": rewarmed("dense", reset_moments="dense"),
        "M16 50%, L2 router": sparse(dense, metric="l2"),
        "M16 50%, warm-up 25%": sparse(dense, warmup=0.25),
        "M16 50%, rewarm at both": rewarmed("both"),
        "M16 50%, refresh 10%, beta anew": sparse(
            dense, refresh_every=steps(0.1), reestimate_beta=True
        ),
        "M16 70%" + SUFFIX: equal_time(longer, dense, options.speedups.required("M16 70%")),
        "M32 70%": sparse(dense, m=32, share=0.7),
        "tokens24 M16 50%": sparse(dense, weight_gradient="tokens24"),
        "M16 50%, attention projections 2:4": sparse(dense, attention_projections=True),
        "M16 50%, FFN in 8 bits": changed(recipe, model={"ffn_precision": "fp8"}),
        "four inside M16 50%": sparse(dense, activations=False),
    }


def study(options: Options) -> Study:
    """Dense relu^2 beside some 100 others; five seeds of the verdicts, three to one of the rest."""
    config = base(options, tokens=66e6)
    dense, swiglu = (tuned(config, ffn, options) for ffn in ("relu2", "swiglu"))
    # A sweep that ended early may lack the gated form.
    swept = options.tuned is None or "relu2_gated" in options.tuned.learning_rate
    gated = tuned(config, "relu2_gated", options) if swept else None
    groups = {
        "verdict": _verdict(dense, swiglu, options),
        "leading": _leading(dense, gated),
        "fastest": _fastest(dense, options),
        "held": _held(dense, options),
        "shards": several(dense, swiglu, options),
        "shared": shared(dense, options),
        "parts": by_part(dense, swiglu, options),
        "scales": from_scales(dense, swiglu),
        "phases": phases(dense, options),
        "ends": _ends(dense),
        "gated": _gated(gated, options),
        "gated shared": gated_shared(gated, options),
        "rates": _rates(dense, swiglu),
        "others": _others(dense, options),
    }
    rounds = ROUNDS
    if options.seeds:
        rounds = tuple((name, seed) for seed in options.seeds for name in groups)
    found: list[Run] = []
    for name, seed in rounds:
        found += runs(groups[name], [seed])
    return Study(
        name="evidence",
        question="Does the recipe keep the quality, and is it worth its time?",
        runs=tuple(found),
        baseline="relu2",
    )
