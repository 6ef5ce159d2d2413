"""Gives every rotary embedding of a model its positions."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_laid.arguments import check_dtype
from keras_laid.arguments import check_positions
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.attention_layer import is_su_scaled
from keras_laid.backbones.compiled import compiled_apart
from keras_laid.backbones.decoder import replaced_method
from keras_laid.backbones.families import layers_with_maps
from keras_laid.typing import Tensor


@contextlib.contextmanager
def rotary_positions(
    model: keras.Model, positions: Tensor | None
) -> Iterator[None]:
    """Scope in which a model's rotary embeddings use `positions`.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        positions: Integer tensor of shape `(batch, length)` or `(length,)`, in
            tokens, one for each token of the model's sequence, images
            included; or `None`, for the model's own positions. For Qwen 3.5
            also of shape `(batch, 4, length)`, like the `"position_ids"` of its
            preprocessor.

    Other Keras models that run the same backbone change with it, as
    `keras_laid.yarn` explains. Where positions differ from batch to batch, pass
    them as the input `"positions"` to a distiller or a
    `keras_laid.MultiImagePaliGemmaCausalLM`, which compile once. On exit the
    model is as it was before, even if its call raised an error.

    Raises:
        TypeError: If positions are not integers.
        ValueError: If the model's rotary embeddings cannot take positions of
            this shape, or another scope already gives them positions; in a
            call, if there is not one position for each token.
    """
    with contextlib.ExitStack() as stack:
        if positions is not None:
            stack.enter_context(rotary_embeddings_at(model, positions))
            stack.enter_context(compiled_apart(model))
        yield


@contextlib.contextmanager
def rotary_embeddings_at(
    model: keras.Model, positions: Tensor | None
) -> Iterator[None]:
    """As `rotary_positions`, inside a function that is being compiled."""
    if positions is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        layers = layers_with_maps(model).values()
        check_kind_of(positions)
        for layer in layers:
            check_rank(layer, positions)
            check_outermost(layer, positions)
        for layer in layers:
            if is_multi_dimensional(layer):
                part, name = layer.layer, "_apply_partial_rope"
                function = turned_at(layer, positions)
                stack.enter_context(replaced_method(part, name, function))
            function = RotatedAt(layer, positions)
            stack.enter_context(replaced_method(layer.rotary, "call", function))
        yield


class RotatedAt:
    """The `call` of a rotary embedding, always at `positions`.

    It ignores positions and start indices that the call is given.
    """

    def __init__(self, layer: AttentionLayer, positions: Tensor) -> None:
        self.layer = layer
        self.positions = positions
        self.call = layer.rotary.call

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self.positions.shape) < 3:
            length = inputs.shape[self.layer.rotary.sequence_axis]
            check_positions(self.positions, inputs.shape[0], length)
        if not is_su_scaled(self.layer):
            return self.call(inputs, positions=self.positions)
        # Its `call` takes only a start index, and chooses the scaling by the
        # last position that follows from it.
        start_index = ops.max(self.positions) + 1 - ops.shape(inputs)[1]
        with replaced_method(
            self.layer.rotary, "_compute_positions", self.compute_positions
        ):
            return self.call(inputs, start_index=start_index)

    def compute_positions(self, *args: Any) -> Tensor:
        return ops.cast(self.positions, "float32")


def turned_at(
    layer: AttentionLayer, positions: Tensor
) -> Callable[..., Tensor]:
    """The `_apply_partial_rope` of a layer with M-RoPE, at `positions`."""
    position_ids = positions if len(positions.shape) == 3 else None
    apply = layer.layer._apply_partial_rope
    return lambda x, *args, **kwargs: apply(x, 0, position_ids)


def is_multi_dimensional(layer: AttentionLayer) -> bool:
    """Whether a layer has M-RoPE, which may bypass `RotaryEmbedding.call`."""
    return getattr(layer.layer, "mrope_section", None) is not None


def check_kind_of(positions: Tensor) -> None:
    if len(getattr(positions, "shape", ())) not in (1, 2, 3):
        raise ValueError(
            "`positions` must be a tensor of shape `(length,)`, `(batch, "
            "length)` or, with M-RoPE, `(batch, 4, length)`. "
            f"Received: positions={positions!r:.80}. Convert lists to arrays."
        )
    check_dtype("positions", positions, "int")


def check_outermost(layer: AttentionLayer, positions: Tensor) -> None:
    outer = vars(layer.rotary).get("call")
    # A block that runs again may be inside a scope with the same positions.
    if isinstance(outer, RotatedAt) and outer.positions is not positions:
        raise ValueError(
            "A model must be given positions once: `rotary_positions` scopes "
            "cannot be nested, and inputs inside of one must not have "
            '`"positions"`. Received: a model inside a scope with other '
            "positions. Leave that scope first."
        )


def check_rank(layer: AttentionLayer, positions: Tensor) -> None:
    rank = len(positions.shape)
    if rank == 3 and not is_multi_dimensional(layer):
        raise ValueError(
            "Positions of shape `(batch, 4, length)` need a model with M-RoPE, "
            f"such as Qwen 3.5. Received: positions.shape={positions.shape}, "
            f"decoder layer {layer.index} with {type(layer.rotary).__name__}. "
            "Pass positions of shape `(batch, length)`."
        )
    if rank > 1 and is_su_scaled(layer):
        raise ValueError(
            "Phi-3's long-context rotary embedding takes one set of positions, "
            "of shape `(length,)`, for the whole batch. "
            f"Received: positions.shape={positions.shape}"
        )
