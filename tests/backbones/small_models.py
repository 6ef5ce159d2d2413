"""A small model of every family, with each special feature switched on."""

import keras_hub
import numpy as np
import pytest
from keras import ops

# Only a preset makes it otherwise: it has no public name.
from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import (
    Qwen3_5VisionEncoder,
)

from tests.support import PALI_GEMMA
from tests.support import PALI_GEMMA_2

VOCABULARY = 24
LENGTH = 16
# Two images of four tokens each, text around them, and some padding.
IS_IMAGE = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
DECODER = dict(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    intermediate_dim=16,
)
# Arguments of a larger model of the same family.
LARGER = dict(num_layers=2, num_query_heads=8, hidden_dim=32)


def pali_gemma(**larger):
    config = dict(PALI_GEMMA, num_query_heads=4, vocabulary_size=VOCABULARY)
    return keras_hub.models.PaliGemmaBackbone(**config | larger)


def pali_gemma_2(**larger):
    larger.pop("num_layers", None)
    return keras_hub.models.PaliGemmaBackbone(
        **PALI_GEMMA_2
        | dict(
            vocabulary_size=VOCABULARY,
            query_head_dim_normalize=False,
            sliding_window_size=3,
        )
        | larger
    )


def gemma_2(**larger):
    return keras_hub.models.GemmaBackbone(
        **DECODER | larger,
        head_dim=8,
        query_head_dim_normalize=False,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )


def gemma_3(**larger):
    config = DECODER | larger | dict(num_layers=6)
    return keras_hub.models.Gemma3Backbone(
        **config,
        image_size=16,
        head_dim=8,
        use_query_key_norm=True,
        query_head_dim_normalize=False,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        use_sliding_window_attention=True,
        sliding_window_size=5,
        vision_encoder=keras_hub.models.Gemma3VisionEncoder(
            image_size=16,
            patch_size=4,
            num_heads=2,
            hidden_dim=8,
            num_layers=1,
            intermediate_dim=8,
            output_dim=config["hidden_dim"],
            pool_size=2,
        ),
    )


def gemma_4(**larger):
    config = DECODER | dict(use_vision_bidirectional_attention=True)
    config = config | larger | dict(num_layers=4)
    return keras_hub.models.Gemma4Backbone(
        **config,
        image_size=16,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window_size=5,
        attention_logit_soft_cap=30.0,
        global_rope_partial_rotary_factor=0.5,
        hidden_size_per_layer_input=4,
        vision_encoder=keras_hub.models.Gemma4VisionEncoder(
            image_size=16,
            patch_size=4,
            num_heads=2,
            hidden_dim=8,
            num_layers=1,
            intermediate_dim=8,
            head_dim=4,
            output_dim=config["hidden_dim"],
            pool_size=2,
            position_embedding_size=16,
        ),
    )


def qwen_3_5(**larger):
    return keras_hub.models.Qwen3_5Backbone(
        **DECODER | larger,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        partial_rotary_factor=0.75,
        rope_max_wavelength=1000,
        sliding_window_size=None,
        mrope_section=[2, 2, 2],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
    )


def qwen_3_5_images(**larger):
    config = DECODER | larger
    return qwen_3_5(
        **larger,
        vision_encoder=Qwen3_5VisionEncoder(
            depth=2,
            hidden_size=16,
            num_heads=2,
            intermediate_size=8,
            patch_size=4,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=config["hidden_dim"],
            num_position_embeddings=36,
        ),
    )


def llama(**larger):
    return keras_hub.models.LlamaBackbone(
        **DECODER | larger, rope_max_wavelength=500
    )


def llama_3(**larger):
    return keras_hub.models.Llama3Backbone(
        **DECODER | larger,
        rope_max_wavelength=500000,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_frequency_adjustment_factor=8.0,
        rope_pretraining_sequence_length=16,
    )


def mistral(**larger):
    return keras_hub.models.MistralBackbone(
        **DECODER | larger, head_dim=8, sliding_window=None
    )


def mistral_sliding(**larger):
    return keras_hub.models.MistralBackbone(
        **DECODER | larger, head_dim=8, sliding_window=3
    )


def phi_3(**larger):
    config = DECODER | larger
    frequencies = config["hidden_dim"] // config["num_query_heads"] // 2
    return keras_hub.models.Phi3Backbone(
        **config,
        rope_scaling_type="su",
        rope_scaling_short_factor=[1.1] * frequencies,
        rope_scaling_long_factor=[2.0] * frequencies,
        max_sequence_length=64,
        pretraining_sequence_length=32,
    )


def qwen(**larger):
    return keras_hub.models.QwenBackbone(**DECODER | larger)


def qwen_sliding(**larger):
    return keras_hub.models.QwenBackbone(
        **DECODER | larger,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    )


def qwen_3(**larger):
    return keras_hub.models.Qwen3Backbone(
        **DECODER | larger, head_dim=8, sliding_window_size=None
    )


