"""What a run would be: parameters, FLOPs, memory, phases and kernels, without starting anything.

Nothing is allocated and no step is compiled; a machine without a GPU will do. The numbers are those
of `train.accounting`, the kernels are found by tracing one FFN for each kind of device.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from train import accounting
from train.config import Config, ModelConfig, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blocks of the Llama family, from 59 million parameters (without embedding and head) to 64 billion.
SHAPES = (
    (640, 12, 10),
    (768, 12, 12),
    (1024, 16, 16),
    (1280, 20, 20),
    (1536, 20, 24),
    (2048, 25, 16),
    (2560, 24, 20),
    (3072, 28, 24),
    (4096, 32, 32),
    (5120, 40, 40),
    (6656, 60, 52),
    (8192, 80, 64),
)
"""Width, layers and heads."""

_NAMES = {
    "ffn": "FFN",
    "projections": "attention projections",
    "attention": "attention",
    "head": "head",
    "router": "router",
    "embedding": "embedding",
    "norms": "norms",
    "master_weights": "master weights, float32",
    "adam_moments": "Adam's moments, float32",
    "gradients": "gradients, float32",
    "weight_copies": "weights for the products",
    "activations": "activations",
    "logits_chunk": "logits, one chunk",
}

_FORMS = {"relu2": "relu²", "relu2_gated": "gated relu²", "swiglu": "SwiGLU"}

# A Triton kernel is the first of these, a Mosaic GPU kernel one of the others, by JAX version.
_PALLAS_PRIMITIVES = frozenset({"pallas_call", "core_map", "mpmd_map"})

_TARGETS: tuple[tuple[str, tuple[int, int] | None], ...] = (
    ("this machine", None),
    ("sm_90 (H100, H200)", (9, 0)),
    ("sm_80 (A100)", (8, 0)),
)


def _mixture(model: ModelConfig) -> str:
    if not model.experts:
        return ""
    return f" in {model.experts} experts, {model.experts_per_token} for each token"


def _routed_to(config: Config) -> str:
    experts, groups = config.model.experts, config.sparsity.num_experts
    if experts and groups > experts:
        return f"{experts} experts, in each to one of {groups // experts} clusters"
    shards = config.sparsity.num_shards
    return f"{groups} experts" + (f" in each of {shards} groups of neurons" if shards > 1 else "")


def _first_layers(config: Config) -> str:
    first = config.sparsity.dense_layers
    return "the first layer" if first == 1 else f"the first {first} layers"


def dry_run(config: Config, *, console: Console, plot: Path | None = None) -> None:
    """Prints what `config` would train, at what cost.

    Args:
      config: the run, resolved or not.
      console: where to print; 100 columns are enough.
      plot: PNG file for the components' share of FLOPs over model sizes.

    Raises:
      ValueError: one line: the configuration is inconsistent, its vocabulary is unknown, or the
        picture cannot be written.
    """
    config, vocabulary = resolve_vocabulary(config)
    sparse = config.sparse_steps > 0
    tables = [_run(config, vocabulary), _parameters(config), _flops(config, sparse)]
    if sparse:
        tables += [_products(config)]
    tables += [_memory(config, sparse), _phases(config)]
    if sparse:
        tables += [_kernels(config)]
    for table in tables:
        console.print(table)
        console.print()
    if plot is not None:
        try:
            flops_plot(config, plot)
        except OSError as error:
            raise ValueError(f"--plot {plot} cannot be written: {error}") from None
        console.print(f"wrote {plot}", highlight=False)


def resolve_vocabulary(config: Config) -> tuple[Config, str]:
    """Returns the resolved configuration and where its vocabulary comes from.

    A machine without the data can still plan a run that names its vocabulary.

    Raises:
      ValueError: as `train.config.resolve`, or neither the configuration nor a tokenizer gives one.
    """
    from train.data.source import check_end_of_document, choose_tokenizer

    try:
        tokenizer = choose_tokenizer(config.data)
    except (OSError, ValueError) as error:
        if config.model.vocab_size is None:
            raise ValueError(f"model.vocab_size=None and there is no tokenizer: {error}") from None
        size = config.model.vocab_size
        return resolve(config, tokenizer_vocab_size=size), "as configured; no tokenizer here"
    check_end_of_document(config.data, tokenizer)
    size = tokenizer.vocab_size
    name = tokenizer.file or "the byte-level tokenizer"
    return resolve(config, tokenizer_vocab_size=size), f"{name} has {size:,} tokens"


def _run(config: Config, vocabulary: str) -> Table:
    m, s, o = config.model, config.sparsity, config.optimizer
    table = _table(config.name, ("", "left"), ("", "left"), header=False)
    heads = f"{m.num_heads} heads of {m.head_dim}"
    if m.kv_heads != m.num_heads:
        heads += f" on {m.kv_heads} key and value heads"
    micro = "" if config.micro_batches == 1 else f", in {config.micro_batches} micro-batches"
    run = accounting.run_summary(config)
    auto = "bfloat16 (float32 on a CPU)"
    products = auto if m.compute_dtype == "auto" else m.compute_dtype
    in_8_bits = "; FFN in fp8" if m.ffn_precision == "fp8" else ""
    own = (
        ("attention", o.attention_rate),
        ("FFN", o.ffn_rate),
        ("embedding", o.embedding_rate),
        ("head", o.head_rate),
    )
    own_rates = ", ".join(f"{part} {rate:g} times it" for part, rate in own if rate != 1)
    rates = f" ({own_rates})" if own_rates else ""
    rows = [
        ("model", f"D {m.width:,}, {m.num_layers} layers, {heads}"),
        ("FFN", f"{_FORMS[m.ffn]}, H {m.ffn_hidden:,}{_mixture(m)}"),
        ("vocabulary", f"{m.vocab_size:,} ({vocabulary})"),
        (
            "batch",
            f"{config.batch_size:,} x {config.sequence_length:,} = "
            f"{config.tokens_per_step:,} tokens a step{micro}",
        ),
        (
            "run",
            f"{run.steps:,} steps, {_count(run.tokens)} tokens, {run.tokens_per_parameter:.3g} for "
            f"each parameter (embedding left out)",
        ),
        (
            "optimiser",
            f"AdamW, peak learning rate {o.learning_rate:g}{rates} after {o.warmup_steps:,} steps, "
            f"weight decay {o.weight_decay:g}",
        ),
        (
            "numerics",
            f"{products} products, float32 master weights; rematerialisation: {m.remat}{in_8_bits}",
        ),
    ]
    if run.sparse_steps:
        parts = [
            text
            for wanted, text in (
                (s.weights, "2:4 weights"),
                (s.attention_projections, "2:4 attention projections"),
                (s.routing, f"routing to {_routed_to(config)} (M {s.m}, V {s.v})"),
                (s.shares, f"1 in {s.shared_every} blocks of neurons for every token"),
                (s.activations, "2:4 activations"),
                (s.dense_layers > 0, _first_layers(config) + " dense"),
                (
                    s.weight_gradient == "tokens24",
                    f"weight gradients 2:4 along tokens but for {s.dense_neurons:.0%} of neurons",
                ),
            )
            if wanted
        ]
        rows.append(("sparsity", ", ".join(parts) or "nothing: every switch is off"))
    for row in rows:
        table.add_row(*row)
    return table


def _parameters(config: Config) -> Table:
    count = accounting.parameters(config)
    table = _table("Parameters", ("", "left"), ("number", "right"), ("share", "right"))
    shares = count.shares()
    for name, number in count.items():
        if name == "router" and not number:
            continue
        table.add_row(_NAMES[name], f"{number:,}", f"{shares[name]:.1%}")
    table.add_section()
    table.add_row("total", f"{count.total:,}", "")
    table.add_row(
        "without embedding and head", f"{count.body:,}", f"{count.body / count.total:.1%}"
    )
    return table


def _flops(config: Config, sparse: bool) -> Table:
    dense_step = accounting.dense_flops(config)
    columns = [("", "left"), ("dense step", "right"), ("share", "right")]
    if sparse:
        columns += [("sparse step", "right"), ("share", "right"), ("fewer", "right")]
    table = _table("FLOPs of one optimiser step", *columns)
    sparse_step = accounting.sparse_flops(config)
    dense_shares, sparse_shares = dense_step.shares(), sparse_step.shares()
    executed = dict(sparse_step.items())
    for name, number in dense_step.items():
        if name == "router" and not (sparse and executed[name]):
            continue
        row = [_NAMES[name], _flop(number) if number else "-", f"{dense_shares[name]:.1%}"]
        if sparse:
            fewer = f"{number / executed[name]:.2f} x" if number else ""
            row += [_flop(executed[name]), f"{sparse_shares[name]:.1%}", fewer]
        table.add_row(*row)
    table.add_section()
    total = ["total", _flop(dense_step.total), ""]
    if sparse:
        total += [_flop(sparse_step.total), "", f"{dense_step.total / sparse_step.total:.2f} x"]
    table.add_row(*total)

    notes = ["Forward and backward of the matrix products; causal attention is half of the square."]
    again = accounting.recomputed_flops(config)
    if again:
        notes.append(
            f"Rematerialisation repeats another {_flop(again)} in a dense step, not counted here."
        )
    if sparse:
        notes.append(_bound(config, dense_step, sparse_step))
    table.caption = "\n".join(notes)
    return table


def _bound(config: Config, dense: accounting.Flops, sparse: accounting.Flops) -> str:
    """Amdahl's law on the counts above, said to be just that."""
    share, gain = dense.shares()["ffn"], dense.ffn / sparse.ffn
    step = accounting.amdahl(share, gain)
    part = accounting.run_summary(config).sparse_share
    run = accounting.amdahl(part, step)
    return (
        f"A count of FLOPs, not a speed: the FFN's share f = {share:.3f} falls s = {gain:.2f} "
        f"times, so a sparse step has 1/(1-f+f/s) = {step:.2f} times fewer FLOPs, and the run with "
        f"{part:.0%} sparse steps {run:.2f} times fewer. Kernels that run slower per FLOP than "
        "dense ones gain less than that."
    )


