"""Figure 4: what each head still reads from images as the haystack grows."""

import numpy as np
from keras import ops

from keras_laid.spectral.prompt_attention import prompt_attention


def head_activations(model, inputs_by_size, layers=(-1,)):
    """Normalised key activation of each head, by haystack size.

    For a row `i` of the prompt, with attention `a` and keys `k`:

    `|sum over image tokens j of a_ij k_j| / sum over all tokens j of a_ij |k_j|`

    and the mean over rows. It is what the head reads from the images, as a share
    of all that it attends: it falls where attention leaves the images, and where
    it spreads over many whose keys differ, since these cancel each other. A head
    that finds one image among many keeps its activation.

    The paper's figure 4 plots "normalised key activations" and gives no formula;
    this one is ours. Keys alone would not do: PaliGemma has one key head for all
    query heads, and its keys hardly change with the number of images.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs_by_size: Dictionary from haystack size, in images, to one batch
            of inputs.
        layers: Indices of decoder layers with full attention. Defaults to the
            last one.

    Returns:
        A dictionary from size to a float array of shape
        `(batch, layers, heads)` in `[0, 1]`.

    Raises:
        ValueError: If `layers` is empty, or an index is out of range or that of
            a layer with a sliding window.

    Reference:
     - [Zhou et al., 2026](https://arxiv.org/abs/2512.21576), figure 4.
    """
    return {
        size: np.stack(
            [
                ops.convert_to_numpy(activation_of(rows))
                for rows in prompt_attention(model, inputs, layers)
            ],
            axis=1,
        )
        for size, inputs in inputs_by_size.items()
    }


def classify_heads(activations, keep=0.8):
    """Calls each head local or global, by how its activation goes with size.

    A line is fitted to the mean activation over the logarithm of the size. A
    head is `"global"` (stable or rising) if the line is at the largest size at
    least `keep` of what it is at the smallest, else `"local"` (declining). The
    line is used, and not its ends' measured values, because all sizes then
    count. The paper names the two kinds and gives no rule; this one is ours.

    Args:
        activations: Dictionary from haystack size to an array of shape
            `(batch, layers, heads)`, from `head_activations`; of two sizes or
            more.
        keep: Float in `(0, 1]`. Defaults to `0.8`.

    Returns:
        An array of strings of shape `(layers, heads)`.

    Raises:
        ValueError: If there are fewer than two sizes, or if `keep` is out of
            its range.
    """
    if len(activations) < 2:
        raise ValueError(
            "`activations` must have two sizes or more. Received: sizes "
            f"{sorted(activations)}. Pass more to `head_activations`."
        )
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be in (0, 1]. Received: keep={keep}")
    sizes = sorted(activations)
    means = np.stack([activations[size].mean(axis=0) for size in sizes])
    heads = means.shape[1:]
    slope, start = np.polyfit(
        np.log(sizes) - np.log(sizes[0]), means.reshape(len(sizes), -1), 1
    )
    end = start + slope * np.log(sizes[-1] / sizes[0])
    return np.where(end >= keep * start, "global", "local").reshape(heads)


def activation_of(rows):
    """Activations of shape `(batch, heads)`."""
    # b = batch, h = head, i = row, j = key, d = feature
    maps = rows.maps()
    key = rows.attention.key_of_each_head()
    images = rows.image_tokens
    read = ops.einsum("bhij,bjhd->bhid", maps[..., :images], key[:, :images])
    attended = ops.einsum("bhij,bjh->bhi", maps, _length(key))
    return ops.einsum("bhi,bi->bh", _length(read) / attended, rows.row_weight)


def _length(x):
    return ops.sqrt(ops.sum(ops.square(x), axis=-1))
