"""One run of a model for all that is compared."""

import contextlib
from collections.abc import Collection

import keras

from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.linear_memory import linear_blocks
from keras_laid.backbones.linear_memory import named
from keras_laid.backbones.rematerialization import rematerialized
from keras_laid.backbones.rotary_positions import rotary_embeddings_at
from keras_laid.backbones.unembedding import hidden_states_for_logits
from keras_laid.backbones.unembedding import unembedding
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention_output import Name
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


def forward(
    model: keras.Model,
    inputs: dict[str, Tensor],
    layers: Collection[int] = (),
    training: bool | None = False,
    rematerialize: bool = False,
    linear_memory: bool | Name = False,
) -> tuple[Unembedding, dict[int, Attention]]:
    """Runs a model once.

    Args:
        model: As in `keras_laid.backbones.attention_layers`.
        inputs: Dictionary of its inputs; others are passed over, except
            `"positions"`, which replace those of every rotary embedding.
        layers: Sequence of integers, whose attention is wanted.
        training: Boolean.
        rematerialize: Boolean, whether its blocks run once more in the backward
            pass and keep less for it.
        linear_memory: Boolean, whether attention is computed as in
            `keras_laid.linear_memory_attention`, or by which implementation.

    Returns:
        A tuple of its `keras_laid.ops.Unembedding` and a dictionary from layer
        index to `keras_laid.ops.Attention`.

    Raises:
        TypeError: If `inputs` is no dictionary, or token ids are no integers.
        ValueError: If an input is missing or of another shape.
    """
    decoder.check_inputs(model, inputs)
    decoder.check_values(model)
    positions = inputs.get("positions")
    inputs = {name: inputs[name] for name in decoder.input_names(model)}
    with contextlib.ExitStack() as scopes:
        if linear_memory:
            scopes.enter_context(linear_blocks(model, named(linear_memory)))
        attention = scopes.enter_context(captured_attention(model, layers))
        scopes.enter_context(rotary_embeddings_at(model, positions))
        scopes.enter_context(hidden_states_for_logits(model))
        if rematerialize:
            scopes.enter_context(
                rematerialized(
                    model, positions, layers, attention, linear_memory
                )
            )
        hidden = model(inputs, training=training)
    return unembedding(model, hidden), attention
