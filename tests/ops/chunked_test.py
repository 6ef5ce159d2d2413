"""How chunked ops choose their blocks, also for sizes unknown at tracing."""

import functools

import numpy as np
import pytest

from keras_laid.ops import row_blocks
from keras_laid.ops.attention_divergence import chunked as divergence_chunked
from keras_laid.ops.attention_output import chunked as output_chunked
from keras_laid.ops.logits_divergence import chunked as logits_chunked
from keras_laid.ops.segment_attention import chunked as segments_chunked
from tests.ops import attention_divergence_test
from tests.ops import attention_output_test
from tests.ops import logits_divergence_test
from tests.ops import segment_attention_test
from tests.ops.kernels import BACKEND
from tests.support import to_numpy

DIVERGENCE = functools.partial(attention_divergence_test.Case, "odd")
OUTPUT = attention_output_test.Case
LOGITS = logits_divergence_test.Case
SEGMENTS = segment_attention_test.Case


@pytest.mark.parametrize(
    ("make_case", "chunked"),
    [
        (DIVERGENCE, divergence_chunked),
        (OUTPUT, output_chunked),
        (SEGMENTS, segments_chunked),
    ],
)
def test_blocks_are_chosen_by_rows_and_keys(make_case, chunked, monkeypatch):
    case, chosen = make_case(), []
    monkeypatch.setattr(
        chunked, "rows_of_block", lambda *sizes: chosen.append(sizes) or 5
    )
    case.run("chunked", *case.tensors())
    query, key = case.arrays[:2]
    assert chosen == [(query.shape[1], key.shape[1])]


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Only TensorFlow traces for any size."
)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("rows", [2, 128])  # Several blocks, or one.
@pytest.mark.parametrize(
    ("make_case", "method"),
    [
        (DIVERGENCE, "value_and_grads"),
        (OUTPUT, "output_and_grads"),
        (LOGITS, "value_and_grads"),
        (SEGMENTS, "output_and_grads"),
    ],
)
def test_sizes_may_be_known_only_later(
    make_case, method, rows, jit_compile, monkeypatch
):
    import tensorflow as tf

    monkeypatch.setattr(row_blocks, "ROWS", rows)
    monkeypatch.setattr(logits_chunked, "ROWS", rows)
    monkeypatch.setattr(logits_chunked, "ELEMENTS", 1)
    case = make_case()
    tensors = case.tensors()
    expected = getattr(case, method)("definition")

    @functools.partial(
        tf.function,
        input_signature=[spec_of_any_size(each) for each in tensors],
        jit_compile=jit_compile,
    )
    def found(*tensors):
        case.tensors = lambda: tensors
        return getattr(case, method)("chunked")

    for one, other in zip(found(*tensors), expected, strict=True):
        np.testing.assert_allclose(
            to_numpy(one), to_numpy(other), rtol=1e-4, atol=1e-5
        )


def spec_of_any_size(tensor):
    """Leaves batch and length open; kernels and mixtures have neither."""
    import tensorflow as tf

    shape = list(tensor.shape)
    if len(shape) > 2:
        shape[:2] = None, None
    return tf.TensorSpec(shape, tensor.dtype)
