"""Figure 4 of the paper: activation of each head as the haystack grows."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_number
from keras_laid.arguments import is_number
from keras_laid.ops.attention import TINY
from keras_laid.spectral.prompt_attention import PromptAttention
from keras_laid.spectral.prompt_attention import prompt_attention
from keras_laid.typing import Tensor

# A head with less activation than this at the largest size is local.
FAINT = 0.05


def head_activations(
    model: keras.Model,
    inputs_by_size: dict[int, dict[str, Tensor]],
    layers: Sequence[int] = (-1,),
    beyond: float = 0.5,
) -> dict[int, np.ndarray]:
    """Normalised key activation of each head, by haystack size.

    For a row `i` of the prompt, let `a_ij` be its attention to image token `j`,
    and `c_j` that token's key minus the mean key of the images. The activation
    of the row is

    `|sum over far j of a_ij c_j| / sum over all j of a_ij |c_j|`,

    and the result is the mean over rows. It is near 1 for a head that reads one
    far token, or several with similar keys. It falls where attention spreads
    over tokens with different keys, which cancel: even attention gives about 0.
    It also falls where attention stays near the question while the haystack
    grows. With the default `beyond`, half of the tokens are far, so that a head
    that finds an image wherever it is has a mean of 0.5 at best.

    The paper's figure 4 plots "normalised key activations" and gives no
    formula; this one is ours. The norm of only the keys could not tell heads
    apart: PaliGemma has one key head for all query heads. The mean key is
    subtracted since softmax ignores anything that all logits share. The total
    attention to images does not count: it grows with their number, whatever a
    head does.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs_by_size: Dictionary from haystack size, in images, to one batch
            of inputs.
        layers: Sequence of integers, indices of decoder layers with full
            attention; negative ones count from the end. Defaults to `(-1,)`,
            the last layer.
        beyond: Float in `[0, 1)`, the share of the image tokens, counted from
            the nearest, that are not far. With `0.0` all are far. Defaults to
            `0.5`.

    Returns:
        A dictionary from size to a float array of shape
        `(batch, layers, heads)` in `[0, 1]`.

    Raises:
        ValueError: If `layers` is empty, or if an index is out of range or
            belongs to a layer with a sliding window; or if `beyond` is out of
            its range.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), figure 4.
    """
    check_number("beyond", beyond, "[0, 1)")
    _check_sizes("inputs_by_size", inputs_by_size)
    return {
        size: np.stack(
            [
                ops.convert_to_numpy(activation_of(rows, beyond))
                for rows in prompt_attention(model, inputs, layers)
            ],
            axis=1,
        )
        for size, inputs in inputs_by_size.items()
    }


def classify_heads(
    activations: dict[int, np.ndarray], keep: float = 0.67
) -> np.ndarray:
    """Classifies each head as local or global by its activation over size.

    A line is fitted to the mean activation over the logarithm of the size. A
    head is `"global"` (stable or rising) if the line at the largest size is at
    least `keep` times the line at the smallest, else `"local"` (declining). A
    head whose line is below 0.05 at the largest size is local too, however
    little it declined: it never read far images. The line is used instead of
    the measured values at its ends, so that all sizes count.

    The paper names the two kinds and gives no rule; this one is ours. In its
    figure 4 local heads fall to about 0.4 / 0.7 = 0.57 of their first value;
    the default of `keep` lies between that and 1. Let the smallest size be
    several images, such as 5: among few tokens little cancels, so that every
    head has a high activation.

    Args:
        activations: Dictionary from haystack size to an array of shape
            `(batch, layers, heads)`, from `head_activations`, with two sizes or
            more.
        keep: Float in `(0, 1]`, the smallest share of its activation that a
            global head keeps. Defaults to `0.67`.

    Returns:
        An array of shape `(layers, heads)` of the strings `"global"` and
        `"local"`.

    Raises:
        ValueError: If there are fewer than two sizes, or if `keep` is out of
            its range.
    """
    _check_sizes("activations", activations)
    if len(activations) < 2:
        raise ValueError(
            "`activations` must have two sizes or more. Received: sizes "
            f"{sorted(activations)}. Pass more to `head_activations`."
        )
    check_number("keep", keep, "(0, 1]")
    shapes = {np.shape(values)[1:] for values in activations.values()}
    if len(shapes) > 1 or len(*shapes) != 2:
        raise ValueError(
            "`activations` must be arrays of shape `(batch, layers, heads)`, "
            "of the same layers and heads. Received: shapes "
            f"{[np.shape(values) for values in activations.values()]}"
        )
    if not all(
        np.size(values) and np.isfinite(values).all()
        for values in activations.values()
    ):
        raise ValueError(
            "`activations` must be finite, of one example or more. Received: "
            "no example, or values that are not finite"
        )
    sizes = sorted(activations)
    means = np.stack([np.mean(activations[size], axis=0) for size in sizes])
    heads = means.shape[1:]
    slope, start = np.polyfit(
        np.log(sizes) - np.log(sizes[0]), means.reshape(len(sizes), -1), 1
    )
    end = start + slope * np.log(sizes[-1] / sizes[0])
    is_global = (end >= keep * start) & (end >= FAINT)
    return np.where(is_global, "global", "local").reshape(heads)


def _check_sizes(name: str, by_size: object) -> None:
    if not isinstance(by_size, dict):
        raise TypeError(
            f"`{name}` must be a dictionary from haystack size, in images. "
            f"Received: {type(by_size).__name__}"
        )
    if not by_size or not all(is_number(s) and s > 0 for s in by_size):
        raise ValueError(
            f"The sizes of `{name}` must be one or more numbers above 0. "
            f"Received: {list(by_size)!r:.80}"
        )


def activation_of(rows: PromptAttention, beyond: float) -> Tensor:
    """Activations of shape `(batch, heads)`."""
    # b = batch, h = head, i = row, j = key, d = feature
    images = rows.image_tokens
    far = images - int(beyond * images)  # The farthest come first.
    maps = rows.maps()[..., :images]
    key = rows.attention.key_of_each_head()[:, :images]
    key = key - ops.mean(key, axis=1, keepdims=True)
    read = ops.einsum("bhij,bjhd->bhid", maps[..., :far], key[:, :far])
    attended = ops.einsum("bhij,bjh->bhi", maps, _length(key))
    activation = _length(read) / ops.maximum(attended, TINY)
    return ops.einsum("bhi,bi->bh", activation, rows.row_weight)


def _length(x: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(x), axis=-1))
