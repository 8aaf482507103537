"""What XLA's GPU compiler makes of a step on two GPUs: arrays lie as they do on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sparsejax.spec import Sparsity
from train.config import Config, ModelConfig, ScheduleConfig, resolve
from train.mesh import AXES
from train.optimizer import make_optimizer
from train.state import abstract_state, model_graph
from train.step import make_train_step

BATCH, TOKENS, WIDTH, HIDDEN = 3, 256, 512, 2048
"""Sequences and tokens of one GPU; all four differ, so that shapes tell arrays apart."""

_RESULT = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (\(?[a-z]\S*\[.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]\{([\d,]*)")


def compiled_step(phase: str, devices: np.ndarray) -> str:
    """HLO of the step of two layers on two devices, which need not be there."""
    config = resolve(
        Config(
            steps=80,
            batch_size=2 * BATCH,
            sequence_length=TOKENS,
            model=ModelConfig(
                width=WIDTH,
                hidden=HIDDEN,
                num_layers=2,
                num_heads=4,
                scan_layers=False,
                loss_chunk=TOKENS,
                compute_dtype="bfloat16",
                attention="cudnn",
            ),
            sparsity=Sparsity(m=16, v=128),
            schedule=ScheduleConfig(sparse_fraction=0.5),
        ),
        tokenizer_vocab_size=257,
    )
    mesh = Mesh(devices.reshape(1, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = abstract_state(config, optimizer, mesh)
        ids = jax.ShapeDtypeStruct((2 * BATCH, TOKENS), jnp.int32)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(config, model_graph(config), optimizer, phase)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, placed.step))
        return jitted.lower(state, {"inputs": ids, "targets": ids}).compile().as_text()


def turned(hlo: str) -> list[str]:
    """Instructions of the entry whose results lie with the width before the tokens, and those that
    turn a float32 master, moment or gradient of w1 and w2."""
    entry = hlo[hlo.index("\nENTRY ") :]
    found = []
    for line in entry.splitlines():
        match = _RESULT.match(line)
        # The embedding's own all-to-all is what needs another order.
        if match is None or "embedding" in line or match[3] in ("parameter", "bitcast", "tuple"):
            continue
        name, result, opcode = match.groups()
        for dtype, dimensions, layout in _SHAPE.findall(result):
            shape = [int(n) for n in dimensions.split(",") if n]
            order = [shape[int(axis)] for axis in reversed(layout.split(",")) if axis]
            if sorted(shape) == sorted((BATCH, TOKENS, WIDTH)) and order[-1] != WIDTH:
                found.append(f"{name} {dtype}{order}")
            moves = opcode == "copy" or "transpose" in name
            if dtype == "f32" and sorted(shape) == sorted((HIDDEN, WIDTH // 2)) and moves:
                found.append(f"{name} {dtype}{order}")
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_nothing_is_turned_on_two_gpus(phase):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    assert turned(compiled_step(phase, np.array(jax.devices()[:2]))) == []


def test_arrays_that_are_turned_are_found():
    hlo = f"""
ENTRY %main (x: f32[4]) -> f32[4] {{
  %a.1 = bf16[{WIDTH},{BATCH},{TOKENS}]{{2,1,0}} fusion(%x), kind=kInput
  %a.2 = bf16[{BATCH},{TOKENS},{WIDTH}]{{1,0,2}} fusion(%x), kind=kLoop
  %a.3 = (f32[8]{{0}}, bf16[{BATCH},{TOKENS},{WIDTH}]{{2,1,0}}) fusion(%x), kind=kLoop
  %copy.4 = f32[{HIDDEN},{WIDTH // 2}]{{1,0}} copy(%x)
  %add.5 = f32[{HIDDEN},{WIDTH // 2}]{{1,0}} fusion(%x), kind=kLoop
  %a.6 = bf16[{WIDTH},{BATCH},{TOKENS}]{{2,1,0}} fusion(%x), metadata={{op_name="jvp(embedding)"}}
}}
"""
    assert [found.split()[0] for found in turned(hlo)] == ["a.1", "a.2", "copy.4"]
