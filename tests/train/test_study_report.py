"""The report from result files alone: numbers against numpy, notes, pictures."""

import dataclasses
import io
import math

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from train.config import Config, ScheduleConfig
from train.study import figures
from train.study.definition import Axis, Run, Study
from train.study.equal_time import Speedups
from train.study.record import FORMAT, Folders, write
from train.study.report import (
    make_report,
    read_header,
    remarks,
    summarise,
    write_header,
)

LOSSES = {
    "dense": [3.00, 3.04, 2.98],
    "sparse 50%": [3.01, 3.06, 2.985],
    "sparse 80%": [3.05, 3.08, 3.03],
}
SHARES = {"dense": 0.0, "sparse 50%": 0.5, "sparse 80%": 0.8}
STEPS = 40


def config(label, seed):
    schedule = ScheduleConfig(warmup_steps=0, sparse_fraction=SHARES[label])
    return dataclasses.replace(Config(), steps=STEPS, seed=seed, schedule=schedule)


def result(label, seed, loss, **changes):
    c = config(label, seed)
    factors = {} if label == "dense" else {"sparse_share": SHARES[label]}
    steps = list(range(2, STEPS + 1, 2))
    phase = ["sparse" if s <= c.sparse_steps else "dense" for s in steps]
    evaluations = {"step": [20, 40], "loss_dense": [loss + 0.3, loss]}
    final, best = {"loss_dense": loss}, {"loss_dense": {"loss": loss, "step": STEPS}}
    phases = {"dense": {"step_seconds": 0.010, "tokens_per_second": 1.0}}
    if label != "dense":
        evaluations["loss_sparse"] = [loss + 0.4, loss + 0.1]
        final["loss_sparse"] = loss + 0.1
        phases["sparse"] = {"step_seconds": 0.008, "tokens_per_second": 1.0}
    record = {
        "format": FORMAT,
        "study": "x",
        "label": label,
        "seed": seed,
        "factors": factors,
        "status": "finished",
        "error": None,
        "config": dataclasses.asdict(c),
        "wall_seconds": 10.0,
        "versions": {"jax": "1"},
        "device": {"count": 1, "kind": "cpu", "platform": "cpu"},
        "tokens": c.steps * c.tokens_per_step,
        "data": {
            "fingerprint": "f" * 64,
            "evaluated_windows": 9,
            "evaluated_tokens": 900,
            "epochs": 0.5,
        },
        "model": {"body_parameters": 1234},
        "curve": {
            "step": steps,
            "loss": [loss + 2 / s for s in steps],
            "phase": phase,
        },
        "evaluations": evaluations,
        "final": final,
        "final_batches": [loss - 0.1, loss + 0.1 + 0.01 * (label != "dense")],
        "best": best,
        "phases": phases,
    }
    return record | changes


def failure(label, seed, status):
    empty = {"curve": {"step": [], "loss": [], "phase": []}, "final": {}, "best": {}, "phases": {}}
    return result(label, seed, 1.0, status=status, error="loss is nan at step 3", **empty)


def results():
    return [
        result(label, seed, loss)
        for label, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]


def study():
    runs = [
        Run(
            label,
            seed,
            config(label, seed),
            {} if label == "dense" else {"sparse_share": SHARES[label]},
        )
        for label in LOSSES
        for seed in range(3)
    ]
    return Study("x", "Does it work?", tuple(runs), "dense", (Axis("sparse_share"),))


@pytest.fixture(name="output")
def _output(tmp_path):
    write_header(tmp_path, study(), Speedups(1.25))
    folders = Folders(tmp_path, tmp_path / "scratch")
    for run, record in zip(study().runs, results(), strict=True):
        write(folders.result(run), record)
    return tmp_path


def test_rows_against_numpy(output):
    rows = {row.label: row for row in summarise(read_header(output), results())}
    assert list(rows) == list(LOSSES)
    base = np.array(LOSSES["dense"])
    for label, losses in LOSSES.items():
        row, loss = rows[label], np.array(losses)
        assert row.dense.mean == pytest.approx(loss.mean())
        assert row.dense.sd == pytest.approx(loss.std(ddof=1))
        if label != "dense":
            assert row.paired.mean == pytest.approx((loss - base).mean())
            assert row.paired.se == pytest.approx((loss - base).std(ddof=1) / 3**0.5)
            assert row.held_out_se == pytest.approx(0.005)
            assert row.sparse.mean == pytest.approx(loss.mean() + 0.1)
            assert row.step_speedup == pytest.approx(1.25)
            share = SHARES[label]
            assert row.run_speedup == pytest.approx(1 / (1 - share + share / 1.25))
    assert rows["dense"].paired is None
    assert math.isnan(rows["dense"].held_out_se)
    assert rows["dense"].run_speedup == 1.0
    per_step = results()[0]["tokens"] / STEPS
    assert rows["sparse 80%"].tokens_per_second["sparse"] == pytest.approx(per_step / 0.008)


