"""Shapes, places and visited tiles of all fused kernels."""

from typing import NamedTuple
from typing import Self

from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.typing import Tensor


class Spec(NamedTuple):
    """The shape of one model's attention, a constant of the kernels."""

    heads: int
    key_heads: int
    width: int
    soft_cap: float | None

    @classmethod
    def from_attention(cls, attention: Attention) -> Self:
        return cls(
            attention.query.shape[2],
            attention.key.shape[2],
            attention.query.shape[3],
            attention.soft_cap,
        )


class Places(NamedTuple):
    """Which keys a row attends, and how much their distance weighs.

    Weights are `1 + |row_share - key_share| ** exponent`.
    """

    kinds: Tensor  # (batch, keys): 0 for padding, 1 bidirectional, 2 causal.
    row_index: Tensor  # (rows,)
    # `None` for ops without weights.
    row_share: Tensor | None = None  # (batch, rows)
    key_share: Tensor | None = None  # (batch, keys)

    @classmethod
    def from_mask(cls, mask: AttentionMask) -> Self:
        kinds = ops.where(mask.bidirectional, 1, ops.where(mask.causal, 2, 0))
        return cls(ops.cast(kinds, "int8"), ops.cast(mask.row_index, "int32"))

    @classmethod
    def from_mask_and_distance(
        cls, mask: AttentionMask, distance: Distance, batch: int | Tensor
    ) -> Self:
        kinds, row_index, _, _ = cls.from_mask(mask)
        rows = ops.cast(distance.row_positions, "float32")
        keys = ops.cast(distance.key_positions, "float32")
        unit = distance.strength ** (1.0 / distance.exponent)
        unit = (unit / ops.maximum(distance.span(), 1.0))[:, None]
        row_count, key_count = rows.shape[1], keys.shape[1]
        return cls(
            ops.broadcast_to(kinds, (batch, key_count)),
            row_index,
            ops.broadcast_to(rows * unit, (batch, row_count)),
            ops.broadcast_to(keys * unit, (batch, key_count)),
        )


class Tiles(NamedTuple):
    """Sizes of a tile, and how a program runs its loop of tiles."""

    rows: int
    keys: int
    warps: int
    stages: int
    by_key: bool = False  # Tiles are (keys, rows), not (rows, keys).
    # Whether a program keeps its own tile of queries or keys in registers.
    in_registers: bool = False


# The fastest tiles on an H100, for numbers of 2 bytes: (largest head dim, least
# number of rows, tiles). The number of rows is that of all heads and examples;
# in "key" and "key_value" it is the number of keys.
CHOICES = {
    "forward": [
        (64, 0, Tiles(64, 64, 4, 3, in_registers=True)),
        (128, 0, Tiles(64, 64, 4, 3, in_registers=True)),
        (256, 0, Tiles(64, 64, 4, 2)),
    ],
    "query": [
        (64, 0, Tiles(64, 64, 4, 3)),
        (128, 0, Tiles(64, 64, 4, 3, in_registers=True)),
        (256, 2**17, Tiles(128, 32, 8, 2)),
        (256, 0, Tiles(64, 64, 4, 2)),
    ],
    "key": [
        (64, 0, Tiles(64, 64, 4, 3, by_key=True, in_registers=True)),
        (128, 0, Tiles(64, 64, 4, 2, by_key=True)),
        (256, 2**17, Tiles(32, 128, 8, 2, by_key=True)),
        (256, 0, Tiles(32, 64, 4, 2, by_key=True)),
    ],
    # Not measured: these leave room in registers for twice the sums.
    "key_value": [
        (64, 0, Tiles(64, 64, 4, 3, by_key=True, in_registers=True)),
        (128, 0, Tiles(64, 64, 4, 2, by_key=True)),
        (256, 0, Tiles(32, 32, 4, 2, by_key=True)),
    ],
}
# For float32, and for mixtures of wide heads: (largest bytes of a head, tiles).
# Not measured: larger tiles for 1,024 bytes leave too few registers.
SMALL = [(512, Tiles(64, 32, 4, 1)), (1024, Tiles(16, 32, 8, 1))]


