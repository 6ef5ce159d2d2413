"""Rotary position embedding with a trainable gain per frequency."""

import math
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
from keras import ops
from keras_hub.layers import RotaryEmbedding

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import check_positions
from keras_laid.arguments import check_switch
from keras_laid.typing import Tensor

ROPE_TYPES = ("linear", "dynamic", "yarn")
APPLIED_TO = ("queries_and_keys", "queries")


@keras.saving.register_keras_serializable(package="keras_laid")
class GainModulatedRotaryEmbedding(RotaryEmbedding):
    """Rotary position embedding with a trainable gain per frequency.

    The logit of a query and a key is a sum over the frequencies of the rotary
    embedding. Here the contribution of frequency `k` is multiplied by a
    trainable gain: `gain[k]`, the same for all heads, or `gain[h, k]` for head
    `h`. Frequency `k` rotates the features `k` and `k + features / 2`: the two
    halves of the features are paired, as in KerasHub, and not neighbours.

    With every gain at 1, the value it starts from, this is
    `keras_hub.layers.RotaryEmbedding` exactly, bit for bit.

    Gains are stored as log gains, in float32 whatever the dtype policy. A log
    gain `x` stands for the gain `exp(log(max_gain) * tanh(x / log(max_gain)))`,
    which is 1 at 0, grows with slope 1 there, and stays within
    `[1 / max_gain, max_gain]`. Weight decay pulls a log gain to 0, and so a
    gain to 1: gains need not be excluded from it.

    Masking: ignored. A masked position is rotated like any other.

    Args:
        max_wavelength: Number greater than 0. Upper bound, in positions, of the
            period of a rotation divided by `2 * pi`. Defaults to `10000`.
        scaling_factor: Float greater than 0, by which positions are scaled.
            Defaults to `1.0`.
        rope_type: `"linear"`, `"dynamic"` or `"yarn"`. How `scaling_factor`
            acts. Defaults to `"linear"`.
        beta_fast: Float, in rotations over the original context. Only for
            `"yarn"`. Defaults to `32.0`.
        beta_slow: Float, in rotations over the original context. Only for
            `"yarn"`. Defaults to `1.0`.
        original_max_position_embeddings: Integer, in positions. The original
            context. Only for `"yarn"`. Defaults to `4096`.
        truncate: Boolean. Whether the range of frequencies that `"yarn"`
            corrects is rounded to whole features. Only for `"yarn"`. Defaults
            to `True`.
        sequence_axis: Integer. The axis of positions. Defaults to `1`.
        feature_axis: Integer. The axis of features. Defaults to `-1`.
        denominator_dim: Optional integer, in features. Divides the exponents of
            the frequencies, for rotation of a part of the features. Defaults to
            the number of features.
        num_heads: Optional positive integer. With `None` there is one gain for
            each frequency; with a number of heads, one for each head and
            frequency. The axis of heads is the last one that is not the
            sequence or feature axis: axis 2 of `(batch, length, heads,
            features)`. Defaults to `None`.
        max_gain: Float greater than 1. All gains stay within
            `[1 / max_gain, max_gain]`. Defaults to `4.0`.
        applied_to: Which tensors pass through this layer. `"queries_and_keys"`:
            both, so that each is multiplied by the square root of the gain.
            `"queries"`: only queries, multiplied by the whole gain. With
            `num_heads` it must be `"queries"`, the default then, since one key
            head may serve several query heads. Without `num_heads` it defaults
            to `"queries_and_keys"`.
        **kwargs: Passed to `keras.layers.Layer`: `name`, `dtype`, etc.

    Call arguments:
        inputs: Queries or keys with a sequence axis and a feature axis of even
            length, as `(batch, length, heads, features)`.
        start_index: Integer or integer tensor, in tokens. The position of the
            first token. Defaults to `0`.
        positions: Optional integer tensor of shape `(length,)` or
            `(batch, length)`, in tokens, which replaces `start_index`.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of its range, if `applied_to` is
            `"queries_and_keys"` with `num_heads`, if the number of features is
            odd or unknown, if the inputs do not have `num_heads` heads, or if
            positions have another shape.

    Example:

    ```python
    layer = keras_laid.layers.GainModulatedRotaryEmbedding()
    query = keras.random.normal((2, 16, 4, 64))
    layer(query).shape  # (2, 16, 4, 64)
    layer.gains().shape  # (32,)
    ```

    Reference:
     - [Su et al., 2021](https://arxiv.org/abs/2104.09864), equation 34, for
       the rotation.
    """

    def __init__(
        self,
        max_wavelength: float = 10000,
        scaling_factor: float = 1.0,
        rope_type: Literal["linear", "dynamic", "yarn"] = "linear",
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        original_max_position_embeddings: int = 4096,
        truncate: bool = True,
        sequence_axis: int = 1,
        feature_axis: int = -1,
        denominator_dim: int | None = None,
        num_heads: int | None = None,
        max_gain: float = 4.0,
        applied_to: Literal["queries_and_keys", "queries"] | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("max_wavelength", max_wavelength, "(0, inf)")
        check_number("scaling_factor", scaling_factor, "(0, inf)")
        check_choice("rope_type", rope_type, ROPE_TYPES)
        check_number("beta_fast", beta_fast, "(0, inf)")
        check_number("beta_slow", beta_slow, "(0, inf)")
        check_integer(
            "original_max_position_embeddings", original_max_position_embeddings
        )
        check_switch("truncate", truncate)
        check_integer("sequence_axis", sequence_axis, at_least=-math.inf)
        check_integer("feature_axis", feature_axis, at_least=-math.inf)
        if denominator_dim is not None:
            check_integer("denominator_dim", denominator_dim)
        if num_heads is not None:
            check_integer("num_heads", num_heads)
        check_number("max_gain", max_gain, "(1, inf)")
        if applied_to is None:
            applied_to = "queries_and_keys" if num_heads is None else "queries"
        check_choice("applied_to", applied_to, APPLIED_TO)
        if num_heads is not None and applied_to != "queries":
            raise ValueError(
                "Gains of each head must be applied only to queries: one key "
                "head may serve several query heads. "
                f"Received: num_heads={num_heads}, applied_to={applied_to!r}. "
                'Pass `applied_to="queries"`, and rotate keys with a plain '
                "`keras_hub.layers.RotaryEmbedding`."
            )
        super().__init__(
            max_wavelength=max_wavelength,
            scaling_factor=scaling_factor,
            rope_type=rope_type,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            original_max_position_embeddings=original_max_position_embeddings,
            truncate=truncate,
            sequence_axis=sequence_axis,
            feature_axis=feature_axis,
            denominator_dim=denominator_dim,
            **kwargs,
        )
        self.num_heads = num_heads
        self.max_gain = max_gain
        self.applied_to = applied_to
        self.built = False  # The parent, which has no weights, says `True`.

    def build(self, input_shape: Sequence[int | None]) -> None:
        sequence_axis, feature_axis = self._normalize_axes(input_shape)
        features = input_shape[feature_axis]
        if not features or features % 2:
            raise ValueError(
                "The number of features must be known and even: the two halves "
                "are rotated as pairs. "
                f"Received: inputs.shape={tuple(input_shape)}, "
                f"feature_axis={self.feature_axis}"
            )
        axes = {feature_axis: features}
        shape: tuple[int, ...] = (features // 2,)
        if self.num_heads is not None:
            others = [
                axis
                for axis in range(1, len(input_shape))
                if axis not in (sequence_axis, feature_axis)
            ]
            if not others or input_shape[others[-1]] != self.num_heads:
                raise ValueError(
                    "The inputs must have an axis of `num_heads` heads. "
                    f"Received: inputs.shape={tuple(input_shape)}, "
                    f"num_heads={self.num_heads}"
                )
            axes[others[-1]] = self.num_heads
            shape = (self.num_heads, *shape)
        self.log_gain = self.add_weight(
            name="log_gain",
            shape=shape,
            initializer="zeros",
            dtype="float32",
            autocast=False,
        )
        # Keras refuses inputs with other features or heads than these.
        self.input_spec = keras.layers.InputSpec(axes=axes)

    def gains(self) -> Tensor:
        """The gains on the logits.

        Returns:
            A float32 tensor of shape `(frequencies,)` or, with `num_heads`,
            `(num_heads, frequencies)`, with values in
            `[1 / max_gain, max_gain]`, highest frequency first.
        """
        return ops.exp(self._bounded_log_gain())

    def feature_gains(self) -> Tensor:
        """The factor of each feature of the inputs.

        Returns:
            A float32 tensor of shape `(features,)` or, with `num_heads`,
            `(num_heads, features)`: the gain of the feature's frequency, or its
            square root where the layer acts on queries and keys.
        """
        log_gain = self._bounded_log_gain()
        if self.applied_to == "queries_and_keys":
            log_gain = 0.5 * log_gain
        gain = ops.exp(log_gain)
        return ops.concatenate((gain, gain), axis=-1)

    def modulate(self, inputs: Tensor) -> Tensor:
        """Multiplies queries or keys by their gains, without a rotation.

        Gains and rotation commute: this may be used before or after a rotation
        done elsewhere. The layer must be built.

        Args:
            inputs: Queries or keys, as in `call`, rotated or not.

        Returns:
            A tensor of the shape and dtype of `inputs`.
        """
        sequence_axis, feature_axis = self._normalize_axes(inputs.shape)
        # (batch, length, ..., heads, features), as the parent has it.
        x = ops.moveaxis(inputs, (feature_axis, sequence_axis), (-1, 1))
        # Multiplied in float32 and rounded once: above 1, bfloat16 has steps of
        # 0.8%, to which the gain itself, and its gradient, would be rounded.
        wide = keras.backend.result_type(x.dtype, "float32")
        gains = ops.cast(self.feature_gains(), wide)
        x = ops.cast(ops.cast(x, wide) * gains, inputs.dtype)
        return ops.moveaxis(x, (-1, 1), (feature_axis, sequence_axis))

    def call(
        self,
        inputs: Tensor,
        start_index: int | Tensor = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        if positions is not None:
            length = inputs.shape[self.sequence_axis]
            check_positions(positions, inputs.shape[0], length)
        rotated = super().call(
            inputs, start_index=start_index, positions=positions
        )
        return self.modulate(rotated)

    def compute_output_shape(
        self, input_shape: Sequence[int | None]
    ) -> Sequence[int | None]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "num_heads": self.num_heads,
                "max_gain": self.max_gain,
                "applied_to": self.applied_to,
            }
        )
        return config

    def _bounded_log_gain(self) -> Tensor:
        limit = math.log(self.max_gain)
        log_gain = ops.convert_to_tensor(self.log_gain)
        return limit * ops.tanh(log_gain / limit)
