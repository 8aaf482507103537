"""Which options of XLA's compiler the steps are compiled with."""

import jax
import pytest

from train import compiler


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    compiler._known.cache_clear()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield
    compiler._known.cache_clear()


def on_gpu(monkeypatch):
    # Options of the GPU's compiler are known to the CPU's as well, which ignores them.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_nothing_but_on_a_gpu(monkeypatch):
    assert compiler.step_options(2) == {}
    on_gpu(monkeypatch)
    assert compiler.step_options(1) == compiler.CUBLAS
    assert compiler.step_options(2) == compiler.CUBLAS | compiler.AHEAD


def test_xla_flags_win(monkeypatch):
    on_gpu(monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler.step_options(2) == compiler.AHEAD


def test_an_option_that_xla_has_dropped_is_left_out(monkeypatch):
    on_gpu(monkeypatch)
    monkeypatch.setattr(compiler, "CUBLAS", {"xla_gpu_no_such_thing": False})
    with pytest.warns(UserWarning, match="compiling without xla_gpu_no_such_thing=False"):
        assert compiler.step_options(1) == {}
