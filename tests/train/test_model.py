"""The Llama against a plain numpy forward pass in float64, and its forms against each other."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.spec import Sparsity
from train.attention import products_of_one, rope
from train.config import ModelConfig
from train.model import Llama

CONFIG = ModelConfig(
    width=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden=64, vocab_size=48,
    compute_dtype="float32",
)  # fmt: skip
SPARSITY = Sparsity(m=8, v=4)


def make(seed=0, sparsity=None, **changes):
    return Llama(
        dataclasses.replace(CONFIG, **changes), sparsity, rngs=nnx.Rngs(params=jax.random.key(seed))
    )


def tokens(batch=2, length=12):
    return jnp.asarray(np.random.default_rng(0).integers(0, 48, (batch, length)), jnp.int32)


def numpy_forward(model, ids):
    """Embedding, blocks and final norm in float64, written from the definitions."""
    f64 = lambda p: np.asarray(p[...], np.float64)
    config = model.config
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * f64(g)

    def rotate(x):  # (S, N, d): pairs (i, i + d/2) turned by position * theta^(-2i/d)
        half = x.shape[-1] // 2
        out = np.empty_like(x)
        for position in range(x.shape[0]):
            for i in range(half):
                angle = position * config.rope_theta ** (-i / half)
                c, s = np.cos(angle), np.sin(angle)
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i], out[position, :, i + half] = a * c - b * s, b * c + a * s
        return out

    def block(x, b):
        y = norm(x, b.norm_attention.scale)
        heads = lambda w: (y @ f64(w)).reshape(len(y), -1, config.head_dim)
        q, k = heads(b.attention.q), heads(b.attention.k)
        if config.qk_norm:
            q, k = norm(q, b.attention.q_norm.scale), norm(k, b.attention.k_norm.scale)
        q, k = rotate(q), rotate(k)
        v = heads(b.attention.v)
        mixed = np.zeros_like(q)
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.kv_heads)
            for i in range(len(y)):
                scores = k[: i + 1, group] @ q[i, head] / np.sqrt(config.head_dim)
                p = np.exp(scores - scores.max())
                mixed[i, head] = (p / p.sum()) @ v[: i + 1, group]
        x = x + mixed.reshape(len(y), -1) @ f64(b.attention.out)
        y = norm(x, b.norm_ffn.scale)
        up = y @ f64(b.ffn.w1).T
        if config.ffn == "relu2":
            act = np.maximum(up, 0) ** 2
        elif config.ffn == "relu2_gated":
            act = np.maximum(up, 0) ** 2 * (y @ f64(b.ffn.wg).T)
        else:
            gate = y @ f64(b.ffn.wg).T
            act = gate / (1 + np.exp(-gate)) * up
        return x + act @ f64(b.ffn.w2)

    rows = []
    for row in np.asarray(ids):
        x = f64(model.embedding)[row]
        for b in model.blocks:
            x = block(x, b)
        rows.append(norm(x, model.norm.scale))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("ffn", "qk_norm"), [("relu2", True), ("relu2_gated", False), ("swiglu", False)]
)
def test_forward_against_numpy(ffn, qk_norm):
    model = make(ffn=ffn, scan_layers=False, qk_norm=qk_norm)
    if qk_norm:
        for i, block in enumerate(model.blocks):
            block.attention.q_norm.scale[...] *= 1.5 + i
            block.attention.k_norm.scale[...] *= jnp.linspace(0.5, 1.5, 8)
    got, stats = jax.jit(lambda ids: model(ids))(tokens())
    assert stats is None
    np.testing.assert_allclose(got, numpy_forward(model, tokens()), atol=2e-4)


def stacked_like(unrolled, scanned):
    """The scanned model with the unrolled model's parameters."""
    layers = [nnx.state(block) for block in unrolled.blocks]
    nnx.update(scanned.blocks, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    for name in ("embedding", "head"):
        getattr(scanned, name)[...] = getattr(unrolled, name)[...]
    return scanned


@pytest.mark.parametrize("sparse", [False, True])
def test_scanned_and_unrolled_layers_agree(sparse):
    unrolled = make(sparsity=SPARSITY, scan_layers=False)
    scanned = stacked_like(unrolled, make(seed=1, sparsity=SPARSITY))
    outputs = []
    for model in (unrolled, scanned):
        packed = model.pack() if sparse else None
        outputs.append(model(tokens(), packed))
    chex.assert_trees_all_close(outputs[0][0], outputs[1][0], atol=1e-5)
    if sparse:
        assert outputs[0][1].counts.shape == (3, 2)
        chex.assert_trees_all_equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize(("remat", "scan"), [("full", True), ("dots", False)])
def test_rematerialisation_changes_no_gradient(remat, scan):
    def gradient(policy):
        model = make(sparsity=SPARSITY, remat=policy, scan_layers=scan, num_layers=2)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        packed = model.pack()
        loss = lambda p: jnp.sum(nnx.merge(graph, p, rest)(tokens(), packed)[0] ** 2)
        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(remat), gradient("none"), rtol=1e-4, atol=1e-4)


