"""Reads how heads attend in batches of data, and which rows count."""

import itertools
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_shape
from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import no_gradients
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.backbones.decoder import check_inputs
from keras_laid.backbones.forward import forward
from keras_laid.backbones.head_statistics import Examples
from keras_laid.backbones.head_statistics import SharpestRows
from keras_laid.backbones.head_statistics import sharpest_rows
from keras_laid.backbones.qwen_vision import check_grids
from keras_laid.backbones.segments import Segments
from keras_laid.backbones.segments import segment_numbers
from keras_laid.ops.attention import AttentionMask
from keras_laid.typing import Tensor


class Batch(NamedTuple):
    """The parts of a batch that are read.

    Attributes:
        x: Dictionary of the model's inputs, which may have other entries, such
            as `"segments"` and `"needle"`.
        sample_weight: Tensor of shape `(batch, length)` or `None`.
    """

    x: dict[str, Tensor]
    sample_weight: Tensor | None


def batch_of(data: Any) -> Batch:
    if isinstance(data, dict):
        return Batch(data, None)
    x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return Batch(x, sample_weight)


def first_batches(data: object, count: int) -> list[Batch]:
    """Reads up to `count` batches; there must be at least one."""
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            "`data` must be an iterable of batches. Received: data of type "
            f"{type(data).__name__}. Pass one batch as `[batch]`."
        )
    batches = [batch_of(each) for each in itertools.islice(data, count)]
    if not batches:
        raise ValueError(
            "`data` must have one batch or more. Received: data of type "
            f"{type(data).__name__} without batches. If it is an iterator that "
            "has been read, make a new one."
        )
    return batches


def examples_of(
    model: keras.Model,
    batch: Batch,
    layers: Sequence[int],
    kinds: Sequence[str],
    num_segments: int | None,
) -> dict[str, Examples]:
    """How heads attend, by kind of row, in examples with rows of that kind."""
    x = batch.x
    check_batch(model, batch)
    with no_gradients():
        attention = forward(model, x, layers).attention
    key_length = attention[layers[0]].key.shape[1]
    segments = segments_of_batch(model, x, key_length, num_segments)
    if segments is None:
        return {}

    def mask_of(row_index: np.ndarray) -> AttentionMask:
        return attention_mask(
            model, x, key_length, ops.convert_to_tensor(row_index)
        )

    counted = counted_rows(
        batch, mask_of(np.arange(key_length)), segments, kinds
    )
    exists = existing(segments)
    needle = np.full(len(exists), -1)
    if "needle" in x:
        needle = ops.convert_to_numpy(x["needle"])
    found = {}
    for kind, counts in counted.items():
        used = counts.any(axis=1) & (exists.sum(axis=1) > 1)
        row_index = np.flatnonzero(counts[used].any(axis=0))
        if not used.any():
            continue
        with no_gradients():
            rows = {
                layer: sharpest_rows(
                    attention[layer],
                    mask_of,
                    segments,
                    row_index,
                    counts[:, row_index],
                )
                for layer in layers
            }
        found[kind] = Examples(
            exists[used],
            needle[used],
            {
                layer: SharpestRows(*(array[used] for array in sharpest))
                for layer, sharpest in rows.items()
            },
        )
    return found


def check_batch(model: keras.Model, batch: Batch) -> None:
    """Refuses a batch that lacks inputs, or whose shapes do not fit."""
    check_inputs(model, batch.x)
    check_grids(batch.x)
    size, length = batch.x["token_ids"].shape
    if "needle" in batch.x:
        check_shape("needle", batch.x["needle"], batch=size)
        check_dtype("needle", batch.x["needle"], "int")
    if batch.sample_weight is not None:
        check_shape(
            "sample_weight", batch.sample_weight, batch=size, length=length
        )


def segments_of_batch(
    model: keras.Model,
    x: dict[str, Tensor],
    key_length: int,
    num_segments: int | None,
) -> Segments | None:
    """Segments of keys that are not padding; `None` if there is no segment."""
    numbers = segment_numbers(model, x, key_length)
    if numbers is None:
        return None
    mask = attention_mask(model, x, key_length, ops.arange(key_length))
    present = ops.logical_or(mask.bidirectional, mask.causal)
    numbers = ops.where(present, numbers, 0)
    count = num_segments or int(ops.max(numbers))
    numbers = ops.where(numbers <= count, numbers, 0)
    return Segments(ops.maximum(numbers, 0), count) if count > 0 else None


def existing(segments: Segments) -> np.ndarray:
    """Which segments each example has, of shape `(batch, segments)`."""
    numbers = ops.convert_to_numpy(segments.numbers)
    exists = np.zeros((len(numbers), segments.num_segments + 1), "bool")
    np.put_along_axis(exists, numbers, True, axis=1)
    return exists[:, 1:]


def counted_rows(
    batch: Batch, mask: AttentionMask, segments: Segments, kinds: Sequence[str]
) -> dict[str, np.ndarray]:
    """Which rows are of each kind: boolean, of shape `(batch, keys)`."""
    causal = ops.convert_to_numpy(mask.causal)
    present = ops.convert_to_numpy(mask.bidirectional) | causal
    text = ops.convert_to_numpy(text_rows(batch.x))
    first = present.shape[1] - text.shape[1]
    is_text = np.zeros_like(present)  # PaliGemma's images stand before it.
    is_text[:, first:] = text
    counted = {"image": present & ~is_text}
    # Rows after the last causal key of any segment can attend all segments.
    index = np.arange(present.shape[1])
    later = causal & (ops.convert_to_numpy(segments.numbers) > 0)
    last = np.where(later, index, -1).max(axis=1)
    counted["text"] = present & is_text & (index > last[:, None])
    if batch.sample_weight is not None:
        counted["text"][:, first:] &= ops.convert_to_numpy(
            matters(batch.sample_weight)
        )
    return {kind: counted[kind] for kind in kinds}


def matters(sample_weight: Tensor) -> Tensor:
    """Which tokens stand at or before an example's last marked token."""
    marked = ops.cast(ops.cast(sample_weight, "float32") > 0, "int32")
    after = ops.flip(ops.cumsum(ops.flip(marked, axis=1), axis=1), axis=1)
    return after > 0
