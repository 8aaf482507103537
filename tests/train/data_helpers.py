"""Files and expectations that the tests of train.data share."""

import lzma
from pathlib import Path

import numpy as np

from train.data.config import DataConfig
from train.data.pipeline import Data, open_data


def write_shard(path: Path, tokens: np.ndarray, dtype: str = "uint16") -> Path:
    """Writes tokens in the format that the file's name asks for."""
    if path.suffix == ".npy":
        np.save(path, tokens.astype(dtype))
        return path
    content = tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


def open_small(cfg: DataConfig, **kwargs) -> Data:
    """open_data with small sizes."""
    sizes = {"sequence_length": 8, "global_batch": 4, "seed": 0, **kwargs}
    return open_data(cfg, **sizes)


def take(iterator, count: int) -> np.ndarray:
    """(count, B, S + 1) windows of the next batches; checks their form on the way."""
    batches = []
    for _ in range(count):
        batch = next(iterator)
        inputs, targets = batch["inputs"], batch["targets"]
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.shape == targets.shape
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        batches.append(np.concatenate([inputs, targets[:, -1:]], axis=1))
    return np.stack(batches)
