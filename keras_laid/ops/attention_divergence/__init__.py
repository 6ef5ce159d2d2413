"""Distance-weighted divergence between two attention maps."""

from typing import Any
from typing import Literal

from keras import ops

from keras_laid.arguments import check_shape
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention import check_attention
from keras_laid.ops.attention import check_distance
from keras_laid.ops.attention import check_mask
from keras_laid.ops.attention import check_same_tokens
from keras_laid.ops.attention_divergence import chunked
from keras_laid.ops.attention_divergence import definition
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select
from keras_laid.ops.fused_attention import availability
from keras_laid.typing import Tensor


def inputs(
    student: Attention, teacher: Attention, mask: AttentionMask, *_: Any
) -> tuple[list[Tensor], AttentionMask]:
    return [student.query, teacher.query], mask


# In order of preference.
IMPLEMENTATIONS = (
    *availability.implementations("attention_divergence", inputs),
    Implementation("chunked", chunked.attention_divergence),
    Implementation("definition", definition.attention_divergence),
)


def attention_divergence(
    student: Attention,
    teacher: Attention,
    mask: AttentionMask,
    distance: Distance,
    mixture: Tensor | None = None,
    implementation: Literal["pallas", "triton", "chunked", "definition"]
    | None = None,
) -> Tensor:
    """Divergence of a student's attention from a teacher's, row by row.

    For row `i`, teacher map `p` and student map `q`,

    `D_i = sum_j w_ij (p_ij log(p_ij / q_ij) - p_ij + q_ij)`,

    the generalised Kullback-Leibler divergence with weights `w_ij` that grow
    with the distance of the two tokens. No term is negative, and `D_i` is 0
    only where the maps agree. With every weight 1 it is `KL(p || q)`.

    Masking: keys outside `mask` have no attention on either side; a row without
    any key contributes 0.

    Args:
        student: `keras_laid.ops.Attention` of the student.
        teacher: `keras_laid.ops.Attention` of the teacher, with the same batch,
            rows and keys. Head dims may differ. No gradient reaches it.
        mask: `keras_laid.ops.AttentionMask` of both models.
        distance: `keras_laid.ops.Distance`: the positions of rows and keys, and
            how the weights `w_ij` depend on them.
        mixture: Optional float32 tensor of shape
            `(student_heads, teacher_heads)` whose rows sum to 1: `p` of student
            head `s` is `sum_t mixture[s, t] * p_t`. `None` compares head `s` of
            the student with head `s` of the teacher.
        implementation: One of `"pallas"` (fused, JAX) and `"triton"` (fused,
            torch), both on NVIDIA GPUs of compute capability 9 and 10 such as
            the H100, `"chunked"` (anywhere, holds some rows of the maps at a
            time) and `"definition"` (anywhere, holds whole maps). `None` takes
            the first of these that can run.

    Returns:
        A float32 tensor of shape `(batch, student_heads, rows)`, in nats.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, a number is out of its range, or
            `implementation` is unknown.
        NotImplementedError: If the named `implementation` cannot run here.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), "progressive
       distance-weighted attention matching"; the formula is ours.
    """
    check_arguments(student, teacher, mask, distance, mixture)
    teacher = teacher._replace(
        query=ops.stop_gradient(teacher.query),
        key=ops.stop_gradient(teacher.key),
    )
    arguments = (student, teacher, mask, distance, mixture)
    chosen = select(
        "attention_divergence", IMPLEMENTATIONS, implementation, *arguments
    )
    return chosen.run(*arguments)


def check_arguments(
    student: Attention,
    teacher: Attention,
    mask: AttentionMask,
    distance: Distance,
    mixture: Tensor | None,
) -> None:
    check_attention("student", student)
    check_attention("teacher", teacher)
    check_same_tokens(student, teacher)
    check_mask(mask, student)
    batch, rows = student.query.shape[:2]
    check_distance(distance, batch, rows=rows, keys=student.key.shape[1])
    student_heads = student.query.shape[2]
    teacher_heads = teacher.query.shape[2]
    if mixture is not None:
        check_shape(
            "mixture",
            mixture,
            student_heads=student_heads,
            teacher_heads=teacher_heads,
        )
    elif student_heads != teacher_heads:
        raise ValueError(
            "Without `mixture` the student and the teacher must have the same "
            f"number of heads. Received: student heads={student_heads}, "
            f"teacher heads={teacher_heads}. Pass the mixture of a "
            "`keras_laid.HeadMixer`."
        )