def _products(config: Config) -> Table:
    m, s = config.model, config.sparsity
    groups = accounting.neuron_groups(config)
    rows = accounting.device_tokens(config) * m.active_experts // s.num_experts
    live = s.live_neurons(m.ffn_hidden) // groups
    table = _table(
        "FFN products of a sparse step",
        ("", "left"),
        ("pass", "left"),
        ("2:4 operand", "left"),
        ("live part", "right"),
        ("of dense FLOPs", "right"),
    )
    for p in accounting.ffn_products(config):
        shape = {
            "Y": (rows, m.width, live) if p.name[1] in "1g" else (rows, live, m.width),
            "d": _backward_shape(p.name, rows, m.width, live),
        }[p.name[0]]
        left, inner, right = shape
        table.add_row(
            p.name,
            "backward" if p.backward else "forward",
            p.operand if p.sparse else "-",
            f"({left:,} x {inner:,}) ({inner:,} x {right:,})",
            f"1/{p.dense_flops / p.sparse_flops:.4g}",
        )
    kind = "clusters" if m.experts and s.num_experts > m.experts else "experts"
    caption = f"The live part is that of one of {s.num_experts * groups} {kind} in one layer" + (
        ", at an even load." if s.num_experts > 1 else "."
    )
    if s.num_experts > 1:
        routed = config.tokens_per_step * m.active_experts
        extra = accounting.padded_tokens(config) / routed - 1
        caption += f" Padding to multiples of V = {s.v} adds up to {extra:.2%} rows."
    if s.dense_layers:
        caption += f" The last column is of all layers, with {_first_layers(config)}, dense."
    table.caption = caption
    return table


