"""Configs keep every argument, and loading one never runs code."""

import inspect
import json
import pathlib

import keras
import keras_hub
import numpy as np
import pytest

import keras_laid
from keras_laid import DistanceWeighting
from keras_laid import GainModulatedRotaryEmbedding
from keras_laid import HeadMixer
from keras_laid import MultiImagePaliGemmaCausalLM
from keras_laid import PositionStretching
from keras_laid import attach_gain_modulation
from tests.support import make_multi_image
from tests.support import make_pali_gemma
from tests.support import make_preprocessor
from tests.support import to_numpy

OBJECTS = [
    DistanceWeighting(
        strength=2.0, exponent=0.5, schedule="cosine", steps=np.int64(7)
    ),
    PositionStretching(max_images=np.int64(9), image_length=4),
    HeadMixer(2, 4, sharpness=np.float32(1.5), trainable=False),
    GainModulatedRotaryEmbedding(max_gain=np.float32(2.5), num_heads=2),
]


@pytest.mark.parametrize("each", OBJECTS, ids=lambda each: type(each).__name__)
def test_json_keeps_every_argument(each):
    text = json.dumps(keras.saving.serialize_keras_object(each))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(each)
    assert again.get_config() == each.get_config()
    arguments = inspect.signature(type(each)).parameters.keys() - {"kwargs"}
    assert arguments <= each.get_config().keys()


def test_optimizer_of_groups():
    optimizer = keras_laid.group_optimizer(
        keras.optimizers.SGD(0.1, momentum=0.9),
        mixer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.5, 10)
        ),
        gains=keras.optimizers.SGD(0.01, weight_decay=0.2),
    )
    text = json.dumps(keras.optimizers.serialize(optimizer))
    again = keras.optimizers.deserialize(json.loads(text))
    assert json.dumps(keras.optimizers.serialize(again)) == text


def test_presets_of_one_image_and_of_several(tmp_path):
    plain = make_pali_gemma(None, make_preprocessor())
    several = MultiImagePaliGemmaCausalLM.from_causal_lm(plain)
    x = {
        "images": np.ones((1, 2, 16, 16, 3), "float32"),
        "token_ids": np.arange(4, 9)[None],
        "padding_mask": np.ones((1, 5), "int32"),
        "response_mask": np.zeros((1, 5), "int32"),
    }
    for model in (plain, several):
        folder = str(tmp_path / type(model).__name__)
        model.save_to_preset(folder)
        files = list(pathlib.Path(folder).glob("*.json"))
        assert len(files) == 6
        for file in files:
            assert "keras_laid" not in file.read_text()
        loaded = keras_hub.models.CausalLM.from_preset(folder)
        assert type(loaded) is keras_hub.models.PaliGemmaCausalLM
        loaded = MultiImagePaliGemmaCausalLM.from_preset(folder)
        assert type(loaded) is MultiImagePaliGemmaCausalLM
        np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(several(x)))
        converter = loaded.preprocessor.image_converter
        assert converter.scale == several.preprocessor.image_converter.scale


def test_plain_presets_are_not_taken_over():
    # KerasHub may load a preset with any class that names its backbone.
    assert {
        kind.__module__.split(".")[0]
        for kind in keras.saving.get_custom_objects().values()
        if getattr(kind, "backbone_cls", None)
        is keras_hub.models.PaliGemmaBackbone
    } == {"keras_hub"}


@pytest.fixture
def code(tmp_path):
    """A layer that writes a file when it is called, and that file's path."""
    layer = keras.layers.Lambda(
        lambda x, path: x if open(path, "w").close() is None else x,
        arguments=dict(path=str(tmp_path / "ran")),
    )
    return layer, tmp_path / "ran"


def test_a_file_with_code_is_refused(tmp_path, code):
    layer, ran = code
    model = keras.Sequential([keras.Input((4, 4, 3)), layer, HeadMixer(2, 4)])
    model.save(tmp_path / "model.keras")
    ran.unlink()
    with pytest.raises(ValueError, match="arbitrary code"):
        keras.saving.load_model(tmp_path / "model.keras")
    assert not ran.exists()
    keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert ran.exists()  # It runs if allowed.


def test_code_in_a_config_is_refused(code):
    layer, ran = code
    function = layer.get_config()["function"]
    serialized = keras.saving.serialize_keras_object(layer)
    student = make_multi_image()
    attach_gain_modulation(student)
    for each, name, value, words in (
        (HeadMixer(2, 4), "initializer", function, "interpret initializer"),
        (HeadMixer(2, 4), "initializer", serialized, "interpret initializer"),
        (student.backbone, "dtype", serialized, "Cannot convert 'Lambda'"),
        (student, "backbone", serialized, "arbitrary code"),
    ):
        config = each.get_config() | {name: value}
        with pytest.raises((TypeError, ValueError), match=words):
            type(each).from_config(config)
    assert not ran.exists()


def test_a_preset_with_code_is_refused(tmp_path, code):
    layer, ran = code
    folder = tmp_path / "preset"
    make_multi_image(None, make_preprocessor()).save_to_preset(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["config"]["dtype"] = layer.get_config()["function"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((TypeError, ValueError), match="__lambda__"):
        MultiImagePaliGemmaCausalLM.from_preset(str(folder))
    assert not ran.exists()
