"""Does the recipe keep the quality, and is it worth its time? All that the verdict needs, in order.

Everything is compared with dense relu^2 of the same seed: tuned SwiGLU, the recipe at equal tokens
and at equal wall-clock (as `equal_time`), the share of sparse steps, M, parts of the recipe, and
what happens around the changes of phase. 66 M tokens a run. What decides most has five seeds and
runs first, what may become a default has three; `--tuned` gives learning rates and batch,
`--speedup-from` the speed of a sparse step.
"""

from functools import partial
from typing import Any

from configs.studies._base import Variants, base, changed, runs, sparse, tuned
from train.config import Config
from train.study.definition import Options, Run, Study
from train.study.equal_time import SUFFIX, equal_time

GATED = "gated M16"
"""The gated recipe, whose sparse step has a speed of its own."""

GATED_SHARED = "gated M32+projections shared 1/4"
"""The gated form of the verdict's recipe."""

SHORT = ", warm-up 2%, decay over 60%"
"""How `_short` runs; a rate that falls so is best for dense runs of `_ends`."""

PROJECTIONS = {"attention_projections": True}

FASTEST = "M32+projections 65%, warm-up 2%"
"""The fastest sparse step in 16 bits, for a whole run 1.3 times as fast as a dense one."""

ROUNDS: tuple[tuple[str, int], ...] = (
    *(("verdict", seed) for seed in range(5)),
    *(("fastest", seed) for seed in range(5)),
    *(("held", seed) for seed in range(5)),
    *(("shards", seed) for seed in range(5)),
    *(("shared", seed) for seed in range(5)),
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


def _falling(config: Config, share: float) -> Config:
    """The rate at its peak until the last `share` of the steps, where it falls linearly."""
    return changed(config, optimizer={"decay": "wsd", "decay_fraction": share})


def _at_rate(config: Config, factor: float) -> Config:
    """Another learning rate: so many times its own."""
    return changed(config, optimizer={"learning_rate": factor * config.optimizer.learning_rate})


def _fastest(dense: Config, options: Options) -> Variants:
    """A whole run 1.3 times as fast: what five seeds say, and whether a dense run gains the same
    from its schedule. At equal wall-clock, if its speed is known, it takes 86 M tokens."""
    recipe = _falling(_fast(dense), 0.33)
    variants: Variants = {
        "relu2, decay at the end": _falling(dense, 0.3),
        FASTEST + ", decay at the end": recipe,
    }
    speedup = options.speedups.by_label.get(FASTEST.partition(" ")[0])
    if speedup is not None:
        label = FASTEST + ", decay at the end" + SUFFIX
        variants[label] = equal_time(recipe, dense, speedup)
    return variants


def _fast(dense: Config) -> Config:
    return sparse(dense, share=0.65, warmup=0.02, m=32, attention_projections=True)


def _held(dense: Config, options: Options) -> Variants:
    """A rate that stays at its peak beyond the flip: the dense end begins with steps of full size.
    The dense run of the same decay and rate is `_fastest`'s. What a small model on a CPU found
    best, and lower peaks, since a rate that is held is a higher one on average."""
    held = lambda share=0.5, **sparsity: _falling(
        sparse(dense, share=share, warmup=0.02, **sparsity), 0.3
    )
    recipe, speedup = held(), options.speedups.required("M16 50%")
    label = "M16 50%, warm-up 2%, decay over 30%"
    variants: Variants = {
        label: recipe,
        label + SUFFIX: equal_time(recipe, dense, speedup),
        label + ", rate x 3/2": _at_rate(recipe, 3 / 2),
        "M8 50%, warm-up 2%, decay over 30%": held(m=8),
        "M8 65%, warm-up 2%, decay over 30%": held(0.65, m=8),
        FASTEST + ", decay over 20%": _falling(_fast(dense), 0.2),
    }
    for factor, name in ((2 / 3, ", rate x 2/3"), (1 / 2, ", rate x 1/2")):
        variants |= {
            "relu2, decay over 30%" + name: _at_rate(_falling(dense, 0.3), factor),
            label + name: _at_rate(recipe, factor),
            "M8 65%, warm-up 2%, decay over 30%" + name: _at_rate(held(0.65, m=8), factor),
        }
    return variants


def _shards(dense: Config, swiglu: Config, options: Options) -> Variants:
    """A token chooses an expert in each of several parts of the neurons: as many neurons meet it,
    and it has a wider choice of them. Most rates fall during the last 60% of the steps, which is
    best for dense runs of `_ends`; recipes at equal wall-clock where their speed is known."""
    short, how = partial(_short, dense), SHORT
    variants: Variants = {
        "M8 in 4 60%" + how: short(0.6, m=8, shards=4),
        "M8 in 4 65%" + how: short(0.65, m=8, shards=4),
        "M16 in 4 50%" + how: short(shards=4),
        "M16 in 4 65%" + how: short(0.65, shards=4),
        "M16 in 2 50%" + how: short(shards=2),
        "M32 in 2 50%" + how: short(m=32, shards=2),
        "M16 50%" + how: short(),
        "M32 39%" + how: short(0.39, m=32),
        "M8 in 4 65%, warm-up 2%, decay over 45%": short(0.65, 0.45, m=8, shards=4),
        "M8 in 4 65%, warm-up 2%, decay over 30%": short(0.65, 0.3, m=8, shards=4),
        "M8 in 4 65%, thresholded at dense" + how: changed(
            short(0.65, m=8, shards=4), schedule={"threshold_dense": True}
        ),
        "M8 in 4 weights dense 65%" + how: short(0.65, m=8, shards=4, weights=False),
        "M8 in 4 weights dense 80%" + how: short(0.8, m=8, shards=4, weights=False),
        "swiglu, decay over 60%": _falling(swiglu, 0.6),
        "relu2, decay over 60%, rate's warm-up 15%": _slower_start(_falling(dense, 0.6)),
        "relu2, decay over 60%, rate x 2/3": _at_rate(_falling(dense, 0.6), 2 / 3),
        "relu2, decay over 60%, one order": changed(_falling(dense, 0.6), data={"seed": 0}),
        "relu2, decay over 80%": _falling(dense, 0.8),
        "relu2, decay over 45%": _falling(dense, 0.45),
    }
    return variants | _at_equal_time(variants, 3, dense, options)


def _shared(dense: Config, options: Options) -> Variants:
    """Every token meets some of the neurons, one block in four or in eight, and is routed among the
    others; M16 with a quarter of them is a little faster than M8, and so is M32 than M16."""
    short, how = partial(_short, dense), SHORT
    two = {"shared_every": 4, "shards": 2, "weights": False}
    fast = {"m": 32, "shared_every": 4, **PROJECTIONS}
    alone = {"routing": False, "activations": False, "weights": False}
    variants: Variants = {
        "M32+projections shared 1/4 47%" + how: short(0.47, **fast),
        "M32+projections shared 1/4 60%" + how: short(0.6, **fast),
        "M32+projections shared 1/4 70%" + how: short(0.7, **fast),
        "M32+projections shared 1/8 50%" + how: short(0.5, **fast | {"shared_every": 8}),
        "M16 shared 1/4 in 2 weights dense 65%" + how: short(0.65, **two),
        "M16 shared 1/4 in 2 weights dense 60%" + how: short(0.6, **two),
        "M32+projections shared 1/4 44%" + how: short(0.44, **fast),
        "M32+projections shared 1/4 82%" + how: short(0.82, **fast),
        "M32+projections shared 1/8 40%" + how: short(0.4, **fast | {"shared_every": 8}),
        "M32+projections shared 1/8 74%" + how: short(0.74, **fast | {"shared_every": 8}),
        "M16+projections shared 1/4 in 2 weights dense 60%" + how: short(0.6, **two, **PROJECTIONS),
        "projections alone 47%" + how: short(0.47, **alone, **PROJECTIONS),
        "M32 shared 1/4 52%" + how: short(0.52, m=32, shared_every=4),
        "M16 shared 1/4 65%" + how: short(0.65, shared_every=4),
        "M16 shared 1/4 50%" + how: short(shared_every=4),
        "M16 shared 1/4 in 2 65%" + how: short(0.65, shared_every=4, shards=2),
        "M32 shared 1/4 65%" + how: short(0.65, m=32, shared_every=4),
        "M32 shared 1/4 50%" + how: short(m=32, shared_every=4),
        "M16 shared 1/8 65%" + how: short(0.65, shared_every=8),
        "M8 shared 1/4 65%" + how: short(0.65, m=8, shared_every=4),
        "M16 shared 1/4 weights dense 65%" + how: short(0.65, shared_every=4, weights=False),
        "M16 shared 1/4 weights dense 60%" + how: short(0.6, shared_every=4, weights=False),
        "M32 shared 1/4 weights dense 55%" + how: short(0.55, m=32, shared_every=4, weights=False),
    }
    lower: Variants = {
        "M32+projections shared 1/4 47%" + how + ", rate x 2/3": _at_rate(
            short(0.47, **fast), 2 / 3
        )
    }
    variants |= _at_equal_time(variants, 6, dense, options) | lower
    return variants | _at_equal_time(lower, 1, dense, options)


def _short(dense: Config, share: float = 0.5, fall: float = 0.6, **sparsity: Any) -> Config:
    """A short dense start, and a rate that falls during the last `fall` of the steps."""
    return _falling(sparse(dense, share=share, warmup=0.02, **sparsity), fall)


def _slower_start(config: Config) -> Config:
    """The rate reaches its peak after 15% of the steps: runs with 2:4 projections lead while the
    rate is young, so does what might help a dense run there?"""
    return changed(config, optimizer={"warmup_steps": round(0.15 * config.steps)})


def _at_equal_time(variants: Variants, first: int, dense: Config, options: Options) -> Variants:
    """The first so many of them at equal wall-clock, where their speed is known."""
    longer: Variants = {}
    for label, recipe in list(variants.items())[:first]:
        speedup = options.speedups.of(label)
        if speedup is not None and isinstance(recipe, Config):
            longer[label + SUFFIX] = equal_time(recipe, dense, speedup)
    return longer


def _ends(dense: Config) -> Variants:
    """What a short dense end can make good, where the learning rate has fallen less before it.

    "Decay at the end": it stays at its peak until the flip. "Over 60%": it falls during the last
    60% of the steps, and is about half of its peak then.
    """
    short = lambda share, m=16: sparse(dense, share=share, warmup=0.02, m=m)
    longest = _falling(short(0.7, m=32), 0.28)
    return {
        "relu2, decay over 60%": _falling(dense, 0.6),
        FASTEST: _fast(dense),
        FASTEST + ", decay over 60%": _falling(_fast(dense), 0.6),
        "M32 70%, warm-up 2%, decay at the end": longest,
        "M32 70%, warm-up 2%, rescaled, decay at the end": changed(
            longest, schedule={"rescale_dense": True}
        ),
        "M16 70%, warm-up 2%": short(0.7),
        "M16 70%, warm-up 2%, decay at the end": _falling(short(0.7), 0.28),
        "M16 80%, warm-up 2%, decay at the end": _falling(short(0.8), 0.18),
        "M16 50%, warm-up 2%, decay at the end": _falling(short(0.5), 0.48),
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


def _gated_shared(gated: Config | None, options: Options) -> Variants:
    """The gated form as in `_shared`, its dense twin, and both at lower rates, none having been
    tuned with these settings: the dense run takes SwiGLU's time, the longer ones of equal
    wall-clock as well."""
    if gated is None:
        return {}
    variants: Variants = {}
    for factor, name in ((1, ""), (2 / 3, ", rate x 2/3"), (1 / 2, ", rate x 1/2")):
        form = _at_rate(gated, factor)
        label = GATED_SHARED + " 47%" + SHORT + name
        recipe: Variants = {label: _short(form, 0.47, m=32, shared_every=4, **PROJECTIONS)}
        variants["relu2_gated, decay over 60%" + name] = _falling(form, 0.6)
        variants |= recipe | _at_equal_time(recipe, 1, form, options)
    return variants


def _rates(*forms: Config) -> Variants:
    """Whether the rates that a shorter sweep found are right for runs of this length."""
    return {
        f"{form.model.ffn}, {name} rate": _at_rate(form, factor)
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
        "shards": _shards(dense, swiglu, options),
        "shared": _shared(dense, options),
        "ends": _ends(dense),
        "gated": _gated(gated, options),
        "gated shared": _gated_shared(gated, options),
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
