"""Attention over blocks of rows: no whole map ever exists.

The forward pass keeps the output and the normalizer of each row; the backward
pass computes the maps again.
"""

from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention_output import definition
from keras_laid.ops.own_gradient import with_own_gradient
from keras_laid.ops.row_blocks import RowBlocks
from keras_laid.ops.row_blocks import rows_of_block
from keras_laid.typing import Tensor


class Block(NamedTuple):
    """The op's arguments for some of the rows."""

    attention: Attention
    value: Tensor | None
    mask: AttentionMask

    def map_rows(self, rows):
        """A copy with `rows(tensor, axis)` of every tensor that has rows."""
        query = rows(self.attention.query, 1)
        row_index = rows(self.mask.row_index, 0)
        return self._replace(
            attention=self.attention._replace(query=query),
            mask=self.mask._replace(row_index=row_index),
        )

    def map(self, logits, normalizer):
        exponent = logits - normalizer[..., None]
        return ops.where(self.mask.allowed(), ops.exp(exponent), 0.0)

    def logits(self):
        return ops.where(self.mask.allowed(), self.attention.logits(), MASKED)

    def output(self):
        """The output and the normalizer of each row."""
        logits = self.logits()
        normalizer = ops.logsumexp(logits, axis=-1)
        p = self.map(logits, normalizer)
        value = self.attention.repeat_heads(self.value)
        return ops.einsum("bhij,bjhd->bihd", p, value), normalizer

    def gradients(self, upstream, output, normalizer):
        """Gradients of queries, keys and values, in float32."""
        # b = batch, h = head, i = row, j = key, d = head dim or value dim
        attention = self.attention
        logits = self.logits()
        p = self.map(logits, normalizer)
        value = attention.repeat_heads(self.value)
        p_slope = ops.einsum("bihd,bjhd->bhij", upstream, value)
        mean = ops.transpose(ops.sum(upstream * output, axis=-1), (0, 2, 1))
        slope = p * (p_slope - mean[..., None]) * attention.scale
        if attention.soft_cap is not None:
            # Masked logits are far below minus the cap.
            share = ops.maximum(logits / attention.soft_cap, -1.0)
            slope = slope * (1.0 - ops.square(share))
        query = ops.cast(attention.query, "float32")
        key = attention.key_of_each_head()
        return (
            ops.einsum("bhij,bjhd->bihd", slope, key),
            ops.einsum("bhij,bihd->bjhd", slope, query),
            ops.einsum("bhij,bihd->bjhd", p, upstream),
        )


def attention_output(attention, value, mask):
    batch, rows, heads, _ = ops.shape(attention.query)
    size = rows_of_block(rows, ops.shape(attention.key)[1])
    if isinstance(size, int) and rows <= size:
        return definition.attention_output(attention, value, mask)
    blocks = RowBlocks(rows, size)

    def outputs(constants, query, key, value):
        attention = constants.attention._replace(query=query, key=key)
        every = constants._replace(attention=attention, value=value)
        every = every.map_rows(blocks.fill)
        shape = (batch, blocks.filled, heads, value.shape[3])

        def add_output(number, kept):
            output, normalizer = every.map_rows(blocks.slicer(number)).output()
            return [
                blocks.put(kept[0], number, 1, output),
                blocks.put(kept[1], number, 2, normalizer),
            ]

        output, normalizer = ops.fori_loop(
            0,
            blocks.count,
            add_output,
            [ops.zeros(shape), ops.zeros((batch, heads, blocks.filled))],
        )

        def gradients(upstream):
            upstream = ops.cast(upstream, "float32")
            # Rows that only fill up a block get a gradient of 0.
            upstream = blocks.fill_zeros(upstream, 1)

            def add_gradients(number, sums):
                rows_of = blocks.slicer(number)
                query_gradient, *others = every.map_rows(rows_of).gradients(
                    rows_of(upstream, 1),
                    rows_of(output, 1),
                    rows_of(normalizer, 2),
                )
                queries = blocks.put(sums[0], number, 1, query_gradient)
                added = zip(sums[1:], others, strict=True)
                return [queries, *[a + b for a, b in added]]

            key_shape = ops.shape(key)[:3]
            keys = key_shape[1]
            query_gradient, *key_gradients = ops.fori_loop(
                0,
                blocks.count,
                add_gradients,
                [
                    ops.zeros((batch, blocks.filled, heads, query.shape[3])),
                    ops.zeros((batch, keys, heads, key.shape[3])),
                    ops.zeros((batch, keys, heads, value.shape[3])),
                ],
            )
            # The gradient of a key head is the sum over heads that read it.
            key_gradient, value_gradient = [
                ops.sum(
                    ops.reshape(each, (*key_shape, -1, each.shape[3])), axis=3
                )
                for each in key_gradients
            ]
            return [
                ops.cast(query_gradient[:, :rows], query.dtype),
                ops.cast(key_gradient, key.dtype),
                ops.cast(value_gradient, value.dtype),
            ]

        return ops.cast(output[:, :rows], value.dtype), gradients

    variables = [attention.query, attention.key, value]
    attention = attention._replace(query=None, key=None)
    constants = Block(attention, None, mask)
    return with_own_gradient(outputs, variables, constants)
