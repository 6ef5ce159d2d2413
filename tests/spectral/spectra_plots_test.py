"""Pictures are drawn, also where nothing has been learned yet."""

import numpy as np

import keras_laid
from keras_laid import spectral
from tests.support import make_multi_image

NAMES = ("teacher", "before", "after KD", "after LAid")


def intervals(shape):
    values = np.random.default_rng(0).uniform(size=(5, *shape))
    return {name: spectral.mean_with_interval(values) for name in NAMES}


def check(path):
    assert path.read_bytes().startswith(b"\x89PNG")


def test_untrained_mixtures_and_gains(tmp_path):
    path = tmp_path / "picture.png"
    student = make_multi_image(vocabulary_size=60)
    keras_laid.attach_gain_modulation(student)
    gains = spectral.rotary_gains(student)
    assert gains.keys() == {0, 1}
    np.testing.assert_array_equal(gains[1], np.ones(4))
    spectral.plot_gains(path, spectral.rotary_wavelengths(student), gains)
    check(path)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher=make_multi_image(vocabulary_size=60, num_query_heads=4),
        student=student,
        layer_map=[(0, 0), (1, 1)],
    )
    mixtures = spectral.head_mixtures(distiller)
    assert mixtures.keys() == {(0, 0), (1, 1)}
    np.testing.assert_allclose(mixtures[1, 1], np.full((2, 4), 0.25))
    spectral.plot_head_mixtures(path, mixtures)
    check(path)


def test_gains_of_each_head_and_none(tmp_path):
    student = make_multi_image(vocabulary_size=60)
    assert spectral.rotary_gains(student) == {}
    keras_laid.attach_gain_modulation(student, layers=(-1,), per_head=True)
    gains = spectral.rotary_gains(student)
    assert gains[1].shape == (2, 4)
    path = tmp_path / "picture.png"
    spectral.plot_gains(path, spectral.rotary_wavelengths(student), gains)
    check(path)


def test_any_models_are_drawn(tmp_path):
    path = tmp_path / "picture.png"
    frequency = np.fft.rfftfreq(20)
    spectral.plot_spectra(path, frequency, intervals((11,)), "image", 0.1)
    check(path)
    spectral.plot_intervals(path, intervals(()), "share", (0.1, "white"))
    check(path)
    spectral.plot_frequency_shares(path, [6.0, 60.0, 600.0], intervals((3,)))
    check(path)
    spectral.plot_band_agreement(path, (0.0, 0.1, 0.5), intervals((2,)))
    check(path)
    by_size = {1: np.ones((2, 2)), 10: np.full((2, 2), 0.5)}
    kinds = np.array([["local", "global"]] * 2)
    spectral.plot_head_activations(
        path, dict.fromkeys(NAMES, by_size), dict.fromkeys(NAMES, kinds)
    )
    check(path)
    accuracy = dict.fromkeys(NAMES, {1: 0.9, 10: 0.8})
    spectral.plot_accuracy(path, accuracy, {"after KD": 4.0})
    check(path)
    spectral.plot_attention_mass(
        path, dict.fromkeys(NAMES, np.array([0.5, 0.5])), [0, 4, 8], 4
    )
    check(path)
