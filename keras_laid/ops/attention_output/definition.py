"""Attention in its plainest form, in float32."""

from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import log_attention
from keras_laid.typing import Tensor


def attention_output(
    attention: Attention, value: Tensor, mask: AttentionMask
) -> Tensor:
    # b = batch, h = head, i = row, j = key, d = value dim
    allowed = mask.allowed()
    p = ops.where(allowed, ops.exp(log_attention(attention, allowed)), 0.0)
    output = ops.einsum("bhij,bjhd->bihd", p, attention.repeat_heads(value))
    return ops.cast(output, value.dtype)
