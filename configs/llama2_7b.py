"""A dense model of Llama 2 7B's shape (arXiv 2307.09288): dense training compared with others'."""

from train.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)


def config() -> Config:
    """D 4096, 32 layers, 32 heads, SwiGLU of 11,008 neurons, vocabulary 32,000, sequence 4096; 4 M
    tokens a step. SwiGLU has no sparse phase."""
    return Config(
        name="llama2-7b",
        steps=100_000,
        batch_size=1024,
        micro_batches=32,
        sequence_length=4096,
        model=ModelConfig(
            width=4096,
            num_layers=32,
            num_heads=32,
            ffn="swiglu",
            hidden=11_008,
            vocab_size=32_000,
            scan_layers=False,
            remat="dots",
            logits="compute",
        ),
        schedule=ScheduleConfig(sparse_fraction=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every=500),
    )
