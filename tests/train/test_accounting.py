"""Counts against numbers worked out by hand, and against the products of the model itself."""

import dataclasses
import math

import pytest

from sparsejax.spec import Sparsity
from train import accounting
from train.config import Config, MeshConfig, ModelConfig, ScheduleConfig, resolve


def llama1b(**changes) -> Config:
    model = ModelConfig(width=2048, num_layers=25, num_heads=16, vocab_size=128_256)
    config = Config(batch_size=4, sequence_length=4096, model=model)
    return resolve(dataclasses.replace(config, **changes), tokenizer_vocab_size=128_256)


def llama7b(**changes) -> Config:
    model = ModelConfig(width=4096, num_layers=32, num_heads=32, vocab_size=128_256)
    config = Config(batch_size=4, sequence_length=4096, model=model)
    return resolve(dataclasses.replace(config, **changes), tokenizer_vocab_size=128_256)


def tiny(*, sparsity=None, tokens=256, **model) -> Config:
    shape = {"width": 64, "num_layers": 3, "num_heads": 4, "hidden": 256, "vocab_size": 384} | model
    config = Config(
        batch_size=2,
        sequence_length=tokens // 2,
        model=ModelConfig(**shape),
        sparsity=sparsity or Sparsity(m=16, v=16),
    )
    return resolve(config, tokenizer_vocab_size=384)


def test_parameters_of_llama1b():
    count = accounting.parameters(llama1b())
    assert count.embedding == 262_668_288
    assert count.head == 262_668_288
    assert count.projections == 419_430_400  # 25 layers of 16,777,216
    assert count.ffn == 838_860_800  # 25 layers of 33,554,432
    assert count.norms == 104_448  # 51 gains of 2,048
    assert count.total == 1_783_732_224
    assert count.body == 1_258_395_648


def test_parameters_of_llama7b():
    count = accounting.parameters(llama7b())
    assert count.embedding == count.head == 525_336_576
    assert count.projections == 2_147_483_648
    assert count.ffn == 4_294_967_296
    assert count.norms == 266_240
    assert count.total == 7_493_390_336


def test_parameters_of_the_published_llama_3_8b():
    # Grouped queries and three matrices: Meta reports 8,030,261,248 parameters for this shape.
    model = ModelConfig(
        width=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn="swiglu", hidden=14_336
    )
    config = resolve(Config(model=model), tokenizer_vocab_size=128_256)
    assert accounting.parameters(config).total == 8_030_261_248


def test_flops_of_llama1b_by_hand():
    flops = accounting.dense_flops(llama1b())
    # 16,384 tokens: 6 T times the weights; attention 6 B S^2 D for each layer.
    assert flops.ffn == 82_463_372_083_200
    assert flops.projections == 41_231_686_041_600
    assert flops.head == 25_821_343_383_552
    assert flops.attention == 20_615_843_020_800
    assert flops.router == 0
    assert math.isclose(sum(flops.shares().values()), 1.0)
    assert math.isclose(flops.shares()["ffn"], 0.4847, abs_tol=5e-5)


def test_share_of_the_ffn_grows_with_the_model():
    shares = [accounting.dense_flops(c).shares()["ffn"] for c in (llama1b(), llama7b())]
    assert shares == sorted(shares)
    assert math.isclose(shares[-1], 0.5723, abs_tol=5e-5)


def test_products_of_a_sparse_step():
    config = tiny()
    dense = 2 * 256 * 64 * 256 * 3
    products = {p.name: p for p in accounting.ffn_products(config)}
    assert {p.dense_flops for p in products.values()} == {dense}
    executed = {name: dense / p.sparse_flops for name, p in products.items()}
    assert executed == {  # M/4 = 4 experts; half of that again where an operand is 2:4
        "Y1 = X W1": 8,
        "Y3 = Y2 W2": 8,
        "dY2 = dY3 W2^T": 8,
        "dX = dY1 W1^T": 8,
        "dW2 = Y2^T dY3": 4,
        "dW1 = X^T dY1": 4,
    }
    flops = accounting.sparse_flops(config)
    assert flops.ffn == dense  # 4/8 + 2/4
    assert flops.router == 2 * 256 * 64 * 4 * 3
    assert flops.attention == accounting.dense_flops(config).attention


