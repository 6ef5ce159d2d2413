"""Gains attached to PaliGemma 1 and 2, trained, saved and folded."""

import copy
import json

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras_hub.layers import RotaryEmbedding
from keras_hub.models import PaliGemmaBackbone

from keras_laid.backbones.gain_modulation import attach_gain_modulation
from keras_laid.backbones.gain_modulation import fold_gain_modulation
from keras_laid.backbones.gain_modulation import gain_layers
from keras_laid.backbones.gain_modulation import gain_modulated
from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.layers import GainModulatedRotaryEmbedding
from tests import support

PALI_GEMMA = dict(support.PALI_GEMMA, vocabulary_size=32, num_query_heads=4)
PALI_GEMMA_2 = dict(
    support.PALI_GEMMA_2,
    vocabulary_size=32,
    query_head_dim_normalize=False,
    sliding_window_size=3,
)
# As many key heads as query heads: their shapes do not tell them apart.
EQUAL_HEADS = dict(PALI_GEMMA, num_key_value_heads=4)
CONFIGS = pytest.mark.parametrize(
    "config",
    [PALI_GEMMA, PALI_GEMMA_2, EQUAL_HEADS],
    ids=["pali_gemma", "pali_gemma_2", "equal_heads"],
)
PER_HEAD = pytest.mark.parametrize("per_head", [False, True])


def make_backbone(config, **kwargs):
    backbone = PaliGemmaBackbone(**config, **kwargs)
    # Sharp attention, so that gains show.
    for attention in support.attention_of(backbone):
        for dense in (attention.query_dense, attention.key_dense):
            dense.kernel.assign(2.0 * dense.kernel)
    return backbone


def make_task(config, **kwargs):
    return keras_hub.models.PaliGemmaCausalLM(
        preprocessor=None, backbone=make_backbone(config, **kwargs)
    )


def make_inputs(length=7, prompt=4):
    rng = np.random.default_rng(0)
    return {
        "images": rng.normal(size=(2, 16, 16, 3)).astype("float32"),
        "token_ids": rng.integers(0, 32, (2, length)),
        "padding_mask": np.ones((2, length), "int32"),
        "response_mask": np.tile(np.arange(length) >= prompt, (2, 1)) * 1,
    }


def outputs_of(model, inputs=None):
    outputs = model(make_inputs() if inputs is None else inputs)
    return ops.convert_to_numpy(ops.cast(outputs, "float32"))


def randomize(gains, seed=3):
    rng = np.random.default_rng(seed)
    for gain in gains:
        gain.log_gain.assign(rng.normal(size=gain.log_gain.shape))


def weights_of(model):
    return {v.path: ops.convert_to_numpy(v) for v in model.weights}


def assert_plain(backbone):
    assert type(backbone) is PaliGemmaBackbone
    assert gain_layers(backbone) == []
    for attention in support.attention_of(backbone):
        assert type(attention.rope_layer) is RotaryEmbedding
        assert attention.query_dense.activation is keras.activations.linear
        assert not hasattr(attention, "rotary_gain")
    for layer in backbone._flatten_layers():
        assert not isinstance(layer, GainModulatedRotaryEmbedding)


@pytest.mark.extra_large_but_on("torch")
@CONFIGS
@PER_HEAD
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_float16"])
def test_attaching_changes_no_output_and_no_weight(config, per_head, dtype):
    model = make_task(config, dtype=dtype)
    before, weights = outputs_of(model), weights_of(model)
    gains = attach_gain_modulation(model, per_head=per_head)
    np.testing.assert_array_equal(outputs_of(model), before)
    after = weights_of(model)
    for path, value in weights.items():
        np.testing.assert_array_equal(after.pop(path), value)
    assert set(after) == {gain.log_gain.path for gain in gains}
    for gain in gains:
        assert gain.dtype_policy == keras.DTypePolicy(dtype)
        assert gain.log_gain.dtype == "float32"
        assert gain.gains().shape == ((4, 4) if per_head else (4,))


@CONFIGS
@PER_HEAD
def test_folding_keeps_the_outputs_and_leaves_a_plain_model(config, per_head):
    model = make_task(config)
    plain, names = outputs_of(model), set(weights_of(model))
    randomize(attach_gain_modulation(model, per_head=per_head))
    gained = outputs_of(model)
    assert np.abs(gained - plain).max() > 1e-2
    fold_gain_modulation(model)
    np.testing.assert_allclose(outputs_of(model), gained, atol=1e-5)
    assert_plain(model.backbone)
    assert set(weights_of(model)) == names


