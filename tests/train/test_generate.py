"""Generation against forward passes without a cache, and its command line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.run_helpers import full_logits, write_run
from train.generate import Decoder, Sampling
from train.generate.__main__ import main
from train.generate.sampling import filtered_logits, sample
from train.trained import load_run

PROMPTS = [[5, 80, 33], [200], list(range(60, 77)), [256, 1, 2, 3, 4]]


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    write_run(folder, step=9, sparse=True)
    return folder


@pytest.fixture(name="run", scope="module")
def _run(folder):
    return load_run(folder)


@pytest.fixture(name="decoder", scope="module")
def _decoder(run):
    return Decoder(run)


def greedy_without_cache(run, prompts, count, packed=None):
    """One forward pass over the whole sequence for every token."""
    longest = max(map(len, prompts)) + count
    ids = np.zeros((len(prompts), longest), np.int32)
    lengths = np.array([len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    forward = jax.jit(
        lambda model, ids: full_logits(dataclasses.replace(run, model=model), ids, packed)
    )
    rows = np.arange(len(prompts))
    for i in range(count):
        logits = np.array(forward(run.model, ids))[rows, lengths + i - 1, :257]
        ids[rows, lengths + i] = logits.argmax(-1)
    return [row[n : n + count].tolist() for row, n in zip(ids, lengths, strict=True)]


def until_end(ids):
    return ids[: ids.index(256)] if 256 in ids else ids


@pytest.mark.parametrize("view", ["dense", "sparse"])
def test_greedy_with_a_cache_equals_forward_passes_without(run, view):
    """Prompts of different lengths in one batch, over more than one chunk."""
    packed = run.model.pack() if view == "sparse" else None
    want = greedy_without_cache(run, PROMPTS, 20, packed)
    got = Decoder(run, view=view)(PROMPTS, max_tokens=20)
    assert got == [until_end(ids) for ids in want]
    assert len({tuple(ids) for ids in want}) == len(PROMPTS)


def test_products_in_8_bits_end_with_the_training(tmp_path, run):
    """The same weights are the same model, however their products were computed."""
    write_run(tmp_path / "fp8", step=9, sparse=True, ffn_precision="fp8")
    fp8 = load_run(tmp_path / "fp8")
    ids = np.asarray([PROMPTS[2]])
    np.testing.assert_array_equal(full_logits(fp8, ids), full_logits(run, ids))


def test_ids_that_pad_the_vocabulary_are_never_drawn(run, decoder):
    head = jnp.zeros_like(run.model.head[...]).at[:, 300].set(1.0)
    graph, state = nnx.split(run.model)
    model = nnx.merge(graph, state)
    model.head[...] = head
    assert run.config.model.vocab_size > 300
    (ids,) = Decoder(dataclasses.replace(run, model=model))(
        [[1]], max_tokens=3, sampling=Sampling(1.0)
    )
    assert all(i < 257 for i in ids)


def test_the_end_of_a_document_and_a_caller_stop_a_row(decoder, monkeypatch):
    first, second = decoder(PROMPTS[:2], max_tokens=40)
    end = next(i for i, token in enumerate(first) if token not in first[:i] and i > 2)
    monkeypatch.setattr(decoder, "eos_id", first[end])
    got = decoder(PROMPTS[:2], max_tokens=40)
    assert got[0] == first[:end]
    cut = second.index(first[end]) if first[end] in second else 40
    assert got[1] == second[:cut]
    monkeypatch.undo()
    asked = []
    stopped = decoder(
        PROMPTS[:2], max_tokens=40, stop=lambda row, ids: asked.append((row, len(ids))) or row == 1
    )
    assert stopped[0] == first
    assert stopped[1] == second[:16]


def test_a_sampled_row_is_a_function_of_prompt_place_and_seed(decoder):
    hot = Sampling(temperature=1.0)
    prompts = [PROMPTS[0]] * 2
    first, second = decoder(prompts, max_tokens=16, sampling=hot, seed=3)
    assert decoder(prompts, max_tokens=16, sampling=hot, seed=3) == [first, second]
    assert first != second
    assert decoder(prompts[:1], max_tokens=16, sampling=hot, seed=3) == [first]
    assert decoder(prompts, max_tokens=16, sampling=hot, seed=4) != [first, second]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(2.0), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_k=9), {0, 1, 2, 3, 4}),
        # Probabilities 0.4 (index 3), 0.3, 0.15, 0.1, 0.05.
        (Sampling(1.0, top_p=0.39), {3}),
        (Sampling(1.0, top_p=0.41), {1, 3}),
        (Sampling(1.0, top_p=0.71), {0, 1, 3}),
        # After top_k the two left have 4/7 and 3/7.
        (Sampling(1.0, top_k=2, top_p=0.5), {3}),
    ],
)
def test_what_may_be_drawn(sampling, kept):
    p = np.array([0.15, 0.3, 0.1, 0.4, 0.05])
    got = np.asarray(filtered_logits(jnp.log(jnp.asarray(p, jnp.float32)), sampling))
    assert set(np.flatnonzero(np.isfinite(got))) == kept
    index = sorted(kept)
    want = np.log(p[index]) / sampling.temperature
    np.testing.assert_allclose(got[index], want, atol=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1e-6, 1e-38])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature, top_p):
    logits, keys = jnp.array([[1.0, 3.0, 5.0, 4.9]]), jax.random.split(jax.random.key(0), 1)
    token = sample(logits, Sampling(temperature, top_p=top_p), keys)
    assert token.tolist() == [2]


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]])).repeat(4000, 0)
    keys = jax.random.split(jax.random.key(0), 4000)
    counts = np.bincount(np.asarray(sample(logits, Sampling(1.0), keys)), minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d([[]], max_tokens=1), "without tokens"),
        (lambda d: d([], max_tokens=1), "prompts=\\[\\]"),
        (lambda d: d([[1]], max_tokens=0), "max_tokens=0"),
        (lambda d: d([[1] * 60], max_tokens=5), "60 tokens and max_tokens=5 exceed the 64"),
        (lambda d: Sampling(-1.0), "temperature=-1.0"),
        (lambda d: Sampling(1.0, top_k=-1), "top_k=-1"),
        (lambda d: Sampling(1.0, top_p=0.0), "top_p=0.0"),
    ],
)
def test_bad_values(decoder, make, message):
    with pytest.raises(ValueError, match=message):
        make(decoder)


def test_command_line(folder, run, decoder, capsys):
    assert (
        main(["--run", str(folder), "--prompt", "So ", "--temperature", "0", "--max-tokens", "20"])
        == 0
    )
    (ids,) = decoder([run.encode("So ")], max_tokens=20)
    assert capsys.readouterr().out == "So " + run.tokenizer.decode(ids) + "\n"


def test_several_samples(folder, capsys):
    assert main(["--run", str(folder), "--samples", "2", "--max-tokens", "5", "--seed", "1"]) == 0
    first, second = capsys.readouterr().out.removeprefix("--- 1\n").split("\n--- 2\n")
    assert first != second.removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "/nowhere"], "run '/nowhere' does not exist"),
        (["--step", "7"], "no checkpoint of step=7"),
        (["--max-tokens", "100"], "exceed the 64 positions"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--samples", "0"], "samples=0"),
    ],
)
def test_refused_in_one_line(folder, capsys, arguments, message):
    assert main(["--run", str(folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_no_sparse_view_without_clusters(tmp_path, capsys):
    write_run(tmp_path / "early", step=4, sparse=True)
    write_run(tmp_path / "dense", step=20)
    for name in ("early", "dense"):
        assert main(["--run", str(tmp_path / name), "--view", "sparse"]) == 2
        assert "needs a run whose sparse phase has begun" in capsys.readouterr().err
