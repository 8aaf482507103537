"""The logger's clock, its files across resumes, and what a person reads."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from train import hardware, metrics
from train.metrics import RunLogger, read
from train.plots import loss_plot, smoothed


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def logger(folder, clock=None, **changes) -> RunLogger:
    arguments: dict[str, Any] = {
        "total_steps": 100,
        "start_step": 0,
        "tokens_per_step": 1000,
        "flops_per_step": 4e12,
        "peak_flops": 1e13,
        "console": Console(file=io.StringIO(), width=100),
        "clock": clock or Clock(),
    }
    return RunLogger(folder, **arguments | changes)


def lines(log: RunLogger) -> list[str]:
    screen = log._console.file
    assert isinstance(screen, io.StringIO)
    return screen.getvalue().splitlines()


def test_rates_leave_out_compilation_and_pauses(tmp_path):
    clock = Clock()
    log = logger(tmp_path, clock)
    clock.now += 60  # compilation, then ten steps
    first = log.log(10, "dense", {"loss": 3.0})
    assert first["tokens_per_second"] is first["mfu"] is first["eta_seconds"] is None
    clock.now += 4
    with log.pause():
        clock.now += 7
        with log.pause():
            clock.now += 1
    clock.now += 1
    second = log.log(20, "dense", {"loss": 2.5})
    assert second["step_seconds"] == pytest.approx(0.5)
    assert second["tokens_per_second"] == pytest.approx(2000)
    assert second["mfu"] == pytest.approx(0.8)  # 4e12 FLOPs in 0.5 s of a 1e13 FLOP/s chip
    # The end comes at the pace of the clock on the wall, pauses included.
    assert second["eta_seconds"] == pytest.approx(13 / 10 * 80)
    clock.now += 9  # the other phase's step is compiled
    assert log.log(30, "sparse", {"loss": 2.6})["step_seconds"] is None
    clock.now += 2
    assert log.log(40, "sparse", {"loss": 2.4})["step_seconds"] == pytest.approx(0.2)
    summary = log.summary()
    assert summary["phases"]["dense"]["measured_steps"] == 10
    assert summary["phases"]["sparse"]["tokens_per_second"] == pytest.approx(5000)
    assert summary["paused"] == pytest.approx(8)
    assert summary["tokens"] == 40_000


def test_an_error_in_a_pause_still_ends_it(tmp_path):
    def fail():
        clock.now += 5
        raise RuntimeError

    clock = Clock()
    log = logger(tmp_path, clock)
    log.log(10, "dense", {})
    with pytest.raises(RuntimeError), log.pause():
        fail()
    clock.now += 1
    assert log.log(20, "dense", {})["step_seconds"] == pytest.approx(0.1)


def test_records_are_strict_json(tmp_path):
    log = logger(tmp_path)
    values: dict[str, Any] = {"loss": math.nan, "grad_norm": math.inf, "extra": [1.0, math.nan]}
    log.log(10, "dense", values)
    views: dict[str, Any] = {"loss_dense": np.float32(2.5), "loss_sparse": -math.inf}
    log.eval(10, views)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    train, evaluation = (
        json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()
    )
    assert train["loss"] is train["grad_norm"] is None
    assert train["extra"] == [1.0, None]
    assert evaluation["loss_dense"] == 2.5
    assert evaluation["loss_sparse"] is None
    assert "nan" in lines(log)[0]


@pytest.mark.parametrize("offset", [0, 1], ids=["steps done", "index of the step"])
def test_a_resumed_run_has_each_step_once(tmp_path, offset):
    """Whether the loop counts steps done or the step's index, and whatever was logged last."""

    def steps(log, start, stop):
        for done in range(start + 10, stop + 1, 10):
            log.log(done - offset, "dense", {"loss": 1.0 * done})
            if done % 20 == 0:
                log.eval(done - offset, {"loss_dense": 1.0 * done})

    first = logger(tmp_path)
    steps(first, 0, 60)
    first.summary()
    with first.path.open("a") as file:
        file.write('{"kind": "train", "step": 7')  # killed while writing
    resumed = logger(tmp_path, start_step=40)
    assert max(record["step"] for record in read(resumed.path)) <= 40
    steps(resumed, 40, 100)
    records = read(resumed.path)
    for kind, every in (("train", 10), ("eval", 20)):
        found = [record["step"] for record in records if record["kind"] == kind]
        assert found == [done - offset for done in range(every, 101, every)]


def test_a_record_of_the_resumed_step_is_replaced(tmp_path):
    first = logger(tmp_path)
    first.eval(40, {"loss_dense": 1.0})
    first.log(40, "dense", {"loss": 1.0})
    resumed = logger(tmp_path, start_step=40)
    resumed.eval(40, {"loss_dense": 2.0})
    records = read(resumed.path)
    assert [(r["kind"], r["step"]) for r in records] == [("train", 40), ("eval", 40)]
    assert records[1]["loss_dense"] == 2.0


def test_what_a_clustering_moved(tmp_path):
    log = logger(tmp_path)
    record = log.clusters(40, {"neuron_churn": [0.5, 0.25], "token_churn": [0.0, 1.0]})
    assert record["kind"] == "clusters"
    assert (record["neuron_churn_mean"], record["token_churn_mean"]) == (0.375, 0.5)
    assert read(log.path) == [record]
    assert "neuron churn 37.5%  token churn 50.0%" in lines(log)[0]


def test_a_new_run_starts_an_empty_file(tmp_path):
    logger(tmp_path).log(0, "dense", {"loss": 1.0})
    assert read(logger(tmp_path).path) == []


