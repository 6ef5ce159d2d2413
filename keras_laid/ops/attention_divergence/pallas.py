"""The divergence in fused kernels for JAX on GPUs, the twin of triton.py.

Maps exist only as tiles on the chip; README.md derives the sums. Arrays are
laid out (batch, length, heads, width); lengths are padded to whole tiles and
widths to powers of 2. Logarithms are of base 2, whose power the chip computes.
In names, `row` and `key` are where a tile starts.
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
# The least that a running maximum is; and what counts as probability 0 in
# `p * log(p)`, as in definition.py.
LEAST = -1e30
TINY = 1e-30
LOG2_E = 1.4426950408889634
PARTS = 8  # Sums over a tile's keys are kept in so many parts.


class Side(NamedTuple):
    """One model's attention; in a kernel, references to one example's."""

    query: Any  # (batch, rows, heads, width)
    key: Any  # (batch, keys, key heads, width)
    normalizer: Any  # Log-sum-exp of each row: (batch, heads, rows).


class Models(NamedTuple):
    """What every kernel reads; in a kernel, references to one example's."""

    student: Side
    teacher: Side
    mixture: Any  # (1, student heads, teacher heads), or None.
    places: tiles.Places


class Numbers(NamedTuple):
    """What a tile's rows have, one number each."""

    normalizer: Any
    teacher_normalizer: Any
    center: Any
    upstream: Any
    share: Any


class Form(NamedTuple):
    """What a kernel is compiled for."""

    student: tiles.Spec
    teacher: tiles.Spec
    scale: float
    teacher_scale: float
    window: int | None
    exponent: float
    tiles: tiles.Tiles


class Kernels(NamedTuple):
    """One of something for each kernel: its form, or its bounds."""

    forward: Any
    query: Any
    key: Any


def exp2(x):
    """The chip's own, where `jnp.exp2` would spare numbers below 2**-126."""
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
    """What slopes are multiplied by: some are too small for float16."""
    return 1024.0 if dtype == jnp.float16 else 1.0


def dot_in_two(a, b, total):
    """`total + lift * a @ b` for float32 `a`, in two parts of `b`'s dtype.

    In one part, sums that cancel would lose more than the definition's.
    """
    if b.dtype == jnp.float32:
        return total + dot(a, b)
    a = a * lift_of(b.dtype)
    # The first bits, cut and not rounded: converting back costs more.
    bits = lax.bitcast_convert_type(a, jnp.int32) & -0x10000
    high = lax.bitcast_convert_type(bits, jnp.float32)
    total += dot(high.astype(b.dtype), b)
    return total + dot((a - high).astype(b.dtype), b)


def rows_from(row, form):
    return pl.ds(row, form.tiles.rows)


def keys_from(key, form):
    return pl.ds(key, form.tiles.keys)


def load_query(side, head, row, form):
    return side.query[rows_from(row, form), head, :]


def load_key(side, head, key, spec, form):
    """The keys that query head `head` reads."""
    key_head = head // (spec.heads // spec.key_heads)
    return side.key[keys_from(key, form), key_head, :]


def load_numbers(models, center, upstream, head, row, form):
    rows = rows_from(row, form)
    teacher_normalizer = None  # Mixtures have one for each head.
    if models.mixture is None:
        teacher_normalizer = models.teacher.normalizer[head, rows]
    return Numbers(
        models.student.normalizer[head, rows],
        teacher_normalizer,
        center[head, rows],
        upstream[head, rows],
        models.places.row_share[rows],
    )


def of_rows(values, form):
    """Numbers of rows, as a tile has them."""
    return values[None] if form.tiles.by_key else values[:, None]


def of_keys(values, form):
    return values[:, None] if form.tiles.by_key else values[None]


def logits_tile(query, keys, scale, cap, form):
    """Logits over a number, and that number: their product has base 2."""
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


def allowed_tile(places, row, key, form):
    kind = places.kinds[keys_from(key, form)].astype(jnp.int32)
    kind = of_keys(kind, form)
    index = places.row_index[rows_from(row, form)]
    key_index = key + jnp.arange(form.tiles.keys)
    ahead = of_rows(index, form) - of_keys(key_index, form)
    allowed = (kind == 1) | ((kind == 2) & (ahead >= 0))
    if form.window is not None:
        allowed &= jnp.abs(ahead) < form.window
    return allowed


