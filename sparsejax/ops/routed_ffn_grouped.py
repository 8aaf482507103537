"""The routed feed-forward network on kernels: grouped products on sparse tensor cores.

A backend brings these functions, all in one module because they share layouts (signatures and
definitions in `kernels.reference_grouped`):

    pack_weight24     once an optimiser step: thresholds, scales, packs, splits by expert
    up24              Y2 = two of four of relu(X W1)^2, dense and packed
    down24            Y3 = Y2 W2 and dX = dY1 W1^T, the 2:4 operand on the left
    up24_backward     dY1 = 2 sqrt(Y2) (dY3 W2^T) on the support of Y2, packed likewise
    weight_gradient   dW2 = Y2^T dY3 and dW1^T = dY1^T X, expert by expert

and, for the option, weight_gradient24: the same with Y2 and dY1 2:4 along the tokens, but for the
neurons with most non-zeros in Y2, whose support dY1 has as well. The gated form
(`routed_ffn_gated`) has up24_linear in place of up24 and up24_backward.

XLA permutes the tokens that come in, so that it can fuse the gather with its neighbours; down24
stores what goes out where its token is.

Weights of several shards make one network where the backend takes them: the plan then lays tokens
out by the combination of their experts (`sparsejax.routing.tokens.combine`), so that they are
gathered, multiplied and stored once for all shards.

Kernels take multiples of 64 or 128 neurons of an expert. Where an expert has fewer, neurons of
zeros stand behind its own (`padding_of`): whatever multiplies them is zero, and so are their
gradients, which are left out.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels import reference_grouped, registry, shared_rows
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.routed_ffn_rows import apart
from sparsejax.routing.neurons import repeat_shared, sum_shared
from sparsejax.routing.tokens import TokenPlan, padded_tokens
from sparsejax.spec import Sparsity


class Sizes(NamedTuple):
    """What a backend's checks look at, besides the sparsity."""

    width: int
    hidden: int
    dtype: jnp.dtype
    tokens: int | None = None
    """T; None while packing, before there are tokens."""
    columns: int | None = None
    """Of the width, those that packing sees: a device's of a mesh; None for all."""
    shards: int = 1
    """Shards, of `hidden` neurons each, that one call of a product serves."""

    @property
    def packed_columns(self) -> int:
        """The columns that packing sees."""
        return self.width if self.columns is None else self.columns


class Saved(NamedTuple):
    """What `backward` needs of `forward`, beside weights and plan."""

    x: Array
    """(T_pad, D): the tokens in the order of the plan, so that they are permuted once."""
    y2: Array
    """(T_pad, h) in x's dtype."""
    metadata: Array
    """(T_pad / 64, h / 64, 128) int32: which two of four of Y2 are kept."""


class Layout(NamedTuple):
    """Rows of the grouped products: `TokenPlan` without the counts, and for one expert as well."""

    offsets: Array
    block_expert: Array


def module(kernels: registry.Backend, suffix: str = "") -> Any:
    """The backend's functions; suffix: "_fp8" for those of `routed_ffn_fp8`.

    Raises:
      NotImplementedError: it has none, or cannot be imported here.
    """
    name = "reference_grouped" if kernels == "reference" else f"{kernels}.grouped24"
    name += suffix
    try:
        return importlib.import_module(f"kernels.{name}")
    except ImportError as error:
        missing = f"backend={kernels!r} has no grouped24{suffix} here: {error}"
        raise NotImplementedError(missing) from error


_OPTIONS = ("num_experts", "m", "dtype", "threshold", "tokens", "shards", "shared_every")


class Functions:
    """The functions of a `module`, each traced once for its shapes (`registry.traced_once`)."""

    def __init__(self, source: Any) -> None:
        self.module = source

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)
        names = inspect.signature(function).parameters
        return registry.traced_once(function, tuple(o for o in _OPTIONS if o in names))


def batchable(function: Callable[..., Any], kernels: registry.Backend) -> Callable[..., Any]:
    """`function`, which calls the backend's kernels, so that `jax.vmap` takes it."""
    if kernels != "hopper":
        return function
    # Mosaic GPU kernels have no batching rule that lowers: `jax.vmap` runs one after the other.
    return jax.custom_batching.sequential_vmap(function)


def padded_rows(tokens: int, sparsity: Sparsity, shards: int = 1) -> int:
    """T_pad."""
    return padded_tokens(tokens, sparsity.num_experts**shards, sparsity.v)


