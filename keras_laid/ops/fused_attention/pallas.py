"""Parts of all fused kernels for JAX on GPUs; triton.py is its twin.

Maps exist only as tiles on the chip. Arrays are laid out (batch, length, heads,
width); lengths are padded to whole tiles and widths to powers of 2. Logarithms
are of base 2, whose power the chip computes.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from keras_laid.ops.fused_attention import tiles

INTERPRET = False  # Tests set it, to run the kernels on a CPU.
# Where running maxima start.
LEAST = -1e30
# A probability below this counts as 0 in `p * log(p)`, as in definition.py.
TINY = 1e-30
LOG2_E = 1.4426950408889634
PARTS = 8  # The number of parts in which sums over a tile's keys are kept.


class Kernels(NamedTuple):
    """One value for each kernel, such as its form or its bounds."""

    forward: Any
    query: Any
    key: Any


class Tile(NamedTuple):
    """A tile of the map of one head, in the example of the program."""

    head: Any
    row: Any  # Where its rows start.
    key: Any  # Where its keys start.


def exp2(x):
    """The chip's own instruction: 0 below 2**-126, unlike `jnp.exp2`."""
    if INTERPRET:
        return jnp.exp2(x)
    [power] = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return power


def log2(x):
    return LOG2_E * jnp.log(x)


def dot(a, b):
    return jnp.dot(
        a, b, precision="highest", preferred_element_type=jnp.float32
    )


def lift_of(dtype):
    """The factor on slopes, some of which are too small for float16."""
    return 1024.0 if dtype == jnp.float16 else 1.0


def dot_in_two(a, b, total):
    """`total + lift * a @ b` for float32 `a`, in two parts of `b`'s dtype.

    In one part, sums that cancel would have larger errors than the definition.
    """
    if b.dtype == jnp.float32:
        return total + dot(a, b)
    a = a * lift_of(b.dtype)
    # The high bits are cut, not rounded: rounding costs a conversion back.
    bits = lax.bitcast_convert_type(a, jnp.int32) & -0x10000
    high = lax.bitcast_convert_type(bits, jnp.float32)
    total += dot(high.astype(b.dtype), b)
    return total + dot((a - high).astype(b.dtype), b)


def rows_of(tile, form):
    return pl.ds(tile.row, form.tiles.rows)


def keys_of(tile, form):
    return pl.ds(tile.key, form.tiles.keys)


def load_row_tile(array, tile, form):
    """A tile of queries, or of an array with their layout."""
    return array[rows_of(tile, form), tile.head, :]


def load_key_tile(array, tile, spec, form):
    """A tile of the keys, or values, that the tile's query head reads."""
    key_head = tile.head // (spec.heads // spec.key_heads)
    return array[keys_of(tile, form), key_head, :]


def broadcast_rows(values, form):
    """Numbers of rows, in a shape that broadcasts over a tile."""
    return values[None] if form.tiles.by_key else values[:, None]


def broadcast_keys(values, form):
    return values[:, None] if form.tiles.by_key else values[None]


def logits_tile(query, keys, scale, cap, form):
    """Logits up to a factor, and the factor: `exp(logits) = 2 ** product`."""
    if form.tiles.by_key:
        logits = dot(keys, query.T)
    else:
        logits = dot(query, keys.T)
    if cap is not None:
        # tanh(scale * logits / cap)
        power = exp2(logits * (2.0 * LOG2_E * scale / cap))
        logits = 1.0 - 2.0 / (1.0 + power)
        scale = cap
    return logits, scale * LOG2_E


def where_allowed(allowed, values, other):
    """The values, or `other` where a tile's rows do not attend its keys.

    `allowed` is `None` for a tile whose rows all attend all of its keys.
    """
    return values if allowed is None else jnp.where(allowed, values, other)


def allowed_tile(places, tile, form):
    """Which of a tile's rows attend which of its keys."""
    kind = places.kinds[keys_of(tile, form)].astype(jnp.int32)
    kind = broadcast_keys(kind, form)
    index = places.row_index[rows_of(tile, form)]
    key_index = tile.key + jnp.arange(form.tiles.keys)
    ahead = broadcast_rows(index, form) - broadcast_keys(key_index, form)
    allowed = (kind == 1) | ((kind == 2) & (ahead >= 0))
    if form.window is not None:
        allowed &= jnp.abs(ahead) < form.window
    return allowed


