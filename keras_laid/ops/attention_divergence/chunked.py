"""The divergence over blocks of rows: no whole map ever exists.

The gradient is the one that README.md derives, from three numbers that are kept
of each row, and maps that are computed anew.
"""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention_divergence import definition

# Each block's maps have shape (batch, heads, block, keys).
ROWS = 128  # The most a block has.
ELEMENTS = 2**18  # About how many rows times keys it has, over long prompts.


class Block(NamedTuple):
    """The op's arguments for some of the rows."""

    student: Any
    teacher: Any
    mask: Any
    distance: Any
    mixture: Any

    def of_rows(self, rows):
        """The same with `rows(tensor, axis)` of what has rows."""
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
        """The student's and the teacher's."""
        allowed = self.mask.allowed()
        return [
            ops.where(allowed, attention.logits(), definition.MASKED)
            for attention in (self.student, self.teacher)
        ]

    def maps(self, logits, normalizers):
        """Logarithms of the student's and the target map, both, and weights."""
        log_q, log_p = [
            a - b[..., None] for a, b in zip(logits, normalizers, strict=True)
        ]
        q, p = ops.exp(log_q), ops.exp(log_p)
        if self.mixture is not None:
            p = ops.einsum("st,btij->bsij", self.mixture, p)
            log_p = ops.log(ops.maximum(p, definition.TINY))
        allowed = self.mask.allowed()
        weights = ops.where(allowed, self.distance.weights(), 0.0)
        return log_q, log_p, q, p, weights

    def sums(self):
        """Of each row: the divergence, both normalizers, and the center."""
        logits = self.logits()
        normalizers = [ops.logsumexp(each, axis=-1) for each in logits]
        log_q, log_p, q, p, weights = self.maps(logits, normalizers)
        terms = weights * (p * (log_p - log_q) - p + q)
        divergence = ops.maximum(ops.sum(terms, axis=-1), 0.0)
        return divergence, *normalizers, ops.sum(weights * (q - p), axis=-1)

    def gradients(self, upstream, normalizers, center):
        """Of queries, keys and mixture, in float32."""
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
        of_query = ops.einsum("bsij,bjsd->bsid", slope, key)
        of_key = ops.einsum("bisd,bsij->bsdj", query, slope)
        if self.mixture is None:
            return of_query, of_key
        of_p = upstream[..., None] * weights * (log_p - log_q)
        maps = ops.exp(logits[1] - normalizers[1][..., None])
        return of_query, of_key, ops.einsum("bsij,btij->st", of_p, maps)


def attention_divergence(student, teacher, mask, distance, mixture):
    block = rows_of_block(student.key.shape[1])
    if student.query.shape[1] is not None and student.query.shape[1] <= block:
        return definition.attention_divergence(
            student, teacher, mask, distance, mixture
        )
    teacher = teacher._replace(key=ops.cast(teacher.key, "float32"))
    batch, rows, heads, width = ops.shape(student.query)
    blocks = (rows + block - 1) // block

    def fill(tensor, axis):
        """Rows for full blocks: the last row is repeated."""
        index = ops.minimum(ops.arange(blocks * block), rows - 1)
        return ops.take(tensor, index, axis=axis)

    def block_of(number):
        def rows_of(tensor, axis):
            start, shape = [0] * len(tensor.shape), list(ops.shape(tensor))
            start[axis], shape[axis] = number * block, block
            return ops.slice(tensor, start, shape)

        return rows_of

    @ops.custom_gradient
    def divergence(query, key, *mixtures):
        every = Block(
            student._replace(query=query, key=ops.cast(key, "float32")),
            teacher,
            mask,
            distance,
            *(mixtures or [None]),
        ).of_rows(fill)

        def add_sums(number, sums):
            found = every.of_rows(block_of(number)).sums()
            return [
                ops.slice_update(a, (0, 0, number * block), b)
                for a, b in zip(sums, found, strict=True)
            ]

        each = (heads, heads, teacher.query.shape[2], heads)
        values, *normalizers, center = ops.fori_loop(
            0,
            blocks,
            add_sums,
            [ops.zeros((batch, n, blocks * block)) for n in each],
        )

        def gradients(*arguments, upstream=None):
            if upstream is None:  # Only torch gives it by name.
                (upstream,) = arguments
            # Repeated rows count once.
            once = ops.arange(blocks * block) < rows
            upstream = ops.where(once, fill(upstream, 2), 0.0)

            def add_gradients(number, gradients):
                rows_of = block_of(number)
                of_query, *others = every.of_rows(rows_of).gradients(
                    rows_of(upstream, 2),
                    [rows_of(each, 2) for each in normalizers],
                    rows_of(center, 2),
                )
                queries, *sums = gradients
                return [
                    ops.slice_update(
                        queries, (0, 0, number * block, 0), of_query
                    ),
                    *[a + b for a, b in zip(sums, others, strict=True)],
                ]

            shapes = [
                (batch, heads, blocks * block, width),
                (batch, heads, width, ops.shape(key)[1]),
                *[ops.shape(each) for each in mixtures],
            ]
            of_query, of_key, *rest = ops.fori_loop(
                0, blocks, add_gradients, [ops.zeros(each) for each in shapes]
            )
            of_query = ops.transpose(of_query[:, :, :rows], (0, 2, 1, 3))
            # Heads that read one key head add up.
            of_key = ops.reshape(
                of_key, (batch, key.shape[2], -1, width, ops.shape(key)[1])
            )
            of_key = ops.transpose(ops.sum(of_key, axis=2), (0, 3, 1, 2))
            return (
                ops.cast(of_query, query.dtype),
                ops.cast(of_key, key.dtype),
                *rest,
            )

        return values[:, :, :rows], gradients

    mixtures = [] if mixture is None else [mixture]
    return divergence(student.query, student.key, *mixtures)


def rows_of_block(keys):
    """Fewer rows for more keys; the most where keys are known only later."""
    return ROWS if keys is None else max(1, min(ROWS, ELEMENTS // keys))
