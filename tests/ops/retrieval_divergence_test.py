"""The retrieval divergence, against an oracle in float64."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import Retrieval
from keras_laid.ops import retrieval
from keras_laid.ops import retrieval_divergence
from keras_laid.ops import segment_attention
from tests.ops.kernels import BACKEND
from tests.support import assert_as_good_as
from tests.support import to_numpy
from tests.support import value_and_grads

MASKED = np.float32(-1e30)
NAMES = ("divergence", "student", "head_weight")
POOLING = pytest.mark.parametrize("pooling", ["none", "heads", "rows"])


class Case:
    """Random arguments as NumPy arrays; a fifth of the segments is masked."""

    def __init__(
        self,
        pooling="none",
        batch=2,
        heads=3,
        rows=5,
        segments=4,
        dtype="float32",
        exponent=1.5,
        masked=0.2,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.pooling, self.dtype = pooling, dtype
        shape = (batch, heads, rows, segments)
        student = 2 * rng.standard_normal(shape) - 3
        student[rng.random(shape) < masked] = MASKED
        tensor = ops.convert_to_tensor(student.astype("float32"))
        self.student = to_numpy(ops.cast(tensor, dtype))  # In the dtype.
        shares = rng.dirichlet(np.ones(segments), (batch, rows))
        self.shares = shares.astype("float32")
        self.mass, self.sharpness, self.row_mask = rng.random(
            (3, batch, rows)
        ).astype("float32")
        self.row_mask[rng.random((batch, rows)) < 0.3] = 0.0
        self.row_positions = np.arange(segments, segments + rows)[None]
        self.segment_positions = np.sort(rng.random((batch, segments)))
        self.segment_positions *= 4 * segments
        self.exponent = exponent  # `None` for no distances.
        self.strength = 3.0
        weight = rng.random(heads) + 0.1
        self.head_weight = (weight / weight.sum()).astype("float32")
        self.upstream = rng.standard_normal(batch).astype("float32")

    def teacher(self):
        return Retrieval(
            *map(
                ops.convert_to_tensor,
                (self.shares, self.mass, self.sharpness),
            )
        )

    def run(self, student, head_weight=None, teacher=None):
        distance = None
        if self.exponent is not None:
            distance = Distance(
                ops.convert_to_tensor(self.row_positions),
                ops.convert_to_tensor(self.segment_positions),
                self.strength,
                self.exponent,
            )
        return retrieval_divergence(
            student,
            teacher or self.teacher(),
            ops.convert_to_tensor(self.row_mask),
            distance,
            head_weight,
            self.pooling,
        )

    def tensors(self):
        return [
            ops.cast(ops.convert_to_tensor(self.student), self.dtype),
            ops.convert_to_tensor(self.head_weight),
        ]

    def divergence_and_grads(self):
        """Divergences, and gradients of their weighted sum."""

        def scalar(upstream, *tensors):
            return ops.sum(self.run(*tensors)[0] * upstream)

        upstream = ops.convert_to_tensor(self.upstream)
        # The weights' gradient is the divergence itself.
        return value_and_grads(scalar, upstream, *self.tensors())[1]


def weights_of(case, b, i):
    """The weight of each segment, by its distance from a row."""
    if case.exponent is None:
        return np.ones(case.shares.shape[-1])
    positions = case.segment_positions[b]
    every = np.concatenate([positions, case.row_positions[0]])
    span = max(every.max() - every.min(), 1.0)
    distance = np.abs(case.row_positions[0, i] - positions) / span
    return 1 + case.strength * distance**case.exponent


def divergence(p, q, w):
    positive = p > 0
    logs = np.zeros_like(p)
    logs[positive] = np.log(p[positive] / np.maximum(q[positive], 1e-30))
    return (w * (p * logs - p + q)).sum()


def divergences(case, student, head_weight):
    """The divergence of each example, row by row, in NumPy float64."""
    batch, heads, rows, segments = student.shape
    found = np.zeros(batch)
    for b in range(batch):
        g = np.float64(case.row_mask[b] * case.mass[b] * case.sharpness[b])
        if not g.any():
            continue
        q, p = np.zeros((heads, rows, segments)), np.float64(case.shares[b])
        for h, i in np.ndindex(heads, rows):
            seen = student[b, h, i] > -1e29
            e = np.exp(student[b, h, i, seen])
            q[h, i, seen] = e / e.sum()
        mean = np.einsum("hig,h->ig", q, head_weight)
        w = np.stack([weights_of(case, b, i) for i in range(rows)])
        if case.pooling == "rows":
            arrays = [(g[:, None] * x).sum(0) / g.sum() for x in (p, mean, w)]
            found[b] = divergence(*arrays)
            continue
        for i in range(rows):
            if case.pooling == "heads":
                row_divergence = divergence(p[i], mean[i], w[i])
            else:
                row_divergence = sum(
                    head_weight[h] * divergence(p[i], q[h, i], w[i])
                    for h in range(heads)
                )
            found[b] += g[i] * row_divergence / g.sum()
    return found


def oracle(case):
    """Divergences, and slopes of their weighted sum, measured in float64."""
    arrays = [case.student.astype("float64"), np.float64(case.head_weight)]
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for where in np.ndindex(*array.shape):
            before, ends = array[where], []
            for step in (1e-5, -1e-5):
                array[where] = before + step
                ends.append(divergences(case, *arrays) @ case.upstream)
            array[where] = before
            gradient[where] = (ends[0] - ends[1]) / 2e-5
        gradients.append(gradient)
    return divergences(case, *arrays), *gradients


@POOLING
@pytest.mark.parametrize("exponent", [None, 1.5])
@pytest.mark.parametrize("masked", [0.0, 0.2])
def test_is_the_oracles(pooling, exponent, masked):
    case = Case(pooling, exponent=exponent, masked=masked)
    found = case.divergence_and_grads()
    for name, one, other in zip(NAMES, found, oracle(case), strict=True):
        np.testing.assert_allclose(
            to_numpy(one), other, 1e-4, 1e-5, err_msg=name
        )


def assert_is_as_good(case):
    """Allows twice the error of the exact value, rounded to the dtype once."""
    found, exact = case.divergence_and_grads(), oracle(case)
    for name, one, other in zip(NAMES, found, exact, strict=True):
        rounded = ops.cast(ops.convert_to_tensor(other), one.dtype)
        assert_as_good_as(one, rounded, other, name=name, terms=4.0)


@POOLING
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_as_good_in_any_dtype(pooling, dtype):
    case = Case(pooling, dtype=dtype)
    # In float16, -1e30 is minus infinity; one row attends nothing.
    case.student[0, 0, 0] = MASKED
    assert_is_as_good(case)


@strategies.composite
def cases(draw):
    return Case(
        draw(strategies.sampled_from(["none", "heads", "rows"])),
        batch=draw(strategies.integers(1, 2)),
        heads=draw(strategies.integers(1, 3)),
        rows=draw(strategies.integers(1, 4)),
        segments=draw(strategies.integers(1, 5)),
        dtype=draw(strategies.sampled_from(["float32", "float16", "bfloat16"])),
        exponent=draw(strategies.sampled_from([None, 0.5, 1.0, 2.0])),
        masked=draw(strategies.sampled_from([0.0, 0.4, 1.0])),
        seed=draw(strategies.integers(0, 99)),
    )


@hypothesis.given(case=cases())
def test_is_as_good_on_any_case(case):
    assert_is_as_good(case)


def test_equal_weights_of_heads_are_the_default():
    case = Case()
    case.head_weight[:] = 1 / 3
    expected = to_numpy(case.run(*case.tensors())[0])
    student, _ = case.tensors()
    np.testing.assert_allclose(
        to_numpy(case.run(student)[0]), expected, rtol=1e-5
    )


@POOLING
def test_second_value_is_how_much_the_teacher_retrieves(pooling):
    case = Case(pooling)
    _, total = case.run(*case.tensors())
    expected = case.row_mask * case.mass * case.sharpness
    np.testing.assert_allclose(to_numpy(total), expected.sum(1), rtol=1e-5)


@POOLING
def test_is_zero_where_the_student_looks_like_its_teacher(pooling):
    # Without a bound at 0, rounding would make some of 50 examples negative.
    case = Case(pooling, batch=50, heads=1, rows=1, masked=0.0)
    case.row_mask[:] = 1.0
    case.student[:] = np.log(case.shares)[:, None] - 2.0
    found, gradient, _ = map(to_numpy, case.divergence_and_grads())
    np.testing.assert_allclose(found, 0.0, atol=1e-5)
    assert (found >= 0).all()
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


@POOLING
def test_rows_count_by_mask_mass_and_sharpness(pooling):
    case = Case(pooling)
    case.row_mask[0, 1] = case.mass[0, 2] = case.sharpness[0, 3] = 0.0
    case.row_mask[1] = 0.0
    found, gradient, _ = map(to_numpy, case.divergence_and_grads())
    assert (gradient[0, :, 1:4] == 0).all() and (gradient[0] != 0).any()
    assert found[1] == 0 and (gradient[1] == 0).all()


@POOLING
@pytest.mark.parametrize("heads", [1, 3])
def test_segments_that_no_head_can_attend_are_bounded(pooling, heads):
    case = Case(pooling, masked=0.0, exponent=None)
    case.student[:, :heads, :, 1] = MASKED
    found, *gradients = map(to_numpy, case.divergence_and_grads())
    assert (found < 100).all()
    assert (gradients[0][:, :heads, :, 1] == 0).all()
    assert all(np.isfinite(each).all() for each in gradients)


def test_segments_with_tiny_shares_still_learn():
    case = Case(masked=0.0, exponent=None)
    case.student[:, :, :, 1] = -2000.0
    found, gradient, _ = map(to_numpy, case.divergence_and_grads())
    np.testing.assert_allclose(found, oracle_of_tiny(case), rtol=1e-5)
    weight = case.row_mask * case.mass * case.sharpness
    weight /= weight.sum(1, keepdims=True)
    expected = -(weight * case.upstream[:, None] * case.shares[..., 1])
    expected = expected[:, None] * case.head_weight[:, None]
    np.testing.assert_allclose(gradient[..., 1], expected, rtol=1e-4)


def oracle_of_tiny(case):
    """Uses logarithms, because a share of e^-2000 is 0 even in float64."""
    student = case.student.astype("float64")
    log_q = student - np.logaddexp.reduce(student, axis=-1, keepdims=True)
    p = case.shares[:, None].astype("float64")
    by_head = (p * (np.log(p) - log_q)).sum(-1)
    weight = case.row_mask * case.mass * case.sharpness
    return np.einsum(
        "bhi,h,bi->b",
        by_head,
        case.head_weight,
        weight / weight.sum(1, keepdims=True),
    )


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Only TensorFlow traces for any size."
)
@POOLING
def test_sizes_may_be_known_only_later(pooling):
    import tensorflow as tf

    case = Case(pooling)
    student, head_weight = case.tensors()
    specs = [
        tf.TensorSpec([None] * len(x.shape), "float32") for x in case.teacher()
    ]
    specs = [tf.TensorSpec((None, 3, None, None), "float32"), *specs]

    @tf.function(input_signature=specs)
    def found(student, *teacher):
        return case.run(student, head_weight, Retrieval(*teacher))

    expected = case.run(student, head_weight)
    for one, other in zip(
        found(student, *case.teacher()), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@POOLING
def test_no_gradient_reaches_the_teacher(pooling):
    case = Case(pooling)

    def loss(student, *teacher):
        found = case.run(student, teacher=Retrieval(*teacher))
        return ops.sum(found[0] + found[1])

    _, gradients = value_and_grads(loss, case.tensors()[0], *case.teacher())
    assert (to_numpy(gradients[0]) != 0).any()
    for each in gradients[1:]:  # `None` if the loss does not depend on it.
        assert each is None or (to_numpy(each) == 0).all()


def retrieval_oracle(log_shares, head_weight):
    """Shares, mass and sharpness in NumPy float64."""
    mean = np.einsum("bhig,h->big", np.exp(log_shares), head_weight)
    mass = mean.sum(-1)
    shares, sharpness = np.zeros_like(mean), np.zeros_like(mass)
    for b, i in np.ndindex(*mass.shape):
        if mass[b, i] == 0:
            continue
        shares[b, i] = mean[b, i] / mass[b, i]
        count = (log_shares[b, :, i] > -1e29).any(0).sum()
        p = shares[b, i][shares[b, i] > 0]
        if count > 1:
            sharpness[b, i] = 1 + (p * np.log(p)).sum() / np.log(count)
    return shares, mass, sharpness


def log_shares_of(shape, masked=0.3, seed=0):
    """Logarithms of random shares, whose sum over segments is below 1."""
    rng = np.random.default_rng(seed)
    log_shares = np.log(rng.dirichlet(np.ones(shape[-1] + 1), shape[:-1]))
    log_shares = log_shares[..., :-1].astype("float32")
    log_shares[rng.random(shape) < masked] = MASKED
    return log_shares


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_retrieval_is_the_oracles(weighted, dtype):
    log_shares = log_shares_of((2, 3, 7, 4))
    log_shares[0, :, 0] = MASKED  # No segment.
    log_shares[0, :, 1, 1:] = MASKED  # One segment.
    log_shares[0, :, 2, 2:] = MASKED  # Two segments.
    log_shares[1, :, 0] = -3.0  # Even shares.
    tensor = ops.cast(ops.convert_to_tensor(log_shares), dtype)
    weight = np.array([0.5, 0.3, 0.2] if weighted else [1 / 3] * 3)
    found = retrieval(
        tensor,
        ops.convert_to_tensor(weight.astype("float32")) if weighted else None,
    )
    exact = retrieval_oracle(to_numpy(tensor).astype("float64"), weight)
    for name, one, other in zip(Retrieval._fields, found, exact, strict=True):
        np.testing.assert_allclose(
            to_numpy(one), other, 1e-5, 2e-6, err_msg=name
        )
    np.testing.assert_allclose(
        to_numpy(found.row_weight()), exact[1] * exact[2], atol=2e-6
    )
    sharpness = to_numpy(found.sharpness)
    assert sharpness[0, 0] == sharpness[0, 1] == 0
    assert abs(sharpness[1, 0]) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_retrieval_in_bounds_and_gradients_finite(scale):
    log_shares = scale * log_shares_of((2, 3, 7, 11), masked=0.0)
    log_shares[:, 0, :, 1] = log_shares[:, :, 0] = MASKED
    for count in range(2, 6):  # Even shares, whose entropy is rounded.
        log_shares[:, :, count, : 2 * count + 1] = -7.0
        log_shares[:, :, count, 2 * count + 1 :] = MASKED

    def total(log_shares):
        return sum(map(ops.sum, retrieval(log_shares)))

    tensor = ops.convert_to_tensor(log_shares)
    found = [to_numpy(each) for each in retrieval(tensor)]
    assert all((each >= 0).all() and (each <= 1).all() for each in found)
    # Also in rows whose attention to segments is too small for float32.
    np.testing.assert_allclose(found[0][:, 1:].sum(-1), 1.0, rtol=1e-5)
    _, (gradient,) = value_and_grads(total, tensor)
    gradient = to_numpy(gradient)
    assert np.isfinite(gradient).all()
    assert (gradient[log_shares < -1e29] == 0).all()


@pytest.mark.parametrize("without", ["keys", "segments"])
@POOLING
def test_gradients_of_large_logits_are_finite(pooling, without):
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((2, *shape)).astype("float32")
        for shape in ((7, 4, 6), (9, 2, 6), (7, 4, 6), (9, 2, 6))
    ]
    lengths = np.array([0 if without == "keys" else 9, 8])
    segments = rng.integers(0, 4, (2, 9))
    if without == "segments":
        segments[0] = 0
    mask = AttentionMask.from_lengths(
        9, ops.convert_to_tensor(lengths), 3, row_index=ops.arange(2, 9)
    )

    def log_shares(query, key):
        return segment_attention(
            Attention(query, key, 1e3),
            mask,
            ops.convert_to_tensor(segments),
            3,
        )

    tensors = list(map(ops.convert_to_tensor, arrays))
    teacher = retrieval(log_shares(*tensors[2:]))

    def loss(query, key):
        found, _ = retrieval_divergence(
            log_shares(query, key), teacher, ops.ones((2, 7)), pooling=pooling
        )
        return ops.sum(found)

    value, gradients = value_and_grads(loss, *tensors[:2])
    assert np.isfinite(to_numpy(value))
    for gradient in map(to_numpy, gradients):
        assert np.isfinite(gradient).all() and (gradient[1] != 0).any()
        assert (gradient[0] == 0).all()
