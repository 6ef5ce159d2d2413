"""Files of released versions, written on each backend, are read on this one."""

import shutil
import sys

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid.backbones.gain_modulation import gain_layers
from tests.saving import make_fixtures
from tests.saving.make_fixtures import Batches
from tests.support import to_numpy

ARCHIVES = sorted(make_fixtures.FOLDER.glob("*/*.zip"))
# Sums of up to some hundred products of size 1, in another order.
FLOAT32 = dict(rtol=1e-5, atol=200 * np.finfo("float32").eps)


@pytest.fixture(
    scope="module", params=ARCHIVES, ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def folder(request, tmp_path_factory):
    """A folder that `make_fixtures` has written."""
    folder = tmp_path_factory.mktemp("fixtures")
    shutil.unpack_archive(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def arrays(folder):
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        return dict(file)


def test_there_is_one_of_each_backend_and_all_are_small():
    backends = {path.stem for path in ARCHIVES}
    assert backends == {"jax", "tensorflow", "torch"}
    assert sum(path.stat().st_size for path in ARCHIVES) < 2**20


def test_layers(folder, arrays):
    model = keras.saving.load_model(folder / "layers.keras")
    expected = make_fixtures.make_layers()
    for layer, other in zip(model.layers, expected.layers, strict=True):
        config = dict(other.get_config(), name=layer.name)
        assert layer.get_config() == config
    found = to_numpy(model(arrays["features"]))
    np.testing.assert_allclose(found, arrays["layers"], **FLOAT32)


@pytest.fixture(scope="module")
def student(folder):
    return keras.saving.load_model(folder / "student.keras")


def test_model_with_gains(student, arrays):
    assert isinstance(student, keras_laid.MultiImagePaliGemmaCausalLM)
    (gain,) = gain_layers(student)
    assert (gain.num_heads, gain.max_gain) == (2, 2.0)
    found = to_numpy(student(Batches(arrays)[0][0]))
    np.testing.assert_allclose(found, arrays["student"], **FLOAT32)
    prompts = {
        "images": np.zeros((1, 2, 8, 8, 3), "uint8"),
        "prompts": ["For the image with a seven"],
    }
    x = student.preprocessor.generate_preprocess(prompts, sequence_length=8)
    assert tuple(x["images"].shape) == (1, 2, 8, 8, 3)
    assert to_numpy(x["padding_mask"]).sum() > 6


def test_state_of_training_beside_a_store(
    folder, student, arrays, tmp_path, monkeypatch
):
    if keras.backend.backend() != "torch":
        # Files written with torch must be readable without it.
        monkeypatch.setitem(sys.modules, "torch", None)
    shutil.copytree(folder / "training", tmp_path / "training")
    store = keras_laid.StoredTeacher(folder / "store")
    distiller = make_fixtures.make_distiller(store, student)
    # This only restores the state: a completed run takes no more steps.
    make_fixtures.train(distiller, arrays, tmp_path / "training")
    state = make_fixtures.state_of(distiller, arrays)
    assert state["steps"] == 2
    np.testing.assert_array_equal(state["optimizer"], arrays["optimizer"])
    for name, value in state.items():
        np.testing.assert_allclose(value, arrays[name], **FLOAT32, err_msg=name)


def test_folded_preset(folder, arrays):
    folded = keras_laid.MultiImagePaliGemmaCausalLM.from_preset(
        str(folder / "folded")
    )
    assert not gain_layers(folded)
    found = to_numpy(folded(Batches(arrays)[0][0]))
    np.testing.assert_allclose(found, arrays["trained"], **FLOAT32)
