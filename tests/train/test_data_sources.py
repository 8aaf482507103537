"""Token shards in all their forms, the cache, and every way in which a source can be wrong."""

import json
import lzma
import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.data_helpers import open_small, take, write_shard
from train.data import shards
from train.data.cache import cache_folder, partial_path
from train.data.config import DataConfig
from train.data.prepare import FORMAT
from train.data.source import open_corpus
from train.data.tokenizer import ByteTokenizer, load_tokenizer

STREAM = (np.arange(300) * 7 % 257).astype(np.uint16)


@pytest.fixture
def cfg(tmp_path):
    def make(source, **fields):
        fields = {"validation_fraction": 0.0, "cache": str(tmp_path / "cache"), **fields}
        return DataConfig(source=str(source), **fields)

    return make


@pytest.mark.core
def test_all_forms_of_the_same_tokens_are_the_same_data(tmp_path, cfg):
    forms = [
        ("a.bin", "uint16"),
        ("a.bin.xz", "uint16"),
        ("b.bin", "uint32"),
        ("b.bin.xz", "uint32"),
        ("a.npy", "uint16"),
        ("b.npy", "uint32"),
    ]
    seen = []
    for name, dtype in forms:
        path = write_shard(tmp_path / name, STREAM, dtype)
        with open_small(cfg(path, dtype=dtype)) as data:
            assert data.train_tokens == 300
            seen.append((data.fingerprint, take(data.train_batches(), 9).tolist()))
    assert all(item == seen[0] for item in seen)
    changed = STREAM.copy()
    changed[150] += 1
    with open_small(cfg(write_shard(tmp_path / "c.bin", changed))) as data:
        assert data.fingerprint != seen[0][0]


def test_several_shards_by_glob_in_order_of_name(tmp_path, cfg):
    for name, part in zip("cab", np.split(STREAM, 3), strict=True):
        write_shard(tmp_path / f"t-{name}.bin", part)
    with open_small(cfg(tmp_path / "t-*.bin", shuffle=False), global_batch=1) as data:
        assert data.train_windows == 33  # 11 in each, none across
        np.testing.assert_array_equal(take(data.train_batches(), 1)[0, 0], STREAM[100:109])


