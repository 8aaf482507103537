"""The configuration of a run: frozen dataclasses, the single source of truth.

Every field's docstring is what `--help` shows. Nothing here touches a device: a configuration can
be built, printed and validated on a machine without a GPU. `validate` refuses inconsistent
combinations before anything starts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sparsejax.schedule import Phase
from sparsejax.spec import Precision, Sparsity
from train.data.config import DataConfig
from train.profiling import parse_steps

Ffn = Literal["relu2", "relu2_gated", "swiglu"]
Flips = Literal["none", "sparse", "dense", "both"]
"""Changes of phase: to sparse, and back to dense."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the Llama."""

    width: int = 128
    """Model width D."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Query heads; the head dimension is width / num_heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None means as many as num_heads."""
    ffn: Ffn = "relu2"
    """Feed-forward form: relu2 (two matrices), relu2_gated or swiglu (three matrices)."""
    hidden: int | None = None
    """FFN neurons H; None means 4 D for relu2 and 8/3 D for the gated forms, rounded up to a
    multiple of 128 for swiglu and of 512 for relu2_gated. Sparse kernels take multiples of 128
    neurons of an expert (M/4 experts), so that 512 serves sparsity.m up to 16, and 32 may need
    another H; it does not follow sparsity.m, on which no model's size should depend. Of a mixture
    all experts' together; None gives a token 4 D of them."""
    experts: int = 0
    """Experts of a mixture in the place of each FFN (ffn=relu2, mesh.tensor=1); 0 for one network.
    A sparse phase takes a power of two up to 32, and sparsity.m four times as large; twice that, or
    four times, .. up to 128 routes tokens to one of 2, 4, .. clusters of each expert's neurons,
    where at least 256 are left in one."""
    experts_per_token: int = 2
    """Experts of a mixture that a token meets."""
    vocab_size: int | None = None
    """Rows of the embedding and columns of the head; None takes the tokenizer's, rounded up to a
    multiple of 128."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    qk_norm: bool = False
    """Normalise each head's queries and keys (RMSNorm with a learned gain) before the rotation:
    bounds attention logits, so that high learning rates stay stable."""
    init_scale: float = 1.0
    """Multiplies the standard deviation 1/sqrt(fan_in) of the initialisation (truncated normal) of
    every linear layer within the blocks."""
    output_scale: float | None = None
    """Multiplies that of the two matrices of a block that write to the residual stream; None is
    1/sqrt(2 num_layers), 0 starts every block as the identity."""
    embedding_scale: float | None = None
    """Standard deviation of the embedding's initialisation; None is 1/sqrt(width)."""
    head_scale: float = 1.0
    """Multiplies the standard deviation 1/sqrt(width) of the head's initialisation; 0 starts with
    equally likely tokens."""
    scan_layers: bool = True
    """Compile one block and scan it over the layers (fast compilation) instead of unrolling
    them."""
    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialisation in the backward pass: keep everything, keep only matrix products' outputs,
    or recompute each block from its input. Results of attention kernels count as products'."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """Attention kernel: cuDNN flash attention, XLA's own, or cuDNN where it runs and XLA
    elsewhere."""
    norm: Literal["auto", "kernel", "xla"] = "auto"
    """RMSNorm over the width: kernels that read and write everything once and keep the result, not
    the input, for the backward pass (a gain of exactly zero then has no gradient); XLA's; or the
    kernels where they run and XLA's elsewhere."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations and matrix products; auto is bfloat16 on a GPU and float32 elsewhere.
    Master weights are always float32."""
    ffn_precision: Precision = "compute"
    """Operands of the FFN's products: of the compute dtype, or fp8, 8-bit floats (e4m3, gradients
    e5m2), which sm_89 and later multiply faster. Of dense steps all six, with a scale for each
    tensor; of sparse ones the four with a 2:4 operand, where kernels serve them (on Hopper,
    ffn=relu2), whose weights then are gathered in 8 bits too, and a warning otherwise. What reads a
    finished run uses the compute dtype."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at the same time in the cross-entropy; bounds the memory of
    large vocabularies."""
    logits: Literal["float32", "compute"] = "float32"
    """Type in which the cross-entropy stores a chunk's logits between product and softmax; compute
    is that of activations, and halves their traffic. The softmax is computed in float32."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def residual_scale(self) -> float:
        """Multiplies the initialisation of what writes to the residual stream."""
        default = (2 * self.num_layers) ** -0.5
        return default if self.output_scale is None else self.output_scale

    @property
    def gated(self) -> bool:
        """Whether the FFN has a third matrix."""
        return self.ffn != "relu2"

    @property
    def active_experts(self) -> int:
        """Experts that a token meets; 1 without a mixture."""
        return self.experts_per_token if self.experts else 1

    @property
    def ffn_hidden(self) -> int:
        """FFN neurons H."""
        if self.hidden is not None:
            return self.hidden
        if not self.gated:
            return 4 * self.width * max(self.experts, 1) // max(self.active_experts, 1)
        multiple = 512 if self.ffn == "relu2_gated" else 128
        return -(-8 * self.width // 3 // multiple) * multiple


@dataclass(frozen=True)
class ScheduleConfig:
    """The phases: dense warm-up, then sparse, then dense to the end. In steps of the optimiser."""

    warmup_steps: int = 0
    """Dense steps before the sparse phase, so that the clusters are made from neurons that mean
    something."""
    sparse_fraction: float = 0.0
    """Share of the whole run's steps that are sparse, right after the warm-up; 0 trains densely
    throughout."""
    rescale_dense: bool = False
    """At the flip back to dense, estimate beta again and multiply each 2:4 matrix by the frozen
    beta over the new one, so that the dense network continues at the sparse one's scale; the new
    one stays, so that the sparse view of the weights does not change."""
    threshold_dense: bool = False
    """At the flip back to dense, replace each 2:4 matrix by what the sparse phase multiplied with,
    beta S(w): weights that it left out start from zero, and not from where they drifted."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and its learning rate over the steps."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    attention_rate: float = 1.0
    """Multiplies the learning rate, and with it the decay, of the attention's four matrices."""
    ffn_rate: float = 1.0
    """Multiplies the learning rate, and with it the decay, of the FFN's matrices, of a mixture's
    router too."""
    embedding_rate: float = 1.0
    """Multiplies the learning rate of the embedding."""
    head_rate: float = 1.0
    """Multiplies the learning rate, and with it the decay, of the head."""
    warmup_steps: int = 20
    """Steps of linear learning-rate warm-up."""
    decay: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate falls from the peak to its end: along a cosine, linearly, or linearly
    after a constant stretch (warm-up, stable, decay)."""
    decay_fraction: float = 0.2
    """Share of the run's steps in which it falls, with decay=wsd."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    rewarm_steps: int = 0
    """Steps over which the learning rate is brought back linearly from zero after changes of phase;
    0 leaves it alone."""
    rewarm_at: Flips = "both"
    """Changes of phase after which it is brought back: that to sparse, that to dense, or both."""
    reset_moments: Flips = "none"
    """Changes of phase at which Adam's moments, and its count of steps, start over from zero; none
    keeps them."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (not on norms or embeddings)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh: batch over data and fsdp, parameters over fsdp, heads and neurons over
    tensor."""

    data: int = -1
    """Devices along the pure data-parallel axis; -1 takes what the other axes leave."""
    fsdp: int = 1
    """Devices over which parameters and optimiser state are sharded."""
    tensor: int = 1
    """Devices over which heads and FFN neurons are sharded."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and how many copies are kept."""

    every: int = 200
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 3
    """Checkpoints kept; older ones are deleted."""
    final: bool = True
    """Save the state at the end of the run. Without it a finished run cannot be used or continued:
    for studies, of which only the log is wanted."""


@dataclass(frozen=True)
class LogConfig:
    """What is printed and written while training."""

    every: int = 10
    """Steps between log lines; the host waits for the device only then."""
    eval_every: int = 100
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    eval_windows: int = 64
    """Held-out windows of an evaluation, the first ones; 0 takes all there are."""
    tensorboard: bool = False
    """Write TensorBoard event files as well (needs the tensorboard extra)."""
    wandb: bool = False
    """Log to Weights & Biases as well (the wandb extra; without it a warning, and the run goes on
    without; WANDB_MODE=offline works)."""
    wandb_project: str = "sparsejax"
    """Project at Weights & Biases."""
    wandb_entity: str | None = None
    """User or team at Weights & Biases; None takes the account's default."""


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced with JAX's profiler."""

    steps: str | None = None
    """Steps to trace, as A:B for A to B - 1 counted from 0; the trace is written to the run's
    folder."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    name: str = "run"
    """Name of the run; its folder is output/name."""
    output: str = "runs"
    """Folder that holds the runs' folders."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    batch_size: int = 8
    """Sequences a step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts of the batch that run one after another, their gradients averaged; bounds memory.
    Weights are thresholded
    and packed once for all of them."""
    sequence_length: int = 256
    """Tokens of a sequence."""
    seed: int = 0
    """Seeds initialisation, and the order of the data unless data.seed does."""
    init_from: str | None = None
    """Folder of a run, trained here or imported, whose newest checkpoint gives the parameters to
    start with; the model must be the same, optimiser and schedule start afresh."""
    deterministic: bool = False
    """Bit-exact repeats and resumes on a GPU too, at some cost in speed: deterministic XLA
    operations and attention."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The Llama."""
    sparsity: Sparsity = field(default_factory=Sparsity)
    """What is sparse in the sparse phase."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The phases."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logs and evaluation."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of steps."""

    @property
    def data_seed(self) -> int:
        """Seeds the order of the data."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def sparse_steps(self) -> int:
        """Length of the sparse phase in steps.

        Raises:
          ValueError: the fraction is not one.
        """
        fraction = self.schedule.sparse_fraction
        if not 0 <= fraction <= 1:
            raise ValueError(f"schedule.sparse_fraction={fraction} must be in [0, 1]")
        return round(fraction * self.steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all devices."""
        return self.batch_size * self.sequence_length

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one micro-batch over all devices; each device routes its part together."""
        return self.tokens_per_step // self.micro_batches


def flips(where: Flips) -> tuple[Phase, ...]:
    """The phases that begin at these changes."""
    phases: tuple[Phase, ...] = ("sparse", "dense")
    return tuple(phase for phase in phases if where in (phase, "both"))


def resolve(config: Config, *, tokenizer_vocab_size: int) -> Config:
    """Returns `config` with every None that depends on the tokenizer or other fields filled in.

    Raises:
      ValueError: as `validate`.
    """
    _require_representable(config)
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=-(-tokenizer_vocab_size // 128) * 128)
    model = dataclasses.replace(model, hidden=model.ffn_hidden, num_kv_heads=model.kv_heads)
    sparsity = config.sparsity
    if sparsity.shards is None:
        # Part of what is computed, not of where: written down, so that another mesh continues it.
        sparse_routing = config.sparse_steps > 0 and sparsity.routing
        shards = config.mesh.tensor if sparse_routing else 1
        sparsity = dataclasses.replace(sparsity, shards=shards)
    config = dataclasses.replace(config, model=model, sparsity=sparsity)
    validate(config, tokenizer_vocab_size=tokenizer_vocab_size)
    return config


def _validate_experts(config: Config) -> None:
    """Refuses a mixture of experts that cannot be built."""
    model, sparsity = config.model, config.sparsity
    if model.ffn != "relu2" or model.ffn_precision != "compute":
        raise ValueError(
            f"model.experts={model.experts} needs model.ffn=relu2 and model.ffn_precision=compute, "
            f"not {model.ffn} and {model.ffn_precision}"
        )
    if not 1 <= model.experts_per_token <= model.experts:
        raise ValueError(
            f"model.experts_per_token={model.experts_per_token} must be 1 to "
            f"model.experts={model.experts}"
        )
    if model.ffn_hidden % (4 * model.experts):
        raise ValueError(
            f"model.hidden={model.ffn_hidden} must be a multiple of 4 model.experts="
            f"{4 * model.experts}"
        )
    if config.mesh.tensor != 1:
        raise ValueError(
            f"mesh.tensor={config.mesh.tensor} must be 1 with model.experts={model.experts}: a "
            "mixture is spread over data and fsdp"
        )
    if config.sparse_steps:
        sparsity.validate_experts(hidden=model.ffn_hidden, num_experts=model.experts)
        if sparsity.dense_layers:
            raise ValueError(
                f"sparsity.dense_layers={sparsity.dense_layers} must be 0 with model.experts="
                f"{model.experts}: all layers of a mixture are sparse together"
            )


def _require_representable(config: Any, prefix: str = "") -> None:
    """Refuses infinities and NaN, and integers that overflow the device's 32 bits.

    A larger seed would not fail: JAX drops its upper bits, and two seeds would be the same.
    """
    for field_ in dataclasses.fields(config):
        name, value = f"{prefix}{field_.name}", getattr(config, field_.name)
        if dataclasses.is_dataclass(value):
            _require_representable(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
        elif isinstance(value, int) and field_.name == "seed":
            if not 0 <= value < 2**32:
                raise ValueError(f"{name}={value} must be between 0 and 2^32 - 1")
        elif isinstance(value, int) and abs(value) >= 2**31:
            raise ValueError(f"{name}={value} does not fit into 32 bits")


@functools.cache
def _model_choices() -> dict[str, tuple]:
    """The fields of a model that are one of several words, and the words."""
    # A study's command reads them for thousands of runs; annotations are compiled at each reading.
    hints = get_type_hints(ModelConfig)
    return {name: get_args(kind) for name, kind in hints.items() if get_origin(kind) is Literal}


def validate(config: Config, *, tokenizer_vocab_size: int | None = None) -> None:
    """Refuses a configuration that cannot run, before anything starts.

    Args:
      config: the run.
      tokenizer_vocab_size: ids the tokenizer can produce, when it is known.

    Raises:
      ValueError: one line that names the offending values.
    """
    _require_representable(config)
    model, schedule, optimizer = config.model, config.schedule, config.optimizer
    # First of all: whatever is no known form would pass for another one below.
    for name, known in _model_choices().items():
        if (chosen := getattr(model, name)) not in known:
            raise ValueError(f"model.{name}={chosen!r} must be one of {known}")
    folder = PurePath(config.name)
    if folder.is_absolute() or not folder.name or ".." in folder.parts:
        raise ValueError(f"name={config.name!r} must be that of a folder in {config.output!r}")
    for name, value in (
        ("steps", config.steps),
        ("batch_size", config.batch_size),
        ("micro_batches", config.micro_batches),
        ("sequence_length", config.sequence_length),
        ("model.width", model.width),
        ("model.num_layers", model.num_layers),
        ("model.num_heads", model.num_heads),
        ("model.kv_heads", model.kv_heads),
        ("model.hidden", model.ffn_hidden),
        ("model.vocab_size", 1 if model.vocab_size is None else model.vocab_size),
        ("model.loss_chunk", model.loss_chunk),
        ("log.every", config.log.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("mesh.fsdp", config.mesh.fsdp),
        ("mesh.tensor", config.mesh.tensor),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name, value in (
        ("schedule.warmup_steps", schedule.warmup_steps),
        ("optimizer.warmup_steps", optimizer.warmup_steps),
        ("optimizer.rewarm_steps", optimizer.rewarm_steps),
        ("checkpoint.every", config.checkpoint.every),
        ("log.eval_every", config.log.eval_every),
        ("log.eval_windows", config.log.eval_windows),
    ):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    for name, where in (
        ("optimizer.rewarm_at", optimizer.rewarm_at),
        ("optimizer.reset_moments", optimizer.reset_moments),
    ):
        if where not in get_args(Flips):
            raise ValueError(f"{name}={where!r} must be one of {get_args(Flips)}")
    two_of_four = config.sparsity.weights or config.sparsity.attention_projections
    for name, why in (
        ("rescale_dense", "beta scales 2:4 weights"),
        ("threshold_dense", "others are not thresholded"),
    ):
        if getattr(schedule, name) and config.sparse_steps and not two_of_four:
            raise ValueError(f"schedule.{name}=True needs sparsity.weights=True: {why}")
    if schedule.rescale_dense and schedule.threshold_dense:
        raise ValueError(
            "schedule.rescale_dense=True and threshold_dense=True: thresholded weights have the "
            "sparse network's scale already"
        )
    parse_steps(config.profile.steps, steps=config.steps)
    for name, number in (
        ("model.norm_eps", model.norm_eps),
        ("optimizer.eps", optimizer.eps),
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("model.output_scale", model.residual_scale),
        ("model.embedding_scale", model.embedding_scale or 0.0),
        ("model.head_scale", model.head_scale),
    ):
        if number < 0:
            raise ValueError(f"{name}={number} must not be negative")
    if not model.rope_theta > 0:
        raise ValueError(f"model.rope_theta={model.rope_theta} must be positive")
    for name, fraction in (
        ("optimizer.b1", optimizer.b1),
        ("optimizer.b2", optimizer.b2),
    ):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}={fraction} must be in [0, 1)")
    for name, rate in (
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.attention_rate", optimizer.attention_rate),
        ("optimizer.ffn_rate", optimizer.ffn_rate),
        ("optimizer.embedding_rate", optimizer.embedding_rate),
        ("optimizer.head_rate", optimizer.head_rate),
    ):
        if not rate > 0:
            raise ValueError(f"{name}={rate} must be positive")
    if optimizer.decay not in ("cosine", "linear", "wsd"):
        raise ValueError(f"optimizer.decay={optimizer.decay!r} must be cosine, linear or wsd")
    if not 0 < optimizer.decay_fraction <= 1:
        raise ValueError(f"optimizer.decay_fraction={optimizer.decay_fraction} must be in (0, 1]")
    if not 0 <= optimizer.final_fraction <= 1:
        raise ValueError(f"optimizer.final_fraction={optimizer.final_fraction} must be in [0, 1]")
    if not model.init_scale > 0:
        raise ValueError(f"model.init_scale={model.init_scale} must be positive")
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of "
            f"micro_batches={config.micro_batches}"
        )
    if schedule.warmup_steps + config.sparse_steps > config.steps:
        raise ValueError(
            f"schedule.warmup_steps={schedule.warmup_steps} and the {config.sparse_steps} sparse "
            f"steps of schedule.sparse_fraction={schedule.sparse_fraction} exceed "
            f"steps={config.steps}"
        )
    if optimizer.warmup_steps > config.steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} exceeds steps={config.steps}"
        )
    if model.width % model.num_heads:
        raise ValueError(
            f"model.width={model.width} must be a multiple of model.num_heads={model.num_heads}"
        )
    if model.head_dim % 2:
        raise ValueError(
            f"head dimension {model.head_dim} (model.width={model.width} / "
            f"model.num_heads={model.num_heads}) must be even for rotary positions"
        )
    if model.num_heads % model.kv_heads:
        raise ValueError(
            f"model.num_heads={model.num_heads} must be a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}"
        )
    if model.experts < 0:
        raise ValueError(f"model.experts={model.experts} must not be negative")
    if model.experts:
        _validate_experts(config)
    if model.attention == "cudnn" and model.head_dim > 128:
        raise ValueError(
            f"model.attention=cudnn serves head dimensions up to 128, not {model.head_dim}"
        )
    if model.attention == "cudnn" and model.compute_dtype == "float32":
        raise ValueError(f"model.attention=cudnn needs bfloat16, not {model.compute_dtype}")
    if model.vocab_size is not None and model.vocab_size < (tokenizer_vocab_size or 0):
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer_vocab_size}"
        )
    if config.mesh.tensor > 1 and (
        model.num_heads % config.mesh.tensor or model.kv_heads % config.mesh.tensor
    ):
        raise ValueError(
            f"model.num_heads={model.num_heads} and kv heads {model.kv_heads} must be multiples of "
            f"mesh.tensor={config.mesh.tensor}"
        )
    if config.sparse_steps and config.sparsity.attention_projections and config.mesh.tensor > 1:
        raise ValueError(
            f"sparsity.attention_projections=True needs mesh.tensor=1, not {config.mesh.tensor}; "
            "--sparsity.no-attention-projections leaves them dense"
        )
    if config.sparse_steps:
        if model.ffn == "swiglu":
            raise ValueError(
                "model.ffn=swiglu has no sparse phase (its activations have no zeros); use relu2 "
                "or relu2_gated, or schedule.sparse_fraction=0 instead of "
                f"{schedule.sparse_fraction}"
            )
        config.sparsity.validate(
            width=model.width, hidden=model.ffn_hidden, tokens=config.tokens_per_micro_batch
        )
        if config.sparsity.dense_layers >= model.num_layers:
            raise ValueError(
                f"sparsity.dense_layers={config.sparsity.dense_layers} leaves none of "
                f"model.num_layers={model.num_layers} sparse; schedule.sparse_fraction=0 makes "
                "every step dense"
            )
