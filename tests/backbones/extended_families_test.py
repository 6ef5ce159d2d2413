"""YaRN and SelfExtend on families other than PaliGemma."""

import numpy as np
import pytest
from keras import ops
from keras_hub.layers import RotaryEmbedding

from keras_laid import rotary_positions
from keras_laid import self_extend
from keras_laid import yarn
from keras_laid.backbones.decoder import plainly_rotated
from keras_laid.backbones.self_extend import SelfExtendedAttention
from tests.backbones import small_models
from tests.support import to_numpy

PLAIN = (
    small_models.llama,
    small_models.gemma_2,
    small_models.gemma_3,
    small_models.mistral,
    small_models.qwen_3,
)
PARTIAL = (small_models.phi_3, small_models.gemma_4, small_models.qwen_3_5)
LENGTH = 8
GROUP, WINDOW = 2, 3


def families(chosen):
    only_torch = pytest.mark.extra_large_but_on("torch")
    first, *others = chosen
    return pytest.mark.parametrize(
        "family",
        [first, *(pytest.param(each, marks=only_torch) for each in others)],
        ids=small_models.name_of,
    )


@families(PLAIN)
def test_yarn_is_kerashubs(family):
    model = small_models.make_model(family)
    layer = plainly_rotated(model)[0]
    shape = (2, 40, 3, layer.head_dim)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    kerashub = RotaryEmbedding(
        max_wavelength=layer.wavelength,
        rope_type="yarn",
        scaling_factor=30.0,
        original_max_position_embeddings=36,
    )
    with yarn(model, factor=30.0, original_length=36):
        found = to_numpy(layer.rotary(x))
    np.testing.assert_allclose(found, to_numpy(kerashub(x)), atol=1e-5)
    assert np.abs(found - to_numpy(layer.rotary(x))).max() > 1e-2


def rotated(model, layer, x, places):
    """Queries or keys, rotated to given positions as the layer does it."""
    rotate = layer.layer._apply_rope if layer.interleaved else layer.rotary
    with rotary_positions(model, np.array(places, "int32")):
        return rotate(ops.convert_to_tensor(x), start_index=0)


@families(PLAIN)
def test_self_extend_attends_at_grouped_positions(family):
    model = small_models.make_model(family)
    layer = plainly_rotated(model)[0]
    rng = np.random.default_rng(0)
    query, key = (
        rng.normal(size=(2, LENGTH, heads, layer.head_dim)).astype("float32")
        for heads in (layer.num_query_heads, layer.num_key_value_heads)
    )
    at = np.arange(LENGTH)
    shifted = at // GROUP + WINDOW - WINDOW // GROUP
    near, far = (
        products(*(rotated(model, layer, *each) for each in pair))
        for pair in (
            ((query, at), (key, at)),
            ((query, shifted), (key, at // GROUP)),
        )
    )
    logits = np.where((at[:, None] - at) < WINDOW, near, far)
    logits *= layer.scale
    if layer.soft_cap is not None:
        logits = layer.soft_cap * np.tanh(logits / layer.soft_cap)
    mask = at[:, None] >= at
    weights = np.where(mask, np.exp(logits), 0)
    expected = weights / weights.sum(-1, keepdims=True)

    extended = SelfExtendedAttention(layer, GROUP, WINDOW)
    extended.rotated_at = [(0, None)]
    heads = layer.num_key_value_heads
    value = np.tile(np.eye(LENGTH, dtype="float32")[:, None], (2, 1, heads, 1))
    # Each output row is the map itself.
    maps = extended(
        rotated(model, layer, query, at),
        rotated(model, layer, key, at),
        ops.convert_to_tensor(value),
        np.tile(mask, (2, 1, 1)),
    )
    maps = to_numpy(maps).swapaxes(1, 2)
    np.testing.assert_allclose(maps, expected, atol=1e-5)


def products(query, key):
    query, key = to_numpy(query), to_numpy(key)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return np.einsum("btnh,bsnh->bnts", query, key).astype("float64")


@families(PLAIN)
def test_groups_of_one_token_change_nothing(family):
    model = small_models.make_model(family)
    inputs = small_models.make_inputs(model)
    inputs = {n: v for n, v in inputs.items() if n in model.backbone.input}
    before = to_numpy(model(inputs))
    with self_extend(model, group_size=1, neighbor_window=4):
        found = to_numpy(model(inputs))
    # Padding attends what it likes.
    valid = ops.convert_to_numpy(inputs["padding_mask"]) > 0
    np.testing.assert_allclose(found[valid], before[valid], atol=1e-5)


@families(PARTIAL)
@pytest.mark.parametrize("name", ["yarn", "self_extend"])
def test_a_part_of_the_features_is_refused(family, name):
    model = small_models.make_model(family)
    scope = {
        "yarn": lambda: yarn(model, factor=2.0, original_length=16),
        "self_extend": lambda: self_extend(model, 2, neighbor_window=8),
    }[name]
    with pytest.raises(ValueError, match="must rotate all features"):
        with scope():
            pass
