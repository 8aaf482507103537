"""The studies that come with the repository, and what a study refuses."""

import dataclasses
import re
from fractions import Fraction
from itertools import pairwise

import pytest

import configs
from configs.studies import _base, dense_sweep
from train.config import Config, validate
from train.data.config import DataConfig
from train.optimizer import learning_rate_schedule
from train.study import definition
from train.study.definition import Axis, Options, Run, Study, Tuned
from train.study.equal_time import SUFFIX, Speedups

SPEEDUPS = Speedups(1.3)
EVERY_SPEED = {"M16": 1.2, "gated M16": 1.4, "M32": 1.3, "M16 70%": 1.1}


def run(label="a", seed=0, **factors):
    return Run(label, seed, Config(seed=seed), factors)


@pytest.mark.parametrize("name", definition.names())
def test_every_study_can_run_on_the_data_asked_for(name):
    data = DataConfig(source="tokens/train-*.bin", validation="tokens/val.bin")
    study = definition.get(name, Options(data=data, speedups=SPEEDUPS))
    study.validate()
    assert definition.summary(name).endswith((".", "?"))
    # A minute or two of an H100, and at most one pass over the text that the budget was made for.
    assert all(run.tokens <= 84e6 for run in study.runs)
    for run in study.runs:
        assert run.config.data == dataclasses.replace(data, seed=run.config.data.seed)
        assert (run.config.checkpoint.every, run.config.checkpoint.final) == (0, False)
    # Every label has the baseline's seeds, or some of them: everything is paired.
    seeds = {label: {r.seed for r in study.runs if r.label == label} for label in study.labels}
    assert study.baseline is not None
    assert all(own <= seeds[study.baseline] for own in seeds.values())
    if name != "evidence":
        assert len(set(map(tuple, seeds.values()))) == 1


@pytest.mark.parametrize("name", [n for n in definition.names() if n != "smoke"])
def test_studies_vary_another_configuration_too(name):
    study = definition.get(name, Options(base="tiny", seeds=(7,), speedups=SPEEDUPS))
    study.validate()
    assert {run.seed for run in study.runs} == {7}
    assert {run.config.model.width for run in study.runs} == {configs.get("tiny").model.width}


def test_configurations_of_one_study_differ():
    for name in definition.names():
        study = definition.get(name, Options(speedups=SPEEDUPS))
        assert len({repr(run.config) for run in study.runs}) == len(study.runs), name


def test_studies_are_no_configurations():
    assert "studies" not in configs.names()
    assert not any(name.startswith("_") for name in definition.names())


def test_dense_sweep_is_a_star():
    study = definition.get("dense_sweep", Options())
    relu2 = [run for run in study.runs if run.factors["ffn"] == "relu2"]
    centre = relu2[0].factors
    moved = [[k for k, v in run.factors.items() if v != centre[k]] for run in relu2]
    points = sum(map(len, dense_sweep.SWEEPS.values())) - 3
    assert sorted(map(len, moved)) == [0] + points * [1]
    tokens = {run.tokens for run in study.runs}
    assert max(tokens) - min(tokens) < 0.003 * max(tokens)
    batches = {run.config.batch_size: run.config for run in relu2}
    warmup = {b: c.optimizer.warmup_steps / c.steps for b, c in batches.items()}
    assert max(warmup.values()) - min(warmup.values()) < 0.005


def test_sparse_runs_leave_a_dense_end():
    for name in ("sparse_share", "block_size", "flip", "gated"):
        for run in definition.get(name, Options()).runs:
            config = run.config
            end = config.steps - config.schedule.warmup_steps - config.sparse_steps
            assert end >= 0.049 * config.steps


