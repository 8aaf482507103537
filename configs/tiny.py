"""All three phases on embedded text in about a minute on a laptop's CPU, unchanged on a GPU."""

from sparsejax.spec import Sparsity
from train.config import Config, LogConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def config() -> Config:
    """D 128, 2 layers, 2,048 tokens a step."""
    return Config(
        name="tiny",
        steps=300,
        batch_size=8,
        sequence_length=256,
        model=ModelConfig(width=128, num_layers=2, num_heads=4),
        sparsity=Sparsity(m=16, v=128, refresh_every=80, bias_rate=0.01),
        schedule=ScheduleConfig(warmup_steps=30, sparse_fraction=0.5),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
        log=LogConfig(every=10, eval_every=100, eval_windows=32),
    )
