"""Attention of KerasHub's decoders in memory linear in the prompt's length."""

import contextlib
import inspect
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import numbered_runs
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.compiled import compiled_apart
from keras_laid.backbones.families import family_of
from keras_laid.backbones.families import layers_with_maps
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention_output import IMPLEMENTATIONS
from keras_laid.ops.attention_output import Name
from keras_laid.ops.attention_output import attention_output
from keras_laid.ops.dispatch import check_requested
from keras_laid.typing import Tensor

# Endings of argument names of the method that makes a block's mask.
MASKS = ("padding_mask", "response_mask", "vision_mask", "attention_mask")


@contextlib.contextmanager
def linear_memory_attention(
    model: keras.Model, implementation: Name | None = None
) -> Iterator[None]:
    """Scope in which a model's decoder makes no tensor of length squared.

    KerasHub makes a mask of shape `(batch, length, length)` in every decoder
    block and, where attention is not fused, an attention map for each head.
    Inside the scope, masks are described by `keras_laid.ops.AttentionMask`, and
    `keras_laid.ops.attention_output` computes the same attention over blocks of
    rows, in the backward pass too. On a prompt of a few hundred tokens, this is
    slower. Calls with a cache, as in `generate`, run as they do outside.

    Outputs equal those outside the scope up to the precision of the model's
    dtype, except at padding tokens that attend no key: their attention output
    is 0, while some families give them a mean of values. Gains, positions and
    `keras_laid.yarn` work inside, and attention can be captured.

    Other Keras models that run the same backbone change with it, as
    `keras_laid.yarn` explains. On exit the model is as it was before, even if
    the body raises an error.

    Args:
        model: A KerasHub model of a family that
            `keras_laid.backbones.attention_layers` knows. Gemma 4, and Qwen
            with a sliding window, are not supported.
        implementation: String, an implementation of
            `keras_laid.ops.attention_output`, or `None` to let it choose one.
            Defaults to `None`.

    Raises:
        NotImplementedError: On a call of the model, if the named
            `implementation` cannot run there.
        ValueError: On entry, if the family is not supported, the model has
            dropout, another scope that changes its attention is active (such as
            `keras_laid.self_extend`), or `implementation` is unknown.

    Example:

    ```python
    with keras_laid.linear_memory_attention(model):
        keras_laid.evaluate_haystacks(model, haystacks)
    ```

    The distiller's `linear_memory=True` does this for teacher and student.
    """
    check_requested("attention_output", IMPLEMENTATIONS, implementation)
    check_linear_memory(model)
    with linear_blocks(model, implementation), compiled_apart(model):
        yield


@contextlib.contextmanager
def linear_blocks(
    model: keras.Model,
    implementation: Name | None = None,
    indices: Collection[int] | None = None,
) -> Iterator[None]:
    """As `linear_memory_attention`, inside a function that is being compiled.

    Args:
        model: A model that `check_linear_memory` does not refuse.
        implementation: String, an implementation of
            `keras_laid.ops.attention_output`, or `None` to let it choose one.
        indices: Sequence of integers, the indices of the blocks that change, or
            `None` for all. Defaults to `None`.
    """
    blocks = decoder.backbone_of(model).transformer_layers
    with contextlib.ExitStack() as stack:
        name = family_of(model).mask_method
        for layer in layers_with_maps(model).values():
            if indices is not None and layer.index not in indices:
                continue
            block = blocks[layer.index]
            linear = LinearBlock(block, name, layer, implementation)
            for part, method, function in (
                (block, name, linear.make_mask),
                (layer.layer, "_compute_attention", linear.attend),
            ):
                stack.enter_context(
                    decoder.replaced_method(part, method, function)
                )
        yield


def check_choice_of_memory(linear_memory: bool | Name) -> None:
    """Refuses values that the distiller's `linear_memory` cannot have."""
    if not isinstance(linear_memory, (bool, str)):
        raise TypeError(
            "`linear_memory` must be `True`, `False` or the name of an "
            "implementation of `keras_laid.ops.attention_output`. "
            f"Received: linear_memory={linear_memory!r:.80}"
        )
    check_requested("attention_output", IMPLEMENTATIONS, named(linear_memory))


