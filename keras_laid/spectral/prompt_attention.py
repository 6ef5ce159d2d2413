"""The attention of the prompt's text, in memory linear in the length."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_indices
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import run_capturing
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import log_attention
from keras_laid.typing import Tensor


class PromptAttention(NamedTuple):
    """Attention of text rows to images and text, in one layer.

    Attributes:
        attention: A `keras_laid.ops.Attention` with only the queries of text.
        allowed: Boolean tensor of shape `(batch, 1, rows, keys)`.
        row_weight: Float tensor of shape `(batch, rows)`: rows of the prompt
            have equal weights that sum to 1; rows of the response and padding
            have weight 0.
        image_tokens: Integer, the number of keys that are image tokens. They
            come first.
    """

    attention: Attention
    allowed: Tensor
    row_weight: Tensor
    image_tokens: int

    def maps(self) -> Tensor:
        """Attention of shape `(batch, heads, rows, keys)`, 0 to 1."""
        return ops.exp(log_attention(self.attention, self.allowed))


def check_is_dictionary(inputs: object) -> None:
    if not isinstance(inputs, dict):
        raise TypeError(
            "`inputs` must be a dictionary, one batch of the model's inputs. "
            f"Received: {type(inputs).__name__}. From a batch of "
            "`Haystacks`, pass the first element."
        )


def prompt_attention(
    model: keras.Model, inputs: dict[str, Tensor], layers: Sequence[int]
) -> list[PromptAttention]:
    """Runs a model and keeps the attention of its text.

    Each row is a text token, and there are few of them: the kept tensors, and
    all that is computed from them, grow linearly with the number of images.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs: Dictionary of tensors, one batch of the model's inputs.
        layers: Sequence of integers, indices of decoder layers with full
            attention.

    Returns:
        A list of `PromptAttention`, one for each of `layers`.

    Raises:
        ValueError: If `layers` is empty, or if an index is out of range or
            belongs to a layer with a sliding window; if an input is missing; if
            an example has no prompt; or if the model is not a PaliGemma.
        TypeError: If `layers` does not hold integers, or `inputs` is not a
            dictionary.
    """
    decoder.pali_gemma_backbone_of(model)
    check_is_dictionary(inputs)
    layers = decoder.chosen_layers(model, check_indices("layers", layers))
    names = decoder.input_names(model)
    if missing := sorted(set(names) - inputs.keys()):
        raise ValueError(
            f"`inputs` must have {sorted(names)}. "
            f"Received: {sorted(inputs)}, without {missing}"
        )
    padding, response = (
        ops.convert_to_numpy(inputs[name])
        for name in ("padding_mask", "response_mask")
    )
    if not (padding > response).any(axis=1).all():
        raise ValueError(
            "Each example must have a prompt: tokens where `padding_mask` is 1 "
            "and `response_mask` is 0. Received: an example without any"
        )
    captured = run_capturing(model, inputs, layers)
    length = inputs["token_ids"].shape[1]
    key_length = captured[0].key.shape[1]
    image_tokens = key_length - length
    mask = attention_mask(
        model, inputs, key_length, np.arange(image_tokens, key_length)
    )
    prompt = ops.cast(mask.bidirectional[:, image_tokens:], "float32")
    row_weight = prompt / ops.sum(prompt, axis=1, keepdims=True)
    return [
        PromptAttention(
            attention._replace(query=attention.query[:, image_tokens:]),
            mask.allowed(),
            row_weight,
            image_tokens,
        )
        for attention in captured
    ]
