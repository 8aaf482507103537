"""Data of the trainer: sources of tokens, tokenizers, and batches that resume exactly."""

from train.data.config import DataConfig

__all__ = ["DataConfig"]
