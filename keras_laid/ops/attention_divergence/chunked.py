"""The divergence over blocks of rows: no whole map ever exists."""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_laid.ops.attention_divergence import definition

# Each block's maps have shape (batch, heads, block, keys).
ROWS = 128  # The most a block has.
ELEMENTS = 2**19  # About how many rows times keys it has, over long prompts.


class Block(NamedTuple):
    """The op's arguments for some of the rows."""

    student: Any
    teacher: Any
    mask: Any
    distance: Any
    mixture: Any

    def at(self, index):
        """Those for the rows at `index`."""
        return self._replace(
            student=take_rows(self.student, index),
            teacher=take_rows(self.teacher, index),
            mask=self.mask._replace(
                row_index=ops.take(self.mask.row_index, index)
            ),
            distance=self.distance._replace(
                row_positions=ops.take(self.distance.row_positions, index, 1)
            ),
        )

    def gradients(self, upstream):
        """Those of queries, keys and mixture, in float32; README derives them.

        `upstream`, of shape (batch, heads, rows), is the divergence's.
        """
        # b = batch, s = student head, t = teacher head, i = row, j = key,
        # d = head dim
        student, mixture = self.student, self.mixture
        allowed = self.mask.allowed()
        logits = ops.where(allowed, student.logits(), 0.0)
        log_q = ops.log_softmax(ops.where(allowed, logits, definition.MASKED))
        maps = ops.exp(definition.log_attention(self.teacher, allowed))
        p = maps
        if mixture is not None:
            p = ops.einsum("st,btij->bsij", mixture, maps)
        q = ops.exp(log_q)
        weights = ops.where(allowed, self.distance.weights(), 0.0)
        upstream = upstream[..., None]

        terms = weights * (q - p)
        slope = terms - q * ops.sum(terms, axis=-1, keepdims=True)
        slope = slope * (upstream * student.scale)
        if student.soft_cap is not None:
            slope = slope * (1.0 - ops.square(logits / student.soft_cap))
        query = ops.cast(student.query, "float32")
        of_query = ops.einsum(
            "bsij,bjsd->bisd", slope, student.key_of_each_head()
        )
        of_key = ops.einsum("bsij,bisd->bjsd", slope, query)
        # Heads that read one key head add up.
        batch, keys, key_heads, width = ops.shape(student.key)
        of_key = ops.sum(
            ops.reshape(of_key, (batch, keys, key_heads, -1, width)), axis=3
        )
        if mixture is None:
            return of_query, of_key
        log_p = ops.log(ops.maximum(p, definition.TINY))
        of_p = upstream * weights * (log_p - log_q)
        return of_query, of_key, ops.einsum("bsij,btij->st", of_p, maps)


def attention_divergence(student, teacher, mask, distance, mixture):
    block = rows_of_block(student.key.shape[1])
    if student.query.shape[1] is not None and student.query.shape[1] <= block:
        return definition.attention_divergence(
            student, teacher, mask, distance, mixture
        )
    # Every block reads all keys, and adds to their gradient: in float32.
    teacher = teacher._replace(key=ops.cast(teacher.key, "float32"))
    rows = ops.shape(student.query)[1]
    blocks = (rows + block - 1) // block

    def index_of(number):
        """Rows of a block; the last block repeats the last row."""
        return ops.minimum(number * block + ops.arange(block), rows - 1)

    @ops.custom_gradient
    def divergence(query, key, *mixtures):
        every = Block(
            student._replace(query=query, key=ops.cast(key, "float32")),
            teacher,
            mask,
            distance,
            *(mixtures or [None]),
        )
        batch, _, heads, width = ops.shape(query)

        def add_values(number, values):
            of_block = every.at(index_of(number))
            return ops.slice_update(
                values,
                (0, 0, number * block),
                definition.attention_divergence(*of_block),
            )

        def gradients(*arguments, upstream=None):
            if upstream is None:  # Only torch gives it by name.
                (upstream,) = arguments

            def add_gradients(number, sums):
                index = index_of(number)
                first = number * block + ops.arange(block) == index
                of_rows = ops.where(first, ops.take(upstream, index, 2), 0.0)
                of_query, *others = every.at(index).gradients(of_rows)
                queries = ops.slice_update(
                    sums[0], (0, number * block, 0, 0), of_query
                )
                others = [a + b for a, b in zip(sums[1:], others, strict=True)]
                return (queries, *others)

            queries, keys, *rest = ops.fori_loop(
                0,
                blocks,
                add_gradients,
                (
                    ops.zeros((batch, blocks * block, heads, width)),
                    *[ops.zeros(ops.shape(a)) for a in (key, *mixtures)],
                ),
            )
            return (
                ops.cast(queries[:, :rows], query.dtype),
                ops.cast(keys, key.dtype),
                *rest,
            )

        values = ops.zeros((batch, heads, blocks * block))
        values = ops.fori_loop(0, blocks, add_values, values)
        return values[:, :, :rows], gradients

    mixtures = [] if mixture is None else [mixture]
    return divergence(student.query, student.key, *mixtures)


def take_rows(attention, index):
    return attention._replace(query=ops.take(attention.query, index, axis=1))


def rows_of_block(keys):
    """Fewer rows for more keys; the most where keys are known only later."""
    return ROWS if keys is None else max(1, min(ROWS, ELEMENTS // keys))
