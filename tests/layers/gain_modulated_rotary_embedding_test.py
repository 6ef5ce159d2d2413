"""Properties of any rotary embedding with gains."""

import keras
import numpy as np
import pytest
from keras import ops
from keras_hub.layers import RotaryEmbedding

from keras_laid.layers import GainModulatedRotaryEmbedding
from tests.support import called_inside

DTYPES = ["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]
SCALINGS = [
    dict(),
    dict(max_wavelength=500, scaling_factor=3.0),
    dict(rope_type="dynamic", scaling_factor=2.0),
    dict(
        rope_type="yarn",
        scaling_factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=4.0,
        truncate=False,
    ),
    dict(denominator_dim=20),
]
AXES = [
    # shape, where the sequence and the features are
    dict(shape=(2, 7, 8)),
    dict(shape=(2, 7, 3, 8)),
    dict(shape=(2, 3, 7, 8), sequence_axis=2),
    dict(shape=(2, 3, 7, 8), sequence_axis=-2, feature_axis=3),
    dict(shape=(2, 7, 8, 3), feature_axis=2),
    dict(shape=(2, 8, 3, 7), sequence_axis=-1, feature_axis=1),
    dict(shape=(2, 7, 2, 3, 8)),
]


def normal(*shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return ops.convert_to_tensor(x.astype("float32"), dtype)


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def with_random_gains(layer, shape, seed=7):
    layer.build(shape)
    log_gain = np.random.default_rng(seed).normal(size=layer.log_gain.shape)
    layer.log_gain.assign(log_gain)
    return layer


def gradient(function, variable):
    """The gradient of `function()`, a scalar, for a Keras variable."""
    if keras.backend.backend() == "jax":
        import jax

        def evaluate(value):
            with keras.StatelessScope(state_mapping=[(variable, value)]):
                return function()

        return to_numpy(jax.grad(evaluate)(variable.value))
    if keras.backend.backend() == "torch":
        variable.value.grad = None
        function().backward()
        return to_numpy(variable.value.grad)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = function()
    return to_numpy(tape.gradient(value, variable.value))


def contributions(query, key, max_wavelength=10000.0):
    """Each frequency's part of the logits, in NumPy float64.

    Takes queries and keys of shape `(length, heads, features)`, and returns
    `(heads, queries, keys, frequencies)`. Shares no code with the library.
    """
    query, key = (np.asarray(x, "float64") for x in (query, key))
    length, _, features = query.shape
    half = features // 2
    frequency = max_wavelength ** (-np.arange(half) * 2 / features)
    turn = np.exp(1j * np.arange(length)[:, None] * frequency)[:, None]
    query = (query[..., :half] + 1j * query[..., half:]) * turn
    key = (key[..., :half] + 1j * key[..., half:]) * turn
    return np.einsum("qhf,khf->hqkf", query, key.conj()).real


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[3]])
def test_fresh_layer_is_rotary_embedding_exactly(dtype, num_heads, scaling):
    policy = keras.DTypePolicy(dtype)
    x = 10 * normal(2, 63, 3, 8, dtype=policy.compute_dtype)
    plain = RotaryEmbedding(dtype=dtype, **scaling)(x)
    layer = GainModulatedRotaryEmbedding(
        num_heads=num_heads, dtype=dtype, **scaling
    )
    gained = layer(x)
    assert gained.dtype == plain.dtype
    np.testing.assert_array_equal(to_numpy(gained), to_numpy(plain))
    np.testing.assert_array_equal(to_numpy(layer.gains()), 1.0)
    assert layer.log_gain.dtype == "float32"


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("axes", AXES)
def test_fresh_layer_matches_its_parent_for_all_arguments(scaling, axes):
    axes = dict(axes)
    x = normal(*axes.pop("shape"))
    positions = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
    plain = RotaryEmbedding(**scaling, **axes)
    gained = GainModulatedRotaryEmbedding(**scaling, **axes)
    for call in (
        dict(),
        dict(start_index=5),
        dict(start_index=ops.convert_to_tensor(5)),
        dict(positions=positions),
        dict(positions=positions[0]),
    ):
        np.testing.assert_array_equal(
            to_numpy(gained(x, **call)), to_numpy(plain(x, **call))
        )


