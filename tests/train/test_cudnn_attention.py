"""cuDNN's backward calls say that determinism is required exactly where XLA would write it."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as calls

from train import attention
from train.config import ModelConfig
from train.cudnn_attention import requires_determinism

pytestmark = pytest.mark.core

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"


@pytest.mark.parametrize(
    ("flags", "required"),
    [
        ("", False),
        (DETERMINISTIC, True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_deterministic_ops='true'", True),
        ("--xla_gpu_deterministic_ops=1 --xla_dump_to=x", True),
        (f"{DETERMINISTIC} --xla_gpu_exclude_nondeterministic_ops=false", False),
        (f"--xla_gpu_deterministic_ops=false {DETERMINISTIC}", True),
        ("--xla_gpu_autotune_level=0", False),
    ],
)
def test_what_xla_flags_require(monkeypatch, flags, required):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert requires_determinism() == required


@pytest.mark.parametrize("flags", ["", DETERMINISTIC])
def test_every_backward_call_says_so(monkeypatch, flags):
    """As XLA would have written it, or calls that are equal would not stay equal."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(calls, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(calls, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(calls, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(attention, "attention_implementation", lambda *_: "cudnn")
    config = ModelConfig(width=128, num_heads=2, compute_dtype="bfloat16", norm="xla")
    layers = [attention.Attention(config, rngs=nnx.Rngs(i)) for i in range(2)]

    def loss(x):
        for layer in layers:
            x = layer(x)
        return jnp.sum(x.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(.*?backend_config = (\".*?\"),", text)
    says = [(bool(backward), "force_deterministic" in config) for backward, config in found]
    assert sorted(says) == 2 * [(False, False)] + 2 * [(True, flags == DETERMINISTIC)]
