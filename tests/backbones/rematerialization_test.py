"""A student whose blocks run twice learns the same and stores less."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid.backbones import decoder
from keras_laid.backbones.forward import forward
from keras_laid.backbones.rematerialization import vision_blocks
from tests.backbones import small_models
from tests.backbones.small_models import LENGTH
from tests.backbones.small_models import make_inputs
from tests.backbones.small_models import make_model
from tests.support import NO_XLA
from tests.support import make_terms
from tests.support import to_numpy

BACKEND = keras.backend.backend()
# Compiling takes long.
FAMILIES = [small_models.pali_gemma]
if BACKEND == "torch":
    FAMILIES = small_models.FAMILIES


def one_step(family, rematerialize):
    """Runs one step; returns the terms and the student's weights."""
    student = make_model(family)
    keras_laid.attach_gain_modulation(student)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        make_model(family, seed=5),
        student,
        terms=make_terms(query_key_weight=0.1, layer_map="uniform"),
    )
    distiller.compile(
        keras.optimizers.SGD(0.1), rematerialize=rematerialize, **NO_XLA
    )
    inputs = make_inputs(student)
    if family is not small_models.phi_3:  # Takes one set of positions.
        length = LENGTH + (
            4 if "images" in inputs and "response_mask" in inputs else 0
        )
        positions = 3 * np.arange(length)
        inputs["positions"] = np.stack([positions, positions + 1])
    history = distiller.fit(inputs, inputs["token_ids"], verbose=0).history
    return history, [to_numpy(v) for v in distiller.trainable_variables]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_learns_the_same(family):
    # Given positions apply even though blocks rerun outside of all scopes.
    terms, weights = one_step(family, rematerialize=False)
    same_terms, same_weights = one_step(family, rematerialize=True)
    for name, values in terms.items():
        np.testing.assert_allclose(same_terms[name], values, rtol=1e-5)
    for one, other in zip(weights, same_weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        small_models.pali_gemma,
        small_models.gemma_3,
        small_models.gemma_4,
    ],
    ids=lambda family: family.__name__,
)
def test_vision_blocks_are_found(family):
    backbone = decoder.backbone_of(make_model(family))
    assert len(vision_blocks(backbone)) == 1


@pytest.mark.skipif(BACKEND != "jax", reason="Only JAX shows stored values.")
def test_keeps_less():
    import jax

    model = make_model(small_models.llama, num_layers=8)
    inputs = make_inputs(model)
    variables = model.trainable_variables

    def kept_bytes(rematerialize):
        def loss(values):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(mapping):
                unembedding, attention, _ = forward(
                    model, inputs, [7], True, rematerialize
                )
                return ops.sum(unembedding.logits()) + ops.sum(
                    attention[7].query
                )

        _, pullback = jax.vjp(loss, [v.value for v in variables])
        kept = jax.tree.leaves(pullback)
        return sum(each.nbytes for each in kept)

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


def test_dropout_is_refused():
    student = make_model(small_models.gemma_2, dropout=0.5)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        make_model(small_models.gemma_2, seed=5), student
    )
    with pytest.raises(ValueError, match="without dropout.*0.5"):
        distiller.compile("sgd", rematerialize=True)
