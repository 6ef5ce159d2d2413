"""Distance of a student's queries and keys from mixtures of a teacher's."""

from keras import ops

from keras_laid.arguments import check_shape
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import check_attention
from keras_laid.ops.attention import check_same_tokens
from keras_laid.typing import Tensor


def query_key_distance(
    student: Attention,
    teacher: Attention,
    mixture: Tensor,
    row_mask: Tensor,
    key_mask: Tensor,
) -> Tensor:
    """Relative squared distance of queries and keys, head by head.

    For student head `s` and the mixed teacher head `Q = sum_t m_st Q_t`,
    `||Q_s - Q||^2 / ||Q||^2` over the rows of an example, plus the same ratio
    for keys. The paper's sum is not divided by `||Q||^2`: it grows with length
    and width, and outweighed every other term of the loss.

    Args:
        student: `keras_laid.ops.Attention` of the student.
        teacher: `keras_laid.ops.Attention` of the teacher, with the same head
            dim. Gradients reach it.
        mixture: Float32 tensor of shape `(student_heads, teacher_heads)` whose
            rows sum to 1.
        row_mask: Boolean tensor of shape `(batch, rows)`: queries that count.
        key_mask: Boolean tensor of shape `(batch, keys)`: keys that count.

    Returns:
        A float32 tensor of shape `(batch, student_heads)`, 0 or more.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If head dims differ or shapes do not fit.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equation 7.
    """
    check_attention("student", student)
    check_attention("teacher", teacher)
    check_same_tokens(student, teacher)
    if student.query.shape[-1] != teacher.query.shape[-1]:
        raise ValueError(
            "Queries and keys can be matched only between equal head dims. "
            f"Received: student head dim={student.query.shape[-1]}, teacher "
            f"head dim={teacher.query.shape[-1]}. Match attention maps instead."
        )
    batch, rows, student_heads, _ = student.query.shape
    check_shape(
        "mixture",
        mixture,
        student_heads=student_heads,
        teacher_heads=teacher.query.shape[2],
    )
    check_shape("row_mask", row_mask, batch=batch, rows=rows)
    check_shape("key_mask", key_mask, batch=batch, keys=student.key.shape[1])
    return relative_distance(
        ops.cast(student.query, "float32"),
        ops.cast(teacher.query, "float32"),
        mixture,
        row_mask,
    ) + relative_distance(
        student.key_of_each_head(),
        teacher.key_of_each_head(),
        mixture,
        key_mask,
    )


def relative_distance(
    student: Tensor, teacher: Tensor, mixture: Tensor, mask: Tensor
) -> Tensor:
    # b = batch, i = token, s = student head, t = teacher head, d = head dim
    mixed = ops.einsum("st,bitd->bisd", mixture, teacher)
    mask = ops.cast(mask, "float32")[:, :, None, None]
    error = ops.sum(mask * ops.square(student - mixed), axis=(1, 3))
    size = ops.sum(mask * ops.square(mixed), axis=(1, 3))
    return error / ops.maximum(size, 1e-12)
