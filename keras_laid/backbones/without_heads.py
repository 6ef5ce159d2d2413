"""A model without some of its attention heads, to see what they do."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import AttentionLayer
from keras_laid.backbones.families import attention_layers
from keras_laid.typing import Tensor


@contextlib.contextmanager
def without_heads(
    model: keras.Model, heads: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Scope in which some attention heads of a model put out zeros.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        heads: Pairs of integers `(layer, query head)`.

    Raises:
        ValueError: If a layer or a head does not exist, or a layer has no
            attention maps.
    """
    layers = attention_layers(model)
    with contextlib.ExitStack() as stack:
        for index in sorted({layer for layer, _ in heads}):
            chosen = [head for layer, head in heads if layer == index]
            check_heads(layers, index, chosen)
            layer = layers[index]
            stack.enter_context(
                replaced_method(
                    layer.layer, "_compute_attention", silencing(layer, chosen)
                )
            )
        yield


def silencing(
    layer: AttentionLayer, heads: Sequence[int]
) -> Callable[..., Tensor]:
    """The layer's `_compute_attention`, with zeros from some heads."""
    compute_attention = layer.layer._compute_attention
    kept = np.ones(layer.num_query_heads)
    kept[list(heads)] = 0.0

    def compute_without(*args: Any, **kwargs: Any) -> Tensor:
        outputs = compute_attention(*args, **kwargs)
        # [batch, rows, heads, head dim]
        return outputs * ops.cast(kept, outputs.dtype)[:, None]

    return compute_without


def check_heads(
    layers: Sequence[AttentionLayer], index: int, heads: Sequence[int]
) -> None:
    """Refuses a layer without these query heads."""
    exists = 0 <= index < len(layers) and layers[index].kind != "linear"
    if not exists or not all(
        0 <= head < layers[index].num_query_heads for head in heads
    ):
        raise ValueError(
            "Heads must be pairs (layer, head) of layers with attention maps "
            f"and of their query heads. Received: layer {index}, heads "
            f"{list(heads)}, of a decoder of {len(layers)} layers"
        )
