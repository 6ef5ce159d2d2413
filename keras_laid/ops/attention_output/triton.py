"""The output in fused kernels for torch on CUDA.

Maps exist only as tiles on the chip; README.md derives the gradients. Layout,
names and tiles are those of the divergence's kernels, which see the same masks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_laid.ops.attention import Distance
from keras_laid.ops.attention_divergence import tiles
from keras_laid.ops.attention_divergence import triton as kernels


class Form(NamedTuple):
    """What a kernel is compiled for."""

    spec: tiles.Spec
    value_width: int
    window: int | None
    tiles: tiles.Tiles
    over_rows: bool  # Whether a program visits tiles of rows, not of keys.


@triton.jit
def load_value(value, batch, head, key, spec: tl.constexpr):
    """The values that query head `head` reads."""
    key_head = head // (spec.heads // spec.key_heads)
    return kernels.load_tile(value, batch, key_head, key)


@triton.jit
def forward_step(
    state,
    side,
    value,
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
    """Running maxima, sums and outputs, after another tile of keys."""
    highest, total, output = state
    spec: tl.constexpr = form.spec
    key_values = kernels.load_key(side, batch, head, key, spec)
    s, unit = kernels.logits_tile(
        query, key_values, side.scale, spec.soft_cap, form
    )
    if CHECK:
        allowed = kernels.allowed_tile(
            places, batch, row, rows, key, keys, form
        )
        s = tl.where(allowed, s, -float("inf"))
    higher = tl.maximum(highest, tl.max(s, 1) * unit)
    terms = tl.exp2(s * unit - higher[:, None])
    keep = tl.exp2(highest - higher)[:, None]
    values = load_value(value, batch, head, key, spec)
    output = tl.dot(
        terms.to(values.dtype),
        values,
        output * keep,
        input_precision=kernels.FLOAT32,
    )
    return higher, total * keep + kernels.part_sums(terms), output


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    normalizer,
    scale,
    places,
    rows,
    keys,
    output,  # (batch, rows, heads, value width)
    form: tl.constexpr,
):
    """Outputs and normalizers."""
    spec: tl.constexpr = form.spec
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    side = kernels.Side(query, key, normalizer, scale)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query_values = kernels.load_own(
        query, batch, head, row, rows, ROWS, spec.heads, spec.width, form
    )
    rows, keys = kernels.filled(rows), kernels.filled(keys)
    width: tl.constexpr = kernels.tile_width(form.value_width)
    state = (
        tl.full([ROWS], kernels.LEAST, tl.float32),
        tl.zeros([ROWS, 8], tl.float32),
        tl.zeros([ROWS, width], tl.float32),
    )
    visited = kernels.tiles_of_keys(places, batch, row, rows, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for other in range(visited[part], visited[part + 1]):
                state = forward_step(
                    state,
                    side,
                    value,
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
    highest, total, of_row = state
    total = tl.sum(total, 1)
    # Rows without keys: the output is 0, and any normalizer will do.
    total = tl.where(total > 0.0, total, 1.0)
    heads: tl.constexpr = spec.heads
    kernels.store_rows(
        normalizer,
        highest + tl.log2(total),
        batch,
        head,
        row,
        rows,
        heads,
        form,
    )
    kernels.store_tile(output, of_row / total[:, None], batch, head, row)


@triton.jit
def slope_tile(
    side,
    places,
    mean,
    query,
    key_values,
    values,
    upstream,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The map, and the slope in `scale * query @ key`."""
    heads: tl.constexpr = form.spec.heads
    cap: tl.constexpr = form.spec.soft_cap
    s, unit = kernels.logits_tile(query, key_values, side.scale, cap, form)
    normalizer = kernels.load_rows(
        side.normalizer, batch, head, row, rows, heads, form, CHECK
    )
    p = tl.exp2(s * unit - kernels.of_rows(normalizer, form))
    if CHECK:
        allowed = kernels.allowed_tile(
            places, batch, row, rows, key, keys, form
        )
        p = tl.where(allowed, p, 0.0)
    if form.tiles.by_key:
        of_p = tl.dot(
            values, tl.trans(upstream), input_precision=kernels.FLOAT32
        )
    else:
        of_p = tl.dot(
            upstream, tl.trans(values), input_precision=kernels.FLOAT32
        )
    of_mean = kernels.load_rows(
        mean, batch, head, row, rows, heads, form, CHECK
    )
    slope = p * (of_p - kernels.of_rows(of_mean, form))
    if cap is not None:
        slope *= 1.0 - s * s
    return p, slope