@PER_HEAD
def test_compiled_functions_follow(per_head):
    def predict():
        return model.predict(make_inputs(), verbose=0)

    model = make_task(PALI_GEMMA)
    plain = predict()
    gains = attach_gain_modulation(model, per_head=per_head)
    np.testing.assert_array_equal(predict(), plain)
    randomize(gains)
    gained = predict()
    assert np.abs(gained - plain).max() > 1e-2
    fold_gain_modulation(model)
    np.testing.assert_allclose(predict(), gained, atol=1e-5)


def attention_logits(attention, x):
    """Products of the queries and keys that the attention gets."""
    query = attention._apply_rope(attention.query_dense(x), 0)
    key = attention._apply_rope(attention.key_dense(x), 0)
    key = ops.repeat(key, attention.num_key_value_groups, axis=2)
    return ops.convert_to_numpy(ops.einsum("bqhd,bkhd->bhqk", query, key))


@CONFIGS
@PER_HEAD
def test_each_frequency_of_the_logits_is_multiplied_by_its_gain(
    config, per_head
):
    backbone = make_backbone(config)
    gain = attach_gain_modulation(backbone, [-1], per_head, max_gain=3.0)[0]
    attention = support.attention_of(backbone)[-1]
    x = np.random.default_rng(1).normal(size=(1, 9, 16)).astype("float32")
    kernels = [
        ops.convert_to_numpy(dense.kernel).astype("float64")
        for dense in (attention.query_dense, attention.key_dense)
    ]
    query, key = (np.einsum("td,ndh->tnh", x[0], k) for k in kernels)
    frequency = 10_000.0 ** (-np.arange(4) / 4)
    turn = np.exp(1j * np.arange(9)[:, None] * frequency)[:, None]
    query = (query[..., :4] + 1j * query[..., 4:]) * turn
    key = (key[..., :4] + 1j * key[..., 4:]) * turn
    key = np.repeat(key, 4 // key.shape[1], axis=1)
    parts = np.einsum("qhf,khf->hqkf", query, key.conj()).real

    found = attention_logits(attention, x)[0]
    np.testing.assert_allclose(found, parts.sum(-1), atol=2e-4)
    randomize([gain])
    gains = ops.convert_to_numpy(gain.gains()).astype("float64")
    gains = np.broadcast_to(gains, (4, 4))
    assert gains.max() <= 3.0001
    found = attention_logits(attention, x)[0]
    expected = (parts * gains[:, None, None]).sum(-1)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert np.abs(expected - parts.sum(-1)).max() > 0.1


def test_layers_chosen():
    sliding = make_backbone(PALI_GEMMA_2)
    attach_gain_modulation(sliding)
    assert sliding.get_config()["gain_modulation"]["layers"] == [1, 3]
    for layers, expected in (
        ([-1], [3]),
        ((3, -3), [1, 3]),
        (range(1, 4, 2), [1, 3]),
        (np.array([1]), [1]),
    ):
        backbone = make_backbone(PALI_GEMMA_2)
        gains = attach_gain_modulation(backbone, layers)
        assert backbone.get_config()["gain_modulation"]["layers"] == expected
        attentions = support.attention_of(backbone)
        assert gains == [attentions[index].rotary_gain for index in expected]
        assert gains == gain_layers(backbone)


def test_multi_image_model_and_backbone_are_the_same_model():
    task = make_task(PALI_GEMMA)
    several = MultiImagePaliGemmaCausalLM.from_causal_lm(task)
    inputs = make_inputs()
    inputs["images"] = np.stack([inputs["images"]] * 2, axis=1)
    inputs["positions"] = np.arange(15) * 3
    plain = outputs_of(several, inputs)
    gains = attach_gain_modulation(several, per_head=True)
    np.testing.assert_array_equal(outputs_of(several, inputs), plain)
    randomize(gains)
    gained = outputs_of(several, inputs)
    assert np.abs(gained - plain).max() > 1e-3
    assert gain_layers(task) == gain_layers(task.backbone) == gains
    fold_gain_modulation(task.backbone)
    np.testing.assert_allclose(outputs_of(several, inputs), gained, atol=1e-5)
    assert_plain(several.backbone)


@pytest.mark.parametrize(
    "config, per_head", [(PALI_GEMMA, False), (PALI_GEMMA_2, True)]
)
def test_fit_trains_the_gains(config, per_head):
    model = make_task(config)
    gains = attach_gain_modulation(model, per_head=per_head)
    trainable = {v.path for v in model.trainable_variables}
    assert {gain.log_gain.path for gain in gains} <= trainable
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **support.FEW_STEPS,
    )
    model.fit(make_inputs(), make_inputs()["token_ids"], verbose=0)
    for gain in gains:
        # Each frequency of each head learns.
        assert (ops.convert_to_numpy(gain.log_gain) != 0).all()