def test_equal_time_needs_a_speed_and_spends_it():
    with pytest.raises(ValueError, match="--speedup"):
        definition.get("equal_time", Options())
    with pytest.raises(ValueError, match=r"'gated M16 50%' is needed"):
        definition.get("equal_time", Options(speedups=Speedups(None, {"M16": 1.2, "M32": 1.3})))
    speedups = Speedups(None, EVERY_SPEED)
    study = definition.get("equal_time", Options(speedups=speedups))
    tokens = {run.label: run.tokens for run in study.runs}
    for label, share, s in (
        ("M16 50%", 0.5, 1.2),
        ("gated M16 50%", 0.5, 1.4),
        ("M16 70%", 0.7, 1.1),
        ("M32 70%", 0.7, 1.3),
    ):
        saved = tokens["relu2"] / (1 - share + share / s)
        assert tokens[f"{label}, equal time"] == pytest.approx(saved, rel=2e-3)
        assert tokens[label] == tokens["relu2"]


def test_the_verdict_of_the_evidence_comes_first():
    speedups = Speedups(None, {"M16": 1.405})
    study = definition.get("evidence", Options(speedups=speedups))
    first = [(run.label, run.seed) for run in study.runs[:30]]
    labels = ["relu2", "M16 50%", "M16 50%, equal time", "swiglu"]
    labels += ["M16 50%, warm-up 2%", "M16 50%, warm-up 2%, equal time"]
    assert first == [(label, seed) for seed in range(5) for label in labels]
    for label in labels:
        assert sorted(run.seed for run in study.runs if run.label == label) == [0, 1, 2, 3, 4]
    tokens = {run.label: run.tokens for run in study.runs}
    assert tokens["M16 50%"] == tokens["relu2"] == tokens["swiglu"]
    saved = tokens["relu2"] / (0.5 + 0.5 / 1.405)
    assert tokens["M16 50%, equal time"] == pytest.approx(saved, rel=2e-3)
    # The gated form is stretched by its own speed alone.
    gated = "gated M16 50%, equal time"
    assert gated not in study.labels
    own = Options(speedups=Speedups(None, {"M16": 1.405, "gated M16": 1.6}))
    stretched = {run.label: run.tokens for run in definition.get("evidence", own).runs}[gated]
    assert stretched == pytest.approx(tokens["relu2_gated"] / (0.5 + 0.5 / 1.6), rel=2e-3)
    # So is the fastest recipe.
    fastest = "M32+projections 65%, warm-up 2%, decay at the end"
    assert f"{fastest}, equal time" not in study.labels
    assert len([run for run in study.runs if run.label == fastest]) == 5
    own = Options(speedups=Speedups(None, {"M16": 1.405, "M32+projections": 1.568}))
    stretched = {run.label: run.tokens for run in definition.get("evidence", own).runs}
    saved = tokens[fastest] / (0.35 + 0.65 / 1.568)
    assert stretched[f"{fastest}, equal time"] == pytest.approx(saved, rel=2e-3)
    # With neurons that every token meets, too, and its dense twin comes beside it.
    gated, twin = "gated M32+projections shared 1/4 47%", "relu2_gated, decay over 60%"
    own = Options(speedups=Speedups(None, {"M16": 1.405, gated.removesuffix(" 47%"): 1.5}))
    found = {run.label: run for run in definition.get("evidence", own).runs}
    recipe = f"{gated}, warm-up 2%, decay over 60%"
    saved = found[twin].tokens / (0.53 + 0.47 / 1.5)
    assert found[f"{recipe}, equal time"].tokens == pytest.approx(saved, rel=2e-3)
    assert found[recipe].config.model == found[twin].config.model
    rate = lambda label: found[label].config.optimizer.learning_rate
    for label in (twin, recipe):
        assert rate(f"{label}, rate x 2/3") == pytest.approx(2 / 3 * rate(twin))
    assert rate(f"{recipe}, rate x 2/3, equal time") == rate(f"{recipe}, rate x 2/3")
    # No label takes its speed from another recipe.
    unknown = [label for label in study.labels if speedups.of(label) is None]
    assert {"M8 50%", "M32 70%", "weights only 50%", "tokens24 M16 50%"} <= set(unknown)


