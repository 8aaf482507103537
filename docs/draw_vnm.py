"""Draws docs/images/vnm.png: a small routed activation matrix in V:N:M form, from real arrays.

    python docs/draw_vnm.py

Fifteen tokens go through the library's own clustering, routing, plan and packing. Nothing is drawn
that was not computed: if the format changes, so does the picture.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from sparsejax.routing import assign_tokens, cluster_neurons, interleave, plan_tokens
from sparsejax.vnm import VNM, expert_columns, pack_vnm, vnm_mask

V, M, WIDTH, HIDDEN, TOKENS = 4, 16, 24, 32, 15
EXPERTS = M // 4
COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#c2387f")
INK, FAINT, GRID = "#202124", "#f1f3f4", "#dadce0"


def routed_activations() -> tuple[np.ndarray, np.ndarray, np.ndarray, VNM, np.ndarray]:
    """Y2 (rows, H), tokens of its rows, experts of its blocks, Y2 packed and its mask."""
    keys = jax.random.split(jax.random.key(1), 3)
    directions = jax.random.normal(keys[0], (EXPERTS, WIDTH))
    neuron = jnp.arange(HIDDEN) % EXPERTS
    w1 = directions[neuron] + 0.9 * jax.random.normal(keys[1], (HIDDEN, WIDTH))
    token = jnp.arange(TOKENS) % EXPERTS
    x = directions[token] + 0.8 * jax.random.normal(keys[2], (TOKENS, WIDTH))

    clusters = cluster_neurons(w1, EXPERTS)
    w1 = w1[interleave(clusters.assignment, M)]
    plan = plan_tokens(assign_tokens(x, clusters.centers), EXPERTS, V)
    rows = int(plan.offsets[-1])
    permutation = plan.permutation[:rows]
    y2 = jnp.square(jax.nn.relu(x @ w1.T)).at[permutation].get(mode="fill", fill_value=0)
    block_expert = plan.block_expert[: rows // V]
    columns = expert_columns(block_expert, M)
    packed = pack_vnm(y2, v=V, m=M, columns=columns)
    mask = vnm_mask(y2, v=V, m=M, columns=columns)
    return (np.asarray(y2), np.asarray(permutation), np.asarray(block_expert), packed,
            np.asarray(mask))  # fmt: skip


def blend(colour: str, share: float) -> tuple[float, ...]:
    """A colour thinned with white: share 1 is the colour itself."""
    return tuple(1 - share * (1 - c) for c in matplotlib.colors.to_rgb(colour))


def strength(y2: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Activations as shares of ink."""
    return (y2 / (y2.max() if largest is None else largest)) ** 0.35


def kept_face(colour: str, ink: float) -> tuple[float, ...]:
    """Of a kept element: even a zero stands out from what is not kept."""
    return blend(colour, 0.4 + 0.6 * ink)


def cell(axis, row: int, col: float, face, text: str = "", size: float = 6.5, ink=INK) -> None:
    axis.add_patch(Rectangle((col, row), 1, 1, facecolor=face, edgecolor=GRID, linewidth=0.5))
    if text:
        axis.text(col + 0.5, row + 0.53, text, ha="center", va="center", fontsize=size, color=ink)


def frame(axis, row: float, col: float, height: float, width: float, lw: float = 1.3) -> None:
    axis.add_patch(Rectangle((col, row), width, height, fill=False, edgecolor=INK, linewidth=lw))


def heading(axis, col: float, title: str, note: str) -> None:
    axis.text(col, -2.1, title, fontsize=10.5, color=INK, va="bottom", fontweight="bold")
    axis.text(col, -0.45, note, fontsize=8, color="#5f6368", va="bottom", linespacing=1.3)


