"""The 1B model: D 2048, 25 layers, 16 heads, sequence 4096, vocabulary 128,256."""

from sparsejax.spec import Sparsity
from train.config import CheckpointConfig, Config, ModelConfig, OptimizerConfig, ScheduleConfig


def config() -> Config:
    """1 M tokens a step, 60,000 steps, of which the recipe has 47% sparse (docs/quality.md)."""
    return Config(
        name="llama1b",
        steps=60_000,
        batch_size=256,
        micro_batches=32,  # 8 sequences a device at a time fill an H100's 80 GB.
        sequence_length=4096,
        model=ModelConfig(
            width=2048,
            num_layers=25,
            num_heads=16,
            vocab_size=128_256,
            # What was fastest on an H100 (docs/training_speed.md).
            scan_layers=False,
            remat="dots",
            logits="compute",
        ),
        sparsity=Sparsity(m=32, v=128, shared_every=4, attention_projections=True),
        schedule=ScheduleConfig(warmup_steps=1200, sparse_fraction=0.47),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            warmup_steps=5000,
            weight_decay=0.033,
            decay="wsd",
            decay_fraction=0.6,
            final_fraction=0.0,
        ),
        checkpoint=CheckpointConfig(every=500),
    )
