"""How far attention reaches: its mass by distance."""

import itertools
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_increasing
from keras_laid.backbones.decoder import backbone_of
from keras_laid.spectral.prompt_attention import PromptAttention
from keras_laid.spectral.prompt_attention import check_is_dictionary
from keras_laid.spectral.prompt_attention import prompt_attention
from keras_laid.typing import Tensor

UNITS = ("token", "image")


def attention_mass(
    model: keras.Model,
    inputs: dict[str, Tensor],
    edges: Sequence[int],
    layers: Sequence[int] = (-1,),
) -> np.ndarray:
    """Share of the prompt's attention that falls on each range of distances.

    The shares are means over the text tokens of the prompt, over heads, layers
    and examples. Distances are counted in the sequence from each row to each
    key, text included. Only the rows of text are computed, so memory is linear
    in the length.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs: Dictionary of tensors, one batch of the model's inputs.
        edges: Increasing sequence of two or more distances in tokens. Range
            `i` is `edges[i] <= distance < edges[i + 1]`; keys at the last edge
            or farther are not counted.
        layers: Sequence of integers, indices of decoder layers with full
            attention; negative ones count from the end. Defaults to `(-1,)`,
            the last layer.

    Returns:
        A float array of shape `(len(edges) - 1,)` of shares in `[0, 1]`.

    Raises:
        ValueError: If `layers` is empty, or if an index is out of range or
            belongs to a layer with a sliding window; or if `edges` do not
            increase.
    """
    check_increasing("edges", edges, "[0, inf)")
    shares = []
    for rows in prompt_attention(model, inputs, layers):
        maps = ops.convert_to_numpy(ops.mean(rows.maps(), axis=1))
        keys = np.arange(maps.shape[-1])
        distance = np.abs(keys[rows.image_tokens :, None] - keys)
        by_row = np.stack(
            [
                (maps * ((distance >= near) & (distance < far))).sum(axis=-1)
                for near, far in itertools.pairwise(edges)
            ],
            axis=-1,
        )  # [batch, rows, ranges]
        prompt = ops.convert_to_numpy(rows.row_weight) > 0
        shares.append(by_row[prompt].mean(axis=0))
    return np.mean(shares, axis=0)


def attention_by_distance(
    model: keras.Model,
    inputs: dict[str, Tensor],
    layers: Sequence[int] = (-1,),
    per: Literal["token", "image"] = "token",
) -> np.ndarray:
    """The prompt's attention to the images, as a signal over distance.

    The signal is the mean over the text tokens of the prompt. Distance is
    counted back from the first token of text, so that every row sees every
    distance. If it were counted from each row, only some rows would see the
    first and last distances, and this taper would show in the spectrum. Memory
    is linear in the length.

    Example:

    ```python
    signal = spectral.attention_by_distance(model, inputs, per="image")
    frequency, power = spectral.power_spectrum(signal)
    ```

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs: Dictionary of tensors, one batch of the model's inputs, without
            `"positions"`.
        layers: Sequence of integers, indices of decoder layers with full
            attention; negative ones count from the end. Defaults to `(-1,)`,
            the last layer.
        per: The unit of distance: `"token"`, or `"image"` to sum over the
            tokens of each image, which removes the pattern that all images
            share. Defaults to `"token"`.

    Returns:
        A float array of shape `(batch, layers, heads, distances)` of shares of
        attention in `[0, 1]`. Index `i` is the distance `i + 1`, in tokens or
        images. The sum over distances is the attention that images get; the
        rest goes to the text.

    Raises:
        ValueError: If `layers` is empty, or if an index is out of range or
            belongs to a layer with a sliding window; if `per` is another word;
            or if `inputs` has `"positions"`.
    """
    check_choice("per", per, UNITS)
    check_is_dictionary(inputs)
    if inputs.get("positions") is not None:
        raise ValueError(
            "`inputs` must have no positions of their own: a spectrum needs "
            "tokens at even distances. Received: inputs with 'positions'. "
            "Draw the haystacks without `stretching`."
        )
    signal = np.stack(
        [
            ops.convert_to_numpy(signal_of(rows))
            for rows in prompt_attention(model, inputs, layers)
        ],
        axis=1,
    )
    if per == "image":
        tokens = backbone_of(model).image_sequence_length
        signal = signal.reshape(*signal.shape[:-1], -1, tokens).sum(axis=-1)
    return signal


def signal_of(rows: PromptAttention) -> Tensor:
    """Attention of shape `(batch, heads, distances)`, nearest first."""
    # b = batch, h = head, i = row, j = key
    to_images = rows.maps()[..., : rows.image_tokens]
    signal = ops.einsum("bhij,bi->bhj", to_images, rows.row_weight)
    return ops.flip(signal, axis=-1)
