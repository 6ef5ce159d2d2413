"""The divergence in fused kernels for JAX on GPUs; README.md derives the sums.

The parts that all kernels share are in `fused_attention/pallas.py`, which also
explains their layout and names.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from keras_laid.ops.fused_attention import pallas as kernels
from keras_laid.ops.fused_attention import tiles


class Side(NamedTuple):
    """One model's attention; in a kernel, references to one example of it."""

    query: Any  # (batch, rows, heads, width)
    key: Any  # (batch, keys, key heads, width)
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).


class Models(NamedTuple):
    """The inputs of every kernel; in a kernel, references to one example."""

    student: Side
    teacher: Side
    mixture: Any  # (1, student heads, teacher heads), or None.
    places: tiles.Places


class Numbers(NamedTuple):
    """Numbers of a tile's rows, one for each row."""

    normalizer: Any
    teacher_normalizer: Any
    center: Any
    upstream: Any
    share: Any


class Pair(NamedTuple):
    """Queries and keys of one head's tile."""

    query: Any
    key: Any


class Form(NamedTuple):
    """The constants that a kernel is compiled with."""

    student: tiles.Spec
    teacher: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float
    tiles: tiles.Tiles


def load_numbers(models, center, upstream, tile, form):
    rows = kernels.rows_of(tile, form)
    teacher_normalizer = None  # Mixtures need those of all heads.
    if models.mixture is None:
        teacher_normalizer = models.teacher.normalizer[tile.head, rows]
    return Numbers(
        models.student.normalizer[tile.head, rows],
        teacher_normalizer,
        center[tile.head, rows],
        upstream[tile.head, rows],
        models.places.row_share[rows],
    )


def load_teacher_query(models, tile, form):
    """The teacher's queries, or `None` for mixtures, which load each head."""
    if models.mixture is not None:
        return None
    return kernels.load_row_tile(models.teacher.query, tile, form)


def load_teacher_key(models, tile, form):
    """The teacher's keys, or `None` for mixtures, which load each head."""
    if models.mixture is not None:
        return None
    return kernels.load_key_tile(models.teacher.key, tile, form.teacher, form)


def weights_tile(row_share, key_share, form):
    """The weight of the distance from a row to a key."""
    share = jnp.abs(
        kernels.broadcast_rows(row_share, form)
        - kernels.broadcast_keys(key_share, form)
    )
    if form.exponent != 1.0:
        share = kernels.exp2(form.exponent * kernels.log2(share))
    return 1.0 + share


def map_tile(pair, normalizer, allowed, form):
    """The attention map of one head of the teacher."""
    cap = form.teacher.soft_cap
    t, unit = kernels.logits_tile(*pair, form.teacher_scale, cap, form)
    p = kernels.exp2(t * unit - kernels.broadcast_rows(normalizer, form))
    return kernels.where_allowed(allowed, p, 0)


def head_tile(teacher, tile, allowed, form):
    """As `map_tile`, for a head whose queries and keys are not loaded yet."""
    pair = Pair(
        kernels.load_row_tile(teacher.query, tile, form),
        kernels.load_key_tile(teacher.key, tile, form.teacher, form),
    )
    normalizer = teacher.normalizer[tile.head, kernels.rows_of(tile, form)]
    return map_tile(pair, normalizer, allowed, form)


def mixed_tile(models, tile, allowed, form):
    """The mixture of the teacher's maps that the student head learns from."""

    def add(other, p):
        other_tile = tile._replace(head=other)
        other_p = head_tile(models.teacher, other_tile, allowed, form)
        return p + models.mixture[tile.head, other] * other_p

    shape = form.tiles.rows, form.tiles.keys
    zeros = jnp.zeros(shape[::-1] if form.tiles.by_key else shape, jnp.float32)
    return lax.fori_loop(0, form.teacher.heads, add, zeros)


def normalizer_kernel(models, bounds, normalizer, *, form):
    """Log-sum-exp of each row of the teacher."""
    teacher, spec = models.teacher, form.teacher
    own = kernels.own_rows(form)
    query = kernels.load_row_tile(teacher.query, own, form)

    def step(state, tile, check):
        highest, total = state
        key = kernels.load_key_tile(teacher.key, tile, spec, form)
        t, unit = kernels.logits_tile(
            query, key, form.teacher_scale, spec.soft_cap, form
        )
        if check:
            allowed = kernels.allowed_tile(models.places, tile, form)
            t = jnp.where(allowed, t, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(t, axis=1) * unit)
        terms = kernels.exp2(t * unit - higher[:, None])
        keep = kernels.exp2(highest - higher)[:, None]
        return higher, total * keep + kernels.part_sums(terms)

    state = (
        jnp.full(form.tiles.rows, kernels.LEAST, jnp.float32),
        jnp.zeros((form.tiles.rows, kernels.PARTS), jnp.float32),
    )
    highest, total = kernels.for_each_keys(bounds, own, step, state, form)
    total = jnp.sum(total, axis=1)
    # The normalizer of a row without keys is not used: any number will do.
    normalizer[own.head, kernels.rows_of(own, form)] = jnp.where(
        total > 0.0, highest + kernels.log2(total), 0.0
    )