def test_parts_of_a_model_have_the_rate_that_the_label_says():
    study = definition.get("evidence", Options(speedups=Speedups(1.4)))
    found = {run.label: run.config for run in study.runs}
    said = re.compile(r"(attention|FFN|embedding|head|blocks)'s? rate x ([0-9/]+)")
    moved = set()
    for label, config in found.items():
        expected = {"attention": 1.0, "ffn": 1.0, "embedding": 1.0, "head": 1.0}
        for part in label.split(", "):
            if match := said.fullmatch(part):
                whose = {"blocks": ("attention", "ffn")}.get(match[1], (match[1].lower(),))
                expected |= dict.fromkeys(whose, float(Fraction(match[2])))
                moved.add((config.model.ffn, part))
        rates = {name: getattr(config.optimizer, name + "_rate") for name in expected}
        assert rates == pytest.approx(expected), label
    assert len(moved) == 20 + 20 + 5
    # A recipe has its dense twin, of the same model and rates.
    recipe = "M32+projections shared 1/4 47%, warm-up 2%, decay over 60%, blocks' rate x 1/2"
    twin = found["relu2, decay over 60%, blocks' rate x 1/2"]
    assert found[recipe].optimizer == twin.optimizer
    assert found[recipe].model == twin.model


def test_the_verdict_runs_what_its_labels_say():
    own = {"relu2": {"optimizer": {"attention_rate": 0.1, "ffn_rate": 0.2, "head_rate": 0.3}}}
    tuned = Tuned(8, {"relu2": 9e-3, "swiglu": 4e-3, "relu2_gated": 5e-3}, form_settings=own)
    study = definition.get("verdict", Options(tuned=tuned, speedups=Speedups(1.4)))
    found = {run.label: run.config for run in study.runs}
    said = re.compile(r"(attention|FFN|head)'s rate x ([0-9/]+)")
    for label, config in found.items():
        kind, *rest = label.removesuffix(SUFFIX).split(", ")
        recipe = kind not in ("relu2", "swiglu", "relu2_gated")
        expected = {"attention": 1.0, "ffn": 1.0, "head": 1.0}
        if config.model.ffn == "relu2":
            expected = {"attention": 0.1, "ffn": 0.2, "head": 0.3}
        for part in rest:
            if match := said.fullmatch(part):
                expected[match[1].lower()] *= float(Fraction(match[2]))
        rates = {name: getattr(config.optimizer, name + "_rate") for name in expected}
        assert rates == pytest.approx(expected), label
        falls = [int(part[len("decay over ") : -1]) for part in rest if part.startswith("decay")]
        assert config.optimizer.decay_fraction == (falls[0] / 100 if falls else 0.6)
        assert config.schedule.threshold_dense == ("thresholded" in rest)
        assert kind.startswith("gated") == (recipe and config.model.ffn == "relu2_gated")
        share = int(kind.rpartition(" ")[2][:-1]) / 100 if recipe else 0.0
        assert config.schedule.sparse_fraction == share
        if not recipe:
            continue
        kind = kind.removeprefix("gated ")
        sparsity, after = config.sparsity, dict(pairwise(kind.split()))
        assert sparsity.routing == kind.startswith("M")
        assert not sparsity.routing or sparsity.m == int(kind.partition("+")[0].split()[0][1:])
        shared = int(after["shared"].removeprefix("1/")) if "shared" in after else 0
        assert not sparsity.routing or sparsity.shared_every == shared
        assert sparsity.weights == (sparsity.routing and "weights dense" not in kind)
        assert sparsity.attention_projections == ("projections" in kind)
        assert sparsity.dense_layers == ("first dense" in kind)
        assert sparsity.refresh_every == (2000 if "clustered every 2000 steps" in rest else 500)
    # Every recipe at equal wall-clock too, where speeds are known.
    recipes = {label for label, config in found.items() if config.sparse_steps}
    stretched = {label for label in recipes if label.endswith(SUFFIX)}
    assert {label.removesuffix(SUFFIX) for label in stretched} == recipes - stretched


