"""The divergence in fused kernels for torch on CUDA.

Maps exist only as tiles on the chip; README.md derives the sums. Tensors are
laid out (batch, length, heads, width). In names, `rows` and `keys` are lengths,
`row` and `key` the indices of a tile.
"""

from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_laid.ops.attention_divergence import tiles

# In a tile: minus infinity, whose differences would be NaN; and what counts as
# probability 0 in `p * log(p)`. As in definition.py.
MASKED = tl.constexpr(-1e30)
TINY = tl.constexpr(1e-30)


class Side(NamedTuple):
    """One model's attention, in a kernel."""

    query: Any
    key: Any
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).
    scale: Any
    rows: Any
    keys: Any


@triton.jit
def pointers(
    tensor, batch, head, index, length, heads: tl.constexpr, width: tl.constexpr
):
    """Where rows `index` of one head's matrix are, and which are inside."""
    column = tl.arange(0, triton.next_power_of_2(width))
    row = batch.to(tl.int64) * length + index
    where = tensor + (row * heads + head)[:, None] * width + column[None]
    return where, (index < length)[:, None] & (column < width)[None]


@triton.jit
def load_query(side, batch, head, row, spec: tl.constexpr):
    where, inside = pointers(
        side.query, batch, head, row, side.rows, spec.heads, spec.width
    )
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def load_key(side, batch, head, key, spec: tl.constexpr):
    """The keys that query head `head` reads."""
    key_head = head // (spec.heads // spec.key_heads)
    where, inside = pointers(
        side.key, batch, key_head, key, side.keys, spec.key_heads, spec.width
    )
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def of_rows(tensor, batch, head, row, rows, heads: tl.constexpr):
    """Where the rows' numbers are in a tensor (batch, heads, rows)."""
    return tensor + (batch.to(tl.int64) * heads + head) * rows + row


@triton.jit
def load_rows(tensor, batch, head, row, rows, heads: tl.constexpr):
    where = of_rows(tensor, batch, head, row, rows, heads)
    return tl.load(where, mask=row < rows, other=0.0)


@triton.jit
def logits_tile(query, key, scale, spec: tl.constexpr):
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if spec.soft_cap is not None:
        # soft_cap * tanh(logits / soft_cap)
        half = tl.sigmoid(logits * (2.0 / spec.soft_cap)) - 0.5
        logits = half * (2.0 * spec.soft_cap)
    return logits


@triton.jit
def dot_in_two(a, b):
    """`a @ b` for float32 `a`, rounded to `b`'s dtype in two parts.

    In one part, sums that cancel would lose more than the definition's.
    """
    high = a.to(b.dtype)
    total = tl.dot(high, b, input_precision="ieee")
    if b.dtype != tl.float32:
        low = (a - high.to(tl.float32)).to(b.dtype)
        total = tl.dot(low, b, total)
    return total


@triton.jit
def allowed_tile(places, batch, row, rows, key, keys, window: tl.constexpr):
    kind = tl.load(places.kinds + batch * keys + key, mask=key < keys, other=0)
    index = tl.load(places.row_index + row, mask=row < rows, other=-1)
    ahead = index[:, None] - key[None]
    allowed = (kind == 1)[None] | ((kind == 2)[None] & (ahead >= 0))
    if window is not None:
        allowed = allowed & (tl.abs(ahead) < window)
    return allowed


@triton.jit
def weights_tile(places, batch, row, rows, key, keys, exponent: tl.constexpr):
    of_row = places.row_share + batch * rows + row
    of_row = tl.load(of_row, mask=row < rows, other=0.0)
    of_key = places.key_share + batch * keys + key
    of_key = tl.load(of_key, mask=key < keys, other=0.0)
    share = tl.abs(of_row[:, None] - of_key[None])
    if exponent != 1.0:
        share = tl.exp(exponent * tl.log(share))
    return 1.0 + tl.load(places.strength) * share


@triton.jit
def head_tile(teacher, batch, head, row, key, allowed, spec: tl.constexpr):
    """The attention map of one head of the teacher."""
    logits = logits_tile(
        load_query(teacher, batch, head, row, spec),
        load_key(teacher, batch, head, key, spec),
        teacher.scale,
        spec,
    )
    normalizer = load_rows(
        teacher.normalizer, batch, head, row, teacher.rows, spec.heads
    )
    return tl.where(allowed, tl.exp(logits - normalizer[:, None]), 0.0)