def weights_tile(row_share, key_share, form):
    share = jnp.abs(of_rows(row_share, form) - of_keys(key_share, form))
    if form.exponent != 1.0:
        share = exp2(form.exponent * log2(share))
    return 1.0 + share


def map_tile(query, keys, normalizer, allowed, form):
    """The attention map of one head of the teacher."""
    cap = form.teacher.soft_cap
    t, unit = logits_tile(query, keys, form.teacher_scale, cap, form)
    return where_allowed(allowed, exp2(t * unit - of_rows(normalizer, form)), 0)


def head_tile(teacher, head, row, key, allowed, form):
    """The same, of a head whose queries and keys are not at hand."""
    return map_tile(
        load_query(teacher, head, row, form),
        load_key(teacher, head, key, form.teacher, form),
        teacher.normalizer[head, rows_from(row, form)],
        allowed,
        form,
    )


def mixed_tile(models, head, row, key, allowed, form):
    """The mixture of the teacher's maps that student head `head` learns."""

    def add(other, p):
        of_head = head_tile(models.teacher, other, row, key, allowed, form)
        return p + models.mixture[head, other] * of_head

    shape = form.tiles.rows, form.tiles.keys
    zeros = jnp.zeros(shape[::-1] if form.tiles.by_key else shape, jnp.float32)
    return lax.fori_loop(0, form.teacher.heads, add, zeros)


