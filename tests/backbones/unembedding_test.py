"""Hidden states and what makes logits of them, against a model's logits."""

import numpy as np
import pytest

from keras_laid.backbones.unembedding import hidden_states_for_logits
from keras_laid.backbones.unembedding import unembedding
from tests.backbones import small_models
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import to_numpy


def adapted(model):
    model.backbone.enable_lora(2)
    for variable in model.backbone.token_embedding.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))


def quantised(model):
    model.quantize("int8")


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


def test_nothing_is_left_when_a_call_raises():
    model = make_model(small_models.llama)
    expected = to_numpy(model(make_inputs(model)))
    with pytest.raises(RuntimeError), hidden_states_for_logits(model):
        raise RuntimeError
    found = to_numpy(model(make_inputs(model)))
    np.testing.assert_array_equal(found, expected)
