"""Capture and gains under remat, LoRA, other dtypes and quantisation."""

import keras
import numpy as np
import pytest

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import attach_gain_modulation
from keras_laid.backbones import decoder
from keras_laid.backbones.attention_capture import captured_attention
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import FEW_STEPS
from tests.support import quantize
from tests.support import to_numpy

SOME = pytest.mark.parametrize(
    "family",
    [
        small_models.llama,
        pytest.param(small_models.gemma_4, marks=pytest.mark.extra_large),
    ],
    ids=lambda family: family.__name__,
)


def make_distiller(student, family, teacher=None):
    distiller = DistanceWeightedAttentionDistillation(
        teacher=teacher or make_model(family, seed=5),
        student=student,
        retrieval_weight=0.0,
        attention_weight=1.0,
    )
    distiller.compile(optimizer=keras.optimizers.SGD(0.1), **FEW_STEPS)
    return distiller


def fit(distiller):
    """Runs one step; returns the terms and the student's weights."""
    inputs = make_inputs(distiller.student)
    history = distiller.fit(inputs, inputs["token_ids"], verbose=0)
    return history.history, [to_numpy(v) for v in distiller.trainable_variables]


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="Keras rematerialises no layer with keyword arguments in graphs.",
)
def test_rematerialised_students_learn_the_same():
    found = []
    for mode in (None, "list_of_layers"):
        # Under `mode="full"` JAX traces `training` too, and dropout breaks.
        blocks = ["decoder_block_0", "decoder_block_1"]
        with keras.RematScope(mode=mode, layer_names=blocks):
            student = make_model(small_models.gemma_2)
        attach_gain_modulation(student)
        found.append(fit(make_distiller(student, small_models.gemma_2)))
    (terms, weights), (same_terms, same_weights) = found
    for name, values in terms.items():
        np.testing.assert_allclose(same_terms[name], values, rtol=1e-5)
    for one, other in zip(weights, same_weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@SOME
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_other_dtypes(family, dtype):
    model = make_model(family, dtype=dtype)
    inputs = make_inputs(model)
    plain = to_numpy(model(inputs))
    attach_gain_modulation(model)
    layers = decoder.global_layers(model)
    with captured_attention(model, layers) as captured:
        np.testing.assert_array_equal(to_numpy(model(inputs)), plain)
    for attention in captured.values():
        for x in (attention.query, attention.key):
            assert keras.backend.standardize_dtype(x.dtype) == "bfloat16"
    terms, _ = fit(make_distiller(model, family))
    assert np.isfinite(terms["loss"]).all()


@SOME
def test_low_rank_adapters(family):
    model = make_model(family)
    model.backbone.enable_lora(2)
    gains = attach_gain_modulation(model)
    inputs = make_inputs(model)
    before = to_numpy(model(inputs))
    fit(make_distiller(model, family))
    assert all((to_numpy(gain.log_gain) != 0).any() for gain in gains)
    assert np.abs(to_numpy(model(inputs)) - before).max() > 1e-4


def test_quantised_teachers():
    family = small_models.llama
    teacher = make_model(family, seed=5)
    quantize(teacher, "int8")
    inputs = make_inputs(teacher)
    plain = to_numpy(teacher(inputs))
    distiller = make_distiller(make_model(family), family, teacher=teacher)
    terms, _ = fit(distiller)
    assert np.isfinite(terms["loss"]).all()
    np.testing.assert_array_equal(to_numpy(teacher(inputs)), plain)


def test_nothing_is_left_when_a_call_raises():
    model = make_model(small_models.gemma_3)
    parts = [*model.backbone.transformer_layers]
    parts += [block.attention for block in parts]
    before = [set(vars(part)) for part in parts]
    with pytest.raises(RuntimeError, match="on the way"):
        with captured_attention(model, [0, 5]):
            raise RuntimeError("on the way")
    assert [set(vars(part)) for part in parts] == before
