"""Steps on several GPUs: arrays lie as they do on one, and what is computed is the same."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import registry
from sparsejax import sharding
from sparsejax.nn import MoEFFN
from sparsejax.sharding import MeshAxes
from sparsejax.spec import Precision, Sparsity
from train.config import Config, ModelConfig, ScheduleConfig, resolve
from train.mesh import ACT_BTD, AXES, BATCH_SPEC, SPECS, state_shardings
from train.optimizer import make_optimizer
from train.state import abstract_state, model_graph
from train.step import make_train_step

BATCH, TOKENS, WIDTH, HIDDEN = 3, 256, 512, 2048
"""Sequences and tokens of one GPU; all four differ, so that shapes tell arrays apart."""

PRECISIONS: tuple[Precision, Precision] = ("compute", "fp8")

_RESULT = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (\(?[a-z]\S*\[.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]\{([\d,]*)")


def compiled_step(
    phase: str, devices: np.ndarray, precision: Precision = "compute", experts: int = 0
) -> str:
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
                ffn_precision=precision,
                experts=experts,
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


def gathered(hlo: str) -> dict[str, int]:
    """Elements that a program's gathers make, by type."""
    found: dict[str, int] = collections.Counter()
    for result, apart in re.findall(r" = (\S.*?) all-gather(-start)?\(", hlo):
        # Gathers that XLA joined make a tuple. Only one that is started apart from its end has its
        # operands in it as well, before the results.
        shapes = re.findall(r"([a-z]+\w*)\[([\d,]*)\]", result)
        for dtype, shape in shapes[len(shapes) // 2 if apart else 0 :]:
            found[dtype] += math.prod(map(int, shape.split(",")))
    return found


def two_gpus() -> np.ndarray:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return np.array(jax.devices()[:2])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("phase", "precision", "experts"),
    [
        ("dense", "compute", 0),
        ("sparse", "compute", 0),
        ("sparse", "fp8", 0),
        ("dense", "compute", 4),
        ("sparse", "compute", 4),
    ],
)
def test_nothing_is_turned_on_two_gpus(phase, precision, experts):
    assert turned(compiled_step(phase, two_gpus(), precision, experts)) == []


@pytest.mark.gpu
def test_a_sparse_step_gathers_8_bits_on_two_gpus():
    devices = two_gpus()
    require_hopper()
    exact, in_8_bits = (gathered(compiled_step("sparse", devices, p)) for p in PRECISIONS)
    # Two layers, two matrices, values in one pass and rows in the other.
    ffn = 2 * 2 * HIDDEN * WIDTH * 3 // 2
    assert exact["bf16"] - in_8_bits["bf16"] == ffn
    assert in_8_bits["f8e4m3fn"] == ffn


@pytest.mark.gpu
def test_two_gpus_compute_in_8_bits_what_one_does():
    devices = two_gpus()
    require_hopper()
    compare_in_8_bits(devices)


def require_hopper() -> None:
    if "hopper" not in registry.available_backends():
        pytest.skip(f"hopper does not run on {jax.devices()[0].device_kind}")


