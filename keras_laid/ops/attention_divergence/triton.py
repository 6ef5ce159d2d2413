"""The divergence in fused kernels for torch on CUDA.

Maps exist only as tiles on the chip; README.md derives the sums. Tensors are
laid out (batch, length, heads, width). Logarithms are of base 2, whose power
the chip computes. In names, `row` and `key` are where a tile starts.
"""

from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_laid.ops.attention_divergence import tiles

# In a tile: minus infinity, whose differences would be NaN; the least that a
# running maximum is, so that `exp2(MASKED - LEAST)` is 0; and what counts as
# probability 0 in `p * log(p)`, as in definition.py.
MASKED = tl.constexpr(-2e30)
LEAST = tl.constexpr(-1e30)
TINY = tl.constexpr(1e-30)
LOG2_E = tl.constexpr(1.4426950408889634)
# Slopes are computed this many times too large (in base 2): else those of a
# long row would be too small for float16.
LIFT = tl.constexpr(10.0)
UNLIFT = tl.constexpr(2.0**-10)


class Side(NamedTuple):
    """One model's attention, in a kernel."""

    query: Any
    key: Any
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).
    scale: Any
    rows: Any
    keys: Any


class Form(NamedTuple):
    """What a kernel is compiled for."""

    student: tiles.Spec
    teacher: tiles.Spec
    window: int | None
    exponent: float
    rows: int  # Of a tile.
    keys: int
    by_key: bool  # Tiles are (keys, rows), not (rows, keys).


@triton.jit
def where_tile(
    tensor,
    batch,
    head,
    start,
    length,
    SIZE: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
):
    """Where a tile of one head's matrix is, and what of it is inside."""
    index = tl.arange(0, SIZE)
    column = tl.arange(0, triton.next_power_of_2(width))
    first = (batch.to(tl.int64) * length + start) * heads + head
    offset = index[:, None] * (heads * width) + column[None]
    inside = (start + index < length)[:, None] & (column < width)[None]
    return tensor + first * width + offset, inside


