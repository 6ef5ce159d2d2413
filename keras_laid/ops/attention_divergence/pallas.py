"""The divergence in fused kernels for JAX on GPUs, the twin of triton.py.

Maps exist only as tiles on the chip; README.md derives the sums. Arrays are
laid out (batch, length, heads, width); lengths are padded to whole tiles and
widths to powers of 2. In names, `row` and `key` are where a tile starts.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from keras_laid.ops.attention_divergence import tiles

INTERPRET = False  # Tests run the kernels on a CPU so.
MASKED = -1e30
TINY = 1e-30


class Side(NamedTuple):
    """One model's attention; in a kernel, references to one example's."""

    query: Any  # (batch, rows, heads, width)
    key: Any  # (batch, keys, key heads, width)
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).


class Call(NamedTuple):
    """What is known when kernels are compiled."""

    spec: tiles.Spec
    teacher_spec: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float
    tiles: tiles.Tiles
    interpret: bool


def logits_tile(query, key, scale, soft_cap):
    logits = scale * dot(query, key.T)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits


def dot(a, b):
    return jnp.dot(
        a, b, precision="highest", preferred_element_type=jnp.float32
    )


def dot_in_two(a, b):
    """`a @ b` for float32 `a`, rounded to `b`'s dtype in two parts.

    In one part, sums that cancel would lose more than the definition's.
    """
    high = a.astype(b.dtype)
    total = dot(high, b)
    if b.dtype != jnp.float32:
        total += dot((a - high.astype(jnp.float32)).astype(b.dtype), b)
    return total


def load_query(side, head, row, call):
    return side.query[pl.ds(row, call.tiles.rows), head, :]


def load_key(side, head, key, call, spec):
    """The keys that query head `head` reads."""
    key_head = head // (spec.heads // spec.key_heads)
    return side.key[pl.ds(key, call.tiles.keys), key_head, :]


def of_rows(ref, head, row, call):
    return ref.at[head, pl.ds(row, call.tiles.rows)]


def load_rows(ref, head, row, call):
    return of_rows(ref, head, row, call)[...]


def places_tile(places, row, key, call):
    """Which keys the rows of a tile attend, and their weights."""
    rows, keys = (
        pl.ds(row, call.tiles.rows),
        pl.ds(key, call.tiles.keys),
    )
    kind = places.kinds[keys].astype(jnp.int32)
    key_index = key + jnp.arange(call.tiles.keys)
    ahead = places.row_index[rows][:, None] - key_index[None]
    allowed = (kind == 1)[None] | ((kind == 2)[None] & (ahead >= 0))
    if call.window is not None:
        allowed &= jnp.abs(ahead) < call.window
    share = jnp.abs(
        places.row_share[rows][:, None] - places.key_share[keys][None]
    )
    if call.exponent != 1.0:
        share = jnp.exp(call.exponent * jnp.log(share))
    return allowed, 1.0 + places.strength[0] * share


def head_tile(teacher, head, row, key, allowed, call):
    """The attention map of one head of the teacher."""
    spec = call.teacher_spec
    logits = logits_tile(
        load_query(teacher, head, row, call),
        load_key(teacher, head, key, call, spec),
        call.teacher_scale,
        spec.soft_cap,
    )
    normalizer = load_rows(teacher.normalizer, head, row, call)
    return jnp.where(allowed, jnp.exp(logits - normalizer[:, None]), 0.0)


def mixed_tile(teacher, mixture, head, row, key, allowed, call):
    """The mixture of the teacher's maps that student head `head` learns."""

    def add(other, p):
        of_head = head_tile(teacher, other, row, key, allowed, call)
        return p + mixture[head, other] * of_head

    zeros = jnp.zeros(allowed.shape, jnp.float32)
    return lax.fori_loop(0, call.teacher_spec.heads, add, zeros)


