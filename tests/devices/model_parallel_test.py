"""Models and the distiller on eight simulated devices, and one."""

import json
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

from keras_laid import ModelParallel
from keras_laid.devices.model_parallel import split_axis
from tests.support import PALI_GEMMA

needs_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Keras distributes models only on JAX.",
)


def on_eight_devices(*arguments):
    """Starts a process, because JAX must know its devices before it starts."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.devices.eight_devices",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_jax
def test_losses_of_ten_steps_are_those_of_one_device():
    results = on_eight_devices("losses")
    one, split = results["one"]
    assert len(one) == 10 and not split
    assert one[-1] < one[0]
    for name in ("data", "model"):
        np.testing.assert_allclose(results[name][0], one, rtol=1e-5)
    assert not results["data"][1]
    split = results["model"][1]
    # One key head cannot be split.
    assert split["decoder_block_0/attention/query/kernel"] == [
        "model",
        "None",
        "None",
    ]
    assert split["decoder_block_0/attention/key/kernel"][0] == "None"
    assert "token_embedding/embeddings" in split
    assert not any("mixing_logits" in path for path in split)


@needs_jax
@pytest.mark.extra_large
@pytest.mark.parametrize("family", ["gemma_3", "gemma_4", "qwen_3_5"])
def test_losses_of_other_families_are_those_of_one_device(family):
    results = on_eight_devices("family", family)
    one, split = results["one"]
    # The loss may rise, because the distance weights grow.
    assert len(set(one)) == 3 and not split
    np.testing.assert_allclose(results["model"][0], one, rtol=1e-5)
    assert results["model"][1] > 10


@needs_jax
def test_no_device_holds_a_quarter_of_the_model_while_loading(tmp_path):
    width = dict(hidden_dim=64, intermediate_dim=256, vocabulary_size=320)
    backbone = keras_hub.models.PaliGemmaBackbone(
        **PALI_GEMMA | width | dict(num_layers=8, num_query_heads=8)
    )
    backbone.save_to_preset(str(tmp_path))
    held = on_eight_devices("loading", tmp_path)
    assert held["split"] > 0.9 * held["whole"]
    assert held["most"] <= 0.25 * held["whole"]


@pytest.mark.parametrize(
    "path, shape, axis",
    [
        ("decoder_block_0/attention/query/kernel", (8, 64, 16), 0),
        ("decoder_block_0/attention/key/kernel", (1, 64, 16), 1),
        ("transformer_layer_1/self_attention/key/kernel", (64, 8, 16), 1),
        ("transformer_layer_1/self_attention/key/kernel", (64, 2, 16), 0),
        ("decoder_block_0/attention/attention_output/kernel", (8, 16, 64), 0),
        ("decoder_block_0/ffw_gating_2/kernel", (64, 256), 1),
        ("decoder_block_0/ffw_linear/kernel", (256, 64), 0),
        ("token_embedding/embeddings", (320, 64), 0),
        ("token_embedding/embeddings", (321, 64), 1),
        ("token_embedding/reverse_embeddings", (64, 320), 1),
        ("decoder_block_0/pre_attention_norm/scale", (64,), None),
        ("mixer_3/mixing_logits", (8, 8), None),
        ("anything/kernel", (3, 5), None),
    ],
)
def test_which_axis_is_split_over_four_devices(path, shape, axis):
    assert split_axis(path, shape, 4) == axis


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="Checks backends other than JAX."
)
def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="only on JAX"):
        ModelParallel(None)


@needs_jax
def test_a_mesh_of_one_axis_is_refused():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"])
    with pytest.raises(ValueError, match=r"an axis of data.*\(1,\)"):
        ModelParallel(mesh)
