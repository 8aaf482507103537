"""Checkpoints that survive kills, full disks and damaged files; the last good one is never lost."""

from train.checkpoint.checkpointer import Checkpointer, Restored
from train.checkpoint.entries import read_config
from train.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "Restored", "read_config"]
