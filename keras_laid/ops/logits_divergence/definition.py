"""The losses in their plainest form: all logits of both models at once."""

import math
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
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = student.logits()
    divergence = cross_entropy = kl = ops.zeros_like(logits[..., 0])
    if teacher is not None:
        teacher = teacher.computed()
        shared = logits[..., : teacher.vocabulary]
        log_q, log_p = softened(shared, teacher, temperature)
        divergence = temperature**2 * jensen_shannon(log_q, log_p, beta)
        kl = kl_divergence(*softened(shared, teacher, 1.0))
    if labels is not None:
        cross_entropy = -label_log_probabilities(
            ops.log_softmax(logits), labels
        )
    loss = ops.sum(shares[0] * divergence) + ops.sum(shares[1] * cross_entropy)
    return loss, divergence, cross_entropy, kl


def softened(
    logits: Tensor, teacher: Unembedding | TopLogits, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the student and of the teacher."""
    log_q = ops.log_softmax(logits / temperature)
    log_p = teacher.log_probabilities(log_q, temperature)
    return log_q, ops.stop_gradient(log_p)


def jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, of `m = beta p + (1-beta) q`.

    Its limits, divided by `beta` and `1 - beta`, are `KL(p || q)` at 0 and
    `KL(q || p)` at 1.
    """
    if beta == 0:
        return kl_divergence(log_q, log_p)
    if beta == 1:
        return kl_divergence(log_p, log_q)
    log_m = log_mixture(log_q, log_p, beta)
    kl_p, kl_q = (kl_divergence(log_m, each) for each in (log_p, log_q))
    return beta * kl_p + (1 - beta) * kl_q


def log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """`log(beta p + (1 - beta) q)`."""
    return ops.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """`KL(p || q)`, from logarithms of probabilities."""
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def label_log_probabilities(log_q: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of labels.

    They are NaN for labels beyond the vocabulary, and of no meaning for labels
    less than 0, which do not count.
    """
    last = log_q.shape[-1] - 1
    index = ops.clip(labels, 0, last)[..., None]
    found = ops.take_along_axis(log_q, index, axis=-1)[..., 0]
    return ops.where(labels > last, float("nan"), found)