def test_report_is_drawn_from_the_files_alone(output):
    out = io.StringIO()
    make_report(output, Console(file=out, width=140))
    assert "Does it work?" in out.getvalue()
    assert "3.0067 ± 0.0306" in out.getvalue()
    text = (output / "report.md").read_text()
    assert "| dense | 3 | 3.0067 ± 0.0306 |" in text
    # Mean 0.01167, standard error 0.00441, t with two degrees of freedom 4.303.
    assert "+0.0117 ± 0.0044 | -0.0073 to +0.0306 | 0.0050 | +0.39%" in text
    assert "paired by seed" in text
    assert "9 windows (900 tokens)" in text
    assert "## Notes" not in text
    for name in ("curves", "final_loss", "sweep_sparse_share", "pareto"):
        picture = matplotlib.image.imread(output / f"{name}.png")
        assert picture.std() > 0.01, name
        assert f"]({name}.png)" in text


def test_new_speedups_replace_the_stored_ones_and_none_leaves_them(output):
    rows = make_report(output, Console(quiet=True), Speedups(2.0))
    assert rows[1].run_speedup == pytest.approx(1 / 0.75)
    write_header(output, study(), Speedups())
    assert read_header(output).speedups == Speedups(1.25)
    write_header(output, study(), Speedups(1.5))
    assert read_header(output).speedups == Speedups(1.5)


def test_another_baseline(output):
    rows = {r.label: r for r in make_report(output, Console(quiet=True), baseline="sparse 50%")}
    assert rows["sparse 50%"].paired is None
    assert "Differences are to **sparse 50%**" in (output / "report.md").read_text()
    reverse = {r.label: r for r in make_report(output, Console(quiet=True))}["sparse 50%"]
    assert rows["dense"].paired.mean == pytest.approx(-reverse.paired.mean)
    assert rows["dense"].run_speedup == pytest.approx(1 / reverse.run_speedup)
    with pytest.raises(ValueError, match="'sparse 51%' is no label"):
        make_report(output, Console(quiet=True), baseline="sparse 51%")
    for path in (output / "results").glob("sparse*50*"):
        path.unlink()
    rows = make_report(output, Console(quiet=True), baseline="sparse 50%")
    assert all(row.paired is None for row in rows)


def test_pictures_show_what_is_highlighted(output):
    # Sparse steps so slow that no sparse label is at the front, which has names in any case.
    def pictures(**options):
        make_report(output, Console(quiet=True), Speedups(0.8), **options)
        return [matplotlib.image.imread(output / f"{name}.png") for name in ("curves", "pareto")]

    chosen, marked = pictures(), pictures(highlight=("sparse 8*",))
    assert all((a.shape != b.shape) or (a != b).any() for a, b in zip(chosen, marked, strict=True))
    everything = pictures(highlight=("sparse*",))
    np.testing.assert_array_equal(everything[0], chosen[0])
    with pytest.raises(ValueError, match="--highlight 'dnese' matches no label: dense, sparse"):
        pictures(highlight=("dnese",))


def test_runs_that_went_wrong_are_counted_and_named(output):
    records = results()
    records[3] = failure("sparse 50%", 0, "non_finite")
    records[4] = failure("sparse 50%", 1, "failed")
    header = read_header(output)
    row = summarise(header, records)[1]
    assert (len(row.losses), row.non_finite, row.failed) == (1, 1, 1)
    assert row.paired.mean == pytest.approx(2.985 - 2.98)
    assert math.isnan(row.dense.sd)
    notes = remarks(header, records)
    assert "sparse 50%, seed 0: non-finite: loss is nan at step 3" in notes
    assert "sparse 50%, seed 1: failed: loss is nan at step 3" in notes


