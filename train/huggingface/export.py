"""A run as a folder that `transformers` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from train.huggingface.architecture import to_transformers
from train.huggingface.dependency import safetensors_numpy
from train.huggingface.names import Tensor, tensors
from train.huggingface.tokenizer_files import bos_id, tokenizer_files
from train.trained import TrainedRun, load_run, thresholded

Weights = Literal["dense", "thresholded"]
Dtype = Literal["bfloat16", "float32"]

_NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
INDEX = "model.safetensors.index.json"


def export_run(
    run: TrainedRun | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: Weights = "dense",
    dtype: Dtype = "bfloat16",
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes safetensors, configuration and tokenizer; the folder appears when it is complete.

    SwiGLU models become `LlamaForCausalLM`, gated squared-ReLU ones `LlamaForCausalLM` with
    hidden_act "relu2", two-matrix ones `ArceeForCausalLM`. Logits are those of the dense view.

    Args:
      run: a run or its folder.
      output: a folder that does not exist, or is empty.
      weights: the parameters, or beta S(w) for every feed-forward matrix, zeros included.
      dtype: of the tensors; rounded once from float32.
      shard_bytes: most bytes of tensors in one file.

    Returns:
      The folder.

    Raises:
      ValueError: a run that has no such weights, or an output that is not empty; one line.
      OSError: files that cannot be read or written.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"{weights=} must be one of {get_args(Weights)}")
    if dtype not in _NUMPY:
        raise ValueError(f"{dtype=} must be one of {list(_NUMPY)}")
    if shard_bytes < 1:
        raise ValueError(f"{shard_bytes=} must be at least 1")
    save = safetensors_numpy().save_file
    output = Path(output)
    refuse_full(output)
    if not isinstance(run, TrainedRun):
        # Host memory is larger than a device's, and nothing is computed but the threshold.
        run = load_run(run, device=jax.devices("cpu")[0])
    model = run.model if weights == "dense" else thresholded(run)
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        eos_id = run.tokenizer.eos_id
        settings = to_transformers(
            run.config.model,
            positions=run.config.sequence_length,
            eos_id=eos_id,
            bos_id=bos_id(run),
            dtype=dtype,
        )
        _write(staged / "config.json", settings)
        generation = {"bos_token_id": bos_id(run), "eos_token_id": eos_id, "pad_token_id": eos_id}
        # The vocabulary is padded; no text has these ids.
        unused = list(range(run.tokenizer.vocab_size, run.model.head.shape[-1]))
        _write(staged / "generation_config.json", generation | {"suppress_tokens": unused or None})
        shards = list(_shards(list(tensors(run.config.model)), _NUMPY[dtype].itemsize, shard_bytes))
        placed: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {tensor.name: _values(model, tensor, _NUMPY[dtype]) for tensor in shard}
            # "pt" tells transformers in which order PyTorch keeps the axes.
            save(arrays, staged / name, metadata={"format": "pt"})
            # safetensors lets nobody else read what it writes.
            shutil.copymode(staged / "config.json", staged / name)
            placed.update(dict.fromkeys(arrays, name))
            total += sum(array.nbytes for array in arrays.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            _write(staged / INDEX, index)
        for name, text in tokenizer_files(run).items():
            (staged / name).write_text(text, encoding="utf-8")
        if output.exists():
            output.rmdir()
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output


def refuse_full(folder: Path) -> None:
    """Refuses a folder that holds anything.

    Raises:
      ValueError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={str(folder)!r} exists already: name a new folder")


def _shards(all_tensors: list[Tensor], itemsize: int, limit: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of at most `limit` bytes together, one at least."""
    shard: list[Tensor] = []
    used = 0
    for tensor in all_tensors:
        size = int(np.prod(tensor.shape)) * itemsize
        if shard and used + size > limit:
            yield shard
            shard, used = [], 0
        shard.append(tensor)
        used += size
    yield shard


def _values(model: nnx.Module, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """The parameter as the tensor it is."""
    node: Any = model
    for name in tensor.path:
        node = getattr(node, name)
        if name == "blocks" and isinstance(node, nnx.List):
            node = node[tensor.layer]
    array = node[...]
    if array.ndim > len(tensor.shape):
        array = array[tensor.layer]
    values = np.asarray(array)
    # safetensors writes the memory as it lies.
    values = np.ascontiguousarray((values.T if tensor.transposed else values).astype(dtype))
    assert values.shape == tensor.shape, (tensor, values.shape)
    return values


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
