"""Order, resumption, sharding by host and validation of the trainer's data."""

import lzma
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_helpers import open_small, take, write_shard
from train.data import shards
from train.data.config import DataConfig
from train.data.pipeline import open_data
from train.data.shards import Span, TokenShard, hold_out_tail
from train.data.windows import Windows

ROOT = Path(__file__).parents[2]
# 23 windows of 9 tokens, no two alike, none of them in the byte vocabulary's last place.
STREAM = (np.arange(23 * 9 + 4) % 251).astype(np.uint16)


def whole(source: str, **fields: Any) -> DataConfig:
    """All of the source for training."""
    return DataConfig(source=source, validation_fraction=0.0, **fields)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(write_shard(tmp_path_factory.mktemp("data") / "a.bin", STREAM))


def in_memory(*arrays: np.ndarray) -> list[Span]:
    made = [TokenShard(f"s{i}", dtype="uint16", memory=a) for i, a in enumerate(arrays)]
    return [Span(shard, 0, shard.length) for shard in made]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    length=st.integers(1, 12),
    data=st.data(),
)
def test_windows_against_slicing(lengths, length, data):
    stride = data.draw(st.integers(1, length))
    arrays = [np.arange(n, dtype=np.uint16) + 100 * i for i, n in enumerate(lengths)]
    expected = [
        array[start : start + length].tolist()
        for array in arrays
        for start in range(0, len(array) - length + 1, stride)
    ]
    windows = Windows(in_memory(*arrays), length=length, stride=stride, vocab_size=1000)
    assert len(windows) == len(expected)
    order = data.draw(st.permutations(range(len(expected))))
    assert windows.read(np.array(order, np.int64)).tolist() == [expected[i] for i in order]
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError, match=str(outside)):
            windows.read(np.array([outside]))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0, 0.99),
    ends=st.sets(st.integers(0, 149)),
)
def test_tail_keeps_every_token_once_and_cuts_at_documents(lengths, fraction, ends):
    stream = np.arange(sum(lengths), dtype=np.uint16) + 1
    stream[[e for e in ends if e < len(stream)]] = 0
    arrays = np.split(stream, np.cumsum(lengths)[:-1])
    train, validation = hold_out_tail(in_memory(*arrays), fraction, 0)
    pieces = [span.tokens for span in train + validation]
    np.testing.assert_array_equal(np.concatenate(pieces), stream)
    wanted, got = round(fraction * len(stream)), sum(span.length for span in validation)
    assert wanted / 2 <= got <= wanted
    if got < wanted:  # it moved, so it moved to the end of a document
        assert train[-1].tokens[-1] == 0


@settings(max_examples=12)
@given(start=st.integers(0, 40), shuffle=st.booleans(), seed=st.integers(0, 2**40))
def test_resume_is_bit_exact(source, start, shuffle, seed):
    cfg = whole(source, shuffle=shuffle)
    with open_small(cfg, seed=seed) as data:
        straight = take(data.train_batches(), 45)
    with open_small(cfg, seed=seed) as data:
        batches = data.train_batches(start)
        assert batches.step == start
        resumed = take(batches, 45 - start)
        assert batches.step == 45
    np.testing.assert_array_equal(resumed, straight[start:])


