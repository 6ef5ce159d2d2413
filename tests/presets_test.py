"""The embedded presets, and what importing the package brings along."""

import pathlib
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

import keras_laid
from keras_laid import presets
from tests.support import to_numpy

BOTH = pytest.mark.parametrize(
    "preset", [presets.TEACHER, presets.STUDENT], ids=["teacher", "student"]
)


def load(preset):
    return keras_hub.models.PaliGemmaCausalLM.from_preset(preset)


def test_are_small():
    folder = pathlib.Path(presets.__file__).parent
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert size < 5e6


@BOTH
def test_have_a_card(preset):
    card = (pathlib.Path(preset) / "README.md").read_text()
    for heading in ("## How it was made", "## What it scores"):
        assert heading in card


@pytest.mark.extra_large_but_on("jax")
@BOTH
def test_read_one_image(preset):
    model = load(preset)
    haystacks = keras_laid.draw_haystacks(keras_laid.Digits("test"), 256, (1,))
    results = keras_laid.evaluate_haystacks(model, haystacks, verbose=False)
    assert results.accuracy[1] > 0.93  # 0.95 and more on 1,024 questions.


def test_answer_in_words():
    student = load(presets.STUDENT)
    model = keras_laid.MultiImagePaliGemmaCausalLM.from_causal_lm(student)
    images = keras_laid.Digits("test").render(
        np.array([[7, 3], [1, 8]]), np.random.default_rng(0)
    )
    question = "For the image with a seven, is there a three?"
    answer = model.generate({"images": images, "prompts": question})
    assert answer == f"{question} yes"


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.extra_large_but_on("tensorflow")
def test_distilled_preset_loads_without_keras_laid(tmp_path):
    student = load(presets.STUDENT)
    for layer in keras_laid.attach_gain_modulation(student):
        layer.log_gain.assign(
            np.random.default_rng(0).normal(size=layer.log_gain.shape)
        )
    inputs = {
        "images": np.full((1, 16, 16, 3), 0.5, "float32"),
        "token_ids": np.arange(4, 20)[None],
        "padding_mask": np.ones((1, 16), "int32"),
        "response_mask": np.zeros((1, 16), "int32"),
    }
    expected = to_numpy(student(inputs))
    keras_laid.fold_gain_modulation(student)
    student.save_to_preset(str(tmp_path / "student"))
    run_python(
        "import sys, numpy as np, keras_hub\n"
        "model = keras_hub.models.PaliGemmaCausalLM.from_preset(sys.argv[1])"
        ".backbone\n".replace("sys.argv[1]", repr(str(tmp_path / "student")))
        + "from keras import ops\n"
        "x = {'images': np.full((1, 16, 16, 3), 0.5, 'float32'),"
        "'token_ids': np.arange(4, 20)[None],"
        "'padding_mask': np.ones((1, 16), 'int32'),"
        "'response_mask': np.zeros((1, 16), 'int32')}\n"
        "y = model.token_embedding(model(x), reverse=True)[:, 4:]\n"
        "assert 'keras_laid' not in sys.modules\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, ops.convert_to_numpy(y))\n"
    )
    found = np.load(tmp_path / "logits.npy")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Checks imports on JAX."
)
def test_import_brings_no_second_framework_and_is_quick():
    modules = run_python(
        "import gc, keras_hub, sys, time\n"
        "gc.freeze()\n"  # Garbage collection skips KerasHub's objects.
        "before = set(sys.modules)\n"
        "start = time.process_time()\n"  # Ignores other processes.
        "import keras_laid\n"
        "print(time.process_time() - start)\n"
        "print(*(set(sys.modules) - before))\n"
    )
    seconds, names = modules.strip().split("\n")[-2:]
    top = {name.split(".")[0] for name in names.split()}
    assert not top & {"torch", "tensorflow", "sklearn", "matplotlib"}
    # The import takes 0.27 s. One more package would about double that.
    assert float(seconds) < 0.4


def test_public_names():
    assert sorted(keras_laid.__all__) == [
        "Digits",
        "DistanceWeightedAttentionDistillation",
        "DistanceWeighting",
        "GainModulatedRotaryEmbedding",
        "HaystackEvaluation",
        "Haystacks",
        "HeadMixer",
        "LongPrompts",
        "ModelParallel",
        "MultiImagePaliGemmaCausalLM",
        "PositionStretching",
        "ResumableTraining",
        "StoredTeacher",
        "attach_gain_modulation",
        "draw_haystacks",
        "effective_window",
        "effective_window_interval",
        "evaluate_haystacks",
        "find_retrieval_heads",
        "fold_gain_modulation",
        "group_optimizer",
        "linear_memory_attention",
        "plan",
        "presets",
        "rotary_positions",
        "self_extend",
        "store_log_probabilities",
        "store_teacher",
        "yarn",
    ]
    for name in keras_laid.__all__:
        assert getattr(keras_laid, name).__doc__