def test_attention_is_causal():
    model = make()
    ids = tokens()
    changed = ids.at[:, 8:].set((ids[:, 8:] + 1) % 48)
    before, after = model(ids)[0], model(changed)[0]
    chex.assert_trees_all_equal(before[:, :8], after[:, :8])
    assert not np.allclose(before[:, 8:], after[:, 8:])


def test_products_of_one_matrix():
    """Values and gradients are those of plain products; of a sum of gradients the left operand is
    one of them, never a sum, or cuBLAS could not add it."""
    rng = np.random.default_rng(0)
    x, *weights = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3, 8), (8, 8), (8, 4), (8, 6)))
    gradients = tuple(jnp.asarray(rng.normal(size=(2, 3, n))) for n in (8, 4, 6))
    plain = lambda x, weights: tuple(x @ w for w in weights)

    def pull(function):
        y, vjp = jax.vjp(function, x, tuple(weights))
        return y, vjp(gradients)

    chex.assert_trees_all_close(pull(products_of_one), pull(plain), rtol=1e-5)
    equations = jax.make_jaxpr(lambda: pull(products_of_one)[1])().eqns
    made_by = {v: e.primitive.name for e in equations for v in e.outvars}
    sums = [e for e in equations if e.primitive.name in ("add", "add_any")]
    assert [made_by[e.invars[0]] for e in sums] == ["dot_general"] * 2


def test_rope_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    q, k = (rope(jnp.broadcast_to(a, (1, 20, 1, 8)), 100.0)[0, :, 0] for a in (q, k))
    np.testing.assert_allclose(q[3] @ k[1], q[15] @ k[13], rtol=1e-4)


def test_initialisation_scales():
    model = make(width=256, hidden=1024, num_heads=4, num_kv_heads=4, vocab_size=512)
    blocks = model.blocks
    scale = lambda p: float(jnp.std(p[...]))
    np.testing.assert_allclose(scale(blocks.attention.q), 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(scale(blocks.ffn.w1), 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(scale(blocks.ffn.w2), 1024**-0.5 / 6**0.5, rtol=0.02)
    layers = blocks.ffn.w1[...]
    assert not np.allclose(layers[0], layers[1])
    # A normal cut at two standard deviations has 0.88 of its standard deviation.
    np.testing.assert_allclose(scale(model.embedding), 0.88 * 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(scale(model.head), 256**-0.5, rtol=0.02)
    scales = {"init_scale": 0.5, "output_scale": 0.0, "embedding_scale": 1.0, "head_scale": 0.1}
    model = make(width=256, hidden=1024, num_heads=4, num_kv_heads=4, vocab_size=512, **scales)
    blocks = model.blocks
    assert not np.any(blocks.ffn.w2[...])
    assert not np.any(blocks.attention.out[...])
    np.testing.assert_allclose(scale(blocks.ffn.w1), 0.5 * 256**-0.5, rtol=0.02)
    np.testing.assert_allclose(scale(model.embedding), 0.88, rtol=0.02)
    np.testing.assert_allclose(scale(model.head), 0.1 * 256**-0.5, rtol=0.02)


def test_unresolved_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=None"):
        make(vocab_size=None)


@pytest.mark.parametrize("ffn", ["relu2_gated", "swiglu"])
@pytest.mark.parametrize("scan", [True, False])
def test_decoding_with_a_cache_gives_the_whole_sequence_again(ffn, scan):
    """Two sequences of different lengths, padded on the right with junk, then token by token."""
    model = make(ffn=ffn, scan_layers=scan, qk_norm=scan)
    ids = tokens(length=12)
    want = model(ids)[0]
    lengths = jnp.array([5, 3])
    prompt = jnp.where(jnp.arange(6) < lengths[:, None], ids[:, :6], 7)
    hidden, cache = jax.jit(model.prefill)(prompt)
    row = jnp.arange(2)
    np.testing.assert_allclose(hidden[row, lengths - 1], want[row, lengths - 1], atol=1e-5)
    # What is behind a sequence's end has no influence, whatever it is.
    cache = jax.tree.map(
        lambda a: jnp.pad(a, [(0, 0)] * 2 + [(0, 6)] + [(0, 0)] * 2, constant_values=100.0), cache
    )
    decode = jax.jit(model.decode)
    for position in (lengths + i for i in range(7)):
        x, cache = decode(ids[row, position], cache, position)
        np.testing.assert_allclose(x, want[row, position], atol=1e-5)


def test_decoding_in_the_sparse_view():
    model = make(sparsity=SPARSITY)
    packed = model.pack()
    ids = tokens(length=8)
    want = model(ids, packed)[0]
    hidden, cache = jax.jit(model.prefill)(ids[:, :4], packed)
    np.testing.assert_allclose(hidden, want[:, :4], atol=1e-5)
    cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 2 + [(0, 4)] + [(0, 0)] * 2), cache)
    decode = jax.jit(model.decode)
    for i in range(4, 8):
        x, cache = decode(ids[:, i], cache, jnp.full((2,), i), packed)
        np.testing.assert_allclose(x, want[:, i], atol=1e-5)
