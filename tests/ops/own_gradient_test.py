"""Ops with a custom gradient, also in functions that JAX compiles."""

import copy
import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_laid.ops.logits_divergence import chunked as logits_chunked
from keras_laid.ops.own_gradient import with_own_gradient
from tests.ops import attention_divergence_test
from tests.ops import attention_output_test
from tests.ops import logits_divergence_test
from tests.ops import segment_attention_test
from tests.ops.kernels import needs_jax
from tests.support import to_numpy
from tests.support import value_and_grads

CASES = {
    "attention_divergence": functools.partial(
        attention_divergence_test.Case, "odd"
    ),
    "attention_output": attention_output_test.Case,
    "logits_divergence": logits_divergence_test.Case,
    "segment_attention": segment_attention_test.Case,
}


def test_variables_have_the_gradient_given_and_constants_none():
    def product(constants, x):
        factor, (count, is_negative) = constants
        sign = ops.where(is_negative, -1.0, 1.0)

        def gradients(upstream):
            return [7.0 * upstream * sign]

        return sign * x * factor * ops.cast(count, "float32"), gradients

    def loss(x, factor):
        count = ops.convert_to_tensor([1, 2], "int32")
        is_negative = ops.convert_to_tensor([False, True])
        constants = {"unused": None}, factor, (count, is_negative)
        return ops.sum(
            with_own_gradient(
                lambda constants, x: product(constants[1:], x), [x], constants
            )
        )

    value, (x_gradient, factor_gradient) = value_and_grads(
        loss, ops.convert_to_tensor([3.0, 5.0]), ops.convert_to_tensor(2.0)
    )
    assert to_numpy(value) == 6.0 - 20.0
    np.testing.assert_array_equal(to_numpy(x_gradient), [7.0, -7.0])
    assert to_numpy(factor_gradient) == 0.0


@needs_jax
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("op", CASES)
def test_tensors_may_come_from_outside(op, monkeypatch):
    import jax

    monkeypatch.setattr(logits_chunked, "ROWS", 4)
    monkeypatch.setattr(logits_chunked, "ELEMENTS", 4)

    known = CASES[op]()

    def loss(implementation, zero, *tensors):
        """Adds `zero` to every array of the case, so that JAX traces it."""
        case = copy.copy(known)
        for name, value in vars(known).items():
            setattr(
                case,
                name,
                keras.tree.map_structure(
                    lambda leaf: (
                        plus(zero, leaf)
                        if isinstance(leaf, np.ndarray)
                        else leaf
                    ),
                    value,
                ),
            )
        found = case.run(implementation, *tensors)
        found = found.loss if op == "logits_divergence" else found
        finite = ops.where(found > -1e29, found, 0.0)
        return ops.sum(ops.square(finite))

    def plus(zero, array):
        array = jax.numpy.asarray(array)
        is_bool = array.dtype == bool
        return (
            array ^ (zero > 0) if is_bool else array + zero.astype(array.dtype)
        )

    arguments = 0.0, *known.tensors()
    arguments = list(map(ops.convert_to_tensor, arguments))
    trained = tuple(range(1, len(arguments)))
    later = jax.jit(functools.partial(loss, "chunked"))
    found = jax.grad(later, trained)(*arguments)
    expected = jax.grad(functools.partial(loss, "definition"), trained)(
        *arguments
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)
