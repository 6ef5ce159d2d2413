import numpy as np
import pytest
from keras import ops

from keras_laid.ops import Attention
from keras_laid.ops import query_key_distance
from tests.support import to_numpy


def make_attention(heads, key_heads, seed, dim=4):
    rng = np.random.default_rng(seed)
    return Attention(
        rng.normal(size=(2, 5, heads, dim)).astype("float32"),
        rng.normal(size=(2, 9, key_heads, dim)).astype("float32"),
        1.0,
    )


def as_tensors(attention):
    return attention._replace(
        query=ops.convert_to_tensor(attention.query),
        key=ops.convert_to_tensor(attention.key),
    )


def test_is_the_relative_squared_distance():
    student, teacher = make_attention(2, 1, 0), make_attention(4, 2, 1)
    rng = np.random.default_rng(2)
    mixture = rng.dirichlet(np.ones(4), size=2).astype("float32")
    row_mask, key_mask = rng.random((2, 5)) < 0.7, rng.random((2, 9)) < 0.7
    found = query_key_distance(
        as_tensors(student),
        as_tensors(teacher),
        ops.convert_to_tensor(mixture),
        ops.convert_to_tensor(row_mask),
        ops.convert_to_tensor(key_mask),
    )
    for b in range(2):
        for s in range(2):
            expected = 0.0
            for name, mask, groups in (
                ("query", row_mask, (1, 1)),
                ("key", key_mask, (2, 2)),
            ):
                mine = getattr(student, name)[b, mask[b]][:, s // groups[0]]
                theirs = getattr(teacher, name)[b, mask[b]]
                mixed = sum(
                    mixture[s, t] * theirs[:, t // groups[1]] for t in range(4)
                )
                expected += ((mine - mixed) ** 2).sum() / (mixed**2).sum()
            np.testing.assert_allclose(
                to_numpy(found)[b, s], expected, rtol=1e-5
            )


def test_is_zero_for_equal_heads():
    attention = as_tensors(make_attention(2, 2, 0))
    every = ops.ones((2, 5), "bool"), ops.ones((2, 9), "bool")
    found = query_key_distance(
        attention,
        attention,
        ops.convert_to_tensor(np.eye(2, dtype="f4")),
        *every,
    )
    np.testing.assert_allclose(to_numpy(found), 0.0, atol=1e-7)


def test_other_head_dims_are_refused():
    student = make_attention(2, 2, 0)
    teacher = make_attention(2, 2, 0, dim=6)
    with pytest.raises(ValueError, match="student head dim=4.*dim=6"):
        query_key_distance(student, teacher, None, None, None)
