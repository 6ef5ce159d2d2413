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
        attention,
        rotary=attention.rope,  # Its `max_wavelength` is read.
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

import keras
from keras_hub.models import Gemma3Backbone
from keras_hub.models import Gemma4Backbone
from keras_hub.models import GemmaBackbone
from keras_hub.models import LlamaBackbone
from keras_hub.models import MistralBackbone
from keras_hub.models import PaliGemmaBackbone
from keras_hub.models import Phi3Backbone
from keras_hub.models import Qwen3_5Backbone
from keras_hub.models import Qwen3Backbone
from keras_hub.models import QwenBackbone


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
        layer: The `keras.layers.Layer` that computes it.
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
    layer: keras.layers.Layer | None = dataclasses.field(
        default=None, repr=False, compare=False
    )


def attention_layers(model):
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
            "`help(keras_laid.backbones.families)` shows one in 15 lines."
        )
    return [
        dataclasses.replace(adapter(block), index=index)
        for index, block in enumerate(backbone.transformer_layers)
    ]


def layer(attention, rotary, window, rotary_dim=None, **attributes):
    """An `AttentionLayer` with attention maps, for adapters.

    Args:
        attention: The Keras layer.
        rotary: Its rotary embedding.
        window: Integer, tokens of its sliding window, or `None`.
        rotary_dim: Integer, if not all of the head dim is turned.
        **attributes: The other attributes of `AttentionLayer`.
    """
    return AttentionLayer(
        index=0,
        kind="global" if window is None else "local",
        rotary_dim=rotary_dim or attributes["head_dim"],
        wavelength=float(rotary.max_wavelength),
        window=window,
        layer=attention,
        **attributes,
    )


def linear():
    """An `AttentionLayer` without attention maps, for adapters."""
    return AttentionLayer(index=0, kind="linear")


def of_gemma(block):
    attention = block.attention
    scaled_dim = attention.head_dim
    if not attention.query_head_dim_normalize:
        scaled_dim = attention.hidden_dim // attention.num_query_heads
    return of_any_gemma(
        attention,
        num_key_value_heads=attention.num_key_value_heads,
        scale=scaled_dim**-0.5,
    )


def of_gemma4(block):
    attention = block.attention
    return of_any_gemma(
        attention,
        num_key_value_heads=attention.effective_num_kv_heads,
        scale=1.0,
        rotary_dim=attention.rotary_dim,
    )


def of_any_gemma(attention, **attributes):
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


def of_llama(block):
    return of_grouped(block._self_attention_layer, window=None)


def of_phi3(block):
    return of_grouped(block.attention, window=None)


def of_qwen(block):
    attention = block._self_attention_layer
    if not attention.use_sliding_window_attention:
        return of_grouped(attention, window=None)
    return of_grouped(attention, window=attention.sliding_window_size)


def of_qwen3(block):
    attention = block._self_attention_layer
    return of_grouped(attention, window=attention.sliding_window_size or None)


def of_qwen3_5(block):
    if block.layer_type == "linear_attention":
        return linear()
    attention = block._self_attention_layer
    return of_grouped(
        attention,
        window=attention.sliding_window_size or None,
        rotary_dim=attention.rotary_dim,
    )


def of_mistral(block):
    attention = block._self_attention_layer
    return layer(
        attention,
        attention.rotary_embedding_layer,
        window=attention._sliding_window,
        num_query_heads=attention._num_query_heads,
        num_key_value_heads=attention._num_key_value_heads,
        head_dim=attention._head_dim,
        scale=attention._inv_norm_factor,
    )


def of_grouped(attention, window, rotary_dim=None):
    """What Llama, Phi-3 and Qwen name alike."""
    return layer(
        attention,
        attention.rotary_embedding_layer,
        window=window,
        rotary_dim=rotary_dim,
        num_query_heads=attention.num_query_heads,
        num_key_value_heads=attention.num_key_value_heads,
        head_dim=round(attention._inv_norm_factor**-2),
        scale=attention._inv_norm_factor,
    )


# From the class of a backbone to what reads one of its decoder blocks.
ADAPTERS = {
    PaliGemmaBackbone: of_gemma,
    GemmaBackbone: of_gemma,
    Gemma3Backbone: of_gemma,
    Gemma4Backbone: of_gemma4,
    LlamaBackbone: of_llama,  # Llama 3 is a subclass.
    MistralBackbone: of_mistral,
    Phi3Backbone: of_phi3,
    QwenBackbone: of_qwen,
    Qwen3Backbone: of_qwen3,
    Qwen3_5Backbone: of_qwen3_5,
}
