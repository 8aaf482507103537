"""Our model's shape as a `transformers` configuration, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.config import Ffn, ModelConfig

# Both are plain decoders with RMSNorm, rotary positions and grouped queries; they differ in the
# MLP: Llama's has a gate, Arcee's has two matrices and squared ReLU.
_FORMS: dict[Ffn, tuple[str, str, str]] = {
    "swiglu": ("LlamaForCausalLM", "llama", "silu"),
    "relu2_gated": ("LlamaForCausalLM", "llama", "relu2"),
    "relu2": ("ArceeForCausalLM", "arcee", "relu2"),
}
# What transformers assumes where a file of an architecture leaves a value out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"hidden_act": "silu", "rms_norm_eps": 1e-6},
    "ArceeForCausalLM": {"hidden_act": "relu2", "rms_norm_eps": 1e-5},
}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def to_transformers(
    config: ModelConfig, *, positions: int, eos_id: int, bos_id: int, dtype: str
) -> dict[str, Any]:
    """The content of config.json for a model of this shape.

    Args:
      config: with vocab_size filled in.
      positions: the longest sequence it was trained on.
      eos_id: end of a document. bos_id: what stands before a document.
      dtype: of the tensors.

    Raises:
      ValueError: a model that transformers has no architecture for.
    """
    if config.qk_norm:
        raise ValueError("model.qk_norm=True: Llama and Arcee do not normalise queries and keys")
    if config.experts:
        raise ValueError(f"model.experts={config.experts}: Llama and Arcee have no experts")
    architecture, model_type, activation = _FORMS[config.ffn]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_eps,
        # The first is what transformers 4 reads, the second what 5 reads.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def from_transformers(values: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json describes.

    Raises:
      ValueError: one line naming what our model does not have.
    """
    architectures = values.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in _DEFAULTS:
        raise ValueError(f"{architectures=} must be one of {list(_DEFAULTS)}")
    whole = [*_REQUIRED, *(name for name in _OPTIONAL if values.get(name) is not None)]
    for name in whole:
        value = values.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json needs a whole number as {name}, not {value!r}")
    values = {**_DEFAULTS[architecture], **values}
    activation = values["hidden_act"]
    known = {(a, act): ffn for ffn, (a, _, act) in _FORMS.items()}
    if not isinstance(activation, str) or (architecture, activation) not in known:
        choices = [act for a, act in known if a == architecture]
        raise ValueError(f"hidden_act={activation!r} of {architecture} must be one of {choices}")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{name}=True: this model has no biases")
    if values.get("quantization_config"):
        raise ValueError("quantization_config: only float32, float16 and bfloat16 are read")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise ValueError(f"{head_dim=} times num_attention_heads={heads} must be {width=}")
    return ModelConfig(
        width=width,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        ffn=known[architecture, activation],
        hidden=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        rope_theta=_rope_theta(values),
        norm_eps=_number("rms_norm_eps", values["rms_norm_eps"]),
    )


def _rope_theta(values: Mapping[str, Any]) -> float:
    """The base of plain rotary positions; anything else is refused."""
    # transformers 5 keeps everything in rope_parameters; before, theta stood alone.
    theta = values.get("rope_theta", 10_000.0)
    factor = values.get("partial_rotary_factor", 1.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
            raise ValueError(f"{name}={rope!r}: only one plain rotary embedding for all layers")
        # What stretches positions must name its kind; left out, it would be taken for none.
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        if kind != "default":
            raise ValueError(f"rope scaling of type {kind!r} is not supported: only plain rotary")
        theta = rope.get("rope_theta", theta)
        factor = rope.get("partial_rotary_factor", factor)
    if factor != 1.0:
        raise ValueError(f"partial_rotary_factor={factor} must be 1")
    return _number("rope_theta", theta)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json needs a number as {name}, not {value!r}")
    return float(value)
