"""The divergence over blocks of rows: no whole map ever exists."""

import keras
from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.ops.attention_divergence import definition

# Each block's maps have shape (batch, heads, block, keys).
ROWS = 128  # The most a block has.
ELEMENTS = 2**19  # About how many rows times keys it has, over long prompts.


def attention_divergence(student, teacher, mask, distance, mixture):
    block = rows_of_block(student.key.shape[1])
    if student.query.shape[1] is not None and student.query.shape[1] <= block:
        return definition.attention_divergence(
            student, teacher, mask, distance, mixture
        )
    # Every block adds to the gradient of the keys: in float32.
    student_key = ops.cast(student.key, "float32")
    teacher_key = ops.cast(teacher.key, "float32")
    # Rows are independent, so each block is exact on its own.
    # `remat`: else the backward pass keeps every block's maps.
    # `map`, not a Python loop: else XLA may hold all blocks at once.
    rows = ops.shape(student.query)[1]
    blocks = (rows + block - 1) // block

    def of_block(number):
        # The last block repeats the last row, and is cut below.
        index = ops.minimum(number * block + ops.arange(block), rows - 1)

        # What carries a gradient is an argument: TensorFlow's rematerialisation
        # finds no gradient for what a function closes over.
        def divergence(student_query, student_key, teacher_query, *rest):
            teacher_key, *mixtures = rest
            return definition.attention_divergence(
                Attention(student_query, student_key, *student[2:]),
                Attention(teacher_query, teacher_key, *teacher[2:]),
                mask._replace(row_index=ops.take(mask.row_index, index)),
                distance._replace(
                    row_positions=ops.take(distance.row_positions, index, 1)
                ),
                *(mixtures or [None]),
            )

        return keras.remat(divergence)(
            ops.take(student.query, index, axis=1),
            student_key,
            ops.take(teacher.query, index, axis=1),
            teacher_key,
            *([] if mixture is None else [mixture]),
        )

    divided = ops.map(of_block, ops.arange(blocks))  # [blocks, b, s, block]
    batch, heads = ops.shape(divided)[1:3]
    divided = ops.transpose(divided, (1, 2, 0, 3))
    return ops.reshape(divided, (batch, heads, -1))[:, :, :rows]


def rows_of_block(keys):
    """Fewer rows for more keys; the most where keys are known only later."""
    return ROWS if keys is None else max(1, min(ROWS, ELEMENTS // keys))
