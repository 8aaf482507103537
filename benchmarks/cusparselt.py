"""The vendor's library for 2:4 products, cuSPARSELt, through PyTorch where that is installed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.products import Product, Shape
from benchmarks.timing import Timed


def unavailable() -> str | None:
    """Why cuSPARSELt cannot be used here; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch is not installed: {error}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if not (hasattr(torch, "_cslt_compress") and hasattr(torch._C, "_cusparselt")):
        return "this PyTorch has no cuSPARSELt"
    return None


class CuSparseLt:
    """Products on tensors shared with JAX, with the library's own search for each shape."""

    def __init__(self) -> None:
        self._algorithms: dict[tuple[Shape, bool], tuple[int, int, int]] = {}

    def calls(self, product: Product) -> dict[bool, Timed]:
        """The product as the library computes it, by whether it writes its result transposed.

        The library may be faster one way or the other; the reader takes the better one.

        Raises:
          RuntimeError: the library refuses the product in both forms.
        """
        import torch

        dense = product.sparse.unpack()
        dense = jax.block_until_ready(dense.T if product.sparse.axis == 0 else dense)
        compressed = torch._cslt_compress(torch.from_dlpack(dense))
        b = torch.from_dlpack(product.b)
        b = b.t() if product.shape.b_layout == "nk" else b
        found, refusals = {}, []
        for transposed in (False, True):
            key = (product.shape, transposed)
            try:
                if key not in self._algorithms:
                    # CPU builds of torch lack it, and type checkers read whichever is installed.
                    search = getattr(torch._C._cusparselt, "mm_search")  # noqa: B009
                    choice = search(compressed, b, None, None, None, transposed)
                    self._algorithms[key] = tuple(int(v) for v in choice[:3])  # type: ignore
                algorithm, split_k, split_k_mode = self._algorithms[key]
                run = functools.partial(
                    torch._cslt_sparse_mm,
                    compressed,
                    b,
                    transpose_result=transposed,
                    alg_id=algorithm,
                    split_k=split_k,
                    split_k_mode=split_k_mode,
                )
                run()
                torch.cuda.synchronize()
            except RuntimeError as error:
                refusals.append(str(error).splitlines()[0])
                continue
            found[transposed] = Timed(run, lambda _: torch.cuda.synchronize())
        if not found:
            raise RuntimeError("; ".join(refusals))
        return found

    def algorithm(self, shape: Shape, transposed: bool) -> dict[str, int]:
        """What the search chose."""
        names = ("alg_id", "split_k", "split_k_mode")
        return dict(zip(names, self._algorithms[shape, transposed], strict=True))

    @staticmethod
    def result(product: Product, out: Any, transposed: bool) -> Any:
        """A result as a JAX array in the product's layout, to check it."""
        wanted = product.shape.out_layout == "nm"
        return jnp.from_dlpack((out.t() if transposed != wanted else out).contiguous())
