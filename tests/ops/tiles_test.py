"""Which tiles the kernels visit, against all pairs of rows and keys."""

import importlib.util
import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops.fused_attention.availability import WIDEST
from keras_laid.ops.fused_attention.tiles import CHOICES
from keras_laid.ops.fused_attention.tiles import SMALL
from keras_laid.ops.fused_attention.tiles import Places
from keras_laid.ops.fused_attention.tiles import Tiles
from keras_laid.ops.fused_attention.tiles import choose_tiles
from keras_laid.ops.fused_attention.tiles import key_bounds
from keras_laid.ops.fused_attention.tiles import row_bounds
from tests.ops.kernels import H100
from tests.support import to_numpy

TILES = Tiles(3, 4, 1, 1)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 6, 40])
KERNELS = tuple(CHOICES)


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
    """Whether some and all pairs of each tile of rows and keys are allowed."""
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
    """For each tile, whether it visits each other tile, and as a full one."""
    start, full_start, full_end, end = np.moveaxis(to_numpy(bounds), -1, 0)
    number = np.arange(number)

    def between(first, last):
        return (number >= first[..., None]) & (number < last[..., None])

    return between(start, end), between(full_start, full_end)


def bounds_from_arrays(kinds, row_index, window):
    """Bounds for tiles of rows and of keys, found before a kernel starts."""
    places = Places(
        ops.convert_to_tensor(kinds.astype("int8")),
        ops.convert_to_tensor(row_index.astype("int32")),
        None,
        None,
    )
    return [find(places, TILES, window) for find in (row_bounds, key_bounds)]


def bounds_from_triton(kinds, row_index, window):
    """Bounds for tiles of rows and of keys, found within Triton's kernels."""
    from tests.ops.triton_bounds import find_bounds

    mask = AttentionMask(
        ops.convert_to_tensor(kinds == 1),
        ops.convert_to_tensor(kinds == 2),
        ops.convert_to_tensor(row_index.astype("int32")),
        window,
    )
    batch, keys = kinds.shape
    places = ops.zeros((1, len(row_index))), ops.zeros((1, keys))
    return find_bounds(mask, Distance(*places), TILES, batch)


BOUNDS = pytest.mark.parametrize(
    "find",
    [
        bounds_from_arrays,
        pytest.param(
            bounds_from_triton,
            marks=pytest.mark.skipif(
                keras.backend.backend() != "torch"
                or importlib.util.find_spec("triton") is None,
                reason="For torch, where Triton is installed.",
            ),
        ),
    ],
)


def both_ways(find, kinds, row_index, window):
    """The allowed tiles, and those that tiles of rows and of keys visit."""
    some, every = by_tile(pairs(kinds, row_index, window))
    row_tiles, key_tiles = find(kinds, row_index, window)
    by_row = visited(row_tiles, some.shape[2])
    by_key = [
        np.swapaxes(each, 1, 2) for each in visited(key_tiles, len(some[0]))
    ]
    return some, every, by_row, by_key


@BOUNDS
@WINDOWS
@pytest.mark.parametrize("seed", range(6))
def test_what_is_allowed_is_visited(seed, window, find):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, (3, 22))
    kinds[1] = 2
    kinds[2, :9] = 1
    row_index = np.sort(rng.permutation(22)[:14])
    some, every, by_row, by_key = both_ways(find, kinds, row_index, window)
    for tiles, full in (by_row, by_key):
        assert not (some & ~tiles).any()
        assert not (full & ~every).any()


@BOUNDS
@pytest.mark.parametrize("keys", [24, 23])
@pytest.mark.parametrize("rows", [24, 23])
@pytest.mark.parametrize("prefix", [0, 8, 11])
def test_a_prefix_mask_costs_no_tile_too_many(prefix, rows, keys, find):
    kinds = np.full((2, keys), 2)
    kinds[:, :prefix] = 1
    kinds[1, 20:] = 0
    some, every, by_row, by_key = both_ways(find, kinds, np.arange(rows), None)
    for tiles, _ in (by_row, by_key):
        np.testing.assert_array_equal(tiles, some)
    np.testing.assert_array_equal(by_row[1], every)