@pytest.mark.parametrize("axes", AXES)
def test_gains_follow_the_axes(axes):
    axes = dict(axes)
    shape = axes.pop("shape")
    layer = with_random_gains(GainModulatedRotaryEmbedding(**axes), shape)
    x = normal(*shape)
    plain = to_numpy(RotaryEmbedding(**axes)(x))
    factors = np.sqrt(np.tile(to_numpy(layer.gains()), 2))
    rank = len(shape)
    feature_axis = axes.get("feature_axis", -1) % rank
    expected = plain * factors.reshape(
        [-1 if axis == feature_axis else 1 for axis in range(rank)]
    )
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        dict(shape=(2, 7, 3, 8), head_axis=2),
        dict(shape=(2, 3, 7, 8), head_axis=1, sequence_axis=2),
        dict(shape=(2, 7, 8, 3), head_axis=3, feature_axis=2),
        dict(shape=(2, 7, 5, 3, 8), head_axis=3),
    ],
)
def test_gains_of_each_head_follow_the_axes(axes):
    axes = dict(axes)
    shape, head_axis = axes.pop("shape"), axes.pop("head_axis")
    layer = with_random_gains(
        GainModulatedRotaryEmbedding(num_heads=3, **axes), shape
    )
    x = normal(*shape)
    whole = to_numpy(layer(x))
    plain = to_numpy(RotaryEmbedding(**axes)(x))
    gains = np.tile(to_numpy(layer.gains()), (1, 2))
    feature_axis = axes.get("feature_axis", -1)
    for head in range(3):
        np.testing.assert_allclose(
            np.moveaxis(whole, feature_axis, -1).take(
                head, head_axis if head_axis < feature_axis % 9 else -2
            ),
            np.moveaxis(plain, feature_axis, -1).take(
                head, head_axis if head_axis < feature_axis % 9 else -2
            )
            * gains[head],
            rtol=1e-5,
        )


def test_contribution_of_a_frequency_to_the_logits_is_multiplied_by_its_gain():
    query, key = normal(1, 9, 3, 8, seed=0), normal(1, 9, 3, 8, seed=1)
    layer = with_random_gains(GainModulatedRotaryEmbedding(), query.shape)
    logits = ops.einsum("bqhd,bkhd->bhqk", layer(query), layer(key))
    parts = contributions(to_numpy(query)[0], to_numpy(key)[0])
    expected = (parts * to_numpy(layer.gains()).astype("float64")).sum(-1)
    np.testing.assert_allclose(to_numpy(logits)[0], expected, atol=2e-5)
    assert np.abs(expected - parts.sum(-1)).max() > 0.5  # Gains matter.


def test_contribution_for_each_head_with_shared_keys():
    query, key = normal(1, 9, 4, 8, seed=0), normal(1, 9, 1, 8, seed=1)
    layer = with_random_gains(
        GainModulatedRotaryEmbedding(num_heads=4), query.shape
    )
    rotated_key = RotaryEmbedding()(key)
    logits = ops.einsum("bqhd,bkd->bhqk", layer(query), rotated_key[:, :, 0])
    parts = contributions(
        to_numpy(query)[0], np.repeat(to_numpy(key)[0], 4, axis=1)
    )
    gains = to_numpy(layer.gains()).astype("float64")
    assert gains.shape == (4, 4)
    expected = (parts * gains[:, None, None]).sum(-1)
    np.testing.assert_allclose(to_numpy(logits)[0], expected, atol=2e-5)