@triton.jit
def query_step(
    of_query,
    side,
    value,
    places,
    mean,
    query,
    upstream,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradient of queries, after another tile of keys."""
    spec: tl.constexpr = form.spec
    key_values = kernels.load_key(side, batch, head, key, spec)
    _, slope = slope_tile(
        side,
        places,
        mean,
        query,
        key_values,
        load_value(value, batch, head, key, spec),
        upstream,
        batch,
        head,
        row,
        rows,
        key,
        keys,
        form,
        CHECK,
    )
    return kernels.dot_in_two(slope, key_values, of_query)


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    upstream,
    normalizer,
    mean,  # (batch, heads, rows): `upstream @ output`.
    scale,
    places,
    rows,
    keys,
    gradient,  # As the query.
    form: tl.constexpr,
):
    spec: tl.constexpr = form.spec
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    side = kernels.Side(query, key, normalizer, scale)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // spec.heads
    head = tl.program_id(1) % spec.heads
    row = tile * ROWS
    query_values = kernels.load_own(
        query, batch, head, row, rows, ROWS, spec.heads, spec.width, form
    )
    upstream_values = kernels.load_own(
        upstream,
        batch,
        head,
        row,
        rows,
        ROWS,
        spec.heads,
        form.value_width,
        form,
    )
    rows, keys = kernels.filled(rows), kernels.filled(keys)
    of_query = tl.zeros(query_values.shape, tl.float32)
    visited = kernels.tiles_of_keys(places, batch, row, rows, form)
    for part in tl.static_range(3):
        if part != 0 or form.window is not None:
            for other in range(visited[part], visited[part + 1]):
                of_query = query_step(
                    of_query,
                    side,
                    value,
                    places,
                    mean,
                    query_values,
                    upstream_values,
                    batch,
                    head,
                    row,
                    rows,
                    other * KEYS,
                    keys,
                    form,
                    part != 1,
                )
    of_query *= scale / kernels.lift(query_values.dtype)
    kernels.store_tile(gradient, of_query, batch, head, row)


@triton.jit
def key_step(
    state,
    side,
    places,
    mean,
    upstream,
    key_values,
    values,
    batch,
    head,
    row,
    rows,
    key,
    keys,
    form: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Gradients of keys and values, after another tile of rows."""
    of_key, of_value = state
    query = kernels.load_query(side, batch, head, row)
    of_row = kernels.load_tile(upstream, batch, head, row)
    p, slope = slope_tile(
        side,
        places,
        mean,
        query,
        key_values,
        values,
        of_row,
        batch,
        head,
        row,
        rows,
        key,
        keys,
        form,
        CHECK,
    )
    if not form.tiles.by_key:
        p, slope = tl.trans(p), tl.trans(slope)
    of_value = tl.dot(
        p.to(of_row.dtype), of_row, of_value, input_precision=kernels.FLOAT32
    )
    return kernels.dot_in_two(slope, query, of_key), of_value


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    upstream,
    normalizer,
    mean,
    scale,
    places,
    first_rows,  # See `tiles_of_rows`.
    rows,
    keys,
    gradient,  # As the key.
    value_gradient,
    form: tl.constexpr,
):
    """Gradients of keys and values."""
    spec: tl.constexpr = form.spec
    ROWS: tl.constexpr = form.tiles.rows
    KEYS: tl.constexpr = form.tiles.keys
    key_heads: tl.constexpr = spec.key_heads
    side = kernels.Side(query, key, normalizer, scale)
    tile = tl.program_id(0)
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    group: tl.constexpr = spec.heads // key_heads
    start = tile * KEYS
    key_values = kernels.load_own(
        key, batch, key_head, start, keys, KEYS, key_heads, spec.width, form
    )
    values = kernels.load_own(
        value,
        batch,
        key_head,
        start,
        keys,
        KEYS,
        key_heads,
        form.value_width,
        form,
    )
    state = (
        tl.zeros(key_values.shape, tl.float32),
        tl.zeros(values.shape, tl.float32),
    )
    rows, keys = kernels.filled(rows), kernels.filled(keys)
    visited = kernels.tiles_of_rows(
        places, first_rows, batch, tile, rows, keys, form
    )
    for head in range(key_head * group, key_head * group + group):
        for part in tl.static_range(3):
            for other in range(visited[part], visited[part + 1]):
                state = key_step(
                    state,
                    side,
                    places,
                    mean,
                    upstream,
                    key_values,
                    values,
                    batch,
                    head,
                    other * ROWS,
                    rows,
                    start,
                    keys,
                    form,
                    part != 1,
                )
    of_key, of_value = state
    of_key *= scale / kernels.lift(key_values.dtype)
    kernels.store_tile(gradient, of_key, batch, key_head, start)
    kernels.store_tile(value_gradient, of_value, batch, key_head, start)


