"""All facts about KerasHub's decoders: one record per family.

To support another family, add a record to `FAMILIES`. This is the whole record
for a backbone whose blocks keep their attention as `block.attention`:

```python
from keras_laid.backbones import families


def read_my_block(block):
    attention = block.attention
    if attention is None:  # A block of another kind.
        return families.linear()
    return families.layer(
        attention,  # Has `_compute_attention(query, key, value, mask, ...)`.
        rotary=attention.rope,  # A `keras_hub.layers.RotaryEmbedding`.
        query_layer=attention.query_norm,  # Their outputs are rotated: both
        key_layer=attention.key_norm,  # are norms, or both `EinsumDense`.
        norm_offset=1,  # The norm multiplies by `1 + scale`.
        num_query_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        window=None,
    )


families.FAMILIES[MyBackbone] = families.Family(read_my_block)
```

The function is called with each of `backbone.transformer_layers`. Subclasses of
a known backbone need no record of their own.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Literal

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

from keras_laid.backbones.attention_layer import AttentionLayer
from keras_laid.backbones.attention_layer import DecoderLayer
from keras_laid.backbones.attention_layer import layer
from keras_laid.backbones.attention_layer import linear


@dataclasses.dataclass(frozen=True)
class Family:
    """All that is known of a family of decoders.

    Attributes:
        read_block: Function from a block of the decoder to its
            `AttentionLayer`, or to a `LinearLayer`.
        mask: `"causal"`, `"prefix"` or `"images"`: which tokens attend later
            ones in layers with full attention. With `"causal"`, none do; with
            `"prefix"`, tokens of the images and the prompt attend each other;
            with `"images"`, tokens of the same image do. Defaults to
            `"causal"`.
        mask_method: String, the method of a block that makes its mask.
        linear_memory: Whether the masks of all layers are known well enough
            for `keras_laid.linear_memory_attention`: `"always"`, `"without
            windows"` (only if no layer has a sliding window) or `"never"`.
        image_attributes: Names of attributes of the backbone or its vision
            encoder, which decide how many tokens an image becomes, and in which
            order. Empty for text-only decoders.
        vision_encoder: String, the attribute of the backbone that is its vision
            encoder; empty for text-only decoders.
        vision_blocks: String, the attribute of the encoder, or of one of its
            layers, that lists its blocks.
    """

    read_block: Callable[[keras.layers.Layer], DecoderLayer]
    mask: Literal["causal", "prefix", "images"] = "causal"
    mask_method: str = "_compute_self_attention_mask"
    linear_memory: Literal["always", "without windows", "never"] = "always"
    image_attributes: tuple[str, ...] = ()
    vision_encoder: str = ""
    vision_blocks: str = ""


def family_of(model: keras.Model) -> Family:
    """The record of a model's or backbone's family.

    Raises:
        ValueError: If the family is unknown.
    """
    backbone = getattr(model, "backbone", model)
    for kind, family in FAMILIES.items():
        if isinstance(backbone, kind):
            return family
    names = sorted(kind.__name__ for kind in FAMILIES)
    raise ValueError(
        f"The model's family must be known, one of {names}. "
        f"Received: {type(backbone).__name__}. Write a record for the family: "
        "`help(keras_laid.backbones.families)` shows one in 20 lines."
    )


def attention_layers(model: keras.Model) -> list[DecoderLayer]:
    """The attention of each decoder layer of a KerasHub model, first to last.

    Args:
        model: A `keras_hub.models.CausalLM` or its backbone, of PaliGemma,
            Gemma (1 to 4), Qwen (2, 3, 3.5), Llama (1 to 3), Mistral or Phi-3,
            or of a family added to `FAMILIES`.

    Returns:
        A list of `AttentionLayer`s, and of `LinearLayer`s where a layer has no
        attention maps.

    Raises:
        ValueError: If the family is unknown.

    Example:

    ```python
    model = keras_hub.models.Gemma3CausalLM.from_preset("gemma3_4b_text")
    for layer in keras_laid.backbones.attention_layers(model):
        print(layer.index, layer.kind, layer.window, layer.wavelength)
    ```
    """
    family = family_of(model)
    backbone = getattr(model, "backbone", model)
    layers = [family.read_block(each) for each in backbone.transformer_layers]
    lenders = {getattr(each, "keys_from", None) for each in layers}
    return [
        dataclasses.replace(each, index=index)
        if each.kind == "linear"
        else dataclasses.replace(each, index=index, lends_keys=index in lenders)
        for index, each in enumerate(layers)
    ]


def has_linear_layers(model: keras.Model) -> bool:
    """Whether a decoder layer has no attention maps, as in Qwen 3.5.

    Such a layer reads a prompt in chunks, whose number a compiled step must
    know.
    """
    return any(each.kind == "linear" for each in attention_layers(model))


def layers_with_maps(model: keras.Model) -> dict[int, AttentionLayer]:
    """The decoder layers with attention maps, by their index."""
    return with_maps(attention_layers(model))


def with_maps(layers: Sequence[DecoderLayer]) -> dict[int, AttentionLayer]:
    """Those of `layers` that have attention maps, by their index."""
    return {
        each.index: each for each in layers if isinstance(each, AttentionLayer)
    }


def read_gemma(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    scaled_dim = attention.head_dim
    if not attention.query_head_dim_normalize:
        scaled_dim = attention.hidden_dim // attention.num_query_heads
    # Only Gemma 3 has norms.
    normalized = getattr(attention, "use_query_key_norm", False)
    return gemma_layer(
        attention,
        interleaved=not hasattr(attention, "use_query_key_norm"),
        num_key_value_heads=attention.num_key_value_heads,
        scale=scaled_dim**-0.5,
        query_layer=attention.query_norm
        if normalized
        else attention.query_dense,
        key_layer=attention.key_norm if normalized else attention.key_dense,
        norm_offset=1 if normalized else None,
    )


def read_gemma4(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    return gemma_layer(
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


def gemma_layer(
    attention: keras.layers.Layer, **attributes: Any
) -> AttentionLayer:
    """The attributes that have the same names in all Gemmas."""
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


def read_llama(block: keras.layers.Layer) -> AttentionLayer:
    return projected_layer(block._self_attention_layer, window=None)


def read_qwen(block: keras.layers.Layer) -> AttentionLayer:
    attention = block._self_attention_layer
    return projected_layer(
        attention,
        window=attention.sliding_window_size
        if attention.use_sliding_window_attention
        else None,
    )


def projected_layer(
    attention: keras.layers.Layer, window: int | None
) -> AttentionLayer:
    return grouped_layer(
        attention,
        window=window,
        query_layer=attention._query_dense,
        key_layer=attention._key_dense,
    )


def read_phi3(block: keras.layers.Layer) -> AttentionLayer:
    attention = block.attention
    return grouped_layer(
        attention,
        window=None,
        query_layer=attention.query_dense,
        key_layer=attention.key_dense,
    )


def read_qwen3(block: keras.layers.Layer) -> AttentionLayer:
    attention = block._self_attention_layer
    return grouped_layer(
        attention,
        window=attention.sliding_window_size or None,
        query_layer=attention._query_dense_layer_norm,
        key_layer=attention._key_dense_layer_norm,
        norm_offset=0,
    )


def read_qwen3_5(block: keras.layers.Layer) -> DecoderLayer:
    if block.layer_type == "linear_attention":
        return linear()
    attention = block._self_attention_layer
    return grouped_layer(
        attention,
        window=attention.sliding_window_size or None,
        rotary_dim=attention.rotary_dim,
        query_layer=attention._query_norm,
        key_layer=attention._key_norm,
        norm_offset=1,
    )


def grouped_layer(
    attention: keras.layers.Layer, **attributes: Any
) -> AttentionLayer:
    """The attributes that have the same names in Llama, Phi-3 and Qwen."""
    return layer(
        attention,
        attention.rotary_embedding_layer,
        num_query_heads=attention.num_query_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=round(attention._inv_norm_factor**-2),
        scale=attention._inv_norm_factor,
        **attributes,
    )


def read_mistral(block: keras.layers.Layer) -> AttentionLayer:
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


GEMMA = Family(read_gemma, mask_method="_compute_attention_mask")
LLAMA = Family(read_llama)
IMAGE_GRID = ("image_size", "num_vision_tokens_per_image", "patch_size")

# From the class of a backbone to the record of its family.
FAMILIES = {
    # All images stand before the text; `"token_ids"` holds only the text.
    PaliGemmaBackbone: Family(
        read_gemma,
        mask="prefix",
        mask_method="_compute_attention_mask",
        image_attributes=("image_size", "image_sequence_length"),
        vision_encoder="vit_encoder",
        vision_blocks="resblocks",
    ),
    GemmaBackbone: GEMMA,
    Gemma3Backbone: Family(
        read_gemma,
        mask="images",
        mask_method="_compute_attention_mask",
        image_attributes=(*IMAGE_GRID, "pool_size"),
        vision_encoder="vision_encoder",
        vision_blocks="resblocks",
    ),
    # Tokens of an image attend each other, but only in Gemma 4's local layers.
    Gemma4Backbone: Family(
        read_gemma4,
        mask_method="_compute_attention_mask",
        linear_memory="never",
        image_attributes=(*IMAGE_GRID, "pool_size"),
        vision_encoder="vision_encoder",
        vision_blocks="encoder_blocks",
    ),
    LlamaBackbone: LLAMA,
    Llama3Backbone: LLAMA,
    MistralBackbone: Family(read_mistral),
    Phi3Backbone: Family(read_phi3),
    # Fused attention ignores Qwen's sliding window, so its mask depends on the
    # backend.
    QwenBackbone: Family(read_qwen, linear_memory="without windows"),
    Qwen3Backbone: Family(read_qwen3, linear_memory="without windows"),
    Qwen3_5Backbone: Family(
        read_qwen3_5,
        linear_memory="without windows",
        image_attributes=(
            "patch_size",
            "spatial_merge_size",
            "temporal_patch_size",
        ),
        vision_encoder="vision_encoder",
        vision_blocks="blocks",
    ),
}
