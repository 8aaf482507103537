"""Parameters, FLOPs and memory of a run, computed from its configuration alone.

Everything here takes a configuration as `train.config.resolve` returns it and needs no device. The
formulas are derived in docs/accounting.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sparsejax import stored_once
from sparsejax.routing.tokens import padded_tokens as routed_rows
from sparsejax.spec import GROUP
from train.config import Config

BYTES_FLOAT32 = 4

METADATA_BYTES = 128 * 4 / 64**2
"""2:4 metadata an element of the dense operand: 128 int32 for each tile of 64 x 64."""


class _Parts:
    """A record of numbers that add up."""

    def items(self) -> Iterator[tuple[str, int]]:
        """Name and number of each part, in order."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            yield field.name, getattr(self, field.name)

    @property
    def total(self) -> int:
        """The parts' sum."""
        return sum(number for _, number in self.items())

    def shares(self) -> dict[str, float]:
        """Each part as a fraction of the total."""
        return {name: number / self.total for name, number in self.items()}


@dataclass(frozen=True)
class Parameters(_Parts):
    """Trained parameters by component."""

    embedding: int
    projections: int
    """Attention's query, key, value and output matrices, all layers."""
    ffn: int
    norms: int
    """Gains of the two norms of each block, of its heads with qk_norm, and of the final one."""
    head: int
    router: int = 0
    """Of mixtures of experts."""

    @property
    def body(self) -> int:
        """Without embedding and head: the number that scaling laws usually mean."""
        return self.projections + self.ffn + self.norms + self.router


@dataclass(frozen=True)
class Flops(_Parts):
    """FLOPs of one optimiser step over all devices, by component; a multiply-add counts two."""

    ffn: int
    projections: int
    attention: int
    """Scores and weighted values."""
    head: int
    router: int = 0
    """Similarities of tokens and cluster centres, zero in a dense step; of a mixture, its router's
    products too."""


@dataclass(frozen=True)
class Product:
    """One matrix product of the feed-forward network, all layers and tokens together.

    Attributes:
      name: the product in the symbols of docs/accounting.md.
      backward: whether it belongs to the backward pass.
      operand: the operand that may be 2:4.
      sparse: whether a sparse step runs it on a 2:4 operand.
      dense_flops: FLOPs of a dense step.
      sparse_flops: FLOPs that a sparse step executes.
    """

    name: str
    backward: bool
    operand: str
    sparse: bool
    dense_flops: int
    sparse_flops: int


