"""The output in fused kernels for JAX on GPUs; README.md derives the sums.

The parts that all kernels share are in `fused_attention/pallas.py`, which also
explains their layout and names.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_laid.ops.fused_attention import pallas as kernels
from keras_laid.ops.fused_attention import tiles


class Inputs(NamedTuple):
    """The inputs of every kernel; in a kernel, references to one example."""

    query: Any  # (batch, rows, heads, width)
    key: Any  # (batch, keys, key heads, width)
    value: Any  # (batch, keys, key heads, value width)
    places: tiles.Places


class Slopes(NamedTuple):
    """The inputs of gradients, for each row."""

    normalizer: Any  # Log-sum-exp: (batch, heads, rows).
    mean: Any  # `upstream @ output`: (batch, heads, rows).
    upstream: Any  # (batch, rows, heads, value width)


class Form(NamedTuple):
    """The constants that a kernel is compiled with."""

    spec: tiles.Spec
    scale: float
    window: int | None
    tiles: tiles.Tiles


def logits_tile(query, key, form):
    cap = form.spec.soft_cap
    return kernels.logits_tile(query, key, form.scale, cap, form)


def forward_kernel(inputs, bounds, outputs, *, form):
    """Outputs and normalizers, from running maxima and sums."""
    own = kernels.own_rows(form)
    rows = kernels.rows_of(own, form)
    query = kernels.load_row_tile(inputs.query, own, form)

    def step(state, tile, check):
        highest, total, output = state
        key = kernels.load_key_tile(inputs.key, tile, form.spec, form)
        s, unit = logits_tile(query, key, form)
        if check:
            allowed = kernels.allowed_tile(inputs.places, tile, form)
            s = jnp.where(allowed, s, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(s, axis=1) * unit)
        terms = kernels.exp2(s * unit - higher[:, None])
        keep = kernels.exp2(highest - higher)[:, None]
        value = kernels.load_key_tile(inputs.value, tile, form.spec, form)
        return (
            higher,
            total * keep + kernels.part_sums(terms),
            output * keep + kernels.dot(terms.astype(value.dtype), value),
        )

    size = form.tiles.rows
    state = (
        jnp.full(size, kernels.LEAST, jnp.float32),
        jnp.zeros((size, kernels.PARTS), jnp.float32),
        jnp.zeros((size, inputs.value.shape[-1]), jnp.float32),
    )
    highest, total, output = kernels.for_each_keys(
        bounds, own, step, state, form
    )
    total = jnp.sum(total, axis=1)
    # For rows without keys the output is 0, and any normalizer will do.
    total = jnp.where(total > 0.0, total, 1.0)
    outputs["output"][rows, own.head, :] = output / total[:, None]
    outputs["normalizer"][own.head, rows] = highest + kernels.log2(total)


def slope_tile(inputs, slopes, own, tile, check, form):
    """The map, the slope in `scale * query @ key`, and that in the output.

    `own` holds the queries, keys and values of the tile.
    """
    query, key, value = own
    rows = kernels.rows_of(tile, form)
    upstream = slopes.upstream[rows, tile.head, :]
    normalizer = kernels.broadcast_rows(
        slopes.normalizer[tile.head, rows], form
    )
    mean = kernels.broadcast_rows(slopes.mean[tile.head, rows], form)
    allowed = None
    if check:
        allowed = kernels.allowed_tile(inputs.places, tile, form)
    s, unit = logits_tile(query, key, form)
    p = kernels.exp2(s * unit - normalizer)
    p = kernels.where_allowed(allowed, p, 0.0)
    if form.tiles.by_key:
        p_slope = kernels.dot(value, upstream.T)
    else:
        p_slope = kernels.dot(upstream, value.T)
    slope = p * (p_slope - mean)
    if form.spec.soft_cap is not None:
        slope *= 1.0 - s * s
    return p, slope, upstream


def query_gradient_kernel(inputs, bounds, slopes, gradient, *, form):
    own = kernels.own_rows(form)
    query = kernels.load_row_tile(inputs.query, own, form)

    def step(query_gradient, tile, check):
        key = kernels.load_key_tile(inputs.key, tile, form.spec, form)
        value = kernels.load_key_tile(inputs.value, tile, form.spec, form)
        _, slope, _ = slope_tile(
            inputs, slopes, (query, key, value), tile, check, form
        )
        return kernels.dot_in_two(slope, key, query_gradient)

    query_gradient = jnp.zeros(query.shape, jnp.float32)
    query_gradient = kernels.for_each_keys(
        bounds, own, step, query_gradient, form
    )
    query_gradient *= form.scale / kernels.lift_of(query.dtype)
    rows = kernels.rows_of(own, form)
    gradient[rows, own.head, :] = query_gradient.astype(gradient.dtype)


def key_gradient_kernel(inputs, bounds, slopes, gradients, *, form):
    """Gradients of keys and values."""
    own = kernels.own_keys(form)
    group = form.spec.heads // form.spec.key_heads
    where = kernels.keys_of(own, form), own.head, slice(None)
    key, value = inputs.key[where], inputs.value[where]

    def add_head(member, state):
        query_tile = own._replace(head=own.head * group + member)

        def step(state, tile, check):
            key_gradient, value_gradient = state
            query = kernels.load_row_tile(inputs.query, tile, form)
            p, slope, upstream = slope_tile(
                inputs, slopes, (query, key, value), tile, check, form
            )
            if not form.tiles.by_key:
                p, slope = p.T, slope.T
            return (
                kernels.dot_in_two(slope, query, key_gradient),
                value_gradient
                + kernels.dot(p.astype(upstream.dtype), upstream),
            )

        return kernels.for_each_rows(bounds, query_tile, step, state, form)

    state = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    key_gradient, value_gradient = lax.fori_loop(0, group, add_head, state)
    key_gradient *= form.scale / kernels.lift_of(key.dtype)
    for name, array in (("key", key_gradient), ("value", value_gradient)):
        gradient = gradients[name]
        gradient[where] = array.astype(gradient.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def output(forms, trained, fixed):
    return forward(forms, trained, fixed)[0]


def forward(forms, trained, fixed):
    query, _, value = trained
    places, bounds = fixed
    inputs = Inputs(*trained, places)
    batch, rows, heads, _ = query.shape
    shapes = {
        "output": (batch, rows, heads, value.shape[-1]),
        "normalizer": (batch, heads, rows),
    }
    outputs = kernels.launch(
        forward_kernel,
        forms.forward,
        bounds.forward,
        heads,
        inputs,
        (),
        {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        },
    )
    return outputs["output"], (inputs, bounds, outputs)


def backward(forms, residuals, upstream):
    inputs, bounds, outputs = residuals
    mean = jnp.einsum("bihd,bihd->bhi", upstream, outputs["output"])
    # Exact: the caller casts the output to this dtype, so the gradient had it.
    upstream = upstream.astype(inputs.value.dtype)
    slopes = Slopes(outputs["normalizer"], mean, upstream)
    arguments = (inputs, (slopes,))
    query_gradient = kernels.launch(
        query_gradient_kernel,
        forms.query,
        bounds.query,
        forms.query.spec.heads,
        *arguments,
        jax.typeof(inputs.query),
    )
    key_gradients = kernels.launch(
        key_gradient_kernel,
        forms.key,
        bounds.key,
        forms.key.spec.key_heads,
        *arguments,
        {name: jax.typeof(getattr(inputs, name)) for name in ("key", "value")},
    )
    return (
        query_gradient,
        key_gradients["key"],
        key_gradients["value"],
    ), None


output.defvjp(forward, backward)


def attention_output(attention, value, mask):
    query, key = attention.query, attention.key
    forms = kernels.Kernels(
        *(
            Form(
                tiles.Spec.from_attention(attention),
                float(attention.scale),
                mask.window,
                kernels.choose_tiles(
                    kernel,
                    own,
                    max(query.shape[-1], value.shape[-1]),
                    query.dtype.itemsize,
                    mixed=False,
                ),
            )
            for kernel, own in (
                ("forward", query),
                ("query", query),
                ("key_value", key),
            )
        )
    )
    padding = kernels.Padding.from_forms(forms)
    places = padding.places(tiles.Places.from_mask(mask))
    trained = (
        padding.queries(query),
        padding.keys_or_values(key),
        padding.keys_or_values(value),
    )
    fixed = (
        places._replace(row_index=places.row_index[None]),
        kernels.bounds_of(places, forms, mask.window),
    )
    whole = output(forms, trained, fixed)
    whole = whole[:, : query.shape[1], :, : value.shape[3]]
    return whole.astype(value.dtype)
