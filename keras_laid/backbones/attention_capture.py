"""Captures the queries and keys of a decoder's layers during a call."""

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import family_of
from keras_laid.backbones.families import layers_with_maps
from keras_laid.backbones.self_extend import SelfExtendedAttention
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.typing import Tensor


@contextlib.contextmanager
def captured_attention(
    model: keras.Model, layers: Collection[int]
) -> Iterator[dict[int, Attention]]:
    """Scope that collects queries and keys of a model's decoder layers.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        layers: Sequence of integers, indices of decoder layers with attention
            maps.

    Yields:
        A dictionary that a call of the model fills: from layer index to
        `keras_laid.ops.Attention`, after rotary embedding, with as many key
        heads as the model has. Under compilation it holds symbolic tensors: use
        them in the function that called the model.

    Outputs of the model do not change, and its fused attention stays in use,
    also under `keras.RematScope`. On exit the model is as it was before, even
    if its call raised an error.
    """
    captured: dict[int, Attention] = {}
    known = layers_with_maps(model)
    blocks = backbone_of(model).transformer_layers
    with contextlib.ExitStack() as stack:
        for index in layers:
            layer = known[index]
            stack.enter_context(
                replaced_method(
                    layer.layer,
                    "_compute_attention",
                    capturing(layer, captured),
                )
            )
            for part in (layer.layer, blocks[index]):
                stack.enter_context(
                    replaced_method(
                        part,
                        "rematerialized_call",
                        rematerializing(part, index, captured),
                    )
                )
        yield captured


def run_capturing(
    model: keras.Model, inputs: dict[str, Tensor], layers: Collection[int]
) -> list[Attention]:
    """Runs a model once, without gradients, for its queries and keys.

    Args:
        model: As in `captured_attention`.
        inputs: Dictionary of the model's inputs.
        layers: As in `captured_attention`.

    Returns:
        A list of `keras_laid.ops.Attention`, one for each of `layers`.
    """
    with captured_attention(model, layers) as captured, no_gradients():
        model(inputs)
    return [captured[layer] for layer in layers]