def choose_tiles(
    kernel: str, width: int, count: int, item_size: int, mixed: bool
) -> Tiles:
    """The tiles of a kernel: smaller for wider heads.

    Args:
        kernel: `"forward"`, `"query"` (the gradient of queries), `"key"` (that
            of keys), or `"key_value"` (those of keys and values at once).
        width: Integer, the largest head dim that the kernel reads.
        count: Integer, the number of rows of all heads and examples, or of keys
            if a program keeps a tile of keys. If it is small, small tiles keep
            all of a GPU busy.
        item_size: Integer, the most bytes of a number of queries and keys.
        mixed: Whether tiles of several teacher heads are in use at once.
    """
    if item_size == 2 and not (mixed and width > 128):
        for limit, least, tiles in CHOICES[kernel]:
            if width <= limit and count >= least:
                return tiles
    return next(t for limit, t in SMALL if width * item_size <= limit)


def row_bounds(places: Places, tiles: Tiles, window: int | None) -> Tensor:
    """The tiles of keys that each tile of rows visits, in three ranges.

    Returns:
        An int32 tensor of shape `(batch, row tiles, 4)`: ascending bounds of
        three ranges of tiles. In tiles of the second range every row attends
        every key; in the first and the third only some may.
    """
    index = places.row_index
    rows, keys = index.shape[0], places.kinds.shape[1]
    lowest, highest = index[:: tiles.rows], index[tiles.rows - 1 :: tiles.rows]
    if rows % tiles.rows:
        highest = ops.concatenate([highest, index[-1:]])
    number = ops.arange(keys, dtype="int32")

    def first(kind: int) -> Tensor:
        at = ops.where(places.kinds == kind, number, keys)
        return ops.min(at, axis=1)[:, None]

    def after_last(kind: int) -> Tensor:
        at = ops.where(places.kinds == kind, number + 1, 0)
        return ops.max(at, axis=1)[:, None]

    end = ops.maximum(after_last(1), ops.minimum(after_last(2), highest + 1))
    full_end = ops.minimum(first(0), ops.maximum(first(2), lowest + 1))
    start = full_start = ops.zeros_like(end)
    if window is not None:
        start = ops.maximum(start, lowest - window + 1)
        full_start = ops.maximum(full_start, highest - window + 1)
        full_end = ops.minimum(full_end, lowest + window)
        end = ops.minimum(end, highest + window)
    return in_tiles(start, full_start, full_end, end, tiles.keys)


def key_bounds(places: Places, tiles: Tiles, window: int | None) -> Tensor:
    """The tiles of rows that each tile of keys visits, in three ranges.

    Returns:
        An int32 tensor of shape `(batch, key tiles, 4)`, like that of
        `row_bounds` with rows and keys exchanged.
    """
    index = places.row_index
    rows, keys = index.shape[0], places.kinds.shape[1]
    kinds = ops.pad(places.kinds, [(0, 0), (0, -keys % tiles.keys)])
    lowest = ops.arange(0, kinds.shape[1], tiles.keys, dtype="int32")
    highest = lowest + tiles.keys - 1
    kinds = ops.reshape(kinds, (-1, lowest.shape[0], tiles.keys))
    least, most = ops.min(kinds, axis=-1), ops.max(kinds, axis=-1)

    def first_row(at_least: Tensor) -> Tensor:
        # On JAX, `searchsorted` is a loop of small kernels.
        return ops.count_nonzero(index[None] < at_least[:, None], axis=1)

    start = ops.where(ops.any(kinds == 1, axis=-1), 0, first_row(lowest))
    full_start = ops.where(most == 1, 0, first_row(highest))
    # No row attends padding, or keys beyond the last.
    full_start = ops.where(least == 0, rows, full_start)
    full_end = ops.full_like(start, rows)
    end = ops.where(most == 0, 0, full_end)
    if window is not None:
        start = ops.maximum(start, first_row(lowest - window + 1))
        full_start = ops.maximum(full_start, first_row(highest - window + 1))
        full_end = ops.minimum(full_end, first_row(lowest + window))
        end = ops.minimum(end, first_row(highest + window))
    return in_tiles(start, full_start, full_end, end, tiles.rows)


def in_tiles(
    start: Tensor, full_start: Tensor, full_end: Tensor, end: Tensor, size: int
) -> Tensor:
    """Bounds of the tiles that overlap a range, and of those all inside."""
    start = start // size
    end = ops.maximum((end + size - 1) // size, start)
    full_start = ops.clip((full_start + size - 1) // size, start, end)
    full_end = ops.clip(full_end // size, full_start, end)
    bounds = (start, full_start, full_end, end)
    return ops.stack([ops.cast(bound, "int32") for bound in bounds], axis=-1)