TASKS = {
    pali_gemma: keras_hub.models.PaliGemmaCausalLM,
    pali_gemma_2: keras_hub.models.PaliGemmaCausalLM,
    gemma_2: keras_hub.models.GemmaCausalLM,
    gemma_3: keras_hub.models.Gemma3CausalLM,
    gemma_4: keras_hub.models.Gemma4CausalLM,
    qwen_3_5: keras_hub.models.Qwen3_5CausalLM,
    qwen_3_5_images: keras_hub.models.Qwen3_5CausalLM,
    llama: keras_hub.models.LlamaCausalLM,
    llama_3: keras_hub.models.Llama3CausalLM,
    mistral: keras_hub.models.MistralCausalLM,
    phi_3: keras_hub.models.Phi3CausalLM,
    qwen: keras_hub.models.QwenCausalLM,
    qwen_3: keras_hub.models.Qwen3CausalLM,
}
SLIDING = {
    mistral_sliding: keras_hub.models.MistralCausalLM,
    qwen_sliding: keras_hub.models.QwenCausalLM,
}
FAMILIES = tuple(TASKS)
# A prefix and soft caps, images among text, and neither of them.
FEW = (pali_gemma_2, gemma_3, llama)


def families(*backends):
    """Parameters of a test; most are extra large except on some backends."""
    mark = pytest.mark.extra_large_but_on(*backends)
    return [
        family if family in FEW else pytest.param(family, marks=mark)
        for family in FAMILIES
    ]


def each(*backends):
    """Runs a test with each family, as in `families`."""
    return pytest.mark.parametrize("family", families(*backends), ids=name_of)


def name_of(family):
    return family.__name__


EACH = each("jax", "tensorflow", "torch")
# JAX compiles every operation, TensorFlow only whole steps.
EACH_CALLED = each("tensorflow", "torch")
EACH_COMPILED = each("torch")


def make_model(family, seed=0, **larger):
    """A task with the same weights on every backend, norms and biases too."""
    backbone = family(**larger)
    rng = np.random.default_rng(seed)
    for variable in in_order(backbone.trainable_variables):
        shape = variable.shape
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 16
        # Sharp attention, so that a wrong map shows.
        values = 1.5 / np.sqrt(min(fan_in, 16)) * rng.standard_normal(shape)
        offset = 0.5 * ops.convert_to_numpy(variable) if len(shape) == 1 else 0
        variable.assign(offset + values)
    task = (TASKS | SLIDING)[family]
    return task(backbone=backbone, preprocessor=None)


def in_order(variables):
    """Those of Qwen 3.5's vision encoder last, as not on every backend."""
    return sorted(variables, key=lambda v: "qwen3_5_vision" in v.path)


def make_inputs(model, batch=2, seed=1):
    """Inputs with images where the model takes them; examples are padded."""
    rng = np.random.default_rng(seed)
    inputs = {
        "token_ids": rng.integers(1, VOCABULARY, (batch, LENGTH)),
        "padding_mask": np.tile(np.arange(LENGTH) < LENGTH - 1, (batch, 1)) * 1,
        "response_mask": np.tile(np.arange(LENGTH) >= LENGTH - 4, (batch, 1))
        * 1,
        "position_ids": np.tile(np.arange(LENGTH), (batch, 1)),
        "vision_mask": np.tile(IS_IMAGE, (batch, 1)),
        "vision_indices": np.tile(np.flatnonzero(IS_IMAGE), (batch, 1)),
        "pixel_values": rng.normal(size=(batch, 2, 16, 48)).astype("float32"),
        "pixel_position_ids": np.tile(
            np.stack(np.divmod(np.arange(16), 4)[::-1], -1), (batch, 2, 1, 1)
        ),
    }
    inputs["padding_mask"][0, -3:] = 0
    inputs["response_mask"] *= inputs["padding_mask"]
    if "image_grid_thw" in model.backbone.input:
        # Two images of 16 patches a prompt, in other shapes.
        patches = (batch, 32, 2, 4, 4, 3)
        inputs["pixel_values"] = rng.normal(size=patches).astype("float32")
        inputs["image_grid_thw"] = np.tile(
            [[1, 4, 4], [1, 2, 8]], (batch, 1, 1)
        )
        # Indices count through the tokens of the whole batch.
        inputs["vision_indices"] += LENGTH * np.arange(batch)[:, None]
    shape = tuple(model.backbone.input.get("images", np.empty(0)).shape[1:])
    if shape:
        images = (batch, 2 if len(shape) == 4 else 1, 16, 16, 3)
        inputs["images"] = rng.normal(size=images).astype("float32")
        if len(shape) == 3:
            inputs["images"] = inputs["images"][:, 0]
    return {
        name: value
        for name, value in inputs.items()
        if name in model.backbone.input
    }
