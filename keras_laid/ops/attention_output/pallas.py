"""The output in fused kernels for JAX on GPUs, the twin of triton.py.

Maps exist only as tiles on the chip; README.md derives the gradients. Layout,
names and tiles are those of the divergence's kernels, which see the same masks.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from keras_laid.ops.attention_divergence import pallas as kernels
from keras_laid.ops.attention_divergence import tiles


class Inputs(NamedTuple):
    """What every kernel reads; in a kernel, references to one example's."""

    query: Any  # (batch, rows, heads, width)
    key: Any  # (batch, keys, key heads, width)
    value: Any  # (batch, keys, key heads, value width)
    places: tiles.Places


class Slopes(NamedTuple):
    """What gradients are made of, for each row."""

    normalizer: Any  # Log-sum-exp: (batch, heads, rows).
    mean: Any  # Likewise: `upstream @ output`.
    upstream: Any  # (batch, rows, heads, value width)


class Form(NamedTuple):
    """What a kernel is compiled for."""

    spec: tiles.Spec
    scale: float
    window: int | None
    tiles: tiles.Tiles


def load_value(inputs, head, key, form):
    """The values that query head `head` reads."""
    key_head = head // (form.spec.heads // form.spec.key_heads)
    return inputs.value[kernels.keys_from(key, form), key_head, :]


def logits_tile(query, keys, form):
    cap = form.spec.soft_cap
    return kernels.logits_tile(query, keys, form.scale, cap, form)


def forward_kernel(inputs, bounds, outputs, *, form):
    """Outputs and normalizers, from running maxima and sums."""
    tile, row, head = kernels.own_rows(form)
    rows = kernels.rows_from(row, form)
    query = kernels.load_query(inputs, head, row, form)

    def step(key, check, state):
        highest, total, output = state
        keys = kernels.load_key(inputs, head, key, form.spec, form)
        s, unit = logits_tile(query, keys, form)
        if check:
            allowed = kernels.allowed_tile(inputs.places, row, key, form)
            s = jnp.where(allowed, s, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(s, axis=1) * unit)
        terms = kernels.exp2(s * unit - higher[:, None])
        keep = kernels.exp2(highest - higher)[:, None]
        values = load_value(inputs, head, key, form)
        return (
            higher,
            total * keep + kernels.part_sums(terms),
            output * keep + kernels.dot(terms.astype(values.dtype), values),
        )

    size = form.tiles.rows
    state = (
        jnp.full(size, kernels.LEAST, jnp.float32),
        jnp.zeros((size, kernels.PARTS), jnp.float32),
        jnp.zeros((size, inputs.value.shape[-1]), jnp.float32),
    )
    highest, total, output = kernels.for_each_keys(
        bounds, tile, step, state, form
    )
    total = jnp.sum(total, axis=1)
    # Rows without keys: the output is 0, and any normalizer will do.
    total = jnp.where(total > 0.0, total, 1.0)
    outputs["output"][rows, head, :] = output / total[:, None]
    outputs["normalizer"][head, rows] = highest + kernels.log2(total)


def slope_tile(
    inputs, slopes, query, keys, values, head, row, key, check, form
):
    """The map, the slope in `scale * query @ key`, and that at the output."""
    rows = kernels.rows_from(row, form)
    upstream = slopes.upstream[rows, head, :]
    normalizer = kernels.of_rows(slopes.normalizer[head, rows], form)
    mean = kernels.of_rows(slopes.mean[head, rows], form)
    allowed = None
    if check:
        allowed = kernels.allowed_tile(inputs.places, row, key, form)
    s, unit = logits_tile(query, keys, form)
    p = kernels.exp2(s * unit - normalizer)
    p = kernels.where_allowed(allowed, p, 0.0)
    if form.tiles.by_key:
        of_p = kernels.dot(values, upstream.T)
    else:
        of_p = kernels.dot(upstream, values.T)
    slope = p * (of_p - mean)
    if form.spec.soft_cap is not None:
        slope *= 1.0 - s * s
    return p, slope, upstream


def query_gradient_kernel(inputs, bounds, slopes, gradient, *, form):
    tile, row, head = kernels.own_rows(form)
    query = kernels.load_query(inputs, head, row, form)

    def step(key, check, of_query):
        keys = kernels.load_key(inputs, head, key, form.spec, form)
        values = load_value(inputs, head, key, form)
        _, slope, _ = slope_tile(
            inputs, slopes, query, keys, values, head, row, key, check, form
        )
        return kernels.dot_in_two(slope, keys, of_query)

    of_query = jnp.zeros(query.shape, jnp.float32)
    of_query = kernels.for_each_keys(bounds, tile, step, of_query, form)
    of_query *= form.scale / kernels.lift_of(query.dtype)
    rows = kernels.rows_from(row, form)
    gradient[rows, head, :] = of_query.astype(gradient.dtype)


def key_gradient_kernel(inputs, bounds, slopes, gradients, *, form):
    """Gradients of keys and values."""
    tile, key_head = pl.program_id(0), pl.program_id(2)
    group = form.spec.heads // form.spec.key_heads
    key = tile * form.tiles.keys
    own = kernels.keys_from(key, form)
    keys, values = inputs.key[own, key_head, :], inputs.value[own, key_head, :]

    def of_head(member, state):
        head = key_head * group + member

        def step(row, check, state):
            of_key, of_value = state
            query = kernels.load_query(inputs, head, row, form)
            p, slope, upstream = slope_tile(
                inputs, slopes, query, keys, values, head, row, key, check, form
            )
            if not form.tiles.by_key:
                p, slope = p.T, slope.T
            return (
                kernels.dot_in_two(slope, query, of_key),
                of_value + kernels.dot(p.astype(upstream.dtype), upstream),
            )

        return kernels.for_each_rows(bounds, tile, step, state, form)

    state = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    of_key, of_value = lax.fori_loop(0, group, of_head, state)
    of_key *= form.scale / kernels.lift_of(keys.dtype)
    for name, array in (("key", of_key), ("value", of_value)):
        gradient = gradients[name]
        gradient[own, key_head, :] = array.astype(gradient.dtype)


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
    # It was rounded to that dtype before.
    upstream = upstream.astype(inputs.value.dtype)
    slopes = Slopes(outputs["normalizer"], mean, upstream)
    arguments = (inputs, (slopes,))
    of_query = kernels.launch(
        query_gradient_kernel,
        forms.query,
        bounds.query,
        forms.query.spec.heads,
        *arguments,
        jax.typeof(inputs.query),
    )
    of_keys = kernels.launch(
        key_gradient_kernel,
        forms.key,
        bounds.key,
        forms.key.spec.key_heads,
        *arguments,
        {name: jax.typeof(getattr(inputs, name)) for name in ("key", "value")},
    )
    return (of_query, of_keys["key"], of_keys["value"]), None


output.defvjp(forward, backward)


def attention_output(attention, value, mask):
    query, key = attention.query, attention.key
    forms = kernels.Kernels(
        *(
            Form(
                tiles.Spec.of(attention),
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
    padding = kernels.Padding.of(forms)
    places = padding.places(tiles.Places.of_mask(mask))
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
