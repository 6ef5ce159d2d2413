"""Runs Qwen 3.5's linear layers without loops.

KerasHub computes these layers in chunks of 64 tokens, with a Python loop over
the tokens of a chunk and another over the chunks. A compiled step of a long
prompt then has so many operations that it takes very long to compile. Here a
triangular system takes the place of the first loop, and an associative scan
that of the second. Outputs are the same, up to rounding.

Reference:
 - [Yang et al., 2024](https://arxiv.org/abs/2412.06464), section 3.3.
"""

import contextlib
from collections.abc import Iterator

import keras
from keras import ops
from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net as kerashub

from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import has_linear_layers
from keras_laid.typing import Tensor

CHUNK = 64  # Tokens.


@contextlib.contextmanager
def linear_layers_without_loops(model: keras.Model) -> Iterator[None]:
    """Scope in which Qwen 3.5's linear layers have no loops.

    For other families nothing changes.
    """
    if not has_linear_layers(model):
        yield
        return
    name = "_chunk_gated_delta_rule"
    with replaced_method(kerashub, name, gated_delta_rule):
        yield


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The outputs of a gated delta rule, for the tokens of whole prompts.

    Each head has a matrix `S`, its state. For each token, `S` is multiplied by
    `exp(g)`; then `outer(key, beta * (value - key @ S))` is added to it; and
    the output is `query @ S`. Queries and keys have length 1 in this, and
    outputs are divided by the square root of `key_dim`.

    Args:
        query: Tensor of shape `(batch, length, heads, key_dim)`.
        key: Tensor of the same shape.
        value: Tensor of shape `(batch, length, heads, value_dim)`.
        g: Tensor of shape `(batch, length, heads)`, 0 or less.
        beta: Tensor of the same shape, from 0 to 1.
        initial_state: Optional tensor of shape
            `(batch, heads, key_dim, value_dim)`. Defaults to `None`, zeros.
        output_final_state: Boolean, whether the last state is returned.
        padding_mask: Not used, as in KerasHub, where keys and values of padding
            are 0.

    Returns:
        A tuple of a tensor of the shape and dtype of `value`, and a tensor of
        the shape of `initial_state`, or `None`.
    """
    length, key_dim = query.shape[1], query.shape[-1]
    dtype = query.dtype
    query, key, value, g, beta = (
        in_chunks(each)
        for each in (normalized(query), normalized(key), value, g, beta)
    )
    query = query * key_dim**-0.5

    # The decay from each token of a chunk to each later one, or itself.
    g = ops.cumsum(g, axis=-1)
    causal = ops.tril(ops.ones((CHUNK, CHUNK)))
    decay = ops.exp((g[..., :, None] - g[..., None, :]) * causal) * causal

    # What a token writes depends on what all earlier ones have written.
    weighted_key = key * beta[..., None]
    earlier = ops.tril(weighted_key @ transposed(key) * decay, k=-1)
    written = ops.solve_triangular(
        earlier + ops.eye(CHUNK),
        ops.concatenate(
            [
                value * beta[..., None],
                weighted_key * ops.exp(g)[..., None],
            ],
            axis=-1,
        ),
        lower=True,
    )
    new_value = written[..., : value.shape[-1]]
    new_key = written[..., value.shape[-1] :]

    # A chunk turns the state S into `factor @ S + term`.
    last = g[..., -1:]
    key_at_end = transposed(key * ops.exp(last - g)[..., None])
    decayed = ops.exp(last)[..., None] * ops.eye(key_dim)
    steps = decayed - key_at_end @ new_key, key_at_end @ new_value
    factors, terms = ops.associative_scan(after, steps)
    if initial_state is None:
        first = ops.zeros_like(terms[:1])
    else:
        first = ops.cast(initial_state, "float32")[None]
        terms = factors @ first + terms
    state = ops.concatenate([first, terms[:-1]], axis=0)

    within = ops.tril(query @ transposed(key) * decay)
    output = (query * ops.exp(g)[..., None]) @ state
    output = output + within @ (new_value - new_key @ state)
    output = ops.cast(from_chunks(output)[:, :length], dtype)
    return output, terms[-1] if output_final_state else None


def after(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Two maps of a state, one after the other, as one map."""
    factor, term = first
    next_factor, next_term = second
    return next_factor @ factor, next_factor @ term + next_term


def normalized(x: Tensor) -> Tensor:
    return x * ops.rsqrt(ops.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def transposed(x: Tensor) -> Tensor:
    return ops.swapaxes(x, -1, -2)


def in_chunks(x: Tensor) -> Tensor:
    """From `(batch, length, heads, ...)` to `(chunks, batch, heads, 64, ...)`.

    In float32, and with zeros at the end.
    """
    batch, length, *rest = x.shape
    padding = [(0, 0)] * len(x.shape)
    padding[1] = 0, -length % CHUNK
    x = ops.pad(ops.cast(x, "float32"), padding)
    x = ops.reshape(x, (ops.shape(x)[0], -1, CHUNK, *rest))
    others = range(4, len(x.shape))
    return ops.transpose(x, (1, 0, 3, 2, *others))


def from_chunks(x: Tensor) -> Tensor:
    """From `(chunks, batch, heads, 64, n)` to `(batch, length, heads, n)`."""
    x = ops.transpose(x, (1, 0, 3, 2, 4))
    return ops.reshape(x, (ops.shape(x)[0], -1, *x.shape[3:]))
