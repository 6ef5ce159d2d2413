"""The tiles that Triton's kernels visit, written down."""

import torch
import triton
import triton.language as tl

from keras_laid.ops.attention_divergence.triton_kernels import Form
from keras_laid.ops.fused_attention import triton as kernels
from keras_laid.ops.fused_attention.triton import Tile
from keras_laid.ops.fused_attention.triton import tiles_of_keys
from keras_laid.ops.fused_attention.triton import tiles_of_rows


@triton.jit
def store_bounds(bounds, visited):
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for part in tl.static_range(4):
        tl.store(bounds + 4 * tile + part, visited[part])


@triton.jit
def bounds_of_rows(bounds, places, rows, form: tl.constexpr):
    row = tl.program_id(0) * form.tiles.rows
    tile = Tile(tl.program_id(1), 0, row, kernels.filled(rows), 0, 0)
    store_bounds(bounds, tiles_of_keys(places, tile, form))


@triton.jit
def bounds_of_keys(bounds, places, first_rows, rows, keys, form: tl.constexpr):
    key = tl.program_id(0) * form.tiles.keys
    rows, keys = kernels.filled(rows), kernels.filled(keys)
    tile = Tile(tl.program_id(1), 0, 0, rows, key, keys)
    store_bounds(bounds, tiles_of_rows(places, first_rows, tile, form))


def find_bounds(mask, distance, tiles, batch):
    """Bounds for tiles of rows and of keys, as from `tiles.row_bounds`."""
    places = kernels.find_places(mask, distance, batch)
    rows, keys = (
        positions.shape[1]
        for positions in (distance.row_positions, distance.key_positions)
    )
    form = Form(None, None, mask.window, 1.0, tiles, False)
    row_tiles, key_tiles = (
        places.kinds.new_empty(
            (batch, triton.cdiv(length, size), 4), dtype=torch.int32
        )
        for length, size in ((rows, tiles.rows), (keys, tiles.keys))
    )
    grid = row_tiles.shape[1], batch
    bounds_of_rows[grid](row_tiles, places, rows, form=form)
    first_rows = kernels.first_rows(places, form, keys)
    grid = key_tiles.shape[1], batch
    bounds_of_keys[grid](key_tiles, places, first_rows, rows, keys, form=form)
    return row_tiles, key_tiles
