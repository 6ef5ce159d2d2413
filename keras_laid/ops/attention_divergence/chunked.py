"""The divergence over blocks of rows: no whole map ever exists.

README.md derives the gradient. The forward pass keeps three numbers of each
row; the backward pass computes the maps again.
"""

from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import TINY
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention_divergence import definition
from keras_laid.ops.own_gradient import with_own_gradient
from keras_laid.ops.row_blocks import RowBlocks
from keras_laid.ops.row_blocks import rows_of_block
from keras_laid.typing import Tensor


class Block(NamedTuple):
    """The op's arguments for some of the rows."""

    student: Attention
    teacher: Attention
    mask: AttentionMask
    distance: Distance
    span: Tensor | None = None  # Of all rows.
    mixture: Tensor | None = None

    def map_rows(self, rows):
        """A copy with `rows(tensor, axis)` of every tensor that has rows."""
        mask, distance = self.mask, self.distance
        return self._replace(
            student=self.student._replace(query=rows(self.student.query, 1)),
            teacher=self.teacher._replace(query=rows(self.teacher.query, 1)),
            mask=mask._replace(row_index=rows(mask.row_index, 0)),
            distance=distance._replace(
                row_positions=rows(distance.row_positions, 1)
            ),
        )

    def logits(self):
        """Masked logits of the student and of the teacher."""
        allowed = self.mask.allowed()
        return [
            ops.where(allowed, attention.logits(), MASKED)
            for attention in (self.student, self.teacher)
        ]

    def maps(self, logits, normalizers):
        """`log_q`, `log_p`, `q`, `p` and weights; `p` is the target map."""
        log_q, log_p = [
            a - b[..., None] for a, b in zip(logits, normalizers, strict=True)
        ]
        q, p = ops.exp(log_q), ops.exp(log_p)
        if self.mixture is not None:
            p = ops.einsum("st,btij->bsij", self.mixture, p)
            log_p = ops.log(ops.maximum(p, TINY))
        allowed = self.mask.allowed()
        weights = ops.where(allowed, self.distance.weights(self.span), 0.0)
        return log_q, log_p, q, p, weights

    def sums(self):
        """The divergence, both normalizers and the center of each row."""
        logits = self.logits()
        normalizers = [ops.logsumexp(each, axis=-1) for each in logits]
        log_q, log_p, q, p, weights = self.maps(logits, normalizers)
        terms = weights * (p * (log_p - log_q) - p + q)
        divergence = ops.maximum(ops.sum(terms, axis=-1), 0.0)
        return divergence, *normalizers, ops.sum(weights * (q - p), axis=-1)

    def gradients(self, upstream, normalizers, center):
        """Gradients of queries, keys and mixture, in float32."""
        # b = batch, s = student head, t = teacher head, i = row, j = key,
        # d = head dim
        student = self.student
        logits = self.logits()
        log_q, log_p, q, p, weights = self.maps(logits, normalizers)
        slope = weights * (q - p) - q * center[..., None]
        slope = slope * (upstream * student.scale)[..., None]
        if student.soft_cap is not None:
            # Masked logits are far below minus the cap.
            share = ops.maximum(logits[0] / student.soft_cap, -1.0)
            slope = slope * (1.0 - ops.square(share))
        query = ops.cast(student.query, "float32")
        key = student.key_of_each_head()
        query_gradient = ops.einsum("bsij,bjsd->bsid", slope, key)
        key_gradient = ops.einsum("bisd,bsij->bsdj", query, slope)
        if self.mixture is None:
            return query_gradient, key_gradient
        p_slope = upstream[..., None] * weights * (log_p - log_q)
        maps = ops.exp(logits[1] - normalizers[1][..., None])
        return (
            query_gradient,
            key_gradient,
            ops.einsum("bsij,btij->st", p_slope, maps),
        )


def attention_divergence(student, teacher, mask, distance, mixture):
    batch, rows, heads, width = ops.shape(student.query)
    size = rows_of_block(rows, ops.shape(student.key)[1])
    if isinstance(size, int) and rows <= size:
        return definition.attention_divergence(
            student, teacher, mask, distance, mixture
        )
    teacher = teacher._replace(key=ops.cast(teacher.key, "float32"))
    blocks = RowBlocks(rows, size)

    def divergence(constants, query, key, *mixture):
        student = constants.student._replace(
            query=query, key=ops.cast(key, "float32")
        )
        every = constants._replace(
            student=student,
            span=constants.distance.span(),
            mixture=mixture[0] if mixture else None,
        ).map_rows(blocks.fill)

        def add_sums(number, sums):
            found = every.map_rows(blocks.slicer(number)).sums()
            return [
                blocks.put(a, number, 2, b)
                for a, b in zip(sums, found, strict=True)
            ]

        each = (heads, heads, teacher.query.shape[2], heads)
        values, *normalizers, center = ops.fori_loop(
            0,
            blocks.count,
            add_sums,
            [ops.zeros((batch, n, blocks.filled)) for n in each],
        )

        def gradients(upstream):
            # Rows that only fill up a block get a gradient of 0.
            upstream = blocks.fill_zeros(upstream, 2)

            def add_gradients(number, gradients):
                rows_of = blocks.slicer(number)
                query_gradient, *others = every.map_rows(rows_of).gradients(
                    rows_of(upstream, 2),
                    [rows_of(each, 2) for each in normalizers],
                    rows_of(center, 2),
                )
                queries, *sums = gradients
                return [
                    blocks.put(queries, number, 2, query_gradient),
                    *[a + b for a, b in zip(sums, others, strict=True)],
                ]

            shapes = [
                (batch, heads, blocks.filled, width),
                (batch, heads, width, ops.shape(key)[1]),
                *[ops.shape(each) for each in mixture],
            ]
            query_gradient, key_gradient, *rest = ops.fori_loop(
                0,
                blocks.count,
                add_gradients,
                [ops.zeros(each) for each in shapes],
            )
            query_gradient = ops.transpose(
                query_gradient[:, :, :rows], (0, 2, 1, 3)
            )
            # The gradient of a key head is the sum over heads that read it.
            key_gradient = ops.reshape(
                key_gradient,
                (batch, key.shape[2], -1, width, ops.shape(key)[1]),
            )
            key_gradient = ops.transpose(
                ops.sum(key_gradient, axis=2), (0, 3, 1, 2)
            )
            return [
                ops.cast(query_gradient, query.dtype),
                ops.cast(key_gradient, key.dtype),
                *rest,
            ]

        return values[:, :, :rows], gradients

    variables = [student.query, student.key]
    if mixture is not None:
        variables.append(mixture)
    student = student._replace(query=None, key=None)
    constants = Block(student, teacher, mask, distance)
    return with_own_gradient(divergence, variables, constants)
