"""SelfExtend on PaliGemma 1 and 2, against the paper's positions."""

import contextlib

import keras
import numpy as np
import pytest

from keras_laid import attach_gain_modulation
from keras_laid import rotary_positions
from keras_laid import self_extend
from keras_laid import yarn
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from tests.backbones import extension_support as support
from tests.backbones.yarn_test import PAPER
from tests.backbones.yarn_test import SETTINGS as YARN
from tests.backbones.yarn_test import paper_frequencies
from tests.support import PALI_GEMMA_2
from tests.support import attention_of
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import to_numpy

CONFIGS = pytest.mark.parametrize(
    "config", support.CONFIGS, ids=["pali_gemma", "pali_gemma_2"]
)
# The group size does not divide the window.
SETTINGS = dict(group_size=3, neighbor_window=5)
FREQUENCY = 10000 ** (-np.arange(0, 8, 2) / 8)


def paper_distances(positions, group_size, neighbor_window):
    """Distances by algorithm 1 of the paper, for positions `(length,)`.

    A key after the query is at the mirrored pair's distance, negated.
    """

    def causal(i, j):
        if i - j < neighbor_window:
            return i - j
        query_at = i // group_size + neighbor_window
        query_at -= neighbor_window // group_size
        return query_at - j // group_size

    return np.array(
        [
            [causal(i, j) if i >= j else -causal(j, i) for j in positions]
            for i in positions
        ]
    )


@CONFIGS
@pytest.mark.parametrize(
    "given, gains, yarned",
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)],
    ids=["plain", "positions", "gains", "all_and_yarn"],
)
def test_attention_is_the_definition(config, given, gains, yarned):
    model = support.make_model(config)
    gain, frequency, scale = np.ones(4), FREQUENCY, 1.0
    if gains:
        for layer in attach_gain_modulation(model):
            layer.log_gain.assign([0.5, -0.5, 0.2, 0.9])
        gain = to_numpy(layer.gains()).astype("float64")
    index = decoder.global_layers(model)[-1]
    layer = attention_of(model)[index]
    x, mask = support.random_layer_inputs(layer)
    positions = support.random_positions() if given else np.arange(21)[None]
    with contextlib.ExitStack() as stack:
        if yarned:
            stack.enter_context(yarn(model, **YARN))
            frequency = paper_frequencies(8, **PAPER)
            scale = (0.1 * np.log(YARN["factor"]) + 1) ** 2
        stack.enter_context(
            rotary_positions(model, positions if given else None)
        )
        plain = to_numpy(layer(x, attention_mask=mask))
        with self_extend(model, **SETTINGS):
            found = to_numpy(layer(x, attention_mask=mask))
    expected = support.oracle(
        layer,
        x,
        mask,
        np.stack([paper_distances(row, **SETTINGS) for row in positions]),
        frequency,
        scale=scale,
        gain=gain,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - plain).max() > 1e-2


@CONFIGS
def test_groups_of_one_token_change_nothing(config):
    model, inputs = support.make_model(config), support.make_inputs()
    before = support.logits_of(model, inputs)
    with self_extend(model, group_size=1, neighbor_window=4):
        found = support.logits_of(model, inputs)
    np.testing.assert_allclose(found, before, atol=1e-6)


def test_a_window_as_long_as_the_prompt_changes_nothing():
    model, inputs = support.make_model(), support.make_inputs()
    before = support.logits_of(model, inputs)
    with self_extend(model, group_size=4, neighbor_window=21):
        found = support.logits_of(model, inputs)
    np.testing.assert_allclose(found, before, atol=1e-6)
    with self_extend(model, group_size=4, neighbor_window=18):
        found = support.logits_of(model, inputs)
    assert np.abs(found - before).max() > 1e-4


def test_sliding_windows_are_left_alone():
    model = make_multi_image(PALI_GEMMA_2)
    layers = attention_of(model)
    with self_extend(model, **SETTINGS):
        changed = ["_compute_attention" in vars(layer) for layer in layers]
    assert changed == [
        not layer.use_sliding_window_attention for layer in layers
    ]
    assert len(set(changed)) == 2


def test_half_precision_is_close():
    inputs = support.make_inputs()
    found = []
    for dtype in ("float32", "bfloat16"):
        model = make_multi_image(dtype=dtype)
        with self_extend(model, **SETTINGS):
            found.append(support.logits_of(model, inputs))
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(found[1], found[0], atol=0.05 * scale)


def test_other_models_and_scopes_are_refused():
    with pytest.raises(ValueError, match="Received: Dense"):
        with self_extend(keras.layers.Dense(1), **SETTINGS):
            pass
    model = make_pali_gemma(PALI_GEMMA_2, num_layers=1)
    with pytest.raises(ValueError, match="without a sliding window"):
        with self_extend(model, **SETTINGS):
            pass
    model = make_pali_gemma()
    with pytest.raises(ValueError, match="cannot be nested"):
        with self_extend(model, **SETTINGS), self_extend(model, **SETTINGS):
            pass
    with pytest.raises(ValueError, match="being captured"):
        with captured_attention(model, [0]), self_extend(model, **SETTINGS):
            pass
    with pytest.raises(ValueError, match="cannot be captured inside"):
        with self_extend(model, **SETTINGS), captured_attention(model, [0]):
            pass


def test_positions_of_a_part_of_the_cache_are_refused():
    model, inputs = support.make_model(), support.make_inputs()
    with self_extend(model, **SETTINGS), rotary_positions(model, np.arange(4)):
        with pytest.raises(ValueError, match="all its tokens.*4 tokens"):
            model.call_with_cache(
                inputs["token_ids"][:, :4], np.zeros((2, 2, 2, 9, 1, 8)), 0
            )
