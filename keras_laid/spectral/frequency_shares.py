"""The share of each rotary frequency in the attention logits."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_laid.backbones.rotary_frequencies import sum_over_pairs
from keras_laid.spectral.prompt_attention import PromptAttention
from keras_laid.spectral.prompt_attention import prompt_attention
from keras_laid.typing import Tensor


def frequency_shares(
    model: keras.Model, inputs: dict[str, Tensor], layers: Sequence[int] = (-1,)
) -> np.ndarray:
    """Share of each rotary frequency in the logits' variance over the images.

    A logit is a sum over rotary frequencies of the product of the query's and
    the key's rotated pair. Over the image tokens, the variance of a row's
    logits is the sum of the covariances of each frequency's part with the whole
    logit; a frequency's share is its covariance, summed over the rows of the
    prompt, divided by the variance, summed in the same way. The covariances add
    up to the variance; the variances or absolute values of the parts would not.
    Like softmax, covariances ignore anything that is equal for all keys. Sums
    are taken before the ratio, so that rows whose logits hardly vary count less
    than others.

    Logits are taken before the soft-cap, since they are no longer a sum after
    it. Text keys are left out: they differ from image keys at all frequencies,
    however long the haystack. Only the covariance of the keys is kept, and no
    logit is computed, so memory is linear in the length.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs: Dictionary of tensors, one batch of the model's inputs.
        layers: Sequence of integers, indices of decoder layers with full
            attention; negative ones count from the end. Defaults to `(-1,)`,
            the last layer.

    Returns:
        A float array of shape `(batch, layers, heads, frequencies)` that sums
        to 1 over frequencies, highest frequency first (see
        `rotary_wavelengths`). A share is negative where a frequency works
        against the others, which then sum to more than 1. NaN where no logit
        varies.

    Raises:
        ValueError: If `layers` is empty, or if an index is out of range or
            belongs to a layer with a sliding window.

    Reference:
     - [Su et al., 2021](https://arxiv.org/abs/2104.09864), equation 16: the
       logit as a sum over pairs. The share is ours.
    """
    return np.stack(
        [
            ops.convert_to_numpy(shares_of(rows))
            for rows in prompt_attention(model, inputs, layers)
        ],
        axis=1,
    )


def shares_of(rows: PromptAttention) -> Tensor:
    """Shares of shape `(batch, heads, frequencies)`."""
    # b = batch, i = row, j = key, h = head, d and e = features
    query = ops.cast(rows.attention.query, "float32")
    key = rows.attention.key_of_each_head()[:, : rows.image_tokens]
    key = key - ops.mean(key, axis=1, keepdims=True)
    key_covariance = ops.einsum("bjhd,bjhe->bhde", key, key)
    with_logit = ops.einsum("bihe,bhde->bihd", query, key_covariance)
    by_feature = ops.einsum("bihd,bi->bhd", query * with_logit, rows.row_weight)
    by_frequency = sum_over_pairs(by_feature)
    return by_frequency / ops.sum(by_frequency, axis=-1, keepdims=True)