def test_a_label_without_a_finished_run_keeps_its_row(output):
    records = [r for r in results() if r["label"] == "dense"]
    records.append(failure("sparse 80%", 0, "non_finite"))
    for name, record in enumerate(records):
        write(output / "results" / f"{name}.json", record)
    for path in (output / "results").glob("sparse*"):
        path.unlink()
    rows = make_report(output, Console(quiet=True))
    assert (rows[-1].label, rows[-1].dense, rows[-1].paired) == ("sparse 80%", None, None)


def test_remarks_on_unfair_comparisons(output):
    header = read_header(output)
    assert remarks(header, results()) == []
    records = results()
    records[4]["data"] = {**records[4]["data"], "fingerprint": "e" * 64, "epochs": 2.5}
    records[5]["device"] = {"count": 1, "kind": "H100", "platform": "gpu"}
    records[6]["data"] = {**records[6]["data"], "evaluated_windows": 5}
    records[7]["jobs"] = 3
    text = "\n".join(remarks(header, records))
    assert "different numbers of runs side by side: 1, 3" in text
    assert "up to 3 runs shared the device" in text
    assert "different training data: eeeeeeeeeeee, ffffffffffff" in text
    assert "different devices: 1 x H100, 1 x cpu" in text
    assert "held-out windows: 5, 9" in text
    assert "repeat up to 2.5 times in: sparse 50%" in text
    assert "different commits" not in text
    without = [r for r in results() if r["label"] != "dense"]
    assert any("no results: nothing is compared" in note for note in remarks(header, without))
    without = [r for r in results() if (r["label"], r["seed"]) != ("dense", 2)]
    assert any("are not compared: sparse 50%, sparse 80%" in n for n in remarks(header, without))


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        make_report(tmp_path, Console(quiet=True))
    write_header(tmp_path, study(), Speedups())
    with pytest.raises(ValueError, match="holds no results yet"):
        make_report(tmp_path, Console(quiet=True))


def test_a_bad_loss_does_not_press_the_others_flat():
    low, high = figures.limits([3.0, 3.01, 3.02, 9.0])
    assert low < 3.0
    assert 3.02 < high < 3.2
    assert figures.limits([3.0, 3.01, float("nan")]) == figures.limits([3.0, 3.01])
    low, high = figures.limits([3.0, 3.05, 3.1])
    assert high > 3.1


def test_a_difference_beyond_the_picture_is_named_like_a_loss(output, monkeypatch):
    named = []
    monkeypatch.setattr(figures, "_beyond", lambda axes, y, value, colour: named.append((y, value)))
    records = [result(label, 0, loss) for label, [loss, *_] in LOSSES.items()]
    records[-1] = result("sparse 80%", 0, 9.0)
    figures.final_losses(output / "x.png", summarise(read_header(output), records), "dense")
    assert named == [(2, "9.000"), (2, "+6.000")]


def test_held_out_losses_are_of_the_phase_s_view():
    found = {
        "step": [10, 20, 60, 80, 100],
        "loss_dense": [5.0, 9.0, 8.0, 3.0, 2.0],
        "loss_sparse": [5.5, 4.0, 3.5, 3.2, 3.0],
    }
    schedule = {"warmup_steps": 10, "sparse_fraction": 0.5}
    record = {"config": {"steps": 100, "schedule": schedule}, "evaluations": found}
    assert figures._held_out(record) == (found["step"], [5.0, 4.0, 3.5, 3.0, 2.0])
    dense = {"step": [50, 100], "loss_dense": [3.0, 2.0]}
    schedule = {"warmup_steps": 0, "sparse_fraction": 0.0}
    record = {"config": {"steps": 100, "schedule": schedule}, "evaluations": dense}
    assert figures._held_out(record) == ([50, 100], [3.0, 2.0])


def test_sweep_lines_of_a_star(tmp_path, output):
    rows = summarise(read_header(output), results())
    by = lambda i, **factors: dataclasses.replace(rows[i], factors=factors)
    star = [by(0, a=1.0, b=1.0), by(1, a=2.0, b=1.0), by(2, a=1.0, b=2.0)]
    assert figures.sweep(tmp_path / "a.png", star, Axis("a", log=True), None)
    # No two rows differ in this factor alone.
    assert not figures.sweep(tmp_path / "c.png", star[1:], Axis("a"), None)
    assert not (tmp_path / "c.png").exists()
    words = [by(0, form="x"), by(1, form="y")]
    assert figures.sweep(tmp_path / "w.png", words, Axis("form"), None)
