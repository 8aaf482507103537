"""The dry run: what it prints must agree with the accounting, and it must need nothing."""

import dataclasses
import io
import time
import warnings

import pytest
from rich.console import Console

from sparsejax.spec import Sparsity
from train import accounting
from train.config import Config, ModelConfig, ScheduleConfig
from train.data.config import DataConfig
from train.dry_run import _pallas_names, _traced_kernels, dry_run, flops_plot, resolve_vocabulary
from train.optimizer import phase_schedule


def small(**changes) -> Config:
    config = Config(
        name="small",
        steps=1000,
        batch_size=4,
        sequence_length=128,
        model=ModelConfig(width=64, num_layers=2, num_heads=4),
        sparsity=Sparsity(m=16, v=32, refresh_every=100),
        schedule=ScheduleConfig(warmup_steps=100, sparse_fraction=0.6),
    )
    return dataclasses.replace(config, **changes)


def printed(config: Config, width: int = 100, **options) -> str:
    screen = io.StringIO()
    dry_run(config, console=Console(file=screen, width=width), **options)
    return screen.getvalue()


def test_tables_hold_the_numbers_of_the_accounting():
    text = printed(small())
    config, _ = resolve_vocabulary(small())
    count = accounting.parameters(config)
    for number in (count.total, count.ffn, count.projections, count.embedding):
        assert f"{number:,}" in text
    shares = accounting.dense_flops(config).shares()
    for share in (shares["ffn"], shares["head"], accounting.sparse_flops(config).shares()["ffn"]):
        assert f"{share:.1%}" in text
    assert "routing to 4 experts (M 16, V 32)" in text
    assert "A count of FLOPs, not a speed" in text
    assert text.count("1/8") == 4  # the four products with a 2:4 operand, M/4 = 4
    assert text.count("1/4") == 2
    shared = printed(small(sparsity=Sparsity(m=16, v=32, shared_every=2)), width=200)
    assert "(M 16, V 32), 1 in 2 blocks of neurons for every token" in shared
    assert shared.count("1/1.6") == 2  # half of them, and a quarter of the others


def test_lines_fit_100_columns():
    gated = small(model=ModelConfig(width=64, num_heads=4, num_kv_heads=2, ffn="relu2_gated"))
    for config in (small(), gated):
        assert max(len(line) for line in printed(config).splitlines()) <= 100


def test_phases_and_refreshes():
    text = printed(small())
    config, _ = resolve_vocabulary(small())
    phases = phase_schedule(config)
    refreshes = sum(phases.event(step) == "refresh" for step in range(config.steps))
    assert refreshes == 5
    assert f"made at the start, {refreshes} refreshes" in text
    rows = [line for line in text.splitlines() if " 699 " in line]
    assert len(rows) == 1
    assert "sparse" in rows[0]
    assert " 600 " in rows[0]


def test_a_dense_run_has_no_sparse_tables():
    text = printed(small(schedule=ScheduleConfig()))
    assert "sparse step" not in text
    assert "2:4" not in text
    assert "dense step" in text


def test_kernels_of_the_reference_backend():
    text = printed(small(sparsity=Sparsity(m=16, v=32, backend="reference")))
    assert text.count("reference: jax.numpy") == 3


def test_why_no_kernel_serves_the_sizes():
    """And which would do: where a run is planned there may be no GPU to say it."""
    model = ModelConfig(width=64, num_layers=1, num_heads=4, hidden=576)
    text = printed(small(model=model, sparsity=Sparsity(m=16, v=128)))
    text = " ".join(text.replace("│", " ").split())
    assert "not live=144: hidden=512 or 912 would do" in text
    assert text.count("backend='hopper' serves") == 1


def test_one_refresh_is_no_plural():
    text = printed(small(sparsity=Sparsity(m=16, v=64, refresh_every=500)))
    assert "1 refresh " in text
    assert "1 refreshes" not in text


def test_kernels_of_products_in_8_bits():
    model = ModelConfig(width=256, hidden=2048, num_layers=2, num_heads=4, ffn_precision="fp8")
    config = small(model=model, sparsity=Sparsity(m=16, v=128))
    line = next(line for line in printed(config, width=250).splitlines() if "sm_90" in line)
    for name in ("pack_weight24_fp8_hopper x 2", "up24_fp8_hopper", "down24_fp8_hopper x 2"):
        assert name in line


