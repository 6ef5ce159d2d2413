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
        kind: `"global"`, or `"local"` where a sliding window bounds what it
            sees.
        num_query_heads: Integer.
        num_key_value_heads: Integer.
        head_dim: Integer, numbers in a query or key of one head.
        rotary_dim: Integer, how many of them rotary embedding turns.
        wavelength: Float, the longest of its rotary frequencies, in tokens over
            `2 * pi`, before any scaling.
        scale: Float, what logits are multiplied by.
        soft_cap: Float, what logits are softly capped at, or `None`.
        window: Integer, tokens of the sliding window, or `None`.
        pair_distance: Integer: rotary embedding turns feature `k` together with
            feature `k + pair_distance`.
        keys_from: Integer, index of the layer whose keys it uses, or `None`
            where it has keys of its own.
        lends_keys: Boolean, whether another layer uses its keys.
        layer: The `keras.layers.Layer` that computes it.
        rotary: Its `keras_hub.layers.RotaryEmbedding`.
        query_layer: The layer whose output is rotated into queries: the
            projection, or the norm that follows it.
        key_layer: That of keys, or `None` where they are another layer's.
        norm_offset: Number, where the two are norms: they multiply by their
            `scale` plus this. `None` where they are projections.
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
    """An `AttentionLayer`, for what reads a block.

    Args:
        attention: The Keras layer.
        rotary: Its rotary embedding.
        window: Integer, tokens of its sliding window, or `None`.
        head_dim: Integer.
        rotary_dim: Integer, if not all of the head dim is turned.
        pair_distance: Integer. Defaults to half of `rotary_dim`.
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
    """A `LinearLayer`, for what reads a block."""
    return LinearLayer(index=0)
