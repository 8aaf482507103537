"""Batches of tokens that depend on seed, step and global batch size only.

Global sample i is window perm_e(i mod n) of epoch e = i // n, n the number of windows, and perm_e
a pseudo-random permutation drawn from the seed and e. Step s takes samples s * G to (s + 1) * G - 1
for a global batch of G rows, and host p of P takes rows p * G / P to (p + 1) * G / P - 1 of them.
So the whole state is the number of samples consumed, s * G, and a run may resume with another
number of hosts.
"""

import contextlib
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from train.data.config import DataConfig
from train.data.shards import fingerprint
from train.data.source import Corpus, open_corpus
from train.data.tokenizer import Tokenizer
from train.data.windows import Windows

Batch = dict[str, np.ndarray]


def open_data(
    cfg: DataConfig,
    *,
    sequence_length: int,
    global_batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Data":
    """Opens the data of a run.

    Args:
        cfg: what to read and how.
        sequence_length: S, tokens of a row of `inputs`; a window has one more.
        global_batch: G, rows of a training batch over all hosts.
        seed: decides the order of the windows.
        process_index: p, this host.
        process_count: P, number of hosts; divides G.

    Raises:
        FileNotFoundError, ValueError: one line naming path and value: missing, empty, damaged or
            too short data, token ids outside the vocabulary, sizes that do not fit.
    """
    if sequence_length < 1:
        raise ValueError(f"{sequence_length=} must be at least 1")
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative")
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} must be in [0, {process_count=})")
    if cfg.overlap > sequence_length:
        raise ValueError(f"data.overlap={cfg.overlap} must be at most {sequence_length=}")
    _host_rows(global_batch, process_index, process_count, "global_batch")
    corpus = open_corpus(cfg, quiet=process_index != 0)
    return Data(cfg, corpus, sequence_length, global_batch, seed, process_index, process_count)


def _host_rows(batch: int, index: int, count: int, name: str) -> slice:
    if batch < 1 or batch % count:
        raise ValueError(f"{name}={batch} must be a positive multiple of process_count={count}")
    rows = batch // count
    return slice(index * rows, (index + 1) * rows)