def test_longer_runs_are_those_of_the_verdict():
    options = Options(speedups=Speedups(1.4))
    evidence, longer = (definition.get(name, options) for name in ("evidence", "longer"))
    verdict = {(run.label, run.seed): run.config for run in evidence.runs}
    assert len(longer.runs) == 15
    for run in longer.runs:
        shorter = verdict[run.label, run.seed]
        assert run.tokens == pytest.approx(83e6, rel=1e-3)
        for part in ("model", "sparsity", "data"):
            assert getattr(run.config, part) == getattr(shorter, part)
        share = lambda config: config.sparse_steps / config.steps
        assert share(run.config) == pytest.approx(share(shorter), abs=1e-3)
        rate, before = learning_rate_schedule(run.config), learning_rate_schedule(shorter)
        for part in (0.01, 0.3, 0.9):
            expected = float(before(round(part * shorter.steps)))
            assert float(rate(round(part * run.config.steps))) == pytest.approx(expected, rel=0.02)


def test_the_rate_falls_in_the_dense_end():
    """Of the variants with a short one, where they say so; before it, it is at its peak."""
    study = definition.get("evidence", Options(speedups=Speedups(1.4)))
    labels = [label for label in study.labels if label.endswith("decay at the end")]
    assert len(labels) == 7
    for label in labels:
        config = next(run.config for run in study.runs if run.label == label)
        rate, peak = learning_rate_schedule(config), config.optimizer.learning_rate
        flip = config.schedule.warmup_steps + config.sparse_steps or round(0.7 * config.steps)
        assert rate(flip - 2) == pytest.approx(peak)
        assert 0.99 * peak > rate(flip + 0.02 * config.steps)
        assert rate(config.steps - 1) == pytest.approx(0.0, abs=1e-9)


def test_a_held_rate_falls_after_the_flip():
    """As its label says: the dense end begins at the peak."""
    study = definition.get("evidence", Options(speedups=Speedups(1.4)))
    shares = {"decay over 30%": 0.3, "decay over 20%": 0.2}
    held = {run.label: run.config for run in study.runs for name in shares if name in run.label}
    assert len(held) == 13
    for label, config in held.items():
        share = next(share for name, share in shares.items() if name in label)
        rate, peak = learning_rate_schedule(config), config.optimizer.learning_rate
        begin = round((1 - share) * config.steps)
        flip = config.schedule.warmup_steps + config.sparse_steps
        assert (config.sparse_steps > 0) == ("relu2" not in label)
        assert flip <= begin - 0.03 * config.steps
        flip = flip or config.optimizer.warmup_steps
        assert rate(flip) == rate(begin - 2) == pytest.approx(peak)
        assert rate(begin + 0.02 * config.steps) < 0.99 * peak
        assert rate(config.steps - 1) == pytest.approx(0.0, abs=1e-9)


def test_parts_of_the_neurons_are_what_the_label_says():
    study = definition.get("evidence", Options(speedups=Speedups(1.4)))
    parts = {}
    for run in study.runs:
        recipe = run.label.partition(",")[0].split()
        m = recipe[0].partition("+")[0].removeprefix("M")
        if m.isdigit():
            after = dict(pairwise(recipe))
            shards = int(after["in"]) if "in" in after else None
            every = int(after["shared"].removeprefix("1/")) if "shared" in after else 0
            sparsity = run.config.sparsity
            assert (sparsity.m, sparsity.shards, sparsity.shared_every) == (int(m), shards, every)
            assert sparsity.weights == ("weights dense" not in run.label)
            assert run.config.schedule.threshold_dense == ("thresholded" in run.label)
            assert sparsity.attention_projections == ("projections" in run.label)
            parts.setdefault((shards, every), set()).add(run.label)
    # Some of them at equal wall-clock too.
    assert {sizes: len(labels) for sizes, labels in parts.items() if sizes != (None, 0)} == {
        (2, 0): 2,
        (4, 0): 12,
        (None, 4): 59,
        (None, 2): 2,
        (2, 4): 6,
        (None, 8): 5,
    }
    for kind in ((4, 0), (None, 4), (2, 4)):
        stretched = {label for label in parts[kind] if label.endswith(SUFFIX)}
        assert stretched
        assert {label.removesuffix(SUFFIX) for label in stretched} < parts[kind]


