"""Which keys of a prompt belong to which image, or to which text segment."""

from collections.abc import Mapping
from typing import NamedTuple

import keras
from keras import ops
from keras_hub.models import PaliGemmaBackbone

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_shape
from keras_laid.backbones.attention_capture import numbered_runs
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.backbones.decoder import backbone_of
from keras_laid.typing import Tensor


class Segments(NamedTuple):
    """Segments of a prompt's keys, such as its images.

    Attributes:
        numbers: Integer tensor of shape `(batch, keys)`: the number of each
            key's segment, from 1; 0 is no segment.
        count: Integer, or a scalar tensor where it is known only later: the
            largest number.
    """

    numbers: Tensor
    count: int | Tensor


def segments_of(
    model: keras.Model,
    inputs: Mapping[str, Tensor],
    key_length: int | Tensor,
    count: int | None = None,
) -> Segments | None:
    """The segments of a batch of prompts.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        inputs: The model's inputs. `"segments"`, an integer tensor of shape
            `(batch, keys)`, numbers segments of any kind from 1, such as
            documents. Without it each image is a segment.
        key_length: Integer, tokens of images and text.
        count: Optional integer, the largest number of a segment. Needed where
            it is not the number of images in each prompt.

    Returns:
        The `Segments`, or `None` if prompts have none: no images, no
        `"segments"`.

    Raises:
        ValueError: If `count` is needed and not given, or `"segments"` has
            another shape.
    """
    if "segments" in inputs:
        numbers = inputs["segments"]
        check_shape("segments", numbers, batch=None, keys=None)
        check_dtype("segments", numbers, "int")
    elif isinstance(backbone_of(model), PaliGemmaBackbone):
        return pali_gemma_segments(inputs, key_length)
    elif "vision_mask" in inputs or "vision_indices" in inputs:
        images = inputs.get("images", inputs.get("pixel_values"))
        if count is None and images is not None and len(images.shape) >= 4:
            count = images.shape[1]
        is_image = ops.logical_not(text_rows(inputs))
        numbers = numbered_runs(is_image)
    else:
        return None
    if count is None:
        raise ValueError(
            "The number of segments must be known before a step is compiled. "
            f"Received: inputs with {sorted(inputs)}. Pass the largest number "
            "of a segment as `num_segments`."
        )
    return Segments(ops.cast(numbers, "int32"), count)


def pali_gemma_segments(
    inputs: Mapping[str, Tensor], key_length: int | Tensor
) -> Segments:
    """Images stand before the text, and all have as many tokens."""
    images = inputs["images"]
    count = 1 if len(images.shape) == 4 else images.shape[1]
    if count is None:
        count = ops.shape(images)[1]
    batch, text_length = ops.shape(inputs["token_ids"])
    image_tokens = key_length - text_length
    index = ops.arange(key_length)
    numbers = index // (image_tokens // count) + 1
    numbers = ops.where(index < image_tokens, numbers, 0)
    numbers = ops.broadcast_to(numbers[None], (batch, key_length))
    return Segments(ops.cast(numbers, "int32"), count)
