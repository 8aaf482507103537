"""What a sweep's results say comparisons should start from."""

import dataclasses
import json
import math

import pytest

from configs.studies import _base
from train.study import definition
from train.study.definition import Options, Tuned
from train.study.equal_time import Speedups
from train.study.record import FORMAT
from train.study.tuned import best_rate, choose, main, mean_by_rate, read_tuned


def result(ffn, rate, batch, loss, seed=0):
    status = "finished" if math.isfinite(loss) else "non_finite"
    return {
        "label": f"{ffn} {rate} {batch}",
        "seed": seed,
        "factors": {"ffn": ffn, "learning_rate": rate, "batch_size": batch},
        "status": status,
        "final": {"loss_dense": loss} if status == "finished" else {},
    }


def test_the_rate_is_the_vertex_of_a_parabola():
    # loss = (log rate - log 0.005)^2 + 3, whatever the points.
    rates = [1.5e-3, 3e-3, 6e-3, 1.2e-2]
    losses = [math.log(rate / 5e-3) ** 2 + 3 for rate in rates]
    assert best_rate(rates, losses) == 5e-3
    # At an end, and beside a rate that diverged, nothing is known beyond the best one.
    assert best_rate(rates[2:], losses[2:]) == 6e-3
    assert best_rate(rates, [3.1, 3.0, 2.9, math.inf]) == 6e-3
    assert best_rate(rates, [3.0, 3.0, 3.0, 3.0]) == 1.5e-3


def test_one_batch_for_all_forms():
    records = [
        *(result("relu2", r, 32, x) for r, x in ((1e-3, 3.1), (2e-3, 3.0), (4e-3, 3.1))),
        *(result("swiglu", r, 32, x) for r, x in ((1e-3, 3.0), (2e-3, 2.9), (4e-3, 3.0))),
        *(result("relu2", r, 16, x) for r, x in ((1e-3, 2.9), (2e-3, 2.95), (4e-3, math.inf))),
        *(result("swiglu", r, 16, x) for r, x in ((1e-3, 2.9), (2e-3, 2.8), (4e-3, 2.9))),
        # Not all forms were swept at this one, low as it is; and this is no point of the sweep.
        result("relu2", 2e-3, 8, 1.0),
        {**result("relu2", 2e-3, 16, 0.1), "factors": {}},
    ]
    tuned, remarks = choose(records)
    assert tuned == Tuned(16, {"relu2": 1e-3, "swiglu": 2e-3})
    assert remarks == ["relu2: the best rate, 0.001, is at an end of the sweep"]
    with pytest.raises(ValueError, match="no batch"):
        choose([result("relu2", 1e-3, 16, math.inf)])
    # A second seed is averaged in.
    second = [result("swiglu", r, 16, x, seed=1) for r, x in ((1e-3, 2.9), (2e-3, 3.3), (4e-3, 3))]
    again, _ = choose([*records, *second])
    assert again == Tuned(16, {"relu2": 1e-3, "swiglu": 1e-3})


def test_a_rate_is_not_the_best_for_the_luck_of_its_seed():
    # 3e-3 is worse by 0.1 for every seed; seed 0 is lucky by 1.
    points = {2e-3: {0: 2.0, 1: 3.0, 2: 3.1}, 3e-3: {0: 2.1}, 4e-3: {1: 3.2, 2: 3.3}}
    means = mean_by_rate(points)
    average = (2.0 + 3.0 + 3.1) / 3
    assert list(means) == [2e-3, 3e-3, 4e-3]
    assert list(means.values()) == pytest.approx([average, average + 0.1, average + 0.2])
    runs = [result("relu2", r, 8, x, s) for r, seeds in points.items() for s, x in seeds.items()]
    tuned, remarks = choose(runs)
    assert tuned.learning_rate == {"relu2": 2e-3}
    assert "relu2: rates have 1 to 3 seeds" in remarks
    # To the last digit, where runs are to be taken over: a factor was rounded.
    runs = [{**run, "config": {"optimizer": {"learning_rate": 1.1}}} for run in runs]
    assert choose(runs, swept=True)[0].learning_rate == {"relu2": 1.1}
    # One seed that diverged is enough, and the others' seeds stay as they are.
    points[3e-3][1] = math.inf
    assert mean_by_rate(points) == pytest.approx(
        {2e-3: average, 3e-3: math.inf, 4e-3: average + 0.2}
    )


