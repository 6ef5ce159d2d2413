"""Hidden states and their unembedding, against a model's logits."""

import numpy as np
import pytest
from keras import ops

from keras_laid.backbones.unembedding import hidden_states_for_logits
from keras_laid.backbones.unembedding import unembedding
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import quantize
from tests.support import to_numpy
from tests.support import value_and_grads


def adapted(model):
    model.backbone.enable_lora(2)
    for variable in model.backbone.token_embedding.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))


def quantised(model):
    quantize(model, "int8")


@pytest.mark.parametrize(
    "family, change",
    [
        (small_models.gemma_2, None),  # Soft-capped.
        (small_models.llama, None),  # Not tied to the embedding.
        (small_models.gemma_2, adapted),
        (small_models.gemma_2, quantised),
        (small_models.llama, quantised),
    ],
)
def test_makes_the_models_own_logits(family, change):
    model = make_model(family)
    if change is not None:
        change(model)
    inputs = make_inputs(model)
    expected = to_numpy(model(inputs))
    with hidden_states_for_logits(model):
        hidden = model(inputs)
    assert hidden.shape[-1] == model.backbone.hidden_dim
    found = unembedding(model, hidden)
    assert found.vocabulary == small_models.VOCABULARY
    np.testing.assert_allclose(to_numpy(found.logits()), expected, atol=1e-5)
    # The model is as it was.
    np.testing.assert_array_equal(to_numpy(model(inputs)), expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize(
    "family",
    [small_models.gemma_2, small_models.llama],
    ids=lambda family: family.__name__,
)
def test_the_gradient_of_rounded_hidden_states(family, mode):
    """The gradient skips the rounding, whose own gradient is 0."""
    model = make_model(family)
    rng = np.random.default_rng(0)
    hidden, slope = (
        ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
        for shape in (
            (2, 3, model.backbone.hidden_dim),
            (2, 3, small_models.VOCABULARY),
        )
    )

    def gradient():
        return to_numpy(
            value_and_grads(
                lambda x: ops.sum(slope * unembedding(model, x).logits()),
                hidden,
            )[1][0]
        ).ravel()

    exact = gradient()
    quantize(model, mode)
    found = gradient()
    cosine = found @ exact / np.linalg.norm(found) / np.linalg.norm(exact)
    assert cosine > (0.99 if mode == "int8" else 0.95)


def test_nothing_is_left_when_a_call_raises():
    model = make_model(small_models.llama)
    expected = to_numpy(model(make_inputs(model)))
    with pytest.raises(RuntimeError), hidden_states_for_logits(model):
        raise RuntimeError
    found = to_numpy(model(make_inputs(model)))
    np.testing.assert_array_equal(found, expected)
