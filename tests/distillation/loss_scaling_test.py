"""The loss is scaled for a student in mixed float16, as Keras would do it."""

import keras
import numpy as np
import pytest
from keras.optimizers import SGD
from keras.optimizers import LossScaleOptimizer

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import group_optimizer
from tests import support
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import FEW_STEPS
from tests.support import cosine
from tests.support import gradients_of
from tests.support import to_numpy


def make_distiller(dtype="mixed_float16", quantize=None, **kwargs):
    student = make_model(small_models.gemma_2, dtype=dtype)
    if quantize:
        support.quantize(student, quantize)
    return DistanceWeightedAttentionDistillation(
        teacher=make_model(small_models.gemma_2, seed=5),
        student=student,
        retrieval_weight=0.0,
        **kwargs,
    )


def batch_for(distiller):
    inputs = make_inputs(distiller.student)
    return inputs, inputs["token_ids"], inputs["padding_mask"]


def compiled(optimizer, dtype="mixed_float16", quantize=None, **kwargs):
    """The optimizer that a distiller makes from the given one."""
    distiller = make_distiller(dtype, quantize)
    distiller.compile(optimizer, **FEW_STEPS, **kwargs)
    return distiller.optimizer


def test_small_gradients_do_not_vanish():
    gradients = []
    for dtype, scale in (
        ("float32", True),
        ("mixed_float16", True),
        ("mixed_float16", False),
    ):
        distiller = make_distiller(
            dtype, logits_weight=0.0, supervised_weight=1e-6
        )
        gradients.append(
            gradients_of(
                distiller,
                batch_for(distiller),
                auto_scale_loss=scale,
            )
        )
    exact, scaled, unscaled = gradients
    assert cosine(scaled, exact) > 0.99
    assert cosine(unscaled, exact) < 0.95


@pytest.mark.parametrize(
    "dtype, quantize, scaled",
    [
        ("mixed_float16", None, True),
        ("mixed_float16", "int4", True),
        ("mixed_bfloat16", None, False),
        ("float32", None, False),
        ("float32", "int4", False),
    ],
)
def test_follows_the_students_dtype(dtype, quantize, scaled):
    optimizer = compiled("sgd", dtype, quantize)
    assert isinstance(optimizer, LossScaleOptimizer) == scaled


def test_the_global_policy_decides_nothing():
    before = keras.config.dtype_policy()
    distiller = make_distiller("float32")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        distiller = DistanceWeightedAttentionDistillation(
            distiller.teacher, distiller.student, retrieval_weight=0.0
        )
    finally:
        keras.config.set_dtype_policy(before)
    distiller.compile("sgd")
    assert not isinstance(distiller.optimizer, LossScaleOptimizer)


def test_a_scale_of_the_users_is_kept():
    given = LossScaleOptimizer(SGD(), initial_scale=8.0)
    assert compiled(given) is given
    for given in (
        SGD(loss_scale_factor=8.0),
        group_optimizer(SGD(), loss_scale_factor=8.0),
    ):
        assert compiled(given) is given
        assert given.loss_scale_factor == 8.0
    given = SGD()
    assert compiled(given, auto_scale_loss=False) is given


def test_groups_are_scaled_and_saved(tmp_path):
    weighting = DistanceWeighting(schedule="constant")
    distillers = [
        make_distiller(attention_weight=1.0, distance_weighting=weighting)
        for _ in range(2)
    ]
    for distiller in distillers:
        distiller.compile(
            group_optimizer(SGD(0.0), mixer=SGD(1.0)), **FEW_STEPS
        )
        assert isinstance(distiller.optimizer, LossScaleOptimizer)
        distiller.optimizer.build(distiller.trainable_variables)
    one, other = distillers
    one.optimizer.dynamic_scale.assign(2.0**60)  # Too large for float16.
    before = [np.array(to_numpy(v)) for v in one.trainable_variables]
    losses = [one.train_on_batch(*batch_for(one))]
    assert float(one.optimizer.dynamic_scale) == 2.0**59
    for variable, value in zip(one.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    one.optimizer.dynamic_scale.assign(2.0**10)
    losses.append(one.train_on_batch(*batch_for(one)))
    assert np.isfinite(losses).all()
    for variable, value in zip(one.trainable_variables, before, strict=True):
        moved = (to_numpy(variable) != value).any()
        assert moved == ("mixing_logits" in variable.path), variable.path
    one.save_weights(tmp_path / "state.weights.h5")
    other.load_weights(tmp_path / "state.weights.h5")
    for saved, loaded in zip(
        one.optimizer.variables, other.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(to_numpy(loaded), to_numpy(saved))
    assert float(other.optimizer.dynamic_scale) == 2.0**10