@triton.jit
def mixed_tile(
    teacher, mixture, batch, head, row, key, allowed, spec: tl.constexpr
):
    """The mixture of the teacher's maps that student head `head` learns."""
    p = tl.zeros(allowed.shape, tl.float32)
    for other in range(spec.heads):
        share = tl.load(mixture + head * spec.heads + other)
        p += share * head_tile(teacher, batch, other, row, key, allowed, spec)
    return p


@triton.jit
def normalizer_kernel(
    side,
    places,
    bounds,  # (batch, row tiles, 2): the keys that a tile's rows may attend.
    spec: tl.constexpr,
    window: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Log-sum-exp of each row of one model."""
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query = load_query(side, batch, head, row, spec)
    highest = tl.full([BLOCK_ROWS], MASKED, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    of_tile = bounds + 2 * (batch * tl.num_programs(0) + tile)
    for start in range(tl.load(of_tile), tl.load(of_tile + 1), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        allowed = allowed_tile(
            places, batch, row, side.rows, key, side.keys, window
        )
        logits = logits_tile(
            query, load_key(side, batch, head, key, spec), side.scale, spec
        )
        logits = tl.where(allowed, logits, MASKED)
        higher = tl.maximum(highest, tl.max(logits, 1))
        terms = tl.where(allowed, tl.exp(logits - higher[:, None]), 0.0)
        total = total * tl.exp(highest - higher) + tl.sum(terms, 1)
        highest = higher
    tl.store(
        of_rows(side.normalizer, batch, head, row, side.rows, spec.heads),
        # Rows without keys: any number will do.
        tl.where(total > 0.0, highest + tl.log(total), 0.0),
        mask=row < side.rows,
    )


@triton.jit
def forward_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,
    divergence,  # (batch, student heads, rows)
    center,  # Likewise: sum_j w_ij (q_ij - p_ij).
    spec: tl.constexpr,
    teacher_spec: tl.constexpr,
    window: tl.constexpr,
    exponent: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Divergences and normalizers, from running maxima and sums."""
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    rows, keys = student.rows, student.keys
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query = load_query(student, batch, head, row, spec)
    if mixture is None:
        teacher_query = load_query(teacher, batch, head, row, teacher_spec)
    highest_s = tl.full([BLOCK_ROWS], MASKED, tl.float32)
    highest_t = tl.full([BLOCK_ROWS], MASKED, tl.float32)
    sum_s = tl.zeros([BLOCK_ROWS], tl.float32)  # e^s
    sum_t = tl.zeros([BLOCK_ROWS], tl.float32)  # e^t
    sum_ws = tl.zeros([BLOCK_ROWS], tl.float32)  # w e^s
    sum_wt = tl.zeros([BLOCK_ROWS], tl.float32)  # w e^t
    sum_wtd = tl.zeros([BLOCK_ROWS], tl.float32)  # w e^t (t - s)
    of_tile = bounds + 2 * (batch * tl.num_programs(0) + tile)
    for start in range(tl.load(of_tile), tl.load(of_tile + 1), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        allowed = allowed_tile(places, batch, row, rows, key, keys, window)
        weights = weights_tile(places, batch, row, rows, key, keys, exponent)
        s = logits_tile(
            query,
            load_key(student, batch, head, key, spec),
            student.scale,
            spec,
        )
        s = tl.where(allowed, s, MASKED)
        higher_s = tl.maximum(highest_s, tl.max(s, 1))
        exp_s = tl.where(allowed, tl.exp(s - higher_s[:, None]), 0.0)
        keep_s = tl.exp(highest_s - higher_s)
        highest_s = higher_s
        if mixture is None:
            t = logits_tile(
                teacher_query,
                load_key(teacher, batch, head, key, teacher_spec),
                teacher.scale,
                teacher_spec,
            )
            t = tl.where(allowed, t, MASKED)
            higher_t = tl.maximum(highest_t, tl.max(t, 1))
            exp_t = tl.where(allowed, tl.exp(t - higher_t[:, None]), 0.0)
            keep_t = tl.exp(highest_t - higher_t)
            highest_t = higher_t
            sum_t = sum_t * keep_t + tl.sum(exp_t, 1)
            sum_wt *= keep_t
            sum_wtd *= keep_t
        else:
            # Normalised already: e^t is p itself.
            exp_t = mixed_tile(
                teacher, mixture, batch, head, row, key, allowed, teacher_spec
            )
            t = tl.log(tl.maximum(exp_t, TINY))
        sum_s = sum_s * keep_s + tl.sum(exp_s, 1)
        sum_ws = sum_ws * keep_s + tl.sum(weights * exp_s, 1)
        sum_wt += tl.sum(weights * exp_t, 1)
        difference = tl.where(allowed, t - s, 0.0)
        sum_wtd += tl.sum(weights * exp_t * difference, 1)
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s = tl.where(sum_s > 0.0, sum_s, 1.0)
    normalizer_s = highest_s + tl.log(sum_s)
    normalizer_t = tl.zeros([BLOCK_ROWS], tl.float32)
    if mixture is None:
        sum_t = tl.where(sum_t > 0.0, sum_t, 1.0)
        normalizer_t = highest_t + tl.log(sum_t)
        sum_wt /= sum_t
        sum_wtd /= sum_t
        tl.store(
            of_rows(teacher.normalizer, batch, head, row, rows, spec.heads),
            normalizer_t,
            mask=row < rows,
        )
    of_row = sum_wtd + (normalizer_s - normalizer_t) * sum_wt
    center_of_row = sum_ws / sum_s - sum_wt
    tl.store(
        of_rows(student.normalizer, batch, head, row, rows, spec.heads),
        normalizer_s,
        mask=row < rows,
    )
    tl.store(
        of_rows(center, batch, head, row, rows, spec.heads),
        center_of_row,
        mask=row < rows,
    )
    tl.store(
        of_rows(divergence, batch, head, row, rows, spec.heads),
        # What rounding takes below 0 is 0.
        tl.maximum(of_row + center_of_row, 0.0),
        mask=row < rows,
    )


@triton.jit
def slope_tile(
    student,
    teacher,
    mixture,
    places,
    center,
    batch,
    head,
    row,
    key,
    query_values,
    key_values,
    spec: tl.constexpr,
    teacher_spec: tl.constexpr,
    window: tl.constexpr,
    exponent: tl.constexpr,
):
    """Slope of divergences in `query @ key`, and what the mixture's needs."""
    rows, keys = student.rows, student.keys
    allowed = allowed_tile(places, batch, row, rows, key, keys, window)
    weights = weights_tile(places, batch, row, rows, key, keys, exponent)
    s = logits_tile(query_values, key_values, student.scale, spec)
    normalizer = load_rows(
        student.normalizer, batch, head, row, rows, spec.heads
    )
    log_q = s - normalizer[:, None]
    q = tl.where(allowed, tl.exp(log_q), 0.0)
    if mixture is None:
        p = head_tile(teacher, batch, head, row, key, allowed, teacher_spec)
    else:
        p = mixed_tile(
            teacher, mixture, batch, head, row, key, allowed, teacher_spec
        )
    of_center = load_rows(center, batch, head, row, rows, spec.heads)
    slope = tl.where(allowed, weights * (q - p) - q * of_center[:, None], 0.0)
    if spec.soft_cap is not None:
        share = s / spec.soft_cap
        slope *= 1.0 - share * share
    log_p = tl.log(tl.maximum(p, TINY))
    of_p = tl.where(allowed, weights * (log_p - log_q), 0.0)
    return slope * student.scale, of_p, allowed


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
    spec: tl.constexpr,
    teacher_spec: tl.constexpr,
    window: tl.constexpr,
    exponent: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    rows = student.rows
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query = load_query(student, batch, head, row, spec)
    upstream = load_rows(upstream, batch, head, row, rows, spec.heads)
    of_query = tl.zeros(query.shape, tl.float32)
    teacher_head = tl.arange(0, triton.next_power_of_2(teacher_spec.heads))
    of_mixture = tl.zeros(teacher_head.shape, tl.float32)
    of_tile = bounds + 2 * (batch * tl.num_programs(0) + tile)
    for start in range(tl.load(of_tile), tl.load(of_tile + 1), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        key_values = load_key(student, batch, head, key, spec)
        slope, of_p, allowed = slope_tile(
            student,
            teacher,
            mixture,
            places,
            center,
            batch,
            head,
            row,
            key,
            query,
            key_values,
            spec,
            teacher_spec,
            window,
            exponent,
        )
        slope *= upstream[:, None]
        of_query += dot_in_two(slope, key_values)
        if mixture is not None:
            of_p *= upstream[:, None]
            for other in range(teacher_spec.heads):
                p = head_tile(
                    teacher, batch, other, row, key, allowed, teacher_spec
                )
                total = tl.sum(tl.sum(of_p * p, 1), 0)
                of_mixture += tl.where(teacher_head == other, total, 0.0)
    where, inside = pointers(
        gradient, batch, head, row, rows, spec.heads, spec.width
    )
    tl.store(where, of_query.to(gradient.dtype.element_ty), mask=inside)
    if mixture is not None:
        of_head = tl.program_id(1) * tl.num_programs(0) + tile
        tl.store(
            mixture_gradient + of_head * teacher_spec.heads + teacher_head,
            of_mixture,
            mask=teacher_head < teacher_spec.heads,
        )


@triton.jit
def key_gradient_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,  # (batch, key tiles, 2): the rows that may attend a tile's keys.
    center,
    upstream,
    gradient,  # As the student's key.
    spec: tl.constexpr,
    teacher_spec: tl.constexpr,
    window: tl.constexpr,
    exponent: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(1) // spec.key_heads
    key_head = tl.program_id(1) % spec.key_heads
    group: tl.constexpr = spec.heads // spec.key_heads
    rows = student.rows
    key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key_values = load_key(student, batch, key_head * group, key, spec)
    of_key = tl.zeros(key_values.shape, tl.float32)
    of_tile = bounds + 2 * (batch * tl.num_programs(0) + tile)
    for head in range(key_head * group, key_head * group + group):
        for start in range(tl.load(of_tile), tl.load(of_tile + 1), BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            query = load_query(student, batch, head, row, spec)
            slope, _, _ = slope_tile(
                student,
                teacher,
                mixture,
                places,
                center,
                batch,
                head,
                row,
                key,
                query,
                key_values,
                spec,
                teacher_spec,
                window,
                exponent,
            )
            slope *= load_rows(upstream, batch, head, row, rows, spec.heads)[
                :, None
            ]
            of_key += dot_in_two(tl.trans(slope), query)
    where, inside = pointers(
        gradient, batch, key_head, key, student.keys, spec.key_heads, spec.width
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
        bounds = tiles.row_bounds(call.places, call.tiles, call.window)
        if mixture is not None:
            launch(
                normalizer_kernel,
                call,
                bounds,
                call.teacher_spec.heads,
                (teacher, call.places, bounds, call.teacher_spec),
            )
        divergence = torch.empty_like(student.normalizer)
        center = torch.empty_like(student.normalizer)
        launch(
            forward_kernel,
            call,
            bounds,
            call.spec.heads,
            (
                student,
                teacher,
                mixture,
                call.places,
                bounds,
                divergence,
                center,
                call.spec,
                call.teacher_spec,
            ),
            exponent=call.exponent,
        )
        ctx.save_for_backward(
            *student[:3], *teacher[:3], mixture, bounds, center
        )
        ctx.call = call
        return divergence

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        *tensors, mixture, bounds, center = ctx.saved_tensors
        lengths = tensors[0].shape[1], tensors[1].shape[1]
        student = Side(*tensors[:3], call.scale, *lengths)
        teacher = Side(*tensors[3:], call.teacher_scale, *lengths)
        upstream = upstream.contiguous()
        of_query = torch.empty_like(student.query)
        of_key = torch.empty_like(student.key)
        of_mixture = None
        if mixture is not None:
            of_mixture = mixture.new_empty(
                (*center.shape[:2], bounds.shape[1], mixture.shape[1])
            )
        specs = (call.spec, call.teacher_spec)
        models = (student, teacher, mixture, call.places)
        launch(
            query_gradient_kernel,
            call,
            bounds,
            call.spec.heads,
            (*models, bounds, center, upstream, of_query, of_mixture, *specs),
            exponent=call.exponent,
        )
        bounds = tiles.key_bounds(call.places, call.tiles, call.window)
        launch(
            key_gradient_kernel,
            call,
            bounds,
            call.spec.key_heads,
            (*models, bounds, center, upstream, of_key, *specs),
            exponent=call.exponent,
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
    tiles: tiles.Tiles


def launch(kernel, call, bounds, heads, arguments, **constants):
    batch, count = bounds.shape[:2]
    kernel[(count, batch * heads)](
        *arguments,
        window=call.window,
        **constants,
        BLOCK_ROWS=call.tiles.rows,
        BLOCK_KEYS=call.tiles.keys,
        num_warps=call.tiles.warps,
        num_stages=call.tiles.stages,
    )


def attention_divergence(student, teacher, mask, distance, mixture):
    specs = tiles.Spec.of(student), tiles.Spec.of(teacher)
    places = tiles.Places.of(mask, distance, student.query.shape[0])
    call = Call(
        tiles.Places(*(tensor.contiguous() for tensor in places)),
        *specs,
        float(student.scale),
        float(teacher.scale),
        mask.window,
        float(distance.exponent),
        tiles.choose_tiles(max(spec.width for spec in specs)),
    )
    return Divergence.apply(
        student.query.contiguous(),
        student.key.contiguous(),
        mixture,
        teacher.query.contiguous(),
        teacher.key.contiguous(),
        call,
    )