def no_gradients() -> contextlib.AbstractContextManager[Any]:
    """Scope in which torch computes no gradients; empty on other backends."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def capturing(
    layer: AttentionLayer, captured: dict[int, Attention]
) -> Callable[..., Tensor]:
    """The layer's `_compute_attention`, which also records queries and keys."""
    compute_attention = layer.layer._compute_attention
    if isinstance(compute_attention, SelfExtendedAttention):
        raise ValueError(
            "Attention cannot be captured inside `self_extend`, whose maps do "
            "not come from a single set of queries and keys. "
            f"Received: layers that include {layer.index}. Capture outside the "
            "scope."
        )

    def compute_and_capture(
        query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # Most families repeat each key head for its query heads: keep one copy.
        repeats = key.shape[2] // layer.num_key_value_heads
        captured[layer.index] = Attention(
            query, key[:, :, ::repeats], layer.scale, layer.soft_cap
        )
        # KerasHub runs `query *= ...`, which on torch would change the captured
        # query too.
        return compute_attention(ops.copy(query), key, *args, **kwargs)

    return compute_and_capture


def rematerializing(
    part: keras.layers.Layer, index: int, captured: dict[int, Attention]
) -> Callable[..., Callable[..., Tensor]]:
    """`rematerialized_call`, which also captures queries and keys.

    A tensor that a rematerialised function computes may leave it only as an
    output, so the queries and keys are outputs too.
    """
    rematerialized_call = part.rematerialized_call

    def call(
        layer_call: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Callable[..., Tensor]:
        def call_and_return(
            *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            outputs = layer_call(*args, **kwargs)
            attention = captured[index]
            return outputs, attention.query, attention.key

        @functools.wraps(layer_call)
        def call_and_capture(*args: Any, **kwargs: Any) -> Tensor:
            outputs, query, key = rematerialized(*args, **kwargs)
            attention = captured[index]
            captured[index] = attention._replace(query=query, key=key)
            return outputs

        rematerialized = rematerialized_call(call_and_return, *args, **kwargs)
        return call_and_capture

    return call


def attention_mask(
    model: keras.Model,
    inputs: Mapping[str, Tensor],
    key_length: int,
    row_index: Tensor,
) -> AttentionMask:
    """The mask of a model's layers with full attention, in linear memory.

    Args:
        model: As in `captured_attention`.
        inputs: Dictionary of the model's inputs, with `"padding_mask"` of shape
            `(batch, length)`. PaliGemma, whose masks cover only the text, also
            needs `"response_mask"`; Gemma 3 with images also needs
            `"vision_mask"`.
        key_length: Integer, the number of tokens, of images and text together.
        row_index: Integer tensor of shape `(rows,)`, ascending: the place of
            each row in the sequence of keys.

    Returns:
        A `keras_laid.ops.AttentionMask`.
    """
    present = ops.cast(inputs["padding_mask"], "bool")
    family = family_of(model)
    if family.mask == "prefix":
        return prefix_mask(inputs, present, key_length, row_index)
    block = None
    if family.mask == "images" and "vision_mask" in inputs:
        block = numbered_runs(inputs["vision_mask"])
    return AttentionMask(
        bidirectional=ops.zeros_like(present),
        causal=present,
        row_index=row_index,
        block=block,
    )


def prefix_mask(
    inputs: Mapping[str, Tensor],
    present: Tensor,
    key_length: int,
    row_index: Tensor,
) -> AttentionMask:
    """PaliGemma's mask: full for images and prompt, causal for responses."""
    response_mask = ops.cast(inputs["response_mask"], "bool")
    prompt = ops.logical_and(present, ops.logical_not(response_mask))
    batch, length = ops.shape(present)
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


def numbered_runs(mask: Tensor) -> Tensor:
    """Numbers each run of ones from 1; zeros stay 0."""
    mask = ops.cast(mask, "int32")
    starts = ops.maximum(mask[:, 1:] - mask[:, :-1], 0)
    return mask * ops.cumsum(ops.concatenate([mask[:, :1], starts], 1), axis=1)


def text_rows(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which of the tokens in `"token_ids"` are text.

    Args:
        inputs: Dictionary of a model's inputs. Those of Gemma have
            `"vision_mask"`; those of Qwen 3.5 have `"vision_indices"`. In
            PaliGemma all of `"token_ids"` are text.

    Returns:
        A boolean tensor of shape `(batch, length)`.
    """
    token_ids = inputs["token_ids"]
    if "vision_mask" in inputs:
        return ops.logical_not(ops.cast(inputs["vision_mask"], "bool"))
    text = ops.ones_like(token_ids, dtype="bool")
    if "vision_indices" not in inputs:
        return text
    index = ops.reshape(vision_indices(inputs), (-1, 1))
    text = ops.scatter_update(
        ops.reshape(text, (-1,)), index, ops.zeros_like(index[:, 0], "bool")
    )
    return ops.reshape(text, ops.shape(token_ids))


def vision_indices(inputs: Mapping[str, Tensor]) -> Tensor:
    """Where the tokens of images stand, in the flattened tokens of the batch.

    KerasHub counts through the tokens of the batch in which a prompt was made.
    Here it is counted again, since `fit` may have put the prompt elsewhere.

    Args:
        inputs: Dictionary of inputs of Qwen 3.5, whose `"vision_indices"` have
            shape `(batch, tokens)`; or `(tokens,)`, which cannot have moved.
    """
    index = ops.convert_to_tensor(inputs["vision_indices"])
    if len(index.shape) == 1:
        return index
    batch, length = ops.shape(inputs["token_ids"])
    first = ops.cast(length * ops.arange(batch), index.dtype)
    return first[:, None] + index % length