def _backward_shape(name: str, rows: int, width: int, live: int) -> tuple[int, int, int]:
    if name.startswith("dY2"):
        return rows, width, live
    if name.startswith("dX"):
        return rows, live, width
    return (live, rows, width) if name.startswith("dW2") else (width, rows, live)


def _memory(config: Config, sparse: bool) -> Table:
    shape = accounting.mesh_shape(config)
    counts = [shape.size]
    rows = config.batch_size // config.micro_batches // (shape.data * shape.fsdp)
    if config.mesh.data == -1 and rows > 1:
        counts.append(shape.size * rows)  # as many replicas as the batch feeds
    table = _table("Memory of one device, estimated", ("", "left"))
    steps = []
    for count in counts:
        mesh = accounting.mesh_shape(config, count)
        axes = f"data {mesh.data}, fsdp {mesh.fsdp}\ntensor {mesh.tensor}"
        for phase in ("dense", "sparse") if sparse else ("dense",):
            table.add_column(f"{axes}\n{phase} step", justify="right")
            memory = accounting.memory(config, devices=count, sparse=phase == "sparse")
            steps.append(dict(memory.items()))
    for name in steps[0]:
        table.add_row(_NAMES[name], *(_gib(step[name]) for step in steps))
    table.add_section()
    table.add_row("total", *(_gib(sum(step.values())) for step in steps))
    table.caption = (
        "Arrays that must exist, with bfloat16 products and cuDNN's attention unless the "
        "configuration says otherwise; leave a tenth of the device for temporaries."
    )
    if config.model.experts and counts[-1] > 1:
        phases = ("dense", "sparse") if sparse else ("dense",)
        sent = (
            f"{accounting.expert_traffic(config, counts[-1], sparse=phase == 'sparse') / 1e9:.3g} "
            f"GB in a {phase} step"
            for phase in phases
        )
        table.caption += (
            f"\nFor experts' matrices, of which all move, a device of {counts[-1]} sends in each "
            f"micro-batch {', '.join(sent)}."
        )
    return table


