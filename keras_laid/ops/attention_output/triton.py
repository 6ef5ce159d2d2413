"""The output in fused kernels for torch on CUDA; README.md derives the sums.

The parts that all kernels share are in `fused_attention/triton.py`, which also
explains their layout and names.
"""

from typing import Any
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keras_laid.ops.attention import Distance
from keras_laid.ops.fused_attention import tiles
from keras_laid.ops.fused_attention import triton as kernels


class Inputs(NamedTuple):
    """The inputs of all programs of a kernel."""

    side: kernels.Side
    value: Any
    places: kernels.Places
    # For gradients: `upstream @ output` of each row, (batch, heads, rows), and
    # `upstream`, the gradient of the output.
    mean: Any
    upstream: Any


class Own(NamedTuple):
    """The data that a program keeps: tiles of its rows, or of its keys."""

    query_or_key: Any
    upstream_or_value: Any


class Visited(NamedTuple):
    """Rows and keys of one tile."""

    query: Any
    key: Any
    value: Any
    upstream: Any


class Form(NamedTuple):
    """The constants that a kernel is compiled with."""

    spec: tiles.Spec
    value_width: int
    window: int | None
    tiles: tiles.Tiles
    over_rows: bool  # Whether a program visits tiles of rows, not of keys.


@triton.jit
def forward_step(
    state, inputs, query, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    """Running maxima, sums and outputs, after another tile of keys."""
    highest, total, output = state
    spec: tl.constexpr = form.spec
    key = kernels.load_key_tile(inputs.side.key, tile, spec)
    s, unit = kernels.logits_tile(
        query, key, inputs.side.scale, spec.soft_cap, form
    )
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
        s = tl.where(allowed, s, -float("inf"))
    higher = tl.maximum(highest, tl.max(s, 1) * unit)
    terms = tl.exp2(s * unit - higher[:, None])
    keep = tl.exp2(highest - higher)[:, None]
    value = kernels.load_key_tile(inputs.value, tile, spec)
    output = tl.dot(
        terms.to(value.dtype),
        value,
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
    side = kernels.Side(query, key, normalizer, scale)
    inputs = Inputs(side, value, places, None, None)
    tile = kernels.own_rows(rows, keys, spec.heads, form)
    own = kernels.load_own_rows(query, tile, rows, spec.heads, spec.width, form)
    width: tl.constexpr = kernels.tile_width(form.value_width)
    state = (
        tl.full([ROWS], kernels.LEAST, tl.float32),
        tl.zeros([ROWS, 8], tl.float32),
        tl.zeros([ROWS, width], tl.float32),
    )
    highest, total, row_output = kernels.for_each_keys(
        forward_step, state, inputs, own, tile, form
    )
    total = tl.sum(total, 1)
    # For rows without keys the output is 0, and any normalizer will do.
    total = tl.where(total > 0.0, total, 1.0)
    kernels.store_rows(
        normalizer, highest + tl.log2(total), tile, spec.heads, form
    )
    row_output /= total[:, None]
    kernels.store_tile(output, row_output, tile.batch, tile.head, tile.row)


@triton.jit
def slope_tile(inputs, here, tile, form: tl.constexpr, CHECK: tl.constexpr):
    """The map, and the slope in `scale * query @ key`, of a `Visited` tile."""
    heads: tl.constexpr = form.spec.heads
    cap: tl.constexpr = form.spec.soft_cap
    s, unit = kernels.logits_tile(
        here.query, here.key, inputs.side.scale, cap, form
    )
    normalizer = kernels.load_rows(
        inputs.side.normalizer, tile, heads, form, CHECK
    )
    p = tl.exp2(s * unit - kernels.broadcast_rows(normalizer, form))
    if CHECK:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
        p = tl.where(allowed, p, 0.0)
    if form.tiles.by_key:
        p_slope = tl.dot(
            here.value, tl.trans(here.upstream), input_precision=kernels.FLOAT32
        )
    else:
        p_slope = tl.dot(
            here.upstream, tl.trans(here.value), input_precision=kernels.FLOAT32
        )
    row_mean = kernels.load_rows(inputs.mean, tile, heads, form, CHECK)
    slope = p * (p_slope - kernels.broadcast_rows(row_mean, form))
    if cap is not None:
        slope *= 1.0 - s * s
    return p, slope


@triton.jit
def query_step(
    gradient, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr
):
    """Gradient of queries, after another tile of keys."""
    spec: tl.constexpr = form.spec
    query, upstream = own.query_or_key, own.upstream_or_value
    key = kernels.load_key_tile(inputs.side.key, tile, spec)
    value = kernels.load_key_tile(inputs.value, tile, spec)
    here = Visited(query, key, value, upstream)
    _, slope = slope_tile(inputs, here, tile, form, CHECK)
    return kernels.dot_in_two(slope, key, gradient)


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
    gradient,  # Of the shape of the query.
    form: tl.constexpr,
):
    spec: tl.constexpr = form.spec
    side = kernels.Side(query, key, normalizer, scale)
    inputs = Inputs(side, value, places, mean, upstream)
    tile = kernels.own_rows(rows, keys, spec.heads, form)
    own = Own(
        kernels.load_own_rows(query, tile, rows, spec.heads, spec.width, form),
        kernels.load_own_rows(
            upstream, tile, rows, spec.heads, form.value_width, form
        ),
    )
    query_sum = tl.zeros(own.query_or_key.shape, tl.float32)
    query_sum = kernels.for_each_keys(
        query_step, query_sum, inputs, own, tile, form
    )
    query_sum *= scale / kernels.lift(own.query_or_key.dtype)
    kernels.store_tile(gradient, query_sum, tile.batch, tile.head, tile.row)


@triton.jit
def key_step(state, inputs, own, tile, form: tl.constexpr, CHECK: tl.constexpr):
    """Gradients of keys and values, after another tile of rows."""
    key_sum, value_sum = state
    key, value = own.query_or_key, own.upstream_or_value
    query = kernels.load_row_tile(inputs.side.query, tile)
    upstream = kernels.load_row_tile(inputs.upstream, tile)
    here = Visited(query, key, value, upstream)
    p, slope = slope_tile(inputs, here, tile, form, CHECK)
    if not form.tiles.by_key:
        p, slope = tl.trans(p), tl.trans(slope)
    value_sum = tl.dot(
        p.to(upstream.dtype),
        upstream,
        value_sum,
        input_precision=kernels.FLOAT32,
    )
    return kernels.dot_in_two(slope, query, key_sum), value_sum


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
    gradient,  # Of the shape of the key.
    value_gradient,
    form: tl.constexpr,
):
    """Gradients of keys and values."""
    spec: tl.constexpr = form.spec
    key_heads: tl.constexpr = spec.key_heads
    group: tl.constexpr = spec.heads // key_heads
    side = kernels.Side(query, key, normalizer, scale)
    inputs = Inputs(side, value, places, mean, upstream)
    tile = kernels.own_keys(rows, keys, key_heads, form)
    key_head = tile.head
    own = Own(
        kernels.load_own_keys(key, tile, keys, key_heads, spec.width, form),
        kernels.load_own_keys(
            value, tile, keys, key_heads, form.value_width, form
        ),
    )
    state = (
        tl.zeros(own.query_or_key.shape, tl.float32),
        tl.zeros(own.upstream_or_value.shape, tl.float32),
    )
    visited = kernels.tiles_of_rows(places, first_rows, tile, form)
    for head in range(key_head * group, key_head * group + group):
        state = kernels.for_each_rows(
            key_step,
            state,
            inputs,
            own,
            kernels.at_head(tile, head),
            visited,
            form,
        )
    key_sum, value_sum = state
    key_sum *= scale / kernels.lift(own.query_or_key.dtype)
    kernels.store_tile(gradient, key_sum, tile.batch, key_head, tile.key)
    kernels.store_tile(
        value_gradient, value_sum, tile.batch, key_head, tile.key
    )


