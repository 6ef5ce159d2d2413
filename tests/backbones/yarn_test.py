"""YaRN on PaliGemma 1 and 2, against the paper's equations."""

import keras
import numpy as np
import pytest
from keras_hub.layers import RotaryEmbedding

from keras_laid import attach_gain_modulation
from keras_laid import rotary_positions
from keras_laid import yarn
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from tests.backbones import extension_support as support
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import to_numpy

CONFIGS = pytest.mark.parametrize(
    "config", support.CONFIGS, ids=["pali_gemma", "pali_gemma_2"]
)
# With these, frequencies of 8 features are kept, mixed and divided.
PAPER = dict(factor=6.0, original_length=40, beta_fast=4.0, beta_slow=0.3)
SETTINGS = dict(PAPER, ramp="turns")


def paper_frequencies(
    features, factor, original_length, beta_fast=32.0, beta_slow=1.0
):
    """Frequencies one by one, as in section 3.2 of the paper."""
    found = []
    for d in range(features // 2):
        theta = 10000 ** (-2 * d / features)
        wavelength = 2 * np.pi / theta
        ratio = original_length / wavelength
        if ratio < beta_slow:
            gamma = 0.0
        elif ratio > beta_fast:
            gamma = 1.0
        else:
            gamma = (ratio - beta_slow) / (beta_fast - beta_slow)
        found.append((1 - gamma) * theta / factor + gamma * theta)
    return np.array(found)


@pytest.mark.parametrize(
    "settings",
    [
        dict(factor=30.0, original_length=36),
        dict(factor=4.0, original_length=4096),
        dict(factor=2.5, original_length=8192, beta_fast=20.0, beta_slow=2.0),
    ],
)
def test_frequencies_are_the_papers_or_kerashubs(settings):
    model = make_multi_image(head_dim=32)
    rope = attention_of(model)[0].rope_layer
    with yarn(model, ramp="turns", **settings):
        turns = to_numpy(rope._get_inverse_freq(32))
    with yarn(model, **settings):
        index = to_numpy(rope._get_inverse_freq(32))
    np.testing.assert_allclose(
        turns, paper_frequencies(32, **settings), rtol=1e-5
    )
    settings = dict(
        settings,
        scaling_factor=settings["factor"],
        original_max_position_embeddings=settings["original_length"],
    )
    del settings["factor"], settings["original_length"]
    kerashub = RotaryEmbedding(rope_type="yarn", **settings)
    np.testing.assert_allclose(
        index, to_numpy(kerashub._get_inverse_freq(32)), rtol=1e-5
    )
    assert np.abs(index / turns - 1).max() > 1e-2


def test_rotation_and_temperature_are_kerashubs():
    model = make_multi_image(head_dim=32)
    rope = attention_of(model)[0].rope_layer
    x = np.random.default_rng(0).normal(size=(2, 40, 3, 32)).astype("float32")
    kerashub = RotaryEmbedding(
        rope_type="yarn",
        scaling_factor=30.0,
        original_max_position_embeddings=36,
    )
    with yarn(model, factor=30.0, original_length=36):
        found = to_numpy(rope(x))
    np.testing.assert_allclose(found, to_numpy(kerashub(x)), atol=1e-5)


@CONFIGS
@pytest.mark.parametrize(
    "given, gains", [(0, 0), (1, 1)], ids=["plain", "positions_and_gains"]
)
def test_attention_is_the_definition(config, given, gains):
    model = support.make_model(config)
    gain = np.ones(4)
    if gains:
        for layer in attach_gain_modulation(model):
            layer.log_gain.assign([0.5, -0.5, 0.2, 0.9])
        gain = to_numpy(layer.gains()).astype("float64")
    index = decoder.global_layers(model)[-1]
    layer = attention_of(model)[index]
    x, mask = support.random_layer_inputs(layer)
    positions = support.random_positions() if given else np.arange(21)[None]
    with rotary_positions(model, positions if given else None):
        plain = to_numpy(layer(x, attention_mask=mask))
        with yarn(model, **SETTINGS):
            found = to_numpy(layer(x, attention_mask=mask))
    expected = support.oracle(
        layer,
        x,
        mask,
        positions[:, :, None] - positions[:, None, :],
        paper_frequencies(8, **PAPER),
        scale=(0.1 * np.log(6.0) + 1) ** 2,
        gain=gain,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - plain).max() > 1e-2


@CONFIGS
def test_factor_of_one_changes_no_bit(config):
    model, inputs = support.make_model(config), support.make_inputs()
    before = support.logits_of(model, inputs)
    for ramp in ("index", "turns"):
        with yarn(model, factor=1, original_length=36, ramp=ramp):
            found = support.logits_of(model, inputs)
        np.testing.assert_array_equal(found, before)


def test_sliding_windows_are_left_alone():
    model = make_multi_image(PALI_GEMMA_2)
    with yarn(model, **SETTINGS):
        changed = [
            "_get_inverse_freq" in vars(layer.rope_layer)
            for layer in attention_of(model)
        ]
    assert changed == [
        not layer.use_sliding_window_attention for layer in attention_of(model)
    ]
    assert len(set(changed)) == 2


def test_captured_queries_are_interpolated():
    model, inputs = support.make_model(), support.make_inputs()
    with captured_attention(model, [0]) as plain:
        support.logits_of(model, inputs)
    with yarn(model, **SETTINGS), captured_attention(model, [0]) as captured:
        support.logits_of(model, inputs)
    found, before = (to_numpy(c[0].query) for c in (captured, plain))
    # At position 0, only the temperature changes the query.
    np.testing.assert_allclose(
        found[:, 0], before[:, 0] * (0.1 * np.log(6.0) + 1), atol=1e-5
    )
    assert np.abs(found[:, 9] - before[:, 9]).max() > 1e-1


def test_other_models_and_scaled_ones_are_refused():
    with pytest.raises(ValueError, match="Received: Dense"):
        with yarn(keras.layers.Dense(1), **SETTINGS):
            pass
    model = make_pali_gemma(PALI_GEMMA_2, num_layers=1)
    with pytest.raises(ValueError, match="without a sliding window"):
        with yarn(model, **SETTINGS):
            pass
    model = make_pali_gemma()
    with pytest.raises(ValueError, match="cannot be nested"):
        with yarn(model, **SETTINGS), yarn(model, **SETTINGS):
            pass
    attention_of(model)[1].rope_layer.scaling_factor = 8.0
    with pytest.raises(ValueError, match=r"unscaled.*scaling_factor=8\.0"):
        with yarn(model, **SETTINGS):
            pass