@triton.jit
def load_tile(
    tensor,
    batch,
    head,
    start,
    length,
    SIZE: tl.constexpr,
    heads: tl.constexpr,
    width: tl.constexpr,
    CHECK: tl.constexpr,
):
    where, inside = where_tile(
        tensor, batch, head, start, length, SIZE, heads, width
    )
    if CHECK or width != triton.next_power_of_2(width):
        return tl.load(where, mask=inside, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def load_query(
    side,
    batch,
    head,
    row,
    SIZE: tl.constexpr,
    spec: tl.constexpr,
    CHECK: tl.constexpr,
):
    return load_tile(
        side.query,
        batch,
        head,
        row,
        side.rows,
        SIZE,
        spec.heads,
        spec.width,
        CHECK,
    )


@triton.jit
def load_key(
    side,
    batch,
    head,
    key,
    SIZE: tl.constexpr,
    spec: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The keys that query head `head` reads."""
    return load_tile(
        side.key,
        batch,
        head // (spec.heads // spec.key_heads),
        key,
        side.keys,
        SIZE,
        spec.key_heads,
        spec.width,
        CHECK,
    )


@triton.jit
def places_of_rows(
    batch, head, row, rows, SIZE: tl.constexpr, heads: tl.constexpr
):
    """Where a tile's rows are in a (batch, heads, rows), and which are."""
    row += tl.arange(0, SIZE)
    return (batch.to(tl.int64) * heads + head) * rows + row, row < rows


@triton.jit
def load_rows(
    tensor, batch, head, row, rows, SIZE: tl.constexpr, heads: tl.constexpr
):
    at, inside = places_of_rows(batch, head, row, rows, SIZE, heads)
    return tl.load(tensor + at, mask=inside, other=0.0)


@triton.jit
def of_rows(values, form: tl.constexpr):
    """Numbers of rows, as a tile has them."""
    return values[None] if form.by_key else values[:, None]


@triton.jit
def of_keys(values, form: tl.constexpr):
    return values[:, None] if form.by_key else values[None]


@triton.jit
def logits_tile(query, keys, scale, cap: tl.constexpr, form: tl.constexpr):
    """Logits, in base 2."""
    if form.by_key:
        logits = tl.dot(keys, tl.trans(query), input_precision="ieee")
    else:
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if cap is None:
        return logits * (scale * LOG2_E)
    else:
        # soft_cap * tanh(logits / soft_cap)
        half = tl.sigmoid(logits * (2.0 * scale / cap)) - 0.5
        return half * (2.0 * cap * LOG2_E)


@triton.jit
def dot_in_two(a, b, total):
    """`total + a @ b` for float32 `a`, rounded to `b`'s dtype in two parts.

    In one part, sums that cancel would lose more than the definition's.
    """
    high = a.to(b.dtype)
    total = tl.dot(high, b, total, input_precision="ieee")
    if b.dtype != tl.float32:
        low = (a - high.to(tl.float32)).to(b.dtype)
        total = tl.dot(low, b, total)
    return total


@triton.jit
def allowed_tile(places, batch, row, rows, key, keys, form: tl.constexpr):
    row += tl.arange(0, form.rows)
    key += tl.arange(0, form.keys)
    kind = tl.load(places.kinds + batch * keys + key, mask=key < keys, other=0)
    index = tl.load(places.row_index + row, mask=row < rows, other=-1)
    kind = of_keys(kind, form)
    ahead = of_rows(index, form) - of_keys(key, form)
    allowed = (kind == 1) | ((kind == 2) & (ahead >= 0))
    if form.window is not None:
        allowed = allowed & (tl.abs(ahead) < form.window)
    return allowed


@triton.jit
def weights_tile(places, batch, row, rows, key, keys, form: tl.constexpr):
    row += tl.arange(0, form.rows)
    row_share = places.row_share + batch * rows + row
    row_share = tl.load(row_share, mask=row < rows, other=0.0)
    key += tl.arange(0, form.keys)
    key_share = places.key_share + batch * keys + key
    key_share = tl.load(key_share, mask=key < keys, other=0.0)
    share = tl.abs(of_rows(row_share, form) - of_keys(key_share, form))
    if form.exponent != 1.0:
        share = tl.exp2(form.exponent * tl.log2(share))
    return 1.0 + share


@triton.jit
def map_tile(
    teacher,
    query,
    keys,
    batch,
    head,
    row,
    allowed,
    lift,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The attention map of one head of the teacher, times `2 ** lift`."""
    spec: tl.constexpr = form.teacher
    logits = logits_tile(query, keys, teacher.scale, spec.soft_cap, form)
    if CHECK:
        logits = tl.where(allowed, logits, MASKED)
    normalizer = load_rows(
        teacher.normalizer,
        batch,
        head,
        row,
        teacher.rows,
        form.rows,
        spec.heads,
    )
    return tl.exp2(logits - of_rows(normalizer - lift, form))


@triton.jit
def head_tile(
    teacher,
    batch,
    head,
    row,
    key,
    allowed,
    lift,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The same, of a head whose queries and keys are not at hand."""
    spec: tl.constexpr = form.teacher
    query = load_query(teacher, batch, head, row, form.rows, spec, True)
    keys = load_key(teacher, batch, head, key, form.keys, spec, CHECK)
    return map_tile(
        teacher, query, keys, batch, head, row, allowed, lift, form, CHECK
    )


@triton.jit
def mixed_tile(
    teacher,
    mixture,
    batch,
    head,
    row,
    key,
    allowed,
    lift,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The mixture of the teacher's maps that student head `head` learns."""
    spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.rows
    KEYS: tl.constexpr = form.keys
    if form.by_key:
        p = tl.zeros([KEYS, ROWS], tl.float32)
    else:
        p = tl.zeros([ROWS, KEYS], tl.float32)
    for other in range(spec.heads):
        share = tl.load(mixture + head * spec.heads + other)
        p += share * head_tile(
            teacher, batch, other, row, key, allowed, lift, form, CHECK
        )
    return p


@triton.jit
def normalizer_step(
    state,
    side,
    places,
    query,
    batch,
    head,
    row,
    key,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    highest, total = state
    spec: tl.constexpr = form.teacher
    keys = load_key(side, batch, head, key, form.keys, spec, CHECK)
    logits = logits_tile(query, keys, side.scale, spec.soft_cap, form)
    if CHECK:
        allowed = allowed_tile(
            places, batch, row, side.rows, key, side.keys, form
        )
        logits = tl.where(allowed, logits, MASKED)
    higher = tl.maximum(highest, tl.max(logits, 1))
    terms = tl.exp2(logits - higher[:, None])
    return higher, total * tl.exp2(highest - higher) + tl.sum(terms, 1)


@triton.jit
def normalizer_kernel(side, places, bounds, form: tl.constexpr):
    """Log-sum-exp of each row of the teacher."""
    spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.rows
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query = load_query(side, batch, head, row, ROWS, spec, True)
    state = (
        tl.full([ROWS], LEAST, tl.float32),
        tl.zeros([ROWS], tl.float32),
    )
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.keys
            ):
                state = normalizer_step(
                    state,
                    side,
                    places,
                    query,
                    batch,
                    head,
                    row,
                    key,
                    form,
                    part != 1,
                )
    highest, total = state
    # Rows without keys: any number will do.
    normalizer = tl.where(total > 0.0, highest + tl.log2(total), 0.0)
    at, inside = places_of_rows(
        batch, head, row, side.rows, ROWS, spec.heads
    )
    tl.store(side.normalizer + at, normalizer, mask=inside)


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
    key,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Running maxima and sums, after another tile of keys."""
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    spec: tl.constexpr = form.student
    rows, key_count = student.rows, student.keys
    allowed = None
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, key_count, form)
    weights = weights_tile(places, batch, row, rows, key, key_count, form)
    keys = load_key(student, batch, head, key, form.keys, spec, CHECK)
    s = logits_tile(query, keys, student.scale, spec.soft_cap, form)
    if CHECK:
        s = tl.where(allowed, s, MASKED)
    higher_s = tl.maximum(highest_s, tl.max(s, 1))
    exp_s = tl.exp2(s - higher_s[:, None])
    keep_s = tl.exp2(highest_s - higher_s)
    if mixture is None:
        teacher_spec: tl.constexpr = form.teacher
        teacher_keys = load_key(
            teacher, batch, head, key, form.keys, teacher_spec, CHECK
        )
        t = logits_tile(
            teacher_query,
            teacher_keys,
            teacher.scale,
            teacher_spec.soft_cap,
            form,
        )
        if CHECK:
            t = tl.where(allowed, t, MASKED)
        higher_t = tl.maximum(highest_t, tl.max(t, 1))
        exp_t = tl.exp2(t - higher_t[:, None])
        keep_t = tl.exp2(highest_t - higher_t)
        highest_t = higher_t
        sum_t = sum_t * keep_t + tl.sum(exp_t, 1)
        sum_wt *= keep_t
        sum_wtd *= keep_t
    else:
        # Normalised already: e^t is p itself.
        exp_t = mixed_tile(
            teacher, mixture, batch, head, row, key, allowed, 0.0, form, CHECK
        )
        t = tl.log2(tl.maximum(exp_t, TINY))
    weighted = weights * exp_t
    return (
        higher_s,
        sum_s * keep_s + tl.sum(exp_s, 1),
        sum_ws * keep_s + tl.sum(weights * exp_s, 1),
        highest_t,
        sum_t,
        sum_wt + tl.sum(weighted, 1),
        sum_wtd + tl.sum(weighted * (t - s), 1),
    )


@triton.jit
def forward_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,  # (batch, row tiles, 4), as from `tiles.row_bounds`.
    divergence,  # (batch, student heads, rows)
    center,  # Likewise: sum_j w_ij (q_ij - p_ij).
    form: tl.constexpr,
):
    """Divergences and normalizers."""
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.rows
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query = load_query(student, batch, head, row, ROWS, spec, True)
    teacher_query = None
    if mixture is None:
        teacher_query = load_query(
            teacher, batch, head, row, ROWS, teacher_spec, True
        )
    least = tl.full([ROWS], LEAST, tl.float32)
    zeros = tl.zeros([ROWS], tl.float32)
    # Of the student the highest logit, sum e^s and sum w e^s; of the teacher
    # the same, and sum w e^t (t - s).
    state = (least, zeros, zeros, least, zeros, zeros, zeros)
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.keys
            ):
                state = forward_step(
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
                    key,
                    form,
                    part != 1,
                )
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s = tl.where(sum_s > 0.0, sum_s, 1.0)
    normalizer = highest_s + tl.log2(sum_s)
    offset = normalizer
    at, inside = places_of_rows(
        batch, head, row, student.rows, ROWS, spec.heads
    )
    if mixture is None:
        sum_t = tl.where(sum_t > 0.0, sum_t, 1.0)
        sum_wt /= sum_t
        sum_wtd /= sum_t
        teacher_normalizer = highest_t + tl.log2(sum_t)
        offset -= teacher_normalizer
        tl.store(teacher.normalizer + at, teacher_normalizer, mask=inside)
    of_row = (sum_wtd + offset * sum_wt) / LOG2_E
    of_center = sum_ws / sum_s - sum_wt
    tl.store(student.normalizer + at, normalizer, mask=inside)
    tl.store(center + at, of_center, mask=inside)
    # What rounding takes below 0 is 0.
    tl.store(divergence + at, tl.maximum(of_row + of_center, 0.0), mask=inside)


@triton.jit
def slope_tile(
    student,
    teacher,
    mixture,
    places,
    batch,
    head,
    row,
    key,
    query,
    keys,
    teacher_query,
    teacher_keys,
    center,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Slopes of divergences, lifted: in `scale * query @ key`; and in `p`."""
    rows, key_count = student.rows, student.keys
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    weights = weights_tile(places, batch, row, rows, key, key_count, form)
    s = logits_tile(query, keys, student.scale, spec.soft_cap, form)
    normalizer = load_rows(
        student.normalizer, batch, head, row, rows, form.rows, spec.heads
    )
    log_q = s - of_rows(normalizer - LIFT, form)
    if CHECK:
        log_q = tl.where(allowed, log_q, MASKED)
    q = tl.exp2(log_q)
    if mixture is None:
        p = map_tile(
            teacher,
            teacher_query,
            teacher_keys,
            batch,
            head,
            row,
            allowed,
            LIFT,
            form,
            CHECK,
        )
    else:
        p = mixed_tile(
            teacher, mixture, batch, head, row, key, allowed, LIFT, form, CHECK
        )
    of_center = load_rows(
        center, batch, head, row, rows, form.rows, spec.heads
    )
    slope = weights * (q - p) - q * of_rows(of_center, form)
    if spec.soft_cap is not None:
        share = s / (spec.soft_cap * LOG2_E)
        slope *= 1.0 - share * share
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
    query,
    teacher_query,
    batch,
    head,
    row,
    key,
    of_row,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradients of queries and mixture, after another tile of keys."""
    of_query, of_mixture = state
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    keys = load_key(student, batch, head, key, form.keys, spec, CHECK)
    teacher_keys = None
    if mixture is None:
        teacher_keys = load_key(
            teacher, batch, head, key, form.keys, teacher_spec, CHECK
        )
    allowed = None
    if CHECK:
        allowed = allowed_tile(
            places, batch, row, student.rows, key, student.keys, form
        )
    slope, of_p = slope_tile(
        student,
        teacher,
        mixture,
        places,
        batch,
        head,
        row,
        key,
        query,
        keys,
        teacher_query,
        teacher_keys,
        center,
        allowed,
        form,
        CHECK,
    )
    of_query = dot_in_two(slope, keys, of_query)
    if mixture is not None:
        of_p *= of_row[:, None]
        teacher_head = tl.arange(0, of_mixture.shape[0])
        for other in range(teacher_spec.heads):
            p = head_tile(
                teacher, batch, other, row, key, allowed, 0.0, form, CHECK
            )
            total = tl.sum(tl.sum(of_p * p, 1), 0)
            of_mixture += tl.where(teacher_head == other, total, 0.0)
    return of_query, of_mixture


@triton.jit
def query_gradient_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,
    center,
    upstream,  # (batch, student heads, rows)
    gradient,  # As the student's query.
    mixture_gradient,  # (batch, student heads, row tiles, teacher heads)
    form: tl.constexpr,
):
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    ROWS: tl.constexpr = form.rows
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query = load_query(student, batch, head, row, ROWS, spec, True)
    teacher_query = None
    if mixture is None:
        teacher_query = load_query(
            teacher, batch, head, row, ROWS, teacher_spec, True
        )
    of_row = load_rows(
        upstream, batch, head, row, student.rows, ROWS, spec.heads
    )
    TEACHER_HEADS: tl.constexpr = triton.next_power_of_2(teacher_spec.heads)
    state = (
        tl.zeros(query.shape, tl.float32),
        tl.zeros([TEACHER_HEADS], tl.float32),
    )
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.keys
            ):
                state = query_step(
                    state,
                    student,
                    teacher,
                    mixture,
                    places,
                    center,
                    query,
                    teacher_query,
                    batch,
                    head,
                    row,
                    key,
                    of_row,
                    form,
                    part != 1,
                )
    of_query, of_mixture = state
    of_query *= (student.scale * UNLIFT) * of_row[:, None]
    where, inside = where_tile(
        gradient,
        batch,
        head,
        row,
        student.rows,
        ROWS,
        spec.heads,
        spec.width,
    )
    tl.store(where, of_query.to(gradient.dtype.element_ty), mask=inside)
    if mixture is not None:
        of_head = tl.program_id(1) * tl.num_programs(0) + tile
        teacher_head = tl.arange(0, TEACHER_HEADS)
        tl.store(
            mixture_gradient + of_head * teacher_spec.heads + teacher_head,
            of_mixture / LOG2_E,
            mask=teacher_head < teacher_spec.heads,
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
    keys,
    teacher_keys,
    batch,
    head,
    row,
    key,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradient of keys, after another tile of rows."""
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    query = load_query(student, batch, head, row, form.rows, spec, CHECK)
    teacher_query = None
    if mixture is None:
        teacher_query = load_query(
            teacher, batch, head, row, form.rows, teacher_spec, CHECK
        )
    allowed = None
    if CHECK:
        allowed = allowed_tile(
            places, batch, row, student.rows, key, student.keys, form
        )
    slope, _ = slope_tile(
        student,
        teacher,
        mixture,
        places,
        batch,
        head,
        row,
        key,
        query,
        keys,
        teacher_query,
        teacher_keys,
        center,
        allowed,
        form,
        CHECK,
    )
    of_row = load_rows(
        upstream, batch, head, row, student.rows, form.rows, spec.heads
    )
    slope *= of_rows(of_row, form)
    if not form.by_key:
        slope = tl.trans(slope)
    return dot_in_two(slope, query, of_key)


@triton.jit
def key_gradient_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,  # (batch, key tiles, 4), as from `tiles.key_bounds`.
    center,
    upstream,
    gradient,  # As the student's key.
    form: tl.constexpr,
):
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    KEYS: tl.constexpr = form.keys
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.key_heads
    key_head = tl.program_id(1) % spec.key_heads
    group: tl.constexpr = spec.heads // spec.key_heads
    key = tile * KEYS
    keys = load_key(student, batch, key_head * group, key, KEYS, spec, True)
    of_key = tl.zeros(keys.shape, tl.float32)
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for head in range(key_head * group, key_head * group + group):
        teacher_keys = None
        if mixture is None:
            teacher_keys = load_key(
                teacher, batch, head, key, KEYS, teacher_spec, True
            )
        for part in tl.static_range(3):
            for row in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.rows
            ):
                of_key = key_step(
                    of_key,
                    student,
                    teacher,
                    mixture,
                    places,
                    center,
                    upstream,
                    keys,
                    teacher_keys,
                    batch,
                    head,
                    row,
                    key,
                    form,
                    part != 1,
                )
    of_key *= student.scale * UNLIFT
    where, inside = where_tile(
        gradient,
        batch,
        key_head,
        key,
        student.keys,
        KEYS,
        spec.key_heads,
        spec.width,
    )
    tl.store(where, of_key.to(gradient.dtype.element_ty), mask=inside)


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
        student, teacher = (
            Side(
                query,
                key,
                query.new_empty(
                    (query.shape[0], query.shape[2], query.shape[1]),
                    dtype=torch.float32,
                ),
                scale,
                query.shape[1],
                key.shape[1],
            )
            for query, key, scale in (
                (student_query, student_key, call.scale),
                (teacher_query, teacher_key, call.teacher_scale),
            )
        )
        places, heads = call.places, call.spec.heads
        chosen = call.tiles("forward")
        bounds = tiles.row_bounds(places, chosen, call.window)
        if mixture is not None:
            arguments = (teacher, places, bounds)
            heads = call.teacher_spec.heads
            launch(normalizer_kernel, call, chosen, heads, bounds, arguments)
        divergence = torch.empty_like(student.normalizer)
        center = torch.empty_like(student.normalizer)
        launch(
            forward_kernel,
            call,
            chosen,
            call.spec.heads,
            bounds,
            (student, teacher, mixture, places, bounds, divergence, center),
        )
        ctx.save_for_backward(*student[:3], *teacher[:3], mixture, center)
        ctx.call = call
        return divergence

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        *tensors, mixture, center = ctx.saved_tensors
        lengths = tensors[0].shape[1], tensors[1].shape[1]
        student = Side(*tensors[:3], call.scale, *lengths)
        teacher = Side(*tensors[3:], call.teacher_scale, *lengths)
        upstream = upstream.contiguous()
        models = (student, teacher, mixture, call.places)
        chosen = call.tiles("query")
        bounds = tiles.row_bounds(call.places, chosen, call.window)
        of_query = torch.empty_like(student.query)
        of_mixture = None
        if mixture is not None:
            of_mixture = mixture.new_empty(
                (*center.shape[:2], bounds.shape[1], mixture.shape[1])
            )
        launch(
            query_gradient_kernel,
            call,
            chosen,
            call.spec.heads,
            bounds,
            (*models, bounds, center, upstream, of_query, of_mixture),
        )
        chosen = call.tiles("key")
        bounds = tiles.key_bounds(call.places, chosen, call.window)
        of_key = torch.empty_like(student.key)
        launch(
            key_gradient_kernel,
            call,
            chosen,
            call.spec.key_heads,
            bounds,
            (*models, bounds, center, upstream, of_key),
            by_key=True,
        )
        if mixture is not None:
            of_mixture = of_mixture.sum((0, 2))
        return of_query, of_key, of_mixture, None, None, None


class Call(NamedTuple):
    """All that has no gradient, but the teacher."""

    places: tiles.Places
    spec: tiles.Spec
    teacher_spec: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float

    def tiles(self, kernel):
        width = max(self.spec.width, self.teacher_spec.width)
        return tiles.choose_tiles(kernel, width)


def launch(kernel, call, chosen, heads, bounds, arguments, by_key=False):
    batch, count = bounds.shape[:2]
    form = Form(
        call.spec,
        call.teacher_spec,
        call.window,
        call.exponent,
        chosen.rows,
        chosen.keys,
        by_key,
    )
    kernel[(count, batch * heads)](
        *arguments,
        form=form,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def attention_divergence(student, teacher, mask, distance, mixture):
    places = tiles.Places.of(mask, distance, student.query.shape[0])
    call = Call(
        tiles.Places(*(tensor.contiguous() for tensor in places)),
        tiles.Spec.of(student),
        tiles.Spec.of(teacher),
        float(student.scale),
        float(teacher.scale),
        mask.window,
        float(distance.exponent),
    )
    return Divergence.apply(
        student.query.contiguous(),
        student.key.contiguous(),
        mixture,
        teacher.query.contiguous(),
        teacher.key.contiguous(),
        call,
    )