def _phases(config: Config) -> Table:
    from train.optimizer import phase_schedule

    phases = phase_schedule(config)
    table = _table(
        "Phases",
        ("", "left"),
        ("from", "right"),
        ("to", "right"),
        ("steps", "right"),
        ("share", "right"),
        ("tokens", "right"),
        ("clusters", "left"),
    )
    for span in phases.spans(config.steps):
        length = span.stop - span.start
        clusters = "-"
        if span.phase == "sparse" and config.sparsity.routing:
            refreshes = (length - 1) // phases.refresh_every if phases.refresh_every else 0
            times = "refresh" if refreshes == 1 else "refreshes"
            clusters = f"made at the start, {refreshes:,} {times}"
        table.add_row(
            span.phase,
            f"{span.start:,}",
            f"{span.stop - 1:,}",
            f"{length:,}",
            f"{length / config.steps:.1%}",
            _count(length * config.tokens_per_step),
            clusters,
        )
    return table


def _kernels(config: Config) -> Table:
    where = "FFN and projections" if config.sparsity.attention_projections else "FFN"
    table = _table(f"Kernels of a sparse step's {where}", ("device", "left"), ("kernels", "left"))
    for name, capability in _TARGETS:
        table.add_row(name, _traced_kernels(config, capability))
    table.caption = (
        "Found by tracing one layer, forward and backward. Dense products are XLA's own (cuBLAS on "
        "NVIDIA GPUs)."
    )
    return table


def _traced_kernels(config: Config, capability: tuple[int, int] | None) -> str:
    """Names the kernels that one layer's sparse parts call on a device of this compute
    capability."""
    import contextlib
    import warnings

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kernels import registry
    from sparsejax.nn.routed_ffn import RoutedFFN
    from train.attention import Attention
    from train.backend import compute_dtype

    m = config.model
    dtype = compute_dtype(m)
    if capability is not None and m.compute_dtype == "auto":
        dtype = jnp.dtype("bfloat16")
    layers: list[Any] = [
        lambda: RoutedFFN(
            m.width,
            m.ffn_hidden,
            gated=m.gated,
            sparsity=config.sparsity,
            dtype=dtype,
            precision=m.ffn_precision,
            rngs=nnx.Rngs(0),
        )
    ]
    if config.sparsity.attention_projections:
        # XLA's attention, whatever the run's: traced anywhere, and no kernel of ours.
        of_run: dict[str, Any] = {"compute_dtype": dtype.name, "attention": "xla"}
        own = dataclasses.replace(m, **of_run)
        layers.append(lambda: Attention(own, config.sparsity, rngs=nnx.Rngs(0)))
    split = [nnx.split(nnx.eval_shape(make), nnx.Param, ...) for make in layers]
    graphs, params, rest = zip(*split, strict=True)

    padding = 0

    def step(params: Any, rest: Any, x: jax.Array) -> Any:
        nonlocal padding
        packed = [nnx.merge(*parts).pack() for parts in zip(graphs, params, rest, strict=True)]
        padding = 0 if packed[0] is None else packed[0].padding

        def loss(params: Any, x: jax.Array) -> jax.Array:
            total = jnp.float32(0)
            for graph, own, state, weights in zip(graphs, params, rest, packed, strict=True):
                y = nnx.merge(graph, own, state)(x, weights)
                total += (y[0] if isinstance(y, tuple) else y).sum()
            return total

        return jax.grad(loss, argnums=(0, 1))(params, x)

    rows = config.tokens_per_micro_batch // config.sequence_length
    x = jax.ShapeDtypeStruct((rows, config.sequence_length, m.width), dtype)
    device = contextlib.nullcontext()
    if capability is not None:
        device = registry.assume_capability(capability)
    with device, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jaxpr = jax.make_jaxpr(step)(params, rest, x).jaxpr
        except NotImplementedError as error:
            return f"refused: {error}"
    kernels = Counter(_pallas_names(jaxpr))
    named = ((name if "hopper" in name else f"{name}_triton", n) for name, n in kernels.items())
    text = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in named)
    text = text or "reference: jax.numpy, compiled by XLA; no sparse tensor cores"
    if padding:
        live = config.sparsity.live_neurons(m.ffn_hidden)
        text += f"; {padding} neurons of zeros behind the {live:,} of an expert"
    reasons = (str(w.message) for w in caught if w.category is registry.FallbackWarning)
    return ". ".join([text, *dict.fromkeys(reasons)])


