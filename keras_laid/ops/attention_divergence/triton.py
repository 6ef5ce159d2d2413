"""The divergence in fused kernels for torch on CUDA.

Maps exist only as tiles on the chip; README.md derives the sums. Queries and
keys are laid out (batch, length, heads, width) and read through descriptors,
which give 0 outside. Logarithms are of base 2, whose power the chip computes.
In names, `rows` and `keys` are lengths, `row` and `key` where a tile starts.
Numbers of rows and keys are stored for multiples of 16, so that addresses are
aligned at any length: what fills up is a row like the last, whose gradient is
0, or a key that is padding.
"""

from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from keras_laid.ops.attention_divergence import tiles

# The least that a running maximum is; and what counts as probability 0 in
# `p * log(p)`, as in definition.py.
LEAST = tl.constexpr(-1e30)
TINY = tl.constexpr(1e-30)
LOG2_E = tl.constexpr(1.4426950408889634)
# How tensor cores multiply float32 to nearly its precision.
FLOAT32 = tl.constexpr("tf32x3")
# Slopes are made so many times larger for float16: those of long rows would be
# too small for it.
LIFT = tl.constexpr(1024.0)
FILLED = tl.constexpr(16)  # What stored lengths are a multiple of.
BYTES = 16  # Descriptors want rows that are multiples of so many.


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
    # Of an example's keys the first that is padding, the first that is causal,
    # the one after the last bidirectional, the one after the last causal.
    limits: Any  # (batch, 4)


class Form(NamedTuple):
    """What a kernel is compiled for."""

    student: tiles.Spec
    teacher: tiles.Spec
    window: int | None
    exponent: float
    tiles: tiles.Tiles
    over_rows: bool  # Whether a program visits tiles of rows, not of keys.


@triton.constexpr_function
def tile_width(width):
    """Tensor cores multiply matrices that are at least 16 wide."""
    return max(triton.next_power_of_2(width), 16)