def test_gains_alone_are_trained_where_the_rest_is_frozen():
    model = make_task(PALI_GEMMA)
    model.backbone.trainable = False
    gains = attach_gain_modulation(model)
    assert [v.path for v in model.trainable_variables] == [
        gain.log_gain.path for gain in gains
    ]


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Checks torch's own parameters."
)
@PER_HEAD
def test_gains_are_parameters_of_the_module(per_head):
    def assert_parameters_are_the_variables(module):
        found = {id(parameter) for parameter in module.parameters()}
        assert found == {id(v.value) for v in module.variables}

    model = make_task(PALI_GEMMA)
    gains = attach_gain_modulation(model, per_head=per_head)
    block = model.backbone.transformer_layers[0]
    for module in (model, model.backbone, block, block.attention):
        assert_parameters_are_the_variables(module)
    ops.sum(model(make_inputs())).backward()
    assert all(gain.log_gain.value.grad is not None for gain in gains)
    model.zero_grad()
    assert all(gain.log_gain.value.grad is None for gain in gains)
    fold_gain_modulation(model)
    for module in (model, model.backbone, block, block.attention):
        assert_parameters_are_the_variables(module)


def generate(model, length=10, prompt=4):
    inputs = make_inputs(length)
    padding_mask = np.tile(np.arange(length) < prompt, (2, 1))
    return model.generate(
        {
            "images": inputs["images"],
            "token_ids": inputs["token_ids"] * padding_mask,
            "padding_mask": padding_mask,
        },
        stop_token_ids=None,
    )["token_ids"]


@pytest.mark.extra_large_but_on("torch")
@PER_HEAD
def test_cached_generation_uses_the_gains(per_head):
    model = make_task(PALI_GEMMA)
    model.compile(sampler="greedy", **support.NO_XLA)
    plain = generate(model)
    gains = attach_gain_modulation(model, per_head=per_head)
    np.testing.assert_array_equal(generate(model), plain)
    randomize(gains)
    tokens = generate(model)
    # The whole sequence, run without a cache, predicts the same tokens.
    inputs = dict(make_inputs(10), token_ids=tokens)
    logits = outputs_of(model, inputs)
    np.testing.assert_array_equal(
        logits[:, 3:-1].argmax(-1), tokens[:, 4:], str(plain)
    )
    fold_gain_modulation(model)
    np.testing.assert_array_equal(generate(model), tokens)


@pytest.mark.extra_large_but_on("torch")
@CONFIGS
@PER_HEAD
def test_keras_file_keeps_the_gains(tmp_path, config, per_head):
    model = make_task(config)
    randomize(attach_gain_modulation(model, [-1], per_head, max_gain=2.5))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs_of(loaded), outputs_of(model))
    assert type(loaded.backbone) is gain_modulated(PaliGemmaBackbone)
    assert loaded.get_config() == model.get_config()
    assert [gain.max_gain for gain in gain_layers(loaded)] == [2.5]
    fold_gain_modulation(loaded)
    np.testing.assert_allclose(outputs_of(loaded), outputs_of(model), atol=1e-5)


def test_copies_keep_the_gains():
    backbone = make_backbone(PALI_GEMMA, dtype="bfloat16")
    randomize(attach_gain_modulation(backbone))
    copied = copy.deepcopy(backbone)
    np.testing.assert_array_equal(outputs_of(copied), outputs_of(backbone))
    randomize(gain_layers(copied), seed=4)
    assert np.abs(outputs_of(copied) - outputs_of(backbone)).max() > 1e-3


@PER_HEAD
def test_weights_file_goes_to_a_model_with_the_same_gains(tmp_path, per_head):
    model = make_task(PALI_GEMMA)
    randomize(attach_gain_modulation(model, per_head=per_head))
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    fresh = make_task(PALI_GEMMA)
    attach_gain_modulation(fresh, per_head=per_head)
    fresh.load_weights(path)
    np.testing.assert_array_equal(outputs_of(fresh), outputs_of(model))
    randomize(gain_layers(model), seed=4)
    model.load_weights(path)
    np.testing.assert_array_equal(outputs_of(fresh), outputs_of(model))


def test_weights_with_gains_do_not_load_into_a_plain_model(tmp_path):
    model = make_task(PALI_GEMMA)
    attach_gain_modulation(model)
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    with pytest.raises(ValueError, match="could not be loaded"):
        make_task(PALI_GEMMA).load_weights(path)