class Call(NamedTuple):
    """All that has no gradient."""

    places: kernels.Places
    spec: tiles.Spec
    value_width: int
    scale: float
    window: int | None

    def form(self, kernel, own):
        """How a kernel is compiled, whose programs keep tiles of `own`."""
        batch, length, heads, _ = own.shape
        return Form(
            self.spec,
            self.value_width,
            self.window,
            tiles.choose_tiles(
                kernel,
                max(self.spec.width, self.value_width),
                batch * length * heads,
                own.element_size(),
                mixed=False,
            ),
            over_rows=kernel == "key_value",
        )


class Output(torch.autograd.Function):
    """The kernels, with a gradient for queries, keys and values."""

    @staticmethod
    def forward(ctx, query, key, value, call):
        form = call.form("forward", query)
        batch, rows, heads, _ = query.shape
        output = query.new_empty(
            (batch, rows, heads, call.value_width), dtype=torch.float32
        )
        normalizer = kernels.of_each_row(query)
        kernels.launch(
            forward_kernel,
            form,
            (triton.cdiv(rows, form.tiles.rows), batch * heads),
            own_tile(query, form.tiles.rows, form),
            kernels.descriptor(key, form.tiles.keys),
            kernels.descriptor(value, form.tiles.keys),
            normalizer,
            call.scale,
            call.places,
            rows,
            key.shape[1],
            kernels.descriptor(output, form.tiles.rows),
        )
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, output, normalizer = ctx.saved_tensors
        call = ctx.call
        batch, rows, heads, _ = query.shape
        keys, key_heads = key.shape[1:3]
        mean = torch.einsum("bihd,bihd->bhi", upstream, output)
        # It was rounded to that dtype before.
        upstream = upstream.to(value.dtype).contiguous()
        numbers = normalizer, kernels.fill(mean), call.scale, call.places
        form = call.form("query", query)
        of_query = torch.empty_like(query)
        kernels.launch(
            query_gradient_kernel,
            form,
            (triton.cdiv(rows, form.tiles.rows), batch * heads),
            own_tile(query, form.tiles.rows, form),
            kernels.descriptor(key, form.tiles.keys),
            kernels.descriptor(value, form.tiles.keys),
            own_tile(upstream, form.tiles.rows, form),
            *numbers,
            rows,
            keys,
            kernels.descriptor(of_query, form.tiles.rows),
        )
        form = call.form("key_value", key)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        kernels.launch(
            key_gradient_kernel,
            form,
            (triton.cdiv(keys, form.tiles.keys), batch * key_heads),
            kernels.descriptor(query, form.tiles.rows),
            own_tile(key, form.tiles.keys, form),
            own_tile(value, form.tiles.keys, form),
            kernels.descriptor(upstream, form.tiles.rows),
            *numbers,
            kernels.first_rows(call.places, form, keys),
            rows,
            keys,
            kernels.descriptor(of_key, form.tiles.keys),
            kernels.descriptor(of_value, form.tiles.keys),
        )
        return of_query, of_key, of_value, None


def own_tile(tensor, size, form):
    """How a program reads the tile that it keeps; see `load_own`."""
    if form.tiles.in_registers:
        return kernels.descriptor(tensor, size)
    return tensor


def attention_output(attention, value, mask):
    query, key, values = map(
        kernels.readable, (attention.query, attention.key, value)
    )
    index = mask.row_index
    # Distances weigh nothing here.
    distance = Distance(
        index[None], torch.arange(key.shape[1], device=index.device)[None]
    )
    call = Call(
        kernels.find_places(mask, distance, query.shape[0]),
        tiles.Spec.of(attention._replace(query=query, key=key)),
        values.shape[3],
        float(attention.scale),
        mask.window,
    )
    output = Output.apply(query, key, values, call)
    return output[..., : value.shape[3]].to(value.dtype)
