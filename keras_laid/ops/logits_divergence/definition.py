"""The losses in their plainest form: all logits of both models at once."""

from collections.abc import Sequence

from keras import ops

from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


def logits_divergence(
    student: Unembedding,
    teacher: Unembedding | TopLogits | None,
    labels: Tensor | None,
    counted: Tensor,
    shares: Sequence[Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = student.logits()
    divergence = cross_entropy = kl = ops.zeros_like(logits[..., 0])
    if teacher is not None:
        teacher = teacher.computed()
        shared = logits[..., : teacher.vocabulary]
        divergence = kl = softened(shared, teacher, temperature)
        if temperature != 1.0:
            divergence = temperature**2 * divergence
            kl = softened(shared, teacher, 1.0)
    if labels is not None:
        cross_entropy = -of_labels(ops.log_softmax(logits), labels)
    loss = ops.sum(shares[0] * divergence) + ops.sum(shares[1] * cross_entropy)
    return loss, divergence, cross_entropy, kl


def softened(
    logits: Tensor, teacher: Unembedding | TopLogits, temperature: float
) -> Tensor:
    """`KL(teacher || student)` of softened distributions."""
    log_q = ops.log_softmax(logits / temperature)
    log_p = teacher.log_probabilities(log_q, temperature)
    return kl_divergence(log_q, ops.stop_gradient(log_p))


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`KL(p || q)`, from logarithms of probabilities."""
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def of_labels(log_q: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of labels.

    They are NaN for labels beyond the vocabulary, and of no meaning for labels
    less than 0, which do not count.
    """
    last = log_q.shape[-1] - 1
    index = ops.clip(labels, 0, last)[..., None]
    found = ops.take_along_axis(log_q, index, axis=-1)[..., 0]
    return ops.where(labels > last, float("nan"), found)