@pytest.mark.parametrize(
    ("switches", "ratio"),
    [
        ({"routing": False}, (4 * 0.5 + 2) / 6),
        ({"routing": False, "activations": False}, (2 * 0.5 + 4) / 6),
        ({"routing": False, "weights": False}, (2 * 0.5 + 4) / 6),
        ({"weights": False, "activations": False}, 1 / 4),
        ({"weights": False, "activations": False, "routing": False}, 1),
        ({"m": 32}, (4 * 0.5 + 2) / 6 / 8),
        ({"shared_every": 4}, (4 * 0.5 + 2) / 6 * 7 / 16),
        ({"weight_gradient": "tokens24", "dense_neurons": 0.25}, (4 * 0.5 + 2 * 0.625) / 6 / 4),
        (
            {
                "weight_gradient": "tokens24",
                "dense_neurons": 0.5,
                "weights": False,
                "routing": False,
            },
            (2 * 0.5 + 2 + 2 * 0.75) / 6,
        ),
    ],
)
def test_sparse_ffn_flops_of_each_switch(switches, ratio):
    config = dataclasses.replace(tiny(), sparsity=Sparsity(**{"m": 16, "v": 16} | switches))
    dense, sparse = accounting.dense_flops(config), accounting.sparse_flops(config)
    assert math.isclose(sparse.ffn / dense.ffn, ratio, rel_tol=1e-6)  # FLOPs are whole numbers


def test_gated_ffn_has_nine_products():
    config = tiny(ffn="relu2_gated", hidden=192)
    products = accounting.ffn_products(config)
    assert len(products) == 9
    assert sum(p.dense_flops for p in products) == accounting.dense_flops(config).ffn
    assert sum(p.sparse for p in products) == 6
    assert sum(p.backward for p in products) == 6


def test_swiglu_has_no_sparse_step():
    config = tiny(ffn="swiglu", hidden=192)
    assert accounting.sparse_flops(config) == accounting.dense_flops(config)
    assert not any(p.sparse for p in accounting.ffn_products(config))


def test_recomputed_flops():
    config = tiny()
    dense = accounting.dense_flops(config)
    # Of the two-matrix network's products only the first is needed again.
    forward = dense.ffn // 6 + (dense.projections + dense.attention) // 3
    for remat, expected in (("none", 0), ("dots", 0), ("full", forward)):
        changed = tiny(remat=remat)
        assert accounting.recomputed_flops(changed) == expected
    own = tiny(remat="dots", attention="xla")
    assert accounting.recomputed_flops(own) == dense.attention // 3
    assert accounting.recomputed_flops(changed, sparse=True) < forward
    mixture = tiny(remat="full", experts=4)
    dense = accounting.dense_flops(mixture)
    assert accounting.recomputed_flops(mixture) == (dense.total - dense.head) // 3


def test_amdahl():
    assert accounting.amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert accounting.amdahl(0.0, 9.0) == 1
    assert accounting.amdahl(1.0, 1.7) == pytest.approx(1.7)
    # The whole step's FLOPs shrink by exactly what the formula says of the FFN's share and gain.
    config = llama7b()
    dense, sparse = accounting.dense_flops(config), accounting.sparse_flops(config)
    bound = accounting.amdahl(dense.shares()["ffn"], dense.ffn / sparse.ffn)
    assert bound == pytest.approx(dense.total / (sparse.total - sparse.router))
    with pytest.raises(ValueError, match=r"share=1\.2 must be"):
        accounting.amdahl(1.2, 2.0)
    with pytest.raises(ValueError, match=r"gain=0 must be"):
        accounting.amdahl(0.5, 0)


