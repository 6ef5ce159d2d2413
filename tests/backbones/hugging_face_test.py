"""A model folder in Hugging Face's format, used with all the tools."""

import json

import keras
import keras_hub
import numpy as np
import pytest

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import attach_gain_modulation
from keras_laid import fold_gain_modulation
from keras_laid.backbones.attention_capture import captured_attention
from tests.support import FEW_STEPS
from tests.support import to_numpy

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, INNER, LAYERS = 16, 4, 2, 4, 24, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}


def write_folder(folder, seed=0):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    shapes = {"embed_tokens": (CONFIG["vocab_size"], WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            shapes[f"layers.{layer}.{name}"] = shape
    tensors = {
        f"model.{name}.weight": rng.normal(size=shape).astype("float32") / 2
        for name, shape in shapes.items()
    }
    head = rng.normal(size=(CONFIG["vocab_size"], WIDTH)).astype("float32")
    tensors["lm_head.weight"] = head / 2
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def load(folder):
    backbone = keras_hub.models.Backbone.from_preset(str(folder))
    return keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)


@pytest.mark.extra_large_but_on("torch")
def test_gains_capture_and_distillation(tmp_path):
    tensors = write_folder(tmp_path / "student")
    write_folder(tmp_path / "teacher", seed=1)
    student = load(tmp_path / "student")
    inputs = {
        "token_ids": np.random.default_rng(2).integers(1, 24, (2, 9)),
        "padding_mask": np.ones((2, 9), "int32"),
    }
    plain = to_numpy(student(inputs))
    gains = attach_gain_modulation(student)
    with captured_attention(student, [0]) as captured:
        np.testing.assert_array_equal(to_numpy(student(inputs)), plain)
    # Rotation leaves the query at position 0 unchanged.
    x = tensors["model.embed_tokens.weight"][inputs["token_ids"][:, 0]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = x * tensors["model.layers.0.input_layernorm.weight"]
    query = x @ tensors["model.layers.0.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(
        to_numpy(captured[0].query)[:, 0],
        query.reshape(2, HEADS, HEAD_DIM),
        atol=1e-4,
    )
    distiller = DistanceWeightedAttentionDistillation(
        teacher=load(tmp_path / "teacher"), student=student
    )
    distiller.compile(optimizer=keras.optimizers.Adam(0.1), **FEW_STEPS)
    distiller.fit(inputs, inputs["token_ids"], verbose=0)
    assert all((to_numpy(gain.log_gain) != 0).all() for gain in gains)
    trained = to_numpy(student(inputs))
    fold_gain_modulation(student)
    student.backbone.save_to_preset(str(tmp_path / "preset"))
    again = load(tmp_path / "preset")
    np.testing.assert_allclose(to_numpy(again(inputs)), trained, atol=1e-4)