class Data:
    """An open data source; `open_data` makes it. Also a context manager.

    Attributes:
        tokenizer: encodes and decodes text.
        vocab_size: one more than the largest token id.
        train_tokens, validation_tokens: tokens of the two parts.
        train_windows, validation_windows: whole windows of S + 1 tokens in them.
        steps_per_epoch: training windows divided by the global batch; epochs need not end with
            a step.
        fingerprint: hash of the training tokens and the tokenizer, to refuse resuming over other
            data.
    """

    def __init__(
        self,
        cfg: DataConfig,
        corpus: Corpus,
        sequence_length: int,
        global_batch: int,
        seed: int,
        process_index: int,
        process_count: int,
    ) -> None:
        self._cfg, self._global_batch, self._seed = cfg, global_batch, seed
        self._process_index, self._process_count = process_index, process_count
        self.tokenizer: Tokenizer = corpus.tokenizer
        self.vocab_size: int = corpus.tokenizer.vocab_size
        self.train_tokens = sum(span.length for span in corpus.train)
        self.validation_tokens = sum(span.length for span in corpus.validation)
        length = sequence_length + 1
        self._train = Windows(
            corpus.train, length=length, stride=length - cfg.overlap, vocab_size=self.vocab_size
        )
        self._validation = Windows(
            corpus.validation, length=length, stride=length, vocab_size=self.vocab_size
        )
        self._length = length
        self.train_windows, self.validation_windows = len(self._train), len(self._validation)
        if not self.train_windows:
            raise ValueError(
                f"data.source={cfg.source!r} has {self.train_tokens} training tokens in "
                f"{len(corpus.train)} piece(s), none as long as a window of sequence_length + 1 = "
                f"{length}"
            )
        if not self.validation_windows and (cfg.validation or cfg.validation_fraction):
            raise ValueError(
                f"data.validation={cfg.validation or 'tail of ' + cfg.source} has "
                f"{self.validation_tokens} tokens in {len(corpus.validation)} piece(s), none as "
                f"long as a window of sequence_length + 1 = {length} "
                f"(data.validation_fraction={cfg.validation_fraction})"
            )
        self.steps_per_epoch: float = self.train_windows / global_batch
        self.fingerprint: str = hashlib.sha256(
            f"{corpus.tokenizer.fingerprint} {fingerprint(corpus.train)}".encode()
        ).hexdigest()
        self._open: weakref.WeakSet[TrainBatches] = weakref.WeakSet()

    def train_batches(self, start_step: int = 0) -> "TrainBatches":
        """This host's rows of the batches of steps start_step, start_step + 1, ... without end.

        Yields:
            `inputs` and `targets`, each (G / P, S) int32; targets are the inputs' next tokens.

        Raises:
            ValueError: negative step; later, from the iterator: a token id outside the
                vocabulary, naming path and position.
        """
        if start_step < 0:
            raise ValueError(f"{start_step=} must not be negative")
        rows = _host_rows(
            self._global_batch, self._process_index, self._process_count, "global_batch"
        )
        # Numbers of windows go through grain's global shuffle, not the windows themselves, so
        # that a host reads its own rows only.
        numbers = grain.MapDataset.range(self.train_windows)
        if self._cfg.shuffle:
            # Mixed, since grain seeds epoch e with seed + e: neighbouring seeds would share epochs.
            mixed = np.random.SeedSequence(self._seed).generate_state(1, np.uint32)
            numbers = numbers.shuffle(seed=int(mixed[0]))
        steps = numbers.repeat().batch(self._global_batch, drop_remainder=True)
        batches = steps[start_step:].map(_ReadRows(self._train, rows))
        threads, workers = self._cfg.threads, self._cfg.workers
        ahead = threads if workers else max(threads, self._cfg.read_ahead)
        dataset = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        )
        if workers:
            if not flags.FLAGS.is_parsed():
                # grain asks absl for its settings; with another command line, take the defaults.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=self._cfg.read_ahead
                ),
                worker_init_fn=_start_worker,
            )
        iterator = TrainBatches(iter(dataset), start_step)
        self._open.add(iterator)
        return iterator

    def validation_batches(self, max_windows: int | None, batch: int) -> Iterator[Batch]:
        """This host's rows of batches that hold each validation window once, in order.

        Args:
            max_windows: take the first ones only; None takes all.
            batch: rows over all hosts; a multiple of their number.

        Yields:
            `inputs` and `targets`, each (batch / P, S) int32, and `mask`, (batch / P, S) float32:
            1, and 0 in the rows that fill up the last batch. All hosts yield equally often.

        Raises:
            ValueError: no validation data, or sizes that do not fit.
        """
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"{max_windows=} must be at least 1")
        if not self.validation_windows:
            raise ValueError("there is no validation data: data.validation_fraction=0")
        rows = _host_rows(batch, self._process_index, self._process_count, "batch")
        count = min(max_windows or self.validation_windows, self.validation_windows)
        return self._validation_batches(count, batch, rows)

    def _validation_batches(self, count: int, batch: int, rows: slice) -> Iterator[Batch]:
        for start in range(0, count, batch):
            numbers = np.arange(start, start + batch)[rows]
            real = numbers < count
            windows = np.zeros((len(numbers), self._length), np.int32)
            windows[real] = self._validation.read(numbers[real])
            mask = np.broadcast_to(real[:, None], (len(numbers), self._length - 1))
            yield {**_shifted(windows), "mask": mask.astype(np.float32)}

    def describe(self) -> str:
        """One line for a log."""
        name = self.tokenizer.file or "byte-level tokenizer"
        return (
            f"{self._cfg.source}: {self.train_tokens:,} training and {self.validation_tokens:,} "
            f"validation tokens, {self.train_windows:,} and {self.validation_windows:,} windows; "
            f"{name}, {self.vocab_size:,} tokens"
        )

    def close(self) -> None:
        """Stops all reading ahead. Idempotent; open iterators cannot be used any more."""
        for iterator in list(self._open):
            iterator.close()

    def __enter__(self) -> "Data":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TrainBatches(Iterator[Batch]):
    """Training batches, read ahead. `step` is the step of the batch that comes next."""

    def __init__(self, iterator: grain.DatasetIterator, step: int) -> None:
        self._iterator, self.step = iterator, step

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops the threads or processes that read ahead. Idempotent."""
        self._iterator.close()


class _ReadRows:
    """Reads a host's rows of a batch; pickled into the worker processes."""

    def __init__(self, windows: Windows, rows: slice) -> None:
        self._windows, self._rows = windows, rows

    def __call__(self, numbers: np.ndarray) -> Batch:
        return _shifted(self._windows.read(numbers[self._rows]))


def _shifted(windows: np.ndarray) -> Batch:
    return {
        "inputs": np.ascontiguousarray(windows[:, :-1]),
        "targets": np.ascontiguousarray(windows[:, 1:]),
    }


def _start_worker(index: int, count: int) -> None:
    """Ties a worker process to the life of the training process, and to nothing else."""
    del index, count
    # Signals to the whole group (Ctrl-C, a job scheduler's SIGTERM) are the training process's to
    # handle; it may still need batches for its last step.
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def leave_with_parent() -> None:
        # A killed parent cannot stop its workers.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