def test_expert_load():
    # Tokens of four experts in two layers; then ratios as they are; then nothing routed.
    assert metrics.load_ratios([[10, 10, 10, 10], [25, 5, 5, 5]]) == [1.0, 2.5]
    assert metrics.load_ratios([1.5, 1.25]) == [1.5, 1.25]
    assert math.isnan(metrics.load_ratios([[0, 0]])[0])


def test_lines_are_aligned_and_complete(tmp_path):
    clock = Clock()
    log = logger(tmp_path, clock, total_steps=1000, peak_flops=1e14)
    for step, phase in ((10, "dense"), (20, "dense"), (990, "sparse"), (1000, "sparse")):
        clock.now += 1
        values: dict[str, Any] = {"loss": 3.14159, "learning_rate": 2.5e-3, "grad_norm": 0.5}
        if phase == "sparse":
            values["expert_load"] = [[30, 10], [22, 18]]
        log.log(step, phase, values)
    first, second, third, fourth = lines(log)
    for name in ("loss", "lr", "grad", "tok/s", "mfu", "eta"):
        assert len({line.index(f" {name} ") for line in lines(log)}) == 1
    assert second.startswith("step   20/1000  dense ")
    for text in ("loss  3.1416", "lr 2.50e-03", "grad  0.500", "tok/s  10.0k", "mfu 40.0%"):
        assert text in second
    assert "tok/s      -" in first
    assert "tok/s      -" in third
    assert fourth.endswith("load 1.50/1.30")
    assert "load" not in second
    unknown = logger(tmp_path, peak_flops=None)
    assert unknown.log(10, "dense", {})["mfu"] is None
    assert "mfu" not in lines(unknown)[0]


def test_a_quiet_host_measures_but_writes_nothing(tmp_path):
    clock = Clock()
    log = logger(tmp_path / "run", clock, active=False)
    log.log(10, "dense", {"loss": 1.0})
    clock.now += 1
    assert log.log(20, "dense", {"loss": 1.0})["step_seconds"] == pytest.approx(0.1)
    log.eval(20, {"loss_dense": 1.0})
    log.summary()
    assert lines(log) == []
    assert not log.path.exists()


def test_summary_is_a_table(tmp_path):
    clock = Clock()
    log = logger(tmp_path, clock)
    log.log(50, "dense", {"loss": 2.0})
    clock.now += 25
    log.log(100, "dense", {"loss": 1.5})
    log.eval(100, {"loss_dense": 1.625, "loss_sparse": 1.75})
    log.summary({"folder": "runs/tiny"})
    text = "\n".join(lines(log))
    for part in ("100 of 100", "1.5000", "1.6250", "1.7500", "2,000 tokens/s", "runs/tiny"):
        assert part in text
    assert read(log.path)[-1]["values"] == {"folder": "runs/tiny"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"start_step": 101}, "start_step=101"),
        ({"start_step": -1}, "start_step=-1"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"peak_flops": 0.0}, r"peak_flops=0\.0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        logger(tmp_path, **changes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7_620, "2h07m"), (273_600, "3d04h")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB", 312),
        ("NVIDIA A100-PCIE-40GB", "A100 40 GB", 312),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5),
        ("NVIDIA H200", "H200", 989.4),
        ("NVIDIA GH200 480GB", "GH200", 989.4),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA L40S", "L40S", 362.05),
        ("NVIDIA L4", "L4", 121),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", "GeForce RTX 3090 Ti", 80),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 364.2),
    ],
)
def test_chips(kind, name, teraflops):
    found = hardware.chip(kind)
    assert found is not None
    assert found.name == name
    assert found.bf16_flops == pytest.approx(teraflops * 1e12)
    assert 1e11 < found.bandwidth < 1e13
    assert found.source


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v4",
        "NVIDIA A10G",
        "NVIDIA RTX A4000",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ],
)
def test_chips_that_are_not_known(kind):
    assert hardware.chip(kind) is None


def test_loss_plot(tmp_path):
    from matplotlib.image import imread

    log = logger(tmp_path)
    for step in range(1, 101):
        loss = math.nan if step == 50 else 5 / step**0.5
        log.log(step, "sparse" if 20 <= step < 60 else "dense", {"loss": loss})
        if step % 20 == 0:
            log.eval(
                step, {"loss_dense": loss + 0.1} | ({"loss_sparse": loss} if step > 20 else {})
            )
    loss_plot(log.path, tmp_path / "loss.png")
    picture = imread(tmp_path / "loss.png")[..., :3]
    # Each line and the shading of the sparse phase are there, by colour.
    for colour in ("#33475b", "#0072b2", "#d55e00", "#fdeedd"):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(picture - rgb).max(axis=-1) < 0.01).sum() > 100


def test_loss_plot_of_one_record(tmp_path):
    log = logger(tmp_path, total_steps=1)
    log.log(1, "dense", {"loss": 2.0})
    loss_plot(log.path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_loss_plot_without_losses(tmp_path):
    log = logger(tmp_path)
    log.log(10, "dense", {"loss": math.nan})
    with pytest.raises(ValueError, match="holds no training loss"):
        loss_plot(log.path, tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError):
        loss_plot(tmp_path / "missing.jsonl", tmp_path / "loss.png")


def test_smoothed():
    line = np.arange(50.0)
    assert smoothed(line, 3)[15:35] == pytest.approx(line[15:35])  # no lag
    gap = line.copy()
    gap[20] = math.nan
    result = smoothed(gap, 2)
    assert math.isnan(result[20])
    assert np.isfinite(np.delete(result, 20)).all()
    assert smoothed(line, 0.0) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise, 5).std() < 0.4 * noise.std()
