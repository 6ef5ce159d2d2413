"""Silenced heads: as if the rows of their output kernels were 0."""

import numpy as np
import pytest

from keras_laid.backbones import attention_layers
from keras_laid.backbones.attention_capture import captured_attention
from keras_laid.backbones.without_heads import without_heads
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.bad_input.table import unchanged
from tests.support import to_numpy


def output_kernel(layer):
    """The output kernel, of shape `(heads, head_dim, hidden_dim)`."""
    attention = layer.layer
    for name in ("output_dense", "_output_dense"):
        if hasattr(attention, name):
            return getattr(attention, name).kernel
    raise AssertionError(vars(attention).keys())


@pytest.mark.parametrize(
    "family",
    [
        small_models.pali_gemma,
        small_models.gemma_3,
        small_models.gemma_4,
        pytest.param(
            small_models.qwen_3_5,
            # On JAX, KerasHub's linear layers take long to compile.
            marks=pytest.mark.extra_large_but_on("tensorflow", "torch"),
        ),
        small_models.llama,
        small_models.phi_3,
    ],
    ids=lambda family: family.__name__,
)
def test_as_without_rows_of_the_output_kernel(family):
    model = make_model(family)
    inputs = make_inputs(model)
    layers = [x for x in attention_layers(model) if x.kind != "linear"]
    # The first layer may have a sliding window.
    heads = [(layers[-1].index, 2), (layers[0].index, 3), (layers[0].index, 0)]
    plain = to_numpy(model(inputs))
    with unchanged(model):
        with without_heads(model, heads):
            found = to_numpy(model(inputs))
        np.testing.assert_array_equal(to_numpy(model(inputs)), plain)
    assert np.abs(found - plain).max() > 1e-3
    for index, head in heads:
        kernel = output_kernel(attention_layers(model)[index])
        value = np.array(to_numpy(kernel))
        value[head] = 0.0
        kernel.assign(value)
    np.testing.assert_allclose(found, to_numpy(model(inputs)), atol=1e-5)


def test_the_heads_of_a_layer_add_up():
    model = make_model(small_models.llama)
    with without_heads(model, [(1, head) for head in range(4)]):
        found = to_numpy(model(make_inputs(model)))
    output_kernel(attention_layers(model)[1]).assign(np.zeros((4, 4, 16)))
    expected = to_numpy(model(make_inputs(model)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_none_all_stays():
    model = make_model(small_models.llama)
    inputs = make_inputs(model)
    plain = to_numpy(model(inputs))
    with without_heads(model, []):
        np.testing.assert_array_equal(to_numpy(model(inputs)), plain)


def test_attention_is_captured_as_it_is():
    model = make_model(small_models.llama)
    inputs = make_inputs(model)
    with without_heads(model, [(0, 1)]), captured_attention(model, [0]) as some:
        model(inputs)
    with captured_attention(model, [0]) as plain:
        model(inputs)
    np.testing.assert_array_equal(
        to_numpy(some[0].query), to_numpy(plain[0].query)
    )


def test_nothing_is_left_when_a_call_raises():
    model = make_model(small_models.gemma_3)
    with unchanged(model):
        with pytest.raises(RuntimeError, match="on the way"):
            with without_heads(model, [(0, 1), (5, 2)]):
                raise RuntimeError("on the way")