def part_sums(values):
    """Sums over a tile's keys, in parts: each thread sums its own."""
    rows, keys = values.shape
    return jnp.sum(values.reshape(rows, keys // PARTS, PARTS), axis=1)


def own_rows(form):
    """The tile of a program that has one of rows, its start, and its head."""
    tile = pl.num_programs(0) - 1 - pl.program_id(0)  # The longest go first.
    return tile, tile * form.tiles.rows, pl.program_id(2)


def for_each_keys(bounds, tile, step, state, form):
    """Calls `step(key, check, state)` for the tiles that some rows attend."""
    parts = (1, 2) if form.window is None else (0, 1, 2)
    return for_each_tile(bounds, tile, form.tiles.keys, parts, step, state)


def for_each_rows(bounds, tile, step, state, form):
    """Calls `step(row, check, state)` for the tiles that attend some keys."""
    parts = (0, 1) if form.window is None else (0, 1, 2)
    return for_each_tile(bounds, tile, form.tiles.rows, parts, step, state)


def for_each_tile(bounds, tile, size, parts, step, state):
    """One loop for each range of tiles: only those in the middle are full."""
    for part in parts:

        def body(number, state, check=part != 1):
            return step(number * size, check, state)

        ends = bounds[tile, part], bounds[tile, part + 1]
        state = lax.fori_loop(*ends, body, state)
    return state


def normalizer_kernel(models, bounds, normalizer, *, form):
    """Log-sum-exp of each row of the teacher."""
    teacher, spec = models.teacher, form.teacher
    tile, row, head = own_rows(form)
    query = load_query(teacher, head, row, form)

    def step(key, check, state):
        highest, total = state
        keys = load_key(teacher, head, key, spec, form)
        t, unit = logits_tile(
            query, keys, form.teacher_scale, spec.soft_cap, form
        )
        if check:
            allowed = allowed_tile(models.places, row, key, form)
            t = jnp.where(allowed, t, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(t, axis=1) * unit)
        terms = exp2(t * unit - higher[:, None])
        keep = exp2(highest - higher)[:, None]
        return higher, total * keep + part_sums(terms)

    state = (
        jnp.full(form.tiles.rows, LEAST, jnp.float32),
        jnp.zeros((form.tiles.rows, PARTS), jnp.float32),
    )
    highest, total = for_each_keys(bounds, tile, step, state, form)
    total = jnp.sum(total, axis=1)
    # Rows without keys: any number will do.
    normalizer[head, rows_from(row, form)] = jnp.where(
        total > 0.0, highest + log2(total), 0.0
    )


def forward_kernel(models, bounds, outputs, *, form):
    """Divergences and normalizers, from running maxima and sums."""
    student, teacher, mixture, places = models
    tile, row, head = own_rows(form)
    rows = rows_from(row, form)
    query = load_query(student, head, row, form)
    row_share = places.row_share[rows]
    least = jnp.full(form.tiles.rows, LEAST, jnp.float32)
    zeros = jnp.zeros((form.tiles.rows, PARTS), jnp.float32)
    # Of the student the highest logit, sum e^s and sum w e^s; of the teacher
    # the same, and sum w e^t (t - s).
    if mixture is None:
        teacher_query = load_query(teacher, head, row, form)
        state = (least, zeros, zeros, least, zeros, zeros, zeros)
    else:
        # Maps are normalised: their highest logit is 0, sum e^t is 1.
        one = zeros + 1.0 / PARTS
        state = (least, zeros, zeros, 0.0 * least, one, zeros, zeros)

    def step(key, check, state):
        highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = state
        allowed = allowed_tile(places, row, key, form) if check else None
        s, unit = logits_tile(
            query,
            load_key(student, head, key, form.student, form),
            form.scale,
            form.student.soft_cap,
            form,
        )
        s = where_allowed(allowed, s, -jnp.inf)
        higher_s = jnp.maximum(highest_s, jnp.max(s, axis=1) * unit)
        raise_s = higher_s - highest_s
        s = s * unit - higher_s[:, None]
        exp_s = exp2(s)
        if mixture is None:
            t, unit = logits_tile(
                teacher_query,
                load_key(teacher, head, key, form.teacher, form),
                form.teacher_scale,
                form.teacher.soft_cap,
                form,
            )
            t = where_allowed(allowed, t, -jnp.inf)
            higher_t = jnp.maximum(highest_t, jnp.max(t, axis=1) * unit)
            raise_t = higher_t - highest_t
            t = t * unit - higher_t[:, None]
            exp_t = exp2(t)
            keep_t = exp2(-raise_t)[:, None]
            sum_t = sum_t * keep_t + part_sums(exp_t)
            # Differences are those of logits below their maxima.
            raised = sum_wt * (raise_s - raise_t)[:, None]
            sum_wtd = (sum_wtd + raised) * keep_t
            sum_wt *= keep_t
        else:
            # Normalised already: e^t is p itself.
            higher_t = highest_t
            exp_t = mixed_tile(models, head, row, key, allowed, form)
            t = log2(jnp.maximum(exp_t, TINY))
            sum_wtd += sum_wt * raise_s[:, None]
        difference = where_allowed(allowed, t - s, 0.0)
        key_share = places.key_share[keys_from(key, form)]
        weights = weights_tile(row_share, key_share, form)
        weighted = weights * exp_t
        keep_s = exp2(-raise_s)[:, None]
        return (
            higher_s,
            sum_s * keep_s + part_sums(exp_s),
            sum_ws * keep_s + part_sums(weights * exp_s),
            higher_t,
            sum_t,
            sum_wt + part_sums(weighted),
            sum_wtd + part_sums(weighted * difference),
        )

    highest_s, sum_s, sum_ws, highest_t, sum_t, sum_wt, sum_wtd = for_each_keys(
        bounds, tile, step, state, form
    )
    sum_s, sum_ws, sum_t, sum_wt, sum_wtd = (
        jnp.sum(parts, axis=1)
        for parts in (sum_s, sum_ws, sum_t, sum_wt, sum_wtd)
    )
    # Rows without keys: sums are 0, and so is the divergence.
    sum_s = jnp.where(sum_s > 0.0, sum_s, 1.0)
    sum_t = jnp.where(sum_t > 0.0, sum_t, 1.0)
    log_s, log_t = log2(sum_s), log2(sum_t)
    divergence = (sum_wtd + sum_wt * (log_s - log_t)) / (sum_t * LOG2_E)
    center = sum_ws / sum_s - sum_wt / sum_t
    outputs["normalizer"][head, rows] = highest_s + log_s
    if mixture is None:
        outputs["teacher_normalizer"][head, rows] = highest_t + log_t
    outputs["center"][head, rows] = center
    # What rounding takes below 0 is 0.
    outputs["divergence"][head, rows] = jnp.maximum(divergence + center, 0.0)


def slope_tile(
    models,
    numbers,
    key_share,
    query,
    keys,
    teacher_query,
    teacher_keys,
    head,
    row,
    key,
    allowed,
    form,
):
    """Slopes of divergences: in `scale * query @ key`, and in `p`."""
    cap = form.student.soft_cap
    s, unit = logits_tile(query, keys, form.scale, cap, form)
    log_q = s * unit - of_rows(numbers.normalizer, form)
    q = where_allowed(allowed, exp2(log_q), 0.0)
    if models.mixture is None:
        normalizer = numbers.teacher_normalizer
        p = map_tile(teacher_query, teacher_keys, normalizer, allowed, form)
    else:
        p = mixed_tile(models, head, row, key, allowed, form)
    weights = weights_tile(numbers.share, key_share, form)
    slope = weights * (q - p) - q * of_rows(numbers.center, form)
    if cap is not None:
        slope *= 1.0 - s * s
    of_p = weights * (log2(jnp.maximum(p, TINY)) - log_q)
    return slope, where_allowed(allowed, of_p, 0.0)


def query_gradient_kernel(models, bounds, center, upstream, outputs, *, form):
    student, teacher, mixture, places = models
    tile, row, head = own_rows(form)
    query = load_query(student, head, row, form)
    teacher_query = None
    if mixture is None:
        teacher_query = load_query(teacher, head, row, form)
    numbers = load_numbers(models, center, upstream, head, row, form)
    teacher_head = jnp.arange(pl.next_power_of_2(form.teacher.heads))

    def step(key, check, state):
        of_query, of_mixture = state
        allowed = allowed_tile(places, row, key, form) if check else None
        keys = load_key(student, head, key, form.student, form)
        teacher_keys = None
        if mixture is None:
            teacher_keys = load_key(teacher, head, key, form.teacher, form)
        slope, of_p = slope_tile(
            models,
            numbers,
            places.key_share[keys_from(key, form)],
            query,
            keys,
            teacher_query,
            teacher_keys,
            head,
            row,
            key,
            allowed,
            form,
        )
        of_query = dot_in_two(slope, keys, of_query)
        if mixture is not None:
            of_p *= numbers.upstream[:, None]

            def add(other, of_mixture):
                p = head_tile(teacher, other, row, key, allowed, form)
                total = jnp.sum(of_p * p)
                return of_mixture + jnp.where(teacher_head == other, total, 0.0)

            of_mixture = lax.fori_loop(0, form.teacher.heads, add, of_mixture)
        return of_query, of_mixture

    state = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(teacher_head.shape, jnp.float32),
    )
    of_query, of_mixture = for_each_keys(bounds, tile, step, state, form)
    factor = form.scale / lift_of(query.dtype)
    of_query *= factor * numbers.upstream[:, None]
    gradient = outputs["query"]
    gradient[rows_from(row, form), head, :] = of_query.astype(gradient.dtype)
    if mixture is not None:
        outputs["mixture"][head, tile, :] = of_mixture / LOG2_E


def key_gradient_kernel(models, bounds, center, upstream, gradient, *, form):
    student, teacher, mixture, places = models
    tile, key_head = pl.program_id(0), pl.program_id(2)
    group = form.student.heads // form.student.key_heads
    key = tile * form.tiles.keys
    keys = student.key[keys_from(key, form), key_head, :]
    key_share = places.key_share[keys_from(key, form)]

    def of_head(member, of_key):
        head = key_head * group + member
        teacher_keys = None
        if mixture is None:
            teacher_keys = load_key(teacher, head, key, form.teacher, form)

        def step(row, check, of_key):
            allowed = allowed_tile(places, row, key, form) if check else None
            query = load_query(student, head, row, form)
            teacher_query = None
            if mixture is None:
                teacher_query = load_query(teacher, head, row, form)
            numbers = load_numbers(models, center, upstream, head, row, form)
            slope, _ = slope_tile(
                models,
                numbers,
                key_share,
                query,
                keys,
                teacher_query,
                teacher_keys,
                head,
                row,
                key,
                allowed,
                form,
            )
            slope *= of_rows(numbers.upstream, form)
            if not form.tiles.by_key:
                slope = slope.T
            return dot_in_two(slope, query, of_key)

        return for_each_rows(bounds, tile, step, of_key, form)

    of_key = jnp.zeros(keys.shape, jnp.float32)
    of_key = lax.fori_loop(0, group, of_head, of_key)
    of_key *= form.scale / lift_of(keys.dtype)
    gradient[keys_from(key, form), key_head, :] = of_key.astype(gradient.dtype)


def launch(kernel, form, bounds, heads, models, arguments, outputs):
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
    arguments = (models, bounds, *arguments)
    return pl.pallas_call(
        functools.partial(kernel, form=form),
        grid=(tile_count, batch, heads),
        in_specs=jax.tree.map(of_example, arguments),
        out_specs=jax.tree.map(of_example, outputs),
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(
            num_warps=form.tiles.warps, num_stages=form.tiles.stages
        ),
        interpret=INTERPRET,
    )(*arguments)


def of_each_row(student, heads):
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
        name: of_each_row(student, form.student.heads)
        for name in ("divergence", "normalizer", "center")
    }
    of_teacher = of_each_row(student, form.teacher.heads)
    if mixture is None:
        outputs["teacher_normalizer"] = of_teacher
    else:
        normalizer = launch(
            normalizer_kernel,
            form,
            bounds.forward,
            form.teacher.heads,
            models,
            (),
            of_teacher,
        )
        teacher = teacher._replace(normalizer=normalizer)
        models = models._replace(teacher=teacher)
    outputs = launch(
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
    outputs = launch(
        query_gradient_kernel,
        form,
        bounds.query,
        form.student.heads,
        models,
        (center, upstream),
        outputs,
    )
    of_key = launch(
        key_gradient_kernel,
        forms.key,
        bounds.key,
        form.student.key_heads,
        models,
        (center, upstream),
        jax.typeof(student.key),
    )
    of_mixture = None
    if mixture is not None:
        of_mixture = jnp.sum(outputs["mixture"], axis=(0, 2))[None]
        of_mixture = of_mixture[..., : form.teacher.heads]
    return (outputs["query"], of_key, of_mixture), None


divergence.defvjp(forward, backward)


class Padding(NamedTuple):
    """What lengths are multiples of, to have whole tiles of every kernel's."""

    rows: int
    keys: int

    @classmethod
    def of(cls, forms):
        # Sizes are powers of 2.
        return cls(
            max(form.tiles.rows for form in forms),
            max(form.tiles.keys for form in forms),
        )

    def queries(self, array):
        return of_width(pad(array, 1, self.rows))

    def keys_or_values(self, array):
        return of_width(pad(array, 1, self.keys))

    def places(self, places):
        """Rows beyond the last are copies of it, whose gradient is 0."""
        kinds, row_index, row_share, key_share = places
        return tiles.Places(
            pad(kinds, 1, self.keys),
            pad(row_index, 0, self.rows, mode="edge"),
            None if row_share is None else pad(row_share, 1, self.rows),
            None if key_share is None else pad(key_share, 1, self.keys),
        )


def of_width(array):
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
    """Those of a kernel whose programs keep tiles of `own`."""
    count = own.size // own.shape[-1]
    chosen = tiles.choose_tiles(kernel, width, count, item_size, mixed)
    if chosen.in_registers:
        # Pallas cannot: there the tile takes the place of a stage's.
        chosen = chosen._replace(stages=max(chosen.stages - 1, 1))
    return chosen


def bounds_of(places, forms, window):
    return Kernels(
        tiles.row_bounds(places, forms.forward.tiles, window),
        tiles.row_bounds(places, forms.query.tiles, window),
        tiles.key_bounds(places, forms.key.tiles, window),
    )


def attention_divergence(student, teacher, mask, distance, mixture):
    specs = tiles.Spec.of(student), tiles.Spec.of(teacher)
    forms = Kernels(
        *(
            Form(
                *specs,
                float(student.scale),
                float(teacher.scale),
                mask.window,
                float(distance.exponent),
                choose_tiles(
                    kernel,
                    student.key if kernel == "key" else student.query,
                    max(spec.width for spec in specs),
                    max(
                        side.query.dtype.itemsize for side in (student, teacher)
                    ),
                    mixture is not None,
                ),
            )
            for kernel in Kernels._fields
        )
    )
    padding = Padding.of(forms)
    batch, rows = student.query.shape[:2]
    places = padding.places(tiles.Places.of(mask, distance, batch))
    trained = (
        padding.queries(student.query),
        padding.keys_or_values(student.key),
        None if mixture is None else mixture[None],
    )
    fixed = (
        padding.queries(teacher.query),
        padding.keys_or_values(teacher.key),
        places._replace(row_index=places.row_index[None]),
        bounds_of(places, forms, mask.window),
    )
    return divergence(forms, trained, fixed)[:, :, :rows]
