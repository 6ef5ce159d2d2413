"""Attention pooled over segments in its plainest form."""

from keras import ops

from keras_laid.ops.attention import MASKED
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import log_attention
from keras_laid.typing import Tensor


def segment_attention(
    attention: Attention,
    mask: AttentionMask,
    segments: Tensor,
    num_segments: int | Tensor,
) -> Tensor:
    # b = batch, h = head, i = row, j = key, g = segment
    allowed = mask.allowed()
    log_a = ops.where(allowed, log_attention(attention, allowed), MASKED)
    # Each segment is scaled by its own maximum: by that of the row, segments
    # would underflow next to a key that gets almost all attention.
    largest = maxima(ops.stop_gradient(log_a), segments, num_segments)
    relative = ops.exp(log_a - per_key(largest, segments))  # [b, h, i, j]
    is_member = ops.cast(membership(segments, num_segments), "float32")
    sums = ops.einsum("bhij,bjg->bhig", relative, is_member)
    return ops.log(ops.where(largest > MASKED, sums, 1.0)) + largest


def membership(segments: Tensor, num_segments: int | Tensor) -> Tensor:
    """Whether a key is in a segment: `(batch, keys, num_segments)`."""
    numbers = ops.arange(1, num_segments + 1, dtype="int32")
    return ops.equal(ops.cast(segments, "int32")[:, :, None], numbers)


def known(segments: Tensor, num_segments: int | Tensor) -> Tensor:
    """The segment of each key as int32, and 0 for a number out of range."""
    segments = ops.cast(segments, "int32")
    in_range = ops.logical_and(segments > 0, segments <= num_segments)
    return ops.where(in_range, segments, 0)


def maxima(
    log_a: Tensor, segments: Tensor, num_segments: int | Tensor
) -> Tensor:
    """The largest value in each segment, and -1e30 for one without keys."""
    batch, heads, rows, _ = ops.shape(log_a)
    count = num_segments + 1
    # The segments of all examples are numbered together.
    first = ops.cast(ops.arange(batch), "int32")[:, None] * count
    found = ops.segment_max(
        ops.reshape(ops.transpose(log_a, (0, 3, 1, 2)), (-1, heads * rows)),
        ops.reshape(first + known(segments, num_segments), (-1,)),
        batch * count,
    )
    found = ops.reshape(found, (batch, count, heads, rows))[:, 1:]
    return ops.maximum(ops.transpose(found, (0, 2, 3, 1)), MASKED)


def per_key(values: Tensor, segments: Tensor) -> Tensor:
    """The value of each key's segment, and 0 for keys without a segment."""
    padded = ops.pad(values, [(0, 0), (0, 0), (0, 0), (1, 0)])
    index = known(segments, ops.shape(values)[-1])
    return ops.take_along_axis(padded, index[:, None, None], axis=-1)
