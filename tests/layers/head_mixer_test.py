"""Properties of any mixture of heads."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid.layers import HeadMixer
from tests.support import called_inside


def normal(*shape, dtype="float32", seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return ops.convert_to_tensor(x.astype("float32"), dtype)


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_starts_as_the_mean_of_all_heads():
    mixer = HeadMixer(student_heads=2, teacher_heads=5)
    np.testing.assert_allclose(to_numpy(mixer.mixture()), np.full((2, 5), 0.2))
    x = normal(3, 7, 5, 4)
    mean = to_numpy(x).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(
        to_numpy(mixer(x)), np.repeat(mean, 2, axis=2), atol=1e-6
    )


def test_is_built_from_the_start():
    # A distiller never calls the layer. It only reads its mixture.
    assert HeadMixer(student_heads=2, teacher_heads=5).count_params() == 10


def test_mixes_as_its_definition():
    mixer = HeadMixer(student_heads=3, teacher_heads=5)
    logits = np.random.default_rng(1).standard_normal((3, 5))
    mixer.mixing_logits.assign(logits)
    x = normal(2, 7, 5, 4)
    expected = np.einsum("st,bltd->blsd", softmax(logits), to_numpy(x))
    np.testing.assert_allclose(to_numpy(mixer(x)), expected, atol=1e-5)
    assert mixer.compute_output_shape((2, 7, 5, 4)) == (2, 7, 3, 4)


@pytest.mark.parametrize(
    "student_heads, teacher_heads, preferred",
    [
        (2, 4, [[0, 1], [2, 3]]),
        (4, 2, [[0], [0], [1], [1]]),
        (3, 3, [[0], [1], [2]]),
        (2, 3, [[0, 1], [1, 2]]),
        (1, 3, [[0, 1, 2]]),
    ],
)
def test_sharpness_prefers_the_heads_a_head_stands_for(
    student_heads, teacher_heads, preferred
):
    mixer = HeadMixer(student_heads, teacher_heads, sharpness=3.0)
    logits = np.zeros((student_heads, teacher_heads))
    for student, teachers in enumerate(preferred):
        logits[student, teachers] = 3.0
    np.testing.assert_allclose(
        to_numpy(mixer.mixture()), softmax(logits), rtol=1e-5
    )


def test_initializer_and_sharpness_add_up():
    mixer = HeadMixer(
        2, 4, initializer=keras.initializers.Constant(1.0), sharpness=2.0
    )
    np.testing.assert_allclose(
        to_numpy(mixer.mixing_logits), [[3, 3, 1, 1], [1, 1, 3, 3]]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_float16"])
def test_mixture_is_float32_whatever_the_policy(dtype):
    mixer = HeadMixer(2, 4, sharpness=1.0, dtype=dtype)
    assert mixer.mixing_logits.dtype == "float32"
    mixture = called_inside(mixer.mixture, dtype)
    assert keras.backend.standardize_dtype(mixture.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(mixture).sum(-1), 1.0, atol=1e-6)
    mixed = mixer(normal(1, 3, 4, 2))
    assert keras.backend.standardize_dtype(mixed.dtype) == mixer.compute_dtype


@pytest.mark.parametrize("trainable", [True, False])
def test_learns_which_head_to_take_unless_frozen(trainable):
    x = normal(64, 1, 4, 3)
    model = keras.Sequential([HeadMixer(2, 4, trainable=trainable)])
    model.compile(keras.optimizers.Adam(0.1), loss="mean_squared_error")
    target = to_numpy(x)[:, :, [3, 1]]
    model.fit(to_numpy(x), target, batch_size=64, epochs=60, verbose=0)
    mixture = to_numpy(model.layers[0].mixture())
    if trainable:
        assert mixture[0, 3] > 0.8
        assert mixture[1, 1] > 0.8
    else:
        np.testing.assert_allclose(mixture, 0.25)


def test_config_and_file_round_trip(tmp_path):
    mixer = HeadMixer(
        2, 4, initializer="random_normal", sharpness=1.5, dtype="bfloat16"
    )
    again = HeadMixer.from_config(mixer.get_config())
    assert again.get_config() == mixer.get_config()
    model = keras.Sequential([keras.Input((None, 4, 3)), mixer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        to_numpy(loaded.layers[0].mixture()), to_numpy(mixer.mixture())
    )


def test_other_numbers_of_heads_are_refused():
    mixer = HeadMixer(2, 4)
    with pytest.raises(ValueError, match="expected axis 2"):
        mixer(normal(1, 3, 5, 2))
    with pytest.raises(ValueError, match="ndim=4"):
        mixer(normal(3, 4, 2))
