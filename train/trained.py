"""A trained run as a model: what generation, evaluation and export start from."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.nn.routed_ffn import RoutingState
from train import thresholding
from train.backend import compute_dtype
from train.checkpoint import Checkpointer, read_config
from train.config import Config
from train.data.source import choose_tokenizer
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.model import Llama, sparse_weights
from train.run_folder import CHECKPOINTS
from train.state import build_model, model_graph

View = Literal["dense", "sparse"]

TOKENIZER_FILE = "tokenizer.json"
IMPORTED_FILE = "imported.json"
"""In the folder of a run that was imported from another format: the ids that its tokenizer puts in
front of every text, {"prefix": [...]}."""

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint's model with what it takes to use it.

    Attributes:
      folder: the run's folder.
      config: the resolved configuration it was trained with.
      step: optimiser steps done.
      model: float32 parameters and routing state.
      tokenizer: the one that made its training data.
      prefix: ids in front of every text: none for a model trained here, perhaps a
        beginning-of-sequence token for an imported one.
    """

    folder: Path
    config: Config
    step: int
    model: Llama
    tokenizer: Tokenizer
    prefix: tuple[int, ...] = ()

    @property
    def clustered(self) -> bool:
        """Whether its sparse phase has begun: before, there are no clusters and no scales."""
        config = self.config
        return config.sparse_steps > 0 and self.step > config.schedule.warmup_steps

    def encode(self, text: str) -> list[int]:
        """Ids of a text as the model is used to it: never empty, since a model continues something.

        The end-of-document token, which stands before every document of the training data, stands
        for an empty text.
        """
        ids = [*self.prefix, *self.tokenizer.encode(text).tolist()]
        return ids or [self.tokenizer.eos_id]


def load_run(
    folder: str | os.PathLike[str], *, step: int | None = None, device: jax.Device | None = None
) -> TrainedRun:
    """The model of a run's newest good checkpoint, or that of `step`, on one device.

    Reads parameters and routing state only; the optimiser's state stays on disk.

    Args:
      folder: the run's folder, which holds `checkpoints/`.
      step: optimiser steps of the checkpoint; None for the newest.
      device: where the arrays will live; None for the first.

    Raises:
      ValueError: no such run, checkpoint or tokenizer, or a damaged checkpoint; one line.
      OSError: files that cannot be read.
    """
    folder = Path(folder)
    checkpoints = folder / CHECKPOINTS
    if not folder.is_dir():
        raise ValueError(f"run {str(folder)!r} does not exist: name a run's folder")
    if not checkpoints.is_dir():
        raise ValueError(f"run {str(folder)!r} has no folder {CHECKPOINTS}/: nothing was saved")
    saved = read_config(checkpoints, step=step)
    config = config_from_dict(Config, saved)
    # 8-bit products are a way to train fast, not a property of the weights.
    model_config = dataclasses.replace(config.model, ffn_precision="compute")
    config = dataclasses.replace(config, model=model_config)
    graph = model_graph(config)
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    on_device = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    with Checkpointer(checkpoints, keep=1, config=saved) as checkpointer:
        template = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)}
        template |= jax.tree.map(on_device, abstract_parameters(config))
        restored = checkpointer.restore(template, step=step, partial=True)
    if restored is None:
        raise ValueError(f"no checkpoint in {checkpoints}")
    model = nnx.merge(graph, restored.state["params"], restored.state["routing"])
    prefix: list[int] = []
    own, imported = folder / TOKENIZER_FILE, folder / IMPORTED_FILE
    if imported.is_file():
        prefix = json.loads(imported.read_text(encoding="utf-8"))["prefix"]
    if own.is_file():
        tokenizer = load_tokenizer(own, config.data.end_of_document)
    else:
        tokenizer = choose_tokenizer(config.data)
    return TrainedRun(folder, config, restored.step, model, tokenizer, tuple(prefix))


def abstract_parameters(config: Config) -> dict[str, Any]:
    """Shapes of a resolved configuration's parameters and routing state, as a state names them."""
    model = nnx.eval_shape(lambda: build_model(config, jax.random.key(0)))
    _, params, routing = nnx.split(model, nnx.Param, RoutingState)
    return {"params": params, "routing": routing}


def check_view(run: TrainedRun, view: str) -> None:
    """Refuses a view of the weights that this run does not have.

    Raises:
      ValueError: one line that says why.
    """
    if view not in typing.get_args(View):
        raise ValueError(f"{view=} must be one of {typing.get_args(View)}")
    if view == "sparse" and not run.clustered:
        config = run.config
        raise ValueError(
            f"{view=} needs a run whose sparse phase has begun: {run.folder} is at step {run.step} "
            f"of {config.schedule.warmup_steps} dense and {config.sparse_steps} sparse steps"
        )


def for_inference(run: TrainedRun, view: View) -> tuple[nnx.GraphDef, Any, Any]:
    """(graph, state, packed): the model with matrices in the compute dtype, and what makes it
    sparse.

    Casting once gives the same numbers as casting at every use, which training does, and halves
    what a token has to read.

    Raises:
      ValueError: as `check_view`.
    """
    check_view(run, view)
    packed = jax.jit(lambda model: model.pack())(run.model) if view == "sparse" else None
    dtype = compute_dtype(run.config.model)
    # Gains of norms are used in float32; with layers stacked they have two axes.
    cast = lambda path, leaf: leaf if path[-1] == "scale" else leaf.astype(dtype)
    graph, params, rest = nnx.split(run.model, nnx.Param, ...)
    state = nnx.merge_state(nnx.map_state(lambda p, v: v.replace(cast(p, v[...])), params), rest)
    return graph, state, packed


def thresholded(run: TrainedRun) -> Llama:
    """The run's model with beta S(w) in place of every matrix w that was 2:4 (arXiv 2409.09099):
    the weights of the sparse view, dense, two of four of them zero.

    Raises:
      ValueError: if the run's weights were not sparse, or its sparse phase has not begun.
    """
    sparsity = run.config.sparsity
    if not sparse_weights(sparsity):
        raise ValueError(f"{run.folder} was trained with sparsity.weights=False")
    check_view(run, "sparse")
    graph, params, routing = nnx.split(run.model, nnx.Param, RoutingState)
    return nnx.merge(graph, thresholding.thresholded(params, routing, sparsity), routing)


def config_from_dict(kind: type[T], values: Mapping[str, Any], name: str = "") -> T:
    """A configuration from what `dataclasses.asdict` and JSON made of it.

    Fields that the record lacks take their defaults, so that older runs stay readable.

    Raises:
      ValueError: a field that this version does not know, or a value of another type; one line.
    """
    hints = typing.get_type_hints(kind)
    fields = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"the run's {name}{key}={value!r} is no field of this version")
        inner = hints[key]
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            value = config_from_dict(typing.cast(type, inner), value, f"{name}{key}.")
        if not _fits(value, inner):
            wanted = inner.__name__ if isinstance(inner, type) else str(inner)
            raise ValueError(f"the run's {name}{key}={value!r} must be {wanted}")
        fields[key] = value
    return kind(**fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is what a field's annotation says."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return value in parts
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)