def test_a_folder_of_shards_by_their_names(tmp_path, cfg):
    """Without a description: train* and val* are what they say, other files nothing."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    write_shard(folder / "train-00.bin.xz", STREAM[:150])
    write_shard(folder / "train-01.bin", STREAM[150:250])
    write_shard(folder / "val.bin", STREAM[250:])
    write_shard(folder / "other.bin", STREAM)
    (folder / "train.txt").write_text("text")
    with open_small(cfg(folder)) as data:
        assert (data.train_tokens, data.validation_tokens) == (250, len(STREAM) - 250)
    (folder / "val.bin").unlink()
    with open_small(cfg(folder, validation_fraction=0.2)) as data:
        assert data.train_tokens + data.validation_tokens == 250
        assert data.validation_tokens > 0


@pytest.mark.parametrize("name", ["a", "a[1]*"])
def test_large_xz_is_decompressed_once(tmp_path, cfg, monkeypatch, name):
    monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 10)
    path = write_shard(tmp_path / f"{name}.bin.xz", STREAM)
    cache = tmp_path / "cache"
    with open_small(cfg(path)) as data:
        first = take(data.train_batches(), 9)
    (cached,) = cache.glob("*.bin")
    assert cached.stat().st_size == 600
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_decompress", None)  # not called again
        with open_small(cfg(path)) as data:
            np.testing.assert_array_equal(take(data.train_batches(), 9), first)
    # A cached file of the wrong size is made anew, a changed source is another file.
    os.truncate(cached, 400)
    with open_small(cfg(path)) as data:
        np.testing.assert_array_equal(take(data.train_batches(), 9), first)
    write_shard(path, STREAM[::-1])
    with open_small(cfg(path)) as data:
        assert not np.array_equal(take(data.train_batches(), 9), first)
    assert len(list(cache.glob("*.bin"))) == 2
    assert not [name for name in os.listdir(cache) if name.endswith(".partial")]


@pytest.mark.parametrize("name", ["x.bin", "x[1].bin"])
def test_partial_files_of_dead_processes_are_deleted(tmp_path, name):
    target = tmp_path / name
    mine = partial_path(target)
    mine.write_bytes(b"in progress")
    dead = tmp_path / mine.name.replace(f".{os.getpid()}.", ".999999999.")
    elsewhere = tmp_path / mine.name.replace(socket.gethostname(), "other.host")
    dead.write_bytes(b"")
    elsewhere.write_bytes(b"")
    assert partial_path(target) != mine
    assert mine.exists()
    assert elsewhere.exists()
    assert not dead.exists()


def test_damaged_large_xz_leaves_nothing_in_the_cache(tmp_path, cfg, monkeypatch):
    monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 10)
    path = write_shard(tmp_path / "a.bin.xz", STREAM)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.bin\.xz is not a complete \.xz"):
        open_small(cfg(path))
    assert not [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "sparsejax"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/below cannot be written: set data\.cache"):
        cache_folder(str(tmp_path / "file" / "below"))


META = {
    "format": FORMAT,
    "dtype": "uint32",
    "vocab_size": 257,
    "tokenizer": ByteTokenizer.fingerprint,
    "train": {"a.bin": 300},
    "validation": {},
}


def test_sidecar_gives_the_type(tmp_path, cfg):
    write_shard(tmp_path / "a.bin", STREAM, "uint32")
    (tmp_path / "meta.json").write_text(json.dumps(META))
    for source in (tmp_path, tmp_path / "a.bin"):
        with open_small(cfg(source)) as data:
            assert data.train_tokens == 300


def test_somebody_elses_sidecar_is_left_alone(tmp_path, cfg):
    write_shard(tmp_path / "a.bin", STREAM)
    (tmp_path / "meta.json").write_text('{"vocab_size": 3}')
    with open_small(cfg(tmp_path / "a.bin")) as data:
        assert data.train_tokens == 300


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": {"a.bin": 301}}, ValueError, r"a\.bin has 300 tokens where meta.json says 301"),
        ({"train": {"a.bin": 300, "b.bin": 1}}, FileNotFoundError, r"b\.bin does not exist"),
        ({"tokenizer": "other"}, ValueError, "prepared with another tokenizer than the byte-level"),
        ({"dtype": "uint16"}, ValueError, r"a\.bin has 600 tokens where meta.json says 300"),
        ({"train": None}, ValueError, r"meta\.json is damaged: no 'train'"),
        ({"train": ["a.bin"]}, ValueError, r"meta\.json is damaged: 'train' is no object"),
        ({"validation": 5}, ValueError, r"meta\.json is damaged: 'validation' is no object"),
        ({"dtype": "bytes"}, ValueError, r"meta\.json is damaged: dtype 'bytes'"),
        ({"dtype": ["uint16"]}, ValueError, r"meta\.json is damaged: dtype \['uint16'\]"),
    ],
)
def test_sidecar_disagrees(tmp_path, cfg, change, error, message):
    write_shard(tmp_path / "a.bin", STREAM, "uint32")
    meta = {key: value for key, value in {**META, **change}.items() if value is not None}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(error, match=message):
        open_small(cfg(tmp_path))


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("absolute", [False, True])
def test_sidecar_does_not_lead_out_of_its_folder(tmp_path, cfg, part, absolute):
    write_shard(tmp_path / "secret.bin", STREAM, "uint32")
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "a.bin", STREAM, "uint32")
    name = str(tmp_path / "secret.bin") if absolute else "../secret.bin"
    (folder / "meta.json").write_text(json.dumps({**META, part: {name: 300}}))
    with pytest.raises(ValueError, match=r"meta\.json is damaged: it lists '.*secret\.bin'"):
        open_small(cfg(folder))


def test_sidecar_against_the_configuration(tmp_path, cfg):
    write_shard(tmp_path / "a.bin", STREAM, "uint32")
    (tmp_path / "meta.json").write_text(json.dumps(META))
    with pytest.raises(ValueError, match=r"dtype=uint16 but .*meta\.json says uint32"):
        open_small(cfg(tmp_path, dtype="uint16"))
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        open_small(cfg(tmp_path))


def test_sidecars_of_two_folders_disagree(tmp_path, cfg):
    for name, dtype in (("one", "uint16"), ("two", "uint32")):
        folder = tmp_path / name
        folder.mkdir()
        write_shard(folder / "a.bin", STREAM, dtype)
        (folder / "meta.json").write_text(json.dumps({**META, "dtype": dtype}))
    # The configuration says nothing of it.
    with pytest.raises(ValueError, match=r"^another meta\.json says uint16 but .*two/meta\.json"):
        open_small(cfg(tmp_path / "*" / "a.bin"))


def damaged(folder):
    """Name -> content of files that are no token shards."""
    good = lzma.compress(STREAM.tobytes())
    (folder / "empty.bin").write_bytes(b"")
    (folder / "odd.bin").write_bytes(b"\0" * 601)
    (folder / "short.bin.xz").write_bytes(good[: len(good) // 2])
    (folder / "noise.bin.xz").write_bytes(b"no xz at all")
    (folder / "nothing.bin.xz").write_bytes(lzma.compress(b""))
    (folder / "odd.bin.xz").write_bytes(lzma.compress(b"\0" * 601))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    (folder / "flipped.bin.xz").write_bytes(flipped)
    (folder / "noise.npy").write_bytes(b"no array")
    np.save(folder / "float.npy", np.ones(100, np.float32))
    np.save(folder / "square.npy", np.ones((10, 10), np.uint16))
    np.save(folder / "none.npy", np.ones(0, np.uint16))
    np.savez(folder / "archive.npz", STREAM)
    (folder / "archive.npz").rename(folder / "archive.npy")
    np.save(folder / "pickle.npy", np.array([{"a": 1}] * 100, object), allow_pickle=True)
    write_shard(folder / "tiny.bin", STREAM[:8])
    write_shard(folder / "large.bin", np.append(STREAM, 257))
    (folder / "folder").mkdir()
    (folder / "shard.bin.gz").write_bytes(b"x")
    (folder / "mix-a.txt").write_text("text")
    write_shard(folder / "mix-b.bin", STREAM)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.bin", FileNotFoundError, r"missing\.bin' does not exist"),
        ("missing-*.bin", FileNotFoundError, r"missing-\*\.bin' matches no file"),
        ("empty.bin", ValueError, r"empty\.bin is empty"),
        ("odd.bin", ValueError, r"odd\.bin: 601 bytes are not a multiple of 2"),
        ("short.bin.xz", ValueError, r"short\.bin\.xz is not a complete \.xz"),
        ("noise.bin.xz", ValueError, r"noise\.bin\.xz is not a complete \.xz"),
        ("flipped.bin.xz", ValueError, r"flipped\.bin\.xz is not a complete \.xz"),
        ("nothing.bin.xz", ValueError, r"nothing\.bin\.xz is empty"),
        ("odd.bin.xz", ValueError, r"odd\.bin\.xz: 601 bytes"),
        ("noise.npy", ValueError, r"noise\.npy is not a \.npy array"),
        ("float.npy", ValueError, r"float\.npy has dtype float32 and shape \(100,\)"),
        ("square.npy", ValueError, r"square\.npy has dtype uint16 and shape \(10, 10\)"),
        ("none.npy", ValueError, r"none\.npy is empty"),
        ("archive.npy", ValueError, r"archive\.npy is not a \.npy array: it is an archive"),
        ("pickle.npy", ValueError, r"pickle\.npy is not a \.npy array"),
        ("tiny.bin", ValueError, r"tiny\.bin' has 8 training tokens in 1 piece.* = 9"),
        ("large.bin", ValueError, r"large\.bin: token id 257 at position 300 .* size 257"),
        ("folder", ValueError, r"folder .*folder has no meta\.json"),
        ("shard.bin.gz", ValueError, r"shard\.bin\.gz: not a text file by its name"),
        ("mix-*", ValueError, r"mix-\*' mixes token shards"),
    ],
)
def test_wrong_sources(tmp_path, cfg, name, error, message):
    damaged(tmp_path)
    for fields in ({}, {"validation": str(tmp_path / name)}):
        if fields and name == "tiny.bin":
            message = r"tiny\.bin has 8 tokens in 1 piece"
        source = tmp_path / ("mix-b.bin" if fields else name)
        with pytest.raises(error, match=message) as caught:
            open_small(cfg(source, **fields))
        assert "\n" not in str(caught.value)


@given(st.text(), st.lists(st.integers(0, 256)))
def test_byte_tokenizer(text, ids):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Any ids decode to something, since a window may cut a character.
    assert isinstance(tokenizer.decode(ids), str)
    with pytest.raises(ValueError, match="257"):
        tokenizer.decode([*ids, 257])


def test_wrong_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.json' does not exist"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [None, "text.txt"])
def test_bytes_have_an_end_of_document_of_their_own(tmp_path, name):
    (tmp_path / "text.txt").write_text("some text " * 100)
    source = {} if name is None else {"source": str(tmp_path / name)}
    with pytest.raises(ValueError, match=r"data.end_of_document='<end>' needs data.tokenizer"):
        open_corpus(DataConfig(end_of_document="<end>", **source))