def test_mfu():
    assert accounting.mfu(1e15, 2.0, 1e15) == 0.5
    with pytest.raises(ValueError, match="seconds=0 must be positive"):
        accounting.mfu(1e15, 0, 1e15)


def test_padded_tokens():
    assert accounting.padded_tokens(tiny()) == 256 + 4 * 16  # 60, to a multiple of V = 16
    split = dataclasses.replace(tiny(), micro_batches=2)
    assert accounting.padded_tokens(split) == 2 * (128 + 4 * 16)
    assert accounting.padded_tokens(tiny(sparsity=Sparsity(routing=False))) == 256


def test_each_device_pads_its_own_tokens_and_scores_its_own_experts():
    config = dataclasses.replace(tiny(), mesh=MeshConfig(data=1, fsdp=2))
    assert accounting.padded_tokens(config) == 2 * (128 + 4 * 16)
    # As many replicas as there are devices, where the configuration leaves it open.
    config = dataclasses.replace(tiny(), batch_size=4, mesh=MeshConfig(fsdp=2))
    assert accounting.padded_tokens(config, devices=4) == 4 * (128 + 4 * 16)
    split = dataclasses.replace(config, micro_batches=2)
    assert accounting.padded_tokens(split) == 2 * accounting.padded_tokens(tiny(), devices=2)
    # Devices of the tensor axis hold other neurons, not other tokens.
    tensor = tiny(sparsity=Sparsity(m=16, v=16))
    tensor = dataclasses.replace(tensor, mesh=MeshConfig(data=1, tensor=2))
    assert accounting.padded_tokens(tensor) == accounting.padded_tokens(tiny())
    router = 2 * 256 * 64 * 4 * 3
    assert accounting.sparse_flops(tensor).router == 2 * router
    shards = tiny(sparsity=Sparsity(m=16, v=16, shards=4))
    assert accounting.sparse_flops(shards).router == 4 * router
    # On the same run, smaller parts have more padding in memory too.
    parts = [dataclasses.replace(tiny(), batch_size=8, mesh=MeshConfig(data=n)) for n in (1, 8)]
    whole, own = (accounting.memory(part, sparse=True) for part in parts)
    assert own.activations > whole.activations / 8


def test_memory_of_the_optimiser_state():
    count = accounting.parameters(llama1b())
    estimate = accounting.memory(llama1b())
    assert estimate.master_weights == 4 * count.total
    assert estimate.adam_moments == 8 * count.total
    assert estimate.gradients == 4 * count.total
    assert estimate.total == sum(size for _, size in estimate.items())
    # float32 logits and their bf16 gradient, 2,048 tokens
    assert estimate.logits_chunk == 2048 * 128_256 * 6


def test_memory_is_divided_over_the_mesh():
    one = accounting.memory(llama1b())
    split = accounting.memory(llama1b(mesh=MeshConfig(fsdp=2, tensor=2)))
    gains = accounting.parameters(llama1b()).norms
    assert split.master_weights == (one.master_weights - 4 * gains) // 4 + 4 * gains
    assert one.activations / 4 < split.activations < one.activations / 2
    assert split.logits_chunk == one.logits_chunk // 2
    # More replicas change the tokens of a device, not its state.
    replicas = accounting.memory(llama1b(), devices=4)
    assert replicas.master_weights == one.master_weights
    assert replicas.activations == one.activations // 4


def test_micro_batches_trade_activations_for_a_second_gradient():
    whole, split = accounting.memory(llama1b()), accounting.memory(llama1b(micro_batches=4))
    assert split.activations == whole.activations // 4
    assert split.gradients == 2 * whole.gradients


