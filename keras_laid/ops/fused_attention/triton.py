"""Parts of all fused kernels for torch on CUDA: tiles, and loops over them.

Maps exist only as tiles on the chip. Queries and keys are laid out (batch,
length, heads, width) and read through descriptors, which return 0 outside a
tensor. Logarithms are of base 2, whose power the chip computes. Arrays with one
number for each row or key are filled up to a multiple of 16, so that addresses
are aligned at any length: additional rows have the index of the last row and a
gradient of 0, and additional keys are padding.
"""

from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Where running maxima start.
LEAST = tl.constexpr(-1e30)
# A probability below this counts as 0 in `p * log(p)`, as in definition.py.
TINY = tl.constexpr(1e-30)
LOG2_E = tl.constexpr(1.4426950408889634)
# How tensor cores multiply float32 to nearly its precision.
FLOAT32 = tl.constexpr("tf32x3")
# The factor on slopes for float16: those of long rows would be too small.
LIFT = tl.constexpr(1024.0)
FILLED = tl.constexpr(16)  # Stored lengths are a multiple of this.
BYTES = 16  # Descriptors need rows whose bytes are a multiple of this.


class Side(NamedTuple):
    """One model's attention, in a kernel."""

    query: Any
    key: Any
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).
    scale: Any


class Places(NamedTuple):
    """Which keys a row attends, and how much their distance weighs."""

    kinds: Any  # (batch, keys): 0 for padding, 1 bidirectional, 2 causal.
    row_index: Any  # (rows,)
    # Weights are `1 + |row_share - key_share| ** exponent`.
    row_share: Any  # (batch, rows)
    key_share: Any  # (batch, keys)
    # Indices of an example's keys: the first padding, the first causal key, the
    # one after the last bidirectional key, the one after the last causal key.
    limits: Any  # (batch, 4)


class Tile(NamedTuple):
    """A tile of the map of one head of one example."""

    batch: Any
    head: Any
    row: Any  # Where its rows start.
    rows: Any  # How many rows are stored in all.
    key: Any  # Where its keys start.
    keys: Any  # How many keys are stored in all.


@triton.constexpr_function
def tile_width(width):
    """A power of 2, and at least 16, as tensor cores require."""
    return max(triton.next_power_of_2(width), 16)


@triton.jit
def filled(length):
    """The stored length, in a form that tells the compiler what divides it."""
    return tl.cdiv(length, FILLED) * FILLED