class Call(NamedTuple):
    """The arguments without a gradient."""

    places: kernels.Places
    spec: tiles.Spec
    value_width: int
    scale: float
    window: int | None

    def form(self, kernel, own):
        """The constants of a kernel whose programs keep tiles of `own`."""
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
        normalizer = kernels.empty_rows(query)
        kernels.launch(
            forward_kernel,
            form,
            (triton.cdiv(rows, form.tiles.rows), batch * heads),
            kernels.own_tile(query, form.tiles.rows, form),
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
        # Exact: the output is cast to this dtype, so the gradient had it.
        upstream = upstream.to(value.dtype).contiguous()
        numbers = normalizer, kernels.fill(mean), call.scale, call.places
        form = call.form("query", query)
        query_gradient = torch.empty_like(query)
        kernels.launch(
            query_gradient_kernel,
            form,
            (triton.cdiv(rows, form.tiles.rows), batch * heads),
            kernels.own_tile(query, form.tiles.rows, form),
            kernels.descriptor(key, form.tiles.keys),
            kernels.descriptor(value, form.tiles.keys),
            kernels.own_tile(upstream, form.tiles.rows, form),
            *numbers,
            rows,
            keys,
            kernels.descriptor(query_gradient, form.tiles.rows),
        )
        form = call.form("key_value", key)
        key_gradient, value_gradient = (
            torch.empty_like(key),
            torch.empty_like(value),
        )
        kernels.launch(
            key_gradient_kernel,
            form,
            (triton.cdiv(keys, form.tiles.keys), batch * key_heads),
            kernels.descriptor(query, form.tiles.rows),
            kernels.own_tile(key, form.tiles.keys, form),
            kernels.own_tile(value, form.tiles.keys, form),
            kernels.descriptor(upstream, form.tiles.rows),
            *numbers,
            kernels.first_rows(call.places, form, keys),
            rows,
            keys,
            kernels.descriptor(key_gradient, form.tiles.keys),
            kernels.descriptor(value_gradient, form.tiles.keys),
        )
        return query_gradient, key_gradient, value_gradient, None


def attention_output(attention, value, mask):
    query, key, values = map(
        kernels.readable, (attention.query, attention.key, value)
    )
    index = mask.row_index
    # Places need positions, but no weights are used: any positions will do.
    distance = Distance(
        index[None], torch.arange(key.shape[1], device=index.device)[None]
    )
    call = Call(
        kernels.find_places(mask, distance, query.shape[0]),
        tiles.Spec.from_attention(attention._replace(query=query, key=key)),
        values.shape[3],
        float(attention.scale),
        mask.window,
    )
    output = Output.apply(query, key, values, call)
    return output[..., : value.shape[3]].to(value.dtype)
