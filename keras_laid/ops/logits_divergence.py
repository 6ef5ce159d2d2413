"""Divergence of a student's next-token distribution from a teacher's."""

from keras import ops


def logits_divergence(student_logits, teacher_logits, temperature=1.0):
    """`temperature ** 2 * KL(teacher || student)` of softened distributions.

    The factor keeps the gradient's size from depending on the temperature.

    Args:
        student_logits: Tensor of shape `(..., vocabulary)`.
        teacher_logits: Tensor of the same shape. Gradients reach it.
        temperature: Float greater than 0; both logits are divided by it.
            Defaults to `1.0`.

    Returns:
        A float32 tensor of shape `(...)`, in nats, 0 or more up to rounding.

    Raises:
        ValueError: If the vocabularies differ.

    Reference:
     - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2;
       [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), equation 8.
    """
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            "Student and teacher logits must be over the same vocabulary. "
            f"Received: student_logits.shape={tuple(student_logits.shape)}, "
            f"teacher_logits.shape={tuple(teacher_logits.shape)}"
        )
    student_logits = ops.cast(student_logits, "float32")
    teacher_logits = ops.cast(teacher_logits, "float32")
    log_q = ops.log_softmax(student_logits / temperature)
    log_p = ops.log_softmax(teacher_logits / temperature)
    divergence = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
    return temperature**2 * divergence