@triton.jit
def places_kernel(
    bidirectional,
    causal,
    row_positions,
    key_positions,
    mask_stride,
    row_stride,
    key_stride,
    strength,
    places,
    rows,
    keys,
    exponent: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Computes the places of one example, which the other kernels read."""
    batch = tl.program_id(0)
    first_padding = tl.full([SIZE], 0, tl.int32) + keys
    first_causal = first_padding
    after_bidirectional = tl.zeros([SIZE], tl.int32)
    after_causal = tl.zeros([SIZE], tl.int32)
    lowest = tl.full([SIZE], float("inf"), tl.float32)
    highest = -lowest
    for start in range(0, keys, SIZE):
        index = start + tl.arange(0, SIZE)
        inside = index < keys
        where = batch * mask_stride + index
        for_all = tl.load(bidirectional + where, mask=inside, other=0) != 0
        for_later = tl.load(causal + where, mask=inside, other=0) != 0
        kind = tl.where(for_all, 1, tl.where(for_later, 2, 0))
        where = places.kinds + batch * filled(keys) + index
        tl.store(where, kind, mask=index < filled(keys))
        after = index + 1
        padding = tl.where((kind == 0) & inside, index, keys)
        first_padding = tl.minimum(first_padding, padding)
        later = tl.where(kind == 2, index, keys)
        first_causal = tl.minimum(first_causal, later)
        last = tl.where(kind == 1, after, 0)
        after_bidirectional = tl.maximum(after_bidirectional, last)
        last = tl.where(kind == 2, after, 0)
        after_causal = tl.maximum(after_causal, last)
        where = key_positions + batch * key_stride + index
        position = tl.load(where, mask=inside, other=0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(inside, position, lowest))
        highest = tl.maximum(highest, tl.where(inside, position, highest))
    for start in range(0, rows, SIZE):
        index = start + tl.arange(0, SIZE)
        inside = index < rows
        where = row_positions + batch * row_stride + index
        position = tl.load(where, mask=inside, other=0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(inside, position, lowest))
        highest = tl.maximum(highest, tl.where(inside, position, highest))
    limits = places.limits + 4 * batch
    tl.store(limits, tl.min(first_padding, 0))
    tl.store(limits + 1, tl.min(first_causal, 0))
    tl.store(limits + 2, tl.max(after_bidirectional, 0))
    tl.store(limits + 3, tl.max(after_causal, 0))
    unit = tl.load(strength).to(tl.float32)
    if exponent != 1.0:
        power = tl.exp2(tl.log2(tl.maximum(unit, TINY)) / exponent)
        unit = tl.where(unit > 0.0, power, 0.0)
    unit /= tl.maximum(tl.max(highest, 0) - tl.min(lowest, 0), 1.0)
    for start in range(0, keys, SIZE):
        index = start + tl.arange(0, SIZE)
        where = key_positions + batch * key_stride + index
        share = tl.load(where, mask=index < keys, other=0).to(tl.float32) * unit
        where = places.key_share + batch * filled(keys) + index
        tl.store(where, share, mask=index < filled(keys))
    for start in range(0, rows, SIZE):
        index = start + tl.arange(0, SIZE)
        where = row_positions + batch * row_stride + index
        share = tl.load(where, mask=index < rows, other=0).to(tl.float32) * unit
        where = places.row_share + batch * filled(rows) + index
        tl.store(where, share, mask=index < filled(rows))


@triton.jit
def in_tiles(start, full_start, full_end, end, SIZE: tl.constexpr):
    """Bounds of the tiles that overlap a range, and of those all inside."""
    start = tl.maximum(start, 0) // SIZE
    end = tl.maximum(tl.cdiv(end, SIZE), start)
    full_start = tl.cdiv(tl.maximum(full_start, 0), SIZE)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end // SIZE, full_start), end)
    return start, full_start, full_end, end


@triton.jit
def tiles_of_keys(places, tile, form: tl.constexpr):
    """The tiles of keys that a tile of rows visits, in three ranges.

    In tiles of the second range every row attends every key; in the first and
    the third only some may.
    """
    lowest = tl.load(places.row_index + tile.row).to(tl.int32)
    last = tl.minimum(tile.row + form.tiles.rows, tile.rows) - 1
    highest = tl.load(places.row_index + last).to(tl.int32)
    limits = places.limits + 4 * tile.batch
    first_padding, first_causal = tl.load(limits), tl.load(limits + 1)
    after_bidirectional, after_causal = tl.load(limits + 2), tl.load(limits + 3)
    end = tl.minimum(after_causal, highest + 1)
    end = tl.maximum(after_bidirectional, end)
    full_end = tl.maximum(first_causal, lowest + 1)
    full_end = tl.minimum(first_padding, full_end)
    start, full_start = tl.program_id(0) * 0, tl.program_id(0) * 0
    if form.window is not None:
        start = lowest - form.window + 1
        full_start = highest - form.window + 1
        full_end = tl.minimum(full_end, lowest + form.window)
        end = tl.minimum(end, highest + form.window)
    return in_tiles(start, full_start, full_end, end, form.tiles.keys)


@triton.jit
def tiles_of_rows(places, first_rows, tile, form: tl.constexpr):
    """The tiles of rows that a tile of keys visits, in three ranges.

    The ranges are like those of `tiles_of_keys`. `first_rows` holds the first
    row whose index is at least that of a key: the first key of each tile, and
    of one more tile after the last. With a window it also holds such rows for
    the indices `window - 1` before and `window` after these keys.
    """
    number = tl.program_id(0)
    key = tile.key + tl.arange(0, form.tiles.keys)
    kinds = places.kinds + tile.batch * tile.keys
    kind = tl.load(kinds + key, mask=key < tile.keys, other=0).to(tl.int32)
    least, most = tl.min(kind, 0), tl.max(kind, 0)
    for_all_rows = tl.max((kind == 1).to(tl.int32), 0) > 0
    first, next_first = (
        tl.load(first_rows + number),
        tl.load(first_rows + number + 1),
    )
    start = tl.where(for_all_rows, 0, first)
    full_start = tl.where(most == 1, 0, next_first)
    # No row attends padding, or keys beyond the last.
    full_start = tl.where(least == 0, tile.rows, full_start)
    end, full_end = tl.where(most == 0, 0, tile.rows), tile.rows
    if form.window is not None:
        before = first_rows + tl.num_programs(0) + 1 + number
        after = before + tl.num_programs(0) + 1
        start = tl.maximum(start, tl.load(before))
        full_start = tl.maximum(full_start, tl.load(before + 1))
        full_end = tl.load(after)
        end = tl.minimum(end, tl.load(after + 1))
    return in_tiles(start, full_start, full_end, end, form.tiles.rows)


@triton.jit
def own_rows(rows, keys, heads: tl.constexpr, form: tl.constexpr):
    """The tile of a program that keeps rows, before it visits any keys."""
    # Tiles with the most keys start first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    return Tile(
        tl.program_id(1) // heads,
        tl.program_id(1) % heads,
        number * form.tiles.rows,
        filled(rows),
        number * 0,
        filled(keys),
    )


@triton.jit
def own_keys(rows, keys, key_heads: tl.constexpr, form: tl.constexpr):
    """The tile of a program that keeps keys; its head is that of the keys."""
    number = tl.program_id(0)
    return Tile(
        tl.program_id(1) // key_heads,
        tl.program_id(1) % key_heads,
        number * 0,
        filled(rows),
        number * form.tiles.keys,
        filled(keys),
    )


@triton.jit
def at_head(tile, head):
    return Tile(tile.batch, head, tile.row, tile.rows, tile.key, tile.keys)


@triton.jit
def for_each_keys(
    step: tl.constexpr, state, inputs, own, tile, form: tl.constexpr
):
    """Runs `step` on each tile of keys that rows attend.

    It returns the last state. `step(state, inputs, own, tile, form, CHECK)`
    returns the next state. `CHECK` is false for tiles in which every row
    attends every key, so that no mask is needed.
    """
    visited = tiles_of_keys(inputs.places, tile, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for number in range(visited[part], visited[part + 1]):
                visiting = Tile(
                    tile.batch,
                    tile.head,
                    tile.row,
                    tile.rows,
                    number * form.tiles.keys,
                    tile.keys,
                )
                state = step(state, inputs, own, visiting, form, part != 1)
    return state


@triton.jit
def for_each_rows(
    step: tl.constexpr, state, inputs, own, tile, visited, form: tl.constexpr
):
    """As `for_each_keys`, on the tiles of rows that `tiles_of_rows` returns."""
    for part in tl.static_range(3):
        for number in range(visited[part], visited[part + 1]):
            visiting = Tile(
                tile.batch,
                tile.head,
                number * form.tiles.rows,
                tile.rows,
                tile.key,
                tile.keys,
            )
            state = step(state, inputs, own, visiting, form, part != 1)
    return state


@triton.jit
def load_tile(tensor, batch, head, start):
    """A tile of one head's matrix, loaded through the tensor's descriptor."""
    tile = tensor.load([batch, start, head, 0])
    return tile.reshape(tensor.block_shape[1], tensor.block_shape[3])


@triton.jit
def load_own(
    tensor,
    batch,
    head,
    start,
    length,
    SIZE: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    form: tl.constexpr,
):
    """The tile that a program keeps.

    Triton keeps it in registers if it was read through a descriptor, and in
    shared memory if it was read through pointers.
    """
    if form.tiles.in_registers:
        return load_tile(tensor, batch, head, start)
    else:
        index = start + tl.arange(0, SIZE)
        column = tl.arange(0, tile_width(width))
        row = (batch.to(tl.int64) * length + index) * heads + head
        return tl.load(
            tensor + row[:, None] * width + column[None],
            mask=(index < length)[:, None] & (column < width)[None],
            other=0.0,
        )


@triton.jit
def load_own_rows(
    tensor,
    tile,
    rows,
    heads: tl.constexpr,
    width: tl.constexpr,
    form: tl.constexpr,
):
    """A program's tile of `tensor`, which has `rows` rows."""
    ROWS: tl.constexpr = form.tiles.rows
    return load_own(
        tensor, tile.batch, tile.head, tile.row, rows, ROWS, heads, width, form
    )


@triton.jit
def load_own_keys(
    tensor,
    tile,
    keys,
    heads: tl.constexpr,
    width: tl.constexpr,
    form: tl.constexpr,
):
    """A program's tile of `tensor`, which has `keys` rows."""
    KEYS: tl.constexpr = form.tiles.keys
    return load_own(
        tensor, tile.batch, tile.head, tile.key, keys, KEYS, heads, width, form
    )


@triton.jit
def store_tile(tensor, tile, batch, head, start):
    tile = tile.to(tensor.dtype).reshape(tensor.block_shape)
    tensor.store([batch, start, head, 0], tile)


@triton.jit
def load_row_tile(tensor, tile):
    """A tile of queries, or of a tensor with their layout."""
    return load_tile(tensor, tile.batch, tile.head, tile.row)


@triton.jit
def load_key_tile(tensor, tile, spec: tl.constexpr):
    """A tile of the keys, or values, that the tile's query head reads."""
    key_head = tile.head // (spec.heads // spec.key_heads)
    return load_tile(tensor, tile.batch, key_head, tile.key)


@triton.jit
def where_rows(tensor, tile, heads: tl.constexpr, form: tl.constexpr):
    """Addresses of a tile's rows in (batch, heads, rows), and which exist."""
    index = tl.arange(0, form.tiles.rows)
    head = tile.batch.to(tl.int64) * heads + tile.head
    first = tensor + (head * tile.rows + tile.row)
    return first + index, tile.row + index < tile.rows


@triton.jit
def load_rows(
    tensor,
    tile,
    heads: tl.constexpr,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A number for each of a tile's rows."""
    where, inside = where_rows(tensor, tile, heads, form)
    # A program's own tile may reach beyond the last row; a tile that it visits
    # may do so only with CHECK.
    if CHECK or not form.over_rows:
        return tl.load(where, mask=inside, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def store_rows(tensor, values, tile, heads: tl.constexpr, form: tl.constexpr):
    where, inside = where_rows(tensor, tile, heads, form)
    tl.store(where, values, mask=inside)


@triton.jit
def broadcast_rows(values, form: tl.constexpr):
    """Numbers of rows, in a shape that broadcasts over a tile."""
    return values[None] if form.tiles.by_key else values[:, None]


@triton.jit
def broadcast_keys(values, form: tl.constexpr):
    return values[:, None] if form.tiles.by_key else values[None]


@triton.jit
def logits_tile(query, keys, scale, cap: tl.constexpr, form: tl.constexpr):
    """Logits up to a factor, and the factor: `exp(logits) = 2 ** product`."""
    if form.tiles.by_key:
        logits = tl.dot(keys, tl.trans(query), input_precision=FLOAT32)
    else:
        logits = tl.dot(query, tl.trans(keys), input_precision=FLOAT32)
    if cap is not None:
        # tanh(scale * logits / cap)
        logits = 2.0 * tl.sigmoid(logits * (2.0 * scale / cap)) - 1.0
        scale = tl.full([], cap, tl.float32)
    return logits, scale * LOG2_E


@triton.jit
def lift(dtype: tl.constexpr):
    if dtype == tl.float16:
        return LIFT
    else:
        return 1.0


@triton.jit
def dot_in_two(a, b, total):
    """`total + lift * a @ b` for float32 `a`, in two parts of `b`'s dtype.

    In one part, sums that cancel would have larger errors than the definition.
    """
    if b.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision=FLOAT32)
    else:
        if b.dtype == tl.float16:
            a *= LIFT
        # The high bits are cut, not rounded: rounding costs a conversion back.
        bits = a.to(tl.uint32, bitcast=True) & 0xFFFF0000
        high = bits.to(tl.float32, bitcast=True)
        total = tl.dot(high.to(b.dtype), b, total)
        return tl.dot((a - high).to(b.dtype), b, total)


@triton.jit
def allowed_tile(places, tile, form: tl.constexpr):
    """Which of a tile's rows attend which of its keys."""
    row = tile.row + tl.arange(0, form.tiles.rows)
    key = tile.key + tl.arange(0, form.tiles.keys)
    kinds = places.kinds + tile.batch * tile.keys
    kind = tl.load(kinds + key, mask=key < tile.keys, other=0)
    index = tl.load(places.row_index + row, mask=row < tile.rows, other=-1)
    kind = broadcast_keys(kind, form)
    ahead = broadcast_rows(index, form) - broadcast_keys(key, form)
    allowed = (kind == 1) | ((kind == 2) & (ahead >= 0))
    if form.window is not None:
        allowed = allowed & (tl.abs(ahead) < form.window)
    return allowed


@triton.jit
def part_sums(values):
    """Sums over a tile's keys, in 8 parts a row: each thread sums its own."""
    ROWS: tl.constexpr = values.shape[0]
    KEYS: tl.constexpr = values.shape[1]
    return tl.sum(values.reshape(ROWS, KEYS // 8, 8), 1)


def first_rows(places, form, keys):
    """The argument `first_rows` of `tiles_of_rows`."""
    index, size = places.row_index, form.tiles.keys
    edges = torch.arange(
        0, keys + size, size, dtype=index.dtype, device=index.device
    )
    if form.window is not None:
        edges = torch.stack(
            [edges, edges - form.window + 1, edges + form.window]
        )
    return torch.searchsorted(index, edges, out_int32=True)


def empty_rows(query):
    batch, rows, heads, _ = query.shape
    return query.new_empty(
        (batch, heads, rows + missing(rows)), dtype=torch.float32
    )


def missing(length):
    """How many rows or keys are added to a length when it is stored."""
    return -length % FILLED.value


def fill(numbers):
    """Numbers of each row, with zeros up to the stored length."""
    extra = missing(numbers.shape[-1])
    if extra:
        numbers = torch.nn.functional.pad(numbers, (0, extra))
    return numbers.contiguous()


def own_tile(tensor, size, form):
    """How a program reads the tile that it keeps; see `load_own`."""
    if form.tiles.in_registers:
        return descriptor(tensor, size)
    return tensor


def descriptor(tensor, size):
    """How kernels read or write tiles of `size` rows of one head."""
    width = tile_width(tensor.shape[-1])
    return TensorDescriptor.from_tensor(tensor, [1, size, 1, width])


def launch(kernel, form, grid, *arguments):
    kernel[grid](
        *arguments,
        form=form,
        num_warps=form.tiles.warps,
        num_stages=form.tiles.stages,
    )


def find_places(mask, distance, batch):
    """The places of all examples, by one kernel, not many small operations."""
    rows = distance.row_positions.shape[1]
    keys = distance.key_positions.shape[1]
    device = distance.key_positions.device
    strength = distance.strength
    if not isinstance(strength, torch.Tensor):
        strength = torch.full((), strength, device=device)

    def empty(length, dtype):
        return torch.empty((batch, length), dtype=dtype, device=device)

    index = mask.row_index
    if missing(rows):
        index = torch.cat([index, index[-1:].expand(missing(rows))])
    filled_keys = keys + missing(keys)
    places = Places(
        empty(filled_keys, torch.int8),
        index.contiguous(),
        empty(len(index), torch.float32),
        empty(filled_keys, torch.float32),
        empty(4, torch.int32),
    )
    masks = torch.broadcast_tensors(mask.bidirectional, mask.causal)
    tensors = [
        tensor.contiguous()
        for tensor in (*masks, distance.row_positions, distance.key_positions)
    ]
    # A stride of 0 lets all examples share a tensor with a batch of 1.
    strides = [0 if len(each) == 1 else each.stride(0) for each in tensors[1:]]
    places_kernel[(batch,)](
        *tensors,
        *strides,
        strength,
        places,
        rows,
        keys,
        exponent=float(distance.exponent),
        SIZE=1024,
    )
    return places


def readable(tensor):
    """The tensor, contiguous and of a width that descriptors can read."""
    extra = -tensor.shape[-1] % (BYTES // tensor.element_size())
    if extra:
        tensor = torch.nn.functional.pad(tensor, (0, extra))
    return tensor.contiguous()
