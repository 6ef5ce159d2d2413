"""Numbers at their limits: large logits, far positions, ends of gains.

Bounds of errors are the unit roundoff of a dtype, half its `eps`, times the
number of roundings and the size of the rounded numbers.
"""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_laid import GainModulatedRotaryEmbedding
from keras_laid import attach_gain_modulation
from keras_laid import fold_gain_modulation
from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import Unembedding
from keras_laid.ops import attention_divergence
from keras_laid.ops import logits_divergence
from keras_laid.ops import query_key_distance
from keras_laid.ops import row_blocks
from tests.support import attention_of
from tests.support import make_multi_image
from tests.support import to_numpy
from tests.support import value_and_grads

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def roundoff(dtype):
    return float(ml_dtypes.finfo(dtype).eps) / 2


def normal(*shape, seed=0, scale=1.0, dtype="float32"):
    """Random numbers that are exact in `dtype`, as float64."""
    x = scale * np.random.default_rng(seed).standard_normal(shape)
    return x.astype(ml_dtypes.finfo(dtype).dtype).astype("float64")


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def moved(log_p):
    """The most that probabilities change if logits change by 1."""
    p = np.exp(log_p)
    return 2 * (p * (1 - p)).max()


def assert_near(found, exact, bound, name):
    found = to_numpy(found).astype("float64")
    assert np.isfinite(found).all(), name
    error = np.abs(found - exact).max()
    assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


@DTYPES
@pytest.mark.parametrize("implementation", ["definition", "chunked"])
def test_attention_of_logits_up_to_ten_thousand(
    implementation, dtype, monkeypatch
):
    monkeypatch.setattr(row_blocks, "ROWS", 3)
    width, length = 4, 7
    student = [normal(1, length, 1, width, seed=i, dtype=dtype) for i in (0, 1)]
    teacher = [normal(1, length, 1, width, seed=i, dtype=dtype) for i in (2, 3)]

    def logits_of(query, key):
        return np.einsum("bihd,bjhd->bhij", query, key)

    scales = [
        1e4 / np.abs(logits_of(*each)).max() for each in (student, teacher)
    ]
    every = np.ones((1, length), "bool")

    def divergence(query, key):
        values = attention_divergence(
            Attention(query, key, scales[0]),
            Attention(
                *[ops.convert_to_tensor(a, dtype) for a in teacher], scales[1]
            ),
            AttentionMask(
                ops.convert_to_tensor(every),
                ops.convert_to_tensor(~every),
                ops.arange(length),
            ),
            Distance(ops.arange(length)[None], ops.arange(length)[None]),
            None,
            implementation=implementation,
        )
        return ops.sum(values)

    value, gradients = value_and_grads(
        divergence, *[ops.convert_to_tensor(a, dtype) for a in student]
    )
    log_q, log_p = [
        log_softmax(scale * logits_of(*each))
        for scale, each in zip(scales, (student, teacher), strict=True)
    ]
    p, q = np.exp(log_p), np.exp(log_q)
    exact = (p * (log_p - log_q)).sum()
    slope = scales[0] * (q - p)
    # Logits are computed in float32 whatever the dtype. The roundings are of
    # `width` products, a scale, and a difference of two logits up to 1e4.
    error = 2e4 * (width + 2) * roundoff("float32")
    apart = np.abs(log_p - log_q).max()
    bound = length * error * (2 + length * moved(log_p) * apart)
    assert_near(value, exact, bound, "value")
    error = 4 * roundoff("float32") + error * (moved(log_p) + moved(log_q))
    for name, gradient, subscripts, other in zip(
        ("query", "key"),
        gradients,
        ("bhij,bjhd->bihd", "bhij,bihd->bjhd"),
        student[::-1],
        strict=True,
    ):
        exact = np.einsum(subscripts, slope, other)
        bound = error * length * scales[0] * np.abs(other).max()
        bound += 2 * roundoff(dtype) * np.abs(exact).max()
        assert_near(gradient, exact, bound, name)


@DTYPES
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("size", [10.0, 1e4])
def test_next_tokens_of_large_logits(dtype, temperature, size):
    shape = (1, 5, 9)
    student, teacher = [
        normal(*shape, seed=i, scale=size / 3, dtype=dtype) for i in (0, 1)
    ]
    labels = np.arange(5)[None]

    def loss(logits):
        return logits_divergence(
            Unembedding(logits),
            Unembedding(ops.convert_to_tensor(teacher, dtype)),
            ops.convert_to_tensor(labels),
            temperature=temperature,
        ).loss

    value, (gradient,) = value_and_grads(
        loss, ops.convert_to_tensor(student, dtype)
    )
    log_q = log_softmax(student / temperature)
    log_p = log_softmax(teacher / temperature)
    divergences = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    log_one = log_softmax(student)
    label_losses = -np.take_along_axis(log_one, labels[..., None], -1)[..., 0]
    exact = (divergences + label_losses).mean()
    is_label = np.arange(9) == labels[..., None]
    slope = temperature * (np.exp(log_q) - np.exp(log_p))
    slope = (slope + np.exp(log_one) - is_label) / 5
    # Four roundings of logits, divided by the temperature or by 1: of numbers
    # up to twice the largest logit, and of 1 for the sums of exponentials.
    largest = max(np.abs(x).max() for x in (student, teacher))
    error, error_at_one = (
        4 * roundoff("float32") * (1 + 2 * largest / t)
        for t in (temperature, 1.0)
    )
    apart = np.abs(log_p - log_q).max()
    divergence_error = error * (2 + 9 * moved(log_p) * apart)
    assert_near(
        value, exact, temperature**2 * divergence_error + error_at_one, "value"
    )
    bound = 4 * roundoff("float32") + error * (moved(log_p) + moved(log_q))
    bound = temperature * bound + error_at_one * moved(log_one)
    bound = (bound + 4 * roundoff("float32")) / 5
    bound += roundoff(dtype) * np.abs(slope).max()
    assert_near(gradient, slope, bound, "gradient")


