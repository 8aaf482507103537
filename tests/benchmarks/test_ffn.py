"""The feed-forward benchmark: that it runs, checks what it times, and lowers at full width."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ffn, ffn_report, ffn_stages
from benchmarks import ffn_contenders as networks
from benchmarks.ffn_problem import errors, gated, gated_hidden, operand_shapes, preparation
from benchmarks.products import gaussian
from kernels import registry
from sparsejax.spec import Sparsity

SPARSITY = Sparsity(m=16, v=64, backend="reference")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the reference is no contender there")
def test_smoke_run(tmp_path, capsys):
    out = tmp_path / "results" / "ffn.json"
    ffn.main(["--out", str(out), "--smoke", "--blocks", "16", "--fp8"])
    result = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # Nothing here claims a speed: it says what it ran on, and that it was a smoke test.
    assert (result["smoke"], result["complete"], result["failures"]) == (True, True, [])
    assert result["device"]["platform"] == "cpu"
    assert result["versions"]["jax"] == jax.__version__
    shown = capsys.readouterr().out
    assert "a smoke test, its times say nothing about speed" in shown

    rows = result["networks"]
    found = {(r["contender"], r["m"], r["passes"]) for r in rows if "ms" in r}
    routed = ("reference", "reference fp8", "ragged_dot", "batched")
    dense = ("dense relu2", "dense relu2 fp8", "dense swiglu")
    assert found == {
        (name, m, passes)
        for names, m in ((routed, 16), (dense, None))
        for name in names
        for passes in ("forward", "forward+backward")
    }
    base = {r["passes"]: r["ms"] for r in rows if r["contender"] == "dense relu2"}
    for row in rows:
        assert row["ms"] == pytest.approx(np.median(row["rounds_ms"]))
        assert row["speedup_over_dense"] == pytest.approx(base[row["passes"]] / row["ms"])
        if row["m"] and row["passes"] == "forward+backward":
            limit = ffn.TOLERANCE[row["contender"] == "reference"]
            if row["contender"] == "reference fp8":
                limit = ffn.TOLERANCE_8_BITS
                assert min(row["relative_errors"].values()) > 1e-2
            assert set(row["relative_errors"]) == {"y", "dx", "dw1", "dw2"}
            assert all(0 <= e < limit for e in row["relative_errors"].values())
    stages = [(r["contender"], r["stage"]) for r in result["stages"]]
    names = [s.name for s in ffn_stages.STEP if s.function != "densest"]
    assert stages == [(c, name) for c in ("reference", "reference fp8") for name in names]
    assert sum(s.product for s in ffn_stages.STEP) == 6
    assert sum(result["loads"][0]["loads"]) == 256
    assert {s["passes"] for s in result["summary"]} == {"forward", "forward+backward"}


@pytest.fixture(name="prepared", scope="module")
def _prepared():
    return preparation(SPARSITY)(gaussian(64, 512, 256))


@pytest.fixture(name="operands")
def _operands(prepared):
    return prepared[0]


def test_preparation_starts_a_sparse_phase(prepared):
    operands, counts, used = prepared
    tensors = gaussian(64, 512, 256)
    # Whole neurons in another order.
    order = lambda w: np.asarray(w)[np.lexsort(np.asarray(w).T)]
    np.testing.assert_array_equal(order(operands.w1), order(tensors.w1.T))
    np.testing.assert_array_equal(order(operands.w2), order(tensors.w2))
    assert not np.array_equal(operands.w1, tensors.w1.T)
    # Experts are clusters of the neurons: their centres are near their own.
    w1 = np.asarray(operands.w1) / np.linalg.norm(operands.w1, axis=1, keepdims=True)
    nearness = w1 @ np.asarray(operands.centers).T
    own = np.arange(512) % 16 // 4
    assert nearness[np.arange(512), own].mean() > nearness.mean() + 0.05
    assert counts.sum() == 256
    assert used == np.sum(-(-np.asarray(counts) // 64) * 64)


@pytest.mark.parametrize("name", ["y", "dx", "dw1", "dw2"])
def test_a_wrong_result_is_found(operands, name):
    outputs = list(jax.jit(networks.sparse(SPARSITY, backward=True))(operands))
    check = lambda: np.asarray(errors(operands, tuple(outputs), sparsity=SPARSITY, sparse=True))
    assert (check() < ffn.TOLERANCE[True]).all()
    i = ["y", "dx", "dw1", "dw2"].index(name)
    outputs[i] = outputs[i].at[0].multiply(1.5)
    found = check()
    assert found[i] > ffn.TOLERANCE[True]
    assert (np.delete(found, i) < ffn.TOLERANCE[True]).all()
    outputs[i] = outputs[i].at[0, 0].set(jnp.nan)
    assert np.isnan(check()[i])
    # The dense network is another function.
    dense = jax.jit(networks.relu2(backward=True))(operands)
    assert (errors(operands, dense, sparsity=SPARSITY, sparse=True) > 0.1).all()


def test_weight_gradients_along_tokens_are_checked_and_labelled(operands):
    sparsity = Sparsity(m=16, v=64, backend="reference", weight_gradient="tokens24")
    outputs = jax.jit(networks.sparse(sparsity, backward=True))(operands)
    assert (errors(operands, outputs, sparsity=sparsity, sparse=True) < ffn.TOLERANCE[True]).all()
    # They are not the dense ones.
    found = errors(operands, outputs, sparsity=SPARSITY, sparse=True)
    assert (np.asarray(found) < ffn.TOLERANCE[True]).tolist() == [True, True, False, False]

    stages = ffn_stages.Stages(sparsity, "reference")
    shapes = stages.arguments(operand_shapes(64, 512, 256, 4))
    assert set(shapes) == {s.function for s in ffn_stages.STEP}
    assert shapes["weight_gradient"][-1].shape == (4, 7)
    result = {
        "device": {"kind": "a"},
        "smoke": False,
        "settings": {"weight_gradient": "tokens24", "dense_neurons": 0.05},
    }
    assert ffn_report._title(result).endswith("along tokens but for 5% of neurons")


def test_the_gated_rival_has_as_many_parameters():
    for hidden in (8192, 16_384):
        assert gated_hidden(hidden) % 128 == 0
        assert abs(3 * gated_hidden(hidden) / (2 * hidden) - 1) < 0.01
    operands = gated(gaussian(64, 512, 256))
    assert operands.w1.shape == operands.w2.shape == operands.wg.shape == (344, 64)


@pytest.mark.skipif(
    importlib.util.find_spec("kernels.hopper.grouped24") is None, reason="no kernels yet"
)
@pytest.mark.parametrize(
    ("width", "hidden", "m", "option", "precision"),
    [
        (2048, 8192, 32, "dense", "compute"),
        (2048, 8192, 16, "tokens24", "compute"),
        (2048, 8192, 16, "dense", "fp8"),
        (4096, 16_384, 8, "tokens24", "fp8"),
    ],
)
def test_full_width_lowers_for_hopper(width, hidden, m, option, precision):
    """What a GPU run compiles first, where no device time is at stake."""
    shapes = operand_shapes(width, hidden, 16_384, m // 4)
    sparsity = Sparsity(m=m, v=128, backend="hopper", weight_gradient=option)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with registry.assume_capability((9, 0)), jax.sharding.use_abstract_mesh(mesh):
        lower = lambda f, *a: jax.jit(f).trace(*a).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in lower(networks.sparse(sparsity, True, precision), shapes)
        in_8_bits = precision == "fp8"
        stages = (ffn_stages.Stages8 if in_8_bits else ffn_stages.Stages)(sparsity, "hopper")
        arguments = stages.arguments(shapes)
        kernels = {
            n for n, f in stages.functions.items() if "mosaic_gpu" in lower(f, *arguments[n])
        }
        expected = {"pack", "up", "down", "up_backward", "weight_gradient"}
        assert kernels == expected | ({"stack"} if in_8_bits else set())
        if option == "dense" and not in_8_bits:  # rivals have neither
            for rival in (networks.ragged(sparsity, True), networks.batched(sparsity, 4096, True)):
                assert "mosaic_gpu" not in lower(rival, shapes)


def test_speedups_are_of_the_same_pass_and_block():
    row = lambda name, m, ms, passes="forward": {
        "model": "a", "contender": name, "m": m, "passes": passes, "ms": ms
    }  # fmt: skip
    result = {
        "settings": {"backends": ["hopper"]},
        "networks": [
            row("dense relu2", None, 8.0), row("dense relu2", None, 24.0, "forward+backward"),
            row("ragged_dot", 8, 6.0), row("ragged_dot", 16, 3.0),
            row("hopper", 8, 4.0), row("hopper", 16, 2.0),
            row("hopper", 16, 6.0, "forward+backward"), row("hopper fp8", 16, 1.5),
            row("dense relu2 fp8", None, 5.0),
            {**row("hopper", 32, 0.0), "note": "failed"},
        ],
    }  # fmt: skip
    del result["networks"][-1]["ms"]
    found = {
        (s["m"], s["passes"], s["contender"]): {
            rival: ratio for rival, ratio in s["speedup_over"].items() if rival != "dense relu2 fp8"
        }
        for s in ffn_report.summary(result)
    }
    assert found == {
        (8, "forward", "hopper"): {"dense relu2": 2.0, "ragged_dot": 1.5},
        (16, "forward", "hopper"): {"dense relu2": 4.0, "ragged_dot": 1.5},
        (16, "forward+backward", "hopper"): {"dense relu2": 4.0},
        (16, "forward", "hopper fp8"): {"dense relu2": 16 / 3, "ragged_dot": 2.0, "hopper": 4 / 3},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.txt"], "must end in .json"),
        (["--out", "a.json", "--rounds", "0"], "must be positive"),
        (["--out", "a.json", "--blocks", "12"], "must be of 8, 16, 32"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        ffn.main([*arguments, "--smoke"])
    assert message in capsys.readouterr().err
