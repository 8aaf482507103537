"""Every inconsistent configuration is refused in one line that names the values."""

import dataclasses

import pytest

import configs
from sparsejax.spec import Sparsity
from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig, validate
from train.config import resolve as resolve_config
from train.data.config import DataConfig

BASE = Config(
    steps=100, batch_size=4, sequence_length=64, optimizer=OptimizerConfig(warmup_steps=5)
)
SPARSE = dataclasses.replace(BASE, schedule=ScheduleConfig(warmup_steps=10, sparse_fraction=0.5))


def resolve(config, vocabulary=257):
    return resolve_config(config, tokenizer_vocab_size=vocabulary)


def changed(config, **changes):
    """`config` with nested fields replaced, by names such as model__width."""
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part: value})
    return config


@pytest.mark.parametrize("name", configs.names())
def test_named_configurations_are_consistent(name):
    config = resolve(configs.get(name))
    assert config.name == name
    assert (config.sparse_steps > 0) == (config.model.ffn != "swiglu")


def test_unknown_configuration_lists_the_known():
    with pytest.raises(ValueError, match=r"'llama2b' is unknown; known: .*llama1b.*tiny"):
        configs.get("llama2b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__width": 130}, "model.width=130 must be a multiple of model.num_heads=4"),
        ({"model__width": 12}, "head dimension 3"),
        ({"model__num_kv_heads": 3}, "num_heads=4 must be a multiple of model.num_kv_heads=3"),
        ({"model__hidden": 500}, "hidden=500 must be a positive multiple of m=16"),
        ({"sparsity__m": 12}, "m=12 must be one of"),
        ({"sparsity__v": 96}, "tokens=256 must be a positive multiple of v=96"),
        ({"name": ""}, "name='' must be that of a folder in 'runs'"),
        ({"name": "."}, "name='.' must be"),
        ({"name": ".."}, "name='..' must be"),
        ({"name": "../other"}, "name='../other' must be"),
        ({"name": "/other"}, "name='/other' must be"),
        ({"model__vocab_size": 200}, "model.vocab_size=200 is smaller than the tokenizer's 257"),
        ({"schedule__warmup_steps": 60}, "warmup_steps=60 and the 50 sparse steps"),
        ({"schedule__sparse_fraction": 1.5}, r"sparse_fraction=1.5 must be in \[0, 1\]"),
        ({"optimizer__warmup_steps": 101}, "optimizer.warmup_steps=101 exceeds steps=100"),
        ({"optimizer__learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"optimizer__attention_rate": 0.0}, "attention_rate=0.0 must be positive"),
        ({"optimizer__ffn_rate": -1.0}, "ffn_rate=-1.0 must be positive"),
        ({"optimizer__embedding_rate": 0.0}, "embedding_rate=0.0 must be positive"),
        ({"optimizer__head_rate": -0.5}, "head_rate=-0.5 must be positive"),
        ({"optimizer__b2": 1.0}, r"b2=1.0 must be in \[0, 1\)"),
        ({"model__ffn": "swiglu"}, "model.ffn=swiglu has no sparse phase"),
        ({"micro_batches": 3}, "batch_size=4 must be a multiple of micro_batches=3"),
        (
            {"micro_batches": 4, "sparsity__v": 128},
            "tokens=64 must be a positive multiple of v=128",
        ),
        ({"optimizer__decay": "step"}, "optimizer.decay='step' must be cosine, linear or wsd"),
        ({"optimizer__decay_fraction": 0.0}, r"decay_fraction=0.0 must be in \(0, 1\]"),
        ({"model__ffn_precision": "int8"}, "model.ffn_precision='int8' must be one of"),
        ({"model__ffn": "gelu"}, "model.ffn='gelu' must be one of"),
        ({"model__remat": "all"}, "model.remat='all' must be one of"),
        ({"model__attention": "flash"}, "model.attention='flash' must be one of"),
        ({"model__norm": "triton"}, "model.norm='triton' must be one of"),
        ({"model__compute_dtype": "bf16"}, "model.compute_dtype='bf16' must be one of"),
        ({"model__logits": "bfloat16"}, "model.logits='bfloat16' must be one of"),
        ({"model__experts": 4, "sparsity__m": 0}, "m=0, routing=True, .* must be 16"),
        ({"model__output_scale": -1.0}, "model.output_scale=-1.0 must not be negative"),
        ({"model__embedding_scale": -1.0}, "model.embedding_scale=-1.0 must not be negative"),
        ({"optimizer__rewarm_at": "end"}, "optimizer.rewarm_at='end' must be one of"),
        ({"optimizer__reset_moments": "all"}, "optimizer.reset_moments='all' must be one of"),
        (
            {
                "schedule": ScheduleConfig(sparse_fraction=0.5, rescale_dense=True),
                "sparsity__weights": False,
            },
            "schedule.rescale_dense=True needs sparsity.weights=True",
        ),
        (
            {
                "schedule": ScheduleConfig(sparse_fraction=0.5, threshold_dense=True),
                "sparsity__weights": False,
            },
            "schedule.threshold_dense=True needs sparsity.weights=True",
        ),
        (
            {"schedule": ScheduleConfig(rescale_dense=True, threshold_dense=True)},
            "schedule.rescale_dense=True and threshold_dense=True",
        ),
        ({"data": DataConfig(seed=-1)}, "data.seed=-1 must be between 0 and 2"),
        ({"seed": 2**32}, "seed=4294967296 must be between 0 and 2"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"checkpoint__every": -1}, "checkpoint.every=-1 must not be negative"),
        ({"mesh__tensor": 3}, "must be multiples of mesh.tensor=3"),
        ({"model__attention": "cudnn", "model__num_heads": 1, "model__width": 256}, "not 256"),
        ({"model__attention": "cudnn", "model__compute_dtype": "float32"}, "needs bfloat16"),
    ],
)
def test_inconsistent_combinations(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve(changed(SPARSE, **changes))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_ids_is_refused_before_the_tokenizer_is_known():
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"model.vocab_size={size} must be at least 1"):
            validate(changed(BASE, model__vocab_size=size))


