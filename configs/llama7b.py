"""The 7B model: D 4096, 32 layers, 32 heads, sequence 4096, vocabulary 128,256."""

from sparsejax.spec import Sparsity
from train.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)


def config() -> Config:
    """4 M tokens a step, 100,000 steps, of which the recipe has 47% sparse (docs/quality.md);
    parameters sharded over 8 GPUs."""
    return Config(
        name="llama7b",
        steps=100_000,
        batch_size=1024,
        micro_batches=32,
        sequence_length=4096,
        model=ModelConfig(
            width=4096,
            num_layers=32,
            num_heads=32,
            vocab_size=128_256,
            # As measured (docs/scaling.md): collectives start ahead in unrolled layers alone.
            scan_layers=False,
            remat="dots",
            logits="compute",
        ),
        sparsity=Sparsity(m=32, v=128, shared_every=4, attention_projections=True),
        schedule=ScheduleConfig(warmup_steps=2000, sparse_fraction=0.47),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=2000,
            decay="wsd",
            decay_fraction=0.6,
            final_fraction=0.0,
        ),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every=500),
    )
