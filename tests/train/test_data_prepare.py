"""Text to shards and back, by function and by command line."""

import errno
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.train.data_helpers import open_small, take
from train.data import documents, source
from train.data import prepare as prepare_module
from train.data.config import DataConfig
from train.data.prepare import prepare
from train.data.tokenizer import ByteTokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
SAMPLE = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A byte-level BPE of 300 tokens whose file also asks for truncation and padding."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [SAMPLE],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.enable_truncation(max_length=4)
    made.enable_padding(length=50)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return path


def stream(folder: Path, part: str = "train") -> np.ndarray:
    meta = json.loads((folder / "meta.json").read_text())
    return np.concatenate([np.fromfile(folder / name, meta["dtype"]) for name in meta[part]])


def split_documents(tokens: np.ndarray, tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6),
    with_file=st.booleans(),
    shard_tokens=st.integers(3, 60),
)
def test_jsonl_round_trip(tmp_path, bpe, texts, with_file, shard_tokens):
    texts[0] += SAMPLE[:80]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": t}) + "\n" for t in texts))
    tokenizer = load_tokenizer(bpe if with_file else None)
    meta = prepare(
        [str(tmp_path / "a.jsonl")],
        tokenizer,
        tmp_path / "out",
        jsonl_field="t",
        shard_tokens=shard_tokens,
        overwrite=True,
        quiet=True,
    )
    wanted = [text for text in texts if text]
    assert split_documents(stream(tmp_path / "out"), tokenizer) == wanted
    assert meta["documents"] == len(wanted)
    assert meta["dtype"] == "uint16"
    assert max(meta["train"].values()) <= shard_tokens
    assert meta["tokens"] == sum(meta["train"].values())
    assert (tmp_path / "out" / "tokenizer.json").exists() == with_file


def test_text_in_pieces_round_trip(tmp_path, monkeypatch):
    # Pieces smaller than characters and lines, with every kind of line end and an odd last line.
    monkeypatch.setattr(documents, "_PIECE_BYTES", 3)
    monkeypatch.setattr(documents, "_LONGEST_LINE", 2)
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 4)
    texts = {"a.txt": "žluťoučký kůň\r\n🐎\rúpěl\n\n\n", "b.md": "no line end ☃", "c.txt": "x" * 50}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
    (tmp_path / "e.txt.xz").write_bytes(lzma.compress("smaller é".encode()))
    (tmp_path / "f.txt").write_bytes("\ufeffmarked".encode())
    prepare([str(p) for p in sorted(tmp_path.iterdir())], ByteTokenizer(), tmp_path / "out")
    assert split_documents(stream(tmp_path / "out"), ByteTokenizer()) == [
        *texts.values(),
        "zipped é",
        "smaller é",
        "marked",
    ]


def test_a_document_cannot_forge_its_end(tmp_path, bpe):
    text = "before <|endoftext|> after"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = load_tokenizer(bpe)
    prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out", quiet=True)
    assert split_documents(stream(tmp_path / "out"), tokenizer) == [text]
    assert tokenizer.encode(text).tolist() == stream(tmp_path / "out")[:-1].tolist()