def forward_kernel(models, bounds, outputs, *, form):
    """Divergences and normalizers, from running maxima and sums."""
    student, _, mixture, places = models
    own = kernels.own_rows(form)
    rows = kernels.rows_of(own, form)
    query = kernels.load_row_tile(student.query, own, form)
    teacher_query = load_teacher_query(models, own, form)
    row_share = places.row_share[rows]
    least = jnp.full(form.tiles.rows, kernels.LEAST, jnp.float32)
    zeros = jnp.zeros((form.tiles.rows, kernels.PARTS), jnp.float32)
    # The student's highest logit, sum e^s and sum w e^s; the teacher's highest
    # logit, sum e^t and sum w e^t; and sum w e^t (t - s).
    if mixture is None:
        state = (least, zeros, zeros, least, zeros, zeros, zeros)
    else:
        # Mixed maps are normalised: t = log p needs no maximum, sum e^t is 1.
        one = zeros + 1.0 / kernels.PARTS
        state = (least, zeros, zeros, 0.0 * least, one, zeros, zeros)

    def step(state, tile, check):
        highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
        allowed = kernels.allowed_tile(places, tile, form) if check else None
        s, unit = kernels.logits_tile(
            query,
            kernels.load_key_tile(student.key, tile, form.student, form),
            form.scale,
            form.student.soft_cap,
            form,
        )
        s = kernels.where_allowed(allowed, s, -jnp.inf)
        higher_s = jnp.maximum(highest_s, jnp.max(s, axis=1) * unit)
        raise_s = higher_s - highest_s
        s = s * unit - higher_s[:, None]
        exp_s = kernels.exp2(s)
        if mixture is None:
            t, unit = kernels.logits_tile(
                teacher_query,
                load_teacher_key(models, tile, form),
                form.teacher_scale,
                form.teacher.soft_cap,
                form,
            )
            t = kernels.where_allowed(allowed, t, -jnp.inf)
            higher_t = jnp.maximum(highest_t, jnp.max(t, axis=1) * unit)
            raise_t = higher_t - highest_t
            t = t * unit - higher_t[:, None]
            exp_t = kernels.exp2(t)
            keep_t = kernels.exp2(-raise_t)[:, None]
            sum_t = sum_t * keep_t + kernels.part_sums(exp_t)
            # t - s is taken between logits relative to their running maxima.
            raised = sum_wt * (raise_s - raise_t)[:, None]
            sum_wtd = (sum_wtd + raised) * keep_t
            sum_wt *= keep_t
        else:
            # The mixed map is normalised: e^t is p itself.
            higher_t = highest_t
            exp_t = mixed_tile(models, tile, allowed, form)
            t = kernels.log2(jnp.maximum(exp_t, kernels.TINY))
            sum_wtd += sum_wt * raise_s[:, None]
        difference = kernels.where_allowed(allowed, t - s, 0.0)
        key_share = places.key_share[kernels.keys_of(tile, form)]
        weights = weights_tile(row_share, key_share, form)
        weighted = weights * exp_t
        keep_s = kernels.exp2(-raise_s)[:, None]
        return (
            higher_s,
            sum_s * keep_s + kernels.part_sums(exp_s),
            sum_ws * keep_s + kernels.part_sums(weights * exp_s),
            higher_t,
            sum_t,
            sum_wt + kernels.part_sums(weighted),
            sum_wtd + kernels.part_sums(weighted * difference),
        )

    state = kernels.for_each_keys(bounds, own, step, state, form)
    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
    sum_s, sum_ws, sum_t, sum_wt, sum_wtd = (
        jnp.sum(parts, axis=1)
        for parts in (sum_s, sum_ws, sum_t, sum_wt, sum_wtd)
    )
    # In rows without keys all sums are 0, and so is the divergence.
    sum_s = jnp.where(sum_s > 0.0, sum_s, 1.0)
    sum_t = jnp.where(sum_t > 0.0, sum_t, 1.0)
    log_s, log_t = kernels.log2(sum_s), kernels.log2(sum_t)
    divergence = sum_wtd + sum_wt * (log_s - log_t)
    divergence /= sum_t * kernels.LOG2_E
    center = sum_ws / sum_s - sum_wt / sum_t
    outputs["normalizer"][own.head, rows] = highest_s + log_s
    if mixture is None:
        outputs["teacher_normalizer"][own.head, rows] = highest_t + log_t
    outputs["center"][own.head, rows] = center
    # The sum is never negative; rounding may make it so.
    divergence = jnp.maximum(divergence + center, 0.0)
    outputs["divergence"][own.head, rows] = divergence