@DTYPES
def test_distance_of_large_queries_and_keys(dtype):
    shape, size = (1, 5, 2, 4), 1e4
    student = [normal(*shape, seed=i, scale=size, dtype=dtype) for i in (0, 1)]
    teacher = [normal(*shape, seed=i, scale=size, dtype=dtype) for i in (2, 3)]
    every = ops.ones((1, 5), "bool")

    def distance(query, key):
        found = query_key_distance(
            Attention(query, key, 1.0),
            Attention(*[ops.convert_to_tensor(a, dtype) for a in teacher], 1.0),
            ops.eye(2),
            every,
            every,
        )
        return ops.sum(found)

    value, gradients = value_and_grads(
        distance, *[ops.convert_to_tensor(a, dtype) for a in student]
    )
    exact = 0.0
    for name, gradient, mine, theirs in zip(
        ("query", "key"), gradients, student, teacher, strict=True
    ):
        squares = (theirs**2).sum((1, 3), keepdims=True)
        exact += ((mine - theirs) ** 2 / squares).sum()
        slope = 2 * (mine - theirs) / squares
        # Each sum has 20 squares. Slopes are near 1e-5, where float16 has steps
        # of 6e-8: a rounding loses up to half a step.
        bound = 50 * roundoff("float32") + roundoff(dtype)
        bound *= np.abs(slope).max()
        if dtype == "float16":
            bound += 2.0**-25
        assert_near(gradient, slope, bound, name)
    assert_near(value, exact, 50 * roundoff("float32") * exact, "value")


@pytest.mark.parametrize(
    "policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"]
)
@pytest.mark.parametrize("given", [False, True])
def test_angles_of_far_positions_are_in_float32(policy, given):
    position, features, dtype = 65_536, 64, keras.DTypePolicy(policy)
    layer = GainModulatedRotaryEmbedding(dtype=policy)
    x = np.ones((1, 1, 1, features))
    where = dict(start_index=position)
    if given:
        where = dict(positions=ops.convert_to_tensor([[position]], "int32"))
    found = layer(ops.convert_to_tensor(x, dtype.compute_dtype), **where)
    frequency = 10_000.0 ** (-2 * np.arange(features // 2) / features)
    turn = np.exp(1j * position * frequency) * (1 + 1j)
    exact = np.concatenate([turn.real, turn.imag])
    # The exponent of a frequency, up to log(10,000) = 9.2, is rounded, and then
    # the power itself and its product with the position. This makes up to 12
    # roundings of an angle of up to 65,536 radians, and a few of the dtype.
    angle = 12 * position * frequency * roundoff("float32")
    bound = np.sqrt(2) * np.tile(angle, 2)
    bound = bound + 4 * np.sqrt(2) * roundoff(dtype.compute_dtype)
    error = np.abs(to_numpy(found).astype("float64")[0, 0, 0] - exact)
    assert (error <= bound).all(), (error / bound).max()


@DTYPES
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("max_gain", [4.0, 1e4])
def test_gains_at_their_bounds_survive_folding(per_head, max_gain, dtype):
    model = make_multi_image(dtype=dtype)
    for layer in attach_gain_modulation(model, None, per_head, max_gain):
        frequencies = layer.log_gain.shape[-1]
        ends = np.where(np.arange(frequencies) % 2, 1e6, -1e6)
        layer.log_gain.assign(np.broadcast_to(ends, layer.log_gain.shape))
    attentions = attention_of(model)
    before = [
        [to_numpy(part.kernel).astype("float64") for part in parts]
        for parts in map(queries_and_keys, attentions)
    ]
    fold_gain_modulation(model)
    gains = max_gain ** np.tile(np.sign(ends), 2)
    part_gains = (gains, 1.0) if per_head else (gains**0.5, gains**0.5)
    # The relative error of a gain, whose logarithm of up to `log(max_gain)` is
    # rounded, and of its product with a kernel.
    error = 4 * (1 + np.log(max_gain)) * roundoff("float32") + roundoff(dtype)
    for kernels, attention in zip(before, attentions, strict=True):
        for kernel, part, part_gain in zip(
            kernels, queries_and_keys(attention), part_gains, strict=True
        ):
            # Float16 has steps of 6e-8 near 0; half a step may be lost.
            smallest = 2.0**-25 if dtype == "float16" else 0.0
            np.testing.assert_allclose(
                to_numpy(part.kernel), kernel * part_gain, error, smallest
            )


def queries_and_keys(attention):
    return attention.query_dense, attention.key_dense
