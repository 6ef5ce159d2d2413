import numpy as np
import pytest
from keras import ops

from keras_laid.ops import logits_divergence
from tests.support import to_numpy
from tests.support import value_and_grads


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_is_tau_squared_times_divergence(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(scale=3.0, size=(2, 3, 5, 11))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=-1)
    found = logits_divergence(
        ops.convert_to_tensor(student, "float32"),
        ops.convert_to_tensor(teacher, "float32"),
        temperature,
    )
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-4)


def test_gradient_is_tau_times_difference():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 1, 7))
    _, (gradient,) = value_and_grads(
        lambda s: ops.sum(
            logits_divergence(s, ops.convert_to_tensor(teacher, "float32"), 2.0)
        ),
        ops.convert_to_tensor(student, "float32"),
    )
    expected = 2.0 * (softmax(student / 2.0) - softmax(teacher / 2.0))
    np.testing.assert_allclose(to_numpy(gradient), expected, atol=1e-5)


def test_other_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"same vocabulary.*\(1, 4\)"):
        logits_divergence(ops.zeros((1, 3)), ops.zeros((1, 4)))
