"""The rows whose attention is compared, and the positions of rows and keys."""

from collections.abc import Mapping
from typing import Literal
from typing import NamedTuple

import keras
from keras import ops

from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.typing import Tensor


class MatchedRows(NamedTuple):
    """Rows of attention, a part of a model's sequence.

    Attributes:
        num_rows: Integer, the number of rows, the last ones of the sequence.
        mask: `keras_laid.ops.AttentionMask` of these rows.
        counted: Boolean tensor of shape `(batch, rows)`: `False` for padding
            and, if only rows of text are compared, for tokens of images.
        attended: Boolean tensor of shape `(batch, keys)`: `False` for padding.
        row_positions: Integer tensor of shape `(batch or 1, rows)`.
        key_positions: Integer tensor of shape `(batch or 1, keys)`.
    """

    num_rows: int | Tensor
    mask: AttentionMask
    counted: Tensor
    attended: Tensor
    row_positions: Tensor
    key_positions: Tensor

    def select(self, attention: Attention) -> Attention:
        """`attention` with queries of only these rows."""
        return attention._replace(query=attention.query[:, -self.num_rows :])


def after_segments(rows: MatchedRows, numbers: Tensor) -> Tensor:
    """Which rows can attend every segment of their example.

    Args:
        rows: `MatchedRows`.
        numbers: Integer tensor of shape `(batch, keys)`, the number of each
            key's segment; 0 means none.

    Returns:
        A boolean tensor of shape `(batch, rows)`: rows that stand after the
        last causal key of any segment.
    """
    index = ops.arange(ops.shape(numbers)[1])
    later = ops.logical_and(rows.mask.causal, numbers > 0)
    last = ops.max(ops.where(later, index, -1), axis=1, keepdims=True)
    return ops.cast(rows.mask.row_index, index.dtype) > last


def matched_rows(
    model: keras.Model,
    x: Mapping[str, Tensor],
    key_length: int | Tensor,
    rows: Literal["text", "all"],
) -> MatchedRows:
    """The rows of a batch.

    Args:
        model: A KerasHub model.
        x: Dictionary of the model's inputs.
        key_length: Integer, the number of tokens of images and text.
        rows: `"text"` for rows of text, or `"all"` for those of images too.
    """
    length = ops.shape(x["token_ids"])[1]
    num_rows = length if rows == "text" else key_length
    first_row = key_length - num_rows
    mask = attention_mask(
        model, x, key_length, ops.arange(first_row, key_length)
    )
    attended = ops.logical_or(mask.bidirectional, mask.causal)
    counted = attended[:, first_row:]
    if rows == "text":
        # Only tokens of images attend their block, and they do not count here.
        mask = mask._replace(block=None)
        counted = ops.logical_and(counted, text_rows(x))
    positions = x.get("positions")
    if positions is None:
        positions = ops.arange(key_length)[None]
    elif len(positions.shape) == 3:
        positions = positions[:, 0]  # M-RoPE's channel of text.
    return MatchedRows(
        num_rows, mask, counted, attended, positions[:, first_row:], positions
    )
