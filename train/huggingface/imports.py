"""A folder of `transformers` as a run at step 0."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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
    stored = _stored(folder)
    by_path: dict[tuple[str, ...], list[tuple[Stored, Tensor]]] = {}
    # Old files keep the rotary frequencies too; a tied model may keep its head twice.
    surplus = {name for name in stored if not name.endswith(".rotary_emb.inv_freq")}
    for tensor in tensors(config.model):
        surplus.discard(tensor.name)
        name = EMBEDDING if tied and tensor.name == HEAD else tensor.name
        if name not in stored:
            raise ValueError(f"{folder} has no tensor {name}")
        found = stored[name]
        if found.dtype not in _DTYPES:
            raise ValueError(f"{name} is {found.dtype}, not one of {_DTYPES}")
        if found.shape != tensor.shape:
            raise ValueError(f"{name} is {found.shape}, where config.json says {tensor.shape}")
        by_path.setdefault(tensor.path, []).append((found, tensor))
    if surplus:
        raise ValueError(f"tensor {min(surplus)} of {folder} has no place in this model")
    host = jax.devices("cpu")[0]

    def fill(path, leaf):
        # Layers are stacked: the configurations made here scan over them.
        out = np.empty(leaf.shape, leaf.dtype)
        for i, (found, tensor) in enumerate(by_path[tuple(str(key) for key in names(path))]):
            values = found.read()
            out[i if tensor.layer is not None else ...] = values.T if tensor.transposed else values
        return jax.device_put(out, host)

    shapes = abstract_parameters(config)
    return {
        "params": jax.tree_util.tree_map_with_path(fill, shapes["params"]),
        "routing": shapes["routing"],
    }


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with _open(self.file) as file:
            return file.get_tensor(self.name)


def _stored(folder: Path) -> dict[str, Stored]:
    """A folder's tensors by name; their values stay on disk."""
    found = {}
    for path in _files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                found[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return found


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, and its errors in one line."""
    safetensors_numpy()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


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
        raise ValueError(f"{path} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
