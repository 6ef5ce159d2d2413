"""The divergence in its plainest form. The other files must agree with it."""

from keras import ops

from keras_laid.ops.attention import TINY
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention import log_attention
from keras_laid.typing import Tensor


def attention_divergence(
    student: Attention,
    teacher: Attention,
    mask: AttentionMask,
    distance: Distance,
    mixture: Tensor | None,
) -> Tensor:
    # b = batch, s = student head, t = teacher head, i = row, j = key
    allowed = mask.allowed()
    log_q = log_attention(student, allowed)  # [b, s, i, j]
    p = ops.exp(log_attention(teacher, allowed))  # [b, t, i, j]
    if mixture is not None:
        p = ops.einsum("st,btij->bsij", mixture, p)
    log_p = ops.log(ops.maximum(p, TINY))
    terms = p * (log_p - log_q) - p + ops.exp(log_q)
    terms = ops.where(allowed, distance.weights() * terms, 0.0)
    # The sum is never negative; rounding may make it so.
    return ops.maximum(ops.sum(terms, axis=-1), 0.0)
