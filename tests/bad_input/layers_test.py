"""Wrong calls of layers, and of objects made only from numbers."""

import keras
import numpy as np
import pytest

import keras_laid
from keras_laid import DistanceWeighting
from keras_laid import GainModulatedRotaryEmbedding
from keras_laid import HeadMixer
from keras_laid import PositionStretching
from tests.bad_input.table import assert_refused
from tests.bad_input.table import refused
from tests.bad_input.table import zeros

NAN, INFINITY = float("nan"), float("inf")


def numbers(name, make, right, integer, wrong):
    """Rows for a numeric argument: wrong types, and values out of range."""
    kind = "an integer" if integer else "a number"
    for value in ("1", True, None, *([2.5] if integer else [])):
        if value is None and right is None:
            continue
        yield refused(
            f"{name}={value!r}",
            lambda value=value: make(**{name: value}),
            TypeError,
            f"`{name}` must be {kind}",
            f"{name}={value!r}",
        )
    for value in wrong:
        yield refused(
            f"{name}={value!r}",
            lambda value=value: make(**{name: value}),
            ValueError,
            f"`{name}` must be",
            f"{name}={value}",
        )


def mixer(**changes):
    return HeadMixer(**dict(student_heads=2, teacher_heads=4) | changes)


def stretching(**changes):
    return PositionStretching(**dict(max_images=4, image_length=3) | changes)


def positions(**changes):
    given = dict(batch=2, images=2, text_length=5, rng=generator())
    return stretching().positions(**given | changes)


def in_text(**changes):
    given = dict(vision_mask=np.array([[0, 1, 1, 0]]), rng=generator())
    return stretching().positions_in_text(**given | changes)


def generator():
    return np.random.default_rng(0)


def optimizers(**changes):
    given = dict(student=keras.optimizers.SGD(), mixer=keras.optimizers.SGD())
    return keras_laid.group_optimizer(**given | changes)


def same_optimizer():
    one = keras.optimizers.SGD()
    return optimizers(student=one, gains=one)


def rotated(shape, **positions):
    return GainModulatedRotaryEmbedding()(zeros(*shape), **positions)


