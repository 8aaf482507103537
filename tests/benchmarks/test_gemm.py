"""The GEMM benchmark: that it runs, checks what it times, and computes what it reports."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import capture as capture_module
from benchmarks import contenders, copies, devices, fp8_contenders, gemm, packing, products, report
from benchmarks.capture import CaptureConfig, FfnTensors, capture
from benchmarks.failures import Failures
from benchmarks.timing import Samples, Sampling, Timed, interleaved
from kernels import registry
from sparsejax import fp8
from sparsejax.prune import soft_threshold, soft_threshold_beta, top2_of_4

WIDTH, HIDDEN, TOKENS = 64, 256, 256
KINDS = ["weights", "activations", "tokens"]
SAMPLING = Sampling(rounds=2, round_seconds=1e-4)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the reference is no contender there")
def test_smoke_run(tmp_path, capsys):
    out = tmp_path / "results" / "gemm.json"
    gemm.main(["--out", str(out), "--smoke"])
    result = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # Nothing here claims a speed: it says what it ran on, and that it was a smoke test.
    assert result["smoke"] is True
    assert result["complete"] is True
    assert result["device"]["platform"] == "cpu"
    assert result["versions"]["jax"] == jax.__version__
    shown = capsys.readouterr().out
    assert "a smoke test, its times say nothing about speed" in shown
    assert result["failures"] == []

    rows = result["products"]
    found = {(r["kind"], r["data"], r["contender"]) for r in rows if "ms" in r}
    assert found == {
        (kind, data, contender)
        for kind in [*KINDS, "cube"]
        for data in ("training", "gaussian")
        for contender in ("xla dense", "reference", "xla dense fp8", "reference fp8")
    }
    for row in rows:
        assert len(row["rounds_ms"]) == 2
        assert row["ms"] == pytest.approx(np.median(row["rounds_ms"]))
        rate = 2e-9 * row["m"] * row["n"] * row["k"] / row["ms"]
        assert row["effective_tflops"] == pytest.approx(rate)
        if row["contender"] != "xla dense":
            assert row["relative_error"] < 5e-3
        assert row["speedup_over_dense_fp8"] > 0
    tensors = ("tiny W1", "tiny W2", "tiny Y2", "tiny Y2 tokens")
    in_8_bits = ("tiny W1 fp8", "tiny Y2 fp8")
    assert {r["name"] for r in result["packing"]} == {*tensors, *in_8_bits}
    assert all(0 < r["share_of_copy"] < 10 for r in result["packing"])
    assert {r["contender"] for r in result["copy"]} == {"multiply", "copy"}
    rates = [r["bytes_per_second"] for r in result["copy"]]
    assert result["copy_bytes_per_second"] == max(rates) > 0
    for pair in (
        "reference over xla dense",
        "reference fp8 over xla dense fp8",
        "reference fp8 over reference",
        "reference fp8 over xla dense",
        "xla dense fp8 over xla dense",
    ):
        assert f"{pair}, training data" in result["summary"]
    assert 0 < result["capture"]["tiny"]["active_share"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt", "--smoke"], "must end in .json"),
        (["--out", "x.json", "--smoke", "--rounds", "0"], "must be positive"),
        (["--out", "x.json", "--backends", "cutlass"], "invalid choice: 'cutlass'"),
        ([], "--out"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gemm.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="describes a machine without a GPU")
def test_refuses_full_size_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        gemm.main(["--out", "x.json"])
    assert "'cpu', no GPU: only --smoke runs" in capsys.readouterr().err


def network(seed: int = 0) -> FfnTensors:
    return products.gaussian(WIDTH, HIDDEN, TOKENS, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_network(kind):
    """With operands that pruning leaves alone, a sparse product is the network's own product."""
    t = network()
    t = t._replace(y2=top2_of_4(t.y2, 0 if kind == "tokens" else 1))
    shape = {s.kind: s for s in products.shapes("m", WIDTH, HIDDEN, TOKENS)}[kind]
    product = products.build(shape, t)
    f = lambda a: np.asarray(a, np.float64)
    w1 = f((soft_threshold_beta(t.w1, 0) * soft_threshold(t.w1, 0)).astype(jnp.bfloat16))
    expected = {
        "weights": (f(t.x) @ w1).T,
        "activations": f(t.y2) @ f(t.w2.astype(jnp.bfloat16)),
        "tokens": f(t.y2).T @ f(t.dy3),
    }[kind]
    rows = np.r_[:128, shape.m - 128 : shape.m]
    np.testing.assert_allclose(
        products.reference_rows(product), expected[rows], rtol=1e-4, atol=1e-3
    )
    # The dense contender computes the same product of operands before pruning.
    dense = contenders.dense_product(*product.dense_operands, contract=product.dense_contract)
    w1 = f(t.w1.astype(jnp.bfloat16))
    unpruned = f(t.x) @ w1 if kind == "weights" else expected
    np.testing.assert_allclose(f(dense), unpruned, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(("backend", "capability"), [("hopper", (9, 0)), ("triton", (8, 0))])
@pytest.mark.parametrize("model", gemm.full_models(1), ids=lambda m: m.name)
def test_full_size_kernels_lower_for_a_gpu(model, backend, capability):
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with registry.assume_capability(capability), jax.sharding.use_abstract_mesh(mesh):
        for shape in gemm.model_shapes(model):
            traced = contenders.trace_sparse(shape, backend)
            assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
            if backend == "hopper":
                traced = fp8_contenders.trace_sparse(fp8_contenders.Fp8Shape(shape), backend)
                assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()
        case = packing.packings(model.name, model.capture)[0]
        traced = packing.trace_packing(case, backend)
        assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("model", gemm.full_models(1), ids=lambda m: m.name)
def test_full_size_shapes(model):
    c = model.capture
    assert (c.hidden, c.tokens) == (4 * c.width, 16_384)
    found = {s.kind: (s.m, s.n, s.k) for s in gemm.model_shapes(model)}
    h, d, t = c.hidden, c.width, c.tokens
    assert found.pop("cube", (8192,) * 3) == (8192,) * 3
    assert found == {"weights": (h, t, d), "activations": (t, d, h), "tokens": (h, d, t)}


@pytest.mark.parametrize("model", gemm.full_models(1), ids=lambda m: m.name)
def test_full_size_capture_traces(model):
    c = model.capture
    params = jax.eval_shape(functools.partial(capture_module._init, config=c), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((c.tokens // c.sequence, c.sequence + 1), jnp.int32)
    offset = jax.ShapeDtypeStruct((c.tokens // c.sequence, c.sequence, c.width), jnp.bfloat16)
    loss = functools.partial(capture_module._loss, heads=c.heads)
    (_, (x, y2)), dy3 = jax.eval_shape(
        jax.value_and_grad(loss, argnums=2, has_aux=True), params, tokens, offset
    )
    assert (x.size, y2.size, dy3.size) == (c.tokens * c.width, c.tokens * c.hidden, x.size)
    assert x.dtype == y2.dtype == dy3.dtype == jnp.bfloat16


def test_build_refuses_other_tensors():
    shape = products.shapes("m", WIDTH, HIDDEN, TOKENS)[0]
    with pytest.raises(ValueError, match="tensors give"):
        products.build(dataclasses.replace(shape, k=128), network())


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_contenders_multiply_the_same_tensors(kind):
    """Both within what rounding to 8 bits does to the product of 16 bits."""
    shape = {s.kind: s for s in products.shapes("m", WIDTH, HIDDEN, TOKENS)}[kind]
    product = products.build(shape, network())
    operands = fp8_contenders.build(product)
    item = fp8_contenders.Fp8Shape(shape)
    sparse = fp8_contenders.compile_sparse(item, "reference")
    dense = fp8_contenders.compile_dense(operands)
    failures = Failures()
    checked = fp8_contenders.check(
        product, operands, {"reference": sparse}, {"hopper": "no"}, dense, failures, "it"
    )
    assert not failures
    assert checked.notes == {"hopper fp8": "no"}
    assert set(checked.calls) == {"reference fp8", "xla dense fp8"}
    assert checked.facts["xla dense fp8"]["implementation"] == "xla's own kernel"
    out = checked.calls["reference fp8"].run()
    assert 1e-3 < products.relative_error(product, products.reference_rows(product), out) < 0.08
    exact = contenders.dense_product(*product.dense_operands, contract=product.dense_contract)
    found = checked.calls["xla dense fp8"].run().astype(jnp.float32)
    error = jnp.linalg.norm(found - exact.astype(jnp.float32)) / jnp.linalg.norm(exact)
    assert 1e-3 < float(error) < 0.08

    def wrong(*arguments):
        return sparse(*arguments) * 1.05

    fp8_contenders.check(product, operands, {"reference": wrong}, {}, dense, failures, "it")
    assert len(failures) == 2
    assert all("reference fp8: relative error" in line for line in failures)


def test_8_bit_results_that_lose_a_step_along_k_fail():
    """A small part of many products, which the limit for accumulators alone would let through."""
    shape = products.Shape("m", "activations", 256, 64, 4096, "kn", "mn")
    t = products.gaussian(64, 4096, 256)
    product = products.build(shape, t._replace(y2=jnp.abs(t.y2), w2=jnp.abs(t.w2)))
    operands = fp8_contenders.build(product)
    sparse = fp8_contenders.compile_sparse(fp8_contenders.Fp8Shape(shape), "reference")
    dense = fp8_contenders.compile_dense(operands)

    def wrong(values, *rest):
        return sparse(values.at[:, 128:160].set(0), *rest)

    failures = Failures()
    checked = fp8_contenders.check(
        product, operands, {"reference": wrong}, {}, dense, failures, "it"
    )
    facts = checked.facts["reference fp8"]
    assert 0.01 < facts["relative_error"] < fp8_contenders.limit(facts["products_summed"])
    assert len(failures) == 1
    assert "of 64 products exceeds" in failures[0]


def accumulate(a: np.ndarray, b: np.ndarray, step: int = 32) -> np.ndarray:
    """a (m, k) times b (n, k), with sums of 14 bits: a step's products and the sum so far are cut
    to the last place of the largest of them."""
    sums = np.zeros((len(a), len(b)))
    for i in range(0, a.shape[1], step):
        terms = a[:, None, i : i + step] * b[None, :, i : i + step]
        terms = np.concatenate([terms, sums[..., None]], axis=-1)
        largest = np.maximum(np.abs(terms).max(-1), 1e-30)
        unit = 2.0 ** (np.floor(np.log2(largest)) - 13)[..., None]
        sums = (np.trunc(terms / unit) * unit).sum(-1)
    return sums


@pytest.mark.parametrize("signs", ["one", "random"])
def test_limit_of_8_bit_accumulators(signs):
    """It is near what they lose of products of one sign, and above it; thinned, they lose little.

    That is measured on an emulation. On an H200 cuBLASLt's dense product of 16,384 tokens loses
    5.1% and 5.8% on training data, and 0.3% on Gaussian.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(
        jnp.asarray(rng.standard_normal(shape), fp8.FORWARD), np.float64
    )
    a, b = draw(8, 8192), draw(8, 8192)
    if signs == "one":
        a, b = np.abs(a), np.abs(b)
    a[:, rng.random(8192) < 0.5] = 0
    error = lambda a: np.linalg.norm(accumulate(a, b) - a @ b.T) / np.linalg.norm(a @ b.T)
    limit = fp8_contenders.limit(np.count_nonzero(a) / len(a))
    assert 0.1 < limit < 0.15
    if signs == "one":
        assert limit / 4 < error(a) < limit
    else:
        assert error(a) < 5e-3
    thin = np.asarray(fp8_contenders.thinned(jnp.asarray(a, fp8.FORWARD)), np.float64)
    assert np.count_nonzero(thin, axis=1).max() <= fp8_contenders.FEW
    assert np.count_nonzero(thin) > 0
    assert error(thin) < fp8_contenders.FEW_LIMIT / 4


def test_thinned_keeps_both_columns_of_pairs_and_all_of_few():
    kept = np.flatnonzero(np.asarray(fp8_contenders.thinned(jnp.ones((2, 8192))))[1])
    assert len(kept) == fp8_contenders.FEW
    assert np.bincount(kept % 2).tolist() == [32, 32]
    assert np.bincount(kept // 128).tolist() == [1] * 64
    few = jnp.ones((2, 64))
    np.testing.assert_array_equal(fp8_contenders.thinned(few), few)


@pytest.mark.parametrize("error", ["relative_error", "relative_error_of_few"])
def test_8_bit_errors_that_exceed_a_limit(error):
    facts = {"relative_error": 0.058, "relative_error_of_few": 2e-3, "products_summed": 4000.0}
    assert fp8_contenders.excesses(facts) == []
    for bad in (0.2, float("nan")):
        assert len(fp8_contenders.excesses({**facts, error: bad})) == 1


def measure(call) -> tuple[list[dict], Failures]:
    shape = products.shapes("m", WIDTH, HIDDEN, TOKENS)[0]
    product = products.build(shape, network())
    failures = Failures()
    dense = lambda a, b: contenders.dense_product(a, b, contract=product.dense_contract)
    rows = contenders.measure_product(
        product, "gaussian", {"reference": call}, {"triton": "not served: no"}, dense, None,
        SAMPLING, failures,
    )  # fmt: skip
    return rows, failures


@pytest.mark.parametrize("fault", ["scaled", "one wrong row", "nan"])
def test_wrong_results_fail_the_run(fault):
    compiled = contenders.compile_sparse(
        products.shapes("m", WIDTH, HIDDEN, TOKENS)[0], "reference"
    )

    def wrong(*operands):
        out = compiled(*operands)
        if fault == "scaled":
            return out * 1.01
        # Output (n, m): one row of A is one column.
        return out.at[:, 5].set(0.0 if fault == "one wrong row" else jnp.nan)

    assert not measure(compiled)[1]
    rows, failures = measure(wrong)
    assert len(failures) == 1
    assert "reference: relative error" in failures[0]
    assert {r["contender"] for r in rows if "ms" in r} == {"xla dense", "reference"}


def test_broken_and_refused_contenders_do_not_end_the_run():
    def broken(*operands):
        raise RuntimeError("out of order\ndetails")

    rows, failures = measure(broken)
    assert failures == ["m weights, gaussian data, reference: RuntimeError: out of order"]
    notes = {r["contender"]: r["note"] for r in rows if "note" in r}
    assert notes == {
        "reference": "failed: RuntimeError: out of order",
        "triton": "not served: no",
    }
    assert "ms" in next(r for r in rows if r["contender"] == "xla dense")


def test_packing_checks_and_counts_bytes():
    case = packing.Packing("W", 64, 256, "float32", 0, "soft_threshold")
    assert case.bytes == 64 * 256 * 4 + 64 * 256 + 64 * 256 // 8
    compiled = packing.compile_packing(case, "reference")
    failures = Failures()
    rows = packing.measure_packing(case, {"reference": compiled}, {}, 1e9, SAMPLING, failures)
    assert not failures
    assert rows[0]["bytes_per_second"] == pytest.approx(case.bytes / rows[0]["ms"] * 1e3)
    assert rows[0]["share_of_copy"] == pytest.approx(rows[0]["bytes_per_second"] / 1e9)

    def wrong(inputs, scale):
        outs = compiled(inputs, scale)
        values, metadata = outs[-1]
        return [*outs[:-1], (values.at[0, 0].add(1), metadata)]

    packing.measure_packing(case, {"reference": wrong}, {}, 1e9, SAMPLING, failures)
    assert failures == ["W, reference: 1 words differ from the reference"]


def test_packing_without_a_copy_to_compare_with():
    case = packing.Packing("W", 64, 256, "float32", 0, "soft_threshold")
    compiled = packing.compile_packing(case, "reference")
    rows = packing.measure_packing(case, {"reference": compiled}, {}, None, SAMPLING, Failures())
    assert rows[0]["bytes_per_second"] > 0
    assert rows[0]["share_of_copy"] is None
    assert not any("copy" in name for name in report.summary([], rows))


H200, SIZE = "NVIDIA H200", 1 << 29


@pytest.mark.parametrize(
    ("terabytes", "share"),
    [({"multiply": 0.444, "copy": 0.5}, "10%"), ({"multiply": 5.0, "copy": 3.9}, "104%")],
)
def test_a_copy_that_cannot_be_is_a_failure_and_no_baseline(terabytes, share):
    samples = {n: Samples((2 * SIZE / r / 1e12,) * 3) for n, r in terabytes.items()}
    failures = Failures()
    copy = copies.judge(samples, SIZE, H200, failures)
    assert copy.bytes_per_second is None
    assert len(failures) == 1
    assert f"{share} of the 4.80 TB/s of a H200" in failures[0]
    assert [len(row["rounds_ms"]) for row in copy.rows] == [3, 3]
    assert all("no baseline" in row["note"] for row in copy.rows)


def test_the_faster_form_of_a_copy_is_the_baseline():
    """One form that a stalled host made slow does not spoil it, and is visible."""
    seconds = 2 * SIZE / 3.9e12
    samples = {
        "multiply": Samples((9 * seconds, 9 * seconds, seconds)),
        "copy": Samples((seconds, seconds, 1.1 * seconds)),
    }
    failures = Failures()
    copy = copies.judge(samples, SIZE, H200, failures)
    assert not failures
    assert copy.bytes_per_second == pytest.approx(3.9e12)
    assert report.unsteady(copy.rows) == ["multiply: samples from 0.275 to 2.478 ms"]
    # Nobody knows what a CPU or an unknown GPU copies.
    assert copies.refusal(1.0, "cpu") is None
    assert copies.refusal(2.91e12, "NVIDIA H100 80GB HBM3") is None


def test_bounds_of_an_h100():
    bounds = devices.spmm_bounds("NVIDIA H100 80GB HBM3", 8192, 16384, 2048)
    flops = 2 * 8192 * 16384 * 2048
    dense = flops / 989.4e12
    assert bounds.dense == pytest.approx(dense)
    assert bounds.arithmetic == pytest.approx(dense / 2)
    # 16 KiB of B and 2 KiB of A in 128 cycles of 128 bytes.
    assert bounds.shared_memory == pytest.approx(dense / 2 * 18 / 16)
    moved = 8192 * 2048 * 9 / 8 + 2 * 2048 * 16384 + 2 * 8192 * 16384
    assert bounds.memory == pytest.approx(moved / 3.35e12)
    assert bounds.sparse == bounds.shared_memory
    in_8_bits = devices.spmm_bounds("NVIDIA H100 80GB HBM3", 8192, 16384, 2048, itemsize=1)
    assert in_8_bits.sparse == pytest.approx(bounds.sparse / 2)
    assert in_8_bits.dense == pytest.approx(bounds.dense / 2)
    moved = 8192 * 2048 * 5 / 8 + 2048 * 16384 + 2 * 8192 * 16384
    assert in_8_bits.memory == pytest.approx(moved / 3.35e12)
    assert devices.spmm_bounds("NVIDIA A100-SXM4-80GB", 64, 64, 64, itemsize=1).sparse is None
    assert devices.spmm_bounds("NVIDIA A100-SXM4-80GB", 64, 64, 64).shared_memory is None
    assert devices.spmm_bounds("cpu", 64, 64, 64).sparse is None


def test_rounds_interleave_and_rotate():
    order: list[str] = []
    calls = {name: Timed(functools.partial(order.append, name), lambda _: None) for name in "abc"}
    samples = interleaved(calls, Sampling(rounds=3, round_seconds=1e-9))
    assert {name: len(s.seconds) for name, s in samples.items()} == dict.fromkeys("abc", 3)
    timed = order[12:]  # after a warm-up of 4 executions each
    starts = [name for i, name in enumerate(timed) if i == 0 or timed[i - 1] != name]
    # abc, bca, cab: the contender that ends a round never starts the next one.
    assert starts == list("abcbcacab")
    for bad in (Sampling(0, 1.0), Sampling(1, 0.0), Sampling(1, 1.0, -1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            interleaved(calls, bad)
    with pytest.raises(ValueError, match="must be positive"):
        interleaved({}, Sampling(1, 1.0))


def test_summary_takes_the_better_vendor_form_and_geometric_means():
    def row(kind, contender, ms):
        return {"model": "m", "kind": kind, "data": "training", "contender": contender, "ms": ms}

    rows = [
        row("weights", "xla dense", 2.0),
        row("weights", "cusparselt", 3.0),
        row("weights", "cusparselt transposed", 1.5),
        row("weights", "hopper", 1.0),
        row("tokens", "xla dense", 8.0),
        row("tokens", "hopper", 1.0),
        {**row("tokens", "triton", 0.0), "note": "not served"},
    ]
    del rows[-1]["ms"]
    figures = report.summary(rows, [])
    over_dense = figures["hopper over xla dense, training data"]
    assert over_dense == {"geometric_mean": pytest.approx(4.0), "least": 2.0, "products": 2}
    over_vendor = figures["hopper over cusparselt, training data"]
    assert over_vendor == {"geometric_mean": pytest.approx(1.5), "least": 1.5, "products": 1}
    assert not any("triton" in name for name in figures)


def test_capture_trains_and_gives_consistent_tensors():
    config = CaptureConfig(32, 128, 2, 128, sequence=32, sequences_per_step=4, steps=30)
    tensors, facts = capture(config)
    assert facts["last_loss"] < facts["first_loss"] - 1
    y2 = jnp.square(jax.nn.relu(tensors.x @ tensors.w1.astype(jnp.bfloat16)))
    np.testing.assert_allclose(
        np.asarray(tensors.y2, np.float32), np.asarray(y2, np.float32), rtol=0.05, atol=1e-2
    )
    assert facts["active_share"] == pytest.approx(float(jnp.mean(tensors.y2 > 0)))
    rms = jnp.sqrt(jnp.mean(tensors.x.astype(jnp.float32) ** 2, axis=-1))
    np.testing.assert_allclose(rms, 1.0, rtol=0.02)
    assert tensors.dy3.shape == (128, 32)
    assert 0 < float(jnp.abs(tensors.dy3).max()) < 1
    for bad in (dataclasses.replace(config, tokens=100), dataclasses.replace(config, heads=5)):
        with pytest.raises(ValueError, match="must be a multiple"):
            capture(bad)
