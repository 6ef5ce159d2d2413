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
    side, batch, head, row, SIZE: tl.constexpr, spec: tl.constexpr, CHECK
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
    side, batch, head, key, SIZE: tl.constexpr, spec: tl.constexpr, CHECK
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
def where_rows(
    tensor, batch, head, row, rows, SIZE: tl.constexpr, heads: tl.constexpr
):
    """Where a tile's rows have their numbers in a (batch, heads, rows)."""
    row += tl.arange(0, SIZE)
    first = (batch.to(tl.int64) * heads + head) * rows
    return tensor + first + row, row < rows


@triton.jit
def load_rows(
    tensor, batch, head, row, rows, SIZE: tl.constexpr, heads: tl.constexpr
):
    where, inside = where_rows(tensor, batch, head, row, rows, SIZE, heads)
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def store_rows(
    tensor,
    values,
    batch,
    head,
    row,
    rows,
    SIZE: tl.constexpr,
    heads: tl.constexpr,
):
    where, inside = where_rows(tensor, batch, head, row, rows, SIZE, heads)
    tl.store(where, values, mask=inside)


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
    if form.by_key:
        p = tl.zeros([form.keys, form.rows], tl.float32)
    else:
        p = tl.zeros([form.rows, form.keys], tl.float32)
    for other in range(form.teacher.heads):
        share = tl.load(mixture + head * form.teacher.heads + other)
        p += share * head_tile(
            teacher, batch, other, row, key, allowed, lift, form, CHECK
        )
    return p


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
    """The attention map of one head of the teacher, times `2 ** lift`."""
    spec: tl.constexpr = form.teacher
    logits = logits_tile(
        load_query(teacher, batch, head, row, form.rows, spec, True),
        load_key(teacher, batch, head, key, form.keys, spec, True),
        teacher.scale,
        spec.soft_cap,
        form,
    )
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
def normalizer_kernel(side, places, bounds, form: tl.constexpr):
    """Log-sum-exp of each row of the teacher."""
    spec: tl.constexpr = form.teacher
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * form.rows
    query = load_query(side, batch, head, row, form.rows, spec, True)
    highest = tl.full([form.rows], LEAST, tl.float32)
    total = tl.zeros([form.rows], tl.float32)
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        CHECK: tl.constexpr = part != 1
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.keys
            ):
                keys = load_key(
                    side, batch, head, key, form.keys, spec, CHECK
                )
                logits = logits_tile(
                    query, keys, side.scale, spec.soft_cap, form
                )
                if CHECK:
                    allowed = allowed_tile(
                        places, batch, row, side.rows, key, side.keys, form
                    )
                    logits = tl.where(allowed, logits, MASKED)
                higher = tl.maximum(highest, tl.max(logits, 1))
                terms = tl.exp2(logits - higher[:, None])
                total = total * tl.exp2(highest - higher) + tl.sum(terms, 1)
                highest = higher
    # Rows without keys: any number will do.
    total = tl.where(total > 0.0, highest + tl.log2(total), 0.0)
    store_rows(
        side.normalizer,
        total,
        batch,
        head,
        row,
        side.rows,
        form.rows,
        spec.heads,
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
    """Divergences and normalizers, from running maxima and sums."""
    spec: tl.constexpr = form.student
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    rows, key_count = student.rows, student.keys
    row = tile * form.rows
    query = load_query(student, batch, head, row, form.rows, spec, True)
    if mixture is None:
        teacher_query = load_query(
            teacher, batch, head, row, form.rows, form.teacher, True
        )
    highest_s = tl.full([form.rows], LEAST, tl.float32)
    highest_t = tl.full([form.rows], LEAST, tl.float32)
    sum_s = tl.zeros([form.rows], tl.float32)  # e^s
    sum_t = tl.zeros([form.rows], tl.float32)  # e^t
    sum_ws = tl.zeros([form.rows], tl.float32)  # w e^s
    sum_wt = tl.zeros([form.rows], tl.float32)  # w e^t
    sum_wtd = tl.zeros([form.rows], tl.float32)  # w e^t (t - s)
    bounds += 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        CHECK: tl.constexpr = part != 1
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(bounds + part), tl.load(bounds + part + 1), form.keys
            ):
                allowed = None
                if CHECK:
                    allowed = allowed_tile(
                        places, batch, row, rows, key, key_count, form
                    )
                weights = weights_tile(
                    places, batch, row, rows, key, key_count, form
                )
                keys = load_key(
                    student, batch, head, key, form.keys, spec, CHECK
                )
                s = logits_tile(
                    query, keys, student.scale, spec.soft_cap, form
                )
                if CHECK:
                    s = tl.where(allowed, s, MASKED)
                higher_s = tl.maximum(highest_s, tl.max(s, 1))
                exp_s = tl.exp2(s - higher_s[:, None])
                keep_s = tl.exp2(highest_s - higher_s)
                highest_s = higher_s
                if mixture is None:
                    teacher_keys = load_key(
                        teacher,
                        batch,
                        head,
                        key,
                        form.keys,
                        form.teacher,
                        CHECK,
                    )
                    t = logits_tile(
                        teacher_query,
                        teacher_keys,
                        teacher.scale,
                        form.teacher.soft_cap,
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
                        teacher,
                        mixture,
                        batch,
                        head,
                        row,
                        key,
                        allowed,
                        0.0,
                        form,
                        CHECK,
                    )
                    t = tl.log2(tl.maximum(exp_t, TINY))
                sum_s = sum_s * keep_s + tl.sum(exp_s, 1)
                sum_ws = sum_ws * keep_s + tl.sum(weights * exp_s, 1)
                weighted = weights * exp_t
                sum_wt += tl.sum(weighted, 1)
                sum_wtd += tl.sum(weighted * (t - s), 1)
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s = tl.where(sum_s > 0.0, sum_s, 1.0)
    normalizer_s = highest_s + tl.log2(sum_s)
    normalizer_t = tl.zeros([form.rows], tl.float32)
    if mixture is None:
        sum_t = tl.where(sum_t > 0.0, sum_t, 1.0)
        normalizer_t = highest_t + tl.log2(sum_t)
        sum_wt /= sum_t
        sum_wtd /= sum_t
        store_rows(
            teacher.normalizer,
            normalizer_t,
            batch,
            head,
            row,
            rows,
            form.rows,
            spec.heads,
        )
    of_row = (sum_wtd + (normalizer_s - normalizer_t) * sum_wt) / LOG2_E
    of_center = sum_ws / sum_s - sum_wt
    store_rows(
        student.normalizer,
        normalizer_s,
        batch,
        head,
        row,
        rows,
        form.rows,
        spec.heads,
    )
    store_rows(
        center, of_center, batch, head, row, rows, form.rows, spec.heads
    )
    store_rows(
        divergence,
        # What rounding takes below 0 is 0.
        tl.maximum(of_row + of_center, 0.0),
        batch,
        head,
        row,
        rows,
        form.rows,
        spec.heads,
    )


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
    normalizer,
    teacher_normalizer,
    center,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Slope of divergences in `scale * query @ key`, lifted; and in `p`."""
    rows, key_count = student.rows, student.keys
    allowed = None
    if CHECK:
        allowed = allowed_tile(places, batch, row, rows, key, key_count, form)
    weights = weights_tile(places, batch, row, rows, key, key_count, form)
    cap: tl.constexpr = form.student.soft_cap
    s = logits_tile(query, keys, student.scale, cap, form)
    log_q = s - of_rows(normalizer - LIFT, form)
    if CHECK:
        log_q = tl.where(allowed, log_q, MASKED)
    q = tl.exp2(log_q)
    if mixture is None:
        t = logits_tile(
            teacher_query,
            teacher_keys,
            teacher.scale,
            form.teacher.soft_cap,
            form,
        )
        if CHECK:
            t = tl.where(allowed, t, MASKED)
        p = tl.exp2(t - of_rows(teacher_normalizer - LIFT, form))
    else:
        p = mixed_tile(
            teacher,
            mixture,
            batch,
            head,
            row,
            key,
            allowed,
            LIFT,
            form,
            CHECK,
        )
    slope = weights * (q - p) - q * of_rows(center, form)
    if cap is not None:
        share = s / (cap * LOG2_E)
        slope *= 1.0 - share * share
    of_p = weights * (tl.log2(tl.maximum(p, TINY)) - log_q)
    if CHECK:
        of_p = tl.where(allowed, of_p, 0.0)
    return slope, of_p, allowed


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
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    rows = student.rows
    row = tile * form.rows
    query = load_query(student, batch, head, row, form.rows, spec, True)
    normalizer = load_rows(
        student.normalizer, batch, head, row, rows, form.rows, spec.heads
    )
    of_center = load_rows(
        center, batch, head, row, rows, form.rows, spec.heads
    )
    of_row = load_rows(
        upstream, batch, head, row, rows, form.rows, spec.heads
    )
    teacher_query, teacher_keys, teacher_normalizer = None, None, None
    if mixture is None:
        teacher_query = load_query(
            teacher, batch, head, row, form.rows, form.teacher, True
        )
        teacher_normalizer = load_rows(
            teacher.normalizer, batch, head, row, rows, form.rows, spec.heads
        )
    of_query = tl.zeros(query.shape, tl.float32)
    teacher_head = tl.arange(0, triton.next_power_of_2(form.teacher.heads))
    of_mixture = tl.zeros(teacher_head.shape, tl.float32)
    of_tile = bounds + 4 * (batch * tl.num_programs(0) + tile)
    for part in tl.static_range(3):
        CHECK: tl.constexpr = part != 1
        if part != 0 or form.window is not None:
            for key in range(
                tl.load(of_tile + part), tl.load(of_tile + part + 1), form.keys
            ):
                keys = load_key(
                    student, batch, head, key, form.keys, spec, CHECK
                )
                if mixture is None:
                    teacher_keys = load_key(
                        teacher,
                        batch,
                        head,
                        key,
                        form.keys,
                        form.teacher,
                        CHECK,
                    )
                slope, of_p, allowed = slope_tile(
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
                    normalizer,
                    teacher_normalizer,
                    of_center,
                    form,
                    CHECK,
                )
                of_query = dot_in_two(slope, keys, of_query)
                if mixture is not None:
                    of_p *= of_row[:, None]
                    for other in range(form.teacher.heads):
                        p = head_tile(
                            teacher,
                            batch,
                            other,
                            row,
                            key,
                            allowed,
                            0.0,
                            form,
                            CHECK,
                        )
                        total = tl.sum(tl.sum(of_p * p, 1), 0)
                        of_mixture += tl.where(
                            teacher_head == other, total, 0.0
                        )
    of_query *= (student.scale * tl.exp2(-LIFT)) * of_row[:, None]
    where, inside = where_tile(
        gradient, batch, head, row, rows, form.rows, spec.heads, spec.width
    )
    tl.store(where, of_query.to(gradient.dtype.element_ty), mask=inside)
    if mixture is not None:
        of_head = tl.program_id(1) * tl.num_programs(0) + tile
        tl.store(
            mixture_gradient + of_head * form.teacher.heads + teacher_head,
            of_mixture / LOG2_E,
            mask=teacher_head < form.teacher.heads,
        )


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
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.key_heads
    key_head = tl.program_id(1) % spec.key_heads
    group: tl.constexpr = spec.heads // spec.key_heads
    rows = student.rows
    key = tile * form.keys
    keys = load_key(
        student, batch, key_head * group, key, form.keys, spec, True
    )
    of_key = tl.zeros(keys.shape, tl.float32)
    of_tile = bounds + 4 * (batch * tl.num_programs(0) + tile)
    for head in range(key_head * group, key_head * group + group):
        teacher_query, teacher_keys, teacher_normalizer = None, None, None
        if mixture is None:
            teacher_keys = load_key(
                teacher, batch, head, key, form.keys, form.teacher, True
            )
        for part in tl.static_range(3):
            CHECK: tl.constexpr = part != 1
            for row in range(
                tl.load(of_tile + part), tl.load(of_tile + part + 1), form.rows
            ):
                query = load_query(
                    student, batch, head, row, form.rows, spec, CHECK
                )
                normalizer = load_rows(
                    student.normalizer,
                    batch,
                    head,
                    row,
                    rows,
                    form.rows,
                    spec.heads,
                )
                of_center = load_rows(
                    center, batch, head, row, rows, form.rows, spec.heads
                )
                of_row = load_rows(
                    upstream, batch, head, row, rows, form.rows, spec.heads
                )
                if mixture is None:
                    teacher_query = load_query(
                        teacher,
                        batch,
                        head,
                        row,
                        form.rows,
                        form.teacher,
                        CHECK,
                    )
                    teacher_normalizer = load_rows(
                        teacher.normalizer,
                        batch,
                        head,
                        row,
                        rows,
                        form.rows,
                        spec.heads,
                    )
                slope, _, _ = slope_tile(
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
                    normalizer,
                    teacher_normalizer,
                    of_center,
                    form,
                    CHECK,
                )
                of_key = dot_in_two(slope * of_row[None], query, of_key)
    of_key *= student.scale * tl.exp2(-LIFT)
    where, inside = where_tile(
        gradient,
        batch,
        key_head,
        key,
        student.keys,
        form.keys,
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
