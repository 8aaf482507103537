"""The recipe of `configs/` on several GPUs: what is trained is what one GPU trains."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from kernels import registry
from sparsejax.spec import Sparsity
from train.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, resolve
from train.mesh import AXES, put_batch
from train.optimizer import make_optimizer
from train.state import init_state, model_graph
from train.step import make_cluster_step, make_train_step

SEQUENCES, TOKENS, VOCABULARY = 8, 512, 257
SPARSE, STEPS = 4, 5
"""Sparse steps come first: clusters of weights that differ by rounding may differ altogether."""

RECIPE = Sparsity(m=32, v=128, shared_every=4, attention_projections=True)
WITHOUT_WEIGHTS = Sparsity(m=32, v=128, shared_every=4, weights=False)


def small(sparsity: Sparsity) -> Config:
    """Two layers wide enough for the kernels of both backends on two GPUs."""
    return resolve(
        Config(
            steps=STEPS,
            batch_size=SEQUENCES,
            sequence_length=TOKENS,
            model=ModelConfig(
                width=512,
                hidden=4096,
                num_layers=2,
                num_heads=4,
                scan_layers=False,
                loss_chunk=TOKENS,
                compute_dtype="bfloat16",
            ),
            sparsity=sparsity,
            schedule=ScheduleConfig(sparse_fraction=SPARSE / STEPS),
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=1),
        ),
        tokenizer_vocab_size=VOCABULARY,
    )


def trained(config: Config, shape: tuple[int, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss of every step, and the first gradients as Adam has them, on a mesh of data x fsdp."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(*shape, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    optimizer, log = make_optimizer(config), []
    with jax.set_mesh(mesh):
        graph, state = model_graph(config), init_state(config, optimizer, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = {
            phase: jax.jit(
                make_train_step(config, graph, optimizer, phase),
                out_shardings=(placed, placed.step),
            )
            for phase in ("dense", "sparse")
        }
        begin = jax.jit(make_cluster_step(config, graph, begin=True), out_shardings=placed)
        state = begin(state)
        for i in range(STEPS):
            # Few words, unevenly: there is something to learn, and to route by.
            draws = np.random.default_rng(i).geometric(0.05, (SEQUENCES, TOKENS + 1))
            ids = np.minimum(draws, VOCABULARY - 1).astype(np.int32)
            batch = put_batch(mesh, {"inputs": ids[:, :-1], "targets": ids[:, 1:]})
            state, metrics = step["sparse" if i < SPARSE else "dense"](state, batch)
            log.append(float(metrics["loss"]))
            if i == 0:
                gradients = jax.tree.map(np.asarray, optax.tree.get(state.opt_state, "mu"))
    found = jax.tree_util.tree_leaves_with_path(gradients)
    return np.array(log), {jax.tree_util.keystr(path): leaf for path, leaf in found}


def compare(sparsity: Sparsity, shape: tuple[int, int]) -> None:
    config = small(sparsity)
    (one, gradients), (many, gradients_too) = (trained(config, mesh) for mesh in ((1, 1), shape))
    assert one[-1] < one[0] - 0.5
    assert gradients.keys() == gradients_too.keys()
    # Products in bfloat16 (2^-9) whose sums are rounded in another order.
    for name, own in gradients.items():
        far = np.linalg.norm(gradients_too[name] - own) / np.linalg.norm(own)
        assert far < 5e-2, (name, far)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-4)
    # A token whose choice is a tie to rounding may meet another expert from then on.
    np.testing.assert_allclose(many, one, rtol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2), (1, 8)])
@pytest.mark.parametrize("sparsity", [RECIPE, WITHOUT_WEIGHTS])
def test_the_recipe_trains_on_several_gpus_as_on_one(sparsity, shape):
    if len(jax.devices()) < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} GPUs")
    assert registry.available_backends()[0] != "reference"
    compare(sparsity, shape)