@BOUNDS
@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("window", [2, 6])
def test_a_window_costs_no_tile_too_many(window, kind, find):
    kinds = np.full((1, 24), kind)
    some, every, by_row, by_key = both_ways(find, kinds, np.arange(24), window)
    # Triton's gradient of keys may visit a tile more at each end of a window:
    # it knows where tiles of keys start, and not where their last key is.
    exact = (by_row, by_key) if find is bounds_from_arrays else (by_row,)
    for tiles, full in exact:
        np.testing.assert_array_equal(tiles, some)
        np.testing.assert_array_equal(full, every)


@pytest.mark.parametrize("kernel", KERNELS)
def test_wider_heads_get_no_larger_tiles(kernel):
    def size(width, item_size=2, mixed=False, count=2**10):
        tiles = choose_tiles(kernel, width, count, item_size, mixed)
        return tiles.rows * tiles.keys

    assert size(64) >= size(128) >= size(256)
    assert size(64, item_size=4) >= size(256, item_size=4)
    assert size(256, item_size=4) <= size(256)
    if kernel != "key_value":  # The others take mixtures.
        assert size(256, mixed=True) <= size(256)
        assert size(128, mixed=True) == size(128)


def every_choice():
    """Each kernel and head dim, and the tiles it gets."""
    counts, mixed = (1, 2**20), (False, True)
    for kernel, width, count, item_size, is_mixed in itertools.product(
        KERNELS, range(1, WIDEST + 1), counts, (2, 4), mixed
    ):
        tiles = choose_tiles(kernel, width, count, item_size, is_mixed)
        yield kernel, width, item_size, tiles


def test_tiles_are_what_kernels_can_run():
    for kernel, _, _, tiles in every_choice():
        for size in tiles[:3]:
            assert size.bit_count() == 1  # A power of 2.
        # Tensor cores multiply matrices that are at least 16 wide.
        assert min(tiles.rows, tiles.keys) >= 16
        # The other kernels sum over the keys of a tile along its last axis.
        assert kernel.startswith("key") or not tiles.by_key


def test_what_kernels_multiply_fits_a_gpu():
    for kernel, width, item_size, tiles in every_choice():
        own, visited = tiles.rows, tiles.keys
        if kernel.startswith("key"):
            own, visited = visited, own
        numbers = tiles.stages * visited + own * (not tiles.in_registers)
        # For both models, or queries and keys as well as values and slopes.
        assert 2 * numbers * width * item_size <= H100


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_stands_in_the_tables_is_chosen(kernel):
    for width, least, tiles in CHOICES[kernel]:
        assert choose_tiles(kernel, width, least, 2, mixed=False) == tiles
        if least:
            few = choose_tiles(kernel, width, least - 1, 2, mixed=False)
            assert few != tiles


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("item_size", [2, 4])
def test_a_head_dim_gets_the_tiles_of_what_it_is_filled_up_to(
    kernel, mixed, item_size
):
    def choose(width):
        return choose_tiles(kernel, width, 2**10, item_size, mixed)

    for width in range(17, WIDEST + 1):
        assert choose(width) == choose(2 ** (width - 1).bit_length())


@pytest.mark.parametrize("table", [*CHOICES.values(), SMALL])
def test_tables_go_up_to_widths_that_fill_a_tile(table):
    # A head dim is padded to a power of 2, so other limits are useless.
    limits = [limit for limit, *_ in table]
    assert limits == sorted(limits)
    assert all(limit.bit_count() == 1 for limit in limits)


def test_gradients_of_keys_need_no_transposing():
    assert all(
        tiles.by_key
        for kernel in ("key", "key_value")
        for *_, tiles in CHOICES[kernel]
    )