def slope_tile(models, student, teacher, numbers, tile, allowed, form):
    """Slopes of the divergence in `scale * query @ key`, and in `p`.

    `student` and `teacher` are the `Pair`s of a tile.
    """
    cap = form.student.soft_cap
    s, unit = kernels.logits_tile(*student, form.scale, cap, form)
    log_q = s * unit - kernels.broadcast_rows(numbers.normalizer, form)
    q = kernels.where_allowed(allowed, kernels.exp2(log_q), 0.0)
    if models.mixture is None:
        p = map_tile(teacher, numbers.teacher_normalizer, allowed, form)
    else:
        p = mixed_tile(models, tile, allowed, form)
    key_share = models.places.key_share[kernels.keys_of(tile, form)]
    weights = weights_tile(numbers.share, key_share, form)
    slope = weights * (q - p) - q * kernels.broadcast_rows(numbers.center, form)
    if cap is not None:
        slope *= 1.0 - s * s
    p_slope = weights * (kernels.log2(jnp.maximum(p, kernels.TINY)) - log_q)
    return slope, kernels.where_allowed(allowed, p_slope, 0.0)


def query_gradient_kernel(models, bounds, center, upstream, outputs, *, form):
    student, teacher, mixture, places = models
    own = kernels.own_rows(form)
    query = kernels.load_row_tile(student.query, own, form)
    teacher_query = load_teacher_query(models, own, form)
    numbers = load_numbers(models, center, upstream, own, form)
    teacher_head = jnp.arange(pl.next_power_of_2(form.teacher.heads))

    def step(state, tile, check):
        query_gradient, mixture_gradient = state
        allowed = kernels.allowed_tile(places, tile, form) if check else None
        key = kernels.load_key_tile(student.key, tile, form.student, form)
        slope, p_slope = slope_tile(
            models,
            Pair(query, key),
            Pair(teacher_query, load_teacher_key(models, tile, form)),
            numbers,
            tile,
            allowed,
            form,
        )
        query_gradient = kernels.dot_in_two(slope, key, query_gradient)
        if mixture is not None:
            p_slope *= numbers.upstream[:, None]

            def add(other, gradient):
                other_tile = tile._replace(head=other)
                p = head_tile(teacher, other_tile, allowed, form)
                total = jnp.sum(p_slope * p)
                return gradient + jnp.where(teacher_head == other, total, 0.0)

            mixture_gradient = lax.fori_loop(
                0, form.teacher.heads, add, mixture_gradient
            )
        return query_gradient, mixture_gradient

    state = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(teacher_head.shape, jnp.float32),
    )
    query_gradient, mixture_gradient = kernels.for_each_keys(
        bounds, own, step, state, form
    )
    factor = form.scale / kernels.lift_of(query.dtype)
    query_gradient *= factor * numbers.upstream[:, None]
    gradient = outputs["query"]
    gradient[kernels.rows_of(own, form), own.head, :] = query_gradient.astype(
        gradient.dtype
    )
    if mixture is not None:
        number = own.row // form.tiles.rows
        outputs["mixture"][own.head, number, :] = (
            mixture_gradient / kernels.LOG2_E
        )


def key_gradient_kernel(models, bounds, center, upstream, gradient, *, form):
    student, _, _, places = models
    own = kernels.own_keys(form)
    group = form.student.heads // form.student.key_heads
    where = kernels.keys_of(own, form), own.head, slice(None)
    key = student.key[where]

    def add_head(member, key_gradient):
        query_tile = own._replace(head=own.head * group + member)
        teacher_key = load_teacher_key(models, query_tile, form)

        def step(key_gradient, tile, check):
            allowed = None
            if check:
                allowed = kernels.allowed_tile(places, tile, form)
            query = kernels.load_row_tile(student.query, tile, form)
            numbers = load_numbers(models, center, upstream, tile, form)
            slope, _ = slope_tile(
                models,
                Pair(query, key),
                Pair(load_teacher_query(models, tile, form), teacher_key),
                numbers,
                tile,
                allowed,
                form,
            )
            slope *= kernels.broadcast_rows(numbers.upstream, form)
            if not form.tiles.by_key:
                slope = slope.T
            return kernels.dot_in_two(slope, query, key_gradient)

        return kernels.for_each_rows(
            bounds, query_tile, step, key_gradient, form
        )

    key_gradient = jnp.zeros(key.shape, jnp.float32)
    key_gradient = lax.fori_loop(0, group, add_head, key_gradient)
    key_gradient *= form.scale / kernels.lift_of(key.dtype)
    gradient[where] = key_gradient.astype(gradient.dtype)


