"""Layers found in each family, against the arguments of its backbone."""

import dataclasses

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_laid.backbones import AttentionLayer
from keras_laid.backbones import LinearLayer
from keras_laid.backbones import attention_layers
from keras_laid.backbones import families
from tests.support import make_pali_gemma

SMALL = dict(
    vocabulary_size=16,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    intermediate_dim=16,
)
HEADS = dict(num_query_heads=4, num_key_value_heads=2)


def expected(*kinds, **attributes):
    """One layer for each kind; attention layers have the same attributes."""
    return [
        LinearLayer(index)
        if kind == "linear"
        else AttentionLayer(index=index, kind=kind, **attributes)
        for index, kind in enumerate(kinds)
    ]


def with_head_dim(head_dim, **attributes):
    defaults = HEADS | dict(
        head_dim=head_dim,
        rotary_dim=head_dim,
        scale=head_dim**-0.5,
        wavelength=1e4,
    )
    found = defaults | attributes
    # By default, the two halves of the rotated features make pairs.
    return {"pair_distance": found["rotary_dim"] // 2} | found


def gemma_2():
    backbone = keras_hub.models.GemmaBackbone(
        **SMALL,
        head_dim=8,
        query_head_dim_normalize=False,
        attention_logit_soft_cap=50.0,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )
    # Gemma's blocks scale by the head dim whatever the backbone is told.
    common = with_head_dim(8, soft_cap=50.0, interleaved=True)
    return backbone, [
        AttentionLayer(index=0, kind="local", window=3, **common),
        AttentionLayer(index=1, kind="global", **common),
    ]


def gemma_3():
    backbone = keras_hub.models.Gemma3Backbone(
        **SMALL | dict(num_layers=6),
        image_size=16,
        head_dim=8,
        use_query_key_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=3,
        vision_encoder=None,
    )
    local = with_head_dim(8, window=3, norm_offset=1)
    far = with_head_dim(8, wavelength=1e6, norm_offset=1)
    return backbone, [
        *(AttentionLayer(index=i, kind="local", **local) for i in range(5)),
        AttentionLayer(index=5, kind="global", **far),
    ]


def gemma_4():
    backbone = keras_hub.models.Gemma4Backbone(
        **SMALL | dict(num_layers=4),
        image_size=16,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window_size=3,
        attention_logit_soft_cap=30.0,
        local_rope_wavelength=1e4,
        global_rope_wavelength=1e6,
        global_rope_partial_rotary_factor=0.25,
        num_global_key_value_heads=1,
    )
    local = with_head_dim(8, window=3, scale=1.0, soft_cap=30.0, norm_offset=0)
    far = with_head_dim(
        16,
        scale=1.0,
        soft_cap=30.0,
        rotary_dim=4,
        pair_distance=8,
        wavelength=1e6,
        num_key_value_heads=1,
        norm_offset=0,
    )
    return backbone, [
        AttentionLayer(index=0, kind="local", lends_keys=True, **local),
        AttentionLayer(index=1, kind="global", lends_keys=True, **far),
        AttentionLayer(index=2, kind="local", keys_from=0, **local),
        AttentionLayer(index=3, kind="global", keys_from=1, **far),
    ]


def llama():
    backbone = keras_hub.models.LlamaBackbone(**SMALL, rope_max_wavelength=500)
    attributes = with_head_dim(4, wavelength=500.0)
    return backbone, expected("global", "global", **attributes)


def llama_3():
    backbone = keras_hub.models.Llama3Backbone(
        **SMALL, rope_max_wavelength=500000
    )
    attributes = with_head_dim(4, wavelength=5e5)
    return backbone, expected("global", "global", **attributes)


def mistral():
    backbone = keras_hub.models.MistralBackbone(
        **SMALL, head_dim=8, sliding_window=3
    )
    return backbone, expected("local", "local", **with_head_dim(8, window=3))


def mistral_without_window():
    backbone = keras_hub.models.MistralBackbone(**SMALL, sliding_window=None)
    return backbone, expected("global", "global", **with_head_dim(4))


def phi_3():
    backbone = keras_hub.models.Phi3Backbone(**SMALL)
    return backbone, expected("global", "global", **with_head_dim(4))


def qwen():
    backbone = keras_hub.models.QwenBackbone(
        **SMALL, use_sliding_window_attention=True, sliding_window_size=3
    )
    return backbone, expected("local", "local", **with_head_dim(4, window=3))


def qwen_without_window():
    backbone = keras_hub.models.QwenBackbone(**SMALL)
    return backbone, expected("global", "global", **with_head_dim(4))


def qwen_3():
    backbone = keras_hub.models.Qwen3Backbone(
        **SMALL, head_dim=8, sliding_window_size=None
    )
    attributes = with_head_dim(8, norm_offset=0)
    return backbone, expected("global", "global", **attributes)


def qwen_3_5():
    backbone = keras_hub.models.Qwen3_5Backbone(
        **SMALL | dict(num_layers=4),
        head_dim=16,
        partial_rotary_factor=0.25,
        rope_max_wavelength=1000,
        sliding_window_size=None,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
    )
    attributes = with_head_dim(
        16, rotary_dim=4, wavelength=1000.0, norm_offset=1
    )
    kinds = ("linear", "linear", "linear", "global")
    return backbone, expected(*kinds, **attributes)


FAMILIES = (
    gemma_2,
    gemma_3,
    gemma_4,
    llama,
    llama_3,
    mistral,
    mistral_without_window,
    phi_3,
    qwen,
    qwen_without_window,
    qwen_3,
    qwen_3_5,
)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_layers_are_those_the_backbone_was_made_with(make):
    backbone, layers = make()
    found = attention_layers(backbone)
    for one, other in zip(found, layers, strict=True):
        if isinstance(one, AttentionLayer):
            assert one.scale == pytest.approx(other.scale)
            other = dataclasses.replace(other, scale=one.scale)
        assert one == other


def test_pali_gemma_and_its_task():
    model = make_pali_gemma()
    layers = attention_layers(model)
    assert layers == attention_layers(model.backbone)
    assert [layer.layer for layer in layers] == [
        block.attention for block in model.backbone.transformer_layers
    ]


def test_a_layer_computes_logits_by_the_scale_listed():
    backbone, _ = gemma_2()
    layer = attention_layers(backbone)[1]
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 5, 2, 8)).astype("float32")
    query = np.repeat(query, 2, axis=2)
    value = np.eye(5, 8, dtype="float32")[None, :, None].repeat(2, axis=2)
    found = layer.layer._compute_attention(
        ops.convert_to_tensor(query.copy()), key, value, np.ones((1, 5, 5))
    )
    logits = np.einsum("bthd,bshd->bhts", query, key.repeat(2, axis=2))
    logits = layer.soft_cap * np.tanh(layer.scale * logits / layer.soft_cap)
    maps = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        ops.convert_to_numpy(found)[..., :5],
        maps.transpose(0, 2, 1, 3),
        rtol=1e-4,
    )


def test_unknown_families_are_refused_until_they_have_a_record(monkeypatch):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
    )
    with pytest.raises(ValueError, match="known, one of .*'GemmaBackbone'"):
        attention_layers(backbone)
    monkeypatch.setitem(
        families.FAMILIES,
        keras_hub.models.GPT2Backbone,
        families.Family(lambda block: families.linear()),
    )
    assert attention_layers(backbone) == expected("linear")
