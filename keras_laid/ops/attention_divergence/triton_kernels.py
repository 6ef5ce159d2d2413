"""The divergence's kernels for torch on CUDA; README.md derives the sums.

The parts that all kernels share are in `fused_attention/triton.py`, which also
explains their layout and names.
"""

from typing import Any
from typing import NamedTuple

import triton
import triton.language as tl

from keras_laid.ops.fused_attention import tiles
from keras_laid.ops.fused_attention import triton as kernels


class Inputs(NamedTuple):
    """The inputs of all programs of a kernel."""

    student: kernels.Side
    teacher: kernels.Side
    mixture: Any  # (student heads, teacher heads), or None.
    places: kernels.Places
    # One number for each row, (batch, student heads, rows); for gradients.
    center: Any  # sum_j w_ij (q_ij - p_ij)
    upstream: Any


class Own(NamedTuple):
    """The data that a program keeps: its tile of both models, and numbers."""

    student: Any
    teacher: Any  # None for mixtures, which load each head.
    upstream: Any  # Of its rows, in the kernel of query gradients; else None.


class Pair(NamedTuple):
    """Queries and keys of one head's tile."""

    query: Any
    key: Any


class Form(NamedTuple):
    """The constants that a kernel is compiled with."""

    student: tiles.Spec
    teacher: tiles.Spec
    window: int | None
    exponent: float
    tiles: tiles.Tiles
    over_rows: bool  # Whether a program visits tiles of rows, not of keys.


@triton.jit
def weights_tile(places, tile, form: tl.constexpr, CHECK: tl.constexpr):
    """The weight of the distance from a row to a key."""
    row, key = tl.arange(0, form.tiles.rows), tl.arange(0, form.tiles.keys)
    row_share = places.row_share + (tile.batch * tile.rows + tile.row) + row
    key_share = places.key_share + (tile.batch * tile.keys + tile.key) + key
    # A program's own tile may reach beyond the last row or key.
    if CHECK or not form.over_rows:
        row_share = tl.load(
            row_share, mask=tile.row + row < tile.rows, other=0.0
        )
    else:
        row_share = tl.load(row_share)
    if CHECK or form.over_rows:
        key_share = tl.load(
            key_share, mask=tile.key + key < tile.keys, other=0.0
        )
    else:
        key_share = tl.load(key_share)
    share = tl.abs(
        kernels.broadcast_rows(row_share, form)
        - kernels.broadcast_keys(key_share, form)
    )
    if form.exponent != 1.0:
        share = tl.exp2(form.exponent * tl.log2(share))
    return 1.0 + share


@triton.jit
def map_tile(
    teacher, pair, normalizer, allowed, form: tl.constexpr, CHECK: tl.constexpr
):
    """The attention map of one head of the teacher."""
    cap: tl.constexpr = form.teacher.soft_cap
    t, unit = kernels.logits_tile(
        pair.query, pair.key, teacher.scale, cap, form
    )
    p = tl.exp2(t * unit - kernels.broadcast_rows(normalizer, form))
    if CHECK:
        p = tl.where(allowed, p, 0.0)
    return p


@triton.jit
def head_tile(teacher, tile, allowed, form: tl.constexpr, CHECK: tl.constexpr):
    """As `map_tile`, for a head whose queries and keys are not loaded yet."""
    spec: tl.constexpr = form.teacher
    pair = Pair(
        kernels.load_row_tile(teacher.query, tile),
        kernels.load_key_tile(teacher.key, tile, spec),
    )
    normalizer = kernels.load_rows(
        teacher.normalizer, tile, spec.heads, form, True
    )
    return map_tile(teacher, pair, normalizer, allowed, form, CHECK)


@triton.jit
def mixed_tile(inputs, tile, allowed, form: tl.constexpr, CHECK: tl.constexpr):
    """The mixture of the teacher's maps that the student head learns from."""
    heads: tl.constexpr = form.teacher.heads
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    if form.tiles.by_key:
        p = tl.zeros([KEYS, ROWS], tl.float32)
    else:
        p = tl.zeros([ROWS, KEYS], tl.float32)
    for other in range(heads):
        share = tl.load(inputs.mixture + tile.head * heads + other)
        other_tile = kernels.at_head(tile, other)
        p += share * head_tile(inputs.teacher, other_tile, allowed, form, CHECK)
    return p


