"""Captures the outputs of a decoder's blocks during a call."""

import contextlib
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from typing import Any

import keras

from keras_laid.backbones.decoder import backbone_of
from keras_laid.backbones.decoder import replaced_method
from keras_laid.typing import Tensor


@contextlib.contextmanager
def captured_hidden_states(
    model: keras.Model, layers: Collection[int]
) -> Iterator[dict[int, Tensor]]:
    """Scope that collects the hidden states after some decoder blocks.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows.
        layers: Sequence of integers, indices of decoder blocks.

    Yields:
        A dictionary that a call of the model fills: from layer index to a
        tensor of shape `(batch, length, hidden_dim)`, where the length counts
        tokens of images and text. Under compilation it holds symbolic tensors:
        use them in the function that called the model.
    """
    captured: dict[int, Tensor] = {}
    blocks = backbone_of(model).transformer_layers
    with contextlib.ExitStack() as stack:
        for index in layers:
            call = keeping_output(blocks[index].call, index, captured)
            stack.enter_context(replaced_method(blocks[index], "call", call))
        yield captured


def keeping_output(
    call: Callable[..., Any], index: int, captured: dict[int, Tensor]
) -> Callable[..., Any]:
    def call_and_keep(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        # With a cache, some families return it too.
        is_tuple = isinstance(outputs, tuple)
        captured[index] = outputs[0] if is_tuple else outputs
        return outputs

    return call_and_keep
