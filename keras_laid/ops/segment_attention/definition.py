"""Attention pooled over segments in its plainest form."""

from keras import ops

from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention_divergence.definition import MASKED
from keras_laid.ops.attention_divergence.definition import log_attention
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
    is_member = ops.cast(membership(segments, num_segments), "float32")
    segments = known_segments(segments, num_segments)
    # Each segment has a maximum of its own: next to a segment that gets almost
    # all attention, the others would be rounded to 0.
    largest = ops.stop_gradient(maxima(log_a, segments, num_segments))
    relative = ops.exp(log_a - of_keys(largest, segments))  # [b, h, i, j]
    sums = ops.einsum("bhij,bjg->bhig", relative, is_member)
    return ops.log(ops.where(largest > MASKED, sums, 1.0)) + largest


def membership(segments: Tensor, num_segments: int | Tensor) -> Tensor:
    """Whether a key is in a segment: `(batch, keys, num_segments)`."""
    numbers = ops.arange(1, num_segments + 1)
    segments = ops.cast(segments, numbers.dtype)
    return ops.equal(segments[:, :, None], numbers)


def known_segments(segments: Tensor, num_segments: int | Tensor) -> Tensor:
    """The segment of each key, and 0 for numbers that are out of range."""
    segments = ops.cast(segments, "int32")
    known = ops.logical_and(segments > 0, segments <= num_segments)
    return ops.where(known, segments, 0)


def maxima(
    log_a: Tensor, segments: Tensor, num_segments: int | Tensor
) -> Tensor:
    """Largest value in each segment, of shape `(b, h, i, g)`."""
    batch, heads, rows, keys = ops.shape(log_a)
    # Segments of all examples are numbered through.
    first = ops.arange(batch)[:, None] * (num_segments + 1)
    found = ops.segment_max(
        ops.reshape(ops.transpose(log_a, (0, 3, 1, 2)), (-1, heads * rows)),
        ops.reshape(ops.cast(first, "int32") + segments, (-1,)),
        batch * (num_segments + 1),
    )
    found = ops.reshape(found, (batch, num_segments + 1, heads, rows))
    # Of no key at all it is less than that of masked ones.
    return ops.maximum(ops.transpose(found[:, 1:], (0, 2, 3, 1)), MASKED)


def of_keys(of_segments: Tensor, segments: Tensor) -> Tensor:
    """What the segment of each key has, and 0 for keys of no segment."""
    padded = ops.pad(of_segments, [(0, 0), (0, 0), (0, 0), (1, 0)])
    return ops.take_along_axis(padded, segments[:, None, None], axis=-1)