@triton.jit
def normalizer_step(
    state, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    highest, total = state
    spec: tl.constexpr = form.teacher
    side = inputs.teacher
    key = kernels.load_key_tile(side.key, tile, spec)
    t, unit = kernels.logits_tile(
        own.teacher, key, side.scale, spec.soft_cap, form
    )
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
        t = tl.where(allowed, t, -float("inf"))
    higher = tl.maximum(highest, tl.max(t, 1) * unit)
    terms = tl.exp2(t * unit - higher[:, None])
    keep = tl.exp2(highest - higher)
    return higher, total * keep[:, None] + kernels.part_sums(terms)


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
    side = kernels.Side(query, key, normalizer, scale)
    inputs = Inputs(None, side, None, places, None, None)
    tile = kernels.own_rows(rows, keys, spec.heads, form)
    own = kernels.load_own_rows(query, tile, rows, spec.heads, spec.width, form)
    state = (
        tl.full([ROWS], kernels.LEAST, tl.float32),
        tl.zeros([ROWS, 8], tl.float32),
    )
    highest, parts = kernels.for_each_keys(
        normalizer_step, state, inputs, Own(None, own, None), tile, form
    )
    total = tl.sum(parts, 1)
    # The normalizer of a row without keys is not used: any number will do.
    row_normalizer = tl.where(total > 0.0, highest + tl.log2(total), 0.0)
    kernels.store_rows(normalizer, row_normalizer, tile, spec.heads, form)


@triton.jit
def forward_step(
    state, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    """Running maxima and sums, after another tile of keys."""
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    spec: tl.constexpr = form.student
    allowed = None
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
    key = kernels.load_key_tile(inputs.student.key, tile, spec)
    s, unit = kernels.logits_tile(
        own.student, key, inputs.student.scale, spec.soft_cap, form
    )
    if CHECK:
        s = tl.where(allowed, s, -float("inf"))
    higher_s = tl.maximum(highest_s, tl.max(s, 1) * unit)
    raise_s = higher_s - highest_s
    s = s * unit - higher_s[:, None]
    exp_s = tl.exp2(s)
    if inputs.mixture is None:
        teacher_spec: tl.constexpr = form.teacher
        key = kernels.load_key_tile(inputs.teacher.key, tile, teacher_spec)
        t, unit = kernels.logits_tile(
            own.teacher, key, inputs.teacher.scale, teacher_spec.soft_cap, form
        )
        if CHECK:
            t = tl.where(allowed, t, -float("inf"))
        higher_t = tl.maximum(highest_t, tl.max(t, 1) * unit)
        raise_t = higher_t - highest_t
        t = t * unit - higher_t[:, None]
        exp_t = tl.exp2(t)
        keep_t = tl.exp2(-raise_t)[:, None]
        sum_t = sum_t * keep_t + kernels.part_sums(exp_t)
        # t - s is taken between logits relative to their running maxima.
        sum_wtd = (sum_wtd + sum_wt * (raise_s - raise_t)[:, None]) * keep_t
        sum_wt *= keep_t
    else:
        # The mixed map is normalised: e^t is p itself.
        higher_t = highest_t
        exp_t = mixed_tile(inputs, tile, allowed, form, CHECK)
        t = tl.log2(tl.maximum(exp_t, kernels.TINY))
        sum_wtd += sum_wt * raise_s[:, None]
    difference = t - s
    if CHECK:
        difference = tl.where(allowed, difference, 0.0)
    weights = weights_tile(inputs.places, tile, form, CHECK)
    weighted = weights * exp_t
    keep_s = tl.exp2(-raise_s)[:, None]
    return (
        higher_s,
        sum_s * keep_s + kernels.part_sums(exp_s),
        sum_ws * keep_s + kernels.part_sums(weights * exp_s),
        higher_t,
        sum_t,
        sum_wt + kernels.part_sums(weighted),
        sum_wtd + kernels.part_sums(weighted * difference),
    )


@triton.jit
def load_own_queries(
    student_query, teacher_query, mixture, tile, rows, form: tl.constexpr
):
    """A program's tiles of queries; a mixture has no use for the second."""
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    student = kernels.load_own_rows(
        student_query, tile, rows, spec.heads, spec.width, form
    )
    teacher = student  # A function cannot return None in a tuple.
    if mixture is None:
        teacher = kernels.load_own_rows(
            teacher_query,
            tile,
            rows,
            teacher_spec.heads,
            teacher_spec.width,
            form,
        )
    return student, teacher


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
    center,  # Of the same shape: sum_j w_ij (q_ij - p_ij).
    form: tl.constexpr,
):
    """Divergences and normalizers."""
    heads: tl.constexpr = form.student.heads
    ROWS: tl.constexpr = form.tiles.rows
    inputs = Inputs(
        kernels.Side(student_query, student_key, normalizer, scale),
        kernels.Side(
            teacher_query, teacher_key, teacher_normalizer, teacher_scale
        ),
        mixture,
        places,
        None,
        None,
    )
    tile = kernels.own_rows(rows, keys, heads, form)
    student, teacher = load_own_queries(
        student_query, teacher_query, mixture, tile, rows, form
    )
    least = tl.full([ROWS], kernels.LEAST, tl.float32)
    zeros = tl.zeros([ROWS, 8], tl.float32)
    # The student's highest logit, sum e^s and sum w e^s; the teacher's highest
    # logit, sum e^t and sum w e^t; and sum w e^t (t - s).
    if mixture is None:
        state = (least, zeros, zeros, least, zeros, zeros, zeros)
    else:
        # Mixed maps are normalised: t = log p needs no maximum, sum e^t is 1.
        state = (least, zeros, zeros, least * 0, zeros + 0.125, zeros, zeros)
    state = kernels.for_each_keys(
        forward_step, state, inputs, Own(student, teacher, None), tile, form
    )
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    # In rows without keys all sums are 0, and so is the divergence.
    sum_s, sum_ws = tl.sum(sum_s, 1), tl.sum(sum_ws, 1)
    sum_t, sum_wt = tl.sum(sum_t, 1), tl.sum(sum_wt, 1)
    sum_s = tl.where(sum_s > 0.0, sum_s, 1.0)
    sum_t = tl.where(sum_t > 0.0, sum_t, 1.0)
    log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
    row_divergence = tl.sum(sum_wtd, 1) + sum_wt * (log_s - log_t)
    row_divergence /= sum_t * kernels.LOG2_E
    row_center = sum_ws / sum_s - sum_wt / sum_t
    kernels.store_rows(normalizer, highest_s + log_s, tile, heads, form)
    if mixture is None:
        row_normalizer = highest_t + log_t
        kernels.store_rows(
            teacher_normalizer, row_normalizer, tile, heads, form
        )
    kernels.store_rows(center, row_center, tile, heads, form)
    # The sum is never negative; rounding may make it so.
    row_divergence = tl.maximum(row_divergence + row_center, 0.0)
    kernels.store_rows(divergence, row_divergence, tile, heads, form)


@triton.jit
def slope_tile(
    inputs,
    student,
    teacher,
    tile,
    allowed,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Slopes of the divergence in `scale * query @ key`, and in `p`.

    `student` and `teacher` are the `Pair`s of a tile.
    """
    heads: tl.constexpr = form.student.heads
    cap: tl.constexpr = form.student.soft_cap
    s, unit = kernels.logits_tile(
        student.query, student.key, inputs.student.scale, cap, form
    )
    normalizer = kernels.load_rows(
        inputs.student.normalizer, tile, heads, form, CHECK
    )
    log_q = s * unit - kernels.broadcast_rows(normalizer, form)
    q = tl.exp2(log_q)
    if CHECK:
        q = tl.where(allowed, q, 0.0)
    if inputs.mixture is None:
        normalizer = kernels.load_rows(
            inputs.teacher.normalizer, tile, heads, form, CHECK
        )
        p = map_tile(inputs.teacher, teacher, normalizer, allowed, form, CHECK)
    else:
        p = mixed_tile(inputs, tile, allowed, form, CHECK)
    weights = weights_tile(inputs.places, tile, form, CHECK)
    row_center = kernels.load_rows(inputs.center, tile, heads, form, CHECK)
    slope = weights * (q - p) - q * kernels.broadcast_rows(row_center, form)
    if cap is not None:
        slope *= 1.0 - s * s
    p_slope = weights * (tl.log2(tl.maximum(p, kernels.TINY)) - log_q)
    if CHECK:
        p_slope = tl.where(allowed, p_slope, 0.0)
    return slope, p_slope


@triton.jit
def query_step(
    state, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    """Gradients of queries and mixture, after another tile of keys."""
    query_gradient, mixture_gradient = state
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    allowed = None
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
    key = kernels.load_key_tile(inputs.student.key, tile, spec)
    teacher_key = None
    if inputs.mixture is None:
        teacher_key = kernels.load_key_tile(
            inputs.teacher.key, tile, teacher_spec
        )
    slope, p_slope = slope_tile(
        inputs,
        Pair(own.student, key),
        Pair(own.teacher, teacher_key),
        tile,
        allowed,
        form,
        CHECK,
    )
    query_gradient = kernels.dot_in_two(slope, key, query_gradient)
    if inputs.mixture is not None:
        p_slope *= own.upstream[:, None]
        teacher_head = tl.arange(0, mixture_gradient.shape[0])
        for other in range(teacher_spec.heads):
            other_tile = kernels.at_head(tile, other)
            p = head_tile(inputs.teacher, other_tile, allowed, form, CHECK)
            total = tl.sum(tl.sum(p_slope * p, 1), 0)
            mixture_gradient += tl.where(teacher_head == other, total, 0.0)
    return query_gradient, mixture_gradient


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
    gradient,  # Of the shape of the student's query.
    mixture_gradient,  # (batch, student heads, row tiles, teacher heads)
    form: tl.constexpr,
):
    heads: tl.constexpr = form.student.heads
    TEACHER_HEADS: tl.constexpr = form.teacher.heads
    inputs = Inputs(
        kernels.Side(student_query, student_key, normalizer, scale),
        kernels.Side(
            teacher_query, teacher_key, teacher_normalizer, teacher_scale
        ),
        mixture,
        places,
        center,
        upstream,
    )
    tile = kernels.own_rows(rows, keys, heads, form)
    student, teacher = load_own_queries(
        student_query, teacher_query, mixture, tile, rows, form
    )
    row_upstream = kernels.load_rows(upstream, tile, heads, form, True)
    teacher_head = tl.arange(0, triton.next_power_of_2(TEACHER_HEADS))
    state = (
        tl.zeros(student.shape, tl.float32),
        tl.zeros(teacher_head.shape, tl.float32),
    )
    query_sum, mixture_sum = kernels.for_each_keys(
        query_step,
        state,
        inputs,
        Own(student, teacher, row_upstream),
        tile,
        form,
    )
    query_sum *= scale / kernels.lift(student.dtype) * row_upstream[:, None]
    kernels.store_tile(gradient, query_sum, tile.batch, tile.head, tile.row)
    if mixture is not None:
        number = tl.num_programs(0) - 1 - tl.program_id(0)
        tile_index = tl.program_id(1) * tl.num_programs(0) + number
        tl.store(
            mixture_gradient + tile_index * TEACHER_HEADS + teacher_head,
            mixture_sum / kernels.LOG2_E,
            mask=teacher_head < TEACHER_HEADS,
        )


@triton.jit
def key_step(
    key_gradient, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    """Gradient of keys, after another tile of rows."""
    allowed = None
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
    query = kernels.load_row_tile(inputs.student.query, tile)
    teacher_query = None
    if inputs.mixture is None:
        teacher_query = kernels.load_row_tile(inputs.teacher.query, tile)
    slope, _ = slope_tile(
        inputs,
        Pair(query, own.student),
        Pair(teacher_query, own.teacher),
        tile,
        allowed,
        form,
        CHECK,
    )
    heads: tl.constexpr = form.student.heads
    row_upstream = kernels.load_rows(inputs.upstream, tile, heads, form, CHECK)
    slope *= kernels.broadcast_rows(row_upstream, form)
    if not form.tiles.by_key:
        slope = tl.trans(slope)
    return kernels.dot_in_two(slope, query, key_gradient)


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
    gradient,  # Of the shape of the student's key.
    form: tl.constexpr,
):
    spec: tl.constexpr = form.student
    teacher_spec: tl.constexpr = form.teacher
    inputs = Inputs(
        kernels.Side(student_query, student_key, normalizer, scale),
        kernels.Side(
            teacher_query, teacher_key, teacher_normalizer, teacher_scale
        ),
        mixture,
        places,
        center,
        upstream,
    )
    tile = kernels.own_keys(rows, keys, spec.key_heads, form)
    key_head = tile.head
    student = kernels.load_own_keys(
        student_key, tile, keys, spec.key_heads, spec.width, form
    )
    key_sum = tl.zeros(student.shape, tl.float32)
    visited = kernels.tiles_of_rows(places, first_rows, tile, form)
    group: tl.constexpr = spec.heads // spec.key_heads
    shared: tl.constexpr = teacher_spec.heads // teacher_spec.key_heads
    for head in range(key_head * group, key_head * group + group):
        teacher = None
        if mixture is None:
            teacher = kernels.load_own_keys(
                teacher_key,
                kernels.at_head(tile, head // shared),
                keys,
                teacher_spec.key_heads,
                teacher_spec.width,
                form,
            )
        key_sum = kernels.for_each_rows(
            key_step,
            key_sum,
            inputs,
            Own(student, teacher, None),
            kernels.at_head(tile, head),
            visited,
            form,
        )
    key_sum *= scale / kernels.lift(student.dtype)
    kernels.store_tile(gradient, key_sum, tile.batch, key_head, tile.key)
