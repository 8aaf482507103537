"""Runs that start from the parameters of another run."""

import dataclasses
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.train.run_helpers import random_parameters, write_run
from tests.train.test_loop import SILENT, records, small
from train import main
from train.checkpoint import Checkpointer
from train.config import CheckpointConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from train.data.tokenizer import ByteTokenizer
from train.init_from import check_init_from, other_tokenizer, with_parameters_from
from train.loop import train
from train.mesh import make_mesh
from train.optimizer import make_optimizer
from train.run_folder import CHECKPOINTS
from train.state import init_state
from train.trained import load_run
from train.tree import block_leaf, names


@pytest.fixture(name="source")
def _source(tmp_path):
    """The folder of a run of random weights, and its configuration."""
    return tmp_path / "source", write_run(tmp_path / "source", step=7, sparse=True)


def start(config):
    mesh = make_mesh(MeshConfig(), config.batch_size)
    state = init_state(config, make_optimizer(config), mesh)
    fresh = jax.tree.map(np.asarray, state)
    return fresh, *with_parameters_from(config, state, mesh)


def by_name(tree):
    return {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_parameters_and_nothing_else(source, scan_layers):
    folder, config = source
    changes = {"scan_layers": scan_layers, "logits": "compute", "ffn_precision": "fp8"}
    model = dataclasses.replace(config.model, **changes)
    config = dataclasses.replace(config, init_from=str(folder), model=model, seed=3)
    check_init_from(config)
    fresh, state, step = start(config)
    assert step == 7
    theirs = by_name(load_run(folder).model)
    for path, leaf in by_name(state.params).items():
        if len(path) > 1 and isinstance(path[1], int):
            leaf_there = theirs[(path[0], *path[2:])][path[1]]
        else:
            leaf_there = theirs[path]
        np.testing.assert_array_equal(leaf, leaf_there)
    same = lambda state: (state.step, state.routing, state.opt_state, state.key)
    chex.assert_trees_all_equal(same(state), same(fresh))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_mixture_keeps_its_choice_of_experts(tmp_path, scan_layers):
    folder = tmp_path / "mixture"
    config = write_run(folder, step=7, experts=4, hidden=64)
    biases = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    state = {"step": jnp.int32(8), **random_parameters(config)}
    state["routing"]["blocks"]["ffn"]["bias"][...] = jnp.asarray(biases)
    record = dataclasses.asdict(config)
    with Checkpointer(folder / CHECKPOINTS, keep=1, config=record) as checkpointer:
        checkpointer.save(8, state, {})
    model = dataclasses.replace(config.model, scan_layers=scan_layers)
    config = dataclasses.replace(config, init_from=str(folder), model=model, seed=3)
    fresh, state, step = start(config)
    assert step == 8
    np.testing.assert_array_equal(block_leaf(state.routing, "ffn", "bias"), biases)
    np.testing.assert_array_equal(
        block_leaf(state.params, "ffn", "router"),
        load_run(folder).model.blocks.ffn.router[...],
    )
    np.testing.assert_array_equal(
        block_leaf(state.routing, "ffn", "beta"), block_leaf(fresh.routing, "ffn", "beta")
    )
    assert jax.tree.structure(state) == jax.tree.structure(fresh)


def test_a_run_continues_where_its_source_ended(tmp_path):
    config = small(
        tmp_path,
        name="first",
        steps=2,
        schedule=ScheduleConfig(),
        optimizer=OptimizerConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every=0),
    )
    first = train(config, console=SILENT)
    still = OptimizerConfig(learning_rate=1e-12, warmup_steps=0, weight_decay=0.0)
    config = dataclasses.replace(
        config, name="second", optimizer=still, init_from=str(first.folder), seed=9
    )
    console = Console(file=io.StringIO(), width=200)
    second = train(config, console=console)
    np.testing.assert_allclose(second.losses["loss_dense"], first.losses["loss_dense"], rtol=1e-5)
    assert f"parameters of {first.folder}, step 2" in console.file.getvalue()
    assert "another tokenizer" not in console.file.getvalue()
    assert records(second.folder)[0]["step"] == 2  # of its own two


def test_another_tokenizer_is_noticed(source):
    folder, config = source
    config = dataclasses.replace(config, init_from=str(folder))
    assert not other_tokenizer(config, ByteTokenizer())

    class Other:
        fingerprint = "other"

    assert other_tokenizer(config, Other())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.width", "64"], "model.width is 32 there, 64 here"),
        (["--model.num-heads", "8"], "model.num_heads is 4 there, 8 here"),
        (["--model.ffn", "swiglu", "--schedule.sparse-fraction", "0"], "model.ffn is relu2 there"),
        (["--model.rope-theta", "500000"], "model.rope_theta is 10000.0 there, 500000.0 here"),
        (["--model.vocab-size", "512"], "model.vocab_size is 384 there, 512 here"),
        (["--init-from", "/nowhere"], "init_from='/nowhere' is no run's folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(source, capsys, arguments, message):
    folder, _ = source
    same = ["--model.width", "32", "--model.num-layers", "2", "--model.num-heads", "4"]
    same += ["--model.num-kv-heads", "2", "--model.hidden", "64", "--init-from", str(folder)]
    output = folder.parent / "runs"
    assert main.main([*same, "--output", str(output), *arguments]) == 2
    _, error = capsys.readouterr()
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_a_source_without_a_checkpoint_is_refused(source):
    folder, config = source
    for path in (folder / "checkpoints").iterdir():
        (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^no checkpoint in .*checkpoints$"):
        check_init_from(dataclasses.replace(config, init_from=str(folder)))
