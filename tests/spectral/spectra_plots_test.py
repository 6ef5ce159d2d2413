"""Plots are drawn, also before anything has been learned."""

import matplotlib.pyplot as plt
import numpy as np

import keras_laid
from keras_laid import haystacks
from keras_laid import plotting
from keras_laid import spectral
from keras_laid.backbones.head_statistics import HeadStatistics
from keras_laid.backbones.retrieval_heads import RetrievalHeads
from keras_laid.distillation import AttentionMatching
from keras_laid.spectral import retrieval_plots
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
        terms=[AttentionMatching(layer_map=[(0, 0), (1, 1)])],
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
    haystacks.plot_accuracy(path, accuracy, {"after KD": 4.0})
    check(path)
    spectral.plot_attention_mass(
        path, dict.fromkeys(NAMES, np.array([0.5, 0.5])), [0, 4, 8], 4
    )
    check(path)


def retrieval_heads(layers, heads):
    values = np.random.default_rng(0).uniform(-0.1, 1, size=(layers, heads))
    values[1] = np.nan  # A layer with a sliding window.
    statistics = HeadStatistics(values, values, values, values)
    by_rows = {"text": statistics, "image": statistics}
    return RetrievalHeads(((0, 1), (2, 0)), values, 0.5, by_rows)


def test_retrieval_heads_of_small_and_large_models(tmp_path):
    path = tmp_path / "picture.png"
    found = {"teacher": retrieval_heads(30, 9), "before": retrieval_heads(4, 2)}
    spectral.plot_retrieval_heads(path, found)
    check(path)
    for value in ("score", "mass", "sharpness", "selectivity"):
        small = {"before": found["before"]}
        spectral.plot_retrieval_heads(path, small, "image", value)
        check(path)
    long = {"a student that has seen single images": retrieval_heads(4, 2)}
    spectral.plot_retrieval_heads(path, long)
    check(path)


def test_cells_of_retrieval_heads(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        retrieval_plots, "finish", lambda figure, path: drawn.append(figure)
    )
    found = {"teacher": retrieval_heads(4, 3), "after": retrieval_heads(3, 2)}
    spectral.plot_retrieval_heads(tmp_path / "picture.png", found)
    (figure,) = drawn
    teacher, after, _ = figure.axes
    for axes, (name, heads) in zip(
        (teacher, after), found.items(), strict=True
    ):
        (image,) = axes.images
        np.testing.assert_array_equal(
            image.get_array().filled(np.nan), heads.score
        )
        assert image.get_clim() == (0, 1)
        assert axes.get_title(loc="left") == plotting.label_of(name)
        texts = [float(text.get_text()) for text in axes.texts]
        known = heads.score[np.isfinite(heads.score)]
        np.testing.assert_allclose(texts, known, atol=0.00501)
        centers = [patch.get_center() for patch in axes.patches]
        np.testing.assert_allclose(centers, [(1, 0), (0, 2)])
    # All cells have the same size.
    sizes = [axes.get_position().bounds[2:] for axes in (teacher, after)]
    np.testing.assert_allclose(np.divide(*sizes), [3 / 2, 4 / 3], rtol=1e-6)
    plt.close(figure)
