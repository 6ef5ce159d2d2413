"""Runs a model once for its logits, attention and hidden states."""

import contextlib
from collections.abc import Collection
from typing import NamedTuple

import keras
from keras import ops

from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.gated_delta import linear_layers_without_loops
from keras_laid.backbones.hidden_states import captured_hidden_states
from keras_laid.backbones.linear_memory import linear_blocks
from keras_laid.backbones.linear_memory import named
from keras_laid.backbones.qwen_vision import check_image_shapes
from keras_laid.backbones.qwen_vision import compiled_images
from keras_laid.backbones.qwen_vision import model_inputs
from keras_laid.backbones.qwen_vision import positions_of
from keras_laid.backbones.rematerialization import rematerialized
from keras_laid.backbones.rotary_positions import rotary_embeddings_at
from keras_laid.backbones.unembedding import hidden_states_for_logits
from keras_laid.backbones.unembedding import unembedding
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention_output import Name
from keras_laid.ops.unembedding import Unembedding
from keras_laid.typing import Tensor


class Run(NamedTuple):
    """The result of a forward pass of a model.

    Attributes:
        tokens: Its `keras_laid.ops.Unembedding`.
        attention: Dictionary from layer index to `keras_laid.ops.Attention`.
        hidden_states: Dictionary from layer index to the output of its block,
            of shape `(batch, keys, hidden_dim)`.
    """

    tokens: Unembedding
    attention: dict[int, Attention]
    hidden_states: dict[int, Tensor]

    @property
    def key_length(self) -> int | Tensor:
        """The number of tokens, of images and text."""
        for attention in self.attention.values():
            return ops.shape(attention.key)[1]
        for hidden in self.hidden_states.values():
            return ops.shape(hidden)[1]
        raise ValueError(
            "A layer must be read to know the number of tokens. Received: a "
            "run without layers. Pass `layers` or `hidden_layers`."
        )


def forward(
    model: keras.Model,
    inputs: dict[str, Tensor],
    layers: Collection[int] = (),
    training: bool | None = False,
    rematerialize: bool = False,
    linear_memory: bool | Name = False,
    hidden_layers: Collection[int] = (),
) -> Run:
    """Runs a model once.

    Args:
        model: As in `keras_laid.backbones.attention_layers`.
        inputs: Dictionary of the model's inputs. Other entries are ignored,
            except `"positions"`, which replace the positions of every rotary
            embedding. For Qwen 3.5 with images, `"position_ids"` do so too.
        layers: Sequence of integers, indices of the layers whose attention is
            returned. Defaults to `()`.
        training: Boolean or `None`, passed to the model. Defaults to `False`.
        rematerialize: Boolean, whether the model's blocks run again in the
            backward pass, so that they keep only their inputs until then.
            Defaults to `False`.
        linear_memory: Boolean, whether attention is computed as in
            `keras_laid.linear_memory_attention`, or a string, the name of the
            implementation that computes it. Defaults to `False`.
        hidden_layers: Sequence of integers, indices of the layers whose hidden
            states are returned. Defaults to `()`.

    Returns:
        A `Run`.

    Raises:
        TypeError: If `inputs` is not a dictionary, or token ids are not
            integers.
        ValueError: If an input is missing or has the wrong shape, or if images
            of Qwen 3.5 have different numbers of patches.
    """
    decoder.check_inputs(model, inputs)
    decoder.check_values(model)
    check_image_shapes(model, inputs)
    positions = positions_of(model, inputs)
    inputs = model_inputs(model, inputs)
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(compiled_images(model))
        scopes.enter_context(linear_layers_without_loops(model))
        # The order matters, as each scope wraps the methods that it finds.
        # Capture wraps the attention of linear memory, rematerialised blocks
        # run again with both, and hidden states are outputs of those blocks.
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
        hidden_states = scopes.enter_context(
            captured_hidden_states(model, hidden_layers)
        )
        hidden = model(inputs, training=training)
    return Run(unembedding(model, hidden), attention, hidden_states)
