"""Packed weights of shared neurons, stored once and put back."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference_grouped, shared_rows
from kernels.hopper.grouped_neurons import row_order as hopper_order
from kernels.triton.grouped24 import row_order as triton_order
from sparsejax import stored_once
from sparsejax.ops.packed_ffn import PackedMatrix
from sparsejax.spec import Sparsity


def packed(hidden, sparsity, seed, order):
    """As a backend packs a group: rows of values in its order."""
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(hidden, 64)), jnp.float32)
    values, metadata, dense = reference_grouped.pack_weight24(
        shared_rows.repeat(w, 0, sparsity.num_experts, sparsity.shared_every),
        num_experts=sparsity.num_experts,
        m=sparsity.m,
        scale=1.5,
        dtype=jnp.float32,
    )
    live = dense.shape[1]
    by_expert = values.reshape(sparsity.num_experts, live, -1)[:, order(live)]
    return PackedMatrix(dense, by_expert.reshape(values.shape), metadata)


@pytest.mark.parametrize("order", [hopper_order, triton_order, np.arange])
@pytest.mark.parametrize(("m", "every", "superblocks"), [(8, 4, 32), (32, 4, 32), (16, 2, 64)])
def test_what_is_left_out_is_put_back(m, every, superblocks, order):
    sparsity, hidden = Sparsity(m=m, v=64, shared_every=every), superblocks * every * m
    assert stored_once.serves(sparsity, hidden)
    groups = [packed(hidden, sparsity, seed, order) for seed in range(2)]
    stored = [stored_once.once(group, sparsity, hidden) for group in groups]
    assert stored[0].dense.shape == (hidden, 64)
    assert stored[0].values.shape == (hidden, 32)
    assert stored[0].metadata.shape[0] == hidden // 64
    joined = PackedMatrix(*(jnp.concatenate(a) for a in zip(*stored, strict=True)))
    found = stored_once.for_each_expert(joined, sparsity, hidden)
    for a, *parts in zip(found, *groups, strict=True):
        np.testing.assert_array_equal(a, np.concatenate(parts))
    # Rows alone, as on a CPU.
    alone = stored_once.for_each_expert(PackedMatrix(joined.dense), sparsity, hidden)
    np.testing.assert_array_equal(alone.dense, found.dense)
    assert alone.values is None
    assert alone.metadata is None


def test_rows_that_an_order_mixes_are_not_told_apart():
    sparsity = Sparsity(m=16, v=64, shared_every=4)
    sizes = shared_rows.of_hidden(2048, 4, 4)
    assert sizes.routed == 384
    assert stored_once.serves(sparsity, 2048)
    assert not stored_once.serves(sparsity, 1024)
    assert not stored_once.serves(Sparsity(m=16, v=64), 2048)
    assert not stored_once.serves(Sparsity(routing=False, activations=False), 2048)