def test_resolve_fills_in_what_depends_on_the_tokenizer():
    config = resolve(SPARSE)
    assert (config.model.vocab_size, config.model.hidden, config.model.num_kv_heads) == (
        384,
        512,
        4,
    )
    assert config.sparse_steps == 50
    assert resolve(config) == config


def test_swiglu_trains_densely_and_has_two_thirds_of_the_neurons():
    config = resolve(changed(BASE, model__ffn="swiglu"))
    assert config.model.hidden == 384


def test_the_default_size_of_the_gated_form_is_served_by_kernels():
    sizes = {}
    for name in ("tiny", "small", "medium", "llama1b", "llama7b"):
        # Without neurons that every token meets, which llama1b and llama7b have.
        one = {"sparsity__m": 16, "sparsity__shared_every": 0}
        config = changed(configs.get(name), model__ffn="relu2_gated", **one)
        other = changed(config, sparsity__m=32)
        sizes[name] = config.model.ffn_hidden
        assert other.model.ffn_hidden == sizes[name]
        assert config.sparsity.live_neurons(sizes[name]) % 128 == 0
    assert sizes == {
        "tiny": 512, "small": 1536, "medium": 2048, "llama1b": 5632, "llama7b": 11_264,
    }  # fmt: skip
    # What a run, a checkpoint or an imported model says is what it is.
    assert changed(config, model__hidden=11_008).model.ffn_hidden == 11_008


def test_published_shapes():
    one, seven = configs.get("llama1b"), configs.get("llama7b")
    shape = lambda c: (c.model.width, c.model.num_layers, c.model.num_heads, c.sequence_length)
    assert shape(one) == (2048, 25, 16, 4096)
    assert shape(seven) == (4096, 32, 32, 4096)
    assert one.model.vocab_size == seven.model.vocab_size == 128_256


def test_defaults_are_frozen():
    for default in (Config(), ModelConfig(), ScheduleConfig(), MeshConfig(), Sparsity()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            default.name = "changed"
