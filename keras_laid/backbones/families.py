"""What is known of the decoders that KerasHub ships: an adapter a family.

An adapter tells where a decoder block attends, and by which numbers. A family
that is not here yet takes one more. This is all of it, for a backbone whose
blocks keep their attention as `block.attention`:

```python
from keras_laid.backbones import families


def of_my_block(block):
    attention = block.attention
    if attention is None:  # A block of another kind.
        return families.linear()
    return families.layer(
        attention,  # Has `_compute_attention(query, key, value, mask, ...)`.
        rotary=attention.rope,  # A `keras_hub.layers.RotaryEmbedding`.
        query_layer=attention.query_norm,  # What is rotated comes from it:
        key_layer=attention.key_norm,  # a norm, or an `EinsumDense`.
        norm_offset=1,  # The norm multiplies by `1 + scale`.
        num_query_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        window=None,
    )


families.ADAPTERS[MyBackbone] = of_my_block
```

Blocks are those of `backbone.transformer_layers`. Subclasses of a known
backbone need no adapter of their own.
"""

import dataclasses
from typing import Any

import keras
from keras_hub.models import Gemma3Backbone
from keras_hub.models import Gemma4Backbone
from keras_hub.models import GemmaBackbone
from keras_hub.models import Llama3Backbone
from keras_hub.models import LlamaBackbone
from keras_hub.models import MistralBackbone
from keras_hub.models import PaliGemmaBackbone
from keras_hub.models import Phi3Backbone
from keras_hub.models import Qwen3_5Backbone
from keras_hub.models import Qwen3Backbone
from keras_hub.models import QwenBackbone


def _part() -> Any:
    return dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """A decoder layer and how it attends.

    All but `index` and `kind` are `None` where `kind` is `"linear"`.

    Attributes:
        index: Integer, its place in the decoder, from 0.
        kind: `"global"`, `"local"` where a sliding window bounds what it sees,
            or `"linear"` where it has no attention map.
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
    kind: str
    num_query_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    wavelength: float | None = None
    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    pair_distance: int | None = None
    keys_from: int | None = None
    lends_keys: bool = False
    norm_offset: int | None = None
    layer: keras.layers.Layer | None = _part()
    rotary: keras.layers.Layer | None = _part()
    query_layer: keras.layers.Layer | None = _part()
    key_layer: keras.layers.Layer | None = _part()


def attention_layers(model: keras.Model) -> list[AttentionLayer]:
    """The attention of each decoder layer of a KerasHub model, first to last.

    Args:
        model: A `keras_hub.models.CausalLM` or its backbone, of PaliGemma,
            Gemma (1 to 4), Qwen (2, 3, 3.5), Llama (1 to 3), Mistral or Phi-3,
            or of a family added to `ADAPTERS`.

    Returns:
        A list of `AttentionLayer`s.

    Raises:
        ValueError: If the family is unknown.

    Example:

    ```python
    model = keras_hub.models.Gemma3CausalLM.from_preset("gemma3_4b_text")
    for layer in keras_laid.backbones.attention_layers(model):
        print(layer.index, layer.kind, layer.window, layer.wavelength)
    ```
    """
    backbone = getattr(model, "backbone", model)
    adapter = next(
        (of for kind, of in ADAPTERS.items() if isinstance(backbone, kind)),
        None,
    )
    if adapter is None:
        names = sorted(kind.__name__ for kind in ADAPTERS)
        raise ValueError(
            f"The model's family must be known, one of {names}. "
            f"Received: {type(backbone).__name__}. Write an adapter: "
            "`help(keras_laid.backbones.families)` shows one in 20 lines."
        )
    layers = [adapter(block) for block in backbone.transformer_layers]
    lenders = {layer.keys_from for layer in layers}
    return [
        dataclasses.replace(layer, index=index, lends_keys=index in lenders)
        for index, layer in enumerate(layers)
    ]


def layer(
    attention: keras.layers.Layer,
    rotary: keras.layers.Layer,
    window: int | None,
    head_dim: int,
    rotary_dim: int | None = None,
    pair_distance: int | None = None,
    **attributes: Any,
) -> AttentionLayer:
    """An `AttentionLayer` with attention maps, for adapters.

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


def linear() -> AttentionLayer:
    """An `AttentionLayer` without attention maps, for adapters."""
    return AttentionLayer(index=0, kind="linear")