def padding_of(kernels: registry.Backend | None, live: int) -> int:
    """Neurons of zeros that make an expert's h=`live` what the backend's kernels take: at most an
    eighth of them, or else none, and `check` refuses h."""
    missing = 0 if kernels is None else -live % module(kernels).NEURONS
    return missing if 8 * missing <= live else 0


def check(kernels: registry.Backend, sparsity: Sparsity, sizes: Sizes, *, gated: bool) -> None:
    """Raises NotImplementedError unless the backend serves every function of this network."""
    if not sparsity.activations:
        raise NotImplementedError(f"backend={kernels!r} does not serve activations=False")
    refused = registry.refusal(kernels, registry.target_capability())
    if refused is not None:
        raise NotImplementedError(refused)
    experts, live = sparsity.num_experts, sparsity.live_neurons(sizes.hidden)
    width, dtype = sizes.width, sizes.dtype
    if width % 64 or sparsity.v % 64:
        raise NotImplementedError(
            f"backend={kernels!r} serves multiples of 64, not {width=} and v={sparsity.v}"
        )
    if sizes.packed_columns % 64:
        raise NotImplementedError(
            f"backend={kernels!r} packs multiples of 64 columns of the width, not the "
            f"{sizes.columns} of a device"
        )
    functions = module(kernels)
    if not sparsity.weights and not functions.DENSE_WEIGHTS:
        raise NotImplementedError(f"backend={kernels!r} does not serve weights=False")
    padded = padding_of(kernels, live)
    if (live + padded) % functions.NEURONS:
        others = " or ".join(map(str, _served_instead(kernels, sparsity, sizes.hidden)))
        raise NotImplementedError(
            f"backend={kernels!r} serves multiples of {functions.NEURONS} neurons of an expert, or "
            f"up to a ninth fewer, not {live=}: hidden={others} would do (--model.hidden; on a "
            f"mesh, of each group of neurons), not {sizes.hidden}"
        )
    live += padded

    def array(*shape: int, dtype: DTypeLike = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def metadata(m: int, k: int) -> jax.ShapeDtypeStruct:
        return array(m // 64, k // 64, 128, dtype=jnp.int32)

    shards = sizes.shards
    options = {} if shards == 1 else {"shards": shards}
    if shards > 1 and not functions.SHARDS:
        raise NotImplementedError(f"backend={kernels!r} takes no {shards=} at once")
    # Any number of blocks stands for all while the tokens are not known.
    rows = 4 * sparsity.v * experts
    if sizes.tokens is not None:
        rows = padded_rows(sizes.tokens, sparsity, shards)
    layout = (
        array(experts**shards + 1, dtype=jnp.int32),
        array(rows // sparsity.v, dtype=jnp.int32),
    )
    once = shared_once(functions, sparsity, live, padded)
    rows_of_one = sizes.hidden if once else experts * live
    hidden = shards * rows_of_one
    weight: tuple[Any, Any] = array(hidden, width), None
    if sparsity.weights:
        weight = array(hidden, width // 2), metadata(hidden, width)
    x, y2 = array(rows, width), array(rows, shards * live)
    half, kept = array(rows, shards * live // 2), metadata(rows, shards * live)
    dense = array(hidden, width) if once else array(shards * experts, live, width)
    master = array(rows_of_one, sizes.packed_columns, dtype=jnp.float32)
    options |= once
    functions.check_pack_weight24(
        master,
        num_experts=experts,
        m=_m(sparsity),
        scale=1.0 if sparsity.weights else None,
        threshold=sparsity.weights,
        dtype=dtype,
        **once,
    )
    functions.check_down24(half, kept, dense, *layout, **options)
    functions.check_up24(*weight, x, *layout, **options)  # of `up24_linear` too
    if gated:
        _, check_pack24 = registry.load("pack24", kernels)
        check_pack24(y2, axis=1, mode="magnitude", dtype=dtype)
    else:
        functions.check_up24_backward(*weight, x, y2, kept, *layout, **options)
    if sparsity.weight_gradient == "dense":
        gradient = functions.check_weight_gradient
        gradient(y2, x, layout[0], num_experts=experts, **options)
        return
    if shards > 1:
        wanted = sparsity.weight_gradient
        raise NotImplementedError(f"weight_gradient={wanted!r} is not served for {shards=} at once")
    check_24 = getattr(functions, "check_weight_gradient24", None)
    if check_24 is None:
        raise NotImplementedError(
            f"backend={kernels!r} does not serve weight_gradient={sparsity.weight_gradient!r}"
        )
    densest = array(experts, sparsity.densest(live - padded), dtype=jnp.int32)
    check_24(y2, x, layout[0], densest, num_experts=experts)


def _served_instead(kernels: registry.Backend, sparsity: Sparsity, hidden: int) -> list[int]:
    """The next numbers of neurons below H, if any, and above that `check` lets pass."""

    def served(hidden: int) -> bool:
        live = sparsity.live_neurons(hidden)
        return (live + padding_of(kernels, live)) % module(kernels).NEURONS == 0

    block = sparsity.block
    below = filter(served, range(hidden - block, 0, -block))
    above = filter(served, itertools.count(hidden + block, block))
    return [*itertools.islice(below, 1), next(above)]


def _m(sparsity: Sparsity) -> int:
    """Neurons in a block: without routing every block of four is the one expert's."""
    return 4 * sparsity.num_experts


_reported: set[tuple] = set()


_MISSED = "routed_ffn runs without sparse tensor cores, on jax.numpy: "


def report(refusals: list[str], *key: Any, what: str = _MISSED) -> None:
    """A visible fallback, once for each kind."""
    if refusals and (*key, *refusals) not in _reported:
        _reported.add((*key, *refusals))
        warnings.warn(
            what + "; ".join(refusals),
            registry.FallbackWarning,
            stacklevel=4,
        )


def choose(sparsity: Sparsity, sizes: Sizes, *, gated: bool) -> registry.Backend | None:
    """The backend whose kernels serve this network; None for the path in jax.numpy.

    `sparsity.backend` is strict if it names one. Otherwise the fastest that serves the call; where
    none of the device's does, a `registry.FallbackWarning` says why.
    """
    named = sparsity.backend
    if named == "reference":
        return None
    if named is not None:
        check(named, sparsity, sizes, gated=gated)
        return named
    candidates = [name for name in registry.available_backends() if name != "reference"]
    kernels, refusals = first_serving(candidates, partial(check, gated=gated), sparsity, sizes)
    if kernels is None:
        report(refusals, sparsity, sizes, gated)
    return kernels


def first_serving(
    candidates: Iterable[registry.Backend],
    check: Callable[[registry.Backend, Sparsity, Sizes], None],
    sparsity: Sparsity,
    sizes: Sizes,
) -> tuple[registry.Backend | None, list[str]]:
    """The first backend that `check` lets pass, if any, and why those before it do not serve."""
    refusals = []
    for candidate in candidates:
        try:
            check(candidate, sparsity, sizes)
        except NotImplementedError as error:
            refusals.append(f"{candidate}: {error}")
        else:
            return candidate, refusals
    return None, refusals


def recheck(
    packed: registry.Backend | None, sparsity: Sparsity, sizes: Sizes, *, gated: bool
) -> registry.Backend | None:
    """`choose`, now that the number of tokens is known, for weights packed by a backend."""
    if packed is None:
        return None
    try:
        check(packed, sparsity, sizes, gated=gated)
    except NotImplementedError as error:
        if sparsity.backend is not None:
            raise
        report([f"{packed}: {error}"], sparsity, sizes, gated)
        return None
    return packed


def pack_weight(
    w: Array,
    beta: Array | None,
    sparsity: Sparsity,
    *,
    dtype: DTypeLike,
    kernels: registry.Backend,
) -> tuple[Array, Array | None, Array]:
    """values (E h, D / 2), metadata (E h / 64, D / 64, 128) and dense (E, h, D) of a matrix (H, D),
    h with its `padding_of`; where shared neurons are there once (`shared_once`) values (H, D / 2),
    metadata (H / 64, ..) and dense (H, D).

    Weights that are not 2:4: all of them (E h, D), in the order in which kernels read them, None,
    and dense.
    """
    functions = module(kernels)
    experts, live = sparsity.num_experts, sparsity.live_neurons(w.shape[0])
    padded = padding_of(kernels, live)
    once = shared_once(functions, sparsity, live, padded)
    options = {"num_experts": experts, "m": _m(sparsity), "dtype": dtype, **once}
    if not once:
        w = repeat_shared(w, 0, sparsity)
    if padded:
        # Blocks of M with four neurons of every expert, behind all others.
        w = jnp.pad(w, ((0, experts * padded), (0, 0)))
    assert beta is not None or not sparsity.weights
    options["threshold"] = sparsity.weights

    def pack(w: Array, scale: Array | None) -> tuple[Array, Array | None, Array]:
        return Functions(functions).pack_weight24(w, scale=scale, **options)

    return batchable(pack, kernels)(w.astype(jnp.float32), beta if sparsity.weights else None)


def pack_rows(
    rows: Array, sparsity: Sparsity, *, kernels: registry.Backend
) -> tuple[Array, Array | None]:
    """values and metadata that `pack_weight` made along with `rows` (E, h, D) or (H, D).

    Rows of which two of four are zero already stay what they are: the third largest of a group, by
    which thresholding shrinks the others, is zero. Split by expert, they are one expert's.
    """

    def pack(w: Array) -> tuple[Array, Array, Array]:
        return Functions(module(kernels)).pack_weight24(
            w, num_experts=1, m=4, scale=None, dtype=rows.dtype
        )

    flat = rows.reshape(-1, rows.shape[-1])
    if not sparsity.weights:
        one = {"num_experts": 1, "m": 4, "scale": None, "dtype": rows.dtype}
        return module(kernels).pack_weight24(flat, threshold=False, **one)[:2]
    flat = flat.astype(jnp.float32)
    return batchable(pack, kernels)(flat)[:2]


def layout_of(tokens: int, plan: TokenPlan | None, sparsity: Sparsity) -> Layout:
    """Where each expert's rows lie."""
    if plan is not None:
        return Layout(plan.offsets, plan.block_expert)
    rows = padded_rows(tokens, sparsity)
    offsets = jnp.array([0, rows], jnp.int32)
    return Layout(offsets, jnp.zeros((rows // sparsity.v,), jnp.int32))


def stack(x: Array, plan: TokenPlan | None, sparsity: Sparsity) -> Array:
    """Tokens (T, D) in the order of their rows, padding as zeros: (T_pad, D)."""
    rows = order(x.shape[0], plan, sparsity)
    if rows is None:
        padding = padded_rows(x.shape[0], sparsity) - x.shape[0]
        return jnp.pad(x, ((0, padding), (0, 0)))
    # Indices are never negative; padding lies one past the end and is filled.
    take = lambda a: a.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    if x.dtype.itemsize != 2 or x.shape[1] % 2:
        return take(x)
    # In pairs, since a thread of XLA's gather moves four numbers: 16 bytes at a time, not 8. On an
    # H200 that takes 0.080 ms instead of 0.104 for 32,768 tokens of width 2,048.
    pairs = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(take(pairs), x.dtype).reshape(-1, x.shape[1])


def order(tokens: int, plan: TokenPlan | None, sparsity: Sparsity) -> Array | None:
    """(T_pad,) the token of each row, T for padding; None: as they came, and padding behind."""
    if plan is not None:
        return plan.permutation
    return apart(tokens, padded_rows(tokens, sparsity)) if sparsity.spread_tokens else None


def densest(y2: Array, offsets: Array, sparsity: Sparsity, padding: int = 0) -> Array:
    """(E, k) int32: the neurons of each expert that stay dense along tokens; y2 (T_pad, h), of
    which so many neurons are zeros."""
    number = sparsity.densest(y2.shape[1] - padding)
    counts = reference_grouped.nonzeros(y2, offsets, sparsity.v)
    return reference_grouped.densest_neurons(counts, number)


def shards_of(layout: Layout, sparsity: Sparsity) -> dict[str, int]:
    """The option of the products for weights of several shards; none for one."""
    combinations, experts, shards = layout.offsets.shape[0] - 1, sparsity.num_experts, 1
    while experts**shards < combinations:
        shards += 1
    return {} if shards == 1 else {"shards": shards}


def options_of(packed: PackedFFN, layout: Layout, sparsity: Sparsity) -> dict[str, int]:
    """The options of the products with these weights."""
    once = {"shared_every": packed.shared_every} if packed.shared_every else {}
    return shards_of(layout, sparsity) | once


def down(
    functions: Functions,
    packed: tuple[Array, Array],
    w: Array,
    layout: Layout,
    tokens: int,
    order: Array | None,
    options: Mapping[str, int],
) -> Array:
    """Y W (T, D) in the order of the tokens; packed: values and metadata of Y."""
    if order is None:
        return functions.down24(*packed, w, *layout, **options)[:tokens]
    return functions.down24(*packed, w, *layout, permutation=order, tokens=tokens, **options)


def forward(
    x: Array,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, Saved]:
    """Y3 (T, D), and what `backward` needs."""
    functions = Functions(module(kernels))

    def network(x: Array, packed: PackedFFN, plan: TokenPlan | None) -> tuple[Array, Saved]:
        tokens = x.shape[0]
        layout, by_row = layout_of(tokens, plan, sparsity), order(tokens, plan, sparsity)
        x, options = stack(x, plan, sparsity), options_of(packed, layout, sparsity)
        weight = packed.w1.values, packed.w1.metadata
        y2, values, metadata = functions.up24(*weight, x, *layout, **options)
        kept = values, metadata
        y3 = down(functions, kept, packed.w2.dense, layout, tokens, by_row, options)
        return y3, Saved(x, y2, metadata)

    return batchable(network, kernels)(x, packed, plan)


def weight_gradients(
    functions: Functions,
    y2: Array,
    layout: Layout,
    sparsity: Sparsity,
    *,
    padding: int = 0,
    **shards: int,
) -> Callable[[Array, Array], Array]:
    """The product Y^T G of each expert, (H, D) float32, for Y (T_pad, h) and G (T_pad, D).

    y2: (T_pad, h), whose non-zeros say which neurons tokens24 leaves dense. padding: neurons of
    zeros among the h. shards: their number, if there are several.
    """
    number = shards.get("shards", 1)
    experts = {"num_experts": sparsity.num_experts, **shards}

    def summed(dw: Array) -> Array:
        if padding:
            parts = dw.reshape(number, -1, dw.shape[1])
            dw = parts[:, : -padding * sparsity.num_experts].reshape(-1, dw.shape[1])
        return sum_shared(dw, sparsity, **shards)

    if sparsity.weight_gradient == "dense":
        live = y2.shape[1] // number
        once = shared_once(functions.module, sparsity, live, padding)
        gradient = lambda y, g: functions.weight_gradient(y, g, layout.offsets, **experts, **once)
        return gradient if once else lambda y, g: summed(gradient(y, g))
    # Both products leave the same neurons dense.
    dense = densest(y2, layout.offsets, sparsity, padding)
    return lambda y, g: summed(functions.weight_gradient24(y, g, layout.offsets, dense, **experts))


def shared_once(functions: Any, sparsity: Sparsity, live: int, padding: int = 0) -> dict[str, int]:
    """The option by which a backend's functions take shared neurons once, where they do; none
    otherwise.

    live: h, of one shard. padding: neurons of zeros behind an expert's, which no parameters have.
    """
    experts, every = sparsity.num_experts, sparsity.shared_every
    if not sparsity.shares or padding or not functions.SHARED_ONCE:
        return {}
    sizes = shared_rows.of_live(live, experts, every)
    return {"shared_every": every} if functions.serves_shared(sizes) else {}


def reads_once(kernels: registry.Backend | None, sparsity: Sparsity, hidden: int) -> bool:
    """Whether the kernels take the shared neurons of a group of H once."""
    if kernels is None:
        return False
    live = sparsity.live_neurons(hidden)
    return bool(shared_once(module(kernels), sparsity, live, padding_of(kernels, live)))


def backward(
    dy: Array,
    saved: Saved,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, tuple[Array, Array, None]]:
    """dX (T, D) in x's dtype; dw1 and dw2 (H, D) in float32, and None for dwg."""
    functions = Functions(module(kernels))

    def network(dy, saved, packed, plan):
        tokens = dy.shape[0]
        layout, by_row = layout_of(tokens, plan, sparsity), order(tokens, plan, sparsity)
        shards, options = shards_of(layout, sparsity), options_of(packed, layout, sparsity)
        weight_gradient = weight_gradients(
            functions, saved.y2, layout, sparsity, padding=packed.padding, **shards
        )
        dy = stack(dy, plan, sparsity)
        weight, kept = (packed.w2.values, packed.w2.metadata), (saved.y2, saved.metadata)
        dy1, values = functions.up24_backward(*weight, dy, *kept, *layout, **options)
        dy1_kept = values, saved.metadata
        dx = down(functions, dy1_kept, packed.w1.dense, layout, tokens, by_row, options)
        return dx, weight_gradient(dy1, saved.x), weight_gradient(saved.y2, dy)

    dx, dw1, dw2 = batchable(network, kernels)(dy, saved, packed, plan)
    return dx, (dw1, dw2, None)
