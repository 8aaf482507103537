"""Export and import without transformers: files, names, dtypes, tokenizers, refusals."""

import json
import shlex
import shutil

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.train.run_helpers import write_run
from train import main as train_command
from train.config import resolve
from train.data.config import DataConfig
from train.data.tokenizer import ByteTokenizer
from train.huggingface.__main__ import main
from train.huggingface.architecture import from_transformers
from train.huggingface.export import export_run
from train.huggingface.imports import import_model
from train.huggingface.tokenizer_files import byte_tokenizer
from train.init_from import check_init_from
from train.trained import load_run

safetensors = pytest.importorskip("safetensors", reason="needs the extra huggingface")
FORMS = ["relu2", "relu2_gated", "swiglu"]


def flat(run):
    return nnx.to_flat_state(nnx.state(run.model, nnx.Param))


def read(folder):
    """All tensors of an exported folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.fixture(name="exported", scope="module")
def _exported(tmp_path_factory):
    """A small SwiGLU model exported in float32, and its run."""
    folder = tmp_path_factory.mktemp("exported")
    write_run(folder / "run", ffn="swiglu")
    run = load_run(folder / "run")
    return export_run(run, folder / "model", dtype="float32"), run


@pytest.fixture(name="copy")
def _copy(exported, tmp_path):
    """A copy of the exported model to damage."""
    return shutil.copytree(exported[0], tmp_path / "model")


@pytest.mark.parametrize("ffn", FORMS)
def test_there_and_back_changes_no_bit(tmp_path, ffn):
    write_run(tmp_path / "run", ffn=ffn)
    export_run(tmp_path / "run", tmp_path / "model", dtype="float32")
    import_model(tmp_path / "model", tmp_path / "back")
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "back")
    for (path, a), (other, b) in zip(flat(before), flat(after), strict=True):
        assert path == other
        np.testing.assert_array_equal(a[...], b[...])
    assert after.config.model == before.config.model
    assert after.config.sequence_length == 64
    assert after.encode("Grüße") == before.encode("Grüße")
    assert after.tokenizer.eos_id == 256


def test_unrolled_layers_export_like_stacked_ones(tmp_path):
    write_run(tmp_path / "run", scan_layers=False, num_layers=3)
    export_run(tmp_path / "run", tmp_path / "model", dtype="float32")
    tensors, run = read(tmp_path / "model"), load_run(tmp_path / "run")
    for i in range(3):
        np.testing.assert_array_equal(
            tensors[f"model.layers.{i}.mlp.up_proj.weight"], run.model.blocks[i].ffn.w1[...]
        )
        np.testing.assert_array_equal(
            tensors[f"model.layers.{i}.self_attn.q_proj.weight"],
            run.model.blocks[i].attention.q[...].T,
        )


def test_shards(tmp_path, exported):
    _, run = exported
    limit = 20_000
    export_run(run, tmp_path / "model", dtype="float32", shard_bytes=limit)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert size <= limit or len(names) == 1
        assert {index["weight_map"][name] for name in names} == {file.name}
        total += size
    assert index["metadata"]["total_size"] == total
    import_model(tmp_path / "model", tmp_path / "back")
    for (_, a), (_, b) in zip(flat(run), flat(load_run(tmp_path / "back")), strict=True):
        np.testing.assert_array_equal(a[...], b[...])


def test_bfloat16_is_rounded_once(tmp_path, exported):
    folder, run = exported
    export_run(run, tmp_path / "model")
    low, full = read(tmp_path / "model"), read(folder)
    assert low.keys() == full.keys()
    for name, values in low.items():
        np.testing.assert_array_equal(values, full[name].astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def soft_threshold(w, beta):
    """S-STE in numpy: the second smallest magnitude of four comes off; rows are (.., H, D)."""
    groups = w.astype(np.float64).reshape(*w.shape[:-1], -1, 4)
    t = np.sort(np.abs(groups), axis=-1)[..., 1:2]
    kept = np.sign(groups) * np.maximum(np.abs(groups) - t, 0)
    return beta * kept.reshape(w.shape)


@pytest.mark.parametrize("scan", [True, False])
def test_thresholded_weights(tmp_path, scan):
    write_run(tmp_path / "run", step=5, sparse=True, ffn="relu2_gated", scan_layers=scan)
    run = load_run(tmp_path / "run")
    dense = read(export_run(run, tmp_path / "dense", dtype="float32"))
    sparse = read(export_run(run, tmp_path / "sparse", dtype="float32", weights="thresholded"))
    for i in range(2):
        block = run.model.blocks if scan else run.model.blocks[i]
        beta = np.asarray(block.ffn.beta[...])[i] if scan else np.asarray(block.ffn.beta[...])
        mlp = f"model.layers.{i}.mlp."
        # Order of beta: w1, w2, wg. down_proj is transposed, so that it is pruned along outputs.
        for theirs, number in (("gate_proj", 0), ("down_proj", 1), ("up_proj", 2)):
            name = f"{mlp}{theirs}.weight"
            turn = (lambda a: a.T) if theirs == "down_proj" else (lambda a: a)
            want = soft_threshold(turn(dense[name]), beta[number])
            np.testing.assert_allclose(turn(sparse[name]), want, rtol=1e-5, atol=1e-7)
            assert np.mean(sparse[name] == 0) >= 0.5
        np.testing.assert_array_equal(
            sparse[f"model.layers.{i}.self_attn.q_proj.weight"],
            dense[f"model.layers.{i}.self_attn.q_proj.weight"],
        )


def test_tied_head_and_old_files(tmp_path, exported, copy):
    """A tied checkpoint has no head; old ones hold the rotary frequencies as well."""
    tensors = read(copy)
    embedding = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save(copy, tensors, tie_word_embeddings=True)
    import_model(copy, tmp_path / "back")
    np.testing.assert_array_equal(load_run(tmp_path / "back").model.head[...], embedding.T)


def save(folder, tensors, **settings):
    from safetensors.numpy import save_file

    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    change(folder, **settings)


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*must be one of"),
        ({"architectures": None}, r"must be one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' of LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "type 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 16}, "head_dim=16 times num_attention_heads=4"),
        ({"num_attention_heads": "many"}, "a whole number as num_attention_heads"),
        ({"num_attention_heads": 0}, "a whole number as num_attention_heads, not 0"),
        ({"num_key_value_heads": "2"}, "a whole number as num_key_value_heads, not '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope scaling of type None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters=.*one"),
        ({"rope_theta": None, "rope_parameters": None}, "a number as rope_theta, not None"),
        ({"rms_norm_eps": None}, "a number as rms_norm_eps, not None"),
        ({"architectures": "LlamaForCausalLM"}, "must be one of"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"hidden_size": 64, "head_dim": 16}, r"embed_tokens.weight is \(384, 32\), where"),
        ({"vocab_size": 128}, "ids up to 256, config.json only vocab_size=128"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight of .* no place"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, copy, settings, message):
    change(copy, **settings)
    refused(copy, tmp_path, message)


def refused(folder, tmp_path, message):
    with pytest.raises(ValueError, match=message) as caught:
        import_model(folder, tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_files_that_do_not_fit(tmp_path, copy):
    index, weights = copy / "model.safetensors.index.json", copy / "model.safetensors"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    refused(copy, tmp_path, r"names '../model.safetensors'")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "other.safetensors"}}))
    refused(copy, tmp_path, "other.safetensors is missing")
    index.write_text("{}")
    refused(copy, tmp_path, "no weight_map")
    index.unlink()
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(copy, tmp_path, "model.safetensors cannot be read")
    weights.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(copy, tmp_path, "neither model.safetensors nor")
    (copy / "tokenizer.json").unlink()
    refused(copy, tmp_path, "name a tokenizer.json with --tokenizer")
    (copy / "config.json").write_text("[")
    refused(copy, tmp_path, "is not JSON")


def test_integer_tensors_are_refused(tmp_path, copy):
    tensors = read(copy)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save(copy, tensors)
    refused(copy, tmp_path, "lm_head.weight is I8")


def test_defaults_of_the_architecture():
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 128,
    }  # fmt: skip
    model = from_transformers(values)
    assert (model.ffn, model.norm_eps, model.rope_theta) == ("swiglu", 1e-6, 10_000.0)
    assert model.kv_heads == 4
    assert from_transformers(values | {"rope_theta": 5e5}).rope_theta == 5e5
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert from_transformers(values | new).rope_theta == 5e5


@given(st.text())
def test_byte_tokenizer_has_the_ids_of_the_bytes(text):
    tokenizer = byte_tokenizer()
    text = text.replace("<|endoftext|>", "")
    ids = tokenizer.encode(text).ids
    assert ids == ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(ids) == text


def test_a_prefix_that_training_never_saw_is_left_out(tmp_path):
    """A tokenizer.json that begins every text with <s>: training ignores that, so must the export.

    But in an imported run the model knows <s>: prompts and exports begin with it.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))
    write_run(tmp_path / "run", changes={"data": data})
    run = load_run(tmp_path / "run")
    assert run.encode("a") == [97]
    export_run(run, tmp_path / "model")
    load = lambda folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load(tmp_path / "model").encode("a").ids == [97]

    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    import_model(tmp_path / "model", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert back.encode("a") == [257, 97]
    export_run(back, tmp_path / "again")
    assert load(tmp_path / "again").encode("a").ids == [257, 97]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["bos_token_id"] == 257


def test_command_line(tmp_path, capsys):
    write_run(tmp_path / "run", ffn="swiglu")
    write_run(tmp_path / "other", qk_norm=True)
    run, model, back, other = (str(tmp_path / name) for name in ("run", "model", "back", "other"))
    assert main(["export", "--run", run, "--output", model]) == 0
    assert main(["import", "--model", model, "--output", back, "--tokenizer", "bytes"]) == 0
    said = capsys.readouterr().out
    assert f"train.generate --run {back}" in said
    # The command to train it on builds its very model.
    command = shlex.split(said.split("python -m train.main ")[1].split(" --data.source")[0])
    arguments = train_command.parse(command)
    assert arguments.init_from == back
    check_init_from(resolve(arguments, tokenizer_vocab_size=257))
    for arguments, message in (
        (["export", "--run", run, "--output", model], "exists already"),
        (["export", "--run", run, "--output", model + "2", "--weights", "thresholded"], "sparse"),
        (["export", "--run", other, "--output", model + "2"], "model.qk_norm=True"),
        (["import", "--model", run, "--output", back + "2"], "architectures"),
        (["import", "--model", model, "--output", back], "exists already"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model", "back", "other"}
