"""Records of one layer of a decoder."""

import dataclasses
from typing import Any
from typing import Literal
from typing import TypeAlias

import keras


def _part() -> Any:
    return dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """A decoder layer with attention maps, and how it attends.

    Attributes:
        index: Integer, its place in the decoder, from 0.
        kind: `"global"` for full attention, or `"local"` for attention in a
            sliding window.
        num_query_heads: Integer, the number of query heads.
        num_key_value_heads: Integer, the number of key and value heads. Smaller
            than `num_query_heads` for grouped-query attention.
        head_dim: Integer, the number of features in a query or key of one head.
        rotary_dim: Integer, the number of these features that rotary embedding
            rotates.
        wavelength: Float, `max_wavelength` of its rotary embedding: the upper
            bound of its wavelengths, in tokens, divided by `2 * pi`, before any
            scaling.
        scale: Float, the factor on `query @ key` in the logits.
        soft_cap: Float, or `None`. With it, logits `x` become
            `soft_cap * tanh(x / soft_cap)`.
        window: Integer, the length of the sliding window in tokens, or `None`.
        pair_distance: Integer: rotary embedding rotates feature `k` together
            with feature `k + pair_distance`.
        interleaved: Boolean, whether rotated queries and keys have the two
            features of a pair side by side.
        keys_from: Integer, index of the layer whose keys it uses, or `None`
            where it has keys of its own.
        lends_keys: Boolean, whether another layer uses its keys.
        layer: The `keras.layers.Layer` that computes it.
        rotary: Its `keras_hub.layers.RotaryEmbedding`.
        query_layer: The `keras.layers.Layer` whose output is rotated into
            queries: the projection, or the norm that follows it.
        key_layer: The `keras.layers.Layer` whose output is rotated into keys,
            or `None` where another decoder layer's keys are used.
        norm_offset: Integer where `query_layer` and `key_layer` are norms: a
            norm multiplies by its `scale` plus this offset. `None` where they
            are projections.
    """

    index: int
    kind: Literal["global", "local"]
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    wavelength: float
    scale: float
    pair_distance: int
    interleaved: bool = False
    soft_cap: float | None = None
    window: int | None = None
    keys_from: int | None = None
    lends_keys: bool = False
    norm_offset: int | None = None
    layer: keras.layers.Layer = _part()
    rotary: keras.layers.Layer = _part()
    query_layer: keras.layers.Layer = _part()
    key_layer: keras.layers.Layer = _part()


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A decoder layer without attention maps.

    Attributes:
        index: Integer, its place in the decoder, from 0.
        kind: `"linear"`.
    """

    index: int
    kind: Literal["linear"] = "linear"


DecoderLayer: TypeAlias = AttentionLayer | LinearLayer


def layer(
    attention: keras.layers.Layer,
    rotary: keras.layers.Layer,
    window: int | None,
    head_dim: int,
    rotary_dim: int | None = None,
    pair_distance: int | None = None,
    **attributes: Any,
) -> AttentionLayer:
    """Makes an `AttentionLayer`, in a function that reads a block.

    Args:
        attention: The `keras.layers.Layer` that computes the attention.
        rotary: Its `keras_hub.layers.RotaryEmbedding`.
        window: Integer, the length of its sliding window in tokens, or `None`.
        head_dim: Integer, the number of features in a query or key of one head.
        rotary_dim: Integer, the number of features of a head that rotary
            embedding rotates. Defaults to `head_dim`.
        pair_distance: Integer, the distance of the two features that rotary
            embedding rotates together. Defaults to half of `rotary_dim`.
        **attributes: The other attributes of `AttentionLayer`.
    """
    rotary_dim = rotary_dim or head_dim
    return AttentionLayer(
        index=0,
        kind="global" if window is None else "local",
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        pair_distance=pair_distance or rotary_dim // 2,
        wavelength=float(rotary.max_wavelength),
        window=window,
        layer=attention,
        rotary=rotary,
        **attributes,
    )


def linear() -> LinearLayer:
    """Makes a `LinearLayer`, in a function that reads a block."""
    return LinearLayer(index=0)


def is_su_scaled(layer: AttentionLayer) -> bool:
    """Whether a layer has Phi-3's rotary embedding for long contexts."""
    return hasattr(layer.rotary, "inverese_freq_long_factor")