def _pallas_names(jaxpr: Any) -> Iterator[str]:
    """Names of the Pallas kernels that a jaxpr calls, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PALLAS_PRIMITIVES:
            yield eqn.params.get("name") or "a Pallas kernel"
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _pallas_names(inner)


def flops_plot(config: Config, png: Path) -> None:
    """Draws the share of each component in the FLOPs of a step over the sizes of Llama models.

    Sequence length, vocabulary, form of the FFN and sparsity are the run's; a second panel shows
    what a sparse step executes of the dense step's FLOPs.

    Args:
      config: the run, resolved.
      png: the picture to write.

    Raises:
      OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    family = list(_family(config))
    sizes = [accounting.parameters(c).body for c in family]
    dense = [accounting.dense_flops(c) for c in family]
    sparse = [accounting.sparse_flops(c) for c in family] if config.sparse_steps else []
    figure = Figure(figsize=(12.5 if sparse else 7.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if sparse else 1, sharey=True, squeeze=False)[0]
    totals = [step.total for step in dense]
    heading: dict[str, Any] = {"loc": "left", "fontsize": 11, "pad": 20}
    _areas(panels[0], config, sizes, dense, totals)
    panels[0].set_title("Dense step: share of the FLOPs", **heading)
    if sparse:
        _areas(panels[1], config, sizes, sparse, totals)
        panels[1].set_title("Sparse step: FLOPs left of the dense step's", **heading)
    figure.suptitle(
        f"Llama models at sequence {config.sequence_length:,}, vocabulary "
        f"{config.model.vocab_size:,}, {_FORMS[config.model.ffn]} FFN",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(png, dpi=150)


def _family(config: Config) -> Iterator[Config]:
    """The run with other widths, depths and heads."""
    for width, layers, heads in SHAPES:
        model = ModelConfig(
            width=width,
            num_layers=layers,
            num_heads=heads,
            ffn=config.model.ffn,
            vocab_size=config.model.vocab_size,
        )
        yield dataclasses.replace(config, model=model)


def _areas(
    axes: Axes,
    config: Config,
    sizes: list[int],
    steps: list[accounting.Flops],
    totals: list[int],
) -> None:
    from train.plots import INK, MUTED

    colours = {
        "ffn": "#e58b3a",
        "projections": "#3f7fb5",
        "attention": "#86b6d9",
        "head": "#c5cdd4",
    }
    parts = {
        name: [getattr(step, name) / total for step, total in zip(steps, totals, strict=True)]
        for name in colours
    }
    edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8}
    axes.stackplot(sizes, list(parts.values()), colors=list(colours.values()), **edge)
    axes.set_xscale("log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    ticks = [1e8, 3e8, 1e9, 3e9, 1e10, 3e10]
    axes.set_xticks(ticks, [_count(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters without embedding and head", color=INK)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)

    _label_edge(axes, {_NAMES[name]: shares for name, shares in parts.items()})
    own = accounting.parameters(config).body
    if sizes[0] < own < sizes[-1]:
        axes.axvline(own, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            config.name,
            (own, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
        )


def _label_edge(axes: Axes, parts: dict[str, list[float]]) -> None:
    """Writes name and last share of each area right of it, without overlaps."""
    from train.plots import INK

    below, free = 0.0, 0.0
    for name, shares in parts.items():
        at = max(below + shares[-1] / 2, free + 0.025)
        below, free = below + shares[-1], at + 0.025
        axes.annotate(
            f"{name}  {shares[-1]:.0%}",
            (1.0, at),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=INK,
        )


def _table(title: str, *columns: tuple[str, str], header: bool = True) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", show_header=header)
    for name, justify in columns:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    return table


def _flop(number: float) -> str:
    """FLOPs with three figures and a prefix: 1.78 GFLOP, 170 TFLOP."""
    return _scaled(number, ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"))) + (
        "FLOP"
    )


def _count(number: float) -> str:
    """Tokens or parameters as people say them: 1.78 B, 410 M."""
    return _scaled(number, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))).rstrip()


def _scaled(number: float, units: Iterable[tuple[float, str]]) -> str:
    scale, unit = next(((s, u) for s, u in units if number >= s), (1.0, " "))
    return f"{number / scale:.3g}{unit}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