def for_each_tile(bounds, tile, size, body, carry):
    """Calls `body(start, carry)` for the tiles that `tile` has to visit."""
    first, end = bounds[tile, 0], bounds[tile, 1]

    def step(number, carry):
        return body(number * size, carry)

    return lax.fori_loop(first // size, pl.cdiv(end, size), step, carry)


def running(highest, logits, allowed):
    """The new maximum, what old sums are multiplied by, and exponentials."""
    logits = jnp.where(allowed, logits, MASKED)
    higher = jnp.maximum(highest, jnp.max(logits, axis=1))
    terms = jnp.where(allowed, jnp.exp(logits - higher[:, None]), 0.0)
    return higher, jnp.exp(highest - higher), terms


def normalizer_kernel(teacher, places, bounds, normalizer, *, call):
    """Log-sum-exp of each row of the teacher."""
    tile, head = pl.program_id(0), pl.program_id(2)
    row = tile * call.tiles.rows
    query = load_query(teacher, head, row, call)

    def body(key, carry):
        highest, total = carry
        allowed, _ = places_tile(places, row, key, call)
        logits = logits_tile(
            query,
            load_key(teacher, head, key, call, call.teacher_spec),
            call.teacher_scale,
            call.teacher_spec.soft_cap,
        )
        highest, keep, terms = running(highest, logits, allowed)
        return highest, total * keep + jnp.sum(terms, axis=1)

    zeros = jnp.zeros(call.tiles.rows, jnp.float32)
    highest, total = for_each_tile(
        bounds, tile, call.tiles.keys, body, (zeros + MASKED, zeros)
    )
    # Rows without keys: any number will do.
    of_rows(normalizer, head, row, call)[...] = jnp.where(
        total > 0, highest + jnp.log(jnp.where(total > 0, total, 1.0)), 0.0
    )


def forward_kernel(student, teacher, mixture, places, bounds, outputs, *, call):
    """Divergences and normalizers, from running maxima and sums."""
    tile, head = pl.program_id(0), pl.program_id(2)
    row = tile * call.tiles.rows
    spec, teacher_spec = call.spec, call.teacher_spec
    query = load_query(student, head, row, call)
    if mixture is None:
        teacher_query = load_query(teacher, head, row, call)

    def body(key, carry):
        highest_s, highest_t, sum_s, sum_t, sum_ws, sum_wt, sum_wtd = carry
        allowed, weights = places_tile(places, row, key, call)
        s = logits_tile(
            query,
            load_key(student, head, key, call, spec),
            call.scale,
            spec.soft_cap,
        )
        highest_s, keep_s, exp_s = running(highest_s, s, allowed)
        if mixture is None:
            t = logits_tile(
                teacher_query,
                load_key(teacher, head, key, call, teacher_spec),
                call.teacher_scale,
                teacher_spec.soft_cap,
            )
            highest_t, keep_t, exp_t = running(highest_t, t, allowed)
            sum_t = sum_t * keep_t + jnp.sum(exp_t, axis=1)
            sum_wt, sum_wtd = sum_wt * keep_t, sum_wtd * keep_t
        else:
            # Normalised already: e^t is p itself.
            exp_t = mixed_tile(teacher, mixture, head, row, key, allowed, call)
            t = jnp.log(jnp.maximum(exp_t, TINY))
        difference = jnp.where(allowed, t - s, 0.0)
        return (
            highest_s,
            highest_t,
            sum_s * keep_s + jnp.sum(exp_s, axis=1),
            sum_t,
            sum_ws * keep_s + jnp.sum(weights * exp_s, axis=1),
            sum_wt + jnp.sum(weights * exp_t, axis=1),
            sum_wtd + jnp.sum(weights * exp_t * difference, axis=1),
        )

    zeros = jnp.zeros(call.tiles.rows, jnp.float32)
    carry = (zeros + MASKED,) * 2 + (zeros,) * 5
    highest_s, highest_t, sum_s, sum_t, sum_ws, sum_wt, sum_wtd = for_each_tile(
        bounds, tile, call.tiles.keys, body, carry
    )
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s = jnp.where(sum_s > 0, sum_s, 1.0)
    normalizer_s = highest_s + jnp.log(sum_s)
    normalizer_t = zeros
    if mixture is None:
        sum_t = jnp.where(sum_t > 0, sum_t, 1.0)
        normalizer_t = highest_t + jnp.log(sum_t)
        sum_wt, sum_wtd = sum_wt / sum_t, sum_wtd / sum_t
        of_rows(outputs["teacher_normalizer"], head, row, call)[...] = (
            normalizer_t
        )
    center = sum_ws / sum_s - sum_wt
    divergence = sum_wtd + (normalizer_s - normalizer_t) * sum_wt + center
    of_rows(outputs["normalizer"], head, row, call)[...] = normalizer_s
    of_rows(outputs["center"], head, row, call)[...] = center
    # What rounding takes below 0 is 0.
    of_rows(outputs["divergence"], head, row, call)[...] = jnp.maximum(
        divergence, 0.0
    )


def slope_tile(
    student, teacher, mixture, places, center, head, row, key, query, keys, call
):
    """Slope of divergences in `query @ key`, and what the mixture's needs."""
    allowed, weights = places_tile(places, row, key, call)
    s = logits_tile(query, keys, call.scale, call.spec.soft_cap)
    log_q = s - load_rows(student.normalizer, head, row, call)[:, None]
    q = jnp.where(allowed, jnp.exp(log_q), 0.0)
    if mixture is None:
        p = head_tile(teacher, head, row, key, allowed, call)
    else:
        p = mixed_tile(teacher, mixture, head, row, key, allowed, call)
    of_center = load_rows(center, head, row, call)[:, None]
    slope = jnp.where(allowed, weights * (q - p) - q * of_center, 0.0)
    if call.spec.soft_cap is not None:
        slope *= 1.0 - jnp.square(s / call.spec.soft_cap)
    log_p = jnp.log(jnp.maximum(p, TINY))
    of_p = jnp.where(allowed, weights * (log_p - log_q), 0.0)
    return call.scale * slope, of_p, allowed


def query_gradient_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,
    center,
    upstream,
    outputs,
    *,
    call,
):
    tile, head = pl.program_id(0), pl.program_id(2)
    row = tile * call.tiles.rows
    query = load_query(student, head, row, call)
    of_row = load_rows(upstream, head, row, call)[:, None]
    teacher_head = jnp.arange(pl.next_power_of_2(call.teacher_spec.heads))

    def body(key, carry):
        of_query, of_mixture = carry
        keys = load_key(student, head, key, call, call.spec)
        slope, of_p, allowed = slope_tile(
            student,
            teacher,
            mixture,
            places,
            center,
            head,
            row,
            key,
            query,
            keys,
            call,
        )
        of_query += dot_in_two(of_row * slope, keys)
        if mixture is not None:

            def add(other, of_mixture):
                p = head_tile(teacher, other, row, key, allowed, call)
                total = jnp.sum(of_row * of_p * p)
                return of_mixture + jnp.where(teacher_head == other, total, 0.0)

            of_mixture = lax.fori_loop(
                0, call.teacher_spec.heads, add, of_mixture
            )
        return of_query, of_mixture

    carry = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(teacher_head.shape, jnp.float32),
    )
    of_query, of_mixture = for_each_tile(
        bounds, tile, call.tiles.keys, body, carry
    )
    gradient = outputs["query"]
    gradient[pl.ds(row, call.tiles.rows), head, :] = of_query.astype(
        gradient.dtype
    )
    if mixture is not None:
        outputs["mixture"][head, tile, :] = of_mixture