def test_a_backend_that_refuses_is_named():
    text = printed(small(sparsity=Sparsity(m=16, v=32, backend="hopper")))
    line = next(line for line in text.splitlines() if "this machine" in line)
    assert "refused" in line
    assert "hopper" in line


def test_pallas_kernels_are_found_inside_loops_and_gradients():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def double_kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    @jax.custom_vjp
    def double(x):
        return pl.pallas_call(double_kernel, out_shape=x, name="double", interpret=True)(x)

    double.defvjp(lambda x: (double(x), None), lambda _, g: (double(g),))

    def loss(x):
        return jax.lax.scan(lambda c, _: (double(c), None), x, length=3)[0].sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones(8)).jaxpr
    assert list(_pallas_names(jaxpr)) == ["double", "double"]


def test_a_hopper_kernel_is_found():
    import jax
    import jax.numpy as jnp

    from kernels import registry

    with registry.assume_capability((9, 0)):
        spmm24, _ = registry.load("spmm24", "hopper")
        shape = jax.ShapeDtypeStruct
        values, b = shape((256, 128), jnp.bfloat16), shape((512, 256), jnp.bfloat16)
        metadata = shape((4, 4, 128), jnp.int32)
        product = lambda *arrays: spmm24(*arrays, b_layout="nk")
        jaxpr = jax.make_jaxpr(product)(values, metadata, b).jaxpr
    (name,) = _pallas_names(jaxpr)
    assert "spmm24" in name


def test_the_gated_form_takes_kernels_at_its_default_size():
    model = ModelConfig(width=512, num_layers=1, num_heads=8, vocab_size=512, ffn="relu2_gated")
    config = small(model=model, sequence_length=1024, sparsity=Sparsity(m=16, v=128))
    found = _traced_kernels(config, (9, 0))
    for name in ("pack_weight24", "up24_linear", "pack24", "down24", "weight_gradient"):
        assert f"{name}_hopper x 3" in found
    a100 = _traced_kernels(config, (8, 0))
    for name in ("pack_weight24", "up24_linear", "pack24", "down24", "weight_gradient"):
        assert f"{name}_triton x 3" in a100
    assert "no sparse tensor cores" in _traced_kernels(config, (7, 5))
    at_swiglus = dataclasses.replace(config, model=dataclasses.replace(model, hidden=1408))
    found = _traced_kernels(at_swiglus, (9, 0))
    assert "up24_linear_hopper x 3" in found
    assert "32 neurons of zeros behind the 352 of an expert" in found


def test_the_vocabulary_of_a_run_whose_data_is_elsewhere():
    data = DataConfig(source="/nowhere/shards")
    model = ModelConfig(width=64, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=r"model\.vocab_size=None and there is no tokenizer"):
        printed(small(data=data, model=model))
    text = printed(small(data=data, model=dataclasses.replace(model, vocab_size=512)))
    assert "512 (as configured; no tokenizer here)" in text


def test_an_inconsistent_configuration_is_refused():
    with pytest.raises(ValueError, match="hidden=250"):
        printed(small(model=ModelConfig(width=64, num_heads=4, hidden=250)))


def test_plot(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "flops.png"
    text = printed(small(), plot=path)
    assert "wrote" in text
    picture = imread(path)
    assert picture.shape[0] > 500
    assert picture.std() > 0.1  # not blank
    dense = tmp_path / "dense.png"
    flops_plot(resolve_vocabulary(small(schedule=ScheduleConfig()))[0], dense)
    assert imread(dense).shape[1] < picture.shape[1]  # one panel instead of two
    with pytest.raises(ValueError, match="cannot be written"):
        printed(small(), plot=tmp_path / "missing" / "flops.png")


def test_a_7b_model_needs_no_memory_and_little_time():
    model = ModelConfig(width=4096, num_layers=32, num_heads=32, vocab_size=128_256)
    config = small(batch_size=1024, sequence_length=4096, model=model, micro_batches=4)
    printed(small())  # imports
    began = time.process_time()
    text = printed(config)
    assert time.process_time() - began < 3
    assert "7,493,390,336" in text