@pytest.mark.parametrize("applied_to", ["queries_and_keys", "queries"])
def test_gradient_of_a_log_gain_is_its_contribution(applied_to):
    # At the start the gain is 1 with slope 1: the gradient of a weighted sum of
    # logits is the weighted sum of the frequency's contributions.
    query, key = normal(1, 9, 3, 8, seed=0), normal(1, 9, 3, 8, seed=1)
    weights = np.random.default_rng(2).standard_normal((3, 9, 9))
    layer = GainModulatedRotaryEmbedding(applied_to=applied_to)
    layer.build(query.shape)
    key_layer = layer if applied_to != "queries" else RotaryEmbedding()

    def weighted_logits():
        logits = ops.einsum("bqhd,bkhd->bhqk", layer(query), key_layer(key))
        return ops.sum(logits[0] * ops.convert_to_tensor(weights, "float32"))

    parts = contributions(to_numpy(query)[0], to_numpy(key)[0])
    expected = (parts * weights[..., None]).sum((0, 1, 2))
    found = gradient(weighted_logits, layer.log_gain)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (np.abs(expected) > 0.1).all()


@pytest.mark.parametrize("max_gain", [1.5, 4.0])
def test_gains_are_bounded_and_smooth(max_gain):
    layer = GainModulatedRotaryEmbedding(max_gain=max_gain)
    layer.build((None, None, 8))
    log_gain = np.array([-1e4, -1e-3, 1e-3, 1e4])
    layer.log_gain.assign(log_gain)
    gains = to_numpy(layer.gains())
    np.testing.assert_allclose(gains[[0, 3]], [1 / max_gain, max_gain], 1e-6)
    np.testing.assert_allclose(gains[1:3], np.exp(log_gain[1:3]), 1e-6)


def test_a_gain_is_not_rounded_to_bfloat16():
    # The nearest to 1.0195 in bfloat16 are 1.0156 and 1.0234.
    layer = GainModulatedRotaryEmbedding(applied_to="queries", dtype="bfloat16")
    x = ops.abs(normal(1, 64, 16, 32, dtype="bfloat16"))
    layer.build(x.shape)
    layer.log_gain.assign(np.full(16, np.log(1.0195)))
    ratio = to_numpy(layer.modulate(x)).mean() / to_numpy(x).mean()
    assert abs(ratio - 1.0195) < 0.001


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_gains_are_float32_whatever_the_policy(dtype):
    layer = with_random_gains(
        GainModulatedRotaryEmbedding(dtype=dtype), (None, None, 8)
    )
    assert layer.log_gain.dtype == "float32"
    gains = called_inside(layer.gains, dtype)
    assert keras.backend.standardize_dtype(gains.dtype) == "float32"
    np.testing.assert_array_equal(to_numpy(gains), to_numpy(layer.gains()))


def test_decay_pulls_gains_to_one():
    layer = with_random_gains(GainModulatedRotaryEmbedding(), (None, None, 8))
    before = to_numpy(layer.gains())
    optimizer = keras.optimizers.SGD(0.5, weight_decay=1.0)
    optimizer.apply([ops.zeros((4,))], [layer.log_gain])
    after = to_numpy(layer.gains())
    assert (np.abs(np.log(after)) < np.abs(np.log(before))).all()


@pytest.mark.parametrize("num_heads", [None, 3])
def test_token_by_token_equals_the_whole(num_heads):
    x = normal(2, 7, 3, 8)
    layer = with_random_gains(
        GainModulatedRotaryEmbedding(num_heads=num_heads), x.shape
    )
    tokens = [layer(x[:, i : i + 1], start_index=i) for i in range(7)]
    np.testing.assert_allclose(
        to_numpy(ops.concatenate(tokens, axis=1)), to_numpy(layer(x)), atol=1e-6
    )