@pytest.mark.core
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch_and_may_change_in_number(source, hosts):
    cfg = whole(source)
    with open_small(cfg) as data:
        expected = take(data.train_batches(), 12)
    parts = []
    for host in range(hosts):
        with open_small(cfg, process_index=host, process_count=hosts) as data:
            parts.append(take(data.train_batches(5), 7))
    assert parts[0].shape == (7, 4 // hosts, 9)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[5:])


def test_every_epoch_is_a_new_permutation_of_all_windows(source):
    windows = STREAM[: 23 * 9].reshape(23, 9)
    epochs = {}
    for seed in (0, 1):
        with open_small(whole(source), seed=seed, global_batch=1) as data:
            assert data.train_windows == data.steps_per_epoch == 23
            rows = take(data.train_batches(), 4 * 23)[:, 0]
        for epoch, part in enumerate(np.split(rows, 4)):
            order = [windows.tolist().index(row.tolist()) for row in part]
            assert sorted(order) == list(range(23))
            epochs[seed, epoch] = tuple(order)
    # Neither seeds nor epochs repeat one another, nor the order of the file.
    assert len({*epochs.values(), tuple(range(23))}) == 9


def test_without_shuffle_windows_come_in_order(source):
    cfg = whole(source, shuffle=False)
    with open_small(cfg, global_batch=2) as data:
        assert data.steps_per_epoch == 11.5
        rows = take(data.train_batches(), 23).reshape(46, 9)
    np.testing.assert_array_equal(rows, np.tile(STREAM[: 23 * 9].reshape(23, 9), (2, 1)))


def test_overlap_of_one_makes_every_token_a_target_once(source):
    cfg = whole(source, shuffle=False, overlap=1)
    with open_small(cfg, global_batch=1) as data:
        count = data.train_windows
        batches = data.train_batches()
        targets = np.concatenate([next(batches)["targets"][0] for _ in range(count)])
    np.testing.assert_array_equal(targets, STREAM[1 : 1 + len(targets)])
    assert len(targets) == (len(STREAM) - 1) // 8 * 8


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("limit", [None, 7, 23, 1000])
def test_validation_holds_each_window_once(source, hosts, limit):
    cfg = DataConfig(source=source, validation=source)
    count = min(limit or 23, 23)
    parts = []
    for host in range(hosts):
        with open_small(cfg, process_index=host, process_count=hosts) as data:
            assert data.validation_windows == 23
            parts.append(list(data.validation_batches(limit, 4)))
            assert [b["inputs"].tolist() for b in data.validation_batches(limit, 4)] == [
                b["inputs"].tolist() for b in parts[-1]
            ]
    assert {len(part) for part in parts} == {-(-count // 4)}
    all_rows, masks = [], []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            assert batch["mask"].dtype == np.float32
            assert batch["mask"].shape == batch["targets"].shape == (4 // hosts, 8)
            all_rows.append(np.concatenate([batch["inputs"], batch["targets"][:, -1:]], 1))
            masks.append(batch["mask"])
    rows, mask = np.concatenate(all_rows), np.concatenate(masks)
    np.testing.assert_array_equal(rows[:count], STREAM[: count * 9].reshape(count, 9))
    np.testing.assert_array_equal(mask, np.repeat(np.arange(len(rows)) < count, 8).reshape(-1, 8))
    assert not rows[count:].any()


def test_held_out_tail_is_not_trained_on(source):
    with open_small(DataConfig(source=source, validation_fraction=0.3)) as data:
        assert data.train_tokens + data.validation_tokens == len(STREAM)
        held = [row for b in data.validation_batches(None, 1) for row in b["inputs"].tolist()]
        assert len(held) == data.validation_windows == 7
        trained = take(data.train_batches(), 2 * 23)[..., :-1].reshape(-1, 8).tolist()
    assert not [row for row in held if row in trained]


@pytest.mark.core
def test_embedded_text_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_data(DataConfig(), sequence_length=256, global_batch=2, seed=0) as data:
        assert data.vocab_size == 257
        assert data.train_tokens > 400_000
        assert data.validation_windows > 50
        with lzma.open(ROOT / "train/data/embedded/python_docs.txt.xz", "rt") as file:
            original = file.read().replace("\f", "")
        # The end of a document decodes to nothing, half a character at an edge to U+FFFD.
        for batch in data.validation_batches(None, 1):
            text = data.tokenizer.decode(batch["inputs"][0])
            assert len(text) > 200
            assert text.strip("\ufffd") in original
        assert "embedded" in data.describe()
    assert not list(tmp_path.iterdir())


def test_out_of_vocabulary_token_is_caught_in_the_batch(tmp_path, monkeypatch):
    # One bad token in a source too large to be checked whole when it is opened.
    monkeypatch.setattr(shards, "_WHOLE_TOKENS", 50)
    monkeypatch.setattr(shards, "_SAMPLES", 2)
    monkeypatch.setattr(shards, "_SAMPLE_TOKENS", 10)
    tokens = STREAM.copy()
    tokens[100] = 300
    path = write_shard(tmp_path / "bad.bin", tokens)
    with open_small(whole(str(path), shuffle=False)) as data:
        batches = data.train_batches()
        next(batches)
        next(batches)
        with pytest.raises(ValueError, match=r"bad\.bin: token id 300 at position 100 .* 257"):
            next(batches)


def test_close_stops_reading(source):
    before = set(threading.enumerate())
    with open_small(whole(source, threads=3)) as data:
        batches = data.train_batches()
        next(batches)
        assert len(set(threading.enumerate()) - before) == 3
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    data.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_worker_processes_read_the_same_and_stop(source):
    cfg = whole(source, workers=2, threads=1, read_ahead=2)
    with open_small(whole(source)) as data:
        expected = take(data.train_batches(3), 9)
    with open_small(cfg) as data:
        batches = data.train_batches(3)
        np.testing.assert_array_equal(take(batches, 4), expected[:4])
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        # Signals to the whole group are the trainer's affair: it needs batches to its last step.
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        np.testing.assert_array_equal(take(batches, 5), expected[4:])
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, os, sys
from train.data.config import DataConfig
from train.data.pipeline import open_data
if __name__ == "__main__":
    cfg = DataConfig(source=sys.argv[1], workers=1, threads=1, read_ahead=2, validation_fraction=0)
    data = open_data(cfg, sequence_length=8, global_batch=4, seed=0)
    batches = data.train_batches()
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)
"""


def test_workers_do_not_outlive_a_killed_trainer(source, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), source],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (worker,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and running(worker):
        time.sleep(0.05)
    assert not running(worker)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # An orphan whose new parent does not collect it is dead all the same.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"global_batch": 6, "process_count": 4}, "global_batch=6 .* process_count=4"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"seed": -1}, "seed=-1"),
        ({"sequence_length": len(STREAM)}, f"has {len(STREAM)} training tokens in 1 piece.* = 212"),
    ],
)
def test_refuses_sizes_that_do_not_fit(source, sizes, message):
    with pytest.raises(ValueError, match=message):
        open_small(whole(source), **sizes)


def test_refuses_other_arguments(source):
    with pytest.raises(ValueError, match="overlap=9"):
        open_small(DataConfig(source=source, overlap=9))
    with pytest.raises(ValueError, match=r"none as long as a window.*validation_fraction=0.01"):
        open_small(DataConfig(source=source, validation_fraction=0.01))
    with open_small(whole(source)) as data:
        with pytest.raises(ValueError, match="start_step=-1"):
            data.train_batches(-1)
        with pytest.raises(ValueError, match="no validation data"):
            data.validation_batches(None, 4)
    with open_small(DataConfig(source=source, validation=source), process_count=2) as data:
        with pytest.raises(ValueError, match=r"batch=3 .* process_count=2"):
            data.validation_batches(None, 3)
        with pytest.raises(ValueError, match="max_windows=0"):
            data.validation_batches(0, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"dtype": "int8"}, "int8"),
        ({"overlap": -1}, "overlap=-1"),
        ({"workers": -2}, "workers=-2"),
        ({"threads": 0}, "threads=0"),
        ({"read_ahead": 0}, "read_ahead=0"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