ROWS = [
    *[
        refused(
            f"a group that scales the loss: {type(scaling).__name__}",
            lambda scaling=scaling: optimizers(mixer=scaling),
            ValueError,
            "The loss must have one scale for all groups",
            "mixer=",
            "Pass `keras.optimizers.LossScaleOptimizer(group_optimizer(...))`",
        )
        for scaling in (
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            keras.optimizers.SGD(loss_scale_factor=8.0),
        )
    ],
    *numbers("student_heads", mixer, 2, True, (0, -1)),
    *numbers("teacher_heads", mixer, 4, True, (0,)),
    *numbers("sharpness", mixer, 0.0, False, (NAN, INFINITY)),
    *numbers("strength", DistanceWeighting, 4.0, False, (-1.0, NAN)),
    *numbers("exponent", DistanceWeighting, 1.0, False, (0.0, INFINITY)),
    *numbers("steps", DistanceWeighting, None, True, (0, -5)),
    *numbers("max_images", stretching, 4, True, (0,)),
    *numbers("image_length", stretching, 3, True, (0,)),
    *numbers("batch", positions, 2, True, (0,)),
    *numbers("text_length", positions, 5, True, (-1,)),
    *numbers("margin", in_text, 0, True, (-1,)),
    *numbers(
        "max_wavelength",
        GainModulatedRotaryEmbedding,
        10000,
        False,
        (0, -1, NAN, INFINITY),
    ),
    *numbers(
        "scaling_factor", GainModulatedRotaryEmbedding, 1.0, False, (0.0, NAN)
    ),
    *numbers("beta_fast", GainModulatedRotaryEmbedding, 32.0, False, (0.0,)),
    *numbers("num_heads", GainModulatedRotaryEmbedding, None, True, (0, -2)),
    *numbers(
        "max_gain",
        GainModulatedRotaryEmbedding,
        4.0,
        False,
        (1.0, 0.5, NAN, INFINITY),
    ),
    refused(
        "an unknown schedule",
        lambda: DistanceWeighting(schedule="step"),
        ValueError,
        "`schedule` must be one of ['constant', 'linear', 'cosine']",
        "'step'",
    ),
    refused(
        "more images than the window",
        lambda: positions(images=5),
        ValueError,
        "at most `max_images`",
        "images=5, max_images=4",
    ),
    refused(
        "a seed for a generator",
        lambda: positions(rng=0),
        TypeError,
        "`rng` must be a `numpy.random.Generator`",
        "numpy.random.default_rng",
    ),
    refused(
        "no generator",
        lambda: in_text(rng=None),
        TypeError,
        "`rng` must be",
        "NoneType",
    ),
    refused(
        "the mask of one example",
        lambda: in_text(vision_mask=np.array([0, 1, 1, 0])),
        ValueError,
        "`vision_mask` must have shape (batch, length)",
        "(4,)",
    ),
    refused(
        "token ids for a mask",
        lambda: in_text(vision_mask=np.array([[7, 2, 2, 9]])),
        ValueError,
        "be 0 or 1",
        "[7 2 2]",
    ),
    refused(
        "a name for an optimizer",
        lambda: optimizers(student="adam"),
        TypeError,
        "`student` must be a `keras.Optimizer`",
        "str",
    ),
    refused(
        "a rate for an optimizer",
        lambda: optimizers(mixer=1e-3),
        TypeError,
        "`mixer` must be a `keras.Optimizer`",
    ),
    refused(
        "clipping of all groups",
        lambda: optimizers(clipnorm=1.0),
        TypeError,
        "Arguments of all groups must be among",
        "clipnorm=1.0",
        "Pass others to the optimizers",
    ),
    refused(
        "one optimizer for two groups",
        same_optimizer,
        ValueError,
        "an optimizer of its own",
        "Make one for each",
    ),
    refused(
        "an unknown kind of scaling",
        lambda: GainModulatedRotaryEmbedding(rope_type="yarnn"),
        ValueError,
        "`rope_type` must be one of",
        "'yarnn'",
    ),
    refused(
        "a word for a switch",
        lambda: GainModulatedRotaryEmbedding(truncate="no"),
        TypeError,
        "`truncate` must be `True` or `False`",
        "'no'",
    ),
    refused(
        "an axis between two",
        lambda: GainModulatedRotaryEmbedding(sequence_axis=1.5),
        TypeError,
        "`sequence_axis` must be an integer",
    ),
    refused(
        "gains on keys alone",
        lambda: GainModulatedRotaryEmbedding(applied_to="keys"),
        ValueError,
        "`applied_to` must be one of ['queries_and_keys', 'queries']",
    ),
    refused(
        "gains of each head on keys",
        lambda: GainModulatedRotaryEmbedding(
            num_heads=2, applied_to="queries_and_keys"
        ),
        ValueError,
        "only to queries",
        "num_heads=2",
        'Pass `applied_to="queries"`',
    ),
    refused(
        "a batch in place of heads",
        lambda: GainModulatedRotaryEmbedding(num_heads=2)(zeros(2, 5, 8)),
        ValueError,
        "must have an axis of `num_heads` heads",
        "(2, 5, 8)",
        "num_heads=2",
    ),
    refused(
        "an odd number of features",
        lambda: rotated((2, 5, 3, 7)),
        ValueError,
        "known and even",
        "(2, 5, 3, 7)",
    ),
    refused(
        "no features",
        lambda: rotated((2, 5, 3, 0)),
        ValueError,
        "known and even",
    ),
    refused(
        "positions of fewer tokens",
        lambda: rotated((2, 5, 3, 8), positions=np.arange(4)),
        ValueError,
        "`positions` must have shape (length) = (5,)",
        "(4,)",
    ),
    refused(
        "one position for all tokens",
        lambda: rotated((2, 5, 3, 8), positions=np.arange(1)),
        ValueError,
        "`positions` must have shape",
    ),
    refused(
        "positions of another batch",
        lambda: rotated((2, 5, 3, 8), positions=np.zeros((3, 5), "int32")),
        ValueError,
        "`positions` must have shape (batch, length) = (2, 5)",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), ROWS)
def test_refused(call, error, words):
    assert_refused(error, words, call)