def test_tokenizer_against_the_library(bpe):
    raw = tokenizers.Tokenizer.from_file(str(bpe))
    raw.no_truncation()
    raw.no_padding()
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.encode(SAMPLE).tolist() == raw.encode(SAMPLE).ids
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (raw.get_vocab_size(), 0)
    assert tokenizer.decode([0, *raw.encode(SAMPLE).ids, 0]) == SAMPLE
    with pytest.raises(ValueError, match=r"no token <end>: .*data\.end_of_document"):
        load_tokenizer(bpe, "<end>")
    other = load_tokenizer(bpe, "a")
    assert other.eos_id == raw.token_to_id("a")
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("shard_tokens", [20, 100, 10_000])
def test_validation_shards_are_the_tail_in_whole_documents(tmp_path, shard_tokens):
    texts = [f"document {i} " + "x" * (i % 7) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    meta = prepare(
        [str(tmp_path / "a.jsonl")],
        ByteTokenizer(),
        tmp_path / "out",
        validation_fraction=0.25,
        shard_tokens=shard_tokens,
        quiet=True,
    )
    total = meta["tokens"] + meta["validation_tokens"]
    assert total * 0.125 <= meta["validation_tokens"] <= total * 0.25
    train, validation = stream(tmp_path / "out"), stream(tmp_path / "out", "validation")
    assert (len(train), len(validation)) == (meta["tokens"], meta["validation_tokens"])
    both = split_documents(np.concatenate([train, validation]), ByteTokenizer())
    assert both == texts
    assert train[-1] == ByteTokenizer.eos_id  # also where it is in a later shard than the cut
    with open_small(DataConfig(source=str(tmp_path / "out"))) as data:
        assert (data.train_tokens, data.validation_tokens) == (len(train), len(validation))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 text: .* at byte 5"),
        ("a.txt", "cut é".encode()[:-1], r"a\.txt is not UTF-8 text: .* at byte 4"),
        ("a.txt", b"", r"a\.txt is empty"),
        (
            "a.txt.gz",
            gzip.compress(b"long enough text", mtime=0)[:-9],
            r"a\.txt\.gz is not a complete",
        ),
        ("a.txt.xz", b"no xz at all", r"a\.txt\.xz is not a complete"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, line 2: field 'text' is int"),
        (
            "a.jsonl",
            b'\n{"b": "x", "a": 1}\n',
            r"a\.jsonl, line 2: no field 'text' in \['a', 'b'\]",
        ),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: no field 'text' in list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": ""}\n', r"no text in .*a\.jsonl"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a text file"),
    ],
)
def test_wrong_input_leaves_nothing_behind(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare([str(tmp_path / name)], ByteTokenizer(), tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_wrong_arguments(tmp_path, bpe):
    path = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("some text")
    byte = ByteTokenizer()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        prepare([path, str(tmp_path / "nowhere.txt")], byte, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a folder: name its files, such as '.*/\*\.txt'"):
        prepare([str(tmp_path)], byte, tmp_path / "out")
    with pytest.raises(ValueError, match="no input"):
        prepare([], byte, tmp_path / "out")
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5"):
        prepare([path], byte, tmp_path / "out", validation_fraction=1.5)
    with pytest.raises(ValueError, match="shard_tokens=0"):
        prepare([path], byte, tmp_path / "out", shard_tokens=0)
    with pytest.raises(ValueError, match="leaves no validation tokens"):
        prepare([path], byte, tmp_path / "out", validation_fraction=0.01, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"mine exists already"):
        prepare([path], byte, tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"mine was not written by prepare"):
        prepare([path], byte, tmp_path / "mine", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "mine"]


def test_what_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    path, output = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("The old text.")
    prepare([str(path)], ByteTokenizer(), output, quiet=True)
    path.write_text("Something else.")
    replace = os.replace

    def refused(source, target):
        if target == output and (source / "meta.json").read_text() != before:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    before = (output / "meta.json").read_text()
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(ValueError, match=r"cannot write .*out: .*Input/output error"):
        prepare([str(path)], ByteTokenizer(), output, overwrite=True, quiet=True)
    assert split_documents(stream(output), ByteTokenizer()) == ["The old text."]
    assert [p.name for p in tmp_path.iterdir() if p not in (path, output)] == []


def test_killed_while_it_replaces_a_folder(tmp_path, monkeypatch):
    path, output = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(SAMPLE)
    prepare([str(path)], ByteTokenizer(), output, quiet=True)
    path.write_text("Something else.")

    def killed(folder, **_):
        meta = Path(folder) / "meta.json"
        if meta.exists():
            meta.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(path)], ByteTokenizer(), output, overwrite=True, quiet=True)
    # Not shards of the old text without a description, which would be read as they are.
    assert split_documents(stream(output), ByteTokenizer()) == ["Something else."]
    prepare([str(path)], ByteTokenizer(), output, overwrite=True, quiet=True)
    assert sorted(p.name for p in output.iterdir()) == ["meta.json", "train-00000.bin"]


def test_text_as_source_is_tokenised_once(tmp_path, bpe, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(SAMPLE)
    cfg = DataConfig(source=str(path), tokenizer=str(bpe), cache=str(tmp_path / "cache"))
    with open_small(cfg) as data:
        first = take(data.train_batches(), 5)
        assert data.vocab_size == 300
        assert data.tokenizer.decode(first[0, 0]) in SAMPLE
        total = data.train_tokens + data.validation_tokens
        assert total == len(data.tokenizer.encode(SAMPLE)) + 1
        fingerprint = data.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(source, "prepare", None)  # not called again
        with open_small(cfg) as data:
            np.testing.assert_array_equal(take(data.train_batches(), 5), first)
    path.write_text(SAMPLE.replace("fox", "cat"))
    with open_small(cfg) as data:
        assert data.fingerprint != fingerprint


def test_without_locks_a_faster_process_stays(tmp_path, monkeypatch):
    path, output = tmp_path / "a.txt", tmp_path / "out"
    path.write_text(SAMPLE)

    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            if not output.exists():
                prepare([str(path)], ByteTokenizer(), output, quiet=True)
                (output / "first").touch()
            return super().encode_batch(texts)

    with pytest.raises(ValueError, match=r"cannot write .*out"):
        prepare([str(path)], Slow(), output, quiet=True)
    assert (output / "first").exists()
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]

    def prepare_after_another(*args, **kwargs):
        prepare(*args, **kwargs)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(source, "prepare", prepare_after_another)
    with open_small(DataConfig(source=str(path), cache=str(tmp_path / "cache"))) as data:
        assert data.train_tokens


@pytest.mark.core
def test_command_line(tmp_path, bpe):
    (tmp_path / "a.txt").write_text(SAMPLE)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": SAMPLE[::-1]}) + "\n")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "train.data", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    arguments = ["--input", "*.txt", "b.jsonl", "--tokenizer", bpe, "--output", tmp_path / "out"]
    arguments += ["--jsonl-field", "body", "--validation-fraction", "0.1", "--dtype", "uint32"]
    done = run("prepare", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout
    assert "Tokenising" in done.stderr
    tokens = np.concatenate([stream(tmp_path / "out", part) for part in ("train", "validation")])
    assert tokens.dtype == np.uint32
    assert split_documents(tokens, load_tokenizer(bpe)) == [SAMPLE, SAMPLE[::-1]]

    again = run("prepare", *arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    assert "exists already" in again.stderr

    shown = run("show", "--data.source", tmp_path / "out", "--sequence-length", "16")
    assert shown.returncode == 0, shown.stderr
    assert "300 tokens" in shown.stdout
