"""6 M body parameters: small enough that the tokens of a study bring it near to its best."""

from sparsejax.spec import Sparsity
from train.config import Config, LogConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def config() -> Config:
    """D 256, 8 layers, 32,768 tokens a step; 66 M tokens in all."""
    return Config(
        name="mini",
        steps=2014,
        batch_size=32,
        sequence_length=1024,
        model=ModelConfig(
            width=256,
            num_layers=8,
            num_heads=4,
            scan_layers=False,
            logits="compute",
            loss_chunk=8192,
        ),
        sparsity=Sparsity(m=16, v=128),
        schedule=ScheduleConfig(warmup_steps=40, sparse_fraction=0.5),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=144),
        log=LogConfig(every=10, eval_every=200),
    )
