"""How far attention reaches: its mass by distance."""

import itertools

import numpy as np
from keras import ops

from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.decoder import attention_layers
from keras_laid.ops.attention_divergence.definition import log_attention


def attention_mass(model, inputs, edges, layers=(-1,)):
    """Share of the prompt's attention that falls on each range of distances.

    Means over the text tokens of the prompt, over heads, layers and examples.
    Only their rows are computed: memory is linear in the length.

    Args:
        model: A `keras_laid.MultiImagePaliGemmaCausalLM` or
            `keras_hub.models.PaliGemmaCausalLM`.
        inputs: One batch of its inputs.
        edges: Increasing sequence of distances in tokens, 0 first. Range `i` is
            `edges[i] <= distance < edges[i + 1]`; what is farther than the
            last edge is counted nowhere.
        layers: Indices of decoder layers. Defaults to the last one.

    Returns:
        A float array of shape `(len(edges) - 1,)` of shares in `[0, 1]`.
    """
    count = len(attention_layers(model))
    layers = [layer % count for layer in layers]
    with captured_attention(model, layers) as captured:
        model(inputs)
    length = inputs["token_ids"].shape[1]
    shares = []
    for attention in captured.values():
        key_length = attention.key.shape[1]
        row_index = np.arange(key_length - length, key_length)
        mask = attention_mask(inputs, key_length, row_index)
        rows = attention._replace(query=attention.query[:, -length:])
        maps = ops.convert_to_numpy(
            ops.exp(log_attention(rows, mask.allowed()))
        ).mean(axis=1)  # [batch, rows, keys], the mean over heads
        distance = np.abs(row_index[:, None] - np.arange(key_length))
        prompt = ops.convert_to_numpy(mask.bidirectional)[:, -length:]
        by_row = np.stack(
            [
                (maps * ((distance >= near) & (distance < far))).sum(axis=-1)
                for near, far in itertools.pairwise(edges)
            ],
            axis=-1,
        )  # [batch, rows, ranges]
        shares.append(by_row[prompt].mean(axis=0))
    return np.mean(shares, axis=0)