def draw(file: pathlib.Path) -> None:
    """Draws the picture into a PNG file."""
    y2, permutation, block_expert, packed, mask = routed_activations()
    rows, hidden = y2.shape
    groups = hidden // M
    ink = strength(y2)
    colour = [COLOURS[e] for e in np.repeat(block_expert, V)]
    columns = np.repeat(np.asarray(packed.columns), V, axis=0)[:, 0]
    live_columns = (columns[:, None] + M * np.arange(groups)[:, None]).reshape(rows, -1)
    values, positions = np.asarray(packed.values), np.asarray(packed.positions)

    # Columns where the parts begin.
    dense = 0.0
    sparse = dense + hidden + 3.5
    live = sparse + hidden + 3.0
    held = live + 4 * groups + 3.5
    where = held + 2 * groups + 1.0
    end = where + 2 * groups
    figure, axis = plt.subplots(figsize=(16, 4.4))
    axis.set_xlim(-3.4, end + 4.5)
    axis.set_ylim(rows + 1.8, -3.4)
    axis.set_aspect("equal")
    axis.axis("off")

    heading(axis, dense, "1  Activations of all neurons",
            "darker is larger; tokens of one expert lie together")  # fmt: skip
    heading(axis, sparse, f"2  V:N:M with V = {V}, N = 2, M = {M}",
            f"pale: 4 columns for {V} tokens; strong: 2 of 4 for each")  # fmt: skip
    heading(axis, live, "3  Gathered", "live columns: 2:4")
    heading(axis, held, "4  Packed", "values")
    heading(axis, where, "", "positions")
    for r in range(rows):
        name = "padding" if permutation[r] == TOKENS else f"token {permutation[r]}"
        axis.text(dense - 0.3, r + 0.55, name, ha="right", va="center", fontsize=7, color="#5f6368")
        for c in range(hidden):
            cell(axis, r, dense + c, blend(INK, 0.8 * ink[r, c]))
            face = blend(colour[r], 0.16) if c in live_columns[r] else FAINT
            cell(axis, r, sparse + c, kept_face(colour[r], ink[r, c]) if mask[r, c] else face)
        for j, c in enumerate(live_columns[r]):
            face = kept_face(colour[r], ink[r, c]) if mask[r, c] else blend(colour[r], 0.16)
            cell(axis, r, live + j, face)
        for j in range(2 * groups):
            cell(axis, r, held + j, kept_face(colour[r], float(strength(values[r, j], y2.max()))))
            place = positions[r, j // 2] >> (2 * (j % 2)) & 3
            cell(axis, r, where + j, blend(colour[r], 0.1), str(place))
    for block in range(rows // V):
        for group in range(groups):
            frame(axis, V * block, dense + M * group, V, M)
            frame(axis, V * block, sparse + M * group, V, M)
            frame(axis, V * block, live + 4 * group, V, 4)
            frame(axis, V * block, held + 2 * group, V, 2)
            frame(axis, V * block, where + 2 * group, V, 2)
        expert = block_expert[block]
        axis.text(end + 0.5, V * (block + 0.5), f"expert {expert}", va="center", fontsize=8.5,
                  color=COLOURS[expert])  # fmt: skip
    label = {"ha": "center", "va": "top", "fontsize": 8.5, "color": INK}
    for group in range(groups):
        for start in (dense, sparse):
            axis.text(start + M * (group + 0.5), rows + 0.4, f"block of {M} neurons", **label)
    axis.text(live + 2 * groups, rows + 0.4, f"{4 * groups} of {hidden}", **label)
    axis.text(held + groups, rows + 0.4, f"{2 * groups} of {hidden}", **label)
    axis.text(where + groups, rows + 0.4, "2 bits each", **label)
    for start in (sparse, live, held):
        axis.annotate("", (start - 0.5, rows / 2), (start - 1.9, rows / 2),
                      arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})  # fmt: skip
    figure.savefig(file, dpi=150, bbox_inches="tight", pad_inches=0.1, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    target = pathlib.Path(__file__).parent / "images" / "vnm.png"
    target.parent.mkdir(exist_ok=True)
    draw(target)
    print(target)
