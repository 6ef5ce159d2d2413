"""Silences some attention heads of a model, to measure what they do."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import is_integer
from keras_laid.backbones.attention_capture import no_gradients
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.compiled import compiled_apart
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import layers_with_maps
from keras_laid.backbones.forward import forward
from keras_laid.backbones.head_examples import Batch
from keras_laid.typing import Tensor


@contextlib.contextmanager
def without_heads(
    model: keras.Model, heads: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Scope in which some attention heads of a model output zeros.

    Other Keras models that run the same backbone change with it, as
    `keras_laid.yarn` explains. On exit the model is as it was before, even if
    a call raised an error.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        heads: Sequence of pairs of integers `(layer, query head)`, both from 0.
            Layers with a sliding window are allowed.

    Raises:
        TypeError: If `heads` are not pairs of integers.
        ValueError: If a layer or a head does not exist, or a layer has no
            attention maps.
    """
    layers = layers_with_maps(model)
    by_layer: dict[int, list[int]] = {}
    for index, head in checked_heads(layers, heads):
        by_layer.setdefault(index, []).append(head)
    with contextlib.ExitStack() as stack:
        for index, silent in by_layer.items():
            layer = layers[index]
            function = silencing(layer, silent)
            stack.enter_context(
                replaced_method(layer.layer, "_compute_attention", function)
            )
        stack.enter_context(compiled_apart(model))
        yield


def silencing(
    layer: AttentionLayer, heads: Sequence[int]
) -> Callable[..., Tensor]:
    """The layer's `_compute_attention`, with zeros from some heads."""
    compute_attention = layer.layer._compute_attention
    kept = np.ones((layer.num_query_heads, 1), "float32")
    kept[list(heads)] = 0.0

    def compute_without(*args: Any, **kwargs: Any) -> Tensor:
        # [batch, rows, heads, head dim]
        outputs = compute_attention(*args, **kwargs)
        return outputs * ops.cast(kept, outputs.dtype)

    return compute_without


def checked_heads(
    layers: Mapping[int, AttentionLayer], heads: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Returns `heads` as pairs of Python integers; each head must exist."""
    rule = "`heads` must be pairs of integers (layer, query head)"
    if not isinstance(heads, Sequence) or not all(map(is_pair, heads)):
        raise TypeError(
            f"{rule}. Received: heads={heads!r:.80}. "
            "Pass a list of tuples, such as `[(1, 3)]`."
        )
    for index, head in heads:
        counts = {i: layer.num_query_heads for i, layer in layers.items()}
        if not 0 <= head < counts.get(index, 0):
            raise ValueError(
                f"{rule} of layers with attention maps. Received: layer "
                f"{index}, head {head}, for a decoder with these numbers of "
                f"heads by layer: {counts}"
            )
    return [(int(index), int(head)) for index, head in heads]


def is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(map(is_integer, value))
    )


def answers_kept(
    model: keras.Model,
    batches: Sequence[Batch],
    ablations: Mapping[str, Sequence[tuple[int, int]]],
) -> dict[str, float]:
    """Share of answers that stay the same, for each of `ablations`."""
    answers = np.concatenate([answers_of(model, b) for b in batches])
    kept = {}
    for name, heads in ablations.items():
        with without_heads(model, heads):
            changed = np.concatenate([answers_of(model, b) for b in batches])
        kept[name] = float((changed == answers).mean())
    return kept


def answers_of(model: keras.Model, batch: Batch) -> np.ndarray:
    """The most likely next tokens, of shape `(answers,)`."""
    if batch.sample_weight is None:
        present = ops.convert_to_numpy(batch.x["padding_mask"]).astype("bool")
        index = np.arange(present.shape[1])
        last = np.where(present, index, -1).max(axis=1, keepdims=True)
        marked = index == last
    else:
        marked = ops.convert_to_numpy(batch.sample_weight) > 0
    places = np.flatnonzero(marked)

    def take_marked(hidden: Tensor) -> Tensor:
        flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
        return ops.take(flat, places, axis=0)[None]

    with no_gradients():
        tokens = forward(model, batch.x)[0].map_tokens(take_marked)
        return ops.convert_to_numpy(ops.argmax(tokens.logits(), axis=-1))[0]