@triton.jit
def filled(length):
    """The length that is stored; its compiler knows what divides it."""
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
    """What the other kernels know of places, for one example."""
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
    """Tiles that hold some of a range, and those between that are full."""
    start = tl.maximum(start, 0) // SIZE
    end = tl.maximum(tl.cdiv(end, SIZE), start)
    full_start = tl.cdiv(tl.maximum(full_start, 0), SIZE)
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_end = tl.minimum(tl.maximum(full_end // SIZE, full_start), end)
    return start, full_start, full_end, end


@triton.jit
def tiles_of_keys(places, batch, row, rows, form: tl.constexpr):
    """The tiles of keys that a tile of rows visits, in three ranges.

    In the second, every row attends every key; in the others some do.
    """
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    lowest = tl.load(places.row_index + row).to(tl.int32)
    last = tl.minimum(row + ROWS, rows) - 1
    highest = tl.load(places.row_index + last).to(tl.int32)
    limits = places.limits + 4 * batch
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
    return in_tiles(start, full_start, full_end, end, KEYS)


@triton.jit
def tiles_of_rows(
    places, first_rows, batch, tile, rows, keys, form: tl.constexpr
):
    """The tiles of rows that visit a tile of keys, likewise.

    `first_rows` has, for the start of each tile and of one more, the first row
    that stands there or later; with a window also the first for places
    `window - 1` before and `window` after.
    """
    KEYS: tl.constexpr = form.tiles.keys
    key = tile * KEYS + tl.arange(0, KEYS)
    kind = tl.load(places.kinds + batch * keys + key, mask=key < keys, other=0)
    kind = kind.to(tl.int32)
    least, most = tl.min(kind, 0), tl.max(kind, 0)
    for_all_rows = tl.max((kind == 1).to(tl.int32), 0) > 0
    first, next_first = (
        tl.load(first_rows + tile),
        tl.load(first_rows + tile + 1),
    )
    start = tl.where(for_all_rows, 0, first)
    full_start = tl.where(most == 1, 0, next_first)
    # Keys that are padding, or beyond the last, are attended by none.
    full_start = tl.where(least == 0, rows, full_start)
    end, full_end = tl.where(most == 0, 0, rows), rows
    if form.window is not None:
        before = first_rows + tl.num_programs(0) + 1 + tile
        after = before + tl.num_programs(0) + 1
        start = tl.maximum(start, tl.load(before))
        full_start = tl.maximum(full_start, tl.load(before + 1))
        full_end = tl.load(after)
        end = tl.minimum(end, tl.load(after + 1))
    return in_tiles(start, full_start, full_end, end, form.tiles.rows)


@triton.jit
def load_tile(tensor, batch, head, start):
    """A tile of one head's matrix, one of many: by its descriptor."""
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

    Triton keeps it in registers if it was read by a descriptor, in the memory
    that threads share if it was read by pointers.
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
def store_tile(tensor, tile, batch, head, start):
    tile = tile.to(tensor.dtype).reshape(tensor.block_shape)
    tensor.store([batch, start, head, 0], tile)


@triton.jit
def load_query(side, batch, head, row):
    return load_tile(side.query, batch, head, row)


@triton.jit
def load_key(side, batch, head, key, spec: tl.constexpr):
    """The keys that query head `head` reads."""
    key_head = head // (spec.heads // spec.key_heads)
    return load_tile(side.key, batch, key_head, key)


@triton.jit
def where_rows(
    tensor, batch, head, row, rows, heads: tl.constexpr, form: tl.constexpr
):
    """Where a (batch, heads, rows) has a tile's rows, and which it has."""
    index = tl.arange(0, form.tiles.rows)
    first = tensor + ((batch.to(tl.int64) * heads + head) * rows + row)
    return first + index, row + index < rows


@triton.jit
def load_rows(
    tensor,
    batch,
    head,
    row,
    rows,
    heads: tl.constexpr,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """A number for each of a tile's rows."""
    where, inside = where_rows(tensor, batch, head, row, rows, heads, form)
    # A program's own tile of rows may be the last; those it visits are checked.
    if CHECK or not form.over_rows:
        return tl.load(where, mask=inside, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def store_rows(
    tensor,
    values,
    batch,
    head,
    row,
    rows,
    heads: tl.constexpr,
    form: tl.constexpr,
):
    where, inside = where_rows(tensor, batch, head, row, rows, heads, form)
    tl.store(where, values, mask=inside)


@triton.jit
def load_share(
    tensor, batch, start, length, SIZE: tl.constexpr, CHECK: tl.constexpr
):
    """Positions of a tile's rows or keys, in units of their weight."""
    index = tl.arange(0, SIZE)
    where = tensor + (batch * length + start) + index
    if CHECK:
        return tl.load(where, mask=start + index < length, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def of_rows(values, form: tl.constexpr):
    """Numbers of rows, as a tile has them."""
    return values[None] if form.tiles.by_key else values[:, None]


@triton.jit
def of_keys(values, form: tl.constexpr):
    return values[:, None] if form.tiles.by_key else values[None]


@triton.jit
def logits_tile(query, keys, scale, cap: tl.constexpr, form: tl.constexpr):
    """Logits over a number, and that number: their product has base 2."""
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

    In one part, sums that cancel would lose more than the definition's.
    """
    if b.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision=FLOAT32)
    else:
        if b.dtype == tl.float16:
            a *= LIFT
        # The first bits, cut and not rounded: converting back costs more.
        bits = a.to(tl.uint32, bitcast=True) & 0xFFFF0000
        high = bits.to(tl.float32, bitcast=True)
        total = tl.dot(high.to(b.dtype), b, total)
        return tl.dot((a - high).to(b.dtype), b, total)


@triton.jit
def allowed_tile(places, batch, row, rows, key, keys, form: tl.constexpr):
    row += tl.arange(0, form.tiles.rows)
    key += tl.arange(0, form.tiles.keys)
    kind = tl.load(places.kinds + batch * keys + key, mask=key < keys, other=0)
    index = tl.load(places.row_index + row, mask=row < rows, other=-1)
    kind = of_keys(kind, form)
    ahead = of_rows(index, form) - of_keys(key, form)
    allowed = (kind == 1) | ((kind == 2) & (ahead >= 0))
    if form.window is not None:
        allowed = allowed & (tl.abs(ahead) < form.window)
    return allowed


@triton.jit
def weights_tile(
    places,
    batch,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    CHECK_ROWS: tl.constexpr = CHECK or not form.over_rows
    CHECK_KEYS: tl.constexpr = CHECK or form.over_rows
    of_row = load_share(places.row_share, batch, row, rows, ROWS, CHECK_ROWS)
    of_key = load_share(places.key_share, batch, key, keys, KEYS, CHECK_KEYS)
    share = tl.abs(of_rows(of_row, form) - of_keys(of_key, form))
    if form.exponent != 1.0:
        share = tl.exp2(form.exponent * tl.log2(share))
    return 1.0 + share


@triton.jit
def map_tile(
    teacher,
    query,
    keys,
    normalizer,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The attention map of one head of the teacher."""
    spec: tl.constexpr = form.teacher
    t, unit = logits_tile(query, keys, teacher.scale, spec.soft_cap, form)
    p = tl.exp2(t * unit - of_rows(normalizer, form))
    if CHECK:
        p = tl.where(allowed, p, 0.0)
    return p


@triton.jit
def head_tile(
    teacher,
    batch,
    head,
    row,
    rows,
    key,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The same, of a head whose queries and keys are not at hand."""
    spec: tl.constexpr = form.teacher
    query = load_query(teacher, batch, head, row)
    keys = load_key(teacher, batch, head, key, spec)
    normalizer = load_rows(
        teacher.normalizer, batch, head, row, rows, spec.heads, form, True
    )
    return map_tile(teacher, query, keys, normalizer, allowed, form, CHECK)


@triton.jit
def mixed_tile(
    teacher,
    mixture,
    batch,
    head,
    row,
    rows,
    key,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The mixture of the teacher's maps that student head `head` learns."""
    spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    if form.tiles.by_key:
        p = tl.zeros([KEYS, ROWS], tl.float32)
    else:
        p = tl.zeros([ROWS, KEYS], tl.float32)
    for other in range(spec.heads):
        share = tl.load(mixture + head * spec.heads + other)
        p += share * head_tile(
            teacher, batch, other, row, rows, key, allowed, form, CHECK
        )
    return p


@triton.jit
def part_sums(values):
    """Sums over a tile's keys, in 8 parts a row: each thread sums its own."""
    ROWS: tl.constexpr = values.shape[0]
    KEYS: tl.constexpr = values.shape[1]
    return tl.sum(values.reshape(ROWS, KEYS // 8, 8), 1)


@triton.jit
def normalizer_step(
    state,
    side,
    places,
    query,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    highest, total = state
    spec: tl.constexpr = form.teacher
    key_values = load_key(side, batch, head, key, spec)
    t, unit = logits_tile(query, key_values, side.scale, spec.soft_cap, form)
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, keys, form)
        t = tl.where(allowed, t, -float("inf"))
    higher = tl.maximum(highest, tl.max(t, 1) * unit)
    terms = tl.exp2(t * unit - higher[:, None])
    keep = tl.exp2(highest - higher)
    return higher, total * keep[:, None] + part_sums(terms)


@triton.jit
def normalizer_kernel(
    query,
    key,
    normalizer,
    scale,
    places,
    rows,
    keys,
    form: tl.constexpr,
):
    """Log-sum-exp of each row of the teacher."""
    spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    side = Side(query, key, normalizer, scale)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query_values = load_own(
        query, batch, head, row, rows, ROWS, spec.heads, spec.width, form
    )
    rows, keys = filled(rows), filled(keys)
    state = (
        tl.full([ROWS], LEAST, tl.float32),
        tl.zeros([ROWS, 8], tl.float32),
    )
    visited = tiles_of_keys(places, batch, row, rows, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for other in range(visited[part], visited[part + 1]):
                state = normalizer_step(
                    state,
                    side,
                    places,
                    query_values,
                    batch,
                    head,
                    row,
                    rows,
                    other * KEYS,
                    keys,
                    form,
                    part != 1,
                )
    highest, parts = state
    total = tl.sum(parts, 1)
    # Rows without keys: any number will do.
    of_row = tl.where(total > 0.0, highest + tl.log2(total), 0.0)
    heads: tl.constexpr = spec.heads
    store_rows(normalizer, of_row, batch, head, row, rows, heads, form)


@triton.jit
def forward_step(
    state,
    student,
    teacher,
    mixture,
    places,
    query,
    teacher_query,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Running maxima and sums, after another tile of keys."""
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    spec: tl.constexpr = form.student
    allowed = None
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, keys, form)
    key_values = load_key(student, batch, head, key, spec)
    s, unit = logits_tile(query, key_values, student.scale, spec.soft_cap, form)
    if CHECK:
        s = tl.where(allowed, s, -float("inf"))
    higher_s = tl.maximum(highest_s, tl.max(s, 1) * unit)
    raise_s = higher_s - highest_s
    s = s * unit - higher_s[:, None]
    exp_s = tl.exp2(s)
    if mixture is None:
        teacher_spec: tl.constexpr = form.teacher
        key_values = load_key(teacher, batch, head, key, teacher_spec)
        t, unit = logits_tile(
            teacher_query,
            key_values,
            teacher.scale,
            teacher_spec.soft_cap,
            form,
        )
        if CHECK:
            t = tl.where(allowed, t, -float("inf"))
        higher_t = tl.maximum(highest_t, tl.max(t, 1) * unit)
        raise_t = higher_t - highest_t
        t = t * unit - higher_t[:, None]
        exp_t = tl.exp2(t)
        keep_t = tl.exp2(-raise_t)[:, None]
        sum_t = sum_t * keep_t + part_sums(exp_t)
        # Differences are those of logits below their maxima.
        sum_wtd = (sum_wtd + sum_wt * (raise_s - raise_t)[:, None]) * keep_t
        sum_wt *= keep_t
    else:
        # Normalised already: e^t is p itself.
        higher_t = highest_t
        exp_t = mixed_tile(
            teacher, mixture, batch, head, row, rows, key, allowed, form, CHECK
        )
        t = tl.log2(tl.maximum(exp_t, TINY))
        sum_wtd += sum_wt * raise_s[:, None]
    difference = t - s
    if CHECK:
        difference = tl.where(allowed, difference, 0.0)
    weights = weights_tile(places, batch, row, rows, key, keys, form, CHECK)
    weighted = weights * exp_t
    keep_s = tl.exp2(-raise_s)[:, None]
    return (
        higher_s,
        sum_s * keep_s + part_sums(exp_s),
        sum_ws * keep_s + part_sums(weights * exp_s),
        higher_t,
        sum_t,
        sum_wt + part_sums(weighted),
        sum_wtd + part_sums(weighted * difference),
    )


@triton.jit
def forward_kernel(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    normalizer,
    teacher_normalizer,
    scale,
    teacher_scale,
    mixture,
    places,
    rows,
    keys,
    divergence,  # (batch, student heads, rows)
    center,  # Likewise: sum_j w_ij (q_ij - p_ij).
    form: tl.constexpr,
):
    """Divergences and normalizers."""
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    student = Side(student_query, student_key, normalizer, scale)
    teacher = Side(
        teacher_query, teacher_key, teacher_normalizer, teacher_scale
    )
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query_values = load_own(
        student_query,
        batch,
        head,
        row,
        rows,
        ROWS,
        spec.heads,
        spec.width,
        form,
    )
    least = tl.full([ROWS], LEAST, tl.float32)
    zeros = tl.zeros([ROWS, 8], tl.float32)
    # Of the student the highest logit, sum e^s and sum w e^s; of the teacher
    # the same, and sum w e^t (t - s).
    if mixture is None:
        teacher_values = load_own(
            teacher_query,
            batch,
            head,
            row,
            rows,
            ROWS,
            teacher_spec.heads,
            teacher_spec.width,
            form,
        )
        state = (least, zeros, zeros, least, zeros, zeros, zeros)
    else:
        teacher_values = None
        # Maps are normalised: their highest logit is 0, sum e^t is 1.
        state = (least, zeros, zeros, least * 0, zeros + 0.125, zeros, zeros)
    rows, keys = filled(rows), filled(keys)
    visited = tiles_of_keys(places, batch, row, rows, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for other in range(visited[part], visited[part + 1]):
                state = forward_step(
                    state,
                    student,
                    teacher,
                    mixture,
                    places,
                    query_values,
                    teacher_values,
                    batch,
                    head,
                    row,
                    rows,
                    other * KEYS,
                    keys,
                    form,
                    part != 1,
                )
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s, sum_ws = tl.sum(sum_s, 1), tl.sum(sum_ws, 1)
    sum_t, sum_wt = tl.sum(sum_t, 1), tl.sum(sum_wt, 1)
    sum_s = tl.where(sum_s > 0.0, sum_s, 1.0)
    sum_t = tl.where(sum_t > 0.0, sum_t, 1.0)
    log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
    of_row = (tl.sum(sum_wtd, 1) + sum_wt * (log_s - log_t)) / (sum_t * LOG2_E)
    of_center = sum_ws / sum_s - sum_wt / sum_t
    heads: tl.constexpr = spec.heads
    store_rows(
        normalizer,
        highest_s + log_s,
        batch,
        head,
        row,
        rows,
        heads,
        form,
    )
    if mixture is None:
        of_teacher = highest_t + log_t
        store_rows(
            teacher_normalizer, of_teacher, batch, head, row, rows, heads, form
        )
    store_rows(center, of_center, batch, head, row, rows, heads, form)
    # What rounding takes below 0 is 0.
    of_row = tl.maximum(of_row + of_center, 0.0)
    store_rows(divergence, of_row, batch, head, row, rows, heads, form)


@triton.jit
def slope_tile(
    student,
    teacher,
    mixture,
    places,
    center,
    query,
    key_values,
    teacher_query,
    teacher_key,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Slopes of divergences: in `scale * query @ key`, and in `p`."""
    heads: tl.constexpr = form.student.heads
    cap: tl.constexpr = form.student.soft_cap
    s, unit = logits_tile(query, key_values, student.scale, cap, form)
    normalizer = load_rows(
        student.normalizer, batch, head, row, rows, heads, form, CHECK
    )
    log_q = s * unit - of_rows(normalizer, form)
    q = tl.exp2(log_q)
    if CHECK:
        q = tl.where(allowed, q, 0.0)
    if mixture is None:
        normalizer = load_rows(
            teacher.normalizer, batch, head, row, rows, heads, form, CHECK
        )
        p = map_tile(
            teacher,
            teacher_query,
            teacher_key,
            normalizer,
            allowed,
            form,
            CHECK,
        )
    else:
        p = mixed_tile(
            teacher, mixture, batch, head, row, rows, key, allowed, form, CHECK
        )
    weights = weights_tile(places, batch, row, rows, key, keys, form, CHECK)
    of_center = load_rows(center, batch, head, row, rows, heads, form, CHECK)
    slope = weights * (q - p) - q * of_rows(of_center, form)
    if cap is not None:
        slope *= 1.0 - s * s
    of_p = weights * (tl.log2(tl.maximum(p, TINY)) - log_q)
    if CHECK:
        of_p = tl.where(allowed, of_p, 0.0)
    return slope, of_p


@triton.jit
def query_step(
    state,
    student,
    teacher,
    mixture,
    places,
    center,
    of_row,
    query,
    teacher_query,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradients of queries and mixture, after another tile of keys."""
    of_query, of_mixture = state
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    allowed = None
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, keys, form)
    key_values = load_key(student, batch, head, key, spec)
    teacher_key = None
    if mixture is None:
        teacher_key = load_key(teacher, batch, head, key, teacher_spec)
    slope, of_p = slope_tile(
        student,
        teacher,
        mixture,
        places,
        center,
        query,
        key_values,
        teacher_query,
        teacher_key,
        batch,
        head,
        row,
        rows,
        key,
        keys,
        allowed,
        form,
        CHECK,
    )
    of_query = dot_in_two(slope, key_values, of_query)
    if mixture is not None:
        of_p *= of_row[:, None]
        teacher_head = tl.arange(0, of_mixture.shape[0])
        for other in range(teacher_spec.heads):
            p = head_tile(
                teacher, batch, other, row, rows, key, allowed, form, CHECK
            )
            total = tl.sum(tl.sum(of_p * p, 1), 0)
            of_mixture += tl.where(teacher_head == other, total, 0.0)
    return of_query, of_mixture


@triton.jit
def query_gradient_kernel(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    normalizer,
    teacher_normalizer,
    scale,
    teacher_scale,
    mixture,
    places,
    rows,
    keys,
    center,
    upstream,  # (batch, student heads, rows)
    gradient,  # As the student's query.
    mixture_gradient,  # (batch, student heads, row tiles, teacher heads)
    form: tl.constexpr,
):
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    TEACHER_HEADS: tl.constexpr = teacher_spec.heads
    student = Side(student_query, student_key, normalizer, scale)
    teacher = Side(
        teacher_query, teacher_key, teacher_normalizer, teacher_scale
    )
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query_values = load_own(
        student_query,
        batch,
        head,
        row,
        rows,
        ROWS,
        spec.heads,
        spec.width,
        form,
    )
    teacher_values = None
    if mixture is None:
        teacher_values = load_own(
            teacher_query,
            batch,
            head,
            row,
            rows,
            ROWS,
            teacher_spec.heads,
            teacher_spec.width,
            form,
        )
    rows, keys = filled(rows), filled(keys)
    of_row = load_rows(upstream, batch, head, row, rows, spec.heads, form, True)
    teacher_head = tl.arange(0, triton.next_power_of_2(TEACHER_HEADS))
    state = (
        tl.zeros(query_values.shape, tl.float32),
        tl.zeros(teacher_head.shape, tl.float32),
    )
    visited = tiles_of_keys(places, batch, row, rows, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for other in range(visited[part], visited[part + 1]):
                state = query_step(
                    state,
                    student,
                    teacher,
                    mixture,
                    places,
                    center,
                    of_row,
                    query_values,
                    teacher_values,
                    batch,
                    head,
                    row,
                    rows,
                    other * KEYS,
                    keys,
                    form,
                    part != 1,
                )
    of_query, of_mixture = state
    of_query *= scale / lift(query_values.dtype) * of_row[:, None]
    store_tile(gradient, of_query, batch, head, row)
    if mixture is not None:
        of_head = tl.program_id(1) * tl.num_programs(0) + tile
        tl.store(
            mixture_gradient + of_head * TEACHER_HEADS + teacher_head,
            of_mixture / LOG2_E,
            mask=teacher_head < TEACHER_HEADS,
        )


@triton.jit
def key_step(
    of_key,
    student,
    teacher,
    mixture,
    places,
    center,
    upstream,
    key_values,
    teacher_key,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradient of keys, after another tile of rows."""
    allowed = None
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, keys, form)
    query = load_query(student, batch, head, row)
    teacher_query = None
    if mixture is None:
        teacher_query = load_query(teacher, batch, head, row)
    slope, _ = slope_tile(
        student,
        teacher,
        mixture,
        places,
        center,
        query,
        key_values,
        teacher_query,
        teacher_key,
        batch,
        head,
        row,
        rows,
        key,
        keys,
        allowed,
        form,
        CHECK,
    )
    spec: tl.constexpr = form.student
    of_row = load_rows(
        upstream, batch, head, row, rows, spec.heads, form, CHECK
    )
    slope *= of_rows(of_row, form)
    if not form.tiles.by_key:
        slope = tl.trans(slope)
    return dot_in_two(slope, query, of_key)


@triton.jit
def key_gradient_kernel(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    normalizer,
    teacher_normalizer,
    scale,
    teacher_scale,
    mixture,
    places,
    first_rows,  # See `tiles_of_rows`.
    rows,
    keys,
    center,
    upstream,
    gradient,  # As the student's key.
    form: tl.constexpr,
):
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    student = Side(student_query, student_key, normalizer, scale)
    teacher = Side(
        teacher_query, teacher_key, teacher_normalizer, teacher_scale
    )
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.key_heads
    key_head = tl.program_id(1) % spec.key_heads
    group: tl.constexpr = spec.heads // spec.key_heads
    key = tile * KEYS
    key_values = load_own(
        student_key,
        batch,
        key_head,
        key,
        keys,
        KEYS,
        spec.key_heads,
        spec.width,
        form,
    )
    of_key = tl.zeros(key_values.shape, tl.float32)
    length = keys
    rows, keys = filled(rows), filled(keys)
    visited = tiles_of_rows(places, first_rows, batch, tile, rows, keys, form)
    for head in range(key_head * group, key_head * group + group):
        teacher_values = None
        if mixture is None:
            teacher_values = load_own(
                teacher_key,
                batch,
                head // (teacher_spec.heads // teacher_spec.key_heads),
                key,
                length,
                KEYS,
                teacher_spec.key_heads,
                teacher_spec.width,
                form,
            )
        for part in tl.static_range(3):
            for other in range(visited[part], visited[part + 1]):
                of_key = key_step(
                    of_key,
                    student,
                    teacher,
                    mixture,
                    places,
                    center,
                    upstream,
                    key_values,
                    teacher_values,
                    batch,
                    head,
                    other * ROWS,
                    rows,
                    key,
                    keys,
                    form,
                    part != 1,
                )
    store_tile(
        gradient,
        of_key * (scale / lift(key_values.dtype)),
        batch,
        key_head,
        key,
    )


class Call(NamedTuple):
    """All that has no gradient, but the teacher."""

    places: Places
    student: tiles.Spec
    teacher: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float
    item_size: int  # Bytes of a number, the wider model's.

    def form(self, kernel, own, mixture):
        """How a kernel is compiled, whose programs keep tiles of `own`."""
        batch, length, heads, _ = own.shape
        return Form(
            self.student,
            self.teacher,
            self.window,
            self.exponent,
            tiles.choose_tiles(
                kernel,
                max(self.student.width, self.teacher.width),
                batch * length * heads,
                self.item_size,
                mixture is not None,
            ),
            over_rows=kernel == "key",
        )


class Divergence(torch.autograd.Function):
    """The kernels, with a gradient for student and mixture."""

    @staticmethod
    def forward(
        ctx,
        student_query,
        student_key,
        mixture,
        teacher_query,
        teacher_key,
        call,
    ):
        form = call.form("forward", student_query, mixture)
        sides = (student_query, student_key, teacher_query, teacher_key)
        batch, rows = student_query.shape[:2]
        keys = student_key.shape[1]
        count = triton.cdiv(rows, form.tiles.rows)
        normalizer, divergence, center = (
            of_each_row(student_query) for _ in range(3)
        )
        teacher_normalizer = of_each_row(teacher_query)
        if mixture is not None:
            launch(
                normalizer_kernel,
                form,
                (count, batch * form.teacher.heads),
                *descriptors(form, None, sides)[2:],
                teacher_normalizer,
                call.teacher_scale,
                call.places,
                rows,
                keys,
            )
        launch(
            forward_kernel,
            form,
            (count, batch * form.student.heads),
            *descriptors(form, mixture, sides),
            normalizer,
            teacher_normalizer,
            call.scale,
            call.teacher_scale,
            mixture,
            call.places,
            rows,
            keys,
            divergence,
            center,
        )
        normalizers = normalizer, teacher_normalizer
        ctx.save_for_backward(*sides, *normalizers, mixture, center)
        ctx.call = call
        return divergence[..., :rows]

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        *sides, normalizer, teacher_normalizer, mixture, center = (
            ctx.saved_tensors
        )
        batch, rows = sides[0].shape[:2]
        keys = sides[1].shape[1]
        upstream = fill(upstream)
        models = (
            normalizer,
            teacher_normalizer,
            call.scale,
            call.teacher_scale,
            mixture,
            call.places,
        )
        form = call.form("query", sides[0], mixture)
        count = triton.cdiv(rows, form.tiles.rows)
        of_query = torch.empty_like(sides[0])
        of_mixture = None
        if mixture is not None:
            of_mixture = mixture.new_empty(
                (*center.shape[:2], count, mixture.shape[1])
            )
        launch(
            query_gradient_kernel,
            form,
            (count, batch * form.student.heads),
            *descriptors(form, mixture, sides),
            *models,
            rows,
            keys,
            center,
            upstream,
            descriptor(of_query, form.tiles.rows),
            of_mixture,
        )
        form = call.form("key", sides[1], mixture)
        of_key = torch.empty_like(sides[1])
        launch(
            key_gradient_kernel,
            form,
            (
                triton.cdiv(keys, form.tiles.keys),
                batch * form.student.key_heads,
            ),
            *descriptors(form, mixture, sides),
            *models,
            first_rows(call.places, form, keys),
            rows,
            keys,
            center,
            upstream,
            descriptor(of_key, form.tiles.keys),
        )
        if mixture is not None:
            of_mixture = of_mixture.sum((0, 2))
        return of_query, of_key, of_mixture, None, None, None


def first_rows(places, form, keys):
    """The rows that `tiles_of_rows` wants."""
    index, size = places.row_index, form.tiles.keys
    edges = torch.arange(
        0, keys + size, size, dtype=index.dtype, device=index.device
    )
    if form.window is not None:
        edges = torch.stack(
            [edges, edges - form.window + 1, edges + form.window]
        )
    return torch.searchsorted(index, edges, out_int32=True)


def of_each_row(query):
    batch, rows, heads, _ = query.shape
    return query.new_empty(
        (batch, heads, rows + missing(rows)), dtype=torch.float32
    )


def missing(length):
    """What a length lacks to be filled."""
    return -length % FILLED.value


def fill(numbers):
    """Numbers of each row, and 0 for those that fill up."""
    extra = missing(numbers.shape[-1])
    if extra:
        numbers = torch.nn.functional.pad(numbers, (0, extra))
    return numbers.contiguous()


def descriptors(form, mixture, sides):
    """Queries and keys as a kernel reads them."""
    student_query, student_key, teacher_query, teacher_key = sides
    rows, keys = form.tiles.rows, form.tiles.keys

    def read(tensor, size, is_own):
        by_pointers = is_own and not form.tiles.in_registers
        return tensor if by_pointers else descriptor(tensor, size)

    paired = mixture is None  # Else heads are read one after another.
    return (
        read(student_query, rows, not form.over_rows),
        read(student_key, keys, form.over_rows),
        read(teacher_query, rows, paired and not form.over_rows),
        read(teacher_key, keys, paired and form.over_rows),
    )


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
    """The same for every head: one kernel instead of many small operations."""
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
    # Examples may share what has a batch of 1.
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
    """The tensor with rows as descriptors want them."""
    extra = -tensor.shape[-1] % (BYTES // tensor.element_size())
    if extra:
        tensor = torch.nn.functional.pad(tensor, (0, extra))
    return tensor.contiguous()


def attention_divergence(student, teacher, mask, distance, mixture):
    places = find_places(mask, distance, student.query.shape[0])
    student, teacher = (
        side._replace(query=readable(side.query), key=readable(side.key))
        for side in (student, teacher)
    )
    call = Call(
        places,
        tiles.Spec.of(student),
        tiles.Spec.of(teacher),
        float(student.scale),
        float(teacher.scale),
        mask.window,
        float(distance.exponent),
        max(side.query.element_size() for side in (student, teacher)),
    )
    return Divergence.apply(*student[:2], mixture, *teacher[:2], call)
