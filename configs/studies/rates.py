"""Do the learning rates of a shorter sweep hold at the evidence's length? Goes around `--tuned`.

Dense relu^2, tuned SwiGLU, gated relu^2 and the recipe at 1, 3/2, 2, 2/3 and 3 times their rates;
66 M tokens a run, with the batch and the initialisation that the sweep found. `python -m
train.study.tuned` chooses from the exported results, for a verdict at other rates.
"""

from configs.studies._base import Variants, base, changed, runs, sparse, tuned
from train.config import Ffn
from train.study.definition import Axis, Factor, Options, Study

FFNS: tuple[Ffn, ...] = ("relu2", "swiglu", "relu2_gated")
TIMES = (1, 3 / 2, 2, 2 / 3, 3)
RECIPE = "M16 50%"


def study(options: Options) -> Study:
    """Five rates of four models; three seeds."""
    config = base(options, tokens=66e6)
    variants: Variants = {}
    for times in TIMES:
        for ffn in FFNS:
            form = tuned(config, ffn, options)
            rate = times * form.optimizer.learning_rate
            form = changed(form, optimizer={"learning_rate": rate})
            rate = float(f"{rate:.3g}")
            factors: dict[str, Factor] = {
                "ffn": ffn,
                "learning_rate": rate,
                "batch_size": form.batch_size,
            }
            variants[f"{ffn} lr{rate:g}"] = (form, factors)
            if ffn == "relu2":
                # Another factor, so that no rate is chosen from it.
                varied: dict[str, Factor] = {"recipe": RECIPE, "learning_rate": rate}
                variants[f"{RECIPE} lr{rate:g}"] = (sparse(form), varied)
    return Study(
        name="rates",
        question="Do the learning rates of a shorter sweep hold at the evidence's length?",
        runs=runs(variants, options.seeds or range(3)),
        baseline=next(iter(variants)),
        axes=(Axis("learning_rate", log=True),),
    )
