"""Attention pooled over segments, over blocks of rows: no whole map exists.

README.md derives the gradient.
"""

from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.own_gradient import with_own_gradient
from keras_laid.ops.row_blocks import RowBlocks
from keras_laid.ops.row_blocks import rows_of_block
from keras_laid.ops.segment_attention import definition
from keras_laid.typing import Tensor


class Block(NamedTuple):
    """The op's arguments for some of the rows."""

    attention: Attention
    mask: AttentionMask
    segments: Tensor
    num_segments: int | Tensor

    def map_rows(self, rows):
        """A copy with `rows(tensor, axis)` of every tensor that has rows."""
        attention, mask = self.attention, self.mask
        return self._replace(
            attention=attention._replace(query=rows(attention.query, 1)),
            mask=mask._replace(row_index=rows(mask.row_index, 0)),
        )

    def gradients(self, upstream, log_shares):
        """Gradients of queries and keys, in float32."""
        # b = batch, h = head, i = row, j = key, g = segment, d = head dim
        attention = self.attention
        allowed = self.mask.allowed()
        logits = ops.where(allowed, attention.logits(), MASKED)
        log_a = ops.where(allowed, ops.log_softmax(logits), MASKED)
        upstream = ops.where(log_shares > MASKED, upstream, 0.0)
        key_upstream = definition.per_key(upstream, self.segments)
        log_share = definition.per_key(log_shares, self.segments)
        total = ops.sum(upstream, axis=-1, keepdims=True)
        slope = key_upstream * ops.exp(log_a - log_share)
        slope = slope - total * ops.exp(log_a)
        slope = slope * attention.scale
        if attention.soft_cap is not None:
            # Masked logits are far below minus the cap.
            share = ops.maximum(logits / attention.soft_cap, -1.0)
            slope = slope * (1.0 - ops.square(share))
        query = ops.cast(attention.query, "float32")
        key = attention.key_of_each_head()
        return (
            ops.einsum("bhij,bjhd->bihd", slope, key),
            ops.einsum("bhij,bihd->bjhd", slope, query),
        )


def segment_attention(attention, mask, segments, num_segments):
    batch, rows, heads, _ = ops.shape(attention.query)
    size = rows_of_block(rows, ops.shape(attention.key)[1])
    if isinstance(size, int) and rows <= size:
        return definition.segment_attention(
            attention, mask, segments, num_segments
        )
    blocks = RowBlocks(rows, size)

    def log_shares(constants, query, key):
        attention = constants.attention._replace(query=query, key=key)
        every = constants._replace(attention=attention).map_rows(blocks.fill)

        def put_shares(number, shares):
            block = every.map_rows(blocks.slicer(number))
            found = definition.segment_attention(*block)
            return blocks.put(shares, number, 2, found)

        shares = ops.fori_loop(
            0,
            blocks.count,
            put_shares,
            ops.zeros((batch, heads, blocks.filled, num_segments)),
        )

        def gradients(upstream):
            # Rows that only fill up a block get a gradient of 0.
            upstream = blocks.fill_zeros(upstream, 2)

            def add_gradients(number, gradients):
                rows_of = blocks.slicer(number)
                block = every.map_rows(rows_of)
                query_gradient, key_gradient = block.gradients(
                    rows_of(upstream, 2), rows_of(shares, 2)
                )
                queries, keys = gradients
                queries = blocks.put(queries, number, 1, query_gradient)
                return [queries, keys + key_gradient]

            key_shape, width = ops.shape(key)[:3], query.shape[3]
            query_gradient, key_gradient = ops.fori_loop(
                0,
                blocks.count,
                add_gradients,
                [
                    ops.zeros((batch, blocks.filled, heads, width)),
                    ops.zeros((batch, key_shape[1], heads, width)),
                ],
            )
            # The gradient of a key head is the sum over heads that read it.
            key_gradient = ops.sum(
                ops.reshape(key_gradient, (*key_shape, -1, width)), axis=3
            )
            return [
                ops.cast(query_gradient[:, :rows], query.dtype),
                ops.cast(key_gradient, key.dtype),
            ]

        return shares[:, :, :rows], gradients

    query, key = attention.query, attention.key
    attention = attention._replace(query=None, key=None)
    constants = Block(attention, mask, segments, num_segments)
    return with_own_gradient(log_shares, [query, key], constants)
