"""Checks dependencies and embedded presets of an installed keras_laid."""

import importlib.util
import pathlib

import keras_hub

import keras_laid
from keras_laid import spectral

place = pathlib.Path(keras_laid.__file__)
assert "site-packages" in place.parts, place
assert spectral.plot_spectra
assert keras_laid.haystacks.plot_accuracy
if importlib.util.find_spec("tensorflow_datasets"):  # An optional extra.
    import tensorflow_datasets

    name = "visual_haystacks/digits"
    assert tensorflow_datasets.builder(name).info.features
digits = keras_laid.Digits("test")
haystacks = list(keras_laid.draw_haystacks(digits, 64, (1, 2)))
for preset in (keras_laid.presets.TEACHER, keras_laid.presets.STUDENT):
    model = keras_hub.models.PaliGemmaCausalLM.from_preset(preset)
    results = keras_laid.evaluate_haystacks(model, haystacks)
    assert min(results.accuracy.values()) > 0.8, results.accuracy