def key_gradient_kernel(
    student,
    teacher,
    mixture,
    places,
    bounds,
    center,
    upstream,
    gradient,
    *,
    call,
):
    tile, key_head = pl.program_id(0), pl.program_id(2)
    group = call.spec.heads // call.spec.key_heads
    key = tile * call.tiles.keys
    keys = load_key(student, key_head * group, key, call, call.spec)

    def of_head(head, of_key):
        def body(row, of_key):
            query = load_query(student, head, row, call)
            slope, _, _ = slope_tile(
                student,
                teacher,
                mixture,
                places,
                center,
                head,
                row,
                key,
                query,
                keys,
                call,
            )
            slope *= load_rows(upstream, head, row, call)[:, None]
            return of_key + dot_in_two(slope.T, query)

        return for_each_tile(bounds, tile, call.tiles.rows, body, of_key)

    of_key = lax.fori_loop(
        key_head * group,
        (key_head + 1) * group,
        of_head,
        jnp.zeros(keys.shape, jnp.float32),
    )
    gradient[pl.ds(key, call.tiles.keys), key_head, :] = of_key.astype(
        gradient.dtype
    )


def launch(kernel, call, bounds, heads, arguments, outputs):
    """Runs a kernel for each tile, example and head, on one example's arrays.

    The first axis of every array is the batch, or 1 for what examples share.
    """

    def of_example(array):
        _, *shape = array.shape
        shared = array.shape[0] == 1

        def index(tile, batch, head):
            return 0 if shared else batch, *[0] * len(shape)

        return pl.BlockSpec((None, *shape), index)

    batch, tile_count = bounds.shape[:2]
    return pl.pallas_call(
        functools.partial(kernel, call=call),
        grid=(tile_count, batch, heads),
        in_specs=jax.tree.map(of_example, arguments),
        out_specs=jax.tree.map(of_example, outputs),
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(
            num_warps=call.tiles.warps, num_stages=call.tiles.stages
        ),
        interpret=call.interpret,
    )(*arguments)


