"""Our parameters and the tensors of a Llama-like checkpoint: names, order of axes.

PyTorch stores linear layers as (outputs, inputs), our attention and head as (inputs, outputs), our
feed-forward matrices neuron by neuron, (H, D). Rotary positions need no permutation: both turn
dimension i of a head with dimension i + d/2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from train.config import Ffn, ModelConfig


class Tensor(NamedTuple):
    """One tensor of a checkpoint and the parameter that it is.

    Attributes:
      name: of the tensor.
      path: of our parameter, such as ("blocks", "attention", "q"); of one layer's, in blocks.
      layer: which layer, None outside of blocks.
      shape: of the tensor.
      transposed: whether the parameter is the tensor's transpose.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Which of our matrices an architecture calls gate, up and down. Llama's MLP is act(gate) * up.
FFN_NAMES: dict[Ffn, dict[str, str]] = {
    "swiglu": {"gate_proj": "wg", "up_proj": "w1", "down_proj": "w2"},
    "relu2_gated": {"gate_proj": "w1", "up_proj": "wg", "down_proj": "w2"},
    "relu2": {"up_proj": "w1", "down_proj": "w2"},
}


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a model's checkpoint, in the order of computation.

    Args:
      config: with vocab_size filled in.
    """
    assert config.vocab_size is not None
    d, h, v = config.width, config.ffn_hidden, config.vocab_size
    queries, keys = d, config.kv_heads * config.head_dim
    yield Tensor(EMBEDDING, ("embedding",), None, (v, d), False)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."

        def block(name: str, path: str, shape: tuple[int, ...], transposed: bool, i=i, p=layer):
            return Tensor(f"{p}{name}.weight", ("blocks", *path.split(".")), i, shape, transposed)

        yield block("input_layernorm", "norm_attention.scale", (d,), False)
        yield block("self_attn.q_proj", "attention.q", (queries, d), True)
        yield block("self_attn.k_proj", "attention.k", (keys, d), True)
        yield block("self_attn.v_proj", "attention.v", (keys, d), True)
        yield block("self_attn.o_proj", "attention.out", (d, queries), True)
        yield block("post_attention_layernorm", "norm_ffn.scale", (d,), False)
        for theirs, ours in FFN_NAMES[config.ffn].items():
            down = ours == "w2"
            shape = (d, h) if down else (h, d)
            yield block(f"mlp.{theirs}", f"ffn.{ours}", shape, down)
    yield Tensor("model.norm.weight", ("norm", "scale"), None, (d,), False)
    yield Tensor(HEAD, ("head",), None, (v, d), True)