def compare_in_8_bits(devices: np.ndarray) -> None:
    """The sparse network, forward and backward, on one device and on two."""
    sparsity = Sparsity(m=16, v=128)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, dy = (draw(2 * BATCH, TOKENS, WIDTH).astype(jnp.bfloat16) for _ in range(2))
    w1, w2 = draw(HIDDEN, WIDTH) * WIDTH**-0.5, draw(HIDDEN, WIDTH) * HIDDEN**-0.5
    arguments = (x, dy, w1, w2, draw(4, WIDTH))
    betas = jnp.array([1.5, 1.4, 1.0])

    @jax.jit
    def step(x, dy, w1, w2, centers):
        packed = sharding.pack_ffn(w1, w2, None, betas, sparsity, precision="fp8")
        assert packed.precision == "fp8"
        network = lambda x, w1, w2: sharding.routed_ffn(
            x, w1, w2, None, packed, centers, jnp.zeros(4), sparsity
        )[0]
        y, vjp = jax.vjp(network, x, w1, w2)
        return packed.w1, (y, *vjp(dy))

    packed, one = step(*arguments)
    mesh = Mesh(devices.reshape(1, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    specs = (BATCH_SPEC, BATCH_SPEC, SPECS["w1"], SPECS["w2"], P())
    with jax.set_mesh(mesh):
        placed = zip(arguments, specs, strict=True)
        put = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in placed)
        spread, two = step(*put)
    wide = lambda a: np.asarray(a, np.float64)
    for a, b in zip(spread[:4], packed[:4], strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))
    np.testing.assert_allclose(spread.norm, packed.norm, rtol=1e-5)
    # The same 8-bit numbers are multiplied, token by token. Weights' gradients are rounded to
    # bfloat16 (2^-9 each) before two devices sum theirs.
    bounds = (1e-3, 1e-3, 2**-8, 2**-8)
    for a, b, bound in zip(two, one, bounds, strict=True):
        assert np.linalg.norm(wide(a) - wide(b)) < bound * np.linalg.norm(wide(b))


def _experts(clusters: int, phase: str, shape: tuple[int, int] | None) -> list[jax.Array]:
    """Result, loads and gradients of a mixture in bfloat16, on a mesh of data x fsdp or without."""
    sparsity = Sparsity(m=32 * clusters, v=128)
    module = MoEFFN(WIDTH, 4096, num_experts=8, sparsity=sparsity, axes=MeshAxes(),
                    rngs=nnx.Rngs(params=0))  # fmt: skip
    module.apply_update(module.begin_sparse())
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    keys = jax.random.split(jax.random.key(1))
    x, dy = (jax.random.normal(key, (4, 512, WIDTH), jnp.bfloat16) for key in keys)

    @jax.jit
    def run(params, rest, x, dy):
        packed = nnx.merge(graph, params, rest).pack() if phase == "sparse" else None
        apply = lambda params, x: nnx.merge(graph, params, rest)(x, packed)
        y, vjp, stats = jax.vjp(apply, params, x, has_aux=True)
        return y, stats.counts.reshape(-1, stats.counts.shape[-1]).sum(0), vjp(dy)

    if shape is None:
        return jax.tree.leaves(run(params, rest, x, dy))
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(*shape, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_shardings(mesh, params))
        state = jax.device_put(rest, NamedSharding(mesh, P()))
        rows = (jax.device_put(a, NamedSharding(mesh, ACT_BTD)) for a in (x, dy))
        return jax.tree.leaves(run(placed, state, *rows))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("clusters", "phase"), [(1, "dense"), (1, "sparse"), (2, "sparse")])
def test_experts_on_several_gpus_are_those_of_one(clusters, phase, shape):
    if len(jax.devices()) < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} GPUs")
    one, many = (_experts(clusters, phase, mesh) for mesh in (None, shape))
    for a, b in zip(one, many, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # A token whose choice is a tie to rounding may meet another expert.
        assert np.linalg.norm(a - b) < 3e-2 * np.linalg.norm(a)


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


def test_every_form_of_a_gather_is_counted():
    hlo = """
  %one.1 = bf16[2,3]{1,0} all-gather(%x), dimensions={0}
  %some.2 = (s32[4]{0}, bf16[2,5]{1,0}, /*index=2*/f8e4m3fn[7]{0}) all-gather(%x, %y, %z)
  %part.3 = bf16[2,5]{1,0} get-tuple-element(%some.2), index=1
  %start.4 = ((bf16[11]{0}), bf16[22]{0}) all-gather-start(%x), dimensions={0}
  %done.4 = bf16[22]{0} all-gather-done(%start.4)
  %start.5 = ((bf16[13]{0}, s32[17]{0}), (bf16[26]{0}, s32[34]{0})) all-gather-start(%x, %y)
  %done.5 = (bf16[26]{0}, s32[34]{0}) all-gather-done(%start.5)
"""
    assert gathered(hlo) == {"bf16": 6 + 10 + 22 + 26, "s32": 4 + 34, "f8e4m3fn": 7}