def named(linear_memory: bool | Name) -> Name | None:
    """The implementation that `linear_memory` names, or `None`."""
    return None if isinstance(linear_memory, bool) else linear_memory


def check_linear_memory(model: keras.Model) -> None:
    """Refuses models whose attention would change, or already has changed."""
    backbone = decoder.backbone_of(model)
    name = type(backbone).__name__
    family, layers = family_of(model), layers_with_maps(model).values()
    known = {
        "always": True,
        "without windows": not any(layer.window for layer in layers),
        "never": False,
    }
    blocks = [backbone.transformer_layers[layer.index] for layer in layers]
    if not known[family.linear_memory] or not all(
        hasattr(block, family.mask_method) for block in blocks
    ):
        raise ValueError(
            "`linear_memory_attention` needs a family whose masks it knows: "
            "not Gemma 4, and Qwen only without a sliding window. "
            f"Received: {name}"
        )
    decoder.check_no_dropout(backbone, "linear_memory_attention")
    if any("_compute_attention" in vars(layer.layer) for layer in layers):
        raise ValueError(
            "`linear_memory_attention` must be the outermost scope that "
            "changes a model's attention, and cannot be nested. Received: a "
            "model inside another such scope."
        )


class LinearBlock:
    """A block's mask and attention, in linear memory."""

    def __init__(
        self,
        block: keras.layers.Layer,
        name: str,
        layer: AttentionLayer,
        implementation: Name | None,
    ) -> None:
        self.make_whole_mask = getattr(block, name)
        # The signature of the family's own method, which names its arguments.
        self.signature = inspect.signature(getattr(type(block), name))
        self.layer = layer
        self.implementation = implementation
        self.attend_whole = layer.layer._compute_attention
        self.mask: AttentionMask | None = None

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stores a description of the mask; returns which keys are present."""
        given = self.signature.bind(None, *args, **kwargs).arguments
        (_, _), (_, x), *others = given.items()
        masks = {
            kind: value
            for name, value in others
            for kind in MASKS
            if name.endswith(kind) and value is not None
        }
        has_cache = any(
            name.endswith("cache") and value is not None
            for name, value in others
        )
        if has_cache or "attention_mask" in masks:
            self.mask = None
            return self.make_whole_mask(*args, **kwargs)
        self.mask = self.compact_mask(masks, *ops.shape(x)[:2])
        present = ops.logical_or(self.mask.bidirectional, self.mask.causal)
        return ops.cast(present[:, None], "int32")

    def compact_mask(
        self, masks: Mapping[str, Tensor], batch: int, length: int
    ) -> AttentionMask:
        def extend_to_images(name: str, image_value: bool) -> Tensor:
            """Extends PaliGemma's mask, which covers only text, to images."""
            mask = ops.cast(masks[name], "bool")
            images = length - ops.shape(mask)[1]
            return ops.pad(
                mask, ((0, 0), (images, 0)), constant_values=image_value
            )

        every = ops.ones((batch, length), "bool")
        present, block = every, None
        if "padding_mask" in masks:
            present = extend_to_images("padding_mask", True)
        bidirectional, causal = ops.zeros_like(every), present
        has_prefix = "response_mask" in self.signature.parameters
        if has_prefix and "padding_mask" in masks:
            # PaliGemma: every row attends the prompt; the response is causal.
            bidirectional, causal = present, every
            if "response_mask" in masks:
                causal = extend_to_images("response_mask", False)
                prompt = ops.logical_not(causal)
                bidirectional = ops.logical_and(present, prompt)
        elif "vision_mask" in masks:
            # Gemma 3: tokens of an image see each other.
            block = numbered_runs(masks["vision_mask"])
        return AttentionMask(
            bidirectional, causal, ops.arange(length), self.layer.window, block
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.mask is None:
            return self.attend_whole(query, key, value, *args, **kwargs)
        attention = Attention(query, key, self.layer.scale, self.layer.soft_cap)
        return attention_output(
            attention, value, self.mask, self.implementation
        )
