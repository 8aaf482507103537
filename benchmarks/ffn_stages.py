"""The routed network taken apart: each kernel and each XLA pass between them, timed alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.ffn_problem import Operands
from benchmarks.timing import Sampling, interleaved, jax_timed
from kernels import registry
from sparsejax.fp8 import FORWARD
from sparsejax.ops import routed_ffn_fp8 as fp8
from sparsejax.ops import routed_ffn_grouped as grouped
from sparsejax.routing import TokenPlan, assign_tokens, plan_tokens
from sparsejax.spec import Sparsity


@dataclass(frozen=True)
class Stage:
    """One call in a step.

    Attributes:
      name: what it makes.
      function: its name in `Stages`.
      backward: whether it belongs to the backward pass.
      product: whether it is one of the six matrix products.
    """

    name: str
    function: str
    backward: bool = False
    product: bool = False


STEP = (
    Stage("pack W1", "pack"),
    Stage("pack W2", "pack"),
    Stage("route tokens", "route"),
    Stage("permute X", "stack"),
    Stage("Y2 = top2(relu(X W1)^2)", "up", product=True),
    Stage("Y3 = Y2 W2", "down", product=True),
    Stage("permute dY3", "stack", backward=True),
    Stage("dY1 = 2 sqrt(Y2) (dY3 W2^T)", "up_backward", backward=True, product=True),
    Stage("dX = dY1 W1^T", "down", backward=True, product=True),
    Stage("count, choose the densest neurons", "densest", backward=True),
    Stage("dW2 = Y2^T dY3", "weight_gradient", backward=True, product=True),
    Stage("dW1 = dY1^T X", "weight_gradient", backward=True, product=True),
)


def by_token(down: Callable[..., Any], *operands: Any, **options: Any) -> jax.Array:
    """(T, D) results of a grouped product in the order of the tokens.

    Args:
      down: `down24` of a backend, or its 8-bit kind.
      operands: what `down` multiplies, then the plan of the tokens.
      options: of `down`.
    """
    *factors, plan = operands
    return down(
        *factors,
        plan.offsets,
        plan.block_expert,
        permutation=plan.permutation,
        tokens=plan.inverse.shape[0],
        **options,
    )


class Stages:
    """The functions of one backend and sparsity, jitted one by one."""

    def __init__(self, sparsity: Sparsity, backend: registry.Backend) -> None:
        experts, v = sparsity.num_experts, sparsity.v
        module = grouped.module(backend)

        def route(x, centers, bias):
            expert = assign_tokens(x, centers, bias, sparsity.metric)
            return plan_tokens(expert, experts, v, spread=sparsity.spread_tokens)

        def pack(w, beta):
            return grouped.pack_weight(w, beta, sparsity, dtype=jnp.bfloat16, kernels=backend)

        functions: dict[str, Callable[..., Any]] = {
            "pack": pack,
            "route": route,
            "stack": lambda x, plan: grouped.stack(x, plan, sparsity),
            "up": module.up24,
            "down": functools.partial(by_token, module.down24),
            "up_backward": module.up24_backward,
        }
        if sparsity.weight_gradient == "dense":
            functions["weight_gradient"] = lambda y, g, offsets: module.weight_gradient(
                y, g, offsets, num_experts=experts
            )
        else:
            functions["densest"] = lambda y2, offsets: grouped.densest(y2, offsets, sparsity)
            functions["weight_gradient"] = lambda y, g, offsets, densest: module.weight_gradient24(
                y, g, offsets, densest, num_experts=experts
            )
        self.functions = {name: jax.jit(f) for name, f in functions.items()}

    def arguments(self, o: Operands) -> dict[str, tuple]:
        """Arguments of each function, by running those before it; shapes of them for shapes."""
        abstract = isinstance(o.x, jax.ShapeDtypeStruct)

        def call(f: str | Callable[..., Any], *args: Any) -> Any:
            f = self.functions[f] if isinstance(f, str) else f
            return jax.eval_shape(f, *args) if abstract else f(*args)

        beta1, beta2 = (
            (jax.ShapeDtypeStruct((), jnp.float32),) * 2 if abstract else (o.betas[0], o.betas[1])
        )
        pack, route = (o.w1, beta1), (o.x, o.centers, o.bias)
        weights = call("pack", *pack), call("pack", o.w2, beta2)
        plan = call("route", *route)
        gradient, products = self._products(call, o, weights, plan)
        arguments = {
            "pack": pack,
            "route": route,
            "stack": (o.x, plan),
            **products,
            "weight_gradient": gradient,
        }
        if "densest" in self.functions:
            y2 = gradient[0]
            arguments["densest"] = y2, plan.offsets
            arguments["weight_gradient"] = *gradient, call("densest", *arguments["densest"])
        return arguments

    def _products(
        self, call: Callable[..., Any], o: Operands, weights: tuple, plan: TokenPlan
    ) -> tuple[tuple, dict[str, tuple]]:
        """Arguments of the dense weight gradient, and of the three functions before it.

        Args:
          call: runs a function, named or given, or tells the shapes of its results.
          o: operands. weights: both, packed. plan: of the tokens.
        """
        (values1, metadata1, dense1), (values2, metadata2, _) = weights
        layout = plan.offsets, plan.block_expert
        x, dy = call("stack", o.x, plan), call("stack", o.dy, plan)
        up = (values1, metadata1, x, *layout)
        y2, y2_values, y2_metadata = call("up", *up)
        return (y2, dy, plan.offsets), {
            "up": up,
            "down": (y2_values, y2_metadata, dense1, plan),
            "up_backward": (values2, metadata2, dy, y2, y2_metadata, *layout),
        }

    def compile(self, shapes: Operands) -> dict[str, Any]:
        """Every function for operands of these shapes."""
        arguments = self.arguments(shapes)
        return {
            name: f.lower(*arguments[name]).compile() for name, f in self.functions.items()
        }  # fmt: skip


class Stages8(Stages):
    """The same with 8-bit products."""

    def __init__(self, sparsity: Sparsity, backend: registry.Backend) -> None:
        super().__init__(sparsity, backend)
        module = fp8.module(backend)

        def pack(w, beta):
            return fp8.pack_weight(w, beta, sparsity, kernels=backend)

        def stack(x, plan):
            order, _ = fp8.row_tokens(x.shape[0], plan, sparsity)
            return module.stack_fp8(x, order, dtype=FORWARD)

        functions = {
            "pack": pack,
            "stack": stack,
            "up": module.up24_fp8,
            "down": functools.partial(by_token, module.down24_fp8),
            "up_backward": module.up24_backward_fp8,
        }
        self.functions |= {name: jax.jit(f) for name, f in functions.items()}

    def _products(
        self, call: Callable[..., Any], o: Operands, weights: tuple, plan: TokenPlan
    ) -> tuple[tuple, dict[str, tuple]]:
        w1, w2 = weights
        layout = plan.offsets, plan.block_expert
        _, x8, x_scale, squares = call("stack", o.x, plan)
        # Gradients are of another 8-bit type, which takes as long.
        dy, dy8, dy_scale, dy_squares = call("stack", o.dy, plan)
        factors, scale = call(fp8.up_factors, x_scale, squares, w1)
        up = (w1.values, w1.metadata, x8, factors, *layout)
        y2, values, metadata = call("up", *up)
        factors, _ = call(fp8.back_factors, dy_scale, dy_squares, scale, w2)
        return (y2, dy, plan.offsets), {
            "up": up,
            "down": (values, metadata, w2.columns, scale, plan),
            "up_backward": (w2.values, w2.metadata, dy8, factors, y2, metadata, *layout),
        }


def measure(
    stages: Stages, compiled: dict[str, Any], o: Operands, sampling: Sampling, flops: float
) -> list[dict[str, Any]]:
    """A row for each stage of a step.

    Args:
      stages, compiled: of one backend.
      o: operands.
      sampling: how long.
      flops: of one of the six products, with routing but without 2:4.
    """
    arguments = stages.arguments(o)
    calls = {name: jax_timed(f, *arguments[name]) for name, f in compiled.items()}
    samples = interleaved(calls, sampling)
    rows = []
    for stage in (s for s in STEP if s.function in samples):
        seconds = samples[stage.function].median
        row = {"stage": stage.name, "backward": stage.backward, "ms": 1e3 * seconds}
        if stage.product:
            row["tflops"] = flops / seconds / 1e12
        rows.append(row)
    return rows
