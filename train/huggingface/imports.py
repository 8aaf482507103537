"""A folder of `transformers` as a run at step 0."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from train.checkpoint import Checkpointer
from train.config import Config, validate
from train.data.config import DataConfig
from train.data.tokenizer import load_tokenizer
from train.huggingface.architecture import from_transformers
from train.huggingface.dependency import safetensors_numpy
from train.huggingface.export import INDEX, refuse_full
from train.huggingface.names import EMBEDDING, HEAD, Tensor, tensors
from train.run_folder import CHECKPOINTS, write_config
from train.trained import IMPORTED_FILE, TOKENIZER_FILE, abstract_parameters
from train.tree import names

BYTES = "bytes"
_DTYPES = ("F32", "F16", "BF16")


def import_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Reads a Llama (or Arcee) checkpoint into a new run, which then generates, evaluates, exports.

    The run's one checkpoint, of step 0, holds float32 parameters and no optimiser state. A tied
    head becomes an untied copy of the embedding. Tensors are read by safetensors, never unpickled.

    Args:
      model: folder with config.json, *.safetensors (in one file, or with an index) and
        tokenizer.json.
      output: the run's folder, which does not exist or is empty.
      tokenizer: another tokenizer.json, or "bytes" for the built-in one; None takes the folder's.

    Returns:
      The run's folder.

    Raises:
      ValueError: files that do not fit our model or each other; one line naming what.
      OSError: files that cannot be read or written.
    """
    model, output = Path(model), Path(output)
    settings = _json(model / "config.json")
    shape = from_transformers(settings)
    refuse_full(output)
    data, prefix, text = _tokenizer(model, output, settings, tokenizer)
    config = Config(
        name=output.name,
        output=str(output.parent),
        steps=1,
        batch_size=1,
        sequence_length=int(settings.get("max_position_embeddings") or 2048),
        model=shape,
        data=data,
    )
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=0)
    )
    validate(config)
    state = _parameters(model, config, tied=bool(settings.get("tie_word_embeddings")))
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        write_config(staged, config)
        _write(staged / IMPORTED_FILE, {"model": os.fspath(model), "prefix": prefix})
        if text is not None:
            (staged / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        record = dataclasses.asdict(config)
        with Checkpointer(staged / CHECKPOINTS, keep=1, config=record) as checkpointer:
            checkpointer.save(0, {**state, "step": np.int32(0)}, {"imported": os.fspath(model)})
        if output.exists():
            output.rmdir()
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return output


def _parameters(folder: Path, config: Config, *, tied: bool) -> dict[str, Any]:
    """Parameters and routing state, as a training state names them, on the host."""
    read, available = _reader(folder)
    wanted = {tensor.name: tensor for tensor in tensors(config.model)}
    sources = {name: EMBEDDING if tied and name == HEAD else name for name in wanted}
    missing = [source for source in sources.values() if source not in available]
    if missing:
        raise ValueError(f"{folder} has no tensor {missing[0]}")
    # Old files keep the rotary frequencies too; a tied model may keep its head twice.
    surplus = [
        name
        for name in available
        if name not in wanted and not name.endswith(".rotary_emb.inv_freq")
    ]
    if surplus:
        raise ValueError(f"tensor {surplus[0]} of {folder} has no place in this model")
    by_path: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in wanted.values():
        by_path.setdefault(tensor.path, []).append(tensor)
    host = jax.devices("cpu")[0]

    def fill(path, leaf):
        # Layers are stacked: the configurations made here scan over them.
        parts = by_path[tuple(str(key) for key in names(path))]
        out = np.empty(leaf.shape, leaf.dtype)
        for i, tensor in enumerate(parts):
            values = read(sources[tensor.name], tensor.shape)
            out[i if tensor.layer is not None else ...] = values.T if tensor.transposed else values
        return jax.device_put(out, host)

    shapes = abstract_parameters(config)
    return {
        "params": jax.tree_util.tree_map_with_path(fill, shapes["params"]),
        "routing": shapes["routing"],
    }


def _reader(folder: Path) -> tuple[Callable[[str, tuple[int, ...]], np.ndarray], set[str]]:
    """(read(name, shape), names) of a folder's tensors."""
    safetensors_numpy()
    import safetensors

    files = _files(folder)
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as tensors_of:
                where.update(dict.fromkeys(tensors_of.keys(), file))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {_line(error)}") from None

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            with safetensors.safe_open(where[name], framework="numpy") as tensors_of:
                part = tensors_of.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise ValueError(f"{name} is {part.get_dtype()}, not one of {_DTYPES}")
                if tuple(part.get_shape()) != shape:
                    raise ValueError(
                        f"{name} is {tuple(part.get_shape())}, where config.json says {shape}"
                    )
                return tensors_of.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{where[name]} cannot be read: {_line(error)}") from None

    return read, set(where)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise ValueError(f"{folder} has neither {single.name} nor {INDEX}")
        return [single]
    placed = _json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index} has no weight_map")
    files = []
    for name in sorted({str(name) for name in placed.values()}):
        # An index comes from anywhere; it must not lead out of its folder.
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is no file of that folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        files.append(folder / name)
    return files


def _tokenizer(
    model: Path, output: Path, settings: dict[str, Any], chosen: str | os.PathLike[str] | None
) -> tuple[DataConfig, list[int], str | None]:
    """(data configuration, ids in front of every text, content of tokenizer.json or None)."""
    if chosen == BYTES:
        return DataConfig(), [], None
    file = model / TOKENIZER_FILE if chosen is None else Path(chosen)
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: name a tokenizer.json with --tokenizer, or {BYTES!r}"
        )
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = settings.get("eos_token_id")
    # A list holds the token between documents first, then those that end a chat's turn.
    end = end[0] if isinstance(end, list) and end else end
    name = tokenizer.id_to_token(end) if isinstance(end, int) else None
    checked = load_tokenizer(file, name)
    if checked.vocab_size > settings["vocab_size"]:
        raise ValueError(
            f"{file} has ids up to {checked.vocab_size - 1}, config.json only "
            f"vocab_size={settings['vocab_size']}"
        )
    data = DataConfig(tokenizer=os.fspath(output / TOKENIZER_FILE), end_of_document=name)
    return data, tokenizer.encode("").ids, text


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