@pytest.mark.parametrize("norm", ["xla", "kernel"])
def test_memory_of_activations_falls_with_rematerialisation(norm):
    sizes = {}
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(llama1b().model, remat=remat, norm=norm)
        sizes[remat] = accounting.memory(llama1b(model=model)).activations
    assert sizes["full"] > 25 * 16_384 * 2048 * 2  # the inputs of the blocks
    assert sizes["full"] < sizes["none"] / 4
    # The input of a block and the results of its products are more than what is left to keep
    # where norms keep their results alone.
    order = ["full", "dots", "none"] if norm == "xla" else ["full", "none", "dots"]
    assert sorted(sizes, key=sizes.get) == order


def test_memory_of_products_in_8_bits():
    config = llama1b(sparsity=Sparsity(m=16, v=128))
    model = dataclasses.replace(config.model, ffn_precision="fp8")
    in_8_bits = dataclasses.replace(config, model=model)
    dense, more = (accounting.memory(c).activations for c in (config, in_8_bits))
    # A byte for each input of the two products; the block at hand counts twice.
    assert more - dense == 26 * 16_384 * (2048 + 8192)
    # A sparse step packs a byte, half of one and the metadata instead of twice as much.
    exact, packed = (accounting.memory(c, sparse=True) for c in (config, in_8_bits))
    ffn = accounting.parameters(config).ffn
    assert exact.weight_copies - packed.weight_copies == ffn * (2 + 1) - ffn * 3 // 2
    assert exact.activations == packed.activations
    # What kernels do not serve stays as it is.
    other = dataclasses.replace(in_8_bits, sparsity=Sparsity(m=16, v=64))
    assert accounting.memory(other, sparse=True).weight_copies == exact.weight_copies


def test_memory_of_a_step_whose_projections_alone_are_sparse():
    nothing = Sparsity(weights=False, routing=False, activations=False)
    projections = dataclasses.replace(nothing, attention_projections=True)
    dense = accounting.memory(llama1b(sparsity=nothing))
    assert accounting.memory(llama1b(sparsity=nothing), sparse=True) == dense
    sparse = accounting.memory(llama1b(sparsity=projections), sparse=True)
    packed = accounting.parameters(llama1b()).projections * (1 + 1 / 8)
    assert sparse == dataclasses.replace(dense, weight_copies=dense.weight_copies + packed)


def test_memory_of_a_sparse_step():
    config = llama1b()
    dense, sparse = accounting.memory(config), accounting.memory(config, sparse=True)
    assert sparse.master_weights == dense.master_weights
    assert sparse.activations < dense.activations
    # Beside the bf16 copy: half of the values, and one byte of metadata for each eight elements.
    packed = accounting.parameters(config).ffn * (1 + 1 / 8)
    assert sparse.weight_copies - dense.weight_copies == packed
    # A quarter of the neurons, once for each of four experts: in bf16 and packed.
    shared = llama1b(sparsity=Sparsity(m=16, v=128, shared_every=4))
    more = accounting.memory(shared, sparse=True)
    of_ffn = accounting.parameters(config).ffn * (3 + 1 / 8)
    assert more.weight_copies - sparse.weight_copies == 3 / 4 * of_ffn
    assert more.activations > sparse.activations
    # Spread over fsdp they are stored and gathered once, but in 8 bits.
    routed, spread = llama1b(sparsity=Sparsity(m=16, v=128)), MeshConfig(fsdp=2)

    def copies(config, precision):
        model = dataclasses.replace(config.model, ffn_precision=precision)
        config = dataclasses.replace(config, mesh=spread, model=model)
        return accounting.memory(config, sparse=True).weight_copies

    assert copies(shared, "compute") == copies(routed, "compute")
    of_ffn = accounting.parameters(config).ffn * (3 / 2 + 1 / 8) / 2
    assert copies(shared, "fp8") - copies(routed, "fp8") == 3 / 4 * of_ffn


