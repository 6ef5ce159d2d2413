"""What the fused kernels share: shapes, places, and which tiles they visit."""

from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops


class Spec(NamedTuple):
    """What is known of one model's attention when kernels are compiled."""

    heads: int
    key_heads: int
    width: int
    soft_cap: float | None

    @classmethod
    def of(cls, attention):
        return cls(
            attention.query.shape[2],
            attention.key.shape[2],
            attention.query.shape[3],
            attention.soft_cap,
        )


class Places(NamedTuple):
    """Which keys a row attends, and how much their distance weighs."""

    kinds: Any  # (batch, keys): 0 for padding, 1 bidirectional, 2 causal.
    row_index: Any  # (rows,)
    row_share: Any  # (batch, rows): positions over the example's span.
    key_share: Any  # (batch, keys)
    strength: Any  # A scalar.

    @classmethod
    def of(cls, mask, distance, batch):
        kinds = ops.where(mask.bidirectional, 1, ops.where(mask.causal, 2, 0))
        rows = ops.cast(distance.row_positions, "float32")
        keys = ops.cast(distance.key_positions, "float32")
        span = ops.maximum(distance.span(), 1.0)[:, None]
        row_count, key_count = rows.shape[1], keys.shape[1]
        return cls(
            ops.broadcast_to(ops.cast(kinds, "int8"), (batch, key_count)),
            ops.cast(mask.row_index, "int32"),
            ops.broadcast_to(rows / span, (batch, row_count)),
            ops.broadcast_to(keys / span, (batch, key_count)),
            ops.convert_to_tensor(distance.strength, "float32"),
        )


class Tiles(NamedTuple):
    """Sizes of a tile, and how a program runs its loop of tiles."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(width):
    """Wider heads leave less of the chip's memory for a tile."""
    if width <= 64:
        return Tiles(rows=128, keys=64, warps=8, stages=3)
    if width <= 128:
        return Tiles(rows=64, keys=64, warps=4, stages=3)
    return Tiles(rows=64, keys=32, warps=8, stages=2)


def row_bounds(places, tiles, window):
    """The keys that each tile of rows may attend: from, and up to.

    Returns:
        An int32 tensor of shape `(batch, row tiles, 2)`; each range starts at
        a multiple of `tiles.keys`.
    """
    index = places.row_index
    rows = index.shape[0]
    lowest = index[:: tiles.rows]
    ends = np.arange(tiles.rows - 1, rows + tiles.rows - 1, tiles.rows)
    highest = ops.take(index, np.minimum(ends, rows - 1))
    places_after = ops.arange(1, places.kinds.shape[1] + 1, dtype="int32")
    last = [
        ops.max(ops.where(places.kinds == kind, places_after, 0), axis=1)
        for kind in (1, 2)
    ]
    end = ops.maximum(
        last[0][:, None], ops.minimum(last[1][:, None], highest + 1)
    )
    start = ops.zeros_like(end)
    if window is not None:
        first = ops.maximum(lowest - window + 1, 0)
        start = start + first // tiles.keys * tiles.keys
        end = ops.minimum(end, highest + window)
    return ops.cast(ops.stack([start, end], axis=-1), "int32")


def key_bounds(places, tiles, window):
    """The rows that may attend each tile of keys: from, and up to.

    Returns:
        An int32 tensor of shape `(batch, key tiles, 2)`; each range starts at
        a multiple of `tiles.rows`.
    """
    index = places.row_index
    batch, keys = places.kinds.shape
    lowest = np.arange(0, keys, tiles.keys)
    highest = np.minimum(lowest + tiles.keys, keys) - 1
    kinds = ops.pad(places.kinds, [(0, 0), (0, -keys % tiles.keys)])
    kinds = ops.reshape(kinds, (batch, -1, tiles.keys))
    for_all_rows = ops.any(kinds == 1, axis=-1)

    def first_row(at_least):
        at_least = ops.convert_to_tensor(at_least, "int32")
        return ops.cast(ops.searchsorted(index, at_least), "int32")

    start = ops.where(for_all_rows, 0, first_row(lowest))
    end = ops.full_like(start, index.shape[0])
    if window is not None:
        start = ops.maximum(start, first_row(lowest - window + 1))
        end = ops.minimum(end, first_row(highest + window))
    start = start // tiles.rows * tiles.rows
    return ops.cast(ops.stack([start, end], axis=-1), "int32")
