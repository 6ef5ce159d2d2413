"""Attention pooled over segments, over blocks of rows: no whole map exists.

The gradient is the one that README.md derives.
"""

from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention_divergence.definition import MASKED
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

    def of_rows(self, rows):
        """The same with `rows(tensor, axis)` of what has rows."""
        attention, mask = self.attention, self.mask
        return self._replace(
            attention=attention._replace(query=rows(attention.query, 1)),
            mask=mask._replace(row_index=rows(mask.row_index, 0)),
        )

    def gradients(self, upstream, log_shares):
        """Of queries and keys, in float32."""
        # b = batch, h = head, i = row, j = key, g = segment, d = head dim
        attention = self.attention
        logits = ops.where(
            self.mask.allowed(), attention.logits(), MASKED
        )  # [b, h, i, j]
        normalizer = ops.logsumexp(logits, axis=-1, keepdims=True)
        log_maps = logits - normalizer
        is_member = definition.membership(self.segments, self.num_segments)
        upstream = ops.where(log_shares > MASKED, upstream, 0.0)

        def of_keys(of_segments):
            # What each key's segment has; 0 where there is none.
            return ops.einsum(
                "bhig,bjg->bhij", of_segments, ops.cast(is_member, "float32")
            )

        has_segment = ops.any(is_member, axis=-1)[:, None, None]
        log_within = ops.where(
            has_segment, log_maps - of_keys(log_shares), MASKED
        )
        total = ops.sum(upstream, axis=-1, keepdims=True)
        slope = of_keys(upstream) * ops.exp(ops.minimum(log_within, 0.0))
        slope = (slope - ops.exp(log_maps) * total) * attention.scale
        if attention.soft_cap is not None:
            # Masked logits are far below minus the cap.
            share = ops.maximum(logits / attention.soft_cap, -1.0)
            slope = slope * (1.0 - ops.square(share))
        query = ops.cast(attention.query, "float32")
        query_gradient = ops.einsum(
            "bhij,bjhd->bhid", slope, attention.key_of_each_head()
        )
        return query_gradient, ops.einsum("bihd,bhij->bhdj", query, slope)


def segment_attention(attention, mask, segments, num_segments):
    batch, rows, heads, width = ops.shape(attention.query)
    size = rows_of_block(rows, ops.shape(attention.key)[1])
    if isinstance(size, int) and rows <= size:
        return definition.segment_attention(
            attention, mask, segments, num_segments
        )
    blocks = RowBlocks(rows, size)

    @ops.custom_gradient
    def log_shares_of(query, key):
        every = Block(
            attention._replace(query=query, key=ops.cast(key, "float32")),
            mask,
            segments,
            num_segments,
        ).of_rows(blocks.fill)

        def put_shares(number, found):
            block = every.of_rows(blocks.of(number))
            return blocks.put(
                found, number, 2, definition.segment_attention(*block)
            )

        log_shares = ops.fori_loop(
            0,
            blocks.count,
            put_shares,
            ops.zeros((batch, heads, blocks.filled, num_segments)),
        )

        def gradients(*arguments, upstream=None):
            if upstream is None:  # Only torch gives it by name.
                (upstream,) = arguments
            # Repeated rows count once.
            upstream = blocks.fill_zeros(upstream, 2)

            def add_gradients(number, gradients):
                rows_of = blocks.of(number)
                query_gradient, key_gradient = every.of_rows(rows_of).gradients(
                    rows_of(upstream, 2), rows_of(log_shares, 2)
                )
                queries, keys = gradients
                return [
                    blocks.put(queries, number, 2, query_gradient),
                    keys + key_gradient,
                ]

            key_length = ops.shape(key)[1]
            query_gradient, key_gradient = ops.fori_loop(
                0,
                blocks.count,
                add_gradients,
                [
                    ops.zeros((batch, heads, blocks.filled, width)),
                    ops.zeros((batch, heads, width, key_length)),
                ],
            )
            query_gradient = query_gradient[:, :, :rows]
            # Heads that read one key head add up.
            key_gradient = ops.reshape(
                key_gradient, (batch, key.shape[2], -1, width, key_length)
            )
            return (
                ops.cast(
                    ops.transpose(query_gradient, (0, 2, 1, 3)), query.dtype
                ),
                ops.cast(
                    ops.transpose(ops.sum(key_gradient, axis=2), (0, 3, 1, 2)),
                    key.dtype,
                ),
            )

        return log_shares[:, :, :rows], gradients

    return log_shares_of(attention.query, attention.key)
