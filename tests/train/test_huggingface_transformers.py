"""Logits, tokens and generation of transformers against ours, both ways."""

import jax
import numpy as np
import pytest

from tests.train.run_helpers import full_logits, write_run
from train.generate import Decoder
from train.huggingface.export import export_run
from train.huggingface.imports import import_model
from train.huggingface.tokenizer_files import byte_tokenizer
from train.trained import load_run, thresholded

needs = "needs the extra interop (torch, transformers)"
pytest.importorskip("safetensors", reason=needs)
torch = pytest.importorskip("torch", reason=needs)
transformers = pytest.importorskip("transformers", reason=needs)

IDS = np.random.default_rng(0).integers(0, 257, (2, 40))


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def our_logits(run):
    return np.asarray(jax.jit(lambda run_model: full_logits(run, IDS))(run.model))


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(
    ("ffn", "architecture"),
    [
        ("swiglu", "LlamaForCausalLM"),
        ("relu2_gated", "LlamaForCausalLM"),
        ("relu2", "ArceeForCausalLM"),
    ],
)
def test_exported_logits(tmp_path, ffn, architecture):
    """float32 on both sides; the scale of the logits is about 3."""
    write_run(tmp_path / "run", ffn=ffn, rope_theta=500.0, norm_eps=1e-3)
    run = load_run(tmp_path / "run")
    theirs = load(export_run(run, tmp_path / "model", dtype="float32"))
    assert type(theirs).__name__ == architecture
    assert theirs.dtype == torch.float32
    want = our_logits(run)
    assert np.std(want) > 0.5
    np.testing.assert_allclose(their_logits(theirs), want, atol=2e-5)


def test_exported_thresholded_logits(tmp_path):
    write_run(tmp_path / "run", step=5, sparse=True)
    run = load_run(tmp_path / "run")
    export_run(run, tmp_path / "model", dtype="float32", weights="thresholded")
    got, dense = their_logits(load(tmp_path / "model")), our_logits(run)
    pruned = load_run(tmp_path / "run")
    object.__setattr__(pruned, "model", thresholded(run))
    np.testing.assert_allclose(got, our_logits(pruned), atol=2e-5)
    assert np.max(np.abs(got - dense)) > 0.1


def test_exported_bfloat16_logits_and_tokens(tmp_path):
    """Both compute in bfloat16; and the exported tokenizer and generation settings work."""
    write_run(tmp_path / "run", ffn="relu2", compute_dtype="bfloat16")
    run = load_run(tmp_path / "run")
    export_run(run, tmp_path / "model")
    theirs = load(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    got, want = their_logits(theirs), our_logits(run)
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02 * np.std(want)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = " Ein Gruß\tan\n\n日本 <b>"
    assert tokenizer(text).input_ids == run.encode(text)
    assert tokenizer.decode(run.encode(text)) == text
    assert tokenizer.eos_token_id == run.tokenizer.eos_id == theirs.generation_config.eos_token_id


def test_greedy_generation_agrees(tmp_path):
    write_run(tmp_path / "run", ffn="swiglu")
    run = load_run(tmp_path / "run")
    export_run(run, tmp_path / "model", dtype="float32")
    prompt = run.encode("The end")
    (ours,) = Decoder(run)([prompt], max_tokens=24)
    with torch.no_grad():
        theirs = load(tmp_path / "model").generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False
        )
    theirs = theirs[0, len(prompt) :].tolist()
    assert ours == (theirs[: theirs.index(256)] if 256 in theirs else theirs)
    assert len(set(ours)) > 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "act"), [("Llama", "silu"), ("Llama", "relu2"), ("Arcee", "relu2")]
)
def test_imported_logits(tmp_path, kind, act, tied):
    """A random model of theirs, saved by transformers in several files."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, hidden_act=act, rms_norm_eps=1e-4,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        tie_word_embeddings=tied, initializer_range=0.15, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    import_model(tmp_path / "model", tmp_path / "run")
    run = load_run(tmp_path / "run")
    want = their_logits(theirs)
    assert np.std(want) > 0.3
    np.testing.assert_allclose(our_logits(run), want, atol=2e-5)
    assert run.config.model.ffn == {"silu": "swiglu"}.get(
        act, "relu2" if kind == "Arcee" else "relu2_gated"
    )


def test_imported_bfloat16_logits(tmp_path):
    """A bfloat16 file, computed in bfloat16 by them and in float32 by us."""
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "run", tokenizer="bytes")
    got, want = our_logits(load_run(tmp_path / "run")), their_logits(theirs)
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02 * np.std(want)
    exact = their_logits(load(tmp_path / "model", dtype=torch.float32))
    np.testing.assert_allclose(got, exact, atol=2e-5)
