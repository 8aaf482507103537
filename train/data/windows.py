"""Windows of consecutive tokens over spans of shards."""

from collections.abc import Sequence

import numpy as np

from train.data.shards import Span, out_of_vocabulary


class Windows:
    """Numbered windows of `length` tokens, one every `stride` tokens, in the spans' order.

    No window crosses from one span to the next; what is left at a span's end is not used.
    """

    def __init__(self, spans: Sequence[Span], *, length: int, stride: int, vocab_size: int) -> None:
        self._spans, self._length, self._stride = list(spans), length, stride
        self._vocab_size = vocab_size
        counts = [max(0, (span.length - length) // stride + 1) for span in self._spans]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The windows of the given numbers.

        Args:
            indices: (n,) integers in [0, len(self)).

        Returns:
            (n, length) int32.

        Raises:
            IndexError: a number out of range.
            ValueError: a token id that is not in the vocabulary, with path and position, or a
                shard that was truncated since it was opened.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"window {indices.min()} or {indices.max()} not in [0, {len(self)})")
        # Read as unsigned, so that the check below also sees ids of 2^31 and more.
        windows = np.empty((len(indices), self._length), np.uint32)
        which = np.searchsorted(self._ends, indices, side="right")
        starts = (indices - np.concatenate([[0], self._ends])[which]) * self._stride
        for number in set(which.tolist()):
            self._spans[number].shard.require_whole()
        for row, span, start in zip(windows, which.tolist(), starts.tolist(), strict=True):
            row[:] = self._spans[span].tokens[start : start + self._length]
        if windows.size and np.max(windows) >= self._vocab_size:
            at, column = divmod(int(np.argmax(windows)), self._length)
            position = int(starts[at]) + column
            raise out_of_vocabulary(
                self._spans[which[at]], position, int(windows[at, column]), self._vocab_size
            )
        return windows.view(np.int32)