def of_each_row(student, heads):
    batch, rows = student.query.shape[:2]
    return jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(call, trained, fixed):
    return forward(call, trained, fixed)[0]


def forward(call, trained, fixed):
    student_query, student_key, mixture = trained
    teacher_query, teacher_key, places, row_bounds, _ = fixed
    student = Side(student_query, student_key, None)
    teacher = Side(teacher_query, teacher_key, None)
    outputs = {
        name: of_each_row(student, call.spec.heads)
        for name in ("divergence", "normalizer", "center")
    }
    of_teacher = of_each_row(student, call.teacher_spec.heads)
    if mixture is None:
        outputs["teacher_normalizer"] = of_teacher
    else:
        teacher = teacher._replace(
            normalizer=launch(
                normalizer_kernel,
                call,
                row_bounds,
                call.teacher_spec.heads,
                (teacher, places, row_bounds),
                of_teacher,
            )
        )
    outputs = launch(
        forward_kernel,
        call,
        row_bounds,
        call.spec.heads,
        (student, teacher, mixture, places, row_bounds),
        outputs,
    )
    if mixture is None:
        normalizer = outputs["teacher_normalizer"]
        teacher = teacher._replace(normalizer=normalizer)
    student = student._replace(normalizer=outputs["normalizer"])
    residuals = student, teacher, mixture, fixed, outputs["center"]
    return outputs["divergence"], residuals


def backward(call, residuals, upstream):
    student, teacher, mixture, fixed, center = residuals
    *_, places, row_bounds, key_bounds = fixed
    models = (student, teacher, mixture, places)
    outputs = {"query": jax.typeof(student.query)}
    if mixture is not None:
        batch, tile_count = row_bounds.shape[:2]
        teacher_heads = pl.next_power_of_2(call.teacher_spec.heads)
        outputs["mixture"] = jax.ShapeDtypeStruct(
            (batch, call.spec.heads, tile_count, teacher_heads), jnp.float32
        )
    outputs = launch(
        query_gradient_kernel,
        call,
        row_bounds,
        call.spec.heads,
        (*models, row_bounds, center, upstream),
        outputs,
    )
    of_key = launch(
        key_gradient_kernel,
        call,
        key_bounds,
        call.spec.key_heads,
        (*models, key_bounds, center, upstream),
        jax.typeof(student.key),
    )
    of_mixture = None
    if mixture is not None:
        of_mixture = jnp.sum(outputs["mixture"], axis=(0, 2))[None]
        of_mixture = of_mixture[..., : call.teacher_spec.heads]
    return (outputs["query"], of_key, of_mixture), None


divergence.defvjp(forward, backward)


def attention_divergence(student, teacher, mask, distance, mixture):
    specs = tiles.Spec.of(student), tiles.Spec.of(teacher)
    call = Call(
        *specs,
        float(student.scale),
        float(teacher.scale),
        mask.window,
        float(distance.exponent),
        tiles.choose_tiles(max(spec.width for spec in specs)),
        INTERPRET,
    )
    batch, rows = student.query.shape[:2]
    places = tiles.Places.of(mask, distance, batch)
    bounds = (
        tiles.row_bounds(places, call.tiles, call.window),
        tiles.key_bounds(places, call.tiles, call.window),
    )

    def of_rows(array, axis=1):
        return pad(array, axis, -array.shape[axis] % call.tiles.rows)

    def of_keys(array):
        return pad(array, 1, -array.shape[1] % call.tiles.keys)

    def of_width(array):
        width = array.shape[-1]
        return pad(array, -1, pl.next_power_of_2(width) - width)

    places = tiles.Places(
        of_keys(places.kinds),
        of_rows(places.row_index[None]),
        of_rows(places.row_share),
        of_keys(places.key_share),
        places.strength[None, None],
    )
    trained = (
        of_width(of_rows(student.query)),
        of_width(of_keys(student.key)),
        None if mixture is None else mixture[None],
    )
    fixed = (
        of_width(of_rows(teacher.query)),
        of_width(of_keys(teacher.key)),
        places,
        *bounds,
    )
    return divergence(call, trained, fixed)[:, :, :rows]


def pad(array, axis, amount):
    if not amount:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, amount)
    return jnp.pad(array, widths)
