"""The train step benchmark on several devices: batches, communication, other numbers of devices."""

import json
import shlex
from types import SimpleNamespace

import jax
import pytest

from benchmarks import (
    scaling_plot,
    train_step_breakdown,
    train_step_overlap,
    train_step_scaling,
)
from benchmarks.train_step_overlap import Event, overlap, union
from benchmarks.train_step_programs import Spec, mesh_of, split
from tests.train.simulated import run_script
from train.config import MeshConfig

SMOKE = """
    import sys
    from benchmarks import gathers, train_step
    train_step.main(sys.argv[2:])
    gathers.main(["--config", "tiny", "--smoke", "--out", sys.argv[1]])
"""
SMALL = shlex.split(
    "--sequence-length 64 --model.width 32 --model.num-layers 1 --model.num-heads 2 "
    "--model.loss-chunk 128 --sparsity.m 8 --sparsity.v 64 --model.no-scan-layers --mesh.fsdp 2"
)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="devices are simulated on CPUs")
def test_two_devices_and_one_of_them(tmp_path):
    out = tmp_path / "step.json"
    few = shlex.split("--warmup-steps 2 --rounds 1 --round-steps 1 --settle-steps 1 --no-refresh")
    steps = ["--dense", "--batch-per-device 2", "--sparse", "--batch-per-device 2"]
    common = ["--config", "tiny", "--smoke", "--out", str(out), "--scaling", "1"]
    text = run_script(SMOKE, tmp_path / "g.json", *common, *few, *steps, *SMALL, devices=2)
    assert "2 devices against 1, sparse: weak-scaling efficiency" in text

    result = json.loads(out.read_text())
    assert (result["complete"], result["failures"], result["devices"]) == (True, [], 2)
    assert result["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    (whole,), (run,) = result["groups"], result["scaling"]
    assert (run["devices"], run["mesh"]) == (1, {"data": 1, "fsdp": 1, "tensor": 1})
    (part,) = run["groups"]
    for row, small in zip(whole["rows"], part["rows"], strict=True):
        assert (row["tokens"], small["tokens"]) == (2 * 2 * 64, 2 * 64)
        each = row["tokens_per_second"] / 2
        assert row["tokens_per_second_per_device"] == pytest.approx(each)
        share = run["efficiency"][row["phase"]]
        assert share == pytest.approx(each / small["tokens_per_second"])
        talk = row["breakdown"]["collectives"]
        assert talk["devices"] == 2
        # Weights are gathered, gradients scattered, all of it found in the profile.
        assert {"all-gather", "reduce-scatter"} <= set(talk["kinds"])
        assert 0 < talk["exposed"] <= talk["seconds"]
        assert talk["seconds"] == pytest.approx(talk["exposed"] + talk["overlapped"])

    moved = json.loads((tmp_path / "g.json").read_text())
    assert [row["moves"] for row in moved["rows"]] == ["masters", "rows", "packed", "values alone"]
    assert all(row["alone"]["ms"] > 0 and row["beside"]["ms"] > 0 for row in moved["rows"])


def test_exposed_and_overlapped():
    events = [
        Event("0", 0.0, 4.0, None),
        Event("0", 3.0, 7.0, "all-gather"),  # 1 s beside the product, 3 s alone
        Event("0", 6.0, 8.0, "reduce-scatter"),  # one of its seconds is the gather's as well
        Event("0", 9.0, 10.0, None),
        Event("1", 0.0, 10.0, None),
        Event("1", 2.0, 4.0, "all-gather"),
    ]
    found = overlap(events, steps=2)
    assert found["devices"] == 2
    assert found["seconds"] == pytest.approx((5 + 2) / 2 / 2)
    assert found["exposed"] == pytest.approx(4 / 2 / 2)
    assert found["most_exposed"] == pytest.approx(4 / 2)
    assert found["overlapped"] == pytest.approx(3 / 2 / 2)
    assert found["idle"] == pytest.approx(1 / 2 / 2)
    gather = found["kinds"]["all-gather"]
    assert gather == pytest.approx({"calls": 0.5, "seconds": 6 / 4, "exposed": 3 / 4})
    assert union([(3, 4), (0, 1), (1, 2), (5, 5)]) == [(0, 2), (3, 4)]


COMPILED = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %up.1 = f32[4]{0} custom-call(%x), metadata={op_name="jit(step)/jvp(ffn)/up"}
  %loop_add_fusion.8 = f32[4]{0} add(%up.1, %x), metadata={op_name="jit(step)/jvp(norm)/add"}
  %loop_add_fusion.9 = f32[4]{0} add(%up.1, %x), metadata={op_name="jit(step)/jvp(ffn)/add"}
  %all-gather.2 = f32[4]{0} all-gather(%x), metadata={op_name="jit(step)/jvp(ffn)/all_gather"}
  ROOT %sum = f32[4]{0} add(%up.1, %x)
}
"""


def _profile(*events):
    """A profile of one GPU: (stream, kernel, instruction, start and end in seconds)."""
    lines = {}
    for stream, kernel, instruction, start, end in events:
        event = SimpleNamespace(
            name=kernel,
            stats=[("hlo_op", instruction)],
            start_ns=start * 1e9,
            duration_ns=(end - start) * 1e9,
        )
        lines.setdefault(stream, []).append(event)
    lines = [SimpleNamespace(name=name, events=found) for name, found in lines.items()]
    return SimpleNamespace(planes=[SimpleNamespace(name="/device:GPU:0", lines=lines)])


def test_collectives_are_in_no_part_and_layers_alike_in_one_row():
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    profile = _profile(
        ("Stream #1", "up24_kernel", "up.1", 0.0, 4.0),
        ("Stream #2", gather, "all-gather.2", 1.0, 3.0),
        # Of no known instruction, and beside a norm for half of its time.
        ("Stream #2", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "gone.1", 4.5, 5.5),
        ("Stream #1", "loop_add_fusion_7", "sum", 4.0, 5.0),
        ("Stream #1", "loop_add_fusion_8", "loop_add_fusion.8", 6.0, 8.0),
        ("Stream #1", "loop_add_fusion_9", "loop_add_fusion.9", 8.0, 8.5),
    )
    found = train_step_breakdown.summarise(profile, COMPILED, steps=2)
    parts = {part: seconds for part, seconds in found["parts"].items() if seconds}
    assert parts == pytest.approx({"ffn": 4.5 / 2, "norm": 2 / 2, "rest": 1 / 2})
    assert found["beside"] == pytest.approx({"ffn": 2 / 2, "rest": 0.5 / 2})
    talk = found["collectives"]
    assert (talk["seconds"], talk["exposed"]) == pytest.approx((3 / 2, 0.5 / 2))
    rows = {(row["part"], row["kernel"]): row for row in found["by_kernel"]}
    assert len(found["kernels"]) == 6
    assert len(rows) == len(found["by_kernel"]) == 6
    assert rows["norm", "loop_add_fusion"]["seconds"] == pytest.approx(2 / 2)
    assert rows["ffn", "ncclDevKernel_AllGather_RING_LL"]["collective"] == "all-gather"
    assert [row["seconds"] for row in found["by_kernel"]] == sorted(
        (row["seconds"] for row in found["by_kernel"]), reverse=True
    )


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("loop_add_fusion_12", "loop_add_fusion"),
        ("input_reduce_fusion_3_1", "input_reduce_fusion"),
        ("loop_transpose_fusion", "loop_transpose_fusion"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", None),
        ("void at::kernel<float>(int, float)", "void at::kernel<float>"),
    ],
)
def test_families_of_kernels(kernel, name):
    assert train_step_breakdown.family(kernel) == (name or kernel)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reduce-scatter"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "collective-permute"),
        ("ncclSomethingElse", "other"),
        ("loop_add_fusion", None),
    ],
)
def test_kernels_that_talk(kernel, kind):
    assert train_step_overlap.kind_of_kernel(kernel) == kind


def _result(devices, rate, **changes):
    row = {"phase": "dense", "tokens_per_second": rate, "tokens": 100 * devices, "layers": 2,
           "sequence_length": 50, "micro_batches": 1, "m": None, **changes}  # fmt: skip
    groups = [{"name": "dense", "rows": [row]}]
    return {"devices": devices, "groups": groups, "settings": {"config": "tiny"}, "mesh": {}}


def test_efficiency_is_that_of_equal_work(tmp_path):
    file = tmp_path / "one.json"
    two = {**_result(2, 90.0), "scaling": [_result(1, 50.0)]}
    file.write_text(json.dumps(two))
    runs = [*train_step_scaling.read_baseline(file), _result(1, 40.0, layers=1)]
    result = {**_result(4, 160.0), "scaling": runs}
    train_step_scaling.derive(result)
    of_two, of_one, different = result["scaling"]
    assert (of_two["devices"], of_one["devices"]) == (2, 1)
    assert of_two["efficiency"]["dense"] == pytest.approx((160 / 4) / (90 / 2))
    assert of_one["efficiency"]["dense"] == pytest.approx(160 / 4 / 50)
    old = {name: value for name, value in _result(1, 50.0).items() if name != "devices"}
    file.write_text(json.dumps(old))
    assert train_step_scaling.read_baseline(file)[0]["devices"] == 1
    assert (different["efficiency"], different["notes"]) == ({}, ["dense: other work, layers=1"])
    with pytest.raises(ValueError, match="cannot be read"):
        train_step_scaling.read_baseline(tmp_path / "none.json")
    file.write_text(json.dumps({"groups": []}))
    with pytest.raises(ValueError, match="holds no timed steps"):
        train_step_scaling.read_baseline(file)


def test_lines_of_weak_scaling(tmp_path, capsys):
    files = [tmp_path / "two.json", tmp_path / "four.json"]
    files[0].write_text(json.dumps({**_result(2, 90.0), "scaling": [_result(1, 50.0)]}))
    # Its copy of the run on two devices does not count: that run's own file does.
    files[1].write_text(json.dumps({**_result(4, 160.0), "scaling": [_result(2, 1.0)]}))
    assert scaling_plot.lines(files) == {("tiny", "dense"): {1: 50.0, 2: 45.0, 4: 40.0}}
    assert scaling_plot.main([str(tmp_path / "out.png"), *map(str, files)]) == 0
    assert (tmp_path / "out.png").stat().st_size > 5_000
    assert scaling_plot.main([str(tmp_path / "out.png"), str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


def test_meshes_of_fewer_devices():
    assert mesh_of(MeshConfig(fsdp=8), 1) == MeshConfig()
    assert mesh_of(MeshConfig(fsdp=8), 2) == MeshConfig(fsdp=2)
    assert mesh_of(MeshConfig(fsdp=2, data=4), 4) == MeshConfig(fsdp=2)
    assert mesh_of(MeshConfig(fsdp=4, tensor=2), 4) == MeshConfig(fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="devices=3 must be a multiple of"):
        mesh_of(MeshConfig(fsdp=2), 3)


def test_a_devices_own_batch_is_told_from_the_trainers_options():
    spec = Spec.parse("dense", "--batch-per-device 3 --xla a=1 --model.remat full --xla b=2")
    assert spec.arguments == ("--batch-per-device", "3", "--model.remat", "full")
    assert split(spec.arguments, "--batch-per-device") == (("--model.remat", "full"), ("3",))
    assert {"a": "1", "b": "2"}.items() <= spec.compiler_options.items()
