"""The weights of terms in `val_loss`, and the labels that a loss takes."""

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import PolynomialDecay

from keras_laid import DistanceWeightedAttentionDistillation
from keras_laid import DistanceWeighting
from keras_laid import arguments
from tests.backbones import small_models
from tests.backbones.small_models import LENGTH
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import make_terms

# After 6 steps, this weight has reached its end, 0.5.
FADE = PolynomialDecay(2.0, 6, end_learning_rate=0.5)


def make_distiller(loss="auto", distance_weighting=None, **weights):
    weights = {"retrieval_weight": 0.0} | weights
    distiller = DistanceWeightedAttentionDistillation(
        teacher=make_model(small_models.llama, seed=5),
        student=make_model(small_models.llama),
        distance_weighting=distance_weighting,
        terms=make_terms(**weights),
    )
    # TensorFlow takes long to trace, and JAX to run operations one by one.
    eager = keras.backend.backend() == "tensorflow"
    distiller.compile(keras.optimizers.SGD(0.0), loss=loss, run_eagerly=eager)
    return distiller


def make_batch(model):
    inputs = make_inputs(model)
    segments = np.repeat([1, 2, 0], [5, 5, LENGTH - 10])
    inputs["segments"] = np.tile(segments, (2, 1))
    weights = inputs["padding_mask"].astype("float32")
    return inputs, inputs["token_ids"].astype("int32"), weights


@pytest.mark.extra_large_but_on("torch")
@pytest.mark.parametrize(
    "weights",
    [
        {"attention_weight": 1.0, "steps": 4, "schedule": "cosine"},
        {
            "schedule": "constant",
            "retrieval_weight": FADE,
            "query_key_weight": FADE,
            "logits_weight": FADE,
            "supervised_weight": FADE,
            "teacher_heads": [(-1, 0)],
            "num_segments": 2,
        },
    ],
    ids=["progress", "schedules"],
)
def test_val_loss_is_that_of_the_end_of_training(weights):
    weights = dict(weights)
    names = {"steps", "schedule"} & {*weights}
    weighting = DistanceWeighting(**{name: weights.pop(name) for name in names})
    distiller = make_distiller(distance_weighting=weighting, **weights)
    x, y, sample_weight = batch = make_batch(distiller.student)
    history = distiller.fit(
        x,
        y,
        sample_weight=sample_weight,
        batch_size=1,
        epochs=3,
        validation_data=batch,
        validation_batch_size=2,
        verbose=0,
    ).history
    # Only the weights of terms change the loss: no variable moves.
    assert max(history["loss"]) - min(history["loss"]) > 1e-3
    np.testing.assert_allclose(history["val_loss"], history["val_loss"][0])
    assert history["val_progress"] == [1.0] * 3
    # A step after the last one has the same objective.
    distiller.reset_metrics()
    logs = distiller.train_on_batch(*batch, return_dict=True)
    np.testing.assert_allclose(logs["loss"], history["val_loss"][0], rtol=1e-5)
    found = distiller.test_on_batch(*batch, return_dict=True)
    np.testing.assert_allclose(found["loss"], logs["loss"], rtol=1e-5)


@pytest.mark.parametrize("through", ["evaluate", "test_on_batch"])
def test_the_end_of_schedules_must_be_known(through):
    distiller = make_distiller(supervised_weight=FADE)
    batch = make_batch(distiller.student)
    with pytest.raises(
        ValueError, match=r"Received: \['supervised_weight'\].*Call `fit`"
    ):
        getattr(distiller, through)(*batch[:2])


def cross_entropy(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight", **kwargs
    )


@pytest.mark.parametrize(
    ("loss", "label", "is_refused"),
    [
        ("auto", -100, False),
        ("auto", small_models.VOCABULARY, True),
        (cross_entropy(), -100, True),
        (cross_entropy(), small_models.VOCABULARY, True),
        (cross_entropy(ignore_class=-100), -100, False),
        (cross_entropy(ignore_class=-100), -1, True),
    ],
)
def test_labels_that_a_loss_ignores(loss, label, is_refused):
    distiller = make_distiller(loss, logits_weight=0.0)
    x, y, sample_weight = make_batch(distiller.student)
    y[1, 3] = label
    if is_refused:
        with pytest.raises(ValueError, match=rf"labels\[1, 3\]={label}\."):
            distiller.test_on_batch(x, y, sample_weight)
    else:
        ignored = np.array(sample_weight)
        ignored[1, 3] = 0.0
        found, expected = (
            distiller.test_on_batch(x, y, each, return_dict=True)["loss"]
            for each in (sample_weight, ignored)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_loss_of_labels_that_nobody_could_refuse_is_nan(monkeypatch):
    monkeypatch.setattr(arguments, "at_hand", lambda tensor: False)
    distiller = make_distiller(
        lambda y, logits: logits[..., 0] + 0 * y, logits_weight=0.0
    )
    x, y, sample_weight = make_batch(distiller.student)
    y[1, 3] = small_models.VOCABULARY
    logs = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    assert np.isnan(logs["loss"])
    sample_weight[1, 3] = 0.0
    distiller.reset_metrics()
    logs = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    assert np.isfinite(logs["loss"])
