"""States with layers in a list and in a stack: one from the other, and what runs on a stack."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from tests.train.test_step import CONFIG, Rig, batch
from train.flip import lower_cluster_event, make_cluster_event
from train.layers import stacked, stacked_config, unstacked
from train.optimizer import make_optimizer
from train.state import abstract_state, create_state, init_state, model_graph

LIST = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, scan_layers=False))


@pytest.fixture(name="rig", scope="module")
def _rig():
    return Rig(model=LIST.model)


def copied(state):
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def likes(rig):
    optimizer = make_optimizer(rig.config)
    return [
        abstract_state(c, optimizer, rig.mesh) for c in (rig.config, stacked_config(rig.config))
    ]


def test_a_new_state_is_what_the_unrolled_program_makes(rig):
    optimizer = make_optimizer(rig.config)
    state = init_state(rig.config, optimizer, rig.mesh)
    expected = jax.jit(lambda seed: create_state(rig.config, optimizer, seed))(np.uint32(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    chex.assert_trees_all_close(state, expected, rtol=1e-6, atol=1e-7)


def test_stacked_and_back(rig):
    as_list, as_stack = likes(rig)
    given = copied(rig.state)
    stack = stacked(given, as_stack)
    chex.assert_trees_all_equal_shapes_and_dtypes(stack, as_stack)
    w1 = rig.state.params["blocks"][1]["ffn"]["w1"][...]
    np.testing.assert_array_equal(stack.params["blocks"]["ffn"]["w1"][...][1], w1)
    assert given.params["blocks"][1]["ffn"]["w1"][...].is_deleted()
    back = unstacked(stack, as_list)
    assert stack.params["blocks"]["ffn"]["w1"][...].is_deleted()
    chex.assert_trees_all_equal(back, rig.state)


def test_clustering_a_list_of_layers(rig):
    """Through a stack, the same as traced layer by layer."""
    state, _ = rig.step("dense")(copied(rig.state), batch(0))
    traced = jax.jit(make_cluster_event(rig.config, model_graph(rig.config), "begin"))
    expected = traced(state, batch(1))
    found = lower_cluster_event(rig.config, "begin", state, batch(1))()(copied(state), batch(1))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