def test_memory_of_a_gated_sparse_step():
    base = llama1b()
    model = dataclasses.replace(base.model, ffn="relu2_gated", hidden=5632)

    def activations(backend):
        sparsity = dataclasses.replace(base.sparsity, backend=backend)
        config = llama1b(model=model, sparsity=sparsity)
        return accounting.memory(config, sparse=True).activations

    assert activations(None) == activations("hopper") == activations("triton")
    # Kernels keep two whole products of 1,408 neurons, and not halves and a byte for each four; the
    # block at hand counts twice.
    rows = accounting.padded_tokens(base)
    assert activations(None) - activations("reference") == 26 * rows * (2 * 1408 - 1408 // 4)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(fsdp=2), 3, "devices=3"),
        (MeshConfig(data=2, fsdp=2), 8, "devices=8"),
        (
            MeshConfig(fsdp=8),
            None,
            "batch_size=4 / micro_batches=1 must be a multiple of data.fsdp=8",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, devices, message):
    with pytest.raises(ValueError, match=message):
        accounting.memory(llama1b(mesh=mesh), devices=devices)


def test_an_unresolved_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=None"):
        accounting.parameters(Config())


def test_run_summary():
    config = llama1b(steps=1000, schedule=ScheduleConfig(warmup_steps=100, sparse_fraction=0.6))
    total = accounting.run_summary(config)
    dense, sparse = accounting.dense_flops(config).total, accounting.sparse_flops(config).total
    assert (total.steps, total.sparse_steps, total.sparse_share) == (1000, 600, 0.6)
    assert total.tokens == 16_384_000
    assert total.sparse_tokens == 9_830_400
    assert total.dense_flops == 1000 * dense
    assert total.flops == 400 * dense + 600 * sparse
    assert total.dense_flops / total.flops == pytest.approx(accounting.amdahl(0.6, dense / sparse))
    assert total.tokens_per_parameter == pytest.approx(16_384_000 / (1_783_732_224 - 262_668_288))


def _count_products(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr, loops included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner_jaxpr in value if isinstance(value, tuple | list) else (value,):
                inner_jaxpr = getattr(inner_jaxpr, "jaxpr", inner_jaxpr)
                if hasattr(inner_jaxpr, "eqns"):
                    total += repeats * _count_products(inner_jaxpr)
    return total


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("ffn", ["relu2", "relu2_gated", "swiglu"])
def test_counts_agree_with_the_model(ffn, remat):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from train.loss import cross_entropy
    from train.model import Llama

    config = tiny(ffn=ffn, hidden=192, num_kv_heads=2, qk_norm=ffn == "swiglu", remat=remat)
    graph, params = nnx.split(
        nnx.eval_shape(lambda: Llama(config.model, None, rngs=nnx.Rngs(0))), nnx.Param
    )
    sizes = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert sizes == accounting.parameters(config).total

    def loss(params, tokens):
        model = nnx.merge(graph, params)
        hidden, _ = model(tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return cross_entropy(hidden, model.head[...], tokens.reshape(-1), chunk=64)

    tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
    counted = _count_products(jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens).jaxpr)
    flops = accounting.dense_flops(config)
    # XLA's own attention multiplies the whole square, of which the causal half is counted.
    square = flops.attention + (flops.attention // 3 if remat == "full" else 0)
    assert counted == flops.total + accounting.recomputed_flops(config) + square


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_memory_agrees_with_the_compiler(remat):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from train.loss import cross_entropy
    from train.model import Llama

    # Float32 and XLA's attention: a CPU computes both as a GPU does, and nothing is cast.
    config = tiny(
        tokens=512, width=128, hidden=512, remat=remat, attention="xla", compute_dtype="float32"
    )
    graph, params = nnx.split(
        nnx.eval_shape(lambda: Llama(config.model, None, rngs=nnx.Rngs(0))), nnx.Param
    )

    def loss(params, tokens):
        model = nnx.merge(graph, params)
        hidden = model(tokens)[0].reshape(-1, config.model.width)
        return cross_entropy(hidden, model.head[...], tokens.reshape(-1), chunk=128)

    tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    temporary = analysis.temp_size_in_bytes
    estimate = accounting.memory(config)
    assert estimate.activations + estimate.logits_chunk == pytest.approx(temporary, rel=0.25)