@dataclass(frozen=True)
class Memory(_Parts):
    """Estimated bytes on one device, at the peak of a step."""

    master_weights: int
    adam_moments: int
    gradients: int
    weight_copies: int
    """Weights in the compute dtype, and in a sparse step the packed ones."""
    activations: int
    """What the forward pass keeps for the backward pass, and the block that it is at."""
    logits_chunk: int


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int
    fsdp: int
    tensor: int

    @property
    def size(self) -> int:
        """All devices."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class RunSummary:
    """The whole run.

    Attributes:
      steps: optimiser steps.
      sparse_steps: how many of them are sparse.
      tokens: tokens seen, repeats included.
      sparse_tokens: tokens of the sparse steps.
      flops: FLOPs executed.
      dense_flops: FLOPs that the same run without a sparse phase would execute.
      tokens_per_parameter: tokens over all parameters but the embedding's.
    """

    steps: int
    sparse_steps: int
    tokens: int
    sparse_tokens: int
    flops: int
    dense_flops: int
    tokens_per_parameter: float

    @property
    def sparse_share(self) -> float:
        """Sparse steps as a fraction of all steps (p)."""
        return self.sparse_steps / self.steps


def parameters(config: Config) -> Parameters:
    """Returns the number of trained parameters.

    Raises:
      ValueError: the vocabulary is not resolved.
    """
    m = config.model
    heads, kv_heads = m.num_heads * m.head_dim, m.kv_heads * m.head_dim
    of_heads = 2 * m.num_layers * m.head_dim if m.qk_norm else 0
    return Parameters(
        embedding=_vocabulary(config) * m.width,
        projections=m.num_layers * m.width * (2 * heads + 2 * kv_heads),
        ffn=m.num_layers * _ffn_matrices(config) * m.width * m.ffn_hidden,
        norms=(2 * m.num_layers + 1) * m.width + of_heads,
        head=m.width * _vocabulary(config),
        router=m.num_layers * m.width * m.experts,
    )


def dense_flops(config: Config) -> Flops:
    """Returns the FLOPs of one dense step: forward and backward, without rematerialisation.

    Raises:
      ValueError: the vocabulary is not resolved.
    """
    m, tokens = config.model, config.tokens_per_step
    count = parameters(config)
    # Scores and weighted values are 4 S^2 D each forward pass and sequence; the causal half of that
    # is computed.
    attention = 2 * tokens * config.sequence_length * m.num_heads * m.head_dim * m.num_layers
    return Flops(
        ffn=3 * 2 * tokens * count.ffn * m.active_experts // max(m.experts, 1),
        projections=3 * 2 * tokens * count.projections,
        attention=3 * attention,
        head=3 * 2 * tokens * count.head,
        router=3 * 2 * tokens * count.router,
    )


def sparse_flops(config: Config) -> Flops:
    """Returns the FLOPs that one sparse step executes.

    Routing leaves 4 / M of each of the FFN's products, and all of what belongs to shared neurons; a
    2:4 operand halves its product. SwiGLU has no sparse step: its numbers are the dense ones.
    Padding of the experts' tokens to multiples of V is not counted; see `padded_tokens`. Every
    group of neurons (a shard of the clusters, or a device of the tensor axis) chooses among E
    experts of its own.

    Raises:
      ValueError: the vocabulary is not resolved.
    """
    dense = dense_flops(config)
    if config.model.ffn == "swiglu":
        return dense
    experts, layers = config.sparsity.num_experts, sparse_layers(config)
    centers = experts * neuron_groups(config)
    similarities = config.tokens_per_step * config.model.width * centers * layers
    router = 2 * similarities if experts > 1 else 0
    if config.model.experts:
        # Whole experts have no centres.
        router = router if experts > config.model.experts else 0
        ffn = sum(product.sparse_flops for product in ffn_products(config))
        return dataclasses.replace(dense, ffn=ffn, router=dense.router + router)
    # Of a projection's three products a 2:4 weight serves one: forward, or the input's gradient.
    halved = dense.projections // 6 * layers // config.model.num_layers
    halved = halved if config.sparsity.attention_projections else 0
    return dataclasses.replace(
        dense,
        ffn=sum(product.sparse_flops for product in ffn_products(config)),
        projections=dense.projections - halved,
        router=router,
    )


def sparse_layers(config: Config) -> int:
    """Returns the layers that are sparse in a sparse step."""
    return config.model.num_layers - config.sparsity.dense_layers


def ffn_products(config: Config) -> tuple[Product, ...]:
    """Returns the feed-forward network's products: six, and nine in the gated forms."""
    m, s = config.model, config.sparsity
    every = 2 * config.tokens_per_step * m.width * m.ffn_hidden * m.num_layers
    # A mixture's dense step computes what routing to experts leaves as well, and not to clusters.
    dense = every * m.active_experts // max(m.experts, 1)
    # Of so many neurons a token meets these; with experts, clusters of each are what is routed.
    met, of = s.live_neurons(m.ffn_hidden), m.ffn_hidden
    if m.experts:
        met, of = 1, max(s.num_experts // m.experts, 1)
    no_zeros = m.ffn == "swiglu"
    # What a product executes of its operand: half of a 2:4 one.
    weights, activations = (0.5 if on else 1.0 for on in (s.weights, s.activations))
    tokens = 1.0
    if s.weight_gradient == "tokens24":
        live = s.live_neurons(m.ffn_hidden)
        whole = s.densest(live) / live
        tokens = whole + (1 - whole) / 2
    rows = [("Y1 = X W1", False, "W1", weights)]
    if m.gated:
        rows += [("Yg = X Wg", False, "Wg", weights)]
    rows += [
        ("Y3 = Y2 W2", False, "Y2", activations),
        ("dY2 = dY3 W2^T", True, "W2^T", weights),
        ("dX = dY1 W1^T", True, "dY1", activations),
    ]
    if m.gated:
        rows += [("dX += dYg Wg^T", True, "dYg", activations)]
    rows += [("dW2 = Y2^T dY3", True, "Y2^T", tokens), ("dW1 = X^T dY1", True, "dY1", tokens)]
    if m.gated:
        rows += [("dWg = X^T dYg", True, "dYg", tokens)]
    products = []
    for name, backward, operand, share in rows:
        executed = dense if no_zeros else round(share * dense) * met // of
        # Layers that stay dense execute all of theirs.
        executed += (dense - executed) // m.num_layers * (m.num_layers - sparse_layers(config))
        sparse = share < 1 and not no_zeros
        products.append(Product(name, backward, operand, sparse, dense, executed))
    return tuple(products)


def recomputed_flops(config: Config, *, sparse: bool = False) -> int:
    """Returns the FLOPs that rematerialisation adds to a step; MFU and shares leave them out.

    `full` repeats the forward pass of every block but for its last product, Y2 W2, which nothing in
    the backward pass reads (the gates of a mixture do); `dots` that of XLA's own attention (its
    products have batch dimensions); "auto" is taken for cuDNN's, whose result is kept.
    """
    m = config.model
    dense = dense_flops(config)
    flops = sparse_flops(config) if sparse else dense
    if m.remat == "none":
        return 0
    if m.remat == "dots":
        return flops.attention // 3 if m.attention == "xla" else 0
    products = [p for p in ffn_products(config) if not p.backward]
    if not m.experts:
        products.pop()
    ffn = sum(p.sparse_flops if sparse else p.dense_flops for p in products)
    projections = dense.projections // 3
    if sparse and config.sparsity.attention_projections and m.ffn != "swiglu":
        # Forward the 2:4 weights are those of queries, keys and values.
        weights = 2 * m.num_heads + 2 * m.kv_heads
        sparse_share = sparse_layers(config) / m.num_layers
        projections -= round(projections * (weights - m.num_heads) / weights / 2 * sparse_share)
    # A mixture's router learns; similarities to centres have no backward pass.
    router = dense.router // 3 + flops.router - dense.router
    return ffn + projections + flops.attention // 3 + router


def neuron_groups(config: Config) -> int:
    """Returns the groups of neurons that are laid out each on its own: shards of the clusters or
    devices of the tensor axis, whichever are more."""
    return max(config.sparsity.num_shards, config.mesh.tensor)


def device_tokens(config: Config, devices: int | None = None) -> int:
    """Returns the tokens that a device routes together: its part of one micro-batch.

    Args:
      config: the run.
      devices: all devices; None for as few as the configuration allows.

    Raises:
      ValueError: as `mesh_shape`.
    """
    shape = mesh_shape(config, devices)
    return config.tokens_per_micro_batch // (shape.data * shape.fsdp)


def padded_tokens(config: Config, devices: int | None = None) -> int:
    """Returns the rows that the experts' products of a sparse step are laid out for, over all
    devices that share the batch.

    On each device and in each micro-batch the tokens of each of E experts are padded to a multiple
    of V (`sparsejax.routing.tokens.padded_tokens`). Of a mixture every token counts as often as it
    has experts.

    Args:
      config: the run.
      devices: all devices; None for as few as the configuration allows.

    Raises:
      ValueError: as `mesh_shape`.
    """
    s, each = config.sparsity, config.model.active_experts
    if s.num_experts == 1:
        return config.tokens_per_step * each
    tokens = device_tokens(config, devices)
    parts = config.tokens_per_step // tokens
    return parts * routed_rows(tokens * each, s.num_experts, s.v)


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Returns the model FLOPs utilisation (arXiv 2204.02311, appendix B).

    Args:
      flops: of the *dense* step over all devices, whatever phase is measured
        (`dense_flops(config).total`), so that a sparse step is credited with the work it replaces.
      seconds: time of the step.
      peak_flops: dense bf16 peak of all devices together, FLOP/s.

    Raises:
      ValueError: a number is not positive.
    """
    for name, value in (("flops", flops), ("seconds", seconds), ("peak_flops", peak_flops)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    return flops / seconds / peak_flops


def amdahl(share: float, gain: float) -> float:
    """Returns 1 / (1 - f + f / s): what a gain s on a share f of the work leaves for the whole.

    With shares of FLOPs it bounds a count of FLOPs, with shares of time a speed. A run whose share
    p of steps gains s is the same formula.

    Raises:
      ValueError: the share is outside [0, 1] or the gain is not positive.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{share=} must be in [0, 1]")
    if not gain > 0:
        raise ValueError(f"{gain=} must be positive")
    return 1 / (1 - share + share / gain)


def mesh_shape(config: Config, devices: int | None = None) -> MeshShape:
    """Returns the mesh with its -1 filled in.

    Args:
      config: the run.
      devices: all devices; None for as few as the configuration allows.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or do not divide the batch.
    """
    m = config.mesh
    rest = m.fsdp * m.tensor
    data = m.data if m.data != -1 else max((devices or rest) // rest, 1)
    result = MeshShape(data, m.fsdp, m.tensor)
    if devices is not None and result.size != devices:
        raise ValueError(
            f"mesh.data={m.data} mesh.fsdp={m.fsdp} mesh.tensor={m.tensor}: {devices=}"
        )
    rows = config.batch_size // config.micro_batches
    if rows % (data * m.fsdp):
        raise ValueError(
            f"batch_size={config.batch_size} / micro_batches={config.micro_batches} must be a "
            f"multiple of data*fsdp={data * m.fsdp}"
        )
    return result


def memory(config: Config, *, devices: int | None = None, sparse: bool = False) -> Memory:
    """Returns an estimate of the bytes that one device holds at the peak of a step.

    It counts arrays that must exist, not the compiler's temporaries, its padding or the allocator's
    fragments: leave a tenth of the device free. docs/accounting.md gives each term.

    Args:
      config: the run.
      devices: all devices; None for as few as the configuration allows.
      sparse: whether for a step of the sparse phase.

    Raises:
      ValueError: as `mesh_shape`, or the vocabulary is not resolved.
    """
    m, s = config.model, config.sparsity
    shape = mesh_shape(config, devices)
    sharded = shape.fsdp * shape.tensor
    count = parameters(config)
    # Norm gains and routers are replicated, everything else is sharded over both axes.
    everywhere = count.norms + count.router
    held = (count.total - everywhere) // sharded + everywhere
    size = 4 if m.compute_dtype == "float32" else 2  # "auto" is bfloat16 on a GPU
    tokens = device_tokens(config, devices)

    # Weights are rounded once a step for all layers; a mixture's, on a mesh, layer by layer.
    copies = 0.0
    packed_projections = sparse and s.attention_projections
    packed_ffn = sparse and s.ffn
    by_layer = m.experts > 0 and shape.size > 1
    packed_share = sparse_layers(config) / m.num_layers if sparse else 0.0
    if size == 2:
        rounded = count.projections * (1 - packed_share * packed_projections)
        rounded += 0 if by_layer else count.ffn * (1 - packed_share * packed_ffn)
        copies = size * (rounded + count.head) / sharded
    # All sparse layers are packed once a step: a thresholded copy and its packed form, or of
    # weights that are not 2:4 copies in the two orders that kernels read.
    packed = size / 2 + METADATA_BYTES
    if packed_projections:
        copies += packed_share * count.projections * (size + packed) / sharded
    if packed_ffn:
        in_16_bits = size + (packed if s.weights else size)
        in_8_bits = _sparse_in_8_bits(config)
        of_ffn = 1.5 + METADATA_BYTES if in_8_bits else in_16_bits
        # Shared neurons are there once for each expert; once in 16 bits that are spread over fsdp.
        # (Hopper's kernels take them once on one device as well: less than this says.)
        of_group = m.ffn_hidden // neuron_groups(config)
        once = shape.fsdp > 1 and not in_8_bits and stored_once.serves(s, of_group)
        repeated = 1 if once else s.rows_of_experts(of_group) / of_group
        copies += packed_share * repeated * count.ffn * of_ffn / sharded
    if by_layer:
        # All experts of a layer as a pass reads them, and its gradients before they are scattered:
        # E / k times what one network's would be, too much to leave to the temporaries.
        partial = BYTES_FLOAT32 if sparse else size
        copies += count.ffn // m.num_layers * (_gathered_bytes(config, size, sparse) + partial)

    kept = _activation_bytes(config, shape, size, sparse)
    if 0 < packed_share < 1:
        kept += (1 - packed_share) * (_activation_bytes(config, shape, size, False) - kept)

    # The logits and their gradient.
    a_logit = (size if m.logits == "compute" else BYTES_FLOAT32) + size
    logits = min(m.loss_chunk, tokens) * _vocabulary(config) // shape.tensor * a_logit
    return Memory(
        master_weights=BYTES_FLOAT32 * held,
        adam_moments=2 * BYTES_FLOAT32 * held,
        # Micro-batches add up in one copy while the next is made.
        gradients=BYTES_FLOAT32 * held * (2 if config.micro_batches > 1 else 1),
        weight_copies=int(copies),
        activations=int(tokens * kept),
        logits_chunk=logits,
    )


def expert_traffic(config: Config, devices: int | None = None, *, sparse: bool = False) -> int:
    """Returns the bytes that a device sends in one micro-batch for the matrices of a mixture.

    In a ring: matrices gathered over fsdp in each pass, gradients scattered over it and summed over
    data. Every expert moves, whether tokens meet it or not. Zero without a mixture.

    Args:
      config: the run.
      devices: all devices; None for as few as the configuration allows.
      sparse: whether for a step of the sparse phase, with packed weights.

    Raises:
      ValueError: as `mesh_shape`.
    """
    m = config.model
    if not m.experts:
        return 0
    shape = mesh_shape(config, devices)
    size = 4 if m.compute_dtype == "float32" else 2
    weights = m.num_layers * _ffn_matrices(config) * m.width * m.ffn_hidden
    # Made again from their inputs, layers gather for that as well.
    passes = 3 if m.remat == "full" else 2
    of_weight = passes * _gathered_bytes(config, size, sparse) + size
    over_fsdp = weights * of_weight * (shape.fsdp - 1) / shape.fsdp
    over_data = weights / shape.fsdp * size * 2 * (shape.data - 1) / shape.data
    return round(over_fsdp + over_data)


def _gathered_bytes(config: Config, size: int, sparse: bool) -> float:
    """Bytes of a weight that one pass gathers, on average of W1 and W2: rows of both, or in a
    sparse step rows of one and packed values and metadata of the other."""
    s = config.sparsity
    if not sparse or not s.weights or s.gather == "rows":
        return size
    return (size + size / 2 + METADATA_BYTES) / 2


def run_summary(config: Config) -> RunSummary:
    """Returns steps, tokens and FLOPs of the whole run."""
    sparse_steps = config.sparse_steps
    dense = dense_flops(config).total
    sparse = sparse_flops(config).total if sparse_steps else dense
    count = parameters(config)
    trained = count.total - count.embedding
    tokens = config.steps * config.tokens_per_step
    return RunSummary(
        steps=config.steps,
        sparse_steps=sparse_steps,
        tokens=tokens,
        sparse_tokens=sparse_steps * config.tokens_per_step,
        flops=(config.steps - sparse_steps) * dense + sparse_steps * sparse,
        dense_flops=config.steps * dense,
        tokens_per_parameter=tokens / trained,
    )


def _activation_bytes(config: Config, mesh: MeshShape, size: int, sparse: bool) -> float:
    """Bytes a token on one device that the forward pass keeps, all layers."""
    m, s, tensor = config.model, config.sparsity, mesh.tensor
    width, hidden = m.width, m.ffn_hidden // tensor
    query, key = m.num_heads * m.head_dim // tensor, m.kv_heads * m.head_dim // tensor
    heads = m.num_heads // tensor

    # cuDNN keeps a statistic for each query; XLA's own attention the scores and probabilities of
    # each pair in float32, and rounded probabilities.
    a_pair = 2 * BYTES_FLOAT32 + (size if size < BYTES_FLOAT32 else 0)
    statistics = heads * (config.sequence_length * a_pair if m.attention == "xla" else 4)
    attention = size * (2 * query + 2 * key) + statistics
    # Each norm keeps its input and its normalised output in float32, and what it returns; the
    # kernels that alone.
    a_norm = 2 * BYTES_FLOAT32 + size
    norms = (a_norm if m.norm == "xla" else size) * 2 * width
    norms += a_norm * (query + key) if m.qk_norm else 0
    if sparse and s.ffn:
        live = s.live_neurons(hidden)
        products = live * (2 if m.gated else 1) * size
        # Kernels keep both products of the gated form, jax.numpy the chosen halves and a byte for
        # each group to say which: less, and certain only where it is named.
        halves = m.gated and s.activations and s.backend == "reference"
        ffn = products / 2 + live / GROUP if halves else products
        ffn *= padded_tokens(config, mesh.size) / config.tokens_per_step
        outputs = products * m.active_experts
    else:
        # relu^2: itself; gated, the gate and the product too; swiglu: both inputs, three inner
        # values of silu and the product.
        neuron = {"relu2": size, "relu2_gated": 3 * size, "swiglu": 6 * size}
        hidden = hidden * m.active_experts // max(m.experts, 1)
        ffn = hidden * neuron[m.ffn]
        if m.ffn_precision == "fp8":
            ffn += hidden + width  # the products' rounded inputs
        outputs = hidden * (2 if m.gated else 1) * size
    outputs_of_experts = 0
    if m.experts:
        # Each expert's output and input, which dense experts on a mesh take from the tokens again.
        outputs_of_experts = size * width * m.active_experts
        ffn += outputs_of_experts * (1 if mesh.size > 1 and not sparse else 2)
    block = norms + attention + ffn
    kept = block if m.remat == "none" else size * width  # at least the block's input
    if m.remat == "dots":
        kept += size * (query + 2 * key + 2 * width) + outputs
        # On one device they are made again.
        kept += outputs_of_experts if mesh.size > 1 else 0
        kept += 0 if m.attention == "xla" else size * query + statistics
    # One block at a time is differentiated, or made again: as much once more.
    return m.num_layers * kept + block


def _sparse_in_8_bits(config: Config) -> bool:
    """Whether a sparse step packs the FFN's weights in 8 bits where kernels run
    (`sparsejax.ops.routed_ffn_fp8`)."""
    m, s = config.model, config.sparsity
    return (
        m.ffn_precision == "fp8"
        and m.ffn == "relu2"
        and m.compute_dtype != "float32"
        and s.weights
        and s.activations
        and m.width % 256 == 0
        and s.v % 128 == 0
        and (s.gather == "packed" or config.mesh.fsdp == 1)
    )


def _ffn_matrices(config: Config) -> int:
    return 3 if config.model.gated else 2


def _vocabulary(config: Config) -> int:
    if config.model.vocab_size is None:
        raise ValueError("model.vocab_size=None: resolve the configuration first")
    return config.model.vocab_size
