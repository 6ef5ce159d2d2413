"""Attention pooled over segments of the keys, such as images."""

from typing import Literal

from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_shape
from keras_laid.arguments import is_integer
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import check_attention
from keras_laid.ops.attention import check_mask
from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select
from keras_laid.ops.segment_attention import chunked
from keras_laid.ops.segment_attention import definition
from keras_laid.typing import Tensor

# In order of preference.
IMPLEMENTATIONS = (
    Implementation("chunked", chunked.segment_attention),
    Implementation("definition", definition.segment_attention),
)


def segment_attention(
    attention: Attention,
    mask: AttentionMask,
    segments: Tensor,
    num_segments: int | Tensor,
    implementation: Literal["chunked", "definition"] | None = None,
) -> Tensor:
    """How much attention each row gives to each segment of the keys.

    A segment is a group of keys, such as the tokens of one image or of one
    document. For row `i` with attention map `a_i` and segment `g`,

    `log sum_{j in g} a_ij`,

    the logarithm of the segment's share of the row's attention. The rest of
    the attention goes to keys of no segment. Softmax over the last axis gives
    the shares among only the segments.

    Logarithms keep apart segments that get almost no attention: each is summed
    relative to its own largest key, so that no share is rounded to 0.

    Args:
        attention: `keras_laid.ops.Attention`: queries and keys.
        mask: `keras_laid.ops.AttentionMask`: which keys each row attends.
        segments: Integer tensor of shape `(batch, keys)`: the number of the
            segment that each key belongs to, from 1; 0 means no segment.
        num_segments: Integer, at least the largest number in `segments`; keys
            with larger numbers belong to no segment. On TensorFlow also a
            scalar tensor.
        implementation: `"chunked"` (holds some rows of the maps at a time) or
            `"definition"` (holds whole maps). `None` takes `"chunked"`.

    Returns:
        A float32 tensor of shape `(batch, heads, rows, num_segments)`, at most
        0, up to rounding. Where a row attends no key of a segment, the value is
        -1e30 and has a gradient of 0.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, `num_segments` is less than 1, or
            `implementation` is unknown.

    Reference:
     - [Wang et al., 2025](https://arxiv.org/abs/2510.05396), BlockRank, sums
       attention over the tokens of a document in the same way.
    """
    check_attention("attention", attention)
    check_mask(mask, attention)
    batch, keys = attention.query.shape[0], attention.key.shape[1]
    check_shape("segments", segments, batch=batch, keys=keys)
    check_dtype("segments", segments, "int")
    if is_integer(num_segments) or not hasattr(num_segments, "shape"):
        check_integer("num_segments", num_segments)
    else:
        check_shape("num_segments", num_segments)
        check_dtype("num_segments", num_segments, "int")
        num_segments = ops.cast(num_segments, "int32")
    arguments = (attention, mask, segments, num_segments)
    chosen = select(
        "segment_attention", IMPLEMENTATIONS, implementation, *arguments
    )
    return chosen.run(*arguments)
