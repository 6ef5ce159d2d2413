"""Catches the queries and keys a decoder computes, while it computes them."""

import contextlib

import keras
from keras import ops

from keras_laid.backbones import decoder
from keras_laid.backbones.self_extend import SelfExtendedAttention
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask


@contextlib.contextmanager
def captured_attention(model, layers):
    """Scope that collects queries and keys of a model's decoder layers.

    Args:
        model: A `keras_hub.models.PaliGemmaCausalLM` or its backbone.
        layers: Sequence of integers, indices of decoder layers.

    Yields:
        A dictionary that a call of the model fills: from layer index to
        `keras_laid.ops.Attention`, after rotary embedding. Under compilation it
        holds symbolic tensors: use them in the function that called the model.

    Outputs of the model do not change, its fused attention stays in use, and
    it is left as it was, also when its call raises.
    """
    captured = {}
    attention_layers = decoder.attention_layers(model)
    with contextlib.ExitStack() as stack:
        for index in layers:
            layer = attention_layers[index]
            stack.enter_context(
                decoder.replaced_method(
                    layer,
                    "_compute_attention",
                    capturing(layer, index, captured),
                )
            )
        yield captured


def run_capturing(model, inputs, layers):
    """Runs a model once, without gradients, for its queries and keys.

    Args:
        model: As in `captured_attention`.
        inputs: The model's inputs.
        layers: As in `captured_attention`.

    Returns:
        A list of `keras_laid.ops.Attention`, one for each of `layers`.
    """
    with captured_attention(model, layers) as captured, no_gradients():
        model(inputs)
    return [captured[layer] for layer in layers]


def no_gradients():
    """Scope in which torch keeps no activations; the others never do."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def capturing(layer, index, captured):
    """The layer's `_compute_attention`, writing down what it is given."""
    compute_attention = layer._compute_attention
    if isinstance(compute_attention, SelfExtendedAttention):
        raise ValueError(
            "Attention cannot be captured inside `self_extend`: its maps are "
            "not those of one set of queries and keys. "
            f"Received: layers with {index}. Capture outside of the scope."
        )
    normalizer = (
        layer.head_dim
        if layer.query_head_dim_normalize
        else layer.hidden_dim // layer.num_query_heads
    )

    def compute_and_capture(query, key, *args, **kwargs):
        captured[index] = Attention(
            query, key, normalizer**-0.5, layer.logit_soft_cap
        )
        # A copy: KerasHub scales the query in place, which torch does do.
        return compute_attention(ops.copy(query), key, *args, **kwargs)

    return compute_and_capture


def attention_mask(inputs, key_length, row_index):
    """The mask of PaliGemma's full-attention layers, in linear memory.

    Args:
        inputs: The model's inputs, with `"padding_mask"` and
            `"response_mask"` of shape `(batch, length)`, for text alone.
        key_length: Integer, tokens of images and text.
        row_index: Integer tensor of shape `(rows,)`.

    Returns:
        A `keras_laid.ops.AttentionMask`.
    """
    padding_mask = ops.cast(inputs["padding_mask"], "bool")
    response_mask = ops.cast(inputs["response_mask"], "bool")
    prompt = ops.logical_and(padding_mask, ops.logical_not(response_mask))
    batch, length = ops.shape(padding_mask)
    image_shape = (batch, key_length - length)
    return AttentionMask(
        bidirectional=ops.concatenate(
            [ops.ones(image_shape, "bool"), prompt], axis=1
        ),
        causal=ops.concatenate(
            [ops.zeros(image_shape, "bool"), response_mask], axis=1
        ),
        row_index=row_index,
    )
