"""Independent numpy definitions, written element by element from the format's description."""

import numpy as np

PATTERNS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def kept_pair(group: np.ndarray, by: str) -> list[int]:
    """Indices of the two kept elements, by a stable sort with NaN in front."""

    def rank(i: int) -> tuple:
        x = float(group[i])
        return (0, 0.0, i) if np.isnan(x) else (1, -(abs(x) if by == "magnitude" else x), i)

    return sorted(sorted(range(4), key=rank)[:2])


def prune(a: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Pruned float32 matrix, 2:4 along the last axis, and kept indices (m, k/4, 2)."""
    m, k = a.shape
    out = np.zeros((m, k), np.float32)
    indices = np.zeros((m, k // 4, 2), int)
    for i in range(m):
        for g in range(k // 4):
            group = a[i, 4 * g : 4 * g + 4].astype(np.float32)
            pair = kept_pair(group, "value" if mode == "value" else "magnitude")
            indices[i, g] = pair
            dropped = [j for j in range(4) if j not in pair]
            t = np.float32(0)
            if mode == "soft_threshold":
                t = np.abs(group[kept_pair_of(dropped, group)])
            for j in pair:
                if mode == "soft_threshold":
                    out[i, 4 * g + j] = np.sign(group[j]) * max(np.abs(group[j]) - t, 0)
                else:
                    out[i, 4 * g + j] = group[j]
    return out, indices


def kept_pair_of(dropped: list[int], group: np.ndarray) -> int:
    """The larger of the two dropped elements."""
    return max(dropped, key=lambda j: abs(float(group[j])))


def metadata(indices: np.ndarray) -> np.ndarray:
    """(m/64, k/64, 128) int32, thread by thread, from kept indices (m, k/4, 2)."""
    m, groups, _ = indices.shape
    k = 4 * groups
    words = np.zeros((m // 64, k // 64, 128), np.uint32)
    for tile_m in range(m // 64):
        for tile_k in range(k // 64):
            for thread in range(128):
                warp, lane = divmod(thread, 32)
                q, rest = divmod(lane, 4)
                selector, half = divmod(rest, 2)
                word = 0
                for high in range(2):
                    row = 64 * tile_m + 16 * warp + 8 * high + q
                    first = 16 * tile_k + 8 * selector + 4 * half
                    for j in range(4):
                        i0, i1 = (int(v) for v in indices[row, first + j])
                        word |= (i0 | i1 << 2) << (16 * high + 4 * j)
                words[tile_m, tile_k, thread] = word
    return words.view(np.int32)
