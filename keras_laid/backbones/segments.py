"""Which keys of a prompt belong to which image, or to which text segment."""

from collections.abc import Mapping
from typing import NamedTuple

import keras
from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_shape
from keras_laid.arguments import is_integer
from keras_laid.backbones.attention_capture import numbered_runs
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.backbones.families import family_of
from keras_laid.typing import Tensor


class Segments(NamedTuple):
    """Segments of a prompt's keys, such as its images.

    Attributes:
        numbers: Integer tensor of shape `(batch, keys)`: the number of each
            key's segment, from 1; 0 means no segment.
        num_segments: Integer, or a scalar integer tensor where it is known only
            at run time: the largest number of a segment.
    """

    numbers: Tensor
    num_segments: int | Tensor


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
        inputs: Dictionary of the model's inputs. The optional entry
            `"segments"`, an integer tensor of shape `(batch, keys)`, numbers
            segments of any kind from 1, such as documents. Without it each
            image is a segment. `"segment_numbers"`, of shape
            `(batch, segments)`, may list their numbers.
        key_length: Integer, the number of tokens, of images and text together.
        count: Optional integer, the largest number of a segment; keys with
            larger numbers are in no segment. Required with `"segments"` that
            no `"segment_numbers"` list, and for an `"image_grid_thw"` of Qwen
            3.5 without an axis of prompts, which does not say how many images
            a prompt has. Defaults to the number of images, or of listed
            segments.

    Returns:
        The `Segments`, or `None` if the inputs have neither images nor
        `"segments"`.

    Raises:
        TypeError: If `"segments"` is not an integer tensor.
        ValueError: If `count` is required and not given, or `"segments"` has
            the wrong shape.
    """
    numbers = segment_numbers(model, inputs, key_length)
    if numbers is None:
        return None
    if count is None and "segments" in inputs:
        count = listed_segments(inputs)
    elif count is None:
        count = images_per_prompt(inputs)
    if count is None:
        raise ValueError(
            "The number of segments must be known before a step is compiled. "
            f"Received: inputs with {sorted(inputs)}. Pass the largest number "
            "of a segment as `num_segments`, or list the numbers in the entry "
            "'segment_numbers'."
        )
    return Segments(numbers, count)


def segment_numbers(
    model: keras.Model,
    inputs: Mapping[str, Tensor],
    key_length: int | Tensor,
) -> Tensor | None:
    """The number of each key's segment, or `None`; as in `segments_of`."""
    if "segments" in inputs:
        numbers = inputs["segments"]
        keys = key_length if is_integer(key_length) else None
        batch = inputs["token_ids"].shape[0]
        check_shape("segments", numbers, batch=batch, keys=keys)
        check_dtype("segments", numbers, "int")
    elif family_of(model).mask == "prefix":
        numbers = pali_gemma_numbers(inputs, key_length)
    elif has_images(inputs):
        numbers = numbered_runs(ops.logical_not(text_rows(inputs)))
    else:
        return None
    return ops.cast(numbers, "int32")


def has_images(inputs: Mapping[str, Tensor]) -> bool:
    """Whether prompts that hold images among text can have any."""
    if "vision_mask" not in inputs and "vision_indices" not in inputs:
        return False
    count = images_per_prompt(inputs)
    return not (is_integer(count) and count == 0)


def listed_segments(inputs: Mapping[str, Tensor]) -> int | Tensor | None:
    """How many segments are listed; `None` if none are."""
    if "segment_numbers" not in inputs:
        return None
    count = inputs["segment_numbers"].shape[1]
    return ops.shape(inputs["segment_numbers"])[1] if count is None else count


def images_per_prompt(inputs: Mapping[str, Tensor]) -> int | Tensor | None:
    """How many images a prompt can have; `None` if inputs do not say."""
    images = inputs.get("images", inputs.get("pixel_values"))
    images = inputs.get("image_grid_thw", images)
    # Grids of KerasHub's own preprocessor have no axis of prompts.
    if images is None or len(images.shape) == 2:
        return None
    if "vision_mask" not in inputs and len(images.shape) == 4:
        return 1  # A plain PaliGemma has no axis of images.
    count = images.shape[1]
    return ops.shape(images)[1] if count is None else count


def pali_gemma_numbers(
    inputs: Mapping[str, Tensor], key_length: int | Tensor
) -> Tensor:
    """Numbers PaliGemma's images, which come first and are equally long."""
    batch, text_length = ops.shape(inputs["token_ids"])
    image_tokens = key_length - text_length
    index = ops.arange(key_length)
    numbers = index // (image_tokens // images_per_prompt(inputs)) + 1
    numbers = ops.where(index < image_tokens, numbers, 0)
    return ops.broadcast_to(numbers[None], (batch, key_length))
