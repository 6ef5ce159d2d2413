"""SelfExtend: longer prompts by grouping far positions, untrained."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_laid.arguments import check_integer
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.compiled import compiled_apart
from keras_laid.backbones.rotary_positions import RotatedAt
from keras_laid.typing import Tensor


@contextlib.contextmanager
def self_extend(
    model: keras.Model, group_size: int, neighbor_window: int
) -> Iterator[None]:
    """Scope in which far tokens attend each other at grouped positions.

    A query at position `i` attends a key at `j` in the ordinary way where
    `|i - j| < neighbor_window`. Keys farther away are attended as if they were
    at a distance of

    `i // group_size - j // group_size + shift`, with
    `shift = neighbor_window - neighbor_window // group_size`.

    The shift makes grouped distances continue the ordinary ones at the edge of
    the window: a prompt of `length` tokens has distances up to about
    `neighbor_window + (length - neighbor_window) / group_size`. Logits at
    ordinary and at grouped distances are merged before the softmax. Nothing is
    trained. With `group_size=1` only rounding differs.

    The paper's models are causal. PaliGemma's prompt attends in both
    directions: where the key is after the query, the distance is negative, and
    so is the shift.

    Decoder layers with a sliding window are not changed: they see no further in
    a longer prompt. Positions of any kind, cached decoding, gains and
    `keras_laid.yarn` work inside. Attention is computed without a fused kernel,
    with three attention maps in memory at once. Attach and fold gains outside
    the scope.

    Other Keras models that run the same backbone change with it, as
    `keras_laid.yarn` explains. On exit the model is as it was before, even if
    the body raises an error.

    Args:
        model: A `keras_hub.models.CausalLM` or its backbone, of a family that
            `keras_laid.backbones.attention_layers` knows, whose layers with
            full attention rotate all features of a head by one set of
            frequencies; or a `keras_laid.MultiImagePaliGemmaCausalLM`.
        group_size: Positive integer, the number of neighbouring far tokens that
            share a position. Choose it so large that the distances above stay
            within those of the model's training.
        neighbor_window: Positive integer, the distance in tokens below which
            keys are attended in the ordinary way. Choose it smaller than the
            longest prompt of the model's training.

    Raises:
        TypeError: On entry, if a number is not an integer.
        ValueError: On entry, if the model's family is unknown, if the model has
            no layer without a sliding window, rotates a part of the features
            (Gemma 4, Qwen 3.5), has Phi-3's frequencies for long contexts, has
            dropout, or has its attention replaced by another scope already, or
            if an argument is out of its range. The model is then unchanged.

    Example:

    ```python
    student = keras_hub.models.PaliGemmaCausalLM.from_preset("my_preset")
    with keras_laid.self_extend(student, group_size=4, neighbor_window=1024):
        student.generate({"images": images, "prompts": prompts})
    ```

    Reference:
     - [Jin et al., 2024](https://arxiv.org/abs/2401.01325), section 3 and
       algorithm 1.
    """
    check_integer("group_size", group_size)
    check_integer("neighbor_window", neighbor_window)
    layers = decoder.plainly_rotated(model)
    decoder.check_no_dropout(model, "self_extend")
    if any("_compute_attention" in vars(layer.layer) for layer in layers):
        raise ValueError(
            "`self_extend` must be the outermost scope that changes a model's "
            "attention, and cannot be nested. Received: a model inside another "
            "such scope, or whose attention is being captured."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled_apart(model))
        for layer in layers:
            extended = SelfExtendedAttention(layer, group_size, neighbor_window)
            for part, name, function in (
                (layer.rotary, "call", extended.rotate),
                (layer.layer, "_compute_attention", extended),
            ):
                stack.enter_context(
                    decoder.replaced_method(part, name, function)
                )
        yield


class SelfExtendedAttention:
    """A KerasHub layer's `_compute_attention`, by SelfExtend.

    Queries and keys arrive already rotated, and keys may come from a cache.
    Rotations add up: a further rotation by the difference of two positions
    moves a token from one position to the other.
    """

    def __init__(
        self, layer: AttentionLayer, group_size: int, neighbor_window: int
    ) -> None:
        self.layer = layer
        self.softmax = keras.layers.Softmax(dtype="float32")
        self.group_size = group_size
        self.neighbor_window = neighbor_window
        self.call_rope = layer.rotary.call
        # Start index and positions of the last rotation, taken out when they
        # are used: under compilation they are valid only for one trace.
        self.rotated_at: list[tuple[int | Tensor, Tensor | None]] = []

    def rotate(
        self,
        inputs: Tensor,
        start_index: int | Tensor = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The rotary embedding's `call`, which also records its positions.

        KerasHub does not pass positions to `_compute_attention`.
        """
        if isinstance(self.call_rope, RotatedAt):  # A scope around this one.
            positions = self.call_rope.positions
        self.rotated_at = [(start_index, positions)]
        return self.call_rope(
            inputs, start_index=start_index, positions=positions
        )

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        # b = batch (or 1), t = query, s = key, k = key head,
        # g = query head of a key head, h = feature
        query_at, key_at = self.positions(query, key)  # [b, t], [b, s]
        shift = self.neighbor_window - self.neighbor_window // self.group_size
        moved = self.grouping(query_at)
        grouped_key = self.moved(key, self.grouping(key_at))
        near = self.logits(query, key)  # [b, k, g, t, s]
        before = self.logits(self.moved(query, moved + shift), grouped_key)
        after = self.logits(self.moved(query, moved - shift), grouped_key)
        distance = query_at[:, :, None] - key_at[:, None, :]
        distance = distance[:, None, None]  # [b, 1, 1, t, s]
        logits = ops.where(
            ops.abs(distance) < self.neighbor_window,
            near,
            ops.where(distance > 0, before, after),
        )
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None]
            attention_mask = ops.cast(attention_mask, "bool")
        maps = self.softmax(logits, mask=attention_mask)
        maps = ops.cast(maps, value.dtype)
        output = ops.einsum("bkgts,bskh->btkgh", maps, value)
        return ops.reshape(
            output, (*ops.shape(query)[:-1], ops.shape(value)[-1])
        )

    def positions(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of queries and of keys, of shape `(batch or 1, length)`."""
        start_index, positions = self.rotated_at.pop()
        if positions is None:
            query_at = ops.arange(ops.shape(query)[1], dtype="int32")
            query_at = query_at + ops.cast(start_index, "int32")
            key_at = ops.arange(ops.shape(key)[1], dtype="int32")
            return query_at[None], key_at[None]
        positions = ops.cast(positions, "int32")
        if len(positions.shape) == 1:
            positions = positions[None]
        if positions.shape[1] != key.shape[1]:
            raise ValueError(
                "With a cache, positions must be given for all its tokens. "
                f"Received: positions of {positions.shape[1]} tokens, a cache "
                f"of {key.shape[1]}. Decode without `rotary_positions`."
            )
        return positions, positions

    def grouping(self, position: Tensor) -> Tensor:
        """How many tokens to move from a position to that of its group."""
        return ops.floor_divide(position, self.group_size) - position

    def moved(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rotates queries or keys further, by `tokens` from their positions."""
        frequency = self.layer.rotary._get_inverse_freq(x.shape[-1])
        angle = ops.cast(tokens, "float32")[..., None] * frequency
        cos, sin = (f(angle)[:, :, None] for f in (ops.cos, ops.sin))
        # Which axis holds the two features of a pair.
        axis = -1 if self.layer.interleaved else -2
        halves = [x.shape[-1] // 2, 2][:: 1 if axis == -1 else -1]
        pairs = ops.reshape(
            ops.cast(x, "float32"), (*ops.shape(x)[:-1], *halves)
        )
        first, second = (ops.take(pairs, part, axis=axis) for part in (0, 1))
        turned = ops.stack(
            (first * cos - second * sin, second * cos + first * sin), axis=axis
        )
        return ops.cast(ops.reshape(turned, ops.shape(x)), x.dtype)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        layer = self.layer
        query = query * ops.cast(layer.scale, query.dtype)
        # Most families have repeated each key head for its query heads.
        groups = layer.num_query_heads // key.shape[2]
        batch, length, _, features = ops.shape(query)
        query = ops.reshape(
            query, (batch, length, key.shape[2], groups, features)
        )
        logits = ops.einsum("btkgh,bskh->bkgts", query, key)
        if layer.soft_cap is not None:
            logits = ops.tanh(logits / layer.soft_cap) * layer.soft_cap
        return logits