def part_sums(values):
    """Sums over a tile's keys, in parts: each thread sums its own."""
    rows, keys = values.shape
    return jnp.sum(values.reshape(rows, keys // PARTS, PARTS), axis=1)


def own_rows(form):
    """The tile of a program that keeps rows, before it visits any keys."""
    # Tiles with the most keys start first.
    number = pl.num_programs(0) - 1 - pl.program_id(0)
    return Tile(pl.program_id(2), number * form.tiles.rows, 0)


def own_keys(form):
    """The tile of a program that keeps keys; its head is that of the keys."""
    return Tile(pl.program_id(2), 0, pl.program_id(0) * form.tiles.keys)


def for_each_keys(bounds, tile, step, state, form):
    """Runs `step(state, tile, check)` on each tile of keys that rows attend.

    It returns the last state. `check` is `False` for tiles in which every row
    attends every key, so that no mask is needed.
    """

    def visit(number, check, state):
        visited = tile._replace(key=number * form.tiles.keys)
        return step(state, visited, check)

    parts = (1, 2) if form.window is None else (0, 1, 2)
    own = tile.row // form.tiles.rows
    return for_each_tile(bounds, own, parts, visit, state)


def for_each_rows(bounds, tile, step, state, form):
    """As `for_each_keys`, on each tile of rows that attend some keys."""

    def visit(number, check, state):
        visited = tile._replace(row=number * form.tiles.rows)
        return step(state, visited, check)

    parts = (0, 1) if form.window is None else (0, 1, 2)
    own = tile.key // form.tiles.keys
    return for_each_tile(bounds, own, parts, visit, state)


def for_each_tile(bounds, own, parts, visit, state):
    """One loop for each range of tiles: only the middle one needs no mask."""
    for part in parts:

        def body(number, state, check=part != 1):
            return visit(number, check, state)

        ends = bounds[own, part], bounds[own, part + 1]
        state = lax.fori_loop(*ends, body, state)
    return state


def launch(kernel, form, bounds, heads, models, arguments, outputs):
    """Runs a kernel for each tile, example and head, on one example's arrays.

    The first axis of every array is the batch, or 1 if all examples share it.
    """

    def block_spec(array):
        _, *shape = array.shape
        shared = array.shape[0] == 1

        def index(tile, batch, head):
            return 0 if shared else batch, *[0] * len(shape)

        return pl.BlockSpec((None, *shape), index)

    batch, tile_count = bounds.shape[:2]
    arguments = (models, bounds, *arguments)
    return pl.pallas_call(
        functools.partial(kernel, form=form),
        grid=(tile_count, batch, heads),
        in_specs=jax.tree.map(block_spec, arguments),
        out_specs=jax.tree.map(block_spec, outputs),
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(
            num_warps=form.tiles.warps, num_stages=form.tiles.stages
        ),
        interpret=INTERPRET,
    )(*arguments)


class Padding(NamedTuple):
    """Numbers of which padded lengths are multiples: whole tiles everywhere."""

    rows: int
    keys: int

    @classmethod
    def from_forms(cls, forms):
        # Sizes of tiles are powers of 2: the largest is a multiple of each.
        return cls(
            max(form.tiles.rows for form in forms),
            max(form.tiles.keys for form in forms),
        )

    def queries(self, array):
        return pad_width(pad(array, 1, self.rows))

    def keys_or_values(self, array):
        return pad_width(pad(array, 1, self.keys))

    def places(self, places):
        """Rows beyond the last get its index, and have a gradient of 0."""
        kinds, row_index, row_share, key_share = places
        return tiles.Places(
            pad(kinds, 1, self.keys),
            pad(row_index, 0, self.rows, mode="edge"),
            None if row_share is None else pad(row_share, 1, self.rows),
            None if key_share is None else pad(key_share, 1, self.keys),
        )


def pad_width(array):
    # Tensor cores multiply matrices that are at least 16 wide.
    return pad(array, -1, max(pl.next_power_of_2(array.shape[-1]), 16))


def pad(array, axis, multiple, mode="constant"):
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, mode)


def choose_tiles(kernel, own, width, item_size, mixed):
    """The tiles of a kernel whose programs keep tiles of `own`."""
    count = own.size // own.shape[-1]
    chosen = tiles.choose_tiles(kernel, width, count, item_size, mixed)
    if chosen.in_registers:
        # Pallas cannot do that: the tile takes the memory of one stage.
        chosen = chosen._replace(stages=max(chosen.stages - 1, 1))
    return chosen


def bounds_of(places, forms, window):
    return Kernels(
        tiles.row_bounds(places, forms.forward.tiles, window),
        tiles.row_bounds(places, forms.query.tiles, window),
        tiles.key_bounds(places, forms.key.tiles, window),
    )