def test_a_smaller_initialisation_is_compared_at_its_own_point():
    def scaled(ffn, scale, loss):
        run = result(ffn, 1e-3, 16, loss)
        return {**run, "factors": {**run["factors"], "init_scale": scale}}

    sweep = [result(ffn, r, 16, x) for ffn in ("a", "b", "c") for r, x in ((1e-3, 3.0), (2e-3, 2))]
    more = [scaled("a", 0.5, 2.9), scaled("a", 0.25, 2.95), scaled("b", 0.5, 3.1)]
    tuned, _ = choose([*sweep, *more, scaled("c", 0.5, math.inf)])
    assert tuned.init_scale == {"a": 0.5}
    assert tuned.learning_rate == {"a": 2e-3, "b": 2e-3, "c": 2e-3}


def test_from_file_to_file(tmp_path, capsys):
    sweep, out = tmp_path / "sweep.json", tmp_path / "tuned.json"
    runs = [result("relu2", rate, 16, 3 + abs(rate - 3e-3)) for rate in (1e-3, 3e-3, 9e-3)]
    sweep.write_text(json.dumps({"format": FORMAT, "study": {}, "runs": runs}))
    assert main([str(sweep), str(out)]) == 0
    tuned = read_tuned(out)
    assert tuned.batch_size == 16
    assert 1e-3 < tuned.learning_rate["relu2"] < 9e-3
    assert tuned.init_scale == {}
    # Runs that were made with an earlier choice's initialisation.
    earlier = tmp_path / "earlier.json"
    settings = {
        "optimizer": {"b2": 0.99, "clip_norm": 1, "decay": "wsd"},
        "model": {"embedding_scale": 1.0, "output_scale": None},
    }
    forms = {"relu2": {"optimizer": {"head_rate": 0.25}}}
    kept = {"init_scale": {"relu2": 0.5}, "settings": settings, "form_settings": forms}
    # A form that this sweep leaves out is left out.
    both = kept | {"form_settings": forms | {"swiglu": {"model": {"norm_eps": 1e-4}}}}
    rates = {"learning_rate": {"relu2": 1e-3, "swiglu": 1e-3}}
    earlier.write_text(json.dumps({"batch_size": 8} | rates | both))
    assert main([str(sweep), str(out), "--scales", str(earlier)]) == 0
    printed = capsys.readouterr().out
    assert "\noptimizer: b2 0.99, clip_norm 1, decay wsd\n" in printed
    assert "\nrelu2 optimizer: head_rate 0.25\n" in printed
    assert read_tuned(out) == dataclasses.replace(tuned, **kept)
    assert main([str(tmp_path / "none.json"), str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for bad in ("[]", "{", '{"batch_size": 1.5, "learning_rate": {}}', '{"batch_size": 1}'):
        out.write_text(bad)
        with pytest.raises(ValueError, match="is no file of"):
            read_tuned(out)
    for settings, name in (
        ({"optimizer": {"b3": 1}}, "b3"),
        ({"optimiser": {}}, "optimiser"),
        ({"steps": {}}, "steps"),
        ({"optimizer": {"b2": "high"}}, "b2"),
        ({"optimizer": {"decay": "none"}}, "decay"),
        ({"model": {"width": 1.5}}, "width"),
        ({"model": {"qk_norm": 1}}, "qk_norm"),
    ):
        for kept in ({"settings": settings}, {"form_settings": {"relu2": settings}}):
            out.write_text(json.dumps({"batch_size": 8, "learning_rate": {}} | kept))
            with pytest.raises(ValueError, match=f"has settings that do not fit: .*'{name}'"):
                read_tuned(out)
    out.write_text(json.dumps({"batch_size": 8, "learning_rate": {}, "form_settings": forms}))
    with pytest.raises(ValueError, match="has settings of 'relu2' but no learning rate for it"):
        read_tuned(out)


def test_rates_go_around_what_was_tuned():
    rates = {"relu2": 4e-3, "swiglu": 2e-3, "relu2_gated": 1e-3}
    tuned = Tuned(16, rates, {"swiglu": 0.5})
    study = definition.get("rates", Options(tuned=tuned))
    found: dict[str, set[float]] = {}
    for run in study.runs:
        config = run.config
        assert config.batch_size == 16
        assert run.seed in (0, 1, 2)
        assert config.model.init_scale == (0.5 if config.model.ffn == "swiglu" else 1.0)
        assert config.optimizer.learning_rate == pytest.approx(
            run.factors["learning_rate"], rel=5e-3
        )
        found.setdefault(run.label.rpartition(" ")[0], set()).add(run.factors["learning_rate"])
    assert found == {
        "relu2": {4e-3, 6e-3, 8e-3, 2.67e-3, 1.2e-2},
        "M16 50%": {4e-3, 6e-3, 8e-3, 2.67e-3, 1.2e-2},
        "swiglu": {2e-3, 3e-3, 4e-3, 1.33e-3, 6e-3},
        "relu2_gated": {1e-3, 1.5e-3, 2e-3, 6.67e-4, 3e-3},
    }
    # Losses of dense runs choose the rate, the recipe's own do not.
    records = []
    for run in study.runs:
        rate = run.factors["learning_rate"]
        best = 9e-3 if run.label.startswith("M16") else rates[run.config.model.ffn]
        loss = 2 + math.log(rate / best) ** 2
        final = {"status": "finished", "final": {"loss_dense": loss}}
        records.append({"label": run.label, "seed": run.seed, "factors": dict(run.factors)} | final)
    assert choose(records)[0].learning_rate == rates


def test_studies_start_from_what_was_tuned():
    rates = {"relu2": 5e-3, "swiglu": 2e-3, "relu2_gated": 3e-3}
    tuned = Tuned(16, rates, {"swiglu": 0.5})
    options = Options(tuned=tuned, speedups=Speedups(1.4))
    for run in definition.get("evidence", options).runs:
        assert run.config.batch_size == 16
        model = run.config.model
        factors = {"lower rate": 2 / 3, "higher rate": 3 / 2}
        factors |= {"rate x 1/2": 1 / 2, "rate x 2/3": 2 / 3, "rate x 3/2": 3 / 2}
        factors |= {"rate x 1/3": 1 / 3, "rate x 2": 2, "rate x 4": 4}
        named = [factors[part] for part in run.label.split(", ") if part in factors]
        assert run.config.optimizer.learning_rate == math.prod(named) * rates[model.ffn]
        scale = 2 if ", init x 2" in run.label else 0.5 if ", init x 1/2" in run.label else 1
        assert model.init_scale == scale * (0.5 if model.ffn == "swiglu" else 1.0)
        assert run.config.optimizer.final_fraction == 0
    # Whatever else was found good is every form's, and can be varied again.
    found = {"model": {"output_scale": 0.0}, "optimizer": {"b2": 0.99}}
    more = Options(tuned=dataclasses.replace(tuned, settings=found))
    for run in definition.get("dense_recipe", more).runs:
        change = run.label.partition(", ")[2]
        assert run.config.model.output_scale == 0
        assert run.config.optimizer.b2 == (0.999 if change == "b2 0.999" else 0.99)
        factor = {"2/3": 2 / 3, "3/2": 3 / 2}.get(change.rpartition("rate x ")[2], 1)
        assert run.config.optimizer.learning_rate == factor * rates[run.config.model.ffn]
    # And what suits one form is that form's alone.
    own = {"swiglu": {"optimizer": {"b2": 0.9, "ffn_rate": 0.5}}}
    more = Options(tuned=dataclasses.replace(more.tuned, form_settings=own))
    for run in definition.get("tuning", more).runs:
        optimizer = run.config.optimizer
        swiglu = run.config.model.ffn == "swiglu"
        assert (optimizer.b2, optimizer.ffn_rate) == ((0.9, 0.5) if swiglu else (0.99, 1.0))
    plain = definition.get("evidence", Options(speedups=Speedups(1.4)))
    dense, same = plain.runs[0], definition.get("evidence", options).runs[0]
    assert dense.tokens == pytest.approx(same.tokens, rel=1e-3)
    # A sweep that ended early may lack the last form; the verdict does not wait for it.
    short = Options(tuned=Tuned(16, {"relu2": 5e-3, "swiglu": 2e-3}), speedups=Speedups(1.4))
    assert "relu2_gated" not in definition.get("evidence", short).labels
    with pytest.raises(ValueError, match="no learning rate for swiglu, only for relu2"):
        _base.tuned(dense.config, "swiglu", Options(tuned=Tuned(16, {"relu2": 1e-3})))
