"""Which options of XLA's compiler the programs of a run are compiled with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from configs.studies._base import changed
from tests.train.test_step import CONFIG
from train import compiler
from train.mesh import BATCH_SPEC, make_mesh
from train.optimizer import make_optimizer
from train.programs import compile_programs
from train.state import abstract_state, create_state


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    compiler._known.cache_clear()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield
    compiler._known.cache_clear()


OF_SEVERAL = compiler.AHEAD | compiler.NO_GRAPHS


def on_gpu(monkeypatch):
    # Options of the GPU's compiler are known to the CPU's as well, which ignores them.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_nothing_but_on_a_gpu(monkeypatch):
    assert compiler.program_options(2) == {}
    on_gpu(monkeypatch)
    assert compiler.program_options(1) == compiler.CUBLAS
    assert compiler.program_options(2) == compiler.CUBLAS | OF_SEVERAL


def test_xla_flags_win(monkeypatch):
    on_gpu(monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler.program_options(2) == OF_SEVERAL


def test_an_option_that_xla_has_dropped_is_left_out(monkeypatch):
    on_gpu(monkeypatch)
    monkeypatch.setattr(compiler, "CUBLAS", {"xla_gpu_no_such_thing": False})
    with pytest.warns(UserWarning, match="compiling without xla_gpu_no_such_thing=False"):
        assert compiler.program_options(1) == {}


def test_further_options_win(monkeypatch):
    class Lowered:
        def compile(self, compiler_options):
            return compiler_options

    on_gpu(monkeypatch)
    assert compiler.compile_program(Lowered(), 1) == compiler.CUBLAS
    more = {"xla_gpu_enable_triton_gemm": True, "xla_gpu_x": "1"}
    assert compiler.compile_program(Lowered(), 1, more) == more


def test_every_product_of_a_run_is_compiled_with_the_options(monkeypatch):
    changes = {
        "sparsity": {"refresh_every": 3},
        "optimizer": {"reset_moments": "both"},
        "schedule": {"rescale_dense": True},
    }
    config = changed(CONFIG, **changes)
    mesh = make_mesh(config.mesh, config.batch_size)
    state = abstract_state(config, make_optimizer(config), mesh)
    shape, placed = (config.batch_size, config.sequence_length), NamedSharding(mesh, BATCH_SPEC)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    batch = {name: array(jnp.int32) for name in ("inputs", "targets")}
    compiled = []

    def compile_(self, compiler_options=None):
        compiled.append(("dot_general" in self.as_text(), compiler_options))

    monkeypatch.setattr(compiler, "program_options", lambda devices: {"devices": devices})
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    names = []
    with jax.set_mesh(mesh):
        masked = batch | {"mask": array(jnp.float32)}
        compile_programs(config, state, batch, masked, names.append)
    with_products = [options for products, options in compiled if products]
    # Steps, evaluations, clusterings; the flips, which only scale and reset, are compiled alike.
    assert len(with_products) == 6
    assert len(compiled) == len(names) == 8
    assert [options for _, options in compiled] == 8 * [{"devices": mesh.size}]


def test_a_new_state_takes_no_products():
    """It is made by plain `jax.jit`, whose options would be XLA's own."""
    create = jax.jit(lambda seed: create_state(CONFIG, make_optimizer(CONFIG), seed))
    text = create.lower(np.uint32(0)).as_text()
    assert "stablehlo" in text
    assert "dot_general" not in text