@PER_HEAD
def test_presets_are_refused_until_folded_and_then_ordinary(tmp_path, per_head):
    model = make_task(PALI_GEMMA)
    randomize(attach_gain_modulation(model, per_head=per_head))
    gained = outputs_of(model)
    several = MultiImagePaliGemmaCausalLM.from_causal_lm(model)
    for part in (model, model.backbone, several):
        with pytest.raises(ValueError, match="must have no gains.*preset_dir="):
            part.save_to_preset(str(tmp_path))
        assert not list(tmp_path.iterdir())
    fold_gain_modulation(model if per_head else model.backbone)
    model.save_to_preset(str(tmp_path))
    for file in tmp_path.glob("*.json"):
        assert "keras_laid" not in file.read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["registered_name"] == "keras_hub>PaliGemmaBackbone"
    loaded = keras_hub.models.PaliGemmaCausalLM.from_preset(str(tmp_path))
    np.testing.assert_allclose(outputs_of(loaded), gained, atol=1e-5)


def test_attaching_again_after_folding():
    model = make_task(PALI_GEMMA)
    randomize(attach_gain_modulation(model))
    fold_gain_modulation(model)
    folded = outputs_of(model)
    attach_gain_modulation(model, per_head=True)
    np.testing.assert_array_equal(outputs_of(model), folded)


def test_shared_gains_fold_into_lora():
    model = make_task(PALI_GEMMA)
    model.backbone.enable_lora(2, target_layer_names=["query", "key"])
    for attention in support.attention_of(model):
        for dense in (attention.query_dense, attention.key_dense):
            shape = dense.lora_kernel_b.shape
            dense.lora_kernel_b.assign(np.random.normal(size=shape))
    gains = attach_gain_modulation(model)
    assert {gain.log_gain.path for gain in gains} <= {
        v.path for v in model.trainable_variables
    }
    randomize(gains)
    gained = outputs_of(model)
    fold_gain_modulation(model)
    np.testing.assert_allclose(outputs_of(model), gained, atol=1e-5)
    assert_plain(model.backbone)


def test_gains_of_each_head_do_not_fold_into_lora(tmp_path):
    model = make_task(PALI_GEMMA)
    model.backbone.enable_lora(2)
    query_dense = support.attention_of(model)[1].query_dense
    query_dense.lora_kernel_b.assign(np.random.normal(size=(2, 8)))
    randomize(attach_gain_modulation(model, per_head=True))
    gained, weights = outputs_of(model), weights_of(model)
    with pytest.raises(
        ValueError, match="LoRA's factors.*decoder layer 0, with lora_rank=2"
    ):
        fold_gain_modulation(model)
    for path, value in weights_of(model).items():
        np.testing.assert_array_equal(value, weights[path])
    assert len(gain_layers(model)) == 2
    # The remedy that the error message names.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    fold_gain_modulation(loaded)
    np.testing.assert_allclose(outputs_of(loaded), gained, atol=1e-5)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@PER_HEAD
def test_quantized_kernels_are_refused(tmp_path, per_head):
    model = make_task(PALI_GEMMA)
    support.quantize(model, "int8")
    randomize(attach_gain_modulation(model, per_head=per_head))
    gained = outputs_of(model)
    with pytest.raises(
        ValueError, match="not be quantized.*quantization_mode='int8'"
    ):
        fold_gain_modulation(model)
    np.testing.assert_array_equal(outputs_of(model), gained)
    # The remedy that the error message names.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(outputs_of(loaded), gained, atol=1e-5)


def test_model_with_sliding_windows_alone():
    model = make_task(dict(PALI_GEMMA_2, num_layers=1))
    with pytest.raises(ValueError, match="full attention.*without any"):
        attach_gain_modulation(model)


@PER_HEAD
def test_attaching_twice_is_refused(per_head):
    model = make_task(PALI_GEMMA_2)
    gains = attach_gain_modulation(model, [1], per_head)
    with pytest.raises(ValueError, match=r"no gains yet.*layers \[1\]"):
        attach_gain_modulation(model, [3])
    assert gain_layers(model) == gains


def test_folding_without_gains_is_refused():
    with pytest.raises(ValueError, match="gains to fold.*which has none"):
        fold_gain_modulation(make_backbone(PALI_GEMMA))


def test_other_models_are_refused():
    with pytest.raises(
        ValueError, match="family must be known.*Received: Sequential"
    ):
        attach_gain_modulation(keras.Sequential())

    class OwnBackbone(PaliGemmaBackbone):
        pass

    backbone = OwnBackbone(**PALI_GEMMA)
    with pytest.raises(ValueError, match="not of a subclass.*OwnBackbone"):
        attach_gain_modulation(backbone)
    assert gain_layers(backbone) == []