def test_what_was_tuned_is_where_comparisons_start(monkeypatch):
    monkeypatch.setitem(_base.TUNED, "relu2", {"optimizer": {"learning_rate": 7e-3}})
    monkeypatch.setitem(_base.TUNED, "swiglu", {"model": {"norm_eps": 1e-4}})
    names = [n for n in definition.names() if n not in ("smoke", "dense_sweep", "tuning", "rates")]
    for name in names:
        for run in definition.get(name, Options(speedups=SPEEDUPS)).runs:
            config = run.config
            if config.model.ffn == "swiglu":
                assert config.model.norm_eps == 1e-4
                assert config.optimizer.learning_rate != 7e-3
            elif config.model.ffn == "relu2" and not run.label.startswith("lr"):
                if run.label.endswith(" rate") or ", rate x " in run.label:
                    continue  # around the tuned rate: tests/train/test_study_tuned.py
                assert config.optimizer.learning_rate == 7e-3, (name, run.label)
    # The sweep goes around the tuned point.
    star = definition.get("dense_sweep", Options()).runs
    rates = [run.factors["learning_rate"] for run in star if run.factors["ffn"] == "relu2"]
    assert rates.count(7e-3) == len(rates) - len(dense_sweep.SWEEPS["learning_rate"])


def test_forms_are_compared_at_equal_parameters():
    for name in ("evidence", "gated", "tuning", "dense_sweep", "equal_time"):
        runs = definition.get(name, Options(speedups=Speedups(None, EVERY_SPEED))).runs
        hidden = {run.config.model.ffn: run.config.model.ffn_hidden for run in runs}
        assert hidden == {"relu2": 2048, "swiglu": 1408, "relu2_gated": 1408}, name
    # A base that says how many neurons it has keeps them.
    base = _base.changed(configs.get("small"), model={"hidden": 1536})
    assert _base.tuned(base, "relu2_gated", Options()).model.hidden == 1536


def test_kernels_can_be_named():
    for name in definition.names():
        study = definition.get(name, Options(backend="triton", speedups=SPEEDUPS))
        assert {run.config.sparsity.backend for run in study.runs} == {"triton"}


def test_seed_by_seed():
    study = definition.get("sparse_share", Options(seeds=(3, 5)))
    assert [run.seed for run in study.runs] == sorted(run.seed for run in study.runs)
    assert all(run.config.seed == run.seed for run in study.runs)


def test_batch_of_another_size():
    config = _base.base(Options())
    half = _base.with_batch(config, config.batch_size // 2)
    assert half.steps == 2 * config.steps
    assert half.optimizer.warmup_steps == 2 * config.optimizer.warmup_steps
    assert half.log.eval_every == 2 * config.log.eval_every
    validate(half)


def test_unknown_study():
    with pytest.raises(ValueError, match=r"study 'no' is unknown; known: .*smoke"):
        definition.get("no")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runs": ()}, "no runs"),
        ({"runs": (run("a b"), run("a/b"))}, "several runs named a_b-seed0"),
        ({"runs": (run(),), "baseline": "b"}, "baseline='b'.*: a"),
        ({"runs": (run(),), "axes": (Axis("m"),)}, "factor 'm'"),
        ({"runs": (Run("a", 1, Config(seed=2)),)}, "config.seed=2"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"name": "x", "question": "?", **fields})


def test_refused_before_the_first_run():
    bad = Run("bad", 0, Config(steps=0))
    with pytest.raises(ValueError, match="run bad-seed0: steps=0"):
        Study("x", "?", (run(), bad)).validate()