def of_gemma(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    scaled_dim = attention.head_dim
    if not attention.query_head_dim_normalize:
        scaled_dim = attention.hidden_dim // attention.num_query_heads
    # Only Gemma 3 has norms.
    normalized = getattr(attention, "use_query_key_norm", False)
    return of_any_gemma(
        attention,
        num_key_value_heads=attention.num_key_value_heads,
        scale=scaled_dim**-0.5,
        query_layer=attention.query_norm
        if normalized
        else attention.query_dense,
        key_layer=attention.key_norm if normalized else attention.key_dense,
        norm_offset=1 if normalized else None,
    )


def of_gemma4(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    return of_any_gemma(
        attention,
        num_key_value_heads=attention.effective_num_kv_heads,
        scale=1.0,
        rotary_dim=attention.rotary_dim,
        pair_distance=attention.head_dim // 2,
        keys_from=block.kv_shared_layer_index
        if block.is_kv_shared_layer
        else None,
        query_layer=attention.query_norm,
        key_layer=attention.key_norm,
        norm_offset=0,
    )


def of_any_gemma(
    attention: keras.layers.Layer, **attributes: Any
) -> AttentionLayer:
    """What all Gemmas name alike."""
    return layer(
        attention,
        attention.rope_layer,
        window=attention.sliding_window_size
        if attention.use_sliding_window_attention
        else None,
        num_query_heads=attention.num_query_heads,
        head_dim=attention.head_dim,
        soft_cap=attention.logit_soft_cap,
        **attributes,
    )


def of_llama(block: keras.layers.Layer) -> AttentionLayer:
    return of_projected(block._self_attention_layer, window=None)


def of_qwen(block: keras.layers.Layer) -> AttentionLayer:
    attention = block._self_attention_layer
    return of_projected(
        attention,
        window=attention.sliding_window_size
        if attention.use_sliding_window_attention
        else None,
    )


def of_projected(
    attention: keras.layers.Layer, window: int | None
) -> AttentionLayer:
    return of_grouped(
        attention,
        window=window,
        query_layer=attention._query_dense,
        key_layer=attention._key_dense,
    )


def of_phi3(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    return of_grouped(
        attention,
        window=None,
        query_layer=attention.query_dense,
        key_layer=attention.key_dense,
    )


def of_qwen3(block: keras.layers.Layer) -> AttentionLayer:
    attention = block._self_attention_layer
    return of_grouped(
        attention,
        window=attention.sliding_window_size or None,
        query_layer=attention._query_dense_layer_norm,
        key_layer=attention._key_dense_layer_norm,
        norm_offset=0,
    )


def of_qwen3_5(block: keras.layers.Layer) -> AttentionLayer:
    if block.layer_type == "linear_attention":
        return linear()
    attention = block._self_attention_layer
    return of_grouped(
        attention,
        window=attention.sliding_window_size or None,
        rotary_dim=attention.rotary_dim,
        query_layer=attention._query_norm,
        key_layer=attention._key_norm,
        norm_offset=1,
    )


def of_grouped(
    attention: keras.layers.Layer, **attributes: Any
) -> AttentionLayer:
    """What Llama, Phi-3 and Qwen name alike."""
    return layer(
        attention,
        attention.rotary_embedding_layer,
        num_query_heads=attention.num_query_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=round(attention._inv_norm_factor**-2),
        scale=attention._inv_norm_factor,
        **attributes,
    )


def of_mistral(block: keras.layers.Layer) -> AttentionLayer:
    attention = block._self_attention_layer
    return layer(
        attention,
        attention.rotary_embedding_layer,
        window=attention._sliding_window,
        num_query_heads=attention._num_query_heads,
        num_key_value_heads=attention._num_key_value_heads,
        head_dim=attention._head_dim,
        scale=attention._inv_norm_factor,
        query_layer=attention._query_dense,
        key_layer=attention._key_dense,
    )


# From the class of a backbone to what reads one of its decoder blocks.
ADAPTERS = {
    PaliGemmaBackbone: of_gemma,
    GemmaBackbone: of_gemma,
    Gemma3Backbone: of_gemma,
    Gemma4Backbone: of_gemma4,
    LlamaBackbone: of_llama,
    Llama3Backbone: of_llama,
    MistralBackbone: of_mistral,
    Phi3Backbone: of_phi3,
    QwenBackbone: of_qwen,
    Qwen3Backbone: of_qwen3,
    Qwen3_5Backbone: of_qwen3_5,
}
