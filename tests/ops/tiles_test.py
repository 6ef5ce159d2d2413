"""Which tiles the kernels visit, against all pairs of rows and keys."""

import numpy as np
import pytest
from keras import ops

from keras_laid.ops.attention_divergence.tiles import Places
from keras_laid.ops.attention_divergence.tiles import Tiles
from keras_laid.ops.attention_divergence.tiles import choose_tiles
from keras_laid.ops.attention_divergence.tiles import key_bounds
from keras_laid.ops.attention_divergence.tiles import row_bounds
from tests.support import to_numpy

TILES = Tiles(3, 4, 1, 1)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 6, 40])


def pairs(kinds, row_index, window):
    """Which keys each row attends, one pair at a time."""
    allowed = np.zeros((len(kinds), len(row_index), kinds.shape[1]), bool)
    for example, row, key in np.ndindex(allowed.shape):
        kind, place = kinds[example, key], row_index[row]
        near = window is None or abs(place - key) < window
        allowed[example, row, key] = near and (
            kind == 1 or (kind == 2 and key <= place)
        )
    return allowed


def by_tile(allowed):
    """Of each tile of rows and keys: some are allowed; all are."""
    rows, keys = (
        -(-size // tile)
        for size, tile in zip(allowed.shape[1:], TILES[:2], strict=True)
    )
    some = np.zeros((len(allowed), rows, keys), bool)
    every = np.zeros_like(some)
    for example, row, key in np.ndindex(some.shape):
        tile = allowed[
            example,
            row * TILES.rows : (row + 1) * TILES.rows,
            key * TILES.keys : (key + 1) * TILES.keys,
        ]
        some[example, row, key] = tile.any()
        every[example, row, key] = tile.all()
    return some, every


def visited(bounds, number):
    """Of each tile and each of the others: it is visited; as a full one."""
    start, full_start, full_end, end = np.moveaxis(to_numpy(bounds), -1, 0)
    number = np.arange(number)

    def between(first, last):
        return (number >= first[..., None]) & (number < last[..., None])

    return between(start, end), between(full_start, full_end)


def both_ways(kinds, row_index, window):
    """What is allowed, and what is visited by tiles of rows and of keys."""
    places = Places(
        ops.convert_to_tensor(kinds.astype("int8")),
        ops.convert_to_tensor(row_index.astype("int32")),
        None,
        None,
    )
    some, every = by_tile(pairs(kinds, row_index, window))
    by_row = visited(row_bounds(places, TILES, window), some.shape[2])
    by_key = visited(key_bounds(places, TILES, window), some.shape[1])
    by_key = [np.swapaxes(each, 1, 2) for each in by_key]
    return some, every, by_row, by_key


@WINDOWS
@pytest.mark.parametrize("seed", range(6))
def test_what_is_allowed_is_visited(seed, window):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, (3, 22))
    kinds[1] = 2
    kinds[2, :9] = 1
    row_index = np.sort(rng.permutation(22)[:14])
    some, every, by_row, by_key = both_ways(kinds, row_index, window)
    for tiles, full in (by_row, by_key):
        assert not (some & ~tiles).any()
        assert not (full & ~every).any()


@pytest.mark.parametrize("rows", [24, 23])
@pytest.mark.parametrize("prefix", [0, 8, 11])
def test_a_prefix_mask_costs_no_tile_too_many(prefix, rows):
    kinds = np.full((2, 24), 2)
    kinds[:, :prefix] = 1
    kinds[1, 20:] = 0
    some, every, by_row, by_key = both_ways(kinds, np.arange(rows), None)
    for tiles, _ in (by_row, by_key):
        np.testing.assert_array_equal(tiles, some)
    np.testing.assert_array_equal(by_row[1], every)


@pytest.mark.parametrize("window", [2, 6])
def test_a_window_costs_no_tile_too_many(window):
    kinds = np.full((1, 24), 2)
    some, every, by_row, by_key = both_ways(kinds, np.arange(24), window)
    for tiles, full in (by_row, by_key):
        np.testing.assert_array_equal(tiles, some)
        np.testing.assert_array_equal(full, every)


@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_wider_heads_get_no_larger_tiles(kernel):
    def size(width, item_size=2, mixed=False, count=2**10):
        tiles = choose_tiles(kernel, width, count, item_size, mixed)
        return tiles.rows * tiles.keys

    assert size(64) >= size(128) >= size(256)
    assert size(64, item_size=4) >= size(256, item_size=4)
    assert size(256, item_size=4) <= size(256)
    assert size(256, mixed=True) <= size(256)
    assert size(128, mixed=True) == size(128)
