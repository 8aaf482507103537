"""85 M body parameters: what a study on `small` found, at more than three times the size."""

from sparsejax.spec import Sparsity
from train.config import Config, LogConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def config() -> Config:
    """D 768, 12 layers, 16,384 tokens a step; 66 M tokens in all."""
    return Config(
        name="medium",
        steps=4028,
        batch_size=16,
        sequence_length=1024,
        model=ModelConfig(
            width=768,
            num_layers=12,
            num_heads=12,
            scan_layers=False,
            logits="compute",
            loss_chunk=8192,
        ),
        sparsity=Sparsity(m=16, v=128),
        schedule=ScheduleConfig(warmup_steps=81, sparse_fraction=0.5),
        optimizer=OptimizerConfig(learning_rate=1.7e-3, warmup_steps=288),
        log=LogConfig(every=10, eval_every=500),
    )