def row_struct(student, heads):
    batch, rows = student.query.shape[:2]
    return jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(forms, trained, fixed):
    return forward(forms, trained, fixed)[0]


def forward(forms, trained, fixed):
    student_query, student_key, mixture = trained
    teacher_query, teacher_key, places, bounds = fixed
    form = forms.forward
    student = Side(student_query, student_key, None)
    teacher = Side(teacher_query, teacher_key, None)
    models = Models(student, teacher, mixture, places)
    outputs = {
        name: row_struct(student, form.student.heads)
        for name in ("divergence", "normalizer", "center")
    }
    teacher_normalizer = row_struct(student, form.teacher.heads)
    if mixture is None:
        outputs["teacher_normalizer"] = teacher_normalizer
    else:
        normalizer = kernels.launch(
            normalizer_kernel,
            form,
            bounds.forward,
            form.teacher.heads,
            models,
            (),
            teacher_normalizer,
        )
        teacher = teacher._replace(normalizer=normalizer)
        models = models._replace(teacher=teacher)
    outputs = kernels.launch(
        forward_kernel,
        form,
        bounds.forward,
        form.student.heads,
        models,
        (),
        outputs,
    )
    if mixture is None:
        normalizer = outputs["teacher_normalizer"]
        teacher = teacher._replace(normalizer=normalizer)
    student = student._replace(normalizer=outputs["normalizer"])
    models = models._replace(student=student, teacher=teacher)
    return outputs["divergence"], (models, bounds, outputs["center"])


def backward(forms, residuals, upstream):
    models, bounds, center = residuals
    student, _, mixture, _ = models
    form = forms.query
    outputs = {"query": jax.typeof(student.query)}
    if mixture is not None:
        batch, tile_count = bounds.query.shape[:2]
        teacher_heads = pl.next_power_of_2(form.teacher.heads)
        outputs["mixture"] = jax.ShapeDtypeStruct(
            (batch, form.student.heads, tile_count, teacher_heads), jnp.float32
        )
    outputs = kernels.launch(
        query_gradient_kernel,
        form,
        bounds.query,
        form.student.heads,
        models,
        (center, upstream),
        outputs,
    )
    key_gradient = kernels.launch(
        key_gradient_kernel,
        forms.key,
        bounds.key,
        form.student.key_heads,
        models,
        (center, upstream),
        jax.typeof(student.key),
    )
    mixture_gradient = None
    if mixture is not None:
        mixture_gradient = jnp.sum(outputs["mixture"], axis=(0, 2))[None]
        mixture_gradient = mixture_gradient[..., : form.teacher.heads]
    return (outputs["query"], key_gradient, mixture_gradient), None


divergence.defvjp(forward, backward)


def attention_divergence(student, teacher, mask, distance, mixture):
    specs = (
        tiles.Spec.from_attention(student),
        tiles.Spec.from_attention(teacher),
    )
    forms = kernels.Kernels(
        *(
            Form(
                *specs,
                float(student.scale),
                float(teacher.scale),
                mask.window,
                float(distance.exponent),
                kernels.choose_tiles(
                    kernel,
                    student.key if kernel == "key" else student.query,
                    max(spec.width for spec in specs),
                    max(
                        side.query.dtype.itemsize for side in (student, teacher)
                    ),
                    mixture is not None,
                ),
            )
            for kernel in kernels.Kernels._fields
        )
    )
    padding = kernels.Padding.from_forms(forms)
    batch, rows = student.query.shape[:2]
    places = padding.places(
        tiles.Places.from_mask_and_distance(mask, distance, batch)
    )
    trained = (
        padding.queries(student.query),
        padding.keys_or_values(student.key),
        None if mixture is None else mixture[None],
    )
    fixed = (
        padding.queries(teacher.query),
        padding.keys_or_values(teacher.key),
        places._replace(row_index=places.row_index[None]),
        kernels.bounds_of(places, forms, mask.window),
    )
    return divergence(forms, trained, fixed)[:, :, :rows]