def test_logits_depend_on_distance_alone():
    query, key = normal(1, 1, 1, 8, seed=0), normal(1, 1, 1, 8, seed=1)
    layer = with_random_gains(GainModulatedRotaryEmbedding(), query.shape)

    def logit(query_position, key_position):
        turned_query = layer(query, positions=np.array([query_position]))
        turned_key = layer(key, positions=np.array([[key_position]]))
        return float(to_numpy(ops.sum(turned_query * turned_key)))

    assert abs(logit(5, 2) - logit(105, 102)) < 1e-4
    assert abs(logit(5, 2) - logit(5, 3)) > 1e-2


@pytest.mark.parametrize("num_heads", [None, 3])
def test_modulate_commutes_with_the_rotation(num_heads):
    x = normal(2, 7, 3, 8)
    layer = with_random_gains(
        GainModulatedRotaryEmbedding(num_heads=num_heads), x.shape
    )
    rotate = RotaryEmbedding()
    expected = to_numpy(layer(x))
    for found in (layer.modulate(rotate(x)), rotate(layer.modulate(x))):
        np.testing.assert_allclose(to_numpy(found), expected, atol=1e-6)


def test_part_of_the_features():
    x = normal(2, 7, 3, 20)
    layer = GainModulatedRotaryEmbedding(denominator_dim=20)
    plain = RotaryEmbedding(denominator_dim=20)
    np.testing.assert_array_equal(
        to_numpy(layer(x[..., :8])), to_numpy(plain(x[..., :8]))
    )
    assert layer.gains().shape == (4,)


@pytest.mark.parametrize("num_heads", [None, 3])
def test_config_and_file_round_trip(tmp_path, num_heads):
    layer = GainModulatedRotaryEmbedding(
        max_wavelength=500,
        scaling_factor=2.0,
        rope_type="yarn",
        beta_fast=16.0,
        beta_slow=2.0,
        original_max_position_embeddings=64,
        truncate=False,
        sequence_axis=1,
        feature_axis=-1,
        denominator_dim=8,
        num_heads=num_heads,
        max_gain=2.0,
        applied_to="queries",
        dtype="mixed_bfloat16",
    )
    again = GainModulatedRotaryEmbedding.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.dtype_policy == layer.dtype_policy

    inputs = keras.Input((None, 3, 8))
    model = keras.Model(inputs, layer(inputs))
    layer.log_gain.assign(np.ones(layer.log_gain.shape))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = normal(2, 7, 3, 8)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
    assert layer.compute_output_shape((2, 7, 3, 8)) == (2, 7, 3, 8)


def test_same_gains_whatever_the_default_of_applied_to():
    assert GainModulatedRotaryEmbedding().applied_to == "queries_and_keys"
    assert GainModulatedRotaryEmbedding(num_heads=2).applied_to == "queries"


@pytest.mark.parametrize(
    "arguments, shape, words",
    [
        (dict(), (2, 7, 3, 9), r"known and even.*\(2, 7, 3, 9\)"),
        (dict(), (2, 7, 3, None), "known and even"),
        (dict(feature_axis=2), (2, 7, 3, 8), "feature_axis=2"),
        (dict(num_heads=4), (2, 7, 3, 8), "axis of `num_heads`.*num_heads=4"),
        (dict(num_heads=3), (2, 3, 8), "axis of `num_heads`"),
        (dict(num_heads=3, sequence_axis=2), (2, 7, 3, 8), "axis of `num_head"),
    ],
)
def test_shapes_refused(arguments, shape, words):
    layer = GainModulatedRotaryEmbedding(**arguments)
    with pytest.raises(ValueError, match=words):
        layer.build(shape)


def test_other_inputs_than_it_was_built_for():
    layer = GainModulatedRotaryEmbedding(num_heads=3)
    layer.build((None, None, 3, 8))
    with pytest.raises(ValueError, match="expected axis"):
        layer(normal(2, 7, 1, 8))
    with pytest.raises(ValueError, match="expected axis"):
        layer(normal(2, 7, 3, 2))
